"""Checkpoints that nest a text model, as vision-language models do: its decoder is split, the rest is replicated.

The text model's own rules apply below the prefix that its tensors have in the checkpoint. The prefix is found from the
names alone and must be the only one below which the decoder is complete. Every tensor below it needs a rule, so that no
part of the decoder is ever taken for a part of the rest.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tpshard.errors import CorruptError, UnsupportedError
from tpshard.planning.axes import Cut
from tpshard.rules.architecture import Architecture, builtin_or_none, find_architecture, given_architecture
from tpshard.rules.classify import Classification, classify, recognise
from tpshard.rules.presence import check_head
from tpshard.rules.quantisation.schemes import Companion, split_name
from tpshard.storage.safetensors import TensorInfo

TEXT_KEYS = ("text_config", "llm_config", "language_config", "transformer_layer_config")
"""The keys under which configs nest the text model's: in transformers, InternVL, DeepSeek-VL2 and speculators."""
THINKER = "thinker"
"""The part of Qwen's omni models that has the text model: `thinker_config` nests its config, beside a talker's."""
_INHERITED = ("tie_word_embeddings", "draft_vocab_size", "mtp_config")
"""Keys that a text config inherits from the outer one if it lacks them; others may mean something else there."""


@dataclass(frozen=True)
class TextConfig:
    """The text model that a config nests, under `key`; None if the outer config itself holds its values.

    part: of the model, which alone is looked at; its name is the beginning of its tensors'.
    """

    model_type: str
    key: str | None
    config: Mapping[str, Any]
    part: str = ""


@dataclass(frozen=True)
class ModelRules:
    """The rules that apply to a checkpoint: to the whole model, or to the text model in it."""

    architecture: Architecture
    config: Mapping[str, Any]
    text: TextConfig | None = None

    def classify(
        self, tensors: Sequence[TensorInfo], quantised: Mapping[str, Companion]
    ) -> tuple[Classification, Mapping[str, Any] | None]:
        """Every tensor's cut, and what the manifest says about a nested text model (plain JSON), if there is one."""
        if self.text is None:
            found = classify(self.architecture, self.config, tensors, quantised=quantised)
            full = (found.full_names.get(tensor.name, tensor.name) for tensor in tensors)
            check_head(self.architecture, self.config, self.config, full)
            return found, None
        prefix = find_prefix(self.architecture, self.text, tensors)
        names = _text_names(self.architecture, self.text, prefix, tensors)
        found = classify(self.architecture, self.text.config, [t for t in tensors if t.name in names], names, quantised)
        full = (found.full_names.get(name, rule) for name, rule in names.items())
        check_head(self.architecture, self.text.config, self.config, full)
        cuts = {tensor.name: found.cuts.get(tensor.name, Cut("replicate")) for tensor in tensors}
        depth = prefix.count(".") or 1
        others = {".".join(t.name.split(".")[:depth]) for t in tensors if t.name not in names}
        entry = {"model_type": self.text.model_type, "config": self.text.key, "prefix": prefix}
        tied = _tied(found.tied, names, prefix, self.architecture)
        layers = found.layers and replace(found.layers, before=(*found.layers.before, *sorted(others)))
        return replace(found, cuts=cuts, tied=tied, layers=layers), {**entry, "replicated": sorted(others)}


def text_config(config: Mapping[str, Any]) -> TextConfig | None:
    """The text model that a config nests, or None. Its model_type is by default `x_text` if the outer one is `x`."""
    outer = config.get("model_type")
    thinker = config.get(f"{THINKER}_config")
    if isinstance(thinker, dict) and (inner := text_config(thinker)):
        return replace(inner, key=f"{THINKER}_config.{inner.key}", part=THINKER)
    for key in TEXT_KEYS:
        if isinstance(inner := config.get(key), dict):
            inherited = {name: config[name] for name in _INHERITED if name in config}
            return TextConfig(str(inner.get("model_type") or f"{outer}_text"), key, inherited | inner)
    # The first configs of some models (Qwen2-VL) have the text model's values at the top, beside `vision_config`.
    return TextConfig(f"{outer}_text", None, config) if isinstance(config.get("vision_config"), dict) else None


