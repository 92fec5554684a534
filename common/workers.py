"""Independent jobs in a pool of processes with one thread of torch each: small models use two cores better so.

On Linux the processes are forks of a server that has imported torch and the decoder; imported anew, these take seconds.
The server has one thread and computes nothing, so that a fork of it is as safe as a new process, with CUDA, too.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from typing import Any

IMPORTED = ["common.generation.sampler", "common.models.hub", "transformers.models.llama.modeling_llama"]


def run_jobs(function: Callable[..., Any], jobs: Iterable[Any], workers: int) -> list[Any]:
    """function(job) of each job, in order. workers=1 stays in this process, with the threads that it has.

    The function must be importable and the jobs picklable; results must not depend on which process a job ran in.
    Raises ValueError for workers < 1.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}")
    if workers == 1:
        return [function(job) for job in jobs]
    with ProcessPoolExecutor(workers, mp_context=start_server(), initializer=_start) as pool:
        return list(pool.map(function, jobs))


def start_server() -> BaseContext:
    """Starts the server, if it does not run yet, without waiting for its imports."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # torch reads it when it is imported
    try:
        forkserver.ensure_running()
    except OSError:  # the name of its socket may be too long below a deep TMPDIR
        return multiprocessing.get_context("spawn")
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads
    return context


def _start() -> None:
    """One thread of torch, if it is not imported yet; and the process ends when its parent does."""
    gc.freeze()  # or each full collection would walk through all that was imported
    os.environ["OMP_NUM_THREADS"] = "1"
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
