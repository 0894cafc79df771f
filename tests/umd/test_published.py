"""DiT, MAE and MaskDiT run by their authors' code, and here with its weights: the same numbers (tests/data)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from umd import published
from umd.config import ObjectiveConfig
from umd.embedders import timestep_features
from umd.masking import ids_keep_from_noise, layout
from umd.methods import build_objective
from umd.model import UMD, edm_denoised
from umd.ops import patchify, unpatchify
from umd.schedule import NoiseSchedule, edm_sigma

DATA = Path(__file__).parents[1] / "data"


def weight(name, shape, rng):
    """The recipe by which the weights were made there."""
    z = rng.standard_normal(shape)
    if len(shape) == 1:
        return 1 + 0.2 * z if name.endswith("weight") else 0.1 * z
    tables = ("mask_token", "cls_token", "embedding_table.weight")
    return 0.3 * z if name.endswith(tables) else z / np.sqrt(np.prod(shape[1:]))


class Theirs:
    """Their weights and their numbers."""

    def __init__(self, name):
        self.numbers = dict(np.load(DATA / f"published_{name}.npz", allow_pickle=False))
        rng, self.state = np.random.default_rng(0), {}
        for key, shape in json.loads(str(self.numbers["shapes"])).items():
            fixed = self.numbers.get(f"param::{key}")
            made = weight(key, shape, rng).astype(np.float32) if fixed is None else fixed
            self.state[key] = torch.from_numpy(made)

    def __getitem__(self, name):
        return torch.from_numpy(self.numbers[name])

    def check(self, ours, name, tolerance=2e-5):
        np.testing.assert_allclose(
            ours.detach().numpy(), self.numbers[name], rtol=tolerance, atol=tolerance, err_msg=name
        )

    def check_gradients(self, model, links, tolerance=2e-5):
        """Of matrices two products with random vectors are kept; of MaskDiT's largest nothing is."""
        there = {name.partition("@")[0] for name in self.numbers if name.startswith("grad::")}
        for name, link in links.items():
            parameter = model.get_parameter(name)
            if f"grad::{link.theirs}" not in there:
                continue
            g = link.to_theirs(parameter.grad).double().numpy()
            rng = np.random.default_rng(1)
            key, scale = f"grad::{link.theirs}", np.abs(g).max()
            if key in self.numbers:
                np.testing.assert_allclose(g, self.numbers[key], rtol=0, atol=tolerance * scale, err_msg=name)
            else:
                g = g.reshape(len(g), -1)
                rows = rng.standard_normal(len(g)) @ g, g @ rng.standard_normal(g.shape[1])
                for ours, kind in zip(rows, ("rows", "columns"), strict=True):
                    theirs = self.numbers[f"{key}@{kind}"]
                    atol = tolerance * np.abs(theirs).max() * 4
                    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=name)
            there.remove(key)
        assert not there


def build(config, state, dtype=torch.float32):
    model = UMD(config).to(dtype)
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module", params=["dit_sigma1", "dit_sigma0"])
def dit(request):
    theirs = Theirs(request.param)
    return theirs, *published.from_dit(theirs.state, num_heads=4)


def test_dit_outputs(dit, monkeypatch):
    theirs, config, state = dit
    x, t, y = theirs["x"], theirs["t"] + 1, theirs["y"]
    _, *parts = build(config, state).denoise(x, t, y)
    theirs.check(torch.cat(parts, 1), "out")
    theirs_of_t = theirs["timestep_embedding_256"]  # made in float32, in float64's computation too
    torch.testing.assert_close(timestep_features(t - 1, 256, "paper", torch.float32), theirs_of_t, rtol=0, atol=5e-5)
    monkeypatch.setattr("umd.embedders.timestep_features", lambda *_: theirs_of_t.double())
    _, *parts = build(config, state, torch.float64).denoise(x.double(), t, y)
    theirs.check(torch.cat(parts, 1), "out_f64", 1e-11)


