"""`umd inpaint`: choose pictures and hole, fill the hole with a trained network, write the results."""

import logging
import re
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from torch import Tensor

from umd import ops
from umd.classifier import Classifier
from umd.conditions import denoiser
from umd.config import Capture
from umd.diffmae import DiffMAE, fill
from umd.errors import UserError
from umd.files import check_apart, check_place, write_whole
from umd.images import grid, png_path, save_png
from umd.machine.device import autocast
from umd.masking import layout
from umd.methods import AnyModel
from umd.model import UMD
from umd.pixel_stats import unstandardize
from umd.sampler import inpaint, model_times
from umd.schedule import NoiseSchedule, schedule_of
from umd.train.console import say
from umd.train.crops import centered_box
from umd.train.data import center_view, centered_view_of_file, evenly, open_dataset
from umd.train.decoding import flatten
from umd.train.fingerprint import check_trained_on
from umd.train.opened import open_run, sampling_progress
from umd.train.options import Inpaint
from umd.train.preview import picture_maker, rgb
from umd.train.run import RunConfig

log = logging.getLogger("umd")

DEFAULT_IMAGES = 6
VIEWS = 6  # intermediate predictions shown per sample


def inpaint_run(run: Path, options: Inpaint, config: RunConfig, console: Console) -> None:
    """Fill holes in the pictures of --image, or in held-out ones, and write the results."""
    out = png_path(options.out or run / "inpainting.png")
    check_out(out, options, config.data.source, console)
    check_predicts_pixels(config)
    if options.mp4:
        check_mp4(config)
    x, hole = pictures_and_mask(config, options.image, options.mask, options.seed, options.mask_ratio)
    model, device, dtype = open_run(config)
    filled = fill_with(config, model, x.to(device), hole.to(device), options, dtype, console)
    write_fillings(filled, out, picture_maker(config.data, device), options.mp4)
    for line in (
        f"masked, {filled.samples.shape[1]} samples, original, a row an image: {out}",
        f"the samples on their way: {out.with_name(f'{out.stem}-steps.png')}; one by one: {out.with_suffix('')}",
    ):
        say(console, line)


class Fillings(NamedTuple):
    """B pictures, each filled n times."""

    original: Tensor  # [B, C, H, W]
    masked: Tensor  # [B, C, H, W], with 0 (grey) in the hole
    samples: Tensor  # [B, n, C, H, W]
    steps: Tensor  # [B, n, V, C, H, W], predictions of x_start during sampling, first to last call


