"""LayerNorm or RMSNorm with adaLN modulation on a packed stream, alone or after a gated residual.

    modulated_layer_norm       y = LN(x)·(1 + scale) + shift
    gated_residual_layer_norm  r = x + gate·h,  y = LN(r)·(1 + scale) + shift

`scale`, `shift` and `gate` are tables `[R, D]` (usually strided views of one projection). Sample s uses row
`packing.cond_index[s]`. LN's own affine `weight`, `bias` `[D]` is optional:

    (x̂·w + b)·(1 + scale) + shift = x̂·[w·(1 + scale)] + [b·(1 + scale) + shift]

It is folded into the tables. They have few rows, so the affine costs nothing on the stream.

With `rms`, RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467) replaces LN: x̂ = x·rsqrt(mean(x²) + eps), without
subtracting a mean. The residual stream (x, r) may be fp32 while the branch h and the result y have 16 bits. No sum on
the stream is then rounded to 16 bits.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backend import products_dtype, use_triton
from .checks import check_devices, check_tensor
from .cpu.adaln import CompiledLayerNormFunction, GatedResidualLayerNormFunction, ModulatedLayerNormFunction
from .cpu.compiled import use_compiled
from .linear import bias_gradient
from .packing import Packing, equal_lengths, per_token
from .triton.adaln import layer_norm_fwd


def modulated_layer_norm_ref(
    x: Tensor,
    packing: Packing,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The definition of `modulated_layer_norm` in plain PyTorch, computed in fp32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    if rms:
        y = F.rms_norm(x.to(wide), x.shape[-1:], weight, eps)
        y = y if bias is None else y + bias
    else:
        y = F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps)
    if scale is not None:
        y = y * (1 + per_token(scale.to(wide), packing))
    if shift is not None:
        y = y + per_token(shift.to(wide), packing)
    return y.to(dtype or x.dtype)


def gated_residual_layer_norm_ref(
    x: Tensor,
    h: Tensor,
    packing: Packing,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    h_bias: Tensor | None = None,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """The definition of `gated_residual_layer_norm` in plain PyTorch, computed in fp32 or wider.

    r is rounded to x's type before the norm.
    """
    wide, h_dtype = torch.promote_types(x.dtype, torch.float32), h.dtype
    h = h.to(wide) if h_bias is None else h.to(wide) + (h_bias - h_bias.detach()).to(wide)
    branch = h if gate is None else h * per_token(gate, packing)
    r = (x.to(wide) + branch).to(x.dtype)
    return r, modulated_layer_norm_ref(r, packing, shift, scale, weight, bias, eps, rms, h_dtype)


def _fold(
    x: Tensor, shift: Tensor | None, scale: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Fold LN's affine and the modulation into one affine x̂·alpha + beta, each [R, D] in fp32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    alpha = torch.ones(1, x.shape[-1], dtype=wide, device=x.device) if scale is None else 1 + scale.to(wide)
    beta = torch.zeros_like(alpha) if shift is None else shift.to(wide)
    if bias is not None:
        beta = torch.addcmul(beta, alpha, bias.to(wide))
    if weight is not None:
        alpha = alpha * weight.to(wide)
    return tuple(torch.broadcast_tensors(alpha, beta))


def modulated_layer_norm(
    x: Tensor,
    packing: Packing | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute LN(x)·(1 + scale) + shift on a packed stream, or on samples of equal length.

    Args:
        x: [N, D], bf16, fp16, fp32 or fp64; without a packing [B, L, D].
        packing: lengths and modulation rows of the samples in `x`. None: x is [B, L, D], tables are [B, D], and row s
            belongs to sample s.
        shift, scale: [R, D] or None; any strides. Row `packing.cond_index[s]` belongs to sample s.
        weight, bias: [D] or None, LayerNorm's own affine.
        eps: added to the variance; with `rms`, to the mean of squares.
        rms: use RMSNorm instead of LayerNorm.
        dtype: type of the result. Default: x's type. If x is fp32, it may be bf16 or fp16.

    Returns:
        y in x's shape and in `dtype`. Differentiable in every tensor argument.

    Raises:
        ValueError: a width other than D, a table with too few rows, an x whose length is not the packing's, or a
            `dtype` that does not fit x's.
    """
    if packing is None:
        packing = _dense(x)
        y = modulated_layer_norm(x.flatten(0, 1), packing, shift, scale, weight, bias, eps, rms, dtype)
        return y.view(x.shape)
    dtype = dtype or x.dtype
    _check(x, packing, dtype, shift=shift, scale=scale, weight=weight, bias=bias)
    if dtype not in _narrower(x):
        raise ValueError(f"dtype: expected {_names(_narrower(x))} for x in {_names([x.dtype])}, got {_names([dtype])}")
    if use_triton(x):
        work = packing.chunks, packing.row_chunks
        return layer_norm_fwd(x, None, None, shift, scale, weight, bias, None, *work, eps, rms, dtype)[1]
    if rms or x.device.type != "cpu":  # the CPU paths work segment by segment; on a GPU each would be a launch
        return modulated_layer_norm_ref(x, packing, shift, scale, weight, bias, eps, rms, dtype)
    alpha, beta = _fold(x, shift, scale, weight, bias)
    if use_compiled(x):
        return CompiledLayerNormFunction.apply(x, None, None, alpha, beta, packing, eps)[1]
    return ModulatedLayerNormFunction.apply(x, alpha, beta, packing, eps).to(dtype)


