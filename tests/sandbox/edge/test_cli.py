"""The daemon as a user starts it, and the commands that reach it from another machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.sandbox.edge.daemon import REPOSITORY, environment


def fathom(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fathom", *words],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=REPOSITORY,
        env={**environment(), **variables},
        stdin=subprocess.DEVNULL,
        check=False,
    )


def test_a_daemon_with_a_certificate_of_its_own(tmp_path: Path):
    base = Path("/run" if os.geteuid() == 0 else "/tmp")
    folder = base / f"fathom-cli-test-{os.getpid()}"
    state = {"XDG_STATE_HOME": str(tmp_path)}
    made = fathom("sandbox", "token", "new", "ci", "--days", "1", **state)
    assert made.returncode == 0, made.stderr
    words = ["sandbox", "edge", "--folder", str(folder), "--listen", "127.0.0.1:0"]
    daemon = subprocess.Popen(
        [sys.executable, "-m", "fathom", *words],
        cwd=REPOSITORY,
        env={**environment(), **state},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert daemon.stdout is not None
    assert daemon.stderr is not None
    try:
        url = daemon.stdout.readline().strip()
        assert url.startswith("https://127.0.0.1:"), daemon.stderr.read()
        fingerprint = daemon.stdout.readline().split()[1]
        there = {
            "FATHOM_SANDBOX_URL": url,
            "FATHOM_SANDBOX_TOKEN": made.stdout.strip(),
            "FATHOM_SANDBOX_FINGERPRINT": fingerprint,
        }
        kept = fathom("sandbox", "run", "--keep", "--", "sh", "-c", "echo hello > f", **there)
        name = kept.stderr.strip()
        assert (kept.returncode, name[:3]) == (0, "sb-"), kept.stderr
        shown = fathom("sandbox", "exec", name, "--", "cat", "f", **there)
        assert shown.stdout == "hello\n", shown.stderr
        (entry,) = json.loads(fathom("sandbox", "ls", "--json", **there).stdout)["sandboxes"]
        assert entry["id"] == name
        metrics = fathom("sandbox", "edge", "--metrics", "--folder", str(folder))
        assert "fathom_sandboxes 1\n" in metrics.stdout
        assert fathom("sandbox", "token", "revoke", "ci", **state).returncode == 0
        refused = fathom("sandbox", "stop", name, **there)
        assert refused.returncode != 0
        assert "revoked" in refused.stderr
        assert fathom("sandbox", "stop", name, "--folder", str(folder)).returncode == 0
        (row,) = json.loads(fathom("sandbox", "token", "ls", "--json", **state).stdout)["tokens"]
        assert (row["name"], row["state"]) == ("ci", "revoked")
    finally:
        for left in folder.glob("sb-*"):
            fathom("sandbox", "stop", left.name, "--folder", str(folder))
        daemon.send_signal(signal.SIGTERM)
        _, said = daemon.communicate(timeout=30)
    for event in ("event=ready", "event=created", "event=client name=ci", "event=token_refused"):
        assert event in said, event
    assert daemon.returncode == 0
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_what_is_said_about_useless_options(tmp_path: Path):
    edge = ("sandbox", "edge", "--folder", str(tmp_path / "x"))
    for words, said in (
        (("--listen", "nonsense"), "HOST:PORT"),
        (("--listen", "127.0.0.1:0", "--tls-cert", "x"), "belong together"),
        (("--tls-cert", "x", "--tls-key", "y"), "need --listen"),
        (("--work", str(tmp_path / "none")), "not a folder"),
        (("--listen", "127.0.0.1:0", "--tls-cert", __file__, "--tls-key", __file__), "certificate"),
    ):
        done = fathom(*edge, *words)
        assert done.returncode != 0, words
        assert said in done.stderr, (words, done.stderr)
