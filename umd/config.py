"""Settings of networks, objectives and noise schedules: dataclasses whose fields carry their own help text.

tyro builds the command line from these classes. Each run writes its resolved values as YAML.
Model sizes (`SIZES`) and published settings (`OBJECTIVES`) are plain tables.
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
ScheduleName = Literal["cosine", "linear", "linear_rho", "edm"]


@dataclass(frozen=True)
class ViTConfig:
    """Settings that all networks share: images cut into patches, and a ViT encoder over the visible patches."""

    image_size: tuple[Count, Count] = (64, 64)
    """Height and width of the images or latents. Both must be divisible by the patch size."""
    channels: Count = 3
    """Channels: 3 for colour images, 1 for grey ones, 4 for latents."""
    patch_size: Count = 4
    """Side of a square patch, in pixels of the image or latent."""
    hidden_size: Count = 768
    """Width D of the encoder: values per token. Must be even."""
    depth: Count = 12
    """Number of encoder blocks."""
    num_heads: Count = 12
    """Attention heads of the encoder. Must divide hidden_size."""
    mlp_ratio: Annotated[float, number(float, above=0, at_most=1024)] = 4.0
    """Hidden width of each MLP, as a multiple of hidden_size."""
    num_cls: CountOrZero = 1
    """CLS tokens. Their average is the representation of an image. Paper: 1; released code: 4; DiT and MaskDiT: 0,
    where the patch tokens are averaged instead."""
    norm_affine: bool = True
    """Give each LayerNorm its own scale and bias. The released UMD code does so under adaLN, DiT does not."""
    embedding: Embedding = "paper"
    """How time and label are embedded. paper: 256 time features and a plain label table, as in DiT. released: D time
    features, and MLPs of hidden width 2D for time and label, as in the released UMD code. diffusers: like paper,
    with the time frequencies of diffusers. none: neither is embedded (MAE)."""
    gelu: Literal["tanh", "exact"] = "tanh"
    """tanh: the approximation that UMD, DiT and MaskDiT use. exact: by the error function (MAE), without kernels of
    this package."""
    norm_eps: Positive = 1e-6
    """Added to the variance in LayerNorm. ViTMAE of transformers uses 1e-12."""
    residual_in_fp32: bool = False
    """Keep the residual stream in fp32 while matrix products run in bf16, as DiT and MAE do under autocast."""
    pixel_stats: Literal["half", "imagenet"] = "half"
    """Pixels as the network sees them. half: in -1..1. imagenet: normalised by ImageNet's mean and standard deviation,
    as in the published MAE. Pictures are given in -1..1 either way."""

    @property
    def grid_size(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        """L, the patches of one image."""
        return self.grid_size[0] * self.grid_size[1]

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", tuple(self.image_size))
        check_ranges(self)
        H, W = self.image_size
        if H % self.patch_size or W % self.patch_size:
            near = [max(side // self.patch_size, 1) * self.patch_size for side in (H, W)]
            raise UserError(
                f"image size {H}x{W} is not divisible by patch size {self.patch_size}; "
                f"use {near[0]}x{near[1]} or another patch size"
            )
        method = getattr(self, "outputs", getattr(self, "kind", "x_start"))
        if self.pixel_stats == "imagenet" and (self.channels != 3 or method not in ("x_start", "classifier")):
            raise UserError("pixel_stats imagenet is for MAEs and classifiers of pictures with 3 channels; use half")
        if int(self.hidden_size * self.mlp_ratio) < 1:
            raise UserError(f"mlp_ratio {self.mlp_ratio} of width {self.hidden_size} leaves no MLP; use e.g. 4")
        if self.hidden_size % self.num_heads or self.hidden_size % 2:
            raise UserError(f"width {self.hidden_size} must be even and divisible by {self.num_heads} heads")


@dataclass(frozen=True)
class ModelConfig(ViTConfig):
    """The UMD network. Other settings turn it into the published DiT, MAE or MaskDiT (see `umd/peers.py`)."""

    decoder_depth: CountOrZero = 4
    """Number of decoder blocks. 0: no decoder, the head reads the encoder's output (DiT)."""
    decoder_hidden_size: CountOrZero = 0
    """Width of the decoder. 0: as wide as the encoder. Any other value puts a linear layer between the two (MAE,
    MaskDiT)."""
    decoder_num_heads: CountOrZero = 0
    """Attention heads of the decoder. 0: as many as the encoder has."""
    decoder: Literal["self", "cross"] = "self"
    """self: all patches attend to each other, as in the paper. cross: each predicted patch attends to the encoder's
    tokens only, and not to other predicted patches (CrossMAE)."""
    adaLN: bool = True
    """Condition the blocks by adaLN-zero. Off: the condition is an extra token in every block (the paper's ablation,
    MAE)."""
    adaLN_projection: AdaLNProjection = "per_block"
    """Weights of adaLN. per_block: each block has its own projection. single: all blocks share one projection and
    each has its own offsets (adaLN-single of PixArt). low_rank: each block's projection is a product of low rank."""
    adaLN_rank: Count = 64
    """Rank of the projections when adaLN_projection is low_rank."""
    positions: Literal["learned", "sincos"] = "learned"
    """Position tables. learned: trained. sincos: fixed sines and cosines, as in MAE, DiT and MaskDiT."""
    num_classes: CountOrZero = 0
    """Number of classes in the label embedding. 0: no labels, as in pre-training."""
    outputs: Literal["x_start_eps", "x_start", "eps", "eps_sigma", "edm"] = "x_start_eps"
    """What the head predicts. x_start_eps: image and noise (UMD). x_start: the image (MAE). eps: the noise.
    eps_sigma: the noise and the variance of a step (DiT). edm: the raw output that EDM's preconditioning turns
    into an image (MaskDiT)."""

    @property
    def predictions(self) -> tuple[str, ...]:
        """Which of x_start and eps the network gives at every time, directly or computed from its output."""
        if self.outputs == "x_start":
            return ("x_start",)
        return ("x_start", "eps") if self.outputs in ("x_start_eps", "edm") else ("eps",)

    @property
    def out_channels(self) -> int:
        """Output channels O of the head."""
        return self.channels * (2 if self.outputs in ("x_start_eps", "eps_sigma") else 1)

    @property
    def decoder_width(self) -> int:
        return self.decoder_hidden_size or self.hidden_size

    @property
    def decoder_vit(self) -> ViTConfig:
        """The configuration from which the decoder's blocks are built."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(ViTConfig)}
        heads = self.decoder_num_heads or self.num_heads
        return ViTConfig(**fields | {"hidden_size": self.decoder_width, "num_heads": heads, "num_cls": 1})

    @property
    def cond_tokens(self) -> int:
        """1 if the condition is a token in front of each sample, else 0."""
        return int(not self.adaLN and self.embedding != "none")

    @property
    def modulation_widths(self) -> list[int]:
        """Width of each adaLN table, in the order of the network:

        - 6·D for each encoder block;
        - 2·D for the encoder's final norm, if a linear layer to the decoder follows;
        - 6 times the decoder's width for each decoder block;
        - 2 times the decoder's width for the last norm.
        """
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
class VideoConfig(ViTConfig):
    """Settings of networks that take clips as well as images: a patch may span several frames."""

    num_frames: Count = 1
    """Frames of a clip. 1: images."""
    tubelet_size: Count = 1
    """Frames per patch, 2 for video. Must divide num_frames."""

    @property
    def num_patches(self) -> int:
        """L, the patches of one image or clip, over all frames."""
        return self.num_frames // self.tubelet_size * self.grid_size[0] * self.grid_size[1]

    @property
    def patch_dim(self) -> int:
        """Values in one patch, C·p·P·P."""
        return self.channels * self.tubelet_size * self.patch_size**2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_frames % self.tubelet_size:
            raise UserError(f"num_frames {self.num_frames} is not divisible by tubelet_size {self.tubelet_size}")


@dataclass(frozen=True)
class DiffMAEConfig(VideoConfig):
    """The DiffMAE network: the encoder reads clean visible patches, the decoder reads noised masked patches."""

    kind: Suppress[Literal["diffmae"]] = "diffmae"  # tells the configurations apart in files
    decoder: Literal["joint", "cross", "cross_self"] = "cross_self"
    """What the noised tokens attend to. joint: noised and visible tokens together. cross: visible tokens only.
    cross_self: visible tokens first, then the noised tokens, in every block."""
    decoder_hidden_size: Count = 512
    """Width of the decoder. Must be even."""
    decoder_depth: Count = 8
    """Number of decoder blocks."""
    decoder_num_heads: Count = 16
    """Attention heads of the decoder. Must divide decoder_hidden_size."""
    links: bool = True
    """U-shaped links: block i of a cross or cross_self decoder reads the output of encoder block depth-1-i. Off:
    every block reads the last one."""
    target_size: CountOrZero = 0
    """Feature values per patch when the target is a file of features. 0: the target is pixels."""

    num_classes = 0  # no label embedding

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.num_cls:
            raise UserError("a DiffMAE has at least one CLS token; num_cls is 0")
        if self.decoder_hidden_size % self.decoder_num_heads or self.decoder_hidden_size % 2:
            raise UserError(
                f"decoder width {self.decoder_hidden_size} must be even and divisible by {self.decoder_num_heads} heads"
            )


@dataclass(frozen=True)
class ClassifierConfig(VideoConfig):
    """A ViT encoder with a linear layer on top. Its size is that of the pre-trained encoder it starts from."""

    kind: Suppress[Literal["classifier"]] = "classifier"
    num_classes: Suppress[CountOrZero] = 0  # not an option: a run takes it from its data
    """Number of classes."""
    pool: Literal["cls", "mean", "mean_norm"] = "cls"
    """Input of the linear layer. cls: the average of the CLS tokens after the final norm. mean: the average of the
    patch tokens after the final norm. mean_norm: the patch tokens are averaged first, then normalised (MAE's
    fine-tuning)."""
    # The next two are not options: adaLN's shift and scale are folded into the norms, and there is no time embedding.
    norm_affine: Suppress[bool] = True
    embedding: Suppress[Embedding] = "paper"
    cond_token: Suppress[bool] = False  # not an option: it follows from the encoder
    """Put one more token in front of each sample: the condition token of a UMD without adaLN."""
    linear: bool = False
    """Linear probing: freeze the encoder and train the linear layer alone, behind a batch norm."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pool == "cls" and not self.num_cls:
            raise UserError("there are no CLS tokens to classify by; use --model.pool mean")


