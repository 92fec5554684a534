"""Jobs give the same in one process and in several, in order."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.workers import run_jobs

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_a_process_has_one_thread_of_torch_and_the_environment_of_this_one_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    job = "(__import__('torch').get_num_threads(), __import__('os').getpid())"
    for _ in range(2):  # the second pool finds the server
        threads, pids = zip(*run_jobs(eval, [job] * 4, 2), strict=True)
        assert set(threads) == {1}
        assert os.getpid() not in pids
    assert os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.slow
def test_a_temporary_folder_too_deep_for_a_socket_is_no_obstacle(tmp_path):
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    code = "import math; from common.workers import run_jobs; print(run_jobs(math.factorial, [3, 4], 2))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"TMPDIR": str(deep)}, capture_output=True, text=True
    )
    assert done.stdout == "[6, 24]\n", done.stderr


@pytest.mark.slow
def test_the_number_of_processes_does_not_matter():
    assert run_jobs(math.factorial, range(20), 1) == run_jobs(math.factorial, range(20), 2)


def test_an_error_of_a_job_is_raised():
    with pytest.raises(ValueError, match="factorial"):
        run_jobs(math.factorial, [3, -1], 1)
    with pytest.raises(ValueError, match="workers must be at least 1, not 0"):
        run_jobs(math.factorial, [1], 0)
