"""Latents on disk, encoded once and read in every epoch: shards, their common header, and the dataset.

    folder/train-00000-of-00003.safetensors    moments [V, n, M, C, h, w], labels, indices, crc32 [V, n]
           test-00000-of-00001.safetensors
           latents.json                        the recipe; size, checksum and count of each shard; written last

A shard has n images with V views (crops) each. M = 2 for mean and std of a VAE's posterior, 1 for the latent of a VQ
model. Each shard's own header repeats the recipe and lists the pictures it was made from.

A row is one view of one image. Rows are read by `pread`, never memory-mapped: the read-ahead of a map would read many
times the row from the disk, and an I/O error in it would kill the process without a message.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from umd.errors import UserError
from umd.files import OpenFile, again_if_lost, sha256
from umd.tokenizer import VAE, Tokenizer, load_tokenizer
from umd.train import store
from umd.train.recipes import encode_command
from umd.train.store import (
    Shard,
    damaged,
    finished,
    is_store,
    open_shards,
    shard_file,
    unreadable,
    write_header,
)

if TYPE_CHECKING:
    from umd.train.settings import DataConfig

FORMAT = 2
HEADER = "latents.json"
SPLIT = {"images": int, "left_out": [str], "mean": [float | int], "std": [float | int]}
SPLIT |= {"shards": [{"file": str, "images": int, "bytes": int, "sha256": str, "crc32": int}]}
CROP = {"kind": str, "views": int, "seed": int, "hflip": bool, "area_min": float | int, "area_max": float | int}
VAE_FIELDS = {"name": str, "kind": str, "sha256": str, "channels": int, "factor": int} | dict.fromkeys(
    ("scale", "shift"), float | int
)
SOURCE = {"path": str, "holdout": float | int, "quarantined?": {"train": int, "test": int}}
RECIPE = {"vae": VAE_FIELDS, "shape": [int], "dtype": str, "class_names": [str]}
# What a valid header has (checked by `amiss`). Folders encoded by another program may lack crop and source.
PATTERN = {
    "recipe": RECIPE | {"crop?": CROP | {"image_size": [int]}, "source?": SOURCE},
    "splits": {"train?": SPLIT, "test?": SPLIT},
    "quarantine?": str,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Integer dtypes in which latents are read, as numpy has no bf16.
BITS: dict[str, np.dtype] = {"bf16": np.dtype("<i2"), "fp16": np.dtype("<i2"), "fp32": np.dtype("<i4")}
OPEN_FILES = 512  # most files that a process keeps open; half of what most systems allow
BLOCK = 64  # images per block: 1 MiB of 32x32x4 latents in 16 bits, large enough for any disk
AHEAD = 512  # blocks that a process remembers as requested: two groups of an epoch in blocks


# Shards


def shard_name(split: str, number: int, total: int) -> str:
    return f"{split}-{number:05d}-of-{total:05d}.safetensors"


def shard_bytes(
    recipe: dict, split: str, moments: Tensor, labels: np.ndarray | None, indices: np.ndarray, names: Sequence[str],
    left_out: Sequence[str] = (),
) -> bytes:  # fmt: skip
    """Serialise a shard. The bytes depend only on the arguments, so any rank that encodes it writes the same file.

    Args:
        moments: [n, V, M, C, h, w] in the dtype of the store.
        labels: int64 [n], or None.
        indices: int64 [n], of the pictures in the source.
        names: of the n pictures.
        left_out: names of pictures that could not be read.
    """
    moments = moments.transpose(0, 1).contiguous()  # [V, n, ...]: an epoch reads one view
    rows = (view.flatten().view(torch.uint8).numpy() for view in moments.flatten(0, 1))
    crc32 = np.array([zlib.crc32(row) for row in rows], dtype=np.int64).reshape(moments.shape[:2])
    tensors = {"moments": moments, "indices": torch.from_numpy(indices), "crc32": torch.from_numpy(crc32)}
    if labels is not None:
        tensors["labels"] = torch.from_numpy(labels)
    values = moments.double()
    second = values.square().sum(2)  # E[x²] = mean² + std²
    about = {
        "format": FORMAT,
        "recipe": recipe,
        "split": split,
        "names": list(names),
        "left_out": list(left_out),
        "values": second.numel() // second.shape[2],  # number per channel
        "sum": values[:, :, 0].sum((0, 1, 3, 4)).tolist(),
        "sum_of_squares": second.sum((0, 1, 3, 4)).tolist(),
    }
    return shard_file(tensors, about)


# The folder


def finish(folder: Path, recipe: dict, shards: dict[str, int], quarantine: str = "") -> dict:
    """Check every shard, byte for byte, and write latents.json. Returns the header.

    shards: number of shards of each split. quarantine: the quarantine list that was given, for the record.
    """
    splits = {}
    for split, total in shards.items():
        found, entries = finished(folder, [shard_name(split, number, total) for number in range(total)], recipe)
        count, left_out = 0, []
        sums, squares = torch.zeros(2, recipe["shape"][0], dtype=torch.float64)
        for shard, entry in zip(found, entries, strict=True):
            entry |= {"bytes": shard.path.stat().st_size, "sha256": sha256(shard.path)}
            left_out += shard.about["left_out"]
            count += shard.about["values"]
            sums += torch.tensor(shard.about["sum"], dtype=torch.float64)
            squares += torch.tensor(shard.about["sum_of_squares"], dtype=torch.float64)
        mean = sums / max(count, 1)
        std = (squares / max(count, 1) - mean.square()).clamp(min=0).sqrt()
        splits[split] = {
            "images": sum(entry["images"] for entry in entries),
            "left_out": left_out,
            "mean": mean.tolist(),  # per channel, over latents drawn from the posterior
            "std": std.tolist(),
            "shards": entries,
        }
    header = {"format": FORMAT, "recipe": recipe, "splits": splits}
    return write_header(folder / HEADER, header | ({"quarantine": quarantine} if quarantine else {}))


def is_latents(path: Path) -> bool:
    """Whether a folder holds latents, complete or unfinished."""
    return is_store(path, "latents")


def read_header(folder: Path) -> dict:
    """Read latents.json. Raises UserError if the folder holds no latents, is unfinished, or is damaged."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: expected one that umd encode-latents wrote")
    if not is_latents(folder):
        raise UserError(f"{folder} holds no latents: expected a folder that umd encode-latents wrote")
    return store.read_header(folder / HEADER, PATTERN, FORMAT)


