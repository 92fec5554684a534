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
    """Trains one of the two and writes its folder; a name for `run_jobs`."""
    cfg, name = of
    {"recall": recall, "text": text}[name](cfg, Path(cfg.out) / name)


def recall(cfg: DictConfig, out: Path) -> None:
    """A small Llama whose query heads share heads of keys."""
    from common.models.build import build

    own = cfg.recall
    size = tasks.vocabulary(own.symbols)
    model = build(_plain(own.model), vocab_size=size, seed=cfg.seed, attention="eager").to(cfg.device)
    steps = sum(phase.steps for phase in own.curriculum)
    _train(cfg, "recall", model, tasks.recall_batches(cfg), {"steps": steps, **_plain(own.training)}, out, [])


def text(cfg: DictConfig, out: Path) -> None:
    """The shared code model, trained further on windows as long as context, input and answer together: it has read
    no more than 100 tokens of code at a time before. A checkpoint of the hub is only recorded."""
    if cfg.text.hub_id:
        out.mkdir()
        (out / "model.json").write_text(json.dumps({"hub_id": cfg.text.hub_id}) + "\n")
        return
    from common.models.hub import load_model, load_tokenizer

    folder = Path(cfg.shared) / cfg.text.model
    words = load_tokenizer(folder)
    model = load_model(folder, attention="eager").to(cfg.device)
    settings = {key: value for key, value in _plain(cfg.text.training).items() if key != "rows"}
    _train(cfg, "text", model, tasks.text_batches(cfg, words), settings, out, [folder])
    words.save_pretrained(out)


def _train(
    cfg: DictConfig, name: str, model: PreTrainedModel, batches: Any, settings: dict[str, Any], out: Path, inputs: list
) -> None:
    from common.models.build import count_parameters
    from common.models.hub import save_model
    from common.training.checkpoint import checkpoint_folder
    from common.training.loop import TrainConfig, train

    code = [Path(tasks.__file__), *inputs]
    state = train(
        model, batches, TrainConfig(seed=cfg.seed, **settings),
        checkpoints=checkpoint_folder(cfg.checkpoints, name, [_plain(cfg[name]), cfg.seed], code), title=name,
    )  # fmt: skip
    model.config._attn_implementation = "sdpa"
    save_model(model.cpu(), out)
    found = {"parameters": count_parameters(model), "steps": state.step, "tokens": state.tokens}
    found |= {"loss": state.history[-1]["train_loss"], "seconds": state.seconds}
    (out / "metrics.json").write_text(json.dumps(found, indent=2) + "\n")


def load(cfg: DictConfig, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast | None]:
    """What the train stage left, on the device; the tokenizer of the text model."""
    import torch

    from common.models.hub import load_model, load_tokenizer

    folder = Path(cfg.artifacts) / "train" / name
    source: str | Path = folder
    if (folder / "model.json").exists():
        source = json.loads((folder / "model.json").read_text())["hub_id"]
    hub = source is not folder
    model = load_model(source, dtype=getattr(torch, cfg.dtype), network=hub and cfg.network).to(cfg.device)
    words = load_tokenizer(source, network=hub and cfg.network) if name == "text" else None
    return model, words


def _plain(node: Any) -> dict[str, Any]:
    """A node of the configuration as a dict."""
    return dict(cast("dict[str, Any]", OmegaConf.to_container(node, resolve=True)))
