"""The UMD network: an asymmetric encoder-decoder ViT ("Unified Auto-Encoding with Masked Diffusion", Sec. 4, App. A).

All samples of a batch lie in one packed stream `[N, D]`; linear layers run once on the stream, attention stays inside
each sample. MAE, MaskDiT and DiT are the same network under other masks and noise (see `umd/objective.py`).

Letters: N tokens of the stream, S samples, D width, L patches, K visible patches, R distinct conditions, P patch size.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from umd import ops
from umd.config import ModelConfig, ViTConfig
from umd.embedders import LabelEmbedder, TimestepEmbedder, lecun_normal
from umd.errors import UserError
from umd.layers import GeluLinear, Linear, residual
from umd.masking import Layout, layout
from umd.modulation import build_modulation
from umd.ops import Packing
from umd.spans import span

# A branch not yet added to the residual stream: h [N, D], the bias in it that has yet to get its gradient, gate [R, D].
Branch = tuple[Tensor, Tensor | None, Tensor | None] | None
Tables = tuple[Tensor | None, ...]  # of a block: shift, scale, gate of both branches; of a final norm: shift, scale
Conditions = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]  # see `make_conditions`


class ModulatedLayerNorm(nn.Module):
    """Adds the pending branch to the residual stream and normalises it, in one op."""

    def __init__(self, dim: int, affine: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(
        self,
        x: Tensor,
        branch: Branch,
        packing: Packing,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(r, y): r = x + gate·h [N, D] in x's type, y = LN(r)·(1 + scale) + shift [N, D] in that of the products."""
        if branch is None:
            tables = shift, scale, self.weight, self.bias
            return x, ops.modulated_layer_norm(x, packing, *tables, dtype=ops.products_dtype(x))
        h, h_bias, gate = branch
        return ops.gated_residual_layer_norm(x, h, packing, gate, shift, scale, self.weight, self.bias, h_bias=h_bias)


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, packing: Packing) -> tuple[Tensor, Tensor | None]:
        """(h [N, D], the bias in it that has yet to get its gradient)."""
        N, D = x.shape
        qkv, bias = self.qkv.split(x)
        qkv = qkv.view(N, 3, self.num_heads, D // self.num_heads)
        return self.proj.split(ops.varlen_attention(qkv, packing, bias=bias).view(N, D))


class Memory(NamedTuple):
    """What the queries of one cross-attention see."""

    kv: Tensor  # [M, 2, H, d], keys and values
    packing: Packing  # of the queries, as many samples as there are in kv
    kv_packing: Packing


class CrossAttention(nn.Module):
    """Attention from a stream of width `dim` to one of width `context`."""

    def __init__(self, dim: int, num_heads: int, context: int, norm_affine: bool):
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim)
        self.norm = ModulatedLayerNorm(context, norm_affine)
        self.kv = Linear(context, 2 * dim)
        self.proj = Linear(dim, dim)

    def memory(self, context: Tensor, packing: Packing) -> Tensor:
        """Keys and values [M, 2, H, d] of context [M, D']; they stay as they are while the queries change."""
        _, y = self.norm(context, None, packing)
        return self.kv(y).unflatten(1, (2, self.num_heads, -1))

    def forward(self, x: Tensor, memory: Memory) -> tuple[Tensor, Tensor | None]:
        """As `Attention`."""
        q = self.q(x).unflatten(1, (self.num_heads, -1))  # [N, H, d]
        return self.proj.split(ops.varlen_cross_attention(q, *memory).flatten(1))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2 = GeluLinear(hidden, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(h [N, D], the bias in it that has yet to get its gradient)."""
        if ops.gelu_in_products():
            h, a = self.fc1.with_gelu(x)
            return self.fc2.split(h, gelu=a)
        return self.fc2.split(*self.fc1.split(x))


class Block(nn.Module):
    """x += gate1·Attn(LN(x)·(1+scale1)+shift1);  x += gate2·MLP(LN(x)·(1+scale2)+shift2).

    The second branch is handed on and added by the next norm, so that gate, residual, norm and modulation are one op.
    `context`: width of the stream that Attn looks at, where it is another than x.
    """

    def __init__(self, config: ViTConfig, context: int | None = None):
        super().__init__()
        D, heads = config.hidden_size, config.num_heads
        self.norm1 = ModulatedLayerNorm(D, config.norm_affine)
        self.attn = Attention(D, heads) if context is None else CrossAttention(D, heads, context, config.norm_affine)
        self.norm2 = ModulatedLayerNorm(D, config.norm_affine)
        self.mlp = Mlp(D, int(D * config.mlp_ratio))

    def forward(
        self,
        x: Tensor,
        branch: Branch,
        packing: Packing,
        modulation: Tables,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Branch]:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation  # each [R, D] or None
        x, y = self.norm1(x, branch, packing, shift_msa, scale_msa)  # [N, D]
        attended = self.attn(y, packing if memory is None else memory)
        x, y = self.norm2(x, (*attended, gate_msa), packing, shift_mlp, scale_mlp)  # [N, D]
        return x, (*self.mlp(y), gate_mlp)


class CrossSelfBlock(Block):
    """x += CrossAttn(LN(x), memory), then a `Block`."""

    def __init__(self, config: ViTConfig, context: int):
        super().__init__(config)
        self.norm_cross = ModulatedLayerNorm(config.hidden_size, config.norm_affine)
        self.cross = CrossAttention(config.hidden_size, config.num_heads, context, config.norm_affine)

    def forward(
        self,
        x: Tensor,
        branch: Branch,
        packing: Packing,
        modulation: Tables,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Branch]:
        x, y = self.norm_cross(x, branch, packing)  # [N, D]
        return super().forward(x, (*self.cross(y, memory), None), packing, modulation)


class Blocks(nn.Module):
    """A stack of blocks and its final norm."""

    def __init__(self, config: ViTConfig, blocks: Sequence[Block]):
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.norm = ModulatedLayerNorm(config.hidden_size, config.norm_affine)
        self.checkpointing = False

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        modulation: Iterator[Tables] | None = None,
        cond: Tensor | None = None,
        memories: Sequence[Memory] | None = None,
        levels: list[Tensor] | None = None,
    ) -> Tensor:
        """x [N, D]; modulation: the tables of each block, asked for as it comes, then the final norm's if it has any.

        Without adaLN the condition [R, D] is a token in front of each sample, set anew before every block.
        memories: what each block's cross-attention sees. levels: receives the stream behind each block.
        """
        branch: Branch = None
        modulation = iter(()) if modulation is None else modulation
        if cond is not None:
            rows = cond.index_select(0, packing.cond_index).to(x.dtype)  # [S, D]
            x = ops.prepend_tokens(rows[:, None], x, packing)
            first = packing.cu_seqlens[:-1].long()
        for i, block in enumerate(self.layers):
            if cond is not None and branch is not None:
                x, branch = add_branch(x, branch, packing).index_copy(0, first, rows), None
            tables = next(modulation, (None,) * 6)
            memory = None if memories is None else memories[i]
            if self.checkpointing and torch.is_grad_enabled():
                args = block, x, branch, packing, tables, memory  # a block draws nothing: no random state to keep
                x, branch = checkpoint(*args, use_reentrant=False, preserve_rng_state=False)
            else:
                x, branch = block(x, branch, packing, tables, memory)
            if levels is not None:
                levels.append(add_branch(x, branch, packing))
        _, y = self.norm(x, branch, packing, *next(modulation, ()))
        return y if cond is None else ops.split_tokens(y, 1, packing)[1]


def add_branch(x: Tensor, branch: tuple[Tensor, Tensor | None, Tensor | None], packing: Packing) -> Tensor:
    """x + gate·h [N, D], where no norm follows that would do it."""
    h, h_bias, gate = branch
    h = ops.bias_gradient(h, h_bias)
    return x + h if gate is None else x + per_token(gate, packing).to(x.dtype) * h


def per_token(rows: Tensor, packing: Packing) -> Tensor:
    """Each token the row of its sample: rows [R, D] to [N, D]."""
    lengths = packing.cu_seqlens.diff()
    return rows.index_select(0, packing.cond_index.repeat_interleave(lengths, output_size=packing.num_tokens))


def initialize_blocks(model: nn.Module) -> None:
    """Attention and MLP weights Xavier-uniform, q, k and v as matrices of their own; biases 0 or nearly."""
    for module in model.modules():
        if isinstance(module, Attention | CrossAttention):
            parts = (module.qkv,) if isinstance(module, Attention) else (module.q, module.kv)
            for linear in (*parts, module.proj):
                for matrix in linear.weight.split(module.proj.out_features):
                    nn.init.xavier_uniform_(matrix)
                nn.init.zeros_(linear.bias)
        elif isinstance(module, Mlp):
            for linear in (module.fc1, module.fc2):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.normal_(linear.bias, std=1e-6)


class Head(nn.Module):
    """The transposed convolution of kernel and stride P that un-patchifies, left as patches: one bias a channel."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.area = config.patch_size**2
        self.weight = nn.Parameter(torch.empty(2 * config.channels * self.area, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(2 * config.channels))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias[:, None].expand(-1, self.area).flatten()  # [2·C·P·P]
        return F.linear(x, self.weight, bias)


class UMD(nn.Module):
    """One autoencoder for noised and noise-free, masked and whole images."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        C, P, D, L = config.channels, config.patch_size, config.hidden_size, config.num_patches
        self.t_embedder = TimestepEmbedder(config)
        self.y_embedder = LabelEmbedder(config) if config.num_classes > 0 else None
        # Shift, scale, gate twice a block, shift and scale of the decoder's final norm.
        self.adaLN_modulation = build_modulation(config) if config.adaLN else None

        self.x_embedder = Linear(C * P * P, D)
        self.pos_embed = nn.Parameter(torch.empty(L, D))
        self.cls_token = nn.Parameter(torch.zeros(config.num_cls, D))
        self.encoder = Blocks(config, [Block(config) for _ in range(config.depth)])

        self.mask_token = nn.Parameter(torch.empty(D))
        self.decoder_pos_embed = nn.Parameter(torch.empty(L, D))
        context = D if config.decoder == "cross" else None
        self.decoder = Blocks(config, [Block(config, context) for _ in range(config.decoder_depth)])
        self.head = Head(config)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        initialize_blocks(self)
        lecun_normal(self.x_embedder)
        lecun_normal(self.t_embedder)
        if self.y_embedder is not None:
            nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
            lecun_normal(self.y_embedder)
        if self.adaLN_modulation is not None:  # the zero of adaLN-zero: every block starts as the identity
            self.adaLN_modulation.zero()
        nn.init.normal_(self.pos_embed, std=self.config.num_patches**-0.5)
        nn.init.normal_(self.decoder_pos_embed, std=self.config.num_patches**-0.5)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that AdamW must not decay: biases, CLS and mask token. All others are decayed."""
        biases = {name for name, _ in self.named_parameters() if name.endswith("bias")}
        return biases | {"cls_token", "mask_token"}

    def set_checkpointing(self, on: bool) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.encoder.checkpointing = self.decoder.checkpointing = on

    def forward(
        self,
        patches: Tensor,
        ids_keep: Tensor,
        batch: Layout,
        timesteps: Tensor,
        labels: Tensor | None = None,
        ids_predict: Tensor | None = None,
        conditions: Conditions | None = None,
    ) -> Tensor:
        """Predict x̂0 and ε̂ of every patch from the visible ones.

        Args:
            patches: [sum K, C·P·P], visible patches, sample after sample.
            ids_keep: int64 [sum K], their places among the S·L patches of the batch.
            batch: the packings; sample s uses condition `cond_index[s]`.
            timesteps: int64 [R], model times 0..T of the distinct conditions.
            labels: int64 [R] in 0..num_classes (the last is the null class), or None: the null class.
            ids_predict: int64, as many as `batch` was made for, sample after sample: the places that a cross decoder
                predicts; None: all.
            conditions: with those of `timesteps` and `labels`, if they are made already.

        Returns:
            [S·L, 2·C·P·P]: x̂0, then ε̂; 0 at places that are not predicted.
        """
        if conditions is None:
            cond, encoder_mod, decoder_mod = self.condition(timesteps, labels)  # [R, D], tables of [R, D] as asked for
        else:
            cond, tables = conditions(timesteps, labels)  # [R, D], [R, M·D]
            encoder_mod, decoder_mod = self.modulation(tables.split(self.config.modulation_widths, dim=1).__getitem__)
        with span("encoder"):
            tokens = self.encode(patches, ids_keep, batch, cond, encoder_mod)  # [sum (num_cls + K), D]
        with span("decoder"):
            x = residual(tokens, self.config)
            x = ops.scatter_tokens(  # [S·(1 + L), D]
                x, batch.encoder, ids_keep, self.config.num_cls, self.mask_token, self.decoder_pos_embed
            )
            if self.config.decoder == "cross":
                return self.decode_cross(x, tokens, batch, cond, decoder_mod, ids_predict)
            x = self.decoder(x, batch.decoder_blocks, decoder_mod, None if self.config.adaLN else cond)  # same shape
            _, x = ops.split_tokens(x, 1, batch.decoder)  # [S·L, D]
        with span("head"):
            return self.head(x)  # [S·L, 2·C·P·P]

    def decode_cross(
        self, x: Tensor, tokens: Tensor, batch: Layout, cond: Tensor, modulation: Iterator[Tables], ids: Tensor | None
    ) -> Tensor:
        """Queries: of x [S·(1 + L), D] the patches `ids`, hidden ones as mask tokens, visible ones (whose noise is to
        be predicted) as their own tokens. Keys: the encoder's tokens, without adaLN the condition in front of them."""
        S, L = batch.patches.num_samples, self.config.num_patches
        if not self.config.adaLN:
            rows = cond.index_select(0, batch.encoder_blocks.cond_index).to(tokens.dtype)  # [S, D]
            tokens = ops.prepend_tokens(rows[:, None], tokens, batch.encoder_blocks)
        places = torch.arange(S * L, device=x.device) if ids is None else ids
        x = x.index_select(0, places + places // L + 1)  # [Q, D]
        memories = [
            Memory(attention.memory(tokens, batch.encoder_blocks), batch.decoder_blocks, batch.encoder_blocks)
            for attention in (cast(CrossAttention, block.attn) for block in self.decoder.layers)
        ]
        x = self.decoder(x, batch.decoder_blocks, modulation, memories=memories)  # [Q, D]
        with span("head"):
            prediction = self.head(x)  # [Q, 2·C·P·P]
        if ids is None:
            return prediction
        return prediction.new_zeros(S * L, prediction.shape[1]).index_copy(0, ids, prediction)

    def condition(
        self, timesteps: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, Iterator[tuple[Tensor, ...]], Iterator[tuple[Tensor, ...]]]:
        """Condition [R, D], and the modulation of encoder and decoder: iterators that make each block's tables in turn,
        6 of [R, D], then 2 of the decoder's final norm. In the parameters' own precision.
        """
        with span("adaLN"), torch.autocast(timesteps.device.type, enabled=False):
            c = self.t_embedder(timesteps)  # [R, D]
            if self.y_embedder is not None:
                null = torch.full_like(timesteps, self.config.num_classes)
                c = c + self.y_embedder(null if labels is None else labels)
            if self.adaLN_modulation is None:
                return c, iter(()), iter(())
            tables = self.adaLN_modulation(F.silu(c))
        encoder, decoder = self.modulation(tables)
        return c, encoder, decoder

    def modulation(self, tables: Callable[[int], Tensor]) -> tuple[Iterator[tuple[Tensor, ...]], ...]:
        """Of encoder and decoder, from what makes each block's tables side by side: [R, 6·D], the last [R, 2·D]."""
        depth, last = self.config.depth, self.config.depth + self.config.decoder_depth

        def block(i: int) -> tuple[Tensor, ...]:
            return tables(i).split(self.config.hidden_size, dim=1)

        return map(block, range(depth)), map(block, range(depth, last + 1))

    def encode(
        self, patches: Tensor, ids_keep: Tensor, batch: Layout, cond: Tensor, modulation: Iterator[Tables],
        levels: list[Tensor] | None = None,
    ) -> Tensor:  # fmt: skip
        """Encoder tokens after the final norm, CLS tokens first: [sum (num_cls + K), D]. levels: see `Blocks`."""
        x = residual(self.x_embedder(patches), self.config)  # [sum K, D]
        x = ops.add_positions(x, ids_keep, self.pos_embed, batch.patches.num_samples)
        cls = self.cls_token.expand(batch.patches.num_samples, -1, -1)
        x = ops.prepend_tokens(cls, x, batch.encoder)
        return self.encoder(x, batch.encoder_blocks, modulation, None if self.config.adaLN else cond, levels=levels)

    def represent(self, x: Tensor, timesteps: Tensor | None = None) -> Tensor:
        """The averaged CLS tokens of whole images: [B, C, H, W] to fp32 [B, D].

        timesteps: model time int64 [1] of all images; default 0, the noise-free step.
        """
        B, L = len(x), self.config.num_patches
        self._check_image(x)
        timesteps = torch.zeros(1, dtype=torch.int64, device=x.device) if timesteps is None else timesteps
        batch = layout(self.config, (L,) * B, (0,) * B, x.device)
        patches = ops.patchify(x, self.config.patch_size).flatten(0, 1)
        cond, encoder_mod, _ = self.condition(timesteps)
        tokens = self.encode(patches, torch.arange(B * L, device=x.device), batch, cond, encoder_mod)
        cls, _ = ops.split_tokens(tokens, self.config.num_cls, batch.encoder)
        return cls.float().mean(dim=1) if cls.dtype != torch.float64 else cls.mean(dim=1)

    def denoise(
        self, x_t: Tensor, timesteps: Tensor, labels: Tensor | None = None, conditions: Conditions | None = None
    ) -> tuple[Tensor, Tensor]:
        """(x̂0, ε̂), each [B, C, H, W] in x_t's type, of whole noisy images.

        timesteps: int64 [B] model times; labels: int64 [B] in 0..num_classes, or None for the null class.
        conditions: with those of these times and labels, if they are made already.
        """
        B, L = len(x_t), self.config.num_patches
        self._check_image(x_t)
        if labels is not None and self.y_embedder is None:
            raise UserError("this model was trained without labels; fine-tune it with labels first (umd finetune)")
        batch = layout(self.config, (L,) * B, None, x_t.device)
        patches = ops.patchify(x_t, self.config.patch_size).flatten(0, 1)
        ids = torch.arange(B * L, device=x_t.device)
        prediction = self(patches, ids, batch, timesteps, labels, conditions=conditions)
        return self.to_images(prediction.to(x_t.dtype))

    def to_images(self, prediction: Tensor) -> tuple[Tensor, Tensor]:
        """[B·L, 2·C·P·P] to (x̂0, ε̂), each [B, C, H, W]."""
        both = prediction.view(-1, self.config.num_patches, 2, prediction.shape[-1] // 2).unbind(2)
        x_start, eps = (ops.unpatchify(part, self.config.image_size, self.config.patch_size) for part in both)
        return x_start, eps

    def _check_image(self, x: Tensor) -> None:
        expected = (self.config.channels, *self.config.image_size)
        if tuple(x.shape[1:]) != expected:
            raise UserError(
                f"images: expected [B, {', '.join(map(str, expected))}] for this model, got {list(x.shape)}"
            )
