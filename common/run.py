"""Runs one stage of a paper: `python -m common.run lookahead infer profile=cpu prompts=128`.

The first two words name the paper (or `shared`) and the stage; Hydra reads the rest (`-m` sweeps, `--cfg job` prints
the configuration). A stage is a function of one argument in the paper's experiment.py. It reads `cfg.artifacts` and
`cfg.shared` and writes to `cfg.out`, an empty folder that is renamed into place when the function returns.

Only DVC's own call writes to artifacts/ and results/. Anything else writes to runs/<slug>/<stage>/<overrides>/.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from common.workers import start_server

ROOT = Path(__file__).resolve().parents[1]
PROFILES = ("smoke", "cpu", "gpu", "paper")
SHARED = ("shared", "reasoners")  # folders of common/ whose stages make models that several papers use
ORDER = ("data", "train", "infer", "figures")
TRACKED = {"profile", "seed", "device", "data_root"}  # the overrides of DVC's own call


def papers() -> list[str]:
    """The folders of papers/ that hold an experiment."""
    return sorted(path.parent.name for path in (ROOT / "papers").glob("*/experiment.py"))


def folder(slug: str) -> Path:
    """Where a paper (or one of SHARED) has its experiment.py and conf/."""
    return ROOT / ("common" if slug in SHARED else "papers") / slug


def stages(slug: str) -> list[str]:
    """The public one-argument functions of experiment.py, read without importing it."""
    tree = ast.parse((folder(slug) / "experiment.py").read_text())
    return [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and [a.arg for a in node.args.args] == ["cfg"] and node.name[0] != "_"
    ]


def params() -> dict[str, str]:
    """The knobs that DVC tracks: profile, seed, device, data_root."""
    return yaml.safe_load((ROOT / "params.yaml").read_text())


def check_words(slug: str, stage: str, profile: str) -> None:
    """Raises SystemExit that lists the valid papers, stages or profiles when one of the words is none of them."""
    if slug not in [*papers(), *SHARED]:
        raise SystemExit(f"unknown paper {slug!r}; the papers are: {', '.join(papers())} (and: {', '.join(SHARED)})")
    known = [*stages(slug), *(["notebook", "all"] if slug not in SHARED else [])]
    if stage not in known:
        raise SystemExit(f"unknown stage {stage!r} of {slug}; its stages are: {', '.join(known)}")
    have = [p for p in PROFILES if (folder(slug) / "conf" / "profile" / f"{p}.yaml").exists()]
    for name in profile.split(","):
        if name not in have:
            raise SystemExit(f"unknown profile {name!r} of {slug}; its profiles are: {', '.join(have)}")


def _split(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def full_overrides(slug: str, stage: str, overrides: Iterable[str]) -> list[str]:
    """The given overrides behind those that params.yaml and the first two words stand for."""
    given = {_split(o)[0] for o in overrides}
    defaults = [f"{key}={value}" for key, value in params().items() if key not in given]
    own = [f"slug={slug}", f"stage={stage}", f"paper={folder(slug)}", *([] if "root" in given else [f"root={ROOT}"])]
    return [f"hydra.searchpath=[file://{folder(slug) / 'conf'}]", *own, *defaults, *overrides]


def compose(slug: str, stage: str, overrides: Iterable[str] = ()) -> DictConfig:
    """The configuration of one stage. Raises SystemExit as `check` does."""
    overrides = list(overrides)
    check(slug, stage, overrides)
    return _compose(slug, stage, overrides)


def _compose(slug: str, stage: str, overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(ROOT / "common" / "conf"), version_base="1.3"):
        return hydra.compose("base", full_overrides(slug, stage, overrides))


def check(slug: str, stage: str, overrides: list[str]) -> None:
    """Raises SystemExit for an unknown paper, stage, profile, key or back end (listing the valid ones), a wrong type,
    and a back end that cannot run here."""
    given = dict(map(_split, overrides))
    profile = given.get("profile", params()["profile"])
    check_words(slug, stage, profile)
    plain = _compose(slug, stage, [f"profile={profile.split(',')[0]}"])
    _check_keys(plain, overrides)
    _check_backends(_values(given.get("backend", plain.backend)))


def _check_keys(plain: DictConfig, overrides: list[str]) -> None:
    for override in overrides:
        key, text = _split(override)
        if key.startswith("hydra"):
            continue
        missing = object()
        old = OmegaConf.select(plain, key, default=missing, throw_on_missing=False)
        if old is missing or (old is None and key not in _keys(plain)):
            raise SystemExit(f"unknown key {key!r}; the keys of {plain.slug} are: {', '.join(_keys(plain))}")
        if key in TRACKED and key != "seed":
            continue
        for value in _values(text):
            if not _fits(old, value):
                raise SystemExit(
                    f"{key}={value!r} is no {type(old).__name__}; its value in profile {plain.profile} is {old!r}"
                )


def _check_backends(names: list[object]) -> None:
    if names == ["transformers"]:
        return  # the default, without the import of torch
    from common.generation.vllm import check_backend

    for name in names:
        try:
            check_backend(str(name))
        except ValueError as error:
            raise SystemExit(f"backend={name}: {error}") from None


def _keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in map(str, cfg):
        node = cfg._get_node(key)
        keys += _keys(node, f"{prefix}{key}.") if isinstance(node, DictConfig) else [f"{prefix}{key}"]
    return keys


def _values(text: str) -> list[object]:
    """What an override's text stands for; a sweep `a,b` stands for several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    override = OverridesParser.create().parse_override(f"x={text}")
    if override.is_sweep_override():
        return list(override.sweep_iterator())
    return [override.value()]


