"""The task generators: right answers, disjoint splits, samples that reveal a change of generator."""

import hashlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.data import corpus
from common.tasks import chain, multihop
from common.tasks.problem import SPLITS, split_of

FROZEN = {"chain": "0245f45121562cc1", "multihop": "dd63ac8014d30309", "multihop_short": "b717edbe2ab5ae03"}
FROZEN_CHAIN = ("0*7+9-1*8=", "*7=0,+9=9,-1=8,*8=4$")
FROZEN_MULTIHOP = (
    "- Xenia Zeller was born at Corvo during a storm. Xenia Zeller served as judge for many years.\n"
    "- Corvo lies on the river Drava near hills. Corvo has an old market, shut after October.\n"
    "- Maria Bishop studied history since January. Maria Bishop moved to Imola.\n"
    "Question: Which river is it that the town where Xenia Zeller was born lies on? Quote the text.\n"
    "Answer:",
    " The notes say: Xenia Zeller was born at Corvo during a storm. Corvo lies on the river Drava near hills."
    " So the answer is Drava.",
)
GENERATORS = {
    "chain": lambda seed, n, split: chain.generate(seed, n, (1, 6), split),
    "multihop": lambda seed, n, split: multihop.generate(seed, n, split=split),
    "multihop_short": lambda seed, n, split: multihop.generate(seed, n, split=split, quote=False),
}
VERIFY = {"chain": chain.verify, "multihop": multihop.verify, "multihop_short": multihop.verify}


@pytest.mark.parametrize("task", GENERATORS)
def test_gold_answers_verify_and_problems_are_distinct(task):
    problems = GENERATORS[task](0, 500, "train")
    assert len({problem.prompt for problem in problems}) == 500
    assert all(VERIFY[task](problem, problem.answer) for problem in problems)
    assert {problem.task for problem in problems} == {task}
    assert not any(VERIFY[task](problem, "") for problem in problems)


@pytest.mark.parametrize("task", GENERATORS)
def test_splits_never_overlap_whatever_the_seeds(task):
    prompts = {split: {p.prompt for seed in range(6) for p in GENERATORS[task](seed, 200, split)} for split in SPLITS}
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["warmup"]
    assert not prompts["warmup"] & prompts["test"]
    assert all(split_of(prompt) == split for split, group in prompts.items() for prompt in group)


@pytest.mark.parametrize("task", GENERATORS)
def test_problems_follow_the_seed(task):
    assert GENERATORS[task](3, 20, "test") == GENERATORS[task](3, 20, "test")
    assert GENERATORS[task](3, 20, "test")[:5] == GENERATORS[task](3, 5, "test")
    assert GENERATORS[task](3, 20, "test") != GENERATORS[task](4, 20, "test")


def test_frozen_samples():
    """A change of a generator changes every number made from it: it must be noticed and meant."""
    digest = {
        task: hashlib.sha256(repr(GENERATORS[task](0, 100, "test")).encode()).hexdigest()[:16] for task in GENERATORS
    }
    assert digest == FROZEN
    first = chain.generate(0, 1, 4)[0]
    assert (first.prompt, first.answer) == FROZEN_CHAIN
    first = multihop.generate(0, 1, 2)[0]
    assert (first.prompt, first.answer) == FROZEN_MULTIHOP


@given(st.integers(0, 10**6), st.integers(1, 20))
@settings(max_examples=50, deadline=None)
def test_chain_by_direct_evaluation(seed, steps):
    problem = chain.generate(seed, 1, steps)[0]
    operations = re.findall(r"([+*-])(\d)", problem.prompt)
    value = int(problem.prompt[0])
    trace = []
    for operator, operand in operations:
        value = eval(f"{value} {operator} {operand}") % 10
        trace.append(f"{operator}{operand}={value}")
    assert problem.answer == ",".join(trace) + "$"
    assert problem.result == str(value)
    assert problem.difficulty == len(operations) == steps


@pytest.mark.parametrize(
    ("text", "result"), [("+4=7$", "7"), ("+4=7,*2=4$ more", "4"), ("+4=7", None), ("7$", None), ("+4=$", None)]
)
def test_chain_reads_the_last_value_of_a_finished_answer(text, result):
    assert chain.result_of(text) == result


@pytest.mark.parametrize("difficulty", [1, 2])
def test_quoted_sentences_stand_in_the_documents(difficulty):
    for problem in multihop.generate(1, 300, difficulty):
        quotes = multihop.quotes_of(problem.answer)
        assert len(quotes) == difficulty
        assert all(quote in problem.prompt for quote in quotes)
        assert multihop.quotes_are_verbatim(problem, problem.answer)
        assert problem.result in quotes[-1]
        assert not multihop.quotes_are_verbatim(problem, problem.answer.replace(quotes[0], quotes[0][:-1] + "!"))
        wrong = problem.answer.replace(f"answer is {problem.result}.", "answer is nothing.")
        assert not multihop.verify(problem, wrong)


def test_the_question_has_one_answer():
    """Each relation is told once of one person or town, so that the quoted sentence is the only one that fits."""
    for problem in multihop.generate(2, 300, 1):
        notes = problem.prompt.partition("\nQuestion:")[0]
        sentences = [s for line in notes.splitlines() for s in re.split(r"(?<=\.) ", line.removeprefix("- "))]
        assert len(sentences) in (5, 6)
        openings = [" ".join(sentence.split()[:4]) for sentence in sentences]
        assert len(set(openings)) == len(sentences)


def test_short_answers_do_not_quote():
    """No run of four words of an answer stands in its documents."""
    for problem in multihop.generate(3, 300, quote=False):
        words = problem.answer.split()
        runs = [" ".join(words[i : i + 4]) for i in range(len(words) - 3)]
        assert not any(run in problem.prompt for run in runs)
        assert problem.result in problem.answer


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: chain.generate(0, 1, 0), "1..20, not 0"),
        (lambda: chain.generate(0, 1, (3, 2)), r"1..20, not \(3, 2\)"),
        (lambda: multihop.generate(0, 1, 3), "must be 1 or 2, not 3"),
        (lambda: chain.generate(0, 1, 2, "valid"), "unknown split 'valid'; known: train, warmup, test"),
        (lambda: chain.generate(0, -1, 2), "n must not be negative: -1"),
        (lambda: chain.generate(0, 1000, 1), "different problems in split 'train', not 1000"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_corpus_is_split_by_module_and_repeatable():
    groups = {split: corpus.stdlib_sources(split) for split in corpus.SPLITS}
    modules = {split: {document.module for document in group} for split, group in groups.items()}
    assert not modules["train"] & modules["test"]
    assert not modules["train"] & modules["warmup"]
    assert not modules["warmup"] & modules["test"]
    names = [document.name for document in groups["train"]]
    assert names == sorted(names)
    assert all("site-packages" not in document.name for group in groups.values() for document in group)
    assert len(modules["train"]) > 100
    assert sum(len(document.text) for document in groups["test"]) > 50_000
    assert corpus.fingerprint() == corpus.fingerprint()
    topics = {split: {d.name for d in corpus.pydoc_topics(split)} for split in corpus.SPLITS}
    assert min(map(len, topics.values())) > 0
    assert not topics["train"] & topics["test"]
    with pytest.raises(ValueError, match="unknown split 'valid'"):
        corpus.stdlib_sources("valid")
