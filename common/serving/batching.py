"""Machine-level schedulers: which tasks form the next batch at an iteration boundary.

Each is a function of a machine of `common.serving.engine` that returns the decodes to put aside and the tasks to let
in, both in order, and sets machine.batch_tokens (a prompt counts its length, a decode 1). Prompts are never split.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.serving.engine import Machine, Task


class _Batch:
    """A batch under construction: who is let in, and the room that is left."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.limits, self.capacity = machine, machine.limits, machine.capacity
        self.memory, self.tokens, self.size = machine.memory, 0, 0
        self.joining: list[Task] = []
        self.requests: set[object] = set()

    def full(self, tokens: int) -> bool:
        """No room for a task of so many tokens; the first task of a batch may be of any length."""
        too_long = self.size > 0 and self.tokens + tokens > self.limits.batch_tokens
        return self.size == self.limits.batch_size or too_long

    def fits(self, task: Task) -> bool:
        """Whether its memory is there: a task that has run before holds it already."""
        return task.blocked or self.memory + task.memory <= self.capacity

    def add(self, task: Task) -> None:
        self.joining.append(task)
        self.requests.add(task.request)
        self.tokens += task.tokens
        self.size += 1
        if not task.blocked:
            self.memory += task.memory

    def keep(self) -> list[Task]:
        """Takes over the old batch's decodes as far as they fit, in their order; returns those that do not."""
        kept = _room(self.machine, self.size, self.tokens)
        self.size += kept
        self.tokens += kept
        return list(self.machine.batch)[kept:]


def mixed_batching(machine: Machine) -> tuple[list[Task], list[Task]]:
    """Prompts first, decodes beside them (splitwise-sim, instance.py, `SplitwiseInstance.select_batch`).

    In this order: the head of the queue while it was passed over often; prompts as they came; decodes put aside;
    decodes of the old batch; other tasks by the arrival of their request. A class ends where its next task does not
    fit; in the first class a lack of memory skips the task instead.
    """
    limits, capacity, memory = machine.limits, machine.capacity, machine.memory
    most, longest, passes, boundaries = limits.batch_size, limits.batch_tokens, limits.passes, machine.boundaries
    joining: list[Task] = []  # written out rather than through _Batch: half of a simulation's time is spent here
    requests: set[object] = set()
    tokens = size = 0
    for task in machine.pending:
        if (task.passed if task.since is None else task.passed + boundaries - task.since) < passes:
            break
        if size == most or (size and tokens + task.tokens > longest):
            break
        if task.request not in requests and (task.blocked or memory + task.memory <= capacity):
            joining.append(task)
            requests.add(task.request)
            memory += 0 if task.blocked else task.memory
            tokens, size = tokens + task.tokens, size + 1
    for task in machine.prompts:
        if size == most or (size and tokens + task.tokens > longest):
            break
        if task.request in requests:
            continue
        if memory + task.memory > capacity:
            break
        joining.append(task)
        requests.add(task.request)
        memory += task.memory
        tokens, size = tokens + task.tokens, size + 1
    for task in machine.blocked:
        if size == most or (size and tokens + 1 > longest):
            break
        if task.request not in requests:
            joining.append(task)
            requests.add(task.request)
            tokens, size = tokens + 1, size + 1
    kept = _room(machine, size, tokens)
    tokens, size = tokens + kept, size + kept
    if kept < len(machine.batch):
        machine.batch_tokens = tokens
        return list(machine.batch)[kept:], joining
    for _, task in machine.waiting:
        if task.request in requests:
            continue
        if size == most or (size and tokens + task.tokens > longest):
            break
        if not task.blocked:
            if memory + task.memory > capacity:
                break
            memory += task.memory
        joining.append(task)
        tokens, size = tokens + task.tokens, size + 1
    machine.batch_tokens = tokens
    return [], joining


def _room(machine: Machine, size: int, tokens: int) -> int:
    """How many decodes of the old batch fit behind `size` tasks with `tokens` tokens (the first task always does)."""
    room = min(machine.limits.batch_size - size, max(machine.limits.batch_tokens - tokens, 0 if size else 1))
    return max(0, min(len(machine.batch), room))


def continuous_batching(machine: Machine) -> tuple[list[Task], list[Task]]:
    """Prompts or decodes, never both: waiting prompts put the decodes aside for one iteration."""
    batch = _Batch(machine)
    for task in machine.prompts:
        if batch.full(task.tokens) or not batch.fits(task):
            break
        batch.add(task)
    if batch.joining:
        machine.batch_tokens = batch.tokens
        return list(machine.batch), batch.joining
    for task in machine.blocked:
        if batch.full(1):
            break
        batch.add(task)
    aside = batch.keep()
    for _, task in [] if aside else machine.waiting:
        if task.prompt or task.request in batch.requests:
            continue
        if batch.full(1) or not batch.fits(task):
            break
        batch.add(task)
    machine.batch_tokens = batch.tokens
    return aside, batch.joining


def request_level_batching(machine: Machine) -> tuple[list[Task], list[Task]]:
    """A batch of requests runs to completion before the next one starts (first come, first served).

    Requests are let in while their whole memory fits; a decode whose prompt came over a link is a request of its own.
    """
    batch = _Batch(machine)
    if machine.batch:
        batch.keep()
    started = [task for _, task in machine.waiting if not task.prompt and task.request.prompt_machine is machine]
    if machine.batch or started:  # the decodes of the prompts that have just run
        for task in started:
            batch.add(task)
    else:
        for _, task in machine.waiting:
            behind = task.request.decode_bytes if task.prompt and task.request in machine.behind else 0
            if batch.full(task.tokens) or batch.memory + task.memory + behind > batch.capacity:
                break
            batch.add(task)
            batch.memory += behind
    machine.batch_tokens = batch.tokens
    return [], batch.joining


BATCHING: dict[str, Callable[[Machine], tuple[list[Task], list[Task]]]] = {
    "mixed": mixed_batching,
    "continuous": continuous_batching,
    "request": request_level_batching,
}
