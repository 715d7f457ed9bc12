"""What the scripts share: small random models, and the two files that keep a quantiser's own dequantised weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"
REFERENCES = HERE / "references"

DENSE: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
"""Groups, blocks and packs of 32 divide at tp 2 and 4."""
SMALL = DENSE | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
"""One layer with the same heads, for formats of 8 bits and for the second and third fixture of a format."""
WIDE = DENSE | {"hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 128}
"""One layer whose blocks of 128 rows and columns divide at tp 2."""
EXPERTS = DENSE | {
    "num_hidden_layers": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
"""One layer of four Qwen3 experts."""


def random_model(
    model_type: str, config: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16, kind: Any = AutoModelForCausalLM
) -> PreTrainedModel:
    """A model whose matrices are normal with deviation about 0.08 and whose norms are near 1, the same at every call.

    Each tile of 32 rows and 32 columns has a width of its own, so that no two blocks' scales are alike.
    """
    torch.manual_seed(0)
    model = kind.from_config(AutoConfig.for_model(model_type, **config), dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator) * 0.08
            if parameter.dim() > 1:
                grid = [*parameter.shape[:-2], *(-(-size // 32) for size in parameter.shape[-2:])]
                widths = torch.exp2(torch.rand(grid, generator=generator) * 3 - 1.5)
                widths = widths.repeat_interleave(32, -2).repeat_interleave(32, -1)
                noise *= widths[..., : parameter.shape[-2], : parameter.shape[-1]]
            parameter.copy_(noise + 1 if "norm" in name else noise)
    return model.eval()


def numbers_as_words() -> PreTrainedTokenizerFast:
    """A tokenizer, for tools that ask for one whenever they get a data set or a model's name."""
    words = Tokenizer(WordLevel({str(number): number for number in range(64)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0")


def saved_names(model: PreTrainedModel, folder: Path) -> dict[str, Tensor]:
    """The model's tensors under the names of its files, where the experts stand one by one."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    return tensors_of(folder)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def write_fixture(name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Path:
    """Writes config.json and model.safetensors anew."""
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n")
    save_file(
        {key: tensor.contiguous() for key, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder


def keep_fixture(name: str, saved: Path) -> Path:
    """Takes the configs and weights that a tool wrote, and leaves tokenizers and templates out."""
    folder = FIXTURES / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wanted = ("config.json", "hf_quant_config.json", "quantize_config.json", "quantization_config.json")
    for file in sorted(saved.iterdir()):
        if file.name in wanted or file.name.endswith((".safetensors", ".safetensors.index.json")):
            shutil.copyfile(file, folder / file.name)
    return folder


def module_of(tensors: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    """A module's tensors by suffix."""
    return {key.rpartition(".")[2]: t for key, t in tensors.items() if key.rpartition(".")[0] == module}


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    config: dict[str, Any] = model.config.to_dict()
    architectures = [type(model).__name__]
    return {key: value for key, value in config.items() if value is not None} | {"architectures": architectures}


def write_reference(
    name: str, code: str, weights: Mapping[str, Tensor], *, tolerance: float = 0.0, why: str = "", rows: int = 4
) -> None:
    """Keeps what a quantiser's code makes of each module's weight, [out, in], as float32 with −0 written as 0.

    Without a tolerance the SHA-256 of all bytes (little endian, row by row). With one, a sample of rows, evenly spread
    from the first to the last: `references/NAME.safetensors` holds the values, and `rows` in the JSON their indices.
    """
    REFERENCES.mkdir(exist_ok=True)
    sampled: dict[str, Tensor] = {}
    modules: dict[str, Any] = {}
    for module, weight in sorted(weights.items()):
        values = weight.detach().to(torch.float32).contiguous() + 0.0
        assert values.isfinite().all() and values.abs().max() > 0, module
        entry: dict[str, Any] = {"shape": list(values.shape)}
        if tolerance:
            flat = values.reshape(-1, values.shape[-1])
            picked = torch.linspace(0, flat.shape[0] - 1, min(rows, flat.shape[0])).round().long()
            sampled[module] = flat[picked].clone()
            entry["rows"] = picked.tolist()
        else:
            entry["sha256"] = hashlib.sha256(values.numpy().tobytes()).hexdigest()
        modules[module] = entry
    content = {"code": code, "relative_tolerance": tolerance, "why": why, "modules": modules}
    (REFERENCES / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    (REFERENCES / f"{name}.safetensors").unlink(missing_ok=True)
    if sampled:
        save_file(sampled, REFERENCES / f"{name}.safetensors")
