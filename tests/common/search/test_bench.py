"""The comparison with its_hub: the adapters give it our models unchanged, and without it the table says so."""

import asyncio
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.generation.steps import State
from common.reasoners import policies
from common.search import bench
from common.search.score import RewardModel


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Chains with models that no stage has trained, in float64; a head that tells prefixes apart."""
    setup = bench.setups(3, tmp_path_factory.mktemp("empty"))[0]
    setup.policy.double()
    setup.reward.double()
    with torch.no_grad():
        setup.reward.score.weight.copy_(torch.linspace(-1, 1, setup.reward.score.weight.numel())[None])
    return setup


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"N": 4, "KEPT": 2, "MAX_STEPS": 4, "MAX_STEP_TOKENS": 8}.items():
        monkeypatch.setattr(bench, name, value)


def messages(prompt, text=""):
    """As its_hub's StepGeneration builds them."""
    own = [SimpleNamespace(role="user", content=prompt)]
    return [*own, SimpleNamespace(role="assistant", content=text)] if text else own


def test_untrained_models_are_named_so(setup):
    assert setup.models == "tiny, untrained"
    assert [s.task for s in bench.setups(2)] == ["chain", "countdown"]


@pytest.mark.parametrize("cached", [True, False])
def test_steps_and_scores_are_those_of_our_models(setup, cached):
    models = bench.Models(setup, "particle filter", 3, cached=cached, together=False)
    prompt, ids = setup.problems[1].prompt, setup.prompts[1]
    first = [m["content"] for m in asyncio.run(models.agenerate([messages(prompt)] * 4, stop=","))]
    second = [m["content"] for m in asyncio.run(models.agenerate([messages(prompt, t) for t in first], stop=","))]
    texts = [a + b for a, b in zip(first, second, strict=True)]
    states = [
        models.known[1, text] for text in texts
    ]  # read by the tokenizer again, digits in a row would be one token
    assert models.tokens == sum(len(state.tokens) for state in states)
    assert [setup.text(state.tokens) for state in states] == texts
    assert {len(state.ends) for state in states} == {2}
    if cached:
        sampler = setup.sampler("particle filter", 3)
        children = sampler.propose([State(1)] * 4, range(4))
        assert first == [setup.text(child.tokens) for child in children]
        longer = sampler.propose(children, range(4))
        assert texts == [setup.text(child.tokens) for child in longer]
    scores = asyncio.run(models.ascore(prompt, texts))
    for state, score in zip(states, scores, strict=True):
        alone = RewardModel(setup.reward, [ids])([State(0, state.tokens, (len(state.tokens),))])
        np.testing.assert_allclose(score, alone[0], atol=1e-6)
    assert len(set(first)) > 1  # samples of one problem differ


def test_an_ended_answer_is_scored_with_its_end(setup):
    """its_hub strips the end token of an answer before it asks for a score; the adapter must put it back."""
    models = bench.Models(setup, "particle filter", 0, cached=True, together=False)
    ended = tuple(policies.tokenizer()("A+4=7$")["input_ids"])
    models.known[0, "A+4=7$"] = State(0, ended, (len(ended),))
    expected = RewardModel(setup.reward, setup.prompts)([State(0, ended, (len(ended),))])
    assert asyncio.run(models.ascore(setup.problems[0].prompt, ["A+4=7"])) == pytest.approx(expected.tolist())


def test_concurrent_calls_meet_in_one_batch():
    sizes = []

    def call(keys):
        sizes.append(len(keys))
        return [key * 10 for key in keys]

    batch = bench._Batch(call)

    async def worker(numbers):
        first = await batch(numbers)
        return await batch(first)

    async def both():
        return await asyncio.gather(worker([1, 2]), worker([3]), worker([4, 5]))

    assert asyncio.run(both()) == [[100, 200], [300], [400, 500]]
    assert sizes == [5, 5]


def test_without_its_hub_the_table_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    table = bench.tables()["its hub"]
    assert len(table) == 1
    assert "not installed: pip install .[peers]" in table["note"][0]


@pytest.mark.parametrize("algorithm", ["particle filter", "beam search"])
def test_ours_does_not_depend_on_the_batches(setup, algorithm, monkeypatch):
    whole = bench.ours(setup, algorithm, 0)
    monkeypatch.setattr(bench, "ROWS", 1)
    assert bench.ours(setup, algorithm, 0) == whole


@pytest.mark.parametrize("algorithm", ["particle filter", "beam search"])
def test_its_hub_runs_with_our_models(setup, algorithm):
    pytest.importorskip("its_hub", reason="pip install .[peers]")
    for way in bench.WAYS:
        run = bench.its_hub(setup, algorithm, 0, way)
        assert len(run.texts) == 3
        assert run.tokens > 3 * bench.N
        assert run == bench.its_hub(setup, algorithm, 0, way)  # repeatable
    table = bench.against_its_hub(setup, algorithm, rounds=1)
    assert list(table["library"]) == ["ours", *(f"its_hub, {way}" for way in bench.WAYS)]
    assert table["difference_low"][1:].notna().all()
