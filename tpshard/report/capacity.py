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
_LATENT = re.compile(r"kv_a_proj_with_mqa\.(?:weight|weight_packed|scales)$")
"""Makes what DeepSeek's latent attention caches: the compressed key and value of all heads, and one rotary key."""


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
    hidden elements, and each such layer caches keys and values. dtype: of activations. cache_dtype: of keys and values.
    cache_axis: the axis whose units have a key and a value each; None with latent attention, of which `latent` elements
    are cached by every rank. window: of sliding attention.
    """

    blocks: Mapping[int, int]
    hidden: int
    dtype: str
    cache_dtype: str
    cache_axis: str | None
    latent: int
    window: int | None

    @property
    def layers(self) -> int:
        """How many layers cache keys and values."""
        return len(self.blocks)

    @property
    def sums(self) -> int:
        """How many all-reduces there are."""
        return sum(self.blocks.values())

    def of(self, layers: Range) -> Self:
        """The traits of some of the layers."""
        return replace(self, blocks={layer: count for layer, count in self.blocks.items() if layer in range(*layers)})


def traits(model: Model) -> Traits:
    """Read a model's traits off its cuts and shapes. Of a quantised one the config names the dtype of activations.

    Layers beyond the config's count predict further tokens (DeepSeek V3); decoding does not need them.
    """
    config = model.config if model.text_config is None else model.text_config
    count = config.get("num_hidden_layers")
    blocks: set[tuple[int, str]] = set()
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
            blocks |= {(layer, found[1]) for layer in layers if not isinstance(count, int) or layer < count}
            hidden = max(hidden, _out(tensor))
        elif _LATENT.search(tensor.name):
            latent = tensor.shape[-1 if tensor.name.endswith("scales") else 0]
    activations = max(sizes, key=lambda dtype: sizes[dtype]) if sizes else "BF16"
    if model.quantisation:
        named = next(
            (str(each[key]) for each in (config, model.config) for key in ("dtype", "torch_dtype") if each.get(key)), ""
        )
        activations = DTYPE_NAMES.get(named, activations)
    window = config.get("sliding_window")
    return Traits(
        blocks=Counter(layer for layer, _ in blocks),
        hidden=hidden,
        dtype=activations,
        cache_dtype=model.quantisation.get("kv_cache") or activations,
        cache_axis=None if latent else _cached(model.axes),
        latent=latent,
        window=window if isinstance(window, int) and config.get("use_sliding_window") is not False else None,
    )


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
    """What each rank caches of `batch` sequences of `seq` tokens: keys and values of its KV heads and layers."""
    layers = [facts.of(each).layers for each in stages.ranges] if stages else [facts.layers]
    bits = workload.batch * workload.seq * DTYPE_BITS[workload.cache_dtype(facts.cache_dtype)]
    found = []
    for rank in range(dealt.mesh.size):
        first, last = (0, 1) if facts.cache_axis is None else dealt.of(facts.cache_axis, rank)
        each = facts.latent if facts.cache_axis is None else 2 * model.axes[facts.cache_axis].unit
        found.append(bits * layers[dealt.mesh.coordinate(rank)[0]] * each * (last - first) // 8)
    return found


def ring_bytes(facts: Traits, tp: int, tokens: int) -> int:
    """What each rank sends for `tokens` tokens: 2 (n - 1) / n of the activations, for every row-parallel sum."""
    return facts.sums * tokens * facts.hidden * DTYPE_BITS[facts.dtype] // 8 * 2 * (tp - 1) // tp


def fits(total: int, gpu_memory: int) -> bool:
    """Whether weights and cache leave a device room to work in."""
    return total <= USABLE * gpu_memory


def numbers(
    model: Model, dealt: Deal, weights: Sequence[int], workload: Workload, stages: Stages | None = None
) -> dict[str, Any]:
    """The `numbers` object of the plan's JSON. weights: bytes of tensors of each rank.

    What ranks send is that of a stage with the most all-reduces; stages hand on the activations of each token besides.
    """
    facts, tp = traits(model), dealt.mesh.tp
    ranks = []
    caches = cache_bytes(model, facts, dealt, workload, stages)
    for rank, (held, cached) in enumerate(zip(weights, caches, strict=True)):
        entry: dict[str, Any] = {"rank": rank, "weights": held, "kv_cache": cached, "total": held + cached}
        if workload.gpu_memory is not None:
            entry["free"] = workload.gpu_memory - held - cached
            entry["fits"] = fits(held + cached, workload.gpu_memory)
        ranks.append(entry)
    cache = {"layers": facts.layers, "axis": facts.cache_axis, "latent": facts.latent or None}
    cache |= {"dtype": workload.cache_dtype(facts.cache_dtype), "window": facts.window}
    if stages:
        facts = max(map(facts.of, stages.ranges), key=lambda each: each.sums)
    per_token, per_prompt = ring_bytes(facts, tp, 1), ring_bytes(facts, tp, workload.batch * workload.seq)
    sent: dict[str, Any] = {"all_reduces": facts.sums if tp > 1 else 0, "hidden": facts.hidden, "dtype": facts.dtype}
    sent |= {"bytes_per_token": per_token, "bytes_per_prompt": per_prompt}
    if stages:
        sent["handed_on_per_token"] = facts.hidden * DTYPE_BITS[facts.dtype] // 8
    if workload.bandwidth is not None:
        sent["bandwidth"] = workload.bandwidth
        sent["seconds_per_token"] = workload.batch * per_token / workload.bandwidth
        sent["seconds_per_prompt"] = per_prompt / workload.bandwidth
    asked = {"batch": workload.batch, "seq": workload.seq, "gpu_memory": workload.gpu_memory, "usable": USABLE}
    return {**asked, "kv_cache": cache, "ranks": ranks, "communication": sent}


def _room(rank: Mapping[str, Any], memory: int) -> str:
    """Whether a rank fits, and by how much."""
    if rank["free"] < 0:
        return f"does not fit in {human_bytes(memory)}, {human_bytes(-rank['free'])} too much"
    left = f"{human_bytes(rank['free'])} of {human_bytes(memory)} left"
    return f"fits, {left}" if rank["fits"] else f"too tight, {left}: leave {1 - USABLE:.0%} for activations"


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
    texts.append(f"KV cache: {work}, {cache['layers']} layers, {cache['dtype']}")
    if cache["latent"]:
        texts.append(f"latent attention: {cache['latent']} numbers a token and layer, whole on each rank")
    if cache["window"] and cache["window"] < found["seq"]:
        texts.append(f"sliding window of {cache['window']}: counted in full; an engine that keeps no more needs less")
    if sent["all_reduces"]:
        each = f"{sent['all_reduces']} all-reduces of {sent['hidden']} numbers a token"
        sizes = f"{human_bytes(sent['bytes_per_token'])} a token, {human_bytes(sent['bytes_per_prompt'])} a prompt"
        texts.append(f"each rank sends: {sizes} ({each}, {sent['dtype']}, in a ring)")
    if "handed_on_per_token" in sent:
        each = human_bytes(sent["handed_on_per_token"])
        texts.append(f"each stage hands on: {each} a token ({sent['hidden']} numbers, {sent['dtype']})")
    if sent["all_reduces"] and "bandwidth" in sent:
        token, prompt = sent["seconds_per_token"] * 1e6, sent["seconds_per_prompt"] * 1e3
        times = f"{prompt:.3g} ms for the prompts, {token:.3g} us a decoding step"
        texts.append(f"at {human_bytes(sent['bandwidth'])}/s: {times}, latency not counted")
    return texts