# Mi has 24 heads: in runs of minutes, probes of the CLS tokens improved from 6 to 12 to 24 heads.
SIZES: dict[str, dict[str, int]] = {
    "Ti": dict(hidden_size=192, depth=6, decoder_depth=2, num_heads=3),  # for CPUs and tests; not in the paper
    "Mi": dict(hidden_size=384, depth=4, decoder_depth=1, num_heads=24),  # for minutes on a CPU: wide and shallow
    "S": dict(hidden_size=384, depth=12, decoder_depth=4, num_heads=6),
    "B": dict(hidden_size=768, depth=12, decoder_depth=4, num_heads=12),
    "L": dict(hidden_size=1024, depth=24, decoder_depth=8, num_heads=16),
    "XL": dict(hidden_size=1152, depth=28, decoder_depth=8, num_heads=16),
}


def model_config(name: str, **changes) -> ModelConfig:
    """Build the configuration that a name such as `"UMD-B/4"` stands for: size B, patch size 4.

    Args:
        name: UMD-SIZE/PATCH with a SIZE of `SIZES`.
        changes: other fields of `ModelConfig`; they override the size's fields.

    Raises:
        UserError: the name has another form or an unknown size.
    """
    size, _, patch = name.removeprefix("UMD-").partition("/")
    if size not in SIZES or not patch.isdecimal() or not name.startswith("UMD-"):
        raise UserError(f"unknown model {name!r}; expected UMD-SIZE/PATCH with SIZE one of {', '.join(SIZES)}")
    return ModelConfig(**{**SIZES[size], "patch_size": int(patch), **changes})


