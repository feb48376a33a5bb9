"""Virtual machines as a client makes them: what to boot, saved machines to begin from, copies.

A machine that boots takes seconds under emulation. The first one of a kind is therefore booted,
saved as a template and thrown away; it and every later one of that kind goes on from there, with a
secret, randomness, a name and a date of its own.

Paper: §5.2.5 (microVM and full VM substrates; snapshots and forks).
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fathom.errors import SandboxError, SandboxLost, Unsupported
from fathom.sandbox import agent, paths, state
from fathom.sandbox.egress import nft_program
from fathom.sandbox.nodelink import NodeLink
from fathom.sandbox.snapshots import Snapshots
from fathom.sandbox.substrates import container
from fathom.sandbox.types import Caps, FullVM, MicroVM
from fathom.sandbox.vm import accel, disks, emulator, kernel, machine, pack, talk
from fathom.sandbox.vm.chain import FACTS
from fathom.sandbox.vm.launch import MachineLaunch, launch_in
from fathom.sandbox.vm.saved import FORMAT

VM = MicroVM | FullVM
_MOST_TEMPLATES = 6
_ABANDONED = 3600.0
_SETTLE_TIMEOUT = 120.0
# The login on the screen begins when nothing else is left to start, so it is not waited for by the
# first line. A system without one goes on after ten seconds.
_SYSTEM_AT_REST = """systemctl is-system-running --wait
for i in $(seq 50); do pgrep -x agetty && break; sleep 0.2; done
sleep 1"""


@dataclass(slots=True)
class KnownMachine:
    """A machine of this host: what it was made from, for its copies."""

    spec: VM
    launch: MachineLaunch
    caps: Caps
    phases: int = 0


class Machines:
    """The machines of one host. Every call blocks and raises SandboxError."""

    def __init__(self, link: NodeLink, cache: Path, runtime: Path) -> None:
        self.link = link
        self.cache = cache
        self.runtime = runtime
        self.outlive = False
        self.known: dict[str, KnownMachine] = {}

    def find(self, name: str) -> KnownMachine:
        """Return a machine by its name. Raises SandboxLost."""
        if name not in self.known:
            raise SandboxLost(f"sandbox {name} was stopped: create another one")
        return self.known[name]

    # Making ------------------------------------------------------------------------------------

    def create(self, spec: VM) -> dict[str, Any]:
        """Start a machine from its kind's template, which is made when it is missing."""
        spec.check()
        launch = self._plan(spec)
        template = self._template(launch)
        return self._start(spec, replace(launch, template=str(template), keep=True))

    def _plan(self, spec: VM) -> MachineLaunch:
        """Say how a machine is run here. Raises Unsupported, SandboxError."""
        if os.geteuid() != 0:
            raise Unsupported(
                "virtual machines need root here, who shuts the emulator in: run as root, or use "
                "Container"
            )
        found = emulator.find(self.cache)
        fast = accel.find(self.cache)
        guest = kernel.find(self.cache)
        program = agent.binary(self.cache)
        full = isinstance(spec, FullVM)
        if isinstance(spec, FullVM):
            base = disks.full_disk(self.cache, spec.image, spec.disk_bytes)
        else:
            base = disks.small_disk(self.cache, spec.image)
        scratch = self.cache / "vm" / "scratch"
        scratch.mkdir(parents=True, exist_ok=True, mode=0o700)
        cpus = 1 if spec.cpu is None else max(1, round(spec.cpu + 0.49))
        return MachineLaunch(
            folder=Path("/nonexistent"),
            substrate="fullvm" if full else "microvm",
            accelerator=fast.name,
            agent=str(program),
            tree=str(found.tree),
            kernel=str(guest.packed if full else guest.image),
            initramfs=str(kernel.initramfs(guest, program, self.cache)),
            base=str(base),
            memory=spec.memory_bytes,
            disk=spec.disk_bytes,
            cpus=min(cpus, os.cpu_count() or 1),
            cpu=spec.cpu,
            hostname=spec.hostname,
            uid=0,
            user=spec.user if isinstance(spec, FullVM) else "user",
            scratch=str(scratch),
        )

    def _start(self, spec: VM, plan: MachineLaunch, **source: str) -> dict[str, Any]:
        paths.make_runtime_folder(self.runtime)
        folder = self.runtime / f"sb-{os.getpid()}-{secrets.token_hex(5)}"
        launch = replace(
            plan, folder=folder, uid=container.first_id(folder.name), outlive=self.outlive
        )
        folder.mkdir(mode=0o711)
        try:
            self.link.create(folder, launch.as_json(), **source)
        except BaseException:
            if not state.reap_one(folder):
                state.remove(folder)
            raise
        caps = caps_of(spec, launch)
        self.known[folder.name] = KnownMachine(spec, launch, caps)
        return {"id": folder.name, "caps": caps, "environment": {}}

    # Templates ---------------------------------------------------------------------------------

    def _template(self, launch: MachineLaunch) -> Path:
        """Return the saved machine that one like this begins with, booting it when missing."""
        folder = self.cache / "vm" / "templates" / _kind_of(launch)
        if (folder / FACTS).is_file():
            os.utime(folder)
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Of this kind alone: a full machine takes long to boot.
        with _locked(folder.with_suffix(".lock")):
            if (folder / FACTS).is_file():
                return folder
            self._boot(launch, folder)
            _remove_old(self.cache, folder.parent)
        return folder

    def _boot(self, launch: MachineLaunch, target: Path) -> None:
        spec = FullVM() if launch.substrate == "fullvm" else MicroVM()
        tsc = accel.tsc_khz() if launch.accelerator == "tcg" else 0
        made = self._start(spec, replace(launch, hostname="template", tsc_khz=tsc))
        try:
            self._warm(made["id"], launch)
            self._save(made["id"], target, {"substrate": launch.substrate})
        finally:
            self.destroy(made["id"])

    def _warm(self, id: str, launch: MachineLaunch) -> None:
        """Let a fresh machine come to rest, and read what every command reads."""
        words = "true" if launch.substrate == "microvm" else _SYSTEM_AT_REST
        # An image without a shell has nothing to warm, and a system that runs degraded still runs.
        with contextlib.suppress(SandboxError):
            talk.execute(self.runtime / id, self.link.secret_of(id), words, timeout=_SETTLE_TIMEOUT)

    def _save(self, id: str, target: Path, facts: dict[str, Any]) -> int:
        """Keep a machine as of now in the folder `target`, which appears whole or not at all."""
        work = Path(tempfile.mkdtemp(prefix=".saving-", dir=target.parent))
        # What it grew from must not be removed meanwhile.
        with Snapshots(self.cache).lock(exclusive=False):
            try:
                answer = self.link.request("keep", id=id, target=str(work), facts=facts)
                work.rename(target)
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                raise
        return int(answer["size"])

    # Copies ------------------------------------------------------------------------------------

    def fork(self, id: str, count: int, reseed: bool) -> dict[str, Any]:
        """Make machines that go on from this moment, processes included."""
        known = self.find(id)
        captured = str(self.link.request("capture", id=id)["captured"])
        made: list[dict[str, Any]] = []
        try:
            for number in range(count):
                name = known.spec.hostname
                name = f"{name[:50]}-{number + 1}" if reseed else name
                plan = replace(known.launch, hostname=name, template="")
                made.append(self._start(known.spec, plan, captured=captured))
        except BaseException:
            for one in made:
                self.destroy(one["id"])
            raise
        finally:
            self.link.request("release", captured=captured)
        return {"made": made}

    def snapshot(self, id: str) -> dict[str, Any]:
        """Keep the machine as of now, processes included."""
        known = self.find(id)
        folder = self.cache / "snapshots"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        name = f"snap-{secrets.token_hex(8)}"
        launch = known.launch.as_json()
        facts = {"substrate": known.launch.substrate, "launch": launch}
        return {"snapshot": name, "size": self._save(id, folder / name, facts)}

    def restore(self, folder: Path, facts: dict[str, Any], spec: object) -> dict[str, Any]:
        """Start a machine from a snapshot of one of its kind."""
        wanted = {"microvm": MicroVM, "fullvm": FullVM}[facts["substrate"]]
        if not isinstance(spec, wanted):
            raise SandboxError(f"snapshot {folder.name} is of a {wanted.__name__}: ask for one")
        spec.check()
        plan = self._plan(spec)
        then = launch_in(folder, facts["launch"])
        if _kind_of(plan) != _kind_of(then):
            raise SandboxError(
                f"snapshot {folder.name} is of a {wanted.__name__} of other values, or of another "
                "version of QEMU, its kernel or its image: ask for the same"
            )
        return self._start(spec, replace(plan, template=str(folder), keep=False))

    def pack(self, id: str, name: str | None) -> dict[str, Any]:
        """Make a layer of what the machine wrote, and with `name` an image with it on top."""
        known = self.find(id)
        if isinstance(known.spec, FullVM):
            raise Unsupported(
                "a full VM writes to a disk, not to a layer: use snapshot(), or MicroVM"
            )
        secret, folder = self.link.secret_of(id), self.runtime / id
        disk = known.launch.base
        return {"layer": pack.pack(self.cache, known.spec, disk, folder, secret, name)}

    # Living ------------------------------------------------------------------------------------

    def screenshot(self, id: str) -> dict[str, Any]:
        """Return the graphical console as PNG, in base 64."""
        known = self.find(id)
        if not known.caps.screenshot:
            raise Unsupported("this machine has no screen: use FullVM")
        path = self.runtime / id / str(self.link.request("screenshot", id=id)["file"])
        try:
            return {"png": base64.b64encode(path.read_bytes()).decode()}
        finally:
            path.unlink(missing_ok=True)

    def destroy(self, id: str) -> None:
        """End a machine. Does nothing where there is none."""
        self.known.pop(id, None)
        self.link.destroy(id)

    def adopt(self, folder: Path, spec: VM, caps: Caps, launch: MachineLaunch) -> None:
        """Take over a machine that outlived its node."""
        self.link.adopt(folder)
        self.known[folder.name] = KnownMachine(spec, launch, caps)


