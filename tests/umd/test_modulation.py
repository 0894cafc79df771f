"""The cheaper projections of adaLN: their size, their start, and what they compute."""

from dataclasses import replace

import pytest
import torch

from umd.checkpoint import CheckpointError, joined, load_checkpoint, load_model_state, save_checkpoint, split
from umd.config import ModelConfig, ObjectiveConfig
from umd.ema import EMA
from umd.errors import UserError
from umd.model import UMD
from umd.modulation import LowRankModulation, SingleModulation, build_modulation
from umd.objective import Objective
from umd.schedule import NoiseSchedule
from umd.train.optim import adamw
from umd.train.parallel import Alone

BASE = ModelConfig(image_size=(8, 8), hidden_size=16, depth=3, decoder_depth=2, num_heads=2)
D, M = 16, 6 * 5 + 2
WIDTHS = [6 * D] * 5 + [2 * D]
KINDS = {
    "per_block": (BASE, M * D * D + M * D),
    "single": (replace(BASE, adaLN_projection="single"), 6 * D * D + M * D),
    "low_rank": (replace(BASE, adaLN_projection="low_rank", adaLN_rank=3), 3 * D + 3 * M * D + M * D),
}


def whole(modulation, x):
    """All tables [R, M·D]."""
    tables = modulation(x)
    return torch.cat([tables(i) for i in range(6)], dim=1)


@pytest.mark.parametrize("kind", KINDS)
def test_size_and_zero_start(kind):
    config, size = KINDS[kind]
    model = UMD(config)
    assert sum(p.numel() for p in model.adaLN_modulation.parameters()) == size
    tables = whole(model.adaLN_modulation, torch.randn(3, D))
    assert tables.shape == (3, M * D) and not tables.any()
    assert any(name.startswith("adaLN_modulation") for name in model.no_weight_decay())


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_learns(kind):
    config, _ = KINDS[kind]
    model = UMD(config)
    for parameter in model.adaLN_modulation.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    objective = Objective(config, ObjectiveConfig(), NoiseSchedule("cosine"))
    loss, _ = objective(model, torch.randn(4, 3, 8, 8), objective.corrupt(4, 0, torch.device("cpu")))
    loss.backward()
    for name, parameter in model.adaLN_modulation.named_parameters():
        assert parameter.grad.abs().min() > 0 or (parameter.grad != 0).float().mean() > 0.9, name


