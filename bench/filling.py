"""`umd bench reproduce filling`: train an MAE and a DiffMAE and compare how they fill hidden patches.

Both have the same encoder, masks and number of steps, and fill the same held-out pictures. Three things are measured
by spatial frequency:

- energy: how much detail there is (in one number: the log-spectral distance to the originals),
- error: the squared distance from the original,
- variance: how much samples differ.

Frequencies are those of the discrete cosine transform of each hidden patch. It needs no window, and visible patches
and seams between patches do not leak into it. Note on the error: an MAE predicts the mean of all plausible fillings. No
sample can beat the squared error of that mean; a sample from the true distribution has twice the error.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from umd import ops
from umd.bench.options import Reproduce
from umd.config import OBJECTIVES, DiffMAEConfig, DiffMAEObjectiveConfig, ScheduleConfig, model_config
from umd.diffmae import DiffMAE, fill, pixel_mask
from umd.errors import UserError
from umd.files import write_json
from umd.flops import diffmae_encoder_flops
from umd.images import grid
from umd.methods import build_objective
from umd.model import UMD
from umd.objective import DiffMAEObjective
from umd.report.figures import COLOURS, STYLE
from umd.schedule import schedule_of
from umd.train import opened
from umd.train.data import center_view, open_dataset
from umd.train.inpaint import reconstruct
from umd.train.log import read_metrics
from umd.train.loop import train
from umd.train.presets import PRESETS
from umd.train.preview import rgb
from umd.train.run import RunConfig

STEPS = 2400
SAMPLES = 8  # per picture
SAMPLING_STEPS = 50
SHOWN = 10  # pictures in the grid
HIGH = 0.25  # cycles per pixel; frequencies above count as high. Half the highest along an axis


def run_configs(options: Reproduce) -> dict[str, RunConfig]:
    """DiffMAE-Ti/4 by its preset, and an MAE with the same encoder and recipe."""
    diffmae = replace(
        PRESETS["diffmae-tiny"][1], out=options.out / "diffmae", steps=options.steps or STEPS, minutes=0, keep=1,
        draw_every=0, seed=options.seed, device=options.device,
    )  # fmt: skip
    mae = replace(
        diffmae, out=options.out / "mae", model=model_config("UMD-Ti/4", image_size=(32, 32), adaLN=False),
        objective=OBJECTIVES["mae"], schedule=ScheduleConfig(),
    )  # fmt: skip
    return {"MAE": mae, "DiffMAE": diffmae}


@dataclass
class Filled:
    """N pictures [N, C, H, W] in [-1, 1], with the same patches hidden for both networks, and their fillings."""

    original: Tensor
    hole: Tensor  # [N, 1, H, W], 0 keep, 1 remove
    mae: Tensor
    first: Tensor  # what DiffMAE's first call predicts, from pure noise
    samples: Tensor  # [N, n, C, H, W]


def reproduce(options: Reproduce, console: Console) -> None:
    configs = run_configs(options)
    for name, config in configs.items():
        train(config, console, name)
    filled = fill_held_out(configs, options, console)
    spectra = measure(filled, configs["MAE"].model.patch_size)
    numbers = {**facts(configs), **summary(filled, spectra, console)}
    options.figures.mkdir(parents=True, exist_ok=True)
    draw_spectra(spectra, options.figures / "filling-spectrum.png")
    draw_grid(filled, options.figures / "filling.png")
    stored = {"numbers": numbers, "spectra": {name: values.tolist() for name, values in spectra.items()}}
    write_json(options.figures / "filling.json", stored)
    print_numbers(numbers, console)


def facts(configs: dict[str, RunConfig]) -> dict[str, float]:
    """Facts of each training: steps, minutes, GFLOP per image of a step, and of the encoder's forward pass."""
    numbers: dict[str, float] = {}
    for name, config in configs.items():
        schedule = schedule_of(config.schedule)
        objective = build_objective(config.model, config.objective, schedule)
        last = read_metrics(config.out / "metrics.jsonl")[-1]
        numbers[f"{name}: steps"] = last["step"]
        numbers[f"{name}: minutes of training"] = last["seconds"] / 60
        numbers[f"{name}: GFLOP an image of a training step"] = objective.step_flops(64) / 64 / 1e9
    model = configs["DiffMAE"].model
    keep = model.num_patches // 4
    numbers["encoder: GFLOP an image, forward, without the decoder's keys"] = encoder_flops(model, keep) / 1e9
    return numbers


def encoder_flops(model, keep: int) -> float:
    """FLOPs of the encoder blocks that both networks have. MAE's see one token more, for the condition."""
    keys = (keep + model.num_cls) * 2 * model.hidden_size * 2 * model.decoder_hidden_size * model.decoder_depth
    return diffmae_encoder_flops(model, (keep,)) - keys


