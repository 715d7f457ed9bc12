"""Recorded checksums. SHA256SUMS has a line for every file of an output, as `sha256sum -c` reads them."""

import hashlib
import os
import re
from collections.abc import Mapping

from tpshard.errors import CorruptError

_LINE = re.compile(rb"\\?([0-9a-f]{64}) [ *]([^\r\n]+)")
_ESCAPED = {b"\\\\": b"\\", b"\\n": b"\n", b"\\r": b"\r"}


def sums(digests: Mapping[str, str | None], small: Mapping[str, bytes]) -> bytes:
    """A line for each file, in the order of their names. digests: sha256 by name. small: files by their content.

    A file whose digest is None has no line.
    """
    known = {**digests, **{name: hashlib.sha256(data).hexdigest() for name, data in small.items()}}
    lines = ((os.fsencode(name), known[name]) for name in sorted(known, key=os.fsencode))
    return b"".join(_line(name, digest) for name, digest in lines if digest is not None)


def read_sums(data: bytes) -> dict[str, str]:
    """sha256 by name, of a file that `sums` or sha256sum wrote. ValueError, with the line, when it is damaged."""
    known: dict[str, str] = {}
    for line in data.removesuffix(b"\n").split(b"\n"):
        found = _LINE.fullmatch(line)
        name = found and found[2]
        if name and line.startswith(b"\\"):
            name = re.sub(rb"\\[\\nr]", lambda escape: _ESCAPED[escape[0]], name)
        if not (found and name) or os.fsdecode(name) in known:
            raise ValueError(os.fsdecode(line))
        known[os.fsdecode(name)] = found[1].decode()
    return known


def require_digest(path: str, *, expected: str, found: str | None) -> None:
    """CorruptError for a file of another sha256 than was recorded when it was written."""
    if found != expected:
        hint = "copy it again from where it comes from; `tpshard check` looks at the others"
        message = "the file is not as it was written"
        raise CorruptError(message, path=path, expected=f"sha256 {expected}", found=found, hint=hint)


def _line(name: bytes, digest: str) -> bytes:
    """`HEX  NAME`; a backslash before it says that the name has bytes which are escaped."""
    escaped = name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
    mark = b"\\" if escaped != name else b""
    return b"%b%b  %b\n" % (mark, digest.encode(), escaped)
