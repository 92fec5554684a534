"""Profile, fit, interpolation and price: exact on synthetic cells, published numbers on the released logs."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from common.costs import idealized_runtime as ir
from common.costs.idealized_runtime import Profile, dollars, fit, joules, read_log
from common.models.build import build

EXACT = Profile(0.02, {1: 0.03, 64: 0.04, 512: 0.25})
OUTPUTS = (1, 2, 4, 8, 16, 32, 64)


def cells(profile: Profile = EXACT, outputs: tuple[int, ...] = OUTPUTS) -> pd.DataFrame:
    grid = list(itertools.product(profile.prompt, outputs))
    return pd.DataFrame([(p, o, float(profile.seconds(p, o))) for p, o in grid], columns=[*ir.CELL, "seconds"])


# --- laws


def test_exact_cells_give_back_their_profile() -> None:
    found = fit(cells())
    assert found.profile.per_output_token == pytest.approx(0.02, abs=1e-12)
    assert found.profile.prompt == pytest.approx(EXACT.prompt, abs=1e-12)
    assert found.intercept == pytest.approx(-0.02, abs=1e-12)  # T - F = g (o - 1)
    assert found.r_squared == pytest.approx(1)
    assert found.max_squared_error < 1e-24


def test_the_slopes_error_is_that_of_least_squares() -> None:
    """Noise of one sigma on all cells but the o = 1 ones: within 4 sigma / sqrt(sum (o - mean)^2), over 40 draws also
    in the mean."""
    table, sigma = cells(), 1e-3
    o = table["output_tokens"].to_numpy()
    bound = sigma / np.sqrt(((o - o.mean()) ** 2).sum())
    errors = []
    for seed in range(40):
        noise = np.random.default_rng(seed).normal(0, sigma, len(table)) * (o > 1)
        slope = fit(table.assign(seconds=table["seconds"] + noise)).slope
        from_scipy = np.polynomial.polynomial.Polynomial.fit(
            o, table["seconds"] + noise - table["prompt_tokens"].map(EXACT.prompt), 1
        ).convert()
        assert slope == pytest.approx(from_scipy.coef[1], rel=1e-9)
        errors.append(slope - 0.02)
    assert max(map(abs, errors)) < 4 * bound
    assert abs(np.mean(errors)) < 4 * bound / np.sqrt(40)


def test_one_prompt_length_is_enough_for_the_slope() -> None:
    cheap = ir.cheap_cells(list(EXACT.prompt), OUTPUTS)
    table = cells().set_index(ir.CELL).loc[cheap].reset_index()
    assert (len(table), len(cells())) == (3 + 6, 21)
    assert fit(table).profile.seconds([1, 512], 64) == pytest.approx(EXACT.seconds([1, 512], 64))


def test_outputs_add_up_and_scoring_pays_the_prompt_alone() -> None:
    for p in (1, 30, 300, 9000):
        assert EXACT.seconds(p, 0) == EXACT.seconds(p, 1) == EXACT.prompt_seconds(p)
        assert EXACT.seconds(p, 12 + 30) - EXACT.seconds(p, 12) == pytest.approx(0.02 * 30)
    assert EXACT.seconds([[1, 64], [512, 1]], 2).tolist() == [
        [float(EXACT.seconds(p, 2)) for p in row] for row in [[1, 64], [512, 1]]
    ]


def test_money_and_energy() -> None:
    assert dollars([3.0, 7.5], usd_per_hour=3600).tolist() == [3.0, 7.5]
    assert dollars(1800, usd_per_hour=2.5, accelerators=8) == 10
    assert joules(2, watts=400, accelerators=4) == 3200


def test_denoising_removes_what_contention_adds() -> None:
    """Exact once each cell was seen without contention; an API's overhead stays apart from g by F(shortest) = g."""
    true = Profile(0.016, {1: 0.016, 256: 0.065, 512: 0.184}, overhead=0.237)
    random = np.random.default_rng(0)
    table = cells(true)
    waits = [np.zeros(len(table)), *random.exponential(0.2, (3, len(table)))]
    calls = pd.concat([table.assign(seconds=table["seconds"] + wait) for wait in waits])
    found = ir.denoise(calls)
    assert found.overhead == pytest.approx(0.237, abs=1e-12)
    assert found.per_output_token == pytest.approx(0.016, abs=1e-12)
    assert found.prompt == pytest.approx(true.prompt, abs=1e-12)


