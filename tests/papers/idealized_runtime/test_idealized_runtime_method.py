"""Closed form, layers and fronts against exact laws; published constants; providers that answer as `generate` does."""

from __future__ import annotations

import itertools
import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from common.costs import idealized_runtime as ir
from common.data import sources
from common.generation.sampler import generate
from common.models.build import build, count_parameters
from common.run import ROOT, compose
from papers.idealized_runtime import Profile, Shape, fit_stack, leave_one_out, pareto_front, profile_model, published
from papers.idealized_runtime.method import Stack, along_layers
from papers.idealized_runtime.providers import Provider, Service, noisy_neighbour

SLUG = "idealized_runtime"
PROMPTS = (1, 64, 512, 2048)
STACK = Stack(flops_per_s=2e14, bytes_per_s=1.2e12, layer_overhead=4e-4)
SHAPES = {
    "ada": Shape(24, 1024), "j": Shape(28, 4096), "neox": Shape(44, 6144), "claude": Shape(64, 8192, accelerators=4),
    "davinci": Shape(96, 12288, accelerators=8),
}  # fmt: skip


def reported(table: str) -> pd.DataFrame:
    told = yaml.safe_load((ROOT / "papers" / SLUG / "reported.yaml").read_text())["tables"]
    one = next(t for t in told if t["id"] == table)
    return pd.DataFrame(one["rows"], columns=one["columns"])


def same(found: pd.DataFrame, table: str, decimals: int | None = None) -> None:
    """Equal to the last printed digit."""
    found = found if decimals is None else found.round(decimals)
    pd.testing.assert_frame_equal(found, reported(table), check_dtype=False, rtol=0, atol=1e-12)


# --- closed form


def test_profiles_of_a_stack_give_the_stack_back() -> None:
    profiles = {name: STACK.profile(shape, PROMPTS) for name, shape in SHAPES.items()}
    found = fit_stack(SHAPES, profiles)
    assert vars(found) == pytest.approx(vars(STACK), rel=1e-5)
    for error in leave_one_out(SHAPES, profiles).values():
        assert error == pytest.approx({"g": 0, "F": 0}, abs=1e-5)


def test_what_binds_a_stack() -> None:
    """Nothing but weights: a token takes their bytes over the bandwidth of all accelerators; so does a short prompt.
    Twice the layers take twice that and twice the overhead, but for the embedding."""
    davinci = SHAPES["davinci"]
    bare = Stack(1e30, 1e12, 0.0).profile(davinci, PROMPTS)
    assert bare.per_output_token == pytest.approx(2 * davinci.parameters / 8e12)
    assert set(bare.prompt.values()) == {bare.per_output_token}
    slow = Stack(1e12, 1e30, 0.0).profile(davinci, PROMPTS)
    assert slow.prompt[512] == pytest.approx(ir.prompt_flops(512, 96, 12288, 50304) / 8e12)
    once, twice = (STACK.profile(Shape(layers, 4096, vocabulary=1), PROMPTS).per_output_token for layers in (20, 40))
    assert twice == pytest.approx(2 * once, rel=1e-4)


def test_parameters_of_a_shape_are_those_of_the_models_that_are_timed() -> None:
    from papers.idealized_runtime.own import build_model

    cfg = compose(SLUG, "infer", ["profile=cpu", "device=cpu"])
    for architecture in cfg.architectures:
        for layers, hidden in ((2, 128), (4, 256)):
            counted = count_parameters(build_model(cfg, architecture, layers, hidden))
            positions = cfg.positions * hidden if architecture == "gpt2" else 0
            assert counted - positions == pytest.approx(Shape(layers, hidden, cfg.vocabulary).parameters, rel=0.03)


def test_operations_of_a_query() -> None:
    shape = Shape(12, 768)
    assert shape.query_flops(300, 0) == shape.query_flops(300, 1) == ir.prompt_flops(300, 12, 768, 50304)
    assert shape.query_flops(300, 11) - shape.query_flops(300, 1) == 10 * 24 * 768**2 * 12


