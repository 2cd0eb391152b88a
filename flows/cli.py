"""The command ``assay``. Nothing heavy is imported before a command needs it."""

import argparse
import atexit
import os
import sys
import traceback
from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import NoReturn

from components.errors import AssayError, ConfigError
from components.interruption import interrupt_on_signals, interrupt_received

EXIT_CODES = """exit status:
  0  the run completed: the candidate was promoted, or the champion kept
  3  a gate rejected the candidate
  2  usage or configuration
  1  infrastructure"""


REPRODUCE_EXIT_CODES = """exit status:
  0  every digest agrees
  3  a digest differs, or the rebuilt model cannot be trained or exported
  2  usage or configuration: no such version, for example
  1  infrastructure"""

VERIFY_EXIT_CODES = """exit status:
  0  source, contract and gradients are as they should be
  3  something is not; the report says what and where
  2  usage or configuration: the component cannot be imported or built, for example
  1  infrastructure"""

PROMOTION_EXIT_CODES = """exit status:
  0  done
  3  the version was rejected, or its proof failed; nothing was changed
  2  usage or configuration: no such version, for example
  1  infrastructure, or another process moved the champion meanwhile"""

_NOTHING = "nothing was changed"
_KEPT = {"run": "finished stages are kept, run the same command to go on"}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its status."""
    arguments = build_parser().parse_args(argv)
    interrupt_on_signals()
    try:
        status = dispatch(arguments)
        sys.stdout.flush()
    except AssayError as error:
        _say(f"assay: {error}")
        status = error.exit_code
    except KeyboardInterrupt:
        interrupt_received()
        forced = getattr(arguments, "force", False)
        kept = "a forced run starts anew" if forced else _KEPT.get(arguments.command, _NOTHING)
        _say(f"assay: interrupted; {kept}.")
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    except Exception as error:
        _say(_unexpected(error))
        status = 1
    sys.exit(status)


def entry() -> NoReturn:
    """The installed command: :func:`main`, then out without taking the libraries apart.

    PyTorch, MLflow and Prefect need about a second for their teardown, in which nothing is saved.
    This handler is registered first and so runs last, after those that do save something.
    """
    status = 1

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(leave)
    try:
        main()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line as every other error is said."""

    def error(self, message: str) -> NoReturn:
        self.exit(ConfigError.exit_code, f"assay: {message}. See '{self.prog} --help'.\n")


def build_parser() -> argparse.ArgumentParser:
    """The grammar of the command line."""
    parser = _Parser(
        prog="assay",
        description="Retrain a PyTorch model, prove it, and let it become champion only then.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="retrain a pipeline's model and decide who is champion",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    run.add_argument("pipeline", metavar="PIPELINE", help="a name that 'assay pipelines' lists")
    run.add_argument(
        "--as-of",
        type=_date,
        metavar="DATE",
        help="train on the months before the last complete month before this date (2014-01-01)",
    )
    run.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of weights and order (0)"
    )
    run.add_argument("--force", action="store_true", help="train anew though nothing changed")
    run.add_argument(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="KEY=VALUE",
        help="a training setting, for example epochs=3; may be repeated",
    )
    run.add_argument("--json", action="store_true", help="end stdout with one JSON object")
    _add_reproduce(commands)
    _add_verify(commands)
    _add_promotion(commands)
    _add_page(commands)
    commands.add_parser("pipelines", help="list the registered pipelines")
    commands.add_parser("doctor", help="check versions, devices, settings and servers")
    return parser


