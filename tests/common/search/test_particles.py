"""The particle filter and its relatives against enumeration of a toy language model."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from common.search import particles
from common.search.core import Budget
from common.search.particles import Weighting, parallel_chains, particle_filter, particle_gibbs

spec = importlib.util.spec_from_file_location("toy", Path(__file__).with_name("toy.py"))
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)

INDEX = {sequence: i for i, sequence in enumerate(toy.SEQUENCES)}
PRIOR = np.array([toy.prior(s) for s in toy.SEQUENCES])
ODDS = np.array([np.prod([toy.SCORES[s[:t]] / (1 - toy.SCORES[s[:t]]) for t in (1, 2, 3)]) for s in toy.SEQUENCES])
ACCEPTED = np.array([np.prod([toy.SCORES[s[:t]] for t in (1, 2, 3)]) for s in toy.SEQUENCES])
LOG = Weighting(kind="log")


def counts(states):
    return np.bincount([INDEX[state.tokens] for state in states], minlength=len(INDEX))


def chi_square(observed, expected):
    """p-value, with cells of fewer than 5 expected draws put together."""
    expected = expected / expected.sum() * observed.sum()
    small = expected < 5
    if small.any():
        observed = np.append(observed[~small], observed[small].sum())
        expected = np.append(expected[~small], expected[small].sum())
    return stats.chisquare(observed, expected).pvalue


def test_evidence_is_unbiased():
    """The product of the mean weights against the enumerated sum over all sequences, kind 'log' and 'logit'."""
    runs = 8000
    for weighting, weight in ((LOG, ACCEPTED), (Weighting(), ODDS)):
        result = particle_filter(range(runs), toy.propose(1), toy.score, n=4, seed=3, weighting=weighting)
        evidence = np.exp([sum(step["log_mean_weight"] for step in trace) for trace in result.trace])
        error = evidence.std(ddof=1) / np.sqrt(runs)
        assert abs(evidence.mean() - (PRIOR * weight).sum()) < 4 * error


def test_error_of_the_self_normalised_estimate_falls_like_one_over_n():
    """Bias of P(first symbol is 0) under the accepted trajectories; particles weighted by their last weights."""
    target = PRIOR * ACCEPTED / (PRIOR * ACCEPTED).sum()
    exact = sum(p for s, p in zip(toy.SEQUENCES, target, strict=True) if s[0] == 0)
    bias = []
    for n, runs in ((2, 12000), (16, 3000)):
        result = particle_filter(range(runs), toy.propose(2), toy.score, n=n, seed=4, weighting=LOG)
        estimates = []
        for states, trace in zip(result.pool, result.trace, strict=True):
            weights = np.exp(trace[-1]["log_weights"])
            estimates.append(np.average([s.tokens[0] == 0 for s in states], weights=weights))
        bias.append(abs(np.mean(estimates) - exact))
    assert bias[1] < 0.35 * bias[0]


def test_a_constant_score_leaves_the_language_model():
    """The law of each final particle is the model's; particles of one run are dependent, so one a run is counted."""
    result = particle_filter(range(6000), toy.propose(5), toy.constant, n=3, seed=6)
    assert chi_square(counts([states[0] for states in result.pool]), PRIOR) > 0.001


def test_a_large_tau_resamples_evenly_and_a_small_one_copies_the_best():
    even = particle_filter(range(4000), toy.propose(7), toy.score, n=3, seed=8, weighting=Weighting(tau=1e9))
    assert chi_square(counts([states[1] for states in even.pool]), PRIOR) > 0.001
    sharp = particle_filter(range(50), toy.propose(7), toy.score, n=4, seed=8, weighting=Weighting(tau=1e-6))
    for trace in sharp.trace:
        for step in trace[:-1]:
            assert {step["log_weights"][i] for i in step["ancestors"]} == {max(step["log_weights"])}


@pytest.mark.parametrize("tau", [0.1, 1.0, 10.0])
def test_one_particle_is_one_ancestral_sample(tau):
    result = particle_filter(range(100), toy.propose(9), toy.score, n=1, weighting=Weighting(tau=tau))
    states = [toy.State(p) for p in range(100)]
    for _ in range(toy.STEPS):
        states = toy.propose(9)(states, [0] * 100)
    assert [pool[0].tokens for pool in result.pool] == [state.tokens for state in states]


def test_gibbs_leaves_the_exact_posterior_invariant():
    """From an exact posterior draw one conditional sweep gives a draw of the same law."""
    posterior = PRIOR * ACCEPTED / (PRIOR * ACCEPTED).sum()
    runs = 6000
    start = np.random.default_rng(0).choice(len(posterior), size=runs, p=posterior)
    references = {p: _finished(p, toy.SEQUENCES[i]) for p, i in enumerate(start)}
    result = particle_gibbs(
        range(runs), toy.propose(11), toy.score, n=3, iterations=1, seed=12, weighting=LOG, references=references
    )
    after = [trace[-1]["reference"] for trace in result.trace]
    assert chi_square(counts(after), posterior) > 0.001
    moved = np.mean([state.tokens != references[p].tokens for p, state in enumerate(after)])
    assert moved > 0.2


def _finished(problem, sequence):
    scores = tuple(toy.SCORES[sequence[:t]] for t in (1, 2, 3))
    return toy.State(problem, sequence, (1, 2, 3), True, (0.0, 0.0, 0.0), scores)


def test_a_lone_reference_returns_itself():
    reference = _finished(0, (1, 2, 0))
    result = particle_gibbs([0], toy.propose(1), toy.score, n=1, iterations=4, references={0: reference})
    assert {state.tokens for state in result.pool[0]} == {(1, 2, 0)}


