"""The norms taken into another code's block: facebookresearch's DiT, with the lines that docs/kernels.md shows."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from umd.kernels.adaln import AdaLayerNorm, gated_residual_layer_norm, modulated_layer_norm
from umd.kernels.packing import pack

ROOT = Path(__file__).parents[2]
ORACLE = np.load(ROOT / "tests" / "data" / "dit_sigma0.npz")  # tests/data/README.md
D, HEADS, P = 64, 4, 2


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads, self.qkv, self.proj = num_heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        B, L, dim = x.shape
        q, k, v = self.qkv(x).view(B, L, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, L, dim))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class DiTBlock(nn.Module):
    """What facebookresearch's block has, by its names; `forward` is that of docs/kernels.md."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = Attention(hidden_size, num_heads), Mlp(hidden_size, 4 * hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))


def block_of_the_book() -> type[nn.Module]:
    text = (ROOT / "docs" / "kernels.md").read_text()
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", text, re.S) if "class FusedDiTBlock" in code)
    names = {"DiTBlock": DiTBlock}
    exec(code, names)
    return names["FusedDiTBlock"]


def weights(prefix: str, device: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): torch.from_numpy(ORACLE[name]).to(device)
        for name in ORACLE.files
        if name.startswith(prefix)
    }


def network(device: str) -> nn.ModuleList:
    blocks = nn.ModuleList(block_of_the_book()(D, HEADS) for _ in range(2)).to(device)
    blocks.load_state_dict(weights("blocks.", device))
    return blocks


def test_a_block_gives_their_numbers(device):
    c = torch.from_numpy(ORACLE["embed_c"]).to(device)  # [B, D]
    x = torch.from_numpy(ORACLE["embed_x"]).to(device)  # [B, L, D]
    for i, block in enumerate(network(device)):
        x = block(x, c)
        torch.testing.assert_close(x.cpu(), torch.from_numpy(ORACLE[f"block{i}"]), rtol=1e-5, atol=1e-5)


def test_blocks_get_their_gradients(device):
    """Of the mean of their `training_losses`, through both blocks."""
    head, blocks = weights("final_layer.", device), network(device)
    embed = weights("x_embedder.proj.", device)
    c = torch.from_numpy(ORACLE["embed_c"]).to(device)
    x = F.conv2d(torch.from_numpy(ORACLE["q_sample"]).to(device), embed["weight"], embed["bias"], stride=P)
    x = x.flatten(2).mT + torch.from_numpy(ORACLE["pos_embed"]).to(device)
    for block in blocks:
        x = block(x, c)
    shift, scale = F.linear(F.silu(c), head["adaLN_modulation.1.weight"], head["adaLN_modulation.1.bias"]).chunk(2, 1)
    eps = F.linear(modulated_layer_norm(x, shift=shift, scale=scale), head["linear.weight"], head["linear.bias"])
    noise = torch.from_numpy(ORACLE["noise"]).to(device)  # [B, C, H, W]
    B, C, H, W = noise.shape
    patches = noise.view(B, C, H // P, P, W // P, P).permute(0, 2, 4, 3, 5, 1).reshape(B, -1, P * P * C)
    F.mse_loss(eps, patches).backward()
    expected = weights("grads.blocks.", "cpu")
    found = {name: p.grad.cpu() for name, p in blocks.named_parameters()}
    assert found.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6 * float(largest), msg=name)


def dense_inputs(device: str) -> list[Tensor]:
    """x, h [B, L, D] and gate, shift, scale [B, D], views of one projection."""
    generator = torch.Generator().manual_seed(0)
    x, h = torch.randn(2, 3, 5, 24, generator=generator).to(device)
    return [x, h, *torch.randn(3, 72, generator=generator).to(device).chunk(3, 1)]


@pytest.mark.parametrize("rms", [False, True])
def test_samples_of_equal_length_are_a_packed_stream(device, rms):
    x, h, gate, shift, scale = dense_inputs(device)
    packing = pack([5] * 3, device=device)
    r, y = gated_residual_layer_norm(x, h, gate=gate, shift=shift, scale=scale, rms=rms)
    packed = gated_residual_layer_norm(
        x.flatten(0, 1), h.flatten(0, 1), packing, gate=gate, shift=shift, scale=scale, rms=rms
    )
    assert r.shape == y.shape == x.shape
    assert torch.equal(r.flatten(0, 1), packed[0]) and torch.equal(y.flatten(0, 1), packed[1])
    alone = modulated_layer_norm(x, shift=shift, scale=scale, rms=rms)
    assert torch.equal(alone.flatten(0, 1), modulated_layer_norm(x.flatten(0, 1), packing, shift, scale, rms=rms))


