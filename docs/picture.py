"""`python docs/picture.py`: runs the commands of README's picture, and draws what they printed as docs/images/run.svg.

The model is made here, with random weights; nothing of the picture is written by hand. No font is fetched: the drawing
names the fonts that a reader's machine may have.
"""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.bench.synthetic import write_llama  # noqa: E402

LLAMA = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
         "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 32000, "max_position_embeddings": 2048,
         "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False}  # fmt: skip
COMMANDS = (
    "tpshard split llama --tp 4",
    "tpshard check llama-tp4 --source llama",
    "tpshard verify llama-tp4 --source llama --tier exact",
    "tpshard merge llama-tp4 -o again && cmp llama/model.safetensors again/model.safetensors && echo equal",
)
WIDTH = 106
FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
DRAWING = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<title>tpshard splits, checks, verifies and merges a model</title>
<style>
.{unique_id}-matrix {{ font-family: FONTS; font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}" /></clipPath>
{lines}</defs>
<rect fill="#1b1b1b" width="100%" height="100%" rx="8"/>
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
""".replace("FONTS", FONTS)


def shown(command: str, place: Path) -> str:
    """What a command leaves on a terminal: of a line that is written over, its last state."""
    ours, theirs = pty.openpty()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    process = subprocess.Popen(command, shell=True, cwd=place, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    found = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        found += part
    os.close(ours)
    if process.wait():
        sys.exit(f"{command}: exit code {process.returncode}\n{found.decode()}")
    lines = found.decode().replace("\r\n", "\n").split("\n")
    return "\n".join(line.rsplit("\r", 1)[-1] for line in lines).strip("\n")


def main() -> None:
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), highlight=False)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        write_llama(place / "llama", LLAMA, data=True)
        for command in COMMANDS:
            console.print(Text(f"$ {command}", style="bold green"))
            console.print(Text.from_ansi(shown(command, place)))
            console.print()
    drawn = console.export_svg(title="", theme=MONOKAI, code_format=DRAWING, unique_id="run")
    (ROOT / "docs" / "images" / "run.svg").write_text(drawn)


if __name__ == "__main__":
    main()
