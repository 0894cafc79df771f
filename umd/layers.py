"""Linear layers of the network. The op after a layer may compute the layer's bias gradient."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from umd import ops
from umd.config import ViTConfig
from umd.machine.device import autocast


def to_residual(x: Tensor, config: ViTConfig) -> Tensor:
    """Cast x to the type of the residual stream: at least fp32 if `config.residual_in_fp32`."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if config.residual_in_fp32 else x


class Linear(nn.Linear):
    """A linear layer that runs `ops.linear`."""

    cast: tuple[Tensor, Tensor] | None = None  # weight and bias in bf16, lent by `CastWeights`
    splits = True  # False under ZeRO 3, where a parameter exists only while its own layer runs

    def forward(self, x: Tensor) -> Tensor:
        """x [N, I] to [N, O]."""
        return ops.linear(x, self.weight, self.bias, self.cast)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(y, bias): y is what `forward` returns, with the bias added.

        If `bias` is not None, pass it with y to the next op: that op computes the bias gradient, the column sum of y's
        gradient, which it reads anyway.
        """
        if not (self.splits and ops.splits_bias(x)):
            return self(x), None
        return ops.linear(x, self.weight, self.bias.detach(), self.cast), self.bias

    def with_gelu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(y, gelu(y)). Pass both to `GeluLinear.split`, which gives y its gradient. Not under ZeRO 3."""
        return ops.linear_gelu(x, self.weight, self.bias, self.cast)


class GeluLinear(Linear):
    """The second layer of an MLP, with GELU before it."""

    recompute = False  # recompute the activation in the backward pass instead of saving it

    def forward(self, x: Tensor, x_bias: Tensor | None = None) -> Tensor:
        """gelu(x) [N, I] to [N, O]. x_bias: as in `split`."""
        return ops.gelu_linear(x, self.weight, self.bias, self.cast, x_bias, self.recompute)

    def split(
        self, x: Tensor, x_bias: Tensor | None = None, gelu: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `Linear.split`, for gelu(x).

        x_bias: bias of the layer that made x, if it still needs its gradient. gelu: gelu(x), if `with_gelu` made both.
        """
        if gelu is not None:
            splits = self.splits and ops.splits_bias(x)
            bias = self.bias.detach() if splits else self.bias
            return ops.activated_linear(x, gelu, self.weight, bias, self.cast), self.bias if splits else None
        if not (self.splits and ops.splits_bias(x)):
            return self(x, x_bias), None
        return ops.gelu_linear(x, self.weight, self.bias.detach(), self.cast, x_bias, self.recompute), self.bias


def set_recompute_gelu(network: nn.Module, on: bool) -> None:
    """Set whether the MLPs of a network recompute GELU's output in the backward pass (see `ops.gelu_linear`)."""
    for module in network.modules():
        if isinstance(module, GeluLinear):
            module.recompute = on


class CastWeights:
    """Copies of a network's linear weights and biases in a narrower dtype, made by one call.

    Autocast would make the copies one by one, in every pass, and cast each gradient back separately.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        self.layers = [module for module in network.modules() if isinstance(module, Linear)]
        self.weights = [p for layer in self.layers for p in (layer.weight, layer.bias)]
        self.copies = [torch.empty_like(p, dtype=dtype, requires_grad=False) for p in self.weights]

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights as they are now."""
        torch._foreach_copy_(self.copies, self.weights)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Let the layers use the copies until the block ends."""
        for layer, weight, bias in zip(self.layers, self.copies[::2], self.copies[1::2], strict=True):
            layer.cast = weight, bias
        try:
            yield
        finally:
            for layer in self.layers:
                layer.cast = None


def casts_weights(network: nn.Module, dtype: torch.dtype) -> bool:
    """Whether layers that compute in `dtype` need casts of their weights. The CPU's own layers make them themselves."""
    weight = next(network.parameters())
    return dtype != torch.float32 and weight.dtype == torch.float32 and not ops.use_cpu_path(weight)


def computing_in(network: nn.Module, dtype: torch.dtype) -> Callable[[], AbstractContextManager]:
    """A function that makes a context for calls of a network with fixed weights.

    The context is autocast, with the linear layers' weights cast once, here. Autocast alone would cast them in every
    context, to the same bits. Memory: a copy of these weights in `dtype`.
    """
    plain = partial(autocast, next(network.parameters()).device, dtype)
    if not casts_weights(network, dtype):
        return plain
    cast = CastWeights(network, dtype)
    cast.refresh()

    @contextmanager
    def context() -> Iterator[None]:
        with plain(), cast.used():
            yield

    return context
