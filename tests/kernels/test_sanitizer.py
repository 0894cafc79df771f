"""The out-of-bounds sanitizer of triton-viz on the kernels that it can run.

It proves the bounds of whole programs, with z3. It takes neither the norms (a loop whose bounds are loaded) nor
scatter_tokens (a load in a loop that depends on another), nor tl.rand4x and tl.clamp: here noise is given and nothing
clipped. `in_bounds` (conftest.py) checks each address of every interpreted kernel, those included.
"""

import sys
from pathlib import Path

import pytest

pytest.importorskip("triton_viz", reason="pip install triton-viz")

from umd.bench.audit import run_apart  # noqa: E402

LAUNCHES = {"gather_patches": 1, "masked_diffusion_loss": 2, "ddim_step": 1, "token_slots": 1}
MUTANTS = {
    "a row beyond the last": ("gather_patches", "mask = (row < N)[:, None]", "mask = (row < N + 1)[:, None]"),
    "a column beyond the last": (
        "masked_diffusion_loss",
        "[:, None] & (col < D)[None, :]",
        "[:, None] & (col <= D)[None, :]",
    ),
    "a pixel beyond the last": ("ddim_step", "inside = i < C * H * W", "inside = i < C * H * W + 1"),
    "a row beyond the last, read": ("token_slots", "mask=row < N", "mask=row <= N"),
}


@pytest.fixture(scope="module")
def reports():
    """{name: (launches that passed, report of the first that did not)}"""
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)  # the process that runs them inherits it
    try:
        from sanitized import check

        jobs = [(check, name) for name in LAUNCHES] + [(check, *change) for change in MUTANTS.values()]
        return dict(zip([*LAUNCHES, *MUTANTS], run_apart(True, jobs), strict=True))
    finally:
        sys.path.remove(folder)


@pytest.mark.parametrize("name", LAUNCHES)
def test_finds_nothing(reports, name):
    assert reports[name] == (LAUNCHES[name], "")


@pytest.mark.parametrize("what", MUTANTS)
def test_finds_what_leaves_its_tensors(reports, what):
    launches, report = reports[what]
    assert launches < LAUNCHES[MUTANTS[what][0]] and "ILLEGAL MEMORY ACCESS" in report
