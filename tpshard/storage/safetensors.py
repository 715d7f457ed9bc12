"""Parse, validate and build safetensors headers.

A file is an 8-byte little-endian length, a JSON object of that many bytes, and the tensors' bytes without a gap.
Parsing is validating: a `Header` that exists describes its file exactly. Stricter than safetensors where that
guesses: a name written twice, unknown keys, `__metadata__: null` and a header that starts with a space are refused.
The library's reader tells no byte offsets and needs the file on this machine; its writer needs all tensors in memory.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from operator import attrgetter

from tpshard.errors import CorruptError

# Every name of safetensors 0.8, by bits per element.
_DTYPES_BY_BITS = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "I16 U16 F16 BF16",
    32: "I32 U32 F32",
    64: "I64 U64 F64 C64",
}
DTYPE_BITS: dict[str, int] = {name: bits for bits, names in _DTYPES_BY_BITS.items() for name in names.split()}
MAX_HEADER = 100_000_000  # bytes of JSON; safetensors refuses more
MAX_DIMS = 64  # what NumPy can hold; a longer shape is damage, and could cost gigabytes to read

_PREFIX = 8
_ALIGN = 8
_LIMIT = 2**64  # every reader counts a tensor's bits in 64-bit numbers
_AGAIN = "copy or download the file again"
_REWRITE = "write the file again with the tool that made it"

# A header has three levels and two kinds of leaves, so a few expressions read all of it, without the recursion by
# which nested input exhausts the stack. Possessive (*+), so that nothing long is tried twice; but not around a group
# with alternatives, which Python before 3.11.5 gets wrong.
_SPACE = r"[ \t\n\r]*+"
_STRING = r'"([^"\\\x00-\x1f]*+(?:\\.[^"\\\x00-\x1f]*+)*+)"'
_DIGITS = r"(?:0|[1-9][0-9]{0,19}+)"
_NUMBER = rf"{_SPACE}{_DIGITS}{_SPACE}"
_MORE = f"{{0,{MAX_DIMS - 1}}}"
_KEY = re.compile(rf"{_SPACE}{_STRING}{_SPACE}:{_SPACE}")
_VALUE = re.compile(rf"(?:{_STRING}|\[({_NUMBER}(?:,{_NUMBER}){_MORE}|{_SPACE})\])")
_FIELD = re.compile(rf"{_KEY.pattern}{_VALUE.pattern}{_SPACE}([,}}])")
_CLOSE = re.compile(rf"{_SPACE}\}}")
_NEXT = re.compile(rf"{_SPACE}([,}}])")
_END = re.compile(rf"{_SPACE}\Z")
# An entry as nearly every writer writes it, in one step: twice as fast, and a subset of what the others accept.
_USUAL = re.compile(
    r'"([^"\\\x00-\x1f]*+)":\{"dtype":"([A-Z0-9_]++)",'
    rf'"shape":\[({_DIGITS}(?:,{_DIGITS}){_MORE}|)\],"data_offsets":\[({_DIGITS}),({_DIGITS})\]\}}([,}}])'
)
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_Value = str | tuple[int, ...]

_WHOLE = "whole numbers from 0 to 2^64 - 1"
_NOT_STRINGS = "__metadata__ is not an object of strings"
_FIELDS = "the fields dtype, shape and data_offsets"
_WRONG = {  # by field: what to call a value of the wrong kind, and what the right kind is
    "dtype": ("unknown dtype", "a dtype of safetensors"),
    "shape": ("the shape is not a list of dimensions", f"a list of at most {MAX_DIMS} {_WHOLE}"),
    "data_offsets": ("data_offsets is not a pair of offsets", f"[begin, end], {_WHOLE}"),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of one file; `begin` and `end` are absolute byte offsets in it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor takes in its file."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself: its tensors in file order, its metadata, where the data begins, sha256 up to there.

    Tensors that begin at the same byte (all but the last have no elements) keep the order of the header's text.
    """

    tensors: tuple[TensorInfo, ...]
    metadata: dict[str, str]
    data_begin: int
    digest: str


@dataclass(frozen=True, slots=True)
class _Text:
    """The JSON of a header, and its file's name for errors."""

    json: str
    file: str

    def show(self, at: int) -> str:
        return _printable(self.json[at : at + 40]) or "the end"

    def broken(self, at: int, expected: str) -> CorruptError:
        """The error for JSON that cannot go on at `at`."""
        found = f"{self.show(at)} at byte {_PREFIX + len(self.json[:at].encode())}"
        return _bad(self.file, None, "the header is not valid JSON", expected, found, _AGAIN)


def element_count(shape: Iterable[int]) -> int:
    """The number of elements of a shape; 1 for a scalar, whose shape is empty."""
    return math.prod(shape)


