"""`fathom bench`: what this machine measures, beside what others reach on it.

Paper: none (measurement).
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fathom.cli.bench_clients import clients
from fathom.cli.bench_crashes import crashes
from fathom.cli.bench_engine import engine
from fathom.cli.bench_fuzz import fuzz
from fathom.cli.bench_gpu import gpu
from fathom.cli.bench_server import server
from fathom.cli.output import print_json, print_table
from fathom.cli.sandboxes import CONTAINERS, KINDS, MACHINES, check_kind

if TYPE_CHECKING:
    from fathom.engine import LLM
    from fathom.eval.speed import ProcessSide, Rate, Result, Side

app = typer.Typer(
    invoke_without_command=True,
    help="Measure speed on this machine; without a command, decoding and commands in a sandbox.",
)

SHIPPED, PLAIN, GENERATE, OTHER = "fathom", "fathom-f32", "fathom-generate", "transformers"
TOLERANCE = 2e-3  # of logits in float32: the same model, sums in another order
COMMAND = ["true"]
CHECKOUT = Path(__file__).resolve().parents[2]
OTHER_MODULE = "bench.transformers_side"  # of the checkout: the package never imports transformers

# Virtual machines, which are measured by what they have besides.
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback()
def _group(context: typer.Context) -> None:
    """Measure speed on this machine; without a command, decoding and commands in a sandbox."""
    if context.invoked_subcommand is None:
        beside = OTHER if _script().is_file() and find_spec(OTHER) else None
        _print_decode(_decode("nano", 128, 800, [1, 2], beside, 5))
        print()
        _print_exec(_sandbox_exec("container", 200))


@app.command()
def decode(
    model: Annotated[str, typer.Option(help="Checkpoint folder or shipped model.")] = "nano",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded per round.")] = 128,
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 800,
    threads: Annotated[str, typer.Option(help="Numbers of threads to try, with commas.")] = "1,2",
    against: Annotated[
        str | None, typer.Option(help="Take turns with `transformers`, on the same weights.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the sides take turns.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Measure tokens per second of prefill and decoding, one sequence on the CPU.

    fathom: the model as it is loaded by default, with every quantisation step of a quantised
    checkpoint. fathom-f32: none of these steps. fathom-generate: as a caller gets it, with sampling
    and text. transformers: float32, which is checked to give the logits of fathom-f32.
    """
    if against not in (None, OTHER):
        raise typer.BadParameter(f"--against is {against!r}; there is only transformers")
    report = _decode(model, tokens, context, parse_counts(threads), against, rounds)
    if as_json:
        print_json(report)
    else:
        _print_decode(report)


@app.command()
def sandbox(
    sandbox: Annotated[
        str, typer.Option(help=f"Kind of sandbox: {', '.join(KINDS)}.")
    ] = CONTAINERS[0],
    count: Annotated[int, typer.Option(min=20, help="Warm calls; slower things less often.")] = 200,
    hold: Annotated[int, typer.Option(min=10, help="Idle sandboxes held at once.")] = 100,
    edge: Annotated[bool, typer.Option("--edge", help="Through the daemon that runs.")] = False,
    as_json: AsJson = False,
) -> None:
    """Measure sandboxes: calls, starts, copies, pauses, and what idle ones cost."""
    import anyio

    from fathom.sandbox import Client, FullVM, MicroVM, measure, paths
    from fathom.sandbox.vm.measure import everything as measure_machines

    async def run() -> dict[str, Any]:
        if sandbox in MACHINES:
            kind = MicroVM if sandbox == "microvm" else FullVM
            async with Client("local") as client:
                folders = paths.runtime_folder(), paths.cache_folder()
                return await measure_machines(client, *folders, kind, min(count, 20))
        substrate = "auto" if check_kind(sandbox) == "container" else sandbox
        where = "edge" if edge else "local"
        async with Client(where, substrate=substrate) as client:  # type: ignore[arg-type]
            return await measure.everything(client, count, hold)

    report = anyio.run(run)
    if as_json:
        print_json(report)
        return
    facts = report.pop("machine")
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    name = "accelerator" if sandbox in MACHINES else "substrate"
    print(f"{name} {report.pop(name)}\n")
    rows = [
        [name, ", ".join(f"{k} {v}" for k, v in found.items())] for name, found in report.items()
    ]
    print_table(("what", "found"), rows)


@app.command()
def sandbox_exec(
    sandbox: Annotated[
        str, typer.Option(help=f"Kind of sandbox: {', '.join(CONTAINERS)}.")
    ] = CONTAINERS[0],
    count: Annotated[int, typer.Option(min=1, help="How often to run it.")] = 200,
    as_json: AsJson = False,
) -> None:
    """Measure how long `true` takes in a sandbox, seen from outside."""
    report = _sandbox_exec(check_kind(sandbox), count)
    if as_json:
        print_json(report)
    else:
        _print_exec(report)


