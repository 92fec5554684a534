"""The pipeline as it is written: complete, acyclic, and each stage's dependencies cover what its code imports."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from common import run
from common.reproduce import NOTHING_SHARED

ROOT = run.ROOT
OURS = ("common", "kernels", "papers")


def pipelines() -> list[tuple[str, str]]:
    """(slug, stage) of every stage; the root's are those of run.SHARED, and those on all papers as of `shared`."""
    owner = {stage: slug for slug in run.SHARED for stage in run.stages(slug)}
    root = [(owner.get(name, "shared"), name) for name in yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]]
    files = {slug: ROOT / "papers" / slug / "dvc.yaml" for slug in run.papers()}
    there = {slug: yaml.safe_load(file.read_text())["stages"] for slug, file in files.items() if file.exists()}
    return root + [(slug, name) for slug, stages in there.items() for name in stages]


def definition(slug: str, stage: str) -> dict:
    file = ROOT / "dvc.yaml" if slug in run.SHARED else ROOT / "papers" / slug / "dvc.yaml"
    return yaml.safe_load(file.read_text())["stages"][stage]


def outputs(stage: dict) -> dict[str, dict]:
    """Path -> options of everything that a stage writes."""
    listed = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
    return {k: v for entry in listed for k, v in (entry.items() if isinstance(entry, dict) else [(entry, {})])}


def module_file(name: str) -> Path | None:
    path = ROOT / name.replace(".", "/")
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.exists():
            return file
    return None


def imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """The modules of ours that code imports, inside functions too; what only type checkers read does not count."""
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from imported(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in OURS)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            if node.module and node.module.split(".")[0] in OURS:
                inner = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (name if module_file(name) else node.module for name in inner)
        yield from imported(ast.iter_child_nodes(node))


def used_by(tree: ast.Module, function: str) -> list[ast.AST]:
    """The statements of a module that run when it is imported and `function` is called."""
    defined = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    nodes: list[ast.AST] = [n for n in tree.body if n not in defined.values()]
    waiting, seen = [function], {function}
    while waiting:
        node = defined[waiting.pop()]
        nodes.append(node)
        for name in {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} & set(defined) - seen:
            seen.add(name)
            waiting.append(name)
    return nodes


def closure(start: Iterable[str]) -> set[Path]:
    """The files of ours that importing `start` can reach.

    A paper's own __init__ is not followed: it only names what method.py offers (tested below).
    """
    waiting, files = list(start), set()
    while waiting:
        file = module_file(waiting.pop())
        if file is None or file in files or file == ROOT / "papers" / file.parent.name / "__init__.py":
            continue
        files.add(file)
        waiting += imported(ast.parse(file.read_text()).body)
    return files