def test_profiles_survive_their_file(tmp_path: Path) -> None:
    profiles = {"a": EXACT, "b": Profile(0.1, {1: 0.2}, overhead=0.3, accelerators=8)}
    ir.save(tmp_path / "p.json", profiles)
    assert ir.load(tmp_path / "p.json") == profiles
    assert ir.profile_of(profiles, "b").accelerators == 8


def test_a_model_is_measured_as_its_cells_ask() -> None:
    model = build("llama-0.1m", vocab_size=32, eos_token_id=1)
    grid = ir.cheap_cells([1, 8, 16], [1, 3, 6])
    table, timings = ir.measure(model, grid, rounds=2, warmup=1)
    assert list(zip(table["prompt_tokens"], table["output_tokens"], strict=True)) == grid
    assert {len(rounds) for rounds in timings.wall.values()} == {2}
    with pytest.warns(UserWarning, match="falls") if (np.diff(table["seconds"][:3]) < 0).any() else nullcontext():
        profile = fit(table).profile
    assert profile.per_output_token > 0


# --- published: constants of HELM (Apache-2.0), and the logs and table of the paper's repository


@pytest.fixture(scope="module")
def published() -> Path:
    """The mirrored files of the paper, in the data root."""
    folder = Path(os.environ.get("FRUGAL_DATA", "")) / "idealized_runtime"
    if not os.environ.get("FRUGAL_DATA") or not folder.is_dir():
        pytest.skip("FRUGAL_DATA does not hold idealized_runtime/")
    return folder


# shape: layers, hidden, accelerators, slope to 5 decimals, g, F(1), F(512), F(1024), F(1920), decode TFLOP/s each
A100 = {
    "openai_ada": (24, 1024, 1, "0.01855", 0.019, 0.020, 0.024, 0.029, 0.039, 0.032),
    "gptj_6b": (28, 4096, 1, "0.02102", 0.021, 0.023, 0.042, 0.077, 0.142, 0.537),
    "ai21_j1_large": (32, 4096, 1, "0.02374", 0.024, 0.026, 0.047, 0.089, 0.167, 0.537),
    "gpt2": (48, 4096, 1, "0.03496", 0.035, 0.038, 0.067, 0.127, 0.241, 0.552),
    "gpt_neox_20b": (44, 6144, 1, "0.03322", 0.033, 0.035, 0.114, 0.234, 0.441, 1.208),
    "anthropic": (64, 8192, 4, "0.05366", 0.054, 0.057, 0.107, 0.189, 0.342, 0.477),
    "ai21_j1_jumbo": (76, 13824, 8, "0.06435", 0.064, 0.070, 0.165, 0.307, 0.580, 0.681),
    "openai_davinci": (96, 12288, 8, "0.08142", 0.081, 0.087, 0.179, 0.324, 0.582, 0.537),
    "mt_nlg": (105, 20480, 8, "0.12273", 0.123, 0.129, 0.483, 0.912, 1.818, 1.074),
}
V100 = {
    "openai_ada": ("0.02043", 0.022, 0.030, "1.101"),
    "gptj_6b": ("0.02401", 0.027, 0.091, "1.142"),
    "ai21_j1_large": ("0.02780", 0.030, 0.104, "1.171"),
    "ai21_j1_jumbo": ("0.08007", 0.090, 0.317, "1.244"),
    "openai_davinci": ("0.10820", 0.107, 0.366, "1.329"),
}
IN_HELM = {
    "openai_ada": "openai/ada",
    "gptj_6b": "gooseai/gpt-j-6b",
    "ai21_j1_large": "ai21/j1-large",
    "gpt_neox_20b": "gooseai/gpt-neo-20b",
    "anthropic": "anthropic/stanford-online-all-v4-s3",
    "ai21_j1_jumbo": "ai21/j1-jumbo",
    "openai_davinci": "openai/davinci",
    "mt_nlg": "microsoft/TNLGv2_530B",
}


