"""How an op is compared with another: values and every gradient, under random gradients of the outputs."""

import importlib.util
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from umd.kernels import backend

Inputs = dict[str, Tensor | None]
SLACK = {torch.float64: 1e4, torch.float32: 4, torch.bfloat16: 1, torch.float16: 1}  # in units of eps·max


def values_and_gradients(op: Callable, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs of op(**inputs), and the gradient of each floating-point input under a fixed random dout."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items() if x is not None}
    outputs = op(**{**inputs, **leaves})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    douts = [torch.randn(y.shape, generator=generator).bfloat16().to(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), douts, materialize_grads=True)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        assert gradient.shape == leaf.shape and gradient.dtype == leaf.dtype, f"d{name}"
        found[f"d{name}"] = gradient
    return found


@pytest.fixture(params=["torch", "interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where an op runs, for tests of every path: torch on the CPU, kernels in the interpreter, kernels on a GPU."""
    if request.param == "interpreter" and not backend.INTERPRET:
        pytest.skip("kernels are compiled for the GPU here")
    with backend.kernels("reference" if request.param == "torch" else "triton"):
        yield "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture(autouse=True)
def nan_in_new_memory():
    """`torch.empty` is full of NaN, so that what a kernel does not write shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _span(x: Tensor) -> tuple[int, int]:
    """First address of a tensor, and the first behind it."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + elements * x.element_size()


@pytest.fixture(autouse=True)
def in_bounds(monkeypatch):
    """In the interpreter, a kernel that touches an address outside of the tensors it was given fails."""
    if not backend.INTERPRET:
        return
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    run, load, store = (
        GridExecutor.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )
    spans: list[tuple[int, int]] = []

    def check(pointers, mask) -> None:
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        touched = pointers.data[mask.data.astype(bool)].astype("int64")
        if touched.size == 0 or any(low <= touched.min() and touched.max() + size <= high for low, high in spans):
            return
        inside = sum((low <= touched) & (touched + size <= high) for low, high in spans)
        assert inside.all(), "an access outside of the tensors given"

    def checked_run(executor, *args, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.numel()]
        spans[:] = [_span(x) for x in tensors]
        return run(executor, *args, **kwargs)

    def checked_load(builder, pointers, mask, *rest):
        check(pointers, mask)
        return load(builder, pointers, mask, *rest)

    def checked_store(builder, pointers, value, mask, *rest):
        check(pointers, mask)
        return store(builder, pointers, value, mask, *rest)

    monkeypatch.setattr(GridExecutor, "__call__", checked_run)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked_store)


@pytest.fixture(scope="session")
def compare():
    """compare(op, plain, inputs): against fp64, op is off by at most twice what `plain` is in the same type.

    Inputs may have several types (bf16 tokens and fp32 tables, say); `plain` gets all of them in the first's.
    """

    def check(op: Callable, plain: Callable, inputs: Inputs) -> None:
        def cast(dtype: torch.dtype) -> Inputs:
            return {name: None if x is None else x.to(dtype) for name, x in inputs.items()}

        dtype = next(iter(inputs.values())).dtype
        exact = values_and_gradients(plain, cast(torch.float64))
        theirs = values_and_gradients(plain, cast(dtype))
        ours = values_and_gradients(op, inputs)
        assert ours.keys() == exact.keys()
        for name, truth in exact.items():
            assert ours[name].shape == truth.shape, name
            if truth.numel() == 0:
                continue
            assert ours[name].isfinite().all(), f"{name} is not finite"
            error, allowed = ((one[name].double() - truth).abs().max() for one in (ours, theirs))
            allowed = 2 * allowed + SLACK[dtype] * torch.finfo(dtype).eps * truth.abs().max()
            assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"

    return check


_mutants = count()


@pytest.fixture
def mutant(tmp_path, monkeypatch):
    """mutant(module, old, new, times=1): the kernel module with one exact text replaced, beside the real one.

    `old` must occur `times` times. The mutant's kernels run where the real ones do; its ops have names of their own.
    """
    register = backend.triton_op

    def load(module: ModuleType, old: str, new: str, times: int = 1) -> ModuleType:
        source = Path(module.__file__).read_text()
        assert source.count(old) == times, f"{old!r} occurs {source.count(old)} times, expected {times}"
        assert old != new
        name = f"{module.__name__}_mutant{next(_mutants)}"
        suffix = name.rpartition("_")[2]
        path = tmp_path / f"{name}.py"  # a file: Triton reads a kernel's source
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(name, path)
        found = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, found)
        with monkeypatch.context() as patch:
            patch.setattr(backend, "triton_op", lambda op: register(f"{op}_{suffix}"))
            if backend.INTERPRET:
                patch.setenv("TRITON_INTERPRET", "1")
            spec.loader.exec_module(found)
        return found

    return load
