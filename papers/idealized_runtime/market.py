"""Parts C and D: three reasoners behind three providers, and what their accuracy costs."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.generation import records
from common.generation.sampler import Generation, generate
from common.metrics.timing import compare
from common.reasoners import policies
from common.tasks import chain, countdown
from papers.idealized_runtime import own
from papers.idealized_runtime.method import Profile
from papers.idealized_runtime.providers import Provider, Service, noisy_neighbour

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd
    from omegaconf import DictConfig
    from transformers import PreTrainedModel

    from common.tasks.problem import Problem

SIZES = ("small", "base", "large")
SCENARIOS = {"chain": "chain", "chain_hard": "chain", "countdown": "countdown"}  # and the task that verifies it
Row = dict[str, Any]


def check(cfg: DictConfig) -> None:
    """Raises ValueError, before any model is loaded, for settings out of range; names the key and what is allowed."""
    if not cfg.api.problems:
        return
    providers = {name: Provider(**one) for name, one in cfg.api.providers.items()}
    if sorted(cfg.api.market) != sorted(SIZES) or sorted(cfg.api.market.values()) != sorted(providers):
        raise ValueError(
            f"api.market={dict(cfg.api.market)} must give each of {', '.join(SIZES)} one of {', '.join(providers)}"
        )
    if cfg.api.weights not in cfg.tradeoff.weights:
        raise ValueError(f"api.weights={cfg.api.weights} is none of tradeoff.weights={list(cfg.tradeoff.weights)}")
    if cfg.api.problems < 2 or cfg.tradeoff.problems < 2 or cfg.api.trials < 1:
        raise ValueError(
            f"needs 2 problems a task and a trial, not api.problems={cfg.api.problems}, "
            f"tradeoff.problems={cfg.tradeoff.problems}, api.trials={cfg.api.trials}"
        )


def problems(cfg: DictConfig, scenario: str, count: int) -> list[Problem]:
    """Held-out problems of a scenario; long chains have invertible factors, as where the shared models are judged."""
    if scenario == "countdown":
        return countdown.generate(cfg.seed, count, tuple(cfg.tradeoff.countdown), "test")
    steps = tuple(cfg.tradeoff[scenario])
    return chain.generate(cfg.seed, count, steps, "test", style="concise", invertible=scenario == "chain_hard")


def run(cfg: DictConfig, out: Path) -> dict[str, Profile]:
    """Writes calls.parquet and records.parquet; returns the reasoners' profiles. Nothing where api.problems is 0."""
    if not cfg.api.problems:
        return {}
    words = policies.tokenizer()
    models = {f"{size} {weights}": _load(cfg, size, weights) for size in SIZES for weights in cfg.tradeoff.weights}
    final = {size: models[f"{size} {cfg.api.weights}"] for size in SIZES}
    profiles = {}
    for size, model in final.items():
        cells = [(p, o) for p in cfg.api.prompts for o in cfg.api.outputs]
        _, profiles[f"reasoner_{size}"] = own.profile_of(cfg, model, cells)
    calls, rows = ask_all(cfg, final, words)
    calls.to_parquet(out / "calls.parquet", index=False)
    for name, model in models.items():
        rows += answers(cfg, name, model, words)
    table = records.frame(rows, paper=cfg.slug, profile=cfg.profile, seed=cfg.seed, sample_id=0, discarded_tokens=0)
    records.write(out / "records.parquet", table)
    return profiles


def _load(cfg: DictConfig, size: str, weights: str) -> PreTrainedModel:
    from common.models.hub import load_model

    return load_model(Path(cfg.reasoners) / f"reasoner_{size}" / weights).to(cfg.device)


def ask_all(cfg: DictConfig, models: dict[str, PreTrainedModel], words: Any) -> tuple[pd.DataFrame, list[Row]]:
    """(synthetic calls, records of the real ones) of every model at every provider, all interleaved.

    A synthetic call has a fixed number of tokens and is repeated `api.trials` times; each problem is asked once.
    """
    own_cfg, found = cfg.api, {}
    asked = {s: problems(cfg, s, own_cfg.problems) for s in own_cfg.scenarios}
    prompts = {s: words([problem.prompt for problem in of])["input_ids"] for s, of in asked.items()}
    end = words.convert_tokens_to_ids(policies.ANSWER_END)
    with ExitStack() as stack:
        switch = stack.enter_context(noisy_neighbour(own_cfg.period, own_cfg.duty))
        services = {
            f"{size}@{name}": stack.enter_context(_service(model, Provider(**provider), switch))
            for size, model in models.items()
            for name, provider in own_cfg.providers.items()
        }
        synthetic = {api: lambda p, o, service=service: service.ask([1] * p, o) for api, service in services.items()}
        cells = [(p, o) for p in own_cfg.prompts for o in own_cfg.outputs]
        calls = own.together(synthetic, cells, own_cfg.trials, 1)

        def keep(api: str, scenario: str, i: int) -> None:
            most = policies.LONGEST_ANSWER[SCENARIOS[scenario]]
            found[api, scenario, i] = services[api].ask(prompts[scenario][i], most, [end])

        real: dict[str, Callable[[], Any]] = {
            f"{api}|{s}|{i}": partial(keep, api, s, i)
            for s in own_cfg.scenarios for i in range(own_cfg.problems) for api in services
        }  # fmt: skip
        timings = compare(real, rounds=1, warmup=0)
    rows = []
    for (api, s, i), out in found.items():
        seconds = timings.wall[f"{api}|{s}|{i}"][0]
        rows.append({"arm": api, **_record(s, i, asked[s][i], len(prompts[s][i]), out, words, seconds, 1, 0)})
    return calls, rows


def _service(model: PreTrainedModel, provider: Provider, switch: Any) -> Service:
    return Service(model, provider, switch if provider.neighbour else None)


def answers(cfg: DictConfig, name: str, model: PreTrainedModel, words: Any) -> list[Row]:
    """Part D: records of greedy answers to every scenario's problems, in one batch a scenario."""
    rows = []
    end = words.convert_tokens_to_ids(policies.ANSWER_END)
    for scenario, task in SCENARIOS.items():
        of = problems(cfg, scenario, cfg.tradeoff.problems)
        prompts = words([problem.prompt for problem in of])["input_ids"]
        out = generate(model, prompts, policies.LONGEST_ANSWER[task], stop_tokens=[end])
        each = out.ledger.seconds / len(of)
        rows += [
            {"arm": name, **_record(scenario, i, problem, len(prompts[i]), out, words, each, len(of), i)}
            for i, problem in enumerate(of)
        ]
    return rows


def _record(
    scenario: str, i: int, problem: Problem, read: int, out: Generation, words: Any, seconds: float, batch: int, at: int
) -> Row:
    """A row of records for answer `at` of a batch, whose forwards and operations are shared out evenly."""
    tokens = out.tokens[at].tolist()
    text = words.decode(tokens)
    return {
        "task": scenario, "problem_id": i, "difficulty": problem.difficulty, "prompt_tokens": read,
        "output_tokens": len(tokens), "forwards": out.ledger.forwards / batch, "flops": out.ledger.flops / batch,
        "seconds": seconds, "answer": text, "correct": policies.VERIFY[SCENARIOS[scenario]](problem, text),
    }  # fmt: skip
