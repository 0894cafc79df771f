"""Open a source (`open_dataset`), stream training batches (`train_loader`), read test pictures (`center_view`).

Everything random is a pure function of (seed, epoch, index). So batches do not depend on the number of workers or
ranks, and a run resumed at any sample gets the very batches that it would have seen.
"""

import importlib.util
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from umd.errors import UserError
from umd.machine.device import beside, pick_device, to_device
from umd.train.clips import ClipDataset, check_length, decode_clip, open_clips
from umd.train.crops import centered, crop_batch, draw_view, shrink_for, train_view, view_rng
from umd.train.decoding import decode, whole
from umd.train.emoji import open_emoji
from umd.train.folders import open_folder
from umd.train.index import Names
from umd.train.latent_batches import StoredViews, as_read, drawn_latents
from umd.train.latents import BLOCK, LatentDataset, is_latents, open_latents, pixel_config, tokenizer_of
from umd.train.pixels import PixelDataset, StoredCrops, is_pixels, open_pixels
from umd.train.pools import in_order
from umd.train.quarantine import read_quarantine
from umd.train.recipes import check_crops
from umd.train.settings import DataConfig
from umd.train.signals import StopRequest
from umd.train.sources import IDX_NAME, ImageDataset, Rows, open_arrays, open_idx
from umd.train.tars import Members, is_tars, open_tars
from umd.train.waiting import Prepared

GROUP = 256  # with --data.shuffle blocks: blocks whose images are mixed, 16,384 images


@dataclass
class Batch:
    """A training batch of B samples.

    x_start: float32 [B, C, H, W], pixels in [-1, 1]. labels: int64 [B], None if unlabelled. indices: int64 [B].
    """

    x_start: Tensor
    labels: Tensor | None
    indices: Tensor


Dataset = ImageDataset | LatentDataset
Batches = Generator[Batch, None, None]  # endless; `.close()` or drop it to end its workers


def open_dataset(config: DataConfig, split: Literal["train", "test"]) -> Dataset:
    """Open the pictures or stored latents of one split.

    Raises UserError if the source is missing, empty, damaged, of an unknown kind, or does not fit the model.
    """
    if not config.source:
        raise UserError("no pictures were named: data.source is empty; give --data.source path/to/images")
    path = Path(config.source).expanduser()
    if config.num_frames > 1:
        return open_clips(
            config.source, split, config.holdout, config.skip_broken, config.num_frames, config.frame_stride
        )
    if is_latents(path):
        return open_latents(path, split, config)
    if is_pixels(path):
        return open_pixels(path, split, config)
    if config.channels not in (1, 3) and not config.vae:
        problem = "is no folder of latents" if path.exists() or config.source == "emoji" else "does not exist"
        raise UserError(
            f"data source {config.source} {problem}, and a model of {config.channels} channels learns "
            "from latents: make one with umd encode-latents, or give --data.vae to encode in each step."
        )
    if config.source == "emoji":
        dataset = open_emoji(split, config.holdout)
        if path.exists():
            dataset.notes.append("data.source emoji is the built-in set, not what is here under that name: ./emoji is")
        return dataset
    if path.is_dir() or (path.suffix == ".tar" and path.exists()):
        opened = open_tars if is_tars(path) else open_folder
        quarantine = read_quarantine(path, config.quarantine)
        return opened(path, split, config.holdout, config.skip_broken, quarantine)
    if not path.exists():
        problem = "does not exist"
    elif path.suffix in (".npz", ".npy"):
        return open_arrays(path, split, config.holdout)
    elif IDX_NAME.search(path.name):
        return open_idx(path, split, config.holdout)
    else:
        problem = "is of no kind that can be read"
    raise UserError(
        f"data source {config.source} {problem}: expected emoji, a folder of images, a .npz or .npy file, "
        "an *-images-idx3-ubyte(.gz) file, WebDataset tars (.tar), or a folder of latents or of stored pictures."
    )


