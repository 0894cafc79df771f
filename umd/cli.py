"""The `umd` command.

`COMMANDS` lists the subcommands: a function below, or the place of a function in `umd.train`. tyro makes the options of
each from a dataclass.
"""

import contextlib
import difflib
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from inspect import cleandoc
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from umd.errors import UserError
from umd.files import LOST, exit_status
from umd.machine.environment import prepare

if TYPE_CHECKING:
    from umd.train.run import RunConfig

console = Console(markup=False, highlight=False)  # names of files and classes may hold brackets
# PyTorch's messages when memory is short or a tensor size overflows.
OUT_OF_MEMORY = re.compile(r"(out of|not enough) memory|(can't|unable to) allocate|calculation overflowed", re.I)
TOGETHER = ("pretrain", "finetune")  # commands that all ranks run together; only rank 0 prints


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; `arguments` default to those of the process.

    Exit status: 0 on success, 2 with one sentence for an error that the user can mend, 75 with one if it may be gone
    when the command is repeated, 1 if the reader of standard output is gone, 130 after Ctrl-C.
    """
    prepare(restart=arguments is None)
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0].startswith(("--local_rank=", "--local-rank=")):
        arguments = arguments[1:]  # added by the deepspeed launcher; LOCAL_RANK in the environment says the same
    if silent(*arguments[:1]):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        warnings.simplefilter("ignore")
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print_help()
        return
    if arguments[0] in ("-V", "--version"):
        import umd

        console.print(f"umd {umd.__version__}")
        return
    name, *rest = arguments
    rest = [re.sub(r"^--[^=]*", lambda option: option[0].replace("_", "-"), word) for word in rest]
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without file name and source line
    try:
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean `umd {near[0]}`?" if near else "`umd --help` lists the commands"
            raise UserError(f"unknown command {name!r}; {hint}")
        run(name, rest)
    except UserError as error:
        fail(str(error), name, exit_status(error))
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
        if error.errno in LOST:
            what = "the disk lost it: if it is a network disk, mount it again on this host; then repeat the command"
        fail(f"{where}{error.strerror or error}; {what}", name, exit_status(error))


def silent(command: str = "") -> bool:  # a rank other than 0 of a command of TOGETHER
    return int(os.environ.get("RANK", 0)) > 0 and command in TOGETHER


def fail(message: str, command: str, code: int = 2) -> None:
    """Print the message as an error and exit with status `code`. With several ranks, all end and one prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and command in TOGETHER:
        from umd.train.distributed import end_all

        message = end_all(message, code)
        if code == 2:  # The ranks have not met. The others will end with 75, and srun tells the highest status.
            code = 78
        if not message:
            sys.exit(code)
    line = Text.assemble(("umd:", "bold red"), " ", message)
    Console(stderr=True, highlight=False).print(line, soft_wrap=True)
    sys.exit(code)


def say(text: str) -> None:
    """Print a line without wrapping at the terminal's width, which would break paths."""
    console.print(text, soft_wrap=True)


def print_help() -> None:
    console.print("umd: unified masked diffusion. One masked autoencoder that recognises and generates.\n")
    table = Table(box=None, show_header=False, padding=(0, 2))
    for name, command in COMMANDS.items():
        table.add_row(Text(f"  {name}", "bold"), command.what)
    console.print(table)
    console.print("\numd COMMAND --help lists a command's options. First steps:\n")
    for line in (
        "umd demo                                         all of it in 15 minutes, on real images",
        "umd pretrain umd-tiny --data.source my/images --out runs/mine",
        "umd finetune runs/mine --out runs/mine-labels    class folders give the labels",
        "umd sample runs/mine-labels --cfg-scale 4",
    ):
        say(f"  {line}")


@contextlib.contextmanager
def joined_lines() -> Iterator[None]:
    """Let tyro show a field's docstring as one paragraph: it joins only lines that are not indented."""
    from tyro import _strings

    join = _strings.remove_single_line_breaks
    _strings.remove_single_line_breaks = lambda helptext: join(cleandoc(helptext))
    try:
        yield
    finally:
        _strings.remove_single_line_breaks = join