# --- layers


def test_the_line_through_two_depths_counts_the_head_once() -> None:
    def of(layers: int) -> Profile:
        return Profile(0.5 + 0.1 * layers, {1: 1 + 0.2 * layers, 64: 3 + 0.4 * layers})

    assert along_layers(of(2), of(5), (2, 5), 35).prompt == pytest.approx(of(35).prompt)
    assert along_layers(of(2), of(5), (2, 5), 35).per_output_token == pytest.approx(of(35).per_output_token)
    assert 7 * of(5).per_output_token > 1.5 * of(35).per_output_token  # times seven counts the head seven times


# --- fronts

points = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=8)


@given(points)
def test_a_front_is_what_nothing_beats(of: list[tuple[int, int]]) -> None:
    cost, value = zip(*of, strict=True)
    beaten = [
        any((c <= a and v > b) or (c < a and v >= b) for c, v in of) for a, b in of
    ]  # fmt: skip
    assert pareto_front(cost, value).tolist() == [not bad for bad in beaten]
    assert pareto_front(cost, value).any()


def test_dominators_and_pairs() -> None:
    rows = pd.DataFrame(
        [("x", "a", 1, 0.9), ("x", "b", 2, 0.8), ("x", "c", 3, 0.8), ("y", "a", 1, 0.5), ("y", "b", 2, 0.4),
         ("y", "c", 3, 0.3), ("z", "a", 1, 0.5), ("z", "b", 2, 0.9)],
        columns=["scenario", "model", "idealized", "exact_match"],
    )  # fmt: skip
    found = published.fronts(rows)
    assert found["scenario"].unique().tolist() == ["x", "y"]  # z has two models only
    assert published.dominators(found) == ["a"]
    assert published.disagreeing(np.array([1, 2, 3]), np.array([1, 2, 3])) == 0
    assert published.disagreeing(np.array([1, 2, 3]), np.array([3, 2, 1])) == 3
    assert published.disagreeing(np.array([2, 1, 3]), np.array([1, 2, 3])) == 1


# --- the instrument on a model


def test_a_model_is_profiled_in_one_call() -> None:
    profile = profile_model(build("llama-0.1m", vocab_size=32, eos_token_id=1), [1, 8, 16], [1, 4, 8], rounds=2)
    assert list(profile.prompt) == [1, 8, 16]
    assert float(profile.seconds(8, 5)) > float(profile.seconds(8, 1)) > 0


# --- published


def test_the_embedded_constants_are_the_pinned_files() -> None:
    for file in published.HELM.values():
        entry = sources.catalogue()[f"{published.FOLDER}/helm/{file}"]
        assert sources.digest(published.EMBEDDED / file) == entry["sha256"]
        assert entry["licence"] == "Apache-2.0"


def test_tables_of_helms_constants() -> None:
    constants, apis = (ir.load(published.EMBEDDED / file) for file in published.HELM.values())
    models = reported("t1")["model"]
    same(published.constants_table(constants, models, (1, 256, 512, 1024, 1536, 1920)), "t1")
    same(published.denoised_table(apis), "t4")


def test_helms_interpolation_of_the_embedded_constants() -> None:
    davinci = ir.load(published.EMBEDDED / published.HELM["idealized"])["openai/davinci"]
    assert davinci.prompt_seconds(300) == pytest.approx(0.125625, abs=1e-12)  # 0.134 * 300 / 320
    assert davinci.prompt_seconds(3840) == pytest.approx(1.194, abs=1e-12)
    assert davinci.seconds(512, 0) == davinci.seconds(512, 1) == 0.178


