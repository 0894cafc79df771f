"""DiT, MAE and MaskDiT run by their authors' code, and here with its weights: the same numbers (tests/data)."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from umd import published
from umd.config import ModelConfig, ObjectiveConfig
from umd.embedders import timestep_features
from umd.errors import UserError
from umd.guidance import Estimator, Guidance
from umd.masking import ids_keep_from_noise, layout
from umd.methods import build_objective
from umd.model import UMD, edm_denoised
from umd.ops import ddim_step, patchify, unpatchify
from umd.peers import mae_pixels, mae_target
from umd.sampler import _log_variances
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


MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))  # ImageNet's


@pytest.mark.parametrize("norm_pix", [True, False])
def test_transformers_vit_mae(vit_mae, norm_pix):
    """Its pictures are normalised by ImageNet's statistics, ours are in -1..1."""
    theirs, folder = vit_mae
    config, tensors, told = published.load_published("mae", folder)
    assert told == {"norm_pix": True, "mask_ratio_no_noise": 0.75}
    assert config.norm_eps == 1e-12 and config.pixel_stats == "imagenet"
    model = build(config, tensors["model"])
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.rand(4, 16, generator=torch.Generator().manual_seed(1))
    theirs.config.norm_pix_loss = norm_pix
    out = theirs(pixel_values=(pixels - MEAN) / STD, noise=noise)
    ids = ids_keep_from_noise(noise, (4,) * 4)
    objective = build_objective(config, ObjectiveConfig(no_noise_prob=1, norm_pix=norm_pix), NoiseSchedule("cosine"))
    c = objective.corruption(torch.zeros(0, dtype=torch.int64), ids, torch.zeros(0, dtype=torch.int64), clean=4)
    loss, _ = objective(model, 2 * pixels - 1, c)
    torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-6)


def test_what_mae_predicts_comes_back_as_pixels():
    model, patches = ModelConfig(**published.MAE | dict(pixel_stats="imagenet")), torch.rand(2, 5, 48) * 2 - 1
    for norm_pix in (True, False):
        config = ObjectiveConfig(no_noise_prob=1, norm_pix=norm_pix)
        found = mae_pixels(mae_target(patches, model, config), patches, model, config)
        torch.testing.assert_close(found, patches, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="pixel_stats imagenet is for MAEs"):
        ModelConfig(pixel_stats="imagenet")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"hidden_act": "gelu_new"}, {"gelu": "tanh"}), ({"hidden_act": "relu"}, "the activation 'relu'"),
        ({"num_attention_heads": None}, "num_attention_heads must be a number above 0, and is None"),
        ({"num_attention_heads": "2"}, "num_attention_heads must be a number above 0, and is '2'"),
        ({"architectures": "ViTModel", "model_type": ""}, "holds a ViTModel; expected a ViTMAE"),
        ([], "holds a list"),
    ],
)  # fmt: skip
def test_the_settings_of_a_folder_are_read(vit_mae, tmp_path, changes, found):
    theirs, folder = vit_mae
    shutil.copytree(folder, tmp_path / "mae")
    file = tmp_path / "mae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes if changes else changes))
    if isinstance(found, dict):
        config = published.load_published("mae", tmp_path / "mae").config
        assert {name: getattr(config, name) for name in found} == found
        return
    with pytest.raises(UserError, match=re.escape(found)):
        published.load_published("mae", tmp_path / "mae")


def test_the_pixels_of_a_folder_are_those_of_its_processor(vit_mae, tmp_path):
    folder = shutil.copytree(vit_mae[1], tmp_path / "mae")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    assert published.load_published("mae", folder).config.pixel_stats == "half"
    file.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.2] * 3}))
    with pytest.raises(UserError, match="expected ImageNet's, or 0.5"):
        published.load_published("mae", folder)


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
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=5e-5, atol=5e-5)


def ddim10(theirs, config, state, labels, cfg_scale, clip):
    """create_diffusion("ddim10") at η = 0: model times 901, 801, …, 1, then the image."""
    schedule, times = NoiseSchedule("linear"), [*range(901, 0, -100)]
    estimate = Estimator(
        build(config, state).denoise, times, schedule, predict="eps", labels=labels, null_label=config.num_classes,
        cfg_scale=cfg_scale, channels=4, guidance=Guidance(channels=3),
    )  # fmt: skip
    x, alphas = theirs["noise"], schedule.alphas_cumprod[[*times, 0]]
    for i in range(len(times)):
        zero = torch.zeros((), dtype=torch.float64)
        moves = [alphas[i], 1 - alphas[i], alphas[i + 1], 1 - alphas[i + 1], zero]
        found = estimate(estimate.guided[i], x, *(table[i] for table in estimate.tables))
        coefficients = torch.stack(moves).sqrt().to(x)
        x, _ = ddim_step(x, found.cond, found.uncond, cfg_scale, coefficients, from_xstart=found.from_xstart, clip=clip)
    return x


