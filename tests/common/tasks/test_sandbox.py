"""Hostile programs: none harms, none outlives its limits, and none that leaves early counts as passed."""

import os
import threading
import time
from pathlib import Path

import pytest

from common.tasks import sandbox
from common.tasks.sandbox import CodeExecutionNotAllowed, Limits, run_program

SHORT = Limits(cpu_seconds=1, wall_seconds=4.0)
ROOT = Path(sandbox.__file__).resolve().parents[2]


def run(program, limits=SHORT):
    return run_program(program, allow_code_execution=True, limits=limits)


@pytest.fixture(scope="module")
def confined():
    """The protections that this machine's kernel grants."""
    return run("pass").confined


def test_nothing_runs_unless_allowed(monkeypatch):
    monkeypatch.setattr(sandbox.subprocess, "Popen", lambda *a, **k: pytest.fail("started a process"))
    for flag in ({}, {"allow_code_execution": False}, {"allow_code_execution": 1}, {"allow_code_execution": "no"}):
        with pytest.raises(CodeExecutionNotAllowed, match="allow_code_execution=True"):
            run_program("pass", **flag)
    assert issubclass(CodeExecutionNotAllowed, PermissionError)


def test_right_and_wrong_programs():
    assert run("def f(x): return 2 * x\nassert f(2) == 4").passed
    wrong = run("assert 1 == 2, 'no'")
    assert (wrong.passed, wrong.reason) == (False, "AssertionError: no")
    assert run("def f(:").reason.startswith("SyntaxError")
    assert run("1/0").reason == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    "exit_",
    [
        "import sys; sys.exit(0)", "raise SystemExit(0)", "import os; os._exit(0)", "exit(0)", "quit()",
        "raise KeyboardInterrupt", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    ],
)  # fmt: skip
def test_leaving_before_the_asserts_is_not_passing(exit_):
    assert not run(f"{exit_}\nassert False").passed


TO_EVERY_PIPE = """
import os
for fd in range(3, 64):
    try:
        os.write(fd, {})
    except OSError:
        pass
"""
FORGED = """b'{"token": "00", "error": "", "confined": []}'"""


@pytest.mark.parametrize(
    "marker",
    [
        "print('passed'); print('OK')", f"print({FORGED})", TO_EVERY_PIPE.replace("{}", FORGED),
        TO_EVERY_PIPE.replace("{}", "b'[' * 4000"), TO_EVERY_PIPE.replace("{}", "b'passed' * 100000"),
    ],
)  # fmt: skip
def test_a_forged_success_marker_is_not_passing(marker):
    limits = Limits(cpu_seconds=1, wall_seconds=1.5)  # one of them blocks on a full pipe until the end
    assert not run(f"{marker}\nimport os\nos._exit(0)\nassert False", limits).passed
    assert not run(f"{marker}\nassert False", limits).passed


def test_endless_loops_and_sleepers_end():
    began = time.perf_counter()
    assert run("while True: pass").reason == "the limit of CPU seconds was reached"
    ignored = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert not run(ignored).passed
    assert run("import time; time.sleep(60)", Limits(wall_seconds=1)).reason == "still running after 1 seconds"
    assert time.perf_counter() - began < 12


def test_memory_bombs_end():
    assert run("x = bytearray(10**10)").reason == "MemoryError: "
    assert not run("x = [0]\nwhile True: x = x * 2").passed
    assert not run("x = 10 ** 10 ** 10").passed


def test_huge_output_and_huge_files_end():
    assert run("print('x' * 10**8)").passed  # thrown away
    assert run("f = open('big', 'w')\nf.write('x' * 10**8)").reason.startswith("OSError")


@pytest.mark.parametrize(
    "bomb",
    [
        "import os\nwhile True: os.fork()",
        "import os\nif os.fork() == 0:\n    os.setsid()\n    open('child', 'w')",
        "import subprocess\nsubprocess.run(['sleep', '60'])",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        "import threading\nfor _ in range(500): threading.Thread(target=print).start()",
    ],
)
def test_no_new_processes(bomb, confined):
    before = _processes()
    if "system call filter" not in confined and os.getuid() == 0:
        pytest.skip("the kernel has no system call filter, and limits on processes do not bind root")
    assert not run(bomb).passed
    assert _processes() <= before + 2


def _processes() -> int:
    return sum(
        b"frugal_sandbox" in _command(path) or b"sandbox.py" in _command(path) for path in Path("/proc").glob("[0-9]*")
    )


def _command(path: Path) -> bytes:
    try:
        return (path / "cmdline").read_bytes()
    except OSError:
        return b""


def test_no_signals_to_others(confined):
    if "system call filter" not in confined:
        pytest.skip("the kernel has no system call filter")
    assert run(f"import os; os.kill({os.getpid()}, 0)").reason.startswith("PermissionError")
    assert run("import os; os.killpg(0, 9)").reason.startswith("PermissionError")


def test_no_network(confined):
    connect = "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 2).close()  # it answers
        if not {"no network", "system call filter"} & set(confined):
            pytest.skip("the kernel grants neither a network namespace nor a system call filter")
        assert not run(connect.format(port=port)).passed


def test_files_outside_the_working_folder_are_safe(tmp_path, confined):
    target = tmp_path / "kept.txt"
    target.write_text("kept")
    assert run("open('own.txt', 'w').write('x')\nassert open('own.txt').read() == 'x'").passed
    assert not (ROOT / "own.txt").exists()
    if "file rules" not in confined:
        pytest.skip("the kernel has no Landlock")
    for harm in (
        f"open({str(target)!r}, 'w')", f"import os; os.remove({str(target)!r})",
        f"import os; os.truncate({str(target)!r}, 0)",
        f"import os; os.rename({str(target)!r}, 'mine')", f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import os; os.symlink('a', {str(tmp_path / 'new')!r})", f"open({str(ROOT / 'own.txt')!r}, 'w')",
    ):  # fmt: skip
        assert not run(harm).passed, harm
    assert target.read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["kept.txt"]


def test_environment_and_folder_are_its_own(monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    assert run("import os\nassert 'SECRET' not in os.environ and not os.listdir('.')").passed
    assert run("import sys\nassert not any('site-packages' in p for p in sys.path) and sys.stdin.read() == ''").passed
    assert run(f"import os\nassert os.getcwd() != {os.getcwd()!r}").passed


def test_works_from_threads():
    results = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: run(f"assert {i} % 2 == 0").passed})) for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: i % 2 == 0 for i in range(6)}


def test_bad_limits_and_what_is_not_python():
    with pytest.raises(ValueError, match="wall_seconds must be positive, not 0"):
        Limits(wall_seconds=0)
    assert not run("\x00").passed
    assert run("").passed
