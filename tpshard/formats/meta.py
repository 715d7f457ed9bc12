"""Meta's `consolidated.NN.pth` and `params.json`: what llama's own code and many tools around it read.

The number of files is the model-parallel size. q and k have their rows in another rotary order than Hugging Face's; the
embedding is cut along the hidden size up to Llama 2 and along the vocabulary from Llama 3 on, the head always along
the vocabulary. Source: meta-llama/llama and meta-llama/llama-models, their ParallelEmbedding and ColumnParallelLinear.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tpshard.errors import UnsupportedError
from tpshard.formats.base import Format, bare, reads_config
from tpshard.formats.split import Options, RankLayouts, Split
from tpshard.formats.torch_archive import archive_file
from tpshard.planning.axes import Axis, Cut
from tpshard.planning.box import Shape, full
from tpshard.planning.deal import Deal
from tpshard.planning.join import OutputFile
from tpshard.planning.layout import LogicalTensor, Part, StoredTensor, shard
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model
from tpshard.storage.local import Content
from tpshard.storage.names import META_PARAMS

GENERATIONS = ("1", "2", "3")
"""What `--engine-version` takes: the generation of Llama, which decides how the embedding is cut."""
_FILE = re.compile(r"consolidated\.(\d\d)\.pth")
_TOP = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
_LAYER = {
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
_EMBEDDING, _HEAD = "tok_embeddings.weight", "output.weight"
_LARGE_VOCAB = 100_000
"""Llama 3's vocabulary has 128,256 entries, those before it (Code Llama's too) at most 32,016."""
_LLAMA3_SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original": 8192}


class Meta(Format):
    """`consolidated.00.pth`, one file a rank."""

    side_names = frozenset({META_PARAMS})
    container = True
    no_quantised = "params.json has no field for a quantisation"

    def lay(self, model: Model, options: Options) -> RankLayouts:
        """Meta's names, cuts and rotary order; UnsupportedError for what its code cannot hold."""
        generation = _generation(model, options)
        dealt = _deal(model, options)
        axes = dealt.axes
        params(model.config, model)  # refuses a config that params.json cannot say
        reason = "rotary frequencies, which Meta's code computes"
        dropped = {tensor.name: reason for tensor in model.tensors if tensor.cut.kind == "buffer"}
        tensors = [tensor for tensor in model.tensors if tensor.name not in dropped]
        names = [_name(model.full_name(tensor.name), tensor) for tensor in tensors]
        if generation != "3":
            row_cut = Cut("row", 1, ("hidden",))
            tensors = [
                replace(tensor, cut=row_cut) if name == _EMBEDDING else tensor
                for name, tensor in zip(names, tensors, strict=True)
            ]
        rows: list[list[StoredTensor]] = []
        for rank, held in enumerate(shard(tensors, axes, dealt)):
            row = []
            for name, tensor, stored in zip(names, tensors, held, strict=True):
                if name.endswith(("wq.weight", "wk.weight")):
                    axis = axes[tensor.cut.segments[0]]
                    stored = _rotary(stored, tensor, axis, dealt.of(axis.name, rank))
                row.append(stored._replace(name=name))
                if name == _EMBEDDING and _HEAD not in names:
                    row.append(_tied_head(stored, generation))
            rows.append(row)
        return RankLayouts(tuple(map(tuple, rows)), dealt, dropped)

    def file_name(self, rank: int, mesh: Mesh, part: int, parts: int) -> str:
        """Two digits, as Meta's code sorts them."""
        return f"consolidated.{rank:02}.pth"

    def parse_name(self, name: str) -> Mapping[str, int] | None:
        """The rank: there is one file each."""
        found = _FILE.fullmatch(name)
        return {"rank": int(found[1])} if found else None

    def files(self, split: Split, rank: int) -> tuple[OutputFile, ...]:
        """One archive a rank, whatever its size: Meta's code takes one file for one rank."""
        return (archive_file(self.file_name(rank, split.options.mesh, 0, 1), split.layout[rank]),)

    def side_files(self, split: Split, small: Mapping[str, Content]) -> dict[str, Content]:
        """The source's, and params.json."""
        said = params(split.model.config, split.model)
        return {**small, META_PARAMS: (json.dumps(said, indent=2) + "\n").encode()}


def _name(full_name: str, tensor: LogicalTensor) -> str:
    module, _, suffix = full_name.rpartition(".")
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    name = _TOP.get(module) if layer is None else _LAYER.get(layer[2])
    if name is None or suffix != "weight":
        what = f"Meta's layout has no place for {tensor.name}"
        raise UnsupportedError(what, tensor=tensor.name, expected="a LLaMA without biases", hint="use --format native")
    return f"{name}.weight" if layer is None else f"layers.{layer[1]}.{name}.weight"


