"""`fathom sandbox`: run programs in sandboxes, keep them with a daemon, copy and pause them.

Paper: §5.2.5 (command line of the sandbox node).
"""

from __future__ import annotations

import contextlib
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fathom.cli.output import print_json, print_table, write_file
from fathom.cli.passing import PassingCommand
from fathom.cli.sandbox_daemon import Folder, edge, token
from fathom.cli.terminal import TOOK_TOO_LONG, visible
from fathom.errors import DaemonLost, SandboxError

if TYPE_CHECKING:
    from fathom.sandbox import (
        Container,
        ExecResult,
        FullVM,
        MicroVM,
        Net,
        SyncClient,
        SyncSandbox,
    )

app = typer.Typer(
    no_args_is_help=True, help="Run programs in sandboxes; a daemon keeps them (see `edge`)."
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Name = Annotated[str, typer.Argument(help="The sandbox's name, as `ls` shows it.")]
Command = Annotated[list[str], typer.Argument(help="Program and arguments, after --.")]
Timeout = Annotated[float, typer.Option(min=0.001, help="Seconds the command may take.")]
Cwd = Annotated[str | None, typer.Option(help="Folder the command begins in; /work by default.")]
PassThrough = {"allow_interspersed_args": False}


def _daemon(folder: Path | None) -> SyncClient:
    from fathom.sandbox import SyncClient, paths

    if folder is None and (far := paths.far_daemon()) is not None:
        return SyncClient(far.url, token=far.token, ca=far.ca, fingerprint=far.fingerprint)
    return SyncClient("edge", runtime_dir=folder)


def _net(allow: list[str], domain: list[str]) -> Net | None:
    from fathom.sandbox import Net

    if not allow and not domain:
        return None
    net = Net.deny()
    for entry in allow:
        host, _, port = entry.rpartition(":")
        if not port.isdigit():
            raise typer.BadParameter(f"--allow is {entry!r}; give an address and port, A.B.C.D:80")
        net = net.address(host, int(port))
    for name in domain:
        net = net.domain(name)
    return net


def _spec(kind: str, given: dict[str, Any]) -> Container | MicroVM | FullVM:
    """Return what `--sandbox` and the options beside it ask for. Raises typer.BadParameter."""
    from fathom.sandbox import Container, FullVM, MicroVM

    if kind == "container":
        return Container(**given)
    if kind not in ("microvm", "fullvm"):
        raise typer.BadParameter(f"--sandbox is {kind!r}; choose container, microvm or fullvm")
    if odd := sorted({"workdir", "pids", "io_read", "io_write"} & set(given)):
        raise typer.BadParameter(f"a virtual machine has no --{odd[0].replace('_', '-')}")
    return MicroVM(**given) if kind == "microvm" else FullVM(**given)


def _finish(result: ExecResult, as_json: bool) -> None:
    """Show how a command ended, and end with its exit code, or `TOOK_TOO_LONG`."""
    if as_json:
        print_json(
            {
                "exit_code": result.exit_code,
                "stdout": result.stdout,
                "stderr": result.stderr,
                "timed_out": result.timed_out,
                "oom_killed": result.oom_killed,
                "truncated": result.truncated,
                "seconds": round(result.duration, 6),
            }
        )
    else:
        sys.stdout.write(visible(result.stdout))
        sys.stderr.write(visible(result.stderr))
        if result.oom_killed:
            sys.stderr.write("fathom: the command ran out of memory: raise --memory\n")
        elif result.timed_out:
            sys.stderr.write("fathom: the command took too long: raise --timeout\n")
    if result.timed_out or result.exit_code:
        raise typer.Exit(TOOK_TOO_LONG if result.timed_out else result.exit_code)


@app.command(context_settings=PassThrough, cls=PassingCommand)
def run(
    command: Command,
    kind: Annotated[
        str, typer.Option("--sandbox", help="container, microvm or fullvm.")
    ] = "container",
    image: Annotated[
        str | None,
        typer.Option(help="base, python (base and python3), or a name in the store."),
    ] = None,
    workdir: Annotated[
        Path | None, typer.Option(help="A folder of yours as /work, read and write.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Such as 512MiB.")] = None,
    cpu: Annotated[float | None, typer.Option(help="Cores, such as 0.5.")] = None,
    pids: Annotated[int | None, typer.Option(help="Processes at the same time.")] = None,
    disk: Annotated[str | None, typer.Option(help="What may be written, such as 64MiB.")] = None,
    io_read: Annotated[
        str | None, typer.Option(help="What may be read from each disk a second, such as 10MiB.")
    ] = None,
    io_write: Annotated[str | None, typer.Option(help="The same for writing.")] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="An address and port that may be reached; repeatable.")
    ] = None,
    domain: Annotated[
        list[str] | None, typer.Option(help="A domain for the proxy; repeatable.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the sandbox with the daemon.")] = False,
    group: Annotated[str | None, typer.Option(help="With --keep: a group to keep it in.")] = None,
    idle_ttl: Annotated[
        float | None, typer.Option(help="With --keep: end it after so many idle seconds.")
    ] = None,
    cwd: Cwd = None,
    timeout: Timeout = 600.0,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Run a command in a new sandbox, which ends with it unless --keep is given.

    Exit code: the command's own, 128 + n after signal n, 126 or 127 where it cannot be run or is
    not there; 124: it took longer than --timeout; 125: the sandbox failed, or wrong usage.
    """
    from fathom.sandbox import SyncClient

    odd = "--group" if group is not None else "--idle-ttl" if idle_ttl is not None else None
    if odd is not None and not keep:
        raise typer.BadParameter(f"{odd} needs --keep: without it the sandbox ends at once")
    given = {
        "image": image,
        "workdir": workdir,
        "memory": memory,
        "cpu": cpu,
        "pids": pids,
        "disk": disk,
        "io_read": io_read,
        "io_write": io_write,
        "idle_ttl": idle_ttl,
    }
    spec = _spec(kind, {name: value for name, value in given.items() if value is not None})
    net = _net(allow or [], domain or [])
    with _daemon(folder) if keep else SyncClient("local") as client:
        sandbox = client.create(spec, net=net, group=group)
        if keep:
            sys.stderr.write(f"{sandbox.id}\n")
        result = _run(sandbox, command, timeout, cwd)
    _finish(result, as_json)


def _run(
    sandbox: SyncSandbox, command: list[str], timeout: float, cwd: str | None, op: str | None = None
) -> ExecResult:
    data = None if sys.stdin.isatty() else sys.stdin.buffer.read()
    return sandbox.exec(command, timeout=timeout, cwd=cwd, stdin=data, cap=16 << 20, op=op)


@app.command(name="exec", context_settings=PassThrough, cls=PassingCommand)
def exec_(
    name: Name,
    command: Command,
    op: Annotated[str | None, typer.Option(help="A key: run it at most once under it.")] = None,
    cwd: Cwd = None,
    timeout: Timeout = 600.0,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Run a command in a sandbox of the daemon; a paused one is resumed, and stays resumed.

    Exit codes as for `run`.
    """
    # What follows the name is taken as it is, the mark between them included.
    words = command[1:] if command[0] == "--" else command
    if command[0].startswith("-") and words is command:
        raise typer.BadParameter(
            f"{command[0]} stands behind the sandbox's name: options go before it, the command "
            "behind --"
        )
    with _daemon(folder) as client:
        sandbox = client.attach(name)
        result = _run(sandbox, words, timeout, cwd, op)
    _finish(result, as_json)


