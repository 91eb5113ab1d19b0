"""The commands, and the parser that chooses one: each calls a function of the library and prints its result.

Whatever a command needs is imported when it runs, so that ``--help`` and ``--version`` stay quick.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .. import __version__
from ..format import DTYPES, RULES
from ..layouts.table import ENCODED_LAYOUTS, TRANSPOSE
from ..text import escape
from .arguments import parse_count, parse_index, parse_size, parse_task
from .progress import byte_bar, shard_bar

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..rewrite.run import Run


def _inspect(args: argparse.Namespace) -> int:
    from ..checkpoint import Checkpoint
    from .report import Stats, collapse, rows, table_lines, to_json

    with Checkpoint(args.path, layout=args.layout) as checkpoint:
        table = rows(checkpoint, args.pattern)
        if not table and args.pattern != "*":
            raise ValueError(f"{args.path}: no tensor is called like {args.pattern!r}")
        packed = [row.info for row in table if args.stats and row.info is not None and row.info.layout is not None]
        stats: dict[str, Stats] = {}
        with byte_bar(sum(info.nbytes for info in packed), "reading", quiet=args.quiet) as progress:
            for info in packed:
                stats[info.name] = Stats()
                stats[info.name].add(checkpoint.packed(info.name), progress)
        if args.json:
            print(json.dumps(to_json(checkpoint, table, stats)))
            return 0
        groups = collapse(table)
        print("\n".join(table_lines(groups)))
        for kind, group in groups.items():
            members = [stats[row.name] for row in group if row.name in stats]
            if members:
                print(f"\n{escape(kind[0])}")
                print("\n".join(f"  {line}" for line in Stats.merged(members).lines()))
    return 0


def _decode(args: argparse.Namespace) -> int:
    from ..checkpoint import Checkpoint
    from ..text import format_bytes
    from .decode import Selection

    with Checkpoint(args.path, layout=args.layout) as checkpoint:
        selection = Selection(checkpoint, args.names, dtype=args.dtype, index=args.index)
        with byte_bar(selection.nbytes, "decoding", quiet=args.quiet) as progress:
            selection.write(args.output, progress)
        if not args.quiet:
            print(f"wrote {escape(str(args.output))}: {format_bytes(selection.nbytes)} of tensor data")
    return 0


def _run_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that `convert` and `encode` share."""
    names = "transpose max_shard_size include exclude io workers task resume force dry_run"
    return {name: getattr(args, name) for name in names.split()}


def _convert(args: argparse.Namespace) -> int:
    from ..rewrite.convert import convert

    with shard_bar("converting", quiet=args.quiet) as progress:
        result = convert(
            args.path,
            args.target,
            dtype=args.dtype,
            layout=args.layout,
            device=args.device,
            verify=args.verify,
            progress=progress,
            **_run_options(args),
        )
    _print_run(args, result)
    return 1 if result.verification is not None and result.verification.findings else 0


def _encode(args: argparse.Namespace) -> int:
    from ..rewrite.encode import encode_checkpoint

    with shard_bar("encoding", quiet=args.quiet) as progress:
        result = encode_checkpoint(
            args.path, args.target, rule=args.rule, layout=args.layout, progress=progress, **_run_options(args)
        )
    _print_run(args, result)
    return 0


def _print_run(args: argparse.Namespace, result: Run) -> None:
    if args.json:
        print(json.dumps(result.to_json()))
    elif not args.quiet:
        print("\n".join(result.plan_lines() if args.dry_run else result.lines()))
    for warning in result.warnings():
        print(f"mxfp4np: warning: {warning}", file=sys.stderr)


def _print(args: argparse.Namespace, result: Any) -> None:
    print(json.dumps(result.to_json()) if args.json else "\n".join(result.lines()))


def _verify(args: argparse.Namespace) -> int:
    from ..rewrite.verify import verify

    with shard_bar("verifying", quiet=args.quiet) as progress:
        result = verify(
            args.path,
            args.target,
            transpose=args.transpose,
            include=args.include,
            exclude=args.exclude,
            layout=args.layout,
            workers=args.workers,
            progress=progress,
        )
    _print(args, result)
    return 1 if result.findings else 0


