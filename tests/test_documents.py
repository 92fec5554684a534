"""What the README and the notebooks promise works as written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from common import run
from common.reporting import notebook, page

ROOT = run.ROOT
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "papers").glob("*/README.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("**/*.ipynb"))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A tiny model and its tokenizer in hub format."""
    from common.models.build import build
    from common.models.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("tiny")
    words = train_tokenizer([f"def mean(values):\n    return sum(values) / {i}\n" for i in range(300)], 300)
    model = build("llama-0.28m", vocab_size=len(words), eos_token_id=words.eos_token_id, seed=0)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_readmes_python_works_as_pasted(checkpoint):
    """Only the name of the model is replaced, by a folder with a tiny one."""
    (code,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
    code, replaced = re.subn(r'(?m)^name = "[^"]+"', f'name = "{checkpoint}"', code)
    assert replaced == 1
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(re.search(r"([\d.]+) tokens per forward pass", done.stdout)[1]) >= 1.0


def test_the_readme_has_the_markers_of_the_scoreboard_and_three_sentences():
    text = (ROOT / "README.md").read_text()
    assert text.count(page.START) == text.count(page.END) == 1
    first = text.split("\n\n")[1].replace("\n", " ")
    assert len(re.findall(r"\.(?: |$)", first)) == 3


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        # `make report` and `make reproduce` write these
        if not target.startswith(("results/", "docs/images/")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_make_targets_that_documents_name_exist(path):
    known = set(re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text()))
    text = path.read_text()
    code = [*re.findall(r"`([^`\n]+)`", text), *re.findall(r"(?m)^ {4}(.+)$", text), *blocks(path, "bash")]
    named = set(re.findall(r"(?m)(?:^|&& )make ([a-z][a-z-]*)", "\n".join(code)))
    assert named <= known


def test_variables_of_make_that_the_readme_names_exist():
    makefile = (ROOT / "Makefile").read_text()
    for name in set(re.findall(r"make [a-z-]+ ([A-Z_]+)=", (ROOT / "README.md").read_text())):
        assert f"$({name})" in makefile


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.parent.name == "notebooks"], ids=lambda path: path.stem)
def test_committed_notebooks_have_outputs_and_no_run_data(path):
    content = json.loads(path.read_text())
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert code[0]["metadata"].get("tags") == ["parameters"]
    assert any(cell["outputs"] for cell in code), "run make notebooks"
    assert not [o for cell in code for o in cell["outputs"] if o["output_type"] == "error"]
    assert all(cell["execution_count"] is None for cell in code)
    assert "papermill" not in content["metadata"]
    assert path.stat().st_size <= notebook.MAX_BYTES
    assert str(ROOT) not in path.read_text(), "a path of one machine"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["00_start_here", "solutions/00_start_here"])
def test_the_first_notebook_runs_without_any_results(tmp_path, name):
    """It does so for a profile that nobody has run, too: papers without results are shown as such."""
    target = tmp_path / "out.ipynb"
    notebook.execute(ROOT / "notebooks" / f"{name}.ipynb", target, {"profile": "paper", "seed": 1}, root=tmp_path)
    assert target.exists()


def test_the_first_notebook_links_to_notebooks_of_papers():
    text = (ROOT / "notebooks" / "00_start_here.ipynb").read_text()
    names = re.findall(r"\]\(([a-z_0-9]+)\.ipynb\)", text)
    assert len(names) >= 2
    assert all((ROOT / "notebooks" / f"{name}.ipynb").exists() for name in names)


def test_citation_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    version = re.search(r'(?m)^version = "(.+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert citation["version"] == version
    assert citation["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
