"""The supervised training loop: AdamW, warm-up and cosine, clipping, held-out loss, early stopping, checkpoints.

Safe to kill at any moment: checkpoints are renamed into place, batches are functions of the step, and a resumed
run ends with the weights, bit for bit, of one that was never interrupted (on the same machine).
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from common.training.data import IGNORED, Batch, Batches
from common.training.shards import Gradient, Loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class TrainConfig:
    """steps: optimiser steps. learning_rate: after `warmup_steps` of linear rise; then half a cosine down to
    `final_rate` times it. weight_decay: on matrices only. evaluate_every: steps between held-out losses (0: only at
    the end). patience: evaluations without a new best after which training stops and returns to the best weights
    (None: never). checkpoint_every: steps. bf16: autocast of the forward pass; float32 learns more per token.
    shards: of the rows of each batch, computed side by side on the CPU (see `shards.Gradient`).
    """

    steps: int
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    final_rate: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    evaluate_every: int = 0
    patience: int | None = None
    checkpoint_every: int = 100
    bf16: bool = False
    shards: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "clip_norm", "checkpoint_every", "shards"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("warmup_steps", "evaluate_every", "weight_decay", "final_rate"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if self.patience is not None and (self.patience < 1 or not self.evaluate_every):
            raise ValueError(f"patience={self.patience} needs to be at least 1 and evaluate_every > 0")


@dataclass
class TrainState:
    """What a checkpoint holds besides weights and optimiser: how far the run is, and its record.

    history: one dict an evaluation (step, train_loss, held_out_loss, learning_rate, tokens, seconds). recent: losses of
    the steps since the last one. tokens: read in forward passes, padding included. seconds: of training, all runs
    together.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    recent: list[float] = field(default_factory=list)
    best_loss: float = math.inf
    evaluations_since_best: int = 0
    stopped_early: bool = False
    resumed_from: int = 0


def next_token_loss(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Sum of cross entropies over the labelled positions; the output head sees only those."""
    # Embeddings and not ids: given ids, GPT-2 looks for padding and warns; on the right it does no harm.
    embedded = model.get_input_embeddings()(batch.input_ids)
    hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, :-1]
    targets = batch.labels[:, 1:]
    labelled = targets != IGNORED
    logits = model.get_output_embeddings()(hidden[labelled])
    return F.cross_entropy(logits.float(), targets[labelled], reduction="sum")


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Of the optimiser step that follows `step` earlier ones."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * cosine)


def train(
    model: PreTrainedModel,
    batches: Batches,
    config: TrainConfig,
    *,
    held_out: Sequence[Batch] = (),
    checkpoints: Path | None = None,
    loss: Loss = next_token_loss,
    after_step: Callable[[int], None] | None = None,
    title: str = "training",
) -> TrainState:
    """Trains `model` in place and returns the record of the run; the model ends in evaluation mode.

    batches: step -> the batches of that optimiser step (their losses are summed and divided by all their labels).
    held_out: for the held-out loss; needed by `patience`. checkpoints: folder that holds checkpoint.pt; training
    resumes from it if it exists. loss: (model, batch) -> summed loss of the batch's labels. after_step: called with the
    number of steps done; it may use the model but not change it, and is called again for steps that a resumed run
    redoes.
    Raises ValueError for a checkpoint of other settings, and FloatingPointError, naming the step, for a loss or a
    gradient that is not finite; the checkpoint of before stays. Ctrl-C finishes the step, writes a checkpoint and
    raises KeyboardInterrupt.
    """
    if config.patience is not None and not held_out:
        raise ValueError(f"patience={config.patience} needs held-out batches")
    optimizer = _optimizer(model, config)
    file = None if checkpoints is None else checkpoints / "checkpoint.pt"
    state, best = TrainState(), None
    torch.manual_seed(config.seed)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            state, best = _load(file, model, optimizer, config)
    model.train()
    began, earlier = time.perf_counter(), state.seconds
    with (
        _interruptible() as interrupted,
        Gradient(model, loss, config.shards, bf16=config.bf16) as gradient,
        _progress(title, config.steps, state.step) as show,
    ):
        while state.step < config.steps and not state.stopped_early:
            step_loss, tokens = _step(gradient, optimizer, batches(state.step), config, state.step)
            state.step, state.tokens = state.step + 1, state.tokens + tokens
            state.recent.append(step_loss)
            due = config.evaluate_every and state.step % config.evaluate_every == 0
            if due or state.step == config.steps:
                best = _evaluate(model, held_out, config, state, loss, best)
            state.seconds = earlier + time.perf_counter() - began
            if state.history and (due or state.step == config.steps):
                state.history[-1]["seconds"] = state.seconds
            show(state.step, step_loss)
            if after_step is not None:
                after_step(state.step)
            last = state.step == config.steps or state.stopped_early
            if file is not None and (last or interrupted() or state.step % config.checkpoint_every == 0):
                _save(file, model, optimizer, config, state, best)
            if interrupted():
                raise KeyboardInterrupt(f"stopped after step {state.step}")
    if best is not None:
        model.load_state_dict(best)
    model.eval()
    return state


def _step(
    gradient: Gradient, optimizer: torch.optim.Optimizer, batches: list[Batch], config: TrainConfig, step: int
) -> tuple[float, int]:
    """One optimiser step: mean loss per label, tokens read. Weights stay if loss or gradient is not finite."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, config)
    loss, tokens = gradient(batches)
    norm = torch.nn.utils.clip_grad_norm_(gradient.parameters, config.clip_norm)
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise FloatingPointError(
            f"step {step + 1}: loss {loss}, gradient norm {float(norm)}; try a lower learning rate"
        )
    optimizer.step()
    optimizer.zero_grad()
    return loss, tokens


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, batches: Sequence[Batch], loss: Loss = next_token_loss) -> float:
    """Mean loss per label in evaluation mode, in the model's own precision; the model's mode is restored."""
    training = model.training
    model.eval()
    labels = sum(int((batch.labels[:, 1:] != IGNORED).sum()) for batch in batches)
    parts = (Batch(batch.input_ids.to(model.device), batch.labels.to(model.device)) for batch in batches)
    mean = sum(loss(model, batch).item() for batch in parts) / labels
    model.train(training)
    return mean


