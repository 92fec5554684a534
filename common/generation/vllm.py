"""The interface of `common.generation.sampler.generate` over a vLLM engine, for a CUDA machine (pip install .[gpu]).

What is tested is how a request becomes vLLM's (its classes LLM, SamplingParams, RequestOutput) and its answer ours;
nothing is said here about its speed or about the tokens that it draws, which are not those of our sampler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.generation.ledger import Ledger
from common.generation.random import keys
from common.generation.sampler import Generation, checked_settings

BACKENDS = ("transformers", "vllm")


def backend(
    name: str,
    source: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    network: bool = False,
    **engine: Any,
) -> Callable[..., Generation]:
    """`generate` without its first argument, for a model: a folder in hub format, or a hub id if `network` is true.

    name: one of BACKENDS, as a config gives it (`cfg.backend`). dtype: of the weights. engine: settings of vllm.LLM
    (tensor_parallel_size, ...). Raises ValueError for another name or vLLM without CUDA, ImportError where vLLM is not
    installed, and FileNotFoundError as `load_model` does.
    """
    from common.models.hub import check_source, load_model

    check_backend(name)
    if name == "transformers":
        from common.generation.sampler import generate as own

        if engine:
            raise ValueError(f"{', '.join(engine)}: settings of the vllm back end, not of transformers")
        return partial(own, load_model(source, dtype=dtype, network=network).to(device))
    check_source(source, network, ["config.json"], "*.safetensors")
    own_dtype = str(dtype).removeprefix("torch.")
    return partial(generate, _vllm().LLM(model=str(source), dtype=own_dtype, trust_remote_code=False, **engine))


def check_backend(name: str) -> None:
    """Raises ValueError for a name that is none of BACKENDS, and for vLLM without CUDA."""
    if name not in BACKENDS:
        raise ValueError(f"unknown back end {name!r}; known: {', '.join(BACKENDS)}")
    if name == "vllm" and not torch.cuda.is_available():
        raise ValueError("the vllm back end needs a CUDA device; backend=transformers runs anywhere")


def generate(
    engine: Any,
    prompts: Sequence[Sequence[int] | torch.Tensor],
    max_new_tokens: int | Sequence[int],
    *,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    streams: Sequence[int] | None = None,
    stop_tokens: Collection[int] | Sequence[Collection[int]] | None = None,
) -> Generation:
    """Continues every prompt until a stop token or its limit; arguments and result as of our sampler's `generate`.

    engine: a vllm.LLM, or anything with its `generate`. A row's random seed is a function of (seed, stream). In the
    ledger forwards and flops stay 0: the engine does not tell them.
    Raises ValueError for an empty prompt, settings out of range, and lists that differ in length.
    """
    began = time.perf_counter()
    count = len(prompts)
    ids = [prompt.tolist() if isinstance(prompt, torch.Tensor) else list(prompt) for prompt in prompts]
    limits, streams = checked_settings(count, max_new_tokens, streams, temperature, top_k, top_p)
    if not all(ids):
        raise ValueError(f"prompt {ids.index([])} must be a non-empty list of token ids")
    stops = _stops(stop_tokens, count)
    if not prompts:
        return Generation([], [], Ledger())
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if do_sample else {"temperature": 0.0}
    seeds = (keys(seed, list(streams)) >> 1).tolist() if do_sample else [None] * count  # vLLM takes signed 64 bits
    params = [
        _vllm().SamplingParams(
            n=1, max_tokens=limit, seed=own_seed, logprobs=None, detokenize=False,
            stop_token_ids=stop, ignore_eos=stop is not None, **sampling,
        )
        for limit, own_seed, stop in zip(limits, seeds, stops, strict=True)
    ]  # fmt: skip
    outputs = engine.generate([{"prompt_token_ids": row} for row in ids], params, use_tqdm=False)
    if len(outputs) != count:
        raise RuntimeError(f"the engine answered {len(outputs)} of {count} prompts")
    chosen = [output.outputs[0] for output in outputs]  # in the order of the prompts
    tokens = [torch.tensor(list(completion.token_ids), dtype=torch.long) for completion in chosen]
    ledger = Ledger(sum(map(len, ids)), sum(map(len, tokens)), seconds=time.perf_counter() - began)
    return Generation(tokens, [completion.finish_reason == "stop" for completion in chosen], ledger)


def _stops(stop_tokens: Any, count: int) -> list[list[int] | None]:
    """stop_token_ids of each prompt; None: the model's own end token alone."""
    if stop_tokens is None:
        return [None] * count
    listed = list(stop_tokens)
    if not listed or isinstance(listed[0], int):
        return [sorted(listed)] * count
    if len(listed) != count:
        raise ValueError(f"{len(listed)} collections of stop tokens for {count} prompts")
    return [sorted(stop) for stop in listed]


def _vllm() -> Any:
    try:
        import vllm
    except ImportError as error:
        raise ImportError("vLLM is not installed: on a CUDA machine, pip install .[gpu]") from error
    return vllm
