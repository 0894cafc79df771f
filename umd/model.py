"""The UMD network: an asymmetric encoder-decoder ViT ("Unified Auto-Encoding with Masked Diffusion", Sec. 4, App. A).

All samples of a batch lie in one packed stream `[N, D]`. Linear layers run once on the stream, attention stays inside
each sample. Other masks and noise turn the same network into MAE, MaskDiT or DiT (see `umd/objective.py`); other
settings give these networks as published (see `umd/peers.py`).

Letters: B images, S samples, N tokens in the stream, D width, C channels, P patch size, L patches and K visible patches
per sample, R distinct conditions, T diffusion steps.
"""

from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umd import ops
from umd.blocks import Block, Blocks, CrossAttention, Memory, Tables, initialize_blocks
from umd.config import ModelConfig
from umd.embedders import LabelEmbedder, TimestepEmbedder, lecun_normal
from umd.errors import UserError
from umd.layers import Linear, to_residual
from umd.masking import Layout, layout
from umd.modulation import build_modulation
from umd.pixel_stats import standardize
from umd.positions import sincos_positions
from umd.schedule import edm_sigma
from umd.spans import span

Conditions = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]  # see `make_conditions`
SIGMA_DATA = 0.5  # standard deviation of the images that EDM assumes


class Head(nn.Module):
    """Maps tokens [N, D] to predicted patches [N, O·P·P] with O output channels.

    UMD's head is a transposed convolution with kernel and stride P, its output left as patches: one bias per channel.
    The head of the other networks is a linear layer: one bias per value.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.area = config.patch_size**2
        channels = config.out_channels
        self.weight = nn.Parameter(torch.empty(channels * self.area, config.decoder_width))
        self.bias = nn.Parameter(torch.zeros(channels if config.outputs == "x_start_eps" else channels * self.area))

    def forward(self, x: Tensor) -> Tensor:
        if len(self.bias) == len(self.weight):
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias[:, None].expand(-1, self.area).flatten())


class UMD(nn.Module):
    """A masked autoencoder for noised and noise-free, masked and whole images."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        C, P, D, L, width = (
            config.channels, config.patch_size, config.hidden_size, config.num_patches, config.decoder_width,
        )  # fmt: skip
        self.t_embedder = TimestepEmbedder(config) if config.embedding != "none" else None
        self.y_embedder = LabelEmbedder(config) if config.num_classes > 0 else None
        # Per block two sets of shift, scale and gate; for the last norm shift and scale.
        self.adaLN_modulation = build_modulation(config) if config.adaLN else None

        self.x_embedder = Linear(C * P * P, D)
        self.pos_embed = self.positions(L, D)
        self.cls_token = nn.Parameter(torch.zeros(config.num_cls, D)) if config.num_cls else None
        self.encoder = Blocks(config, [Block(config) for _ in range(config.depth)])

        self.decoder: Blocks | None = None
        self.decoder_embed: Linear | None = None
        if config.decoder_depth:
            self.decoder_embed = Linear(D, width) if config.decoder_hidden_size else None
            self.mask_token = nn.Parameter(torch.empty(width))
            self.decoder_pos_embed = self.positions(L, width)
            vit, context = config.decoder_vit, D if config.decoder == "cross" else None
            self.decoder = Blocks(vit, [Block(vit, context) for _ in range(config.decoder_depth)])
        self.head = Head(config)
        self.initialize_weights()

    def positions(self, L: int, width: int) -> nn.Parameter:
        """A position table [L, width], learned or fixed. Checkpoints hold both kinds."""
        if self.config.positions == "learned":
            return nn.Parameter(torch.empty(L, width))
        return nn.Parameter(sincos_positions(self.config.grid_size, width), requires_grad=False)

    def initialize_weights(self) -> None:
        initialize_blocks(self)
        lecun_normal(self.x_embedder)
        if self.t_embedder is not None:
            lecun_normal(self.t_embedder)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
            if self.config.outputs == "edm":
                nn.init.zeros_(self.y_embedder.embedding_table.weight[-1])
            lecun_normal(self.y_embedder)
        if self.adaLN_modulation is not None:  # the zero of adaLN-zero: every block starts as the identity
            self.adaLN_modulation.zero()
        tables = (self.pos_embed,) if self.decoder is None else (self.pos_embed, self.decoder_pos_embed)
        for table in tables:
            if self.config.positions == "learned":
                nn.init.normal_(table, std=self.config.num_patches**-0.5)
        if self.decoder is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        if self.decoder_embed is not None:
            lecun_normal(self.decoder_embed)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay in AdamW: biases, CLS tokens and mask token."""
        biases = {name for name, _ in self.named_parameters() if name.endswith("bias")}
        return biases | {"cls_token", "mask_token"}

    def set_checkpointing(self, on: bool) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        for blocks in (self.encoder, self.decoder):
            if blocks is not None:
                blocks.checkpointing = on

    def forward(
        self,
        patches: Tensor,
        ids_keep: Tensor,
        packings: Layout,
        timesteps: Tensor,
        labels: Tensor | None = None,
        ids_predict: Tensor | None = None,
        conditions: Conditions | None = None,
    ) -> Tensor:
        """Predict x̂0 and ε̂ of every patch from the visible patches.

        Args:
            patches: [sum K, C·P·P], visible patches, sample after sample.
            ids_keep: int64 [sum K], indices of the visible patches among the S·L patches of the batch.
            packings: where the tokens of each sample lie; sample s uses condition row `cond_index[s]`.
            timesteps: int64 [R], model times 0..T of the distinct conditions. EDM also takes fp32 [R], ln(σ)/4.
            labels: int64 [R] in 0..num_classes, where num_classes is the null class; None: the null class.
            ids_predict: int64, indices of the patches that a cross decoder predicts, sample after sample, as many as
                `packings` was made for; None: all patches.
            conditions: precomputed conditions that include `timesteps` and `labels`; None: compute them here.

        Returns:
            [S·L, O·P·P] for O output channels: x̂0 then ε̂, or what `config.outputs` names. Patches that are not
            predicted are 0.
        """
        if conditions is None:
            cond, encoder_mod, decoder_mod = self.condition(timesteps, labels)  # [R, D], iterators of tables [R, D]
        else:
            cond, tables = conditions(timesteps, labels)  # [R, D], [R, M·D]
            encoder_mod, decoder_mod = self.modulation(tables.split(self.config.modulation_widths, dim=1).__getitem__)
        with span("encoder"):
            tokens = self.encode(patches, ids_keep, packings, cond, encoder_mod)  # [sum (num_cls + K), D]
        if self.decoder is None:
            return self.predict_visible(tokens, ids_keep, packings)
        with span("decoder"):
            x = self.fill(tokens, ids_keep, packings)  # [S·(1 + L), D]
            if self.config.decoder == "cross":
                return self.decode_cross(x, tokens, packings, cond, decoder_mod, ids_predict)
            token = cond if self.config.cond_tokens else None
            x = self.decoder(x, packings.decoder_blocks, decoder_mod, token)  # same shape
            if self.config.num_cls:
                _, x = ops.split_tokens(x, 1, packings.decoder)  # [S·L, D]
        with span("head"):
            return self.head(x)  # [S·L, O·P·P]

    def fill(self, tokens: Tensor, ids_keep: Tensor, packings: Layout) -> Tensor:
        """Build the decoder's input: encoder tokens [sum (num_cls + K), D] to [S·(1 + L), D'], D' the decoder's width.

        Visible patches go to their places, mask tokens to all other places, and positions are added. In front of each
        sample is the average of its CLS tokens; without CLS tokens the result is [S·L, D'].
        """
        if self.decoder_embed is not None:
            tokens = self.decoder_embed(tokens)
        tokens = to_residual(tokens, self.config)
        tables = self.mask_token, self.decoder_pos_embed
        if self.config.num_cls:
            return ops.scatter_tokens(tokens, packings.encoder, ids_keep, self.config.num_cls, *tables)
        S = packings.patches.num_samples
        x = self.mask_token.to(tokens.dtype).repeat(S * self.config.num_patches, 1)
        return x.index_copy(0, ids_keep, tokens) + self.decoder_pos_embed.to(tokens.dtype).repeat(S, 1)

    def predict_visible(self, tokens: Tensor, ids_keep: Tensor, packings: Layout) -> Tensor:
        """Apply the head to the encoder's tokens, for a network without decoder: [S·L, O·P·P], 0 for hidden patches."""
        with span("head"):
            if self.config.num_cls:
                _, tokens = ops.split_tokens(tokens, self.config.num_cls, packings.encoder)
            seen = self.head(tokens)  # [sum K, O·P·P]
            whole = seen.new_zeros(packings.patches.num_samples * self.config.num_patches, seen.shape[1])
            return whole.index_copy(0, ids_keep, seen)

    def decode_cross(
        self,
        x: Tensor,
        tokens: Tensor,
        packings: Layout,
        cond: Tensor,
        modulation: Iterator[Tables],
        ids: Tensor | None,
    ) -> Tensor:
        """Run the cross decoder and the head: [S·L, O·P·P], 0 for patches that are not predicted.

        Queries are the patches `ids` of x [S·(1 + L), D]: hidden patches as mask tokens, visible patches, whose noise
        is predicted, as their own tokens. Keys are the encoder's tokens and, without adaLN, the condition token.
        """
        assert self.decoder is not None
        S, L = packings.patches.num_samples, self.config.num_patches
        if not self.config.adaLN:
            rows = F.embedding(packings.encoder_blocks.cond_index, cond).to(tokens.dtype)  # [S, D]
            tokens = ops.prepend_tokens(rows[:, None], tokens, packings.encoder_blocks)
        places = torch.arange(S * L, device=x.device) if ids is None else ids
        x = x.index_select(0, places + places // L + 1)  # [Q, D]; + …: a CLS token precedes each sample's L patches
        memories = [
            Memory(attention.memory(tokens, packings.encoder_blocks), packings.decoder_blocks, packings.encoder_blocks)
            for attention in (cast(CrossAttention, block.attn) for block in self.decoder.layers)
        ]
        x = self.decoder(x, packings.decoder_blocks, modulation, memories=memories)  # [Q, D]
        with span("head"):
            prediction = self.head(x)  # [Q, O·P·P]
        if ids is None:
            return prediction
        return prediction.new_zeros(S * L, prediction.shape[1]).index_copy(0, ids, prediction)

    def condition(
        self, timesteps: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Iterator[tuple[Tensor, ...]], Iterator[tuple[Tensor, ...]]]:
        """Condition [R, D] of times and labels [R], and the modulation of encoder and decoder.

        Each modulation is an iterator that computes one block's tables at a time: 6 tables [R, D] per block, then 2 for
        a modulated final norm. Everything is computed in the parameters' own precision, also under autocast.
        """
        if self.t_embedder is None:  # MAE has no condition
            return self.pos_embed.new_zeros(len(timesteps), self.config.hidden_size), iter(()), iter(())
        with span("adaLN"), torch.autocast(timesteps.device.type, enabled=False):
            c = self.t_embedder(self.embedded_times(timesteps))  # [R, D]
            if self.y_embedder is not None:
                null = timesteps.new_full(timesteps.shape, self.config.num_classes, dtype=torch.int64)
                c = c + self.y_embedder(null if labels is None else labels)
            if self.adaLN_modulation is None:
                return c, iter(()), iter(())
            tables = self.adaLN_modulation(F.silu(c))
        encoder, decoder = self.modulation(tables)
        return c, encoder, decoder

    def embedded_times(self, timesteps: Tensor) -> Tensor:
        """The number that is embedded as time. UMD: the model time t. DiT: t - 1, at least 0. EDM: ln(σ)/4."""
        if self.config.outputs == "edm" and not timesteps.is_floating_point():
            return edm_sigma(timesteps).log() / 4
        return (timesteps - 1).clamp(min=0) if self.config.outputs in ("eps", "eps_sigma") else timesteps

    def modulation(self, tables: Callable[[int], Tensor]) -> tuple[Iterator[tuple[Tensor, ...]], ...]:
        """Iterators over the tables of the encoder's and of the decoder's blocks.

        tables(i): the tables of block i side by side, [R, 6·D]; [R, 2·D] for a final norm.
        """
        config, count = self.config, len(self.config.modulation_widths)
        # Index of the decoder's first block.
        first = count if self.decoder is None else config.depth + (self.decoder_embed is not None)

        def block(i: int) -> tuple[Tensor, ...]:
            return tables(i).split(config.hidden_size if i < first else config.decoder_width, dim=1)

        return map(block, range(first)), map(block, range(first, count))

    def encode(
        self, patches: Tensor, ids_keep: Tensor, packings: Layout, cond: Tensor, modulation: Iterator[Tables],
        levels: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Run the encoder on visible patches [sum K, C·P·P].

        Returns the tokens after the final norm, the CLS tokens of each sample first: [sum (num_cls + K), D].
        levels: if given, the stream behind each block is appended to it (see `Blocks`).
        """
        if self.config.pixel_stats == "imagenet":
            patches = standardize(patches)
        x = to_residual(self.x_embedder(patches), self.config)  # [sum K, D]
        x = ops.add_positions(x, ids_keep, self.pos_embed, packings.patches.num_samples)
        if self.cls_token is not None:
            cls = self.cls_token.expand(packings.patches.num_samples, -1, -1)
            x = ops.prepend_tokens(cls, x, packings.encoder)
        tokens = cond if self.config.cond_tokens else None
        return self.encoder(x, packings.encoder_blocks, modulation, tokens, levels=levels)

    def represent(self, x: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """The representation of whole images: [B, C, H, W] to fp32 [B, D] (fp64 stays fp64).

        It is the average of the CLS tokens, or of the patch tokens in a model without CLS tokens.
        timesteps: int64 [1], model time of all images; default 0, the noise-free step.
        """
        B = len(x)
        self._check_image(x)
        timesteps = torch.zeros(1, dtype=torch.int64, device=x.device) if timesteps is None else timesteps
        packings, patches, ids = self.whole(x, timesteps, (0,) * B)
        cond, encoder_mod, _ = self.condition(timesteps)
        tokens = self.encode(patches, ids, packings, cond, encoder_mod)
        if self.config.num_cls:
            tokens, _ = ops.split_tokens(tokens, self.config.num_cls, packings.encoder)
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        return tokens.view(B, -1, self.config.hidden_size).mean(dim=1)

    def whole(
        self, x: Tensor, timesteps: Tensor, cond_index: tuple[int, ...] | None = None
    ) -> tuple[Layout, Tensor, Tensor]:
        """The network's inputs for whole images x_t [B, C, H, W]: (layout, patches [B·L, C·P·P], their indices [B·L]).

        cond_index: condition row of each image; None: each image has its own.
        """
        B, L = len(x), self.config.num_patches
        if self.config.outputs == "edm":
            x = x * self.input_scale(timesteps).to(x).view(-1, 1, 1, 1)
        packings = layout(self.config, (L,) * B, cond_index, x.device)
        patches = ops.patchify(x, self.config.patch_size).flatten(0, 1)
        return packings, patches, torch.arange(B * L, device=x.device)

    def input_scale(self, timesteps: Tensor) -> Tensor:
        """Factor on x_t at the network's input, fp64 [B] at model times [B]: c_in/√ᾱ with EDM, else 1."""
        if self.config.outputs != "edm":
            return timesteps.new_ones(timesteps.shape, dtype=torch.float64)
        sigma = edm_sigma(timesteps)
        return ((1 + sigma**2) / (SIGMA_DATA**2 + sigma**2)).sqrt()

    def denoise(
        self, x_t: Tensor, timesteps: Tensor, labels: Tensor | None = None, conditions: Conditions | None = None
    ) -> tuple[Tensor, ...]:
        """Predict image and noise from whole noisy images.

        Args:
            x_t: [B, C, H, W].
            timesteps: int64 [B], model times.
            labels: int64 [B] in 0..num_classes, or None for the null class.
            conditions: precomputed conditions that include these times and labels; None: compute them here.

        Returns:
            (x̂0, ε̂), each [B, C, H, W] in x_t's type; NaN for the one that the network does not predict. A network
            with learned variance adds v in [-1, 1]: -1 stands for the smallest variance that a step may have, 1 for
            the largest.

        Raises:
            UserError: images of another size, an MAE, or labels for a model trained without them.
        """
        self._check_image(x_t)
        if self.config.outputs == "x_start":
            raise UserError("an MAE fills hidden patches; it cannot denoise, and draws no samples")
        if labels is not None and self.y_embedder is None:
            raise UserError("this model was trained without labels; fine-tune it with labels first (umd finetune)")
        packings, patches, ids = self.whole(x_t, timesteps)
        prediction = self(patches, ids, packings, timesteps, labels, conditions=conditions)
        parts = self.to_images(prediction.to(x_t.dtype))
        if self.config.outputs == "x_start_eps":
            return parts
        if self.config.outputs == "edm":
            sigma = edm_sigma(timesteps).to(x_t).view(-1, 1, 1, 1)
            x = x_t * (1 + sigma**2).sqrt()  # x_t has variance 1
            x_start = edm_denoised(x, parts[0], sigma)
            return x_start, (x - x_start) / sigma
        missing = x_t.new_full((1,), torch.nan).expand_as(x_t)
        return missing, *parts

    def to_images(self, prediction: Tensor) -> tuple[Tensor, ...]:
        """Turn a prediction [B·L, O·P·P] into images [B, C, H, W], one for each output (UMD: x̂0 and ε̂)."""
        count = self.config.out_channels // self.config.channels
        parts = prediction.view(-1, self.config.num_patches, count, prediction.shape[-1] // count).unbind(2)
        return tuple(ops.unpatchify(part, self.config.image_size, self.config.patch_size) for part in parts)

    def _check_image(self, x: Tensor) -> None:
        expected = (self.config.channels, *self.config.image_size)
        if tuple(x.shape[1:]) != expected:
            raise UserError(
                f"images: expected [B, {', '.join(map(str, expected))}] for this model, got {list(x.shape)}"
            )


def edm_denoised(x: Tensor, F_x: Tensor, sigma: Tensor) -> Tensor:
    """x̂0 = c_skip·x + c_out·F_x, with x = x0 + σ·ε and EDM's network output F_x (Karras et al. 2022, Table 1)."""
    total = sigma**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total * x + sigma * SIGMA_DATA / total.sqrt() * F_x
