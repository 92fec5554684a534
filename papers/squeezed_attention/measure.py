"""What `infer` measures: every arm on both tasks, the real cache beside it, exactness, and times."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from common.attention.budget import kv_budget
from common.attention.interface import Call, States, attending, capture, dense
from common.models.flops import forward_flops
from common.training.data import IGNORED
from papers.squeezed_attention import tasks, training
from papers.squeezed_attention.method import SqueezedCache, squeeze
from papers.squeezed_attention.method.cache import from_states
from papers.squeezed_attention.selections import METHODS, Contexts, Selection

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from transformers import PreTrainedModel

    from papers.squeezed_attention.tasks import Prompts

Rows = list[dict[str, Any]]


@dataclass
class Outcome:
    """Of one arm on C contexts. losses, tokens [C, targets]: nats and the likeliest token at each target; kept
    [C, layers, H] and vectors [C]: keys kept, the window among them, and vectors compared, means over look-ups; mass
    [C]: share of the context's softmax weight that the kept keys have; found [C]: share of the kept keys that would
    have been the largest."""

    losses: torch.Tensor
    tokens: torch.Tensor
    kept: torch.Tensor
    vectors: torch.Tensor
    mass: torch.Tensor
    found: torch.Tensor


def prompts_of(cfg: DictConfig, name: str) -> tuple[PreTrainedModel, Prompts]:
    """A model and what it reads."""
    model, words = training.load(cfg, name)
    prompts = tasks.recall_prompts(cfg) if words is None else tasks.text_prompts(cfg, words)
    return model, prompts.to(cfg.device)


def read(cfg: DictConfig, model: PreTrainedModel, prompts: Prompts, first: int = 0) -> Contexts:
    """The contexts, read densely."""
    states = capture(model, prompts.contexts, last=cfg.window)
    return Contexts(states, prompts.blocks, prompts.block, cfg.seed, first)


@torch.inference_mode()
def evaluate(
    model: PreTrainedModel, prompts: Prompts, contexts: Contexts, select: Selection, rank: bool = False
) -> Outcome:
    """Reads the prompts behind their contexts, with attention to the selected keys only.

    All logits are computed and those of other keys left out, so that arms differ in nothing else; what a sparse path
    computes is the same (`through_the_cache`). rank: also count how many kept keys are among as many largest.
    """
    n, window = contexts.shape[2], contexts.states[0].queries.shape[2]
    blocks, block, tokens = prompts.blocks, prompts.block, prompts.ids.shape[1]
    singles = tokens - blocks * block
    owner = torch.cat([torch.arange(blocks).repeat_interleave(block), blocks + torch.arange(singles)])
    owner = owner.to(prompts.ids.device)
    kept, vectors, mass, found = [], [], [], []

    def attend(call: Call) -> torch.Tensor:
        states = contexts.states[call.layer]
        rows, query_heads, _, d = call.query.shape
        heads = states.keys.shape[1]
        query = call.query.view(rows, heads, -1, tokens, d).float()
        x = query @ torch.cat([states.keys, call.key], 2)[:, :, None].float().mT * call.scale
        x[..., -tokens:].masked_fill_(~prompts.sees, -torch.inf)
        choice = select(call.layer, call.query)
        keep = choice.keep if choice.keep.shape[2] == 1 else choice.keep.index_select(2, owner)
        keep = keep.expand(rows, heads, tokens, n)
        if rank:
            found.append(_among_largest(x[..., :n], keep[:, :, None]))
        weights = (x - x.amax(-1, keepdim=True)).exp_()
        whole = weights[..., : n + window].sum(-1)
        weights[..., :n] *= keep[:, :, None]
        mass.append((weights[..., : n + window].sum(-1) / whole).mean((1, 2, 3)))
        kept.append(choice.keep.expand(-1, heads, -1, n).sum(-1, dtype=torch.float32).mean(-1) + window)
        vectors.append(choice.vectors.float().mean((1, 2)))
        values = torch.cat([states.values, call.value], 2)[:, :, None].float()
        output = weights @ values / weights.sum(-1, keepdim=True)
        return output.view(rows, query_heads, tokens, d).to(call.query.dtype)

    with attending(model, attend):
        hidden = model.base_model(
            input_ids=prompts.ids, position_ids=prompts.positions.expand(len(prompts.ids), -1), use_cache=False
        ).last_hidden_state
    scored = prompts.targets[0] != IGNORED
    logits = model.get_output_embeddings()(hidden[:, scored]).float()
    targets = prompts.targets[:, scored]
    losses = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    return Outcome(
        losses.cpu(), logits.argmax(-1).cpu(), torch.stack(kept, 1).cpu(), torch.stack(vectors, 1).mean(1).cpu(),
        torch.stack(mass, 1).mean(1).cpu(), torch.stack(found, 1).mean(1).cpu() if rank else torch.empty(0),
    )  # fmt: skip


def _among_largest(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """[C]: share of the kept keys that are among as many largest logits, mean over heads and tokens."""
    count = keep.sum(-1, keepdim=True).clamp(min=1)
    least = x.sort(-1, descending=True).values.gather(-1, (count - 1).expand(*x.shape[:-1], 1))
    both = ((x >= least) & keep).sum(-1, keepdim=True)
    return (both / count).clamp(max=1).mean((1, 2, 3, 4))


def arms(cfg: DictConfig) -> Rows:
    """Every arm: a method, a sparsity and its settings; `sweep` says which comparison it belongs to."""
    usual = {"share": cfg.clusters}
    two = {"coarse": cfg.coarse, "coarse_sparsity": cfg.coarse_sparsity}
    settings = {"squeezed": usual, "contiguous": usual, "per head": usual, "hierarchical": usual | two}
    ends = {"all": 0.0, "window only": 1.0}
    rows: Rows = [{"sweep": "methods", "method": m, "sparsity": s, "settings": {}} for m, s in ends.items()]
    for method in (m for m in METHODS if m not in ends):
        for sparsity in cfg.sparsities:
            rows.append(
                {"sweep": "methods", "method": method, "sparsity": sparsity, "settings": settings.get(method, {})}
            )
    own = cfg.ablation
    for share in own.shares:
        for method, more in (("squeezed", {}), ("hierarchical", two | {"coarse": share * cfg.coarse / cfg.clusters})):
            if more and more["coarse"] * own.least_keys < 1:
                continue  # the coarse level would be a single cluster
            rows.append(
                {"sweep": "clusters", "method": method, "sparsity": own.sparsity, "settings": {"share": share} | more}
            )
    for seed in own.seeds:
        rows.append(
            {"sweep": "seeds", "method": "squeezed", "sparsity": own.sparsity, "settings": usual | {"seed": seed}}
        )
    return rows


def run_arms(cfg: DictConfig, name: str, first: int) -> tuple[Rows, Rows, Rows]:
    """Every arm on a batch of a task's contexts: (a row a context and arm, a row a layer and head, records)."""
    model, prompts = prompts_of(cfg, name)
    prompts = prompts.part(slice(first, first + cfg[name].batch))
    contexts = read(cfg, model, prompts, first)
    length = prompts.contexts.shape[1]
    scored = prompts.targets[0] != IGNORED
    right_tokens = prompts.targets[:, scored].cpu()
    rows, heads, samples = [], [], []
    for arm in arms(cfg):
        began = time.perf_counter()
        select = METHODS[arm["method"]](contexts, arm["sparsity"], **arm["settings"])
        rank = name == "recall" and arm["sweep"] == "methods" and arm["sparsity"] == cfg.ablation.sparsity
        out = evaluate(model, prompts, contexts, select, rank)
        seconds = time.perf_counter() - began
        right = out.tokens == right_tokens
        label = {key: arm[key] for key in ("sweep", "method", "sparsity")} | {
            "share": arm["settings"].get("share"), "cluster_seed": arm["settings"].get("seed", 0), "task": name
        }  # fmt: skip
        for c in range(len(right)):
            kept = float(out.kept[c].mean())
            row = label | {
                "context": first + c, "kept": kept / length, "vectors": float(out.vectors[c]),
                "budget": kv_budget(kept, float(out.vectors[c]), length), "mass": float(out.mass[c]),
                "nll": float(out.losses[c].mean()), "accuracy": float(right[c].float().mean()),
                "found": float(out.found[c]) if rank else None,
            }  # fmt: skip
            if name == "recall":
                answers = right[c].view(2, -1)
                row |= {"accuracy": float(answers[0].float().mean()), "both": float(answers.all(0).float().mean())}
            rows.append(row)
        if arm["sweep"] == "methods":
            for layer, of in enumerate(out.kept.mean(0).tolist()):
                heads += [
                    label | {"layer": layer, "head": head, "kept": kept / length, "contexts": len(right)}
                    for head, kept in enumerate(of)
                ]
            if name == "recall":
                samples += _samples(cfg, model, prompts, arm, out, right, seconds, first)
    return rows, heads, samples


