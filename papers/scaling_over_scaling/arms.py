"""Who answers what: the problems in bins of difficulty, the models, and the arms that draw answers from them.

An arm is a way to draw (parallel samples, or chains that rethink) and a model. Each runs in its own process; draws are
functions of seed, arm, problem, sample and round, so that a result does not depend on how many processes there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.tasks import chain, countdown
from papers.scaling_over_scaling.method import rethink
from papers.scaling_over_scaling.training import AGAIN

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from common.tasks.problem import Problem
    from common.tasks.registry import Task

KINDS = {"chain": "chain", "long_chain": "chain", "countdown": "countdown"}  # task -> generator; others are benchmarks
ROLES = ("small", "large", "rethinker")


@dataclass(frozen=True)
class Arm:
    """way: parallel or sequential. role: which of the task's models."""

    way: str
    role: str
    task: str

    @property
    def name(self) -> str:
        return f"{self.way} {self.role}"


@dataclass(frozen=True)
class Ground:
    """Problems of one task and a model that answers them.

    generate: the sampler with the model in it. first: token ids that ask for a first answer, by problem. again:
    (problem, ids of the last answer) -> ids that ask for another one. ends: stop tokens; None: the model's own.
    """

    rules: Task
    problems: list[Problem]
    generate: Callable[..., Any]
    decode: Callable[[list[list[int]]], list[str]]
    first: list[list[int]]
    again: Callable[[int, list[int]], list[int]]
    ends: list[int] | None


def listed(cfg: DictConfig) -> list[Arm]:
    """All arms, those that take longest first."""
    order = [("parallel", "large"), ("sequential", "rethinker"), ("parallel", "small"), ("parallel", "rethinker")]
    arms = [Arm(way, role, task) for way, role in order for task in cfg.tasks]
    arms = [arm for arm in arms if arm.role != "rethinker" or arm.task in cfg.sequential]
    return [arm for arm in arms if arm.way == "sequential" or cfg.samples[arm.role]]


def problems_of(kind: str, bins: Sequence[int], count: int, seed: int, split: str = "test") -> list[Problem]:
    """count problems of each bin, bin after bin.

    A bin is a number of operations or of numbers. One that stands k times is cut into k by how often a random walk
    finds the target, the easiest first (chains: as they were drawn). Raises ValueError for an unknown kind.
    """
    if kind not in ("chain", "countdown"):
        raise ValueError(f"unknown kind of problem {kind!r}; known: chain, countdown")
    found: list[Problem] = []
    for size in dict.fromkeys(bins):
        wanted = count * list(bins).count(size)
        if kind == "chain":
            found += chain.generate(seed, wanted, size, split, style=chain.Style(), invertible=True)
        else:
            drawn = countdown.generate(seed, wanted, size, split)
            found += sorted(drawn, key=lambda problem: -_luck_of(problem))
    return found


def _luck_of(problem: Problem) -> float:
    numbers = sorted(int(x) for x in problem.prompt.partition(">")[0].split())
    return countdown.random_walk(tuple(numbers), int(problem.result))


def source_of(cfg: DictConfig, task: str, role: str) -> str | Path:
    """The folder of a model in hub format, or its name on the hub. Raises ValueError where the profile names none."""
    own = cfg.grounds[task]
    if role == "rethinker" and own.rethinker:
        return Path(cfg.artifacts) / "train" / own.rethinker
    named = own.small if role == "rethinker" else own[role]
    if not named:
        raise ValueError(f"grounds.{task}.{role} names no model in profile {cfg.profile}")
    if task in KINDS and not Path(named).is_absolute():
        return Path(cfg.reasoners) / named
    return str(named)


def ground(cfg: DictConfig, task: str, role: str) -> Ground:
    """The problems of a task with one of its models."""
    import torch

    from common.generation.vllm import backend

    source = source_of(cfg, task, role)
    half = task not in KINDS and str(cfg.device).startswith("cuda")
    generate = backend(
        cfg.backend, source, device=cfg.device, dtype=torch.bfloat16 if half else torch.float32, network=cfg.network
    )
    return (_of_shared if task in KINDS else _of_benchmark)(cfg, task, source, generate)


