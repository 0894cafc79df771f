"""Recognise the data that a run was trained on, by classes, names and contents of pictures, in whatever folder.

The fingerprint of the data is part of each checkpoint's state, under `source`.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from umd.errors import UserError
from umd.train.data import Dataset, open_dataset
from umd.train.decoding import read_patiently
from umd.train.distributed import World
from umd.train.index import Names, sums_of
from umd.train.latents import LatentDataset
from umd.train.pixels import PixelRows
from umd.train.run import RunConfig, absolute
from umd.train.sources import Rows
from umd.train.tars import Members, TarMember
from umd.train.weights import saved_weights

SAMPLE = 256  # pictures compared one by one: those whose names have the smallest CRC-32
HEAD = 4096  # bytes read from each of them
READERS = 16  # threads, which wait for the disk
OTHERS = {"target": "another file of targets", "shards": "other shards"}  # what ranks must share beside pictures
NAMED = 3  # most classes that a message names


def fingerprint(dataset: Dataset) -> dict[str, Any]:
    """Compute the fingerprint of a dataset, as a dict of JSON values:

    - images: number of pictures.
    - classes: class names in order, [] without labels.
    - labels, names: digests of all labels and all names, in order.
    - sample: name -> CRC-32 for up to `SAMPLE` pictures, over a file's size and first bytes, or over a stored row.
    - shards: latents only; digest of the shard sizes, on which --data.shuffle blocks depends.

    A run whose `objective.target` is a file also keeps, as `target`, its `file_digest`.
    """
    names, sums, head = contents(dataset)
    rows = np.sort(np.argsort(sums, kind="stable")[:SAMPLE]).tolist()
    with ThreadPoolExecutor(READERS) as pool:
        heads = list(pool.map(head, rows))
    labels = b"" if dataset.labels is None else np.ascontiguousarray(dataset.labels, dtype=np.int64).data
    found = {
        "images": len(dataset),
        "classes": list(dataset.class_names),
        "labels": hashlib.sha256(labels).hexdigest(),
        "names": hashlib.sha256(sums.tobytes()).hexdigest(),
        "sample": {names(row): value for row, value in zip(rows, heads, strict=True)},
    }
    if isinstance(dataset, LatentDataset):
        found["shards"] = hashlib.sha256(dataset.sizes.tobytes()).hexdigest()
    return found


def file_digest(file: Path) -> str:
    """A digest of a large file: of its size, and its bytes at 64 places."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for place in np.linspace(0, max(size - HEAD, 0), 64).astype(int).tolist():
            opened.seek(place)
            digest.update(opened.read(HEAD))
    return digest.hexdigest()


def agreed_fingerprint(dataset: Dataset, world: World, target: str = "", vae_hash: str = "") -> dict[str, Any]:
    """The fingerprint of the data, which is the same on every rank.

    target: what the objective predicts, perhaps a .npy file. vae_hash: of the VAE that made latents.

    Raises UserError on a rank that sees other data than rank 0, e.g. an older copy on a local disk.
    """
    here = fingerprint(dataset)
    if target.endswith(".npy"):
        here["target"] = file_digest(Path(target))
    found, vae = world.agree((here, vae_hash))
    sizes = [(data["images"], data["classes"]) for data in (here, found)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"rank {world.rank} sees {in_words(*sizes[0])} in {dataset.name}, and rank 0 {in_words(*sizes[1])}: "
            "give all hosts the same pictures"
        )
    said = [what for key, what in OTHERS.items() if here.get(key) != found.get(key)]
    said += ["another VAE"] if vae_hash != vae else []
    if not said and (differs := difference(found, here)):
        said = [differs.said]
    if said:
        raise UserError(
            f"rank {world.rank} does not see the data of rank 0 in {dataset.name} ({', '.join(said)}): give all hosts "
            "the same pictures or latents"
        )
    return found


def contents(dataset: Dataset) -> tuple[Callable[[int], str], np.ndarray, Callable[[int], int]]:
    """What identifies the N pictures of a dataset. Returns three items:

    - a function: index -> name, relative to the source,
    - the CRC-32 of all names, uint32 [N],
    - a function: index -> CRC-32 of the contents, to detect another picture under the same name.
    """
    if isinstance(dataset, LatentDataset):
        parts = [shard.about["names"] for shard in dataset.shards]
        ends = np.cumsum([len(names) for names in parts])

        def name(row: int) -> str:
            part = int(np.searchsorted(ends, row, side="right"))
            return parts[part][row - int(ends[part])]  # from the end

        sums = np.concatenate([np.empty(0, np.uint32), *(names.sums() for names in parts)])
        return name, sums, lambda row: int(dataset.crc32[0, row])
    pictures = dataset.pictures
    if isinstance(pictures, np.ndarray | Rows):
        sums = sums_of(map(str, range(len(pictures))))
        if isinstance(pictures, PixelRows):
            return str, sums, lambda row: int(pictures.crc32[row])
        return str, sums, lambda row: zlib.crc32(np.ascontiguousarray(pictures[row]).data)
    if isinstance(pictures, Names):
        relative = Names(pictures.data, pictures.ends, pictures.rows)
        return relative.__getitem__, relative.sums(), lambda row: head_of(pictures[row])
    if isinstance(pictures, Members):
        return pictures.key, pictures.sums.astype(np.uint32), lambda row: head_of(pictures[row])
    keys = list(map(str, pictures))
    return keys.__getitem__, sums_of(keys), lambda row: head_of(pictures[row])


