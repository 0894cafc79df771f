"""The learning-rate curve and what AdamW decays."""

import math
from dataclasses import replace

import pytest
import torch

from umd import ops
from umd.checkpoint import load_optimizer_tensors, optimizer_tensors
from umd.config import ModelConfig, ObjectiveConfig
from umd.errors import UserError
from umd.machine.device import apex_lacks
from umd.model import UMD
from umd.objective import Objective
from umd.schedule import NoiseSchedule
from umd.train.optim import adamw, clipped_step, global_norm, lr_scale, narrow_gradients, runs_compiled
from umd.train.settings import OptimConfig

MODEL = ModelConfig(image_size=(8, 8), patch_size=2, hidden_size=32, depth=1, decoder_depth=1, num_heads=2)


@pytest.mark.parametrize("warmup", [0.05, 0.25])
def test_linear_warm_up_then_half_a_cosine(warmup):
    assert lr_scale(0.0, warmup) == 0
    assert lr_scale(warmup / 2, warmup) == pytest.approx(1 / 2)
    assert lr_scale(warmup, warmup) == 1
    assert lr_scale((1 + warmup) / 2, warmup) == pytest.approx(1 / 2)
    third = warmup + (1 - warmup) / 3
    assert lr_scale(third, warmup) == pytest.approx(3 / 4)  # (1 + cos 60°) / 2
    assert lr_scale(1.0, warmup) == pytest.approx(0, abs=1e-12)


def test_the_curve_has_no_jump_and_one_top():
    rates = [lr_scale(i / 1000, 0.05) for i in range(1001)]
    assert max(abs(b - a) for a, b in zip(rates, rates[1:], strict=False)) <= 1 / 50 + 1e-9  # the slope of the warm-up
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_without_warm_up_it_starts_at_the_top_and_past_the_end_it_stays_at_zero():
    assert lr_scale(0.0, 0.0) == 1
    assert lr_scale(1.2, 0.05) == pytest.approx(0, abs=1e-12)  # a clock may run over


def test_without_decay_it_stays_at_the_top():
    assert [lr_scale(p, 0.25, "none") for p in (0.0, 0.125, 0.25, 0.6, 1.0, 1.2)] == [0, 0.5, 1, 1, 1, 1]


@pytest.mark.parametrize(("setting", "value"), [("lr", 0.0), ("lr", -1.0), ("warmup", 1.0), ("warmup", -0.1)])
def test_impossible_settings_are_refused_by_name(setting, value):
    with pytest.raises(UserError, match=setting):
        OptimConfig(**{setting: value})


def test_every_parameter_is_in_one_group_and_only_the_mask_is_spared():
    model = UMD(MODEL)
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, spared = adamw(model, 1e-3, (0.9, 0.95), 0.05).param_groups
    assert decayed["weight_decay"] == 0.05 and spared["weight_decay"] == 0
    assert {names[p] for p in spared["params"]} == {
        name for name in names.values() if name.endswith("bias") or name in ("cls_token", "mask_token")
    }
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
    assert {"pos_embed", "decoder_pos_embed", "adaLN_modulation.0.weight", "encoder.norm.weight"} <= {
        names[p] for p in decayed["params"]
    }


def test_frozen_parameters_are_left_out():
    model = UMD(MODEL)
    model.pos_embed.requires_grad_(False)
    groups = adamw(model, 1e-3, (0.9, 0.95), 0.05).param_groups
    assert not any(p is model.pos_embed for group in groups for p in group["params"])


def test_a_step_is_adamw_with_decoupled_decay():
    """Loshchilov & Hutter's formulas, written out for two steps."""
    model = UMD(MODEL).double()
    lr, (b1, b2), decay = 1e-2, (0.9, 0.95), 0.05
    optimizer = adamw(model, lr, (b1, b2), decay)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(p) for name, p in expected.items()}
    v = {name: torch.zeros_like(p) for name, p in expected.items()}
    generator = torch.Generator().manual_seed(0)
    for step in (1, 2):
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            m[name] = b1 * m[name] + (1 - b1) * p.grad
            v[name] = b2 * v[name] + (1 - b2) * p.grad**2
            if not (name.endswith("bias") or name in ("cls_token", "mask_token")):
                expected[name] *= 1 - lr * decay
            expected[name] -= lr * m[name] / (1 - b1**step) / ((v[name] / (1 - b2**step)).sqrt() + 1e-8)
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-12)


def test_global_norm_of_millions_of_numbers():
    """torch's own norm in fp32 is off by 8e-5 here."""
    gradients = [torch.randn(3072, 768), torch.randn(768, 3072).t(), torch.tensor(3.0)]
    exact = torch.cat([g.double().flatten() for g in gradients]).norm()
    torch.testing.assert_close(global_norm(gradients).double(), exact, rtol=5e-6, atol=0)


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_clipping_within_the_step(max_norm, dtype):
    """As if all gradients together were first scaled down to the norm; AdamW's steps differ by the clip of each."""
    torch.manual_seed(0)
    ours, theirs = UMD(MODEL).to(dtype), UMD(MODEL).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    optimizers = [adamw(model, 1e-2, (0.9, 0.95), 0.05) for model in (ours, theirs)]
    for size in (0.1, 3.0, 0.001):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn_like(p) * size
            q.grad = p.grad.clone()
        norm = torch.cat([q.grad.flatten() for q in theirs.parameters()]).norm()
        if max_norm:
            for q in theirs.parameters():
                q.grad *= min(1.0, max_norm / norm)
        torch.testing.assert_close(clipped_step(optimizers[0], max_norm), norm)
        optimizers[1].step()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=2e-6, atol=2e-6)


