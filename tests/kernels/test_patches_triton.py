"""gather_patches as a kernel: against its definition in fp64, on every path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from umd.kernels import backend, patches
from umd.kernels.patches import gather_patches, gather_patches_ref
from umd.kernels.triton.patches import gather_patches_fwd

TYPES = [torch.float32, torch.bfloat16, torch.float16]
NOISE_ERROR = 4e-6  # of ε, whose log, sin and cos round otherwise in a kernel


def corruption(B=4, n=3, C=3, h=2, w=3, P=4, dtype=torch.float32, seed=0, given=False, device="cpu"):
    """Arguments of gather_patches for images of h × w patches; sample s keeps 1 to h·w of them."""
    generator = torch.Generator().manual_seed(seed)
    L = h * w
    keep = torch.randint(1, L + 1, (B,), generator=generator).tolist()
    ids = [s * L + torch.rand(L, generator=generator).argsort()[:k] for s, k in enumerate(keep)]
    angle = torch.rand(n, generator=generator) * 1.4 + 0.1
    noise = torch.randint(-(2**62), 2**62, (n,), generator=generator)
    if given:
        noise = torch.randn(n, C, h * P, w * P, generator=generator)
    x_start = torch.randn(B, C, h * P, w * P, generator=generator).to(dtype)
    return *(t.to(device) for t in (x_start, torch.cat(ids), angle.cos(), angle.sin(), noise)), P


def wide(*args):
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def check(op, args):
    """op rounds once, to the type of x_start: half a unit in the last place, beyond the error of ε and of fp32 sums."""
    found, exact = op(*args), gather_patches_ref(*wide(*args))
    assert found.dtype == args[0].dtype and found.shape == exact.shape
    allowed = 0.501 * torch.finfo(found.dtype).eps * exact.abs() + NOISE_ERROR
    if found.dtype == torch.float16:
        allowed = allowed.clamp(min=2**-24)  # where its numbers are subnormal
    error = (found.double() - exact).abs()
    assert (error <= allowed).all(), f"off by {error.max():.3g}"


@settings(max_examples=60)
@given(
    B=st.integers(1, 4),
    noised=st.floats(0, 1),
    C=st.integers(1, 5),
    h=st.integers(1, 3),
    w=st.integers(1, 3),
    P=st.sampled_from([1, 2, 2, 3, 4, 4, 6, 8]),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 1000),
    given=st.booleans(),
)
def test_random_shapes(B, noised, C, h, w, P, dtype, seed, given):
    args = corruption(B, round(noised * B), C, h, w, P, dtype, seed, given)
    with backend.kernels("triton"):
        check(gather_patches, args)


# The published sizes; patches wider than a tile; rows of a group of four that spans two patches, and of odd length.
SIZES = [(3, 16, 16, 4), (4, 16, 16, 2), (3, 2, 2, 16), (3, 2, 3, 8), (1, 3, 5, 2), (2, 3, 2, 5), (3, 2, 1, 14)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("C, h, w, P", SIZES)
def test_published_sizes(device, C, h, w, P, dtype):
    check(gather_patches, corruption(3, 2, C, h, w, P, dtype, device=device))


def test_coefficients_of_half_precision(device):
    x_start, ids_keep, a, b, noise, P = corruption(dtype=torch.bfloat16, device=device)
    check(gather_patches, (x_start, ids_keep, a.bfloat16(), b.bfloat16(), noise, P))


def test_nothing_kept(device):
    x_start, ids_keep, *rest = corruption(device=device)
    assert gather_patches(x_start, ids_keep[:0], *rest).shape == (0, 48)


def test_any_strides(device):
    """channels_last images, and every other row of a batch."""
    args = corruption(given=True, device=device)
    plain = gather_patches(*args)
    strided = args[0].to(memory_format=torch.channels_last), args[1].repeat_interleave(2)[::2]
    noise = args[4].to(memory_format=torch.channels_last)
    assert not strided[0].is_contiguous()
    assert torch.equal(gather_patches(*strided, *args[2:4], noise, args[5]), plain)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_repeats_bit_for_bit(device):
    args = corruption(B=5, n=3, h=4, w=4, device=device)
    first = gather_patches(*args)
    assert all(torch.equal(gather_patches(*args), first) for _ in range(3))


def test_noise_free_samples_are_untouched(device):
    """Bit for bit, in every type."""
    for dtype in TYPES:
        args = corruption(B=3, n=0, dtype=dtype, device=device)
        assert torch.equal(gather_patches(*args), gather_patches_ref(*args))


def test_neither_reads_nor_writes_elsewhere(device):
    """What is not kept may be NaN."""
    x_start, ids_keep, *rest = corruption(B=3, n=2, device=device)
    rows = patches.patchify(torch.ones_like(x_start), 4) * torch.nan
    kept = patches.patchify(x_start, 4)
    rows.flatten(0, 1)[ids_keep] = kept.flatten(0, 1)[ids_keep]
    poisoned = patches.unpatchify(rows, x_start.shape[2:], 4)
    assert poisoned.isnan().any()
    found = gather_patches(poisoned, ids_keep, *rest)
    assert torch.equal(found, gather_patches(x_start, ids_keep, *rest)) and found.isfinite().all()


@pytest.mark.parametrize("given", [False, True], ids=["seed", "given"])
def test_operator(device, given):
    args = corruption(B=2, n=1, P=2, given=given, device=device)
    with backend.kernels("triton"):
        torch.library.opcheck(gather_patches_fwd.library, args)


def test_compiles_whole(device):
    args = corruption(device=device)
    compiled = torch.compile(gather_patches, fullgraph=True)(*args)
    torch.testing.assert_close(compiled, gather_patches(*args), rtol=0, atol=NOISE_ERROR if device == "cuda" else 0)


REFUSED = [
    ("x_start", lambda x: x[0], r"x_start: expected floating \[B, C, H, W\], got \(3, 8, 12\)"),
    ("x_start", lambda x: x.long(), "x_start: expected floating .* got .*int64"),
    ("patch_size", lambda P: 3, "patch_size: expected a divisor of H = 8 and W = 12, got 3"),
    ("patch_size", lambda P: 0, "patch_size: .* got 0"),
    ("ids_keep", lambda ids: ids.int(), r"ids_keep: expected int64 \[N\], got .*int32"),
    ("ids_keep", lambda ids: ids[None], "ids_keep: .* got"),
    ("sqrt_alpha", lambda a: a.repeat(2), r"sqrt_alpha: expected floating \[n\] with n <= B = 4, got \(6,\)"),
    ("sqrt_alpha", lambda a: a[0], r"sqrt_alpha: .* got \(\)"),
    ("sqrt_alpha", lambda a: a.int(), "sqrt_alpha: .* got .*int32"),
    ("sqrt_one_minus_alpha", lambda b: b[:2], r"sqrt_one_minus_alpha: expected float32 \[3\], got float32 \[2\]"),
    ("sqrt_one_minus_alpha", lambda b: b.half(), "sqrt_one_minus_alpha: .* got .*float16"),
    (
        "noise",
        lambda s: s.int(),
        r"noise: .* each sample, int64 \(3,\), or floating \(3, 3, 8, 12\), got \(3,\) .*int32",
    ),
    ("noise", lambda s: torch.zeros(4, 3, 8, 12), r"noise: .* got \(4, 3, 8, 12\)"),
    ("noise", lambda s: torch.zeros(3, 3, 8, 12).long(), "noise: .* got .*int64"),
    ("noise", lambda s: s.to("meta"), "noise: expected on cpu like x_start, got meta"),
    ("ids_keep", lambda ids: ids.to("meta"), "ids_keep: expected on cpu like x_start, got meta"),
]
NAMES = ["x_start", "ids_keep", "sqrt_alpha", "sqrt_one_minus_alpha", "noise", "patch_size"]


@pytest.mark.parametrize("name, change, message", REFUSED)
def test_wrong_arguments_are_refused_by_name(name, change, message):
    args = dict(zip(NAMES, corruption(), strict=True))
    args[name] = change(args[name])
    with pytest.raises(ValueError, match=message):
        gather_patches(**args)


MUTANTS = {
    "wrong sample index": ("sqrt_alpha_ptr + sample", "sqrt_alpha_ptr + 0 * sample"),
    "swapped coefficients": ("a[:, None] * x + b[:, None] * eps", "b[:, None] * x + a[:, None] * eps"),
    "noise of a neighbour": ("randn4x(seed, i // 4)", "randn4x(seed, i // 4 + 1)"),
    "one noise for all samples": ("noise_ptr + sample,", "noise_ptr + 0 * sample,"),
    "a noised sample left clean": ("& (sample < num_noised)", "& (sample < num_noised - 1)"),
    "channels interleaved": ("(col // (P * P)) * (H * W) + (col // P % P) * W", "(col // P) * W"),
    "rows of patches mixed up": ("(place // across) * (P * W)", "(place // across) * W"),
    "lanes swapped": ("tl.join(tl.join(n0, n2), tl.join(n1, n3))", "tl.join(tl.join(n0, n1), tl.join(n2, n3))"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(mutant, name):
    if not backend.INTERPRET:
        pytest.skip("kernels are compiled for the GPU here")
    found = mutant(patches, *MUTANTS[name])
    args = corruption(B=4, n=3, given=False)
    with backend.kernels("triton"):
        check(gather_patches, args)
        with pytest.raises(AssertionError):
            check(found.gather_patches, args)


def test_mutant_of_half_a_group_is_noticed(mutant):
    """P = 2: two patches share a group of four normal numbers."""
    if not backend.INTERPRET:
        pytest.skip("kernels are compiled for the GPU here")
    found = mutant(patches, "second = i % 4 >= 2", "second = i % 4 < 0")
    args = corruption(P=2)
    with backend.kernels("triton"):
        check(gather_patches, args)
        with pytest.raises(AssertionError):
            check(found.gather_patches, args)
