"""Jobs give the same in one process and in several, in order."""

import math

import pytest

from common.workers import run_jobs


@pytest.mark.slow
def test_the_number_of_processes_does_not_matter():
    assert run_jobs(math.factorial, range(20), 1) == run_jobs(math.factorial, range(20), 2)


def test_an_error_of_a_job_is_raised():
    with pytest.raises(ValueError, match="factorial"):
        run_jobs(math.factorial, [3, -1], 1)
    with pytest.raises(ValueError, match="workers must be at least 1, not 0"):
        run_jobs(math.factorial, [1], 0)
