"""Environment variables that must be set before libraries are loaded. Imports no torch."""

import io
import os
import re
import sys
from collections.abc import Mapping

# Before 2.38 glibc cannot reuse a freed aligned block while the few bytes behind it are in a thread's cache of small
# blocks. Without that cache (tcache, mxfast) training on the CPU takes a twentieth less memory.
# hugetlb=1 asks for huge pages, which make memory accesses faster, where Linux gives them on request only.
GLIBC_TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0:glibc.malloc.hugetlb=1"
GPU_FILES = ("/dev/nvidiactl", "/dev/dxg")  # exist with the NVIDIA driver, and with WSL's


def prepare(restart: bool) -> None:
    """Set up this process. Environment variables that are already set stay as they are.

    - Output in an encoding without a character, such as ≥ in Latin-1, shows ? instead.
    - Ranks started by srun: torchrun's variables (see `slurm_ranks`).
    - GOMP_SPINCOUNT: how long a waiting OpenMP thread spins before it sleeps. Long spinning is a little faster on a
      free machine and many times slower on a busy one (docs/performance.md).
    - GLIBC_TUNABLES, on Linux without a GPU (with one, tensors are not in glibc's memory). glibc reads it when a
      program starts, so Python is restarted; `restart` False leaves this out.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    os.environ.update(slurm_ranks(os.environ))
    if "OMP_WAIT_POLICY" not in os.environ:
        free = hasattr(os, "getloadavg") and os.getloadavg()[0] < (os.cpu_count() or 1) / 4
        os.environ.setdefault("GOMP_SPINCOUNT", "20000" if free else "2000")
    if restart and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        if sys.executable and not any(map(os.path.exists, GPU_FILES)):
            os.environ["GLIBC_TUNABLES"] = GLIBC_TUNABLES
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


# Step numbers from here on are not a user's srun: salloc's shell, the batch script, Slurm's own steps.
SLURM_OWN_STEPS = 0xFFFFFFF0


def slurm_ranks(env: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for one of several tasks of an srun, derived from Slurm's variables.

    The ranks meet at the first host of the step, at a port computed from the numbers of job and step. Variables that
    `env` already has are left out.

    The result is {} for every other process: one in the shell of an sbatch or salloc is alone, however many tasks the
    job has, and under a launcher (torchrun, deepspeed) the launcher sets the variables.
    """
    numbers = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name in env for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        return {}
    if not all(env.get(name, "").isdecimal() for name in numbers):
        return {}
    job, step, size, rank, local = (int(env[name]) for name in numbers)
    if size < 2 or step >= SLURM_OWN_STEPS:
        return {}
    tasks = tasks_of_nodes(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = int(env.get("SLURM_NODEID", 0))
    on_node = tasks[node] if node < len(tasks) else size
    # A job submitted from within a task inherits the variables of that task's step, but has one task of its own.
    if len(env.get("SLURM_GTIDS", ",").split(",")) == 1 < on_node:
        return {}
    # If Slurm binds one GPU to each task, a task sees only this GPU, as number 0.
    bound = len(env.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1 and env.get("SLURM_GPUS_ON_NODE", "1") != "1"
    found = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": "0" if bound else str(local),
        "LOCAL_WORLD_SIZE": str(on_node),
        # On a single node use the loopback address: the node may be unable to look up its own name in Slurm.
        "MASTER_ADDR": "127.0.0.1" if len(tasks) == 1 else first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        "MASTER_PORT": str(10000 + (16 * job + step) % 20000),
    }
    return {name: value for name, value in found.items() if name not in env}


def tasks_of_nodes(text: str) -> list[int]:
    """Tasks per node from Slurm's notation: `"8(x2),4"` to [8, 8, 4]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def first_host(nodes: str) -> str:
    """The first host of Slurm's node list: `"node[03-07,9],login"` to node03."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def own_cores() -> int:
    """Number of this host's cores that this rank may use: its share among the ranks of the host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks, tasks = os.environ.get("WORLD_SIZE"), os.environ.get("SLURM_STEP_NUM_TASKS")
    if ranks and ranks == tasks and "SLURM_CPUS_PER_TASK" in os.environ:
        return min(cores, int(os.environ["SLURM_CPUS_PER_TASK"]))  # srun's tasks are the ranks, each with its own cores
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
