"""Folders as people have them: hidden ones, links that lead in circles, files of other kinds, one level too deep."""

import os
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image, features
from rich.console import Console

from umd.errors import UserError
from umd.train.check import check_data, files_of
from umd.train.data import open_dataset
from umd.train.listing import SERVICE, image_suffixes, is_image, suffix_of
from umd.train.options import CheckData
from umd.train.settings import DataConfig


def picture(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((8, 8, 3), shade, np.uint8)
    Image.fromarray(pixels).save(path, Image.registered_extensions().get(path.suffix.lower(), "JPEG"))


def classes(root, *names, count=8):
    for name in names:
        for i in range(count):
            picture(root / name / f"{i}.jpg", i)


def opened(root, split="train", **options):
    return open_dataset(DataConfig(source=str(root), image_size=(8, 8), **options), split)


def read(root, **options):
    """Paths relative to the source, of both splits."""
    parts = [opened(root, split, **options) for split in ("train", "test")]
    return sorted(os.path.relpath(path, root) for part in parts for path in part.pictures)


def plain(*names, count=8):
    return sorted(f"{name}/{i}.jpg" for name in names for i in range(count))


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "@eaDir", ".Trash-1000", "__MACOSX", "lost+found", ".git"])
def test_hidden_folders_are_no_pictures_at_any_depth(tmp_path, hidden):
    classes(tmp_path, "cat", "dog/deep")
    for place in ("", "cat", "dog", "dog/deep"):
        picture(tmp_path / place / hidden / "copy.jpg")
        picture(tmp_path / place / hidden / "more" / "copy.jpg")
    picture(tmp_path / "cat" / "._0.jpg")
    (tmp_path / "cat" / "Thumbs.db").touch()
    assert read(tmp_path) == plain("cat", "dog/deep")
    dataset = opened(tmp_path)
    assert dataset.class_names == ["cat", "dog"] and dataset.notes == []
    checked = files_of(tmp_path)
    assert len(checked.files) == 16 and checked.wrong == checked.notes == []


def test_hidden_folders_of_tars_and_clips_are_none_either(tmp_path):
    for i in range(8):
        picture(tmp_path / f"{i}.jpg")
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for place in ("./cat", "__MACOSX/cat", "cat/.ipynb_checkpoints"):
            for i in range(8):
                archive.add(tmp_path / f"{i}.jpg", f"{place}/{i}.jpg")
    assert len(opened(tmp_path / "set.tar", holdout=0)) == 8
    for clip in ("a", "b", "c", ".Trash/c", "a/@eaDir", "@eaDir/a"):
        for i in range(4):
            picture(tmp_path / "clips" / clip / f"{i}.png")
    dataset = opened(tmp_path / "clips", holdout=0, num_frames=4)
    assert [os.path.relpath(path, tmp_path / "clips") for path in dataset.pictures] == ["a", "b", "c"]
    assert len(dataset.read(0)[1].pixels) == 4


def test_links_that_lead_back_end_and_are_told(tmp_path):
    classes(tmp_path, "cat", "dog")
    (tmp_path / "cat" / "loop").symlink_to("..")
    (tmp_path / "dog" / "loop").symlink_to(".")
    (tmp_path / "dog" / "up").symlink_to(tmp_path.parent)
    (tmp_path / "all").symlink_to(".")
    assert read(tmp_path) == plain("cat", "dog")
    dataset = opened(tmp_path)
    assert dataset.class_names == ["cat", "dog"]
    assert dataset.notes == [
        "links that lead back to folders already read are passed over: all, cat/loop, dog/loop, dog/up"
    ]


def test_each_folder_is_read_once_in_a_class_under_its_own_name(tmp_path):
    classes(tmp_path, "cat/z", "dog")
    (tmp_path / "cat" / "a").symlink_to("z")
    (tmp_path / "cat" / "z" / "b").symlink_to("../../cat")
    assert read(tmp_path) == plain("cat/z", "dog")
    assert "passed over: cat/a, cat/z/b" in opened(tmp_path).notes[0]


