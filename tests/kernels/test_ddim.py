"""ddim_step: the op and its definition against Song et al. 2021's equation 12 written out, image by image."""

from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from umd.kernels import backend, ddim
from umd.kernels.ddim import ddim_step, ddim_step_ref
from umd.kernels.philox import philox_randn, philox_randn_rows

COEFFICIENTS = [0.6, 0.8, 0.9, 0.3, 0.31]  # √α_t, √(1-α_t), √α_next, √(1-α_next-σ²), σ
OPTIONS = list(product([False, True], [False, True], [False, True], ["none", "given", "philox"]))


def randn(*shape, seed=0, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)


def inputs(shape, dtype=torch.float32, guided=True, noise="philox", device="cpu", predictions=None):
    predictions = dtype if predictions is None else predictions
    found = {
        "x_t": randn(*shape, dtype=dtype, device=device),
        "pred_cond": randn(*shape, seed=1, dtype=predictions, device=device),
        "pred_uncond": randn(*shape, seed=2, dtype=predictions, device=device) if guided else None,
        "coefficients": torch.tensor(COEFFICIENTS, dtype=dtype, device=device),
    }
    if noise == "given":
        found["noise"] = randn(*shape, seed=3, dtype=dtype, device=device)
    if noise == "philox":
        found["seed"] = torch.tensor(2**40 + 5, device=device)
        found["offsets"] = (torch.arange(shape[0], device=device) << 32) + 7
    return found


def plain(
    x_t, pred_cond, pred_uncond, coefficients, noise=None, seed=None, offsets=None, *, from_xstart, clip, cfg_scale
):
    """In fp64 and by Python's own numbers, one image after another."""
    a, b, a_next, c, sigma = coefficients.double().tolist()
    out = []
    for i, x in enumerate(x_t.double()):
        prediction = pred_cond[i].double()
        if pred_uncond is not None:
            prediction = (1 - cfg_scale) * pred_uncond[i].double() + cfg_scale * prediction
        x_start = prediction if from_xstart else (x - b * prediction) / a
        x_start = x_start.clamp(-1, 1) if clip else x_start
        x_next = a_next * x_start + c * (x - a * x_start) / b
        if noise is not None:
            x_next = x_next + sigma * noise[i].double()
        elif seed is not None:
            x_next = x_next + sigma * philox_randn(seed, x.shape, x.device, offset=offsets[i]).double()
        out.append((x_next, x_start))
    return tuple(torch.stack(each) for each in zip(*out, strict=True))


def check(op, args, from_xstart, clip, cfg_scale=1.5):
    options = dict(from_xstart=from_xstart, clip=clip)
    named = {name: x for name, x in args.items() if name != "coefficients"}
    found = op(**named, cfg_scale=cfg_scale, coefficients=args["coefficients"], **options)
    tolerance = 1e-12 if args["x_t"].dtype == torch.float64 else 4e-6
    for ours, exact in zip(found, plain(**args, cfg_scale=cfg_scale, **options), strict=True):
        assert ours.dtype == args["x_t"].dtype
        assert (ours.double() - exact).abs().max() <= tolerance * (1 + exact.abs().max())
    return found


@pytest.mark.parametrize(("from_xstart", "clip", "guided", "noise"), OPTIONS)
def test_every_option(device, from_xstart, clip, guided, noise):
    check(ddim_step, inputs((3, 3, 4, 6), guided=guided, noise=noise, device=device), from_xstart, clip)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_definition(dtype):
    for from_xstart, clip, guided, noise in OPTIONS:
        check(ddim_step_ref, inputs((2, 2, 3, 5), dtype, guided, noise), from_xstart, clip)


@pytest.mark.parametrize("predictions", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(5, 4, 32, 32), (1, 3, 30, 22)], ids=str)
def test_sizes_beyond_one_program(device, shape, predictions):
    check(ddim_step, inputs(shape, device=device, predictions=predictions), False, True, cfg_scale=4.0)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    option=st.sampled_from(OPTIONS),
    cfg_scale=st.floats(-2, 8),
)
def test_any_shape(device, shape, option, cfg_scale):
    from_xstart, clip, guided, noise = option
    check(ddim_step, inputs(shape, guided=guided, noise=noise, device=device), from_xstart, clip, cfg_scale)


def test_predictions_are_views_of_any_strides(device):
    """Both halves of one call's output, channels last, and a window of a larger picture."""
    args = inputs((2, 3, 4, 8), device=device)
    both = torch.cat([args["pred_cond"], args["pred_uncond"]])
    window = torch.nn.functional.pad(both, (3, 2, 1, 0))[..., 1:, 3:-2]
    for views in (both, both.contiguous(memory_format=torch.channels_last), window, both.mT.contiguous().mT):
        assert torch.equal(views, both)
        found = check(ddim_step, args | {"pred_cond": views[:2], "pred_uncond": views[2:]}, False, True)
        for ours, expected in zip(found, check(ddim_step, args, False, True), strict=True):
            assert torch.equal(ours, expected)
    check(ddim_step, args | {"x_t": args["x_t"].mT.contiguous().mT}, False, True)


