"""config.json under the old and new spellings of its keys, and the rotary positions that it asks for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tpshard.errors import CorruptError, UnsupportedError
from tpshard.verifier.families.family import Family, Rope


class Config:
    """Look-up in config.json under the old and new spellings of a key."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def get(self, *keys: str, default: Any = None) -> Any:
        """The first value that is neither absent nor null."""
        for key in keys:
            if self.values.get(key) is not None:
                return self.values[key]
        return default

    def number(self, *keys: str, default: int | None = None) -> int:
        value = self.get(*keys, default=default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            what = f"config.json: {keys[0]} must be a whole number above 0"
            raise CorruptError(what, expected="a number", found=repr(value))
        return value

    def layer_windows(self, layers: int, window: Any, sliding: Callable[[int], bool]) -> tuple[int | None, ...]:
        kinds = self.get("layer_types")
        if kinds is None:
            kinds = ["sliding_attention" if sliding(i) else "full_attention" for i in range(layers)]
        require_length("layer_types", kinds, layers)
        return tuple(int(window) if kind == "sliding_attention" and window else None for kind in kinds)


SIZES = (("hidden_size",), ("num_hidden_layers",), ("num_attention_heads",))
"""The keys of hidden size, layers and heads, each under its names in the order in which they are looked for."""

MOST_LAYERS = 10_000
"""A config that says more is not believed: something is kept for each layer."""


def require_length(key: str, kinds: Sequence[Any], layers: int) -> None:
    """CorruptError unless there is a kind for each layer."""
    if len(kinds) != layers:
        raise CorruptError(f"config.json: {key} is not of the model's length", expected=layers, found=len(kinds))


def sized(
    config: Config, model_type: str, keys: Sequence[Sequence[str]] = SIZES, head_dim: int | None = None
) -> Family:
    """A Family of the sizes that stand under these keys: as many KV heads as heads, and no window.

    `head_dim` is the default of the key of that name, 0 for the hidden size by the heads; None where there is no key.
    """
    width, depth, count = (config.number(*names) for names in keys)
    if depth > MOST_LAYERS:
        what, expected = f"config.json: {keys[1][0]} is that of no model", f"at most {MOST_LAYERS:,}"
        raise CorruptError(what, expected=expected, found=f"{depth:,}")
    head = width // count if head_dim is None else config.number("head_dim", default=head_dim or width // count)
    vocab, scales = config.number("vocab_size"), (head**-0.5,) * depth
    return Family(model_type, width, depth, count, count, head, vocab, windows=(None,) * depth, scales=scales)


ROPE_KINDS = ("default", "linear", "dynamic", "llama3", "yarn")


def rope_of(config: Config, head_dim: int, *, theta_key: str = "rope_theta", share: float = 1.0) -> Rope:
    """Rotary positions from `rope_parameters`, or from the older `rope_theta` and `rope_scaling`."""
    options = dict(config.get("rope_parameters", "rope_scaling", default={}))
    kind = options.get("rope_type") or options.get("type") or "default"
    if kind not in ROPE_KINDS:
        hint = f"supported: {', '.join(ROPE_KINDS)}"
        raise UnsupportedError(f"rotary scaling {kind!r} is not supported by verify", hint=hint)
    max_positions = config.number("max_position_embeddings", default=2048)
    original = config.get("original_max_position_embeddings") or options.get("original_max_position_embeddings")
    original = int(original or max_positions)
    factor = options.get("factor")
    if factor is None:
        if kind not in ("default", "yarn"):
            raise CorruptError(f"config.json: rotary scaling {kind!r} without a factor")
        factor = max_positions / original
    optional = {
        key: options[key]
        for key in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "truncate", "attention_factor")
        + ("mscale", "mscale_all_dim")
        if options.get(key) is not None
    }
    return Rope(
        dims=int(head_dim * float(options.get("partial_rotary_factor", share))),
        theta=float(options.get("rope_theta") or config.get(theta_key, default=10000.0)),
        max_positions=max_positions,
        kind=kind,
        factor=float(factor),
        original_positions=original,
        **optional,
    )