def _of_shared(cfg: DictConfig, task: str, source: str | Path, generate: Callable[..., Any]) -> Ground:
    from common.reasoners import policies
    from common.tasks.registry import task as rules_of

    words = policies.tokenizer()
    problems = problems_of(KINDS[task], cfg.grounds[task].bins, cfg.problems, cfg.seed)
    prompts = words([problem.prompt for problem in problems])["input_ids"]
    mark, end = (words.convert_tokens_to_ids(token) for token in (AGAIN, policies.ANSWER_END))
    return Ground(
        rules_of(KINDS[task]), problems, generate, words.batch_decode, prompts,
        lambda problem, last: [*last, mark, *prompts[problem]], [end],
    )  # fmt: skip


def _of_benchmark(cfg: DictConfig, task: str, source: str | Path, generate: Callable[..., Any]) -> Ground:
    """A chat model on a benchmark; it rethinks because it is told to, with its last answer in the conversation."""
    from common.models.hub import load_tokenizer
    from common.rl.ground import asked
    from common.tasks.registry import task as rules_of

    words = load_tokenizer(source, network=cfg.network)
    rules = rules_of(task, data_root=cfg.data_root, network=cfg.network)
    problems = rules.generate(cfg.seed, cfg.problems * len(cfg.grounds[task].bins))

    def ids(text: str) -> list[int]:
        return words.encode(text, add_special_tokens=False)

    def decode(rows: list[list[int]]) -> list[str]:
        return words.batch_decode(rows, skip_special_tokens=True)

    def again(problem: int, last: list[int]) -> list[int]:
        (said,) = decode([last])
        question = problems[problem].prompt
        if words.chat_template is None:
            return ids(f"{asked(words, cfg.told.first, question)}{said}\n\n{cfg.told.again}\n")
        turns = [
            {"role": "user", "content": f"{question}\n\n{cfg.told.first}"},
            {"role": "assistant", "content": said},
            {"role": "user", "content": cfg.told.again},
        ]
        return ids(str(words.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)))

    first = [ids(asked(words, cfg.told.first, problem.prompt)) for problem in problems]
    return Ground(rules, problems, generate, decode, first, again, None)


def stream(problem: int, sample: int, round_: int) -> int:
    """The number of a random stream, different for all problems, samples below 10,000 and rounds below 1,000."""
    return (problem * 10_000 + sample) * 1_000 + round_


def run_arm(given: tuple[DictConfig, Arm]) -> dict[str, Any]:
    """(configuration, arm) -> records (of common.generation.records), pools (a row a problem: share of distinct
    answers, truncated ones, right ones with a wrong step) and model (its sizes for the roofline)."""
    from dataclasses import asdict

    from transformers import AutoConfig

    from common.costs.catalogue import from_config

    cfg, arm = given
    own = ground(cfg, arm.task, arm.role)
    rows = _parallel(cfg, arm, own) if arm.way == "parallel" else _sequential(cfg, arm, own)
    if arm.way == "parallel" and arm.role == "small" and cfg.reward and arm.task in cfg.scored:
        _score(cfg, own, KINDS[arm.task], rows)
    head = {"arm": arm.name, "task": arm.task}
    pools = [head | row for row in _pools(own, rows)]
    sizes = from_config(
        AutoConfig.from_pretrained(source_of(cfg, arm.task, arm.role), local_files_only=not cfg.network)
    )
    right = sum(row["correct"] for row in rows) / len(rows)
    print(f"{arm.task}, {arm.name}: {right:.3f} of {len(rows)} answers right", flush=True)
    records = [head | {k: v for k, v in row.items() if k[0] != "_"} for row in rows]
    return {"records": records, "pools": pools, "model": head | {"sizes": asdict(sizes)}}


def _parallel(cfg: DictConfig, arm: Arm, own: Ground) -> list[dict[str, Any]]:
    keys = [(problem, sample) for problem in range(len(own.problems)) for sample in range(cfg.samples[arm.role])]
    return [
        row | {"sample_id": sample}
        for row, (_, sample) in zip(
            _answers(cfg, arm, own, [(p, own.first[p], stream(p, s, 0)) for p, s in keys]), keys, strict=True
        )
    ]


