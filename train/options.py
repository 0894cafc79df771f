"""The options of each command. Imports no torch: help and a mistyped option are answered at once."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from umd.config import Capture, GuidanceSchedule, SamplerName
from umd.errors import UserError
from umd.ranges import (
    Count,
    CountOrZero,
    InnerShare,
    NonNegative,
    Positive,
    Processes,
    Scale,
    Seed,
    Share,
    check_ranges,
    number,
)
from umd.train.recipes import AREA_MIN
from umd.train.run import RunConfig
from umd.train.settings import DataConfig

IMAGENET = 1_281_167
Kind = Literal["timm", "transformers", "diffusers", "hub", "small-vision"]


@dataclass(frozen=True)
class Demo:
    """Pretrain, probe, fine-tune with labels, sample and inpaint beside MAE and DiffMAE, on real images, within a time
    budget."""

    minutes: Positive = 15.0
    """Time budget of the whole."""
    out: Path = Path("runs/demo")
    """Folder of the runs and of report.html; an earlier demo there is replaced."""
    data: DataConfig = DataConfig()
    """Default: colour emoji from a pip package."""
    size: Count = 32
    """Side of the images."""
    seed: Seed = 0
    """Of everything."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class CheckData:
    """Read every image of a source once; list those that no reader shall use, with the reason. Exits with 0 if all
    are usable, with 1 if some are listed (runs then leave these out), and with 2 if there is nothing to read."""

    min_side: Count = 16
    """Fewest pixels that the shorter side of a picture must have."""
    workers: Processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    """Processes that read."""
    out: Path | None = None
    """Where the list goes; default: quarantine.json in the source, where runs find it by themselves."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Cluster:
    """Where and how the run of a preset would go."""

    gpu: Literal["a100-40", "a100-80", "h100", "h200", "l40s"] = "a100-80"
    """Type of the GPUs."""
    gpus: Count = 8
    """How many, of all nodes."""
    gpus_per_node: Count = 8
    """How many in one node."""
    network: Positive = 200
    """Gbit/s of the network for each GPU, between nodes."""
    images: Annotated[int, number(int, 1, 10**12)] = IMAGENET
    """Pictures in the training set; default: ImageNet."""
    disk: NonNegative = 1.0
    """GB/s at which one process hashes, writes and flushes a checkpoint; 0: measured in the run's folder, with a file
    as large as a checkpoint."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Planned:
    """What a run would need: memory, time and communication, counted and by roofline, without the GPUs."""

    cluster: Annotated[Cluster, arg(name="")] = field(default_factory=Cluster)
    run: Annotated[RunConfig, arg(name="")] = field(default_factory=RunConfig)


@dataclass(frozen=True)
class EncodeLatents:
    """Encode pictures once, for every epoch of runs on latents. The same command goes on after a stop; under torchrun
    each rank takes its share."""

    data: DataConfig = field(default_factory=DataConfig)
    recipe: Literal["pretrain", "finetune"] | None = None
    """Crops of one of the paper's recipes, in the place of --data.area-min: pretrain covers 0.8 of a picture or more,
    finetune 0.95. A run refuses latents of other crops than its own."""
    out: Path = Path("latents/train")
    """Folder to write."""
    image_size: tuple[Count, Count] = (256, 256)
    """Height and width at which pictures are encoded."""
    views: Count = 4
    """Views stored of each training picture; epoch e learns from view e modulo this."""
    crop: Literal["random", "center"] = "random"
    """random: view v is what a run on pixels with this seed would see in epoch v. center: the middle, and its mirror
    image as the second view. Held-out pictures have one view, their middle."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """Type of the stored means and standard deviations."""
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    """Autocast type of the encoder."""
    shard_images: Count = 4096
    """Pictures a shard."""
    seed: Seed = 0
    """Of crops and flips."""
    device: str = "auto"
    """auto (under torchrun each rank takes its GPU), cpu, cuda or cuda:N."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.recipe:
            area = AREA_MIN[self.recipe]
            if self.data.area_min not in (DataConfig.area_min, area) or self.data.area_max != 1:
                areas = f"{self.data.area_min:g} to {self.data.area_max:g}"
                raise UserError(f"--recipe {self.recipe} has crops of {area:g} to 1 of the area, not {areas}; give one")
            object.__setattr__(self, "data", replace(self.data, area_min=area))
        most = 1 + self.data.hflip
        if self.crop == "center" and self.views > most:
            raise UserError(f"of the middle there are {most} views at most, got {self.views}; set --views {most}")


