"""Layers, images and environments as plain values, and their written form.

A layer is one image of metadata and the data blobs that its files lie in. An image is a list of
layers, the lowest first, and how to run a program on them. Both are JSON with sorted keys, so equal
values have equal bytes, and the SHA-256 of those bytes is their name.

Paper: §5.2.5 (base, workspace and toolkit layers, each with a version of its own).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from fathom.sandbox.images.blobs import digest_of
from fathom.sandbox.images.errors import ImageDamaged, ImageError

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:+-]{0,199}")
# Where the names of images lie that this program makes for itself and trusts.
OWN = "builtin/"
MAX_LAYERS = 500
MAX_BLOBS = 2000
MAX_JSON = 4 << 20


def check_digest(text: object) -> str:
    """Return `text` if it is a digest. Raises ImageDamaged."""
    if not isinstance(text, str) or not DIGEST.fullmatch(text):
        raise ImageDamaged(f"{str(text)[:100]!r} is not a digest: sha256: and 64 digits expected")
    return text


def check_name(name: str) -> str:
    """Return `name` if an image may be called so. Raises ImageError."""
    if not _NAME.fullmatch(name) or DIGEST.fullmatch(name) or ".." in name:
        raise ImageError(
            f"{name[:200]!r} cannot name an image: use letters, digits and . _ / : + - (at most "
            "200), beginning with a letter or digit"
        )
    return name


def check_new_name(name: str) -> str:
    """Return `name` if anybody may give it to an image. Raises ImageError.

    What others take for this program's own must not be what somebody packed.
    """
    if check_name(name).startswith(OWN):
        raise ImageError(f"{name} cannot be given: names below {OWN} are this program's own")
    return name


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """The contents of files: its digest and its size in bytes."""

    digest: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One read-only layer. `meta`: digest of its metadata image of `meta_size` bytes."""

    meta: str
    meta_size: int
    data: tuple[Blob, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of metadata and data together."""
        return self.meta_size + sum(blob.size for blob in self.data)

    def encode(self) -> bytes:
        """Return the written form."""
        data = [[blob.digest, blob.size] for blob in self.data]
        return _dump({"kind": "layer", "meta": [self.meta, self.meta_size], "data": data})

    @property
    def digest(self) -> str:
        """The layer's name."""
        return digest_of(self.encode())

    @staticmethod
    def decode(text: bytes) -> Layer:
        """Read the written form. Raises ImageDamaged."""
        value = _load(text, "layer", {"meta", "data"})
        meta, data = value["meta"], value["data"]
        digest, size = _pair(meta)
        blobs = _list(data)
        if len(blobs) > MAX_BLOBS:
            raise ImageDamaged(f"a layer has at most {MAX_BLOBS} data blobs")
        return Layer(meta=digest, meta_size=size, data=tuple(_blob(entry) for entry in blobs))


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRef:
    """A layer that a store holds: its digest and its size in bytes."""

    digest: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """How to run a program on an image: variables, command, folder and user."""

    env: tuple[tuple[str, str], ...] = ()
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    workdir: str = "/"
    user: str = ""

    def over(self, below: RunConfig) -> RunConfig:
        """Return this configuration on top of `below`: what it sets wins."""
        env = {**dict(below.env), **dict(self.env)}
        own = bool(self.entrypoint or self.command)
        return RunConfig(
            env=tuple(env.items()),
            entrypoint=self.entrypoint if own else below.entrypoint,
            command=self.command if own else below.command,
            workdir=self.workdir if self.workdir != "/" else below.workdir,
            user=self.user or below.user,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """Layers from the lowest to the highest, by digest, and how to run a program on them."""

    layers: tuple[str, ...]
    run: RunConfig = RunConfig()
    architecture: str = "amd64"

    def encode(self) -> bytes:
        """Return the written form."""
        run = self.run
        return _dump(
            {
                "kind": "image",
                "layers": list(self.layers),
                "architecture": self.architecture,
                "run": {
                    "env": [list(pair) for pair in run.env],
                    "entrypoint": list(run.entrypoint),
                    "command": list(run.command),
                    "workdir": run.workdir,
                    "user": run.user,
                },
            }
        )

    @property
    def digest(self) -> str:
        """The image's name."""
        return digest_of(self.encode())

    @staticmethod
    def decode(text: bytes) -> Image:
        """Read the written form. Raises ImageDamaged."""
        value = _load(text, "image", {"layers", "architecture", "run"})
        layers, run = value["layers"], value["run"]
        layers = _list(layers)
        if not 1 <= len(layers) <= MAX_LAYERS:
            raise ImageDamaged(f"an image has 1 to {MAX_LAYERS} layers")
        if not isinstance(run, dict):
            raise ImageDamaged("the image does not say how to run a program")
        run = cast("dict[str, Any]", run)
        try:
            config = RunConfig(
                env=tuple((_text(k), _text(v)) for k, v in run["env"]),
                entrypoint=tuple(_text(word) for word in run["entrypoint"]),
                command=tuple(_text(word) for word in run["command"]),
                workdir=_text(run["workdir"]),
                user=_text(run["user"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ImageDamaged(f"the image's run configuration is malformed: {error}") from error
        return Image(
            layers=tuple(check_digest(layer) for layer in layers),
            run=config,
            architecture=_text(value["architecture"]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Env:
    """What a sandbox runs on: a base image, the workspace on it, toolkits on top of both.

    Each is the name of an image, `name@sha256:...` for exactly that version, or a digest alone.
    Every part has versions of its own; one that changes leaves the layers of the others as they
    are.
    """

    base: str
    workspace: str | None = None
    toolkits: Sequence[str] = ()

    @property
    def parts(self) -> tuple[str, ...]:
        """The references from the lowest to the highest."""
        middle = () if self.workspace is None else (self.workspace,)
        return (self.base, *middle, *self.toolkits)


def _dump(value: Mapping[str, Any]) -> bytes:
    return json.dumps({"version": 1, **value}, sort_keys=True, separators=(",", ":")).encode()


def _load(text: bytes, kind: str, keys: set[str]) -> dict[str, Any]:
    if len(text) > MAX_JSON:
        raise ImageDamaged(f"the description of the {kind} is larger than {MAX_JSON} bytes")
    try:
        found: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImageDamaged(f"the description of the {kind} is not JSON: {error}") from error
    value = cast("dict[str, Any]", found) if isinstance(found, dict) else {}
    if value.get("kind") != kind:
        raise ImageDamaged(f"this is not the description of a {kind}")
    if value.get("version") != 1:
        raise ImageDamaged(
            f"the {kind} has format {value.get('version')!r}, this program knows 1: update it"
        )
    if set(value) != {"kind", "version", *keys}:
        raise ImageDamaged(f"the description of the {kind} has missing or unknown parts")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ImageDamaged(f"{value!r:.80} is not text")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise ImageDamaged(f"{value!r:.80} is not a list")
    return cast("list[object]", value)


def _pair(value: object) -> tuple[str, int]:
    pair = _list(value)
    if len(pair) != 2:
        raise ImageDamaged("a digest and a size are expected")
    digest, size = pair
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= 1 << 50:
        raise ImageDamaged(f"{size!r:.80} is not a size in bytes")
    return check_digest(digest), size


def _blob(value: object) -> Blob:
    digest, size = _pair(value)
    return Blob(digest=digest, size=size)
