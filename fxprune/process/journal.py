"""``Journal``: finished jobs kept aside in a folder, so that an interrupted run goes on where it stopped.

    .small.progress/key.json                      which run this is (see :func:`fingerprint`)
                    lock                          held while a process writes here
                    fisher.64.000017.part         some finished jobs, the first of them number 17 of 64

A file appears whole or not at all, and says by a checksum whether it is still what was written. Nothing here stops a
run: a full disk, a damaged file or a second process only mean that less can be taken up later, and a note says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from .environment import core_versions
from .packets import pack, unpack

Result: TypeAlias = dict[str, Tensor]

FLUSH_SECONDS = 1.0  # finished jobs are written at most this often: what a kill can cost, and why short runs write none
MAX_BYTES = 2**30  # of all files together; what comes later is computed again
WORTH_KEEPING = 10.0  # seconds of work that stay after an error (a full disk must not cost an hour); Ctrl-C keeps all
BYTES_PER_SECOND = 20 * 2**20  # of work: results that come faster are computed again as quickly as stored
_PENDING_BYTES = 64 * 2**20
_FORMAT = 1
_OURS = re.compile(r"key\.json|lock|[\w.#-]+\.\d+\.\d{6,}\.part|\.[\w.#-]+\.aside")


class Journal:
    """Finished jobs of the run that makes ``out``, in a folder beside it.

    note   told what the user should know, in a sentence
    """

    def __init__(self, out: str | os.PathLike[str], note: Callable[[str], None] = lambda _: None) -> None:
        destination = Path(os.path.realpath(out))
        self.folder = destination.parent / f".{destination.name}.progress"
        self.note = note
        self._seconds = 0.0  # of work that the folder holds
        self._key = ""
        self._lock: int | None = None
        self._usable = False
        self._bytes = 0
        self._pending: dict[tuple[str, int], dict[int, Result]] = {}
        self._pending_bytes, self._pending_seconds, self._flushed = 0, 0.0, time.monotonic()

    def open(self, key: str) -> None:
        """Begin the run of this fingerprint: what another run has left here is removed."""
        self._key, self._usable, self._flushed = key, True, time.monotonic()
        with self._tolerant():
            if self.folder.exists() and self._hold():
                if self._read_key() != key:
                    if self._clear():
                        self.note(
                            f"finished scoring in {self.folder} belongs to another model, data or options: "
                            "it is discarded"
                        )
                    self._write_key()
                self._bytes = sum(p.stat().st_size for p in self._parts())

    def find(self, name: str, count: int) -> dict[int, Result]:
        """Job number -> tensors, of the ``count`` jobs called ``name`` that were finished before."""
        found: dict[int, Result] = {}
        if self._lock is None:
            return found
        for path in sorted(self.folder.glob(f"{_plain(name)}.{count}.*.part")):
            with self._tolerant():
                try:
                    tensors, about = unpack(path.read_bytes())
                    if about["name"] != name or about["count"] != count:
                        continue
                    jobs: dict[int, Result] = {int(i): {} for i in about["jobs"]}
                    for label, tensor in tensors.items():
                        number, _, what = label.partition("/")
                        jobs[int(number)][what] = tensor
                    self._seconds += float(about["seconds"])
                except (ValueError, KeyError, TypeError):
                    path.unlink()  # damaged: its jobs are computed again
                    continue
                found.update({i: result for i, result in jobs.items() if 0 <= i < count})
        return found

    def add(self, name: str, count: int, number: int, result: Result, seconds: float) -> None:
        """Keep the result of job ``number``, which took ``seconds`` of work; written soon if it is worth it."""
        if not self._usable:
            return
        self._pending.setdefault((name, count), {})[number] = result
        self._pending_seconds += seconds
        self._pending_bytes += sum(t.nbytes for t in result.values())
        if time.monotonic() - self._flushed >= FLUSH_SECONDS or self._pending_bytes > _PENDING_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is not written yet and took longer to compute than it takes to write."""
        pending, seconds = self._pending, self._pending_seconds
        if self._pending_bytes > BYTES_PER_SECOND * seconds:
            pending = {}
        self._pending, self._pending_bytes, self._pending_seconds = {}, 0, 0.0
        with self._tolerant():
            for (name, count), jobs in pending.items():
                if self._usable and (self._lock is not None or self._create()):
                    self._write(name, count, jobs, seconds)
                    self._seconds, seconds = self._seconds + seconds, 0.0
        self._flushed = time.monotonic()

    def close(self, keep: bool) -> Path | None:
        """End the run; the folder if finished jobs stay in it, else None and it is removed.

        keep   they are worth keeping: the run was interrupted or failed
        """
        if keep:
            self.flush()
        kept = False
        with contextlib.suppress(OSError):
            if self._lock is not None:
                kept = keep and any(self._parts())
                if not kept:
                    self._clear()
                    for name in ("key.json", "lock"):
                        (self.folder / name).unlink(missing_ok=True)
                    self.folder.rmdir()
        if self._lock is not None:
            os.close(self._lock)
        self._lock, self._usable, self._pending = None, False, {}
        return self.folder if kept else None

    @property
    def worth_keeping(self) -> bool:
        """Whether what is finished took long enough to be kept after an error."""
        return self._seconds + self._pending_seconds >= WORTH_KEEPING

    # ------------------------------------------------------------ the folder

    def _create(self) -> bool:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self._hold():
            return False
        if self._read_key() != self._key:
            self._clear()
            self._write_key()
        return True

    def _hold(self) -> bool:
        """Take the lock. The system frees it when its holder dies, however that happens, so none is ever stale."""
        try:
            import fcntl
        except ImportError:
            return self._give_up("this system has no file locks")
        about = os.lstat(self.folder)
        if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():
            return self._give_up(f"{self.folder} belongs to somebody else")  # who could plant scores there
        if any(not _OURS.fullmatch(p.name) for p in self.folder.iterdir()):
            return self._give_up(f"{self.folder} holds files that fxprune did not write")
        path = self.folder / "lock"
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(handle, 20).decode("ascii", "replace").strip()
                os.close(handle)
                return self._give_up(f"process {holder or 'unknown'} is writing to {self.folder}")
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(handle).st_ino == os.stat(path).st_ino:
                    break
            os.close(handle)  # its holder has just finished and removed it
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.truncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        self._lock = handle
        return True

    def _give_up(self, why: str) -> bool:
        self._usable = False
        self.note(f"{why}: this run keeps no finished scoring aside, and cannot be resumed")
        return False

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._give_up(f"{self.folder} cannot be used ({error.strerror or error})")

    def _read_key(self) -> str:
        try:
            stored = json.loads((self.folder / "key.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return ""
        return str(stored.get("key", "")) if isinstance(stored, dict) else ""

    def _write_key(self) -> None:
        about = {"fxprune_progress": _FORMAT, "key": self._key, "versions": core_versions()}
        self._put("key.json", (json.dumps(about, indent=2) + "\n").encode())

    def _parts(self) -> Iterable[Path]:
        return (p for p in self.folder.iterdir() if p.suffix in (".part", ".aside"))

    def _clear(self) -> bool:
        """Remove finished jobs; whether there were any."""
        parts = list(self._parts())
        for path in parts:
            path.unlink()
        return any(p.suffix == ".part" for p in parts)

    def _write(self, name: str, count: int, jobs: dict[int, Result], seconds: float) -> None:
        tensors = {f"{i}/{label}": tensor for i, result in jobs.items() for label, tensor in result.items()}
        packet = pack(tensors, {"name": name, "count": count, "jobs": list(jobs), "seconds": seconds})
        if self._bytes + len(packet) > MAX_BYTES:
            self._usable = False
            self.note(
                f"finished scoring fills {MAX_BYTES / 2**30:.3g} GiB in {self.folder}: what comes now is not "
                "kept, and an interrupted run repeats it"
            )
            return
        self._put(f"{_plain(name)}.{count}.{min(jobs):06d}.part", packet)
        self._bytes += len(packet)

    def _put(self, name: str, content: bytes) -> None:
        aside = self.folder / f".{name}.aside"
        aside.write_bytes(content)
        os.replace(aside, self.folder / name)


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_#-]", "-", name)