def _add_reproduce(commands: "argparse._SubParsersAction[_Parser]") -> None:
    reproduce = commands.add_parser(
        "reproduce",
        help="rebuild a registered version from its record and compare every digest",
        epilog=REPRODUCE_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    reproduce.add_argument(
        "version",
        metavar="MODEL@VERSION",
        help="a registered version, or an alias: flights@champion",
    )
    reproduce.add_argument(
        "--here", action="store_true", help="use the code that is here, not that of the commit"
    )
    reproduce.add_argument("--json", action="store_true", help="print one JSON object")


def _add_verify(commands: "argparse._SubParsersAction[_Parser]") -> None:
    verify = commands.add_parser(
        "verify",
        help="verify contract, gradients and source of a component, without data or a server",
        epilog=VERIFY_EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument(
        "component",
        metavar="COMPONENT",
        help="MODULE:NAME of a model, its class, a function that builds it or a Pipeline; or a "
        "pipeline that 'assay pipelines' lists",
    )
    verify.add_argument("--json", action="store_true", help="print one JSON object")


def _add_promotion(commands: "argparse._SubParsersAction[_Parser]") -> None:
    def add(command: str, text: str) -> _Parser:
        parser = commands.add_parser(
            command,
            help=text,
            epilog=PROMOTION_EXIT_CODES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("model", metavar="MODEL", help="a registered model: flights")
        return parser

    why = "why; it is kept in the model's history"
    promote = add("promote", "prove a registered version anew and make it champion")
    promote.add_argument("version", type=_number, metavar="VERSION", help="its number")
    promote.add_argument("--reason", required=True, metavar="TEXT", help=why)
    rollback = add("rollback", "prove an earlier champion anew and make it champion again")
    rollback.add_argument(
        "--to",
        type=_number,
        metavar="VERSION",
        help="the version to return to; else the champion before the present one",
    )
    rollback.add_argument("--reason", required=True, metavar="TEXT", help=why)
    history = add("history", "who was champion, when and why")
    history.add_argument("--json", action="store_true", help="print one JSON object")


def _add_page(commands: "argparse._SubParsersAction[_Parser]") -> None:
    page = commands.add_parser(
        "page", help="write a page that predicts with a registered version in the browser"
    )
    page.add_argument(
        "version",
        metavar="MODEL[@VERSION]",
        help="a registered version, or an alias; without either, the champion",
    )
    page.add_argument("--folder", type=Path, default=Path("page"), help="where the files go (page)")


def dispatch(arguments: argparse.Namespace) -> int:
    """Carry out a parsed command and return its exit status."""
    match arguments.command:
        case "run":
            from flows.commands import run
            from flows.request import Request

            return run(
                Request(
                    pipeline=arguments.pipeline,
                    as_of=arguments.as_of,
                    seed=arguments.seed,
                    assignments=tuple(arguments.assignments),
                    force=arguments.force,
                    as_json=arguments.json,
                )
            )
        case "reproduce":
            from flows.reproduce import reproduce

            return reproduce(arguments.version, here=arguments.here, as_json=arguments.json)
        case "verify":
            from flows.verify import verify

            return verify(arguments.component, as_json=arguments.json)
        case "promote":
            from flows.promotion import promote

            return promote(arguments.model, arguments.version, arguments.reason)
        case "rollback":
            from flows.promotion import rollback

            return rollback(arguments.model, arguments.to, arguments.reason)
        case "history":
            from flows.promotion import history

            return history(arguments.model, as_json=arguments.json)
        case "page":
            from flows.page import page

            return page(arguments.version, arguments.folder)
        case "pipelines":
            return list_pipelines()
        case "doctor":
            from flows.doctor import doctor

            return doctor()
    raise ConfigError(f"unknown command {arguments.command!r}; see 'assay --help'.")


def list_pipelines() -> int:
    """Print names and where they come from, without importing any pipeline."""
    from components.pipeline_entries import pipeline_entries

    entries = pipeline_entries()
    width = max(map(len, entries), default=0)
    for name, entry in entries.items():
        print(f"{name:<{width}}  {entry.value}")
    return 0


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a date such as 2014-01-01; got {text!r}"
        ) from None


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"must be a version's number such as 3; got {text!r}")
    return int(text)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _unexpected(error: Exception) -> str:
    """One paragraph on the terminal; the traceback goes to a file."""
    text = "".join(traceback.format_exception(error))
    place = "it could not be kept"
    try:
        from components.settings import load_settings

        folder: Path = load_settings().root / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"error-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{os.getpid()}.txt"
        path.write_text(text)
        place = f"it is in {path}"
    except (OSError, AssayError):
        _say(text)
    return (
        f"assay: an error that nothing foresaw, {type(error).__name__}: {error}. "
        f"The traceback tells where; {place}. Run 'assay doctor' to check the installation."
    )


if __name__ == "__main__":
    entry()
