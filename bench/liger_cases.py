"""liger-kernel's norms as cases to compare with ours: LayerNorm, and RMSNorm with adaLN modulation."""

import torch.nn.functional as F

from umd.bench.op_cases import Inputs, OpCase, Side
from umd.train.step_counts import tensor_bytes


def layer_norm(i: Inputs) -> OpCase:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    x, weight, bias = i.randn(i.tokens, i.D), i.randn(i.D), i.randn(i.D)
    inputs = (x, weight, bias)
    return OpCase(
        "liger layer_norm",
        i.dtype,
        Side(lambda: (LigerLayerNormFunction.apply(*inputs, 1e-6),), inputs),
        Side(lambda: (F.layer_norm(x, (i.D,), weight, bias, 1e-6),), inputs),
        forward_bytes=tensor_bytes(x, *inputs),
        backward_bytes=tensor_bytes(x, x, weight, *inputs),
    )


def modulated_rms_norm(i: Inputs) -> OpCase:
    from liger_kernel.ops.modulated_rms_norm import LigerModulatedRMSNormFunction

    x, weight = i.randn(i.samples, i.tokens // i.samples, i.D), i.randn(i.D)
    scale, shift = i.randn(i.samples, i.D), i.randn(i.samples, i.D)
    inputs = (x, weight, scale, shift)
    return OpCase(
        "liger modulated_rms_norm",
        i.dtype,
        Side(lambda: (LigerModulatedRMSNormFunction.apply(*inputs, 1e-6, 0.0, "llama", False),), inputs),
        None,  # torch's RMSNorm is one op on a GPU but several on a CPU, so bytes counted here are not the GPU's
        forward_bytes=tensor_bytes(x, *inputs),
        backward_bytes=tensor_bytes(x, x, weight, scale, *inputs),
    )


CASES = {"liger layer_norm": layer_norm, "liger modulated_rms_norm": modulated_rms_norm}
