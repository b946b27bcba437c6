"""The members of a tar file that anybody may have made: names, and where their bytes lie. Nothing is extracted.

Headers are parsed by the standard library's `tarfile.TarInfo.frombuf`, one block at a time; `tarfile.open` would read
extended headers of any size into memory and take a damaged header for the end of the archive.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dmd.errors import InputError

BLOCK = tarfile.BLOCKSIZE
MAX_EXTENDED = 2**16  # bytes of a header that names the next member
PAX_PATH = re.compile(rb"(?:^|\n)\d+ path=([^\n]*)\n")


class Member(NamedTuple):
    """A regular file: its bytes are file[offset : offset + size]."""

    name: str
    offset: int
    size: int


def members(path: Path) -> Iterator[Member]:
    """The regular members of an uncompressed tar file in their order; links, devices and the like are passed over.

    Raises:
        InputError: the file is cut short, or a header is damaged or claims what cannot be.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        position, name = 0, None
        while True:
            block = file.read(BLOCK)
            if len(block) == BLOCK and not any(block):
                return
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except tarfile.HeaderError as error:
                raise InputError(_cut(path, f"byte {position} begins no member ({error})")) from None
            offset = position + BLOCK
            if info.size < 0 or offset + info.size > end:
                raise InputError(_cut(path, f"the member at byte {position} claims {info.size} bytes"))
            if info.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
                name = _long_name(path, file, info)
            elif info.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                yield Member(info.name if name is None else name, offset, info.size)
            if info.type not in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
                name = None
            position = offset + -(-info.size // BLOCK) * BLOCK
            file.seek(position)


def samples(path: Path) -> Iterator[dict[str, Member]]:
    """Webdataset's samples: runs of members whose names are equal up to the first dot of the file name.

    Each is its members by extension, in lower case; of several with one extension the last counts. Raises as `members`.
    """
    current, found = "", dict[str, Member]()
    for member in members(path):
        sample, extension = split(member.name)
        if sample != current and found:
            yield found
            found = {}
        current = sample
        found[extension] = member
    if found:
        yield found


def split(name: str) -> tuple[str, str]:
    """Member name to (sample, extension), as webdataset cuts it: at the first dot of the last component."""
    folder, base = os.path.split(name)
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}", extension.lower()


def content(path: Path, member: Member, most: int, what: str) -> bytes:
    """The bytes of a member.

    Raises:
        InputError: it claims more than `most` bytes, which none of `what` ("an image") has.
        OSError: it cannot be read.
    """
    if member.size > most:
        where = f"{path}, member {member.name!r}"
        raise InputError(f"{where} has {member.size} bytes: {what} has at most {most}")
    with open(path, "rb") as file:
        file.seek(member.offset)
        return file.read(member.size)


def _long_name(path: Path, file: BinaryIO, info: tarfile.TarInfo) -> str | None:
    """The name that an extended header gives the next member; None if it is about other things."""
    if info.size > MAX_EXTENDED:
        raise InputError(_cut(path, f"an extended header claims {info.size} bytes"))
    content = file.read(info.size)
    if info.type == tarfile.GNUTYPE_LONGNAME:
        return content.rstrip(b"\0").decode("utf-8", "surrogateescape")
    found = PAX_PATH.search(content)
    return found[1].decode("utf-8", "surrogateescape") if found else None


def _cut(path: Path, why: str) -> str:
    return f"{path} is not a whole .tar file: {why}; make or download it again"
