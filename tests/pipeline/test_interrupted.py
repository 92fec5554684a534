"""Killed, interrupted and torn runs: nothing half-written is taken for a result, and the same command goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("interrupted")]
HALF = """\
    import time

    half = Path(cfg.out) / "half.txt"
    half.write_text("half")
    time.sleep(0.6)
"""


def slow_down(clone):
    """Each stage of the demo takes longer, with a file in its folder that marks it as unfinished."""
    path = clone.root / "papers" / "demo" / "experiment.py"
    text = path.read_text()
    for first, last in (
        ("    rows = [\n", '"steps.csv", index=False)\n'),
        ("    report = Report(cfg)\n", "finish()\n"),
    ):
        assert text.count(first) == text.count(last) == 1
        text = text.replace(first, HALF + first).replace(last, f"{last}    half.unlink()\n")
    path.write_text(text)


def start(clone) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "common.reproduce"], cwd=clone.root, env=clone.environment | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if words in line:
            return
    raise AssertionError(f"{words!r} not in {''.join(seen)}")


def processes(clone) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if str(clone.root) == process.cwd() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until_gone(clone, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while alive := processes(clone):
        assert time.monotonic() < deadline, [process.cmdline() for process in alive]
        time.sleep(0.05)


def nothing_half(clone) -> None:
    """What stands under its final name is whole."""
    for folder in (clone.root / "artifacts/smoke/demo/infer", clone.root / "results/smoke/demo"):
        assert not (folder / "half.txt").exists()
    out = clone.root / "results/smoke/demo"
    if (out / "claims.json").exists():
        listed = json.loads((out / "provenance.json").read_text())["contents"]
        assert all((out / "tables" / f"{entry['id']}.csv").exists() for entry in listed["tables"])
        assert all((out / "figures" / f"{entry['id']}.svg").exists() for entry in listed["figures"])
        json.loads((out / "claims.json").read_text())
    steps = clone.root / "artifacts/smoke/demo/infer/steps.csv"
    if steps.exists():
        assert len(steps.read_text().splitlines()) == 1 + 3 * 50


def test_sigkill_at_any_moment(demo, first_run):
    """Killed over and over, a little later each time, until it gets through: the results are those of a quiet run.

    In turn only the driver is killed, whose death must take DVC and the stage along, and all processes at once.
    """
    slow_down(demo)
    demo.git("commit", "-aqm", "slow")
    kills, delay = 0, 0.7
    while True:
        process = start(demo)
        try:
            process.wait(timeout=delay)
            break
        except subprocess.TimeoutExpired:
            family = [process.pid] if kills % 2 else [p.pid for p in processes(demo)]
            for pid in family:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.communicate()
        kills += 1
        delay *= 1.5
        wait_until_gone(demo)
        nothing_half(demo)
    assert kills >= 3
    assert process.returncode == 0, process.communicate()[0]
    assert demo.results() == first_run[0].results()
    assert "Nothing to do" in demo.reproduce().stdout


def test_a_finished_stage_is_not_run_again_and_earlier_results_stay(finished, first_run):
    before = finished.results()
    slow_down(finished)
    process = start(finished)
    wait_for(process, "demo figures")
    time.sleep(0.8)
    process.kill()
    process.communicate()
    wait_until_gone(finished)
    assert finished.results() == before, "the results that stood before stay until new ones replace them whole"
    said = finished.reproduce().stdout
    assert "demo infer" not in said
    assert "demo figures" in said
    assert finished.results() == before


def test_ctrl_c(finished):
    """One message, exit code 130, no process left, earlier results intact; the same command goes on."""
    before = finished.results()
    slow_down(finished)
    process = start(finished)
    wait_for(process, "demo infer")
    time.sleep(0.8)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Interrupted. Finished stages and training checkpoints are kept" in said
    assert "Traceback" not in said
    wait_until_gone(finished)
    assert finished.results() == before
    assert "stages run" in finished.reproduce().stdout
    assert finished.results() == before


def test_torn_lock_files_are_healed(finished):
    """DVC writes its lock files in place: a kill may leave half of one, after which DVC refuses every command."""
    lock = finished.root / "papers" / "demo" / "dvc.lock"
    before, text = finished.results(), lock.read_text()
    lock.write_text(text[: len(text) // 2] + "\n  : {")
    (finished.root / "dvc.lock").write_bytes(b"\xff\xfe")
    rwlock = finished.root / ".dvc" / "tmp" / "rwlock"
    rwlock.write_text('{"artifacts/smoke')
    assert finished.dvc("repro", check=False).returncode != 0
    said = finished.reproduce().stdout
    assert "demo infer: restored from the cache" in said
    assert "[1/4] demo infer" not in said
    assert finished.results() == before
    assert "Nothing to do" in finished.reproduce().stdout


def test_a_lock_whose_holder_is_dead_is_removed_although_its_number_is_in_use(finished):
    rwlock = finished.root / ".dvc" / "tmp" / "rwlock"
    holder = {"pid": os.getpid(), "cmd": "dvc repro"}  # this test: alive, but not DVC
    rwlock.write_text(json.dumps({str(finished.root / "artifacts/smoke/demo/infer"): {"write": holder}}))
    steps = finished.root / "papers" / "demo" / "conf" / "profile" / "smoke.yaml"
    steps.write_text(steps.read_text().replace("50", "51"))
    assert "demo infer" in finished.reproduce().stdout
