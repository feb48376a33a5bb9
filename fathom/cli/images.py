"""`fathom sandbox images`: build, fetch, look at, move and clean up the images of sandboxes.

Paper: §5.2.5 (images in layers).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fathom.cli.output import print_json, print_table
from fathom.cli.terminal import TASK_FAILED, visible
from fathom.errors import ConfigError

if TYPE_CHECKING:
    from fathom.sandbox.images import Image, Store

app = typer.Typer(no_args_is_help=True, help="Images of sandboxes: layers by digest.")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Folder = Annotated[
    Path | None,
    typer.Option("--store", help="Folder of the store (default: the user's cache).", metavar="DIR"),
]
Reference = Annotated[str, typer.Argument(help="A name, name@sha256:..., or sha256:...")]


@app.callback()
def _group() -> None:
    """Images of sandboxes: layers by digest."""


def _open(folder: Path | None) -> Store:
    from fathom.sandbox.images import Store

    return Store(folder)


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    raise AssertionError


def _about(store: Store, image: Image) -> dict[str, Any]:
    from fathom.sandbox.images.care import describe

    rows = describe(store, image)
    return {
        "digest": image.digest,
        "architecture": image.architecture,
        "layers": [
            {"digest": digest, "metadata_bytes": meta, "data_bytes": data, "local_bytes": here}
            for digest, meta, data, here in rows
        ],
        "run": {
            "env": dict(image.run.env),
            "entrypoint": list(image.run.entrypoint),
            "command": list(image.run.command),
            "workdir": image.run.workdir,
            "user": image.run.user,
        },
    }


def _print_made(image: Image, name: str, as_json: bool) -> None:
    if as_json:
        print_json({"name": name, "digest": image.digest, "layers": list(image.layers)})
    else:
        print(f"{name}  {image.digest}  {len(image.layers)} layers")


@app.command("ls")
def list_images(folder: Folder = None, as_json: AsJson = False) -> None:
    """List the images of the store: name, digest, layers, size, and how much of it is here."""
    with _open(folder) as store:
        found = {name: _about(store, store.image(d)) for name, d in store.names().items()}
        if as_json:
            print_json(found)
            return
        rows: list[list[str]] = []
        for name, about in found.items():
            layers = about["layers"]
            total = sum(one["metadata_bytes"] + one["data_bytes"] for one in layers)
            here = sum(one["metadata_bytes"] + one["local_bytes"] for one in layers)
            short = about["digest"][:19]
            rows.append([visible(name), short, str(len(layers)), _size(total), _size(here)])
        print_table(["name", "digest", "layers", "size", "here"], rows)


@app.command()
def build(
    name: Annotated[str, typer.Argument(help="What to call the image.")],
    context: Annotated[
        Path | None, typer.Argument(help="Folder of the recipe, or the folder to pack.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="The recipe (default: DIR/Dockerfile).")
    ] = None,
    argument: Annotated[
        list[str] | None, typer.Option("--arg", help="NAME=VALUE for an ARG of the recipe.")
    ] = None,
    pack: Annotated[bool, typer.Option("--pack", help="Pack the folder as it is.")] = False,
    debian: Annotated[
        str | None, typer.Option(help="Make a Debian system of this release.", metavar="SUITE")
    ] = None,
    package: Annotated[
        list[str] | None,
        typer.Option(help="A Debian package: of the system, or else of a toolkit layer."),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Image on which a toolkit will lie; it has the rest.")
    ] = None,
    cache: Annotated[bool, typer.Option(help="Take steps that were done before.")] = True,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for each RUN.")] = 600.0,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Build an image: from a Dockerfile, a folder, a Debian release, or Debian packages."""
    from fathom.sandbox.images import debian as packages
    from fathom.sandbox.images import image_of_folder
    from fathom.sandbox.images.recipe import Options
    from fathom.sandbox.images.recipe import build as build_recipe

    with _open(folder) as store:
        if debian is not None:
            image = packages.system(store, name, suite=debian, packages=package or ())
        elif package:
            image = packages.toolkit(store, name, package, base=base)
        elif context is None:
            raise typer.BadParameter("give a folder: of a recipe, or with --pack what to pack")
        elif not context.is_dir():
            what = "is not a folder" if context.exists() else "does not exist"
            raise typer.BadParameter(
                f"{context} {what}: give the folder of a recipe, or with --pack what to pack"
            )
        elif pack:
            image = image_of_folder(store, context, name)
        else:
            recipe = file or context / "Dockerfile"
            if not recipe.is_file():
                raise typer.BadParameter(f"{recipe} does not exist; --pack takes a folder as it is")
            options = Options(args=_arguments(argument or []), timeout=timeout, cache=cache)
            image = build_recipe(store, recipe.read_text(), context, name, options)
    _print_made(image, name, as_json)


