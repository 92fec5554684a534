"""Labelled chains in every style, and countdown: right answers, right steps, disjoint splits, frozen samples."""

import hashlib
import itertools
import re
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.tasks import chain, countdown
from common.tasks.problem import SPLITS

FROZEN = {
    "astray": "96639724e266",
    "invertible": "d9ee3eb6c033",
    "concise": "cd3722398c06",
    "stride2": "afbd9513f5fe",
    "stride3": "a889ecfd68b9",
    "verified": "f08edc722e8e",
    "corrected": "3e93c6280275",
    "padded": "cdc432bc3008",
    "direct": "66848dc6f233",
    "mixed": "f7dcaf126309",
    "countdown": "453cda772b32",
    "backtrack": "b278c4915720",
}


@pytest.mark.parametrize("style", chain.STYLES)
def test_labelled_answers_are_right_step_by_step(style):
    for problem in chain.generate(0, 300, (1, 16), "test", style=style):
        assert chain.verify(problem, problem.answer)
        ends = [i + 1 for i, c in enumerate(problem.answer) if c in ",$"]
        assert all(chain.verify_step(problem, problem.answer[:end]) for end in ends)
        assert chain.result_of(problem.answer) == problem.result


def test_a_wrong_value_is_noticed_from_its_step_on():
    for problem in chain.generate(1, 100, (3, 8), style="concise"):
        segments = problem.answer.split(",")
        wrong = segments[1][:-1] + str((int(segments[1][-1]) + 1) % 10)
        text = ",".join([segments[0], wrong, *segments[2:]])
        assert chain.verify_step(problem, segments[0] + ",")
        assert not chain.verify_step(problem, f"{segments[0]},{wrong},")
        assert not chain.verify_step(problem, text)
        skipped = ",".join(segments[1:])
        assert not chain.verify_step(problem, skipped)


def test_styles_differ_in_length_as_they_say():
    def mean_length(style):
        return sum(len(p.answer) for p in chain.generate(2, 300, 8, style=style)) / 300

    lengths = {style: mean_length(style) for style in chain.STYLES}
    assert lengths["direct"] < lengths["stride3"] < lengths["stride2"] < lengths["concise"]
    assert lengths["concise"] < lengths["corrected"] < lengths["padded"] < lengths["verified"]


def test_operators_are_drawn_from_what_is_asked():
    heavy = chain.generate(0, 200, 6, operators="***+")
    share = sum(p.prompt.count("*") for p in heavy) / (200 * 6)
    assert abs(share - 0.75) < 4 * (0.75 * 0.25 / 1200) ** 0.5


def test_a_recheck_ends_every_trace():
    style = chain.Style(wrong=0.25, recheck=True)
    for problem in chain.generate(0, 200, (2, 8), style=style):
        assert re.search(rf"=\d\?={problem.result},#{problem.result}\$$", problem.answer)
        assert chain.verify_step(problem, problem.answer)


def test_a_wrong_value_stays_wrong_where_steps_are_invertible():
    for problem in chain.generate(0, 300, (12, 16), style="concise", invertible=True):
        operations = re.findall(r"([+*-])(\d)", problem.prompt)
        ends = set()
        for start in range(10):
            value = start
            for operator, operand in operations:
                value = chain.apply(value, operator, int(operand))
            ends.add(value)
        assert len(ends) == 10


def test_astray_answers_are_valid_and_miss_the_target():
    problems = countdown.generate(0, 1000, (3, 4), astray=0.25)
    missed = [problem for problem in problems if not countdown.verify(problem, problem.answer)]
    assert abs(len(missed) - 250) < 4 * (1000 * 0.25 * 0.75) ** 0.5
    for problem in missed:
        assert countdown.hand_after(problem, problem.answer) not in (None, [int(problem.result)])
        assert countdown.verify_step(problem, "")  # solvable all the same


@pytest.mark.parametrize("backtrack", [0.0, 0.4])
def test_countdown_answers_are_right_step_by_step(backtrack):
    for problem in countdown.generate(0, 300, (2, 5), "test", backtrack=backtrack):
        assert countdown.verify(problem, problem.answer)
        used = [int(x) for x in problem.prompt.partition(">")[0].split()]
        assert len(used) == problem.difficulty
        if not backtrack:
            ends = [i + 1 for i, c in enumerate(problem.answer) if c in ",$"]
            assert len(ends) == problem.difficulty - 1
            assert all(countdown.verify_step(problem, problem.answer[:end]) for end in ends)


def test_a_random_walk_finds_the_target_that_often():
    """By walking 4,000 times."""
    random = Random(0)
    problem = countdown.generate(3, 1, 4, "test")[0]
    numbers = [int(x) for x in problem.prompt.partition(">")[0].split()]
    hits = 0
    for _ in range(4000):
        hand = sorted(numbers)
        while len(hand) > 1 and (options := list(countdown.moves(hand))):
            hand = random.choice(options)[-1]
        hits += hand == [int(problem.result)]
    chance = countdown.random_walk(tuple(sorted(numbers)), int(problem.result))
    assert 0 < chance < 1
    assert abs(hits / 4000 - chance) < 4 * (chance * (1 - chance) / 4000) ** 0.5
    assert countdown.random_walk((2, 2), 4) == 0.5  # 2+2 and 2*2 of these two, 2-2 and 2/2


