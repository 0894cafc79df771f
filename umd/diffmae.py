"""DiffMAE: a masked autoencoder whose masked patches are noised, not absent (Wei et al. 2023, arXiv 2304.03283).

The encoder reads clean visible patches and has no time embedding. The decoder denoises the masked patches, given the
encoder's output. Filling a hole therefore runs the encoder once, and only the decoder in every step.

Video: a patch is p frames long, and f patches follow each other in time. A batch of B clips is treated as B·f images
with C·p channels, so the code for images also cuts patches and draws noise for video.

Letters as in `umd/model.py`, and M masked patches per image, D' the decoder's width.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umd import ops
from umd.blocks import Block, Blocks, CrossAttention, CrossSelfBlock, Memory, initialize_blocks
from umd.config import Capture, ClassifierConfig, DiffMAEConfig
from umd.embedders import TimestepEmbedder, lecun_normal
from umd.errors import UserError
from umd.layers import Linear, computing_in, to_residual
from umd.ops import Packing, kept, pack
from umd.sampler import Callback, Denoise, ddim_sample
from umd.schedule import NoiseSchedule
from umd.spans import span


class Layout(NamedTuple):
    """The packings of one batch: B images with `fillings` fillings each, image after image."""

    visible: Packing  # num_cls + K tokens per image
    masked: Packing  # M tokens per filling
    queries: Packing  # the same tokens, with all fillings of an image as one sample
    joint: Packing  # num_cls + K + M tokens per filling
    joint_ids: Tensor  # int64, for each token of `joint` its index in [visible tokens; masked tokens]
    joint_masked: Tensor  # int64 [sum M], indices of the masked tokens in `joint`


@kept(64)
def layout(
    config: DiffMAEConfig, keep: tuple[int, ...], device: torch.device, fillings: int = 1, same_time: bool = False
) -> Layout:
    """Make the packings of a batch; cached.

    Args:
        config: the network.
        keep: visible patches of each image.
        device: where the tensors live.
        fillings: fillings per image.
        same_time: whether all fillings share one time; else each has its own.
    """
    L, counts = config.num_patches, [config.num_cls + k for k in keep]
    masked = [L - k for k in keep for _ in range(fillings)]
    rows = [0] * len(masked) if same_time else None
    ids, places, visible_start, masked_start = [], [], 0, sum(counts)
    for count, k in zip(counts, keep, strict=True):
        for _ in range(fillings):
            ids.append(torch.arange(visible_start, visible_start + count))
            places.append(torch.arange(L - k) + sum(map(len, ids)))
            ids.append(torch.arange(masked_start, masked_start + L - k))
            masked_start += L - k
        visible_start += count
    return Layout(
        visible=pack(counts, [0] * len(counts), device),
        masked=pack(masked, rows, device),
        queries=pack([fillings * (L - k) for k in keep], None, device),
        joint=pack([config.num_cls + L] * len(masked), rows, device),
        joint_ids=torch.cat(ids).to(device),
        joint_masked=torch.cat(places).to(device),
    )


def to_images(x: Tensor, config: DiffMAEConfig | ClassifierConfig) -> Tensor:
    """Turn clips [B, C, F, H, W] into images [B·F/p, C·p, H, W] of p frames each; images [B, C, H, W] stay as they are.

    Raises UserError for another shape than the model's.
    """
    shape = (config.channels, *config.image_size)
    clip = (config.channels, config.num_frames, *config.image_size)
    if tuple(x.shape[1:]) not in ((clip,) if config.num_frames > 1 else (clip, shape)):
        expected, what = (clip, "clips") if config.num_frames > 1 else (shape, "images")
        raise UserError(f"{what}: expected [B, {', '.join(map(str, expected))}] for this model, got {list(x.shape)}")
    x = x.unflatten(2, (-1, config.tubelet_size)) if x.ndim == 5 else x[:, :, None, None]  # [B, C, f, p, H, W]
    return x.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def from_images(x: Tensor, config: DiffMAEConfig) -> Tensor:
    """The inverse of `to_images`: [B·f, C·p, H, W] to [B, C, H, W], or to clips [B, C, F, H, W]."""
    f = config.num_frames // config.tubelet_size
    x = x.unflatten(0, (-1, f)).unflatten(2, (config.channels, -1)).transpose(1, 2).flatten(2, 3)
    return x if config.num_frames > 1 else x[:, :, 0]


class DiffMAE(nn.Module):
    """Predicts the clean masked patches of an image or clip from its noised masked and its clean visible patches."""

    def __init__(self, config: DiffMAEConfig):
        super().__init__()
        self.config = config
        D, area = config.hidden_size, config.grid_size[0] * config.grid_size[1]
        frames = config.num_frames // config.tubelet_size
        self.x_embedder = Linear(config.patch_dim, D)
        self.pos_embed = nn.Parameter(torch.empty(area, D))
        self.pos_embed_time = nn.Parameter(torch.empty(frames, D)) if frames > 1 else None
        self.cls_token = nn.Parameter(torch.zeros(config.num_cls, D))
        self.encoder = Blocks(config, [Block(config) for _ in range(config.depth)])

        width = config.decoder_hidden_size
        decoder = replace(config, hidden_size=width, num_heads=config.decoder_num_heads)
        self.decoder_t_embedder = TimestepEmbedder(decoder)
        self.decoder_embed = Linear(config.patch_dim, width)
        self.decoder_pos_embed = nn.Parameter(torch.empty(area, width))
        self.decoder_pos_embed_time = nn.Parameter(torch.empty(frames, width)) if frames > 1 else None
        self.decoder_context = Linear(D, width) if config.decoder == "joint" else None
        self.decoder = Blocks(decoder, [decoder_block(decoder, D) for _ in range(config.decoder_depth)])
        self.head = Linear(width, config.target_size or config.patch_dim)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        initialize_blocks(self)
        for module in (self.x_embedder, self.decoder_t_embedder, self.decoder_embed, self.decoder_context):
            if module is not None:
                lecun_normal(module)
        for name, parameter in self.named_parameters():
            if "pos_embed" in name:
                nn.init.normal_(parameter, std=self.config.num_patches**-0.5)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay in AdamW: biases and CLS tokens."""
        return {name for name, _ in self.named_parameters() if name.endswith("bias")} | {"cls_token"}

    def set_checkpointing(self, on: bool) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.encoder.checkpointing = self.decoder.checkpointing = on

    def forward(
        self, visible: Tensor, ids_keep: Tensor, masked: Tensor, ids_masked: Tensor, packings: Layout, timesteps: Tensor
    ) -> Tensor:
        """Predict the target of every masked patch.

        Args:
            visible: [sum K, C·p·P·P], clean visible patches, image after image.
            ids_keep: int64 [sum K], indices of the visible patches among the B·L patches of the batch.
            masked: [sum M, C·p·P·P], noised masked patches.
            ids_masked: int64 [sum M], indices of the masked patches.
            packings: where the tokens of each image lie.
            timesteps: int64 [R], model times 1..T of the distinct conditions.

        Returns:
            [sum M, C·p·P·P or target_size].
        """
        with span("encoder"):
            memories = self.encode(visible, ids_keep, packings)
        with span("decoder"):
            return self.decode(masked, ids_masked, packings, timesteps, memories)

    def encode(self, visible: Tensor, ids_keep: Tensor, packings: Layout) -> list[Tensor]:
        """Run the encoder and return what the decoder needs of the visible patches.

        cross and cross_self: for each decoder block, keys and values [sum (num_cls + K), 2, H, d].
        joint: a single entry, the encoder's tokens [sum (num_cls + K), D'].
        """
        levels = self.encoder_levels(visible, ids_keep, packings.visible)
        if self.decoder_context is not None:
            return [self.decoder_context(levels[-1])]
        depth = len(levels)
        read = [max(depth - 1 - i, 0) if self.config.links else depth - 1 for i in range(self.config.decoder_depth)]
        return [
            cross_attention(block).memory(levels[level], packings.visible)
            for block, level in zip(self.decoder.layers, read, strict=True)
        ]

    def encoder_levels(self, visible: Tensor, ids_keep: Tensor, packing: Packing) -> list[Tensor]:
        """The stream [sum (num_cls + K), D] behind each encoder block, the CLS tokens of each image first.

        The last entry is taken after the final norm.
        """
        x = to_residual(self.x_embedder(visible), self.config)  # [sum K, D]
        x = x + self.positions(ids_keep, self.pos_embed, self.pos_embed_time).to(x.dtype)
        x = ops.prepend_tokens(self.cls_token.expand(packing.num_samples, -1, -1), x, packing)
        levels: list[Tensor] = []
        y = self.encoder(x, packing, levels=levels)  # [sum (num_cls + K), D]
        return [*levels[:-1], y]

    def decode(
        self, masked: Tensor, ids_masked: Tensor, packings: Layout, timesteps: Tensor, memories: list[Tensor]
    ) -> Tensor:
        """Predict the target of noised patches [sum M, C·p·P·P], given `encode`'s output.

        Returns [sum M, C·p·P·P or target_size].
        """
        x = to_residual(self.decoder_embed(masked), self.config)  # [sum M, D']
        x = x + self.positions(ids_masked, self.decoder_pos_embed, self.decoder_pos_embed_time).to(x.dtype)
        with torch.autocast(timesteps.device.type, enabled=False):
            e_t = self.decoder_t_embedder(timesteps)  # [R, D']
        x = x + ops.per_token(e_t, packings.masked).to(x.dtype)
        if self.decoder_context is not None:
            x = torch.cat([memories[0].to(x.dtype), x]).index_select(0, packings.joint_ids)
            x = self.decoder(x, packings.joint).index_select(0, packings.joint_masked)  # [sum M, D']
        else:
            memory = [Memory(kv, packings.queries, packings.visible) for kv in memories]
            x = self.decoder(x, packings.masked, memories=memory)  # [sum M, D']
        with span("head"):
            return self.head(x)

    def positions(self, ids: Tensor, space: Tensor, time: Tensor | None) -> Tensor:
        """Position embeddings [N, width] of the patches `ids` among the B·L: place plus time."""
        table = space if time is None else (time[:, None] + space).flatten(0, 1)  # [L, width]
        return F.embedding(ids % self.config.num_patches, table)

    def represent(self, x: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """The representation of whole images [B, C, H, W] or clips [B, C, F, H, W], their averaged CLS tokens.

        Returns fp32 [B, D] (fp64 stays fp64). timesteps: ignored; the encoder has no time embedding.
        """
        B, L = len(x), self.config.num_patches
        images = to_images(x, self.config)
        patches = ops.patchify(images, self.config.patch_size).flatten(0, 1)
        packing = layout(self.config, (L,) * B, x.device).visible
        y = self.encoder_levels(patches, torch.arange(B * L, device=x.device), packing)[-1]
        cls, _ = ops.split_tokens(y, self.config.num_cls, packing)
        return cls.float().mean(dim=1) if cls.dtype != torch.float64 else cls.mean(dim=1)


def decoder_block(config: DiffMAEConfig, context: int) -> Block:
    """A decoder block of the configured kind. context: width of the encoder's tokens."""
    if config.decoder == "cross_self":
        return CrossSelfBlock(config, context)
    return Block(config, context if config.decoder == "cross" else None)


def cross_attention(block: nn.Module) -> CrossAttention:
    """The cross-attention of a cross or cross_self block."""
    attention = block.cross if isinstance(block, CrossSelfBlock) else block.attn
    assert isinstance(attention, CrossAttention), "the joint decoder has none"
    return attention


def patch_mask(hole: Tensor, config: DiffMAEConfig) -> Tensor:
    """The patches that a hole [B, 1, H, W] or [B, 1, F, H, W] (0 keep, 1 remove) touches: bool [B, L].

    Raises:
        UserError: the hole's size is not that of the model's images, or it touches no patch or every patch of an image.
    """
    planes = to_images(hole, replace(config, channels=1)).float()
    mask = ops.patchify(planes, config.patch_size).amax(-1).view(len(hole), -1) > 0
    for i, count in enumerate(mask.sum(1).tolist()):
        if count == 0:
            raise UserError(f"the mask hides nothing of picture {i}: mark what to fill")
        if count == config.num_patches:
            raise UserError(
                f"the mask touches every {config.patch_size}x{config.patch_size} patch of picture {i} and leaves none "
                "to go by: hide less"
            )
    return mask


def pixel_mask(mask: Tensor, config: DiffMAEConfig) -> Tensor:
    """The hole that covers exactly the masked patches: [B, L] to float32 [B, 1, H, W] or [B, 1, F, H, W]."""
    hole = mask.float().view(len(mask), 1, -1, *config.grid_size)
    for axis, size in ((2, config.tubelet_size), (3, config.patch_size), (4, config.patch_size)):
        hole = hole.repeat_interleave(size, axis)
    return hole if config.num_frames > 1 else hole[:, :, 0]


def filling_denoiser(
    model: DiffMAE,
    x_known: Tensor,
    hole: Tensor,
    schedule: NoiseSchedule,
    fillings: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Denoise:
    """Make a denoiser for the samplers that draws `fillings` versions of each image. The encoder runs once, here.

    The denoiser takes x_t [B·fillings, C, F·H, W], image after image, all at one model time. It predicts the patches
    that the hole touches and takes all other patches from `x_known`.

    Args:
        model: the network.
        x_known: [B, C, H, W] or [B, C, F, H, W].
        hole: as in `patch_mask`.
        schedule: noise schedule.
        fillings: versions of each image.
        dtype: type of autocast.

    Raises:
        UserError: the hole does not fit, as in `patch_mask`.
    """
    config = model.config
    L, P, n = config.num_patches, config.patch_size, fillings
    mask = patch_mask(hole, config)  # [B, L], 1 remove
    keep = tuple((L - mask.sum(1)).tolist())
    packings = layout(config, keep, x_known.device, n, same_time=True)
    known = ops.patchify(to_images(x_known, config), P).view(-1, L, config.patch_dim)  # [B, L, C·p·P·P]
    ids_keep = (~mask).flatten().nonzero()[:, 0]
    ids_masked = mask.repeat_interleave(n, 0).flatten().nonzero()[:, 0]  # among the B·n·L patches of all fillings
    context = computing_in(model, dtype)
    with torch.no_grad(), context():
        memories = model.encode(known.flatten(0, 1).index_select(0, ids_keep), ids_keep, packings)
    known = known.repeat_interleave(n, 0).flatten(0, 1)  # [B·n·L, C·p·P·P]

    def denoise(x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        images = to_images(x_t.unflatten(2, (config.num_frames, -1)), config)  # [B·n·f, C·p, H, W]
        patches = ops.patchify(images, P).flatten(0, 1).index_select(0, ids_masked).to(known.dtype)
        with context():
            prediction = model.decode(patches, ids_masked, packings, timesteps[:1], memories)
        filled = known.index_copy(0, ids_masked, prediction.to(known.dtype))
        images = ops.unpatchify(filled.view(len(images), -1, filled.shape[-1]), config.image_size, P)
        x_start = from_images(images, config).reshape(x_t.shape).to(x_t.dtype)
        return x_start, schedule.eps_from_xstart(x_t, timesteps, x_start)

    return denoise


@torch.no_grad()
def fill(
    model: DiffMAE,
    x_known: Tensor,
    hole: Tensor,
    schedule: NoiseSchedule,
    *,
    fillings: int = 1,
    num_steps: int = 125,
    eta: float = 1.0,
    clip: bool = True,
    seed: int = 0,
    first_sample: int = 0,
    dtype: torch.dtype = torch.float32,
    callback: Callback | None = None,
    capture: Capture = "auto",
) -> Tensor:
    """Fill the removed pixels of images or clips, `fillings` times each; the kept pixels come back bit for bit.

    Every patch that the hole touches is drawn as a whole from noise, given all other patches. Only its removed pixels
    are used. The samples are from the model's conditional distribution; no kept pixels are put back between steps.

    Args:
        model: a network that predicts pixels.
        x_known: images [B, C, H, W] or clips [B, C, F, H, W], float32 or float64; removed pixels may hold anything.
        hole: [B, 1, H, W] or [B, 1, F, H, W], 0 keep, 1 remove.
        schedule: noise schedule.
        fillings: n. Filling i of image b is sample first_sample + b·n + i of the seed, in any batch.
        eta: 1 for DDPM, 0 for DDIM without noise, or a value between.
        dtype: type of autocast.
        num_steps, clip, seed, first_sample, callback, capture: as in `ddim_sample`, with images [B·n, C, F·H, W].

    Returns:
        [B, n, C, H, W] or [B, n, C, F, H, W].

    Raises:
        UserError: the hole does not fit, as in `patch_mask`; the model predicts features; steps or eta out of range.
    """
    if model.config.target_size:
        raise UserError(
            "this model predicts features, not pixels, and cannot fill a hole; train one with target pixels"
        )
    denoise = filling_denoiser(model, x_known, hole, schedule, fillings, dtype)
    shape = (len(x_known) * fillings, model.config.channels, x_known.shape[2:-1].numel(), x_known.shape[-1])
    out = ddim_sample(
        denoise, shape, schedule, num_steps=num_steps, eta=eta, clip=clip, predict="x_start", seed=seed,
        first_sample=first_sample, callback=callback, device=x_known.device, capture=capture,
    )  # fmt: skip
    filled = out.to(x_known.dtype).view(len(x_known), fillings, *x_known.shape[1:])
    return torch.where(hole[:, None].bool(), filled, x_known[:, None])
