"""f along a path, both readings of the cost, texts in and out, limits, the replay of the queue, bad input."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.generation.steps import State
from common.metrics.intervals import Measured
from common.reasoners.workbench import Outcome
from common.run import compose
from papers.astar_decoding import Budget, a_star, analysis, priority, running, solve
from papers.astar_decoding.experiment import check
from papers.astar_decoding.jobs import Visited, limits

TREE = {
    (0,): 0.65, (1,): 0.7, (0, 0): 0.75, (0, 1): 0.64, (1, 0): 0.95, (1, 1): 0.05,
    (0, 0, 0): 0.5, (0, 0, 1): 0.65, (0, 1, 0): 0.55, (0, 1, 1): 0.58, (1, 0, 0): 0.35, (1, 0, 1): 0.7,
}  # fmt: skip


def path(scores):
    n = len(scores)
    return State(0, tuple(range(n)), tuple(range(1, n + 1)), True, (-1.0,) * n, tuple(scores))


def grown(state, symbol, depth):
    tokens = (*state.tokens, symbol)
    return State(state.problem, tokens, (*state.ends, len(tokens)), len(tokens) == depth, (), state.scores)


class Tree:
    """Scores by path, two children each; the states extended, in order."""

    def __init__(self, scores, depth=3):
        self.scores, self.depth, self.order = scores, depth, []

    def propose(self, states, samples):
        self.order.append(states[0].tokens)
        return [grown(s, sample % 2, self.depth) for s, sample in zip(states, samples, strict=True)]

    def score(self, states):
        return np.array([self.scores[s.tokens] for s in states])


@pytest.mark.parametrize(
    ("cost", "order", "answer"),
    [
        # f by hand: 1 0.60, 10 0.35, 0 0.70, 00 0.60, 01 0.72; finished: 001 0.80, 011 0.84, 101 0.85
        ("increase", [(), (1,), (1, 0), (0,), (0, 0), (0, 1)], (0, 0, 1)),
        # 1 0.30, 10 0.30, 0 0.35, 00 0.35, 01 0.36; finished: 011 0.42, 001 0.45, 101 0.55
        ("consistent", [(), (1,), (1, 0), (0,), (0, 0), (0, 1)], (0, 1, 1)),
        # 1 0.30, 10 0.05, 0 0.35; finished: 101 0.30
        ("zero", [(), (1,), (1, 0)], (1, 0, 1)),
        # 1 0.40, 10 0.25, 0 0.45, 00 0.45, 01 0.56; finished: 101 0.60, 001 0.65
        ("length", [(), (1,), (1, 0), (0,), (0, 0), (0, 1)], (1, 0, 1)),
        # 1 0.60, 10 0.40, 0 0.70, 00 0.85, 01 1.07; finished: 101 0.95
        ("total", [(), (1,), (1, 0), (0,), (0, 0)], (1, 0, 1)),
    ],
)
def test_order_on_a_tree_of_twelve_states(cost, order, answer):
    tree = Tree(TREE)
    found = a_star([0], tree.propose, tree.score, k=2, step_cost=cost)
    assert tree.order == order
    assert found.best[0].tokens == answer


def test_f_by_hand():
    """Scores 0.9, 0.5, 0.8 from a root of 1: h = 0, 0.1, 0.5, 0.2."""
    state = path((0.9, 0.5, 0.8))
    assert priority(state, "increase") == pytest.approx([0, 0.2, 1.0, 0.7])
    assert priority(state, "consistent") == pytest.approx([0, 0.1, 0.5, 0.5])
    assert priority(state, "zero") == pytest.approx([0, 0.1, 0.5, 0.2])
    assert priority(state, "total") == pytest.approx([0, 0.2, 1.1, 1.0])
    assert priority(state, "zero", root_score=0.4)[0] == pytest.approx(0.6)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_consistent_never_falls_and_telescopes(scores, root):
    f = priority(path(scores), "consistent", root)
    h = np.array([1 - root, *(1 - s for s in scores)])
    assert (np.diff(f) >= -1e-12).all()
    assert f == pytest.approx(list(h[0] + np.append(0, np.maximum(np.diff(h), 0).cumsum())))


@pytest.mark.parametrize(("cost", "branch"), [("increase", 0), ("consistent", 1)])
def test_the_two_readings_can_return_different_goals(cost, branch):
    """A path of two passing doubts against one of a doubt that stays; see exercise 2 of the notebook."""
    scores = {0: (0.7, 1.0, 0.7, 1.0), 1: (0.5, 0.5, 0.5, 0.5)}

    def propose(states, samples):
        return [grown(s, s.tokens[0] if s.tokens else i % 2, 4) for s, i in zip(states, samples, strict=True)]

    def score(states):
        return np.array([scores[s.tokens[0]][len(s.tokens) - 1] for s in states])

    assert a_star([0], propose, score, k=2, step_cost=cost).best[0].tokens[0] == branch


def test_running_aggregations_are_those_of_the_whole_path():
    values = [0.5, 0.8, 0.3]
    for kind, expected in (("min", [0.5, 0.5, 0.3]), ("prod", [0.5, 0.4, 0.12]), ("mean", [0.5, 0.65, 1.6 / 3])):
        state, seen = State(0), []
        for value in values:
            seen.append(float(running(lambda _, v=value: np.array([v]), kind)([state])[0]))
            state = State(0, (*state.tokens, 1), (*state.ends, len(state.ends) + 1), scores=tuple(seen))
        assert seen == pytest.approx(expected)
    with pytest.raises(ValueError, match="unknown aggregation 'max'; known: last, min, prod, mean"):
        running(lambda states: states, "max")


def test_a_limit_of_one_answer_is_one_sample():
    """No extension fits beside the reserve: the search completes the root and pays for nothing else."""
    tree = Tree(TREE)
    total, reserve = limits(1, 4, 3.0, 1.0, 1.0, 0.5)
    found = a_star([0], tree.propose, tree.score, Budget(tokens=total), k=4, reserve=reserve)
    assert found.trace == [[]]
    assert (found.cost[0].steps, found.cost[0].passes, found.best[0].tokens) == (3, 1, (0, 0, 0))


def test_limits_keep_an_answer_and_an_extension_back():
    assert limits(8, 4, 30.0, 10.0, 1.0, 0.5) == (255, 255 - 170)
    assert limits(2, 4, 30.0, 10.0, 1.0, 0.5) == (75, 75)
    assert limits(4, 2, 30.0, 10.0, 0.0, 0.0) == (120, 20)


class Bench:
    rules = type("Rules", (), {"verify_step": None})


def outcome(found):
    """One problem's, as a workbench gives it."""
    return Outcome(found.best, found.pool, [found.cost[0].tokens], [found.cost[0].passes], found.trace)


