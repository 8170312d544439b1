"""Sample keys: unique and stable, without dots and other characters that are special in tars, shells or file
systems."""

from __future__ import annotations

import hashlib
import unicodedata

LONGEST = 80
"""Longest key. USTAR headers hold names of 100 bytes; longer ones would need extension headers."""

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


def sample_key(name: str) -> str:
    """The key of a file with the POSIX path ``name``, relative to the source and without its suffix.

    Letters, digits, ``_`` and ``-`` are kept; ``/`` becomes ``+``; every other character becomes ``~`` and the
    hexadecimal digits of its UTF-8 bytes, so that different names give different keys. Names are first normalised to
    Unicode's form NFC, since file systems differ. A key that is too long is truncated and ends in a hash of the name.
    """
    name = unicodedata.normalize("NFC", name)
    key = "".join(_escape(character) for character in name)
    if len(key) > LONGEST:
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()
        # "=" is in no escaped name, so a truncated key never equals a complete one.
        key = f"{key[: LONGEST - 1 - len(digest)]}={digest}"
    return key


def _escape(character: str) -> str:
    if character in _PLAIN:
        return character
    if character == "/":
        return "+"
    return "".join(f"~{byte:02x}" for byte in character.encode("utf-8", "surrogatepass"))