@torch.no_grad()
def fill_held_out(configs: dict[str, RunConfig], options: Reproduce, console: Console) -> Filled:
    config = configs["DiffMAE"]
    mae, device, dtype = opened.open_run_of(UMD, configs["MAE"])
    diffmae, _, _ = opened.open_run_of(DiffMAE, config)
    schedule = schedule_of(config.schedule)
    objective = DiffMAEObjective(*config.parts(DiffMAEConfig, DiffMAEObjectiveConfig), schedule)
    dataset = open_dataset(config.data, "test")
    ids = np.random.default_rng(options.seed).permutation(len(dataset))[: options.pictures]
    pictures = center_view(dataset, ids, config.data).to(device)
    masked = objective.corrupt(len(pictures), options.seed, device).ids_masked
    mask = torch.zeros(len(pictures) * config.model.num_patches, device=device).index_fill(0, masked, 1)
    hole = pixel_mask(mask.view(len(pictures), -1), diffmae.config)
    parts = []
    starts = range(0, len(pictures), 32)
    for start in track(starts, description="fillings", console=console, disable=not console.is_terminal):
        x, h = pictures[start : start + 32], hole[start : start + 32]
        first: list[Tensor] = []

        def watch(i: int, n: int, x_t: Tensor, x_start: Tensor, x=x, first=first) -> None:
            if i == 0:
                first.append(x_start.view(len(x), SAMPLES, *x.shape[1:])[:, 0])

        samples = fill(
            diffmae, x, h, schedule, fillings=SAMPLES, num_steps=SAMPLING_STEPS, seed=options.seed,
            first_sample=SAMPLES * start, dtype=dtype, callback=watch,
        )  # fmt: skip
        first_call = torch.where(h.bool(), first[0], x)
        parts.append((x, h, reconstruct(mae, x, h, dtype).clamp(-1, 1), first_call, samples))
    return Filled(*(torch.cat(part).cpu() for part in zip(*parts, strict=True)))


def cosine_transform(x: Tensor, hole: Tensor, patch_size: int) -> Tensor:
    """Orthonormal DCT of the M hidden patches of pictures [N, C, H, W]. Returns [M, C, P, P].

    Coefficient (u, v) has u / 2P and v / 2P cycles per pixel.
    """
    P = patch_size
    n = torch.arange(P, dtype=torch.float64)
    basis = torch.cos(math.pi / P * n[:, None] * (n + 0.5)) * (2 / P) ** 0.5  # [frequency, pixel]
    basis[0] /= 2**0.5
    hidden = ops.patchify(hole, P).amax(-1).flatten() > 0
    patches = ops.patchify(x, P).flatten(0, 1)[hidden].view(-1, x.shape[1], P, P).double()
    return basis @ patches @ basis.T


def radial(energy: Tensor) -> tuple[Tensor, Tensor]:
    """Average energies [P, P] over frequencies (u, v) of equal |(u, v)|. Returns cycles per pixel [K], energy [K]."""
    P = len(energy)
    n = torch.arange(P)
    squares, place = (n[:, None] ** 2 + n**2).unique(return_inverse=True)
    total = torch.zeros(len(squares), dtype=energy.dtype).index_add(0, place.flatten(), energy.flatten())
    return squares.double().sqrt() / (2 * P), total / torch.bincount(place.flatten())


def measure(filled: Filled, patch_size: int) -> dict[str, Tensor]:
    """Compute by frequency the originals' energy and, as multiples of it, each filling's energy and error and the
    variance between samples."""

    def transform(x: Tensor) -> Tensor:
        return cosine_transform(x, filled.hole, patch_size)

    original = transform(filled.original)
    mean = original.mean((0, 1))  # mean of each frequency, which is not 0 as emoji are on white
    samples = torch.stack([transform(sample) for sample in filled.samples.unbind(1)])  # [n, M, C, P, P]
    kinds = {
        "MAE": transform(filled.mae), "DiffMAE, first call": transform(filled.first), "DiffMAE, a sample": samples[0],
        f"DiffMAE, mean of {len(samples)} samples": samples.mean(0),
    }  # fmt: skip
    frequency, energy = radial((original - mean).square().mean((0, 1)))
    out = {"cycles a pixel": frequency, "energy of the originals": energy}
    for name, coefficients in kinds.items():
        out[f"energy: {name}"] = radial((coefficients - mean).square().mean((0, 1)))[1] / energy
        out[f"error: {name}"] = radial((coefficients - original).square().mean((0, 1)))[1] / energy
    if len(samples) > 1:
        out["variance between samples"] = radial(samples.var(0).mean((0, 1)))[1] / energy
    return out


def log_spectral_distance(energy: Tensor) -> float:
    """Log-spectral distance in dB: rms over frequencies of the energies [K] relative to the originals'."""
    return float((10 * energy.log10()).square().mean().sqrt())


