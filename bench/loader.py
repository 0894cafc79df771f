"""`umd bench loader`: cost of data loading compared with the training step it feeds.

Each case runs in a process of its own, as in a training. In every round, each case of a group is measured once. Read
the ratios, not the seconds: a ratio is the median of the ratios within each round.
"""

import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from umd.bench.options import LoaderBench
from umd.bench.reads import write_latents
from umd.bench.step import (
    WARMUP,
    baseline_step,
    count_flops,
    diffusers_dit,
    diffusers_eps,
    dit_loss,
    machine,
    own_process,
)
from umd.bench.training import LR, Step, train_step, with_modulation
from umd.config import ObjectiveConfig
from umd.files import write_json
from umd.machine.device import autocast, keep_freed_memory, pick_device, pick_dtype, seconds_of, take_device
from umd.model import UMD
from umd.objective import Objective
from umd.ops import sample_posterior
from umd.schedule import NoiseSchedule
from umd.tokenizer import Tokenizer, identity
from umd.train import data
from umd.train.data import has_dali, open_dataset, sample_keys, train_loader
from umd.train.latent_batches import StoredViews
from umd.train.latents import LatentDataset
from umd.train.loader_rate import cpu_seconds, photographs, rates
from umd.train.options import EncodePixels
from umd.train.pixels import StoredCrops, encode_pixels
from umd.train.settings import DataConfig


@dataclass(frozen=True)
class Case:
    measure: Callable[[], dict[str, float]]  # measures once: row name -> seconds
    samples: int  # samples per measurement
    flops: dict[str, Callable[[], Step]] = field(default_factory=dict)  # row name -> makes a step to count FLOPs of


# Cases


@contextmanager
def encoding(bench: LoaderBench) -> Iterator[Case]:
    """Encode a picture with a VAE of Stable Diffusion's size."""
    tokenizer, x = sd_vae(bench), pictures(bench, 1)
    with autocast(x.device, pick_dtype(bench.dtype, x.device)):
        yield Case(lambda: {"encode with the VAE": seconds_of(lambda: tokenizer.moments(x), bench.device)}, 1)


@contextmanager
def reading(bench: LoaderBench) -> Iterator[Case]:
    """Read stored latents in this process."""
    with stored_batches(bench, num_workers=0, batch=64) as batches:
        yield Case(lambda: {"read stored latents": seconds_of(lambda: next(batches), bench.device)}, 64)


@contextmanager
def step_on_stored(bench: LoaderBench) -> Iterator[Case]:
    """Make a training step on stored latents, and wait for its batch."""
    umd = umd_step(bench)
    # More steps than batches wait in the loader's queue, which fills up between two measurements.
    in_a_row = 1 if bench.device == "cpu" else 8
    with stored_batches(bench, bench.num_workers, bench.batch) as batches:

        def measure() -> dict[str, float]:
            wait = step = 0.0
            for _ in range(in_a_row):
                start = time.perf_counter()
                latents = next(batches).x_start
                wait += time.perf_counter() - start
                step += seconds_of(partial(umd, latents), bench.device)
            return {"umd, stored latents": (wait + step) / in_a_row, "waiting for them": wait / in_a_row}

        yield Case(measure, bench.batch, {"umd, stored latents": lambda: partial(umd_step(bench), latents(bench))})


@contextmanager
def step_with_vae(bench: LoaderBench) -> Iterator[Case]:
    """Make the same step with the VAE encoding inside it."""
    tokenizer, x, umd = sd_vae(bench), pictures(bench, bench.batch), umd_step(bench)

    def step() -> None:
        with autocast(x.device, pick_dtype(bench.dtype, x.device)):
            moments = tokenizer.moments(x)
        umd(sample_posterior(moments, 0, torch.arange(bench.batch, device=x.device)))

    yield Case(lambda: {"umd, VAE in the step": seconds_of(step, bench.device)}, bench.batch)


@contextmanager
def dit_on_stored(bench: LoaderBench) -> Iterator[Case]:
    """Make a training step of DiT on stored latents."""
    dit = dit_step(bench)
    with stored_batches(bench, bench.num_workers, bench.batch) as batches:

        def step() -> None:
            dit(next(batches).x_start)

        name = "dit, stored latents"
        yield Case(lambda: {name: seconds_of(step, bench.device)}, bench.batch, {name: lambda: step})


# CPU time of all threads together to make 64x64 crops; for latents, to read them.
READERS = ("JPEGs decoded whole", "JPEGs at a fraction", "JPEGs in a tar", "JPEGs by DALI", "pixel shards", "latents")


