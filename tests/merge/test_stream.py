"""Streaming against whole models in memory, and what happens when it cannot go on."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from momo.errors import MergeError
from momo.merge import METHODS, MergeConfig, make_plan, merge, merged_state
from momo.merge import stream as stream_file
from momo.merge.fisher_files import FISHER_KEY
from momo.merge.writer_process import WriterProcess
from momo.weights import load_card

SHAPES = {"blocks.0.weight": (40, 70), "blocks.1.weight": (700,), "norm.weight": (3,), "scalar": (), "none": (0, 4)}
FAIL_AT_4_KB = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
from momo.cli import main
sys.exit(main(sys.argv[1:]))
"""
GROWTH = """
import re, sys
from pathlib import Path
from momo.merge import MergeConfig, make_plan
from momo.merge.stream import write_merged

def own():  # kilobytes of memory that no file stands for
    return int(re.search(r"RssAnon:\\s+([0-9]+)", Path("/proc/self/status").read_text())[1])

def grown(folder, method):
    models = {name: str(folder / f"{name}.safetensors") for name in "ab"}
    plan = make_plan(MergeConfig(base=str(folder / "base.safetensors"), models=models, out="none", method=method))
    before, seen = own(), []
    write_merged(plan, folder / "out.safetensors", {}, lambda size: seen.append(own()))
    return max(seen) - before

for method in ("task_arithmetic", "model_stock"):
    grown(Path(sys.argv[1]), method)  # what is loaded once
    print(method, grown(Path(sys.argv[2]), method))
"""


