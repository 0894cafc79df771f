"""What a process must be told before its libraries are loaded. Imports no torch."""

import os
import sys

# glibc before 2.38 cannot put an aligned block where one of its size was freed while the few bytes behind it lie in a
# thread's cache of small blocks: without that cache a training on the CPU takes a twentieth less memory. In huge pages
# (hugetlb=1, where Linux gives them only to who asks) its memory is found faster.
GLIBC_TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0:glibc.malloc.hugetlb=1"
GPU_FILES = ("/dev/nvidiactl", "/dev/dxg")  # of the NVIDIA driver, and of WSL's


def prepare(restart: bool) -> None:
    """Set how long threads spin and, if it may `restart` Python for it, how glibc keeps small blocks.

    What is set already stays. A thread that waits for its fellows spins, then sleeps: to spin for long is a little
    faster on a free machine and many times slower on a busy one (docs/performance.md). glibc reads its settings when a
    program starts; with a GPU tensors are not its business.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        free = hasattr(os, "getloadavg") and os.getloadavg()[0] < (os.cpu_count() or 1) / 4
        os.environ.setdefault("GOMP_SPINCOUNT", "20000" if free else "2000")
    if restart and sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        if sys.executable and not any(map(os.path.exists, GPU_FILES)):
            os.environ["GLIBC_TUNABLES"] = GLIBC_TUNABLES
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
