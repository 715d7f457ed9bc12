"""What quantisers wrote, dequantised by the verifier, against what their own code makes of it; see tests/quantised."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.helpers.paths import TESTS
from tpshard.inputs.checkpoint import open_checkpoint
from tpshard.verifier.dequantise.find import recipes
from tpshard.verifier.dequantise.view import DequantisedWeights
from tpshard.verifier.ranks.open import FileWeights

FIXTURES, REFERENCES = TESTS / "quantised" / "fixtures", TESTS / "quantised" / "references"


def dequantised(name: str) -> DequantisedWeights:
    checkpoint = open_checkpoint(FIXTURES / name)
    weights = FileWeights(checkpoint.tensors)
    found = recipes(weights, checkpoint.quantisation or {})
    for weight, recipe in found.items():
        # What inputs are multiplied by, the verifier takes into the weight; the quantisers' code does not.
        stored = {role: name for role, name in recipe.stored.items() if role != "input"}
        found[weight] = replace(recipe, stored=stored)
    return DequantisedWeights(weights, found, weights)


def stored_form(weight: Tensor, shape: list[int]) -> Tensor:
    """The weight as [expert, out, in], which transformers turns round for gpt-oss."""
    return weight if list(weight.shape) == shape else weight.mT


@pytest.mark.parametrize("name", sorted(path.stem for path in REFERENCES.glob("*.json")))
def test_every_module_is_what_the_quantisers_code_makes_of_it(name: str) -> None:
    reference = json.loads((REFERENCES / f"{name}.json").read_text())
    view, limit = dequantised(name), reference["relative_tolerance"]
    sampled = load_file(REFERENCES / f"{name}.safetensors") if limit else {}
    names = {weight: weight.removesuffix(".weight") for weight in view.recipes}
    assert set(names.values()) == set(reference["modules"])
    for weight, module in names.items():
        entry = reference["modules"][module]
        found = stored_form(view.get(weight), entry["shape"])
        assert list(found.shape) == entry["shape"], module
        if limit:
            rows = found.reshape(-1, found.shape[-1])[entry["rows"]]
            apart = (rows - sampled[module].double()).abs()
            assert bool((apart <= limit * rows.abs().clamp(min=float(rows.abs().max()) * 1e-6)).all()), module
        else:
            values = (found.to(torch.float32) + 0.0).contiguous()
            assert hashlib.sha256(values.numpy().tobytes()).hexdigest() == entry["sha256"], module
