"""The phase split on a real model: one process prefills and sends the KV cache, another decodes.

`PhaseSplit(model)` keeps the prompt side in the calling process and starts the token side as a process of its own with
a copy of the model. The cache travels over a pipe, after the prefill (`serialized`) or layer by layer from a sender
thread while later layers are still computed (`layerwise`; paper section 4.3, figure 11).
"""

from __future__ import annotations

import multiprocessing
import queue
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODES = ("serialized", "layerwise")
SPLIT_TIMEOUT_S = 120.0


class LayerwiseCache(DynamicCache):
    """A KV cache that hands each layer's keys and values [1, heads, tokens, head_dim] on as soon as they are there."""

    def __init__(self, on_layer: Callable[[int, torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self.on_layer = on_layer

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.on_layer(layer_idx, keys, values)
        return keys, values


def prefill(
    model: PreTrainedModel, prompt: torch.Tensor, cache: DynamicCache | None = None
) -> tuple[int, DynamicCache]:
    """The prompt phase: the first token (greedy) of a prompt [tokens], and its KV cache."""
    cache = DynamicCache() if cache is None else cache
    with torch.inference_mode():
        logits = model(input_ids=prompt[None], past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return int(logits[0, -1].argmax()), cache


def decode(model: PreTrainedModel, first: int, cache: DynamicCache, steps: int) -> list[int]:
    """The token phase: `steps` more tokens (greedy) after the first, one forward pass each."""
    tokens = [first]
    with torch.inference_mode():
        for _ in range(steps):
            logits = model(input_ids=torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[1:]


def _send_layer(connection: Connection, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    connection.send((layer, tuple(keys.shape), str(keys.dtype).removeprefix("torch.")))
    for tensor in (keys, values):
        connection.send_bytes(tensor.contiguous().numpy().data.cast("B"))


def _receive_layer(connection: Connection) -> tuple[int, torch.Tensor, torch.Tensor]:
    layer, shape, dtype = connection.recv()
    tensors = [
        torch.frombuffer(bytearray(connection.recv_bytes()), dtype=getattr(torch, dtype)).view(shape) for _ in range(2)
    ]
    return layer, tensors[0], tensors[1]


def _token_side(connection: Connection, build: Callable[[], PreTrainedModel], threads: int) -> None:
    """The other process: receives caches, decodes, replies; ends when the pipe closes."""
    torch.set_num_threads(threads)
    model = build()
    layers = model.config.num_hidden_layers
    connection.send("ready")
    while True:
        try:
            command = connection.recv()
        except EOFError:
            return
        received = dict((layer, kv) for layer, *kv in (_receive_layer(connection) for _ in range(layers)))
        cache = DynamicCache()
        for layer in range(layers):
            cache.update(*received[layer], layer)
        if command == "echo":
            connection.send([(layer.keys.numpy(), layer.values.numpy()) for layer in cache.layers])
        elif command == "receive":
            connection.send("received")
        else:
            first, steps = connection.recv()
            connection.send(decode(model, first, cache, steps))


class _Loader:
    """Builds the model in the other process from its configuration and weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.config, self.dtype = model.config, model.dtype
        self.weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}

    def __call__(self) -> PreTrainedModel:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)
        model.load_state_dict({name: torch.from_numpy(array) for name, array in self.weights.items()})
        return model.eval()


class PhaseSplit:
    """A prompt machine (this process) and a token machine (another process), each with the model.

    model: a causal language model of `transformers` on the CPU with a standard cache, float32 or float64. threads: of
    the token side. Use as a context manager, or call `close`.
    """

    def __init__(self, model: PreTrainedModel, threads: int = 1) -> None:
        self.model = model
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        arguments = (theirs, _Loader(model), threads)
        self.process = context.Process(target=_token_side, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self._reply()

    def __enter__(self) -> PhaseSplit:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the other process."""
        self.connection.close()
        self.process.join(timeout=5)
        if self.process.is_alive():
            self.process.terminate()

    def generate(self, prompt: torch.Tensor | Sequence[int], new_tokens: int, mode: str = "layerwise") -> list[int]:
        """new_tokens >= 2 tokens (greedy) after a prompt [tokens]: the first from here, the rest from the other side.

        Raises ValueError for an unknown mode, an empty prompt or fewer than two tokens.
        """
        ids = torch.as_tensor(prompt, dtype=torch.long)
        if mode not in MODES:
            raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
        if not len(ids) or new_tokens < 2:
            raise ValueError(f"a split needs a prompt and two new tokens or more: {len(ids)} and {new_tokens}")
        self.connection.send("decode")
        first = self._prefill_and_send(ids, mode)
        self.connection.send((first, new_tokens - 1))
        return [first, *self._reply()]

    def received(self, prompt: torch.Tensor | Sequence[int], mode: str) -> list[tuple[Any, Any]]:
        """The keys and values of each layer as the token side has them, for tests of the transfer."""
        self.connection.send("echo")
        self._prefill_and_send(torch.as_tensor(prompt, dtype=torch.long), mode)
        return self._reply()

    def transfer(self, cache: DynamicCache) -> None:
        """Sends a finished cache and waits until the other side has it: the bare cost of a transfer."""
        self.connection.send("receive")
        for layer, (keys, values, *_) in enumerate(cache):
            _send_layer(self.connection, layer, keys, values)
        self._reply()

    def _prefill_and_send(self, ids: torch.Tensor, mode: str) -> int:
        if mode == "serialized":
            first, cache = prefill(self.model, ids)
            for layer, (keys, values, *_) in enumerate(cache):
                _send_layer(self.connection, layer, keys, values)
            return first
        ready: queue.SimpleQueue[tuple[int, torch.Tensor, torch.Tensor] | None] = queue.SimpleQueue()

        def send() -> None:
            while (item := ready.get()) is not None:
                _send_layer(self.connection, *item)

        sender = threading.Thread(target=send)
        sender.start()
        try:
            first, _ = prefill(self.model, ids, LayerwiseCache(lambda *item: ready.put(item)))
        finally:
            ready.put(None)
            sender.join()
        return first

    def _reply(self) -> Any:
        if not self.connection.poll(SPLIT_TIMEOUT_S):
            raise TimeoutError(f"the token side did not answer within {SPLIT_TIMEOUT_S:.0f} s")
        try:
            return self.connection.recv()
        except EOFError:
            raise RuntimeError("the token side has ended; its error is on stderr") from None
