"""launch/slurm.sbatch on a Slurm of one node that the test starts: interrupted runs end as one that was not."""

import getpass
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from ast import literal_eval
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")  # Debian: slurmctld slurmd munge
SEARCHED = f"{os.environ['PATH']}:/usr/sbin"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not all(shutil.which(program, path=SEARCHED) for program in PROGRAMS),
        reason=f"needs {', '.join(PROGRAMS)}: apt install slurmctld slurmd slurm-client munge",
    ),
]

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=30
NodeName=one NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=one Default=YES PriorityTier=1 MaxTime=INFINITE
PartitionName=urgent Nodes=one PriorityTier=2 MaxTime=INFINITE
"""
RUN = "--model.image-size 16 16 --model.hidden-size 64 --model.depth 2 --model.decoder-depth 1 --model.num-heads 2 "
RUN += "--batch-size 64 --draw-every 0 --precision fp32 --device cpu --data.num-workers 1 --log-every 1 "
RUN += "--save-minutes 60 --optim.ema 0.9"


class Cluster:
    """Slurm's programs with the configuration of this cluster."""

    def __init__(self, root: Path):
        self.root = root
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        self.env |= {"SLURM_CONF": f"{root}/slurm.conf", "PATH": f"{Path(sys.executable).parent}:{SEARCHED}"}
        self.env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def __call__(self, line: str) -> str:
        done = subprocess.run(line.split(), env=self.env, cwd=self.root, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def submit(self, out: str, steps: int) -> str:
        """The number of a job of two ranks that trains `out`."""
        script = f"--nodes 1 --ntasks-per-node 2 --gpus-per-node 0 --cpus-per-task 1 {ROOT}/launch/slurm.sbatch"
        run = f"umd-tiny --data.source {self.root}/tiny.npz --out {self.root}/{out} --steps {steps} {RUN}"
        return self(f"sbatch --parsable {script} {run}")

    def job(self, number: str) -> dict[str, str]:
        shown = self(f"scontrol show job {number}").split()
        return dict(field.split("=", 1) for field in shown if "=" in field)

    def said(self, number: str) -> str:
        file = self.root / f"slurm-{number}.out"
        return file.read_text() if file.exists() else ""

    def until(self, condition, number: str, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited too long: {self.job(number)}\n{self.said(number)}"
            time.sleep(0.2)

    def until_step(self, number: str, out: str, restarts: int, more: int = 5) -> None:
        """Until a job was taken up so many times and has made `more` steps since."""
        metrics = self.root / out / "metrics.jsonl"

        def steps() -> int:
            return len(metrics.read_text().splitlines()) if metrics.exists() else 0

        def begun() -> bool:
            job = self.job(number)
            return (job["Restarts"], job["JobState"]) == (str(restarts), "RUNNING")

        self.until(begun, number)
        before = steps()
        self.until(lambda: steps() >= before + more, number)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """munged, slurmctld and slurmd of one node with two CPUs, on free ports."""
    root = tmp_path_factory.mktemp("slurm")
    for folder in ("state", "spool"):
        (root / folder).mkdir()
    images = np.random.default_rng(0).integers(0, 256, (200, 16, 16, 3), dtype=np.uint8)
    np.savez(root / "tiny.npz", images=images, labels=np.arange(200) % 3)
    with socket.socket() as one, socket.socket() as two:
        for free in (one, two):
            free.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1] for free in (one, two)]
    conf = CONF.format(root=root, ports=ports, user=getpass.getuser(), host=socket.gethostname().split(".")[0])
    (root / "slurm.conf").write_text(conf)
    (root / "key").write_bytes(os.urandom(128))
    (root / "key").chmod(0o600)
    cluster = Cluster(root)
    munge = f"munged -F -f --key-file {root}/key --socket {root}/munge.socket --pid-file {root}/munged.pid"
    commands = [f"{munge} --seed-file {root}/seed", "slurmctld -D -i", "slurmd -D -N one"]
    processes = []
    try:
        for command in commands:
            log = (root / f"{command.split()[0]}.log").open("w")
            program, *options = command.split()
            program = shutil.which(program, path=SEARCHED)
            processes.append(subprocess.Popen([program, *options], env=cluster.env, stdout=log, stderr=log))
            time.sleep(1)
        end = time.monotonic() + 60
        while (
            "idle"
            not in subprocess.run(["sinfo", "-h", "-o", "%T"], env=cluster.env, capture_output=True, text=True).stdout
        ):
            logs = "\n".join(file.read_text()[-2000:] for file in sorted(root.glob("*.log")))
            assert time.monotonic() < end and all(p.poll() is None for p in processes), logs
            time.sleep(0.5)
        yield cluster
        subprocess.run(["scancel", "--full", "--signal=KILL", "--user", getpass.getuser()], env=cluster.env)
        time.sleep(2)
    finally:
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
            process.wait(30)


