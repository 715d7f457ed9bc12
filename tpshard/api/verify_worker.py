"""One of the processes that `verify` starts on a host: a rank of its own, and the end of its parent is its end."""

import os
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

from tpshard.api.verify import judge
from tpshard.errors import TpshardError
from tpshard.verifier.launch import Surroundings, join


def work(folder: Path, rank: int, size: int) -> None:
    """One of the processes that `start` starts."""

    def end_with_parent() -> None:
        while os.read(0, 1):  # not sys.stdin: its lock must be free when the interpreter ends
            pass
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    options = pickle.loads((folder / "options").read_bytes())

    def say(line: str) -> None:
        if rank == 0:
            print(line, flush=True)

    group = Surroundings("tpshard", rank, size, rank, f"file://{folder}/meeting")
    outcome: Any
    try:
        outcome = join(group, options.device, lambda team, sharing: judge(options, team, sharing, say))
    except (TpshardError, OSError) as error:
        outcome = error
    if rank == 0:
        (folder / "result.new").write_bytes(pickle.dumps(outcome))
        (folder / "result.new").rename(folder / "result")


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