def _demo(args: argparse.Namespace) -> int:
    from . import demo

    folder = demo.prepare(args.out)
    try:
        result = demo.run(folder, args.size, partial(byte_bar, quiet=args.quiet))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)  # it was new or empty
        raise
    _print(args, result)
    return 1 if result.differences else 0


def _bench(args: argparse.Namespace) -> int:
    from . import bench

    result = bench.run(
        args.path,
        layout=args.layout,
        size=args.size,
        dtypes=[args.dtype] if args.dtype else DTYPES,
        threads=args.threads,
        device=args.device,
        bar=partial(byte_bar, quiet=args.quiet),
    )
    _print(args, result)
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
        sub.add_argument("path", type=Path, metavar=metavar, help=what, **options)
        sub.add_argument("--layout", metavar="NAME", help="the layout, if the files do not determine it: quark")

    demo = command("demo", _demo, "Write a small checkpoint shaped like gpt-oss, decode it and check every value.")
    demo.add_argument("--out", type=Path, metavar="DIR", help="a new or empty folder (default: a temporary one)")
    demo.add_argument("--size", type=parse_size, default=200_000_000, help="decoded size (default: 200MB)")

    inspect = command("inspect", _inspect, "Show what a checkpoint holds.")
    checkpoint(inspect)
    inspect.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="names to show: '*.mlp.*'")
    inspect.add_argument("--stats", action="store_true", help="read the packed tensors and show histograms")

    decode = command("decode", _decode, "Write tensors, decoded, to a file.")
    checkpoint(decode)
    decode.add_argument("names", nargs="+", metavar="NAME", help="as inspect shows them, with real layer numbers")
    decode.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help=".safetensors, or .npy with --dtype"
    )
    decode.add_argument("--dtype", choices=DTYPES, help="default: bfloat16, and plain tensors as they are")
    decode.add_argument("--index", type=parse_index, help="part of each tensor: '7, :128', --index=-1,:")

    def patterns(sub: argparse.ArgumentParser, default: list[str] | None) -> None:
        sub.add_argument("--include", action="append", default=default, metavar="PATTERN", help="only names like this")
        sub.add_argument("--exclude", action="append", default=default, metavar="PATTERN", help="no names like this")
        sub.add_argument("--workers", type=parse_count, metavar="N", help="threads (default: one for each CPU)")

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
    shards(convert)
    patterns(convert, [])

    encode = command("encode", _encode, "Write a checkpoint with its weights packed.")
    encode.add_argument("path", type=Path, metavar="SRC", help="a folder, a .safetensors file, or a .index.json")
    encode.add_argument("target", type=Path, metavar="DST", help="a new or empty folder")
    encode.add_argument("--rule", choices=RULES, default=RULES[0], help="of the scales (default: even)")
    encode.add_argument(
        "--layout",
        choices=ENCODED_LAYOUTS,
        default=ENCODED_LAYOUTS[0],
        help="how DST stores them (default: gpt-oss-hf)",
    )
    encode.add_argument("--transpose", choices=TRANSPOSE, default="auto", help="auto: only for gpt-oss-hf")
    shards(encode)
    patterns(encode, [])

    verify = command("verify", _verify, "Check a checkpoint, or what it was converted to.")
    checkpoint(verify, "SRC")
    verify.add_argument("target", nargs="?", type=Path, metavar="DST", help="what SRC was converted to")
    verify.add_argument("--transpose", choices=TRANSPOSE, help="default: as DST was converted")
    patterns(verify, None)

    bench = command("bench", _bench, "Measure how fast this machine decodes, and the limits of its memory.")
    checkpoint(bench, nargs="?")
    bench.add_argument("--dtype", choices=DTYPES, help="default: each of them")
    bench.add_argument("--device", default="cpu", help="cpu or cuda:0 (default: cpu)")
    bench.add_argument("--threads", type=parse_count, metavar="N", help="the most to use (default: as decoding)")
    bench.add_argument("--size", type=parse_size, default=512_000_000, help="decoded to bfloat16 (default: 512MB)")
    return parser
