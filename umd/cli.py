"""The `umd` command. Each subcommand is a function below; its dataclass or arguments become the options (tyro)."""

import contextlib
import difflib
import errno
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from umd.environment import prepare
from umd.errors import UserError

if TYPE_CHECKING:
    from umd.train.run import RunConfig

console = Console()
# What torch says where memory is short, or a size is beyond any.
OUT_OF_MEMORY = re.compile(r"(out of|not enough) memory|(can't|unable to) allocate|calculation overflowed", re.I)
TOGETHER = ("pretrain", "finetune")  # commands whose ranks do one thing, of which rank 0 tells


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; exits 0, or 2 with one sentence for what the user can mend."""
    prepare(restart=arguments is None)
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0].startswith(("--local_rank=", "--local-rank=")):
        arguments = arguments[1:]  # the deepspeed launcher's; the environment says the same
    if silent(*arguments[:1]):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        warnings.simplefilter("ignore")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print_help()
        return
    if arguments[0] in ("-V", "--version"):
        import umd

        console.print(f"umd {umd.__version__}", highlight=False)
        return
    name = arguments[0]
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without the line of code
    try:
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean `umd {near[0]}`?" if near else "`umd --help` lists the commands"
            raise UserError(f"unknown command {name!r}; {hint}")
        COMMANDS[name][0](arguments[1:])
    except UserError as error:
        fail(str(error), name)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or OUT_OF_MEMORY.search(str(error))):
            raise
        what = (str(error).splitlines() or [""])[0][:200]
        fail(f"there is not enough memory ({what}); use smaller batches or pictures, or a smaller network", name)
    except KeyboardInterrupt:
        console.print("interrupted")
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        sys.exit(1)
    except OSError as error:  # a full disk, a folder that cannot be written, a file that went away
        where = f"cannot use {error.filename}: " if error.filename else ""
        what = "check the path, its permissions and the room on the disk"
        if error.errno == errno.ESTALE:
            what = "a network disk lost it: mount it again on this host, and repeat the command"
        fail(f"{where}{error.strerror or error}; {what}", name)


def silent(command: str = "") -> bool:
    return int(os.environ.get("RANK", 0)) > 0 and command in TOGETHER


def fail(message: str, command: str) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and command in TOGETHER:
        from umd.train.distributed import end_all

        if not end_all(message, 2):
            sys.exit(2)
    Console(stderr=True).print(f"[bold red]umd:[/] {escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(2)


def escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def say(text: str) -> None:
    """A line as it is: paths are not broken at the width of the terminal, brackets are no markup."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_help() -> None:
    console.print("[bold]umd[/]: unified masked diffusion. One masked autoencoder that recognises and generates.\n")
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, (_, what) in COMMANDS.items():
        table.add_row(f"  [bold]{name}[/]", what)
    console.print(table)
    console.print("\n[bold]umd COMMAND --help[/] lists a command's options. First steps:\n")
    for line in (
        "umd demo                                         all of it in 15 minutes, on real images",
        "umd pretrain umd-tiny --data.source my/images --out runs/mine",
        "umd finetune runs/mine --out runs/mine-labels    class folders give the labels",
        "umd sample runs/mine-labels --cfg-scale 4",
    ):
        say(f"  {line}")


def parse(cls_or_function, name: str, arguments: list[str], default=None):
    """tyro with our program name; its own messages for wrong options suggest the nearest ones and exit with 2."""
    import tyro

    from umd.ranges import OutOfRange, named

    kwargs = {} if default is None else {"default": default}
    with contextlib.ExitStack() as quiet:
        if silent(name.split()[0]):
            quiet.enter_context(contextlib.redirect_stderr(quiet.enter_context(open(os.devnull, "w"))))
        try:
            return tyro.cli(cls_or_function, prog=f"umd {name}", args=arguments, **kwargs)
        except OutOfRange as error:
            raise named(error, arguments) from None


def with_length(default: "RunConfig", arguments: list[str]) -> "RunConfig":
    """The length of the run that is given replaces that of the preset, whichever unit either is in."""
    lengths = ("epochs", "steps", "minutes")
    given = {a.partition("=")[0].removeprefix("--") for a in arguments if a.startswith("--")} & set(lengths)
    # 1 stands in until the option is read
    epochs, steps, minutes = (int(name in given) for name in lengths)
    return replace(default, epochs=epochs, steps=steps, minutes=minutes) if given else default


