"""Batches of stored latents: what is read, in which order, on how many ranks; and disks that fail on the way."""

import math
import os
import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from umd.errors import UserError
from umd.train.data import GROUP, epoch_order, open_dataset, train_loader
from umd.train.latents import BLOCK, finish, shard_bytes, shard_name
from umd.train.settings import DataConfig

SHUFFLES = ["global", "blocks"]


def numbered(root: Path, sizes: list[int], views: int = 1) -> Path:
    """A folder whose one latent value tells (index, view), in shards of these sizes."""
    recipe = {"vae": dict(name="", kind="VQModel", sha256="", channels=1, factor=1, scale=1.0, shift=0.0)}
    recipe |= {"shape": [1, 1, 1], "dtype": "fp32", "class_names": ["even", "odd"]}
    first = 0
    for number, size in enumerate(sizes):
        index = np.arange(first, first + size)
        value = torch.from_numpy(index[:, None] + np.arange(views) / 10).float().view(size, views, 1, 1, 1, 1)
        data = shard_bytes(recipe, "train", value, index % 2, index, list(map(str, index)))
        (root / shard_name("train", number, len(sizes))).write_bytes(data)
        first += size
    finish(root, recipe, {"train": len(sizes), "test": 0})
    return root


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 60),
)
def test_ranks_share_every_epoch_for_any_world_size_and_resume_anywhere(
    tmp_path_factory, sizes, world_size, share, views, resumed
):
    folder, total = numbered(tmp_path_factory.mktemp("numbered"), sizes, views), sum(sizes)
    config = DataConfig(source=str(folder), image_size=(1, 1), channels=1, num_workers=0)
    dataset = open_dataset(config, "train")
    batch_size = share * world_size

    def stream(start: int, steps: int) -> list[tuple[int, int, float]]:
        """(label, index, value) of each sample of all ranks, in the order of the global batches."""
        loaders = [
            train_loader(
                dataset,
                config,
                batch_size=batch_size,
                seed=3,
                start=start,
                places=range(rank * share, (rank + 1) * share),
            )  # fmt: skip
            for rank in range(world_size)
        ]
        seen = []
        for batches in islice(zip(*loaders, strict=True), steps):
            for batch in batches:
                seen += zip(
                    batch.labels.tolist(), batch.indices.tolist(), batch.x_start.flatten().tolist(), strict=True
                )
        for loader in loaders:
            loader.close()
        return seen

    seen = stream(0, -(-3 * total // batch_size))
    for epoch in range(3):
        of_epoch = seen[epoch * total : (epoch + 1) * total]
        assert sorted(index for _, index, _ in of_epoch) == list(range(total))
        for label, index, value in of_epoch:
            assert label == index % 2 and math.isclose(value, index + (epoch % views) / 10, rel_tol=1e-6)
    steps = min(resumed, len(seen) // batch_size - 1)
    assert stream(steps * batch_size, 1) == seen[steps * batch_size : (steps + 1) * batch_size]


def opened(folder: Path, shuffle: str = "global", num_workers: int = 0):
    config = DataConfig(str(folder), (1, 1), 1, num_workers=num_workers, shuffle=shuffle)
    return open_dataset(config, "train"), config


def take(folder: Path, count: int, shuffle: str = "global", num_workers: int = 0, **place) -> list:
    dataset, config = opened(folder, shuffle, num_workers)
    loader = train_loader(dataset, config, seed=3, **place)
    try:
        return list(islice(loader, count))
    finally:
        loader.close()


# The order in blocks


@settings(max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=600), st.integers(0, 5))
def test_each_group_of_blocks_is_mixed_and_none_is_split(sizes, epoch):
    blocks, size = np.repeat(np.arange(len(sizes)), sizes), sum(sizes)
    order = epoch_order(size, 7, epoch, blocks)
    assert np.array_equal(np.sort(order), np.arange(size))
    first, seen = 0, []
    while first < size:  # groups are of 256 blocks but for the last, and a block is of one group
        group = []
        while first < size and len(set(group) | {blocks[order[first]]}) <= GROUP:
            group.append(blocks[order[first]])
            first += 1
        seen.append(set(group))
        assert len(group) == sum(sizes[block] for block in seen[-1])
    assert sum(map(len, seen)) == len(sizes)
    if len(sizes) <= GROUP:  # then nothing is in blocks
        assert np.array_equal(order, epoch_order(size, 7, epoch))


def test_blocks_meet_others_in_each_epoch():
    """Of two blocks one is in the other's group with probability 255/1023."""
    blocks = np.arange(4 * GROUP)
    met = []
    for epoch in range(40):
        groups = np.empty(len(blocks), dtype=int)
        groups[epoch_order(len(blocks), 0, epoch, blocks)] = np.arange(len(blocks)) // GROUP
        met.append(np.mean(groups[:-1] == groups[1:]))
    assert abs(np.mean(met) - 255 / 1023) < 0.02 and np.std(met) > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """304 blocks, so two groups: shards of one image, and two that are longer than a block."""
    return numbered(tmp_path_factory.mktemp("blocks"), [*[1] * 150, BLOCK + 1, *[1] * 150, 2 * BLOCK], views=2)


def test_blocks_are_neighbours_in_one_shard(folder):
    dataset, _ = opened(folder)
    assert np.array_equal(np.unique(dataset.blocks), np.arange(304))
    counts = np.bincount(dataset.blocks)
    assert counts.max() == BLOCK and np.array_equal(np.sort(counts)[-4:], [1, BLOCK, BLOCK, BLOCK])
    assert (np.diff(dataset.blocks) >= 0).all()


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_a_stream_goes_on_in_the_middle_of_an_epoch_on_other_ranks(shuffle, folder):
    whole = take(folder, 60, shuffle, batch_size=12)
    indices = torch.cat([batch.indices for batch in whole]).tolist()
    size = 300 + 3 * BLOCK + 1
    assert sorted(indices[:size]) == list(range(size)) != indices[:size]
    for ranks in (1, 2, 3):
        share = 12 // ranks
        parts = [
            take(folder, 20, shuffle, batch_size=12, start=31 * 12, places=range(rank * share, (rank + 1) * share))
            for rank in range(ranks)
        ]  # over the seam at 493 samples
        for expected, *found in zip(whole[31:51], *parts, strict=True):
            assert torch.equal(expected.indices, torch.cat([part.indices for part in found]))
            assert torch.equal(expected.x_start, torch.cat([part.x_start for part in found]))
            assert torch.equal(expected.labels, torch.cat([part.labels for part in found]))


@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_workers_read_what_one_process_reads(shuffle, folder):
    alone = take(folder, 50, shuffle, batch_size=11)
    for ours, theirs in zip(take(folder, 50, shuffle, num_workers=2, batch_size=11), alone, strict=True):
        assert torch.equal(ours.x_start, theirs.x_start) and torch.equal(ours.indices, theirs.indices)


def test_pictures_have_no_blocks():
    config = DataConfig(image_size=(8, 8), num_workers=0, shuffle="blocks")
    with pytest.raises(UserError, match="blocks is for stored latents; leave it at global"):
        train_loader(open_dataset(config, "train"), config, batch_size=2, seed=0)


# Reading


def test_any_rows_in_any_blocks(folder):
    dataset, _ = opened(folder)
    rng = np.random.default_rng(0)
    for block in (1, 7, BLOCK, 1000):
        indices, epochs = rng.integers(0, len(dataset), 200), rng.integers(0, 5, 200)
        found = dataset.typed(torch.from_numpy(dataset.read(indices, epochs, block))).flatten()
        torch.testing.assert_close(found, torch.from_numpy(indices + epochs % 2 / 10).float())


def test_a_dataset_goes_to_processes_that_are_not_forked(folder):
    dataset, _ = opened(folder)
    ids, epochs = np.array([3, 200]), np.array([0, 1])
    before = dataset.read(ids, epochs)
    sent = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(sent.read(ids, epochs), before) and len(sent) == len(dataset)


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    with safe_open(file, "np") as shard:
        rows = shard.get_tensor("moments")
    at = bytes(data).index(rows.tobytes(), start)
    data[at + 4 * (rows.shape[1] + 5)] ^= 4  # view 1 of its image 5
    with file.open("r+b") as stream:  # the same file, which may be open
        stream.write(data)


def cut_off(file: Path) -> None:
    os.truncate(file, 100)


def gone(file: Path) -> None:
    file.unlink()


def not_to_be_read(file: Path) -> None:
    """What a disk's error and a stale handle are: the file is there and opens, and a read fails."""
    file.unlink()
    file.mkdir()


DAMAGES = {
    flipped: r"differs from its checksum at view 1 of picture 15 \(row 25\); remove it and run umd encode-latents --",
    cut_off: r"ends before view [01] of picture 1\d \(row \d+\); remove it and run umd encode-latents --out ",
    gone: "is not there; run umd encode-latents --out",
    not_to_be_read: r"\(Is a directory\); see to the disk that it lies on",
}


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("shuffle", SHUFFLES)
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_what_breaks_after_a_run_has_begun_is_named_and_nothing_of_it_trained_on(
    damage, shuffle, num_workers, tmp_path
):
    """Shards of 10, 20 and 10 images; the second breaks."""
    dataset, config = opened(numbered(tmp_path, [10, 20, 10], views=2), shuffle, num_workers)
    damage(tmp_path / shard_name("train", 1, 3))
    given = []
    with pytest.raises(UserError, match="latents shard .*train-00001-of-00003.* " + DAMAGES[damage]):
        for batch in train_loader(dataset, config, batch_size=4, seed=0, start=40):  # of the second view
            given += batch.indices.tolist()
            assert len(given) < 80
    assert not set(given) & ({15} if damage is flipped else set(range(10, 30)))
