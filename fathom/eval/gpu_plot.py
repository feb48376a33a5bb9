"""The figures of `fathom bench gpu` below the device's two limits: a roofline.

Paper: none (measurement).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fathom.errors import ConfigError
from fathom.eval.plot import _FAINT, _INK, FORMATS, _new_figure

DECODE, PREFILL = "#1f5fbf", "#e07b1a"


def plot_roofline(report: dict[str, Any], file: Path) -> None:
    """Draw every row's operations per second against its operations per byte.

    report: what `fathom bench gpu` writes as JSON. Raises MissingDependency without matplotlib, and
    ConfigError where `file` cannot be written or is no picture.
    """
    if file.suffix.lower() not in FORMATS:
        raise ConfigError(f"cannot draw {file}: name a file that ends in {', '.join(FORMATS)}")
    figure = _new_figure(width=9.0, height=5.4)
    axes = figure.subplots()
    copy, matmul = report["copy_bytes_per_s"], report["matmul_flops"]
    corner, first, last = matmul / copy, 0.7, 3e4
    axes.plot([first, corner, last], [first * copy, matmul, matmul], color=_INK, linewidth=1.6)
    place: dict[str, Any] = {"xytext": (9, -6), "textcoords": "offset points"}
    axes.annotate(f"copy {copy / 1e12:.2f} TB/s", (40, 40 * copy), color=_INK, **place)
    axes.annotate(f"BF16 matmul {matmul / 1e12:.0f} TFLOP/s", (corner * 1.6, matmul * 1.15))
    for rows, color, name in (
        (report["steps"], DECODE, "decode"), (report["prompts"], PREFILL, "prefill"),
    ):  # fmt: skip
        x = [r["flops"] / r["num_bytes"] for r in rows]
        y = [r["flops"] / (r["median"] / 1e3) for r in rows]
        axes.scatter(x, y, s=26, color=color, zorder=3, label=name)
        for r, px, py in zip(rows, x, y, strict=True):
            said = _label(r)
            if said:
                below: dict[str, Any] = {"xytext": (6, -11)}
                if "chunk" in r:
                    up = 8 if r["chunk"] == r["tokens"] else -15  # so that labels do not meet
                    below = {"xytext": (0, up), "ha": "center"}
                axes.annotate(
                    said, (px, py), textcoords="offset points", fontsize=8, color=color, **below
                )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(first, last)
    axes.set_xlabel("operations per byte that must be read", color=_INK)
    axes.set_ylabel("operations per second", color=_INK)
    axes.set_title(f"V4-Flash layers on one {report['device']}", loc="left", color=_INK)
    axes.grid(True, which="major", color=_FAINT, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    try:
        figure.savefig(file, dpi=120)
    except OSError as e:
        raise ConfigError(f"cannot write {file}: {e.strerror or e}") from e


def _label(row: dict[str, Any]) -> str:
    """A few rows speak for the others."""
    if row["routing"] != "own router":
        return ""
    if "chunk" in row:
        return f"{row['tokens'] // 1024}K by {row['chunk'] // 1024}K"
    if row["tokens"] > 1:
        return f"{row['tokens']} sequences"
    context = {4096: "4K", 1_048_576: "1M"}.get(row["context"])
    return f"{row['kind']}, 1 at {context}" if context and "layers" in row["kind"] else ""
