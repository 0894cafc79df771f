import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from umd.errors import UserError
from umd.metrics import (
    FeatureStatistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    squared_mmd,
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
    def test_batches_equal_one_pass(self):
        features = torch.randn(100, 9, generator=torch.Generator().manual_seed(0)).double()
        statistics = FeatureStatistics(9, "test")
        for batch in features.split([37, 0, 10, 53]):
            statistics.update(batch)
        assert statistics.count == 100
        np.testing.assert_allclose(statistics.mean, features.numpy().mean(0), atol=1e-14)
        np.testing.assert_allclose(statistics.cov, np.cov(features.numpy(), rowvar=False), atol=1e-13)

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
        for side, count in ((5, "20"), (6, "many")):
            save_file({"mean": torch.zeros(6), "scatter": torch.zeros(side, side)}, path, {"name": "", "count": count})
            with pytest.raises(UserError, match="compute them again"):
                FeatureStatistics.load(path)

    def test_different_networks_do_not_mix(self):
        one, two = statistics_of(torch.randn(5, 4), "FID"), statistics_of(torch.randn(5, 4), "FD-EffLite0")
        with pytest.raises(UserError, match="FID.*FD-EffLite0"):
            one.distance(two)

    def test_bad_features_are_refused(self):
        statistics = FeatureStatistics(4, "test")
        with pytest.raises(ValueError, match=r"\[B, 4\]"):
            statistics.update(torch.zeros(3, 5))
        with pytest.raises(ValueError, match="NaN"):
            statistics.update(torch.full((3, 4), torch.inf))
        statistics.update(torch.zeros(1, 4))
        with pytest.raises(ValueError, match="2 images"):
            _ = statistics.cov


class Flat(torch.nn.Module):
    """A picture's values as its features, for torchmetrics."""

    num_features = 48

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float().flatten(1)


def pictures(n: int, brightness: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(brightness, brightness + 100, (n, 3, 4, 4), dtype=torch.uint8, generator=generator)


class TestInceptionScore:
    def test_sure_of_each_of_k_classes_is_k(self):
        logits = 1000.0 * torch.eye(7).repeat(5, 1)
        assert inception_score(logits) == pytest.approx(7.0)
        assert inception_score(torch.randn(1, 7).repeat(20, 1)) == pytest.approx(1.0)  # all alike

    def test_mutual_information_in_closed_form(self):
        """Two classes, each called right with p: exp of ln 2 less the entropy of p."""
        p = 0.8
        logits = torch.tensor([[p, 1 - p], [1 - p, p]], dtype=torch.float64).log().repeat(50, 1)
        entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
        assert inception_score(logits) == pytest.approx(np.exp(np.log(2) - entropy))

    def test_splits_are_scored_alone(self):
        logits = torch.randn(250, 9, generator=torch.Generator().manual_seed(0))
        alone = [inception_score(part) for part in (logits[:100], logits[100:200], logits[200:])]
        assert inception_score(logits, split_size=100) == pytest.approx(np.mean(alone))

    def test_equals_torchmetrics(self):
        inception = pytest.importorskip("torchmetrics.image.inception")

        class Logits(Flat):
            def forward(self, x):
                return x.float().flatten(1)[:, :10] / 50

        x = pictures(60, 50, seed=1)
        metric = inception.InceptionScore(feature=Logits(), splits=1)
        metric.update(x)
        assert inception_score(Logits()(x)) == pytest.approx(metric.compute()[0].item(), rel=1e-5)

    def test_no_image(self):
        with pytest.raises(ValueError, match="N > 0"):
            inception_score(torch.zeros(0, 10))


class TestKernelDistance:
    def test_sums_over_pairs(self):
        """By two loops over the definition of the unbiased estimate."""
        x, y = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64) + 1
        k = lambda a, b: (float(a @ b) / 4 + 1) ** 3  # noqa: E731
        xx = [k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
        yy = [k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j]
        xy = [k(a, b) for a in x for b in y]
        assert squared_mmd(x, y) == pytest.approx(np.mean(xx) + np.mean(yy) - 2 * np.mean(xy))

    def test_of_points_that_are_all_the_same(self):
        """Of two points a and b: k(a, a) + k(b, b) - 2 k(a, b)."""
        a, b = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0])
        expected = (5 / 2 + 1) ** 3 + (9 / 2 + 1) ** 3 - 2 * (6 / 2 + 1) ** 3
        assert squared_mmd(a.repeat(4, 1), b.repeat(3, 1)) == pytest.approx(expected)
        assert kernel_distance(a.repeat(4, 1), b.repeat(3, 1), subsets=5) == pytest.approx(expected)

    def test_has_no_bias(self):
        x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
        values = [kernel_distance(x[:1000], x[1000:], subsets=1, subset_size=100, seed=seed) for seed in range(50)]
        assert abs(np.mean(values)) < 3 * np.std(values) / 50**0.5 + 0.01
        assert kernel_distance(x[:1000], x[1000:] + 1, subsets=2) > 1

    def test_equals_torchmetrics(self):
        kid = pytest.importorskip("torchmetrics.image.kid")
        x, y = pictures(50, 20, seed=1), pictures(50, 90, seed=2)
        metric = kid.KernelInceptionDistance(feature=Flat(), subsets=1, subset_size=50)  # the one subset of all
        metric.update(x, real=True)
        metric.update(y, real=False)
        found = kernel_distance(Flat()(x), Flat()(y), subsets=1, subset_size=50)
        assert found == pytest.approx(metric.compute()[0].item(), rel=1e-4)

    def test_one_image_is_too_few(self):
        with pytest.raises(ValueError, match="at least 2 images"):
            kernel_distance(torch.zeros(1, 3), torch.zeros(5, 3))


