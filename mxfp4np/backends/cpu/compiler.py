"""Build what is made once per process: compiled functions, and the tables that they read.

Numba is imported here, on first use. A signal handler may raise anywhere in the main thread, even in the middle of an
import or of Numba's compiler, and leave them broken for the whole process. So each thing is built in a thread of its
own, which no signal interrupts. The caller waits, and can be interrupted.
"""

from __future__ import annotations

import _imp
import contextlib
import ctypes
import functools
import hashlib
import logging  # noqa: F401 - before the fork handler below
import os
import sys
import threading
import traceback
from collections.abc import Callable, Hashable
from importlib import import_module
from pathlib import Path
from types import FunctionType
from typing import Any, Final

from ... import __version__
from ...errors import BackendUnavailableError
from ..threads import starting_threads

POLL_SECONDS: Final = 0.5
"""The longest time that a caller waits before it looks whether the builder waits for the caller."""

FORK_SECONDS: Final = 30
"""The longest time that a fork waits for other threads that compile with Numba: they might wait for this one."""

_built: dict[Hashable, Any] = {}
_building = threading.RLock()  # held by the thread that builds, and by a thread that forks
compiled_functions: list[CompiledFunction] = []
"""What this process has compiled, or read from the cache."""
_builder: Any = None  # the thread that builds
_numbas: Any = None  # Numba's lock, if a thread that forks has acquired it


class BuilderBusyError(BackendUnavailableError):
    """Building needs what this thread is in the middle of, in a signal handler, or what a parent's thread was."""


def _before_fork() -> None:
    """Acquire the locks, whatever interrupts: an exception of a fork handler would not stop the fork."""
    global _numbas  # noqa: PLW0603
    if _building._is_owned():  # type: ignore[attr-defined]  # noqa: SLF001 - the builder itself forks
        _building.acquire()
    while not _building._is_owned():  # type: ignore[attr-defined]  # noqa: SLF001
        with contextlib.suppress(BaseException):
            _building.acquire()
    loaded = getattr(sys.modules.get("numba.core.compiler_lock"), "global_compiler_lock", None)
    _numbas = None if loaded is None or loaded.is_locked() else loaded
    if _numbas is not None:
        with contextlib.suppress(BaseException):
            _numbas._lock.acquire(timeout=FORK_SECONDS)  # noqa: SLF001
        if not _numbas.is_locked():
            _numbas = None


def _after_fork() -> None:
    if _numbas is not None:
        _numbas._lock.release()  # noqa: SLF001
    _building.release()


if hasattr(os, "register_at_fork"):
    # A child has no thread that would finish building, nor release Numba's own locks: so a fork waits for the builder,
    # and for others that compile with Numba. Handlers run in reverse order. The one of `logging` must come after this
    # one, since Numba needs its lock: so it is imported here.
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


def build_once(key: Hashable, make: Callable[[], Any]) -> Any:
    """Return what ``make`` returned in the first successful call with this key, or raise what it raises.

    Raise `BuilderBusyError` where the builder waits for this thread. ``make`` must not call this function: it would
    wait for itself.
    """
    try:
        return _built[key]
    except KeyError:
        pass
    errors: list[BaseException] = []

    def build() -> None:
        global _builder  # noqa: PLW0603
        with _building:
            _builder = threading.get_ident()
            try:
                if key not in _built:
                    _built[key] = make()
            except BaseException as error:  # noqa: BLE001 - raised where it was asked for
                errors.append(error)

    builder = threading.Thread(target=build, name="mxfp4np_build")
    try:
        with starting_threads():
            builder.start()
    except RuntimeError:  # the interpreter is shutting down, or there can be no more threads
        build()
    else:
        builder.join(POLL_SECONDS)
        while builder.is_alive():
            if not _release_import_lock() or _is_deadlock():
                raise BuilderBusyError(
                    "Numba is needed, and a signal handler or a fork has interrupted its import or compiler: decode "
                    "something before that can happen, or use backend='numpy'"
                )
            builder.join(POLL_SECONDS)
    if errors:
        raise errors[0]
    return _built[key]


def _release_import_lock() -> bool:
    """Release Python's import lock if this thread holds it, for the builder to import; return whether that was right.

    CPython keeps it for ever where a signal handler raises in an import, right after it was acquired; the thread itself
    can import then, but no other one can. Nobody holds it on purpose for longer than a few instructions, but a handler
    may have interrupted those.
    """
    with contextlib.suppress(RuntimeError):  # this thread does not hold it, or no longer
        while True:
            _imp.release_lock()
            if any(
                frame.f_code.co_filename == "<frozen importlib._bootstrap>" for frame, _ in traceback.walk_stack(None)
            ):
                _imp.acquire_lock()
                return False
    return True


def _is_deadlock() -> bool:
    """Tell whether the builder waits for the lock of a module, or Numba's, that this thread holds below this call.

    Locks of modules may also be held by a thread that waits for another one; or, in a forked child, by one that only
    the parent has.
    """
    frames_now, thread = sys._current_frames, _builder  # noqa: SLF001
    while (frame := frames_now().get(thread)) is not None and frame.f_code.co_name == "acquire":
        lock: Any = frame.f_locals.get("self")
        if hasattr(lock, "is_locked"):  # Numba's: whether it is by this thread
            return bool(lock.is_locked())
        thread = getattr(lock, "owner", None)
        if thread is not None and (thread == threading.get_ident() or thread not in frames_now()):
            return True
    return False


