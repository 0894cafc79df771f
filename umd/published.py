"""Convert published PyTorch weights of DiT, MAE and MaskDiT to our tensors and back.

Besides names there are two differences:

- In their heads a patch is (row, column, channel), here (channel, row, column).
- Their position of the CLS token is added to our CLS token.
"""

import argparse
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from umd.config import ClassifierConfig, ModelConfig, ViTConfig
from umd.errors import UserError
from umd.hugging_face import DIT_FIELDS, MAE_FIELDS, dit_state, gelu_of, mae_state, pixel_stats_of, read_config
from umd.methods import build_model
from umd.model import UMD
from umd.peers import DIT, MAE, MASKDIT

State = dict[str, Tensor]
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16}  # published width -> heads, which weights do not tell
DECODER_WIDTH = 512  # of all published decoders that are narrower than their encoder; they have 16 heads


def read_weights(path: Path) -> dict[str, Any]:
    """Read a .pt, .pth, .bin or .safetensors file. Code in a pickle is not run.

    Raises:
        UserError: the file is missing or incomplete, or holds more than tensors, numbers and text.
    """
    if not path.is_file():
        raise UserError(f"there is no file {path}; give the checkpoint as it was published")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts store their options so
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it asks for {refused[1]}" if refused else "it is no checkpoint of PyTorch, or a part of one"
        raise UserError(f"cannot read {path} as weights alone: {what}; nothing of it was run") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile, SafetensorError) as error:
        why = (str(error).splitlines() or ["it ends too early"])[0][:200]
        raise UserError(f"{path} is damaged, or only a part of a file: {why}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}; expected named tensors")
    return found


def weights_of(found: Mapping[str, Any], *parts: str) -> State:
    """The tensors of a checkpoint, floating ones as fp32.

    They are taken from the first of `parts` that exists, or from the checkpoint itself if it has none of them.
    """
    for part in parts:
        if isinstance(found.get(part), Mapping):
            found = found[part]
            break
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


@dataclass(frozen=True)
class Link:
    """A tensor of theirs that corresponds to one of ours, and the conversions between them."""

    theirs: str  # its name
    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


def same(name: str) -> Link:
    """Their tensor is equal to ours."""
    return Link(name, lambda a: a, lambda a: a)


def row(name: str) -> Link:
    """Their tensor has one more dimension in front, of size 1."""
    return Link(name, lambda a: a[0], lambda a: a[None])


def patch_kernel(name: str, config: ViTConfig) -> Link:
    """The convolution that embeds patches: [D, C, P, P] there, [D, C·P·P] here."""
    P = config.patch_size
    return Link(name, lambda a: a.flatten(1), lambda a: a.unflatten(1, (-1, P, P)).contiguous())


def pixels(name: str, config: ModelConfig) -> Link:
    """The rows of a head, one per value of a patch: in the order (P, P, O) there, (O, P, P) here."""
    P, O = config.patch_size, config.out_channels  # noqa: E741
    return Link(
        name,
        lambda a: a.unflatten(0, (P, P, O)).movedim(2, 0).flatten(0, 2).contiguous(),
        lambda a: a.unflatten(0, (O, P, P)).movedim(0, 2).flatten(0, 2).contiguous(),
    )


def block_links(ours: str, theirs: str, norms: bool) -> dict[str, Link]:
    """Links of one block's linear layers, and of its norms if `norms`. These names are timm's, and ours too."""
    layers = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", *(["norm1", "norm2"] if norms else [])]
    return {
        f"{ours}.{layer}.{kind}": same(f"{theirs}.{layer}.{kind}") for layer in layers for kind in ("weight", "bias")
    }


def layer(ours: str, theirs: str, make: Callable[[str], Link] = same) -> dict[str, Link]:
    """Links of the weight and bias of one layer."""
    return {f"{ours}.{kind}": make(f"{theirs}.{kind}") for kind in ("weight", "bias")}


