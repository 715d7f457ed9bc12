"""Meta's files as input: a published directory of `consolidated.NN.pth` and `params.json`, seen as a shard set.

Nothing is inverted: the model that params.json describes is laid out as if it were to be written, and the files must be
just that.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpshard.errors import CorruptError
from tpshard.formats.meta import ffn_size
from tpshard.formats.plan import plan_split
from tpshard.formats.split import Options
from tpshard.inputs.checkpoint import pickles_refused
from tpshard.inputs.shard_set import ShardSet, beside
from tpshard.planning.layout import LogicalTensor
from tpshard.planning.model import Model
from tpshard.rules.architecture import builtin
from tpshard.rules.classify import classify
from tpshard.storage.local import load_json, read_bytes, safe_path
from tpshard.storage.names import META_PARAMS
from tpshard.storage.safetensors import TensorInfo
from tpshard.storage.source import RankFile

_FILE = re.compile(r"consolidated\.(\d{1,3})\.pth")
"""Published with two digits; some copies have one."""
_NEEDED = ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps")


def open_meta(directory: Path, allow_pickle: bool) -> ShardSet:
    """Open a published directory. UnsafeError without `allow_pickle`, CorruptError when files and params disagree."""
    if not allow_pickle:
        raise pickles_refused(directory)
    from tpshard.storage.torch_pickle import read_pickle

    names = sorted(entry.name for entry in directory.iterdir())
    path = safe_path(directory, META_PARAMS)
    params = load_json(read_bytes(path), path)
    if not isinstance(params, dict) or (missing := [key for key in _NEEDED if key not in params]):
        lacking = ", ".join(missing) if isinstance(params, dict) else "everything"
        raise CorruptError("params.json lacks fields", path=path, expected=", ".join(_NEEDED), found=f"no {lacking}")
    files: dict[int, tuple[RankFile]] = {}
    for name in names:
        if number := _FILE.fullmatch(name):
            if (rank := int(number[1])) in files:
                raise CorruptError(f"two files of rank {rank}", path=directory / name, found=files[rank][0].path.name)
            header, _ = read_pickle(safe_path(directory, name), name)
            tensors = tuple(info for info in header.tensors if info.name != "rope.freqs")
            files[rank] = (RankFile(directory / name, (directory / name).stat().st_size, tensors),)
    if not files:
        found = next(name for name in names if name.startswith("consolidated."))
        raise CorruptError("no file of a rank", path=directory, expected="consolidated.00.pth", found=found)
    held = {info.name: info for info in files[min(files)][0].tensors}
    tp = max(_width(held, params), max(files) + 1)
    if absent := sorted(set(range(tp)) - set(files)):
        missing_file, some = f"consolidated.{absent[0]:02}.pth is missing", f"{len(files)} of them"
        expected = f"{tp} files, consolidated.00.pth to consolidated.{tp - 1:02}.pth"
        hint = "copy or download the missing files again"
        raise CorruptError(missing_file, path=directory, expected=expected, found=some, hint=hint)
    config, generation = _config(params, held, tp, path)
    model = _model(directory, config, held)
    split = plan_split(model, Options(tp=tp, format="meta", engine_version=generation))
    for rank, (file,) in files.items():
        _check(rank, file, {stored.name: stored for stored in split.layout[rank]})
    records = {
        rank: {"parts": [{"file": file.path.name, "size": file.size, "sha256": None}]}
        for rank, (file,) in files.items()
    }
    small = {"config.json": (json.dumps(config, indent=2) + "\n").encode()}
    manifest = json.loads(split.manifest)
    # A config.json beside them is somebody's: the one that params.json gives is sure to be of these files.
    ours = {META_PARAMS, *small, *(file.path.name for (file,) in files.values())}
    return ShardSet(directory, manifest, split, dict(files), records, *beside(directory, ours), small)


def _width(held: Mapping[str, TensorInfo], params: Mapping[str, Any]) -> int:
    """For how many ranks the files were cut, as the q projection's rows say; 1 where they say nothing."""
    query, width = held.get("layers.0.attention.wq.weight"), params["dim"]
    rows = query.shape[0] if query and query.shape else 0
    return width // rows if type(width) is int and rows and width % rows == 0 else 1


def _config(
    params: Mapping[str, Any], held: Mapping[str, TensorInfo], tp: int, path: Path
) -> tuple[dict[str, Any], str]:
    """config.json as Hugging Face has it, and the generation of Llama that the embedding's cut shows."""
    embedding, head = held.get("tok_embeddings.weight"), held.get("output.weight")
    if embedding is None or head is None:
        raise CorruptError("no embedding or no head", path=path, expected="tok_embeddings.weight and output.weight")
    vocab, dim = head.shape[0] * tp, params["dim"]
    generation = "3" if embedding.shape == (vocab // tp, dim) and (tp > 1 or vocab >= 100_000) else "2"
    ffn = ffn_size(dim, params["multiple_of"], params.get("ffn_dim_multiplier"))
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": dim,
        "intermediate_size": ffn,
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": params["norm_eps"],
        "rope_theta": params.get("rope_theta", 10000.0),
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "torch_dtype": {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}.get(head.dtype),
        "max_position_embeddings": 4096 if generation == "2" else 8192,
        "bos_token_id": 1 if generation == "2" else 128000,
        "eos_token_id": 2 if generation == "2" else 128001,
    }
    if params.get("use_scaled_rope"):
        config["max_position_embeddings"] = 131072
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": float(params.get("rope_scaling_factor", 8)),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    return config, generation


def _model(directory: Path, config: Mapping[str, Any], held: Mapping[str, TensorInfo]) -> Model:
    """The LLaMA that a config describes, classified by the same rules as a checkpoint."""
    hidden, ffn, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    dtype = held["output.weight"].dtype
    layer_shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "mlp.down_proj": (hidden, ffn),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "post_attention_layernorm": (hidden,),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (kv, hidden),
    }
    layers = range(config["num_hidden_layers"])
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (vocab, hidden)}
    shapes |= {f"model.layers.{layer}.{name}": shape for layer in layers for name, shape in layer_shapes.items()}
    shapes |= {"model.norm": (hidden,), "lm_head": (vocab, hidden)}
    infos = [TensorInfo(f"{name}.weight", dtype, shape, "", 0, 0) for name, shape in shapes.items()]
    architecture = builtin("llama")
    classified = classify(architecture, config, infos)
    return Model(
        tensors=tuple(LogicalTensor(info.name, dtype, info.shape, classified.cuts[info.name]) for info in infos),
        axes=classified.axes,
        tied=classified.tied,
        file_of={info.name: "model.safetensors" for info in infos},
        source={"name": directory.resolve().name, "repo_id": None, "revision": None, "files": []},
        architecture={"model_type": "llama", "rules": architecture.name, "rules_sha256": architecture.digest},
        config=config,
    )


def _check(rank: int, file: RankFile, expected: Mapping[str, Any]) -> None:
    found = {info.name: info for info in file.tensors}
    for name in sorted(expected.keys() | found.keys()):
        stored, info = expected.get(name), found.get(name)
        if stored is None or info is None:
            what = "is not there" if info is None else "is not one of a LLaMA that params.json describes"
            raise CorruptError(f"rank {rank}: {name} {what}", path=file.path, tensor=name)
        if (info.dtype, info.shape) != (stored.dtype, stored.shape):
            said, held = f"{stored.dtype} {list(stored.shape)}", f"{info.dtype} {list(info.shape)}"
            what = f"rank {rank}: {name} contradicts params.json"
            raise CorruptError(what, path=file.path, tensor=name, expected=said, found=held)
