"""`umd export`: what the exported network gives in its own tool is what it gives here."""

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from umd.checkpoint import save_checkpoint
from umd.cli import main
from umd.config import ModelConfig
from umd.convert import from_small_vision, load_small_vision
from umd.errors import UserError
from umd.hub import UMDModel
from umd.images import from_uint8
from umd.model import UMD
from umd.peers import DIT, MAE
from umd.published import load_published
from umd.tokenizer import load_tokenizer
from umd.train.export import export
from umd.train.imports import import_run, imported_config
from umd.train.options import Export, Import
from umd.train.presets import PRESETS
from umd.train.run import read_config, write_config
from umd.train.weights import load_model

SMALL = dict(image_size=(8, 8), patch_size=4, hidden_size=32, depth=2, decoder_depth=1, num_heads=2)
QUIET = Console(quiet=True)
TIMM = Path(sys.prefix) / "timm"  # `make` installs it aside: it requires torchvision, which is of another torch


def write_run(folder, **changes) -> UMD:
    """A run of random weights."""
    model = UMD(ModelConfig(**{**SMALL, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2, generator=generator)
    write_config(imported_config(model.config, folder))
    save_checkpoint(
        folder / "checkpoints", 3, {"model": model.state_dict()}, {"config": {"model": asdict(model.config)}}
    )
    return model.eval()


def images(n=3, size=8):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("network", [{}, dict(norm_affine=False, num_cls=1), DIT | dict(num_classes=3)])
def test_hub(tmp_path, network):
    model = write_run(tmp_path / "run", **network)
    export(Export("hub", tmp_path / "run"), read_config(tmp_path / "run"), QUIET)
    again = UMDModel.from_pretrained(tmp_path / "run" / "hub")
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    card = (tmp_path / "run" / "hub" / "README.md").read_text()
    assert "from_pretrained" in card and "no classes" in card or "3 classes" in card


def test_transformers_vit(tmp_path):
    transformers = pytest.importorskip("transformers")
    model = write_run(tmp_path / "run", num_cls=1)
    export(Export("transformers", tmp_path / "run", tmp_path / "vit"), read_config(tmp_path / "run"), QUIET)
    vit = transformers.ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False).eval()
    with torch.no_grad():
        found = vit(images()).last_hidden_state[:, 0]
        torch.testing.assert_close(found, model.represent(images()), rtol=2e-5, atol=2e-5)


def test_an_mae_with_adaLN_goes_out_folded(tmp_path):
    """It is no ViTMAE, whose blocks know no time."""
    transformers = pytest.importorskip("transformers")
    network = dict(num_cls=1, outputs="x_start", decoder_hidden_size=16, decoder_num_heads=2)
    model = write_run(tmp_path / "run", **network)
    export(Export("transformers", tmp_path / "run", tmp_path / "vit"), read_config(tmp_path / "run"), QUIET)
    vit = transformers.ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False).eval()
    with torch.no_grad():
        found = vit(images()).last_hidden_state[:, 0]
        torch.testing.assert_close(found, model.represent(images()), rtol=2e-5, atol=2e-5)


