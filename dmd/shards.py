"""Synthetic images on the disk: tar shards in img2dataset's layout, which webdataset reads, and a manifest.

    manifest.json               what determines the images (`spec`), counts, and size and SHA-256 of every file
    00000.tar                   000000000.jpg, 000000000.txt (the caption), 000000000.json (all facts), ...
    00000.parquet               the same facts as a table, also of images that were dropped
    00000_stats.json            counts, times, and size and SHA-256 of the two files above

A shard is written aside and renamed, its stats last: where they agree with the files, it is there, and otherwise it is
made again, alone. Tars and tables are a function of the spec: they bear no clock, user or host.
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from dmd import checkpoint
from dmd.errors import InputError

Format = Literal["jpg", "webp", "png"]
MANIFEST = "manifest.json"
KIND, VERSION = "dmd synthetic images", 1
SEED_RULE = (
    "start noise = dmd.seeding.normal(seed, Stream.SYNTHESIS, step=epoch, index=caption_id * 65536 + replica), epoch 0"
)


@dataclass(frozen=True)
class Spec:
    """What determines every image. Data sets of equal specs are equal, byte for byte on one kind of machine.

    Attributes:
        captions: SHA-256 of the captions.
        count: of captions.
        replicas: images of each, which lie together.
        seed: key of the noise.
        source: what makes the images: kind, digest of the network, steps, guidance, ...
        pixels: height and width that images are resized to; None leaves them.
        image_format, quality: of the files; PNG is lossless.
        shard_size: images of a shard, a multiple of `replicas`.
        batch_size: images that the network makes at a time, always these together, since its rounding depends on it.
        dropping: which images are left out; empty for none.
    """

    captions: str
    count: int
    replicas: int
    seed: int
    source: Mapping[str, Any]
    pixels: int | None
    image_format: Format
    quality: int
    shard_size: int
    batch_size: int
    dropping: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return self.count * self.replicas

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_size)

    def indices(self, shard: int) -> range:
        """Numbers of a shard's images; image i is replica i % replicas of caption i // replicas."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.images))

    def name(self, shard: int) -> str:
        """ "00000", "00001", ..., as img2dataset names shards."""
        return f"{shard:0{max(5, len(str(self.shards - 1)))}d}"

    def key(self, index: int) -> str:
        """Name of an image's members: its shard and its place therein, all of one length."""
        digits = len(str(self.shard_size - 1))
        return f"{self.name(index // self.shard_size)}{index % self.shard_size:0{digits}d}"

    def digest(self) -> str:
        """SHA-256 of the spec."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """A whole shard: how many images, how many were dropped, and size and SHA-256 of its files by name."""

    images: int
    dropped: int
    files: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Facts:
    """What a file says of its image.

    Attributes:
        caption_id: its place in the file of captions, from 0; duplicates and empty lines do not count.
        replica: which of the caption's images.
        epoch, seed: its noise is a function of these and the two above, see `SEED_RULE`.
        original_width, original_height: before it was resized.
        clip_score: cosine of image and caption, if they were compared.
    """

    caption: str
    caption_id: int
    replica: int
    epoch: int
    seed: int
    width: int
    height: int
    original_width: int
    original_height: int
    clip_score: float | None = None


# ----------------------------------------------------------------------------- writing


def encode(image: np.ndarray, image_format: Format, quality: int) -> bytes:
    """A file of an image (H, W, 1 or 3) uint8. JPEG with 4:2:0 and standard tables, which is the fastest; Pillow lets
    other threads run meanwhile."""
    from PIL import Image

    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    file = io.BytesIO()
    if image_format == "jpg":
        picture.save(file, "JPEG", quality=quality)
    elif image_format == "webp":
        picture.save(file, "WEBP", quality=quality, method=0)
    else:
        picture.save(file, "PNG", compress_level=1)
    return file.getvalue()


class _Hashed:
    """A file that knows the SHA-256 of what was written to it."""

    def __init__(self, file: IO[bytes]):
        self.file, self.sha, self.size = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        self.sha.update(data)
        self.size += len(data)
        return self.file.write(data)

    def facts(self) -> dict[str, Any]:
        return {"size": self.size, "sha256": self.sha.hexdigest()}


class ShardWriter:
    """Writes one shard, image by image; nothing is there under its name before `finish`. One process at a time may
    write a shard; what a killed one has left is overwritten.

    Args:
        folder: of the data set.
        name: "00000".
        spec: digest of the spec, which the stats bear.

    Raises:
        OSError: (all methods) it could not be written; it names the file. `abandon` then removes what there is.
    """

    def __init__(self, folder: Path, name: str, spec: str):
        self.folder, self.name, self.spec = folder, name, spec
        self._started = time.time()
        self._rows: list[dict[str, Any]] = []
        self._path = folder / f".tmp-{name}.tar.part"
        self._file = open(self._path, "wb")  # noqa: SIM115 (closed by finish or abandon)
        self._hashed = _Hashed(self._file)
        options: dict[str, Any] = {"fileobj": self._hashed, "mode": "w|", "format": tarfile.USTAR_FORMAT}
        self._tar = tarfile.open(**options, bufsize=2**20)  # noqa: SIM115 (closed by finish)

    def add(self, key: str, image: bytes, extension: Format, facts: Facts) -> None:
        """An image with its caption and facts."""
        row = {"key": key, "status": "success", **asdict(facts), "sha256": hashlib.sha256(image).hexdigest()}
        with self._naming_the_file():
            self._member(f"{key}.{extension}", image)
            self._member(f"{key}.txt", " ".join(facts.caption.splitlines()).encode())
            self._member(f"{key}.json", json.dumps(row, ensure_ascii=False, indent=1).encode())
        self._rows.append(row)

    def drop(self, key: str, reason: str, facts: Facts) -> None:
        """An image that is left out: its row is in the table only."""
        self._rows.append({"key": key, "status": reason, **asdict(facts), "sha256": None})

    def finish(self) -> Shard:
        """Flush all to the disk; the shard is there."""
        with self._naming_the_file():
            self._tar.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        self._path.replace(self.folder / f"{self.name}.tar")
        table = parquet(self._rows)
        write_bytes(self.folder / f"{self.name}.parquet", table)
        files = {
            f"{self.name}.tar": self._hashed.facts(),
            f"{self.name}.parquet": {"size": len(table), "sha256": hashlib.sha256(table).hexdigest()},
        }
        status = Counter(str(row["status"]) for row in self._rows)
        now = time.time()
        stats = {
            "count": len(self._rows), "successes": status["success"], "failed_to_download": 0, "failed_to_resize": 0,
            "start_time": self._started, "end_time": now, "duration": now - self._started, "status_dict": dict(status),
            "spec": self.spec, "files": files,
        }  # fmt: skip
        _write_json(stats_path(self.folder, self.name), stats)
        return Shard(status["success"], len(self._rows) - status["success"], files)

    def abandon(self) -> None:
        """Remove what has been written."""
        with contextlib.suppress(OSError):
            self._file.close()
        self._hashed.file = io.BytesIO()  # for what the archive still holds when it is collected
        self._path.unlink(missing_ok=True)

    def _member(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        self._tar.addfile(info, io.BytesIO(data))

    @contextlib.contextmanager
    def _naming_the_file(self) -> Any:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.folder / f"{self.name}.tar")) from error


COLUMNS = {
    "key": "string", "status": "string", "caption": "string", "caption_id": "int64", "replica": "int32",
    "epoch": "int64", "seed": "uint64", "width": "int32", "height": "int32", "original_width": "int32",
    "original_height": "int32", "clip_score": "float64", "sha256": "string",
}  # fmt: skip
"""Of the table, with their types."""


def parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows of `COLUMNS` as the bytes of a table."""
    import pyarrow as pa
    from pyarrow import parquet as pq

    schema = pa.schema([(name, pa.type_for_alias(kind)) for name, kind in COLUMNS.items()])
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema), buffer)
    return buffer.getvalue()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically and flush it to the disk, for one process at a time. An OSError names it."""
    temporary = path.with_name(f".tmp-{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, value: Any) -> None:
    write_bytes(path, json.dumps(value, ensure_ascii=False, indent=1).encode())


# ----------------------------------------------------------------------------- checking


def stats_path(folder: Path, name: str) -> Path:
    return folder / f"{name}_stats.json"


def whole(folder: Path, name: str, spec: str, deep: bool) -> Shard | None:
    """A shard whose stats are there and agree with its files; None if it is to be made.

    Args:
        spec: digest that its stats must bear.
        deep: compare SHA-256 sums, else sizes.
    """
    try:
        stats = json.loads(stats_path(folder, name).read_text(encoding="utf-8"))
        files = {n: {"size": int(f["size"]), "sha256": str(f["sha256"])} for n, f in stats["files"].items()}
        shard = Shard(int(stats["successes"]), int(stats["count"]) - int(stats["successes"]), files)
        if stats["spec"] != spec or files.keys() != {f"{name}.tar", f"{name}.parquet"}:
            return None
        for file, facts in files.items():
            path = folder / file
            if path.stat().st_size != facts["size"] or (deep and checkpoint.describe(path) != facts):
                return None
        return shard
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


# ----------------------------------------------------------------------------- the manifest


def start(folder: Path, spec: Spec) -> None:
    """Make the folder of a data set, or accept what a job of the same spec has left.

    Raises:
        InputError: the folder holds a data set of another spec, or other things.
    """
    path = folder / MANIFEST
    if path.exists():
        _require_same(path, spec)
        return
    foreign = [p.name for p in folder.iterdir() if not p.name.startswith(".")] if folder.is_dir() else []
    if foreign:
        raise InputError(f"{folder} holds {foreign[0]!r} and no {MANIFEST}: give a new or empty folder as --out")
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(path, _manifest(spec, {}))


def finish(folder: Path, spec: Spec) -> dict[str, Shard] | None:
    """Write the manifest of all shards and return them; None while some are missing (by their sizes)."""
    digest, found = spec.digest(), {}
    for name in map(spec.name, range(spec.shards)):
        shard = whole(folder, name, digest, deep=False)
        if shard is None:
            return None
        found[name] = shard
    _write_json(folder / MANIFEST, _manifest(spec, found))
    return found


def _manifest(spec: Spec, shards: Mapping[str, Shard]) -> dict[str, Any]:
    counts = {
        "captions": spec.count, "replicas": spec.replicas, "shards": spec.shards,
        "images": sum(s.images for s in shards.values()), "dropped": sum(s.dropped for s in shards.values()),
    }  # fmt: skip
    return {
        "kind": KIND, "version": VERSION, "complete": len(shards) == spec.shards, "counts": counts,
        "seed_rule": SEED_RULE, "spec": asdict(spec), "shards": {name: asdict(s) for name, s in shards.items()},
    }  # fmt: skip


def _require_same(path: Path, spec: Spec) -> None:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        kind, found = manifest["kind"], dict(manifest["spec"])
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is damaged, or of another program: give another --out, or remove it") from None
    if kind != KIND:
        raise InputError(f"{path} is of another program: give another --out")
    for name, value in json.loads(json.dumps(asdict(spec))).items():
        if found.get(name) != value:
            raise InputError(
                f"{path.parent} holds images with {name} = {_short(found.get(name))}, but {_short(value)} is asked "
                "for: give another --out"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