def test_dit_samples(dit):
    """Guided, which there acts on three of four channels, and not."""
    theirs, config, state = dit
    with torch.no_grad():
        guided = ddim10(theirs, config, state, theirs["cfg_y"][:4], float(theirs["cfg_scale"]), clip=False)
        plain = ddim10(theirs, config, state, theirs["y"], 1.0, clip=True)
    for ours, name in ((guided, "ddim10_cfg_eta0"), (plain, "ddim10_uncfg_eta0")):
        expected = theirs[name][:4]  # guided values of random weights reach 200
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * float(expected.abs().max()), err_msg=name)


def test_dit_guidance_of_three_channels(dit):
    theirs, config, state = dit
    model, scale = build(config, state), float(theirs["cfg_scale"])
    for i, t in enumerate((theirs["cfg_t"][:4] + 1).tolist()):
        estimate = Estimator(
            model.denoise, [t], NoiseSchedule("linear"), predict="eps", labels=theirs["cfg_y"][i : i + 1],
            null_label=10, cfg_scale=scale, channels=4, guidance=Guidance(channels=3),
        )  # fmt: skip
        with torch.no_grad():
            found = estimate(True, theirs["cfg_x"][i : i + 1], *(table[0] for table in estimate.tables))
        np.testing.assert_allclose(found.cond[0], theirs["cfg_out"][i, :4], rtol=5e-5, atol=5e-5)


def test_dit_steps_of_learned_variance(dit):
    """`p_mean_variance` of create_diffusion("ddim10") at its steps 3, 6 and 9: x_t's next mean and log variance."""
    theirs, config, state = dit
    if config.outputs == "eps":
        pytest.skip("the variance is not learned")
    schedule, x, mean = NoiseSchedule("linear"), theirs["x"], theirs["ddim10_p_mean_variance::mean"]
    for i, step in enumerate(theirs["ddim10_t"].tolist()):
        if step == 0:
            continue  # adds no noise
        now, then = 100 * step + 1, 100 * (step - 1) + 1
        t = torch.full((1,), now)
        with torch.no_grad():
            _, eps, v = build(config, state).denoise(x[i : i + 1], t, theirs["y"][i : i + 1])
        least, largest = _log_variances(schedule, [now, then])[0].float()
        log_variance = (v + 1) / 2 * largest + (1 - v) / 2 * least
        theirs_log = theirs["ddim10_p_mean_variance::log_variance"][i]
        np.testing.assert_allclose(log_variance[0], theirs_log, rtol=1e-5, atol=1e-5)
        x_start = schedule.xstart_from_eps(x[i : i + 1], t, eps)
        alpha, after = schedule.alphas_cumprod[[now, then]].float()
        beta = 1 - alpha / after
        expected = (after.sqrt() * beta * x_start + (1 - beta).sqrt() * (1 - after) * x[i : i + 1]) / (1 - alpha)
        np.testing.assert_allclose(expected[0], mean[i], rtol=5e-5, atol=5e-5)


def test_maskdit_guidance(maskdit):
    theirs, config, state = maskdit
    model, labels = build(config, state), labels_of(theirs)
    x, sigma = theirs["x_noisy"], torch.full((4, 1, 1, 1), 2.0)
    batch, ids = layout(config, (16,) * 4, None, torch.device("cpu")), torch.arange(64)
    patches, c_noise = patchify(x * (sigma**2 + 0.25).rsqrt(), 2).flatten(0, 1), sigma.flatten().log() / 4
    with torch.no_grad():
        cond, uncond = (
            edm_denoised(x, model.to_images(model(patches, ids, batch, c_noise, y))[0], sigma)
            for y in (labels, torch.full_like(labels, 10))
        )
    np.testing.assert_allclose(uncond + 2 * (cond - uncond), theirs["D_cfg2_eval_sigma2"], rtol=5e-5, atol=5e-5)
