"""The feature network of the world of shapes: what it is taught, and that what ships is what its card says."""

import hashlib
import json

import pytest
import torch

from dmd import shipped
from dmd.data import shapes
from dmd.data.images import ImageSet, to_float
from dmd.errors import InputError
from dmd.metrics import shapes_net
from dmd.metrics.evaluate import Reference, evaluate
from dmd.metrics.networks import FeatureNet

FOLDER = shipped.FOLDER / "shapes-features"


def test_an_image_is_right_only_if_all_answers_are():
    """Against a loop; any size is always right."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(400, sum(shapes.ANSWERS), generator=g)
    right = torch.stack([torch.randint(0, n, (400,), generator=g) for n in shapes.ANSWERS], 1)
    for row in range(0, 400, 2):  # half of them right, so that both cases are seen
        first = 0
        for question, n in enumerate(shapes.ANSWERS):
            logits[row, first + right[row, question]] = 9.0
            first += n
    right[::4, 3] = -1
    wanted = []
    for row in range(400):
        first, fine = 0, True
        for question, n in enumerate(shapes.ANSWERS):
            found = int(logits[row, first : first + n].argmax())
            fine &= int(right[row, question]) in (found, -1)
            first += n
        wanted.append(fine)
    assert shapes_net.correct(logits, right).tolist() == wanted
    assert 190 < sum(wanted) < 210


def test_a_drawing_tells_no_size_that_its_caption_leaves_open():
    index = torch.arange(300)
    _, right = shapes_net.drawings(5, index)
    for scene, row in zip(shapes.scenes(5, index), right.tolist(), strict=True):
        opened = sum(thing.size is None for thing in scene.things)
        assert row.count(-1) == opened
        assert [a for a in row if a != -1] == [
            a for i, a in enumerate(shapes.answers(scene)) if not (i and i % 3 == 0 and a == len(shapes.SIZES) + 1)
        ]


def test_teaching_is_repeatable_and_leaves_torch_alone():
    state = torch.get_rng_state()
    first, second = shapes_net.teach(3, 0), shapes_net.teach(3, 0)
    assert torch.equal(torch.get_rng_state(), state)
    x, _ = shapes_net.drawings(0, torch.arange(8))
    assert torch.equal(first(x)[0], second(x)[0])
    assert not torch.equal(first(x)[0], shapes_net.teach(3, 1)(x)[0])


def test_a_folder_without_it_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"does not exist: make it with python -m dmd.metrics.shapes_net"):
        shapes_net.load(tmp_path)


@pytest.fixture(scope="module")
def net() -> FeatureNet:
    return shapes_net.load(FOLDER)


def test_the_network_that_ships_is_the_one_of_its_card(net):
    card = json.loads((FOLDER / "config.json").read_text())
    facts = card["model.safetensors"]
    data = (FOLDER / "model.safetensors").read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (facts["size"], facts["sha256"])
    claimed = card["unseen drawings about which all answers are right"]
    assert shapes_net.accuracy(net, 1, 500) == pytest.approx(claimed, abs=0.04)
    assert claimed > 0.95


def test_its_distance_sees_what_a_person_sees(net):
    """Other drawings of the same world are near; things of one colour only, or noise on them, are far."""

    def drawn(first: int, scenes: list) -> torch.Tensor:
        return shapes.batch(scenes, 0, first + torch.arange(len(scenes)))

    world = shapes.scenes(0, torch.arange(3000))
    data = ImageSet(drawn(0, world[:1500]), torch.zeros(1500, dtype=torch.int64), ("any",))
    reference = Reference.of(data, net)
    others = to_float(drawn(10_000, world[1500:]))
    same = evaluate(others, None, net, reference)["fd"]
    red = [s for s in shapes.scenes(0, torch.arange(12_000)) if all(t.colour == "red" for t in s.things)][:500]
    assert evaluate(to_float(drawn(0, red)), None, net, reference)["fd"] > 5 * same
    noise = 0.3 * torch.randn(others.shape, generator=torch.Generator().manual_seed(0))
    assert evaluate(others + noise, None, net, reference)["fd"] > 5 * same