def nbytes(dtype: str, shape: Iterable[int]) -> int:
    """The exact size in bytes; ValueError for an unknown dtype, or when the last element does not end on a byte."""
    return _nbytes(dtype, tuple(shape))


@lru_cache(maxsize=4096)
def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Cached: a model has many tensors of few shapes."""
    if dtype not in DTYPE_BITS:
        raise ValueError(f"unknown dtype {dtype!r}")
    bits = element_count(shape) * DTYPE_BITS[dtype]
    if bits % 8:
        raise ValueError(f"{dtype} of shape {list(shape)} takes {bits} bits, which do not end on a byte")
    return bits // 8


def header_length(prefix: bytes, file: str, file_size: int) -> int:
    """Where the data begins (8 + header length), from the first 8 bytes of a file of `file_size` bytes.

    A longer prefix (64 bytes will do) helps to name what else the file is. Raises CorruptError.
    """
    if file_size < _PREFIX or len(prefix) < _PREFIX:
        found = f"{min(file_size, len(prefix))} bytes"
        raise _bad(file, None, "too short to be a safetensors file", f"at least {_PREFIX} bytes", found, _AGAIN)
    length = int.from_bytes(prefix[:_PREFIX], "little")
    if length > MAX_HEADER:
        # Text in place of the length reads as a number far above the cap, so these tests can hit no valid file.
        start = prefix.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
        message, hint = "the header length is above the cap", f"not a safetensors file, or damaged: {_AGAIN}"
        if prefix.startswith(b"version https://git-lfs"[: len(prefix)]):
            message, hint = "a Git-LFS pointer, not the weights", "run `git lfs pull` where the file came from"
        elif start.startswith((b"<!doctyp", b"<html", b"<?xml")):
            message, hint = "an HTML page, not the weights", f"the download saved an error page: {_AGAIN}"
        found = f"a length of {length}, from the bytes {prefix[:_PREFIX]!r}"
        raise _bad(file, None, message, f"a header of at most {MAX_HEADER} bytes", found, hint)
    if _PREFIX + length > file_size:
        expected = f"at least {_PREFIX + length} bytes"
        raise _bad(file, None, "the header is longer than the file", expected, f"{file_size} bytes", _AGAIN)
    return _PREFIX + length


def parse_header(raw: bytes, file: str, file_size: int) -> Header:
    """The validated header of a file of `file_size` bytes that starts with `raw`; CorruptError says what is wrong.

    `raw` holds at least the first `header_length` bytes; `file` becomes `TensorInfo.file`, and is named in errors.
    """
    data_begin = header_length(raw, file, file_size)
    if len(raw) < data_begin:
        raise _bad(file, None, "the file ended inside its header", f"{data_begin} bytes", f"{len(raw)} bytes", _AGAIN)
    tensors, metadata = _document(_Text(_decode(raw[_PREFIX:data_begin], file), file), data_begin)
    # By end too: a tensor without elements comes before the one that begins at the same byte, as it must.
    tensors.sort(key=attrgetter("begin", "end"))
    _require_exact_cover(tensors, file, data_begin, file_size)
    digest = hashlib.sha256(memoryview(raw)[:data_begin]).hexdigest()
    return Header(tuple(tensors), metadata, data_begin, digest)


def build_header(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The bytes before the data, for tensors (name, dtype, shape) that follow one another from offset 0 in this order.

    Equal input gives equal bytes: compact JSON in UTF-8 without ASCII escapes, as safetensors writes it, `__metadata__`
    first with sorted keys unless empty, then spaces until the data begins at a multiple of 8.
    ValueError for what `parse_header` would refuse.
    """
    if not all(type(text) is str for pair in metadata.items() for text in pair):
        raise ValueError("metadata must map strings to strings")
    said = {key: metadata[key] for key in sorted(metadata)}
    members = [f'"__metadata__":{_JSON.encode(said)}'] if metadata else []
    taken = {"__metadata__"}
    end = 0
    for name, dtype, shape in tensors:
        if name in taken:
            raise ValueError(f"the name {name!r} is taken")
        taken.add(name)
        if len(shape) > MAX_DIMS or any(type(dim) is not int or dim < 0 for dim in shape):
            raise ValueError(f"{name!r} has the shape {shape!r}")
        begin, end = end, end + nbytes(dtype, shape)
        if _overflows(dtype, shape):
            raise ValueError(f"{name!r} has the shape {shape!r}, which overflows 64 bits")
        # In pieces: an encoder that is given the whole document takes four times as long.
        dims = ",".join(map(str, shape))
        members.append(f'{_JSON.encode(name)}:{{"dtype":"{dtype}","shape":[{dims}],"data_offsets":[{begin},{end}]}}')
    body = f"{{{','.join(members)}}}".encode()
    body += b" " * (-(_PREFIX + len(body)) % _ALIGN)
    if len(body) > MAX_HEADER:
        raise ValueError(f"a header of {len(body)} bytes is above the cap of {MAX_HEADER}")
    return len(body).to_bytes(_PREFIX, "little") + body


