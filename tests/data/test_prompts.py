"""Prompts: every layout gives what was written, and every wrong input its sentence."""

import builtins
import io
import json
import pickle
import sys
import tarfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmd.data import prompts
from dmd.errors import InputError

SCRIPTS = [
    "ein roter Kreis",
    "красный круг",
    "دائرة حمراء",
    "赤い丸",
    "🔴👩‍🚀",
    "e\u0301 \u2028 one line",
    "a/b\\c ../x",
]
TEXT = st.text(st.characters(exclude_characters="\0\n", exclude_categories=("Cs",)), max_size=40)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(rows):
    return "\n".join(json.dumps(row) for row in rows)


def shard(path, members):
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def refused(path, *parts):
    with pytest.raises(InputError) as caught:
        prompts.read(path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for part in (str(path), *parts):
        assert part in sentence
    return sentence


# ----------------------------------------------------------------------------- text


def test_a_text_file_is_one_prompt_a_line(tmp_path):
    found = prompts.read(write(tmp_path / "p.txt", "a cat\n\n  a dog \r\na cat\n \t\n"))
    assert found.texts == ["a cat", "a dog", "a cat"]
    assert (len(found), found[1], found.empty) == (3, "a dog", 2)


def test_a_byte_order_mark_is_no_part_of_the_prompt(tmp_path):
    assert prompts.read(write(tmp_path / "p.txt", b"\xef\xbb\xbfa cat")).texts == ["a cat"]
    assert prompts.read(write(tmp_path / "p.jsonl", b'\xef\xbb\xbf{"text": "a cat"}')).texts == ["a cat"]


def test_other_scripts_and_long_prompts_are_kept(tmp_path):
    texts = [*SCRIPTS, "very " * 2000 + "long"]
    assert len(texts[-1]) > 10_000
    assert prompts.read(write(tmp_path / "p.txt", "\n".join(texts))).texts == texts
    assert prompts.read(str(write(tmp_path / "p.jsonl", jsonl({"text": t} for t in texts)))).texts == texts


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(TEXT, max_size=8))
def test_any_lines_come_back(tmp_path, lines):
    kept = [line.strip() for line in lines if line.strip()]
    path = write(tmp_path / "p.txt", "\n".join(["first", *lines]))
    assert prompts.read(path) == prompts.Prompts(["first", *kept], len(lines) - len(kept) - (lines[-1:] == [""]))
    path = write(tmp_path / "p.jsonl", jsonl({"caption": line} for line in ["first", *lines]))
    assert prompts.read(path) == prompts.Prompts(["first", *kept], len(lines) - len(kept))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.sampled_from(["txt", "jsonl", "tar"]))
def test_any_bytes_are_prompts_or_one_sentence(tmp_path, content, suffix):
    path = write(tmp_path / f"p.{suffix}", content)
    try:
        assert all(prompts.read(path).texts)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("content", ["", "\n\n", " \r\n\t", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_an_empty_file_is_named(tmp_path, suffix, content):
    refused(write(tmp_path / f"p.{suffix}", content), "holds no prompt")


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"a\nb\nc\xff\n", ["line 3 is not UTF-8 (byte 2)"]),
        ("a cat".encode("utf-16"), ["line 1 is not UTF-8 (byte 1)"]),
        (b"a\nb\0c\n", ["line 2", "NUL"]),
        (b"\xed\xa0\x80", ["line 1 is not UTF-8"]),
    ],
)
def test_wrong_lines_are_numbered(tmp_path, content, parts):
    refused(write(tmp_path / "p.txt", content), *parts)


# ----------------------------------------------------------------------------- JSON lines and folders


def test_json_lines_have_text_or_caption(tmp_path):
    rows = [{"text": "a", "caption": "x"}, {"caption": "b", "n": 1}, {"text": ""}, {"caption": None}, {"text": "a"}]
    found = prompts.read(write(tmp_path / "p.jsonl", jsonl(rows) + "\n\n"))
    assert (found.texts, found.empty) == (["a", "b", "a"], 3)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"text": "a"', ["line 2 is not JSON"]),
        ("[" * 100_000, ["line 2 is not JSON"]),
        ("1" * 10_000, ["line 2 is not JSON"]),
        ('"text"', ["line 2 is not a JSON object with the key text or caption"]),
        ('{"prompt": "a"}', ["line 2 is not a JSON object with the key text or caption"]),
        ('{"text": ["a", "b"]}', ["line 2", "must be text, not list"]),
        ('{"text": 3}', ["line 2", "must be text, not int"]),
        ('{"text": "a\\u0000b"}', ["line 2", "NUL"]),
        ('{"text": "\\ud800"}', ["line 2", "surrogate"]),
    ],
)
def test_wrong_json_lines_are_numbered(tmp_path, line, parts):
    refused(write(tmp_path / "p.jsonl", '{"text": "a"}\n' + line), *parts)


