"""Users who share one device: a discrete-event simulation of the paper's concurrent sessions.

A user reads a document once and then asks questions, with time to think before each. The device serves one request at
a time, first come, first served. The caches of `resident` users fit into its memory; when another user is served, the
cache of the one who was served longest ago is swapped out, and comes back when that user asks again. (Section "a
concurrent programming framework" of arXiv 2405.08944; its exact formula was not seen, this is the simplest reading.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import simpy

from common.costs.catalogue import Accelerator, Transformer
from common.costs.roofline import CapacityError, concurrency, session_seconds, switch_seconds


@dataclass(frozen=True)
class Costs:
    """Seconds that the device is busy: reading a document, one answer, a cache on its way out, and on its way in."""

    prefill: float
    decode: float
    out: float = 0.0
    into: float = 0.0

    def __post_init__(self) -> None:
        for name, seconds in vars(self).items():
            if not seconds >= 0:
                raise ValueError(f"{name} takes 0 seconds or more, not {seconds}")


class Event(NamedTuple):
    """What the device did: `what` is a field of Costs."""

    start: float
    user: int
    what: str
    seconds: float


@dataclass(frozen=True)
class Session:
    """makespan: seconds until the last user is done. events: in order of time."""

    users: int
    makespan: float
    events: list[Event]

    @property
    def switches(self) -> int:
        """How often a user came back to a cache that had been swapped out."""
        return sum(event.what == "into" for event in self.events)

    def busy(self, *what: str) -> float:
        """Seconds that the device spent on this."""
        return sum(event.seconds for event in self.events if event.what in what)

    @property
    def per_hour(self) -> float:
        """Sessions an hour."""
        return 3600 * self.users / self.makespan

    @property
    def per_hour_bound(self) -> float:
        """What no schedule of the same work exceeds: the busier of the device's units and the link, never idle."""
        return 3600 * self.users / max(self.busy("prefill", "decode"), self.busy("out", "into"))


class Residency:
    """Which users' caches are in memory: at most `slots`, the least recently served leaves first."""

    def __init__(self, slots: int) -> None:
        if slots < 1:
            raise CapacityError(f"context does not fit: the memory holds the cache of {slots} users")
        self.slots = slots
        self.inside: OrderedDict[int, None] = OrderedDict()
        self.outside: set[int] = set()

    def enter(self, user: int) -> tuple[int | None, bool]:
        """Makes a user resident: (whose cache must go out for that, whether this user's must come back in)."""
        if user in self.inside:
            self.inside.move_to_end(user)
            return None, False
        victim = self.inside.popitem(last=False)[0] if len(self.inside) == self.slots else None
        if victim is not None:
            self.outside.add(victim)
        returns = user in self.outside
        self.outside.discard(user)
        self.inside[user] = None
        return victim, returns

    def leave(self, user: int) -> None:
        """Frees the place of a resident user who is done."""
        del self.inside[user]


def simulate(costs: Costs, users: int, rounds: int, think_seconds: float, resident: int) -> Session:
    """All users arrive at once; each reads its document, then `rounds` times thinks and is answered.

    resident: how many caches fit, `roofline.concurrency`. Raises CapacityError for none and ValueError for no user, no
    round or a negative time.
    """
    check_session(users, rounds, think_seconds)
    env, residency = simpy.Environment(), Residency(resident)
    device, events = simpy.Resource(env), list[Event]()

    def use(user: int, what: str) -> simpy.Event:
        events.append(Event(env.now, user, what, getattr(costs, what)))
        return env.timeout(getattr(costs, what))

    def live(user: int) -> Iterator[simpy.Event]:
        for turn in range(rounds + 1):
            if turn:
                yield env.timeout(think_seconds)
            with device.request() as granted:
                yield granted
                victim, returns = residency.enter(user)
                if victim is not None:
                    yield use(victim, "out")
                if returns:
                    yield use(user, "into")
                yield use(user, "decode" if turn else "prefill")
                if turn == rounds:
                    residency.leave(user)

    for user in range(users):
        env.process(live(user))
    env.run()
    return Session(users, env.now, events)


def check_session(users: int, rounds: int, think_seconds: float) -> None:
    """Raises ValueError for no user, no round or a negative time."""
    if min(users, rounds) < 1 or not think_seconds >= 0:
        raise ValueError(
            f"a session needs users and rounds of at least 1 and time to think of at least 0 s, not {users}, {rounds} "
            f"and {think_seconds}"
        )


def session_costs(model: Transformer, machine: Accelerator, context: int, output_tokens: int) -> tuple[Costs, int]:
    """The costs in closed form, and how many users are resident. Raises CapacityError if not even one fits."""
    one = session_seconds(model, machine, context, rounds=1, output_tokens=output_tokens, users=1)
    way = switch_seconds(model, machine, context) / 2
    return Costs(one["prefill"], one["decode"], way, way), concurrency(model, machine.memory_bytes, context)
