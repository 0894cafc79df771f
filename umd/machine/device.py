"""The device and type that this machine computes with, its peak speed, and memory."""

import ctypes
import gc
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

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # constants of glibc's malloc.h


def take_device(name: str, precision: str) -> tuple[torch.device, torch.dtype]:
    """Choose device and autocast type (`pick_device`, `pick_dtype`), and set this process up to compute there.

    On CUDA, the chosen GPU becomes the current one, where Triton launches its kernels, and the precision of fp32
    products is set to `fp32_products`. To ask without changing the process, call the two functions directly.
    """
    device = pick_device(name)
    dtype = pick_dtype(precision, device)
    if device.type == "cuda":
        if device.index is not None:
            torch.cuda.set_device(device)
        torch.set_float32_matmul_precision(fp32_products(device, dtype))
    return device, dtype


def fp32_products(device: torch.device, dtype: torch.dtype) -> str:
    """Precision of the products that stay in fp32 under autocast, for `torch.set_float32_matmul_precision`.

    "high" (TF32) on a GPU with bf16 autocast, which is coarser anyway; else "highest" (exact fp32).
    """
    return "high" if device.type == "cuda" and dtype == torch.bfloat16 else "highest"


def pick_device(name: str = "auto") -> torch.device:
    """The named device: auto, cpu, cuda or cuda:N. auto: a GPU if there is one, else the CPU.

    Raises UserError for an unknown or missing device.
    """
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
    """Move x to the device. To a GPU it goes from pinned memory: else the host would wait for the step before."""
    if device.type == "cuda" and not x.is_pinned():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


@contextmanager
def beside(device: torch.device) -> Iterator[Callable]:
    """On a GPU run the body of a with block on a separate stream, while the previous step still computes.

    Work after the block waits for it. The block yields a function; call it with every tensor that the body makes, so
    that its memory is not reused too early.
    """
    if device.type != "cuda":
        yield lambda *tensors: None
        return
    stream, current = copy_stream(device), torch.cuda.current_stream(device)

    def sent(*tensors: Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None:
                tensor.record_stream(current)  # memory is not reused before this stream is done with it

    with torch.cuda.stream(stream):
        yield sent
    current.wait_stream(stream)


@lru_cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream for copies to this GPU; made once."""
    return torch.cuda.Stream(device)


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, run the block on a side stream, which a CUDA graph can record. DDP must be made on it too.

    The side stream waits for work queued before the block, and work queued after the block waits for the side stream.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        outer, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(outer)
        with torch.cuda.stream(stream):
            yield
        outer.wait_stream(stream)


@contextmanager
def recording() -> Iterator[torch.cuda.CUDAGraph]:
    """Record what the block launches on the current stream, a side stream, as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    collects = gc.isenabled()
    gc.collect()  # an earlier graph that Python's collector frees during the recording would break it
    gc.disable()
    try:
        # thread_local: other threads (NCCL's watchdog, the loader, saves) use CUDA meanwhile and would break a global
        # recording.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
            yield graph
    finally:
        if collects:
            gc.enable()


class Captured:
    """Calls a function `warmup` times as it is, then records it as a CUDA graph and replays that.

    It must be called on a side stream (`side_stream`), as the default stream cannot be recorded. The first calls, on
    the same stream, choose kernels and fill caches.
    """

    def __init__(self, warmup: int, what: str, instead: str):
        """what, instead: for the error if the recording fails: what could not be recorded, and what to do."""
        self.warmup, self.what, self.instead = warmup, what, instead
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def __call__(self, run: Callable[[], None]) -> None:
        """Do what `run` does. It must be the same function each time.

        It is not kept: held by the object whose method it is, this one would be freed only by Python's collector, and
        the graph's memory with it.

        Raises:
            UserError: `run` could not be recorded.
        """
        self.calls += 1
        if self.calls <= self.warmup:
            run()
            return
        if self.graph is None:
            try:
                with recording() as graph:
                    run()
            except RuntimeError as error:
                reason = str(error).splitlines()[0][:300]
                raise UserError(
                    f"{self.what} could not be recorded as a CUDA graph ({reason}); {self.instead}"
                ) from error
            self.graph = graph
        self.graph.replay()


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The autocast type for a precision: auto, bf16 or fp32.

    auto: bf16 if the hardware multiplies it (GPUs from Ampere on, CPUs with AMX or AVX512-BF16), else fp32.
    Raises UserError for an unknown precision.
    """
    if precision not in ("auto", "bf16", "fp32"):
        raise UserError(f"unknown precision {precision!r}; expected auto, bf16 or fp32")
    if precision == "auto":
        precision = "bf16" if has_fast_bf16(device) else "fp32"
    return torch.bfloat16 if precision == "bf16" else torch.float32


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16: a GPU from Ampere on, or a CPU with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Autocast to bf16 if dtype is bf16; else a context that does nothing."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


def apex_lacks() -> str:
    """Why NVIDIA's apex cannot be used; "" if it can.

    Only files are looked at. Importing would be unsafe, because PyPI's package "apex" is not NVIDIA's.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "not installed"
    if not any(Path(folder, "optimizers").is_dir() for folder in spec.submodule_search_locations or ()):
        return "not NVIDIA's"  # PyPI's package of the same name
    return "" if importlib.util.find_spec("amp_C") else "without its CUDA extensions"


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Peak FLOP/s, to which MFU refers.

    For bf16 on a known GPU it is the data sheet's number. Otherwise large matrix products are timed: the median of the
    fastest 4 of 8.
    """
    known = device.type == "cuda" and dtype == torch.bfloat16
    if known and (flops := sheet_flops(torch.cuda.get_device_name(device))):
        return flops
    n = 8192 if device.type == "cuda" else 512
    a = torch.ones(n, n, device=device, dtype=dtype)
    seconds = [seconds_of(lambda: a @ a, device) for _ in range(8)]
    return 2 * n**3 / statistics.median(sorted(seconds)[:4])


def seconds_of(call: Callable[[], object], device: torch.device | str) -> float:
    """Seconds that a call takes, including its work on the device."""
    start = time.perf_counter()
    call()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_memory(device: torch.device) -> int:
    """Peak memory so far, in bytes: of torch's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory.

    A training step on the CPU allocates the same gigabytes again and again; page faults would take a tenth of its time.
    Does nothing without glibc.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(M_TOP_PAD, 2**24)
    except (OSError, AttributeError):
        pass