@dataclass
class LatentDataset:
    """Stored latents of one split of N images with V views. Has the attributes of an `ImageDataset`.

    labels: int64 [N] indices into `class_names`, or None. crc32: uint32 [V, N], checksum of each view.
    """

    folder: Path
    split: str
    header: dict
    shards: list[Shard]
    labels: np.ndarray | None
    class_names: list[str]
    crc32: np.ndarray

    def __post_init__(self) -> None:
        self.name = self.folder.resolve().name
        self.sizes = np.array([shard.images for shard in self.shards], dtype=np.int64)
        self.ends = np.cumsum([0, *self.sizes], dtype=np.int64)
        self.starts = np.array([shard.tensors["moments"][1] for shard in self.shards], dtype=np.int64)
        self.opened = lru_cache(OPEN_FILES)(lambda shard: OpenFile(self.shards[shard].path))
        self.expect = lru_cache(AHEAD)(lambda shard, start, size, epoch: self.opened(shard).expect(start, size))

    def __reduce__(self) -> tuple:  # pickled for worker processes that are spawned, not forked
        return type(self), tuple(getattr(self, each.name) for each in fields(self))

    def __len__(self) -> int:
        return int(self.ends[-1])

    @property
    def num_broken(self) -> int:
        return len(self.header["splits"][self.split]["left_out"])

    @property
    def vae(self) -> VAE:
        return VAE(**self.header["recipe"]["vae"])

    @property
    def dtype(self) -> str:
        return self.header["recipe"]["dtype"]

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row, one view of one image: (M, C, h, w)."""
        return self.shards[0].tensors["moments"][0][2:]

    @property
    def blocks(self) -> np.ndarray:
        """Number of each image's block, int64 [N], from 0. A block is `BLOCK` neighbours in a shard."""
        firsts = np.cumsum([0, *(-(-self.sizes // BLOCK))])
        return np.concatenate([first + np.arange(n) // BLOCK for first, n in zip(firsts, self.sizes, strict=False)])

    def read(self, indices: np.ndarray, epochs: np.ndarray, block: int = 1) -> np.ndarray:
        """Read moments as stored: integers [B, M, C, h, w]. Of each image, take view `epoch` modulo V.

        All reads are announced to the system before the first one is waited for. Every row is compared with its
        checksum. Blocks that another process of this host has read are in memory already.

        Args:
            indices, epochs: int64 [B].
            block: number of neighbours in a shard that the disk reads together.

        Raises:
            UserError: a shard cannot be read or a row is damaged. The message names the shard, and the picture of a
                damaged row.
            TemporaryError: a network disk was lost and did not come back.
        """
        try:
            return again_if_lost(lambda: self._read(indices, epochs, block), self.folder)
        except OSError as error:
            raise unreadable(error.filename, error, self.command) from error

    def _read(self, indices: np.ndarray, epochs: np.ndarray, block: int) -> np.ndarray:
        """`read`. Raises OSError, naming the shard, and forgets the open files: the next try opens them anew."""
        shards, views = np.searchsorted(self.ends, indices, "right") - 1, epochs % len(self.crc32)
        images, crc32 = indices - self.ends[shards], self.crc32[views, indices].tolist()
        found = np.empty((len(indices), *self.row_shape), BITS[self.dtype])
        rows, nbytes = found.reshape(-1).data.cast("B"), found[:1].nbytes

        def first_byte(images: np.ndarray) -> np.ndarray:
            return self.starts[shards] + (views * self.sizes[shards] + images) * nbytes

        first = images // block * block
        begin, end = first_byte(first), first_byte(np.minimum(first + block, self.sizes[shards]) - 1) + nbytes
        numbers = shards.tolist()
        number = numbers[0]
        try:
            for number, *ahead in zip(numbers, begin.tolist(), (end - begin).tolist(), epochs.tolist(), strict=True):
                self.expect(number, *ahead)
            for i, (number, start) in enumerate(zip(numbers, first_byte(images).tolist(), strict=True)):
                row = rows[i * nbytes : (i + 1) * nbytes]
                whole = self.opened(number).read_into(row, start)
                if not whole or zlib.crc32(row) != crc32[i]:
                    shard, what = self.shards[number], "differs from its checksum at" if whole else "ends before"
                    name = f"{shard.about['names'][images[i]]} (row {(start - self.starts[number]) // nbytes})"
                    raise damaged(shard.path, f"{what} view {views[i]} of picture {name}", self.command)
        except OSError as error:
            self.opened.cache_clear()
            self.expect.cache_clear()
            error.filename = str(self.shards[number].path)
            raise
        return found

    @property
    def command(self) -> str:
        return encode_command(self.header, self.folder)

    def typed(self, bits: Tensor) -> Tensor:
        """Reinterpret stored integers [...] as floating-point numbers in the dtype of the store."""
        return bits.view(DTYPES[self.dtype])

    def means(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Posterior means of the first views: fp32 [n, C, h, w]."""
        chosen = np.asarray(indices, dtype=np.int64)
        if not len(chosen):
            return torch.empty(0, *self.header["recipe"]["shape"])
        return self.typed(torch.from_numpy(self.read(chosen, np.zeros_like(chosen))[:, 0])).float()


def open_latents(folder: Path, split: str, config: "DataConfig | None" = None) -> LatentDataset:
    """Open the stored latents of a split.

    Raises UserError if the folder holds no latents, is unfinished or damaged. With a config, also if the shape differs
    from the model's or the VAE from the run's.
    """
    header = read_header(folder)
    recipe = header["recipe"]
    if config is not None:
        shape, expected = recipe["shape"], [config.channels, *config.image_size]
        if shape != expected:
            raise UserError(
                f"the latents in {folder} are {'x'.join(map(str, shape))} and the model sees "
                f"{'x'.join(map(str, expected))} (channels, height, width); set --model.channels {shape[0]} "
                f"--model.image-size {shape[1]} {shape[2]}, with a patch size that divides them"
            )
        check_vae(recipe["vae"]["sha256"], config.vae_hash, f"the latents in {folder} are of")
    if split not in header["splits"]:
        raise UserError(f"{folder} holds no {split} split")
    shards = open_shards(folder, header["splits"][split]["shards"], recipe, encode_command(header, folder))
    class_names = recipe["class_names"]
    labels = np.concatenate([s.array("labels") for s in shards] or [np.empty(0, np.int64)]) if class_names else None
    crc32 = np.concatenate([s.array("crc32") for s in shards] or [np.empty((1, 0))], axis=1).astype(np.uint32)
    return LatentDataset(folder, split, header, shards, labels, class_names, crc32)


# The VAE of a run


def check_vae(found: str, expected: str, what: str) -> None:
    """Raise UserError if `expected` is not "" and differs from `found` (SHA-256 of VAEs).

    what: beginning of the error message, including its verb.
    """
    if expected and found != expected:
        raise UserError(
            f"{what} another VAE ({found[:12] or 'none'}) than was used before ({expected[:12]}); "
            "latents of one mean nothing to the other or to a network trained on them: give the one used before, or "
            "encode and train anew in other folders"
        )


def with_vae(config: "DataConfig", dataset: object) -> "DataConfig":
    """The settings with name and hash of the VAE that encodes the dataset. Unchanged for a run on pixels."""
    if isinstance(dataset, LatentDataset):
        stored = dataset.vae
        if config.vae not in ("", stored.name):
            check_vae(load_tokenizer(config.vae).vae.sha256, stored.sha256, f"{config.vae} is")
        return replace(config, vae=config.vae or stored.name, vae_hash=stored.sha256)
    if not config.vae:
        return config
    vae = load_tokenizer(config.vae).vae
    check_vae(vae.sha256, config.vae_hash, f"{config.vae} is")
    return replace(config, vae=vae.name, vae_hash=vae.sha256)


def check_run_vae(saved: dict, config: "DataConfig", folder: Path) -> None:
    """Raise UserError if the checkpoint is from a run on latents of another VAE."""
    before = saved.get("config", {}).get("data", {}).get("vae_hash", "")
    check_vae(config.vae_hash, before, f"{folder} was trained on latents, and {config.source} is of")


def tokenizer_of(config: "DataConfig", device: torch.device | str = "cpu") -> Tokenizer | None:
    """Load the VAE of a run. None for a run on pixels. Raises UserError if it is missing or not the run's."""
    if not config.vae_hash:
        return None
    try:
        tokenizer = load_tokenizer(config.vae, device)
    except UserError as error:
        raise UserError(
            f"this run is of latents, and its VAE is missing: {error}; say where it lies by --vae or "
            "--data.vae, or for commands that have neither in the run's config.yaml (vae, under data)"
        ) from error
    check_vae(tokenizer.vae.sha256, config.vae_hash, f"{config.vae} is")
    return tokenizer


def pixel_config(config: "DataConfig", vae: VAE) -> "DataConfig":
    """Settings for the pictures that the VAE encodes to the latents of `config`."""
    height, width = (side * vae.factor for side in config.image_size)
    return replace(config, image_size=(height, width), channels=3, vae="", vae_hash="")
