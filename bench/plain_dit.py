"""DiT as its authors wrote it (https://github.com/facebookresearch/DiT): adaLN-zero, a modulation layer in each block.

A baseline for UMD where diffusers is not installed, and a second one next to diffusers' DiT.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umd.bench.options import StepBench
from umd.bench.step import dit_baseline
from umd.bench.training import Step
from umd.config import ModelConfig
from umd.embedders import timestep_features
from umd.train.parallel import static_compile


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = (nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def attn(self, x: Tensor) -> Tensor:
        N, L, D = x.shape  # batch, length, dim
        q, k, v = self.qkv(x).reshape(N, L, 3, self.num_heads, D // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, L, D))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        tables = self.adaLN_modulation(c).chunk(6, dim=1)  # (N, D) each
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = tables
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class PlainDiT(nn.Module):
    """DiT of the size of a UMD's encoder. Images [N, C, H, W], timesteps and labels int64 [N] -> [N, 2·C, H, W].

    The output has ε in the first C channels and the variance in the others.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, P, C = config.hidden_size, config.patch_size, config.channels
        self.patch_size = P
        self.x_embedder = nn.Conv2d(C, D, P, P)
        self.register_buffer("pos_embed", 0.02 * torch.randn(1, config.num_patches, D))
        self.t_embedder = nn.Sequential(nn.Linear(256, D), nn.SiLU(), nn.Linear(D, D))
        self.y_embedder = nn.Embedding(1001, D)
        self.blocks = nn.ModuleList(Block(D, config.num_heads) for _ in range(config.depth))
        self.norm_final = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))
        self.linear = nn.Linear(D, 2 * C * P * P)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        h = self.x_embedder(x)  # (N, D, H/P, W/P)
        N, _, rows, columns = h.shape
        h = h.flatten(2).transpose(1, 2) + self.pos_embed  # (N, L, D)
        c = self.t_embedder(timestep_features(t, 256, "paper", x.dtype)) + self.y_embedder(y)  # (N, D)
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        h = self.linear(modulate(self.norm_final(h), shift, scale))  # (N, L, 2·C·P·P)
        h = h.reshape(N, rows, columns, self.patch_size, self.patch_size, -1)
        return h.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def plain_dit_step(bench: StepBench, compiled: bool = False) -> Step:
    """Make a training step of `PlainDiT`."""
    with torch.device(bench.device):
        model = PlainDiT(bench.config())
    network = static_compile(model) if compiled else model
    return dit_baseline(bench, model, lambda x_t, timesteps, labels: network(x_t, timesteps, labels)[:, : x_t.shape[1]])
