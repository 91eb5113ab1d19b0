"""The command line: the parser chooses a command, which calls a function of the library and prints its result.

Exit status: 0 done, 1 a check found a difference, 2 bad usage or bad input, 130 interrupted, 128 and its number where
another signal ended it. Errors are one line on standard error; progress shows on a terminal only. Whatever a command
needs is imported when it runs, so that ``--help`` and ``--version`` stay quick.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import sys
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from .. import __version__
from ..errors import BackendUnavailableError, CheckpointWarning, MXFP4Error
from ..format import DTYPES, RULES, SHORT_NAMES
from ..layouts.table import ENCODED_LAYOUTS, TRANSPOSE
from ..text import as_json, escape, format_bytes, parse_bytes
from .signals import ended_by, raising_first

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ..checkpoint import Checkpoint
    from ..summary import Row
    from .progress import Reporter

# Arguments

_INDEX_ITEM: Final = re.compile(r"\s*(?:(\.\.\.)|([+-]?\d+)|([+-]?\d+)?\s*:\s*([+-]?\d+)?\s*(?::\s*([+-]?\d+)?)?)\s*")


def parse_index(text: str) -> tuple[Any, ...]:
    """Return the NumPy index for a text such as ``"7, :128"``."""
    items: list[Any] = []
    for item in text.strip().removeprefix("[").removesuffix("]").removesuffix(",").split(","):
        match = _INDEX_ITEM.fullmatch(item)
        if match is None:
            raise argparse.ArgumentTypeError(f"{item.strip()!r} is not an integer, a slice or '...'")
        dots, integer, *bounds = match.groups()
        if any(bound and abs(int(bound)) > sys.maxsize for bound in (integer, *bounds)):
            raise argparse.ArgumentTypeError(f"{item.strip()!r} is larger than any axis")
        slices = slice(*(None if bound is None else int(bound) for bound in bounds))
        items.append(Ellipsis if dots else int(integer) if integer else slices)
    return tuple(items)


def parse_source(text: str) -> str | Path:
    """Return the path for a text, or the text if it is a URL."""
    return text if "://" in text else Path(text)


def parse_size(text: str) -> int:
    """Return the bytes for a text such as ``"200MB"`` or ``"5GiB"``."""
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_task(text: str) -> tuple[int, int]:
    """Return the two numbers of a text such as ``"2/8"``."""
    match = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a task: expected for instance 2/8")
    return int(match[1]), int(match[2])


def parse_dtype(text: str) -> str:
    """Return the name of a dtype to decode to, which may be given by a short one: ``"bf16"``."""
    return SHORT_NAMES.get(text.lower(), text)


def parse_count(text: str) -> int:
    """Return a positive integer."""
    if not re.fullmatch(r"0*[1-9]\d{0,5}", text.strip(), re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


# Commands


def _names(args: argparse.Namespace) -> Any:
    from ..storage.jsonfile import read_json

    return None if args.named is None else read_json(args.named)


def _progress(args: argparse.Namespace) -> Reporter:
    from .progress import Reporter

    return Reporter(quiet=args.quiet, plain=args.progress == "plain")


def _inspect(args: argparse.Namespace) -> int:
    from ..checkpoint import Checkpoint
    from ..summary import collapse, label, rows
    from .names import matching
    from .report import file_lines, table_lines, to_json

    if args.html is not None:
        _check_page(args.html)
    with Checkpoint(args.source, layout=args.layout, names=_names(args)) as checkpoint:
        table = rows(checkpoint, matching(checkpoint, args.patterns) if args.patterns else None)
        if args.html is not None:
            return _write_page(args, _checkpoint_page(args, checkpoint, table))
        stats = {row.name: found for row, found in _counted(args, checkpoint, table)} if args.stats else {}
        groups = collapse(table)

        def lines() -> Iterator[str]:
            yield from (*table_lines(groups), *file_lines(checkpoint))
            for group in groups.values():
                members = [stats[row.name] for row in group if row.name in stats]
                if members:
                    yield from ("", label(group), *(f"  {line}" for line in type(members[0]).merged(members).lines()))

        problems = [str(row.problem) for row in table if row.info is None]
        _print(args, to_json(checkpoint, table, stats), lines(), [*problems, *checkpoint.findings])
    return 0


def _counted(args: argparse.Namespace, checkpoint: Checkpoint, table: Sequence[Row]) -> Iterator[tuple[Row, Any]]:
    """Read the packed tensors, and yield what is counted of each."""
    from .report import countable, stats_of

    packed = countable(table)
    with _progress(args).bytes(sum(info.nbytes for _, info in packed), "reading") as progress:
        for row, info in packed:
            yield row, stats_of(checkpoint.reader(info.name), progress)


def _check_page(path: Path) -> None:
    from .page import check_path

    check_path(path)


def _checkpoint_page(args: argparse.Namespace, checkpoint: Checkpoint, table: Sequence[Row]) -> dict[str, Any]:
    """Read the packed tensors, check all of them, and return what the page shows."""
    from ..rewrite.config import is_folder
    from ..rewrite.health import health
    from .page import Counts, of_checkpoint

    counts = Counts()
    for row, counted in _counted(args, checkpoint, table):
        counts.add(row, counted)
    with _progress(args).shards("verifying") as progress:
        names = [row.name for row in table]
        found = health(checkpoint, names, None, progress, "threads", with_config=is_folder(checkpoint, args.source))
    return of_checkpoint(checkpoint, table, counts, found)


def _write_page(args: argparse.Namespace, page: dict[str, Any]) -> int:
    from .page import write

    nbytes = write(args.html, page)
    found = {"html": str(args.html), "bytes": nbytes}
    _print(args, found, iter([f"wrote {args.html}: {format_bytes(nbytes)}; open it in a browser"]))
    return 0


def _decode(args: argparse.Namespace) -> int:
    from ..checkpoint import Checkpoint
    from .decode import Selection
    from .names import matching

    to_stdout = str(args.output) == "-"
    if to_stdout and args.json:
        raise ValueError("the tensors go to standard output: give --json and a file, or neither")
    if to_stdout and sys.stdout.isatty():
        raise ValueError("standard output is a terminal: pipe it to a program, or give a file with -o")
    with Checkpoint(args.source, layout=args.layout, names=_names(args)) as checkpoint:
        names = matching(checkpoint, args.names)
        selection = Selection(checkpoint, names, dtype=args.dtype, index=args.index, transpose=args.transpose)
        with _progress(args).bytes(selection.nbytes, "decoding") as progress:
            if to_stdout:
                selection.write_to(sys.stdout.buffer, progress, args.format or "npy")
            else:
                selection.write(args.output, progress, args.format)
        if not to_stdout:
            line = f"wrote {args.output}: {format_bytes(selection.nbytes)} of tensor data"
            _print(args, {"file": str(args.output), "bytes": selection.nbytes, "tensors": names}, [line])
        _warn(checkpoint.findings)
    return 0


def _call(function: Callable[..., Any], args: argparse.Namespace, what: str) -> Any:
    """Call a function of the library whose parameters are the arguments of the command, and show its progress."""
    own = ("run", "quiet", "json", "progress", "html")
    options = {name: value for name, value in vars(args).items() if name not in own}
    with redirect_stdout(sys.stderr), _progress(args).shards(what) as progress:  # Ray prints of killed processes
        return function(**options, progress=progress)


def _print(args: argparse.Namespace, found: Any, lines: Iterable[str], wrong: Iterable[str] = ()) -> None:
    """Print a result: as JSON or for a person; with ``--quiet`` alone, only what is ``wrong``."""
    if args.json:
        print(as_json(found))
    else:
        _show(wrong if args.quiet else lines)


def _show(lines: Iterable[str]) -> None:
    """Print lines for a person: whatever names are in them, safe to print and of bounded length."""
    for line in lines:
        print(escape(line))


def _convert(args: argparse.Namespace) -> int:
    from ..rewrite.convert import convert

    return _rewrite(convert, args, "converting")


def _encode(args: argparse.Namespace) -> int:
    from ..rewrite.encode import encode_checkpoint
    from .page import of_encoding, write

    if args.html is not None:
        _check_page(args.html)

    def write_page(result: Any) -> None:
        if args.html is not None and not args.dry_run:
            write(args.html, of_encoding(result))

    return _rewrite(encode_checkpoint, args, "encoding", write_page)


def _rewrite(
    function: Callable[..., Any], args: argparse.Namespace, what: str, then: Callable[[Any], None] = lambda _: None
) -> int:
    result = _call(function, args, what)
    then(result)
    check = result.verification
    wrong = check.lines() if check is not None and check.findings else ()
    _print(args, result.to_json(), result.plan_lines() if args.dry_run else result.lines(), wrong)
    _warn(result.warnings())
    return 1 if wrong else 0


def _how_to_continue(args: argparse.Namespace | None) -> str:
    """Return what to do after an interrupt, if a command has begun what can be continued."""
    plan = sys.modules.get("mxfp4np.rewrite.plan")  # not imported here: an import may have been interrupted
    record = getattr(plan, "RECORD", None)
    if args is None or "resume" not in args or record is None or not os.path.lexists(args.target / record):
        return ""
    return ": give the same command again" if args.task or args.resume else ": continue with --resume"


def _warn(messages: Iterable[str]) -> None:
    for message in messages:
        print(f"mxfp4np: warning: {escape(message)}", file=sys.stderr)


def _verify(args: argparse.Namespace) -> int:
    from ..rewrite.verify import verify

    result = _call(verify, args, "verifying")
    _print(args, result.to_json(), result.lines(), result.lines() if result.findings else ())
    return 1 if result.findings else 0


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    folder = demo.prepare(args.out)
    try:
        found = demo.run(folder, args.size, _progress(args).bytes)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # it was new or empty
        raise
    _print(args, found, demo.lines(found), demo.wrong(found))
    return 1 if found["differences"] else 0


def _bench(args: argparse.Namespace) -> int:
    from . import bench

    dtypes, bar = [args.dtype] if args.dtype else DTYPES, _progress(args).bytes
    found = bench.run(args.source, args.layout, args.size, dtypes, args.num_threads, args.device, bar)
    _print(args, found, bench.lines(found, args.size))
    return 0


def _warmup(args: argparse.Namespace) -> int:
    from . import warmup

    found = warmup.run()
    _print(args, found, warmup.lines(found))
    return 0


def _completion(args: argparse.Namespace) -> int:
    try:
        import shtab
    except ImportError as error:
        raise BackendUnavailableError(
            f"completion needs shtab ({error}): python -m pip install 'mxfp4np[completion]'"
        ) from error
    complete = parser()
    for action in _all_actions(complete):
        if action.type in (Path, parse_source):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(complete, args.shell))
    return 0


def _all_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser and of its commands."""
    for action in parser._actions:  # noqa: SLF001
        yield action
        if isinstance(action.choices, dict):
            for sub in action.choices.values():
                yield from _all_actions(sub)


