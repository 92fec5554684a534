"""What models are calibrated on and tested with: texts by source, and problems of a task with a verifiable answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from common.data import corpus
from common.data.sources import Located
from common.tasks.problem import Problem
from common.tasks.registry import TASKS, task

if TYPE_CHECKING:
    from omegaconf import DictConfig

CHARACTERS = 4000  # of each file of the standard library, as many as the shared models are trained on
HELD_OUT = {"train": ("train",), "test": ("warmup", "test")}  # the shared models have seen neither of the latter
WIDE = 6  # characters that hold a token for sure, on average over a window


def stdlib(cfg: DictConfig, split: str, count: int, tokens: int, seed: int) -> list[str]:
    """Stretches of different files, each from the start of a line on and long enough for `tokens`."""
    random = np.random.default_rng([seed, 0xF24])
    least = WIDE * tokens
    files = [d.text[:CHARACTERS] for own in HELD_OUT[split] for d in corpus.stdlib_sources(own)]
    files = [text for text in files if len(text) > least]
    texts = []
    for index in random.permutation(len(files))[:count]:
        text = files[index]
        start = text.rfind("\n", 0, int(random.integers(len(text) - least)) + 1) + 1
        texts.append(text[start:])
    return texts


def wikitext(cfg: DictConfig, split: str, count: int, tokens: int, seed: int) -> list[str]:
    """test: the whole split as one text, as perplexities are usually taken. train: `count` stretches of it."""
    from datasets import load_dataset

    own = cfg.wikitext
    whole = "\n\n".join(load_dataset(own.path, own.name, revision=own.revision, split=split)["text"])
    if split == "test":
        return [whole]
    random, length = np.random.default_rng([seed, 0xF24]), WIDE * tokens
    return [whole[start : start + length] for start in random.integers(max(len(whole) - length, 1), size=count)]


SOURCES: dict[str, Callable[[DictConfig, str, int, int, int], list[str]]] = {"stdlib": stdlib, "wikitext": wikitext}


def calibration(cfg: DictConfig, draw: int) -> list[str]:
    """One draw of calibration texts from training splits. Raises ValueError for an unknown source."""
    texts, own = [], cfg.calibration
    for source, count in own.sources.items():
        if source in SOURCES:
            texts += SOURCES[source](cfg, "train", count, own.tokens, cfg.seed + draw) if count else []
        elif source in TASKS:
            texts += [problem.prompt + problem.answer for problem in problems(cfg, source, "train", count, 100 + draw)]
        else:
            raise ValueError(f"unknown calibration source {source!r}; there are: {', '.join([*SOURCES, *TASKS])}")
    return texts


def problems(cfg: DictConfig, name: str, split: str, count: int, draw: int = 0) -> list[Problem]:
    """Problems of a task; the difficulty in the configuration is that of the tested task."""
    found = task(name, data_root=cfg.data_root, network=cfg.network)
    own = cfg.problems.difficulty if name == cfg.problems.task else None
    if own is not None:
        return found.generate(cfg.seed + draw, count, tuple(own), split)
    return found.generate(cfg.seed + draw, count, split=split)


def sources(cfg: DictConfig) -> list[Located | str]:
    """What the texts came from, for provenance."""
    from common.data.sources import locate

    used: list[Located | str] = []
    names = [source for source, count in cfg.calibration.sources.items() if count]
    for name in dict.fromkeys([*names, cfg.text.source, cfg.problems.task]):
        if name == "stdlib":
            used.append(f"standard library of Python {corpus.fingerprint()['python']}")
        elif name == "wikitext":
            used.append(f"{cfg.wikitext.path}@{cfg.wikitext.revision}")
        elif name == "gsm8k":
            used.append(locate("gsm8k/test.jsonl", cfg.data_root, cfg.network))
        else:
            used.append(f"common.tasks.{name}")
    return used
