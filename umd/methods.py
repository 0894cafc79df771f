"""Builds the network and the objective of a configuration. No other module knows all methods."""

from typing import TypeAlias

from umd.augment import Augmentation, ClassifierObjective
from umd.classifier import Classifier
from umd.config import (
    AnyModelConfig,
    AnyObjectiveConfig,
    ClassifierConfig,
    ClassifierObjectiveConfig,
    DiffMAEConfig,
    DiffMAEObjectiveConfig,
    ModelConfig,
    check_match,
)
from umd.diffmae import DiffMAE
from umd.model import UMD
from umd.objective import Corruption, DiffMAECorruption, DiffMAEObjective, Objective
from umd.peers import PeerObjective
from umd.schedule import NoiseSchedule

AnyModel: TypeAlias = UMD | DiffMAE | Classifier
AnyObjective: TypeAlias = Objective | DiffMAEObjective | ClassifierObjective
AnyCorruption: TypeAlias = Corruption | DiffMAECorruption | Augmentation


def build_model(config: AnyModelConfig) -> AnyModel:
    """The network of a configuration, with fresh weights."""
    if isinstance(config, ClassifierConfig):
        return Classifier(config)
    return DiffMAE(config) if isinstance(config, DiffMAEConfig) else UMD(config)


def build_objective(
    model: AnyModelConfig, config: AnyObjectiveConfig, schedule: NoiseSchedule, num_images: int | None = None
) -> AnyObjective:
    """The objective of a configuration.

    num_images: images in the dataset, to check a file of features against.

    Raises UserError if network and objective belong to different methods, or their settings do not fit each other.
    """
    check_match(model, config)
    if isinstance(config, ClassifierObjectiveConfig):
        assert isinstance(model, ClassifierConfig), "check_match asks for it"
        return ClassifierObjective(model, config)
    if isinstance(config, DiffMAEObjectiveConfig):
        assert isinstance(model, DiffMAEConfig), "check_match asks for it"
        return DiffMAEObjective(model, config, schedule, num_images)
    assert isinstance(model, ModelConfig), "check_match asks for it"
    if model.outputs != "x_start_eps":
        return PeerObjective(model, config, schedule)
    return Objective(model, config, schedule)
