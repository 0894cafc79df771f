"""WebDataset tars: which members are a sample, and what is wrong with a tar is told."""

import io
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from umd.errors import UserError
from umd.train.data import open_dataset
from umd.train.settings import DataConfig
from umd.train.sources import opened


def jpeg(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write(path, entries) -> bytes:
    """entries: name, and bytes or (type, linkname)."""
    with tarfile.open(path, "w") as archive:
        for name, data in entries:
            info = tarfile.TarInfo(name)
            if isinstance(data, bytes):
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
            else:
                info.type, info.linkname = data
                archive.addfile(info)
    return path.read_bytes()


def sample(number: int, label: int) -> list[tuple[str, bytes]]:
    return [(f"{number:03d}.jpg", jpeg(40 * label)), (f"{number:03d}.cls", str(label).encode())]


def read(path) -> list[tuple[int, int]]:
    """(label, brightness / 40) of each picture, in its order."""
    dataset = open_dataset(DataConfig(source=str(path), holdout=0), "train")
    levels = [round(dataset.picture(i).pixels.mean() / 40) for i in range(len(dataset))]
    return list(zip([-1] * len(levels) if dataset.labels is None else dataset.labels.tolist(), levels, strict=True))


def test_a_key_that_comes_again_is_another_sample(tmp_path):
    hidden = [("._002.jpg", b"of another system")]
    entries = [*sample(0, 0), *sample(1, 1), *sample(0, 2), *hidden, *sample(1, 3)]
    entries.insert(-1, ("._001.cls", b"of another system"))
    write(tmp_path / "x.tar", entries)
    assert read(tmp_path / "x.tar") == [(i, i) for i in range(4)]


def test_a_class_apart_from_its_picture_is_told(tmp_path):
    entries = [*sample(0, 0), *sample(1, 1)]
    write(tmp_path / "x.tar", entries[::2] + entries[1::2])
    with pytest.raises(UserError, match=r"x.tar/001.cls does not follow its picture: .*--sort=name"):
        read(tmp_path / "x.tar")


def test_tars_one_after_another_are_read_on(tmp_path):
    parts = [write(tmp_path / "part", [*sample(0, label), *sample(1, label + 1)]) for label in (0, 2)]
    (tmp_path / "x.tar").write_bytes(b"".join(parts))
    assert read(tmp_path / "x.tar") == [(i, i) for i in range(4)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data, header: data[: header + 100], "without the empty blocks that end a tar: it is cut off"),
        (lambda data, header: data[:header], r"it ends at byte \d+ without .*`head -c 1024 /dev/zero >> TAR"),
        (lambda data, header: data[: header + 700], "unexpected end of data"),
        (lambda data, header: data[: header + 5] + b"~" + data[header + 6 :], r"the header at byte \d+ is damaged"),
        (lambda data, header: data + b"\1" * 512, r"the header at byte \d+ is damaged|bad checksum|invalid header"),
    ],
)
def test_a_damaged_tar_is_told(tmp_path, damage, message):
    data = write(tmp_path / "x.tar", [entry for i in range(4) for entry in sample(i, i)])
    with tarfile.open(tmp_path / "x.tar") as archive:
        header = archive.getmembers()[4].offset
    (tmp_path / "x.tar").write_bytes(damage(data, header))
    with pytest.raises(UserError, match=message):
        read(tmp_path / "x.tar")


def test_a_tar_without_end_is_whole_again_as_told(tmp_path):
    data = write(tmp_path / "x.tar", [*sample(0, 0), *sample(1, 1)])
    (tmp_path / "x.tar").write_bytes(data.rstrip(b"\0") + bytes(-len(data.rstrip(b"\0")) % 512 + 1024))
    assert read(tmp_path / "x.tar") == [(0, 0), (1, 1)]


