"""Build images from recipes: a Dockerfile and the folder that it copies from.

Every RUN, COPY and ADD makes one layer. What a step depends on (the layers below, variables, the
command) is hashed, and a RUN whose hash is known is not done again. Files get one fixed time, so a
recipe whose commands are deterministic gives the same digest everywhere.

Paper: §5.2.5 (layers are built apart from the sandboxes that use them).
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from fathom.sandbox.images import layers as layering
from fathom.sandbox.images import lookup, source, step, tree
from fathom.sandbox.images.blobs import BlobWriter
from fathom.sandbox.images.dockerfile import Instruction, argument, expand, pairs, parse
from fathom.sandbox.images.errors import BuildFailed, ImageError, ImageMissing
from fathom.sandbox.images.ignore import ignored
from fathom.sandbox.images.source import Owners, Taking
from fathom.sandbox.images.stack import compose
from fathom.sandbox.images.store import Store
from fathom.sandbox.images.tree import Node
from fathom.sandbox.images.types import Image, RunConfig, check_new_name

_CACHE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How to build. `args`: values for ARG. `epoch`: the time of every file made.

    `timeout`: seconds for each RUN; `memory`: bytes for each RUN; `cache`: whether known steps are
    taken instead of done again.
    """

    args: Mapping[str, str] = field(default_factory=dict[str, str])
    epoch: int = 0
    timeout: float = 600.0
    memory: int = 2 << 30
    cache: bool = True


@dataclass(slots=True)
class _Stage:
    image: Image
    line: int
    name: str = ""
    values: dict[str, str] = field(default_factory=dict[str, str])
    has_command: bool = False  # of its own, not of the image below


def build(
    store: Store, recipe: str, context: Path, name: str, options: Options | None = None
) -> Image:
    """Build the recipe `recipe` (its text) with files from the folder `context`; call it `name`.

    Raises BuildFailed with the line of what failed, ImageMissing for a base that is not here,
    Unsupported where this user cannot run commands, StoreFull.
    """
    check_new_name(name)
    builder = _Builder(store, context, options or Options())
    for one in parse(recipe):
        builder.do(one)
    builder.warn_unused()
    image = builder.stages[-1].image
    store.put_image(image, name)
    return image


