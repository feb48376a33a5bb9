"""Containers by crun or runc, for root: the runtime builds them, we keep the groups and the mounts.

The tenant is a user that no file of the host belongs to: root of the sandbox is mapped to a range
of its own far above real users, and the owner of a bound work folder is translated by the mount.

Everything that the tenant writes goes to one file system in memory of a fixed size, the upper
folder of an overlay on the image; a copy of that folder is a fork.

Paper: none (a thin form of the report's container substrate).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import select
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.errors import MachineFull, SandboxError, Unsupported
from fathom.sandbox import cgroups, state, syscalls, userns
from fathom.sandbox.request import PATH
from fathom.sandbox.substrates.launch import (
    AGENT,
    INIT,
    MASKED_PATHS,
    READ_ONLY_PATHS,
    TENANT,
    Ends,
    Launch,
    Started,
)
from fathom.sandbox.types import DOOR

if TYPE_CHECKING:
    from fathom.sandbox.images.stack import Composed

ID_COUNT = 65536
_FIRST_ID = 0x60000000
_SLOTS = 4096
_NAMESPACES = ("pid", "ipc", "uts", "mount", "user", "cgroup")
_START_TIMEOUT = 30.0
_NO_ROOM = 73  # what `fathom-agent --copy` ends with where its target is full
# What the agent needs to become the tenant and to end what the tenant started. A command has none.
_CAPABILITIES = ["CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP", "CAP_KILL"]
# Within the file system for writes: the overlay's upper folder, and what the kernel needs with it.
UPPER = "upper"
UPPER_WORK = "upper.work"


def first_id(name: str) -> int:
    """Return the host's id of root in the sandbox `name`.

    Sandboxes get ranges of their own by chance; two that share one are still kept apart by their
    namespaces.
    """
    slot = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big") % _SLOTS
    return _FIRST_ID + slot * ID_COUNT


def configuration(
    launch: Launch, rootfs: Path, work: Path | None, door: Path | None = None
) -> dict[str, Any]:
    """Return the OCI runtime configuration. `work`, `door`: where these folders are mounted."""
    base = launch.ids
    ids = [{"containerID": 0, "hostID": base, "size": ID_COUNT}]
    quiet = ["nosuid", "nodev"]

    def memory_folder(target: str, options: list[str]) -> dict[str, Any]:
        return {"destination": target, "type": "tmpfs", "source": "tmpfs", "options": options}

    mounts: list[dict[str, Any]] = [
        {
            "destination": "/proc",
            "type": "proc",
            "source": "proc",
            "options": [*quiet, "noexec"],
        },
        memory_folder("/dev", ["nosuid", "noexec", "mode=755", "size=64k"]),
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
        },
        memory_folder("/dev/shm", [*quiet, "noexec", "mode=1777", *_bounds(launch.disk // 4)]),
        {
            "destination": AGENT,
            "type": "bind",
            "source": launch.agent,
            "options": ["bind", "ro", *quiet],
        },
    ]
    # The root is mounted read-only; these two lead to the same overlay, mounted for writing.
    for target, source in (("/tmp", rootfs / "tmp"), ("/work", work or rootfs / "work")):
        mounts.append(
            {
                "destination": target,
                "type": "bind",
                "source": str(source),
                "options": ["bind", "rw", *quiet],
            }
        )
    if door is not None:
        options = ["bind", "ro", *quiet, "noexec"]
        shown = {"destination": DOOR, "type": "bind", "source": str(door), "options": options}
        mounts.append(shown)
    network = {"type": "network"} | ({"path": launch.netns} if launch.netns else {})
    return {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 0, "gid": 0},
            "args": INIT,
            "env": [f"PATH={PATH}"],
            "cwd": "/",
            "capabilities": {
                **{kind: _CAPABILITIES for kind in ("bounding", "effective", "permitted")},
                "inheritable": [],
            },
            "noNewPrivileges": True,
        },
        "root": {"path": str(rootfs), "readonly": True},
        "hostname": launch.hostname,
        "mounts": mounts,
        "linux": {
            "uidMappings": ids,
            "gidMappings": ids,
            "namespaces": [*({"type": kind} for kind in _NAMESPACES), network],
            "maskedPaths": list(MASKED_PATHS),
            "readonlyPaths": list(READ_ONLY_PATHS),
        },
    }


def mount_root(
    launch: Launch, copy_from: Path | None, group: cgroups.Group
) -> tuple[Path, Composed | None]:
    """Mount the image with room for writes on top, filled from another sandbox's where given.

    Returns the root and, for a layered image, what closes its mounts.
    Raises SandboxError or OSError.
    """
    disk, rootfs = launch.folder / state.DISK, launch.folder / state.ROOTFS
    for folder in (disk, rootfs):
        folder.mkdir(mode=0o755)
    quiet = syscalls.MS_NOSUID | syscalls.MS_NODEV
    options = ",".join((*_bounds(launch.disk), "mode=711"))
    syscalls.mount("tmpfs", str(disk), "tmpfs", quiet, options)
    upper, beside = disk / UPPER, disk / UPPER_WORK
    beside.mkdir(mode=0o700)
    if copy_from is not None:
        copy_tree(launch.agent, copy_from, upper, group)
    else:
        upper.mkdir(mode=0o755)
    composed: Composed | None = None
    if launch.layers:
        composed = _compose(launch, upper)
        rootfs = composed.root
    else:
        options = f"lowerdir={launch.rootfs},upperdir={upper},workdir={beside}"
        syscalls.mount("overlay", str(rootfs), "overlay", quiet, options)
    try:
        if copy_from is None:
            _make_folders(rootfs, launch.ids + TENANT)
        if launch.door is not None:
            _make_folder(rootfs, "run")
            _make_folder(rootfs, DOOR.lstrip("/"))
    except BaseException:
        if composed is not None:
            composed.close()
        raise
    return rootfs, composed


def _bounds(size: int) -> list[str]:
    """Return the options of a file system in memory of `size` bytes.

    Empty files take no room but the kernel's memory: their number is bounded as well.
    """
    return [f"size={size}", f"nr_inodes={size // 4096 + 1024}"]


def _make_folders(rootfs: Path, tenant: int) -> None:
    """Give the tenant the two folders that can be written to."""
    for name, mode in (("work", 0o755), ("tmp", 0o1777)):
        path = _make_folder(rootfs, name)
        os.chown(path, tenant, tenant, follow_symlinks=False)
        path.chmod(mode)


def _make_folder(rootfs: Path, name: str) -> Path:
    path = rootfs / name
    # In an image that somebody made these may be anything, a link to elsewhere included.
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise SandboxError(f"the image's /{name} is not a folder")
    path.mkdir(mode=0o755, exist_ok=True)
    return path


def _compose(launch: Launch, upper: Path) -> Composed:
    from fathom.sandbox.images.stack import compose
    from fathom.sandbox.images.store import Store

    ids = f"0 {launch.ids} {ID_COUNT}"
    namespace = userns.make(ids, ids)
    folder = launch.folder / state.LAYERS
    folder.mkdir(mode=0o755)
    try:
        with Store(launch.store, durable=False) as store:
            name = launch.folder.name
            return compose(
                store, launch.layers, folder, upper=upper, userns=namespace, hold_name=name
            )
    finally:
        os.close(namespace)


def copy_tree(agent: str, source: Path, target: Path, group: cgroups.Group) -> int:
    """Copy an upper folder, owners, links and marks of deletion included; return its files' bytes.

    The copy is made by a process in the groups of the new sandbox, whose memory it will be.
    Raises MachineFull where the target has no room left, SandboxError.
    """
    (door,) = group.doors("memory")
    # The root is read-only inside: everything that was written is below these two.
    done = subprocess.run(
        [agent, "--copy", str(source), str(target), "--group", door, "work", "tmp"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=600,
        env={},
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()[-500:]
        if done.returncode == _NO_ROOM:
            raise MachineFull(
                f"no room is left in {target.parent} for the sandbox's writes ({said}); make some, "
                "try again"
            )
        raise SandboxError(f"the sandbox's writes cannot be copied: {said}")
    return int(done.stdout)


def start(launch: Launch, ends: Ends, group: cgroups.Group, rootfs: Path) -> Started:
    """Start the agent on a mounted root. Raises SandboxError, Unsupported or OSError."""
    work: Path | None = None
    if launch.workdir is not None:
        work = launch.folder / state.WORK
        work.mkdir(mode=0o755)
        _bind_work(launch.workdir, work, launch.ids)
    door: Path | None = None
    if launch.door is not None:
        door = launch.folder / state.DOOR
        door.mkdir(mode=0o755)
        _bind(launch.door, door)
    config = configuration(launch, rootfs, work, door)
    if launch.substrate == "runc":
        config["linux"]["cgroupsPath"] = f"/{cgroups.PARENT}/{launch.folder.name}"
    (launch.folder / "config.json").write_text(json.dumps(config))
    pid = _run(launch, ends, group)
    # When memory is short a command shall go, not what answers for the sandbox. Where root itself
    # is confined this is refused, and the commands' own higher scores have to do.
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("-500")
    if launch.substrate == "runc":
        group.enter(pid)
    group.limit(memory=launch.memory, pids=launch.pids, cpu=launch.cpu)
    group.limit_io(launch.io_read, launch.io_write)
    return Started(pid=pid, tenant=TENANT)


@functools.cache
def sealed(program: str) -> str:
    """Return a path of a copy of `program` in memory that nobody can write to any more.

    Started from a file, crun and runc first make such a copy and start themselves once more from
    it, lest a tenant changes the file through /proc. Here that is done once for all sandboxes. The
    path leads through this process; where the kernel allows no such copy it is `program`.
    """
    try:
        fd = os.memfd_create("runtime", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.fchmod(fd, 0o755)
        with open(program, "rb") as source:
            while os.sendfile(fd, source.fileno(), None, 1 << 20):  # type: ignore[arg-type]
                pass
        seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except OSError:
        return program
    return f"/proc/{os.getpid()}/fd/{fd}"


def command_line(launch: Launch) -> list[str]:
    """Return the runtime's command line. It keeps its own state inside our folder."""
    head = [launch.program, "--root", str(launch.folder / state.RUNTIME)]
    if launch.substrate == "crun":
        # The groups are ours.
        head += ["--cgroup-manager", "disabled"]
    head += ["run", "--detach", "--bundle", str(launch.folder)]
    return [*head, "--pid-file", str(launch.folder / "pid"), launch.folder.name]