@dataclass(frozen=True)
class EncodePixels:
    """Store pictures small, once, for every epoch of runs at 64x64 and its like. The same command goes on after a stop;
    under torchrun each rank makes its share."""

    source: Annotated[str, arg(name="data.source")] = "emoji"
    """A folder of images, .tar files, or what else pretrain reads."""
    out: Path = Path("pixels/train")
    """Folder to write."""
    size: tuple[Count, Count] = (96, 96)
    """Height and width that each picture is squeezed to: 1.5 times what the model sees, so that the narrowest crop (2/3
    of a side, of four fifths of the area) has as many pixels as the model."""
    shard_images: Count = 4096
    """Pictures a shard."""
    holdout: Annotated[Share, arg(name="data.holdout")] = 0.2
    """Share kept for the test split where the source has no split of its own."""
    skip_broken: Annotated[bool, arg(name="data.skip-broken")] = False
    """Leave unreadable images out, with a count, instead of stopping."""
    quarantine: Annotated[str, arg(name="data.quarantine")] = ""
    """List of files to leave out, as umd check-data writes it; default: quarantine.json in the source."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Inspect:
    """Print what a folder of latents or of stored pictures holds, compare it with its checksums, and draw a few."""

    decode: CountOrZero = 16
    """Latents decoded, spread over the split; 0: none, and no VAE is needed."""
    split: Literal["train", "test"] = "train"
    """Which are decoded."""
    check: bool = True
    """Read every shard and compare it with its checksum."""
    vae: str = ""
    """The VAE, where it no longer lies where it lay."""
    device: str = "auto"
    """Where to decode."""
    out: Path | None = None
    """Where the PNG goes; default: FOLDER/decoded.png."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Sampling:
    """How images are drawn."""

    sampler: SamplerName = "ddim"
    """ddim, ddpm, or a solver of diffusers, for few steps and without noise: dpm++, heun (two calls a step), unipc."""
    steps: Count | None = None
    """Steps; default of ddim and ddpm the paper's, 125 for pixels and 250 for latents; of the others 25."""
    eta: Share = 1.0
    """Noise of DDIM: 1 as in the paper, 0 deterministic."""
    predict: Literal["auto", "eps", "x_start", "both"] = "auto"
    """Which of the network's predictions leads: the noise, the image, or both, weighted at each time as held-out
    pictures tell; auto: both where that was measured when the run ended, else eps."""
    cfg_interval: tuple[Count, Count] | None = None
    """Guidance at these model times alone, from and to (1: least noise, 1000: most); default: at all."""
    cfg_schedule: GuidanceSchedule = "constant"
    """Guidance over time: constant, or growing towards the picture (linear, cosine) with the same mean."""
    cfg_channels: CountOrZero = 0
    """Guide only so many channels, the first ones; 0: all. DiT's code guides 3 of its latents' 4."""
    capture: Capture = "auto"
    """Replay a denoising step as one CUDA graph; auto: on a GPU, of more than a few steps."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Sample(Sampling):
    """Draw samples from a run: a PNG grid, an .npz as ADM's evaluator reads it (arr_0: uint8 images [N, H, W, C],
    arr_1: labels [N]; classes: the name of each label) and a .json of all settings. The same command goes on after a
    stop; under torchrun each rank draws its share."""

    classes: tuple[str, ...] = ()
    """Which classes, by name or number; default: all. A run without labels is sampled unconditionally."""
    per_class: Count = 8
    """Samples of each class (of all, without labels)."""
    count: CountOrZero = 0
    """Samples in all instead, each of a class drawn at random."""
    balanced: bool = False
    """With count: as many of each class, in turn."""
    cfg_scale: Scale = 4.0
    """Guidance; 1: none. The paper uses 1.5 for scores, 4.0 for pictures."""
    seed: Seed = 0
    """Sample i of a seed is the same picture, byte for byte, on any number of ranks and at any batch."""
    batch: Count = 64
    """Images of one denoising loop, rounded up to groups of 32, which the network always sees together; up to 64."""
    ema: bool = True
    """Averaged weights, where the run has them."""
    vae: str = ""
    """Of a run on latents, its VAE where it no longer lies where it lay: hub id or folder."""
    out: Path | None = None
    """Where the PNG goes, .npz and .json beside it; default: RUN/samples.png."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balanced and not self.count:
            raise UserError("balanced goes with --count N; without it there are as many of each class anyway")


