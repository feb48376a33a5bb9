"""Opaque texts that carry reasoning through a client and back.

Some clients return only `encrypted_content` (Responses) or a signed block (Messages). The text they
return is the reasoning itself, packed: no store is needed, and it survives a restart. It is
checked, not secret: a client may write reasoning into a request anyway.

Paper: none (a matter of the APIs).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import zlib

_MARK = "fr1."
_LARGEST = 16 << 20  # bytes of reasoning in a request; far beyond any context
_DIGEST = 8


def pack_reasoning(reasoning: str) -> str:
    """Return an opaque text from which `unpack_reasoning` gets `reasoning` back."""
    data = reasoning.encode("utf-8", "surrogatepass")
    packed = _digest(data) + zlib.compress(data, 6)
    return _MARK + base64.urlsafe_b64encode(packed).decode("ascii")


class Unpacker:
    """Gets packed reasoning back, within one bound on all that a request brings.

    A few kilobytes can be packed megabytes, so one after the other must not add up.
    """

    def __init__(self) -> None:
        self._left = _LARGEST

    def __call__(self, text: str) -> str | None:
        """Return the packed reasoning, None if `text` is foreign, damaged or unreasonably large."""
        if not text.startswith(_MARK) or not self._left:
            return None
        try:
            packed = base64.urlsafe_b64decode(text.removeprefix(_MARK).encode("ascii"))
            inflate = zlib.decompressobj()
            data = inflate.decompress(packed[_DIGEST:], self._left)
            self._left -= len(data)
            if not inflate.eof or packed[:_DIGEST] != _digest(data):
                return None
            return data.decode("utf-8", "surrogatepass")
        except (binascii.Error, zlib.error, UnicodeError):
            return None


def unpack_reasoning(text: str) -> str | None:
    """Return one packed text's reasoning, as `Unpacker` does."""
    return Unpacker()(text)


def sign_reasoning(reasoning: str) -> str:
    """Return a signature for a thinking block: never empty, the same for the same text.

    Clients drop unsigned blocks. Nothing checks it on the way back.
    """
    digest = _digest(reasoning.encode("utf-8", "surrogatepass"))
    return base64.urlsafe_b64encode(_MARK.encode() + digest).decode("ascii").rstrip("=")


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()
