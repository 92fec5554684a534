"""From rounds of timings to laws: fits with intervals over rounds, and what the closed forms predict."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from common.costs.catalogue import Accelerator, Transformer
from common.costs.roofline import decode_seconds, prefill_seconds, switch_seconds
from common.metrics.intervals import Measured
from common.metrics.timing import Timings
from papers.long_context_peak.method.session import Costs, Session, simulate

if TYPE_CHECKING:
    from omegaconf import DictConfig

FEWEST = 4  # sizes above the last cache that a line is fitted through


@dataclass(frozen=True)
class Found:
    """What `infer` wrote. shapes: the models; heads: parameters of their output heads; clock: of the laws."""

    closed: dict[str, pd.DataFrame]
    rounds: pd.DataFrame
    arena: pd.DataFrame
    identity: pd.DataFrame
    facts: dict[str, Any]
    machine: Accelerator
    shapes: dict[str, Transformer]
    heads: dict[str, int]
    clock: str

    def seconds(self, law: str, by: str, clock: str | None = None, **labels: Any) -> pd.DataFrame:
        """[rounds, values of `by`]: seconds of what has these labels."""
        rows = self.rounds[self.rounds["law"] == law]
        for name, value in labels.items():
            rows = rows[rows[name] == value]
        return rows.pivot(index="round", columns=by, values=f"{clock or self.clock}_s")

    def contended(self, law: str) -> str:
        """A remark for verdicts where more than half of a law's measurements were disturbed."""
        share = float(self.rounds.loc[self.rounds["law"] == law, "contended"].mean())
        return f"contended: {share:.0%} of the measurements were disturbed" if share > 0.5 else ""

    @property
    def first(self) -> str:
        """The attention that is measured where one is enough."""
        return next(iter(self.shapes))


def load(cfg: DictConfig) -> Found:
    """Reads the stage `infer`."""
    infer = Path(cfg.artifacts) / "infer"
    facts = json.loads((infer / "machine.json").read_text())
    known = {field.name for field in fields(Transformer)}
    shapes = {name: Transformer(**{k: v for k, v in s.items() if k in known}) for name, s in facts["models"].items()}
    return Found(
        closed={path.stem: pd.read_csv(path) for path in sorted((infer / "closed").glob("*.csv"))},
        rounds=pd.read_parquet(infer / "rounds.parquet"),
        arena=pd.read_csv(infer / "arena.csv"),
        identity=pd.read_csv(infer / "identity.csv"),
        facts=facts,
        machine=Accelerator(**facts["machine"]),
        shapes=shapes,
        heads={name: s["head_parameters"] for name, s in facts["models"].items()},
        clock=cfg.clock,
    )


def over_rounds(values: np.ndarray | list[float]) -> Measured:
    """The median over rounds, with the range of order statistics that covers it with 95% or more."""
    kept = [float(value) for value in values]
    return Timings(wall={"value": kept, "one": [1.0] * len(kept)}).ratio("value", "one")


