"""Checkpoints: what is stored comes back bit for bit, and no failure at any moment leaves a bad one that counts."""

import json
import shutil

import pytest
import torch
from torch import nn

from dmd import checkpoint
from dmd.errors import InputError


class Net(nn.Module):
    """Weights of several types and shapes, and a step-dependent value to tell checkpoints apart."""

    def __init__(self, value=0.0, width=3):
        super().__init__()
        self.layer = nn.Linear(width, 2)
        nn.init.constant_(self.layer.bias, value)
        self.small = nn.Parameter(torch.tensor([1.5, -2.25]).bfloat16())
        self.register_buffer("count", torch.tensor(2**40 + 7))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("strided", torch.arange(6.0).reshape(2, 3).T)


def trained(seed=0, steps=3, optimizer=torch.optim.AdamW):
    """A network and an optimiser that has a state."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    adam = optimizer(net.parameters(), lr=0.01, weight_decay=0.1)
    for group in adam.param_groups:
        group["initial_lr"] = 0.01
    for step in range(steps):
        update(net, adam, step)
    return net, adam


def update(net, optimizer, step):
    optimizer.zero_grad()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
    net(x).square().mean().backward()
    optimizer.step()


def same(a, b):
    """Deep equality, tensors bit for bit and of one type; JSON has no tuples."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def store(root, step, keep=10):
    return checkpoint.save(root, step, {"net": Net(float(step))}, {}, {"step": step}, keep)


def bias(path):
    net = Net()
    checkpoint.load(path, {"net": net}, {})
    return float(net.layer.bias[0].detach())


def test_weights_of_every_type_come_back(tmp_path):
    net, other = Net(1.25), Net(0.0)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
        other.count.zero_()
    path = checkpoint.save(tmp_path, 12, {"net": net}, {}, {"seconds": 1.5, "best": {"value": 0.1}}, keep=2)
    assert checkpoint.load(path, {"net": other}, {}) == (12, {"seconds": 1.5, "best": {"value": 0.1}})
    assert same(dict(net.state_dict()), dict(other.state_dict()))
    assert checkpoint.digest(net) == checkpoint.digest(other)


def test_digest_tells_values_names_types_and_shapes_apart():
    class One(nn.Module):
        def __init__(self, name, value):
            super().__init__()
            self.register_buffer(name, value)

    variants = [
        One("a", torch.zeros(4)),
        One("a", torch.tensor([0.0, 0.0, 0.0, -0.0])),
        One("b", torch.zeros(4)),
        One("a", torch.zeros(2, 2)),
        One("a", torch.zeros(4, dtype=torch.int32)),
    ]
    assert len({checkpoint.digest(v) for v in variants}) == 5


@pytest.mark.parametrize(
    "optimizer", [torch.optim.AdamW, lambda p, **k: torch.optim.AdamW(p, fused=True, **k), torch.optim.SGD]
)
def test_optimizer_state_comes_back_and_training_goes_on_bit_for_bit(tmp_path, optimizer):
    net, adam = trained(optimizer=optimizer)
    path = checkpoint.save(tmp_path, 3, {"net": net}, {"net": adam}, {}, keep=1)
    other, adam_other = trained(seed=1, steps=1, optimizer=optimizer)
    checkpoint.load(path, {"net": other}, {"net": adam_other})
    assert same(adam.state_dict(), adam_other.state_dict())
    for step in range(3, 6):
        update(net, adam, step)
        update(other, adam_other, step)
    assert same(dict(net.state_dict()), dict(other.state_dict()))
    assert same(adam.state_dict(), adam_other.state_dict())


def test_channels_last_training_goes_on_bit_for_bit(tmp_path):
    """Fused AdamW walks weights and moments in storage order, which a file of contiguous tensors does not have."""

    def build():
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        return net, torch.optim.AdamW(net.parameters(), lr=0.01, fused=True)

    def step(net, adam, number):
        adam.zero_grad()
        net(torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(number))).square().mean().backward()
        adam.step()

    (net, adam), (other, adam_other) = build(), build()
    for number in range(3):
        step(net, adam, number)
    checkpoint.load(
        checkpoint.save(tmp_path, 3, {"net": net}, {"net": adam}, {}, 1), {"net": other}, {"net": adam_other}
    )
    for number in range(3, 6):
        step(net, adam, number)
        step(other, adam_other, number)
    assert torch.equal(net.weight, other.weight)