@app.command()
def trajectory(
    sandbox: Annotated[
        str, typer.Option(help=f"Kind of sandbox: {', '.join(CONTAINERS)}.")
    ] = CONTAINERS[0],
    count: Annotated[int, typer.Option(min=10, help="How often to run it.")] = 200,
    as_json: AsJson = False,
) -> None:
    """Measure what the log adds to a call in a sandbox, and how fast a log is read back."""
    from fathom.cli import bench_trajectory

    report = bench_trajectory.measure(check_kind(sandbox), count)
    if as_json:
        print_json(report)
    else:
        bench_trajectory.show(report)


app.command()(gpu)
app.command()(engine)
app.command()(clients)
app.command()(fuzz)
app.command()(crashes)
app.command()(server)


def parse_counts(text: str) -> list[int]:
    """Numbers of threads, as `1,2`. Raises typer.BadParameter for anything else."""
    parts = text.split(",")
    if not all(p.strip().isdecimal() and int(p) > 0 for p in parts):
        raise typer.BadParameter(f"--threads is {text!r}; give numbers with commas, as 1,2")
    return sorted({int(p) for p in parts})


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _decode(
    name: str, count: int, context: int, threads: list[int], against: str | None, rounds: int
) -> dict[str, Any]:
    import torch

    import fathom
    from fathom.errors import GenerationError
    from fathom.eval import speed

    llm, plain = fathom.load(name), fathom.load(name, quantized=False)
    most = llm.config.max_position_embeddings
    if context + count + 1 > most:
        raise GenerationError(
            f"{context} + {count} tokens exceed the model's context of {most}: choose fewer"
        )
    sides: list[Side] = [
        speed.ModelSide(SHIPPED, llm),
        speed.ModelSide(PLAIN, plain),
        speed.GenerateSide(GENERATE, llm),
    ]
    ids = speed.random_tokens(llm.config.vocab_size, context + count)
    before = torch.get_num_threads()
    facts = speed.machine()
    report: dict[str, Any] = {"model": llm.name, "context": context, "tokens": count}
    other = transformers_side(name) if against else None
    try:
        if other is not None:
            facts |= other.versions
            report["largest_logit_difference"] = _difference(plain, other, ids[:context])
            sides.append(other)
        on_round = partial(_progress, rounds)
        results = speed.take_turns(sides, ids[:context], ids[context:], threads, rounds, on_round)
    finally:
        torch.set_num_threads(before)
        if other is not None:
            other.close()
    rate = speed.copy_rate()
    size = token_bytes(llm.model)
    report["results"] = [r.to_json() for r in results]
    report["best"] = {s.name: _best(speed.best(results, s.name)) for s in sides}
    if other is not None:
        report["times_transformers"] = {
            s.name: _spread(speed.ratio(results, s.name, OTHER)) for s in sides[:-1]
        }
    report["floor"] = {
        "weight_bytes_per_token": size,
        "copy_bytes_per_s": rate,
        "tokens_per_s": rate / size,
    }
    report["machine"] = facts | {"load_average_after": speed.machine()["load_average"]}
    return report


def _best(result: Result) -> dict[str, Any]:
    return {"threads": result.threads, "decode_tokens_per_s": result.decode.median}


def _spread(rate: Rate) -> dict[str, float]:
    return {"median": rate.median, "low": rate.low, "high": rate.high}


def _progress(rounds: int, number: int) -> None:
    if number == 0:
        _say("warming up (the first run on a machine compiles the decoder: 10 to 20 s) ...")
    else:
        _say(f"round {number}/{rounds}")


def transformers_side(name: str) -> ProcessSide:
    """transformers with the weights of `name`, in its own process. Raises MissingDependency."""
    from fathom.engine.llm import _folder
    from fathom.errors import MissingDependency
    from fathom.eval.speed import ProcessSide

    if not _script().is_file():
        raise MissingDependency(
            f"--against transformers needs a checkout of fathom: there is no {_script()}"
        )
    _say("loading transformers ...")
    command = [sys.executable, "-m", OTHER_MODULE, str(_folder(name).resolve())]
    return ProcessSide(OTHER, command, CHECKOUT)


def _script() -> Path:
    return CHECKOUT / f"{OTHER_MODULE.replace('.', '/')}.py"


