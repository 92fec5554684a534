"""The method on a tiny model and on the enumerable one, the genealogy, and the arithmetic of the analysis."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from common.generation.steps import StepSampler
from common.models.build import build
from common.models.tokenizer import word_tokenizer
from common.run import ROOT, compose
from common.search.beam import beam_search
from common.search.score import aggregate
from papers.particle_filtering import analysis, arms, experiment, plots
from papers.particle_filtering.method import Recorder, Weighting, particle_filter, solve
from papers.particle_filtering.toy import ToyLanguageModel, estimates, starts_with_zero

WORDS = [*map(str, range(10)), ";", "="]


@pytest.fixture(scope="module")
def tiny():
    tokenizer = word_tokenizer(WORDS)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    return build(sizes, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, seed=1), tokenizer


def sevens(pairs):
    """Likes answers with many sevens."""
    return [(1 + text.count("7")) / (2 + len(text)) for _, text in pairs]


def test_the_example_of_the_readme_runs(tiny):
    model, tokenizer = tiny
    text = (Path(ROOT) / "papers" / "particle_filtering" / "README.md").read_text()
    example = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "solve(" in block)
    example = example.replace('delimiter="\\n\\n"', 'delimiter=";", max_step_tokens=4, max_steps=3')
    names = {"model": model, "tokenizer": tokenizer, "prompts": ["1=", "12="], "judge": sevens}
    exec(example, names)
    assert len(names["answers"]) == 2
    assert all(isinstance(answer, str) for answer in names["answers"])


def test_solve_takes_the_particle_of_the_highest_final_score(tiny):
    settings = {"delimiter": ";", "max_step_tokens": 4, "max_steps": 3}
    seen = []

    def score(pairs):
        seen.append((pairs, sevens(pairs)))
        return seen[-1][1]

    prompts = ["1=", "2=", "34="]
    answers = solve(*tiny, prompts, score, n=8, **settings)
    assert answers == solve(*tiny, prompts, sevens, n=8, **settings)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert any((prompt, answer) in pairs for pairs, _ in seen)
    alone = solve(*tiny, ["34="], sevens, n=8, **settings)
    assert isinstance(alone[0], str)
    likes = np.mean([sevens([("", a)])[0] for a in answers])
    plain = solve(*tiny, prompts, sevens, n=1, **settings)
    assert likes >= np.mean([sevens([("", a)])[0] for a in plain])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delimiter": "\n"}, "no token of the tokenizer contains the delimiter"),
        ({"n": 0}, "n must be at least 1, not 0"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"score": lambda pairs: [1.5] * len(pairs)}, "judge gave the score 1.5; scores lie in"),
        ({"score": lambda pairs: [float("nan")] * len(pairs)}, "judge gave the score nan"),
    ],
)
def test_solve_refuses(tiny, settings, message):
    given = {"score": sevens, "delimiter": ";", "max_step_tokens": 4, "max_steps": 2, "n": 2} | settings
    with pytest.raises(ValueError, match=message):
        solve(*tiny, ["1="], given.pop("score"), **given)


@pytest.fixture(scope="module")
def law():
    """The law of weighted last particles of the toy model under a weighting, and the model."""
    model = ToyLanguageModel(seed=3)

    def found(weighting):
        result = particle_filter(range(60), model.propose, model.score, n=64, seed=3, weighting=weighting)
        mass = dict.fromkeys(model.sequences, 0.0)
        for states, trace in zip(result.pool, result.trace, strict=True):
            weights = np.exp(np.array(trace[-1]["log_weights"]))
            for state, weight in zip(states, weights / weights.sum(), strict=True):
                mass[state.tokens] += weight / 60
        return np.array(list(mass.values()))

    return model, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weighting", "weight"),
    [
        (Weighting(kind="log"), float),
        (Weighting(kind="logit"), lambda r: r / (1 - r)),
        (Weighting(kind="logit", tau=2.0), lambda r: (r / (1 - r)) ** 0.5),
        (Weighting(kind="raw"), np.exp),
    ],
)
def test_the_law_that_each_weighting_samples_from(law, weighting, weight):
    model, found = law
    target = model.target(weight)
    assert abs(found(weighting) - target / target.sum()).sum() / 2 < 0.08


@pytest.mark.slow
def test_product_weights_count_early_steps_again(law):
    model, found = law
    product = found(Weighting(kind="log", key=aggregate("prod")))
    chances = model.target(lambda r: 1.0)
    again = chances * [
        np.prod([model.scores[x[: t + 1]] ** (model.steps - t) for t in range(model.steps)]) for x in model.sequences
    ]
    assert abs(product - again / again.sum()).sum() / 2 < 0.08
    assert abs(product - model.target(float) / model.evidence()).sum() / 2 > 0.2


def test_the_unnormalised_estimate_is_unbiased():
    """Theorem 1: E[Zhat * estimate] is the sum over the event; a systematic resampler keeps that and lowers the
    variance of Zhat."""
    model = ToyLanguageModel(seed=1)
    variance = {}
    for resampler in ("multinomial", "systematic"):
        evidence, share = estimates(model, 4000, 4, starts_with_zero, resampler=resampler)
        product = evidence * share
        error = product.std(ddof=1) / np.sqrt(len(product))
        assert abs(product.mean() - model.evidence(starts_with_zero)) < 4 * error
        variance[resampler] = evidence.var()
    assert variance["systematic"] < variance["multinomial"]


def sampler(tiny, problems=3):
    model, tokenizer = tiny
    prompts = tokenizer([f"{i}=" for i in range(problems)])["input_ids"]
    ends = tokenizer.convert_tokens_to_ids(";")
    return StepSampler(
        model, prompts, step_tokens=[ends], end_tokens=[tokenizer.eos_token_id], max_step_tokens=4, max_steps=4, seed=5
    )


def by_tokens(states):
    return np.array([(sum(state.tokens) % 97 + 1) / 99 for state in states])


@pytest.mark.parametrize(
    "search", [lambda *of: particle_filter(*of, n=8, seed=2), lambda *of: beam_search(*of, n=8, width=4)]
)
def test_the_genealogy_is_complete(tiny, search):
    """Every scored prefix is a node; a final candidate's lineage spells it out; tokens and passes are the costs."""
    seen = Recorder(by_tokens)
    result = search(range(3), sampler(tiny).propose, seen)
    for problem, (pool, cost) in enumerate(zip(result.pool, result.cost, strict=True)):
        nodes = seen.nodes[problem]
        assert len(nodes) == cost.passes <= 8 * 4
        assert sum(node.state.step_tokens for node in nodes) == cost.tokens
        for state in pool:
            path = seen.lineage(state)
            assert [nodes[i].step for i in path] == list(range(1, len(state.ends) + 1))
            assert [nodes[i].state.tokens for i in path] == [state.tokens[:end] for end in state.ends]
            assert tuple(nodes[i].state.scores[-1] for i in path) == state.scores
    assert seen.lineage(sampler(tiny).roots([0])[0]) == []


