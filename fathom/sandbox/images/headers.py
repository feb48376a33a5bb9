"""The headers of a tar archive, read with suspicion.

Python's reader takes a header at its word: text of any length, a map of holes of any length, a size
below nothing, by which an archive leads back into itself and never ends. Here each of these is
refused, and what one member may say before its contents is bounded as a whole.

Paper: §5.2.5 (container images become layers).
"""

from __future__ import annotations

import tarfile
from typing import Any, Self

from fathom.sandbox.images.errors import ArchiveRefused

# Bytes of one header with text, of all headers of one member, of those that hold for all members.
_TEXT, _OF_ONE, _OF_ALL = 1 << 20, 4 << 20, 64 << 10
_LONG = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


class _Counted:
    """A stream of which only so many bytes are read."""

    def __init__(self, file: Any, left: int) -> None:
        self._file = file
        self._left = left

    def read(self, size: int) -> bytes:
        self._left -= size
        if self._left < 0:
            raise ArchiveRefused(f"the headers of one member have more than {_OF_ONE} bytes")
        return self._file.read(size)

    def tell(self) -> int:
        return self._file.tell()


class Member(tarfile.TarInfo):
    """What a header says. Give it to `tarfile.open` as `tarinfo`; reading raises ArchiveRefused."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Self:
        """Read the next member's headers."""
        file = tarfile.fileobj
        if isinstance(file, _Counted):  # one of several of this member
            return super().fromtarfile(tarfile)
        tarfile.fileobj = _Counted(file, _OF_ONE)
        try:
            found = super().fromtarfile(tarfile)
        finally:
            tarfile.fileobj = file
        _check_size(found)
        return found

    def _proc_member(self, archive: Any) -> Any:  # the library's own hook
        _check_size(self)
        if self.type in _LONG and self.size > _TEXT:
            raise ArchiveRefused(f"a header of the archive has {self.size} bytes")
        if self.type == tarfile.XGLTYPE:
            archive.of_all = getattr(archive, "of_all", 0) + self.size
            if archive.of_all > _OF_ALL:
                raise ArchiveRefused(
                    f"the headers that hold for all members have more than {_OF_ALL} bytes"
                )
        return super()._proc_member(archive)  # type: ignore[misc]


def _check_size(member: tarfile.TarInfo) -> None:
    if member.size < 0:
        raise ArchiveRefused(f"{member.name[:80]!r} has a size of {member.size} bytes")
