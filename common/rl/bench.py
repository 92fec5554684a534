"""A GRPO step of ours beside one of TRL's `GRPOTrainer`: same weights, prompts and work; and where the time goes.

A step draws PROMPTS x GROUP_SIZE answers, recomputes their log-probabilities once and takes MINIBATCHES optimiser
steps: rewards less the group's mean, DAPO's clipping, the mean over tokens, the gradient's norm cut at 1, AdamW, no KL.
The policy is untrained: about three in ten answers end by chance, the others at the limit.

python -m common.bench common.rl.bench    (TRL: pip install .[peers]; without it the tables say so)
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from common.metrics.timing import Timings, compare
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
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from common.tasks.problem import Problem

SIZES: dict[str, Any] = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192}
PROMPTS, GROUP_SIZE, MAX_NEW_TOKENS, MINIBATCHES, ROUNDS = 24, 8, 72, 2, 7

# What is timed of each library; the rollout alone and the update are differences of these.
STEP, EXPERIENCE, RECOMPUTE = "step", "rollout and recomputed log-probabilities", "recomputed log-probabilities"
RUN = "set-up and step"  # of TRL, whose step is timed inside


def policy(words: PreTrainedTokenizerFast) -> PreTrainedModel:
    """The 0.29M Llama, untrained: the same weights at each call. Eager attention is the faster one, for TRL as well."""
    return build(SIZES, vocab_size=len(words), attention="eager")


def our_parts(problems: Sequence[Problem], tokens: list[int]) -> dict[str, Callable[[], Any]]:
    """The timed functions of ours. tokens: gets the number of generated tokens."""
    words = policies.tokenizer()
    model = policy(words)
    ends = [words.convert_tokens_to_ids(policies.ANSWER_END)]
    rollout, ledger = sample(model, words, problems, GROUP_SIZE, MAX_NEW_TOKENS, stop_tokens=ends)
    tokens.append(ledger.generated_tokens)
    terms = {"right": Weighted(verifiable)}
    collect = Grouped(words, lambda step: problems, chain.verify, GROUP_SIZE, MAX_NEW_TOKENS, ends, terms)
    config = RLConfig(steps=1, max_new_tokens=MAX_NEW_TOKENS, minibatches=MINIBATCHES)
    return {
        STEP: partial(train, model, collect, OBJECTIVES["dapo"], AGGREGATIONS["token_mean"], config),
        EXPERIENCE: partial(collect, model, 0),
        RECOMPUTE: torch.no_grad()(partial(log_probs, model, rollout.ids, rollout.response)),
    }


def trl_parts(problems: Sequence[Problem], tokens: list[int], seconds: list[float]) -> dict[str, Callable[[], Any]]:
    """The timed functions of TRL. tokens: gets the number of each rollout; seconds: see `trl_trainer`."""
    trainer = trl_trainer(problems, tokens, seconds)
    trainer.train()
    rows = [row for row in trainer.train_dataset for _ in range(GROUP_SIZE)]
    rollout = trainer._generate_and_score_completions(rows)
    ids, mask = (torch.cat([rollout[f"prompt_{k}"], rollout[f"completion_{k}"]], dim=1) for k in ("ids", "mask"))
    recompute = partial(
        trainer._get_per_token_logps_and_entropies, trainer.model, ids, mask, rollout["completion_ids"].shape[1],
        batch_size=trainer.args.per_device_train_batch_size,
    )  # fmt: skip
    return {
        RUN: trainer.train,
        EXPERIENCE: partial(trainer._generate_and_score_completions, rows),
        RECOMPUTE: torch.no_grad()(recompute),
    }


def trl_trainer(problems: Sequence[Problem], tokens: list[int], seconds: list[float]) -> Any:
    """A GRPOTrainer whose `train` does our step once, without logging, saving and evaluation.

    Of what it offers, the fastest on a CPU: eager attention, a static cache, no gradient checkpointing (which is its
    default), no continuous batching. "bnpo" is its name for the mean over the tokens of a minibatch.
    tokens: gets the number of each rollout. seconds: gets those of each step, without what `train` sets up at every
    call (about a quarter of a second); a thread that keeps one call waiting between steps would slow both libraries.
    """
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    words = policies.tokenizer()
    words.eos_token = policies.ANSWER_END  # TRL ends answers where the tokenizer says
    model = policy(words)

    def right(completion_ids: list[list[int]], number: list[int], **_: Any) -> list[float]:
        tokens.append(sum(map(len, completion_ids)))
        texts = words.batch_decode(completion_ids)
        return [float(chain.verify(problems[i], text)) for i, text in zip(number, texts, strict=True)]

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 0:
                self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == MINIBATCHES:
                seconds.append(time.perf_counter() - self.began)

    rows = len(problems) * GROUP_SIZE
    config = GRPOConfig(
        output_dir=tempfile.gettempdir(), max_steps=MINIBATCHES, per_device_train_batch_size=rows // MINIBATCHES,
        steps_per_generation=MINIBATCHES, num_generations=GROUP_SIZE, max_completion_length=MAX_NEW_TOKENS,
        shuffle_dataset=False, loss_type="bnpo", scale_rewards="none", epsilon=0.2, epsilon_high=0.28, beta=0.0,
        learning_rate=1e-4, lr_scheduler_type="constant", optim="adamw_torch_fused", adam_beta2=0.99, weight_decay=0.0,
        max_grad_norm=1.0, cache_implementation="static", gradient_checkpointing=False, bf16=False, use_cpu=True,
        dataloader_pin_memory=False, logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": problem.prompt, "number": i} for i, problem in enumerate(problems)])
    trainer = GRPOTrainer(model, right, config, train_dataset=data, processing_class=words, callbacks=[Clock()])
    trainer.remove_callback(PrinterCallback)
    return trainer


def part_times(timings: Timings, library: str, tokens: float) -> pd.DataFrame:
    """Where the time of a library's step goes: median seconds, share of the step, tokens of the rollout a second."""
    import pandas as pd

    step, experience, recompute = (timings.median(f"{library} {part}") for part in (STEP, EXPERIENCE, RECOMPUTE))
    seconds = {
        "step": step,
        "rollout and rewards": experience - recompute,
        "recomputed log-probabilities": recompute,
        "update": step - experience,
    }
    return pd.DataFrame(
        [
            {"library": library, "part": part, "seconds": s, "share": s / step, "tokens_per_s": tokens / s}
            for part, s in seconds.items()
        ]
    )


