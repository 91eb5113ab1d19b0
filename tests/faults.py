"""Faults of disks, injected: a library that is loaded before libc, and a driver that runs commands under it.

The library counts the calls of a process that concern files in one folder. The n-th of them fails with an error, and so
do all after it if the fault stays; or reads or writes one byte only; or kills the process. Commands run in forks of one
process that has imported and compiled everything, so that a thousand moments take seconds.
"""

import ctypes
import errno
import json
import os
import random
import re
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

KINDS = ("open", "read", "write", "sync", "size", "name", "remove", "folder", "map", "look", "list")
"""Of calls, in the order of the library's bits."""

FAIL, SHORT, KILL = range(3)

SOURCE = r"""
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN = 1, READ = 2, WRITE = 4, SYNC = 8, SIZE = 16, NAME = 32, REMOVE = 64, FOLDER = 128, MAP = 256, LOOK = 512,
       LIST = 1024 };
enum { FAIL, SHORT, KILL };

static char folder[4096];
static int mask, action, number, stays;
static long at;
static atomic_long count;

void faults_arm(const char *under, int kinds, int what, int error, long when, int stay) {
    strncpy(folder, under, sizeof folder - 1);
    action = what, number = error, at = when, stays = stay, mask = kinds;
    count = 0;
}

long faults_count(void) { return count; }

/* Whether this call is the one that fails, or is to be short. */
static int hit(int kind, const char *path) {
    size_t length = strlen(folder);
    if (!(mask & kind) || strncmp(path, folder, length) || (path[length] && path[length] != '/')) return 0;
    long now = atomic_fetch_add(&count, 1) + 1;
    if (!at || !(now == at || (stays && now > at))) return 0;
    if (action == KILL) kill(getpid(), SIGKILL);
    errno = number;
    return 1;
}

static int hit_fd(int kind, int fd) {
    char name[64], path[4096];
    if (!(mask & kind) || fd < 0) return 0;
    snprintf(name, sizeof name, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(name, path, sizeof path - 1);
    path[length < 0 ? 0 : length] = 0;
    return hit(kind, path);
}

#define LIST_OF(...) __VA_ARGS__
#define CALL(result, name, failed, looks, declared, used) \
    result name declared { \
        static result (*real)(LIST_OF declared); \
        if (!real) real = (result (*)(LIST_OF declared))dlsym(RTLD_NEXT, #name); \
        return looks ? failed : real used; \
    }
#define BYTES(kind, name, size, declared, used) \
    CALL(ssize_t, name, -1, hit_fd(kind, fd) && (action != SHORT || (size > 1 && (size = 1, 0))), declared, used)

BYTES(READ, read, size, (int fd, void *data, size_t size), (fd, data, size))
BYTES(READ, pread64, size, (int fd, void *data, size_t size, off64_t offset), (fd, data, size, offset))
BYTES(WRITE, write, size, (int fd, const void *data, size_t size), (fd, data, size))
#define LENGTH(v) ((struct iovec *)v)->iov_len
CALL(ssize_t, preadv64v2, -1, hit_fd(READ, fd) && (action != SHORT || (n && v->iov_len > 1 && (LENGTH(v) = 1, 0))),
     (int fd, const struct iovec *v, int n, off64_t offset, int flags), (fd, v, n, offset, flags))
CALL(int, ftruncate64, -1, hit_fd(SIZE, fd), (int fd, off64_t size), (fd, size))
CALL(int, rename, -1, hit(NAME, to), (const char *from, const char *to), (from, to))
CALL(int, link, -1, hit(NAME, to), (const char *from, const char *to), (from, to))
CALL(int, unlink, -1, hit(REMOVE, path), (const char *path), (path))
CALL(int, mkdir, -1, hit(FOLDER, path), (const char *path, mode_t mode), (path, mode))
CALL(int, stat64, -1, hit(LOOK, path), (const char *path, struct stat64 *found), (path, found))
CALL(int, lstat64, -1, hit(LOOK, path), (const char *path, struct stat64 *found), (path, found))
CALL(int, fstatat64, -1, hit(LOOK, path), (int fd, const char *path, struct stat64 *found, int flags),
     (fd, path, found, flags))
CALL(int, fstat64, -1, hit_fd(LOOK, fd), (int fd, struct stat64 *found), (fd, found))
CALL(void *, mmap64, MAP_FAILED, hit_fd(MAP, fd),
     (void *where, size_t size, int protection, int flags, int fd, off64_t offset),
     (where, size, protection, flags, fd, offset))
CALL(DIR *, opendir, NULL, hit(LIST, path), (const char *path), (path))
CALL(struct dirent64 *, readdir64, NULL, hit_fd(LIST, dirfd(list)), (DIR *list), (list))

int fsync(int fd) { return hit_fd(SYNC, fd) ? -1 : 0; } /* nothing waits for a disk here */

int open64(const char *path, int flags, ...) {
    static int (*real)(const char *, int, ...);
    if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open64");
    va_list rest;
    va_start(rest, flags);
    int mode = va_arg(rest, int);
    va_end(rest);
    return hit(OPEN, path) ? -1 : real(path, flags, mode);
}
"""


@dataclass(frozen=True)
class Fault:
    """What happens at a moment, to calls of these kinds that concern files in a folder."""

    folder: str
    kinds: str
    action: int = FAIL
    error: int = 0
    stays: bool = False

    def arm(self, library, root, moment):
        mask = sum(1 << KINDS.index(kind) for kind in self.kinds.split())
        folder = os.fsencode(root / self.folder)
        library.faults_arm(folder, mask, self.action, self.error, ctypes.c_long(moment), self.stays)


