"""Memory and speed of GPUs, from NVIDIA's data sheets."""

import re
from typing import NamedTuple

GiB = 2**30


class Gpu(NamedTuple):
    """A GPU's data."""

    memory: float  # bytes
    bf16: float  # dense FLOP/s
    fp32: float  # FLOP/s, TF32 off
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to another GPU of the node, one way


GPUS = {
    "a100-40": Gpu(40 * GiB, 312e12, 19.5e12, 1.555e12, 300e9),
    "a100-80": Gpu(80 * GiB, 312e12, 19.5e12, 2.039e12, 300e9),
    "h100": Gpu(80 * GiB, 989e12, 67e12, 3.35e12, 450e9),
    "h200": Gpu(141e9, 989e12, 67e12, 4.8e12, 450e9),
    "l40s": Gpu(48 * GiB, 362e12, 91.6e12, 0.864e12, 32e9),
}
# Dense bf16 FLOP/s of GPUs for which `umd plan` has no data, by words of their driver names.
OTHERS = {
    "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200 NVL": 835e12, "GH200": 989e12, "B200": 2250e12, "GB200": 2500e12,
    "A40": 150e12, "L40": 181e12, "RTX 4090": 165e12,
}  # fmt: skip
PARTS = {"MIG", "Laptop", "D"}  # slices and smaller versions, of which the sheet of the whole says nothing


def sheet_flops(name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by its driver name, e.g. "NVIDIA H100 80GB HBM3"; None if it is unknown."""
    sheets = {kind.partition("-")[0].upper(): gpu.bf16 for kind, gpu in GPUS.items()} | OTHERS
    words = set(re.split(r"[ -]", name))
    found = [kind for kind in sheets if words.issuperset(kind.split())]
    return None if words & PARTS or not found else sheets[max(found, key=len)]
