"""Clips: what is found and decoded, which frames are taken, and a run on them from the command line."""

import contextlib
import io
import json
import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from umd import cli
from umd.config import DiffMAEConfig, DiffMAEObjectiveConfig
from umd.errors import UserError
from umd.train.clips import decode_clip, open_clips, take_frames
from umd.train.data import center_view, centered_view_of_file, open_dataset, train_loader
from umd.train.inpaint import check_mp4, hole_mask, save_mp4
from umd.train.run import RunConfig
from umd.train.settings import DataConfig


def moving_square(seed: int, frames: int = 8, side: int = 12) -> np.ndarray:
    """A white square that moves a pixel a frame: uint8 [F, side, side, 3]."""
    rng = np.random.default_rng(seed)
    clip = np.full((frames, side, side, 3), 40, np.uint8)
    top, left = rng.integers(0, side - 4, 2)
    for f in range(frames):
        clip[f, top : top + 4, (left + f) % (side - 4) : (left + f) % (side - 4) + 4] = 250
    return clip


def write_frames(folder, clip):
    folder.mkdir(parents=True)
    for f, frame in enumerate(clip):
        Image.fromarray(frame).save(folder / f"{f:03}.png")


@pytest.fixture
def npz(tmp_path):
    clips = np.stack([moving_square(i) for i in range(20)])
    np.savez(tmp_path / "clips.npz", clips=clips, labels=np.arange(20) % 3)
    return tmp_path / "clips.npz"


def test_folders_of_frames_are_clips_with_the_labels_of_their_class(tmp_path):
    written = {}
    for label in ("down", "up"):
        for i in range(6):
            written[f"{label}/{i}"] = moving_square(len(written))
            write_frames(tmp_path / label / str(i), written[f"{label}/{i}"])
    parts = [open_clips(str(tmp_path), split, 0.3, False) for split in ("train", "test")]
    assert sum(map(len, parts)) == 12 and all(part.class_names == ["down", "up"] for part in parts)
    for part in parts:
        for i in range(len(part)):
            name = part.pictures[i].removeprefix(f"{tmp_path}/")
            assert np.array_equal(part.read(i)[1].pixels, written[name])
            assert part.class_names[part.labels[i]] == name.split("/")[0]


