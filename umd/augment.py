"""The objective of classification: cross-entropy on mixed and erased images with smoothed targets, and drop path.

This is MAE's fine-tuning recipe (https://arxiv.org/abs/2111.06377, Table 9) without RandAugment. All random numbers are
a pure function of (seed, step, part of the batch).
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
from umd.machine.device import to_device
from umd.objective import WHOLE, Part

ERASED_AREA, ERASED_ASPECT, ERASE_TRIES = (0.02, 1 / 3), 1 / 0.3, 10
NOISE_STD = 0.5  # about the standard deviation of pixels in [-1, 1]

Box = tuple[int, int, int, int]  # top, left, bottom, right


class Augmentation(NamedTuple):
    """The changes drawn for a batch of B images. Image b is mixed with image B - 1 - b."""

    targets: Tensor  # float32 [B, classes], each row a distribution
    share: float  # share of an image itself in its mixture
    box: Box | None  # cutmix: where the other image is pasted; None: mixup
    erased: Tensor  # int64 [B, 4], boxes that noise replaces before mixing; empty boxes for other images
    noise_seed: int  # of the erasing noise
    gates: Tensor | None  # drop path, float32 [2·depth, B]: 0, or 1 / (share that is kept)


class ClassifierObjective:
    """A classifier's objective: changes images and labels, and computes the loss.

    The loss is the mean over images of the cross-entropy with soft targets.

    Raises:
        UserError: fewer than 2 classes.
    """

    def __init__(self, model: ClassifierConfig, config: ClassifierObjectiveConfig):
        if model.num_classes < 2:
            raise UserError(f"a classifier needs 2 classes or more, got {model.num_classes}")
        self.model, self.config = model, config

    on_device = False  # boxes and shares are drawn on the host: `step` is an int

    def places(self, batch_size: int, part: Part = WHOLE) -> list[int]:
        """Indices in the whole batch of the samples of one part, which are consecutive."""
        return list(range(part.index * batch_size, (part.index + 1) * batch_size))

    def part_names(self) -> tuple[str | None, ...]:
        return ()

    def part_weights(self, batch_size: int, part: Part) -> tuple[float, ...]:
        return ()

    def step_flops(self, batch_size: int, part: Part = WHOLE) -> int:
        """FLOPs of the forward and backward pass of a batch; with a frozen encoder only of the forward pass."""
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
        """Draw the changes of one part of a step's batch. Its images are mixed with each other.

        labels: int64 [batch_size]. indices: ignored. Other arguments as in `umd.objective.Objective.corrupt`.

        Raises UserError without labels, or for a linear probe on a single image.
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
            erased=to_device(torch.tensor(erased), device),
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
        """Images or clips with the boxes `a.erased` replaced by noise."""
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
        """Run the network on images [B, C, H, W] or clips [B, C, F, H, W]: (loss, an empty tensor of parts [0])."""
        logits = model(self.augmented(x_start, a), a.gates)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, a.targets.to(logits.dtype))
        return loss, loss.detach().new_empty(0)


def smoothed(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Smoothed targets, float32 [B, classes]: smoothing / classes everywhere, plus 1 - smoothing at the label."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def draw_mixing(
    rng: np.random.Generator, config: ClassifierObjectiveConfig, image_size: tuple[int, int]
) -> tuple[float, Box | None]:
    """Draw (share of an image itself in its mixture, box of the other image for cutmix, else None).

    The box's area is exactly the remaining share of the image.
    """
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
    box = (max(y - h // 2, 0), max(x - w // 2, 0), min(y + h // 2, H), min(x + w // 2, W))  # clipped to the image
    return 1 - (box[2] - box[0]) * (box[3] - box[1]) / (H * W), box


def draw_erased(rng: np.random.Generator, probability: float, image_size: tuple[int, int]) -> Box:
    """Draw the box to erase from one image (https://arxiv.org/abs/1708.04896); empty if nothing is erased."""
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
    """Draw the gates of drop path (https://arxiv.org/abs/1603.09382): float32 [2·depth, B] with expectation 1."""
    if drop_path == 0:
        return None
    keep = 1 - np.linspace(0, drop_path, depth).repeat(2)[:, None]  # [2·depth, 1]
    gates = (rng.random((2 * depth, batch_size)) < keep) / keep
    return to_device(torch.from_numpy(gates.astype(np.float32)), device)
