"""The few Linux calls that Python's standard library lacks, as checked functions.

Everything here raises OSError with the name of the call that failed. Used by the node process
only, never by the client, so that a program importing fathom never changes its own namespaces.

Paper: none (operating system plumbing).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Sequence
from typing import Any

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

MS_NOSUID = 0x2
MS_NODEV = 0x4
MS_BIND = 0x1000
MS_REC = 0x4000
MS_PRIVATE = 0x40000
MNT_DETACH = 2

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_NO_NEW_PRIVS = 38
PR_SET_CHILD_SUBREAPER = 36

# Numbers above 400 are the same on every architecture.
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_FSOPEN = 430
_SYS_FSCONFIG = 431
_SYS_FSMOUNT = 432
_SYS_MOUNT_SETATTR = 442
_LANDLOCK_CREATE = ctypes.c_long(444)
_LANDLOCK_RESTRICT = ctypes.c_long(446)
_SYS_OPENAT2 = 437
_RESOLVE_NO_SYMLINKS = 4
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_MOUNT_ATTR_RDONLY = 0x1
_MOUNT_ATTR_NOSUID = 0x2
_MOUNT_ATTR_NODEV = 0x4
_MOUNT_ATTR_IDMAP = 0x00100000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _check(result: int, call: str, subject: str = "") -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}", subject or None)
    return result


def setns(fd: int, flags: int) -> None:
    """Enter the namespaces `flags` of the process behind the pidfd `fd`. Raises OSError."""
    _check(_libc.setns(fd, flags), "setns")


def unshare(flags: int) -> None:
    """Leave the namespaces `flags` for new ones. Raises OSError."""
    _check(_libc.unshare(flags), "unshare")


def prctl(option: int, *arguments: int) -> int:
    """Call prctl with unsigned long arguments. Raises OSError."""
    padded = [ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:4]]
    return _check(_libc.prctl(option, *padded), f"prctl {option}")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """Call mount(2). Raises OSError."""
    result = _libc.mount(
        source.encode(),
        os.fsencode(target),
        kind.encode() if kind else None,
        ctypes.c_ulong(flags),
        data.encode() if data else None,
    )
    _check(result, "mount", target)


def mount_read_only(kind: str, options: Sequence[tuple[str, str]], target: str) -> None:
    """Mount a file system read-only and nodev, its options given one by one. Raises OSError.

    mount(2) takes one page of options together; here each may have 255 bytes.
    """

    def call(name: str, number: int, *arguments: Any) -> int:
        return _check(_libc.syscall(ctypes.c_long(number), *arguments), name, target)

    fd = call("fsopen", _SYS_FSOPEN, kind.encode(), ctypes.c_uint(1))
    try:

        def configure(command: int, key: bytes | None, value: bytes | None) -> None:
            numbers = ctypes.c_int(fd), ctypes.c_uint(command)
            call("fsconfig", _SYS_FSCONFIG, *numbers, key, value, ctypes.c_int(0))

        configure(_FSCONFIG_SET_FLAG, b"ro", None)
        for key, value in options:
            configure(_FSCONFIG_SET_STRING, key.encode(), os.fsencode(value))
        configure(_FSCONFIG_CMD_CREATE, None, None)
        attributes = ctypes.c_uint(_MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NODEV)
        tree = call("fsmount", _SYS_FSMOUNT, ctypes.c_int(fd), ctypes.c_uint(1), attributes)
    finally:
        os.close(fd)
    try:
        here, flags = ctypes.c_int(_AT_FDCWD), ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH)
        place = os.fsencode(target)
        call("move_mount", _SYS_MOVE_MOUNT, ctypes.c_int(tree), b"", here, place, flags)
    finally:
        os.close(tree)


def unmount(target: str) -> None:
    """Detach the mount at `target`. Raises OSError."""
    _check(_libc.umount2(os.fsencode(target), MNT_DETACH), "umount2", target)


def open_folder(path: str) -> int:
    """Open a folder by a path that has no symbolic link in any part. Raises OSError (ELOOP)."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
    how = struct.pack("=QQQ", flags, 0, _RESOLVE_NO_SYMLINKS)
    return _check(
        _libc.syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_int(_AT_FDCWD),
            os.fsencode(path),
            how,
            ctypes.c_size_t(len(how)),
        ),
        "openat2",
        path,
    )


def clone_mount(path: str) -> int:
    """Return a descriptor of a mount of its own that shows the folder `path`, and nowhere else.

    It is in no namespace, its root has nothing above, and it goes with its last descriptor.
    Raises OSError.
    """
    flags = ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC)
    here = ctypes.c_int(_AT_FDCWD)
    call = _libc.syscall(ctypes.c_long(_SYS_OPEN_TREE), here, os.fsencode(path), flags)
    return _check(call, "open_tree", path)


def bind_mapped(source: str, target: str, userns_fd: int) -> None:
    """Bind `source` at `target`, its owners translated by the user namespace behind `userns_fd`.

    The mount is nosuid and nodev. Raises OSError (EINVAL where the file system of `source` cannot
    translate owners).
    """
    tree = clone_mount(source)
    try:
        wanted = _MOUNT_ATTR_IDMAP | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV
        attributes = struct.pack("=QQQQ", wanted, 0, 0, userns_fd)
        _check(
            _libc.syscall(
                ctypes.c_long(_SYS_MOUNT_SETATTR),
                ctypes.c_int(tree),
                b"",
                ctypes.c_uint(_AT_EMPTY_PATH),
                attributes,
                ctypes.c_size_t(len(attributes)),
            ),
            "mount_setattr",
            source,
        )
        _check(
            _libc.syscall(
                ctypes.c_long(_SYS_MOVE_MOUNT),
                ctypes.c_int(tree),
                b"",
                ctypes.c_int(_AT_FDCWD),
                os.fsencode(target),
                ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH),
            ),
            "move_mount",
            target,
        )
    finally:
        os.close(tree)


def install_filter(program: bytes) -> None:
    """Put this thread and what it starts under a system call filter. Raises OSError."""
    instructions = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: how many instructions of 8 bytes, and where they are.
    described = struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))
    held = ctypes.create_string_buffer(described, len(described))
    prctl(PR_SET_SECCOMP, 2, ctypes.addressof(held))


def close_file_systems() -> bool:
    """Deny this thread and what it starts every file that is not open; False without Landlock.

    Where the kernel knows how: new connections over TCP, and signals to others. Raises OSError.
    """
    version = landlock_version()
    if version < 1:
        return False
    rights = {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)
    # struct landlock_ruleset_attr grew from 8 to 16 to 24 bytes: files, network, scopes.
    known = [(1 << rights) - 1, *([3] if version >= 4 else []), *([3] if version >= 6 else [])]
    attributes = struct.pack(f"={len(known)}Q", *known)
    size = ctypes.c_size_t(len(attributes))
    rules = _check(_libc.syscall(_LANDLOCK_CREATE, attributes, size, ctypes.c_uint(0)), "landlock")
    try:
        _check(_libc.syscall(_LANDLOCK_RESTRICT, ctypes.c_int(rules), ctypes.c_uint(0)), "landlock")
    finally:
        os.close(rules)
    return True


def landlock_version() -> int:
    """Return the version of Landlock that this kernel offers, 0 where it has none."""
    # struct, its size, LANDLOCK_CREATE_RULESET_VERSION
    return max(0, _libc.syscall(ctypes.c_long(444), None, ctypes.c_size_t(0), ctypes.c_uint(1)))
