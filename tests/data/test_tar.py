"""Members and samples of tar files, against the standard library and webdataset."""

import io
import tarfile

import pytest

from dmd.data import tar
from dmd.errors import InputError

LONG = "x" * 150
NAMES = ["a/0.png", "a/0.txt", "b/0.png", "1.SEG.png", "1.png", f"{LONG}.jpg", f"{LONG}.json", "bare", "2.txt"]


def archive(path, names, form=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=form) as file:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = 10 * number
            file.addfile(info, io.BytesIO(bytes([number]) * info.size))
    return path


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_contents_are_those_of_the_standard_library(tmp_path, form):
    path = archive(tmp_path / "x.tar", NAMES, form)
    with tarfile.open(path) as file:
        expected = [(m.name, file.extractfile(m).read()) for m in file]
    assert [(m.name, tar.content(path, m, 1000, "a file")) for m in tar.members(path)] == expected


def test_samples_are_those_of_webdataset(tmp_path):
    group_by_keys = pytest.importorskip("webdataset.tariterators").group_by_keys
    path = archive(tmp_path / "x.tar", NAMES)
    named = [{"fname": m.name, "data": tar.content(path, m, 1000, ""), "__url__": ""} for m in tar.members(path)]
    expected = [{k: v for k, v in s.items() if not k.startswith("__")} for s in group_by_keys(iter(named))]
    found = [{e: tar.content(path, m, 1000, "") for e, m in s.items() if e} for s in tar.samples(path)]
    assert [s for s in found if s] == [s for s in expected if s]


def test_large_members_are_refused_before_they_are_read(tmp_path):
    path = archive(tmp_path / "x.tar", NAMES)
    last = list(tar.members(path))[-1]
    with pytest.raises(InputError, match=r"member '2.txt' has 80 bytes: a caption has at most 79"):
        tar.content(path, last, 79, "a caption")
