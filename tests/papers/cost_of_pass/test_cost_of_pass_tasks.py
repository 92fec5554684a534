"""The five tasks: gold answers are right in both styles, guesses have their exact chance, questions do not leak."""

import numpy as np
import pytest

from common.reasoners import policies
from common.tasks import countdown
from papers.cost_of_pass import tasks

NAMES = list(tasks.GENERATORS)


def items(name, count=24, split="test", seed=0):
    return tasks.items(name, seed, count, split, 40)


@pytest.mark.parametrize("style", [tasks.DIRECT, tasks.STEPS])
@pytest.mark.parametrize("name", NAMES)
def test_gold_answers_are_right_finished_and_within_the_limit(name, style):
    words = policies.tokenizer()
    for item in items(name):
        for part in item.parts:
            text = tasks.gold(part, style)
            ids = words(text)["input_ids"]
            assert words.unk_token_id not in [*ids, *words(part.prompt)["input_ids"]]
            assert len(ids) <= tasks.LIMITS[style][name]
            assert words.decode(ids) == text
            assert tasks.verify(part, text, style)
            assert tasks.result_of(part, text, style) is not None
            assert not tasks.verify(part, text.removesuffix("$"), style)
            assert tasks.result_of(part, text.removesuffix("$"), style) is None


@pytest.mark.parametrize("name", ["add2", "table1", "kb1"])
def test_other_answers_are_wrong(name):
    first, *rest = [item.parts[0] for item in items(name)]
    for other in rest:
        for style in (tasks.DIRECT, tasks.STEPS):
            right = other.result == first.result
            assert tasks.verify(first, tasks.gold(other, style), style) is right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("9-6,8-3$", True), ("8-6,9-2$", False), ("9-6,9-3$", False), ("6-9,8-3$", False), ("9-6$", False),
        ("9-6,8-3", False), ("$", False), ("nine$", False), ("9-6,8-3,5-5$", False),
    ],
)  # fmt: skip
def test_operations_without_values_are_carried_out(text, right):
    problem = countdown.Problem("countdown", "test", "8 9 6>5=", "9-6=3:8 3,8-3=5:5$", "5", 3)
    assert tasks.verify(problem, text, tasks.DIRECT) is right


def test_traces_of_sums_add_digit_by_digit():
    for item in items("add2"):
        (part,) = item.parts
        ones, tens, _ = part.answer.split(",")
        (a0, b0), (a1, b1) = (map(int, column.split("+")) for column in part.prompt.removesuffix("=").split())
        a, b = 10 * a1 + a0, 10 * b1 + b0
        assert part.result == str(a + b)
        assert part.answer.endswith(f"#{' '.join(reversed(part.result))}$")
        assert eval(ones.split("=")[0]) == int(ones.split("=")[1]) == a % 10 + b % 10
        assert eval(tens.split("=")[0]) == int(tens.split("=")[1])
        assert 10 * int(tens.split("=")[1]) + (a + b) % 10 == a + b


def test_long_chains_come_in_threes_and_all_problems_differ():
    for name in NAMES:
        found = items(name)
        assert {len(item.parts) for item in found} == {3 if name == "chain8" else 1}
        prompts = [part.prompt for item in found for part in item.parts]
        assert len(set(prompts)) == len(prompts)
        assert found == items(name)
        if name not in ("kb1", "table1"):
            train = {part.prompt for item in items(name, split="train") for part in item.parts}
            assert not train & set(prompts)


def test_the_tables_are_whole():
    assert len({part.prompt for part in tasks.tables()}) == 270
    assert len(items("table1", 270)) == 270


def test_questions_are_about_the_facts_of_training():
    known = {part.prompt: part.result for part in tasks.knowledge(0, 40)}
    assert len(known) == 40
    assert all(known[item.parts[0].prompt] == item.parts[0].result for item in items("kb1"))


def test_the_chance_of_a_guess():
    chances = {name: [tasks.chance_of_a_guess(item) for item in items(name, 4)] for name in NAMES}
    assert chances["table1"] == pytest.approx([0.1] * 4)
    assert chances["chain8"] == pytest.approx([1e-3] * 4)
    assert chances["kb1"] == pytest.approx([0.01] * 4)
    random = np.random.default_rng(0)
    for item, chance in zip(items("countdown", 4), chances["countdown"], strict=True):
        problem, hits = item.parts[0], 0
        for _ in range(4000):  # literal random walks
            hand = [int(x) for x in problem.prompt.partition(">")[0].split()]
            while len(hand) > 1 and (options := list(countdown.moves(hand))):
                hand = options[random.integers(len(options))][-1]
            hits += hand == [int(problem.result)]
        assert abs(hits / 4000 - chance) < 4 * np.sqrt(max(chance, 1e-3) / 4000)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: items("sata"), "unknown task 'sata'; known: add2, table1, kb1, chain8, countdown"),
        (lambda: items("kb1", 41), "41 questions about 40 facts"),
        (lambda: tasks.knowledge(0, 2001), "1 to 2000 facts, not 2001"),
        (lambda: tasks.additions(0, 3000, "test"), "different problems"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
