"""The two models: one learns recall from nothing, the shared language model learns to read contexts of this length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import OmegaConf

from papers.squeezed_attention import tasks

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def job(of: tuple[DictConfig, str]) -> None:
    """Trains the model of a task and writes its folder in hub format, with metrics.json; a name for `run_jobs`.

    recall: a small Llama whose query heads share heads of keys. text: the shared model of code, further: it has read no
    more than some 200 tokens at a time before, so that longer contexts would only hurt it. A checkpoint of the hub is
    recorded and not trained.
    """
    cfg, name = of
    out = Path(cfg.out) / name
    if cfg.hub_id:
        out.mkdir()
        (out / "model.json").write_text(json.dumps({"hub_id": cfg.hub_id}) + "\n")
        return
    from common.models.build import build, count_parameters
    from common.models.hub import load_model, load_tokenizer, save_model
    from common.training.checkpoint import checkpoint_folder
    from common.training.loop import TrainConfig, train

    inputs = [Path(tasks.__file__)]
    if name == "recall":
        size = cfg.recall.first + cfg.recall.symbols + len(tasks.MARKS)
        model = build(_plain(cfg.recall.model), vocab_size=size, seed=cfg.seed, attention="eager")
        batches = tasks.recall_batches(cfg)
    else:
        folder = Path(cfg.shared) / cfg.text.model
        inputs.append(folder)
        words = load_tokenizer(folder)
        words.save_pretrained(out)
        model = load_model(folder, attention="eager")
        batches = tasks.text_batches(cfg, words)
    state = train(
        model.to(cfg.device), batches, TrainConfig(seed=cfg.seed, **_plain(cfg[name].training)),
        checkpoints=checkpoint_folder(cfg.checkpoints, name, [_plain(cfg[name]), cfg.seed], inputs), title=name,
    )  # fmt: skip
    model.config._attn_implementation = "sdpa"
    save_model(model.cpu(), out)
    found = {"parameters": count_parameters(model), "steps": state.step, "tokens": state.tokens}
    found |= {"loss": state.history[-1]["train_loss"], "seconds": state.seconds}
    (out / "metrics.json").write_text(json.dumps(found, indent=2) + "\n")


def load(cfg: DictConfig, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast | None]:
    """What the train stage left, on the device, and the text model's tokenizer."""
    import torch

    from common.models.hub import load_model, load_tokenizer

    folder = Path(cfg.artifacts) / "train" / name
    record = folder / "model.json"
    source: str | Path = json.loads(record.read_text())["hub_id"] if record.exists() else folder
    network = record.exists() and cfg.network
    model = load_model(source, dtype=getattr(torch, cfg.dtype), network=network).to(cfg.device)
    return model, load_tokenizer(source, network=network) if name == "text" else None


def _plain(node: Any) -> dict[str, Any]:
    """A node of the configuration as a dict."""
    return dict(cast("dict[str, Any]", OmegaConf.to_container(node, resolve=True)))
