"""Optional packages, imported where they are used and named when they are missing."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from .errors import ConfigError


def require(module: str, extra: str) -> ModuleType:
    """Imports an optional module or says in one line how to get it.

    Args:
        module: Dotted name, for example `osgeo.gdal`.
        extra: The extra of momo that installs it, for example `prep`.

    Returns:
        The imported module.

    Raises:
        ConfigError: The module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _missing((error.name or module).split(".")[0], extra, str(error)) from error


def require_installed(module: str, extra: str) -> None:
    """Checks that an optional module is installed without importing it (some take seconds).

    Raises:
        ConfigError: The module is not installed.
    """
    name = module.split(".")[0]
    try:
        installed = importlib.util.find_spec(name) is not None
    except ImportError:
        installed = False
    if not installed:
        raise _missing(name, extra, "not installed")


def _missing(name: str, extra: str, reason: str) -> ConfigError:
    fix = f'pip install "momo[{extra}]"'
    if name == "osgeo":
        fix = f"run scripts/setup.sh, or install libgdal and then {fix}"
    return ConfigError(
        f"the package {name!r} cannot be imported", seen=reason, rule=f"this step needs the extra {extra!r}", fix=fix
    )
