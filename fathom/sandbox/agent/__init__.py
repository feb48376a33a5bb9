"""The program inside every sandbox: C sources, and where its compiled form is.

The package's build compiles it beside its sources. A checkout, or a package whose sources were
edited since, compiles it into the cache folder on first use instead: the digest of the sources
names the file, so an old one is never taken for a new one.

Paper: §5.2.5 (command execution, file transfer and terminals inside the sandbox).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from fathom.errors import SandboxError, Unsupported

HERE = Path(__file__).parent
NAME = "fathom-agent"
_HEADERS = ("/usr/include", f"/usr/include/{platform.machine()}-linux-gnu")
_FLAGS = ("-static", "-Os", "-s", "-Wall", "-Wextra", "-std=gnu11")


def sources() -> list[Path]:
    """Return the C files, headers included."""
    return sorted([*HERE.glob("*.c"), *HERE.glob("*.h")])


@functools.cache
def digest() -> str:
    """Return a digest of the sources, the compiler's flags and the kind of machine."""
    found = hashlib.blake2b(digest_size=10)
    found.update(" ".join((*_FLAGS, platform.machine())).encode())
    for path in sources():
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def compile_to(target: Path) -> None:
    """Compile the agent to `target`, which appears whole. Raises Unsupported or SandboxError.

    musl gives a program a tenth of the size of one with glibc, and idle memory to match.
    """
    commands: list[list[str]] = []
    if musl := shutil.which("musl-gcc"):
        # After musl's own: the kernel's headers, which musl does not bring along.
        headers = [part for folder in _HEADERS for part in ("-idirafter", folder)]
        commands.append([musl, *_FLAGS, *headers])
    if gcc := shutil.which("gcc"):
        commands.append([gcc, *_FLAGS])
    if not commands:
        raise Unsupported(
            "the sandbox's agent must be compiled and there is no C compiler: "
            "apt-get install -y musl-tools gcc libc6-dev linux-libc-dev"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{NAME}-", dir=target.parent)
    os.close(handle)
    said = ""
    try:
        for command in commands:
            files = [str(path) for path in sources() if path.suffix == ".c"]
            done = subprocess.run(
                [*command, "-o", name, *files],
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            if done.returncode == 0:
                Path(name).chmod(0o755)
                Path(name).rename(target)
                return
            said = done.stderr.strip()[-1500:]
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
    raise SandboxError(f"the sandbox's agent did not compile: {said}")


def build_beside_sources() -> Path:
    """Compile the agent into the package, for a wheel or a checkout; return its path.

    Raises Unsupported or SandboxError.
    """
    target, mark = HERE / NAME, HERE / f"{NAME}.digest"
    if not (target.exists() and mark.exists() and mark.read_text() == digest()):
        compile_to(target)
        mark.write_text(digest())
    return target


def binary(cache: Path) -> Path:
    """Return the compiled agent, compiling it into `cache` where the package brought none.

    Raises Unsupported or SandboxError.
    """
    built, mark = HERE / NAME, HERE / f"{NAME}.digest"
    wanted = digest()
    with contextlib.suppress(OSError):
        if mark.read_text() == wanted and os.access(built, os.X_OK):
            return built
    target = cache / "agent" / f"{NAME}-{wanted}"
    if target.exists():
        return target
    try:
        compile_to(target)
    except OSError as error:
        raise SandboxError(
            f"the agent cannot be put into {target.parent} ({error.strerror}): set XDG_CACHE_HOME "
            "to a folder that can be written to"
        ) from error
    return target
