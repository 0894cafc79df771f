"""Crops of stored latents: the crops of a recipe, the command that makes them, and whether they fit a run."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from umd.errors import UserError

if TYPE_CHECKING:
    from umd.train.settings import DataConfig

AREA_MIN = {"pretrain": 0.8, "finetune": 0.95}  # smallest fraction of a picture's area in a crop, from the paper
Crops = tuple[float, float, bool]  # smallest and largest fraction of the area; mirrored with probability 1/2 or never


def crops_of(recipe: dict) -> Crops | None:
    """The stored crops, as settings of a run. None if the folder does not say (encoded by another program).

    A center crop counts as an area of 1 to 1, and as mirrored if the mirror image is stored.
    """
    crop = recipe.get("crop")
    if crop is None:
        return None
    if crop["kind"] == "center":
        return 1.0, 1.0, crop["views"] > 1
    return crop["area_min"], crop["area_max"], crop["hflip"]


def check_crops(header: dict, folder: Path, config: "DataConfig") -> None:
    """Raise UserError, with the command that makes the right crops, if the stored crops are not as a run's settings."""
    stored, asked = crops_of(header["recipe"]), (config.area_min, config.area_max, config.hflip)
    if stored is None or stored == asked:
        return
    areas = f"{exact(asked[0])}-{exact(asked[1])}"
    name = next((name for name, area in AREA_MIN.items() if asked[:2] == (area, 1)), areas)
    beside = folder.resolve() if folder.name in ("", "..") else folder  # "" and ".." are not names to extend
    out = beside.with_name(f"{folder.resolve().name}-{name}{'' if asked[2] else '-unmirrored'}")
    crop = {**header["recipe"]["crop"], "kind": "random", "area_min": asked[0], "area_max": asked[1], "hflip": asked[2]}
    command = encode_command({**header, "recipe": {**header["recipe"], "crop": crop}}, out)
    as_they_are = (
        f"--data.area-min {exact(stored[0])} --data.area-max {exact(stored[1])} "
        f"--data.{'' if stored[2] else 'no-'}hflip"
    )
    raise UserError(
        f"the latents in {folder} are of {in_words(stored)}, and this run's recipe asks for {in_words(asked)}: make "
        f"those by {command} and give --data.source {shlex.quote(str(out))}, or learn from these on purpose with "
        f"{as_they_are}"
    )


def in_words(crops: Crops) -> str:
    areas = f"{exact(crops[0])} to {exact(crops[1])}"
    return f"crops of {areas} of the area, {'' if crops[2] else 'not '}mirrored"


def exact(number: float) -> str:
    """The shortest text that parses to exactly this number: 1, 0.8, 0.3333333333333333."""
    return repr(float(number)).removesuffix(".0")


def encode_command(header: dict, folder: Path) -> str:
    """The `umd encode-latents` or `encode-pixels` command that makes a folder with this header.

    Options that another program's header does not contain are left out.
    """
    recipe = header["recipe"]
    crop, source = recipe.get("crop", {}), recipe.get("source", {})
    words = ["umd", "encode-pixels" if "size" in recipe else "encode-latents"]
    finetune = (crop.get("area_min"), crop.get("area_max")) == (AREA_MIN["finetune"], 1)
    given = {
        "recipe": "finetune" if finetune else None,
        "data.source": source.get("path"),
        "data.vae": recipe.get("vae", {}).get("name"),
        "out": folder,
        "size": recipe.get("size"),
        "image-size": crop.get("image_size"),
        "views": crop.get("views"),
        "crop": crop.get("kind"),
        "data.area-min": None if finetune else crop.get("area_min"),
        "data.area-max": None if finetune else crop.get("area_max"),
        "data.holdout": source.get("holdout"),
        "data.quarantine": header.get("quarantine"),
        "dtype": recipe.get("dtype"),
        "precision": recipe.get("precision"),
        "shard-images": recipe.get("shard_images"),
        "seed": crop.get("seed"),
    }
    for name, value in given.items():
        if value not in (None, ""):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    if not crop.get("hflip", True):
        words.append("--data.no-hflip")
    if any(split["left_out"] for split in header.get("splits", {}).values()):
        words.append("--data.skip-broken")
    return shlex.join(words)