def test_released_tables_come_out_to_the_last_digit(tmp_path: Path) -> None:
    names = [f"{published.FOLDER}/logs/{published.SCENARIOS}", f"{published.FOLDER}/logs/v100/openai_ada.log"]
    if any(sources.offline_origin(name) == "embedded" for name in names):
        pytest.skip("the released logs are not here")
    cfg = compose(SLUG, "data", ["profile=smoke", "device=cpu"])
    cfg.data_root = None  # which the runner makes of `auto`: the folder that FRUGAL_DATA names
    published.collect(cfg, tmp_path)
    cells, scenarios = (pd.read_csv(tmp_path / f"{name}.csv") for name in ("cells", "scenarios"))
    a100, v100 = (published.fits(cells, gpu) for gpu in ("a100", "v100"))
    same(published.refit_table(a100), "t2")
    same(published.v100_table(v100), "t3")
    same(published.pair_table(scenarios).drop(columns="pairs"), "t5", decimals=2)
    assert {name: len(of) for name, of in cells.groupby("gpu")} == {"a100": 9 * 270, "v100": 5 * 120}


def test_scenarios_keep_one_row_a_model_and_infinite_ratios_leave_the_mean() -> None:
    columns = ["inference_runtime", "inference_idealized_runtime", "num_tokens", "exact_match"]
    rows = []
    for scenario, ours, theirs in (
        ("a:", (2.0, 1.0, 4.0), (1.0, 1.0, 2.0)),
        ("b:k=5,", (9.0, 3.0, 1.0), (3.0, 1.0, 0.0)),
    ):
        for model, of in zip(published.DAVINCI, (ours, theirs), strict=True):
            rows += [{"scenario": f"{scenario}model={model}", **dict(zip(columns, (*of, 0.5), strict=True))}] * 2
    rows.append({"scenario": "a:model=other", **dict.fromkeys(columns, float("nan"))})
    table = published.scenarios(pd.DataFrame(rows))
    assert len(table) == 4
    pairs = published.pair_table(table).set_index("metric")
    assert pairs.loc["raw runtime"].tolist() == [2.5, 3.0, 2.0, 2]
    assert pairs.loc["generated tokens"].tolist() == [2.0, float("inf"), 2.0, 2]
    assert published.raw_over_idealized(table).to_dict() == {"openai_davinci": 2.5, "openai_text-davinci-001": 2.0}


def test_absent_logs_leave_the_constants_and_the_network_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FRUGAL_DATA", raising=False)
    monkeypatch.setattr(sources, "DOWNLOADS", tmp_path / "nowhere")
    asked: list[str] = []

    def refuse(url: str, timeout: float) -> None:
        asked.append(url)
        raise OSError("no network")

    monkeypatch.setattr(sources.urllib.request, "urlopen", refuse)
    cfg = compose(SLUG, "data", ["profile=smoke", "device=cpu", "network=true"])
    cfg.data_root = None
    out = tmp_path / "out"
    out.mkdir()
    published.collect(cfg, out)
    assert len(asked) == 1
    assert {path.name for path in out.iterdir()} == {*published.HELM.values(), "sources.json"}
    cfg.substitute = False
    with pytest.raises(sources.MissingSource, match="make data SOURCE=idealized_runtime/helm"):
        published.collect(cfg, out)


# --- providers


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return build("llama-0.1m", vocab_size=32, eos_token_id=1, dtype=torch.float64)


def test_every_provider_gives_the_tokens_of_generate(model: torch.nn.Module) -> None:
    """Optimisations and neighbours change times alone; in double precision."""
    prompts = [[3, 4, 5], [7] * 9]
    expected = [generate(model, [prompt], 12, stop_tokens=[2]).tokens[0].tolist() for prompt in prompts]
    for threads, lean in itertools.product((1, 2), (True, False)):
        with Service(model, Provider(threads, lean, neighbour=False)) as service:
            assert [service.ask(prompt, 12, [2]).tokens[0].tolist() for prompt in prompts] == expected


def test_callers_in_many_threads_get_their_own_answers(model: torch.nn.Module) -> None:
    found: dict[int, list[int]] = {}
    with Service(model, Provider(1, lean=True, neighbour=False)) as service:

        def ask(i: int) -> None:
            found[i] = service.ask([i + 2, i + 3], 6).tokens[0].tolist()

        callers = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert found == {i: generate(model, [[i + 2, i + 3]], 6, stop_tokens=()).tokens[0].tolist() for i in range(8)}


