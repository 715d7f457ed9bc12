"""Meta's files against torch: written ones are read by torch.load, read ones are made with torch.save and slices."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.checkpoints import make
from tests.helpers.command import fails, llama, succeeds
from tpshard.formats.meta import _ffn, ffn_size
from tpshard.formats.torch_archive import archive_file
from tpshard.planning.layout import StoredTensor

NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
DIM = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("meta") / "llama"
    make("llama-gqa", path, vocab_size=256)
    return path


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config_of(model: Path) -> dict[str, int]:
    loaded: dict[str, int] = json.loads((model / "config.json").read_text())
    return loaded


def published(model: Path, tp: int, generation: str) -> list[dict[str, Tensor]]:
    """What Meta would have published of a LLaMA for `tp` ranks, by torch's slices alone."""
    config = config_of(model)
    ranks: list[dict[str, Tensor]] = [{} for _ in range(tp)]
    for name, tensor in load_file(model / "model.safetensors").items():
        bare = name.removeprefix("model.").removesuffix(".weight")
        layer, _, module = bare.removeprefix("layers.").partition(".")
        new = {"embed_tokens": "tok_embeddings", "norm": "norm", "lm_head": "output"}.get(bare)
        new = new or f"layers.{layer}.{NAMES[module]}"
        last = new.rpartition(".")[2]
        if last in ("wq", "wk"):
            heads = config["num_attention_heads" if last == "wq" else "num_key_value_heads"]
            rows, width = tensor.shape
            tensor = tensor.view(heads, 2, rows // heads // 2, width).transpose(1, 2).reshape(rows, width)
        dim = (0 if generation == "3" else 1) if new == "tok_embeddings" else DIM.get(last)
        for rank, share in enumerate([tensor] * tp if dim is None else tensor.chunk(tp, dim)):
            ranks[rank][f"{new}.weight"] = share.contiguous()
    return ranks


def params_of(model: Path) -> dict[str, object]:
    config = config_of(model)
    dim, ffn = config["hidden_size"], config["intermediate_size"]
    multiplier = (ffn + 0.5) / int(8 * dim / 3)
    assert ffn_size(dim, 1, multiplier) == ffn
    return {
        "dim": dim,
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"],
        "multiple_of": 1,
        "ffn_dim_multiplier": multiplier,
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": -1,
    }


def publish(model: Path, directory: Path, tp: int, generation: str) -> list[dict[str, Tensor]]:
    directory.mkdir()
    ranks = published(model, tp, generation)
    for rank, tensors in enumerate(ranks):
        extra = {"rope.freqs": torch.ones(4)} if generation != "3" else {}
        torch.save({**tensors, **extra}, directory / f"consolidated.{rank:02}.pth")
    (directory / "params.json").write_text(json.dumps(params_of(model)))
    (directory / "tokenizer.model").write_bytes(b"tokens")
    return ranks


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    same = a.keys() == b.keys()
    return same and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("generation", ["2", "3"])
@pytest.mark.parametrize("tp", [1, 2])
def test_torch_reads_what_is_written(model: Path, tmp_path: Path, tp: int, generation: str) -> None:
    out = tmp_path / "out"
    succeeds("split", model, "--tp", tp, "--format", "meta", "--engine-version", generation, "-o", out)
    for rank, expected in enumerate(published(model, tp, generation)):
        for mmap in (False, True):
            found = torch.load(out / f"consolidated.{rank:02}.pth", weights_only=True, mmap=mmap)
            assert equal(found, expected)
    said = json.loads((out / "params.json").read_text())
    config = config_of(model)
    assert ffn_size(said["dim"], said["multiple_of"], said.get("ffn_dim_multiplier")) == config["intermediate_size"]
    assert (said["n_layers"], said["n_heads"]) == (config["num_hidden_layers"], config["num_attention_heads"])
    succeeds("check", out)
    succeeds("check", out, "--source", model, "--tp", tp)
    succeeds("merge", out, "-o", tmp_path / "merged")
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_any_format_becomes_any_other(model: Path, tmp_path: Path) -> None:
    succeeds("split", model, "--tp", 2, "--format", "meta", "-o", tmp_path / "meta")
    succeeds("split", model, "--tp", 4, "-o", tmp_path / "four")
    succeeds("reshard", tmp_path / "four", "--tp", 2, "--format", "meta", "-o", tmp_path / "again")
    succeeds("reshard", tmp_path / "meta", "--tp", 4, "-o", tmp_path / "native")
    for made, direct in (("again", "meta"), ("native", "four")):
        for path in (tmp_path / direct).iterdir():
            if path.suffix in (".pth", ".safetensors"):
                assert (tmp_path / made / path.name).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize("generation", ["2", "3"])
def test_a_published_pair_is_merged_and_gives_the_same_logits(model: Path, tmp_path: Path, generation: str) -> None:
    from transformers import AutoModelForCausalLM

    publish(model, tmp_path / "published", 2, generation)
    succeeds("merge", tmp_path / "published", "--allow-pickle", "-o", tmp_path / "merged")
    assert equal(load_file(tmp_path / "merged/model.safetensors"), load_file(model / "model.safetensors"))
    assert (tmp_path / "merged/tokenizer.model").read_bytes() == b"tokens"
    tokens = torch.arange(12)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
        for path in (model, tmp_path / "merged")
    ]
    assert torch.equal(*logits)


