"""Independent jobs in a pool of processes with one thread of torch each: small models use two cores better so."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def run_jobs(function: Callable[..., Any], jobs: Iterable[Any], workers: int) -> list[Any]:
    """function(job) of each job, in order. workers=1 stays in this process, with the threads that it has.

    The function must be importable and the jobs picklable; results must not depend on which process a job ran in.
    Raises ValueError for workers < 1.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    if workers == 1:
        return [function(job) for job in jobs]
    context = multiprocessing.get_context("spawn")  # the same on every system, and no threads of this process in them
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start) as pool:
        return list(pool.map(function, jobs))


def _start() -> None:
    """One thread of torch, which reads this when it is imported; and the process ends when its parent does."""
    os.environ["OMP_NUM_THREADS"] = "1"
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