def test_an_image_folder_has_metadata(tmp_path):
    write(
        tmp_path / "metadata.jsonl", jsonl([{"file_name": "1.png", "text": "a"}, {"file_name": "2.png", "text": "b"}])
    )
    write(tmp_path / "1.png", b"not looked at")
    assert prompts.read(tmp_path).texts == ["a", "b"]


def test_missing_and_unknown_files_are_named(tmp_path):
    refused(tmp_path / "none.txt", "does not exist")
    refused(tmp_path / "none", "does not exist")
    refused(tmp_path, "holds neither metadata.jsonl nor *.tar")
    refused(write(tmp_path / "p.csv", "a,b"), "no known layout", "FILE.jsonl")


# ----------------------------------------------------------------------------- webdataset


class Payload:
    """Its pickle ends the process."""

    def __reduce__(self):
        return sys.exit, ("unpickled",)


def test_a_shard_gives_one_caption_for_each_sample(tmp_path):
    members = [
        ("a/0.jpg", b"\xff\xd8"),
        ("a/0.json", b'{"caption": "not this", "sha": 1}'),
        ("a/0.txt", b" first "),
        ("a/1.json", b'{"text": "second"}'),
        ("b/1.txt", b"third\n"),  # another folder is another sample
        ("b/2.seg.txt", b"no caption"),
        ("b/3.TXT", b""),
        ("b/4.pyd", pickle.dumps(Payload())),
        ("b/4.pickle", pickle.dumps(Payload())),
        ("b/4.pth", pickle.dumps(Payload())),
        ("../../5.txt", b"third"),
    ]
    found = prompts.read(shard(tmp_path / "s.tar", members))
    assert (found.texts, found.empty) == (["first", "second", "third", "third"], 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.tar"]


def test_a_folder_of_shards_is_read_in_order(tmp_path):
    for name in ("s-001", "s-000"):
        shard(tmp_path / f"{name}.tar", [("0.txt", name.encode())])
    assert prompts.read(tmp_path).texts == ["s-000", "s-001"]


def test_links_of_a_shard_are_not_followed(tmp_path):
    secret = write(tmp_path / "secret", "secret")
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, kind in (("0.txt", tarfile.SYMTYPE), ("1.txt", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            archive.addfile(info)
    refused(tmp_path / "s.tar", "holds no prompt")


@pytest.mark.parametrize(
    ("member", "parts"),
    [
        (("0.txt", b"\xff"), ["member '0.txt' is not UTF-8"]),
        (("0.txt", b"a\0"), ["member '0.txt'", "NUL"]),
        (("0.json", b"{"), ["member '0.json' is not JSON"]),
        (("0.json", b"{}"), ["member '0.json' is not a JSON object with the key"]),
        (("0.txt", b"a" * (prompts.MAX_MEMBER + 1)), ["has 1048577 bytes"]),
        (("0.jpg", b"no caption"), ["holds no prompt"]),
    ],
)
def test_wrong_members_are_named(tmp_path, member, parts):
    refused(shard(tmp_path / "s.tar", [member]), *parts)


def test_cut_and_damaged_shards_are_named(tmp_path):
    path = shard(tmp_path / "s.tar", [(f"{i}.txt", b"caption " * 100) for i in range(9)])
    whole = path.read_bytes()
    first = 512 + 1024  # header, padded content
    for cut in (0, 100, 700, first + 100, first + 700):
        path.write_bytes(whole[:cut])
        refused(path, "is not a whole .tar file")
    path.write_bytes(whole[:first] + b"\1" + whole[first + 1 :])
    refused(path, "byte 1536 begins no member")
    path.write_bytes(whole[: 2 * first])  # no mark of the end: seven captions are lost, and nothing else says so
    refused(path, "is not a whole .tar file")


# ----------------------------------------------------------------------------- parquet


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "p.parquet"
    parquet.write_table(pa.table({"url": ["u"] * 5, "caption": ["a", "", None, *SCRIPTS[:2]]}), path, row_group_size=2)
    assert prompts.read(path) == prompts.Prompts(["a", *SCRIPTS[:2]], 2)
    parquet.write_table(pa.table({"url": ["u"]}), path)
    refused(path, "no column text or caption", "url")
    parquet.write_table(pa.table({"text": [b"a"]}), path)
    refused(path, "row 1", "must be text, not bytes")
    path.write_bytes(path.read_bytes()[:-9])
    refused(path, "is not a readable parquet file")
    path.write_bytes(b"")
    refused(path)


def test_parquet_without_a_reader_says_what_to_install(tmp_path, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    refused(write(tmp_path / "p.parquet", b"PAR1"), "pip install pyarrow")