def test_a_published_pair_is_resharded(model: Path, tmp_path: Path) -> None:
    publish(model, tmp_path / "published", 2, "2")
    out = tmp_path / "out"
    succeeds("reshard", tmp_path / "published", "--tp", 1, "--format", "meta", "--allow-pickle", "-o", out)
    (whole,) = published(model, 1, "2")
    assert equal(torch.load(out / "consolidated.00.pth", weights_only=True), whole)


def test_two_runs_and_any_workers_give_the_same_bytes(model: Path, tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 4)):
        succeeds("split", model, "--tp", 2, "--format", "meta", "-o", tmp_path / name, "--workers", workers)
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()


def test_what_cannot_be_read(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "published"
    publish(model, source, 2, "2")
    assert "--allow-pickle" in str(fails(5, "merge", source, "-o", tmp_path / "out"))
    params = source / "params.json"
    text = params.read_text()
    params.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "multiple_of"}))
    assert "multiple_of" in str(fails(3, "merge", source, "--allow-pickle", "-o", tmp_path / "out"))
    params.write_text(text.replace('"n_kv_heads": 2', '"n_kv_heads": 4'))
    assert "contradicts params.json" in str(fails(3, "merge", source, "--allow-pickle", "-o", tmp_path / "out"))
    params.write_text(text)
    for rank in range(2):
        kept = (source / f"consolidated.{rank:02}.pth").rename(tmp_path / "kept")
        error = fails(3, "merge", source, "--allow-pickle", "-o", tmp_path / "out")
        assert error["message"] == f"consolidated.{rank:02}.pth is missing" and error["found"] == "1 of them"
        kept.rename(source / f"consolidated.{rank:02}.pth")
    assert not (tmp_path / "out").exists()


def test_one_digit_and_a_config_beside(model: Path, tmp_path: Path) -> None:
    """Names with one digit are read; a config.json that lies there is not taken for the model's."""
    source = tmp_path / "published"
    publish(model, source, 2, "2")
    for rank in range(2):
        (source / f"consolidated.{rank:02}.pth").rename(source / f"consolidated.{rank}.pth")
    (source / "config.json").write_text('{"model_type": "llama", "hidden_size": 7}')
    error = fails(2, "plan", source, "--tp", 2)
    assert "Meta" in error["message"] and "tpshard merge" in error["hint"]
    succeeds("merge", source, "--allow-pickle", "-o", tmp_path / "merged")
    assert equal(load_file(tmp_path / "merged/model.safetensors"), load_file(model / "model.safetensors"))
    assert config_of(tmp_path / "merged")["hidden_size"] == config_of(model)["hidden_size"]
    (source / "consolidated.01.pth").write_bytes((source / "consolidated.1.pth").read_bytes())
    assert "two files of rank 1" in fails(3, "merge", source, "--allow-pickle", "-o", tmp_path / "again")["message"]


