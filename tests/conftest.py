"""Shared by all tests: light threads, no network, no user settings."""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["MPLBACKEND"] = "agg"


@pytest.fixture(autouse=True)
def _two_workers_share_the_cores():
    """pytest runs in two workers: one torch thread each is faster than two that wait for each other."""
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
