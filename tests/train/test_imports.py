"""`umd import`: the authors' files become runs; what is no such file is told apart, and no code in it runs."""

import argparse
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from umd.cli import main
from umd.config import ModelConfig
from umd.errors import UserError
from umd.methods import build_model
from umd.peers import DIT, MASKDIT
from umd.published import load_published
from umd.train.imports import imported_config
from umd.train.options import Cluster
from umd.train.plan import print_plan
from umd.train.run import read_config
from umd.train.step_counts import count_gpu_step
from umd.train.weights import load_model

WIDTH, SIDE, PATCH = 32, 8, 4


def block(norms):
    D = WIDTH
    shapes = {"attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (4 * D, D), "mlp.fc2": (D, 4 * D)}
    found = {}
    for name, shape in shapes.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in ("norm1", "norm2") if norms else ():
        found |= {f"{name}.weight": (D,), f"{name}.bias": (D,)}
    return found


def linear(name, out, into):
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def dit_shapes(classes=3):
    """facebookresearch/DiT on 8x8 pictures in colour, with a learned sigma."""
    D, L = WIDTH, (SIDE // PATCH) ** 2
    shapes = {"pos_embed": (1, L, D), "x_embedder.proj.weight": (D, 3, PATCH, PATCH), "x_embedder.proj.bias": (D,)}
    shapes |= linear("t_embedder.mlp.0", D, 256) | linear("t_embedder.mlp.2", D, D)
    shapes["y_embedder.embedding_table.weight"] = (classes + 1, D)
    for i in range(2):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block(False).items()}
        shapes |= linear(f"blocks.{i}.adaLN_modulation.1", 6 * D, D)
    return shapes | linear("final_layer.linear", 6 * PATCH**2, D) | linear("final_layer.adaLN_modulation.1", 2 * D, D)


def maskdit_shapes(classes=3, width=16):
    shapes = dit_shapes() | linear("final_layer.linear", 3 * PATCH**2, width)
    shapes |= linear("final_layer.adaLN_modulation.1", 2 * width, WIDTH)
    shapes["y_embedder.embedding_table.weight"] = (WIDTH, classes)
    shapes |= {"mask_token": (1, 1, width), "decoder_pos_embed": (1, 4, width)}
    shapes |= linear("decoder_layer.linear", width, WIDTH) | linear(
        "decoder_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH
    )
    for name, shape in block(False).items():
        shapes[f"decoder_blocks.0.{name}"] = tuple(n // WIDTH * width for n in shape)
    return shapes | linear("decoder_blocks.0.adaLN_modulation.1", 6 * width, WIDTH)


def mae_shapes(decoder=True, classes=0):
    D, L, width = WIDTH, (SIDE // PATCH) ** 2, 16
    shapes = {"cls_token": (1, 1, D), "pos_embed": (1, L + 1, D)}
    shapes |= {"patch_embed.proj.weight": (D, 3, PATCH, PATCH), "patch_embed.proj.bias": (D,)}
    for i in range(2):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block(True).items()}
    norm = "fc_norm" if classes else "norm"
    shapes |= {f"{norm}.weight": (D,), f"{norm}.bias": (D,)}
    if classes:
        return shapes | linear("head", classes, D)
    if not decoder:
        return shapes
    shapes |= {"mask_token": (1, 1, width), "decoder_pos_embed": (1, L + 1, width)} | linear("decoder_embed", width, D)
    for name, shape in block(True).items():
        shapes[f"decoder_blocks.0.{name}"] = tuple(n // D * width for n in shape)
    shapes |= {"decoder_norm.weight": (width,), "decoder_norm.bias": (width,)}
    return shapes | linear("decoder_pred", 3 * PATCH**2, width)


def weights(shapes, seed=0):
    rng = torch.Generator().manual_seed(seed)
    state = {name: torch.randn(shape, generator=rng) * 0.1 for name, shape in shapes.items()}
    for name in state:
        if "pos_embed" in name and state[name].shape[1] == 5:
            state[name][0, 0] = 0  # the CLS token has no position
    return state


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("bright", "dark"):
        (folder / name).mkdir()
        for i in range(20):
            low = 128 if name == "bright" else 0
            Image.fromarray(rng.integers(low, low + 128, (8, 8, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def test_a_dit_samples_probes_and_goes_on_training(pictures, tmp_path, capsys):
    """A checkpoint of its training script: weights, EMA, optimiser and options."""
    model, ema = weights(dit_shapes()), weights(dit_shapes(), 1)
    torch.save({"model": model, "ema": ema, "opt": {}, "args": argparse.Namespace(model="DiT")}, tmp_path / "dit.pt")
    run, tuned = tmp_path / "dit", tmp_path / "tuned"
    main(["import", "dit", f"{tmp_path / 'dit.pt'}", "--out", f"{run}", "--num-heads", "2", "--source", f"{pictures}"])
    assert "EMA" in capsys.readouterr().out
    assert torch.equal(load_model(run).get_parameter("encoder.layers.1.mlp.fc1.bias"), ema["blocks.1.mlp.fc1.bias"])
    assert torch.equal(
        load_model(run, ema=False).get_parameter("head.bias")[:16], model["final_layer.linear.bias"][::6]
    )
    main(["sample", f"{run}", "--per-class", "1", "--steps", "2", "--cfg-scale", "2"])
    assert np.load(run / "samples.npz")["arr_0"].shape == (3, 8, 8, 3)
    main(["probe", f"{run}", "--shots", "5", "--l2", "1"])
    options = ["--steps", "2", "--batch-size", "8", "--out", f"{tuned}", "--draw-every", "2", "--data.num-workers", "0"]
    main(["finetune", f"{run}", *options])
    assert read_config(tuned).model.num_classes == 2 and (tuned / "checkpoints").is_dir()


def test_a_maskdit_samples_and_goes_on_training(pictures, tmp_path):
    torch.save({"ema": weights(maskdit_shapes())}, tmp_path / "maskdit.pt")
    run = tmp_path / "maskdit"
    main(
        [
            "import",
            "maskdit",
            f"{tmp_path / 'maskdit.pt'}",
            "--out",
            f"{run}",
            "--num-heads",
            "2",
            "--decoder-num-heads",
            "2",
            "--source",
            f"{pictures}",
        ]
    )
    main(["sample", f"{run}", "--per-class", "1", "--steps", "2", "--cfg-scale", "2"])
    assert np.load(run / "samples.npz")["arr_0"].shape == (3, 8, 8, 3)
    options = ["--steps", "2", "--batch-size", "8", "--draw-every", "0", "--data.num-workers", "0"]
    main(["finetune", f"{run}", *options, "--out", f"{tmp_path / 'tuned'}", "--objective.mask-ratio", "0.5"])
    assert not load_model(tmp_path / "tuned").get_parameter("y_embedder.embedding_table.weight")[-1].any()


@pytest.mark.parametrize("decoder", [True, False])
def test_an_mae_probes_and_classifies(pictures, tmp_path, decoder, capsys):
    torch.save({"model": weights(mae_shapes(decoder))}, tmp_path / "mae.pth")
    run = tmp_path / "mae"
    command = ["import", "mae", f"{tmp_path / 'mae.pth'}", "--out", f"{run}", "--num-heads", "2"]
    if decoder:  # any number of heads fits the weights
        with pytest.raises(SystemExit):
            main(command)
        assert "how many heads a decoder 16 wide has; give --decoder-num-heads" in capsys.readouterr().err
    main([*command, "--decoder-num-heads", "4", "--source", f"{pictures}"])
    assert ("does not tell whether this MAE predicts normalised patches" in capsys.readouterr().out) == decoder
    assert read_config(run).model.decoder_num_heads == (4 if decoder else 0)
    main(["evaluate", f"{run}", "--shots", "5", "--errors", "4"])
    assert ("no decoder" in capsys.readouterr().out) != decoder
    options = ["--steps", "1", "--batch-size", "8", "--draw-every", "0", "--data.num-workers", "0"]
    main(["finetune", f"{run}", "--task", "classify", "--out", f"{tmp_path / 'tuned'}", *options])
    for command in (["sample", f"{run}"], ["finetune", f"{run}"]):
        with pytest.raises(SystemExit):
            main(command)
        assert "MAE" in capsys.readouterr().err


def test_a_fine_tuned_mae_is_a_classifier(pictures, tmp_path):
    state = weights(mae_shapes(classes=4))
    state["pos_embed"][0, 0] = 0.3  # learned in fine-tuning
    torch.save({"model": state}, tmp_path / "mae.pth")
    config, tensors, _ = load_published("mae", tmp_path / "mae.pth", num_heads=2)
    assert (config.num_classes, config.pool, config.pixel_stats) == (4, "mean_norm", "imagenet")
    assert torch.equal(tensors["model"]["cls_token"], state["cls_token"][0] + 0.3)


def test_a_fine_tuned_mae_is_scored(pictures, tmp_path, capsys):
    """A head that answers "dark" to all: right for the dark ones."""
    state = weights(mae_shapes(classes=2))
    state["head.weight"].zero_()
    state["head.bias"] = torch.tensor([-1.0, 1.0])
    torch.save({"model": state}, tmp_path / "mae.pth")
    run = tmp_path / "run"
    main(["import", "mae", f"{tmp_path / 'mae.pth'}", "--out", f"{run}", "--num-heads", "2", "--source", f"{pictures}"])
    main(["evaluate", f"{run}", "--split", "train"])
    scores = json.loads((run / "scores.json").read_text())
    bright, dark = scores["confusion"]
    assert bright[0] == dark[0] == 0 and bright[1] + dark[1] == scores["images"] > 30
    assert scores["top-1"] == dark[1] / scores["images"] and scores["top-5"] == 1
    assert scores["classes"] == ["bright", "dark"]
    torch.save({"model": weights(mae_shapes(classes=4))}, tmp_path / "four.pth")
    main(["import", "mae", f"{tmp_path / 'four.pth'}", "--out", f"{tmp_path / 'four'}", "--num-heads", "2"])
    with pytest.raises(SystemExit):
        main(["evaluate", f"{tmp_path / 'four'}", "--source", f"{pictures}"])
    assert "tells 4 classes apart, and" in capsys.readouterr().err


def test_holes_are_filled_in_pixels(pictures, tmp_path, capsys):
    """A decoder whose head gives 0 in the network's units: ImageNet's mean colour."""
    state = weights(mae_shapes())
    for name in ("decoder_pred.weight", "decoder_pred.bias"):
        state[name].zero_()
    for norm_pix in (False, True):
        args = argparse.Namespace(norm_pix_loss=norm_pix, mask_ratio=0.6)
        torch.save({"model": state, "args": args}, tmp_path / "mae.pth")
        run = tmp_path / f"mae-{norm_pix}"
        heads = ["--num-heads", "2", "--decoder-num-heads", "2"]
        main(["import", "mae", f"{tmp_path / 'mae.pth'}", "--out", f"{run}", *heads])
        assert read_config(run).objective.mask_ratio_no_noise == 0.6
        command = ["inpaint", f"{run}", "--image", f"{pictures / 'dark' / '0.png'}", "--mask", "left"]
        if norm_pix:
            with pytest.raises(SystemExit):
                main(command)
            assert "predicts another target than pixels (normalised patches)" in capsys.readouterr().err
        else:
            main(command)
            with Image.open(run / "inpainting" / "1-sample-1.png") as filled:
                assert np.unique(np.asarray(filled)[:, :4].reshape(-1, 3), axis=0).tolist() == [[124, 116, 104]]


class Runs:
    """A pickle that would run a command."""

    def __reduce__(self):
        return os.system, ("touch owned",)


def test_what_is_no_such_file_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = weights(dit_shapes())

    def refused(kind, content, *words):
        torch.save(content, "file.pt")
        with pytest.raises(UserError) as error:
            load_published(kind, tmp_path / "file.pt", num_heads=2)
        for word in words:
            assert word in str(error.value), error.value

    refused("dit", {"model": Runs()}, "posix.system", "nothing of it was run")
    assert not (tmp_path / "owned").exists()
    refused("mae", good, "not an MAE", "patch_embed.proj.weight")
    refused("dit", weights(mae_shapes()), "not a DiT", "x_embedder.proj.weight")
    refused("maskdit", good, "not a MaskDiT")
    missing = {name: value for name, value in good.items() if name != "blocks.1.attn.qkv.bias"}
    refused("dit", missing, "lacks blocks.1.attn.qkv.bias")
    refused("dit", good | {"blocks.0.lora.weight": torch.zeros(2, 2)}, "has besides blocks.0.lora.weight")
    refused("dit", good | {"blocks.1.mlp.fc2.weight": torch.zeros(9, 4 * WIDTH)}, "blocks.1.mlp.fc2.weight [9, 128]")
    refused("dit", torch.zeros(3), "a Tensor")
    refused("dit", good | {"blocks.99999999.x": torch.zeros(1)}, "lacks blocks.2.")
    refused("dit", good | {"x_embedder.proj.weight": torch.zeros(32, 3, 0, 0)}, "not a DiT", "x_embedder.proj.weight")
    refused("dit", good | {"y_embedder.embedding_table.weight": torch.zeros(1, 32)}, "label table has one row")
    refused("dit", good | {"pos_embed": good["pos_embed"] * torch.nan}, "pos_embed holds NaN")
    refused("dit", good | {"pos_embed": good["pos_embed"].int()}, "pos_embed holds torch.int32")
    refused("dit", {"model": good, "ema": weights(dit_shapes(classes=5))}, "holds two networks")
    moved = weights(mae_shapes())
    moved["decoder_pos_embed"][0, 0] = 1
    refused("mae", moved, "CLS token")
    torch.save(good, "file.pt")
    whole = (tmp_path / "file.pt").read_bytes()
    (tmp_path / "file.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="file.pt is damaged, or only a part"):
        load_published("dit", tmp_path / "file.pt", num_heads=2)
    (tmp_path / "file.pt").write_bytes(b"")
    with pytest.raises(SystemExit):
        main(["import", "dit", "file.pt", "--out", "run"])
    assert "file.pt is damaged, or only a part of a file" in capsys.readouterr().err and not (tmp_path / "run").exists()
    (tmp_path / "file.pt").write_bytes(b"no checkpoint at all")
    with pytest.raises(UserError, match="no checkpoint of PyTorch"):
        load_published("dit", tmp_path / "file.pt", num_heads=2)
    (tmp_path / "file.pt").write_bytes(whole)
    with pytest.raises(UserError, match="give --num-heads"):
        load_published("dit", tmp_path / "file.pt")
    with pytest.raises(UserError, match="there is no file"):
        load_published("dit", tmp_path / "other.pt")
    with pytest.raises(UserError, match="config.json"):
        load_published("dit", tmp_path)


def test_at_another_size(pictures, tmp_path):
    """Fine-tuned and probed on 16x16 pictures: 16 patches in the place of 4."""
    torch.save(weights(dit_shapes()), tmp_path / "dit.pt")
    run = tmp_path / "dit"
    main(["import", "dit", f"{tmp_path / 'dit.pt'}", "--out", f"{run}", "--num-heads", "2", "--source", f"{pictures}"])
    main(["probe", f"{run}", "--shots", "5", "--l2", "1", "--image-size", "16", "16"])
    options = ["--steps", "1", "--batch-size", "8", "--draw-every", "0", "--data.num-workers", "0"]
    main(["finetune", f"{run}", "--model.image-size", "16", "16", "--out", f"{tmp_path / 'large'}", *options])
    assert load_model(tmp_path / "large").get_parameter("pos_embed").shape == (16, WIDTH)
    options += ["--task", "classify", "--out", f"{tmp_path / 'classifier'}"]
    main(["finetune", f"{run}", "--model.image-size", "16", "16", *options])


@pytest.mark.parametrize("network", [DIT, MASKDIT | dict(decoder_depth=1, decoder_hidden_size=16, decoder_num_heads=2)])
def test_a_run_of_it_is_planned(network, tmp_path):
    """Its fixed positions have no gradient to wait for."""
    model = ModelConfig(**network | dict(image_size=(8, 8), patch_size=4, hidden_size=32, depth=1, num_heads=2))
    config = imported_config(model, tmp_path)
    print_plan(config, Cluster(), "dit", Console(quiet=True))
    network = build_model(model)
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    counts = count_gpu_step(config, 1, torch.float32, torch.float32)
    assert sum(n for n, _ in counts.gradients) == trained < counts.weights