def png_path(path: Path) -> Path:
    return path if path.suffix.lower() == ".png" else path.with_name(f"{path.name}.png")


def take_path(arguments: list[str], command: str, what: str) -> tuple[Path, list[str]]:
    """The first argument as a path, which decides the defaults of the options behind it."""
    if not arguments or arguments[0].startswith("-"):
        if {"-h", "--help"} & set(arguments):
            say(f"usage: umd {command} {what} [options]; `umd {command} {what} --help` lists the options of a run")
            sys.exit(0)
        raise UserError(f"umd {command} needs {what} first, e.g. `umd {command} runs/umd-tiny`")
    return Path(arguments[0]), arguments[1:]


def preset_or_config(arguments: list[str], command: str) -> tuple[str, "RunConfig", list[str]]:
    """The first argument as the run it names, and the others. Without one, prints which there are."""
    from umd.train.curves import curves
    from umd.train.presets import PRESETS
    from umd.train.run import read_config

    if not arguments or arguments[0] in ("-h", "--help"):
        say(f"usage: umd {command} PRESET|CONFIG.yaml [options]; `umd {command} PRESET --help` lists the options\n")
        table = Table(box=None, show_header=False, padding=(0, 2))
        for name, (what, _) in PRESETS.items():
            table.add_row(f"  [bold]{name}[/]", what)
        console.print(table)
        made = ", ".join(curve.name for curve in curves())
        say(f"\nA run is compared with the loss curve of a run of its recipe, where there is one: {made}.")
        sys.exit(0 if arguments else 2)
    name, rest = arguments[0], arguments[1:]
    if name in PRESETS:
        return name, PRESETS[name][1], rest
    if name.endswith((".yaml", ".yml")) or Path(name).is_dir():
        return name, read_config(Path(name)), rest
    near = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(PRESETS)}, or a config.yaml"
    raise UserError(f"unknown preset {name!r}; {hint}")


def pretrain(arguments: list[str]) -> None:
    from umd.train.loop import train
    from umd.train.run import RunConfig

    name, default, rest = preset_or_config(arguments, "pretrain")
    train(parse(RunConfig, f"pretrain {name}", rest, with_length(default, rest)), console, "pretrain")


def finetune(arguments: list[str]) -> None:
    from umd.train.classify import check_classes
    from umd.train.data import open_dataset
    from umd.train.finetune import Finetune, default_finetune
    from umd.train.loop import train
    from umd.train.run import read_config, with_classes

    init, rest = take_path(arguments, "finetune", "RUN")
    default = default_finetune(read_config(init), init, rest)
    options: Finetune = parse(Finetune, f"finetune {init}", rest, replace(default, run=with_length(default.run, rest)))
    config = options.run
    dataset = open_dataset(config.data, "train")
    if options.task != "generate":
        classes = check_classes(dataset)
        train(with_classes(config, classes), console, options.task)
        return
    if not dataset.class_names:
        raise UserError(
            f"{dataset.name} has no labels to fine-tune with; use one subfolder a class, or labels in the .npz"
        )
    train(with_classes(config, len(dataset.class_names)), console, "finetune")


def sample(arguments: list[str]) -> None:
    from umd.train.run import read_config
    from umd.train.sample import Sample, draw

    run, rest = take_path(arguments, "sample", "RUN")
    draw(run, parse(Sample, f"sample {run}", rest), read_config(run), console)


def inpaint(arguments: list[str]) -> None:
    from umd.train import evaluate
    from umd.train import inpaint as filling
    from umd.train.preview import picture_maker
    from umd.train.run import read_config

    run, rest = take_path(arguments, "inpaint", "RUN")
    options: filling.Inpaint = parse(filling.Inpaint, f"inpaint {run}", rest)
    config = read_config(run)
    filling.check_predicts_pixels(config)
    if options.mp4:
        filling.check_mp4(config)
    model, device, dtype = evaluate.open_run(config)
    x, hole = filling.pictures_and_mask(config, options.image, options.mask, options.seed, options.mask_ratio)
    filled = filling.fill_with(config, model, x.to(device), hole.to(device), options, dtype, console)
    out = png_path(options.out or run / "inpainting.png")
    filling.write_fillings(filled, out, picture_maker(config.data, device), options.mp4)
    say(f"masked, {filled.samples.shape[1]} samples, original, a row an image: {out}")
    say(f"the samples on their way: {out.with_name(f'{out.stem}-steps.png')}; one by one: {out.with_suffix('')}")


