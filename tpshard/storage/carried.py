"""Which files travel with the weights, and which are left out and why: one selection for directories and for the Hub.

Every file that holds no weights travels: configuration, tokenizer, remote code (copied, never imported), licences.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from tpshard.storage.names import RANK_STEM, SUMS, WEIGHTS, fits

CARRIED_LIMIT = 100_000_000
"""Bytes of the largest file that travels."""
_OTHER_SUMS = re.compile(rf"{SUMS}|{RANK_STEM}(\..*)?")


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A file, or a directory with all that is in it (`NAME/`), that does not travel."""

    file: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file} ({self.reason})"


@dataclass(frozen=True)
class Listing:
    """All files below a place by their names, with their sizes, but for those that are not looked at.

    Names have `/` between folders. unread: by name, why a file or a directory (`NAME/`) is none that may be read.
    """

    sizes: Mapping[str, int]
    unread: Mapping[str, str]


def listing_of(files: Iterable[tuple[str, int]]) -> Listing:
    """Files by name and size, as a Hub lists them."""
    sizes: dict[str, int] = {}
    unread: dict[str, str] = {}
    for name, size in files:
        parts = name.split("/")
        place = next((i for i, part in enumerate(parts) if hidden(part)), None)
        if place is None:
            sizes[name] = size
        else:
            folder = "/".join(parts[: place + 1])
            unread[folder if folder == name else f"{folder}/"] = str(hidden(parts[place]))
    return Listing(sizes, unread)


@dataclass(frozen=True)
class Selection:
    """The names of the files that travel, sorted, and what does not."""

    carried: tuple[str, ...]
    left_out: tuple[LeftOut, ...]


def select(listing: Listing, used: Collection[str], set_: str) -> Selection:
    """What travels of the files of a place. used: weight files that are read, their index; set_: what names those."""
    carried, left_out = [], [LeftOut(name, reason) for name, reason in listing.unread.items()]
    has_adapter = any(is_weights(name) and "adapter" in name for name in listing.sizes)
    for name in listing.sizes:
        if name in used:
            continue
        if reason := _why_left(name, listing.sizes[name], set_, has_adapter):
            left_out.append(LeftOut(name, reason))
        else:
            carried.append(name)
    return Selection(tuple(sorted(carried)), tuple(sorted(left_out, key=lambda each: each.file)))


def _why_left(name: str, size: int, set_: str, has_adapter: bool) -> str | None:
    """Why a file does not travel; None for one that does."""
    if is_weights(name):
        if "adapter" in name:
            return "weights of an adapter: merge it into the model first where it shall count"
        if "/" in name or not name.endswith((".safetensors", ".bin")):
            return "weights of another set or form"
        return f"weights that {set_} does not list" if set_.endswith(".json") else f"weights beside {set_}"
    if name.endswith((".safetensors.index.json", ".bin.index.json")):
        return "an index of weights that are not used"
    if has_adapter and name.endswith("adapter_config.json"):
        return "of an adapter, which is left out"
    if _OTHER_SUMS.fullmatch(name):
        return "the output has a file of this name that is its own"
    return f"larger than {CARRIED_LIMIT // 1_000_000} MB" if size > CARRIED_LIMIT else None


def is_weights(name: str) -> bool:
    """Whether a file holds weights, or what a trainer keeps of them, by its name."""
    return fits(name.lower(), WEIGHTS)


def hidden(name: str) -> str | None:
    """Why a file or folder is not looked at for its own name."""
    return "hidden" if name.startswith(".") or not name else "made by Python" if name == "__pycache__" else None