def test_a_failed_request_is_the_callers_and_the_service_goes_on(model: torch.nn.Module) -> None:
    switched: list[bool] = []
    with Service(model, Provider(1, lean=True, neighbour=True), switched.append) as service:
        with pytest.raises(ValueError, match="outside the vocabulary"):
            service.ask([99], 3)
        assert len(service.ask([3], 3).tokens[0]) == 3
    assert switched == [True, False, True, False]


@pytest.mark.slow
def test_the_neighbour_works_when_it_is_wanted_and_ends_with_its_block() -> None:
    before = set(multiprocessing.active_children())
    with noisy_neighbour(period=0.1, duty=1.0) as switch:
        (process,) = set(multiprocessing.active_children()) - before
        stat = Path(f"/proc/{process.pid}/stat")
        if not stat.exists():
            pytest.skip("no /proc here")

        def worked(on: bool) -> int:
            switch(on)
            start = sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))
            time.sleep(0.5)
            return sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13])) - start

        idle, busy = worked(False), worked(True)
    assert busy > idle + 5  # hundredths of a second
    assert process.exitcode is not None


# --- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Shape(0, 8), "layers of a shape must be at least 1, not 0"),
        (lambda: Shape(1, 8, accelerators=0), "accelerators of a shape must be at least 1, not 0"),
        (lambda: fit_stack(SHAPES, {"ada": Profile(0.1, {1: 0.1})}), "three unknowns"),
        (lambda: fit_stack({}, {n: Profile(0.1, {1: 0.1}) for n in "abc"}), "as many models with a shape"),
        (lambda: leave_one_out(SHAPES, {n: Profile(0.1, {1: 0.1}) for n in "abc"}), "leaving one of 3 models out"),
        (lambda: along_layers(Profile(1, {1: 1}), Profile(2, {1: 2}), (4, 2), 8), "not 4, 2, 8"),
        (lambda: along_layers(Profile(1, {1: 1}), Profile(2, {2: 2}), (2, 4), 8), "the same prompts"),
        (lambda: pareto_front([1, 2], [1]), "a finite cost and value for each model"),
        (lambda: pareto_front([1, float("nan")], [1, 2]), "a finite cost and value for each model"),
        (lambda: Provider(0, lean=True, neighbour=False), "at least one thread, not 0"),
        (lambda: noisy_neighbour(1.0, 1.5).__enter__(), "0 <= duty <= 1 and a positive period, not 1.5 and 1.0"),
        (lambda: ir.profile_of(ir.load(published.EMBEDDED / published.HELM["idealized"]), "gpt-5"), "of 'gpt-5'"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, KeyError), match=message):
        call()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prompts=[8,1]", r"prompts=\[8, 1\] must be two or more rising"),
        ("prompts=[0,8]", "of at least 1"),
        ("outputs=[2,3]", "must begin with 1"),
        ("held_out.output=6", "is not held out"),
        ("held_out.prompt=8", "is not held out"),
        ("positions=16", "positions=16 is less than the longest query"),
        ("head_size=24", "no multiples of head_size=24"),
        ("rounds=0", "rounds=0 must be at least 1"),
        ("clock=sun", "neither 'cpu' nor 'wall'"),
        ("api.market.large=Y", "must give each of small, base, large one of X, Y, Z"),
        ("api.problems=1", "needs 2 problems"),
        ("api.weights=chain_hard", "is none of tradeoff.weights"),
        ("api.providers.X.threads=0", "at least one thread"),
    ],
)
def test_bad_settings_are_refused_before_any_work(override: str, message: str) -> None:
    from papers.idealized_runtime import market, own

    cfg = compose(SLUG, "infer", ["profile=smoke", "device=cpu", override])
    with pytest.raises(ValueError, match=message):
        [check(cfg) for check in (own.check, market.check)]
