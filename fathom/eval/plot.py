"""Figures, drawn with matplotlib where it is installed (`pip install 'fathom[plots]'`).

Paper: §2.3.4, figure 1 (the efficiency figure).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.errors import ConfigError, MissingDependency
from fathom.eval.efficiency import FLASH, GQA8_FLASH, GQA8_PRO, LABELS, PRO, V32, efficiency_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
_MILLION = 1_000_000
_INK, _FAINT = "#222222", "#d9d9d9"
_STYLES: dict[str, dict[str, Any]] = {
    V32: {"color": "#7a7a7a", "linestyle": "-"},
    PRO: {"color": "#1f5fbf", "linestyle": "-"},
    FLASH: {"color": "#e07b1a", "linestyle": "-"},
    GQA8_PRO: {"color": "#1f5fbf", "linestyle": (0, (1, 2))},
    GQA8_FLASH: {"color": "#e07b1a", "linestyle": (0, (1, 2))},
}


def plot_efficiency(file: Path, *, convention: str = "paper") -> None:
    """Draw KV cache and FLOPs per token against context into `file` (.png, .svg or .pdf).

    Raises MissingDependency without matplotlib, and ConfigError where `file` cannot be written or
    its ending is none of the three.
    """
    if file.suffix.lower() not in FORMATS:
        raise ConfigError(f"cannot draw {file}: name a file that ends in {', '.join(FORMATS)}")
    figure = _new_figure(width=10.4, height=4.7)
    contexts = _geometric(4096, _MILLION, count=120)
    rows = efficiency_rows(contexts, convention=convention)
    left, right = figure.subplots(1, 2)

    kv_models = (GQA8_PRO, GQA8_FLASH, V32, PRO, FLASH)
    kv = {m: [row.kv_bytes[m] / 2**30 for row in rows] for m in kv_models}
    _draw(left, contexts, kv, "KV cache of one sequence, GiB", lambda y: f"{y:,.1f}")
    left.set_yscale("log")
    left.set_yticks([0.01, 0.1, 1, 10, 100], ["0.01", "0.1", "1", "10", "100"])

    flops = {m: [row.flops[m] / 1e9 for row in rows] for m in (V32, PRO, FLASH)}
    _draw(
        right, contexts, flops, "FLOPs to decode one token, FP8-equivalent GFLOP", "{:,.0f}".format
    )
    right.set_ylim(bottom=0)

    last = rows[-1]
    _claim(left, "bytes", last.kv_ratio(PRO), last.kv_ratio(FLASH))
    _claim(right, "FLOPs", last.flops_ratio(PRO), last.flops_ratio(FLASH))
    try:
        figure.savefig(file, dpi=120)
    except OSError as e:
        raise ConfigError(f"cannot write {file}: {e.strerror or e}") from e


def _new_figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise MissingDependency(
            "drawing needs matplotlib, which is not installed. Run: pip install 'fathom[plots]'"
        ) from e
    return Figure(figsize=(width, height), layout="constrained")


def _draw(
    axes: Axes,
    contexts: list[int],
    lines: dict[str, list[float]],
    title: str,
    show: Callable[[float], str],
) -> None:
    for model, values in lines.items():
        axes.plot(contexts, values, linewidth=2, **_STYLES[model])
        axes.annotate(
            f"{LABELS[model]}  {show(values[-1])}",
            xy=(contexts[-1], values[-1]),
            xytext=(6, 0),
            textcoords="offset points",
            verticalalignment="center",
            color=_STYLES[model]["color"],
            fontsize=9,
        )
    axes.set_title(title, loc="left", fontsize=10.5, color=_INK)
    axes.set_xscale("log")
    ticks = {4096: "4K", 16384: "16K", 65536: "64K", 262144: "256K", _MILLION: "1M"}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.minorticks_off()
    axes.set_xlabel("tokens in context", color=_INK)
    axes.grid(True, color=_FAINT, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(which="both", color=_FAINT, labelcolor=_INK)


def _claim(axes: Axes, what: str, over_pro: float, over_flash: float) -> None:
    axes.text(
        0.03,
        0.98,
        "At one million tokens V3.2 needs\n"
        f"{over_pro:.1f}x the {what} of V4-Pro\n{over_flash:.1f}x the {what} of V4-Flash",
        transform=axes.transAxes,
        verticalalignment="top",
        fontsize=9,
        color=_INK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 2},
    )


def _geometric(first: int, last: int, count: int) -> list[int]:
    step = (last / first) ** (1 / (count - 1))
    return [round(first * step**i) for i in range(count - 1)] + [last]
