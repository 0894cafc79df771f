"""Convert weights from and to small-vision, the authors' JAX code: https://github.com/philippe-eecs/small-vision.

Differences there:

- q, k and v are separate;
- kernels are [in, out];
- patch embedding and head are convolutions with channels last;
- flax applies the kernel of a transposed convolution spatially flipped.
"""

import re
import zipfile
import zlib
from collections.abc import Mapping
from math import isqrt
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from umd.config import ModelConfig
from umd.errors import UserError
from umd.model import UMD

_SCANNED = "ScanCheckpointEncoder1DBlock_0/"  # a tower's blocks stacked on axis 0, the default there
_FOREIGN = "this is no UMD checkpoint of small-vision, or not all of it"


def load_small_vision(path: Path | str, tree: str = "params") -> dict[str, np.ndarray]:
    """Read a parameter tree as {"Encoder/encoder_norm/bias": array, …}. Nothing is unpickled.

    Args:
        path: one of three:
            - a folder `checkpoint.bv-000500000` of small-vision's trainer, with one tensorstore array per parameter
              (needs the package tensorstore);
            - the same name without the step: the checkpoint written last;
            - a .npz file with names such as `params/…` or `param::…`, or without a prefix.
        tree: `params` or `ema_params`. Without an average in the file, `ema_params` gives {}.

    Raises:
        UserError: there is no such file, or it cannot be read.
    """
    path = Path(path)
    last = path.with_name(f"{path.name}-LAST")
    if last.is_file():
        path = path.with_name(f"{path.name}-{last.read_text('utf-8').strip()}")
    if path.is_dir():
        names = {file.name.replace("~", "/"): file for file in path.iterdir() if "~" in file.name}
        return {
            name.removeprefix(f"{tree}/"): _read_tensorstore(file)
            for name, file in names.items()
            if name.startswith(f"{tree}/")
        }
    if not path.exists():
        raise UserError(f"there is no file or folder {path}")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("no zip archive")
        with np.load(path, allow_pickle=False) as file:
            prefixes = (f"{tree}/", "param::") if tree == "params" else (f"{tree}/",)
            prefix = next((p for p in prefixes if any(name.startswith(p) for name in file)), None)
            if prefix is None:  # parameters alone, or no such tree
                return dict(file) if tree == "params" else {}
            return {name.removeprefix(prefix): file[name] for name in file if name.startswith(prefix)}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read {path} as a .npz file of arrays: {error}") from error


def _read_tensorstore(folder: Path) -> np.ndarray:
    try:
        import tensorstore
    except ImportError:
        raise UserError("checkpoint folders of small-vision are tensorstore arrays; pip install tensorstore") from None
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder)}}
    return tensorstore.open(spec, open=True).result().read().result()


