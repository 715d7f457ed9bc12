"""What a command says and where: data on stdout, talk on stderr; progress; colour; tables."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console as RichConsole

from tests.helpers.command import llama, succeeds, tpshard
from tests.helpers.toys import read_all, write
from tpshard.cli import console as module
from tpshard.cli.console import Console
from tpshard.cli.main import main
from tpshard.errors import CorruptError, Interrupted
from tpshard.units import human_bytes

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SGR = re.compile(r"\x1b\[[0-9;]*m")


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, *streams: str) -> Iterator[list[str]]:
    """Make `streams` of sys a terminal of 100 columns; what was written to it is in the list afterwards."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    master, slave = pty.openpty()
    seen = bytearray()

    def read() -> None:
        try:
            while piece := os.read(master, 4096):
                seen.extend(piece)
        except OSError:  # the other end was closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    found: list[str] = []
    try:
        with open(slave, "w") as stream:
            for name in streams:
                monkeypatch.setattr(sys, name, stream)
            yield found
    finally:
        reader.join()
        os.close(master)
        found.append(seen.decode())


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_940, "999.9 kB"),
        (16_060_000_000, "16.1 GB"),
        (2_500_000_000_000, "2.5 TB"),
        (9_000_000_000_000_000, "9000.0 TB"),
        (12.6, "13 B"),
    ],
)
def test_human_bytes(count: float, text: str) -> None:
    assert human_bytes(count) == text


# --- messages ---


def test_messages_are_on_stderr_and_data_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console()
    console.say("hello")
    console.warn("careful")
    console.data({"a": 1})
    assert capsys.readouterr() == ('{"a": 1}\n', "hello\nwarning: careful\n")


