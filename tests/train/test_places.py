"""Where output goes is looked at before the work: no command first reads, draws or trains and then cannot write."""

import json
import resource
import sys

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from umd.cli import main
from umd.errors import UserError
from umd.files import check_place, write_whole
from umd.train.options import Sample
from umd.train.run import read_config
from umd.train.sample import draw
from umd.train.settings import DataConfig


@pytest.fixture
def place(tmp_path, make_run):
    """A run whose data are gone, so that work on them would fail; pictures; a file and a folder to be in the way."""
    make_run(tmp_path / "run", DataConfig(source=str(tmp_path / "gone"), image_size=(8, 8)))
    for name in ("a", "b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.fromarray(np.full((20, 20, 3), 99, np.uint8)).save(tmp_path / "pictures" / name / "1.png")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


COMMANDS = [
    "sample run --out folder.png",
    "sample run --out pictures",
    "sample run --out picture.jpg",
    "inpaint run --out picture.webp",
    "sample run --out file/x.png",
    "inpaint run --out folder.png",
    "inpaint run --image pictures/a/1.png --out pictures/a/1.png",
    "probe run --out file",
    "probe run --layers --out file",
    "evaluate run --out file",
    "transfer run pictures --out file",
    "embed run pictures --out file/x",
    "check-data pictures --out folder.png",
    "check-data pictures --out pictures/a/1.png",
    "check-data pictures --out /dev/full",
    "embed run pictures --out pictures/x",
    "inpaint run --out pictures",
    "pretrain umd-tiny --data.source pictures --out pictures/run",
    "encode-pixels --data.source pictures --size 8 8 --out pictures",
    "encode-pixels --data.source pictures --size 8 8 --out file",
    "pretrain umd-tiny --data.source gone --out file",
]


@pytest.mark.skipif(sys.platform != "linux", reason="names of paths as Linux has them")
@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_cannot_be_is_told_before_the_work(place, monkeypatch, capsys, command):
    monkeypatch.chdir(place)
    before = {path for path in place.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    said = capsys.readouterr().err
    assert ended.value.code == 2 and ("--out" in said or "give a name with .png" in said) and "Traceback" not in said, (
        said
    )
    assert "gone" not in said
    assert {path for path in place.rglob("*") if path.is_file()} == before


def test_a_full_disk_and_a_folder_in_the_way_are_told(tmp_path):
    check_place(tmp_path / "new" / "file")
    assert not list((tmp_path / "new").iterdir())
    with pytest.raises(UserError, match="new is a folder, and a file is to be written there; give another --out"):
        check_place(tmp_path / "new")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        with pytest.raises(UserError, match="cannot write .*new/file .File too large.; elsewhere"):
            check_place(tmp_path / "new" / "file", instead="elsewhere")
        with pytest.raises(OSError, match="new/file") as told:  # names what could not be written
            write_whole(tmp_path / "new" / "file", b"x")
        assert told.value.filename == str(tmp_path / "new" / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "new").iterdir())


def test_samples_of_other_settings_are_replaced_with_notice_and_other_files_never(place, capsys):
    run, console = place / "run", Console(soft_wrap=True)
    config = read_config(run)

    def draw_with(seed: int) -> str:
        draw(run, Sample(per_class=1, steps=1, seed=seed, out=place / "mine"), config, console)
        return capsys.readouterr().out

    (place / "mine.png").write_text("a picture of my own")
    with pytest.raises(UserError, match="mine.png is there and is no result of umd sample; give another --out"):
        draw_with(0)
    (place / "mine.png").unlink()
    assert "replaced" not in draw_with(0)
    assert "replaced" not in draw_with(0)  # the same
    assert "holds other samples, and will be replaced; what differs: seed" in draw_with(1)


@pytest.mark.parametrize(
    "command",
    [
        "bench adaln --json folder.png",
        "bench reproduce layers --figures file",
        "import dit pictures --out file",
        "export hub run --out file/x",
    ],
)
def test_results_of_other_commands_too(place, monkeypatch, capsys, command):
    monkeypatch.chdir(place)
    with pytest.raises(SystemExit) as ended:
        main(command.split())
    said = capsys.readouterr().err
    assert ended.value.code == 2 and f"give another --{command.split(' --')[1].split()[0]}" in said, said


def test_a_run_that_is_only_read_is_probed_elsewhere(tmp_path, make_run):
    for split, count in (("train", 4), ("test", 2)):
        for name in "abc":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(count):
                picture = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(picture).save(tmp_path / "data" / split / name / f"{i}.png")
    run = make_run(tmp_path / "run", DataConfig(source=str(tmp_path / "data"), image_size=(8, 8), num_workers=1))
    before = sorted(run.rglob("*"))
    main(["probe", str(run), "--shots", "4", "--out", str(tmp_path / "elsewhere")])
    assert sorted(run.rglob("*")) == before
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"features", "probe.json"}
    assert set(json.loads((tmp_path / "elsewhere" / "probe.json").read_text()))
