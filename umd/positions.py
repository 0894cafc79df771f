"""Position tables: fixed sines and cosines, and resizing a network's tables to another image size."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]  # rows, columns of patches


def sincos_positions(grid_size: Grid, dim: int) -> Tensor:
    """MAE's fixed position table, fp32 [H·W, dim], for a grid of H·W patches.

    A row holds the sines and cosines of the patch's column, then those of its row, with frequencies 1e4^(-4i/dim).
    """
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid_size)
    omega = 1e4 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))

    def features(places: Tensor) -> Tensor:
        angles = places.flatten()[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # [H·W, dim / 2]

    both = features(columns.repeat(len(rows), 1)), features(rows[:, None].repeat(1, len(columns)))
    return torch.cat(both, dim=1).float()


def resized_positions(table: Tensor, before: Grid, after: Grid) -> Tensor:
    """Resize a position table [H·W, D] from one grid to another, bicubically, as in MAE's and ViT's fine-tuning."""
    if before == after:
        return table
    image = table.float().unflatten(0, before).permute(2, 0, 1)[None]  # [1, D, H, W]
    return F.interpolate(image, after, mode="bicubic", align_corners=False)[0].flatten(1).T.to(table.dtype).contiguous()


def resized_state(state: Mapping[str, Tensor], before: Grid, after: Grid) -> dict[str, Tensor]:
    """A network's weights with its position tables resized from one grid to another."""
    return {
        name: resized_positions(value, before, after) if name in ("pos_embed", "decoder_pos_embed") else value
        for name, value in state.items()
    }
