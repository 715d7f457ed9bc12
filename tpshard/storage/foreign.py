"""What else a directory or a tensor's name may come from, and the way to an ordinary checkpoint: one table of each."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from tpshard.errors import UnsupportedError
from tpshard.storage.names import MANIFEST, fits


@dataclass(frozen=True)
class Foreign:
    """Something that is no ordinary checkpoint. signs: patterns as `names.fits` takes them, or a regular expression.

    directory: a directory holds it if for each sign a name fits it.
    """

    signs: tuple[str, ...]
    what: str
    way_out: str


_SAVE = "and save it with `model.save_pretrained(OUT)`"
_OF_MEGATRON = (
    "`tpshard merge DIR -o OUT` makes a Hugging Face checkpoint of it; `tpshard reshard DIR --tp N` splits it"
)
DIRECTORIES = (
    Foreign(
        ("rank-*.safetensors",),
        f"these are files of ranks that tpshard wrote, without their {MANIFEST}",
        f"copy {MANIFEST} from where the files come from: `tpshard merge` then makes an ordinary checkpoint of them",
    ),
    Foreign(
        ("model-rank-*.safetensors",),
        "this is a sharded_state of vLLM or SGLang, fused and cut for its ranks",
        "give the checkpoint that it was made of; `tpshard split --format vllm` or sglang writes this form",
    ),
    Foreign(
        ("latest_checkpointed_iteration.txt",),
        "this is a directory of Megatron checkpoints",
        _OF_MEGATRON,
    ),
    Foreign(
        ("mp_rank_*_model_states.pt",),
        "this is a checkpoint of DeepSpeed, one step of a run",
        "`python zero_to_fp32.py . OUT --safe_serialization`, in the directory above, makes an ordinary one",
    ),
    Foreign(
        ("global_step*",),
        "this is a checkpoint of DeepSpeed",
        "`python zero_to_fp32.py . OUT --safe_serialization`, in that directory, makes an ordinary one",
    ),
    Foreign(
        ("mp_rank_*",),
        "this is a checkpoint of Megatron in its legacy form, cut for its ranks",
        _OF_MEGATRON,
    ),
    Foreign(
        (".metadata", "common.pt"),
        "this is a distributed checkpoint of Megatron",
        _OF_MEGATRON,
    ),
    Foreign(
        (".metadata",),
        "this is a distributed checkpoint of PyTorch (DCP)",
        "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR FILE` makes one file of it, "
        "`merge_fsdp_weights` of accelerate one of FSDP's; load that into the model " + _SAVE,
    ),
    Foreign(
        ("adapter_config.json",),
        "this is an adapter (LoRA or its like), not a model",
        f"merge it into its base model, with `merge_and_unload()` of PEFT, {_SAVE}",
    ),
    Foreign(
        ("adapter_model.*",),
        "this is an adapter (LoRA or its like), not a model",
        f"merge it into its base model, with `merge_and_unload()` of PEFT, {_SAVE}",
    ),
    Foreign(
        ("*.gguf",),
        "this is a model in GGUF, the form of llama.cpp",
        f"take the checkpoint that it was made of, or load it with transformers' `gguf_file=FILE` {_SAVE}",
    ),
    Foreign(
        ("blobs", "refs", "snapshots"),
        "this is a repository's folder in the Hub's cache",
        "give the repository's name, owner/name, or one of the directories in snapshots",
    ),
    Foreign(
        ("checkpoint-*",),
        "this is the output directory of a training run",
        "give one of the checkpoint-* directories in it",
    ),
)
"""Told by names in a directory that has no weights under their usual names; the first that fits."""

_WRAPPERS = (
    Foreign(
        (r"(^|\.)(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|base_layer)\.",),
        "the weights are of a model with LoRA inside, not merged",
        f"load it with PEFT, merge it with `merge_and_unload()` {_SAVE}",
    ),
    Foreign(
        (r"^base_model\.model\.",),
        "the tensors have the names of PEFT's wrapper, base_model.model.*",
        "save what is inside with `model.get_base_model().save_pretrained(OUT)`",
    ),
    Foreign(
        (r"^pretrained_model\.",),
        "the tensors have the names of TRL's wrapper with a value head, pretrained_model.*",
        "save what is inside with `model.pretrained_model.save_pretrained(OUT)`",
    ),
    Foreign(
        (r"(^|\.)_orig_mod\.",),
        "the tensors have the names of a module that torch.compile made, _orig_mod.*",
        "save what is inside with `model._orig_mod.save_pretrained(OUT)`",
    ),
    Foreign(
        (r"(^|\.)_fsdp_wrapped_module\.",),
        "the tensors have the names of FSDP's wrapper, _fsdp_wrapped_module.*",
        "save with accelerate: `accelerator.unwrap_model(model).save_pretrained(OUT, "
        "state_dict=accelerator.get_state_dict(model))`",
    ),
    Foreign(
        (r"^module\.",),
        "the tensors have the names of DistributedDataParallel's wrapper, or DeepSpeed's, module.*",
        "save what is inside with `model.module.save_pretrained(OUT)`",
    ),
)


def recognised(names: Collection[str], place: object, expected: str) -> UnsupportedError | None:
    """The error for a directory that holds something else than what is expected, if it is something that is known."""
    for foreign in DIRECTORIES:
        found = [next((name for name in sorted(names) if fits(name, [sign])), None) for sign in foreign.signs]
        if None not in found:
            listed = ", ".join(filter(None, found))
            return UnsupportedError(foreign.what, path=place, expected=expected, found=listed, hint=foreign.way_out)
    return None


def wrapped(names: Iterable[str], place: object) -> UnsupportedError | None:
    """The error for tensors of which one has a name that a known wrapper gives it."""
    names = tuple(names)
    for foreign in _WRAPPERS:
        sign = re.compile(foreign.signs[0])
        if name := next(filter(sign.search, names), None):
            expected = "the names that transformers saves"
            return UnsupportedError(foreign.what, path=place, tensor=name, expected=expected, hint=foreign.way_out)
    return None