def parse(cls: type, name: str, arguments: list[str], default=None):
    """Parse options with tyro under the program name `umd NAME`.

    For an unknown option tyro itself suggests the nearest ones and exits with 2.

    Args:
        cls: the dataclass whose fields are the options.
        name: the command and its paths, as shown in help texts.
        arguments: the options as typed.
        default: an instance whose values are the defaults.

    Raises:
        UserError: a number is outside the range of its field, or a path is empty.
    """
    import tyro

    from umd.ranges import PATHS, OutOfRange, named

    kwargs = {} if default is None else {"default": default}
    with joined_lines(), PATHS, contextlib.ExitStack() as quiet:
        if silent(name.split()[0]):
            quiet.enter_context(contextlib.redirect_stderr(quiet.enter_context(open(os.devnull, "w"))))
        try:
            return tyro.cli(cls, prog=f"umd {name}", args=arguments, **kwargs)
        except OutOfRange as error:
            raise named(error, arguments) from None


def with_length(default: "RunConfig", arguments: list[str]) -> "RunConfig":
    """Drop what a preset says in another unit than the user: the run's length, the times of saving and drawing."""
    lengths = ("epochs", "steps", "minutes")
    options = {a.partition("=")[0].removeprefix("--") for a in arguments if a.startswith("--")}
    default = replace(default, save_every=None) if "save-minutes" in options else default
    default = replace(default, draw_every=None) if "draw-minutes" in options else default
    given = options & set(lengths)
    # 1 is a placeholder: the option's own value replaces it when tyro reads the options.
    epochs, steps, minutes = (int(name in given) for name in lengths)
    shown = wants_help(arguments)  # the help shows the preset's length, not the placeholder
    return replace(default, epochs=epochs, steps=steps, minutes=minutes) if given and not shown else default


def wants_help(arguments: list[str]) -> bool:
    return bool({"-h", "--help"} & set(arguments))


def take_paths(arguments: list[str], name: str, paths: str) -> tuple[list[Path], list[str]]:
    """Split arguments into the leading paths and the rest.

    paths: their names, separated by blanks, e.g. "RUN SOURCE". With --help, the names stand in for missing paths.

    Raises UserError for a missing path.
    """
    found: list[Path] = []
    for path in paths.split():
        if len(found) < len(arguments) and arguments[len(found)] and not arguments[len(found)].startswith("-"):
            found.append(Path(arguments[len(found)]))
        elif wants_help(arguments):
            return [*found, *map(Path, paths.split()[len(found) :])], ["--help"]
        else:
            example = {"RUN": "runs/umd-tiny", "SOURCE": "path/to/images", "FOLDER": "path/to/folder"}
            line = " ".join(["umd", name, *map(str, found), *(example[p] for p in paths.split()[len(found) :])])
            raise UserError(f"umd {name} needs {path}{' first' * (not found)}, e.g. `{line}`")
    return found, arguments[len(found) :]


def check_run(path: Path, name: str) -> None:
    if path.is_file():
        raise UserError(f"{path} is a file; umd {name} takes the folder: {path.parent}")


def preset_or_config(arguments: list[str], command: str, show: Callable[["RunConfig"], object]):
    """Read the first argument, a preset or a config.yaml or its folder: (its name, its RunConfig, the other arguments).

    Without a first argument, print the presets and exit with 2. With --help, print the options by `show` as well and
    exit with 0. Raises UserError for an unknown preset.
    """
    from umd.train.curves import curves
    from umd.train.presets import PRESETS
    from umd.train.run import read_config

    if not arguments or arguments[0] in ("-h", "--help"):
        if arguments:
            with contextlib.suppress(SystemExit):
                show(PRESETS["umd-b4"][1])
            say("\nThe defaults above are those of umd-b4. The presets:\n")
        else:
            say(f"usage: umd {command} PRESET|CONFIG.yaml [options]; `umd {command} --help` lists the options\n")
        table = Table(box=None, show_header=False, padding=(0, 2))
        for name, (what, _) in PRESETS.items():
            table.add_row(Text(f"  {name}", "bold"), what)
        console.print(table)
        made = ", ".join(curve.name for curve in curves())
        say(f"\nA run is compared with the loss curve of a run of its recipe, where there is one: {made}.")
        sys.exit(0 if arguments else 2)
    name, rest = arguments[0], arguments[1:]
    if name in PRESETS:
        return name, PRESETS[name][1], rest
    if name.endswith((".yaml", ".yml")) or Path(name).is_dir():
        return name, read_config(Path(name)), rest
    near = difflib.get_close_matches(name.lower(), PRESETS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(PRESETS)}, or a config.yaml"
    if os.sep in name:
        raise UserError(f"there is no run at {name}; for a new one give a preset: {', '.join(PRESETS)}")
    raise UserError(f"unknown preset {name!r}; {hint}")