def dit_links(config: ModelConfig) -> dict[str, Link]:
    """Links for facebookresearch/DiT, by our names."""
    links = {
        "pos_embed": row("pos_embed"),
        "x_embedder.weight": patch_kernel("x_embedder.proj.weight", config),
        "x_embedder.bias": same("x_embedder.proj.bias"),
        "y_embedder.embedding_table.weight": same("y_embedder.embedding_table.weight"),
        **layer("t_embedder.mlp.0", "t_embedder.mlp.0"),
        **layer("t_embedder.mlp.2", "t_embedder.mlp.2"),
    }
    for i in range(config.depth):
        links |= block_links(f"encoder.layers.{i}", f"blocks.{i}", norms=False)
        links |= layer(f"adaLN_modulation.{i}", f"blocks.{i}.adaLN_modulation.1")
    links |= layer(f"adaLN_modulation.{len(config.modulation_widths) - 1}", "final_layer.adaLN_modulation.1")
    return links | layer("head", "final_layer.linear", lambda name: pixels(name, config))


def maskdit_links(config: ModelConfig) -> dict[str, Link]:
    """Links for Anima-Lab/MaskDiT: DiT's links, and links for a decoder.

    MaskDiT embeds one-hot labels by a layer without bias. Its null class is all zeros, which is a row of zeros here.
    """
    links = dit_links(config) | {
        "y_embedder.embedding_table.weight": Link(
            "y_embedder.embedding_table.weight",
            lambda a: torch.cat([a.T, a.new_zeros(1, len(a))]),
            lambda a: a[:-1].T.contiguous(),
        ),
        "mask_token": Link("mask_token", lambda a: a[0, 0], lambda a: a[None, None]),
        "decoder_pos_embed": row("decoder_pos_embed"),
        **layer("decoder_embed", "decoder_layer.linear"),
        **layer(f"adaLN_modulation.{config.depth}", "decoder_layer.adaLN_modulation.1"),
    }
    for i in range(config.decoder_depth):
        links |= block_links(f"decoder.layers.{i}", f"decoder_blocks.{i}", norms=False)
        links |= layer(f"adaLN_modulation.{config.depth + 1 + i}", f"decoder_blocks.{i}.adaLN_modulation.1")
    return {name: Link(f"model.{link.theirs}", link.to_ours, link.to_theirs) for name, link in links.items()}


def vit_links(config: ViTConfig) -> dict[str, Link]:
    """Links for timm's VisionTransformer without a head, whose CLS tokens have no positions."""
    links = {
        "cls_token": row("cls_token"),
        "pos_embed": row("pos_embed"),
        "x_embedder.weight": patch_kernel("patch_embed.proj.weight", config),
        "x_embedder.bias": same("patch_embed.proj.bias"),
        **layer("encoder.norm", "norm"),
    }
    for i in range(config.depth):
        links |= block_links(f"encoder.layers.{i}", f"blocks.{i}", norms=True)
    return links


def mae_links(config: ModelConfig | ClassifierConfig) -> dict[str, Link]:
    """Links for facebookresearch/mae, whose position tables begin with a row for the CLS token, all zeros."""

    def behind_cls(name: str) -> Link:
        return Link(name, lambda a: a[0, 1:], lambda a: torch.cat([a.new_zeros(1, a.shape[1]), a])[None])

    links = vit_links(config) | {"pos_embed": behind_cls("pos_embed")}
    if not isinstance(config, ModelConfig) or not config.decoder_depth:
        return links
    links |= {
        "mask_token": Link("mask_token", lambda a: a[0, 0], lambda a: a[None, None]),
        "decoder_pos_embed": behind_cls("decoder_pos_embed"),
        **layer("decoder_embed", "decoder_embed"),
        **layer("decoder.norm", "decoder_norm"),
        **layer("head", "decoder_pred", lambda name: pixels(name, config)),
    }
    for i in range(config.decoder_depth):
        links |= block_links(f"decoder.layers.{i}", f"decoder_blocks.{i}", norms=True)
    return links


