"""Write images as OCI archives, which every other tool and registry takes.

Layers are packed without compression and in a fixed order, so the same image gives the same bytes.

Paper: none (images leave as they came).
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

from fathom.sandbox.images import tarball
from fathom.sandbox.images.store import Store
from fathom.sandbox.images.types import Image

_LAYER = "application/vnd.oci.image.layer.v1.tar"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_MANIFEST = "application/vnd.oci.image.manifest.v1+json"


class _Pieces:
    """The blobs of an archive that is being written, each once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.known: dict[str, Path] = {}

    def add(self, content: bytes, kind: str) -> dict[str, Any]:
        path = self._folder / f"piece{len(self.known)}"
        path.write_bytes(content)
        return self._describe(path, hashlib.sha256(content).hexdigest(), kind)

    def add_layer(self, store: Store, digest: str) -> dict[str, Any]:
        path = self._folder / f"piece{len(self.known)}"
        with path.open("wb") as out:
            tarball.to_tar(store, digest, out)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        return self._describe(path, found, _LAYER)

    def _describe(self, path: Path, digits: str, kind: str) -> dict[str, Any]:
        self.known.setdefault(digits, path)
        return {"mediaType": kind, "digest": f"sha256:{digits}", "size": path.stat().st_size}


def write_archive(store: Store, image: Image, path: Path, tag: str) -> None:
    """Write `image` to the file `path` as an OCI archive; `tag` is its name there.

    The file appears whole or not at all. Raises ImageError, StoreFull.
    """
    with store.making(f"{path} cannot be written") as work:
        pieces = _Pieces(work)
        layers = [pieces.add_layer(store, digest) for digest in image.layers]
        config = pieces.add(_dump(_config(image, layers)), _CONFIG)
        manifest = pieces.add(
            _dump({"schemaVersion": 2, "mediaType": _MANIFEST, "config": config, "layers": layers}),
            _MANIFEST,
        )
        manifest["annotations"] = {"org.opencontainers.image.ref.name": tag}
        part = path.with_name(f".{path.name}.part")
        try:
            with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as archive:
                _add(archive, "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
                index = {"schemaVersion": 2, "manifests": [manifest]}
                _add(archive, "index.json", _dump(index))
                for digits in sorted(pieces.known):
                    with pieces.known[digits].open("rb") as file:
                        member = tarfile.TarInfo(f"blobs/sha256/{digits}")
                        member.size = pieces.known[digits].stat().st_size
                        archive.addfile(member, file)
            shutil.move(part, path)
        finally:
            part.unlink(missing_ok=True)


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def _config(image: Image, layers: list[dict[str, Any]]) -> dict[str, Any]:
    run = image.run
    return {
        "architecture": image.architecture,
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
        "config": {
            "Env": [f"{key}={value}" for key, value in run.env],
            "Entrypoint": list(run.entrypoint) or None,
            "Cmd": list(run.command) or None,
            "WorkingDir": run.workdir,
            "User": run.user,
        },
    }


def _dump(value: dict[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