def needed(slug: str, stage: str) -> set[Path]:
    """The files whose change can change a stage's result."""
    if stage == "report":
        return closure(["common.reporting.build"])
    if stage in ("notebook", "start_here", "cost_of_inference"):
        name = {"notebook": slug, "start_here": "00_start_here"}.get(stage, stage)
        file = ROOT / "notebooks" / f"{name}.ipynb"
        cells = json.loads(file.read_text())["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(("%", "!")))
        names = {f"papers.{slug}.method" if n == f"papers.{slug}" else n for n in imported(ast.parse(code).body)}
        return closure(["common.reporting.notebook", *names]) | {file}
    file = run.folder(slug) / "experiment.py"
    return closure(imported(used_by(ast.parse(file.read_text()), stage))) | {file}


def test_the_closure_sees_imports_inside_functions(tmp_path):
    code = "def infer(cfg):\n    helper()\ndef helper():\n    from common.metrics import timing\ndef figures(cfg):\n"
    tree = ast.parse(code + "    import common.reporting.page\n")
    assert set(imported(used_by(tree, "infer"))) == {"common.metrics.timing"}
    assert ROOT / "common" / "metrics" / "intervals.py" in closure(["common.metrics.timing"])
    guarded = ast.parse("if TYPE_CHECKING:\n    import common.run\nelse:\n    import common.metrics")
    assert set(imported(guarded.body)) == {"common.metrics"}


@pytest.mark.parametrize(("slug", "stage"), pipelines())
def test_dependencies_cover_the_import_closure(slug, stage):
    dependencies = [ROOT / path for path in definition(slug, stage)["deps"]]
    missing = [
        str(file.relative_to(ROOT))
        for file in sorted(needed(slug, stage))
        if not any(file == dependency or dependency in file.parents for dependency in dependencies)
    ]
    assert not missing, f"{slug} {stage} reads files that its deps leave out: {', '.join(missing)}"


@pytest.mark.parametrize(("slug", "stage"), pipelines())
def test_declarations(slug, stage):
    """What notes on DVC ask for, so that no result is lost, taken from git unseen, or rerun for ever."""
    entry = definition(slug, stage)
    written = outputs(entry)
    tracked = {path: options for path, options in written.items() if path.startswith("results/")}
    tracked.pop(f"results/${{item.profile}}/{slug}/notebook.ipynb", None)  # cached by DVC, ignored by git
    if tracked:
        assert any(path.startswith("artifacts/") for path in entry["deps"]), "a fresh clone would skip it"
        assert all(o.get("cache") is False and o.get("persist") for o in tracked.values()), (
            "in git, kept until replaced"
        )
        assert not [path for path in tracked if path in map(str, entry.get("outs", []))], "metrics or plots, not outs"
    assert entry["matrix"] == {"profile": ["${profile}"]}, "dvc.lock must keep an entry for each profile"
    assert entry["cmd"].startswith("exec python -m common."), "`exec`: a killed DVC must take the stage with it"
    assert f"papers/{slug}" not in entry["deps"], "the folder holds its own dvc.lock"
    assert all("${item.profile}" in path for path in written)
    if stage not in NOTHING_SHARED:
        words = f"{slug} {stage} profile=${{item.profile}} seed=${{seed}} device=${{device}}"
        assert words in entry["cmd"], "params.yaml has the values"
    assert "common" not in entry["deps"], "any edit would rerun it"
    conf = run.folder(slug) / "conf"
    if stage not in (*NOTHING_SHARED, "notebook"):
        assert any(ROOT / path in (conf, *conf.parents) for path in entry["deps"]), "its settings are an input"


@pytest.mark.parametrize("slug", run.papers())
def test_every_stage_of_an_experiment_is_in_the_pipeline(slug):
    names = [stage for s, stage in pipelines() if s == slug]
    assert names == [*(s for s in run.ORDER if s in run.stages(slug)), "notebook"]
    assert "infer" in names


def test_shared_stages_are_in_the_pipeline():
    shared = [stage for slug in run.SHARED for stage in run.stages(slug)]
    assert sorted(s for slug, s in pipelines() if slug in run.SHARED) == sorted([*shared, *NOTHING_SHARED])


@pytest.mark.parametrize("slug", run.papers())
def test_a_papers_init_only_names_what_its_method_offers(slug):
    docstring, *rest = ast.parse((ROOT / "papers" / slug / "__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr)
    for node in rest:
        if isinstance(node, ast.ImportFrom):
            assert node.module
            assert node.module.startswith(f"papers.{slug}.method")
        else:
            assert isinstance(node, ast.Assign)
            assert ast.unparse(node.targets[0]) == "__all__"


def test_package_inits_of_common_import_nothing():
    for file in (ROOT / "common").rglob("__init__.py"):
        assert not list(imported(ast.parse(file.read_text()).body)), file


@pytest.mark.parametrize("slug", [*run.papers(), *run.SHARED])
def test_profiles_are_differences_from_cpu(slug):
    """A key that cpu.yaml lacks would be merged in silently: a typo that changes nothing."""
    folder = run.folder(slug) / "conf" / "profile"
    cpu = OmegaConf.load(folder / "cpu.yaml")
    keys = {*run._keys(cpu), "defaults"}
    for file in folder.glob("*.yaml"):
        unknown = {key for key in run._keys(OmegaConf.load(file)) if key not in keys}
        assert not unknown, f"{file.relative_to(ROOT)}: {sorted(unknown)} not in cpu.yaml"
        assert file.read_text().startswith("# @package _global_")
        if file.stem != "cpu":
            assert "cpu" in OmegaConf.load(file).defaults, f"{file.relative_to(ROOT)} does not build on cpu"
        assert run.compose(slug, run.stages(slug)[0], [f"profile={file.stem}"]).profile == file.stem
    assert {"smoke", "cpu"} <= {file.stem for file in folder.glob("*.yaml")}


def test_the_graph_is_acyclic_and_the_report_needs_every_stage(clone):
    """DVC builds the graph, from the clone's own files; the target `dvc.yaml` reaches each stage of each paper."""
    program = (
        "import json, networkx as nx\n"
        "from dvc.repo import Repo\n"
        "from common.reproduce import plan\n"
        "graph = Repo('.').index.graph\n"
        "print(json.dumps([nx.is_directed_acyclic_graph(graph), [s.addressing for s in graph], plan('dvc.yaml')]))\n"
    )
    acyclic, stages, planned = json.loads(clone.python("-c", program).stdout.splitlines()[-1])
    assert acyclic
    expected = {f"{s}@cpu" if slug in run.SHARED else f"papers/{slug}/dvc.yaml:{s}@cpu" for slug, s in pipelines()}
    assert set(stages) == set(planned) == expected
    assert "report@cpu" in planned[-3:]  # beside the notebooks that belong to no paper


LINT = "import sys; from importlinter.cli import lint_imports_command as c; sys.argv[1:] = ['--no-cache']; c()"


def test_imports_run_one_way():
    """The contracts of pyproject.toml, checked by import-linter."""
    done = subprocess.run([sys.executable, "-c", LINT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("kernels/__init__.py", "import common.run", "imports run one way: papers, then common, then kernels BROKEN"),
        (
            "common/tasks/chain.py",
            "import papers.demo",
            "imports run one way: papers, then common, then kernels BROKEN",
        ),
        ("papers/demo/method.py", "import papers.other.method", "no paper imports another BROKEN"),
    ],
)
def test_the_contracts_refuse_an_import_the_wrong_way(demo, file, line, contract):
    from common import new_paper

    new_paper.scaffold("other", demo.root)
    path = demo.root / file
    path.write_text(f"{path.read_text()}\n{line}\n")
    done = demo.python("-c", LINT, check=False)
    assert done.returncode == 1
    assert contract in done.stdout


@pytest.mark.slow
def test_a_scaffolded_paper_passes_these_checks(demo):
    said = demo.python(
        "-m", "pytest", "tests/pipeline/test_graph.py", "-q", "-k", "[demo", "-p", "no:cacheprovider"
    ).stdout
    assert int(re.search(r"(\d+) passed", said)[1]) >= 3 * 2 + 3, said


def test_a_policy_depends_on_the_one_that_it_begins_from():
    """A fresh clone that runs one paper would otherwise train the style before the model that it is made of."""
    begin = yaml.safe_load(Path("common/reasoners/conf/profile/cpu.yaml").read_text())["begin"]
    stages = yaml.safe_load(Path("dvc.yaml").read_text())["stages"]
    assert begin
    for name, source in begin.items():
        needed = "artifacts/${item.profile}/reasoners/" + source.split("/")[0]
        assert needed in stages[f"reasoner_{name}"]["deps"], f"reasoner_{name} begins from {source}"
