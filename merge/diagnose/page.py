"""The page of a diagnosis: figures, tables and what they mean, in one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from momo.pages import Picture, page_style, template_environment

from .landscape import mean_loss
from .plots import MEAN, plot_cka, plot_lines, plot_plane, plot_task_vectors

TEMPLATES = Path(__file__).parent / "templates"


def number(value: float | None, digits: int = 4) -> str:
    """Writes a figure for a table; a dash where it is not defined."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """Writes a share as per cent."""
    return "-" if value is None else f"{100 * value:.1f} %"


def pictures(report: dict[str, Any]) -> dict[str, Picture]:
    """Draws every figure that the report has numbers for, by name."""
    found: dict[str, Picture] = {}

    def add(name: str, png: bytes, alt: str, width: int) -> None:
        found[name] = Picture(name, png, alt, width=width)

    if report["task_vectors"] is not None:
        alt = "Norm, energy, cosine and sign conflict of the task vectors, layer by layer"
        add("task_vectors", plot_task_vectors(report["task_vectors"]), alt, 1000)
    if (losses := report["losses"]) is not None:
        if losses["lines"]:
            add("lines", plot_lines(losses), "Validation loss along the lines between checkpoints", 1000)
        if losses["plane"] is not None:
            corners = ", ".join(losses["plane"]["corners"])
            add("plane", plot_plane(losses), f"Validation loss on the plane through {corners}, as contours", 960)
    if report["cka"] is not None:
        add("cka", plot_cka(report["cka"]), "Likeness of the encoders' features, block by block", 900)
    return found


def vector_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a row a task vector: norm, share of the base's norm, and cosine with each."""
    vectors = report["task_vectors"]
    if vectors is None:
        return []
    own = vectors["overall"]
    return [
        {
            "name": name,
            "norm": f"{own['norm'][place]:.4g}",
            "relative": percent(own["relative"][place]),
            "cosines": [number(value, 3) for value in own["cosine"][place]],
        }
        for place, name in enumerate(vectors["parents"])
    ]


def loss_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a row a model: its losses by sensor with their mean, and where it lies with respect to the plane."""
    losses = report["losses"]
    if losses is None:
        return []
    marks = {mark["name"]: mark for mark in (losses["plane"] or {"marks": []})["marks"]}
    rows = []
    for name, own in losses["models"].items():
        cells = [
            number(own[sensor]["loss"]) + ("" if own[sensor]["stderr"] is None else f" ± {own[sensor]['stderr']:.4f}")
            if own
            else "not finite"
            for sensor in losses["sensors"]
        ]
        mark = marks.get(name)
        where = "" if mark is None else "on it" if mark["on_plane"] else f"{mark['distance']:.3g} off"
        rows.append(
            {"name": name, "cells": cells, "mean": number(mean_loss(own)) if own else "not finite", "plane": where}
        )
    return rows


def barrier_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a row a line: its ends, its barriers by sensor and of the mean, and its lowest mean."""
    losses = report["losses"]
    if losses is None:
        return []
    keys = [*losses["sensors"], MEAN]
    rows = []
    for line in losses["lines"]:
        place = line["lowest_mean"]
        rows.append(
            {
                "name": f"{line['first']} - {line['second']}",
                "cells": [number(line["barrier"][key]) for key in keys],
                "lowest": "-" if place is None else f"{place[1]:.4f} at {place[0]:g}",
            }
        )
    return rows


def render(report: dict[str, Any], drawn: dict[str, Picture]) -> str:
    """Returns the page as one HTML document that needs nothing beside it."""
    environment = template_environment(TEMPLATES, "eval", html=True, number=number, percent=percent)
    return str(
        environment.get_template("diagnose.html").render(
            report=report,
            pictures=drawn,
            vectors=vector_rows(report),
            losses=loss_rows(report),
            barriers=barrier_rows(report),
            css=page_style(TEMPLATES / "diagnose.css", "eval"),
        )
    )


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Writes `report.html` and the figures into an existing folder."""
    drawn = pictures(report)
    for name, picture in drawn.items():
        (folder / f"{name}.png").write_bytes(picture.png)
    (folder / "report.html").write_text(render(report, drawn), encoding="utf-8")