def _bad(
    file: str, tensor: str | None, message: str, expected: object, found: object, hint: str = _REWRITE
) -> CorruptError:
    name = None if tensor is None else _printable(tensor)
    return CorruptError(message, path=file, tensor=name, expected=expected, found=found, hint=hint)


def _printable(text: str) -> str:
    """The text, cut and escaped so that it fits on a line and cannot steer a terminal."""
    short = text if len(text) <= 200 else f"{text[:200]}..."
    return short if short.isprintable() else json.dumps(short)


def _show(value: _Value) -> str:
    return _printable(value if isinstance(value, str) else str(list(value)))


def _decode(body: bytes, file: str) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{body[error.start]:02x} at offset {_PREFIX + error.start}"
        raise _bad(file, None, "the header is not UTF-8", "UTF-8 text", found, _AGAIN) from error


def _document(text: _Text, data_begin: int) -> tuple[list[TensorInfo], dict[str, str]]:
    """The tensors, in the order of the text, and the metadata."""
    if not text.json.startswith("{"):
        raise _bad(text.file, None, "the header is not a JSON object", "{ as its first byte", text.show(0), _AGAIN)
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] | None = None
    alike: dict[tuple[str, str], TensorInfo] = {}  # by dtype and the shape's text
    closed = _CLOSE.match(text.json, 1)
    at, delimiter = (closed.end(), "}") if closed else (1, ",")
    while delimiter == ",":
        if usual := _USUAL.match(text.json, at):
            name, dtype, shape, first, last, delimiter = usual.groups()
            at, begin, end = usual.end(), int(first), int(last)
            like = alike.get((dtype, shape))
            if like is not None and end - begin == like.nbytes and name not in tensors and name != "__metadata__":
                tensors[name] = TensorInfo(
                    name, like.dtype, like.shape, text.file, data_begin + begin, data_begin + end
                )
                continue
            fields: dict[str, _Value] = {"dtype": dtype, "shape": _numbers(shape), "data_offsets": (begin, end)}
        else:
            name, fields, delimiter, at = _member(text, at)
        if name in tensors or (name == "__metadata__" and metadata is not None):
            raise _bad(text.file, name, "the name occurs twice in the header", "unique names", "the name again")
        if name == "__metadata__":
            metadata = _metadata(text.file, fields)
        else:
            tensors[name] = _tensor(text.file, data_begin, name, fields)
            if usual:
                alike[dtype, shape] = tensors[name]
    if not _END.match(text.json, at):
        raise text.broken(at, "nothing but space after the last }")
    return list(tensors.values()), metadata or {}


def _member(text: _Text, at: int) -> tuple[str, dict[str, _Value], str, int]:
    """The member of the header's object at `at`: name, fields, the comma or } after it, and where that ends."""
    key = _KEY.match(text.json, at)
    if key is None:
        raise text.broken(at, "a name in quotes and a colon")
    name = _string(key[1], text, at)
    tensor = None if name == "__metadata__" else name
    if not text.json.startswith("{", key.end()):
        message = "the entry is not an object" if tensor is not None else _NOT_STRINGS
        raise _bad(text.file, tensor, message, "an object", text.show(key.end()))
    fields, at = _fields(text, key.end() + 1, tensor)
    following = _NEXT.match(text.json, at)
    if following is None:
        raise text.broken(at, "a comma or }")
    return name, fields, following[1], following.end()


def _fields(text: _Text, at: int, tensor: str | None) -> tuple[dict[str, _Value], int]:
    """The fields of the object whose { ends at `at`, each a string or a list of whole numbers, and where it ends."""
    fields: dict[str, _Value] = {}
    closed = _CLOSE.match(text.json, at)
    at, delimiter = (closed.end(), "}") if closed else (at, ",")
    while delimiter == ",":
        field = _FIELD.match(text.json, at)
        if field is None:
            raise _unreadable(text, at, tensor)
        body, string, numbers, delimiter = field.groups()
        key = _string(body, text, at)
        if key in fields:
            raise _bad(text.file, tensor, "a key occurs twice", "unique keys", f"{_printable(key)} again")
        fields[key] = _numbers(numbers) if string is None else _string(string, text, at)
        at = field.end()
    return fields, at


def _numbers(body: str) -> tuple[int, ...]:
    return tuple(map(int, body.split(","))) if body.strip() else ()


