"""The two models: one learns recall from nothing, the shared language model learns to read contexts of this length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from omegaconf import OmegaConf

from papers.squeezed_attention import tasks

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


ROTARY_BASE = 1e6  # of the recall model
LOOK_BACK_PAIRS, LOOK_BACK_LENGTH = 4, 7.0  # rotary pairs of the head that looks back, and the length of their vectors


def job(of: tuple[DictConfig, str]) -> None:
    """Trains the model of a task and writes its folder in hub format, with metrics.json; a name for `run_jobs`.

    recall: a small Qwen2 whose query heads share heads of keys. text: the shared model of code, further: it has read no
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
        prepare(model)
        batches = tasks.recall_batches(cfg)
    else:
        folder = Path(cfg.shared) / cfg.text.model
        inputs.append(folder)
        words = load_tokenizer(folder)
        words.save_pretrained(out)
        model = load_model(folder)
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


@torch.no_grad()
def prepare(model: PreTrainedModel) -> None:
    """Three changes to a fresh Qwen2, without which recall does not emerge within the time that this paper has.

    The branches of the residual stream start at zero, so that tokens can be told apart from the first step on. The
    rotary base is 1e6, as in models for long contexts: with 1e4 most pairs of so small a head turn too far over 500
    tokens for matching contents. And a head of the first layer (with the other heads that share its keys) starts as one
    that sees the token before: recall needs it below the head that finds the symbol asked for. It is put into the
    biases; with the key's pair i at angle 0 and the query's at -theta_i, the logit after the rotary embedding is
    sum_i cos((distance - 1) theta_i), largest at distance 1. All of it is free to change in training.
    """
    for block in model.model.layers:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": ROTARY_BASE}
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    layer = model.model.layers[0].self_attn
    d, angles = layer.head_dim, model.model.rotary_emb.inv_freq[:LOOK_BACK_PAIRS]
    for projection in (layer.q_proj, layer.k_proj):
        projection.weight[:d] = 0
        projection.bias[:d] = 0
    layer.k_proj.bias[: len(angles)] = LOOK_BACK_LENGTH
    layer.q_proj.bias[: len(angles)] = LOOK_BACK_LENGTH * angles.cos()
    layer.q_proj.bias[d // 2 : d // 2 + len(angles)] = -LOOK_BACK_LENGTH * angles.sin()


def load(cfg: DictConfig, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast | None]:
    """What the train stage left, on the device, and the text model's tokenizer."""
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
