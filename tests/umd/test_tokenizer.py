"""The VAE behind latents: equal to diffusers' own numbers, known by its hash, and every wrong folder a sentence."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip("diffusers", reason="VAEs are those of diffusers: pip install diffusers")

from umd.errors import UserError  # noqa: E402
from umd.tokenizer import load_tokenizer  # noqa: E402


@pytest.fixture(autouse=True)
def anew():
    load_tokenizer.cache_clear()


def images(n=3, height=16, width=24):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_a_vae_gives_mean_and_std_scaled(vaes):
    network = diffusers.AutoencoderKL.from_pretrained(vaes["shifted"]).eval()
    posterior = network.encode(images()).latent_dist
    tokenizer = load_tokenizer(str(vaes["shifted"]))
    assert (tokenizer.vae.kind, tokenizer.vae.scale, tokenizer.vae.shift) == ("AutoencoderKL", 0.5, 0.25)
    moments = tokenizer.moments(images())
    assert moments.shape == (3, 2, *tokenizer.latent_shape(16, 24)) == (3, 2, 4, 8, 12)
    torch.testing.assert_close(moments[:, 0], (posterior.mean - 0.25) * 0.5)
    torch.testing.assert_close(moments[:, 1], posterior.std * 0.5)
    torch.testing.assert_close(tokenizer.decode(moments[:, 0]), network.decode(posterior.mean).sample)
    assert not any(parameter.requires_grad for parameter in tokenizer.network.parameters())


def test_a_vq_model_gives_what_it_quantizes(vaes):
    network = diffusers.VQModel.from_pretrained(vaes["vq"]).eval()
    encoded = network.encode(images()).latents
    tokenizer = load_tokenizer(str(vaes["vq"]))
    assert not tokenizer.stochastic and tokenizer.vae.channels == 3
    moments = tokenizer.moments(images())
    assert moments.shape == (3, 1, 3, 8, 12)
    torch.testing.assert_close(moments[:, 0], encoded * network.config.scaling_factor)
    torch.testing.assert_close(tokenizer.decode(moments[:, 0]), network.decode(encoded).sample)


def test_many_images_are_encoded_as_few(vaes, monkeypatch):
    tokenizer = load_tokenizer(str(vaes["kl"]))
    x = images(7)
    together = tokenizer.moments(x)
    monkeypatch.setattr("umd.tokenizer.CHUNK", 2 * 16 * 24)
    torch.testing.assert_close(tokenizer.moments(x), together)
    in_parts = tokenizer.decode(together[:, 0])
    monkeypatch.undo()
    torch.testing.assert_close(in_parts, tokenizer.decode(together[:, 0]))


def test_the_hash_is_of_what_decides_the_latents(vaes, tmp_path):
    def changed(name, **entries):
        folder = shutil.copytree(vaes["kl"], tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | entries))
        return load_tokenizer(str(folder)).vae.sha256

    own = load_tokenizer(str(vaes["kl"])).vae.sha256
    assert own == changed("copy") == changed("size", sample_size=512, force_upcast=False)
    assert len({own, load_tokenizer(str(vaes["other"])).vae.sha256, changed("scale", scaling_factor=0.3)}) == 3
    weights = next((tmp_path / "copy").glob("*.safetensors"))
    tensors = load_file(weights)
    tensors["encoder.conv_in.bias"][0] += 1e-6
    save_file(tensors, weights)
    load_tokenizer.cache_clear()
    assert load_tokenizer(str(tmp_path / "copy")).vae.sha256 != own


def test_a_pipeline_s_folder_holds_its_vae(vaes, tmp_path):
    shutil.copytree(vaes["kl"], tmp_path / "pipeline" / "vae")
    found, own = load_tokenizer(str(tmp_path / "pipeline")).vae, load_tokenizer(str(vaes["kl"])).vae
    assert found.sha256 == own.sha256 and found.name == str(tmp_path / "pipeline")


def test_sizes_that_cannot_be_halved(vaes):
    tokenizer = load_tokenizer(str(vaes["kl"]))
    with pytest.raises(UserError, match="images of 17x16 are not divisible by 2, .*; use 16x16"):
        tokenizer.latent_shape(17, 16)
    with pytest.raises(UserError, match="use 2x16"):
        tokenizer.moments(torch.zeros(1, 3, 1, 16))


def no_weights(folder):
    next(folder.glob("*.safetensors")).unlink()


def half_the_weights(folder):
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def a_tensor_less(folder):
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, file)


def no_json(folder):
    (folder / "config.json").write_text("{")


def no_config(folder):
    (folder / "config.json").unlink()


def another_model(folder):
    (folder / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_weights, "cannot load the VAE .*no file named"),
        (half_the_weights, "cannot load the VAE"),
        (a_tensor_less, "weights of the VAE .* do not fit .*decoder.conv_out.bias"),
        (no_json, "there is no VAE at .*not a valid JSON"),
        (no_config, "there is no VAE at .*config.json"),
        (another_model, "is a UNet2DModel; expected one of AutoencoderKL and VQModel"),
        (shutil.rmtree, "there is no such folder"),
    ],
)
def test_a_folder_that_is_no_vae(spoil, said, vaes, tmp_path):
    folder = shutil.copytree(vaes["kl"], tmp_path / "vae")
    spoil(folder)
    with pytest.raises(UserError, match=said) as caught:
        load_tokenizer(str(folder))
    assert "\n" not in str(caught.value)