def quadratic(seconds: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """seconds [rounds, lengths] = a S + b S^2, least squares of seconds a token: (a, b), each [rounds]."""
    lengths = seconds.columns.to_numpy(float)
    b, a = np.polyfit(lengths, (seconds.to_numpy() / lengths).T, 1)
    return a, b


def line(seconds: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """seconds [rounds, sizes] = alpha + beta bytes: (alpha, beta, share of variance explained), each [rounds]."""
    sizes, y = seconds.columns.to_numpy(float), seconds.to_numpy()
    beta, alpha = np.polyfit(sizes, y.T, 1)
    residual = y - alpha[:, None] - beta[:, None] * sizes
    explained = 1 - (residual**2).sum(1) / ((y - y.mean(1, keepdims=True)) ** 2).sum(1)
    return alpha, beta, explained


def decode_above(cfg: DictConfig, found: Found, attention: str, arm: str = "preallocated") -> pd.DataFrame:
    """Seconds of a decode step [rounds, KV bytes] behind caches several times as large as the processor's last one."""
    seconds = found.seconds("decode", "kv_bytes", arm=arm, attention=attention)
    return seconds.loc[:, seconds.columns >= cfg.decode.fit_above * found.facts["last_cache_bytes"]]


def decode_gate(cfg: DictConfig, found: Found) -> str | None:
    """Why decode cannot be judged: too few sizes lie above the last cache; None if it can."""
    count = min(decode_above(cfg, found, name).shape[1] for name in found.shapes)
    if count >= FEWEST:
        return None
    least = cfg.decode.fit_above * found.facts["last_cache_bytes"] / 2**20
    return f"gate: {count} caches of {least:.0f} MiB or more were measured, a line needs {FEWEST}; raise decode.kv_mib"


def without_head(found: Found, attention: str) -> Transformer:
    """The model without its output head, which reads only the last token of a prompt."""
    shape = found.shapes[attention]
    return replace(shape, flop_parameters=shape.flop_parameters - found.heads[attention])


def expected_square(shape: Transformer, c: float) -> float:
    """b/a of a prefill that takes as long for each operation: c L d / (2 N')."""
    return c * shape.layers * shape.attention_width / (2 * shape.flop_parameters)


def predictions(found: Found) -> pd.DataFrame:
    """A row a measured size: what the closed form says with this machine's rates, the median, and their ratio."""
    rows = []

    def add(law: str, name: str, seconds: pd.DataFrame, predict: Any, tokens: list[int]) -> None:
        for count, (size, column) in zip(tokens, seconds.items(), strict=True):
            predicted, measured = predict(count), float(np.median(column))
            rows.append(
                {
                    "law": law, "what": name, "tokens": count, "kv_mib": size / 2**20 if law != "prefill" else np.nan,
                    "predicted_s": predicted, "measured_s": measured, "predicted_over_measured": predicted / measured,
                }
            )  # fmt: skip

    machine = found.machine
    for attention, shape in found.shapes.items():
        for arm, convention in (("causal", "causal"), ("every pair", "full")):
            seconds = found.seconds("prefill", "tokens", attention=attention, arm=arm)
            bare = without_head(found, attention)
            lengths = [int(tokens) for tokens in seconds.columns]
            add(
                "prefill", f"{attention}, {arm}", seconds,
                lambda s, bare=bare, c=convention: prefill_seconds(bare, machine, s, c), lengths,
            )  # fmt: skip
        for arm in ("preallocated", "torch.cat"):
            seconds = found.seconds("decode", "kv_bytes", attention=attention, arm=arm)
            add(
                "decode", f"{attention}, {arm}", seconds, lambda s, shape=shape: decode_seconds(shape, machine, s),
                tokens_of(shape, seconds),
            )  # fmt: skip
    shape = found.shapes[found.first]
    seconds = found.seconds("switch", "kv_bytes", "wall", arm="switch")
    add("switch", found.first, seconds, lambda s: switch_seconds(shape, machine, s), tokens_of(shape, seconds))
    return pd.DataFrame(rows)


def tokens_of(shape: Transformer, seconds: pd.DataFrame) -> list[int]:
    """The lengths of caches whose bytes are the columns."""
    return [round(size / shape.kv_bytes_per_token) for size in seconds.columns]


def fits(cfg: DictConfig, found: Found) -> pd.DataFrame:
    """The fitted laws: a quantity a row, its interval over rounds, and what is expected of it."""
    rows = []

    def add(quantity: str, values: np.ndarray, expected: float = np.nan, unit: str = "") -> None:
        measured = over_rounds(values)
        rows.append(
            {
                "quantity": quantity, "unit": unit, "value": measured.value, "low": measured.low,
                "high": measured.high, "expected": expected,
            }
        )  # fmt: skip

    bare, machine = without_head(found, found.first), found.machine
    causal, every = (found.seconds("prefill", "tokens", attention=found.first, arm=x) for x in ("causal", "every pair"))
    (a, b), (a_all, b_all) = quadratic(causal), quadratic(every)
    add("prefill: b/a of a S + b S^2", b / a, expected_square(bare, 2), "1/token; expected: c = 2")
    add("prefill: implied c", (b / a) / expected_square(bare, 1), 2, "operations a layer, width and pair of tokens")
    add("prefill, every pair: implied c", (b_all / a_all) / expected_square(bare, 1), 4, "the same")
    add("prefill: b of every pair over b of causal", b_all / b, 2, "x; 2: masked pairs are skipped")
    add("prefill: rate of the linear part", 2 * bare.flop_parameters / a / 1e9, machine.flops_per_s / 1e9, "GFLOP/s")
    attention_flops = 2 * bare.layers * bare.attention_width
    add("prefill: rate of the attention part", attention_flops / b / 1e9, machine.flops_per_s / 1e9, "GFLOP/s")
    longest = causal.columns.max()
    add(f"prefill: tokens/s at {longest:.0f} tokens", longest / causal[longest].to_numpy(), unit="tokens/s")
    if decode_gate(cfg, found) is None:
        slopes = {name: line(decode_above(cfg, found, name)) for name in found.shapes}
        for name, (alpha, beta, explained) in slopes.items():
            add(f"decode, {name}: 1/beta", 1 / beta / 1e9, machine.memory_bytes_per_s / 1e9, "GB/s")
            add(f"decode, {name}: alpha", 1e3 * alpha, unit="ms")
            add(f"decode, {name}: variance explained by KV bytes", explained, 1.0)
    growing = found.seconds("decode", "kv_bytes", attention=found.first, arm="torch.cat")
    same = found.seconds("decode", "kv_bytes", attention=found.first, arm="preallocated")[growing.columns]
    largest = growing.columns.max()
    ratio = (growing[largest] / same[largest]).to_numpy()
    add(f"decode: torch.cat over preallocated at {largest / 2**20:.3g} MiB", ratio, unit="x")
    _, beta, explained = line(found.seconds("switch", "kv_bytes", "wall", arm="switch"))
    add("switch: rate, out and in", 2 / beta / 1e9, machine.host_bytes_per_s / 1e9, "GB/s")
    add("switch: variance explained by KV bytes", explained, 1.0)
    threads = found.seconds("threads", "arm", "wall")
    for work in ("prefill", "decode"):
        one, two = (threads[f"{work}, {n} threads"].to_numpy() for n in (1, 2))
        add(f"{work}: two threads over one", one / two, unit="x, wall time")
    return pd.DataFrame(rows)


def measured_costs(found: Found) -> Costs:
    """Median wall seconds of single requests."""
    return Costs(**found.seconds("costs", "arm", "wall").median().to_dict())


def forecasts(cfg: DictConfig, found: Found) -> dict[int, tuple[Session, np.ndarray]]:
    """resident -> (the simulated session, measured makespans [repeats])."""
    own, costs = cfg.session, measured_costs(found)
    measured = found.seconds("session", "arm", "wall")
    return {
        n: (simulate(costs, own.users, own.rounds, own.think_seconds, n), measured[f"resident {n}"].to_numpy())
        for n in own.resident
    }