def _unreadable(text: _Text, at: int, tensor: str | None) -> CorruptError:
    """The error for a field that is neither a string nor a list of whole numbers, or no field at all."""
    key = _KEY.match(text.json, at)
    if key is None:
        return text.broken(at, "a key in quotes and a colon")
    if value := _VALUE.match(text.json, key.end()):
        return text.broken(value.end(), "a comma or }")
    field, found = _string(key[1], text, at), text.show(key.end())
    if tensor is None:
        return _bad(text.file, None, _NOT_STRINGS, f"a string under {_printable(field)}", found)
    if field not in _WRONG:
        return _bad(text.file, tensor, "the entry has wrong fields", _FIELDS, f"unknown {_printable(field)}")
    return _bad(text.file, tensor, *_WRONG[field], found)


def _string(body: str, text: _Text, at: int) -> str:
    """What the characters between two quotes mean; `at` is where to point if they mean nothing."""
    if "\\" not in body:
        return body
    try:
        string = str(json.loads(f'"{body}"'))
    except json.JSONDecodeError as error:
        raise text.broken(at, "a string with valid escapes") from error
    # Python's JSON takes half of a surrogate pair; no UTF-8 text can hold it, so it could not be written again.
    if _LONE_SURROGATE.search(string):
        raise text.broken(at, "surrogate escapes in pairs")
    return string


def _metadata(file: str, fields: dict[str, _Value]) -> dict[str, str]:
    metadata: dict[str, str] = {}
    for key, value in fields.items():
        if not isinstance(value, str):
            raise _bad(file, None, _NOT_STRINGS, f"a string under {_printable(key)}", _show(value))
        metadata[key] = value
    return metadata


def _overflows(dtype: str, shape: tuple[int, ...]) -> bool:
    # Without the zeros: readers multiply from left to right, and [2^63, 4, 0] overflows before the zero is met.
    return element_count(dim for dim in shape if dim) * DTYPE_BITS[dtype] >= _LIMIT


def _tensor(file: str, data_begin: int, name: str, fields: dict[str, _Value]) -> TensorInfo:
    """The tensor that an entry describes, if dtype, shape and offsets agree; CorruptError."""
    if fields.keys() != _WRONG.keys():
        found = [f"no {field}" for field in _WRONG if field not in fields]
        found += [f"unknown {_printable(field)}" for field in fields if field not in _WRONG][:3]
        raise _bad(file, name, "the entry has wrong fields", _FIELDS, ", ".join(found))
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _bad(file, name, *_WRONG["dtype"], _show(dtype), f"known are {', '.join(DTYPE_BITS)}")
    if isinstance(shape, str):
        raise _bad(file, name, *_WRONG["shape"], _show(shape))
    if isinstance(offsets, str) or len(offsets) != 2:
        raise _bad(file, name, *_WRONG["data_offsets"], _show(offsets))
    begin, end = offsets
    bits = element_count(shape) * DTYPE_BITS[dtype]
    if (bits >= _LIMIT or not bits) and _overflows(dtype, shape):
        raise _bad(file, name, "the size overflows", "less than 2^64 bits, zeros left out", f"{dtype} {_show(shape)}")
    if bits % 8:
        found_bits = f"{bits} bits for {dtype} {_show(shape)}"
        raise _bad(file, name, "the size does not end on a byte", "a multiple of 8 bits", found_bits)
    if bits != 8 * (end - begin):
        expected, has = f"{bits // 8} bytes for {dtype} {_show(shape)}", f"{end - begin} bytes in {_show(offsets)}"
        raise _bad(file, name, "shape and dtype contradict data_offsets", expected, has)
    return TensorInfo(name, dtype, shape, file, data_begin + begin, data_begin + end)


def _require_exact_cover(tensors: list[TensorInfo], file: str, data_begin: int, file_size: int) -> None:
    """The tensors, in file order, must cover the bytes after the header, each byte once."""
    covered, before = data_begin, "at the start of the data"
    for tensor in tensors:
        if tensor.begin != covered:
            message = f"{'hole' if tensor.begin > covered else 'overlap'} {before}"
            expected, found = f"data_offsets from {covered - data_begin}", f"from {tensor.begin - data_begin}"
            raise _bad(file, tensor.name, message, expected, found)
        covered, before = tensor.end, f"after {_printable(tensor.name)}"
    expected, found = f"a file of {covered} bytes", f"{file_size} bytes"
    if covered > file_size:
        cut = next(tensor.name for tensor in tensors if tensor.end > file_size)
        raise _bad(file, cut, "the data is truncated", expected, found, _AGAIN)
    if covered < file_size:
        raise _bad(file, None, "bytes after the last tensor", expected, found, _AGAIN)
