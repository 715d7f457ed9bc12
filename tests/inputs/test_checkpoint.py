"""Unsharded checkpoints as they are found: every fault is one clear line, and the exit code tells its kind."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tpshard as api
from tests.helpers.command import LLAMA, fails, llama, llama_tensors, succeeds, tpshard
from tests.helpers.toys import contents, read_all, write, write_checkpoint
from tpshard.errors import CorruptError
from tpshard.inputs.checkpoint import open_checkpoint
from tpshard.storage.local import load_json
from tpshard.storage.names import is_megatron, side_files

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4880\n"
HTML = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test works in an empty directory, without a Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path.parent / "hf"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    yield


def edit_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def edit_index(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((model / INDEX).read_text())
    change(index)
    (model / INDEX).write_text(json.dumps(index))


# --- weight files ---


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_of(header: object, data: bytes = b"\0" * 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\0\1", "too short"),
        ((1000).to_bytes(8, "little") + b"{}", "header is longer than the file"),
        ((1 << 40).to_bytes(8, "little") + b"{}", "above the cap"),
        (file_of(b'{"\xff": 1}'), "not UTF-8"),
        (file_of([1]), "not a JSON object"),
        (file_of(b'{"a":' + b"[" * 200_000), ""),
        (file_of(b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}"), "twice"),
        (file_of({"a": entry(offsets=(4, 12))}, b"\0" * 12), "hole"),
        (file_of({"a": entry(), "b": entry(offsets=(4, 12))}, b"\0" * 12), "overlap"),
        (file_of({"a": entry()}, b"\0" * 7), "truncated"),
        (file_of({"a": entry()}, b"\0" * 9), "bytes after the last tensor"),
        (file_of({"a": entry(shape=(3,))}), "contradict"),
        (file_of({"a": entry(shape=(-2,))}), ""),
        (file_of({"a": entry(shape=(2.0,))}), ""),
        (file_of({"a": entry(shape=(2**63, 4, 0), offsets=(0, 0))}, b""), "overflow"),
        (file_of({"a": entry(dtype="F33")}), "unknown dtype"),
        (file_of({"__metadata__": {"format": 1}, "a": entry()}), "not an object of strings"),
        (LFS, "Git-LFS pointer"),
        (HTML, "HTML page"),
    ],
)
def test_damaged_weights(content: bytes, says: str) -> None:
    model = llama(Path("model"))
    (model / "model.safetensors").write_bytes(content)
    error = fails(3, "split", model, "--tp", 2)
    assert error["path"] == "model/model.safetensors" and says in error["message"]
    assert fails(3, "plan", model, "--tp", 2) == error
    assert fails(3, "inspect", model) == error


def test_no_weights_and_weights_of_another_kind() -> None:
    model = llama(Path("model"))
    (model / "model.safetensors").unlink()
    assert fails(2, "split", model, "--tp", 2)["found"] == "no weight file"
    (model / "consolidated.00.pth").write_bytes(b"")
    assert fails(4, "split", model, "--tp", 2)["found"] == "consolidated.00.pth"


@pytest.mark.parametrize("kind", ["directory", "fifo"])
def test_weights_that_are_no_file(kind: str) -> None:
    model = llama(Path("model"))
    (model / "model.safetensors").unlink()
    os.mkfifo(model / "model.safetensors") if kind == "fifo" else (model / "model.safetensors").mkdir()
    assert fails(3, "split", model, "--tp", 2)["expected"] == "a file"


def test_one_file_takes_config_and_tokenizer_from_beside_it() -> None:
    model = llama(Path("model"))
    (model / "tokenizer.json").write_text("{}")
    succeeds("split", model / "model.safetensors", "--tp", 2, "--no-fsync")
    succeeds("split", model, "--tp", 2, "-o", "whole", "--no-fsync")
    assert {p.name: p.read_bytes() for p in Path("model-tp2").iterdir()} == {
        p.name: p.read_bytes() for p in Path("whole").iterdir()
    }
    assert Path("model-tp2/tokenizer.json").exists()


def test_one_file_of_any_name_beside_others() -> None:
    model = llama(Path("model"))
    (model / "model.safetensors").rename(model / "ema.safetensors")
    assert "ema.safetensors" in fails(4, "plan", model, "--tp", 2)["found"]
    assert succeeds("plan", model / "ema.safetensors", "--tp", 2, "--json").json["mesh"]["tp"] == 2


def test_one_part_of_several_is_not_a_model() -> None:
    model = llama(Path("model"), parts=2)
    error = fails(3, "plan", model / "model-00001-of-00002.safetensors", "--tp", 2)
    assert "layers 1 missing" in error["message"]
    assert (error["expected"], error["found"]) == ("layers 0 to 1", "1 layers")


@pytest.mark.parametrize("name", ["config.json", INDEX, "notes.txt"])
def test_a_file_without_weights(name: str) -> None:
    model = llama(Path("model"), parts=2)
    (model / "notes.txt").write_text("hello")
    assert "not a weight file" in fails(2, "plan", model / name, "--tp", 2)["message"]


# --- directories that hold something else ---


@pytest.mark.parametrize(
    ("names", "says", "way_out"),
    [
        (["model-rank-0-part-0.safetensors", "config.json"], "sharded_state of vLLM", "made of"),
        (["global_step10/", "latest", "zero_to_fp32.py", "config.json"], "DeepSpeed", "in that directory"),
        (["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"], "DeepSpeed", "directory above"),
        (["mp_rank_00/", "mp_rank_01/"], "its legacy form", "tpshard merge"),
        (["iter_0000010/", "latest_checkpointed_iteration.txt"], "Megatron checkpoints", "tpshard merge"),
        (["common.pt", ".metadata", "__0_0.distcp", "metadata.json"], "checkpoint of Megatron", "tpshard merge"),
        ([".metadata", "__0_0.distcp", "__1_0.distcp"], "DCP", "dcp_to_torch"),
        (["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"], "an adapter", "merge_and_unload"),
        (["adapter_model.bin"], "an adapter", "merge_and_unload"),
        (["model-Q4_K_M.gguf", "config.json"], "GGUF", "gguf_file"),
        (["blobs/", "refs/", "snapshots/"], "Hub's cache", "owner/name"),
        (["checkpoint-10/", "checkpoint-20/", "runs/"], "training run", "checkpoint-*"),
        (["rank-00000-of-00002.safetensors", "config.json"], "ranks that tpshard wrote", "tpshard.json"),
    ],
)
def test_a_directory_that_holds_something_else(names: list[str], says: str, way_out: str) -> None:
    for name in names:
        Path("model", name).mkdir(parents=True) if name.endswith("/") else write_file(Path("model", name))
    error = fails(4, "split", "model", "--tp", 2)
    assert says in error["message"] and way_out in error["hint"] and error["found"]
    assert fails(4, "plan", "model", "--tp", 2) == error
    if is_megatron(Path("model")):  # which is read: this one cannot be
        assert tpshard("inspect", "model").code in (3, 4)
    else:
        assert error == fails(4, "inspect", "model")
    if "config.json" not in names and "rank-" not in names[0] and not is_megatron(Path("model")):
        assert fails(4, "check", "model")["message"] == error["message"]


def write_file(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")


def test_signs_of_something_else_beside_a_checkpoint_are_no_matter() -> None:
    model = llama(Path("model"), parts=2)
    for name in ("adapter_config.json", "zero_to_fp32.py", "x.gguf"):
        write_file(model / name)
    (model / "global_step10").mkdir()
    succeeds("plan", model, "--tp", 2)


def test_a_directory_without_a_model() -> None:
    Path("model").mkdir()
    error = fails(2, "split", "model", "--tp", 2)
    assert error["found"] == "no weight file" and "config.json" in error["hint"]
    (Path("model") / "model.safetensors").write_bytes(b"")
    assert "no config.json" in fails(3, "split", "model", "--tp", 2)["message"]


@pytest.mark.parametrize(
    ("prefix", "says", "way_out"),
    [
        ("base_model.model.", "PEFT's wrapper", "get_base_model"),
        ("module.", "DistributedDataParallel", "model.module.save_pretrained"),
        ("pretrained_model.", "value head", "model.pretrained_model.save_pretrained"),
        ("_orig_mod.", "torch.compile", "model._orig_mod.save_pretrained"),
        ("module._orig_mod.", "torch.compile", "model._orig_mod.save_pretrained"),
        ("_fsdp_wrapped_module.", "FSDP", "unwrap_model"),
        ("base_model.model.lora", "LoRA inside", "merge_and_unload"),
    ],
)
def test_names_of_a_wrapper(prefix: str, says: str, way_out: str) -> None:
    start = prefix.removesuffix("lora")
    inner = ".base_layer.weight" if start != prefix else ".weight"
    tensors = {start + name.replace("q_proj.weight", f"q_proj{inner}"): t for name, t in llama_tensors().items()}
    model = write_checkpoint(Path("model"), LLAMA, tensors, [list(tensors)])
    error = fails(4, "plan", model, "--tp", 2)
    assert says in error["message"] and way_out in error["hint"] and error["tensor"].startswith(start)


# --- index ---


def test_all_files_without_their_index() -> None:
    model = llama(Path("model"), parts=4)
    succeeds("split", model, "--tp", 2, "-o", "with", "--no-fsync")
    (model / INDEX).unlink()
    result = succeeds("split", model, "--tp", 2, "--no-fsync")
    assert "there is no index: all of model-00001-of-00004.safetensors to model-00004" in result.err
    assert contents(Path("model-tp2")) == contents(Path("with"))
    succeeds("merge", "model-tp2", "-o", "again", "--no-fsync")
    assert read_all(Path("again")) == read_all(model)


@pytest.mark.parametrize("changed", ["00002-of-00004", "00004-of-00004", "00003-of-00005", "00005-of-00004"])
def test_not_all_files_and_no_index(changed: str) -> None:
    model = llama(Path("model"), parts=4)
    (model / INDEX).unlink()
    old = changed if changed.endswith("00004") and changed < "00005" else "00003-of-00004"
    (model / f"model-{old}.safetensors").rename("gone" if old == changed else model / f"model-{changed}.safetensors")
    error = fails(3, "split", model, "--tp", 2)
    assert "missing" in error["message"] and "4 files" in error["expected"] and "model-00001-of" in error["found"]


def test_an_index_that_was_published_wrong() -> None:
    model = llama(Path("model"), parts=4)
    saved = (model / INDEX).read_text()
    for tensor, file in (("lm_head.weight", "model-00001-of-00009"), ("lm_head.bias", "model-00001-of-00004")):
        edit_index(
            model, lambda index, tensor=tensor, file=file: index["weight_map"].update({tensor: f"{file}.safetensors"})
        )
        error = fails(3, "plan", model, "--tp", 2)
        assert "cannot help" in error["hint"] and "remove the index" in error["hint"]
        (model / INDEX).write_text(saved)
    (model / "model-00002-of-00004.safetensors").unlink()
    assert fails(3, "plan", model, "--tp", 2)["hint"] == "download the missing files again"


def test_an_index_with_names_and_sizes_in_another_spelling() -> None:
    model = llama(Path("model"), parts=2)
    plain = succeeds("plan", model, "--tp", 2, "--json").json

    def respell(index: dict[str, Any]) -> None:
        index["weight_map"] = {name: f"./{file}" for name, file in index["weight_map"].items()}
        index["metadata"] = {"total_size": str(sum(len(tensor.data) for tensor in read_all(model).values()))}

    edit_index(model, respell)
    result = succeeds("plan", model, "--tp", 2, "--json")
    assert (result.json, result.err) == (plain, "")


def test_listed_shards_missing() -> None:
    model = llama(Path("model"), parts=4)
    (model / "model-00002-of-00004.safetensors").unlink()
    (model / "model-00004-of-00004.safetensors").unlink()
    error = fails(3, "split", model, "--tp", 2)
    assert "model-00002-of-00004.safetensors" in error["message"] and error["path"] == "model"
    assert (error["expected"], error["found"]) == ("4 files", "2 of them")


def test_index_lists_a_tensor_that_no_shard_has() -> None:
    model = llama(Path("model"), parts=2)
    file = "model-00001-of-00002.safetensors"
    edit_index(model, lambda index: index["weight_map"].update({"model.extra.weight": file}))
    error = fails(3, "plan", model, "--tp", 2)
    assert (error["tensor"], error["expected"], error["found"]) == ("model.extra.weight", f"in {file}", "nowhere")


def test_index_lists_a_tensor_in_another_shard() -> None:
    model = llama(Path("model"), parts=2)
    first, second = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    edit_index(model, lambda index: index["weight_map"].update({"lm_head.weight": second}))
    error = fails(3, "plan", model, "--tp", 2)
    assert (error["tensor"], error["expected"], error["found"]) == ("lm_head.weight", f"in {second}", f"in {first}")


def test_shard_holds_a_tensor_that_the_index_does_not_list() -> None:
    model = llama(Path("model"), parts=2)
    edit_index(model, lambda index: index["weight_map"].pop("lm_head.weight"))
    error = fails(3, "plan", model, "--tp", 2)
    assert error["tensor"] == "lm_head.weight" and "does not list" in error["message"]


def test_tensor_in_two_shards() -> None:
    model = llama(Path("model"), parts=2)
    tensors = read_all(model)
    write(model / "model-00001-of-00002.safetensors", tensors)
    error = fails(3, "plan", model, "--tp", 2)
    assert "in two files" in error["message"] and error["found"].count("of-00002") == 2


@pytest.mark.parametrize(
    "index",
    [
        [],
        {},
        {"weight_map": {}},
        {"weight_map": []},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": None}},
        "x",
        None,
        3,
    ],
)
def test_index_of_another_form(index: object) -> None:
    model = llama(Path("model"), parts=2)
    (model / INDEX).write_text(json.dumps(index))
    assert "weight_map" in fails(3, "plan", model, "--tp", 2)["message"]


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/secret.safetensors", "a/../../b", "..", "C:\\secret", "..\\secret", "\\secret"],
)
def test_index_that_points_outside(name: str) -> None:
    model = llama(Path("model"), parts=2)
    edit_index(model, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    error = fails(5, "split", model, "--tp", 2)
    assert error["path"] == f"model/{INDEX}" and error["found"] == repr(name)
    assert fails(5, "plan", model, "--tp", 2) == error


@pytest.mark.parametrize(
    ("name", "says"),
    [("sub/x.safetensors", "subdirectory"), ("sub\\x", "subdirectory"), ("", "subdirectory"), ("./x", "x is listed")],
)
def test_index_that_names_no_file_beside_it(name: str, says: str) -> None:
    model = llama(Path("model"), parts=2)
    edit_index(model, lambda index: index["weight_map"].update({"lm_head.weight": name}))
    assert says in fails(3, "plan", model, "--tp", 2)["message"]


def test_index_with_a_name_that_steers_the_terminal() -> None:
    model = llama(Path("model"), parts=2)
    edit_index(model, lambda index: index["weight_map"].update({"lm_head.weight": "a\n\x1b[31mred\0"}))
    result = tpshard("plan", model, "--tp", 2)
    assert result.code == 3 and "\x1b" not in result.err and len(result.err.splitlines()) == 2


def test_wrong_total_size_is_a_warning() -> None:
    model = llama(Path("model"), parts=2)
    edit_index(model, lambda index: index["metadata"].update(total_size=1))
    result = succeeds("plan", model, "--tp", 2, "--json")
    assert "total_size 1" in result.err and result.err.startswith("warning: ")
    assert result.json["warnings"] == [result.err.removeprefix("warning: ").strip()]
    assert "total_size" in succeeds("split", model, "--tp", 2, "--no-fsync").err
    assert succeeds("plan", llama(Path("right"), parts=2), "--tp", 2).err == ""


def test_a_single_file_beside_an_index_that_does_not_name_it_is_a_second_set() -> None:
    """Whichever is newer; the file alone can be named, and counts where the files of the index are gone."""
    model = llama(Path("model"), parts=2)
    wanted = llama_tensors(seed=5)
    write(model / "model.safetensors", wanted)
    for verb in ("plan", "split"):
        error = fails(3, verb, model, "--tp", 1)
        assert "two sets of the same weights" in error["message"] and "model/model.safetensors" in error["hint"]
    succeeds("split", model / "model.safetensors", "--tp", 1, "-o", "named", "--no-fsync")
    for part in model.glob("model-0000*"):
        part.unlink()
    succeeds("split", model, "--tp", 1, "-o", "out", "--no-fsync")
    assert read_all(Path("out")) == read_all(Path("named")) == wanted


# --- config ---


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"\xef\xbb\xbf{}", "not valid JSON"),
        (HTML, "not valid JSON"),
        (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"hidden_size": 16, "hidden_size": 32}', "'hidden_size' is written twice"),
        (b'{"a": {"b": 1, "b": 1}}', "'b' is written twice"),
        (b"[]", "not an object"),
        (b"null", "not an object"),
        (b'"llama"', "not an object"),
        (LFS, "Git-LFS pointer"),
    ],
)
def test_damaged_config(text: bytes, says: str) -> None:
    model = llama(Path("model"))
    (model / "config.json").write_bytes(text)
    error = fails(3, "split", model, "--tp", 2)
    assert error["path"] == "model/config.json" and says in error["message"]


@pytest.mark.parametrize(
    ("text", "says"), [(LFS, "Git-LFS pointer"), (HTML, "not valid JSON"), (b"{", "not valid JSON")]
)
def test_damaged_index(text: bytes, says: str) -> None:
    model = llama(Path("model"), parts=2)
    (model / INDEX).write_bytes(text)
    error = fails(3, "split", model, "--tp", 2)
    assert error["path"] == f"model/{INDEX}" and says in error["message"]


def test_no_config() -> None:
    model = llama(Path("model"))
    (model / "config.json").unlink()
    assert "no config.json" in fails(3, "plan", model, "--tp", 2)["message"]
    assert "no config.json" in fails(3, "plan", model / "model.safetensors", "--tp", 2)["message"]


@pytest.mark.parametrize(
    ("change", "tensor"),
    [
        ({"intermediate_size": 16}, "mlp."),
        ({"vocab_size": 11}, ".weight"),
        ({"num_attention_heads": 8}, "self_attn."),
        ({"num_key_value_heads": 1}, "self_attn."),
        ({"num_hidden_layers": 3}, "model.layers.2."),
        ({"num_hidden_layers": 1}, "model.layers.1."),
    ],
)
def test_config_that_contradicts_the_tensors(change: dict[str, int], tensor: str) -> None:
    model = llama(Path("model"))
    edit_config(model, **change)
    error = fails(3, "plan", model, "--tp", 2)
    assert tensor in error["tensor"] and error["expected"] and error["found"]


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
def test_missing_tensors(name: str) -> None:
    tensors = llama_tensors()
    del tensors[name]
    model = write_checkpoint(Path("model"), LLAMA, tensors)
    error = fails(3, "split", model, "--tp", 2)
    assert name.removesuffix(".weight").replace(".1.", ".*.") in error["message"]


def test_a_tensor_without_a_rule() -> None:
    model = llama(Path("model"), tensors={"model.layers.0.extra.weight": llama_tensors()["model.norm.weight"]})
    error = fails(4, "split", model, "--tp", 2)
    assert error["tensor"] == "model.layers.0.extra.weight" and "--rules" in error["hint"]


VALUES: list[object] = [None, "text", "", -1, 0, 3, 1.5, 1e300, True, [], [2], {}, 10**30]


@pytest.mark.parametrize("key", [key for key in LLAMA if key != "torch_dtype"])
def test_any_value_of_any_config_key_is_judged(key: str) -> None:
    model = llama(Path("model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
    assert tpshard("plan", model, "--tp", 2).code in (3, 4)
    for value in VALUES:
        (model / "config.json").write_text(json.dumps(config | {key: value}))
        result = tpshard("plan", model, "--tp", 2)
        assert result.code in (3, 4), (key, value, result.err)
        assert len(result.err.splitlines()) == 2, result.err


# --- unsupported ---


def test_unknown_model_type_names_the_closest() -> None:
    error = fails(4, "plan", llama(Path("model"), model_type="lama"), "--tp", 2)
    assert "lama" in error["message"] and "llama" in error["message"].replace("'lama'", "")
    assert "--rules" in error["hint"]
    far = fails(4, "plan", llama(Path("far"), model_type="unheard-of-xyz"), "--tp", 2)
    assert "closest" not in far["message"]


def test_no_model_type() -> None:
    error = fails(4, "plan", llama(Path("model"), model_type=None), "--tp", 2)
    assert error["path"] == "model/config.json" and "--rules" in error["hint"]


@pytest.mark.parametrize(
    ("tp", "works"), [(3, "1, 2 or 4"), (8, "1, 2 or 4"), (16, "1, 2 or 4"), (99_999, "1, 2 or 4")]
)
def test_a_tp_that_cuts_a_unit(tp: int, works: str) -> None:
    error = fails(4, "split", llama(Path("model")), "--tp", tp)
    assert error["expected"] == f"tp {works}" and error["found"] == f"tp {tp}" and "--uneven" in error["hint"]


@pytest.mark.parametrize("config", [None, {}, False])
def test_an_empty_quantization_config_is_none(config: object) -> None:
    succeeds("plan", llama(Path("model"), quantization_config=config), "--tp", 2)


# --- unsafe ---


def test_code_from_the_repo_is_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(Path("model"), auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "evil.Config"})
    for name in ("modeling_evil.py", "evil.py", "__init__.py", "configuration_llama.py"):
        (model / name).write_text("open('/'.join(__file__.split('/')[:-1]) + '/ran', 'w')\n")
    monkeypatch.syspath_prepend(str(model.absolute()))
    succeeds("split", model, "--tp", 2, "--no-fsync")
    succeeds("check", "model-tp2", "--source", model)
    succeeds("merge", "model-tp2", "--no-fsync")
    assert not list(Path().rglob("ran"))
    assert len(list(Path("model-tp2").glob("*.py"))) == len(list(Path("model-merged").glob("*.py"))) == 4, "copied"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "LICENSE"])
def test_a_symlink_that_leaves_the_model(name: str) -> None:
    model = llama(Path("model"))
    (model / "tokenizer.json").write_text("{}")
    (model / "LICENSE").write_text("do as you please")
    (model / name).rename("elsewhere")
    (model / name).symlink_to("../elsewhere")
    error = fails(5, "split", model, "--tp", 2)
    assert error["path"] == f"model/{name}" and error["found"] == str(Path("elsewhere").resolve())
    assert "--follow-symlinks" in error["hint"]


def test_symlinks_out_of_the_model_that_are_followed_when_asked() -> None:
    model, follow = llama(Path("model"), parts=2), "--follow-symlinks"
    succeeds("split", model, "--tp", 2, "-o", "plain", "--no-fsync")
    Path("store").mkdir()
    for file in list(model.iterdir()):
        file.rename(Path("store", file.name))
        file.symlink_to(f"../store/{file.name}")
    result = succeeds("split", model, "--tp", 2, "--no-fsync", follow)
    assert contents(Path("model-tp2")) == contents(Path("plain"))
    command = shlex.split(result.err.splitlines()[-1].removeprefix("next: tpshard "))
    assert command[-1] == follow and "equal" in succeeds(*command).out
    assert succeeds("inspect", model, follow, "--json").json["kind"] == "checkpoint"
    verify = ("verify", "model-tp2", "--source", model, "--tier", "bytes")
    assert "--follow-symlinks reads it" in tpshard(*verify).err
    assert succeeds(*verify, follow).out.startswith("PASS")


@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_what_a_symlink_leads_to_is_not_even_read(name: str) -> None:
    model = llama(Path("model"), parts=2)
    Path("secret").write_text("root:x:0:0")
    (model / name).unlink()
    (model / name).symlink_to("../secret")
    assert fails(5, "plan", model, "--tp", 2)["path"] == f"model/{name}"


def test_a_symlink_inside_the_model_is_fine() -> None:
    model = llama(Path("model"))
    (model / "model.safetensors").rename(model / "data")
    (model / "model.safetensors").symlink_to("data")
    succeeds("plan", model, "--tp", 2)


@pytest.mark.parametrize("target", ["nothing", "model.safetensors"])
def test_a_symlink_to_nothing_and_to_itself(target: str) -> None:
    model = llama(Path("model"))
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(target)
    assert "not there" in fails(3, "plan", model, "--tp", 2)["message"]


def test_a_model_behind_a_symlink_has_the_name_that_was_given() -> None:
    llama(Path("real"))
    Path("latest").symlink_to("real")
    succeeds("split", "latest", "--tp", 2, "--no-fsync")
    assert json.loads(Path("latest-tp2/tpshard.json").read_text())["source"]["name"] == "latest"


def snapshot(cache: Path, repo: str = "org/tiny", commit: str = "c" * 40, **kinds: bool) -> Path:
    """A model as the Hub's cache keeps it: names in a snapshot are symlinks to blobs named by digest."""
    plain = llama(Path("plain"))
    root = cache / f"models--{repo.replace('/', '--')}"
    (root / "blobs").mkdir(parents=True)
    made = root / "snapshots" / commit
    made.mkdir(parents=True)
    for path in plain.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(root / "blobs" / digest)
        (made / path.name).symlink_to(f"../../blobs/{digest}")
    plain.rmdir()
    return made


