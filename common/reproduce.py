"""`make reproduce`: runs the DVC pipeline with live progress and ends with the verdicts.

DVC decides what has to run. This driver heals what a killed run may have left, chooses the profile, shows stage, paper,
elapsed time and an estimate of what remains (from each stage's last duration), and prints the scoreboard.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import yaml

from common.run import PROFILES, ROOT, die_with_parent, papers, stages

STAGE_LINE = re.compile(r"^(Running stage|Stage) '([^']+)'(.*)")
NOTHING_SHARED = ("report", "start_here", "cost_of_inference")  # the root's stages that train nothing
FAILURE_LINE = re.compile(r"^ERROR: failed to reproduce '([^']+)'")
TYPICAL_SECONDS = 20.0  # for the estimate only, of a stage that never ran here
HEARTBEAT_SECONDS = 30.0  # without a terminal: how long nothing is said at most
SAID_WIDTH = 90  # characters of a stage's latest output that are shown while it runs
TAIL_LINES = 12  # of a failed stage's output, shown with the failure
LOG = ROOT / "artifacts" / "reproduce.log"
# Linux: tensors come from huge pages, and freed ones stay with the process, where glibc would return those above some
# megabytes to the kernel at each step, which then clears them again (a few percent of a training).
MEMORY = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=536870912:glibc.malloc.trim_threshold=536870912"


def heal() -> None:
    """Removes what a SIGKILL may have left: DVC rewrites its lock files in place, so that one may be torn.

    DVC's run cache gives a deleted dvc.lock back without running anything. Also restores the user's params.yaml.
    """
    rwlock = ROOT / ".dvc" / "tmp" / "rwlock"
    for lock in [rwlock, ROOT / "dvc.lock", *ROOT.glob("papers/*/dvc.lock")]:
        try:
            content = yaml.safe_load(lock.read_text()) if lock.exists() else {}
        except (yaml.YAMLError, UnicodeDecodeError):
            content = None
        if not isinstance(content, dict) or (lock == rwlock and not _alive(content)):
            lock.unlink(missing_ok=True)
    saved = ROOT / "artifacts" / "params.before"
    if saved.exists():
        saved.replace(ROOT / "params.yaml")


def _alive(rwlock: dict[str, dict[str, Any]]) -> bool:
    """Whether a process that holds DVC's lock still runs. DVC asks for the number only, which may be in use again."""
    import psutil

    for holders in rwlock.values():
        write = holders.get("write") or {}
        for holder in [*(holders.get("read") or []), *([write] if write else [])]:
            try:
                if any("dvc" in word for word in psutil.Process(holder["pid"]).cmdline()):
                    return True
            except psutil.Error:
                continue
    return False


def set_profile(profile: str) -> None:
    """Writes the profile into params.yaml, keeping the user's file beside for `heal` to restore."""
    path, saved = ROOT / "params.yaml", ROOT / "artifacts" / "params.before"
    text = path.read_text()
    changed = re.sub(r"(?m)^(profile:\s*)\S+", rf"\g<1>{profile}", text)
    if changed != text:
        saved.parent.mkdir(exist_ok=True)
        saved.write_text(text)
        path.write_text(changed)


def environment() -> dict[str, str]:
    """Stages are started as `python`: the one that runs this driver must come first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {"GLIBC_TUNABLES": MEMORY} | os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1"}


def without_git() -> list[str]:
    """Outside a git checkout (an unpacked archive) DVC has to be told so."""
    return [] if (ROOT / ".git").exists() else ["config", "--local", "core.no_scm", "true"]


def plan(target: str) -> list[str]:
    """The stages that DVC would check for a target, in its order."""
    from dvc.repo import Repo
    from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

    with Repo(str(ROOT)) as repo:
        graph = get_active_graph(repo.index.graph)
        return [stage.addressing for stage in plan_repro(graph, collect_stages(repo, [target]))]


def stale_data_stages(profile: str, slugs: list[str]) -> list[str]:
    """Data stages that used a substitute where the real file is now at hand, or the other way round.

    DVC cannot see this: the data root is outside the repository, and FRUGAL_DATA is an environment variable.
    """
    from common.data.sources import catalogue, offline_origin

    root = yaml.safe_load((ROOT / "params.yaml").read_text())["data_root"]
    stale = []
    for slug in slugs:
        record = ROOT / "artifacts" / profile / slug / "data" / "sources.json"
        used = json.loads(record.read_text()) if record.exists() else []
        for source in used:
            if source["name"] in catalogue():
                now = offline_origin(source["name"], None if root == "auto" else root)
                if (now == "embedded") != (source["origin"] == "embedded"):
                    stale.append(f"papers/{slug}/dvc.yaml:data")
                    break
    return stale


def paper_of(stage: str) -> str:
    """`papers/lookahead/dvc.yaml:infer@cpu` -> `lookahead infer`, `lm_llama@cpu` -> `shared lm_llama`."""
    path, _, name = stage.rpartition(":")
    name = name.split("@")[0]
    if path:
        return f"{Path(path).parent.name} {name}"
    return name if name in NOTHING_SHARED else f"shared {name}"


def expected_seconds(stage: str, profile: str) -> float:
    """How long the stage took last time: under this driver, or by its own clock."""
    own = ROOT / "artifacts" / profile / "seconds" / f"{paper_of(stage).replace(' ', '.')}.txt"
    try:
        return float(json.loads(durations(profile).read_text())[stage])
    except (OSError, ValueError, KeyError):
        try:
            return float(own.read_text())
        except (OSError, ValueError):
            return TYPICAL_SECONDS


def durations(profile: str) -> Path:
    """The file with each stage's last duration under this driver."""
    return ROOT / "artifacts" / profile / "seconds.json"


def clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@dataclass
class Board:
    """What DVC's output says of a run: which stages ran, which one is running, what is left, what failed."""

    expected: dict[str, float]  # seconds of each stage that DVC will check
    checked: set[str] = field(default_factory=set)
    ran: dict[str, float] = field(default_factory=dict)  # stage -> seconds
    running: str | None = None
    since: float = 0.0
    failed: list[str] = field(default_factory=list)
    output: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))  # of the running stage

    def left(self, now: float) -> float:
        """An estimate of the seconds that remain."""
        left = sum(seconds for name, seconds in self.expected.items() if name not in self.checked)
        if self.running:
            left += max(0.0, self.expected.get(self.running, TYPICAL_SECONDS) - (now - self.since))
        return left

    def end_stage(self, now: float) -> None:
        if self.running:
            self.ran[self.running] = now - self.since
        self.running = None

    def read(self, line: str, now: float) -> list[str]:
        """Takes one line of DVC's output; returns what a user should see of it."""
        if failure := FAILURE_LINE.match(line):
            name = failure[1]
            self.end_stage(now)
            self.failed.append(name)
            return [f"FAILED  {paper_of(name)}. The end of its output:", *(f"        {text}" for text in self.output)]
        match = STAGE_LINE.match(line)
        if not match:
            if line.startswith("ERROR"):
                return [line]
            if line.strip() and not line.startswith("> "):
                self.output.append(line)
            return []
        self.end_stage(now)
        verb, name, rest = match.groups()
        self.checked.add(name)
        self.output.clear()
        if verb == "Running stage":
            self.running, self.since = name, now
            count = f"[{len(self.checked)}/{len(self.expected)}]"
            return [f"{clock(now):>6}  {count} {paper_of(name)} (about {clock(self.left(now))} left)"]
        return [f"        {paper_of(name)}: restored from the cache"] if "cached" in rest else []

    def heartbeat(self, now: float) -> str:
        """One line that says that the running stage is alive, and what it said last, such as a running reward."""
        name = paper_of(self.running) if self.running else "checking"
        line = f"{clock(now):>6}        {name}, {clock(now - self.since)} so far (about {clock(self.left(now))} left)"
        return f"{line}: {self.said}" if self.said else line

    @property
    def said(self) -> str:
        """The latest line of the running stage's output, cut to a part of a terminal's line."""
        return self.output[-1].strip()[:SAID_WIDTH] if self.running and self.output else ""


