"""The options of each command, one dataclass each.

Imports no torch, so that `--help` and a mistyped option are answered at once.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from umd.config import Capture, GuidanceSchedule, SamplerName
from umd.errors import UserError
from umd.machine.environment import own_cores
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
    """Pretrain UMD, MAE and DiffMAE on real images within a time budget; probe, fine-tune, sample and inpaint."""

    minutes: Positive = 15.0
    """Time budget of the whole demo, in minutes."""
    out: Path = Path("runs/demo")
    """Folder of the runs and of report.html. An earlier demo in it is replaced."""
    data: DataConfig = DataConfig()
    """Training images. Default: colour emoji from a pip package."""
    size: Count = 32
    """Height and width of the images, in pixels."""
    seed: Seed = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class CheckData:
    """Read every image of a source once and list the unusable ones with the reason. Later runs leave them out. Exit
    code 0: all images are usable. 1: some are listed. 2: there is nothing to read."""

    min_side: Count = 16
    """Smallest allowed length of a picture's shorter side, in pixels."""
    workers: Processes = own_cores()
    """Number of reader processes. Default: one per core."""
    out: Path | None = None
    """File for the list. Default: quarantine.json in the source, where every run finds it."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Cluster:
    """The cluster that a run is planned for."""

    gpu: Literal["a100-40", "a100-80", "h100", "h200", "l40s"] = "a100-80"
    """GPU model."""
    gpus: Count = 8
    """Number of GPUs in all nodes together."""
    gpus_per_node: Count = 8
    """Number of GPUs in one node."""
    network: Positive = 200
    """Network bandwidth per GPU between nodes, in Gbit/s."""
    images: Annotated[int, number(int, 1, 10**12)] = IMAGENET
    """Pictures in the training set. Default: ImageNet-1k."""
    disk: NonNegative = 1.0
    """Rate at which one process hashes, writes and flushes a checkpoint, in GB/s.
    0: measure it in the run's folder with a file as large as a checkpoint."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Planned:
    """Estimate a run's memory, time and communication from counts and a roofline model. Needs no GPU."""

    cluster: Annotated[Cluster, arg(name="")] = field(default_factory=Cluster)
    run: Annotated[RunConfig, arg(name="")] = field(default_factory=RunConfig)


