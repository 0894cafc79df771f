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

from umd.kernels import attention, backend
from umd.kernels.triton import op

Inputs = dict[str, Tensor | None]
SLACK = {torch.float64: 1e4, torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}  # in units of eps·max


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


@pytest.fixture
def strictly_deterministic(nan_in_new_memory):
    """Not warn_only, under which torch's flash kernels add to dq in any order."""
    torch.use_deterministic_algorithms(True)


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

    Inputs may have several types (bf16 tokens and fp32 tables, say); `plain` gets all of them in the first's, but for
    those that are named in `narrow`.
    """

    def check(op: Callable, plain: Callable, inputs: Inputs, narrow: tuple[str, ...] = ()) -> None:
        def cast(dtype: torch.dtype) -> Inputs:
            kept = () if dtype == torch.float64 else narrow
            return {name: x if x is None or name in kept else x.to(dtype) for name, x in inputs.items()}

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
            coarser = max(dtype, ours[name].dtype, key=lambda one: torch.finfo(one).eps)
            allowed = 2 * allowed + SLACK[coarser] * torch.finfo(coarser).eps * truth.abs().max()
            assert error <= allowed, f"{name}: off by {error:.3g}, allowed {allowed:.3g}"

    return check


_mutants = count()


@pytest.fixture
def mutant(tmp_path, monkeypatch):
    """mutant(module, old, new, times=1): an op's module whose kernels, of kernels/triton/, have one text replaced.

    `old` must occur `times` times. The mutant's kernels run where the real ones do; its ops have names of their own.
    """
    register = op.triton_op

    def load(module: ModuleType, old: str, new: str, times: int = 1) -> ModuleType:
        package, _, stem = module.__name__.rpartition(".")
        kernels = importlib.import_module(f"umd.kernels.triton.{stem}")
        source = Path(kernels.__file__).read_text()
        assert source.count(old) == times, f"{old!r} occurs {source.count(old)} times, expected {times}"
        assert old != new
        name = f"{kernels.__name__}_mutant{next(_mutants)}"
        suffix = name.rpartition("_")[2]
        path = tmp_path / f"{name}.py"  # a file: Triton reads a kernel's source
        path.write_text(source.replace(old, new))
        with monkeypatch.context() as patch:
            patch.setattr(op, "triton_op", lambda name: register(f"{name}_{suffix}"))
            if backend.INTERPRET:
                patch.setenv("TRITON_INTERPRET", "1")
            wrong = _import(name, path, monkeypatch)
        if module is kernels:
            return wrong
        found = _import(f"{package}.{stem}_{suffix}", Path(module.__file__), monkeypatch)
        vars(found).update({n: vars(wrong)[n] for n, x in vars(module).items() if x is vars(kernels).get(n, found)})
        return found

    return load


def _import(name: str, path: Path, monkeypatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, found)
    spec.loader.exec_module(found)
    return found


# flash-attn and varlen_attn have kernels for CUDA only. Here their operators get one for the CPU, so that all that lies
# between our call and a kernel runs: their Python, their autograd, and what torch.compile makes of both.


def _samples(cu_seqlens: Tensor) -> list[slice]:
    bounds = cu_seqlens.tolist()
    return [slice(start, stop) for start, stop in zip(bounds, bounds[1:], strict=False)]


def _attend(q, k, v, cu_q, cu_k):
    """(out, logsumexp [H, N]) of packed streams in fp32: what both libraries ask of their kernel."""
    out, logsumexp = torch.empty_like(q), q.new_empty(q.shape[1], len(q), dtype=torch.float32)
    for here, there in zip(_samples(cu_q), _samples(cu_k), strict=True):
        q_, k_, v_ = (x.transpose(0, 1).float() for x in (q[here], k[there], v[there]))  # [H, L or M, d]
        scores = q_ @ k_.mT / q.shape[-1] ** 0.5
        logsumexp[:, here] = scores.logsumexp(-1)
        out[here] = (scores.softmax(-1) @ v_).transpose(0, 1)
    return out, logsumexp


def _attend_backward(dout, q, k, v, out, logsumexp, cu_q, cu_k):
    """dq, dk, dv from what the forward left: the output and the logsumexp, as Dao et al. 2022 derive them."""
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    for here, there in zip(_samples(cu_q), _samples(cu_k), strict=True):
        q_, out_, dout_ = (x[here].transpose(0, 1).float() for x in (q, out, dout))
        k_, v_ = (x[there].transpose(0, 1).float() for x in (k, v))
        weights = (q_ @ k_.mT / q.shape[-1] ** 0.5 - logsumexp[:, here, None]).exp()
        dscores = weights * (dout_ @ v_.mT - (dout_ * out_).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
        dq[here], dk[there] = (dscores @ k_).transpose(0, 1), (dscores.mT @ q_).transpose(0, 1)
        dv[there] = (weights.mT @ dout_).transpose(0, 1)
    return dq, dk, dv


@pytest.fixture
def varlen_attn_on_cpu():
    def forward(q, k, v, cu_q, cu_k, *rest):
        return *_attend(q, k, v, cu_q, cu_k), torch.zeros(2, dtype=torch.uint64)

    def backward(dout, q, k, v, out, logsumexp, cu_q, cu_k, *rest):
        return _attend_backward(dout, q, k, v, out, logsumexp, cu_q, cu_k)

    with torch.library._scoped_library("torch_attn", "FRAGMENT") as library:
        library.impl("_varlen_attn", forward, "CPU")
        library.impl("_varlen_attn_backward", backward, "CPU")
        yield


@pytest.fixture
def flash_attn_on_cpu(monkeypatch):
    """Gives the list of `deterministic` in each backward pass."""
    if importlib.util.find_spec("flash_attn") is None:
        pytest.skip("flash-attn is not installed")
    if importlib.util.find_spec("flash_attn_2_cuda") is None:  # only its Python is: the kernels are ours anyway
        monkeypatch.setitem(sys.modules, "flash_attn_2_cuda", ModuleType("flash_attn_2_cuda"))
    attention._flash_attn_refusal.cache_clear()
    import flash_attn  # noqa: F401

    deterministic: list[bool] = []

    def forward(q, k, v, cu_q, cu_k, *rest, **named):
        return *_attend(q, k, v, cu_q, cu_k), q.new_empty(0), torch.zeros(2, dtype=torch.int64)

    def backward(dout, q, k, v, out, logsumexp, dq, dk, dv, cu_q, cu_k, *rest, **named):
        deterministic.append(rest[9])
        found = _attend_backward(dout, q, k, v, out, logsumexp, cu_q, cu_k)
        for gradient, value in zip((dq, dk, dv), found, strict=True):
            gradient.copy_(value)
        return torch.empty(q.shape[1], len(q), dtype=torch.float32)

    with torch.library._scoped_library("flash_attn", "FRAGMENT") as library:
        library.impl("_flash_attn_varlen_forward", forward, "CPU")
        library.impl("_flash_attn_varlen_backward", backward, "CPU")
        yield deterministic
    attention._flash_attn_refusal.cache_clear()


@pytest.fixture(name="backend", params=["flash_attn", "varlen_attn", "sdpa", "matmul"])
def attention_backend_on_cpu(request):
    if request.param.endswith("attn"):
        request.getfixturevalue(f"{request.param}_on_cpu")
    return request.param
