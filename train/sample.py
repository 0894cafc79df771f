"""`umd sample`: draw images from a run, streamed to disk by any number of ranks.

An image has the same bits on any rank and in any batch. Its noise is a function of (seed, number, step), and the
network sees the same `GROUP` images per call (all, if fewer are drawn), as a product's rounding depends on its size.
"""

import difflib
import io
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from umd.conditions import denoiser
from umd.config import Capture, Prediction, SamplerName
from umd.errors import UserError
from umd.files import check_place, write_whole
from umd.guidance import Denoise, Guidance
from umd.images import grid, png_path, save_png, to_uint8
from umd.model import UMD
from umd.schedule import NoiseSchedule, schedule_of
from umd.schedulers import open_sampler, sampler_times
from umd.tensor_files import write_npz
from umd.tokenizer import Tokenizer
from umd.train import opened
from umd.train.console import say
from umd.train.features import name_of, spans
from umd.train.heads import Heads
from umd.train.options import Sample
from umd.train.run import RunConfig, differences
from umd.train.sampling import GROUP, check_sampling, chosen_guidance, clips, draw_recipe, prediction_of
from umd.train.shards import Advance, Job, others_work, rank_and_size, share
from umd.train.weights import class_names, weights_identity

SHARD = 64  # images per temporary file
MOST_SHOWN = 256  # most images in the grid


def drawn_labels(classes: Sequence[int], count: int, balanced: bool, seed: int) -> Tensor:
    """Choose classes for `count` samples, int64 [count]: in turn (balanced), or at random.

    A larger count starts with the same labels.
    """
    if balanced:
        places = np.arange(count) % len(classes)
    else:
        words = np.random.Philox(np.random.SeedSequence((seed, 1))).random_raw(count)
        places = (words % np.uint64(len(classes))).astype(np.int64)
    return torch.tensor(classes, dtype=torch.int64)[torch.from_numpy(places)]