def test_votes_of_a_pool():
    voted = analysis._voted
    assert voted(["a", "b", "b"], np.ones(3), np.array([1.0, 0.0, 0.0])) == 0
    assert voted(["a", "b", "b"], np.array([0.9, 0.2, 0.3]), np.array([1.0, 0.0, 0.0])) == 1
    assert voted(["b", "a"], np.ones(2), np.array([0.0, 1.0])) == 0  # the first seen of equals
    assert voted([None, "a"], np.ones(2), np.array([0.0, 1.0])) == 1
    assert voted([None, None], np.ones(2), np.zeros(2)) == 0


def test_what_samples_of_a_pool_give():
    """Against the definition on every subset or block of a small pool."""
    cfg = compose("particle_filtering", "figures", ["profile=cpu"])
    random = np.random.default_rng(0)
    pool = pd.DataFrame(
        {
            "arm": "x", "seed": 0, "task": "countdown", "problem_id": 0, "answer": list("abcabcab"),
            "correct": [c == "b" for c in "abcabcab"], "score": random.uniform(size=8), "output_tokens": 10,
        }
    )  # fmt: skip
    arm = {"arm": "x", "panel": "headline", "task": "countdown", "seed": 0, "size": "base", "n": 8}
    cfg.main.widths = [1, 2, 8]
    found = {(r["method"], r["n"]): r for r in analysis._from_pool(cfg, arm, pool)}
    pairs = [(i, j) for i in range(8) for j in range(i)]
    best = [pool["correct"][max(p, key=pool["score"].__getitem__)] for p in pairs]
    assert found["bon", 2]["correct"] == pytest.approx(np.mean(best))
    assert found["pass", 2]["correct"] == pytest.approx(
        np.mean([pool["correct"][i] or pool["correct"][j] for i, j in pairs])
    )
    assert found["sc", 2]["correct"] == pytest.approx(np.mean([False, False, True, False]))  # ab ca bc ab: the first
    assert [found[method, 1]["correct"] for method in ("pf", "beam", "bon", "sc")] == pytest.approx([3 / 8] * 4)
    assert (found["bon", 8]["tokens"], found["bon", 8]["passes"], found["sc", 8]["passes"]) == (80, 8, 0)


