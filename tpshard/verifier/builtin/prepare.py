"""What is decided and loaded before a number is computed: prompt, layers, tokens, memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tpshard.errors import UnsupportedError
from tpshard.verifier.backend import Canaries, EngineRun, JudgeTier, OpenedSet, Reference
from tpshard.verifier.builtin.backend import DecoderBackend
from tpshard.verifier.builtin.memory import BLOCK_BYTES, Load, estimate, load
from tpshard.verifier.builtin.partition import require_described
from tpshard.verifier.builtin.store import Store
from tpshard.verifier.canaries import exact_canaries, native_canaries
from tpshard.verifier.criteria import no_tf32
from tpshard.verifier.dequantise.sides import dequantised, quantised
from tpshard.verifier.families.configs import FAMILIES, describe
from tpshard.verifier.group import Processes
from tpshard.verifier.hf.config import covers, model_config
from tpshard.verifier.hf.skeleton import fill, frame_of, skeleton
from tpshard.verifier.options import VerifyOptions
from tpshard.verifier.prompt import decide, prompt_ids, require_finite
from tpshard.verifier.ranks.megatron import open_set
from tpshard.verifier.ranks.open import (
    FileWeights,
    RankSet,
    main_dtype,
    needed,
    open_source,
    parameters,
    require_floats,
    resident,
)
from tpshard.verifier.ranks.translate import source_of, translated
from tpshard.verifier.ranks.weights import Weights
from tpshard.verifier.report.verdict import Tier
from tpshard.verifier.tiers import exact, native
from tpshard.verifier.weights_tier import judge_weights, with_idle_said

TAUGHT_BYTES = 1 << 30
"""A source that is not kept in memory, and is larger than this, is not read once a token to choose the next one."""


# The norms and rotary tables of transformers' models are float32 inside a float64 model, which is 2e-7 off.
TRANSFORMERS_LIMIT = 1e-5


@dataclass(frozen=True)
class Case:
    """Shards and source, opened and found to be of one model, and all that was decided before a number is computed."""

    opened: OpenedSet
    options: VerifyOptions
    setup: DecoderBackend
    load: Load
    tokens: int
    taught: bool = True
    """Whether the tokens to decode are the reference's own choices, else they come from the seed."""
    decoded: list[Tensor] = field(default_factory=list)
    """The steps of tokens, once they are chosen."""


def open_both(options: VerifyOptions, source: Path) -> tuple[RankSet, Mapping[str, Any], FileWeights]:
    """Shards under the source's names, its config and its tensors; of quantised modules, the weights that they make."""
    opened = open_set(options.shards)
    how = {"allow_pickle": options.allow_pickle, "follow_symlinks": options.follow_symlinks}
    config, weights = open_source(source, cast=opened.cast, **how)
    if options.model_type is not None and not (_runs(config) and _runs({"model_type": options.model_type})):
        computed = {"model_type": options.model_type}
        what = f"a model_type {config.get('model_type')!r} is computed as {options.model_type}, because --rules says so"
        opened = replace(opened, config={**opened.config, **computed}, warnings=(*opened.warnings, what))
        config = {**config, **computed}
    found = quantised(opened, weights, config, source)
    opened, weights = source_of(translated(opened, weights), weights)
    if found:
        opened, weights = dequantised(opened, weights, found)
    for each in (weights, *opened.ranks):
        require_floats(each, parameters(each))
    return opened, config, weights


