"""Ray Data makes what one process makes, and only what is missing."""

import os
from functools import partial
from pathlib import Path

import pytest
from stub import CAPTIONS, job, spec
from test_synthesize import flags, run  # noqa: F401 (a fixture)

from dmd import synthesis
from dmd.cli import synthesize as command
from dmd.errors import InputError

ray = pytest.importorskip("ray")
pytest.importorskip("ray.data", reason="Ray is there without its part data", exc_type=ImportError)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    ray.init(
        num_cpus=2, include_dashboard=False, configure_logging=False, log_to_driver=False,
        object_store_memory=100 * 2**20, runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}},
    )  # fmt: skip
    yield
    ray.shutdown()


def content(folder):
    files = [*folder.glob("*.tar"), *folder.glob("*.parquet"), folder / "manifest.json"]
    return {p.name: p.read_bytes() for p in files}


@pytest.mark.distributed
@pytest.mark.slow
def test_ray_makes_the_same_bytes_and_only_what_is_missing(cluster, tmp_path):
    synthesis.work(job(tmp_path / "one"))
    build, seen = partial(job, tmp_path / "ray"), []
    outcome = synthesis.work_with_ray(build, tmp_path / "ray", spec(), 2, 0.0, seen.append)
    assert outcome.made == 120 and sum(seen) == 120 and len(CAPTIONS) == 30
    assert content(tmp_path / "ray") == content(tmp_path / "one")
    (tmp_path / "ray" / "00003.tar").write_bytes(b"")
    (tmp_path / "ray" / "00007_stats.json").unlink()
    assert synthesis.work_with_ray(build, tmp_path / "ray", spec(), 2, 0.0).made == 24
    assert content(tmp_path / "ray") == content(tmp_path / "one")


def no_job():
    raise InputError("the student is not here")


@pytest.mark.distributed
@pytest.mark.slow
def test_the_command_with_ray(cluster, run, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Paths are relative to where the command is given, and what an actor cannot have is a sentence."""
    monkeypatch.chdir(run)
    command.main(flags(run, tmp_path / "one"))
    argv = ["captions.txt", *flags(Path("."), os.path.relpath(tmp_path / "ray"))[1:], "--engine", "ray"]
    command.main([*argv, "--ray-workers", "2"])
    assert "made 9 images" in capsys.readouterr().out
    assert content(tmp_path / "ray") == content(tmp_path / "one")
    with pytest.raises(InputError, match="an actor of Ray stopped: the student is not here"):
        synthesis.work_with_ray(no_job, tmp_path / "none", spec(), 1, 0.0)