def find_rules(config: Mapping[str, Any], rules: str | Path | None, config_path: object) -> ModelRules:
    """The rules for a config: those for its own model_type, or else for the text model that it nests.

    rules: what --rules gives. A built-in architecture by name is for the text model, where the config nests one.
    """
    text = text_config(config)
    if text is None:
        return ModelRules(find_architecture(config, rules, config_path), config)
    if rules is not None:
        architecture, by_name = given_architecture(rules)
        whole = config.get("model_type") in architecture.model_types
        if whole or not (by_name or text.model_type in architecture.model_types):
            return ModelRules(find_architecture(config, rules, config_path), config)
        return ModelRules(architecture, config, text)
    outer = str(config.get("model_type"))
    if own := builtin_or_none(outer):
        # One that has the text model's values itself has the vision model's tensors beside the text model's.
        return ModelRules(own, config, replace(text, model_type=outer) if text.key is None else None)
    if of_text := builtin_or_none(text.model_type):
        return ModelRules(of_text, config, text)
    if text.key is None:
        return ModelRules(find_architecture(config, None, config_path), config)
    what = f"no rules for model_type {config.get('model_type')!r}, nor for its text model {text.model_type!r}"
    hint = "`tpshard archs draft MODEL` writes rules for the text model to start from; --rules FILE takes them"
    raise UnsupportedError(what, path=config_path, hint=hint)


def find_prefix(architecture: Architecture, text: TextConfig, tensors: Sequence[TensorInfo]) -> str:
    """The shortest prefix that has the whole decoder below it and nothing else."""
    below: dict[str, list[str]] = {}
    for tensor in tensors:
        parted = not text.part or tensor.name.startswith(f"{text.part}.")
        for prefix in _prefixes(tensor.name) if parted else ():
            below.setdefault(prefix, []).append(tensor.name[len(prefix) :])
    complete: dict[str, list[str]] = {}  # prefix -> names below it that have no rule
    nearest: tuple[int, str, list[str]] | None = None
    for prefix, names in below.items():
        missing, unknown = recognise(architecture, text.config, names)
        if not missing:
            complete[prefix] = unknown
        elif nearest is None or len(missing) < nearest[0]:
            nearest = (len(missing), prefix, missing)
    # Only the longest: of two nested prefixes, both see the same decoder, one with more of its path.
    inner = [prefix for prefix in complete if not any(p != prefix and p.startswith(prefix) for p in complete)]
    what = f"the text model ({text.model_type}, {architecture.name} rules)"
    if not inner:
        assert nearest is not None
        raise CorruptError(
            f"{what} is not complete under any prefix of the tensors' names",
            expected=", ".join(nearest[2][:3]),
            found=f"the most under {nearest[1]!r}",
            hint="is the checkpoint complete, and does its config name the right text model?",
        )
    if len(inner) > 1:
        several = f"{what} is there {len(inner)} times, under {', '.join(map(repr, sorted(inner)))}"
        hint = "write rules for the model as a whole and give them with --rules FILE"
        raise UnsupportedError(several, expected="one decoder", hint=hint)
    whole = [prefix for prefix in sorted(complete, key=len) if inner[0].startswith(prefix) and not complete[prefix]]
    if not whole:
        name = inner[0] + complete[inner[0]][0]
        lacking = f"{name} is a part of the text model, and no {architecture.name} rule matches it"
        hint = "a decoder's tensor is never replicated for want of a rule: write one, --rules FILE takes it"
        raise UnsupportedError(lacking, tensor=name, hint=hint)
    return whole[0]


def _prefixes(name: str) -> Iterable[str]:
    """What may precede a decoder in a name, up to the first number: `""`, `a.` and `a.b.` for `a.b.0.c.weight`."""
    end = 0
    yield ""
    for component in name.split(".")[:-1]:
        if component.isdecimal():
            return
        end += len(component) + 1
        yield name[:end]


def _text_names(
    architecture: Architecture, text: TextConfig, prefix: str, tensors: Sequence[TensorInfo]
) -> dict[str, str]:
    """The decoder's tensors: name → name in the rules. The head may have a shorter prefix than the layers."""
    names = {t.name: t.name[len(prefix) :] for t in tensors if t.name.startswith(prefix)}
    for start in _prefixes(prefix):
        rest = [t.name[len(start) :] for t in tensors if t.name not in names and t.name.startswith(start)]
        _, unknown = recognise(architecture, text.config, rest, exact=True)
        names |= {start + name: name for name in set(rest).difference(unknown)}
    return names


def _tied(tied: Mapping[str, str], names: Mapping[str, str], prefix: str, architecture: Architecture) -> dict[str, str]:
    """The tied modules under the names that they have in the checkpoint."""
    base = architecture.prefix
    stored = {split_name(rule.removeprefix(base))[0]: split_name(name)[0] for name, rule in names.items()}
    # A head that is not stored belongs beside the base model: inside the prefix where that says `model.` too.
    beside = prefix if any(rule.startswith(base) for rule in names.values()) else ""
    return {
        stored.get(head, beside + head): stored.get(to.removeprefix(base), prefix + to) for head, to in tied.items()
    }