def probe(arguments: list[str]) -> None:
    from umd.train.probe import Probe
    from umd.train.probe import probe as probe_run
    from umd.train.run import at_size, read_config

    run, rest = take_path(arguments, "probe", "RUN")
    options: Probe = parse(Probe, f"probe {run}", rest)
    if options.layers:
        from umd.train.layers import probe_layers as probe_run
    probe_run(run, options, at_size(read_config(run), options.image_size), console)


def evaluate(arguments: list[str]) -> None:
    from umd.train.run import read_config
    from umd.train.score import Evaluate, run_evaluation

    run, rest = take_path(arguments, "evaluate", "RUN")
    run_evaluation(run, parse(Evaluate, f"evaluate {run}", rest), read_config(run), console)


def transfer(arguments: list[str]) -> None:
    from umd.train.run import read_config
    from umd.train.transfer import Transfer
    from umd.train.transfer import transfer as transfer_run

    run, rest = take_path(arguments, "transfer", "RUN")
    folder, rest = take_path(rest, f"transfer {run}", "FOLDER")
    transfer_run(run, folder, parse(Transfer, f"transfer {run} {folder}", rest), read_config(run), console)


def embed(arguments: list[str]) -> None:
    from umd.train.embed import Embed
    from umd.train.embed import embed as embed_run
    from umd.train.run import at_size, read_config

    run, rest = take_path(arguments, "embed", "RUN")
    source, rest = take_path(rest, f"embed {run}", "SOURCE")
    options: Embed = parse(Embed, f"embed {run} {source}", rest)
    embed_run(run, source, options, at_size(read_config(run), options.image_size), console)


def export(arguments: list[str]) -> None:
    from umd.train.export import Export
    from umd.train.export import export as export_run
    from umd.train.run import read_config

    options: Export = parse(Export, "export", arguments)
    export_run(options, read_config(options.run), console)


def encode_latents(arguments: list[str]) -> None:
    from umd.train.encode import EncodeLatents, encode

    encode(parse(EncodeLatents, "encode-latents", arguments), console)


def encode_pixels(arguments: list[str]) -> None:
    from umd.train.pixels import EncodePixels
    from umd.train.pixels import encode_pixels as encode

    encode(parse(EncodePixels, "encode-pixels", arguments), console)


def inspect(arguments: list[str]) -> None:
    from umd.train import encode

    folder, rest = take_path(arguments, "inspect", "FOLDER")
    encode.inspect(folder, parse(encode.Inspect, f"inspect {folder}", rest), console)


def demo(arguments: list[str]) -> None:
    from umd.train.demo import Demo, run_demo

    run_demo(parse(Demo, "demo", arguments), console)


def report(arguments: list[str]) -> None:
    from umd.report import load_record, write_report

    run, rest = take_path(arguments, "report", "RUN")
    if rest:
        raise UserError(f"umd report takes one folder, e.g. `umd report runs/demo`; got also {' '.join(rest)}")
    say(f"written: {write_report(load_record(run), run / 'report.html')}")


def check_data(arguments: list[str]) -> None:
    from umd.train.check import CheckData, check_data

    source, rest = take_path(arguments, "check-data", "SOURCE")
    listed = check_data(source, parse(CheckData, f"check-data {source}", rest), console)
    if json.loads(listed.read_bytes())["files"]:
        sys.exit(1)


def plan(arguments: list[str]) -> None:
    from umd.train.plan import Planned, print_plan

    name, default, rest = preset_or_config(arguments, "plan")
    if default.is_classifier:
        raise UserError("umd plan counts pre-training runs; give the run that this classifier started from")
    options: Planned = parse(Planned, f"plan {name}", rest, Planned(run=with_length(default, rest)))
    print_plan(options.run, options.cluster, name, console)


