"""The cluster of `common.serving.engine` written a second time, on simpy: a process a machine, one a waiting transfer.

Plain lists and one look at every task at every boundary: slow, short, and with nothing in common with the fast engine
but the rules, the requests and the latency curves. Tests hold the two logs against each other. Only mixed batching.
Simultaneous events come in the order of their scheduling, as in the fast engine with stable_ties=True.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Generator, Sequence
from typing import Any

import simpy

from common.serving.engine import RETRY_S, Block, Limits, Log, MachineSpec, Request, Schedule

Process = Generator[simpy.Event, Any, None]


class PlainTask:
    """A phase of a request on a machine: how many tokens are left to generate, and how often it was passed over."""

    def __init__(self, request: Request, prompt: bool) -> None:
        self.request, self.prompt, self.left = request, prompt, 1 if prompt else request.output_tokens - 1
        self.tokens = request.prompt_tokens if prompt else 1
        self.memory = request.prompt_bytes if prompt else request.decode_bytes
        self.passed, self.has_run = 0, False


class PlainMachine:
    """A machine as its scheduler sees it, its queues, and the process that runs its iterations."""

    def __init__(self, index: int, spec: MachineSpec, limits: Limits, cluster: Cluster) -> None:
        self.index, self.name, self.home, self.latency = index, spec.name, spec.pool, spec.latency
        self.capacity, self.limits, self.cluster = spec.capacity, limits, cluster
        self.pending_tokens = self.reserved = self.memory = self.peak_memory = self.batch_tokens = 0
        self.queue: list[PlainTask] = []
        self.prompts: list[PlainTask] = []
        self.blocked: list[PlainTask] = []
        self.batch: list[PlainTask] = []
        self.pool: list[
            tuple[Request, list[PlainTask]]
        ] = []  # by arrival: the tasks of each request, the first one first
        self.running = self.cutting = False
        self.end = self.iteration_s = self.iterations = 0.0
        self.wake = cluster.env.event()
        self.process = cluster.env.process(self.run())

    @property
    def residents(self) -> int:
        return len(self.pool)

    @property
    def queue_length(self) -> int:
        return len(self.queue)

    def hold(self, size: int) -> None:
        self.memory += size
        self.peak_memory = max(self.peak_memory, self.memory)

    def enqueue(self, task: PlainTask) -> None:
        insort(self.queue, task, key=lambda t: (t.passed, t.request.arrival))

    def enter(self, task: PlainTask) -> None:
        tasks = next((tasks for request, tasks in self.pool if request is task.request), None)
        if tasks is None:
            insort(self.pool, (task.request, [task]), key=lambda entry: entry[0].arrival)
        else:
            tasks.append(task)
        self.enqueue(task)
        if task.prompt:
            self.prompts.append(task)
        limits, prompts = self.limits, sum(t.prompt for t in self.batch)
        joins = len(self.batch) < limits.batch_size and self.batch_tokens + task.tokens <= limits.batch_tokens
        prompt_tokens = self.batch_tokens - (len(self.batch) - prompts)
        replaces = prompts < len(self.batch) and prompt_tokens + task.tokens <= limits.batch_tokens
        if not self.running:
            self.start_if_fits(task)
        elif joins or (task.prompt and replaces):
            self.cut_block()

    def start_if_fits(self, task: PlainTask) -> None:
        if self.memory + task.memory <= self.capacity:
            self.running = True
            self.cluster.now(self.wake)

    def cut_block(self) -> None:
        if self.batch and not self.cutting and not any(task.prompt for task in self.batch):
            self.cutting = True
            self.process.interrupt()

    def run(self) -> Process:
        """Chooses a batch, runs its block of iterations (shortened by interrupts), and sleeps when there is none."""
        env = self.cluster.env
        while True:
            if not self.running:
                yield self.wake
                self.wake = env.event()
            self.choose_batch()
            if not self.batch:
                self.running = False
                if not self.pool and self.cluster.on_idle is not None:
                    self.cluster.on_idle(self, self.cluster)
                continue
            prompt_tokens = sum(t.tokens for t in self.batch if t.prompt)
            decodes = [t for t in self.batch if not t.prompt]
            context = sum(t.request.prompt_tokens + t.request.output_tokens - t.left for t in decodes)
            self.iteration_s = self.latency.iteration(prompt_tokens, len(decodes), context)
            self.iterations = 1 if prompt_tokens else min(t.left for t in decodes)
            start, wait = env.now, self.iteration_s * self.iterations
            while True:
                self.end = env.now + wait
                try:
                    yield env.timeout(wait)
                    break
                except simpy.Interrupt:
                    elapsed = env.now - (self.end - self.iteration_s * self.iterations)
                    self.iterations = elapsed // self.iteration_s + 1
                    wait = max(0.0, self.iteration_s * self.iterations - elapsed)
            prompts = len(self.batch) - len(decodes)
            self.cluster.blocks.append(
                Block(self.index, start, env.now, int(self.iterations), prompts, prompt_tokens, len(decodes))
            )
            self.finish(int(self.iterations))

    def finish(self, steps: int) -> None:
        for task in self.batch:
            task.left -= steps
        for task in [t for t in self.batch if not t.left]:
            self.batch.remove(task)
            tasks = next(tasks for request, tasks in self.pool if request is task.request)
            tasks.remove(task)
            if not tasks:
                self.pool = [entry for entry in self.pool if entry[1] is not tasks]
            self.pending_tokens -= task.tokens
            request = task.request
            if task.prompt:
                request.first_token = self.cluster.env.now
            if not task.prompt or request.output_tokens == 1:
                self.memory -= request.memory
                self.reserved -= request.memory
                request.completed = self.cluster.env.now
            elif request.decode_machine is not self:
                self.cluster.send(request)
        self.cutting = False

    def choose_batch(self) -> None:
        chosen: list[PlainTask] = []
        memory = self.memory

        def closed(task: PlainTask) -> bool:
            tokens = sum(t.tokens for t in chosen) + task.tokens
            return len(chosen) == self.limits.batch_size or (bool(chosen) and tokens > self.limits.batch_tokens)

        def in_batch(task: PlainTask) -> bool:
            return any(t.request is task.request for t in chosen)

        def take(task: PlainTask) -> bool:
            nonlocal memory
            need = 0 if task.has_run else task.memory
            if memory + need > self.capacity:
                return False
            memory += need
            chosen.append(task)
            return True

        for task in self.queue:
            if task.passed < self.limits.passes or closed(task):
                break
            if not in_batch(task):
                take(task)
        for source in (self.prompts, self.blocked, self.batch, [tasks[0] for _, tasks in self.pool]):
            for task in source:
                if source is not self.prompts and in_batch(task):
                    continue
                if closed(task):
                    break
                if not in_batch(task) and not take(task):
                    break
        self.batch_tokens = sum(task.tokens for task in chosen)
        for task in [t for t in self.batch if t not in chosen]:
            self.batch.remove(task)
            self.enqueue(task)
            self.blocked.append(task)
        for task in [t for t in chosen if t not in self.batch]:
            self.queue.remove(task)
            if task in self.blocked:
                self.blocked.remove(task)
            if task.prompt:
                self.prompts.remove(task)
            if not task.has_run:
                task.has_run = True
                self.hold(task.memory)
                name = "prompt_start" if task.prompt else "decode_start"
                setattr(task.request, name, self.cluster.env.now)
            self.batch.append(task)
        for _, tasks in self.pool:
            tasks[0].passed += tasks[0] not in self.batch


class Cluster:
    """As `common.serving.engine.Cluster`, with the same arguments but `stable_ties`, and the same result."""

    def __init__(
        self,
        specs: Sequence[MachineSpec],
        schedule: Schedule,
        batching: Callable[..., Any] | None = None,
        *,
        on_idle: Callable[[Any, Any], None] | None = None,
        bandwidth: float = float("inf"),
        limits: Limits | None = None,
    ) -> None:
        if batching is not None and batching.__name__ != "mixed_batching":
            raise ValueError(f"this engine has mixed batching only, not {batching.__name__}")
        self.env = simpy.Environment()
        self.schedule, self.on_idle, self.bandwidth = schedule, on_idle, bandwidth
        self.machines = [PlainMachine(i, spec, limits or Limits(), self) for i, spec in enumerate(specs)]
        self.pools: dict[str, list[PlainMachine]] = {}
        for machine in self.machines:
            self.pools.setdefault(machine.home, []).append(machine)
        self.blocks: list[Block] = []
        self.stuck = 0  # transfers that wait for memory

    def now(self, event: simpy.Event) -> None:
        """Lets an event happen before anything else does."""
        event._ok, event._value = True, None
        self.env.schedule(event, priority=simpy.events.URGENT)

    def run(self, requests: list[Request]) -> Log:
        """Simulates until nothing is left to happen but retries of transfers."""
        for request in requests:
            self.env.timeout(request.arrival, request).callbacks.append(lambda event: self.arrive(event.value))
        while self.env.peek() < float("inf") and not self._only_retries():
            self.env.step()
        unfinished = sum(request.completed is None for request in requests)
        return Log(requests, self.blocks, self.machines, unfinished)

    def _only_retries(self) -> bool:
        """Every entry left in the calendar is the sleep of a transfer that waits for memory."""
        return self.stuck > 0 and len(self.env._queue) == self.stuck

    def arrive(self, request: Request) -> None:
        source, target = self.schedule(request, self)
        request.prompt_machine, request.decode_machine = source, target
        source.pending_tokens += request.prompt_tokens
        source.reserved += request.prompt_bytes
        decodes = request.output_tokens > 1
        if decodes:
            target.pending_tokens += 1
            target.reserved += request.decode_bytes + (0 if target is source else request.prompt_bytes)
        source.enter(PlainTask(request, prompt=True))
        if decodes and target is source:
            source.enter(PlainTask(request, prompt=False))

    def send(self, request: Request) -> None:
        """A transfer begins at once if there is room; its process waits for the room and then for the link."""
        if self.reserve(request):
            self.travel(request)
        else:
            self.stuck += 1
            self.env.process(self.transfer(request))

    def reserve(self, request: Request) -> bool:
        target = request.decode_machine
        if target.memory + request.prompt_bytes > target.capacity:
            return False
        target.hold(request.prompt_bytes)
        request.transfer_start = self.env.now
        request.transfer_seconds = request.transfer_bytes / self.bandwidth
        return True

    def transfer(self, request: Request) -> Process:
        while True:
            yield self.env.timeout(RETRY_S)
            if self.reserve(request):
                break
        self.stuck -= 1
        self.travel(request)

    def travel(self, request: Request) -> None:
        arrived = self.env.timeout(request.transfer_seconds)
        arrived.callbacks.append(lambda _: self.received(request))

    def received(self, request: Request) -> None:
        source, target = request.prompt_machine, request.decode_machine
        source.memory -= request.prompt_bytes
        source.reserved -= request.prompt_bytes
        target.enter(PlainTask(request, prompt=False))
        if not source.queue:
            return
        if not source.running:
            source.start_if_fits(source.queue[0])
        elif len(source.batch) < source.limits.batch_size and source.batch_tokens < source.limits.batch_tokens:
            source.cut_block()
