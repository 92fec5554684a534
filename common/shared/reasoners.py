"""The reasoners: small Llamas that solve chains and countdown step by step, in three sizes and three styles.

Search needs models that are neither hopeless nor perfect. So while a model trains, its greedy accuracy on the hard
split of each task is watched, and the weights nearest the middle of the wanted range are kept beside the final ones:

    <stage>/final, <stage>/chain_hard, <stage>/countdown     hub format, with the tokenizer
    <stage>/metrics.json                                     accuracy by task and difficulty of each, and the gates
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import OmegaConf

from common.tasks import chain, countdown
from common.tasks.problem import Problem

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from common.training.data import Batches, Example

WORDS = [*map(str, range(100)), *"+-*/=>:, x$#?~", *chain.LABELS]
STEP_ENDS, ANSWER_END = (",",), "$"
VERIFY = {"chain": chain.verify, "countdown": countdown.verify}
LONGEST_ANSWER = {"chain": 150, "countdown": 64}  # new tokens


def tokenizer() -> PreTrainedTokenizerFast:
    """Numbers 0..99 and the symbols of the tasks, a token each; `$` ends an answer."""
    from common.models.tokenizer import word_tokenizer

    return word_tokenizer(WORDS)


def problems(cfg: DictConfig, task: str, split: str, count: int | None = None) -> list[Problem]:
    """Problems of a reasoner's training mixture ('chain' or 'countdown'), or of the hard splits that search is judged
    on ('chain_hard', 'countdown_hard')."""
    data = cfg.reasoners.data
    if task in ("chain", "chain_hard"):
        steps = tuple(data.chain.steps if task == "chain" else data.chain.hard)
        return chain.generate(cfg.seed, count or data.chain.problems, steps, split, style=_chain_style(cfg))
    numbers = tuple(data.countdown.numbers) if task == "countdown" else data.countdown.hard
    backtrack = data.countdown.backtrack if _style(cfg) == "backtrack" else 0.0
    return countdown.generate(cfg.seed, count or data.countdown.problems, numbers, split, backtrack=backtrack)


def train(cfg: DictConfig) -> None:
    """A stage: trains one reasoner and writes it in hub format with its metrics."""
    from common.models.build import build, count_parameters
    from common.models.hub import load_model, save_model
    from common.training.checkpoint import checkpoint_folder
    from common.training.loop import TrainConfig
    from common.training.loop import train as fit

    words, own = tokenizer(), cfg.reasoners.models[_size(cfg)]
    end = words.convert_tokens_to_ids(ANSWER_END)
    model = build(
        _plain(own.model), vocab_size=len(words), eos_token_id=end, pad_token_id=0, seed=cfg.seed, attention="eager"
    ).to(cfg.device)
    config = TrainConfig(
        steps=own.steps, learning_rate=own.learning_rate, seed=cfg.seed, **_plain(cfg.reasoners.training)
    )
    settings = _plain(OmegaConf.masked_copy(cfg, ["reasoners", "seed", "stage"]))
    folder = checkpoint_folder(cfg.checkpoints, cfg.stage, settings)
    watch = _Watch(cfg, model, words, folder) if _style(cfg) == "concise" else None
    state = fit(model, _mixture(cfg, words), config, checkpoints=folder, after_step=watch, title=cfg.stage)
    out = Path(cfg.out)
    metrics: dict[str, Any] = {
        "parameters": count_parameters(model),
        "steps": state.step,
        "tokens": state.tokens,
    }
    save_model(model.cpu(), out / "final")
    for name, kept in watch.kept.items() if watch else ():
        shutil.copytree(kept.folder, out / name)
        metrics[name] = {"step": kept.step, "greedy": kept.accuracy, "range": kept.wanted, "inside": kept.inside}
    for path in sorted(p for p in out.iterdir() if p.is_dir()):
        words.save_pretrained(path)
        metrics.setdefault(path.name, {})["accuracy"] = accuracies(cfg, load_model(path), words)
    print(json.dumps(metrics), flush=True)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


def accuracies(cfg: DictConfig, model: PreTrainedModel, words: PreTrainedTokenizerFast) -> dict[str, dict[str, float]]:
    """Greedy and sampled (temperature 1) accuracy by task and difficulty on held-out problems."""
    table = {}
    for task in ("chain", "countdown"):
        data = cfg.reasoners.data[task]
        low, high = (data.steps[0], data.hard[1]) if task == "chain" else (data.numbers[0], data.hard)
        for difficulty in range(low, high + 1, 4 if task == "chain" else 1):
            count = cfg.reasoners.watch.problems
            test = (
                chain.generate(cfg.seed, count, difficulty, "test", style=_chain_style(cfg))
                if task == "chain"
                else countdown.generate(cfg.seed, count, difficulty, "test")
            )
            table[f"{task} {difficulty}"] = {
                "greedy": accuracy(model, words, test),
                "sampled": accuracy(model, words, test, do_sample=True),
            }
    return table


def accuracy(model: PreTrainedModel, words: PreTrainedTokenizerFast, test: list[Problem], **sampling: Any) -> float:
    """Share of right answers to problems of one task."""
    from common.generation.sampler import generate

    task = test[0].task
    prompts = words([problem.prompt for problem in test])["input_ids"]
    end = words.convert_tokens_to_ids(ANSWER_END)
    out = generate(model, prompts, LONGEST_ANSWER[task], stop_tokens=[end], **sampling)
    texts = [words.decode(tokens) for tokens in out.tokens]
    return sum(VERIFY[task](problem, text) for problem, text in zip(test, texts, strict=True)) / len(test)


class _Kept:
    """The weights nearest the middle of a range of accuracies so far, on disk."""

    def __init__(self, folder: Path, wanted: tuple[float, float]) -> None:
        self.folder, self.wanted, self.accuracy, self.step = folder, wanted, float("nan"), 0
        if (record := folder.with_suffix(".json")).exists():
            self.accuracy, self.step = json.loads(record.read_text())

    @property
    def inside(self) -> bool:
        return self.wanted[0] <= self.accuracy <= self.wanted[1]

    def offer(self, model: PreTrainedModel, accuracy: float, step: int) -> None:
        middle = sum(self.wanted) / 2
        if not abs(accuracy - middle) >= abs(self.accuracy - middle):
            from common.models.hub import save_model

            self.accuracy, self.step = accuracy, step
            save_model(model, self.folder)
            self.folder.with_suffix(".json").write_text(json.dumps([accuracy, step]))


class _Watch:
    """Called after each training step: evaluates at times and keeps the weights that each hard split asks for."""

    def __init__(self, cfg: DictConfig, model: PreTrainedModel, words: PreTrainedTokenizerFast, folder: Path) -> None:
        self.settings, self.model, self.words = cfg.reasoners.watch, model, words
        self.kept = {
            task: _Kept(folder / task, tuple(self.settings.ranges[task])) for task in ("chain_hard", "countdown")
        }
        count = self.settings.problems
        self.tests = {
            "chain_hard": problems(cfg, "chain_hard", "warmup", count),
            "countdown": problems(cfg, "countdown_hard", "warmup", count),
        }

    def __call__(self, step: int) -> None:
        if step < self.settings["from"] or step % self.settings.every:
            return
        self.model.eval()
        for task, kept in self.kept.items():
            kept.offer(self.model, accuracy(self.model, self.words, self.tests[task]), step)
        self.model.train()


def _mixture(cfg: DictConfig, words: PreTrainedTokenizerFast) -> Batches:
    from common.training import data

    rows = cfg.reasoners.data
    return data.mixture(
        *(
            data.bucketed(_examples(words, problems(cfg, task, "train")), rows[task].rows, seed=cfg.seed)
            for task in ("chain", "countdown")
        )
    )


def _examples(words: PreTrainedTokenizerFast, of: list[Problem]) -> list[Example]:
    from common.training.data import Example

    prompts = words([problem.prompt for problem in of])["input_ids"]
    answers = words([problem.answer for problem in of])["input_ids"]
    return [Example([*p, *a], len(p)) for p, a in zip(prompts, answers, strict=True)]


def _size(cfg: DictConfig) -> str:
    """The model of a stage: 'small', 'base' or 'large'; the styles are of base size."""
    name = cfg.stage.removeprefix("reasoner_")
    return name if name in cfg.reasoners.models else "base"


def _style(cfg: DictConfig) -> str:
    name = cfg.stage.removeprefix("reasoner_")
    return name if name in cfg.reasoners.styles else "concise"


def _chain_style(cfg: DictConfig) -> chain.Style:
    shares: dict[str, Any] = _plain(cfg.reasoners.styles[_style(cfg)])
    if "strides" in shares:
        shares["strides"] = tuple(shares["strides"])
    return chain.Style(**shares)


def _plain(node: Any) -> dict[str, Any]:
    return dict(cast("dict[str, Any]", OmegaConf.to_container(node, resolve=True)))