def test_links_elsewhere_are_followed(tmp_path):
    """To files, to folders, and to a class's folder."""
    classes(tmp_path / "elsewhere", "cat", "more", "far")
    root = tmp_path / "root"
    (root / "cat").mkdir(parents=True)
    for i in range(8):
        (root / "cat" / f"{i}.jpg").symlink_to(tmp_path / "elsewhere" / "cat" / f"{i}.jpg")
    (root / "cat" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (root / "dog").symlink_to(tmp_path / "elsewhere" / "far")
    assert read(root) == plain("cat", "cat/more", "dog") and opened(root).notes == []
    (root / "dog" / "cat").symlink_to(root / "cat")
    assert opened(root).notes == ["one folder in several classes, by links: cat and dog/cat, cat/more and dog/cat/more"]


def test_files_that_are_not_read_are_counted_by_suffix(tmp_path, capsys):
    classes(tmp_path, "cat", "__dog", "_bird")
    for i in range(5):
        (tmp_path / "cat" / f"{i}.HEIC").touch()
    for name in ("cat/a.heic", "_bird/x.jpeg.1", "__dog/n01440764_10026", "__dog/.hidden", "labels.csv"):
        (tmp_path / name).touch()
    dataset = opened(tmp_path)
    assert dataset.class_names == ["__dog", "_bird", "cat"]
    if ".heic" in image_suffixes():
        pytest.skip("pillow-heif is installed")
    said = (
        "9 files are not read: 6 .heic, 1 .csv, 1 without a suffix, 1 .jpeg.1; `pip install pillow-heif` has .heic and"
    )
    parts, expected = (set(text.replace(";", ",").split(", ")) for text in (dataset.notes[0], said))
    assert expected - {"`pip install pillow-heif` has .heic and"} <= parts | {" "} and "pip install pillow-heif" in str(
        parts
    )
    assert "pictures are known by their suffix (.jpg .jpeg .png ...): rename" in dataset.notes[0]
    check_data(tmp_path, CheckData(min_side=1, workers=1), Console(width=400))
    assert dataset.notes[0] in capsys.readouterr().out


def test_a_source_of_which_nothing_can_be_read_names_the_suffixes(tmp_path):
    for name in ("cat/a.CR2", "cat/b.cr2", "dog/c.CR2"):
        (tmp_path / "raw" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "raw" / name).touch()
    with pytest.raises(UserError, match=r"raw has no images that can be read \(3 files are not read: 3 .cr2; convert"):
        opened(tmp_path / "raw")
    with pytest.raises(
        UserError, match=r"raw/cat has no images that can be read \(2 files are not read: 2 .cr2; conve"
    ):
        opened(tmp_path / "raw" / "cat")
    classes(tmp_path / "raw", "dog")
    with pytest.raises(UserError, match=r"class folder .*raw/cat has no images that can be read \(2 files .* 2 .cr2"):
        opened(tmp_path / "raw")
    with tarfile.open(tmp_path / "raw.tar", "w") as archive:
        archive.add(tmp_path / "raw" / "cat", "cat")
    with pytest.raises(UserError, match=r"raw.tar has no images that can be read \(2 files are not read: 2 .cr2"):
        opened(tmp_path / "raw.tar")


@pytest.mark.parametrize("suffix", [".AVIF", ".jp2", ".TIFF", ".ppm", ".tga", ".JPE", ".jfif", ".pgm", ".ico"])
def test_what_pillow_reads_is_read(tmp_path, suffix):
    if not features.check({".AVIF": "avif", ".jp2": "jpg_2000"}.get(suffix, "zlib")):
        pytest.skip("Pillow was built without it")
    for i in range(3):
        if suffix == ".pgm":
            Image.new("L", (8, 8), i).save(tmp_path / f"{i}{suffix}", "PPM")
        else:
            picture(tmp_path / f"{i}{suffix}", i)
    dataset = opened(tmp_path, holdout=0)
    assert len(dataset) == 3 and dataset.notes == [] and dataset.read(1)[1].pixels.shape[:2] == (8, 8)


def test_no_suffix_is_taken_that_pillow_cannot_decode():
    for name in (
        "a.pdf",
        "a.mpg",
        "a.h5",
        "a.eps",
        "a.wmf",
        "a.grib",
        "a.txt",
        "jpg",
        "a.jpg~",
        "a.",
        "",
        ".jpg",
        "._a.jpg",
    ):
        assert not name or not is_image(name), name
    assert is_image("a.b.JPG") and is_image("A.WebP") and all(name == name.lower() for name in SERVICE)


def test_suffixes():
    names = ["a.HEIC", "a", "n0144_1", "a.jpeg.1", "a.b.txt", "a.1", ".x"]
    assert Counter(map(suffix_of, names)) == Counter({".heic": 1, "": 3, ".jpeg.1": 1, ".txt": 1, ".1": 1})


def test_one_level_too_deep_is_told_with_the_path_to_give(tmp_path):
    classes(tmp_path, "sets/photos/cat", "sets/photos/dog", "sets/photos/emu")
    for root in (tmp_path, tmp_path / "sets"):
        (note,) = opened(root).notes
        assert f"has one class folder, {'sets' if root == tmp_path else 'photos'}/, so that all pictures are of" in note
        assert note.endswith(
            f"if the 3 folders in {tmp_path}/sets/photos (cat/ ...) are the classes, give {tmp_path}/sets/photos"
        )
    assert opened(tmp_path / "sets" / "photos").notes == []
    classes(tmp_path / "two", "training/cat", "training/dog", "validation/cat")
    (note,) = opened(tmp_path / "two").notes
    assert note.startswith(
        f"the 2 class folders of {tmp_path}/two hold no pictures themselves, only folders of them (training/"
    )
    assert note.endswith(f"if these are the classes, give {tmp_path}/two/training")
    classes(tmp_path / "splits", "train/all/cat", "train/all/dog", "test/all/cat")
    (note,) = opened(tmp_path / "splits").notes
    assert note.endswith(f"are the classes, move them up into {tmp_path}/splits/train")
    classes(tmp_path / "fine", "cat/2021", "cat/2022", "dog")
    assert opened(tmp_path / "fine").notes == []


def test_a_held_out_split_one_level_too_deep_is_refused_with_what_to_move(tmp_path):
    classes(tmp_path, "train/cat", "train/dog", "test/images/cat")
    with pytest.raises(
        UserError, match="test/images has no counterpart in .*train: move what is in it up into .*test."
    ):
        opened(tmp_path, "test")


def test_what_lies_beside_the_splits_is_told(tmp_path):
    """Of ImageNet's three splits, test/ has no labels."""
    classes(tmp_path, "train/a", "train/b", "test", "val/a", "val/b", "unlabeled")
    picture(tmp_path / "x.jpg")
    (note,) = opened(tmp_path).notes
    assert note == f"not read, beside train/ and val/ in {tmp_path}: test/, unlabeled/, 1 images"
    assert set(opened(tmp_path, "test").labels.tolist()) == {0, 1}