@dataclass(frozen=True)
class EncodeLatents:
    """Encode pictures to latents once, for all epochs. To resume, repeat. Under torchrun the ranks share the work."""

    data: DataConfig = field(default_factory=DataConfig)
    recipe: Literal["pretrain", "finetune"] | None = None
    """Take the crop area from a recipe of the paper: at least 0.8 of a picture (pretrain) or 0.95 (finetune).
    It replaces --data.area-min. A run refuses latents whose crops differ from its own setting."""
    out: Path = Path("latents/train")
    """Folder to write."""
    image_size: tuple[Count, Count] = (256, 256)
    """Height and width at which pictures are encoded, in pixels."""
    views: Count = 4
    """Crops (views) stored for each training picture. Epoch e trains on view e modulo this number."""
    crop: Literal["random", "center"] = "random"
    """random: view v is the crop that a run on pixels with this seed sees in epoch v.
    center: the center crop; the second view is its mirror image. Held-out pictures have only their center crop."""
    dtype: Literal["fp16", "bf16", "fp32"] = "fp16"
    """dtype of the stored means and standard deviations."""
    precision: Literal["auto", "bf16", "fp32"] = "fp32"
    """Autocast dtype of the encoder. auto: bf16 where the device multiplies it, else fp32."""
    shard_images: Count = 4096
    """Pictures per shard."""
    seed: Seed = 0
    """Seed of crops and flips."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto under torchrun: each rank takes its own GPU."""

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
    """Decode and shrink pictures once, for all epochs. To resume, repeat. Under torchrun the ranks share the work."""

    source: Annotated[str, arg(name="data.source")] = "emoji"
    """A folder of images, .tar files, or any other source that pretrain reads."""
    out: Path = Path("pixels/train")
    """Folder to write."""
    size: tuple[Count, Count] = (96, 96)
    """Height and width to which each picture is squeezed. Take 1.5 times the model's image size:
    a crop has at least 2/3 of each side of a picture up to 2:1, and then as many pixels as the model sees."""
    shard_images: Count = 4096
    """Pictures per shard."""
    holdout: Annotated[Share, arg(name="data.holdout")] = 0.2
    """Fraction of the pictures held out as the test split, if the source has no test split."""
    skip_broken: Annotated[bool, arg(name="data.skip-broken")] = False
    """Leave unreadable images out and report their number. Off: stop at the first."""
    quarantine: Annotated[str, arg(name="data.quarantine")] = ""
    """List of files to leave out, written by umd check-data. Default: quarantine.json in the source."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Inspect:
    """Print what a folder of latents or stored pictures holds, verify its checksums, and draw a few of them."""

    decode: CountOrZero = 16
    """Number of latents to decode, or of stored pictures to draw, spread over the split. 0: none, without a VAE."""
    split: Literal["train", "test"] = "train"
    """Split to take them from."""
    check: bool = True
    """Read every shard and compare it with its checksum."""
    vae: str = ""
    """Hub id or folder of the VAE. Needed only if it has moved since the latents were encoded."""
    device: str = "auto"
    """Device that decodes: auto, cpu, cuda or cuda:N."""
    out: Path | None = None
    """PNG file to write. Default: FOLDER/decoded.png; for stored pictures FOLDER/pictures.png."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Sampling:
    """The checkpoint, the sampler and its guidance."""

    step: CountOrZero | None = None
    """Step of the checkpoint to use, one of those in RUN/checkpoints. Default: the newest."""
    vae: str = ""
    """For a run on latents: hub id or folder of its VAE. Needed only if the VAE has moved."""
    seed: Seed = 0
    """Seed. Sample i of a seed has the same bytes on any number of ranks and with any --batch."""
    batch: Count = 64
    """Images per denoising loop: at most 64, rounded up to a multiple of 32. The network sees 32 a call, or all."""
    sampler: SamplerName = "ddim"
    """ddim, ddpm, or a solver of diffusers for few deterministic steps: dpm++, heun (2 network calls a step), unipc."""
    steps: Count | None = None
    """Denoising steps. Default: 125 for pixels and 250 for latents (paper; ddim and ddpm), 25 for other samplers."""
    eta: Share = 1.0
    """Noise of ddim: 1 as in the paper, 0 deterministic."""
    predict: Literal["auto", "eps", "x_start", "both"] = "auto"
    """Network output that leads: eps (noise), x_start (image), or both, weighted per timestep.
    The weights of both are measured on held-out pictures. auto: both if the run's end has measured them, else eps."""
    cfg_interval: tuple[Count, Count] | None = None
    """First and last timestep with guidance (1: least noise, 1000: most). Default: all timesteps."""
    cfg_schedule: GuidanceSchedule = "constant"
    """Guidance over time: constant, or growing towards the final image (linear, cosine) with the same mean."""
    cfg_channels: CountOrZero = 0
    """Guide only the first N channels. 0: all. DiT's code guides 3 of its 4 latent channels."""
    capture: Capture = "auto"
    """Replay a denoising step as one CUDA graph. auto: on a GPU, for more than a few steps."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Sample(Sampling):
    """Draw samples from a run. Writes a PNG grid, an .npz for ADM's evaluator (arr_0: uint8 images [N, H, W, C],
    arr_1: labels [N], classes: label names) and a .json of all settings. To resume, repeat the command. Under torchrun
    the ranks share the work."""

    classes: tuple[str, ...] = ()
    """Classes to draw, by name or number. Default: all. A run without labels is sampled unconditionally."""
    per_class: Count = 8
    """Samples per class. For a run without labels: samples in all."""
    count: CountOrZero = 0
    """Samples in all, of random classes, instead of --per-class. 0: use --per-class."""
    balanced: bool = False
    """With --count: take the classes in turn, so that each gets the same number."""
    cfg_scale: Scale = 4.0
    """Guidance scale. 1: no guidance. The paper uses 1.5 for scores and 4.0 for pictures."""
    ema: bool = True
    """Use the EMA weights if the run has them."""
    out: Path | None = None
    """PNG file to write; the .npz and .json go beside it. Default: RUN/samples.png."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.balanced and not self.count:
            raise UserError("balanced goes with --count N; without it there are as many of each class anyway")


