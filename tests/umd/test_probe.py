import dataclasses
import json

import numpy as np
import pytest
import torch

from umd.errors import UserError
from umd.probe import (
    class_averaged_accuracy,
    confusion,
    draw_shots,
    fewshot_accuracy,
    fit_fewshot,
)


def clusters(per_class: list[int], noise: float, seed: int, dim: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Gaussian blobs around fixed centres, `per_class[c]` examples of class c, in random order."""
    centres = torch.randn(len(per_class), dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(per_class)), torch.tensor(per_class))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    return centres[labels] + noise * torch.randn(len(labels), dim, generator=generator), labels


# 500 examples of 64 features solve XᵀX, 40 solve XXᵀ
@pytest.mark.parametrize("n", [500, 40])
class TestAgainstTheAuthorsCode:
    @pytest.fixture
    def oracle(self, data_dir, n):
        with np.load(data_dir / "fewshot_lsr.npz") as file:
            return {key.removeprefix(f"n{n}_"): file[key] for key in file if key.startswith(f"n{n}_")}

    def predictions(self, oracle, l2):
        probe = fit_fewshot(torch.from_numpy(oracle["x"]), torch.from_numpy(oracle["y"]), 10, l2)
        return probe, probe.predict(torch.from_numpy(oracle["xtest"]))

    def test_accuracy_at_every_l2(self, oracle, n):
        labels = torch.from_numpy(oracle["ytest"])
        _, predictions = self.predictions(oracle, oracle["l2"].tolist())
        ours = np.array([(p == labels).double().mean() for p in predictions])
        # to the last of 1000 predictions against the closed form in float64; float32 eigh moves up to two
        np.testing.assert_allclose(ours, oracle["acc_numpy64"], atol=1e-9)
        np.testing.assert_allclose(ours, oracle["acc"], atol=0.002 + 1e-6)

    def test_one_l2_is_the_same_as_among_several(self, oracle, n):
        probe, predictions = self.predictions(oracle, [1.0, 1024.0])
        alone, its_predictions = self.predictions(oracle, 1024.0)
        assert alone.weights.shape == (65, 10) and probe.weights.shape == (2, 65, 10)
        torch.testing.assert_close(alone.weights, probe.weights[1], rtol=1e-12, atol=1e-15)
        assert torch.equal(its_predictions, predictions[1])

    def test_whitening_and_weights(self, oracle, n):
        probe, _ = self.predictions(oracle, 1024.0)
        np.testing.assert_allclose(probe.mean, oracle["cache_mean"][0], atol=1e-6)
        np.testing.assert_allclose(probe.std, oracle["cache_std"][0], atol=1e-6)
        # the signs of the peer's eigenvectors cancel in this product; the rounding of its float32 eigh stays:
        # the last bit of the eigenvalue that the bias brings, n·100², is 0.5
        eigs, lhs, rhs = (oracle[f"cache_{key}"].astype(np.float64) for key in ("eigs", "lhs", "rhs"))
        np.testing.assert_allclose(probe.weights, (lhs / (eigs + 1024.0)) @ rhs, atol=1e-4)


@pytest.mark.parametrize("n", [8, 7, 40])  # on either side of the switch at D + 1 = 8, and well beyond
def test_weights_solve_the_normal_equations(n):
    generator = torch.Generator().manual_seed(n)
    features = torch.randn(n, 7, generator=generator, dtype=torch.float64) * 3 + 5
    labels = torch.arange(n) % 3
    probe = fit_fewshot(features, labels, 3, l2=2.5)
    x = torch.cat(
        [(features - features.mean(0)) / (features.std(0, correction=0) + 1e-5), torch.full((n, 1), 100.0)], 1
    )
    y = torch.where(labels[:, None] == torch.arange(3), 1.0, -1.0).double()
    weights = torch.linalg.solve(x.T @ x + 2.5 * torch.eye(8), x.T @ y)
    torch.testing.assert_close(probe.weights, weights, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(probe.scores(features), x @ weights, rtol=1e-9, atol=1e-9)


def test_a_constant_feature_does_no_harm():
    features, labels = clusters([20, 20], 0.1, seed=0)
    features[:, 2] = 3.0
    assert torch.equal(fit_fewshot(features, labels, 2).predict(features), labels)


def test_scale_and_offset_of_the_features_do_not_matter():
    features, labels = clusters([30, 30, 30], 2.0, seed=0)
    probe = fit_fewshot(features, labels, 3)
    moved = fit_fewshot(features.double() * 50 - 7, labels, 3)
    torch.testing.assert_close(moved.scores(features.double() * 50 - 7), probe.scores(features), atol=1e-4, rtol=1e-4)


def test_counts_and_averages_by_hand():
    labels = torch.tensor([0, 0, 0, 0, 1, 3])
    predictions = torch.tensor([0, 0, 0, 1, 0, 3])
    assert confusion(predictions, labels, 4).tolist() == [
        [3, 1, 0, 0],
        [1, 0, 0, 0],
        [0, 0, 0, 0],
        [0, 0, 0, 1],
    ]
    # class 2 has no label and does not count
    assert class_averaged_accuracy(predictions, labels, 4) == pytest.approx((3 / 4 + 0 + 1) / 3)


@pytest.mark.parametrize(
    ("features", "labels", "match"),
    [
        (torch.zeros(3, 2), torch.zeros(4, dtype=torch.int64), "expected"),
        (torch.zeros(3), torch.zeros(3, dtype=torch.int64), "expected"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64), "N > 0"),
        (torch.full((3, 2), torch.nan), torch.zeros(3, dtype=torch.int64), "NaN"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 5]), "expected 0 to 1"),
        (torch.zeros(3, 2), torch.tensor([0, 1, -1]), "expected 0 to 1"),
    ],
)
def test_bad_input_is_refused(features, labels, match):
    with pytest.raises(ValueError, match=match):
        fit_fewshot(features, labels, 2)


def test_l2_must_be_positive():
    with pytest.raises(ValueError, match="l2"):
        fit_fewshot(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), 2, l2=[1.0, 0.0])


class TestFewshotAccuracy:
    def test_repeats_itself_and_seeds_differ(self):
        train, test = clusters([50, 50, 50], 3.0, seed=1), clusters([40, 40, 40], 3.0, seed=2)
        result = fewshot_accuracy(*train, *test, shots=5, num_classes=3)
        assert result == fewshot_accuracy(*train, *test, shots=5, num_classes=3)
        assert len(set(result.per_seed)) > 1
        assert result.per_seed[1] == fewshot_accuracy(*train, *test, shots=5, num_classes=3, seeds=[1]).mean
        assert result.mean == pytest.approx(np.mean(result.per_seed))
        assert result.std == pytest.approx(np.std(result.per_seed, ddof=1))

    def test_all_shots_equal_one_fit_on_everything(self):
        train, test = clusters([30, 30], 3.0, seed=1), clusters([25, 5], 3.0, seed=2)
        result = fewshot_accuracy(*train, *test, shots=30, num_classes=2)
        predictions = fit_fewshot(*train, 2).predict(test[0])
        assert result.per_seed == [class_averaged_accuracy(predictions, test[1], 2)] * 3
        assert result.confusion == (3 * confusion(predictions, test[1], 2)).tolist()
        assert result.mean == pytest.approx(np.mean(result.per_class))

    def test_only_the_drawn_shots_matter(self):
        # poison every example: a draw of k per class must use k of them, so k·classes at most survive
        features, labels = clusters([20, 20], 1.0, seed=1)
        test = clusters([20, 20], 1.0, seed=2)
        used = 0
        base = fewshot_accuracy(features, labels, *test, shots=4, num_classes=2, seeds=[0])
        for i in range(len(labels)):
            poisoned = features.clone()
            poisoned[i] = torch.nan
            try:
                assert fewshot_accuracy(poisoned, labels, *test, shots=4, num_classes=2, seeds=[0]) == base
            except ValueError:
                used += 1
        assert used == 8

    def test_more_shots_than_a_class_has(self):
        train, test = clusters([30, 4, 9], 1.0, seed=1), clusters([5, 5, 5], 1.0, seed=2)
        with pytest.raises(UserError, match=r"10 shots.*class flags has 4.*ask for at most 4"):
            fewshot_accuracy(*train, *test, shots=10, num_classes=3, class_names=["smileys", "flags", "food"])
        with pytest.raises(UserError, match="class 1 has 4"):
            fewshot_accuracy(*train, *test, shots=10, num_classes=3)
        result = fewshot_accuracy(*train, *test, shots=10, num_classes=3, allow_fewer=True)
        assert result.shots == 10
        assert result.shots_per_class == [10, 4, 9]

    def test_a_class_never_seen(self):
        train, test = clusters([10, 10, 0], 0.1, seed=1), clusters([5, 0, 5], 0.1, seed=2)
        with pytest.raises(UserError, match="class 2 has 0"):
            fewshot_accuracy(*train, *test, shots=1, num_classes=3)
        result = fewshot_accuracy(*train, *test, shots=5, num_classes=3, allow_fewer=True)
        assert result.per_class == [1.0, None, 0.0]  # untested, and untrained
        assert result.mean == 0.5

    def test_l2_is_chosen_without_the_test_set(self):
        train, test = clusters([40, 40, 40], 2.0, seed=1), clusters([30, 30, 30], 2.0, seed=2)
        l2s = [1e-3, 1024.0, 1e9]
        result = fewshot_accuracy(*train, *test, shots=20, num_classes=3, l2=l2s)
        assert list(result.accuracy_by_l2) == ["0.001", "1024.0", "1000000000.0"]
        assert all(chosen in l2s for chosen in result.l2)
        for l2, accuracy_ in zip(l2s, result.accuracy_by_l2.values(), strict=True):
            alone = fewshot_accuracy(*train, *test, shots=20, num_classes=3, l2=l2)
            assert alone.mean == pytest.approx(accuracy_) and alone.l2 == [l2] * 3
        # other test labels, same choice
        other = fewshot_accuracy(*train, test[0], test[1].roll(1), shots=20, num_classes=3, l2=l2s)
        assert other.l2 == result.l2
        with pytest.raises(UserError, match="2 or more"):
            fewshot_accuracy(*train, *test, shots=1, num_classes=3, l2=l2s)

    def test_is_a_json_record(self):
        train, test = clusters([10, 10, 0], 1.0, seed=1), clusters([5, 5, 0], 1.0, seed=2)
        result = fewshot_accuracy(*train, *test, shots=5, num_classes=3, seeds=(4,), allow_fewer=True)
        record = json.loads(json.dumps(dataclasses.asdict(result), allow_nan=False))
        assert record["mean"] == result.mean and record["std"] == 0.0
        assert np.sum(record["confusion"]) == 10

    def test_bad_requests(self):
        train, test = clusters([10, 10], 1.0, seed=1), clusters([5, 5], 1.0, seed=2)
        empty = (torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))
        with pytest.raises(UserError, match="at least 1"):
            fewshot_accuracy(*train, *test, shots=0, num_classes=2)
        with pytest.raises(UserError, match="0 test images"):
            fewshot_accuracy(*train, *empty, shots=1, num_classes=2)
        with pytest.raises(ValueError, match="expected 0 to 0"):
            fewshot_accuracy(*train, *test, shots=1, num_classes=1)


class TestDrawShots:
    def test_the_first_of_each_class_in_the_seeds_permutation(self):
        labels = clusters([20, 5, 0, 13], 1.0, seed=1)[1]
        for seed, drawn in zip((3, 8), draw_shots(labels, 6, 4, (3, 8), allow_fewer=True), strict=True):
            order = torch.randperm(38, generator=torch.Generator().manual_seed(seed))
            for c, indices in enumerate(drawn):
                assert indices.tolist() == [i for i in order.tolist() if labels[i] == c][:6]

    def test_a_pool_is_one_random_part_for_all_seeds(self):
        """A million labels sorted by class, as folders give them; 100,000 of them, as published."""
        classes, N = 1000, 1_280_000
        draws = draw_shots(torch.arange(N) * classes // N, 100, classes, (0, 1, 2), pool=100_000)
        sizes = torch.tensor([[len(indices) for indices in drawn] for drawn in draws])
        assert torch.equal(sizes[0], sizes[1]) and torch.equal(sizes[0], sizes[2])
        # of 1280 a class each lies in the pool at odds of 5/64: 100 ± 9.6, of which at most 100 are drawn
        assert 50 < sizes.min() < sizes.max() == 100
        assert 100 - sizes[0].double().mean() == pytest.approx(9.6 / (2 * np.pi) ** 0.5, abs=0.6)
        for c in (0, 999):
            few = [set(drawn[c].tolist()) for drawn in draws]
            assert all(c * 1280 <= i < (c + 1) * 1280 for i in few[0]) and len(few[0] & few[1]) > 50  # of one pool

    def test_a_pool_of_all_is_no_pool(self):
        labels = clusters([20, 15], 1.0, seed=1)[1]
        for pool in (35, 100_000):
            for with_pool, without in zip(draw_shots(labels, 4, 2, pool=pool), draw_shots(labels, 4, 2), strict=True):
                assert all(map(torch.equal, with_pool, without))

    def test_a_class_that_a_pool_has_too_few_of(self):
        labels = torch.tensor([0] * 900 + [1] * 100)
        (few,) = draw_shots(labels, 60, 2, (0,), pool=300)
        assert len(few[0]) == 60 and 10 < len(few[1]) < 60  # the whole set has enough: no error
        with pytest.raises(UserError, match="none of class rare"):
            draw_shots(labels, 60, 2, (0,), pool=1, class_names=["common", "rare"])
        with pytest.raises(UserError, match="60 shots.*class rare has 50"):
            draw_shots(labels[:950], 60, 2, (0,), pool=300, class_names=["common", "rare"])

    def test_features_of_the_shots_alone_are_enough(self):
        (features, labels), test = clusters([30, 25, 40], 2.0, seed=1), clusters([20, 20, 20], 2.0, seed=2)
        draws = draw_shots(labels, 10, 3)
        ids = torch.cat([torch.cat(drawn) for drawn in draws]).unique()
        assert len(ids) < len(labels)
        places = [[torch.searchsorted(ids, indices) for indices in drawn] for drawn in draws]
        l2 = [1.0, 1024.0]
        of_shots = fewshot_accuracy(features[ids], labels[ids], *test, shots=10, num_classes=3, l2=l2, draws=places)
        assert of_shots == fewshot_accuracy(features, labels, *test, shots=10, num_classes=3, l2=l2)
