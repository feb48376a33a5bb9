"""Pull images from a registry that speaks the distribution protocol, version 2.

A reference is `host[:port]/repository[:tag]` or `...@sha256:...`; a name without a host means
Docker's own registry. Plain http is used for the loopback only, unless the reference begins with
`http://`.

Paper: none (container images come from registries).
"""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO
from urllib.parse import urlsplit

import httpx2

from fathom.sandbox.images import oci
from fathom.sandbox.images.errors import ImageDamaged, ImageMissing, RegistryError
from fathom.sandbox.images.oci import Descriptor
from fathom.sandbox.images.packed import Allowance
from fathom.sandbox.images.store import Store
from fathom.sandbox.images.tarball import Limits
from fathom.sandbox.images.types import DIGEST, Image

_PATH = re.compile(
    r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*"
)
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_HOST = re.compile(r"[A-Za-z0-9.-]+(?::\d{1,5})?|\[[0-9a-fA-F:]+\](?::\d{1,5})?")
_CHALLENGE = re.compile(r'(\w+)="([^"]*)"')
_TRIES = 3
_PAUSE = 0.3
_SMALL = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Where an image is: a registry's address, the repository in it, and a tag or digest."""

    address: str
    repository: str
    version: str


def parse_reference(text: str) -> Reference:
    """Read a reference as people write it. Raises RegistryError."""
    plain = text.startswith("http://")
    rest = text.removeprefix("http://").removeprefix("https://").removeprefix("docker://")
    head, slash, tail = rest.partition("/")
    if slash and ("." in head or ":" in head or head == "localhost"):
        host, path = head, tail
    else:
        host, path = "registry-1.docker.io", rest if slash else f"library/{rest}"
    path, at, digest = path.partition("@")
    path, colon, tag = path.partition(":")
    version = digest if at else tag if colon else "latest"
    good = DIGEST.fullmatch(digest) if at else _TAG.fullmatch(version)
    if not (_HOST.fullmatch(host) and _PATH.fullmatch(path) and good):
        raise RegistryError(
            f"{text[:200]!r} is not a reference to an image: write host[:port]/repository[:tag] "
            "or ...@sha256:..."
        )
    name = urlsplit(f"//{host}").hostname or ""
    loopback = name in ("localhost", "::1") or name.startswith("127.")
    scheme = "http" if plain or loopback else "https"
    return Reference(address=f"{scheme}://{host}", repository=path, version=version)