def token_bytes(model: Any) -> int:
    """Bytes of parameters that decoding one token reads: of routed experts, the chosen ones."""
    from fathom.kernels.numba import layout
    from fathom.kernels.numba.packing import pack

    packed, config = pack(model), model.config
    chosen = config.num_experts_per_tok / config.n_routed_experts
    total = 4 * config.hidden_size  # the embedding's row
    for layer in range(config.num_hidden_layers):
        meta = packed.meta[layer]
        for which in range(layout.MATRICES):
            column = layout.matrix_column(which)
            _, half, rows, cols = meta[column : column + 4]
            if which == layout.WO_A:
                rows *= config.o_groups
            elif which in (layout.W1, layout.W2, layout.W3):
                rows *= config.n_routed_experts * chosen
            total += int(rows * cols) * (2 if half else 4)
        total += 4 * int(sum(meta[layout.vector_column(v) + 1] for v in range(layout.VECTORS)))
    return total + config.num_hash_layers * 8 * config.num_experts_per_tok


def _difference(plain: LLM, other: ProcessSide, ids: list[int]) -> float:
    """The largest difference of logits. Raises FathomError when it is not the same model."""
    import numpy as np

    from fathom.errors import FathomError

    with tempfile.TemporaryDirectory() as folder:
        theirs = other.logits(ids, Path(folder) / "logits.npy")
    largest = float(np.abs(plain.logits(ids).numpy() - theirs).max())
    if not largest <= TOLERANCE:
        raise FathomError(
            f"transformers gives other logits (largest difference {largest:.1e}, allowed "
            f"{TOLERANCE:.0e}): comparing speeds would mean nothing"
        )
    return largest


def _sandbox_exec(kind: str, count: int) -> dict[str, Any]:
    import anyio

    return anyio.run(_time_commands, kind, count)


async def _time_commands(kind: str, count: int) -> dict[str, Any]:
    import time

    from fathom.cli.sandboxes import open_sandbox
    from fathom.errors import SandboxError

    seconds: list[float] = []
    begun = time.perf_counter()
    async with open_sandbox(kind) as sandbox:
        created = time.perf_counter() - begun
        substrate = sandbox.caps.substrate
        for _ in range(count + 3):
            start = time.perf_counter()
            result = await sandbox.exec(COMMAND, timeout=60)
            seconds.append(time.perf_counter() - start)
            if result.exit_code:
                raise SandboxError(f"{COMMAND[0]} ended with exit code {result.exit_code}")
    seconds = sorted(seconds[3:])  # the first ones warm up
    parts = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    return {
        "substrate": substrate,
        "count": count,
        "create_s": created,
        "exec_ms": {
            "min": 1e3 * seconds[0],
            **{n: 1e3 * seconds[min(count - 1, int(count * p))] for n, p in parts.items()},
            "max": 1e3 * seconds[-1],
        },
    }


def _print_decode(report: dict[str, Any]) -> None:
    facts = report["machine"]
    versions = [f"{n} {facts[n]}" for n in ("python", "torch", "numba", OTHER) if n in facts]
    print(f"{facts['cpu']}, {facts['cores']} cores; {', '.join(versions)}")
    print(f"load average {facts['load_average']} before, {facts['load_average_after']} after")
    print(f"{report['model']}, {report['context']} tokens, then {report['tokens']} one by one\n")
    rows = []
    for r in report["results"]:
        d, p = r["decode_tokens_per_s"], r["prefill_tokens_per_s"]
        speeds = [f"{x:,.0f}" for x in (d["median"], d["low"], d["high"], p["median"])]
        rows.append([r["side"], str(r["threads"]), *speeds])
    print_table(["", "threads", "decode/s", "min", "max", "prefill/s"], rows)
    for name, r in report.get("times_transformers", {}).items():
        text = f"{r['median']:.1f} times transformers ({r['low']:.1f} to {r['high']:.1f} by round)"
        print(f"{name} decodes {text}, each at its best number of threads")
    if "largest_logit_difference" in report:
        print(f"largest difference of logits: {report['largest_logit_difference']:.1e}")
    floor = report["floor"]
    megabytes, rate = floor["weight_bytes_per_token"] / 1e6, floor["copy_bytes_per_s"] / 1e9
    print(
        f"weights read per token: {megabytes:.1f} MB; one thread copies {rate:.1f} GB/s, which is "
        f"that {floor['tokens_per_s']:,.0f} times a second"
    )


def _print_exec(report: dict[str, Any]) -> None:
    print(f"{report['substrate']}: create {report['create_s']:.2f} s; `true`, {report['count']}x:")
    times = report["exec_ms"]
    print_table(["", *times], [["ms", *(f"{t:.2f}" for t in times.values())]])
