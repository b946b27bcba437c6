"""The examples of docs/launch: what they start, and that a SLURM job that is told to stop queues itself again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "docs" / "launch"

SRUN = """#!/bin/bash
echo "$@" >> "$LOG/started"
trap 'echo saved >> "$LOG/started"; exit 1' TERM  # as torchrun, which fails when it is told to stop
for _ in $(seq 100); do sleep 0.1; [ -e "$LOG/finish" ] && exit "$(cat "$LOG/finish")"; done
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && printf 'node7\\nnode8\\n' || echo "$@" >> "$LOG/asked"
"""


@pytest.fixture
def job(tmp_path):
    """The script with stand-ins of SLURM's programs, started."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_ID": "99"}
    environment = os.environ | slurm | {"LOG": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        ["bash", LAUNCH / "slurm.sh", "sd15", "--output-dir", "a b"], env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    yield process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def test_a_job_that_is_told_to_stop_waits_for_the_save_and_queues_itself_again(job, tmp_path):
    started = (tmp_path / "started").read_text().splitlines()
    assert started == [
        "torchrun --nnodes 2 --nproc-per-node 4 --rdzv-id 99 --rdzv-backend c10d --rdzv-endpoint node7:29500 "
        "train_dmd.py sd15 --output-dir a b"
    ]
    job.send_signal(signal.SIGTERM)
    assert job.wait(20) == 0
    assert (tmp_path / "started").read_text().splitlines()[1:] == ["saved"]
    assert (tmp_path / "asked").read_text() == "requeue 99\n"


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_that_ends_by_itself_ends_with_its_code(job, tmp_path, code):
    (tmp_path / "finish").write_text(str(code))
    assert job.wait(20) == code
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize(("name", "sharded"), [("fsdp.yaml", "true"), ("ddp.yaml", "false")])
def test_accelerate_s_configs_ask_for_what_they_say(name, sharded, monkeypatch):
    """The environment that `accelerate launch` makes of them, which `build.is_sharded` reads."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_multi_gpu_env

    monkeypatch.setattr(os, "environ", dict(os.environ))
    arguments = launch.launch_command_parser().parse_args(["--config_file", str(LAUNCH / name), "train_dmd.py"])
    arguments, _, _ = launch._validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    assert environment.get("ACCELERATE_USE_FSDP", "false").lower() == sharded
    assert arguments.num_processes == 8


WAITS = """
import torch
from dmd import build
from dmd.config import RunOptions

build.start(RunOptions(cpu=True))
print(torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds())
"""


def test_processes_wait_for_one_that_works_alone(tmp_path):
    """The comparison of 1,024 images of 512 pixels by 50 steps takes longer than NCCL's 10 minutes."""
    (tmp_path / "waits.py").write_text(WAITS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(LAUNCH.parents[1]),
    }
    done = subprocess.run(
        [*command, str(tmp_path / "waits.py")], env=environment, text=True, capture_output=True, timeout=120
    )
    assert float(done.stdout) >= 12 * 3600, done.stderr