def _fits(old: object, value: object) -> bool:
    if isinstance(value, str) and isinstance(old, int | float):
        value = yaml.safe_load(value)  # sweeps come as text
    if isinstance(old, bool):
        return isinstance(value, bool)
    if isinstance(old, int):
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(old, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return True


def run(slug: str, stage: str, overrides: Iterable[str] = (), root: Path = ROOT, tracked: bool = True) -> Path:
    """Runs a stage below `root` in this process and returns the folder of its outputs. tracked=False: a user's run."""
    return execute(compose(slug, stage, [*overrides, f"root={root}"]), [] if tracked else list(overrides), tracked)


def execute(cfg: DictConfig, overrides: list[str], tracked: bool) -> Path:
    """Runs cfg.stage and publishes its outputs; see the module's text for where."""
    _resolve(cfg)
    if cfg.stage == "all":
        cfg.shared, cfg.reasoners = str(cfg.shared), str(cfg.reasoners)  # shared models stay where they are
        cfg.root = str(_run_folder(cfg, overrides))
        chain = [stage for stage in ORDER if stage in stages(cfg.slug)]
        return [_stage(cfg, stage, _tracked_target(cfg, stage)) for stage in chain][-1]
    return _stage(cfg, cfg.stage, _tracked_target(cfg, cfg.stage) if tracked else _run_folder(cfg, overrides))


def _resolve(cfg: DictConfig) -> None:
    """Replaces `auto` by what it stands for here."""
    cfg.data_root = None if cfg.data_root == "auto" else cfg.data_root
    wants_gpu = cfg.device.startswith("cuda") or (cfg.device == "auto" and cfg.profile in ("gpu", "paper"))
    if wants_gpu:
        import torch

        if not torch.cuda.is_available():
            raise SystemExit(
                f"profile {cfg.profile} with device={cfg.device} needs a CUDA GPU and none is visible; "
                "device=cpu runs it on the CPU"
            )
    if cfg.device == "auto":
        cfg.device = "cuda" if wants_gpu else "cpu"


def _run_folder(cfg: DictConfig, overrides: list[str]) -> Path:
    name = re.sub(r"[^\w=.,+-]", "_", ",".join(sorted(overrides))) or "default"
    if len(name) > 200:  # file systems allow 255
        name = f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
    return Path(cfg.root) / "runs" / cfg.slug / cfg.stage / name


def _tracked_target(cfg: DictConfig, stage: str) -> Path:
    if stage == "figures":
        return Path(cfg.results)
    if stage == "notebook":
        return Path(cfg.results) / "notebook.ipynb"
    return Path(cfg.artifacts) / stage


def _stage(cfg: DictConfig, stage: str, target: Path) -> Path:
    start = time.perf_counter()
    partial = target.with_name(f"{target.name}.partial")
    _heal(target)
    _remove(partial)
    if cfg.get("workers", 1) > 1 and stage in ("train", "infer"):
        start_server()  # it imports what its processes need while this one imports the paper
    try:
        function = _function(cfg.slug, stage)
        with open_dict(cfg):
            cfg.stage, cfg.out = stage, str(partial)
        partial.mkdir(parents=True)
        seed_everything(cfg.seed)
        function(cfg)
        publish(partial, target, keep="notebook.ipynb" if stage == "figures" else None)
    finally:
        _remove(partial)
    seconds = time.perf_counter() - start
    if target == _tracked_target(cfg, stage):
        owner = "shared" if cfg.slug in SHARED else cfg.slug
        record = Path(cfg.artifacts).parent / "seconds" / f"{owner}.{stage}.txt"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(f"{seconds:.2f}\n")
    print(f"{cfg.slug} {stage}: {seconds:.1f} s, {os.path.relpath(target)}", flush=True)
    return target


def _function(slug: str, stage: str) -> Callable[[DictConfig], None]:
    if stage == "notebook":
        from common.reporting.notebook import stage as notebook_stage

        return notebook_stage
    package = "common" if slug in SHARED else "papers"
    return getattr(importlib.import_module(f"{package}.{slug}.experiment"), stage)


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and, where it is loaded, torch."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def publish(partial: Path, target: Path, keep: str | None = None) -> None:
    """Puts a finished folder in target's place by renames: at any moment target is whole, old or new (see `_heal`).

    keep: a file of the old folder that stays. The target `notebook.ipynb` takes the folder's file of that name.
    """
    if target.name == "notebook.ipynb":
        (partial / target.name).replace(target)
        return
    if keep and (target / keep).exists():
        shutil.copy2(target / keep, partial / keep)
    old = target.with_name(f"{target.name}.partial.old")
    if target.exists():
        target.replace(old)
    partial.replace(target)
    _remove(old)


def _heal(target: Path) -> None:
    """Undoes a publication that was killed between its two renames."""
    old = target.with_name(f"{target.name}.partial.old")
    if old.exists():
        if not target.exists():
            old.replace(target)
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def die_with_parent() -> None:
    """When DVC is killed its stage must not live on and write into the next run's outputs (Linux; elsewhere it may)."""
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


@hydra.main(config_path=str(ROOT / "common" / "conf"), config_name="base", version_base="1.3")
def _hydra_main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    own = HydraConfig.get().overrides.task
    implied = {"slug", "stage", "paper", "root"} | {k for k in TRACKED if f"{k}={params().get(k)}" in own}
    overrides = [o for o in own if _split(o)[0] not in implied]
    tracked = "DVC_STAGE" in os.environ and {_split(o)[0] for o in overrides} <= TRACKED
    execute(cfg, overrides, tracked)


def main() -> None:
    """The command line; errors that a user can act on are one message, not a traceback."""
    words = sys.argv[1:]
    if len(words) < 2 or words[0].startswith("-"):
        raise SystemExit(f"usage: python -m common.run PAPER STAGE [key=value ...]; papers: {', '.join(papers())}")
    slug, stage, *rest = words
    overrides = [w for w in rest if not w.startswith("-") and ("=" in w or w.startswith("~"))]
    flags = [w for w in rest if w not in overrides]  # Hydra's parser fails when flags split the overrides
    check(slug, stage, overrides)
    GlobalHydra.instance().clear()
    sys.argv[1:] = [*flags, *full_overrides(slug, stage, overrides)]
    die_with_parent()
    from common.data.sources import CorruptSource, MissingSource

    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand exceptions on, so that the lines below can word them
    try:
        _hydra_main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; earlier results are intact, checkpoints are kept") from None
    except (CorruptSource, MissingSource, HydraException) as error:
        raise SystemExit(f"{slug} {stage}: {error}") from None
    except OSError as error:
        if error.errno is None:
            raise
        raise SystemExit(f"{slug} {stage}: {error}; earlier results are intact") from error


if __name__ == "__main__":
    main()