def test_the_noise_is_philox(device):
    """x_next = 1·noise: the other coefficients are zero, or divide."""
    shape, offsets = (4, 3, 5, 7), torch.tensor([0, 2**31 - 9, 2**32 - 9, 5 << 32])
    for seed in (0, -3, 2**62 + 2**31):
        noise = philox_randn_rows(seed, offsets, shape[1:])
        x_next, _ = ddim_step(
            torch.zeros(shape, device=device),
            torch.zeros(shape, device=device),
            None,
            1.0,
            torch.tensor([1.0, 1, 0, 0, 1], device=device),
            from_xstart=True,
            clip=False,
            seed=torch.tensor(seed, device=device),
            offsets=offsets.to(device),
        )
        assert (x_next.cpu() - noise).abs().max() < 5e-6  # its log, sin and cos round otherwise


def test_a_sample_does_not_depend_on_its_batch(device):
    args = inputs((4, 3, 4, 6), device=device)
    whole = check(ddim_step, args, False, True)
    part = {name: x if name in ("coefficients", "seed") else x[1:3] for name, x in args.items()}
    for ours, expected in zip(check(ddim_step, part, False, True), whole, strict=True):
        assert torch.equal(ours, expected[1:3])
    again = check(ddim_step, args, False, True)
    assert all(torch.equal(a, b) for a, b in zip(again, whole, strict=True))


def test_nan_is_not_clipped_away(device):
    args = inputs((1, 1, 2, 4), device=device)
    args["pred_cond"][0, 0, 1, 2] = float("nan")
    for found in ddim_step(**args, cfg_scale=1.5, from_xstart=False, clip=True):
        assert found.isnan().sum() == 1 and found[0, 0, 1, 2].isnan()


def test_compiles_whole_and_is_an_operator(device):
    args = inputs((2, 3, 4, 4), device=device)
    tensors = list(args.values())

    def step(x_t, pred_cond, pred_uncond, coefficients, seed, offsets):
        return ddim_step(
            x_t, pred_cond, pred_uncond, 1.5, coefficients, from_xstart=False, clip=True, seed=seed, offsets=offsets
        )

    compiled = torch.compile(step, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    for ours, expected in zip(compiled(*tensors), step(*tensors), strict=True):
        assert torch.equal(ours, expected)
    if backend.use_triton(args["x_t"]):
        x_t, cond, uncond, coefficients, seed, offsets = tensors
        for guidance in (uncond, None):
            torch.library.opcheck(
                ddim.ddim_step_fwd.library, (x_t, cond, guidance, 1.5, coefficients, False, True, None, seed, offsets)
            )


def test_no_image(device):
    x_next, x_start = ddim_step(**inputs((0, 3, 4, 4), device=device), cfg_scale=1.5, from_xstart=False, clip=True)
    assert x_next.shape == x_start.shape == (0, 3, 4, 4)


WRONG = {
    "another sample's noise": ("tl.load(offsets_ptr + b)", "tl.load(offsets_ptr)"),
    "lanes in another order": (
        "tl.join(tl.join(n0, n2), tl.join(n1, n3))",
        "tl.join(tl.join(n0, n1), tl.join(n2, n3))",
    ),
    "guidance the other way": ("uncond + CFG_SCALE *", "uncond - CFG_SCALE *"),
    "ε of the unclipped image": ("x_t - sqrt_alpha * x_start, sqrt_one", "x_t - sqrt_alpha * prediction, sqrt_one"),
    "swapped coefficients": ("coefficients_ptr + 2) * x_start", "coefficients_ptr + 3) * x_start"),
    "not clipped": ("if CLIP:", "if CLIP and FROM_XSTART:"),
    "rows taken for columns": ("i // W % H * stride_h", "i // H % H * stride_h"),
    "another image": ("ptr + b * stride_b", "ptr"),
}


@pytest.mark.parametrize("change", WRONG)
def test_comparison_notices(mutant, change):
    if not backend.INTERPRET:
        pytest.skip("kernels are compiled for the GPU here")
    wrong = mutant(ddim, *WRONG[change])
    with backend.kernels("triton"), pytest.raises(AssertionError):
        check(wrong.ddim_step, inputs((3, 3, 4, 6)), False, True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x_t", torch.zeros(2, 3, 4, 4, dtype=torch.float16)),
        ("x_t", torch.zeros(3, 4, 4)),
        ("pred_cond", torch.zeros(2, 3, 4, 5)),
        ("pred_cond", torch.zeros(2, 3, 4, 4, dtype=torch.int64)),
        ("pred_uncond", torch.zeros(1, 3, 4, 4)),
        ("pred_uncond", torch.zeros(2, 3, 4, 4, device="meta")),
        ("coefficients", torch.zeros(4)),
        ("coefficients", torch.zeros(5, dtype=torch.float64)),
        ("noise", torch.zeros(2, 3, 16)),
        ("seed", torch.zeros(1, dtype=torch.int64)),
        ("offsets", torch.zeros(3, dtype=torch.int64)),
        ("offsets", torch.zeros(2, dtype=torch.int32)),
        ("offsets", None),
    ],
    ids=lambda value: str(getattr(value, "shape", value)),
)
def test_refuses_by_name(name, value):
    args = inputs((2, 3, 4, 4))
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got "):
        ddim_step(**(args | {name: value}), cfg_scale=1.5, from_xstart=False, clip=True)