class TestPrecisionRecall:
    def test_of_themselves(self):
        x = torch.randn(50, 5)
        assert precision_recall(x, x) == (1.0, 1.0)
        assert precision_recall(x, x + 1000) == (0.0, 0.0)

    def test_half_of_it_is_covered(self):
        """Real points around 0 and 100; samples around 0 only: all are good, half of the real ones are found."""
        generator = torch.Generator().manual_seed(0)
        near, far = torch.rand(40, 2, generator=generator), torch.rand(40, 2, generator=generator) + 100
        precision, recall = precision_recall(torch.cat([near, far]), near + 1e-3)
        assert precision == 1.0 and recall == 0.5
        precision, recall = precision_recall(near, torch.cat([near + 1e-3, far]))
        assert precision == 0.5 and recall == 1.0

    def test_on_a_line_by_hand(self):
        real, fake = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[1.5], [4.0], [9.0]])
        # Balls to the nearest neighbour. Real: [-1, 1], [0, 2], [1, 5]. Fake: [-1, 4], [1.5, 6.5], [4, 14].
        assert precision_recall(real, fake, k=1) == pytest.approx((2 / 3, 1.0))
        assert precision_recall(real + 100, fake, k=1) == (0.0, 0.0)

    def test_of_distances_by_scipy(self):
        cdist = pytest.importorskip("scipy.spatial.distance").cdist
        generator = torch.Generator().manual_seed(0)
        real, fake = (torch.randn(n, 40, generator=generator) + 30 for n in (90, 60))  # far from 0, as features are
        fake[:30] *= 1.01
        between = cdist(fake.double(), real.double())
        real_radii, fake_radii = (np.sort(cdist(x.double(), x.double()), 1)[:, 3] for x in (real, fake))
        expected = (between <= real_radii).any(1).mean(), (between <= fake_radii[:, None]).any(0).mean()
        assert precision_recall(real, fake) == pytest.approx(expected)
        assert 0 < expected[0] < 1 and 0 < expected[1] < 1

    def test_copies_are_in_balls_of_radius_0(self):
        """Pictures that occur more than three times, each in the other set too: a product's rounding depends on its
        shape, so a distance of 0 may come out above a radius of 0."""
        for D in (64, 300):
            for block in (64, 100, 1024):
                points = torch.randn(50, D, generator=torch.Generator().manual_seed(50 * D)) + 3
                real, fake = points.repeat_interleave(6, 0), points.repeat(5, 1)
                assert precision_recall(real, fake, block=block) == (1.0, 1.0)
                assert precision_recall(real[:150], fake, block=block) == (0.5, 1.0)

    def test_blocks_change_nothing(self):
        real, fake = torch.randn(70, 3), torch.randn(50, 3) + 0.5
        assert precision_recall(real, fake, block=16) == precision_recall(real, fake)

    def test_too_few(self):
        with pytest.raises(ValueError, match="more than 3 images"):
            precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))


def test_frechet_is_scipys():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = random_cov(10, 20, seed=1), random_cov(10, 20, seed=2)
    root = linalg.sqrtm((a @ b).numpy()).real
    expected = (a.trace() + b.trace()).item() - 2 * np.trace(root) + 10.0
    assert frechet_distance(torch.zeros(10), a, torch.ones(10), b) == pytest.approx(expected)


def test_in_any_grouping():
    x = torch.randn(1000, 12, dtype=torch.float64) * torch.logspace(-2, 2, 12) + 5
    whole = statistics_of(x)
    for cuts in ([1, 999], [300, 300, 400], [10] * 100):
        grouped = FeatureStatistics(12, "test")
        for part in x.split(cuts):
            grouped.update(part)
        torch.testing.assert_close(grouped.cov, whole.cov, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(grouped.mean, whole.mean, rtol=1e-10, atol=1e-10)
