"""Checkpoints with heads of other tasks, or without a head, made of those of the families that vLLM loads."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.engines import engine_models

Shapes = Mapping[str, tuple[int, ...]]
HEADS = ("lm_head.weight", "output.weight", "embed_out.weight")
LABELS = 3
SCORE = {"score.weight": (LABELS, 0)}
REWARD = {"score.0.weight": (0, 0), "score.0.bias": (0,), "score.2.weight": (1, 0), "score.2.bias": (1,)}
BOTH = {"model_type": "llama_bidirec", "pooling": "avg"}
VALUE = {"v_head.weight": (1, 0)}
PROCESS = REWARD | {"score.2.weight": (2, 0), "score.2.bias": (2,)}


@dataclass(frozen=True)
class Headed:
    """A checkpoint. made: of which. architecture: the class that its config names. head: shapes; 0 is the hidden size.

    config: what differs. base: whether names lack `model.`, as the base model's do. own: whether its own head is there.
    """

    made: str
    architecture: str
    head: Shapes = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)
    base: bool = False
    own: bool = False


LOADED = {
    "llama, sequences": Headed("llama", "LlamaForSequenceClassification", SCORE),
    "mistral, sequences": Headed("mistral", "MistralForSequenceClassification", SCORE),
    "qwen2, sequences": Headed("qwen2", "Qwen2ForSequenceClassification", SCORE),
    "qwen2-tied, sequences": Headed("qwen2-tied", "Qwen2ForSequenceClassification", SCORE),
    "qwen3, sequences": Headed("qwen3", "Qwen3ForSequenceClassification", SCORE),
    "gemma2, sequences": Headed("gemma2", "Gemma2ForSequenceClassification", SCORE),
    "mixtral, sequences": Headed("mixtral", "MixtralForSequenceClassification", SCORE),
    "gpt2, sequences": Headed("gpt2", "GPT2ForSequenceClassification", SCORE),
    "llama, in both directions": Headed("llama", "LlamaBidirectionalForSequenceClassification", SCORE, BOTH),
    "llama, sequences, and its own": Headed("llama", "LlamaForSequenceClassification", SCORE, own=True),
    "qwen3, tokens": Headed("qwen3", "Qwen3ForTokenClassification", SCORE),
    "qwen2, reward": Headed("qwen2", "Qwen2ForRewardModel", REWARD),
    "qwen2, process": Headed("qwen2", "Qwen2ForProcessRewardModel", PROCESS),
    "internlm2, reward": Headed("internlm2", "InternLM2ForRewardModel", VALUE),
    "llama, none": Headed("llama", "LlamaModel"),
    "llama, none, though it has one": Headed("llama", "LlamaModel", own=True),
    "llama, none, in both directions": Headed("llama", "LlamaBidirectionalModel", config=BOTH),
    "mistral, none": Headed("mistral", "MistralModel", base=True),
    "qwen2, none": Headed("qwen2", "Qwen2Model"),
    "qwen2-tied, none": Headed("qwen2-tied", "Qwen2Model", base=True),
    "qwen3, none": Headed("qwen3", "Qwen3Model", base=True),
    "gemma2, none": Headed("gemma2", "Gemma2Model", base=True),
    "mixtral, none": Headed("mixtral", "MixtralModel"),
    "qwen3_moe, none": Headed("qwen3_moe", "Qwen3MoeModel"),
    "olmo2, none": Headed("olmo2", "Olmo2Model"),
    "phi3, none": Headed("phi3", "Phi3Model"),
    "gpt2, none": Headed("gpt2", "GPT2Model"),
    "opt, none": Headed("opt", "OPTModel"),
    "bloom, none": Headed("bloom", "BloomModel"),
    "cohere, none": Headed("cohere", "CohereModel"),
    "gpt_neox, none": Headed("gpt_neox", "GPTNeoXModel"),
    "dots1, none": Headed("dots1", "Dots1Model"),
    "deepseek_v3, none": Headed("deepseek_v3", "DeepseekV3Model"),
    "falcon_h1, none": Headed("falcon_h1", "FalconH1Model"),
    "lfm2, none": Headed("lfm2", "Lfm2Model"),
}
"""What vLLM loads."""

REFUSED = {
    "jamba, sequences": Headed("jamba", "JambaForSequenceClassification", SCORE),
    "qwen3, tokens, with a bias": Headed("qwen3", "Qwen3ForTokenClassification", SCORE | {"score.bias": (LABELS,)}),
    "gpt2, tokens": Headed("gpt2", "GPT2ForTokenClassification", {"classifier.weight": (LABELS, 0)}),
    "llama, questions": Headed("llama", "LlamaForQuestionAnswering", {"qa_outputs.weight": (2, 0)}),
    "llama, reward": Headed("llama", "LlamaForRewardModel", VALUE),
    "mistral, a value": Headed("mistral", "MistralForCausalLM", {"v_head.summary.weight": (1, 0)}, own=True),
}
"""What it does not load, or not from sharded_state."""
NOT_COMPARED = {"gemma3, none": Headed("gemma3", "Gemma3TextModel", base=True)}
"""What it loads, under names that the table does not have."""


def make(name: str, path: Path) -> Path:
    """Write a checkpoint, of which a head has labels in place of the vocabulary."""
    import torch
    from safetensors.torch import load_file, save_file

    form = {**LOADED, **REFUSED, **NOT_COMPARED}[name]
    engine_models.make(form.made, path)
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    tensors = {each: tensor for each, tensor in tensors.items() if form.own or each not in HEADS}
    if form.base:
        tensors = {each.removeprefix("model."): tensor for each, tensor in tensors.items()}
    for each, shape in form.head.items():
        sizes = [size or config.get("hidden_size") or config["n_embd"] for size in shape]
        generator = torch.Generator().manual_seed(zlib.crc32(each.encode()))
        tensors[each] = torch.randn(sizes, generator=generator).to(torch.bfloat16)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    labels = {str(n): f"LABEL_{n}" for n in range(LABELS)}
    named = {"id2label": labels, "label2id": {label: int(n) for n, label in labels.items()}}
    named |= {"architectures": [form.architecture], **form.config}
    (path / "config.json").write_text(json.dumps(config | named))
    return path
