"""How the condition becomes shift, scale and gate of every block: adaLN's projection, and two cheaper ones.

Each maps [R, D] to [R, M·D], M = 6 tables a block and 2 for the decoder's final norm, and starts as zero.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umd import ops
from umd.config import ModelConfig


class Modulation(nn.Linear):
    """One projection of a few conditions to the tables of every block: M·D² weights."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.few_rows_linear(x, self.weight, self.bias)

    def zero(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class SingleModulation(nn.Module):
    """adaLN-single of PixArt-alpha (https://arxiv.org/abs/2310.00426): one block's projection for all, 6·D² weights,
    and offsets of each block's own. The final norm takes the shared shift and scale of the attention branch."""

    def __init__(self, dim: int, num_modulations: int):
        super().__init__()
        self.blocks = num_modulations // 6
        self.weight = nn.Parameter(torch.empty(6 * dim, dim))
        self.bias = nn.Parameter(torch.empty(num_modulations * dim))  # the offsets

    def forward(self, x: Tensor) -> Tensor:
        shared = F.linear(x, self.weight)  # [R, 6·D]
        return torch.cat([shared.repeat(1, self.blocks), shared[:, : 2 * x.shape[1]]], dim=1) + self.bias

    def zero(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class LowRankModulation(nn.Module):
    """The whole projection as a product of two, r·(1 + M)·D weights."""

    def __init__(self, dim: int, num_modulations: int, rank: int):
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = Modulation(rank, num_modulations * dim)

    @property
    def bias(self) -> Tensor:
        return self.up.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x))

    def zero(self) -> None:
        nn.init.normal_(self.down.weight, std=self.down.in_features**-0.5)
        self.up.zero()


def build_modulation(config: ModelConfig) -> Modulation | SingleModulation | LowRankModulation:
    D, M = config.hidden_size, config.num_modulations
    if config.adaLN_projection == "single":
        return SingleModulation(D, M)
    if config.adaLN_projection == "low_rank":
        return LowRankModulation(D, M, config.adaLN_rank)
    return Modulation(D, M * D)
