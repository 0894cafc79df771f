"""Stored latents: encoding that survives kill -9, the reading stream, the posterior, and training on them."""

import contextlib
import errno
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from scipy import stats

from umd import files
from umd.cli import main
from umd.config import ModelConfig
from umd.errors import TemporaryError, UserError
from umd.feature_networks import open_features
from umd.files import OpenFile
from umd.images import from_uint8, to_uint8
from umd.kernels.philox import philox_randn
from umd.metrics import FeatureStatistics
from umd.ops import sample_posterior
from umd.tokenizer import load_tokenizer
from umd.train.crops import train_view, view_rng
from umd.train.data import as_model_input, center_view, derive_seed, open_dataset, train_loader
from umd.train.encode import encode, inspect, show
from umd.train.latents import HEADER, open_latents, read_header, shard_name
from umd.train.log import read_metrics
from umd.train.loop import train
from umd.train.options import EncodeLatents, Inspect
from umd.train.recipes import AREA_MIN, check_crops
from umd.train.reference import DECODED, RESIZE
from umd.train.run import RunConfig, finetune_config
from umd.train.settings import DataConfig, OptimConfig

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)
TINY = ModelConfig(
    image_size=(8, 8), channels=4, patch_size=2, hidden_size=32, depth=1, decoder_depth=1, num_heads=2
)  # fmt: skip


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    """60 pictures of 3 classes; 49 of them to train on."""
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(file, images=rng.integers(0, 256, (60, 20, 22, 3), dtype=np.uint8), labels=np.arange(60) % 3)
    return file


@pytest.fixture(scope="session")
def options(source, vaes):
    return EncodeLatents(
        data=DataConfig(source=str(source), vae=str(vaes["kl"]), num_workers=2),
        image_size=(16, 16),
        views=2,
        dtype="fp32",
        shard_images=8,
    )


@pytest.fixture(scope="session")
def folder(options, tmp_path_factory):
    """49 and 11 latents of 4x8x8 in shards of 8, fp32, two views."""
    return encode(replace(options, out=tmp_path_factory.mktemp("latents") / "clean"), QUIET)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def command(options: EncodeLatents) -> list[str]:
    line = f"encode-latents --data.source {options.data.source} --data.vae {options.data.vae} --out {options.out}"
    line += f" --image-size {options.image_size[0]} {options.image_size[1]} --views {options.views}"
    return shlex.split(f"{line} --dtype {options.dtype} --shard-images {options.shard_images}")


