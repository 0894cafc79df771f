"""Normalised patches: by ImageNet's pixel statistics, as published MAEs see pictures, or each by its own.

Everything else here is in -1..1. A network whose `pixel_stats` is "imagenet" converts its input itself, so that the
rest of the code need not know.
"""

import torch
from torch import Tensor

# Of RGB values in 0..1, as in torchvision, timm and facebookresearch/mae.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def standardize(patches: Tensor) -> Tensor:
    """Patches [..., 3·P·P] in -1..1 to (value - mean) / std of each channel."""
    channels = patches.unflatten(-1, (3, -1)).unbind(-2)
    numbers = zip(channels, IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([(x - (2 * mean - 1)) / (2 * std) for x, mean, std in numbers], -2).flatten(-2)


def unstandardize(patches: Tensor) -> Tensor:
    """The inverse of `standardize`."""
    channels = patches.unflatten(-1, (3, -1)).unbind(-2)
    numbers = zip(channels, IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([x * (2 * std) + (2 * mean - 1) for x, mean, std in numbers], -2).flatten(-2)


def normalized(patches: Tensor) -> Tensor:
    """MAE's norm_pix target: each patch [..., values] normalised by its own mean and unbiased standard deviation."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) * torch.rsqrt(variance + 1e-6)
