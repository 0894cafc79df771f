"""`umd bench reproduce layers`: few-shot accuracy of every block of a UMD, at several noise levels."""

from dataclasses import replace

from rich.console import Console

from umd.bench.options import Reproduce
from umd.bench.paper_plan import FASHION
from umd.config import OBJECTIVES, model_config
from umd.errors import UserError
from umd.files import write_json
from umd.report.figures import layer_curves
from umd.train.layers import Layers
from umd.train.loop import train
from umd.train.options import Probe
from umd.train.presets import PRESETS
from umd.train.run import RunConfig
from umd.train.settings import DataConfig, OptimConfig
from umd.train.shards import share

STEPS = 2000
SHOTS = 100
TIMES = (0, 10, 50, 100, 200, 400, 700)
L2 = (1.0, 16.0, 256.0, 4096.0)
# Deep for its width: with few blocks, the middle ones would be the first or the last.
NETWORK = dict(image_size=(28, 28), channels=1, hidden_size=96, depth=6, decoder_depth=6, num_heads=3, num_cls=4)


def layers_config(options: Reproduce) -> RunConfig:
    """A UMD of 6 + 6 blocks, 96 wide, on Fashion-MNIST in patches of 4x4."""
    if not FASHION.exists():
        raise UserError(f"there is no {FASHION}: apt-get install dataset-fashion-mnist (Debian, Ubuntu)")
    return replace(
        PRESETS["umd-tiny"][1],
        out=options.out / "layers-umd",
        model=model_config("UMD-Ti/4", **NETWORK),
        objective=OBJECTIVES["umd"],
        data=DataConfig(str(FASHION), num_workers=0),
        optim=OptimConfig(lr=2e-3),
        batch_size=128,
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
    config = layers_config(options)
    train(config, console, "umd")
    layers = Layers(config, Probe(SHOTS, pool=0, l2=L2, times=TIMES))
    share(layers.jobs(), console, "pictures read")
    found = layers.accuracies()
    for time, row in found.items():
        most, best = max((result["mean"], layer) for layer, result in row.items())
        console.print(f"t = {time}: best {best} {most:.3f}", highlight=False)
    accuracy = {"UMD": {str(time): row for time, row in found.items()}}
    record = {"steps": config.steps, "shots": SHOTS, "accuracy": accuracy}
    write_json(options.figures / "layers.json", record)
    layer_curves({"UMD": found}, options.figures / "layers.png", SHOTS)
    console.print(f"written: {options.figures / 'layers.json'} and .png", highlight=False)
