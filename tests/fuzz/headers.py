"""Random damage to safetensors headers, judged by safetensors itself: what it refuses, our parser must not accept.

`python -m tests.fuzz.headers N` judges N mutated headers; `tests/fuzz/test_headers.py` some in the suite.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

from safetensors import SafetensorError, deserialize

from tpshard.errors import TpshardError
from tpshard.storage.safetensors import parse_header

DTYPES = ("F32", "BF16", "F16", "I64", "I8", "U8", "BOOL", "F8_E4M3", "F4", "C64", "F6_E2M3", "f32", "F33", "", "F64")
NUMBERS = ("0", "1", "-1", "2", "8", "16", "1e3", "1.0", "18446744073709551615", "18446744073709551616", "true", "null",
           '"4"', "007", "[4]", "4294967296", "9223372036854775808")  # fmt: skip
TOKENS = (b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b" ", b"\n", b"\x00", b"\xff", b"0", b"1", b"9", b"-", b"e",
          b"null", b'"__metadata__"', b'"dtype"', b'"shape"', b'"data_offsets"', b"\\u0000", b"\\ud800")  # fmt: skip


def header(rng: random.Random) -> bytes:
    """A valid header of a few small tensors, as JSON."""
    entries: dict[str, Any] = {}
    if rng.random() < 0.5:
        entries["__metadata__"] = {"format": "pt"}
    at = 0
    for name in rng.sample(["a", "b", "model.norm.weight", "é", "x" * 40], rng.randrange(1, 4)):
        shape = [rng.randrange(4) for _ in range(rng.randrange(3))]
        size = 2
        for extent in shape:
            size *= extent
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    return json.dumps(entries, separators=(",", ":")).encode()


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """The header with one to three places changed: a byte, a token, a number, a dtype, a piece twice or not at all."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(raw) + 1)
        what = rng.randrange(7)
        if what == 0:
            raw = raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
        elif what == 1:
            raw = raw[:at] + rng.choice(TOKENS) + raw[at:]
        elif what == 2:
            end = min(len(raw), at + rng.randrange(1, 12))
            raw = raw[:at] + raw[end:]
        elif what == 3:
            end = min(len(raw), at + rng.randrange(1, 60))
            raw = raw[:end] + raw[at:end] + raw[end:]
        elif what == 4:
            raw = raw.replace(b'"BF16"', f'"{rng.choice(DTYPES)}"'.encode(), 1)
        else:
            digits = [i for i, byte in enumerate(raw) if 48 <= byte <= 57]
            if digits:
                at = rng.choice(digits)
                raw = raw[:at] + rng.choice(NUMBERS).encode() + raw[at + 1 :]
    return raw


def mutants(count: int, seed: int) -> Iterator[bytes]:
    """Whole files: the header's length, a damaged header, and as many bytes of data as the sound one described."""
    rng = random.Random(seed)
    sound, data = b"", b""
    for number in range(count):
        if number % 50 == 0:
            sound = header(rng)
            entries = json.loads(sound)
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            data = bytes(max(ends))
        raw = damaged(sound, rng)
        length = len(raw) if rng.random() < 0.97 else max(0, len(raw) + rng.choice((-1, 1, 8, -8, 1 << 40)))
        yield length.to_bytes(8, "little") + raw + data


def _accepts(judge: Callable[[], object], *refusals: type[Exception]) -> bool:
    try:
        judge()
    except refusals:
        return False
    return True


def complaints(count: int, seed: int) -> Iterator[str]:
    """Files that safetensors refuses and our parser accepts, or on which it fails otherwise than by refusing."""
    for file in mutants(count, seed):
        try:
            ours = _accepts(lambda: parse_header(file, "file", len(file)), TpshardError)  # noqa: B023
        except Exception as error:
            yield f"{type(error).__name__}: {error}: {file[:300]!r}"
            continue
        if ours and not _accepts(lambda: deserialize(file), SafetensorError):  # noqa: B023
            yield f"safetensors refuses it: {file[:300]!r}"


def main() -> None:
    """Judge as many files as the first argument says, from the seed in the second; exit 1 on a complaint."""
    count = int(sys.argv[1])
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(10**6)
    found = 0
    for said in complaints(count, seed):
        found += 1
        print(said, flush=True)
    print(f"{count} damaged headers from seed {seed}: {found} complaints")
    sys.exit(found > 0)


if __name__ == "__main__":
    main()