@dataclass(frozen=True)
class Inpaint:
    """Fill a hole in images with a run. Writes PNG grids (masked input, samples, original) and single files."""

    image: tuple[Path, ...] = ()
    """Picture files. Default: held-out images of the run's data."""
    mask: str = "center"
    """Region to fill: center, left, random (patches), frames (the middle half of a clip), or a PNG file.
    PNG: white is filled, black kept; either of the pictures' size (cropped and resized with them) or of the model's."""
    mask_ratio: InnerShare = 0.5
    """Probability with which the random mask hides each patch."""
    samples: Count = 3
    """Samples per image. An MAE always gives one."""
    steps: Count = 50
    """Denoising steps."""
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """ddpm: add fresh noise at each step. ddim: use only the initial noise."""
    resample: Count = 2
    """Repeats of each denoising step, which blend hole and surroundings (RePaint). UMD only; DiffMAE needs none."""
    seed: Seed = 0
    """Seed of noise and random masks."""
    capture: Capture = "auto"
    """Replay a denoising step as one CUDA graph. auto: on a GPU, for more than a few steps."""
    out: Path | None = None
    """PNG file to write. Default: RUN/inpainting.png. NAME-steps.png and a folder NAME of single files go beside it."""
    mp4: bool = False
    """For clips: also write MP4 beside the GIF. Needs PyAV (pip install av)."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Probe:
    """Few-shot probe of the representation on the held-out split, compared with raw pixels and an untrained network.
    To resume, repeat the command. Under torchrun the ranks share the pictures."""

    shots: Count = 100
    """Labelled training images per class."""
    pool: CountOrZero = 100_000
    """Draw the shots from a random subset of this many training images, as published. Classes may get fewer shots.
    0: draw from all training images."""
    allow_fewer: bool = False
    """Accept a class with fewer images than --shots; it gives all it has. Off: stop with an error."""
    l2: tuple[Positive, ...] = (1024.0,)
    """Ridge penalty. Of several values, one is chosen on a part of the shots."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds of the random draw of shots; one probe per seed."""
    linear: bool = False
    """Also run MAE's linear probe and nearest neighbours, on all training pictures."""
    image_size: tuple[Count, Count] | None = None
    """Height and width at which pictures are read; position embeddings are interpolated. None: the run's image size."""
    layers: bool = False
    """Probe every block at the timesteps of --times instead, and write a table and a curve."""
    times: tuple[CountOrZero, ...] = (0, 1, 10, 25, 50, 100, 200, 400, 700)
    """Timesteps for --layers. 0: noise-free."""
    step: CountOrZero | None = None
    """Step of the checkpoint to probe, one of those in RUN/checkpoints. Default: the newest."""
    ema: bool = False
    """Use the EMA weights if the run has them."""
    source: str = ""
    """Pictures to probe on, as in --data.source. Default: the run's training source."""
    out: Path | None = None
    """Folder to write to, e.g. if the run's folder is read-only. Default: RUN."""

    def __post_init__(self) -> None:
        check_ranges(self, "l2", "seeds", "times")


@dataclass(frozen=True)
class Evaluate(Sampling):
    """Score a run's samples (Fréchet and kernel distances, Inception Score, precision, recall) and its
    representation (few-shot and linear probe, nearest neighbours). Writes scores.json and scores.md into the run.
    Defaults are the paper's, except --predict. To resume, repeat the command. Under torchrun ranks share the work."""

    count: Count = 50_000
    """Number of samples."""
    cfg_scale: tuple[Scale, ...] = (1.0, 1.5)
    """Guidance scales, each scored separately. 1: no guidance. A run without labels takes only 1."""
    balanced: bool = False
    """Take the classes in turn, so that each gets the same number of samples. Off: draw classes at random."""
    ema: bool = True
    """Sample with the EMA weights if the run has them. The representation is always read without EMA."""
    features: Literal["auto", "inception", "dinov2", "efficientnet"] = "auto"
    """Feature network of the distances. Each distance is named after it; only InceptionV3 gives FID.
    auto: InceptionV3 if its weights are found, else EfficientNet-Lite0."""
    weights: Path | None = None
    """Weights of InceptionV3 (a file) or DINOv2 (a folder saved by transformers)."""
    reference: Path | None = None
    """Reference statistics: an .npz from this command or from ADM's evaluator.
    Default: computed once from the real pictures and kept in the run as reference-NAME.npz."""
    split: Literal["test", "train"] = "test"
    """Split of the run's data that gives the real pictures. test: held-out pictures."""
    source: str = ""
    """Pictures to use instead of the run's, as in --data.source. Default: the run's training source."""
    pictures: str = ""
    """For a run on a store: source of the real pictures. Default: the store; its latents are decoded by the VAE."""
    few: bool = False
    """Allow distances of fewer pictures than the network has features. Compare them only at equal counts."""
    generation: bool = True
    """Score samples."""
    recognition: bool = True
    """Score the representation."""
    shots: Count = 100
    """Labelled training images per class for the few-shot probe."""
    allow_fewer: bool = False
    """Accept a class with fewer images than --shots; it gives all it has. Off: stop with an error."""
    linear: bool = True
    """Also run the linear probe and nearest neighbours, which read all training pictures."""
    errors: CountOrZero = 512
    """Held-out pictures for the curves of error against timestep. 0: no curves."""
    out: Path | None = None
    """Folder to write to, e.g. if the run's folder is read-only. Default: RUN."""

    def __post_init__(self) -> None:
        check_ranges(self, "cfg_scale")


