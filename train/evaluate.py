"""`umd evaluate RUN`: score a run's samples and its representation, in one table.

The long work is cut into files (`train/shards.py`). Ranks share them without communicating, a repeated command makes
only missing ones, and a rank that finds all of them computes the scores.
"""

import json
import platform
from collections.abc import Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown
from safetensors.torch import save

import umd
from umd.classifier import Classifier
from umd.config import ModelConfig
from umd.errors import UserError
from umd.feature_networks import identity, open_features
from umd.files import check_place, write_whole
from umd.images import from_uint8
from umd.model import UMD
from umd.schedule import schedule_of
from umd.train import classify, opened
from umd.train.console import say
from umd.train.data import open_dataset
from umd.train.errors import NAMES, Errors, draw_errors
from umd.train.features import CALL, Features, name_of, spans
from umd.train.fingerprint import with_source
from umd.train.latents import pixel_config
from umd.train.options import Evaluate, Probe
from umd.train.pixels import is_pixels, pixels_header, squeezed
from umd.train.probe import Recognition, own_pictures, tell_notes
from umd.train.reference import (
    DECODED,
    RESIZE,
    Reference,
    load_reference,
    outputs_of,
    real_pictures,
    reference_of,
    scores,
    stored_pictures,
)
from umd.train.run import RunConfig
from umd.train.sample import Drawer, chosen_classes, drawn_labels
from umd.train.sampling import check_sampling, chosen_guidance, clips, draw_recipe, prediction_of, steps_of
from umd.train.shards import Advance, Job, others_work, rank_and_size, share
from umd.train.weights import weights_identity


def run_evaluation(run: Path, options: Evaluate, config: RunConfig, console: Console) -> None:
    """Do this rank's share of the work. A rank that finds all of it done writes and prints the scores."""
    config = with_source(config, options.source)
    out = options.out or run
    if config.is_classifier:
        score_classifier(run, options, config, console)
        return
    file, table, curves = out / "scores.json", out / "scores.md", out / "errors.png"
    check_place(file, table, curves)
    if options.reference is not None and not options.reference.is_file():
        raise UserError(f"there is no file {options.reference}, which --reference names")
    # One step for all parts: a run that still trains saves newer ones.
    options = replace(options, step=weights_identity(run, options.ema, options.step)["step"])
    left_out = reasons(run, config, options)
    for what, reason in left_out.items():
        console.print(f"left out: {what} ({reason})", highlight=False)
    if len(left_out) == 3:
        raise UserError(f"nothing is left to score in {run}")
    if not {"recognition", "errors"} <= left_out.keys() or not (options.reference or options.pictures):
        own_pictures(run, config, options.source, console)
    generation = None if "generation" in left_out else Generation(config, options, console)
    probe = Probe(
        shots=options.shots, allow_fewer=options.allow_fewer, linear=options.linear, step=options.step, out=options.out
    )  # fmt: skip
    recognition = None if "recognition" in left_out else Recognition(config, probe)
    if recognition is not None:
        tell_notes(console, recognition.train, recognition.test)
    errors = None if "errors" in left_out else Errors(config, options)
    jobs = [job for part in (generation, recognition, errors) if part is not None for job in part.jobs()]
    if not share(jobs, console, "images"):
        console.print(others_work(), highlight=False)
        return
    record = read_record(file)
    record["environment"] = environment()
    if generation is not None:
        put(record["generation"], generation.entries())
    if recognition is not None:
        put(record["recognition"], [recognition.entry()])
    if errors is not None:
        put(record["errors"], [errors.entry()])
        draw_errors(record["errors"], curves)
    write_whole(file, json.dumps(record, indent=1).encode())
    text = markdown(record)
    write_whole(table, text.encode())
    console.print(Markdown(text))
    say(console, f"written: {file} and {table}")


def reasons(run: Path, config: RunConfig, options: Evaluate) -> dict[str, str]:
    """The parts of the scores that are left out, each with the reason."""
    found = {}
    if not options.generation:
        found["generation"] = "not asked for"
    elif config.is_diffmae:
        found["generation"] = "a DiffMAE fills holes in pictures and draws none without"
    elif getattr(config.objective, "no_noise_prob", 0) == 1:
        found["generation"] = "the network never saw noise"
    if not options.recognition:
        found["recognition"] = "not asked for"
    elif len(classes := open_dataset(config.data, "train").class_names) < 2:
        found["recognition"] = f"the pictures have {'one class, ' + classes[0] if classes else 'no labels'}"
    if not options.errors:
        found["errors"] = "not asked for"
    elif config.is_diffmae:
        found["errors"] = "a DiffMAE's errors are not measured"
    elif isinstance(config.model, ModelConfig) and config.model.outputs == "x_start" and not config.model.decoder_depth:
        found["errors"] = "the network has no decoder and predicts nothing"
    return found


