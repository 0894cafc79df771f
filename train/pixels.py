"""Pictures stored on disk at a small size, so that training decodes no JPEG: shards, header, dataset, encoding.

    folder/pixels-train-00000-of-00003.safetensors    uint8 [n, S, S', 3], sizes [n, 2], labels, indices, crc32 [n]
           pixels-test-00000-of-00001.safetensors
           pixels.json                                the recipe, and the images of each shard; written last

A whole picture, of any shape, is squeezed to S x S'. `sizes` has its original height and width. A crop is drawn for the
original size, as from the file, then cut from the squeezed picture, which undoes the squeezing. So a run sees the crops
that it would see of the files, resampled in two steps.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import Dataset

from umd.errors import UserError
from umd.files import again_if_lost
from umd.images import grid, save_png
from umd.train.crops import centered, draw_view, resized, shrink_for, view_rng
from umd.train.decoding import BrokenPicture, Picture
from umd.train.latents import is_latents, shard_name
from umd.train.options import EncodePixels
from umd.train.pools import in_order
from umd.train.recipes import encode_command
from umd.train.shards import Advance, Job, others_work, share
from umd.train.sources import ImageDataset, Rows, opened
from umd.train.store import (
    Shard,
    check_folder,
    damaged,
    finished,
    is_store,
    open_shards,
    read_header,
    shard_file,
    unreadable,
    write_header,
)

if TYPE_CHECKING:
    from umd.train.settings import DataConfig

FORMAT = 1
HEADER = "pixels.json"
Split = Literal["train", "test"]
SPLIT = {"images": int, "left_out": int, "shards": [{"file": str, "images": int, "crc32": int}]}
SOURCE = {"path": str, "holdout": float | int}
RECIPE = {"size": [int], "source": SOURCE, "class_names": [str], "shard_images": int}
PATTERN = {"recipe": RECIPE, "splits": {"train": SPLIT, "test": SPLIT}, "quarantine?": str}  # see `amiss`


def is_pixels(path: Path) -> bool:
    """Whether a folder holds stored pictures, complete or unfinished."""
    return is_store(path, "pixels")


class PixelRows(Rows):
    """The squeezed pictures of some shards, read on access. The first read of a picture compares its checksum."""

    def __init__(self, shards: Sequence[Shard], size: Sequence[int], command: str):
        self.shards, self.shape, self.command = shards, (*size, 3), command
        self.ends = np.cumsum([shard.images for shard in shards], dtype=np.int64)
        self.files = [(str(shard.path), shard.tensors["pixels"][1]) for shard in shards]
        self.crc32 = np.concatenate([shard.array("crc32") for shard in shards] or [np.empty(0, np.int64)])
        self.checked = bytearray(len(self.crc32))

    def __len__(self) -> int:
        return len(self.crc32)

    def __getitem__(self, index) -> np.ndarray:  # type: ignore[override]  # int, or int64 [n]
        found = self.read(np.atleast_1d(index))
        return found if np.ndim(index) else found[0]

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Read pictures at indices int64 [n]: uint8 [n, S, S', 3].

        Raises UserError if a shard is gone or damaged, TemporaryError if a network disk was lost and did not come back.
        """
        if not len(indices):
            return np.empty((0, *self.shape), np.uint8)
        try:
            return again_if_lost(lambda: self._read(indices), self.shards[0].path.parent)
        except OSError as error:
            raise unreadable(error.filename, error, self.command) from error

    def _read(self, indices: np.ndarray) -> np.ndarray:
        """`read`. Raises OSError, naming the shard, and forgets the open files: the next try opens them anew."""
        out = np.empty((len(indices), *self.shape), np.uint8)
        size, buffer = math.prod(self.shape), out.reshape(-1).data
        numbers = np.searchsorted(self.ends, indices, "right")
        rows = indices - np.append(0, self.ends)[numbers]
        places = list(zip(indices.tolist(), numbers.tolist(), rows.tolist(), strict=True))
        try:
            for _, number, row in places:  # so that the disk has the whole batch in its queue
                path, start = self.files[number]
                opened(path).expect(start + row * size, size)
            for i, (index, number, row) in enumerate(places):
                path, start = self.files[number]
                picture = buffer[i * size : (i + 1) * size]
                if not opened(path).read_into(picture, start + row * size):
                    raise damaged(path, "has become shorter", self.command)
                if not self.checked[index]:
                    if zlib.crc32(picture) != self.crc32[index]:
                        raise damaged(path, f"differs from its checksums in row {row}", self.command)
                    self.checked[index] = 1
        except OSError as error:
            opened.cache_clear()
            error.filename = path
            raise
        return out


