"""FSDP: two processes that each hold half of what is trained do what one does, and leave the same files."""

import json

import pytest
import torch
import two_processes
from safetensors.torch import load_file
from tiny import save_pipeline

from dmd.cli import train

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

LOSSES = ("loss/matching", "loss/regression", "loss/fake", "grad/student", "grad/fake", "health/normaliser")

HOW: dict[str, tuple[list[str], dict[str, str]]] = {
    "flag": (["--fsdp"], {}),
    "accelerate": ([], {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
}
"""Ways to ask for it: flags, and the environment that `accelerate launch` makes of an FSDP config."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A pipeline of random weights, prompts, and runs of 4 and of 6 steps by one process; the first makes all pairs."""
    root = tmp_path_factory.mktemp("sharded")
    save_pipeline(root)
    (root / "prompts.txt").write_text("a red circle\na blue square\n")
    train.main(flags(root, "one"))
    train.main(flags(root, "six", "--max-train-steps", "6"))
    return root


def flags(root, name, *more):
    sizes = "--pairs 6 --pair-shard-size 4 --teacher-steps 2 --max-train-steps 4 --batch-size 4 --pair-batch-size 2"
    sizes += " --eval-every 2 --eval-samples 16 --final-samples 16 --checkpointing-steps 2 --log-every 1"
    sizes += " --lr-cooldown-steps 0 --lr-warmup-steps 1 --learning-rate 1e-4 --report-to none --cpu --data None"
    sizes += " --gradient-checkpointing --max-grad-norm 0.5"
    where = {"teacher": "tiny", "prompts": "prompts.txt", "cache-dir": "cache", "output-dir": name}
    given = [word for flag, path in where.items() for word in (f"--{flag}", str(root / path))]
    return ["shapes", *sizes.split(), *given, *more]


def figures(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "loss/fake" in line]


def together(root, name, *more, **environment):
    return two_processes.run([str(two_processes.ROOT / "train_dmd.py"), *flags(root, name, *more)], 300, **environment)


def assert_same_training(a, b):
    for one, two in zip(figures(a), figures(b), strict=True):
        for name in LOSSES:
            assert two[name] == pytest.approx(one[name], rel=1e-5), (one["step"], name)


def assert_same_files(a, b, part):
    found = sorted(p.relative_to(b) for p in b.glob(part))
    assert found == sorted(p.relative_to(a) for p in a.glob(part)) != []
    for path in found:
        mine, theirs = load_file(a / path), load_file(b / path)
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert (theirs[name].float() - value.float()).abs().mean() < 1e-6, (path, name)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("how", HOW)
def test_two_sharded_processes_train_as_one(root, how):
    """Asked for by the flag, or by the environment that `accelerate launch` makes of an FSDP config. What they leave,
    one process loads, and goes on as if it had been alone."""
    more, environment = HOW[how]
    done = together(root, how, *more, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = root / "one", root / how
    assert_same_training(one, two)
    assert_same_files(one, two, "checkpoints/*/*.safetensors")
    assert_same_files(one, two, "student/unet/*.safetensors")
    moments = load_file(two / "checkpoints" / "step-00000004" / "optimizer-student.safetensors")
    assert any(v.abs().sum() > 0 for v in moments.values())

    train.main(flags(root, how, "--max-train-steps", "6"))
    assert_same_training(root / "six", two)
    assert_same_files(root / "six", two, "checkpoints/*/*.safetensors")


@pytest.mark.slow
@pytest.mark.distributed
def test_sharded_processes_resume_what_one_left(root):
    train.main(flags(root, "mixed", "--max-train-steps", "2"))
    done = together(root, "mixed", "--fsdp")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_training(root / "one", root / "mixed")
    assert_same_files(root / "one", root / "mixed", "checkpoints/*/*.safetensors")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("how", HOW)
def test_what_cannot_be_sharded_is_refused_in_a_sentence(root, how):
    more, environment = HOW[how]
    done = together(root, "refused", "--fake-lora-rank", "2", *more, **environment)
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "FSDP spreads networks that are trained whole" in said[0]
    assert not (root / "refused").exists()


def test_a_single_process_shards_nothing(root):
    """--fsdp is no more than a wish there, so the same command line serves a laptop."""
    train.main(flags(root, "alone", "--fsdp"))
    assert [f["loss/fake"] for f in figures(root / "alone")] == [f["loss/fake"] for f in figures(root / "one")]
    a, b = (load_file(next((root / n).glob("student/unet/*.safetensors"))) for n in ("one", "alone"))
    assert all(torch.equal(a[k], b[k]) for k in a)
