"""Part C's providers: a model behind a thread-safe queue, on a stack that the caller does not see.

A caller can do no more than ask and wait, as with an API. What a provider optimised, and who else uses its machine, is
in the seconds that the caller measures.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from common.generation.sampler import Generation

Switch = Callable[[bool], None]
POLL_S = 0.002  # how often an idle neighbour looks whether it is wanted


@dataclass(frozen=True)
class Provider:
    """threads: of torch. lean: whether its forward is the fused one over a static cache (common/generation/lean.py) or
    the plain one of `transformers`. neighbour: whether another process works on the core that it runs on."""

    threads: int
    lean: bool
    neighbour: bool

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"a provider has at least one thread, not {self.threads}")


class Service:
    """One provider that serves one model, in a thread of its own that takes requests from a queue.

    With one thread it stays on one core, so that a neighbour can be on the same. Use as a context manager.
    """

    def __init__(self, model: PreTrainedModel, provider: Provider, switch: Switch | None = None) -> None:
        self.model, self.provider, self.switch = model, provider, switch
        self.requests: queue.Queue[Any] = queue.Queue()
        self.worker = threading.Thread(target=self._work, daemon=True)
        self.worker.start()

    def ask(self, prompt: Sequence[int], new_tokens: int, stop_tokens: Sequence[int] = ()) -> Generation:
        """The greedy answer to one prompt; blocks until it is there. Raises what the generation raised."""
        reply: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.requests.put((prompt, new_tokens, stop_tokens, reply))
        answer = reply.get()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *exception: object) -> None:
        self.requests.put(None)
        self.worker.join()

    def _work(self) -> None:
        import torch

        from common.generation.sampler import generate

        if self.provider.threads == 1:
            stay_on(one_core())
        while (request := self.requests.get()) is not None:
            prompt, new_tokens, stop_tokens, reply = request
            torch.set_num_threads(self.provider.threads)
            if self.switch:
                self.switch(True)
            try:
                reply.put(generate(self.model, [prompt], new_tokens, stop_tokens=stop_tokens, lean=self.provider.lean))
            except Exception as error:
                reply.put(error)
            finally:
                if self.switch:
                    self.switch(False)


def one_core() -> int:
    """The first core that this process may use."""
    return min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


def stay_on(core: int) -> None:
    """Keeps the calling thread on a core, where the system can (Linux)."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})


@contextmanager
def noisy_neighbour(period: float, duty: float) -> Iterator[Switch]:
    """Starts a process that computes on `one_core` for the share `duty` of the time while it is switched on; yields the
    switch. Work and rest together last `period` seconds on average, each an exponential draw: with a fixed period the
    repetitions of a call may all meet the same phase. It ends with the block, and when this process dies.

    Raises ValueError for a duty outside [0, 1] and a period that is not positive.
    """
    if not 0 <= duty <= 1 or not period > 0:
        raise ValueError(f"needs 0 <= duty <= 1 and a positive period, not {duty} and {period}")
    context = multiprocessing.get_context("spawn")
    wanted, ready = context.Value("b", 0, lock=False), context.Event()
    process = context.Process(target=_burn, args=(wanted, ready, period, duty, one_core(), os.getpid()), daemon=True)
    process.start()
    try:
        ready.wait(60)

        def switch(on: bool) -> None:
            wanted.value = int(on)

        yield switch
    finally:
        process.terminate()
        process.join()


def _burn(wanted: Any, ready: Any, period: float, duty: float, core: int, parent: int) -> None:
    """The other process. Its phases follow the clock, not the requests."""
    stay_on(core)
    ready.set()
    random, working, until = Random(0), False, 0.0
    while os.getppid() == parent:
        if time.monotonic() >= until:
            working = not working
            mean = period * (duty if working else 1 - duty)
            until = time.monotonic() + (random.expovariate(1 / mean) if mean else 0.0)
        if working and wanted.value:
            sum(range(5_000))
        else:
            time.sleep(POLL_S)
