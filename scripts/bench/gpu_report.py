"""Tables and words for what gpu.py measured."""

from __future__ import annotations

from typing import Any

# A loader that keeps up leaves the device waiting less than this share of the time.
GOAL_WAIT = 0.02


def bound_by(entry: dict[str, Any], report: dict[str, Any]) -> str:
    """Says what bounds a trainer, from the measurements alone.

    Args:
        entry: Its row.
        report: All measurements.
    """
    alone, rate = entry["alone"]["images_per_s"], entry["images_per_s"]
    loader = max(row["images_per_s"] for row in report["loader"])
    spent = ", ".join(f"{name} {share:.0%}" for name, share in entry["shares"].items())
    if entry["data_wait"] > GOAL_WAIT:
        wait = f"{entry['data_wait']:.1%}"
        why = f"the loader: steps wait {wait} of the time for data, of which it delivers {loader:,.0f} images/s alone"
    elif rate < 0.95 * alone:
        why = f"what is between the steps: {rate:,.0f} images/s, the steps alone do {alone:,.0f}"
    else:
        why = "computing"
    text = f"bound by {why}; of a step {spent}"
    if entry["mfu"] is not None:
        floor = entry["mfu"] * report["peak_tflops"] / report["product_tflops"]
        text += (
            f"; matrix products at the rate of one large product ({report['product_tflops']:.0f} TFLOP/s) would take "
            f"{floor:.0%} of the time, the rest is elementwise work, attention and the optimizer, bound by memory"
        )
    return text


def percent(share: float | None) -> str:
    """A share for people; a dash when it is not known."""
    return "-" if share is None else f"{share:.1%}"


def markdown(report: dict[str, Any], pixels: int, mask_ratio: float) -> str:
    """Returns the tables for docs/performance.md.

    Args:
        report: What gpu.json holds.
        pixels: Side of the tiles.
        mask_ratio: Share of patches hidden.
    """
    device, product = report["device"], report.get("product_tflops")
    where = "one GPU" if device["kind"] == "cuda" else "a trial of the bench without a GPU"
    lines = [
        f"{device['name']} ({device['detail']}), PyTorch {report['torch']}, {where}, {pixels} px, patch 16, 1 channel, "
        f"mask {mask_ratio}, bf16 with fp32 master weights (ZeRO 1), fused AdamW, generated 8-bit tiles. Peak "
        f"{report['peak_tflops'] or '?'} TFLOP/s"
        + (f"; one large bf16 product reaches {product:.3g} TFLOP/s." if product else "."),
        "",
        "| trainer with loader | mode | batch | images/s | MFU | peak memory, GiB | data wait | reading processes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in report["trainer"]:
        lines.append(
            f"| {row['model']} | {row['mode']} | {row['batch']} | {row['images_per_s']:,.0f} | {percent(row['mfu'])} | "
            f"{row['memory_gib']:.1f} | {percent(row['data_wait'])} | {row['workers']} |"
        )
    lines += ["", *(f"- {row['model']}: {row['bound']}." for row in report["trainer"]), ""]
    lines += ["| steps alone | mode | batch | images/s | MFU | peak memory, GiB |", "|---|---|---|---|---|---|"]
    for row in report["steps"]:
        figures = (
            f"{row['images_per_s']:,.0f} | {percent(row['mfu'])} | {row['memory_gib']:.1f}"
            if row["fits"]
            else "out of memory | - | -"
        )
        lines.append(f"| {row['model']} | {row['mode']} | {row['batch']} | {figures} |")
    lines += ["", "| loader alone, reading processes | images/s |", "|---|---|"]
    lines += [f"| {row['workers']} | {row['images_per_s']:,.0f} |" for row in report["loader"]]
    return "\n".join(lines) + "\n"
