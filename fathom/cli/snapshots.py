"""`fathom sandbox snapshots`: take them, start from them, prove them, remove them.

Paper: §5.2.5 (incremental snapshots).
"""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from fathom.cli.output import print_json, print_table
from fathom.cli.sandboxes import KINDS, check_kind, spec_of

app = typer.Typer(
    no_args_is_help=True,
    help="Snapshots of sandboxes, each on the one before. take and restore ask the daemon; the "
    "others look into this user's folder of snapshots, which all of the user's daemons share.",
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Id = Annotated[str, typer.Argument(help="The snapshot's name, as `ls` shows it.")]
Folder = Annotated[
    Path | None, typer.Option("--folder", help="The daemon's folder, /run/fathom-edge by default.")
]


@app.command()
def take(
    name: Annotated[str, typer.Argument(help="A sandbox of the daemon, as `sandbox ls` shows it.")],
    folder: Folder = None,
) -> None:
    """Keep a sandbox as of now: its files, and of a virtual machine its processes too."""
    from fathom.sandbox import SyncClient

    with SyncClient("edge", runtime_dir=folder) as client:
        print(client.attach(name).snapshot().id)


@app.command()
def restore(
    snapshot: Id,
    kind: Annotated[
        str, typer.Option("--sandbox", help=f"What it is of: {', '.join(KINDS)}.")
    ] = KINDS[0],
    folder: Folder = None,
) -> None:
    """Start a sandbox of the daemon from a snapshot of one with default values; print its name."""
    from fathom.sandbox import SyncClient

    spec = spec_of(check_kind(kind, KINDS))
    with SyncClient("edge", runtime_dir=folder) as client:
        print(client.restore(snapshot, spec).id)


@app.command(name="ls")
def list_(as_json: AsJson = False) -> None:
    """List the snapshots on this machine."""
    from fathom.sandbox.snapshots import Snapshots

    rows = [
        {
            "id": one.id,
            "substrate": one.substrate,
            "bytes": one.size,
            "made": datetime.fromtimestamp(one.made).isoformat(" ", "seconds"),
            "parent": one.parent or "",
            "state": "kept for others" if one.dropped else "",
        }
        for one in Snapshots().list()
    ]
    if as_json:
        print_json({"snapshots": rows})
        return
    columns = ("id", "substrate", "bytes", "made", "parent", "state")
    print_table(columns, [[str(row[name]) for name in columns] for row in rows])


@app.command()
def check(snapshot: Id) -> None:
    """Read every byte of a snapshot and of those that it grew from, against its digest."""
    from fathom.sandbox.snapshots import Snapshots

    print(f"{snapshot}: {Snapshots().check(snapshot)} bytes, all whole")


@app.command()
def rm(snapshot: Id) -> None:
    """Give a snapshot up. One that others grew from stays for as long as they do."""
    from fathom.sandbox.snapshots import Snapshots

    removed = Snapshots().drop(snapshot)
    for name in removed:
        print(name)
    if snapshot not in removed:
        sys.stderr.write(f"{snapshot} stays for those that grew from it\n")
