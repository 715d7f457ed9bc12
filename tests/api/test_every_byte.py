"""`check` finds every byte that is flipped in a set, and `check` and `verify` every key that is changed in its config."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import tpshard
from tests.helpers.checkpoints import make
from tests.helpers.command import llama, succeeds
from tests.helpers.command import tpshard as command
from tests.helpers.grids import ALL
from tpshard.api.beside import written_beside
from tpshard.api.check import check_framing, check_sums, read_listed
from tpshard.errors import TpshardError
from tpshard.execute.publish import Settings
from tpshard.formats.plan import plan_split
from tpshard.inputs.checkpoint import open_checkpoint
from tpshard.inputs.model import from_checkpoint
from tpshard.inputs.open import open_set
from tpshard.storage.names import SUMS

QUICK = Settings(workers=1, fsync=False)
PLAIN = Settings(workers=1, fsync=False, checksum=False)
FORMATS = ["native", "vllm", "sglang", "meta", "dcp", "dcp-hf", "deepseek"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LLaMA of one layer whose vocabulary divides, and a DeepSeek-V3, for the format that holds nothing else."""
    root = tmp_path_factory.mktemp("models")
    made = {
        "llama": llama(root / "llama", vocab_size=12, num_hidden_layers=1),
        "deepseek": make("deepseek_v3", root / "v3", vocab_size=256),
    }
    for model in made.values():
        (model / "tokenizer.json").write_text('{"version": "1.0"}\n')
    return made


def is_noticed(set_: Path, model: Path | None) -> bool:
    """Whether `check` says that a set is not as it was written."""
    try:
        return not tpshard.check(set_, model, settings=QUICK).equal
    except TpshardError:
        return True


def flipped(path: Path, places: range) -> Iterator[int]:
    """A file with one byte flipped after the other, another bit each time; in the end as it was."""
    kept = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for at in places:
            file.seek(at)
            file.write(bytes([kept[at] ^ 1 << at % 8]))
            yield at
            file.seek(at)
            file.write(kept[at : at + 1])
    assert path.read_bytes() == kept


@pytest.mark.parametrize("settings", [QUICK, PLAIN], ids=["sha256", "none"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_flipped_byte_is_noticed(form: str, settings: Settings, models: dict[str, Path], tmp_path: Path) -> None:
    """With the source always, and without it where checksums were recorded: a sample, or all of them."""
    model = models["deepseek" if form == "deepseek" else "llama"]
    tpshard.split(model, 2, tmp_path / "set", format=form, settings=settings)
    for path in sorted((tmp_path / "set").iterdir()):
        size = path.stat().st_size
        weights = path.suffix in (".safetensors", ".pth", ".distcp")
        for source in (model, None):
            if source is None and weights and not settings.checksum:
                continue
            step = 1 if ALL else max(1, size // 3)
            missed = [
                at for at in flipped(path, range(size % 7, size, step)) if not is_noticed(tmp_path / "set", source)
            ]
            assert not missed, (path.name, source, missed)
    assert not is_noticed(tmp_path / "set", model)


@pytest.mark.parametrize("form", FORMATS)
def test_every_byte_around_the_tensors_is_compared(form: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Headers, pickles and directories of archives; by the plan of the source."""
    model = models["deepseek" if form == "deepseek" else "llama"]
    tpshard.split(model, 2, tmp_path / "set", format=form, settings=PLAIN)
    found = open_set(tmp_path / "set", False)
    planned = plan_split(from_checkpoint(open_checkpoint(model)), found.options)
    assert not check_framing(found, planned)
    (file,) = found.files[1]
    inside = {at for info in file.tensors for at in range(info.begin, info.end)}
    outside = sorted(set(range(file.size)) - inside)
    assert outside
    places = [at for at in outside if form != "dcp" or ALL or at % 5 == 0]
    kept = file.path.read_bytes()
    with file.path.open("r+b", buffering=0) as out:
        for at in places:
            out.seek(at)
            out.write(bytes([kept[at] ^ 1 << at % 8]))
            (difference,) = check_framing(found, planned)
            assert difference.file == file.path.name and f"byte {at:,}" in difference.message
            out.seek(at)
            out.write(kept[at : at + 1])
