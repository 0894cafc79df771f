"""The cheaper projections of adaLN: their size, their start, and what they compute."""

from dataclasses import replace

import pytest
import torch

from umd.config import ModelConfig, ObjectiveConfig
from umd.errors import UserError
from umd.model import UMD
from umd.modulation import LowRankModulation, SingleModulation, build_modulation
from umd.objective import Objective
from umd.schedule import NoiseSchedule

BASE = ModelConfig(image_size=(8, 8), hidden_size=16, depth=3, decoder_depth=2, num_heads=2)
D, M = 16, 6 * 5 + 2
KINDS = {
    "per_block": (BASE, M * D * D + M * D),
    "single": (replace(BASE, adaLN_projection="single"), 6 * D * D + M * D),
    "low_rank": (replace(BASE, adaLN_projection="low_rank", adaLN_rank=3), 3 * D + 3 * M * D + M * D),
}


@pytest.mark.parametrize("kind", KINDS)
def test_size_and_zero_start(kind):
    config, size = KINDS[kind]
    model = UMD(config)
    assert sum(p.numel() for p in model.adaLN_modulation.parameters()) == size
    tables = model.adaLN_modulation(torch.randn(3, D))
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


def test_single_is_one_projection_with_offsets_of_each_block():
    module = SingleModulation(D, M)
    torch.nn.init.normal_(module.weight)
    torch.nn.init.normal_(module.bias)
    x = torch.randn(4, D)
    tables, offsets = module(x).view(4, M, D), module.bias.view(M, D)
    shared = (x @ module.weight.T).view(4, 6, D)
    for block in range(5):
        torch.testing.assert_close(tables[:, 6 * block : 6 * block + 6], shared + offsets[6 * block : 6 * block + 6])
    torch.testing.assert_close(tables[:, 30:], shared[:, :2] + offsets[30:])  # the final norm's shift and scale


def test_low_rank_of_full_rank_is_any_projection():
    whole = build_modulation(BASE)
    torch.nn.init.normal_(whole.weight)
    torch.nn.init.normal_(whole.bias)
    low = LowRankModulation(D, M, D)
    with torch.no_grad():
        low.down.weight.copy_(torch.eye(D))
        low.up.weight.copy_(whole.weight)
        low.up.bias.copy_(whole.bias)
    x = torch.randn(2, D)
    torch.testing.assert_close(low(x), whole(x))
    low.down.weight.data[3:] = 0
    assert torch.linalg.matrix_rank(low(torch.randn(20, D)) - low.bias) == 3


def test_wrong_settings_are_a_sentence():
    with pytest.raises(UserError, match="adaLN_rank must be at least 1"):
        replace(BASE, adaLN_rank=0)
