"""Tasks as token ids, the models' own answers, and the decoders that are compared: all through one loop."""

from __future__ import annotations

import gc
import json
import pickle
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from common.generation.tree import Decoding, Draft, decode, no_draft, prompt_lookup, replay
from papers.lookahead.method import DraftTrie, ReleasedTrie, TrieDrafter

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rows = list[dict[str, Any]]
ARMS = ("greedy", "prompt lookup", "one", "par", "hier")
GRAM = 4  # repetition is counted in 4-grams


@dataclass(frozen=True)
class Setting:
    """How a trie drafts."""

    decoding_length: int
    branch_length: int
    mode: str = "hier"
    source: str = "mix"
    released: bool = False


@dataclass
class Task:
    """One task for one model: prompts and greedy answers by split, as token ids."""

    name: str
    prompts: dict[str, list[list[int]]]
    answers: dict[str, list[list[int]]]
    new_tokens: int
    end: int | None
    tries: dict[tuple[bool, int], bytes] = field(default_factory=dict)

    @property
    def ends(self) -> tuple[int, ...]:
        return () if self.end is None else (self.end,)

    @property
    def learnt(self) -> list[list[int]]:
        """The warm-up answers without their end token."""
        return [answer[:-1] if answer[-1] == self.end else answer for answer in self.answers["warmup"]]

    def drafter(self, setting: Setting) -> TrieDrafter:
        """Drafts from a copy of the trie that all warm-up answers filled."""
        key = (setting.released, setting.branch_length)
        if key not in self.tries:
            kind = ReleasedTrie if setting.released else DraftTrie
            self.tries[key] = pickle.dumps(filled(kind(setting.branch_length), self.learnt), pickle.HIGHEST_PROTOCOL)
        return drafting(pickle.loads(self.tries[key]), setting)


class Memoryless:
    """A drafter that learns nothing, in the interface of `TrieDrafter`: plain decoding and prompt lookup."""

    def __init__(self, draft: Draft) -> None:
        self.draft = draft

    def start(self, prompt: Sequence[int], end_tokens: Collection[int] = ()) -> None: ...

    def commit(self, new: list[int]) -> None: ...

    def finish(self) -> None: ...


Drafter = TrieDrafter | Memoryless


def filled(trie: DraftTrie, answers: Sequence[Sequence[int]]) -> DraftTrie:
    for answer in answers:
        trie.insert_output(answer)
    return trie


def drafting(trie: DraftTrie, setting: Setting) -> TrieDrafter:
    return TrieDrafter(trie, setting.decoding_length, setting.mode, setting.source)


@contextmanager
def without_collections() -> Iterator[None]:
    """Python's cycle collector would walk all nodes of all tries again and again; there are no cycles in them."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def source(cfg: DictConfig, name: str) -> str:
    """The folder of a shared model, or the checkpoint of the hub that it names."""
    folder = Path(cfg.shared) / name
    record = folder / "model.json"
    return json.loads(record.read_text())["hub_id"] if record.exists() else str(folder)


def load(cfg: DictConfig, name: str) -> PreTrainedModel:
    from common.models.hub import load_model

    return load_model(source(cfg, name), dtype=getattr(torch, cfg.dtype), network=cfg.network).to(cfg.device)


def load_words(cfg: DictConfig, name: str) -> PreTrainedTokenizerBase:
    from common.models.hub import load_tokenizer

    return load_tokenizer(source(cfg, name), network=cfg.network)


def encode(words: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prompt, in the tokenizer's chat template if it has one."""
    if words.chat_template:
        message = [{"role": "user", "content": text}]
        return list(words.apply_chat_template(message, add_generation_prompt=True, return_dict=False))
    return list(words.encode(text))


def unanswered(cfg: DictConfig, words: PreTrainedTokenizerBase, rows: Rows, test: int) -> list[Task]:
    """Every task with its prompts, `test` of them for the test."""
    tasks = []
    for name in cfg.tasks:
        prompts: dict[str, list[list[int]]] = {"warmup": [], "train": [], "test": []}
        for row in rows:
            if row["task"] == name:
                prompts[row["split"]].append(encode(words, row["prompt"]))
        prompts["test"] = prompts["test"][:test]
        tasks.append(Task(name, prompts, {}, cfg.new_tokens, words.eos_token_id))
    return tasks