def test_narrow_gradients_take_the_same_steps():
    """A model told to keep bf16 gradients, and one that widens them. Not with adaLN, whose projection is in fp32."""
    config = replace(MODEL, adaLN=False)
    models = [UMD(config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [adamw(model, 1e-3, (0.9, 0.95), 0.05) for model in models]
    if not runs_compiled(optimizers[0]):
        pytest.skip(f"nothing is compiled: {ops.compiler_lacks()}")
    narrow_gradients(models[1], optimizers[1])
    objective = Objective(config, ObjectiveConfig(), NoiseSchedule("cosine"))
    x = torch.rand(4, MODEL.channels, *MODEL.image_size) * 2 - 1
    for seed in range(3):
        norms = []
        for model, optimizer in zip(models, optimizers, strict=True):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                objective(model, x, objective.corrupt(4, seed, x.device))[0].backward()
            norms.append(clipped_step(optimizer, 0.1))
        narrow = {name for name, p in models[1].named_parameters() if p.grad.dtype == torch.bfloat16}
        assert {"encoder.layers.0.attn.qkv.weight", "decoder.layers.0.mlp.fc2.weight"} <= narrow
        torch.testing.assert_close(norms[1], norms[0], rtol=1e-5, atol=0)
        for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert name in narrow or q.grad.dtype == torch.float32
            torch.testing.assert_close(q.grad.float(), p.grad, rtol=2e-2, atol=1e-5, msg=name)
            torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-5, msg=name)
            p.grad = q.grad = None


def test_the_area_under_the_curve():
    """The mean rate is warmup/2 + (1 - warmup)/2: neither piece is steeper than it says."""
    rates = [lr_scale((i + 0.5) / 4000, 0.1) for i in range(4000)]
    assert math.fsum(rates) / len(rates) == pytest.approx(0.5, abs=1e-6)


# apex


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder that Python searches first, like a site-packages."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(*files: str) -> None:
        for name in files:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("1/0")  # nothing of it may run

    return install


def test_apex_is_taken_only_if_it_is_nvidias_whole_and_on_a_gpu(site):
    model = UMD(MODEL)
    for files, said in (
        (["apex/__init__.py", "apex/lib/__init__.py"], "here it is not NVIDIA's"),  # PyPI's, a Pyramid toolkit
        (["apex/optimizers/__init__.py"], "here it is without its CUDA extensions"),
        (["amp_C.py"], "runs on GPUs, not on cpu"),
    ):
        site(*files)
        with pytest.raises(UserError, match=said):
            adamw(model, 1e-3, (0.9, 0.95), 0.05, fused="apex")
    for fused in ("auto", "torch"):  # even where there is an apex
        assert type(adamw(model, 1e-3, (0.9, 0.95), 0.05, fused=fused)) is torch.optim.AdamW


def test_moments_go_from_torchs_to_apexs_layout_and_back():
    """apex keeps the step count in the group; which kernel made the moments does not show in a checkpoint."""
    torch.manual_seed(0)
    model = UMD(MODEL)
    ours = adamw(model, 1e-3, (0.9, 0.95), 0.05)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        ours.step()
    saved = {key: value.clone() for key, value in optimizer_tensors(ours, model).items()}
    apexs = adamw(model, 1e-3, (0.9, 0.95), 0.05)
    for group in apexs.param_groups:
        group["step"] = 0
    load_optimizer_tensors(apexs, model, saved)
    assert [group["step"] for group in apexs.param_groups] == [3, 3]
    assert all(state.keys() == {"exp_avg", "exp_avg_sq"} for state in apexs.state.values())
    written = optimizer_tensors(apexs, model)
    assert written.keys() == saved.keys()
    for key, value in saved.items():
        assert written[key].dtype == value.dtype and torch.equal(written[key], value), key
    back = adamw(model, 1e-3, (0.9, 0.95), 0.05)
    load_optimizer_tensors(back, model, written)
    assert all(torch.equal(back.state[p][key], ours.state[p][key]) for p in ours.state for key in ours.state[p])


@pytest.mark.gpu
@pytest.mark.skipif(apex_lacks() != "", reason="NVIDIA's apex is not installed")
def test_apex_makes_torchs_steps():
    torch.manual_seed(0)
    ours, apexs = UMD(MODEL).cuda(), UMD(MODEL).cuda()
    apexs.load_state_dict(ours.state_dict())
    steps = [adamw(m, 1e-2, (0.9, 0.95), 0.05, fused=f) for m, f in ((ours, "torch"), (apexs, "apex"))]
    for _ in range(10):
        for p, q in zip(ours.parameters(), apexs.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in steps:
            optimizer.step()
    for p, q in zip(ours.parameters(), apexs.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-5, atol=1e-6)
    a, b = (optimizer_tensors(o, m) for o, m in zip(steps, (ours, apexs), strict=True))
    assert a.keys() == b.keys() and all(torch.equal(a[k].cpu(), b[k].cpu()) for k in a if k.startswith("step::"))
