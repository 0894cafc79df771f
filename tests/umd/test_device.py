"""Which device and type are used, and the peak that MFU is measured against."""

import time

import pytest
import torch

from umd.device import autocast, has_fast_bf16, keep_freed_memory, peak_flops, pick_device, pick_dtype
from umd.errors import UserError

CPU = torch.device("cpu")


def test_auto_is_the_gpu_where_there_is_one():
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu") == CPU


@pytest.mark.parametrize("name", ["gpu", "", "mps", "meta", "cpu:x", "cuda:"])
def test_what_is_no_device_of_ours_is_refused(name):
    with pytest.raises(UserError, match="expected auto, cpu, cuda or cuda:N"):
        pick_device(name)


def test_a_gpu_that_is_not_here_is_refused():
    with pytest.raises(UserError, match=f"torch sees {torch.cuda.device_count()} GPUs"):
        pick_device("cuda:99")


def test_precision():
    assert pick_dtype("fp32", CPU) == torch.float32 and pick_dtype("bf16", CPU) == torch.bfloat16
    assert pick_dtype("auto", CPU) == (torch.bfloat16 if has_fast_bf16(CPU) else torch.float32)
    with pytest.raises(UserError, match="'fp16'; expected auto, bf16 or fp32"):
        pick_dtype("fp16", CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_makes_products_of_that_type(dtype):
    a = torch.ones(4, 4)
    with autocast(CPU, dtype):
        assert (a @ a).dtype == dtype
    assert (a @ a).dtype == torch.float32


def test_the_peak_is_that_of_large_products():
    """What a large product reaches here lies within a factor of the number given (the machine may be busy)."""
    n = 1024
    a = torch.ones(n, n)
    best = min(_seconds(a) for _ in range(5))
    assert 0.1 < peak_flops(CPU, torch.float32) * best / (2 * n**3) < 10


def _seconds(a: torch.Tensor) -> float:
    start = time.perf_counter()
    a @ a
    return time.perf_counter() - start


def test_keeping_freed_memory_changes_no_result():
    keep_freed_memory()
    keep_freed_memory()  # any number of times
    assert torch.ones(1 << 22).sum() == 1 << 22
