"""Files from elsewhere: fetched once, checked, and unpacked so that nothing leaves its folder.

The cache is `$PEFTLAB_CACHE`, else `~/.cache/peftlab`. A file is fetched beside its place and renamed when it is whole;
its SHA-256 is written beside it and checked at every use. An archive is unpacked aside and renamed too.
"""

from __future__ import annotations

import gzip
import hashlib
import http.client
import lzma
import os
import stat
import string
import tarfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from peftlab.errors import CheckpointError, DataError, OutputError
from peftlab.files import new_folder, sha256, verify_folder, write_text

CACHE_VARIABLE = "PEFTLAB_CACHE"
MOST_BYTES = 20 << 30
"""Most bytes of one download, and of all the files of one archive."""
MOST_FILES = 200_000
"""Most files of one archive."""
_CHUNK = 1 << 20
_SECONDS = 60
_DAMAGED = (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError)
_SCHEMES = ("http", "https", "file")
_LONGEST_NAME = 100
_INSIDE = "files"
"""Where an archive's files lie in the folder that holds their checksums too."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """A file that is here and whole.

    Attributes:
        path: Where it lies.
        sha256: Its checksum.
    """

    path: Path
    sha256: str


def cache_folder() -> Path:
    """Where downloads are kept."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "peftlab"


def fetch(source: str, *, sha256: str | None = None, most_bytes: int = MOST_BYTES) -> Fetched:
    """A file by path or URL; one that was fetched before is not fetched again.

    Args:
        source: A path, or a file, http or https URL.
        sha256: The checksum that it must have; None takes it as it is.
        most_bytes: Refuse a larger one.

    Returns:
        The file: a path is left where it is, a URL's file lies in the cache.

    Raises:
        DataError: It cannot be had, is too large, or has another checksum.
        OutputError: The cache cannot be written.
    """
    try:
        parts = urllib.parse.urlsplit(source)
    except ValueError as error:
        raise DataError(f"{source} is neither a path nor a URL that can be read: {error}") from None
    sha256 = sha256.strip().lower() if sha256 is not None else None
    if parts.scheme in _SCHEMES:
        path = _from_url(source, _file_name(parts.path), sha256, most_bytes)
    elif "://" in source:
        raise DataError(f"{source} cannot be fetched: give a path, or a URL with {', '.join(_SCHEMES)}")
    else:
        path = Path(source).expanduser()
        if not path.is_file():
            raise DataError(f"there is no file {source} (task.archive takes a path or a URL)")
    found = _digest(path)
    if sha256 is not None and found != sha256:
        raise DataError(
            f"{source} has the sha256 {found}, expected {sha256}; it was changed or is damaged, so it is not used"
        )
    return Fetched(path, found)


def _file_name(path: str) -> str:
    """What the file of a URL's path is called in the cache; its end says what kind of file it is."""
    name = path.rpartition("/")[2][-_LONGEST_NAME:]
    return "download" if name.strip(".") == "" else name


def _digest(path: Path) -> str:
    """The checksum of a file, in the words of a person where it cannot be read."""
    try:
        return sha256(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None


def _from_url(url: str, name: str, wanted: str | None, most_bytes: int) -> Path:
    """The file of a URL in the cache, fetched where it is not there whole."""
    folder = cache_folder() / "downloads" / hashlib.sha256(url.encode()).hexdigest()[:16]
    path, note = folder / name, folder / f"{name}.sha256"
    if path.is_file() and note.is_file():
        kept = note.read_text(encoding="ascii").strip()
        if _digest(path) == kept and wanted in (None, kept):
            return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"the cache {folder} cannot be made: {error.strerror or error}; set {CACHE_VARIABLE} to another folder"
        ) from None
    aside = folder / f".{name}.{os.getpid()}.tmp"
    try:
        found = _download(url, aside, most_bytes)
        if wanted is not None and found != wanted:
            raise DataError(f"{url} has the sha256 {found}, expected {wanted}; it is not used")
        os.replace(aside, path)
        write_text(note, f"{found}\n")
    finally:
        aside.unlink(missing_ok=True)
    return path


def _download(url: str, path: Path, most_bytes: int) -> str:
    """Fetch a URL into a file; its checksum."""
    digest, done = hashlib.sha256(), 0
    written = urllib.parse.quote(
        url, safe=string.punctuation
    )  # a person's URL may hold spaces and letters of any kind
    try:
        with urllib.request.urlopen(written, timeout=_SECONDS) as answer, path.open("wb") as file:
            told = answer.headers.get("Content-Length") or ""
            expected = int(told) if told.isdecimal() else None
            while chunk := answer.read(_CHUNK):
                done += len(chunk)
                if done > most_bytes:
                    raise DataError(f"{url} is larger than {most_bytes:,} bytes and is not fetched")
                digest.update(chunk)
                file.write(chunk)
    except urllib.error.HTTPError as error:
        raise DataError(f"{url} cannot be fetched: the server says {error.code} {error.reason}") from None
    except DataError:
        raise
    except http.client.IncompleteRead:
        raise DataError(f"{url} broke off after {done:,} bytes; try again") from None
    except http.client.HTTPException as error:
        raise DataError(
            f"{url} cannot be fetched: its server gives no answer of HTTP ({type(error).__name__}); check the URL, or"
            " download it elsewhere and give its path"
        ) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise DataError(
            f"{url} cannot be fetched: {reason}; without a network, download it elsewhere and give its path"
        ) from None
    if expected is not None and expected != done:
        raise DataError(f"{url} broke off after {done:,} of {expected:,} bytes; try again")
    return digest.hexdigest()


