"""What is claimed of formats, and which test judges each claim: the table in docs/reference/formats.md.

A claim names a way (written or read), meshes, who judges it and the test. `tests/formats/test_format_table.py` holds
that the tests are there and run what is claimed; `python -m tests.helpers.format_table` writes the page's table anew.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

from tests.helpers.paths import DOCS, TESTS

PAGE = DOCS / "reference/formats.md"
BEGIN = "<!-- made by `python -m tests.helpers.format_table` -->\n"
END = "<!-- end of what is made -->\n"
AXES = ("tp", "pp", "ep")
RUNS = {"engines": "make test-engines", "megatron": "make test-megatron"}
"""Folders of tests that are run by targets of their own; all others are `make test`."""

WRITTEN, READ, BOTH = "written", "read", "written, read"
"""Read is: by merge, reshard or check. Of what tpshard wrote itself, by its manifest."""
_VERBS = {WRITTEN: r"\b(split|reshard)\b", READ: r"\b(merge|reshard|check)\b"}


@dataclass(frozen=True)
class Claim:
    """One row. by: who judges. test: the file under tests, and the function. tp, pp, ep: sizes that it runs.

    as_tp: whether ep is tp, which the row then says.
    """

    format: str
    way: str
    by: str
    test: str
    tp: tuple[int, ...] = ()
    pp: tuple[int, ...] = ()
    ep: tuple[int, ...] = ()
    as_tp: bool = False

    @property
    def file(self) -> Path:
        """The file of the test."""
        return TESTS / self.test.partition("::")[0]

    @property
    def name(self) -> str:
        """The test."""
        return self.test.partition("::")[2]

    @property
    def run(self) -> str:
        """What runs it."""
        return RUNS.get(self.test.partition("/")[0], "make test")


_VLLM = "vLLM 0.32: its classes, after loading the source and after loading these files, parameter by parameter"
_MEGATRON = "megatron-core 0.16.1"
_LOADED = "megatron/check_megatron.py::test_megatron_loads_what_is_written_and_computes_what_transformers_does"
_PIPELINES = "api/test_pipelines.py"
CLAIMS = (
    Claim("native", BOTH, "`verify`, whose partition is its own; merged and resharded, byte for byte",
          f"{_PIPELINES}::test_what_is_split_is_proved_and_merged", tp=(1, 2), pp=(2,)),
    Claim("native", BOTH, "the same, experts whole",
          f"{_PIPELINES}::test_whole_experts_are_proved_and_merged", tp=(2,), pp=(1, 2), ep=(2,)),
    Claim("native", WRITTEN, "`verify`, experts dealt to groups of ranks and cut within them",
          "api/test_experts.py::test_it_is_proved", tp=(4, 6), ep=(2, 3)),
    Claim("native", BOTH, "the same, quantised; merged and resharded",
          "api/test_experts.py::test_quantised_experts_are_cut_where_blocks_end", tp=(2, 4), ep=(2,)),
    Claim("native", WRITTEN, "torch's reader of safetensors",
          "formats/test_native.py::test_torch_reads_a_set_of_rectangles_with_its_own_reader", tp=(1, 2, 4)),
    Claim("vllm", BOTH, _VLLM, "engines/check_vllm.py::test_ours_is_what_vllm_holds", tp=(2, 4)),
    Claim("vllm", BOTH, "the same, with a tower",
          "engines/check_vllm.py::test_ours_is_what_vllm_holds_of_a_model_and_its_tower", tp=(2, 4)),
    Claim("vllm", BOTH, "the same, of the newest models",
          "engines/check_vllm.py::test_ours_is_what_vllm_holds_of_the_newest_models", tp=(2, 4)),
    Claim("vllm", BOTH, "the same, of models of other tasks than to predict tokens",
          "engines/check_vllm.py::test_ours_is_what_vllm_holds_of_a_model_of_another_task", tp=(2, 4)),
    Claim("vllm", BOTH, "the same, quantised",
          "engines/check_vllm_quantised.py::test_ours_loads_as_what_vllm_holds", tp=(2, 4)),
    Claim("vllm", BOTH, "the same, in stages",
          "engines/check_vllm.py::test_ours_is_what_vllm_holds_on_each_stage", tp=(1, 2), pp=(2,)),
    Claim("vllm", BOTH, "the same, experts whole",
          "engines/check_vllm.py::test_ours_is_what_vllm_holds_of_whole_experts", tp=(2, 4), pp=(1, 2), as_tp=True),
    Claim("vllm", BOTH, "the same, experts whole, quantised",
          "engines/check_vllm_quantised.py::test_ours_is_what_vllm_holds_of_whole_experts", tp=(2,), as_tp=True),
    Claim("vllm", WRITTEN, "vLLM 0.32's engine on a CPU, in two stages: tokens and logprobs",
          "engines/check_vllm.py::test_tokens_of_the_engine_started_in_two_stages", tp=(1,), pp=(2,)),
    Claim("vllm", WRITTEN, "vLLM 0.32's engine on a CPU: tokens and logprobs",
          "engines/check_vllm.py::test_tokens_of_the_started_engine", tp=(2,)),
    Claim("vllm", BOTH, "slices made by hand",
          "formats/test_sharded_state.py::test_each_rank_is_what_slices_made_by_hand_give", tp=(2, 4)),
    Claim("vllm", BOTH, "`verify`; merged and resharded, in stages",
          f"{_PIPELINES}::test_vllms_files_of_stages", tp=(1, 2), pp=(2,)),
    Claim("vllm-speculator", BOTH, "vLLM 0.32: the draft model that its classes make of the source",
          "engines/check_vllm.py::test_the_speculator_is_the_draft_model_that_vllm_holds", tp=(2, 4)),
    Claim("vllm-speculator", BOTH, "resharded, tensor by tensor",
          "formats/test_speculator.py::test_resharding_gives_what_a_split_gives", tp=(2, 4)),
    Claim("sglang", WRITTEN, "the files for vLLM, without scales; SGLang was not run",
          "formats/test_sharded_state.py::test_sglang_is_vllm_without_scales", tp=(2,)),
    Claim("meta", BOTH, "torch.load; slices made by hand",
          "formats/test_meta.py::test_torch_reads_what_is_written", tp=(1, 2)),
    Claim("meta", READ, "files as Meta publishes them: merged, and the logits of transformers",
          "formats/test_meta.py::test_a_published_pair_is_merged_and_gives_the_same_logits", tp=(2,)),
    Claim("deepseek", BOTH, "slices made by hand, experts whole as its convert.py deals them; its code was not run",
          "formats/test_deepseek.py::test_the_ranks_are_what_narrowing_gives", tp=(2, 4)),
    Claim("dcp", WRITTEN, "torch's reader", "formats/test_dcp.py::test_torch_reads_every_bit", tp=(1, 4)),
    Claim("dcp", BOTH, "resharded, byte for byte", "formats/test_dcp.py::test_reshard_from_and_to", tp=(2, 4)),
    Claim("dcp-hf", WRITTEN, "torch's reader", "formats/test_dcp.py::test_torch_reads_every_bit", tp=(1, 4)),
    Claim("dcp-hf", BOTH, "resharded, byte for byte", "formats/test_dcp.py::test_reshard_from_and_to", tp=(2, 4)),
    Claim("megatron", WRITTEN, f"{_MEGATRON} loads what was split for tp 2, at these sizes",
          _LOADED, tp=(1, 2), pp=(2, 3), ep=(2,)),
    Claim("megatron", WRITTEN, f"{_MEGATRON}'s forward pass: logits of transformers",
          _LOADED, tp=(1,)),
    Claim("megatron", BOTH, "merged bit for bit, with tpshard's manifest and without it",
          "formats/test_megatron.py::test_it_comes_back_by_the_manifest_and_without_it", tp=(2,)),
    Claim("megatron", WRITTEN, "torch's reader; slices made by hand",
          "formats/test_megatron.py::test_torch_reads_megatrons_global_tensors", tp=(1, 2, 4)),
    Claim("megatron", READ, f"{_MEGATRON} saved them: merged bit for bit",
          "megatron/check_megatron.py::test_what_megatron_saved_is_merged", tp=(2,), pp=(3,), ep=(2,)),
    Claim("megatron", READ, f"{_MEGATRON} saved them once: merged bit for bit",
          "inputs/test_from_megatron.py::test_the_model_is_the_one_that_megatron_was_given", tp=(2,), pp=(2,), ep=(2,)),
    Claim("megatron-legacy", WRITTEN, f"{_MEGATRON} loads them strictly, at these sizes",
          _LOADED, tp=(1, 2, 4), pp=(2, 3), ep=(2,)),
    Claim("megatron-legacy", BOTH, "merged bit for bit, with tpshard's manifest and without it",
          "formats/test_megatron_ranks.py::test_it_comes_back_by_the_manifest_and_without_it",
          tp=(2,), pp=(2,), ep=(2,)),
    Claim("megatron-legacy", WRITTEN, "slices made by hand",
          "formats/test_megatron_ranks.py::test_each_rank_has_what_slices_of_the_source_make",
          tp=(1, 2, 4), pp=(1, 2, 4)),
    Claim("megatron-legacy", READ, f"{_MEGATRON} saved them: merged bit for bit",
          "megatron/check_megatron.py::test_what_megatron_saved_is_merged", tp=(2,), pp=(3,), ep=(2,)),
    Claim("megatron-legacy", READ, "slices made by hand, virtual stages too",
          "inputs/test_megatron_legacy.py::test_ranks_stages_and_virtual_stages", tp=(1, 2, 4), pp=(1, 2, 4)),
    Claim("hf", WRITTEN, "transformers' logits",
          "formats/test_hf.py::test_a_checkpoint_in_files_of_another_size", tp=(1,)),
    Claim("hf", READ, "it is what every other row splits, and what it is merged into",
          f"{_PIPELINES}::test_what_is_split_is_proved_and_merged"),
)  # fmt: skip
"""Another format, or another mesh of one, is another row. A format that has stages or whole experts needs one each."""


@dataclass(frozen=True)
class Source:
    """A test file: what is defined in it at module level, and the data that it imports from other test files."""

    definitions: Mapping[str, ast.stmt]
    data: Mapping[str, Path]


@cache
def source_of(path: Path) -> Source:
    """Read a test file without running it."""
    definitions: dict[str, ast.stmt] = {}
    data: dict[str, Path] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            definitions[node.name] = _without_text(node)
        elif isinstance(node, ast.Assign):
            definitions |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
            file = TESTS.joinpath(*str(node.module).split(".")[1:]).with_suffix(".py")
            data |= {each.asname or each.name: file for each in node.names if each.name.isupper()}
    return Source(definitions, data)


def _without_text(function: ast.FunctionDef) -> ast.FunctionDef:
    """A function without its docstring, which may speak of meshes that it does not run."""
    if ast.get_docstring(function, clean=False) is not None:
        function.body = function.body[1:] or [ast.Pass()]
    return function


def text_of(claim: Claim) -> str:
    """The test's code, and what it uses of its file: helpers, data, marks. No comment and no docstring."""
    texts: dict[tuple[Path, str], str] = {}
    left = [(claim.file, claim.name)]
    while left:
        path, name = left.pop()
        if (path, name) in texts:
            continue
        source = source_of(path)
        if name in source.definitions:
            node = source.definitions[name]
            texts[path, name] = ast.unparse(node)
            left += [(path, each.id) for each in ast.walk(node) if isinstance(each, ast.Name)]
        elif name in source.data and source.data[name].exists():
            left.append((source.data[name], name))
    return "\n".join(texts.values())


