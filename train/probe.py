"""`umd probe`: classify with a frozen network's representation, for data of any size and on any number of ranks.

Shots are drawn first, from the labels. Only the shots' pictures and the held-out ones are read, once for all networks.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from umd.config import kind_of
from umd.errors import UserError
from umd.files import check_place, write_whole
from umd.linear_probe import knn_accuracy, linear_probe
from umd.machine.device import autocast
from umd.methods import AnyModel, build_model
from umd.model import UMD
from umd.ops import philox_randn_rows
from umd.probe import ProbeResult, draw_shots, fewshot_accuracy
from umd.schedule import NoiseSchedule, schedule_of
from umd.train.console import say
from umd.train.data import Dataset, open_dataset
from umd.train.features import Extract, Features, identity_of, name_of, pictures_of
from umd.train.fingerprint import check_trained_on, with_source
from umd.train.latents import LatentDataset
from umd.train.opened import open_run
from umd.train.options import Probe
from umd.train.pixels import PixelDataset, squeezed
from umd.train.run import RunConfig, at_size
from umd.train.shards import Job, others_work, share
from umd.train.weights import weights_identity

NOISED_PROBE_INDEX = 50  # schedule index at which a network that never saw noise-free images is probed
FEW = 50  # held-out pictures; with fewer the table says so
MOST_PIXELS = 3072  # values of a picture as raw features; larger pictures are averaged down


def probe(run: Path, options: Probe, config: RunConfig, console: Console) -> None:
    """Probe a run, print the table and write RUN/probe.json. Ranks share the work; the last one writes.

    With --layers, see `probe_layers`.
    """
    config = at_size(config, options.image_size)
    if options.layers:
        from umd.train.layers import probe_layers

        probe_layers(run, options, config, console)
        return
    file = (options.out or run) / "probe.json"
    check_place(file)
    recognition = Recognition(own_pictures(run, config, options.source, console), options)
    tell_notes(console, recognition.train, recognition.test)
    if not share(recognition.jobs(), console, "pictures read"):
        console.print(others_work(), highlight=False)
        return
    entry = recognition.entry()
    if (n := entry["test_images"]) < FEW:
        console.print(f"only {n} held-out pictures: each is {100 / n:.0f} % of an accuracy", soft_wrap=True)
    print_rows(entry["rows"], f"{config.out}: probes on {entry['test_images']} held-out pictures", console)
    write_whole(file, json.dumps(entry["results"], indent=1).encode())


def tell_notes(console: Console, *datasets: Dataset) -> None:
    """Print the datasets' notes about odd files, each once."""
    for note in dict.fromkeys(note for dataset in datasets for note in getattr(dataset, "notes", ())):
        say(console, note)


def own_pictures(run: Path, config: RunConfig, source: str, console: Console) -> RunConfig:
    """The run with the pictures to score its representation on: `source`, or its own if that is "".

    Reports if they differ from the training data. Raises UserError if they are missing, or have changed unintended.
    """
    config = with_source(config, source)
    if not (source or config.data.source == "emoji" or Path(config.data.source).expanduser().exists()):
        raise UserError(f"the pictures of {run} are not at {config.data.source}: give --source with where they lie now")
    mend = f"give --source {config.data.source} to take these"
    check_trained_on(run, config, mend, partial(say, console), bool(source))
    return config


def print_rows(rows: Sequence[dict[str, Any]], title: str, console: Console) -> None:
    table = Table(title=title)
    for column in ("probe", "features", "accuracy", "spread"):
        table.add_column(column)
    for row in rows:
        spread = "" if row["spread"] is None else f"± {row['spread']:.3f}"
        table.add_row(row["probe"], row["features"], f"{row['accuracy']:.3f}", spread)
    console.print(table)


