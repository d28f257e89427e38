"""API keys: read from a file, compared in constant time."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from arinar.reading import check_regular

#: Letters of a key at least; of a file, bytes at most.
LEAST, MOST_BYTES = 16, 1 << 20


class Keys:
    """Several keys, as their hashes: comparing takes as long whatever the lengths, and whichever fits."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @classmethod
    def read(cls, path: Path) -> Keys:
        """A file with one key a line; empty lines and lines that begin with # are left out. Raises ValueError, OSError."""
        check_regular(path)
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes; expected one API key a line")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ValueError(f"{path} holds no API key; write one a line (`openssl rand -hex 24` makes one)")
        for number, key in enumerate(keys, 1):
            if len(key) < LEAST or not key.isascii() or " " in key:
                raise ValueError(
                    f"{path}: key {number} is too easy to guess, or no plain text; expected {LEAST} letters and digits or more "
                    f"(`openssl rand -hex 24` makes such)"
                )
        return cls(keys)

    def fits(self, header: str | None) -> bool:
        """Whether an Authorization header carries one of the keys, as a bearer token."""
        scheme, _, token = (header or "").partition(" ")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        found = [hmac.compare_digest(digest, own) for own in self._digests]
        return any(found) and scheme.lower() == "bearer"
