"""Shards of a batch: their gradients are those of the whole batch, the same bits wherever they are computed."""

import itertools
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
from common.training import shards
from common.training.data import Batch, mixture, repeats
from common.training.loop import TrainConfig, next_token_loss, train
from common.training.shards import Gradient

ROOT = Path(__file__).resolve().parents[3]
TINY = ModelConfig(vocab_size=12, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
BATCHES = mixture(
    repeats(12, 5, 10, seed=1), repeats(12, 1, 14, seed=2)
)  # five rows do not divide, one leaves a shard out
CONFIG = TrainConfig(steps=8, learning_rate=1e-2, warmup_steps=2)

forked = pytest.mark.skipif(
    sys.platform != "linux" or (os.cpu_count() or 1) < 2, reason="forks need Linux and two cores"
)


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient(count: int, *, dtype: torch.dtype = torch.float64, fork: bool = True) -> tuple[torch.Tensor, float, int]:
    model = build(TINY, attention="eager").to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_can_fork", lambda: fork)
        with Gradient(model, next_token_loss, count) as of:
            assert bool(of.workers) == (fork and count > 1)
            for step in range(3):  # nothing is left over from one step to the next
                model.zero_grad()
                loss, tokens = of(BATCHES(step))
    return torch.cat([p.grad.flatten() for p in model.parameters()]), loss, tokens


@forked
@pytest.mark.parametrize("count", [2, 3])
def test_gradients_of_shards_add_up_to_that_of_the_batch(count):
    whole, loss, tokens = gradient(1)
    for fork in (True, False):
        parts, part_loss, part_tokens = gradient(count, fork=fork)
        torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12)
        assert part_loss == pytest.approx(loss, rel=1e-6)  # summed in float32
        assert part_tokens == tokens


@forked
def test_training_gives_the_same_bits_with_and_without_processes_and_for_any_number_of_threads(monkeypatch):
    found = []
    for threads, fork in ((1, True), (2, True), (1, False), (2, False)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        monkeypatch.setattr(shards, "_can_fork", lambda fork=fork: fork)
        model = build(TINY, attention="eager")
        train(model, BATCHES, CONFIG)
        assert torch.get_num_threads() == threads
        torch.set_num_threads(before)
        found.append(weights(model))
    assert all(torch.equal(a, b) for a, b in itertools.pairwise(found))


@pytest.fixture
def two_processes(monkeypatch):
    """Also where the tests themselves have one thread each."""
    monkeypatch.setattr(shards, "_can_fork", lambda: True)


@forked
@pytest.mark.usefixtures("two_processes")
def test_a_failing_loss_of_a_shard_is_an_error_here():
    here = os.getpid()

    def failing(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        if os.getpid() != here:
            raise ArithmeticError("no such loss")
        return next_token_loss(model, batch)

    with pytest.raises(RuntimeError, match=r"(?s)the loss of a shard failed.*ArithmeticError: no such loss"):
        train(build(TINY, attention="eager"), BATCHES, CONFIG, loss=failing)


@forked
@pytest.mark.usefixtures("two_processes")
def test_a_killed_process_of_a_shard_stops_the_training_which_then_goes_on(tmp_path):
    whole = build(TINY, attention="eager")
    train(whole, BATCHES, replace(CONFIG, checkpoint_every=2))
    model = build(TINY, attention="eager")
    children = Path(f"/proc/self/task/{os.getpid()}/children")

    def kill(step: int) -> None:
        if step == 5:
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)

    with pytest.raises(
        RuntimeError, match=r"process of a shard ended with exit code -9; started again, training goes on"
    ):
        train(model, BATCHES, replace(CONFIG, checkpoint_every=2), checkpoints=tmp_path, after_step=kill)
    again = build(TINY, seed=9, attention="eager")
    state = train(again, BATCHES, replace(CONFIG, checkpoint_every=2), checkpoints=tmp_path)
    assert state.resumed_from == 4
    assert torch.equal(weights(again), weights(whole))


@forked
@pytest.mark.slow
def test_processes_end_with_the_one_that_trains():
    """Also when that is killed: nothing is left that waits for rows."""
    script = """
        import os, time
        from pathlib import Path
        from tests.common.training.test_shards import BATCHES, CONFIG, TINY
        from common.models.build import build
        from common.training import shards
        from common.training.loop import train
        shards._can_fork = lambda: True
        def told(step):
            if step == 2:
                print(Path(f"/proc/self/task/{os.getpid()}/children").read_text(), flush=True)
                time.sleep(60)
        train(build(TINY, attention="eager"), BATCHES, CONFIG, after_step=told)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    children = [int(child) for child in process.stdout.readline().split()]
    assert len(children) == 1
    process.kill()
    process.wait()
    until = time.monotonic() + 20
    while any(_alive(child) for child in children):
        assert time.monotonic() < until
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z"