def from_small_vision(params: Mapping[str, np.ndarray]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Network and weights from a flat flax tree, with stacked blocks (scan=True) or separate ones.

    Args:
        params: {"embedding/kernel": [P, P, C, D], …}. Images are taken to be square.

    Returns:
        (config, state_dict) with fp32 tensors.

    Raises:
        UserError: a parameter is missing or unknown, or its shape does not fit the others.
    """
    params = _unstack(params)
    config = small_vision_config(params)
    with torch.device("meta"):
        expected = UMD(config).state_dict()
    state = {}
    for name, paths in _paths(config).items():
        parts = [_to_ours(path, _float32(_get(params, path))) for path in paths]
        state[name] = torch.from_numpy(np.concatenate(parts))
        if state[name].shape != expected[name].shape:
            shapes = ", ".join(f"{path} {list(params[path].shape)}" for path in paths[:3])
            raise UserError(
                f"small-vision's {shapes} would make our {name} {list(state[name].shape)}, but the others "
                f"imply {list(expected[name].shape)}; expected the weights of one network, of square images"
            )
    known = {path for paths in _paths(config).values() for path in paths}
    if unknown := sorted(params.keys() - known):
        raise UserError(f"{len(unknown)} parameters have no place here, such as {unknown[0]}; {_FOREIGN}")
    return config, state


def to_small_vision(model: UMD) -> dict[str, np.ndarray]:
    """The inverse of `from_small_vision`: a flat flax tree with separate blocks.

    Raises:
        UserError: small-vision has no such model; the message names the settings that it lacks.
    """
    config = model.config
    fixed = dict(
        embedding="released", norm_affine=True, decoder="self", gelu="tanh", outputs="x_start_eps", positions="learned",
        norm_eps=1e-6, decoder_hidden_size=0, adaLN_projection="per_block", pixel_stats="half",
    )  # fmt: skip
    other = [f"{name} {value}" for name, value in fixed.items() if getattr(config, name) != value]
    if config.decoder_num_heads not in (0, config.num_heads):
        other.append("as many heads in the decoder")
    other += [f"{name} above 0" for name in ("num_cls", "decoder_depth") if not getattr(config, name)]
    if other:
        raise UserError(f"small-vision has no counterpart of this network: it would need {', '.join(other)}")
    D, state, params = config.hidden_size, model.state_dict(), {}
    for name, paths in _paths(config).items():
        array = state[name].detach().cpu().numpy()
        rows = D if ".qkv." in name else len(array)
        for path, part in zip(paths, np.split(array, range(rows, len(array), rows)), strict=True):
            params[path] = np.ascontiguousarray(_to_theirs(path, part, config))
    return params


def small_vision_config(params: Mapping[str, np.ndarray]) -> ModelConfig:
    """The configuration of the network that parameters with separate blocks belong to, from their shapes."""
    block = "Encoder/Encoder1DBlock_0"
    patch_size, _, channels, D = _shape(params, "embedding/kernel", 4)
    _, L, _ = _shape(params, "pos_embedding", 3)
    _, num_heads, _ = _shape(params, f"{block}/MultiHeadDotProductAttention_0/query/kernel", 3)
    _, hidden = _shape(params, f"{block}/MlpBlock_0/Dense_0/kernel", 2)
    labels = "label_emb/embedding/embedding"
    return ModelConfig(
        image_size=(isqrt(L) * patch_size, isqrt(L) * patch_size),
        channels=channels,
        patch_size=patch_size,
        hidden_size=D,
        depth=_depth(params, "Encoder"),
        decoder_depth=_depth(params, "Decoder"),
        num_heads=num_heads,
        mlp_ratio=hidden / D,
        num_cls=_shape(params, "cls", 3)[1],
        adaLN="final_modulation/kernel" in params,
        norm_affine=True,
        embedding="released",
        num_classes=_shape(params, labels, 2)[0] - 1 if labels in params else 0,
    )


def _paths(config: ModelConfig) -> dict[str, list[str]]:
    """For each of our parameters, the paths of small-vision's parameters that it consists of, joined on axis 0."""
    singles = {
        "pos_embed": "pos_embedding",
        "cls_token": "cls",
        "mask_token": "image_mask_embedding",
        "decoder_pos_embed": "dec_pos_embedding",
    }
    linears = {
        "t_embedder.mlp.0": ["time_trunk/Dense_0"],
        "t_embedder.mlp.2": ["time_trunk/Dense_1"],
        "x_embedder": ["embedding"],
        "head": ["final_conv"],
    }
    if config.num_classes:
        singles["y_embedder.embedding_table.weight"] = "label_emb/embedding/embedding"
        linears["y_embedder.mlp.0"] = ["label_trunk/Dense_0"]
        linears["y_embedder.mlp.2"] = ["label_trunk/Dense_1"]
    norms, modulations = {}, []
    towers = (("encoder", "Encoder", config.depth), ("decoder", "Decoder", config.decoder_depth))
    for ours, theirs, depth in towers:
        norms[f"{ours}.norm"] = f"{theirs}/encoder_norm"  # its name in both towers
        for i in range(depth):
            name, path = f"{ours}.layers.{i}", f"{theirs}/Encoder1DBlock_{i}"
            attention = f"{path}/MultiHeadDotProductAttention_0"
            norms[f"{name}.norm1"] = f"{path}/LayerNorm_0"
            norms[f"{name}.norm2"] = f"{path}/LayerNorm_1"
            linears[f"{name}.attn.qkv"] = [f"{attention}/{part}" for part in ("query", "key", "value")]
            linears[f"{name}.attn.proj"] = [f"{attention}/out"]
            linears[f"{name}.mlp.fc1"] = [f"{path}/MlpBlock_0/Dense_0"]
            linears[f"{name}.mlp.fc2"] = [f"{path}/MlpBlock_0/Dense_1"]
            modulations.append(f"{path}/Dense_0")
    if config.adaLN:
        for i, path in enumerate([*modulations, "final_modulation"]):
            linears[f"adaLN_modulation.{i}"] = [path]
    paths = {name: [path] for name, path in singles.items()}
    for name, parts in linears.items():
        paths[f"{name}.weight"] = [f"{part}/kernel" for part in parts]
        paths[f"{name}.bias"] = [f"{part}/bias" for part in parts]
    for name, path in norms.items():
        paths[f"{name}.weight"], paths[f"{name}.bias"] = [f"{path}/scale"], [f"{path}/bias"]
    return paths


def _to_ours(path: str, a: np.ndarray) -> np.ndarray:
    """One of small-vision's arrays in the layout of our parameter, or of its part."""
    if path == "embedding/kernel":  # [P, P, C, D]
        return a.transpose(3, 2, 0, 1).reshape(a.shape[-1], -1)
    if path == "final_conv/kernel":  # [P, P, D, 2C], flipped
        return a[::-1, ::-1].transpose(3, 0, 1, 2).reshape(-1, a.shape[2])
    if path.endswith("/out/kernel"):  # [H, d, D]
        return a.reshape(-1, a.shape[-1]).T
    if path.endswith("/kernel"):  # [in, out]; q, k and v: [D, H, d]
        return a.reshape(len(a), -1).T
    if path.endswith(("/bias", "/scale")) or path == "image_mask_embedding":
        return a.reshape(-1)
    return a.reshape(-1, a.shape[-1])


def _to_theirs(path: str, a: np.ndarray, config: ModelConfig) -> np.ndarray:
    D, H, P = config.hidden_size, config.num_heads, config.patch_size
    if path == "embedding/kernel":
        return a.reshape(D, -1, P, P).transpose(2, 3, 1, 0)
    if path == "final_conv/kernel":
        return a.reshape(-1, P, P, D).transpose(1, 2, 3, 0)[::-1, ::-1]
    if path.endswith("/out/kernel"):
        return a.T.reshape(H, D // H, D)
    if path.endswith(("/query/kernel", "/key/kernel", "/value/kernel")):
        return a.T.reshape(D, H, D // H)
    if path.endswith(("/query/bias", "/key/bias", "/value/bias")):
        return a.reshape(H, D // H)
    if path.endswith("/kernel"):
        return a.T
    if path == "image_mask_embedding":
        return a.reshape(1, 1, D)
    return a[None] if path in ("cls", "pos_embedding", "dec_pos_embedding") else a


def _unstack(params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Give each block of a scanned tower its own name."""
    unstacked = {}
    for path, array in params.items():
        if _SCANNED in path:
            for i, one in enumerate(array):
                unstacked[path.replace(_SCANNED, f"Encoder1DBlock_{i}/")] = one
        else:
            unstacked[path] = array
    return unstacked


def _depth(params: Mapping[str, np.ndarray], tower: str) -> int:
    found = (re.match(rf"{tower}/Encoder1DBlock_(\d+)/", path) for path in params)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _get(params: Mapping[str, np.ndarray], path: str) -> np.ndarray:
    if path not in params:
        raise UserError(f"parameter {path} is missing; {_FOREIGN}")
    return params[path]


def _shape(params: Mapping[str, np.ndarray], path: str, ndim: int) -> tuple[int, ...]:
    shape = _get(params, path).shape
    if len(shape) != ndim:
        raise UserError(f"parameter {path}: expected {ndim} dimensions, got shape {list(shape)}; {_FOREIGN}")
    return shape


def _float32(a: np.ndarray) -> np.ndarray:
    """Convert to float32. NumPy has no bfloat16, which small-vision uses: .npz files hold it as two raw bytes."""
    if a.dtype.kind == "V" and a.dtype.itemsize == 2:
        return (a.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return a.astype(np.float32, copy=False)