def _tied_head(embedding: StoredTensor, generation: str) -> StoredTensor:
    """Meta's files always have a head; here it is the embedding once more."""
    if generation != "3":
        raise UnsupportedError(
            "a tied head cannot be said where the embedding is cut along the hidden size", hint="use --engine-version 3"
        )
    return embedding._replace(name=_HEAD)


def _generation(model: Model, options: Options) -> str:
    if options.engine_version is not None:
        if options.engine_version not in GENERATIONS:
            what = f"no Llama {options.engine_version} of Meta's is known"
            hint = "the generation decides how the embedding is cut"
            raise UnsupportedError(what, expected=", ".join(GENERATIONS), found=options.engine_version, hint=hint)
        return options.engine_version
    return "3" if model.axes["vocab"].count >= _LARGE_VOCAB else "2"


def _deal(model: Model, options: Options) -> Deal:
    """Even ranges of all axes; the embedding may be cut along its hidden size."""
    if model.architecture.get("model_type") != "llama":
        what, hint = "Meta's layout holds LLaMA models alone", "use --format native"
        raise UnsupportedError(what, expected="model_type llama", found=model.architecture.get("model_type"), hint=hint)
    axes = {name: bare(axis) for name, axis in model.axes.items()}
    axes["hidden"] = Axis("hidden", model.config["hidden_size"], unit=1)
    return options.even_deal("Meta's code", axes)


def _rotary(stored: StoredTensor, tensor: LogicalTensor, axis: Axis, heads: tuple[int, int]) -> StoredTensor:
    """Within a head, Hugging Face has all first halves of the rotary pairs and then all second ones; Meta has pairs."""
    half, width, count = axis.unit // 2, tensor.shape[1], heads[1] - heads[0]
    view: Shape = (axis.count, 2, half, width)
    part = Part(tensor.name, (heads, *full(view[1:])), (0, 0, 0, 0), view, (0, 2, 1, 3))
    return stored._replace(parts=(part,), view=(count, half, 2, width))


@reads_config
def params(config: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """params.json; UnsupportedError for a config that it cannot say."""

    def refuse(key: str) -> UnsupportedError:
        return UnsupportedError(
            f"params.json cannot say {key} = {config.get(key)}", path="config.json", hint="use --format native"
        )

    dim, heads = config["hidden_size"], config["num_attention_heads"]
    if config.get("head_dim") not in (None, dim // heads):
        raise refuse("head_dim")
    if config.get("hidden_act", "silu") != "silu":
        raise refuse("hidden_act")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise refuse("rope_scaling")
    multiple, multiplier = _ffn(dim, config["intermediate_size"])
    said: dict[str, Any] = {
        "dim": dim,
        "n_layers": config["num_hidden_layers"],
        "n_heads": heads,
        "n_kv_heads": config.get("num_key_value_heads") or heads,
        "vocab_size": model.axes["vocab"].count,
        "multiple_of": multiple,
        **({} if multiplier is None else {"ffn_dim_multiplier": multiplier}),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": config.get("rope_theta") or scaling.get("rope_theta") or 10000.0,
        "use_scaled_rope": kind == "llama3",
    }
    if kind == "llama3":
        # Meta's code has these four as constants; those of later models that differ are said in the fields that
        # llama-models knows, the others cannot be.
        said["rope_scaling_factor"] = scaling.get("factor", _LLAMA3_SCALING["factor"])
        for key, default in (("low_freq_factor", 1.0), ("high_freq_factor", 4.0)):
            if scaling.get(key, default) != default:
                raise refuse("rope_scaling")
        if scaling.get("original_max_position_embeddings", 8192) != _LLAMA3_SCALING["original"]:
            raise refuse("rope_scaling")
    return said


def ffn_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """The width of the MLP as Meta's FeedForward computes it."""
    hidden = int(2 * 4 * dim / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * -(-hidden // multiple_of)


def _ffn(dim: int, size: int) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` that give an MLP of this width, as published where those do."""
    for multiple in (256, 1024, 4096):
        for known in (None, 1.3, 1.2, 1.4, 1.5):
            if ffn_size(dim, multiple, known) == size:
                return multiple, known
    multiple = math.gcd(size, 4096)
    multiplier = (size - multiple // 2 + 0.5) / int(2 * 4 * dim / 3)  # rounded up to `multiple`, it is the size
    assert ffn_size(dim, multiple, multiplier) == size
    return multiple, multiplier


FORMAT = Meta()
