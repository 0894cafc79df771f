"""Read clips from a folder of video files or folders of frames, or from a .npz, into a `ClipDataset`.

A clip is decoded whole, then F frames are taken from it (`take_frames`). So cut long videos into clips first.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from umd.errors import UserError
from umd.train.decoding import BrokenPicture, Picture, Shrink, decode, read_patiently, whole
from umd.train.folders import Found, level_note
from umd.train.index import Names
from umd.train.listing import above, entries, files_below, is_hidden, is_image, notes_of
from umd.train.sources import ImageDataset, check_labels
from umd.train.splits import choose_split, hashes_of

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif", ".mpg", ".m4v")


@dataclass
class ClipDataset(ImageDataset):
    """The clips of one split. `pictures` is uint8 [N, F', h, w, C], or a list of N video files or folders of frames."""

    num_frames: int = 1
    """Frames taken from each clip."""
    frame_stride: int = 1
    """Take every n-th frame."""

    def picture(self, index: int, shrink: Shrink | None = None) -> Picture:
        """Read a clip as stored, uint8 [F', h, w, C]. Raises BrokenPicture if it cannot be decoded or is too short."""
        clip = self.pictures[index]
        if isinstance(clip, np.ndarray):
            return whole(clip)
        frames = decode_clip(Path(clip))
        check_length(len(frames), self.num_frames, self.frame_stride, f"clip {clip}")
        return whole(frames)


def open_clips(
    source: str, split: str, holdout: float, skip_broken: bool, num_frames: int = 1, frame_stride: int = 1
) -> ClipDataset:
    """Open the clips of one split. Raises UserError if the source is missing, damaged, or has no clips."""
    path = Path(source).expanduser()
    if path.suffix == ".npz" and path.exists():
        dataset = open_clip_arrays(path, split, holdout)
        assert isinstance(dataset.pictures, np.ndarray)
        check_length(dataset.pictures.shape[1], num_frames, frame_stride, f"a clip of {path}")
        return dataset
    if not path.is_dir():
        raise UserError(
            f"data source {source} holds no clips: expected a folder of video files or of folders of frames, or a .npz"
        )
    here, outside = entries(path, is_frame_or_video), above(path)
    below = [files_below(path, name, outside, is_frame_or_video) for name in sorted(here.folders + here.links)]
    files = [Path(file) for file in (*here.files, *(file for part in below for file in part.files))]
    videos = [file for file in files if file.suffix.lower() in VIDEO_SUFFIXES]
    folders = {file.parent for file in files if file.suffix.lower() not in VIDEO_SUFFIXES and file.parent != Path()}
    names = sorted({*videos, *folders})
    notes = notes_of(below, here.others)
    if not names:
        told = f" ({'; '.join(notes)})" if notes else ""
        raise UserError(
            f"{path} holds no clips{told}: expected video files ({', '.join(VIDEO_SUFFIXES)}) or folders of frames"
        )
    labels, class_names = None, []
    if all(len(name.parts) > 1 for name in names):  # class/clip
        class_names = sorted({name.parts[0] for name in names})
        labels = np.array([class_names.index(name.parts[0]) for name in names], dtype=np.int64)
        found = Found(Names.of(map(str, names)), labels, class_names, notes)
        notes += filter(None, [level_note(path, found, splits=False)])
    rows = choose_split(hashes_of(map(str, names)), split, holdout, str(path))
    return ClipDataset(
        name=path.name,
        split=split,
        pictures=Names.of(map(str, names), f"{path}{os.sep}").take(rows),
        labels=None if labels is None else labels[rows],
        class_names=class_names,
        skip_broken=skip_broken,
        num_frames=num_frames,
        frame_stride=frame_stride,
        notes=notes,
    )


def is_frame_or_video(name: str) -> bool:
    return is_image(name) or (name.lower().endswith(VIDEO_SUFFIXES) and not is_hidden(name))


def open_clip_arrays(path: Path, split: str, holdout: float) -> ClipDataset:
    """Open a .npz with `clips`, uint8 [N, F', h, w, C] or [N, F', h, w], and optionally `labels` [N].

    A .npz with its own splits has `train_clips`, `test_clips`, and optionally `train_labels`, `test_labels`.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            own_splits = {"train_clips", "test_clips"} <= set(stored)
            parts = ("train_", "test_") if own_splits else ("",)
            mine = parts[split == "test"] if own_splits else ""
            clips = stored[f"{mine}clips"]
            labels = [check_labels(stored[f"{part}labels"], str(path)) for part in parts if f"{part}labels" in stored]
            own_labels = check_labels(stored[f"{mine}labels"], str(path)) if f"{mine}labels" in stored else None
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"cannot read clips from {path} ({error}): expected an array `clips` in it") from error
    clips = clips[..., None] if clips.ndim == 4 else clips
    if clips.ndim != 5 or clips.dtype != np.uint8 or clips.shape[-1] not in (1, 3):
        raise UserError(
            f"the clips in {path} are {clips.dtype} {list(clips.shape)}; expected uint8 [N, F, h, w, 1 or 3]"
        )
    if own_labels is not None and len(own_labels) != len(clips):
        raise UserError(f"{path} has {len(clips)} {split} clips and {len(own_labels)} labels; expected as many")
    rows = (
        np.arange(len(clips))
        if own_splits
        else choose_split(hashes_of(map(str, range(len(clips)))), split, holdout, str(path))
    )
    return ClipDataset(
        name=path.stem,
        split=split,
        pictures=clips[rows],
        labels=None if own_labels is None else own_labels[rows],
        class_names=[] if own_labels is None else [str(i) for i in range(1 + max(int(part.max()) for part in labels))],
    )


def decode_clip(path: Path) -> np.ndarray:
    """Decode all frames of a video file or a folder of frames: uint8 [F', h, w, 1 or 3].

    Raises BrokenPicture, naming the clip, if it cannot be decoded, UserError if PyAV is missing, and as
    `read_patiently`.
    """
    try:
        names = read_patiently(lambda: sorted(os.listdir(path)) if path.is_dir() else None, path)
    except OSError as error:
        raise BrokenPicture(f"cannot read clip {path} ({error.strerror}): replace or remove it") from error
    if names is not None:
        frames = [decode(path / name).pixels for name in names if is_image(name)]
    else:
        frames = decode_video(path)
    if len({frame.shape for frame in frames}) != 1:
        problem = "it has no frames" if not frames else "its frames differ in size or colour"
        raise BrokenPicture(f"cannot read clip {path} ({problem}): replace or remove it")
    return np.stack(frames)


def decode_video(path: Path) -> list[np.ndarray]:
    try:
        import av
    except ImportError as error:
        raise UserError(f"reading {path} needs PyAV: pip install av, or give folders of frames or a .npz") from error

    def frames() -> list[np.ndarray]:
        with av.open(str(path)) as container:
            return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]

    try:
        return read_patiently(frames, path)
    except (av.error.FFmpegError, OSError, ValueError, IndexError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BrokenPicture(
            f"cannot read video {path} ({reason}): replace or remove it; training leaves it out with --data.skip-broken"
        ) from error


def take_frames(clip: np.ndarray, num_frames: int, stride: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """Take every `stride`-th frame of a clip [F', h, w, C]: from a random start, or without `rng` from the middle.

    Raises:
        BrokenPicture: the clip is too short.
    """
    check_length(len(clip), num_frames, stride, "a clip")
    spare = len(clip) - ((num_frames - 1) * stride + 1)
    first = spare // 2 if rng is None else int(rng.integers(spare + 1))
    return clip[first : first + (num_frames - 1) * stride + 1 : stride]


def check_length(frames: int, num_frames: int, stride: int, what: str) -> None:
    if frames < (num_frames - 1) * stride + 1:
        every = f", every {stride}" if stride > 1 else ""
        raise BrokenPicture(
            f"{what} has {frames} frame{'' if frames == 1 else 's'}, and the model takes {num_frames}{every}: take it "
            "out or give a longer one; in training --data.skip-broken leaves it out, and --data.frame-stride or "
            "--model.num-frames can be lower"
        )