class CompiledFunction:
    """A compiled function that takes 64-bit integers and returns one or nothing.

    Attributes
    ----------
    address : int
        Address by which other compiled code calls it.
    call : callable
        Calls it from Python, without the GIL.
    cache : str or None
        The folder on disk that keeps it, if there is one.
    is_new : bool
        Whether it was compiled by this process, not read from there.
    """

    def __init__(self, compiled: Any, signature: Any) -> None:
        self._compiled = compiled  # owns the code
        self.cache: str | None = compiled._cache.cache_path  # noqa: SLF001
        self.is_new: bool = not compiled.cache_hits
        self.address: int = compiled.address
        result = None if signature.return_type.name == "none" else ctypes.c_int64
        self.call: Any = ctypes.CFUNCTYPE(result, *[ctypes.c_int64] * len(signature.args))(self.address)
        compiled_functions.append(self)


def compile_function(function: Callable[..., Any], signature: Any, *constants: int | str) -> CompiledFunction | None:
    """Compile a function for a signature, or return None where Numba's compiler is switched off.

    The function is that of these constants. They and the sources are its name in the cache on disk.
    """
    import numba

    if numba.config.DISABLE_JIT:
        return None
    named = FunctionType(function.__code__, function.__globals__, function.__name__, None, function.__closure__)
    named.__module__ = function.__module__
    named.__qualname__ = "_".join(map(str, (function.__qualname__, *constants, _digest())))
    try:
        return CompiledFunction(_compile_cached(named, signature), signature)
    except Exception:  # noqa: BLE001 - retry without a cache, which may be broken or have no place; other errors recur
        return CompiledFunction(numba.cfunc(signature)(named), signature)


def _compile_cached(function: Callable[..., Any], signature: Any) -> Any:
    """Return what ``numba.cfunc(signature, cache=True)`` does, with a cache that differs in two ways.

    A function is found by its name alone. Numba adds a hash of its closure, and a compiled function there is another
    one in each process: it would be compiled each time, and one more file be written. And ``NUMBA_CACHE_DIR`` is read
    where it cannot be written, as in the image of a container.
    """
    from numba.core.caching import CompileResultCacheImpl, FunctionCache
    from numba.core.ccallback import CFunc

    of_variable, *others = CompileResultCacheImpl._locator_classes  # noqa: SLF001

    class Locator(of_variable):  # type: ignore[misc, valid-type]
        def ensure_cache_path(self) -> None:
            try:
                super().ensure_cache_path()
            except OSError:
                if not Path(self.get_cache_path()).is_dir():
                    raise

    class Files(CompileResultCacheImpl):  # type: ignore[misc]
        _locator_classes = [Locator, *others]  # noqa: RUF012

    class Cache(FunctionCache):  # type: ignore[misc]
        _impl_class = Files

        def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
            return sig, codegen.magic_tuple()

        def save_overload(self, sig: Any, data: Any) -> None:
            with contextlib.suppress(OSError):
                super().save_overload(sig, data)

    compiled: Any = CFunc(function, (signature.args, signature.return_type), {}, {})
    compiled._cache = Cache(function)  # noqa: SLF001
    compiled.compile()
    return compiled


@functools.cache
def _digest() -> str:
    """Return a digest of all sources that are compiled together, as a part of the names in Numba's cache on disk.

    The cache notices changes of the file that a function is in, but not of the files that it calls into.
    """
    digest = hashlib.sha256(__version__.encode())
    with contextlib.suppress(OSError):  # sources may not be readable, or not be there
        for path in sorted(Path(__file__).parent.glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def check_numba() -> None:
    """Import Numba; raise `BackendUnavailableError` if that fails, and say what to install."""

    def make() -> None:
        try:
            import numba  # noqa: F401
        except ImportError as error:
            raise BackendUnavailableError(
                f"the CPU backend needs Numba ({error}): python -m pip install numba; backend='numpy' works without it"
            ) from error

    build_once("numba", make)


def compiled_kernel(module: str, name: str, *constants: int | str) -> CompiledFunction | None:
    """Return the compiled kernel that the function ``name`` of a module of this package returns for some constants.

    A kernel takes the address of a job, a record of the module's dtype ``RECORD``, and processes its units ``start`` to
    ``stop - 1``. Returns None where Numba's compiler is switched off.
    """
    key = (module, name, *constants)
    if key not in _built:
        check_numba()
    kernel: CompiledFunction | None = build_once(key, lambda: _compile_kernel(module, name, *constants))
    return kernel


def _compile_kernel(module: str, name: str, *constants: int | str) -> CompiledFunction | None:
    import numba

    kernels = import_module(f".{module}", __package__)
    record, integer = numba.types.CPointer(numba.from_dtype(kernels.RECORD)), numba.types.int64
    signature = numba.types.void(record, integer, integer)
    return compile_function(getattr(kernels, name)(*constants), signature, *constants)
