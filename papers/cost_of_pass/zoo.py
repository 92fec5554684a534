"""The models: direct answerers trained here from nothing, a shared reasoner taught two more tasks, and the shared ones.

An entry of cfg.zoo is one release:

    {name: direct-s, class: lightweight, style: direct, weights: train/direct-s/final, frontier: true, of: direct-s}

weights: below the artifacts of this paper (train/...) or of the reasoners (reasoners/...), or hub:<id>. frontier: part
of the frontier; others are earlier weights on the way, which only the releases count. of: whose sizes it has.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from papers.cost_of_pass.tasks import DIRECT, END, STEPS, gold, items

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from common.training.data import Batch, Batches, Example

REVIEW = "?"  # asks for another look: "7+8 4+3=#4 8?" -> "#5 8$"
GROUPS = (("kb1",), ("add2", "table1"), ("chain8", "countdown"))  # tasks of similar length share a batch


def review_prompt(prompt: list[int], answer: list[int], end: int, mark: int) -> list[int]:
    """What a model reads to look at its answer again; all are token ids. end: of END, mark: of REVIEW."""
    return [*prompt, *(token for token in answer if token != end), mark]


def examples(cfg: DictConfig, words: PreTrainedTokenizerFast, style: str) -> dict[str, list[Example]]:
    """Task -> training examples. A share of the direct ones are reviews: of the right answer, or of one to another
    problem, as often."""
    from common.models.tokenizer import encode
    from common.training.data import Example

    end, mark = (words.convert_tokens_to_ids(token) for token in (END, REVIEW))
    found: dict[str, list[Example]] = {}
    for task, count in cfg.training.problems.items():
        parts = [p for item in items(task, cfg.seed, count, "train", cfg.facts) for p in item.parts]
        prompts = encode(words, [part.prompt for part in parts])
        answers = encode(words, [gold(part, style) for part in parts])
        random, own = Random(f"{cfg.seed}/{task}/reviews"), []
        for prompt, answer in zip(prompts, answers, strict=True):
            if style == DIRECT and random.random() < cfg.training.reviews:
                draft = answer if random.random() < 0.5 else random.choice(answers)
                prompt = review_prompt(prompt, draft, end, mark)
            own.append(Example([*prompt, *answer], len(prompt)))
        found[task] = own
    return found


def batches(of: dict[str, list[Example]], rows: dict[str, int], seed: int) -> Batches:
    """step -> a batch of each group of tasks."""
    from common.training.data import bucketed, joined

    groups = [joined(*(bucketed(of[task], rows[task], seed=seed) for task in group)) for group in GROUPS]

    def batch(step: int) -> list[Batch]:
        return [group(step) for group in groups]

    return batch


def train_member(job: tuple[DictConfig, str]) -> dict[str, Any]:
    """Trains one model and writes <name>/half and <name>/final in hub format. Returns its sizes and its tokens."""
    from omegaconf import OmegaConf

    from common.models.build import count_parameters
    from common.models.hub import save_model
    from common.reasoners import policies
    from common.training.checkpoint import checkpoint_folder
    from common.training.loop import TrainConfig
    from common.training.loop import train as fit

    cfg, name = job
    words, member = policies.tokenizer(), cfg.members[name]
    model, begin = _start(cfg, name, words)
    config = TrainConfig(
        steps=member.steps, learning_rate=member.learning_rate, warmup_steps=cfg.training.warmup_steps,
        seed=cfg.seed, shards=1,
    )  # fmt: skip
    plain = [OmegaConf.to_container(node) for node in (cfg.training, member)]
    code = [Path(__file__), Path(__file__).with_name("tasks.py")]  # the examples, beside what common decides
    folder = checkpoint_folder(cfg.checkpoints, name, [plain, cfg.facts, cfg.seed], [*begin, *code])
    half = folder / "half"

    def keep(step: int) -> None:
        if step == member.steps // 2:
            save_model(model, half)

    own = examples(cfg, words, STEPS if member.start else DIRECT)
    rows = dict(cfg.training.rows.steps if member.start else cfg.training.rows.direct)
    state = fit(
        model, batches(own, rows, cfg.seed), config, checkpoints=folder, after_step=keep, title=name
    )  # fmt: skip
    out = Path(cfg.out) / name
    save_model(model.cpu(), out / "final")
    shutil.copytree(half, out / "half")
    loss = state.history[-1]["train_loss"]
    print(f"{name}: {state.step} steps, {state.seconds:.0f} s, training loss {loss:.2f}", flush=True)
    return {"name": name, "parameters": count_parameters(model), "steps": state.step, "tokens": state.tokens}


def _start(cfg: DictConfig, name: str, words: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, list[Path]]:
    """A model to train, and the folder of the weights that it begins from, if any."""
    from common.models.build import build
    from common.models.hub import load_model

    member = cfg.members[name]
    if member.start:
        folder = Path(cfg.reasoners) / member.start
        return load_model(folder, attention="eager").to(cfg.device), [folder]
    sizes = {
        "hidden_size": member.hidden_size,
        "num_hidden_layers": member.layers,
        "intermediate_size": 2 * member.hidden_size,
        "vocab_size": len(words),
        "eos_token_id": words.convert_tokens_to_ids(END),
        "pad_token_id": words.pad_token_id,
    }
    return build(sizes, seed=cfg.seed, attention="eager").to(cfg.device), []


def weights(cfg: DictConfig, entry: DictConfig) -> str | Path:
    """Where the weights of an entry of the zoo are: a folder, or the id of a checkpoint of the hub.

    Raises ValueError for weights of another kind.
    """
    kind, _, rest = str(entry.weights).partition("/")
    if kind in ("train", "reasoners"):
        return Path(cfg.artifacts) / "train" / rest if kind == "train" else Path(cfg.reasoners) / rest
    if str(entry.weights).startswith("hub:"):
        return str(entry.weights).removeprefix("hub:")
    raise ValueError(f"{entry.name}: weights are train/..., reasoners/... or hub:..., not {entry.weights!r}")


def training_flops(cfg: DictConfig, entry: DictConfig) -> float:
    """6 N D of the release: N parameters, D tokens read up to these weights, those of the start included; NaN for a
    checkpoint of the hub."""
    if str(entry.weights).startswith("hub:"):
        return float("nan")
    kind, name, kept = str(entry.weights).split("/")
    if kind == "reasoners":
        return _of_reasoner(cfg, name, kept)
    own = json.loads((Path(cfg.artifacts) / "train" / "sizes.json").read_text())[name]
    flops = 6.0 * own["parameters"] * own["tokens"] * (1.0 if kept == "final" else (own["steps"] // 2) / own["steps"])
    start = cfg.members[name].start
    return flops + (_of_reasoner(cfg, *str(start).split("/")) if start else 0.0)


def _of_reasoner(cfg: DictConfig, stage: str, kept: str) -> float:
    own = json.loads((Path(cfg.reasoners) / stage / "metrics.json").read_text())
    share = 1.0 if kept == "final" else own[kept]["step"] / own["steps"]
    return 6.0 * own["parameters"] * own["tokens"] * share