def test_who_wants_a_hugging_face_checkpoint_says_how_to_make_one(model: Path, tmp_path: Path) -> None:
    source, shards = tmp_path / "published", tmp_path / "set"
    publish(model, source, 2, "2")
    succeeds("split", model, "--tp", 2, "-o", shards)
    verbs: list[tuple[object, ...]] = [(verb, source, "--tp", 2) for verb in ("plan", "split")]
    verbs += [
        ("advise", source, "--gpus", 2, "--gpu-memory", 80),
        ("inspect", source),
        ("check", shards, "--source", source),
    ]
    errors = [fails(2, *verb) for verb in verbs]
    assert all(error == errors[0] for error in errors) and "Meta" in errors[0]["message"]
    merge, reshard = re.findall("`tpshard (.+?)`", errors[0]["hint"])
    succeeds(*merge.replace("OUT", str(tmp_path / "merged")).split())
    assert equal(load_file(tmp_path / "merged/model.safetensors"), load_file(model / "model.safetensors"))
    succeeds(*reshard.replace("--tp N", "--tp 1").split(), "-o", tmp_path / "one")
    succeeds("plan", tmp_path / "merged", "--tp", 2)


def test_a_damaged_archive_and_a_mixed_directory(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    succeeds("split", model, "--tp", 2, "--format", "meta", "-o", out)
    shutil.copytree(out, tmp_path / "damaged")
    archive = tmp_path / "damaged/consolidated.01.pth"
    with zipfile.ZipFile(archive) as opened:
        at = opened.getinfo("consolidated.01/data.pkl").header_offset
    data = bytearray(archive.read_bytes())
    data[at + 100] ^= 1
    archive.write_bytes(data)
    assert "consolidated.01.pth" in str(fails(3, "check", tmp_path / "damaged"))
    succeeds("split", model, "--tp", 2, "-o", tmp_path / "native")
    shutil.copy(tmp_path / "native/rank-00000-of-00002.safetensors", out)
    assert "another format" in str(fails(3, "check", out))


def test_what_the_format_cannot_hold(model: Path, tmp_path: Path) -> None:
    out = ("--format", "meta", "-o", tmp_path / "out")
    assert "tp 1 or 2" in str(fails(4, "split", model, "--tp", 4, *out))
    assert "even shares" in str(fails(2, "split", model, "--tp", 2, "--uneven", *out))
    assert "Llama 9" in str(fails(4, "split", model, "--tp", 2, "--engine-version", "9", *out))
    make("gpt2", tmp_path / "gpt2")
    assert "LLaMA models alone" in str(fails(4, "split", tmp_path / "gpt2", "--tp", 2, *out))


@pytest.mark.parametrize(
    ("dim", "ffn"), [(4096, 11008), (5120, 13824), (8192, 28672), (4096, 14336), (2048, 8192), (64, 77)]
)
def test_params_give_the_width_of_the_mlp(dim: int, ffn: int) -> None:
    """Llama 2 7B, 13B and 70B, 3 8B, 3.2 1B; and a width that no published model has."""
    multiple, multiplier = _ffn(dim, ffn)
    assert ffn_size(dim, multiple, multiplier) == ffn
    assert ffn == 77 or multiplier in (None, 1.3, 1.5)


def test_an_archive_of_more_than_four_gibibytes(tmp_path: Path) -> None:
    """Sizes and offsets that need 64 bits; the file is one large hole."""
    tensors = [StoredTensor("large", "BF16", (1 << 16, 1 << 15), ()), StoredTensor("one", "F32", (2,), ())]
    tensors.insert(1, StoredTensor("larger", "U8", (1 << 32,), ()))
    output = archive_file("consolidated.00.pth", tensors)
    with (tmp_path / output.name).open("wb") as file:
        file.truncate(output.size)
        for offset, data in ((0, output.header), *output.literals, (output.tensors[2].begin, b"\0\0\x80\x3f" * 2)):
            file.seek(offset)
            file.write(data)
    found = torch.load(tmp_path / output.name, weights_only=True, mmap=True)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {t.name: t.shape for t in tensors}
    assert found["one"].tolist() == [1.0, 1.0]


def test_a_config_whose_values_are_of_another_kind_is_damaged(tmp_path: Path) -> None:
    """Of both formats that say a config anew."""
    model = llama(tmp_path / "model", rope_scaling="linear")
    for format in ("meta", "megatron"):
        damaged = {"meta": {}, "megatron": {"rope_theta": "x"}}[format]
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | damaged))
        error = fails(3, "split", model, "--tp", 1, "--format", format, "-o", tmp_path / format)
        assert error["message"] == "a value in config.json is not what its key asks for"
