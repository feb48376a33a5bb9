"""The image of a worker: Python of this machine, and what a loop needs of this package on top.

The toolkit is a layer of its own, made of the installed files of the light parts (chat protocol,
agent, sandbox: nothing that needs torch) and of the few libraries that they import, with the
certificates by which servers are known. It is made once for each version of them.

Paper: §5.2.5 (toolkits as layers above a base).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import shutil
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fathom.errors import SandboxError
from fathom.sandbox.images import (
    Env,
    Image,
    Owners,
    Store,
    builtin_image,
    pack_folder,
    rootfs,
)
from fathom.sandbox.images.source import Taking
from fathom.sandbox.images.types import OWN

LIBRARY = "/opt/fathom"
CERTIFICATES = f"{LIBRARY}/certificates.pem"
_PACKAGE = Path(__file__).parents[2]
_PARTS = ("chat", "agent", "sandbox")
_LIBRARIES = ("anyio", "httpx2")
_NATIVE = (".so", ".pyd")


def image(cache: Path) -> str:
    """Return the name of a worker's image in the store below `cache`, making it where missing.

    Raises SandboxError where this machine has no system Python or a library needs more than that.
    """
    files = dict(_files())
    digest = hashlib.blake2b(digest_size=10)
    for name, path in sorted(files.items()):
        data = path.read_bytes()
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    with Store(cache / "store") as store:
        base = builtin_image(store, "python", cache)
        digest.update("\n".join(base.layers).encode())
        called = f"{OWN}worker-{digest.hexdigest()}"
        if called not in store.names():
            toolkit = f"{OWN}worker-toolkit-{digest.hexdigest()}"
            with tempfile.TemporaryDirectory(prefix=".toolkit-", dir=cache) as work:
                _lay_out(Path(work), files)
                taking = Taking(owners=Owners(everybody=(0, 0)), mtime=0)
                layer = pack_folder(store, Path(work), taking)
            store.put_image(Image(layers=(layer.digest,)), toolkit, own=True)
            env = Env(base=store.put_image(base), toolkits=[toolkit])
            store.put_image(store.environment(env), called, own=True)
    return called


def _files() -> Iterator[tuple[str, Path]]:
    """Every file of the toolkit: its path in the image, and where it is installed."""
    for path in (_PACKAGE / "__init__.py", _PACKAGE / "errors.py"):
        yield f"fathom/{path.name}", path
    for part in _PARTS:
        for path in (_PACKAGE / part).rglob("*.py"):
            yield f"fathom/{path.relative_to(_PACKAGE)}", path
    for name in _needed():
        for file in importlib.metadata.files(name) or ():
            if file.suffix in _NATIVE:
                raise SandboxError(f"{name} has a native part, {file}, which no toolkit can hold")
            # Some ask for their own version.
            if (file.suffix == ".py" or file.name == "METADATA") and ".." not in file.parts:
                yield str(file), Path(str(file.locate()))
    found = ssl.get_default_verify_paths().openssl_cafile
    for place in (found, "/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/cert.pem"):
        if Path(place).is_file():
            yield Path(CERTIFICATES).name, Path(place)
            return


def _needed() -> list[str]:
    """The names of the libraries, and of those that they need and that are installed here."""
    found: list[str] = []
    asked: list[str] = [*_LIBRARIES]
    while asked:
        name = asked.pop(0)
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            if name in _LIBRARIES:
                raise SandboxError(f"{name} is not installed: a worker needs it") from None
            continue  # of another Python or another system
        if name in found:
            continue
        found.append(name)
        for line in requires:
            wanted = re.match(r"[A-Za-z0-9._-]+", line)
            if wanted is not None and "extra" not in line.partition(";")[2]:
                asked.append(wanted[0])
    return found


def _lay_out(root: Path, files: dict[str, Path]) -> None:
    library = root / LIBRARY.lstrip("/")
    for name, path in files.items():
        target = library / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        target.chmod(0o644)
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        folder.chmod(0o755)
    python = rootfs.find_program("python3")
    assert python is not None  # the base has it
    # In a read-only image nothing compiled could be kept: every start would compile all of it.
    words = ["-q", "--invalidation-mode", "unchecked-hash", "-s", str(root), "-p", "/"]
    done = subprocess.run(
        [str(python), "-I", "-S", "-m", "compileall", *words, str(library)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        raise SandboxError(f"the worker's toolkit cannot be compiled: {done.stdout[-800:]}")
