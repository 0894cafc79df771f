"""The FLOPs that MFU is made of, against torch's own counter and against the published networks."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from umd import ops
from umd.config import ModelConfig, ObjectiveConfig, model_config
from umd.flops import forward_flops, step_flops
from umd.model import UMD
from umd.objective import Objective
from umd.schedule import NoiseSchedule

BASE = ModelConfig(
    image_size=(16, 24), channels=3, patch_size=4, hidden_size=48, depth=3, decoder_depth=2, num_heads=3, num_cls=2
)
NETWORKS = {
    "adaLN": BASE,
    "no adaLN": replace(BASE, adaLN=False),
    "released embedding, labels": replace(BASE, embedding="released", num_classes=5),
    "paper embedding, labels": replace(BASE, num_classes=5),
    "no adaLN, released embedding, labels": replace(BASE, adaLN=False, embedding="released", num_classes=5),
    "adaLN-single": replace(BASE, adaLN_projection="single"),
    "low-rank adaLN": replace(BASE, adaLN_projection="low_rank", adaLN_rank=5),
    "cross decoder": replace(BASE, decoder="cross"),
    "cross decoder, no adaLN, labels": replace(BASE, decoder="cross", adaLN=False, num_classes=5),
    "narrow MLP, one channel": replace(BASE, mlp_ratio=1.5, channels=1, num_cls=1, norm_affine=False),
}
OBJECTIVES = {
    "UMD": ObjectiveConfig(),
    "MAE": ObjectiveConfig(no_noise_prob=1.0),
    "MaskDiT": ObjectiveConfig(no_noise_prob=0.0, mask_ratio=0.5),
    "DiT": ObjectiveConfig(no_noise_prob=0.0, mask_ratio=0.0),
}


def counted(config: ModelConfig, objective_config: ObjectiveConfig, batch: int) -> tuple[int, int]:
    """(torch's count of a forward pass, ours)."""
    objective = Objective(config, objective_config, NoiseSchedule("cosine"))
    x = torch.zeros(batch, config.channels, *config.image_size)
    labels = torch.zeros(batch, dtype=torch.int64) if config.num_classes else None
    corruption = objective.corrupt(batch, 0, torch.device("cpu"), labels)
    with FlopCounterMode(display=False) as counter, ops.cpu_paths(False):  # it does not see what is compiled
        objective(UMD(config), x, corruption)
    noised, clean = objective.split(batch)
    keep = (objective.keep_noised,) * noised + (objective.keep_clean,) * clean
    queries = corruption.ids_predict
    predict = None if queries is None else tuple((queries // config.num_patches).bincount().tolist())
    ours = forward_flops(config, keep, noised + min(clean, 1), predict)
    assert objective.step_flops(batch) == 3 * ours
    return counter.get_total_flops(), ours


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("network", NETWORKS)
def test_equals_torchs_count(network, objective):
    theirs, ours = counted(NETWORKS[network], OBJECTIVES[objective], batch=5)
    assert ours == theirs


@pytest.mark.parametrize("adaLN", [True, False])
@pytest.mark.parametrize("objective", ["UMD", "MAE", "MaskDiT"])
def test_a_subset_of_the_hidden_patches(objective, adaLN):
    config = replace(BASE, decoder="cross", adaLN=adaLN)
    whole = counted(config, OBJECTIVES[objective], batch=5)
    part = counted(config, replace(OBJECTIVES[objective], predict_ratio=0.4), batch=5)
    assert part[0] == part[1] < whole[0] == whole[1]


def test_a_step_is_three_forward_passes():
    assert step_flops(BASE, (3, 4), 2) == 3 * forward_flops(BASE, (3, 4), 2)


def test_a_network_of_dits_shape_has_dits_flops():
    """DiT-B/4 on 32x32x4 latents: 5.56 G multiply-adds (DiT's Table 4). Ours has one token more beside the 64."""
    config = model_config("UMD-B/4", image_size=(32, 32), channels=4, depth=8, decoder_depth=4)
    assert forward_flops(config, (64,), 1) / 2 == pytest.approx(5.56e9 * 65 / 64, rel=0.005)


def test_what_masking_saves():
    """UMD-B/4 at 64x64, batch 16, against the same network unmasked: a ratio of 1.755."""
    config = model_config("UMD-B/4", image_size=(64, 64))
    B = 16
    objective = Objective(config, ObjectiveConfig(), NoiseSchedule("cosine"))
    noised, clean = objective.split(B)
    assert (noised, clean, objective.keep_noised, objective.keep_clean) == (8, 8, 160, 64)
    masked = forward_flops(config, (160,) * 8 + (64,) * 8, 9)
    whole = forward_flops(config, (256,) * B, B)
    assert whole / masked == pytest.approx(1.755, abs=0.01)
