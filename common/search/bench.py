"""Particle filtering and beam search of `its_hub` against ours: same models, problems, sampler and forward pass.

its_hub asks a language model for one more step of some texts and a reward model for their scores, problem by problem.
Both of ours stand behind these two interfaces here, in three ways, from its plain use to the most that it allows:

    one by one             `infer` for each problem; every call reads the texts that it is given (they come as text)
    one by one, cached     as before, but texts that continue the latest call's reuse its keys and values
    all at once, cached    `ainfer` runs concurrently for as many problems as one of our batches holds

python -m common.bench common.search.bench    (its_hub: pip install .[peers]; without it the table says so)
"""

from __future__ import annotations

import asyncio
import importlib.util
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.generation.sampler import generate
from common.generation.steps import State, StepSampler
from common.metrics.intervals import paired_bootstrap
from common.metrics.timing import compare
from common.reasoners import policies
from common.search.beam import beam_search
from common.search.particles import particle_filter
from common.search.score import RewardModel
from common.tasks import chain, countdown

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

    from common.tasks.problem import Problem

REASONERS = Path(__file__).resolve().parents[2] / "artifacts" / "cpu" / "reasoners"
TEMPERATURE, N, KEPT = 0.8, 16, 4  # particles or beams a problem; beams that are kept each round
ROWS = 192  # partial answers in one batch, of ours and of its_hub's concurrent way: larger caches cost more to fork
MAX_STEP_TOKENS, MAX_STEPS = 16, 24
PROBLEMS, ROUNDS = 64, 5
WAYS = {"one by one": (False, False), "one by one, cached": (True, False), "all at once, cached": (True, True)}


@dataclass
class Setup:
    """One task's problems, as text and ids, and the models that work on them. models: which these are, in words."""

    task: str
    problems: list[Problem]
    policy: PreTrainedModel
    reward: PreTrainedModel
    models: str
    words: list[str] = field(init=False)  # of each token id
    prompts: list[list[int]] = field(init=False)
    step_ends: list[int] = field(init=False)
    answer_end: int = field(init=False)

    def __post_init__(self) -> None:
        tokenizer = policies.tokenizer()
        self.words = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self.prompts = tokenizer([problem.prompt for problem in self.problems])["input_ids"]
        self.step_ends = [tokenizer.convert_tokens_to_ids(end) for end in policies.STEP_ENDS]
        self.answer_end = tokenizer.convert_tokens_to_ids(policies.ANSWER_END)

    def sampler(self, algorithm: str, seed: int) -> StepSampler:
        return StepSampler(
            self.policy, self.prompts, step_tokens=self.step_ends, end_tokens=[self.answer_end],
            max_step_tokens=MAX_STEP_TOKENS, max_steps=MAX_STEPS, temperature=TEMPERATURE, seed=seed,
            algorithm=algorithm,
        )  # fmt: skip

    def text(self, tokens: Sequence[int]) -> str:
        return "".join(self.words[token] for token in tokens)

    def right(self, texts: Sequence[str]) -> list[bool]:
        verify = policies.VERIFY[self.task]
        return [verify(problem, text) for problem, text in zip(self.problems, texts, strict=True)]


@dataclass
class Run:
    """The chosen answer of each problem, and the tokens that were generated on the way."""

    texts: list[str]
    tokens: int