def _evaluate(
    model: PreTrainedModel,
    held_out: Sequence[Batch],
    config: TrainConfig,
    state: TrainState,
    loss: Loss,
    best: dict[str, torch.Tensor] | None,
) -> dict[str, torch.Tensor] | None:
    """Appends to the history; returns the best weights so far when early stopping asks for them."""
    row = {"step": state.step, "train_loss": sum(state.recent) / len(state.recent), "tokens": state.tokens}
    row["learning_rate"] = learning_rate_at(state.step - 1, config)
    if held_out:
        row["held_out_loss"] = held_out_loss(model, held_out, loss)
    state.history.append(row)
    state.recent = []
    if config.patience is None:
        return None
    if row["held_out_loss"] < state.best_loss:
        state.best_loss, state.evaluations_since_best = row["held_out_loss"], 0
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state.evaluations_since_best += 1
    state.stopped_early = state.evaluations_since_best >= config.patience
    return best


def _optimizer(model: PreTrainedModel, config: TrainConfig) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)


def _save(
    file: Path,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    state: TrainState,
    best: dict[str, torch.Tensor] | None,
) -> None:
    """Writes beside the file and renames, so that the file is always whole."""
    content = {
        "config": asdict(config),
        "state": asdict(state),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "best": best,
        "random": torch.random.get_rng_state(),
    }
    temporary = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        with temporary.open("wb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _load(
    file: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> tuple[TrainState, dict[str, torch.Tensor] | None]:
    content = torch.load(file, weights_only=True, map_location=model.device)
    written, wanted = content["config"], asdict(config)
    if differing := [name for name in wanted if _as_list(written.get(name)) != _as_list(wanted[name])]:
        changes = ", ".join(f"{name}={written.get(name)} there, {wanted[name]} here" for name in differing)
        raise ValueError(f"{file} is of other settings ({changes}); remove it or use another folder")
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    torch.random.set_rng_state(content["random"].cpu())
    state = TrainState(**content["state"])
    state.resumed_from = state.step
    return state, content["best"]


def _as_list(value: Any) -> Any:
    """Lists for tuples, as a serialised setting has them."""
    return list(value) if isinstance(value, tuple) else value


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C only sets a flag, for a step is not to be torn; the second one acts at once."""
    pressed = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield pressed.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def note(signum: int, frame: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress(title: str, steps: int, start: int) -> Iterator[Callable[[int, float], None]]:
    """A bar on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda step, loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.3f}"), console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=steps, completed=start, loss=math.nan)
        yield lambda step, loss: progress.update(task, completed=step, loss=loss)
