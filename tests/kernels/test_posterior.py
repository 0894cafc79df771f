"""sample_posterior: the op and its definition against mean + std·ε in fp64, ε that of philox_randn, draw by draw."""

import pytest
import torch

from umd.kernels import backend, posterior
from umd.kernels.philox import philox_randn
from umd.kernels.posterior import sample_posterior, sample_posterior_ref

TYPES = [torch.bfloat16, torch.float16, torch.float32]
DRAWS = [0, 1_281_167 * 799 + 5, 2**31 // 15, 2**40, 3]
SEED = 2**62 + 2**31 + 5


def moments(*shape, dtype=torch.float32, device="cpu"):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return torch.stack([3 * x, 0.1 + x.square()], 1).to(device, dtype)


def check(op, given, seed=SEED, draws=DRAWS):
    """Every row against its own draw; the rounding of log, sin and cos in another order is worth a few 1e-6 of ε."""
    draws = draws[: len(given)]
    found = op(given, seed, torch.tensor(draws, device=given.device))
    mean, std = given.double().cpu().unbind(1)
    assert found.dtype == torch.float32 and found.shape == mean.shape
    counters = -(-mean[0].numel() // 4)
    for row, draw in enumerate(draws):
        eps = philox_randn(seed, mean[row].shape, offset=draw * counters).double()
        error = (found[row].double().cpu() - (mean[row] + std[row] * eps)).abs()
        assert (error <= 5e-6 * std[row] + 1e-6 * (mean[row].abs() + (std[row] * eps).abs())).all()
    return found


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 4, 32, 32), (3, 3, 5, 7), (2, 1, 1, 1), (1, 16, 9, 8)], ids=str)
def test_latents_are_mean_plus_std_times_the_noise_of_their_draw(device, shape, dtype):
    check(sample_posterior, moments(*shape, dtype=dtype, device=device))
    check(sample_posterior_ref, moments(*shape, dtype=dtype))


@pytest.mark.parametrize("seed", [0, 1, 16, 2**31, 2**63 - 1])
def test_any_seed(device, seed):
    check(sample_posterior, moments(2, 4, 6, 6, device=device), seed)


def test_without_spread_the_mean_to_the_bit(device):
    """And the numbers of 16 bits are read as they are."""
    for dtype in TYPES:
        given = moments(3, 4, 8, 8, dtype=dtype, device=device)
        given[:, 1] = 0
        assert torch.equal(sample_posterior(given, 1, torch.arange(3, device=device)), given[:, 0].float())


def test_a_sample_does_not_depend_on_its_batch_and_repeats(device):
    given = moments(5, 4, 9, 8, dtype=torch.bfloat16, device=device)
    whole = check(sample_posterior, given)
    assert torch.equal(check(sample_posterior, given[2:4], draws=DRAWS[2:4]), whole[2:4])
    assert torch.equal(check(sample_posterior, given), whole)
    strided = given.transpose(-1, -2).contiguous().transpose(-1, -2)
    assert torch.equal(check(sample_posterior, strided), whole)


def test_latents_of_a_vq_model_are_given_back(device):
    for dtype in TYPES:
        given = moments(3, 4, 5, 5, dtype=dtype, device=device)[:, :1]
        assert torch.equal(sample_posterior(given, 1, torch.arange(3, device=device)), given[:, 0].float())


def test_no_sample(device):
    assert sample_posterior(moments(0, 4, 8, 8, device=device), 1, torch.arange(0, device=device)).shape == (0, 4, 8, 8)


def test_compiles_whole_and_is_an_operator(device):
    if device == "cuda" and torch.__version__ < "2.12":
        pytest.skip("Inductor of torch 2.11 takes no Python integer above 2^31 as a kernel's argument")
    given, draws = moments(2, 3, 4, 4, dtype=torch.bfloat16, device=device), torch.tensor(DRAWS[:2], device=device)
    compiled = torch.compile(lambda x, draws: sample_posterior(x, SEED, draws), fullgraph=True)
    exactly = dict(rtol=0, atol=0) if backend.use_triton(given) else dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(compiled(given, draws), sample_posterior(given, SEED, draws), **exactly)
    if backend.use_triton(given):
        torch.library.opcheck(posterior.sample_posterior_fwd.library, (given, SEED, draws))


WRONG = {
    "another sample's noise": ("tl.load(draws_ptr + b)", "tl.load(draws_ptr)"),
    "draws that share noise": ("((SIZE + 3) // 4)", "(SIZE // 4)"),
    "lanes in another order": (
        "tl.join(tl.join(n0, n2), tl.join(n1, n3))",
        "tl.join(tl.join(n0, n1), tl.join(n2, n3))",
    ),
    "mean for std": ("+ SIZE + i", "+ i"),
    "the first program's noise": ("+ first + tl.arange(0, BLOCK)", "+ tl.arange(0, BLOCK)"),
    "another sample": ("moments_ptr + b * (2 * SIZE) + i", "moments_ptr + i"),
    "half of the seed": ("tl.full((), seed, tl.int64)", "tl.full((), seed, tl.int32)"),
}


@pytest.mark.parametrize("change", WRONG)
def test_comparison_notices(mutant, change):
    if not backend.INTERPRET:
        pytest.skip("kernels are compiled for the GPU here")
    wrong = mutant(posterior, *WRONG[change])
    with backend.kernels("triton"), pytest.raises((AssertionError, OverflowError)):
        check(wrong.sample_posterior, moments(3, 5, 15, 15))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("moments", torch.zeros(2, 3, 4, 4, 4)),
        ("moments", torch.zeros(2, 2, 4, 4)),
        ("moments", torch.zeros(2, 2, 4, 4, 4, dtype=torch.int16)),
        ("draws", torch.zeros(3, dtype=torch.int64)),
        ("draws", torch.zeros(2, dtype=torch.int32)),
        ("draws", torch.zeros(2, dtype=torch.int64, device="meta")),
        ("seed", -1),
        ("seed", 2**63),
    ],
    ids=lambda value: str(getattr(value, "shape", value)),
)
def test_refuses_by_name(name, value):
    args = {"moments": moments(2, 4, 4, 4), "seed": 1, "draws": torch.arange(2)}
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        sample_posterior(**(args | {name: value}))