def start(options: EncodeLatents, rank: int, world_size: int) -> subprocess.Popen:
    return subprocess.Popen(
        ["nice", sys.executable, "-m", "umd.cli", *command(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(world_size)},
    )


def as_rank(rank: int, world_size: int, options: EncodeLatents, monkeypatch) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    encode(options, QUIET)
    monkeypatch.undo()


def assert_same_files(a: Path, b: Path) -> None:
    assert sorted(file.name for file in a.iterdir()) == sorted(file.name for file in b.iterdir())
    for file in a.iterdir():
        assert file.read_bytes() == (b / file.name).read_bytes(), file.name


# Encoding


def test_shards_hold_the_views_that_a_run_on_pixels_would_see(folder, options, vaes):
    dataset = open_dataset(replace(options.data, image_size=(16, 16), vae=""), "train")
    tokenizer = load_tokenizer(str(vaes["kl"]))
    names = sorted(folder.glob("train-*.safetensors"))
    assert [file.name for file in names] == [f"train-{i:05d}-of-00007.safetensors" for i in range(7)]
    shards = [load_file(file) for file in names]
    assert torch.equal(torch.cat([shard["indices"] for shard in shards]), torch.arange(49))
    assert torch.equal(torch.cat([shard["labels"] for shard in shards]), torch.from_numpy(dataset.labels))
    config = DataConfig(image_size=(16, 16))
    for index in (0, 17, 48):
        for view in (0, 1):
            picture = train_view(dataset.picture(index), view_rng(derive_seed(0, 1), view, index), config)
            expected = tokenizer.moments(as_model_input(torch.from_numpy(picture.copy())[None]))
            torch.testing.assert_close(shards[index // 8]["moments"][view, index % 8], expected[0])


def test_a_shard_says_what_it_is(folder, source, vaes):
    with safe_open(folder / "train-00002-of-00007.safetensors", "pt") as shard:
        about = json.loads(shard.metadata()["umd"])
    recipe = about["recipe"]
    assert recipe["vae"]["name"] == str(vaes["kl"]) and len(recipe["vae"]["sha256"]) == 64
    assert (recipe["vae"]["scale"], recipe["vae"]["shift"], recipe["vae"]["factor"]) == (0.18215, 0.0, 2)
    assert recipe["shape"] == [4, 8, 8] and recipe["dtype"] == "fp32" and recipe["class_names"] == ["0", "1", "2"]
    assert recipe["crop"]["kind"] == "random" and recipe["crop"]["views"] == 2 and recipe["crop"]["area_min"] == 0.8
    assert recipe["source"]["path"] == str(source) and recipe["source"]["images"] == {"train": 49, "test": 11}
    assert about["names"] == [str(i) for i in range(16, 24)] and about["left_out"] == []


def test_statistics_are_those_of_the_latents_as_sampled(folder):
    header = json.loads((folder / HEADER).read_text())
    for split in ("train", "test"):
        files = sorted(folder.glob(f"{split}-*.safetensors"))
        moments = np.concatenate([load_file(file)["moments"].numpy() for file in files], axis=1).astype(np.float64)
        mean, std = moments[:, :, 0], moments[:, :, 1]  # [V, n, C, h, w]
        expected = mean.mean((0, 1, 3, 4))
        variance = ((mean - expected[:, None, None]) ** 2 + std**2).mean((0, 1, 3, 4))  # law of total variance
        entry = header["splits"][split]
        np.testing.assert_allclose(entry["mean"], expected, rtol=1e-9)
        np.testing.assert_allclose(entry["std"], np.sqrt(variance), rtol=1e-9)
        assert entry["images"] == moments.shape[1] == sum(shard["images"] for shard in entry["shards"])


@pytest.mark.slow
def test_kill_9_of_one_of_two_then_resume_gives_the_shards_of_one_clean_process(options, folder, tmp_path, monkeypatch):
    options = replace(options, out=tmp_path / "killed", shard_images=1)
    clean = encode(replace(options, out=tmp_path / "clean"), QUIET)
    killed, other = start(options, 1, 2), start(options, 0, 2)
    end = time.monotonic() + 240
    while not (options.out.is_dir() and len(list(options.out.glob("train-*[13579]-of-*"))) >= 3):
        assert killed.poll() is None, killed.communicate()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.0005)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    killed.communicate()
    said = other.communicate()[0]
    assert other.returncode == 0 and "rank 0 of 2 is done" in said, said
    made = list(options.out.glob("*.safetensors"))
    assert 30 + 3 <= len(made) < 60 and not (options.out / HEADER).exists()
    (options.out / f".unfinished-{shard_name('train', 47, 49)}-1").write_bytes(b"half of it")  # as a kill can leave
    with pytest.raises(UserError, match="are not finished: run the same umd encode-latents command again"):
        open_latents(options.out, "train")

    before = {file.name: file.stat().st_mtime_ns for file in made}
    for rank in (0, 1):
        as_rank(rank, 2, options, monkeypatch)
    assert_same_files(clean, options.out)
    assert all((options.out / name).stat().st_mtime_ns == time for name, time in before.items())  # none made again


@pytest.mark.parametrize("world_size", [1, 3, 5])
def test_any_number_of_ranks_in_any_order_writes_the_same(world_size, options, folder, tmp_path, monkeypatch):
    options = replace(options, out=tmp_path / "out")
    for rank in reversed(range(world_size)):
        assert not (options.out / HEADER).exists()
        as_rank(rank, world_size, options, monkeypatch)
    assert_same_files(folder, options.out)
    encode(options, QUIET)  # again: nothing to do
    assert_same_files(folder, options.out)


@pytest.mark.slow
def test_under_torchrun(options, folder, tmp_path):
    options = replace(options, out=tmp_path / "out")
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "umd.cli"]
    done = subprocess.run([*run, *command(options)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_files(folder, options.out)


FILL_THE_DISK = """
import sys
from umd.cli import main
if sys.argv[1] == "limit":
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
main(sys.argv[2:])
"""


def test_a_full_disk_is_one_sentence_and_can_be_gone_on_from(options, folder, tmp_path):
    """A small file system, mounted in a namespace of its own; where that is not allowed, a limit on file sizes."""
    options = replace(options, out=tmp_path / "out")
    prefix, how = [], "limit"
    mount = f"mount -t tmpfs -o size=80k none {tmp_path} && mkdir {options.out} && exec"
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") and not subprocess.run([*namespace, f"{mount} true"], capture_output=True).returncode:
        then = f'{{ "$@"; echo $?; ls -A {options.out}; cp -r {options.out} {tmp_path}/../kept-{tmp_path.name}; }}'
        prefix, how = [*namespace, f"{mount.removesuffix('&& exec')} && {then}", "sh"], "tmpfs"
    done = subprocess.run(
        [*prefix, sys.executable, "-c", FILL_THE_DISK, how, *command(options)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert f"umd: could not write {options.out}/train-" in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert "run the same command again, which keeps what is finished" in done.stderr
    if how == "limit":
        assert done.returncode == 2
        kept = options.out
    else:
        assert "No space left on device" in done.stderr
        code, *files = done.stdout.split()
        assert code == "2" and len(files) == 2 and all(name.startswith("train-") for name in files), files
        kept = tmp_path.parent / f"kept-{tmp_path.name}"
    encode(replace(options, out=kept), QUIET)
    assert_same_files(folder, kept)


def test_a_broken_picture_is_left_out_and_listed(vaes, tmp_path):
    for name in ("a", "b", "c", "d"):
        (tmp_path / "pictures" / "x").mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / "pictures" / "x" / f"{name}.jpg")
    bad = tmp_path / "pictures" / "x" / "b.jpg"
    bad.write_bytes(bad.read_bytes()[:900])  # its header is whole
    data = DataConfig(source=str(tmp_path / "pictures"), vae=str(vaes["kl"]), holdout=0, skip_broken=True)
    options = EncodeLatents(data=data, out=tmp_path / "out", image_size=(16, 16), views=1, shard_images=3)
    dataset = open_latents(encode(options, QUIET), "train")
    assert len(dataset) == 3 and dataset.num_broken == 1
    assert dataset.header["splits"]["train"]["left_out"] == ["x/b.jpg"]
    assert [name for shard in dataset.shards for name in shard.about["names"]] == ["x/a.jpg", "x/c.jpg", "x/d.jpg"]
    with pytest.raises(UserError, match=r"cannot read image .*b\.jpg"):
        encode(replace(options, data=replace(data, skip_broken=False), out=tmp_path / "strict"), QUIET)


def test_the_middle_and_its_mirror_image(options, vaes, tmp_path):
    options = replace(options, out=tmp_path / "out", crop="center", shard_images=100)
    moments = load_file(encode(options, QUIET) / "train-00000-of-00001.safetensors")["moments"]
    dataset = open_dataset(options.data, "train")
    middle = np.asarray(
        Image.fromarray(dataset.picture(0).pixels).resize((16, 16), Image.Resampling.BICUBIC, (1, 0, 21, 20))
    )
    for view, picture in enumerate((middle, middle[:, ::-1])):
        expected = load_tokenizer(str(vaes["kl"])).moments(as_model_input(torch.from_numpy(picture.copy())[None]))
        torch.testing.assert_close(moments[view, 0], expected[0])
    with pytest.raises(UserError, match="there are 2 views at most, got 3"):
        replace(options, views=3)


def test_a_vq_model_s_latents_need_no_noise(options, vaes, tmp_path):
    options = replace(options, data=replace(options.data, vae=str(vaes["vq"])), out=tmp_path / "out", dtype="bf16")
    config = DataConfig(source=str(encode(options, QUIET)), image_size=(8, 8), channels=3, num_workers=0)
    dataset = open_dataset(config, "train")
    batch = next(train_loader(dataset, config, batch_size=5, seed=0))
    assert batch.x_start.shape == (5, 3, 8, 8) and torch.equal(batch.x_start, dataset.means(batch.indices))


# Reading


def test_workers_read_the_same_batches(folder):
    config = DataConfig(source=str(folder), image_size=(8, 8), channels=4, num_workers=0)
    dataset = open_dataset(config, "train")
    for batches in zip(
        train_loader(dataset, config, batch_size=10, seed=1),
        train_loader(dataset, replace(config, num_workers=2), batch_size=10, seed=1),
        range(8),
        strict=False,
    ):
        a, b, _ = batches
        assert torch.equal(a.x_start, b.x_start) and torch.equal(a.indices, b.indices)
        assert a.x_start.shape == (10, 4, 8, 8) and a.x_start.dtype == torch.float32


def test_ranks_draw_the_noise_that_one_process_draws(folder):
    config = DataConfig(source=str(folder), image_size=(8, 8), channels=4, num_workers=0)
    dataset = open_dataset(config, "train")
    alone, *ranks = (
        train_loader(dataset, config, batch_size=20, seed=1, start=20, places=places)
        for places in (None, *(range(5 * rank, 5 * rank + 5) for rank in range(4)))
    )
    for whole, *parts in islice(zip(alone, *ranks, strict=True), 5):  # over the seams at 49 and 98
        assert torch.equal(whole.x_start, torch.cat([part.x_start for part in parts]))


def test_the_posterior_is_mean_plus_std_times_the_noise_of_the_draw():
    generator = torch.Generator().manual_seed(0)
    moments = torch.rand(3, 2, 4, 5, 3, generator=generator)
    drawn = sample_posterior(moments, 7, torch.tensor([0, 11, 5]))
    for row, draw in enumerate((0, 11, 5)):
        eps = philox_randn(7, (4, 5, 3), offset=draw * 15)  # 60 numbers, 4 a counter: no two draws share one
        assert torch.equal(drawn[row], moments[row, 0] + moments[row, 1] * eps)
    assert torch.equal(sample_posterior(moments[1:], 7, torch.tensor([11, 5])), drawn[1:])
    assert torch.equal(sample_posterior(moments[:, :1], 7, torch.arange(3)), moments[:, 0])


def test_the_noise_is_new_in_each_epoch_and_normal(folder):
    config = DataConfig(source=str(folder), image_size=(8, 8), channels=4, num_workers=0)
    dataset = open_dataset(config, "train")
    loader = train_loader(dataset, config, batch_size=49, seed=1)
    eps = torch.empty(6, 49, 4, 8, 8)
    for epoch, batch in enumerate(islice(loader, 6)):
        for index, x in zip(batch.indices.tolist(), batch.x_start, strict=True):
            mean, std = dataset.typed(torch.from_numpy(dataset.read(np.array([index]), np.array([epoch]))[0]))
            eps[epoch, index] = (x - mean) / std
    values = eps.flatten(1).double().numpy()
    assert stats.kstest(values.ravel(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(values) - np.eye(6)).max() < 5 / math.sqrt(values.shape[1])


# Training


@pytest.fixture
def run(folder, source, vaes, tmp_path):
    """A run of 8 latents a step that crosses the seam of the two stored views, with changes."""

    def make(out: str, data: dict | None = None, **changes) -> RunConfig:
        return RunConfig(
            **{
                "out": tmp_path / out,
                "model": TINY,
                "data": DataConfig(source=str(folder), num_workers=0, **(data or {})),
                "optim": OptimConfig(lr=0.03),
                "batch_size": 8,
                "steps": 10,
                "precision": "fp32",
                "log_every": 1,
                "draw_every": 0,
                **changes,
            }
        )

    return make


def losses(config: RunConfig) -> list[float]:
    return [row["loss"] for row in read_metrics(config.out / "metrics.jsonl")]


def test_training_from_stored_latents_is_training_from_latents_encoded_in_the_step(
    run, options, source, vaes, tmp_path
):
    stored = run("stored")
    in_step = replace(run("in-step"), data=DataConfig(source=str(source), vae=str(vaes["kl"]), num_workers=0))
    half = encode(replace(options, dtype="fp16", out=tmp_path / "half"), QUIET)
    rounded = replace(run("rounded"), data=DataConfig(source=str(half), num_workers=0))
    for config in (stored, in_step, rounded):
        train(config, QUIET)
    assert len(losses(stored)) == 10 and losses(stored)[-1] < losses(stored)[0]
    np.testing.assert_allclose(losses(stored), losses(in_step), rtol=0, atol=1e-5)
    np.testing.assert_allclose(losses(stored), losses(rounded), rtol=2e-3)  # 2**-11 of the latents, and 2 % of the loss


@pytest.mark.parametrize("shuffle", ["global", "blocks"])
def test_a_run_goes_on_in_the_middle_of_an_epoch(shuffle, run, options):
    whole = run("whole", data={"shuffle": shuffle}, save_every=4)
    train(whole, QUIET)
    halves = replace(whole, out=whole.out.with_name("halves"))
    shutil.copytree(whole.out, halves.out)
    for later in sorted((halves.out / "checkpoints").iterdir())[1:]:
        shutil.rmtree(later)
    train(halves, QUIET)  # from step 4 of 6 1/8 an epoch
    assert losses(halves) == losses(whole) and len(losses(whole)) == 10
    if shuffle == "blocks":
        with pytest.raises(UserError, match=r"data.shuffle blocks, not global"):
            train(run("halves", steps=11, save_every=4), QUIET)
    other = encode(replace(options, shard_images=9, out=whole.out.with_name("latents")), QUIET)
    moved = replace(halves, steps=11, data=replace(halves.data, source=str(other)))
    if shuffle == "blocks":
        with pytest.raises(
            UserError, match="shards of other sizes, which --data.shuffle blocks takes in another order"
        ):
            train(moved, QUIET)
    else:
        train(moved, QUIET)  # the order does not know of shards


def test_a_run_keeps_to_its_vae(run, options, vaes, tmp_path):
    config = run("run", steps=2)
    train(config, QUIET)
    kept = json.loads((next((config.out / "checkpoints").iterdir()) / "state.json").read_text())["state"]["config"]
    sha256 = load_tokenizer(str(vaes["kl"])).vae.sha256
    assert kept["data"]["vae_hash"] == sha256 and kept["data"]["vae"] == str(vaes["kl"])

    other = replace(options, data=replace(options.data, vae=str(vaes["other"])), out=tmp_path / "other")
    others = DataConfig(source=str(encode(other, QUIET)), num_workers=0)
    said = "of another VAE .* than was used before"
    for refused in (
        replace(config, data=others, steps=3),  # resumed
        replace(config, data=others, out=tmp_path / "tuned", init=config.out),
        run("named", data={"vae": str(vaes["other"])}),
        replace(config, data=DataConfig(source=options.data.source, vae=str(vaes["other"]), num_workers=0)),
    ):
        with pytest.raises(UserError, match=said if refused.out.name != "named" else "is another VAE"):
            train(refused, QUIET)
    train(replace(config, steps=3), QUIET)  # its own go on
    assert len(losses(config)) == 3


def umd(line: str) -> tuple[int, str, str]:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(shlex.split(line))
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()


def test_previews_samples_and_inpainting_are_pictures(run, folder, vaes, tmp_path):
    config = run("run", steps=2, draw_every=2)
    train(config, QUIET)
    sheets = {file.name: Image.open(file).size for file in (config.out / "images").glob("*.png")}
    assert sheets and all(height == 3 * 18 + 2 for _, height in sheets.values()), sheets  # three rows of 16 and a gap
    moved = shutil.copytree(vaes["kl"], tmp_path / "moved")
    code, out, err = umd(f"sample {config.out} --per-class 3 --steps 5 --vae {moved}")
    assert code == 0, err
    images = np.load(config.out / "samples.npz")["arr_0"]
    assert images.shape == (3, 16, 16, 3) and images.std() > 0
    code, out, err = umd(f"inpaint {config.out} --steps 2 --samples 1")
    assert code == 0, err
    code, out, err = umd(f"sample {config.out} --steps 5 --vae {vaes['other']}")
    assert code == 2 and "is another VAE" in err and err.count("\n") == 1


def test_a_run_on_latents_is_scored_against_decoded_and_against_real_pictures(colours, run, source):
    """Two references, of one size, told apart by how the pictures came to it."""
    config = run("run", steps=2)
    train(config, QUIET)
    line = f"evaluate {config.out} --count 20 --steps 2 --shots 3 --no-linear"
    for options in ("", f"--pictures {source}"):
        code, _, err = umd(f"{line} {options}")
        assert code == 0, err
    record = json.loads((config.out / "scores.json").read_text())
    decoded, real = (entry["reference"] for entry in record["generation"])
    assert decoded["image_size"] == real["image_size"] == [16, 16] and decoded["count"] == real["count"] == 11
    assert (decoded["resize"], real["resize"]) == (DECODED[0], RESIZE) and real["vae"] is None
    values = [entry["scores"]["FD-Colours"] for entry in record["generation"]]
    assert values[0] != values[1] and (config.out / "scores.md").read_text().count("## Samples against") == 2


def test_distances_of_a_run_on_latents_are_of_decoded_pictures_and_their_reference_is_kept(run):
    config = run("run", steps=1, evaluate_minutes=60, evaluate_count=3)
    console = Console(file=io.StringIO(), width=1000)
    train(config, console)
    (reference,) = config.out.glob("reference-*.safetensors")
    held_out = open_dataset(config.data, "test")
    pictures = to_uint8(load_tokenizer(held_out.vae.name).decode(held_out.means(np.arange(len(held_out)))))
    features = open_features().outputs(from_uint8(pictures)).pooled
    kept = FeatureStatistics.load(reference)
    assert kept.count == len(held_out)
    torch.testing.assert_close(kept.mean, features.mean(0).double(), atol=1e-4, rtol=1e-4)

    written = reference.stat().st_mtime_ns
    train(replace(config, steps=2), console)
    assert console.file.getvalue().count("test pictures, kept in") == 1 and reference.stat().st_mtime_ns == written
    rows = [row for row in read_metrics(config.out / "metrics.jsonl") if "cfg_scale" in row]
    assert [(row["step"], row["samples"], row["cfg_scale"]) for row in rows] == [(1, 3, 1.0), (2, 3, 1.0)]


def test_a_run_goes_on_without_its_vae_and_says_so(run, options, vaes, tmp_path):
    vae = shutil.copytree(vaes["kl"], tmp_path / "gone")
    latents = encode(replace(options, data=replace(options.data, vae=str(vae)), out=tmp_path / "latents"), QUIET)
    shutil.rmtree(vae)
    load_tokenizer.cache_clear()
    config = replace(run("run", steps=1, draw_every=1), data=DataConfig(source=str(latents), num_workers=0))
    console = Console(file=io.StringIO(), width=1000)
    train(config, console)
    assert "pictures show the first channel of latents: this run is of latents" in console.file.getvalue()
    code, _, err = umd(f"sample {config.out} --steps 5")
    assert code == 2 and "its VAE is missing: there is no VAE at" in err and err.count("\n") == 1
    with pytest.raises(UserError, match="its VAE is missing"):  # before the first step
        train(replace(config, out=tmp_path / "measured", evaluate_minutes=60), QUIET)
    assert not list(tmp_path.glob("measured/checkpoints/*"))


# Crops


def refusal(config: RunConfig) -> str:
    with pytest.raises(UserError) as refused:
        train(config, QUIET)
    assert not (config.out / "checkpoints").exists()
    return str(refused.value)


def test_a_run_refuses_crops_that_are_not_its_recipe_s_and_its_command_makes_them(run, folder, options, vaes, tmp_path):
    first = run("first", steps=1, batch_size=20)
    train(first, QUIET)
    tuned = finetune_config(first, first.out, 3, tmp_path / "tuned")
    said = refusal(tuned)
    assert (
        f"the latents in {folder} are of crops of 0.8 to 1 of the area, mirrored, and this run's recipe asks for "
        in said
    )
    assert "crops of 0.95 to 1 of the area, mirrored: make those by umd encode-latents --recipe finetune" in said
    assert "or learn from these on purpose with --data.area-min 0.8 --data.area-max 1 --data.hflip" in said
    command, out = re.search(r"(encode-latents .*) and give --data.source (\S+),", said).groups()
    code, _, err = umd(command)
    assert code == 0, err
    made, before = (json.loads((Path(each) / HEADER).read_text())["recipe"] for each in (out, folder))
    assert made["crop"] == before["crop"] | {"area_min": 0.95}
    assert made | {"crop": None} == before | {"crop": None}
    accepted = replace(tuned, data=replace(tuned.data, source=out), steps=1)
    train(accepted, QUIET)
    train(replace(accepted, data=replace(first.data, area_min=0.8), out=tmp_path / "on-purpose"), QUIET)


@pytest.mark.parametrize(
    ("stored", "accepts", "refuses"),
    [
        ({"area_min": 0.5}, {"area_min": 0.5}, {}),
        ({"hflip": False}, {"hflip": False}, {}),
        ({"area_max": 0.9}, {"area_max": 0.9}, {"area_min": 0.95}),
        ({"kind": "center"}, {"area_min": 1.0}, {}),
        ({"kind": "center", "views": 1}, {"area_min": 1.0, "hflip": False}, {"area_min": 1.0}),
    ],
)
def test_which_crops_are_whose(stored, accepts, refuses, copy):
    header = json.loads((copy / HEADER).read_text())
    header["recipe"]["crop"] |= stored
    check_crops(header, copy, DataConfig(**accepts))
    with pytest.raises(UserError, match=r"make those by umd encode-latents .* and give --data.source"):
        check_crops(header, copy, DataConfig(**refuses))
    del header["recipe"]["crop"]  # not encoded here: nothing to compare with
    check_crops(header, copy, DataConfig(**refuses))


def test_the_command_for_other_crops_makes_them(options, source, tmp_path, monkeypatch):
    """From inside of the folder, with a list of pictures to leave out, and of areas that are no short decimals."""
    pictures = tmp_path / "pictures"
    for i in range(6):
        path = pictures / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 22), (40 * i, 9, 200)).save(path)
    (tmp_path / "list.json").write_text(json.dumps({"files": [{"path": "class0/2.png", "reason": "damaged"}]}))
    data = replace(options.data, source=str(pictures), holdout=0, quarantine=str(tmp_path / "list.json"))
    folder = encode(replace(options, data=data, out=tmp_path / "latents"), QUIET)
    (folder / "within").mkdir()
    for where, source in (("latents", "."), ("latents/within", ".."), ("", "latents")):
        monkeypatch.chdir(tmp_path / where)
        config = DataConfig(source, (8, 8), 4, num_workers=0, area_min=1 / 3, area_max=2 / 3)
        dataset = open_dataset(config, "train")
        with pytest.raises(UserError, match="crops of 0.3333333333333333 to 0.6666666666666666") as refused:
            train_loader(dataset, config, batch_size=2, seed=0)
        command, out = re.search(r"umd (encode-latents .*) and give --data.source (\S+),", str(refused.value)).groups()
        assert Path(out).resolve().parent == tmp_path
        code, _, err = umd(command)
        assert code == 0, err
        made = open_dataset(replace(config, source=out), "train")
        assert len(made) == len(dataset) == 5
        next(train_loader(made, replace(config, source=out), batch_size=2, seed=0))
        purpose = re.search(r"--data.area-min (\S+) --data.area-max (\S+)", str(refused.value).partition("purpose")[2])
        assert purpose.groups() == ("0.8", "1")
    again = replace(config, area_min=0.5, area_max=1, source=out)
    with pytest.raises(
        UserError, match="purpose with --data.area-min 0.3333333333333333 --data.area-max 0.66666666666"
    ):
        train_loader(made, again, batch_size=2, seed=0)


def test_what_trains_nothing_asks_for_no_crops(folder):
    config = DataConfig(source=str(folder), image_size=(8, 8), channels=4, area_min=0.95)
    assert center_view(open_dataset(config, "train"), [3, 1], config).shape == (2, 4, 8, 8)


def test_the_crops_of_a_recipe(options):
    assert DataConfig().area_min == AREA_MIN["pretrain"]
    assert finetune_config(RunConfig(), Path(), 0, Path()).data.area_min == AREA_MIN["finetune"]
    for recipe, area in AREA_MIN.items():
        assert replace(options, recipe=recipe).data == replace(options.data, area_min=area)
    with pytest.raises(UserError, match="--recipe finetune has crops of 0.95 to 1 of the area, not 0.3 to 1; give one"):
        replace(options, recipe="finetune", data=replace(options.data, area_min=0.3))


# Inspecting, and what is wrong


def test_inspect_prints_and_decodes(folder, vaes, tmp_path):
    code, out, err = umd(f"inspect {folder} --decode 5 --out {tmp_path / 'few.png'}")
    assert code == 0, err
    for text in ("4 x 8 x 8", "fp32", "AutoencoderKL", "16x16", "2 views", "0.18215", "9 shards, all as they were"):
        assert text in out, text
    dataset = open_latents(folder, "train")
    expected = to_uint8(load_tokenizer(str(vaes["kl"])).decode(dataset.means([0, 12])))
    sheet = np.asarray(Image.open(tmp_path / "few.png"))
    assert sheet.shape == (20, 5 * 18 + 2, 3)
    assert np.array_equal(sheet[2:18, 2:18], expected[0]) and np.array_equal(sheet[2:18, 20:36], expected[1])


def test_inspect_shows_latents_that_another_program_made(folder):
    header, console = read_header(folder), Console(file=io.StringIO(), width=200)
    del header["recipe"]["crop"], header["recipe"]["source"]
    show(folder, header, console)
    assert "not encoded by umd, crops unknown" in console.file.getvalue()


def test_latents_the_model_cannot_see(folder):
    config = DataConfig(source=str(folder), image_size=(32, 32), channels=4)
    with pytest.raises(UserError, match=r"are 4x8x8 and the model sees 4x32x32 .*--model.image-size 8 8"):
        open_dataset(config, "train")
    code, _, err = umd(f"pretrain umd-l2 --data.source {folder} --model.image-size 8 8 --model.patch-size 3")
    assert code == 2 and "8x8 is not divisible by patch size 3" in err


def truncated(folder):
    file = folder / "train-00003-of-00007.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def emptied(folder):
    (folder / "train-00003-of-00007.safetensors").write_bytes(b"")


def removed(folder):
    (folder / "train-00003-of-00007.safetensors").unlink()


def replaced_by_noise(folder):
    (folder / "train-00003-of-00007.safetensors").write_bytes(np.random.default_rng(0).bytes(3000))


def a_bit_changed(folder):
    file = folder / "train-00003-of-00007.safetensors"
    data = bytearray(file.read_bytes())
    data[-len(data) // 3] ^= 1
    file.write_bytes(data)


DAMAGES = [truncated, emptied, removed, replaced_by_noise, a_bit_changed]


@pytest.mark.parametrize("spoil", DAMAGES)
def test_a_damaged_shard_is_named_by_training_and_by_inspect(spoil, copy, run):
    spoil(copy)
    config = replace(run("run"), data=DataConfig(source=str(copy), num_workers=0))
    for use in (lambda: train(config, QUIET), lambda: inspect(copy, Inspect(decode=0), QUIET)):
        mend = "run" if spoil is removed else "remove it and run"
        with pytest.raises(UserError, match=rf"latents shard .*train-00003-of-00007.*; {mend} (the same )?umd encode-"):
            use()


@pytest.mark.parametrize("times", [2, 9])
def test_a_network_disk_that_is_lost_for_a_moment_is_read_again(times, copy, monkeypatch):
    """EIO is what Lustre answers a host that it has dropped. After that a file must be opened anew."""
    dataset = open_latents(copy, "train")
    whole = dataset.read(np.arange(9), np.zeros(9, np.int64))
    monkeypatch.setattr(files, "WAITS", (0.0, 0.0, 0.0))
    left, read, lost = [times], OpenFile.read_into, set()

    def read_into(self, buffer, start):
        if left[0]:
            left[0] -= 1
            lost.add(self)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        assert self not in lost
        return read(self, buffer, start)

    monkeypatch.setattr(OpenFile, "read_into", read_into)
    if times < 4:
        assert np.array_equal(dataset.read(np.arange(9), np.zeros(9, np.int64)), whole)
    else:
        with pytest.raises(TemporaryError, match="cannot read latents shard .*train-00000-of-00007.*; see to the disk"):
            dataset.read(np.arange(9), np.zeros(9, np.int64))


@pytest.mark.parametrize("spoil", DAMAGES)
def test_a_damaged_shard_is_made_again(spoil, copy, folder, options):
    spoil(copy)
    options = replace(options, out=copy)
    if spoil is not removed:
        (copy / HEADER).unlink()
        with pytest.raises(UserError, match="train-00003-of-00007"):
            encode(options, QUIET)
        removed(copy)
    encode(options, QUIET)
    assert_same_files(folder, copy)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, "crop.seed"),
        ({"dtype": "bf16"}, "dtype"),
        ({"shard_images": 9}, "shard_images"),
        ({"image_size": (16, 20)}, "crop.image_size, shape"),
    ],
)
def test_a_folder_of_other_settings_is_refused(changes, said, copy, options):
    with pytest.raises(UserError, match=f"holds latents made with another {said}; give the settings"):
        encode(replace(options, out=copy, **changes), QUIET)


def test_what_cannot_be_encoded(folder, options, vaes, tmp_path, source):
    for changes, said in (
        ({"data": replace(options.data, vae="")}, "name one with --data.vae"),
        ({"data": replace(options.data, source=str(folder))}, "holds latents already"),
        ({"data": replace(options.data, vae=str(tmp_path))}, "there is no VAE at"),
        ({"image_size": (15, 16)}, "15x16 are not divisible by 2"),
    ):
        with pytest.raises(UserError, match=said):
            encode(replace(options, out=tmp_path / "out", **changes), QUIET)
    for bad in ({"views": 0}, {"shard_images": 0}, {"seed": -1}, {"image_size": (0, 16)}):
        with pytest.raises(UserError, match=next(iter(bad))):
            replace(options, **bad)


def test_latents_too_large_for_fp16(options, vaes, tmp_path):
    vae = shutil.copytree(vaes["kl"], tmp_path / "vae")
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"scaling_factor": 1e6}))
    options = replace(options, data=replace(options.data, vae=str(vae)), out=tmp_path / "out", dtype="fp16")
    with pytest.raises(UserError, match=r"latents of \d+ are not finite in fp16; store them with --dtype bf16"):
        encode(options, QUIET)


def test_folders_that_are_none_of_latents(tmp_path, folder, copy):
    with pytest.raises(UserError, match="there is no folder"):
        open_latents(tmp_path / "nowhere", "train")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no latents"):
        open_latents(tmp_path / "empty", "train")
    for text in ("{", "[]", "{}"):
        (copy / HEADER).write_text(text)
        with pytest.raises(UserError, match=r"latents.json is damaged \(.*\); remove it and run"):
            open_latents(copy, "train")
    for number in (1, 99):
        (copy / HEADER).write_text(json.dumps({"format": number}))
        with pytest.raises(UserError, match=rf"has format {number}, and this version of umd reads format 2$"):
            open_latents(copy, "train")
    with pytest.raises(UserError, match="is no folder of latents, and a model of 4 channels"):
        open_dataset(DataConfig(source="emoji", channels=4), "train")
