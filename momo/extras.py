"""Optional packages, imported where they are used and named when they are missing."""

from __future__ import annotations

import importlib
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
        missing = (error.name or module).split(".")[0]
        fix = f'pip install "momo[{extra}]"'
        if missing == "osgeo":
            fix = f'run scripts/setup.sh, or install libgdal and then {fix}'
        raise ConfigError(
            f"the package {missing!r} cannot be imported",
            seen=str(error),
            rule=f"this step needs the extra {extra!r}",
            fix=fix,
        ) from error
