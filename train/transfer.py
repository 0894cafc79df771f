"""`umd transfer RUN FOLDER`: the paper's few-shot transfer (Figure 2) to other datasets, one folder each.

    FOLDER/cifar100/train/<class>/…    FOLDER/cifar100/test/<class>/…     a dataset with its own splits (or val/)
    FOLDER/ucmerced/<class>/…                                             without splits: a fifth is held out

The paper uses cifar100, stl10, dtd, pets, flowers102, food101, dogs, imagenet-v2 and ucmerced. Others work too.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from umd.errors import UserError
from umd.files import check_place, write_whole
from umd.train.console import say
from umd.train.listing import listing
from umd.train.options import Probe, Transfer
from umd.train.probe import Recognition, print_rows
from umd.train.run import RunConfig
from umd.train.shards import others_work, share

PAPER = ("cifar100", "stl10", "dtd", "pets", "flowers102", "food101", "dogs", "imagenet-v2", "ucmerced")


def transfer(run: Path, folder: Path, options: Transfer, config: RunConfig, console: Console) -> None:
    """Probe every dataset in `folder`, print the table and write RUN/transfer.json. Ranks share the work.

    A dataset that cannot be probed gets a line with the reason; the others are still probed. Raises UserError if none
    can be probed.
    """
    if config.is_classifier:
        raise UserError(f"{run} is a classifier; probe the run that it started from")
    file = (options.out or run) / "transfer.json"
    check_place(file)
    names = listing(folder)[0]
    if not names:
        raise UserError(
            f"{folder} has no subfolders: expected one a set, e.g. {folder}/cifar100/train/<class>/ and "
            f"{folder}/cifar100/test/<class>/"
        )
    probe = Probe(
        options.shots, pool=0, allow_fewer=options.allow_fewer, seeds=options.seeds, ema=options.ema, out=options.out
    )
    sets: dict[str, Recognition] = {}
    refused: dict[str, str] = {}
    for name in names:
        source = str((folder / name).resolve())
        data = replace(config.data, source=source, holdout=0.2, quarantine="")
        try:
            sets[name] = Recognition(replace(config, data=data), probe)
        except UserError as error:
            refused[name] = str(error)
            say(console, f"{name}: {error}")
    if not sets:
        raise UserError(f"none of the {len(names)} sets in {folder} can be probed, as told above")
    if not share([job for one in sets.values() for job in one.jobs()], console, "pictures read"):
        console.print(others_work(), highlight=False)
        return
    entries = {name: one.entry() for name, one in sets.items()}
    rows: list[dict[str, Any]] = []
    for name, entry in entries.items():
        rows += [row | {"probe": f"{name}, {row['probe']}"} for row in entry["rows"]]
    print_rows(rows, f"{run}: transfer by {options.shots} labelled images a class", console)
    if missing := [name for name in PAPER if name not in entries]:
        console.print(f"of the paper's sets not there: {', '.join(missing)}", highlight=False)
    record = {"sets": entries, "refused": refused}
    write_whole(file, json.dumps(record, indent=1).encode())
    say(console, f"written: {file}")
