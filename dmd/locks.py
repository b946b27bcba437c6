"""Locks among processes that write into one folder, also on several machines that share it.

Each lock is one byte of one file, held by the operating system (POSIX record locks, which NFS and parallel file systems
pass on): it ends with its process, however that dies, so no lock is ever stale and nothing is to be cleaned up.
"""

import errno
import os
from pathlib import Path

UNAVAILABLE = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


class Locks:
    """Numbered locks, 0 and up, of all processes that open the same path.

    Processes exclude each other, threads of one process do not; and a process that opens the same path twice gives all
    its locks up when it closes either. The file stays, empty: removing it would let two processes lock different files.

    Attributes:
        work: whether the file system has locks at all. Where it has none, every `take` succeeds.
    """

    def __init__(self, path: Path):
        self._file = open(path, "ab")  # noqa: SIM115 (closed by `close`)
        self.work = True

    def take(self, number: int, wait: bool = False) -> bool:
        """Whether this process holds the lock now; `wait` until it does."""
        return self._change(number, "wait" if wait else "try")

    def release(self, number: int) -> None:
        self._change(number, "release")

    def close(self) -> None:
        """Give up all locks."""
        self._file.close()

    def __enter__(self) -> "Locks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _change(self, number: int, how: str) -> bool:
        try:
            import fcntl
        except ImportError:  # Windows
            self.work = False
            return True
        commands = {"wait": fcntl.LOCK_EX, "try": fcntl.LOCK_EX | fcntl.LOCK_NB, "release": fcntl.LOCK_UN}
        try:
            fcntl.lockf(self._file, commands[how], 1, number, os.SEEK_SET)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            if error.errno not in UNAVAILABLE:
                raise
            self.work = False
        return True
