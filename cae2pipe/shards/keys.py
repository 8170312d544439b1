"""Sample keys: unique, stable, free of dots and of anything a tar, a shell or a file system would trip over."""

from __future__ import annotations

import hashlib
import unicodedata

LONGEST = 80
"""Characters of a key. USTAR headers hold names of 100 bytes; longer ones would need extension headers."""

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


def sample_key(name: str) -> str:
    """The key of a file with the POSIX path ``name``, relative to the source and without its suffix.

    Letters, digits, ``_`` and ``-`` stay; ``/`` becomes ``+``; every other character ``~`` and the hexadecimal digits
    of its UTF-8 bytes, so that different names give different keys. Names are compared in Unicode's form NFC, in which
    file systems differ. A key that would be too long is cut and ends in a hash of the whole.
    """
    name = unicodedata.normalize("NFC", name)
    key = "".join(_escape(character) for character in name)
    if len(key) > LONGEST:
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
        # "=" appears in no escaped name: a cut key equals no whole one.
        key = f"{key[: LONGEST - 1 - len(digest)]}={digest}"
    return key


def _escape(character: str) -> str:
    if character in _PLAIN:
        return character
    if character == "/":
        return "+"
    return "".join(f"~{byte:02x}" for byte in character.encode("utf-8", "surrogatepass"))
