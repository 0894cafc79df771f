"""Settings of a run's data, optimiser and processes. Imports no torch: a mistyped option is answered at once."""

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
    """Pictures and how they are cropped."""

    source: str = "emoji"
    """`emoji`, a folder of images or of latents, a `.npz` or `.npy` file, or an `*-images-idx3-ubyte(.gz)` file"""
    image_size: Suppress[tuple[Count, Count]] = (32, 32)  # not an option: a run takes it from its model
    """height and width the model sees"""
    channels: Suppress[Count] = 3
    """3 for colour (grey pictures are repeated), 1 for grey; those of latents"""
    num_frames: Suppress[Count] = 1
    """frames of a clip that the model sees; 1: pictures"""
    frame_stride: Count = 1
    """of a clip's frames every n-th is taken"""
    vae: str = ""
    """hub id or folder of a diffusers AutoencoderKL or VQModel: pictures are encoded in each training step, which is
    slow (umd encode-latents does it once); for stored latents where their VAE lies, by default where it lay"""
    vae_hash: Suppress[str] = ""  # not an option: a run takes it from its VAE or latents, and keeps to it
    area_min: ShareAboveZero = 0.8
    """smallest share of a picture's area that a training crop covers"""
    area_max: ShareAboveZero = 1.0
    """largest share of a picture's area that a training crop covers"""
    hflip: bool = True
    """mirror every second training picture; turn off where that changes the meaning (digits, text)"""
    holdout: Share = 0.2
    """share kept for the test split where the source has no split of its own"""
    skip_broken: bool = False
    """leave unreadable images out, with a count, instead of stopping"""
    quarantine: str = ""
    """list of files to leave out, as `umd check-data` writes it; default: quarantine.json in the source, if there"""
    loader: Literal["auto", "dali", "python"] = "auto"
    """who reads and crops training pictures; auto is DALI for JPEG files where it is installed"""
    shuffle: Literal["global", "blocks"] = "global"
    """order of stored latents. global: any of all may be next, each a read of its own. blocks, for slow disks: 64
    neighbours in a shard are one read, and 256 such blocks, taken in a random order, are mixed"""
    num_workers: ProcessesOrZero | None = None
    """processes (with DALI: threads) that prepare batches; None: this rank's share of the host's cores, 16 at most; 0:
    the training process itself"""

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
    """AdamW. The defaults are the pre-training recipe of the paper (its Table 4)."""

    lr: Positive = 1.5e-4
    """Learning rate for a batch of 256; the peak is lr·batch/256."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: NonNegative = 0.05
    """Decoupled weight decay; never on biases, CLS tokens and mask token."""
    warmup: ShareBelowOne = 0.05
    """Share of the run in which the learning rate rises linearly."""
    decay: Literal["cosine", "none"] = "cosine"
    """After the warm-up: half a cosine to 0 at the end of the run; or none, the peak rate for good. Such a run has no
    end, and its averaged weights (ema) at any step are a result."""
    clip: NonNegative = 1.0
    """Largest global norm of the gradient; 0: no clipping."""
    ema: ShareBelowOne | None = None
    """EMA rate of a step at batch 256, scaled with the batch; 0: no EMA. None: the released code's rule, 1e-4 for a
    generator that trains with labels, else 0. (Table 5 of the paper has 2.5e-4.)"""
    layer_decay: ShareAboveZero = 1.0
    """Of a classifier: learning rate of each layer over that of the next; 1: one rate for all."""
    fused: Literal["auto", "torch", "apex"] = "auto"
    """Whose fused AdamW makes the step: torch's, or FusedAdam of NVIDIA's apex on a GPU. auto is torch's, which is the
    same formula in one kernel too; a run may change from one to the other."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class ParallelConfig:
    """Several processes (torchrun, deepspeed or srun starts them); one process ignores this."""

    strategy: Literal["auto", "ddp", "zero"] = "auto"
    """ddp keeps weights and optimiser on every rank, zero (DeepSpeed) shares them out; auto: ddp below 1e9 weights."""
    zero_stage: Literal[0, 1, 2, 3] = 2
    """What ZeRO shares out: 1 optimiser, 2 and gradients, 3 and weights; 0 nothing, which is ddp."""
    wire: Literal["fp32", "bf16"] = "fp32"
    """Type in which ddp sends gradients between GPUs: bf16 halves the bytes, and leaves their mean 8 bits."""
    timeout: Annotated[float, number(float, above=0, at_most=1e6)] = 600
    """Seconds to wait for other ranks, at the start and in an exchange, before the run stops with a message."""

    def __post_init__(self) -> None:
        check_ranges(self)
