"""Mixup, cutmix, erasing, smoothing, drop path: areas, targets and expectations that follow from the definitions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from umd.augment import NOISE_STD, ClassifierObjective, draw_erased, draw_gates, draw_mixing, smoothed
from umd.config import ClassifierConfig, ClassifierObjectiveConfig
from umd.errors import UserError

CPU = torch.device("cpu")
MODEL = ClassifierConfig((12, 10), patch_size=2, hidden_size=16, depth=4, num_heads=2, num_classes=7)
OFF = dict(smoothing=0.0, mixup=0.0, cutmix=0.0, erase=0.0, drop_path=0.0)
SEEDS = st.integers(0, 2**62)


def objective(**changes) -> ClassifierObjective:
    return ClassifierObjective(MODEL, ClassifierObjectiveConfig(**{**OFF, **changes}))


def numbered(count: int) -> torch.Tensor:
    """Picture b is b + 1 everywhere."""
    return torch.arange(1.0, count + 1)[:, None, None, None].expand(-1, 3, 12, 10)


@settings(max_examples=60)
@given(SEEDS, st.integers(1, 6), st.booleans(), st.floats(0, 1))
def test_targets_are_distributions_with_the_shares_of_the_pixels(seed, count, cut, smoothing):
    labels = torch.arange(count)
    o = objective(**({"cutmix": 1.0} if cut else {"mixup": 0.8}), smoothing=smoothing)
    a = o.corrupt(count, seed, CPU, labels)
    torch.testing.assert_close(a.targets.sum(1), torch.ones(count))
    assert a.targets.min() >= 0
    x = numbered(count)
    mixed = o.augmented(x, a)
    own, other = smoothed(labels, 7, smoothing), smoothed(labels.flip(0), 7, smoothing)
    for b in range(count):
        if count - 1 - b == b:
            assert torch.allclose(mixed[b], x[b])
            continue
        if cut:
            assert set(mixed[b].unique().tolist()) <= {b + 1.0, float(count - b)}
            share = (mixed[b] == b + 1).float().mean()  # of the picture's own pixels
        else:
            assert mixed[b].std() < 1e-5
            share = (mixed[b].mean() - (count - b)) / (b + 1 - (count - b))
        torch.testing.assert_close(a.targets[b], share * own[b] + (1 - share) * other[b], rtol=1e-4, atol=1e-5)


def test_mixup_and_cutmix_take_turns_at_even_odds_with_shares_of_their_laws():
    rng = np.random.default_rng(0)
    draws = [draw_mixing(rng, ClassifierObjectiveConfig(), (64, 64)) for _ in range(4000)]
    mixup, cutmix = ([share for share, box in draws if (box is None) == which] for which in (True, False))
    assert abs(len(mixup) / 4000 - 0.5) < 4 * 0.5 / math.sqrt(4000)
    deviation = math.sqrt(1 / (4 * (2 * 0.8 + 1)))  # of Beta(0.8, 0.8)
    assert abs(np.mean(mixup) - 0.5) < 4 * deviation / math.sqrt(len(mixup))
    assert np.std(mixup) == pytest.approx(deviation, rel=0.05)
    assert np.mean(cutmix) > 0.5  # uniform shares, but boxes are cut at the edge of the picture
    assert min(mixup) >= 0 and max(mixup) <= 1 and min(cutmix) >= 0 and max(cutmix) <= 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_label_smoothing_is_the_closed_form(smoothing):
    """Szegedy et al. 2016: (1 - ε)·onehot + ε/K; the loss is torch's with the same ε."""
    labels = torch.tensor([3, 0, 6])
    targets = smoothed(labels, 7, smoothing)
    assert targets[0, 3].item() == pytest.approx(1 - smoothing + smoothing / 7)
    assert targets[0, 4].item() == pytest.approx(smoothing / 7)
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    o = objective(smoothing=smoothing)
    loss, parts = o(lambda x, gates: logits, numbered(3), o.corrupt(3, 0, CPU, labels))
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels, label_smoothing=smoothing))
    assert len(parts) == 0


