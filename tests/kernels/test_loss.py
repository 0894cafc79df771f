"""The masked diffusion loss: against its formula with loops over samples, patches and pixels."""

import pytest
import torch

from umd.kernels.loss import masked_diffusion_loss_ref
from umd.kernels.philox import philox_randn

B, C, H, W, P = 4, 2, 4, 6, 2
L, D = (H // P) * (W // P), C * P * P


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def case(n, K_noised, K_clean, dtype=torch.float64, ignored=None):
    """Arguments for n noised samples with K_noised visible patches each, the others with K_clean; of each noised and
    each other sample so many hidden patches ignored."""
    keep = [K_noised] * n + [K_clean] * (B - n)
    orders = [s * L + randn(L, seed=10 + s).argsort() for s in range(B)]
    ids_keep = torch.cat([order[:k] for order, k in zip(orders, keep, strict=True)])
    prediction, x_start, eps = randn(B * L, 2 * D), randn(B, C, H, W, seed=1), randn(n, C, H, W, seed=2)
    args = [t.to(dtype) for t in (prediction, x_start)] + [ids_keep, n * K_noised, n, eps.to(dtype), P]
    if ignored is None:
        return args
    spared = [ignored[0]] * n + [ignored[1]] * (B - n)
    return [*args, torch.cat([order[L - i :] for order, i in zip(orders, spared, strict=True)]), n * ignored[0]]


def by_loops(prediction, x_start, ids_keep, num_visible_noised, n, eps, P, ids_ignored=(), _=0):
    """(total, [eps, x0, clean]) from single squared errors."""
    visible, errors = set(ids_keep.tolist()), {"eps": [], "x0": [], "clean": []}
    unmasked, ignored = num_visible_noised == n * L, {int(i) for i in ids_ignored}
    for index in range(B * L):
        s, place = divmod(index, L)
        if index in ignored:
            continue
        top, left = place // (W // P) * P, place % (W // P) * P
        for c in range(C):
            for i in range(P):
                for j in range(P):
                    at = c * P * P + i * P + j
                    y, x = top + i, left + j
                    x0_error = (prediction[index, at] - x_start[s, c, y, x]) ** 2
                    if s >= n:
                        if index not in visible:
                            errors["clean"].append(x0_error)
                        continue
                    if index in visible:
                        errors["eps"].append((prediction[index, D + at] - eps[s, c, y, x]) ** 2)
                    if index not in visible or unmasked:
                        errors["x0"].append(x0_error)
    parts = [torch.stack(e).mean() if e else prediction.new_zeros(()) for e in errors.values()]
    f = (B - n) / B
    return (1 - f) * (parts[0] + parts[1]) / 2 + f * parts[2], torch.stack(parts)


CASES = [(2, 3, 1), (2, 6, 2), (3, 4, 3), (4, 3, 1), (4, 6, 1), (0, 3, 2), (1, 1, 5)]


IGNORED = [(2, 3, 1, (2, 4)), (3, 4, 3, (1, 0)), (2, 6, 2, (0, 3)), (4, 3, 1, (1, 0)), (0, 3, 2, (0, 1))]


@pytest.mark.parametrize("n, K_noised, K_clean, ignored", [*((*numbers, None) for numbers in CASES), *IGNORED])
def test_by_loops(n, K_noised, K_clean, ignored):
    args = case(n, K_noised, K_clean, ignored=ignored)
    gradients = []
    for loss in (masked_diffusion_loss_ref, by_loops):
        prediction = args[0].clone().requires_grad_()
        total, parts = loss(prediction, *args[1:])
        gradients.append(torch.autograd.grad(total, prediction)[0])
        if loss is masked_diffusion_loss_ref:
            found = total, parts
            assert not parts.requires_grad and parts.shape == (3,)
    torch.testing.assert_close(found[0], total, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], parts, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    args = case(2, 3, 1)
    prediction = args[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda p: masked_diffusion_loss_ref(p, *args[1:])[0], prediction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_fp32_whatever_the_prediction(dtype):
    args = case(2, 3, 1, torch.float32)
    prediction = args[0].to(dtype).requires_grad_()
    total, parts = masked_diffusion_loss_ref(prediction, *args[1:])
    assert total.dtype == parts.dtype == torch.float32
    exact, _ = by_loops(prediction.double(), *args[1:])
    torch.testing.assert_close(total.double(), exact, rtol=1e-6, atol=0)
    total.backward()
    assert prediction.grad.dtype == dtype


def test_noise_from_seeds():
    args = case(3, 4, 3, torch.float32)
    seed = torch.tensor([987654321987, 3, 4])
    drawn = torch.stack([philox_randn(one, (C, H, W)) for one in seed])
    with_seed = masked_diffusion_loss_ref(*args[:5], seed, P)[0]
    assert torch.equal(with_seed, masked_diffusion_loss_ref(*args[:5], drawn, P)[0])
    assert not torch.equal(with_seed, masked_diffusion_loss_ref(*args[:5], seed + 1, P)[0])


def test_zero_where_it_must_be():
    """A perfect prediction scores 0; each head is read where it is scored and nowhere else."""
    args = case(2, 3, 1)
    prediction, x_start, ids_keep, _, n, eps, _ = args
    patches = torch.nn.functional.unfold(x_start, P, stride=P).mT.flatten(0, 1)
    noise = torch.nn.functional.unfold(eps, P, stride=P).mT.flatten(0, 1)
    perfect = torch.full_like(prediction, 1e6)  # any use of what must not be used shows
    hidden = torch.ones(B * L, dtype=torch.bool)
    hidden[ids_keep] = False
    perfect[hidden, :D] = patches[hidden]
    noised = ids_keep[ids_keep < n * L]
    perfect[noised, D:] = noise[noised]
    total, parts = masked_diffusion_loss_ref(perfect, *args[1:])
    assert total == 0 and (parts == 0).all()


def test_comparison_notices_a_swapped_sample():
    args = case(3, 4, 3)
    swapped = [*args[:5], args[5].flip(0), P]
    assert not torch.isclose(masked_diffusion_loss_ref(*swapped)[0], by_loops(*args)[0])