@pytest.mark.parametrize("where", ["HF_HOME", "HF_HUB_CACHE", "nowhere"])
def test_a_snapshot_in_a_cache(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "cache"
    made = snapshot(home / "hub")
    if where != "nowhere":
        monkeypatch.setenv(where, str(home if where == "HF_HOME" else home / "hub"))
    checkpoint = open_checkpoint(made)
    assert (checkpoint.name, checkpoint.repo_id, checkpoint.revision) == ("org/tiny", "org/tiny", "c" * 40)
    assert checkpoint.files[0].sha256 == hashlib.sha256((made / "model.safetensors").read_bytes()).hexdigest()
    succeeds("split", made, "--tp", 2, "--no-fsync")
    source = json.loads(Path("tiny-tp2/tpshard.json").read_text())["source"]
    assert (source["repo_id"], source["revision"]) == ("org/tiny", "c" * 40)
    assert source["files"][0]["sha256"] == checkpoint.files[0].sha256


def test_a_symlink_to_a_snapshot_is_that_snapshot(tmp_path: Path) -> None:
    Path("mine").symlink_to(snapshot(tmp_path / "elsewhere"))
    assert open_checkpoint("mine").repo_id == "org/tiny"


def test_a_snapshot_may_use_blobs_and_nothing_else_of_an_unknown_cache(tmp_path: Path) -> None:
    made = snapshot(tmp_path / "elsewhere")
    secret = made.parent.parent / "secret"
    (made / "config.json").resolve().rename(secret)
    (made / "config.json").unlink()
    (made / "config.json").symlink_to("../../secret")
    assert fails(5, "plan", made, "--tp", 2)["found"] == str(secret)


# --- what travels along ---


def test_side_files() -> None:
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
    wanted |= {"vocab.json", "merges.txt", "special_tokens_map.json", "chat_template.jinja", "LICENSE", "NOTICE.txt"}
    others = {"README.md", "modeling_x.py", "tokenizer.py", "model.safetensors", "pytorch_model.bin", ".env", "id_rsa"}
    assert side_files(wanted | others) == sorted(wanted)


@pytest.mark.parametrize("text", ["1", '{"a": 1e5}', '{"a": [true, null]}', '"\\ud800"'])
def test_load_json_reads_json(text: str) -> None:
    assert load_json(text.encode(), "x") == json.loads(text)


def test_load_json_says_where() -> None:
    with pytest.raises(CorruptError) as caught:
        load_json(b'{"a": 1,}', "some/file")
    assert caught.value.path == "some/file" and "line 1" in caught.value.message


def test_revision_is_for_the_hub() -> None:
    assert "--revision" in fails(2, "split", llama(Path("model")), "--tp", 2, "--revision", "main")["message"]


@pytest.mark.parametrize("text", ["/no/such/model", "./model", "no/such/model", "model.safetensors", "a b"])
def test_a_path_that_is_not_there(text: str) -> None:
    for verb in ("plan", "split"):
        error = fails(2, verb, text, "--tp", 2)
        assert "no such file or directory" in error["message"] and "org/name" in error["hint"]


def test_the_api_raises_what_the_command_says() -> None:
    model = llama(Path("model"))
    (model / "model.safetensors").write_bytes(LFS)
    with pytest.raises(CorruptError, match="Git-LFS"):
        api.plan(model, 2)
