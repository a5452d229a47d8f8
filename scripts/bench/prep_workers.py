"""Times `momo prep` on one and on two Dask workers with the same products, and compares the corpora byte for byte.

python scripts/bench/prep_workers.py                 16 scenes of 4,000 x 4,000 pixels
python scripts/bench/prep_workers.py scenes=8 side=2000

The workers run already, with their packages imported, when the clock starts: that time does not grow with the work.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import time
from pathlib import Path

from distributed import Client, LocalCluster
from prep import write_scene

from momo.config import config_from_dict
from momo.corpus import Corpus
from momo.data_prep import tiling
from momo.data_prep.config import PrepConfig
from momo.data_prep.run import prep

SETTINGS = {"scenes": 16, "side": 4000}
REPEATS = 2


def warm() -> str:
    """Imports what a worker needs."""
    return tiling.__name__


def timed(workers: int, raw: Path, out: Path) -> float:
    """Returns the seconds of one run on a cluster of that many workers."""
    with (
        LocalCluster(
            n_workers=workers, threads_per_worker=1, dashboard_address=None, silence_logs=logging.CRITICAL
        ) as cluster,
        Client(cluster) as client,
    ):
        client.run(warm)
        values = {
            "products": [str(raw)], "out": str(out), "sensor": "CTX", "scheduler": cluster.scheduler_address,
            "duplicates": {"max_overlap": None, "max_distance": None},
        }  # fmt: skip
        started = time.perf_counter()
        prep(config_from_dict(PrepConfig, values), report=lambda line: None)
        return time.perf_counter() - started


def main() -> None:
    """Prints seconds of each and the ratio."""
    for item in sys.argv[1:]:
        key, _, value = item.partition("=")
        SETTINGS[key] = int(value)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    prints = set()
    with tempfile.TemporaryDirectory() as name:
        raw = Path(name) / "raw"
        raw.mkdir()
        for number in range(SETTINGS["scenes"]):
            write_scene(raw / f"scene{number:02d}.tif", SETTINGS["side"], SETTINGS["side"])
        for repeat in range(REPEATS):
            for workers in seconds:
                out = Path(name) / f"corpus-{workers}-{repeat}"
                seconds[workers].append(timed(workers, raw, out))
                prints.add(Corpus(out).manifest.fingerprint)
    one, two = min(seconds[1]), min(seconds[2])
    print(
        f"{SETTINGS['scenes']} scenes of {SETTINGS['side']} x {SETTINGS['side']}: "
        f"one worker {one:.2f} s, two {two:.2f} s"
    )
    print(f"ratio {one / two:.2f}; the same bytes each time: {len(prints) == 1}")


if __name__ == "__main__":
    main()