def test_the_reference_is_weighted_by_the_score_of_the_same_step():
    reference = _finished(0, (1, 2, 0))
    result = particle_filter([0], toy.propose(1), toy.score, n=3, references={0: reference}, weighting=LOG)
    for t, step in enumerate(result.trace[0], start=1):
        assert step["log_weights"][-1] == pytest.approx(np.log(toy.SCORES[(1, 2, 0)[:t]]))


def test_copies_of_the_reference_go_on_from_where_they_were_cut():
    """Scores that favour the reference make the free particles its copies: they share its beginning and go on."""
    reference = _finished(0, (0, 0, 0))

    def favours(states):
        return np.array([0.999 if s.tokens == (0, 0, 0)[: len(s.tokens)] else 0.001 for s in states])

    reference = particles.replace(reference, scores=(0.999, 0.999, 0.001))
    seen = set()
    for seed in range(40):
        result = particle_filter([0], toy.propose(seed), favours, n=4, seed=seed, references={0: reference})
        seen |= {state.tokens for state in result.pool[0][:-1]}
        assert all(len(state.tokens) == toy.STEPS and len(state.scores) == toy.STEPS for state in result.pool[0])
    assert any(tokens[:2] == (0, 0) for tokens in seen)


def test_chains_of_equal_temperature_always_swap_and_cover_the_posterior():
    result = parallel_chains(range(200), toy.propose(3), toy.score, n=2, taus=(1.0, 1.0), iterations=2, seed=1)
    assert all(len(pool) == 2 * 2 * 2 for pool in result.pool)


@pytest.mark.parametrize("resampler", ["multinomial", "systematic", "stratified", "residual"])
def test_resamplers_are_unbiased(resampler):
    from common.generation.random import draws, keys
    from common.search.resample import RESAMPLERS

    weights = np.array([0.05, 0.4, 0.25, 0.3])
    u = draws(keys(1, np.arange(4000)), 5)
    taken = np.array([np.bincount(RESAMPLERS[resampler](weights, row), minlength=4) for row in u])
    assert (taken.sum(1) == 5).all()
    error = taken.std(0, ddof=1) / np.sqrt(len(taken))
    assert (np.abs(taken.mean(0) - 5 * weights) < 4 * error + 1e-12).all()
    if resampler != "multinomial":
        assert (taken.var(0) < 5 * weights * (1 - weights)).all()


def test_resampling_by_effective_size_is_unbiased_too():
    runs = 8000
    weighting = Weighting(kind="log", ess=0.6)
    result = particle_filter(range(runs), toy.propose(21), toy.score, n=4, seed=3, weighting=weighting)
    evidence = []
    for trace in result.trace:
        log = 0.0
        for step in trace:  # where nothing was resampled the weights carry on, and so does the mean
            due = particles.effective_sample_size(particles.softmax(np.array(step["log_weights"]))) < 0.6 * 4
            if due or step is trace[-1]:
                log += step["log_mean_weight"]
        evidence.append(np.exp(log))
    error = np.std(evidence, ddof=1) / np.sqrt(runs)
    assert abs(np.mean(evidence) - (PRIOR * ACCEPTED).sum()) < 4 * error


def test_finished_particles_are_left_alone_without_inactive():
    def propose(states, samples):
        return [
            toy.State(
                s.problem, (*s.tokens, i), (*s.ends, len(s.tokens) + 1), i == 0 or len(s.tokens) == 3, (), s.scores
            )
            for s, i in zip(states, samples, strict=True)
        ]

    result = particle_filter([0], propose, toy.constant, n=3, weighting=Weighting(inactive=False))
    assert result.pool[0][0].tokens == (0,)


def test_budget_stops_with_at_most_one_batch_more():
    result = particle_filter(range(5), toy.propose(1), toy.score, Budget(tokens=5), n=4)
    assert {cost.tokens for cost in result.cost} == {8}
    assert {cost.passes for cost in result.cost} == {8}
    full = particle_filter(range(5), toy.propose(1), toy.score, n=4)
    assert {(cost.tokens, cost.passes, cost.steps) for cost in full.cost} == {(12, 12, 12)}


def test_results_do_not_depend_on_the_batch():
    together = particle_filter(range(20), toy.propose(1), toy.score, n=4, seed=2)
    backwards = particle_filter(range(19, -1, -1), toy.propose(1), toy.score, n=4, seed=2)
    alone = particle_filter([7], toy.propose(1), toy.score, n=4, seed=2)
    assert together.pool == backwards.pool[::-1]
    assert together.pool[7] == alone.pool[0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: particle_filter([0], toy.propose(0), toy.score, n=0), "n must be at least 1, not 0"),
        (lambda: Weighting(tau=0.0), "tau must be positive, not 0"),
        (lambda: Weighting(kind="odds"), "unknown weights 'odds'; known: logit, log, raw"),
        (lambda: Weighting(resampler="roulette"), "unknown resampler 'roulette'; known: multinomial"),
        (lambda: Weighting(ess=2.0), r"ess is a share of the particles in \(0, 1\], not 2"),
        (lambda: Budget(tokens=0), "tokens=0 is too small for one step"),
        (lambda: particle_filter([], toy.propose(0), toy.score, n=1), "no problems"),
        (lambda: particle_filter([1, 1], toy.propose(0), toy.score, n=1), "1 problems stand twice"),
        (lambda: particle_gibbs([0], toy.propose(0), toy.score, n=1, iterations=0), "iterations must be at least 1"),
        (
            lambda: particle_filter([0], toy.propose(0), lambda s: np.full(len(s), np.nan), n=2),
            "<lambda> gave the score nan",
        ),
        (lambda: particle_filter([0], toy.propose(0), lambda s: np.full(len(s), 1.5), n=2), "scores lie in"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