def score_classifier(run: Path, options: Evaluate, config: RunConfig, console: Console) -> None:
    """Score a classifier on the pictures of --split. The first rank alone does it, and writes scores.json."""
    file = (options.out or run) / "scores.json"
    check_place(file)
    if rank_and_size()[0]:
        return
    own_pictures(run, config, options.source, console)
    dataset = open_dataset(config.data, options.split)
    if not len(dataset) or dataset.labels is None:
        what = "no labels" if len(dataset) else f"no {options.split} pictures"
        raise UserError(f"{dataset.name} has {what} to score a classifier on; give --source, or --split train")
    step = weights_identity(run, options.ema, options.step)["step"]
    model, _, dtype = opened.open_run_of(Classifier, config, options.ema, step)
    if (found := len(dataset.class_names)) != model.config.num_classes:
        raise UserError(f"{run} tells {model.config.num_classes} classes apart, and {dataset.name} has {found}")
    scores = classify.score(model, dataset, config.data, dtype)
    write_whole(file, classify.scores_json(scores, dataset, step))
    line = classify.scores_line(scores, dataset, step, options.split)
    say(console, f"{line}\nwritten: {file}")


class Generation:
    """Samples of a run at each guidance scale, and the reference that they are measured against."""

    def __init__(self, config: RunConfig, options: Evaluate, console: Console):
        classes = chosen_classes(config, (), options.balanced)
        check_sampling(options, config)
        self.config, self.options = config, options
        # Fixed now, as a run that still trains may save newer ones.
        weights = weights_identity(config.out, options.ema, options.step)
        self.model, self.device, self.dtype = opened.open_run_of(UMD, config, options.ema, weights["step"])
        self.tokenizer = opened.open_tokenizer(config, options.vae, self.device)
        self.network = open_features(options.features, options.weights).to(self.device).eval()
        self.check_count(options.count, "samples", f"give --count {self.network.num_features} or more")
        factor = 1 if self.tokenizer is None else self.tokenizer.vae.factor
        self.size = [side * factor for side in config.model.image_size]
        self.predict, self.heads = prediction_of(options, config, weights, self.model, self.dtype, console)
        self.out = options.out or config.out
        self.root = self.out / "features"
        self.labels = drawn_labels(classes, options.count, options.balanced, options.seed) if classes else None
        order = "none" if not classes else "in turn" if options.balanced else "at random"
        self.recipes = [
            draw_recipe(
                config, weights, self.device, self.dtype, self.tokenizer, options.count, options, classes=classes,
                order=order, cfg_scale=cfg_scale, seed=options.seed, predict=self.predict, heads=self.heads,
            )
            for cfg_scale in (options.cfg_scale if classes else (1.0,))
        ]  # fmt: skip
        self.open_reference()

    def check_count(self, count: int, what: str, mend: str) -> None:
        """Raise UserError if the covariance of `count` pictures is singular, unless --few allows it."""
        D = self.network.num_features
        if count == 1:
            raise UserError(f"{count} {what} have no covariance; {mend}")
        if 0 < count < D and not self.options.few:
            raise UserError(
                f"{count} {what} are fewer than the {D} features of {self.network.name}: their covariance is singular, "
                f"and the distance says as much of the count as of the pictures; {mend}, or take it anyway with --few "
                "and compare at equal counts only"
            )

    def open_reference(self) -> None:
        """Open the reference: a file, or features of real pictures that jobs will compute."""
        options, data = self.options, self.config.data
        self.given: Reference | None = None
        self.made: Features | None = None
        if options.reference is not None:
            self.given = self.load(options.reference)
            if self.given.features is None:
                found = stored_pictures(self.root, options.reference, self.network, self.size)
                if found is not None:
                    self.made, self.read = found
            self.check_count(self.given.count, "pictures of the reference", "give a larger one")
            return
        tokenizer = self.tokenizer
        if options.pictures:
            if tokenizer is None and not is_pixels(Path(data.source).expanduser()):
                raise UserError("--pictures is for runs on a store; this run's own pictures are the real ones")
            data = data if tokenizer is None else pixel_config(data, tokenizer.vae)
            data, tokenizer = replace(data, source=options.pictures), None
        dataset = open_dataset(data, options.split)
        mend = "give --split train, or --reference FILE"
        if len(dataset) == 0:
            raise UserError(f"{dataset.name} has no held-out pictures to measure against; {mend}")
        self.check_count(len(dataset), f"real pictures ({options.split})", mend)
        self.made, self.read = real_pictures(self.root, dataset, data, self.network, tokenizer)
        if (kept := self.kept(self.made)).exists():
            self.given, self.made = self.load(kept), None

    def load(self, file: Path) -> Reference:
        vae = None if self.tokenizer is None else self.tokenizer.vae.sha256
        resizes, source = [RESIZE] if vae is None else [RESIZE, *DECODED], Path(self.config.data.source).expanduser()
        if is_pixels(source):
            resizes += [squeezed(pixels_header(source)) + resize for resize in resizes]
        return load_reference(file, self.network, self.size, resizes, vae)

    def kept(self, made: Features) -> Path:
        """The file that keeps a reference made by this command."""
        return self.out / f"reference-{name_of(made.settings)}.npz"

    def samples(self, recipe: Mapping[str, Any]) -> Features:
        return Features(self.root, {**recipe, "features": identity(self.network)}, np.arange(self.options.count), CALL)

    def jobs(self) -> list[Job]:
        found = [] if self.made is None else self.made.jobs(self.read, outputs_of(self.network))
        for recipe in self.recipes:
            features = self.samples(recipe)
            drawer = cache(partial(self.drawer, recipe["cfg_scale"]))  # made only if a job is not done
            found += [
                Job(file, last - first, partial(self.drawn, drawer, first, last))
                for file, (first, last) in zip(features.files, spans(self.options.count, CALL), strict=True)
            ]
            features.write_recipe()
        return found

    def drawer(self, cfg_scale: float) -> Drawer:
        options = self.options
        return Drawer(
            self.model, schedule_of(self.config.schedule), self.labels, options.count,
            num_steps=steps_of(options, self.config), cfg_scale=cfg_scale, eta=options.eta, seed=options.seed,
            clip=clips(self.config, self.tokenizer), dtype=self.dtype, batch=options.batch, capture=options.capture,
            tokenizer=self.tokenizer, sampler=options.sampler, predict=self.predict, heads=self.heads,
            guidance=chosen_guidance(options),
        )  # fmt: skip

    def drawn(self, drawer: Any, first: int, last: int, advance: Advance) -> bytes:
        """Draw samples first..last-1. Returns their features as the bytes of a safetensors file."""
        x = from_uint8(drawer().pictures(first, last, advance))
        whole = torch.cat([x, x[:1].expand(CALL - len(x), -1, -1, -1)])
        outputs = outputs_of(self.network)(whole, torch.arange(first, first + CALL))
        return save({name: value[: last - first].cpu().contiguous() for name, value in outputs.items()})

    def reference(self) -> Reference:
        """The reference. If it was made by this command, also keep it as a file."""
        if self.made is None:
            assert self.given is not None
            return self.given
        made = reference_of(self.made, self.network)
        if self.given is not None:  # an ADM file: its statistics, and features of its pictures
            return replace(self.given, features=made.features, floor=made.floor)
        made.save(self.kept(self.made))
        return made

    def entries(self) -> list[dict[str, Any]]:
        """The scores at each guidance scale, with everything that they depend on."""
        reference = self.reference()
        found = []
        for recipe in self.recipes:
            features = self.samples(recipe)
            spatial = features.read("spatial") if self.network.num_spatial else None
            logits = features.read("logits") if self.network.num_logits else None
            values = scores(reference, features.read("pooled"), spatial, logits, self.network)
            about = {"name": reference.name, "count": reference.count or None, **reference.settings}
            few = min(self.options.count, reference.count or self.options.count) < self.network.num_features
            found.append(
                {
                    "key": name_of({"samples": features.settings, "reference": reference.settings}),
                    "samples": {**recipe, "features": identity(self.network)},
                    "reference": about,
                    "scores": values,
                    "floor": reference.floor,
                    "few": few,
                }
            )
        return found