def pretrain(arguments: list[str]) -> None:
    from umd.train.run import RunConfig

    def options(default: RunConfig, name: str = "PRESET", rest: Sequence[str] = ("--help",)) -> RunConfig:
        return parse(RunConfig, f"pretrain {name}", list(rest), with_length(default, list(rest)))

    name, default, rest = preset_or_config(arguments, "pretrain", options)
    config = options(default, name, rest)
    from umd.train.loop import train

    train(config, console, "pretrain")


def plan(arguments: list[str]) -> None:
    from umd.train.options import Planned
    from umd.train.run import RunConfig

    def options(default: RunConfig, name: str = "PRESET", rest: Sequence[str] = ("--help",)) -> Planned:
        return parse(Planned, f"plan {name}", list(rest), Planned(run=with_length(default, list(rest))))

    name, default, rest = preset_or_config(arguments, "plan", options)
    if default.is_classifier:
        raise UserError("umd plan counts pre-training runs; give the run that this classifier started from")
    planned = options(default, name, rest)
    from umd.train.plan import print_plan

    print_plan(planned.run, planned.cluster, name, console)


def finetune(arguments: list[str]) -> None:
    from umd.train.finetune import Finetune, default_finetune, finetune
    from umd.train.run import RunConfig, read_config

    (init,), rest = take_paths(arguments, "finetune", "RUN")
    check_run(init, "finetune")
    default = default_finetune(RunConfig() if wants_help(rest) and not init.exists() else read_config(init), init, rest)
    options: Finetune = parse(Finetune, f"finetune {init}", rest, replace(default, run=with_length(default.run, rest)))
    finetune(init, options, any(a.partition("=")[0] == "--data.source" for a in rest), console)


def export(arguments: list[str]) -> None:
    from umd.train.options import Export
    from umd.train.run import read_config

    options: Export = parse(Export, "export", arguments)
    config = read_config(options.run)
    from umd.train.export import export

    export(options, config, console)


def check_data(arguments: list[str]) -> None:
    from umd.train.options import CheckData

    (source,), rest = take_paths(arguments, "check-data", "SOURCE")
    options: CheckData = parse(CheckData, f"check-data {source}", rest)
    from umd.train.check import check_data

    listed = check_data(source, options, console)
    if json.loads(listed.read_bytes())["files"]:
        sys.exit(1)


def report(arguments: list[str]) -> None:
    if wants_help(arguments):
        say("usage: umd report RUN: write the report page of a demo again")
        return
    (run,), rest = take_paths(arguments, "report", "RUN")
    check_run(run, "report")
    if rest:
        raise UserError(f"umd report takes one folder, e.g. `umd report runs/demo`; got also {' '.join(rest)}")
    from umd.report.page import load_record, write_report

    say(f"written: {write_report(load_record(run), run / 'report.html')}")


def doctor(arguments: list[str]) -> None:
    if arguments:
        console.print("usage: umd doctor: what this machine will really use, and how to get what is missing")
        sys.exit(0 if arguments[0] in ("-h", "--help") else 2)
    from umd.machine.doctor import print_report
    from umd.train.loader_rate import loader_row
    from umd.train.step import capture_row

    print_report(console, [capture_row, loader_row])


BENCHES = {  # module in umd.bench: (class of its options, what it measures)
    "step": ("StepBench", "a training step against its baselines"),
    "loader": ("LoaderBench", "what data cost beside the step they feed"),
    "adaln": ("AdaLNBench", "weights, FLOPs and step time of adaLN's projections"),
    "audit": ("Audit", "what kernels, or a whole step, need on an A100 or H100, without a GPU"),
    "diffmae": ("DiffMAEBench", "DiffMAE: decoder steps against whole passes; training steps"),
    "kernels": ("KernelBench", "each op: eager, torch.compile, Triton; on a GPU"),
    "probe": ("ProbeBench", "a few-shot probe on a folder of ImageNet's shape: time, memory, reads"),
    "reads": ("ReadsBench", "ways to read stored latents from a disk: images/s, bytes, requests"),
    "scale": ("ScaleBench", "commands on a folder or tar of ImageNet's size: time and memory"),
    "trace": ("TraceBench", "where two traces of torch.profiler differ: umd bench trace A B"),
    "reproduce": ("Reproduce", "small trainings from scratch and the figures of docs/results"),
}


