"""The shared tokenizer and language models: one mixture of three tasks, three architectures.

Quoting and short answers about documents (common/tasks/multihop), Python code (the standard library) and chains of
operations (common/tasks/chain). Each model's folder is in hub format, with the
tokenizer and metrics.json beside the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import OmegaConf

from common.data import corpus
from common.tasks import chain, multihop

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from common.tasks.problem import Problem
    from common.training.data import Batches, Example

ALONE = "0123456789+-*=,$"  # symbols of chain, each a token of its own


def tokenizer(cfg: DictConfig) -> None:
    """Byte-level BPE over the training splits: standard library sources and documents with questions."""
    if _hub(cfg):
        return
    from common.models.tokenizer import train_tokenizer

    quoting, short = _multihop(cfg, "train")
    texts = [document.text[: cfg.mixture.code.characters] for document in corpus.stdlib_sources("train")]
    texts += [problem.prompt + problem.answer for problem in quoting + short]
    train_tokenizer(texts, cfg.vocab_size, alone=ALONE).save_pretrained(cfg.out)


def lm_llama(cfg: DictConfig) -> None:
    """The main model: trained until it quotes documents and gets most chains right."""
    _train(cfg, "llama")


def lm_qwen2(cfg: DictConfig) -> None:
    """A briefly trained Qwen2, for claims that hold for any weights."""
    _train(cfg, "qwen2")


def lm_gpt2(cfg: DictConfig) -> None:
    """A briefly trained GPT-2, for claims that hold for any weights."""
    _train(cfg, "gpt2")


def _plain(node: Any) -> dict[str, Any]:
    """A node of the configuration as a dict."""
    return dict(cast("dict[str, Any]", OmegaConf.to_container(node, resolve=True)))


def _hub(cfg: DictConfig) -> bool:
    """Records a checkpoint of the hub instead of a trained model; papers read the id from model.json."""
    if cfg.hub_id:
        Path(cfg.out, "model.json").write_text(json.dumps({"hub_id": cfg.hub_id}) + "\n")
    return bool(cfg.hub_id)


def _train(cfg: DictConfig, architecture: str) -> None:
    if _hub(cfg):
        return
    from common.models.build import build, count_parameters
    from common.models.hub import load_tokenizer, save_model
    from common.training.checkpoint import checkpoint_folder
    from common.training.loop import TrainConfig, train

    folder = Path(cfg.shared) / "tokenizer"
    words = load_tokenizer(folder)
    model = build(
        _plain(cfg.model),
        architecture=architecture,
        vocab_size=len(words),
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        seed=cfg.seed,
    ).to(cfg.device)
    steps = cfg.steps[cfg.stage]
    config = TrainConfig(steps=steps, seed=cfg.seed, **_plain(cfg.training))
    settings = _plain(OmegaConf.masked_copy(cfg, ["model", "mixture", "rows", "seed", "stage"]))
    state = train(
        model,
        mixture(cfg, words, "train"),
        config,
        held_out=mixture(cfg, words, "test")(0),
        checkpoints=checkpoint_folder(cfg.checkpoints, cfg.stage, [settings, corpus.fingerprint()], [folder]),
        title=cfg.stage,
    )
    metrics: dict[str, float] = {"parameters": count_parameters(model), "steps": state.step, "tokens": state.tokens}
    metrics |= {"held_out_loss": state.history[-1]["held_out_loss"]} | accuracies(cfg, model, words)
    print(", ".join(f"{name} {value:.4g}" for name, value in metrics.items()), flush=True)
    save_model(model.cpu(), cfg.out)
    words.save_pretrained(cfg.out)
    Path(cfg.out, "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")


def mixture(cfg: DictConfig, words: PreTrainedTokenizerFast, split: str) -> Batches:
    """step -> one batch of each task of the split, and early in training also of random tokens that come back.

    Those teach a model to look back for what came after, with which it then learns to quote (see `data.repeats`).
    """
    from common.training import data

    tasks = cfg.mixture
    quoting, short = _multihop(cfg, split)
    chains = chain.generate(cfg.seed, _share(tasks.chain.problems, split), tuple(tasks.chain.steps), split)
    code = [document.text[: tasks.code.characters] for document in corpus.stdlib_sources(split)]
    stream = data.pack(words(code)["input_ids"], words.eos_token_id)
    pad = words.pad_token_id
    rows = {name: max(1, round(task.rows * cfg.rows[cfg.stage])) for name, task in tasks.items()}
    answers = data.bucketed(_examples(words, quoting + short), rows["multihop"], seed=cfg.seed, pad_id=pad)
    code_windows = data.windows(stream, rows["code"], tasks.code.length, seed=cfg.seed)
    traces = data.bucketed(_examples(words, chains), rows["chain"], seed=cfg.seed, pad_id=pad)
    batches = data.mixture(data.joined(answers, code_windows, pad_id=pad), traces)
    if split != "train":
        return batches
    first = len(words.all_special_ids)
    copies = data.repeats(len(words), rows["repeats"], tasks.repeats.length, first=first, seed=cfg.seed)
    until = round(tasks.repeats.share * cfg.steps[cfg.stage])
    return lambda step: [*batches(step), copies(step)] if step < until else batches(step)


def accuracies(cfg: DictConfig, model: PreTrainedModel, words: PreTrainedTokenizerFast) -> dict[str, float]:
    """Greedy answers to held-out problems: shares that are right, and for quoting answers also verbatim and gold."""
    from common.generation.sampler import generate

    quoting, short = _multihop(cfg, "test")
    chains = chain.generate(cfg.seed, cfg.held_out, tuple(cfg.mixture.chain.steps), "test")

    def answers(problems: list[Problem]) -> list[str]:
        out = generate(model, [words.encode(problem.prompt) for problem in problems], 96)
        return [words.decode(tokens, skip_special_tokens=True) for tokens in out.tokens]

    def share(right: Any, problems: list[Problem], texts: list[str]) -> float:
        return sum(right(problem, text) for problem, text in zip(problems, texts, strict=True)) / len(problems)

    quoting, short = quoting[: cfg.held_out], short[: cfg.held_out]
    quotes = answers(quoting)
    return {
        "multihop": share(multihop.verify, quoting, quotes),
        "multihop_verbatim": share(multihop.quotes_are_verbatim, quoting, quotes),
        "multihop_gold": share(lambda problem, text: text == problem.answer, quoting, quotes),
        "multihop_short": share(multihop.verify, short, answers(short)),
        "chain": share(chain.verify, chains, answers(chains)),
    }


def _multihop(cfg: DictConfig, split: str) -> tuple[list[Problem], list[Problem]]:
    """Problems with quoting and with short answers; those of 'test' are a tenth as many, at least `held_out`."""
    counts = cfg.mixture.multihop
    short = max(_share(counts.short, split), cfg.held_out)
    quoting = max(_share(counts.problems - counts.short, split), cfg.held_out)
    return (
        multihop.generate(cfg.seed, quoting, split=split),
        multihop.generate(cfg.seed + 1, short, split=split, quote=False),
    )


def _share(count: int, split: str) -> int:
    return count if split == "train" else max(64, count // 100)


def _examples(words: PreTrainedTokenizerFast, problems: list[Problem]) -> list[Example]:
    from common.training.data import Example

    prompts = words([problem.prompt for problem in problems])["input_ids"]
    answers = words([problem.answer for problem in problems])["input_ids"]
    return [Example([*p, *a, words.eos_token_id], len(p)) for p, a in zip(prompts, answers, strict=True)]
