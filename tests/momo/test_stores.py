"""Corpora read over HTTP, from memory and by commands: the same tiles as from a folder, failures that say enough."""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import numpy as np
import pytest

from momo.corpus import Corpus
from momo.corpus_format import ShardEntry
from momo.errors import ConfigError, DataError
from momo.pipes import Command, ShardBuffer
from momo.stores import LocalStore, Patience, PipeStore, Run, open_store
from momo.url_store import UrlStore

QUICK = Patience(attempts=3, pause_s=0.01, timeout_s=1.0)


class Handler(BaseHTTPRequestHandler):
    """Serves `server.folder`; `server.trouble(path, number)` may give a status instead, or None."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, self.headers.get("Range")))
        status = server.trouble(self.path, len(server.requests))
        file = server.folder / self.path.split("?")[0].lstrip("/")
        if status is None and not file.is_file():
            status = 404
        if status is not None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        raw, span = file.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if server.ranges and span:
            first, last = int(span[1]), int(span[2])
            if first >= len(raw):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            raw = raw[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args):
        pass


@contextmanager
def serving(folder, *, ranges=True, trouble=lambda path, number: None):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.folder, server.ranges, server.trouble, server.requests = Path(folder), ranges, trouble, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def in_memory(folder, name):
    system = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            system.pipe_file(f"/{name}/{path.relative_to(folder)}", path.read_bytes())
    return f"memory://{name}"


POSITIONS = [3, 17, 4, 5, 23, 0, 3]


def assert_same(corpus, local):
    for split, positions in (("train", POSITIONS), ("val", [7, 0])):
        ours, theirs = corpus.read_batch(split, positions), local.read_batch(split, positions)
        assert ours.keys == theirs.keys and ours.product_ids == theirs.product_ids
        assert np.array_equal(ours.stored_BHW, theirs.stored_BHW) and np.array_equal(ours.valid_BHW, theirs.valid_BHW)
        assert np.array_equal(ours.statistics.mean, theirs.statistics.mean)
    assert corpus.read("train", 5).meta == local.read("train", 5).meta
    assert np.array_equal(corpus.read_stored("val", 3).stored_HW, local.read_stored("val", 3).stored_HW)
    assert corpus.stats == local.stats and corpus.products == local.products
    assert corpus.manifest.fingerprint == local.manifest.fingerprint


def test_every_store_gives_the_tiles_of_the_folder(tiny_corpus, monkeypatch):
    local = Corpus(tiny_corpus, verify=True)
    assert local.path == tiny_corpus and local.notes == [] and not local.store.streamed
    assert_same(Corpus(f"file://{tiny_corpus}"), local)
    assert_same(Corpus(str(tiny_corpus), pipe="cat {url}"), local)
    assert_same(Corpus(in_memory(tiny_corpus, "same"), verify=True), local)
    with serving(tiny_corpus) as (server, url):
        remote = Corpus(url, patience=QUICK, verify=True)
        assert isinstance(remote.store, UrlStore) and not remote.store.streamed
        assert remote.notes == [f"{url}: tiles are read one by one, so shards are not compared with their sha256"]
        assert_same(remote, local)
        assert_same(Corpus(f"{url}/?signature=a%2Fb", patience=QUICK), local)
        assert server.requests[-1][0].endswith(".parquet?signature=a%2Fb")
        assert_same(pickle.loads(pickle.dumps(remote)), local)
        piped = Corpus(url, pipe=f"cat {tiny_corpus}/shards/{{name}}", patience=QUICK)
        assert_same(piped, local)
        assert_same(pickle.loads(pickle.dumps(piped)), local)


def test_a_batch_over_http_asks_for_its_ranges_only(tiny_corpus):
    with serving(tiny_corpus) as (server, url):
        corpus = Corpus(url, patience=QUICK)
        _ = corpus.index
        before = len(server.requests)
        corpus.read_batch("train", [0, 1, 2, 12, 19])
        asked = server.requests[before:]
        # Tiles 0 to 2 lie together; the gap between 12 and 19 is small enough to be read along.
        assert sorted(path for path, _ in asked) == ["/shards/train-000000.tar", "/shards/train-000001.tar"]
        rows = corpus.index["train"]
        shard, start, _ = rows.place(12)
        last = rows.place(19)
        assert ("/shards/train-000001.tar", f"bytes={start}-{last[1] + last[2] - 1}") in asked and shard == last[0]


def test_a_server_without_ranges_is_noticed_and_read_whole(tiny_corpus):
    local, buffer = Corpus(tiny_corpus), ShardBuffer(1)
    with serving(tiny_corpus, ranges=False) as (server, url):
        corpus = Corpus(url, patience=QUICK, buffer=buffer)
        assert corpus.store.streamed
        assert corpus.notes == [f"{url}: the server ignores byte ranges, so whole shards are read and kept in a buffer"]
        assert_same(corpus, local)
        shards = [path for path, _ in server.requests if "/shards/" in path]
        assert sorted(set(shards)) == sorted(shards)
        assert buffer.nbytes == sum(shard.bytes for shard in corpus.manifest.shards)
        again = pickle.loads(pickle.dumps(corpus))
        assert again.store.streamed
        assert_same(again, local)


def test_a_server_that_stops_giving_ranges_is_an_error(tiny_corpus):
    with serving(tiny_corpus) as (server, url):
        corpus = Corpus(url, patience=QUICK)
        _ = corpus.index
        server.ranges = False
        with pytest.raises(
            DataError, match=r"server ignores byte ranges: .*train-000000.tar: \d+ bytes asked.*data.pipe="
        ):
            corpus.read("train", 1)


def test_passing_failures_are_tried_again(tiny_corpus):
    local = Corpus(tiny_corpus)
    with serving(tiny_corpus, trouble=lambda path, number: 503 if number % 3 else None) as (_, url):
        assert_same(Corpus(url, patience=Patience(attempts=9, pause_s=0.001, timeout_s=2)), local)


def test_an_unreachable_shard_names_url_bytes_and_tries_and_costs_its_tries_once(tiny_corpus):
    def broken(path, number):
        return 500 if "train-000001" in path else None

    with serving(tiny_corpus, trouble=broken) as (server, url):
        corpus = Corpus(url, patience=QUICK)
        _, offset, nbytes = corpus.index["train"].place(12)
        message = (
            f"a shard cannot be read: {url}/shards/train-000001.tar, bytes {offset} to {offset + nbytes - 1}: .*500"
        )
        with pytest.raises(DataError, match=f"{message}.*3 tries.*credentials"):
            corpus.read("train", 12)
        asked = len(server.requests)
        with pytest.raises(DataError, match="3 tries"):
            corpus.read("train", 14)
        assert len(server.requests) == asked
        tiles = corpus.read_places(corpus.index["train"].places(np.array([2, 12, 13, 21])))
        assert [bad.slot for bad in tiles.unreadable] == [1, 2] and tiles.keys[0] and tiles.keys[3]
        assert not tiles.valid_BHW[1:3].any() and not tiles.stored_BHW[1:3].any()


def test_lasting_failures_are_not_tried_again(tiny_corpus, tmp_path):
    shutil.copytree(tiny_corpus, tmp_path / "c")
    (tmp_path / "c" / "shards" / "train-000000.tar").unlink()
    with serving(tmp_path / "c") as (server, url):
        corpus = Corpus(url, patience=QUICK)
        with pytest.raises(DataError, match=r"train-000000.tar.*FileNotFoundError.*\(1 try\)"):
            corpus.read("train", 0)
        assert [path for path, _ in server.requests].count("/shards/train-000000.tar") == 1
        with pytest.raises(DataError, match="this is no corpus"):
            Corpus(f"{url}/shards", patience=QUICK)
        server.trouble = lambda path, number: 403
        with pytest.raises(DataError, match=r"a file of the corpus cannot be read: .*manifest.json.*403.*\(1 try\)"):
            Corpus(url, patience=QUICK)


def test_a_server_that_does_not_answer_is_given_up(tiny_corpus):
    done = threading.Event()

    def silent(path, number):
        if "shards" in path:
            done.wait(20)

    with serving(tiny_corpus, trouble=silent) as (_, url):
        corpus = Corpus(url, patience=Patience(attempts=2, pause_s=0.01, timeout_s=0.2))
        _ = corpus.index
        started = time.monotonic()
        with pytest.raises(DataError, match=r"train-000000.tar.*\(2 tries\)"):
            corpus.read("train", 0)
        assert time.monotonic() - started < 10
        done.set()


def test_a_system_without_time_limits_of_its_own_gets_one(tiny_corpus, monkeypatch):
    corpus = Corpus(in_memory(tiny_corpus, "slow"), patience=Patience(attempts=1, timeout_s=0.1))
    _ = corpus.index
    released = threading.Event()
    monkeypatch.setattr(type(corpus.store._system), "cat_ranges", lambda *a, **k: released.wait(20))
    with pytest.raises(DataError, match="no answer within 0 s"):
        corpus.read("train", 0)
    released.set()


def test_a_truncated_remote_shard_loses_its_end_only(tiny_corpus, tmp_path):
    shutil.copytree(tiny_corpus, tmp_path / "c")
    shard = tmp_path / "c" / "shards" / "train-000000.tar"
    shard.write_bytes(shard.read_bytes()[: Corpus(tiny_corpus).index["train"].place(8)[1] + 700])
    for location in (tmp_path / "c", in_memory(tmp_path / "c", "short")):
        if isinstance(location, Path):
            corpus = Corpus(tiny_corpus)
            corpus.store = LocalStore(location)
        else:
            corpus = Corpus(location, patience=QUICK)
        tiles = corpus.read_places(corpus.index["train"].places(np.arange(10)))
        assert [bad.slot for bad in tiles.unreadable] == [8, 9]
        assert all("a shard ends early" in str(bad.error) for bad in tiles.unreadable)
        assert tiles.keys[:8] == [f"CTX_{n:04d}" for n in range(8)]
        assert corpus.keys_at([(bad.shard, bad.offset) for bad in tiles.unreadable]) == ["CTX_0008", "CTX_0009"]


def test_what_a_remote_corpus_gives_is_compared_with_the_manifest(tiny_corpus, tmp_path):
    shutil.copytree(tiny_corpus, tmp_path / "c")
    table = tmp_path / "c" / "index.parquet"
    raw = bytearray(table.read_bytes())
    raw[len(raw) // 2] ^= 1
    table.write_bytes(raw)
    with pytest.raises(DataError, match="a table was altered: memory://altered/index.parquet"):
        _ = Corpus(in_memory(tmp_path / "c", "altered")).index
    with pytest.raises(DataError, match="the corpus is not on this machine: memory://altered"):
        _ = Corpus("memory://altered").path


def test_unknown_protocols_and_missing_packages_say_what_to_do():
    with pytest.raises(ConfigError, match="the corpus cannot be reached: nosuch://x: .*Next: .*data.pipe"):
        open_store("nosuch://x")


# --- commands -------------------------------------------------------------------------------------------------


def piped(corpus, command, **patience):
    return Corpus(
        corpus, pipe=command, patience=Patience(**{"attempts": 2, "pause_s": 0.01, "timeout_s": 5} | patience)
    )


def test_a_failing_command_tells_its_exit_code_and_last_line(tiny_corpus, tmp_path):
    count = tmp_path / "count"
    corpus = piped(tiny_corpus, f"sh -c 'echo x >> {count}; echo first >&2; echo no such bucket >&2; exit 7' {{url}}")
    for _ in range(3):
        with pytest.raises(
            DataError, match=r"data.pipe failed: sh -c .*train-000000.tar: exit code 7: no such bucket \(2 tries"
        ):
            corpus.read("train", 0)
    assert count.read_text() == "x\n" * 2


def test_a_hanging_command_is_ended_with_all_it_started(tiny_corpus, tmp_path):
    started = time.monotonic()
    corpus = piped(
        tiny_corpus, f"sleep 60 & echo $! > {tmp_path}/pid; head -c 100 {{url}}; wait", attempts=1, timeout_s=0.3
    )
    with pytest.raises(DataError, match=r"no byte for 0.3 s after 100 of \d+"):
        corpus.read("train", 0)
    assert time.monotonic() - started < 5
    pid = int((tmp_path / "pid").read_text())
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            return
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the command's child lives on")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("head -c 100 {url}", r"it wrote 100 of \d+ bytes"),
        ("cat {url} {url}", r"it writes more than the \d+ bytes of the shard"),
        ("no-such-program-here {url}", "no-such-program-here: No such file"),
        ("cat {url} | tr a b", "a shard was altered.*sha256"),
        ("cat /nowhere/{name} | cat", "exit code 1: .*/nowhere/train-000000.tar"),
    ],
)
def test_a_command_that_gives_no_whole_shard_is_named(tiny_corpus, command, message):
    with pytest.raises(DataError, match=message):
        piped(tiny_corpus, command).read("train", 0)


def test_a_command_is_started_without_a_shell_where_possible():
    plain = Command("aws s3 cp '{url}' - --no-progress")
    assert plain.arguments("s3://a b/x.tar", "x.tar") == ["aws", "s3", "cp", "s3://a b/x.tar", "-", "--no-progress"]
    assert plain.arguments("$(reboot)", "x")[3] == "$(reboot)"
    shell = Command("cat {url} | zstd -d")
    assert shell.arguments("a b;c", "x")[-1] == "cat 'a b;c' | zstd -d" and "-c" in shell.arguments("a", "x")
    with pytest.raises(ConfigError, match="data.pipe is no command: cat '{url}: No closing quotation"):
        Command("cat '{url}")
    with pytest.raises(ConfigError, match="data.pipe is no command: ' '"):
        Command(" ")


def shard(name, raw):
    digest = hashlib.sha256(raw).hexdigest()
    return ShardEntry(name=name, split="train", samples=1, bytes=len(raw), sha256=digest)


def test_the_buffer_is_bounded_and_drops_the_least_recently_used():
    contents = {name: bytes([number]) * 400_000 for number, name in enumerate("abcd")}
    entries = {name: shard(name, raw) for name, raw in contents.items()}
    buffer, loads = ShardBuffer(1), []

    def load(entry):
        loads.append(entry.name)
        assert buffer.nbytes + entry.bytes <= 1 << 20
        return contents[entry.name]

    def read(names):
        return [bytes(part) for part in buffer.read("c", [(entries[n], 5, 3) for n in names], load)]

    assert read("aabb") == [b"\0\0\0"] * 2 + [b"\1\1\1"] * 2 and loads == ["a", "b"]
    assert read("ac") == [b"\0\0\0", b"\2\2\2"] and loads == ["a", "b", "c"]
    assert read("ab") and loads == ["a", "b", "c", "b"] and buffer.nbytes == 800_000
    entries["e"], contents["e"] = shard("e", bytes(1_100_000)), b""
    (error,) = buffer.read("c", [(entries["e"], 0, 1)], load)
    with pytest.raises(
        DataError, match=r"a shard is larger than the buffer: c/shards/e: 1,100,000 bytes.*buffer_mb=2 "
    ):
        raise error
    assert loads == ["a", "b", "c", "b"]


def test_the_buffer_refuses_altered_and_short_shards_once():
    entry, loads = shard("a", b"right"), []
    for given, message in (
        (b"wrong", "a shard was altered: c/shards/a"),
        (b"righ", "another size.*c/shards/a: 4 bytes"),
    ):
        buffer = ShardBuffer(1)
        for _ in range(2):
            (error,) = buffer.read("c", [(entry, 0, 1)], lambda entry, given=given: loads.append(given) or given)
            with pytest.raises(DataError, match=message):
                raise error
    assert loads == [b"wrong", b"righ"]


def test_a_piped_corpus_may_have_its_shards_elsewhere(tiny_corpus, tmp_path):
    shutil.copytree(tiny_corpus, tmp_path / "c")
    shutil.move(tmp_path / "c" / "shards", tmp_path / "elsewhere")
    with pytest.raises(DataError, match="a shard is missing"):
        Corpus(tmp_path / "c")
    corpus = Corpus(tmp_path / "c", pipe=f"cat {tmp_path}/elsewhere/{{name}}", verify=True)
    assert isinstance(corpus.store, PipeStore) and corpus.notes[0].endswith("as they arrive, not before the start")
    assert_same(corpus, Corpus(tiny_corpus))


def test_runs_of_a_missing_local_shard_are_errors_in_their_places(tiny_corpus):
    store, shards = LocalStore(tiny_corpus), Corpus(tiny_corpus).manifest.shards
    missing = ShardEntry(name="gone.tar", split="train", samples=1, bytes=512, sha256="")
    first, error, last = store.read([Run(shards[0], 0, 8), Run(missing, 0, 8), Run(shards[1], 0, 4)])
    assert len(first) == 8 and len(last) == 4
    with pytest.raises(DataError, match="a shard cannot be opened: .*gone.tar: No such file"):
        raise error
