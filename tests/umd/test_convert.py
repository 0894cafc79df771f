"""Weights of the authors' code, in and out."""

import re
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from rich.console import Console

from umd.checkpoint import load_checkpoint, load_model_state
from umd.config import ModelConfig
from umd.convert import from_small_vision, load_small_vision, to_small_vision
from umd.errors import UserError
from umd.model import UMD
from umd.train.imports import import_run
from umd.train.options import Import

TINY = dict(hidden_size=16, depth=2, decoder_depth=2, num_heads=2, embedding="released")


@pytest.fixture(params=["adaln", "noadaln"])
def params(request, data_dir):
    return load_small_vision(data_dir / f"umd_{request.param}.npz")


def randomised(config: ModelConfig) -> UMD:
    model, generator = UMD(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    return model


def assert_same(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].shape == b[name].shape and (a[name] == b[name]).all(), name


def stacked(params: dict) -> dict:
    """The tree of scan=True: the blocks of a tower as one, on axis 0."""
    stacks: dict[str, list] = {}
    for path in sorted(params):
        if "/Encoder1DBlock_" in path:
            name = re.sub(r"Encoder1DBlock_\d+", "ScanCheckpointEncoder1DBlock_0", path)
            stacks.setdefault(name, []).append(params[path])
    others = {path: a for path, a in params.items() if "/Encoder1DBlock_" not in path}
    return others | {path: np.stack(arrays) for path, arrays in stacks.items()}


def test_config_from_shapes(data_dir):
    config, _ = from_small_vision(load_small_vision(data_dir / "umd_adaln.npz"))
    assert config == ModelConfig(
        image_size=(16, 16),
        channels=3,
        patch_size=4,
        hidden_size=64,
        depth=2,
        decoder_depth=1,
        num_heads=4,
        num_cls=4,
        adaLN=True,
        norm_affine=True,
        embedding="released",
        num_classes=10,
    )
    assert not from_small_vision(load_small_vision(data_dir / "umd_noadaln.npz"))[0].adaLN


def test_round_trip_is_exact(params):
    config, state = from_small_vision(params)
    model = UMD(config)
    model.load_state_dict(state)
    assert_same(to_small_vision(model), params)


@pytest.mark.parametrize("adaLN", [True, False])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_round_trip_from_our_side(adaLN, num_classes):
    changes = dict(image_size=(8, 8), channels=4, patch_size=2, num_cls=1, mlp_ratio=2.0)
    config = ModelConfig(**TINY, **changes, adaLN=adaLN, num_classes=num_classes)
    model = randomised(config)
    found, state = from_small_vision(to_small_vision(model))
    assert found == config
    assert_same(state, model.state_dict())


def test_scanned_blocks(params):
    scanned = stacked(params)
    assert len(scanned) < len(params)
    assert_same(from_small_vision(scanned)[1], from_small_vision(params)[1])


def test_raw_bfloat16(params):
    """A bfloat16 array in a .npz file comes back as two raw bytes an element."""
    exact = np.float32([[[1.5, -0.15625, 2.0**-120, -3.0e38]]]).view(np.uint32)
    raw = (exact >> 16).astype(np.uint16)
    D = params["cls"].shape[-1]
    params["image_mask_embedding"] = np.tile(raw, D // 4).view(np.dtype("V2"))
    _, state = from_small_vision(params)
    expected = (raw.astype(np.uint32) << 16).view(np.float32)
    assert (state["mask_token"].view(-1, 4).numpy() == expected[0]).all()


def test_import_writes_a_checkpoint(params, tmp_path):
    trainer = {f"params/{path}": a for path, a in params.items()}
    trainer |= {f"ema_params/{path}": a * 2 for path, a in params.items()}
    np.savez(tmp_path / "theirs.npz", **trainer, **{"opt/0/count": np.int32(7)})
    import_run(Import("small-vision", tmp_path / "theirs.npz", tmp_path / "ours"), Console(quiet=True))
    checkpoint = load_checkpoint(tmp_path / "ours" / "checkpoints")
    model = UMD(ModelConfig(**checkpoint.state["config"]["model"]))
    load_model_state(model, checkpoint.tensors["model"])
    assert_same(to_small_vision(model), params)
    load_model_state(model, checkpoint.tensors["ema"])
    assert_same(to_small_vision(model), {path: a * 2 for path, a in params.items()})


def test_bare_names(params, tmp_path):
    np.savez(tmp_path / "bare.npz", **params)
    assert_same(load_small_vision(tmp_path / "bare.npz"), params)
    assert load_small_vision(tmp_path / "bare.npz", "ema_params") == {}
    import_run(Import("small-vision", tmp_path / "bare.npz", tmp_path / "ours"), Console(quiet=True))
    assert load_checkpoint(tmp_path / "ours" / "checkpoints").tensors.keys() == {"model"}


def test_tensorstore_folder(params, tmp_path):
    """As jax's serialisation writes them: zarr, zstd, one chunk a device, `/` become `~`."""
    tensorstore = pytest.importorskip("tensorstore")
    folder = tmp_path / "checkpoint.bv-000000010-tmp"
    (tmp_path / "checkpoint.bv-LAST").write_text("000000010-tmp")
    for path, a in {**params, "opt/0/count": np.zeros(1)}.items():
        name = path.replace("/", "~") if path.startswith("opt") else "params~" + path.replace("/", "~")
        chunks = [(n + 1) // 2 for n in a.shape]
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": str(folder / name)},
            "metadata": {
                "compressor": {"id": "zstd"},
                "shape": a.shape,
                "chunks": chunks,
                "dtype": a.dtype.str,
            },
        }
        tensorstore.open(spec, create=True, open=True).result().write(a).result()
    assert_same(load_small_vision(folder), params)
    assert_same(load_small_vision(tmp_path / "checkpoint.bv"), params)
    assert load_small_vision(folder, "ema_params") == {}


@pytest.mark.skipif(find_spec("tensorstore") is not None, reason="tensorstore is installed")
def test_folder_without_tensorstore(tmp_path):
    (tmp_path / "params~cls").mkdir()
    with pytest.raises(UserError, match="pip install tensorstore"):
        load_small_vision(tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        "cls",
        "embedding/kernel",
        "Decoder/encoder_norm/scale",
        "Encoder/Encoder1DBlock_1/MultiHeadDotProductAttention_0/value/bias",
        "label_trunk/Dense_0/bias",
    ],
)
def test_missing_parameter_is_named(params, path):
    del params[path]
    with pytest.raises(UserError, match=f"parameter {path} is missing"):
        from_small_vision(params)


def test_unknown_parameter_is_named(params):
    params["Encoder/Encoder1DBlock_0/Gate_0/kernel"] = np.zeros(3)
    with pytest.raises(UserError, match="Encoder/Encoder1DBlock_0/Gate_0/kernel"):
        from_small_vision(params)


def test_wrong_shapes_are_named(params):
    wrong = dict(params, **{"time_trunk/Dense_0/kernel": params["time_trunk/Dense_0/kernel"].T})
    with pytest.raises(UserError, match=r"time_trunk/Dense_0/kernel \[128, 64\].*t_embedder.mlp.0.weight"):
        from_small_vision(wrong)
    wrong = dict(params, cls=params["cls"][0])
    with pytest.raises(UserError, match=r"cls: expected 3 dimensions, got shape \[4, 64\]"):
        from_small_vision(wrong)


def test_images_that_are_not_square_are_refused():
    params = to_small_vision(UMD(ModelConfig(image_size=(8, 16), **TINY)))
    with pytest.raises(UserError, match="expected the weights of one network, of square images"):
        from_small_vision(params)


def test_no_counterpart():
    for changes in (dict(embedding="paper"), dict(norm_affine=False)):
        with pytest.raises(UserError, match="no counterpart"):
            to_small_vision(UMD(ModelConfig(**{**TINY, **changes})))


def test_unreadable_files(params, tmp_path):
    with pytest.raises(UserError, match="no file or folder"):
        load_small_vision(tmp_path / "absent.npz")
    np.savez(tmp_path / "whole.npz", **params)
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.npz").write_bytes(whole[:5000] + b"\xff" * 50 + whole[5050:])
    np.savez(tmp_path / "pickle.npz", cls=np.array([print], dtype=object))
    np.save(tmp_path / "single.npy", np.zeros(3))
    for name in ("cut.npz", "flipped.npz", "pickle.npz", "single.npy"):
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            load_small_vision(tmp_path / name)
