"""vLLM's sets of models that nest a text model: where the source has text and towers, and how ranks share the towers.

A tower is run by nobody here. What of it a rank holds follows from vLLM's classes: even ranges of rows or columns of
some modules, of each third of a fused q, k and v, and everything of all others.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tpshard.errors import CorruptError, DifferentError
from tpshard.verifier.ranks.vllm import TEXT
from tpshard.verifier.ranks.vllm_names import Names, Spelled
from tpshard.verifier.ranks.weights import Weights

_BEGINS = (
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
_TEXTS = {
    "model": (
        *(f"{TEXT}.model", f"model.{TEXT}", "thinker.model", f"{TEXT}.backbone", "language.model", "model.llm"),
        *("model.transformer", "model"),
    ),
    "lm_head": (f"{TEXT}.lm_head", "thinker.lm_head", "language.lm_head", "lm_head"),
}
"""The same of the text, behind what its names begin with in vLLM."""


@dataclass(frozen=True)
class Beside:
    """How vLLM has what a model has beside its text, by the ends of modules' names in the source's terms.

    heads: the part of the config, and its key, that counts a tower's heads, in the modules `by_head`; and what it is
    where it is not there. counted: how many it stands for, where it is a name. rows, columns: of which a rank has an
    even share. thirds: rows of three modules, stored as one. spared: what vLLM does not have. depth: the key of the
    config that says behind which of the tower's layers nothing is taken, and what it is where it is not there. layers:
    how many a tower has, where no config says it. adapters: tensors that vLLM takes from elsewhere. begins: as
    `_BEGINS`, of this model alone. spelled: as in `Names`. text: what the text's names begin with in vLLM.
    """

    rows: str
    columns: str
    heads: tuple[str, str, int]
    by_head: str
    thirds: str | None = None
    spared: str | None = None
    depth: tuple[str, int] | None = None
    layers: int | None = None
    adapters: str | None = None
    counted: Mapping[str, int] = field(default_factory=dict)
    begins: Mapping[str, Sequence[str]] = field(default_factory=dict)
    spelled: Spelled = field(default_factory=dict)
    text: str = f"{TEXT}."


_QWEN = Beside(
    rows=r"blocks\.\d+\.(attn\.qkv|mlp\.(fc1|gate_proj|up_proj|linear_fc1))|merger(_list\.\d+)?\.(mlp\.0|linear_fc1)",
    columns=r"blocks\.\d+\.(attn\.proj|mlp\.(fc2|down_proj|linear_fc2))|merger(_list\.\d+)?\.(mlp\.2|linear_fc2)",
    heads=("vision_config", "num_heads", 16),
    by_head=r"attn\.(qkv|proj)",
)
_QWEN_THIRDS = replace(_QWEN, thirds=r"attn\.qkv")
_GLM = replace(
    _QWEN_THIRDS,
    rows=r"blocks\.\d+\.(attn\.qkv|mlp\.(gate_proj|up_proj))|merger\.(proj|gate_proj|up_proj)",
    columns=r"blocks\.\d+\.(attn\.proj|mlp\.down_proj)|merger\.down_proj",
    heads=("vision_config", "num_heads", 12),
)
_CLIP = Beside(
    rows=r"encoder\.layers\.\d+\.(self_attn\.[qkv]_proj|mlp\.fc1)",
    columns=r"encoder\.layers\.\d+\.(self_attn\.out_proj|mlp\.fc2)",
    heads=("vision_config", "num_attention_heads", 12),
    by_head=r"self_attn\.\w+",
    spared=r"vision_tower\.(vision_model\.)?head\..+",
)
_PIXTRAL = Beside(
    rows=r"transformer\.layers\.\d+\.(attention\.[qkv]_proj|feed_forward\.(gate_proj|up_proj))",
    columns=r"transformer\.layers\.\d+\.(attention\.o_proj|feed_forward\.down_proj)",
    heads=("vision_config", "num_attention_heads", 16),
    by_head=r"attention\.\w+",
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
    rows=r"encoder\.layer\.\d+\.mlp\.fc1",
    columns=r"encoder\.layer\.\d+\.mlp\.fc2",
    heads=("vision_config", "", 1),
    by_head=r"(?!)",
)
_MOON = Beside(
    rows=r"blocks\.\d+\.(wqkv|mlp\.fc0)",
    columns=r"blocks\.\d+\.(wo|mlp\.fc1)",
    heads=("vision_config", "num_attention_heads", 16),
    by_head=r"\.(wqkv|wo)",
    thirds=r"\.wqkv",
)
_WHOLE = Beside(rows=r"(?!)", columns=r"(?!)", heads=("vision_config", "", 1), by_head=r"(?!)")
_LLAMA4 = replace(
    _CLIP,
    rows=r"layers\.\d+\.(self_attn\.[qkv]_proj|mlp\.fc1)|adapter\.mlp\.fc1|patch_embedding\.linear|projector\.linear_1",
    columns=r"layers\.\d+\.(self_attn\.o_proj|mlp\.fc2)|adapter\.mlp\.fc2",
    heads=("vision_config", "num_attention_heads", 16),
    spared=None,
)
_QWEN2_OMNI = replace(
    _QWEN,
    rows=rf"blocks\.\d+\.attn\.[qkv]|{_QWEN.rows}",
    by_head=r"attn\.([qkv]|proj)",
)
_QWEN3_OMNI = replace(
    _QWEN_THIRDS,
    rows=rf"tower\.layers\.\d+\.(self_attn\.[qkv]_proj|fc1)|{_QWEN.rows}",
    columns=rf"tower\.layers\.\d+\.(self_attn\.out_proj|fc2)|{_QWEN.columns}",
)
_PERCEPTION = Beside(
    rows=r"resblocks\.\d+\.(attn\.in_proj|mlp\.c_fc)|vit_large_projector",
    columns=r"resblocks\.\d+\.(attn\.out_proj|mlp\.c_proj)",
    heads=("vision_config", "heads", 16),
    by_head=r"attn\.(in_proj|out_proj)",
    thirds=r"attn\.in_proj",
    begins={each: (each, f"model.{each}") for each in ("vision_model", "vit_large_projector")},
    spelled={
        "attn.qkv_proj.weight": ("attn.in_proj_weight",),
        "attn.qkv_proj.bias": ("attn.in_proj_bias",),
        "mlp.fc1": ("mlp.c_fc",),
        "mlp.fc2": ("mlp.c_proj",),
    },
)
_ERNIE_BEGINS = {
    f"resampler_model.{part}_{new}": (f"model.resampler_model.{part}_linear.{old}",)
    for part in ("spatial", "temporal")
    for new, old in (("linear1", 0), ("linear2", 2), ("norm", 3))
}
_ERNIE = Beside(
    rows=r"blocks\.\d+\.(attn\.qkv|mlp\.fc1)|resampler_model\.((spatial|temporal)_linear\.[02]|mlp)",
    columns=r"blocks\.\d+\.(attn\.proj|mlp\.fc2)",
    heads=("vision_config", "num_heads", 16),
    by_head=r"attn\.(qkv|proj)",
    thirds=r"attn\.qkv",
    begins={
        "vision_model": ("vision_model", "model.vision_model"),
        **_ERNIE_BEGINS,
        "resampler_model": ("model.resampler_model",),
    },
)
_MOLMO2 = Beside(
    rows=r"resblocks\.\d+\.(attention\.w[qkv]|feed_forward\.w1)|image_pooling_2d\.w[qkv]|image_projector\.w[13]",
    columns=r"resblocks\.\d+\.(attention\.wo|feed_forward\.w2)|image_pooling_2d\.wo|image_projector\.w2",
    heads=("vit_config", "num_attention_heads", 16),
    by_head=r"attention\.w[qkvo]",
    begins={"vision_backbone": ("model.vision_backbone",)},
    text="",
)
_MUSE = Beside(
    rows=r"layers\.\d+\.attn\.[qkv]_proj",
    columns=r"layers\.\d+\.attn\.proj",
    heads=("vision_config", "num_attention_heads", 16),
    by_head=r"attn\.\w+",
    begins={
        "vision_encoder.transformer": ("model.vision_tower.layers",),
        "vision_encoder.conv1_linear": ("model.vision_tower.patch_embedder.patch_embedding",),
        "vision_encoder.positional_embedding_vlm": (
            "model.vision_tower.patch_embedder.position_embedding_table.weight",
        ),
        "vision_encoder": ("model.vision_tower",),
        "vision_adapter.c_fc": ("model.vision_adapter.fc1",),
        "vision_adapter.c_proj": ("model.vision_adapter.fc2",),
        "vision_adapter": ("model.vision_adapter",),
        "vision_projection": ("model.vision_projection",),
    },
    spelled={
        "attn.o_proj": ("attn.proj",),
        "ln_1": ("norm1",),
        "ln_2": ("norm2",),
        "mlp.c_fc": ("mlp.fc1",),
        "mlp.c_proj": ("mlp.fc2",),
    },
    text="",
)
_MINIMAX_M3 = replace(
    _projected(_CLIP),
    rows=rf"{_projected(_CLIP).rows}|patch_merge_mlp\.linear_1",
    columns=rf"{_projected(_CLIP).columns}|patch_merge_mlp\.linear_2",
    heads=("vision_config", "num_attention_heads", 16),
    spared=None,
    begins={f"vision_tower.{each}": (each,) for each in ("multi_modal_projector", "patch_merge_mlp")},
    spelled={"fc1": ("mlp.fc1",), "fc2": ("mlp.fc2",)},
)
_EXTEND = "model.embed_tokens_extend"
_PHI4MM = Beside(
    rows=r"img_processor\.encoder\.layers\.\d+\.(self_attn\.[qkv]_proj|mlp\.fc1)",
    columns=r"img_processor\.encoder\.layers\.\d+\.(self_attn\.out_proj|mlp\.fc2)",
    heads=("vision_config", "num_attention_heads", 16),
    by_head=r"self_attn\.\w+",
    spared=r"img_processor\.(head|post_layernorm)\..+",
    depth=("img_processor.layer_idx", -2),
    layers=27,
    adapters=r"\.lora_[AB]\.",
    begins={
        "embed_tokens_extend.audio_projection_for_vision": (f"{_EXTEND}.audio_embed.audio_projection.vision",),
        "embed_tokens_extend.audio_projection": (f"{_EXTEND}.audio_embed.audio_projection.speech",),
        "embed_tokens_extend": (f"{_EXTEND}.audio_embed",),
        "vision_encoder": (f"{_EXTEND}.image_embed",),
    },
    text="",
)
_INKLING = replace(_WHOLE, begins={"audio": ("model.audio",), "visual.vision_encoder": ("model.visual",)}, text="")
_DOTS = replace(_WHOLE, begins={"visual": ("vision_encoder",), "audio_tower": ("audio_encoder",)})
_RADIO = Beside(
    rows=r"blocks\.\d+\.(attn\.qkv|mlp\.fc1)",
    columns=r"blocks\.\d+\.(attn\.proj|mlp\.fc2)",
    heads=("vision_config", "args.model", 0),
    by_head=r"attn\.(qkv|proj)",
    thirds=r"attn\.qkv",
    spared=r"input_conditioner\..+",
    counted={
        f"vit_{size}_patch16_224": heads for size, heads in (("small", 6), ("base", 12), ("large", 16), ("huge", 16))
    },
    begins={
        "vision_model.model.encoder.layers": ("vision_model.radio_model.model.blocks",),
        "vision_model": ("vision_model.radio_model",),
    },
)
NESTED: Mapping[str, Beside | Mapping[str, Beside]] = {
    "qwen2_vl": _QWEN,
    **dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), _QWEN_THIRDS),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen4_exp"), replace(_QWEN_THIRDS, spared=r"mtp\..+")),
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
    "minimax_m3_vl": _MINIMAX_M3,
    "glm5_next": replace(_GLM, heads=("vision_config", "num_heads", 16)),
    "step3p7": _PERCEPTION,
    "ernie4_5_moe_vl": _ERNIE,
    "molmo2": _MOLMO2,
    "phi4mm": _PHI4MM,
    "dots3_note": _DOTS,
    "inkling_mm_model": _INKLING,
    "deepseek_vl_v2": replace(_WHOLE, rows=r"mlp\.fc1", columns=r"mlp\.fc2"),
    "NemotronH_Nano_VL_V2": _RADIO,
    "muse_glimmer": _MUSE,
}
"""By the model_type of a config; those of several by that of its vision_config."""


def beside_of(config: Mapping[str, Any]) -> Beside | None:
    """How vLLM has what is beside the text of a config's model; None where that is not known."""
    found = NESTED.get(str(config.get("model_type")))
    if isinstance(found, Mapping):
        return found.get(str(_vision(config).get("model_type")))
    return found


