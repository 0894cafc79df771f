"""column_sum: x.sum(0) of a stream [N, F], such as a bias's gradient."""

import torch
from torch import Tensor

from .backend import use_triton
from .checks import check_tensor
from .triton.column_sum import column_sum_fwd


def column_sum_ref(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The definition of `column_sum`."""
    return x.detach().sum(0, dtype=torch.promote_types(x.dtype, torch.float32)).to(dtype)


def column_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum of the rows of x [N, F], any floating type, added up in fp32: [F] in `dtype`. Not differentiable.

    Raises:
        ValueError: x of another shape or type.
    """
    check_tensor("x", x, ("N", "F"))
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point type, got {dtype}")
    return column_sum_fwd(x.detach(), dtype) if use_triton(x) else column_sum_ref(x, dtype)
