"""What an op says of an argument that does not fit: its name, what was expected, what came."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_tensor(name: str, x: Tensor, shape: Sequence[int | str], *dtypes: torch.dtype) -> None:
    """shape: sizes, or a letter where any will do. dtypes: those an op takes; none stands for any floating type.

    Raises:
        ValueError: another shape or type.
    """
    fits = x.ndim == len(shape) and all(isinstance(n, str) or n == m for n, m in zip(shape, x.shape, strict=True))
    if not fits or not (x.dtype in dtypes if dtypes else x.is_floating_point()):
        types = " or ".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys(dtypes)) or "floating-point"
        got = f"{str(x.dtype).removeprefix('torch.')} {_brackets(x.shape)}"
        raise ValueError(f"{name}: expected {types} {_brackets(shape)}, got {got}")


def check_devices(**tensors: Tensor | None) -> None:
    """All on the device of the first.

    Raises:
        ValueError: one on another device.
    """
    (first, like), *others = ((name, x) for name, x in tensors.items() if x is not None)
    for name, x in others:
        if x.device != like.device:
            raise ValueError(f"{name}: expected on {like.device} like {first}, got {x.device}")


def _brackets(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"