def test_ratio_of_budgets():
    widths = [1, 2, 4, 8, 16, 32]
    ours = np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]] * 4)
    late = np.array([[0.1, 0.1, 0.1, 0.2, 0.3, 0.4]] * 4)  # the same accuracies at four times the budget
    statistic = analysis.ratio_of_budgets(widths)
    assert statistic(ours, late) == pytest.approx(4, rel=0.05)
    assert statistic(late, ours) == pytest.approx(1 / 4, rel=0.05)
    flat = np.full((4, 6), 0.1)
    assert statistic(ours, flat) == 1.0


def test_the_problem_of_the_figure_follows_its_rule():
    def two_steps(method, problem, first, last):
        """One path of two prefixes, right or not, that ends as a candidate."""
        rows = [(method, problem, 0, -1, 1, first, False), (method, problem, 1, 0, 2, last, True)]
        return pd.DataFrame(rows, columns=["method", "problem_id", "node", "parent", "step", "right", "ends"])

    both = [two_steps("pf", 1, True, True), two_steps("beam", 1, True, True)]
    lost = [two_steps("pf", 2, True, True), two_steps("beam", 2, True, False)]
    never = [two_steps("pf", 0, True, True), two_steps("beam", 0, False, False)]
    lucky = [two_steps("pf", -1, False, True), two_steps("beam", -1, True, False)]  # two errors that cancel
    assert plots.winning(both[0]) == {0, 1}
    assert plots.winning(lucky[0]) == set()
    assert plots.pick(pd.concat([*both, *lost, *never, *lucky])) == 2
    assert plots.pick(pd.concat([*both, *never])) == 0
    assert plots.pick(pd.concat([*lucky, two_steps("pf", 3, False, False)])) == -1


def test_a_smaller_share_is_part_of_a_larger_one():
    labels = pd.DataFrame({"problem": np.repeat(np.arange(100), 3), "rate": 0.5})
    small, large = (set(experiment._share(labels, share, 7)["problem"]) for share in (0.05, 0.25))
    assert (len(small), len(large)) == (5, 25)
    assert small < large
    assert small != set(experiment._share(labels, 0.05, 8)["problem"])


def test_arms_have_different_names_and_share_their_streams():
    cfg = compose("particle_filtering", "infer", ["profile=cpu"])
    listed = arms.listed(cfg)
    names = [(arm.task, arm.seed, arm.name) for arm in listed]
    assert len(set(names)) == len(names)
    trees = {arm.n for arm in listed if (arm.panel, arm.method, arm.task) == ("headline", "dvts", "countdown")}
    assert trees == {8, 16, 32}  # up to four beams they are beam search
    with pytest.raises(ValueError, match="unknown method 'mcts'; known: greedy, pool"):
        arms.search(cfg, arms.Arm("headline", "countdown", 4, "mcts"), [0], None, None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("main.widths=[0,4]", "main.widths=.0, 4. must rise and be at least 1"),
        ("main.widths=[4,10]", "those above width=4 must be multiples of it"),
        ("main.problems=2", "main needs 4 problems and a seed, not 2"),
        ("temperature=0.0", "temperature=0.0 must be positive"),
        ("tau=0.0", "tau must be positive"),
        ("weights=odds", "unknown weights 'odds'"),
        ("repeats.pairs=[[32,1],[16,3]]", "must all have the same product"),
    ],
)
def test_settings_out_of_range_are_refused_before_any_work(override, message):
    with pytest.raises(ValueError, match=message):
        experiment.check(compose("particle_filtering", "infer", ["profile=cpu", override]))
