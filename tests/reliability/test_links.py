"""`dmd teach` and `dmd pairs`, the links of the chain alone: what the whole chain makes, and resumed as there."""

import signal

import pytest
import small
from test_faults import pair_files, signal_at

from dmd import build, checkpoint
from dmd.batches import TeachBatches
from dmd.cli import parts


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def test_pairs_without_a_teacher_say_what_to_do_first(world, refused, tmp_path, cache):
    flags = world.flags(tmp_path / "run", "--cache-dir", str(cache))
    sentence = refused(lambda argv: parts.pairs(argv, "dmd pairs"), flags, tmp_path)
    assert sentence.startswith("no teacher has been taught with these options: run `dmd teach digits` with")


def test_a_teacher_and_its_pairs_are_made_by_two_commands_that_resume(world, tmp_path, cache, capsys):
    flags = world.flags(tmp_path / "run", "--cache-dir", str(cache))
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, "TeachBatches", 4, signal.SIGTERM)
        parts.teach(flags, "dmd teach")
    (teacher,) = (cache / "teachers").iterdir()
    assert "teacher: " not in capsys.readouterr().out
    assert checkpoint.latest(teacher / "checkpoints").name == "step-00000005"
    taken = []

    class Noting(TeachBatches):
        def __call__(self, step):
            taken.append(step)
            return super().__call__(step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "TeachBatches", Noting)
        parts.teach(flags, "dmd teach")
    assert taken == [5, 6, 7]
    assert capsys.readouterr().out.splitlines()[-1] == f"teacher: {teacher}"
    assert (teacher / "model.safetensors").read_bytes() == (world.teacher / "model.safetensors").read_bytes()
    assert small.lines(teacher) == small.lines(world.teacher)

    parts.pairs(flags, "dmd pairs")
    (folder,) = (cache / "pairs").iterdir()
    assert capsys.readouterr().out.splitlines()[-1] == f"12 pairs: {folder}"
    assert pair_files(cache) == pair_files(world.root / "cache", folder.name)
    kept = (folder / "00000.safetensors").stat().st_mtime_ns
    (folder / "00001.safetensors").write_bytes(b"")
    parts.pairs(flags, "dmd pairs")
    assert "pairs: 100%" in capsys.readouterr().err
    assert pair_files(cache) == pair_files(world.root / "cache", folder.name)
    assert (folder / "00000.safetensors").stat().st_mtime_ns == kept
    assert not (tmp_path / "run").exists()
