"""masked_diffusion_loss as kernels: losses and gradient against the definition in fp64, on every path."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from umd.kernels import backend, loss
from umd.kernels.loss import masked_diffusion_loss, masked_diffusion_loss_ref
from umd.kernels.patches import patchify, unpatchify
from umd.kernels.triton.loss import masked_diffusion_loss_bwd, masked_diffusion_loss_fwd

TYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(
    B=4, n=2, K=3, K_clean=2, C=3, h=2, w=3, P=2, dtype=torch.float32, x_dtype=torch.float32, seed=0, given=False,
    device="cpu", ignored=None,
):  # fmt: skip
    """Arguments of masked_diffusion_loss: n noised samples with K of h·w patches visible, the others with K_clean.

    ignored: hidden patches of each noised and of each other sample that are not scored; None: the argument left out.
    """
    generator = torch.Generator().manual_seed(seed)
    L = h * w
    keep = [K] * n + [K_clean] * (B - n)
    orders = [s * L + torch.rand(L, generator=generator).argsort() for s in range(B)]
    ids = torch.cat([order[:k] for order, k in zip(orders, keep, strict=True)])
    prediction = torch.randn(B * L, 2 * C * P * P, generator=generator).to(dtype)
    x_start = torch.randn(B, C, h * P, w * P, generator=generator).to(x_dtype)
    noise = torch.randint(-(2**62), 2**62, (n,), generator=generator)
    if given:
        noise = torch.randn(n, C, h * P, w * P, generator=generator)
    prediction, x_start, ids, noise = (t.to(device) for t in (prediction, x_start, ids, noise))
    if ignored is None:
        return prediction, x_start, ids, n * K, n, noise, P
    spared = [ignored[0]] * n + [ignored[1]] * (B - n)
    rest = torch.cat([order[L - i :] for order, i in zip(orders, spared, strict=True)]).to(device)
    return prediction, x_start, ids, n * K, n, noise, P, rest, n * ignored[0]


def with_gradient(op, prediction, *rest, upstream=1.0):
    prediction = prediction.detach().requires_grad_()
    total, parts = op(prediction, *rest)
    assert not parts.requires_grad
    return total.detach(), parts, *torch.autograd.grad(total * upstream, prediction)


def check(op, args, upstream=1.0):
    """The losses to fp32's error, the gradient to the rounding of its type: half a unit in its last place."""
    prediction, x_start, *rest = args
    total, parts, gradient = with_gradient(op, *args, upstream=upstream)
    assert total.dtype == parts.dtype == torch.float32 and gradient.dtype == prediction.dtype
    exact = with_gradient(masked_diffusion_loss_ref, prediction.double(), x_start.double(), *rest, upstream=upstream)
    torch.testing.assert_close(total.double(), exact[0], rtol=3e-6, atol=0)
    torch.testing.assert_close(parts.double(), exact[1], rtol=3e-6, atol=0)
    assert torch.equal(gradient == 0, exact[2] == 0)
    info = torch.finfo(gradient.dtype)
    allowed = 0.501 * info.eps * exact[2].abs() + 4e-6 * exact[2].abs().max()  # the second: rounding in ε
    error = (gradient.double() - exact[2]).abs()
    assert (error <= allowed.clamp(min=info.smallest_normal * info.eps)).all(), f"dprediction: off by {error.max():.3g}"


@settings(max_examples=60)
@given(
    B=st.integers(1, 4),
    noised=st.floats(0, 1),
    visible=st.floats(0, 1),
    visible_clean=st.floats(0, 1),
    C=st.integers(1, 4),
    h=st.integers(1, 3),
    w=st.integers(2, 3),
    P=st.sampled_from([1, 2, 2, 3, 4, 4, 6, 8]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    x_dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 1000),
    given=st.booleans(),
    upstream=st.floats(-4, 4).filter(lambda x: abs(x) > 0.01),
)
def test_random_shapes(
    B, noised, visible, visible_clean, C, h, w, P, dtype, x_dtype, seed, given, upstream
):  # fmt: skip
    L = h * w
    K, K_clean = max(1, round(visible * L)), round(visible_clean * (L - 1))
    args = case(B, round(noised * B), K, K_clean, C, h, w, P, dtype, x_dtype, seed, given)
    with backend.kernels("triton"):
        check(masked_diffusion_loss, args, upstream)


# UMD, MAE, MaskDiT and DiT: (n, K, K_clean) of a batch of 4 with 16 patches.
SETTINGS = {"umd": (2, 10, 4), "mae": (0, 1, 4), "maskdit": (4, 8, 1), "dit": (4, 16, 1), "fine-tune": (3, 16, 4)}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_published_settings(device, name, dtype):
    n, K, K_clean = SETTINGS[name]
    for C, P in ((3, 4), (4, 2)):
        check(masked_diffusion_loss, case(4, n, K, K_clean, C, 4, 4, P, dtype, device=device))