def _samples(
    cfg: DictConfig, model: PreTrainedModel, prompts: Prompts, arm: dict, out: Outcome, right: torch.Tensor,
    seconds: float, first: int,
) -> Rows:  # fmt: skip
    """A record a question. difficulty: look-ups. FLOPs: attention to the kept keys, without reading the context."""
    questions = prompts.blocks
    each = len(right) * questions
    rows = []
    for c in range(len(right)):
        kept = round(float(out.kept[c].mean()) + float(out.vectors[c]) / 2)
        flops = forward_flops(model.config, tasks.BLOCK, kept, logit_tokens=1)
        flops += forward_flops(model.config, 1, kept + tasks.BLOCK)
        for q in range(questions):
            told = [int(out.tokens[c, q]), int(out.tokens[c, questions + q])]
            rows.append(
                {
                    "arm": f"{arm['method']} {arm['sparsity']}", "task": "recall", "seed": cfg.seed,
                    "problem_id": (first + c) * questions + q, "sample_id": 0, "difficulty": 2,
                    "prompt_tokens": prompts.contexts.shape[1] + tasks.BLOCK, "output_tokens": 2,
                    "discarded_tokens": 0, "forwards": 2.0, "flops": float(flops), "seconds": seconds / each,
                    "answer": " ".join(map(str, told)), "correct": bool(right[c, q] and right[c, questions + q]),
                    "score": -float(out.losses[c, [q, questions + q]].mean()),
                }
            )  # fmt: skip
    return rows


