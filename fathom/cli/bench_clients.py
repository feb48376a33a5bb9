"""`fathom bench clients`: real coding agents against this server, without any network.

Paper: none (a test).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fathom.cli.output import check_writable, print_json, print_table, write_file

if TYPE_CHECKING:
    from fathom.eval.clients.plans import Client


def clients(
    folder: Annotated[
        Path, typer.Option("--clients", help="Folder where the clients are installed.")
    ],
    only: Annotated[
        str | None, typer.Option(help="Names of clients, with commas; otherwise all five.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the report to this file, as JSON.")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Keep records and outputs in this folder, for a look.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Drive Claude Code, Codex, opencode, qwen-code and mini-swe-agent through a session.

    Each one gets a server with scripted answers in a network of loopback alone: a question, two
    rounds of tools, a follow-up, and a reply that is cancelled. What is checked comes from the
    server's own record. Installs nothing: without the clients it says how, with exit code 3. Exit
    code 1 if a check fails.
    """
    from fathom.eval.clients import namespace, plans

    folder = folder.resolve()
    chosen = _choose(only)
    check_writable("--out", out)
    namespace.check_sealable()
    plans.check_installed(chosen, folder)
    found = [_one(client, folder, keep) for client in chosen]
    report = {"clients": found, "ok": all(c["ok"] for c in found), "cores": os.cpu_count()}
    if out is not None:
        write_file(out, json.dumps(report, indent=2) + "\n")
    if as_json:
        print_json(report)
    else:
        _print(found)
    raise typer.Exit(0 if report["ok"] else 1)


def _choose(only: str | None) -> list[Client]:
    from fathom.eval.clients.plans import CLIENTS

    if only is None:
        return list(CLIENTS)
    known = {client.name: client for client in CLIENTS}
    names = only.split(",")
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"--only names {name!r}; there are {', '.join(known)}")
    return [known[name] for name in names]


def _one(client: Client, folder: Path, keep: Path | None) -> dict[str, Any]:
    from fathom.cli.serve import shipped_tokenizer
    from fathom.eval.clients import checks, namespace

    sys.stderr.write(f"{client.name} ...\n")
    sys.stderr.flush()
    with tempfile.TemporaryDirectory(prefix="fathom-client-") as name:
        scratch = Path(name)
        try:
            results = namespace.run(client, folder, scratch)
            entries = checks.read_record(scratch / namespace.RECORD, shipped_tokenizer())
        finally:
            if keep is not None:
                _keep(scratch, keep / client.name)
    outcome = checks.check(results, entries)
    return {
        "client": client.name,
        "version": _version(client, folder),
        "ok": outcome.ok,
        "seconds": round(results[-1].ended - results[0].began, 1),
        "failures": {name: found for name, found in outcome.failures.items() if found},
        **outcome.numbers,
    }


def _keep(scratch: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for path in scratch.iterdir():
        if path.is_file():
            shutil.copy(path, target)


def _version(client: Client, folder: Path) -> str:
    """What the client's package says of itself; the client itself could call home."""
    from fathom.eval.clients.plans import PACKAGES

    if client.name in PACKAGES:
        path = folder / "node_modules" / PACKAGES[client.name] / "package.json"
        return str(json.loads(path.read_text())["version"])
    command = [str(folder / "mini/bin/pip"), "show", client.name]
    shown = subprocess.run(command, capture_output=True, text=True).stdout
    lines = [line.removeprefix("Version: ") for line in shown.splitlines()]
    return next((a for a, b in zip(lines, shown.splitlines(), strict=True) if a != b), "unknown")


def _print(found: list[dict[str, Any]]) -> None:
    from fathom.eval.clients.checks import NAMES

    rows = [
        [c["client"], c["version"], *("FAIL" if n in c["failures"] else "ok" for n in NAMES),
         f"{c['main']}+{c['side']}", _prefix(c["shared_prefix"]), str(c["freed_after_s"])]
        for c in found
    ]  # fmt: skip
    print_table(["client", "version", *NAMES, "requests", "shared tokens", "freed s"], rows)
    for client in found:
        for name, failures in client["failures"].items():
            for failure in failures:
                print(f"{client['client']}, {name}: {failure}")


def _prefix(shared: dict[str, int] | None) -> str:
    return "none" if shared is None else f"{shared['tokens']}/{shared['of_head']}"
