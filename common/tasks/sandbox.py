"""Runs a program that a model wrote in a separate, confined process: `run_program`; this file is also that process.

Everywhere: `python -I -S`, an empty environment, a temporary working folder, no input, output thrown away, limits on
CPU seconds, address space, file size and processes, and at a wall-clock limit the whole process group is killed. On
Linux also, each where the kernel grants it: a network namespace without interfaces, file rules (Landlock) that allow
writing below the working folder alone, and a system call filter (seccomp) without new processes, sockets or signals to
others. `Outcome.confined` says which of these held.

A program counts as passed only if it ran to its end: leaving early, by whatever exit, does not. Tests that are part of
the program share its interpreter, so what it cannot do is harm; a program written to fool its own tests still can.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass

REPORT_BYTES = 4096  # read of what the process reports; a pipe holds it without a reader
REFUSAL = (
    "running a model's program needs allow_code_execution=True (in a config: allow_code_execution=true). It runs"
    " confined, in a process of its own (common/tasks/sandbox.py); allow it only on a machine where that is acceptable"
)


class CodeExecutionNotAllowed(PermissionError):
    """The caller has not allowed to run a program."""


@dataclass(frozen=True)
class Limits:
    """cpu_seconds: of the process. wall_seconds: until it is killed. memory_mb: address space. file_mb: of a file."""

    cpu_seconds: int = 5
    wall_seconds: float = 15.0
    memory_mb: int = 512
    file_mb: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")


@dataclass(frozen=True)
class Outcome:
    """passed: the program ran to its end. reason: why not, '' if it did. confined: the protections beyond limits."""

    passed: bool
    reason: str
    seconds: float
    confined: tuple[str, ...] = ()


def check_allowed(allow_code_execution: bool) -> None:
    """Raises CodeExecutionNotAllowed unless allow_code_execution is true; for those who sample programs first."""
    if allow_code_execution is not True:
        raise CodeExecutionNotAllowed(REFUSAL)


def run_program(program: str, *, allow_code_execution: bool = False, limits: Limits | None = None) -> Outcome:
    """Runs Python source in a confined process, see the module.

    Raises CodeExecutionNotAllowed unless allow_code_execution is true; nothing is started then.
    """
    check_allowed(allow_code_execution)
    import secrets
    import tempfile

    limits, token = limits or Limits(), secrets.token_hex(16)
    order = json.dumps({"program": program, "token": token, "limits": vars(limits)}).encode()
    report, write = os.pipe()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="frugal_sandbox_", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", __file__, str(write)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, cwd=folder, env={}, pass_fds=[write], start_new_session=True,
        )  # fmt: skip
        os.close(write)
        try:
            _feed(process, order)
            process.wait(limits.wall_seconds)
            reason = "" if process.returncode == 0 else _death(process.returncode)
        except subprocess.TimeoutExpired:
            reason = f"still running after {limits.wall_seconds:g} seconds"
        finally:
            _kill_group(process.pid)
            process.wait()
            os.set_blocking(report, False)
            text = _read(report)
            os.close(report)
    seconds = time.perf_counter() - began
    try:
        said = json.loads(text)
        confined = tuple(str(name) for name in said["confined"])
        if said["token"] == token and not reason:
            return Outcome(True, "", seconds, confined)
        return Outcome(False, reason or str(said["error"]), seconds, confined)
    except (ValueError, TypeError, KeyError, RecursionError):
        return Outcome(False, reason or "it ended before its last line", seconds)


def _feed(process: subprocess.Popen[bytes], order: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(order)
        process.stdin.close()
    except BrokenPipeError:
        return  # it died at its start; the return code says why


def _death(code: int) -> str:
    if code == -signal.SIGXCPU:
        return "the limit of CPU seconds was reached"
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(pid, signal.SIGKILL)


def _read(report: int) -> bytes:
    try:
        return os.read(report, REPORT_BYTES)
    except BlockingIOError:
        return b""


# From here on: the confined process. It imports nothing of the project.

NEW_USER, NEW_NET, NEW_IPC = 0x10000000, 0x40000000, 0x08000000
DEATH_SIGNAL, SET_SECCOMP, SECCOMP_FILTER, NO_NEW_PRIVILEGES = 1, 22, 2, 38
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # landlock_*, the same numbers on every architecture
# Audit architecture, and the calls that are refused: fork, vfork, clone, clone3, execve, execveat, socket, socketpair,
# kill, tkill, tgkill, pidfd_open, pidfd_send_signal, ptrace, process_vm_writev, unshare, setns, mount, bpf,
# io_uring_setup, keyctl, add_key, request_key, perf_event_open.
REFUSED = {
    "x86_64": (
        0xC000003E,
        (57, 58, 56, 435, 59, 322, 41, 53, 62, 200, 234, 434, 424, 101, 311, 272, 308, 165, 321, 425, 250, 248, 249,
         298),
    ),
    "aarch64": (
        0xC00000B7,
        (220, 435, 221, 281, 198, 199, 129, 130, 131, 434, 424, 117, 271, 97, 268, 40, 280, 425, 219, 217, 218, 241),
    ),
}  # fmt: skip


def _set_limits(limits: dict) -> None:
    megabyte = 1 << 20
    for kind, most in (
        (resource.RLIMIT_AS, limits["memory_mb"] * megabyte),
        (resource.RLIMIT_FSIZE, limits["file_mb"] * megabyte),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
    seconds = limits["cpu_seconds"]
    resource.setrlimit(
        resource.RLIMIT_CPU, (seconds, seconds + 1)
    )  # a signal that tells, then one that cannot be caught


def _confine() -> list[str]:
    """Applies what the kernel grants, in this order (the filter last: it refuses what the others need)."""
    if sys.platform != "linux":
        return []
    libc = ctypes.CDLL(None, use_errno=True)
    steps = {"no network": _no_network, "file rules": _file_rules, "system call filter": _filter}
    libc.prctl(DEATH_SIGNAL, signal.SIGKILL)  # it does not outlive who waits for it
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0):
        return []
    return [name for name, step in steps.items() if step(libc)]


def _no_network(libc: ctypes.CDLL) -> bool:
    return libc.unshare(NEW_USER | NEW_NET | NEW_IPC) == 0


def _file_rules(libc: ctypes.CDLL) -> bool:
    """Landlock: everything that writes, makes, removes, moves or truncates files, below the working folder alone."""
    version = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    writing = 0b1_1111_1111_0010 | (version >= 2) << 13 | (version >= 3) << 14
    rules = libc.syscall(CREATE_RULESET, ctypes.byref(ctypes.c_uint64(writing)), ctypes.c_size_t(8), 0)
    folder = os.open(".", os.O_PATH)
    below = ctypes.create_string_buffer(struct.pack("=Qi", writing, folder))
    done = rules >= 0 and not libc.syscall(ADD_RULE, rules, 1, below, 0) and not libc.syscall(RESTRICT_SELF, rules, 0)
    os.close(folder)
    return done


def _filter(libc: ctypes.CDLL) -> bool:
    """Seccomp: a classic BPF program that answers the refused calls with EPERM."""
    if os.uname().machine not in REFUSED:
        return False
    architecture, calls = REFUSED[os.uname().machine]
    load, equal, at_least, answer = 0x20, 0x15, 0x35, 0x06
    kill, allow, refuse = 0x80000000, 0x7FFF0000, 0x00050001
    foreign = 0x40000000  # calls of the x32 interface
    program = [(load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, kill), (load, 0, 0, 0)]
    tests = [(at_least, foreign), *((equal, call) for call in calls)]
    program += [(code, len(tests) - i, 0, value) for i, (code, value) in enumerate(tests)]
    program += [(answer, 0, 0, allow), (answer, 0, 0, refuse)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    return libc.prctl(SET_SECCOMP, SECCOMP_FILTER, header, 0, 0) == 0


def _child() -> None:
    order, report = json.load(sys.stdin), int(sys.argv[1])
    said = {"token": "", "error": "", "confined": []}
    try:
        _set_limits(order["limits"])
        said["confined"] = _confine()
        exec(compile(order["program"], "<program>", "exec"), {"__name__": "__main__"})
        said["token"] = order["token"]
    except BaseException as error:
        said["error"] = f"{type(error).__name__}: {error}"[:500]
    os.write(report, json.dumps(said).encode()[:REPORT_BYTES])
    os._exit(0)


if __name__ == "__main__":
    _child()
