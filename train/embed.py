"""`umd embed RUN SOURCE`: the representation of pictures, as .npz and Parquet."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from umd.errors import UserError
from umd.files import write_whole
from umd.train.data import open_dataset
from umd.train.evaluate import open_run
from umd.train.features import Dataset, Features, pictures_of
from umd.train.probe import names_of, of, probe_recipe, published_zoom, representation
from umd.train.run import RunConfig, weights_identity
from umd.train.shards import others_work, share
from umd.train.sources import Rows


@dataclass(frozen=True)
class Embed:
    """Write the representation of pictures: features.npz (features fp32 [N, D], names, labels, classes) and
    features.parquet (a row a picture). The same command goes on after a stop; under torchrun each rank reads its
    share."""

    out: Path | None = None
    """The files without their suffix; default: RUN/features-SOURCE."""
    image_size: tuple[int, int] | None = None
    """Height and width at which the pictures are read, and the network's positions interpolated; None: the run's."""
    ema: bool = True
    """Averaged weights, where the run has them."""


def embed(run: Path, source: Path, options: Embed, config: RunConfig, console: Console) -> None:
    """Read all pictures of a source, whatever its splits, and write both files; or do this rank's share of the work.

    Raises UserError for a source without pictures, a place that cannot be written, and without pyarrow.
    """
    try:
        import pyarrow  # noqa: F401 (asked for before the work begins)
    except ImportError:
        raise UserError("Parquet is written by pyarrow: pip install pyarrow") from None
    out = options.out or run / f"features-{source.stem}"
    out = out.with_suffix("") if out.suffix in (".npz", ".parquet") else out
    out.parent.mkdir(parents=True, exist_ok=True)
    config = replace(config, data=replace(config.data, source=str(source), holdout=0.0))
    found = [part for part in (open_dataset(config.data, "train"), open_dataset(config.data, "test")) if len(part)]
    weights = weights_identity(run, options.ema)
    model, device, dtype = open_run(config, options.ema, weights["step"])
    recipe, zoom = probe_recipe(config, weights, device, dtype), published_zoom(config)
    features = [Features(config.out / "features", recipe | of(part, all_of(part)), all_of(part)) for part in found]
    extract = representation(config, model, dtype)
    jobs = [
        job
        for part, dataset in zip(features, found, strict=True)
        for job in part.jobs(pictures_of(dataset, config.data, zoom), extract)
    ]
    if not share(jobs, console, "pictures read"):
        console.print(others_work(), highlight=False)
        return
    x = torch.cat([part.read(names_of(config)[0]) for part in features]).numpy()  # [N, D]
    names = [name for part in found for name in names_in(part, len(found) > 1)]
    labels = None if any(part.labels is None for part in found) else np.concatenate([p.labels for p in found])
    write_features(out, x, names, labels, found[0].class_names)
    console.print(f"{len(x)} pictures, {x.shape[1]} numbers each: {out}.npz and {out}.parquet", highlight=False)


def all_of(dataset: Dataset) -> np.ndarray:
    return np.arange(len(dataset))


def names_in(dataset: Dataset, splits: bool) -> list[str]:
    """A name for each picture: its file's, or its number; of several splits the split in front of it."""
    pictures: Sequence[Any] = getattr(dataset, "pictures", range(0))
    numbered = isinstance(pictures, np.ndarray | Rows | range)
    names = map(str, range(len(dataset)) if numbered else pictures)
    return [f"{dataset.split}/{name}" for name in names] if splits and numbered else list(names)


def write_features(
    out: Path, features: np.ndarray, names: Sequence[str], labels: np.ndarray | None, classes: Sequence[str]
) -> None:
    """OUT.npz and OUT.parquet, each whole or not at all. features fp32 [N, D], labels int64 [N]."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays: dict[str, np.ndarray] = {"features": features, "names": np.array(names)}
    values = pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1])
    columns = {"name": pa.array(names), "features": values}
    if labels is not None:
        arrays |= {"labels": labels.astype(np.int64), "classes": np.array(classes)}
        columns |= {"label": pa.array(labels), "class": pa.array([classes[label] for label in labels])}
    raw = io.BytesIO()
    np.savez(raw, **arrays)  # type: ignore[arg-type]
    write_whole(out.with_name(f"{out.name}.npz"), raw.getvalue())
    raw = io.BytesIO()
    pq.write_table(pa.table(columns), raw, row_group_size=8192)
    write_whole(out.with_name(f"{out.name}.parquet"), raw.getvalue())
