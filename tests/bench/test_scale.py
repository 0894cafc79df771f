"""`umd bench scale`: commands that read pictures, of as many as ImageNet has. A tenth: tests/train/test_index.py."""

import json
import subprocess
import sys

import pytest

COMMANDS = ["pretrain, one step", "encode-pixels", "check-data", "encode-latents, first 256"]


@pytest.mark.slow
@pytest.mark.parametrize("train", [3_000, 1_281_000])
@pytest.mark.timeout(7200)
def test_every_command_on_a_folder_and_a_tar(tmp_path, train):
    pytest.importorskip("diffusers", reason="the VAE is of diffusers")
    classes = min(1000, train // 30)
    line = f"bench scale --train {train} --test {classes} --classes {classes} --side 32 --folder {tmp_path}"
    # In a process of its own: Linux counts the memory of the process that starts a command as the command's.
    command = [sys.executable, "-m", "umd.cli", *line.split(), "--json", str(tmp_path / "scale.json")]
    subprocess.run(command, check=True)
    rows = json.loads((tmp_path / "scale.json").read_text())["rows"]
    expected = [f"{name}, {kind}" for kind in ("folder", "tar") for name in COMMANDS]
    assert [row["command"] for row in rows] == ["pretrain, one step, 256 pictures", *expected]
    assert all(row["gigabytes"] < 3 for row in rows), "of the largest process, torch and all"
    assert [path.name for path in tmp_path.iterdir()] == ["scale.json"]
