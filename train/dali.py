"""Training batches by NVIDIA DALI: its threads (on a GPU its JPEG hardware) decode only the crop of each picture.

Python chooses picture, crop and mirroring by (seed, epoch, index), as in `umd.train.data`. The pipeline draws nothing
at random and has no state. So:

- Batches equal those of the Python loader up to rounding in the resize filter, for any number of threads and ranks.
- `start` alone resumes in the middle of an epoch, also with another number of ranks.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from umd.errors import UserError
from umd.machine.device import to_device
from umd.train.crops import draw_view, view_rng
from umd.train.data import Batch, Batches
from umd.train.decoding import ORIENTATION, BrokenPicture, read_file, unreadable, upright_jpeg
from umd.train.latent_batches import as_read
from umd.train.settings import DataConfig
from umd.train.signals import StopRequest
from umd.train.sources import LEAVE_OUT, ImageDataset
from umd.train.waiting import Prepared

READERS = 8  # threads per reader process, which wait for the disk
INPUTS = ("encoded", "corner", "shape", "roi_start", "roi_end", "mirror")


class Sample(NamedTuple):
    """One picture as input of the pipeline."""

    number: int  # index of the picture that was read; with `skip_broken` possibly a replacement
    encoded: np.ndarray  # uint8 [bytes]
    corner: np.ndarray  # int32 [2], row and column where decoding starts
    shape: np.ndarray  # int32 [2], rows and columns to decode
    roi_start: np.ndarray  # float32 [2], top left of the crop within the decoded part
    roi_end: np.ndarray  # float32 [2]
    mirror: np.ndarray  # int32 []


def build_pipeline(config: DataConfig, batch_size: int, device: torch.device):
    """Build the pipeline: decode and crop, resize, mirror, scale to [-1, 1]. On a GPU decoding is `mixed`."""
    from nvidia.dali import fn, pipeline_def, types

    on_gpu = device.type == "cuda"
    grey = config.channels == 1

    @pipeline_def
    def views():
        kinds = (types.UINT8, types.INT32, types.INT32, types.FLOAT, types.FLOAT, types.INT32)
        ndims = (1, 1, 1, 1, 1, 0)
        encoded, corner, shape, roi_start, roi_end, mirror = (
            fn.external_source(name=name, dtype=kind, ndim=ndim)
            for name, kind, ndim in zip(INPUTS, kinds, ndims, strict=True)
        )
        decoded = fn.decoders.image_slice(
            encoded, start=corner, shape=shape, axis_names="HW", device="mixed" if on_gpu else "cpu",
            output_type=types.GRAY if grey else types.RGB,
        )  # fmt: skip
        resized = fn.resize(
            decoded, size=config.image_size, roi_start=roi_start, roi_end=roi_end,
            interp_type=types.INTERP_CUBIC, antialias=True,
        )  # fmt: skip
        channels = [127.5] * config.channels
        return fn.crop_mirror_normalize(
            resized, mirror=mirror, mean=channels, std=channels, output_layout="CHW", dtype=types.FLOAT
        )

    pipeline = views(
        batch_size=batch_size,
        num_threads=max(1, config.workers),
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=1,  # one batch is decoded while the model works on another
    )
    pipeline.build()
    return pipeline


class Encoded(NamedTuple):
    """A batch as reader processes pass it on, in few tensors."""

    numbers: Tensor  # int64 [B]
    encoded: Tensor  # uint8, all files one after another
    ends: Tensor  # int64 [B]
    geometry: list[Tensor]  # the other inputs of the pipeline, [B, ...]

    def inputs(self) -> list[list[np.ndarray]]:
        """For each of `INPUTS`, the list of its B arrays."""
        files = np.split(self.encoded.numpy(), self.ends[:-1].tolist())
        return [files, *(list(column.numpy()) for column in self.geometry)]


class Samples(Dataset):
    """[(epoch, index)] of a batch -> `Encoded`, or the UserError that was raised.

    Runs in reader processes, as eight Python threads would slow down the process that launches kernels.
    """

    def __init__(self, dataset: ImageDataset, config: DataConfig, seed: int):
        self.dataset, self.config, self.seed = dataset, config, seed
        self.pool: ThreadPoolExecutor | None = None  # made by each process

    def __getitems__(self, keys: list[tuple[int, int]]) -> Encoded | UserError:
        in_order: Callable = map  # no threads in the training process: it could not exit while a disk holds them
        if get_worker_info() is not None:
            self.pool = self.pool or ThreadPoolExecutor(READERS, thread_name_prefix="read")
            in_order = self.pool.map
        try:
            samples = list(in_order(lambda key: read_sample(self.dataset, self.config, self.seed, *key), keys))
        except UserError as error:
            return error
        numbers, encoded, *geometry = zip(*samples, strict=True)
        return Encoded(
            torch.tensor(numbers),
            torch.from_numpy(np.concatenate(encoded)),
            torch.tensor([len(file) for file in encoded]).cumsum(0),
            [torch.from_numpy(np.stack(column)) for column in geometry],
        )


def dali_batches(
    dataset: ImageDataset, config: DataConfig, keys: Iterator[list[tuple[int, int]]], seed: int, device: torch.device,
    stop: StopRequest | None = None,
) -> Batches:  # fmt: skip
    """Yield the batches of `keys`, (epoch, index) of each sample, as documented at `umd.train.data.train_loader`."""
    labels = None if dataset.labels is None else torch.from_numpy(dataset.labels)
    waiting: deque[list[tuple[int, int]]] = deque()  # keys of batches not yet yielded
    decoding: list[int] = []  # indices of the one batch in the pipeline
    failed: UserError | None = None  # error of the batch after it
    pipeline: Any = None

    def handed_over(keys: Iterator[list[tuple[int, int]]]) -> Iterator[list[tuple[int, int]]]:
        for batch in keys:
            waiting.append(batch)
            yield batch

    def read(keys: Iterator[list[tuple[int, int]]]) -> Prepared:
        processes = -(-config.workers // 4)  # few: they only read files and draw crops; DALI decodes
        samples = Samples(dataset, config, seed)
        return Prepared(samples, handed_over(keys), processes, as_read, dataset.name, stop=stop)

    def decode_next() -> None:
        nonlocal decoding, pipeline, failed
        batch = next(reading)
        if isinstance(batch, UserError):
            failed = batch
            return
        pipeline = pipeline or build_pipeline(config, len(batch.numbers), device)
        for name, column in zip(INPUTS, batch.inputs(), strict=True):
            pipeline.feed_input(name, column)
        pipeline.schedule_run()
        decoding = batch.numbers.tolist()

    reading = read(keys)
    try:
        while True:
            if failed is not None:
                raise failed
            if not decoding:
                decode_next()
                continue
            try:
                (views,) = pipeline.share_outputs()
            except RuntimeError as error:  # it names no file, or only one of several
                leave_out_broken(dataset, decoding, error)
                again = list(waiting)
                waiting.clear()
                reading.close()
                pipeline, decoding, reading = None, [], read(chain(again, keys))  # now with a replacement
                continue
            x_start = to_torch(views, (len(decoding), config.channels, *config.image_size), device)
            pipeline.release_outputs()
            asked = [index for _, index in waiting.popleft()]
            for index, used in zip(asked, decoding, strict=True):
                if index != used:
                    dataset.mark_broken(index)
            indices, decoding = torch.tensor(decoding), []
            decode_next()
            yield Batch(
                x_start=x_start,
                labels=None if labels is None else to_device(labels[indices], device),
                indices=to_device(indices, device),
            )
    finally:
        reading.close()


def to_torch(views: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Copy DALI's batch, whose memory DALI will overwrite, to a tensor: float32 [B, C, H, W]."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    x = torch.empty(shape, device=device)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    feed_ndarray(views.as_tensor(), x, cuda_stream=stream)
    return x


def read_sample(dataset: ImageDataset, config: DataConfig, seed: int, epoch: int, index: int) -> Sample:
    """Read a picture's file and draw its crop. Raises UserError, naming the file, if it is not a picture."""
    used = index
    if index in dataset.broken:
        used, _ = dataset.read(index)
    try:
        encoded, (height, width) = read_encoded(dataset.pictures[used])
    except BrokenPicture:
        if not dataset.skip_broken:
            raise
        used, _ = dataset.read(index)  # Pillow finds it broken too, and takes a replacement or raises
        encoded, (height, width) = read_encoded(dataset.pictures[used])
    (left, top, right, bottom), mirrored = draw_view(view_rng(seed, epoch, index), height, width, config)
    # Like Pillow's, the filter reaches beyond the crop: by two pixels of the result on each side.
    across = 2 * max(1.0, (right - left) / config.image_size[1])
    down = 2 * max(1.0, (bottom - top) / config.image_size[0])
    x, y = max(0, math.floor(left - across)), max(0, math.floor(top - down))
    x_end, y_end = min(width, math.ceil(right + across)), min(height, math.ceil(bottom + down))
    return Sample(
        used,
        np.frombuffer(encoded, np.uint8),
        np.array([y, x], np.int32),
        np.array([y_end - y, x_end - x], np.int32),
        np.array([top - y, left - x], np.float32),
        np.array([bottom - y, right - x], np.float32),
        np.array(mirrored, np.int32),
    )


