"""Parsing of the command line and its exit codes: 0 done, 3 done in part, 2 user error, 1 bug."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import os
import signal
import sys
import textwrap
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from ..config import describe_options, load_config, to_yaml
from ..errors import ConfigError, MomoError, Stopped
from ..version import __version__
from .commands import COMMANDS, Command

USER_ERROR, BUG, INTERRUPTED = 2, 1, 130
_INTERRUPTED_TEXT = "interrupted; start the same command again to continue"
_WIDTH, _KEY_WIDTH = 98, 18
# Errors of files that lie with the machine or the user's paths, not with momo.
_SURROUNDINGS = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; those of the process when None.

    Returns:
        The exit code: 0 done, 3 done but some products failed, 2 the user can mend it, 1 a bug in momo.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except MomoError as error:
        print(f"momo: error: {error}", file=sys.stderr)
        return USER_ERROR
    except Stopped as stop:
        print(f"momo: {stop}", file=sys.stderr)
        return 0
    except KeyboardInterrupt:
        print(f"momo: {_INTERRUPTED_TEXT}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno not in _SURROUNDINGS:
            return _bug()
        print(f"momo: error: {_file_error(error)}", file=sys.stderr)
        return USER_ERROR
    except Exception:  # the last line of defence: whatever comes here is a bug, and says so
        return _bug()


def _bug() -> int:
    traceback.print_exc()
    print(f"momo: this is a bug in momo {__version__}; please report it with the lines above", file=sys.stderr)
    return BUG


def _file_error(error: OSError) -> MomoError:
    """Returns what a disk, a right or a name in the way says to a user."""
    return MomoError(
        "a file or folder cannot be read or written",
        seen=f"{error.filename}: {error.strerror}" if error.filename else error.strerror,
        rule="the place exists, has room, and may be read and written by this user",
        fix="look at the path, the free space and the rights, or choose another `out`",
    )


@contextlib.contextmanager
def _ending_at_ctrl_c() -> Iterator[None]:
    """Ctrl-C ends the process at once: libraries that are being imported swallow it or die of it half made."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(_number: int, _frame: FrameType | None) -> None:
        os.write(2, f"momo: {_INTERRUPTED_TEXT}\n".encode())
        os._exit(INTERRUPTED)

    signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(general_help())
        return 0
    if arguments[0] == "--version":
        print(f"momo {__version__}")
        return 0
    command, rest = _command(arguments)
    with _ending_at_ctrl_c():
        schema, function = command.load()
    parser = argparse.ArgumentParser(prog=f"momo {command.name}", add_help=False, allow_abbrev=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--show-config", action="store_true")
    parser.add_argument("overrides", nargs="*")
    parsed, unknown = parser.parse_known_args(rest)
    switches = [flag for flag in unknown if _is_switch(flag, schema)]
    unknown = [flag for flag in unknown if flag not in switches]
    if unknown:
        raise ConfigError(
            "unknown flag",
            seen=" ".join(unknown),
            rule="flags are --config, --show-config, --help and --KEY for a key that is true or false; "
            "everything else is KEY=VALUE",
            fix=_flag_as_key(unknown[0], rest, schema) or f"see momo {command.name} --help",
        )
    if parsed.help:
        print(command_help(command, schema))
        return 0
    overrides = [_override(command, item) for item in parsed.overrides]
    overrides += [f"{_key(flag)}=true" for flag in switches]
    if parsed.show_config:
        print(_all_options(command, schema, parsed.config, overrides))
        return 0
    result = function(load_config(schema, parsed.config, overrides))
    return int(getattr(result, "exit_code", 0))


def _command(arguments: list[str]) -> tuple[Command, list[str]]:
    """Returns the command and the arguments after its name, which may be two words."""
    for words in (2, 1):
        name = " ".join(arguments[:words])
        if name in COMMANDS:
            return COMMANDS[name], arguments[words:]
    near = difflib.get_close_matches(arguments[0], COMMANDS, n=1, cutoff=0.0)[0]
    raise ConfigError(
        "unknown command", seen=arguments[0], rule=f"one of {', '.join(COMMANDS)}", fix=f"did you mean 'momo {near}'?"
    )


def _key(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _is_switch(flag: str, schema: type) -> bool:
    """Says whether a flag such as `--dry-run` stands for a key that is true or false."""
    defaults = {known: default for known, default, _ in describe_options(schema)}
    return flag.startswith("--") and defaults.get(_key(flag)) in ("True", "False")


def _flag_as_key(flag: str, rest: list[str], schema: type) -> str | None:
    """Says how a flag such as `--resume auto` is written here, when a key has its name."""
    name, _, value = flag.lstrip("-").partition("=")
    key = name.replace("-", "_")
    if key not in {known for known, _, _ in describe_options(schema)}:
        return None
    after = rest[rest.index(flag) + 1 :]
    value = value or (after[0] if after and not after[0].startswith("-") else "VALUE")
    return f"write {key}={value}"


def _override(command: Command, item: str) -> str:
    if "=" in item:
        return item
    if command.positional:
        return f"{command.positional}={item}"
    inner = [name for name in COMMANDS if name.startswith(f"{command.name} ")]
    near = difflib.get_close_matches(f"{command.name} {item}", inner, n=1, cutoff=0.7)
    raise ConfigError(
        "an argument cannot be read",
        seen=item,
        rule="arguments are KEY=VALUE",
        fix=f"did you mean 'momo {near[0]}'?" if near else f"see momo {command.name} --help",
    )


def general_help() -> str:
    """Returns the text of `momo --help`."""
    lines = [
        f"momo {__version__}: foundation models for Mars orbital imagery",
        "",
        "usage: momo COMMAND [--config FILE.yaml] [KEY=VALUE ...]",
        "",
        *(f"  {command.name:<13} {command.summary}" for command in COMMANDS.values()),
        "",
        "  momo COMMAND --help          the main keys and an example",
        "  momo COMMAND --show-config   every key with its value and meaning",
        "example: momo demo out=demo",
        "exit codes: 0 done, 3 done but some products failed, 2 something you can mend, 1 a bug in momo",
    ]
    return "\n".join(lines)


def command_help(command: Command, schema: type) -> str:
    """Returns the text of `momo COMMAND --help`: one screen."""
    options = {key: (default, text) for key, default, text in describe_options(schema)}
    lines = [
        f"momo {command.name}: {command.summary}",
        "",
        f"usage: momo {command.name} [--config FILE.yaml] [--show-config] [KEY=VALUE ...]",
        "",
    ]
    for key in command.keys:
        default, text = options[key]
        shown = text if default == "(required)" else f"{text} [{default}]"
        indent = " " * (_KEY_WIDTH + 3)
        lines += textwrap.wrap(shown, _WIDTH, initial_indent=f"  {key:<{_KEY_WIDTH}} ", subsequent_indent=indent)
    if others := len(options) - len(command.keys):
        lines.append(f"  and {others} more: momo {command.name} --show-config")
    lines += ["", f"example: {command.example}"]
    return "\n".join(lines)


def _all_options(command: Command, schema: type, path: Path | None, overrides: list[str]) -> str:
    """Lists every key with its meaning; with a file or overrides, the resolved values instead."""
    if path is not None or overrides:
        return to_yaml(load_config(schema, path, overrides)).rstrip()
    lines = [f"# every key of momo {command.name}: key = default, then its meaning"]
    for key, default, text in describe_options(schema):
        lines += [f"{key} = {default}", f"    {text}"]
    return "\n".join(lines)