def take(state: State, links: Mapping[str, Link], config: ModelConfig | ClassifierConfig, source: str) -> State:
    """Convert their state dict to ours.

    Args:
        state: their tensors by name.
        links: by our names.
        config: our network.
        source: what the weights should be, for error messages.

    Raises:
        UserError: tensors are missing, have no counterpart here, or have another shape; the message names them.
    """
    missing = [link.theirs for link in links.values() if link.theirs not in state]
    extra = sorted(state.keys() - {link.theirs for link in links.values()})
    for names, what in ((missing, "lacks"), (extra, "has besides")):
        if names:
            some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise UserError(f"this is not {source}, or not all of it: it {what} {some}")
    with torch.device("meta"):
        expected = build_model(config).state_dict()
    ours = {}
    for name, link in links.items():
        if not state[link.theirs].is_floating_point():
            raise UserError(f"{link.theirs} holds {state[link.theirs].dtype}, and weights are floating-point numbers")
        if not state[link.theirs].isfinite().all():
            raise UserError(f"{link.theirs} holds NaN or infinity: the training that wrote it had diverged")
        try:
            ours[name] = link.to_ours(state[link.theirs]).contiguous()
        except (RuntimeError, IndexError) as error:
            raise UserError(
                f"{link.theirs} {list(state[link.theirs].shape)} is not of the shape of {source}"
            ) from error
        if ours[name].shape != expected[name].shape:
            raise UserError(
                f"{link.theirs} {list(state[link.theirs].shape)} would make our {name} {list(ours[name].shape)}, but "
                f"the others imply {list(expected[name].shape)}"
            )
    return ours


def give(model: UMD, links: Mapping[str, Link]) -> State:
    """Convert our state dict to theirs: the inverse of `take`."""
    state = model.state_dict()
    return {link.theirs: link.to_theirs(state[name].detach().cpu()).contiguous() for name, link in links.items()}


def shape_of(state: State, name: str, ndim: int, source: str) -> tuple[int, ...]:
    """The shape of a tensor of `ndim` dimensions, none of them 0. Raises UserError if there is none."""
    if name not in state or state[name].ndim != ndim or not state[name].numel():
        found = f"{list(state[name].shape)}" if name in state else f"none, but {', '.join(list(state)[:3])}, …"
        raise UserError(f"this is not {source}: expected a tensor {name} of {ndim} dimensions, found {found}")
    return tuple(state[name].shape)


def depth_of(state: State, blocks: str) -> int:
    """The number of blocks named `blocks`.0, `blocks`.1, …"""
    found = (re.match(rf"{re.escape(blocks)}\.(\d+)\.", name) for name in state)
    return len({match[1] for match in found if match})


def heads_of(width: int, num_heads: int) -> int:
    """`num_heads` if above 0, else that of the published network of this width. Raises UserError if there is none."""
    if num_heads or width in HEADS:
        return num_heads or HEADS[width]
    raise UserError(f"weights do not tell how many heads a network {width} wide has; give --num-heads")


def vit_fields(state: State, patches: str, positions: str, blocks: str, cls: int, heads: int, source: str) -> dict:
    """Fields of `ViTConfig` from the shapes of an encoder's tensors. Images are taken to be square.

    Args:
        state: their tensors by name.
        patches, positions: names of the patch embedding's kernel and of the position table.
        blocks: name of the list of blocks.
        cls: rows of the position table that belong to CLS tokens.
        heads: attention heads; 0: by the width (see `heads_of`).
        source: what the weights should be, for error messages.
    """
    D, C, P, _ = shape_of(state, patches, 4, source)
    side = isqrt(shape_of(state, positions, 3, source)[1] - cls) * P
    hidden = shape_of(state, f"{blocks}.0.mlp.fc1.weight", 2, source)[0]
    return dict(
        image_size=(side, side), channels=C, patch_size=P, hidden_size=D, depth=depth_of(state, blocks),
        num_heads=heads_of(D, heads), mlp_ratio=hidden / D,
    )  # fmt: skip


def from_dit(state: State, num_heads: int = 0) -> tuple[ModelConfig, State]:
    """Network and weights from facebookresearch/DiT's state dict. Raises UserError as `take`."""
    source = "a DiT of facebookresearch"
    fields = vit_fields(state, "x_embedder.proj.weight", "pos_embed", "blocks", 0, num_heads, source)
    out = shape_of(state, "final_layer.linear.weight", 2, source)[0] // fields["patch_size"] ** 2
    classes = shape_of(state, "y_embedder.embedding_table.weight", 2, source)[0] - 1
    if not classes:
        raise UserError(
            f"this is not {source}: its label table has one row, and needs one per class and the null class"
        )
    outputs = "eps_sigma" if out == 2 * fields["channels"] else "eps"
    config = ModelConfig(**DIT | fields | dict(num_classes=classes, outputs=outputs))
    return config, take(state, dit_links(config), config, source)


