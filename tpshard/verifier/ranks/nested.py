"""vLLM's sets of models that nest a text model: where the source has text and towers, and how ranks share the towers.

A tower is run by nobody here. What of it a rank holds follows from vLLM's classes: even ranges of rows or columns of
some modules, of each third of a fused q, k and v, and everything of all others.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tpshard.errors import DifferentError
from tpshard.verifier.ranks.vllm import TEXT, Names
from tpshard.verifier.ranks.weights import Weights

_BEGINS = (
    (f"{TEXT}.model", (f"{TEXT}.model", f"model.{TEXT}", "thinker.model", "model")),
    (f"{TEXT}.lm_head", (f"{TEXT}.lm_head", "thinker.lm_head", "lm_head")),
    ("visual", ("visual", "model.visual", "thinker.visual")),
    ("audio_tower", ("thinker.audio_tower",)),
    *((each, (f"model.{each}",)) for each in ("embed_vision", "embed_audio", "vision_embedder")),
    *(
        (f"vision_tower.vision_model.{part}", tuple(f"{place}.{part}" for place in places))
        for places in (
            ("vision_tower.vision_model", "model.vision_tower.vision_model", "vision_tower", "model.vision_tower"),
        )
        for part in ("embeddings", "encoder", "pre_layrnorm", "post_layernorm")
    ),
    ("vision_tower", ("vision_tower", "model.vision_tower")),
    ("multi_modal_projector", ("multi_modal_projector", "model.multi_modal_projector")),
    ("image_newline", ("image_newline", "model.image_newline")),
    ("mm_projector.linear_1", ("mm_projector.linear_1", "mm_projector.proj.0")),
    ("mm_projector.linear_2", ("mm_projector.linear_2", "mm_projector.proj.2")),
)
"""How names begin in vLLM, and in sources: where one has several of these, the first."""
_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Beside:
    """How vLLM has what a model has beside its text, by the ends of modules' names in the source's terms.

    heads: the key of vision_config that counts a tower's heads, in the modules `by_head`; and what it is where it is
    not there. rows, columns: of which a rank has an even share. thirds: rows of three modules, stored as one. spared:
    what vLLM does not have. depth: the key of the config that says behind which of the tower's layers nothing is taken,
    and what it is where it is not there. fused: as in `Names.halves`.
    """

    rows: str
    columns: str
    heads: tuple[str, int]
    by_head: str
    thirds: str | None = None
    fused: Mapping[str, tuple[str, ...]] | None = None
    spared: str | None = None
    depth: tuple[str, int] | None = None


_QWEN = Beside(
    rows=r"blocks\.\d+\.(attn\.qkv|mlp\.(fc1|gate_proj|up_proj|linear_fc1))|merger(_list\.\d+)?\.(mlp\.0|linear_fc1)",
    columns=r"blocks\.\d+\.(attn\.proj|mlp\.(fc2|down_proj|linear_fc2))|merger(_list\.\d+)?\.(mlp\.2|linear_fc2)",
    heads=("num_heads", 16),
    by_head=r"attn\.(qkv|proj)",
    fused={"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")},
)
_QWEN_THIRDS = replace(_QWEN, thirds=r"attn\.qkv")
_GLM = replace(
    _QWEN_THIRDS,
    rows=r"blocks\.\d+\.(attn\.qkv|mlp\.(gate_proj|up_proj))|merger\.(proj|gate_proj|up_proj)",
    columns=r"blocks\.\d+\.(attn\.proj|mlp\.down_proj)|merger\.down_proj",
    heads=("num_heads", 12),
    fused={**(_QWEN.fused or {}), "visual.merger.gate_up_proj": ("visual.merger.gate_proj", "visual.merger.up_proj")},
)
_CLIP = Beside(
    rows=r"encoder\.layers\.\d+\.(self_attn\.[qkv]_proj|mlp\.fc1)",
    columns=r"encoder\.layers\.\d+\.(self_attn\.out_proj|mlp\.fc2)",
    heads=("num_attention_heads", 12),
    by_head=r"self_attn\.\w+",
    fused={"self_attn.qkv_proj": tuple(f"self_attn.{each}" for each in _QKV)},
    spared=r"vision_tower\.(vision_model\.)?head\..+",
)
_PIXTRAL = Beside(
    rows=r"transformer\.layers\.\d+\.(attention\.[qkv]_proj|feed_forward\.(gate_proj|up_proj))",
    columns=r"transformer\.layers\.\d+\.(attention\.o_proj|feed_forward\.down_proj)",
    heads=("num_attention_heads", 16),
    by_head=r"attention\.\w+",
    fused={
        "attention.qkv_proj": tuple(f"attention.{each}" for each in _QKV),
        "feed_forward.gate_up_proj": ("feed_forward.gate_proj", "feed_forward.up_proj"),
    },
)


def _featured(tower: Beside, depth: int) -> Beside:
    """LLaVA's tower: what comes before the features that are taken."""
    spared = "|".join((r"vision_tower\.(vision_model\.)?post_layernorm\..+", *filter(None, (tower.spared,))))
    return replace(tower, spared=spared, depth=("vision_feature_layer", depth))


