"""Properties of the whole road, over random architectures: rules of their own, random axes, shapes, dtypes, shares.

What a rank must hold is worked out here by the definition alone: its units of every segment, one after another, taken
from the logical tensor with NumPy. Nothing of layout or planning is asked. Blocks are of a few bytes, so that even
these small tensors are moved in many.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import tpshard
from tests.helpers.toys import BITS, Bits, Tensor, bits_of, contents, of_bits, random_tensor, read, read_all, read_rank
from tests.helpers.toys import write_checkpoint as write_toy
from tpshard.errors import CorruptError
from tpshard.execute import blocks as lower
from tpshard.execute.publish import Settings
from tpshard.storage.safetensors import build_header

Indices = list[int | None]
"""Positions along the cut dim that a rank holds, in stored order; None is a zero."""


@dataclass(frozen=True)
class Width:
    """How a set is dealt: tp, weights of the ranks (None: evenly), and what the vocab is padded to."""

    tp: int
    weights: tuple[int, ...] | None
    pad_to: int | None = None
    max_file_size: int | None = None

    def options(self) -> dict[str, Any]:
        """As the verbs take them."""
        total = sum(self.weights or ())
        even = self.weights is None or len(set(self.weights)) == 1
        return {
            "tp": self.tp,
            "uneven": self.weights is not None and even,
            "shares": None if even else [str(Fraction(weight, total)) for weight in self.weights or ()],
            "pad_vocab_to": self.pad_to,
            "max_file_size": self.max_file_size,
        }


@dataclass(frozen=True)
class Axis:
    """An axis of a toy, in the words of the rules language."""

    name: str
    count: int
    unit: int
    replicate: bool = False
    pad: bool = False
    group: str | None = None


@dataclass(frozen=True)
class Module:
    """A rule of its own, and one tensor for every layer (or one, outside the layers)."""

    name: str
    rule: str
    segments: tuple[Axis, ...]
    interleave: Axis | None
    axes: tuple[str, ...]  # of the stored dims
    written: bool  # whether the dims stand in the rules file
    shape: tuple[int, ...]
    dtype: str
    bias: str | None
    layered: bool

    @property
    def dim(self) -> int | None:
        """The dim that is cut."""
        axis = {"column": "out", "row": "in"}.get(self.rule)
        return self.axes.index(axis) if axis else None

    @property
    def pattern(self) -> str:
        """As the rules file writes it."""
        return f"model.layers.*.{self.name}" if self.layered else f"model.{self.name}"


@dataclass(frozen=True)
class Toy:
    """A random architecture with its checkpoint, and two ways of dealing it."""

    axes: tuple[Axis, ...]
    modules: tuple[Module, ...]
    layers: int
    seed: int
    files: int
    a: Width
    b: Width

    def rules(self) -> str:
        """The rules file."""
        lines = ['model_types = ["toy"]', 'prefix = "model."', 'layers = "depth"', "[axes]"]
        for axis in self.axes:
            facts = [f'count = "n_{axis.name}"', f'unit = "u_{axis.name} or 1"']
            facts += [f"{key} = true" for key in ("replicate", "pad") if getattr(axis, key)]
            facts += [f'group = "{axis.group}"'] if axis.group else []
            lines.append(f"{axis.name} = {{ {', '.join(facts)} }}")
        patterns: dict[str, list[str]] = {}
        for module in self.modules:
            words = [module.rule, *(axis.name for axis in module.segments)]
            words += ["/", module.interleave.name] if module.interleave else []
            patterns.setdefault(" ".join(words), []).append(module.pattern)
        lines.append("[rules]")
        lines += [f"{json.dumps(key)} = {json.dumps(value)}" for key, value in patterns.items()]
        lines.append("[dims]")
        lines += [f"{json.dumps(m.pattern)} = {json.dumps(list(m.axes))}" for m in self.modules if m.written]
        return "\n".join(lines) + "\n"

    def config(self) -> dict[str, Any]:
        """config.json; a unit of 1 is left out."""
        units = {f"u_{axis.name}": axis.unit for axis in self.axes if axis.unit > 1}
        return {
            "model_type": "toy",
            "depth": self.layers,
            **{f"n_{axis.name}": axis.count for axis in self.axes},
            **units,
        }

    def tensors(self) -> dict[str, tuple[Tensor, Module, int | None]]:
        """Every tensor, with its module and the dim that is cut, in a random order."""
        rng = np.random.default_rng(self.seed)
        found: dict[str, tuple[Tensor, Module, int | None]] = {}
        for module in self.modules:
            for layer in range(self.layers if module.layered else 1):
                name = module.pattern.replace("*", str(layer))
                stem = name if module.written and not module.bias else f"{name}.weight"
                found[stem] = random_tensor(rng, module.dtype, module.shape), module, module.dim
                if module.bias:
                    size = module.shape[module.axes.index("out")]
                    dim = 0 if module.rule == "column" else None
                    found[f"{name}.bias"] = random_tensor(rng, module.bias, (size,)), module, dim
        names = sorted(found)
        rng.shuffle(names)
        # As published files have them: some names without the prefix.
        stripped = {name: name.removeprefix("model.") if rng.integers(3) == 0 else name for name in names}
        return {stripped[name]: found[name] for name in names}

    def write(self, directory: Path) -> tuple[Path, Path]:
        """The checkpoint and its rules file."""
        tensors = {name: tensor for name, (tensor, _, _) in self.tensors().items()}
        names = list(tensors)
        groups = [names[i :: self.files] for i in range(self.files) if names[i :: self.files]]
        rules = directory / "toy.toml"
        rules.write_text(self.rules())
        return write_toy(directory / "toy", self.config(), tensors, groups), rules


# What each rank holds, by the definition.


def apportion(count: int, weights: Sequence[int]) -> list[int] | None:
    """Divide by weight, the largest remainders first, then the lower rank; None when a rank would get nothing."""
    exact = [Fraction(count * weight, sum(weights)) for weight in weights]
    sizes = [int(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda rank: (sizes[rank] - exact[rank], rank))
    for rank in by_remainder[: count - sum(sizes)]:
        sizes[rank] += 1
    return sizes if min(int(value) for value in exact) >= 1 else None


def dealt(axis: Axis, axes: Mapping[str, Axis], width: Width) -> list[tuple[int, int]] | None:
    """Each rank's units of an axis; None where that is not possible, or not what this oracle works out."""
    tp, count = width.tp, axis.count
    if axis.pad:
        count = width.pad_to or -(-count // tp) * tp
    if axis.replicate and count < tp:
        copies = tp // count
        return None if tp % count else [(rank // copies, rank // copies + 1) for rank in range(tp)]
    sizes: list[int] | None
    if width.weights is None:
        sizes = None if count % tp else [count // tp] * tp
    elif axis.group is None:
        sizes = apportion(count, width.weights)
    else:
        group = axes[axis.group]
        each = count // group.count
        if group.count >= tp:
            whole = dealt(group, axes, width)
            sizes = None if whole is None else [(stop - start) * each for start, stop in whole]
        elif tp % group.count:
            sizes = None
        else:
            together = tp // group.count
            parts = [apportion(each, width.weights[i : i + together]) for i in range(0, tp, together)]
            sizes = None if None in parts else [size for part in parts if part for size in part]
    if sizes is None:
        return None
    ends = np.cumsum([0, *sizes]).tolist()
    return list(zip(ends[:-1], ends[1:], strict=True))


def held(module: Module, axes: Mapping[str, Axis], width: Width, rank: int) -> Indices:
    """The positions of a rank: repeat by repeat, segment by segment, unit by unit."""
    repeats = module.interleave.count if module.interleave else 1
    result: Indices = []
    start = 0
    for repeat in range(repeats):
        for axis in module.segments:
            ranges = dealt(axis, axes, width)
            assert ranges is not None
            here = range(repeat * (axis.count // repeats), (repeat + 1) * (axis.count // repeats))
            for unit in range(*ranges[rank]):
                if unit in here:
                    first = start + (unit - here.start) * axis.unit
                    result += range(first, first + axis.unit)
                elif unit >= axis.count and repeat == repeats - 1:
                    result += [None] * axis.unit
            start += len(here) * axis.unit
    return result


def taken(tensor: Tensor, dim: int, indices: Indices) -> Bits:
    """The bits of these positions along a dim, zeros where there is none."""
    bits = bits_of(tensor)
    rows = [np.zeros_like(bits.take([0], dim)) if i is None else bits.take([i], dim) for i in indices]
    return np.concatenate(rows, axis=dim)


def expected(toy: Toy, width: Width, rank: int) -> dict[str, Tensor]:
    """Everything that a rank must hold."""
    axes = {axis.name: axis for axis in toy.axes}
    return {
        name: tensor if dim is None else of_bits(tensor.dtype, taken(tensor, dim, held(module, axes, width, rank)))
        for name, (tensor, module, dim) in toy.tensors().items()
    }


def ends_on_bytes(bits: int, inner: int, size: int, dim: int, indices: Indices) -> bool:
    """Whether every run of consecutive positions, and what is stored, starts and ends where a byte does."""
    row = bits * inner
    edges = {0, len(indices)}
    real = [i for i in indices if i is not None]
    for before, after in zip([None, *real], [*real, None], strict=True):
        if before is None or after is None or after != before + 1:
            edges |= {0 if before is None else before + 1, 0 if after is None else after}
    return all(edge * row % 8 == 0 for edge in edges) and (dim == 0 or size * row % 8 == 0)


# Random architectures.


@st.composite
def widths(draw: st.DrawFn) -> Width:
    tp = draw(st.sampled_from([2, 4, 3, 6, 5, 1]))
    weights = draw(st.none() | st.none() | st.just((1,) * tp) | st.tuples(*[st.integers(1, 3)] * tp))
    return Width(tp, weights, max_file_size=draw(st.sampled_from([None, None, 1, 60])))


@st.composite
def axis_sets(draw: st.DrawFn, both: tuple[Width, Width]) -> tuple[Axis, ...]:
    """Axes that both widths can deal."""

    def possible(axes: tuple[Axis, ...], axis: Axis) -> bool:
        known = {each.name: each for each in (*axes, axis)}
        return all(dealt(axis, known, width) is not None for width in both)

    def choose(axes: tuple[Axis, ...], form: Axis, counts: Sequence[int]) -> tuple[Axis, ...]:
        candidates = [each for count in counts if possible(axes, each := replace(form, count=count))]
        assume(candidates)
        return (*axes, draw(st.sampled_from(candidates[:5])))

    unit = draw(st.integers(1, 3))
    axes = choose((), Axis("kv", 0, unit, replicate=True), range(1, 25))
    axes = choose(axes, Axis("heads", 0, unit, group="kv"), [axes[0].count * each for each in range(1, 25)])
    axes = choose(axes, Axis("ffn", 0, draw(st.integers(1, 2))), range(1, 61))
    axes = choose(axes, Axis("state", 0, draw(st.sampled_from([1, 4])), replicate=True), range(1, 25))
    vocab = Axis("vocab", draw(st.integers(1, 13)), draw(st.sampled_from([1, 1, 2])), pad=True)
    return (*axes, vocab)


@st.composite
def module_lists(draw: st.DrawFn, axes: tuple[Axis, ...], both: tuple[Width, Width]) -> tuple[Module, ...]:
    known = {axis.name: axis for axis in axes}
    sizes = st.sampled_from([1, 2, 3, 4, 5, 8])
    modules = []
    for number in range(draw(st.integers(1, 5))):
        rule = draw(st.sampled_from(["column", "column", "row", "replicate", "buffer"]))
        dtype = draw(st.sampled_from(sorted(BITS)))
        segments: tuple[Axis, ...] = ()
        interleave = bias = None
        layered = draw(st.booleans())
        if rule in ("column", "row"):
            kv, heads, ffn, _, vocab = axes
            usual = [(heads, kv, kv), (heads,) * 3, (ffn, ffn), (kv, kv), (ffn, kv), (vocab,), (vocab,)]
            segments = draw(st.sampled_from(usual) | st.lists(st.sampled_from(axes), min_size=1, max_size=3).map(tuple))
            if not any(axis.pad for axis in segments):
                fits = [axis for axis in axes if not axis.pad and all(not s.count % axis.count for s in segments)]
                interleave = draw(st.sampled_from([None, *fits, *fits]))
            cut = {"column": "out", "row": "in"}[rule]
            forms = [("out", "in"), ("in", "out"), ("expert", "out", "in"), ("expert", "in", "out")]
            names = draw(st.sampled_from([*forms, ("out",)] if rule == "column" else forms))
            written = names not in (("out", "in"), ("out",))
            length = sum(axis.count * axis.unit for axis in segments)
            shape = tuple(length if name == cut else draw(sizes) for name in names)
            if draw(st.booleans()):
                bias = draw(st.sampled_from([name for name, width in BITS.items() if width >= 8]))
        else:
            names, written = (), False
            shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=3)))
        if BITS[dtype] * prod(shape) % 8:
            dtype = "U8"
        if len(shape) > 1 and dtype not in ("F64", "F32", "F16", "BF16", "C64"):
            dtype = "BOOL"  # matrices of narrow or whole numbers are quantised, and refused without their scales
        module = Module(
            f"m{number}", rule, segments, interleave, names, written, shape, dtype, bias if names else None, layered
        )
        if module.dim is not None and not aligned(module, known, both):
            module = replace(module, dtype="BOOL")
        modules.append(module)
    return tuple(modules)


def aligned(module: Module, axes: Mapping[str, Axis], both: Sequence[Width]) -> bool:
    """Whether no rank's part of a tensor starts or ends inside a byte."""
    dim = module.dim
    assert dim is not None
    inner = prod(module.shape[dim + 1 :])
    return all(
        ends_on_bytes(BITS[module.dtype], inner, module.shape[dim], dim, held(module, axes, width, rank))
        for width in both
        for rank in range(width.tp)
    )


def paddings(vocab: Axis, width: Width) -> list[Width]:
    """The width with what the vocab may be padded to."""
    sizes = [None, *range(-(-vocab.count // width.tp) * width.tp, 31, width.tp)]
    return [padded for size in sizes if dealt(vocab, {}, padded := replace(width, pad_to=size)) is not None]


@st.composite
def toys(draw: st.DrawFn) -> Toy:
    both = draw(widths()), draw(widths())
    axes = draw(axis_sets(both))
    vocab = axes[-1]
    a, b = (draw(st.sampled_from(paddings(vocab, width))) for width in both)
    modules = draw(module_lists(axes, (a, b)))
    files = draw(st.integers(1, 3))
    return Toy(axes, modules, draw(st.integers(1, 2)), draw(st.integers(0, 99)), files, a, b)


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


blocks = st.sampled_from([1, 5, 16, 100, 1 << 20])


@contextmanager
def running(block: int, workers: int) -> Iterator[Settings]:
    """Settings for moving blocks of at most `block` bytes on so many threads."""
    with patch.object(lower, "BLOCK", block):
        yield Settings(workers=workers, fsync=False)


@given(toys(), blocks, st.integers(1, 3))
def test_a_split_holds_what_the_definition_says(toy: Toy, block: int, workers: int) -> None:
    with scratch() as place, running(block, workers) as how:
        model, rules = toy.write(place)
        tpshard.split(model, **toy.a.options(), out=place / "out", rules=rules, settings=how)
        for rank in range(toy.a.tp):
            assert read_rank(place / "out", rank, toy.a.tp) == expected(toy, toy.a, rank)
        assert tpshard.check(place / "out", settings=how).equal
        assert tpshard.check(place / "out", model, rules=rules, settings=how).equal


@given(toys(), blocks, st.integers(1, 3))
def test_a_merge_gives_the_source_back(toy: Toy, block: int, workers: int) -> None:
    with scratch() as place, running(block, workers) as how:
        model, rules = toy.write(place)
        tpshard.split(model, **toy.a.options(), out=place / "out", rules=rules, settings=how)
        tpshard.merge(place / "out", place / "merged", settings=how)
        sources = sorted(model.glob("*.safetensors"))
        merged = sorted((place / "merged").glob("*.safetensors"))
        assert [file.name for file in merged] == [file.name for file in sources]
        for source, file in zip(sources, merged, strict=True):
            assert read(file) == read(source)
        assert (place / "merged" / "config.json").read_bytes() == (model / "config.json").read_bytes()


@given(toys(), st.tuples(blocks, blocks), st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_a_reshard_is_a_direct_split(toy: Toy, block: tuple[int, int], workers: tuple[int, int]) -> None:
    with scratch() as place:
        model, rules = toy.write(place)
        with running(block[0], workers[0]) as how:
            tpshard.split(model, **toy.a.options(), out=place / "a", rules=rules, settings=how)
            tpshard.split(model, **toy.b.options(), out=place / "direct", rules=rules, settings=how)
        with running(block[1], workers[1]) as how:
            tpshard.reshard(place / "a", **toy.b.options(), out=place / "b", settings=how)
        assert contents(place / "b") == contents(place / "direct")


@given(toys(), blocks, st.data())
def test_hosts_that_write_their_own_ranks_make_the_same_set(toy: Toy, block: int, data: st.DataObject) -> None:
    mine = data.draw(st.sets(st.integers(0, toy.a.tp - 1), min_size=1))
    theirs = set(range(toy.a.tp)) - mine
    with scratch() as place, running(block, 2) as how:
        model, rules = toy.write(place)
        for ranks in filter(None, (mine, theirs)):
            tpshard.split(model, **toy.a.options(), out=place / "shared", rules=rules, ranks=ranks, settings=how)
        tpshard.split(model, **toy.a.options(), out=place / "whole", rules=rules, settings=how)
        whole = contents(place / "whole")
        shared = contents(place / "shared")
        assert whole.pop("SHA256SUMS") != shared.pop("SHA256SUMS"), "no host of several knows every checksum"
        assert shared == whole


CASTS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
FLOATS = list(CASTS.values())


def cast(tensor: Tensor, module: Module, dtype: str) -> Tensor:
    """What torch makes of the whole tensor, with its default NaN; integers, FP8 and buffers stay as they are."""
    import torch
    from safetensors.torch import load, save

    if module.rule == "buffer" or tensor.dtype not in FLOATS or tensor.dtype == CASTS[dtype]:
        return tensor
    header = build_header([("t", tensor.dtype, tensor.shape)], {})
    made = load(header + tensor.data)["t"].to(getattr(torch, dtype))
    raw = save({"t": torch.where(made.isnan(), torch.tensor(torch.nan, dtype=made.dtype), made)})
    return Tensor(CASTS[dtype], tensor.shape, raw[8 + int.from_bytes(raw[:8], "little") :])


def special(tensor: Tensor, rng: np.random.Generator) -> Tensor:
    """The tensor with some numbers turned into infinities and NaNs of any payload."""
    exponent = {"F64": 11, "F32": 8, "F16": 5, "BF16": 8}.get(tensor.dtype)
    if exponent is None:
        return tensor
    bits = bits_of(tensor)
    chosen, infinite = rng.random((2, *tensor.shape)) < 0.2
    bits[chosen, -1 - exponent : -1] = 1
    bits[chosen & infinite, : -1 - exponent] = 0
    return of_bits(tensor.dtype, bits)


@given(toys(), st.lists(st.none() | st.sampled_from(FLOATS), min_size=5, max_size=5), st.sampled_from([*CASTS]), blocks)
def test_a_cast_is_torchs_and_survives_merge_and_reshard(
    toy: Toy, dtypes: list[str | None], dtype: str, block: int
) -> None:
    rng = np.random.default_rng(toy.seed)
    drawn = zip(toy.modules, dtypes, strict=False)
    toy = replace(toy, modules=tuple(replace(m, dtype=d, bias=m.bias and d) if d else m for m, d in drawn))
    source = {name: (special(tensor, rng), module, dim) for name, (tensor, module, dim) in toy.tensors().items()}
    wanted = {name: (cast(tensor, module, dtype), module, dim) for name, (tensor, module, dim) in source.items()}
    with scratch() as place:
        with patch.object(Toy, "tensors", lambda self: source):
            model, rules = toy.write(place)
        with running(block, 2) as how:
            asked = {"rules": rules, "dtype": dtype, "allow_overflow": True, "settings": how}
            tpshard.split(model, **toy.a.options(), out=place / "a", **asked)
            tpshard.merge(place / "a", place / "merged", settings=how)
        with running(1 << 20, 1) as how:
            assert tpshard.check(place / "a", model, rules=rules, settings=how).equal
            tpshard.split(model, **toy.b.options(), out=place / "direct", **asked | {"settings": how})
            tpshard.reshard(place / "a", **toy.b.options(), out=place / "b", settings=how)
        assert read_all(place / "merged") == {name: tensor for name, (tensor, _, _) in wanted.items()}
        with patch.object(Toy, "tensors", lambda self: wanted):
            for rank in range(toy.a.tp):
                assert read_rank(place / "a", rank, toy.a.tp) == expected(toy, toy.a, rank)
        assert contents(place / "b") == contents(place / "direct")
        for directory in ("b", "merged"):
            assert json.loads((place / directory / "config.json").read_text())["dtype"] == dtype


# The properties above move blocks of a byte and check what they moved; here that was most of the time.
@given(toys(), st.sampled_from([16, 100, 1 << 20]), st.data())
def test_check_names_the_tensor_of_any_byte_that_is_changed(toy: Toy, block: int, data: st.DataObject) -> None:
    with scratch() as place, running(block, 2) as how:
        model, rules = toy.write(place)
        tpshard.split(model, **toy.a.options(), out=place / "out", rules=rules, settings=how)
        files = [
            file
            for file in sorted((place / "out").glob("*.safetensors"))
            if any(len(t.data) for t in read(file).values())
        ]
        assume(files)
        file = data.draw(st.sampled_from(files))
        raw = bytearray(file.read_bytes())
        begin = 8 + int.from_bytes(raw[:8], "little")
        at = data.draw(st.integers(begin, len(raw) - 1))
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
        before = read(file)
        file.write_bytes(raw)
        changed = [name for name, tensor in read(file).items() if tensor != before[name]]
        judged = tpshard.check(place / "out", model, rules=rules, settings=how)
        assert [(each.file, each.tensor) for each in judged.differences] == [(file.name, name) for name in changed]
        assert [each.file for each in tpshard.check(place / "out", settings=how).differences] == [file.name]


PLAIN = ("BF16", "BOOL", "C64", "F16", "F32", "F64")
"""Dtypes of weights that are not quantised."""


@pytest.mark.parametrize("dtype", sorted(BITS))
@pytest.mark.parametrize(("rule", "shape"), [("column", (8, 12)), ("row", (12, 8))])
def test_every_dtype_travels_untouched_or_needs_a_scale(
    dtype: str, rule: str, shape: tuple[int, int], tmp_path: Path
) -> None:
    ffn = Axis("ffn", 8, 1)
    width = Width(2, None)
    module = Module("m", rule, (ffn,), None, ("out", "in"), False, shape, dtype, None, True)
    toy = Toy((ffn,), (module,), 2, 7, 1, width, width)
    model, rules = toy.write(tmp_path)
    if dtype not in PLAIN:
        with pytest.raises(CorruptError, match=r"is quantised, and its scale .*m\.weight_scale_inv is not there"):
            tpshard.split(model, 2, tmp_path / "out", rules=rules)
        return
    tpshard.split(model, 2, tmp_path / "out", rules=rules)
    assert [read_rank(tmp_path / "out", rank, 2) for rank in range(2)] == [expected(toy, width, r) for r in range(2)]
    tpshard.merge(tmp_path / "out", tmp_path / "merged")
    assert read_all(tmp_path / "merged") == read_all(model)