class Recognition:
    """Probes of a run's representation: the pictures they need, and the results once features are computed.

    candidates, test_ids: indices of training and held-out pictures that may be used. None: all.
    Raises UserError if there are no labels, no held-out pictures, or too few pictures of a class.
    """

    def __init__(
        self, config: RunConfig, options: Probe, candidates: np.ndarray | None = None,
        test_ids: np.ndarray | None = None,
    ):  # fmt: skip
        self.config, self.options = config, options
        self.train, self.test = labelled(config)
        assert self.train.labels is not None and self.test.labels is not None
        candidates = np.arange(len(self.train)) if candidates is None else candidates
        test_ids = np.arange(len(self.test)) if test_ids is None else test_ids
        self.classes = list(self.train.class_names)
        labels = torch.from_numpy(self.train.labels[candidates])
        draws = draw_shots(
            labels, options.shots, len(self.classes), options.seeds, pool=options.pool,
            allow_fewer=options.allow_fewer, class_names=self.classes,
        )  # fmt: skip
        drawn = [candidates[torch.cat(draw).numpy()] for draw in draws]
        chosen = np.unique(np.concatenate(drawn))
        self.draws = [[torch.from_numpy(np.searchsorted(chosen, candidates[i.numpy()])) for i in d] for d in draws]
        # Fixed now, as a run that still trains may save newer ones.
        weights = weights_identity(config.out, options.ema, options.step)
        self.model, self.device, self.dtype = open_run(config, options.ema, weights["step"])
        recipe = probe_recipe(config, weights, self.device, self.dtype)
        root = (options.out or config.out) / "features"
        self.shots = Features(root, recipe | of(self.train, chosen) | {"floors": True}, chosen)
        self.held_out = Features(root, recipe | of(self.test, test_ids) | {"floors": True}, test_ids)
        whole = np.arange(len(self.train)) if options.linear else chosen
        self.whole = Features(root, recipe | of(self.train, whole), whole)

    def jobs(self) -> list[Job]:
        zoom = published_zoom(self.config)
        train, test = (pictures_of(dataset, self.config.data, zoom) for dataset in (self.train, self.test))
        both = with_floors(self.config, self.model, self.dtype)
        found = [*self.shots.jobs(train, both), *self.held_out.jobs(test, both)]
        if self.options.linear:
            found += self.whole.jobs(train, representation(self.config, self.model, self.dtype))
        return found

    def fewshot(self) -> dict[str, ProbeResult]:
        """Few-shot results by name of features: the network's, raw pixels', and an untrained network's."""
        options = self.options
        train_labels, test_labels = (self.labels(f) for f in (self.shots, self.held_out))
        return {
            name: fewshot_accuracy(
                self.shots.read(name).to(self.device), train_labels, self.held_out.read(name).to(self.device),
                test_labels, options.shots, len(self.classes), options.seeds, options.l2, class_names=self.classes,
                draws=self.draws,
            )
            for name in names_of(self.config)
        }  # fmt: skip

    def labels(self, features: Features) -> Tensor:
        """Labels of the pictures of some features: int64 [n]."""
        dataset = self.test if features is self.held_out else self.train
        assert dataset.labels is not None
        return torch.from_numpy(dataset.labels[features.ids])

    def entry(self) -> dict[str, Any]:
        """All results as plain values: rows to print, full results, and settings."""
        options, ours = self.options, names_of(self.config)[0]
        results: dict[str, Any] = {name: asdict(result) for name, result in self.fewshot().items()}
        rows = [
            {"probe": f"{options.shots}-shot", "features": name, "accuracy": r["mean"], "spread": r["std"]}
            for name, r in results.items()
        ]
        if options.linear:
            data = self.whole.read(ours), self.labels(self.whole), self.held_out.read(ours), self.labels(self.held_out)
            linear = linear_probe(*data, len(self.classes), device=self.device)
            a, b, c, d = (part.to(self.device) for part in data)
            nearest = knn_accuracy(a, b, c, d, len(self.classes))
            results |= {"linear": asdict(linear), "k-NN": asdict(nearest)}
            rows += [
                {"probe": "linear, top-1", "features": ours, "accuracy": linear.top1, "spread": None},
                {"probe": "linear, top-5", "features": ours, "accuracy": linear.top5, "spread": None},
                {
                    "probe": f"{nearest.k} nearest neighbours",
                    "features": ours,
                    "accuracy": nearest.top1,
                    "spread": None,
                },
            ]
        # Without what pictures and weights identify, and `out`, which no result depends on.
        shots = {name: value for name, value in asdict(options).items() if name not in ("source", "step", "out")}
        settings = self.held_out.settings | {"shots": shots, "train": self.whole.settings["data"]}
        return {
            "key": name_of(settings),
            "settings": settings,
            "test_images": len(self.held_out.ids),
            "rows": rows,
            "results": results,
        }


def labelled(config: RunConfig) -> tuple[Dataset, Dataset]:
    """Open training and held-out pictures. Raises UserError if none are held out, or there are no labels."""
    train, test = open_dataset(config.data, "train"), open_dataset(config.data, "test")
    if len(test) == 0:
        raise UserError(
            f"a probe needs held-out images, and of {train.name} none is held out (data.holdout is "
            f"{config.data.holdout:g}); give it a test/ folder beside train/, or more pictures"
        )
    for part, what in ((train, ""), (test, ", held out,")):
        if part.labels is None:
            raise UserError(f"a probe needs labels, and {part.name}{what} has none; use one subfolder a class")
    if len(train.class_names) == 1:
        raise UserError(f"{one_class(train)}: a probe of them is always right; {several(train)}")
    return train, test


def one_class(dataset: Dataset) -> str:
    return f"all pictures of {dataset.name} are of one class ({dataset.class_names[0]})"


def several(dataset: Dataset) -> str:
    """Advice for a source with only one class."""
    return "; ".join(getattr(dataset, "notes", [])) or "use one subfolder a class"


