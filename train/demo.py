"""`umd demo`: run the whole method on real images within a time budget, and write a report page."""

import platform
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import umd
from umd.conditions import denoiser
from umd.config import OBJECTIVES, ModelConfig, ObjectiveConfig, model_config
from umd.diffmae import DiffMAE
from umd.errors import UserError
from umd.machine.device import autocast, take_device
from umd.methods import AnyModel
from umd.model import UMD
from umd.objective import Objective
from umd.report.page import DemoRecord, Part, ProbeRow, save_record, write_report
from umd.sampler import denoising_sequence
from umd.schedule import NoiseSchedule, schedule_of
from umd.train import opened
from umd.train.data import center_view, open_dataset
from umd.train.heads import heads_file, read_heads
from umd.train.inpaint import fillings, hole_mask, reconstruct
from umd.train.lock import LOCK_FILE, alone_in
from umd.train.log import read_metrics
from umd.train.loop import train
from umd.train.options import Demo, Probe
from umd.train.presets import PRESETS
from umd.train.preview import reconstructions, rgb
from umd.train.probe import Recognition, first_of_each
from umd.train.run import RunConfig, finetune_config, read_config
from umd.train.sample import Drawer
from umd.train.settings import OptimConfig
from umd.train.shards import progress, share
from umd.train.sources import describe
from umd.train.weights import weights_identity

# Fractions of the time budget, in the order of the parts. The rest is for start-up, reading data and the page.
SHARES = {
    "pretrain": 0.27, "probe": 0.08, "finetune": 0.35, "sample": 0.07, "mae": 0.05, "diffmae": 0.10, "inpaint": 0.03,
    "frechet": 0.03,
}  # fmt: skip
SHOWN = 8  # pictures of each kind on the page


class Clock:
    """Keeps the time budget, and records each finished part."""

    def __init__(self, minutes: float):
        self.start, self.budget = time.monotonic(), 60 * minutes
        self.parts: list[Part] = []

    def share(self, part: str) -> float:
        """Seconds for a part: its share of the budget, scaled down if the parts before it took longer.

        At least 1 s, as a run with 0 minutes would train for its epochs instead.
        """
        left = self.start + self.budget - time.monotonic()
        names = list(SHARES)
        before = sum(SHARES[name] for name in names[: names.index(part)])
        return max(1.0, SHARES[part] * min(self.budget, left / (1 - before)))

    def done(self, name: str, since: float, summary: str, command: str = "") -> None:
        self.parts.append(Part(name, time.monotonic() - since, summary, command))


def run_demo(demo: Demo, console: Console) -> Path:
    """Run the demo. Returns the path of the page. Raises UserError if data has no labels or `out` is not a demo's."""
    check_folder(demo.out)
    with alone_in(demo.out, "demo"):
        return make_demo(demo, console)