def _sequential(cfg: DictConfig, arm: Arm, own: Ground) -> list[dict[str, Any]]:
    """sample_id is chain * (rounds + 1) + round."""
    keys = [(problem, one) for problem in range(len(own.problems)) for one in range(cfg.chains)]
    made = 0

    def attempt(last: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
        nonlocal made
        prompts = [own.first[p] if last is None else own.again(p, last[i]["_tokens"]) for i, (p, _) in enumerate(keys)]
        asked = [(p, prompt, stream(p, one, made)) for (p, one), prompt in zip(keys, prompts, strict=True)]
        made += 1
        return _answers(cfg, arm, own, asked)

    rounds = rethink(attempt, cfg.rounds)
    return [
        rounds[r][i] | {"sample_id": one * (cfg.rounds + 1) + r}
        for i, (_, one) in enumerate(keys)
        for r in range(cfg.rounds + 1)
    ]


def _answers(cfg: DictConfig, arm: Arm, own: Ground, asked: list[tuple[int, list[int], int]]) -> list[dict[str, Any]]:
    """A row of each (problem, prompt, stream); `_tokens`, `_text` and `_stopped` are not part of the records."""
    from common.generation.random import name_key

    seed, rows = name_key(f"{cfg.seed} {arm.name}"), []
    for start in range(0, len(asked), cfg.rows):
        part = asked[start : start + cfg.rows]
        out = own.generate(
            [prompt for _, prompt, _ in part], int(cfg.max_new_tokens[arm.task]), do_sample=True,
            temperature=cfg.temperature, top_p=cfg.top_p, seed=seed, streams=[number for *_, number in part],
            stop_tokens=own.ends,
        )  # fmt: skip
        tokens = [ids.tolist() for ids in out.tokens]
        texts = own.decode(tokens)
        shared = {name: getattr(out.ledger, name) / len(part) for name in ("forwards", "flops", "seconds")}
        for (problem, prompt, _), ids, text, stopped in zip(part, tokens, texts, out.stopped, strict=True):
            given = own.problems[problem]
            answer = own.rules.result(given, text) if stopped else None
            rows.append(
                {
                    "problem_id": problem, "difficulty": given.difficulty, "prompt_tokens": len(prompt),
                    "output_tokens": len(ids), "answer": answer,
                    "correct": stopped and own.rules.verify(given, text), "_tokens": ids, "_text": text,
                    "_stopped": stopped,
                }
                | shared
            )  # fmt: skip
    return rows


def _score(cfg: DictConfig, own: Ground, kind: str, rows: list[dict[str, Any]]) -> None:
    """Adds the reward model's score of each finished answer; a truncated one scores 0."""
    from common.generation.steps import State
    from common.models.reward import load_reward_model
    from common.search.score import RewardModel

    model = load_reward_model(Path(cfg.reasoners) / cfg.reward / kind).to(cfg.device)
    scorer = RewardModel(model, own.first)
    for start in range(0, len(rows), cfg.rows):
        part = rows[start : start + cfg.rows]
        states = [State(row["problem_id"], tuple(row["_tokens"]), (len(row["_tokens"]),)) for row in part]
        for row, score in zip(part, scorer(states), strict=True):
            row["score"] = float(score) if row["_stopped"] else 0.0


def _pools(own: Ground, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by_problem: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_problem.setdefault(row["problem_id"], []).append(row)
    steps = own.rules.verify_step
    return [
        {
            "problem_id": problem, "answers": len(of), "distinct": len({tuple(row["_tokens"]) for row in of}),
            "truncated": sum(not row["_stopped"] for row in of), "right": sum(row["correct"] for row in of),
            "lucky": sum(
                bool(row["correct"] and steps and not steps(own.problems[problem], row["_text"])) for row in of
            ),
        }
        for problem, of in by_problem.items()
    ]  # fmt: skip
