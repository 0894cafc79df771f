"""Tensor names of MAE in transformers and of DiT in diffusers, converted to and from the authors' names.

transformers stores names that its modules no longer use. Old and new names are read; the old ones are written, because
every version reads them.
"""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from umd.errors import UserError
from umd.pixel_stats import IMAGENET_MEAN, IMAGENET_STD
from umd.positions import sincos_positions

State = dict[str, Tensor]

# (pattern of their name, the authors' name), applied in order, to read. `to_vit_mae` has the names that are written.
MAE_NAMES = [
    (r"vit\.embeddings\.cls_token", "cls_token"),
    (r"vit\.embeddings\.position_embeddings", "pos_embed"),
    (r"vit\.embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"vit\.layernorm\.", "norm."),
    (r"vit\.(?:encoder\.layer|layers)\.", "blocks."),
    (r"decoder\.(?:decoder_layers|decoder_encoder\.layer|decoder_encoder\.layers)\.", "decoder_blocks."),
    (r"decoder\.(?=decoder_|mask_token)", ""),
]
MAE_LAYERS = [
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.(?:intermediate\.dense|mlp\.up_proj|mlp\.fc1)\.", ".mlp.fc1."),
    (r"(?<!attention)\.(?:output\.dense|mlp\.down_proj|mlp\.fc2)\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:attention\.query|q_proj)\.", ".attn.qkv@0."),
    (r"\.attention\.(?:attention\.key|k_proj)\.", ".attn.qkv@1."),
    (r"\.attention\.(?:attention\.value|v_proj)\.", ".attn.qkv@2."),
]
DIT_NAMES = [
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (r"^pos_embed\.pos_embed$", "pos_embed"),
    (r"^transformer_blocks\.", "blocks."),
    (r"\.norm1\.linear\.", ".adaLN_modulation.1."),
    (r"\.attn1\.to_q\.", ".attn.qkv@0."),
    (r"\.attn1\.to_k\.", ".attn.qkv@1."),
    (r"\.attn1\.to_v\.", ".attn.qkv@2."),
    (r"\.attn1\.to_out\.0\.", ".attn.proj."),
    (r"\.ff\.net\.0\.proj\.", ".mlp.fc1."),
    (r"\.ff\.net\.2\.", ".mlp.fc2."),
    (r"^proj_out_1\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out_2\.", "final_layer.linear."),
]
DIT_EMBEDDERS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
    "class_embedder.embedding_table": "y_embedder.embedding_table",
}


# Fields of config.json that must be there, all of them numbers above 0.
DIT_FIELDS = ("sample_size", "patch_size", "num_attention_heads", "attention_head_dim")
MAE_FIELDS = ("num_attention_heads", "decoder_num_attention_heads", "layer_norm_eps")
GELU = {
    "gelu": "exact", "gelu_python": "exact", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh",
    "gelu-approximate": "tanh",
}  # fmt: skip


def read_config(folder: Path, class_name: str, numbers: Sequence[str]) -> dict[str, Any]:
    """Read a folder's config.json.

    Raises UserError if it is missing, no JSON, not of class `class_name`, or without one of the `numbers`.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"there is no {file}; expected a folder that save_pretrained wrote") from error
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{file} holds a {type(config).__name__}; expected the settings of a {class_name}")
    found = config.get("_class_name") or config.get("architectures") or config.get("model_type", "")
    found = ", ".join(map(str, found)) if isinstance(found, list) else str(found)
    if class_name not in found:
        raise UserError(f"{folder} holds a {found or 'network of no name'}; expected a {class_name}")
    for name in numbers:
        value = config.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise UserError(f"{file}: {name} must be a number above 0, and is {value!r}")
    return config


def gelu_of(activation: str, folder: Path) -> Literal["tanh", "exact"]:
    """Our name of an activation of transformers or diffusers. Raises UserError for all but GELUs."""
    if activation not in GELU:
        raise UserError(f"{folder} has the activation {activation!r}; a network here has GELU: {', '.join(GELU)}")
    return GELU[activation]  # type: ignore[return-value]


def pixel_stats_of(folder: Path, channels: int) -> Literal["half", "imagenet"]:
    """The pixel statistics of an MAE's folder: of preprocessor_config.json if it is there, else ImageNet's.

    Raises UserError for other statistics than ImageNet's and 0.5.
    """
    file = folder / "preprocessor_config.json"
    if not file.exists():
        return "imagenet" if channels == 3 else "half"
    try:
        config = json.loads(file.read_text("utf-8"))
        found = list(config["image_mean"]), list(config["image_std"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read image_mean and image_std in {file}: {error}") from error
    for name, stats in statistics(channels).items():
        if found == stats:
            return name
    raise UserError(f"{file}: image_mean and image_std are {found}; expected ImageNet's, or 0.5 for all channels")


def statistics(channels: int) -> dict[Literal["half", "imagenet"], tuple[list[float], list[float]]]:
    """Mean and standard deviation of pixels in 0..1 by the name of our setting."""
    return {"imagenet": (list(IMAGENET_MEAN), list(IMAGENET_STD)), "half": ([0.5] * channels, [0.5] * channels)}


def renamed(state: State, names: Sequence[tuple[str, str]]) -> State:
    """Tensors under the authors' names, with q, k and v joined into qkv."""
    found: State = {}
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        for pattern, ours in names:
            name = re.sub(pattern, ours, name)
        if match := re.fullmatch(r"(.*qkv)@(\d)(\..*)", name):
            parts.setdefault(match[1] + match[3], {})[int(match[2])] = tensor
        else:
            found[name] = tensor
    return found | {name: torch.cat([of[i] for i in sorted(of)]) for name, of in parts.items()}