def _runs(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") in FAMILIES or covers(config)


def prepare(opened: OpenedSet, options: VerifyOptions) -> Case:
    """Find out whether shards and source are of one model, and decide prompt, layers and tokens."""
    shards, source, team = opened.shards, opened.source, opened.team
    family, positions = describe(opened.config), None
    require_described(family, opened.config, source)
    if family.positions is not None:
        store = Store(source, family, torch.float64, torch.device("cpu"))
        positions = store.matrix_shape(family.positions)[0] - family.position_offset
    # What stands in config.json alone is held against the source's by every tier, which says what differs.
    of_shards = describe(shards.config)
    same = replace(of_shards, tied=family.tied, biases=family.biases, bare_norms=family.bare_norms) == family
    ids, layers, tokens = decide(
        opened, options, same=same, vocab=family.vocab, layers=family.layers, positions=positions
    )
    parallel = options.sequence_parallel
    setup = DecoderBackend(source, shards.ranks, team, ids, opened.device, family, layers, sequence_parallel=parallel)
    size = load(source, [shards.ranks[rank] for rank in team.here], setup.compared)
    return Case(opened, options, setup, size, tokens)


def choose(case: Case) -> Case:
    """Decide what is kept in memory, the same on all ranks, and say how much that is."""
    setup, opened, options = case.setup, case.opened, case.options
    team, where = setup.team, setup.device
    apart = isinstance(team, Processes)
    batch, length = setup.prompt.shape
    computed, widened = "native" in options.computed, where.type == "cpu" and not apart
    here, positions = len(team.here), batch * (length + case.tokens)
    need = estimate(
        setup.family, case.load, here=here, native=computed, positions=positions, widened=widened, apart=apart
    )
    streamed = any(team.run(lambda group: need.choose(options.stream, where, opened.sharing)))
    amount = need.streamed if streamed else need.resident
    how = "streaming all weights" if streamed else "keeping the shards" if apart else "keeping all weights"
    opened.say(f"{how}: about {amount / 1e9:.1f} GB of memory on {where.type} in each process (an estimate)")
    setup = replace(setup, block_bytes=BLOCK_BYTES if streamed or apart else None, keep_ranks=apart and not streamed)
    taught = (not streamed and not apart) or case.load.source_bytes <= TAUGHT_BYTES
    return replace(case, setup=setup, taught=taught)


def _kept(case: Case, weights: FileWeights, dtype: torch.dtype | None) -> Weights:
    return resident(weights, dtype, case.setup.device, needed(weights, case.setup.compared))


def keep(case: Case) -> Case:
    """The rank of this process loaded as it is stored, the others left in their files."""
    setup = case.setup
    files = enumerate(case.opened.shards.ranks)
    ranks = [_kept(case, rank, None) if number in setup.team.here else rank for number, rank in files]
    return replace(case, setup=setup.with_ranks(ranks))


def all_kept(case: Case, setup: DecoderBackend, dtype: torch.dtype) -> DecoderBackend:
    """Source and all ranks in memory: in `dtype` on a CPU, as stored on a GPU, where widening them costs nothing."""
    held = None if setup.device.type == "cuda" else dtype
    ranks = [_kept(case, case.opened.shards.ranks[rank], held) for rank in setup.team.here]
    return replace(setup, source=_kept(case, case.opened.source, held), ranks=ranks)


def ready(opened: OpenedSet, options: VerifyOptions) -> EngineRun:
    """Decide prompt, layers, tokens and what is kept in memory, the same on all ranks."""
    case = opened.team.together(lambda: prepare(opened, options))
    case = opened.team.together(lambda: choose(case))
    setup = case.setup
    return EngineRun(
        engine="tpshard",
        prompt_tokens=setup.prompt.numel(),
        tokens=case.tokens,
        layers=setup.layers,
        begin=lambda: _begin(case),
        streamed=setup.block_bytes is not None and not setup.keep_ranks,
        settings={"tokens_from": "the reference" if case.taught else "the seed"},
    )


def _begin(case: Case) -> Mapping[str, JudgeTier]:
    opened, team = case.opened, case.opened.team
    team.together(lambda: require_finite(opened, lambda weights: needed(weights, case.setup.compared)))
    kept = team.together(lambda: keep(case)) if case.setup.keep_ranks else case
    judges: dict[str, JudgeTier] = {
        name: partial(judge, kept, kept.setup.counting(name, opened.say))
        for name, judge in (("exact", _exact), ("native", _native))
        if name in case.options.computed
    }
    if "weights" in case.options.computed:
        judges = {"weights": partial(judge_weights, case.setup, case.options.allow_not_run, opened.say), **judges}
    judges = dict(with_idle_said(judges, case.setup, case.options.allow_not_run))
    if case.options.reference == "transformers":
        judges["transformers"] = lambda: (against_transformers(kept.setup, opened), None)
    return judges


def _exact(case: Case, setup: DecoderBackend) -> tuple[Tier, Canaries]:
    float32 = case.options.float32
    if setup.block_bytes is None:
        setup = all_kept(case, setup, torch.float32 if float32 else torch.float64)
    return exact(setup, _steps(case, setup), float32=float32), partial(exact_canaries, setup, float32=float32)


def _steps(case: Case, setup: DecoderBackend) -> list[Tensor]:
    """The prompt and the tokens after it, as steps; chosen once."""
    if not case.decoded and case.taught:
        # One process chooses: on another kind of GPU, logits that are nearly equal may change places.
        chosen = setup.team.once(lambda: [step.tolist() for step in setup.teacher_tokens(case.tokens)])
        case.decoded.extend(torch.tensor(step, device=setup.device) for step in chosen)
    elif not case.decoded:
        more = prompt_ids(setup.family.vocab, case.options.seed + 1, len(setup.prompt), max(case.tokens, 1))
        case.decoded.extend((setup.prompt, *(more[:, i : i + 1].to(setup.device) for i in range(case.tokens))))
    return case.decoded


def _native(case: Case, setup: DecoderBackend) -> tuple[Tier, Canaries | None]:
    weights = case.opened.shards.ranks[0]
    dtype = main_dtype(weights, parameters(weights))
    if setup.block_bytes is None:
        source, cpu = case.opened.source, setup.device.type == "cpu"
        kept, wide = (_kept(case, source, each if cpu else None) for each in (dtype, torch.float64))
        setup = replace(setup, source=kept, wide=wide if cpu else None)
    steps = _steps(case, setup)
    tier = native(setup, dtype, steps, setup.run_wide(steps))
    return tier, partial(native_canaries, setup, dtype) if len(setup.ranks) > 1 else None


def against_transformers(setup: DecoderBackend, opened: OpenedSet) -> Tier:
    """Logits of the sharded model in float64 against those of transformers' model of the source.

    The class of a quantised model is that of the unquantised one, with the weights that its modules make.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        raise UnsupportedError("this needs transformers", hint="pip install transformers") from None
    if setup.layers is not None:
        return Tier("transformers", "inconclusive", reason="transformers runs all layers, and --layers asks for some")
    wide = torch.float64
    if opened.source.dequantised:
        frame = frame_of(model_config(opened.config))
        model: Any = skeleton(frame.config, wide, setup.device)
        fill(model, frame, opened.source, wide, setup.device)
    else:
        # Its eager attention adds Falcon's ALiBi twice; SDPA does not, but cannot cap Gemma's scores.
        attention = "eager" if setup.family.softcap is not None else "sdpa"
        model = AutoModelForCausalLM.from_pretrained(
            opened.path, dtype=wide, attn_implementation=attention, local_files_only=True
        )
        model.train(False).to(setup.device)
    with no_tf32(), torch.no_grad():
        wanted = model(setup.prompt).logits
        errors = setup.errors(torch.float64, Reference(wanted))
    error, limit = max(errors), TRANSFORMERS_LIMIT
    tier = Tier("transformers", "pass", {"relative_error": limit}, {"relative_error": error})
    reason = f"the logits differ from transformers' by {error:.1e} (limit {limit:.0e})"
    return tier if error <= limit else replace(tier, status="fail", reason=reason)