def ask(cfg: DictConfig, name: str, words: PreTrainedTokenizerBase, rows: Rows, test: int) -> list[Task]:
    """`unanswered` with the model's own greedy answers to all prompts, in batches.

    cfg.backend samples them, from the saved weights: they fill tries and are no part of what is compared.
    """
    from common.generation.vllm import backend

    generate = backend(
        cfg.backend, source(cfg, name), device=cfg.device, dtype=getattr(torch, cfg.dtype), network=cfg.network
    )
    tasks = unanswered(cfg, words, rows, test)
    for task in tasks:
        for split, asked in task.prompts.items():
            task.answers[split] = []
            for start in range(0, len(asked), cfg.batch):
                out = generate(asked[start : start + cfg.batch], cfg.new_tokens, stop_tokens=task.ends)
                task.answers[split] += [tokens.tolist() for tokens in out.tokens]
    return tasks


def through(drafter: Drafter, task: Task, prompt: Sequence[int], call: Callable[..., Decoding]) -> Decoding:
    """One request from start to finish. call(draft, on_commit) decodes or replays."""
    drafter.start(prompt, task.ends)
    try:
        return call(drafter.draft, drafter.commit)
    finally:
        drafter.finish()


def replayed(
    drafter: Drafter, task: Task, split: str = "test", count: int | None = None, learn: bool = True
) -> list[Decoding]:
    """The passes that the recorded answers of a split would take, one request after the other.

    learn=False: the drafter sees the prompts but not the answers, so a trie ends as it began.
    """
    pairs = zip(task.prompts[split][:count], task.answers[split][:count], strict=True)
    return [
        through(drafter, task, p, lambda draft, commit, p=p, a=a: replay(draft, p, a, commit if learn else None))
        for p, a in pairs
    ]


def tokens_per_pass(decodings: Sequence[Decoding]) -> float:
    return sum(sum(d.accepted) for d in decodings) / sum(d.forwards for d in decodings)


def repetition(answer: Sequence[int]) -> float:
    """Share of the answer's 4-grams that stood in it before."""
    grams = [tuple(answer[i : i + GRAM]) for i in range(len(answer) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def choose_sizes(cfg: DictConfig, task: Task, token_cost: float) -> dict[str, int]:
    """decoding_length, and prompt lookup's number of tokens, with the most tokens per unit of time on train prompts.

    A pass of T tokens counts as 1 + token_cost * (T - 1): a formula and not a clock, so that a second run chooses
    alike.
    """

    def speed(drafter: Drafter) -> float:
        runs = replayed(drafter, task, "train")
        cost = sum(1 + token_cost * (drafted - 1) for run in runs for drafted in run.drafted)
        return sum(sum(run.accepted) for run in runs) / cost

    lengths = {n: speed(task.drafter(Setting(n, cfg.branch_length))) for n in cfg.choose}
    looked = {n: speed(Memoryless(prompt_lookup(n))) for n in cfg.choose}
    return {"decoding_length": max(lengths, key=lengths.__getitem__), "lookup": max(looked, key=looked.__getitem__)}


def drafter_of(arm: str, cfg: DictConfig, task: Task, sizes: dict[str, int]) -> Drafter:
    """A decoder's drafter as it stands before the first test prompt."""
    if arm == "greedy":
        return Memoryless(no_draft)
    if arm == "prompt lookup":
        return Memoryless(prompt_lookup(sizes["lookup"]))
    return task.drafter(Setting(sizes["decoding_length"], cfg.branch_length, arm))


def decoded(model: PreTrainedModel, drafter: Drafter, task: Task, prompt: list[int], room: int) -> Decoding:
    return through(
        drafter,
        task,
        prompt,
        lambda draft, commit: decode(
            model, prompt, draft, task.new_tokens, task.ends, max_draft=room, on_commit=commit
        ),
    )


def room_of(sizes: dict[str, int]) -> int:
    """Tokens that any decoder's draft may have: the same for all, so that they share the cache's size."""
    return max(sizes["decoding_length"], sizes["lookup"] + 1)