def refit(published: Path, gpu: str, shape: str) -> ir.Fit:
    """mt_nlg was run with 35 of its 105 layers."""
    table = read_log((published / "logs" / gpu / f"{shape}.log").read_text())
    return fit(table.assign(seconds=table["seconds"] * (3 if shape == "mt_nlg" else 1)), decimals=3)


@pytest.mark.filterwarnings("ignore:F\\(p\\) falls")
@pytest.mark.parametrize("shape", A100)
def test_refit_of_the_a100_logs(published: Path, shape: str) -> None:
    layers, hidden, gpus, slope, g, *first, tflops = A100[shape]
    found = refit(published, "a100", shape)
    assert f"{found.slope:.5f}" == slope
    assert found.profile.per_output_token == g
    assert [found.profile.prompt[p] for p in (1, 512, 1024, 1920)] == first
    assert round(ir.decode_flops(layers, hidden) / (g * gpus) / 1e12, 3) == tflops
    assert found.r_squared >= 0.998
    assert found.intercept == pytest.approx(-g, abs=0.02)


@pytest.mark.filterwarnings("ignore:F\\(p\\) falls")
@pytest.mark.parametrize("shape", V100)
def test_refit_of_the_v100_logs_and_the_ratio_of_the_slopes(published: Path, shape: str) -> None:
    slope, *first, ratio = V100[shape]
    found = refit(published, "v100", shape)
    assert f"{found.slope:.5f}" == slope
    assert [found.profile.prompt[p] for p in (1, 512)] == first
    assert f"{float(slope) / float(A100[shape][3]):.3f}" == ratio  # of the slopes as printed


@pytest.mark.filterwarnings("ignore:F\\(p\\) falls")
def test_helms_constants_are_those_of_the_logs(published: Path) -> None:
    """g exactly for the eight shapes with logs; F within 6% or 2 ms, since HELM's comes from a later run for some."""
    helm = ir.load(published / "helm" / "inference_idealized_runtimes.json")
    for shape, name in IN_HELM.items():
        ours = refit(published, "a100", shape).profile
        assert helm[name].per_output_token == ours.per_output_token
        shared = sorted(set(ours.prompt) & set(helm[name].prompt))
        for p in shared:
            assert ours.prompt[p] == pytest.approx(helm[name].prompt[p], rel=0.06, abs=0.0021), (shape, p)


def test_helms_interpolation(published: Path) -> None:
    davinci = ir.load(published / "helm" / "inference_idealized_runtimes.json")["openai/davinci"]
    assert davinci.prompt_seconds(300) == pytest.approx(0.125625, abs=1e-12)  # 0.134 * 300 / 320
    assert davinci.prompt_seconds(3840) == pytest.approx(1.194, abs=1e-12)  # 0.597 * 2
    assert davinci.seconds(1024, 1) == 0.323
    assert davinci.seconds(1024, 11) == pytest.approx(0.323 + 10 * 0.081)


def test_published_denoised_profiles_take_the_shortest_prompt_for_an_output_token(published: Path) -> None:
    """What `denoise` assumes; and the raw seconds of two rows of the paper's table."""
    apis = ir.load(published / "helm" / "inference_denoised_runtimes.json")
    assert len(apis) == 18
    assert all(profile.prompt[1] == profile.per_output_token for profile in apis.values())
    assert apis["openai/davinci"].seconds(1024, 3) == pytest.approx(0.183 + 0.033 + 2 * 0.030)
    assert apis["ai21/j1-jumbo"].seconds(512, 1) == pytest.approx(0.257 + 0.268)


