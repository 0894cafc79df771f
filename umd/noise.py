"""Noise for sampling: a function of (seed, index of the sample, number of noises it had before)."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from umd.ops import philox_randn_rows


class Noise:
    """Noises for a batch of samples. Each sample has its own Philox stream; its noises are consecutive parts of it.

    The upper 32 bits of a Philox counter are the index of the sample, the lower 32 the place in its stream.
    """

    def __init__(self, seed: int, first_sample: int, shape: Sequence[int], device: torch.device | str):
        self.seed = torch.tensor(seed, device=device)
        self.shape = tuple(shape[1:])
        self.first = torch.empty(shape[0], dtype=torch.int64, device=device)
        self.start_at(first_sample)
        self.size = math.ceil(math.prod(self.shape) / 4)  # counters of one noise

    def start_at(self, first_sample: int) -> None:
        """From now on draw for the samples first_sample .. first_sample + B - 1."""
        self.first.copy_(torch.arange(first_sample, first_sample + len(self.first)) << 32)

    def offsets(self, drawn: int | Tensor) -> Tensor:
        """The first Philox counter of noise number `drawn` (from 0) of each sample: int64 [B]."""
        return self.first + drawn * self.size

    def draw(self, drawn: int | Tensor) -> Tensor:
        """Noise number `drawn` (from 0) of each sample: float32 [B, C, H, W]."""
        return philox_randn_rows(self.seed, self.offsets(drawn), self.shape)
