"""Features of a UMD by block: for which of them, and at which noise, tell most of an image.

Published for diffusion models: those of middle blocks, at little noise (Xiang et al. 2023, "Denoising diffusion
autoencoders are unified self-supervised learners"; Chen et al. 2024, "Deconstructing denoising diffusion models").
"""

import torch
from torch import Tensor

from umd import ops
from umd.config import ModelConfig
from umd.layers import residual
from umd.masking import layout
from umd.model import UMD


def layer_names(config: ModelConfig) -> list[str]:
    """The blocks that `layer_features` reads, in order. Those of a cross decoder are not among them."""
    decoder = config.decoder_depth if config.decoder == "self" else 0
    return [f"encoder {i + 1}" for i in range(config.depth)] + [f"decoder {i + 1}" for i in range(decoder)]


def layer_features(model: UMD, x: Tensor, timesteps: Tensor | None = None) -> list[Tensor]:
    """The patch tokens of the residual stream behind each block, averaged: fp32 [B, D] for each of `layer_names`.

    x: whole images [B, C, H, W], noised to the model time `timesteps`, int64 [1]; None: 0, the noise-free step.
    """
    config, B, L = model.config, len(x), model.config.num_patches
    timesteps = torch.zeros(1, dtype=torch.int64, device=x.device) if timesteps is None else timesteps
    batch = layout(config, (L,) * B, (0,) * B, x.device)
    patches, ids = ops.patchify(x, config.patch_size).flatten(0, 1), torch.arange(B * L, device=x.device)
    cond, encoder_mod, decoder_mod = model.condition(timesteps)
    levels: list[Tensor] = []
    tokens = model.encode(patches, ids, batch, cond, encoder_mod, levels)  # [B·(num_cls + L), D]
    if config.decoder == "self":
        stream = residual(tokens, config)
        stream = ops.scatter_tokens(
            stream, batch.encoder, ids, config.num_cls, model.mask_token, model.decoder_pos_embed
        )  # [B·(1 + L), D]
        model.decoder(stream, batch.decoder_blocks, decoder_mod, None if config.adaLN else cond, levels=levels)
    return [level.view(B, -1, level.shape[-1])[:, -L:].float().mean(1) for level in levels]  # patches come last
