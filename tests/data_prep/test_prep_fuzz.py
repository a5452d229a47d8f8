"""Damaged labels and files: an error of ours or the right pixels, never a crash, a hang, or a wrong pixel unsaid."""

from __future__ import annotations

import multiprocessing
import re
import resource
from collections import Counter
from pathlib import Path

import numpy as np

from momo.data_prep.products import open_product, quiet_gdal, read_window
from momo.errors import MomoError
from tests.data_prep.products import (
    gdal,
    inspect_file,
    terrain,
    write_detached,
    write_isis3,
    write_pds3,
    write_raster,
    write_records,
    write_vicar,
)

CASES, SECONDS, SEED = 500, 20, 20240
HEIGHT, WIDTH, TILE = 72, 64, 32
# Memory that the worker may take on top of what it has after its first product.
MOST_BYTES = 512 << 20


def words(kind: str = "<i2") -> np.ndarray:
    return (terrain(HEIGHT, WIDTH, seed=3) * 3000 + 100).astype(kind)


def octets() -> np.ndarray:
    return (terrain(HEIGHT, WIDTH, seed=4) * 200 + 20).astype("u1")


def jpeg2000(path: Path) -> Path:
    memory = gdal.GetDriverByName("MEM").Create("", WIDTH, HEIGHT, 1, gdal.GDT_UInt16)
    memory.WriteArray(words("<u2"))
    gdal.GetDriverByName("JP2OpenJPEG").CreateCopy(str(path), memory, options=["REVERSIBLE=YES", "QUALITY=100"])
    return path


# Each writes a product and returns what is opened, the file whose start is the label, and the label's length.
def makers() -> dict:
    tiles = ["TILED=YES", "BLOCKXSIZE=32", "BLOCKYSIZE=16"]
    return {
        "pds3": lambda f: write_records(f / "a.img", words(">i2")),
        "pds3-bytes": lambda f: write_records(f / "a.img", octets()),
        "pds3-extra": lambda f: write_pds3(f / "a.img", octets(), prefix=18, suffix=16),
        "pds3-detached": lambda f: write_detached(f / "a.lbl", words(">i2")),
        "pds4": lambda f: write_raster(f / "a.xml", words(), driver="PDS4"),
        "isis3": lambda f: write_isis3(f / "a.cub", words("<f4")),
        "isis3-tiled": lambda f: write_isis3(f / "a.cub", words(), tile=(32, 24)),
        "vicar": lambda f: write_vicar(f / "a.vic", words()),
        "tiff": lambda f: write_raster(f / "a.tif", words(), options=["COMPRESS=DEFLATE"]),
        "tiff-plain": lambda f: write_raster(f / "a.tif", words(), options=tiles),
        "jp2": lambda f: jpeg2000(f / "a.jp2"),
    }


TEXT = ("pds3", "pds3-bytes", "pds3-extra", "pds3-detached", "pds4", "isis3", "isis3-tiled", "vicar")


def label_length(form: str, path: Path, data: bytes) -> int:
    if form.startswith("tiff"):
        dataset = gdal.Open(str(path))  # held: a band does not keep its dataset
        return int(dataset.GetRasterBand(1).GetMetadataItem("BLOCK_OFFSET_0_0", "TIFF"))
    if form.startswith("pds3"):
        return data.index(b"\nEND\r\n") + 6
    if form.startswith("isis3"):
        return data.index(b"\nEnd\n") + 5
    if form == "vicar":
        return data.index(b"\0")
    if form == "jp2":
        # The coding parameters (COD, QCD) and the coded data behind them carry no check: any value decodes.
        return data.index(b"\xff\x52")
    return len(data)


