"""Optional packages are called only in versions and with signatures that are known."""

import importlib.metadata
import inspect
import re
from collections.abc import Mapping

Version = tuple[int, int]


def package_refusal(package: str, module: str, first: Version, last: Version, signatures: Mapping[str, str]) -> str:
    """Why a package is unusable: missing, another version, or another signature than expected; "" if usable.

    Args:
        package: its name as installed by pip.
        module: the module that holds the functions.
        first, last: versions known to have these signatures.
        signatures: names of functions, and the names of their arguments as "a, b".
    """
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "is not installed"
    if not first <= tuple(int(n) for n in re.findall(r"\d+", version)[:2]) <= last:
        return f"is version {version}; expected {first[0]}.{first[1]} to {last[0]}.{last[1]}"
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a build for another torch or CUDA may raise anything
        return f"{version} does not import ({type(error).__name__}: {error})"
    for name, expected in signatures.items():
        if not hasattr(found, name):
            return f"{version} has no {name}"
        takes = ", ".join(inspect.signature(getattr(found, name)).parameters)
        if takes != expected:
            return f"{version}: {name} takes ({takes}), expected ({expected})"
    return ""
