"""transformers' own model as the reference, for those who trust neither side of ours."""

from __future__ import annotations

from pathlib import Path

import torch

from tpshard.errors import UnsupportedError
from tpshard.verifier.backend import Reference
from tpshard.verifier.builtin.backend import DecoderBackend
from tpshard.verifier.criteria import no_tf32
from tpshard.verifier.report.verdict import Tier

# Its norms and rotary tables are float32 inside a float64 model, which is 2e-7 off.
LIMIT = 1e-5


def against_transformers(setup: DecoderBackend, source: Path) -> Tier:
    """Logits of the sharded model in float64 against those of transformers' model of the source."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UnsupportedError("this needs transformers", hint="pip install transformers") from None
    if setup.layers is not None:
        return Tier("transformers", "inconclusive", reason="transformers runs all layers, and --layers asks for some")
    # Its eager attention adds Falcon's ALiBi twice; SDPA does not, but cannot cap Gemma's scores.
    attention = "eager" if setup.family.softcap is not None else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float64, attn_implementation=attention, local_files_only=True
    )
    model.train(False).to(setup.device)
    with no_tf32(), torch.no_grad():
        wanted = model(setup.prompt).logits
        errors = setup.errors(torch.float64, Reference(wanted))
    failed = max(errors) > LIMIT
    return Tier(
        name="transformers",
        status="fail" if failed else "pass",
        thresholds={"relative_error": LIMIT},
        metrics={"relative_error": max(errors)},
        reason=f"the logits differ from transformers' by {max(errors):.1e} (limit {LIMIT:.0e})" if failed else None,
    )