@contextmanager
def jpegs(
    bench: LoaderBench, *, name: str, loader: str = "python", tar: bool = False, whole: bool = False
) -> Iterator[Case]:
    """Read JPEGs of ImageNet's size from a folder or a tar. whole: decode at full size, as torchvision does."""
    with photographs(64) as folder, ExitStack() as stack:
        if whole:
            stack.callback(setattr, data, "shrink_for", data.shrink_for)
            data.shrink_for = lambda box, config: 1
        source = folder
        if tar:
            source = folder / "all.tar"
            with tarfile.open(source, "w") as archive:
                for file in sorted(folder.glob("*.jpg")):
                    archive.add(file, file.name)
        yield Case(lambda: {name: rates(source, loader, size=64, workers=0)[1]}, 1)


@contextmanager
def pixel_shards(bench: LoaderBench) -> Iterator[Case]:
    """Read stored 96x96 pictures and draw their crop boxes. The device would make the crops."""
    with photographs(64) as folder, tempfile.TemporaryDirectory() as out:
        encode_pixels(EncodePixels(str(folder), Path(out), holdout=0), Console(quiet=True))
        config = DataConfig(out, (64, 64), num_workers=0)
        views = StoredCrops(data.open_dataset(config, "train"), config, 0)  # type: ignore[arg-type]
        yield Case(lambda: {"pixel shards": read_rate(views, 64)}, 1)


@contextmanager
def latent_shards(bench: LoaderBench) -> Iterator[Case]:
    with latents_folder(bench) as config:
        dataset = open_dataset(config, "train")
        assert isinstance(dataset, LatentDataset)
        yield Case(lambda: {"latents": read_rate(StoredViews(dataset, 1), len(dataset))}, 1)


def read_rate(views: StoredCrops | StoredViews, count: int, batches: int = 100, batch: int = 64) -> float:
    """CPU seconds per image, read in batches in random order."""
    keys = sample_keys(count, batch_size=batch, seed=0)
    for _ in range(3):
        views.__getitems__(next(keys))
    began = cpu_seconds()
    for _ in range(batches):
        views.__getitems__(next(keys))
    return (cpu_seconds() - began) / (batches * batch)


Maker = Callable[[LoaderBench], AbstractContextManager[Case]]
GROUPS: dict[str, tuple[Maker, ...]] = {
    "latents": (encoding, reading),
    "steps": (step_on_stored, step_with_vae, dit_on_stored),
    "pictures": (
        partial(jpegs, name=READERS[0], whole=True),
        partial(jpegs, name=READERS[1]),
        partial(jpegs, name=READERS[2], tar=True),
        *([partial(jpegs, name=READERS[3], loader="dali")] if has_dali() else []),
        pixel_shards,
        latent_shards,
    ),
}
# (what, numerator row, denominator row, target); ratio of seconds per sample of two rows of one group
RATIOS = [
    ("encoding / reading", "encode with the VAE", "read stored latents", ">= 50"),
    ("wait / step", "waiting for them", "umd, stored latents", "< 0.03"),
    ("VAE in the step / stored", "umd, VAE in the step", "umd, stored latents", ""),
    ("whole / at a fraction", READERS[0], READERS[1], ">= 2"),
    ("DALI / at a fraction", READERS[3], READERS[1], ""),
    ("at a fraction / pixel shards", READERS[1], READERS[4], ""),
    ("UMD / DiT of equal depth", "umd, stored latents", "dit, stored latents", "<= 0.62"),
]


# What they measure


def pictures(bench: LoaderBench, count: int) -> Tensor:
    x = torch.rand(count, 3, 8 * bench.latent_size, 8 * bench.latent_size, generator=torch.Generator().manual_seed(0))
    return (x * 2 - 1).to(bench.device)


def latents(bench: LoaderBench) -> Tensor:
    return torch.zeros(bench.batch, 4, bench.latent_size, bench.latent_size, device=bench.device)


def sd_vae(bench: LoaderBench) -> Tokenizer:
    """An autoencoder of Stable Diffusion's size with random weights; it is as fast as a trained one."""
    from diffusers import AutoencoderKL

    network = AutoencoderKL(
        block_out_channels=bench.vae_channels, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=256,
        norm_num_groups=min(32, *bench.vae_channels),
    )  # fmt: skip
    network = network.to(bench.device).eval().requires_grad_(False)
    return Tokenizer(network, identity("random weights", "AutoencoderKL", network))


@contextmanager
def latents_folder(bench: LoaderBench) -> Iterator[DataConfig]:
    """Write a folder of random latents."""
    side = bench.latent_size
    generator = np.random.default_rng(0)
    moments = torch.from_numpy(generator.standard_normal((bench.stored, 1, 2, 4, side, side), np.float32)).half()
    with tempfile.TemporaryDirectory() as folder:
        write_latents(Path(folder), moments, "fp16")
        yield DataConfig(source=folder, image_size=(side, side), channels=4, num_workers=0)


