"""The prompts of each task: {split: texts} for the splits warmup (fills the trie), train (chooses sizes) and test."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from common.data import corpus
from common.data.sources import Located, locate
from common.tasks import chain, multihop

if TYPE_CHECKING:
    from omegaconf import DictConfig

Prompts = dict[str, list[str]]
Source = Located | str


def counts(cfg: DictConfig) -> dict[str, int]:
    """Prompts wanted of each split."""
    return {"warmup": cfg.warm_prompts, "train": cfg.train_prompts, "test": cfg.prompts}


def documents(cfg: DictConfig, quote: bool = True) -> tuple[Prompts, list[Source]]:
    """Questions about short documents, to be answered with quotations or, without `quote`, in other words."""
    prompts = {
        split: [problem.prompt for problem in multihop.generate(cfg.seed + 2, n, split=split, quote=quote)]
        for split, n in counts(cfg).items()
    }
    return prompts, ["common.tasks.multihop"]


def short(cfg: DictConfig) -> tuple[Prompts, list[Source]]:
    return documents(cfg, quote=False)


def chains(cfg: DictConfig) -> tuple[Prompts, list[Source]]:
    """Arithmetic whose answer is a chain of thought."""
    prompts = {
        split: [problem.prompt for problem in chain.generate(cfg.seed + 2, n, (2, 6), split)]
        for split, n in counts(cfg).items()
    }
    return prompts, ["common.tasks.chain"]


def code(cfg: DictConfig) -> tuple[Prompts, list[Source]]:
    """Beginnings of stretches of the standard library, from the start of a line; modules belong to one split."""
    prompts = {}
    for number, (split, n) in enumerate(counts(cfg).items()):
        random = np.random.default_rng([cfg.seed, 0xC0DE, number])
        files = [d.text for d in corpus.stdlib_sources(split) if len(d.text) > 4 * cfg.code_characters]
        prompts[split] = []
        while len(prompts[split]) < n:
            text = files[random.integers(len(files))]
            start = text.index("\n", random.integers(len(text) - 3 * cfg.code_characters)) + 1
            prompts[split].append(text[start : start + cfg.code_characters])
    return prompts, [f"standard library of Python {corpus.fingerprint()['python']}"]


def gsm8k(cfg: DictConfig) -> tuple[Prompts, list[Source]]:
    """Questions of GSM8K; its train file gives the warm-up and the training prompts."""
    files = {name: locate(f"gsm8k/{name}.jsonl", cfg.data_root, cfg.network) for name in ("train", "test")}
    questions = {
        name: [json.loads(line)["question"] for line in found.path.read_text().splitlines()]
        for name, found in files.items()
    }
    return _cut(cfg, questions["train"], questions["test"]), list(files.values())


def humaneval(cfg: DictConfig) -> tuple[Prompts, list[Source]]:
    """Prompts of HumanEval: every other one is a test prompt, the rest warms the trie and chooses sizes."""
    found = locate("humaneval/HumanEval.jsonl.gz", cfg.data_root, cfg.network)
    with gzip.open(found.path, "rt") as lines:
        prompts = [json.loads(line)["prompt"] for line in lines]
    return _cut(cfg, prompts[1::2], prompts[::2]), [found]


def dolly(cfg: DictConfig) -> tuple[Prompts, list[Source]]:
    """Instructions of Dolly, with their context where there is one; every other one is a test prompt."""
    from datasets import load_dataset

    rows = load_dataset(cfg.dolly.path, revision=cfg.dolly.revision, split="train")
    prompts = [f"{row['instruction']}\n\n{row['context']}".strip() for row in rows]
    return _cut(cfg, prompts[1::2], prompts[::2]), [f"{cfg.dolly.path}@{cfg.dolly.revision}"]


def _cut(cfg: DictConfig, others: Sequence[str], test: Sequence[str]) -> Prompts:
    """As many as wanted, or as there are: train prompts first, for without them no size is chosen."""
    return {
        "train": list(others[: cfg.train_prompts]),
        "warmup": list(others[cfg.train_prompts :][: cfg.warm_prompts]),
        "test": list(test[: cfg.prompts]),
    }


TASKS: dict[str, Callable[[DictConfig], tuple[Prompts, list[Source]]]] = {
    "documents": documents,
    "code": code,
    "chain": chains,
    "short": short,
    "dolly": dolly,
    "gsm8k": gsm8k,
    "humaneval": humaneval,
}
TITLES = {
    "documents": "answers from documents, with quotations",
    "code": "code continuation",
    "chain": "chain of thought",
    "short": "short free answers",
    "dolly": "Dolly",
    "gsm8k": "GSM8K",
    "humaneval": "HumanEval",
}
