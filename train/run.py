"""The configuration of a run (`RunConfig`), its fine-tuning recipes, and config.yaml."""

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
    Capture,
    ClassifierConfig,
    ClassifierObjectiveConfig,
    DiffMAEConfig,
    DiffMAEObjectiveConfig,
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
    """Train a network without labels; `umd finetune` goes on with labels."""

    out: Path = Path("runs/umd")
    """Folder of the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, images/. A run in it is resumed."""
    model: AvoidSubcommands[AnyModelConfig] = field(default_factory=ModelConfig)
    objective: AvoidSubcommands[AnyObjectiveConfig] = field(default_factory=ObjectiveConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    init: Path | None = None
    """Run or checkpoint whose weights this run starts from (fine-tuning). Default: new weights."""
    batch_size: Annotated[int, number(int, 1, 100_000)] = 1024
    """Images per step, over all ranks."""
    accumulate: Count = 1
    """Micro-batches per step on each rank. ranks * accumulate must divide the batch size."""
    epochs: NonNegative = 800
    """Length of the run in epochs. Ignored if steps or minutes are given."""
    minutes: NonNegative = 0
    """Length of the run in minutes of training; the learning rate then follows the clock. 0: use epochs."""
    steps: CountOrZero = 0
    """Length of the run in steps. Takes precedence over minutes and epochs. 0: use those."""
    seed: Seed = 0
    """Seed of weights, data order, crops, masks and noise."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast dtype. auto: bf16 where the device multiplies it, else fp32.
    With bf16, a GPU computes the products left in fp32 (adaLN's) in TF32. With fp32, TF32 is off.
    Convolutions, those of a VAE, keep PyTorch's default: TF32."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. With several processes, each takes the GPU of its local rank."""
    attention: Literal["auto", "triton", "flash_attn", "varlen_attn", "sdpa", "matmul"] = "auto"
    """Backend of self-attention. `umd doctor` shows which one auto takes on this machine."""
    gelu: Literal["ours", "transformer_engine"] = "ours"
    """GELU: our kernels, or Transformer Engine fused into the MLP's products. `umd doctor` shows if it works here."""
    compile: bool = False
    """Run the network through torch.compile."""
    capture: Capture = "auto"
    """Record the whole step as a CUDA graph and replay it. auto: on one GPU. on: also with DDP. Not with ZeRO."""
    checkpointing: bool = False
    """Recompute activations in the backward pass. Saves memory, costs a third more FLOPs."""
    recompute_gelu: bool = False
    """On a GPU, recompute GELU's output in the backward pass: less memory, slightly more memory traffic, same bits.
    `umd plan` shows both amounts. No effect with --checkpointing."""
    save_minutes: NonNegative = 15
    """Minutes of training between checkpoints. 0: only the last step. The last step is always saved."""
    save_every: Count | None = None
    """Steps between checkpoints, instead of --save-minutes."""
    keep: Count = 3
    """Number of checkpoints to keep; older ones are deleted."""
    keep_hours: NonNegative = 0
    """Every so many hours of training, one checkpoint is kept for good, beside the newest. 0: none."""
    log_every: Count = 10
    """Steps between log lines."""
    wandb: str = ""
    """Weights & Biases project to log to as well (pip install wandb)."""
    profile: bool = False
    """Profile 3 steps after the first 12 and write where their time goes to profile/ in the run's folder."""
    draw_minutes: NonNegative = 60
    """Minutes of training between pictures: reconstructions, with labels also samples. 0: never.
    A classifier scores held-out pictures instead. Unless 0, the last step does so too, and weighs a UMD's two heads."""
    draw_every: CountOrZero | None = None
    """Steps between pictures, instead of --draw-minutes. 0: never."""
    evaluate_minutes: NonNegative = 0
    """Minutes of training between Fréchet distances of samples to held-out pictures; also at the last step. 0: never.
    The curve is for watching a run; `umd evaluate` gives the scores to publish."""
    evaluate_count: Annotated[int, number(int, 2)] = 2048
    """Samples per Fréchet distance of --evaluate-minutes."""

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
        object.__setattr__(self, "data", data)  # image size, channels and frames follow the model

    @property
    def ema(self) -> float:
        """EMA rate at batch 256: `optim.ema`, or the released code's default if that is None."""
        if self.optim.ema is not None:
            return self.optim.ema
        return 1e-4 if isinstance(self.model, ModelConfig) and self.model.num_classes > 0 else 0.0

    def resolved(self) -> "RunConfig":
        """This run with `optim.ema` set to the rate in force instead of None."""
        return replace(self, optim=replace(self.optim, ema=self.ema))

    @property
    def by_clock(self) -> bool:
        """Whether the run's length is given in minutes."""
        return self.minutes > 0 and self.steps == 0

    def total_steps(self, images: int) -> int:
        """Steps of the run on a training split of `images`, unless it goes by the clock."""
        return self.steps or math.ceil(self.epochs * images / self.batch_size)

    @property
    def length(self) -> str:
        """The length in the unit that the run obeys: "800 epochs"."""
        if self.steps:
            return f"{self.steps} steps"
        return f"{self.minutes:g} minutes" if self.minutes else f"{self.epochs:g} epochs"

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up: `optim.lr`, which is for a batch of 256, scaled to the batch size."""
        return self.optim.lr * self.batch_size / 256

    @property
    def draws(self) -> bool:
        """Whether the run draws pictures (a classifier: held-out scores) as it trains."""
        return self.draw_minutes > 0 if self.draw_every is None else self.draw_every > 0

    @property
    def is_diffmae(self) -> bool:
        return isinstance(self.model, DiffMAEConfig)

    @property
    def is_classifier(self) -> bool:
        return isinstance(self.model, ClassifierConfig)

    def parts(self, model: type[Model], objective: type[Objective]) -> tuple[Model, Objective]:
        """Network and objective, typed. The caller knows that they are of these classes; it is asserted."""
        assert isinstance(self.model, model) and isinstance(self.objective, objective)
        return self.model, self.objective

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"


def absolute(config: RunConfig) -> RunConfig:
    """The run with absolute paths for its source, quarantine list and init, so that it is the same run from any folder.

    A name that is not an existing path (`emoji`, a path on another machine) stays as it is.
    """

    def whole(path: str) -> str:
        there = path not in ("", "emoji") and Path(path).expanduser().exists()
        return os.path.abspath(Path(path).expanduser()) if there else path

    source, quarantine, vae = (whole(path) for path in (config.data.source, config.data.quarantine, config.data.vae))
    data = replace(config.data, source=source, quarantine=quarantine, vae=vae)
    if isinstance(config.objective, DiffMAEObjectiveConfig) and config.objective.target.endswith(".npy"):
        config = replace(config, objective=replace(config.objective, target=whole(config.objective.target)))
    return replace(config, data=data, init=None if config.init is None else Path(whole(str(config.init))))


def with_classes(config: RunConfig, num_classes: int) -> RunConfig:
    """The run with this number of classes. Raises UserError for a DiffMAE, which takes no labels."""
    if isinstance(config.model, DiffMAEConfig):
        raise UserError("a DiffMAE takes no labels to generate by; pretrain a UMD for that, or give --task classify")
    return replace(config, model=replace(config.model, num_classes=num_classes))


def at_size(config: RunConfig, image_size: tuple[int, int] | None) -> RunConfig:
    """The run with another image size (height, width). None: unchanged. `load_model` interpolates the positions.

    Raises UserError if the network is not a UMD and the size differs.
    """
    if image_size is None or tuple(image_size) == config.model.image_size:
        return config
    if not isinstance(config.model, ModelConfig):
        raise UserError("another --image-size is for a UMD; leave it out, to read pictures at the run's size")
    return replace(config, model=replace(config.model, image_size=image_size))


def finetune_config(pretrained: RunConfig, init: Path, num_classes: int, out: Path) -> RunConfig:
    """The paper's recipe for class-conditional generation (Table 5), starting from a pre-trained run.

    The learning rate for a batch of 256 stays that of pre-training (1.5e-4 in the paper's presets).
    Raises UserError for an MAE as published, and for a DiffMAE: neither can generate from labels.
    """
    outputs = getattr(pretrained.model, "outputs", "x_start_eps")
    if outputs == "x_start":
        raise UserError(
            f"{init} is an MAE as published: it knows no noise level, and cannot learn to generate; "
            "--task classify trains a classifier on it"
        )
    noised = outputs != "x_start_eps"  # DiT and MaskDiT networks predict nothing for noise-free pictures
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
    """MAE's recipe for a classifier that starts from a pre-trained run.

    - linear False: train all weights (MAE's Table 9). If the run's learning rate is k times the paper's (small
      networks, short runs), the rate is √k times MAE's.
    - linear True: train the last layer only (MAE's Table 10, with AdamW instead of LARS, which is for batches of
      thousands).
    - from_scratch: train all weights from new ones, as a baseline with the same network and recipe.
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
    """Convert dataclasses to dicts, tuples to lists and paths to strings, for YAML and JSON."""
    if dataclasses.is_dataclass(value):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_plain(cls: type, values: Mapping[str, Any], where: str, within: str = "") -> Any:
    """Rebuild a dataclass `cls` from what `to_plain` made of it.

    Args:
        where: name of the file, for error messages.
        within: prefix of these settings in the file, e.g. `optim.`, for error messages.

    Raises:
        UserError: a setting is unknown, of the wrong type, or outside its range. The message names file and setting.
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
    """Describe a type for an error message: `a number`, `2 of these: a whole number`, `one of auto, bf16`."""
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
    """List each setting that differs as (name, before, now), e.g. ("optim.lr", 0.1, 0.2). A missing one is None."""
    found = []
    for key in dict.fromkeys([*now, *before]):
        a, b = before.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found


def write_config(config: RunConfig) -> None:
    """Write `config.yaml` into the run folder, atomically."""
    config.out.mkdir(parents=True, exist_ok=True)
    write_whole(config.out / "config.yaml", yaml.safe_dump(to_plain(config), sort_keys=False).encode())


def read_config(path: Path) -> RunConfig:
    """Read the configuration from a run folder or a config.yaml. Raises UserError if it is missing or damaged.

    For a folder, `out` is set to that folder, as it may have been moved or copied.
    """
    file = path / "config.yaml" if path.is_dir() else path
    try:
        values = yaml.safe_load(file.read_bytes())  # bytes: YAML itself tells UTF-8 from UTF-16
    except OSError as error:
        if file.exists():
            raise UserError(f"cannot read {file} ({error.strerror or error}); check its permissions") from error
        raise UserError(f"no run configuration at {file}; expected the folder of a run, with config.yaml") from error
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