def mae_state(state: State) -> State:
    """Tensors of transformers' ViTMAE, or of its encoder only, under the names of facebookresearch/mae."""
    if not any(name.startswith("vit.") for name in state):
        state = {f"vit.{name}": tensor for name, tensor in state.items()}
    return renamed(state, MAE_NAMES + MAE_LAYERS)


def dit_state(state: State, config: dict[str, Any]) -> State:
    """Tensors of diffusers' DiTTransformer2DModel under the names of facebookresearch/DiT.

    Raises UserError if the blocks have different embeddings, as in models trained with diffusers itself.
    """
    found: State = {}
    for name, tensor in state.items():
        match = re.fullmatch(r"transformer_blocks\.(\d+)\.norm1\.emb\.(.*)\.(weight|bias)", name)
        if match is None or match[2] not in DIT_EMBEDDERS:
            found[name] = tensor
            continue
        ours = f"{DIT_EMBEDDERS[match[2]]}.{match[3]}"
        if not torch.equal(found.setdefault(ours, tensor), tensor):
            raise UserError(
                f"{name} is another than the first block's: a DiT has one embedding of time and class for all blocks"
            )
    side = config["sample_size"] // config["patch_size"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    # diffusers may leave out the position table, because it computes the table again.
    found.setdefault("pos_embed.pos_embed", sincos_positions((side, side), width)[None])
    return renamed(found, DIT_NAMES)


def split_qkv(state: State, rename: Callable[[str], str]) -> State:
    """Tensors with the authors' names under new names, with qkv split into q, k and v (suffixes @0, @1, @2)."""
    found: State = {}
    for name, tensor in state.items():
        if ".attn.qkv." in name:
            for i, part in enumerate(tensor.chunk(3)):
                found[rename(name.replace(".attn.qkv.", f".attn.qkv@{i}."))] = part.contiguous()
        else:
            found[rename(name)] = tensor
    return found


def to_vit_mae(state: State) -> State:
    """The inverse of `mae_state`, with the names that transformers stores on disk."""
    layers = [
        (".attn.qkv@0.", ".attention.attention.query."),
        (".attn.qkv@1.", ".attention.attention.key."),
        (".attn.qkv@2.", ".attention.attention.value."),
        (".attn.proj.", ".attention.output.dense."),
        (".mlp.fc1.", ".intermediate.dense."),
        (".mlp.fc2.", ".output.dense."),
        (".norm1.", ".layernorm_before."),
        (".norm2.", ".layernorm_after."),
    ]
    starts = [
        ("cls_token", "vit.embeddings.cls_token"),
        ("pos_embed", "vit.embeddings.position_embeddings"),
        ("patch_embed.proj.", "vit.embeddings.patch_embeddings.projection."),
        ("norm.", "vit.layernorm."),
        ("blocks.", "vit.encoder.layer."),
        ("decoder_blocks.", "decoder.decoder_layers."),
        ("decoder_", "decoder.decoder_"),
        ("mask_token", "decoder.mask_token"),
    ]

    def rename(name: str) -> str:
        for ours, theirs in layers:
            name = name.replace(ours, theirs)
        ours, theirs = next(pair for pair in starts if name.startswith(pair[0]))
        return theirs + name.removeprefix(ours)

    return split_qkv(state, rename)


def to_vit(state: State) -> State:
    """Convert timm's names, of an encoder whose CLS token has no position, to those of transformers' ViTModel."""
    positions = state["pos_embed"]
    positions = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    return {name.removeprefix("vit."): value for name, value in to_vit_mae(state | {"pos_embed": positions}).items()}
