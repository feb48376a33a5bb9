"""Everything that is said of the GPU path, measured and tested anew in one folder.

    python -m bench.gpu_all FOLDER                  # about ten minutes on one GPU
    python -m bench.gpu_all FOLDER --only layers,engine
    python -m bench.gpu_all FOLDER --seconds 380    # what does not fit is left out, and said so

Parts run in their order: those that measure alone, tests side by side. A part has at most its
limit and leaves those after it the least that they need; what is left over goes to the last ones.
Each writes a log and may fail without the others. FOLDER/report.md has all tables,
FOLDER/report.json the figures, FOLDER/roofline.png the picture. Exit status 1: a part failed or was
left out.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fathom.eval.gpu_goals import goals

CHECKOUT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
LAST_LINES = 150  # of a part's output, in the report
END = 10  # seconds kept back to write the report in
SECONDS = 590  # for everything: what all parts take where kernels are compiled already


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A command of its own. limit: seconds that it may take; least: that those before leave it, 0
    if it may be left out; alone: it measures times; proof: what its output must hold if it did
    anything; {folder}: where it writes.
    """

    name: str
    says: str
    command: tuple[str, ...]
    limit: int
    least: int = 0
    alone: bool = True
    proof: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a part went: "ok", "failed", "ran past its limit" or "left out"."""

    name: str
    state: str
    seconds: float
    last: str = ""


FATHOM = (PYTHON, "-m", "fathom", "bench", "gpu")
TESTS = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider")
# Each process compiles and captures for itself, on the one device.
SIDE_BY_SIDE = ("-n", "4") if importlib.util.find_spec("xdist") else ()
CELLS = "cuda and (1-16 or 5-97 or restart)"  # of equality: each path twice, and restarts
AGREE = "tests/model/test_stored_device.py"
LONG_CHUNK = "test_a_long_chunk_agrees_with_decoding_it"
# In this order, so that what matters most is there when time runs out.
PARTS = (
    Part(
        name="layers",
        says="decode steps, prompts, FP8 keys, every kernel, goals",
        command=(*FATHOM, "--repeat", "30", "--kernels", "--routing", "without", "--out",
                 "{folder}/layers.json", "--plot", "{folder}/roofline.png"),
        limit=150,
        least=90,
    ),
    Part(
        name="transformers",
        says="a prompt and single tokens through the same layers",
        command=(PYTHON, "-m", "bench.transformers_prefill", "8192", "4096",
                 "{folder}/transformers.json"),
        limit=70,
        least=50,
    ),
    Part(
        name="engine",
        says="the engine with 1, 8 and 64 streams, greedy, drawn, drafting; prompts of either kind",
        command=(*FATHOM, "--engine", "--repeat", "30", "--out", "{folder}/engine.json"),
        limit=120,
        least=70,
    ),
    Part(
        name="kernels",
        says="every kernel against its reference, long chunks against steps",
        command=(*TESTS, *SIDE_BY_SIDE, "tests/kernels/test_stored.py",
                 "tests/kernels/test_entries.py", "tests/kernels/test_few.py",
                 "tests/kernels/test_prefill.py", "tests/kernels/test_not_finite.py",
                 "tests/kernels/test_long_contexts.py", "tests/kernels/test_known_entries.py",
                 "tests/kernels/test_router_ties.py", f"{AGREE}::{LONG_CHUNK}"),
        limit=270,
        least=70,
        alone=False,
        proof=" passed",
    ),
    Part(
        name="equality",
        says="the same bits in two cells of batch and cut by every path, and after restarts",
        command=(*TESTS, *SIDE_BY_SIDE, "tests/engine/test_engine.py", "tests/engine/test_wal.py",
                 "-k", CELLS),
        limit=270,
        least=70,
        alone=False,
        proof=" passed",
    ),
    Part(
        name="drafts",
        says="drafts change nothing, the MTP block sees what it ought to, engines that come and go",
        command=(*TESTS, *SIDE_BY_SIDE, "tests/engine/test_speculative.py",
                 "tests/engine/test_storage.py", "tests/engine/test_gpu.py",
                 "tests/engine/test_graphs.py", "tests/model/test_stored_waiting.py",
                 "-k", "cuda or gpu"),
        limit=270,
        least=70,
        alone=False,
        proof=" passed",
    ),
    Part(
        name="routing",
        says="64 sequences and a prompt by each routing profile",
        command=(*FATHOM, "--repeat", "30", "--routing", "alone", "--out",
                 "{folder}/routing.json"),
        limit=60,
    ),
    Part(
        name="prefill",
        says="prompts by layer, with their planned and their real memory",
        command=(*FATHOM, "--prefill", "--repeat", "30", "--kernels", "--out",
                 "{folder}/prefill.json"),
        limit=60,
    ),
    Part(
        name="sanitizer",
        says="compute-sanitizer's memcheck, as far as its time goes",
        command=("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", PYTHON, "-m",
                 "tests.kernels.sanitize"),
        limit=215,
        proof="ok ",
    ),
)  # fmt: skip


def run(part: Part, folder: Path, limit: float) -> Outcome:
    """Run a part for at most `limit` seconds; all that it prints goes to its log."""
    command = [word.replace("{folder}", str(folder)) for word in part.command]
    log, started = folder / f"{part.name}.log", time.monotonic()
    state = "ok"
    with log.open("w") as out:
        out.write(f"$ {' '.join(command)}\n")
        out.flush()
        try:
            process = subprocess.Popen(
                command, cwd=CHECKOUT, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        except OSError as error:
            out.write(f"{error}\n")
            process = None
        try:
            if process is None or process.wait(limit) != 0:
                state = "failed"
        except subprocess.TimeoutExpired:
            state = "ran past its limit"
        finally:
            if process is not None and process.poll() is None:  # with all that it started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    lines = log.read_text(errors="replace").splitlines()
    if state == "ok" and not any(part.proof in line for line in lines[1:]):
        state = "failed"  # such as tests that were all skipped
    return Outcome(
        name=part.name,
        state=state,
        seconds=time.monotonic() - started,
        last="\n".join(lines[-LAST_LINES:]),
    )


def run_all(parts: Sequence[Part], folder: Path, seconds: float) -> list[Outcome]:
    """One after the other, but neighbours that measure nothing together; none beyond `seconds`."""
    end = time.monotonic() + seconds - END
    outcomes: list[Outcome] = []
    groups = stages(parts)

    def guarded(part: Part, kept: int) -> Outcome:
        left = end - time.monotonic()
        limit = min(part.limit, max(left - kept, min(part.least, left)))
        if limit < 1:
            return Outcome(name=part.name, state="left out", seconds=0.0)
        print(f"{part.name}: {part.says}; at most {limit:.0f} s", flush=True)
        outcome = run(part, folder, limit)
        print(f"{part.name}: {outcome.state} after {outcome.seconds:.0f} s", flush=True)
        return outcome

    for number, group in enumerate(groups):
        kept = sum(max(part.least for part in later) for later in groups[number + 1 :])
        with ThreadPoolExecutor(len(group)) as pool:
            outcomes += pool.map(guarded, group, [kept] * len(group))
        write_report(folder, parts, outcomes)
    return outcomes


def stages(parts: Sequence[Part]) -> list[list[Part]]:
    """What runs at once: a part that measures alone, or all neighbours that do not."""
    groups: list[list[Part]] = []
    for part in parts:
        if part.alone or not groups or groups[-1][-1].alone:
            groups.append([])
        groups[-1].append(part)
    return groups


def write_report(folder: Path, parts: Sequence[Part], outcomes: Sequence[Outcome]) -> None:
    """report.json with all figures, report.md with all tables, as far as there are any."""
    figures = {
        part.name: json.loads(file.read_text())
        for part in parts
        if (file := folder / f"{part.name}.json").is_file()
    }
    if "layers" in figures and not (folder / "roofline.png").is_file():
        draw(figures["layers"], folder / "roofline.png")
    if "layers" in figures:
        judged(figures)
    states = [asdict(outcome) for outcome in outcomes]
    whole = {"versions": versions(), "parts": states, "figures": figures}
    (folder / "report.json").write_text(json.dumps(whole, indent=1))
    said = {part.name: part.says for part in parts}
    text = ["# The GPU path, measured", "", ", ".join(f"{k} {v}" for k, v in versions().items())]
    rows = [[o.name, said[o.name], o.state, f"{o.seconds:.0f}"] for o in outcomes]
    text += ["", *table(["Part", "What", "Outcome", "Seconds"], rows)]
    if "layers" in figures:
        text += ["", "## Goals", "", *goal_table(figures["layers"])]
        text += ["", "## Beside transformers", "", *beside(figures)]
    for outcome in outcomes:
        text += ["", f"## {outcome.name}", "", "```", outcome.last, "```"]
    if (folder / "roofline.png").is_file():
        text += ["", "![Decode and prefill under the limits of the device](roofline.png)"]
    (folder / "report.md").write_text("\n".join(text) + "\n")


def draw(report: dict[str, Any], file: Path) -> None:
    """The picture of a part that ended before it had drawn it, where that can be done."""
    from fathom.errors import FathomError
    from fathom.eval.gpu_plot import plot_roofline

    with contextlib.suppress(FathomError, KeyError):
        plot_roofline(report, file)


def judged(figures: dict[str, Any]) -> None:
    """Judge the layers anew, with what was measured of transformers."""
    layers = figures["layers"]
    if "transformers" in figures and "steps" in layers:
        layers["transformers"] = figures["transformers"]
        layers["goals"] = [asdict(goal) | {"verdict": goal.verdict} for goal in goals(layers)]


def beside(figures: dict[str, Any]) -> list[str]:
    """A Markdown table of every ratio to transformers, with what either side's time holds."""
    other, layers = figures.get("transformers"), figures["layers"]
    if other is None:
        return ["Not measured."]

    def found(among: Sequence[dict[str, Any]], **wanted: Any) -> dict[str, Any] | None:
        return next((r for r in among if all(r[k] == v for k, v in wanted.items())), None)

    engine = figures.get("engine", {"decode": [], "prompts": []})
    step = found(layers.get("steps", []), kind="all", tokens=1, context=other["context"])
    prompt = found(
        layers.get("prompts", []), kind="all", tokens=other["tokens"], routing="own router"
    )
    served = found(
        [row for row in engine["decode"] if "layers" in row["model"]],
        batch=1, drafts=0, context=other["context"],
    )  # fmt: skip
    fed = found(
        [row for row in engine["prompts"] if "layers" in row["model"]],
        tokens=other["tokens"], rows=0,
    )  # fmt: skip
    token, whole = other.get("seconds_a_token", float("nan")) * 1e3, other["seconds"] * 1e3
    rows = []
    for name, theirs, ours in (
        ("one token, layers alone: device's time of a graph", token, step and step["median"]),
        ("one token through the engine: host's time of a step", token, served and served["engine"]),
        ("prompt, layers alone: device's time", whole, prompt and prompt["median"]),
        ("prompt through the engine: host's time to the first token", whole,
         fed and fed["seconds"] * 1e3),
    ):  # fmt: skip
        if ours:
            rows.append([name, f"{ours:.3f}", f"{theirs:.1f}", f"{theirs / ours:.1f}"])
    return [
        f"transformers {other['version']}, {other.get('experts')} experts, "
        f"{other.get('attention')} attention, BF16 weights; {other['tokens']:,} tokens, then "
        f"single ones behind {other['context']:,}. Its time is the host's of eager calls, with "
        "embeddings, mask, final merge and norm, without a head; the engine's has those, a head "
        "and the choice of a token.",
        "",
        *table(["What", "Here, ms", "transformers, ms", "Ratio"], rows),
    ]


