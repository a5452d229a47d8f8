from __future__ import annotations

import hashlib
import json
import shutil
import sys
import threading
import time
import uuid
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from momo.errors import ConfigError
from momo.files import sha256_file
from momo.pretrain import remote
from momo.pretrain.upload import Uploader
from momo.runs import read_checkpoints, read_metrics
from momo.weights import load_weights
from tests.conftest import write_weights


class FailingFileSystem(MemoryFileSystem):
    """A bucket whose writes fail, stall or lose bytes on demand."""

    protocol = "failing"
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]
    failures = 0
    cut = False
    gate = threading.Event()

    def _open(self, path, mode="rb", **kwargs):
        if "w" in mode:
            self.gate.wait(20)
            if type(self).failures:
                type(self).failures -= 1
                raise OSError("503 slow down")
        return super()._open(path, mode, **kwargs)

    def info(self, path, **kwargs):
        found = super().info(path, **kwargs)
        return found | {"size": found["size"] - 1} if self.cut and found["type"] == "file" else found


class Mounted(LocalFileSystem):
    """A file system with real folders that is not this machine's own, such as sftp."""

    protocol = "mounted"
    local_file = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("mounted://"))


fsspec.register_implementation("mounted", Mounted, clobber=True)
fsspec.register_implementation("failing", FailingFileSystem, clobber=True)


@pytest.fixture
def failing():
    kind = FailingFileSystem
    kind.store, kind.pseudo_dirs, kind.failures, kind.cut = {}, [""], 0, False
    kind.gate.set()
    yield kind
    kind.gate.set()


@pytest.fixture
def run(tmp_path):
    """A RUN with two checkpoints, the newer one with an engine, and metrics cut off in the middle of a line."""
    folder = tmp_path / "ctx"
    for samples in (100, 200):
        add_checkpoint(folder, samples)
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "metrics.jsonl").write_text('{"event": "train", "samples": 100}\n{"event": "tra')
    shutil.rmtree(folder / "checkpoints" / "samples-000000100" / "engine")
    return folder


def add_checkpoint(run, samples, *, seed=None):
    folder = write_weights(
        run / "checkpoints" / f"samples-{samples:09d}", seed=samples if seed is None else seed, samples=samples
    )
    (folder / "engine").mkdir()
    (folder / "engine" / "state.json").write_text(json.dumps({"samples": samples}))
    (folder / "engine" / "optimizer.safetensors").write_bytes(bytes(range(256)) * 64)
    return folder


def upload(run, destination, **options):
    options = {"with_engine": True, "pause_s": 0.01} | options
    uploader = Uploader(str(destination), run.name, **options)
    uploader.check(run)
    uploader.catch_up(run)
    return uploader, uploader.close(20)


