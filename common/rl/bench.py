"""Where the time of a reinforcement-learning step goes.

python -m common.bench common.rl.bench
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from common.metrics.timing import compare
from common.models.build import build
from common.reasoners import policies
from common.rl.experience import Grouped
from common.rl.objectives import AGGREGATIONS, OBJECTIVES
from common.rl.rewards import Weighted, verifiable
from common.rl.rollout import log_probs, sample
from common.rl.trainer import RLConfig, train
from common.tasks import chain

if TYPE_CHECKING:
    import pandas as pd

SIZES: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192}


def step_times(
    prompts: int = 24, group_size: int = 8, max_new_tokens: int = 72, minibatches: int = 2, rounds: int = 5
) -> pd.DataFrame:
    """Seconds of a GRPO step of the 0.29M Llama on chains and of its parts, interleaved; update: what the parts leave.

    The model is untrained, so that every answer has max_new_tokens.
    """
    import pandas as pd

    words = policies.tokenizer()
    model = build(SIZES, vocab_size=len(words), attention="eager")
    ends = [words.convert_tokens_to_ids(policies.ANSWER_END)]
    problems = chain.generate(0, prompts, (2, 6), style="concise")
    rollout, _ = sample(model, words, problems, group_size, max_new_tokens, stop_tokens=ends)
    collect = Grouped(
        words, lambda step: problems, chain.verify, group_size, max_new_tokens, ends, {"right": Weighted(verifiable)}
    )
    config = RLConfig(steps=1, max_new_tokens=max_new_tokens, minibatches=minibatches)

    def recompute() -> None:
        with torch.no_grad():
            log_probs(model, rollout.ids, rollout.response)

    timings = compare(
        {
            "step": partial(train, model, collect, OBJECTIVES["dapo"], AGGREGATIONS["token_mean"], config),
            "rollout and recomputed log-probabilities": partial(collect, model, 0),
            "recomputed log-probabilities": recompute,
        },
        rounds,
    )
    seconds = {name: timings.median(name) for name in timings.wall}
    tokens = float(rollout.length.sum())
    rows: list[dict[str, Any]] = [
        {"part": name, "seconds": value, "share": value / seconds["step"]} for name, value in seconds.items()
    ]
    rest = seconds["step"] - seconds["rollout and recomputed log-probabilities"]
    rows.append({"part": "update", "seconds": rest, "share": rest / seconds["step"]})
    return pd.DataFrame(rows).assign(**{"tokens/s": [tokens / row["seconds"] for row in rows]})


def tables() -> dict[str, pd.DataFrame]:
    """For `make bench`."""
    return {"grpo step": step_times()}
