"""GSM8K, MATH-500 and HumanEval: answers are read and compared rightly; with the data, their known numbers come out."""

import gzip
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from common.data.sources import MissingSource, locate
from common.tasks import answers, gsm8k, humaneval, math500
from common.tasks.benchmark import choose
from common.tasks.problem import Problem
from common.tasks.registry import task
from common.tasks.sandbox import CodeExecutionNotAllowed


def available(*names):
    """Skips a test, with the reason, where a source file is not on this machine; its checksum is verified."""
    try:
        return [locate(name) for name in names]
    except MissingSource as error:
        pytest.skip(str(error))


# Reading answers


@pytest.mark.parametrize(
    ("text", "result"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"), (r"\boxed{1} or rather \boxed{ 2 }", "2"), (r"\fbox{3}", "3"),
        (r"\boxed{\left\{ x \mid x>0 \right\}}", r"\left\{ x \mid x>0 \right\}"), (r"\boxed{1 never closed", None),
        (r"\boxed{4} and \boxed{5 never closed", "4"), ("no box", None), ("", None),
    ],
)  # fmt: skip
def test_the_last_closed_box_counts(text, result):
    assert answers.boxed(text) == result


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("3 + 4 = 7\n#### 7", "7"), ("first 5\nA: 1,234 eggs, not 9", "1234"), ("The answer is $18.00.", "18.00"),
        ("She has 3, he has 4", "4"), ("#### -5", "-5"), ("A: -$5", "-5"), (r"thus \boxed{\$42} of 50", "42"),
        ("#### 3/4", "3/4"), ("#### none", None), ("", None), ("#### 1\n#### 2", "2"), ("Answer: .5", ".5"),
    ],
)  # fmt: skip
def test_gsm8k_reads_the_result(text, result):
    assert gsm8k.result_of(text) == result


@pytest.mark.parametrize(
    ("text", "result"),
    [
        (r"So \boxed{p - q}.", "p - q"), ("The answer is $\\frac12$.", "$\\frac12$"), ("x = 3", None),
        ("The answer is 3.5. Done.", "3.5"),
    ],
)  # fmt: skip
def test_math500_reads_the_result(text, result):
    assert math500.result_of(text) == result


# Comparing answers

SAME = [
    ("18", "18.00"), ("1234", "1,234"), (r"\frac{1}{2}", "0.5"), (r"\frac34", r"\dfrac{3}{4}"), ("x+1", "1+x"),
    ("(x-1)(x+1)", "x^2-1"), (r"\sqrt{8}", r"2\sqrt{2}"), (r"\text{Evelyn}", "Evelyn"), ("1, -2", "-2, 1"),
    (r"90^\circ", "90"), (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \frac{\pi}{2})"), ("x=5", "5"),
    (r"11\frac12", "11.5"),
    ("[1, 2)", r"\left[ 1, 2 \right)"), ("6 - 5i", "-5i + 6"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
]  # fmt: skip
DIFFERENT = [
    ("18", "81"), (r"\frac{1}{2}", r"\frac{1}{3}"), ("x+1", "x-1"), ("2", "2, 3"), ("(1, 2)", "(2, 1)"), ("x=5", "y=5"),
    ("[1, 2]", "(1, 2)"), (r"\text{Evelyn}", "Briana"), ("3", ""), ("3", "x"), ("3", "3" + "+0" * 300),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), SAME)
def test_equivalent_answers(gold, answer):
    assert answers.equivalent(gold, answer)


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different_answers(gold, answer):
    assert not answers.equivalent(gold, answer)


def test_gold_comes_first():
    """math-verify takes an interval for an inequality but not the reverse: the order must not be swapped."""
    assert answers.equivalent("1<x<2", "(1,2)")
    assert not answers.equivalent("(1,2)", "1<x<2")


def test_values_have_one_canonical_form():
    for group in (["18", "18.00", "18.0"], ["1/2", "0.5", r"\frac{1}{2}", r"\dfrac12"], ["1, -2", "-2,1"]):
        assert len({answers.canonical(text) for text in group}) == 1, group
    assert answers.canonical("18") != answers.canonical("81")
    assert gsm8k.canonical("#### 18") == gsm8k.canonical("so it costs $18.00") == "18"
    assert gsm8k.canonical("nothing") is None is math500.canonical("nothing")


