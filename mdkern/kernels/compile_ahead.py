"""Compiles the Triton kernels of a computation side by side, instead of each at its first launch.

Triton compiles a kernel when it is first launched, which takes seconds for the large ones. Inside `launches_compile` a
launch hands its kernel to threads and returns at once; nothing is launched. What a computation needs is thus known from
running it once in a way in which its results do not matter, whatever model and options it has. Most of the compiler
works outside of Python's lock, so that threads share its work out over the cores. What holds the lock, the translation
of Python into the compiler's language, takes half a second and more for a large kernel. So each of those is compiled in
a forked copy of this process (`forked`), and read from Triton's cache afterwards; the copy is made at the launch, while
no thread compiles anything, because the locks of the compiler's threads would stay taken in it. What is translated here
takes turns, first those kernels that take the rest of the compiler longest, so that it has them while the next ones are
translated. Work that comes before the computation can wait for it (`when_compiled`), so that the kernels of both are
compiled at the same time. Times: docs/notes/first-call.md.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from types import ModuleType, SimpleNamespace
from typing import Any
from weakref import WeakSet

import torch

from mdkern.kernels.device import has_triton
from mdkern.kernels.forked import forks, has_succeeded, start_in_copy

SLOWEST = ("linear_kernel", "resident_kernel")  # which take the compiler longest once they have been translated
MOST_THREADS = 2 * (os.cpu_count() or 1)  # as some wait for their turn, or for a C compiler
logger = logging.getLogger(__name__)


class Rehearsing(threading.local):
    """Whether this thread's launches compile and do nothing else."""

    value: bool = False
    launched: Any = None  # the kernel that is being launched


_rehearsing = Rehearsing()
_alone = threading.Lock()  # as classes of Triton are changed meanwhile
_starting = threading.Lock()
_noting = threading.Lock()  # of what is postponed
_rehearsed: set[Hashable] = set()


@dataclass(eq=False)
class Postponed:
    """Work that waits for its kernels. It is forgotten with whoever needs it."""

    work: Callable[[], Any]
    device: torch.device
    thread: int

    def finish(self) -> None:
        """Do the work, unless that has been done. During a rehearsal there is no need to."""
        if self in _postponed and not _rehearsing.value:
            with launches_compile(self.device, self):
                pass


_postponed: WeakSet[Postponed] = WeakSet()


def can_compile_ahead(device: torch.device) -> bool:
    """Whether Triton is there, and its version compiles asynchronously."""
    if not has_triton(device):
        return False
    import triton

    return hasattr(triton, "AsyncCompileMode")


@contextmanager
def launches_compile(device: torch.device, *wanted: Postponed) -> Iterator[None]:
    """Inside, this thread's launches of mdkern's kernels compile them and do nothing else. At the end all are ready.

    A kernel that cannot be compiled is left to its launch, which raises the error where it belongs. What this thread
    has postponed, and what is `wanted`, is compiled, too, and done while the other kernels are compiled.
    """
    with _alone, ExitStack() as last, ThreadPoolExecutor(MOST_THREADS) as threads:
        start_triton(device)
        mine = threading.get_ident(), device
        with _noting:
            postponed = [one for one in _postponed if one in wanted or (one.thread, one.device) == mine]
        turns = Turns()
        loading = Loading(threads, turns, device)
        last.callback(loading.wait_for_copies)
        last.enter_context(launchers_apart(loading))  # until the threads have ended
        with translated_in_turn(loading), compiled_by(loading), warm_ups_for_launches():
            _rehearsing.value = True
            try:
                yield
                for one in postponed:
                    one.work()
            finally:
                _rehearsing.value = False
                turns.give_back()
            for one in postponed:
                one.work()  # its launches wait for their own kernels alone
            if postponed and device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()  # whoever needs it may be on another stream
            with _noting:
                _postponed.difference_update(postponed)


def is_rehearsing() -> bool:
    """Whether this thread is inside `launches_compile`."""
    return _rehearsing.value


def rehearse_once(key: Hashable, work: Callable[[], Any], device: torch.device) -> None:
    """Compile the kernels of some work, by doing it once without its launches, unless that has been done.

    Args:
        key: of the work.
        work: may write what it likes, as it is done again, and must not look up places that kernels compute.
    """
    if key in _rehearsed or not can_compile_ahead(device):
        return
    try:
        with launches_compile(device):
            work()
    except Exception as error:  # the work itself will meet it
        logger.debug("some work could not be rehearsed: %s", error)
        return
    _rehearsed.add(key)


