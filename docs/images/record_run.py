"""Draws run.svg, the picture in README.md, from a real run, and prints two summaries for its text.

Run it as ``.venv/bin/python docs/images/record_run.py`` from any folder. It trains ``flights``
twice in an empty temporary folder, which stands for ``~`` in what is shown.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

PIPELINE = "flights"
COLUMNS = 120
PICTURE = Path(__file__).with_name("run.svg")
OUTSIDE = ("ASSAY_", "PREFECT_", "MLFLOW_")
FONTS = "'DejaVu Sans Mono', Menlo, Consolas, monospace"


def main() -> None:
    """Run twice, draw the first run, print both summaries."""
    with tempfile.TemporaryDirectory(prefix="assay-picture-") as home:
        runs = [run(Path(home)) for _ in range(2)]
    PICTURE.write_text(draw(*runs[0]), encoding="utf-8")
    for _, summary in runs:
        sys.stdout.write(summary + "\n")


def run(home: Path) -> tuple[str, str]:
    """The log and the summary of a run in ``~/assay``, as the command writes them."""
    folder = home / "assay"
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [Path(sys.executable).with_name("assay"), "run", PIPELINE],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith(OUTSIDE)},
        check=True,
        capture_output=True,
        text=True,
    )
    commands = f"{Path(sys.executable).parent}/"  # as with .venv activated
    both = (done.stderr, done.stdout)
    log, summary = (text.replace(str(home), "~").replace(commands, "") for text in both)
    return log, summary


def draw(log: str, summary: str) -> str:
    """A terminal with the command, its log and its summary, as SVG that loads nothing."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True)
        console.print(Text("$ make retrain", style="bold"))
        for line in log.splitlines():
            text = Text(line, style="bright_white", overflow="fold")
            text.highlight_regex(r"^[\d:.]+ \| \w+ +\| (Flow|Task) run '[\w-]+' - ", "grey62")
            console.print(text)
        for line in summary.splitlines():
            text = Text(line, overflow="fold")
            text.highlight_regex(r"^\w+(?=  )", "bold cyan")
            text.highlight_regex(r": promoted$", "bold green")
            console.print(text)
        # No @font-face: a picture on a page may not load fonts, and should not.
        form = re.sub(r"@font-face \{\{.*?\}\}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
        form = form.replace("Fira Code, monospace", FONTS)
        return console.export_svg(
            title=f"assay run {PIPELINE}", theme=MONOKAI, code_format=form, unique_id="assay"
        )


if __name__ == "__main__":
    main()
