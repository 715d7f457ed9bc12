"""The command line in this process, and what every error of it must look like; a LLaMA of a few hundred numbers."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.schemas import conforms, name_of
from tests.helpers.toys import Tensor, random_tensor, write_checkpoint
from tpshard.cli.main import main

CODES = {
    1: "different", 2: "usage", 3: "corrupt", 4: "unsupported", 5: "unsafe", 6: "io", 7: "hub", 9: "target",
    70: "internal", 130: "interrupted",
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 10, "torch_dtype": "float32",
}  # fmt: skip
"""At tp 4 the KV heads are replicated and the vocab is padded; tp 3 and 8 would cut a unit."""


@dataclass(frozen=True)
class Result:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object that stdout holds, and nothing else; it is what its schema says."""
        assert self.out.count("\n") == 1 and self.out.endswith("}\n"), self.out
        found = json.loads(self.out)
        assert isinstance(found, dict) and "schema_version" in found
        conforms(found, name_of(found))
        return found


def tpshard(*arguments: object) -> Result:
    """Run `tpshard` with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
            code: object = None
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int), "main must exit"
    return Result(code, out.getvalue(), err.getvalue())


def succeeds(*arguments: object) -> Result:
    """Run a command that must end with 0."""
    result = tpshard(*arguments)
    assert result.code == 0, result.err
    return result


def fails(code: int, *arguments: object) -> dict[str, Any]:
    """Run a command that must fail with `code`, as text and as JSON, and write nothing here; the error object.

    Here is a directory of the test's own: others write into the project's at the same time.
    """
    assert not Path("pyproject.toml").exists(), "chdir to tmp_path first"
    before = tree(Path())
    text = tpshard(*arguments)
    assert text.code == code, text.err
    lines = text.err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint: "), text.err
    assert text.out == ""
    result = tpshard(*arguments, "--json")
    assert (result.code, result.err) == (code, text.err)
    assert set(result.json) == {"schema_version", "error"}
    error: dict[str, Any] = result.json["error"]
    assert list(error) == ["code", "message", "path", "tensor", "expected", "found", "hint"]
    assert error["code"] == CODES[code]
    assert all(value is None or (isinstance(value, str) and value) for value in error.values()), error
    assert error["message"] and error["hint"] and "\n" not in error["message"]
    assert error["message"] in lines[0] and error["hint"] == lines[1].removeprefix("hint: ")
    assert all(error[key] in lines[0] for key in ("path", "tensor", "expected", "found") if error[key])
    assert tree(Path()) == before
    return error


def tree(directory: Path) -> set[str]:
    """Every file and directory below a directory."""
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}


def llama_tensors(seed: int = 0, dtype: str = "F32", **config: Any) -> dict[str, Tensor]:
    """The tensors of `LLAMA`, or of it with other values, in the order of their names."""
    given = LLAMA | config
    hidden, ffn, vocab = given["hidden_size"], given["intermediate_size"], given["vocab_size"]
    kv = hidden // given["num_attention_heads"] * given["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (vocab, hidden), "model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)
    }  # fmt: skip
    for layer in range(given["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
            "mlp.down_proj": (hidden, ffn), "mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden),
            "self_attn.k_proj": (kv, hidden), "self_attn.o_proj": (hidden, hidden),
            "self_attn.q_proj": (hidden, hidden), "self_attn.v_proj": (kv, hidden),
        }.items():  # fmt: skip
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    rng = np.random.default_rng(seed)
    return {name: random_tensor(rng, dtype, shapes[name]) for name in sorted(shapes)}


def llama(
    path: Path, *, seed: int = 0, parts: int = 1, tensors: Mapping[str, Tensor] | None = None, **config: Any
) -> Path:
    """Write the checkpoint, in `parts` files; `tensors` are put in or replaced."""
    all_tensors = llama_tensors(seed, **config) | dict(tensors or {})
    names = list(all_tensors)
    size = -(-len(names) // parts)
    files = [names[i : i + size] for i in range(0, len(names), size)]
    return write_checkpoint(path, LLAMA | config, all_tensors, files)
