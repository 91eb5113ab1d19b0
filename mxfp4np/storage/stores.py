"""Object stores, web servers and the Hub: which store a URL means, what its folders hold, and what goes wrong there.

obstore makes the requests: it finds the credentials, retries with backoff, and resumes a body that breaks off. Its
errors become those of this package, without what may be secret in URLs. What is read is decided in `remote`.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import http.client
import json
import os
import re
import stat
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple, Protocol, TypeVar
from urllib.parse import quote, unquote, urlsplit

from ..backends.threads import starting_threads, usable_cpus
from ..errors import BackendUnavailableError, CheckpointError, MXFP4Error, RemoteError

TIMEOUT: Final = "MXFP4NP_REMOTE_TIMEOUT"
"""Environment variable: seconds without an answer, or without more of it, after which a request is repeated."""

REQUESTS: Final = 32
"""Most requests of this process at a time, and `REQUESTS_PER_CPU` for each CPU: more of them only wait."""

REQUESTS_PER_CPU: Final = 8

RETRIES: Final = 8
"""Most repetitions of a request. None begins when two timeouts have passed since the first."""

BESIDE: Final = (
    *("model.safetensors.index.json", "model.safetensors", "config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tiktoken.model", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"),
    *("preprocessor_config.json", "processor_config.json", "hf_quant_config.json", "quant_model_description.json"),
    *("dtypes.json", "LICENSE", "README.md"),
)
"""What is looked for in a folder of a web server, which cannot be listed."""

LISTING_BYTES: Final = 100_000_000
"""Largest answer of the Hub about a repository."""

FILE: Final = re.compile(r".*\.(?:safetensors|uqff|gguf|json)", re.IGNORECASE)
"""Names of files: a URL that ends in any other one means a folder."""

_HUB: Final = re.compile(r"hf://([^/@]+/[^/@]+)(?:@(refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(.*))?")
_IN_TEXT: Final = re.compile(r"(\w+://)(?:[^/\s]*(@))?([^\s?'\")>]*)(?:(\?)[^\s'\")>]*)?")
_CAUSE: Final = re.compile(r"HttpError \{\s*kind: (\w+)")


_T = TypeVar("_T")
_R = TypeVar("_R")


class Store(Protocol):
    """What is used of a store of obstore."""

    def get(self, path: str, *, options: Any = None) -> Any:
        """Return the beginning of an answer, whose body is read as it comes."""
        ...

    def head(self, path: str) -> Any:
        """Return size, ETag and time of an object."""
        ...

    def list_with_delimiter(self, prefix: str | None = None) -> Any:
        """Return the objects and the folders in a folder."""
        ...


class RemoteStat(NamedTuple):
    """What is known of an object: its size, and by what it is known to be unchanged."""

    st_size: int
    st_mtime_ns: int
    """0 if the server does not tell."""
    e_tag: str
    """Of a file on the Hub, the commit. Empty if the server does not tell."""

    @property
    def st_mode(self) -> int:
        """That of a regular file."""
        return stat.S_IFREG


def mask(text: str) -> str:
    """Return a text with what may be secret in the URLs in it left out: users, passwords, queries with signatures.

    Examples
    --------
    >>> mask("GET https://me:pass@host/model/?sig=abc - not found")
    'GET https://***@host/model/?*** - not found'
    """
    return _IN_TEXT.sub(lambda x: f"{x[1]}{'***@' if x[2] else ''}{x[3]}{'?***' if x[4] else ''}", text)


def changed(where: object) -> CheckpointError:
    """Return the error for an object that is not the one that was opened."""
    return CheckpointError(f"{where}: was replaced or changed after it was opened: open it again")


@cache
def _first_process() -> int:
    return os.getpid()


def _refuse_forked() -> None:
    if _first_process() != os.getpid():  # calls of obstore would wait for ever
        raise RemoteError("remote files cannot be read in a process that was forked: start it by spawn or forkserver")


@contextlib.contextmanager
def reported(where: object) -> Iterator[None]:
    """Make errors of obstore in the block errors of this package."""
    _refuse_forked()
    try:
        yield
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(where)) from None
    except MXFP4Error:
        raise
    except Exception as error:  # noqa: BLE001 - obstore's, and ValueError for what stores cannot be made of
        raise _of_obstore(where, error) from None


def _of_obstore(where: object, error: Exception) -> MXFP4Error:
    kind, text = type(error).__name__, str(error)
    if kind == "PreconditionError":
        return changed(where)
    if kind == "NotSupportedError":
        return NoRangesError(f"{where}: the server does not send parts of a file: download it")
    hint = ": credentials are missing, or not sufficient" if kind.startswith(("PermissionDenied", "Unauth")) else ""
    cause = _CAUSE.search(text)
    reason = mask(text.partition("\n")[0]) + (f" ({cause[1]})" if cause else "")
    return RemoteError(f"{where}: cannot be read{hint}: {reason}")


class NoRangesError(RemoteError):
    """A server ignores which part of a file was asked for."""


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(REQUESTS, REQUESTS_PER_CPU * usable_cpus()), "mxfp4np-remote")


def map_requests(work: Callable[[_T], _R], tasks: Sequence[_T]) -> list[_R]:
    """Call ``work`` with each task, in threads; an error cancels those that have not begun.

    In the main thread this is done for one task too, as nothing interrupts calls of obstore. ``work`` must not call it.
    """
    _refuse_forked()
    if len(tasks) == 1 and threading.current_thread() is not threading.main_thread():
        return [work(tasks[0])]
    with starting_threads():
        results = _pool().map(work, tasks)
    return list(results)


def _options(url: str, **headers: str) -> dict[str, Any]:
    """Return the arguments that stores are made with."""
    wait = timeout()
    client: dict[str, Any] = {"read_timeout": wait, "connect_timeout": wait, "timeout": timedelta(hours=1)}
    client["allow_http"] = not url.startswith("https:")  # a store's endpoint is set as its own variables say
    if headers:
        client["default_headers"] = headers
    return {"client_options": client, "retry_config": {"max_retries": RETRIES, "retry_timeout": 2 * wait}}


def timeout() -> timedelta:
    """Return how long to wait for an answer, or for more of it."""
    text = os.environ.get(TIMEOUT, "30")
    with contextlib.suppress(ValueError, OverflowError):
        if 0 < (seconds := float(text)) < 24 * 3600:
            return timedelta(seconds=seconds)
    raise ValueError(f"{TIMEOUT} must be a number of seconds, found {text!r}")


def _obstore() -> Any:
    try:
        import obstore.store
    except ImportError as error:
        raise BackendUnavailableError(
            "reading from URLs needs the obstore package: python -m pip install 'mxfp4np[remote]'"
        ) from error
    return obstore.store


class Folder:
    """A folder of a store: a URL, or a store itself."""

    def __init__(self, source: Any) -> None:
        self.source = source
        self._listings: dict[str, dict[str, bool]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.source,)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and bool(other.source == self.source)

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        if not isinstance(self.source, str):
            return mask(repr(self.source))
        url = urlsplit(self.source)
        return f"{url.scheme}://{url.netloc.rpartition('@')[2]}{url.path}".rstrip("/")

    @cached_property
    def store(self) -> Store:
        """The store, made when it is first needed."""
        with reported(self):
            made: Store = self._make() if isinstance(self.source, str) else self.source
        return made

    def _make(self) -> Any:
        return _obstore().from_url(self.source, **_options(self.source))

    def names(self, folder: str) -> dict[str, bool]:
        """Return the names in a folder, and of each whether it is a folder. They are asked for once."""
        if folder not in self._listings:
            self._listings[folder] = self._list(folder)
        return self._listings[folder]

    def _list(self, folder: str) -> dict[str, bool]:
        with reported(self):
            found = self.store.list_with_delimiter(folder or None)
        folders = {PurePosixPath(path).name: True for path in found["common_prefixes"]}
        return folders | {PurePosixPath(meta["path"]).name: False for meta in found["objects"]}

    def may_have(self, folder: str, name: str) -> bool:
        """Tell whether something in a folder has this name, as far as that is known."""
        return name in self.names(folder)

    def stat_of(self, meta: Any) -> RemoteStat:
        """Return what the beginning of an answer says of an object."""
        return RemoteStat(meta["size"], int(meta["last_modified"].timestamp() * 1e9), meta["e_tag"] or "")

    def stat(self, key: str) -> RemoteStat:
        """Ask what an object is now."""
        with reported(f"{self}/{key}"):
            return self.stat_of(self.store.head(key))

    def condition(self, known: RemoteStat) -> dict[str, str]:
        """Return the options of a request that fails if an object has changed; weak ETags never match."""
        return {"if_match": known.e_tag} if known.e_tag and not known.e_tag.startswith("W/") else {}


class WebFolder(Folder):
    """A folder of a web server, which cannot be listed: the names that are usual are tried."""

    def _make(self) -> Any:
        url = urlsplit(self.source)
        user, _, host = url.netloc.rpartition("@")
        headers = {"authorization": f"Basic {base64.b64encode(unquote(user).encode()).decode()}"} if user else {}
        return _obstore().HTTPStore(url._replace(netloc=host).geturl(), **_options(self.source, **headers))

    def _list(self, folder: str) -> dict[str, bool]:
        def problem(name: str) -> OSError | None:
            try:
                self.stat(f"{folder}/{name}".lstrip("/"))
            except (FileNotFoundError, RemoteError) as error:  # some servers refuse what is not there
                return error
            return None

        problems = dict(zip(BESIDE, map_requests(problem, BESIDE), strict=True))
        found = {name: False for name, error in problems.items() if error is None}
        refused = [error for error in problems.values() if isinstance(error, RemoteError)]
        if refused and not found:
            raise refused[0]
        return found

    def may_have(self, folder: str, name: str) -> bool:
        """Tell whether a file is there, or is not known to be missing: opening it will tell."""
        return name not in BESIDE or name in self.names(folder)


class HubFolder(Folder):
    """A repository of the Hub, as it was at one commit: that of its revision when it was first asked."""

    def __str__(self) -> str:
        return str(self.source)

    def __reduce__(self) -> tuple[Any, ...]:
        is_known = "_repository" in vars(self)
        return type(self), (f"{self._name}@{self._repository[0]}" if is_known else self.source,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, HubFolder) and (other._name, other._repository[0]) == (self._name, self._repository[0])

    def __hash__(self) -> int:
        return hash(self._name)

    @property
    def _name(self) -> str:
        return str(self.source.partition("@")[0])

    @cached_property
    def _repository(self) -> tuple[str, dict[str, int]]:
        """The commit, and the sizes of the files."""
        name, _, revision = self.source.removeprefix("hf://").partition("@")
        url = f"{_endpoint()}/api/models/{name}/revision/{quote(unquote(revision or 'main'), safe='')}?blobs=true"
        request = urllib.request.Request(url)  # noqa: S310 - not by obstore, which refuses answers of unknown length
        if token := _token():
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=timeout().total_seconds()) as answer:  # noqa: S310
                text = answer.read(LISTING_BYTES)
            found = json.loads(text)
            return str(found["sha"]), {file["rfilename"]: int(file["size"]) for file in found["siblings"]}
        except urllib.error.HTTPError as error:
            hint = {401: ", or one that needs a token: see hf auth login", 403: ": ask for access on its page"}
            if error.code in (401, 403, 404):
                raise FileNotFoundError(
                    errno.ENOENT, f"no such repository or revision{hint.get(error.code, '')}", str(self)
                ) from None
            reason = f"HTTP {error.code} {error.reason}"
        except (OSError, http.client.HTTPException, ValueError, TypeError, KeyError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
        raise RemoteError(f"{self}: {mask(url)} cannot be read: {mask(reason)}")

    def _make(self) -> Any:
        token = _token()
        headers = {"authorization": f"Bearer {token}"} if token else {}
        url = f"{_endpoint()}/{self._name.removeprefix('hf://')}/resolve/{self._repository[0]}"
        return _obstore().HTTPStore(url, **_options(url, **headers))

    def _list(self, folder: str) -> dict[str, bool]:
        prefix = f"{folder}/" if folder else ""
        inside = (name.removeprefix(prefix).partition("/") for name in self._repository[1] if name.startswith(prefix))
        return {name: bool(slash) for name, slash, _ in inside}

    def stat_of(self, meta: Any) -> RemoteStat:
        """Return the size; what a commit holds never changes, and the servers of its files have ETags of their own."""
        return RemoteStat(meta["size"], 0, self._repository[0])

    def stat(self, key: str) -> RemoteStat:
        """Return what the repository says of a file."""
        commit, sizes = self._repository
        if key not in sizes:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self}/{key}")
        return RemoteStat(sizes[key], 0, commit)

    def condition(self, known: RemoteStat) -> dict[str, str]:  # noqa: ARG002
        """Return no options: see `stat_of`."""
        return {}


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def _token() -> str | None:
    """Return the token of the Hub, from where huggingface_hub has it, or would have it if it were installed."""
    try:
        from huggingface_hub import get_token
    except ImportError:
        home = os.environ.get("HF_HOME", "~/.cache/huggingface")
        path = Path(os.environ.get("HF_TOKEN_PATH", f"{home}/token")).expanduser()
        text = os.environ.get("HF_TOKEN") or (path.read_text() if path.is_file() else "")
        return text.strip() or None
    token: str | None = get_token()
    return token


def folder_of(source: Any) -> tuple[Folder, str]:
    """Return the folder that a URL or a store means, and the file or folder in it, empty for the folder itself.

    Raises
    ------
    ValueError
        If it is no such URL.
    """
    if not isinstance(source, str):
        is_web = type(source).__name__ == "HTTPStore"
        return (WebFolder if is_web else Folder)(source), ""
    if source.startswith("hf://"):
        match = _HUB.fullmatch(source)
        if match is None:
            raise ValueError(f"expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION, found {source!r}")
        return HubFolder(f"hf://{match[1]}@{match[2] or 'main'}"), (match[3] or "").strip("/")
    url = urlsplit(source)
    base, _, name = url.path.rpartition("/")
    if not FILE.fullmatch(name):
        base, name = url.path.rstrip("/"), ""
    folder = url._replace(path=base).geturl()
    is_web = url.scheme in ("http", "https")
    return (WebFolder if is_web else Folder)(folder), unquote(name) if is_web else name
