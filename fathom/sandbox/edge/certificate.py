"""A certificate for a daemon that was given none: made once, told by its fingerprint.

Paper: none (access control).
"""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import os
import shutil
import socket
import ssl
import subprocess
import tempfile
from pathlib import Path

from fathom.errors import SandboxError, Unsupported

_PATH = "/usr/local/bin:/usr/bin:/bin"
_DAYS = 825
_TIMEOUT = 60.0


def own(folder: Path, host: str) -> tuple[Path, Path]:
    """Return certificate and key in `folder`, made where they are missing. `host`: its name.

    Raises SandboxError, Unsupported.
    """
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    if certificate.exists() and key.exists():
        return certificate, key
    program = shutil.which("openssl", path=_PATH)
    if program is None:
        raise Unsupported(
            "a certificate is made by openssl: apt-get install -y openssl, or give --tls-cert and "
            "--tls-key"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as name:
            made = Path(name)
            _make(program, made, host)
            os.replace(made / "key.pem", key)
            os.replace(made / "certificate.pem", certificate)
    except (OSError, subprocess.SubprocessError) as error:
        raise SandboxError(f"no certificate can be made in {folder}: {error}") from error
    return certificate, key


def _make(program: str, folder: Path, host: str) -> None:
    names = {"DNS:localhost", "IP:127.0.0.1", f"DNS:{socket.gethostname()}"}
    with contextlib.suppress(ValueError):
        found = ipaddress.ip_address(host)
        names |= set() if found.is_unspecified else {f"IP:{found}"}
    words = [program, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    words += ["-nodes", "-days", str(_DAYS), "-subj", "/CN=fathom sandbox daemon"]
    words += ["-addext", f"subjectAltName={','.join(sorted(names))}"]
    words += ["-addext", "extendedKeyUsage=serverAuth"]
    words += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "certificate.pem")]
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
        check=False,
        env={"PATH": _PATH, "HOME": "/nonexistent"},
        umask=0o077,
    )
    if done.returncode:
        raise SandboxError(f"openssl made no certificate: {done.stderr.strip()[-500:]}")


def fingerprint(certificate: Path) -> str:
    """Return the SHA-256 of a certificate, as `Client(fingerprint=...)` takes it.

    Raises SandboxError.
    """
    try:
        data = ssl.PEM_cert_to_DER_cert(_first(certificate.read_text()))
    except (OSError, ValueError) as error:
        raise SandboxError(f"{certificate} is no certificate in PEM: {error}") from error
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _first(text: str) -> str:
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    if begin not in text or end not in text:
        raise ValueError("it holds none")
    return begin + text.partition(begin)[2].partition(end)[0] + end + "\n"
