"""Which device and type are used, and the peak that MFU is measured against."""

import pytest
import torch

from umd import ops
from umd.errors import UserError
from umd.machine.device import (
    autocast,
    fp32_products,
    has_fast_bf16,
    pick_device,
    pick_dtype,
    take_device,
)
from umd.machine.gpus import sheet_flops

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


def test_fp32_products_are_in_tf32_only_beside_bf16_on_a_gpu():
    gpu = torch.device("cuda")
    assert fp32_products(gpu, torch.bfloat16) == "high" and fp32_products(gpu, torch.float32) == "highest"
    assert fp32_products(CPU, torch.bfloat16) == "highest"


def test_a_cpu_is_taken_without_a_change_to_the_process():
    before = torch.get_float32_matmul_precision()
    assert take_device("cpu", "bf16") == (CPU, torch.bfloat16)
    assert torch.get_float32_matmul_precision() == before


@pytest.fixture
def gpu_as_before():
    device, precision = torch.cuda.current_device(), torch.get_float32_matmul_precision()
    yield
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision(precision)


@pytest.mark.gpu
def test_a_product_in_fp32_rounds_its_operands_only_beside_bf16(gpu_as_before):
    """1 + 2^-12 is a number of fp32 (23 bits) and none of TF32 (10 bits)."""
    for precision, exact in (("bf16", False), ("fp32", True)):
        device, _ = take_device("cuda", precision)
        a = torch.full((512, 512), 1 + 2**-12, device=device)
        assert torch.equal(a @ torch.eye(512, device=device), a) == exact


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_triton_launches_on_the_gpu_that_was_taken(gpu_as_before):
    device, _ = take_device("cuda:1", "fp32")
    assert torch.cuda.current_device() == 1
    x, packing = torch.randn(7, 64, device=device), ops.pack([3, 4], device=device)
    assert ops.use_triton(x)
    expected = torch.nn.functional.layer_norm(x, (64,), eps=1e-6)
    torch.testing.assert_close(ops.modulated_layer_norm(x, packing), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_makes_products_of_that_type(dtype):
    a = torch.ones(4, 4)
    with autocast(CPU, dtype):
        assert (a @ a).dtype == dtype
    assert (a @ a).dtype == torch.float32


def test_a_gpu_is_known_by_its_name_in_the_driver():
    """NVIDIA's data sheets, dense bf16; a name that holds another's is not taken for it."""
    known = {
        "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA GH200 480GB": 989e12, "NVIDIA A100-SXM4-40GB": 312e12,
        "NVIDIA L40S": 362e12, "NVIDIA L40": 181e12, "NVIDIA A40": 150e12, "Tesla T4": None, "NVIDIA H200": 989e12,
        "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H200 NVL": 835e12, "NVIDIA RTX A4000": None,
        "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA H100 80GB HBM3 MIG 3g.40gb": None,
        "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    }  # fmt: skip
    assert {name: sheet_flops(name) for name in known} == known