def when_compiled(key: Hashable, work: Callable[[], Any], device: torch.device) -> Postponed | None:
    """Do some work now or, the first time, once its kernels have been compiled, with those of the next rehearsal.

    Args:
        key, work: as for `rehearse_once`.

    Returns:
        What was postponed. Its `finish` must be called before anything is read that the work writes. None if the work
        has been done.
    """
    if key in _rehearsed or not can_compile_ahead(device):
        work()
        return None
    _rehearsed.add(key)
    threading.Thread(target=start_triton, args=(device,)).start()
    postponed = Postponed(work, device, threading.get_ident())
    with _noting:
        _postponed.add(postponed)
    return postponed


def start_triton(device: torch.device) -> None:
    """What Triton does once in a process: it reads its own library for its cache's keys, while a C compiler makes the
    module by which it talks to the driver."""
    from triton.runtime import driver
    from triton.runtime.cache import triton_key

    with _starting, current(device):
        key = threading.Thread(target=triton_key)
        key.start()
        with suppress(Exception):  # the first launch meets it
            driver.active.get_current_target()
        key.join()


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, the device is the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def compiled_by(loading: Loading) -> Iterator[None]:
    """Inside, Triton has this thread's kernels compiled there. Also after an interrupt this ends with the block."""
    import triton
    from triton.runtime._async_compile import active_mode

    try:
        with triton.AsyncCompileMode(loading, ignore_errors=True):
            yield
    finally:
        active_mode.set(None)


class NotCompiled(Exception):  # noqa: N818  it is no error
    """Ends a compilation before the kernel is translated: Triton's cache does not have it."""


class Here(threading.local):
    """What this thread compiles for `Loading`."""

    translates: bool | None = None  # None: nothing. False: only what Triton's cache has
    launcher: threading.Thread | None = None


class Loading(Executor):
    """Compiles in threads or copies of the process, and loads the outcome into the device's memory in threads."""

    def __init__(self, threads: ThreadPoolExecutor, turns: Turns, device: torch.device) -> None:
        self.threads, self.turns, self.device, self.here = threads, turns, device, Here()
        self.copies: set[int] = set()  # that have not been waited for
        self.modules = threading.Lock()  # one launcher is loaded at a time

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        work, kernel, copy = partial(function, *args, **kwargs), None, None
        if _rehearsing.launched is not None and _rehearsing.launched.is_gluon():
            kernel, copy = self.start_apart(work)
        return self.threads.submit(self.load, work, kernel, copy)

    def wait_for_copies(self) -> None:
        """Wait for those copies that no thread could be told of, because of an interrupt."""
        for copy in tuple(self.copies):
            has_succeeded(copy)

    def load(self, work: Callable[[], Any], kernel: Any, copy: int | None) -> Any:
        """In a thread: the kernel, ready to be launched. If a copy of the process compiles it, that is waited for."""
        if copy is not None:
            has_succeeded(copy)  # if not, the work is done here
            self.copies.discard(copy)
        if kernel is None:
            kernel = self.compile(work)
        with current(self.device):
            kernel.run  # noqa: B018  builds the launcher, unless that has been done, and loads the kernel
        return kernel

    def compile(self, work: Callable[[], Any]) -> Any:
        """Do the work, with a launcher built beside it."""
        self.here.translates, self.here.launcher = True, None
        try:
            return work()
        finally:
            self.here.translates = None
            if self.here.launcher is not None:
                self.here.launcher.join()

    def start_apart(self, work: Callable[[], Any]) -> tuple[Any, int | None]:
        """The kernel if Triton's cache has it, or the id of a copy of this process that begins to compile it."""
        from triton import knobs

        if knobs.compilation.always_compile or not forks.are_of_use():
            return None, None
        self.here.translates = False
        try:
            return work(), None
        except NotCompiled:
            pass
        finally:
            self.here.translates = None

        def apart() -> None:
            _rehearsing.value = False
            self.turns, self.modules = Turns(), threading.Lock()  # other threads may have had the old locks
            self.turns.give_back()
            knobs.compilation.listener = None  # is told when the cache is read
            self.compile(work)

        copy = start_in_copy(apart)
        if copy is not None:
            self.copies.add(copy)
        return None, copy

    def translate(self, source: Any, weight: float, translation: Callable[[], Any]) -> Any:
        """Translate a kernel in turn. Then a C compiler, if one is needed, builds its launcher beside the rest."""
        self.turns.take(weight)
        try:
            module = translation()
        finally:
            self.turns.give_back()
        descriptors = descriptors_of(source, module)
        if descriptors is not None:
            self.here.launcher = threading.Thread(target=build_launcher, args=(source, descriptors))
            self.here.launcher.start()
        return module


