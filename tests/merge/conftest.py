"""A small project: a base and one hand-made run a sensor."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import write_weights
from tests.merge.runs_helper import LOSSES, SENSORS, write_run


@pytest.fixture(scope="package")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    base = write_weights(root / "base")
    for number, (sensor, losses) in enumerate(zip(SENSORS, LOSSES, strict=True), start=1):
        write_run(root / sensor, base, sensor, losses, seed=number)
    return root


@pytest.fixture
def copy(project: Path, tmp_path: Path) -> Path:
    """A project that a test may damage; the runs name the copy's own base."""
    root = tmp_path / "project"
    shutil.copytree(project, root)
    for sensor in SENSORS:
        config = root / sensor / "config.yaml"
        config.write_text(config.read_text().replace(str(project), str(root)))
    return root
