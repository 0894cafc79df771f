"""What samples are measured against: statistics of real pictures, made once and named by all that they depend on.

Distances to one reference are never compared with distances to another: of other pictures, another size, resize filter
or feature network (Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation").
"""

import json
import os
import socket
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umd.errors import UserError
from umd.feature_networks import FeatureNetwork, identity, metric_names
from umd.files import flush, sha256
from umd.images import from_uint8, to_uint8
from umd.metrics import FeatureStatistics, frechet_distance, inception_score, kernel_distance, precision_recall
from umd.tokenizer import Tokenizer
from umd.train.data import DataConfig
from umd.train.features import Dataset, Extract, Features, Pictures, identity_of, name_of, pictures_of
from umd.train.latents import LatentDataset

MOST_KEPT = 10_000  # pictures whose features a reference keeps, for precision, recall and kernel distances
NEIGHBOURS = 3  # balls of precision and recall reach to this one
RESIZE = "short side by Pillow's antialiased bicubic filter, centre crop"
Moments = tuple[Tensor, Tensor]  # mean [D] and covariance [D, D], float64
DECODED = ("stored latents, decoded by the VAE", f"{RESIZE}, encoded and decoded by the VAE")


@dataclass
class Reference:
    """Statistics of real pictures."""

    settings: dict[str, Any]  # all that they depend on
    count: int  # of pictures; 0: the file does not tell
    pooled: Moments
    spatial: Moments | None
    features: Tensor | None  # pooled, fp32 [up to MOST_KEPT, D]; None: the file has none
    floor: dict[str, float]  # scores of one half of the pictures against the other; {}: unknown

    @property
    def name(self) -> str:
        return name_of(self.settings)

    def save(self, path: Path) -> None:
        """Write an .npz with ADM's names (mu, sigma, mu_s, sigma_s) and what else is known, whole or not at all."""
        arrays = {"mu": self.pooled[0].numpy(), "sigma": self.pooled[1].numpy(), "count": np.array(self.count)}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial[0].numpy(), "sigma_s": self.spatial[1].numpy()}
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        arrays |= {"settings": np.array(json.dumps(self.settings)), "floor": np.array(json.dumps(self.floor))}
        unfinished = path.with_name(f".unfinished-{path.stem}-{socket.gethostname()}-{os.getpid()}.npz")
        try:
            np.savez(unfinished, **arrays)  # type: ignore[arg-type]  # numpy's stubs take any array for its one option
            flush(unfinished)
            unfinished.rename(path)
        finally:
            unfinished.unlink(missing_ok=True)


def outputs_of(network: FeatureNetwork) -> Extract:
    """The network's outputs by name: pooled [B, D], spatial [B, S], logits [B, K], as many as it has."""
    device = next(network.parameters()).device

    @torch.inference_mode()
    def extract(x: Tensor, _: Tensor) -> dict[str, Tensor]:
        found = network.outputs(x.to(device))._asdict()
        return {name: value for name, value in found.items() if value is not None}

    return extract


def real_pictures(
    root: Path, dataset: Dataset, config: DataConfig, network: FeatureNetwork, tokenizer: Tokenizer | None
) -> tuple[Features, Pictures]:
    """Features of a split's pictures as the network of a run would have them, to be made by jobs."""
    if tokenizer is None:
        resize, vae = RESIZE, None
    else:
        resize = DECODED[0 if isinstance(dataset, LatentDataset) else 1]
        vae = tokenizer.vae.sha256
    factor = 1 if tokenizer is None else tokenizer.vae.factor
    settings = {
        "data": identity_of(dataset, np.arange(len(dataset))),
        "image_size": [side * factor for side in config.image_size],
        "resize": resize,
        "vae": vae,
        "features": identity(network),
    }
    read = pictures_of(dataset, config)

    def pictures(ids: np.ndarray) -> Tensor:
        x = read(ids)
        return x if tokenizer is None else from_uint8(to_uint8(tokenizer.decode(x.to(tokenizer.device))))

    return Features(root, settings, np.arange(len(dataset))), pictures


def stored_pictures(
    root: Path, file: Path, network: FeatureNetwork, size: list[int]
) -> tuple[Features, Pictures] | None:
    """Features of the pictures (arr_0) in one of ADM's reference files, to be made by jobs; None if it holds none."""
    with np.load(file, allow_pickle=False) as arrays:
        if "arr_0" not in arrays.files:
            return None
        pictures = arrays["arr_0"]
    if list(pictures.shape[1:3]) != size:
        raise UserError(
            f"the pictures in {file} are {pictures.shape[1]}x{pictures.shape[2]}, and this run's samples "
            f"{size[0]}x{size[1]}; give a reference of that size"
        )
    settings = {"file": sha256(file), "image_size": size, "features": identity(network)}
    return Features(root, settings, np.arange(len(pictures))), lambda ids: from_uint8(pictures[ids])