def tables() -> dict[str, pd.DataFrame]:
    """For `make bench`: the parts of a step, and the steps side by side, all from the same interleaved rounds.

    x_ours: how many times as many steps a second ours takes, with the interval over the rounds; x_tokens: tokens a
    second likewise, since the draws differ.
    """
    import pandas as pd

    problems = chain.generate(0, PROMPTS, (2, 6), style="concise")
    peers = [] if importlib.util.find_spec("trl") is None else ["trl"]
    tokens: dict[str, list[int]] = {library: [] for library in ("ours", *peers)}
    parts = {"ours": our_parts(problems, tokens["ours"])}
    trl_seconds: list[float] = []
    parts |= {peer: trl_parts(problems, tokens[peer], trl_seconds) for peer in peers}
    timings = compare({f"{name} {part}": f for name, own in parts.items() for part, f in own.items()}, ROUNDS)
    if peers:
        timings.wall[f"trl {STEP}"] = trl_seconds[-ROUNDS:]  # before them, warming up
        timings.contended_rounds[f"trl {STEP}"] = timings.contended_rounds[f"trl {RUN}"]
    rows: list[dict[str, Any]] = []
    for library, counts in tokens.items():
        step, mean = f"{library} {STEP}", sum(counts) / len(counts)
        ratio = timings.ratio(step, f"ours {STEP}")
        seconds, faster = timings.median(step), sum(tokens["ours"]) / len(tokens["ours"]) / mean
        rows.append(
            {
                "library": library, "seconds_per_step": seconds, "tokens_per_step": mean,
                "tokens_per_s": mean / seconds, "x_ours": ratio.value, "x_low": ratio.low, "x_high": ratio.high,
                "x_tokens": ratio.value * faster, "contended": sum(timings.contended_rounds[step]) / ROUNDS,
            }
        )  # fmt: skip
    if not peers:
        rows.append({"library": "trl", "note": "not installed: pip install .[peers]"})
    shares = [part_times(timings, library, rows[n]["tokens_per_step"]) for n, library in enumerate(tokens)]
    return {"grpo step": pd.DataFrame(rows), "parts of a grpo step": pd.concat(shares, ignore_index=True)}