@dataclass
class PixelDataset(ImageDataset):
    """The stored pictures of one split. sizes: int64 [N, 2], original heights and widths."""

    header: dict[str, Any] = field(default_factory=dict)
    sizes: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.int64))

    def picture(self, index: int, shrink: object = None) -> Picture:
        height, width = self.sizes[index].tolist()
        pixels = self.pictures[index]
        return Picture(pixels, (height, width), (pixels.shape[0] / height, pixels.shape[1] / width))


def pixels_header(folder: Path) -> dict[str, Any]:
    """The header of a folder of stored pictures. Raises UserError if it is missing or damaged."""
    return read_header(folder / HEADER, PATTERN, FORMAT)


def squeezed(header: Mapping[str, Any]) -> str:
    """What happened to stored pictures before a run reads them, for records. header: of the folder."""
    height, width = header["recipe"]["size"]
    return f"squeezed to {height}x{width}, then "


def open_pixels(folder: Path, split: Split, config: "DataConfig") -> PixelDataset:
    """Open the stored pictures of a split. Raises UserError if they are damaged or smaller than the model's images."""
    header = pixels_header(folder)
    size, entries = header["recipe"]["size"], header["splits"][split]["shards"]
    if config.channels != 3:
        raise UserError(f"{folder} holds colour pictures, and the model sees {config.channels} channel: set 3")
    if not config.vae and any(stored < seen for stored, seen in zip(size, config.image_size, strict=True)):
        raise UserError(
            f"the pictures in {folder} are stored at {size[0]}x{size[1]}, and the model sees "
            f"{config.image_size[0]}x{config.image_size[1]}: store them larger, umd encode-pixels --size "
            f"{3 * config.image_size[0] // 2} {3 * config.image_size[1] // 2}"
        )
    command = encode_command(header, folder)
    shards = open_shards(folder, entries, header["recipe"], command)
    names = header["recipe"]["class_names"]
    arrays = {
        name: np.concatenate([shard.array(name) for shard in shards] or [np.empty(0, np.int64)])
        for name in ("labels", "sizes")
        if names or name == "sizes"
    }
    return PixelDataset(
        name=folder.resolve().name,
        split=split,
        pictures=PixelRows(shards, size, command),
        labels=arrays.get("labels"),
        class_names=names,
        left_out=header["splits"][split]["left_out"],
        header=header,
        sizes=arrays["sizes"].reshape(-1, 2),
    )


class StoredCrops(Dataset):
    """[(epoch, index)] of a batch -> (pictures, crops, mirrored, indices, indices), or the UserError that was raised.

    pictures: uint8 [B, S, S', 3]. crops: float32 [B, 4], in pixels of the squeezed pictures. mirrored: bool [B].
    """

    def __init__(self, dataset: PixelDataset, config: "DataConfig", seed: int):
        self.dataset, self.config, self.seed = dataset, config, seed

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[Any, ...] | UserError:
        rows = self.dataset.pictures
        assert isinstance(rows, PixelRows)
        indices = np.array([index for _, index in keys])
        try:
            pixels = rows.read(indices)
        except UserError as error:
            return error
        boxes, mirrored = [], []
        for (epoch, index), (height, width) in zip(keys, self.dataset.sizes[indices].tolist(), strict=True):
            box, flip = draw_view(view_rng(self.seed, epoch, index), height, width, self.config)
            across, down = rows.shape[1] / width, rows.shape[0] / height
            boxes.append((box[0] * across, box[1] * down, box[2] * across, box[3] * down))
            mirrored.append(flip)
        return torch.from_numpy(pixels), torch.tensor(boxes), torch.tensor(mirrored), indices, indices


# Encoding


