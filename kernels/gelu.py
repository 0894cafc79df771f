"""gelu: GELU in its tanh form. Its backward pass also sums the gradient of the bias that was added before it.

With u = √(2/π)·(h + 0.044715·h³) and s = (1 + tanh u)/2,

    gelu(h) = h·s        gelu'(h) = s·(1 + h·(1 - s)·2u')        dbias = Σ dy·gelu'(h)   (over the rows)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import use_triton
from .checks import check_devices, check_tensor
from .triton.gelu import gelu_fwd


def gelu_ref(h: Tensor, bias: Tensor | None = None) -> Tensor:
    """The definition of `gelu`."""
    if bias is not None:
        h = h + (bias - bias.detach()).to(h.dtype)  # adds 0 to h; h's gradient also flows to the bias
    return F.gelu(h, approximate="tanh")


def gelu(h: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU in its tanh form, computed in fp32.

    Args:
        h: [N, F], any floating type; the output of a linear layer, its bias already added.
        bias: [F] in h's type or fp32, or None. The bias of that layer, passed only to receive its gradient here, the
            column sum of dh. The layer itself then gets the bias detached.

    Returns:
        [N, F] in h's type. Differentiable in h and bias.

    Raises:
        ValueError: a shape, type or device does not fit.
    """
    check_gelu(h, bias)
    return gelu_fwd(h, bias) if use_triton(h) else gelu_ref(h, bias)


def check_gelu(h: Tensor, bias: Tensor | None) -> None:
    check_tensor("h", h, ("N", "F"))
    if bias is not None:
        check_tensor("bias", bias, h.shape[1:], h.dtype, torch.float32)
        check_devices(h=h, bias=bias)