DIFFMAE_DECODERS: dict[str, dict[str, int]] = {
    "Ti": dict(decoder_hidden_size=128, decoder_depth=3, decoder_num_heads=4),
}


def diffmae_config(name: str, **changes) -> DiffMAEConfig:
    """Build the configuration that a name such as `"DiffMAE-B/16"` stands for: size B, patch size 16.

    The encoder is UMD's of the same size. The decoder has 8 blocks of width 512 (Ti: 3 blocks of width 128).

    Args:
        name: DiffMAE-SIZE/PATCH with a SIZE of `SIZES`.
        changes: other fields of `DiffMAEConfig`; they override the size's fields.

    Raises:
        UserError: the name has another form or an unknown size.
    """
    size, _, patch = name.removeprefix("DiffMAE-").partition("/")
    if size not in SIZES or not patch.isdecimal() or not name.startswith("DiffMAE-"):
        raise UserError(f"unknown model {name!r}; expected DiffMAE-SIZE/PATCH with SIZE one of {', '.join(SIZES)}")
    encoder = {key: value for key, value in SIZES[size].items() if key != "decoder_depth"}
    return DiffMAEConfig(**{**encoder, **DIFFMAE_DECODERS.get(size, {}), "patch_size": int(patch), **changes})


@dataclass(frozen=True)
class ObjectiveConfig:
    """Noise, masks and loss. The first three settings turn UMD into MAE, MaskDiT or DiT."""

    no_noise_prob: Share = 0.5
    """r0: share of the batch that gets no noise (t = 0) and is only masked. MAE: 1; MaskDiT and DiT: 0."""
    mask_ratio: ShareBelowOne = 0.375
    """mt: share of patches hidden from the encoder in noised samples. MaskDiT: 0.5; DiT: 0."""
    mask_ratio_no_noise: ShareBelowOne = 0.75
    """m0: share of patches hidden from the encoder in noise-free samples."""
    class_dropout_prob: Share = 0.1
    """Share of labels replaced by the null class when training with labels. Classifier-free guidance needs it."""
    norm_pix: bool = False
    """Normalise each target patch by its own mean and standard deviation. Only for a network whose output is x_start
    (MAE)."""
    predict_ratio: ShareAboveZero = 1.0
    """Share of a sample's hidden patches that the decoder predicts, drawn at random. Below 1: cross decoder only."""

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
    """Noise, masks and loss of DiffMAE."""

    kind: Suppress[Literal["diffmae"]] = "diffmae"
    mask_ratio: InnerShare = 0.75
    """Share of patches that are noised and predicted. The encoder sees the other patches clean. Video: 0.9."""
    min_time: Count = 1
    """Smallest model time that is drawn; the largest is T. Set to T, this is an MAE with noise in place of mask
    tokens."""
    target: str = "pixels"
    """What is predicted of each masked patch. pixels; normalized: pixels, normalised by the mean and standard
    deviation of the patch; or the path of a .npy file of features [images, L, target_size]."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class ClassifierObjectiveConfig:
    """Augmentation and loss of a classifier. The defaults are MAE's fine-tuning recipe."""

    kind: Suppress[Literal["classifier"]] = "classifier"
    smoothing: Share = 0.1
    """Label smoothing: share of each target that is spread evenly over all classes."""
    mixup: NonNegative = 0.8
    """mixup: the mixing share is drawn from Beta(a, a), and this is a. 0: no mixup."""
    cutmix: NonNegative = 1.0
    """cutmix: a of the same Beta(a, a). With both mixup and cutmix, each batch gets one of them, at even odds. 0: no
    cutmix."""
    erase: Share = 0.25
    """Random erasing: share of images in which a rectangle is replaced by noise."""
    drop_path: ShareBelowOne = 0.1
    """Stochastic depth: share of images that skip a branch of the last block. It falls linearly to 0 at the first
    block."""

    def __post_init__(self) -> None:
        check_ranges(self)


