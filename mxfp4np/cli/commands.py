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
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

from .. import __version__
from ..errors import CheckpointWarning, MXFP4Error
from ..format import DTYPES, RULES
from ..layouts.table import ENCODED_LAYOUTS, TRANSPOSE
from ..text import as_json, escape, format_bytes, parse_bytes
from .signals import EndedError, raising_first

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from ..checkpoint import Checkpoint
    from ..rewrite.workers import Progress
    from ..summary import Row

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


def parse_count(text: str) -> int:
    """Return a positive integer."""
    if not re.fullmatch(r"0*[1-9]\d{0,5}", text.strip(), re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


# Progress bars


def _tqdm(*, quiet: bool, **options: Any) -> Any:
    from tqdm import tqdm

    return tqdm(unit="B", unit_scale=True, leave=False, disable=quiet or not sys.stderr.isatty(), **options)


@contextmanager
def byte_bar(total: int, what: str, *, quiet: bool) -> Iterator[Callable[[int], object]]:
    """Show bytes, rate and time left; the result is called with the bytes done since the last call."""
    with _tqdm(quiet=quiet, total=total, desc=what) as bar:
        yield bar.update


@contextmanager
def shard_bar(what: str, *, quiet: bool) -> Iterator[Callable[[Progress], object]]:
    """Show shard, tensor, bytes, rate and time left; the result is what `convert` takes as ``progress``."""
    from ..rewrite.bar import progress_bar

    # The bar is short, so that a narrow terminal has room for what follows it.
    form = "{desc} {percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} [{remaining}, {rate_fmt}{postfix}]"
    with progress_bar(what, bar_format=form, leave=False, disable=quiet or not sys.stderr.isatty()) as show:
        yield show


# Commands


def _names(args: argparse.Namespace) -> Any:
    from ..storage.jsonfile import read_json

    return None if args.named is None else read_json(args.named)


def _inspect(args: argparse.Namespace) -> int:
    from ..checkpoint import Checkpoint
    from ..summary import collapse, label, rows
    from .report import countable, file_lines, stats_of, table_lines, to_json

    if args.html is not None:
        _check_page(args.html)
    with Checkpoint(args.source, layout=args.layout, names=_names(args)) as checkpoint:
        table = rows(checkpoint, args.pattern)
        if not table and args.pattern != "*":
            raise ValueError(f"{args.source}: no tensor is called like {args.pattern!r}")
        if args.html is not None:
            return _write_page(args, _checkpoint_page(args, checkpoint, table))
        packed = [info for _, info in countable(table)] if args.stats else []
        stats: dict[str, Any] = {}
        with byte_bar(sum(info.nbytes for info in packed), "reading", quiet=args.quiet) as progress:
            for info in packed:
                stats[info.name] = stats_of(checkpoint.blocks(info.name), progress)
        if args.json:
            print(as_json(to_json(checkpoint, table, stats)))
            return 0
        groups = collapse(table)
        _show([*table_lines(groups), *file_lines(checkpoint)])
        for group in groups.values():
            members = [stats[row.name] for row in group if row.name in stats]
            if members:
                _show(["", label(group), *(f"  {line}" for line in type(members[0]).merged(members).lines())])
    return 0


def _check_page(path: Path) -> None:
    from .page import check_path

    check_path(path)


def _checkpoint_page(args: argparse.Namespace, checkpoint: Checkpoint, table: Sequence[Row]) -> dict[str, Any]:
    """Read the packed tensors, check all of them, and return what the page shows."""
    from ..rewrite.config import is_folder
    from ..rewrite.health import health
    from .page import Counts, of_checkpoint
    from .report import countable, stats_of

    counts, packed = Counts(), countable(table)
    with byte_bar(sum(info.nbytes for _, info in packed), "reading", quiet=args.quiet) as progress:
        for row, info in packed:
            counts.add(row, stats_of(checkpoint.blocks(info.name), progress))
    with shard_bar("verifying", quiet=args.quiet) as progress:
        names = [row.name for row in table]
        found = health(checkpoint, names, None, progress, with_config=is_folder(checkpoint, args.source))
    return of_checkpoint(checkpoint, table, counts, found)


def _write_page(args: argparse.Namespace, page: dict[str, Any]) -> int:
    from .page import write

    nbytes = write(args.html, page)
    if args.json or not args.quiet:
        found = {"html": str(args.html), "bytes": nbytes}
        _print(args, found, iter([f"wrote {args.html}: {format_bytes(nbytes)}; open it in a browser"]))
    return 0


def _decode(args: argparse.Namespace) -> int:
    from ..checkpoint import Checkpoint
    from .decode import Selection

    with Checkpoint(args.source, layout=args.layout, names=_names(args)) as checkpoint:
        selection = Selection(checkpoint, args.names, dtype=args.dtype, index=args.index, transpose=args.transpose)
        with byte_bar(selection.nbytes, "decoding", quiet=args.quiet) as progress:
            selection.write(args.output, progress)
        if not args.quiet:
            _show([f"wrote {args.output}: {format_bytes(selection.nbytes)} of tensor data"])
        _warn(checkpoint.findings)
    return 0


def _call(function: Callable[..., Any], args: argparse.Namespace, what: str) -> Any:
    """Call a function of the library whose parameters are the arguments of the command, with a progress bar."""
    options = {name: value for name, value in vars(args).items() if name not in ("run", "quiet", "json", "html")}
    with shard_bar(what, quiet=args.quiet) as progress:
        return function(**options, progress=progress)


def _print(args: argparse.Namespace, found: dict[str, Any], lines: Iterator[str]) -> None:
    if args.json:
        print(as_json(found))
    else:
        _show(lines)


def _show(lines: Iterable[str]) -> None:
    """Print lines for a person: whatever names are in them, safe to print and of bounded length."""
    print("\n".join(map(escape, lines)))


def _convert(args: argparse.Namespace) -> int:
    from ..rewrite.convert import convert

    result = _call(convert, args, "converting")
    _print_run(args, result)
    return 1 if result.verification is not None and result.verification.findings else 0


def _encode(args: argparse.Namespace) -> int:
    from ..rewrite.encode import encode_checkpoint
    from .page import of_encoding, write

    if args.html is not None:
        _check_page(args.html)
    result = _call(encode_checkpoint, args, "encoding")
    _print_run(args, result)
    if args.html is not None and not args.dry_run:
        write(args.html, of_encoding(result))
    return 1 if result.verification is not None and result.verification.findings else 0


def _print_run(args: argparse.Namespace, result: Any) -> None:
    if args.json or not args.quiet:
        _print(args, result.to_json(), result.plan_lines() if args.dry_run else result.lines())
    _warn(result.warnings())


def _warn(messages: Iterable[str]) -> None:
    for message in messages:
        print(f"mxfp4np: warning: {escape(message)}", file=sys.stderr)


def _verify(args: argparse.Namespace) -> int:
    from ..rewrite.verify import verify

    result = _call(verify, args, "verifying")
    _print(args, result.to_json(), result.lines())
    return 1 if result.findings else 0


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    folder = demo.prepare(args.out)
    try:
        found = demo.run(folder, args.size, partial(byte_bar, quiet=args.quiet))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # it was new or empty
        raise
    _print(args, found, demo.lines(found))
    return 1 if found["differences"] else 0


def _bench(args: argparse.Namespace) -> int:
    from . import bench

    dtypes, bar = [args.dtype] if args.dtype else DTYPES, partial(byte_bar, quiet=args.quiet)
    found = bench.run(args.source, args.layout, args.size, dtypes, args.num_threads, args.device, bar)
    _print(args, found, bench.lines(found, args.size))
    return 0


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
        sub.add_argument("--quiet", action="store_true", help="print results and errors only")
        if name != "decode":
            sub.add_argument("--json", action="store_true", help="print the result as JSON")
        return sub

    def checkpoint(sub: argparse.ArgumentParser, metavar: str = "PATH", **options: Any) -> None:
        what = "a folder, a .safetensors, .uqff or .gguf file, or a .index.json"
        sub.add_argument("source", type=Path, metavar=metavar, help=what, **options)
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
    inspect.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="names to show: '*.mlp.*'")
    inspect.add_argument("--html", type=Path, metavar="FILE.html", help="read it, and write a page with pictures")
    inspect.add_argument("--stats", action="store_true", help="read the packed tensors and show histograms")

    decode = command("decode", _decode, "Write tensors, decoded, to a file.")
    checkpoint(decode)
    names(decode)
    decode.add_argument("names", nargs="+", metavar="NAME", help="as inspect shows them, with real layer numbers")
    decode.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help=".safetensors, or .npy with --dtype"
    )
    decode.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, and plain tensors as they are")
    decode.add_argument("--index", type=parse_index, help="part of each tensor: '7, :128', --index=-1,:")
    what = "of packed tensors, as in convert (default: no, as stored: [.., out, in])"
    decode.add_argument("--transpose", choices=TRANSPOSE, default="no", help=what)

    def patterns(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--include", action="append", default=[], metavar="PATTERN", help="only names like this")
        sub.add_argument("--exclude", action="append", default=[], metavar="PATTERN", help="leave these as they are")
        threads(sub)

    def shards(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--max-shard-size", type=parse_size, default="5GB", metavar="SIZE", help="default: 5GB")
        sub.add_argument("--io", choices=("mmap", "pread"), default="mmap", help="pread: for network shares")
        sub.add_argument("--resume", action="store_true", help="keep the finished shards of an earlier run")
        sub.add_argument("--force", action="store_true", help="start over in a folder that is not empty")
        sub.add_argument("--dry-run", action="store_true", help="show what would be written")
        sub.add_argument("--task", type=parse_task, metavar="I/N", help="write part I of N, for job arrays")

    convert = command("convert", _convert, "Write a checkpoint with its packed tensors decoded.")
    checkpoint(convert, "SRC")
    convert.add_argument("target", type=Path, metavar="DST", help="a new or empty folder")
    convert.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of packed tensors (default: bfloat16)")
    convert.add_argument(
        "--transpose", choices=TRANSPOSE, default="auto", help="auto: gpt-oss experts as transformers expects them"
    )
    convert.add_argument("--device", default="cpu", help="cpu or cuda:0 (default: cpu)")
    convert.add_argument("--verify", action="store_true", help="decode again by the reference, compare every byte")
    convert.add_argument("--drop", action="append", default=[], metavar="PATTERN", help="leave out names like this")
    shards(convert)
    patterns(convert)

    encode = command("encode", _encode, "Write a checkpoint with its weights packed.")
    encode.add_argument("source", type=Path, metavar="SRC", help="a folder, a .safetensors file, or a .index.json")
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
    bench.add_argument("--dtype", choices=DTYPES, help="default: each of them")
    bench.add_argument("--device", default="cpu", help="cpu or cuda:0 (default: cpu)")
    threads(bench)
    bench.add_argument("--size", type=parse_size, default=512_000_000, help="decoded to bfloat16 (default: 512MB)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    status: int = 0
    try:
        try:
            args = parser().parse_args(arguments)
            with raising_first(), warnings.catch_warnings():
                warnings.simplefilter("ignore", CheckpointWarning)  # each command shows them in its own way
                status = args.run(args)
        finally:
            if sys.stdout is not None:  # None if the shell closed it
                sys.stdout.flush()
        return status
    except BrokenPipeError:  # nobody reads our output any more
        _discard_output()
        return 0
    except EndedError as error:
        message, status = str(error), error.status
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    except (MXFP4Error, ValueError, IndexError) as error:
        message, status = str(error), 2
    except MemoryError as error:
        message, status = f"out of memory: {error or 'ask for less at a time'}", 2
    except OSError as error:
        message, status = f"{error.filename}: {error.strerror}" if error.filename else str(error), 2
        _discard_output()
    print(f"mxfp4np: {escape(message)}", file=sys.stderr)
    return status


def _discard_output() -> None:
    """Keep the interpreter from complaining, when it exits, that the rest of the output cannot be written."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
