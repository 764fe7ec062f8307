"""A directory that appears whole or not at all: written aside on the same disk, synced, then renamed into place."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import FxpruneError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextmanager
def publish(destination: Path) -> Iterator[Path]:
    """An empty directory beside ``destination`` that takes its place when the block ends without an exception.

    Whatever happens in between, Ctrl-C included, ``destination`` stays as it was and the directory is removed. Where
    something lies there already, the two are exchanged in one step (Linux) and the old one is removed afterwards, so
    that no reader ever finds nothing, and of two processes that write the same place the last one wins whole.
    Disk errors (OSError) become a FxpruneError that names the place, the reason and the cure.
    """
    destination = Path(os.path.realpath(destination))
    staging: Path | None = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{destination.name}.partial-", dir=destination.parent))
        yield staging
        _sync(staging)
        os.chmod(staging, 0o777 & ~_umask())  # mkdtemp makes directories that only their owner may read
        _put_in_place(staging, destination)
    except OSError as error:
        raise write_error(error, destination) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def write_text(path: Path, content: str) -> None:
    """Write one file whole or not at all, its folders with it. Disk errors are told as by :func:`write_error`."""
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(content, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise write_error(error, path) from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def write_error(error: OSError, destination: Path) -> FxpruneError:
    """``error`` as what, where, why and cure."""
    cures = {
        errno.ENOSPC: "free some space there, or write to another disk with `--out`",
        errno.EDQUOT: "your quota there is used up: free some space, or write elsewhere with `--out`",
        errno.EACCES: "choose a directory you may write to with `--out`",
        errno.EPERM: "choose a directory you may write to with `--out`",
        errno.EROFS: "that disk is read-only: write elsewhere with `--out`",
        errno.ENOTDIR: "a part of that path is a file: choose another `--out`",
        errno.ENAMETOOLONG: "choose a shorter `--out`",
    }
    why = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        with suppress(OSError):
            free = shutil.disk_usage(destination.parent).free
            why += f" ({free / 2**20:.0f} MiB free)"
    return FxpruneError(
        "the result cannot be written; nothing was changed there",
        where=str(destination),
        why=why,
        cure=cures.get(error.errno or 0, "write elsewhere with `--out`"),
    )


def _put_in_place(staging: Path, destination: Path) -> None:
    """Move ``staging`` to ``destination``; what was there before ends up at ``staging``, for the caller to remove."""
    for _ in range(20):  # another process may create or remove the destination between two of these steps
        try:
            os.rename(staging, destination)  # nothing there, or an empty directory
            return _sync_directory(destination.parent)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        try:
            if not _exchange(staging, destination):
                _swap_in_two_steps(staging, destination)
            return _sync_directory(destination.parent)
        except FileNotFoundError:
            continue
    raise OSError(errno.EBUSY, "another process keeps changing it", str(destination))


def _exchange(one: Path, two: Path) -> bool:
    """Swap two paths in one step; False where the system cannot. Raises FileNotFoundError if one is not there."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):  # not Linux, or a C library from before 2018
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.ENOENT:
        raise FileNotFoundError(code, os.strerror(code), str(two))
    return False  # a file system without it says EINVAL or ENOSYS


def _swap_in_two_steps(staging: Path, destination: Path) -> None:
    """The same with two renames; for a moment nothing lies at the destination, and a failure puts the old one back."""
    old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.old-", dir=destination.parent))
    os.rename(destination, old)
    try:
        os.rename(staging, destination)
    except BaseException:
        os.rename(old, destination)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Force every file below ``directory`` to the disk, so that a power cut cannot leave a name without its bytes."""
    for path in directory.iterdir():
        if path.is_dir():
            _sync(path)
            continue
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    with suppress(OSError):  # some file systems cannot sync a directory
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
