"""Reward models: what they start from, what they are trained on, and that they learn it."""

import numpy as np
import pytest
import torch

from common.generation.steps import State
from common.models.build import build
from common.models.hub import save_model
from common.models.reward import labelled_batches, load_reward_model, reward_model, step_loss
from common.search.score import RewardModel
from common.training.data import IGNORED
from common.training.loop import TrainConfig, train

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 16}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_starts_from_the_language_model_with_even_scores(architecture):
    language = build(SIZES, architecture=architecture, pad_token_id=0)
    model = reward_model(language)
    ids = torch.randint(1, 16, (3, 7))
    hidden = language.base_model(ids).last_hidden_state
    assert torch.equal(model.base_model(ids).last_hidden_state, hidden)
    assert RewardModel(model, [[1, 2]])([State(0, (3,), (1,))]).tolist() == [0.5]


def test_labels_stand_where_the_prefixes_end():
    rows = [([1, 2, 3, 4], {1: 0.25, 3: 1.0}), ([5, 6], {1: 0.0}), ([7, 8, 9], {2: 0.5})]
    batch = labelled_batches(rows, 3)(0)[0]
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        row = next(r for r in rows if r[0] == ids[: len(r[0])] and not any(ids[len(r[0]) :]))
        assert {i: rate for i, rate in enumerate(labels) if rate != IGNORED} == row[1]


def test_the_loss_is_binary_cross_entropy():
    model = reward_model(build(SIZES, pad_token_id=0))
    torch.nn.init.normal_(model.score.weight)
    batch = labelled_batches([([1, 2, 3], {0: 0.3, 2: 1.0})], 1)(0)[0]
    with torch.no_grad():
        logits = model.score(model.model(batch.input_ids).last_hidden_state)[0, :, 0].double().numpy()
        expected = sum(
            -y * np.log(1 / (1 + np.exp(-z))) - (1 - y) * np.log(1 - 1 / (1 + np.exp(-z)))
            for z, y in ((logits[0], 0.3), (logits[2], 1.0))
        )
        assert step_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_learns_a_rule_and_survives_the_hub_format(tmp_path):
    """Prefixes whose last token is 3 lead to success, others do not."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(400):
        ids = random.integers(1, 6, size=8).tolist()
        rows.append((ids, {i: float(ids[i] == 3) for i in range(2, 8)}))
    model = reward_model(build(SIZES, pad_token_id=0, attention="eager"))
    train(model, labelled_batches(rows, 32), TrainConfig(steps=60, learning_rate=5e-3, warmup_steps=5), loss=step_loss)
    save_model(model, tmp_path / "prm")
    loaded = load_reward_model(tmp_path / "prm")
    scores = RewardModel(loaded, [[1, 2, 5]])([State(0, (4, last), (2,)) for last in (1, 2, 3, 4, 5)])
    assert scores[2] > 0.9
    assert max(np.delete(scores, 2)) < 0.1


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="do not fill a batch of 4 rows"):
        labelled_batches([([1], {0: 1.0})], 4)
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_reward_model(tmp_path / "nothing")
    model = build(SIZES)
    model.config.num_labels = 2
    with pytest.raises(ValueError, match="a reward model has one label, this one has 2"):
        RewardModel(model, [[1]])