def _arguments(words: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise typer.BadParameter(f"--arg {word!r}: write NAME=VALUE")
        found[key] = value
    return found


@app.command()
def pull(
    source: Annotated[
        str,
        typer.Argument(
            help="host/repository:tag, an archive or OCI layout, or a name with --from."
        ),
    ],
    name: Annotated[str | None, typer.Option(help="What to call it here.")] = None,
    origin: Annotated[
        str | None,
        typer.Option("--from", help="Address of another store: a path, http(s), or fsspec's."),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--all", help="With --from: fetch all contents now, not on demand.")
    ] = False,
    architecture: Annotated[str | None, typer.Option(help="amd64, arm64, ...")] = None,
    tag: Annotated[str | None, typer.Option(help="Which image of an archive with several.")] = None,
    user: Annotated[
        str | None, typer.Option(help="NAME:PASSWORD for the registry.", envvar="FATHOM_REGISTRY")
    ] = None,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Fetch an image: from a registry, an archive, or another store (then on demand)."""
    from fathom.sandbox.images import oci, registry, remote

    with _open(folder) as store:
        if origin is not None:
            image = remote.attach(store, origin, source)
            if whole:
                remote.fetch(store, image)
            if name is not None:
                store.tag(name, image.digest)
        elif Path(source).exists():
            called = name or Path(source).name.partition(".")[0]
            image = oci.import_archive(
                store, Path(source), called, tag=tag, architecture=architecture
            )
            name = called
        elif source.startswith(("/", ".", "~")) or source.endswith((".tar", ".tar.gz", ".tgz")):
            raise typer.BadParameter(
                f"{source} does not exist: give an archive or an OCI layout that does, or "
                "host/repository:tag"
            )
        else:
            credentials = None
            if user is not None:
                login, _, password = user.partition(":")
                credentials = (login, password)
            image = registry.pull(
                store, source, name, architecture=architecture, credentials=credentials
            )
    _print_made(image, name or source, as_json)


@app.command()
def push(
    reference: Reference,
    address: Annotated[str, typer.Argument(help="A folder, or an address that fsspec can write.")],
    name: Annotated[str | None, typer.Option(help="What to call it there.")] = None,
    folder: Folder = None,
) -> None:
    """Publish an image so that other stores can read it on demand."""
    from fathom.sandbox.images import remote

    with _open(folder) as store:
        given = name or (None if reference.startswith("sha256:") else reference.partition("@")[0])
        remote.push(store, store.resolve(reference), address, given)


@app.command("push-archive")
def push_archive(
    reference: Reference,
    path: Annotated[Path, typer.Argument(help="The archive to write.")],
    tag: Annotated[str, typer.Option(help="Its name in the archive.")] = "latest",
    folder: Folder = None,
) -> None:
    """Write an image as an OCI archive, which other tools and registries take."""
    from fathom.sandbox.images.export import write_archive

    with _open(folder) as store:
        write_archive(store, store.resolve(reference), path, tag)


@app.command()
def inspect(reference: Reference, folder: Folder = None, as_json: AsJson = False) -> None:
    """Show what an image is made of, how much of it is here, and how other tools run it.

    Of the latter sandboxes use the variables only.
    """
    with _open(folder) as store:
        about = _about(store, store.resolve(reference))
        if as_json:
            print_json(about)
            return
        print(f"digest        {about['digest']}\narchitecture  {about['architecture']}")
        for key, value in about["run"].items():
            print(f"{key:<13} {visible(str(value))}")
        print()
        rows = [
            [
                one["digest"][:19],
                _size(one["metadata_bytes"]),
                _size(one["data_bytes"]),
                _size(one["local_bytes"]),
            ]
            for one in about["layers"]
        ]
        print_table(["layer", "metadata", "contents", "here"], rows)


@app.command()
def rm(
    names: Annotated[list[str], typer.Argument(help="Names to forget; `gc` frees the room.")],
    folder: Folder = None,
) -> None:
    """Forget names of images."""
    with _open(folder) as store:
        for name in names:
            store.untag(name)


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Remove what no name and no running sandbox needs."""
    from fathom.sandbox.images.care import collect

    with _open(folder) as store:
        done = collect(store, dry_run=dry_run)
    if as_json:
        print_json({"removed": done.removed, "freed_bytes": done.freed, "kept": done.kept})
    else:
        verb = "would remove" if dry_run else "removed"
        print(f"{verb} {done.removed} files, {_size(done.freed)}; {done.kept} stay")


@app.command()
def fsck(
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove damaged files, so that they can be fetched.")
    ] = False,
    folder: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Prove every byte of the store. Exit code 1: something is damaged or missing."""
    from fathom.sandbox.images.care import check

    if folder is not None and not folder.is_dir():
        raise ConfigError(f"there is no store at {folder}: nothing was proven")
    with _open(folder) as store:
        found = check(store, repair=repair)
    if as_json:
        print_json(
            [{"subject": p.subject, "problem": p.problem, "repaired": p.repaired} for p in found]
        )
    else:
        for one in found:
            print(f"{visible(one.subject)}: {one.problem}{' (removed)' if one.repaired else ''}")
        if not found:
            print("everything matches its digest")
    if found:
        raise typer.Exit(TASK_FAILED)


@app.command()
def probe(as_json: AsJson = False) -> None:
    """Try what this machine can do for images: mounts, writes, contents on demand, programs."""
    from fathom.sandbox.images.probe import examine

    found = examine()
    if as_json:
        print_json({one.name: one.problem or True for one in found})
        return
    for one in found:
        print(f"{one.name:<22} {'works' if one.works else f'no: {one.problem}'}")