def open_held_out_or_train(config: DataConfig) -> Dataset:
    """Open the held-out pictures, or the training ones if none are held out."""
    held_out = open_dataset(config, "test")
    return held_out if len(held_out) else open_dataset(config, "train")


def evenly(total: int, count: int) -> np.ndarray:
    """Indices of up to `count` of `total` things, evenly spread, from the first to the last: int64 [n]."""
    return np.linspace(0, total - 1, min(count, total)).astype(int)


# As tested


def center_view(
    dataset: Dataset, indices: Sequence[int] | np.ndarray | Tensor, config: DataConfig,
    zoom: float = 1.0,
) -> Tensor:  # fmt: skip
    """Read pictures for testing: resize the short side to `zoom` times the model's size, then center-crop.

    Returns float32 [n, C, H, W] in [-1, 1]. For a run on latents: the posterior means. For stored latents: the means of
    the first view, without zoom.
    """
    if isinstance(dataset, LatentDataset):
        return dataset.means(indices)
    if tokenizer := tokenizer_of(config, pick_device()):
        x = center_view(dataset, indices, pixel_config(config, tokenizer.vae), zoom)
        return tokenizer.moments(x)[:, 0].cpu()
    with ThreadPoolExecutor(max(1, config.workers)) as pool:  # threads suffice: Pillow releases the GIL
        read = partial(read_centered, dataset, config, zoom)
        views = list(in_order(pool, read, indices, config.source))
    if not views:
        return torch.empty(0, config.channels, *config.image_size)
    return as_model_input(torch.from_numpy(np.stack(views)))


def read_centered(dataset: ImageDataset, config: DataConfig, zoom: float, index: int) -> np.ndarray:
    return centered(dataset.read(int(index))[1], config, zoom)


def centered_view_of_file(path: Path | str, config: DataConfig) -> Tensor:
    """Read one image file as `center_view` does: float32 [1, C, H, W]. Raises UserError if it cannot be read."""
    if tokenizer := tokenizer_of(config, pick_device()):
        return tokenizer.moments(centered_view_of_file(path, pixel_config(config, tokenizer.vae)))[:, 0].cpu()
    picture = decode(path) if config.num_frames == 1 else whole(decode_clip(Path(path)))
    if config.num_frames > 1:
        check_length(len(picture.pixels), config.num_frames, config.frame_stride, f"clip {path}")
    return as_model_input(torch.from_numpy(np.stack([centered(picture, config)])))


def as_model_input(views: Tensor) -> Tensor:
    """Convert uint8 [B, H, W, C] or [B, F, H, W, C] to float32 [B, C, ...] in [-1, 1], on the same device."""
    return views.movedim(-1, 1).contiguous().float().div_(127.5).sub_(1)


# The stream of batches


def derive_seed(seed: int, *keys: int) -> int:
    """A 63-bit seed for one use of randomness, a pure function of the run's seed and the keys, e.g. the step."""
    return int(np.random.SeedSequence((seed, *keys)).generate_state(1, np.uint64)[0] >> 1)


