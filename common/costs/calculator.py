"""Where the time and the money of one answer go: a calculator for teaching (notebooks/cost_of_inference.ipynb).

An answer of o tokens after S tokens of context, in a batch of m users, occupies its machine for

    prefill(S) + o (weights / B + m KV / B) / m,    or for the arithmetic of the m tokens of a step where that is longer

The weights are read once a step for the whole batch, each user's cache once for that user: a batch shares the former
and not the latter. All times are lower bounds, of the roofline (common/costs/roofline.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from common.costs.catalogue import Accelerator, Transformer, accelerator, names, tensor_parallel, transformer
from common.costs.roofline import concurrency, decode_flops, decode_seconds, kv_bytes, prefill_seconds

if TYPE_CHECKING:
    import pandas as pd
    from ipywidgets import Widget
    from matplotlib.figure import Figure

PARTS = {  # of an answer, and what they are in a figure
    "prefill": "reading the context", "weights": "reading the weights", "cache": "reading the KV cache",
    "arithmetic": "arithmetic beyond that",
}  # fmt: skip
DEFAULTS: dict[str, Any] = {
    "model": "llama-3.1-8b", "machine": "h100-80gb", "devices": 1, "context": 8192, "output_tokens": 500, "users": 16,
    "usd_per_hour": 3.0,
}  # fmt: skip
CONTEXTS = np.unique(np.geomspace(512, 2**20, 60).astype(int))  # of the figure


def answer_seconds(
    model: Transformer, machine: Accelerator, context: int, output_tokens: int, users: int = 1
) -> dict[str, float]:
    """Machine-seconds of one answer by PARTS; the cache at its mean length, context + output_tokens / 2.

    They add up to prefill_seconds + decode_seconds / users. Raises ValueError for token counts or users out of range.
    """
    length = context + output_tokens // 2
    if output_tokens < 0 or users < 1:
        raise ValueError(f"an answer needs output_tokens >= 0 and users >= 1, not {output_tokens} and {users}")
    compute = output_tokens * decode_flops(model, length) / machine.flops_per_s
    weights = output_tokens * model.weight_bytes / machine.memory_bytes_per_s / users
    cache = output_tokens * kv_bytes(model, length) / machine.memory_bytes_per_s
    return {
        "prefill": prefill_seconds(model, machine, context),
        "weights": weights,
        "cache": cache,
        "arithmetic": max(compute - weights - cache, 0.0),
    }


def summary(
    model: Transformer, machine: Accelerator, context: int, output_tokens: int, users: int, usd_per_hour: float
) -> pd.Series:
    """What a user waits for, what the machine gives and what an answer costs. usd_per_hour: of the whole machine.

    Raises CapacityError if the weights do not fit.
    """
    import pandas as pd

    parts = answer_seconds(model, machine, context, output_tokens, users)
    step = decode_seconds(model, machine, context + output_tokens // 2, 1, users)
    busy = sum(parts.values())
    fits = concurrency(model, machine.memory_bytes, context + output_tokens)
    flops = users * decode_flops(model, context + output_tokens // 2) / machine.flops_per_s
    return pd.Series(
        {
            "time to first token (s)": parts["prefill"],
            "time per output token (ms)": 1e3 * step,
            "a decode step is bound by": "arithmetic" if flops >= step else "memory traffic",
            "output tokens a second, all users": output_tokens / busy,
            "users whose caches fit": fits if fits >= users else f"{fits}: fewer than the batch",
            "dollars an answer": busy * usd_per_hour / 3600,
            "dollars a million output tokens": 1e6 * busy * usd_per_hour / 3600 / max(output_tokens, 1),
        },
        name="lower bound",
    )


def figure(
    model: Transformer, machine: Accelerator, context: int, output_tokens: int, users: int, usd_per_hour: float
) -> Figure:
    """Left: machine-seconds of an answer by part, over the context. Right: its dollars, over the batch."""
    import matplotlib.pyplot as plt

    from common.reporting.style import COLOURS, WIDTH

    fig, (left, right) = plt.subplots(1, 2, figsize=(WIDTH * 1.25, 3.4), gridspec_kw={"width_ratios": [3, 2]})
    parts = [answer_seconds(model, machine, int(s), output_tokens, users) for s in CONTEXTS]
    left.stackplot(
        CONTEXTS, *([part[name] for part in parts] for name in PARTS), labels=PARTS.values(), colors=COLOURS, alpha=0.85
    )
    left.axvline(context, color="black", linestyle=":")
    shown = max(4 * context, 4096)
    left.set(xscale="log", xlim=(CONTEXTS[0], shown), ylim=(0, None), title=f"Where the time goes, {users} users")
    left.set(xlabel="context (tokens)", ylabel="machine time of an answer (s)")
    left.set_ylim(0, 1.05 * sum(answer_seconds(model, machine, min(shown, 2**20), output_tokens, users).values()))
    left.legend(loc="upper left")
    batch = np.unique(np.geomspace(1, 512, 60).astype(int))
    dollars = [sum(answer_seconds(model, machine, context, output_tokens, int(m)).values()) for m in batch]
    right.plot(batch, np.array(dollars) * usd_per_hour / 3600, color=COLOURS[0])
    fits = concurrency(model, machine.memory_bytes, context + output_tokens)
    if fits < batch[-1]:
        right.axvspan(max(fits, 1), batch[-1], color="0.88", label=f"memory holds {fits} users")
        right.legend(loc="upper right")
    right.axvline(users, color="black", linestyle=":")
    right.set(xscale="log", yscale="log", xlim=(1, batch[-1]), title=f"What it costs, {context:,} tokens")
    right.set(xlabel="users in the batch", ylabel="dollars an answer")
    return fig


def show(
    model: str, machine: str, devices: int, context: int, output_tokens: int, users: int, usd_per_hour: float
) -> None:
    """The figure and the summary of catalogued names, in a notebook. usd_per_hour: of each device.

    What cannot be served is said in a sentence: a slider may be anywhere.
    """
    import matplotlib.pyplot as plt
    from IPython.display import display

    from common.costs.roofline import CapacityError

    whole = tensor_parallel(accelerator(machine), devices)
    try:
        told = summary(transformer(model), whole, context, output_tokens, users, devices * usd_per_hour)
    except CapacityError as error:
        print(f"{model} on {whole.name}: {error}")
        return
    figure(transformer(model), whole, context, output_tokens, users, devices * usd_per_hour)
    plt.show()
    display(told.map(lambda value: f"{value:.4g}" if isinstance(value, float) else value).to_frame())


def sliders() -> Widget:
    """Controls of `show`, which begin with DEFAULTS; they need a running kernel."""
    import ipywidgets as widgets

    def control(kind: type, text: str, name: str, **own: Any) -> Widget:
        look = {"style": {"description_width": "10em"}, "layout": {"width": "30em"}}
        return kind(value=DEFAULTS[name], description=text, **look, **own)

    late = {"continuous_update": False}  # one drawing when the slider is let go
    controls = {
        "model": control(widgets.Dropdown, "model", "model", options=names("models")),
        "machine": control(widgets.Dropdown, "hardware", "machine", options=names("accelerators")),
        "devices": control(widgets.SelectionSlider, "devices", "devices", options=[1, 2, 4, 8], **late),
        "context": control(
            widgets.SelectionSlider, "context (tokens)", "context", options=[2**k for k in range(9, 21)], **late
        ),
        "output_tokens": control(
            widgets.IntSlider, "answer (tokens)", "output_tokens", min=100, max=16000, step=100, **late
        ),
        "users": control(widgets.IntSlider, "users in the batch", "users", min=1, max=512, **late),
        "usd_per_hour": control(
            widgets.FloatSlider, "dollars/hour, each", "usd_per_hour", min=0.1, max=15.0, step=0.1, **late
        ),
    }
    return widgets.VBox([*controls.values(), widgets.interactive_output(show, controls)])
