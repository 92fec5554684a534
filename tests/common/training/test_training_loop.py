"""The training loop: it learns, stops where it should, and can be killed at any moment."""

import itertools
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.models.build import ModelConfig, build
from common.training import loop
from common.training.checkpoint import checkpoint_folder
from common.training.data import IGNORED, Batch, Example, bucketed, collate, joined, mixture, pack, repeats, windows
from common.training.loop import TrainConfig, TrainState, held_out_loss, learning_rate_at, next_token_loss, train

ROOT = Path(__file__).resolve().parents[3]
TINY = ModelConfig(vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
CONFIG = TrainConfig(steps=12, learning_rate=1e-2, warmup_steps=2, evaluate_every=4, checkpoint_every=3)
BATCHES = mixture(repeats(12, 4, 10, seed=1))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(seed: int = 0) -> torch.nn.Module:
    return build(TINY, seed=seed, attention="eager")


def held_out() -> list[Batch]:
    return [repeats(12, 8, 10, seed=2)(0)]


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_first_step_is_adamw_on_the_mean_loss():
    """One step against a literal one: torch's AdamW without decay on the mean cross entropy, rate of the schedule."""
    config = TrainConfig(steps=1, learning_rate=1e-2, warmup_steps=0, weight_decay=0.0, clip_norm=1e9)
    model, literal = tiny(), tiny()
    train(model, BATCHES, config)
    batch = BATCHES(0)[0]
    optimizer = torch.optim.AdamW(literal.parameters(), lr=1e-2, betas=config.betas, weight_decay=0.0)
    literal(batch.input_ids, labels=batch.labels).loss.backward()
    optimizer.step()
    torch.testing.assert_close(weights(model), weights(literal), atol=1e-6, rtol=1e-4)


def test_loss_is_transformers_loss_and_parts_add_up():
    model = tiny()
    batch = collate([Example([1, 2, 3, 4, 5], 2), Example([6, 7, 8], 1)])
    expected = model(batch.input_ids, labels=batch.labels).loss
    labels = int((batch.labels != IGNORED).sum())
    torch.testing.assert_close(next_token_loss(model, batch) / labels, expected)
    rows = [Batch(batch.input_ids[i : i + 1], batch.labels[i : i + 1]) for i in range(2)]
    assert held_out_loss(model, rows) == pytest.approx(expected.item(), rel=1e-6)


def test_learning_rate_schedule():
    config = TrainConfig(steps=110, learning_rate=1.0, warmup_steps=10, final_rate=0.1)
    rates = [learning_rate_at(step, config) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.55)
    assert rates[110] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_it_learns_to_copy():
    def twice(step: int) -> list[Batch]:
        half = torch.randint(12, (32, 6), generator=torch.Generator().manual_seed(step))
        return [Batch(torch.cat([half, half], 1), torch.cat([torch.full_like(half, IGNORED), half], 1))]

    model = build(replace(TINY, hidden_size=32, num_hidden_layers=2), attention="eager")
    state = train(model, twice, TrainConfig(steps=250, learning_rate=1e-2, evaluate_every=50))
    losses = [row["train_loss"] for row in state.history]
    assert losses[0] > 1.5
    assert losses[-1] < 0.1
    assert not model.training
    assert state.tokens == 250 * 32 * 12


def test_bf16_is_close_to_float32_in_one_step():
    runs = {}
    for bf16 in (False, True):
        model = tiny()
        runs[bf16] = train(model, BATCHES, replace(CONFIG, steps=1, bf16=bf16, patience=None)).history[0]["train_loss"]
    assert runs[True] != runs[False]
    assert runs[True] == pytest.approx(runs[False], rel=2e-2)


@pytest.mark.parametrize("interrupted_after", [1, 5, 7])
def test_resume_is_bit_identical(tmp_path, interrupted_after):
    """Stopped by an error of the batches after some steps, then resumed: as if nothing had happened."""
    whole = tiny()
    record = train(whole, BATCHES, CONFIG, held_out=held_out())

    def failing(step: int) -> list[Batch]:
        if step == interrupted_after:
            raise RuntimeError("stop")
        return BATCHES(step)

    with pytest.raises(RuntimeError, match="stop"):
        train(tiny(), failing, CONFIG, held_out=held_out(), checkpoints=tmp_path)
    resumed = tiny(seed=99)  # its weights must not matter where a checkpoint was written
    if interrupted_after < CONFIG.checkpoint_every:
        resumed = tiny()
    state = train(resumed, BATCHES, CONFIG, held_out=held_out(), checkpoints=tmp_path)
    assert state.resumed_from == interrupted_after // 3 * 3
    assert torch.equal(weights(resumed), weights(whole))
    drop = {"seconds"}
    assert [{k: v for k, v in row.items() if k not in drop} for row in state.history if row["step"] > 6] == [
        {k: v for k, v in row.items() if k not in drop} for row in record.history if row["step"] > 6
    ]
    again = train(tiny(seed=5), BATCHES, CONFIG, held_out=held_out(), checkpoints=tmp_path)
    assert again.step == again.resumed_from == 12


SCRIPT = """
    import sys, time, torch
    from pathlib import Path
    torch.set_num_threads(1)
    from common.models.build import ModelConfig, build
    from common.training.data import mixture, repeats
    from common.training.loop import TrainConfig, train
    model = build(ModelConfig(vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                              intermediate_size=16), attention="eager")
    batches = mixture(repeats(12, 4, 10, seed=1))
    def slow(step):
        print(step, flush=True)
        time.sleep(float(sys.argv[2]))
        return batches(step)
    train(model, slow, TrainConfig(steps=40, learning_rate=1e-2, warmup_steps=2, checkpoint_every=1),
          checkpoints=Path(sys.argv[1]))
    torch.save(model.state_dict(), Path(sys.argv[1]) / "final.pt")
"""


def start(folder: Path, pause: float) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), str(pause)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_until(process: subprocess.Popen, step: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) == step:
            return
    raise AssertionError(f"ended before step {step}: {process.stderr.read() if process.stderr else ''}")


