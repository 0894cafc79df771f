"""What this machine computes on, in which type, and how fast that could be at best."""

import ctypes
import importlib.util
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from umd.errors import UserError
from umd.machine.gpus import sheet_flops

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h


def take_device(name: str, precision: str) -> tuple[torch.device, torch.dtype]:
    """`pick_device` and `pick_dtype` for a process that computes there from now on; whoever only looks calls those.

    A GPU becomes the process's current one, where Triton launches; and the process makes its fp32 products as
    `fp32_products` says.
    """
    device = pick_device(name)
    dtype = pick_dtype(precision, device)
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.set_float32_matmul_precision(fp32_products(device, dtype))
    return device, dtype


def fp32_products(device: torch.device, dtype: torch.dtype) -> str:
    """How products stay in fp32 beside autocast to `dtype`, in `torch.set_float32_matmul_precision`'s words: in TF32
    ("high") on a GPU in bf16, which is coarser anyway, else exact ("highest")."""
    return "high" if device.type == "cuda" and dtype == torch.bfloat16 else "highest"


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is the GPU of this process if there is one, else the CPU. Raises UserError for a device not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}; expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} is not here: torch sees {torch.cuda.device_count()} GPUs; use auto or cpu")
    return device


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on the device. To a GPU from pinned memory: from other memory the host would wait for the step before it."""
    if device.type == "cuda" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


@contextmanager
def beside(device: torch.device) -> Iterator[Callable]:
    """On a GPU the body is done on a stream of its own, while the step before still computes; what comes after waits
    for it. The body gives the tensors that it makes to the function it gets."""
    if device.type != "cuda":
        yield lambda *tensors: None
        return
    stream, current = copy_stream(device), torch.cuda.current_stream(device)

    def sent(*tensors: Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(current)  # their memory is not used again before that stream is through with it

    with torch.cuda.stream(stream):
        yield sent
    current.wait_stream(stream)


@lru_cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Autocast type: `auto` is bf16 where hardware multiplies it (Ampere GPUs, AMX or AVX512-BF16 CPUs), else fp32."""
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"unknown precision {precision!r}; expected auto, bf16 or fp32")
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(device) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def has_fast_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def apex_lacks() -> str:
    """What keeps NVIDIA's apex from being used; "" if nothing does.

    Told from its files alone: importing the package that PyPI calls apex would run what is not NVIDIA's.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "not installed"
    if not any(Path(folder, "optimizers").is_dir() for folder in spec.submodule_search_locations or ()):
        return "not NVIDIA's"  # but PyPI's package of that name
    return "" if importlib.util.find_spec("amp_C") else "without its CUDA extensions"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s that MFU is measured against: the data sheet's for a known GPU, else the best of a few large products."""
    known = device.type == "cuda" and dtype == torch.bfloat16
    if known and (flops := sheet_flops(torch.cuda.get_device_name(device))):
        return flops
    n = 8192 if device.type == "cuda" else 1024
    a = torch.ones(n, n, device=device, dtype=dtype)
    seconds = [seconds_of(lambda: a @ a, device) for _ in range(8)]
    return 2 * n**3 / statistics.median(sorted(seconds)[:4])


def seconds_of(call: Callable[[], object], device: torch.device | str) -> float:
    """Seconds of a call, until the device has done its work."""
    start = time.perf_counter()
    call()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by torch's allocator on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed: a training step on the CPU asks for the same gigabytes again, and a tenth of
    its time would go into page faults. Does nothing elsewhere than on Linux with glibc."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(M_TOP_PAD, 2**24)
    except (OSError, AttributeError):
        pass
