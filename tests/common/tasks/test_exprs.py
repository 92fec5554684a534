"""The function-writing task: right answers, real false positives, and an evaluator that hostile text cannot misuse."""

import hashlib
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.tasks import exprs

X, Y = exprs.DOMAIN.T


@pytest.mark.parametrize("style", exprs.STYLES)
def test_gold_answers_verify_and_keep_the_style(style):
    problems = exprs.generate(0, 300, split="test", style=style)
    assert len({problem.prompt for problem in problems}) == 300
    for problem in problems:
        assert exprs.verify(problem, problem.answer)
        assert not exprs.verify(problem, problem.result)  # not finished
        if style:
            assert exprs.constants_stand(problem.answer, style) is not False


def test_examples_in_the_prompt_are_true():
    for problem in exprs.generate(1, 100, examples=3):
        for part in problem.prompt.split(";")[1:]:
            left, right = part.replace("minus ", "-").replace(" f ", "").split("=")
            x, y = map(int, left.split())
            value = int(right.replace(":", ""))
            row = int(np.flatnonzero((x == X) & (y == Y))[0])
            assert exprs.evaluate(problem.result)[row] == value


def test_the_words_say_what_the_code_does():
    by_words = {
        "x plus twice y minus 5 but at least 2": lambda x, y: max(x + 2 * y - 5, 2),
        "thrice y minus x plus 4": lambda x, y: 3 * y - x + 4,
    }
    found = 0
    for problem in exprs.generate(0, 4000, split="test", examples=0) + exprs.generate(0, 4000, examples=0):
        words = problem.prompt.removesuffix(" : ").strip()
        if words in by_words:
            found += 1
            expected = [by_words[words](int(x), int(y)) for x, y in exprs.DOMAIN]
            assert exprs.evaluate(problem.result).tolist() == expected
    assert found >= 1


terms = st.deferred(
    lambda: st.one_of(
        st.integers(0, 9).map(str),
        st.sampled_from(["x", "y"]),
        st.tuples(terms, st.sampled_from("+-*"), terms).map(lambda t: f"({t[0]}{t[1]}{t[2]})"),
        st.tuples(st.sampled_from(["max", "min"]), terms, terms).map(lambda t: f"{t[0]}({t[1]},{t[2]})"),
        st.tuples(terms, terms, st.sampled_from([">", "<", ">=", "<=", "=="]), terms, terms).map(
            lambda t: f"({t[0]} if {t[1]}{t[2]}{t[3]} else {t[4]})"
        ),
        terms.map(lambda t: f"(-{t})"),
    )
)


@given(terms)
@settings(max_examples=200, deadline=None)
def test_evaluator_agrees_with_python(text):
    """On what it accepts; Python's own eval serves as the reference for text that this test made."""
    table = exprs._table(text)
    if isinstance(table, str):
        assert "a value beyond" in table or "more than 60 nodes" in table or "at most 120 are read" in table
        return
    code = compile(text, "", "eval")
    for i in range(0, len(exprs.DOMAIN), 17):
        assert table[i] == eval(code, {"max": max, "min": min, "x": int(X[i]), "y": int(Y[i])})


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "x.__class__", "().__class__.__bases__", "open('/etc/passwd')", "exec('1')",
        "[i for i in range(10**9)]", "{x: y}", "(lambda: x)()", "f'{x}'", "x if y else x", "max(x)", "max(x,y,x)",
        "max(x,y,key=abs)", "9**9**9", "x<<99", "x//0", "x%0", "x and y", "not x", "z", "True", "1.5", "'a'*999",
        "x if x>y>x else y", "(x:=1)", "*x", "...", "x;y", "import os", "", " ", "x=1", "\x00", "1_0 if", "yield",
    ],
)  # fmt: skip
def test_hostile_and_malformed_text_is_refused(text):
    with pytest.raises(exprs.InvalidExpression):
        exprs.evaluate(text)
    problem = exprs.generate(0, 1)[0]
    assert not exprs.verify(problem, text + "$")
    assert exprs.behaviour(text + "$") is None


@pytest.mark.parametrize(
    "text",
    [
        "(" * 5000 + "x" + ")" * 5000,
        "-" * 4000 + "x",
        "x+" * 3000 + "x",
        "9" * 5000,
        "max(" * 40 + "x",
        "99999*99999*99999",
    ],
)
def test_bombs_are_refused_at_once(text):
    start = time.perf_counter()
    with pytest.raises(exprs.InvalidExpression):
        exprs.evaluate(text)
    assert time.perf_counter() - start < 0.5


def test_limited_tests_have_real_false_positives():
    problem = exprs.Problem("exprs", "test", "", "x+2*y$", "x+2*y", 1)
    wrong = "3*x$"  # right wherever x = y
    equal = np.flatnonzero(X == Y)
    assert exprs.passes(problem, wrong, equal)
    assert not exprs.verify(problem, wrong)
    assert exprs.behaviour("2*y+x$") == exprs.behaviour("x+2*y$") != exprs.behaviour(wrong)
    few = exprs.base_inputs(3, 0)
    assert len(set(few.tolist())) == 3
    assert all((abs(X[i]) <= 1 and abs(Y[i]) <= 1) or X[i] == Y[i] for i in few)


@pytest.mark.parametrize(
    ("text", "where", "answer"),
    [
        ("-5+x+2*y$", "first", True), ("x+2*y-5$", "first", False), ("x+2*y-5$", "last", True),
        ("x+2*y$", "last", None),
        ("max(x+2*y-5,3-y)$", "last", False), ("max(x-5,y-3)$", "last", True), ("(x-1 if x>y else y-2)$", "last", True),
        ("max(2*x,4)$", "first", None), ("x+$", "last", None),
    ],
)  # fmt: skip
def test_where_constants_stand(text, where, answer):
    assert exprs.constants_stand(text, where) is answer


def test_frozen_sample():
    digest = hashlib.sha256(repr(exprs.generate(0, 50, split="test")).encode()).hexdigest()[:12]
    assert digest == "455cfd16d742"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exprs.generate(0, 1, 4), r"1\.\.3, not 4"),
        (lambda: exprs.generate(0, 1, style="middle"), "unknown style 'middle'"),
        (lambda: exprs.generate(0, 1, examples=9), r"0\.\.4, not 9"),
        (lambda: exprs.base_inputs(0, 0), "base tests number 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
