"""`dmd probe` from its command line to its files, and the sentences for input that cannot be probed."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression

from dmd.cli.probe import ProbeOptions, check, main, probe
from dmd.errors import InputError
from dmd.represent import backbones, features, linear, neighbours
from dmd.represent import probe as probes
from dmd.represent.probe import Protocol, Seen
from dmd.represent.scaling import scale_of


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    folder = tmp_path_factory.mktemp("net")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbones.save(backbones.build(backbones.describe("vit_mini", 16, 3, patch=4)), folder / "backbone")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of train.npz and test.npz: three classes of noisy colours, told apart by few errors."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    tint = np.array([[40, 0, 0], [0, 40, 0], [0, 0, 40]])
    for part, count in (("train", 120), ("test", 90)):
        labels = np.arange(count) % 3
        noise = rng.normal(110, 30, (count, 8, 8, 3)) + rng.normal(0, 14, (count, 1, 1, 3)) + tint[labels, None, None]
        np.savez(folder / f"{part}.npz", images=noise.clip(0, 255).astype(np.uint8), labels=labels)
    return folder


def run(tmp_path, *what, **options):
    given = {"out": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache"), "cpu": True, "bootstrap": 20}
    probe(ProbeOptions(tuple(map(str, what)), **(given | options)))
    return json.loads((tmp_path / "out" / "probe.json").read_text())


def test_from_networks_and_files_to_figures(tmp_path, net, data, capsys):
    found = run(tmp_path, net, train=str(data), tasks=50, ways=3, linear_epochs=20)
    (result,) = found["results"]
    names = ["kNN-20", "linear", "logistic", "3-way 1-shot", "3-way 5-shot", "RankMe", "alignment", "uniformity"]
    assert list(result["figures"]) == names
    assert found["counts"] == {"train": 120, "val": None, "test": 90} and found["classes"] == 3
    assert found["environment"]["commit"] and found["seed"] == 0
    # the same figure by hand
    frozen = features.load(str(net))
    arrays = {part: np.load(data / f"{part}.npz") for part in ("train", "test")}
    with torch.no_grad():
        x, queries = (frozen.extractor.net(frozen.prepared(list(arrays[part]["images"]))) for part in ("train", "test"))
    y, truth = (torch.from_numpy(arrays[part]["labels"]).long() for part in ("train", "test"))
    mine = (neighbours.predict(x, y, queries, 3, (20,))[0] == truth).double().mean().item()
    assert result["figures"]["kNN-20"]["value"] == pytest.approx(mine, abs=1e-9) and mine > 0.6
    assert result["figures"]["kNN-20"]["low"] < mine < result["figures"]["kNN-20"]["high"]
    scale = scale_of(x)
    reference = LogisticRegression(C=1 / result["details"]["logistic"]["l2"], max_iter=5000, tol=1e-6)
    reference.fit(scale(x).double().numpy(), y.numpy())
    theirs = reference.score(scale(queries).double().numpy(), truth.numpy())
    assert result["figures"]["logistic"]["value"] == pytest.approx(theirs, abs=0.012)
    chosen = result["details"]["linear"]
    at = chosen["rates"].index(chosen["rate"])
    assert chosen["validation"][at] == max(chosen["validation"])
    heads = linear.train(scale(x), y, 3, linear.RATES, 20, 256, 0)
    values = [(row == truth).double().mean().item() for row in heads.predict(scale(queries))]
    assert result["figures"]["linear"]["value"] == pytest.approx(values[at], abs=1e-9)
    assert chosen["best_on_test"]["value"] == pytest.approx(max(values), abs=1e-9)
    assert 1 <= result["figures"]["RankMe"]["value"] <= 90
    printed = capsys.readouterr().out
    assert "kNN-20" in printed and "kNN-200 is left out: there are 120 training images" in printed
    page = (tmp_path / "out" / "probe.html").read_text()
    assert page.count("data:image/png;base64,") == 2 and "<svg" in page
    for name in result["pictures"]:
        with Image.open(tmp_path / "out" / name) as image:
            image.load()


def test_networks_side_by_side_and_a_second_time_from_the_cache(tmp_path, net, data, monkeypatch):
    options = {"train": str(data / "train.npz"), "test": str(data / "test.npz"), "probes": ("knn",), "map": "none"}
    first = run(tmp_path, net, net / "backbone", pictures=0, **options)
    assert first["results"][0]["figures"] == first["results"][1]["figures"]
    from dmd.metrics import assess

    monkeypatch.setattr(assess, "look", lambda *a: pytest.fail("the cache was not used"))
    assert run(tmp_path, net, net, pictures=0, **options)["results"][0]["figures"] == first["results"][0]["figures"]


def test_mean_class_is_asked_for_or_the_sets_own(tmp_path, net, data):
    arrays = np.load(data / "test.npz")
    kept = (arrays["labels"] == 0) | (np.arange(90) < 30)  # uneven classes
    np.savez(tmp_path / "uneven.npz", images=arrays["images"][kept], labels=arrays["labels"][kept])
    options = {"train": str(data / "train.npz"), "test": str(tmp_path / "uneven.npz"), "probes": ("knn",)}
    plain, mean = (run(tmp_path, net, map="none", pictures=0, metric=m, **options) for m in ("accuracy", "mean-class"))
    a, b = (r["results"][0]["figures"]["kNN-20"]["value"] for r in (plain, mean))
    assert a != b and mean["protocol"]["mean_class"] and not plain["protocol"]["mean_class"]


def test_settings_are_chosen_on_the_validation_set_that_is_given(tmp_path, net, data):
    """With the labels of the validation images turned round, the choice is the worst one."""
    arrays = np.load(data / "test.npz")
    np.savez(tmp_path / "val.npz", images=arrays["images"][:-1], labels=(arrays["labels"][:-1] + 1) % 3)
    options = {"train": str(data), "probes": ("logistic",), "map": "none", "pictures": 0}
    good = run(tmp_path, net, **options)["results"][0]["details"]["logistic"]["l2"]
    bad = run(tmp_path, net, val=str(tmp_path / "val.npz"), **options)["results"][0]["details"]["logistic"]
    assert max(bad["validation"]) < 0.5 and bad["l2"] != good


def test_a_run_with_a_text_half_is_probed_zero_shot(tmp_path, net, data):
    from transformers import CLIPTokenizer

    from dmd.represent import text
    from tests.teachers.tiny import write_tokenizer

    words = write_tokenizer(tmp_path / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    config = text.TextConfig(128, 16, 1, 2, 12, words, words - 2, words - 1, 8)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        text.save(text.TextNet(config), tokenizer, tmp_path / "run" / "text")
    shutil.copytree(net / "backbone", tmp_path / "run" / "backbone")
    (tmp_path / "t.txt").write_text("{}\na big {} x\n")
    found = run(
        tmp_path, tmp_path / "run", train=str(data), probes=("zero-shot",), templates=str(tmp_path / "t.txt"),
        map="none", pictures=0,
    )  # fmt: skip
    tower = text.load_text(tmp_path / "run" / "text")
    frozen, arrays = features.load(str(net)), np.load(data / "test.npz")
    with torch.no_grad():
        images = tower.project(frozen.extractor.net(frozen.prepared(list(arrays["images"]))))
        classes = torch.stack([(tower([c])[0] + tower([f"a big {c} x"])[0]) for c in ("0", "1", "2")])
    right = (images @ F.normalize(classes, dim=1).T).argmax(1).numpy() == arrays["labels"]
    assert found["results"][0]["figures"]["zero-shot"]["value"] == pytest.approx(right.mean())
    assert list(found["results"][0]["figures"]) == ["zero-shot"]


# ----------------------------------------------------------------------------- bad input


def write(path, count=6, labels=(0, 1), names=None, size=8):
    pixels = np.random.default_rng(1).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    extra = {} if names is None else {"class_names": np.array(names)}
    given = {} if labels is None else {"labels": np.resize(np.array(labels), count)}
    np.savez(path, images=pixels, **given, **extra)
    return str(path)


@pytest.mark.parametrize(
    ("make", "options", "sentence"),
    [
        (lambda p: write(p / "a.npz", labels=None), {}, "lacks 'labels'"),
        (lambda p: write(p / "a.npz", count=0), {}, "uint8 .N > 0"),
        (lambda p: write(p / "a.npz", labels=(1,)), {}, "all 6 images of .* are of one class, '1'"),
        (lambda p: "digits", {"image_size": 18}, "18 x 18 pixels cannot be cut into patches of 4 x 4"),
        (
            lambda p: write(p / "a.npz", names=["cat", "dog"]),
            {"test": lambda p: write(p / "b.npz", 8, names=["cat", "cow"])},
            r"labels of the two sets disagree: .*b.npz \(test\) has the class 'cow', and .* of cat, dog only",
        ),
        (
            lambda p: write(p / "a.npz"),
            {"test": lambda p: write(p / "b.npz", 8, (0, 1, 2))},
            r"labels of the two sets disagree: .* has the class '2'",
        ),
        (lambda p: write(p / "a.npz"), {}, "--test has the same images as --train"),
        (lambda p: str(p / "nothing"), {}, "there is no labelled set"),
        (
            lambda p: write(p / "a.npz"),
            {"test": lambda p: write(p / "b.npz", 8), "probes": ("zero-shot",)},
            "has no text half",
        ),
    ],
)
def test_what_cannot_be_probed_is_refused_in_a_sentence(tmp_path, net, make, options, sentence):
    given = {name: value(tmp_path) if callable(value) else value for name, value in options.items()}
    with pytest.raises(InputError, match=sentence):
        run(tmp_path, net, train=make(tmp_path), **given)
    assert not (tmp_path / "out").exists()


def test_broken_weights_are_named(tmp_path, data):
    net = backbones.build(backbones.describe("vit_mini", 16, 3, patch=4))
    with torch.no_grad():
        net.net.norm.bias[0] = float("inf")
    backbones.save(net, tmp_path / "bad" / "backbone")
    with pytest.raises(InputError, match=r"the features of .*train.npz, image 0 by .* are not finite"):
        run(tmp_path, tmp_path / "bad", train=str(data))


@pytest.mark.parametrize("part", ["train", "val", "test"])
def test_features_that_are_not_finite_are_refused_wherever_they_come_from(part):
    seen = {name: Seen(torch.randn(6, 4), torch.arange(6) % 2) for name in ("train", "val", "test")}
    seen[part].x[2, 1] = float("nan")
    with pytest.raises(InputError, match=r"features of 1 of 6 .* images are not finite \(the first is image 2\)"):
        probes.parts(seen["train"], seen["val"], seen["test"], 2, Protocol())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"what": ()}, "what should be probed"),
        ({"train": None}, "--train is missing"),
        ({"neighbours": (20, 0)}, "--neighbours is 0: it must be at least 1"),
        ({"ways": 1}, "--ways is 1: it must be at least 2"),
        ({"temperature": 0.0}, "--temperature is 0.0"),
        ({"linear_rates": (0.1, -1.0)}, "--linear-rates has -1.0"),
        ({"bootstrap": 1}, "--bootstrap is 1"),
        ({"pictures": -1}, "--pictures is -1"),
        ({"seed": -1}, "--seed is -1"),
        ({"what": ("a", "b"), "weights": "w"}, "--weights are of one network"),
    ],
)
def test_options_out_of_range(options, sentence):
    with pytest.raises(InputError, match=sentence):
        check(ProbeOptions(**({"what": ("x",), "train": "digits"} | options)))


def test_templates_need_a_place_for_the_class(tmp_path, net, data):
    (tmp_path / "t.txt").write_text("a photo of a {}\nno place\n")
    with pytest.raises(InputError, match="the template 'no place' must have {} once"):
        run(tmp_path, net, train=str(data), templates=str(tmp_path / "t.txt"))


def test_the_command_line_ends_in_a_sentence_and_2(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path), "--train", "nothing", "--cpu", "--out", str(tmp_path / "o")])
    assert stopped.value.code == 2 and "error: there is no labelled set 'nothing'" in capsys.readouterr().err
