"""Reference statistics of real pictures, which samples are measured against. Computed once, keyed by their settings.

Distances to different references do not compare, if pictures, size, resize filter or feature network differ
(Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation").
"""

import json
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
from umd.files import sha256, written_whole
from umd.images import from_uint8, to_uint8
from umd.metrics import FeatureStatistics, frechet_distance, inception_score, kernel_distance, precision_recall
from umd.tokenizer import Tokenizer
from umd.train.data import Dataset
from umd.train.features import Extract, Features, Pictures, identity_of, name_of, pictures_of
from umd.train.latents import LatentDataset
from umd.train.pixels import PixelDataset, squeezed
from umd.train.settings import DataConfig

MOST_KEPT = 10_000  # most pictures whose features a reference keeps, for precision, recall and kernel distances
MOST_SCORED = 50_000  # most pictures scored for the noise floor, as in published scores
NEIGHBOURS = 3  # precision and recall use balls that reach to the third nearest neighbour
RESIZE = "short side by Pillow's antialiased bicubic filter, centre crop"
Moments = tuple[Tensor, Tensor]  # mean [D] and covariance [D, D], float64
DECODED = ("stored latents, decoded by the VAE", f"{RESIZE}, encoded and decoded by the VAE")


@dataclass
class Reference:
    """Statistics of real pictures."""

    settings: dict[str, Any]  # everything that the statistics depend on
    count: int  # number of pictures; 0: unknown
    pooled: Moments
    spatial: Moments | None
    features: Tensor | None  # pooled features, fp32 [up to MOST_KEPT, D]; None: the file has none
    floor: dict[str, float]  # noise floor: scores of one half of the pictures against the other; {}: unknown

    @property
    def name(self) -> str:
        return name_of(self.settings)

    def save(self, path: Path) -> None:
        """Write an .npz, atomically, with ADM's names (mu, sigma, mu_s, sigma_s) and all other fields."""
        arrays = {"mu": self.pooled[0].numpy(), "sigma": self.pooled[1].numpy(), "count": np.array(self.count)}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial[0].numpy(), "sigma_s": self.spatial[1].numpy()}
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        arrays |= {"settings": np.array(json.dumps(self.settings)), "floor": np.array(json.dumps(self.floor))}
        with written_whole(path) as unfinished, unfinished.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stubs take any array for its one option


def outputs_of(network: FeatureNetwork) -> Extract:
    """Extract the network's outputs by name: pooled [B, D], and if it has them spatial [B, S], logits [B, K]."""
    device = next(network.parameters()).device

    @torch.inference_mode()
    def extract(x: Tensor, _: Tensor) -> dict[str, Tensor]:
        found = network.outputs(x.to(device))._asdict()
        return {name: value for name, value in found.items() if value is not None}

    return extract


