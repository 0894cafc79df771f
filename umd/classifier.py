"""A plain ViT classifier: the encoder of a pre-trained UMD, MAE or DiffMAE, with a linear layer on top.

UMD's encoder is used at t = 0, where its adaLN tables are constants. Shift and scale are folded into the norms'
affines, gates into the last layer of each branch. One network without a condition therefore serves all three methods.
Only the condition token of a UMD without adaLN, which stands in front of each image, stays as a parameter.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umd import ops
from umd.blocks import Block, Blocks, Tables, initialize_blocks
from umd.config import ClassifierConfig
from umd.diffmae import DiffMAE, to_images
from umd.embedders import lecun_normal
from umd.errors import UserError
from umd.layers import Linear, to_residual
from umd.model import UMD
from umd.ops import Packing, kept, pack
from umd.pixel_stats import standardize


@kept(16)
def layout(config: ClassifierConfig, batch_size: int, device: torch.device) -> tuple[Packing, Packing]:
    """Packings of whole images: (CLS and patch tokens; the same in the blocks, with the condition token if any)."""
    length = config.num_cls + config.num_patches
    tokens = pack([length] * batch_size, device=device)
    return tokens, pack([length + 1] * batch_size, device=device) if config.cond_token else tokens


class BatchNorm(nn.Module):
    """Batch norm without an affine. Its running moments are untrained parameters, so that checkpoints hold them."""

    def __init__(self, dim: int):
        super().__init__()
        self.running_mean = nn.Parameter(torch.zeros(dim), requires_grad=False)
        self.running_var = nn.Parameter(torch.ones(dim), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training, eps=1e-6)  # [B, D]


class Classifier(nn.Module):
    """ViT encoder, pooling, optional batch norm (linear probing), and a linear layer.

    Raises UserError for fewer than 2 classes.
    """

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        if config.num_classes < 2:
            raise UserError(f"a classifier needs 2 classes or more, got {config.num_classes}")
        self.config = config
        D = config.hidden_size
        self.x_embedder = Linear(config.patch_dim, D)
        self.pos_embed = nn.Parameter(torch.empty(config.num_patches, D))
        self.cls_token = nn.Parameter(torch.zeros(config.num_cls, D)) if config.num_cls else None
        self.cond_token = nn.Parameter(torch.zeros(D)) if config.cond_token else None
        self.encoder = Blocks(config, [Block(config) for _ in range(config.depth)])
        self.batch_norm = BatchNorm(D) if config.linear else None
        self.head = nn.Linear(D, config.num_classes)
        self.initialize_weights()
        if config.linear:
            self.requires_grad_(False)
            self.head.requires_grad_(True)

    def initialize_weights(self) -> None:
        initialize_blocks(self)
        lecun_normal(self.x_embedder)
        nn.init.normal_(self.pos_embed, std=self.config.num_patches**-0.5)
        nn.init.normal_(self.head.weight, std=0.01 if self.config.linear else 2e-5)  # MAE's
        nn.init.zeros_(self.head.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay in AdamW, as in MAE: vectors, CLS tokens and positions."""
        return {name for name, p in self.named_parameters() if p.ndim == 1} | {"cls_token", "pos_embed"}

    def lr_multipliers(self, decay: float) -> dict[str, float]:
        """Layer-wise learning rates: for each parameter a factor, `decay` to the power of its distance from the head.

        Layer 0 is everything before the blocks, layer i + 1 is block i, and layer depth + 1 is the final norm and the
        head, with factor 1.
        """
        depth, multipliers = self.config.depth, {}
        for name, _ in self.named_parameters():
            layer = 0
            if name.startswith("encoder.layers."):
                layer = 1 + int(name.split(".")[2])
            elif name.startswith(("encoder.norm.", "head.", "batch_norm.")):
                layer = depth + 1
            multipliers[name] = decay ** (depth + 1 - layer)
        return multipliers

    def set_checkpointing(self, on: bool) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.encoder.checkpointing = on

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """Logits [B, num_classes] of images [B, C, H, W] or clips [B, C, F, H, W].

        gates: [2·depth, B], factors of each image's branches, attention and MLP in turn (drop path); None: all 1.
        """
        features = self.features(x, gates)
        if self.batch_norm is not None:
            features = self.batch_norm(features)
        return self.head(features)

    def features(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """The pooled features that the head reads: fp32 [B, D] (fp64 stays fp64).

        cls, mean: the mean of the CLS or patch tokens after the final norm. mean_norm: the norm of the patch tokens'
        mean.
        """
        config, B = self.config, len(x)
        packing, block_packing = layout(config, B, x.device)
        patches = ops.patchify(to_images(x, config), config.patch_size).flatten(0, 1)  # [B·L, C·p·P·P]
        if config.pixel_stats == "imagenet":
            patches = standardize(patches)
        y = to_residual(self.x_embedder(patches), config)  # [B·L, D]
        y = y + self.pos_embed.to(y.dtype).repeat(B, 1)
        if self.cls_token is not None:
            y = ops.prepend_tokens(self.cls_token.expand(B, -1, -1), y, packing)
        cond = None if self.cond_token is None else self.cond_token.expand(B, -1)
        fc_norm = config.pool == "mean_norm"
        y = self.encoder(y, block_packing, self.modulation(gates), cond, normed=not fc_norm)  # [B·(num_cls + L), D]
        if config.num_cls:
            cls, y = ops.split_tokens(y, config.num_cls, packing)
        y = cls if config.pool == "cls" else y.view(B, -1, config.hidden_size)
        y = y.to(torch.promote_types(y.dtype, torch.float32)).mean(dim=1)
        if not fc_norm:
            return y
        norm = self.encoder.norm
        with torch.autocast(y.device.type, enabled=False):
            return F.layer_norm(y, y.shape[1:], norm.weight, norm.bias, norm.eps)

    def modulation(self, gates: Tensor | None) -> Iterator[Tables] | None:
        """The gates as adaLN tables of each block, without shift and scale."""
        if gates is None:
            return None
        tables = [gate[:, None].repeat(1, self.config.hidden_size) for gate in gates]  # each [B, D]
        pairs = zip(tables[::2], tables[1::2], strict=True)
        return iter([(None, None, msa, None, None, mlp) for msa, mlp in pairs])

    def represent(self, x: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """The pooled features [B, D] of images or clips. timesteps: ignored; a classifier has no time."""
        return self.features(x)


@torch.no_grad()
def encoder_weights(source: UMD | DiffMAE) -> dict[str, Tensor]:
    """Weights for a `Classifier`, without the head's, such that its features are `source.represent(x)` at t = 0."""
    own: dict[str, Tensor] = dict(source.named_parameters())
    names = ("x_embedder.weight", "x_embedder.bias", "pos_embed", "cls_token")
    weights = {name: own[name] for name in names if name in own}
    ones = own["x_embedder.bias"].new_ones(source.config.hidden_size)  # [D]
    zeros = 0 * ones
    tables: Iterator[tuple[Tensor, ...]] = iter(())
    if isinstance(source, UMD):
        clean = torch.zeros(1, dtype=torch.int64, device=source.pos_embed.device)
        cond, tables, _ = source.condition(clean)
        if source.config.cond_tokens:
            weights["cond_token"] = cond[0]
        weights["x_embedder.weight"] = weights["x_embedder.weight"] * source.input_scale(clean).to(ones)
    elif source.pos_embed_time is not None:
        weights["pos_embed"] = (source.pos_embed_time[:, None] + source.pos_embed).flatten(0, 1)

    def norm(name: str, shift: Tensor, scale: Tensor) -> None:
        weight, bias = own.get(f"{name}.weight", ones), own.get(f"{name}.bias", zeros)
        weights[f"{name}.weight"], weights[f"{name}.bias"] = weight * (1 + scale), bias * (1 + scale) + shift

    for i in range(source.config.depth):
        name = f"encoder.layers.{i}"
        constants = [table[0] for table in next(tables, ())] or [zeros, zeros, ones] * 2
        shift1, scale1, gate1, shift2, scale2, gate2 = constants  # each [D]
        norm(f"{name}.norm1", shift1, scale1)
        norm(f"{name}.norm2", shift2, scale2)
        for layer, gate in (("attn.qkv", None), ("attn.proj", gate1), ("mlp.fc1", None), ("mlp.fc2", gate2)):
            weight, bias = own[f"{name}.{layer}.weight"], own[f"{name}.{layer}.bias"]
            weights[f"{name}.{layer}.weight"] = weight if gate is None else gate[:, None] * weight
            weights[f"{name}.{layer}.bias"] = bias if gate is None else gate * bias
    shift, scale = next(tables, None) or (zeros[None], zeros[None])
    norm("encoder.norm", shift[0], scale[0])
    return weights
