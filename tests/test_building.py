"""What is built once, below what the builder waits for; and threads that are hard to start."""

import os
import subprocess
import sys
import textwrap

import pytest
from commands import environment

START = """
import os, sys, threading, time
import numpy as np, mxfp4np
from mxfp4np.backends.cpu import compiler, launch
blocks, scales = np.full((300_000, 16), 0x22, np.uint8), np.full(300_000, 127, np.uint8)

def is_right():
    packed = mxfp4np.encode(np.ones((4, 320), np.float32), num_threads=2)
    return bool((mxfp4np.decode(blocks, scales, "float32", num_threads=2) == 1).all() and (packed.decode() == 1).all())
"""

END = """
assert is_right()
assert any(key[0] == "decode" for key in compiler._built), "the reference is used for ever"
print("right")
"""


def run(code, *arguments, start=START, **variables):
    script = start + textwrap.dedent(code) + END
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", script, *map(str, arguments)]
    result = subprocess.run(
        command, env=environment(**variables), capture_output=True, text=True, timeout=100, check=False
    )
    assert (result.returncode, result.stdout) == (0, "right\n"), result.stderr


@pytest.mark.parametrize("built", ["nothing", "kernels"])
def test_below_a_call_of_numbas_compiler_the_reference_decodes(built):
    """As a signal handler does, or a function that Numba calls while it compiles."""
    run(
        """
        from numba.core.compiler_lock import global_compiler_lock
        if sys.argv[1] == "kernels":
            mxfp4np.decode(blocks[:10], scales[:10], "float32")
        with global_compiler_lock:
            assert is_right()
            if sys.argv[1] == "nothing":
                assert not compiler._built.keys() - {"numba"}
        """,
        built,
    )


IMPORTS = """
class Finder:
    '''Called in the middle of an import.'''

    def __init__(self, name, call):
        self.name, self.call = name, call

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            sys.meta_path.remove(self)
            self.call()

class LockedFinder(Finder):
    '''Called where Python's import lock is held too.'''

    @property
    def find_spec(self):
        sys.meta_path.remove(self)
        self.call()
        return lambda *_: None

found = []
"""


@pytest.mark.parametrize("name", ["numba", "numba.core.typing", "llvmlite.binding.ffi"])
@pytest.mark.parametrize("kind", ["Finder", "LockedFinder"])
def test_below_an_import_that_the_builder_needs_the_reference_decodes(name, kind):
    run(
        f"""
        from importlib import import_module
        sys.meta_path.insert(0, {kind}({name!r}, lambda: found.append(is_right())))
        import_module({name!r})
        assert found == [True], found
        """,
        start=START + IMPORTS,
    )


def test_an_import_that_another_thread_waits_for_is_not_waited_for(tmp_path):
    """The builder waits for a module that the other thread imports, which waits for one that the caller imports."""
    (tmp_path / "caller.py").write_text("decode()\n")
    (tmp_path / "other.py").write_text("import caller\n")
    run(
        """
        from importlib import import_module
        sys.path.insert(0, sys.argv[1])

        def decode():
            other = threading.Thread(target=import_module, args=["other"])
            other.start()
            while "other" not in sys.modules:
                time.sleep(0.001)
            try:
                compiler.build_once("test", lambda: import_module("other"))
            except compiler.BuilderBusyError:
                found.append(True)

        import builtins
        builtins.decode = decode
        import caller
        assert found == [True], found
        """,
        tmp_path,
        start=START + IMPORTS,
    )


def test_a_module_may_decode_while_it_is_imported(tmp_path):
    (tmp_path / "decoding.py").write_text("import __main__\nfound = __main__.is_right()\n")
    run(
        """
        sys.path.insert(0, sys.argv[1])
        import decoding
        assert decoding.found and any(key[0] == "decode" for key in compiler._built)
        """,
        tmp_path,
    )


@pytest.mark.parametrize("kind", ["KeyboardInterrupt", "TimeoutError"])
def test_what_a_handler_raises_as_a_thread_starts_is_what_the_caller_sees(kind):
    run(
        f"""
        name = "_start_joinable_thread" if hasattr(threading, "_start_joinable_thread") else "_start_new_thread"
        start = getattr(threading, name)

        def interrupted(*arguments, **options):
            start(*arguments, **options)
            time.sleep(0.1)
            raise {kind}

        for call in (is_right, lambda: launch.worker_pool().start(3)):
            setattr(threading, name, interrupted)
            try:
                call()
            except {kind}:
                pass
            else:
                sys.exit("nothing was raised")
            setattr(threading, name, start)
            assert is_right()
        """,
        MXFP4NP_NUM_THREADS="3",
    )


def test_threads_have_a_stack_that_is_large_enough(tmp_path):
    """Not that of `threading.stack_size`, on which compiled code and compilers would crash."""
    run(
        """
        from pathlib import Path
        threading.stack_size(32 << 10)
        assert is_right()
        mxfp4np.save_file({"w": mxfp4np.MXFP4Array(blocks, scales)}, Path(sys.argv[1], "in.safetensors"))
        mxfp4np.convert(Path(sys.argv[1], "in.safetensors"), Path(sys.argv[1], "out"), num_threads=2, verify=True)
        assert threading.stack_size() == 32 << 10
        """,
        tmp_path,
        NUMBA_CACHE_DIR=str(tmp_path / "cache"),
        MXFP4NP_NUM_THREADS="3",
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("what", ["imports", "compiles"])
def test_a_child_decodes_whose_parent_was_at_it_in_a_thread_of_its_own(what):
    """Not in this package's builder: the child has the lock, but not the thread."""
    run(
        """
        import faulthandler
        begun = threading.Event()

        def slow():
            begun.set()
            time.sleep(1)

        def work():
            if sys.argv[1] == "imports":
                sys.meta_path.insert(0, Finder("numba.core.types", slow))
                import numba
            else:
                with global_compiler_lock:
                    slow()

        if sys.argv[1] == "compiles":
            from numba.core.compiler_lock import global_compiler_lock
        thread = threading.Thread(target=work)
        thread.start()
        begun.wait()
        child = os.fork()
        if child == 0:
            faulthandler.dump_traceback_later(60, exit=True)
            os._exit(not is_right())
        assert os.waitpid(child, 0)[1] == 0
        thread.join()
        """,
        what,
        start=START + IMPORTS,
    )
