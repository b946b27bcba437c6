"""Kills, full disks, signals, numbers that are not finite: what is saved stays whole, and the same command goes on."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import small
import torch
from safetensors.torch import load_file, save_file
from small import Job, assert_same, bare, run

from dmd import build, checkpoint, pairs
from dmd.cli import train
from dmd.errors import InputError
from dmd.run import NotFinite

# ---- SIGKILL -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def processes():
    """Starts processes that need not import everything again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["accelerate", "dmd.teachers.pixel", "dmd.distill", "dmd.run"])
    return context


def kill_repeatedly(processes, directory: Path, kills: int, seed: int, steps: int) -> int:
    """Train with a checkpoint after each step; kill at random moments, mostly while saving. Returns kills that hit."""
    job = Job(str(directory / "run"), steps=steps, checkpoint=1, keep=2, log=10, evaluate=0)
    checkpoints, rng, newest, hits = Path(job.directory) / "checkpoints", random.Random(seed), 0, 0
    small.pair_store(directory / "pairs")
    expected = bare(job)
    for _ in range(kills):
        process = processes.Process(target=small.train_forever, args=(job,))
        process.start()
        before = len(list(checkpoints.glob("*")))
        deadline = time.monotonic() + 30
        while process.is_alive() and len(list(checkpoints.glob("*"))) == before and time.monotonic() < deadline:
            time.sleep(0.001)  # until it saves for the first time
        time.sleep(rng.uniform(0.0, 0.04))
        process.kill()
        process.join()
        hits += process.exitcode == -signal.SIGKILL
        path = checkpoint.latest(checkpoints)
        if path is None:
            assert newest == 0
            continue
        assert path == checkpoint.steps(checkpoints)[-1], "a folder with the name of a checkpoint is half written"
        distiller, _ = small.build(job, small.Share())
        step, _ = checkpoint.load(path, distiller.modules(), distiller.optimizers())
        assert step >= newest
        newest = step
    assert newest < job.steps, "the run was over before the last kill"
    assert_same(run(job), expected)
    assert not list(checkpoints.glob(".tmp-*"))
    return hits


def test_three_kills_cost_nothing_that_was_saved(processes, tmp_path):
    assert kill_repeatedly(processes, tmp_path, kills=3, seed=0, steps=20) == 3


@pytest.mark.slow
def test_twentyfive_kills_cost_nothing_that_was_saved(processes, tmp_path):
    assert kill_repeatedly(processes, tmp_path, kills=25, seed=1, steps=100) == 25


# ---- full disk -----------------------------------------------------------------------------------------------------


