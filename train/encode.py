"""`umd encode-latents` and `umd inspect`: encode pictures to a folder of latents, and show what such a folder holds.

A shard depends only on its number and the settings. So ranks encode shards without communicating
(`umd.train.shards`), and the rank that finds all shards done writes the header.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from umd.errors import UserError
from umd.files import check_place, sha256
from umd.images import grid, png_path, save_png, to_uint8
from umd.machine.device import autocast, pick_dtype, take_device
from umd.tokenizer import Tokenizer, load_tokenizer
from umd.train.console import say
from umd.train.crops import centered, train_view, view_rng
from umd.train.data import as_model_input, derive_seed, evenly, open_dataset
from umd.train.decoding import BrokenPicture
from umd.train.latents import (
    DTYPES,
    FORMAT,
    LatentDataset,
    check_vae,
    finish,
    is_latents,
    open_latents,
    read_header,
    shard_bytes,
    shard_name,
)
from umd.train.options import EncodeLatents, Inspect
from umd.train.pixels import inspect_pixels, is_pixels
from umd.train.pools import in_order
from umd.train.recipes import encode_command
from umd.train.settings import DataConfig
from umd.train.shards import Advance, Job, others_work, own_device, share
from umd.train.sources import ImageDataset, Rows
from umd.train.store import check_folder, damaged

SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")
NO_PICTURE = "give another --out, or --decode 0 for none"
BATCH = 32  # pictures in memory at a time, each in all its views


def encode(options: EncodeLatents, console: Console) -> Path:
    """Encode this rank's missing shards. If they were the last ones, finish the folder. Returns the folder.

    Raises UserError if source, VAE or size are unsuitable, the folder holds other latents, or the disk is full.
    """
    if not options.data.vae:
        raise UserError("pictures are encoded by a VAE: name one with --data.vae, a hub id or a folder")
    if is_latents(Path(options.data.source).expanduser()):
        raise UserError(f"{options.data.source} holds latents already; encode pictures")
    if is_pixels(Path(options.data.source).expanduser()):
        raise UserError(
            f"{options.data.source} holds pictures that umd encode-pixels made small; give the files that they are of"
        )
    device, _ = take_device(own_device(options.device), options.precision)
    tokenizer = load_tokenizer(options.data.vae, device)
    shape = tokenizer.latent_shape(*options.image_size)
    config = replace(options.data, image_size=options.image_size, channels=3, vae="", vae_hash="")
    datasets: dict[str, ImageDataset] = {split: pictures(config, split) for split in SPLITS}
    names = {split: picture_names(dataset, config.source) for split, dataset in datasets.items()}
    recipe = {
        "vae": asdict(tokenizer.vae),
        "shape": list(shape),
        "dtype": options.dtype,
        "precision": options.precision,
        "crop": {"kind": options.crop, "views": options.views, "seed": options.seed, "hflip": config.hflip}
        | {"area_min": config.area_min, "area_max": config.area_max, "image_size": list(options.image_size)},
        "source": source_identity(config, datasets, names),
        "class_names": datasets["train"].class_names,
        "shard_images": options.shard_images,
    }
    totals = {split: -(-len(dataset) // options.shard_images) for split, dataset in datasets.items()}
    with ThreadPoolExecutor(max(config.workers, 1)) as pool:
        jobs = []
        for split, dataset in datasets.items():
            encoder = Encoder(tokenizer, dataset, config, options, pool, recipe, split, names[split])
            for number in range(totals[split]):
                part = range(len(dataset))[number * options.shard_images : (number + 1) * options.shard_images]
                path = options.out / shard_name(split, number, totals[split])
                jobs.append(Job(path, len(part), partial(encoder.shard, part)))
        about = {"format": FORMAT, "recipe": recipe}
        check_folder(options.out, "latents", about, {job.path.name for job in jobs})
        complete = share(jobs, console, "encoding")
    if complete:
        say(console, f"all {len(jobs)} shards are there; checking them")
        header = finish(options.out, recipe, totals, given_list(config))
        images = header["splits"]["train"]["images"], header["splits"]["test"]["images"]
        say(console, f"{images[0]} training and {images[1]} held-out pictures as latents in {options.out}")
    else:
        say(console, others_work())
    return options.out


class Encoder:
    """Encodes the shards of one split."""

    def __init__(
        self, tokenizer: Tokenizer, dataset: ImageDataset, config: DataConfig, options: EncodeLatents,
        pool: ThreadPoolExecutor, recipe: dict, split: str, names: list[str],
    ):  # fmt: skip
        self.tokenizer, self.dataset, self.config, self.options = tokenizer, dataset, config, options
        self.pool, self.recipe, self.split, self.names = pool, recipe, split, names
        self.views = options.views if split == "train" else 1

    def shard(self, pictures: range, advance: Advance) -> bytes:
        parts: list[Tensor] = []
        indices: list[int] = []
        left_out: list[str] = []
        loaded = in_order(self.pool, self.load, pictures, self.dataset.name, ahead=2 * BATCH)
        while batch := list(islice(loaded, BATCH)):
            good = [(index, views) for index, views in batch if views is not None]
            left_out += [self.names[index] for index, views in batch if views is None]
            if good:
                indices += [index for index, _ in good]
                parts.append(self.moments(np.stack([views for _, views in good]), [self.names[i] for i, _ in good]))
            advance(len(indices) + len(left_out))
        rows = np.array(indices, dtype=np.int64)
        count = 2 if self.tokenizer.stochastic else 1
        empty = torch.empty(0, self.views, count, *self.recipe["shape"], dtype=DTYPES[self.options.dtype])
        labels = None if self.dataset.labels is None else self.dataset.labels[rows]
        kept = [self.names[index] for index in indices]
        return shard_bytes(self.recipe, self.split, torch.cat([empty, *parts]), labels, rows, kept, left_out)

    def load(self, index: int) -> tuple[int, np.ndarray | None]:
        """Read a picture's views, uint8 [V, H, W, C]. None if it cannot be read and `skip_broken` is set."""
        try:
            picture = self.dataset.picture(index)
        except BrokenPicture:
            if not self.config.skip_broken:
                raise
            return index, None
        if self.split == "test" or self.options.crop == "center":
            middle = centered(picture, self.config)
            return index, np.stack([middle, middle[:, ::-1]][: self.views])
        seed = derive_seed(self.options.seed, 1)  # the same as in the loader of a run
        return index, np.stack(
            [train_view(picture, view_rng(seed, view, index), self.config) for view in range(self.views)]
        )

    def moments(self, pictures: np.ndarray, names: list[str]) -> Tensor:
        """Encode uint8 [n, V, H, W, C] to moments [n, V, M, C, h, w] in the dtype of the store.

        The VAE always sees `BATCH` pictures, as rounding depends on their number: shards of any size have equal rows.
        """
        whole = np.concatenate([pictures, pictures[:1].repeat(BATCH - len(pictures), axis=0)])
        x = as_model_input(torch.from_numpy(whole).flatten(0, 1).to(self.tokenizer.device))
        with autocast(x.device, pick_dtype(self.options.precision, x.device)):
            moments = self.tokenizer.moments(x)[: len(pictures) * self.views]
        stored = moments.to(DTYPES[self.options.dtype]).cpu().unflatten(0, (-1, self.views))
        finite = stored.isfinite().flatten(1).all(1)
        if not finite.all():
            raise UserError(
                f"the latents of {names[int(finite.int().argmin())]} are not finite in {self.options.dtype}; "
                "store them with --dtype bf16 or fp32"
            )
        return stored