def _vision(config: Mapping[str, Any], part: str = "vision_config") -> Mapping[str, Any]:
    thinker = config.get("thinker_config")
    vision = (thinker if isinstance(thinker, Mapping) else config).get(part)
    return vision if isinstance(vision, Mapping) else {}


def texts_in(beside: Beside) -> tuple[str, ...]:
    """How the text's names begin in vLLM."""
    return tuple(f"{beside.text}{each}" for each in _TEXTS)


def names_in(source: Weights, text: Names, beside: Beside) -> tuple[Names, Names]:
    """vLLM's names of the text, and of what is beside it, in the terms of this source."""
    roots = {}
    for new, begins in (
        *((f"{beside.text}{each}", begins) for each, begins in _TEXTS.items()), *beside.begins.items(), *_BEGINS
    ):  # fmt: skip
        there = (old for old in begins if any(f"{name}.".startswith(f"{old}.") for name in source.names()))
        if new not in roots and (old := next(there, None)) is not None:
            roots[new] = old
    base = roots.get(f"{beside.text}model", "model")
    own = text.roots.get("model", "model")
    begun = {f"{beside.text}{new}": f"{base}{old.removeprefix(own)}" for new, old in text.roots.items()}
    return replace(text, roots=roots | begun), Names(roots=roots, spelled=beside.spelled)


