"""The noise of samples: a function of the seed, the index of a sample and how many noises it had before."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from umd.ops import philox_randn_rows


class Noise:
    """The noises of a batch of samples, by number: stretches of every sample's Philox stream that follow each other.

    A counter's upper 32 bits are the index of the sample, its lower 32 the place in that sample's stream.
    """

    def __init__(self, seed: int, first_sample: int, shape: Sequence[int], device: torch.device | str):
        self.seed = torch.tensor(seed, device=device)
        self.shape = tuple(shape[1:])
        self.first = torch.empty(shape[0], dtype=torch.int64, device=device)
        self.start_at(first_sample)
        self.size = math.ceil(math.prod(self.shape) / 4)  # counters of one noise

    def start_at(self, first_sample: int) -> None:
        """The noises are those of samples `first_sample` and after from now on."""
        self.first.copy_(torch.arange(first_sample, first_sample + len(self.first)) << 32)

    def offsets(self, drawn: int | Tensor) -> Tensor:
        """The first counter of each sample's noise after `drawn` others: int64 [B]."""
        return self.first + drawn * self.size

    def draw(self, drawn: int | Tensor) -> Tensor:
        """That noise: float32 [B, C, H, W]."""
        return philox_randn_rows(self.seed, self.offsets(drawn), self.shape)
