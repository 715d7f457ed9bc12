"""From config.json to the Family that its model_type names."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from tpshard.errors import CorruptError, UnsupportedError
from tpshard.verifier.families.config import Config
from tpshard.verifier.families.family import ACTIVATIONS, Family
from tpshard.verifier.families.gpt_like import bloom, falcon, gpt2, gpt_bigcode, gpt_neo, gpt_neox, gptj, opt
from tpshard.verifier.families.llama_like import gemma2, internlm2, llama, mistral, qwen

_TIED = ("gemma2", "gpt2", "gpt_bigcode", "gpt_neo", "bloom", "falcon", "RefinedWeb", "RefinedWebModel", "opt")
"""Model types whose head is the embedding unless the config says otherwise."""
_NAMED_SO = (llama, internlm2, mistral, gemma2, gpt2, gpt_bigcode, gpt_neo, gptj, gpt_neox, bloom, falcon, opt)
FAMILIES: Mapping[str, Callable[[Config, str], Family]] = {
    **{family.__name__: family for family in _NAMED_SO},
    **{"qwen2": qwen, "qwen3": qwen, "RefinedWeb": falcon, "RefinedWebModel": falcon},
}
"""What describes a model, by its model type."""
_OTHERWISE = (
    "`--engine transformers` runs every class that transformers has, `--rules NAME` computes it as another architecture"
    " with the same tensors, `--tier bytes` compares the files"
)


def describe(config: Mapping[str, Any]) -> Family:
    """The family that a parsed config.json describes.

    Raises UnsupportedError for a model_type that is not known, CorruptError for a config that lacks or contradicts.
    """
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise UnsupportedError(f"verify does not know the model type {model_type!r}", hint=_OTHERWISE)
    try:
        known = Config(config)
        tied = bool(known.get("tie_word_embeddings", default=model_type in _TIED))
        family = replace(FAMILIES[model_type](known, model_type), tied=tied)
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CorruptError(f"config.json does not describe a {model_type}", found=reason) from None
    if family.heads % family.kv_heads:
        heads, found = f"{family.heads} heads", f"{family.kv_heads} KV heads"
        raise CorruptError("config.json: the KV heads do not divide the heads", expected=heads, found=found)
    if str(family.activation) not in ACTIVATIONS:
        hint = f"known: {', '.join(ACTIVATIONS)}"
        raise UnsupportedError(f"verify does not know the activation {family.activation!r}", hint=hint)
    return family