def test_ratios_of_two_models_of_one_architecture(published: Path) -> None:
    """davinci / text-davinci-001 over 139 scenarios: raw 2.69, idealized 0.99 (notebook analyze_runtimes.ipynb)."""
    table = pd.read_csv(published / "logs" / "inference_runtimes_and_accuracies_all_scenarios.csv")
    parts = table["scenario"].str.extract(r"^(.*model=)([^,]*)(.*)$")
    table = table.assign(model=parts[1], key=parts[0] + parts[2])
    table = table.dropna(subset="inference_runtime").drop_duplicates(["model", "key"])
    pair = [table[table["model"] == name].set_index("key") for name in ("openai_davinci", "openai_text-davinci-001")]
    shared = pair[0].index.intersection(pair[1].index)
    assert len(shared) == 139
    printed = {
        "inference_runtime": ["2.6850", "10.8678", "1.5701"],
        "inference_idealized_runtime": ["0.9935", "4.9042", "0.2632"],
        "num_tokens": ["1.0150", "inf", "0.0938"],
    }
    for column, expected in printed.items():
        ratio = pair[0].loc[shared, column] / pair[1].loc[shared, column]
        finite = ratio[np.isfinite(ratio)]
        assert [f"{x:.4f}" for x in (finite.mean(), ratio.max(), ratio.min())] == expected


def test_prompt_flops() -> None:
    """Literally: 24 p h^2 l of the blocks, 4 p^2 h l of attention, 2 p h V of the logits."""
    p, layers, hidden, vocabulary = 300, 12, 768, 50304
    literal = 24 * p * hidden**2 * layers + 4 * p**2 * hidden * layers + 2 * p * hidden * vocabulary
    assert ir.prompt_flops(p, layers, hidden, vocabulary) == pytest.approx(literal, rel=1e-12)


# --- bad input


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: EXACT.seconds(0, 1), ValueError, "1 prompt token or more, not 0"),
        (lambda: EXACT.seconds(5, [1, -2]), ValueError, "at least 0, not -2"),
        (lambda: Profile(0.1, {}), ValueError, r"ascending prompt lengths of 1 or more, not \[\]"),
        (lambda: Profile(0.1, {5: 0.1, 2: 0.1}), ValueError, r"not \[5, 2\]"),
        (lambda: Profile(-0.1, {5: 0.1}), ValueError, "negative seconds"),
        (lambda: ir.profile_of({"a": EXACT}, "b"), KeyError, "no profile of 'b'; known: a"),
        (lambda: fit(cells().iloc[:0]), ValueError, "empty grid"),
        (lambda: fit(cells().drop(columns="seconds")), ValueError, "lack the columns seconds"),
        (lambda: fit(cells().assign(seconds=0.0)), ValueError, "positive seconds, not"),
        (lambda: fit(cells().query("output_tokens > 1 or prompt_tokens != 64")), ValueError, r"lack p = \[64\]"),
        (lambda: fit(cells().query("output_tokens == 1")), ValueError, "two numbers of output tokens"),
        (lambda: fit(pd.concat([cells(), cells()])), ValueError, r"\(1, 1\) is there twice"),
        (lambda: fit(cells().assign(seconds=lambda t: 9 - t["output_tokens"] / 8)), ValueError, "faster with output"),
        (lambda: dollars(1, -1), ValueError, "usd_per_hour >= 0 and accelerators >= 1, not -1 and 1"),
        (lambda: joules(1, 1, 0), ValueError, "accelerators >= 1, not 1 and 0"),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_falling_prompt_time_is_allowed_and_named() -> None:
    with pytest.warns(UserWarning, match="falls somewhere along p"):
        found = fit(cells(Profile(0.02, {1: 0.03, 64: 0.02, 512: 0.25})))
    assert found.profile.prompt[64] == pytest.approx(0.02)
