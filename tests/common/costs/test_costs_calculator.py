"""The calculator: an answer's parts add up to the roofline, and the notebook's controls name what there is."""

from __future__ import annotations

import pytest

from common.costs import calculator
from common.costs.catalogue import accelerator, names, tensor_parallel, transformer
from common.costs.roofline import CapacityError, concurrency, decode_seconds, prefill_seconds

MODEL, MACHINE = transformer("llama-3.1-8b"), accelerator("h100-80gb")


@pytest.mark.parametrize("users", [1, 16, 300, 5000])
@pytest.mark.parametrize("context", [512, 100_000])
def test_parts_add_up_to_prefill_and_a_share_of_decoding(users: int, context: int) -> None:
    parts = calculator.answer_seconds(MODEL, MACHINE, context, 300, users)
    decode = decode_seconds(MODEL, MACHINE, context + 150, 300, users)
    assert sum(parts.values()) == pytest.approx(prefill_seconds(MODEL, MACHINE, context) + decode / users, rel=1e-12)
    assert min(parts.values()) >= 0


def test_a_batch_shares_the_weights_and_not_the_caches() -> None:
    one, many = (calculator.answer_seconds(MODEL, MACHINE, 8192, 500, users) for users in (1, 10))
    assert many["weights"] == pytest.approx(one["weights"] / 10)
    assert (many["cache"], many["prefill"]) == (one["cache"], one["prefill"])
    assert one["arithmetic"] == 0
    assert calculator.answer_seconds(MODEL, MACHINE, 16, 500, 2000)["arithmetic"] > 0  # beyond the critical batch


def test_the_summary_is_that_of_the_parts() -> None:
    told = calculator.summary(MODEL, MACHINE, 8192, 500, 16, usd_per_hour=3.0)
    busy = sum(calculator.answer_seconds(MODEL, MACHINE, 8192, 500, 16).values())
    assert told["time to first token (s)"] == prefill_seconds(MODEL, MACHINE, 8192)
    assert told["dollars an answer"] == pytest.approx(busy * 3 / 3600)
    assert told["dollars a million output tokens"] == pytest.approx(busy * 3 / 3600 / 500 * 1e6)
    assert told["output tokens a second, all users"] == pytest.approx(500 / busy)
    assert told["a decode step is bound by"] == "memory traffic"
    assert told["users whose caches fit"] == concurrency(MODEL, MACHINE.memory_bytes, 8692)
    few = calculator.summary(MODEL, MACHINE, 500_000, 500, 16, usd_per_hour=3.0)
    assert few["users whose caches fit"] == "1: fewer than the batch"


def test_the_first_token_takes_one_reading_of_the_weights_at_least() -> None:
    parts = calculator.answer_seconds(MODEL, MACHINE, 1, 100)
    assert parts["prefill"] == pytest.approx(MODEL.weight_bytes / MACHINE.memory_bytes_per_s)


def test_every_combination_of_names_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Or says what does not fit: a slider may be anywhere."""
    refused = []
    for model in names("models"):
        for machine in names("accelerators"):
            whole = tensor_parallel(accelerator(machine), 1)
            calculator.show(model, machine, 1, 2**20, 16000, 512, 3.0)
            fits = transformer(model).weight_bytes <= whole.memory_bytes
            assert ("do not fit" in capsys.readouterr().out) == (not fits)
            refused += [] if fits else [(model, machine)]
    assert ("llama-3.1-70b", "rtx-4090") in refused
    with pytest.raises(CapacityError, match="more devices"):
        calculator.summary(transformer("llama-3.1-70b"), MACHINE, 8, 8, 1, 1.0)


def test_sliders_begin_with_the_defaults_and_name_what_there_is() -> None:
    box = calculator.sliders()
    *controls, _ = box.children
    assert [control.value for control in controls] == list(calculator.DEFAULTS.values())
    assert list(controls[0].options) == names("models")
    assert list(controls[1].options) == names("accelerators")


@pytest.mark.parametrize(("context", "output", "users"), [(0, 1, 1), (8, -1, 1), (8, 1, 0)])
def test_bad_input(context: int, output: int, users: int) -> None:
    with pytest.raises(ValueError, match=r"at least 1|>= 0"):
        calculator.answer_seconds(MODEL, MACHINE, context, output, users)
