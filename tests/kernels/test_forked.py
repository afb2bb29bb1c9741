"""Work in forked copies of the process."""

# mypy: ignore-errors

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from mdkern.kernels import forked
from tests.own_process import run_in_own_process

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be copied here")


@pytest.fixture(autouse=True)
def none_has_failed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(forked, "forks", forked.Forks())
    monkeypatch.delenv("MDKERN_FORK", raising=False)
    copies, fork = list[int](), os.fork

    def noted() -> int:
        child = fork()
        copies.append(child)
        return child

    monkeypatch.setattr(os, "fork", noted)
    yield
    for child in copies:
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)  # it is not there, dead or alive


def has_succeeded(work, seconds: int = 60, patience: float = 60.0) -> bool:
    return forked.has_succeeded(forked.start_in_copy(work, seconds), patience)


def fail() -> None:
    raise ValueError("as it should")


def hang() -> None:
    threading.Lock().acquire()
    signal.pause()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_work_is_done_elsewhere_and_leaves_files(tmp_path) -> None:
    found = tmp_path / "found"
    assert has_succeeded(lambda: found.write_text(str(os.getpid())))
    assert int(found.read_text()) != os.getpid()
    assert has_succeeded(lambda: 1 // (not gc.isenabled())), "a copy would destroy tensors on a GPU"
    assert forked.forks.are_of_use()


@pytest.mark.parametrize("work", [fail, kill, sys.exit])
def test_a_failure_is_told_and_no_copy_is_made_again(work, capfd: pytest.CaptureFixture) -> None:
    assert not has_succeeded(work)
    assert not forked.forks.are_of_use()
    assert capfd.readouterr() == ("", "")


def test_a_copy_that_hangs_is_ended_by_whom_it_makes_wait() -> None:
    assert not has_succeeded(hang, patience=0.01)
    assert not forked.forks.are_of_use()


def test_a_copy_that_hangs_ends_by_itself(tmp_path) -> None:
    """Even if the process that would end it has gone, and whatever that process does at such a signal."""
    plain = signal.signal(signal.SIGALRM, lambda *_: None)
    try:
        assert not has_succeeded(hang, seconds=1)
    finally:
        signal.signal(signal.SIGALRM, plain)


def test_an_interrupt_does_not_reach_a_copy(tmp_path) -> None:
    ready = tmp_path / "ready"
    child = forked.start_in_copy(lambda: (ready.touch(), time.sleep(0.1)))
    while not ready.exists():
        time.sleep(0.001)
    os.kill(child, signal.SIGINT)
    assert forked.has_succeeded(child)


def test_another_thread_can_have_work_done() -> None:
    found = []
    thread = threading.Thread(target=lambda: found.append(has_succeeded(lambda: None)))
    thread.start()
    thread.join()
    assert found == [True]


def test_nothing_of_the_process_happens_twice() -> None:
    """What it has not written yet, and what it does in the end."""
    assert run_in_own_process("tests.kernels.test_forked").split() == ["waiting", "parent"]


def test_a_process_that_cannot_be_copied_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fork", partial(os.open, "/nowhere/at all", os.O_RDONLY))  # raises an OSError
    assert forked.start_in_copy(fail) is None
    assert not forked.forks.are_of_use()


def test_copies_are_made_where_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    assert forked.forks.are_of_use()
    with monkeypatch.context() as inside:
        inside.setenv("MDKERN_FORK", "0")
        assert not forked.forks.are_of_use()
    with monkeypatch.context() as inside:
        inside.setattr(torch.distributed, "is_initialized", lambda: True)
        assert not forked.forks.are_of_use()
    with monkeypatch.context() as inside:
        inside.delattr(os, "fork")
        assert not forked.forks.are_of_use()


def test_a_child_that_the_program_has_collected_itself_is_no_failure() -> None:
    child = forked.start_in_copy(lambda: None)
    os.waitpid(child, 0)
    assert forked.has_succeeded(child)


def test_nobody_warns_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python does from 3.12 on, and tokenizers, unless a variable says how parallel they are."""
    seen, plain = [], os.fork

    def fork() -> int:
        warnings.warn(
            "This process (pid=1) is multi-threaded, use of fork() may lead to deadlocks in the child.",
            DeprecationWarning,
            stacklevel=1,
        )
        seen.append(os.environ.get("TOKENIZERS_PARALLELISM"))
        return plain()

    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setitem(sys.modules, "tokenizers", SimpleNamespace())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for before in (None, "false"):
            monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
            if before:
                monkeypatch.setenv("TOKENIZERS_PARALLELISM", before)
            assert has_succeeded(lambda: None)
            assert os.environ.get("TOKENIZERS_PARALLELISM") == before
    assert seen == ["true", "false"]


def test_large_kernels_are_compiled_in_copies() -> None:
    pytest.importorskip("triton")
    run_in_own_process("tests.suites.compiled_apart", TRITON_INTERPRET="0")


if __name__ == "__main__":
    import atexit

    atexit.register(lambda: print("parent"))
    sys.stdout.write("waiting\n")
    assert forked.has_succeeded(forked.start_in_copy(lambda: None))
