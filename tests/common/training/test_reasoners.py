"""The reasoners and their reward models in tiny sizes: what the stages write, and that it fits together."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from omegaconf import OmegaConf

from common.generation.steps import State
from common.models.hub import load_model, load_tokenizer
from common.models.reward import load_reward_model
from common.search.score import RewardModel
from common.shared import reasoners, rewards
from common.tasks import chain, countdown

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
TINY = {
    "models": {"base": {"model": SIZE, "steps": 6, "learning_rate": 1e-3}},
    "data": {
        "chain": {"problems": 60, "steps": [2, 6], "hard": [5, 6], "rows": 8},
        "countdown": {"problems": 60, "numbers": [2, 3], "hard": 3, "rows": 8},
    },
    "training": {"warmup_steps": 1, "checkpoint_every": 2},
    "watch": {"from": 2, "every": 2, "problems": 4},
    "rewards": {
        "problems": {"chain": 30, "countdown": 30}, "held_out": {"chain": 12, "countdown": 12}, "prefixes": 2,
        "rollouts": 2, "steps": 4, "rows": 8,
    },
}  # fmt: skip


def configuration(folder, stage):
    (folder / stage).mkdir(exist_ok=True)
    paths = {"shared": str(folder), "out": str(folder / stage), "checkpoints": str(folder / "checkpoints")}
    own = OmegaConf.create({"seed": 0, "stage": stage, "device": "cpu", "reasoners": TINY, **paths})
    full = OmegaConf.load(Path(reasoners.__file__).parent / "conf" / "reasoners.yaml")
    return OmegaConf.merge(full, own)


def test_tokenizer_reads_every_text_of_the_tasks_and_gives_it_back():
    words = reasoners.tokenizer()
    problems = countdown.generate(0, 200, (2, 5), backtrack=0.3)
    problems += [p for style in chain.STYLES for p in chain.generate(0, 100, (1, 20), style=style)]
    for problem in problems:
        ids = words.encode(problem.prompt + problem.answer)
        assert words.unk_token_id not in ids
        assert words.decode(ids) == problem.prompt + problem.answer


@pytest.mark.slow
def test_reasoner_and_rewards_fit_together(tmp_path):
    reasoners.train(configuration(tmp_path, "reasoner_base"))
    metrics = json.loads((tmp_path / "reasoner_base" / "metrics.json").read_text())
    for name in ("final", "chain_hard", "countdown"):
        model = load_model(tmp_path / "reasoner_base" / name)
        assert model.config.vocab_size == len(load_tokenizer(tmp_path / "reasoner_base" / name))
        assert {"chain 2", "countdown 3"} <= set(metrics[name]["accuracy"])
    assert metrics["chain_hard"]["step"] in (2, 4, 6)
    for stage, train in (("prm", rewards.train_prm), ("orm", rewards.train_orm)):
        train(configuration(tmp_path, stage))
        words = reasoners.tokenizer()
        score = RewardModel(load_reward_model(tmp_path / stage), [words.encode("1A+2B*3=")])
        values = score([State(0, tuple(words.encode("A+2=3,")), (6,))])
        assert 0 < values[0] < 1
        assert "chain brier" in json.loads((tmp_path / stage / "metrics.json").read_text())
    labels = pd.read_parquet(tmp_path / "prm" / "labels.parquet")
    assert labels["rate"].between(0, 1).all()
    assert set(labels["task"]) == {"chain", "countdown"}
    finished = labels[labels["finished"]]
    assert finished["rate"].isin([0, 1]).all()
    assert (finished["text"] == finished["answer"]).all()


@pytest.mark.slow
def test_styles_are_trained_without_a_watch(tmp_path):
    reasoners.train(configuration(tmp_path, "reasoner_mixed"))
    assert [p.name for p in (tmp_path / "reasoner_mixed").iterdir() if p.is_dir()] == ["final"]


def test_weights_nearest_the_middle_are_kept_also_after_a_restart(tmp_path):
    from common.models.build import build

    model = build(SIZE)
    kept = reasoners._Kept(tmp_path / "k", (0.2, 0.4))
    for step, accuracy in ((1, 0.9), (2, 0.35), (3, 0.1), (4, 0.36)):
        kept.offer(model, accuracy, step)
    assert (kept.step, kept.accuracy, kept.inside) == (2, 0.35, True)
    again = reasoners._Kept(tmp_path / "k", (0.2, 0.4))
    again.offer(model, 0.5, 5)
    assert again.step == 2


def test_quality_of_a_perfect_and_of_a_useless_scorer():
    labels = pd.DataFrame({"task": "chain", "step": 1, "rate": np.repeat([0.0, 1.0], 50)})
    perfect, table = rewards.quality(labels, labels["rate"].to_numpy())
    assert perfect["chain auroc"] == 1
    assert perfect["chain brier"] == 0
    assert table["prefixes"].sum() == 100
    useless, _ = rewards.quality(labels, np.full(100, 0.5))
    assert useless["chain auroc"] == 0.5