def caps_of(spec: VM, launch: MachineLaunch) -> Caps:
    """Say what a machine will do for `spec`."""
    full = isinstance(spec, FullVM)
    as_root = launch.user == "root"
    networks = {"none", "domain", "mirror"} | ({"address"} if nft_program() else set[str]())
    limits = {"memory", "cpu", "disk"} | (set[str]() if as_root else {"pids"})
    return Caps(
        substrate=launch.substrate,
        enforced=frozenset(limits),
        not_enforced=frozenset(),
        reports_oom=True,
        timeout_kills="command",
        separate_user=not as_root,
        networks=frozenset(networks),
        seccomp=not as_root,
        landlock=not full,
        hardware_isolation=launch.accelerator == "kvm",
        snapshot="memory",
        fork="memory",
        pause=True,
        screenshot=full,
        accelerator=launch.accelerator,
    )


def _kind_of(launch: MachineLaunch) -> str:
    """Return what tells machines that can begin from the same saved one from others."""
    values = launch.as_json()
    for name in ("folder", "uid", "hostname", "template", "keep", "outlive", "tsc_khz", "scratch"):
        del values[name]
    values["settings"] = hashlib.sha256(machine.settings(launch)).hexdigest()
    values["format"] = FORMAT
    values["processor"] = _processor()
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=12).hexdigest()


def _processor() -> str:
    """Return what the guest's kernel has adapted itself to as it booted."""
    lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.startswith(("flags", "model", "vendor")))


@contextlib.contextmanager
def _locked(path: Path) -> Generator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove_old(cache: Path, folder: Path) -> None:
    """Remove the templates that were not used for longest, and what killed builders left.

    Those that a snapshot grew from stay.
    """
    kept = Snapshots(cache)
    with kept.lock(exclusive=True):
        _remove_unneeded(folder, kept.needed())


def _remove_unneeded(folder: Path, needed: set[Path]) -> None:
    found = sorted(
        (path for path in folder.iterdir() if path.is_dir()), key=lambda path: -path.stat().st_mtime
    )
    whole = [path for path in found if not path.name.startswith(".")]
    left = [path for path in found if path.name.startswith(".")]
    old = [path for path in left if time.time() - path.stat().st_mtime > _ABANDONED]
    unneeded = [path for path in whole[_MOST_TEMPLATES:] if path.resolve() not in needed]
    for path in [*unneeded, *old]:
        path.with_suffix(".lock").unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
