"""A training step with kernels on: what it never makes, and that it is the step of the definitions."""

import math
from dataclasses import replace

import pytest
import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from umd.config import OBJECTIVES, ModelConfig
from umd.kernels import backend
from umd.layers import set_recompute_gelu
from umd.model import UMD
from umd.objective import Objective
from umd.schedule import NoiseSchedule

# Sizes such that no weight or activation has as many elements as some of the images.
CONFIG = ModelConfig(image_size=(12, 20), patch_size=4, hidden_size=32, depth=1, decoder_depth=1, num_heads=2)
B = 5


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cpu" and not backend.INTERPRET:
        pytest.skip("kernels are compiled for the GPU here")
    return request.param


def setting(name, device, dtype=torch.float32):
    """A network whose every parameter matters, a batch, the objective."""
    model = UMD(CONFIG).to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(std=0.2, generator=generator))
    x_start = torch.rand(B, CONFIG.channels, *CONFIG.image_size, generator=generator) * 2 - 1
    return model, x_start.to(device, dtype), Objective(CONFIG, OBJECTIVES[name], NoiseSchedule("cosine"))


def step(model, x_start, objective, seed=3):
    """(total, parts, gradients)"""
    corruption = objective.corrupt(len(x_start), seed, x_start.device)
    total, parts = objective(model, x_start, corruption)
    gradients = torch.autograd.grad(total, list(model.parameters()), materialize_grads=True)
    return total.detach(), parts, gradients


class Census(TorchDispatchMode):
    """The shapes of all tensors that ops make, those inside of our own ops too; views of `known` are not made."""

    def __init__(self, known):
        super().__init__()
        self.known, self.shapes = known.untyped_storage().data_ptr(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "umd":
            with self:
                out = OPDEFS[func._schema.name]._init_fn(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() != self.known:
                self.shapes.add(tuple(x.shape))
        return out


def made(choice, name, device):
    """A step; the shapes of tensors as large as its noised samples, as the others, or as all; the shape of patches."""
    model, x_start, objective = setting(name, device)
    with backend.kernels(choice), Census(x_start) as census:
        found = step(model, x_start, objective)
    n, clean = objective.split(B)
    kept, width = n * objective.keep_noised + clean * objective.keep_clean, 2 * x_start[0].numel() // CONFIG.num_patches
    assert {(B * CONFIG.num_patches, width), (kept, width // 2)} <= census.shapes  # the prediction; the visible patches
    sizes = {samples * x_start[0].numel() for samples in (n, clean, B) if samples}
    return found, {shape for shape in census.shapes if math.prod(shape) in sizes}, (kept, width // 2)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_step_of_the_definitions_without_noise_x_t_or_target(device, name):
    """Nothing as large as images but the patches, where none is masked. The definitions make whole images."""
    found, shapes, patches = made("triton", name, device)
    assert not shapes - {patches}
    expected, shapes, _ = made("reference", name, device)
    assert name == "mae" or any(len(shape) == 4 for shape in shapes)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=0)
    for (parameter, _), a, b in zip(UMD(CONFIG).named_parameters(), found[2], expected[2], strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max(), parameter


@pytest.mark.gpu
@pytest.mark.parametrize("name", OBJECTIVES)
def test_same_seed_same_bits(name):
    arguments = setting(name, "cuda")
    with backend.kernels("triton"):
        first, second = step(*arguments), step(*arguments)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert all(torch.equal(a, b) for a, b in zip(first[2], second[2], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gelu_made_again_leaves_every_gradient(device, checkpointing):
    model, x_start, objective = setting("umd", device)
    model.set_checkpointing(checkpointing)
    found = []
    for on in (False, True):
        set_recompute_gelu(model, on)
        with backend.kernels("triton"):
            found.append(step(model, x_start, objective)[2])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def curve(choice, device, dtype, steps):
    torch.manual_seed(0)
    config = replace(CONFIG, image_size=(8, 12))  # six patches: the interpreter takes a second for a step
    model = UMD(config).to(device, dtype)
    objective = Objective(config, OBJECTIVES["umd"], NoiseSchedule("cosine"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    colours = torch.rand(64, config.channels, 1, 1, generator=generator)
    waves = torch.linspace(0, 6, config.image_size[1]) + torch.linspace(0, 3, config.image_size[0])[:, None]
    images = (colours * torch.sin(waves * (1 + 3 * colours.roll(1, 1)))).to(device, dtype)
    losses = []
    with backend.kernels(choice):
        for i in range(steps):
            x_start = images[torch.randint(len(images), (4,), generator=generator).to(device)]
            total, _ = objective(model, x_start, objective.corrupt(4, i, x_start.device))
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            losses.append(total.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.slow
def test_200_steps(device):
    """The kernels' loss curve leaves that of the definitions in fp64 no further than fp32 makes the definitions do."""
    exact, plain, kernels = (
        curve(choice, device, dtype, 200)
        for choice, dtype in (
            ("reference", torch.float64),
            ("reference", torch.float32),
            ("triton", torch.float32),
        )
    )
    assert exact[-20:].mean() < 0.9 * exact[:20].mean()  # it trains
    theirs, ours = ((losses - exact).abs() / exact for losses in (plain, kernels))
    assert ours.max() <= 4 * theirs.max() + 1e-6, f"off by {ours.max():.2e}, the definitions by {theirs.max():.2e}"