def epoch_order(size: int, seed: int, epoch: int, blocks: np.ndarray | None = None) -> np.ndarray:
    """The order of the samples in an epoch, int64 [size]. It sorts Philox words, so every version of NumPy agrees.

    blocks: number of each sample's block, int64 [size], from 0. If given, the blocks are shuffled, then the samples
    within each group of `GROUP` blocks.
    """
    random = np.random.Philox(np.random.SeedSequence((seed, epoch)))
    words = random.random_raw(size)
    if blocks is None:
        return np.argsort(words, kind="stable")
    places = np.argsort(np.argsort(random.random_raw(int(blocks.max()) + 1), kind="stable"))
    return np.lexsort((words, places[blocks] // GROUP))


def sample_keys(
    size: int, *, batch_size: int, seed: int, start: int = 0, places: Sequence[int] | None = None,
    blocks: np.ndarray | None = None,
) -> Iterator[list[tuple[int, int]]]:  # fmt: skip
    """Yield for each batch, without end, (epoch, index) of the samples at `places` in it (None: of all samples)."""
    places = range(batch_size) if places is None else places
    order = lru_cache(maxsize=2)(lambda epoch: epoch_order(size, seed, epoch, blocks))
    for first in count(start, batch_size):
        positions = (divmod(first + place, size) for place in places)
        yield [(epoch, int(order(epoch)[position])) for epoch, position in positions]


def has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even the parent package nvidia is installed
        return False


def choose_loader(dataset: ImageDataset, wanted: str) -> str:
    """Resolve --data.loader to `dali` or `python`. Raises UserError if DALI is wanted and cannot read the pictures."""
    if wanted == "python" or isinstance(dataset, ClipDataset) or (wanted == "auto" and not has_dali()):
        return "python"
    if not has_dali():
        raise UserError("--data.loader dali: DALI is not installed; umd doctor says how to get it.")
    files = () if isinstance(dataset.pictures, np.ndarray | Rows) else dataset.pictures
    names = files.names if isinstance(files, Members) else files
    if isinstance(names, Names):
        other = names.first_without(".jpg", ".jpeg")
    else:
        other = next((name for file in names if not (name := str(file)).lower().endswith((".jpg", ".jpeg"))), None)
    if len(files) and other is None:
        return "dali"
    if wanted == "auto":
        return "python"
    found = f"{other} is none" if other else f"{dataset.name} is no folder or tar of them"
    raise UserError(f"DALI reads JPEG files, and {found}: set --data.loader auto.")


def reader(dataset: Dataset, config: DataConfig) -> str:
    """Say in words how training batches are read, for the log."""
    if isinstance(dataset, LatentDataset):
        return "read from shards" + (f" in blocks of {BLOCK}" if config.shuffle == "blocks" else "")
    if isinstance(dataset, PixelDataset):
        return "read from pixel shards"
    if choose_loader(dataset, config.loader) == "dali":
        return f"read by DALI, {max(1, config.workers)} threads"
    return f"read by Pillow, {config.workers} processes" if config.workers else "read by Pillow"


class TrainViews(torch.utils.data.Dataset):
    """(epoch, index) -> (view uint8 [H, W, C], requested index, used index), or the UserError that was raised."""

    def __init__(self, dataset: ImageDataset, config: DataConfig, seed: int):
        self.dataset, self.config, self.seed = dataset, config, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[np.ndarray, int, int] | UserError:
        epoch, index = key
        try:
            used, picture = self.dataset.read(index, partial(self.shrink, epoch, index))
            return train_view(picture, view_rng(self.seed, epoch, index), self.config), index, used
        except UserError as error:  # raised here, it would reach the user inside a worker's traceback
            return error

    def shrink(self, epoch: int, index: int, height: int, width: int) -> int:
        box, _ = draw_view(view_rng(self.seed, epoch, index), height, width, self.config)
        return shrink_for(box, self.config)


def collate(items: list) -> tuple[Tensor, np.ndarray, np.ndarray] | UserError:
    """Stack items to views uint8 [B, H, W, C], requested indices [B], used indices [B]; or return the first error."""
    error = next((item for item in items if isinstance(item, UserError)), None)
    if error is not None:
        return error
    views, asked, used = zip(*items, strict=True)
    return torch.from_numpy(np.stack(views)), np.array(asked, dtype=np.int64), np.array(used, dtype=np.int64)


def train_loader(
    dataset: Dataset,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    places: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
    stop: StopRequest | None = None,
) -> Batches:
    """Training batches without end: one permutation of the dataset per epoch; a batch may span two epochs.

    For a run on latents, x_start is drawn anew in each epoch from the posteriors, stored or of pictures encoded here.

    Args:
        batch_size: samples per batch, over all ranks.
        start: samples already seen by all ranks together; the batches go on from there.
        places: positions in the whole batch that this rank gets, in this order. None: all.
        device: device of the batch. To a GPU, pictures are copied as bytes from pinned memory.
        stop: once its `requested` is set, waiting for a batch longer than `stop.patience` seconds raises `Stopped`.

    Batches raise UserError if a picture cannot be read, a reader process dies, or the disk stalls for an hour.
    """
    places = range(batch_size) if places is None else places
    if batch_size < 1 or start < 0 or seed < 0:
        given = f"batch_size {batch_size}, start {start}, seed {seed}"
        raise ValueError(f"{given}: expected a batch of 1 or more, and none negative")
    if len(places) == 0 or not 0 <= min(places) <= max(places) < batch_size:
        raise ValueError(f"places: expected some of 0..{batch_size - 1}, got {list(places)[:8]}")
    if len(dataset) == 0:
        raise ValueError(f"the {dataset.split} split of {dataset.name} is empty")
    place: dict[str, Any] = dict(batch_size=batch_size, seed=seed, start=start, places=places)
    if isinstance(dataset, ImageDataset) and (tokenizer := tokenizer_of(config, device)):
        pictures = train_loader(dataset, pixel_config(config, tokenizer.vae), **place, device=device, stop=stop)
        return drawn_latents(pictures, tokenizer.moments, len(dataset), **place)
    device, blocks = torch.device(device), None
    if isinstance(dataset, LatentDataset):
        check_crops(dataset.header, dataset.folder, config)
        blocks = dataset.blocks if config.shuffle == "blocks" else None
    elif config.shuffle == "blocks":
        raise UserError("--data.shuffle blocks is for stored latents; leave it at global for pictures")
    keys = sample_keys(len(dataset), **place, blocks=blocks)
    rest = (dataset.name, device, stop)
    if isinstance(dataset, LatentDataset):
        views = StoredViews(dataset, 1 if blocks is None else BLOCK)
        prepared = partial(Prepared, views, keys, config.workers, as_read, *rest)
        return drawn_latents(batches(prepared, dataset, device, dataset.typed), lambda x: x, len(dataset), **place)
    if isinstance(dataset, PixelDataset):
        prepared = partial(Prepared, StoredCrops(dataset, config, seed), keys, config.workers, as_read, *rest)
        return batches(prepared, dataset, device, partial(crop_batch, size=config.image_size))
    if choose_loader(dataset, config.loader) == "dali":
        from umd.train.dali import dali_batches  # late: it imports this file

        return dali_batches(dataset, config, keys, seed, device, stop)
    prepared = partial(Prepared, TrainViews(dataset, config, seed), keys, config.workers, collate, *rest)
    return batches(prepared, dataset, device, as_model_input)


def batches(
    start: Callable[[], Prepared], dataset: Dataset, device: torch.device,
    convert: Callable[..., Tensor],
) -> Batches:  # fmt: skip
    """Yield prepared batches, moved to `device` and converted to the model's input by `convert`.

    start: starts the workers, at the first batch.
    """
    labels = None if dataset.labels is None else torch.from_numpy(dataset.labels)
    prepared = start()
    try:
        while True:
            item = next(prepared)
            if isinstance(item, UserError):
                raise item
            *views, asked, used = item
            for index in asked[asked != used]:
                assert isinstance(dataset, ImageDataset), "stored latents have no stand-ins"
                dataset.mark_broken(int(index))
            indices = torch.from_numpy(used)
            with beside(device) as sent:
                x_start = convert(*(to_device(view, device) for view in views))  # [B, C, H, W]
                batch = Batch(
                    x_start,
                    None if labels is None else to_device(labels[indices], device),
                    to_device(indices, device),
                )
                sent(batch.x_start, batch.labels, batch.indices)
            yield batch
    finally:
        prepared.close()
