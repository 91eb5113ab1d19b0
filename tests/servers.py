"""Servers on the loopback: a web server that misbehaves as told, an imitation of the Hub, nginx, and S3 by moto."""

import http.server
import json
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate

import pytest

STALL_SECONDS = 3.0


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        with self.server.lock:
            self.server.requests.append((self.command, self.path, dict(self.headers)))
        self.server.answer(self)

    def reply(self, status, body=b"", **headers):
        """Send an answer; a header that is None is left out."""
        self.send_response(status)
        headers = {"Content_Length": str(len(body)), **headers}
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            with self.server.lock:
                self.server.sent += len(body)
            self.wfile.write(body)
            self.wfile.flush()


class Server(http.server.ThreadingHTTPServer):
    """A web server; `answer` is called with the handler of each request.

    ``requests`` are the method, path and headers of each, ``sent`` are the bytes of all bodies.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.requests, self.sent, self.lock = answer, [], 0, threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, *_):
        pass  # clients go away when they have had enough

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


def range_of(handler, size):
    """Return begin and end of the range that is asked for, None if there is none."""
    match = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
    return (int(match[1]), min(int(match[2]) + 1, size)) if match else None


def send_file(handler, data, e_tag='"1"', modified=10**9):
    """Answer as a good server does."""
    known = {"ETag": e_tag, "Last_Modified": formatdate(modified, usegmt=True) if modified else None}
    if "If-Match" in handler.headers and handler.headers["If-Match"] != e_tag:
        return handler.reply(412)
    asked = range_of(handler, len(data))
    if asked is None:
        return handler.reply(200, data, **known)
    begin, end = asked
    if begin >= len(data):
        return handler.reply(416)
    return handler.reply(206, data[begin:end], Content_Range=f"bytes {begin}-{end - 1}/{len(data)}", **known)


def misbehave(handler, data, fault):
    """Answer a request for a range as the fault says."""
    begin, end = range_of(handler, len(data)) or (0, len(data))
    body, middle = data[begin:end], (end - begin) // 2
    sized = {"Content_Range": f"bytes {begin}-{end - 1}/{len(data)}", "ETag": '"1"'}
    sized["Last_Modified"] = formatdate(10**9, usegmt=True)
    match fault:
        case "short":
            handler.reply(206, body[:middle], **sized)
        case "long":
            handler.reply(206, body + body, **sized)
        case "closed" | "reset":
            handler.reply(206, body[:middle], **sized, Content_Length=str(len(body)))
            if fault == "reset":
                handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
        case "other range":
            handler.reply(206, body, **{**sized, "Content_Range": f"bytes {begin + 1}-{end}/{len(data)}"})
        case "no range":
            handler.reply(200, data, ETag='"1"')
        case "endless":
            handler.reply(200, ETag='"1"', Content_Length=str(10**15))
            while True:
                handler.wfile.write(bytes(1 << 20))
        case "loop":
            handler.reply(302, Location=handler.path)
        case "stall":
            handler.reply(206, body[:middle], **sized, Content_Length=str(len(body)))
            time.sleep(STALL_SECONDS)
        case "silence":
            time.sleep(STALL_SECONDS)
            handler.close_connection = True
        case "garbage":
            handler.wfile.write(b"\0\1\2\r\n\r\n")
            handler.close_connection = True
        case "other ETag":
            handler.reply(206, body, **{**sized, "ETag": '"2"'})
        case "other size":
            handler.reply(206, body, **{**sized, "Content_Range": f"bytes {begin}-{end - 1}/{len(data) + 1}"})
        case int():
            handler.reply(fault, b"<Error>no</Error>")


def serve_files(files, **known):
    """Return a server of files, bytes by path."""

    def answer(handler):
        data = files.get(handler.path.partition("?")[0].lstrip("/"))
        return handler.reply(404) if data is None else send_file(handler, data, **known)

    return Server(answer)


@contextmanager
def hub(repositories, token=None):
    """Imitate the Hub: ``repositories`` are commits by name and revision, with the files of each.

    Files are at an address of another server, with a signature, to which they are redirected; small ones are sent as
    they are. Yield both servers.
    """

    def on_cdn(handler):
        path, _, query = handler.path.partition("?")
        if "Authorization" in handler.headers or query != "Signature=SECRET":
            return handler.reply(403)
        return send_file(handler, stored[path.lstrip("/")], e_tag='"of the CDN"')

    def answer(handler):
        path = handler.path.partition("?")[0]
        if token is not None and handler.headers.get("Authorization") != f"Bearer {token}":
            return handler.reply(401, b'{"error": "Invalid username or password."}')
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", path):
            wanted, revision = match.groups()
            found = [x for (name, known), x in repositories.items() if name == wanted and revision in (known, x[0])]
            commit, files = found[0] if found else (None, {})
            if commit is None:
                return handler.reply(404, X_Error_Code="RevisionNotFound")
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            body = json.dumps({"id": wanted, "sha": commit, "siblings": siblings}).encode()
            chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)  # of unknown length
            return handler.reply(200, chunks, Content_Length=None, Transfer_Encoding="chunked")
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([0-9a-f]{40})/(.+)", path)
        files = next((files for commit, files in repositories.values() if match and commit == match[2]), {})
        if match is None or match[3] not in files:
            return handler.reply(404, X_Error_Code="EntryNotFound")
        data = files[match[3]]
        if match[3].endswith(".json"):  # in Git: sent whole, whatever is asked for
            return handler.reply(200, data, ETag='"in Git"', X_Repo_Commit=match[2])
        stored[f"{match[2]}/{match[3]}"] = data
        about = {"X_Linked_Size": str(len(data)), "X_Linked_ETag": '"linked"', "X_Repo_Commit": match[2]}
        return handler.reply(302, Location=f"{cdn.url}/{match[2]}/{match[3]}?Signature=SECRET", **about)

    stored = {}
    with Server(on_cdn) as cdn, Server(answer) as server:
        yield server, cdn


@contextmanager
def nginx(folder, root):
    """Serve a folder by nginx; yield its URL, and a function that returns what it has sent: see `_sent`."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        pytest.skip("needs nginx: apt-get install nginx-light")
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    temporary = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
    config, log = folder / "nginx.conf", folder / "access.log"
    config.write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log; events {{}} http {{"
        f"client_body_temp_path {folder}/body; {temporary} log_format bytes '$uri $status $body_bytes_sent';"
        f"access_log {log} bytes; server {{ listen 127.0.0.1:{port}; root {root}; sendfile on; }} }}"
    )
    process = subprocess.Popen([program, "-e", folder / "error.log", "-c", config])
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (folder / "error.log").read_text()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", lambda: _sent(log)
    finally:
        process.terminate()
        process.wait()


def _sent(log):
    """Return the bytes that nginx has sent of files, and the number of its answers."""
    time.sleep(0.2)  # a line is written after the answer
    lines = [line.split() for line in log.read_text().splitlines()]
    found = [int(nbytes) for _, status, nbytes in lines if status in ("200", "206")]
    return sum(found), len(found)
