"""Ranges of numeric settings.

A dataclass field names its range by its type, e.g. `lr: Positive`. `check_ranges` refuses numbers outside it. The
command line's help shows the range: `--optim.lr FLOAT>0`, `--optim.betas 0≤FLOAT<1 0≤FLOAT<1`. `PATHS` refuses empty
paths.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from umd.errors import UserError

MOST = 2**31 - 1  # largest whole number of a range without an upper limit of its own


def plain(value: Any) -> str:
    """The value as text, floats with up to 12 digits."""
    return f"{value:.12g}" if isinstance(value, float) else str(value)


class OutOfRange(UserError):
    """A setting has a value outside its range. `of(option)` is the message with the option's name as the user typed it.

    Args:
        name: the dataclass field.
        value: its value, a number or a tuple of numbers.
        says: the rule, continuing "must be ...".
    """

    def __init__(self, name: str, value: Any, says: str):
        self.name, self.value, self.says = name, value, says
        super().__init__(self.of(name))

    def of(self, option: str) -> str:
        """The message, with `option` as the name of the setting."""
        values = self.value if isinstance(self.value, tuple | list) else [self.value]
        given = " ".join(map(plain, values)) or "(nothing)"
        return f"{option} {given}: {'each ' * (len(values) > 1)}must be {self.says}"


@dataclass(frozen=True, repr=False)
class Range(PrimitiveConstructorSpec[Any]):
    """Finite numbers within bounds. As tyro's constructor it also says how such a number is read and shown."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def holds(self, x: float) -> bool:
        # NaN fails every comparison; the two strict ones also exclude infinity.
        return self.at_least <= x <= self.at_most and self.above < x < self.below

    def says(self, *values: float) -> str:
        """The rule in words, e.g. "at least 0 and below 1", for a message about the wrong `values`.

        The general limit `MOST` is mentioned only if one of the values is beyond it.
        """
        told = self.at_most < MOST or any(x > self.at_most for x in values)
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most if told else math.inf}
        bounds["below"] = self.below
        words = [f"{word} {plain(bound)}" for word, bound in bounds.items() if abs(bound) < math.inf]
        finite = all(-math.inf < x < math.inf for x in values)
        return " and ".join(words if words and finite else ["a finite number", *words])

    def __repr__(self) -> str:  # tyro prints it in its message for a word that is no number
        return self.says()


def number(
    kind: type, at_least: float = -math.inf, at_most: float = math.inf, *, above: float = -math.inf,
    below: float = math.inf,
) -> Range:  # fmt: skip
    """A range for use in `Annotated`. kind: int or float. An int without `at_most` has the upper limit `MOST`."""
    after = f"≤{at_most:g}" if at_most < MOST else f"<{below:g}" if below < MOST else ""
    shown = kind.__name__.upper() + after  # 0≤FLOAT<1, but FLOAT≥0
    for bound, behind, before in ((at_least, "≥", "≤"), (above, ">", "<")):
        if math.isfinite(bound):
            shown = f"{bound:g}{before}{shown}" if after else f"{shown}{behind}{bound:g}"
    return Range(
        nargs=1, metavar=shown, instance_from_str=lambda words: read_number(kind, words[0]),
        is_instance=lambda x: isinstance(x, (int, kind)) and not isinstance(x, bool),
        str_from_instance=lambda x: [str(x)], at_least=at_least,
        at_most=MOST if kind is int and at_most == math.inf else at_most, above=above, below=below,
    )  # fmt: skip


def read_number(kind: type, word: str) -> Any:
    """An int or float. Raises ValueError, in words for a user, for anything else."""
    try:
        return kind(word)
    except ValueError:
        what = "a whole number" if kind is int else "a number, as 0.5 or 1e-4"
        raise ValueError(f"{word!r} is not {what}") from None


Count = Annotated[int, number(int, 1)]
CountOrZero = Annotated[int, number(int, 0)]
Processes = Annotated[int, number(int, 1, 1024)]
ProcessesOrZero = Annotated[int, number(int, 0, 1024)]
Seed = Annotated[int, number(int, 0, 2**62)]  # kernels take 63 bits; some commands also use the seeds that follow
Scale = Annotated[float, number(float, -1000, 1000)]  # guidance; images break down long before these limits
Positive = Annotated[float, number(float, above=0)]
NonNegative = Annotated[float, number(float, 0)]
Share = Annotated[float, number(float, 0, 1)]
ShareBelowOne = Annotated[float, number(float, 0, below=1)]
ShareAboveZero = Annotated[float, number(float, above=0, at_most=1)]
InnerShare = Annotated[float, number(float, above=0, below=1)]


PATHS = ConstructorRegistry()  # in this context tyro refuses an empty path, which would be the current folder


@PATHS.primitive_rule
def path_spec(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
    if info.type is not Path:
        return None
    return PrimitiveConstructorSpec(
        nargs=1, metavar="PATH", instance_from_str=lambda words: given_path(words[0]),
        is_instance=lambda x: isinstance(x, Path), str_from_instance=lambda x: [str(x)],
    )  # fmt: skip


def given_path(word: str) -> Path:
    """The path of an option. Raises UserError if it is empty, as `--out "$OUT"` is without that variable."""
    if not word:
        raise UserError(
            'a path is empty (""), perhaps from an unset variable: give a path, or . for the current folder'
        )
    return Path(word)


def ranges_in(hint: Any) -> Iterator[Range]:
    """All ranges inside a type annotation, including those within tuples and unions."""
    for part in (*getattr(hint, "__metadata__", ()), *get_args(hint)):
        if isinstance(part, Range):
            yield part
        elif not isinstance(part, str | int):
            yield from ranges_in(part)


@cache
def ranges_of(cls: type) -> dict[str, Range]:
    """The range of each numeric field of a dataclass. All numbers of a tuple field share one range."""
    hints = get_type_hints(cls, include_extras=True)
    found = {field.name: next(ranges_in(hints[field.name]), None) for field in dataclasses.fields(cls)}
    return {name: range_ for name, range_ in found.items() if range_ is not None}


def check_ranges(settings: Any, *listed: str) -> None:
    """Check every numeric field of a dataclass instance against its range.

    Args:
        settings: the instance.
        listed: names of tuple fields that must hold at least one value and no value twice.

    Raises:
        OutOfRange: for the first field that fails.
    """
    cls: type = type(settings)
    for name, range_ in ranges_of(cls).items():
        value = getattr(settings, name)
        values = value if isinstance(value, tuple | list) else () if value is None else (value,)
        if not all(map(range_.holds, values)):
            raise OutOfRange(name, value, range_.says(*values))
    for name in listed:
        value = getattr(settings, name)
        if not value or len(set(value)) < len(value):
            raise OutOfRange(name, value, "one or more" if not value else "different from the others")


def named(error: OutOfRange, arguments: list[str]) -> UserError:
    """Rewrite the error with the option as the user typed it: `--optim.ema 2: must be ...`.

    The error comes back unchanged if no option among `arguments` sets the field.
    """
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    same = [option for option in options if option.lstrip("-").replace("-", "_").split(".")[-1] == error.name]
    return UserError(error.of(same[-1])) if same else error