def test_dit_loss_and_gradients(dit):
    theirs, config, state = dit
    model = build(config, state)
    objective = build_objective(config, ObjectiveConfig(no_noise_prob=0, mask_ratio=0), NoiseSchedule("linear"))
    B, L = 4, config.num_patches
    ids = torch.arange(B * L)
    c = objective.corruption(theirs["t"] + 1, ids, theirs["noise"], clean=0, labels=theirs["y"])
    theirs.check(unpatchify(objective.visible_patches(theirs["x"], c).view(B, L, -1), (8, 8), 2), "q_sample")
    loss, parts = objective(model, theirs["x"], c)
    mean = {name: theirs[f"training_losses::{name}"].mean() for name in ("loss", "mse")}
    torch.testing.assert_close(loss, mean["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(parts[0], mean["mse"], rtol=1e-5, atol=0)
    if "training_losses::vb" in theirs.numbers:
        torch.testing.assert_close(parts[1], theirs["training_losses::vb"].mean(), rtol=1e-4, atol=0)
    loss.backward()
    theirs.check_gradients(model, published.dit_links(config))


@pytest.fixture(scope="module", params=["mae_normpix0", "mae_normpix1"])
def mae(request):
    theirs = Theirs(request.param)
    return theirs, *published.from_mae(theirs.state, num_heads=4, decoder_num_heads=4)


def test_mae_outputs_loss_and_gradients(mae, request):
    theirs, config, state = mae
    model, x = build(config, state), theirs["imgs"]
    norm_pix = "normpix1" in request.node.name
    options = ObjectiveConfig(no_noise_prob=1, mask_ratio_no_noise=0.75, norm_pix=norm_pix)
    objective = build_objective(config, options, NoiseSchedule("cosine"))
    ids = ids_keep_from_noise(theirs["mask_noise"], (4,) * 4)
    c = objective.corruption(torch.zeros(0, dtype=torch.int64), ids, torch.zeros(0, dtype=torch.int64), clean=4)
    prediction = model(objective.visible_patches(x, c), ids, c.layout, c.timesteps)
    order = published.mae_links(config)["head.bias"]  # (P, P, C) there
    theirs_order = torch.stack([order.to_theirs(p) for p in prediction.flatten(0, 0)]).view(4, 16, 48)
    theirs.check(theirs_order, "pred")
    loss, _ = objective.loss(prediction, x, c)
    torch.testing.assert_close(loss, theirs["loss"], rtol=1e-5, atol=0)
    loss.backward()
    theirs.check_gradients(model, published.mae_links(config))


def test_mae_sees_whole_pictures(mae):
    theirs, config, state = mae
    model, B, L = build(config, state), 4, config.num_patches
    ids = torch.arange(B * L)
    batch = layout(config, (L,) * B, (0,) * B, torch.device("cpu"))
    patches = patchify(theirs["imgs"], 4).flatten(0, 1)
    prediction = model(patches, ids, batch, torch.zeros(1, dtype=torch.int64))
    order = published.mae_links(config)["head.bias"]
    theirs.check(torch.stack([order.to_theirs(p) for p in prediction]).view(4, 16, 48), "pred_mask0")


@pytest.fixture(scope="module")
def maskdit():
    theirs = Theirs("maskdit")
    config, state = published.from_maskdit(theirs.state, num_heads=4)
    return theirs, config, state


def labels_of(theirs):
    onehot = theirs["labels_onehot"]
    return torch.where(onehot.any(1), onehot.argmax(1), onehot.shape[1])


def test_maskdit_outputs_loss_and_gradients(maskdit):
    theirs, config, state = maskdit
    model, labels = build(config, state), labels_of(theirs)
    objective = build_objective(config, ObjectiveConfig(no_noise_prob=0, mask_ratio=0.5), NoiseSchedule("edm"))
    sigma, x0 = theirs["sigma"], theirs["x_clean"]
    ids = ids_keep_from_noise(theirs["mask_noise"], (8,) * 4)
    assert torch.equal(ids.view(4, 8) - torch.arange(4)[:, None] * 16, theirs["ids_keep"])
    c = objective.corruption(sigma.log() / 4, ids, theirs["n"], clean=0, labels=labels)
    prediction = model(objective.visible_patches(x0, c), ids, c.layout, c.timesteps, c.labels)
    s = sigma.view(-1, 1, 1, 1)
    theirs.check(edm_denoised(theirs["x_noisy"], model.to_images(prediction)[0], s), "D_masked_train", 5e-5)
    loss, parts = objective.loss(prediction, x0, c)
    torch.testing.assert_close(loss, theirs["loss_total"].mean(), rtol=1e-5, atol=0)
    torch.testing.assert_close(parts[:2], torch.stack([theirs["loss_dsm"].mean(), theirs["loss_mae"].mean()]))
    loss.backward()
    theirs.check_gradients(model, published.maskdit_links(config), 5e-5)
    assert not model.y_embedder.embedding_table.weight.grad[-1].any()  # the null class stays zero


def test_maskdit_whole_pictures(maskdit):
    theirs, config, state = maskdit
    model, B, L = build(config, state), 4, 16
    sigma = theirs["sigma"].view(-1, 1, 1, 1)
    batch = layout(config, (L,) * B, None, torch.device("cpu"))
    scale = (sigma**2 + 0.25).rsqrt()
    patches = patchify(theirs["x_noisy"] * scale, 2).flatten(0, 1)
    c_noise = theirs["sigma"].log() / 4
    (raw,) = model.to_images(model(patches, torch.arange(B * L), batch, c_noise, labels_of(theirs)))
    theirs.check(raw, "F_nomask_eval", 5e-5)
    theirs.check(edm_denoised(theirs["x_noisy"], raw, sigma), "D_nomask_eval", 5e-5)


def test_maskdit_as_a_sampler_calls_it(maskdit):
    """At model time t the noise is σ(t), and x_t is the noisy image over √(1 + σ²)."""
    theirs, config, state = maskdit
    model = build(config, state, torch.float64)
    t = torch.tensor([1, 400, 700, 1000])
    sigma = edm_sigma(t).view(-1, 1, 1, 1)
    x = theirs["x_clean"].double() + sigma * theirs["n"].double()
    x_start, eps = model.denoise(x / (1 + sigma**2).sqrt(), t, labels_of(theirs))
    torch.testing.assert_close(x_start + sigma * eps, x)
    patches = patchify(x * (sigma**2 + 0.25).rsqrt(), 2).flatten(0, 1)
    batch = layout(config, (16,) * 4, None, torch.device("cpu"))
    (raw,) = model.to_images(model(patches, torch.arange(64), batch, sigma.flatten().log() / 4, labels_of(theirs)))
    torch.testing.assert_close(edm_denoised(x, raw, sigma), x_start)


@pytest.mark.parametrize("name", ["dit_sigma0", "dit_sigma1", "mae_normpix0", "maskdit"])
def test_out_again_no_bit_is_lost(name):
    theirs = Theirs(name)
    kind = name.partition("_")[0]
    take, links = getattr(published, f"from_{kind}"), getattr(published, f"{kind}_links")
    config, state = take(theirs.state, num_heads=4)
    back = published.give(build(config, state), links(config))
    assert back.keys() == theirs.state.keys()
    for key, value in back.items():
        assert torch.equal(value, theirs.state[key]), key


@pytest.fixture(scope="module")
def vit_mae(tmp_path_factory):
    """transformers' own network with MAE's random weights, and the folder it writes."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTMAEConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, image_size=16, patch_size=4,
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=4,
        decoder_intermediate_size=128, norm_pix_loss=True, mask_ratio=0.75,
    )  # fmt: skip
    model = transformers.ViTMAEForPreTraining(config).eval()
    model.load_state_dict({k: torch.from_numpy(v) for k, v in random_weights(model.state_dict()).items()})
    folder = tmp_path_factory.mktemp("vit_mae")
    model.save_pretrained(folder)
    return model, folder


def random_weights(state):
    rng = np.random.default_rng(0)
    return {
        name: tensor.numpy() if "pos" in name else weight(name, tuple(tensor.shape), rng).astype(np.float32)
        for name, tensor in state.items()
    }


def test_transformers_vit_mae(vit_mae):
    theirs, folder = vit_mae
    config, tensors, norm_pix = published.load_published("mae", folder)
    assert norm_pix and config.norm_eps == 1e-12
    model = build(config, tensors["model"])
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(4, 16, generator=torch.Generator().manual_seed(1))
    out = theirs(pixel_values=x, noise=noise)
    ids = ids_keep_from_noise(noise, (4,) * 4)
    objective = build_objective(config, ObjectiveConfig(no_noise_prob=1, norm_pix=True), NoiseSchedule("cosine"))
    c = objective.corruption(torch.zeros(0, dtype=torch.int64), ids, torch.zeros(0, dtype=torch.int64), clean=4)
    loss, _ = objective(model, x, c)
    torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-6)


def test_diffusers_dit(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8,
        num_embeds_ada_norm=10, norm_eps=1e-6,
    ).eval()  # fmt: skip
    weights = random_weights(theirs.state_dict())
    for name in weights:  # one embedding for all blocks, as the published
        if ".norm1.emb." in name:
            weights[name] = weights[name.replace("blocks.1.", "blocks.0.")]
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
    theirs.save_pretrained(tmp_path / "transformer")
    config, tensors, _ = published.load_published("dit", tmp_path)
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, y = torch.tensor([0, 17, 500, 999]), torch.tensor([0, 3, 9, 10])
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=y).sample
        _, *parts = build(config, tensors["model"]).denoise(x, t + 1, y)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=2e-5, atol=2e-5)
