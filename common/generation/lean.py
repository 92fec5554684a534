"""A lean forward for Llama and Qwen2 that reads the module's weights: few large operations instead of many small ones.

What it changes against the module: query, key and value are one projection, and so are gate and up; the scales of the
norms before them are folded in; the two halves of a rotary pair lie side by side, so that the rotation is one complex
multiplication; keys and values share a preallocated tensor; residual additions are part of the projections.
In float64 the logits differ by some 1e-7 from the module's, whose norms go through float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMALL_BATCH = 16  # rows up to which the fused attention kernel beats two batched products for one query per row
# Tokens a block of the cache in batches of at least LARGE_BATCH rows. There it exceeds the processor's own cache, and a
# product over slices with gaps (the unfilled capacity) takes twice the time of one without; a full block has none.
BLOCK, LARGE_BATCH = 32, 96


def why_not_lean(model: PreTrainedModel) -> str | None:
    """The reason why the lean forward would not compute what the model computes, or None if it does.

    Only stock modules are trusted: hooks, adapters, quantised layers and parametrisations need the module.
    """
    config = model.config
    if config.model_type not in ("llama", "qwen2"):
        return f"model type {config.model_type}"
    if config.hidden_act != "silu" or config.rope_parameters["rope_type"] != "default":
        return f"activation {config.hidden_act}, rotary embedding {config.rope_parameters['rope_type']}"
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        return "sliding-window attention"
    stock = (f"transformers.models.{config.model_type}.", "torch.nn.modules.", "transformers.activations")
    for name, module in model.named_modules():
        if not type(module).__module__.startswith(stock):
            return f"{name} is a {type(module).__name__}"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name} has a hook"
        if name.endswith(("o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")) and module.bias is not None:
            return f"{name} has a bias"
    if model.dtype not in (torch.float32, torch.float64):
        return f"the precision {model.dtype}"
    return None


def head_of(model: PreTrainedModel) -> torch.nn.Linear:
    """The linear layer after the last norm: a language model's output embeddings, or a reward model's `score`."""
    return model.score if hasattr(model, "score") else model.get_output_embeddings()


class LeanForward:
    """Forward passes of `rows` sequences of at most `capacity` tokens; holds its own KV cache, in blocks.

    The attention-input and MLP-input weights are copied once at construction.
    """

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int) -> None:
        self.model, self.capacity, self.length = model, capacity, 0
        self.head = head_of(model)
        config, weight = model.config, self.head.weight
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        root = config.hidden_size**0.5
        self.offset = weight.new_tensor(config.rms_norm_eps**0.5 * root)
        pairs = torch.arange(self.head_dim, device=weight.device).view(2, -1).T.flatten()  # 0, D/2, 1, D/2+1, ...
        self.layers = []
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            scale_1 = layer.input_layernorm.weight * root
            scale_2 = layer.post_attention_layernorm.weight * root
            projections = [attention.q_proj, attention.k_proj, attention.v_proj]
            parts = [_per_head(p.weight, self.head_dim) for p in projections]
            biases = [_per_head(p.bias, self.head_dim) for p in projections if p.bias is not None]
            for part in (parts, biases):
                part[:2] = [x[:, pairs] for x in part[:2]]
            self.layers.append(
                (
                    torch.cat([x.flatten(0, 1) for x in parts]) * scale_1,
                    torch.cat([x.flatten() for x in biases]) if biases else None,
                    attention.o_proj.weight.T,
                    torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * scale_2,
                    mlp.down_proj.weight.T,
                )
            )
        self.last_scale = model.model.norm.weight * root
        angles = torch.arange(capacity, device=weight.device)[:, None] * model.model.rotary_emb.inv_freq.float()
        rotary = torch.complex(angles.cos().to(weight.dtype), angles.sin().to(weight.dtype))
        self.rotary = rotary * model.model.rotary_emb.attention_scaling  # [capacity, D/2]
        self.rows = rows
        self.cache: list[list[torch.Tensor]] = [[] for _ in self.layers]  # blocks of keys and values of each layer
        self.filled: list[int] = []  # tokens in each block

    def __call__(self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The head's output [rows, vocabulary] (a reward model's: [rows, 1]) for the last of the new tokens.

        ids, positions: [rows, T] int64. mask: additive [rows, 1, T, cached + T], or None for plain causal attention.
        """
        rows, new = ids.shape
        start = self._room(new)
        hidden = F.embedding(ids.flatten(), self.model.model.embed_tokens.weight)  # [rows*T, hidden]
        rotary = self.rotary[positions.flatten(), None]  # [rows*T, 1, D/2]
        rotated = self.heads + self.groups
        for blocks, (qkv, bias, out, gate_up, down) in zip(self.cache, self.layers, strict=True):
            x = F.linear(self._unit(hidden), qkv, bias).view(rows * new, -1, self.head_dim // 2, 2)
            torch.view_as_complex(x[:, :rotated]).mul_(rotary)
            x = x.view(rows, new, -1, self.head_dim)
            key_value = x[:, :, self.heads :].unflatten(2, (2, self.groups))
            blocks[-1][:, :, :, start : start + new] = key_value.permute(2, 0, 3, 1, 4)
            filled = [block[:, :, :, :count] for block, count in zip(blocks, self.filled, strict=True)]
            attended = self._attention(x[:, :, : self.heads], filled, mask)
            hidden = torch.addmm(hidden, attended, out)
            gate, up = F.linear(self._unit(hidden), gate_up).chunk(2, dim=-1)
            hidden = torch.addmm(hidden, F.silu(gate).mul_(up), down)
        last = hidden.view(rows, new, -1)[:, -1]
        return F.linear(self._unit(last) * self.last_scale, self.head.weight, self.head.bias)

    def _unit(self, x: torch.Tensor) -> torch.Tensor:
        """RMSNorm without its scale: x / sqrt(|x|^2 + hidden_size * eps); the weights carry sqrt(hidden_size)."""
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(self.offset)

    def _attention(self, query: torch.Tensor, blocks: list[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
        """query [rows, T, heads, D], blocks of keys and values [2, rows, groups, K_i, D] -> [rows*T, heads*D]."""
        rows, new, heads, head_dim = query.shape
        if len(blocks) == 1 and (new > 1 or rows <= SMALL_BATCH):
            keys, values = blocks[0]
            attended = F.scaled_dot_product_attention(
                query.transpose(1, 2),
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None and new > 1,
                enable_gqa=self.groups != heads,
            ).transpose(1, 2)
            return attended.reshape(rows * new, heads * head_dim)
        grouped = (query * head_dim**-0.5).view(rows, new, self.groups, heads // self.groups, head_dim)
        query = grouped.permute(0, 2, 3, 1, 4).flatten(2, 3)  # [rows, groups, heads per group * T, D]
        parts = [query @ keys.transpose(2, 3) for keys, _ in blocks]
        scores = torch.cat(parts, dim=-1).unflatten(2, (-1, new))  # [rows, groups, heads per group, T, K]
        weights = (scores if mask is None else scores.add_(mask[:, :, None])).softmax(-1).flatten(2, 3)
        first, *rest = weights.split(self.filled, dim=-1)
        attended = first @ blocks[0][1]
        for part, (_, values) in zip(rest, blocks[1:], strict=True):
            attended += part @ values
        attended = attended.unflatten(2, (-1, new)).permute(0, 3, 1, 2, 4)
        return attended.reshape(rows * new, heads * head_dim)

    def _room(self, new: int) -> int:
        """Makes the last block of every layer hold `new` more tokens; returns where in it they go."""
        if self.length + new > self.capacity:
            raise ValueError(f"{self.length + new} tokens do not fit a cache of {self.capacity}")
        if not self.filled or self.filled[-1] + new > self.cache[0][-1].shape[3]:
            large = self.rows >= LARGE_BATCH
            size = max(new, BLOCK if self.length else 0) if large else self.capacity - self.length
            for blocks in self.cache:
                blocks.append(self.last_scale.new_empty(2, self.rows, self.groups, size, self.head_dim))
            self.filled.append(0)
        self.filled[-1] += new
        self.length += new
        return self.filled[-1] - new

    def keep_rows(self, rows: torch.Tensor) -> None:
        """Row i becomes a copy of row rows[i], int64 [new rows]; the blocks become one."""
        self.rows = len(rows)
        for layer, old in enumerate(self.cache):
            parts = [block[:, rows, :, :count] for block, count in zip(old, self.filled, strict=True)]
            if self.rows < LARGE_BATCH:
                parts.append(parts[0].new_empty(2, self.rows, self.groups, self.capacity - self.length, self.head_dim))
            self.cache[layer] = [parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)]
        self.filled = [self.length]

    def copy_rows(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Rows target[i] become copies of rows source[i], int64 [copies]; no row is in both. The others stay."""
        for blocks in self.cache:
            for block, count in zip(blocks, self.filled, strict=True):
                block[:, target, :, :count] = block[:, source, :, :count]


def _per_head(parameter: torch.Tensor, head_dim: int) -> torch.Tensor:
    return parameter.unflatten(0, (-1, head_dim))