def published_zoom(config: RunConfig) -> float:
    """Zoom of the published crop: resize the short side to int(256/246 * size), then center-crop to size."""
    size = config.model.image_size[0]
    return int(size * 256 / 246) / size


def probe_recipe(
    config: RunConfig, weights: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Everything that features depend on, except the pictures."""
    return {
        "weights": weights,
        "layer": "representation",
        "time": clean_time(config),
        "image_size": list(config.model.image_size),
        "precision": "bf16" if dtype == torch.bfloat16 else "fp32",
        "device": device.type,
        "untrained_seed": config.seed,
    }


def of(dataset: Dataset, ids: np.ndarray) -> dict[str, Any]:
    """What identifies pictures as features see them: the pictures, and how they are cropped."""
    crop = "short side to int(256/246 size), centre"
    if isinstance(dataset, LatentDataset):
        crop = "stored"
    elif isinstance(dataset, PixelDataset):
        crop = squeezed(dataset.header) + crop
    return {"data": identity_of(dataset, ids), "crop": crop}


def clean_time(config: RunConfig) -> int:
    """Timestep at which a network is probed: 0, or one with little noise if it never saw noise-free images."""
    return NOISED_PROBE_INDEX + 1 if getattr(config.objective, "no_noise_prob", 1) == 0 else 0


def names_of(config: RunConfig) -> tuple[str, str, str]:
    """Names of the network's features, and of the two baselines: raw pixels, untrained network."""
    h, w = pixel_size(config)
    whole = (h, w) == tuple(config.model.image_size)
    return kind_of(config.model), "raw pixels" if whole else f"pixels at {h}x{w}", "untrained network, gates opened"


def pixel_size(config: RunConfig) -> tuple[int, int]:
    """Height and width of the pictures whose values are the raw-pixel features."""
    h, w = config.model.image_size
    while h * w * config.model.channels > MOST_PIXELS and h % 2 == 0 and w % 2 == 0:
        h, w = h // 2, w // 2
    return h, w


def with_floors(config: RunConfig, model: AnyModel, dtype: torch.dtype) -> Extract:
    """Extract features [B, D] by name: representations of the network and an untrained one, and raw pixels."""
    device = next(model.parameters()).device
    torch.manual_seed(config.seed)
    untrained = open_gates(build_model(model.config)).to(device).eval().requires_grad_(False)
    ours, pixels, floor = names_of(config)
    size = pixel_size(config)

    read = representation(config, model, dtype)
    floor_read = representation(config, untrained, dtype)

    def extract(x: Tensor, ids: Tensor) -> dict[str, Tensor]:
        frames = x if x.ndim == 4 else x.flatten(1, 2)
        values = F.adaptive_avg_pool2d(frames, size).flatten(1)
        return {ours: read(x, ids)[ours], pixels: values, floor: floor_read(x, ids)[ours]}

    return extract


def representation(config: RunConfig, model: AnyModel, dtype: torch.dtype) -> Extract:
    """Extract the network's representation [B, D], under the network's name."""
    device, name = next(model.parameters()).device, names_of(config)[0]
    schedule, time = schedule_of(config.schedule), clean_time(config)

    @torch.no_grad()
    def extract(x: Tensor, ids: Tensor) -> dict[str, Tensor]:
        seen, timesteps = noised(x.to(device), ids, schedule, time)
        with autocast(device, dtype):
            return {name: model.represent(seen, timesteps)}

    return extract


def noised(x: Tensor, ids: Tensor, schedule: NoiseSchedule, time: int) -> tuple[Tensor, Tensor | None]:
    """Noise pictures [B, C, ...] to a timestep. Returns them and the timestep, int64 [1] (None: 0).

    The noise is a function of the picture's index.
    """
    if time == 0:
        return x, None
    timesteps = torch.full((1,), time, device=x.device)
    seed = torch.zeros((), dtype=torch.int64, device=x.device)
    eps = philox_randn_rows(seed, ids.to(x.device) << 32, tuple(x.shape[1:]), x.dtype)
    return schedule.q_sample(x, timesteps.expand(len(x)), eps), timesteps


def open_gates(model: AnyModel) -> AnyModel:
    """Set every gate of an untrained adaLN-zero network to 1. With gates at 0, its CLS tokens would see no image."""
    if isinstance(model, UMD) and model.adaLN_modulation is not None:
        with torch.no_grad():
            for i, offsets in enumerate(model.adaLN_modulation.offsets[:-1]):
                if i != model.config.depth or model.decoder_embed is None:  # that one is a norm's and has no gates
                    offsets.view(6, -1)[[2, 5]] = 1
    return model


def first_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """Choose up to `count` images per class. Returns their indices in a random but fixed order."""
    order = np.random.default_rng(0).permutation(len(labels))
    chosen = np.concatenate([order[labels[order] == c][:count] for c in np.unique(labels)])
    return order[np.isin(order, chosen)]
