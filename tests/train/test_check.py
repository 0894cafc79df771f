"""`umd check-data`: what it finds in files broken in known ways, and that every reader trains through on the rest."""

import json
import shutil
from dataclasses import replace
from io import BytesIO
from itertools import islice

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from umd.cli import main
from umd.errors import UserError
from umd.train.check import check_data, examine
from umd.train.data import has_dali, open_dataset, train_loader
from umd.train.decoding import decode
from umd.train.options import CheckData
from umd.train.settings import DataConfig
from umd.train.sources import describe

LOADERS = ["python", pytest.param("dali", marks=pytest.mark.skipif(not has_dali(), reason="DALI is not installed"))]


def jpeg(seed: int, height: int = 60, width: int = 80, **options) -> bytes:
    """A picture with as much detail as a photograph."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8))
    noise = rng.normal(0, 6, (height, width, 3))
    picture = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)) + noise
    out = BytesIO()
    Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90, **options)
    return out.getvalue()


def cut_by_a_marker(whole: bytes) -> bytes:
    """An end-of-image marker in the middle: what follows decodes to grey, without an error."""
    middle = len(whole) // 2
    return whole[:middle] + b"\xff\xd9" + whole[middle + 2 :]


def flipped(whole: bytes, seed: int = 0) -> bytes:
    """64 bytes of the picture's body replaced."""
    rng, middle = np.random.default_rng(seed), len(whole) // 2
    return whole[:middle] + rng.bytes(64).replace(b"\xff", b"\0") + whole[middle + 64 :]


