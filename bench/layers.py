"""`umd bench reproduce layers`: which blocks tell classes apart, at which noise, of a DiT and a UMD."""

import json
from dataclasses import replace

from rich.console import Console

from umd.bench.reproduce import Reproduce
from umd.config import OBJECTIVES, model_config
from umd.figures import layer_curves
from umd.train.layers import Layers
from umd.train.loop import train
from umd.train.probe import Probe
from umd.train.run import PRESETS, RunConfig
from umd.train.shards import share

STEPS = 2000
SHOTS = 100
TIMES = (0, 1, 10, 25, 50, 100, 200, 400, 700)
L2 = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0, 4096.0, 16384.0)


def layers_config(name: str, options: Reproduce) -> RunConfig:
    """UMD-Ti/4 on 32x32 emoji with the objective of one method."""
    config = PRESETS["umd-tiny"][1]
    return replace(
        config,
        out=options.out / f"layers-{name}",
        model=replace(model_config("UMD-Ti/4", image_size=config.model.image_size), num_cls=4),
        objective=OBJECTIVES[name],
        minutes=0,
        steps=options.steps or STEPS,
        save_every=200,
        keep=1,
        draw_every=0,
        seed=options.seed,
        device=options.device,
    )


def reproduce(options: Reproduce, console: Console) -> None:
    options.figures.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, title in (("dit", "DiT"), ("umd", "UMD")):
        config = layers_config(name, options)
        train(config, console, name)
        layers = Layers(config, Probe(SHOTS, pool=0, allow_fewer=True, l2=L2, times=TIMES))
        share(layers.jobs(), console, f"{title}: pictures read")
        found[title] = layers.accuracies()
        for time, row in found[title].items():
            accuracy, best = max((result["mean"], layer) for layer, result in row.items())
            console.print(f"{title} t = {time}: best {best} {accuracy:.3f}", highlight=False)
    steps = options.steps or STEPS
    record = {
        "steps": steps,
        "shots": SHOTS,
        "accuracy": {t: {str(k): v for k, v in r.items()} for t, r in found.items()},
    }
    (options.figures / "layers.json").write_text(json.dumps(record, indent=1) + "\n")
    layer_curves(found, options.figures / "layers.png", SHOTS)
    console.print(f"written: {options.figures / 'layers.json'} and .png", highlight=False)
