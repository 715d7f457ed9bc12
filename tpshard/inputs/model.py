"""From a checkpoint to a model: its tensors classified, and where they lie."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tpshard.errors import CorruptError, UnsupportedError
from tpshard.inputs.checkpoint import Checkpoint, source_digest
from tpshard.planning.axes import Cut
from tpshard.planning.join import Placed, alignment_order
from tpshard.planning.layout import LogicalTensor, whole
from tpshard.planning.model import CASTABLE, DTYPE_NAMES, Model
from tpshard.rules.fitting import with_fitting
from tpshard.rules.multimodal import find_rules
from tpshard.rules.quantisation.recognise import Quantisation, recognise
from tpshard.storage.foreign import wrapped
from tpshard.storage.local import read_range
from tpshard.storage.safetensors import TensorInfo


def from_checkpoint(
    checkpoint: Checkpoint, rules: str | Path | None = None, dtype: str | None = None, *, cast_all: bool = False
) -> Model:
    """Classify a checkpoint's tensors.

    dtype: a name of DTYPE_NAMES to cast to, buffers excepted, and what is float32 on purpose unless cast_all.
    """
    quantised = recognise(checkpoint.quantisation, checkpoint.tensors, checkpoint.config_path)
    try:
        subject = find_rules(checkpoint.config, rules, checkpoint.config_path)
    except UnsupportedError as error:
        raise with_fitting(error, checkpoint.config, checkpoint.tensors, quantised.companions) from None
    try:
        classified, text = subject.classify(checkpoint.tensors, quantised.companions)
    except (CorruptError, UnsupportedError) as error:
        foreign = wrapped((info.name for info in checkpoint.tensors), checkpoint.directory)
        if foreign is None and rules is None and isinstance(error, UnsupportedError):
            error = with_fitting(error, checkpoint.config, checkpoint.tensors, quantised.companions)
        raise foreign or error from None
    _check_order(checkpoint, quantised, classified.cuts)
    lower = dtype is not None and DTYPE_NAMES[dtype] in ("F16", "BF16") and not cast_all
    float32 = [info.name for info in checkpoint.tensors if info.name in classified.float32] if lower else []
    logical = []
    for info in checkpoint.tensors:
        cut = classified.cuts[info.name]
        castable = info.dtype in CASTABLE and cut.kind != "buffer" and info.name not in quantised.companions
        cast = DTYPE_NAMES[dtype] if dtype and castable and info.name not in float32 else info.dtype
        logical.append(LogicalTensor(info.name, cast, info.shape, cut))
    files = [
        {"name": file.name, "size": file.size, **({"sha256": file.sha256} if file.sha256 else {})}
        for file in checkpoint.files
    ]
    source = {"name": checkpoint.name, "repo_id": checkpoint.repo_id, "revision": checkpoint.revision}
    given = {"rules": subject.architecture.name, "rules_sha256": subject.architecture.digest}
    return Model(
        tensors=tuple(alignment_order(logical)),
        axes=classified.axes,
        tied=classified.tied,
        file_of=checkpoint.file_of,
        source={**source, "headers_sha256": source_digest(checkpoint.files), "files": files},
        architecture={"model_type": checkpoint.config.get("model_type"), **given, **({"text": text} if text else {})},
        dtype=dtype,
        full_names=classified.full_names,
        config=checkpoint.config,
        text_config=None if subject.text is None else subject.text.config,
        quantisation=quantised.to_json(),
        notes=(
            *_heads(classified.heads),
            *_two_heads(checkpoint, classified.tied),
            *_notes(dtype, quantised),
            *_kept(float32),
        ),
        cast_all=cast_all,
        layers=classified.layers,
        experts=classified.experts,
    )


def _heads(names: Sequence[str]) -> tuple[str, ...]:
    """What is said of heads that do not predict tokens."""
    return (f"a head of another task, which no rule cuts: {', '.join(names)}",) if names else ()


_ENDS = 1 << 16


def _two_heads(checkpoint: Checkpoint, tied: Mapping[str, str]) -> tuple[str, ...]:
    """What is said of a tied head that is stored, and is not the embedding: both are kept, and engines disagree.

    Their first and last bytes are compared: no two of a trained model are alike there. Nothing is read of a checkpoint
    whose headers alone are here.
    """
    infos = {info.name: info for info in checkpoint.tensors} if tied and checkpoint.directory is not None else {}
    said = []
    for head, embedding in tied.items():
        pair = infos.get(f"{head}.weight"), infos.get(f"{embedding}.weight")
        if pair[0] is None or pair[1] is None:
            continue
        first, second = (
            (info.dtype, info.shape, *(read_range(info.file, *span) for span in _ends(info))) for info in pair if info
        )
        if first != second:
            what = f"config.json ties {head}.weight to {embedding}.weight, but another one is stored: it is kept"
            said.append(f"{what} as the head, as transformers takes it; vLLM, given the checkpoint itself, does not")
    return tuple(said)


def _ends(info: TensorInfo) -> tuple[tuple[int, int], tuple[int, int]]:
    return (info.begin, min(info.end, info.begin + _ENDS)), (max(info.begin, info.end - _ENDS), info.end)


def _notes(dtype: str | None, quantised: Quantisation) -> tuple[str, ...]:
    """What a cast leaves out."""
    if dtype is None or not quantised.companions:
        return ()
    kept = f"the {len(quantised.companions)} tensors of quantised modules stay as they are, their scales too"
    return (f"--dtype {dtype} casts what is not quantised: {kept}",)


def _check_order(checkpoint: Checkpoint, quantised: Quantisation, cuts: Mapping[str, Cut]) -> None:
    """CorruptError where GPTQ's groups are in no order, and the config says that they are.

    Ranks then have the scales of their own rows only. Nothing is read of a checkpoint whose headers alone are here.
    """
    known: dict[tuple[int, int], bytes] = {}
    for info in checkpoint.tensors if checkpoint.directory is not None and not quantised.scattered else ():
        scales = cuts.get(f"{info.name.removesuffix('g_idx')}scales")
        if not info.name.endswith(".g_idx") or scales is None or scales.kind != "row":
            continue
        key = (info.shape[0], int(scales.ratio))
        if key not in known:
            known[key] = b"".join((row // key[1]).to_bytes(4, "little") for row in range(key[0]))
        if read_range(info.file, info.begin, info.end) != known[key]:
            what, found = f"the groups of {info.name} are in no order", "desc_act is not true"
            hint = "is quantization_config the one that the checkpoint was made with?"
            expected = f"row i in group i // {key[1]}, or desc_act: true"
            raise CorruptError(what, path=info.file, tensor=info.name, expected=expected, found=found, hint=hint)


def _kept(float32: list[str]) -> tuple[str, ...]:
    """What is said of tensors that a cast leaves as they are."""
    if not float32:
        return ()
    count = f"{len(float32)} tensors that are" if len(float32) > 1 else "1 tensor that is"
    return (f"{count} float32 on purpose stays so, as {float32[0]}; --cast-all casts everything",)


def placed_in(checkpoint: Checkpoint, model: Model) -> list[Placed]:
    """Where each logical tensor lies in the checkpoint's files, whole and in its own dtype."""
    infos = {info.name: info for info in checkpoint.tensors}
    pairs = ((tensor, infos[tensor.name]) for tensor in model.tensors)
    return [Placed(whole(replace(tensor, dtype=info.dtype)), info.file, info.begin) for tensor, info in pairs]