# The record


def read_record(file: Path) -> dict[str, Any]:
    """Read the record of earlier evaluations of this run, or an empty one."""
    empty: dict[str, Any] = {"format": 1, "environment": {}, "generation": [], "recognition": [], "errors": []}
    try:
        record = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        return empty
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); remove it and run the same command again") from error
    return empty | record if isinstance(record, dict) and record.get("format") == 1 else empty


def put(entries: list[dict[str, Any]], new: list[dict[str, Any]]) -> None:
    """Add new entries. They replace entries with the same settings."""
    for entry in new:
        entries[:] = [other for other in entries if other["key"] != entry["key"]] + [entry]


def environment() -> dict[str, str]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    return {"umd": umd.__version__, "torch": torch.__version__, "device": device}


def markdown(record: Mapping[str, Any]) -> str:
    """Write the scores as tables: one per reference, as distances to different ones do not compare; then the probes."""
    lines = []
    by_reference: dict[str, list[dict[str, Any]]] = {}
    for entry in record["generation"]:
        by_reference.setdefault(entry["reference"]["name"], []).append(entry)
    for name, entries in by_reference.items():
        lines += [f"## Samples against reference {name}", "", described(entries[0]["reference"]), ""]
        lines += columns(entries)
        if any(entry["few"] for entry in entries):
            lines += ["", "† fewer pictures than features: these distances compare at equal counts only."]
        lines.append("")
    if record["recognition"]:
        lines += ["## Representation", ""]
        lines += table_head(["weights", "probe", "features", "accuracy", "spread"])
        for entry in record["recognition"]:
            for row in entry["rows"]:
                spread = "" if row["spread"] is None else f"± {100 * row['spread']:.1f}"
                weights = f"step {entry['settings']['weights']['step']}"
                lines.append(
                    table_row([weights, row["probe"], row["features"], f"{100 * row['accuracy']:.1f} %", spread])
                )
        lines.append("")
    for entry in record["errors"]:
        lines += error_lines(entry)
    return "\n".join(lines)