@pytest.mark.slow
def test_killed_and_resumed_is_bit_identical(tmp_path):
    """SIGKILL at two arbitrary moments, then to the end; against a run without interruption."""
    straight = start(tmp_path / "straight", 0)
    assert straight.communicate()[1] == ""
    for step, delay in ((7, 0.004), (23, 0.0)):
        process = start(tmp_path / "killed", 0.01)
        read_until(process, step)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert (tmp_path / "killed" / "checkpoint.pt").exists()
    last = start(tmp_path / "killed", 0)
    steps = [int(line) for line in last.communicate()[0].split()]
    assert 20 < steps[0] <= 24
    one, other = (torch.load(tmp_path / name / "final.pt", weights_only=True) for name in ("straight", "killed"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.slow
def test_ctrl_c_writes_a_checkpoint_of_the_step(tmp_path):
    process = start(tmp_path, 0.05)
    read_until(process, 9)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode != 0
    assert "KeyboardInterrupt: stopped after step" in errors
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert f"stopped after step {content['state']['step']}" in errors


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_that_is_not_a_number_stops_with_the_step_named(tmp_path, where):
    def poisoned(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        loss = next_token_loss(model, batch)
        if poisoned.calls == 7:
            loss = loss * math.nan if where == "loss" else loss + (next(model.parameters()).sum() * 0).sqrt()
        poisoned.calls += 1
        return loss

    poisoned.calls = 0
    config = replace(CONFIG, evaluate_every=0, shards=1)
    with pytest.raises(FloatingPointError, match=r"step 8: loss .* gradient norm"):
        train(tiny(), BATCHES, config, checkpoints=tmp_path, loss=poisoned)
    content = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert content["state"]["step"] == 6
    assert all(torch.isfinite(tensor).all() for tensor in content["model"].values())


def test_early_stopping_returns_the_best_weights(monkeypatch):
    losses = iter([3.0, 2.0, 2.5, 2.4, 1.0])
    seen = []

    def fake(model, batches, loss):
        seen.append(weights(model).clone())
        return next(losses)

    monkeypatch.setattr(loop, "held_out_loss", fake)
    model = tiny()
    state = train(model, BATCHES, replace(CONFIG, steps=40, patience=2), held_out=held_out())
    assert state.stopped_early
    assert state.step == 16
    assert state.best_loss == 2.0
    assert torch.equal(weights(model), seen[1])


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    train(tiny(), BATCHES, CONFIG, checkpoints=tmp_path)
    with pytest.raises(ValueError, match=r"learning_rate=0.01 there, 0.1 here"):
        train(tiny(), BATCHES, replace(CONFIG, learning_rate=0.1), checkpoints=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps must be positive, not 0"),
        ({"learning_rate": math.nan}, "learning_rate must be positive, not nan"),
        ({"warmup_steps": -1}, "warmup_steps must not be negative, not -1"),
        ({"patience": 2, "evaluate_every": 0}, "patience=2"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **settings)


def test_patience_needs_held_out_batches():
    with pytest.raises(ValueError, match="patience=1 needs held-out batches"):
        train(tiny(), BATCHES, replace(CONFIG, patience=1))


def test_state_starts_empty():
    assert TrainState().history == []


def test_buckets_cover_an_epoch_once_and_group_lengths():
    examples = [Example([i] * (1 + i % 9), 0) for i in range(100)]
    source = bucketed(examples, 4, seed=3, pool=5)
    for epoch in range(2):
        batches = [source(epoch * 25 + i) for i in range(25)]
        firsts = sorted(int(row[0]) for batch in batches for row in batch.input_ids)
        assert firsts == list(range(100))
        assert sum(int((batch.labels == IGNORED).sum()) for batch in batches) < 100
    assert not torch.equal(source(0).input_ids[:, 0], source(25).input_ids[:, 0])
    assert torch.equal(source(7).input_ids, bucketed(examples, 4, seed=3, pool=5)(7).input_ids)
    with pytest.raises(ValueError, match="100 examples do not fill a batch of 101"):
        bucketed(examples, 101)


def test_collate_marks_prompts_and_padding():
    batch = collate([Example([1, 2, 3], 2), Example([4], 0)], pad_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, 3], [4, IGNORED, IGNORED]]
    with pytest.raises(ValueError, match="at least one example"):
        collate([])


def test_windows_of_a_packed_stream():
    stream = pack([[1, 2], [3], [4, 5, 6]], end_id=0)
    assert stream.tolist() == [1, 2, 0, 3, 0, 4, 5, 6, 0]
    batch = windows(stream, 50, 4, seed=1)(3)
    text = " ".join(map(str, stream.tolist()))
    assert all(" ".join(map(str, row.tolist())) in text for row in batch.input_ids)
    assert torch.equal(batch.input_ids, windows(stream, 50, 4, seed=1)(3).input_ids)
    with pytest.raises(ValueError, match="stream of 9 tokens holds no windows of 9"):
        windows(stream, 1, 9)


def test_checkpoint_folder_follows_settings_and_inputs(tmp_path):
    file = tmp_path / "data.txt"
    file.write_text("a")
    first = checkpoint_folder(tmp_path, "lm", {"steps": 1}, [file])
    assert checkpoint_folder(tmp_path, "lm", {"steps": 1}, [file]) == first
    assert checkpoint_folder(tmp_path, "lm", {"steps": 2}, [file]) != first
    file.write_text("b")
    assert checkpoint_folder(tmp_path, "lm", {"steps": 1}, [file]) != first
    with pytest.raises(FileNotFoundError, match="nothing"):
        checkpoint_folder(tmp_path, "lm", {}, [tmp_path / "nothing"])


def test_joined_pads_to_the_longest_source():
    short, long = repeats(12, 2, 4), repeats(12, 3, 8)
    batch = joined(short, long, pad_id=7)(5)
    assert batch.input_ids.shape == batch.labels.shape == (5, 8)
    assert torch.equal(batch.input_ids[:2, :4], short(5).input_ids)
    assert (batch.input_ids[:2, 4:] == 7).all()
    assert (batch.labels[:2, 4:] == IGNORED).all()
    assert torch.equal(batch.labels[2:], long(5).labels)


@pytest.mark.slow
def test_bench_measures_every_variant():
    from common.training.bench import bench_training, gemm_ceiling

    frame = bench_training(rows=4, steps=1, rounds=1)
    kinds = ["eager, float32", "eager, bfloat16", "sdpa, float32", "sdpa, bfloat16", "eager, float32, 2 shards"]
    assert list(frame.variant) == kinds
    assert (frame.tokens_per_s > 0).all()
    assert (gemm_ceiling(rounds=1, tokens=64).gflops > 0).all()


def test_repeats_label_what_came_before():
    batch = repeats(1000, 200, 16, first=5, seed=4)(0)
    distances = set()
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        start = next(i for i, label in enumerate(labels) if label != IGNORED) - 1
        size = sum(label != IGNORED for label in labels) + 1
        copy = ids[start : start + size]
        earlier = [i for i in range(start) if ids[i : i + size] == copy and i + size <= start]
        assert earlier
        assert labels[start + 1 : start + size] == copy[1:]
        distances.add(start - earlier[0])
    assert len(distances) > 5
    assert batch.input_ids.min() >= 5
    with pytest.raises(ValueError, match="within 3 tokens"):
        repeats(10, 1, 3)
