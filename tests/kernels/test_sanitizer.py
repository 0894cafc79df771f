"""The out-of-bounds sanitizer of triton-viz on the kernels that it can run.

It proves the bounds of whole programs, with z3. It takes neither the norms (a loop whose bounds are loaded) nor
scatter_tokens (a load in a loop that depends on another), nor tl.rand4x and tl.clamp: here noise is given and nothing
clipped. `in_bounds` (conftest.py) checks each address of every interpreted kernel, those included.
"""

import sys

import pytest
import torch

from umd.kernels import backend, ddim, loss, patches, tokens

triton_viz = pytest.importorskip("triton_viz", reason="pip install triton-viz")
if not backend.INTERPRET:
    pytest.skip("kernels are compiled for the GPU here", allow_module_level=True)


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# Images of 2 × 3 patches; numbers of patches, pixels and rows that no block divides.
def gather_patches(patches):
    ids, half = torch.tensor([0, 2, 5, 7, 11]), torch.tensor([0.5])
    patches.gather_patches(randn(2, 3, 8, 12), ids, half, half, randn(1, 3, 8, 12), 4)


def masked_diffusion_loss(loss):
    prediction, ids = randn(12, 96).requires_grad_(), torch.tensor([0, 2, 4, 7])
    total, _ = loss.masked_diffusion_loss(prediction, randn(2, 3, 8, 12), ids, 3, 1, randn(1, 3, 8, 12), 4)
    total.backward()


def ddim_step(ddim):
    x, coefficients = randn(3, 3, 30, 22), torch.tensor([0.6, 0.8, 0.9, 0.3, 0.31])
    ddim.ddim_step(x, x.clone(), x.clone(), 1.5, coefficients, from_xstart=False, clip=False, noise=x.clone())


def sum_rows(tokens):
    tokens._sum_rows(randn(13, 300), torch.float32)


@pytest.fixture
def run(monkeypatch):
    """run(work, module): how many launches the sanitizer passed. It ends the program at the first that it does not."""

    def run(work, module):
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                sanitizer = triton_viz.clients.Sanitizer(abort_on_error=True)
                monkeypatch.setattr(module, name, triton_viz.trace(client=sanitizer)(kernel))
        triton_viz.clear()
        with backend.kernels("triton"):
            work(module)
        return len(sys.modules["triton_viz.core.trace"].launches)  # triton_viz.core.trace is the function

    return run


@pytest.mark.parametrize(
    ("work", "module", "launches"),
    [(gather_patches, patches, 1), (masked_diffusion_loss, loss, 2), (ddim_step, ddim, 1), (sum_rows, tokens, 1)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_finds_nothing(run, work, module, launches):
    assert run(work, module) == launches


MUTANTS = {
    "a row beyond the last": (gather_patches, patches, "mask = (row < N)[:, None]", "mask = (row < N + 1)[:, None]"),
    "columns beyond the last": (
        masked_diffusion_loss, loss, "[:, None] & (col < D)[None, :]", "[:, None] & (col <= D)[None, :]"
    ),
    "pixels beyond the last": (ddim_step, ddim, "inside = i < C * H * W", "inside = i < C * H * W + 1"),
    "rows beyond the last, read": (sum_rows, tokens, "mask=(r < R) & (m < M)", "mask=(r <= R) & (m < M)"),
}  # fmt: skip


@pytest.mark.parametrize("what", MUTANTS)
def test_finds_what_leaves_its_tensors(run, mutant, what, capsys):
    work, module, old, new = MUTANTS[what]
    with pytest.raises(SystemExit):
        run(work, mutant(module, old, new))
    assert "ILLEGAL MEMORY ACCESS" in capsys.readouterr().out