class EightBit(torch.optim.Optimizer):
    """States as bitsandbytes keeps and gives them: steps are numbers, moments bytes, most of it in a mapping of its
    own; they are loaded as they are, and walked in storage order."""

    NESTED = "__quant_state__"

    def __init__(self, parameters, lr, weight_decay):
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.95)})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("step", 0)
                state.setdefault("state1", torch.zeros_like(p, dtype=torch.uint8))
                state.setdefault("absmax1", torch.zeros(1))
                state["step"] += 1
                state["absmax1"] = p.grad.abs().max().reshape(1)
                state["state1"].add_((p.grad / state["absmax1"] * 20 + 20).to(torch.uint8))
                p -= group["lr"] * state["state1"] / (40.0 * state["step"])

    def state_dict(self):
        found = super().state_dict()
        wrapped = {}
        for number, entry in found["state"].items():
            quantised = {k: v for k, v in entry.items() if k != "step"}
            wrapped[number] = {"step": entry["step"], self.NESTED: quantised}
        return found | {"state": wrapped}

    def load_state_dict(self, state):
        super().load_state_dict(state | {"state": {}})
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, entry in state["state"].items():
            self.state[parameters[number]] = {"step": entry["step"], **entry[self.NESTED]}


def test_states_that_are_numbers_bytes_or_nested_come_back(tmp_path):
    """And training goes on bit for bit, also where a weight's layout is not that of files."""

    def convolution(seed, steps):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        optimizer = EightBit(net.parameters(), 0.01, 0.0)
        for step in range(steps):
            go_on(net, optimizer, step)
        return net, optimizer

    def go_on(net, optimizer, step):
        optimizer.zero_grad()
        net(torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()

    net, optimizer = convolution(0, 3)
    path = checkpoint.save(tmp_path, 3, {"net": net}, {"adam": optimizer}, {}, keep=1)
    other, loaded = convolution(1, 1)
    checkpoint.load(path, {"net": other}, {"adam": loaded})
    assert same(loaded.state_dict(), optimizer.state_dict())
    assert [entry["step"] for entry in loaded.state.values()] == [3, 3]
    assert loaded.state[other.weight]["state1"].stride() == other.weight.stride() != (27, 9, 3, 1)
    for each in ((net, optimizer), (other, loaded)):
        go_on(*each, 9)
    assert same(dict(net.state_dict()), dict(other.state_dict()))


def test_an_optimizer_that_has_not_stepped_comes_back(tmp_path):
    net, adam = trained(steps=0)
    path = checkpoint.save(tmp_path, 0, {"net": net}, {"net": adam}, {}, keep=1)
    _, fresh = trained(steps=0)
    checkpoint.load(path, {"net": net}, {"net": fresh})
    assert same(adam.state_dict(), fresh.state_dict())


def test_the_newest_are_kept(tmp_path):
    for step in (1, 5, 20, 100):
        store(tmp_path, step, keep=2)
    assert [p.name for p in checkpoint.steps(tmp_path)] == ["step-00000020", "step-00000100"]
    assert bias(checkpoint.latest(tmp_path)) == 100.0


def test_saving_a_step_again_replaces_it(tmp_path):
    store(tmp_path, 3)
    checkpoint.save(tmp_path, 3, {"net": Net(77.0)}, {}, {}, keep=1)
    assert bias(checkpoint.latest(tmp_path)) == 77.0
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_nothing_there_is_no_checkpoint(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["net.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lambda p: p.unlink(), lambda p: p.write_bytes(b"")])
def test_a_damaged_checkpoint_does_not_count(tmp_path, name, damage):
    store(tmp_path, 1)
    damage(store(tmp_path, 2) / name)
    assert checkpoint.latest(tmp_path).name == "step-00000001"


@pytest.mark.parametrize(
    "text", ["[]", "null", "{}", '{"files": {}}', '{"files": 3}', '{"files": "state.json"}', "\xff"]
)
def test_a_manifest_of_another_form_does_not_count(tmp_path, text):
    store(tmp_path, 1)
    (store(tmp_path, 2) / "manifest.json").write_text(text, encoding="latin-1")
    assert checkpoint.latest(tmp_path).name == "step-00000001"


def test_a_damaged_newer_one_is_not_counted_among_those_to_keep(tmp_path):
    """After falling back to step 1, saving step 2 must leave two that load, not one and a ruin."""
    store(tmp_path, 1)
    truncate(store(tmp_path, 9) / "net.safetensors")
    store(tmp_path, 2, keep=2)
    assert [p.name for p in checkpoint.steps(tmp_path) if checkpoint.verify(p)] == ["step-00000001", "step-00000002"]
    assert checkpoint.latest(tmp_path).name == "step-00000002"


@pytest.mark.parametrize("failing", ["save_file", "write_json", "describe", "_sync_file"])
def test_a_failure_in_the_middle_leaves_what_was_there(tmp_path, monkeypatch, failing):
    """Full disk at the tensors, at the JSON, at the checksums and at the flush; the second call of each."""
    store(tmp_path, 1, keep=1)
    before = {p.name: p.read_bytes() for p in (tmp_path / "step-00000001").iterdir()}
    original, calls = getattr(checkpoint, failing), []

    def full(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return original(*arguments, **options)

    monkeypatch.setattr(checkpoint, failing, full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, {"net": Net(2.0), "ema": Net(2.0)}, {}, {}, keep=1)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "step-00000001").iterdir()} == before
    assert checkpoint.latest(tmp_path) is not None


def test_what_a_killed_save_left_is_ignored_and_removed(tmp_path):
    shutil.copytree(store(tmp_path, 1), tmp_path / ".tmp-step-00000007")
    assert checkpoint.latest(tmp_path).name == "step-00000001"
    store(tmp_path, 7)
    assert bias(checkpoint.latest(tmp_path)) == 7.0
    assert not list(tmp_path.glob(".tmp*"))


def test_another_architecture_is_named_in_one_sentence(tmp_path):
    path = store(tmp_path, 1)
    with pytest.raises(InputError, match=r"another architecture: tensor 'layer.weight' is \(2, 3\) there.*\(2, 4\)"):
        checkpoint.load(path, {"net": Net(width=4)}, {})


def test_a_refused_checkpoint_leaves_the_network_alone(tmp_path):
    path, net = store(tmp_path, 1), Net(5.0, width=4)
    before = checkpoint.digest(net)
    with pytest.raises(InputError):
        checkpoint.load(path, {"net": net}, {})
    assert checkpoint.digest(net) == before


@pytest.mark.parametrize(
    ("extra", "sentence"), [("more", "tensor 'more' is absent there"), (None, "tensor 'count' is absent there")]
)
def test_missing_and_surplus_tensors_are_named(tmp_path, extra, sentence):
    net = Net()
    path = tmp_path / "weights.safetensors"
    tensors = dict(net.state_dict())
    if extra is None:
        del tensors["count"]
    else:
        net.register_buffer(extra, torch.zeros(1))
    checkpoint.save_tensors(tensors, path)
    with pytest.raises(InputError, match=sentence):
        checkpoint.load_weights(net, path)


def test_unreadable_weights_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match="does not exist"):
        checkpoint.load_weights(Net(), path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(InputError, match="is not a readable safetensors file"):
        checkpoint.load_weights(Net(), path)


def test_a_failed_replacement_keeps_the_old_file(tmp_path, monkeypatch):
    """Weights and JSON alike: the new content goes to a file of its own first."""
    weights, facts = tmp_path / "w.safetensors", tmp_path / "facts.json"
    checkpoint.save_weights(Net(1.0), weights)
    checkpoint.write_json(facts, {"a": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save_weights(Net(2.0), weights)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_json(facts, {"a": 2})
    net = Net()
    checkpoint.load_weights(net, weights)
    assert float(net.layer.bias[0].detach()) == 1.0
    assert json.loads(facts.read_text()) == {"a": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["facts.json", "w.safetensors"]


def test_files_are_replaced_not_overwritten(tmp_path):
    """Whoever has the old file open, or is killed in between, has it whole: a second name of it keeps its content."""
    for name, write in (
        ("w.safetensors", lambda path, value: checkpoint.save_weights(Net(value), path)),
        ("facts.json", lambda path, value: checkpoint.write_json(path, {"value": value})),
    ):
        write(tmp_path / name, 1.0)
        (tmp_path / f"old-{name}").hardlink_to(tmp_path / name)
        before = (tmp_path / name).read_bytes()
        write(tmp_path / name, 2.0)
        assert (tmp_path / name).read_bytes() != before == (tmp_path / f"old-{name}").read_bytes()