def test_links_are_followed_in_the_tar_or_told(tmp_path):
    hard = [*sample(0, 0), ("001.jpg", (tarfile.LNKTYPE, "000.jpg")), ("001.cls", b"1")]
    write(tmp_path / "x.tar", hard)
    assert read(tmp_path / "x.tar") == [(0, 0), (1, 0)]
    for kind, target in ((tarfile.SYMTYPE, "000.jpg"), (tarfile.LNKTYPE, "elsewhere.jpg"), (tarfile.FIFOTYPE, "")):
        write(tmp_path / "y.tar", [*hard, ("002.jpg", (kind, target)), ("002.cls", b"2")])
        with pytest.raises(UserError, match="y.tar/002.jpg is a link or a device: write the tar with the files"):
            read(tmp_path / "y.tar")


def test_a_sparse_member_is_told(tmp_path):
    """GNU's sparse format 1.0: the name and the real size in pax headers, a map before the data."""
    info = tarfile.TarInfo("GNUSparseFile.0/000.jpg")
    data = b"1\n0\n8\n".ljust(512, b"\0") + b"01234567"
    info.size, names = len(data), ("major", "minor", "name", "realsize")
    info.pax_headers = {f"GNU.sparse.{k}": v for k, v in zip(names, ("1", "0", "000.jpg", "9999"), strict=True)}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(data))
    with pytest.raises(UserError, match="x.tar/000.jpg is sparse: write the tar without --sparse"):
        read(tmp_path / "x.tar")


@pytest.mark.parametrize("text", [b"9" * 20, b"9" * 12, b"9" * 5000, b"-1", b"two", b""])
def test_a_class_that_is_none_is_told(tmp_path, text):
    write(tmp_path / "x.tar", [*sample(0, 0), ("001.jpg", jpeg(0)), ("001.cls", text)])
    with pytest.raises(UserError, match="001.cls holds no class: expected a number from 0 to 999999"):
        read(tmp_path / "x.tar")


def test_a_label_that_would_fill_the_memory_with_names_is_told(tmp_path):
    np.savez(tmp_path / "x.npz", images=np.zeros((2, 8, 8, 3), np.uint8), labels=np.array([0, 10**12]))
    with pytest.raises(UserError, match="holds the label 1000000000000: expected classes below 1000000"):
        read(tmp_path / "x.npz")


def test_a_tar_that_is_written_over_ends_a_run_also_where_broken_pictures_are_skipped(tmp_path):
    write(tmp_path / "x.tar", [*sample(0, 0), *sample(1, 1)])
    listed = open_dataset(DataConfig(source=str(tmp_path / "x.tar"), holdout=0, skip_broken=True), "train")
    listed.read(0)
    write(tmp_path / "other", [*sample(0, 3), *sample(1, 4)])
    (tmp_path / "x.tar").write_bytes((tmp_path / "other").read_bytes())  # the same file, of the same size
    with pytest.raises(UserError, match="x.tar was replaced or changed since it was listed"):
        listed.read(0)


def test_what_is_not_read_beside_tars_is_told(tmp_path):
    write(tmp_path / "x.tar", [*sample(0, 0), *sample(1, 1)])
    (tmp_path / "._x.tar").write_bytes(b"of another system")
    (tmp_path / "cats").mkdir()
    dataset = open_dataset(DataConfig(source=str(tmp_path), holdout=0), "train")
    assert dataset.notes == [f"not read, beside the tars in {tmp_path}: cats/"] and len(dataset) == 2


def test_a_tar_that_is_replaced_is_read_as_it_is_or_told(tmp_path):
    write(tmp_path / "x.tar", [*sample(0, 0), *sample(1, 1)])
    config = DataConfig(source=str(tmp_path / "x.tar"), holdout=0)
    listed = open_dataset(config, "train")
    write(tmp_path / "other", [*sample(0, 3), *sample(1, 4), ("note.txt", bytes(9000))])
    os.rename(tmp_path / "other", tmp_path / "x.tar")
    assert read(tmp_path / "x.tar") == [(3, 3), (4, 4)]
    assert round(listed.picture(0).pixels.mean()) == 0, "of the file that was opened when it was listed"
    opened.cache_clear()  # as in another process
    with pytest.raises(UserError, match="x.tar was replaced or changed since it was listed"):
        listed.picture(0)
