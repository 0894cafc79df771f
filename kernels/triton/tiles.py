"""Load and store one row [D] in a kernel whose tiles have several rows.

A masked tile gives wide memory accesses; a row alone would get accesses of 32 bits.
"""

from ..backend import tl, triton


@triton.jit
def store_row(ptr, value, cols, D: tl.constexpr, ROWS: tl.constexpr):
    """Store value [BLOCK_D] in columns cols < D, as a tile [ROWS, BLOCK_D] of which only the first row is unmasked."""
    mask = (tl.arange(0, ROWS) == 0)[:, None] & (cols < D)[None, :]
    tile = tl.broadcast_to(value[None, :], mask.shape)
    tl.store(ptr + tl.broadcast_to(cols[None, :], mask.shape), tile.to(ptr.dtype.element_ty), mask)


@triton.jit
def load_row(ptr, cols, D: tl.constexpr, ROWS: tl.constexpr):
    """Load [BLOCK_D] in fp32, 0 from column D on."""
    mask = (tl.arange(0, ROWS) == 0)[:, None] & (cols < D)[None, :]
    return tl.sum(tl.load(ptr + tl.broadcast_to(cols[None, :], mask.shape), mask, other=0.0).to(tl.float32), 0)
