"""Features on disk: the same on any number of ranks, at any cut, and whatever is in one call with a picture."""

import shutil

import numpy as np
import pytest
import torch
from rich.console import Console

from umd.errors import UserError
from umd.train.features import CALL, Features, extracted, name_of, read_ahead, spans
from umd.train.shards import Job, images_done, next_job, share

QUIET = Console(quiet=True)
WEIGHTS = torch.randn(48, 20, generator=torch.Generator().manual_seed(0))


def pictures(ids: np.ndarray) -> torch.Tensor:
    """A picture [3, 4, 4] for every number."""
    return torch.stack([torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(int(i))) for i in ids])


def extract(x: torch.Tensor, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    assert len(x) == len(ids) == CALL
    return {"f": x.flatten(1) @ WEIGHTS, "id": ids[:, None].float()}


def made(folder, ids, ranks: int = 1, **options) -> Features:
    features = Features(folder, {"what": "test"}, np.asarray(ids), **options)
    done = []
    for rank in reversed(range(ranks)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RANK", str(rank))
            patch.setenv("WORLD_SIZE", str(ranks))
            done.append(share(features.jobs(pictures, extract), QUIET, "features"))
    assert done == [False] * (ranks - 1) + [True]
    return features


def test_features_are_those_of_their_pictures_on_any_number_of_ranks(tmp_path):
    ids = np.random.default_rng(0).permutation(1000)[:333]
    one, three = made(tmp_path / "1", ids, per_file=50), made(tmp_path / "3", ids, ranks=3, per_file=50)
    assert len(one.files) == 7
    for a, b in zip(one.files, three.files, strict=True):
        assert a.read_bytes() == b.read_bytes()
    features = one.read("f")
    torch.testing.assert_close(features, pictures(ids).flatten(1) @ WEIGHTS)
    assert one.read("id").flatten().long().tolist() == ids.tolist()


def test_ranks_share_what_a_lost_rank_left(tmp_path):
    jobs = [Job(tmp_path / f"{i:02d}", 1, lambda advance: b"x") for i in range(40)]
    there = {job.path for i, job in enumerate(jobs) if i % 4 != 1}  # all but rank 1's
    ways = {rank: [] for rank in range(4)}
    while len(there) < 40:  # in rounds, as ranks work side by side
        took = {rank: next_job(jobs, there, rank, 4) for rank in range(4)}
        for rank, job in took.items():
            ways[rank] += [job.path] if job else []
        there |= {job.path for job in took.values() if job}
    assert ways[1][0].name == "01" and max(map(len, ways.values())) == 3, "ten files, four ranks"
    assert next_job(jobs, {job.path for job in jobs[1:]}, 2, 4) is None, "rank 0 is making it"


def test_a_folder_is_named_by_pictures_and_settings(tmp_path):
    ids = np.arange(10)
    folders = {
        Features(tmp_path, recipe, chosen).folder
        for recipe in ({"t": 0}, {"t": 1})
        for chosen in (ids, ids[::-1].copy(), ids[:5])
    }
    assert len(folders) == 6
    assert Features(tmp_path, {"t": 0}, np.arange(10)).folder in folders
    assert name_of({"a": 1, "b": 2}) == name_of({"b": 2, "a": 1})


def test_every_picture_is_read_once_and_the_next_while_the_network_works():
    asked = []

    def read(ids):
        asked.append(ids.tolist())
        return pictures(ids)

    batches = read_ahead(np.arange(150), read)
    next(batches)
    next(batches)
    assert asked[:2] == [list(range(64)), list(range(64, 128))]
    assert [len(x) for _, x in batches] == [22]
    assert sum(asked, []) == list(range(150))


def test_what_is_not_finite_or_not_whole_is_refused(tmp_path):
    with pytest.raises(UserError, match="hold NaN or infinity"):
        extracted(np.arange(3), pictures, lambda x, ids: {"f": x.flatten(1) / 0}, lambda done: None)
    features = made(tmp_path, np.arange(3))
    features.files[0].write_bytes(b"half")
    with pytest.raises(UserError, match="were damaged .* and are removed: run the same command again"):
        features.read("f")
    assert torch.equal(made(tmp_path, np.arange(3)).read("f"), made(tmp_path / "other", np.arange(3)).read("f"))


def test_what_is_there_is_not_made_again(tmp_path):
    made_now = []
    jobs = [Job(tmp_path / str(i), 10, lambda advance, i=i: made_now.append(i) or b"x") for i in range(5)]
    for i in (1, 4):
        jobs[i].path.write_bytes(b"there")
    assert images_done(jobs) == 20
    assert share(jobs, QUIET, "work") and made_now == [0, 2, 3]
    assert jobs[1].path.read_bytes() == b"there"


def test_a_disk_that_refuses_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    for path, said in (
        (tmp_path / "file" / "part", "cannot make the folder"),
        (tmp_path / ("x" * 300), "could not write"),
    ):
        with pytest.raises(UserError, match=f"{said} .*run the same command again"):
            share([Job(path, 1, lambda advance: b"x")], QUIET, "work")


def test_a_rank_whose_parts_others_have_put_together_stops(tmp_path):
    folder, made_now = tmp_path / "parts", []

    def make(i: int) -> bytes:
        made_now.append(i)
        if i == 1:
            shutil.rmtree(folder)  # as the rank does that found all files
        return b"x"

    assert not share([Job(folder / str(i), 1, lambda advance, i=i: make(i)) for i in range(4)], QUIET, "work")
    assert made_now == [0, 1] and not folder.exists()


def test_spans():
    assert spans(10, 4) == [(0, 4), (4, 8), (8, 10)] and spans(8, 4) == [(0, 4), (4, 8)] and spans(0, 4) == []
