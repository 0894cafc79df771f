"""What a run is made of: dataclasses with a line of documentation a field. Sizes and published settings are data.

The command line is made from these classes, and each run writes its resolved values as YAML.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from tyro.conf import Suppress

from umd.errors import UserError
from umd.ranges import (
    Count,
    CountOrZero,
    InnerShare,
    NonNegative,
    Positive,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    check_ranges,
    number,
)

AdaLNProjection = Literal["per_block", "single", "low_rank"]
Embedding = Literal["paper", "released", "diffusers", "none"]
SamplerName = Literal["ddim", "ddpm", "dpm++", "heun", "unipc"]
Prediction = Literal["eps", "x_start", "both"]
GuidanceSchedule = Literal["constant", "linear", "cosine"]
Capture = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class ViTConfig:
    """What every network here has: pictures cut into patches, and an encoder over the visible ones."""

    image_size: tuple[Count, Count] = (64, 64)
    """Height and width of images or latents; both divisible by the patch size."""
    channels: Count = 3
    """Channels of images (3, 1) or latents (4)."""
    patch_size: Count = 4
    """Side of a square patch."""
    hidden_size: Count = 768
    """Width D."""
    depth: Count = 12
    """Encoder blocks."""
    num_heads: Count = 12
    """Attention heads; divides the width."""
    mlp_ratio: Annotated[float, number(float, above=0, at_most=1024)] = 4.0
    """Hidden width of the MLP over D."""
    num_cls: CountOrZero = 1
    """CLS tokens, averaged into the representation (paper 1, released code 4; DiT and MaskDiT 0: averaged patches)."""
    norm_affine: bool = True
    """LayerNorm's own scale and bias, which the released UMD code keeps under adaLN and DiT does not."""
    embedding: Embedding = "paper"
    """Time and label embedding: DiT's 256 features and a plain table; or D features and MLPs, as released; diffusers:
    DiT's with other frequencies; none: neither (MAE)."""
    gelu: Literal["tanh", "exact"] = "tanh"
    """tanh: the approximation, as UMD, DiT and MaskDiT; exact: as MAE, and without kernels of our own."""
    norm_eps: Positive = 1e-6
    """Added to the variance in LayerNorm (transformers' ViTMAE 1e-12)."""
    residual_in_fp32: bool = False
    """Keep the residual stream in fp32 where the products are in bf16, as autocast does in DiT and MAE."""

    @property
    def grid_size(self) -> tuple[int, int]:
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """L."""
        return self.grid_size[0] * self.grid_size[1]

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", tuple(self.image_size))
        check_ranges(self)
        H, W = self.image_size
        if H % self.patch_size or W % self.patch_size:
            raise UserError(
                f"image size {H}x{W} is not divisible by patch size {self.patch_size}; "
                f"use {H - H % self.patch_size}x{W - W % self.patch_size} or another patch size"
            )
        if int(self.hidden_size * self.mlp_ratio) < 1:
            raise UserError(f"mlp_ratio {self.mlp_ratio} of width {self.hidden_size} leaves no MLP; use e.g. 4")
        if self.hidden_size % self.num_heads or self.hidden_size % 2:
            raise UserError(f"width {self.hidden_size} must be even and divisible by {self.num_heads} heads")


