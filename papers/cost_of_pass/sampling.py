"""What the models are asked: n runs of every problem, their reviews, votes' fresh runs, and a reward model's readings.

A row of records is a run; a row of calls is one call of a model within it, with its tokens, so that any price can be
put on it later and a run costs the sum of its calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from papers.cost_of_pass import tasks, zoo
from papers.cost_of_pass.tasks import Item

if TYPE_CHECKING:
    import pandas as pd
    from omegaconf import DictConfig

    from common.generation.sampler import Generation
    from common.tasks.problem import Problem

JUDGE = "prm"  # the reward model's name among the models of the calls
CALL = ["arm", "task", "problem_id", "sample_id", "model", "prompt_tokens", "output_tokens"]


@dataclass(frozen=True)
class Speaker:
    """A model with all that it takes to ask it about one task.

    generate: common.generation.sampler.generate without its first argument. read, write: text -> ids and back. ends:
    tokens that end an answer. limit: most new tokens. result, verify: of a problem and a text.
    """

    generate: Callable[..., Generation]
    read: Callable[[list[str]], list[list[int]]]
    write: Callable[[list[list[int]]], list[str]]
    ends: tuple[int, ...]
    limit: int
    result: Callable[[Problem, str], str | None]
    verify: Callable[[Problem, str], bool]


@dataclass
class Asked:
    """Rows for records and calls, and the tokens of every answer: tokens[item][run][part]."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[list[list[list[int]]]] = field(default_factory=list)


def ask(
    cfg: DictConfig,
    speaker: Speaker,
    items: Sequence[Item],
    runs: int,
    *,
    arm: str,
    task: str,
    model: str,
    prompts: list[list[list[list[int]]]] | None = None,
) -> Asked:
    """All items, `runs` times each; every part in a call of its own. arm names the random streams too: a draw is a
    function of the seed, arm, task, problem, run, part and position.

    prompts: token ids [item][run][part] in the place of the problems' own (a review's).
    """
    import numpy as np

    from common.generation.random import keys, name_key

    places = [(i, r, k) for i, item in enumerate(items) for r in range(runs) for k in range(len(item.parts))]
    own = [speaker.read([part.prompt for part in item.parts]) for item in items]
    texts = [own[i][k] if prompts is None else prompts[i][r][k] for i, r, k in places]
    streams = keys(name_key(f"{arm}/{task}"), *np.array(places).T).tolist()
    answers: list[list[int]] = [[] for _ in places]
    forwards, flops, seconds = (np.zeros(len(places)) for _ in range(3))
    order = sorted(range(len(places)), key=lambda n: len(texts[n]))
    for start in range(0, len(order), cfg.rows):
        chunk = order[start : start + cfg.rows]
        out = speaker.generate(
            [texts[n] for n in chunk], speaker.limit, do_sample=True, temperature=cfg.temperature, seed=cfg.seed,
            streams=[streams[n] for n in chunk], stop_tokens=list(speaker.ends),
        )  # fmt: skip
        for n, tokens in zip(chunk, out.tokens, strict=True):
            answers[n] = tokens.tolist()
        for cost, total in ((forwards, out.ledger.forwards), (flops, out.ledger.flops), (seconds, out.ledger.seconds)):
            cost[chunk] = total / len(chunk)
    written, found = speaker.write(answers), Asked()
    at = 0
    for i, item in enumerate(items):
        found.tokens.append([])
        for r in range(runs):
            mine = range(at, at + len(item.parts))
            at = mine.stop
            found.tokens[-1].append([answers[n] for n in mine])
            head = {"arm": arm, "task": task, "problem_id": i, "sample_id": r}
            costs = [{"prompt_tokens": len(texts[n]), "output_tokens": len(answers[n])} for n in mine]
            found.calls += [head | {"model": model} | cost for cost in costs]
            results = [speaker.result(part, written[n]) for part, n in zip(item.parts, mine, strict=True)]
            found.rows.append(
                head | {key: sum(cost[key] for cost in costs) for key in ("prompt_tokens", "output_tokens")} | {
                    "difficulty": item.difficulty, "discarded_tokens": 0,
                    "forwards": float(forwards[mine].sum()), "flops": float(flops[mine].sum()),
                    "seconds": float(seconds[mine].sum()),
                    "answer": None if None in results else "|".join(str(x) for x in results),
                    "correct": all(speaker.verify(p, written[n]) for p, n in zip(item.parts, mine, strict=True)),
                }
            )  # fmt: skip
    return found


def refine(cfg: DictConfig, speaker: Speaker, items: Sequence[Item], first: Asked, review: tuple[int, int]) -> Asked:
    """One more call for every run: the model reads its answer and writes another, which counts. Costs are of both
    calls. review: ids of END and of the mark that asks for a review. Arm '<arm>, self-refine'."""
    end, mark = review
    head = {key: first.rows[0][key] for key in ("arm", "task")}
    own = [speaker.read([part.prompt for part in item.parts]) for item in items]
    prompts = [
        [[zoo.review_prompt(p, a, end, mark) for p, a in zip(own[i], run, strict=True)] for run in runs]
        for i, runs in enumerate(first.tokens)
    ]
    arm = f"{head['arm']}, self-refine"
    again = ask(
        cfg, speaker, items, len(first.tokens[0]), arm=arm, task=head["task"], model=head["arm"], prompts=prompts
    )
    for row, before in zip(again.rows, first.rows, strict=True):
        for key in ("prompt_tokens", "output_tokens", "forwards", "flops", "seconds"):
            row[key] += before[key]
        row["discarded_tokens"] = before["output_tokens"]
        row["output_tokens"] -= before["output_tokens"]
    again.calls += [call | {"arm": arm} for call in first.calls]
    return again


