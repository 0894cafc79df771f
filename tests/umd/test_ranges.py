"""Every number that a command takes has a range, which its help shows and the command keeps to."""

import dataclasses
import inspect
import math
import re
from collections.abc import Iterator
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from umd import cli
from umd.bench import options as bench_options
from umd.config import ClassifierConfig, ClassifierObjectiveConfig, DiffMAEConfig, DiffMAEObjectiveConfig
from umd.errors import UserError
from umd.ranges import OutOfRange, named, number, ranges_in, ranges_of
from umd.train.finetune import Finetune
from umd.train.options import (
    CheckData,
    Demo,
    Embed,
    EncodeLatents,
    EncodePixels,
    Evaluate,
    Export,
    Import,
    Inpaint,
    Inspect,
    Planned,
    Probe,
    Sample,
    Transfer,
)
from umd.train.run import RunConfig

COMMANDS: dict[type, list[str]] = {  # options of each command, and the arguments that it must have
    RunConfig: [], Finetune: [], Planned: [], Sample: [], Inpaint: [], Probe: [], Evaluate: [], Transfer: [], Embed: [],
    EncodeLatents: [], EncodePixels: [], Inspect: [], Demo: [], CheckData: [], Export: ["timm", "x"],
    Import: ["dit", "x"],
}  # fmt: skip
MUST = {"TraceBench": ["a", "b"], "Reproduce": ["paper"]}
BENCHES = {getattr(bench_options, name): MUST.get(name, []) for name, _ in cli.BENCHES.values()}
ALL = COMMANDS | BENCHES


def parts(cls: type) -> Iterator[type]:
    """A dataclass of settings, and those in it."""
    yield cls
    for hint in get_type_hints(cls).values():
        for part in (hint, *get_args(hint)):
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                yield from parts(part)


PARTS = sorted({part for cls in ALL for part in parts(cls)}, key=lambda cls: cls.__name__)


def is_number(hint: Any) -> bool:
    """Whether a type has an int or a float in it; a Literal has choices instead."""
    return hint in (int, float) or any(is_number(a) for a in get_args(hint) if not isinstance(a, str | int))


def outside(name: str, cls: type) -> list[Any]:
    """Values of a field just outside its range, and what no field takes."""
    range_ = ranges_of(cls)[name]
    wrong = [10**20] if "INT" in range_.metavar else [math.nan, math.inf, -math.inf]
    wrong += [range_.at_least - 1, range_.above, range_.at_most + 1, range_.below]
    values = [x for x in wrong if not range_.holds(x) and abs(x) != math.inf or x in wrong[:3]]
    hint = get_type_hints(cls)[name]
    shapes = [part for part in (hint, *get_args(hint)) if get_origin(part) is tuple]
    return [(x,) * len(get_args(shapes[0])) for x in values] if shapes else values


def test_the_list_above_has_every_command():
    found = set(re.findall(r"\bparse\(\s*(?:\w+\.)?([A-Z]\w+)", inspect.getsource(cli)))
    found |= {command.options for command in cli.COMMANDS.values()} - {""}
    assert found == {cls.__name__ for cls in COMMANDS}
    assert {DiffMAEConfig, DiffMAEObjectiveConfig, ClassifierConfig, ClassifierObjectiveConfig} < set(PARTS)


@pytest.mark.parametrize("cls", PARTS, ids=lambda cls: cls.__name__)
def test_every_number_has_a_range(cls):
    plain, full = get_type_hints(cls), get_type_hints(cls, include_extras=True)
    numeric = {field.name for field in dataclasses.fields(cls) if is_number(plain[field.name])}
    assert numeric == set(ranges_of(cls))
    for name in numeric:
        assert len(set(ranges_in(full[name]))) == 1, name  # that of the first number is checked for all


@pytest.mark.parametrize("cls", PARTS, ids=lambda cls: cls.__name__)
def test_what_is_outside_is_refused(cls):
    settings = cli.parse(cls, "x", ALL.get(cls, []))
    for name in ranges_of(cls):
        for value in outside(name, cls):
            with pytest.raises(OutOfRange) as caught:
                dataclasses.replace(settings, **{name: value})
            assert caught.value.name == name and str(caught.value).startswith(f"{name} "), (name, value)


