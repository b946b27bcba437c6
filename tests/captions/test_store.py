"""The file of captions: resumed after a kill it is what it would have been, and nothing of the user's is lost."""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest

from dmd.captions import grammar, store
from dmd.cli import captions as command
from dmd.errors import InputError
from dmd.locks import Locks

SPEC = {"seed": 0, "world": "test"}


def draw(attempts):
    """Every third attempt repeats one before, every seventh is bad."""
    return [
        "bad" if i % 7 == 6 else grammar.Row(f"caption {i - 2 if i % 3 == 2 else i} é", "c", "t")
        for i in attempts.tolist()
    ]


def test_captions_are_numbered_unique_and_counted(tmp_path):
    done = store.write(tmp_path / "c.jsonl", SPEC, 50, draw, 8)
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [r["id"] for r in rows] == list(range(50)) and len({r["caption"] for r in rows}) == 50
    assert done.kept == 50 and done.attempts == 50 + sum(done.dropped.values())
    assert done.dropped.keys() == {"bad", "repeated"} and done.templates == {"t": 50}
    naive = dict.fromkeys(f"caption {i - 2 if i % 3 == 2 else i} é" for i in range(done.attempts) if i % 7 != 6)
    assert [r["caption"] for r in rows] == list(naive)


def test_more_captions_begin_with_the_same_ones(tmp_path):
    store.write(tmp_path / "a.jsonl", SPEC, 20, draw, 8)
    few = (tmp_path / "a.jsonl").read_bytes()
    store.write(tmp_path / "a.jsonl", SPEC, 60, draw, 8)
    store.write(tmp_path / "b.jsonl", SPEC, 60, draw, 7)
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert (tmp_path / "a.jsonl").read_bytes().startswith(few)
    before = (tmp_path / "a.jsonl").read_bytes()
    assert store.write(tmp_path / "a.jsonl", SPEC, 10, draw, 8).kept == 60
    assert (tmp_path / "a.jsonl").read_bytes() == before


def slow(attempts):
    time.sleep(0.005)
    return draw(attempts)


def test_killed_at_random_moments_it_ends_the_same(tmp_path):
    context, rng = multiprocessing.get_context("fork"), random.Random(0)
    store.write(tmp_path / "whole.jsonl", SPEC, 300, draw, 8)
    for _ in range(6):
        process = context.Process(target=store.write, args=(tmp_path / "c.jsonl", SPEC, 300, slow, 8))
        process.start()
        time.sleep(rng.uniform(0.02, 0.15))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    store.write(tmp_path / "c.jsonl", SPEC, 300, draw, 8)
    assert (tmp_path / "c.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert (tmp_path / "c.state.json").read_bytes() == (tmp_path / "whole.state.json").read_bytes()


def test_what_a_kill_left_behind_the_state_is_cut_off(tmp_path):
    path = tmp_path / "c.jsonl"
    store.write(path, SPEC, 20, draw, 8)
    with open(path, "ab") as file:
        file.write(b'{"id": 20, "capt')
    store.write(path, SPEC, 40, draw, 8)
    store.write(tmp_path / "whole.jsonl", SPEC, 40, draw, 8)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_other_files_and_other_captions_are_refused_and_kept(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"caption": "mine"}\n')
    with pytest.raises(InputError, match="mine.jsonl is there already.*--fresh"):
        store.write(path, SPEC, 5, draw, 8)
    assert path.read_text() == '{"caption": "mine"}\n'
    store.write(tmp_path / "c.jsonl", SPEC, 5, draw, 8)
    with pytest.raises(InputError, match="seed = '0', but '1' is asked for"):
        store.write(tmp_path / "c.jsonl", SPEC | {"seed": 1}, 5, draw, 8)
    lines = (tmp_path / "c.jsonl").read_text()
    (tmp_path / "c.jsonl").write_text(lines.replace("caption 1 ", "caption\n1"))
    with pytest.raises(InputError, match="was changed since"):
        store.write(tmp_path / "c.jsonl", SPEC, 9, draw, 8)


def test_too_few_different_captions_are_kept_and_said(tmp_path):
    with pytest.raises(InputError, match="no more than 10 different captions, and 11 were asked for.*--count 10"):
        store.write(tmp_path / "d.jsonl", SPEC, 11, grammar.of_names(grammar.DIGITS), 1000)
    assert len((tmp_path / "d.jsonl").read_text().splitlines()) == 10


def hold(path, ready, done):
    with Locks(path) as locks:
        assert locks.take(0)
        ready.set()
        done.wait(60)


def test_a_second_writer_gets_a_sentence(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / ".c.jsonl.lock", ready, done))
    process.start()
    assert ready.wait(60)
    with pytest.raises(InputError, match="is being written by another process"):
        store.write(tmp_path / "c.jsonl", SPEC, 5, draw, 8)
    done.set()
    process.join()
    assert store.write(tmp_path / "c.jsonl", SPEC, 5, draw, 8).kept == 5


def test_the_command_makes_a_thousand_captions_and_says_so(tmp_path, capsys):
    out = tmp_path / "sub" / "captions.jsonl"
    command.main(["--out", str(out), "--count", "1000", "--seed", "3"])
    assert "1000 captions (" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0].keys() == {"id", "caption", "concept", "template"} and len(rows) == 1000
    command.main(["--out", str(out), "--count", "10", "--seed", "4", "--fresh"])
    assert len(out.read_text().splitlines()) == 10


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [(["--count", "0"], "--count is 0"), (["--out", "c.txt"], "must end in .jsonl"), (["--seed", "-1"], "--seed is -1"),
     (["--world", "digits", "--llm", "x"], "captions of its own"), (["--world", "digits"], "no more than 10 different"),
     (["--place", "-2"], "--place is -2"), (["--llm", "missing"], "--llm is missing"),
     (["--concepts", "missing.txt"], "missing.txt does not exist")],
)  # fmt: skip
def test_wrong_flags_get_a_sentence(flags, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        command.main(flags)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and last.startswith("error: ") and sentence in last
