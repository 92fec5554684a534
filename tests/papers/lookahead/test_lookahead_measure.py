"""The experiment's own arithmetic, on cases whose results are known."""

import gc
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from common.generation.tree import no_draft
from common.models.build import build
from papers.lookahead import measure
from papers.lookahead.decoders import (
    Memoryless,
    Setting,
    Task,
    ask,
    choose_sizes,
    repetition,
    replayed,
    tokens_per_pass,
)
from papers.lookahead.judge import _unpaired, modelled_speed_up
from papers.lookahead.measure import bytes_of, margin, recorded
from papers.lookahead.method import DraftTrie


@pytest.fixture
def task():
    """Answers that count upwards from the prompt; the warm-up knows them as far as 30."""
    answers = {
        "warmup": [[*range(0, 20), 99], [*range(10, 30), 99]],
        "train": [[*range(5, 17), 99]],
        "test": [[*range(3, 15), 99], [*range(8, 20), 99]],
    }
    prompts = {split: [[50, answer[0] - 1] for answer in texts] for split, texts in answers.items()}
    return Task("counting", prompts, answers, 13, end=99)


def test_repetition_is_the_share_of_grams_that_came_before():
    assert repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 10) == pytest.approx(6 / 7)
    assert repetition([1, 2, 3, 4] * 2) == pytest.approx(1 / 5)
    assert repetition([1, 2]) == 0


def test_a_drafter_starts_from_the_warm_trie_each_time(task):
    setting = Setting(16, 4)
    first = replayed(task.drafter(setting), task)
    assert [run.accepted for run in replayed(task.drafter(setting), task)] == [run.accepted for run in first]
    assert task.learnt == [list(range(0, 20)), list(range(10, 30))]
    assert first[0].accepted == [5, 5, 3]  # four drafted and one more; the end token is in no trie
    assert tokens_per_pass(first) == 26 / 6


def test_without_learning_a_trie_ends_as_it_began(task):
    drafter = task.drafter(Setting(16, 4))
    nodes = drafter.trie.nodes
    replayed(drafter, task, learn=False)
    assert drafter.trie.nodes == nodes
    replayed(drafter, task)
    assert sum(child.output for child in drafter.trie.roots[3].children.values()) == 2  # and now it has learnt


def test_sizes_are_those_with_the_most_tokens_per_unit_of_time(task):
    class Settings:
        choose, branch_length = (2, 4, 8), 12

    assert choose_sizes(Settings, task, token_cost=0.0)["decoding_length"] == 8
    assert choose_sizes(Settings, task, token_cost=10.0)["decoding_length"] == 2


def test_the_configured_back_end_answers_from_the_saved_weights(tmp_path, monkeypatch):
    from common.generation import vllm
    from common.generation.ledger import Ledger
    from common.generation.sampler import Generation

    asked = []

    def backend(name, source, **settings):
        asked.append((name, source, settings))

        def generate(prompts, new_tokens, *, stop_tokens):
            asked.append((len(prompts), new_tokens, stop_tokens))
            return Generation([torch.tensor([prompt[0], 1]) for prompt in prompts], [True] * len(prompts), Ledger())

        return generate

    monkeypatch.setattr(vllm, "backend", backend)
    cfg = SimpleNamespace(
        backend="vllm",
        shared=tmp_path,
        device="cuda",
        dtype="float16",
        network=False,
        tasks=["t"],
        new_tokens=7,
        batch=2,
    )
    words = SimpleNamespace(chat_template=None, eos_token_id=1, encode=lambda text: [int(text)])
    rows = [{"task": "t", "split": s, "prompt": str(i)} for s in ("warmup", "train", "test") for i in range(2, 5)]
    (task,) = ask(cfg, "lm", words, rows, test=1)
    assert asked[0] == ("vllm", str(tmp_path / "lm"), {"device": "cuda", "dtype": torch.float16, "network": False})
    assert asked[1:] == [(2, 7, (1,)), (1, 7, (1,))] * 2 + [(1, 7, (1,))]
    assert task.answers == {"warmup": [[2, 1], [3, 1], [4, 1]], "train": [[2, 1], [3, 1], [4, 1]], "test": [[2, 1]]}


def test_recorded_passes_are_the_replayed_ones(task):
    passes = recorded(task.drafter(Setting(16, 4)), task, 0)
    assert [len(one.tokens) for one in passes] == [5, 5, 3]
    assert [one.path for one in passes] == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2]]
    assert [token for one in passes for token in one.tokens] == task.answers["test"][0]
    assert all(len(one.path) == 1 for one in recorded(Memoryless(no_draft), task, 1))


def test_modelled_speed_up_counts_each_pass_at_its_time():
    curve = pd.DataFrame({"tokens": [1, 3, 5], "ms": [2.0, 4.0, 8.0]})
    rows = pd.DataFrame({"new_tokens": [6, 2], "forwards": [2, 1], "drafted": [[1, 4], [5]]})
    assert modelled_speed_up(rows, curve) == pytest.approx(2.0 * 8 / (2 + 6 + 8))


def test_margin_is_that_of_the_place_where_texts_part():
    model = build({"vocab_size": 16, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}, seed=0)
    with torch.no_grad():
        two = model(input_ids=torch.tensor([[1, 2, 3]])).logits[0, -1].topk(2).values
    assert margin(model, [1, 2], [3, 4, 5], [3, 6, 5]) == pytest.approx(float(two[0] - two[1]), abs=1e-6)
    assert margin(model, [1, 2], [3], [3, 6]) == float("inf")


def test_unpaired_difference_of_ratios():
    same = np.array([[10.0, 5.0]] * 8)
    other = np.array([[9.0, 3.0]] * 12)
    got = _unpaired(other, same, seed=0)
    assert (got.value, got.low, got.high, got.n) == (1.0, 1.0, 1.0, 8)
    rng = np.random.default_rng(0)
    wide = _unpaired(rng.integers(1, 9, (50, 2)).astype(float), rng.integers(1, 9, (60, 2)).astype(float), seed=0)
    assert wide.low < wide.value < wide.high


def test_memory_grows_with_nodes():
    trie = DraftTrie(4)
    empty = bytes_of(trie)
    trie.insert_output(range(50))
    assert empty == 0
    assert bytes_of(trie) > 100 * trie.nodes


def test_tries_are_timed_without_the_cycle_collector(task, monkeypatch):
    compare, collecting = measure.compare, []

    def noting(*args, **options):
        collecting.append(gc.isenabled())
        return compare(*args, **options)

    monkeypatch.setattr(measure, "compare", noting)
    sweep = SimpleNamespace(capacities=[1, 4], prompts=2)
    cfg = SimpleNamespace(decoding_length=8, branch_length=4, sweep=sweep, timing=SimpleNamespace(rounds=1))
    rows = measure.capacities(cfg, task)
    assert [row["output_nodes_a_tree"] for row in rows] == [8, 32]
    assert collecting == [False]
    assert gc.isenabled()
