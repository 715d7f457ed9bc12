"""What a split means on devices: memory per rank, and what the ranks tell each other.

Everything follows from headers, rules and config. Formulas and their sources: docs/explanation/numbers.md. Sizes are
in bytes, bandwidth in bytes per second, times in seconds.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Self

from tpshard.errors import UsageError
from tpshard.planning.axes import Axis, Cut
from tpshard.planning.box import Shape
from tpshard.planning.deal import Deal, Range
from tpshard.planning.layout import LogicalTensor
from tpshard.planning.mesh import Mesh
from tpshard.planning.model import CASTABLE, DTYPE_NAMES, Model
from tpshard.planning.stages import Stages
from tpshard.storage.safetensors import DTYPE_BITS, nbytes
from tpshard.storage.tensor_names import numbered
from tpshard.units import human_bytes

USABLE = 0.9
"""The share of a device's memory that weights and cache may fill; the rest is for activations and the runtime."""
KV_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8": "F8_E4M3"}
"""The names that `--kv-dtype` knows."""
_LAYER = re.compile(r"(?<![^.])0\.([^.]+)")
_BLOCK = re.compile(r"(?<![^.])(\d+)\.([^.]+)(?:\.(\d+)(?=\.))?")
"""A layer's number, the block in it, and which of several of that name."""
_LATENT = re.compile(r"(?:kv_a_proj_with_mqa|wkv_a_with_mqa|\.attn\.wkv)\.(?:weight|weight_packed|scales)$")
"""Makes what DeepSeek's latent attention caches: the compressed key and value of all heads, and one rotary key.

In DeepSeek V4 it is one head that is key and value, of which many layers keep a window and compressed ones.
"""
_ACTIVE = (
    "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"
)  # fmt: skip
"""What configs call the number of experts that a token is for."""


