"""Saves a running machine as of one moment, and looks at its screen.

What the emulator hands out is taken as from a stranger.

Paper: §5.2.5 (memory snapshots of virtual machines).
"""

from __future__ import annotations

import os
import secrets
import stat
from dataclasses import replace
from pathlib import Path

from fathom.errors import SandboxError
from fathom.sandbox import state
from fathom.sandbox.vm import chain, jail, memory, saved, screen
from fathom.sandbox.vm.machine import Machine, freeze, thaw
from fathom.sandbox.vm.saved import Saved

# For an agent to take what came before: a busy guest shall be copied, too.
_PATIENCE = 10.0


def capture(machine: Machine) -> Saved:
    """Save the machine as of now; it goes on unless it was paused. Raises SandboxError, OSError."""
    assert machine.mux is not None
    with machine.busy:
        paused = machine.frozen is not None
        if paused:
            return _capture(machine)
        freeze(machine, patience=_PATIENCE)
        try:
            return _capture(machine)
        finally:
            thaw(machine)


def _capture(machine: Machine) -> Saved:
    if not machine.between_frames:
        raise SandboxError(
            f"the agent in {machine.id} did not answer before the machine was stopped, so that "
            "nobody could speak to a copy: see what its guest is busy with"
        )
    name = f"state-{secrets.token_hex(4)}"
    machine.ask("xen-save-devices-state", filename=f"/{jail.OWN}/{name}", live=False)
    data = _take_own(machine, name)
    size = machine.launch.memory
    opened = [memory.create(0)]
    try:
        own = memory.save(machine.pid, machine.memory, opened[0], size)
        memory.seal(opened[0])
        opened += map(os.dup, machine.below)
        if machine.disk >= 0:
            # Written out when the machine stopped; it goes on only after this copy.
            opened.append(_copy(machine))
        origin = machine.origin
        if origin is not None:
            origin = replace(origin, pages=chain.merged(origin.pages, own))
        video = b""
        if machine.launch.substrate == "fullvm":
            video = screen.take_video(machine.pid, machine.ask)
        return Saved(
            memory=opened[0],
            size=size,
            state=data,
            secret=machine.secret,
            disks=tuple(opened[1:]),
            video=video,
            online=machine.online is not False,
            origin=origin,
        )
    except BaseException:
        for fd in opened:
            os.close(fd)
        raise


def _copy(machine: Machine) -> int:
    """Return a descriptor to read a copy of the disk that a stopped machine writes to."""
    scratch = machine.launch.scratch
    copy = os.open(scratch, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        memory.copy_sparse(machine.disk, copy, os.fstat(machine.disk).st_size)
        # Those that begin from it share it, and none of them may write to it.
        return os.open(f"/proc/self/fd/{copy}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(copy)


def _take_own(machine: Machine, name: str) -> bytes:
    """Read and remove what the emulator wrote into its own folder. Raises SandboxError, OSError."""
    return take_file(_own_folder(machine), name)


def take_file(path: Path, name: str) -> bytes:
    """Read and remove a file that a stranger wrote. Raises SandboxError, OSError.

    There may be anything else under its name, such as a pipe whose reader would wait for ever.
    """
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(name, flags, dir_fd=folder)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise SandboxError("the emulator saved a state that is no plain file")
            with open(fd, "rb", closefd=False) as file:
                data = file.read(saved.STATE_LIMIT + 1)
        finally:
            os.close(fd)
        os.unlink(name, dir_fd=folder)
    finally:
        os.close(folder)
    if not data or len(data) > saved.STATE_LIMIT:
        raise SandboxError(f"the emulator saved a state of {len(data)} bytes")
    return data


def _own_folder(machine: Machine) -> Path:
    """The folder that the emulator writes to; through it, where another node made the mounts."""
    ours = machine.folder / state.ROOTFS / jail.OWN
    return ours if ours.is_dir() else Path(f"/proc/{machine.pid}/root/{jail.OWN}")


def screenshot(machine: Machine) -> tuple[int, int, bytes]:
    """Return the graphical console: width, height, and three bytes for each dot.

    Raises SandboxError.
    """
    name = f"screen-{secrets.token_hex(4)}"
    machine.ask("screendump", filename=f"/{jail.OWN}/{name}")
    return screen.parse_ppm(_take_own(machine, name))
