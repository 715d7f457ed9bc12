"""Plans and inspections as tables for a terminal; layers that are alike become one row."""

import re
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.table import Table

from tpshard.cli.console import Console
from tpshard.report.capacity import number_lines
from tpshard.report.results import InspectReport, PlanReport, quantisation_line, shares_of, stored_json
from tpshard.units import human_bytes

_WIDE = 100_000
"""More columns than any table has."""
_MOST_TP = 16
"""The largest tp for which a plan says why it is not possible."""


def fold(rows: Sequence[tuple[str, ...]], every: bool) -> list[tuple[str, ...]]:
    """Make one row of rows that differ only in numbers of the name: `model.layers.{0-31}.mlp.experts.{0-7}.w1`.

    rows: the name first. Order is that of the first row of each kind. Experts are folded in each layer, then layers.
    """
    return list(rows) if every else _fold(_fold(rows, 1), 0)


def _fold(rows: Sequence[tuple[str, ...]], which: int) -> list[tuple[str, ...]]:
    """Fold the first number of the names, or the second."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for name, *cells in rows:
        match = next(islice(re.finditer(r"(?<![^.])\d+(?=\.)", name), which, None), None)
        key = (name[: match.start()] + "\0" + name[match.end() :] if match else name, *cells)
        groups.setdefault(key, []).append(int(match.group()) if match else -1)
    return [(pattern.replace("\0", _span(numbers)), *cells) for (pattern, *cells), numbers in groups.items()]


def _span(numbers: list[int]) -> str:
    """`{0-31}`, `{0-3,5}` or `7`."""
    text = _runs(numbers)
    return text if len(numbers) == 1 else "{" + text + "}"


def _runs(numbers: list[int]) -> str:
    """`0-31`, `0-3,5` or `7`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _print_table(console: RichConsole, columns: Sequence[str], rows: Sequence[tuple[str, ...]], every: bool) -> None:
    """A row per line. Where the terminal is too narrow, a row's name has a line of its own, so that it stays whole."""
    rows = fold(rows, every)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    if console.measure(table, options=console.options.update(max_width=_WIDE)).maximum <= console.width:
        console.print(table)
        return
    for name, *cells in (columns, *rows):
        console.print(name, soft_wrap=True)
        console.print("    " + "  ".join(cells), soft_wrap=True)
    console.print()


def _shape(shape: Sequence[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _same_or_each(texts: Sequence[str]) -> str:
    """One text when all ranks have the same, else each rank's."""
    return texts[0] if len(set(texts)) == 1 else " ".join(texts)


def print_plan(report: PlanReport, every: bool) -> None:
    """A plan: a row per tensor, a row per rank, and what is padded, replicated, tied or not possible."""
    console = Console.rich()
    split = report.split
    rows = []
    for tensor, shares in zip(split.model.tensors, shares_of(split), strict=True):
        ranks = _same_or_each([_shape(shape) for shape, _ in shares]) if shares else "nothing"
        rule = "replicate" if tensor.cut.dim is None else tensor.cut.rule
        rule = rule if shares else f"drop: {split.layouts.dropped[tensor.name]}"
        rows.append((tensor.name, tensor.dtype, _shape(tensor.shape), rule, ranks))
    _print_table(console, ("tensor", "dtype", "shape", "rule", "each rank holds"), rows, every)
    if split.model.quantisation:
        console.print(f"quantised: {quantisation_line(split.model.quantisation)}")
    if text := split.model.architecture.get("text"):
        console.print(_text_line(text))
    if not split.format.own_names:
        made = []
        for entry in stored_json(split):
            whence = entry["from"] or ["a constant"]
            ranks = _same_or_each([_shape(rank["shape"]) for rank in entry["ranks"]])
            made.append((entry["name"], " ".join(name.rpartition(".")[0].rpartition(".")[2] for name in whence), ranks))
        _print_table(console, ("the files have", "made of", "each rank holds"), made, every)
    plan = report.to_json()
    for line in number_lines(plan["numbers"]):
        console.print(line)
    for entry in plan["padded"]:
        console.print(f"padded: {entry['axis']} from {entry['count']} to {entry['padded']}, with zeros")
    tp = split.options.tp
    for name in plan["replicated"]:
        count = split.model.axes[name].count
        console.print(f"replicated: {count} {name} on {tp} ranks, each on {tp // count} ranks in a row")
    for module, to in plan["tied"].items():
        console.print(f"tied: {module} = {to}")
    console.print(f"possible tp: {', '.join(map(str, plan['possible_tp']))}")
    if reasons := _reasons(report):
        console.print(f"not possible: {reasons}", style="dim", soft_wrap=True)


def _text_line(text: Mapping[str, Any]) -> str:
    """What of a multimodal model is split."""
    rest = ", ".join(text["replicated"]) or "nothing else"
    return f"text model: {text['model_type']} under {text['prefix']}* is split; replicated: {rest}"


def _reasons(report: PlanReport) -> str:
    """Each tp up to 16 that would cut a unit, by what it would cut; of the many above, just that they are."""
    shown: dict[str, list[int]] = {}
    for tp, axis in report.cut_axes:
        if tp <= _MOST_TP:
            shown.setdefault(f"{axis.count} {axis.name} do not divide", []).append(tp)
    reasons = [f"tp {_runs(numbers).replace(',', ', ')} ({why})" for why, numbers in shown.items()]
    rest = sum(tp > _MOST_TP for tp, _ in report.cut_axes)
    return "; ".join(reasons + ([f"{rest} more above {_MOST_TP} (--json lists them)"] if rest else []))


def print_inspect(report: InspectReport, every: bool) -> None:
    """An inspection: the facts, then a row per tensor."""
    console = Console.rich()
    console.print(f"{report.path}: {report.kind}")
    for key, value in report.facts.items():
        if value not in (None, [], {}):
            console.print(f"  {key.replace('_', ' ')}: {_fact(key, value)}")
    rows = [(t.name, t.dtype, _shape(t.shape), human_bytes(t.nbytes), Path(t.file).name) for t in report.tensors]
    _print_table(console, ("tensor", "dtype", "shape", "size", "file"), rows, every)


def _fact(key: str, value: Any) -> str:
    if key in ("bytes", "header_bytes"):
        return human_bytes(value)
    if key == "mesh":
        return ", ".join(f"{name} {size}" for name, size in value.items())
    if key == "source":
        return " at ".join(text for text in (value["name"], value["revision"]) if text)
    if key == "quantisation":
        return quantisation_line(value)
    if key == "files":
        return ", ".join(f"{file['name']} ({human_bytes(file['size'])})" for file in value)
    if key == "metadata":
        return ", ".join(f"{name}={text}" for name, text in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)
