"""Writes files of tensors and arrays that need not be in memory at once."""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from umd.files import written_whole

# Names of types in safetensors files, in the order in which the library stores tensors: wide types first, so that each
# tensor begins at a multiple of its element size.
SAFETENSORS_TYPES = {
    torch.int64: "I64", torch.float64: "F64", torch.float32: "F32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write the same file as `safetensors.torch.save_file`, flush it to the disk, and return its sha256.

    The checksum is computed from the bytes as they are written, so the file need not be read again. Tensors may have
    any device and strides and may share memory; only one is copied at a time. Raises OSError, e.g. for a full disk.
    """
    rank = list(SAFETENSORS_TYPES).index
    order = sorted(tensors, key=lambda name: (rank(tensors[name].dtype), name.encode()))
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": SAFETENSORS_TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]
        }  # fmt: skip
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for part in (len(head).to_bytes(8, "little"), head):
            digest.update(part)
            file.write(part)
        for name in order:
            values = tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            for first in range(0, len(values), 1 << 24):
                block = values[first : first + (1 << 24)]
                digest.update(block)
                while len(block):  # a write may write only a part
                    block = block[file.write(block) :]
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_npz(
    path: Path, name: str, dtype: str, shape: tuple[int, ...], parts: Iterable[np.ndarray],
    others: Mapping[str, np.ndarray],
) -> None:  # fmt: skip
    """Write what `np.savez` would of the array `name` and of `others`, atomically; equal arrays give equal bytes.

    parts: rows of the array, in order; only one part is in memory at a time. dtype, shape: of the whole array, dtype as
    in its .npy header, e.g. "<f4". Raises OSError, e.g. for a full disk.
    """
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    with written_whole(path) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for part in parts:
                member.write(np.ascontiguousarray(part, dtype).data)
        for other, array in others.items():
            with archive.open(zipfile.ZipInfo(f"{other}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