def goal_table(report: dict[str, Any]) -> list[str]:
    """The goals of `fathom bench gpu`, as Markdown."""
    rows = [
        [
            goal["name"],
            f"{'at most' if goal['at_most'] else 'at least'} {goal['limit']:g} {goal['unit']}",
            "-" if goal["found"] is None else f"{goal['found']:.3g}",
            goal["verdict"],
        ]
        for goal in report["goals"]
    ]
    return table(["Goal", "Aim", "Found", ""], rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def versions() -> dict[str, str]:
    """Of what was measured and what it ran on."""
    import torch

    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=CHECKOUT, capture_output=True, text=True
    )
    found = {"commit": done.stdout.strip() or "unknown", "torch": torch.__version__}
    for name in ("triton", "transformers"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            found[name] = "not installed"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    return found | {"device": device}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"in all ({SECONDS})")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", default=",".join(names), help=f"some of {','.join(names)}")
    asked = parser.parse_args(arguments)
    wanted = asked.only.split(",")
    if unknown := [name for name in wanted if name not in names]:
        parser.error(f"no part {', '.join(unknown)}: there are {', '.join(names)}")
    asked.folder.mkdir(parents=True, exist_ok=True)
    parts = [part for part in PARTS if part.name in wanted]
    outcomes = run_all(parts, asked.folder.resolve(), asked.seconds)
    print(f"{asked.folder / 'report.md'} has all tables")
    return int(any(outcome.state != "ok" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
