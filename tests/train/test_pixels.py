"""Stored pictures: the crops of the files, on any ranks, after any stop; damage is told."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from umd.errors import UserError
from umd.train.crops import bicubic_weights, crop_batch, draw_view, resized
from umd.train.data import center_view, open_dataset, train_loader
from umd.train.decoding import whole
from umd.train.options import EncodePixels
from umd.train.pixels import encode_pixels, inspect_pixels, open_pixels
from umd.train.settings import DataConfig

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Smooth pictures of several shapes, in three classes."""
    root = tmp_path_factory.mktemp("smooth")
    for i in range(24):
        height, width = [(90, 120), (120, 90), (100, 100), (60, 150)][i % 4]
        y, x = np.mgrid[0:height, 0:width]
        picture = [127 + 100 * np.sin(x / 20 + c + i) * np.cos(y / 17 - i) for c in range(3)]
        path = root / f"class{i % 3}" / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.stack(picture, -1).round().astype(np.uint8)).save(path, quality=97, subsampling=0)
    return root


def stored(folder, out, ranks: int = 1, **options):
    for rank in reversed(range(ranks)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", str(ranks))
            encode_pixels(EncodePixels(str(folder), out, (48, 48), shard_images=5, **options), QUIET)
    return out


def batches(config: DataConfig, count: int, **place):
    loader = train_loader(open_dataset(config, "train"), config, batch_size=6, seed=3, **place)
    found = list(islice(loader, count))
    loader.close()
    return found


def test_a_batch_of_crops_is_pillows():
    rng = np.random.default_rng(0)
    pictures = rng.integers(64, 192, (40, 48, 40, 3), dtype=np.uint8)  # nothing is clipped
    config = DataConfig(image_size=(24, 32), area_min=0.1)
    drawn = [draw_view(rng, 48, 40, config) for _ in pictures]
    boxes, mirrored = torch.tensor([box for box, _ in drawn]), torch.tensor([flag for _, flag in drawn])
    found = crop_batch(torch.from_numpy(pictures), boxes, mirrored, (24, 32)).movedim(1, -1)
    found = (found + 1).mul(127.5).round()
    for x, picture, (box, flag) in zip(found, pictures, drawn, strict=True):
        expected = torch.from_numpy(resized(whole(picture), box, config).copy())
        expected = expected.flip(1) if flag else expected
        assert (x - expected).abs().max() <= 1, "each of Pillow's two passes rounds"
        assert (x != expected).float().mean() < 0.35
    weights = bicubic_weights(torch.tensor([0.0, 3.5]), torch.tensor([48.0, 20.0]), 24, 48)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 24))
    ramp = (torch.arange(48) + 0.5) @ weights[0].T  # linear functions stay what they are, away from the edges
    torch.testing.assert_close(ramp[2:-2], (torch.arange(24) * 2.0 + 1)[2:-2], rtol=0, atol=1e-4)


def test_a_run_sees_the_crops_of_the_files(folder, tmp_path):
    out = stored(folder, tmp_path / "stored")
    files, shards = DataConfig(str(folder), (32, 32)), DataConfig(str(out), (32, 32))
    for workers in (0, 2):
        pairs = zip(
            batches(replace(files, num_workers=0), 12), batches(replace(shards, num_workers=workers), 12), strict=True
        )
        for a, b in pairs:
            assert torch.equal(a.indices, b.indices) and torch.equal(a.labels, b.labels)
            assert (a.x_start - b.x_start).abs().max() * 127.5 < 6, "a crop that is off by a pixel differs by 15"
    for split in ("train", "test"):
        a, b = (open_dataset(config, split) for config in (files, shards))
        assert len(a) == len(b) > 0 and a.class_names == b.class_names
        ids = np.arange(len(a))
        difference = center_view(a, ids, files) - center_view(b, ids, shards)
        assert difference.abs().max() * 127.5 < 6
    first = batches(shards, 7)
    for a, b in zip(first[3:], batches(shards, 4, start=18), strict=True):
        assert torch.equal(a.x_start, b.x_start)
    halves = [batches(shards, 7, places=range(p, 6, 2)) for p in (0, 1)]
    for whole_batch, even, odd in zip(first, *halves, strict=True):
        assert torch.equal(whole_batch.x_start, torch.stack([even.x_start, odd.x_start], 1).flatten(0, 1))