def test_the_module_has_torchs_parameters_and_norm(device):
    x = torch.randn(2, 5, 24, device=device)
    for ours, theirs in (
        (AdaLayerNorm(24, affine=True), nn.LayerNorm(24, eps=1e-6)),
        (AdaLayerNorm(24, affine=True, rms=True), nn.RMSNorm(24, eps=1e-6)),
    ):
        generator = torch.Generator().manual_seed(1)
        state = {name: torch.randn(p.shape, generator=generator) for name, p in theirs.state_dict().items()}
        theirs.load_state_dict(state)
        ours.load_state_dict(state)
        torch.testing.assert_close(ours.to(device)(x), theirs.to(device)(x))
    assert not list(AdaLayerNorm(24).parameters())


def test_under_autocast_as_without_our_norms(device):
    """fp32 stream, bf16 branches and tables: as far from fp32 as the block is with torch's norms."""
    c, x, expected = (torch.from_numpy(ORACLE[name]).to(device) for name in ("embed_c", "embed_x", "block0"))
    ours, theirs = network(device)[0], DiTBlock(D, HEADS).to(device)
    theirs.load_state_dict(ours.state_dict())
    with torch.autocast(x.device.type, torch.bfloat16):
        out = ours(x, c)
        tables = theirs.adaLN_modulation(c).unsqueeze(1).chunk(6, 2)
        r = x + tables[2] * theirs.attn(theirs.norm1(x) * (1 + tables[1]) + tables[0])
        plain = r + tables[5] * theirs.mlp(theirs.norm2(r) * (1 + tables[4]) + tables[3])
    assert out.dtype == plain.dtype == torch.float32
    ours_off, plain_off = ((y - expected).norm() for y in (out, plain))
    assert 0 < ours_off < 1.5 * plain_off
    out.sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in ours.parameters())


def test_a_packing_kept_serves_whoever_comes_next(device):
    """Validation before training, and a mode of tensors without data before and behind real ones."""
    module = AdaLayerNorm(24)
    for length, modes in ((6, (torch.inference_mode, torch.enable_grad)), (7, (FakeTensorMode, torch.enable_grad))):
        for mode in (*modes, *modes):
            with mode():
                x = torch.zeros(2, length, 24, requires_grad=mode is torch.enable_grad)
                y = module(x, shift=torch.ones(2, 24))
            assert y.shape == x.shape
        y.sum().backward()
        assert (x.grad == 0).all()


def test_compiles_whole(device):
    """No graph break, at a second shape too; a packing is made when it is traced."""
    x, h, *tables = dense_inputs(device)
    module = AdaLayerNorm(24)

    def op(x, h, gate, shift, scale):
        return module(x, shift, scale, h, gate)

    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for x_, h_ in ((x, h), (x[:, :4], h[:, :4])):
        for a, b in zip(op(x_, h_, *tables), compiled(x_, h_, *tables), strict=True):
            assert torch.equal(a, b)


def test_what_does_not_fit_is_named(device):
    x, h, gate, shift, scale = dense_inputs(device)
    with pytest.raises(ValueError, match=r"^x: expected floating-point \[B, L, D\], got float32 \[15, 24\]"):
        modulated_layer_norm(x.flatten(0, 1))
    with pytest.raises(ValueError, match=r"^h: expected .*\[3, 5, 24\], got float32 \[2, 5, 24\]"):
        gated_residual_layer_norm(x, h[:2])
    with pytest.raises(ValueError, match="^gate: expected 3 rows or more"):
        gated_residual_layer_norm(x, h, gate=gate[:2])
    with pytest.raises(ValueError, match="^gate: expected None without a branch h"):
        AdaLayerNorm(24)(x, shift, scale, gate=gate)
    with pytest.raises(ValueError, match=r"^x: expected a sample at least, got \[0, 5, 24\]"):
        modulated_layer_norm(x[:0])
