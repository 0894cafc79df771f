"""For every test: thread counts, no network, the data folder, and GPU tests skipped where there is none."""

import os
from pathlib import Path

# Before torch is imported. Tests that run side by side get a thread each, and so do the programs they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The files that tests compare with."""
    return Path(__file__).parent / "data"