def follow(command: list[str], names: list[str], profile: str) -> tuple[int, Board]:
    """Runs DVC and reports each stage as it starts; returns DVC's exit code (130: interrupted) and what happened."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    board = Board({name: expected_seconds(name, profile) for name in names})
    total = sum(board.expected.values())
    console = Console()
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
        TextColumn("about {task.fields[left]} left"),
        console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip
    LOG.parent.mkdir(exist_ok=True)
    start = time.perf_counter()
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, preexec_fn=die_with_parent,  # Ctrl-C reaches DVC once, from below; SIGKILL as well
    )  # fmt: skip
    lines: Queue[str | None] = Queue()
    threading.Thread(target=_read, args=(child, lines), daemon=True).start()
    told = start
    with LOG.open("a") as log, progress:
        task = progress.add_task("checking", total=total, left=clock(total))
        try:
            while True:
                try:
                    line = lines.get(timeout=1.0)
                except Empty:
                    line = ""
                now = time.perf_counter() - start
                if line is None:
                    break
                if line:
                    log.write(line)
                    log.flush()
                shown = board.read(line.rstrip(), now) if line else []
                if not console.is_terminal and not shown and now - told >= HEARTBEAT_SECONDS:
                    shown = [board.heartbeat(now)]
                for text in shown:
                    console.print(text, style="red" if text.startswith(("FAILED", "ERROR")) else None, markup=False)
                    told = now
                left = board.left(now)
                name = paper_of(board.running) if board.running else "checking"
                name = f"{name}: {board.said}" if board.said else name
                progress.update(task, description=name, completed=total - left, left=clock(left))
        except KeyboardInterrupt:
            os.killpg(child.pid, signal.SIGINT)
            child.wait()
            console.print("Interrupted. Finished stages and training checkpoints are kept; the same command continues.")
            return 130, board
    board.end_stage(time.perf_counter() - start)
    remember(profile, board)
    return child.wait(), board


def _read(child: subprocess.Popen[str], lines: Queue[str | None]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        lines.put(line)
    lines.put(None)


def remember(profile: str, board: Board) -> None:
    """Keeps the durations of the stages that succeeded, for the next estimate."""
    path = durations(profile)
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        known = {}
    known |= {name: round(seconds, 1) for name, seconds in board.ran.items() if name not in board.failed}
    if board.ran:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known, indent=1) + "\n")


def print_scoreboard(profile: str, slugs: list[str]) -> None:
    """The verdicts as a table in the terminal; for one paper, each of its claims."""
    from rich.console import Console
    from rich.table import Table

    from common.reporting.claims import VERDICTS
    from common.reporting.page import scoreboard_rows
    from common.reporting.style import VERDICT_COLOURS

    results = ROOT / "results" / profile
    console = Console(width=None if sys.stdout.isatty() else 120)
    rows = [row for row in scoreboard_rows(results) if row["paper"] in slugs]
    if len(slugs) == 1 and rows:
        claims = json.loads((results / slugs[0] / "claims.json").read_text())
        table = Table("claim", "basis", "verdict", title=rows[0]["title"])
        for id_, claim in claims.items():
            table.add_row(
                f"{id_} {claim['text']}", claim["basis"], f"[{VERDICT_COLOURS[claim['verdict']]}]{claim['verdict']}[/]"
            )
        console.print(table)
    table = Table(
        "paper", *VERDICTS, "tables", "seconds", title=f"Claims by verdict, profile {profile} (same + analogue)"
    )
    for row in rows:
        cells = [f"{c['same']} + {c['analogue']}" for c in row["counts"].values()]
        table.add_row(row["paper"], *cells, row["tables"], f"{row['seconds']:.0f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m common.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--profile", help=f"one of {', '.join(PROFILES)}; default: the one in params.yaml")
    parser.add_argument("--paper", help="one paper and what it needs; default: all")
    args = parser.parse_args()
    if args.paper and args.paper not in papers():
        raise SystemExit(f"unknown paper {args.paper!r}; the papers are: {', '.join(papers())}")
    if args.profile and args.profile not in PROFILES:
        raise SystemExit(f"unknown profile {args.profile!r}; the profiles are: {', '.join(PROFILES)}")
    heal()
    profile = args.profile or yaml.safe_load((ROOT / "params.yaml").read_text())["profile"]
    set_profile(profile)
    try:
        code = reproduce(profile, args.paper)
    finally:
        heal()
    sys.exit(code)


def reproduce(profile: str, paper: str | None) -> int:
    """Runs all papers, or one; returns the exit code."""
    from common.reporting import page

    start = time.perf_counter()
    dvc = [sys.executable, "-m", "dvc"]
    if setting := without_git():
        subprocess.run([*dvc, *setting], cwd=ROOT, check=True)
    LOG.unlink(missing_ok=True)
    slugs = [paper] if paper else papers()
    target = f"papers/{paper}/dvc.yaml" if paper else "dvc.yaml"
    with_data = [slug for slug in slugs if "data" in stages(slug)]
    for stage in stale_data_stages(profile, with_data):
        print(f"the data of {paper_of(stage)} have changed: reading them again")
        code, _ = follow([*dvc, "repro", "--force", "--single-item", stage], [stage], profile)
        if code:
            return code
    code, board = follow([*dvc, "--wait-for-lock", "repro", "--keep-going", target], plan(target), profile)
    if code == 130:
        return code
    own = page.build(profile)
    print_scoreboard(profile, slugs)
    seconds = time.perf_counter() - start
    done = f"{len(board.ran)} stages run" if board.ran else "Nothing to do: all results are up to date"
    print(f"{done if board.ran or not code else 'Nothing was run'}, {clock(seconds)} min. Profile {profile}.")
    shown = own.parent / paper / "REPORT.md" if paper else own
    print(f"Full output: {LOG.relative_to(ROOT)}. Report: {shown.relative_to(ROOT)}")
    if code:
        failed = ", ".join(map(paper_of, board.failed)) or "see above"
        print(f"Failed: {failed}. What depends on it was not run; earlier results are kept.", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
