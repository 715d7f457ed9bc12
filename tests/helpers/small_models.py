"""Small models as the verifier sees them: config, tensors, token ids, and our decoder run on any number of ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.helpers.checkpoints import VOCAB, build
from tests.helpers.cut import cut, facts
from tpshard.verifier.builtin.decoder import Decoder
from tpshard.verifier.builtin.layers import Cache
from tpshard.verifier.families.configs import describe
from tpshard.verifier.group import Group, Threads
from tpshard.verifier.ranks.weights import InMemory

torch.set_num_threads(1)
CPU = torch.device("cpu")
Tensors = Mapping[str, Tensor]


def reference(name: str) -> Any:
    """transformers' own model in float32; Falcon by SDPA, since its eager path adds ALiBi twice."""
    return build(name, dtype="float32", attn_implementation="sdpa" if name.startswith("falcon") else "eager")


@cache
def source(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A variant's config and its stored tensors, a tied head left out."""
    model = reference(name)
    tensors = {key: value.detach() for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return json.loads(model.config.to_json_string()), tensors


def shards(name: str, tp: int, parts: Sequence[int] | None = None) -> list[dict[str, Tensor]]:
    config, tensors = source(name)
    return cut(tensors, config, tp, parts)


def can_be_uneven(name: str) -> bool:
    """Whether 3:1 is possible: KV heads dealt in fours, or one that all ranks hold."""
    kv = facts(source(name)[0])[1]
    return kv == 1 or kv % 4 == 0


def tokens(length: int = 24, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(
    config: Mapping[str, Any],
    ranks: Sequence[Tensors],
    ids: Tensor,
    *,
    prefill: int | None = None,
    dtype: torch.dtype = torch.float64,
    sequence_parallel: bool = False,
) -> list[Tensor]:
    """Every rank's logits; after `prefill` tokens the rest goes through the KV cache one by one."""
    family = describe(config)

    def work(group: Group) -> Tensor:
        decoder = Decoder(
            family,
            InMemory(ranks[group.rank]),
            group,
            dtype=dtype,
            device=CPU,
            sequence_parallel=sequence_parallel,
        )
        if prefill is None:
            return decoder.forward(ids)
        kept = Cache()
        steps = [ids[:, :prefill], *(ids[:, i : i + 1] for i in range(prefill, ids.shape[1]))]
        return torch.cat([decoder.forward(step, kept) for step in steps], 1)

    return Threads(len(ranks)).run(work)


def relative(x: Tensor, reference: Tensor) -> float:
    """Relative Frobenius error."""
    return float((x - reference).norm() / reference.norm())
