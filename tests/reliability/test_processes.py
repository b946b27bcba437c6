"""Several processes: the same samples, the same training, the same stop."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import small
import torch
from small import Job, assert_same
from two_processes import ENVIRONMENT, ROOT, TORCHRUN, run

from dmd import build, checkpoint
from dmd.batches import Share
from dmd.config import RunOptions
from dmd.errors import InputError


def start(arguments: list[str]) -> subprocess.Popen:
    command = [*TORCHRUN, *arguments]
    return subprocess.Popen(command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> tuple[str, str]:
    try:
        return process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        process.terminate()  # not killed, since it has to end its own processes
        process.wait(60)
        raise


# ---- one process against two ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_and_micro_batches_share_the_samples_of_one(tmp_path, world_size, accumulation):
    """Side by side, the parts hold the same noises, conditions, times and pairs as the whole, each once."""
    job = Job(str(tmp_path / "run"), critic_steps=2)
    _, batches = small.build(job, Share())
    for step in (0, 5):
        (whole,), ((critic,),) = batches(step).batches, batches(step).critic
        parts, critics = [], []
        for rank in range(world_size):
            iteration = dataclasses.replace(batches, share=Share(rank, world_size, accumulation))(step)
            parts += iteration.batches
            critics += iteration.critic[0]
        for name in ("z", "z_ref", "y_ref", "t", "noise", "critic_t", "critic_noise"):
            assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(whole, name)), name
        own = 12 // len(parts)
        label = torch.cat([p.cond["label"][:own] for p in parts] + [p.cond["label"][own:] for p in parts])
        assert torch.equal(label, whole.cond["label"])
        for name in ("z", "t", "noise"):
            assert torch.equal(torch.cat([getattr(c, name) for c in critics]), getattr(critic, name)), name


VARIANTS = [{}, {"accumulation": 3, "critic_steps": 2, "micro_batch": 1}, {"bf16": True}]


def results(root: Path, jobs: list[Job]) -> list[list[dict]]:
    """What two processes end each job with, by rank."""
    small.pair_store(root / "pairs")
    (root / "jobs.json").write_text(json.dumps([dataclasses.asdict(job) for job in jobs]))
    process = start([str(Path(small.__file__)), str(root / "jobs.json")])
    _, err = finish(process)
    assert process.returncode == 0, err
    return [
        [torch.load(root / f"jobs-{i}-{rank}.pt", weights_only=True) for rank in range(2)] for i in range(len(jobs))
    ]


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """For each variant, run by two processes: (job, undisturbed result, result after stops) of both ranks."""
    root = tmp_path_factory.mktemp("together")
    jobs: list[Job] = []
    for i, variant in enumerate(VARIANTS):
        jobs.append(Job(str(root / f"{i}-whole"), **variant))
        stopped = Job(str(root / f"{i}-stopped"), **variant)
        jobs += [dataclasses.replace(stopped, stop_at=step, stop_rank=step % 2) for step in range(6)]
        jobs.append(stopped)
    found, size = results(root, jobs), len(jobs) // len(VARIANTS)
    return [(jobs[i * size], found[i * size : (i + 1) * size]) for i in range(len(VARIANTS))]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("variant", range(len(VARIANTS)))
def test_two_processes_stopped_after_every_step_end_the_same(together, variant):
    """The signal comes to either process; both stop after the same step and hold the same weights."""
    _, (whole, *stops, last) = together[variant]
    for step, (first, second) in enumerate(stops):
        assert first["progress"]["step"] == second["progress"]["step"] == step + 1
    for rank in range(2):
        assert_same(last[rank], whole[rank])
    for name in ("modules", "moments", "groups"):
        assert_same(whole[1][name], whole[0][name])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("variant", [0, 1])
def test_two_processes_train_as_one_does(together, variant):
    """Sums of 6 + 6 rows and of 12 rows round differently, by some 1e-7 of a gradient, and nothing else differs.

    The losses of the first steps show this. Adam then divides each gradient by its own size, so where one is almost
    zero its sign, and with it up to a learning rate (1e-2, rising from a third of that) per step, is up to rounding:
    weights agree to a small part of the distance that they can move.
    """
    job, (two, *_) = together[variant]
    job = dataclasses.replace(job, directory=job.directory + "-alone", log=1)
    one = small.bare(job)
    first = next(r for r in two[0]["records"] if "loss/fake" in r)
    four = [r for r in one["records"] if "loss/fake" in r][:4]
    for name in ("loss/fake", "loss/matching", "loss/regression"):
        assert sum(r[name] for r in four) / 4 == pytest.approx(first[name], rel=2e-5)
    for name, weights in one["modules"]["student"].items():
        other = two[0]["modules"]["student"][name]
        assert (weights - other).abs().mean() < 1e-4, name


@pytest.mark.distributed
def test_one_and_two_processes_agree_at_every_step_also_after_a_stop(tmp_path):
    """R6, where Adam is near to plain descent, so that rounding stays what it is; and R1 within an accumulation."""
    whole = Job(str(tmp_path / "whole"), accumulation=3, critic_steps=2, log=1, eps=0.1)
    stopped = dataclasses.replace(whole, directory=str(tmp_path / "stopped"))
    hit = dataclasses.replace(stopped, stop_at=3, stop_rank=1, micro_batch=1)
    (two, _), (first, second), (last, _) = results(tmp_path, [whole, hit, stopped])
    assert first["progress"]["step"] == second["progress"]["step"] == 4
    assert_same(last, two)
    expected, found = ([r for r in x["records"] if "loss/fake" in r] for x in (small.bare(whole), two))
    assert len(found) == whole.steps
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    start, _ = small.build(whole, Share())
    distance = [(w - two["modules"]["student"][k]).norm() for k, w in start.modules()["student"].state_dict().items()]
    assert max(distance) > 0.01, "the student hardly moved, so that agreement shows nothing"


# ---- processes that were started, and processes that take part ------------------------------------------------------

JOIN = """
from dmd import build
from dmd.config import RunOptions
place = build.start(RunOptions())
print(f"rank {place.accelerator.process_index} of {place.accelerator.num_processes}, main {place.main}", flush=True)
"""


@pytest.mark.distributed
def test_processes_without_a_gpu_join_though_nobody_says_cpu(tmp_path):
    """accelerate by itself takes each for the only one."""
    (tmp_path / "join.py").write_text(JOIN)
    done = run([str(tmp_path / "join.py")])
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"rank \d of \d, main [TF]", done.stdout)) == [
        "rank 0 of 2, main T",
        "rank 1 of 2, main F",
    ]


def test_a_process_that_is_not_joined_is_refused(monkeypatch):
    """As where a cluster's script sets WORLD_SIZE and starts the program by itself."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="^WORLD_SIZE is 2, but LOCAL_RANK is not set.* start them with torchrun"):
        build.start(RunOptions(report_to="none"))