def options(settings: Any, prefix: str = "--") -> Iterator[list[tuple[str, int]]]:
    """The options of each part of settings that refuse -1, as tyro names them, and how many numbers each takes."""
    cls, own = type(settings), []
    for name, hint in get_type_hints(cls, include_extras=True).items():
        extras, value = getattr(hint, "__metadata__", ()), getattr(settings, name)
        given = [extra.name for extra in extras if getattr(extra, "name", None) is not None]
        option = prefix + (given[0] if given else name.replace("_", "-"))
        if "Suppress" in map(str, extras):  # not an option
            continue
        if dataclasses.is_dataclass(value):
            yield from options(value, option + "." * (option != "--"))
        elif name in ranges_of(cls) and not ranges_of(cls)[name].holds(-1):
            wrong = outside(name, cls)[0]
            own.append((option, len(wrong) if isinstance(wrong, tuple) else 1))
    yield own


@pytest.mark.parametrize("cls", ALL, ids=lambda cls: cls.__name__)
def test_the_command_line_names_the_option_and_shows_the_range(cls, capsys):
    """Of each part its first and last number: each is read on its own, which takes a tenth of a second."""
    first = ALL[cls]
    for own in options(cli.parse(cls, "x", first)):
        for option, count in {pair[0]: pair for pair in (own[:1] + own[-1:])}.values():
            with pytest.raises(UserError, match=rf"^{option} (-1 ?)+: (each )?must be (at least|above) "):
                cli.parse(cls, "x", [*first, option, *["-1"] * count])


def test_help_shows_ranges(capsys):
    with pytest.raises(SystemExit):
        cli.parse(RunConfig, "x", ["--help"])
    shown = capsys.readouterr().out
    for option in ("--batch-size 1≤INT≤100000", "--optim.betas 0≤FLOAT<1 0≤FLOAT<1", "--optim.lr FLOAT>0"):
        assert option in shown
    assert "--save-every {None}|INT≥1" in shown


def test_ranges():
    for range_, inside, beyond, says in (
        (number(float, 0, below=1), (0, 0.5), (-1e-9, 1, math.nan), "at least 0 and below 1"),
        (number(float, above=0, at_most=1), (1e-9, 1), (0, 1.1, math.nan), "above 0 and at most 1"),
        (number(float), (-1e300, 0), (math.inf, -math.inf, math.nan), "a finite number"),
        (number(int, 2), (2, 2**31 - 1), (1, 2**31, 10**400), "at least 2"),
    ):
        assert all(map(range_.holds, inside)) and not any(map(range_.holds, beyond)) and str(range_) == says
    assert (
        number(int, 2).says(10**400) == "at least 2 and at most 2147483647" and number(int, 2).says(1) == "at least 2"
    )
    assert number(float, 0).says(math.nan) == "a finite number and at least 0"


def test_lists_have_each_value_once():
    for seeds, says in (((), r"seeds .nothing.: must be one or more"), ((1, 1), "seeds 1 1: each must be different")):
        with pytest.raises(OutOfRange, match=says):
            Probe(seeds=seeds)


def test_the_option_is_named_as_it_was_written():
    error = OutOfRange("seed", -1, "at least 0")
    for arguments in (["--run.seed", "-1"], ["--run.seed=-1"], ["--seeds", "1", "--run.seed", "-1"]):
        assert str(named(error, arguments)) == "--run.seed -1: must be at least 0"
    assert str(named(error, ["--other", "1"])) == "seed -1: must be at least 0"  # of a preset or a default


@pytest.mark.parametrize("command", ["sample run --out", "inpaint run --image a.png", "bench step --json"])
def test_an_empty_path_is_refused(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([*command.split(), ""])
    assert ended.value.code == 2 and 'a path is empty (""), perhaps from an unset variable' in capsys.readouterr().err


def test_a_docstring_of_two_lines_is_shown_as_one_paragraph():
    from tyro import _strings

    with cli.joined_lines():
        assert _strings.remove_single_line_breaks("one line\n    and another; 3") == "one line and another; 3"