@app.command(name="ls")
def list_(folder: Folder = None, as_json: AsJson = False) -> None:
    """List the daemon's sandboxes, with those that it could not take over ("left alone")."""
    with _daemon(folder) as client:
        found, left = client.list(), client.left_alone()
    if as_json:
        print_json({"sandboxes": [_shown(entry) for entry in found], "left_alone": left})
        return
    columns = ("id", "substrate", "state", "group", "parent", "phase")
    rows = [_shown(entry) for entry in found]
    rows += [{**dict.fromkeys(columns, ""), "id": name, "state": "left alone"} for name in left]
    print_table(columns, [[str(row[name]) for name in columns] for row in rows])
    for name, why in left.items():
        print(visible(f"{name} was left alone: {why}; it is tried again, and `stop` ends it"))


def _shown(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": entry["id"],
        "substrate": entry["caps"].substrate,
        "state": "paused" if entry["paused"] else "running",
        "group": entry["group"],
        "parent": entry["parent"],
        "phase": entry["phase"],
    }


@app.command()
def network(name: Name, folder: Folder = None, as_json: AsJson = False) -> None:
    """Show what was judged on a sandbox's network, in order."""
    with _daemon(folder) as client:
        entries = client.attach(name).network_log()
    if as_json:
        print_json({"network": entries})
        return
    for entry in entries:
        verdict = "allowed" if entry.get("allowed") else "refused"
        rest = " ".join(
            f"{key}={value}" for key, value in entry.items() if key not in ("time", "allowed")
        )
        print(visible(f"{entry['time']:.3f} {verdict} {rest}"))