def pictures_and_mask(
    config: RunConfig, images: tuple[Path, ...], mask: str, seed: int, mask_ratio: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Read pictures [B, C, H, W] (if none are given, held-out ones) and the hole [B, 1, H, W]: 0 keep, 1 remove."""
    if images:
        x = torch.cat([centered_view_of_file(path, config.data) for path in images])
    else:
        dataset = open_dataset(config.data, "test")
        if len(dataset) == 0:
            raise UserError(f"{dataset.name} has no held-out images to inpaint; name pictures with --image")
        if (config.out / "checkpoints").is_dir():
            check_trained_on(config.out, config, "name pictures with --image", log.warning)
        x = center_view(dataset, evenly(len(dataset), DEFAULT_IMAGES), config.data)
    tubelet_size = getattr(config.model, "tubelet_size", 1)
    return x, hole_mask(mask, x, config.model.patch_size, seed, mask_ratio, tubelet_size, images if x.ndim == 4 else ())


def check_predicts_pixels(config: RunConfig) -> None:
    if config.is_classifier:
        raise UserError(f"{config.out} is a classifier and cannot fill a hole; use the run that it started from")
    target = "normalised patches" if getattr(config.objective, "norm_pix", False) else "pixels"
    target = getattr(config.objective, "target", target)
    if target != "pixels":
        raise UserError(f"{config.out} predicts another target than pixels ({target}) and cannot fill a hole")


OWN = re.compile(r"\d+-(masked|original|sample-\d+)\.(png|gif|mp4)$")  # files that `write_fillings` writes


def check_out(out: Path, options: Inpaint, source: str, console: Console) -> None:
    """Check the output before sampling, and say so if earlier results will be replaced.

    Raises UserError if `write_fillings` would fail or overwrite an input.
    """
    folder, steps = out.with_suffix(""), out.with_name(f"{out.stem}-steps.png")
    check_apart(folder, source)
    others = [path.name for path in folder.iterdir() if not OWN.match(path.name)] if folder.is_dir() else []
    if others:
        raise UserError(f"{folder} is there and holds other files ({others[0]}); give another --out, or remove it")
    check_place(out, steps, folder / "1-masked.png")
    given = {path.resolve() for path in (*options.image, Path(options.mask))}
    if found := next((path for path in (out, steps) if path.resolve() in given), None):
        raise UserError(f"{found} is a picture that is given, and would be written over; give another --out")
    if out.exists():
        say(console, f"{out} is there, and will be replaced")


def check_mp4(config: RunConfig) -> None:
    """Raise UserError before sampling if `save_mp4` would fail."""
    if getattr(config.model, "num_frames", 1) == 1:
        raise UserError(f"{config.out} is a run on images, and an MP4 is a clip; leave out --mp4")
    pyav()


def hole_mask(
    mask: str, x: Tensor, patch_size: int, seed: int = 0, mask_ratio: float = 0.5, tubelet_size: int = 1,
    photos: Sequence[Path] = (),
) -> Tensor:  # fmt: skip
    """Make the hole [B, 1, H, W], for clips [B, 1, F, H, W]: 0 keep, 1 remove.

    mask: `center`, `left`, `random` (patches), `frames` (the middle half of a clip), or a PNG whose white part is the
        hole in every frame.
    photos: the files from which x was read, for `drawn_mask`.
    """
    B, _, *frames, H, W = x.shape
    hole = torch.zeros(B, 1, *frames, H, W)
    if mask == "center":
        hole[..., H // 4 : H - H // 4, W // 4 : W - W // 4] = 1
    elif mask == "left":
        hole[..., : W // 2] = 1
    elif mask == "random":
        shape = (*(F // tubelet_size for F in frames), H // patch_size, W // patch_size)
        hole = (torch.rand(B, 1, *shape, generator=torch.Generator().manual_seed(seed)) < mask_ratio).float()
        for axis, size in ((-1, patch_size), (-2, patch_size), *((2, tubelet_size) for _ in frames)):
            hole = hole.repeat_interleave(size, axis)
        if (share := hole.flatten(1).mean(1)).min() == 0 or share.max() == 1:
            what = "nothing" if share.min() == 0 else "everything"
            raise UserError(
                f"the random mask hides {what} of a picture; give a --mask-ratio nearer 0.5, or another seed"
            )
    elif mask == "frames":
        if not frames:
            raise UserError("the mask frames is for clips, and this run is on images: center, left, random, or a PNG")
        F = frames[0] // tubelet_size  # mask whole tubelets, so that some stay visible
        hole[:, :, F // 4 * tubelet_size : (F - F // 4) * tubelet_size] = 1
        if F // 4 == 0:
            raise UserError(f"the mask frames needs clips of at least 4 tubelets; this model's have {F}")
    else:
        try:
            with Image.open(mask) as image:
                drawn = ImageOps.exif_transpose(flatten(image) if image.mode.startswith("I") else image).convert("L")
        except (OSError, ValueError) as error:
            known = "center, left, random, " + ("frames, " if frames else "")
            raise UserError(f"mask {mask!r} cannot be read; expected {known}or a black and white PNG") from error
        hole[:] = torch.from_numpy(np.asarray(drawn_mask(mask, drawn, (H, W), photos)) > 127)
        if hole.min() == hole.max():
            raise UserError(
                f"mask {mask!r} hides {'everything' if hole.max() else 'nothing'}; white is filled, black is kept"
            )
    return hole


def drawn_mask(name: str, drawn: Image.Image, size: tuple[int, int], photos: Sequence[Path]) -> Image.Image:
    """A drawn mask at the model's size (H, W). A mask of the photos' size is cropped and resized as they are.

    Resizing takes the nearest pixel. Raises UserError if the mask has neither the model's size nor that of every photo.
    """
    H, W = size
    if drawn.size == (W, H):
        return drawn
    if not photos:
        raise UserError(f"mask {name!r} is {drawn.height}x{drawn.width}; this model's pictures are {H}x{W}")
    for photo in photos:
        with Image.open(photo) as image:
            width, height = ImageOps.exif_transpose(image).size
        if drawn.size != (width, height):
            raise UserError(
                f"mask {name!r} is {drawn.height}x{drawn.width}; give it the size of {photo}, {height}x{width}, or of "
                f"the model's pictures, {H}x{W}"
            )
    return drawn.resize((W, H), Image.Resampling.NEAREST, box=centered_box(drawn.height, drawn.width, W / H))


def fill_with(
    config: RunConfig, model: AnyModel, x: Tensor, hole: Tensor, options: Inpaint, dtype: torch.dtype, console: Console
) -> Fillings:
    """Fill pictures with a run's network: by sampling, or, if it was trained without noise (MAE), by one prediction."""
    if getattr(config.objective, "no_noise_prob", 0) == 1:
        assert isinstance(model, UMD)
        answer = reconstruct(model, x, hole, dtype)[:, None]  # [B, 1, C, H, W]
        return Fillings(x, torch.where(hole.bool(), torch.zeros_like(x), x), answer, answer[:, :, None])
    assert not isinstance(model, Classifier), "check_predicts_pixels asks for it"
    return fillings(
        model, schedule_of(config.schedule), x, hole, samples=options.samples, num_steps=options.steps,
        resample=options.resample, seed=options.seed, dtype=dtype, eta={"ddpm": 1.0, "ddim": 0.0}[options.sampler],
        clip=not config.data.vae_hash, capture=options.capture, console=console,
    )  # fmt: skip


def fillings(
    model: UMD | DiffMAE, schedule: NoiseSchedule, x: Tensor, hole: Tensor, *, samples: int, num_steps: int,
    resample: int, seed: int, dtype: torch.dtype, eta: float = 1.0, clip: bool = True, capture: Capture = "auto",
    console: Console | None = None,
) -> Fillings:  # fmt: skip
    """Fill each picture of x [B, C, H, W] `samples` times.

    A DiffMAE draws all samples at once and runs its encoder once. A UMD draws them one by one.
    """
    steps: list[Tensor] = []  # predictions of one sampling

    def watch(update: Callable) -> Callable:
        def callback(i: int, n: int, x_t: Tensor, x_start: Tensor) -> None:
            update(i, n, x_t, x_start)
            if i in np.linspace(0, n - 1, VIEWS).astype(int):
                steps.append(x_start.view(len(x), -1, *x.shape[1:]))  # [B, n, C, H, W]

        return callback

    if isinstance(model, DiffMAE):
        with sampling_progress(console, f"{samples} fillings") as update:
            out = fill(
                model, x, hole, schedule, fillings=samples, num_steps=num_steps, eta=eta, clip=clip, seed=seed,
                dtype=dtype, callback=watch(update), capture=capture,
            )  # fmt: skip
        views = torch.stack(steps, 2)  # [B, n, V, C, H, W]
    else:
        denoise = denoiser(model, dtype, model_times(num_steps, schedule.num_steps))
        drawn, seen = [], []
        for i in range(samples):
            with sampling_progress(console, f"filling {i + 1} of {samples}") as update, torch.no_grad():
                filled = inpaint(
                    denoise, x, hole, schedule, num_steps=num_steps, resample=resample, eta=eta,
                    clip=clip, seed=seed, first_sample=i * len(x), callback=watch(update), capture=capture,
                )  # fmt: skip
            drawn.append(filled)
            seen.append(torch.stack(steps, 2))
            steps.clear()
        out, views = torch.stack(drawn, 1), torch.cat(seen, 1)
    views = torch.where(hole[:, None, None].bool(), views, x[:, None, None])
    return Fillings(x, torch.where(hole.bool(), torch.zeros_like(x), x), out, views)


@torch.no_grad()
def reconstruct(model: UMD, x: Tensor, hole: Tensor, dtype: torch.dtype) -> Tensor:
    """Fill a hole [B, 1, H, W] with an MAE: one noise-free pass that masks every patch the hole touches.

    Returns [B, C, H, W]. Pixels outside the hole are unchanged, bit for bit.
    """
    config = model.config
    B, L, P = len(x), config.num_patches, config.patch_size
    mask = ops.patchify(hole, P).amax(-1) > 0  # [B, L], 1 remove
    if mask.all(1).any():
        raise UserError(f"the mask touches every {P}x{P} patch of a picture and leaves none to go by: hide less")
    keep, ids_keep = tuple((L - mask.sum(1)).tolist()), (~mask).flatten().nonzero()[:, 0]
    visible = ops.patchify(x, P).flatten(0, 1).index_select(0, ids_keep)  # [sum K, C·P·P]
    with autocast(x.device, dtype):
        clean = torch.zeros(1, dtype=torch.int64, device=x.device)  # t = 0 for all pictures
        prediction = model(visible, ids_keep, layout(config, keep, (0,) * B, x.device), clean)
    x_start, *_ = model.to_images(prediction.to(x.dtype))
    if config.pixel_stats == "imagenet":
        x_start = ops.unpatchify(unstandardize(ops.patchify(x_start, P)), config.image_size, P)
    return torch.where(hole.bool(), x_start, x)


def write_fillings(filled: Fillings, out: Path, show: Callable[[Tensor], np.ndarray] = rgb, mp4: bool = False) -> None:
    """Write the results next to `out`, NAME.png:

    - NAME.png: one row per picture (masked input, samples, original).
    - NAME-steps.png: one row per sample with its intermediate predictions.
    - NAME/: single files in their own size, 1-masked.png, 1-sample-1.png, 1-original.png and so on.

    For clips, each entry of NAME.png is a row of frames, NAME-steps.png shows the middle frame, and the files in NAME/
    are GIFs, with `mp4` also MP4s.
    """
    clips = filled.original.ndim == 5

    def frames(x: Tensor) -> np.ndarray:  # [B, C, F, H, W] or [B, C, H, W] to uint8 [B, F, H, W, 3], F = 1 for images
        x = x if clips else x[:, :, None]
        shown = show(x.transpose(1, 2).flatten(0, 1))  # larger than x if a VAE decodes it
        return shown.reshape(len(x), x.shape[2], *shown.shape[1:])

    B, n = filled.samples.shape[:2]
    columns = {"masked": frames(filled.masked)}  # name → [B, F, H, W, 3]
    columns |= {f"sample-{i}": frames(sample) for i, sample in enumerate(filled.samples.unbind(1), 1)}
    columns |= {"original": frames(filled.original)}
    F, scale = columns["masked"].shape[1], max(1, 128 // columns["masked"].shape[2])
    sheet = np.concatenate([column[b] for b in range(B) for column in columns.values()])  # [B·(n + 2)·F, H, W, 3]
    save_png(grid(sheet, columns=F if clips else n + 2), out, scale)

    steps = [[frames(view) for view in sample.unbind(1)] for sample in filled.steps.unbind(1)]  # n x V x [B, F, …]
    ways = [
        view[b, F // 2]
        for b in range(B)
        for sample in steps
        for view in (columns["masked"], *sample, columns["original"])
    ]
    save_png(grid(np.stack(ways), columns=len(steps[0]) + 2), out.with_name(f"{out.stem}-steps.png"), scale)
    for name, column in columns.items():
        for b in range(B):
            file = out.with_suffix("") / f"{b + 1}-{name}"
            if clips:
                save_gif(column[b], file.with_suffix(".gif"))
                if mp4:
                    save_mp4(column[b], file.with_suffix(".mp4"))
            else:
                save_png(column[b, 0], file.with_suffix(".png"))


def save_gif(frames: np.ndarray, path: Path, seconds_a_frame: float = 0.1) -> None:
    """Write uint8 [F, H, W, 3] as a GIF that loops forever."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (first, *rest), encoded = [Image.fromarray(frame) for frame in frames], BytesIO()
    first.save(encoded, "GIF", save_all=True, append_images=rest, duration=int(1000 * seconds_a_frame), loop=0)
    write_whole(path, encoded.getvalue())


def save_mp4(frames: np.ndarray, path: Path) -> None:
    """Write uint8 [F, H, W, 3] as an H.264 MP4 of 10 frames a second.

    An odd side repeats its last row or column, as players want even sides.

    Raises UserError without PyAV or its H.264 encoder.
    """
    av = pyav()
    _, H, W, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)), mode="edge")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "12"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def pyav() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise UserError("writing MP4 needs PyAV: pip install av, or leave out --mp4 and take the GIF") from error
    if "libx264" not in av.codecs_available:
        raise UserError("this PyAV has no H.264 encoder (libx264): pip install av, or leave out --mp4")
    return av
