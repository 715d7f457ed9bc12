"""DeepSeek's `model{i}-mp{N}.safetensors`: what the inference code of DeepSeek-V2 and V3 reads.

Attention, shared experts and vocabulary are cut evenly; routed experts stay whole, each rank has a contiguous range of
them. Source: inference/convert.py of deepseek-ai/DeepSeek-V3.
"""

import re
from collections.abc import Mapping

from tpshard.errors import UnsupportedError, UsageError
from tpshard.formats.base import Format, bare
from tpshard.formats.split import Options, RankLayouts
from tpshard.planning.axes import Axis
from tpshard.planning.deal import Deal
from tpshard.planning.layout import LogicalTensor, Part, StoredTensor, shard, whole
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import Model

_FILE = re.compile(r"model(0|[1-9]\d*)-mp([1-9]\d*)\.safetensors")
_MODULES = {
    "embed_tokens": "embed",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "wq",
    "q_a_proj": "wq_a",
    "q_a_layernorm": "q_norm",
    "q_b_proj": "wq_b",
    "kv_a_proj_with_mqa": "wkv_a",
    "kv_a_layernorm": "kv_norm",
    "kv_b_proj": "wkv_b",
    "o_proj": "wo",
    "gate": "gate",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
    "norm": "norm",
    "lm_head": "head",
}
_EXPERTS = "routed experts"
"""Dealt whole: of the axis of experts, and not of their width, each rank has a range."""
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(\w+)\.(?:weight|weight_scale_inv)")
_STACKED = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up_proj|down_proj)(?:\.weight)?")


class DeepSeek(Format):
    """`model0-mp4.safetensors`, one file a rank."""

    def lay(self, model: Model, options: Options) -> RankLayouts:
        """DeepSeek's names and cuts; UnsupportedError for another architecture or a tp that cuts a unit."""
        dealt = _deal(model, options)
        layers = model.config["num_hidden_layers"]
        owners = [rank for rank in range(options.tp) for _ in range(*dealt.of(_EXPERTS, rank))]
        rows: list[list[StoredTensor]] = [[] for _ in range(options.tp)]
        dropped = {}
        for tensor in model.tensors:
            name = model.full_name(tensor.name)
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            if layer and int(layer[1]) >= layers:
                dropped[tensor.name] = "of a layer that predicts one more token, which DeepSeek's code does not have"
            elif tensor.cut.kind == "buffer":
                dropped[tensor.name] = "a buffer that DeepSeek's code computes"
            elif expert := _EXPERT.fullmatch(name):
                rank = owners[int(expert[2])]
                rows[rank].append(whole(tensor)._replace(name=_name(name, tensor)))
            elif stacked := _STACKED.fullmatch(name):
                for index in range(tensor.shape[0]):
                    rows[owners[index]] += _unstacked(tensor, index, stacked[1], stacked[2])
            elif ".experts." in name:
                raise _no_place(tensor)
            else:
                for row, (stored,) in zip(rows, shard([tensor], model.axes, dealt), strict=True):
                    row.append(stored._replace(name=_name(name, tensor)))
        return RankLayouts(tuple(map(tuple, rows)), dealt, dropped)

    def file_name(self, rank: int, mesh: Mesh, part: int, parts: int) -> str:
        """Rank and width; a rank is never in several files."""
        if parts > 1:
            what = "DeepSeek's code takes one file for one rank"
            raise UsageError(what, found="a rank larger than --max-file-size", hint="give a larger --max-file-size")
        return f"model{rank}-mp{mesh.size}.safetensors"

    def parse_name(self, name: str) -> Mapping[str, int] | None:
        """Rank and width."""
        found = _FILE.fullmatch(name)
        return {"rank": int(found[1]), "ranks": int(found[2]), "part": 0, "parts": 1} if found else None


def _name(full_name: str, tensor: LogicalTensor) -> str:
    """As convert.py renames: `self_attn` and `mlp` anywhere, then the module that owns the tensor."""
    name = full_name.removeprefix("model.").replace("self_attn", "attn").replace("mlp", "ffn")
    name = name.replace("e_score_correction_bias", "bias").replace("weight_scale_inv", "scale")
    before, _, last = name.rpartition(".")
    path, _, module = before.rpartition(".")
    if module not in _MODULES or full_name.endswith(".scale") or last not in ("weight", "bias", "scale"):
        raise _no_place(tensor)
    return ".".join(filter(None, (path, _MODULES[module], last)))


def _no_place(tensor: LogicalTensor) -> UnsupportedError:
    what = f"DeepSeek's layout has no place for {tensor.name}"
    return UnsupportedError(what, tensor=tensor.name, hint="use --format native")


def _unstacked(tensor: LogicalTensor, expert: int, layer: str, kind: str) -> list[StoredTensor]:
    """One expert of a stacked tensor, `[expert, out, in]`, under the names of its modules."""
    _, rows, width = tensor.shape
    names = ("w1", "w3") if kind == "gate_up_proj" else ("w2",)
    size = rows // len(names)
    found = []
    for place, name in enumerate(names):
        box = ((expert, expert + 1), (place * size, (place + 1) * size), (0, width))
        part = Part(tensor.name, box, (0, 0, 0))
        full_name = f"layers.{layer}.ffn.experts.{expert}.{name}.weight"
        found.append(StoredTensor(full_name, tensor.dtype, (size, width), (part,), view=(1, size, width)))
    return found


def _deal(model: Model, options: Options) -> Deal:
    if model.architecture.get("model_type") not in ("deepseek_v2", "deepseek_v3"):
        raise UnsupportedError(
            "DeepSeek's layout holds DeepSeek-V2 and V3 alone",
            expected="model_type deepseek_v2 or deepseek_v3",
            found=model.architecture.get("model_type"),
            hint="use --format native",
        )
    axes = {name: bare(axis) for name, axis in model.axes.items() if axis.name != "moe_ffn"}
    axes[_EXPERTS] = Axis(_EXPERTS, model.config.get("n_routed_experts") or options.tp, unit=1, along="ep")
    return options.even_deal("DeepSeek's code", axes, ep=options.tp)


FORMAT = DeepSeek()
