"""The one output object: data on stdout, talk on stderr, as text or as JSON. All that is shown is escaped here."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from tpshard.errors import Interrupted, TpshardError
from tpshard.units import human_bytes, printable

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

_SILENT = 2.0  # seconds without a word, when a terminal watches
_PLAIN_EVERY = 10.0  # seconds between progress lines when no terminal watches


def drop_stdout() -> None:
    """Send what is still buffered for stdout nowhere: whoever read it has left, or its disk is full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Console:
    """Where a command talks. json: stdout carries one JSON object and nothing else. quiet: no talk but errors."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet

    @staticmethod
    def rich() -> RichConsole:
        """A rich console on stdout; imported late, because it costs as much as the rest of the start-up."""
        from rich.console import Console as RichConsole
        from rich.text import Text

        class OnStdout(RichConsole):
            def on_broken_pipe(self) -> None:
                raise BrokenPipeError  # rich would exit with 1, which means "judged different" here

            def render_str(self, text: str, **how: Any) -> Text:
                return super().render_str(printable(text), **how)  # what is printed, and every cell of a table

        # A file or a pipe has no width: a row is a line there. Names may hold brackets and colons, so no markup.
        width = None if sys.stdout.isatty() else 100_000
        return OnStdout(width=width, markup=False, emoji=False, highlight=False)

    def say(self, text: str) -> None:
        """A message for the user, on stderr."""
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)

    @staticmethod
    def show(*lines: object) -> None:
        """Lines of the result on stdout."""
        for line in lines:
            print(printable(str(line)))

    @staticmethod
    def path(path: object) -> None:
        """A path as the result on stdout: a script gets it as it is, a terminal is not steered by it."""
        print(printable(str(path)) if sys.stdout.isatty() else path)

    def warn(self, *texts: str) -> None:
        """What may surprise, on stderr."""
        for text in texts if not self.quiet else ():
            print(f"{self._paint('warning', '33')}: {printable(text)}", file=sys.stderr, flush=True)

    def different(self, text: str) -> None:
        """What was judged different, in one line on stderr: as an error, also with --quiet."""
        print(f"{self._paint('different', '31;1')}: {printable(text)}", file=sys.stderr)

    def data(self, value: dict[str, Any]) -> None:
        """The result as JSON on stdout."""
        print(json.dumps(value, indent=2 if sys.stdout.isatty() else None))

    def pieces(self, texts: Iterable[str]) -> None:
        """The same, of a result that is too large to be held as one text."""
        sys.stdout.writelines(texts)
        print()

    def error(self, error: TpshardError) -> None:
        """An error: one line and its way out on stderr, and the object on stdout with --json."""
        print(f"{self._paint('error', '31;1')}: {printable(str(error))}", file=sys.stderr)
        if error.hint:
            print(f"{self._paint('hint', '36')}: {printable(error.hint)}", file=sys.stderr)
        try:
            if self.as_json:
                self.data({"schema_version": 1, "error": error.to_json()})
            sys.stdout.flush()
        except OSError:
            drop_stdout()

    @staticmethod
    def _paint(text: str, code: str) -> str:
        colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        return f"\033[{code}m{text}\033[0m" if colour else text

    @contextmanager
    def patience(self, what: str) -> Iterator[None]:
        """Say on a terminal what is being done, and for how long, from two seconds on."""
        note = _Note(what) if sys.stderr.isatty() and not self.quiet else None
        try:
            yield
        finally:
            if note:
                note.stop()

    @contextmanager
    def progress(self, what: str) -> Iterator[ProgressMeter]:
        """Show bytes, rate and time left while a command moves bytes: a bar on a terminal, else a line now and then."""
        meter = _Bar(what) if sys.stderr.isatty() and not self.quiet else _Lines(what, self)
        try:
            yield meter
        finally:
            meter.stop()


class ProgressMeter:
    """Counts bytes. `start` and `add` may be called from any thread."""

    def start(self, total: int) -> None:
        """Begin: `total` bytes are to be moved."""

    def add(self, count: int) -> None:
        """`count` more bytes were moved."""

    def stop(self) -> None:
        """The command ended, well or not."""


class _Lines(ProgressMeter):
    def __init__(self, what: str, console: Console) -> None:
        self.what = what
        self.console = console
        self.done = 0
        self.start(0)
        self._lock = threading.Lock()

    def start(self, total: int) -> None:
        self.total = total
        self._began = self._last = time.monotonic()

    def add(self, count: int) -> None:
        with self._lock:
            self.done += count
            now = time.monotonic()
            if now - self._last < _PLAIN_EVERY:
                return
            self._last = now
        rate = self.done / (now - self._began)
        left = max(0.0, self.total - self.done) / rate if rate else 0.0
        share = f"{human_bytes(self.done)} of {human_bytes(self.total)}"
        self.console.say(f"{self.what}: {share}, {human_bytes(rate)}/s, {left:.0f} s left")


class _Note:
    """A line on a terminal that counts seconds, and is gone when it is stopped."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._count, daemon=True)
        self._thread.start()

    def _count(self) -> None:
        began = time.monotonic()
        wait = _SILENT
        while not self._over.wait(wait):
            print(f"\r{self._what}: {time.monotonic() - began:.0f} s", end="", file=sys.stderr, flush=True)
            wait = 1.0
        if wait < _SILENT:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


class _Bar(ProgressMeter):
    def __init__(self, what: str) -> None:
        from rich import progress as rich
        from rich.console import Console as RichConsole

        numbers = (rich.DownloadColumn(), rich.TransferSpeedColumn(), rich.TimeRemainingColumn())
        columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), *numbers)
        self._bar = rich.Progress(*columns, console=RichConsole(stderr=True), transient=True)
        self._what = what
        self._note = _Note(f"{what}: reading headers and planning")

    def start(self, total: int) -> None:
        self._note.stop()
        self._task = self._bar.add_task(self._what, total=total)
        self._bar.start()

    def add(self, count: int) -> None:
        self._bar.update(self._task, advance=count)

    def stop(self) -> None:
        self._note.stop()
        self._bar.stop()


@contextmanager
def opened(as_json: bool, quiet: bool, resumes: bool = False) -> Iterator[Console]:
    """A command's output object. `resumes`: the command can be repeated after Ctrl-C."""
    try:
        yield Console(as_json=as_json, quiet=quiet)
        sys.stdout.flush()
    except BrokenPipeError:
        drop_stdout()
        raise typer.Exit(141) from None  # as when SIGPIPE ends a program: `head` has seen enough
    except KeyboardInterrupt:
        hint = "the same command resumes where it stopped" if resumes else None
        raise Interrupted("interrupted", hint=hint) from None