def fill(job: Job, limit: int, answer: Path) -> None:
    """Target of a process whose files cannot grow beyond `limit` bytes."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run(job)
    except InputError as error:
        answer.write_text(str(error))


@pytest.mark.parametrize("part", [0.3, 0.9])
def test_a_checkpoint_that_does_not_fit_leaves_the_old_one(processes, tmp_path, part):
    job = Job(str(tmp_path / "run"), keep=1, checkpoint=2)
    run(dataclasses.replace(job, stop_at=1))
    (old,) = checkpoint.steps(tmp_path / "run" / "checkpoints")
    limit = int(part * max(p.stat().st_size for p in old.iterdir()))
    process = processes.Process(target=fill, args=(job, limit, tmp_path / "answer"))
    process.start()
    process.join()
    sentence = (tmp_path / "answer").read_text()
    assert re.search(r"checkpoint of step 4 could not be written to .*checkpoints .*File too large", sentence)
    assert checkpoint.latest(tmp_path / "run" / "checkpoints") == old
    assert [p.name for p in old.parent.iterdir()] == [old.name]
    assert_same(run(job), bare(job))


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("part", [0.0, 0.05, 0.5, 0.9])
def test_a_full_disk_is_named_and_the_command_goes_on_when_there_is_space(world, refused, disk, part):
    """There is space for part of a checkpoint, so configuration, figures or weights do not fit."""
    out = disk / "run"
    flags = world.flags(out, "--checkpoints-total-limit", "1", "--eval-every", "0")
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, "distill_batches", 1, signal.SIGTERM)
        train.main(flags)
    (old,) = checkpoint.steps(out / "checkpoints")
    assert old.name == "step-00000002"
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    space = int(part * sum(p.stat().st_size for p in old.iterdir()))
    os.truncate(ballast, ballast.stat().st_size - space)
    sentence = refused(train.main, flags)
    assert re.search(r"disk.*No space left on device", sentence)
    assert checkpoint.latest(out / "checkpoints") == old and len(list(old.parent.iterdir())) == 1
    ballast.unlink()
    train.main(flags)
    assert (out / "student" / "model.safetensors").exists()
    for name in ("student", "fake", "ema", "optimizer-student", "optimizer-fake"):
        found, expected = (p / f"checkpoints/step-00000006/{name}.safetensors" for p in (out, world.reference))
        assert found.read_bytes() == expected.read_bytes()


# ---- signals -------------------------------------------------------------------------------------------------------


def signal_at(patch, batches: str, step: int, number: signal.Signals, times: int = 1) -> None:
    """Let `dmd.build.<batches>` make batches that send this process a signal when they reach a step."""
    original = getattr(build, batches)

    def make(*args, **kwargs):
        inner = original(*args, **kwargs)

        def batch_at(at: int):
            if at == step:
                for _ in range(times):
                    os.kill(os.getpid(), number)
            return inner(at)

        return batch_at

    patch.setattr(build, batches, make)


@pytest.mark.parametrize(
    ("number", "times"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)], ids=["int", "term", "twice"]
)
def test_a_signal_saves_and_the_same_command_goes_on(world, tmp_path, capsys, number, times):
    flags = world.flags(tmp_path / "run")
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, "distill_batches", 2, number, times)
        train.main(flags)
    assert "stopped after step 3; the same command goes on" in capsys.readouterr().out
    assert [p.name for p in checkpoint.steps(tmp_path / "run" / "checkpoints")] == ["step-00000002", "step-00000003"]
    assert not (tmp_path / "run" / "summary.json").exists()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    train.main(flags)
    assert world.outcome(tmp_path / "run") == world.outcome(world.reference)


def test_a_second_interrupt_leaves_at_once(world, tmp_path, capsys):
    flags = world.flags(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        signal_at(patch, "distill_batches", 3, signal.SIGINT, times=2)
        train.main(flags)
    assert caught.value.code == 130 and "Traceback" not in capsys.readouterr().err
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "step-00000002"
    train.main(flags)
    assert world.outcome(tmp_path / "run") == world.outcome(world.reference)


@pytest.fixture
def own_cache(world, tmp_path):
    """A cache with the classifier only: teacher and pairs have to be made."""
    shutil.copytree(world.root / "cache" / "classifiers", tmp_path / "cache" / "classifiers")
    return tmp_path / "cache"


def test_teaching_that_is_stopped_goes_on(world, tmp_path, own_cache, capsys):
    flags = world.flags(tmp_path / "run", "--cache-dir", str(own_cache))
    for step in (2, 5):
        with pytest.MonkeyPatch.context() as patch:
            signal_at(patch, "TeachBatches", step, signal.SIGTERM)
            train.main(flags)
        assert "stopped while teaching; the same command goes on" in capsys.readouterr().out
        (teacher,) = (own_cache / "teachers").iterdir()
        assert checkpoint.latest(teacher / "checkpoints").name == f"step-{step + 1:08d}"
        assert not (teacher / "model.safetensors").exists()
    train.main(flags)
    assert (teacher / "model.safetensors").read_bytes() == (world.teacher / "model.safetensors").read_bytes()
    assert small.lines(teacher) == small.lines(world.teacher)
    assert world.outcome(tmp_path / "run") == world.outcome(world.reference)


def pair_files(cache: Path, name: str = "*") -> dict[str, bytes]:
    """Of the pairs with this name; a cache that others use may hold several."""
    return {p.name: p.read_bytes() for p in (cache / "pairs").glob(f"{name}/*")}


def test_pair_making_that_is_interrupted_goes_on_with_the_next_shard(world, tmp_path, own_cache):
    shutil.copytree(world.root / "cache" / "teachers", own_cache / "teachers")
    flags = world.flags(tmp_path / "run", "--cache-dir", str(own_cache))
    make = pairs.make

    def interrupted(*args):
        for count in make(*args):
            yield count
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(pairs, "make", interrupted)
        train.main(flags)
    assert caught.value.code == 130
    assert {"00000.safetensors", "00000.json"} <= pair_files(own_cache).keys()
    assert "00001.safetensors" not in pair_files(own_cache)
    (first,) = own_cache.glob("pairs/*/00000.safetensors")
    written = first.stat().st_mtime_ns
    train.main(flags)
    assert first.stat().st_mtime_ns == written
    assert pair_files(own_cache) == pair_files(world.root / "cache", first.parent.name)
    assert world.outcome(tmp_path / "run") == world.outcome(world.reference)


@pytest.mark.parametrize("harm", ["altered", "cut", "removed"])
def test_a_harmed_pair_shard_is_found_and_made_again(world, tmp_path, own_cache, harm):
    for part in ("teachers", "pairs"):
        shutil.copytree(world.root / "cache" / part, own_cache / part)
    (first,) = own_cache.glob("pairs/*/00000.safetensors")
    (other,) = own_cache.glob("pairs/*/00001.safetensors")
    good, written = first.read_bytes(), other.stat().st_mtime_ns
    if harm == "altered":
        first.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    elif harm == "cut":
        first.write_bytes(good[:-1])
    else:
        first.unlink()
    flags = world.flags(tmp_path / "run", "--cache-dir", str(own_cache))
    train.main(flags)
    assert first.read_bytes() == good and other.stat().st_mtime_ns == written
    assert world.outcome(tmp_path / "run") == world.outcome(world.reference)


# ---- NaN -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["z", "z_ref", "y_ref", "noise", "critic_noise"])
def test_a_bad_number_in_any_loss_changes_no_weight(tmp_path, field, value):
    """Each field feeds another loss: matching (z, noise), regression (z_ref, y_ref), the fake score (critic_noise)."""
    job = Job(str(tmp_path / "run"))
    distiller, batches = small.build(job, small.Share())
    distiller.step(0, batches(0))
    iteration = batches(1)
    before = small.snapshot(distiller, small.Progress(), [])
    getattr(iteration.batches[0], field)[0, 0, 0, 0] = value
    with pytest.raises(NotFinite, match="gradient norm is (nan|inf)"):
        distiller.step(1, iteration)
    assert_same(small.snapshot(distiller, small.Progress(), []), before)


@pytest.mark.parametrize("where", ["generator", "critic"])
def test_a_bad_number_names_the_step_and_leaves_the_checkpoint(tmp_path, where):
    job = Job(str(tmp_path / "run"), checkpoint=2, critic_steps=2)

    def poison(step, iteration):
        target = iteration.batches[0] if where == "generator" else iteration.critic[0][0]
        if step == 3:
            target.noise[:] = float("nan")
        return iteration

    with pytest.raises(NotFinite, match=r"^step 3: .*; the update was not made"):
        run(job, batch=poison)
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "step-00000002"
    assert_same(run(job), bare(job))


def test_the_command_says_which_step_was_bad_and_exits_with_1(world, refused, tmp_path):
    flags = world.flags(tmp_path / "run")
    original = build.distill_batches

    def poisoned(*args):
        batches = original(*args)

        def batch_at(step):
            iteration = batches(step)
            if step == 3:
                iteration.batches[0].z[:] = float("nan")
            return iteration

        return batch_at

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "distill_batches", poisoned)
        sentence = refused(train.main, flags, code=1)
        assert re.search(r"^step 3: .*nan.*the update was not made", sentence)
        assert [p.name for p in checkpoint.steps(tmp_path / "run" / "checkpoints")] == ["step-00000002"]
        watched = (tmp_path / "run" / "checkpoints", tmp_path / "run" / "metrics.jsonl")
        assert refused(train.main, flags, *watched, code=1) == sentence
    train.main(flags)
    assert world.outcome(tmp_path / "run") == world.outcome(world.reference)


@pytest.fixture
def nan_teacher(world, tmp_path):
    teacher = shutil.copytree(world.teacher, tmp_path / "nan-teacher")
    weights = load_file(teacher / "model.safetensors")
    weights["conv_out.bias"][0] = float("nan")
    save_file(weights, teacher / "model.safetensors")
    return teacher


def test_a_teacher_with_nan_weights_stops_pair_making(world, refused, tmp_path, nan_teacher):
    flags = world.flags(tmp_path / "run", "--teacher", str(nan_teacher), "--cache-dir", str(tmp_path / "cache"))
    assert "images of pair shard 0 are not finite" in refused(train.main, flags, code=1)
    assert not list(tmp_path.glob("cache/pairs/*/*.safetensors"))


def test_a_run_that_diverges_names_the_step(world, refused, tmp_path):
    flags = world.flags(tmp_path / "run", "--learning-rate", "1e37", "--objective", "matching")
    assert refused(train.main, flags, code=1).startswith("step 1: ")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_killed_command_leaves_a_run_that_can_be_resumed(world, tmp_path):
    """What a kill between two writes can leave: a folder with nothing but a hidden file, a cut last line of figures."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".tmp-123-config.json").write_text('{"preset')
    with pytest.MonkeyPatch.context() as patch:
        signal_at(patch, "distill_batches", 3, signal.SIGTERM)
        train.main(world.flags(run))
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 5, "loss/fake": 1.0}) + '\n{"step": 6, "los')
    train.main(world.flags(run))
    assert world.outcome(run) == world.outcome(world.reference)