def from_maskdit(state: State, num_heads: int = 0, decoder_num_heads: int = 0) -> tuple[ModelConfig, State]:
    """Network and weights from MaskDiT's state dict. Raises UserError as `take`."""
    source = "a MaskDiT of Anima-Lab"
    state = {name if name.startswith("model.") else f"model.{name}": value for name, value in state.items()}
    fields = vit_fields(state, "model.x_embedder.proj.weight", "model.pos_embed", "model.blocks", 0, num_heads, source)
    width = shape_of(state, "model.decoder_layer.linear.weight", 2, source)[0]
    classes = shape_of(state, "model.y_embedder.embedding_table.weight", 2, source)[1]
    heads = decoder_num_heads or MASKDIT["decoder_num_heads"]
    depth = depth_of(state, "model.decoder_blocks")
    decoder = dict(decoder_hidden_size=width, decoder_num_heads=heads, decoder_depth=depth)
    config = ModelConfig(**MASKDIT | fields | decoder | dict(num_classes=classes))
    return config, take(state, maskdit_links(config), config, source)


def from_mae(state: State, num_heads: int = 0, decoder_num_heads: int = 0) -> tuple[ModelConfig, State]:
    """Network and weights from facebookresearch/mae's state dict, whole or of the encoder only.

    Without a decoder our head is zero. Raises UserError as `take`.
    """
    source = "an MAE of facebookresearch"
    fields = vit_fields(state, "patch_embed.proj.weight", "pos_embed", "blocks", 1, num_heads, source)
    decoder: dict[str, Any] = dict(decoder_hidden_size=0, decoder_num_heads=0, decoder_depth=0)
    if "decoder_embed.weight" in state:
        decoder = dict(
            decoder_hidden_size=shape_of(state, "decoder_embed.weight", 2, source)[0],
            decoder_num_heads=decoder_num_heads or MAE["decoder_num_heads"],
            decoder_depth=depth_of(state, "decoder_blocks"),
        )
    config = ModelConfig(**MAE | fields | decoder)
    tables = [state[name][0, 0] for name in ("pos_embed", "decoder_pos_embed") if name in state]
    if len(tables) > 1 and tables[1].any():
        raise UserError("decoder_pos_embed moves the CLS token, which the published code never does; it cannot be kept")
    ours = take(state, mae_links(config), config, source)
    ours["cls_token"] = ours["cls_token"] + tables[0]
    if not config.decoder_depth:
        with torch.device("meta"):
            head = UMD(config).head.state_dict()
        ours |= {f"head.{name}": torch.zeros(value.shape, device="cpu") for name, value in head.items()}
    return config, ours


def from_mae_classifier(state: State, num_heads: int = 0) -> tuple[ClassifierConfig, State]:
    """Classifier and weights from the state dict of a fine-tuned facebookresearch/mae. Raises UserError as `take`."""
    source = "a fine-tuned MAE of facebookresearch"
    fields = vit_fields(state, "patch_embed.proj.weight", "pos_embed", "blocks", 1, num_heads, source)
    norm = "fc_norm" if "fc_norm.weight" in state else "norm"
    config = ClassifierConfig(
        **fields, num_cls=1, gelu="exact", pool="mean_norm" if norm == "fc_norm" else "cls",
        num_classes=shape_of(state, "head.weight", 2, source)[0],
    )  # fmt: skip
    ours = take(state, mae_links(config) | layer("encoder.norm", norm) | layer("head", "head"), config, source)
    ours["cls_token"] = ours["cls_token"] + state["pos_embed"][0, :1]
    return config, ours


class Published(NamedTuple):
    """A published network and its weights."""

    config: ModelConfig | ClassifierConfig
    tensors: dict[str, State]  # "model", and "ema" if the file has an average
    objective: dict[str, Any] = {}  # what the file tells of an MAE's training: fields of `ObjectiveConfig`