def reference_of(made: Features, network: FeatureNetwork) -> Reference:
    """The statistics of features that are there, and their floor."""
    pooled = made.read("pooled")
    spatial = made.read("spatial") if network.num_spatial else None
    logits = made.read("logits") if network.num_logits else None
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(pooled)))
    first, second = order[: len(order) // 2], order[len(order) // 2 :]
    floor = {}
    if len(first) > 1:
        other = Reference(
            {}, len(second), moments(pooled[second]), None if spatial is None else moments(spatial[second]),
            pooled[second][:MOST_KEPT], {},
        )  # fmt: skip
        parts = [None if part is None else part[first] for part in (spatial, logits)]
        floor = scores(other, pooled[first], parts[0], parts[1], network)
    return Reference(
        made.settings, len(pooled), moments(pooled), None if spatial is None else moments(spatial),
        pooled[order[:MOST_KEPT]].contiguous(), floor,
    )  # fmt: skip


def moments(features: Tensor) -> Moments:
    """Mean and covariance of features [N, D]."""
    found = FeatureStatistics(features.shape[1], "")
    for part in features.split(4096):
        found.update(part)
    return found.mean, found.cov


def scores(
    reference: Reference, pooled: Tensor, spatial: Tensor | None, logits: Tensor | None, network: FeatureNetwork
) -> dict[str, float]:
    """All scores of samples' features against a reference, by their names for this network. sFD of fewer pictures than
    spatial features is left out."""
    names, device = metric_names(network), next(network.parameters()).device
    values = {names["fd"]: frechet_distance(*moments(pooled), *reference.pooled)}
    if spatial is not None and reference.spatial is not None and len(spatial) > spatial.shape[1]:
        values[names["sfd"]] = frechet_distance(*moments(spatial), *reference.spatial)
    if logits is not None:
        values[names["is"]] = inception_score(logits)[0]
    if reference.features is not None:
        values[names["kd"]] = kernel_distance(pooled, reference.features)[0]
    if reference.features is not None and min(len(pooled), len(reference.features)) > NEIGHBOURS:
        precision, recall = precision_recall(reference.features.to(device), pooled.to(device))
        values |= {"precision": precision, "recall": recall}
    return values


def load_reference(path: Path, network: FeatureNetwork, size: list[int], resizes: Sequence[str]) -> Reference:
    """What `Reference.save` wrote, or one of ADM's files (mu, sigma, and mu_s, sigma_s), which do not say more.

    size, resizes: height and width of the samples, and how real pictures may have come to it.
    Raises UserError for a file that is neither, or is of another size, resize filter or feature network.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            held = {name: arrays[name] for name in arrays.files if name != "arr_0"}
            pooled = as_moments(held, "mu", "sigma")
            spatial = as_moments(held, "mu_s", "sigma_s") if "mu_s" in held else None
            count = int(held.get("count", 0))
            settings = json.loads(str(held["settings"])) if "settings" in held else None
            floor = json.loads(str(held["floor"])) if "floor" in held else {}
            features = torch.from_numpy(held["features"]) if "features" in held else None
            if not isinstance(floor, dict) or not isinstance(settings, dict | None):
                raise ValueError("its settings are none")
            if features is not None and (features.shape[1:] != pooled[0].shape or len(features) < 2):
                raise ValueError(f"its features are {list(features.shape)}")
    except (OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{path} holds no reference statistics ({reason}): expected an .npz of umd evaluate or of ADM's evaluator"
        ) from error
    if settings is None:
        if network.name != "InceptionV3":
            raise UserError(
                f"{path} is of ADM's evaluator, whose features are InceptionV3's, and here they are {network.name}'s; "
                "give InceptionV3's weights (--features inception --weights FILE), or leave --reference out"
            )
        settings = {"file": sha256(path), "features": identity(network), "image_size": size}
    else:
        for what, allowed in (("features", [identity(network)]), ("image_size", [size]), ("resize", resizes)):
            if settings.get(what) not in allowed:
                raise UserError(
                    f"the reference {path} is of another {what.replace('_', ' ')}: {shown(settings.get(what))}, and "
                    f"these samples need {' or '.join(map(shown, allowed))}; leave --reference out to make one"
                )
    if len(pooled[0]) != network.num_features:
        raise UserError(
            f"{path} has statistics of {len(pooled[0])} features and {network.name} has {network.num_features}; give "
            "another reference, or other --features"
        )
    if spatial is not None and len(spatial[0]) != network.num_spatial:
        raise UserError(
            f"{path} has {len(spatial[0])} spatial features and {network.name} has {network.num_spatial}; give another "
            "reference, or other --features"
        )
    return Reference(settings, count, pooled, spatial, features, floor)


def as_moments(held: dict[str, np.ndarray], mean: str, cov: str) -> Moments:
    """Raises ValueError unless they are a vector and a square matrix of its size, and finite."""
    mu, sigma = (torch.from_numpy(np.asarray(held[name], np.float64)) for name in (mean, cov))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (mu.isfinite().all() and sigma.isfinite().all()):
        raise ValueError(f"{mean} is {list(mu.shape)} and {cov} {list(sigma.shape)}")
    return mu, sigma


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value.get('name')} ({str(value.get('weights_sha256'))[:12]})"
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)
