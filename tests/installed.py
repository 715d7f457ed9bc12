"""For `make dist`: what was installed from a wheel, in an environment without torch, does its work."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPES = {"model.embed_tokens": (10, 16), "lm_head": (10, 16), "model.norm": (16,)}
LAYER = {
    "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "self_attn.v_proj": (8, 16),
    "self_attn.o_proj": (16, 16), "mlp.gate_proj": (8, 16), "mlp.up_proj": (8, 16), "mlp.down_proj": (16, 8),
    "input_layernorm": (16,), "post_attention_layernorm": (16,),
}  # fmt: skip
CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 10, "torch_dtype": "float32",
}  # fmt: skip


def write(directory: Path) -> None:
    """A LLaMA of one layer, by the definition of the format."""
    header, data = {}, b""
    for name, shape in {**SHAPES, **{f"model.layers.0.{name}": shape for name, shape in LAYER.items()}}.items():
        more = random.Random(name).randbytes(4 * shape[0] * (shape[1] if len(shape) > 1 else 1))
        offsets = [len(data), len(data) + len(more)]
        header[f"{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        data += more
    head = json.dumps(header).encode()
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    (directory / "config.json").write_text(json.dumps(CONFIG))


def data(path: Path) -> bytes:
    """What follows the header."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def main() -> None:
    bin_ = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as place:
        write(Path(place) / "model")

        def run(*arguments: str) -> str:
            environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            done = subprocess.run(arguments, cwd=place, env=environment, check=True, text=True, stdout=subprocess.PIPE)
            print("$", *arguments[:3], "…" if len(arguments) > 3 else "", "\n" + done.stdout, end="")
            return done.stdout

        where = run(str(bin_ / "python"), "-c", "import tpshard; print(tpshard.__file__)")
        assert Path(where.strip()).is_relative_to(bin_.parent), "not what was installed"
        tpshard = str(bin_ / "tpshard")
        run(tpshard, "--version")
        assert "llama" in run(tpshard, "archs")
        for form in ("native", "vllm", "meta"):
            run(tpshard, "split", "model", "--tp", "2", "--format", form, "-o", form)
            run(tpshard, "check", form, "--source", "model")
        run(tpshard, "merge", "native", "-o", "again")
        one, other = (data(Path(place) / name / "model.safetensors") for name in ("model", "again"))
        assert one == other


main()