def names(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_folder_gets_a_run_that_can_go_on(run, tmp_path):
    uploader, events = upload(run, tmp_path / "archive")
    copy = tmp_path / "archive" / "ctx"
    assert names(copy) == names(run)
    for name in names(run):
        if name != "metrics.jsonl":
            assert sha256_file(copy / name) == sha256_file(run / name), name
    assert (copy / "metrics.jsonl").read_text().endswith("}\n") and len(read_metrics(copy)) == 1
    older, newer = read_checkpoints(copy)
    assert newer.engine.is_dir() and not older.engine.exists()
    assert load_weights(newer.path)[1].samples == 200
    assert [(e["kind"], e["checkpoint"], e["engine"]) for e in events] == [
        ("uploaded", "samples-000000100", False),
        ("uploaded", "samples-000000200", True),
    ]
    assert all(e["reason"] == "" and e["seconds"] >= 0 and e["bytes"] > 1e6 for e in events)
    assert uploader.poll() == []


def test_a_bucket_gets_the_same_and_comes_back(run, tmp_path):
    name = f"memory://bucket-{uuid.uuid4().hex}/runs"
    _, events = upload(run, name)
    assert [e["kind"] for e in events] == ["uploaded", "uploaded"]
    fs, root = fsspec.core.url_to_fs(name)
    fs.get(f"{root}/ctx", str(tmp_path / "back"), recursive=True)
    assert names(tmp_path / "back") == names(run)
    assert [c.samples for c in read_checkpoints(tmp_path / "back")] == [100, 200]
    load_weights(tmp_path / "back" / "checkpoints" / "samples-000000200")
    assert not [path for path in fs.find(root) if "probe" in path or "partial" in path]


def test_folders_are_made_where_the_file_system_has_them(run, tmp_path):
    _, events = upload(run, f"mounted://{tmp_path / 'archive'}")
    assert [e["kind"] for e in events] == ["uploaded", "uploaded"]
    assert names(tmp_path / "archive" / "ctx") == names(run)
    load_weights(tmp_path / "archive" / "ctx" / "checkpoints" / "samples-000000200")


def test_the_summary_written_at_the_end_goes_along(run, tmp_path):
    uploader = Uploader(str(tmp_path / "a"), run.name, with_engine=False)
    uploader.catch_up(run)
    (run / "summary.json").write_text("{}")
    uploader.close(20)
    assert "summary.json" in names(tmp_path / "a" / "ctx")
    assert not [name for name in names(tmp_path / "a" / "ctx") if "engine" in name]


def test_what_is_there_is_left_alone_and_what_was_replaced_is_copied_again(run, tmp_path):
    upload(run, tmp_path / "a")
    copy = tmp_path / "a" / "ctx" / "checkpoints" / "samples-000000100" / "model.safetensors"
    before = copy.stat().st_mtime_ns
    assert upload(run, tmp_path / "a")[1] == []
    assert copy.stat().st_mtime_ns == before
    shutil.rmtree(run / "checkpoints" / "samples-000000100")
    add_checkpoint(run, 100, seed=9)
    _, events = upload(run, tmp_path / "a")
    assert [e["checkpoint"] for e in events] == ["samples-000000100"]
    assert sha256_file(copy) == sha256_file(run / "checkpoints" / "samples-000000100" / "model.safetensors")


@pytest.mark.parametrize("keep", [1, 2])
def test_engines_of_older_copies_are_removed(run, tmp_path, keep):
    uploader = Uploader(str(tmp_path / "a"), run.name, with_engine=True, keep_engine=keep)
    for samples in (300, 400, 500):
        uploader.submit(add_checkpoint(run, samples))
        wait_for(uploader, 1)
    uploader.close(20)
    having = sorted(path.parent.name for path in (tmp_path / "a").rglob("engine"))
    assert having == [f"samples-{samples:09d}" for samples in (300, 400, 500)[-keep:]]
    assert len(read_checkpoints(tmp_path / "a" / "ctx")) == 3


def wait_for(uploader, count):
    events, end = [], time.monotonic() + 20
    while len(events) < count and time.monotonic() < end:
        events += uploader.poll()
        time.sleep(0.005)
    return events


def test_the_card_goes_last(run, failing):
    order = []
    original = failing._open

    def record(self, path, mode="rb", **kwargs):
        if "w" in mode:
            order.append(path.rpartition("ctx/")[2])
        return original(self, path, mode, **kwargs)

    failing._open = record
    try:
        upload(run, "failing://bucket")
    finally:
        failing._open = original
    newest = [path for path in order if "000200" in path]
    assert newest[-1].endswith("card.json") and any("engine" in path for path in newest[:-1])
    assert order.index("config.yaml") < order.index("checkpoints/samples-000000100/card.json")


def test_a_passing_failure_is_tried_again(run, failing):
    uploader = Uploader("failing://bucket", run.name, with_engine=True, pause_s=0.01)
    failing.failures = 4
    uploader.catch_up(run)
    events = uploader.close(20)
    assert [e["kind"] for e in events] == ["uploaded", "uploaded"]


def test_a_lasting_failure_is_reported_and_made_up_for_when_the_destination_is_back(run, failing):
    uploader = Uploader("failing://bucket", run.name, with_engine=True, attempts=3, pause_s=0.001)
    failing.failures = 3
    first, second = sorted((run / "checkpoints").iterdir())
    uploader.submit(first)
    (event,) = wait_for(uploader, 1)
    assert event["kind"] == "upload_failed" and "503 slow down" in event["reason"]
    assert not [path for path in failing.store if path.endswith("card.json")]
    uploader.submit(second)
    events = uploader.close(20)
    assert [(e["kind"], e["checkpoint"]) for e in events] == [("uploaded", second.name), ("uploaded", first.name)]


def test_a_copy_of_another_size_is_no_copy(run, failing):
    uploader = Uploader("failing://bucket", run.name, with_engine=True, attempts=2, pause_s=0.001)
    failing.cut = True
    uploader.submit(run / "checkpoints" / "samples-000000200")
    (event,) = uploader.close(20)
    assert event["kind"] == "upload_failed" and "bytes after the copy, not" in event["reason"]
    assert not [path for path in failing.store if path.endswith("card.json")]


def test_retention_may_remove_an_engine_that_waits(run, failing):
    failing.gate.clear()
    uploader = Uploader("failing://bucket", run.name, with_engine=True)
    newest = run / "checkpoints" / "samples-000000200"
    uploader.submit(newest)
    shutil.rmtree(newest / "engine")
    failing.gate.set()
    (event,) = uploader.close(20)
    assert event["kind"] == "uploaded" and not event["engine"]
    assert "removed the optimizer's state" in event["reason"]
    assert not [path for path in failing.store if "engine" in path]
    assert [path for path in failing.store if path.endswith("card.json")]


def test_a_checkpoint_that_disappears_or_changes_does_not_stop_the_others(run, failing):
    failing.gate.clear()
    uploader = Uploader("failing://bucket", run.name, with_engine=False)
    first, second = sorted((run / "checkpoints").iterdir())
    third = add_checkpoint(run, 300)
    for folder in (first, second, third):
        uploader.submit(folder)
    time.sleep(0.05)
    shutil.rmtree(first)
    (second / "model.safetensors").write_bytes(b"other bytes than the card describes")
    failing.gate.set()
    events = uploader.close(20)
    assert [e["kind"] for e in events] == ["upload_failed", "upload_failed", "uploaded"]
    assert "no longer in the run" in events[0]["reason"]
    assert "model.safetensors is not the file that its card describes" in events[1]["reason"]
    assert [p.split("/")[-2] for p in failing.store if p.endswith("card.json")] == [third.name]


def test_close_does_not_wait_for_ever(run, failing):
    failing.gate.clear()
    uploader = Uploader("failing://bucket", run.name, with_engine=True)
    uploader.catch_up(run)
    begin = time.monotonic()
    events = uploader.close(0.2)
    assert time.monotonic() - begin < 5
    assert [e["kind"] for e in events] == ["upload_failed"] * 2
    assert all("not finished 0.2 s after the run's end" in e["reason"] for e in events)


def test_poll_and_submit_do_not_block_while_a_copy_stalls(run, failing):
    failing.gate.clear()
    uploader = Uploader("failing://bucket", run.name, with_engine=True)
    begin = time.monotonic()
    uploader.catch_up(run)
    assert uploader.poll() == [] and time.monotonic() - begin < 1
    failing.gate.set()
    assert len(uploader.close(20)) == 2


def test_nothing_submitted_nothing_done(tmp_path):
    assert Uploader(str(tmp_path / "a"), "ctx", with_engine=True).close(1) == []
    assert not (tmp_path / "a").exists()


def test_a_destination_that_cannot_be_written_is_refused_at_the_start(run, tmp_path, failing):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written: checkpoint.upload=.*file.*now rather than after hours"):
        Uploader(str(tmp_path / "file"), "ctx", with_engine=True).check(run)
    failing.failures = 1
    with pytest.raises(ConfigError, match="cannot be written.*503 slow down"):
        Uploader("failing://bucket", "ctx", with_engine=True).check(run)
    failing.gate.clear()
    with pytest.raises(ConfigError, match=r"no answer within 0\.1 s"):
        Uploader("failing://bucket", "ctx", with_engine=True).check(run, timeout_s=0.1)
    failing.gate.set()


def test_a_check_leaves_nothing_behind(run, failing, tmp_path):
    Uploader("failing://bucket", "ctx", with_engine=True).check(run)
    Uploader(str(tmp_path / "a"), "ctx", with_engine=True).check(run)
    assert failing.store == {} and names(tmp_path / "a") == []


def test_another_run_of_the_same_name_is_not_overwritten(run, tmp_path):
    upload(run, tmp_path / "a")
    fresh = tmp_path / "elsewhere" / "ctx"
    with pytest.raises(ConfigError, match=r"holds another run of this name: 2 checkpoint\(s\).*copy that folder back"):
        Uploader(str(tmp_path / "a"), "ctx", with_engine=True).check(fresh)
    with pytest.raises(ConfigError, match="copied onto itself"):
        Uploader(str(run.parent), "ctx", with_engine=True).check(run)


@pytest.mark.parametrize(
    ("destination", "name", "message"),
    [
        ("s3://bucket/runs", "ctx", "package that is not installed.*pip install s3fs"),
        ("nosuch://bucket", "ctx", "cannot be opened: checkpoint.upload=nosuch://bucket"),
        ("/tmp/x", "", "no name to upload under"),
        ("/tmp/x", "a/b", "no name to upload under"),
    ],
)
def test_destinations_that_make_no_sense(destination, name, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=message):
        Uploader(destination, name, with_engine=True)


def test_large_files_keep_their_content(run, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_BLOCK", 1000)
    upload(run, "memory://blocks")
    fs, root = fsspec.core.url_to_fs("memory://blocks")
    path = "checkpoints/samples-000000200/model.safetensors"
    assert hashlib.sha256(fs.cat_file(f"{root}/ctx/{path}")).hexdigest() == sha256_file(run / path)
    fs.rm(root, recursive=True)