def sizes(text: str) -> dict[str, set[int]]:
    """The sizes of tp, pp and ep that a test's code runs: options, keywords, parameters and loops, names of cases."""
    found: dict[str, set[int]] = {axis: set() for axis in AXES}
    for pattern in (r"--(tp|pp|ep)\W{1,4}(\d+)", r"\b(tp|pp|ep)=(\d+)", r"-(tp|pp|ep)(\d+)'"):
        for axis, number in re.findall(pattern, text):
            found[axis].add(int(number))
    for axis, numbers in re.findall(r"for (tp|pp|ep) in \(([\d, ]+)\)", text):
        found[axis].update(map(int, re.findall(r"\d+", numbers)))
    made = r"(?<![\w.])(?:tpshard\.)?(?:split|reshard)\([^,()]+(?:\([^()]*\))?, (\d+)"
    for call in (made, r"publish\(\w+, [^,()]+, (\d+)"):
        found["tp"].update(map(int, re.findall(call, text)))
    for axis, numbers in _parameters(text):
        found[axis] |= numbers
    if "ep=tp" in text:
        found["ep"] |= found["tp"]
    return found


def _parameters(text: str) -> Iterator[tuple[str, set[int]]]:
    """What `pytest.mark.parametrize` gives each axis, as far as it is written out."""
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.Call) and ast.unparse(node.func).endswith("parametrize")):
            continue
        names = ast.literal_eval(node.args[0])
        names = [names] if isinstance(names, str) else list(names)
        numbers: dict[str, set[int]] = {axis: set() for axis in AXES}
        for row in ast.walk(node.args[1]):
            if len(names) == 1 and isinstance(row, ast.Constant):
                values: list[ast.expr] = [row]
            elif isinstance(row, ast.Tuple) and len(row.elts) == len(names):
                values = row.elts
            else:
                continue
            for name, value in zip(names, values, strict=True):
                if name in AXES and isinstance(value, ast.Constant) and isinstance(value.value, int):
                    numbers[name].add(value.value)
        yield from numbers.items()