def test_at_another_size(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_run(tmp_path / "run", num_cls=1)
    options = Export("transformers", tmp_path / "run", tmp_path / "vit", image_size=(16, 16))
    export(options, read_config(tmp_path / "run"), QUIET)
    vit = transformers.ViTModel.from_pretrained(tmp_path / "vit", add_pooling_layer=False).eval()
    model = load_model(tmp_path / "run", image_size=(16, 16))
    with torch.no_grad():
        found = vit(images(size=16)).last_hidden_state[:, 0]
        torch.testing.assert_close(found, model.represent(images(size=16)), rtol=2e-5, atol=2e-5)


def test_an_mae_comes_back_from_transformers_bit_for_bit(tmp_path):
    transformers = pytest.importorskip("transformers")
    network = MAE | dict(decoder_depth=1, decoder_hidden_size=16, decoder_num_heads=2, norm_eps=1e-12)
    network |= dict(pixel_stats="imagenet", gelu="tanh")
    model = write_run(tmp_path / "run", **network)
    export(Export("transformers", tmp_path / "run", tmp_path / "mae"), read_config(tmp_path / "run"), QUIET)
    config, tensors, told = load_published("mae", tmp_path / "mae")
    assert config == model.config and told == {"norm_pix": False, "mask_ratio_no_noise": 0.75}
    assert all(torch.equal(tensors["model"][name], value) for name, value in model.state_dict().items())
    theirs = transformers.ViTMAEForPreTraining.from_pretrained(tmp_path / "mae").eval()
    theirs.config.mask_ratio = 0.0
    with torch.no_grad():
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "mae")
        pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
        seen = torch.tensor(np.stack(processor(list(pictures), input_data_format="channels_last")["pixel_values"]))
        latent = theirs.vit(seen, noise=torch.arange(4.0).repeat(3, 1)).last_hidden_state[:, 0]
        torch.testing.assert_close(latent, model.represent(from_uint8(pictures)), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("network", [dict(num_classes=3), {}, DIT | dict(num_classes=3)])
def test_diffusers_pipeline(tmp_path, network, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = write_run(tmp_path / "run", **network)
    export(Export("diffusers", tmp_path / "run", tmp_path / "pipe"), read_config(tmp_path / "run"), QUIET)
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe", trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    labels = torch.tensor([0, 2, 1]) if model.config.num_classes else None
    with torch.no_grad():
        found = pipe.transformer(images(), torch.tensor([0, 7, 999]), labels).sample
        expected = torch.cat(model.denoise(images(), torch.tensor([1, 8, 1000]), labels)[1:], 1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    call = dict(class_labels=[0, 2], guidance_scale=2.0) if model.config.num_classes else dict(num_images=2)
    drawn = pipe(**call, num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert drawn.shape == (2, 8, 8, 3) and 0 <= drawn.min() < drawn.max() <= 1
    for name in ("UniPCMultistepScheduler", "HeunDiscreteScheduler", "DDIMScheduler", "EulerDiscreteScheduler"):
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
        assert np.isfinite(pipe(**call, num_inference_steps=3, output_type="np").images).all(), name
    if model.config.num_classes:
        with pytest.raises(ValueError, match="class_labels must be in 0..2, got"):
            pipe(class_labels=torch.tensor([7]))


def test_a_pipeline_guides_the_noise_and_not_the_variance(tmp_path):
    """DiT's forward_with_cfg: ε̂ is guided, v is that of the class."""
    diffusers = pytest.importorskip("diffusers")
    from umd.pipeline import UMDPipeline, UMDTransformer

    model = write_run(tmp_path / "run", **DIT | dict(num_classes=3, channels=4))
    given = []

    class Recorder(diffusers.DDPMScheduler):
        def step(self, output, t, x, generator=None):
            given.append((output, x, t))
            return super().step(output, t, x, generator=generator)

    pipe = UMDPipeline(UMDTransformer.of(model), Recorder(variance_type="learned_range", clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    pipe(class_labels=[0, 2], guidance_scale=4.0, num_inference_steps=2, output_type="latent")
    for output, x, t in given:
        times, labels = torch.full((2,), int(t) + 1), torch.tensor([0, 2])
        with torch.no_grad():
            _, eps, v = model.denoise(x, times, labels)
            _, null, _ = model.denoise(x, times, torch.tensor([3, 3]))
        torch.testing.assert_close(output, torch.cat([null + 4 * (eps - null), v], 1), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="this network makes latents"):
        pipe(class_labels=[0])
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    assert pipe(class_labels=[0], num_inference_steps=3, output_type="latent").images.shape == (1, 4, 8, 8)


def test_a_pipeline_decodes_as_sampling_does(tmp_path):
    """A VAE with a shift, of 3 channels, whose latents must not be clipped to -1..1."""
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=3, scaling_factor=0.5, shift_factor=0.7
    )
    vae.save_pretrained(tmp_path / "vae")
    write_run(tmp_path / "run", **DIT | dict(num_classes=3, channels=4))
    with pytest.raises(UserError, match="makes latents of 4 channels"):
        export(Export("diffusers", tmp_path / "run", tmp_path / "pipe"), read_config(tmp_path / "run"), QUIET)
    with pytest.raises(SystemExit):
        main(["sample", f"{tmp_path / 'run'}"])
    model = write_run(tmp_path / "rgb", num_classes=3)
    config = read_config(tmp_path / "rgb")
    tokenizer = load_tokenizer(str(tmp_path / "vae"))
    data = replace(config.data, vae=str(tmp_path / "vae"), vae_hash=tokenizer.vae.sha256)
    export(Export("diffusers", tmp_path / "rgb", tmp_path / "pipe"), replace(config, data=data), QUIET)
    from umd.pipeline import UMDPipeline, UMDTransformer

    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path / "pipe" / "scheduler")
    assert not scheduler.config.clip_sample and scheduler.config.timestep_spacing == "trailing"
    pipe = UMDPipeline(UMDTransformer.of(model), scheduler, diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae"))
    pipe.set_progress_bar_config(disable=True)
    call = dict(class_labels=[0], num_inference_steps=2)
    z, found = (
        pipe(**call, output_type=o, generator=torch.Generator().manual_seed(0)).images for o in ("latent", "np")
    )
    expected = (tokenizer.decode(z) / 2 + 0.5).clamp(0, 1)
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1).detach().numpy(), atol=1e-5)


def test_small_vision_and_back(tmp_path):
    model = write_run(tmp_path / "run", embedding="released", num_cls=4)
    main(["export", "small-vision", f"{tmp_path / 'run'}", "--out", f"{tmp_path / 'out'}"])
    config, state = from_small_vision(load_small_vision(tmp_path / "out" / "checkpoint.npz"))
    assert config == model.config
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    import_run(Import("small-vision", tmp_path / "out" / "checkpoint.npz", tmp_path / "again"), QUIET)
    assert load_model(tmp_path / "again").config == model.config


# timm's own code, with names in the place of torchvision's that its import asks for and a ViT never uses.
USE_TIMM = """
import sys, types
from importlib.machinery import ModuleSpec
class Named(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name
class Anything(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Named(name, (), {})
for name in ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".utils", ".models",
             ".models.feature_extraction"):
    module = Anything("torchvision" + name)
    module.__spec__ = ModuleSpec("torchvision" + name, None)
    sys.modules["torchvision" + name] = module
    parent, _, child = ("torchvision" + name).rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
sys.path.insert(0, sys.argv[1])
import numpy as np, torch, timm
x = torch.from_numpy(np.load(sys.argv[2]))
for folder in sys.argv[3:]:
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    with torch.no_grad():
        np.savez(folder + ".npz", tokens=model.forward_features(x), pooled=model(x))
"""


@pytest.mark.skipif(not TIMM.exists(), reason="timm is not installed")
def test_timm(tmp_path):
    """One CLS token, four, and none."""
    networks = {"one": dict(num_cls=1), "four": dict(num_cls=4), "dit": DIT | dict(num_classes=3)}
    expected = {}
    for name, network in networks.items():
        model = write_run(tmp_path / f"run-{name}", **network)
        options = Export("timm", tmp_path / f"run-{name}", tmp_path / name)
        export(options, read_config(options.run), QUIET)
        with torch.no_grad():
            expected[name] = model.represent(images()).numpy()
    np.save(tmp_path / "x.npy", images().numpy())
    arguments = [TIMM, tmp_path / "x.npy", *(tmp_path / name for name in networks)]
    done = subprocess.run([sys.executable, "-c", USE_TIMM, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, ours in expected.items():
        found = np.load(tmp_path / f"{name}.npz")
        theirs = found["tokens"][:, :4].mean(1) if name == "four" else found["pooled"]
        np.testing.assert_allclose(theirs, ours, rtol=2e-5, atol=2e-5, err_msg=name)


def test_what_has_no_counterpart_is_refused(tmp_path):
    def refused(kind, words, out="out", **network):
        run = tmp_path / words.replace(" ", "-")
        write_run(run, **network)
        with pytest.raises(UserError, match=words):
            export(Export(kind, run, tmp_path / out), read_config(run), QUIET)
        assert not (tmp_path / out).exists() or out == "full"

    refused("timm", "condition token", adaLN=False)
    refused("transformers", "this network 4", num_cls=4)
    refused("transformers", "8x16", image_size=(8, 16))
    refused("diffusers", "draws no samples", **MAE)
    refused("small-vision", "embedding released")
    lacks = dict(gelu="exact", outputs="eps_sigma", positions="sincos", norm_eps=1e-3, decoder_hidden_size=16)
    for name, value in lacks.items():
        network = {name: value, "embedding": "released", "num_cls": 4}
        refused("small-vision", f"it would need {name}", **network, **{"decoder_num_heads": 2} if "hid" in name else {})
    refused("small-vision", "num_cls above 0", num_cls=0, embedding="released")
    refused("timm", "timm's ViT has 1e-6 in its norms, this network 0.01", norm_eps=0.01)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    refused("timm", "is there already", out="full")


def test_a_card_names_the_length_that_the_run_obeys():
    assert PRESETS["umd-tiny"][1].length == "10 minutes"
    assert replace(PRESETS["umd-tiny"][1], steps=7).length == "7 steps"
    assert PRESETS["umd-b4"][1].length == "800 epochs"
