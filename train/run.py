"""What a run is: its configuration, the presets, and where its files lie."""

import dataclasses
import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from tyro.conf import AvoidSubcommands

from umd.config import (
    AnyModelConfig,
    AnyObjectiveConfig,
    ClassifierConfig,
    ClassifierObjectiveConfig,
    DiffMAEConfig,
    ModelConfig,
    ObjectiveConfig,
    ScheduleConfig,
    check_match,
    classifier_config,
)
from umd.errors import UserError
from umd.files import write_whole
from umd.ranges import Count, CountOrZero, NonNegative, OutOfRange, Seed, check_ranges, number
from umd.train.recipes import AREA_MIN
from umd.train.settings import DataConfig, OptimConfig, ParallelConfig

Model = TypeVar("Model", bound=AnyModelConfig)
Objective = TypeVar("Objective", bound=AnyObjectiveConfig)


@dataclass(frozen=True)
class RunConfig:
    """A training run."""

    out: Path = Path("runs/umd")
    """Folder of the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, images/. A run there is resumed."""
    model: AvoidSubcommands[AnyModelConfig] = field(default_factory=ModelConfig)
    objective: AvoidSubcommands[AnyObjectiveConfig] = field(default_factory=ObjectiveConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    init: Path | None = None
    """Start from the weights of this run or checkpoint (fine-tuning)."""
    batch_size: Count = 1024
    """Images a step, of all ranks together."""
    accumulate: Count = 1
    """Micro-batches a step on each rank; ranks times this divides the batch."""
    epochs: NonNegative = 800
    """Length of the run, where neither steps nor minutes are given."""
    minutes: NonNegative = 0
    """Length in minutes of training instead; the learning rate then follows the clock."""
    steps: CountOrZero = 0
    """Length in steps instead, before minutes and epochs."""
    seed: Seed = 0
    """Of weights, data order, crops, masks and noise."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast type; auto is bf16 where the hardware multiplies it. Beside bf16 a GPU makes the products left
    in fp32 (adaLN's) in TF32; with fp32 all are exact."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; of several processes each takes the GPU of its own number."""
    attention: Literal["auto", "triton", "flash_attn", "varlen_attn", "sdpa", "matmul"] = "auto"
    """Backend of self-attention; `umd doctor` tells which one auto is here."""
    gelu: Literal["ours", "transformer_engine"] = "ours"
    """What makes GELU: our kernels, or Transformer Engine in the MLP's products; `umd doctor` tells if it can here."""
    compile: bool = False
    """Run the network through torch.compile."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Record the whole step as a CUDA graph and replay it. auto: on one GPU; with DDP ask for it; ZeRO cannot."""
    checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more FLOPs."""
    recompute_gelu: bool = False
    """On a GPU, make GELU's output again in the backward pass instead of keeping it: less memory, a few more bytes to
    move, the same bits. `umd plan` has the figures of both; with checkpointing it changes nothing."""
    save_minutes: NonNegative = 15
    """Minutes of training between checkpoints; 0: none on the way. The last step is always saved."""
    save_every: Count | None = None
    """Steps between checkpoints, instead of minutes."""
    keep: Count = 3
    """Checkpoints kept."""
    log_every: Count = 10
    """Steps between log lines."""
    wandb: str = ""
    """Log to this project of Weights & Biases as well (pip install wandb)."""
    profile: bool = False
    """Record 3 steps after the first 12: where their time goes, to profile/ in the folder of the run."""
    draw_minutes: NonNegative = 60
    """Minutes of training between pictures of reconstructions (and samples, with labels), or for a classifier between
    its scores on the held-out pictures; the last step always has them, and a UMD's two heads weighed. 0: never."""
    draw_every: CountOrZero | None = None
    """Steps between pictures, instead of minutes; 0: never."""
    evaluate_minutes: NonNegative = 0
    """Minutes of training between Fréchet distances of samples to the held-out pictures, which the last step then has
    too; 0: never. A curve to watch: `umd evaluate` has the scores to publish."""
    evaluate_count: Annotated[int, number(int, 2)] = 2048
    """Samples of such a distance."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.evaluate_minutes and not isinstance(self.model, ModelConfig):
            raise UserError("evaluate_minutes is for networks that draw samples: a UMD; leave it at 0")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}; use a multiple"
            )
        if self.recompute_gelu and self.gelu != "ours":
            raise UserError(f"recompute_gelu goes with gelu ours; {self.gelu} keeps what GELU gives")
        if max(self.epochs, self.steps, self.minutes) == 0:
            raise UserError("the length of a run (epochs, steps or minutes) must be above 0")
        check_match(self.model, self.objective)
        if self.optim.layer_decay != 1 and not isinstance(self.model, ClassifierConfig):
            raise UserError("layer_decay is for classifiers; leave it at 1")
        frames = getattr(self.model, "num_frames", 1)
        data = replace(self.data, image_size=self.model.image_size, channels=self.model.channels, num_frames=frames)
        object.__setattr__(self, "data", data)  # the model says what it sees

    @property
    def ema(self) -> float:
        """`optim.ema`, with the released code's rule where that leaves it open."""
        if self.optim.ema is not None:
            return self.optim.ema
        return 1e-4 if isinstance(self.model, ModelConfig) and self.model.num_classes > 0 else 0.0

    def resolved(self) -> "RunConfig":
        """The same run with what is left open decided: whether it has an EMA."""
        return replace(self, optim=replace(self.optim, ema=self.ema))

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: `optim.lr` is for a batch of 256."""
        return self.optim.lr * self.batch_size / 256

    @property
    def draws(self) -> bool:
        """Whether the run shows pictures, or a classifier's scores."""
        return self.draw_minutes > 0 if self.draw_every is None else self.draw_every > 0

    @property
    def is_diffmae(self) -> bool:
        return isinstance(self.model, DiffMAEConfig)

    @property
    def is_classifier(self) -> bool:
        return isinstance(self.model, ClassifierConfig)

    def parts(self, model: type[Model], objective: type[Objective]) -> tuple[Model, Objective]:
        """Network and objective of a run that is known to be of these kinds."""
        assert isinstance(self.model, model) and isinstance(self.objective, objective)
        return self.model, self.objective

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"


def absolute(config: RunConfig) -> RunConfig:
    """The run with the places it reads named from the root, so that it is the same run from any folder. Names that are
    no paths here (`emoji`, a source of another machine) stay."""

    def whole(path: str) -> str:
        there = path not in ("", "emoji") and Path(path).expanduser().exists()
        return os.path.abspath(Path(path).expanduser()) if there else path

    data = replace(config.data, source=whole(config.data.source), quarantine=whole(config.data.quarantine))
    return replace(config, data=data, init=None if config.init is None else Path(whole(str(config.init))))


def with_classes(config: RunConfig, num_classes: int) -> RunConfig:
    """The run with this many classes. Raises UserError for a DiffMAE."""
    if isinstance(config.model, DiffMAEConfig):
        raise UserError("a DiffMAE takes no labels to generate by; pretrain a UMD for that, or give --task classify")
    return replace(config, model=replace(config.model, num_classes=num_classes))


def at_size(config: RunConfig, image_size: tuple[int, int] | None) -> RunConfig:
    """The run on pictures of another size, None: its own; `load_model` interpolates its positions."""
    if image_size is None or tuple(image_size) == config.model.image_size:
        return config
    if not isinstance(config.model, ModelConfig):
        raise UserError("another --image-size is for a UMD; leave it out, to read pictures at the run's size")
    return replace(config, model=replace(config.model, image_size=image_size))


def finetune_config(pretrained: RunConfig, init: Path, num_classes: int, out: Path) -> RunConfig:
    """The paper's recipe for class-conditional generation (its Table 5) on a pre-trained run.

    Its learning rate for a batch of 256 is that of pre-training, 1.5e-4 in the paper's presets.
    """
    outputs = getattr(pretrained.model, "outputs", "x_start_eps")
    if outputs == "x_start":
        raise UserError(
            f"{init} is an MAE as published: it knows no noise level, and cannot learn to generate; "
            "--task classify trains a classifier on it"
        )
    noised = outputs != "x_start_eps"  # DiT's and MaskDiT's networks, which predict nothing of noise-free pictures
    return replace(
        with_classes(pretrained, num_classes),
        out=out,
        init=init,
        objective=ObjectiveConfig(no_noise_prob=0.0 if noised else 0.05, mask_ratio=0.0, mask_ratio_no_noise=0.75),
        optim=OptimConfig(lr=pretrained.optim.lr, betas=(0.9, 0.999), weight_decay=0.0, ema=1e-4),
        data=replace(pretrained.data, area_min=AREA_MIN["finetune"]),
        batch_size=min(256, pretrained.batch_size),
        epochs=50,
        steps=0,
        minutes=0,
        profile=False,
    )


def classify_config(pretrained: RunConfig, init: Path, out: Path, linear: bool, from_scratch: bool) -> RunConfig:
    """MAE's recipes for a classifier on a pre-trained run: of all weights (its Table 9), or of the last layer alone
    (Table 10, with AdamW in the place of LARS, which is for batches of thousands).

    A run whose own rate is k times the paper's (small networks, short runs) has √k times MAE's for all weights.
    from_scratch: all weights, and none from the run.
    """
    large = pretrained.model.depth > 12
    layer_decay = 1.0 if linear or from_scratch else 0.75 if large else 0.65
    lr = (1e-3 if large else 5e-4) * math.sqrt(pretrained.optim.lr / OptimConfig().lr)
    optim = OptimConfig(lr=1e-3 if linear else lr, betas=(0.9, 0.999), clip=0, layer_decay=layer_decay)
    objective = ClassifierObjectiveConfig(drop_path=0.2 if large else 0.1)
    if linear:
        optim = replace(optim, weight_decay=0.0, warmup=0.1)
        objective = ClassifierObjectiveConfig(smoothing=0, mixup=0, cutmix=0, erase=0, drop_path=0)
    return replace(
        pretrained,
        out=out,
        init=None if from_scratch else init,
        model=classifier_config(pretrained.model, linear=linear),
        objective=objective,
        optim=optim,
        data=replace(pretrained.data, area_min=0.08),
        batch_size=min(1024, pretrained.batch_size),
        epochs=90 if linear else 50 if large else 100,
        steps=0,
        minutes=0,
        evaluate_minutes=0,  # a classifier draws no samples
        profile=False,
    )


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and paths as what YAML and JSON hold."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_plain(cls: type, values: Mapping[str, Any], where: str, within: str = "") -> Any:
    """The dataclass that `to_plain` was given.

    where: the file. within: the name of these settings in it, `optim.`.
    Raises UserError naming file and setting: one that is not known, of another type, or outside its range.
    """
    hints = get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {within}{near[0]}?" if near else f"{cls.__name__} has {', '.join(sorted(known))}"
            raise UserError(f"{where}: unknown setting {within}{name}; {hint}")

    def convert(name: str, hint: Any, value: Any) -> Any:
        args = get_args(hint)
        configs = [
            choice for choice in args or (hint,) if isinstance(choice, type) and dataclasses.is_dataclass(choice)
        ]
        if configs and isinstance(value, Mapping):
            same = [choice for choice in configs if getattr(choice, "kind", None) == value.get("kind")]
            return from_plain((same or configs)[0], value, where, f"{within}{name}.")
        if get_origin(hint) is tuple and isinstance(value, list | tuple) and len(value) == len(args):
            return tuple(convert(name, arg, item) for arg, item in zip(args, value, strict=True))
        if get_origin(hint) is Literal and value in args:
            return value
        if value is None and type(None) in args:
            return None
        if (hint is float or float in args) and not isinstance(value, bool):
            return float(value)  # YAML takes 1e-4 for text
        if isinstance(value, str) and (hint is Path or Path in args):
            return Path(value)
        if type(value) is hint or (type(None) in args and type(value) in args):
            return value
        raise TypeError

    def checked(name: str, value: Any) -> Any:
        try:
            return convert(name, hints[name], value)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: {within}{name} is {value!r}; expected {in_words(hints[name])}") from error

    settings = {name: checked(name, value) for name, value in values.items()}
    try:
        return cls(**settings)
    except OutOfRange as error:
        raise UserError(f"{where}: {error.of(within + error.name)}") from error
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def in_words(hint: Any) -> str:
    """What a setting of this type is: `a number`, `2 whole numbers`, `one of auto, bf16`."""
    args = get_args(hint) or (hint,)
    if get_origin(hint) is tuple:
        return f"{len(args)} of these: {in_words(args[0])}"
    if get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, args))}"
    if any(map(dataclasses.is_dataclass, args)):
        return "settings of its own"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}
    return " or ".join(words.get(arg, "null" if arg is type(None) else str(arg)) for arg in args)


