"""`fathom sandbox edge` and `fathom sandbox token`: the daemon, and who may use it from elsewhere.

Paper: §5.2.5 (command line of the sandbox node).
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from fathom.cli.output import print_json, print_table

token = typer.Typer(
    no_args_is_help=True, help="Tokens of clients that reach the daemon over TLS (edge --listen)."
)
Folder = Annotated[
    Path | None, typer.Option("--folder", help="The daemon's folder, /run/fathom-edge by default.")
]
TokenFile = Annotated[
    Path | None, typer.Option("--tokens", help="The file of tokens; one for this user by default.")
]


def edge(
    most: Annotated[int, typer.Option(min=1, help="Sandboxes to admit.")] = 3200,
    work: Annotated[
        list[Path] | None,
        typer.Option(help="A folder below which work folders may be bound; repeatable."),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(help="HOST:PORT for clients elsewhere, over TLS with tokens."),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(help="A certificate in PEM; one is made by default.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key in PEM.")] = None,
    tokens: TokenFile = None,
    metrics: Annotated[
        bool, typer.Option("--metrics", help="Print the running daemon's metrics and end.")
    ] = False,
    mirror: Annotated[
        list[str] | None,
        typer.Option(help="A package mirror that policies may name, as pypi=URL; repeatable."),
    ] = None,
    folder: Folder = None,
) -> None:
    """Run the daemon of this machine, in the foreground; its sandboxes outlive it."""
    import anyio

    from fathom.sandbox import paths
    from fathom.sandbox.edge.keeper import Keeper
    from fathom.sandbox.edge.parent import Parent
    from fathom.sandbox.edge.unix_client import UnixHost
    from fathom.sandbox.host import LocalHost

    where = folder or paths.edge_folder()
    if metrics:
        answer = anyio.run(lambda: UnixHost(where).call("metrics"))
        sys.stdout.write(answer["text"])
        return
    logging.getLogger("fathom.sandbox").setLevel(logging.INFO)
    logging.getLogger().handlers[0].setLevel(logging.INFO)
    for path in work or []:
        if not path.is_dir():
            raise typer.BadParameter(f"--work {path} is not a folder")
    mirrors = dict(_mirror(text) for text in mirror or [])
    keeper = Keeper(
        LocalHost("auto", paths.cache_folder(), where, mirrors), most=most, work=tuple(work or [])
    )
    if listen is None:
        if tls_cert or tls_key or tokens:
            raise typer.BadParameter("--tls-cert, --tls-key and --tokens need --listen")
        Parent(keeper).run()
        return
    _listen(keeper, listen, tls_cert, tls_key, tokens or paths.token_file())


def _listen(
    keeper: object, listen: str, tls_cert: Path | None, tls_key: Path | None, tokens: Path
) -> None:
    from fathom.sandbox import paths
    from fathom.sandbox.edge import certificate
    from fathom.sandbox.edge.https_server import load
    from fathom.sandbox.edge.keeper import Keeper
    from fathom.sandbox.edge.parent import Listen, Parent

    assert isinstance(keeper, Keeper)
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise typer.BadParameter(f"--listen is {listen!r}; give HOST:PORT")
    if (tls_cert is None) != (tls_key is None):
        raise typer.BadParameter("--tls-cert and --tls-key belong together")
    if tls_cert is None or tls_key is None:
        tls_cert, tls_key = certificate.own(paths.state_folder() / "edge-tls", host)
    load(str(tls_cert), str(tls_key))  # what is wrong with them is said here, not again and again
    shown = certificate.fingerprint(tls_cert)

    def ready(address: tuple[str, int] | None) -> None:
        assert address is not None
        print(f"https://{host if ':' not in host else f'[{host}]'}:{address[1]}")
        print(f"fingerprint {shown}", flush=True)

    wanted = Listen(host=host, port=int(port), certificate=tls_cert, key=tls_key, tokens=tokens)
    Parent(keeper, wanted).run(ready)


def _mirror(text: str) -> tuple[str, str]:
    name, equals, url = text.partition("=")
    if not (name and equals and url.startswith(("http://", "https://"))):
        raise typer.BadParameter(f"--mirror is {text!r}; give a name and an address, as pypi=URL")
    return name, url


@token.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    scope: Annotated[
        str, typer.Option(help="use: everything; look: lists, figures and logs.")
    ] = "use",
    days: Annotated[float | None, typer.Option(help="After so many days it ends.")] = None,
    tokens: TokenFile = None,
) -> None:
    """Make a token and print it; it cannot be shown again."""
    from fathom.sandbox import paths
    from fathom.sandbox.edge.tokens import SCOPES, Tokens

    if scope not in SCOPES:
        raise typer.BadParameter(f"--scope is {scope!r}; choose {' or '.join(SCOPES)}")
    store = Tokens(tokens or paths.token_file())
    print(store.new(name, scope=scope, days=days))


@token.command(name="ls")
def list_(
    tokens: TokenFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """List the tokens, without their text."""
    from fathom.sandbox import paths
    from fathom.sandbox.edge.tokens import Tokens

    now = time.time()
    rows = [
        {
            "name": found.name,
            "scope": found.scope,
            "created": found.created,
            "expires": found.expires,
            "state": "revoked" if found.revoked else "good" if found.is_good(now) else "expired",
        }
        for found in Tokens(tokens or paths.token_file()).list()
    ]
    if as_json:
        print_json({"tokens": rows})
        return
    shown = [
        [str(row["name"]), str(row["scope"]), str(row["state"]), _day(row["expires"])]
        for row in rows
    ]
    print_table(("name", "scope", "state", "expires"), shown)


def _day(seconds: object) -> str:
    if not isinstance(seconds, float):
        return "never"
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds)) + " UTC"


@token.command()
def revoke(
    name: Annotated[str, typer.Argument(help="The token's name, as `ls` shows it.")],
    tokens: TokenFile = None,
) -> None:
    """Have a token open nothing any more; connections that use it are cut within two seconds."""
    from fathom.sandbox import paths
    from fathom.sandbox.edge.tokens import Tokens

    Tokens(tokens or paths.token_file()).revoke(name)
