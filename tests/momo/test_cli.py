from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import typing

import pytest

from momo.cli import main
from momo.cli import main as run_cli
from momo.cli.commands import COMMANDS
from momo.config import describe_options, nested_schema


def test_the_surface_is_frozen():
    """New knobs go into the configuration; a new command or flag changes this test on purpose."""
    inner = ["prep describe", "prep verify", "prep import"]
    merging = ["select", "merge", "merge diagnose", "merge search", "merge fisher"]
    later = ["pretrain", "pretrain init", "validate", *merging, "eval", "report"]
    assert list(COMMANDS) == ["demo", "prep", *inner, *later]


def test_keys_that_are_true_or_false_may_be_flags(capsys, tmp_path):
    fields = ["base=b", "checkpoints=[a,c]", "out=m"]
    assert main(["merge", "--dry-run", "--verify", "--show-config", *fields]) == 0
    assert "dry_run: true" in (out := capsys.readouterr().out) and "verify: true" in out and "overwrite: false" in out
    assert main(["merge", "--method", *fields]) == 2
    assert "unknown flag: --method" in capsys.readouterr().err


def test_general_help_fits_a_screen(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS) and "example: momo demo" in out
    assert len(out.splitlines()) <= 24 and max(map(len, out.splitlines())) <= 100
    assert main([]) == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_each_help_fits_a_screen_and_shows_an_example(name, capsys):
    assert main([*name.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert f"example: momo {name}" in out
    assert len(out.splitlines()) <= 24 and max(map(len, out.splitlines())) <= 100


def fields_of(schema):
    hints = typing.get_type_hints(schema)
    for field in dataclasses.fields(schema):
        inner = nested_schema(hints[field.name])
        if inner is not None:
            yield from fields_of(inner)
        if not (dataclasses.is_dataclass(hints[field.name])):
            yield schema, field


@pytest.mark.parametrize("name", COMMANDS)
def test_every_key_of_every_command_is_explained(name, capsys):
    schema, _ = COMMANDS[name].load()
    bare = [f"{owner.__name__}.{field.name}" for owner, field in fields_of(schema) if not field.metadata.get("help")]
    assert not bare
    keys = [key for key, _, _ in describe_options(schema)]
    assert set(COMMANDS[name].keys) <= set(keys)
    assert main([*name.split(), "--show-config"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{key} = " in out for key in keys)


def test_show_config_resolves_overrides(capsys):
    assert main(["select", "--show-config", "runs=[a,b]", "out=s.yaml"]) == 0
    assert "rule: evl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian"], "unknown command: pretrian.*did you mean 'momo pretrain'"),
        (["merge", "--force"], "unknown flag: --force.*Next: see momo merge --help"),
        (["pretrain", "--resume", "auto"], "unknown flag: --resume.*Next: write resume=auto"),
        (["pretrain", "--train.samples=5"], r"unknown flag: --train.samples=5.*Next: write train.samples=5"),
        (["prep", "descrbe", "corpus"], "an argument cannot be read: descrbe.*did you mean 'momo prep describe'"),
        (["merge", "selection.yaml"], "an argument cannot be read: selection.yaml.*see momo merge --help"),
        (["prep", "verify", "none"], "this is no corpus: none"),
        (["merge", "--config", "none.yaml"], "the configuration file does not exist: none.yaml"),
        (["merge", "out=x", "methd=average"], "did you mean 'method'"),
        (["select", "runs=[nothing,such]", "out=s.yaml"], "this is no run"),
        (
            ["select", "runs=[a,b]", "runs.x=c", "out=s.yaml"],
            "a key is a list in one place and a mapping in another: runs",
        ),
        (["merge", "out=x", "selection=none.yaml"], "the selection does not exist"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(arguments, message, capsys, tmp_path, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("momo: error: ") and len(error.strip().splitlines()) == 1
    assert re.search(message, error)
    assert not list(tmp_path.iterdir())


def test_a_bug_exits_1_and_asks_for_a_report(monkeypatch, capsys):
    command = dataclasses.replace(COMMANDS["merge"], module="momo.version")
    monkeypatch.setitem(COMMANDS, "merge", command)
    assert run_cli(["merge", "out=x"]) == 1
    assert "this is a bug in momo" in capsys.readouterr().err


def test_interrupt_exits_130(monkeypatch, capsys):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(COMMANDS["merge"]), "load", interrupted)
    assert main(["merge", "out=x"]) == 130
    assert "start the same command again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "code", "text"),
    [
        (
            errno.EROFS,
            2,
            "momo: error: a file or folder cannot be read or written: ro/x: Read-only file system.",
        ),
        (errno.ENOTDIR, 2, "momo: error: a file or folder cannot be read or written: ro/x: Not a directory."),
        (errno.ECHILD, 1, "this is a bug in momo"),
    ],
)
def test_a_place_that_cannot_be_written_is_no_bug(monkeypatch, capsys, number, code, text):
    def refuse(self):
        raise OSError(number, os.strerror(number), "ro/x")

    monkeypatch.setattr(type(COMMANDS["merge"]), "load", refuse)
    assert main(["merge", "out=ro/x"]) == code
    assert text in capsys.readouterr().err


SWALLOWING = """
import time
try:
    print("importing", flush=True)
    time.sleep(60)
except BaseException:
    raise RuntimeError("half imported")
"""
IMPORTING = """
import dataclasses, sys
from momo.cli import main
from momo.cli.commands import COMMANDS
COMMANDS["merge"] = dataclasses.replace(COMMANDS["merge"], module="swallowing")
sys.exit(main(["merge", "out=x"]))
"""


def test_ctrl_c_while_packages_are_imported(tmp_path):
    (tmp_path / "swallowing.py").write_text(SWALLOWING)
    (tmp_path / "job.py").write_text(IMPORTING)
    job = subprocess.Popen(
        [sys.executable, str(tmp_path / "job.py")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert job.stdout.readline() == "importing\n"
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=60)
    assert (job.returncode, err) == (130, "momo: interrupted; start the same command again to continue\n")


HIDING = """
import sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in {hidden!r} else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
{code}
"""


def run_hiding(hidden, code):
    script = HIDING.format(hidden=hidden, code=code)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


OPTIONAL = {"deepspeed", "osgeo", "webdataset", "matplotlib", "pyarrow", "sklearn", "scipy", "tensorboard", "tqdm",
            "jinja2", "dask", "optuna"}  # fmt: skip


def test_import_needs_only_the_core():
    code = "import momo, momo.cli, momo.corpus, momo.runs; print(momo.build_mae, momo.cli.main(['--help']))"
    done = run_hiding(OPTIONAL, code)
    assert done.returncode == 0, done.stderr
    assert "momo demo" in done.stdout


@pytest.mark.parametrize(
    ("command", "hidden", "extra"),
    [
        (["demo"], "deepspeed", "pretrain"),
        (["pretrain", "data.corpora=[c]", "out=r"], "deepspeed", "pretrain"),
        (["select", "runs=[a,b]", "out=s.yaml"], "matplotlib", "merge"),
        (["prep", "products=[p]", "out=c"], "osgeo", "prep"),
    ],
)
def test_a_missing_extra_is_one_line(command, hidden, extra, tmp_path):
    code = f"import os; os.chdir({str(tmp_path)!r}); from momo.cli import main; sys.exit(main({command!r}))"
    done = run_hiding({hidden}, code)
    assert done.returncode == 2, done.stderr
    assert f"the package '{hidden}' cannot be imported" in done.stderr
    assert f'pip install "momo[{extra}]"' in done.stderr
    assert not list(tmp_path.iterdir())
