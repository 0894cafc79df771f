"""Tables of positions: fixed ones, and those of a network that goes on at another image size."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Grid = tuple[int, int]  # rows, columns of patches


def sincos_positions(grid_size: Grid, dim: int) -> Tensor:
    """MAE's fixed positions, fp32 [H·W, dim]: of each patch sines and cosines of its column, then of its row, with
    frequencies 1e4^(-4i/dim)."""
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid_size)
    omega = 1e4 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))

    def features(places: Tensor) -> Tensor:
        angles = places.flatten()[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # [H·W, dim / 2]

    both = features(columns.repeat(len(rows), 1)), features(rows[:, None].repeat(1, len(columns)))
    return torch.cat(both, dim=1).float()


def resized_positions(table: Tensor, before: Grid, after: Grid) -> Tensor:
    """The table [H·W, D] of one grid for another, bicubic between patches, as MAE's and ViT's fine-tuning have it."""
    if before == after:
        return table
    image = table.float().unflatten(0, before).permute(2, 0, 1)[None]  # [1, D, H, W]
    return F.interpolate(image, after, mode="bicubic", align_corners=False)[0].flatten(1).T.to(table.dtype).contiguous()


def resized_state(state: Mapping[str, Tensor], before: Grid, after: Grid) -> dict[str, Tensor]:
    """Weights of a network with its tables of positions for another grid."""
    return {
        name: resized_positions(value, before, after) if name in ("pos_embed", "decoder_pos_embed") else value
        for name, value in state.items()
    }