def doctor(arguments: list[str]) -> None:
    from umd.doctor import print_report
    from umd.train.loader_rate import loader_row
    from umd.train.step import capture_row

    if arguments:
        console.print("usage: umd doctor: what this machine will really use, and how to get what is missing")
        sys.exit(0 if arguments[0] in ("-h", "--help") else 2)
    print_report(console, [capture_row, loader_row])


def import_weights(arguments: list[str]) -> None:
    from umd.train.imports import Import, import_run

    import_run(parse(Import, "import", arguments), console)


BENCHES = {  # module and options of each, and what it measures
    "step": ("umd.bench.step", "StepBench", "a training step against its baselines"),
    "loader": ("umd.bench.loader", "LoaderBench", "what data cost beside the step they feed"),
    "adaln": ("umd.bench.adaln", "AdaLNBench", "weights, FLOPs and step time of adaLN's projections"),
    "audit": ("umd.bench.audit", "Audit", "what kernels, or a whole step, need on an A100 or H100, without a GPU"),
    "diffmae": ("umd.bench.diffmae", "DiffMAEBench", "DiffMAE: decoder steps against whole passes; training steps"),
    "kernels": ("umd.bench.kernels", "KernelBench", "each op: eager, torch.compile, Triton; on a GPU"),
    "probe": ("umd.bench.probe", "ProbeBench", "a few-shot probe on a folder of ImageNet's shape: time, memory, reads"),
    "reads": ("umd.bench.reads", "ReadsBench", "ways to read stored latents from a disk: images/s, bytes, requests"),
    "scale": (
        "umd.bench.scale",
        "ScaleBench",
        "commands on a folder or tar of ImageNet's size: time and memory",
    ),
    "trace": ("umd.bench.trace", "TraceBench", "where two traces of torch.profiler differ: umd bench trace A B"),
    "reproduce": ("umd.bench.reproduce", "Reproduce", "small trainings from scratch and the figures of docs/results"),
}


def bench(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in BENCHES:
        for name, (_, _, what) in BENCHES.items():
            say(f"usage: umd bench {name} [options]: {what}")
        sys.exit(0 if arguments[:1] in (["-h"], ["--help"]) else 2)
    name, rest = arguments[0], arguments[1:]
    module = import_module(BENCHES[name][0])
    module.run(parse(getattr(module, BENCHES[name][1]), f"bench {name}", rest), console)


COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "demo": (demo, "pretrain, probe, fine-tune, sample and inpaint real images; writes a report page"),
    "pretrain": (pretrain, "train without labels: umd-b4, mae-b4, ... or a config.yaml"),
    "check-data": (check_data, "read every image once; list the unusable ones, which runs then leave out"),
    "plan": (plan, "memory, time and communication of a run on a cluster that need not be there"),
    "finetune": (finetune, "go on with labels: class-conditional generation, or --task classify or linear"),
    "encode-latents": (encode_latents, "encode pictures with a VAE, once for all epochs"),
    "encode-pixels": (encode_pixels, "store pictures small, once for all epochs of runs at 64x64 and its like"),
    "inspect": (inspect, "what a folder of latents or stored pictures holds; checks it"),
    "sample": (sample, "draw samples: PNG grid and .npz"),
    "inpaint": (inpaint, "fill a hole in pictures"),
    "probe": (probe, "few-shot accuracy of the representation, beside its floors"),
    "evaluate": (evaluate, "FID and its kin of samples, and probes of the representation, in one table"),
    "embed": (embed, "the representation of pictures as .npz and Parquet"),
    "transfer": (transfer, "few-shot accuracy on other sets of pictures, a folder each"),
    "report": (report, "write the report page of a demo again"),
    "import": (import_weights, "published weights of DiT, MAE, MaskDiT, or the UMD authors' (small-vision)"),
    "export": (export, "a run for timm, transformers, diffusers, the Hugging Face hub, or small-vision"),
    "bench": (bench, "measure a training step or its data; audit kernels without a GPU"),
    "doctor": (doctor, "what this machine will really use, and how to get what is missing"),
}

if __name__ == "__main__":
    main()