def test_countdown_refuses_every_kind_of_wrong_answer():
    problem = countdown.Problem("countdown", "test", "8 9 6>5=", "", "5", 3)
    assert countdown.verify(problem, "9-6=3:8 3,8-3=5:5$")
    for text in (
        "9-6=3:8 3,8-3=5:5",  # not finished
        "9-6=4:8 4,8-4=4:4$",  # wrong value
        "9-6=3:8 3,8+3=11:11$",  # misses the target
        "9-6=3:8 2,8-2=6:6$",  # wrong numbers at hand
        "9-7=2:8 2,8-2=6:6$",  # a number that is not there
        "8-3=5:5$",  # the 3 from nowhere
        "9-6=3:8 3$",  # numbers left over
        "x,9-6=3:8 3,8-3=5:5$",  # nothing to take back
        "6-9=3:8 3,8-3=5:5$",  # negative
        "5$",
    ):
        assert not countdown.verify(problem, text), text
    assert countdown.verify(problem, "9+6=15:8 15,x,9-6=3:8 3,8-3=5:5$")
    assert countdown.result_of("9+6=15:8 15,x,9-6=3:8 3,8-3=5:5$") == "9-6=3,8-3=5"
    assert not countdown.verify_step(problem, "9+6=15:8 15,")  # valid, but 5 cannot be reached from 8 and 15
    assert countdown.hand_after(problem, "9+6=15:8 15,") == [8, 15]


@given(st.lists(st.integers(1, 6), min_size=2, max_size=3), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_reachable_by_evaluating_every_expression(numbers, target):
    """Against all expressions over all orders and both shapes, with the rules of `apply` at each operation."""

    def values(items):
        if len(items) == 1:
            return {items[0]}
        found = set()
        for left in range(1, len(items)):
            for a, b in itertools.product(values(items[:left]), values(items[left:])):
                found |= {v for op in "+-*/" if (v := countdown.apply(max(a, b), op, min(a, b))) is not None}
        return found

    expected = any(target in values(list(order)) for order in itertools.permutations(numbers))
    assert countdown.reachable(tuple(sorted(numbers)), target) == expected


@pytest.mark.parametrize(
    "generate",
    [
        lambda seed, n, split: chain.generate(seed, n, (2, 8), split, style="mixed"),
        lambda seed, n, split: countdown.generate(seed, n, (3, 4), split),
    ],
)
def test_splits_never_overlap(generate):
    prompts = {split: {p.prompt for seed in range(4) for p in generate(seed, 200, split)} for split in SPLITS}
    for a, b in itertools.combinations(SPLITS, 2):
        assert not prompts[a] & prompts[b]


def test_frozen_samples():
    """A change of a generator changes every number made from it: it must be noticed and meant."""
    samples = {style: chain.generate(0, 50, (2, 12), "test", style=style) for style in chain.STYLES}
    samples["countdown"] = countdown.generate(0, 50, (3, 4), "test")
    samples["backtrack"] = countdown.generate(0, 50, (3, 4), "test", backtrack=0.3)
    samples["astray"] = countdown.generate(0, 50, (3, 4), "test", astray=0.3)
    samples["invertible"] = chain.generate(0, 50, (2, 12), "test", invertible=True)
    assert {name: hashlib.sha256(repr(s).encode()).hexdigest()[:12] for name, s in samples.items()} == FROZEN


def test_there_are_many_problems():
    """At least a million: no two of 3000 draws agree more often than that allows (birthday bound)."""
    draws = [countdown._draw(countdown.Random(i), 5, 0.0).prompt for i in range(3000)]
    assert 3000 - len(set(draws)) < 20
    assert re.fullmatch(r"\d+( \d+){4}>\d+=", draws[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: chain.generate(0, 1, 2, style="terse"), "unknown style 'terse'; known: concise, stride2"),
        (lambda: chain.Style(strides=(0.5, 0.2, 0.2)), r"must sum to 1, not 0\.9"),
        (lambda: chain.Style(verify=1.5), r"verify must be shares in \[0, 1\], not 1\.5"),
        (lambda: chain.generate(0, 1, 2, operators="+/"), r"drawn from '\+-\*', not '\+/'"),
        (lambda: countdown.generate(0, 1, 6), r"2\.\.5, not 6"),
        (lambda: countdown.generate(0, 1, 3, backtrack=-0.1), r"backtrack is a share in \[0, 1\], not -0\.1"),
        (lambda: countdown.generate(0, 1, 3, astray=2), r"astray is a share in \[0, 1\], not 2"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