@contextmanager
def stored_batches(bench: LoaderBench, num_workers: int, batch: int) -> Iterator[Iterator]:
    """The training loader on a folder of random latents."""
    with latents_folder(bench) as config:
        config = replace(config, num_workers=num_workers)
        loader = train_loader(open_dataset(config, "train"), config, batch_size=batch, seed=0, device=bench.device)
        try:
            yield loader
        finally:
            loader.close()


def umd_step(bench: LoaderBench) -> Callable[[Tensor], object]:
    config = bench.config()
    objective = Objective(config, ObjectiveConfig(), NoiseSchedule("linear"))
    step = train_step(with_modulation(UMD(config)), objective, bench.batch, bench.dtype, bench.device)
    indices = torch.arange(bench.batch, device=bench.device)  # any: UMD's objective does not use them
    return lambda x: step(x, None, indices, LR)


def dit_step(bench: LoaderBench) -> Callable[[Tensor], None]:
    """Training step of diffusers' DiT: as many blocks as UMD's encoder plus decoder."""
    config = bench.config()
    model = diffusers_dit(config, config.depth + config.decoder_depth).to(bench.device)
    model.train()
    loss = partial(
        dit_loss, diffusers_eps(model), schedule=NoiseSchedule("linear"),
        labels=torch.zeros(bench.batch, dtype=torch.int64, device=bench.device),
    )  # fmt: skip
    return baseline_step(bench, model, loss, our_clip=True)


# Running


def serve(bench: LoaderBench, maker: Maker, pipe: Connection) -> None:
    """Process of one case: send samples and FLOPs, then the seconds of one measurement per request."""
    keep_freed_memory()
    take_device(bench.device, bench.dtype)
    with maker(bench) as case:
        for _ in range(WARMUP):
            case.measure()
        pipe.send((case.samples, {name: count_flops(make, bench.device) for name, make in case.flops.items()}))
        while pipe.recv():
            pipe.send(case.measure())


def run(bench: LoaderBench, console: Console) -> dict:
    """Measure all cases, print the tables, write the JSON. Returns {"settings", "rows", "ratios"}."""
    bench = replace(bench, device=str(pick_device(bench.device)))
    rows, ratios = [], []
    for group in bench.groups:
        seconds: dict[str, list[float]] = {}
        samples: dict[str, int] = {}
        flops: dict[str, int] = {}
        with ExitStack() as stack:
            pipes = [stack.enter_context(own_process(serve, bench, maker)) for maker in GROUPS[group]]
            counts = [pipe.recv() for pipe in pipes]
            for _ in track(range(bench.repeats), description=group, console=console, transient=True):
                for pipe, (count, work) in zip(pipes, counts, strict=True):
                    pipe.send(True)
                    for name, value in pipe.recv().items():
                        seconds.setdefault(name, []).append(value / count)
                        samples[name] = count
                    flops |= work
        for name, values in seconds.items():
            rows.append(
                {"group": group, "name": name, "samples": samples[name], "flops": flops.get(name)}
                | {"seconds_per_sample": statistics.median(values), "min": min(values), "max": max(values)}
            )
        for what, over, under, target in RATIOS:
            if over in seconds and under in seconds:
                value = statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))
                counted = flops[over] / flops[under] if over in flops and under in flops else None
                ratios.append({"name": what, "value": value, "target": target, "flops": counted})
    settings = {**asdict(bench), "json": None, "torch": torch.__version__, "threads": torch.get_num_threads()}
    result = {"settings": settings, "rows": rows, "ratios": ratios}
    show(bench, result, console)
    if bench.json is not None:
        write_json(bench.json, result)
    return result


def show(bench: LoaderBench, result: dict, console: Console) -> None:
    where = machine(bench.device)
    table = Table(
        "", "ms a sample", "min-max", "a second", title=f"{bench.model}, batch {bench.batch}, {bench.dtype}, {where}"
    )
    for row in result["rows"]:
        low, high = (f"{1000 * row[name]:.3f}" for name in ("min", "max"))
        seconds = row["seconds_per_sample"]
        table.add_row(row["name"], f"{1000 * seconds:.3f}", f"{low}-{high}", f"{1 / seconds:,.0f}")
    console.print(table)
    table = Table("ratio", "measured", "target", "of FLOPs")
    for ratio in result["ratios"]:
        counted = "" if ratio["flops"] is None else f"{ratio['flops']:.2f}"
        table.add_row(ratio["name"], f"{ratio['value']:.3g}", ratio["target"], counted)
    console.print(table)
