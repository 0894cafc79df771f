"""Embeddings of the noise level and of the class label, which condition the network."""

import math

import torch
from torch import Tensor, nn

from umd.config import Embedding, ModelConfig, ViTConfig


def timestep_features(timesteps: Tensor, dim: int, embedding: Embedding, dtype: torch.dtype) -> Tensor:
    """Sinusoidal features [R, dim] of times [R], which may be integers or fractions.

    - paper: as DiT: cosines first, frequencies 1e4^(-i/half) with half = dim // 2.
    - released: sines first, frequencies 1e4^(-i/(half - 1)).
    - diffusers: cosines first, frequencies as released.
    """
    half = dim // 2
    index = torch.arange(half, dtype=torch.float64, device=timesteps.device)
    rates = torch.exp(-math.log(1e4) * index / (half if embedding == "paper" else half - 1))
    angles = timesteps.double()[:, None] * rates
    order = (angles.sin(), angles.cos()) if embedding == "released" else (angles.cos(), angles.sin())
    return torch.cat(order, dim=-1).to(dtype)


class TimestepEmbedder(nn.Module):
    """The time embedding e_t: timesteps [R] to sin/cos features, Linear, SiLU, Linear: [R, D]."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        D = config.hidden_size
        self.embedding = config.embedding
        self.features, hidden = (D, 2 * D) if config.embedding == "released" else (256, D)
        self.mlp = nn.Sequential(nn.Linear(self.features, hidden), nn.SiLU(), nn.Linear(hidden, D))

    def forward(self, timesteps: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        features = timestep_features(timesteps, self.features, self.embedding, dtype)
        return self.mlp(features)  # [R, D]


class LabelEmbedder(nn.Module):
    """The label embedding e_y: a table with a row per class and a last row, the learned null class.

    The released code puts an MLP behind the table.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        D = config.hidden_size
        # MaskDiT embeds labels by a layer without a bias: its null class is a row of zeros and is not trained.
        fixed = config.num_classes if config.outputs == "edm" else None
        self.embedding_table = nn.Embedding(config.num_classes + 1, D, padding_idx=fixed)
        released = config.embedding == "released"
        self.mlp = nn.Sequential(nn.Linear(D, 2 * D), nn.SiLU(), nn.Linear(2 * D, D)) if released else nn.Identity()

    def forward(self, labels: Tensor) -> Tensor:
        return self.mlp(self.embedding_table(labels))  # [R, D]


def lecun_normal(model: nn.Module) -> None:
    """Initialise all linear layers of `model` as Flax does: weights N(0, 1/in_features), biases 0."""
    for linear in model.modules():
        if isinstance(linear, nn.Linear):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
