"""SHA256SUMS: the hashes of a published run, which go with it wherever it is copied."""

from collections.abc import Mapping
from pathlib import Path

from fluxsae.errors import FluxSaeError
from fluxsae.files import write_text
from fluxsae.hub.transfer import failing, sha256
from fluxsae.runs.folder import RunFolder


def write_checksums(run: RunFolder) -> None:
    """Writes SHA256SUMS over every published file but itself."""
    names = [name for name in run.published_files() if name != run.checksums_path.name]
    write_text(run.checksums_path, "".join(f"{sha256(run.path / name)}  {name}\n" for name in names))


def read_checksums(path: Path) -> dict[str, str]:
    """Path -> sha256 of a SHA256SUMS file.

    Raises:
        FluxSaeError: a line is not a hash and a path inside the folder.
    """
    sums = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64 or not is_inside(name):
            raise FluxSaeError(f"Line {number} of {path} is not '<sha256>  <path>'. Push the run again to renew it.")
        sums[name] = digest
    return sums


def wrong_files(run: RunFolder, sums: Mapping[str, str]) -> list[str]:
    """The files that are missing or whose content does not have its hash."""
    return failing(sums, lambda name: (run.path / name).is_file() and sha256(run.path / name) == sums[name])


def is_inside(name: str) -> bool:
    """Whether a relative path stays in its folder."""
    return bool(name) and not name.startswith("/") and "\\" not in name and ".." not in name.split("/")