def real_pictures(
    root: Path, dataset: Dataset, config: DataConfig, network: FeatureNetwork, tokenizer: Tokenizer | None
) -> tuple[Features, Pictures]:
    """Features of a split's pictures at the size of a run's samples, to be computed by jobs."""
    if tokenizer is None:
        resize, vae = RESIZE, None
    else:
        resize = DECODED[0 if isinstance(dataset, LatentDataset) else 1]
        vae = tokenizer.vae.sha256
    if isinstance(dataset, PixelDataset):
        resize = squeezed(dataset.header) + resize
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
    """Features of the pictures (arr_0) in an ADM reference file, to be computed by jobs. None if it has no pictures."""
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
    """Compute a reference from finished features, with its noise floor: scores of one half against the other."""
    total = len(made.ids)
    order = np.random.default_rng(0).permutation(total)
    first, second = order[: total // 2][:MOST_SCORED], order[total // 2 :]
    pooled, of_second = summary(made, "pooled", second)
    spatial, spatial_of_second = summary(made, "spatial", second) if network.num_spatial else (None, None)
    floor = {}
    if len(first) > 1:
        assert of_second is not None, "it is the larger half"
        other = Reference({}, len(second), of_second, spatial_of_second, rows(made, "pooled", second[:MOST_KEPT]), {})
        parts = [
            rows(made, name, first) if size else None
            for name, size in (("pooled", True), ("spatial", network.num_spatial), ("logits", network.num_logits))
        ]
        assert parts[0] is not None
        floor = scores(other, parts[0], parts[1], parts[2], network)
    return Reference(made.settings, total, pooled, spatial, rows(made, "pooled", order[:MOST_KEPT]), floor)


def summary(made: Features, name: str, some: np.ndarray) -> tuple[Moments, Moments | None]:
    """Moments of all features of one name, and of those at positions `some` (None if fewer than two)."""
    chosen = torch.zeros(len(made.ids), dtype=torch.bool)
    chosen[torch.from_numpy(some)] = True
    whole = part = None
    for first, features in made.parts(name):
        if whole is None or part is None:
            whole, part = (FeatureStatistics(features.shape[1], "") for _ in range(2))
        whole.update(features)
        part.update(features[chosen[first : first + len(features)]])
    assert whole is not None and part is not None, "a reference is of some pictures"
    return (whole.mean, whole.cov), (part.mean, part.cov) if part.count > 1 else None


def rows(made: Features, name: str, places: np.ndarray) -> Tensor:
    """Features of one name at positions `places`, in that order: float32 [len(places), ...]."""
    at = np.argsort(places)
    found: Tensor | None = None
    for first, features in made.parts(name):
        low, high = np.searchsorted(places[at], [first, first + len(features)])
        found = torch.empty(len(places), *features.shape[1:]) if found is None else found
        here = at[low:high]
        found[torch.from_numpy(here)] = features[torch.from_numpy(places[here] - first)]
    assert found is not None
    return found


def moments(features: Tensor) -> Moments:
    """Mean and covariance of features [N, D]."""
    found = FeatureStatistics(features.shape[1], "")
    for part in features.split(4096):
        found.update(part)
    return found.mean, found.cov


def scores(
    reference: Reference, pooled: Tensor, spatial: Tensor | None, logits: Tensor | None, network: FeatureNetwork
) -> dict[str, float]:
    """All scores of samples' features against a reference, by name. The names depend on the network.

    sFD is left out unless there are more pictures than spatial features.
    """
    names, device = metric_names(network), next(network.parameters()).device
    values = {names["fd"]: frechet_distance(*moments(pooled), *reference.pooled)}
    if spatial is not None and reference.spatial is not None and len(spatial) > spatial.shape[1]:
        values[names["sfd"]] = frechet_distance(*moments(spatial), *reference.spatial)
    if logits is not None:
        values[names["is"]] = inception_score(logits)
    if reference.features is not None:
        values[names["kd"]] = kernel_distance(pooled, reference.features)
    if reference.features is not None and min(len(pooled), len(reference.features)) > NEIGHBOURS:
        precision, recall = precision_recall(reference.features.to(device), pooled.to(device))
        values |= {"precision": precision, "recall": recall}
    return values


def load_reference(
    path: Path, network: FeatureNetwork, size: list[int], resizes: Sequence[str], vae: str | None = None
) -> Reference:
    """Load a file of `Reference.save`, or one of ADM's (mu, sigma, mu_s, sigma_s, without any settings).

    Args:
        size: height and width of the samples.
        resizes: accepted ways in which real pictures were resized to that size.
        vae: digest of the VAE that decodes the samples. The real pictures must be decoded by it or by none.

    Raises:
        UserError: the file is neither, or its size, resize filter, VAE or feature network differ.
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
        expected: dict[str, Sequence[Any]] = {
            "features": [identity(network)],
            "image_size": [size],
            "resize": resizes,
            "vae": [None, vae],
        }
        for what, allowed in expected.items():
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
    """Read mean and covariance. Raises ValueError unless they are a vector and a square matrix of its size, finite."""
    mu, sigma = (torch.from_numpy(np.asarray(held[name], np.float64)) for name in (mean, cov))
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not (mu.isfinite().all() and sigma.isfinite().all()):
        raise ValueError(f"{mean} is {list(mu.shape)} and {cov} {list(sigma.shape)}")
    return mu, sigma


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return f"{value.get('name')} ({str(value.get('weights_sha256'))[:12]})"
    return "x".join(map(str, value)) if isinstance(value, list) else str(value)