def load_published(kind: str, path: Path, num_heads: int = 0, decoder_num_heads: int = 0) -> Published:
    """Load published weights.

    Args:
        kind: dit, mae or maskdit.
        path: the authors' checkpoint; or a folder of diffusers (dit) or transformers (mae).
        num_heads, decoder_num_heads: attention heads of the encoder and of a narrower decoder; 0: those of the
            published network of this width.

    Raises:
        UserError: the file is missing or damaged, contains code, holds another network, or one of unpublished width
            whose heads are not given.
    """
    if path.is_dir():
        return from_folder(kind, path)
    found = read_weights(path)
    takes: dict[str, Callable[..., Any]] = {
        "dit": from_dit,
        "maskdit": partial(from_maskdit, decoder_num_heads=decoder_num_heads),
        "mae": partial(from_mae, decoder_num_heads=decoder_num_heads),
    }
    take_state = takes[kind]
    if kind == "mae" and "head.weight" in weights_of(found, "model"):
        take_state = from_mae_classifier
    config, model = take_state(weights_of(found, "model", "ema"), num_heads)
    tensors = {"model": model}
    if isinstance(found.get("ema"), Mapping):
        averaged, tensors["ema"] = take_state(weights_of(found, "ema"), num_heads)
        if averaged != config:
            raise UserError(f"{path} holds two networks: the average of its weights has other shapes than the weights")
    width = config.decoder_hidden_size if isinstance(config, ModelConfig) else 0
    if width not in (0, DECODER_WIDTH) and not decoder_num_heads:
        raise UserError(f"weights do not tell how many heads a decoder {width} wide has; give --decoder-num-heads")
    if kind == "mae" and config.channels == 3:
        config = replace(config, pixel_stats="imagenet")
    options = found.get("args")
    objective = {"norm_pix": "norm_pix_loss", "mask_ratio_no_noise": "mask_ratio"}
    told = {ours: getattr(options, theirs) for ours, theirs in objective.items() if hasattr(options, theirs)}
    return Published(config, tensors, told)


def from_folder(kind: str, folder: Path) -> Published:
    """As `load_published`, from a folder written by `save_pretrained` of diffusers (dit) or transformers (mae)."""
    if kind == "maskdit":
        raise UserError(f"{folder} is a folder; MaskDiT's weights are a .pt file")
    if kind == "dit":
        folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
        config = read_config(folder, "DiTTransformer2DModel", DIT_FIELDS)
        state = dit_state(weights_of(read_weights(weight_file(folder, "diffusion_pytorch_model"))), config)
        model, ours = from_dit(state, config["num_attention_heads"])
        gelu = gelu_of(config.get("activation_fn", "gelu-approximate"), folder)
        return Published(replace(model, embedding="diffusers", gelu=gelu), {"model": ours})
    config = read_config(folder, "ViTMAE", MAE_FIELDS)
    state = mae_state(weights_of(read_weights(weight_file(folder, "model"))))
    mae, ours = from_mae(state, config["num_attention_heads"], config["decoder_num_attention_heads"])
    mae = replace(
        mae, norm_eps=config["layer_norm_eps"], gelu=gelu_of(config.get("hidden_act", "gelu"), folder),
        pixel_stats=pixel_stats_of(folder, mae.channels),
    )  # fmt: skip
    told = {"norm_pix": config.get("norm_pix_loss", False), "mask_ratio_no_noise": config.get("mask_ratio", 0.75)}
    return Published(mae, {"model": ours}, told)


def weight_file(folder: Path, name: str) -> Path:
    """The weight file in a folder. Raises UserError if there is none, or the weights are split over several files."""
    files = [folder / f"{name}.safetensors", folder / f"{name}.bin", folder / "pytorch_model.bin"]
    for file in files:
        if file.is_file():
            return file
    if any(folder.glob("*.index.json")):
        raise UserError(f"{folder} keeps its weights in several files; save it as one (max_shard_size='20GB')")
    raise UserError(f"{folder} has no {files[0].name} and no {files[1].name}")
