"""The loop with a toy task: resume equals never stopping bit for bit, figures are written once, bad updates stop."""

import json
import math
import os
import signal

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from dmd import checkpoint, log
from dmd.errors import InputError
from dmd.run import Cadence, NotFinite, Run, clip_and_check


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


class Toy:
    """Fits a line with AdamW; notes steps and learning rates."""

    def __init__(self, fail_at=None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Linear(3, 1)
        self.adam = torch.optim.AdamW(self.net.parameters(), lr=0.05)
        self.adam.param_groups[0]["initial_lr"] = 0.05
        self.fail_at = fail_at
        self.seen = []

    def modules(self):
        return {"net": self.net}

    def optimizers(self):
        return {"net": self.adam}

    def step(self, step, batch):
        self.seen.append((step, self.adam.param_groups[0]["lr"]))
        if step == self.fail_at:
            raise NotFinite("the gradient norm is nan")
        self.adam.zero_grad()
        loss = (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
        loss.backward()
        self.adam.step()
        return {"loss/toy": loss.detach(), "number": torch.tensor(float(step))}


def batch_at(step):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(step))


def run(folder, accelerator, task, cadence, **options):
    options.setdefault("sinks", lambda step: [log.JsonLines(folder / "metrics.jsonl", step)])
    return Run(folder, task, batch_at, cadence, accelerator, **options)


def lines(folder):
    """metrics.jsonl without the clock."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def stopping(task, at):
    """The task, but the process is told to stop during a step."""

    class Stopping(type(task)):
        def step(self, step, batch):
            if step == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().step(step, batch)

    task.__class__ = Stopping
    return task


def test_rate_rises_and_falls_linearly():
    cadence = Cadence(10, warmup=4, cooldown=5)
    assert [cadence.rate(s) for s in range(10)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert [Cadence(3).rate(s) for s in range(3)] == [1.0, 1.0, 1.0]
    assert [Cadence(4, warmup=4, cooldown=4).rate(s) for s in range(4)] == [0.25, 0.5, 0.5, 0.25]


def test_every_step_is_taken_once_at_its_rate(tmp_path, accelerator):
    task, cadence = Toy(), Cadence(7, warmup=2, cooldown=3)
    assert run(tmp_path, accelerator, task, cadence).train().step == 7
    rates = [0.5, 1, 1, 1, 1, 2 / 3, 1 / 3]
    assert [s for s, _ in task.seen] == list(range(7))
    assert [lr for _, lr in task.seen] == pytest.approx([0.05 * r for r in rates])


@pytest.mark.parametrize("stop_at", [0, 4, 5, 8, 9])
def test_resume_equals_never_stopping_bit_for_bit(tmp_path, accelerator, stop_at):
    """Weights, optimiser and figures; stopped by a signal, so a checkpoint is written at once."""
    cadence = Cadence(10, log=3, checkpoint=5, warmup=3, cooldown=4)
    whole, first, second = Toy(), stopping(Toy(), stop_at), Toy()
    run(tmp_path / "whole", accelerator, whole, cadence).train()
    assert run(tmp_path / "parts", accelerator, first, cadence).train().step == stop_at + 1
    assert run(tmp_path / "parts", accelerator, second, cadence).train().step == 10
    assert checkpoint.digest(second.net) == checkpoint.digest(whole.net)
    a, b = (t.adam.state_dict()["state"] for t in (whole, second))
    assert all(torch.equal(a[p][k], b[p][k]) for p in a for k in a[p])
    assert [s for s, _ in first.seen + second.seen] == list(range(10))
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_a_killed_run_goes_on_from_its_last_checkpoint_and_repeats_no_line(tmp_path, accelerator):
    """Killed in step 8 with a checkpoint of step 5: lines 6 to 8 are dropped and written again, equal."""
    cadence = Cadence(10, log=1, checkpoint=5, evaluate=5)

    def figures(task):
        return lambda step: {"eval/weight": float(task.net.weight.detach()[0, 0])}

    whole, killed, again = Toy(), Toy(fail_at=8), Toy()
    run(tmp_path / "whole", accelerator, whole, cadence, evaluate=figures(whole)).train()
    with pytest.raises(NotFinite):
        run(tmp_path / "parts", accelerator, killed, cadence, evaluate=figures(killed)).train()
    with open(tmp_path / "parts" / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "loss/to')
    run(tmp_path / "parts", accelerator, again, cadence, evaluate=figures(again)).train()
    assert again.seen[0][0] == 5
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_a_finished_run_does_and_writes_nothing_more(tmp_path, accelerator):
    cadence = Cadence(4, log=2, evaluate=2)
    evaluated = []

    def evaluate(step):
        evaluated.append(step)
        return {"eval/fd": 1.0}

    for _ in range(2):
        task = Toy()
        run(tmp_path, accelerator, task, cadence, evaluate=evaluate).train()
    assert task.seen == [] and evaluated == [2, 4]
    assert [r["step"] for r in lines(tmp_path)] == [2, 2, 4, 4]


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, accelerator, capsys):
    cadence = Cadence(8, checkpoint=2, keep=3)
    run(tmp_path, accelerator, Toy(), cadence).train()
    (tmp_path / "checkpoints" / "step-00000008" / "net.safetensors").write_bytes(b"")
    task = Toy()
    run(tmp_path, accelerator, task, cadence).train()
    assert [s for s, _ in task.seen] == [6, 7]
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "step-00000008 in" in notes[0] and notes[0].endswith("going on from step-00000006")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path, accelerator):
    cadence = Cadence(8, checkpoint=4, keep=3)
    run(tmp_path, accelerator, Toy(), cadence).train()
    for weights in (tmp_path / "checkpoints").glob("*/net.safetensors"):
        weights.write_bytes(b"")
    before, task = (tmp_path / "metrics.jsonl").read_bytes(), Toy()
    with pytest.raises(InputError, match="no checkpoint that is whole: step-00000004, step-00000008 differ"):
        run(tmp_path, accelerator, task, cadence).train()
    assert task.seen == [] and (tmp_path / "metrics.jsonl").read_bytes() == before


class Sink:
    """Keeps what it is given."""

    def __init__(self):
        self.written = []

    def write(self, step, scalars):
        self.written.append((step, dict(scalars)))

    def close(self):
        self.written.append("closed")


def test_a_line_is_the_mean_of_its_steps(tmp_path, accelerator):
    """Steps 0-2, 3-5 and the rest; the toy's figure "number" is the step's."""
    sink = Sink()
    run(tmp_path, accelerator, Toy(), Cadence(7, log=3), sinks=lambda step: [sink]).train()
    assert [(s, f["number"]) for s, f in sink.written[:-1]] == [(3, 1.0), (6, 4.0), (7, 6.0)]
    assert sink.written[-1] == "closed"


def test_best_is_the_smallest_and_survives_a_resume(tmp_path, accelerator):
    values = {2: 3.0, 4: 1.0, 6: 2.0, 8: 0.5, 10: 0.7}
    kept = []
    options = {"evaluate": lambda s: {"eval/fd": values[s]}, "best": "eval/fd", "keep_best": kept.append}
    cadence = Cadence(10, checkpoint=3, evaluate=2)
    run(tmp_path, accelerator, stopping(Toy(), 5), cadence, **options).train()
    assert kept == [2, 4]
    progress = run(tmp_path, accelerator, Toy(), cadence, **options).train()
    assert kept == [2, 4, 8]
    assert progress.best == {"metric": "eval/fd", "value": 0.5, "step": 8}


def test_a_figure_that_is_not_a_number_is_never_the_best(tmp_path, accelerator):
    values = {1: math.nan, 2: 3.0, 3: math.nan, 4: 2.0}
    kept = []
    options = {"evaluate": lambda s: {"eval/fd": values[s]}, "best": "eval/fd", "keep_best": kept.append}
    progress = run(tmp_path, accelerator, Toy(), Cadence(4, evaluate=1), **options).train()
    assert kept == [2, 4] and progress.best["value"] == 2.0


def test_a_bad_update_names_its_step_and_leaves_the_last_checkpoint(tmp_path, accelerator):
    with pytest.raises(NotFinite, match="^step 7: the gradient norm is nan; the update was not made$"):
        run(tmp_path, accelerator, Toy(fail_at=7), Cadence(10, checkpoint=3)).train()
    assert [p.name for p in checkpoint.steps(tmp_path / "checkpoints")] == ["step-00000003", "step-00000006"]


def test_a_checkpoint_that_cannot_be_written_is_one_sentence(tmp_path, accelerator, monkeypatch):
    original = checkpoint.write

    def full(root, step, *arguments):
        if step == 6:
            raise OSError(28, "No space left on device")
        return original(root, step, *arguments)

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(InputError, match="the checkpoint of step 6 could not be written.*No space left"):
        run(tmp_path, accelerator, Toy(), Cadence(10, checkpoint=3)).train()
    monkeypatch.undo()
    task = Toy()
    run(tmp_path, accelerator, task, Cadence(10, checkpoint=3)).train()
    assert task.seen[0][0] == 3


def test_signal_handlers_are_put_back(tmp_path, accelerator):
    before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    run(tmp_path, accelerator, stopping(Toy(), 1), Cadence(3)).train()
    assert [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
def test_clipping_is_torchs(max_norm, rng):
    ours, theirs = ([nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(1))]
                    for _ in range(2))  # fmt: skip
    for a, b in zip(ours[:2], theirs[:2], strict=True):  # the third has no gradient
        a.grad = torch.randn(a.shape, generator=rng)
        b.grad = a.grad.clone()
    expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in theirs[:2]))
    norm = clip_and_check(ours, max_norm, {})
    nn.utils.clip_grad_norm_(theirs, max_norm)
    assert float(norm) == pytest.approx(expected, rel=1e-6)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours[:2], theirs[:2], strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_gradient_is_refused_with_the_losses(bad):
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.tensor([0.0, 1.0, bad, 0.0])
    with pytest.raises(NotFinite, match="loss/a.: 1.5"):
        clip_and_check([parameter], 1.0, {"loss/a": torch.tensor(1.5)})