def pictures(config: DataConfig, split: Literal["train", "test"]) -> ImageDataset:
    dataset = open_dataset(config, split)
    if not isinstance(dataset, ImageDataset):
        raise UserError(f"{config.source} holds no pictures; a VAE encodes pictures")
    return dataset


def picture_names(dataset: ImageDataset, source: str) -> list[str]:
    """Name of each picture: its path relative to the source, or its position in an array."""
    if isinstance(dataset.pictures, np.ndarray | Rows):
        return list(map(str, range(len(dataset))))
    root = f"{Path(source).expanduser()}{os.sep}"
    return [
        name[len(root) :] if name.startswith(root) else os.path.relpath(name, root)
        for name in map(str, dataset.pictures)
    ]


def source_identity(config: DataConfig, datasets: dict[str, ImageDataset], names: dict[str, list[str]]) -> dict:
    path = Path(config.source).expanduser()
    digest = hashlib.sha256()
    for split, dataset in datasets.items():
        digest.update("\n".join([split, *names[split], ""]).encode("utf-8", "surrogateescape"))
        digest.update(b"" if dataset.labels is None else dataset.labels.tobytes())
    return {
        "path": str(path.resolve()) if path.exists() else config.source,
        "holdout": config.holdout,
        "images": {split: len(dataset) for split, dataset in datasets.items()},
        "quarantined": {split: len(dataset.quarantined) for split, dataset in datasets.items()},
        "sha256": digest.hexdigest(),
    }