def shares_beside(
    config: Mapping[str, Any], beside: Beside, source: Weights, ranks: Sequence[Weights]
) -> dict[str, int]:
    """The tensors beside the text, and how many modules' rows each is.

    DifferentError where a rank has not the share that vLLM has: whole heads, as many on every rank.
    """
    found, tp = {}, len(ranks)
    part, key, default = beside.heads
    said = _at(_vision(config, part), key, default)
    heads = beside.counted[str(said)] if str(said) in beside.counted else _count(said, f"{part}.{key}")
    for name in _held(config, beside, source):
        full, leaf = list(source.shape(name)), re.fullmatch(r"(.+)[._](weight|bias)", name)
        module, suffix = (leaf[1], leaf[2]) if leaf else (name, "")
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


def _held(config: Mapping[str, Any], beside: Beside, source: Weights) -> Iterator[str]:
    """The source's tensors beside the text that vLLM has."""
    roots, begins = names_in(source, Names(), beside)[0].roots, texts_in(beside)
    text = tuple(f"{roots[new]}." for new in begins if new in roots)
    others = tuple(f"{old}." for new, old in roots.items() if new not in begins and f"{old}.".startswith(text))
    for name in source.names():
        of_text = name.startswith(text) and not f"{name}.".startswith(others)
        if of_text or (beside.spared and re.search(rf"(^|\.)({beside.spared})$", name)):
            continue
        layer = re.search(r"\.layers?\.(\d+)\.", name)
        if beside.depth is None or layer is None or int(layer[1]) < _deepest(config, *beside.depth, beside.layers):
            yield name


def _deepest(config: Mapping[str, Any], key: str, default: int, layers: int | None) -> int:
    """How many of a tower's layers vLLM has: up to the last that features are taken of."""
    total = (
        _count(_vision(config).get("num_hidden_layers", 0), "vision_config.num_hidden_layers")
        if layers is None
        else layers
    )
    chosen = _at(config, key, default)
    every = [_count(each, key) for each in (chosen if isinstance(chosen, list) and chosen else [chosen])]
    return max(total + layer + 1 if layer < 0 else layer for layer in every)


def _at(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """The value of a config's key, which may be within others; the default where it is not there."""
    found: Any = config
    for part in key.split("."):
        found = found.get(part, default) if isinstance(found, Mapping) else default
    return found


def _count(value: object, where: str) -> int:
    """A number that a config says somewhere. CorruptError where that is none."""
    if type(value) is not int:
        what, hint = "config.json has no number where the tower's sizes are", "take the published config.json"
        raise CorruptError(what, expected=f"a number in {where}", found=f"{value!r:.40}", hint=hint)
    return value
