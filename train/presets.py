"""Published settings by name, and small ones for minutes on a CPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from umd.config import OBJECTIVES, DiffMAEObjectiveConfig, ScheduleConfig, diffmae_config, model_config
from umd.train.run import RunConfig
from umd.train.settings import DataConfig, OptimConfig


def _pixels(name: str, objective: str, out: str, side: int = 64, num_cls: int = 1, **changes: Any) -> RunConfig:
    adaLN = objective != "mae"
    return RunConfig(
        out=Path("runs") / out,
        model=model_config(name, image_size=(side, side), adaLN=adaLN, num_cls=num_cls),
        objective=OBJECTIVES[objective],
        **changes,
    )


def _latents(name: str, objective: str, out: str, **changes: Any) -> RunConfig:
    """A run on 32x32x4 latents of 256x256 pictures, with the linear noise schedule."""
    return replace(
        _pixels(name, objective, out, side=32, schedule=ScheduleConfig("linear"), **changes),
        model=model_config(name, image_size=(32, 32), channels=4, adaLN=objective != "mae"),
        data=DataConfig(source="latents/train"),
    )


def _diffmae(name: str, out: str, model: dict[str, Any], mask_ratio: float = 0.75, **changes: Any) -> RunConfig:
    """A DiffMAE run with MAE's recipe, on which DiffMAE's is built: batch 4096, crops of at least 0.2 of the area."""
    return RunConfig(
        out=Path("runs") / out,
        model=diffmae_config(name, **model),
        objective=DiffMAEObjectiveConfig(mask_ratio=mask_ratio),
        **{
            "schedule": ScheduleConfig("linear_rho"),
            "batch_size": 4096,
            "data": DataConfig(area_min=0.2),
            **changes,
        },
    )


PRESETS: dict[str, tuple[str, RunConfig]] = {
    "umd-tiny": (
        "UMD-Mi/4 on 32x32 colour emoji: minutes on a laptop",
        _pixels(
            "UMD-Mi/4", "umd", "umd-tiny", side=32, num_cls=4, batch_size=64, minutes=10, save_every=200,
            draw_every=200, optim=OptimConfig(lr=1e-2), data=DataConfig(hflip=True),
        ),
    ),
    "umd-s4": ("UMD-S/4, 64x64 pixels", _pixels("UMD-S/4", "umd", "umd-s4")),
    "umd-b4": ("UMD-B/4, 64x64 pixels: the paper's main model", _pixels("UMD-B/4", "umd", "umd-b4")),
    "umd-l4": ("UMD-L/4, 64x64 pixels", _pixels("UMD-L/4", "umd", "umd-l4")),
    "umd-xl4": ("UMD-XL/4, 64x64 pixels", _pixels("UMD-XL/4", "umd", "umd-xl4")),
    "mae-b4": (
        "the same network as MAE: no noise, 75 % masked, no adaLN, batch 4096",
        _pixels("UMD-B/4", "mae", "mae-b4", batch_size=4096),
    ),
    "maskdit-b4": (
        "the same network as MaskDiT: always noised, 50 % masked",
        _pixels("UMD-B/4", "maskdit", "maskdit-b4"),
    ),
    "dit-b4": ("the same network as DiT: always noised, nothing masked", _pixels("UMD-B/4", "dit", "dit-b4")),
    "umd-l2": (
        "UMD-L/2 on 32x32x4 latents of 256x256 pictures (umd encode-latents): the paper's latent model",
        _latents("UMD-L/2", "umd", "umd-l2"),
    ),
    "mae-l2": (
        "its network as MAE: no noise, 75 % masked, no adaLN, batch 4096",
        _latents("UMD-L/2", "mae", "mae-l2", batch_size=4096),
    ),
    "maskdit-l2": (
        "its network as MaskDiT: always noised, 50 % masked",
        _latents("UMD-L/2", "maskdit", "maskdit-l2"),
    ),
    "dit-l2": (
        "its network as DiT, 400 epochs (the paper's with labels from the start: --model.num-classes 1000)",
        _latents("UMD-L/2", "dit", "dit-l2", epochs=400),
    ),
    "diffmae-tiny": (
        "DiffMAE-Ti/4 on 32x32 colour emoji: minutes on a laptop",
        _diffmae(
            "DiffMAE-Ti/4", "diffmae-tiny", dict(image_size=(32, 32)), batch_size=64, minutes=10, save_every=200,
            draw_every=200, optim=OptimConfig(lr=1e-2), data=DataConfig(hflip=True),
            # With the paper's rho of 0.8, a short run sees too few timesteps with little noise to learn detail.
            schedule=ScheduleConfig("linear_rho", rho=1.0),
        ),
    ),
    "diffmae-b16": (
        "DiffMAE-B/16, 224x224 pixels: fills holes; decoder of 8 blocks, 512 wide",
        _diffmae("DiffMAE-B/16", "diffmae-b16", dict(image_size=(224, 224))),
    ),
    "diffmae-l16": (
        "DiffMAE-L/16, 224x224 pixels",
        _diffmae("DiffMAE-L/16", "diffmae-l16", dict(image_size=(224, 224))),
    ),
    "diffmae-video-l": (
        "DiffMAE-L/16, clips of 16 frames, 224x224 pixels, in tubelets of 2: 90 % masked",
        _diffmae(
            "DiffMAE-L/16", "diffmae-video-l", dict(image_size=(224, 224), num_frames=16, tubelet_size=2),
            mask_ratio=0.9, batch_size=512, data=DataConfig(source="clips", area_min=0.5, frame_stride=4),
        ),
    ),
}  # fmt: skip