def given_list(config: DataConfig) -> str:
    """Absolute path of the given quarantine list, valid from any folder. "" for the source's own list."""
    return str(Path(config.quarantine).expanduser().resolve()) if config.quarantine else ""


# Inspecting


def check_picture(out: Path, options: Inspect) -> None:
    """Raise UserError, before the shards are read, where the drawn pictures could not be written."""
    if options.decode and options.out is not None and out.exists():
        raise UserError(f"{out} is there; give another --out, or remove it")
    check_place(*([out] if options.decode else []), instead=NO_PICTURE)


def inspect(folder: Path, options: Inspect, console: Console) -> None:
    """Print a folder's contents, check its shards, and draw a few pictures.

    Raises UserError if the folder is incomplete or damaged, or the VAE is not the one that encoded it.
    """
    if is_pixels(folder):
        out = png_path(options.out or folder / "pictures.png")
        check_picture(out, options)
        inspect_pixels(folder, options.split, options.decode, options.check, out, console)
        return
    out = png_path(options.out or folder / "decoded.png")
    check_picture(out, options)
    header = read_header(folder)
    datasets = {split: open_latents(folder, split) for split in SPLITS}
    show(folder, header, console)
    if options.check:
        entries = [entry for split in header["splits"].values() for entry in split["shards"]]
        for entry in entries:
            if sha256(folder / entry["file"]) != entry["sha256"]:
                raise damaged(folder / entry["file"], "differs from its checksum", encode_command(header, folder))
        say(console, f"{len(entries)} shards, all as they were written")
    dataset = datasets[options.split]
    count = min(options.decode, len(dataset))
    if count > 0:
        device, _ = take_device(options.device, "fp32")
        tokenizer = load_tokenizer(options.vae or dataset.vae.name, device)
        check_vae(tokenizer.vae.sha256, dataset.vae.sha256, f"{options.vae or dataset.vae.name} is")
        save_png(decoded(dataset, tokenizer, count), out)
        say(console, f"{count} of them decoded: {out}")


def decoded(dataset: LatentDataset, tokenizer: Tokenizer, count: int) -> np.ndarray:
    return grid(to_uint8(tokenizer.decode(dataset.means(evenly(len(dataset), count)))), columns=min(count, 8))


def crops_in_words(crop: dict) -> str:
    height, width = crop["image_size"]
    kind = "the middle"
    if crop["kind"] == "random":
        kind = f"random crops of {crop['area_min']:g} to {crop['area_max']:g} of the area"
    mirrored = "mirrored" if crop["hflip"] else "not mirrored"
    return f"{height}x{width}, {kind}, {mirrored}, {crop['views']} views, seed {crop['seed']}"


def show(folder: Path, header: dict, console: Console) -> None:
    recipe, vae, source = header["recipe"], header["recipe"]["vae"], header["recipe"].get("source", {})
    table = Table(box=None, show_header=False, title=str(folder), title_justify="left")
    for name, text in (
        ("latents", f"{' x '.join(map(str, recipe['shape']))} (channels, height, width), {recipe['dtype']}"),
        ("VAE", f"{vae['name']} ({vae['kind']}, {vae['sha256'][:12]})"),
        ("scale, shift", f"{vae['scale']:g}, {vae['shift']:g}"),
        ("pictures", crops_in_words(recipe["crop"]) if "crop" in recipe else "not encoded by umd, crops unknown"),
        ("source", source.get("path", "unknown")),
        ("classes", str(len(recipe["class_names"])) if recipe["class_names"] else "no labels"),
    ):  # fmt: skip
        table.add_row(Text(name, "bold"), text)
    console.print(table)
    table = Table("split", "pictures", "left out", "shards", "GiB", "channel means", "channel stds", box=None)
    for split, entry in header["splits"].items():
        size = sum(shard["bytes"] for shard in entry["shards"]) / 2**30
        statistics = (" ".join(f"{value:.3f}" for value in entry[name]) for name in ("mean", "std"))
        left_out = len(entry["left_out"]) + source.get("quarantined", {}).get(split, 0)
        counts = (entry["images"], left_out, len(entry["shards"]))
        table.add_row(split, *map(str, counts), f"{size:.3g}", *statistics)
    console.print(table)