@dataclass(frozen=True)
class Embed:
    """Write the representation of pictures: features.npz (features fp32 [N, D], names, labels, classes) and
    features.parquet (one row per picture). To resume, repeat the command. Under torchrun the ranks share the
    pictures."""

    out: Path | None = None
    """Path of both files, without suffix. Default: RUN/features-SOURCE."""
    image_size: tuple[Count, Count] | None = None
    """Height and width at which pictures are read; position embeddings are interpolated. None: the run's image size."""
    ema: bool = True
    """Use the EMA weights if the run has them."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Transfer:
    """Few-shot probe of a run's representation on other datasets. Each subfolder of FOLDER is one dataset with one
    folder per class, optionally inside train/ and test/. To resume, repeat the command. Under torchrun the ranks share
    the pictures."""

    shots: Count = 10
    """Labelled training images per class."""
    allow_fewer: bool = False
    """Accept a class with fewer images than --shots; it gives all it has. Off: stop with an error."""
    seeds: tuple[Seed, ...] = (0, 1, 2)
    """Seeds of the random draw of shots; one probe per seed."""
    ema: bool = False
    """Use the EMA weights if the run has them."""
    out: Path | None = None
    """Folder to write to, e.g. if the run's folder is read-only. Default: RUN."""

    def __post_init__(self) -> None:
        check_ranges(self, "seeds")


@dataclass(frozen=True)
class Import:
    """Import published weights as a run."""

    kind: Annotated[Literal["dit", "mae", "maskdit", "small-vision"], Positional]
    """dit: .pt file of facebookresearch/DiT, or a diffusers folder.
    mae: .pth file of facebookresearch/mae (pre-trained or fine-tuned), or a transformers folder.
    maskdit: .pt file of Anima-Lab/MaskDiT. small-vision: checkpoint folder or .npz of the UMD authors' JAX code."""
    path: Annotated[Path, Positional]
    """Weights file or folder."""
    out: Path = Path("runs/imported")
    """Folder of the new run."""
    source: str = ""
    """Pictures to probe and evaluate the run with, as in --data.source."""
    num_heads: CountOrZero = 0
    """Number of attention heads; the weights do not contain it. 0: as in the published network of this width."""
    decoder_num_heads: CountOrZero = 0
    """The same for a decoder narrower than the encoder, in mae and maskdit files. 0: 16, if it is 512 wide."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Export:
    """Export a run's network to the format of another library."""

    kind: Annotated[Kind, Positional]
    """timm: the encoder as a timm ViT. transformers: the encoder as ViTModel, or an MAE as ViTMAE. diffusers: the
    generator as a pipeline. hub: the network, for from_pretrained. small-vision: .npz for the UMD authors' code."""
    run: Annotated[Path, Positional]
    """Folder of the run."""
    out: Path | None = None
    """Folder to write; must be new or empty. Default: RUN/KIND."""
    image_size: tuple[Count, Count] | None = None
    """Image size (height, width) of the exported network; position embeddings are interpolated. None: the run's."""
    ema: bool = True
    """Use the EMA weights if the run has them."""
    vae: str = ""
    """For diffusers: VAE (folder or hub id) of imported weights on latents. It becomes part of the pipeline."""
    push: str = ""
    """Also upload the folder to this Hugging Face hub repository (USER/NAME). Log in first with `hf auth login`."""

    def __post_init__(self) -> None:
        check_ranges(self)
