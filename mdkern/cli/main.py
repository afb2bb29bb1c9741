"""The command line: ``mdkern sample``, ``profile``, ``evaluate``, ``importance``, ``search``.

Results go to standard output, all else to standard error.

A command is a module with a function that adds its parser and one that runs it. PyTorch is imported when a command
runs, not before.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from mdkern import __version__
from mdkern.cli.common import discard_stdout, one_line
from mdkern.cli.evaluate import add_evaluate
from mdkern.cli.importance import add_importance
from mdkern.cli.profile import add_profile
from mdkern.cli.sample import add_sample
from mdkern.cli.search import add_search
from mdkern.threads import wait_without_spinning

EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED = 2, 1, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 2 for bad input, 1 for a failure, 130 for an interrupt."""
    wait_without_spinning()
    open_streams()
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        print(f"mdkern: interrupted{notes(error)}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of standard output has left: nothing to say
        discard_stdout()
        return EXIT_FAILED
    except (FloatingPointError, TimeoutError, MemoryError) as error:
        return fail(error, EXIT_FAILED)
    except OSError as error:
        discard_stdout()  # whose disk may be the full one
        return fail(error, EXIT_FAILED)
    except ValueError as error:
        return fail(error, EXIT_BAD_INPUT)
    return 0


def open_streams() -> None:
    """Make sure that there are standard streams, be it to nowhere, and that writing a text to one cannot fail."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # a closed one's number would go to the next file opened
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for as long as the process)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 gets question marks, not an error


def fail(error: Exception, code: int) -> int:
    if first_process() or isinstance(error, TimeoutError):  # every process knows an error, but for one that is lost
        print(f"mdkern: error: {one_line(error)}{notes(error)}", file=sys.stderr)
    return code


def notes(error: BaseException) -> str:
    """What was added to an error on its way, such as what became of finished samples."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))


def first_process() -> bool:
    """Whether this process is the one that speaks: not one of ``torchrun``'s further ones."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK", "0") == "0"


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, the same for every command."""

    def error(self, message: str) -> NoReturn:
        text = f"mdkern: error: {message} (see {self.prog} --help)\n"
        self.exit(EXIT_BAD_INPUT, text if first_process() else None)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="mdkern", description="Sampling from masked diffusion language models.", allow_abbrev=False)
    parser.add_argument("-V", "--version", action="version", version=f"mdkern {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_sample(commands)
    add_profile(commands)
    add_evaluate(commands)
    add_importance(commands)
    add_search(commands)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