def _projected(tower: Beside) -> Beside:
    """A tower with a projector behind it that is cut, too."""
    rows, columns = (rf"multi_modal_projector\.linear_{number}" for number in (1, 2))
    return replace(tower, rows=rf"{tower.rows}|{rows}", columns=rf"{tower.columns}|{columns}")


_LLAVA = {
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model"), _projected(_featured(_CLIP, -2))),
    "pixtral": _projected(_featured(_PIXTRAL, -2)),
}
_INTERN = Beside(
    rows=r"encoder\.layer\.\d+\.mlp\.fc1", columns=r"encoder\.layer\.\d+\.mlp\.fc2", heads=("", 1), by_head=r"(?!)"
)
_MOON = Beside(
    rows=r"blocks\.\d+\.(wqkv|mlp\.fc0)",
    columns=r"blocks\.\d+\.(wo|mlp\.fc1)",
    heads=("num_attention_heads", 16),
    by_head=r"\.(wqkv|wo)",
    thirds=r"\.wqkv",
)
_WHOLE = Beside(rows=r"(?!)", columns=r"(?!)", heads=("", 1), by_head=r"(?!)")
_LLAMA4 = replace(
    _CLIP,
    rows=r"layers\.\d+\.(self_attn\.[qkv]_proj|mlp\.fc1)|adapter\.mlp\.fc1|patch_embedding\.linear|projector\.linear_1",
    columns=r"layers\.\d+\.(self_attn\.o_proj|mlp\.fc2)|adapter\.mlp\.fc2",
    heads=("num_attention_heads", 16),
    spared=None,
)
_QWEN2_OMNI = replace(
    _QWEN,
    rows=rf"blocks\.\d+\.attn\.[qkv]|{_QWEN.rows}",
    by_head=r"attn\.([qkv]|proj)",
    fused={**(_QWEN.fused or {}), "attn.qkv": ("attn.q", "attn.k", "attn.v")},
)
_QWEN3_OMNI = replace(
    _QWEN_THIRDS,
    rows=rf"tower\.layers\.\d+\.(self_attn\.[qkv]_proj|fc1)|{_QWEN.rows}",
    columns=rf"tower\.layers\.\d+\.(self_attn\.out_proj|fc2)|{_QWEN.columns}",
    fused={"self_attn.qkv_proj": tuple(f"self_attn.{each}" for each in _QKV)},
)
NESTED: Mapping[str, Beside | Mapping[str, Beside]] = {
    "qwen2_vl": _QWEN,
    **dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), _QWEN_THIRDS),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), replace(_QWEN_THIRDS, spared=r"mtp\..+")),
    **dict.fromkeys(("glm4v", "glm4v_moe"), _GLM),
    "gemma3": _CLIP,
    **dict.fromkeys(("llava", "llava_next"), _LLAVA),
    "llava_onevision": _featured(_CLIP, -1),
    "mistral3": _projected(_featured(_PIXTRAL, -1)),
    "internvl": _INTERN,
    "llama4": _LLAMA4,
    "gemma4": _WHOLE,
    "gemma4_unified": replace(_WHOLE, rows=r"vision_embedder\.patch_dense"),
    "qwen2_5_omni": _QWEN2_OMNI,
    "qwen3_omni_moe": _QWEN3_OMNI,
    **dict.fromkeys(("kimi_vl", "kimi_k25"), _MOON),
}
"""By the model_type of a config; those of several by that of its vision_config."""