@app.command()
def fork(
    name: Name,
    count: Annotated[int, typer.Option(min=1, help="How many copies.")] = 1,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Copy a sandbox's files into new ones and print their names."""
    with _daemon(folder) as client:
        made = [sandbox.id for sandbox in client.attach(name).fork(count)]
    if as_json:
        print_json({"made": made})
    else:
        print("\n".join(made))


def _chosen(client: SyncClient, names: list[str], group: str | None) -> list[str]:
    if group is not None:
        names = [*names, *(entry["id"] for entry in client.list() if entry["group"] == group)]
    if not names:
        raise SandboxError("name a sandbox, or a group that has some")
    return names


def _several(client: SyncClient, names: list[str], group: str | None) -> list[SyncSandbox]:
    return [client.attach(name) for name in _chosen(client, names, group)]


Names = Annotated[list[str] | None, typer.Argument(help="Names of sandboxes.")]
InGroup = Annotated[str | None, typer.Option("--group", help="All sandboxes of this group.")]


@app.command()
def pause(
    names: Names = None,
    group: InGroup = None,
    reclaim: Annotated[bool, typer.Option("--reclaim", help="Give back memory.")] = False,
    folder: Folder = None,
) -> None:
    """Stop every process of sandboxes where it is, until `resume` or whatever uses them next."""
    with _daemon(folder) as client:
        for sandbox in _several(client, names or [], group):
            sandbox.pause(reclaim=reclaim)


@app.command()
def resume(names: Names = None, group: InGroup = None, folder: Folder = None) -> None:
    """Let paused sandboxes go on."""
    with _daemon(folder) as client:
        for sandbox in _several(client, names or [], group):
            sandbox.resume()


@app.command()
def screenshot(
    name: Name,
    target: Annotated[Path, typer.Argument(help="The picture's file, PNG.")],
    folder: Folder = None,
) -> None:
    """Keep a picture of a full VM's console."""
    with _daemon(folder) as client:
        write_file(target, client.attach(name).screenshot())


@app.command()
def stop(names: Names = None, group: InGroup = None, folder: Folder = None) -> None:
    """End sandboxes and remove all that is left of them, also of those that were left alone."""
    with _daemon(folder) as client:
        for name in _chosen(client, names or [], group):
            client.end(name)


@app.command()
def forward(
    name: Name,
    port: Annotated[int, typer.Argument(min=1, max=65535, help="The port inside.")],
    listen: Annotated[
        int, typer.Option(min=0, max=65535, help="The port here; 0: a free one.")
    ] = 0,
    timeout: Timeout = 3600.0,
    folder: Folder = None,
) -> None:
    """Lead a port of this machine to a server in a sandbox, until Ctrl-C."""
    with (
        _daemon(folder) as client,
        client.attach(name).forward(port, timeout=timeout, listen=listen) as (host, found),
        contextlib.suppress(KeyboardInterrupt),
    ):
        print(f"http://{host}:{found}", flush=True)
        threading.Event().wait()


@app.command()
def page(
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: a free one.")] = 0,
    folder: Folder = None,
) -> None:
    """Serve a page with the daemon's sandboxes and the recorded runs, until Ctrl-C."""
    from fathom.cli.trajectory import known_to_json
    from fathom.sandbox import plain
    from fathom.sandbox.pages import Pages
    from fathom.sandbox.trajectory.replay import events
    from fathom.sandbox.trajectory.store import Store

    store = Store()

    def overview() -> dict[str, Any]:
        runs = [known_to_json(known) for known in reversed(store.list())]
        try:
            with _daemon(folder) as client:
                found = client.list()
        except DaemonLost as error:
            return {"sandboxes": [], "runs": runs, "problem": str(error)}
        for entry in found:
            entry["caps"] = plain.caps_out(entry["caps"])
        return {"sandboxes": found, "runs": runs}

    def run(name: str) -> dict[str, Any]:
        known = known_to_json(store.known(name))
        with store.read(name) as log:
            return {**known, "events": [event.to_json() for event in events(log, name)]}

    pages = Pages(overview, run, port=port)
    print(pages.address, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        pages.serve()


app.command()(edge)
app.add_typer(token, name="token")
