"""What test_sanitizer.py runs in a process of its own: triton-viz leaves its patches in Triton behind."""

import contextlib
import importlib.util
import io
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch
import triton_viz

from umd.kernels import backend
from umd.kernels.triton import ddim, loss, op, patches, tokens


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# Images of 2 × 3 patches; numbers of patches, pixels and rows that no block divides.
def gather_patches(patches):
    ids, half = torch.tensor([0, 2, 5, 7, 11]), torch.tensor([0.5])
    patches.gather_patches_fwd(randn(2, 3, 8, 12), ids, half, half, randn(1, 3, 8, 12), 4)


def masked_diffusion_loss(loss):
    prediction, roles = randn(12, 96).requires_grad_(), torch.zeros(12, dtype=torch.uint8)
    roles[[0, 2, 4, 7]] = 1
    work = prediction, randn(2, 3, 8, 12), roles, randn(1, 3, 8, 12), 4
    loss.masked_diffusion_loss_fwd(*work, 1, 3, 3, 5)[0].backward()


def ddim_step(ddim):
    x, coefficients = randn(3, 3, 30, 22), torch.tensor([0.6, 0.8, 0.9, 0.3, 0.31])
    ddim.ddim_step_fwd(x, x.clone(), x.clone(), 1.5, coefficients, False, False, x.clone(), None, None)


def token_slots(tokens):
    tokens.token_slots(torch.tensor([0, 2, 5, 7, 11]), 3, 6, 1)


WORK = {gather_patches: patches, masked_diffusion_loss: loss, ddim_step: ddim, token_slots: tokens}


def check(name: str, old: str = "", new: str = "") -> tuple[int, str]:
    """(launches that passed, report of the first that did not) of an op; with `old` in its module replaced by `new`."""
    work, module = next((work, module) for work, module in WORK.items() if work.__name__ == name)
    if old:
        module = _mutant(module, old, new)
    kernels = {name: kernel for name, kernel in vars(module).items() if name.endswith("_kernel")}
    triton_viz.clear()
    report = io.StringIO()
    try:
        for kernel in kernels:
            sanitizer = triton_viz.clients.Sanitizer(abort_on_error=True)
            setattr(module, kernel, triton_viz.trace(client=sanitizer)(kernels[kernel]))
        with backend.kernels("triton"), contextlib.redirect_stdout(report), contextlib.suppress(SystemExit):
            work(module)
    finally:
        vars(module).update(kernels)
    return len(sys.modules["triton_viz.core.trace"].launches), report.getvalue()


def _mutant(module: ModuleType, old: str, new: str) -> ModuleType:
    source, register = Path(module.__file__).read_text(), op.triton_op
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times"
    path = Path(tempfile.mkdtemp()) / "mutant.py"  # a file: Triton reads a kernel's source
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_mutant", path)
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    op.triton_op = lambda name: register(f"{name}_mutant")
    try:
        spec.loader.exec_module(found)
    finally:
        op.triton_op = register
    return found