def chunks(setup: Setup) -> list[range]:
    """The problems of each batch of about ROWS partial answers."""
    count, size = len(setup.problems), max(1, ROWS // N)
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def ours(setup: Setup, algorithm: str, seed: int) -> Run:
    """Batches over problems and partial answers."""
    sampler, score = setup.sampler(algorithm, seed), RewardModel(setup.reward, setup.prompts)
    texts = []
    for problems in chunks(setup):
        if algorithm == "particle filter":
            found = particle_filter(problems, sampler.propose, score, n=N, seed=seed)
        else:
            found = beam_search(problems, sampler.propose, score, n=N, width=N // KEPT)
        texts += [setup.text(best.tokens) if best else "" for best in found.best]
    return Run(texts, sampler.ledger.generated_tokens)


class Models:
    """The sampler and the reward model as its_hub's AbstractLanguageModel and AbstractProcessRewardModel.

    Texts that came from here are known with their tokens, so that none is read by a tokenizer again.
    """

    def __init__(self, setup: Setup, algorithm: str, seed: int, *, cached: bool, together: bool) -> None:
        self.setup, self.cached, self.seed = setup, cached, seed
        self.sampler, self.reward = setup.sampler(algorithm, seed), RewardModel(setup.reward, setup.prompts)
        self.problem = {problem.prompt: i for i, problem in enumerate(setup.problems)}
        self.known: dict[tuple[int, str], State] = {(i, ""): State(i) for i in range(len(setup.problems))}
        self.tokens = 0
        self.continued = _Batch(self._continue) if together else self._continue
        self.scored = _Batch(self._score) if together else self._score

    async def agenerate(self, messages: list[list[Any]], stop: Any = None, **settings: Any) -> list[dict[str, str]]:
        """The next step of each conversation: a question, and the steps of the answer so far if there are any."""
        keys = [(self.problem[m[0].content], m[1].content if len(m) > 1 else "") for m in messages]
        steps = self.continued(keys)
        return [{"role": "assistant", "content": step} for step in (steps if isinstance(steps, list) else await steps)]

    async def ascore(self, prompt: str, steps: list[str]) -> list[float]:
        """Scores of partial answers to one question. its_hub hands over finished ones without their end."""
        problem, ends = self.problem[prompt], policies.STEP_ENDS
        scores = self.scored([(problem, t if t.endswith(ends) else t + policies.ANSWER_END) for t in steps])
        return scores if isinstance(scores, list) else await scores

    def _continue(self, keys: list[tuple[int, str]]) -> list[str]:
        """keys: problem and text; how often a problem stood before in the list names the random stream."""
        seen: dict[int, int] = {}
        samples = []
        for problem, _ in keys:
            samples.append(seen.get(problem, 0))
            seen[problem] = samples[-1] + 1
        states = [self.known[key] for key in keys]
        children = self.sampler.propose(states, samples) if self.cached else self._anew(states, samples)
        texts = []
        for (problem, before), child in zip(keys, children, strict=True):
            texts.append(self.setup.text(child.tokens[len(child.tokens) - child.step_tokens :]))
            self.known[problem, before + texts[-1]] = child
            self.tokens += child.step_tokens
        return texts

    def _anew(self, states: list[State], samples: list[int]) -> list[State]:
        """One more step of each state by the plain sampler, which reads the whole text."""
        places = zip(states, samples, strict=True)
        streams = [(s.problem * N + sample) * MAX_STEPS + len(s.ends) for s, sample in places]
        out = generate(
            self.setup.policy, [[*self.setup.prompts[s.problem], *s.tokens] for s in states], MAX_STEP_TOKENS,
            do_sample=True, temperature=TEMPERATURE, seed=self.seed, streams=streams,
            stop_tokens=[*self.setup.step_ends, self.setup.answer_end],
        )  # fmt: skip
        texts = [(*state.tokens, *new.tolist()) for state, new in zip(states, out.tokens, strict=True)]
        return [replace(s, tokens=t, ends=(*s.ends, len(t))) for s, t in zip(states, texts, strict=True)]

    def _score(self, keys: list[tuple[int, str]]) -> list[float]:
        # A text that no step ends (it met the limit of its step) was kept without the end that `ascore` adds.
        states = [self.known.get(key) or self.known[key[0], key[1].removesuffix(policies.ANSWER_END)] for key in keys]
        return self.reward(states).tolist() if states else []


class _Batch:
    """Collects the calls that coroutines make before all of them wait, and answers them with one call."""

    def __init__(self, call: Callable[[list[Any]], list[Any]]) -> None:
        self.call = call
        self.waiting: list[tuple[list[Any], asyncio.Future[list[Any]]]] = []

    def __call__(self, keys: list[Any]) -> asyncio.Future[list[Any]]:
        loop = asyncio.get_running_loop()
        if not self.waiting:
            loop.call_soon(self._answer)  # runs after every coroutine that is ready now
        self.waiting.append((keys, loop.create_future()))
        return self.waiting[-1][1]

    def _answer(self) -> None:
        calls, self.waiting = self.waiting, []
        answers = iter(self.call([key for keys, _ in calls for key in keys]))
        for keys, future in calls:
            future.set_result([next(answers) for _ in keys])


def its_hub(setup: Setup, algorithm: str, seed: int, way: str) -> Run:
    """All problems by its_hub with the same models; `way`: one of WAYS.

    Equal generations: particles as many as ours. Its beam search keeps `beam_width` beams and divides its budget by
    that, so beam_width=KEPT and budget=N give N steps a round as ours do, N/KEPT from each (but N/KEPT in all in the
    first round). Its filter resamples once more after the last step. It stops one step after max_steps.
    """
    from its_hub.core.algorithms.beam_search import BeamSearch
    from its_hub.core.algorithms.particle_gibbs import ParticleFiltering
    from its_hub.core.lms.step_generation import StepGeneration

    cached, together = WAYS[way]
    models = Models(setup, algorithm, seed, cached=cached, together=together)
    steps = StepGeneration(
        max_steps=MAX_STEPS - 1, step_token=policies.STEP_ENDS[0], stop_token=policies.ANSWER_END,
        temperature=TEMPERATURE, include_stop_str_in_output=True,
    )  # fmt: skip
    if algorithm == "particle filter":
        search: Any = ParticleFiltering(steps, models)
    else:
        search = BeamSearch(steps, models, beam_width=KEPT)
    random.seed(seed)  # its resampling draws from Python's global generator
    prompts = [problem.prompt for problem in setup.problems]
    found: list[dict[str, str]] = []
    if together:

        async def solve(problems: range) -> list[dict[str, str]]:
            return await asyncio.gather(*(search.ainfer(models, prompts[i], N) for i in problems))

        for problems in chunks(setup):
            found += asyncio.run(solve(problems))
    else:
        found = [search.infer(models, prompt, N) for prompt in prompts]
    return Run([answer["content"] + policies.ANSWER_END for answer in found], models.tokens)


def setups(problems: int, reasoners: Path = REASONERS) -> list[Setup]:
    """Chains and countdown with the shared models where they are trained, else with tiny untrained ones."""
    from common.models.hub import load_model
    from common.models.reward import load_reward_model

    made = []
    for task, weights in (("chain", "chain_hard"), ("countdown", "countdown")):
        drawn = (
            chain.generate(7, problems, (12, 16), "test", style="concise", invertible=True)
            if task == "chain"
            else countdown.generate(7, problems, 4, "test")
        )
        base, prm = reasoners / "reasoner_base" / weights, reasoners / "prm" / task
        if (base / "config.json").exists() and (prm / "config.json").exists():
            made.append(Setup(task, drawn, load_model(base), load_reward_model(prm), f"reasoner_base/{weights}, prm"))
        else:
            made.append(Setup(task, drawn, *untrained(), "tiny, untrained"))
    return made


def untrained() -> tuple[PreTrainedModel, PreTrainedModel]:
    """A policy and a reward model of one layer with random weights."""
    from common.models.build import build
    from common.models.reward import reward_model

    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    words = policies.tokenizer()
    end = words.convert_tokens_to_ids(policies.ANSWER_END)
    policy = build(size, vocab_size=len(words), eos_token_id=end, pad_token_id=0, seed=0).eval()
    return policy, reward_model(policy)


def against_its_hub(setup: Setup, algorithm: str, rounds: int) -> pd.DataFrame:
    """One row each of ours and its_hub's three ways: speed (interleaved rounds) and accuracy on the same problems.

    x_ours: how many times as many problems a second ours solves, with the interval over the rounds; x_tokens: tokens a
    second likewise, for where its_hub generates fewer tokens a problem. difference: of the accuracy from ours in
    points, with a paired bootstrap interval over problems.
    """
    import pandas as pd

    runs: dict[str, Run] = {}

    def keep(name: str, run: Callable[[], Run]) -> None:
        runs[name] = run()  # the same every time: all draws have seeds

    functions: dict[str, Callable[[], Any]] = {"ours": partial(keep, "ours", partial(ours, setup, algorithm, 0))}
    for way in WAYS:
        functions[way] = partial(keep, way, partial(its_hub, setup, algorithm, 0, way))
    timings = compare(functions, rounds=rounds)
    own = np.array(setup.right(runs["ours"].texts), dtype=float)
    rows = []
    for name, run in runs.items():
        seconds, ratio = timings.median(name), timings.ratio(name, "ours")
        right = np.array(setup.right(run.texts), dtype=float)
        row: dict[str, Any] = {
            "task": setup.task, "algorithm": algorithm, "library": name if name == "ours" else f"its_hub, {name}",
            "problems_per_s": len(right) / seconds, "tokens_per_s": run.tokens / seconds,
            "tokens_per_problem": run.tokens / len(right), "x_ours": ratio.value, "x_low": ratio.low,
            "x_high": ratio.high, "x_tokens": ratio.value * runs["ours"].tokens / run.tokens,
            "accuracy": 100 * right.mean(),
        }  # fmt: skip
        if name != "ours":
            gap = paired_bootstrap(100 * right, 100 * own)
            row |= {"difference": gap.value, "difference_low": gap.low, "difference_high": gap.high}
        row |= {"contended": sum(timings.contended_rounds[name]) / rounds, "models": setup.models}
        rows.append(row)
    return pd.DataFrame(rows)


def tables() -> dict[str, pd.DataFrame]:
    """For `make bench`."""
    import pandas as pd

    if importlib.util.find_spec("its_hub") is None:
        return {"its hub": pd.DataFrame([{"library": "its_hub", "note": "not installed: pip install .[peers]"}])}
    made = setups(PROBLEMS)
    frames = [against_its_hub(setup, name, ROUNDS) for setup in made for name in ("particle filter", "beam search")]
    return {"its hub": pd.concat(frames, ignore_index=True)}
