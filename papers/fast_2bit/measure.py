"""The measurements: quantised models on held-out text and problems, their stored bits, and the ranges of stripes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from common.quantisation.calibrate import blocks_of, by_length, linears_of
from common.quantisation.packed import PackedLinear, stored_bits
from common.tasks.problem import Problem
from kernels.w24 import SCALE_BITS, STRIPE
from papers.fast_2bit.arms import arms, name_of, quantised
from papers.fast_2bit.method import F24Linear, range_score, two_order

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rows = list[dict[str, Any]]
VARIANTS = ("as trained", "wide stripes", "wide channels everywhere")


@dataclass(frozen=True)
class Run:
    """One arm on one variant of the model with one draw of calibration texts."""

    variant: str
    arm: str
    draw: int


@dataclass(frozen=True)
class Ground:
    """What all runs share. windows: int64 [n, tokens]. reference: the full model's log-probabilities on them, a tensor
    for each batch of windows. calibration: batches for each draw."""

    model: PreTrainedModel
    words: PreTrainedTokenizerBase
    windows: torch.Tensor
    reference: list[torch.Tensor]
    problems: list[Problem]
    calibration: list[list[torch.Tensor]]


def runs(cfg: DictConfig) -> list[Run]:
    """Every arm once on the model as trained; the compared rules at the headline's ratio in all draws, and on the
    widened models, too (in one draw where every stripe is wide: no claim rests on that)."""
    names = list(arms(cfg))
    judged = ["two", *(name_of(rule, cfg.headline) for rule in cfg.rules)]
    draws = range(cfg.calibration.draws)
    found = [Run(VARIANTS[0], name, draw) for name in names for draw in (draws if name in judged else [0])]
    for variant in VARIANTS[1:]:
        found.append(Run(variant, "full", 0))
        found += [Run(variant, name, draw) for name in judged for draw in (draws if variant == VARIANTS[1] else [0])]
        found += [Run(variant, name, 0) for name in ("range", "error", "four") if name in names]
    return found


def checkpoint(cfg: DictConfig) -> str:
    """The folder of the shared model, or the checkpoint of the hub that it names."""
    folder = Path(cfg.shared) / cfg.model
    record = folder / "model.json"
    return json.loads(record.read_text())["hub_id"] if record.exists() else str(folder)


def load(cfg: DictConfig) -> Ground:
    """Model, tokenizer, and the texts of the stage `data` as token ids."""
    from common.models.hub import load_model, load_tokenizer

    source = checkpoint(cfg)
    model = load_model(source, dtype=getattr(torch, cfg.dtype), network=cfg.network).to(cfg.device)
    words = load_tokenizer(source, network=cfg.network)
    data = Path(cfg.artifacts) / "data"
    texts = json.loads((data / "texts.json").read_text())
    cut, end = cfg.calibration.tokens, words.eos_token_id
    calibration = [by_length([[*words.encode(text), end][:cut] for text in draw]) for draw in texts["calibration"]]
    problems = [Problem(**row) for row in texts["problems"]]
    windows = windows_of([words.encode(text) for text in texts["text"]], cfg.text)
    reference = [logprobs.to("cpu") for logprobs in _logprobs(cfg, model, windows)]
    return Ground(model, words, windows, reference, problems, calibration)


def windows_of(texts: list[list[int]], own: DictConfig) -> torch.Tensor:
    """Whole windows of own.tokens ids, the first own.per_document of each text, own.windows at most."""
    found = [
        text[start : start + own.tokens]
        for text in texts
        for start in range(0, min(len(text) - own.tokens + 1, own.per_document * own.tokens), own.tokens)
    ]
    if not found:
        raise ValueError(f"no text has {own.tokens} tokens: the longest has {max(map(len, texts), default=0)}")
    return torch.tensor(found[: own.windows])


@torch.no_grad()
def _logprobs(cfg: DictConfig, model: PreTrainedModel, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Log-probabilities [rows, tokens - 1, vocabulary] of batches of windows, in the model's precision."""
    for batch in windows.split(cfg.text.rows):
        logits = model(input_ids=batch.to(cfg.device), use_cache=False).logits[:, :-1]
        yield logits.float().log_softmax(-1).to(logits.dtype)


