"""`fathom bench engine`: what the engine does on this machine, as numbers and a picture.

Paper: none (measurement).
"""

from __future__ import annotations

import tempfile
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import typer

from fathom.cli.output import check_picture, check_writable, print_json, print_table

PARTS = ("rates", "log", "session", "trace", "transformers")


def engine(
    model: Annotated[str, typer.Option(help="Checkpoint folder or shipped model.")] = "nano",
    threads: Annotated[str, typer.Option(help="Numbers of threads, with commas.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the spread is over them.")] = 5,
    longest: Annotated[int, typer.Option(min=4096, help="Longest context.")] = 1_000_000,
    only: Annotated[str, typer.Option(help=f"Parts to measure: {', '.join(PARTS)}.")] = "",
    picture: Annotated[Path | None, typer.Option("--plot", help="Write a picture here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the engine: speeds, what the log costs, resuming, an agent's cache, transformers.

    Contexts beyond 2,048 tokens are made of copies of real slabs. The session is written by a
    process that is then killed, and taken up by others with the page cache dropped. transformers is
    left out where it is not installed.
    """
    from fathom.cli.bench import parse_counts

    parts = only.split(",") if only else PARTS
    if not set(parts) <= set(PARTS):
        raise typer.BadParameter(f"--only is {only!r}; the parts are {', '.join(PARTS)}")
    check_picture("--plot", picture)
    check_writable("--plot", picture)
    report = measure(model, parse_counts(threads), rounds, longest, parts)
    if picture is not None and "rates" in report:
        from fathom.eval.engine_speed import plot

        plot(report["rates"], picture)
    if as_json:
        print_json(report)
    else:
        _show(report)


def measure(
    model: str, threads: list[int], rounds: int, longest: int, parts: Any = PARTS
) -> dict[str, Any]:
    """The parts of what the command reports."""
    import fathom
    from fathom.eval import engine_session, engine_speed, engine_trace
    from fathom.eval.speed import copy_rate, machine
    from fathom.model import Transformer

    llm = fathom.load(model)
    assert isinstance(llm.model, Transformer)  # as everything is that lies on a CPU
    longest = min(longest, llm.config.max_position_embeddings - 2048)
    report: dict[str, Any] = {"model": model, "rounds": rounds, "machine": machine()}
    report["machine"]["copy_bytes_per_s"] = copy_rate()
    if "rates" in parts:
        report["rates"] = []
        for count in threads:
            bench = engine_speed.Bench(llm.model, count, rounds)
            report["rates"] += bench.all(longest)
            del bench  # the memory of one at a time
    if "log" in parts:
        report["log"] = engine_speed.Bench(llm.model, 1, rounds).log()
    if "session" in parts:
        with tempfile.TemporaryDirectory() as folder:
            report["session"] = engine_session.resume_after_kill(
                model, Path(folder), longest, max(threads), rounds
            )
    if "trace" in parts:
        report["trace"] = engine_trace.replay(llm)
    if "transformers" in parts:
        report["transformers"] = _beside(model, llm, threads, rounds)
    return report


def _beside(model: str, llm: Any, threads: list[int], rounds: int) -> dict[str, Any]:
    from fathom.cli.bench import transformers_side
    from fathom.errors import MissingDependency
    from fathom.eval.engine_speed import beside_transformers

    try:
        with closing(transformers_side(model)) as other:
            found = beside_transformers(llm, other, 2048, 64, threads, rounds)
            return {**found, "versions": other.versions}
    except MissingDependency as error:
        return {"missing": str(error)}


def _show(report: dict[str, Any]) -> None:
    rows = [
        [
            row["part"], f"{row['size']:,}", str(row["threads"]),
            *(f"{row[key]:,.0f}" for key in ("median", "low", "high")),
        ]
        for row in report.get("rates", [])
    ]  # fmt: skip
    other = report.get("transformers", {})
    for row in other.get("results", []):
        for part in ("prefill", "decode"):
            rate = row[f"{part}_tokens_per_s"]
            name = f"{row['side']}: {part}"
            values = [f"{rate[key]:,.0f}" for key in ("median", "low", "high")]
            rows.append([name, f"{other['context']:,}", str(row["threads"]), *values])
    if rows:
        columns = ["tokens per second", "tokens or streams", "threads", "median", "low", "high"]
        print_table(columns, rows)
    rows = []
    if "times_as_fast" in other:
        rows.append(["times as fast as transformers", *_spread(other["times_as_fast"], 1)])
    if "log" in report:
        log = report["log"]
        name = f"time with the log, of that without ({log['pairs']} pairs, 95% interval)"
        rows.append([name, *_spread(log, 4)])
        rows.append(["log, bytes a token", f"{log['bytes_per_token']:.2f}", "", ""])
        seconds = f"{1e6 * log['request_seconds']:.0f}"
        rows.append(["log, microseconds a request to begin and end", seconds, "", ""])
    if "session" in report:
        from fathom.eval.engine_speed import spread

        session = report["session"]
        seconds = spread([r["first_token"] for r in session["resumed"]])
        name = f"{session['tokens']:,} tokens resumed, seconds to the first"
        rows.append([name, *_spread(seconds, 2)])
        rows.append(["seconds to save them", f"{session['saved']['seconds']:.2f}", "", ""])
        size = session["saved"]["bytes_per_token"]
        rows.append(["bytes a token on disk", f"{size:.1f}", "", ""])
    if "trace" in report:
        trace = report["trace"]
        name = f"agent of {trace['turns']} turns: known of all prompts"
        rows.append([name, f"{100 * trace['hit_rate']:.2f}%", "", ""])
        seen = f"{100 * trace['of_tokens_seen_before']:.2f}%"
        rows.append(["known of what was seen before", seen, "", ""])
    if rows:
        print_table(["", "median", "low", "high"], rows)


def _spread(values: dict[str, float], digits: int) -> list[str]:
    return [f"{values[key]:.{digits}f}" for key in ("median", "low", "high")]
