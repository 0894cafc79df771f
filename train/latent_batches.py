"""Training batches of latents: read from shards one batch at a time, and drawn from the pictures' posteriors."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from umd.errors import UserError
from umd.ops import sample_posterior
from umd.train.latents import LatentDataset

if TYPE_CHECKING:
    from umd.train.data import Batches


class StoredViews(Dataset):
    """[(epoch, index)] of a batch -> (moments as stored [B, M, C, h, w], indices, indices), or the UserError raised."""

    def __init__(self, dataset: LatentDataset, block: int):
        self.dataset, self.block = dataset, block

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[Tensor, np.ndarray, np.ndarray] | UserError:
        epochs, indices = np.array(keys, dtype=np.int64).T
        try:
            return torch.from_numpy(self.dataset.read(indices, epochs, self.block)), indices, indices
        except UserError as error:
            return error


def as_read(batch: Any) -> Any:
    """Collate function that does nothing, as a batch is already read as one."""
    return batch


def drawn_latents(
    loader: "Batches", moments: Callable[[Tensor], Tensor], size: int,
    *, batch_size: int, seed: int, start: int, places: Sequence[int],
) -> "Batches":  # fmt: skip
    """The loader's batches with x_start replaced by a draw from `moments(x_start)`, keyed by (seed, epoch, index)."""
    offsets = torch.tensor(places)
    try:
        for first, batch in zip(count(start, batch_size), loader, strict=False):
            offsets = offsets.to(batch.indices.device)
            epochs = (first + offsets) // size
            x_start = sample_posterior(moments(batch.x_start), seed, epochs * size + batch.indices)
            yield replace(batch, x_start=x_start)
    finally:
        loader.close()
