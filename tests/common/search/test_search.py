"""Best-first search, beam search, votes: pop orders, optima by enumeration, equalities between algorithms, errors."""

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.search import beam, sampling
from common.search.best_first import STEP_COSTS, a_star
from common.search.core import Budget
from common.search.score import aggregate, noisy

spec = importlib.util.spec_from_file_location("toy", Path(__file__).with_name("toy.py"))
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)
State = toy.State


def answer(state):
    return str(state.tokens)


class Tree:
    """A finite tree: sample i of an expansion is child i; scores are given by path; states of `depth` are done."""

    def __init__(self, scores, depth, branching):
        self.scores, self.depth, self.branching = scores, depth, branching
        self.popped = []

    def propose(self, states, samples):
        self.popped += [states[i].tokens for i in range(0, len(states), self.branching)]
        children = []
        for state, sample in zip(states, samples, strict=True):
            tokens = (*state.tokens, sample % self.branching)
            children.append(
                State(
                    state.problem,
                    tokens,
                    (*state.ends, len(tokens)),
                    len(tokens) == self.depth,
                    (*state.logprobs, -1.0),
                    state.scores,
                )
            )
        return children

    def score(self, states):
        return np.array([self.scores[state.tokens] for state in states])


def random_tree(seed, depth=3, branching=3):
    random = np.random.default_rng(seed)

    paths = [p for n in range(1, depth + 1) for p in itertools.product(range(branching), repeat=n)]
    return Tree({p: random.uniform() for p in paths}, depth, branching)


def priority(tree, path, mode):
    """f of a path by the definition, without search."""
    h, g = 0.0, 0.0
    for n in range(1, len(path) + 1):
        new = 1 - tree.scores[path[:n]]
        g += {
            "increase": max(0, new - h),
            "consistent": max(0, h - new),
            "zero": 0,
            "length": 0.1,
            "surprise": 0.1,
            "total": new,
        }[mode]
        h = new
    return g + h, h


@pytest.mark.parametrize("mode", STEP_COSTS)
def test_pop_order_is_that_of_a_full_sort(mode):
    """Among the states that are open at each moment the lowest (f, h, -depth) leaves first."""
    for seed in range(20):
        tree = random_tree(seed)
        a_star([0], tree.propose, tree.score, k=3, step_cost=mode, stop="budget")
        open_, order, age = [()], [], {(): 0}
        while open_:
            path = min(open_, key=lambda p: (*(round(x, 12) for x in priority(tree, p, mode)), -len(p), age[p]))
            open_.remove(path)
            if len(path) < tree.depth:
                order.append(path)
                for i in range(3):
                    age[(*path, i)] = len(age)
                    open_.append((*path, i))
        assert tree.popped == order


def test_consistent_cost_finds_the_optimum_and_never_lowers_f():
    for seed in range(500):
        tree = random_tree(seed)
        result = a_star([0], tree.propose, tree.score, k=3, step_cost="consistent")
        goals = [p for p in tree.scores if len(p) == tree.depth]
        best = min(priority(tree, p, "consistent")[0] for p in goals)
        assert priority(tree, result.best[0].tokens, "consistent")[0] == pytest.approx(best)
        values = [step["f"] for step in result.trace[0]]
        assert all(b >= a - 1e-12 for a, b in itertools.pairwise(values))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_telescoping_identity(scores, root):
    """In 'consistent' mode f = h(root) + the sum of the increases of h."""
    h = [1 - root, *(1 - s for s in scores)]
    g = sum(max(0, a - b) for a, b in itertools.pairwise(h))
    assert g + h[-1] == pytest.approx(h[0] + sum(max(0, b - a) for a, b in itertools.pairwise(h)))


def test_a_constant_heuristic_is_breadth_first_with_length_and_depth_first_without_costs():
    tree = Tree({p: 0.5 for p in random_tree(0).scores}, 3, 3)
    a_star([0], tree.propose, tree.score, k=3, step_cost="length", stop="budget", root_score=0.5)
    assert [len(path) for path in tree.popped] == sorted(len(path) for path in tree.popped)
    tree.popped = []
    a_star([0], tree.propose, tree.score, k=3, step_cost="zero", root_score=0.5)
    assert tree.popped == [(), (0,), (0, 0)]


def test_one_continuation_is_one_sample():
    result = a_star(range(50), toy.propose(3), toy.score, k=1)
    for p, state in enumerate(result.best):
        expected = State(p)
        for step in range(toy.STEPS):
            expected = toy.propose(3)([expected], [step])[0]
        assert state.tokens == expected.tokens


def test_an_oracle_expands_one_state_a_step():
    right = (2, 0, 1)
    tree = random_tree(0)
    tree.scores = {p: float(p == right[: len(p)]) for p in tree.scores}
    result = a_star([0], tree.propose, tree.score, k=3)
    assert result.best[0].tokens == right
    assert (result.cost[0].steps, result.cost[0].passes) == (9, 9)


