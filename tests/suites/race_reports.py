"""Reads what compute-sanitizer's racecheck says of mdkern's kernels; fails if it is more than Triton's own hand-over.

    compute-sanitizer --tool racecheck python -m tests.suites.small_launches | python -m tests.suites.race_reports

Where groups of warps have different work, Triton tells them through words in shared memory which work that is, and
orders this by barriers of all warps that stand at different places. Racecheck reports these words of every kernel that
also has a barrier of its own in shared memory, even of one that does nothing else. They belong to the kernel's first
line, or to the statement with its `gl.warp_specialize`. Anything that it says of another line is a race.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

KERNELS = Path(__file__).parents[2] / "mdkern" / "kernels"
PLACE = re.compile(r"(?:Read|Write|Atomic) access at \S+(?: in (\S+):(\d+))?")


def hand_over_lines(source: str) -> set[int]:
    """Numbers of the lines of a module to which Triton's words belong: kernels that divide their warps, and where."""
    lines = set()
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and divides(function):
            lines |= {function.lineno, *(decorator.lineno for decorator in function.decorator_list)}
            lines |= {part.lineno for part in ast.walk(function) if isinstance(part, ast.stmt) and divides(part)}
    return lines


def divides(part: ast.AST) -> bool:
    calls = (each.func for each in ast.walk(part) if isinstance(each, ast.Call))
    return any(isinstance(called, ast.Attribute) and called.attr == "warp_specialize" for called in calls)


def races(lines: Iterable[str], kernels: Path = KERNELS) -> list[str]:
    """The lines that report an access which does not belong to Triton's hand-over of work to warps."""
    found = []
    for line in lines:
        for name, number in PLACE.findall(line):
            files = list(kernels.rglob(name)) if name else []
            if len(files) != 1 or int(number) not in hand_over_lines(files[0].read_text()):
                found.append(line.rstrip())
    return found


def main() -> int:
    lines = list(sys.stdin)
    print(*lines, sep="", end="")
    text = "".join(lines)
    if "RACECHECK SUMMARY" not in text or "returned an error" in text:
        print("the program that is examined, or racecheck, failed")
        return 1
    found = races(lines)
    print(f"{len(found)} reports beside Triton's own hand-over", *found, sep="\n")
    return min(1, len(found))


if __name__ == "__main__":
    raise SystemExit(main())
