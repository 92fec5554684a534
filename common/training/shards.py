"""The gradient of a batch from shards of its rows, each in a process of its own with one thread of torch.

The operations of small models are too short to be worth two threads: on two cores, two processes that read half of the
rows each take about two thirds of the time. Shards are the same wherever they are computed, so that the gradient, bit
for bit, depends neither on the number of cores nor on that of torch's threads.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.training.data import IGNORED, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Loss = Callable[["PreTrainedModel", Batch], torch.Tensor]


@dataclass
class _Worker:
    """A process that answers rows with the sum of their losses and leaves the gradient in memory that both see."""

    process: BaseProcess
    connection: Connection
    gradient: list[torch.Tensor]

    def ask(self, rows: list[tuple[np.ndarray, np.ndarray]], labels: int) -> None:
        try:
            self.connection.send((rows, labels))
        except OSError:
            raise self._ended() from None

    def answer(self) -> float:
        try:
            loss = self.connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(loss, str):
            raise RuntimeError(f"the loss of a shard failed:\n{loss}")
        return loss

    def _ended(self) -> RuntimeError:
        self.process.join()
        return RuntimeError(
            f"the process of a shard ended with exit code {self.process.exitcode}; started again, training goes on "
            "from its last checkpoint"
        )


class Gradient:
    """Called with the batches of a step, sets the gradient of their mean loss. A context: its processes end with it.

    shards: of each batch; always 1 away from the CPU. Their processes are forks that share the parameters, so that only
    rows and gradients pass between them; with one core, or where forks are not safe, this process computes one shard
    after the other. loss: (model, batch) -> summed loss of the batch's labels; with several shards, it draws no random
    numbers.
    """

    def __init__(self, model: PreTrainedModel, loss: Loss, shards: int, *, bf16: bool = False) -> None:
        self.model, self.loss, self.bf16 = model, loss, bf16
        self.shards = shards if model.device.type == "cpu" else 1
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.workers: list[_Worker] = []

    def __enter__(self) -> Gradient:
        if self.shards > 1 and _can_fork():
            for parameter in self.parameters:
                parameter.data = _shared(parameter.data)
            self.workers = [self._fork() for _ in range(self.shards - 1)]
        return self

    def __exit__(self, *_: Any) -> None:
        for worker in self.workers:
            worker.connection.close()
        for worker in self.workers:
            worker.process.join()

    def __call__(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """The mean loss per label, and the tokens read, padding included. RuntimeError if a process failed."""
        labels = sum(int((batch.labels[:, 1:] != IGNORED).sum()) for batch in batches)
        tokens = sum(batch.input_ids.numel() for batch in batches)
        if self.shards == 1:
            return self._backward(batches, labels), tokens
        # Every so-manieth row: batches may be sorted by length, and shards are to be of equal work.
        own, *others = (
            [Batch(b.input_ids[i :: self.shards], b.labels[i :: self.shards]) for b in batches if len(b.labels) > i]
            for i in range(self.shards)
        )
        with _one_thread():
            for worker, rows in zip(self.workers, others, strict=False):
                worker.ask([(b.input_ids.numpy(), b.labels.numpy()) for b in rows], labels)
            total = self._backward(own, labels)
            for i, rows in enumerate(others):
                if self.workers:
                    total += self.workers[i].answer()
                    gradient: Sequence[torch.Tensor | None] = self.workers[i].gradient
                else:
                    before = [p.grad for p in self.parameters]
                    self.model.zero_grad()
                    total += self._backward(rows, labels)
                    gradient = [p.grad for p in self.parameters]
                    for parameter, part in zip(self.parameters, before, strict=True):
                        parameter.grad = part
                for parameter, part in zip(self.parameters, gradient, strict=True):
                    if parameter.grad is not None and part is not None:
                        parameter.grad += part
        return total, tokens

    def _backward(self, batches: Sequence[Batch], labels: int) -> float:
        """Adds the gradient of the summed loss / labels; the batches are read one after the other."""
        total, device = 0.0, self.model.device
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
                part = self.loss(self.model, Batch(batch.input_ids.to(device), batch.labels.to(device))) / labels
            part.backward()
            total += part.item()
        return total

    def _fork(self) -> _Worker:
        context = multiprocessing.get_context("fork")
        gradient = [_shared(torch.zeros_like(p)) for p in self.parameters]
        here, there = context.Pipe()
        process = context.Process(target=self._serve, args=(here, there, gradient), daemon=True)
        with (
            warnings.catch_warnings()
        ):  # of Python 3.12: torch's idle threads are not needed in a process of one thread
            warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
            process.start()
        there.close()
        return _Worker(process, here, gradient)

    def _serve(self, here: Connection, there: Connection, gradient: list[torch.Tensor]) -> None:
        """Until the other end of the connection closes, be it because that process was killed."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that trains
        here.close()
        torch.set_num_threads(1)
        for parameter, shared in zip(self.parameters, gradient, strict=True):
            parameter.grad = shared
        while True:
            try:
                rows, labels = there.recv()
            except EOFError:
                return
            torch._foreach_zero_(gradient)
            try:
                batches = [Batch(torch.from_numpy(ids), torch.from_numpy(targets)) for ids, targets in rows]
                there.send(self._backward(batches, labels))
            except Exception:
                there.send(traceback.format_exc())


def _can_fork() -> bool:
    """macOS's matrix products do not survive a fork; and a process that may use one core has none for another."""
    return sys.platform == "linux" and len(os.sched_getaffinity(0)) > 1 and torch.get_num_threads() > 1


def _shared(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory that forks share."""
    memory = mmap.mmap(-1, tensor.numel() * tensor.element_size())
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape).copy_(tensor)


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
