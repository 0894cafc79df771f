"""`umd embed RUN SOURCE`: write the representation of pictures as .npz and Parquet."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from umd.errors import UserError
from umd.files import check_apart, check_place, written_whole
from umd.tensor_files import write_npz
from umd.train.console import say
from umd.train.data import Dataset, open_dataset
from umd.train.features import Features, pictures_of
from umd.train.opened import open_run
from umd.train.options import Embed
from umd.train.probe import names_of, of, probe_recipe, published_zoom, representation
from umd.train.run import RunConfig, at_size
from umd.train.shards import others_work, rank_and_size, share
from umd.train.sources import Rows
from umd.train.weights import weights_identity


def embed(run: Path, source: Path, options: Embed, config: RunConfig, console: Console) -> None:
    """Embed all pictures of a source, of all splits, and write both files. Ranks other than 0 only share the work.

    Raises UserError if the source has no pictures, the output cannot be written, or pyarrow is missing.
    """
    try:
        import pyarrow  # noqa: F401 (so that it is missed before the work begins)
    except ImportError:
        raise UserError("Parquet is written by pyarrow: pip install pyarrow") from None
    config = at_size(config, options.image_size)
    name = source.resolve().name if source.is_dir() else source.stem  # a folder may have dots in its name
    out = options.out or run / f"features-{name}"
    out = out.with_suffix("") if out.suffix in (".npz", ".parquet") else out
    files = out.with_name(f"{out.name}.npz"), out.with_name(f"{out.name}.parquet")
    for file in files:
        check_apart(file, source)
    check_place(*files)
    if rank_and_size()[0] == 0 and (there := [str(file) for file in files if file.exists()]):
        say(console, f"{' and '.join(there)} will be replaced")
    kept = run if os.access(run, os.W_OK) else out.parent  # for a read-only run
    config = replace(config, data=replace(config.data, source=str(source), holdout=0.0))
    found = [part for part in (open_dataset(config.data, "train"), open_dataset(config.data, "test")) if len(part)]
    weights = weights_identity(run, options.ema)
    model, device, dtype = open_run(config, options.ema, weights["step"])
    recipe, zoom = probe_recipe(config, weights, device, dtype), published_zoom(config)
    features = [Features(kept / "features", recipe | of(part, all_of(part)), all_of(part)) for part in found]
    extract = representation(config, model, dtype)
    jobs = [
        job
        for part, dataset in zip(features, found, strict=True)
        for job in part.jobs(pictures_of(dataset, config.data, zoom), extract)
    ]
    if not share(jobs, console, "pictures read"):
        console.print(others_work(), highlight=False)
        return
    names = [name for part in found for name in names_in(part, len(found) > 1)]
    labels = None if any(part.labels is None for part in found) else np.concatenate([p.labels for p in found])
    parts = lambda: (x.numpy() for part in features for _, x in part.parts(names_of(config)[0]))  # noqa: E731
    others = {"names": np.array(names)}
    if labels is not None:
        others |= {"labels": labels.astype(np.int64), "classes": np.array(found[0].class_names)}
    D = write_parquet(files[1], parts(), names, labels, found[0].class_names)
    write_npz(files[0], "features", "<f4", (len(names), D), parts(), others)
    console.print(f"{len(names)} pictures, {D} numbers each: {files[0]} and {files[1]}", highlight=False)


def all_of(dataset: Dataset) -> np.ndarray:
    return np.arange(len(dataset))


def names_in(dataset: Dataset, splits: bool) -> list[str]:
    """A name for each picture: its file name, or its number. splits: put the name of the split before the number."""
    pictures: Sequence[Any] = getattr(dataset, "pictures", range(0))
    numbered = isinstance(pictures, np.ndarray | Rows | range)
    names = map(str, range(len(dataset)) if numbered else pictures)
    return [f"{dataset.split}/{name}" for name in names] if splits and numbered else list(names)


def utf8(name: str) -> str:
    """A file name, with bytes that are no UTF-8 as \\xNN."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def write_parquet(
    path: Path, parts: Iterator[np.ndarray], names: Sequence[str], labels: np.ndarray | None, classes: Sequence[str]
) -> int:
    """Write a Parquet file, atomically, with one row per picture: name, features, and if labelled label and class.

    parts: the features in parts [n, D], one in memory at a time. Returns D.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer, done, D = None, 0, 0
    with written_whole(path) as made:
        for part in parts:
            here, D = slice(done, done + len(part)), part.shape[1]
            done += len(part)
            values = pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), D)
            columns = {"name": pa.array(list(map(utf8, names[here]))), "features": values}
            if labels is not None:
                columns |= {
                    "label": pa.array(labels[here]),
                    "class": pa.array([utf8(classes[k]) for k in labels[here]]),
                }
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(made, table.schema)
            writer.write_table(table)
        assert writer is not None, "features are of some pictures"
        writer.close()
    return D