def test_quiet_leaves_errors_and_data(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(quiet=True)
    console.say("hello")
    console.warn("careful")
    console.data({"a": 1})
    console.error(CorruptError("broken", hint="mend it"))
    assert capsys.readouterr() == ('{"a": 1}\n', "error: broken\nhint: mend it\n")


def test_an_error_in_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    error = CorruptError("broken", path="a/b", tensor="x", expected=4, found=[5], hint="mend it")
    Console(as_json=True).error(error)
    out, err = capsys.readouterr()
    assert err == "error: broken; tensor x; a/b; expected 4; found [5]\nhint: mend it\n"
    assert json.loads(out) == {
        "schema_version": 1,
        "error": {
            "code": "corrupt",
            "message": "broken",
            "path": "a/b",
            "tensor": "x",
            "expected": "4",
            "found": "[5]",
            "hint": "mend it",
        },
    }


def test_an_error_repeats_nothing() -> None:
    assert str(CorruptError("x of a/b is broken", path="a/b", tensor="x")) == "x of a/b is broken"


def test_every_error_has_a_way_out_and_its_own_goes_first() -> None:
    assert CorruptError("broken").hint == CorruptError.way_out
    assert CorruptError("broken", hint="mend it").hint == "mend it"


def test_an_error_stays_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Names come from files: none may start a line of its own or steer the terminal."""
    Console().error(CorruptError("a\nb", path="\x1b[31m", found="\udcff\0ü", hint="c\rd"))
    assert capsys.readouterr().err == "error: a\\nb; \\x1b[31m; found \\udcff\\x00ü\nhint: c\\rd\n"


def test_an_interrupt_has_no_hint_unless_given(capsys: pytest.CaptureFixture[str]) -> None:
    Console().error(Interrupted("interrupted"))
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb"), (None, "")])
def test_colour(variable: str | None, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    with terminal(monkeypatch, "stderr") as seen:
        if variable:
            monkeypatch.setenv(variable, value)
        Console().error(CorruptError("broken", hint="mend it"))
        Console().warn("careful")
    assert ANSI.sub("", seen[0]).splitlines() == ["error: broken", "hint: mend it", "warning: careful"]
    assert bool(SGR.search(seen[0])) is (variable is None)


def test_json_for_a_reader_and_for_a_pipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Console(as_json=True).data({"a": [1]})
    assert capsys.readouterr().out == '{"a": [1]}\n'
    with terminal(monkeypatch, "stdout") as seen:
        Console(as_json=True).data({"a": [1]})
    assert json.loads(seen[0]) == {"a": [1]} and seen[0].count("\n") > 1


# --- progress ---


def test_a_plain_line_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Console().progress("split") as meter:
        now[0] += 50  # opening the files is no part of the rate
        meter.start(8_000_000)
        for _ in range(4):
            now[0] += 4
            meter.add(1_000_000)
        assert capsys.readouterr().err == "split: 3.0 MB of 8.0 MB, 250.0 kB/s, 20 s left\n"
        now[0] += 40
        meter.add(4_000_000)
    assert capsys.readouterr() == ("", "split: 8.0 MB of 8.0 MB, 142.9 kB/s, 0 s left\n")


def test_no_line_of_a_short_run_and_none_when_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Console().progress("split") as meter:
        meter.start(10)
        meter.add(10)
    monkeypatch.setattr(module, "_PLAIN_EVERY", 0.0)
    with Console(quiet=True).progress("split") as meter:
        meter.start(10)
        meter.add(10)
    assert capsys.readouterr() == ("", "")


class Slow(int):
    """A number that takes its time to be added, so that other threads come between."""

    def __radd__(self, other: int) -> int:
        time.sleep(0.001)
        return other + int(self)


def test_nothing_is_lost_between_threads(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with Console().progress("split") as meter:
        meter.start(80_000)
        threads = [threading.Thread(target=lambda: [meter.add(Slow(1000)) for _ in range(20)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monkeypatch.setattr(module, "_PLAIN_EVERY", 0.0)
        meter.add(0)
    assert "80.0 kB of 80.0 kB" in capsys.readouterr().err


@pytest.mark.parametrize("colour", [True, False])
def test_a_bar_for_a_terminal(colour: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes, rate, time left; gone at the end; the cursor comes back whatever happens."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    with terminal(monkeypatch, "stderr") as seen:
        clock = [0.0]
        with pytest.raises(KeyboardInterrupt), Console().progress("merge") as meter:
            meter._bar.get_time = lambda: clock[0]  # type: ignore[attr-defined]
            meter.start(80_000_000)
            for _ in range(4):
                clock[0] += 1.0
                meter.add(10_000_000)
            meter._bar.refresh()  # type: ignore[attr-defined]
            raise KeyboardInterrupt
    text = ANSI.sub("", seen[0])
    assert "merge" in text and "40.0/80.0 MB" in text and "10.0 MB/s" in text and "0:00:04" in text
    assert seen[0].rindex("\x1b[?25h") > seen[0].rindex("\x1b[?25l")
    assert any(code != "\x1b[0m" for code in SGR.findall(seen[0])) is colour


def test_no_bar_when_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch, "stderr") as seen, Console(quiet=True).progress("split") as meter:
        meter.start(10)
        meter.add(10)
    assert seen == [""]


def test_a_bar_of_the_real_command(tmp_path: Path) -> None:
    """stderr is a terminal, stdout is a file: the bar goes to the one, the JSON object to the other."""
    model = llama(tmp_path / "model")
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-m", "tpshard", "split", str(model), "--tp", "4", "--no-fsync", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=slave, cwd=tmp_path, env=env) as process:
        os.close(slave)
        seen = b""
        try:
            while piece := os.read(master, 4096):
                seen += piece
        except OSError:
            pass
        assert process.stdout is not None
        result = json.loads(process.stdout.read())
    os.close(master)
    assert process.returncode == 0 and result["command"] == "split"
    assert b"split" in seen and b"kB" in seen


# --- tables ---


def test_tables_print_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """No markup, no emoji, no wrapping where there is no terminal."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    console: RichConsole = Console.rich()
    console.print("[bold]x[/bold] :smile: " + "long " * 60)
    assert out.getvalue() == "[bold]x[/bold] :smile: " + "long " * 60 + "\n"


# --- on a terminal ---


def test_names_stay_whole_on_a_narrow_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama(tmp_path / "model")
    for width, lines in ((60, 2), (200, 1)):
        with terminal(monkeypatch, "stdout") as seen:
            monkeypatch.setenv("COLUMNS", str(width))
            assert run_main("plan", model, "--tp", 2) == 0
        rows = [ANSI.sub("", line).strip() for line in seen[0].splitlines()]
        at = next(
            i for i, row in enumerate(rows) if row.startswith("model.layers.{0-1}.post_attention_layernorm.weight")
        )
        assert " ".join(" ".join(rows[at : at + lines]).split()).endswith(".weight F32 [16] replicate [16]"), seen[0]


def test_no_name_steers_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "a\x1b[31m\x07\x9b31m\u202eb"
    monkeypatch.chdir(tmp_path)
    model = llama(tmp_path / evil)
    tensors = read_all(model)
    write(tmp_path / f"{evil}.safetensors", {f"{evil}.weight": tensors["lm_head.weight"]})
    out = f"{evil}-tp2"
    (tmp_path / f"{evil}.toml").write_text("\x1b[31m")
    for code, *arguments in (
        (0, "split", evil, "--tp", 2, "--no-fsync"),
        (0, "inspect", out),
        (0, "inspect", f"{evil}.safetensors"),
        (0, "check", out, "--source", evil),
        (0, "verify", out, "--source", evil, "--tier", "bytes"),
        (0, "advise", evil, "--gpus", 2, "--gpu-memory", 1),
        (2, "plan", evil, "--tp", 2, "--rules", f"{evil}.toml"),
        (9, "split", evil, "--tp", 2, "--no-fsync"),
    ):
        with terminal(monkeypatch, "stdout", "stderr") as seen:
            monkeypatch.setenv("NO_COLOR", "1")
            assert run_main(*arguments) == code
        assert not {"\x07", "\x9b", "\u202e"} & set(seen[0]) and "\x1b[31m" not in seen[0], arguments
        assert "\\x1b[31m\\x07\\x9b31m\\u202eb" in seen[0].replace("\r\n", ""), (arguments, seen[0])


def run_main(*arguments: object) -> object:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def test_a_report_in_markdown_shows_names_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    evil = "<script>`|[x](y)\x1b"
    model = llama(tmp_path / evil)
    succeeds("split", model, "--tp", 2, "-o", "out", "--no-fsync")
    succeeds("verify", "out", "--source", evil, "--tier", "bytes", "--report", "r.md", "--report", "r.xml")
    assert "&lt;script&gt;\\`\\|\\[x\\](y)\\\\x1b" in Path("r.md").read_text()
    ElementTree.parse("r.xml")
    assert tpshard("verify", evil, "--source", evil, "--report", "e.md", "--report", "e.xml").code == 3
    for report in (Path("r.md"), Path("e.md"), Path("r.xml"), Path("e.xml")):
        assert "<script" not in report.read_text() and "\x1b" not in report.read_text()
    assert ElementTree.parse("e.xml").find(".//testcase") is not None


@pytest.mark.parametrize(
    ("typed", "values"),
    [
        ("split model --format d", ["deepseek", "dcp", "dcp-hf"]),
        ("verify set --tier bytes,e", ["bytes,exact"]),
        ("archs show qwen2_m", ["qwen2_moe"]),
    ],
)
def test_values_are_completed(typed: str, values: list[str]) -> None:
    words = f"tpshard {typed}"
    asked = {"_TPSHARD_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    code = "import sys; sys.argv[0] = 'tpshard'; from tpshard.cli.main import main; main()"
    found = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True)
    assert sorted(found.stdout.split()) == sorted(values), found.stderr
