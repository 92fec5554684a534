"""Discrete-event simulation of a serving cluster on a heap of events: requests, machines, KV memory, transfers.

A request has a prompt task, which yields its first token, and, for more than one token, a decode task with
output_tokens - 1 steps. A cluster scheduler names the machine of each. Between two machines the KV cache travels over a
link of its own. A machine runs iterations of a batch that `common.serving.batching` chooses at every iteration
boundary; iterations of decodes alone run as one block until the first of them ends or an arrival that may join cuts it.

The rules are those of splitwise-sim (Mutinifni/splitwise-sim: simulator.py, instance.py, executor.py, interconnect.py,
request.py), down to the order of simultaneous events. `common.serving.simpy_engine` is a second, plain implementation.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any, NamedTuple

from common.serving.latency import LatencyModel

if TYPE_CHECKING:
    import pandas as pd

RETRY_S = 1.0  # a transfer whose destination is full tries again after so many seconds


@dataclass(frozen=True)
class MachineSpec:
    """A machine: where it belongs, how fast it is, and how many bytes of KV cache it can hold."""

    name: str
    pool: str
    latency: LatencyModel
    capacity: int


@dataclass(frozen=True)
class Limits:
    """Of one batch: requests, tokens (a prompt counts its length, a decode 1). passes: so many give a task priority."""

    batch_size: int = 512
    batch_tokens: int = 2048
    passes: int = 4


class Request:
    """One request and what happened to it. Times in seconds, None until they happen; kv_*: bytes."""

    __slots__ = (
        "arrival", "completed", "decode_bytes", "decode_machine", "decode_start", "first_token", "index",
        "output_tokens", "prompt_bytes", "prompt_machine", "prompt_start", "prompt_tokens", "transfer_bytes",
        "transfer_seconds", "transfer_start",
    )  # fmt: skip

    def __init__(self, index: int, arrival: float, prompt_tokens: int, output_tokens: int, kv_bytes: int) -> None:
        self.index, self.arrival = index, arrival
        self.prompt_tokens, self.output_tokens = prompt_tokens, output_tokens
        self.prompt_bytes = (prompt_tokens + 1) * kv_bytes  # reserved by the prompt task
        self.decode_bytes = (output_tokens - 1) * kv_bytes  # reserved by the decode task, besides
        self.transfer_bytes = prompt_tokens * kv_bytes
        self.prompt_machine: Any = None
        self.decode_machine: Any = None
        self.prompt_start: float | None = None
        self.first_token: float | None = None
        self.transfer_start: float | None = None
        self.transfer_seconds = 0.0
        self.decode_start: float | None = None
        self.completed: float | None = None

    @property
    def memory(self) -> int:
        """Bytes of the whole request."""
        return self.prompt_bytes + self.decode_bytes


class Task:
    """One phase of a request on a machine. `blocked`: it has run, was put aside, and keeps its memory."""

    __slots__ = (
        "arrival", "blocked", "finish", "joined", "machine", "memory", "passed", "place", "prompt", "request",
        "since", "steps", "tokens",
    )  # fmt: skip

    def __init__(self, request: Request, machine: Machine, prompt: bool) -> None:
        self.request, self.machine, self.prompt, self.arrival = request, machine, prompt, request.arrival
        self.tokens = request.prompt_tokens if prompt else 1
        self.memory = request.prompt_bytes if prompt else request.decode_bytes
        self.steps = 1 if prompt else request.output_tokens - 1  # iterations that remain, while outside the batch
        self.passed = 0  # boundaries at which it was passed over, up to `since`
        self.since: int | None = None  # the machine's boundaries when it began to wait; None while it does not count
        self.blocked = False
        self.finish = 0  # the machine's iteration count at which it ends, while in the batch
        self.joined = 0  # order of entry into the batch
        self.place = (0.0, 0)  # order in the machine's pool of requests: arrival, then entry


def _passed_key(task: Task) -> tuple[int, float]:
    """Times passed over, then arrival: the order in which a task is put into the queue (but not kept there since)."""
    passed = task.passed if task.since is None else task.passed + task.machine.boundaries - task.since
    return passed, task.arrival


class Machine:
    """A machine's state. The scheduler reads pool, pending_tokens, reserved, queue_length, residents and capacity."""

    def __init__(self, index: int, spec: MachineSpec, limits: Limits) -> None:
        self.index, self.name, self.home = index, spec.name, spec.pool
        self.latency, self.capacity, self.limits = spec.latency, spec.capacity, limits
        self.pending_tokens = 0  # scheduled here and not yet processed: prompt tokens, and 1 a decode task
        self.reserved = 0  # bytes scheduled here and not yet freed
        self.memory = self.peak_memory = 0  # bytes of KV cache held
        self.residents = 0  # requests with a task here
        self.pending: list[Task] = []  # every task outside the batch
        self.prompts: list[Task] = []  # the prompts among them, in order of coming
        self.blocked: dict[Task, None] = {}  # those put aside, in that order
        self.waiting: list[tuple[tuple[float, int], Task]] = []  # the first task outside the batch of each request
        self.behind: dict[Request, Task] = {}  # decodes that wait for the prompt of their own request
        self.batch: dict[Task, None] = {}  # in order of joining
        self.prompts_in_batch: list[Task] = []
        self.ends: list[tuple[int, int, Task]] = []  # heap of the batch's decodes: (finish, joined, task)
        self.batch_tokens = 0
        self.boundaries = self.steps = self.entries = self.joins = 0
        self.event: Event | None = None
        self.iteration_s = self.iterations = self.block_start = 0.0
        self.paused = False

    @property
    def queue_length(self) -> int:
        return len(self.pending)

    def hold(self, size: int) -> None:
        self.memory += size
        self.peak_memory = max(self.peak_memory, self.memory)

    def release(self, size: int) -> None:
        self.memory -= size
        self.reserved -= size

    def enqueue(self, task: Task) -> None:
        insort(self.pending, task, key=_passed_key)
        if task.prompt:
            self.prompts.append(task)

    def wait(self, task: Task) -> None:
        """From here on the task counts the boundaries that pass it over."""
        task.since = self.boundaries
        insort(self.waiting, (task.place, task))

    def join(self, task: Task, now: float) -> None:
        """From the queue into the batch; a task that has not run yet takes its memory."""
        self.pending.remove(task)
        if task.prompt:
            self.prompts.remove(task)
        del self.waiting[bisect_left(self.waiting, (task.place,))]
        assert task.since is not None
        task.passed, task.since = task.passed + self.boundaries - task.since, None
        if task.blocked:
            task.blocked = False
            del self.blocked[task]
        else:
            self.hold(task.memory)
            if task.prompt:
                task.request.prompt_start = now
            else:
                task.request.decode_start = now
        self.joins += 1
        task.joined = self.joins
        self.batch[task] = None
        if task.prompt:
            self.prompts_in_batch.append(task)
        else:
            task.finish = self.steps + task.steps
            heappush(self.ends, (task.finish, task.joined, task))

    def put_aside(self, tasks: list[Task]) -> None:
        """Decodes of the batch that leave it and keep their memory."""
        for task in tasks:
            del self.batch[task]
            task.blocked, task.steps, task.joined = True, task.finish - self.steps, 0
            insort(self.pending, task, key=_passed_key)
            self.blocked[task] = None
            self.wait(task)
        if tasks:
            self.ends = [entry for entry in self.ends if entry[1] == entry[2].joined]
            heapify(self.ends)


