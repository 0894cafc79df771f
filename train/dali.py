"""Training batches by NVIDIA DALI: its threads decode, on a GPU its JPEG hardware, and only the crop is kept.

Which picture, which crop and whether mirrored come from Python, by (seed, epoch, index) as in `umd.train.data`; nothing
random happens in the pipeline and it has no state. So batches are those of the Python loader up to the resize filter's
rounding, for any number of threads and ranks, and `start` alone resumes in the middle of an epoch, also on other ranks.
"""

import contextlib
import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from umd.device import to_device
from umd.errors import UserError
from umd.train.crops import draw_view, view_rng
from umd.train.data import Batch, Batches, DataConfig
from umd.train.sources import ImageDataset, unreadable

READERS = 8  # threads that wait for the disk
BATCHES_READ = 3  # the one the model works on next, and two whose files are read meanwhile
INPUTS = ("encoded", "corner", "shape", "roi_start", "roi_end", "mirror")
ORIENTATION = 0x0112  # EXIF tag; from 5 on height and width change places


class Sample(NamedTuple):
    """One picture as the pipeline takes it."""

    number: int  # index of the picture read: with `skip_broken`, perhaps a stand-in
    encoded: np.ndarray  # uint8 [bytes]
    corner: np.ndarray  # int32 [2], row and column where decoding starts
    shape: np.ndarray  # int32 [2], rows and columns to decode
    roi_start: np.ndarray  # float32 [2], the crop within what is decoded
    roi_end: np.ndarray  # float32 [2]
    mirror: np.ndarray  # int32 []


def build_pipeline(config: DataConfig, batch_size: int, device: torch.device):
    """The one pipeline: decode and crop, resize, mirror, to [-1, 1]. On a GPU decoding is `mixed`."""
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


def dali_batches(
    dataset: ImageDataset, config: DataConfig, keys: Iterator[list[tuple[int, int]]], seed: int, device: torch.device
) -> Batches:
    """Batches of `keys`, (epoch, index) of each sample, as `umd.train.data.train_loader` promises them."""
    labels = None if dataset.labels is None else torch.from_numpy(dataset.labels)
    pool = ThreadPoolExecutor(READERS, thread_name_prefix="read")
    waiting: deque[list[tuple[int, int]]] = deque()  # keys of what is not yet handed out
    reading: deque[list[Future[Sample]]] = deque()
    decoding: list[int] = []  # indices of the one batch in the pipeline
    pipeline: Any = None

    def decode_next() -> None:
        nonlocal decoding
        samples = [future.result() for future in reading[0]]
        reading.popleft()
        for name, column in zip(INPUTS, list(zip(*samples, strict=True))[1:], strict=True):
            pipeline.feed_input(name, list(column))
        pipeline.schedule_run()
        decoding = [sample.number for sample in samples]

    def read_ahead() -> None:
        while len(waiting) < BATCHES_READ:
            waiting.append(next(keys))
        for batch in list(waiting)[len(reading) + bool(decoding) :]:
            reading.append([pool.submit(read_sample, dataset, config, seed, *key) for key in batch])

    try:
        while True:
            read_ahead()
            pipeline = pipeline or build_pipeline(config, len(waiting[0]), device)
            if not decoding:
                decode_next()
            try:
                (views,) = pipeline.share_outputs()
            except RuntimeError as error:  # names no file, or one of many
                leave_out_broken(dataset, decoding, error)
                pipeline, decoding = None, []
                reading.clear()  # read again, with a stand-in
                continue
            x_start = to_torch(views, (len(decoding), config.channels, *config.image_size), device)
            pipeline.release_outputs()
            waiting.popleft()
            indices, decoding = torch.tensor(decoding), []
            with contextlib.suppress(UserError):  # met again when this batch has been trained on
                decode_next()
            yield Batch(
                x_start=x_start,
                labels=None if labels is None else to_device(labels[indices], device),
                indices=to_device(indices, device),
            )
    finally:
        pool.shutdown(cancel_futures=True)


def to_torch(views: Any, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """A copy of DALI's batch, which it will overwrite: float32 [B, C, H, W]."""
    from nvidia.dali.plugin.pytorch import feed_ndarray

    x = torch.empty(shape, device=device)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    feed_ndarray(views.as_tensor(), x, cuda_stream=stream)
    return x


def read_sample(dataset: ImageDataset, config: DataConfig, seed: int, epoch: int, index: int) -> Sample:
    """Read a picture's file and draw its crop. Raises UserError naming a file that holds no picture."""
    used = index
    if index in dataset.broken:
        used, _ = dataset.read(index)
    try:
        encoded, (height, width) = read_encoded(dataset.pictures[used])
    except UserError:
        if not dataset.skip_broken:
            raise
        used, _ = dataset.read(index)  # by Pillow, which finds it broken as well
        encoded, (height, width) = read_encoded(dataset.pictures[used])
    (left, top, right, bottom), mirrored = draw_view(view_rng(seed, epoch, index), height, width, config)
    # The filter reaches beyond the crop, as Pillow's does: two pixels of the result to each side.
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
    """The bytes of an image file, and height and width of its picture, upright. Raises UserError if it is none."""
    try:
        encoded = Path(file).read_bytes() if isinstance(file, str) else file.read()
        if encoded[:2] == b"\xff\xd8" and b"Exif\0\0" not in encoded[:65536]:
            return encoded, simplejpeg.decode_jpeg_header(encoded)[:2]
        with Image.open(BytesIO(encoded)) as image:  # also what is no JPEG although it is called one
            width, height = image.size
            return encoded, (width, height) if image.getexif().get(ORIENTATION, 1) >= 5 else (height, width)
    except Exception as error:  # as in `decode`
        raise UserError(unreadable(file, error)) from error


def leave_out_broken(dataset: ImageDataset, indices: list[int], error: RuntimeError) -> None:
    """Find out by Pillow what of a batch DALI could not decode. Raises UserError unless `skip_broken` leaves it out."""
    found = False
    for index in set(indices):
        try:
            dataset.picture(index)
        except UserError:
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
