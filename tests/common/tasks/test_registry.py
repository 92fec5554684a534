"""One interface for all tasks: the laws that each of them keeps."""

import itertools
import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.tasks import chain, countdown, exprs, multihop
from common.tasks.problem import SPLITS, split_of
from common.tasks.registry import TASKS, task

GENERATED = ("chain", "countdown", "exprs", "multihop")
DRAWS = {
    "chain": lambda draws: chain._draw(draws, draws.randint(4, 16), chain.Style(), "+-*"),
    "countdown": lambda draws: countdown._draw(draws, 5, 0.0),  # of four numbers there are at most 10^4 * 30
    "exprs": lambda draws: exprs._draw(draws, draws.randint(1, 3), 2, ""),
    "multihop": lambda draws: multihop._draw(draws, draws.randint(1, 2), True),
}


@pytest.mark.parametrize("name", GENERATED)
def test_gold_answers_hold_in_every_respect(name):
    own = task(name)
    low, high = own.difficulty
    for problem in own.generate(0, 60, (low + (name in ("chain", "countdown")), high), "test"):
        assert own.verify(problem, problem.answer)
        assert low <= problem.difficulty <= high
        assert own.result(problem, problem.answer) is not None
        steps = own.steps(problem.answer)
        assert "".join(steps) == problem.answer
        assert all(steps)
        if own.verify_step is not None:
            for count in range(1, len(steps) + 1):
                assert own.verify_step(problem, "".join(steps[:count]))


def test_steps_count_what_the_tasks_say():
    problems = task("chain").generate(0, 20, 7, "test", style="concise")
    assert {len(task("chain").steps(p.answer)) for p in problems} == {8}  # seven operations and the result
    assert {len(task("countdown").steps(p.answer)) for p in task("countdown").generate(0, 20, 4, "test")} == {3}
    hops = task("multihop").generate(0, 20, 2, "test")
    assert {len(task("multihop").steps(p.answer)) for p in hops} == {3}  # two quotations and the answer


@pytest.mark.parametrize("name", GENERATED)
def test_canonical_answers_agree_where_answers_do(name):
    own = task(name)
    problems = own.generate(1, 40, own.difficulty, "test")
    for problem, other in itertools.pairwise(problems):
        if own.result(problem, other.answer) == own.result(problem, problem.answer):
            assert own.verify(problem, other.answer)
    assert own.result(problems[0], "") is None


@pytest.mark.parametrize("name", GENERATED)
def test_splits_never_overlap_whatever_the_seeds(name):
    own = task(name)
    assert set(own.splits) == set(SPLITS)
    prompts = {
        split: {p.prompt for seed in range(5) for p in own.generate(seed, 150, own.difficulty[1], split)}
        for split in own.splits
    }
    for a, b in itertools.combinations(own.splits, 2):
        assert not prompts[a] & prompts[b]
    assert all(split_of(prompt) == split for split, group in prompts.items() for prompt in group)


@pytest.mark.parametrize("name", GENERATED)
def test_there_are_more_than_a_million_problems(name):
    """n draws agree in at least n(n-1)/2N pairs on average if there are N problems, whatever their chances; so much
    fewer (by four standard errors) means more than N."""
    n, many = 20_000, 1_000_000
    source = random.Random(name)
    seen: dict[str, int] = {}
    for _ in range(n):
        prompt = DRAWS[name](source).prompt
        seen[prompt] = seen.get(prompt, 0) + 1
    pairs = sum(count * (count - 1) // 2 for count in seen.values())
    expected = n * (n - 1) / 2 / many
    assert pairs < expected - 4 * expected**0.5


def test_chains_by_counting():
    """A prompt spells out its start and every operation, so there are 10 * 27^steps; all 270 of one step are drawn."""
    drawn = {chain._draw(random.Random(i), 1, None, "+-*").prompt for i in range(6000)}
    assert len(drawn) == 10 * 27
    assert 10 * 27**4 > 1_000_000


@given(st.text(alphabet="0123456789+-*=,:;$#?~x .\nABC", max_size=60))
@settings(max_examples=150, deadline=None)
def test_steps_lose_nothing_of_any_text(text):
    for name in TASKS:
        assert "".join(task(name).steps(text)) == text


@pytest.mark.parametrize("name", GENERATED)
def test_any_text_is_judged_without_an_error(name):
    own = task(name)
    problem = own.generate(0, 1, own.difficulty[1], "test")[0]
    for text in ("", ",", "$", "=", ",,$", "x" * 500, "\x00", "√¼", "+1=,$", "8 9 6>5=$"):
        assert own.verify(problem, text) is False
        own.result(problem, text)


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown task 'chains'; known: chain, countdown, exprs, multihop, gsm8k"):
        task("chains")


def test_the_registry_imports_no_task_by_itself():
    import subprocess

    code = (
        "import sys, common.tasks.registry; print([m for m in sys.modules if m.startswith(('common.tasks.', 'numpy'))])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['common.tasks.problem', 'common.tasks.registry']"