@pytest.fixture
def folder(tmp_path):
    """A base and three models with float32, half-precision and integer tensors, and Fisher files."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    base["half"] = torch.randn(50, generator=generator).bfloat16()
    base["count"] = torch.arange(5)
    save_file(base, tmp_path / "base.safetensors")
    for name in "abc":
        tuned = {
            key: tensor + 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
            if tensor.is_floating_point()
            else tensor
            for key, tensor in base.items()
        }
        save_file(tuned, tmp_path / f"{name}.safetensors")
        fisher = {key: torch.rand(tensor.shape, generator=generator) for key, tensor in base.items()}
        write_fisher(tmp_path, name, fisher)
    return tmp_path


def write_fisher(folder, name, fisher):
    digest = hashlib.sha256((folder / f"{name}.safetensors").read_bytes()).hexdigest()
    meta = {FISHER_KEY: json.dumps({"checkpoint_sha256": digest})}
    save_file(fisher, folder / f"fisher-{name}.safetensors", metadata=meta)


def job(folder, method, **options):
    names = "ab" if METHODS[method].parents == 2 else "abc"
    if "fisher" in METHODS[method].uses:
        options = {"fisher": {name: str(folder / f"fisher-{name}.safetensors") for name in names}} | options
    models = {name: str(folder / f"{name}.safetensors") for name in names}
    fields = {"base": str(folder / "base.safetensors"), "models": models, "out": str(folder / "out"), "method": method}
    return MergeConfig(**(fields | options))


@pytest.fixture(params=[(64, False), (2**18, False), (64, True)], ids=["cut", "whole", "two-processes"])
def pieces(request, monkeypatch):
    """Cut tensors or whole ones, written here or by a second process."""
    monkeypatch.setattr(stream_file, "PIECE", request.param[0])
    monkeypatch.setattr(stream_file, "_is_long", lambda plan: request.param[1])


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("method", METHODS)
def test_streamed_is_bit_for_bit_what_memory_gives(folder, method, precision):
    config = job(folder, method, precision=precision)
    merge(config)
    streamed, expected = load_file(folder / "out/model.safetensors"), merged_state(make_plan(config))
    assert streamed.keys() == expected.keys()
    for name, tensor in expected.items():
        assert streamed[name].dtype == tensor.dtype and streamed[name].shape == tensor.shape
        assert torch.equal(streamed[name], tensor), name
    assert load_card(folder / "out", check_hash=True).method["name"] == method


@pytest.mark.parametrize("method", METHODS)
def test_threads_and_order_change_no_bit(folder, method, monkeypatch):
    monkeypatch.setattr(stream_file, "PIECE", 64)
    hashes, before = set(), torch.get_num_threads()
    try:
        for threads, turned in ((1, False), (2, True), (4, False)):
            torch.set_num_threads(threads)
            config = job(folder, method, overwrite=True)
            if turned:
                config.models = dict(reversed(config.models.items()))
            merge(config)
            assert torch.get_num_threads() == threads
            hashes.add(load_card(folder / "out").sha256)
    finally:
        torch.set_num_threads(before)
    assert len(hashes) == 1


def test_a_long_result_is_written_by_a_second_process(folder, monkeypatch):
    started = []

    class Watched(WriterProcess):
        def __init__(self, file: int) -> None:
            started.append(file)
            super().__init__(file)

    monkeypatch.setattr("momo.merge.safetensors_file.WriterProcess", Watched)
    merge(job(folder, "average"))
    size = sum(tensor.nbytes for tensor in load_file(folder / "out/model.safetensors").values())
    hashes = {load_card(folder / "out").sha256}
    for cores, least, expected in ((2, size + 1, 0), (1, size, 0), (2, size, 1)):
        monkeypatch.setattr(stream_file, "usable_cores", lambda cores=cores: cores)
        monkeypatch.setattr(stream_file, "_LONG", least)
        merge(job(folder, "average", overwrite=True))
        assert len(started) == expected
        hashes.add(load_card(folder / "out", check_hash=True).sha256)
    assert len(hashes) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """A model of 64 MB in tensors of 4 MB: its own memory grows by a few tensors, not by the model."""
    for count in (1, 16):
        (tmp_path / str(count)).mkdir()
        for name in ("base", "a", "b"):
            tensors = {f"{number}.weight": torch.randn(2**20) for number in range(count)}
            save_file(tensors, tmp_path / str(count) / f"{name}.safetensors")
    command = [sys.executable, "-c", GROWTH, str(tmp_path / "1"), str(tmp_path / "16")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown = {method: int(kilobytes) for method, kilobytes in (line.split() for line in done.stdout.split("\n")[:-1])}
    assert set(grown) == {"task_arithmetic", "model_stock"}
    assert all(kilobytes < 5 * 4096 for kilobytes in grown.values()), grown


def test_ties_over_the_whole_model_equals_its_formula(folder):
    """Trimmed over all entries together, as in the paper; written anew in float64."""
    merge(job(folder, "ties", density=0.3, coefficient=0.7, exclude=["half", "count"]))
    merged = load_file(folder / "out/model.safetensors")
    base = load_file(folder / "base.safetensors")
    names = sorted(SHAPES)
    start = torch.cat([base[name].reshape(-1) for name in names]).double()
    vectors = []
    for model in "abc":
        tuned = load_file(folder / f"{model}.safetensors")
        vector = torch.cat([(tuned[name] - base[name]).reshape(-1) for name in names]).double()
        least = vector.abs().sort(descending=True).values[round(0.3 * len(vector)) - 1]
        vectors.append(torch.where(vector.abs() >= least, vector, 0.0))
    stacked = torch.stack(vectors)
    agrees = (stacked.sign() == stacked.sum(0).sign()) & (stacked != 0)
    expected = start + 0.7 * (stacked * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    seen = torch.cat([merged[name].reshape(-1) for name in names]).double()
    torch.testing.assert_close(seen, expected, atol=1e-6, rtol=0)


def test_the_file_is_what_safetensors_writes(folder):
    merge(job(folder, "average"))
    with safe_open(folder / "out/model.safetensors", framework="pt") as file:
        card = json.loads(file.metadata()["momo_card"])
        assert card["kind"] == "merged" and card["sha256"] == ""
        assert file.metadata()["format"] == "pt"
    again, tensors = folder / "again.safetensors", load_file(folder / "out/model.safetensors")
    save_file(tensors, again)
    assert all(torch.equal(tensor, load_file(again)[name]) for name, tensor in tensors.items())
    written = (folder / "out/model.safetensors").read_bytes()
    assert hashlib.sha256(written).hexdigest() == load_card(folder / "out").sha256
    size = int.from_bytes(written[:8], "little")
    assert size % 8 == 0
    places = {
        name: entry["data_offsets"][0] for name, entry in json.loads(written[8 : 8 + size]).items() if "dtype" in entry
    }
    # Wide dtypes first, so that every tensor lies where its width wants it.
    assert places["count"] == 0 and places["half"] == max(places.values())


def test_dtype_of_the_result(folder):
    merge(job(folder, "average", dtype="bfloat16"))
    merged, whole = load_file(folder / "out/model.safetensors"), merged_state(make_plan(job(folder, "average")))
    assert merged["count"].dtype == torch.int64
    assert torch.equal(merged["norm.weight"], whole["norm.weight"].bfloat16())
    merge(job(folder, "average", dtype="bfloat16", exclude=["norm.weight"], overwrite=True))
    taken = load_file(folder / "out/model.safetensors")["norm.weight"]
    assert torch.equal(taken, load_file(folder / "base.safetensors")["norm.weight"].bfloat16())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("model", ["base", "b"])
@pytest.mark.parametrize("method", METHODS)
def test_numbers_that_are_not_finite_are_refused(folder, method, model, value, monkeypatch):
    monkeypatch.setattr(stream_file, "PIECE", 64)
    merge(job(folder, "average"))
    before = load_card(folder / "out").sha256
    tensors = load_file(folder / f"{model}.safetensors")
    tensors["blocks.0.weight"][1, 2] = value
    save_file(tensors, folder / f"{model}.safetensors")
    if model == "b":
        write_fisher(folder, "b", load_file(folder / "fisher-b.safetensors"))
    config = job(folder, method, overwrite=True)
    if model == "base" and not METHODS[method].needs_base:
        merge(config)  # the values of the base play no part
        return
    with pytest.raises(MergeError, match=rf"a parent is not finite: blocks.0.weight of .*{model}.safetensors"):
        merge(config)
    assert load_card(folder / "out", check_hash=True).sha256 == before
    assert not list(folder.glob(".*partial*"))


def test_a_tensor_that_is_taken_over_must_be_finite_too(folder):
    tensors = load_file(folder / "base.safetensors")
    tensors["half"][7] = float("nan")
    save_file(tensors, folder / "base.safetensors")
    config = job(folder, "average", exclude=["half"])
    with pytest.raises(MergeError, match=r"a parent is not finite: half of .*base.safetensors"):
        merge(config)
    with pytest.raises(MergeError, match=r"a parent is not finite: half of .*base.safetensors"):
        merged_state(make_plan(config))
    merge(job(folder, "average", exclude=["half"], rest="drop"))


def test_a_result_that_overflows_is_refused(folder):
    with pytest.raises(MergeError, match="the merged weights are not finite: blocks.0.weight"):
        merge(job(folder, "task_arithmetic", coefficient=1e6, dtype="float16"))
    assert not (folder / "out").exists()


def test_finite_numbers_whose_sum_is_not_are_merged(folder):
    for name in ("base", "a", "b", "c"):
        path = folder / f"{name}.safetensors"
        save_file(load_file(path) | {"large": torch.full((9,), 3e38)}, path)
    merge(job(folder, "task_arithmetic"))
    assert torch.equal(load_file(folder / "out/model.safetensors")["large"], torch.full((9,), 3e38))


def test_integers_that_differ_are_refused(folder):
    tensors = load_file(folder / "b.safetensors")
    tensors["count"][0] = 7
    save_file(tensors, folder / "b.safetensors")
    with pytest.raises(MergeError, match="an integer tensor differs: count"):
        merge(job(folder, "average"))
    merge(job(folder, "average", exclude=["count"]))


def test_a_fisher_file_must_be_of_the_checkpoint(folder):
    places = {name: str(folder / f"fisher-{name}.safetensors") for name in "abc"}
    for changed, message in (
        ({**places, "a": places["b"]}, "a Fisher file is of another checkpoint"),
        ({**places, "a": str(folder / "a.safetensors")}, "this is no Fisher file"),
        ({name: places[name] for name in "ab"}, "a checkpoint has no Fisher file: c"),
        ({**places, "d": places["a"]}, "fisher names a checkpoint that is not merged: d"),
    ):
        with pytest.raises(MergeError, match=message):
            merge(job(folder, "fisher", fisher=changed))
    write_fisher(folder, "a", load_file(places["a"]) | {"norm.weight": torch.ones(4)})
    with pytest.raises(MergeError, match="a Fisher file does not fit its checkpoint: .*norm.weight"):
        merge(job(folder, "fisher"))


def test_a_full_disk_leaves_the_old_output(folder):
    merge(job(folder, "average"))
    before = load_card(folder / "out").sha256
    options = [f"models.{name}={folder / name}.safetensors" for name in "abc"]
    options += ["method=average", "overwrite=true", f"out={folder / 'out'}"]
    command = [sys.executable, "-c", FAIL_AT_4_KB, "merge", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "momo: error: the disk is full" in done.stderr, done.stderr
    assert load_card(folder / "out", check_hash=True).sha256 == before
    assert not list(folder.glob(".*partial*"))


def test_a_target_that_takes_no_more_bytes(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with stream_file.SafetensorsWriter(tmp_path / "pipe", {}, {}) as writer:
        os.close(reader)
        with pytest.raises(MergeError, match="the merged weights cannot be written: .*Broken pipe"):
            writer.write(torch.zeros(3))


def test_a_dtype_that_cannot_be_written(folder):
    for name in ("base", "a", "b", "c"):
        path = folder / f"{name}.safetensors"
        save_file(load_file(path) | {"eight": torch.zeros(3).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(MergeError, match="a tensor has a dtype that momo cannot write: eight: F8_E4M3"):
        merge(job(folder, "average"))
    merge(job(folder, "average", exclude=["eight"], rest="drop"))


def test_too_little_room_is_told_before_writing(folder, monkeypatch):
    monkeypatch.setattr("momo.merge.merging.free_bytes", lambda place: 1000)
    with pytest.raises(MergeError, match="the disk is full: 0 MB free.*the merged weights take"):
        merge(job(folder, "average"))
    assert not (folder / "out").exists()
