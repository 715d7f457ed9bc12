"""Sizes and texts as people read them, and the largest tp."""

MAX_TP = 99_999
"""As many ranks as the names of files have digits for."""


def human_bytes(count: float) -> str:
    """`16.1 GB`: decimal units, as disks and networks are sold."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def printable(text: str) -> str:
    """Text in which nothing from a file's content or name can steer a terminal or break a line or a document."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