@dataclass(frozen=True)
class ScheduleConfig:
    """Noise schedule."""

    name: ScheduleName = "cosine"
    """How noise grows with time. cosine: for pixels. linear: for latents. linear_rho: for DiffMAE. edm: for MaskDiT
    as published."""
    num_steps: Count = 1000
    """T, the number of diffusion steps."""
    rho: Positive = 0.8
    """Exponent on each β of linear_rho. Below 1: more noise. Other schedules ignore it."""

    def __post_init__(self) -> None:
        check_ranges(self)


AnyModelConfig: TypeAlias = ModelConfig | DiffMAEConfig | ClassifierConfig
AnyObjectiveConfig: TypeAlias = ObjectiveConfig | DiffMAEObjectiveConfig | ClassifierObjectiveConfig


def classifier_config(source: ViTConfig, **changes) -> ClassifierConfig:
    """Configuration of a classifier on the encoder of `source`, the configuration of a UMD or DiffMAE.

    changes: fields of `ClassifierConfig` that override the encoder's. Without CLS tokens, `pool` is "mean" by default.
    """
    same = (
        "image_size", "channels", "patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio", "num_cls",
        "gelu", "norm_eps", "residual_in_fp32", "pixel_stats",
    )  # fmt: skip
    values = {name: getattr(source, name) for name in same if name not in changes}
    if isinstance(source, DiffMAEConfig):
        values |= {"num_frames": source.num_frames, "tubelet_size": source.tubelet_size}
    if not source.num_cls:
        changes.setdefault("pool", "mean")
    return ClassifierConfig(**values, cond_token=bool(getattr(source, "cond_tokens", 0)), **changes)


def check_match(model: AnyModelConfig, objective: AnyObjectiveConfig) -> None:
    """Raise UserError if network and objective belong to different methods."""
    kinds = [getattr(part, "kind", "umd") for part in (model, objective)]
    if kinds[0] != kinds[1]:
        raise UserError(f"a {kinds[0]} network cannot be trained with a {kinds[1]} objective; give both the same kind")


def kind_of(config: AnyModelConfig) -> str:
    """The name of the method in messages and tables."""
    return {"diffmae": "DiffMAE", "classifier": "classifier"}.get(getattr(config, "kind", ""), "UMD")
