"""`fathom bench engine`: what the engine does on this machine, as numbers and a picture.

Paper: none (measurement).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from fathom.cli.output import print_json, print_table

_RESUME = """
import json, sys
from pathlib import Path
import fathom
from fathom.eval.engine_speed import resume_session
model = fathom.load(sys.argv[1]).model
print(json.dumps(resume_session(model, Path(sys.argv[2]), int(sys.argv[3]))))
"""


def engine(
    model: Annotated[str, typer.Option(help="Checkpoint folder or shipped model.")] = "nano",
    threads: Annotated[int, typer.Option(min=1, help="Threads for prompts and long scans.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; the spread is over them.")] = 5,
    longest: Annotated[int, typer.Option(min=2048, help="Longest context.")] = 1_000_000,
    picture: Annotated[Path | None, typer.Option("--plot", help="Write a picture here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure the engine: prefill, decoding against context, batches, resuming a saved session.

    Contexts beyond 2,048 tokens are made of copies of real slabs. The session is written here and
    taken up by another process, with its files dropped from the page cache.
    """
    report = measure(model, threads, rounds, longest)
    if picture is not None:
        from fathom.eval.engine_speed import plot

        plot(report, picture)
    if as_json:
        print_json(report)
        return
    rows = []
    for part in ("prefill", "decode", "batch"):
        for row in report[part]:
            values = [f"{row[key]:,.0f}" for key in ("median", "low", "high")]
            rows.append([part, f"{row['size']:,}", *values])
    print_table(["tokens per second", "tokens or streams", "median", "low", "high"], rows)
    session = report["session"]
    resumed = session["resumed"]
    rows = [
        ["tokens", f"{session['tokens']:,}"],
        ["bytes per token on disk", f"{session['saved']['bytes_per_token']:.1f}"],
        ["seconds to save", f"{session['saved']['seconds']:.2f}"],
        ["tokens found again", f"{resumed['cached_tokens']:,.0f}"],
        ["seconds to the first new token", f"{resumed['first_token']:.2f}"],
    ]
    print_table(["session", ""], rows)


def measure(model: str, threads: int, rounds: int, longest: int) -> dict[str, Any]:
    """Everything that the command reports."""
    import fathom
    from fathom.eval.engine_speed import Bench, write_session
    from fathom.eval.speed import machine

    about = machine()
    net = fathom.load(model).model
    longest = min(longest, net.config.max_position_embeddings - 2048)
    bench = Bench(net, threads, rounds)
    contexts = [c for c in (256, 2048, 16_384, 131_072, 1_000_000) if c < longest] + [longest]
    prompts = [p for p in (512, 2048, 8192) if p <= longest]
    report: dict[str, Any] = {
        "model": model,
        "threads": threads,
        "rounds": rounds,
        "machine": about,
        "prefill": [{"size": p, **bench.prefill(p)} for p in prompts],
        "decode": [{"size": c, **bench.decode(c)} for c in contexts],
        "batch": [{"size": n, **bench.batch(n)} for n in (1, 2, 4, 8, 16)],
    }
    del bench
    with tempfile.TemporaryDirectory() as folder:
        saved = write_session(net, Path(folder), longest)
        command = [sys.executable, "-c", _RESUME, model, folder, str(longest)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    resumed = json.loads(done.stdout)
    report["session"] = {"tokens": longest, "saved": saved, "resumed": resumed}
    return report
