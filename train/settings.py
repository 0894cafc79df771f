"""Settings of a run's data, optimizer and processes. Imports no torch, so a mistyped option is answered at once."""

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Suppress

from umd.errors import UserError
from umd.machine.environment import own_cores
from umd.ranges import (
    Count,
    NonNegative,
    Positive,
    ProcessesOrZero,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    check_ranges,
    number,
)


@dataclass(frozen=True)
class DataConfig:
    """The pictures of a run and how they are read and cropped."""

    source: str = "emoji"
    """`emoji`, a folder of images, clips, tars, stored pictures or latents, or a file: `.npz`, `.npy`, `.tar`,
    `*-images-idx3-ubyte(.gz)`."""
    image_size: Suppress[tuple[Count, Count]] = (32, 32)  # not an option: a run takes it from its model
    """Height and width that the model sees, in pixels or latent cells."""
    channels: Suppress[Count] = 3
    """3 for colour (grey pictures are repeated), 1 for grey; for latents, their number of channels."""
    num_frames: Suppress[Count] = 1
    """Frames per clip that the model sees. 1: pictures."""
    frame_stride: Count = 1
    """For clips: take every n-th frame."""
    vae: str = ""
    """Hub id or folder of a diffusers AutoencoderKL or VQModel. With stored latents: needed only if the VAE has moved.
    With pictures: they are encoded in each training step, which is slow; umd encode-latents encodes them once."""
    vae_hash: Suppress[str] = ""  # not an option: a run takes it from its VAE or latents, and keeps to it
    area_min: ShareAboveZero = 0.8
    """Smallest fraction of a picture's area that a training crop covers."""
    area_max: ShareAboveZero = 1.0
    """Largest fraction of a picture's area that a training crop covers."""
    hflip: bool = True
    """Mirror each training picture with probability 1/2. Turn off if mirroring changes the meaning (digits, text)."""
    holdout: Share = 0.2
    """Fraction of the pictures held out as the test split, if the source has no test split."""
    skip_broken: bool = False
    """Pass over unreadable images and report their number; in training another of the class stands in.
    Off: stop at the first."""
    quarantine: str = ""
    """List of files to leave out, written by `umd check-data`. Default: quarantine.json in the source, if it exists."""
    loader: Literal["auto", "dali", "python"] = "auto"
    """What reads and crops training pictures. auto: DALI for JPEG files if it is installed, else Python processes."""
    shuffle: Literal["global", "blocks"] = "global"
    """Order of stored latents. global: a full shuffle; each latent is a separate read.
    blocks (for slow disks): read blocks of 64 neighbours of a shard in random order, and shuffle within 256 blocks."""
    num_workers: ProcessesOrZero | None = None
    """Processes (with DALI: threads) that prepare batches. None: this rank's share of the host's cores, at most 16.
    0: the training process prepares them itself."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.area_min > self.area_max:
            areas = f"area_min is {self.area_min} and area_max {self.area_max}"
            raise UserError(f"{areas}: expected 0 < area_min <= area_max <= 1.")

    @property
    def workers(self) -> int:
        return min(own_cores(), 16) if self.num_workers is None else self.num_workers


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its schedule. The defaults are the paper's pre-training recipe (Table 4)."""

    lr: Positive = 1.5e-4
    """Learning rate for a batch of 256. The peak learning rate is lr * batch / 256."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: NonNegative = 0.05
    """Decoupled weight decay. Biases, CLS tokens and the mask token are exempt."""
    warmup: ShareBelowOne = 0.05
    """Fraction of the run in which the learning rate rises linearly."""
    decay: Literal["cosine", "none"] = "cosine"
    """Learning rate after the warm-up. cosine: half a cosine to 0 at the end of the run. none: stay at the peak.
    A run with none needs no planned end: its EMA weights at any step are a result."""
    clip: NonNegative = 1.0
    """Largest global norm of the gradient. 0: no clipping."""
    ema: ShareBelowOne | None = None
    """EMA rate (1 - decay) per step at batch 256, scaled with the batch. 0: no EMA.
    None: the released code's rule, 1e-4 for a generator trained with labels, else 0. (Table 5 of the paper: 2.5e-4.)"""
    layer_decay: ShareAboveZero = 1.0
    """For classifiers: ratio of each layer's learning rate to the next layer's. 1: one rate for all layers."""
    fused: Literal["auto", "torch", "apex"] = "auto"
    """Fused AdamW kernel: torch's, or FusedAdam of NVIDIA's apex (GPU only). auto: torch's.
    Both compute the same formula in one kernel; a resumed run may switch."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class ParallelConfig:
    """How a run uses several processes, started by torchrun, deepspeed or srun. A single process ignores it."""

    strategy: Literal["auto", "ddp", "zero"] = "auto"
    """ddp: weights and optimizer state on every rank. zero: DeepSpeed shards them over the ranks.
    auto: ddp below 1e9 weights, else zero."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What ZeRO shards. 1: optimizer state. 2: also gradients. 3: also weights. 0: nothing, which is ddp."""
    wire: Literal["fp32", "bf16"] = "fp32"
    """dtype in which ddp sends gradients between GPUs. bf16 halves the bytes; the mean gradient then has 8 bits."""
    timeout: Annotated[float, number(float, above=0, at_most=1e6)] = 600
    """Seconds to wait for other ranks, at the start and in each exchange, before the run stops with an error."""

    def __post_init__(self) -> None:
        check_ranges(self)