BROKEN = {  # by what is written into the file
    "zero bytes": lambda whole: b"",
    "not an image": lambda whole: b"<html>404 Not Found</html>" * 40,
    "truncated": lambda whole: whole[: len(whole) // 2],
    "truncated header": lambda whole: whole[:100],
    "damaged": flipped,
    "damaged grey": cut_by_a_marker,
    "too small": lambda whole: jpeg(0, 8, 80),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two good classes of 6 pictures, each kind of broken file, one outside a class, and a class without images."""
    root = tmp_path_factory.mktemp("pictures")
    for label, name in enumerate(("a", "b")):
        (root / name).mkdir()
        for i in range(6):
            (root / name / f"{i}.jpg").write_bytes(jpeg(10 * label + i))
    for i, (kind, broken) in enumerate(BROKEN.items()):
        (root / "ab"[i % 2] / f"{kind.replace(' ', '-')}.jpg").write_bytes(broken(jpeg(50 + i)))
    (root / "outside.jpg").write_bytes(jpeg(99))
    (root / "empty").mkdir()
    return root


@pytest.fixture(scope="module")
def found(folder):
    check_data(folder, CheckData(workers=2), Console(quiet=True))
    yield json.loads((folder / "quarantine.json").read_text())


def config(folder, **options) -> DataConfig:
    return DataConfig(source=str(folder), image_size=(16, 16), holdout=0, num_workers=0, **options)


def test_every_kind_is_named_and_nothing_else(found):
    reasons = {entry["path"]: entry["reason"] for entry in found["files"]}
    expected = {}
    for i, kind in enumerate(BROKEN):
        reason = "damaged" if kind.startswith("damaged") else kind.removesuffix(" header")
        expected[f"{'ab'[i % 2]}/{kind.replace(' ', '-')}.jpg"] = reason
    assert reasons == expected | {"outside.jpg": "outside a class folder", "empty/": "empty class"}
    assert found["images"] == 12 + len(BROKEN) + 1 and found["left_out"] == len(BROKEN) + 1
    assert found["share"] == pytest.approx(8 / 20) and found["counts"]["truncated"] == found["counts"]["damaged"] == 2


def test_without_the_list_the_folder_is_refused(folder, found, tmp_path):
    shutil.copytree(folder, tmp_path / "unchecked", ignore=shutil.ignore_patterns("quarantine.json"))
    with pytest.raises(UserError, match="beside subfolders"):
        open_dataset(config(tmp_path / "unchecked"), "train")
    dataset = open_dataset(config(tmp_path / "unchecked", quarantine=str(folder / "quarantine.json")), "train")
    assert len(dataset) == 12


@pytest.mark.parametrize("loader", LOADERS)
def test_readers_train_through_on_the_rest_and_tell_the_loss(folder, found, loader):
    settings = config(folder, loader=loader)
    dataset = open_dataset(settings, "train")
    assert dataset.class_names == ["a", "b"] and np.bincount(dataset.labels).tolist() == [6, 6]
    batches = train_loader(dataset, settings, batch_size=5, seed=0)
    seen = np.concatenate([batch.indices for batch in islice(batches, 12)])
    batches.close()
    assert np.bincount(seen).tolist() == [5] * 12  # five epochs, nothing twice in one
    assert "8 in quarantine (40.00%: " in describe(dataset) and "2 truncated" in describe(dataset)
    assert not dataset.broken


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("kind", ["zero bytes", "not an image", "truncated", "truncated header"])
def test_unchecked_a_bad_file_stops_a_run_by_name_or_is_counted(folder, found, tmp_path, loader, kind):
    for i in range(4):
        shutil.copy(folder / "a" / f"{i}.jpg", tmp_path)
    settings = config(tmp_path, loader=loader)
    dataset = open_dataset(settings, "train")
    (tmp_path / "2.jpg").write_bytes(BROKEN[kind](jpeg(0)))  # went bad after its header was read
    batches = train_loader(dataset, settings, batch_size=2, seed=0)
    with pytest.raises(UserError, match=r"cannot read image .*2\.jpg"):
        list(islice(batches, 2))
    tolerant = train_loader(replace(dataset, skip_broken=True), settings, batch_size=2, seed=0)
    assert sorted(np.concatenate([batch.indices for batch in islice(tolerant, 2)])) in ([0, 1, 3, 3], [0, 1, 1, 3])
    tolerant.close()


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "grey", "CMYK", "PNG", "WebP", "PNG with alpha", "EXIF"])
def test_sound_files_of_every_kind_pass(kind):
    picture = Image.open(BytesIO(jpeg(1)))
    picture = picture.convert({"grey": "L", "CMYK": "CMYK", "PNG with alpha": "RGBA"}.get(kind, "RGB"))
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"progressive": {"progressive": True}, "EXIF": {"exif": exif}}.get(kind, {})
    out = BytesIO()
    picture.save(out, kind.split()[0] if kind in ("PNG", "WebP", "PNG with alpha") else "JPEG", **options)
    assert examine(out.getvalue(), 16) is None


@pytest.mark.parametrize("kind", ["PNG", "WebP", "TIFF"])
def test_other_formats_cut_off_are_found(kind):
    out = BytesIO()
    Image.open(BytesIO(jpeg(1))).save(out, kind)
    assert examine(out.getvalue()[: len(out.getvalue()) // 2], 16)[0] in ("truncated", "damaged")


def test_most_damage_inside_a_jpeg_is_found():
    """64 bytes of noise almost always leave too few or too many codes behind; Pillow alone finds none of it."""
    whole = [jpeg(seed) for seed in range(40)]
    assert all(examine(one, 16) is None for one in whole)
    findings = [examine(flipped(one, seed), 16) for seed, one in enumerate(whole)]
    assert sum(found is not None for found in findings) >= 36
    for one in whole[:3]:
        Image.open(BytesIO(cut_by_a_marker(one))).load()  # no error
        assert examine(cut_by_a_marker(one), 16)[0] == "damaged"


def test_splits_are_checked_and_left_out_apart(tmp_path):
    for split, names in {"train": "ab", "val": "a"}.items():
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(3):
                (tmp_path / split / name / f"{i}.jpg").write_bytes(jpeg(i))
    (tmp_path / "train" / "a" / "1.jpg").write_bytes(b"")
    for i in range(3):
        (tmp_path / "train" / "b" / f"{i}.jpg").write_bytes(b"")
    (tmp_path / "val" / "a" / "2.jpg").write_bytes(jpeg(2)[:500])
    with pytest.raises(SystemExit) as ended:
        main(["check-data", str(tmp_path), "--workers", "1"])
    assert ended.value.code == 1
    train, test = (open_dataset(config(tmp_path), split) for split in ("train", "test"))
    assert (len(train), len(test), train.class_names) == (2, 2, ["a"])  # b has no image left
    assert train.quarantined == {f"{f}.jpg": "zero bytes" for f in ("a/1", "b/0", "b/1", "b/2")} | {"b/": "empty class"}
    assert test.quarantined == {"a/2.jpg": "truncated"}


def test_the_exit_code_tells_whether_files_are_listed(tmp_path, capsys):
    """As of `md5sum -c` and `grep`: scripts tell clean data from data with something wrong, and both from a mistake."""
    for name in ("[red]1.jpg", "2.jpg"):
        (tmp_path / name).write_bytes(jpeg(1))
    main(["check-data", str(tmp_path), "--workers", "1"])  # all usable: it returns, which is 0
    for left in ("[red]1.jpg", "2.jpg"):  # some of the files bad, then all
        (tmp_path / left).write_bytes(b"")
        with pytest.raises(SystemExit) as ended:
            main(["check-data", str(tmp_path), "--workers", "1"])
        assert ended.value.code == 1
        assert ("[red]1.jpg" in capsys.readouterr().out) == (left != "2.jpg")  # an example is shown
    with pytest.raises(UserError, match="all 2 images of .* are in quarantine"):
        open_dataset(DataConfig(str(tmp_path)), "train")
    assert json.loads((tmp_path / "quarantine.json").read_bytes())["left_out"] == 2


def test_floating_point_pixels_are_no_damage(tmp_path):
    """A sound TIFF of an astronomer's camera: what it is and what to do is told, by check-data and by readers."""
    Image.fromarray(np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)).save(tmp_path / "a.tif")
    (tmp_path / "b.jpg").write_bytes(jpeg(1))
    check_data(tmp_path, CheckData(workers=1), Console(quiet=True))
    listed = json.loads((tmp_path / "quarantine.json").read_bytes())
    assert listed["counts"] == {"floating-point pixels": 1} and "8 or 16 bits" in listed["files"][0]["detail"]
    with pytest.raises(UserError, match="floating-point numbers.*convert it to 8 or 16 bits"):
        decode(tmp_path / "a.tif")


def test_what_cannot_be_checked_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no folder of images"):
        check_data(tmp_path / "nothing", CheckData(), Console(quiet=True))
    with pytest.raises(UserError, match="has no images"):
        check_data(tmp_path, CheckData(), Console(quiet=True))
    with pytest.raises(UserError, match="min_side 0: must be at least 1"):
        CheckData(min_side=0)
    (tmp_path / "1.jpg").write_bytes(jpeg(1))
    for text in ("", "[]", '{"files": [{}]}'):
        (tmp_path / "quarantine.json").write_text(text)
        with pytest.raises(UserError, match="no quarantine list"):
            open_dataset(config(tmp_path), "train")
    with pytest.raises(UserError, match="cannot read quarantine list"):
        open_dataset(config(tmp_path, quarantine=str(tmp_path / "none.json")), "train")