@pytest.mark.parametrize(("reserve", "extended"), [(2, 2), (4, 1)])  # the answer is completed in one step, in two
def test_an_answer_completed_at_the_end_is_no_state_of_the_queue(reserve, extended):
    cfg = compose("astar_decoding", "infer", ["profile=smoke"])
    seen = Visited(Tree(TREE).score)
    found = a_star([0], seen.watch(Tree(TREE).propose), seen.score, Budget(tokens=6), k=2, reserve=reserve)
    assert len(found.best[0].ends) == 3
    assert found.cost[0].passes == 2 * extended + 1
    nodes = pd.DataFrame(seen.rows(cfg, Bench, outcome(found)))
    assert len(nodes) == 2 * extended
    assert not nodes["chosen"].any()
    assert not nodes["done"].any()


def test_recorded_searches_replay_and_a_changed_one_does_not():
    cfg = compose("astar_decoding", "infer", ["profile=smoke"])
    tree = Tree(TREE)
    seen = Visited(tree.score)
    found = a_star([0], seen.watch(tree.propose), seen.score, k=2)

    nodes = pd.DataFrame({"task": "toy"} | row for row in seen.rows(cfg, Bench, outcome(found)))
    assert analysis.misplaced(nodes) == (0, 5)
    assert nodes["tokens"].sum() == found.cost[0].tokens
    assert len(nodes) == found.cost[0].passes
    assert nodes[nodes["chosen"]]["node"].tolist() == ["0 0 1"]
    nodes.loc[nodes["place"] == 1, "f"] += 1.0
    assert analysis.misplaced(nodes) == (1, 5)


def curve(correct, tokens):
    return analysis.Curve((1, 2, 4), np.array(correct, float), np.array(tokens, float), np.array(tokens, float))


def test_savings_of_a_method_that_is_twice_as_cheap():
    right = np.array([[0, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 0]])
    cheap, dear = curve(right, [[10, 20, 40]] * 4), curve(right, [[20, 40, 80]] * 4)
    levels, ratios = analysis.savings(cheap, dear, "tokens")
    assert levels.min() > 0.25
    assert ratios == pytest.approx(np.full(len(levels), 2.0))
    assert analysis.ratio_at(0.5, cheap, dear, "tokens") == pytest.approx(2.0)
    assert analysis.ratio_at(0.9, cheap, dear, "tokens") == 0.0
    measured = analysis.bootstrap(lambda index: float(right[index["t"], -1].mean()), {"t": 4}, 0, 200)
    assert isinstance(measured, Measured)
    assert (measured.value, measured.n) == (0.75, 4)
    assert analysis.bootstrap(lambda index: float("nan"), {"t": 4}, 0, 20) is None


