"""What a process must be told before its libraries are loaded. Imports no torch."""

import os
import re
import sys
from collections.abc import Mapping

# glibc before 2.38 cannot put an aligned block where one of its size was freed while the few bytes behind it lie in a
# thread's cache of small blocks: without that cache a training on the CPU takes a twentieth less memory. In huge pages
# (hugetlb=1, where Linux gives them only to who asks) its memory is found faster.
GLIBC_TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0:glibc.malloc.hugetlb=1"
GPU_FILES = ("/dev/nvidiactl", "/dev/dxg")  # of the NVIDIA driver, and of WSL's


def prepare(restart: bool) -> None:
    """Set how long threads spin and, if it may `restart` Python for it, how glibc keeps small blocks.

    What is set already stays. A thread that waits for its fellows spins, then sleeps: to spin for long is a little
    faster on a free machine and many times slower on a busy one (docs/performance.md). glibc reads its settings when a
    program starts; with a GPU tensors are not its business. Ranks that srun started are given torchrun's variables.
    """
    os.environ.update(slurm_ranks(os.environ))
    if "OMP_WAIT_POLICY" not in os.environ:
        free = hasattr(os, "getloadavg") and os.getloadavg()[0] < (os.cpu_count() or 1) / 4
        os.environ.setdefault("GOMP_SPINCOUNT", "20000" if free else "2000")
    if restart and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        if sys.executable and not any(map(os.path.exists, GPU_FILES)):
            os.environ["GLIBC_TUNABLES"] = GLIBC_TUNABLES
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


# Steps that are no srun of the user's: salloc's shell, the batch script, what Slurm runs for itself.
SLURM_OWN_STEPS = 0xFFFFFFF0


def slurm_ranks(env: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for one of several tasks of an srun, from Slurm's own; {} for every other process.

    A process in the shell of an sbatch or salloc is alone, whatever tasks the job has; under a launcher (torchrun,
    deepspeed) the launcher says who a process is. What is set stays. The ranks meet at the first host of the step, at a
    port made of the numbers of job and step.
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
    # The shell of a job that was submitted by a task inherits that task's step, and has one task of its own.
    if len(env.get("SLURM_GTIDS", ",").split(",")) == 1 < on_node:
        return {}
    # With a GPU bound to each task, that one is all a task sees.
    bound = len(env.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1 and env.get("SLURM_GPUS_ON_NODE", "1") != "1"
    found = {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": "0" if bound else str(local),
        "LOCAL_WORLD_SIZE": str(on_node),
        # A node's name in Slurm need not be one that the node itself can look up.
        "MASTER_ADDR": "127.0.0.1" if len(tasks) == 1 else first_host(env.get("SLURM_STEP_NODELIST", "127.0.0.1")),
        "MASTER_PORT": str(10000 + (16 * job + step) % 20000),
    }
    return {name: value for name, value in found.items() if name not in env}


def tasks_of_nodes(text: str) -> list[int]:
    """`"8(x2),4"`, as Slurm counts tasks, to [8, 8, 4]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def first_host(nodes: str) -> str:
    """`"node[03-07,9],login"`, as Slurm lists nodes, to node03."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def own_cores() -> int:
    """Cores of this host that are this rank's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks, tasks = os.environ.get("WORLD_SIZE"), os.environ.get("SLURM_STEP_NUM_TASKS")
    if ranks and ranks == tasks and "SLURM_CPUS_PER_TASK" in os.environ:
        return min(cores, int(os.environ["SLURM_CPUS_PER_TASK"]))  # srun's tasks are the ranks, bound to their cores
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
