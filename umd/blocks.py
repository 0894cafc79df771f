"""The blocks of all networks: pre-norm attention and MLP, with adaLN modulation if there is a condition.

All samples of a batch lie in one packed stream `[N, D]`. Linear layers run once on the stream, attention stays inside
each sample. Letters as in `umd/model.py`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from umd import ops
from umd.config import ViTConfig
from umd.layers import GeluLinear, Linear
from umd.ops import Packing

# A branch not yet added to the residual stream: (h [N, D], bias, gate [R, D]). The bias is already included in h and
# still needs its gradient (see `Linear.split`).
Branch = tuple[Tensor, Tensor | None, Tensor | None] | None
Tables = tuple[Tensor | None, ...]  # block: shift, scale, gate of both branches; final norm: shift, scale


class ModulatedLayerNorm(nn.Module):
    """Adds the pending branch to the residual stream and normalises the sum, in one op."""

    def __init__(self, dim: int, affine: bool, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
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
        """Return r = x + gate·h [N, D] in x's type, and y = LN(r)·(1 + scale) + shift [N, D].

        y has h's type; without a branch it has the type of the following matrix products.
        """
        if branch is None:
            y = ops.modulated_layer_norm(
                x, packing, shift, scale, self.weight, self.bias, self.eps, dtype=ops.products_dtype(x)
            )
            return x, y
        h, h_bias, gate = branch
        return ops.gated_residual_layer_norm(
            x, h, packing, gate, shift, scale, self.weight, self.bias, self.eps, h_bias=h_bias
        )


class Attention(nn.Module):
    """Self-attention within each sample."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, packing: Packing) -> tuple[Tensor, Tensor | None]:
        """(h [N, D], bias): bias is included in h and still needs its gradient, or is None (see `Linear.split`)."""
        N, D = x.shape
        qkv, bias = self.qkv.split(x)  # [N, 3·D]
        qkv = qkv.view(N, 3, self.num_heads, D // self.num_heads)  # [N, 3, H, d]
        return self.proj.split(ops.varlen_attention(qkv, packing, bias=bias).view(N, D))


class Memory(NamedTuple):
    """The keys and values that the queries of one cross-attention see."""

    kv: Tensor  # [M, 2, H, d], keys then values
    packing: Packing  # of the queries; has as many samples as kv_packing
    kv_packing: Packing  # of kv


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
        """Keys and values [M, 2, H, d] of context [M, D']. They can be reused while the queries change."""
        _, y = self.norm(context, None, packing)
        return self.kv(y).unflatten(1, (2, self.num_heads, -1))

    def forward(self, x: Tensor, memory: Memory) -> tuple[Tensor, Tensor | None]:
        """x [N, dim] to (h [N, dim], bias), as `Attention.forward`."""
        q = self.q(x).unflatten(1, (self.num_heads, -1))  # [N, H, d]
        return self.proj.split(ops.varlen_cross_attention(q, *memory).flatten(1))


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int, exact: bool = False):
        """exact: GELU by the error function. Else the tanh approximation, for which this package has kernels."""
        super().__init__()
        self.fc1 = Linear(dim, hidden)
        self.fc2: Linear = Linear(hidden, dim) if exact else GeluLinear(hidden, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x [N, D] to (h [N, D], bias), as `Attention.forward`."""
        if not isinstance(self.fc2, GeluLinear):
            return self.fc2.split(F.gelu(self.fc1(x)))
        if ops.gelu_in_products() and self.fc1.splits:
            h, a = self.fc1.with_gelu(x)  # [N, hidden] each
            return self.fc2.split(h, gelu=a)
        return self.fc2.split(*self.fc1.split(x))


class Block(nn.Module):
    """x += gate1·Attn(LN(x)·(1+scale1)+shift1);  x += gate2·MLP(LN(x)·(1+scale2)+shift2).

    The second branch is not added here. It is handed to the next norm, so that gate, residual, norm and modulation are
    one op.
    context: width of the stream that Attn attends to; None: self-attention.
    """

    def __init__(self, config: ViTConfig, context: int | None = None):
        super().__init__()
        D, heads = config.hidden_size, config.num_heads
        self.norm1 = ModulatedLayerNorm(D, config.norm_affine, config.norm_eps)
        self.attn = Attention(D, heads) if context is None else CrossAttention(D, heads, context, config.norm_affine)
        self.norm2 = ModulatedLayerNorm(D, config.norm_affine, config.norm_eps)
        self.mlp = Mlp(D, int(D * config.mlp_ratio), exact=config.gelu == "exact")

    def forward(
        self,
        x: Tensor,
        branch: Branch,
        packing: Packing,
        modulation: Tables,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Branch]:
        """Stream x [N, D] and its pending branch to (x, the MLP's branch, not yet added).

        modulation: the block's 6 tables, each [R, D] or None. memory: for cross-attention.
        """
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        x, y = self.norm1(x, branch, packing, shift_msa, scale_msa)  # [N, D]
        attended = self.attn(y, packing if memory is None else memory)
        x, y = self.norm2(x, (*attended, gate_msa), packing, shift_mlp, scale_mlp)  # [N, D]
        return x, (*self.mlp(y), gate_mlp)


class CrossSelfBlock(Block):
    """x += CrossAttn(LN(x), memory), then a `Block`."""

    def __init__(self, config: ViTConfig, context: int):
        super().__init__(config)
        self.norm_cross = ModulatedLayerNorm(config.hidden_size, config.norm_affine, config.norm_eps)
        self.cross = CrossAttention(config.hidden_size, config.num_heads, context, config.norm_affine)

    def forward(
        self,
        x: Tensor,
        branch: Branch,
        packing: Packing,
        modulation: Tables,
        memory: Memory | None = None,
    ) -> tuple[Tensor, Branch]:
        """As `Block.forward`; memory is required."""
        x, y = self.norm_cross(x, branch, packing)  # [N, D]
        return super().forward(x, (*self.cross(y, memory), None), packing, modulation)


class Blocks(nn.Module):
    """A stack of blocks and its final norm."""

    def __init__(self, config: ViTConfig, blocks: Sequence[Block]):
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.norm = ModulatedLayerNorm(config.hidden_size, config.norm_affine, config.norm_eps)
        self.checkpointing = False

    def forward(
        self,
        x: Tensor,
        packing: Packing,
        modulation: Iterator[Tables] | None = None,
        cond: Tensor | None = None,
        memories: Sequence[Memory] | None = None,
        levels: list[Tensor] | None = None,
        normed: bool = True,
    ) -> Tensor:
        """Run all blocks and the final norm on x [N, D].

        Args:
            x: the stream.
            packing: of the stream, with the condition token if there is one.
            modulation: iterator of each block's tables, then those of the final norm if it has any. A table is
                requested just before its block runs.
            cond: [R, D], for a network without adaLN: the condition token in front of each sample. It is set to this
                value again before every block, and removed at the end.
            memories: for each block, the keys and values of its cross-attention.
            levels: a list to which the stream behind each block is appended.
            normed: False: leave out the final norm.
        """
        branch: Branch = None
        modulation = iter(()) if modulation is None else modulation
        if cond is not None:
            rows = F.embedding(packing.cond_index, cond).to(x.dtype)  # [S, D]
            x = ops.prepend_tokens(rows[:, None], x, packing)
            first = packing.cu_seqlens[:-1].long()
        for i, block in enumerate(self.layers):
            if cond is not None and branch is not None:
                x, branch = add_branch(x, branch, packing).index_copy(0, first, rows), None
            tables = next(modulation, (None,) * 6)
            memory = None if memories is None else memories[i]
            if self.checkpointing and torch.is_grad_enabled():
                args = block, x, branch, packing, tables, memory  # blocks draw no random numbers: no state to preserve
                x, branch = checkpoint(*args, use_reentrant=False, preserve_rng_state=False)
            else:
                x, branch = block(x, branch, packing, tables, memory)
            if levels is not None:
                levels.append(add_branch(x, branch, packing))
        if normed:
            _, y = self.norm(x, branch, packing, *next(modulation, ()))
        else:
            assert branch is not None
            y = add_branch(x, branch, packing)
        return y if cond is None else ops.split_tokens(y, 1, packing)[1]


def add_branch(x: Tensor, branch: tuple[Tensor, Tensor | None, Tensor | None], packing: Packing) -> Tensor:
    """x + gate·h [N, D], for places where no norm follows that would add the branch."""
    h, h_bias, gate = branch
    h = ops.bias_gradient(h, h_bias)
    return x + h if gate is None else x + ops.per_token(gate, packing).to(x.dtype) * h


def initialize_blocks(model: nn.Module) -> None:
    """Initialise attention and MLP: weights Xavier-uniform, with q, k and v as separate matrices.

    Biases are 0 in attention and N(0, 1e-6²) in the MLP.
    """
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