def beside_of(config: Mapping[str, Any]) -> Beside | None:
    """How vLLM has what is beside the text of a config's model; None where that is not known."""
    found = NESTED.get(str(config.get("model_type")))
    if isinstance(found, Mapping):
        return found.get(str(_vision(config).get("model_type")))
    return found


def _vision(config: Mapping[str, Any]) -> Mapping[str, Any]:
    thinker = config.get("thinker_config")
    vision = (thinker if isinstance(thinker, Mapping) else config).get("vision_config")
    return vision if isinstance(vision, Mapping) else {}


def names_in(source: Weights, text: Names, beside: Beside) -> tuple[Names, Names]:
    """vLLM's names of the text, and of what is beside it, in the terms of this source."""
    roots = {}
    for new, begins in _BEGINS:
        there = (old for old in begins if any(f"{name}.".startswith(f"{old}.") for name in source.names()))
        if (old := next(there, None)) is not None:
            roots[new] = old
    roots |= {f"{TEXT}.{new}": f"{roots.get(f'{TEXT}.model', 'model')}{old.removeprefix('model')}"
              for new, old in text.roots.items()}  # fmt: skip
    return replace(text, roots=roots), Names(roots=roots, halves=_below(roots, beside.fused or {}))


def _below(roots: Mapping[str, str], halves: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Modules outside of layers by their whole names, which begin as the source's do."""
    old = roots.get("visual", "visual")
    return {
        re.sub("^visual", old, module): tuple(re.sub("^visual", old, part) for part in parts)
        for module, parts in halves.items()
    }


def shares_beside(
    config: Mapping[str, Any], beside: Beside, source: Weights, ranks: Sequence[Weights], text: Sequence[str]
) -> dict[str, int]:
    """The tensors beside the text (whose names begin as `text` says), and how many modules' rows each is.

    DifferentError where a rank has not the share that vLLM has: whole heads, as many on every rank.
    """
    found, tp = {}, len(ranks)
    key, default = beside.heads
    heads = int(_vision(config).get(key, default))
    for name in _held(config, beside, source, text):
        full, module, suffix = list(source.shape(name)), name.rpartition(".")[0], name.rpartition(".")[2]
        dim = _dim(beside, module, suffix)
        found[name] = 3 if beside.thirds and dim is not None and re.search(f"{beside.thirds}$", module) else 1
        if dim is not None:
            if full[dim] % tp or (re.search(f"{beside.by_head}$", module) and heads % tp):
                what = f"{name} has no even share of {heads} heads for each of {tp} ranks"
                raise DifferentError(what, tensor=name, expected="whole heads, and as many on every rank", found=full)
            full[dim] //= tp
        for rank, weights in enumerate(ranks):
            if name not in weights.names():
                raise DifferentError(f"rank {rank} has no tensor {name}", tensor=name)
            if list(weights.shape(name)) != full:
                what = f"{name} of rank {rank} is not what vLLM has of it"
                raise DifferentError(what, tensor=name, expected=full, found=list(weights.shape(name)))
    return found


def _dim(beside: Beside, module: str, suffix: str) -> int | None:
    """The dim that vLLM cuts; None where every rank has all: of a bias behind a sum, too."""
    if re.search(rf"(^|[._])({beside.rows})$", module):
        return 0
    return 1 if suffix == "weight" and re.search(rf"(^|[._])({beside.columns})$", module) else None


def _held(config: Mapping[str, Any], beside: Beside, source: Weights, text: Sequence[str]) -> Iterator[str]:
    """The source's tensors beside the text that vLLM has."""
    for name in source.names():
        if name.startswith(tuple(text)) or (beside.spared and re.search(rf"(^|\.)({beside.spared})$", name)):
            continue
        layer = re.search(r"\.layers?\.(\d+)\.", name)
        if beside.depth is None or layer is None or int(layer[1]) < _deepest(config, *beside.depth):
            yield name


def _deepest(config: Mapping[str, Any], key: str, default: int) -> int:
    """How many of a tower's layers vLLM has: up to the last that features are taken of."""
    total, chosen = int(_vision(config).get("num_hidden_layers", 0)), config.get(key, default)
    layers = chosen if isinstance(chosen, list) else [chosen]
    return max(total + int(layer) + 1 if int(layer) < 0 else int(layer) for layer in layers)
