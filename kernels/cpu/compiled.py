"""The compiled part of the CPU's path, cpu.cpp: built on first use by this machine's C++ compiler, if there is one.

Like a Triton kernel, the library is built for the processor at hand. That takes under a second, and the result is kept
in the user's cache folder. Without a compiler each op uses PyTorch's own calls, which are slower. `umd doctor` says
which of the two this machine uses.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..backend import use_cpu_path
from ..packing import Packing

SOURCE = Path(__file__).with_name("cpu.cpp")
TILE, SLICE = 2048, 256  # elements and rows per piece of work; cpu.cpp returns one partial sum for each piece
# No flag allows reordered sums; the source permits that for single loops.
FLAGS = (
    f"-DTILE={TILE} -DSLICE={SLICE} -std=c++17 -O3 -march=native -fopenmp -fno-math-errno -fno-trapping-math "
    "-shared -fPIC"
)


class CannotCompile(Exception):
    """cpu.cpp cannot be compiled here; the message says why."""


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def _processor() -> str:
    """Describes the processor, on which -march=native depends: machines of several kinds may share a cache folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    described = ("model name", "flags", "CPU implementer", "CPU part", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(described)} | {platform.machine()}))


def build(folder: Path) -> Path:
    """The path of the shared library in `folder`; compiles it if it is missing.

    Raises:
        CannotCompile: there is no compiler, or it fails.
        OSError: the folder cannot be written.
    """
    recipe = "\n".join([SOURCE.read_text("utf-8"), compiler(), FLAGS, _processor()])
    library = folder / f"cpu-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # renamed when complete: other processes may build it too
        made = Path(scratch, library.name)
        try:
            command = [compiler(), *FLAGS.split(), str(SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise CannotCompile(f"no {compiler()}") from None
        except subprocess.CalledProcessError as error:
            said = [line for line in error.stderr.splitlines() if "error" in line]
            raise CannotCompile(f"{compiler()}: {[*said, f'exit status {error.returncode}'][0]}") from None
        made.rename(library)
    return library


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The loaded library: from the user's cache folder, or built in a temporary folder for this process alone.

    Raises CannotCompile or OSError.
    """
    try:
        return ctypes.CDLL(str(build(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "umd"))))
    except (OSError, RuntimeError):  # no home folder, or one without permission to write or to run code
        with tempfile.TemporaryDirectory() as folder:
            return ctypes.CDLL(str(build(Path(folder))))


@lru_cache(maxsize=1)
def compiler_lacks() -> str:
    """Build the library if needed; return why there is none, or "" if there is one."""
    try:
        library()
    except (CannotCompile, OSError) as error:
        return str(error)
    return ""


def use_compiled(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether an op on x runs cpu.cpp: x is on the CPU, has this type, and runs in eager mode."""
    if x.dtype != dtype or not use_cpu_path(x):
        return False
    return not torch.compiler.is_compiling() and not isinstance(x, FakeTensor) and not compiler_lacks()


def _pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def gelu(x: Tensor) -> Tensor:
    """gelu(x) in its tanh form, for bf16 x."""
    x = x.contiguous()
    y = torch.empty_like(x)
    library().gelu(_pointer(x), _pointer(y), ctypes.c_int64(x.numel()))
    return y


def gelu_backward(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """(gelu(x), dx). dy must be contiguous; dx overwrites it."""
    x, y = x.contiguous(), torch.empty_like(x)
    library().gelu_backward(_pointer(x), _pointer(dy), _pointer(y), ctypes.c_int64(x.numel()))
    torch.autograd.graph.increment_version(dy)
    return y, dy


def transpose(x: Tensor, out: Tensor) -> Tensor:
    """Write xᵀ into out [n, N] for x [N, n], both bf16; out is contiguous."""
    x = x.contiguous()
    library().transpose(_pointer(x), *map(ctypes.c_int64, x.shape), _pointer(out))
    return out


def _row_stride(table: Tensor) -> ctypes.c_int64:
    """Elements from one table row to the next; 0 for a table of one row, which serves every sample."""
    return ctypes.c_int64(table.stride(0) if len(table) > 1 else 0)


def layer_norm(
    x: Tensor, h: Tensor | None, gate: Tensor | None, alpha: Tensor, beta: Tensor, packing: Packing, eps: float
) -> tuple[Tensor, ...]:
    """Compute r = x + gate·h (r = x if h is None) and y = (r - mean)·rstd·alpha + beta: (r, y, mean, rstd).

    x, h: bf16 [N, D], contiguous. gate, alpha, beta: fp32 [R, D], unit stride in a row. mean, rstd: fp32 [N].
    """
    N, D = x.shape
    r, y = x if h is None else torch.empty_like(x), torch.empty_like(x)
    mean, rstd = x.new_empty(2, N, dtype=torch.float32)
    library().layer_norm(
        *map(_pointer, (x, h, gate, alpha, beta)),
        *map(_row_stride, (alpha if gate is None else gate, alpha, beta)),
        _pointer(packing.chunks), ctypes.c_int64(len(packing.chunks)), ctypes.c_int64(D), ctypes.c_float(eps),
        *map(_pointer, (r, y, mean, rstd)),
    )  # fmt: skip
    return r, y, mean, rstd


def layer_norm_backward(
    dr: Tensor | None, dy: Tensor, r: Tensor, h: Tensor | None, gate: Tensor | None, alpha: Tensor,
    mean: Tensor, rstd: Tensor, packing: Packing,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of `layer_norm`: (dx, dh, sums). All tensors are contiguous.

    sums, fp32 [3, R, D]: dalpha, dbeta and dgate; dgate is meaningless without h.
    """
    D, chunks = r.shape[1], packing.chunks
    dx, dh = torch.empty_like(r), None if h is None else torch.empty_like(r)
    sums = alpha.new_empty(len(chunks), 3, D)
    library().layer_norm_backward(
        *map(_pointer, (dr, dy, r, h, gate, alpha)),
        *map(_row_stride, (alpha if gate is None else gate, alpha)),
        *map(_pointer, (mean, rstd, chunks)), ctypes.c_int64(len(chunks)), ctypes.c_int64(D),
        *map(_pointer, (dx, dh, sums)),
    )  # fmt: skip
    rows = chunks[:, 2] if len(alpha) > 1 else torch.zeros(len(chunks), dtype=torch.int32)
    return dx, dh, alpha.new_zeros(len(alpha), 3, D).index_add_(0, rows, sums).transpose(0, 1)


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x·weightᵀ + bias: x [R, I], weight [O, I], bias [O] to [R, O], all fp32 and contiguous."""
    y = x.new_empty(len(x), len(weight))
    sizes = map(ctypes.c_int64, (len(x), *weight.shape))
    library().few_rows(*map(_pointer, (x, weight, bias)), *sizes, _pointer(y))
    return y


def few_rows_linear_backward(x: Tensor, weight: Tensor, dy: Tensor, grad_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Gradients of `few_rows_linear`: (dx, dweight), dweight in fp32 or bf16. dy is contiguous."""
    dx, dweight = x.new_empty(-(-len(weight) // SLICE), *x.shape), torch.empty_like(weight, dtype=grad_dtype)
    sizes = map(ctypes.c_int64, (len(x), *weight.shape))
    library().few_rows_backward(
        *map(_pointer, (x, weight, dy)), *sizes, _pointer(dx), _pointer(dweight),
        ctypes.c_int64(grad_dtype == torch.bfloat16),
    )  # fmt: skip
    return dx.sum(0), dweight


def _pieces(*lists: list[Tensor]) -> tuple[ctypes.Array, ctypes.c_int64]:
    """Parallel lists of contiguous tensors in cpu.cpp's form: (for each row its pointers and its length; row count)."""
    rows = [[*(t.data_ptr() for t in row), row[0].numel()] for row in zip(*lists, strict=True)]
    return (ctypes.c_int64 * sum(map(len, rows)))(*(n for row in rows for n in row)), ctypes.c_int64(len(rows))


def _are_bf16(tensors: list[Tensor]) -> ctypes.Array:
    return (ctypes.c_bool * len(tensors))(*(t.dtype == torch.bfloat16 for t in tensors))


def square_sum(tensors: list[Tensor]) -> Tensor:
    """Sum of the squares of all elements of fp32 and bf16 tensors: fp64 [].

    Sums within a tile of `TILE` elements are in fp32, the sum over tiles is in fp64.
    """
    tensors = [t.contiguous() for t in tensors]
    sums = torch.empty(sum(-(-t.numel() // TILE) for t in tensors))
    library().squares(*_pieces(tensors), _are_bf16(tensors), _pointer(sums))
    return sums.sum(dtype=torch.float64)


def adamw_(
    weights: list[Tensor], gradients: list[Tensor], averages: list[Tensor], squares: list[Tensor], steps: list[int],
    scale: float, lr: float, betas: tuple[float, float], weight_decay: float, eps: float,
) -> None:  # fmt: skip
    """Take an AdamW step in place on fp32 tensors.

    Args:
        weights: the parameters.
        gradients: fp32 or bf16; each is multiplied by `scale` first.
        averages, squares: first and second moments of the scaled gradients.
        steps: for each parameter, the number of this step, counted from 1.
        scale: factor on all gradients, such as that of gradient clipping.
        lr, betas, weight_decay, eps: as in torch.optim.AdamW.
    """
    gradients = [g.contiguous() for g in gradients]
    rates = [(lr / (1 - betas[0] ** step), (1 - betas[1] ** step) ** -0.5) for step in steps]
    library().adamw(
        *_pieces(weights, gradients, averages, squares), _are_bf16(gradients),
        (ctypes.c_float * (2 * len(rates)))(*(x for rate in rates for x in rate)),
        *map(ctypes.c_float, (scale, 1 - lr * weight_decay, *betas, eps)),
    )  # fmt: skip
    torch.autograd.graph.increment_version([*weights, *averages, *squares])
