"""For `make test-signing`: docs/how-to/sign.md, command by command, with the `model_signing` that PATH has."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tests.test_docs import ROOT, blocks, run, script


def test_the_how_to_signs_verifies_and_refuses(made: Callable[..., Path], tmp_path: Path) -> None:
    assert shutil.which("model_signing") and shutil.which("openssl")
    (tmp_path / "Llama-3.1-8B").symlink_to(made("llama-bf16"))
    commands = script(list(blocks(ROOT / "docs/how-to/sign.md")), lambda kind: kind == "signing")
    assert commands.count("model_signing verify") == 2
    run(commands, tmp_path)
    assert (tmp_path / "shards.sig").stat().st_size > 1000