class _Builder:
    def __init__(self, store: Store, context: Path, options: Options) -> None:
        self.store = store
        self.context = context
        self.options = options
        self.stages: list[_Stage] = []
        self.first: dict[str, str] = {}
        self.declared: set[str] = set()
        self.ignored = ignored(context)

    def do(self, one: Instruction) -> None:
        """Carry out one instruction."""
        actions = {
            "FROM": self._from,
            "ARG": self._arg,
            "ENV": self._env,
            "RUN": self._run,
            "COPY": self._copy,
            "ADD": self._copy,
            "WORKDIR": self._workdir,
            "USER": self._user,
            "ENTRYPOINT": self._start,
            "CMD": self._start,
        }
        try:
            actions[one.name](one)
        except ImageError as error:
            if type(error) is ImageError:
                raise one.fail(str(error)) from error
            raise

    def warn_unused(self) -> None:
        """Refuse values for arguments that the recipe does not have. Raises BuildFailed."""
        if unknown := sorted(set(self.options.args) - self.declared):
            raise BuildFailed(f"the recipe has no ARG {', '.join(unknown)}")

    @property
    def stage(self) -> _Stage:
        return self.stages[-1]

    @property
    def run(self) -> RunConfig:
        return self.stage.image.run

    def _set_run(self, run: RunConfig) -> None:
        self.stage.image = replace(self.stage.image, run=run)

    @property
    def values(self) -> dict[str, str]:
        """What variables hold at this place of the recipe."""
        return self.stage.values | dict(self.run.env) if self.stages else self.first

    def _expand(self, one: Instruction, text: str) -> str:
        return expand(one, text, self.values)

    def _from(self, one: Instruction) -> None:
        words = [expand(one, word, self.first) for word in one.text.split()]
        if len(words) not in (1, 3) or (len(words) == 3 and words[1].upper() != "AS"):
            raise one.fail("write FROM image, or FROM image AS name")
        known = next((s for s in self.stages if s.name == words[0].lower()), None)
        try:
            image = known.image if known else self.store.resolve(words[0])
        except ImageMissing as error:
            raise BuildFailed(f"line {one.line}, FROM: {error}") from error
        wanted = one.flags.get("platform", "").rpartition("/")[2]
        if wanted and wanted != image.architecture:
            raise one.fail(f"{words[0]} is for {image.architecture}, not {wanted}")
        self.stages.append(_Stage(image, one.line, words[2].lower() if len(words) == 3 else ""))

    def _arg(self, one: Instruction) -> None:
        name, default = argument(one, self.values)
        self.declared.add(name)
        value = self.options.args.get(name, default)
        if not self.stages:
            self.first[name] = value or ""
        else:
            self.stage.values[name] = self.first.get(name, "") if value is None else value

    def _env(self, one: Instruction) -> None:
        env = dict(self.run.env)
        env.update(pairs(one, self.values))
        self._set_run(replace(self.run, env=tuple(env.items())))

    def _user(self, one: Instruction) -> None:
        text = self._expand(one, one.text)
        self._owner(one, text)
        self._set_run(replace(self.run, user=text))

    def _start(self, one: Instruction) -> None:
        command = one.command()
        if one.name == "CMD":
            self.stage.has_command = True
            self._set_run(replace(self.run, command=command))
        else:
            # A new entry point does not go with the command of the image below.
            kept = self.run.command if self.stage.has_command else ()
            self._set_run(replace(self.run, entrypoint=command, command=kept))

    def _workdir(self, one: Instruction) -> None:
        path = str(PurePosixPath(self.run.workdir) / self._expand(one, one.text))
        root = self._tree()
        place = lookup.resolve(root, path)
        found = tree.find(root, place)
        if found is not None and not found.is_dir:
            raise one.fail(f"{path} is a file")
        if found is None:
            layer = lookup.with_parents(root, place, tree.folder(mtime=self.options.epoch))
            self._push(self.store.put_tree(layer, []).digest)
        self._set_run(replace(self.run, workdir=os.path.normpath(path)))

    # -- layers -----------------------------------------------------------------------------------

    def _tree(self) -> Node:
        return layering.joined(self.store, self.stage.image.layers, bottom=True)[0]

    def _push(self, digest: str) -> None:
        image = self.stage.image
        self.stage.image = replace(image, layers=(*image.layers, digest))

    def _owner(self, one: Instruction, text: str) -> tuple[int, int]:
        try:
            return lookup.owner(self.store, self.stage.image, text)
        except ImageError as error:
            raise one.fail(str(error)) from error

    def _known(self, *parts: object) -> tuple[Path, str | None]:
        """Return where the layer of a step is noted, and the layer if it is here."""
        text = json.dumps([_CACHE_VERSION, self.options.epoch, *parts])
        note = self.store.folder / "built" / hashlib.sha256(text.encode()).hexdigest()
        if self.options.cache and note.exists():
            digest = note.read_text().strip()
            if layering.is_whole(self.store, digest):
                return note, digest
        return note, None

    def _note(self, note: Path, digest: str) -> None:
        note.parent.mkdir(exist_ok=True)
        with self.store.making("the step cannot be noted") as work:
            (work / "note").write_text(f"{digest}\n")
            (work / "note").replace(note)

    def _run(self, one: Instruction) -> None:
        image, run = self.stage.image, self.run
        env = {
            **self.stage.values,
            **dict(run.env),
            "SOURCE_DATE_EPOCH": str(self.options.epoch),
        }
        note, known = self._known("RUN", image.layers, env, run.workdir, run.user, one.command())
        if known is None:
            uid, gid = self._owner(one, run.user or "0")
            wanted = step.Step(
                argv=one.command(),
                env=env,
                cwd=run.workdir,
                uid=uid,
                gid=gid,
                timeout=self.options.timeout,
                memory=self.options.memory,
            )
            known = self._execute(one, image, wanted)
            self._note(note, known)
        self._push(known)

    def _execute(self, one: Instruction, image: Image, wanted: step.Step) -> str:
        userns = step.mapping()
        try:
            with self.store.making("the step cannot be run") as work:
                for name in ("mounts", "upper", "bundle"):
                    (work / name).mkdir()
                work.chmod(0o711)
                with compose(
                    self.store, image, work / "mounts", upper=work / "upper", userns=userns
                ) as stack:
                    outcome = step.run(wanted, stack.root, work / "bundle")
                self._check(one, outcome)
                # Mount points that the runtime needs are no part of what the command wrote.
                taking = Taking(
                    owners=Owners(base=step.IDS, count=step.ID_COUNT),
                    upper=True,
                    mtime=self.options.epoch,
                    exclude=frozenset(_fresh_mount_points(self._tree())),
                )
                return layering.pack_folder(self.store, work / "upper", taking).digest
        finally:
            os.close(userns)

    def _check(self, one: Instruction, outcome: step.Outcome) -> None:
        said = outcome.output.strip()[-2000:]
        if outcome.timed_out:
            raise one.fail(f"it took longer than {self.options.timeout} seconds: {said}")
        if outcome.exit_code:
            raise one.fail(f"the command ended with {outcome.exit_code}: {said}")

    def _copy(self, one: Instruction) -> None:
        words = [self._expand(one, word) for word in one.words()]
        if len(words) < 2:
            raise one.fail("write the sources, then the place where they go")
        if one.name == "ADD":
            self._check_add(one, words[:-1])
        *names, target = words
        owner = self._owner(one, self._expand(one, one.flags.get("chown", "0:0")))
        mode = one.flags.get("chmod")
        if mode is not None and not re.fullmatch(r"[0-7]{3,4}", mode):
            raise one.fail(f"--chmod={mode} is not a mode such as 755")
        with self.store.making("files cannot be copied") as work:
            with (work / "data").open("wb") as file:
                blob = BlobWriter(file)
                found = self._sources(one, names, blob, owner)
                layer = self._place(one, found, target)
            if mode is not None:
                for _, node in [pair for _, top, _ in found for pair in tree.walk(top)]:
                    if not node.target:
                        node.mode = node.mode & ~0o7777 | int(mode, 8)
            self._push(layering.publish(self.store, layer, work / "data", blob).digest)

    def _check_add(self, one: Instruction, names: list[str]) -> None:
        for name in names:
            if "://" in name or name.startswith("git@"):
                raise one.fail(f"{name} is not a local file: fetch it first, then COPY it")
            if re.search(r"\.(tar|tgz|tbz2|txz)(\.\w+)?$", name):
                raise one.fail(f"{name}: ADD does not unpack archives here; use COPY and RUN tar")

    def _sources(
        self, one: Instruction, names: list[str], blob: BlobWriter, owner: tuple[int, int]
    ) -> list[tuple[bytes, Node, bool]]:
        """Return the last name, the tree and whether it is a folder's contents, for each source."""
        if "from" in one.flags:
            return self._from_stage(one, names, blob, owner)
        taking = Taking(
            owners=Owners(everybody=owner), mtime=self.options.epoch, exclude=self.ignored
        )
        found: list[tuple[bytes, Node, bool]] = []
        for name in names:
            for path in self._matches(one, name):
                where = "/" + str(path.relative_to(self.context)) if path != self.context else ""
                try:
                    node = source.from_path(path, blob, taking, where)
                except (OSError, ImageError) as error:
                    raise one.fail(f"{name} cannot be copied: {error}") from error
                found.append((os.fsencode(path.name), node, node.is_dir))
        return found

    def _matches(self, one: Instruction, name: str) -> list[Path]:
        """Return the files of the context that `name` means, none of them outside of it."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if ".." in parts:
            raise one.fail(f"{name} leads out of the folder of the recipe")
        found = [self.context]
        for part in parts:
            found = [path / entry for path in found for entry in _entries(path, part)]
        inside = os.path.realpath(self.context)
        kept: list[Path] = []
        for path in found:
            real = os.path.realpath(path.parent if path != self.context else path)
            if real != inside and not real.startswith(f"{inside}/"):
                raise one.fail(f"{name} leads out of the folder of the recipe through a link")
            if f"/{path.relative_to(self.context)}" not in self.ignored:
                kept.append(path)
        if not kept:
            raise one.fail(f"{name} is not in the folder of the recipe, or is ignored there")
        return kept

    def _from_stage(
        self, one: Instruction, names: list[str], blob: BlobWriter, owner: tuple[int, int]
    ) -> list[tuple[bytes, Node, bool]]:
        wanted = self._expand(one, one.flags["from"])
        known = next((s for s in self.stages[:-1] if s.name == wanted.lower()), None)
        if known is None and wanted.isdigit() and int(wanted) < len(self.stages) - 1:
            known = self.stages[int(wanted)]
        try:
            image = known.image if known else self.store.resolve(wanted)
        except ImageError as error:
            raise one.fail(f"--from={wanted} is no earlier stage and no image: {error}") from error
        given = owner if "chown" in one.flags else None
        try:
            return [
                (
                    os.fsencode(PurePosixPath(name).name),
                    (node := lookup.copy_out(self.store, image, name, blob, given)),
                    node.is_dir,
                )
                for name in names
            ]
        except ImageError as error:
            raise one.fail(str(error)) from error

    def _place(self, one: Instruction, found: list[tuple[bytes, Node, bool]], target: str) -> Node:
        """Return the layer that puts the sources where `target` says."""
        root = self._tree()
        into = target.endswith("/") or len(found) > 1
        path = str(PurePosixPath(self.run.workdir) / target)
        place = lookup.resolve(root, path)
        known = tree.find(root, place)
        if len(found) > 1 and not target.endswith("/"):
            raise one.fail(f"several sources need a folder: write {target}/")
        layer = tree.folder()
        for name, node, contents in found:
            if contents:
                one_layer = lookup.with_parents(root, place, node)
            else:
                inside = into or (known is not None and known.is_dir)
                where = place + b"/" + name if inside else place
                one_layer = lookup.with_parents(root, where, node)
            layer = tree.merge(layer, one_layer, bottom=False)
        # The root keeps what it was.
        layer.mode, layer.uid, layer.gid, layer.mtime = (
            root.mode,
            root.uid,
            root.gid,
            root.mtime,
        )
        return layer


def _entries(folder: Path, pattern: str) -> list[str]:
    if not any(character in pattern for character in "*?["):
        return [pattern] if os.path.lexists(folder / pattern) else []
    try:
        return sorted(n for n in os.listdir(folder) if fnmatch.fnmatchcase(n, pattern))
    except OSError:
        return []


def _fresh_mount_points(root: Node) -> list[str]:
    """Return the folders that the runtime makes in the tree because nothing is there."""
    return [f"/{name}" for name in ("proc", "dev", "sys") if name.encode() not in root.children]