def test_duplicates_are_charged_but_not_scored():
    def propose(states, samples):
        return [
            State(s.problem, (*s.tokens, 7), (*s.ends, len(s.tokens) + 1), len(s.tokens) == 2, (), s.scores)
            for s in states
        ]

    result = a_star([0, 1], propose, toy.constant, k=4)
    assert [(c.tokens, c.passes) for c in result.cost] == [(12, 3), (12, 3)]


def test_budget_and_finish():
    tree = random_tree(1)
    everything = a_star([0], tree.propose, tree.score, k=3, stop="budget")
    assert len(everything.pool[0]) == 27
    assert everything.best[0].scores[-1] == max(s for p, s in tree.scores.items() if len(p) == 3)
    short = a_star([0], tree.propose, tree.score, Budget(tokens=4), k=3, reserve=2)
    assert short.cost[0].tokens <= 4 + 2
    assert short.best[0] is None or short.best[0].done
    narrow = a_star([0], tree.propose, tree.score, k=3, max_open=1)
    assert len(narrow.trace[0]) == 3


def test_order_of_problems_does_not_matter():
    forwards = a_star(range(20), toy.propose(1), toy.score, k=3)
    backwards = a_star(range(19, -1, -1), toy.propose(1), toy.score, k=3)
    assert forwards.pool == backwards.pool[::-1]


def test_beam_equalities():
    problems = range(30)
    wide = beam.beam_search(problems, toy.propose(1), toy.score, n=4, width=4)
    greedy = beam.stepwise_greedy(problems, toy.propose(1), toy.score, n=4)
    trees = beam.dvts(problems, toy.propose(1), toy.score, n=4, width=4)
    assert wide.best == greedy.best == trees.best
    single = beam.beam_search(problems, toy.propose(1), toy.score, n=1, width=1)
    assert single.best == sampling.best_of_n(problems, toy.propose(1), toy.score, n=1, every=True).best


def test_beam_keeps_the_best_prefixes():
    tree = random_tree(4, branching=4)
    result = beam.beam_search([0], tree.propose, tree.score, n=4, width=4)
    path = ()
    for _ in range(3):
        path = max(((*path, i) for i in range(4)), key=tree.scores.__getitem__)
    assert result.best[0].tokens == path
    assert result.cost[0].steps == 12


def test_best_of_n_is_the_argmax_of_its_pool_and_scores_once():
    result = sampling.best_of_n(range(40), toy.propose(2), toy.score, n=5)
    for best, pool, cost in zip(result.best, result.pool, result.cost, strict=True):
        assert best.scores[-1] == max(toy.SCORES[state.tokens] for state in pool)
        assert (cost.tokens, cost.passes) == (15, 5)
    stepwise = sampling.best_of_n(range(40), toy.propose(2), toy.score, n=5, every=True)
    assert [b.tokens for b in stepwise.best] == [b.tokens for b in result.best]
    assert stepwise.cost[0].passes == 15


def test_votes():
    pool = [State(0, (t,), (1,), True, (), (s,)) for t, s in ((1, 0.2), (2, 0.9), (1, 0.3), (3, 0.1), (3, 0.2))]
    assert sampling.vote(pool, answer).tokens == (1,)  # first seen of equals
    assert sampling.vote(pool, answer, lambda s: s.scores[-1]).tokens == (2,)
    assert sampling.vote(pool, lambda s: None) is None
    assert sampling.vote(pool, lambda s: "x" if s.tokens != (2,) else None).scores == (0.3,)


def test_aggregations():
    state = State(0, (1, 2), (1, 2), True, (), (0.5, 0.8))
    assert [aggregate(k)(state) for k in ("last", "min", "prod", "mean")] == pytest.approx([0.8, 0.5, 0.4, 0.65])
    with pytest.raises(ValueError, match="unknown aggregation 'max'; known: last, min, prod, mean"):
        aggregate("max")


def test_noise_is_a_function_of_the_prefix():
    states = [State(p, (t,)) for p in range(300) for t in range(3)]
    score = noisy(toy.constant, 2.0, seed=1)
    assert (score(states) == score(states[::-1])[::-1]).all()
    logits = np.log(score(states) / (1 - score(states)))
    assert abs(logits.mean()) < 4 * 2 / 30
    assert abs(logits.std() - 2) < 0.2
    assert noisy(toy.constant, 0.0, seed=1)(states) == pytest.approx(np.full(900, 0.5))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: a_star([0], toy.propose(0), toy.score, k=0), "k must be at least 1, not 0"),
        (lambda: a_star([0], toy.propose(0), toy.score, step_cost="hops"), "unknown step_cost 'hops'; known: increase"),
        (
            lambda: a_star([0], toy.propose(0), toy.score, stop="never"),
            "unknown stop 'never'; known: first_goal, budget",
        ),
        (lambda: a_star([0], toy.propose(0), toy.score, root_score=2), "root_score lies in"),
        (lambda: beam.beam_search([0], toy.propose(0), toy.score, n=6, width=4), "n=6 beams do not divide"),
        (lambda: sampling.best_of_n([0], toy.propose(0), toy.score, n=0), "n must be at least 1"),
        (lambda: noisy(toy.score, -1.0, 0), "sigma must not be negative"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
