"""The RL papers on checkpoints in hub format and a benchmark's problems: tiny ones, no network."""

import json

import pandas as pd
import pytest
from omegaconf import OmegaConf

from common.generation import records
from common.rl.ground import asked, ground
from common.run import run

ROWS = [{"question": f"What is {i}+1?", "answer": f"It is <<{i}+1={i + 1}>>{i + 1}.\n#### {i + 1}"} for i in range(40)]
LEVELS = [
    {"problem": f"${i}+1$?", "solution": f"\\boxed{{{i + 1}}}", "answer": str(i + 1), "level": 1 + i % 5}
    for i in range(10)
]
SMALL = [
    "rl.prompts=2", "rl.group_size=2", "rl.train.steps=2", "rl.train.evaluate_every=1", "rl.train.minibatches=2",
    "rl.train.learning_rate=1e-4", "evaluation.problems=2", "seeds=[0,1]",
]  # fmt: skip


@pytest.fixture
def benchmark(monkeypatch):
    from common.tasks import benchmark

    def rows(name, root, network):
        return ROWS if name.startswith("gsm8k") else LEVELS

    monkeypatch.setattr(benchmark, "rows", rows)


def run_all(slug, folder, overrides):
    for stage in ("train", "infer"):
        run(slug, stage, ["profile=paper", "device=cpu", *overrides], root=folder)
    out = run(slug, "figures", ["profile=paper", "device=cpu", *overrides], root=folder)
    return json.loads((out / "claims.json").read_text()), folder / "artifacts" / "paper" / slug


@pytest.mark.slow
def test_klear_reasoner_trains_a_checkpoint(checkpoint, benchmark, tmp_path):
    own = ["final.problems=3", "rl.train.max_new_tokens=6", "rl.selector=keep_all", f"rl.start={checkpoint}"]
    claims, written = run_all("klear_reasoner", tmp_path, SMALL + own)
    found = records.read(written / "infer" / "records.parquet")
    assert set(found["task"]) == {"gsm8k"}
    assert claims["c2"]["reason"] == "students of 0 training seeds; needs 3"
    assert (pd.read_parquet(written / "train" / "steps.parquet")["tokens_generated"] > 0).all()


@pytest.mark.slow
def test_self_aligned_reward_trains_a_checkpoint(checkpoint, benchmark, tmp_path):
    own = ["final.problems=3", "rl.train.max_new_tokens=6", "timing.rounds=1", f"checkpoint={checkpoint}"]
    claims, written = run_all("self_aligned_reward", tmp_path, SMALL + own)
    assert "for chains alone" in claims["c3"]["reason"]
    assert claims["c8"]["measured"]["further forward passes a rollout"]["value"] == 1
    steps = pd.read_parquet(written / "train" / "steps.parquet")
    assert steps[steps["arm"] == "self_aligned"]["reward/self_aligned"].between(-1, 1).all()
    assert not (written / "train" / "start").exists()


@pytest.mark.slow
def test_anytime_reasoner_trains_a_checkpoint(checkpoint, benchmark, tmp_path):
    budgets = "[4,8]"
    arms = ("grpo_linear", "grpo_decouple", "ar_base", "ar_linear", "ar_uniform", "grpo_vr")
    own = [
        f"rl.start={checkpoint}", "rl.forcing.budgets=[8]", "rl.forcing.max_answer_tokens=4",
        "rl.train.max_new_tokens=12", "timing.rounds=1", "sweep.problems=4", "sweep.budgets=[2,4,8]",
        "evaluation.budgets=[4,8]",
        "variance.problems=3", "variance.group_size=2",
        *(f"arms.{arm}.forcing.budgets={budgets}" for arm in arms),
    ]  # fmt: skip
    claims, written = run_all("anytime_reasoner", tmp_path, SMALL + own)
    found = records.read(written / "infer" / "records.parquet")
    assert set(found["task"]) == {"math500"}
    assert claims["c10"]["verdict"] == "reproduced"
    thoughts = pd.read_parquet(written / "infer" / "thoughts.parquet")
    assert (thoughts["length"] <= 8).all()


def test_a_checkpoint_is_asked_in_its_own_format(checkpoint, benchmark):
    task = {"name": "math500", "train": "gsm8k", "told": "Think."}
    cfg = OmegaConf.create({"data_root": None, "network": False, "device": "cpu"})
    on = ground(cfg, OmegaConf.create({"start": str(checkpoint), "task": task}))
    (problem,) = on.problems(0, "test", 1)
    assert problem.prompt.startswith("<user>Problem: $")
    assert problem.prompt.endswith("Think.</><assistant>")
    (trained,) = on.problems(0, "train", 1)
    assert trained.task == "gsm8k"
    assert on.verify(trained, f"So the answer is {trained.result}.")
    assert on.ends == (on.words.eos_token_id,)
    assert on.longer is None
    on.words.chat_template = None
    assert asked(on.words, "Think.", "Why?") == "Think.\n\nWhy?\n"


def test_programs_are_no_reward():
    cfg = OmegaConf.create({"data_root": None, "network": False, "device": "cpu"})
    of = OmegaConf.create({"start": "x", "task": {"name": "humaneval", "train": None, "told": ""}})
    with pytest.raises(ValueError, match="humaneval: rewards run no programs here"):
        ground(cfg, of)
