"""The command line: ``mdkern sample``, ``chat``, ``profile``, ``evaluate``, ``importance``, ``search``.

Results go to standard output, everything else to standard error.

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
from mdkern.cli.chat import add_chat
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
    except BrokenPipeError:  # the reader of standard output has gone, so there is nobody to tell
        discard_stdout()
        return EXIT_FAILED
    except (FloatingPointError, TimeoutError, MemoryError) as error:
        return fail(error, EXIT_FAILED)
    except OSError as error:
        discard_stdout()  # its disk may be the full one
        return fail(error, EXIT_FAILED)
    except ValueError as error:
        return fail(error, EXIT_BAD_INPUT)
    return 0


def open_streams() -> None:
    """Make sure that standard streams exist, if only to discard what is written, and that every text can be written."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # the next file opened would get the number of a closed one
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for as long as the process)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 gets question marks, not an error


def fail(error: Exception, code: int) -> int:
    if first_process() or isinstance(error, TimeoutError):  # all processes have the error, except lost ones
        print(f"mdkern: error: {one_line(error)}{notes(error)}", file=sys.stderr)
    return code


def notes(error: BaseException) -> str:
    """Notes that were added to an error, such as where finished samples are."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))


def first_process() -> bool:
    """Whether this process is the one that prints: the first one under ``torchrun``, or the only one."""
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
    add_chat(commands)
    add_profile(commands)
    add_evaluate(commands)
    add_importance(commands)
    add_search(commands)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
