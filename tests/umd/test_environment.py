"""What a process sets for itself before its libraries load, each case in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from umd.machine.environment import GPU_FILES, first_host, slurm_ranks, tasks_of_nodes

ROOT = Path(__file__).parents[2]
SHOW = """
import os, sys
print("begins", flush=True)
from umd.machine.environment import prepare
prepare(restart={restart})
print(os.environ.get("GLIBC_TUNABLES"), os.environ.get("GOMP_SPINCOUNT"), sys.argv[1:], sys.flags.utf8_mode)
"""
restarts = pytest.mark.skipif(
    sys.platform != "linux" or any(map(os.path.exists, GPU_FILES)), reason="restarts only on Linux, without a GPU"
)


def shown(restart: bool, **env: str) -> list[str]:
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    command = [sys.executable, "-X", "utf8", "-c", SHOW.format(restart=restart), "a b", "--c"]
    done = subprocess.run(
        command, env=inherited | env | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@restarts
def test_it_starts_again_once_with_the_same_arguments():
    lines = shown(restart=True)
    assert lines[:2] == ["begins", "begins"] and len(lines) == 3
    assert lines[2].startswith("glibc.malloc.tcache_count=0") and lines[2].endswith("['a b', '--c'] 1")


@restarts
def test_what_is_set_stays():
    assert shown(restart=True, GLIBC_TUNABLES="glibc.malloc.perturb=0", GOMP_SPINCOUNT="7") == [
        "begins",
        "glibc.malloc.perturb=0 7 ['a b', '--c'] 1",
    ]


@restarts
def test_called_from_python_it_does_not_start_again():
    begins, told = shown(restart=False)
    assert begins == "begins" and told.startswith("None 2")  # 2000 or 20000


@restarts
def test_a_wait_policy_is_left_to_decide():
    assert shown(restart=False, OMP_WAIT_POLICY="passive")[1].startswith("None None")


# What Slurm 22.05 sets, by `env` in each place. `sbatch --nodes 2 --ntasks-per-node 2`, its shell:
BATCH = {"SLURM_JOB_ID": "41", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_TASKS_PER_NODE": "2(x2)"}
BATCH |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "node[07-08]"}
BATCH |= {"SLURM_GTIDS": "0"}
# And task 3 of `srun` in it.
TASK = BATCH | {"SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}
TASK |= {"SLURM_STEP_NODELIST": "node[07-08]", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
TASK |= {"SLURM_GTIDS": "2,3"}
RANK = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node07"}
RANK |= {"MASTER_PORT": str(10000 + 16 * 41 + 1)}


def test_a_task_of_srun_is_a_rank():
    assert slurm_ranks(TASK) == RANK


@pytest.mark.parametrize(
    ("where", "env"),
    [
        ("no Slurm", {}),
        ("the shell of sbatch", BATCH),
        ("the same, submitted by a task of srun, whose step it inherits", TASK | BATCH),
        ("salloc's shell, which is a step of its own", TASK | {"SLURM_STEP_ID": str(0xFFFFFFFA)}),
        ("an srun of one task, such as srun --pty bash", TASK | {"SLURM_STEP_NUM_TASKS": "1"}),
        ("torchrun under srun", TASK | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}),
        ("a rank under a launcher of someone's own", TASK | {"RANK": "5"}),
        ("variables that are no numbers", TASK | {"SLURM_PROCID": "", "SLURM_STEP_ID": "batch"}),
    ],
)
def test_everything_else_is_left_as_it_is(where, env):
    assert slurm_ranks(env) == {}


@pytest.mark.parametrize(
    ("what", "env", "expected"),
    [
        ("an address that is set stays", {"MASTER_ADDR": "10.0.0.7"}, {"MASTER_ADDR": None}),
        ("a port that is set stays", {"MASTER_PORT": "29500"}, {"MASTER_PORT": None}),
        (
            "one node need not look up its name",
            {"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_NODEID": "0"},
            {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": "4"},
        ),
        (
            "nodes of unequal shares",
            {"SLURM_STEP_TASKS_PER_NODE": "3,1"},
            {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "node07"},
        ),
        (
            "all GPUs of the node are seen by each task (--gpus-per-node)",
            {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "2"},
            {"LOCAL_RANK": "1"},
        ),
        (
            "a GPU for each task (--gpus-per-task 1)",
            {"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "2"},
            {"LOCAL_RANK": "0"},
        ),
        (
            "one GPU for two tasks, which is refused when the ranks meet",
            {"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "1"},
            {"LOCAL_RANK": "1"},
        ),
        ("a second srun of the job meets elsewhere", {"SLURM_STEP_ID": "2"}, {"MASTER_PORT": str(10000 + 16 * 41 + 2)}),
        ("the largest number of a job", {"SLURM_JOB_ID": "67108863"}, {"MASTER_PORT": "11809"}),
    ],
)  # fmt: skip
def test_what_a_rank_is_told(what, env, expected):
    found = slurm_ranks(TASK | env)
    assert {name: found.get(name) for name in expected} == expected


def test_lists_of_slurm():
    """By `scontrol show hostnames`, and the manual of sbatch for tasks."""
    hosts = {
        "node07": "node07",
        "node[01-03,7],login": "node01",
        "login,node[01-03]": "login",
        "rack[1-2]node[03,05]": "rack1node03",
    }
    assert {nodes: first_host(nodes) for nodes in hosts} == hosts
    tasks = {"8": [8], "2(x3),1": [2, 2, 2, 1], "1,8(x2)": [1, 8, 8], "": []}
    assert {text: tasks_of_nodes(text) for text in tasks} == tasks
