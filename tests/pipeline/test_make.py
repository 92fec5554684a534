"""The Makefile's targets, without an environment and with one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time

import pytest


def targets(root) -> set[str]:
    phony = re.search(r"(?m)^\.PHONY: (.+)$", (root / "Makefile").read_text())[1].split()
    assert phony
    return set(phony)


def test_help_lists_every_target(clone):
    said = clone.run("make", "help").stdout
    assert {line.split()[0] for line in said.splitlines()} == targets(clone.root)
    assert clone.run("make").stdout == said, "the default"
    assert not (clone.root / ".venv").exists()


def test_every_target_sets_up_the_environment_when_it_is_missing(clone):
    for target in targets(clone.root) - {"help", "clean", "setup"}:
        first = clone.run("make", "-n", target, "SLUG=x").stdout
        assert first.index("-m venv") < first.index("pip install"), target


def test_an_up_to_date_environment_is_left_alone_and_a_changed_requirement_is_not(clone, tmp_path):
    complete = clone.root / ".venv" / ".complete"
    complete.parent.mkdir()
    try:
        complete.touch()
        assert "pip install" not in clone.run("make", "-n", "lint").stdout
        os.utime(complete, (0, 0))
        assert "pip install" in clone.run("make", "-n", "lint").stdout
    finally:
        complete.unlink()
        complete.parent.rmdir()


def test_the_index_of_cpu_builds_is_used_for_torch_alone(clone):
    commands = clone.run("make", "-n", "setup", "TORCH_INDEX=https://cpu.example").stdout.replace("\\\n", " ")
    torch, rest = (line for line in commands.splitlines() if "pip install" in line)
    assert re.search(r"--index-url https://cpu\.example\s+-c constraints\.txt torch", torch)
    assert "--index-url" not in rest


def test_without_a_suitable_python_the_remedy_is_named(clone):
    done = clone.run("make", "setup", "PYTHON=", check=False)
    assert done.returncode != 0
    assert "Frugal needs Python 3.11 or 3.12" in done.stdout


def test_options_reach_the_driver(clone):
    command = clone.run("make", "-n", "reproduce", "PAPER=lookahead", "PROFILE=smoke").stdout.splitlines()[-1]
    assert command == "python -m common.reproduce --profile smoke --paper lookahead"


def test_clean_keeps_results_and_sources(demo):
    for name in ("artifacts/cpu/x", "runs/x", ".checkpoints/x", "results/cpu/demo", "results/smoke/demo"):
        (demo.root / name).mkdir(parents=True)
    before = demo.git("ls-files")
    demo.run("make", "clean")
    left = {path.name for path in demo.root.iterdir()}
    assert not {"artifacts", "runs", ".checkpoints"} & left
    assert [path.name for path in (demo.root / "results").iterdir()] == ["cpu"]
    assert demo.git("ls-files", "--deleted") == ""
    assert demo.git("ls-files") == before


@pytest.mark.slow
def test_lab_serves_the_notebooks_with_the_projects_kernel(demo, tmp_path):
    """The server starts on notebooks/, and its kernel is the environment's Python, which finds the project."""
    demo.make("help")
    settings = {"BROWSER": "true", "HOME": str(tmp_path), "JUPYTER_PREFER_ENV_PATH": "1", "JUPYTER_PORT": "0"}
    process = subprocess.Popen(
        ["make", "lab"], cwd=demo.root, env=demo.environment | settings, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        said, deadline = "", time.monotonic() + 60
        while "token=" not in said and time.monotonic() < deadline:
            line = process.stdout.readline()
            assert line, said
            said += line
        assert f"Serving notebooks from local directory: {demo.root / 'notebooks'}" in said
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    program = (
        "from jupyter_client.manager import start_new_kernel\n"
        "manager, client = start_new_kernel(kernel_name='python3', cwd='notebooks')\n"
        "code = 'import common.run, sys; print(sys.prefix, common.run.papers())'\n"
        "print(client.execute_interactive(code, timeout=60)['content']['status'])\n"
        "manager.shutdown_kernel(now=True)\n"
    )
    assert "ok" in demo.python("-c", program).stdout.splitlines()
