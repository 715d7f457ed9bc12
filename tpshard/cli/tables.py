"""Plans and inspections as tables for a terminal; layers that are alike become one row."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.table import Table

from tpshard.cli.console import Console
from tpshard.report.capacity import number_lines
from tpshard.report.plan_rows import TensorKind, fold, stored_shapes
from tpshard.report.results import InspectReport, PlanReport, quantisation_line
from tpshard.units import human_bytes

_WIDE = 100_000
"""More columns than any table has."""


def _print_table(
    console: RichConsole, columns: Sequence[str], rows: Iterable[tuple[str, tuple[str, ...]]], every: bool
) -> None:
    """A row per line. Where the terminal is too narrow, a row's name has a line of its own, so that it stays whole."""
    rows = list(rows if every else ((pattern, cells) for pattern, _, cells in fold(rows)))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for name, cells in rows:
        table.add_row(name, *cells)
    if console.measure(table, options=console.options.update(max_width=_WIDE)).maximum <= console.width:
        console.print(table)
        return
    for name, cells in ((columns[0], tuple(columns[1:])), *rows):
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
    cells = cache(_cells)
    rows = ((name, cells(kind)) for name, kind in report.tensors)
    _print_table(console, ("tensor", "dtype", "shape", "rule", "each rank holds"), rows, every)
    if split.model.quantisation:
        console.print(f"quantised: {quantisation_line(split.model.quantisation)}")
    if text := split.model.architecture.get("text"):
        console.print(_text_line(text))
    if not split.format.own_names:
        made = (
            (name, _stored_cells(whence, shapes)) for name, whence, shapes in stored_shapes(split.layouts.rows.rows)
        )
        _print_table(console, ("the files have", "made of", "each rank holds"), made, every)
    for line in number_lines(report.numbers()):
        console.print(line)
    if stages := split.layouts.stages:
        layers = ", ".join(f"{first}-{last - 1}" if last - first > 1 else str(first) for first, last in stages.ranges)
        console.print(f"stages: layers {layers}, each on {split.options.tp} ranks")
    if (placement := split.layouts.placement) and placement.experts:
        dealt = ", ".join(
            f"{first}-{last - 1}" if last - first > 1 else str(first) for first, last in placement.experts[1]
        )
        size = split.options.tp // split.options.ep
        console.print(f"experts: {dealt}, {'whole on each rank' if size == 1 else f'each cut for {size} ranks'}")
    for entry in report.padding():
        console.print(f"padded: {entry['axis']} from {entry['count']} to {entry['padded']}, with zeros")
    for name in report.replicated:
        held = Counter(unit for low, high in report.deal.ranges[name] for unit in range(low, high))
        fewest, most = min(held.values()), max(held.values())
        each = f"each on {most}" if fewest == most else f"each on {fewest} to {most}"
        count = split.model.axes[name].count
        console.print(f"replicated: {count} {name} on {split.options.tp} ranks, {each} ranks in a row")
    for module, to in split.model.tied.items():
        console.print(f"tied: {module} = {to}")
    console.print(f"possible tp: {', '.join(map(str, report.possible_tp))}")
    if report.impossible:
        console.print(f"not possible: {report.impossible}", style="dim", soft_wrap=True)


def _cells(kind: TensorKind) -> tuple[str, ...]:
    """What a row says of tensors of one kind, after the name."""
    tensor, shares = kind.first, kind.shares
    ranks = _same_or_each([_shape(shape) for _, shape, _ in shares]) if shares else "nothing"
    rule = "replicate" if tensor.cut.dim is None else tensor.cut.rule
    return tensor.dtype, _shape(tensor.shape), rule if shares else f"drop: {kind.fields['reason']}", ranks


def _stored_cells(whence: Sequence[str], shapes: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """What a row says of a stored tensor, after the name."""
    made = " ".join(name.rpartition(".")[0].rpartition(".")[2] for name in whence or ["a constant"])
    return made, _same_or_each(list(map(_shape, shapes)))


def _text_line(text: Mapping[str, Any]) -> str:
    """What of a multimodal model is split."""
    rest = ", ".join(text["replicated"]) or "nothing else"
    return f"text model: {text['model_type']} under {text['prefix']}* is split; replicated: {rest}"


def print_inspect(report: InspectReport, every: bool) -> None:
    """An inspection: the facts, then a row per tensor."""
    console = Console.rich()
    console.print(f"{report.path}: {report.kind}")
    for key, value in report.facts.items():
        if value not in (None, [], {}):
            console.print(f"  {key.replace('_', ' ')}: {_fact(key, value)}")
    rows = ((t.name, (t.dtype, _shape(t.shape), human_bytes(t.nbytes), Path(t.file).name)) for t in report.tensors)
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
