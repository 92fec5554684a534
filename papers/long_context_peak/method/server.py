"""A small server that really does it: KV caches cut out of a fixed arena, swapped out when users do not fit.

    server = Server(model, capacity=2100, resident=2, store=Disk("/tmp"))
    server.serve(prompts, rounds=3, output_tokens=16, think_seconds=0.05)

Each user is a thread that waits, thinks and asks; one loop serves their requests in the order of arrival. The answers
do not depend on how many users are resident: a cache comes back bit for bit.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from transformers.cache_utils import Cache

from common.costs.roofline import CapacityError
from common.generation.cache import PreallocatedLayer
from papers.long_context_peak.method.session import Event, Residency, Session, check_session

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class Store(Protocol):
    """Where swapped caches are: the larger and slower memory."""

    def write(self, name: int, buffer: torch.Tensor) -> None: ...

    def read(self, name: int, buffer: torch.Tensor) -> None: ...

    def clear(self) -> None: ...


class Disk:
    """Files in a folder, past the page cache: a write ends when the disk has it, and a read comes from the disk.

    CPU tensors only. The files stay until `clear`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def _path(self, name: int) -> Path:
        return self.folder / f"swapped.{os.getpid()}.{name}"

    def write(self, name: int, buffer: torch.Tensor) -> None:
        with self._path(name).open("wb", buffering=0) as file:
            file.write(_bytes(buffer))
            os.fsync(file.fileno())
            _forget(file.fileno())

    def read(self, name: int, buffer: torch.Tensor) -> None:
        """Raises OSError if the file has fewer bytes than the buffer."""
        with self._path(name).open("rb", buffering=0) as file:
            _forget(file.fileno())  # what an earlier read has left
            wanted, view = buffer.nbytes, _bytes(buffer)
            while view and (read := file.readinto(view)):
                view, wanted = view[read:], wanted - read
        if wanted:
            raise OSError(f"{self._path(name)} lacks {wanted} bytes of the cache")

    def clear(self) -> None:
        """Deletes the files of this process."""
        for path in self.folder.glob(f"swapped.{os.getpid()}.*"):
            path.unlink()


class Host:
    """The host's memory, pinned where a GPU is: what PCIe joins."""

    def __init__(self) -> None:
        self.held: dict[int, torch.Tensor] = {}

    def write(self, name: int, buffer: torch.Tensor) -> None:
        if name not in self.held or self.held[name].shape != buffer.shape:
            self.held[name] = torch.empty_like(buffer, device="cpu", pin_memory=buffer.is_cuda)
        self.held[name].copy_(buffer)

    @torch.inference_mode()  # a buffer that was filled under it can be written under it alone
    def read(self, name: int, buffer: torch.Tensor) -> None:
        buffer.copy_(self.held[name])

    def clear(self) -> None:
        """Frees what is held."""
        self.held.clear()


def _bytes(buffer: torch.Tensor) -> memoryview:
    return memoryview(buffer.view(torch.uint8).numpy())


def _forget(descriptor: int) -> None:
    """Drops a file from the page cache; not on macOS, where it stays."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass
class Slot:
    """One user's KV cache. buffer: flat, all keys and values of all layers; cache: the same memory for the model."""

    buffer: torch.Tensor
    cache: Cache

    @property
    def length(self) -> int:
        """Tokens that the cache holds."""
        return self.cache.layers[0].length

    @length.setter
    def length(self, tokens: int) -> None:
        for layer in self.cache.layers:
            layer.length = tokens


def cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    """Bytes of the keys and values of `tokens` tokens."""
    return torch.Size(cache_shape(model.config, tokens)).numel() * model.dtype.itemsize