class Event(float):
    """A point in time with an action. Compares by time alone: simultaneous events come in the heap's own order."""

    __slots__ = ("action", "argument", "retry")
    action: Callable[[Any], None] | None
    argument: Any
    retry: bool


class StableEvent(Event):
    """An event of a calendar where simultaneous events come in the order of their scheduling."""

    __slots__ = ("number",)
    number: int

    def __lt__(self, other: float) -> bool:
        assert isinstance(other, StableEvent)
        return (float(self), self.number) < (float(other), other.number)


Schedule = Callable[[Request, "Any"], tuple[Any, Any]]


class Block(NamedTuple):
    """Iterations of one batch that ran back to back: seconds, count, and what was in the batch."""

    machine: int
    start: float
    end: float
    iterations: int
    prompts: int
    prompt_tokens: int
    decodes: int


@dataclass
class Log:
    """What a simulation did.

    unfinished: requests that did not complete because memory is full of prompts and no event can change that, or
    because the run was stopped.
    """

    requests: list[Request]
    blocks: list[Block]
    machines: Sequence[Any]
    unfinished: int


class Cluster:
    """The machines, the pools that a scheduler may move them between, and the calendar."""

    def __init__(
        self,
        specs: Sequence[MachineSpec],
        schedule: Schedule,
        batching: Callable[[Machine], tuple[list[Task], list[Task]]],
        *,
        on_idle: Callable[[Any, Any], None] | None = None,
        bandwidth: float = float("inf"),
        limits: Limits | None = None,
        stable_ties: bool = False,
    ) -> None:
        self.machines = [Machine(i, spec, limits or Limits()) for i, spec in enumerate(specs)]
        self.pools: dict[str, list[Machine]] = {}
        for machine in self.machines:
            self.pools.setdefault(machine.home, []).append(machine)
        self.schedule, self.on_idle, self.select, self.bandwidth = schedule, on_idle, batching, bandwidth
        self.now = 0.0
        self._heap: list[Event] = []
        self._live = 0  # events that can change something: all but cancelled ones and retries of transfers
        self._stable, self._number = stable_ties, 0
        self._stop: Callable[[Request], bool] | None = None
        self._stopped = False
        self.blocks: list[Block] = []

    def run(self, requests: list[Request], stop: Callable[[Request], bool] | None = None) -> Log:
        """Simulates until nothing is left to happen, or until stop(request) is true.

        stop is asked at the first token of each request and at its completion.
        """
        self._stop = stop
        for request in requests:
            self._at(request.arrival, self._arrive, request)
        while self._heap and self._live and not self._stopped:
            event = heappop(self._heap)
            if event.action is None:
                continue
            self.now = float(event)
            self._live -= not event.retry
            event.action(event.argument)
        unfinished = sum(request.completed is None for request in requests)
        return Log(requests, self.blocks, self.machines, unfinished)

    def _at(self, time: float, action: Callable[[Any], None], argument: Any, retry: bool = False) -> Event:
        event: Event
        if self._stable:
            event = StableEvent(time)
            self._number += 1
            event.number = self._number
        else:
            event = Event(time)
        event.action, event.argument, event.retry = action, argument, retry
        heappush(self._heap, event)
        self._live += not retry
        return event

    def _arrive(self, request: Request) -> None:
        source, target = self.schedule(request, self)
        request.prompt_machine, request.decode_machine = source, target
        source.pending_tokens += request.prompt_tokens
        source.reserved += request.prompt_bytes
        if request.output_tokens > 1:
            target.pending_tokens += 1
            target.reserved += request.decode_bytes + (request.prompt_bytes if target is not source else 0)
        self._enter(Task(request, source, prompt=True))
        if target is source and request.output_tokens > 1:
            self._enter(Task(request, source, prompt=False), second=True)

    def _enter(self, task: Task, second: bool = False) -> None:
        """A task comes to its machine. second: behind the prompt of its request, which it must wait for."""
        machine, limits = task.machine, task.machine.limits
        if second:
            machine.behind[task.request] = task
        else:
            machine.entries += 1
            machine.residents += 1
            task.place = (task.arrival, machine.entries)
            machine.wait(task)
        machine.enqueue(task)
        if not machine.batch:
            if machine.memory + task.memory <= machine.capacity:
                self._start(machine)
        elif len(machine.batch) < limits.batch_size and machine.batch_tokens + task.tokens <= limits.batch_tokens:
            self._pause(machine)
        elif task.prompt and machine.batch_tokens - len(machine.batch) + task.tokens <= limits.batch_tokens:
            self._pause(machine)  # does nothing if there are prompts in the batch

    def _start(self, machine: Machine) -> None:
        """An iteration boundary: choose the batch and run it."""
        if machine.pending:
            aside, joining = self.select(machine)
            machine.put_aside(aside)
            for task in joining:
                machine.join(task, self.now)
        else:
            machine.batch_tokens = len(machine.batch)
        machine.boundaries += 1
        if not machine.batch:
            if not machine.residents and self.on_idle is not None:
                self.on_idle(machine, self)
            return
        prompt_tokens = 0
        for task in machine.prompts_in_batch:
            prompt_tokens += task.tokens
        context = _context(machine) if machine.latency.decode_axis == "context" else 0
        machine.iteration_s = machine.latency.iteration(prompt_tokens, len(machine.ends), context)
        machine.iterations = 1 if prompt_tokens else machine.ends[0][0] - machine.steps
        machine.block_start = self.now
        machine.event = self._at(self.now + machine.iteration_s * machine.iterations, self._finish, machine)

    def _pause(self, machine: Machine) -> None:
        """Ends a block of decodes at the next iteration boundary, for a task that may join there."""
        if machine.paused or machine.prompts_in_batch:
            return
        machine.paused = True
        assert machine.event is not None
        start = float(machine.event) - machine.iteration_s * machine.iterations
        elapsed = self.now - start
        machine.iterations = elapsed // machine.iteration_s + 1
        remaining = machine.iteration_s * machine.iterations - elapsed
        machine.event.action = None
        self._live -= 1
        machine.event = self._at(self.now + remaining, self._finish, machine)

    def _finish(self, machine: Machine) -> None:
        """The end of a block: first tokens, completed requests, and the next block."""
        steps, prompts, decodes = int(machine.iterations), machine.prompts_in_batch, len(machine.ends)
        tokens = machine.batch_tokens - decodes
        self.blocks.append(Block(machine.index, machine.block_start, self.now, steps, len(prompts), tokens, decodes))
        machine.steps += steps
        ended = []
        while machine.ends and machine.ends[0][0] == machine.steps:
            ended.append(heappop(machine.ends)[2])
        if prompts:
            ended = sorted(ended + prompts, key=lambda task: task.joined)
            machine.prompts_in_batch = []
        for task in ended:
            del machine.batch[task]
            if task.prompt:
                self._first_token(task)
            else:
                machine.pending_tokens -= 1
                self._complete(task.request, machine)
        machine.paused = False
        self._start(machine)

    def _first_token(self, task: Task) -> None:
        machine, request = task.machine, task.request
        machine.pending_tokens -= task.tokens
        request.first_token = self.now
        if self._stop is not None and self._stop(request):
            self._stopped = True
        if request.output_tokens == 1:
            self._complete(request, machine)
        elif request.decode_machine is machine:
            decode = machine.behind.pop(request)
            decode.place = task.place
            machine.wait(decode)
        else:
            machine.residents -= 1
            self._send(request, retry=False)

    def _complete(self, request: Request, machine: Machine) -> None:
        machine.residents -= 1
        machine.release(request.memory)
        request.completed = self.now
        if self._stop is not None and self._stop(request):
            self._stopped = True

    def _retry(self, request: Request) -> None:
        self._send(request, retry=True)

    def _send(self, request: Request, retry: bool) -> None:
        """Starts the transfer of a prompt's KV cache if the destination has room, which it takes now."""
        target = request.decode_machine
        if target.memory + request.prompt_bytes > target.capacity:
            self._at(self.now + RETRY_S, self._retry, request, retry=True)
            return
        target.hold(request.prompt_bytes)
        request.transfer_start = self.now
        request.transfer_seconds = request.transfer_bytes / self.bandwidth
        self._at(self.now + request.transfer_seconds, self._received, request)

    def _received(self, request: Request) -> None:
        source = request.prompt_machine
        source.release(request.prompt_bytes)
        self._enter(Task(request, request.decode_machine, prompt=False))
        if not source.pending:  # what waited for memory at the source may run now
            return
        limits = source.limits
        if not source.batch:
            if source.memory + source.pending[0].memory <= source.capacity:
                self._start(source)
        elif len(source.batch) < limits.batch_size and source.batch_tokens < limits.batch_tokens:
            self._pause(source)


def _context(machine: Machine) -> int:
    """Tokens in the KV caches of the batch's decodes."""
    left = sum(finish - machine.steps for finish, _, _ in machine.ends)
    return sum(t.request.prompt_tokens + t.request.output_tokens for _, _, t in machine.ends) - left


def requests_of(trace: pd.DataFrame, kv_bytes: int) -> list[Request]:
    """The requests of a checked trace (`common.serving.traces.load_trace`)."""
    columns = zip(
        trace["arrival"].tolist(), trace["prompt_tokens"].tolist(), trace["output_tokens"].tolist(), strict=True
    )
    return [Request(i, arrival, prompt, output, kv_bytes) for i, (arrival, prompt, output) in enumerate(columns)]