@dataclass(frozen=True)
class Inpaint:
    """Fill a hole in images with a run: PNG grids of masked input, samples and original, and single files."""

    image: tuple[Path, ...] = ()
    """Picture files; default: held-out images of the run's data."""
    mask: str = "center"
    """center, left, random (patches), frames (the middle half of a clip), or a PNG: white is filled, black is kept. It
    has the size of the pictures and is cut and resized with them, or that of the model."""
    mask_ratio: InnerShare = 0.5
    """Share of patches that the random mask hides, about."""
    samples: Count = 3
    """Samples an image; an MAE has one answer."""
    steps: Count = 50
    """Denoising steps."""
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """ddpm: fresh noise at each step; ddim: none but the first."""
    resample: Count = 2
    """Times a UMD repeats each step to harmonise hole and surroundings (RePaint); a DiffMAE has no need to."""
    seed: Seed = 0
    """Of noise and random masks."""
    capture: Capture = "auto"
    """Replay a denoising step as one CUDA graph; auto: on a GPU, of more than a few steps."""
    out: Path | None = None
    """Where the PNG goes; default: RUN/inpainting.png. Beside it NAME-steps.png, and the folder NAME of files."""
    mp4: bool = False
    """Write clips as MP4 too, beside the GIF; needs PyAV (pip install av)."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Probe:
    """Few-shot probe on the held-out split, beside raw pixels and an untrained network. The same command goes on after
    a stop; under torchrun each rank reads its share of the pictures."""

    shots: Count = 100
    """Labelled training images a class."""
    pool: CountOrZero = 100_000
    """Shots are drawn from so many training images, a random part, as published; a class gives what the part has of it.
    0: from all."""
    allow_fewer: bool = False
    """Let a class with fewer images give all it has."""
    l2: tuple[Positive, ...] = (1024.0,)
    """Ridge penalty; of several, one is chosen on a part of the shots."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Draws of the shots."""
    linear: bool = False
    """Also MAE's linear probe and nearest neighbours, on every training picture."""
    image_size: tuple[Count, Count] | None = None
    """Height and width at which the pictures are read, and the network's positions interpolated; None: the run's."""
    layers: bool = False
    """Instead: of every block, at the model times below, as a table and a curve."""
    times: tuple[CountOrZero, ...] = (0, 1, 10, 25, 50, 100, 200, 400, 700)
    """Model times of --layers; 0: noise-free."""
    ema: bool = False
    """Averaged weights, where the run has them."""
    source: str = ""
    """Pictures to probe on, as in --data.source; default: those that the run was trained on."""
    out: Path | None = None
    """Folder of what is written, e.g. of a run that is only to be read; default: RUN."""

    def __post_init__(self) -> None:
        check_ranges(self, "l2", "seeds", "times")