class Drawer:
    """Draws images by number. An image has the same bits in any order and batch.

    Args:
        labels: int64 [count], or None.
        batch: images per denoising loop, at most SHARD or `count`, rounded up to whole groups.
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
        self.batch = -(-min(batch, SHARD, count) // self.group) * self.group
        # Conditions of all labels, not only of a batch's, as the rounding of this product also depends on its size.
        known = None if labels is None else labels.unique()
        times = list(dict.fromkeys(sampler_times(sampler, num_steps, schedule)))
        denoise = denoiser(model, dtype, times, known)
        self.shape = (model.config.channels, *model.config.image_size)
        self.sampler = open_sampler(
            sampler, in_calls_of(self.group, denoise), (self.batch, *self.shape), schedule, num_steps=num_steps,
            eta=eta, clip=clip, predict=predict, head_weights=None if heads is None else heads.at_all_times(schedule),
            labelled=labels is not None, null_label=model.config.num_classes or None, cfg_scale=cfg_scale,
            guidance=guidance, seed=seed, device=self.device, capture=capture,
        )  # fmt: skip

    def x_start(self, first: int, last: int, advance: Advance = lambda done: None) -> Tensor:
        """Draw images first..last-1 as the network outputs them: [n, C, H, W]. `first` must start a group."""
        assert first % self.group == 0, "a group is drawn whole"
        drawn = []
        for start in range(first, last, self.batch):
            labels = None
            if self.labels is not None:
                labels = self.labels[:1].repeat(self.batch)  # any label for padding
                here = self.labels[start : min(start + self.batch, last)]
                labels[: len(here)] = here

            def tell(i: int, n: int, x_t: Tensor, x_start: Tensor, start: int = start) -> None:
                advance(start - first + min(self.batch, last - start) * (i + 1) / n)

            drawn.append(self.sampler(labels, first_sample=start, callback=tell))
        return torch.cat(drawn)[: last - first]

    def pictures(self, first: int, last: int, advance: Advance = lambda done: None) -> np.ndarray:
        """Draw images first..last-1 as pictures, uint8 [n, H, W, C]. Latents are decoded by the VAE."""
        wanted, drawn = last - first, -(-last // self.group) * self.group - first  # groups are drawn whole
        x = self.x_start(first, first + drawn, lambda done: advance(done * wanted / drawn))
        if self.tokenizer is not None:  # decode in groups, for the same bits
            x = torch.cat([self.tokenizer.decode(z) for z in x.split(self.group)])
        return to_uint8(x[:wanted])


def in_calls_of(rows: int, denoise: Denoise) -> Denoise:
    """Split each call of a denoiser into calls of exactly `rows` rows, which must divide the batch."""

    def call(x_t: Tensor, timesteps: Tensor, labels: Tensor | None) -> tuple[Tensor, ...]:
        parts = [
            denoise(x_t[i : i + rows], timesteps[i : i + rows], None if labels is None else labels[i : i + rows])
            for i in range(0, len(x_t), rows)
        ]
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    return call


def draw(run: Path, options: Sample, config: RunConfig, console: Console) -> None:
    """Draw samples and write them. If the command was stopped before, continue from its temporary files."""
    if config.is_classifier:
        raise UserError(f"{run} is a classifier and draws nothing; sample the run that it started from")
    files = places(run, options)
    if config.is_diffmae:
        raise UserError("a DiffMAE fills holes in pictures and draws none without: use `umd inpaint`")
    classes = chosen_classes(config, options.classes, options.balanced)
    count = options.count or options.per_class * max(len(classes), 1)
    check_sampling(options, config)
    # Fixed now, as a run that still trains may save newer ones.
    weights = weights_identity(config.out, options.ema, options.step)
    model, device, dtype = opened.open_run_of(UMD, config, options.ema, weights["step"])
    tokenizer = opened.open_tokenizer(config, options.vae, device)
    cfg_scale = options.cfg_scale if classes else 1.0
    predict, heads = prediction_of(options, config, weights, model, dtype, console)
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
            model, schedule_of(config.schedule), labels, count, num_steps=recipe["steps"],
            cfg_scale=cfg_scale, eta=options.eta, seed=options.seed, clip=clips(config, tokenizer), dtype=dtype,
            batch=options.batch, capture=options.capture, tokenizer=tokenizer, sampler=options.sampler,
            predict=predict, heads=heads, guidance=chosen_guidance(options),
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
                [job.path for job in jobs], count, labels, 16 if options.count else options.per_class, files, recipe,
                class_names(config) if classes else [],
            )  # fmt: skip
        except FileNotFoundError:  # another rank also found all parts done, and was faster
            if not is_there(files, recipe):
                raise
        removed = folder.with_name(f"{folder.name}-removed")
        with suppress(OSError):  # another rank was faster
            folder.rename(removed)  # at once, so that a rank still at work leaves nothing in it
        shutil.rmtree(removed, ignore_errors=True)
    say(console, f"{count} samples in {files[0]} and {files[1]}")


def places(run: Path, options: Sample) -> tuple[Path, Path, Path]:
    """Paths of grid, samples and settings.

    Raises UserError, before the work, if they cannot be written or would replace a file that is not of `umd sample`.
    """
    if options.out is not None and options.out.is_dir():
        raise UserError(f"{options.out} is a folder; give a file in it, e.g. --out {options.out / 'samples.png'}")
    png = png_path(options.out or run / "samples.png", ".npz", ".json")
    files = png, png.with_suffix(".npz"), png.with_suffix(".json")
    check_place(*files)
    there = next((file for file in files if file.exists()), None)
    parts = png.parent.glob(f".{escape(png.stem)}-*")  # left by a stopped command
    if there and not settings_in(files[-1]) and not any(parts):
        raise UserError(f"{there} is there and is no result of umd sample; give another --out, or remove it")
    return files


def settings_in(file: Path) -> dict[str, Any]:
    """Read the settings of samples from their .json. {} if the file holds none."""
    try:
        found = json.loads(file.read_text("utf-8"))
        return found if isinstance(found, dict) and "weights" in found else {}
    except (OSError, ValueError):
        return {}


def tell_replaced(files: Sequence[Path], recipe: dict[str, Any], console: Console) -> None:
    """Say before drawing which existing samples will be replaced."""
    if rank_and_size()[0] == 0 and (before := settings_in(files[-1])):
        differ = ", ".join(name for name, *_ in differences(before, json.loads(json.dumps(recipe)))) or "nothing"
        say(console, f"{files[1]} holds other samples, and will be replaced; what differs: {differ}")


def chosen_classes(config: RunConfig, asked: Sequence[str], balanced: bool) -> tuple[int, ...]:
    """Numbers of the classes to draw, () for a run without labels.

    asked: names or numbers. A text that is both counts as a name. Raises UserError if one is unknown or given twice.
    """
    known = getattr(config.model, "num_classes", 0)
    if balanced and not known:
        raise UserError("this run was trained without labels, so there are none to balance; leave out --balanced")
    names = class_names(config)
    numbers = {str(number): number for number in range(known)} | {name: number for number, name in enumerate(names)}
    if bad := [word for word in asked if word not in numbers]:
        has = "this run was trained without labels: leave out --classes"
        if known:
            shown = f" ({', '.join(names[:8])}{', ...' if known > 8 else ''})" if names else ""
            has = f"this run has {known} classes, 0 to {known - 1}{shown}"
            near = difflib.get_close_matches(bad[0], names, n=1)
            has += f"; did you mean {near[0]}?" if near else "; choose others, or leave out --classes for all"
        raise UserError(f"class {bad[0]} is unknown: {has}")
    classes = tuple(numbers[word] for word in asked)
    if twice := [number for number in classes if classes.count(number) > 1]:
        raise UserError(
            f"class {asked[classes.index(twice[0])]} is given twice: name each once; --per-class draws more"
        )
    return classes or tuple(range(known))


def is_there(files: Sequence[Path], recipe: dict[str, Any]) -> bool:
    """Whether grid, samples and settings exist and were made with this recipe."""
    return all(file.exists() for file in files) and settings_in(files[-1]) == recipe


def put_together(
    parts: Sequence[Path], count: int, labels: Tensor | None, columns: int, files: Sequence[Path],
    recipe: dict[str, Any], names: Sequence[str],
) -> None:  # fmt: skip
    """Write grid, .npz and .json from the parts, one part in memory at a time.

    The .json comes last, so its existence means that all is there.
    """
    png, npz, settings = files
    shown = np.concatenate([read_part(part) for part in parts[: -(-MOST_SHOWN // SHARD)]])[:MOST_SHOWN]
    settings.unlink(missing_ok=True)
    class_ids = np.full(count, -1) if labels is None else labels.numpy()  # -1: unconditional
    others = {"arr_1": class_ids} | ({"classes": np.array(names)} if names else {})
    write_npz(npz, "arr_0", "|u1", (count, *shown.shape[1:]), map(read_part, parts), others)
    save_png(grid(shown, columns=min(columns, len(shown))), png, scale=max(1, 128 // shown.shape[1]))
    write_whole(settings, json.dumps(recipe, indent=1).encode())


def read_part(part: Path) -> np.ndarray:
    """Read pictures, uint8 [n, H, W, C]. Raises UserError for an incomplete file, which is then drawn again."""
    try:
        return np.load(part, allow_pickle=False)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, EOFError) as error:
        part.unlink(missing_ok=True)
        raise UserError(
            f"{part} was damaged and is removed: run the same command again, which draws it anew"
        ) from error


def picture_bytes(drawer: Drawer, first: int, last: int, advance: Advance) -> bytes:
    """Draw pictures first..last-1. Returns the bytes of a .npy file."""
    stream = io.BytesIO()
    np.save(stream, drawer.pictures(first, last, advance), allow_pickle=False)
    return stream.getvalue()