def uncovered(claim: Claim) -> list[str]:
    """What a claim says that its test does not: nothing where it is right."""
    if not claim.file.exists() or claim.name not in source_of(claim.file).definitions or claim.name[:5] != "test_":
        return [f"{claim.test} is no test"]
    if not (claim.file.name.startswith("test_") or f"tests/{claim.test.partition('::')[0]}" in _makefile()):
        return [f"nothing runs {claim.file.name}"]
    text = text_of(claim)
    found = sizes(text)
    wrong = [
        f"{claim.test} does not run {axis} {number}"
        for axis in AXES
        for number in getattr(claim, axis)
        if number not in found[axis] and number != 1
    ]
    for way, verbs in _VERBS.items():
        if way in claim.way and not re.search(verbs, text):
            wrong.append(f"{claim.test} {way} nothing")
    if claim.as_tp and not set(claim.tp) <= found["ep"]:
        wrong.append(f"{claim.test} does not run ep as tp")
    word = claim.format.removeprefix("megatron-")
    if claim.format not in ("native", "hf") and word not in f"{claim.file.name} {text}":
        wrong.append(f"{claim.test} does not say {word}")
    return wrong


@cache
def _makefile() -> str:
    return (TESTS.parent / "Makefile").read_text()


def _cell(numbers: Collection[int]) -> str:
    return ", ".join(map(str, numbers)) or "–"


def table() -> str:
    """The table as the page has it: the claims by format, in the order of the formats."""
    lines = ["| format | | tp | pp | ep | judged by | test |", "|---|---|---|---|---|---|---|"]
    order = list(dict.fromkeys(claim.format for claim in CLAIMS))
    for claim in chain.from_iterable([each for each in CLAIMS if each.format == name] for name in order):
        ep = "as tp" if claim.as_tp else _cell(claim.ep)
        cells = [f"`{claim.format}`", claim.way, _cell(claim.tp), _cell(claim.pp), ep, claim.by]
        lines.append(f"| {' | '.join(cells)} | `{claim.name}`, `{claim.run}` |")
    return "\n".join(lines) + "\n"


def written(page: str) -> str:
    """The page with the table in its place."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, "the page has no place for the table"
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
