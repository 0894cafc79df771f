"""`umd bench diffmae`: what it writes, and that its FLOPs are those of the networks it names."""

import json

import pytest

pytest.importorskip("transformers", reason="the baseline MAE comes from transformers: pip install transformers")

from umd.cli import main  # noqa: E402
from umd.config import OBJECTIVES, diffmae_config, model_config  # noqa: E402
from umd.flops import diffmae_decoder_flops, diffmae_flops  # noqa: E402
from umd.kernels import backend  # noqa: E402
from umd.objective import Objective  # noqa: E402
from umd.schedule import NoiseSchedule  # noqa: E402


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("bench") / "new" / "diffmae.json"
    options = "--model DiffMAE-Ti/4 --image-size 16 --batch 4 --repeats 3 --dtype fp32 --device cpu"
    with backend.kernels("reference"):  # before the fixture that says so for each test; interpreted ones take minutes
        main(["bench", "diffmae", *options.split(), "--json", str(file)])
    return {row["name"]: row for row in json.loads(file.read_text())}


@pytest.mark.slow
def test_a_row_for_each_with_the_documented_keys(rows):
    parts = [(row["part"], name) for name, row in rows.items()]
    assert parts == [
        ("filling", "decoder alone"), ("filling", "whole network"), ("training", "diffmae"), ("training", "umd as mae"),
        ("training", "umd"), ("training", "transformers vit-mae"),
    ]  # fmt: skip
    for row in rows.values():
        assert row["batch"] == 4 and row["dtype"] == "fp32"
        assert 0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["images_per_second"] == pytest.approx(4 / row["seconds"]) and row["time_ratio"] > 0
    assert rows["decoder alone"]["time_ratio"] == rows["diffmae"]["flop_ratio"] == 1


@pytest.mark.slow
def test_flops_are_those_of_the_networks(rows):
    """4 of 16 patches visible."""
    config, keep = diffmae_config("DiffMAE-Ti/4", image_size=(16, 16)), (4,) * 4
    decoder, whole = diffmae_decoder_flops(config, keep), diffmae_flops(config, keep)
    assert (rows["decoder alone"]["flops"], rows["whole network"]["flops"]) == (decoder, whole)
    assert rows["whole network"]["flop_ratio"] == pytest.approx(whole / decoder)
    assert rows["diffmae"]["flops"] == pytest.approx(3 * whole, rel=0.02)  # no gradient of the pixels
    for name, objective in (("umd as mae", "mae"), ("umd", "umd")):
        model = model_config("UMD-Ti/4", image_size=(16, 16))
        expected = Objective(model, OBJECTIVES[objective], NoiseSchedule("cosine")).step_flops(4)
        assert rows[name]["flops"] == pytest.approx(expected, rel=0.02), name


@pytest.mark.parametrize("option, words", [("--batch 0", "--batch 0: must be at least 2"),
                                           ("--model DiffMAE-Z/4", "unknown model 'DiffMAE-Z/4'")])  # fmt: skip
def test_mistakes_are_one_sentence(option, words, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "diffmae", "--device", "cpu", *option.split()])
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