SHOW = """#!/usr/bin/env bash
export PYTHONPATH={root}
show() {{ "$@" python -c "import os; from umd.machine.environment import slurm_ranks as r; print(r(os.environ))"; }}
show
show srun --ntasks 1
show srun --label
"""


def test_a_task_of_srun_is_a_rank_and_the_shell_of_its_job_is_not(cluster):
    (cluster.root / "show.sh").write_text(SHOW.format(root=ROOT))
    job = cluster("sbatch --parsable --ntasks 2 show.sh")
    cluster.until(lambda: cluster.job(job)["JobState"] == "COMPLETED", job)
    shell, one, *two = sorted(cluster.said(job).splitlines(), key=lambda line: line[0] != "{")
    assert shell == one == "{}"
    found = [literal_eval(line.partition(": ")[2]) for line in sorted(two)]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(10000 + 16 * int(job) + 1)}  # its second step
    assert found == [common | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]


def digests(run: Path) -> dict[str, str]:
    """sha256 of the weights, averages and optimiser of the newest checkpoint, and its step."""
    newest = max((run / "checkpoints").glob("step-*"))
    found = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in newest.glob("*.safetensors")}
    return found | {"step": newest.name}


def test_a_job_that_is_preempted_twice_ends_with_the_bytes_of_one_that_was_not(cluster):
    job = cluster.submit("preempted", steps=400)
    cluster.until_step(job, "preempted", restarts=0)
    cluster(f"scancel --batch --signal=USR1 {job}")  # what --signal B:USR1@300 sends
    cluster.until(lambda: cluster.job(job)["Restarts"] == "1", job)
    assert "stopped by SIGUSR1 at step" in cluster.said(job)

    cluster.until_step(job, "preempted", restarts=1)
    urgent = cluster("sbatch --parsable --partition urgent --ntasks 2 --output /dev/null --wrap true")
    cluster.until(lambda: cluster.job(job)["Restarts"] == "2", job)
    cluster.until(lambda: cluster.job(urgent)["JobState"] == "COMPLETED", urgent)
    cluster.until(lambda: cluster.job(job)["JobState"] == "COMPLETED", job)
    said = cluster.said(job)
    assert said.count("goes on at step") == 2 and "stopped by SIGTERM at step" in said
    assert "Traceback" not in said and "done: step 400" in said

    other = cluster.submit("whole", steps=400)
    cluster.until(lambda: cluster.job(other)["JobState"] == "COMPLETED", other)
    assert cluster.job(other)["Restarts"] == "0" and "done: step 400" in cluster.said(other)
    whole = digests(cluster.root / "whole")
    assert whole["step"] == "step-00000400" and {"model.safetensors", "optimizer.safetensors"} < whole.keys()
    assert digests(cluster.root / "preempted") == whole


def test_five_minutes_before_its_time_is_over_a_job_is_saved_and_queued_again(cluster):
    job = cluster.submit("long", steps=1_000_000)
    cluster.until_step(job, "long", restarts=0)
    cluster(f"scontrol update JobId={job} TimeLimit=5")
    cluster.until(lambda: cluster.job(job)["Restarts"] == "1", job)
    assert "stopped by SIGUSR1 at step" in cluster.said(job)

    cluster(f"scontrol update JobId={job} TimeLimit=60")
    cluster.until_step(job, "long", restarts=1)
    cluster(f"scancel {job}")
    cluster.until(lambda: "stopped by SIGTERM at step" in cluster.said(job), job)
    saved = max((cluster.root / "long" / "checkpoints").glob("step-*"))
    steps = [json.loads(line)["step"] for line in (cluster.root / "long" / "metrics.jsonl").read_text().splitlines()]
    assert int(saved.name.removeprefix("step-")) == steps[-1]


def test_a_mistake_of_one_rank_before_the_ranks_have_met_is_not_queued_again(cluster):
    """The other one waits in vain, and its status alone would have the job queued again."""
    folder = cluster.root / "bin"
    folder.mkdir()
    call = f'exec {sys.executable} "$@" --parallel.timeout 5'
    wrong = (
        '[ "$SLURM_PROCID" = 0 ] || set -- -m umd.cli pretrain /missing'  # as on a host that lacks the configuration
    )
    (folder / "python").write_text(f"#!/bin/sh\n{wrong}\n{call}\n")
    (folder / "python").chmod(0o755)
    before = cluster.env["PATH"]
    cluster.env["PATH"] = f"{folder}:{before}"
    try:
        job = cluster.submit("unmet", steps=400)
    finally:
        cluster.env["PATH"] = before
    cluster.until(lambda: cluster.job(job)["JobState"] == "FAILED", job, seconds=120)
    assert cluster.job(job)["Restarts"] == "0" and cluster.job(job)["ExitCode"] == "78:0"
