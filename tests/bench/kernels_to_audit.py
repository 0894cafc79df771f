"""Small kernels whose bytes and instructions are known, for test_audit.py. Imported by name in other processes."""

import torch
import triton
import triton.language as tl


@triton.jit
def _copy(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i, i < n), i < n)


@triton.jit
def _every_eighth(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + 8 * i))


@triton.jit
def _scale(x_ptr, out_ptr, factor, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i) * factor)


@triton.jit
def _scale_constant(x_ptr, out_ptr, factor: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i) * factor)


@triton.jit
def _cumulative(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, x + tl.sum(x) + tl.max(x))  # x stays in registers meanwhile


@triton.jit
def _count(out_ptr, x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(out_ptr + i % 4, tl.load(x_ptr + i))


@triton.jit
def _layer_norm_modulate(x_ptr, scale_ptr, shift_ptr, y_ptr, mean_ptr, D: tl.constexpr, BLOCK: tl.constexpr):
    row, cols = tl.program_id(0), tl.arange(0, BLOCK)
    mask = cols < D
    x = tl.load(x_ptr + row * D + cols, mask, other=0.0).to(tl.float32)
    mean = tl.sum(x) / D
    centered = tl.where(mask, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered) / D + 1e-6)
    y = centered * rstd * (1 + tl.load(scale_ptr + cols, mask)) + tl.load(shift_ptr + cols, mask)
    tl.store(y_ptr + row * D + cols, y, mask)
    tl.store(mean_ptr + row, mean)


@triton.jit
def _assembly(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.inline_asm_elementwise("neg.f32 $0, $1;", "=f,f", [tl.load(x_ptr + i)], tl.float32, True, 1)
    tl.store(out_ptr + i, x)


def run(kernel, *tensors, grid=(1,), **options):
    kernel[grid](*tensors, **options)


def floats(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)
