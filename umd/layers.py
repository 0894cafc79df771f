"""Linear layers of the network, whose bias gradients may be made by the op that comes next, and types beside them."""

import torch
from torch import Tensor, nn

from umd import ops
from umd.config import ViTConfig


def residual(x: Tensor, config: ViTConfig) -> Tensor:
    """x in the type of the residual stream that starts with it."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if config.residual_in_fp32 else x


class Linear(nn.Linear):
    cast: tuple[Tensor, Tensor] | None = None  # weight and bias in bf16, while a training step runs (train/step.py)
    splits = True  # False under ZeRO 3, where a parameter is there only while its own layer runs

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias, self.cast)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(y, bias): y as `forward` returns it. The bias, if not None, has yet to get its gradient, the column sum of
        y's: from the op that takes y, which reads y's gradient anyway."""
        if not (self.splits and ops.splits_bias(x)):
            return Linear.forward(self, x), None
        return ops.linear(x, self.weight, self.bias.detach(), self.cast), self.bias

    def with_gelu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(y, gelu(y)), for `GeluLinear.split`, which hands y its gradient."""
        return ops.linear_gelu(x, self.weight, self.bias, self.cast)


class GeluLinear(Linear):
    """The second layer of an MLP with the activation before it."""

    recompute = False  # the activation in the backward pass, instead of keeping it

    def forward(self, x: Tensor, x_bias: Tensor | None = None) -> Tensor:
        return ops.gelu_linear(x, self.weight, self.bias, self.cast, x_bias, self.recompute)

    def split(
        self, x: Tensor, x_bias: Tensor | None = None, gelu: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `Linear.split`. x_bias: of the layer that made x, if it has yet to get its gradient. gelu: gelu(x), where
        `with_gelu` made both."""
        if gelu is not None:
            splits = self.splits and ops.splits_bias(x)
            bias = self.bias.detach() if splits else self.bias
            return ops.activated_linear(x, gelu, self.weight, bias, self.cast), self.bias if splits else None
        if not (self.splits and ops.splits_bias(x)):
            return self(x, x_bias), None
        return ops.gelu_linear(x, self.weight, self.bias.detach(), self.cast, x_bias, self.recompute), self.bias


def set_recompute_gelu(network: nn.Module, on: bool) -> None:
    """Whether its MLPs make GELU's output again in the backward pass (`ops.gelu_linear`)."""
    for module in network.modules():
        if isinstance(module, GeluLinear):
            module.recompute = on