def make_demo(demo: Demo, console: Console) -> Path:
    """`run_demo` once the folder is locked. Removes an earlier demo in it."""
    clock = Clock(demo.minutes)
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    for name in ("pretrain", "finetune", "mae", "diffmae"):
        shutil.rmtree(demo.out / name, ignore_errors=True)
    pre = pretrain_config(demo)
    train_set, test_set = open_dataset(pre.data, "train"), open_dataset(pre.data, "test")
    if train_set.labels is None or test_set.labels is None:
        raise UserError(f"{train_set.name} has no labels; the demo needs one subfolder a class")
    classes = train_set.class_names
    device, dtype = take_device("auto", "auto")
    schedule = schedule_of(pre.schedule)
    console.rule(f"UMD demo: {demo.minutes:g} minutes, {describe(train_set)}")

    since = time.monotonic()
    seconds = clock.share("pretrain")
    pre = replace(pre, minutes=seconds / 60)
    train(pre, console, "pretrain")
    rows = read_metrics(pre.out / "metrics.jsonl")
    clock.done(
        "Pre-training", since, f"{rows[-1]['step']} steps of {pre.batch_size} images without labels" if rows else "",
        f"umd pretrain umd-tiny --minutes {pre.minutes:.2g} --out {pre.out}",
    )  # fmt: skip
    model, _, _ = opened.open_run_of(UMD, pre)
    held_out = center_view(test_set, spread(test_set.labels, SHOWN), pre.data).to(device)
    objective = Objective(*pre.parts(ModelConfig, ObjectiveConfig), schedule)
    triplets = reconstructions(model, objective, held_out, 0, demo.seed, dtype)
    noised_triplets = reconstructions(model, objective, held_out, schedule.num_steps // 4, demo.seed, dtype)
    times = [schedule.num_steps * share // 20 for share in (1, 3, 5, 10, 15, 18)]
    with torch.no_grad():
        x_t, x_start = denoising_sequence(denoiser(model, dtype), held_out[:1], schedule, times)
    denoising = list(zip(times, rgb(x_t.flatten(0, 1)), rgb(x_start.flatten(0, 1)), strict=True))

    since = time.monotonic()
    shots = 100
    seconds = clock.share("probe")
    x = held_out.repeat(8, 1, 1, 1)
    with torch.no_grad(), autocast(device, dtype):
        rate = len(x) / opened.timed(lambda: model.represent(x), device)
    most = int(seconds * rate / 3)  # two networks read each image; a third of the time is for the probe itself
    candidates = first_of_each(train_set.labels, 2 * shots)  # twice the shots, so that draws differ between seeds
    test_ids = first_of_each(test_set.labels, len(test_set))[: max(most - len(candidates), 400)]
    recognition = Recognition(pre, Probe(shots, l2=PROBE_L2, allow_fewer=True), candidates, test_ids)
    share(recognition.jobs(), console, "pictures read")
    results = recognition.fewshot()
    ours = results["UMD"]
    clock.done(
        "Few-shot probe", since, f"{ours.mean:.3f} class-averaged accuracy, up to {shots} shots a class",
        f"umd probe {pre.out} --shots {shots} --allow-fewer --l2 {' '.join(f'{v:g}' for v in PROBE_L2)}",
    )  # fmt: skip
    probe_rows = [
        ProbeRow(name, r.mean, r.std, shots, 1 / len(classes), len(r.per_seed)) for name, r in results.items()
    ]
    for row in probe_rows:
        console.print(f"probe: {row.name} {row.mean:.3f} ± {row.std:.3f}", highlight=False)

    since = time.monotonic()
    fine = finetune_config(pre, pre.out, len(classes), demo.out / "finetune")
    fine = replace(
        fine,
        batch_size=pre.batch_size,
        minutes=clock.share("finetune") / 60,
        optim=replace(fine.optim, lr=1.2e-2),
        draw_every=10**9,
    )
    train(fine, console, "finetune")
    rows = read_metrics(fine.out / "metrics.jsonl")
    clock.done(
        "Fine-tuning with labels", since, f"{rows[-1]['step']} steps, nothing masked" if rows else "",
        f"umd finetune {pre.out} --minutes {fine.minutes:.2g} --batch-size {fine.batch_size} --optim.lr 1.2e-2 "
        f"--out {fine.out}",
    )  # fmt: skip
    generator, _, _ = opened.open_run_of(UMD, fine)

    since = time.monotonic()
    seconds = clock.share("sample")
    for shown in (SHOWN, SHOWN // 2, SHOWN // 4):  # fewer pictures on a slow machine, rather than too few steps
        labels = torch.arange(len(classes)).repeat_interleave(shown)
        call = opened.seconds_a_call(generator, len(labels), dtype)
        num_steps = int(np.clip(seconds / (3.2 * call), 10, 125))  # one call per step without guidance, two with it
        if num_steps >= 25:
            break
    samples = {}
    for cfg_scale in (1.0, 4.0):
        drawer = Drawer(
            generator, schedule, labels, len(labels), num_steps=num_steps, cfg_scale=cfg_scale, eta=1.0, seed=demo.seed,
            clip=True, dtype=dtype,
        )  # fmt: skip
        with progress(console, "samples", len(labels)) as advance:
            drawn = drawer.x_start(0, len(labels), advance)
        samples[f"guidance {cfg_scale:g}"] = rgb(drawn).reshape(len(classes), shown, demo.size, demo.size, 3)
        if cfg_scale == 1.0:
            plain_samples = drawn
    clock.done(
        "Sampling",
        since,
        f"{shown} a class, {num_steps} DDIM steps, with and without guidance",
        f"umd sample {fine.out}",
    )

    others = {name: train_other(config, clock, console) for name, config in other_configs(demo).items()}

    since = time.monotonic()
    inpainting, summary = fill_holes(generator, others, held_out, schedule, demo.seed, dtype, clock, console)
    clock.done("Inpainting", since, summary, f"umd inpaint {fine.out}; umd inpaint {demo.out / 'diffmae'}")

    since = time.monotonic()
    distances = frechet_distances(plain_samples, train_set, test_set, pre, clock.share("frechet"), device, console)
    if distances:
        clock.done("Fréchet distance", since, f"{distances[0][0]} against held-out pictures")

    record = DemoRecord(
        title="Unified Masked Diffusion: demo",
        command=command_of(demo),
        started=started,
        machine={
            "device": str(device), "type": "bf16 autocast" if dtype == torch.bfloat16 else "fp32",
            "threads": str(torch.get_num_threads()), "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__, "python": platform.python_version(),
        },
        settings=settings_of(pre, model),
        dataset=describe(train_set) + (EMOJI_CREDIT if demo.data.source == "emoji" else ""),
        parts=clock.parts,
        metrics={
            config.out.name: read_metrics(config.out / "metrics.jsonl")
            for config in (pre, fine, *other_configs(demo).values())
        },
        triplets=triplets,
        noised_triplets=noised_triplets,
        denoising=denoising,
        class_names=list(classes),
        samples=samples,
        longer_samples=shipped_samples(demo.seed, console),
        inpainting=inpainting,
        inpainting_columns=["given", "MAE", "UMD, 1", "UMD, 2", "DiffMAE, 1", "DiffMAE, 2", "original"],
        probe=probe_rows,
        frechet=distances,
        mask_ratio_no_noise=objective.config.mask_ratio_no_noise,
        mask_ratio=objective.config.mask_ratio,
    )  # fmt: skip
    save_record(record, demo.out)
    page = write_report(record, demo.out / "report.html")
    took = (time.monotonic() - clock.start) / 60
    console.rule(f"{page} after {took:.1f} minutes")
    return page


# A trained model of the repository, by `umd bench reproduce paper`; an installed package is without it.
SHIPPED = Path(umd.__file__).resolve().parents[1] / "docs" / "results" / "paper-umd"


def shipped_samples(seed: int, console: Console) -> dict[str, np.ndarray]:
    """Two samples a class of the repository's trained model, by what they are; {} where there is none."""
    if not (SHIPPED / "config.yaml").exists():
        return {}
    config = read_config(SHIPPED)
    model, _, dtype = opened.open_run_of(UMD, config)
    labels = torch.arange(model.config.num_classes).repeat_interleave(2)
    heads = read_heads(heads_file(SHIPPED, weights_identity(SHIPPED)))
    drawer = Drawer(
        model, schedule_of(config.schedule), labels, len(labels), num_steps=50, cfg_scale=1.5, eta=1.0,
        seed=seed, clip=True, dtype=dtype, predict="both" if heads else "eps", heads=heads,
    )  # fmt: skip
    with progress(console, "samples of the repository's model", len(labels)) as advance:
        pictures = rgb(drawer.x_start(0, len(labels), advance))
    what = (
        "For comparison, not of this run: two samples a class by the small model that comes with the repository, "
        "trained for 49 minutes of one core, on other pictures: Fashion-MNIST (28x28, grey). Guidance 1.5."
    )
    return {what: pictures}


# Chosen among on a part of the training shots, for every row alike: networks want about 10, raw pixels 1000 or 4000.
PROBE_L2 = tuple(4.0**k for k in range(8))


EMOJI_CREDIT = ". Pictures: Noto Emoji by Google (Apache 2.0) and Twemoji by Twitter and contributors (CC BY 4.0)"


def command_of(demo: Demo) -> str:
    """The command line that runs this demo again."""
    if demo == replace(Demo(), minutes=demo.minutes, out=demo.out):
        return f"make demo MINUTES={demo.minutes:g}"
    source = f"--data.source {demo.data.source}"
    return f"umd demo --minutes {demo.minutes:g} {source} --size {demo.size} --seed {demo.seed} --out {demo.out}"


def pretrain_config(demo: Demo) -> RunConfig:
    return RunConfig(
        out=demo.out / "pretrain",
        # Four CLS tokens, as in the released code: in a short run they carry more class information than one.
        model=model_config("UMD-Mi/4", image_size=(demo.size, demo.size), num_cls=4),
        objective=ObjectiveConfig(),
        data=demo.data,
        optim=OptimConfig(lr=1e-2),  # 2.5e-3 at batch 64; the paper's lower rate is for 800 epochs
        batch_size=64,
        minutes=1,
        seed=demo.seed,
        save_every=500,
        keep=1,
        draw_every=10**9,
    )


def other_configs(demo: Demo) -> dict[str, RunConfig]:
    """Runs of the two methods that UMD's fillings are compared with: UMD's network as MAE, and DiffMAE-Ti/4."""
    pre, tiny = pretrain_config(demo), PRESETS["diffmae-tiny"][1]
    model = replace(pre.parts(ModelConfig, ObjectiveConfig)[0], adaLN=False, num_cls=1)
    mae = replace(pre, out=demo.out / "mae", model=model, objective=OBJECTIVES["mae"], optim=tiny.optim)
    return {
        "mae": mae,
        "diffmae": replace(
            mae, out=demo.out / "diffmae", model=replace(tiny.model, image_size=model.image_size),
            objective=tiny.objective, schedule=tiny.schedule,
        ),
    }  # fmt: skip


def train_other(config: RunConfig, clock: Clock, console: Console) -> AnyModel:
    since, name = time.monotonic(), config.out.name
    config = replace(config, minutes=clock.share(name) / 60)
    train(config, console, name)
    rows = read_metrics(config.out / "metrics.jsonl")
    mae = "umd-tiny --objective.no-noise-prob 1 --model.no-adaLN --model.num-cls 1"
    preset = "diffmae-tiny" if config.is_diffmae else f"{mae} --optim.lr {config.optim.lr:g}"
    title = "DiffMAE" if config.is_diffmae else "MAE"
    clock.done(
        f"{title}, to compare", since, f"{rows[-1]['step']} steps without labels" if rows else "",
        f"umd pretrain {preset} --minutes {config.minutes:.2g} --out {config.out}",
    )  # fmt: skip
    return opened.open_run(config)[0]


def fill_holes(
    generator: UMD, others: dict[str, AnyModel], x: Tensor, schedule: NoiseSchedule, seed: int, dtype: torch.dtype,
    clock: Clock, console: Console,
) -> tuple[list[list[np.ndarray]], str]:  # fmt: skip
    """Fill holes in pictures [B, C, H, W]: half of them in the center, half random patches.

    Returns one row per picture (masked, MAE, two UMD samples, two DiffMAE samples, original), and a caption.
    """
    mae, diffmae = others["mae"], others["diffmae"]
    assert isinstance(mae, UMD) and isinstance(diffmae, DiffMAE)
    P, half = generator.config.patch_size, len(x) // 2
    holes = [hole_mask("center", x[:half], P), hole_mask("random", x[half:], P, seed, 0.75)]
    hole = torch.cat(holes).to(x.device)
    call = opened.seconds_a_call(generator, len(x), dtype)
    num_steps = int(np.clip(clock.share("inpaint") / (5 * call), 10, 50))  # 2 fillings with 2 calls a step, and DiffMAE
    noise = schedule_of(PRESETS["diffmae-tiny"][1].schedule)
    drawn = {
        name: fillings(
            model, of, x, hole, samples=2, num_steps=num_steps, resample=2, seed=seed, dtype=dtype, console=console
        )
        for name, model, of in (("umd", generator, schedule), ("diffmae", diffmae, noise))
    }
    columns = [drawn["umd"].masked, reconstruct(mae, x, hole, dtype)]
    columns += [sample for filled in drawn.values() for sample in filled.samples.unbind(1)]
    rows = [list(row) for row in zip(*map(rgb, (*columns, x)), strict=True)]
    return rows, f"2 fillings of {len(x)} pictures by UMD and DiffMAE, {num_steps} steps; MAE's one answer"


def check_folder(out: Path) -> None:
    """Raise UserError if the folder holds anything but a demo."""
    found = {path.name for path in out.iterdir()} - {LOCK_FILE} if out.is_dir() else set()
    if found and not found & {"pretrain", "record.json", "report.html"}:
        raise UserError(f"{out} is not empty and holds no demo; choose another folder with --out")


def spread(labels: np.ndarray, count: int) -> np.ndarray:
    """Choose `count` images, taking the classes in turn. Returns their indices."""
    by_class = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    turns = [indices[(7 * turn) % len(indices)] for turn in range(count) for indices in by_class]
    return np.array(turns[:count])


def frechet_distances(
    samples: Tensor, train_set, test_set, config: RunConfig, seconds: float, device: torch.device, console: Console
) -> list[tuple[str, str, float]]:
    """Fréchet distances to held-out images: of samples, and of as many training images (the floor).

    seconds: time budget, which limits the number of images. Returns rows (name, what, distance); [] if not available.
    """
    try:
        start = time.monotonic()
        small = center_view(test_set, np.arange(min(8, len(test_set))), config.data).to(device)
        opened.frechet(small, small)
        rate = 16 / (time.monotonic() - start)
    except UserError as error:
        console.print(f"Fréchet distance left out: {error}", highlight=False)
        return []
    count = int(min(len(samples), len(test_set), len(train_set), max(seconds * rate / 3, 16)))
    rng = np.random.default_rng(0)
    reference = center_view(test_set, rng.permutation(len(test_set))[:count], config.data).to(device)
    real = center_view(train_set, rng.permutation(len(train_set))[:count], config.data).to(device)
    chosen = samples[torch.from_numpy(rng.permutation(len(samples))[:count].copy())]
    rows = []
    for what, images in (
        (f"{count} samples without guidance", chosen),
        (f"{count} training pictures (the floor)", real),
    ):
        name, value = opened.frechet(images, reference, console)
        rows.append((name, f"{what} against {count} held-out pictures", value))
    return rows


def settings_of(config: RunConfig, model: UMD) -> dict[str, str]:
    m, o = config.parts(ModelConfig, ObjectiveConfig)
    return {
        "network": f"width {m.hidden_size}, {m.depth} + {m.decoder_depth} blocks, patch {m.patch_size}",
        "parameters": f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M",
        "images": f"{m.image_size[0]}x{m.image_size[1]}, {m.num_patches} patches",
        "noise-free share r0": f"{o.no_noise_prob:g}",
        "hidden, noise-free m0": f"{o.mask_ratio_no_noise:.1%}",
        "hidden, noised mt": f"{o.mask_ratio:.1%}",
        "schedule": config.schedule.name,
        "batch": str(config.batch_size),
        "peak learning rate": f"{config.optim.lr * config.batch_size / 256:g}",
        "seed": str(config.seed),
    }