class _Parser(argparse.ArgumentParser):
    """Errors take one line, and options may stand between positional arguments, which argparse calls intermixed."""

    _intermixed = False

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {escape(message)}: see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._intermixed or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._intermixed = True
        return self.parse_known_intermixed_args(args, namespace)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = _Parser(prog="mxfp4np", description="Inspect, decode and convert MXFP4 checkpoints.")
    parser.add_argument("--version", action="version", version=f"mxfp4np {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        sub.add_argument("--quiet", action="store_true", help="print only what is wrong, and JSON if asked for")
        sub.add_argument("--json", action="store_true", help="print the result as JSON")
        what = "plain: a line every 30 s, as where there is no terminal (default: a bar)"
        sub.add_argument("--progress", choices=("auto", "plain"), default="auto", help=what)
        return sub

    def dtype(sub: argparse.ArgumentParser, text: str, **options: Any) -> None:
        sub.add_argument("--dtype", type=parse_dtype, choices=DTYPES, help=f"or bf16, fp16, fp32; {text}", **options)

    def checkpoint(sub: argparse.ArgumentParser, metavar: str = "PATH", **options: Any) -> None:
        what = (
            "a folder, a .safetensors, .uqff or .gguf file, a .index.json, or a URL: s3://, https://, hf://OWNER/NAME"
        )
        sub.add_argument("source", type=parse_source, metavar=metavar, help=what, **options)
        sub.add_argument("--layout", metavar="NAME", help="the layout, if the files do not determine it: quark")

    def names(sub: argparse.ArgumentParser) -> None:
        what = "JSON: logical names, each with a stored name or a pair, codes and scales"
        sub.add_argument("--names", dest="named", type=Path, metavar="FILE.json", help=what)

    def threads(sub: argparse.ArgumentParser) -> None:
        what = "the most to use (default: one for each CPU)"
        sub.add_argument("--threads", dest="num_threads", type=parse_count, metavar="N", help=what)

    demo = command("demo", _demo, "Write a small checkpoint shaped like gpt-oss, decode it and check every value.")
    demo.add_argument("--out", type=Path, metavar="DIR", help="a new or empty folder (default: a temporary one)")
    demo.add_argument("--size", type=parse_size, default=200_000_000, help="decoded size (default: 200MB)")

    inspect = command("inspect", _inspect, "Show what a checkpoint holds.")
    checkpoint(inspect)
    names(inspect)
    inspect.add_argument("patterns", nargs="*", metavar="PATTERN", help="names to show: '*.mlp.*'")
    inspect.add_argument("--html", type=Path, metavar="FILE.html", help="read it, and write a page with pictures")
    inspect.add_argument("--stats", action="store_true", help="read the packed tensors and show histograms")

    decode = command("decode", _decode, "Write tensors, decoded, to a file.")
    checkpoint(decode)
    names(decode)
    what = "a name, with one layer's number, or a pattern: 'model.layers.0.*'"
    decode.add_argument("names", nargs="+", metavar="NAME", help=what)
    what = ".safetensors; .npy or .npz with --dtype; - is standard output"
    decode.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=what)
    what = "default: what FILE ends in, and npy for standard output"
    decode.add_argument("--format", choices=("safetensors", "npy", "npz"), help=what)
    dtype(decode, "default: bfloat16, and plain tensors as they are")
    decode.add_argument("--index", type=parse_index, help="part of each tensor: '7, :128', --index=-1,:")
    what = "of packed tensors, as in convert (default: no, as stored: [.., out, in])"
    decode.add_argument("--transpose", choices=TRANSPOSE, default="no", help=what)

    def patterns(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--include", action="append", default=[], metavar="PATTERN", help="only names like this")
        sub.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="leave these as they are")
        threads(sub)
        what = "ray: on the cluster that RAY_ADDRESS names, or one on this machine (default: threads)"
        sub.add_argument("--engine", choices=("threads", "ray"), default="threads", help=what)

    def shards(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--max-shard-size", type=parse_size, default="5GB", metavar="SIZE", help="default: 5GB")
        sub.add_argument("--io", choices=("mmap", "pread"), default="mmap", help="pread: for network shares")
        sub.add_argument("--resume", action="store_true", help="keep the finished shards of an earlier run")
        sub.add_argument("--force", action="store_true", help="start over in a folder that is not empty")
        sub.add_argument("--dry-run", action="store_true", help="show what would be written")
        what = "write part I of N: one job of an array, of machines that share DST and no Ray cluster"
        sub.add_argument("--task", type=parse_task, metavar="I/N", help=what)

    convert = command("convert", _convert, "Write a checkpoint with its packed tensors decoded.")
    checkpoint(convert, "SRC")
    convert.add_argument("target", type=Path, metavar="DST", help="a new or empty folder")
    dtype(convert, "of packed tensors (default: bfloat16)", default="bfloat16")
    convert.add_argument(
        "--transpose", choices=TRANSPOSE, default="auto", help="auto: gpt-oss experts as transformers expects them"
    )
    convert.add_argument("--device", default="cpu", help="cpu or cuda:0 (default: cpu)")
    convert.add_argument("--verify", action="store_true", help="decode again by the reference, compare every byte")
    convert.add_argument("--drop", action="append", default=[], metavar="PATTERN", help="leave out names like this")
    shards(convert)
    patterns(convert)

    encode = command("encode", _encode, "Write a checkpoint with its weights packed.")
    what = "a folder, a .safetensors file, a .index.json, or a URL"
    encode.add_argument("source", type=parse_source, metavar="SRC", help=what)
    encode.add_argument("target", type=Path, metavar="DST", help="a new or empty folder")
    encode.add_argument("--rule", choices=RULES, default=RULES[0], help="of the scales (default: even)")
    encode.add_argument(
        "--layout",
        choices=ENCODED_LAYOUTS,
        default=ENCODED_LAYOUTS[0],
        help="how DST stores them (default: gpt-oss-hf)",
    )
    what = "auto: experts whose inputs are not the last axis"
    encode.add_argument("--transpose", choices=TRANSPOSE, default="auto", help=what)
    encode.add_argument("--html", type=Path, metavar="FILE.html", help="write a page with the errors by layer")
    encode.add_argument("--verify", action="store_true", help="encode again by the reference, compare every byte")
    shards(encode)
    patterns(encode)

    verify = command("verify", _verify, "Check a checkpoint, or what it was converted or encoded to.")
    checkpoint(verify, "SRC")
    verify.add_argument("target", nargs="?", type=Path, metavar="DST", help="what SRC was converted or encoded to")
    verify.add_argument("--rule", choices=RULES, help="of the scales (default: as DST was encoded)")
    verify.add_argument("--transpose", choices=TRANSPOSE, help="default: as DST was written")
    patterns(verify)

    bench = command("bench", _bench, "Measure how fast this machine decodes, and the limits of its memory.")
    checkpoint(bench, nargs="?")
    dtype(bench, "default: each of them")
    bench.add_argument("--device", default="cpu", help="cpu or cuda:0 (default: cpu)")
    threads(bench)
    bench.add_argument("--size", type=parse_size, default=512_000_000, help="decoded to bfloat16 (default: 512MB)")

    command("warmup", _warmup, "Compile all kernels into the cache, as when an image of a container is built.")

    what = "Print a script by which a shell completes commands and options."
    completion = commands.add_parser("completion", help=what, description=what)
    completion.set_defaults(run=_completion)
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    status: int = 0
    args: argparse.Namespace | None = None
    try:
        try:
            given = sys.argv[1:] if arguments is None else arguments
            args = parser().parse_args(given or ["--help"])
            with raising_first(), warnings.catch_warnings():
                warnings.simplefilter("ignore", CheckpointWarning)  # each command shows them in its own way
                warnings.showwarning = lambda message, *_, **__: _warn([str(message)])
                status = args.run(args)
        finally:
            if sys.stdout is not None:  # None if the shell closed it
                sys.stdout.flush()
        return status
    except BrokenPipeError:  # nobody reads our output any more
        _discard_output()
        return 0
    except BaseException as error:
        if (ended := ended_by(error)) is not None:
            message, status = ended
            message += _how_to_continue(args)
        elif isinstance(error, MXFP4Error | ValueError | IndexError):
            message, status = str(error), 2
        elif isinstance(error, MemoryError):
            message, status = f"out of memory: {error or 'ask for less at a time'}", 2
        elif isinstance(error, OSError):
            message, status = f"{error.filename}: {error.strerror}" if error.filename else str(error), 2
            _discard_output()
        else:
            raise
    print(f"mxfp4np: {escape(message)}", file=sys.stderr)
    return status


def _discard_output() -> None:
    """Keep the interpreter from complaining, when it exits, that the rest of the output cannot be written."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
