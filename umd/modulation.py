"""How the condition becomes shift, scale and gate of every block: adaLN's projection, and two cheaper ones.

Each maps a condition [R, D] to tables: 6 of width D for each block, [R, 6·D], and 2 for the decoder's final norm,
[R, 2·D], the last. They start as zero. A table is made when it is asked for, just before its block: its weight's
gradient, of a third of the network's weights, is then there as soon as that block's backward is over, and an exchange
between ranks goes beside the rest of the pass.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umd import ops
from umd.config import ModelConfig
from umd.spans import span

Tables = Callable[[int], Tensor]  # of block i, or behind the last block of the final norm


class BlockModulation(nn.Linear):
    """One block's projection, in its parameters' own precision: R is small, and casting its weight would cost more
    than the product."""

    def forward(self, x: Tensor) -> Tensor:
        with span("adaLN"), torch.autocast(x.device.type, enabled=False):
            return ops.few_rows_linear(x, self.weight, self.bias)


class Modulation(nn.ModuleList):
    """A projection of a few conditions to the tables of each block: M·D² weights in all, M tables.

    One product for all blocks would read as many bytes, and save some 20 launches where hidden all-reduces save more.
    """

    def __init__(self, dim: int, widths: Sequence[int]):
        super().__init__(BlockModulation(dim, width) for width in widths)

    @property
    def offsets(self) -> list[Tensor]:
        """What each block's tables are for a condition of zeros: [6·D], the last [2·D]."""
        return [p for name, p in self.named_parameters() if name.endswith("bias")]

    def forward(self, x: Tensor) -> Tables:
        return lambda i: self[i](x)

    def zero(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class SingleModulation(nn.Module):
    """adaLN-single of PixArt-alpha (https://arxiv.org/abs/2310.00426): one block's projection for all, 6·D² weights,
    and offsets of each block's own. The final norm takes the shared shift and scale of the attention branch."""

    def __init__(self, dim: int, widths: Sequence[int]):
        super().__init__()
        self.widths = list(widths)
        self.weight = nn.Parameter(torch.empty(6 * dim, dim))
        self.bias = nn.Parameter(torch.empty(sum(widths)))  # the offsets

    @property
    def offsets(self) -> Sequence[Tensor]:
        return self.bias.split(self.widths)

    def forward(self, x: Tensor) -> Tables:
        shared = F.linear(x, self.weight)  # [R, 6·D]
        whole = torch.cat([shared.repeat(1, len(self.widths) - 1), shared[:, : self.widths[-1]]], dim=1) + self.bias
        return whole.split(self.widths, dim=1).__getitem__

    def zero(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class LowRankModulation(nn.Module):
    """The whole projection as a product of two, r·(1 + M)·D weights."""

    def __init__(self, dim: int, widths: Sequence[int], rank: int):
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = Modulation(rank, widths)

    @property
    def offsets(self) -> list[Tensor]:
        return self.up.offsets

    def forward(self, x: Tensor) -> Tables:
        return self.up(self.down(x))

    def zero(self) -> None:
        nn.init.normal_(self.down.weight, std=self.down.in_features**-0.5)
        self.up.zero()


def build_modulation(config: ModelConfig) -> Modulation | SingleModulation | LowRankModulation:
    D, widths = config.hidden_size, config.modulation_widths
    if config.adaLN_projection == "single":
        return SingleModulation(D, widths)
    if config.adaLN_projection == "low_rank":
        return LowRankModulation(D, widths, config.adaLN_rank)
    return Modulation(D, widths)
