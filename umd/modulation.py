"""How the condition becomes shift, scale and gate of every block: adaLN's projection, and two cheaper ones.

Each projection maps a condition [R, D] to tables. A block has 6 tables side by side, [R, 6·D]; the last final norm has
2, [R, 2·D]. All tables start as zero.

A block's tables are computed just before the block runs. The gradient of their weights, a third of the network's, is
then complete as soon as that block's backward is, and its all-reduce overlaps with the rest of the backward pass.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umd import ops
from umd.config import ModelConfig
from umd.spans import span

BlockTables = Callable[[int], Tensor]  # i to the tables of block i; after the last block, those of the final norm


class BlockModulation(nn.Linear):
    """One block's projection, computed in the precision of its parameters, also under autocast.

    R is small: casting the weight would cost more than the product.
    """

    def forward(self, x: Tensor) -> Tensor:
        with span("adaLN"), torch.autocast(x.device.type, enabled=False):
            return ops.few_rows_linear(x, self.weight, self.bias)


class Modulation(nn.ModuleList):
    """adaLN as published: each block has its own projection. M tables need M·D² weights in all.

    One product for all blocks would read the same bytes. It would save some 20 launches, but separate products save
    more by hiding all-reduces.
    """

    def __init__(self, dim: int, widths: Sequence[int]):
        super().__init__(BlockModulation(dim, width) for width in widths)

    @property
    def offsets(self) -> list[Tensor]:
        """Each block's tables for a condition of zeros: [6·D]; for the last final norm [2·D]."""
        return [p for name, p in self.named_parameters() if name.endswith("bias")]

    def forward(self, x: Tensor) -> BlockTables:
        """Tables of conditions x [R, D]; block i's are computed when they are asked for."""
        return lambda i: self[i](x)

    def zero(self) -> None:
        for parameter in self.parameters():
            nn.init.zeros_(parameter)


class SingleModulation(nn.Module):
    """adaLN-single of PixArt-alpha (https://arxiv.org/abs/2310.00426).

    All blocks share one projection of 6·D² weights, and each block adds its own offsets. The final norm uses the shared
    shift and scale of the attention branch.
    """

    def __init__(self, dim: int, widths: Sequence[int]):
        super().__init__()
        self.widths = list(widths)
        self.weight = nn.Parameter(torch.empty(6 * dim, dim))
        self.bias = nn.Parameter(torch.empty(sum(widths)))  # the offsets

    @property
    def offsets(self) -> Sequence[Tensor]:
        return self.bias.split(self.widths)

    def forward(self, x: Tensor) -> BlockTables:
        """Tables of conditions x [R, D], all computed at once."""
        shared = F.linear(x, self.weight)  # [R, 6·D]
        whole = torch.cat([shared.repeat(1, len(self.widths) - 1), shared[:, : self.widths[-1]]], dim=1) + self.bias
        return whole.split(self.widths, dim=1).__getitem__

    def zero(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class LowRankModulation(nn.Module):
    """adaLN with all projections factored through one matrix of rank r: r·(1 + M)·D weights."""

    def __init__(self, dim: int, widths: Sequence[int], rank: int):
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = Modulation(rank, widths)

    @property
    def offsets(self) -> list[Tensor]:
        return self.up.offsets

    def forward(self, x: Tensor) -> BlockTables:
        """Tables of conditions x [R, D]; block i's are computed when they are asked for."""
        return self.up(self.down(x))

    def zero(self) -> None:
        nn.init.normal_(self.down.weight, std=self.down.in_features**-0.5)
        self.up.zero()


def build_modulation(config: ModelConfig) -> Modulation | SingleModulation | LowRankModulation:
    """The projection that `config.adaLN_projection` names."""
    D, widths = config.hidden_size, config.modulation_widths
    if config.adaLN_projection == "single":
        return SingleModulation(D, widths)
    if config.adaLN_projection == "low_rank":
        return LowRankModulation(D, widths, config.adaLN_rank)
    return Modulation(D, widths)