def descriptors_of(source: Any, module: Any) -> list[Any] | None:
    """How a kernel reads the matrices whose descriptors it is given, as its launcher must know. Of a kernel that is not
    in Gluon the compiler decides it later: then None, as the process would crash if Triton were asked now."""
    from triton.experimental.gluon._runtime import GluonASTSource

    if isinstance(source, GluonASTSource):
        return list(module.get_tensordesc_metadata())
    return None if any("tensordesc" in str(kind) for kind in source.signature.values()) else []


def build_launcher(source: Any, descriptors: Any) -> None:
    """Have Triton's cache contain the launcher of a kernel, which depends on its arguments alone."""
    from triton.runtime import driver

    sizes = ("global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align")
    unknown = dict.fromkeys((*sizes, "launch_cooperative_grid", "launch_pdl"), 0)
    with suppress(Exception):  # it is built later
        driver.active.launcher_cls(source, SimpleNamespace(tensordesc_meta=descriptors, **unknown))


@contextmanager
def launchers_apart(loading: Loading) -> Iterator[None]:
    """Inside, each launcher that is loaded keeps its own functions.

    Triton 3.6's launchers are C extensions of one name. Where a process loads one of them again, Python puts its
    functions into the module that has that name, which may be another launcher that a thread has just loaded. That
    kernel would be launched with the arguments of the wrong one.
    """
    from triton.runtime import build

    private = "_load_module_from_path"
    plain: Callable[[str, str], ModuleType] | None = getattr(build, private, None)
    if plain is None:  # of a later Triton, which needs no launchers
        yield
        return

    def load(name: str, path: str) -> ModuleType:
        own = ModuleType(name)
        with loading.modules:
            own.__dict__.update(vars(plain(name, path)))
        return own

    with replaced(build, private, load):
        yield


@contextmanager
def warm_ups_for_launches() -> Iterator[None]:
    """Inside, this thread's launches of mdkern's kernels are Triton's warm-ups, which compile and launch nothing."""
    from triton.runtime.jit import JITFunction

    plain = JITFunction.run
    package = __name__.partition(".")[0]

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        ours = _rehearsing.value and self.fn.__module__.partition(".")[0] == package
        _rehearsing.launched = self if ours else None
        try:
            return plain(self, *args, grid=grid, warmup=warmup or ours, **kwargs)
        finally:
            _rehearsing.launched = None

    with replaced(JITFunction, "run", run):
        yield


class Turns:
    """One thread at a time has the turn, those that wait for it by their weight. At first it is the thread that makes
    this."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.waiting: list[tuple[float, int]] = []  # the heaviest first
        self.holder: int | None = threading.get_ident()
        self.number = 0

    def take(self, weight: float) -> None:
        with self.changed:
            self.number += 1
            mine = -weight, self.number
            heappush(self.waiting, mine)
            self.changed.wait_for(lambda: self.holder is None and self.waiting[0] == mine)
            heappop(self.waiting)
            self.holder = threading.get_ident()

    def give_back(self) -> None:
        """Let the next one have the turn, if this thread has it."""
        with self.changed:
            if self.holder == threading.get_ident():
                self.holder = None
                self.changed.notify_all()


def weight_of(name: str, source: str, gluon: bool) -> float:
    """How early a kernel should be translated: the slowest, then those in Gluon, then the longest."""
    return len(source) + (1e9 if name in SLOWEST else 1e6 if gluon else 0.0)


@contextmanager
def translated_in_turn(loading: Loading) -> Iterator[None]:
    """Inside, what `Loading` compiles is translated from Python in turn. Those of the most `weight_of` come first."""
    from triton.compiler.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    def taking_turns(plain: Callable[..., Any]) -> Callable[..., Any]:
        def make_ir(source: Any, *args: Any, **kwargs: Any) -> Any:
            translation = partial(plain, source, *args, **kwargs)
            if loading.here.translates is None:  # of another computation
                return translation()
            if not loading.here.translates:
                raise NotCompiled
            weight = weight_of(source.name, source.fn.src, isinstance(source, GluonASTSource))
            return loading.translate(source, weight, translation)

        return make_ir

    with ExitStack() as changes:
        for kind in (ASTSource, GluonASTSource):
            changes.enter_context(replaced(kind, "make_ir", taking_turns(kind.make_ir)))
        yield


@contextmanager
def replaced(owner: type | ModuleType, name: str, value: Any) -> Iterator[None]:
    """Inside, an attribute of a class or a module has another value."""
    plain = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, plain)
