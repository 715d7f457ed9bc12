"""Names of files, every one of them once."""

from collections.abc import Iterable
from pathlib import Path

# Of checkpoints that others write.
CONFIG = "config.json"
SAFETENSORS = "model.safetensors"
SAFETENSORS_INDEX = f"{SAFETENSORS}.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = f"{PICKLE}.index.json"
PICKLE_PATTERN = "pytorch_model*.bin"
QUANTISED = {
    "quantization_config.json": None,
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}
"""Files in which quantisation tools say what they did, some of them nowhere else; whose they are if they do not say."""
QUANTISED_KEYS = ("quantization_config", "compression_config")
"""The keys under which configs say how weights are quantised."""
META_PARAMS = "params.json"
"""Beside Meta's files, and in place of config.json beside Mistral's."""
MISTRAL = "consolidated.safetensors"
MISTRAL_INDEX = f"{MISTRAL}.index.json"
DCP_METADATA = ".metadata"
MEGATRON_TRACKER = "latest_checkpointed_iteration.txt"
MEGATRON_COMMON = "common.pt"
MEGATRON_METADATA = "metadata.json"

# Of a set that tpshard writes.
MANIFEST = "tpshard.json"
SUMS = "SHA256SUMS"
LOCK = ".tpshard.lock"
"""The lock of a whole directory, and the sign that a run of ours has not finished there."""
PARTIAL = ".partial"
"""Suffix of an output, directory or file, that is not complete."""
REPLACED = ".replaced"
"""Suffix of the name that an old output bears between the last two renames of the run that replaces it."""

SIDE_PATTERNS = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    META_PARAMS,
    "video_preprocessor_config.json",
    *QUANTISED,
    *(f"{word}*" for word in ("LICENSE", "LICENCE", "License", "license", "NOTICE", "Notice", "COPYING", "USE_POLICY")),
)
"""Files that a checkpoint usually has beside its weights: configuration, tokenizer, chat template, licence."""
WEIGHTS = tuple(
    f"*.{ending}"
    for ending in (
        "safetensors bin pth pt ckpt gguf ggml h5 hdf5 keras msgpack onnx onnx_data onnx.data tflite pb ot mlmodel "
        "pdparams nemo distcp pkl pickle engine"
    ).split()
)
"""Files that hold weights in any form, or what a trainer keeps."""


def fits(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name fits any of the patterns, of which each has one `*` at most.

    Without regular expressions, of which thirty would be compiled whenever a command starts.
    """
    for pattern in patterns:
        begin, star, end = pattern.partition("*")
        if star and name.startswith(begin) and name.endswith(end) and len(name) >= len(begin + end):
            return True
        if name == pattern:
            return True
    return False


def side_files(names: Iterable[str]) -> list[str]:
    """Those of `names` that a checkpoint usually has, sorted."""
    return sorted(name for name in names if "/" not in name and fits(name, SIDE_PATTERNS))


RANK_STEM = r"rank-(\d{5})-of-(\d{5})(?:-stage-(\d{5})-of-(\d{5}))?"
"""What `rank_stem` gives: rank and ranks of a stage, stage and stages where there are several."""


def rank_stem(rank: int, tp: int, pp: int = 1) -> str:
    """`rank-00000-of-00004`, the beginning of the names of a rank's record and lock in every format.

    rank: of all `tp * pp`. Where there are stages, `-stage-00001-of-00002` follows, and the rank is that within it.
    """
    stage, place = divmod(rank, tp)
    return f"rank-{place:05}-of-{tp:05}" + (f"-stage-{stage:05}-of-{pp:05}" if pp > 1 else "")


def record_name(rank: int, tp: int, pp: int = 1) -> str:
    """The name of a rank's record, which says that its files are complete."""
    return f"{rank_stem(rank, tp, pp)}.json"


def journal_path(directory: Path, name: str) -> Path:
    """Where the journal of an output file lies, beside it."""
    path = directory / name
    return path.with_name(f".{path.name}.journal")


def is_meta(directory: Path) -> bool:
    """Whether a directory looks like one that Meta published: params.json beside consolidated.*.pth."""
    return (directory / META_PARAMS).is_file() and any(directory.glob("consolidated.*.pth"))


def is_megatron(directory: Path) -> bool:
    """Whether a directory looks like one of Megatron's: of several iterations, or of one."""
    if (directory / MEGATRON_TRACKER).is_file() or is_legacy(directory):
        return True
    beside = (MEGATRON_COMMON, MEGATRON_METADATA)
    return (directory / DCP_METADATA).is_file() and any((directory / name).is_file() for name in beside)


def is_legacy(directory: Path) -> bool:
    """Whether a directory holds an iteration of Megatron's in its legacy form: a file for each rank."""
    return any(directory.glob("mp_rank_[0-9][0-9]*/model_optim_rng.pt"))


NOT_LOADED = "source"
"""How files of a rank are called that its engine does not load, and how names begin in them."""