def cache_shape(config: PretrainedConfig, capacity: int) -> tuple[int, int, int, int, int]:
    """(layers, 2, kv_heads, capacity, head_dim) of one user's keys and values."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, 2, groups, capacity, head_dim


class KVArena:
    """A fixed number of bytes, out of which KV caches are cut one after the other until they no longer fit."""

    def __init__(self, model: PreTrainedModel, size_bytes: int) -> None:
        self.config = model.config
        self.memory = torch.empty(size_bytes // model.dtype.itemsize, dtype=model.dtype, device=model.device)
        self.used = 0  # elements

    def allocate(self, capacity: int) -> Slot:
        """A cache for `capacity` tokens. Raises CapacityError if the rest of the arena is too small, ValueError for
        fewer than one token."""
        if capacity < 1:
            raise ValueError(f"a cache holds at least 1 token, not {capacity}")
        shape = cache_shape(self.config, capacity)
        size = torch.Size(shape).numel()
        if self.used + size > len(self.memory):
            itemsize = self.memory.dtype.itemsize
            raise CapacityError(
                f"context does not fit: the cache of {capacity:,} tokens takes {size * itemsize:,} B and "
                f"{(len(self.memory) - self.used) * itemsize:,} B are left"
            )
        buffer = self.memory[self.used : self.used + size]
        self.used += size
        layers = []
        for keys, values in buffer.view(shape):
            layer = PreallocatedLayer(capacity)
            layer.keys, layer.values = keys[None], values[None]
            layer.dtype, layer.device, layer.is_initialized = buffer.dtype, buffer.device, True
            layers.append(layer)
        return Slot(buffer, Cache(layers=layers))


@torch.inference_mode()
def prefill(model: PreTrainedModel, slot: Slot, prompt: torch.Tensor) -> int:
    """Reads a prompt [tokens] into an empty cache; the next token (greedy)."""
    slot.length = 0
    logits = model(input_ids=prompt[None], past_key_values=slot.cache, use_cache=True, logits_to_keep=1).logits
    return int(logits[0, -1].argmax())


@torch.inference_mode()
def decode(model: PreTrainedModel, slot: Slot, token: int, steps: int) -> list[int]:
    """`steps` more tokens (greedy) after `token`, one forward pass each."""
    found = []
    for _ in range(steps):
        ids = torch.tensor([[token]], device=slot.buffer.device)
        logits = model(input_ids=ids, past_key_values=slot.cache, use_cache=True, logits_to_keep=1).logits
        token = int(logits[0, -1].argmax())
        found.append(token)
    return found


class Server:
    """One device with memory for the caches of `resident` users of `capacity` tokens each.

    model: any causal language model of `transformers` with a standard cache. store: where the other caches go.
    Raises CapacityError for resident < 1 and ValueError for capacity < 1.
    """

    def __init__(self, model: PreTrainedModel, capacity: int, resident: int, store: Store) -> None:
        Residency(resident)  # its error
        arena = KVArena(model, resident * cache_bytes(model, max(capacity, 0)))
        self.model, self.capacity, self.store = model, capacity, store
        self.slots = [arena.allocate(capacity) for _ in range(resident)]

    def serve(
        self, prompts: torch.Tensor, rounds: int, output_tokens: int, think_seconds: float
    ) -> tuple[Session, list[list[int]]]:
        """What happened, in wall seconds from the start, and the tokens of each user.

        prompts: [users, tokens] int64, documents that the users read first; all arrive at once.
        Raises CapacityError if a document and its answers exceed the capacity of a slot.
        """
        users, tokens = prompts.shape
        check_session(users, rounds, think_seconds)
        if tokens + rounds * output_tokens > self.capacity:
            raise CapacityError(
                f"context does not fit: {tokens} + {rounds} x {output_tokens} tokens exceed a slot of {self.capacity}"
            )
        run = _Run(self, prompts, rounds, output_tokens)
        requests: queue.SimpleQueue[tuple[int, int, threading.Event]] = queue.SimpleQueue()
        arrived = [threading.Event() for _ in range(users)]
        for user, served in enumerate(arrived):
            requests.put((user, 0, served))

        def live(user: int) -> None:
            served = arrived[user]
            for turn in range(1, rounds + 1):
                served.wait()
                time.sleep(think_seconds)
                served = threading.Event()
                requests.put((user, turn, served))

        threads = [threading.Thread(target=live, args=(user,), daemon=True) for user in range(users)]
        for thread in threads:
            thread.start()
        for _ in range(users * (rounds + 1)):
            user, turn, served = requests.get()
            run.request(user, turn)
            served.set()
        makespan = time.perf_counter() - run.start
        for thread in threads:
            thread.join()
        return Session(users, makespan, run.events), run.tokens


class _Run:
    """The state of one call of `Server.serve`."""

    def __init__(self, server: Server, prompts: torch.Tensor, rounds: int, output_tokens: int) -> None:
        self.server, self.prompts, self.rounds, self.output_tokens = server, prompts, rounds, output_tokens
        self.residency = Residency(len(server.slots))
        self.free = list(server.slots)
        self.slot_of: dict[int, Slot] = {}
        self.lengths = [0] * len(prompts)
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.events: list[Event] = []
        self.start = time.perf_counter()

    def request(self, user: int, turn: int) -> None:
        """Brings the user's cache into memory, then reads the document (turn 0) or answers."""
        victim, returns = self.residency.enter(user)
        if victim is not None:
            slot = self.slot_of.pop(victim)
            self._timed(victim, "out", self.server.store.write, victim, slot.buffer)
            self.free.append(slot)
        if user not in self.slot_of:
            self.slot_of[user] = self.free.pop()
        slot = self.slot_of[user]
        if returns:
            self._timed(user, "into", self.server.store.read, user, slot.buffer)
        slot.length = self.lengths[user]
        if turn:
            last = self.tokens[user][-1]
            self.tokens[user] += self._timed(user, "decode", decode, self.server.model, slot, last, self.output_tokens)
        else:
            self.tokens[user].append(self._timed(user, "prefill", prefill, self.server.model, slot, self.prompts[user]))
        self.lengths[user] = slot.length
        if turn == self.rounds:
            self.residency.leave(user)
            self.free.append(self.slot_of.pop(user))

    def _timed(self, user: int, what: str, call: Any, *arguments: Any) -> Any:
        began = time.perf_counter()
        result = call(*arguments)
        self.events.append(Event(began - self.start, user, what, time.perf_counter() - began))
        return result