@dataclass(frozen=True)
class Evaluate(Sampling):
    """Score a run: samples against real pictures (Fréchet and kernel distances, Inception Score, precision, recall) and
    the representation (few-shot and linear probe, nearest neighbours). Writes scores.json and scores.md into the run;
    the defaults are the paper's, but for --predict. The same command goes on after a stop; under torchrun each rank
    does its share."""

    count: Count = 50_000
    """Samples."""
    cfg_scale: tuple[Scale, ...] = (1.0, 1.5)
    """Guidance, scored one by one; 1: none. Of a run without labels only 1."""
    seed: Seed = 0
    """Of the samples."""
    balanced: bool = False
    """As many samples of each class, in turn, instead of classes drawn at random."""
    ema: bool = True
    """Averaged weights for the samples, where the run has them; the representation is read without."""
    batch: Count = 64
    """Images of one denoising loop; no score depends on it."""
    vae: str = ""
    """Of a run on latents, its VAE where it no longer lies where it lay: hub id or folder."""
    features: Literal["auto", "inception", "dinov2", "efficientnet"] = "auto"
    """Feature network of the distances, which are named after it: FID only with InceptionV3. auto: InceptionV3 where
    its weights are, else EfficientNet-Lite0."""
    weights: Path | None = None
    """InceptionV3's weights (a file) or DINOv2's (a folder as transformers saves it)."""
    reference: Path | None = None
    """Statistics to measure against: an .npz of this command or of ADM's evaluator; default: made of the real pictures,
    once, and kept in the run as reference-NAME.npz."""
    split: Literal["test", "train"] = "test"
    """Which of the run's pictures are the real ones; test: the held-out."""
    source: str = ""
    """Pictures in the place of the run's, as in --data.source; default: those that it was trained on."""
    pictures: str = ""
    """Of a run on latents, the source of its real pictures; default: its stored latents, as the VAE decodes them."""
    few: bool = False
    """Take distances of fewer pictures than there are features too: they compare at equal counts only."""
    generation: bool = True
    """Score samples."""
    recognition: bool = True
    """Score the representation."""
    shots: Count = 100
    """Labelled training images a class of the few-shot probe."""
    allow_fewer: bool = False
    """Let a class with fewer images give all it has."""
    linear: bool = True
    """Also the linear probe and nearest neighbours, which read every training picture."""
    errors: CountOrZero = 512
    """Held-out pictures of the error curves by model time; 0: no curves."""
    out: Path | None = None
    """Folder of what is written, e.g. of a run that is only to be read; default: RUN."""

    def __post_init__(self) -> None:
        check_ranges(self, "cfg_scale")


@dataclass(frozen=True)
class Embed:
    """Write the representation of pictures: features.npz (features fp32 [N, D], names, labels, classes) and
    features.parquet (a row a picture). The same command goes on after a stop; under torchrun each rank reads its
    share."""

    out: Path | None = None
    """The files without their suffix; default: RUN/features-SOURCE."""
    image_size: tuple[Count, Count] | None = None
    """Height and width at which the pictures are read, and the network's positions interpolated; None: the run's."""
    ema: bool = True
    """Averaged weights, where the run has them."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Transfer:
    """Few-shot probe of a run's representation on other sets of pictures: each subfolder of FOLDER is one, with a
    folder a class, in train/ and test/ or not. The same command goes on after a stop; under torchrun each rank reads
    its share of the pictures."""

    shots: Count = 10
    """Labelled training images a class."""
    allow_fewer: bool = False
    """Let a class with fewer images give all it has."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Draws of the shots."""
    ema: bool = False
    """Averaged weights, where the run has them."""
    out: Path | None = None
    """Folder of what is written, e.g. of a run that is only to be read; default: RUN."""

    def __post_init__(self) -> None:
        check_ranges(self, "seeds")


@dataclass(frozen=True)
class Import:
    """Import published weights as a run of ours."""

    kind: Annotated[Literal["dit", "mae", "maskdit", "small-vision"], Positional]
    """dit: facebookresearch/DiT's .pt, or a folder of diffusers; mae: facebookresearch/mae's .pth, pre-trained or
    fine-tuned, or a folder of transformers; maskdit: Anima-Lab/MaskDiT's .pt; small-vision: the UMD authors' JAX code,
    its checkpoint folder or .npz."""
    path: Annotated[Path, Positional]
    """The file or folder."""
    out: Path = Path("runs/imported")
    """Folder of the new run."""
    source: str = ""
    """Pictures that the run is probed and evaluated with: a folder, or what else `--data.source` takes."""
    num_heads: CountOrZero = 0
    """Attention heads, which weights do not tell; 0: those of the published network of this width."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Export:
    """Write a run's network for another tool."""

    kind: Annotated[Kind, Positional]
    """timm: the encoder as a ViT; transformers: the same as ViTModel, or an MAE as ViTMAE; diffusers: the generator as
    a pipeline; hub: the whole network, for from_pretrained; small-vision: the UMD authors' .npz."""
    run: Annotated[Path, Positional]
    """The run."""
    out: Path | None = None
    """Folder to write, new or empty; default: RUN/KIND."""
    image_size: tuple[Count, Count] | None = None
    """Height and width of the exported network, its positions interpolated; None: the run's."""
    ema: bool = True
    """Averaged weights, where the run has them."""
    push: str = ""
    """Also upload the folder as this repository (USER/NAME) of the Hugging Face hub; log in with `hf auth login`."""

    def __post_init__(self) -> None:
        check_ranges(self)