def gated_residual_layer_norm(
    x: Tensor,
    h: Tensor,
    packing: Packing | None = None,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    h_bias: Tensor | None = None,
    rms: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute r = x + gate·h and y = LN(r)·(1 + scale) + shift, in one pass over x and h.

    Args:
        x: [N, D], the residual stream; without a packing [B, L, D].
        h: the branch to add, in x's shape and type; if x is fp32, h may be bf16 or fp16.
        gate: [R, D] or None (1); any strides.
        packing, shift, scale, weight, bias, eps: as in `modulated_layer_norm`.
        h_bias: [D] or None, the bias of the layer that made h. h already includes it, so it changes no value here. It
            only receives its gradient, the sum of h's gradient over all tokens. Elsewhere that sum would cost a pass of
            its own over the stream.
        rms: use RMSNorm instead of LayerNorm.

    Returns:
        (r, y): r in x's type, y in h's type, both in x's shape.

    Raises:
        ValueError: as in `modulated_layer_norm`, or an h whose shape is not x's or whose type does not fit x's.
    """
    tables = dict(gate=gate, shift=shift, scale=scale, weight=weight, bias=bias, h_bias=h_bias)
    if packing is None:
        packing = _dense(x)
        check_tensor("h", h, x.shape, *_narrower(x))
        r, y = gated_residual_layer_norm(x.flatten(0, 1), h.flatten(0, 1), packing, **tables, eps=eps, rms=rms)
        return r.view(x.shape), y.view(x.shape)
    _check(x, packing, h.dtype, **tables)
    check_tensor("h", h, x.shape, *_narrower(x))
    check_devices(x=x, h=h)
    if use_triton(x):
        work = packing.chunks, packing.row_chunks
        return layer_norm_fwd(x, h, gate, shift, scale, weight, bias, h_bias, *work, eps, rms, h.dtype)[:2]
    if rms or x.device.type != "cpu":
        return gated_residual_layer_norm_ref(x, h, packing, gate, shift, scale, weight, bias, eps, h_bias, rms)
    if h.dtype != x.dtype:
        r, y = gated_residual_layer_norm(x, h.to(x.dtype), packing, gate, shift, scale, weight, bias, eps, h_bias)
        return r, y.to(h.dtype)
    h = bias_gradient(h, h_bias)
    if gate is None:
        r = x + h
        return r, modulated_layer_norm(r, packing, shift, scale, weight, bias, eps)
    alpha, beta = _fold(x, shift, scale, weight, bias)
    rows = max(len(gate), len(alpha))
    alpha, beta = alpha.expand(rows, -1), beta.expand(rows, -1)
    if use_compiled(x):
        return CompiledLayerNormFunction.apply(x, h, gate.float().expand(rows, -1), alpha, beta, packing, eps)
    return GatedResidualLayerNormFunction.apply(x, h, gate.to(x.dtype).expand(rows, -1), alpha, beta, packing, eps)


class AdaLayerNorm(nn.Module):
    """Both ops as a module, for blocks on [B, L, D] or on packed streams.

    Args:
        dim: width D.
        affine: give the norm its own weight and, unless `rms`, a bias. DiT's norms have neither.
        eps, rms: as in `modulated_layer_norm`.
    """

    def __init__(self, dim: int, affine: bool = False, eps: float = 1e-6, rms: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine and not rms else None
        self.eps, self.rms = eps, rms

    def forward(
        self,
        x: Tensor,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        h: Tensor | None = None,
        gate: Tensor | None = None,
        packing: Packing | None = None,
    ):
        """Return y = LN(x)·(1 + scale) + shift. With a branch h, return (r, y) with r = x + gate·h and y = LN(r)·…

        Shapes and types are those of the ops. Without h, an fp32 x under autocast gives y in autocast's type, to which
        the next linear layer would cast it anyway.
        """
        own = self.weight, self.bias, self.eps
        if h is None:
            if gate is not None:
                raise ValueError("gate: expected None without a branch h, got a table")
            return modulated_layer_norm(x, packing, shift, scale, *own, rms=self.rms, dtype=products_dtype(x))
        return gated_residual_layer_norm(x, h, packing, gate, shift, scale, *own, rms=self.rms)


def _dense(x: Tensor) -> Packing:
    """The packing of x [B, L, D]: B samples of length L, each with its own modulation row."""
    check_tensor("x", x, ("B", "L", "D"))
    if x.shape[0] == 0:
        raise ValueError(f"x: expected a sample at least, got {list(x.shape)}")
    return equal_lengths(x.shape[0], x.shape[1], x.device)


def _narrower(x: Tensor) -> tuple[torch.dtype, ...]:
    """The types that h and y may have with x's type."""
    return (x.dtype, torch.bfloat16, torch.float16) if x.dtype == torch.float32 else (x.dtype,)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _check(x: Tensor, packing: Packing, dtype: torch.dtype, **tables: Tensor | None) -> None:
    """Raise ValueError if x [N, D] or one of the tables does not fit. dtype: the type of y."""
    check_tensor("x", x, (packing.num_tokens, "D"))
    types = dict.fromkeys((*_narrower(x), dtype, torch.float32))
    rows = None
    for name, table in tables.items():
        if table is None:
            continue
        of_rows = name in ("gate", "shift", "scale")
        check_tensor(name, table, ("R", x.shape[1]) if of_rows else (x.shape[1],), *types)
        if of_rows and len(table) < packing.num_rows:
            raise ValueError(f"{name}: expected {packing.num_rows} rows or more as the packing says, got {len(table)}")
        if of_rows and len(table) != (rows := rows or len(table)):
            raise ValueError(f"{name}: expected {rows} rows like the tables before it, got {len(table)}")
    check_devices(x=x, packing=packing.cu_seqlens, **tables)