def unpack(archive: Path, *, most_bytes: int = MOST_BYTES, most_files: int = MOST_FILES) -> Path:
    """The files of a .zip or .tar archive, in a folder of the cache.

    An archive is read to its end, so that its own checksums and its end marker are looked at. A tar that is not
    compressed has no checksum of its files' contents; give the archive's SHA-256 where it matters.

    Args:
        archive: The archive; a tar may be compressed.
        most_bytes: Refuse one whose files are larger together, counted while they are unpacked.
        most_files: Refuse one of more files.

    Returns:
        The folder; the only folder inside it where the archive holds nothing else. Unpacked once for each checksum.

    Raises:
        DataError: It is no archive, is damaged or too large, or holds a file with a name that leaves the folder, a link
            or a device.
        OutputError: The cache cannot be written.
    """
    folder = cache_folder() / "unpacked" / _digest(archive)[:16]
    if not (_is_whole(folder) and (folder / _INSIDE).is_dir()):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"the cache {folder.parent} cannot be made: {error.strerror or error}"
            ) from None
        with new_folder(folder) as aside:
            _unpack_into(archive, aside / _INSIDE, most_bytes, most_files)
    inside = [path for path in (folder / _INSIDE).iterdir() if path.name != "__MACOSX"]
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder / _INSIDE


def _is_whole(folder: Path) -> bool:
    """Whether an unpacked folder is as it was made."""
    try:
        verify_folder(folder)
    except CheckpointError:
        return False
    return True


def _unpack_into(archive: Path, folder: Path, most_bytes: int, most_files: int) -> None:
    """Unpack every file below a folder."""
    left = most_bytes
    count = 0
    try:
        with _members(archive) as members:
            for name, content in members:
                count += 1
                if count > most_files:
                    raise DataError(f"{archive} holds more than {most_files:,} files and is not unpacked")
                place = folder / _safe(archive, name)
                if place == folder:
                    raise DataError(f"{archive} holds a file without a name; take the upstream file")
                if place.exists():
                    raise DataError(f"{archive} holds '{name}' twice; take the upstream file")
                place.parent.mkdir(parents=True, exist_ok=True)
                with place.open("xb") as file:
                    while chunk := _read(archive, content, min(_CHUNK, left + 1)):
                        left -= len(chunk)
                        if left < 0:
                            raise DataError(
                                f"{archive} unpacks to more than {most_bytes:,} bytes and is refused"
                            )
                        file.write(chunk)
    except DataError:
        raise
    except (*_DAMAGED, ValueError, RuntimeError) as error:
        raise _damaged(archive, error) from None
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise DataError(f"{archive} holds a file and a folder of one name: {error.filename}") from None
    if not count:
        raise DataError(f"{archive} holds no files")


def _damaged(archive: Path, why: object) -> DataError:
    """What a person is told of an archive that cannot be read."""
    return DataError(f"{archive} is damaged or no archive: {why}; take the upstream file again")


def _read(archive: Path, content: IO[bytes], size: int) -> bytes:
    """A piece of a packed file; what is wrong with the archive is not told as something wrong with the disk."""
    try:
        return content.read(size)
    except OSError as error:  # bz2 says so where its data are damaged
        raise _damaged(archive, error) from None


@contextmanager
def _members(archive: Path) -> Iterator[Iterator[tuple[str, IO[bytes]]]]:
    """The files of an archive, each open; everything that is neither a file nor a folder is refused."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            yield _zip_members(archive, opened)
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as packed:
            yield _tar_members(archive, packed)
    else:
        raise DataError(
            f"{archive} is neither a .zip nor a .tar archive, or is damaged; take the upstream file"
        )


def _zip_members(archive: Path, opened: zipfile.ZipFile) -> Iterator[tuple[str, IO[bytes]]]:
    """The files of a zip."""
    for member in opened.infolist():
        kind = stat.S_IFMT(member.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DataError(f"{archive}: '{member.filename}' is a link or a device; only files are unpacked")
        _safe(archive, member.filename)
        if not member.is_dir():
            with opened.open(member) as content:
                yield member.filename, content


def _tar_members(archive: Path, packed: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    """The files of a tar; it is read to its end, as a damaged one looks like a shorter one."""
    for member in _headers(archive, packed):
        if not (member.isfile() or member.isdir()):
            raise DataError(f"{archive}: '{member.name}' is a link or a device; only files are unpacked")
        _safe(archive, member.name)
        content = packed.extractfile(member) if member.isfile() else None
        if content is not None:
            with content:
                yield member.name, content
    try:
        stream: Any = packed.fileobj
        stream.seek(packed.offset)  # where the tarfile module found no further member, for whatever reason
        block = stream.read(tarfile.BLOCKSIZE)
        whole = len(block) == tarfile.BLOCKSIZE and not any(block)
        while block := stream.read(_CHUNK):
            whole = whole and not any(block)
    except OSError as error:
        raise _damaged(archive, error) from None
    if not whole:
        raise _damaged(archive, f"its end marker is not where its files end, at byte {packed.offset:,}")


def _headers(archive: Path, packed: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, as far as they can be read."""
    try:
        yield from packed
    except OSError as error:
        raise _damaged(archive, error) from None


def _safe(archive: Path, name: str) -> PurePosixPath:
    """A member's name as a path below the folder; refused where it leads elsewhere."""
    path = PurePosixPath(name.replace("\\", "/"))
    if any("\ud800" <= character <= "\udfff" for character in name):
        raise DataError(f"{archive}: the name {name!r} is not UTF-8; pack the files anew under other names")
    if path.is_absolute() or ".." in path.parts or name[1:2] == ":" or "\0" in name:
        raise DataError(f"{archive}: '{name}' would be written outside of its folder; the archive is refused")
    return path