@torch.inference_mode()
def through_the_cache(cfg: DictConfig) -> Rows:
    """The recall questions answered through `SqueezedCache`, with lists for each head of keys and for each query head.

    logits: the largest difference to what `evaluate` computes for the same keys (lists of heads of keys only).
    """
    model, prompts = prompts_of(cfg, "recall")
    prompts = prompts.part(slice(0, cfg.exact.cache_contexts))
    contexts, questions = read(cfg, model, prompts), prompts.blocks
    select = METHODS["squeezed"](contexts, cfg.ablation.sparsity, share=cfg.clusters)
    masked = evaluate(model, prompts, contexts, select)
    scored = prompts.targets[0] != IGNORED
    targets = prompts.targets[:, scored].view(len(prompts.ids), 2, questions)
    rows = []
    for per_query_head in (False, True):
        for c in range(len(prompts.ids)):
            context = squeeze(
                model, prompts.contexts[c : c + 1], sparsity=cfg.ablation.sparsity, clusters=cfg.clusters,
                window=cfg.window, per_query_head=per_query_head,
            )  # fmt: skip
            asked, then = prompts.ids[c, : questions * tasks.BLOCK].view(questions, -1), prompts.ids[c, -questions:]
            cache = SqueezedCache(context)
            with cache.attached(model):
                logits = [
                    model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
                    for ids in (asked, then[:, None])
                ]
            losses = [
                -one.log_softmax(-1).gather(-1, target[:, None])[:, 0]
                for one, target in zip(logits, targets[c], strict=True)
            ]
            right = [one.argmax(-1) == target for one, target in zip(logits, targets[c], strict=True)]
            gap = (torch.cat(losses).cpu() - masked.losses[c]).abs().max()
            rows.append(
                {
                    "lists": "each query head" if per_query_head else "each head of keys", "context": c,
                    "budget": cache.budget(), "accuracy": float(right[0].float().mean()),
                    "both": float((right[0] & right[1]).float().mean()),
                    "gap": None if per_query_head else float(gap),
                }
            )  # fmt: skip
    return rows


