"""Speed of the training loop, and what bounds it: tokens/s, the machine's matrix-product ceiling, seconds to accuracy.

python -m common.bench common.training.bench
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from common.generation.sampler import generate
from common.metrics.timing import compare
from common.models.build import build
from common.models.flops import forward_flops
from common.tasks import chain
from common.training.data import Example, bucketed, mixture
from common.training.loop import TrainConfig, train

if TYPE_CHECKING:
    import pandas as pd

SYMBOLS = "0123456789+-*=,$"


def gemm_ceiling(rounds: int = 5, tokens: int = 4096) -> pd.DataFrame:
    """GFLOP/s of the model's matrix products alone (float32 and bfloat16), forward shapes of the 0.28M Llama."""
    import pandas as pd

    shapes = {"attention input": (96, 288), "gate and up": (96, 384), "down": (192, 96)}
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        pairs = {
            name: (torch.randn(tokens, k).to(dtype), torch.randn(k, n).to(dtype)) for name, (k, n) in shapes.items()
        }
        timings = compare({name: partial(torch.matmul, x, w) for name, (x, w) in pairs.items()}, rounds, 1, 0.05)
        for name, (k, n) in shapes.items():
            speed = 2 * tokens * k * n / timings.median(name) / 1e9
            rows.append({"product": name, "dtype": str(dtype).removeprefix("torch."), "gflops": speed})
    return pd.DataFrame(rows)


def bench_training(rows: int = 128, steps: int = 8, rounds: int = 5) -> pd.DataFrame:
    """Tokens/s of `train` for the 0.28M Llama on chains, interleaved: eager or fused attention, float32 or bfloat16, in
    one process, and the first of these in two shards.

    gflops: of the matrix products that a step needs (forward, and twice that backward) at the measured speed; against
    `gemm_ceiling` it says how much of the time is not matrix products.
    """
    import pandas as pd

    batches = mixture(bucketed(_examples(rows * steps), rows))
    sizes = [batch.input_ids.shape for step in range(steps) for batch in batches(step)]
    tokens = sum(shape.numel() for shape in sizes)
    config = TrainConfig(steps=steps, shards=1)
    variants: dict[str, Callable[[], Any]] = {}
    for attention in ("eager", "sdpa"):
        model = build("llama-0.28m", vocab_size=len(SYMBOLS), attention=attention)
        for precision, bf16 in (("float32", False), ("bfloat16", True)):
            variants[f"{attention}, {precision}"] = partial(train, model, batches, replace(config, bf16=bf16))
    model = build("llama-0.28m", vocab_size=len(SYMBOLS), attention="eager")
    variants["eager, float32, 2 shards"] = partial(train, model, batches, replace(config, shards=2))
    timings = compare(variants, rounds=rounds)
    flops = 3 * sum(forward_flops(model.config, length, batch=batch) for batch, length in sizes)
    first = next(iter(variants))
    return pd.DataFrame(
        {
            "variant": name,
            "tokens_per_s": tokens / timings.median(name),
            f"x over {first}": timings.ratio(first, name).value,
            "gflops": flops / timings.median(name) / 1e9,
        }
        for name in variants
    )


def seconds_to_accuracy(steps: tuple[int, ...] = (1200, 2000), rows: int = 32) -> pd.DataFrame:
    """Training seconds and greedy accuracy on held-out chains of 2 to 10 steps, one whole run (one cosine) a row."""
    import pandas as pd

    test = [chain.generate(1, 64, difficulty, "test") for difficulty in (2, 4, 6, 8, 10)]
    batches = mixture(bucketed(_examples(60_000), rows))
    table = []
    for count in steps:
        model = build("llama-0.28m", vocab_size=len(SYMBOLS), attention="eager")
        state = train(model, batches, TrainConfig(steps=count, learning_rate=3e-3))
        right = 0
        for problems in test:
            out = generate(model, [_encode(p.prompt) for p in problems], 64, stop_tokens=[SYMBOLS.index("$")])
            texts = ["".join(SYMBOLS[i] for i in row) for row in out.tokens]
            right += sum(chain.verify(p, text) for p, text in zip(problems, texts, strict=True))
        speed = state.tokens / state.seconds
        share = right / sum(map(len, test))
        table.append({"steps": count, "seconds": state.seconds, "tokens_per_s": speed, "accuracy": share})
    return pd.DataFrame(table)


def _encode(text: str) -> list[int]:
    return [SYMBOLS.index(symbol) for symbol in text]


def _examples(count: int) -> list[Example]:
    problems = chain.generate(0, count, (2, 10))
    return [Example(_encode(p.prompt + p.answer), len(p.prompt)) for p in problems]


def tables() -> dict[str, pd.DataFrame]:
    """For `make bench`."""
    return {"matrix products": gemm_ceiling(), "training": bench_training(), "accuracy": seconds_to_accuracy()}
