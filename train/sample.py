"""`umd sample`: images of a run, streamed to disk by any number of ranks.

No bit of an image depends on who draws it when. Its noise is a function of (seed, number, step); and the network always
sees the same `GROUP` images in one call, because the rounding of a product depends on its size.
"""

import io
import json
import math
import os
import shutil
import socket
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from umd.conditions import make_conditions
from umd.device import autocast
from umd.errors import UserError
from umd.files import check_place, flush, write_whole
from umd.guidance import Denoise, Guidance, Prediction
from umd.images import grid, save_png, to_uint8
from umd.model import UMD
from umd.sampler import Capture
from umd.schedule import NoiseSchedule
from umd.schedulers import SamplerName, open_sampler, sampler_times
from umd.tokenizer import Tokenizer
from umd.train import evaluate
from umd.train.features import name_of, spans
from umd.train.heads import Heads
from umd.train.run import RunConfig, weights_identity
from umd.train.sampling import GROUP, Sampling, clips, draw_recipe
from umd.train.shards import Advance, Job, others_work, rank_and_size, share
from umd.train.store import differences

SHARD = 64  # images a file while they are drawn
MOST_SHOWN = 256  # images in the grid


@dataclass(frozen=True)
class Sample(Sampling):
    """Draw samples from a run: a PNG grid, an .npz as ADM's evaluator reads it (arr_0: uint8 images [N, H, W, C],
    arr_1: labels [N]) and a .json of all settings. The same command goes on after a stop; under torchrun each rank
    draws its share."""

    classes: tuple[int, ...] = ()
    """Which classes; default: all. A run without labels is sampled unconditionally."""
    per_class: int = 8
    """Samples of each class (of all, without labels)."""
    count: int = 0
    """Samples in all instead, each of a class drawn at random."""
    balanced: bool = False
    """With count: as many of each class, in turn."""
    cfg_scale: float = 4.0
    """Guidance; 1: none. The paper uses 1.5 for scores, 4.0 for pictures."""
    seed: int = 0
    """Sample i of a seed is the same picture, byte for byte, on any number of ranks and at any batch."""
    batch: int = 64
    """Images of one denoising loop, rounded up to groups of 32, which the network always sees together; up to 64."""
    ema: bool = True
    """Averaged weights, where the run has them."""
    vae: str = ""
    """Of a run on latents, its VAE where it no longer lies where it lay: hub id or folder."""
    out: Path | None = None
    """Where the PNG goes, .npz and .json beside it; default: RUN/samples.png."""

    def __post_init__(self) -> None:
        for name in ("per_class", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not math.isfinite(self.cfg_scale):
            raise UserError(f"cfg_scale must be a finite number, 1: no guidance; got {self.cfg_scale}")
        if self.seed < 0:
            raise UserError(f"seed must be 0 or more, got {self.seed}")
        if self.count < 0:
            raise UserError(f"count must be 0 (per_class of each class) or more, got {self.count}")
        if self.balanced and not self.count:
            raise UserError("balanced goes with --count N; without it there are as many of each class anyway")


def drawn_labels(classes: Sequence[int], count: int, balanced: bool, seed: int) -> Tensor:
    """The classes of `count` samples, int64 [count]: in turn, or each at random. More samples begin with the same."""
    if balanced:
        places = np.arange(count) % len(classes)
    else:
        words = np.random.Philox(np.random.SeedSequence((seed, 1))).random_raw(count)
        places = (words % np.uint64(len(classes))).astype(np.int64)
    return torch.tensor(classes, dtype=torch.int64)[torch.from_numpy(places)]


class Drawer:
    """Draws images by their numbers, the same bits in whatever order and company.

    Args:
        labels: int64 [count], or None.
        batch: images of one denoising loop, rounded up to whole groups.
    """

    def __init__(
        self, model: UMD, schedule: NoiseSchedule, labels: Tensor | None, count: int, *, num_steps: int,
        cfg_scale: float, eta: float, seed: int, clip: bool, dtype: torch.dtype, batch: int = SHARD,
        capture: Capture = "auto", tokenizer: Tokenizer | None = None, sampler: SamplerName = "ddim",
        predict: Prediction = "eps", heads: Heads | None = None, guidance: Guidance | None = None,
    ):  # fmt: skip
        self.labels, self.tokenizer = labels, tokenizer
        self.device = next(model.parameters()).device
        self.group = min(GROUP, count)
        self.batch = -(-min(batch, SHARD) // self.group) * self.group
        # Of all labels, and not of a batch's: the rounding of this product too depends on its size.
        known = None if labels is None else labels.unique()
        times = list(dict.fromkeys(sampler_times(sampler, num_steps, schedule)))
        conditions = make_conditions(model, times, known)

        def denoise(x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> tuple[Tensor, ...]:
            with autocast(x_t.device, dtype):
                return model.denoise(x_t, timesteps, labels, conditions)

        self.shape = (model.config.channels, *model.config.image_size)
        self.sampler = open_sampler(
            sampler, in_calls_of(self.group, denoise), (self.batch, *self.shape), schedule, num_steps=num_steps,
            eta=eta, clip=clip, predict=predict, head_weights=None if heads is None else heads.at_all_times(schedule),
            labelled=labels is not None, null_label=model.config.num_classes or None, cfg_scale=cfg_scale,
            guidance=guidance, seed=seed, device=self.device, capture=capture,
        )  # fmt: skip

    def x_start(self, first: int, last: int, advance: Advance = lambda done: None) -> Tensor:
        """Images first..last-1, as the network has them: [n, C, H, W]. `first` is that of a group."""
        assert first % self.group == 0, "a group is drawn whole"
        drawn = []
        for start in range(first, last, self.batch):
            labels = None
            if self.labels is not None:
                labels = self.labels[:1].repeat(self.batch)  # of the ones too many: any
                here = self.labels[start : min(start + self.batch, last)]
                labels[: len(here)] = here

            def tell(i: int, n: int, x_t: Tensor, x_start: Tensor, start: int = start) -> None:
                advance(start - first + min(self.batch, last - start) * (i + 1) / n)

            drawn.append(self.sampler(labels, first_sample=start, callback=tell))
        return torch.cat(drawn)[: last - first]

    def pictures(self, first: int, last: int, advance: Advance = lambda done: None) -> np.ndarray:
        """The same as pictures, uint8 [n, H, W, C]; of latents the VAE's."""
        x = self.x_start(first, -(-last // self.group) * self.group, advance)
        if self.tokenizer is not None:  # by groups, as the network
            x = torch.cat([self.tokenizer.decode(z) for z in x.split(self.group)])
        return to_uint8(x[: last - first])


def in_calls_of(rows: int, denoise: Denoise) -> Denoise:
    """The denoiser in calls of exactly so many rows, which divide the batch."""

    def call(x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> tuple[Tensor, ...]:
        parts = [
            denoise(x_t[i : i + rows], timesteps[i : i + rows], None if labels is None else labels[i : i + rows])
            for i in range(0, len(x_t), rows)
        ]
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    return call


def draw(run: Path, options: Sample, config: RunConfig, console: Console) -> None:
    """Draw what `options` ask for and write it, or go on with what is there of it."""
    if config.is_classifier:
        raise UserError(f"{run} is a classifier and draws nothing; sample the run that it started from")
    files = places(run, options)
    if config.is_diffmae:
        raise UserError("a DiffMAE fills holes in pictures and draws none without: use `umd inpaint`")
    classes = check_classes(config, options.classes, options.balanced)
    count = options.count or options.per_class * max(len(classes), 1)
    weights = weights_identity(config.out, options.ema)  # a run that still trains may save others meanwhile
    model, device, dtype = evaluate.open_run_of(UMD, config, options.ema, weights["step"])
    tokenizer = evaluate.open_tokenizer(config, options.vae, device)
    cfg_scale = options.cfg_scale if classes else 1.0
    predict, heads = options.prediction(config, weights, model, dtype, console)
    if not classes:
        labels, order = None, "none"
    elif options.count:
        labels = drawn_labels(classes, count, options.balanced, options.seed)
        order = "in turn" if options.balanced else "at random"
    else:
        labels, order = torch.tensor(classes).repeat_interleave(options.per_class), f"{options.per_class} of each"
    recipe = draw_recipe(
        config, weights, device, dtype, tokenizer, count, options, classes=classes, order=order, cfg_scale=cfg_scale,
        seed=options.seed, predict=predict, heads=heads,
    )  # fmt: skip
    png = files[0]
    if not is_there(files, recipe):
        tell_replaced(files, recipe, console)
        drawer = Drawer(
            model, evaluate.schedule_of(config.schedule), labels, count, num_steps=recipe["steps"],
            cfg_scale=cfg_scale, eta=options.eta, seed=options.seed, clip=clips(config, tokenizer), dtype=dtype,
            batch=options.batch, capture=options.capture, tokenizer=tokenizer, sampler=options.sampler,
            predict=predict, heads=heads, guidance=options.guidance,
        )  # fmt: skip
        folder = png.with_name(f".{png.stem}-{name_of(recipe)}")
        jobs = [
            Job(folder / f"{first:08d}.npy", last - first, partial(picture_bytes, drawer, first, last))
            for first, last in spans(count, SHARD)
        ]
        if not share(jobs, console, "samples"):
            console.print(others_work(), highlight=False)
            return
        try:
            put_together(
                [job.path for job in jobs], count, labels, 16 if options.count else options.per_class, files, recipe
            )
        except FileNotFoundError:  # another rank that found the last part too was faster
            if not is_there(files, recipe):
                raise
        shutil.rmtree(folder, ignore_errors=True)
    where = f"{files[0]} and {files[1]}"
    console.print(f"{count} samples in {where}", highlight=False, markup=False, soft_wrap=True)


def places(run: Path, options: Sample) -> tuple[Path, Path, Path]:
    """Where grid, samples and settings go. Raises UserError, before the work, where they cannot be written, or where
    a file lies that no `umd sample` has written."""
    png = options.out or run / "samples.png"
    known = png.suffix.lower() in (".png", ".npz", ".json")
    png = png.with_suffix(".png") if known else png.with_name(f"{png.name}.png")
    files = png, png.with_suffix(".npz"), png.with_suffix(".json")
    check_place(*files)
    there = next((file for file in files if file.exists()), None)
    parts = png.parent.glob(f".{escape(png.stem)}-*")  # of a command that was stopped, perhaps while it wrote these
    if there and not settings_in(files[-1]) and not any(parts):
        raise UserError(f"{there} is there and is no result of umd sample; give another --out, or remove it")
    return files


def settings_in(file: Path) -> dict[str, Any]:
    """What samples beside this .json were drawn with; {} if it says nothing of samples."""
    try:
        found = json.loads(file.read_text())
        return found if isinstance(found, dict) and "weights" in found else {}
    except (OSError, ValueError):
        return {}


def tell_replaced(files: Sequence[Path], recipe: dict[str, Any], console: Console) -> None:
    """Say which samples the new ones will replace, while there is time to stop."""
    if rank_and_size()[0] == 0 and (before := settings_in(files[-1])):
        differ = ", ".join(differences(before, json.loads(json.dumps(recipe)))) or "nothing"
        text = f"{files[1]} holds other samples, and will be replaced; what differs: {differ}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def check_classes(config: RunConfig, asked: Sequence[int], balanced: bool) -> tuple[int, ...]:
    """The classes to draw, () of a run without labels."""
    known = getattr(config.model, "num_classes", 0)
    if balanced and not known:
        raise UserError("this run was trained without labels, so there are none to balance; leave out --balanced")
    classes = tuple(asked) or tuple(range(known))
    if bad := [c for c in classes if not 0 <= c < known]:
        has = f"this run has {known} classes, 0 to {known - 1}" if known else "this run was trained without labels"
        raise UserError(f"class {bad[0]} is unknown: {has}; choose others, or leave out --classes")
    return classes


def is_there(files: Sequence[Path], recipe: dict[str, Any]) -> bool:
    """Whether grid, samples and settings lie there, and are of these settings."""
    if not all(file.exists() for file in files):
        return False
    try:
        return json.loads(files[-1].read_text()) == recipe
    except (OSError, ValueError):
        return False


def put_together(
    parts: Sequence[Path], count: int, labels: Tensor | None, columns: int, files: Sequence[Path],
    recipe: dict[str, Any],
) -> None:  # fmt: skip
    """Grid, .npz and .json of the parts, in memory one part at a time. The .json comes last: with it all is there."""
    png, npz, settings = files
    shown = np.concatenate([read_part(part) for part in parts[: -(-MOST_SHOWN // SHARD)]])[:MOST_SHOWN]
    settings.unlink(missing_ok=True)
    class_ids = np.full(count, -1) if labels is None else labels.numpy()  # -1: unconditional
    write_npz(npz, (count, *shown.shape[1:]), map(read_part, parts), class_ids)
    save_png(grid(shown, columns=min(columns, len(shown))), png, scale=max(1, 128 // shown.shape[1]))
    write_whole(settings, json.dumps(recipe, indent=1).encode())


def read_part(part: Path) -> np.ndarray:
    """Pictures uint8 [n, H, W, C]. Raises UserError for a file that is not whole, which is then drawn anew."""
    try:
        return np.load(part, allow_pickle=False)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError) as error:
        part.unlink(missing_ok=True)
        raise UserError(
            f"{part} was damaged and is removed: run the same command again, which draws it anew"
        ) from error


def write_npz(path: Path, shape: tuple[int, ...], parts: Iterable[np.ndarray], labels: np.ndarray) -> None:
    """What `np.savez(path, images, labels)` writes, from parts of the images: uint8 `shape` (arr_0), int64 (arr_1)."""
    unfinished = path.with_name(f".unfinished-{path.name}-{socket.gethostname()}-{os.getpid()}")
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    try:
        with zipfile.ZipFile(unfinished, "w") as archive:  # stored: uncompressed, and the same bytes everywhere
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for part in parts:
                    member.write(np.ascontiguousarray(part).data)
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, labels, allow_pickle=False)
        flush(unfinished)
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def picture_bytes(drawer: Drawer, first: int, last: int, advance: Advance) -> bytes:
    """Pictures first..last-1 as a .npy file."""
    stream = io.BytesIO()
    np.save(stream, drawer.pictures(first, last, advance), allow_pickle=False)
    return stream.getvalue()
