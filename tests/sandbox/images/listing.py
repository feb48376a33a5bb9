"""What a folder holds, read by the system's own calls: the oracle of every layer test."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path


def listing(root: Path, *, owners: bool = True, times: bool = True) -> dict[str, tuple]:
    """Return every path below `root` with all that can be seen of it."""
    found: dict[str, tuple] = {}
    first_name: dict[tuple[int, int], str] = {}
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted([*folders, *files]) + ([""] if Path(folder) == root else []):
            path = Path(folder, name)
            about = path.lstat()
            key = str(path.relative_to(root))
            content: object = None
            if stat.S_ISREG(about.st_mode):
                content = hashlib.sha256(path.read_bytes()).hexdigest()
            elif stat.S_ISLNK(about.st_mode):
                content = os.readlink(path)
            elif not stat.S_ISDIR(about.st_mode):
                content = about.st_rdev
            attributes = ()
            if not stat.S_ISLNK(about.st_mode):
                attributes = tuple(
                    (n, os.getxattr(path, n)) for n in sorted(os.listxattr(path)) if "user." in n
                )
            twin = ""
            if stat.S_ISREG(about.st_mode):
                first = first_name.setdefault((about.st_dev, about.st_ino), key)
                twin = "" if first == key else first
            found[key] = (
                about.st_mode,
                (about.st_uid, about.st_gid) if owners else None,
                int(about.st_mtime) if times and not stat.S_ISDIR(about.st_mode) else None,
                content,
                attributes,
                twin,
            )
    return found