def summary(filled: Filled, spectra: dict[str, Tensor], console: Console) -> dict[str, float]:
    hidden = filled.hole.expand_as(filled.original).bool()
    high = spectra["cycles a pixel"] >= HIGH
    weight = spectra["energy of the originals"][high]
    numbers: dict[str, float] = {}
    for key, values in spectra.items():
        if ":" in key or key.startswith("variance"):
            numbers[f"{key}, from {HIGH} cycles a pixel"] = float((values[high] * weight).sum() / weight.sum())
        if key.startswith("energy: "):
            name = f"log-spectral distance in dB, from {HIGH} cycles a pixel: {key[8:]}"
            numbers[name] = log_spectral_distance(values[high])
    kinds = {"MAE": filled.mae, "DiffMAE, first call": filled.first, "DiffMAE, a sample": filled.samples[:, 0]}
    kinds[f"DiffMAE, mean of {filled.samples.shape[1]} samples"] = filled.samples.mean(1)
    for name, x in kinds.items():
        numbers[f"mean squared error on hidden pixels: {name}"] = float((x - filled.original)[hidden].square().mean())
    spread = filled.samples.std(1)
    numbers["deviation between samples, hidden pixels"] = float(spread[hidden].mean())
    numbers["deviation between samples, visible pixels"] = float(spread[~hidden].abs().max())
    a, b = filled.samples[:, 0], filled.samples[:, 1]
    numbers["distance of two samples, hidden pixels, rms"] = float((a - b)[hidden].square().mean().sqrt())
    numbers["distance of sample and original, rms"] = float((a - filled.original)[hidden].square().mean().sqrt())
    try:
        for name, x in (("MAE", filled.mae), ("DiffMAE, a sample", filled.samples[:, 0])):
            distance, value = opened.frechet(x, filled.original, console)
            numbers[f"{distance} to the originals: {name}"] = value
    except UserError as error:  # the feature network is not installed
        console.print(f"no Fréchet distance: {error}", highlight=False)
    return numbers


def draw_spectra(spectra: dict[str, Tensor], path: Path) -> None:
    f = spectra["cycles a pixel"].numpy()
    mean = next(key for key in spectra if key.startswith("error: DiffMAE, mean")).removeprefix("error: ")
    lines = {
        "MAE": ("orange", "-"), "DiffMAE, first call": ("orange", ":"), "DiffMAE, a sample": ("blue", "-"),
        mean: ("blue", ":"),
    }  # fmt: skip
    panels = {
        "energy": ("How much there is", "energy / the originals'"),
        "error": ("How far from the original", "squared error / the originals' energy"),
    }
    with rc_context(STYLE):
        figure = Figure(figsize=(10, 3.4), layout="constrained", dpi=150)
        axes = figure.subplots(1, 3)
        for ax, (key, (title, unit)) in zip(axes, panels.items(), strict=False):
            for name, (colour, style) in lines.items():
                ax.plot(f, spectra[f"{key}: {name}"], style, color=COLOURS[colour], label=name, linewidth=1.5)
            ax.axhline(1, color=COLOURS["muted"], linewidth=0.8)
            ax.set_title(title)
            ax.set_ylabel(unit)
        axes[0].legend(loc="upper right")
        variance, n = spectra["variance between samples"], int(mean.split()[-2])
        axes[2].plot(f, variance * (1 + 1 / n), color=COLOURS["green"], label="what the samples' variance asks for")
        axes[2].plot(f, spectra[f"error: {mean}"], ":", color=COLOURS["blue"], label=f"error of the {mean[9:]}")
        axes[2].set_title("Are samples varied enough?")
        axes[2].set_ylabel("/ the originals' energy")
        axes[2].legend(loc="upper right")
        for ax in axes:
            ax.set_ylim(0, max(1.5, ax.get_ylim()[1]))  # room for the legend
            ax.set_xlabel("frequency within a patch, cycles a pixel")
            ax.grid(axis="y")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, facecolor="white")


def draw_grid(filled: Filled, path: Path) -> None:
    """Draw one picture per column: masked, MAE, DiffMAE's first call, samples, their mean, original."""
    grey = torch.where(filled.hole.bool(), torch.full_like(filled.original, 168 / 127.5 - 1), filled.original)
    rows = {"what both see": grey, "MAE": filled.mae, "DiffMAE, first call": filled.first}
    rows |= {f"DiffMAE, sample {i + 1}": filled.samples[:, i] for i in range(min(3, filled.samples.shape[1]))}
    rows |= {f"mean of {filled.samples.shape[1]} samples": filled.samples.mean(1), "original": filled.original}
    columns, side = min(SHOWN, len(filled.original)), filled.original.shape[-1] + 2
    sheet = grid(np.concatenate([rgb(row[:columns]) for row in rows.values()]), columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(0.75 * columns, 0.75 * len(rows)), dpi=150)
        ax = figure.add_axes((0, 0, 1, 1))
        ax.imshow(sheet, interpolation="nearest")
        ax.set_xticks([])
        ax.set_yticks([1 + side * (i + 0.5) for i in range(len(rows))], list(rows))
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        figure.savefig(path, facecolor="white", bbox_inches="tight")  # includes the names beside the axes


def print_numbers(numbers: dict[str, float], console: Console) -> None:
    table = Table()
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in numbers.items():
        table.add_row(name, f"{value:.4g}")
    console.print(table)
