"""Numbers that a setting may have. A field says so by its type, `lr: Positive`, and `check_ranges` refuses others.

The options of the command line show it too: `--optim.lr FLOAT>0`, `--optim.betas 0≤FLOAT<1 0≤FLOAT<1`.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

from tyro.constructors import PrimitiveConstructorSpec

from umd.errors import UserError

MOST = 2**31 - 1  # of a whole number that has no limit of its own


def plain(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)


class OutOfRange(UserError):
    """A setting that may not have this value; `option` names it as the user did."""

    def __init__(self, name: str, value: Any, says: str):
        self.name, self.value, self.says = name, value, says
        super().__init__(self.of(name))

    def of(self, option: str) -> str:
        values = self.value if isinstance(self.value, tuple | list) else [self.value]
        given = " ".join(map(plain, values)) or "(nothing)"
        return f"{option} {given}: {'each ' * (len(values) > 1)}must be {self.says}"


@dataclass(frozen=True, repr=False)
class Range(PrimitiveConstructorSpec[Any]):
    """Finite numbers within bounds, and how tyro reads and shows them."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf

    def holds(self, x: float) -> bool:
        return self.at_least <= x <= self.at_most and self.above < x < self.below  # no NaN, and with < no infinity

    def says(self, *values: float) -> str:
        """Which numbers are right, as told of these that are not: a limit of all counts where they are beyond it."""
        told = self.at_most < MOST or any(x > self.at_most for x in values)
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most if told else math.inf}
        bounds["below"] = self.below
        words = [f"{word} {plain(bound)}" for word, bound in bounds.items() if abs(bound) < math.inf]
        finite = all(-math.inf < x < math.inf for x in values)
        return " and ".join(words if words and finite else ["a finite number", *words])

    def __repr__(self) -> str:  # tyro prints it where a word is no number
        return self.says()


def number(
    kind: type, at_least: float = -math.inf, at_most: float = math.inf, *, above: float = -math.inf,
    below: float = math.inf,
) -> Range:  # fmt: skip
    """The range of numbers of a kind, int or float, for `Annotated`. Whole numbers without a limit end at MOST."""
    after = f"≤{at_most:g}" if at_most < MOST else f"<{below:g}" if below < MOST else ""
    shown = kind.__name__.upper() + after  # 0≤FLOAT<1, but FLOAT≥0
    for bound, behind, before in ((at_least, "≥", "≤"), (above, ">", "<")):
        if math.isfinite(bound):
            shown = f"{bound:g}{before}{shown}" if after else f"{shown}{behind}{bound:g}"
    return Range(
        nargs=1, metavar=shown, instance_from_str=lambda words: kind(words[0]),
        is_instance=lambda x: isinstance(x, (int, kind)) and not isinstance(x, bool),
        str_from_instance=lambda x: [str(x)], at_least=at_least,
        at_most=MOST if kind is int and at_most == math.inf else at_most, above=above, below=below,
    )  # fmt: skip


Count = Annotated[int, number(int, 1)]
CountOrZero = Annotated[int, number(int, 0)]
Processes = Annotated[int, number(int, 1, 1024)]
ProcessesOrZero = Annotated[int, number(int, 0, 1024)]
Seed = Annotated[int, number(int, 0, 2**62)]  # kernels take 63 bits; some commands count on from it
Scale = Annotated[float, number(float, -1000, 1000)]  # far beyond what leaves a picture
Positive = Annotated[float, number(float, above=0)]
NonNegative = Annotated[float, number(float, 0)]
Share = Annotated[float, number(float, 0, 1)]
ShareBelowOne = Annotated[float, number(float, 0, below=1)]
ShareAboveZero = Annotated[float, number(float, above=0, at_most=1)]
InnerShare = Annotated[float, number(float, above=0, below=1)]


def ranges_in(hint: Any) -> Iterator[Range]:
    """The ranges that a type names, in tuples and unions too."""
    for part in (*getattr(hint, "__metadata__", ()), *get_args(hint)):
        if isinstance(part, Range):
            yield part
        elif not isinstance(part, str | int):
            yield from ranges_in(part)


@cache
def ranges_of(cls: type) -> dict[str, Range]:
    """The range of each numeric field of a dataclass; all numbers of a tuple have one."""
    hints = get_type_hints(cls, include_extras=True)
    found = {field.name: next(ranges_in(hints[field.name]), None) for field in dataclasses.fields(cls)}
    return {name: range_ for name, range_ in found.items() if range_ is not None}


def check_ranges(settings: Any, *listed: str) -> None:
    """Raises OutOfRange for the first number of a dataclass outside the range of its field.

    listed: fields that are tuples of one value or more, each once.
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
    """The error with the option that gave the value, as it was written: `--optim.ema 2: must be ...`."""
    options = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
    same = [option for option in options if option.lstrip("-").replace("-", "_").split(".")[-1] == error.name]
    return UserError(error.of(same[-1])) if same else error
