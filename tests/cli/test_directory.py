"""Run directories of the three commands that have them: what is gone on with, and what is left alone."""

import dataclasses
import json

import pytest

from dmd.cli import clipgen, directory, represent, train
from dmd.errors import InputError

KINDS = {"train": train.RUNS, "clipgen": clipgen.RUNS, "represent": represent.RUNS}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def seeded(config, seed):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, seed=seed))


def test_a_run_is_gone_on_with_by_the_same_options_alone(kind, tmp_path):
    config = kind.config()
    directory.check(tmp_path / "run", kind, config, fresh=False)
    assert not any(tmp_path.iterdir())
    directory.open_run(tmp_path / "run", kind, config, fresh=False)
    directory.check(tmp_path / "run", kind, config, fresh=False)
    with pytest.raises(InputError, match="holds another run .seed was 0, now 1"):
        directory.check(tmp_path / "run", kind, seeded(config, 1), fresh=False)
    directory.check(tmp_path / "run", kind, seeded(config, 1), fresh=True)


def test_the_runs_of_other_commands_are_refused_even_if_fresh(kind, tmp_path):
    for other in KINDS.values():
        if other is not kind:
            directory.open_run(tmp_path / other.mark, other, other.config(), fresh=False)
            for fresh in (False, True):
                with pytest.raises(InputError, match=f"not a run directory of {kind.command}"):
                    directory.check(tmp_path / other.mark, kind, kind.config(), fresh)


def test_a_network_s_folder_is_no_run(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(InputError, match="is not empty and not a run directory"):
        directory.check(tmp_path, kind, kind.config(), fresh=True)


def test_a_damaged_config_can_be_started_over(kind, tmp_path):
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "environment.json").write_text("{}")
    with pytest.raises(InputError, match="is not valid JSON: restore it, or start over with --fresh"):
        directory.check(tmp_path, kind, kind.config(), fresh=False)
    directory.check(tmp_path, kind, kind.config(), fresh=True)


def test_fresh_deletes_what_a_run_has_written_and_nothing_else(kind, tmp_path):
    directory.open_run(tmp_path, kind, kind.config(), fresh=False)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "metrics.jsonl").write_text("{}")
    directory.open_run(tmp_path, kind, seeded(kind.config(), 7), fresh=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "notes.txt"]
    assert json.loads((tmp_path / "config.json").read_text())["run"]["seed"] == 7
