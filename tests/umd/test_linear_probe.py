"""Linear probe and nearest neighbours: against ridge regression, the best classifier of Gaussians, and brute force."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from umd.errors import UserError
from umd.linear_probe import BatchNorm, knn_accuracy, linear_layer, linear_probe, nearest_of, rate_scale
from umd.probe import fit_fewshot


def clusters(n: int, classes: int, distance: float, seed: int, D: int = 16) -> tuple[Tensor, Tensor]:
    """n points around the corners e_c · distance/√2 of a simplex, in a space stretched and moved."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    centres = torch.eye(classes, D) * distance / 2**0.5
    x = centres[labels] + torch.randn(n, D, generator=generator)
    return x * torch.logspace(-1, 2, D) + 7, labels


def test_it_reaches_the_ridge_solution_on_separable_data():
    train, test = clusters(1500, 5, 10.0, seed=1), clusters(1000, 5, 10.0, seed=2)
    ridge = (fit_fewshot(*train, 5).predict(test[0]) == test[1]).double().mean().item()
    result = linear_probe(*train, *test, 5)
    assert ridge > 0.99 and result.top1 >= ridge - 0.002
    assert result.top5 == 1.0 and result.images + result.held_out == 1500


def test_it_is_near_the_best_that_can_be():
    """Two Gaussians of unit covariance, `distance` apart: no classifier is right more often than Φ(distance/2)."""
    train, test = clusters(8000, 2, 2.0, seed=3), clusters(20_000, 2, 2.0, seed=4)
    best = 0.5 * (1 + torch.erf(torch.tensor(1.0) / 2**0.5)).item()  # 0.841
    assert linear_probe(*train, *test, 2, epochs=20).top1 == pytest.approx(best, abs=0.01)


def test_images_left_over_by_whole_batches_do_no_harm():
    """4097 images in batches of 256: a step on the last one alone, at the rate of a batch, costs 6 points here."""
    test = clusters(10_000, 20, 2.5, seed=14, D=64)
    for images in (4096, 4097):
        train = clusters(images + images // 9, 20, 2.5, seed=15, D=64)
        ridge = (fit_fewshot(*train, 20).predict(test[0]) == test[1]).double().mean().item()
        result = linear_probe(*train, *test, 20, rates=(0.3,), epochs=10, warmup=2, batch=256)
        assert (result.images, result.batch) == (images, 256) and result.top1 > ridge - 0.03


def test_features_that_do_not_fit_on_the_device_are_read_by_batch(monkeypatch):
    train, test = clusters(400, 3, 3.0, seed=5), clusters(300, 3, 3.0, seed=6)
    whole = linear_probe(*train, *test, 3, epochs=4)
    monkeypatch.setattr("umd.linear_probe.KEPT", 0)
    assert linear_probe(*train, *test, 3, epochs=4) == whole


def test_rates_side_by_side_are_rates_alone():
    train, test = clusters(400, 3, 3.0, seed=5), clusters(300, 3, 3.0, seed=6)
    rates = (0.001, 0.03, 0.3)
    together = linear_probe(*train, *test, 3, rates=rates, epochs=6, seed=9)
    for rate in rates:
        alone = linear_probe(*train, *test, 3, rates=(rate,), epochs=6, seed=9)
        assert alone.accuracy_by_rate[f"{rate:g}"] == together.accuracy_by_rate[f"{rate:g}"]
        if rate == together.rate:
            assert (alone.top1, alone.class_averaged) == (together.top1, together.class_averaged)
    assert together == linear_probe(*train, *test, 3, rates=rates, epochs=6, seed=9)
    json.dumps(dataclasses.asdict(together), allow_nan=False)


def test_one_step_is_the_formula():
    """W <- W - lr ∂CE, of the first batch; the gradient in closed form, in float64."""
    x, y = clusters(64, 3, 3.0, seed=7)
    layer = linear_layer(16, 3, seed=0)
    assert abs(layer.weight.std().item() - 0.01) < 0.002 and (layer.bias == 0).all()
    z = BatchNorm(x, torch.arange(64), "cpu")(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.var(0, correction=0), torch.ones(16), rtol=0, atol=1e-3)
    F.cross_entropy(layer(z), y).backward()
    p = (layer.weight.double() @ z.T.double()).softmax(0) - F.one_hot(y, 3).T
    torch.testing.assert_close(layer.weight.grad.double(), p @ z.double() / 64, rtol=1e-4, atol=1e-6)


def test_the_schedule():
    assert [rate_scale(e, 90, 10) for e in (0, 5, 10, 50, 90)] == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_a_rate_that_diverges_is_left_out():
    train, test = clusters(200, 3, 3.0, seed=8), clusters(100, 3, 3.0, seed=9)
    result = linear_probe(*train, *test, 3, rates=(0.01, 5e39), epochs=3)
    assert result.rate == 0.01 and result.accuracy_by_rate["5e+39"] is None
    with pytest.raises(UserError, match="diverged at every learning rate"):
        linear_probe(*train, *test, 3, rates=(5e39,), epochs=3)
    with pytest.raises(UserError, match="0 test images"):
        linear_probe(*train, torch.zeros(0, 16), torch.zeros(0), 3)
    with pytest.raises(ValueError, match="expected 0 to 1"):
        linear_probe(*train, *test, 2)
    train[0][7, 3] = torch.nan  # of weights gone wrong, which no smaller rate mends
    with pytest.raises(ValueError, match="NaN or infinity"):
        linear_probe(*train, *test, 3)


def test_nearest_neighbours_are_those_of_brute_force():
    train, test = clusters(500, 4, 3.0, seed=10), clusters(100, 4, 3.0, seed=11)
    result = knn_accuracy(*train, *test, 4, k=7, temperature=0.1)
    a, b = (x.numpy().astype(np.float64) for x in (train[0], test[0]))
    a, b = a / np.linalg.norm(a, axis=1, keepdims=True), b / np.linalg.norm(b, axis=1, keepdims=True)
    right = 0
    for row, label in zip(b @ a.T, test[1].tolist(), strict=True):
        nearest = np.argsort(-row)[:7]
        votes = np.bincount(train[1].numpy()[nearest], np.exp(row[nearest] / 0.1), minlength=4)
        right += votes.argmax() == label
    assert result.top1 == right / 100 and result.k == 7
    assert knn_accuracy(*train, *train, 4, k=1).top1 == 1.0  # each is its own neighbour
    assert knn_accuracy(train[0][:3], train[1][:3], *test, 4).k == 3


def test_blocks_of_keys_change_nothing(monkeypatch):
    monkeypatch.setattr("umd.linear_probe.KEYS", 100)
    queries, keys = torch.randn(5, 8), torch.randn(1050, 8)
    values, places = nearest_of(queries, keys, 9)
    expected = (queries @ keys.T).topk(9)
    assert torch.equal(places, expected.indices) and torch.allclose(values, expected.values)
