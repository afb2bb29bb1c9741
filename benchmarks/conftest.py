"""Where the benchmarks' results go: into ``benchmarks/results`` when that is asked for, else they are only shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.harness import RESULTS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--keep-results", action="store_true", help="measure at full size, and write the results to benchmarks/results"
    )


@pytest.fixture(scope="session")
def kept(request: pytest.FixtureRequest) -> bool:
    """Whether the results are to be kept."""
    return bool(request.config.getoption("--keep-results"))


@pytest.fixture(scope="session")
def results(kept: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that results are written to."""
    return RESULTS if kept else tmp_path_factory.mktemp("results")