def read_encoded(file: Any) -> tuple[bytes, tuple[int, int]]:
    """Read an image file. Returns its bytes, and height and width of the upright picture. Raises as `decode`."""
    try:
        encoded = read_file(file)
    except BrokenPicture as error:
        raise BrokenPicture(f"{error}. {LEAVE_OUT}") from error
    try:
        if (size := upright_jpeg(encoded)) is not None:
            return encoded, size
        with Image.open(BytesIO(encoded)) as image:  # also accepts other formats with the suffix .jpg
            width, height = image.size
            orientation = image.getexif().get(ORIENTATION, 1)
        if orientation != 1 and encoded[:2] == b"\xff\xd8":  # DALI reads Exif only, but XMP may hold the orientation
            exif = Image.Exif()
            exif[ORIENTATION] = orientation
            segment = exif.tobytes()
            encoded = b"\xff\xd8\xff\xe1" + (2 + len(segment)).to_bytes(2, "big") + segment + encoded[2:]
        return encoded, (width, height) if orientation >= 5 else (height, width)
    except Exception as error:  # as in `decode`
        raise BrokenPicture(f"{unreadable(file, error)}. {LEAVE_OUT}") from error


def leave_out_broken(dataset: ImageDataset, indices: list[int], error: RuntimeError) -> None:
    """Find with Pillow the pictures of a batch that DALI could not decode, and mark them broken.

    Raises UserError unless `skip_broken` is set.
    """
    found = False
    for index in set(indices):
        try:
            dataset.picture(index)
        except BrokenPicture:
            if not dataset.skip_broken:
                raise
            dataset.mark_broken(index)
            found = True
    if not found:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"DALI cannot decode a batch ({reason[0] if reason else 'it gives no reason'}) that Pillow can: "
            "run umd check-data, or set --data.loader python."
        ) from error
