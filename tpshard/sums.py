"""SHA256SUMS: a line for every file of an output, as `sha256sum -c` reads them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

SUMS = "SHA256SUMS"


def sums(digests: Mapping[str, str | None], small: Mapping[str, bytes]) -> bytes:
    """A line for each file, in the order of their names. digests: sha256 by name. small: files by their content."""
    known = {**digests, **{name: hashlib.sha256(data).hexdigest() for name, data in small.items()}}
    return b"".join(_line(os.fsencode(name), known[name]) for name in sorted(known, key=os.fsencode))


def _line(name: bytes, digest: str | None) -> bytes:
    """`HEX  NAME`; a backslash before it says that the name has bytes which are escaped."""
    assert digest is not None, "a file without a checksum"
    escaped = name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    mark = b"\\" if escaped != name else b""
    return b"%b%b  %b\n" % (mark, digest.encode(), escaped)