@dataclass(frozen=True)
class Workload:
    """What the ranks are to do: `batch` sequences of `seq` tokens each, on devices of this memory and bandwidth.

    kv_dtype: a key of `KV_DTYPES`; None is what a quantised model declares, else the weights' dtype. gpu_memory: in
    bytes. bandwidth: in bytes per second.
    UsageError for a number or dtype that cannot be.
    """

    batch: int = 1
    seq: int = 4096
    kv_dtype: str | None = None
    gpu_memory: int | None = None
    bandwidth: float | None = None

    def __post_init__(self) -> None:
        if self.kv_dtype not in (None, *KV_DTYPES):
            raise UsageError(f"unknown kv_dtype {self.kv_dtype!r}", expected=", ".join(KV_DTYPES))
        for name in ("batch", "seq", "gpu_memory", "bandwidth"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise UsageError(f"{name} must be positive", found=value)

    def cache_dtype(self, usual: str) -> str:
        """What keys and values are kept in, in the terms of safetensors. usual: where nothing else is asked for."""
        return KV_DTYPES[self.kv_dtype] if self.kv_dtype else usual


@dataclass(frozen=True)
class Traits:
    """What memory and communication depend on.

    blocks: the row-parallel sums of each layer that has any, by its number; each is one all-reduce of batch x seq x
    hidden elements. caches: the attentions of each layer that keep keys and values: none of a mixer or of linear
    attention, two of a layer that attends twice. dtype: of activations. cache_dtype: of keys and values.
    cache_axis: the axis whose units have a key and a value each; None with latent attention, of which `latent` elements
    are cached by every rank. window: of sliding attention. expert_layers: which of those layers have routed experts.
    active: how many of them a token is for, None where the config does not say.
    """

    blocks: Mapping[int, int]
    caches: Mapping[int, int]
    hidden: int
    dtype: str
    cache_dtype: str
    cache_axis: str | None
    latent: int
    window: int | None
    expert_layers: frozenset[int] = frozenset()
    active: int | None = None

    @property
    def layers(self) -> int:
        """How many layers cache keys and values."""
        return len(self.caches)

    @property
    def cached(self) -> int:
        """How many attentions do."""
        return sum(self.caches.values())

    @property
    def sums(self) -> int:
        """How many all-reduces there are."""
        return sum(self.blocks.values())

    def of(self, layers: Range) -> Self:
        """The traits of some of the layers."""
        blocks, caches = (
            {layer: count for layer, count in each.items() if layer in range(*layers)}
            for each in (self.blocks, self.caches)
        )
        return replace(self, blocks=blocks, caches=caches, expert_layers=self.expert_layers.intersection(blocks))


def traits(model: Model) -> Traits:
    """Read a model's traits off its cuts and shapes. Of a quantised one the config names the dtype of activations.

    Layers beyond the config's count (DeepSeek V3), or beside the model's (Inkling), predict further tokens; decoding
    does not need them. A draft model has no others.
    """
    config = model.config if model.text_config is None else model.text_config
    count = config.get("num_hidden_layers")
    blocks: set[tuple[int, str]] = set()
    others: set[tuple[int, str]] = set()
    routed: set[int] = set()
    hidden = latent = 0
    sizes: Counter[str] = Counter()
    alike: dict[tuple[str, str, Shape, Cut], tuple[LogicalTensor, list[int]]] = {}
    for tensor in model.tensors:
        kind, numbers = numbered(tensor.name)
        key = kind, tensor.dtype, tensor.shape, tensor.cut
        alike.setdefault(key, (tensor, []))[1].append(numbers[0] if numbers else 0)
    for (kind, *_), (tensor, layers) in alike.items():
        if tensor.dtype in CASTABLE:
            sizes[tensor.dtype] += nbytes(tensor.dtype, tensor.shape) * len(layers)
        if tensor.cut.kind == "row" and (found := _LAYER.search(kind)):
            beside = model.layers is not None and not model.full_name(tensor.name).startswith(model.layers.within)
            (others if beside else blocks).update((layer, found[1]) for layer in layers)
            hidden = max(hidden, _out(tensor))
            if _of_experts(model, tensor):
                routed.update(layers)
        elif _LATENT.search(tensor.name):
            latent = tensor.shape[-1 if tensor.name.endswith("scales") else 0]
    activations = max(sizes, key=lambda dtype: sizes[dtype]) if sizes else "BF16"
    if model.quantisation:
        named = next(
            (str(each[key]) for each in (config, model.config) for key in ("dtype", "torch_dtype") if each.get(key)), ""
        )
        activations = DTYPE_NAMES.get(named, activations)
    own = {each for each in blocks if not isinstance(count, int) or each[0] < count}
    blocks = own or blocks or others
    window = config.get("sliding_window")
    by_layer = Counter(layer for layer, _ in blocks)
    axis = None if latent else _cached(model.axes)
    caches = _caches(model, axis, count) if latent or axis else {}
    return Traits(
        blocks=by_layer,
        caches=dict.fromkeys(by_layer, 1) if caches is None else caches,
        hidden=hidden,
        dtype=activations,
        cache_dtype=model.quantisation.get("kv_cache") or activations,
        cache_axis=axis,
        latent=latent,
        window=window if isinstance(window, int) and config.get("use_sliding_window") is not False else None,
        expert_layers=frozenset(routed.intersection(by_layer)),
        active=next((config[key] for key in _ACTIVE if isinstance(config.get(key), int)), None),
    )


def _of_experts(model: Model, tensor: LogicalTensor) -> bool:
    """Whether a tensor is of a routed expert, or of all of a layer."""
    name, experts = model.full_name(tensor.name), model.experts
    return experts is not None and (experts.number(name) is not None or experts.are_stacked(name, tensor.shape))


def _caches(model: Model, axis: str | None, count: object) -> dict[int, int] | None:
    """How many attentions of each layer have what is cached: a latent, or heads of the axis. None where none has.

    count: of the layers, as the config says; those beyond, and shorter stacks beside, predict further tokens.
    """
    found: dict[str, set[tuple[int, str, str | None]]] = {}
    for tensor in model.tensors:
        if axis is None:
            caches = _LATENT.search(tensor.name) is not None
        else:
            caches = any(each.partition("-")[0] == axis.partition("-")[0] for each in tensor.cut.segments)
        if caches and (at := _BLOCK.search(tensor.name)):
            found.setdefault(tensor.name[: at.start()], set()).add((int(at[1]), at[2], at[3]))
    stacks = [Counter(layer for layer, *_ in each) for each in found.values()]
    if not stacks:
        return None
    largest: dict[int, int] = max(stacks, key=lambda each: len(each))
    own = {layer: each for layer, each in largest.items() if not isinstance(count, int) or layer < count}
    return own or largest


def _cached(axes: Mapping[str, Axis]) -> str | None:
    """The axis of the heads whose keys and values are cached: of layers that differ, that of the most; or none."""
    found = [axis for name, axis in axes.items() if name.partition("-")[0] == "kv"]
    return max(found, key=lambda axis: axis.count).name if found else "heads" if "heads" in axes else None


def _out(tensor: LogicalTensor) -> int:
    """The size of a row-parallel tensor's `out`. Of a tensor of more than two dims the first counts experts."""
    shape = tensor.shape
    return max((shape[dim] for dim in range(len(shape) > 2, len(shape)) if dim != tensor.cut.dim), default=0)


def cache_bytes(
    model: Model, facts: Traits, dealt: Deal, workload: Workload, stages: Stages | None = None
) -> list[int]:
    """What each rank caches of `batch` sequences of `seq` tokens: keys and values of its KV heads and attentions."""
    caches = [facts.of(each).cached for each in stages.ranges] if stages else [facts.cached]
    bits = workload.batch * workload.seq * DTYPE_BITS[workload.cache_dtype(facts.cache_dtype)]
    found = []
    for rank in range(dealt.mesh.size):
        first, last = (0, 1) if facts.cache_axis is None else dealt.of(facts.cache_axis, rank)
        each = facts.latent if facts.cache_axis is None else 2 * model.axes[facts.cache_axis].unit
        found.append(bits * caches[dealt.mesh.coordinate(rank)[0]] * each * (last - first) // 8)
    return found


def ring_bytes(facts: Traits, tp: int, tokens: int) -> int:
    """What each rank sends for `tokens` tokens: 2 (n - 1) / n of the activations, for every row-parallel sum."""
    return facts.sums * handed_on(facts, tokens) * 2 * (tp - 1) // tp


def handed_on(facts: Traits, tokens: int) -> int:
    """The activations of `tokens` tokens, which a stage hands to the next one: tokens x hidden numbers."""
    return tokens * facts.hidden * DTYPE_BITS[facts.dtype] // 8


def dispatched(facts: Traits, mesh: Mesh, tokens: int) -> int | None:
    """What each rank would send for `tokens` tokens, were they dealt to the ranks and sent to their experts' alone.

    Each rank has 1 / tp of them. A token goes to the tp / ep ranks of each of its experts and comes back, and one rank
    in tp is its own. None where the config does not say how many experts a token is for.
    """
    if facts.active is None:
        return None
    ways = 2 * facts.active * (mesh.tp - 1) * len(facts.expert_layers)
    return handed_on(facts, tokens) * ways // (mesh.ep * mesh.tp)


def fits(total: int, gpu_memory: int) -> bool:
    """Whether weights and cache leave a device room to work in."""
    return total <= USABLE * gpu_memory


def stage_needs(
    facts: Traits, mesh: Mesh, stage: int, held: Sequence[tuple[int, int]], work: Workload
) -> dict[str, Any]:
    """What a stage of a mesh needs, as an entry of `stages` in the JSON contract.

    facts: of its layers. held: bytes of weights and of cache of each of its ranks, of which the fullest counts.
    """
    weights, cached = max(held, key=sum)
    entry: dict[str, Any] = {"stage": stage, "weights": weights, "kv_cache": cached, "total": weights + cached}
    if work.gpu_memory is not None:
        entry["free"] = work.gpu_memory - weights - cached
        entry["fits"] = fits(weights + cached, work.gpu_memory)
    tokens = {"token": 1, "step": work.batch, "prompt": work.batch * work.seq}
    entry["all_reduces"] = facts.sums if mesh.tp > 1 else 0
    entry |= {f"bytes_per_{each}": ring_bytes(facts, mesh.tp, count) for each, count in tokens.items()}
    if stage < mesh.pp - 1:
        entry |= {f"handed_on_per_{each}": handed_on(facts, count) for each, count in tokens.items()}
    if mesh.ep > 1:
        alone = replace(facts, blocks=dict.fromkeys(facts.expert_layers, 1))
        entry["experts"] = {
            "layers": len(facts.expert_layers),
            "active": facts.active,
            "bytes_per_token": ring_bytes(alone, mesh.tp, 1),
            "dispatched_per_token": dispatched(facts, mesh, 1),
        }
    return entry


def numbers(
    model: Model, dealt: Deal, weights: Sequence[int], workload: Workload, stages: Stages | None = None, ep: int = 1
) -> dict[str, Any]:
    """The `numbers` object of the plan's JSON.

    weights: bytes of tensors of each rank. ep: among how many ranks of a stage experts are dealt whole.
    `communication` is what a rank sends of a stage with the most all-reduces.
    """
    facts, mesh = traits(model), replace(dealt.mesh, ep=ep)
    ranks = []
    held = list(zip(weights, cache_bytes(model, facts, dealt, workload, stages), strict=True))
    for rank, (own, cached) in enumerate(held):
        entry: dict[str, Any] = {"rank": rank, "weights": own, "kv_cache": cached, "total": own + cached}
        if workload.gpu_memory is not None:
            entry["free"] = workload.gpu_memory - own - cached
            entry["fits"] = fits(own + cached, workload.gpu_memory)
        ranks.append(entry)
    cache = {"layers": facts.layers, "caches": facts.cached, "axis": facts.cache_axis, "latent": facts.latent or None}
    cache |= {"dtype": workload.cache_dtype(facts.cache_dtype), "window": facts.window}
    each = [facts.of(layers) for layers in stages.ranges] if stages else [facts]
    needs = []
    for stage, own_facts in enumerate(each):
        need = stage_needs(own_facts, mesh, stage, held[stage * mesh.tp : (stage + 1) * mesh.tp], workload)
        needs.append(need | ({"layers": list(stages.ranges[stage])} if stages else {}))
    most = max(needs, key=lambda need: need["all_reduces"])
    sent: dict[str, Any] = {"all_reduces": most["all_reduces"], "hidden": facts.hidden, "dtype": facts.dtype}
    sent |= {key: most[key] for key in ("bytes_per_token", "bytes_per_step", "bytes_per_prompt")}
    if stages:
        sent |= {key: value for key, value in needs[0].items() if key.startswith("handed_on")}
    if workload.bandwidth is not None:
        sent["bandwidth"] = workload.bandwidth
        sent["seconds_per_token"] = workload.batch * most["bytes_per_token"] / workload.bandwidth
        sent["seconds_per_prompt"] = most["bytes_per_prompt"] / workload.bandwidth
    asked = {"batch": workload.batch, "seq": workload.seq, "gpu_memory": workload.gpu_memory, "usable": USABLE}
    return {**asked, "kv_cache": cache, "ranks": ranks, "stages": needs, "communication": sent}


def _room(rank: Mapping[str, Any], memory: int) -> str:
    """Whether a rank fits, and by how much."""
    if rank["free"] < 0:
        return f"does not fit in {human_bytes(memory)}, {human_bytes(-rank['free'])} too much"
    left = f"{human_bytes(rank['free'])} of {human_bytes(memory)} left"
    return f"fits, {left}" if rank["fits"] else f"too tight, {left}: leave {1 - USABLE:.0%} for activations"


def _sizes(sent: Mapping[str, Any], what: str) -> str:
    """How much is sent for a token, for a prompt, and for a decoding step of several sequences."""
    token, step, prompt = (sent[f"{what}_per_{each}"] for each in ("token", "step", "prompt"))
    rest = f"{human_bytes(step)} a step, {human_bytes(prompt)} for the prompts" if step != token else ""
    return f"{human_bytes(token)} a token, {rest or f'{human_bytes(prompt)} a prompt'}"


def number_lines(found: Mapping[str, Any]) -> list[str]:
    """The `numbers` object for people: a line for ranks that are alike, then what the ranks tell each other."""
    texts = []
    for _, ranks in groupby(found["ranks"], key=lambda rank: {**rank, "rank": None}):
        equal, *others = ranks
        which = f"ranks {equal['rank']}-{others[-1]['rank']}, each" if others else f"rank {equal['rank']}"
        room = f": {_room(equal, found['gpu_memory'])}" if "free" in equal else ""
        weights, cached, total = (human_bytes(equal[key]) for key in ("weights", "kv_cache", "total"))
        texts.append(f"{which}: {weights} weights + {cached} KV cache = {total}{room}")
    cache, sent = found["kv_cache"], found["communication"]
    work = f"batch {found['batch']} x {found['seq']} tokens"
    several = f" with {cache['caches']} caches" if cache["caches"] != cache["layers"] else ""
    texts.append(f"KV cache: {work}, {cache['layers']} layers{several}, {cache['dtype']}")
    if cache["latent"]:
        texts.append(f"latent attention: {cache['latent']} numbers a token and layer, whole on each rank")
    if cache["window"] and cache["window"] < found["seq"]:
        texts.append(f"sliding window of {cache['window']}: counted in full; an engine that keeps no more needs less")
    if sent["all_reduces"] and len(found["stages"]) == 1:
        each = f"{sent['all_reduces']} all-reduces of {sent['hidden']} numbers a token"
        texts.append(f"each rank sends: {_sizes(sent, 'bytes')} ({each}, {sent['dtype']}, in a ring)")
    for stage in found["stages"] if len(found["stages"]) > 1 else ():
        first, last = stage["layers"]
        weights, cached = human_bytes(stage["weights"]), human_bytes(stage["kv_cache"])
        does = [f"fullest rank {weights} weights + {cached} KV cache"]
        if stage["all_reduces"]:
            does.append(f"each sends {_sizes(stage, 'bytes')} ({stage['all_reduces']} all-reduces in a ring)")
        if "handed_on_per_token" in stage:
            does.append(f"hands on {_sizes(stage, 'handed_on')} ({sent['hidden']} numbers, {sent['dtype']})")
        layers = f"layers {first}-{last - 1}" if last - first > 1 else f"layer {first}"
        texts.append(f"stage {stage['stage']}, {layers}: {'; '.join(does)}")
    if experts := [stage["experts"] for stage in found["stages"] if "experts" in stage]:
        most = max(experts, key=lambda each: int(each["layers"]))
        summed = f"{human_bytes(most['bytes_per_token'])} a token of that for {most['layers']} layers of them"
        texts.append(f"whole experts, added up over the ranks: {summed}")
        if instead := most["dispatched_per_token"]:
            of = f"its {most['active']} experts"
            texts.append(f"an all-to-all that sends a token to {of} alone would be {human_bytes(instead)} a token")
    if sent["all_reduces"] and "bandwidth" in sent:
        token, prompt = sent["seconds_per_token"] * 1e6, sent["seconds_per_prompt"] * 1e3
        times = f"{prompt:.3g} ms for the prompts, {token:.3g} us a decoding step"
        texts.append(f"at {human_bytes(sent['bandwidth'])}/s: {times}, latency not counted")
    return texts