def widen(cfg: DictConfig, model: PreTrainedModel, variant: str) -> PreTrainedModel:
    """The model under a change of scales that leaves its function as it is, in place.

    As many channels of each norm's output as there are stripes are divided by `factor`, and their weights in the
    layers that read them multiplied by it: all in one stripe ("wide stripes"), or one in each ("wide channels
    everywhere"). As trained: nothing.
    """
    if variant == VARIANTS[0]:
        return model
    random = torch.Generator().manual_seed(cfg.widened.seed)
    for block in blocks_of(model).values():
        for norm, readers in (
            (block.input_layernorm, [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]),
            (block.post_attention_layernorm, [block.mlp.gate_proj, block.mlp.up_proj]),
        ):
            count = len(norm.weight) // STRIPE
            if variant == VARIANTS[1]:
                first = STRIPE * int(torch.randint(count, (1,), generator=random))
                chosen = first + torch.randperm(STRIPE, generator=random)[:count]
            else:
                chosen = STRIPE * torch.arange(count) + torch.randint(STRIPE, (count,), generator=random)
            with torch.no_grad():
                norm.weight[chosen] /= cfg.widened.factor
                for layer in readers:
                    layer.weight[:, chosen] *= cfg.widened.factor
    return model


def measured(job: tuple[DictConfig, list[Run]]) -> dict[str, Rows]:
    """Rows for arms, windows and records of some runs, one after the other in one process."""
    cfg, todo = job
    ground, settings = load(cfg), arms(cfg)
    written: dict[str, Rows] = {"arms": [], "windows": [], "records": []}
    for run in todo:
        before = widen(cfg, copy.deepcopy(ground.model), run.variant)
        model = copy.deepcopy(before)
        quantised(cfg, model, settings[run.arm], ground.calibration[run.draw], cfg.seed + run.draw)
        head = {"variant": run.variant, "arm": run.arm, "draw": run.draw}
        written["arms"].append(head | {"bits": stored_bits(model)} | weight_errors(before, model))
        written["windows"] += [head | row for row in on_text(cfg, ground, model)]
        written["records"] += [
            row | {"arm": f"{run.variant}, {run.arm}", "sample_id": run.draw} for row in on_problems(cfg, ground, model)
        ]
    return written


def weight_errors(before: PreTrainedModel, after: PreTrainedModel) -> dict[str, float]:
    """|W - W~|^2 / |W|^2 over all matrices: `error`, and of the stripes of 2 and of 4 bits where a model has them."""
    sums = {key: [0.0, 0.0] for key in ("error", "error_two", "error_four")}

    def add(key: str, w: torch.Tensor, difference: torch.Tensor) -> None:
        sums[key][0] += float(difference.square().sum())
        sums[key][1] += float(w.square().sum())

    for name, layer in linears_of(before).items():
        module, w = after.get_submodule(name), layer.weight.detach().float()
        if not isinstance(module, PackedLinear):
            continue
        difference = w - module.weight_matrix()
        add("error", w, difference)
        if isinstance(module, F24Linear):
            two = module.order.long()[: module.packed.stripes[0]]
            wide = torch.zeros(w.shape[1], dtype=torch.bool, device=w.device)
            for stripe in two.tolist():
                wide[STRIPE * stripe : STRIPE * (stripe + 1)] = True
            add("error_two", w[:, wide], difference[:, wide])
            add("error_four", w[:, ~wide], difference[:, ~wide])
    return {key: part / whole if whole else float("nan") for key, (part, whole) in sums.items()}