WRITES = "open write sync size name remove folder"
FAULTS = {
    "read EIO": Fault("in", "open read map", FAIL, errno.EIO),
    "write EIO": Fault("out", WRITES, FAIL, errno.EIO),
    "read back EIO": Fault("out", "read map list", FAIL, errno.EIO),
    "look EIO": Fault("", "look list", FAIL, errno.EIO),
    "ENOSPC": Fault("out", "write sync size name folder", FAIL, errno.ENOSPC, stays=True),
    "EDQUOT": Fault("out", "write sync size name folder", FAIL, errno.EDQUOT, stays=True),
    "short": Fault("", "read write", SHORT),
    "all short": Fault("", "read write", SHORT, stays=True),
    "kill": Fault("out", f"{WRITES} read look", KILL),
}

COMMANDS = {
    "convert": ["convert", "in", "out/x", "--max-shard-size=1", "--io=pread"],
    "encode": ["encode", "in", "out/x", "--max-shard-size=1", "--io=pread", "--layout=mlx"],
    "decode": ["decode", "in", "w0", "w1", "-o", "out/x.safetensors"],
    "verify": ["verify", "in", "out/x"],
}
"""Lines of the command line, run with one thread; ``in`` and ``out`` are folders."""


def tree(folder):
    return {x.relative_to(folder).as_posix(): x.read_bytes() for x in folder.rglob("*") if x.is_file()}


def build(root, command):
    """Write the source of a command, and what it verifies."""
    import numpy as np

    import mxfp4np

    source = root / "in"
    (source / "below").mkdir(parents=True)
    values = {f"w{i}": np.full((2, 64), i, np.float32) for i in range(3)}
    weights = {f"m.{name}.weight": array for name, array in values.items()}
    packed = {name: mxfp4np.encode(array) for name, array in values.items()}
    tensors = weights if command == "encode" else packed
    mxfp4np.save_file({**tensors, "bias": np.arange(5.0)}, source / "model.safetensors", {"format": "pt"})
    (source / "config.json").write_text('{"model_type": "x"}')
    (source / "below" / "template.txt").write_text("text")
    (root / "out").mkdir()


class Driver:
    """Runs one command again and again, each time in a fork that has a fault at another moment."""

    def __init__(self, library, root, command):
        from mxfp4np import cli

        self.library, self.root, self.command, self.main = ctypes.CDLL(library), root, command, cli.main
        build(root, command)
        self.arguments = [str(root / x) if x.split("/")[0] in ("in", "out") else x for x in COMMANDS[command]]
        if command != "decode":
            self.arguments.append("--threads=1")
        if command == "verify":
            assert cli.main(["convert", *self.arguments[1:]]) == 0
        assert cli.main(self.arguments) == 0
        self.expected = self.written()

    def written(self):
        return tree(self.root / "out")

    def clear(self):
        if self.command != "verify":
            shutil.rmtree(self.root / "out")
            (self.root / "out").mkdir()

    def run(self, fault=None, moment=0, *more):
        """Run the command in a fork; return its status, what it printed, and the number of calls; None if killed."""
        log, calls = self.root / "log", self.root / "calls"
        child = os.fork()
        if not child:
            with log.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            if fault is not None:
                fault.arm(self.library, self.root, moment)
            status = self.main([*self.arguments, *more])
            count = self.library.faults_count()
            Fault("", "").arm(self.library, self.root, 0)
            calls.write_text(str(count))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, log.read_text(), int(calls.read_text()) if code >= 0 else None

    def check(self, fault, moment):
        """Return what is wrong after a fault at a moment, or None."""
        self.clear()
        status, printed, _ = self.run(fault, moment)
        left = self.written()
        finished = {name: data for name, data in left.items() if not name.endswith(".tmp")}
        if not finished.items() <= self.expected.items():
            return "a file is not what it should be"
        if any(name.endswith(".index.json") for name in finished) and finished != self.expected:
            return "the index is there, and something else is not"
        if status == 0 and finished != self.expected:
            return "exit 0, and something is missing"
        if fault.action == KILL:
            if status != -signal.SIGKILL:
                return f"was not killed: {status}: {printed}"
        elif fault.action == SHORT:
            if status:
                return f"short reads and writes are no error: {printed}"
        else:
            if left != finished and "remove" not in fault.kinds:
                return "left a temporary file"
            if status and (problem := self.problem(printed)):
                return f"{problem}: {printed}"
        if self.command in ("convert", "encode"):
            again, printed, _ = self.run(None, 0, "--resume")
            if (again, self.written()) != (0, self.expected):
                return f"--resume did not make it whole: {again}: {printed}: {sorted(self.written())}"
        return None

    def problem(self, printed):
        """Return what is wrong with a message."""
        *others, last = printed.splitlines() or [""]
        message = last if self.command != "verify" else printed
        if "Traceback" in printed or (others and self.command != "verify"):
            return "not one line"
        if not re.search(rf"{self.root}/(in|out)\S*: .*cannot be (read|written|removed|mapped)", message):
            return "does not say which file, and whether it is read or written"
        if ".tmp" in message:
            return "names a temporary file"
        return None


def main(library, root, command, share):
    """Sweep over the moments of all faults, a share of them at random, and print what was found as JSON."""
    driver, found = Driver(library, Path(root), command), {}
    random.seed(0)
    for name, fault in FAULTS.items():
        driver.clear()
        _, _, count = driver.run(fault, 0)
        moments = range(1, (1 if name == "all short" else count) + 1)
        moments = random.sample(moments, -(-len(moments) * int(share) // 100))
        problems = {moment: problem for moment in moments if (problem := driver.check(fault, moment))}
        found[name] = {"calls": count, "moments": len(moments), "problems": problems}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
