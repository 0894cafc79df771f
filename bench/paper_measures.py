"""The measures of `umd bench reproduce paper`: probes of the representation, distances of samples, noise floors."""

import io
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from umd.conditions import denoiser
from umd.config import Prediction
from umd.feature_networks import EffLite0Features
from umd.files import write_whole
from umd.images import to_uint8
from umd.linear_probe import knn_accuracy, linear_probe
from umd.methods import build_model
from umd.metrics import frechet_distance, squared_mmd
from umd.model import UMD
from umd.probe import fewshot_accuracy
from umd.sampler import ddim_sample, model_times
from umd.schedule import schedule_of
from umd.train.crops import train_view, view_rng
from umd.train.data import as_model_input, center_view, open_dataset
from umd.train.features import CALL
from umd.train.opened import open_run_of
from umd.train.probe import names_of, open_gates, published_zoom, representation
from umd.train.recipes import AREA_MIN
from umd.train.reference import moments
from umd.train.run import RunConfig
from umd.train.settings import DataConfig
from umd.train.sources import ImageDataset

L2 = (1.0, 32.0, 1024.0)  # each draw of shots chooses one on a fifth of them; 1024 is the paper's
BATCH = 64  # samples per denoising loop
SHOWN = 32  # samples kept as pictures


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements."""

    train_images: int = 5_000  # most training pictures for probes
    test_images: int = 5_000  # most held-out pictures for probes
    shots: int = 100  # per class
    epochs: int = 90  # of the linear probe
    samples: int = 1312  # more than the 1280 features, so that their covariance is not singular
    reference: int = 5_000  # most held-out pictures that samples are measured against
    sampling_steps: int = 12
    classes: dict[str, int] = field(default_factory=lambda: {"fashion": 10, "emoji": 9})


@cache
def pictures(data: DataConfig, split: Literal["train", "test"], count: int, zoom: float) -> tuple[Tensor, Tensor]:
    """Read up to `count` pictures, the same random ones each time: float32 [n, C, H, W], labels int64 [n]."""
    dataset = open_dataset(data, split)
    assert dataset.labels is not None
    ids = np.random.default_rng(0).permutation(len(dataset))[:count]
    return center_view(dataset, ids, data, zoom), torch.from_numpy(dataset.labels[ids])


def views(data: DataConfig, count: int) -> Tensor:
    """Training pictures as fine-tuning sees them, cropped and mirrored: the best that a network can learn to draw."""
    dataset, data = open_dataset(data, "train"), replace(data, area_min=AREA_MIN["finetune"])
    assert isinstance(dataset, ImageDataset)
    ids = np.random.default_rng(0).permutation(len(dataset))[:count].tolist()
    drawn = [train_view(dataset.read(i)[1], view_rng(0, 0, i), data) for i in ids]
    return as_model_input(torch.from_numpy(np.stack(drawn)))


def probe(config: RunConfig, pretrained: RunConfig, step: int, sizes: Sizes) -> dict[str, Any]:
    """Class-averaged accuracies of the EMA weights of `config` at a step.

    pretrained: the run that decides at which timestep the network is probed: noise-free, or with little noise if its
    pre-training was never noise-free. Fine-tuning has a noise-free twentieth in each batch, which does not change that.
    """
    model, _, dtype = open_run_of(UMD, config, True, step)
    return accuracies(representation(pretrained, model, dtype), names_of(config)[0], config, sizes)


def accuracies(extract: Any, name: str, config: RunConfig, sizes: Sizes) -> dict[str, Any]:
    """100-shot, linear and k-NN accuracy of features. extract: as in `umd.train.probe`."""
    zoom, found = published_zoom(config), []
    for split, count in (("train", sizes.train_images), ("test", sizes.test_images)):
        x, labels = pictures(config.data, split, count, zoom)
        parts = []
        for first in range(0, len(x), CALL):
            part = x[first : first + CALL]
            whole = F.pad(part.flatten(1), (0, 0, 0, CALL - len(part))).view(CALL, *x.shape[1:])
            parts.append(extract(whole, torch.arange(first, first + CALL))[name][: len(part)].float().cpu())
        found += [torch.cat(parts), labels]
    train, train_labels, test, test_labels = found
    classes = int(train_labels.max()) + 1
    shots = fewshot_accuracy(train, train_labels, test, test_labels, sizes.shots, classes, l2=L2, allow_fewer=True)
    linear = linear_probe(
        train, train_labels, test, test_labels, classes, epochs=sizes.epochs, warmup=sizes.epochs // 9
    )
    return {
        "shots": shots.mean,
        "linear": linear.class_averaged,
        "knn": knn_accuracy(train, train_labels, test, test_labels, classes).class_averaged,
    }


@torch.no_grad()
def draw(
    config: RunConfig, step: int, cfg_scale: float, predict: Prediction, seed: int, sizes: Sizes
) -> tuple[Tensor, Tensor]:
    """Draw samples [n, C, H, W] from the EMA weights by DDIM with η = 1. Returns samples and labels.

    The first samples take the classes in turn. The labels of the others have the frequencies of the training data.
    """
    model, device, dtype = open_run_of(UMD, config, True, step)
    classes = model.config.num_classes
    _, known = pictures(config.data, "train", sizes.samples, 1.0)
    labels = torch.cat([torch.arange(classes), known])[: sizes.samples].to(device)
    steps = sizes.sampling_steps
    denoise = denoiser(model, dtype, model_times(steps, config.schedule.num_steps), labels.unique())
    schedule, drawn = schedule_of(config.schedule), []
    for first in range(0, len(labels), BATCH):
        here = labels[first : first + BATCH]
        shape = (len(here), config.model.channels, *config.model.image_size)
        drawn.append(
            ddim_sample(
                denoise, shape, schedule, num_steps=steps, predict=predict, labels=here, null_label=classes,
                cfg_scale=cfg_scale, seed=seed, first_sample=first,
            ).cpu()
        )  # fmt: skip
    return torch.cat(drawn), labels.cpu()


def distance(
    config: RunConfig, step: int, cfg_scale: float, predict: Prediction, seed: int, reference: Path,
    sizes: Sizes, shown: Path,
) -> dict[str, Any]:  # fmt: skip
    """Fréchet and kernel distance of samples to held-out pictures. Some samples are kept as pictures at `shown`."""
    x, labels = draw(config, step, cfg_scale, predict, seed, sizes)
    kept = io.BytesIO()
    np.savez(kept, images=to_uint8(x[:SHOWN]), labels=labels[:SHOWN].numpy())
    write_whole(shown, kept.getvalue())
    return distances(features(x), real_features(config, reference, sizes)["test"])


def distances(ours: Tensor, real: Tensor) -> dict[str, Any]:
    """Distances between features [n, D] and [m, D]."""
    return {"fd": frechet_distance(*moments(ours), *moments(real)), "kd": squared_mmd(ours, real)}


@cache
def network() -> EffLite0Features:
    return EffLite0Features().eval()


@torch.inference_mode()
def features(x: Tensor) -> Tensor:
    """Features of EfficientNet-Lite0: float32 [n, 1280]."""
    return torch.cat([network()(part) for part in x.split(CALL)]).clone()


def real_features(config: RunConfig, file: Path, sizes: Sizes) -> dict[str, Tensor]:
    """Features of held-out pictures, and of as many training pictures as there are samples. Computed once."""
    if not file.exists():
        parts = {"test": sizes.reference, "train": sizes.samples}
        made = {split: features(pictures(config.data, split, count, 1.0)[0]) for split, count in parts.items()}
        write_whole(file, save(made))
    return load_file(file)


def floors(config: RunConfig, reference: Path, sizes: Sizes) -> dict[str, Any]:
    """Floors of the measures: training pictures scored as samples; raw pixels and an untrained network as features."""
    real = real_features(config, reference, sizes)
    found = {"real": distances(real["train"], real["test"])}
    found["views"] = distances(features(views(config.data, sizes.samples)), real["test"])

    def pixels(x: Tensor, ids: Tensor) -> dict[str, Tensor]:
        return {"pixels": x.flatten(1)}

    torch.manual_seed(config.seed)
    untrained = open_gates(build_model(config.model)).eval().requires_grad_(False)
    name = names_of(config)[0]
    found["pixels"] = accuracies(pixels, "pixels", config, sizes)
    found["untrained"] = accuracies(representation(config, untrained, torch.float32), name, config, sizes)
    labels = {
        split: pictures(config.data, split, count, published_zoom(config))[1]
        for split, count in (("train", sizes.train_images), ("test", sizes.test_images))
    }
    counts: dict[str, Any] = {split: len(these) for split, these in labels.items()} | {"reference": len(real["test"])}
    return found | {"counts": counts | {"test_classes": labels["test"].bincount().tolist()}}
