"""Patches of corrupted images: against torch's own unfold, and against the formula with loops."""

import pytest
import torch
import torch.nn.functional as F

from umd.kernels.patches import gather_patches_ref, patchify, unpatchify
from umd.kernels.philox import philox_randn

SHAPES = [
    (2, 3, 8, 8, 4),
    (1, 1, 6, 4, 2),
    (3, 4, 4, 12, 2),
    (2, 5, 3, 3, 1),
    (1, 3, 8, 8, 8),
]  # B, C, H, W, P


def images(B, C, H, W, dtype=torch.float64, seed=0):
    return torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_patchify_is_unfold(shape):
    """Patches in reading order, and in a patch the channel slowest, then rows: the order of im2col."""
    *size, P = shape
    x = images(*size)
    assert torch.equal(patchify(x, P), F.unfold(x, P, stride=P).mT)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpatchify_is_the_inverse(shape):
    B, C, H, W, P = shape
    x = images(B, C, H, W)
    assert torch.equal(unpatchify(patchify(x, P), (H, W), P), x)


def test_patchify_of_one_pixel():
    x = torch.zeros(1, 2, 4, 6)
    x[0, 1, 3, 4] = 1  # channel 1; patch row 1, column 2; inside it row 1, column 0
    assert patchify(x, 2)[0].nonzero().tolist() == [[1 * 3 + 2, 1 * 4 + 1 * 2 + 0]]


def corruption(B=4, n=3, C=3, H=4, W=8, P=2, dtype=torch.float64):
    x_start, eps = images(B, C, H, W, dtype), images(n, C, H, W, dtype, seed=1)
    angle = torch.linspace(0.2, 1.3, n, dtype=dtype)
    L = H * W // P**2
    permutation = torch.randperm(B * L, generator=torch.Generator().manual_seed(2))
    ids_keep = torch.cat([s * L + permutation[permutation // L == s][: 3 + s] % L for s in range(B)])
    return x_start, ids_keep, angle.cos(), angle.sin(), eps, P


def by_loops(x_start, ids_keep, sqrt_alpha, sqrt_one_minus_alpha, eps, P):
    B, C, H, W = x_start.shape
    rows = []
    for index in ids_keep.tolist():
        s, place = divmod(index, (H // P) * (W // P))
        top, left = place // (W // P) * P, place % (W // P) * P
        window = (s, slice(None), slice(top, top + P), slice(left, left + P))
        patch = x_start[window]
        if s < len(sqrt_alpha):
            patch = sqrt_alpha[s] * patch + sqrt_one_minus_alpha[s] * eps[window]
        rows.append(patch.flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("n", [0, 1, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gather_patches_by_loops(n, dtype):
    args = corruption(n=n, dtype=dtype)
    found = gather_patches_ref(*args)
    assert found.dtype == dtype
    torch.testing.assert_close(found, by_loops(*args))


def test_noise_from_seeds():
    """A sample's seed stands for the noise that philox_randn makes of it."""
    x_start, ids_keep, a, b, _, P = corruption(dtype=torch.float32)
    seed = torch.tensor([1234567890123, 5, 6])
    eps = torch.stack([philox_randn(one, x_start.shape[1:]) for one in seed])
    found = gather_patches_ref(x_start, ids_keep, a, b, seed, P)
    assert torch.equal(found, gather_patches_ref(x_start, ids_keep, a, b, eps, P))
    assert not torch.equal(found, gather_patches_ref(x_start, ids_keep, a, b, seed + 1, P))


def test_noise_free_samples_are_untouched():
    x_start, ids_keep, a, b, eps, P = corruption(n=2)
    clean = ids_keep >= 2 * 8
    patches = patchify(x_start, P).flatten(0, 1)[ids_keep]
    found = gather_patches_ref(x_start, ids_keep, a, b, eps, P)
    assert torch.equal(found[clean], patches[clean]) and not torch.isclose(found[~clean], patches[~clean]).any()


def test_comparison_notices_swapped_samples():
    args = corruption()
    swapped = (args[0], args[1], args[2].flip(0), *args[3:])
    assert not torch.allclose(gather_patches_ref(*swapped), by_loops(*args))