@dataclass(frozen=True)
class ModelConfig(ViTConfig):
    """The UMD network. Other settings make it DiT, MAE or MaskDiT as published (see `umd/peers.py`)."""

    decoder_depth: CountOrZero = 4
    """Decoder blocks; 0: none, the head reads the encoder (DiT)."""
    decoder_hidden_size: CountOrZero = 0
    """Width of the decoder; 0: the encoder's. Any other has a linear layer in between (MAE, MaskDiT)."""
    decoder_num_heads: CountOrZero = 0
    """Attention heads of the decoder; 0: as many as the encoder's."""
    decoder: Literal["self", "cross"] = "self"
    """self: all patches attend to each other, as published; cross: the patches to predict attend to the encoder's
    tokens only (CrossMAE)."""
    adaLN: bool = True
    """adaLN-zero conditioning; off: the condition is one more token in every block (MAE, the paper's ablation)."""
    adaLN_projection: AdaLNProjection = "per_block"
    """Weights of adaLN: each block's own; one projection shared, with offsets a block (PixArt's adaLN-single); or
    each block's own as a product of low rank."""
    adaLN_rank: Count = 64
    """Rank of low_rank."""
    positions: Literal["learned", "sincos"] = "learned"
    """sincos: fixed tables of sines and cosines, as MAE, DiT and MaskDiT."""
    num_classes: CountOrZero = 0
    """Classes of the label embedding; 0: no labels, as in pre-training."""
    outputs: Literal["x_start_eps", "x_start", "eps", "eps_sigma", "edm"] = "x_start_eps"
    """What is predicted of each value of a patch: the image and the noise (UMD); the image (MAE); the noise, or with it
    the variance of a step (DiT); what EDM's preconditioning makes an image of (MaskDiT)."""

    @property
    def heads(self) -> tuple[str, ...]:
        """What of x_start and eps is predicted, or follows from what is at every time."""
        return {"x_start_eps": ("x_start", "eps"), "x_start": ("x_start",), "edm": ("eps", "x_start")}.get(
            self.outputs, ("eps",)
        )

    @property
    def out_channels(self) -> int:
        """Channels that the head predicts."""
        return self.channels * (2 if self.outputs in ("x_start_eps", "eps_sigma") else 1)

    @property
    def decoder_width(self) -> int:
        return self.decoder_hidden_size or self.hidden_size

    @property
    def decoder_vit(self) -> ViTConfig:
        """What the decoder's blocks are built from."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(ViTConfig)}
        heads = self.decoder_num_heads or self.num_heads
        return ViTConfig(**fields | {"hidden_size": self.decoder_width, "num_heads": heads, "num_cls": 1})

    @property
    def cond_tokens(self) -> int:
        """1 where the condition is a token in front of each sample."""
        return int(not self.adaLN and self.embedding != "none")

    @property
    def modulation_widths(self) -> list[int]:
        """Of adaLN's tables side by side: 6 for each block of the encoder; 2 for its final norm, if a linear layer
        follows; 6 for each block of the decoder; 2 for the last norm."""
        D, width = self.hidden_size, self.decoder_width
        middle = [2 * D] if self.decoder_depth and self.decoder_hidden_size else []
        return [6 * D] * self.depth + middle + [6 * width] * self.decoder_depth + [2 * width]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.decoder_depth and (self.decoder_hidden_size or self.decoder == "cross"):
            raise UserError("decoder_depth 0 is no decoder: leave decoder_hidden_size at 0 and decoder at self")
        if self.decoder == "cross" and (self.decoder_hidden_size or not self.num_cls or self.embedding == "none"):
            raise UserError("the cross decoder is as wide as the encoder, and needs CLS tokens and a time embedding")
        if self.embedding == "none" and (self.adaLN or self.num_classes):
            raise UserError("embedding none tells neither time nor class: use adaLN off and no classes")
        if self.cond_tokens and self.decoder_width != self.hidden_size:
            raise UserError("without adaLN the condition is a token of every block: the decoder must be as wide")
        if self.adaLN_projection == "single" and self.decoder_hidden_size:
            raise UserError("one projection for all blocks (adaLN single) needs a decoder as wide as the encoder")
        if self.positions == "sincos" and (self.hidden_size % 4 or self.decoder_width % 4):
            raise UserError(
                f"widths {self.hidden_size} and {self.decoder_width} must be divisible by 4 for sines and cosines"
            )
        self.decoder_vit  # noqa: B018 (its width and heads are checked)


@dataclass(frozen=True)
class DiffMAEConfig(ViTConfig):
    """The DiffMAE network: an encoder of clean visible patches, a decoder of noised masked ones."""

    kind: Suppress[Literal["diffmae"]] = "diffmae"  # tells the configurations apart in files
    num_frames: Count = 1
    """Frames of a clip; 1: images."""
    tubelet_size: Count = 1
    """Frames of a patch (2 for video); divides the frames."""
    decoder: Literal["joint", "cross", "cross_self"] = "cross_self"
    """Noised tokens attend to themselves and the visible ones together; to the visible ones only; or in turn."""
    decoder_hidden_size: Count = 512
    """Width of the decoder."""
    decoder_depth: Count = 8
    """Decoder blocks."""
    decoder_num_heads: Count = 16
    """Attention heads of the decoder; divides its width."""
    links: bool = True
    """U-shaped: block i of a cross or cross_self decoder reads encoder level depth-1-i; off: all read the last."""
    target_size: CountOrZero = 0
    """Values a patch of a feature target; 0: the target is pixels."""

    num_classes = 0  # no label embedding

    @property
    def num_patches(self) -> int:
        """L, over all frames."""
        return self.num_frames // self.tubelet_size * self.grid_size[0] * self.grid_size[1]

    @property
    def patch_dim(self) -> int:
        """Values of a patch."""
        return self.channels * self.tubelet_size * self.patch_size**2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.num_cls:
            raise UserError("a DiffMAE has at least one CLS token; num_cls is 0")
        if self.num_frames % self.tubelet_size:
            raise UserError(f"num_frames {self.num_frames} is not divisible by tubelet_size {self.tubelet_size}")
        if self.decoder_hidden_size % self.decoder_num_heads or self.decoder_hidden_size % 2:
            raise UserError(
                f"decoder width {self.decoder_hidden_size} must be even and divisible by {self.decoder_num_heads} heads"
            )


@dataclass(frozen=True)
class ClassifierConfig(ViTConfig):
    """A ViT with a linear layer behind it, of the size of the encoder it starts from."""

    kind: Suppress[Literal["classifier"]] = "classifier"
    num_frames: Count = 1
    """Frames of a clip; 1: images."""
    tubelet_size: Count = 1
    """Frames of a patch; divides the frames."""
    num_classes: Suppress[CountOrZero] = 0  # not an option: a run takes it from its data
    """Classes."""
    pool: Literal["cls", "mean", "mean_norm"] = "cls"
    """What the linear layer sees behind the final norm: the averaged CLS tokens, or the averaged patch tokens;
    mean_norm: the norm of the averaged patch tokens (MAE's fine-tuning)."""
    norm_affine: Suppress[bool] = True  # neither are these two: shift and scale fold into it, and there is no time
    embedding: Suppress[Embedding] = "paper"
    cond_token: Suppress[bool] = False  # not an option: the encoder has one or not
    """One more token in front, as a UMD without adaLN has for its condition."""
    linear: bool = False
    """Train the linear layer alone, behind a batch norm, on frozen features (linear probing)."""

    @property
    def num_patches(self) -> int:
        """L, over all frames."""
        return self.num_frames // self.tubelet_size * self.grid_size[0] * self.grid_size[1]

    @property
    def patch_dim(self) -> int:
        """Values of a patch."""
        return self.channels * self.tubelet_size * self.patch_size**2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_frames % self.tubelet_size:
            raise UserError(f"num_frames {self.num_frames} is not divisible by tubelet_size {self.tubelet_size}")
        if self.pool == "cls" and not self.num_cls:
            raise UserError("there are no CLS tokens to classify by; use --model.pool mean")


# Mi has many heads: with 6, 12 and 24 the CLS tokens of a run of minutes tell ever more of the classes.
SIZES: dict[str, dict[str, int]] = {
    "Ti": dict(hidden_size=192, depth=6, decoder_depth=2, num_heads=3),  # for CPUs and tests; not in the paper
    "Mi": dict(hidden_size=384, depth=4, decoder_depth=1, num_heads=24),  # for minutes on a CPU: wide and shallow
    "S": dict(hidden_size=384, depth=12, decoder_depth=4, num_heads=6),
    "B": dict(hidden_size=768, depth=12, decoder_depth=4, num_heads=12),
    "L": dict(hidden_size=1024, depth=24, decoder_depth=8, num_heads=16),
    "XL": dict(hidden_size=1152, depth=28, decoder_depth=8, num_heads=16),
}


def model_config(name: str, **changes) -> ModelConfig:
    """The network `"UMD-B/4"`: size and patch size, other fields by keyword.

    Raises:
        UserError: the name is not UMD-<size>/<patch> with a size of `SIZES`.
    """
    size, _, patch = name.removeprefix("UMD-").partition("/")
    if size not in SIZES or not patch.isdigit() or not name.startswith("UMD-"):
        raise UserError(f"unknown model {name!r}; expected UMD-SIZE/PATCH with SIZE one of {', '.join(SIZES)}")
    return ModelConfig(**{**SIZES[size], "patch_size": int(patch), **changes})


DIFFMAE_DECODERS: dict[str, dict[str, int]] = {
    "Ti": dict(decoder_hidden_size=128, decoder_depth=3, decoder_num_heads=4),
}


def diffmae_config(name: str, **changes) -> DiffMAEConfig:
    """The network `"DiffMAE-B/16"`: UMD's encoder of that size; the decoder is 8 blocks, 512 wide (Ti: 3 of 128).

    Raises:
        UserError: the name is not DiffMAE-<size>/<patch> with a size of `SIZES`.
    """
    size, _, patch = name.removeprefix("DiffMAE-").partition("/")
    if size not in SIZES or not patch.isdigit() or not name.startswith("DiffMAE-"):
        raise UserError(f"unknown model {name!r}; expected DiffMAE-SIZE/PATCH with SIZE one of {', '.join(SIZES)}")
    encoder = {key: value for key, value in SIZES[size].items() if key != "decoder_depth"}
    return DiffMAEConfig(**{**encoder, **DIFFMAE_DECODERS.get(size, {}), "patch_size": int(patch), **changes})


@dataclass(frozen=True)
class ObjectiveConfig:
    """Corruption and loss. These three numbers turn UMD into MAE, MaskDiT or DiT."""

    no_noise_prob: Share = 0.5
    """r0: share of the batch trained noise-free at t = 0. MAE 1, MaskDiT and DiT 0."""
    mask_ratio: ShareBelowOne = 0.375
    """mt: share of patches hidden from the encoder in noised samples. MaskDiT 0.5, DiT 0."""
    mask_ratio_no_noise: ShareBelowOne = 0.75
    """m0: share of patches hidden in noise-free samples."""
    class_dropout_prob: Share = 0.1
    """Share of labels replaced by the null class in fine-tuning, for guidance."""
    norm_pix: bool = False
    """The target is each patch by its own mean and deviation; for a network whose output is x_start (MAE)."""
    predict_ratio: ShareAboveZero = 1.0
    """Share of a sample's hidden patches that are predicted, drawn at random; below 1 needs the cross decoder."""

    def __post_init__(self) -> None:
        check_ranges(self)


OBJECTIVES: dict[str, ObjectiveConfig] = {
    "umd": ObjectiveConfig(),
    "mae": ObjectiveConfig(no_noise_prob=1.0, mask_ratio_no_noise=0.75),
    "maskdit": ObjectiveConfig(no_noise_prob=0.0, mask_ratio=0.5),
    "dit": ObjectiveConfig(no_noise_prob=0.0, mask_ratio=0.0),
}


@dataclass(frozen=True)
class DiffMAEObjectiveConfig:
    """Corruption and loss of DiffMAE."""

    kind: Suppress[Literal["diffmae"]] = "diffmae"
    mask_ratio: InnerShare = 0.75
    """Share of patches that are noised and predicted; the others are seen clean. Video 0.9."""
    min_time: Count = 1
    """Smallest model time drawn, the largest is T. T itself: MAE, with noise for mask tokens."""
    target: str = "pixels"
    """pixels; normalized (by the mean and deviation of each patch); or a .npy of features [images, L, target_size]."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class ClassifierObjectiveConfig:
    """How pictures and labels are changed in training. The defaults are MAE's fine-tuning recipe."""

    kind: Suppress[Literal["classifier"]] = "classifier"
    smoothing: Share = 0.1
    """Share of each target spread over all classes."""
    mixup: NonNegative = 0.8
    """Both shape parameters of the Beta law of mixup's share; 0: no mixup."""
    cutmix: NonNegative = 1.0
    """The same of cutmix; with both, each batch has one or the other, at even odds. 0: no cutmix."""
    erase: Share = 0.25
    """Share of pictures in which a rectangle becomes noise."""
    drop_path: ShareBelowOne = 0.1
    """Share of pictures that skip a branch of the last block; towards the first block it falls linearly to 0."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class ScheduleConfig:
    """Noise schedule."""

    name: Literal["cosine", "linear", "linear_rho", "edm"] = "cosine"
    """cosine for pixels, linear for latents, linear_rho for DiffMAE, edm for MaskDiT as published."""
    num_steps: Count = 1000
    """T."""
    rho: Positive = 0.8
    """Exponent of linear_rho; below 1 is noisier."""

    def __post_init__(self) -> None:
        check_ranges(self)


AnyModelConfig: TypeAlias = ModelConfig | DiffMAEConfig | ClassifierConfig
AnyObjectiveConfig: TypeAlias = ObjectiveConfig | DiffMAEObjectiveConfig | ClassifierObjectiveConfig


def classifier_config(source: ViTConfig, **changes) -> ClassifierConfig:
    """The classifier on the encoder of a UMD or DiffMAE of this configuration."""
    same = (
        "image_size", "channels", "patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_cls",
        "gelu", "norm_eps", "residual_in_fp32",
    )  # fmt: skip
    values = {name: getattr(source, name) for name in same if name not in changes}
    if isinstance(source, DiffMAEConfig):
        values |= {"num_frames": source.num_frames, "tubelet_size": source.tubelet_size}
    if not source.num_cls:
        changes.setdefault("pool", "mean")
    return ClassifierConfig(**values, cond_token=bool(getattr(source, "cond_tokens", 0)), **changes)


def check_match(model: AnyModelConfig, objective: AnyObjectiveConfig) -> None:
    kinds = [getattr(part, "kind", "umd") for part in (model, objective)]
    if kinds[0] != kinds[1]:
        raise UserError(f"a {kinds[0]} network cannot be trained with a {kinds[1]} objective; give both the same kind")


def kind_of(config: AnyModelConfig) -> str:
    """What the method is called in messages and tables."""
    return {"diffmae": "DiffMAE", "classifier": "classifier"}.get(getattr(config, "kind", ""), "UMD")