@pytest.mark.distributed
@pytest.mark.parametrize("failing", ["0", "1", "01"])
def test_one_process_says_why_whichever_fails(tmp_path, failing):
    (tmp_path / "fail.py").write_text(
        f"""
import os, time
from dmd.cli.flags import guarded
from dmd.errors import InputError
def work():
    if os.environ["RANK"] in "{failing}":
        raise InputError("the disk is gone")
    time.sleep(60)
guarded(work)
"""
    )
    done = run([str(tmp_path / "fail.py")])
    said = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert said == ["error (process 1): the disk is gone" if failing == "1" else "error: the disk is gone"]


# ---- the command under torchrun ------------------------------------------------------------------------------------


def command(world, out: Path, *more: str) -> list[str]:
    return [str(ROOT / "train_dmd.py"), *world.flags(out, "--max-train-steps", "60", *more)]


def workers(parent: int) -> list[int]:
    """Training processes of a torchrun, by rank."""
    found = {}
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks = [v for v in variables if v.startswith(b"RANK=")]
        if ranks:
            found[int(ranks[0][5:])] = int(pid)
    return [found[rank] for rank in sorted(found)]


def wait_for_step(out: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while max((r["step"] for r in small.lines(out)), default=0) < step:
        assert process.poll() is None and time.monotonic() < deadline, "it ended, or does not train"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def undisturbed(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "run"
    process = start(command(world, out))
    _, err = finish(process)
    assert process.returncode == 0, err
    return out


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("target", ["torchrun", "rank 0", "rank 1", "everyone"])
def test_a_terminated_torchrun_saves_and_the_same_command_goes_on(world, undisturbed, tmp_path, target):
    if not Path("/proc/self/task").is_dir():
        pytest.skip("the processes of a torchrun are found through /proc")
    out = tmp_path / "run"
    process = start(command(world, out))
    wait_for_step(out, 4, process)
    ranks = workers(process.pid)
    assert len(ranks) == 2
    targets = {"torchrun": [process.pid], "rank 0": ranks[:1], "rank 1": ranks[1:], "everyone": [process.pid, *ranks]}
    began = time.monotonic()
    for pid in targets[target]:
        os.kill(pid, signal.SIGTERM)
    stdout, err = finish(process)
    assert time.monotonic() - began < 30
    step = int(re.search(r"stopped after step (\d+); the same command goes on", stdout)[1])
    assert 4 <= step < 60
    assert checkpoint.latest(out / "checkpoints").name == f"step-{step:08d}"
    if target.startswith("rank"):
        assert process.returncode == 0 and "Traceback" not in err
    else:  # torchrun itself reports the signal that it got, with a traceback of its own and none of the processes'
        assert err.count("Traceback") == err.count("SignalException: Process") == 1
    process = start(command(world, out))
    _, err = finish(process)
    assert process.returncode == 0, err
    assert world.outcome(out) == world.outcome(undisturbed)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--batch-size", "5"], r"--batch-size 5 is not divisible by 2 processes x 1 accumulation steps"),
        (["--learning-rate", "0.5"], r"holds another run \(learning_rate was 0.002, now 0.5\)"),
        (["--data", "nowhere"], r"nowhere does not exist"),
    ],
    ids=["every rank refuses", "only the first rank refuses", "no data"],
)
def test_two_processes_refuse_in_one_sentence_and_none_hangs(world, undisturbed, tmp_path, more, sentence):
    out = undisturbed if "--learning-rate" in more else tmp_path / "run"
    process = start(command(world, out, *more))
    began = time.monotonic()
    _, err = finish(process)
    assert process.returncode == 1 and time.monotonic() - began < 100
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and re.search(sentence, said[0])
    assert re.findall(r"exitcode *: (-?\d+)", err)[-1] == "2"
    assert "dmd/" not in re.sub(r"train_dmd.py FAILED", "", "".join(re.findall(r'File "(.*?)"', err)))
    assert not (tmp_path / "run").exists()