@pytest.mark.parametrize("bomb", ["10^{10^{10}}", "9**9**9**9", r"(10^{9})!", "(" * 190 + "1" + ")" * 190])
def test_answers_that_would_take_forever_are_wrong_in_time(bomb, monkeypatch):
    monkeypatch.setattr(answers, "SECONDS", 1)
    assert not answers.equivalent("5", bomb)
    answers.canonical(bomb)


def test_comparison_works_off_the_main_thread():
    pairs = [*SAME[:6], *DIFFERENT[:6]]
    answers._equivalent.cache_clear()
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda pair: answers.equivalent(*pair), pairs))
        assert pool.submit(threading.current_thread).result() is not threading.main_thread()
        assert pool.submit(answers.canonical, "0.5").result() == "1/2"
    assert found == [True] * 6 + [False] * 6


# The files' rows, as small stand-ins in the same format


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A data root with a few rows in the formats of the three files, under their real names."""
    from common.data import sources

    lines = [f"{i} + 1 = {i + 1}\n" * (i % 3 + 1) for i in range(20)]
    files = {
        "gsm8k/test.jsonl": [
            {"question": f"Add {i} and 1.", "answer": f"{line}#### {i + 1}"} for i, line in enumerate(lines)
        ],
        "gsm8k/train.jsonl": [
            {"question": f"Take 1 from {i}.", "answer": f"{i} - 1\n#### {i - 1}"} for i in range(1, 101)
        ],
        "math500/test.jsonl": [
            {
                "problem": "Half?", "solution": "First.\n\nThus $\\boxed{\\frac12}$.", "answer": "\\frac12",
                "level": 3,
            }
        ],
        "humaneval/HumanEval.jsonl.gz": [
            {
                "task_id": "HumanEval/0", "entry_point": "twice", "prompt": 'def twice(x):\n    """ Twice x. """\n',
                "canonical_solution": "    return 2 * x\n",
                "test": "def check(candidate):\n    assert candidate(3) == 6\n",
            }
        ],
    }  # fmt: skip
    entries = {}
    for name, rows in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        entries[name] = {"url": "https://example.org", "sha256": sources.digest(path), "bytes": path.stat().st_size}
    monkeypatch.setattr(sources, "catalogue", lambda: entries)
    monkeypatch.setattr(sources, "DOWNLOADS", tmp_path / "downloads")
    monkeypatch.delenv("FRUGAL_DATA", raising=False)
    return tmp_path


def test_problems_from_files_keep_the_interface(tree):
    for name in ("gsm8k", "math500"):
        own = task(name, data_root=tree)
        for problem in own.generate(0, None, None, "test"):
            assert own.verify(problem, problem.answer)
            assert not own.verify(problem, "The answer is 123456.")
            assert "".join(own.steps(problem.answer)) == problem.answer
            assert own.result(problem, problem.answer) is not None
    assert len(math500.steps("First.\n\nThus.\n\n\n\nSo.")) == 3
    assert [p.difficulty for p in task("gsm8k", data_root=tree).generate(0, None)][:4] == [1, 2, 3, 1]


def test_the_seed_orders_and_splits_are_disjoint(tree):
    generate = task("gsm8k", data_root=tree).generate
    assert generate(1, 5) == generate(1, 12)[:5]
    assert generate(1, 20) != generate(2, 20)
    assert {p.prompt for p in generate(1, 20)} == {p.prompt for p in generate(2, 20)}
    assert {p.difficulty for p in generate(0, None, (2, 3))} == {2, 3}
    sets = {split: {p.prompt for p in generate(0, None, None, split)} for split in gsm8k.SPLITS}
    assert sum(map(len, sets.values())) == 120 == len(set().union(*sets.values()))
    assert len(sets["warmup"]) > 0


def test_programs_are_run_only_if_allowed(tree):
    own, allowed = task("humaneval", data_root=tree), task("humaneval", data_root=tree, allow_code_execution=True)
    problem = own.generate(0, 1)[0]
    with pytest.raises(CodeExecutionNotAllowed, match="allow_code_execution=true"):
        own.verify(problem, problem.answer)
    assert allowed.verify(problem, problem.answer)
    assert not allowed.verify(problem, "    return x\n")
    assert not allowed.verify(problem, "    import sys; sys.exit(0)\n")
    assert not allowed.verify(problem, "    pass\n")


def test_completions_end_where_the_paper_ends_them(tree):
    problem = humaneval.generate(0, 1, root=tree)[0]
    for text in (
        "    return 2 * x\n\ndef other(:\n", "    return 2 * x\nprint(1/0)\n", "    return 2 * x\n# and so on (\n",
        "Here it is:\n```python\ndef twice(x):\n    return x + x\n```\nIt doubles.", "```\n    return 2 * x\n```",
    ):  # fmt: skip
        assert humaneval.run(problem, text, allow_code_execution=True).passed, text


def test_missing_files_and_bad_input(tree, monkeypatch):
    with pytest.raises(ValueError, match="unknown split 'train'; known: test"):
        math500.generate(0, 1, split="train", root=tree)
    with pytest.raises(ValueError, match=r"no problem of difficulty 9; there are 1 to 3"):
        gsm8k.generate(0, 1, 9, root=tree)
    with pytest.raises(ValueError, match=r"n must lie in 0\.\.20, the problems that there are, not 21"):
        gsm8k.generate(0, 21, root=tree)
    assert choose([Problem("t", "test", "p", "a", "r", 1)], 0, 0, None) == []
    (tree / "math500" / "test.jsonl").unlink()
    with pytest.raises(MissingSource, match=r"make data SOURCE=math500/test\.jsonl"):
        task("math500", data_root=tree).generate(0, 1)


# The data themselves


def test_share_of_right_example_solutions_of_gsm8k():
    """The published solutions of four systems to the test questions: percent right, against known numbers."""
    examples, _ = available("gsm8k/example_model_solutions.jsonl", "gsm8k/test.jsonl")
    rows = [json.loads(line) for line in examples.path.read_text().splitlines()]
    problems = gsm8k.generate(0, None)
    assert [f"Question: {row['question']}\nAnswer:" for row in rows] == [problem.prompt for problem in problems]
    shares = {}
    for system in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
        right = [gsm8k.verify(problem, row[system]["solution"]) for problem, row in zip(problems, rows, strict=True)]
        assert right == [row[system]["is_correct"] for row in rows]  # the file's own judgement, one by one
        shares[system] = round(100 * sum(right) / len(right), 2)
    assert list(shares.values()) == [21.68, 39.04, 34.72, 56.25]


def test_gsm8k_as_published():
    available("gsm8k/train.jsonl", "gsm8k/test.jsonl")
    splits = {split: gsm8k.generate(0, None, None, split) for split in gsm8k.SPLITS}
    assert len(splits["test"]) == 1319
    assert len(splits["train"]) + len(splits["warmup"]) == 7473
    assert len({p.prompt for group in splits.values() for p in group}) == 1319 + 7473
    for problem in splits["test"]:
        assert gsm8k.verify(problem, problem.answer)
    low, high = task("gsm8k").difficulty
    assert {p.difficulty for group in splits.values() for p in group} <= set(range(low, high + 1))


def test_math500_as_published():
    available("math500/test.jsonl")
    problems = math500.generate(0, None)
    assert len(problems) == 500
    assert {p.difficulty for p in problems} == {1, 2, 3, 4, 5}
    assert all(math500.verify(p, p.answer) for p in problems)
    assert max(len(p.result) for p in problems) < answers.LONGEST
    for problem, other in zip(problems[:120], problems[120:240], strict=True):  # other answers are wrong answers
        if answers.canonical(problem.result) != answers.canonical(other.result):
            assert not math500.verify(problem, other.answer)


@pytest.mark.slow
def test_all_canonical_programs_of_humaneval_pass():
    available("humaneval/HumanEval.jsonl.gz")
    problems = humaneval.generate(0, None)
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda p: humaneval.run(p, p.answer, allow_code_execution=True), problems))
    failed = {p.prompt[:60]: o.reason for p, o in zip(problems, outcomes, strict=True) if not o.passed}
    assert (len(problems), failed) == (164, {})
