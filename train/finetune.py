"""`umd finetune`: its options, and the recipe of each task."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

from rich.console import Console
from tyro.conf import arg

from umd.errors import UserError
from umd.train.console import say
from umd.train.run import RunConfig, classify_config, finetune_config, with_classes

Task = Literal["generate", "classify", "linear"]


@dataclass(frozen=True)
class Finetune:
    """Fine-tune a pre-trained run on labelled pictures."""

    task: Task = "generate"
    """generate: train a class-conditional generator. classify: train all weights as a classifier, by MAE's recipe.
    linear: train a linear layer on frozen features (linear probe). The task sets the defaults of all other options."""
    from_scratch: bool = False
    """For --task classify: start from new weights, as a baseline with the same network and budget."""
    run: Annotated[RunConfig, arg(name="")] = field(default_factory=RunConfig)


def default_finetune(pretrained: RunConfig, init: Path, arguments: list[str]) -> Finetune:
    """Build the recipe of the task named by `--task` in the arguments, as defaults for the other options.

    Raises UserError for a run that the task cannot start from.
    """
    task, from_scratch = task_of(arguments), "--from-scratch" in arguments
    if pretrained.is_classifier:
        raise UserError(f"{init} is a classifier already; fine-tune the run that it started from")
    if task == "generate":
        if from_scratch:
            raise UserError("--from-scratch is for --task classify; for generation pretrain with --model.num-classes")
        return Finetune(run=finetune_config(pretrained, init, 0, init.with_name(f"{init.name}-labels")))
    if task == "linear" and from_scratch:
        raise UserError("--from-scratch is for --task classify; a linear probe is of a trained encoder")
    out = init.with_name(f"{init.name}-{'scratch' if from_scratch else task}")
    return Finetune(task, from_scratch, classify_config(pretrained, init, out, task == "linear", from_scratch))


def task_of(arguments: list[str]) -> Task:
    for i, argument in enumerate(arguments):
        name, has_value, value = argument.partition("=")
        if name == "--task":
            value = value if has_value else (arguments[i + 1 : i + 2] or [""])[0]
            if value not in get_args(Task):
                raise UserError(f"unknown task {value!r}; it is one of {', '.join(get_args(Task))}")
            return cast(Task, value)
    return "generate"


def finetune(init: Path, options: Finetune, named: bool, console: Console) -> None:
    """Fine-tune the run `init` as the options say.

    named: --data.source was on the command line, so pictures other than the run's are intended.
    Raises UserError for pictures without labels, and, unless named, for pictures the run was not trained on.
    """
    from umd.train.classify import check_classes  # here: help and a mistyped option do not wait for torch
    from umd.train.data import open_dataset
    from umd.train.fingerprint import check_trained_on
    from umd.train.loop import train

    config = options.run
    dataset = open_dataset(config.data, "train")

    mend = f"give --data.source {config.data.source} to fine-tune on these"
    check_trained_on(init, config, mend, partial(say, console), named, dataset)
    if options.task != "generate":
        train(with_classes(config, check_classes(dataset)), console, options.task)
        return
    if not dataset.class_names:
        raise UserError(
            f"{dataset.name} has no labels to fine-tune with; use one subfolder a class, or labels in the .npz"
        )
    train(with_classes(config, len(dataset.class_names)), console, "finetune")