def bench(arguments: list[str]) -> None:
    if not arguments or arguments[0] not in BENCHES:
        for name, (_, what) in BENCHES.items():
            say(f"usage: umd bench {name} [options]: {what}")
        sys.exit(0 if arguments[:1] in (["-h"], ["--help"]) else 2)
    name, rest = arguments[0], arguments[1:]
    from umd.bench import options as classes

    options = parse(getattr(classes, BENCHES[name][0]), f"bench {name}", rest)
    check_results(options)
    import_module(f"umd.bench.{name}").run(options, console)


def check_results(options: object) -> None:
    """Raise UserError, before anything is measured, if a benchmark's result files could not be written."""
    from umd.files import check_place

    for option, inside in (("json", ""), ("chart", ""), ("figures", "results.json")):
        if (path := getattr(options, option, None)) is not None:
            check_place(path / inside, instead=f"give another --{option}")


class Command(NamedTuple):
    """A subcommand: its line in `umd --help`, and the function that runs it."""

    what: str
    run: Callable[[list[str]], None] | str  # f(arguments); or "module:f" of f(*paths, options[, RunConfig], console)
    options: str = ""  # class of umd.train.options
    paths: str = ""  # names of the leading paths; if the first is RUN, its RunConfig is read and passed on


COMMANDS = {
    "demo": Command(
        "pretrain, probe, fine-tune, sample and inpaint real images; writes a report page",
        "umd.train.demo:run_demo", "Demo",
    ),
    "pretrain": Command("train without labels: umd-b4, mae-b4, ... or a config.yaml", pretrain),
    "check-data": Command("read every image once; list the unusable ones, which runs then leave out", check_data),
    "plan": Command("memory, time and communication of a run on a cluster that need not be there", plan),
    "finetune": Command(
        "go on with labels: class-conditional generation, or --task classify or linear", finetune
    ),
    "encode-latents": Command(
        "encode pictures with a VAE, once for all epochs", "umd.train.encode:encode", "EncodeLatents"
    ),
    "encode-pixels": Command(
        "store pictures small, once for all epochs of runs at 64x64 and its like",
        "umd.train.pixels:encode_pixels", "EncodePixels",
    ),
    "inspect": Command(
        "what a folder of latents or stored pictures holds; checks it", "umd.train.encode:inspect", "Inspect", "FOLDER"
    ),
    "sample": Command("draw samples: PNG grid and .npz", "umd.train.sample:draw", "Sample", "RUN"),
    "inpaint": Command("fill a hole in pictures", "umd.train.inpaint:inpaint_run", "Inpaint", "RUN"),
    "probe": Command(
        "few-shot accuracy of the representation, beside its floors", "umd.train.probe:probe", "Probe", "RUN"
    ),
    "evaluate": Command(
        "FID and its kin of samples, and probes of the representation, in one table",
        "umd.train.evaluate:run_evaluation", "Evaluate", "RUN",
    ),
    "embed": Command(
        "the representation of pictures as .npz and Parquet", "umd.train.embed:embed", "Embed", "RUN SOURCE"
    ),
    "transfer": Command(
        "few-shot accuracy on other sets of pictures, a folder each", "umd.train.transfer:transfer", "Transfer",
        "RUN FOLDER",
    ),
    "report": Command("write the report page of a demo again", report),
    "import": Command(
        "published weights of DiT, MAE, MaskDiT, or the UMD authors' (small-vision)", "umd.train.imports:import_run",
        "Import",
    ),
    "export": Command(
        "a run for timm, transformers, diffusers, the Hugging Face hub, or small-vision", export
    ),
    "bench": Command("measure a training step or its data; audit kernels without a GPU", bench),
    "doctor": Command("what this machine will really use, and how to get what is missing", doctor),
}  # fmt: skip


def run(name: str, arguments: list[str]) -> None:
    """Run one command of `COMMANDS` with the arguments behind its name."""
    command = COMMANDS[name]
    if callable(command.run):
        command.run(arguments)
        return
    from umd.train import options as classes
    from umd.train.run import read_config

    paths, rest = take_paths(arguments, name, command.paths)
    if command.paths:
        check_run(paths[0], name)
    options = parse(getattr(classes, command.options), " ".join([name, *map(str, paths)]), rest)
    config = [read_config(paths[0])] if command.paths.startswith("RUN") else []
    module, _, function = command.run.partition(":")
    getattr(import_module(module), function)(*paths, options, *config, console)


if __name__ == "__main__":
    main()
