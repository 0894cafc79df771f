"""The objective of classification: cross-entropy on mixed, erased pictures and smoothed targets, with drop path.

The recipe with which MAE is fine-tuned (https://arxiv.org/abs/2111.06377, Table 9), but for RandAugment. Everything
random is a pure function of (seed, step, part of the batch).
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from umd.config import ClassifierConfig, ClassifierObjectiveConfig
from umd.errors import UserError
from umd.flops import classifier_flops
from umd.objective import WHOLE, Part

ERASED_AREA, ERASED_ASPECT, ERASE_TRIES = (0.02, 1 / 3), 1 / 0.3, 10
NOISE_STD = 0.5  # about that of pixels in [-1, 1]

Box = tuple[int, int, int, int]  # top, left, bottom, right


class Augmentation(NamedTuple):
    """What is done to a batch of B pictures; picture b is mixed with picture B - 1 - b."""

    targets: Tensor  # [B, classes]: float32, each a distribution
    share: float  # of a picture itself in the mixture
    box: Box | None  # cutmix: where it is the other one; None: mixup
    erased: Tensor  # int64 [B, 4]: boxes of noise, before the mixing
    noise_seed: int
    gates: Tensor | None  # float32 [2·depth, B]: 0, or 1 over the share that is kept


class ClassifierObjective:
    """Changes pictures and labels, and scores logits: mean over pictures of the cross-entropy with soft targets.

    Raises:
        UserError: fewer than 2 classes.
    """

    def __init__(self, model: ClassifierConfig, config: ClassifierObjectiveConfig):
        if model.num_classes < 2:
            raise UserError(f"a classifier needs 2 classes or more, got {model.num_classes}")
        self.model, self.config = model, config

    on_device = False  # boxes and shares are drawn on the host: `step` is a number

    def places(self, batch_size: int, part: Part = WHOLE) -> list[int]:
        """Numbers, in the whole batch, of the samples of one part: they follow each other."""
        return list(range(part.index * batch_size, (part.index + 1) * batch_size))

    def part_names(self) -> tuple[str | None, ...]:
        return ()

    def part_weights(self, batch_size: int, part: Part) -> tuple[float, ...]:
        return ()

    def step_flops(self, batch_size: int, part: Part = WHOLE) -> int:
        """FLOPs of forward and backward of a batch; of frozen features, of the forward pass."""
        return (1 if self.model.linear else 3) * classifier_flops(self.model, batch_size)

    def corrupt(
        self,
        batch_size: int,
        seed: int,
        device: torch.device,
        labels: Tensor | None = None,
        indices: Tensor | None = None,
        step: int = 0,
        part: Part = WHOLE,
    ) -> Augmentation:
        """Draw what is done to one part of a step's batch, whose pictures are mixed with each other.

        labels: int64 [batch_size]. Raises UserError without labels.
        """
        if labels is None:
            raise UserError("classification needs labels; use one subfolder a class, or labels in the .npz")
        if self.model.linear and batch_size < 2:
            raise UserError("the batch norm of a linear probe needs 2 images or more in a (micro-)batch, got 1")
        rng = np.random.default_rng((seed, step, part.index))
        share, box = draw_mixing(rng, self.config, self.model.image_size)
        erased = [draw_erased(rng, self.config.erase, self.model.image_size) for _ in range(batch_size)]
        one_hot = smoothed(labels, self.model.num_classes, self.config.smoothing)  # [B, classes]
        return Augmentation(
            targets=share * one_hot + (1 - share) * one_hot.flip(0),
            share=share,
            box=box,
            erased=torch.tensor(erased, device=device),
            noise_seed=int(rng.integers(2**62)),
            gates=draw_gates(rng, self.config.drop_path, self.model.depth, batch_size, device),
        )

    def augmented(self, x: Tensor, a: Augmentation) -> Tensor:
        """Erase, then mix images [B, C, H, W] or clips [B, C, F, H, W]."""
        x = self.with_erased(x, a)
        if a.box is None:
            return x if a.share == 1 else a.share * x + (1 - a.share) * x.flip(0)
        top, left, bottom, right = a.box
        x, other = x.clone(), x.flip(0)
        x[..., top:bottom, left:right] = other[..., top:bottom, left:right]
        return x

    def with_erased(self, x: Tensor, a: Augmentation) -> Tensor:
        if self.config.erase == 0:
            return x
        generator = torch.Generator(x.device).manual_seed(a.noise_seed)
        noise = NOISE_STD * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        y, x_ = (torch.arange(size, device=x.device) for size in x.shape[-2:])
        top, left, bottom, right = a.erased[:, :, None].unbind(1)  # each [B, 1]
        rows, columns = (y >= top) & (y < bottom), (x_ >= left) & (x_ < right)  # [B, H], [B, W]
        inside = (rows[:, :, None] & columns[:, None]).view(len(x), *(1,) * (x.ndim - 3), *x.shape[-2:])
        return torch.where(inside, noise, x)

    def __call__(self, model, x_start: Tensor, a: Augmentation) -> tuple[Tensor, Tensor]:
        """One forward pass of images [B, C, H, W] or clips [B, C, F, H, W]: (loss, no parts [0])."""
        logits = model(self.augmented(x_start, a), a.gates)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, a.targets.to(logits.dtype))
        return loss, loss.detach().new_empty(0)


def smoothed(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Targets [B, classes]: smoothing / classes everywhere, and 1 - smoothing more at the label."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def draw_mixing(
    rng: np.random.Generator, config: ClassifierObjectiveConfig, image_size: tuple[int, int]
) -> tuple[float, Box | None]:
    """The share of a picture itself in its mixture, and for cutmix the box of the other: of exactly the other share."""
    cut = config.cutmix > 0 and (config.mixup == 0 or rng.random() < 0.5)
    alpha = config.cutmix if cut else config.mixup
    if alpha == 0:
        return 1.0, None
    share = float(rng.beta(alpha, alpha))
    if not cut:
        return share, None
    H, W = image_size
    side = math.sqrt(1 - share)
    h, w, y, x = int(H * side), int(W * side), int(rng.integers(H)), int(rng.integers(W))
    box = (max(y - h // 2, 0), max(x - w // 2, 0), min(y + h // 2, H), min(x + w // 2, W))  # what lies in the picture
    return 1 - (box[2] - box[0]) * (box[3] - box[1]) / (H * W), box


def draw_erased(rng: np.random.Generator, probability: float, image_size: tuple[int, int]) -> Box:
    """The box to erase from one picture, inside it; empty where there is none (https://arxiv.org/abs/1708.04896)."""
    H, W = image_size
    if rng.random() < probability:
        for _ in range(ERASE_TRIES):
            area = H * W * rng.uniform(*ERASED_AREA)
            aspect = ERASED_ASPECT ** rng.uniform(-1, 1)
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < h < H and 0 < w < W:
                top, left = int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1))
                return top, left, top + h, left + w
    return 0, 0, 0, 0


def draw_gates(
    rng: np.random.Generator, drop_path: float, depth: int, batch_size: int, device: torch.device
) -> Tensor | None:
    """Drop path (https://arxiv.org/abs/1603.09382): float32 [2·depth, B], of expectation 1."""
    if drop_path == 0:
        return None
    keep = 1 - np.linspace(0, drop_path, depth).repeat(2)[:, None]  # [2·depth, 1]
    gates = (rng.random((2 * depth, batch_size)) < keep) / keep
    return torch.from_numpy(gates.astype(np.float32)).to(device)