def test_the_same_bytes_on_any_ranks_and_after_any_stop(folder, tmp_path):
    one, three = stored(folder, tmp_path / "one"), stored(folder, tmp_path / "three", ranks=3)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in three.iterdir()) and names[-1] == "pixels.json"
    assert all((one / name).read_bytes() == (three / name).read_bytes() for name in names)
    (three / names[0]).unlink()
    (three / "pixels.json").unlink()
    with pytest.raises(UserError, match="are not finished: run the same umd encode-pixels"):
        open_dataset(DataConfig(str(three), (32, 32)), "train")
    with pytest.raises(UserError, match="are not finished: run the same umd encode-pixels"):
        inspect_pixels(three, "train", 4, True, tmp_path / "some.png", QUIET)
    stored(folder, three)
    assert all((one / name).read_bytes() == (three / name).read_bytes() for name in names)
    with pytest.raises(UserError, match="made with another size; give the settings"):
        encode_pixels(EncodePixels(str(folder), one, (32, 32), shard_images=5), QUIET)


def test_damage_is_told_and_not_trained_on(folder, tmp_path):
    out = stored(folder, tmp_path / "stored")
    config = DataConfig(str(out), (32, 32), num_workers=0)
    inspect_pixels(out, "train", 4, True, tmp_path / "some.png", QUIET)
    with Image.open(tmp_path / "some.png") as image:
        assert image.size == (4 * 50 + 2, 52)
    with pytest.raises(UserError, match=r"stored at 48x48, and the model sees 64x64: .*--size 96 96"):
        open_dataset(replace(config, image_size=(64, 64)), "train")
    with pytest.raises(UserError, match="colour pictures"):
        open_dataset(replace(config, channels=1), "train")
    shard = out / json.loads((out / "pixels.json").read_text())["splits"]["train"]["shards"][1]["file"]
    data = bytearray(shard.read_bytes())
    dataset = open_dataset(config, "train")
    start = dataset.pictures.shards[1].tensors["pixels"][1]
    data[start + 3 * 48 * 48 * 3 + 100] ^= 4
    shard.write_bytes(data)
    with pytest.raises(UserError, match=rf"{shard.name} differs from its checksums in row 3; remove it and run"):
        batches(config, 8)
    with pytest.raises(UserError, match="row 3"):
        inspect_pixels(out, "train", 4, True, tmp_path / "some.png", QUIET)
    shard.write_bytes(data[:-7])
    with pytest.raises(UserError, match=rf"pixels shard .*{shard.name} has {len(data) - 7} bytes where"):
        open_pixels(out, "train", config)
    shard.unlink()
    with pytest.raises(UserError, match=rf"pixels shard .*{shard.name} is not there; run umd encode-pixels --data.so"):
        open_pixels(out, "train", config)


def test_unreadable_pictures_are_left_out_on_demand(folder, tmp_path):
    root = tmp_path / "broken"
    for i in range(12):
        path = root / f"{i:02d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes((folder / f"class{i % 3}" / f"{i:02d}.jpg").read_bytes()[: 2000 if i == 4 else None])
    with pytest.raises(UserError, match="04.jpg .*truncated"):
        stored(root, tmp_path / "strict", holdout=0)
    out = stored(root, tmp_path / "lax", holdout=0, skip_broken=True)
    dataset = open_pixels(out, "train", DataConfig(str(out), (32, 32)))
    assert len(dataset) == 11 and dataset.num_broken == 1 and dataset.labels is None
