"""Prompts from the files that people keep them in: text, JSON lines, parquet, webdataset shards, captioned folders.

Nothing is unpickled and no code of an archive runs: of a shard only members ending in .txt and .json are opened.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmd.data import tar
from dmd.errors import InputError

KEYS = ("text", "caption")
"""Where a JSON object or a table keeps its prompt; the first that is there counts."""

LAYOUTS = (
    "FILE.txt (one prompt a line), FILE.jsonl or FILE.parquet (text or caption), FILE.tar (webdataset, with .txt or "
    ".json members), a folder of such tars, or a folder of images with metadata.jsonl"
)
MAX_MEMBER = 2**20  # bytes; a broken or hostile header must not fill the memory

Found = Iterator[tuple[str, Any]]
"""(where it was found, what was found there)."""


@dataclass(frozen=True)
class Prompts:
    """Prompts in the order of their file, duplicates kept.

    Attributes:
        texts: each without white space around it, none empty, at least one.
        empty: how many lines or rows were left out because nothing was in them.
    """

    texts: list[str]
    empty: int

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> str:
        return self.texts[index]


def read(path: str | Path) -> Prompts:
    """All prompts of a file or folder, in UTF-8.

    Raises:
        InputError: there is no such file, or it is of no known layout, empty, not UTF-8, or broken; a prompt holds NUL
            or half of a surrogate pair. The sentence names the file and the line, row or member.
    """
    path = Path(path)
    texts, empty = [], 0
    for where, value in _entries(path):
        text = checked(where, value)
        if text:
            texts.append(text)
        else:
            empty += 1
    if not texts:
        raise InputError(f"{path} holds no prompt: it needs at least one that is not empty")
    return Prompts(texts, empty)


def _entries(path: Path) -> Found:
    readers = {".txt": lines, ".jsonl": _jsonl, ".parquet": _parquet, ".tar": _tar}
    try:
        if path.is_dir():
            yield from _folder(path)
        elif path.suffix.lower() in readers and path.exists():
            yield from readers[path.suffix.lower()](path)
        elif path.exists():
            raise InputError(f"{path} is of no known layout for prompts: give {LAYOUTS}")
        else:
            raise InputError(f"{path} does not exist: give {LAYOUTS}")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read: {error}") from None


def checked(where: str, value: Any) -> str:
    """A prompt without the white space around it; "" for nothing.

    Raises:
        InputError: it is no text, or holds NUL or half of a surrogate pair.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: a prompt must be text, not {type(value).__name__}")
    if "\0" in value:
        raise InputError(f"{where}: a prompt must not hold the character NUL")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: a prompt must not hold half of a surrogate pair") from None
    return value.strip()


def _folder(path: Path) -> Found:
    tars = sorted(path.glob("*.tar"))
    if (path / "metadata.jsonl").is_file():
        yield from _jsonl(path / "metadata.jsonl")
    elif tars:
        for tar in tars:
            yield from _tar(tar)
    else:
        raise InputError(f"folder {path} holds neither metadata.jsonl nor *.tar: give {LAYOUTS}")


def lines(path: Path) -> Iterator[tuple[str, str]]:
    """(where, text) of each line of a UTF-8 file. It ends with a line feed only: other scripts have separators of their
    own.

    Raises:
        InputError: a line is not UTF-8.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            where = f"{path}, line {number}"
            yield where, _decoded(where, line)


def caption_of(where: str, line: str) -> str:
    """The prompt of a line of JSON, under "text" or "caption"; "" if there is nothing in it.

    Raises:
        InputError: the line is no JSON object with such a key, or its prompt is no text.
    """
    return checked(where, _member_of_json(where, line))


def _jsonl(path: Path) -> Found:
    for where, line in lines(path):
        yield where, _member_of_json(where, line) if line.strip() else None


def _decoded(where: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 (byte {error.start + 1}): save the file as UTF-8") from None


def _member_of_json(where: str, text: str) -> Any:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}") from None
    key = next((k for k in KEYS if k in value), None) if isinstance(value, dict) else None
    if key is None:
        raise InputError(f"{where} is not a JSON object with the key {' or '.join(KEYS)}")
    return value[key]


def _parquet(path: Path) -> Found:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{path} needs a package that reads parquet: pip install pyarrow") from None
    try:
        with ParquetFile(path) as file:
            column = next((k for k in KEYS if k in file.schema_arrow.names), None)
            if column is None:
                raise InputError(f"{path} has no column {' or '.join(KEYS)}: it has {file.schema_arrow.names}")
            row = 0
            for batch in file.iter_batches(columns=[column]):
                for value in batch.column(0).to_pylist():
                    row += 1
                    yield f"{path}, row {row}", value
    except ArrowException as error:
        raise InputError(f"{path} is not a readable parquet file: {error}") from None


def _tar(path: Path) -> Found:
    """Captions of a webdataset shard: of each sample its .txt member, or its .json member where there is no other.

    A sample is a run of members whose names are equal up to the first dot of the file name.
    """
    for members in tar.samples(path):
        member = members.get("txt") or members.get("json")
        if member is not None:
            where = f"{path}, member {member.name!r}"
            text = _decoded(where, tar.content(path, member, MAX_MEMBER, "a caption"))
            yield where, text if "txt" in members else _member_of_json(where, text)