@pytest.mark.parametrize("kind", ["per_block", "low_rank"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_blocks_modulation_has_its_gradient_before_the_blocks_in_front_of_it(kind, checkpointing):
    """So that its exchange between ranks goes beside the rest of the backward pass."""
    config, _ = KINDS[kind]
    model = UMD(config)
    model.set_checkpointing(checkpointing)
    arrived: list[str] = []
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived.append(name))
    objective = Objective(config, ObjectiveConfig(), NoiseSchedule("cosine"))
    loss, _ = objective(model, torch.randn(4, 3, 8, 8), objective.corrupt(4, 0, torch.device("cpu")))
    loss.backward()
    assert sorted(arrived) == sorted(name for name, _ in model.named_parameters())
    prefix = "adaLN_modulation" + (".up" if kind == "low_rank" else "")
    blocks = [f"encoder.layers.{i}." for i in range(3)] + [f"decoder.layers.{i}." for i in range(2)]
    for i in range(6):  # the last: of the final norm
        modulation = [arrived.index(f"{prefix}.{i}.{what}") for what in ("weight", "bias")]
        before = [arrived.index(name) for name in arrived if name.startswith(tuple(blocks[:i]))]
        assert all(max(modulation) < place for place in before), i
        if i < 5:
            own = [arrived.index(name) for name in arrived if name.startswith(blocks[i])]
            assert min(own) < min(modulation)


def test_single_is_one_projection_with_offsets_of_each_block():
    module = SingleModulation(D, WIDTHS)
    torch.nn.init.normal_(module.weight)
    torch.nn.init.normal_(module.bias)
    x = torch.randn(4, D)
    tables, offsets = whole(module, x).view(4, M, D), module.bias.view(M, D)
    shared = (x @ module.weight.T).view(4, 6, D)
    for block in range(5):
        torch.testing.assert_close(tables[:, 6 * block : 6 * block + 6], shared + offsets[6 * block : 6 * block + 6])
    torch.testing.assert_close(tables[:, 30:], shared[:, :2] + offsets[30:])  # the final norm's shift and scale


def test_low_rank_of_full_rank_is_any_projection():
    full = build_modulation(BASE)
    for parameter in full.parameters():
        torch.nn.init.normal_(parameter)
    low = LowRankModulation(D, WIDTHS, D)
    with torch.no_grad():
        low.down.weight.copy_(torch.eye(D))
        low.up.load_state_dict(full.state_dict())
    x = torch.randn(2, D)
    torch.testing.assert_close(whole(low, x), whole(full, x))
    low.down.weight.data[3:] = 0
    assert torch.linalg.matrix_rank(whole(low, torch.randn(20, D)) - torch.cat(list(low.offsets))) == 3


def test_files_hold_the_projections_of_all_blocks_as_one(tmp_path):
    """What a run writes and reads has the names and shapes of one matrix for all blocks, in every part."""
    for kind, (config, _) in KINDS.items():
        model, again = UMD(config), UMD(config)
        for parameter in model.adaLN_modulation.parameters():
            torch.nn.init.normal_(parameter)
        run = Alone(model, model, adamw(model, 1e-3, (0.9, 0.95), 0.05), 1, 0.0)
        ema = EMA(model, 0.5)
        for step in range(2):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 1.0 + step)
            run.update()
            ema.update(model)
        tensors = run.tensors(ema)
        file = load_checkpoint(save_checkpoint(tmp_path / kind, 2, tensors, {})).tensors
        inner = {"per_block": D, "single": D, "low_rank": 3}[kind]
        prefix = "adaLN_modulation" + (".up" if kind == "low_rank" else "")
        shapes = {f"{prefix}.weight": (6 * D if kind == "single" else M * D, inner), f"{prefix}.bias": (M * D,)}
        shapes |= {"adaLN_modulation.down.weight": (inner, D)} if kind == "low_rank" else {}
        for part in ("model", "ema"):
            assert {name: tuple(t.shape) for name, t in file[part].items() if "adaLN" in name} == shapes
        optimizer = {name: tuple(t.shape) for name, t in file["optimizer"].items() if "adaLN" in name}
        assert optimizer == {
            f"{key}::{name}": () if key == "step" else shape
            for name, shape in shapes.items()
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
        offsets = torch.cat(list(model.adaLN_modulation.offsets))
        assert torch.equal(file["model"][f"{prefix}.bias"], offsets)  # block after block

        load_model_state(again, file["model"])
        parts = {part: split(named, again) for part, named in file.items()}
        other = Alone(again, again, adamw(again, 1e-3, (0.9, 0.95), 0.05), 1, 0.0)
        averages = EMA(again, 0.5)
        other.load(parts, averages)
        for part, named in other.tensors(averages).items():
            assert named.keys() == tensors[part].keys()
            assert all(torch.equal(t, tensors[part][name]) for name, t in named.items())


def test_another_depth_is_refused_with_the_shapes_of_the_file():
    with pytest.raises(CheckpointError, match=r"adaLN_modulation.weight \(\[416, 16\] saved, \[512, 16\] here\)"):
        load_model_state(UMD(BASE), joined(UMD(replace(BASE, decoder_depth=1)).state_dict()))


def test_wrong_settings_are_a_sentence():
    with pytest.raises(UserError, match="adaLN_rank 0: must be at least 1"):
        replace(BASE, adaLN_rank=0)
