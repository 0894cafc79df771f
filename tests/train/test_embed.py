"""`umd embed`: the files hold what the network says of each picture."""

import os

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from umd.checkpoint import save_checkpoint
from umd.cli import main
from umd.config import ModelConfig
from umd.model import UMD
from umd.train.run import RunConfig, to_plain, write_config

CONFIG = ModelConfig(image_size=(8, 8), patch_size=4, hidden_size=16, depth=1, decoder_depth=1, num_heads=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = UMD(CONFIG)
    torch.nn.init.normal_(model.cls_token)
    config = RunConfig(out=folder, model=CONFIG)
    write_config(config)
    save_checkpoint(config.checkpoints, 1, {"model": model.state_dict()}, {"config": to_plain(config)})
    return folder, model.eval()


def test_class_folders(run, tmp_path):
    folder, model = run
    rng, values = np.random.default_rng(0), {}
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True, exist_ok=True)
        values[name] = int(rng.integers(0, 256))
        Image.new("RGB", (9, 9), (values[name],) * 3).save(tmp_path / "pictures" / name)
    main(["embed", f"{folder}", f"{tmp_path / 'pictures'}", "--out", f"{tmp_path / 'out'}"])
    arrays, table = np.load(tmp_path / "out.npz"), pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert [name.rsplit("pictures/")[-1] for name in arrays["names"]] == list(values)
    assert table["name"] == arrays["names"].tolist() and table["class"] == ["cat", "cat", "dog"]
    assert arrays["labels"].tolist() == table["label"] == [0, 0, 1] and arrays["classes"].tolist() == ["cat", "dog"]
    np.testing.assert_array_equal(np.array(table["features"], np.float32), arrays["features"])
    x = torch.tensor([value / 127.5 - 1 for value in values.values()])[:, None, None, None].expand(3, 3, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model.represent(x.contiguous())
    np.testing.assert_allclose(arrays["features"], expected.numpy(), atol=0.02)


def test_a_name_that_is_no_utf8(run, tmp_path):
    Image.new("RGB", (9, 9)).save(os.fsencode(tmp_path) + b"/\xff.png", "PNG")
    main(["embed", f"{run[0]}", f"{tmp_path}", "--out", f"{run[0] / 'odd'}"])
    assert pq.read_table(run[0] / "odd.parquet").to_pydict()["name"][0].endswith("\\xff.png")


def test_arrays_without_labels_in_two_splits(run, tmp_path):
    folder, _ = run
    np.savez(tmp_path / "data.npz", x_train=np.zeros((3, 8, 8, 3), np.uint8), x_test=np.ones((2, 8, 8, 3), np.uint8))
    main(["embed", f"{folder}", f"{tmp_path / 'data.npz'}", "--image-size", "16", "16"])
    arrays = np.load(folder / "features-data.npz")
    assert arrays["names"].tolist() == ["train/0", "train/1", "train/2", "test/0", "test/1"]
    assert arrays["features"].shape == (5, 16) and "labels" not in arrays


def test_a_source_that_is_not_there(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["embed", f"{run[0]}", f"{tmp_path / 'none'}"])
    assert "none" in capsys.readouterr().err
