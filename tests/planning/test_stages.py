"""Which stage a tensor is on."""

from __future__ import annotations

import pytest

from tpshard.errors import UnsupportedError, UsageError
from tpshard.planning.stages import Layers, even_layers, stages
from tpshard.rules.architecture import Architecture, all_builtin

LLAMA = Layers("model.layers.", 5, ("model.embed_tokens",))


def test_layers_are_dealt_as_vllm_deals_them() -> None:
    """`get_pp_indices` of vLLM 0.32, run once: the rest goes one each to the stages before the last, backwards."""
    assert even_layers(8, 2) == (4, 4)
    assert even_layers(5, 2) == (3, 2)
    assert even_layers(10, 4) == (2, 3, 3, 2)
    assert even_layers(7, 4) == (2, 2, 2, 1)
    assert even_layers(61, 4) == (15, 15, 16, 15)
    for count in range(1, 40):
        for pp in range(1, count + 1):
            sizes = even_layers(count, pp)
            assert len(sizes) == pp and sum(sizes) == count and max(sizes) - min(sizes) <= 1


def test_a_tensor_is_on_the_stage_of_its_layer() -> None:
    found = stages(LLAMA, 2, None)
    assert found.ranges == ((0, 3), (3, 5))

    def of(name: str) -> tuple[int, ...]:
        return found.of(name, name)

    assert of("model.embed_tokens.weight") == (0,)
    assert of("model.layers.0.mlp.up_proj.weight") == of("model.layers.2.mlp.up_proj.weight") == (0,)
    assert of("model.layers.3.mlp.experts.7.up_proj.weight") == of("model.layers.4.input_layernorm.weight") == (1,)
    assert of("model.norm.weight") == of("lm_head.weight") == of("score.weight") == (1,)
    assert of("model.layers.5.eh_proj.weight") == of("mtp.fc.weight") == (1,), "they predict further tokens"
    assert of("model.embed_tokens_per_layer.weight") == (1,), "another module than the one whose name it begins with"
    tied = stages(LLAMA, 3, (1, 1, 3), ["model.embed_tokens"])
    assert tied.of("model.embed_tokens.weight", "model.embed_tokens.weight") == (0, 2)
    assert tied.of("embed_tokens.weight", "model.embed_tokens.weight") == (0, 2), "by the name that the rules have"


def test_what_is_no_pipeline_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="5 layers on 6 stages: a layer is never cut"):
        stages(LLAMA, 6, None)
    with pytest.raises(UsageError, match="--pp-layers 2,2 are 4 layers, and the model has 5") as error:
        stages(LLAMA, 2, (2, 2))
    assert error.value.hint == "for example --pp-layers 3,2"
    for unknown in (None, Layers("model.layers.", 5)):
        with pytest.raises(UnsupportedError, match="nothing says which modules come before the layers"):
            stages(unknown, 2, None)


@pytest.mark.parametrize("architecture", [a for a in all_builtin() if a.before], ids=lambda each: each.name)
def test_every_module_outside_of_layers_has_its_side(architecture: Architecture) -> None:
    """What comes first is an embedding or made of one; what comes last is a norm, a head, or a draft's."""
    patterns = {p.removesuffix("?") for rule in architecture.rules for p in rule.patterns}
    within = architecture.within(patterns)
    layers = Layers(within, 4, architecture.before)
    assert within.endswith(("layers.", ".h.", ".blocks."))
    for pattern in patterns:
        if "*" in pattern:
            continue
        if layers.position(f"{pattern}.weight") < 0:
            said = (
                "embed",
                "wte",
                "wpe",
                "per_layer",
                "project_in",
                "vision",
                "mm_projector",
                "patch_merger",
                "lerope",
            )
        else:
            said = ("mtp", "norm", "ln_f", "head", "unembed", "embed_out", "project_out", "inv_freq", "output")
        assert any(word in pattern for word in said), pattern
