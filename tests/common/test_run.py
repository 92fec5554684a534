import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common import new_paper, run

ROOT = run.ROOT


@pytest.fixture
def paper(tmp_path, monkeypatch):
    """A scaffolded paper in a folder of its own; what runs write lies there too."""
    new_paper.scaffold("demo_paper", tmp_path)
    (tmp_path / "papers" / "__init__.py").write_text("")
    monkeypatch.setattr(run, "folder", lambda slug: tmp_path / "papers" / slug)
    monkeypatch.setattr(run, "papers", lambda: ["demo_paper"])
    monkeypatch.syspath_prepend(str(tmp_path))
    import papers

    monkeypatch.setattr(papers, "__path__", [*papers.__path__, str(tmp_path / "papers")])
    for name in [n for n in sys.modules if n.startswith("papers.demo_paper")]:
        del sys.modules[name]
    return tmp_path


PROGRAM = """
import sys
from pathlib import Path
import common.run as run
import papers
root = Path(sys.argv[1])
papers.__path__.append(str(root / "papers"))
run.folder = lambda slug: root / "papers" / slug
run.papers = lambda: ["demo_paper"]
sys.argv[1:] = ["demo_paper", *sys.argv[2:], f"root={root}"]
run.main()
"""


def command_line(paper, *words, preexec_fn=None, **environment):
    """`python -m common.run demo_paper WORDS` as a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(paper), *words], capture_output=True, text=True, cwd=ROOT,
        preexec_fn=preexec_fn, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"} | environment,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("lokahead", "infer", []), "unknown paper 'lokahead'; the papers are: demo_paper"),
        (
            ("demo_paper", "inferr", []),
            "unknown stage 'inferr' of demo_paper; its stages are: infer, figures, notebook, all",
        ),
        (
            ("demo_paper", "infer", ["profile=huge"]),
            "unknown profile 'huge' of demo_paper; its profiles are: smoke, cpu, gpu, paper",
        ),
        (("demo_paper", "infer", ["promblems=3"]), r"unknown key 'promblems'.*draft_length, alphas, problems"),
        (("demo_paper", "infer", ["problems=many"]), "problems='many' is no int"),
        (("demo_paper", "infer", ["problems=2.5"]), "problems=2.5 is no int"),
        (("demo_paper", "infer", ["seed=zero"]), "seed='zero' is no int"),
    ],
)
def test_bad_words_are_answered_with_the_valid_ones(paper, words, message):
    with pytest.raises(SystemExit, match=message):
        run.compose(*words)


@pytest.mark.parametrize("words", [["backend=vlm"], ["backend=transformers,vlm"]])
def test_an_unknown_back_end_is_answered_with_the_valid_ones(paper, words):
    with pytest.raises(SystemExit, match="backend=vlm: unknown back end 'vlm'; known: transformers, vllm"):
        run.check("demo_paper", "infer", words)


def test_vllm_needs_cuda_before_any_work(paper, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="backend=vllm: the vllm back end needs a CUDA device"):
        run.compose("demo_paper", "infer", ["backend=vllm"])
    profile = paper / "papers" / "demo_paper" / "conf" / "profile" / "smoke.yaml"
    profile.write_text(profile.read_text() + "backend: vllm\n")  # what a profile says is checked too
    with pytest.raises(SystemExit, match="needs a CUDA device"):
        run.compose("demo_paper", "infer", ["profile=smoke"])
    assert run.compose("demo_paper", "infer", ["profile=smoke", "backend=transformers"]).backend == "transformers"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run.compose("demo_paper", "infer", ["profile=smoke"]).backend == "vllm"


def test_profiles_and_overrides_compose(paper):
    assert run.compose("demo_paper", "infer", ["profile=smoke"]).problems == 50
    cfg = run.compose("demo_paper", "infer", ["profile=paper", "draft_length=7"])
    assert (cfg.draft_length, cfg.network, cfg.profile) == (7, True, "paper")
    assert not run.compose("demo_paper", "infer", ["profile=gpu"]).network


def test_tracked_call_publishes_and_a_users_override_does_not(paper):
    first = run.run("demo_paper", "infer", ["profile=smoke"], root=paper)
    assert first == paper / "artifacts" / "smoke" / "demo_paper" / "infer"
    before = (first / "steps.csv").read_bytes()
    other = run.run("demo_paper", "infer", ["profile=smoke", "draft_length=2"], root=paper, tracked=False)
    assert other == paper / "runs" / "demo_paper" / "infer" / "draft_length=2,profile=smoke"
    assert (first / "steps.csv").read_bytes() == before != (other / "steps.csv").read_bytes()


def test_all_stages_in_one_process_and_the_same_bytes_twice(paper):
    def results():
        run.run("demo_paper", "infer", ["profile=smoke"], root=paper)
        out = run.run("demo_paper", "figures", ["profile=smoke"], root=paper)
        return {
            p.name: p.read_bytes()
            for p in out.rglob("*")
            if p.is_file() and p.name not in ("provenance.json", "REPORT.md")
        }

    assert results() == results()


def test_a_failing_stage_leaves_the_earlier_results_whole(paper, monkeypatch):
    out = run.run("demo_paper", "infer", ["profile=smoke"], root=paper)
    before = (out / "steps.csv").read_bytes()

    def breaks(cfg):
        (Path(cfg.out) / "steps.csv").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "_function", lambda slug, stage: breaks)
    with pytest.raises(OSError, match="No space left"):
        run.run("demo_paper", "infer", ["profile=smoke"], root=paper)
    assert (out / "steps.csv").read_bytes() == before
    assert [p.name for p in out.parent.iterdir()] == ["infer"]


@pytest.mark.parametrize("cut", [0, 1])
def test_a_publication_killed_between_its_renames_is_healed(tmp_path, monkeypatch, cut):
    target, partial = tmp_path / "results", tmp_path / "results.partial"
    for folder, text in ((target, "old"), (partial, "new")):
        folder.mkdir()
        (folder / "claims.json").write_text(text)
    calls = []
    rename = Path.replace

    def replace(self, other):
        if len(calls) == cut:
            raise KeyboardInterrupt
        calls.append(self)
        return rename(self, other)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        run.publish(partial, target)
    monkeypatch.undo()
    run._heal(target)
    assert (target / "claims.json").read_text() == "old"
    run.publish(partial, target)
    assert (target / "claims.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["results"]


def test_folders_of_a_users_runs_differ_and_may_hold_dots(paper):
    words = [
        ["profile=smoke", "alphas=[0.5]"],
        ["profile=smoke", f"alphas={[0.5] * 80}"],
        ["profile=smoke", f"alphas={[0.5] * 81}"],
    ]
    folders = [run.run("demo_paper", "infer", w, root=paper, tracked=False) for w in words]
    assert folders[0].name == "alphas=_0.5_,profile=smoke"
    assert len({*folders}) == 3
    assert all(len(folder.name) < 200 for folder in folders)
    assert all((folder / "steps.csv").exists() for folder in folders)


def test_publishing_results_keeps_the_notebook(tmp_path):
    for name in ("results", "results.partial"):
        (tmp_path / name).mkdir()
    (tmp_path / "results" / "notebook.ipynb").write_text("{}")
    run.publish(tmp_path / "results.partial", tmp_path / "results", keep="notebook.ipynb")
    assert (tmp_path / "results" / "notebook.ipynb").read_text() == "{}"


def test_a_full_disk_is_one_clear_message(paper):
    """A file-size limit of 64 bytes stands in for the full disk: a write fails in the same way, in mid-file."""
    out = run.run("demo_paper", "infer", ["profile=smoke"], root=paper)
    before = (out / "steps.csv").read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))

    done = command_line(paper, "infer", "profile=smoke", preexec_fn=limit, DVC_STAGE="infer")
    assert done.returncode == 1
    assert "demo_paper infer: [Errno 27] File too large" in done.stderr
    assert "earlier results are intact" in done.stderr
    assert (out / "steps.csv").read_bytes() == before


def test_a_sweep_writes_below_runs_only(paper):
    before = {path.name for path in ROOT.iterdir()}
    done = command_line(paper, "infer", "profile=smoke", "draft_length=2,3", "-m")
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (paper / "runs" / "demo_paper" / "infer").iterdir()}
    assert names == {"draft_length=2,profile=smoke", "draft_length=3,profile=smoke", "multirun.yaml"}
    assert {path.name for path in paper.iterdir()} == {"notebooks", "papers", "runs"}
    assert {path.name for path in ROOT.iterdir()} - before <= {".pytest_cache", ".hypothesis"}


def test_cfg_job_prints_the_configuration_and_runs_nothing(paper):
    done = command_line(paper, "infer", "profile=smoke", "draft_length=3", "--cfg", "job")
    assert (done.returncode, done.stderr) == (0, "")
    assert "draft_length: 3\n" in done.stdout
    assert "problems: 50\n" in done.stdout
    assert not (paper / "runs").exists()


def test_stage_all_runs_every_stage_below_runs_and_reads_the_shared_models_where_they_are(paper, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        run, "_function", lambda slug, stage: lambda cfg: seen.update({stage: (cfg.shared, cfg.artifacts)})
    )
    out = run.run("demo_paper", "all", ["profile=smoke", "problems=7"], root=paper, tracked=False)
    own = paper / "runs" / "demo_paper" / "all" / "problems=7,profile=smoke"
    assert out == own / "results" / "smoke" / "demo_paper"
    shared, artifacts = str(paper / "artifacts" / "smoke" / "shared"), str(own / "artifacts" / "smoke" / "demo_paper")
    assert seen == {stage: (shared, artifacts) for stage in ("infer", "figures")}


def test_a_read_only_results_folder_is_one_clear_message(paper, monkeypatch):
    run.run("demo_paper", "infer", ["profile=smoke"], root=paper)
    mkdir = Path.mkdir

    def refuse(self, *args, **kwargs):
        if "results" in self.parts:
            raise OSError(30, "Read-only file system", str(self))
        return mkdir(self, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(OSError, match="Read-only file system"):
        run.run("demo_paper", "figures", ["profile=smoke"], root=paper)


def test_a_gpu_profile_without_a_gpu_names_the_remedy(paper):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit, match="device=cpu"):
        run.run("demo_paper", "infer", ["profile=gpu"], root=paper)


def test_command_line(tmp_path):
    def call(*words):
        return subprocess.run([sys.executable, "-m", "common.run", *words], capture_output=True, text=True, cwd=ROOT)

    assert "usage: python -m common.run PAPER STAGE" in call().stderr
    done = call("nonsense", "infer")
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "unknown paper 'nonsense'" in done.stderr
