"""docs/cluster.md on two CPU processes: JPEGs to check-data, encode-latents and a run, by torchrun and deepspeed."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from umd.cli import main
from umd.train.data import has_dali
from umd.train.latents import open_latents
from umd.train.log import read_metrics

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "umd.cli"]
DEEPSPEED = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--module", "umd.cli"]
TINY = "--model.hidden-size 32 --model.depth 2 --model.decoder-depth 1 --model.num-heads 2 --batch-size 8 --steps 4 "
TINY += "--save-every 2 --log-every 1 --draw-every 4 --precision fp32 --device cpu --data.num-workers 1"


def jpegs() -> dict[str, bytes]:
    """28 pictures of two classes; one is cut off."""
    files = {}
    for i in range(28):
        rng, file = np.random.default_rng(i), io.BytesIO()
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((48, 40), Image.Resampling.BICUBIC).save(file, "JPEG")
        files[f"{'cat' if i % 2 else 'dog'}/{i:02d}.jpg"] = file.getvalue()
    files["cat/05.jpg"] = files["cat/05.jpg"][:400]
    return files


def as_folder(root: Path) -> Path:
    for name, content in jpegs().items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def as_tar(root: Path) -> Path:
    with tarfile.open(root / "pictures.tar", "w") as archive:
        for name, content in jpegs().items():
            label = b"%d" % (name < "d")
            for suffix, data in ((".jpg", content), (".cls", label)):
                member = tarfile.TarInfo(name.removesuffix(".jpg") + suffix)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return root / "pictures.tar"


def umd(launcher: list[str], line: str) -> str:
    """What two processes print, once they ended well."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([*launcher, *line.split()], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(run: Path) -> list[float]:
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def check(source: Path) -> dict:
    """Check a source; of 28 pictures the one cut off is listed."""
    with pytest.raises(SystemExit, match="1"):  # some are listed
        main(["check-data", str(source)])
    listed = next(source.parent.rglob("*quarantine.json"))
    content = json.loads(listed.read_text())
    (bad,) = content["files"]
    assert bad["path"].endswith("cat/05.jpg") and bad["reason"] == "truncated"
    return content


def test_from_a_folder_with_torchrun(vaes, tmp_path):
    source = as_folder(tmp_path / "pictures")
    check(source)
    latents, run = tmp_path / "latents", tmp_path / "run"
    encode = f"encode-latents --data.source {source} --data.vae {vaes['kl']} --out {latents} --image-size 16 16"
    main(f"{encode} --views 2 --shard-images 8 --device cpu".split())
    assert sum(len(open_latents(latents, split)) for split in ("train", "test")) == 27

    line = f"pretrain umd-l2 --data.source {latents} --out {run} --model.image-size 8 8 {TINY}"
    assert "2 x cpu, DDP" in umd(TORCHRUN, line)
    assert len(losses(run)) == 4 and list((run / "images").glob("*-00000004.png"))

    pixels = tmp_path / "pixels"
    said = umd(TORCHRUN, f"pretrain umd-b4 --data.source {source} --out {pixels} --model.image-size 16 16 {TINY}")
    assert ("read by DALI" if has_dali() else "read by Pillow") in said and len(losses(pixels)) == 4
    assert json.loads((pixels / "quarantine.json").read_text())["left_out"] == 1


@pytest.mark.skipif(not Path(DEEPSPEED[0]).exists(), reason="DeepSpeed is not installed")
@pytest.mark.slow
def test_from_a_tar_with_deepspeed(vaes, tmp_path):
    """And the two processes of ZeRO make the steps of one process."""
    source = as_tar(tmp_path)
    check(source)
    latents = tmp_path / "latents"
    encode = f"encode-latents --data.source {source} --data.vae {vaes['kl']} --out {latents} --image-size 16 16"
    main(f"{encode} --views 1 --shard-images 100 --device cpu".split())
    line = f"pretrain umd-l2 --data.source {latents} --model.image-size 8 8 {TINY} --out {tmp_path}"
    said = umd(DEEPSPEED, f"{line}/two --parallel.strategy zero --parallel.zero-stage 2")
    assert "2 x cpu, ZeRO 2" in said
    main(f"{line}/one --accumulate 2".split())
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.parametrize(
    ("hosts", "said"),
    [
        ("# of the rack\ndead.invalid slots=8\n", "umd: ssh does not reach dead.invalid; take them out of "),
        (None, "umd: cannot read the hostfile "),
    ],
)
def test_a_hostfile_with_a_dead_host_or_none(hosts, said, tmp_path):
    """.invalid is never a host (RFC 2606)."""
    hostfile = tmp_path / "hostfile"
    if hosts:
        hostfile.write_text(hosts)
    env = {**os.environ, "HOSTFILE": str(hostfile)}
    done = subprocess.run(["launch/deepspeed.sh", "umd-l2"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(said), done.stderr


@pytest.mark.parametrize(
    ("given", "run"), [("umd-l2 --steps 3", "pretrain umd-l2 --steps 3"), ("finetune runs/a", "finetune runs/a")]
)
def test_a_script_starts_a_preset_or_another_command(given, run, tmp_path):
    started = tmp_path / "torchrun"
    started.write_text('#!/bin/sh\necho "$@"\n')
    started.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "GPUS": "8"}
    done = subprocess.run(["launch/torchrun.sh", *given.split()], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout == f"--standalone --nproc_per_node 8 -m umd.cli {run}\n"


@pytest.mark.parametrize(
    ("status", "seconds", "queued"),
    [
        (0, 9999, False),
        (2, 9999, False),
        (78, 9999, False),
        (143, 9999, False),
        (1, 9999, True),
        (134, 9999, True),
        (1, 0, False),
        (75, 0, True),
    ],
)
def test_a_job_that_a_fault_ended_is_queued_again(status, seconds, queued, tmp_path):
    """srun ends with the status of the ranks; what the script asks of Slurm is written down."""
    for name, line in (("srun", f"exit {status}"), ("scontrol", f'echo "$@" > {tmp_path}/asked')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SECONDS": str(seconds)}
    env |= {"SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", "launch/slurm.sbatch", "umd-l2"], cwd=ROOT, env=env, capture_output=True, text=True)
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 7\n" if queued else ""), done.stderr
    assert done.returncode == (0 if queued else status)
