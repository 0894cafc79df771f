"""column_sum: x.sum(0) of a stream [N, F], e.g. the gradient of a bias."""

import torch
from torch import Tensor

from .backend import use_triton
from .checks import check_tensor
from .triton.column_sum import column_sum_fwd


def column_sum_ref(x: Tensor, dtype: torch.dtype, zeros: tuple[int, int] = (0, 0)) -> Tensor:
    """The definition of `column_sum`."""
    total = x.detach().sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).to(dtype)
    total[slice(*zeros)] = 0
    return total


def column_sum(x: Tensor, dtype: torch.dtype, zeros: tuple[int, int] = (0, 0)) -> Tensor:
    """Sum the rows of x [N, F], any floating type, in fp32 (fp64 for fp64): [F] in `dtype`. Not differentiable.

    zeros: columns zeros[0] : zeros[1] get the sum 0 and need not be read.

    Raises:
        ValueError: x has another shape or type, dtype is not floating-point, or zeros lie outside 0 : F.
    """
    check_tensor("x", x, ("N", "F"))
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point type, got {dtype}")
    if not 0 <= zeros[0] <= zeros[1] <= x.shape[1]:
        raise ValueError(f"zeros: expected a range within 0 : {x.shape[1]}, got {zeros[0]} : {zeros[1]}")
    return column_sum_fwd(x.detach(), dtype, *zeros) if use_triton(x) else column_sum_ref(x, dtype, zeros)
