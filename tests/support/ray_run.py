"""Runs workers as a command would: SIGTERM interrupts, and the exit status is then 130."""

import signal
import sys
from pathlib import Path
from typing import Any

from components.adapters.ray_train import run_workers


def interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, interrupt)
    entry, payload, folder = sys.argv[1:]
    try:
        run_workers(entry, payload, workers=2, folder=Path(folder))
    except KeyboardInterrupt:
        sys.exit(130)
