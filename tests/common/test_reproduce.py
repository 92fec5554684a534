"""The driver of `make reproduce`: what it reads from DVC's output, what it heals, what it plans."""

import json
import os

import pytest
import yaml

from common import reproduce
from common.reproduce import Board

INFER, FIGURES = "papers/demo/dvc.yaml:infer@cpu", "papers/demo/dvc.yaml:figures@cpu"


@pytest.fixture
def root(tmp_path, monkeypatch):
    (tmp_path / ".dvc" / "tmp").mkdir(parents=True)
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "params.yaml").write_text("profile: cpu      # smoke | cpu\nseed: 0\n")
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    return tmp_path


def test_a_board_follows_the_stages_and_estimates_what_is_left():
    board = Board({INFER: 30.0, FIGURES: 10.0, "report@cpu": 2.0})
    assert board.left(0) == 42
    assert board.read(f"Running stage '{INFER}':", 1) == ["  0:01  [1/3] demo infer (about 0:42 left)"]
    assert board.left(11) == 32
    assert board.left(100) == 12, "a stage that takes longer than last time adds nothing"
    assert board.heartbeat(61) == "  1:01        demo infer, 1:00 so far (about 0:12 left)"
    assert board.read("> exec python -m common.run demo infer", 2) == []
    assert board.read(f"Running stage '{FIGURES}':", 41) == ["  0:41  [2/3] demo figures (about 0:12 left)"]
    assert board.read("Stage 'report@cpu' is cached - skipping run, checking out outputs", 50) == [
        "        report: restored from the cache"
    ]
    assert board.ran == {INFER: 40, FIGURES: 9}
    assert board.said == ""
    assert board.left(60) == 0


def test_a_board_shows_the_end_of_a_failed_stages_output():
    board = Board({INFER: 30.0})
    board.read(f"Running stage '{INFER}':", 0)
    board.read("> exec python -m common.run demo infer", 0)
    for number in range(20):
        board.read(f"line {number}", 1)
    board.read("", 1)
    told = board.read(f"ERROR: failed to reproduce '{INFER}': failed to run: exec python, exited with 1", 2)
    assert told[0] == "FAILED  demo infer. The end of its output:"
    assert told[1:] == [f"        line {n}" for n in range(20 - reproduce.TAIL_LINES, 20)]
    assert board.failed == [INFER]
    assert board.read("ERROR: unrelated", 3) == ["ERROR: unrelated"]


def test_unchanged_stages_are_silent():
    board = Board({INFER: 30.0, FIGURES: 10.0})
    assert board.read(f"Stage '{INFER}' didn't change, skipping", 1) == []
    assert board.ran == {}
    assert board.left(1) == 10


def test_durations_are_remembered_for_the_next_estimate_but_not_those_of_failures(root):
    board = Board({INFER: 1, FIGURES: 1}, ran={INFER: 12.34, FIGURES: 5.0}, failed=[FIGURES])
    reproduce.remember("cpu", board)
    assert reproduce.expected_seconds(INFER, "cpu") == 12.3
    assert reproduce.expected_seconds(FIGURES, "cpu") == reproduce.TYPICAL_SECONDS
    own = root / "artifacts" / "cpu" / "seconds" / "demo.figures.txt"
    own.parent.mkdir()
    own.write_text("3.25\n")
    assert reproduce.expected_seconds(FIGURES, "cpu") == 3.25
    reproduce.durations("cpu").write_text("{torn")
    assert reproduce.expected_seconds(FIGURES, "cpu") == 3.25
    reproduce.remember("cpu", board)
    assert json.loads(reproduce.durations("cpu").read_text()) == {INFER: 12.3}


def test_profile_is_written_and_the_users_file_comes_back(root):
    before = (root / "params.yaml").read_text()
    reproduce.set_profile("smoke")
    text = (root / "params.yaml").read_text()
    assert yaml.safe_load(text) == {"profile": "smoke", "seed": 0}
    assert "# smoke | cpu" in text
    reproduce.heal()
    assert (root / "params.yaml").read_text() == before
    reproduce.set_profile("cpu")
    assert not (root / "artifacts" / "params.before").exists(), "nothing to restore"


def test_a_users_change_during_no_run_is_not_undone(root):
    reproduce.heal()
    (root / "params.yaml").write_text("profile: smoke\nseed: 3\n")
    reproduce.heal()
    assert (root / "params.yaml").read_text() == "profile: smoke\nseed: 3\n"


@pytest.mark.parametrize("content", [b"", b"schema: '2.0'\nstages:\n  a:\n   - b: {", b"\xff\xfe\x00", b"- 1\n"])
def test_torn_lock_files_are_removed_and_whole_ones_stay(root, content):
    (root / "papers" / "demo").mkdir(parents=True)
    whole, torn = root / "dvc.lock", root / "papers" / "demo" / "dvc.lock"
    whole.write_text("schema: '2.0'\nstages: {}\n")
    torn.write_bytes(content)
    reproduce.heal()
    assert whole.exists()
    assert not torn.exists()


@pytest.mark.parametrize(
    "text",
    [
        '{"a": {"read": [',
        "{}",
        '{"a": {"write": {"pid": 4194305, "cmd": "dvc repro"}}}',
        '{"a": {"read": [{"pid": OWN, "cmd": "dvc repro"}]}}',
    ],
    ids=["torn", "empty", "dead", "number in use by this test"],
)
def test_a_lock_without_a_living_holder_is_removed(root, text):
    lock = root / ".dvc" / "tmp" / "rwlock"
    lock.write_text(text.replace("OWN", str(os.getpid())))
    reproduce.heal()
    assert not lock.exists()


def test_the_lock_of_a_running_dvc_stays(root):
    import subprocess
    import sys

    lock = root / ".dvc" / "tmp" / "rwlock"
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "dvc"]) as process:
        lock.write_text(json.dumps({"a": {"write": {"pid": process.pid, "cmd": "dvc repro"}}}))
        reproduce.heal()
        process.kill()
    assert lock.exists()


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        (INFER, "demo infer"),
        ("lm_llama@cpu", "shared lm_llama"),
        ("report@smoke", "report"),
        ("start_here@cpu", "start_here"),
    ],
)
def test_stages_are_named_as_a_user_would(stage, words):
    assert reproduce.paper_of(stage) == words


def test_a_users_setting_of_the_memory_stays(monkeypatch):
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert reproduce.environment()["GLIBC_TUNABLES"] == reproduce.MEMORY
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0")
    assert reproduce.environment()["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=0"


def test_dvc_is_told_when_there_is_no_git(root):
    assert reproduce.without_git() == ["config", "--local", "core.no_scm", "true"]
    (root / ".git").mkdir()
    assert reproduce.without_git() == []


@pytest.mark.parametrize(
    ("used", "now", "stale"),
    [
        ("embedded", "mirror", True),
        ("mirror", "embedded", True),
        ("mirror", "public", False),
        ("public", "public", False),
    ],
)
def test_data_stages_are_read_again_when_a_real_file_appears_or_goes(root, monkeypatch, used, now, stale):
    from common.data import sources

    name = next(iter(sources.catalogue()))
    (root / "params.yaml").write_text("profile: cpu\ndata_root: auto\n")
    record = root / "artifacts" / "cpu" / "demo" / "data" / "sources.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps([{"name": "a generator", "origin": "embedded"}, {"name": name, "origin": used}]))
    monkeypatch.setattr(sources, "offline_origin", lambda name, root=None: now)
    assert reproduce.stale_data_stages("cpu", ["demo", "other"]) == (["papers/demo/dvc.yaml:data"] if stale else [])
