"""Features of pictures, computed by any number of ranks and kept on disk, keyed by everything that they depend on.

A batch of pictures is read while the network works on the batch before. The network always sees `CALL` pictures at a
time: the rounding of a matrix product depends on its size, so a feature would depend on the batch size.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from umd.errors import UserError
from umd.files import write_whole
from umd.machine.environment import own_cores
from umd.train.data import Dataset, center_view
from umd.train.latents import LatentDataset
from umd.train.pixels import PixelDataset
from umd.train.pools import in_order
from umd.train.settings import DataConfig
from umd.train.shards import Advance, Job
from umd.train.sources import Rows

CALL = 64  # pictures per network call

Pictures = Callable[[np.ndarray], Tensor]  # indices int64 [n] -> float32 [n, C, H, W]
Extract = Callable[[Tensor, Tensor], Mapping[str, Tensor]]  # pictures [CALL, C, H, W], indices [CALL] -> features


@dataclass(frozen=True)
class Features:
    """Features of the pictures `ids` (int64 [n]), in files of `folder`.

    recipe: everything that they depend on, except the choice of pictures. Both name the folder.
    """

    root: Path
    recipe: dict[str, Any]
    ids: np.ndarray
    per_file: int = 256

    @property
    def settings(self) -> dict[str, Any]:
        digest = sha256(np.ascontiguousarray(self.ids, dtype="<i8").data).hexdigest()
        return self.recipe | {"ids": {"count": len(self.ids), "sha256": digest}}

    @property
    def folder(self) -> Path:
        return self.root / name_of(self.settings)

    @property
    def files(self) -> list[Path]:
        return [self.folder / f"{first:08d}.safetensors" for first, _ in spans(len(self.ids), self.per_file)]

    def jobs(self, pictures: Pictures, extract: Extract) -> list[Job]:
        """The jobs that compute the files."""
        self.write_recipe()
        return [
            Job(file, last - first, partial(extracted, self.ids[first:last], pictures, extract))
            for file, (first, last) in zip(self.files, spans(len(self.ids), self.per_file), strict=True)
        ]

    def write_recipe(self) -> None:
        """Write the recipe into the folder, for people who look there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "recipe.json").exists():
            write_whole(self.folder / "recipe.json", json.dumps(self.settings, indent=1).encode())

    def read(self, name: str) -> Tensor:
        """Read all features of one name: float32 [n, ...]. Raises UserError for an incomplete file."""
        whole: Tensor | None = None  # allocated once, filled part by part
        for first, part in self.parts(name):
            whole = torch.empty(len(self.ids), *part.shape[1:]) if whole is None else whole
            whole[first : first + len(part)] = part
        assert whole is not None, "features are of some pictures"
        return whole

    def parts(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """Yield (position of the first, features) of one name, file by file. Raises UserError as `read` does."""
        for file, (first, last) in zip(self.files, spans(len(self.ids), self.per_file), strict=True):
            try:
                with safe_open(file, "pt") as opened:
                    part = opened.get_tensor(name)
                if len(part) != last - first:
                    raise ValueError(f"{len(part)} features of {last - first} pictures")
            except FileNotFoundError as error:  # safetensors says so of every file that cannot be opened
                raise UserError(
                    f"{file} cannot be opened; run the same command again, which makes what is missing"
                ) from error
            except (SafetensorError, ValueError) as error:
                file.unlink(missing_ok=True)
                raise UserError(
                    f"the features in {file} were damaged ({error}) and are removed: run the same command again, which "
                    "makes them anew"
                ) from error
            yield first, part


def extracted(ids: np.ndarray, pictures: Pictures, extract: Extract, advance: Advance) -> bytes:
    """Compute the features of pictures `ids`. Returns the bytes of a safetensors file."""
    found: dict[str, list[Tensor]] = {}
    done = 0
    for here, x in read_ahead(ids, pictures):
        whole = F.pad(x.flatten(1), (0, 0, 0, CALL - len(x))).view(CALL, *x.shape[1:])
        indices = torch.from_numpy(np.concatenate([here, np.zeros(CALL - len(here), np.int64)]))
        for name, features in extract(whole, indices).items():
            found.setdefault(name, []).append(features[: len(here)].float().cpu())
        done += len(here)
        advance(done)
    tensors = {name: torch.cat(parts).contiguous() for name, parts in found.items()}
    bad = [name for name, features in tensors.items() if not features.isfinite().all()]
    if bad:
        raise UserError(
            f"features ({bad[0]}) hold NaN or infinity: check the weights, or set precision: fp32 in its config.yaml"
        )
    return save(tensors)


def read_ahead(ids: np.ndarray, pictures: Pictures) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield batches of up to `CALL` (indices, pictures). The next batch is read in the background."""
    batches = [ids[first:last] for first, last in spans(len(ids), CALL)]
    gpu = torch.cuda.current_device() if torch.cuda.is_available() else None  # a new thread would use GPU 0
    begin = (lambda: None) if gpu is None else partial(torch.cuda.set_device, gpu)
    with ThreadPoolExecutor(1, initializer=begin) as reader:
        coming = reader.submit(pictures, batches[0])
        for here, following in zip(batches, [*batches[1:], None], strict=True):
            x = coming.result()
            if following is not None:
                coming = reader.submit(pictures, following)
            yield here, x


def identity_of(dataset: Dataset, ids: np.ndarray) -> dict[str, Any]:
    """Identify the pictures of features: size of the split, and a digest of the pictures with indices `ids`.

    The digest is over:

    - files: names, sizes and times of change,
    - arrays: all bytes,
    - latents: the recipe, and all shards of the split with their checksums,
    - stored pictures: the recipe, and the split's entry in the header.
    """
    digest = sha256()
    if isinstance(dataset, LatentDataset):
        entries = dataset.header["splits"][dataset.split]["shards"]
        digest.update(json.dumps([dataset.header["recipe"], entries], sort_keys=True).encode())
    elif isinstance(dataset, PixelDataset):
        digest.update(json.dumps([dataset.header["recipe"], dataset.header["splits"][dataset.split]]).encode())
    elif isinstance(dataset.pictures, np.ndarray | Rows):
        for first, last in spans(len(ids), 1024):
            digest.update(np.ascontiguousarray(dataset.pictures[ids[first:last]]).data)
    else:
        pictures = dataset.pictures

        def stamps(part: tuple[int, int]) -> str:
            return "".join(stamp_of(pictures[i]) for i in ids[slice(*part)].tolist())

        # Threads mostly wait for the disk. By the thousand, as a future for each picture of ImageNet takes 2 GB.
        with ThreadPoolExecutor(16) as pool:
            for text in in_order(pool, stamps, spans(len(ids), 1024), dataset.name, ahead=64):
                digest.update(text.encode("utf-8", "surrogateescape"))
    return {"images": len(dataset), "split": dataset.split, "sha256": digest.hexdigest()}


def stamp_of(picture: Any) -> str:
    """Name, size and time of change of a file. Of a folder: of all its frames. Of a tar member: also its position."""
    if not isinstance(picture, str | Path):  # a member of a tar
        return f"{picture} {picture.stamp[1]} {picture.offset} {picture.size};"
    path = Path(picture)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return "".join(f"{file.name} {s.st_size} {s.st_mtime_ns};" for file in files for s in (file.stat(),))


def pictures_of(dataset: Dataset, config: DataConfig, zoom: float = 1.0) -> Pictures:
    """A function that reads pictures as `center_view` does, in one thread per core of this rank."""
    return lambda ids: center_view(dataset, ids, replace(config, num_workers=own_cores()), zoom)


def spans(total: int, size: int) -> list[tuple[int, int]]:
    """Cut 0..total into ranges (first, last) of `size`; last is exclusive."""
    return list(pairwise([*range(0, total, size), total]))


def name_of(settings: Mapping[str, Any]) -> str:
    """A short digest of settings; equal settings have equal names."""
    return sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