def mutate(form: str, data: bytes, length: int, rng: np.random.Generator) -> tuple[bytes, str]:
    """Damages a label, or cuts the file; returns the new bytes and what was done."""
    head, tail = data[:length], data[length:]
    kinds = ["flip", "digit", "cut", "junk"] + (["drop", "double", "swap"] if form in TEXT else [])
    kind = kinds[rng.integers(len(kinds))]
    if kind == "cut":
        place = int(rng.integers(len(data)))
        return data[:place], f"cut at {place}"
    if kind == "junk":
        place, junk = int(rng.integers(length + 1)), rng.bytes(int(rng.integers(1, 200)))
        return head[:place] + junk + head[place:] + tail, f"{len(junk)} bytes inserted at {place}"
    if kind in ("flip", "digit"):
        places = [m.start() for m in re.finditer(rb"\d", head)] if kind == "digit" else range(length)
        if not places:
            return data, "nothing"
        place = int(places[rng.integers(len(places))])
        new = (rng.integers(48, 58) if kind == "digit" else head[place] ^ (1 << rng.integers(8))).astype(np.uint8)
        return head[:place] + new.tobytes() + head[place + 1 :] + tail, f"byte {place} becomes {new.tobytes()!r}"
    separator = b"  " if form == "vicar" else b"\n"
    lines = head.split(separator)
    first, second = (int(rng.integers(len(lines))) for _ in range(2))
    if kind == "drop":
        done = f"dropped {lines[first]!r}"
        del lines[first]
    elif kind == "double":
        done = f"doubled {lines[first]!r} before line {second}"
        lines.insert(second, lines[first])
    else:
        pattern = rb"(.*?>)([^<]*)(<.*)" if form == "pds4" else rb"(.*?=\s*)(\S.*?)(\s*)"
        found = [(n, m) for n, line in enumerate(lines) if (m := re.fullmatch(pattern, line, re.DOTALL))]
        (a, left), (b, right) = (found[rng.integers(len(found))] for _ in range(2))
        lines[a], lines[b] = left[1] + right[2] + left[3], right[1] + left[2] + right[3]
        done = f"swapped {left[0]!r} and {right[0]!r}"
    head = separator.join(lines)
    if form in ("pds3", "pds3-bytes", "pds3-extra", "isis3", "isis3-tiled", "vicar") and rng.integers(2):
        # An editor that keeps the padding: the pixels stay where they are.
        padding = len(tail) - len(tail.lstrip(b" \0"))
        if length - len(head) + padding >= 0:
            head, tail = head.ljust(length + padding, tail[:1]), tail[padding:]
            done += ", padded again"
    return head + tail, done


def examine(path: Path, image: np.ndarray, notes: tuple[str, ...]) -> str:
    """Returns "" for an error of ours or a right product, else what is wrong with it.

    A product is right when each pixel that it calls valid has the value of the undamaged product at that place. What
    a label alone can say is not judged: scale, map coordinates, identifiers, and which values are no measurement
    (a pixel that the damage makes valid must still have its old value). A label may declare fewer lines than the file
    has: the lines it declares are compared. A note beyond those of the undamaged product warns the user, so such a
    product counts as flagged.
    """
    try:
        product = inspect_file(path)
        if set(product.notes) - set(notes):
            return ""
        with quiet_gdal():
            dataset = open_product(product)
            if product.width > WIDTH or product.height > HEIGHT:
                return f"{product.width} x {product.height} pixels"
            for row in range(0, product.height, TILE):
                for col in range(0, product.width, TILE):
                    size = min(TILE, product.width - col), min(TILE, product.height - row)
                    raw, valid = read_window(dataset, product, col, row, *size)
                    same = raw == image[row : row + size[1], col : col + size[0]]
                    if not same[valid].all():
                        wrong = int((~same & valid).sum())
                        return (
                            f"{wrong} wrong pixels of {valid.sum()} at {col}, {row}; {product.width} x {product.height}"
                        )
    except MomoError:
        pass
    return ""


def work(connection) -> None:
    """Examines products until told None; answers with what is wrong and the memory taken so far."""
    while (job := connection.recv()) is not None:
        try:
            answer = examine(*job)
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        connection.send((answer, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


class Worker:
    """A process of its own, so that a crash or a hang of GDAL is seen and survived."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *job) -> tuple[str, int]:
        try:
            self.connection.send(job)
            if self.connection.poll(SECONDS):
                return self.connection.recv()
            answer = f"it hangs: no answer in {SECONDS} s"
        except (EOFError, OSError):
            self.process.join()
            answer = f"the process died with exit code {self.process.exitcode}"
        self.stop()
        self.__init__()
        return answer, 0

    def stop(self):
        self.process.kill()
        self.process.join()


def test_damaged_products_are_errors_or_right(tmp_path):
    forms = makers()
    rng = np.random.default_rng(SEED)
    originals = {}
    for form, make in forms.items():
        (tmp_path / form).mkdir()
        path = make(tmp_path / form)
        product = inspect_file(path)
        image, valid = read_window(open_product(product), product, 0, 0, WIDTH, HEIGHT)
        assert valid.mean() > 0.99
        data = path.read_bytes()
        originals[form] = (path, data, image, product.notes, label_length(form, path, data))
    worker, failures, seen, base = Worker(), [], Counter(), 0
    try:
        for number in range(CASES):
            form = list(forms)[number % len(forms)]
            path, data, image, notes, length = originals[form]
            damaged, done = mutate(form, data, length, rng)
            path.write_bytes(damaged)
            answer, memory = worker.ask(path, image, notes)
            base = base or memory
            if not answer and memory > base + MOST_BYTES:
                answer = f"it took {memory >> 20} MiB of memory"
            seen[form] += 1
            if answer:
                failures.append(f"case {number}, {form}, {done}: {answer}")
            path.write_bytes(data)
        for form, (path, _, image, notes, _) in originals.items():
            assert worker.ask(path, image, notes)[0] == "", f"undamaged {form}"
    finally:
        worker.stop()
    assert sum(seen.values()) == CASES
    assert not failures, "\n".join([f"{len(failures)} of {CASES}", *failures])
