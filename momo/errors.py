"""The errors momo raises on purpose.

Every one is a `MomoError`. The command line prints it as one short message and exits with code 2; any other
exception is a bug in momo and exits with code 1.
"""

from __future__ import annotations

from typing import Any


class MomoError(Exception):
    """An error the user can act on.

    The message always has the same order: what was wrong, the value seen, the rule, what to do next.

    Args:
        what: What was wrong, without a final full stop.
        seen: The value, path or list that was seen.
        rule: What holds for a valid value.
        fix: What the user can do next.
    """

    def __init__(self, what: str, *, seen: object = None, rule: str | None = None, fix: str | None = None) -> None:
        self.what, self.seen, self.rule, self.fix = what, seen, rule, fix
        first = what if seen is None else f"{what}: {seen}"
        parts = [first, f"Rule: {rule}" if rule else "", f"Next: {fix}" if fix else ""]
        super().__init__(" ".join(_sentence(part) for part in parts if part))

    def __reduce__(self) -> tuple[Any, ...]:
        """Keeps the parts when the error travels from a worker process."""
        seen = None if self.seen is None else str(self.seen)
        return _rebuilt, (type(self), self.what, seen, self.rule, self.fix)


def _rebuilt(kind: type[MomoError], what: str, seen: object, rule: str | None, fix: str | None) -> MomoError:
    return kind(what, seen=seen, rule=rule, fix=fix)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!", "\n")) else text + "."


class Stopped(Exception):
    """A command ended early because a signal asked it to, after saving its state; the command line exits with 0."""


class ConfigError(MomoError):
    """A configuration key or value is wrong, or a needed package is not installed."""


class DataError(MomoError):
    """A product, corpus or labelled dataset is missing, damaged or not what it says it is."""


class CheckpointError(MomoError):
    """A run, checkpoint or weights file is missing, incomplete, damaged or of another shape."""


class LostRankError(MomoError):
    """Another rank of a run is gone: a consequence, of which that rank or its launcher knows the cause."""


class MergeError(MomoError):
    """Checkpoints cannot be selected or merged together."""


class EvalError(MomoError):
    """An evaluation cannot be carried out or its results cannot be read."""
