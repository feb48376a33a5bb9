"""Loss curves of a run as a picture.

Paper: none (reporting).
"""

from __future__ import annotations

from pathlib import Path

from fathom.errors import TrainError
from fathom.train.metrics import Row, read_log

# Colours that stay apart for colour-blind readers, also in grey.
_BLUE, _ORANGE, _GREEN, _GREY = "#0072b2", "#d55e00", "#009e73", "#777777"


def smoothed(values: list[float], span: int) -> list[float]:
    """Each value replaced by the mean of up to `span` values that end with it."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value
        if i >= span:
            total -= values[i - span]
        out.append(total / min(i + 1, span))
    return out


def plot_run(log: Path, picture: Path, *, span: int = 20) -> Path:
    """Draw losses, accuracy and speed of `log` (a log.jsonl) into `picture` (its suffix decides).

    Raises TrainError when the log cannot be read or is empty, the picture cannot be written, or
    matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise TrainError("drawing needs matplotlib: pip install 'fathom[plots]'") from None
    try:
        rows = read_log(log)
    except OSError as e:
        raise TrainError(f"cannot read {log}: {e.strerror or e}") from e
    if not rows:
        raise TrainError(f"{log} holds no finished step")
    figure = Figure(figsize=(8, 8), layout="constrained")
    losses, accuracy, speed = figure.subplots(3, 1, sharex=True, height_ratios=(2, 1, 1))
    for name, label, colour in (
        ("loss", "next token", _BLUE),
        ("mtp_loss", "token after next (MTP)", _ORANGE),
        ("indexer_kl", "indexer KL", _GREEN),
    ):
        _line(losses, rows, name, label, colour, span)
    losses.set_ylabel("loss (nats)")
    losses.set_yscale("log")
    losses.legend()
    _line(accuracy, rows, "accuracy", "tokens predicted exactly", _BLUE, span)
    accuracy.set_ylabel("accuracy")
    _line(speed, rows, "tokens_per_second", "tokens per second", _GREY, span)
    speed.set_ylabel("tokens / s")
    speed.set_xlabel("millions of tokens")
    for axes in (losses, accuracy, speed):
        axes.grid(alpha=0.3)
        for start, name in _phases(rows):
            axes.axvline(start, color=_GREY, linewidth=0.8, linestyle=":")
            if axes is losses:
                axes.annotate(
                    f" {name}", (start, 1), xycoords=("data", "axes fraction"), va="top", fontsize=8
                )
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture, dpi=120)
    except OSError as e:
        raise TrainError(f"cannot write {picture}: {e.strerror or e}") from e
    return picture


def _line(axes, rows: list[Row], name: str, label: str, colour: str, span: int) -> None:
    points = [(row["tokens"] / 1e6, row[name]) for row in rows if row.get(name)]
    if points:
        x = [tokens for tokens, _ in points]
        axes.plot(x, smoothed([y for _, y in points], span), label=label, color=colour)


def _phases(rows: list[Row]) -> list[tuple[float, str]]:
    """Where the kind of training changes: (millions of tokens, name)."""
    out: list[tuple[float, str]] = []
    for row in rows:
        name = row["attention"] + (" + QAT" if row["qat"] else "")
        if not out or out[-1][1] != name:
            out.append((row["tokens"] / 1e6, name))
    return out
