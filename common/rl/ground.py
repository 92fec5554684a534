"""What arms are trained and judged on: a start policy, its tokenizer, a task's problems and rules.

    start: reasoner_mixed/start, task: {name: chain, steps: [2, 6]}      the shared reasoners on labelled chains
    start: Qwen/Qwen3-0.6B-Base, task: {name: gsm8k, told: ...}          a checkpoint of the hub on a benchmark

The second kind is for profiles that allow downloads; a folder in hub format works everywhere. told: what the policy is
asked to do. A benchmark that has test problems only names another one to train on: `train: gsm8k`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.reasoners import policies
from common.tasks import chain
from common.tasks.registry import PROGRAMS, Task, task

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from common.tasks.problem import Problem


@dataclass(frozen=True)
class Ground:
    """words: the tokenizer. ends: tokens that end an answer. problems: (seed, split, count) -> problems whose prompt is
    what the model reads; every arm of a seed sees the same. verify, result: the task's. load: the start policy.
    longer: (seed, count) -> harder problems than any in training, for a task that can make them."""

    words: PreTrainedTokenizerFast
    ends: tuple[int, ...]
    problems: Callable[[int, str, int], list[Problem]]
    verify: Callable[[Problem, str], bool]
    result: Callable[[Problem, str], str | None]
    load: Callable[[], PreTrainedModel]
    origin: str | Path
    longer: Callable[[int, int], list[Problem]] | None = None

    def tokens(self, text: str) -> list[int]:
        return self.words.encode(text, add_special_tokens=False)

    def prompts(self, problems: Sequence[Problem]) -> list[list[int]]:
        return self.words([p.prompt for p in problems], add_special_tokens=False)["input_ids"]


def ground(cfg: DictConfig, of: DictConfig, start: Path | None = None) -> Ground:
    """Of the settings of an arm (`arms.settings`), or of `cfg.rl`. start: a folder of weights in the place of of.start.

    Raises ValueError for an unknown task and for one whose answers are programs.
    """
    if of.task.name == "chain":
        return _chains(cfg, of, start or Path(cfg.reasoners) / of.start)
    rules = {name: _rules(cfg, name) for name in {of.task.name, of.task.train or of.task.name}}
    return _benchmark(cfg, of, start or of.start, rules)


def _chains(cfg: DictConfig, of: DictConfig, origin: Path) -> Ground:
    from common.models.hub import load_model

    words, (low, high) = policies.tokenizer(), tuple(of.task.steps)
    return Ground(
        words, (words.convert_tokens_to_ids(policies.ANSWER_END),),
        lambda seed, split, count: chain.generate(seed, count, (low, high), split, style="concise"),
        chain.verify, lambda problem, text: chain.result_of(text),
        lambda: load_model(origin).to(cfg.device), origin,
        lambda seed, count: chain.generate(seed, count, (high + 1, high + 2), "test", style="concise"),
    )  # fmt: skip


def _rules(cfg: DictConfig, name: str) -> Task:
    if name in PROGRAMS:
        raise ValueError(f"{name}: rewards run no programs here; choose a task of numbers or formulas")
    return task(name, data_root=cfg.data_root, network=cfg.network)


def _benchmark(cfg: DictConfig, of: DictConfig, origin: str | Path, rules: dict[str, Task]) -> Ground:
    from common.models.hub import load_model, load_tokenizer

    words = load_tokenizer(origin, network=cfg.network)
    trained, tested = rules[of.task.train or of.task.name], rules[of.task.name]

    def problems(seed: int, split: str, count: int) -> list[Problem]:
        found = (trained if split == "train" else tested).generate(seed, count, split=split)
        return [replace(problem, prompt=asked(words, of.task.told, problem.prompt)) for problem in found]

    def verify(problem: Problem, text: str) -> bool:
        return rules[problem.task].verify(problem, text)

    ends = _ends(origin, words, network=cfg.network)
    return Ground(
        words, ends, problems, verify, lambda problem, text: rules[problem.task].result(problem, text),
        lambda: load_model(origin, network=cfg.network).to(cfg.device), origin,
    )  # fmt: skip


def _ends(origin: str | Path, words: PreTrainedTokenizerFast, *, network: bool) -> tuple[int, ...]:
    """The end tokens of a checkpoint: those of its generation settings, else its tokenizer's."""
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(origin, local_files_only=not network).eos_token_id
    except OSError:  # a checkpoint without generation_config.json
        ends = None
    ends = words.eos_token_id if ends is None else ends
    return (ends,) if isinstance(ends, int) else tuple(ends)


def asked(words: PreTrainedTokenizerFast, told: str, question: str) -> str:
    """What a checkpoint reads: the question and what it is told, in its own chat format if it has one."""
    if words.chat_template is None:
        return f"{told}\n\n{question}\n"
    turns = [{"role": "user", "content": f"{question}\n\n{told}"}]
    return str(words.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
