"""Empty disks in QEMU's own form, docs/interop/qcow2.rst of its source.

Paper: §5.2.5 (copy-on-write disks of virtual machines).
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

_CLUSTER = 1 << 16
# What one entry of the first table leads to: a table of as many clusters as it has entries.
_REACH = _CLUSTER * _CLUSTER // 8


def empty(size: int) -> bytes:
    """Return a disk of `size` bytes in which nothing was written: what lies below shows through.

    The file is four clusters: the header, a table of tables of counts, one of those, which counts
    these four, and the first table of the disk's own clusters.
    """
    entries = max(1, -(-size // _REACH))
    assert entries * 8 <= _CLUSTER
    header = struct.pack(
        ">4sIQIIQIIQQIIQQQQII",
        b"QFI\xfb",
        3,
        0,  # no name of what lies below: whoever starts the emulator says it
        0,
        _CLUSTER.bit_length() - 1,
        size,
        0,
        entries,
        3 * _CLUSTER,
        _CLUSTER,
        1,
        0,
        0,
        0,
        0,
        0,
        4,  # counts of 16 bits
        104,
    )
    # No extension follows: eight zeros say so.
    clusters = [header, struct.pack(">Q", 2 * _CLUSTER), struct.pack(">4H", 1, 1, 1, 1), b""]
    return b"".join(cluster.ljust(_CLUSTER, b"\0") for cluster in clusters)


def fresh(folder: Path, size: int) -> int:
    """Return an empty disk that has no name, so that it goes with the last who has it open."""
    fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(fd, empty(size), 0)
    except BaseException:
        os.close(fd)
        raise
    return fd
