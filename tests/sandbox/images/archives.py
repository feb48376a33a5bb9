"""Archives of images made by hand, so that every part of them can be wrong."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any


def entry(name: str, content: bytes = b"", **values: Any) -> tuple[tarfile.TarInfo, bytes]:
    """Return a member; `values` are the attributes of a TarInfo."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in values.items():
        setattr(member, key, value)
    return member, content


def tar(*entries: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar archive of members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as archive:
        for member, content in entries:
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Layout:
    """An OCI layout in a folder; `write` changes or adds a piece and returns its descriptor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "blobs/sha256").mkdir(parents=True)
        (folder / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')

    def write(self, content: bytes, kind: str) -> dict[str, Any]:
        name = digest(content)
        (self.folder / "blobs/sha256" / name[7:]).write_bytes(content)
        return {"mediaType": kind, "digest": name, "size": len(content)}

    def image(self, *layers: bytes, **config: Any) -> dict[str, Any]:
        """Write an image of uncompressed archives, packed by gzip, and return its descriptor."""
        packed = [gzip.compress(layer, mtime=0) for layer in layers]
        about = {
            "architecture": "amd64",
            "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [digest(layer) for layer in layers]},
            "config": config,
        }
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self.write(
                json.dumps(about).encode(), "application/vnd.oci.image.config.v1+json"
            ),
            "layers": [
                self.write(layer, "application/vnd.oci.image.layer.v1.tar+gzip") for layer in packed
            ],
        }
        return self.write(
            json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json"
        )

    def index(self, *manifests: dict[str, Any]) -> Path:
        """Write the index and return the layout's folder."""
        (self.folder / "index.json").write_text(
            json.dumps({"schemaVersion": 2, "manifests": list(manifests)})
        )
        return self.folder