def error_lines(entry: Mapping[str, Any]) -> list[str]:
    """Write the errors by timestep as a table."""
    curves, settings = entry["curves"], entry["settings"]
    split = {"train": "training", "test": "held-out"}[settings["data"]["split"]]
    what = (
        f"On {entry['pictures']} {split} pictures, with the same noise and masks for every network; ± standard error."
    )
    lines = [f"## Squared error by model time, step {settings['weights']['step']}", "", what, ""]
    lines += table_head(["t", *(NAMES[name] for name in curves)])
    for i, time in enumerate(entry["times"]):
        cells = [(curve["mean"][i], curve["se"][i]) for curve in curves.values()]
        lines.append(table_row([str(time), *("" if m is None else f"{m:.4f} ± {s:.4f}" for m, s in cells)]))
    return [*lines, ""]


def columns(entries: list[dict[str, Any]]) -> list[str]:
    """Write a table with one column per entry. The last column is the noise floor."""
    drawn = [entry["samples"] for entry in entries]
    rows = {
        "samples": [f"{s['count']}{' †' * e['few']}" for s, e in zip(drawn, entries, strict=True)],
        "labels": [s["labels"] for s in drawn],
        "guidance": [guidance_of(s) for s in drawn],
        "sampler": [sampler_of(s) for s in drawn],
        "weights": [f"step {s['weights']['step']}{', EMA' * (s['weights']['part'] == 'ema')}" for s in drawn],
    }
    floor = entries[0]["floor"]
    lines = table_head(["", *("samples" for _ in entries), "real pictures: half against half"])
    lines += [table_row([name, *cells, ""]) for name, cells in rows.items()]
    found = [*(entry["scores"] for entry in entries), floor]
    for name in dict.fromkeys(name for values in found for name in values):
        cells = [number(entry["scores"].get(name)) for entry in entries]
        lines.append(table_row([f"**{name}**", *cells, number(floor.get(name))]))
    return lines


def guidance_of(samples: Mapping[str, Any]) -> str:
    """Describe a recipe's guidance: its scale, and settings other than the default."""
    if samples["cfg_scale"] == 1:
        return "none"
    parts = [f"{samples['cfg_scale']:g}"]
    if samples["cfg_schedule"] != "constant":
        parts.append(samples["cfg_schedule"])
    if samples["cfg_interval"] != [1, samples["times"]]:
        parts.append("t {} to {}".format(*samples["cfg_interval"]))
    if samples["cfg_channels"]:
        parts.append(f"{samples['cfg_channels']} channels")
    return ", ".join(parts)


def sampler_of(samples: Mapping[str, Any]) -> str:
    parts = [f"{samples['sampler']}, {samples['steps']} steps"]
    if samples["eta"] is not None:
        parts.append(f"η {samples['eta']:g}")
    if heads := {"x_start": "from x̂0", "both": "from both heads"}.get(samples["predict"]):
        parts.append(heads)
    return ", ".join(parts)


def described(about: Mapping[str, Any]) -> str:
    """Describe a reference in one sentence."""
    network = about["features"]
    count = f"{about['count']} pictures" if about.get("count") else "pictures whose number the file does not tell"
    size = "x".join(map(str, about["image_size"]))
    made = about.get("resize") or f"as in the file of sha256 {about['file'][:12]}"
    return f"{count} of {size}, {made}. Features: {network['name']} ({network['input']})."


def table_head(columns: list[str]) -> list[str]:
    return [table_row(columns), "|" + "---|" * len(columns)]


def table_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