def judged(cfg: DictConfig, speaker: Speaker, items: Sequence[Item], first: Asked) -> Asked:
    """The reward model's score of every run of a task with single-part items: written to the rows of `first`; returns
    its calls, which read prompt and answer (arm '<arm>, judge')."""
    from common.generation.steps import State
    from common.models.reward import load_reward_model
    from common.search.score import RewardModel

    task = first.rows[0]["task"]
    model = load_reward_model(Path(cfg.reasoners) / "prm" / task).to(cfg.device)
    prompts = [speaker.read([item.parts[0].prompt])[0] for item in items]
    states = [
        State(i, tuple(run[0]), (len(run[0]),), True) for i, runs in enumerate(first.tokens) for run in runs
    ]  # fmt: skip
    scores: list[float] = []
    for start in range(0, len(states), cfg.rows):
        scores += RewardModel(model, prompts)(states[start : start + cfg.rows]).tolist()
    found = Asked()
    for row, state, score in zip(first.rows, states, scores, strict=True):
        row["score"] = score
        read = len(prompts[state.problem]) + len(state.tokens)
        place = {key: row[key] for key in ("task", "problem_id", "sample_id")}
        call = {"arm": f"{row['arm']}, judge", "model": JUDGE, "prompt_tokens": read, "output_tokens": 0}
        found.calls.append(place | call)
    return found


def own_speaker(cfg: DictConfig, generate: Callable[..., Generation], style: str, task: str) -> Speaker:
    """A model in the vocabulary of the reasoners."""
    from common.reasoners import policies

    words = policies.tokenizer()
    return Speaker(
        generate, lambda texts: words(texts)["input_ids"], words.batch_decode,
        (words.convert_tokens_to_ids(tasks.END),), tasks.LIMITS[style][task],
        lambda problem, text: tasks.result_of(problem, text, style),
        lambda problem, text: tasks.verify(problem, text, style),
    )  # fmt: skip


def hub_speaker(
    cfg: DictConfig, generate: Callable[..., Generation], origin: str | Path, task: str, count: int
) -> tuple[Speaker, list[Item]]:
    """A checkpoint of the hub on a benchmark, with the problems in its chat format."""
    from omegaconf import OmegaConf

    from common.rl.ground import ground

    of = OmegaConf.create({"start": str(origin), "task": {"name": task, "train": None, "told": cfg.hub.told}})
    on = ground(cfg, of)

    def write(answers: list[list[int]]) -> list[str]:
        return list(on.words.batch_decode(answers, skip_special_tokens=True))

    speaker = Speaker(
        generate, lambda texts: [on.tokens(text) for text in texts], write, on.ends, cfg.hub.max_new_tokens,
        on.result, on.verify,
    )  # fmt: skip
    return speaker, [Item((problem,)) for problem in on.problems(cfg.seed, "test", count)]


def run_entry(job: tuple[DictConfig, DictConfig]) -> dict[str, pd.DataFrame]:
    """All that one release of the zoo is asked: {'records', 'calls'}."""
    import pandas as pd

    from common.generation import records
    from common.generation.vllm import backend
    from common.reasoners import policies

    cfg, entry = job
    origin, hub = zoo.weights(cfg, entry), str(entry.weights).startswith("hub:")
    generate = backend(cfg.backend, origin, device=cfg.device, **_precision(cfg) if hub else {})
    words = policies.tokenizer()
    review = tuple(words.convert_tokens_to_ids(token) for token in (tasks.END, zoo.REVIEW))
    rows: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for of in cfg.tasks:
        if entry.tasks is not None and of.name not in entry.tasks:
            continue  # never trained on it
        if hub:
            speaker, problems = hub_speaker(cfg, generate, origin, of.name, of.problems)
        else:
            speaker = own_speaker(cfg, generate, entry.style, of.name)
            problems = tasks.items(of.name, cfg.seed, of.problems, "test", cfg.facts)
        first = ask(cfg, speaker, problems, cfg.runs, arm=entry.name, task=of.name, model=entry.name)
        parts = [first]
        if "refine" in entry.techniques:
            parts.append(refine(cfg, speaker, problems, first, review))
        if "fresh" in entry.techniques:
            count = max(cfg.votes) * cfg.runs
            parts.append(ask(cfg, speaker, problems, count, arm=f"{entry.name}, fresh", task=of.name, model=entry.name))
        if "judge" in entry.techniques and of.name == cfg.judge.task:
            parts.append(judged(cfg, speaker, problems, first))
        rows += [row for part in parts for row in part.rows]
        calls += [call for part in parts for call in part.calls]
        right = sum(row["correct"] for row in first.rows) / len(first.rows)
        print(f"{entry.name} {of.name}: {right:.3f} of the runs right", flush=True)
    frame = records.frame(rows, paper=cfg.slug, profile=cfg.profile, seed=cfg.seed)
    return {"records": frame, "calls": pd.DataFrame(calls, columns=CALL)}


def _precision(cfg: DictConfig) -> dict[str, Any]:
    import torch

    dtype = torch.bfloat16 if str(cfg.device).startswith("cuda") else torch.float32
    return {"dtype": dtype, "network": cfg.network}
