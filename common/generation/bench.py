"""Tokens per second of the sampler against `transformers` generate, interleaved in one run.

python -m common.bench common.generation.bench
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from common.generation.sampler import generate
from common.metrics.timing import compare
from common.models.build import build

if TYPE_CHECKING:
    import pandas as pd


def bench_generation(
    batches: Sequence[int] = (1, 64, 512), *, do_sample: bool = True, new_tokens: int = 64, rounds: int = 5
) -> pd.DataFrame:
    """One row a batch size and decoder: tokens/s (median of the rounds) and its ratio to `generate` with either cache.

    The 0.28M Llama in float32, prompts of 20 tokens without padding, no stop tokens, so that every decoder makes as
    many tokens; temperature 1 and top_k=0 (the top-k filter that `generate` has on by default costs it time).
    """
    import pandas as pd

    rows = []
    for batch in batches:
        decoders = _decoders(batch, do_sample, new_tokens)
        timings = compare(decoders, rounds=rounds, min_seconds=0.3)
        for name in decoders:
            row: dict[str, Any] = {"batch": batch, "decoder": name}
            row["tokens_per_s"] = batch * new_tokens / timings.median(name)
            for reference in ("dynamic", "static"):
                ratio = timings.ratio(f"generate, {reference} cache", name)
                row |= {f"x_{reference}": ratio.value, f"x_{reference}_low": ratio.low}
            rows.append(row | {"contended": sum(timings.contended_rounds[name]) / rounds})
    return pd.DataFrame(rows)


def _decoders(batch: int, do_sample: bool, new_tokens: int) -> dict[str, Callable[[], Any]]:
    model = build("llama-0.28m", seed=0)
    prompts = torch.randint(model.config.vocab_size, (batch, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(prompts)

    def reference(cache: str) -> Callable[[], Any]:
        settings = {"top_k": 0, "temperature": 1.0} if do_sample else {}
        return lambda: model.generate(
            prompts,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=do_sample,
            pad_token_id=0,
            cache_implementation=cache,
            **settings,
        )

    def own(lean: bool) -> Callable[[], Any]:
        return lambda: generate(model, list(prompts), new_tokens, do_sample=do_sample, stop_tokens=(), lean=lean)

    return {
        "generate, dynamic cache": reference("dynamic"),
        "generate, static cache": reference("static"),
        "own loop, module's forward": own(False),
        "own loop, lean forward": own(True),
    }


def tables() -> dict[str, pd.DataFrame]:
    """For `make bench`."""
    return {"sampling": bench_generation(), "greedy": bench_generation(do_sample=False)}
