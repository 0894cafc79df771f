"""`umd probe RUN --layers`: few-shot accuracy of every block at several timesteps."""

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from umd.errors import UserError
from umd.files import check_place, write_whole
from umd.machine.device import autocast
from umd.model import UMD
from umd.probe import fewshot_accuracy
from umd.representation import layer_features, layer_names
from umd.schedule import schedule_of
from umd.train.features import Extract, Features, pictures_of
from umd.train.options import Probe
from umd.train.probe import Recognition, noised, own_pictures, published_zoom, tell_notes
from umd.train.run import RunConfig
from umd.train.shards import Job, others_work, share

REPRESENTATION = "representation"


class Layers:
    """Few-shot accuracy of every block's averaged patch tokens, and of the representation, at several timesteps."""

    def __init__(self, config: RunConfig, options: Probe):
        self.probe = Recognition(config, options)
        if not isinstance(self.probe.model, UMD):
            raise UserError("--layers reads the blocks of a UMD; leave it out")
        T = config.schedule.num_steps
        if bad := [time for time in options.times if not 0 <= time <= T]:
            raise UserError(f"time {bad[0]} is outside the noise schedule; expected 0 to {T}")
        self.config, self.times = config, sorted(set(options.times))
        self.names = [*layer_names(self.probe.model.config), REPRESENTATION]

    def features(self, which: Features, time: int) -> Features:
        recipe = {name: value for name, value in which.recipe.items() if name != "floors"}
        return Features(which.root, recipe | {"layer": "each block", "time": time}, which.ids)

    def extract(self, time: int) -> Extract:
        model, device, dtype = self.probe.model, self.probe.device, self.probe.dtype
        schedule = schedule_of(self.config.schedule)
        assert isinstance(model, UMD)

        @torch.no_grad()
        def extract(x: Tensor, ids: Tensor) -> dict[str, Tensor]:
            seen, timesteps = noised(x.to(device), ids, schedule, time)
            with autocast(device, dtype):
                found = [*layer_features(model, seen, timesteps), model.represent(seen, timesteps)]
            return dict(zip(self.names, found, strict=True))

        return extract

    def jobs(self) -> list[Job]:
        zoom, probe = published_zoom(self.config), self.probe
        return [
            job
            for time in self.times
            for which, dataset in ((probe.shots, probe.train), (probe.held_out, probe.test))
            for job in self.features(which, time).jobs(pictures_of(dataset, self.config.data, zoom), self.extract(time))
        ]

    def accuracies(self) -> dict[int, dict[str, dict[str, float]]]:
        """{time: {layer: {mean, std}}} of the accuracy averaged over classes."""
        probe, options = self.probe, self.probe.options
        found: dict[int, dict[str, dict[str, float]]] = {}
        for time in self.times:
            train, test = (self.features(which, time) for which in (probe.shots, probe.held_out))
            for name in self.names:
                result = fewshot_accuracy(
                    train.read(name).to(probe.device), probe.labels(probe.shots), test.read(name).to(probe.device),
                    probe.labels(probe.held_out), options.shots, len(probe.classes), options.seeds, options.l2,
                    draws=probe.draws,
                )  # fmt: skip
                found.setdefault(time, {})[name] = {"mean": result.mean, "std": result.std}
        return found


def probe_layers(run: Path, options: Probe, config: RunConfig, console: Console) -> None:
    """Print the table and write RUN/layers.json and RUN/layers.png. Ranks other than 0 only share the work."""
    record_file, curves = ((options.out or run) / f"layers.{kind}" for kind in ("json", "png"))
    check_place(record_file, curves)
    layers = Layers(own_pictures(run, config, options.source, console), options)
    tell_notes(console, layers.probe.train, layers.probe.test)
    if not share(layers.jobs(), console, "pictures read"):
        console.print(others_work(), highlight=False)
        return
    found = layers.accuracies()
    table = Table(title=f"{run}: {options.shots}-shot accuracy by block and model time")
    table.add_column("features")
    for time in layers.times:
        table.add_column(f"t = {time}")
    for name in layers.names:
        table.add_row(name, *(f"{found[time][name]['mean']:.3f}" for time in layers.times))
    console.print(table)
    record: dict[str, Any] = {"settings": layers.probe.held_out.settings, "shots": options.shots}
    record |= {"accuracy": {str(time): row for time, row in found.items()}}
    from umd.report.figures import layer_curves  # late: importing matplotlib takes a second

    write_whole(record_file, json.dumps(record, indent=1).encode())
    layer_curves({str(run): found}, curves, options.shots)
    console.print(f"written: {record_file} and {curves}", highlight=False, soft_wrap=True)
