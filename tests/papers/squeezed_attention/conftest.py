"""The kernels' torch paths, which a user without a GPU runs; Triton's interpreter takes a hundred times as long."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _without_the_interpreter():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "0")
        yield