class Registry:
    """A repository of a registry as a source of image pieces. Several threads may read it."""

    def __init__(
        self,
        store: Store,
        reference: Reference,
        *,
        credentials: tuple[str, str] | None = None,
        timeout: float = 60.0,
    ) -> None:
        self._store = store
        self._reference = reference
        self._credentials = credentials
        self._client = httpx2.Client(timeout=timeout, follow_redirects=True)
        self._token: str | None = None
        # What a registry announces is no bound: a layer must not take everybody else's room.
        self._room = Allowance(1 << 62, shutil.disk_usage(store.folder).free // 10 * 9)
        self._lock = threading.Lock()

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def root(self) -> Descriptor:
        """Ask which manifest the tag means. Raises RegistryError, ImageMissing."""
        content, kind = self._get(f"manifests/{self._reference.version}", oci.ACCEPT, _SMALL)
        digest = "sha256:" + hashlib.sha256(content).hexdigest()
        if DIGEST.fullmatch(self._reference.version) and digest != self._reference.version:
            raise ImageDamaged(f"the registry sent something else than {self._reference.version}")
        return Descriptor(kind=kind, digest=digest, size=len(content))

    def small(self, descriptor: Descriptor) -> bytes:
        """Return a description: a manifest, or what is stored like a layer."""
        manifest = "manifest" in descriptor.kind or "index" in descriptor.kind
        place = "manifests" if manifest else "blobs"
        return self._get(f"{place}/{descriptor.digest}", oci.ACCEPT, _SMALL)[0]

    @contextmanager
    def open(self, descriptor: Descriptor) -> Generator[BinaryIO]:
        """Fetch a layer into the store's work folder, proven while it comes in, and open it."""
        with self._store.making(f"the layer {descriptor.digest} cannot be fetched") as work:
            path = work / "layer"
            for attempt in range(_TRIES):
                try:
                    with path.open("wb") as out:
                        self._download(descriptor, out)
                    break
                except (httpx2.HTTPError, RegistryError) as error:
                    if attempt + 1 == _TRIES:
                        raise RegistryError(
                            f"the layer {descriptor.digest} could not be fetched from "
                            f"{self._reference.address}: {error}"
                        ) from error
                    time.sleep(_PAUSE * (attempt + 1))
            with path.open("rb") as file:
                path.unlink()
                yield file

    def _download(self, descriptor: Descriptor, out: BinaryIO) -> None:
        found, size = hashlib.sha256(), 0
        with self._stream(f"blobs/{descriptor.digest}", "*/*") as answer:
            self._check(answer, descriptor.digest)
            for piece in answer.iter_raw():
                size += len(piece)
                if size > descriptor.size:
                    break
                self._room.take(len(piece))
                found.update(piece)
                out.write(piece)
        if size < descriptor.size:
            raise RegistryError(f"{descriptor.digest} ended after {size} bytes")
        if size != descriptor.size or "sha256:" + found.hexdigest() != descriptor.digest:
            raise ImageDamaged(f"the registry sent something else than {descriptor.digest}")

    def _get(self, path: str, accept: str, limit: int) -> tuple[bytes, str]:
        problem = ""
        for attempt in range(_TRIES):
            try:
                with self._stream(path, accept) as answer:
                    self._check(answer, path)
                    content = _some(answer, limit)
                    if len(content) > limit:
                        raise ImageDamaged(f"{path} is larger than {limit} bytes")
                    kind = answer.headers.get("Content-Type", "").partition(";")[0].strip()
                    return content, kind
            except httpx2.HTTPError as error:
                problem = str(error)
            if attempt + 1 < _TRIES:
                time.sleep(_PAUSE * (attempt + 1))
        raise RegistryError(f"{self._reference.address} cannot be reached: {problem}")

    def _check(self, answer: httpx2.Response, what: str) -> None:
        if answer.status_code == 200:
            return
        where = f"{self._reference.address}/{self._reference.repository}"
        if answer.status_code == 404:
            raise ImageMissing(f"{where} has no {what}")
        if answer.status_code in (401, 403):
            raise RegistryError(f"{where} refuses {what}: give a user name and password")
        raise RegistryError(f"{where} answered {answer.status_code} for {what}")

    @contextmanager
    def _stream(self, path: str, accept: str) -> Generator[httpx2.Response]:
        url = f"{self._reference.address}/v2/{self._reference.repository}/{path}"
        for first in (True, False):
            headers = {"Accept": accept, "Accept-Encoding": "identity"}
            if self._token:
                headers["Authorization"] = self._token
            with self._client.stream("GET", url, headers=headers) as answer:
                if answer.status_code != 401 or not first:
                    yield answer
                    return
                challenge = answer.headers.get("WWW-Authenticate", "")
            self._log_in(challenge)

    def _log_in(self, challenge: str) -> None:
        """Answer a registry's question for a token or password. Raises RegistryError."""
        kind, _, rest = challenge.partition(" ")
        given: dict[str, str] = dict(_CHALLENGE.findall(rest))
        with self._lock:
            if kind.lower() == "basic" and self._credentials:
                self._token = _basic(self._credentials)
                return
            if kind.lower() != "bearer" or "realm" not in given:
                raise RegistryError(f"{self._reference.address} wants a user name and password")
            realm = urlsplit(given["realm"])
            secure = realm.scheme == "https" or self._reference.address.startswith("http://")
            if realm.scheme not in ("http", "https") or (self._credentials and not secure):
                raise RegistryError(
                    f"the registry's place for tokens is not safe: {realm.geturl()}"
                )
            query = {key: given[key] for key in ("service", "scope") if key in given}
            query.setdefault("scope", f"repository:{self._reference.repository}:pull")
            headers = {"Authorization": _basic(self._credentials)} if self._credentials else {}
            try:
                with self._client.stream(
                    "GET", given["realm"], params=query, headers=headers
                ) as answer:
                    value = oci.parse(_some(answer, _SMALL), "token")
            except (httpx2.HTTPError, ImageDamaged) as error:
                raise RegistryError(f"no token from {given['realm']}: {error}") from error
            token = value.get("token") or value.get("access_token")
            if not isinstance(token, str):
                raise RegistryError(f"no token from {given['realm']} ({answer.status_code})")
            self._token = f"Bearer {token}"


def _some(answer: httpx2.Response, limit: int) -> bytes:
    """Return what a server sends, little more than `limit` bytes of it."""
    content = bytearray()
    for piece in answer.iter_bytes():
        content += piece
        if len(content) > limit:
            break
    return bytes(content)


def _basic(credentials: tuple[str, str]) -> str:
    return "Basic " + base64.b64encode(":".join(credentials).encode()).decode()


def pull(
    store: Store,
    reference: str,
    name: str | None = None,
    *,
    architecture: str | None = None,
    credentials: tuple[str, str] | None = None,
    limits: Limits | None = None,
    timeout: float = 60.0,
) -> Image:
    """Pull an image, several layers at a time, and call it `name`, its reference when not given.

    `timeout`: seconds to wait for each answer and each piece. Raises RegistryError, ImageMissing,
    ImageDamaged, ArchiveRefused, ImageTooLarge, StoreFull.
    """
    where = parse_reference(reference)
    short = reference.rpartition("://")[2].partition("@")[0]
    with Registry(store, where, credentials=credentials, timeout=timeout) as registry:
        return oci.import_image(
            store,
            registry,
            registry.root(),
            name or short,
            architecture=architecture,
            limits=limits,
        )
