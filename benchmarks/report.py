"""Draw the README's tables from the JSON in ``benchmarks/results``: ``python -m benchmarks.report``.

A table stands in the README between ``<!-- table NAME -->`` and ``<!-- end -->``; everything between is replaced.
With ``--check`` nothing is written and the exit code says whether the README is up to date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import decoder_tables, kernel_tables, paper_tables
from benchmarks.bench_sampling import write_text_whole
from benchmarks.kernel_tables import load, markdown

README = Path(__file__).parent.parent / "README.md"
PLACE = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def sampling(device: str) -> str:
    """Seconds and ratios of the whole sampler."""
    content = load(f"sampling-{device}")
    versions = content["versions"]
    peers = [name for name in content["rows"][0]["median"] if name != "mdkern"]
    rows = [
        [
            f"{row['label']} (`{row['schedule']}`)",
            f"{sum(row['nfe_per_sequence'].values()):.0f}",
            f"{row['median']['mdkern']:.2f} s",
            *(f"{row['median'][peer]:.2f} s ({row['ratio'][peer]:.2f} ×)" for peer in peers),
        ]
        for row in content["rows"]
    ]
    caption = (
        f"{content['num_samples']} samples, L = {content['length']}, T = {content['steps']}, {versions['device']}, "
        f"{versions['threads']} threads, torch {versions['torch']}; medians of "
        f"{len(content['rows'][0]['seconds']['mdkern'])} "
        "interleaved rounds. × is the baseline's time over ours.\n\n"
    )
    return caption + markdown(["schedule", "passes a sequence", "mdkern", *(f"`{peer}`" for peer in peers)], rows)


TABLES: dict[str, Callable[[], str]] = {
    "sampling-cpu": lambda: sampling("cpu"),
    "sampling-cuda": lambda: sampling("cuda"),
    "vocab-projection": kernel_tables.vocab_projection,
    "select": kernel_tables.select,
    **paper_tables.TABLES,
    **decoder_tables.TABLES,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the README is out of date")
    check = parser.parse_args().check
    old = README.read_text()
    new = PLACE.sub(lambda place: place[1] + TABLES[place[2]]() + place[3], old)
    if check:
        return int(old != new)
    write_text_whole(README, new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