def encode_pixels(options: EncodePixels, console: Console) -> None:
    """Make this rank's shards. If they were the last ones, write the header.

    Raises UserError if the source is unsuitable, the folder holds other shards, or the disk is full.
    """
    from umd.train.data import open_dataset
    from umd.train.encode import SPLITS, given_list, picture_names, say, source_identity
    from umd.train.settings import DataConfig

    config = DataConfig(
        options.source, options.size, holdout=options.holdout, skip_broken=options.skip_broken,
        quarantine=options.quarantine,
    )  # fmt: skip
    if is_pixels(Path(options.source).expanduser()):
        raise UserError(f"{options.source} holds stored pictures already; give the files")
    if is_latents(Path(options.source).expanduser()):
        raise UserError(f"{options.source} holds latents; give the files that they are of")
    datasets: dict[str, ImageDataset] = {}
    for name in SPLITS:
        dataset = open_dataset(config, name)
        if not isinstance(dataset, ImageDataset):
            raise UserError(f"{options.source} holds no pictures")
        datasets[name] = dataset
    names = {split: picture_names(dataset, options.source) for split, dataset in datasets.items()}
    recipe = {
        "size": list(options.size),
        "source": source_identity(config, datasets, names),
        "class_names": datasets["train"].class_names,
        "shard_images": options.shard_images,
    }
    jobs = []
    for split, dataset in datasets.items():
        total = -(-len(dataset) // options.shard_images)
        for number in range(total):
            ids = np.arange(number * options.shard_images, min((number + 1) * options.shard_images, len(dataset)))
            path = options.out / f"pixels-{shard_name(split, number, total)}"
            jobs.append(Job(path, len(ids), partial(shard_of, dataset, ids, config, recipe)))
    check_folder(options.out, "pixels", {"format": FORMAT, "recipe": recipe}, {job.path.name for job in jobs})
    if not share(jobs, console, "pictures stored"):
        say(console, others_work())
        return
    say(console, f"all {len(jobs)} shards are there; checking them")
    splits = {}
    for split in datasets:
        names_of = [job.path.name for job in jobs if job.path.name.startswith(f"pixels-{split}-")]
        shards, entries = finished(options.out, names_of, recipe)
        splits[split] = {
            "images": sum(shard.images for shard in shards),
            "left_out": sum(shard.about["left_out"] for shard in shards),
            "shards": entries,
        }
    header = {"format": FORMAT, "recipe": recipe, "splits": splits}
    quarantine = given_list(config)
    write_header(options.out / HEADER, header | ({"quarantine": quarantine} if quarantine else {}))
    train, test = (splits[split]["images"] for split in datasets)
    size = f"{options.size[0]}x{options.size[1]}"
    say(console, f"{train} training and {test} held-out pictures at {size} in {options.out}")


def shard_of(
    dataset: ImageDataset, ids: np.ndarray, config: "DataConfig", recipe: dict[str, Any], advance: Advance
) -> bytes:
    """Serialise a shard. The bytes depend only on pictures and recipe, so any rank writes the same file."""

    def load(index: int) -> tuple[int, np.ndarray, tuple[int, int]] | None:
        try:
            picture = dataset.picture(index, lambda h, w: shrink_for((0, 0, w, h), config))
        except BrokenPicture:
            if not config.skip_broken:
                raise
            return None
        height, width = picture.size
        return index, resized(picture, (0, 0, width, height), config), picture.size

    found: list[tuple[int, np.ndarray, tuple[int, int]]] = []
    with ThreadPoolExecutor(max(1, config.workers)) as pool:
        loaded = in_order(pool, load, ids.tolist(), dataset.name, ahead=64)
        for done, one in enumerate(loaded, 1):
            found += [one] if one is not None else []
            if done % 64 == 0:
                advance(done)
    pixels = np.stack([view for _, view, _ in found]) if found else np.empty((0, *recipe["size"], 3), np.uint8)
    indices = np.array([index for index, _, _ in found], dtype=np.int64)
    tensors = {
        "pixels": torch.from_numpy(pixels),
        "sizes": torch.tensor([size for _, _, size in found], dtype=torch.int64).view(-1, 2),
        "indices": torch.from_numpy(indices),
        "crc32": torch.tensor([zlib.crc32(view.data) for view in pixels], dtype=torch.int64),
    }
    if dataset.labels is not None:
        tensors["labels"] = torch.from_numpy(dataset.labels[indices])
    about = {"format": FORMAT, "recipe": recipe, "left_out": len(ids) - len(found)}
    return shard_file(tensors, about)


# Inspecting


def inspect_pixels(folder: Path, split: Split, count: int, check: bool, out: Path, console: Console) -> None:
    """Print what a folder holds, compare every picture with its checksum, and draw a few center crops."""
    from umd.train.data import evenly  # here: it imports this file
    from umd.train.encode import SPLITS
    from umd.train.settings import DataConfig

    config = DataConfig(str(folder), (1, 1))
    datasets = {name: open_pixels(folder, name, config) for name in SPLITS}
    header = datasets[split].header
    size = tuple(header["recipe"]["size"])
    classes = len(header["recipe"]["class_names"])
    console.print(f"{folder}: {size[0]}x{size[1]}, of {header['recipe']['source']['path']}, {classes or 'no'} classes")
    table = Table("split", "pictures", "left out", "shards", box=None)
    for name, entry in header["splits"].items():
        table.add_row(name, *map(str, (entry["images"], entry["left_out"], len(entry["shards"]))))
    console.print(table)
    if check:
        for dataset in datasets.values():
            for index in range(len(dataset)):
                dataset.picture(index)
        console.print("every picture is as it was written", highlight=False)
    dataset = datasets[split]
    if count := min(count, len(dataset)):
        chosen = evenly(len(dataset), count).tolist()
        views = np.stack([centered(dataset.picture(index), replace(config, image_size=size)) for index in chosen])
        save_png(grid(views, columns=min(count, 8)), out)
        console.print(f"{count} of them: {out}", highlight=False, soft_wrap=True)
