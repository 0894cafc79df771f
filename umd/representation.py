"""Features of a UMD by block, to find the block and the noise level whose features tell most about an image.

For diffusion models middle blocks at little noise are best, as published in Xiang et al. 2023 ("Denoising diffusion
autoencoders are unified self-supervised learners") and Chen et al. 2024 ("Deconstructing denoising diffusion models").
"""

import torch
from torch import Tensor

from umd.config import ModelConfig
from umd.model import UMD


def layer_names(config: ModelConfig) -> list[str]:
    """Names of the blocks that `layer_features` reads, in order. Blocks of a cross decoder are left out."""
    decoder = config.decoder_depth if config.decoder == "self" else 0
    return [f"encoder {i + 1}" for i in range(config.depth)] + [f"decoder {i + 1}" for i in range(decoder)]


def layer_features(model: UMD, x: Tensor, timesteps: Tensor | None = None) -> list[Tensor]:
    """Average of the patch tokens behind each block, in the residual stream: fp32 [B, D] for each of `layer_names`.

    x: whole images [B, C, H, W], already noised to the model time `timesteps`.
    timesteps: int64 [1]; None: 0, the noise-free step.
    """
    config, B, L = model.config, len(x), model.config.num_patches
    timesteps = torch.zeros(1, dtype=torch.int64, device=x.device) if timesteps is None else timesteps
    packings, patches, ids = model.whole(x, timesteps, (0,) * B)
    cond, encoder_mod, decoder_mod = model.condition(timesteps)
    levels: list[Tensor] = []
    tokens = model.encode(patches, ids, packings, cond, encoder_mod, levels)  # [B·(num_cls + L), D]
    if model.decoder is not None and config.decoder == "self":
        stream = model.fill(tokens, ids, packings)  # [B·(1 + L), D]
        model.decoder(stream, packings.decoder_blocks, decoder_mod, cond if config.cond_tokens else None, levels=levels)
    return [level.view(B, -1, level.shape[-1])[:, -L:].float().mean(1) for level in levels]  # patches come last
