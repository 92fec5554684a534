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
        prepare(model, cfg.seed)
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
def prepare(model: PreTrainedModel, seed: int) -> None:
    """Starts a fresh Qwen2 as a faint induction circuit (Olsson et al. 2022), which training then makes sharp.

    From a plain start the circuit did not emerge within the time that this paper has. In each of two layers one head of
    keys, with the query heads that share it, is set; all of it is free to change.

    Layer 1 sees the token before and writes it beside the token's own embedding: C^T B x. It looks back by its biases:
    with the key's rotary pair i at angle 0 and the query's at -theta_i, the logit is sum_i cos((distance - 1) theta_i).
    Layer 2 compares what was written, C x, with the token that asks, B x, and copies the token found: R^T R x.

    Other branches of the residual stream start at zero, or they would drown the embeddings. The rotary base is 1e6, as
    in models for long contexts: with 1e4 most pairs of so small a head turn too far over 500 tokens for matching.
    """
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": ROTARY_BASE}
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    for block in model.model.layers:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    first, second = (block.self_attn for block in model.model.layers[:2])
    d, group, width = first.head_dim, first.num_key_value_groups, model.config.hidden_size
    draw = torch.Generator().manual_seed(seed)
    one, two = (torch.linalg.qr(torch.randn(width, width, generator=draw))[0].T for _ in range(2))
    asks, written, copied = one[:d], one[d : 2 * d], two[:d]  # B, C and R, each [d, width] with orthonormal rows
    angles = model.model.rotary_emb.inv_freq[:LOOK_BACK_PAIRS]
    for projection in (first.q_proj, first.k_proj):
        projection.weight[:d] = 0
        projection.bias[:d] = 0
    first.k_proj.bias[: len(angles)] = LOOK_BACK_LENGTH
    first.q_proj.bias[: len(angles)] = LOOK_BACK_LENGTH * angles.cos()
    first.q_proj.bias[d // 2 : d // 2 + len(angles)] = -LOOK_BACK_LENGTH * angles.sin()
    first.v_proj.weight[:d] = asks
    second.k_proj.weight[:d] = written
    second.v_proj.weight[:d] = copied
    for head in range(group):
        rows = slice(head * d, (head + 1) * d)
        first.o_proj.weight[:, rows] = written.T / (group * width**0.5)  # the norm gives vectors of length width^0.5
        second.q_proj.weight[rows] = 1.5 * asks
        second.o_proj.weight[:, rows] = 2 * copied.T / (group * width**0.5)


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