def head_of(picture: str | TarMember) -> int:
    """CRC-32 of a file's size and first `HEAD` bytes, or of the names in a folder of frames. -1 if unreadable.

    Raises as `read_patiently`, but no OSError.
    """

    def head() -> int:
        if isinstance(picture, TarMember):
            return zlib.crc32(picture.read()[:HEAD], picture.size & 0xFFFFFFFF)
        if os.path.isdir(picture):
            return zlib.crc32(repr(sorted(os.listdir(picture))).encode())
        with open(picture, "rb", buffering=0) as file:
            return zlib.crc32(file.read(HEAD), os.fstat(file.fileno()).st_size & 0xFFFFFFFF)

    try:
        return read_patiently(head, picture)
    except OSError:
        return -1


# Compared


class Difference(NamedTuple):
    said: str  # what differs, in words
    others: bool  # True: other classes or pictures. False: some pictures were added or removed


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> Difference | None:
    """Compare two fingerprints. None if they agree in the entries that both have: only a run's has `target`."""
    if all(before[name] == now[name] for name in before.keys() & now.keys() if name != "shards"):
        return None
    more = now["images"] - before["images"]
    count = f"{abs(more):,} picture{'s' if abs(more) != 1 else ''} {'more' if more > 0 else 'fewer'}" if more else ""
    if renamed := classes_differ(before["classes"], now["classes"]):
        return Difference("; ".join(filter(None, [renamed, count])), True)
    gone, new, changed, stayed = compared(before["sample"], now["sample"])
    both = stayed + len(changed) + min(len(gone), len(new))  # common part, if all were only added or removed
    said = [count] if count else []
    said += [f"{names[0]} is {what}" for what, names in (("gone", gone), ("new", new)) if names]
    said += [f"{len(changed)} of {both} looked at are others, e.g. {changed[0]}"] if changed else []
    labels = not more and before["names"] == now["names"] and before["labels"] != now["labels"]
    said += ["other labels"] if labels else []
    return Difference(", ".join(said) or "some are other pictures", labels or 2 * stayed < max(both, 1))


def classes_differ(before: list[str], now: list[str]) -> str:
    """Say how class names differ, e.g. "class 'cat' became 'kitty'". "" if they are equal."""
    if before == now:
        return ""
    if not before or not now:
        return f"labels of {len(now)} classes and not none" if now else f"no labels, and not {len(before)} classes"
    gone, new = ([name for name in a if name not in set(b)] for a, b in ((before, now), (now, before)))
    if len(gone) == len(new) == 1:
        return f"class {gone[0]!r} became {new[0]!r}"
    parts = [
        f"class{'es' if len(names) > 1 else ''} {', '.join(map(repr, names[:NAMED]))}"
        f"{f' and {len(names) - NAMED} more' if len(names) > NAMED else ''} {'are' if len(names) > 1 else 'is'} {what}"
        for names, what in ((gone, "gone"), (new, "new"))
        if names
    ]
    return ", ".join(parts) or "the classes are in another order"


def compared(before: Mapping[str, int], now: Mapping[str, int]) -> tuple[list[str], list[str], list[str], int]:
    """Compare two samples in the range of CRC-32 values that both cover.

    A full sample (`SAMPLE` pictures) covers all names with a CRC-32 up to its largest.
    Returns names that are gone, names that are new, names whose picture changed, and the number of unchanged ones.
    """
    sums = [dict(zip(sample, sums_of(sample).tolist(), strict=True)) for sample in (before, now)]
    limit = min((max(found.values()) for found in sums if len(found) >= SAMPLE), default=1 << 32)
    a, b = ([name for name, value in found.items() if value <= limit] for found in sums)
    changed = [name for name in a if name in now and before[name] != now[name]]
    gone, new = [name for name in a if name not in now], [name for name in b if name not in before]
    return gone, new, changed, len(a) - len(gone) - len(changed)


def in_words(images: int, classes: list[str]) -> str:
    of = f"{len(classes):,} class{'es' if len(classes) > 1 else ''}" if classes else "no classes"
    return f"{images:,} pictures in {of}"


# Of finished runs


def trained_on(run: Path) -> tuple[str, dict[str, Any]] | None:
    """The source of a run and its fingerprint. None for imported weights."""
    state = saved_weights(run)[0].state
    if not state.get("source"):
        return None
    return state["config"]["data"]["source"], state["source"]


def with_source(config: RunConfig, source: str) -> RunConfig:
    """The run with another source, if `source` is not ""."""
    if not source:
        return config
    return absolute(replace(config, data=replace(config.data, source=source, quarantine="")))


def check_trained_on(
    run: Path, config: RunConfig, mend: str, say: Callable[[str], object], wanted: bool = False,
    dataset: Dataset | None = None,
) -> None:  # fmt: skip
    """Compare the pictures that a command will read with those that a run was trained on. Report any difference.

    Args:
        mend: for the error message: what to do if other pictures are intended.
        say: prints a difference that is no error.
        wanted: other pictures are intended. A source in `config` other than the run's also means that.
        dataset: the training split of `config`, if it is already open.

    Raises:
        UserError: the source's classes or pictures have changed, and other pictures are not intended.
    """
    if (known := trained_on(run)) is None:
        return
    source, before = known
    now = fingerprint(open_dataset(config.data, "train") if dataset is None else dataset)
    if (found := difference(before, now)) is None:
        return
    told = (
        f"{run} was trained on {in_words(before['images'], before['classes'])} in {source}; {config.data.source} has "
        f"{in_words(now['images'], now['classes'])}: {found.said}"
    )
    if found.others and not wanted and same_source(source, config.data.source):
        raise UserError(f"{told}. Which are held out may differ too: put them back as they were, or {mend}")
    say(told)


def same_source(a: str | Path, b: str | Path) -> bool:
    return str(a) == str(b) or Path(a).expanduser().resolve() == Path(b).expanduser().resolve()
