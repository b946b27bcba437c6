"""Weights & Biases, by a module in its place that notes what it is asked."""

import re
import sys
from types import ModuleType

import pytest

from dmd import build, log
from dmd.config import RunOptions
from dmd.errors import InputError


@pytest.fixture
def wandb(monkeypatch):
    """The module, with the arguments of all `init` and `log` calls, and "finish", in `calls`."""

    class Run:
        def log(self, scalars, step):
            module.calls.append((step, scalars))

        def finish(self):
            module.calls.append("finish")

    def init(**arguments):
        module.calls.append(arguments)
        return Run()

    module = ModuleType("wandb")
    module.calls, module.init = [], init
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return module


def test_wandb_is_missed_before_anything_is_made(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"^--report-to wandb needs the package wandb: pip install wandb$"):
        build.start(RunOptions(report_to="wandb", cpu=True))


def test_wandb_is_offline_and_gets_every_line(wandb, tmp_path):
    sink = log.Wandb(tmp_path / "run", {"seed": 0})
    sink.write(20, {"loss/fake": 0.5})
    sink.close()
    init, *rest = wandb.calls
    assert (init["mode"], init["name"], init["config"]) == ("offline", "run", {"seed": 0})
    assert init["dir"] == str(tmp_path / "run")
    assert rest == [(20, {"loss/fake": 0.5}), "finish"]


def test_a_resumed_run_keeps_its_id_and_others_of_its_name_have_their_own(wandb, tmp_path):
    for folder in (tmp_path / "a" / "run", tmp_path / "a" / "run", tmp_path / "b" / "run"):
        log.Wandb(folder, {})
    first, again, other = (call["id"] for call in wandb.calls)
    assert first == again != other
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert {call["resume"] for call in wandb.calls} == {"allow"}
