"""`split --dtype`: infinities are refused, zeros are told, and what is float32 on purpose stays so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.command import fails, llama, llama_tensors, succeeds
from tests.helpers.toys import Tensor

VOCAB = 128  # vLLM pads to 64: with fewer the last rank would have nothing but padding
DOWN = "model.layers.0.mlp.down_proj.weight"
UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


def plain(name: str, shape: tuple[int, ...], dtype: str = "BF16", **places: float) -> Tensor:
    """Ones, or in the first places what is given, as bfloat16 or float32."""
    values = np.ones(shape, np.float32)
    for i, value in enumerate(places.values()):
        values.flat[i] = value
    bits = values.view(np.uint32) >> 16
    return Tensor(dtype, shape, values.tobytes() if dtype == "F32" else bits.astype(np.uint16).tobytes())


def made(path: Path, **changed: Tensor) -> Path:
    ones = {name: plain(name, tensor.shape) for name, tensor in llama_tensors(vocab_size=VOCAB).items()}
    return llama(
        path, vocab_size=VOCAB, tensors=ones | {name.replace("__", "."): tensor for name, tensor in changed.items()}
    )


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def shape_of(name: str) -> tuple[int, ...]:
    return llama_tensors()[name].shape


@pytest.mark.parametrize("format", ["native", "hf"])
def test_what_would_become_infinite_is_refused(format: str) -> None:
    model = made(Path("model"), **{DOWN: plain(DOWN, shape_of(DOWN), a=1.0, b=1e5)})
    asked = ["split", model, "--tp", 1, "--format", format, "--dtype", "float16", "-o", "out", "--no-fsync"]
    error = fails(4, *asked)
    assert (error["tensor"], error["expected"]) == (DOWN, "at most 65504") and "--allow-overflow" in error["hint"]
    succeeds(*asked, "--allow-overflow")  # nothing that the refused run wrote is in its way
    if format == "native":
        succeeds("check", "out", "--source", model)


def test_infinities_of_the_source_are_its_own() -> None:
    model = made(Path("model"), **{DOWN: plain(DOWN, shape_of(DOWN), a=float("inf"), b=float("nan"))})
    assert not succeeds("split", model, "--tp", 1, "--dtype", "float16", "-o", "out", "--json").json["warnings"]


def test_what_becomes_zero_is_told_with_its_tensor() -> None:
    tiny = np.full(shape_of(UP), 1e-9, np.float32)
    gone = Tensor("BF16", shape_of(UP), (tiny.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    model = made(Path("model"), **{UP: gone, DOWN: plain(DOWN, shape_of(DOWN), a=1e-9, b=0.0)})
    warnings = succeeds("split", model, "--tp", 2, "--dtype", "float16", "-o", "out", "--json").json["warnings"]
    count = int(np.prod(shape_of(UP)))
    small = "became zero in float16: they are too small for it"
    assert warnings == [f"all {count:,} values of {UP} {small}", f"1 of {count - 1:,} values of {DOWN} {small}"]


@pytest.mark.parametrize("format", ["native", "vllm", "dcp"])
def test_what_is_float32_on_purpose_stays_so(format: str) -> None:
    """A norm among bfloat16 does, a projection does not; --cast-all casts both; merge and reshard keep what is made."""
    purpose = {NORM: plain(NORM, shape_of(NORM), "F32", a=1 / 3), UP: plain(UP, shape_of(UP), "F32", a=1 / 3)}
    model = made(Path("model"), **purpose)
    asked = ["split", model, "--tp", 2, "--format", format, "--dtype", "float16", "--no-fsync", "--json"]
    kept = succeeds(*asked, "-o", "kept").json["warnings"]
    assert kept == [f"1 tensor that is float32 on purpose stays so, as {NORM}; --cast-all casts everything"]
    assert not succeeds(*asked, "-o", "cast", "--cast-all").json["warnings"]
    for out, dtype in (("kept", "F32"), ("cast", "F16")):
        succeeds("check", out, "--source", model)
        succeeds("verify", out, "--source", model, "--tier", "bytes,weights")
        succeeds("merge", out, "-o", f"{out}-merged", "--no-fsync")
        rows = succeeds("inspect", f"{out}-merged", "--json").json["tensors"]
        found = {row["name"]: row["dtype"] for row in rows}
        assert (found[NORM], found[UP]) == (dtype, "F16")
        succeeds("reshard", out, "--tp", 1, "-o", f"{out}-1", "--no-fsync")
        succeeds("split", model, "--tp", 1, "--dtype", "float16", "-o", f"{out}-direct", "--no-fsync",
                 *(["--cast-all"] if out == "cast" else []))  # fmt: skip
        manifests = [json.loads(Path(f"{out}-{end}", "tpshard.json").read_text()) for end in ("1", "direct")]
        assert manifests[0]["set"] == manifests[1]["set"]


def test_a_whole_float32_checkpoint_is_cast() -> None:
    model = llama(Path("model"), tensors={n: plain(n, t.shape, "F32") for n, t in llama_tensors().items()})
    plan = succeeds("plan", model, "--tp", 2, "--dtype", "bfloat16", "--json").json
    assert {row["dtype"] for row in plan["tensors"]} == {"BF16"} and not plan["warnings"]


def test_options_of_casts_need_one() -> None:
    model = made(Path("model"))
    for option in ("--cast-all", "--allow-overflow"):
        assert "--dtype" in fails(2, "split", model, "--tp", 2, option)["expected"]