def differences(before: Mapping, now: Mapping, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(name, before, now) of each setting that differs, e.g. ("optim.lr", 0.1, 0.2); None where there is none."""
    found = []
    for key in dict.fromkeys([*now, *before]):
        a, b = before.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found


def write_config(config: RunConfig) -> None:
    """Write `config.yaml` into the run folder, whole or not at all."""
    config.out.mkdir(parents=True, exist_ok=True)
    write_whole(config.out / "config.yaml", yaml.safe_dump(to_plain(config), sort_keys=False).encode())


def read_config(path: Path) -> RunConfig:
    """The configuration of a run folder or of a config.yaml. Raises UserError if there is none or it is damaged.

    A folder that was moved or copied since is the run's folder now.
    """
    file = path / "config.yaml" if path.is_dir() else path
    try:
        values = yaml.safe_load(file.read_bytes())  # bytes: YAML itself tells UTF-8 from UTF-16
    except OSError as error:
        raise UserError(
            f"no run configuration at {file}; expected a run folder with config.yaml, or a YAML file"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date with a 13th month
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" in line {mark.line + 1}"
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{file} is not valid YAML{line}: {problem}; mend it, or copy that of another run") from error
    if not isinstance(values, dict):
        found = "it is empty" if values is None else f"a {type(values).__name__}"
        raise UserError(
            f"{file} holds no settings ({found}); expected the config.yaml of a run, lines of `name: value`"
        )
    config = from_plain(RunConfig, values, str(file))
    return replace(config, out=path) if path.is_dir() else config
