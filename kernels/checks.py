"""Checks of an op's arguments. The error names the argument, what was expected and what was given."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_tensor(name: str, x: Tensor, shape: Sequence[int | str], *dtypes: torch.dtype) -> None:
    """Check the shape and type of one tensor.

    Args:
        name: of the argument, for the message.
        x: the tensor.
        shape: sizes; a letter stands for any size.
        dtypes: allowed types; none: any floating type.

    Raises:
        ValueError: x has another shape or type.
    """
    fits = x.ndim == len(shape) and all(isinstance(n, str) or n == m for n, m in zip(shape, x.shape, strict=True))
    if not fits or not (x.dtype in dtypes if dtypes else x.is_floating_point()):
        types = " or ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes)) or "floating-point"
        got = f"{str(x.dtype).removeprefix('torch.')} {_brackets(x.shape)}"
        raise ValueError(f"{name}: expected {types} {_brackets(shape)}, got {got}")


def check_devices(**tensors: Tensor | None) -> None:
    """Check that all tensors are on the device of the first; None is skipped.

    Raises:
        ValueError: one is on another device.
    """
    (first, like), *others = ((name, x) for name, x in tensors.items() if x is not None)
    for name, x in others:
        if x.device != like.device:
            raise ValueError(f"{name}: expected on {like.device} like {first}, got {x.device}")


def _brackets(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
