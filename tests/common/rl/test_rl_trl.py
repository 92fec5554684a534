"""Losses and gradients against those of TRL's trainers on the same batch, and the benchmark beside it."""

import importlib.util

import pytest
import torch

from common.models.build import build
from common.reasoners import policies
from common.rl import bench, dpo
from common.rl.advantages import dr_grpo
from common.rl.objectives import AGGREGATIONS, OBJECTIVES
from common.rl.rollout import log_probs, padded
from common.tasks import chain

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
EXACT = {"rtol": 1e-5, "atol": 1e-5}
PROBLEMS = chain.generate(0, 3, (2, 6), style="concise")  # prompts of several lengths


@pytest.fixture
def trl():
    return pytest.importorskip("trl", reason="pip install .[peers]")


@pytest.fixture
def words():
    words = policies.tokenizer()
    words.eos_token = policies.ANSWER_END
    return words


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in {"SIZES": SIZES, "PROMPTS": 3, "GROUP_SIZE": 8, "MAX_NEW_TOKENS": 40, "ROUNDS": 1}.items():
        monkeypatch.setattr(bench, name, value)


def gradient(model, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_dpo_is_that_of_trl(trl, words, tmp_path, beta):
    from datasets import Dataset

    policy, reference = (build(SIZES, vocab_size=len(words), seed=seed) for seed in (0, 1))
    rows = [
        {"prompt": PROBLEMS[0].prompt, "chosen": "A+4=7$", "rejected": "A+4=8,B*2=6$"},
        {"prompt": PROBLEMS[1].prompt, "chosen": "B-1=2,C+3=5$", "rejected": "9$"},
        {"prompt": PROBLEMS[2].prompt, "chosen": "7$", "rejected": "A*2=8,B+1=9,7$"},
    ]
    pairs = [dpo.Pair(*(words.encode(row[part]) for part in ("prompt", "chosen", "rejected"))) for row in rows]
    logp = dpo.pair_log_probs(policy, pairs)
    loss = dpo.dpo_loss(logp, dpo.pair_log_probs(reference, pairs).detach(), beta)
    own = gradient(policy, loss)

    config = trl.DPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=len(rows), beta=beta, loss_type=["sigmoid"],
        gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.DPOTrainer(policy, reference, config, train_dataset=Dataset.from_list(rows), processing_class=words)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(policy, batch)
    torch.testing.assert_close(loss, theirs, **EXACT)
    torch.testing.assert_close(own, gradient(policy, theirs), **EXACT)
    assert own.abs().max() > 0.01


@pytest.mark.parametrize(("theirs", "aggregate"), [("bnpo", "token_mean"), ("dr_grpo", "seq_mean_token_sum_norm")])
def test_grpo_is_that_of_trl(trl, words, theirs, aggregate):
    """The same answers through both, from rewards to gradient: TRL pads prompts on the left and answers on the right,
    ours the whole on the right. The old log-probabilities are moved, so that ratios are clipped at either end."""
    trainer = bench.trl_trainer(PROBLEMS, [], [])
    trainer.loss_type = theirs
    trainer.reward_funcs[0] = lambda completion_ids, **_: [float(sum(ids) % 3) for ids in completion_ids]
    rows = [row for row in trainer.train_dataset for _ in range(bench.GROUP_SIZE)]
    batch = trainer._generate_and_score_completions(rows)
    noise = 0.3 * torch.randn(batch["old_per_token_logps"].shape, generator=torch.Generator().manual_seed(0))
    batch["old_per_token_logps"] += noise
    loss = trainer.compute_loss(trainer.model, batch)
    expected = gradient(trainer.model, loss)

    prompts, answers = (
        [row[on.bool()].tolist() for row, on in zip(batch[f"{part}_ids"], batch[f"{part}_mask"], strict=True)]
        for part in ("prompt", "completion")
    )
    assert prompts == [words.encode(PROBLEMS[n // bench.GROUP_SIZE].prompt) for n in range(len(prompts))]
    assert len({len(answer) for answer in answers}) > 1
    ids, response = padded(prompts, answers)
    reward = torch.tensor([float(sum(answer) % 3) for answer in answers])
    advantage = dr_grpo(reward.view(-1, bench.GROUP_SIZE)).flatten()
    torch.testing.assert_close(advantage, batch["advantages"], **EXACT)
    logp, _ = log_probs(trainer.model, ids, response)
    old = torch.zeros(ids.shape).masked_scatter(response, batch["old_per_token_logps"][batch["completion_mask"].bool()])
    moved = (logp.detach() - old)[response].exp()
    assert ((moved < 0.8).any(), (moved > 1.28).any()) == (True, True)
    gain = OBJECTIVES["dapo"](logp, old, advantage[:, None] * response)
    own = -AGGREGATIONS[aggregate](gain, response, bench.MAX_NEW_TOKENS)
    torch.testing.assert_close(own, loss, **EXACT)
    torch.testing.assert_close(gradient(trainer.model, own), expected, **EXACT)
    assert expected.abs().max() > 0.01


def test_the_benchmark_has_ours_alone_without_trl(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tables = bench.tables()
    assert list(tables["grpo step"]["library"]) == ["ours", "trl"]
    assert "not installed: pip install .[peers]" in tables["grpo step"]["note"][1]
    parts = tables["parts of a grpo step"]
    assert set(parts["library"]) == {"ours"}
    assert parts["part"][0] == "step"
    assert (parts["seconds"][:3] > 0).all()


def test_the_benchmark_runs_both(trl):
    tables = bench.tables()
    assert tables["grpo step"]["x_ours"].notna().all()
    assert (tables["grpo step"]["tokens_per_step"] > 24).all()
    assert list(tables["parts of a grpo step"]["library"]) == ["ours"] * 4 + ["trl"] * 4


def test_a_run_of_trl_is_one_rollout_and_its_updates(trl):
    tokens: list[int] = []
    seconds: list[float] = []
    trainer = bench.trl_trainer(PROBLEMS, tokens, seconds)
    for runs in (1, 2):
        trainer.train()
        assert (trainer.state.global_step, len(tokens), len(seconds)) == (bench.MINIBATCHES, runs, runs)