def _run(launch: Launch, ends: Ends, group: cgroups.Group) -> int:
    program, command = sealed(launch.program), command_line(launch)
    if launch.substrate == "crun":
        # What it makes begins in the groups; runc puts it there itself.
        command = [launch.agent, "--enter", *group.doors(), "--", program, *command]
        program = launch.agent
    # In memory: the agent inherits it as its standard error, and lets go of it.
    errors = os.memfd_create("errors", os.MFD_CLOEXEC)
    try:
        process = subprocess.Popen(
            command,
            executable=program,
            stdin=ends.listener,
            stdout=ends.journal,
            stderr=errors,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        )
        code = _await_end(process)
        said = os.pread(errors, 1 << 16, 0).decode(errors="replace")
    finally:
        os.close(errors)
    if code:
        raise SandboxError(
            f"{launch.substrate} could not start the sandbox (exit {code}): "
            f"{said.strip()[-1500:]}; run `fathom doctor` to see what this machine can do"
        )
    return int((launch.folder / "pid").read_text())


def _await_end(process: subprocess.Popen[bytes]) -> int:
    """Return a runtime's exit code, that of a kill where it took too long."""
    # Popen.wait with a timeout sleeps in growing steps; a pidfd answers at once.
    pidfd = os.pidfd_open(process.pid)
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        if not poller.poll(_START_TIMEOUT * 1000):
            process.kill()
        return process.wait()
    finally:
        os.close(pidfd)


def _bind(source: str, target: Path) -> None:
    """Bind a folder as it is. It was resolved before it was judged: no link in it is followed."""
    folder = syscalls.open_folder(source)
    try:
        syscalls.mount(f"/proc/self/fd/{folder}", str(target), None, syscalls.MS_BIND)
    finally:
        os.close(folder)


def _bind_work(source: str, target: Path, base: int) -> None:
    """Bind the work folder so that its owner is the tenant inside. Raises Unsupported."""
    # It was resolved before it was judged: a link in it now was put there since, to lead elsewhere.
    folder = syscalls.open_folder(source)
    ids = base + TENANT
    try:
        owner = os.stat(folder)
        namespace = userns.make(f"{owner.st_uid} {ids} 1", f"{owner.st_gid} {ids} 1")
        try:
            syscalls.bind_mapped(f"/proc/self/fd/{folder}", str(target), namespace)
        finally:
            os.close(namespace)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM):
            raise
        raise Unsupported(
            f"the folder {source} cannot be bound: its file system or this kernel (5.12 or newer "
            "is needed) cannot translate file owners; put the folder on ext4, xfs, btrfs or tmpfs"
        ) from error
    finally:
        os.close(folder)