@settings(max_examples=200)
@given(SEEDS, st.tuples(st.integers(1, 40), st.integers(1, 40)))
def test_erased_boxes_lie_inside_the_picture(seed, size):
    top, left, bottom, right = draw_erased(np.random.default_rng(seed), 1.0, size)
    assert 0 <= top <= bottom <= size[0] and 0 <= left <= right <= size[1]
    h, w = bottom - top, right - left
    assert (h, w) == (0, 0) or (0 < h < size[0] and 0 < w < size[1])


def test_erased_boxes_have_the_areas_and_frequency_asked_for():
    rng = np.random.default_rng(0)
    boxes = [draw_erased(rng, 0.25, (200, 200)) for _ in range(4000)]
    areas = [(b - t) * (r - left) / 200**2 for t, left, b, r in boxes if b > t]
    assert abs(len(areas) / 4000 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    assert 0.019 < min(areas) < 0.03 and 0.3 < max(areas) < 0.34
    reached = [max(box[i] for box in boxes) for i in (2, 3)]
    assert reached == [200, 200] and min(t for t, _, b, _ in boxes if b > t) == 0  # up to every edge


def test_erased_pixels_are_noise_and_the_others_untouched():
    o, x = objective(erase=1.0), numbered(64)
    a = o.corrupt(64, 5, CPU, torch.zeros(64, dtype=torch.int64))
    out, changed = o.augmented(x, a), []
    for b, (top, left, bottom, right) in enumerate(a.erased.tolist()):
        inside = torch.zeros(12, 10, dtype=torch.bool)
        inside[top:bottom, left:right] = True
        assert torch.equal(out[b] != x[b], inside.expand(3, -1, -1))
        changed.append(out[b][:, inside].flatten())
    noise = torch.cat(changed)
    assert abs(noise.mean()) < 4 * NOISE_STD / math.sqrt(len(noise))
    assert noise.std() == pytest.approx(NOISE_STD, rel=0.1)
    clip = x[:, :, None].expand(-1, -1, 3, -1, -1)
    erased = o.augmented(clip, a) != clip
    assert torch.equal(erased, (out != x)[:, :, None].expand_as(clip))  # the same place in every frame


def test_drop_path_keeps_expectation_and_drops_late_blocks_most():
    gates = draw_gates(np.random.default_rng(0), 0.3, 4, 20000, CPU)
    assert gates.shape == (8, 20000)
    for branch, rate in enumerate((0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3)):  # linear in depth
        kept = gates[branch] > 0
        assert abs(kept.float().mean() - (1 - rate)) < 4 * math.sqrt(max(rate, 1e-9) / 20000)
        torch.testing.assert_close(gates[branch][kept], torch.full((int(kept.sum()),), 1 / (1 - rate)))
        assert gates[branch].mean().item() == pytest.approx(1, abs=4 * math.sqrt(rate / (1 - rate) / 20000) + 1e-6)
    assert draw_gates(np.random.default_rng(0), 0.0, 4, 5, CPU) is None


def test_a_batch_is_a_pure_function_of_its_seed():
    o = ClassifierObjective(MODEL, ClassifierObjectiveConfig())
    x, labels = numbered(6), torch.arange(6)
    one, again, other = (o.corrupt(6, seed, CPU, labels) for seed in (1, 1, 2))
    assert torch.equal(o.augmented(x, one), o.augmented(x, again)) and torch.equal(one.gates, again.gates)
    assert torch.equal(one.targets, again.targets) and not torch.equal(one.targets, other.targets)


def test_what_it_refuses():
    with pytest.raises(UserError, match="needs labels"):
        objective().corrupt(4, 0, CPU)
    for name, value in (("smoothing", 1.5), ("erase", -0.1), ("drop_path", 1.0), ("mixup", -1.0), ("cutmix", -1.0)):
        with pytest.raises(UserError, match=name):
            ClassifierObjectiveConfig(**{name: value})
