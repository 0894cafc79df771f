"""The demo from end to end on pictures of a folder, in seconds instead of minutes."""

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from umd.errors import UserError
from umd.report.page import load_record
from umd.train.demo import SHARES, run_demo
from umd.train.options import Demo
from umd.train.settings import DataConfig


def test_the_parts_leave_time_for_the_page():
    assert 0.9 < sum(SHARES.values()) < 1


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and holds no demo"):
        run_demo(Demo(out=tmp_path), Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_a_short_demo_shows_every_method(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abc":
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(30):
            picture = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / "pictures" / name / f"{i}.png")
    data = DataConfig(source=str(tmp_path / "pictures"), num_workers=0)
    page = run_demo(Demo(minutes=0.2, out=tmp_path / "demo", data=data, size=16), Console(quiet=True))
    record = load_record(tmp_path / "demo")
    assert page.is_file() and list(record.metrics) == ["pretrain", "finetune", "mae", "diffmae"]
    assert all(rows for rows in record.metrics.values())
    names = record.inpainting_columns
    assert [names[0], names[-1]] == ["given", "original"] and {"MAE", "UMD, 1", "DiffMAE, 1"} <= set(names)
    assert len(record.inpainting) == 8
    for i, row in enumerate(record.inpainting):
        given, *filled, original = row
        assert len(row) == len(names)
        kept = (given == original).all(-1)
        if i < 4:
            assert kept.sum() >= 16 * 16 * 3 // 4  # the hole in the middle is a quarter
        for picture in filled:
            assert np.array_equal(picture[kept], original[kept])
            assert (picture != original).any()
    assert record.samples and record.probe and record.triplets