def test_video_files_are_decoded(tmp_path):
    av = pytest.importorskip("av")
    clip = np.stack([np.full((32, 48, 3), 10 + 20 * f, np.uint8) for f in range(10)])
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = 48, 32, "yuv420p", 4_000_000
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    decoded = decode_clip(tmp_path / "a.mp4")
    assert decoded.shape == clip.shape
    assert np.abs(decoded.astype(int) - clip).max() <= 6  # lossy
    data = (tmp_path / "a.mp4").read_bytes()
    for name, damaged in (
        ("cut.mp4", data[: len(data) // 3]),
        ("noise.mp4", bytes(range(256)) * 20),
        ("empty.mp4", b""),
    ):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(UserError, match=f"cannot read .*{name}"):
            decode_clip(tmp_path / name)


def test_frames_are_taken_at_a_stride_from_every_start():
    clip = np.arange(11, dtype=np.uint8).reshape(11, 1, 1, 1)
    rng = np.random.default_rng(0)
    starts = set()
    for _ in range(100):
        taken = take_frames(clip, 3, 4, rng)[:, 0, 0, 0]
        assert taken.tolist() == [taken[0], taken[0] + 4, taken[0] + 8]
        starts.add(int(taken[0]))
    assert starts == {0, 1, 2}
    assert take_frames(clip, 3, 4)[:, 0, 0, 0].tolist() == [1, 5, 9]
    with pytest.raises(UserError, match="a clip has 11 frames, and the model takes 4, every 4"):
        take_frames(clip, 4, 4, rng)


def test_an_npz_may_have_splits_of_its_own(tmp_path):
    clips = np.stack([moving_square(i) for i in range(7)])
    arrays = {"train_clips": clips[:4], "test_clips": clips[4:], "train_labels": np.arange(4) % 2}
    np.savez(tmp_path / "own.npz", **arrays, test_labels=np.array([0, 2, 1]))
    train, test = (open_clips(str(tmp_path / "own.npz"), split, 0.9, False) for split in ("train", "test"))
    assert np.array_equal(train.pictures, clips[:4]) and np.array_equal(test.pictures, clips[4:])
    assert train.labels.tolist() == [0, 1, 0, 1] and test.labels.tolist() == [0, 2, 1]
    assert train.class_names == test.class_names == ["0", "1", "2"]
    np.savez(tmp_path / "odd.npz", **arrays, test_labels=np.array([0, 2]))
    with pytest.raises(UserError, match="odd.npz has 3 test clips and 2 labels; expected as many"):
        open_clips(str(tmp_path / "odd.npz"), "test", 0.9, False)


def test_short_clips_are_named_or_left_out(tmp_path):
    for i, frames in enumerate((3, 8, 7, 9)):
        write_frames(tmp_path / str(i), moving_square(i, frames))
    config = DataConfig(str(tmp_path), image_size=(12, 12), num_frames=4, frame_stride=2, holdout=0, num_workers=0)
    dataset = open_dataset(config, "train")
    with pytest.raises(UserError, match="clip .*/0 has 3 frames, and the model takes 4, every 2: take it out"):
        center_view(dataset, [0], config)
    lenient = open_dataset(replace(config, skip_broken=True), "train")
    assert torch.equal(center_view(lenient, [0], config), center_view(dataset, [1], config))
    assert lenient.num_broken == 1
    with pytest.raises(UserError, match="/0 has 3 frames"):
        centered_view_of_file(tmp_path / "0", config)


def test_batches_are_whole_clips_with_one_crop_for_all_frames(npz):
    config = DataConfig(str(npz), image_size=(12, 12), num_frames=4, frame_stride=2, area_min=1, num_workers=0)
    dataset = open_dataset(config, "train")
    batch = next(train_loader(dataset, config, batch_size=5, seed=1))
    assert batch.x_start.shape == (5, 3, 4, 12, 12) and batch.labels.shape == (5,)
    for x, index in zip(batch.x_start, batch.indices, strict=True):
        clip = dataset.read(int(index))[1].pixels
        views = [view[:, :, ::flip] for start in (0, 1) for flip in (1, -1) for view in [clip[start : start + 7 : 2]]]
        found = ((x.permute(1, 2, 3, 0) + 1) * 127.5).round().numpy()
        assert any(np.array_equal(found, view) for view in views)
    again = next(train_loader(dataset, config, batch_size=5, seed=1))
    assert torch.equal(batch.x_start, again.x_start)
    middle = center_view(dataset, [0], config)
    assert np.array_equal(
        ((middle[0].permute(1, 2, 3, 0) + 1) * 127.5).round().numpy(), dataset.read(0)[1].pixels[0:7:2]
    )


def test_clips_are_written_as_mp4(tmp_path):
    """Smooth frames come back nearly; an odd side is one longer, its last line twice; frames keep their order."""
    pytest.importorskip("av")
    y, x = np.mgrid[:31, :45]
    clip = np.stack([np.stack([40 + 3 * y, 220 - 3 * x, 0 * x + 20 * f], -1) for f in range(9)]).astype(np.uint8)
    save_mp4(clip, tmp_path / "new" / "a.mp4")
    back = decode_clip(tmp_path / "new" / "a.mp4")
    assert back.shape == (9, 32, 46, 3)
    assert (
        np.abs(back[:, :31, :45].astype(int) - clip).max() <= 16 and np.abs(back[:, :31, :45] - 1.0 * clip).mean() < 3
    )
    assert np.abs(back[:, 31].astype(int) - back[:, 30]).max() <= 8
    save_mp4(clip[:, :30, :44], tmp_path / "even.mp4")
    assert decode_clip(tmp_path / "even.mp4").shape == (9, 30, 44, 3)


def test_no_mp4_without_pyav_or_of_images(tmp_path, monkeypatch):
    """The sentence comes before the sampling."""
    target = DiffMAEObjectiveConfig()
    video = RunConfig(model=DiffMAEConfig(num_frames=8), objective=target, out=tmp_path)
    with pytest.raises(UserError, match="is a run on images, and an MP4 is a clip; leave out --mp4"):
        check_mp4(RunConfig(model=DiffMAEConfig(), objective=target, out=tmp_path))
    monkeypatch.setitem(sys.modules, "av", None)  # what import finds where it is not installed
    with pytest.raises(UserError, match="writing MP4 needs PyAV: pip install av"):
        check_mp4(video)


def test_holes_of_clips_are_whole_tubelets():
    x = torch.zeros(2, 3, 8, 12, 12)
    frames = hole_mask("frames", x, 4, tubelet_size=2)
    assert frames.shape == (2, 1, 8, 12, 12) and frames[0, 0, :, 0, 0].tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    random = hole_mask("random", x, 4, seed=1, mask_ratio=0.5, tubelet_size=2)
    tubelets = random.view(2, 4, 2, 3, 4, 3, 4)
    assert (tubelets == tubelets[:, :, :1, :, :1, :, :1]).all() and 0.2 < random.mean() < 0.8


def test_a_mask_of_frames_is_for_clips():
    with pytest.raises(UserError, match="the mask frames is for clips, and this run is on images"):
        hole_mask("frames", torch.zeros(1, 3, 8, 8), 4)
    with pytest.raises(UserError, match="mask 'middle' cannot be read; expected center, left, random, frames, or"):
        hole_mask("middle", torch.zeros(1, 3, 8, 8, 8), 4)


def umd(line: str) -> tuple[int, str]:
    err, code = io.StringIO(), 0
    with contextlib.redirect_stderr(err):
        try:
            cli.main(line.split())
        except SystemExit as stop:
            code = int(stop.code or 0)
    return code, err.getvalue()


TINY = (
    "--model.image-size 12 12 --model.num-frames 8 --model.tubelet-size 2 --model.patch-size 4 --model.hidden-size 16 "
    "--model.depth 2 --model.num-heads 2 --model.decoder-hidden-size 8 --model.decoder-depth 2 "
    "--model.decoder-num-heads 2 --batch-size 4 --log-every 1 --device cpu --precision fp32 --data.num-workers 0 "
    "--data.frame-stride 1"
)


def test_a_run_on_clips_trains_and_fills(npz, tmp_path):
    run = tmp_path / "run"
    code, err = umd(f"pretrain diffmae-video-l --data.source {npz} --out {run} --steps 2 --draw-every 2 {TINY}")
    assert code == 0, err
    for mask in ("frames", "random"):
        mp4 = "--mp4" if mask == "frames" and find_spec("av") else ""
        code, err = umd(f"inpaint {run} --mask {mask} --samples 2 --steps 2 --out {tmp_path / mask} {mp4}")
        assert code == 0, err
        gifs, films = ({file.stem for file in (tmp_path / mask).glob(f"*.{kind}")} for kind in ("gif", "mp4"))
        assert "1-sample-2" in gifs and films == (gifs if mp4 else set())
        with Image.open(tmp_path / mask / "1-sample-2.gif") as gif:
            assert gif.n_frames == 8 and gif.size == (12, 12)
        assert (tmp_path / f"{mask}.png").exists() and (tmp_path / f"{mask}-steps.png").exists()
    code, err = umd(
        f"finetune {run} --task classify --steps 2 --batch-size 4 --out {tmp_path / 'classes'} --data.num-workers 0"
    )
    assert code == 0, err
    scores = json.loads((tmp_path / "classes" / "scores.json").read_text())
    assert scores["classes"] == ["0", "1", "2"] and scores["images"] == len(open_clips(str(npz), "test", 0.2, False))


def test_mistakes_are_one_sentence(npz, tmp_path):
    new = f"pretrain diffmae-video-l --out {tmp_path / 'run'} --steps 1 {TINY}"
    (tmp_path / "none").mkdir()
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.savez(tmp_path / "float.npz", clips=np.zeros((3, 8, 4, 4, 3)))
    (tmp_path / "text.npz").write_text("no archive")
    write_frames(tmp_path / "uneven" / "a", moving_square(0))
    Image.new("RGB", (5, 5)).save(tmp_path / "uneven" / "a" / "999.png")
    write_frames(tmp_path / "short" / "a", moving_square(0, frames=3))
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "a.mp4").write_bytes(bytes(range(256)) * 20)
    for source, message in (
        (npz, "clips.npz has 8 frames, and the model takes 8, every 2"),
        (tmp_path / "short", "short/a has 3 frames, and the model takes 8: take it out or give a longer one"),
        (tmp_path / "nowhere", "holds no clips"),
        (tmp_path / "none", "holds no clips"),
        (tmp_path / "other.npz", "expected an array `clips`"),
        (tmp_path / "float.npz", r"are float64 [3, 8, 4, 4, 3]; expected uint8"),
        (tmp_path / "text.npz", "cannot read clips"),
        (tmp_path / "uneven", "its frames differ in size"),
        *([(tmp_path / "damaged", "cannot read video")] if find_spec("av") else []),
    ):
        stride = "--data.frame-stride 2" if source == npz else ""
        code, err = umd(f"{new} --data.source {source} --data.holdout 0 {stride}")
        assert code == 2 and message in err and err.count("\n") == 1, err
