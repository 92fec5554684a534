"""The policies: small Llamas that solve chains and countdown step by step, in three sizes and three styles.

Search and reinforcement learning need models that are neither hopeless nor perfect. So while a model trains, its
accuracy is watched, and the weights nearest the middle of each wanted range are kept beside the final ones:

    <stage>/final                                   hub format, with the tokenizer
    <stage>/chain_hard, chain_strong, countdown     of the three sizes: by greedy accuracy on the hard splits
    <stage>/start                                   of the styles: by sampled accuracy on their own chains
    <stage>/metrics.json                            accuracy by task and difficulty of each, and the gates
    <stage>/hard.json                               the difficulties of the hard splits
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

    from common.training.data import Batch, Batches, Example

WORDS = [*map(str, range(100)), *"+-*/=>:, x$#?~", *chain.LABELS]
STEP_ENDS, ANSWER_END = (",",), "$"
VERIFY = {"chain": chain.verify, "countdown": countdown.verify}
PASSED = 3  # evaluations in a row above its ranges after which an accuracy is no longer watched
LONGEST_ANSWER = {"chain": 150, "countdown": 64}  # new tokens


def tokenizer() -> PreTrainedTokenizerFast:
    """Numbers 0..99 and the symbols of the tasks, a token each; `$` ends an answer."""
    from common.models.tokenizer import word_tokenizer

    return word_tokenizer(WORDS)


def problems(cfg: DictConfig, task: str, split: str, count: int | None = None) -> list[Problem]:
    """Problems of a stage's training mixture ('chain', 'style_chain' or 'countdown'), or of the hard splits that search
    is judged on ('chain_hard', 'countdown_hard')."""
    style = _chain_style(cfg)
    if task == "style_chain":
        own = cfg.style_chain
        return chain.generate(cfg.seed, count or own.problems, tuple(own.steps), split, style=style)
    if task in ("chain", "chain_hard"):
        hard = task == "chain_hard"
        steps = tuple(cfg.chain.hard if hard else cfg.chain.steps)
        return chain.generate(cfg.seed, count or cfg.chain.problems, steps, split, style=style, invertible=hard)
    if task == "countdown_hard":
        return countdown.generate(cfg.seed, count or cfg.countdown.problems, cfg.countdown.hard, split)
    own = cfg.countdown
    backtrack = own.backtrack if _name(cfg) == "backtrack" else 0.0
    return countdown.generate(
        cfg.seed, count or own.problems, tuple(own.numbers), split, backtrack=backtrack, astray=own.astray
    )


def train(cfg: DictConfig) -> None:
    """A stage: trains one reasoner and writes it in hub format with its metrics."""
    from common.models.build import build, count_parameters
    from common.models.hub import load_model, save_model
    from common.training.checkpoint import checkpoint_folder
    from common.training.loop import TrainConfig
    from common.training.loop import train as fit

    words, own = tokenizer(), cfg.sizes[_size(cfg)]
    end = words.convert_tokens_to_ids(ANSWER_END)
    begin = [Path(cfg.reasoners) / cfg.begin[_name(cfg)]] if _name(cfg) in cfg.begin else []
    if begin:
        model = load_model(begin[0], attention="eager").to(cfg.device)
    else:
        model = build(
            _plain(own.model), vocab_size=len(words), eos_token_id=end, pad_token_id=0, seed=cfg.seed, attention="eager"
        ).to(cfg.device)
    config = TrainConfig(
        steps=cfg.steps[_name(cfg)], learning_rate=own.learning_rate, seed=cfg.seed, **_plain(cfg.training)
    )
    keys = [
        "sizes",
        "styles",
        "steps",
        "rows",
        "chain",
        "countdown",
        "style_chain",
        "training",
        "watch",
        "kept",
        "seed",
    ]
    settings = [cfg.stage, _plain(OmegaConf.masked_copy(cfg, keys))]
    folder = checkpoint_folder(cfg.checkpoints, cfg.stage, settings, begin)
    watch = _Watch(cfg, model, words, folder)
    state = fit(model, _mixture(cfg, words, watch), config, checkpoints=folder, after_step=watch, title=cfg.stage)
    out = Path(cfg.out)
    metrics: dict[str, Any] = {"parameters": count_parameters(model), "steps": state.step, "tokens": state.tokens}
    if _name(cfg) in cfg.sizes:
        metrics["chains learned at step"] = watch.learned_at
    save_model(model.cpu(), out / "final")
    for kept in watch.kept:
        shutil.copytree(kept.folder, out / kept.name)
        # Measured again: the accuracy that made these weights the nearest is a biased one.
        task, measure = watch.tests[kept.name]
        test = problems(cfg, task, "warmup", cfg.watch.problems + cfg.watch.again)[cfg.watch.problems :]
        again = accuracy(load_model(out / kept.name), words, test, do_sample=measure == "sampled")
        inside = kept.wanted[0] <= again <= kept.wanted[1]
        metrics[kept.name] = {"step": kept.step, measure: again, "range": kept.wanted, "inside": inside}
    metrics["final"] = {"accuracy": accuracies(cfg, load_model(out / "final"), words)}
    for path in (out / "final", *(kept.folder for kept in watch.kept)):
        words.save_pretrained(out / path.name)
    print(json.dumps(metrics), flush=True)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    hard = {"chain": list(cfg.chain.hard), "countdown": cfg.countdown.hard}
    (out / "hard.json").write_text(json.dumps(hard) + "\n")


def accuracies(cfg: DictConfig, model: PreTrainedModel, words: PreTrainedTokenizerFast) -> dict[str, dict[str, float]]:
    """Greedy and sampled (temperature 1) accuracy by task and difficulty on held-out problems."""
    count, table = cfg.watch.again, {}
    if _name(cfg) in cfg.styles:
        low, high = cfg.style_chain.steps
        longer = range(low, high + 3)  # two more than it was trained on
        tests = [chain.generate(cfg.seed, count, n, "test", style=_chain_style(cfg)) for n in longer]
    else:
        tests = [
            *(chain.generate(cfg.seed, count, n, "test", style="concise") for n in range(4, cfg.chain.hard[1] + 1, 4)),
            *(countdown.generate(cfg.seed, count, n, "test") for n in cfg.countdown.numbers),
        ]
    for test in tests:
        table[f"{test[0].task} {test[0].difficulty}"] = {
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

    def __init__(self, folder: Path, measure: str, wanted: tuple[float, float]) -> None:
        self.name, self.folder, self.measure, self.wanted = folder.name, folder, measure, wanted
        self.accuracy, self.step = float("nan"), 0
        if (record := folder.with_suffix(".json")).exists():
            self.accuracy, self.step = json.loads(record.read_text())

    def offer(self, model: PreTrainedModel, accuracy: float, step: int) -> None:
        middle = sum(self.wanted) / 2
        if not abs(accuracy - middle) >= abs(self.accuracy - middle):
            from common.models.hub import save_model

            self.accuracy, self.step = accuracy, step
            save_model(model, self.folder)
            _write_json(self.folder.with_suffix(".json"), [accuracy, step])


class _Watch:
    """Called after each training step: measures accuracies at times and offers the weights to those that keep them.

    What it measured is kept on disk, so that a run that goes on from a checkpoint sees what it saw.
    """

    def __init__(self, cfg: DictConfig, model: PreTrainedModel, words: PreTrainedTokenizerFast, folder: Path) -> None:
        self.settings, self.model, self.words = cfg.watch, model, words
        kind = "styles" if _name(cfg) in cfg.styles else "sizes"
        wanted, self.first = cfg.kept[kind], cfg.watch["from"][kind]
        self.kept = [_Kept(folder / name, w.measure, tuple(w.range)) for name, w in wanted.items()]
        self.tests = {name: (w.task, w.measure) for name, w in wanted.items()}
        self.problems = {
            task: problems(cfg, task, "warmup", cfg.watch.problems) for task, _ in set(self.tests.values())
        }
        self.needed, self.record = cfg.rows.learned[_size(cfg)], folder / "watch.json"
        self.found: dict[str, dict[str, float]] = {}  # task -> step -> accuracy; steps are text, as JSON has them
        if self.record.exists():
            self.found = json.loads(self.record.read_text())

    def __call__(self, step: int) -> None:
        if step < self.first or step % self.settings.every:
            return
        self.model.eval()
        for test in sorted(set(self.tests.values())):
            task, measure = test
            wanting = [kept for kept in self.kept if self.tests[kept.name] == test]
            before = [found for at, found in self.found.get(task, {}).items() if int(at) < step]
            if len(before) >= PASSED and min(before[-PASSED:]) > max(kept.wanted[1] for kept in wanting):
                continue
            found = accuracy(self.model, self.words, self.problems[task], do_sample=measure == "sampled")
            for kept in wanting:
                kept.offer(self.model, found, step)
            self.found.setdefault(task, {})[str(step)] = found
        _write_json(self.record, self.found)
        self.model.train()

    @property
    def learned_at(self) -> int | None:
        """The step at which chains were first solved as often as cfg.rows.learned asks; None until then."""
        steps = (int(at) for at, found in self.found.get("chain_hard", {}).items() if found >= self.needed)
        return min(steps, default=None)


def _mixture(cfg: DictConfig, words: PreTrainedTokenizerFast, watch: _Watch) -> Batches:
    """step -> a batch of each task. Once a size has learned chains, most rows are countdown, which is harder. When that
    is differs by hundreds of steps between seeds, since a model suddenly finds the running value."""
    from common.training import data

    if _name(cfg) in cfg.sizes:
        first, then = dict(cfg.rows.first[_name(cfg)]), dict(cfg.rows.then)
    else:
        first = {"style_chain": cfg.rows.style_chain}
        if _name(cfg) == "backtrack":
            first["countdown"] = cfg.rows.backtrack
        then = first
    examples = {task: _examples(words, problems(cfg, task, "train")) for task in first}
    early, late = (
        data.mixture(*(data.bucketed(examples[t], rows, seed=cfg.seed) for t, rows in shares.items()))
        for shares in (first, then)
    )

    def batches(step: int) -> list[Batch]:
        learned_at = watch.learned_at
        return early(step) if learned_at is None or step < learned_at else late(step)

    return batches


def _write_json(path: Path, content: Any) -> None:
    """Renamed into place, since the process may be killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content))
    partial.replace(path)


def _examples(words: PreTrainedTokenizerFast, of: list[Problem]) -> list[Example]:
    from common.models.tokenizer import encode
    from common.training.data import Example

    prompts, answers = (encode(words, [getattr(problem, name) for problem in of]) for name in ("prompt", "answer"))
    return [Example([*p, *a], len(p)) for p, a in zip(prompts, answers, strict=True)]


def _name(cfg: DictConfig) -> str:
    """The stage's own name: a size or a style."""
    return str(cfg.stage).removeprefix("reasoner_")


def _size(cfg: DictConfig) -> str:
    return _name(cfg) if _name(cfg) in cfg.sizes else "base"


def _chain_style(cfg: DictConfig) -> chain.Style:
    shares = _plain(cfg.styles[_name(cfg)]) if _name(cfg) in cfg.styles else {}
    if "strides" in shares:
        shares["strides"] = tuple(shares["strides"])
    return chain.Style(**shares)


def _plain(node: Any) -> dict[str, Any]:
    return dict(cast("dict[str, Any]", OmegaConf.to_container(node, resolve=True)))