@torch.inference_mode()
def exactness(cfg: DictConfig) -> Rows:
    """At sparsity 0, the cache against full attention: the largest difference of an attention output in float32, and
    whether `generate` gives the same tokens."""
    rows = []
    for name in ("recall", "text"):
        model, prompts = prompts_of(cfg, name)
        model = model.float()
        for c in range(min(cfg.exact.contexts, len(prompts.ids))):
            context = prompts.contexts[c : c + 1]
            ids = torch.cat([context, prompts.ids[c : c + 1, : prompts.block]], 1)
            ready = squeeze(model, context, sparsity=0.0, clusters=cfg.clusters, window=cfg.window)
            options = {"max_new_tokens": cfg.exact.new_tokens, "do_sample": False, "eos_token_id": None}
            options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
            expected = model.generate(ids, **options)
            cache, gaps = SqueezedCache(ready), []

            def both(call: Call, cache: SqueezedCache = cache, gaps: list = gaps) -> torch.Tensor:
                output = cache.attend(call)
                layer = cache.context.layers[call.layer]
                keys, values = (
                    torch.cat([fixed.expand(len(own), -1, -1, -1), own], 2)
                    for fixed, own in ((layer.keys, call.key), (layer.values, call.value))
                )
                whole = dense(call._replace(key=keys, value=values, mask=None))
                gaps.append(float((output - whole).abs().max()))
                return output

            with attending(model, both):
                found = model.generate(ids, past_key_values=cache, **options)
            rows.append(
                {"task": name, "context": c, "gap": max(gaps), "same": bool(torch.equal(found, expected))}
                | {"tokens": found.shape[1] - ids.shape[1]}
            )
    return rows


def times(cfg: DictConfig) -> Rows:
    """One layer's decode step over contexts of several lengths, full attention beside look-up, compaction, attention
    and merging; and the seconds that clustering took."""
    from common.metrics.timing import compare
    from papers.squeezed_attention.planted import plant

    own = cfg.timing
    rows = []
    for length in own.lengths:
        keys, queries = plant(cfg.seed, length, own.head_dim, own.window + 1, heads=own.heads)
        dtype = getattr(torch, own.dtype)
        keys, queries = keys[None].to(cfg.device, dtype), queries[None].to(cfg.device, dtype)
        values, scale = torch.randn_like(keys), own.head_dim**-0.5
        began = time.perf_counter()
        context = from_states(
            [States(keys, values, queries[:, :, :-1], scale)],
            sparsity=cfg.ablation.sparsity, clusters=cfg.clusters, iterations=own.iterations,
        )  # fmt: skip
        _wait(cfg)
        clustering = time.perf_counter() - began
        query, cache = queries[:, :, -1:].contiguous(), SqueezedCache(context)
        mine = torch.randn_like(query)
        whole = Call(
            0, query, torch.cat([keys, mine], 2).contiguous(), torch.cat([values, mine], 2).contiguous(), None, scale
        )
        step = Call(0, query, mine, mine, None, scale)
        timed: dict[str, Callable[[], Any]] = {"full": lambda: dense(whole), "squeezed": lambda: cache.attend(step)}  # noqa: B023
        timings = compare(timed, own.rounds, min_seconds=own.min_seconds)
        ratio = timings.ratio("full", "squeezed")
        full, squeezed = timings.median("full"), timings.median("squeezed")
        rows.append(
            {
                "keys": length, "clustering_s": clustering, "full_ms": 1e3 * full, "squeezed_ms": 1e3 * squeezed,
                "speedup": ratio.value, "low": ratio.low, "high": ratio.high, "rounds": ratio.n,
                "contended": timings.contended, "budget": cache.budget(),
                "break_even_steps": clustering / (full - squeezed) if full > squeezed else None,
            }
        )  # fmt: skip
    return rows


def _wait(cfg: DictConfig) -> None:
    if cfg.device == "cuda":
        torch.cuda.synchronize()
