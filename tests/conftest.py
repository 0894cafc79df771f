"""For every test: thread counts, no network, the data folder, and GPU tests skipped where there is none."""

import os
from pathlib import Path

# Before torch is imported. Tests that run side by side get a thread each, and so do the programs they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

# Without a GPU, kernels run in Triton's interpreter. Triton asks when a kernel is defined; programs that a test starts
# are left alone.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
import umd.ops  # noqa: E402, F401  (defines every kernel)
from umd.kernels import backend  # noqa: E402

os.environ.pop("TRITON_INTERPRET", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def definitions_on_cpu():
    """The interpreter is slow: tests ask for it with `backend.kernels("triton")`."""
    with backend.kernels("reference" if backend.INTERPRET else "auto"):
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The files that tests compare with."""
    return Path(__file__).parent / "data"