def test_dominance_of_equal_better_and_worse_curves():
    random = np.random.default_rng(0)
    base = random.random((400, 3)) < [0.2, 0.4, 0.5]
    better = random.random((400, 3)) < [0.2, 0.6, 0.8]
    tokens, index = [[10, 20, 40]] * 400, np.arange(400)
    a, b = curve(base, tokens), curve(better, tokens)
    assert all(analysis.dominance(a, [a], "tokens", index))
    assert all(analysis.dominance(b, [a], "tokens", index))
    assert not any(analysis.dominance(a, [a, b], "tokens", index))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.step_cost=hops", "search.step_cost='hops' is unknown; known: increase, consistent"),
        ("search.stop=never", "search.stop='never' is unknown; known: first_goal, budget"),
        ("search.aggregation=max", "search.aggregation='max' is unknown; known: last"),
        ("search.k=0", "search.k=0 must be at least 1"),
        ("search.root_score=1.5", "search.root_score=1.5 in \\[0, 1\\]"),
        ("temperature=0.0", "temperature=0.0 must be positive"),
        ("ns.chain=[4,2]", "ns.chain=\\[4, 2\\] must be at least two rising"),
        ("ns.chain=[1,2,6]", "beam.width=4 must divide"),
        ("problems.chain=1", "problems.chain=1 and seeds.chain=1: at least 4 and 1"),
        ("noise.n.chain=3", "noise.n.chain=3 and ablation.n=2 must be among ns.chain"),
    ],
)
def test_bad_settings_are_named(override, message):
    cfg = compose("astar_decoding", "infer", ["profile=smoke", override])
    with pytest.raises(ValueError, match=message):
        check(cfg)


def test_priority_refuses_what_it_cannot_judge():
    with pytest.raises(ValueError, match="unknown step_cost 'hops'"):
        priority(path((0.5,)), "hops")
    with pytest.raises(ValueError, match="a state of 2 steps has 1 scores"):
        priority(State(0, (1, 2), (1, 2), scores=(0.5,)))


@pytest.fixture(scope="module")
def tiny():
    """A random Llama over the words of the reasoners; a step ends with ','."""
    from common.models.build import build
    from common.reasoners.policies import tokenizer

    words = tokenizer()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    end = words.convert_tokens_to_ids("$")
    return build(sizes, vocab_size=len(words), eos_token_id=end, pad_token_id=0, seed=1), words


def by_digits(pairs):
    """A scorer of texts, as in the README: the share of digits."""
    return [sum(c.isdigit() for c in text) / len(text) if text else 0.0 for _, text in pairs]


def test_solve_takes_and_returns_texts(tiny):
    model, words = tiny
    settings = {"k": 2, "delimiter": ",", "max_step_tokens": 6, "max_steps": 3, "max_tokens": 200}
    answers = solve(model, words, ["1A+2=", "7A*3B-1="], by_digits, **settings)
    assert len(answers) == 2
    assert all(isinstance(answer, str) and answer for answer in answers)
    assert answers == solve(model, words, ["1A+2=", "7A*3B-1="], by_digits, **settings)
    assert answers[1] != solve(model, words, ["1A+2=", "7A*3B-1="], by_digits, **settings | {"seed": 5})[1]


def test_solve_names_what_is_wrong(tiny):
    model, words = tiny
    with pytest.raises(ValueError, match="no token of the tokenizer contains the delimiter"):
        solve(model, words, ["1A+2="], by_digits)
    with pytest.raises(ValueError, match="scores lie in \\[0, 1\\]"):
        solve(model, words, ["1A+2="], lambda pairs: [2.0] * len(pairs), delimiter=",", max_step_tokens=4, max_steps=2)
    with pytest.raises(ValueError, match="gave the score nan"):
        solve(
            model, words, ["1A+2="], lambda pairs: [float("nan")] * len(pairs), delimiter=",", max_step_tokens=4,
            max_steps=2,
        )  # fmt: skip
    with pytest.raises(ValueError, match="max_steps=0"):
        solve(model, words, ["1A+2="], by_digits, delimiter=",", max_step_tokens=4, max_steps=0)