def on_text(cfg: DictConfig, ground: Ground, model: PreTrainedModel) -> Rows:
    """NLL and KL(full || quantised), nats a token, of every window."""
    rows: Rows = []
    found = _logprobs(cfg, model, ground.windows)
    for batch, logprobs, reference in zip(ground.windows.split(cfg.text.rows), found, ground.reference, strict=True):
        logprobs, reference = logprobs.float(), reference.to(logprobs.device).float()
        nll = -logprobs.gather(2, batch[:, 1:, None].to(logprobs.device))[..., 0].mean(1)
        kl = (reference.exp() * (reference - logprobs)).sum(-1).mean(1)
        rows += [{"nll": a, "kl": b} for a, b in zip(nll.tolist(), kl.tolist(), strict=True)]
    return [{"window": i} | row for i, row in enumerate(rows)]


def on_problems(cfg: DictConfig, ground: Ground, model: PreTrainedModel) -> Rows:
    """Greedy answers to the held-out problems, as rows of the common records."""
    from common.generation.sampler import generate
    from common.tasks.registry import task

    own = task(cfg.problems.task)
    prompts = [ground.words.encode(problem.prompt) for problem in ground.problems]
    out = generate(model, prompts, cfg.problems.new_tokens, stop_tokens=[ground.words.eos_token_id])
    shares = {key: getattr(out.ledger, key) / len(prompts) for key in ("forwards", "flops", "seconds")}
    rows: Rows = []
    for i, (problem, tokens) in enumerate(zip(ground.problems, out.tokens, strict=True)):
        text = ground.words.decode(tokens, skip_special_tokens=True)
        rows.append(
            shares | {
                "task": problem.task, "problem_id": i, "difficulty": problem.difficulty,
                "prompt_tokens": len(prompts[i]), "output_tokens": len(tokens), "discarded_tokens": 0,
                "answer": own.result(problem, text), "correct": own.verify(problem, text),
            }
        )  # fmt: skip
    return rows


def stripe_ranges(cfg: DictConfig, ground: Ground) -> Rows:
    """Root mean square width of every stripe over that of its matrix's median stripe, and whether it got 4 bits."""
    rows: Rows = []
    for variant in VARIANTS:
        before = widen(cfg, copy.deepcopy(ground.model), variant)
        after = copy.deepcopy(before)
        quantised(cfg, after, {"kind": "hessian_range"}, ground.calibration[0], cfg.seed)
        for name, layer in linears_of(before).items():
            module = after.get_submodule(name)
            weight = torch.nn.functional.pad(layer.weight.detach().float(), (0, -layer.in_features % STRIPE))
            width = range_score(weight, weight).sqrt()
            four = set(module.order.tolist()[module.packed.stripes[0] :])
            for stripe, ratio in enumerate((width / width.median()).tolist()):
                rows.append(
                    {"variant": variant, "layer": name, "stripe": stripe, "width": ratio, "four": stripe in four}
                )
    return rows


def scale_study(seed: int) -> Rows:
    """What two orders of scales cost: relative weight error of 2-bit rounding for exact, 4-bit and packed (3 3 4 bit)
    scale codes, on weights from two distributions."""
    from common.quantisation.gptq import round_to_nearest
    from common.quantisation.grids import minmax

    drawn = {
        "Gaussian": torch.from_numpy(np.random.default_rng(seed).standard_normal((256, 480))),
        "Student t, 3 degrees of freedom": torch.from_numpy(np.random.default_rng(seed).standard_t(3, (256, 480))),
    }
    count = 480 // STRIPE
    scales = {
        "float16, one order": [minmax(2)] * count,
        "4 bits": [two_order(2, 4, 16)] * count,
        "3 3 4 bits, as packed": [two_order(2, SCALE_BITS[i % 3], 16) for i in range(count)],
    }
    return [
        {"weights": name, "scales": kind, "error": float((w - rounded).square().sum() / w.square().sum())}
        for name, w in drawn.items()
        for kind, fits in scales.items()
        for rounded in [round_to_nearest(w, [(STRIPE, fit) for fit in fits]).weight]
    ]