@pytest.mark.parametrize("n, K, K_clean, ignored", [(2, 10, 4, (4, 9)), (0, 1, 4, (0, 11)), (3, 16, 4, (0, 5))])
def test_hidden_patches_that_are_ignored(device, n, K, K_clean, ignored):
    """Predictions there may be anything."""
    for dtype in (torch.float32, torch.bfloat16):
        args = case(4, n, K, K_clean, 3, 4, 4, 2, dtype, device=device, ignored=ignored)
        check(masked_diffusion_loss, args)
        expected = with_gradient(masked_diffusion_loss, *args)
        poisoned = args[0].index_fill(0, args[7], 1e4)
        for a, b in zip(with_gradient(masked_diffusion_loss, poisoned, *args[1:]), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("C, h, w, P", [(3, 16, 16, 4), (3, 2, 3, 16), (3, 3, 2, 8), (1, 3, 5, 2), (2, 3, 2, 5)])
def test_sizes(device, C, h, w, P):
    """Of many programs; of patches wider than a program's tile; of odd rows."""
    check(masked_diffusion_loss, case(3, 2, h * w // 2, 1, C, h, w, P, torch.bfloat16, device=device))


def test_large_predictions(device):
    """A mean of 1000, whose square has six digits before the point."""
    prediction, *rest = case(h=4, w=4, device=device)
    check(masked_diffusion_loss, (prediction + 1000, *rest))


def test_only_what_is_scored_is_read(device):
    """Visible patches by ε̂, hidden ones by x̂0, visible noise-free ones not at all: the rest may be NaN."""
    if not backend.use_triton(torch.empty(0, device=device)):
        pytest.skip("the definition multiplies by 0")
    for with_eps in (False, True):
        prediction, x_start, ids, *rest = args = case(h=3, w=3, P=4, given=with_eps, device=device)
        D, noised = prediction.shape[1] // 2, rest[1] * 9
        hidden = torch.ones(len(prediction), dtype=torch.bool, device=device).index_fill_(0, ids, False)
        seen = ids[ids < noised]
        scored, image = torch.full_like(prediction, torch.nan), patchify(x_start, 4)
        scored[hidden, :D] = prediction[hidden, :D]
        scored[seen, D:] = prediction[seen, D:]
        image = image.where(hidden.view(-1, 9, 1), torch.nan)
        found = with_gradient(masked_diffusion_loss, scored, unpatchify(image, x_start.shape[2:], 4), ids, *rest)
        for a, b in zip(found, with_gradient(masked_diffusion_loss, *args), strict=True):
            assert torch.equal(a, b) and a.isfinite().all()


def test_any_strides(device):
    prediction, x_start, *rest = args = case(device=device)
    strided = prediction.T.contiguous().T, x_start.to(memory_format=torch.channels_last)
    assert not any(t.is_contiguous() for t in strided)
    for a, b in zip(
        with_gradient(masked_diffusion_loss, *strided, *rest), with_gradient(masked_diffusion_loss, *args), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_repeats_bit_for_bit(device):
    args = case(h=8, w=8, K=30, K_clean=16, dtype=torch.bfloat16, device=device)  # partial sums of several programs
    first = with_gradient(masked_diffusion_loss, *args)
    for _ in range(3):
        again = with_gradient(masked_diffusion_loss, *args)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_each_output_of_the_operator_has_its_gradient(device):
    """The public function detaches the parts; inside, their gradients are right too.

    Half of the samples are noised: total = ¼·eps + ¼·x0 + ½·clean, and each part has predictions of its own, so that
    the gradient of a part is that of the total times 4, 4 or 2.
    """
    prediction, x_start, ids, K, n, noise, P = case(device=device)
    roles = torch.zeros(len(prediction), dtype=torch.uint8, device=device).index_fill_(0, ids, 1)
    counts = n, K, n * 6 - K, 2 * 6 - 4  # noised samples; patches in each mean
    D, noised = prediction.shape[1] // 2, n * 6
    _, _, of_total = with_gradient(masked_diffusion_loss_ref, prediction.double(), x_start, ids, K, n, noise, P)
    expected = 0.7 * of_total
    expected[:noised, D:] += 4 * -1.3 * of_total[:noised, D:]
    expected[:noised, :D] += 4 * 2.0 * of_total[:noised, :D]
    expected[noised:] += 2 * 0.4 * of_total[noised:]
    with backend.kernels("triton"):
        losses = masked_diffusion_loss_fwd(prediction.requires_grad_(), x_start, roles, noise, P, *counts)
        (found,) = torch.autograd.grad(losses, prediction, torch.tensor([0.7, -1.3, 2.0, 0.4], device=device))
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", [False, True], ids=["seed", "given"])
def test_operators(device, given):
    prediction, x_start, ids, K, n, noise, P = case(given=given, device=device)
    roles = torch.zeros(len(prediction), dtype=torch.uint8, device=device).index_fill_(0, ids, 1)
    args = x_start, roles, noise, P, n, K, n * 6 - K, 2 * 6 - 4
    torch.library.opcheck(masked_diffusion_loss_fwd.library, (prediction.requires_grad_(), *args))
    torch.library.opcheck(masked_diffusion_loss_bwd.library, (torch.ones(4, device=device), prediction.detach(), *args))


def test_compiles_whole(device):
    args = case(h=4, w=4, dtype=torch.bfloat16, device=device)
    compiler = "inductor" if device == "cuda" else "aot_eager"
    compiled = with_gradient(torch.compile(masked_diffusion_loss, fullgraph=True, backend=compiler), *args)
    for a, b in zip(compiled, with_gradient(masked_diffusion_loss, *args), strict=True):
        torch.testing.assert_close(a, b)


REFUSED = [
    ("prediction", lambda p: p[1:], r"prediction: expected floating-point \[24, 24\], got float32 \[23, 24\]"),
    ("prediction", lambda p: p.long(), "prediction: .* got .*int64"),
    ("x_start", lambda x: x[:, 0], r"x_start: expected floating \[B, C, H, W\], got \(4, 4, 6\)"),
    ("x_start", lambda x: x[:0], "x_start: .* got"),
    ("ids_keep", lambda ids: ids.int(), r"ids_keep: expected int64 \[N\], got .*int32"),
    ("ids_keep", lambda ids: torch.arange(18), "ids_keep: expected a hidden patch among the 12 .* got 12 visible"),
    ("num_noised", lambda n: 5, "num_noised: expected 0 to B = 4, got 5"),
    ("num_noised", lambda n: -1, "num_noised: .* got -1"),
    ("num_visible_noised", lambda k: 0, "num_visible_noised: expected 1 to 10 of 10 visible patches .* got 0"),
    ("num_visible_noised", lambda k: 13, "num_visible_noised: .* got 13"),
    ("noise", lambda s: s[:1], r"noise: .* each sample, int64 \(2,\), or floating \(2, 3, 4, 6\), got \(1,\)"),
    ("noise", lambda s: s.to("meta"), "noise: expected on cpu like x_start, got meta"),
    ("prediction", lambda p: p.to("meta"), "prediction: expected on cpu like x_start, got meta"),
    ("ids_ignored", lambda ids: ids.int(), r"ids_ignored: expected int64 \[N\], got .*int32"),
    ("ids_ignored", lambda ids: ids.to("meta"), "ids_ignored: expected on cpu like x_start, got meta"),
    ("ids_ignored", lambda ids: torch.arange(12), "ids_ignored: expected to leave some .* got 2 and 10 ignored"),
    ("num_ignored_noised", lambda n: 7, "ids_ignored: .* got 7 and -1 ignored"),
    ("patch_size", lambda P: 4, "patch_size: expected a divisor of H = 4 and W = 6, got 4"),
]
NAMES = ["prediction", "x_start", "ids_keep", "num_visible_noised", "num_noised", "noise", "patch_size"]
NAMES += ["ids_ignored", "num_ignored_noised"]


@pytest.mark.parametrize("name, change, message", REFUSED)
def test_wrong_arguments_are_refused_by_name(name, change, message):
    args = dict(zip(NAMES, case(ignored=(1, 2)), strict=True))
    args[name] = change(args[name])
    with pytest.raises(ValueError, match=message):
        masked_diffusion_loss(**args)


MUTANTS = {
    "dropped mask of x0": ("mask & ((role == 0) | (noised & (num_eps == num_noised)))[:, None]", "mask"),
    "dropped mask of eps": ("mask & (visible & noised)[:, None]", "mask & noised[:, None]"),
    "ignored patches scored": ("mask & ((role == 0) |", "mask & ((role != 1) |"),
    "halves swapped": ("prediction_ptr + at + D, score_eps", "prediction_ptr + at, score_eps"),
    "gradient of the other half": ("dprediction_ptr + at + D, error_eps", "dprediction_ptr + at, error_eps"),
    "groups swapped": ("tl.where(noised, dx0, dclean)", "tl.where(noised, dclean, dx0)"),
    "share of the groups swapped": (
        "0.5 * (1 - clean_share) * (eps + x0) + clean_share * clean",
        "0.5 * clean_share * (eps + x0) + (1 - clean_share) * clean",
    ),
    "upstream gradient forgotten": ("dtotal = tl.load(dlosses_ptr)", "dtotal = 1.0"),
    "wrong count": ("tl.where(noised, squares_x0, 0.0)) / D / tl.maximum(num_x0, 1)",
                    "tl.where(noised, squares_x0, 0.0)) / D / tl.maximum(num_eps, 1)"),
    "noise-free samples as noised ones": ("noised = row < num_noised", "noised = row < num_patches"),
    "image of another sample": ("sample = patch_corner(row,", "sample = patch_corner(row % num_noised,"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(mutant, name):
    if not backend.INTERPRET:
        pytest.skip("kernels are compiled for the GPU here")
    found = mutant(loss, *MUTANTS[name])
    args = case(B=5, n=3, K=4, K_clean=1, ignored=(1, 2))
    with backend.kernels("triton"):
        check(masked_diffusion_loss, args, upstream=3.0)
        with pytest.raises(AssertionError):
            check(found.masked_diffusion_loss, args, upstream=3.0)
