"""`dmd clipgen` from end to end, at a size for seconds: no caption is read, all resumes, and bad input is refused."""

import json
import os
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import little
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from benchmarks import text_to_image
from dmd import synthesis
from dmd.build import Workplace
from dmd.cli import clipgen as cli
from dmd.cli import flags, parts
from dmd.clipgen import chain as chains
from dmd.clipgen import clip as clips
from dmd.clipgen import model, world
from dmd.clipgen import tokenizer as tokenizers
from dmd.clipgen.chain import Chain, make_gap
from dmd.clipgen.clip import SmallClip, SmallClipConfig, SmallClipNet
from dmd.clipgen.config import Config, TransformerOptions, check, preset, read
from dmd.clipgen.networks import ConvSizes
from dmd.clipgen.sampling import Sampler
from dmd.data import captioned, prompts, shapes
from dmd.errors import InputError
from dmd.plots import show
from dmd.settings import to_json
from dmd.teachers import miniature
from tests import tiny_clips
from tests.stub import job

TINY = [
    "--size", "16", "--patch", "4", "--widths", "8", "16", "--codes", "16", "--code-width", "4",
    "--tokenizer-steps", "4", "--tokenizer-batch-size", "8", "--layers", "1", "--width", "16", "--heads", "2",
    "--max-train-steps", "4", "--batch-size", "8", "--lr-warmup-steps", "0", "--lr-cooldown-steps", "0",
    "--log-every", "2", "--report-to", "none", "--cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    """The folder of an untaught small CLIP for 16 x 16 pixels."""
    folder = tmp_path_factory.mktemp("small-clip")
    count = miniature.write_tokenizer(shapes.words(), 12, folder / "tokenizer")
    config = SmallClipConfig(16, ConvSizes(4, (8, 16), 1), 16, 1, 12, count, 8)
    clips.save(little.seeded(lambda: SmallClipNet(config)), folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Twelve images, and nothing else: there is no caption anywhere."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i in range(12):
        quarters = generator.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        Image.fromarray(quarters.repeat(8, 0).repeat(8, 1)).save(folder / f"{i:02d}.png")
    return folder


def train(pictures, small_clip, root, *more):
    argv = ["shapes", "--data", str(pictures), "--clip", str(small_clip), "--cache-dir", str(root / "cache")]
    cli.train([*argv, "--output-dir", str(root / "run"), *TINY, *more], "dmd clipgen train")


@pytest.fixture(scope="module")
def run(tmp_path_factory, pictures, small_clip):
    """A finished run. While it trains, all that reads or writes captions is forbidden, and opened files are noted."""
    root = tmp_path_factory.mktemp("whole")
    opened, listen = [], [True]
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if listen[0] and event == "open" else None)

    def forbidden(*args, **options):
        raise AssertionError("a caption was read in training")

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (captioned, "load"), (prompts, "read"), (shapes, "caption"), (shapes, "parse"), (world, "captioned"),
            (SmallClip, "texts"), (SmallClip, "tokens"),
        ):  # fmt: skip
            patch.setattr(owner, name, forbidden)
        train(pictures, small_clip, root)
    listen[0] = False
    return root / "run", [p for p in opened if str(pictures) in p]


def test_no_caption_is_read_in_training(run):
    folder, opened = run
    assert len(opened) >= 12 and all(p.endswith(".png") for p in opened)
    assert (folder / "model" / "transformer.safetensors").is_file()


def test_the_run_directory_is_like_that_of_other_commands(run):
    folder, _ = run
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["preset"] == "shapes" and summary["images"] == 12
    assert 0 < summary["codebook_use"] <= 1 and summary["wall_seconds"] > 0
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4]
    assert json.loads((folder / "environment.json").read_text())["torch"] == torch.__version__
    assert read(folder / "config.json").data.size == 16
    assert "CLIP-GEN" in (folder / "report.html").read_text()
    taught = (folder / "stages" / "tokenizer" / "metrics.jsonl").read_text()
    use = json.loads(taught.splitlines()[-1])["codebook/use"]
    assert f"use {show(use)}" in (folder / "report.html").read_text()  # a chart of the tokenizer's own training
    (folder / "report.html").unlink()
    parts.report([str(folder)], "dmd report")
    assert "CLIP-GEN" in (folder / "report.html").read_text()


def test_stopping_and_going_on_gives_the_same_model(tmp_path, run, pictures, small_clip):
    """Each stage is stopped once; then the weights equal those of a run that never was, bit for bit."""
    stops = {"tokenizer": 2, "transformer": 1}

    class Stopping(Chain):
        def _train(self, folder, task, batches, cadence, title, sinks=None):
            wanted = stops.pop(title, None)
            if wanted is None:
                return super()._train(folder, task, batches, cadence, title, sinks)
            super()._train(folder, task, batches, replace(cadence, steps=wanted, cooldown=0), title, sinks)
            raise chains.Stopped(title)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chains, "Chain", Stopping)
        patch.setattr(chains, "_short", lambda steps: chains.Cadence(steps, 2, 2, keep=1))
        for _ in range(3):
            train(pictures, small_clip, tmp_path)
        train(pictures, small_clip, tmp_path / "again", "--cache-dir", str(tmp_path / "other"))
    assert not stops
    one, two = (model.load(root / "run" / "model", torch.device("cpu")) for root in (tmp_path, tmp_path / "again"))
    for a, b in ((one.net, two.net), (one.tokenizer, two.tokenizer)):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_a_run_with_other_options_or_images_is_refused(run, pictures, small_clip, tmp_path):
    folder, _ = run
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "shapes", "--data", str(pictures), "--clip", str(small_clip), "--output-dir", str(folder),
                  "--cache-dir", str(folder.parent / "cache"), *TINY, "--layers", "3"])  # fmt: skip
    assert stop.value.code == 2
    config = read(folder / "config.json")
    (tmp_path / "other").mkdir()
    Image.fromarray(np.zeros((16, 16, 3), dtype=np.uint8)).save(tmp_path / "other" / "a.png")
    other = replace(config, data=replace(config.data, data=str(tmp_path / "other")))
    chain = Chain(other, Workplace(Accelerator(cpu=True), None), folder)
    with pytest.raises(InputError, match="another --data: give that one, another --output-dir"):
        chain._require_same_inputs()


def test_parts_that_do_not_belong_together_are_refused(run, tmp_path, small_clip):
    folder, _ = run
    cpu = torch.device("cpu")
    tokenizers.save(little.tokenizer(replace(little.CONFIG, codes=12)), tmp_path / "fewer")
    with pytest.raises(InputError, match="makes 4 tokens of 12 codes, but the transformer was taught on 4 of 16"):
        model.load(folder / "model", cpu, str(tmp_path / "fewer"))
    sizes = ConvSizes(4, (8, 16), 1)
    tokenizers.save(little.tokenizer(replace(little.CONFIG, sizes=sizes)), tmp_path / "other")
    with pytest.raises(InputError, match="has the sizes but not the weights"):
        model.load(folder / "model", cpu, str(tmp_path / "other"))
    found = clips.load(small_clip, cpu)
    wide = little.seeded(lambda: SmallClipNet(replace(found.net.config, width=10)))
    (tmp_path / "wide").mkdir()
    (tmp_path / "wide" / "tokenizer").symlink_to(small_clip / "tokenizer")
    clips.save(wide, tmp_path / "wide")
    with pytest.raises(InputError, match="embeddings of 10 numbers, but the transformer was taught on 8"):
        model.load(folder / "model", cpu, clip_source=str(tmp_path / "wide"))
    clips.save(little.seeded(lambda: SmallClipNet(found.net.config), 9), tmp_path / "wide")
    with pytest.raises(InputError, match="is another one than the transformer was taught with"):
        model.load(folder / "model", cpu, clip_source=str(tmp_path / "wide"))


def test_an_embedding_of_a_text_needs_a_mean_where_the_model_centres(run):
    whole = model.load(run[0] / "model", torch.device("cpu"))
    bare = replace(whole, gap=replace(whole.gap, text_mean=None))
    with pytest.raises(InputError, match="give --centre-prompts"):
        bare.text_conditions(torch.zeros(1, 8))
    texts = ["a red circle in the centre on a blue background", "a small pink star at the top on a green background"]
    centred = bare.with_texts(texts)
    with pytest.raises(InputError, match="subtracts no mean embeddings: leave out --centre-prompts"):
        replace(whole, gap=replace(whole.gap, image_mean=torch.zeros(8))).with_texts(texts)
    assert centred.text_conditions(centred.clip.texts(texts)).sum(0).abs().max() < 1e-5


def test_a_mean_that_only_the_end_needs_is_asked_for_at_the_beginning(tmp_path, small_clip):
    class Foreign:
        text_mean = None

    (tmp_path / "metadata.jsonl").write_text("")
    config = replace(Config(), data=replace(Config().data, images=4, test=str(tmp_path)))
    chain = Chain(config, Workplace(Accelerator(cpu=True), None), tmp_path)
    with pytest.raises(InputError, match=r"--gap centre\+noise needs the mean embedding of texts"):
        chain._check_mean(Foreign())
    chain._check_mean(clips.load(small_clip, torch.device("cpu")))
    mended = replace(config, transformer=TransformerOptions(gap="noise"))
    Chain(mended, Workplace(Accelerator(cpu=True), None), tmp_path)._check_mean(Foreign())


def test_a_network_that_cannot_judge_is_refused_at_the_beginning(tmp_path):
    config = Config()
    judged = replace(config.evaluation, features="shapes-features")
    config = replace(config, data=replace(config.data, size=16, test=str(tmp_path)), evaluation=judged)
    with pytest.raises(InputError, match="an image has 16x16 pixels, but FD-ShapesNet takes 64x64 and resizes nothing"):
        chains.check_features(config, torch.device("cpu"))


@pytest.mark.parametrize(
    ("gap", "centred", "noise"),
    [("none", False, 0.0), ("noise", False, 0.4), ("centre", True, 0.0), ("centre+noise", True, 0.4)],
)
def test_the_gaps_remedies_do_what_they_say_and_are_kept_with_the_model(
    gap, centred, noise, run, small_clip, rng, tmp_path
):
    config = replace(Config(), transformer=TransformerOptions(gap=gap, gap_noise=0.4))
    e = torch.nn.functional.normalize(torch.randn(50, 8, generator=rng) + 3, dim=-1)
    found = make_gap(config, e, clips.load(small_clip, torch.device("cpu")))
    assert found.noise == noise
    assert (found.image(e).mean(0).norm() < 0.3) == centred
    cpu, clip = torch.device("cpu"), str(run[0] / "model" / "clip")
    model.save(replace(model.load(run[0] / "model", cpu), gap=found), tmp_path, clip, {})
    again = model.load(tmp_path, cpu).gap
    assert again.noise == noise
    assert torch.equal(again.image(e), found.image(e)) and torch.equal(again.text(e), found.text(e))


EMOJI = [*TINY, "--groups", "1", "--blocks", "1", "--mixed-precision", "no", "--discriminator-width", "4"]
"""The preset `emoji` at a size for seconds; its losses, options and evaluation stay."""
TRUNK = Path(os.environ.get("DMD_TEST_DATA", "")) / "lpips" / "alexnet_features.safetensors"


def test_one_stage_of_a_preset_asks_for_nothing_that_it_does_not_read(tmp_path, pictures, monkeypatch, capsys):
    """`dmd clipgen teach-tokenizer emoji --data DIR`, where the preset's other folders are not."""
    monkeypatch.chdir(tmp_path)
    argv = ["--data", str(pictures), "--cache-dir", str(tmp_path / "cache"), *EMOJI, "--perceptual", "l2"]
    cli.main(["teach-tokenizer", "emoji", *argv])
    cli.main(["teach-tokenizer", *argv])  # nor does another preset ask for a CLIP
    first, second = (line.removeprefix("tokenizer: ") for line in capsys.readouterr().out.splitlines()[-2:])
    assert tokenizers.load(first, torch.device("cpu")).config.codes == 16 and first != second
    with pytest.raises(SystemExit):
        cli.main(["train", "emoji", *argv])
    assert "--test data/emoji64/test has neither" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["teach-clip", *argv])
    assert "a small CLIP needs captioned images" in capsys.readouterr().err


def test_a_synthetic_data_set_supplies_images_and_captions(tmp_path, capsys):
    """`dmd synthesize`, then both networks that CLIP-GEN starts from: one reads its images alone."""
    made = str(tmp_path / "shards")
    synthesis.work(job(tmp_path / "shards", image_format="png"))
    common = ["--data", made, "--cache-dir", str(tmp_path / "cache"), *TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captioned, "load", None)
        cli.main(["teach-tokenizer", *common])
    small = ["--clip-steps", "2", "--clip-batch-size", "8", "--clip-patch", "4", "--clip-widths", "8", "16"]
    small += ["--clip-text-width", "16", "--clip-text-layers", "1", "--clip-width", "8"]
    cli.main(["teach-clip", *common, "--captioned", made, *small])
    folder = capsys.readouterr().out.splitlines()[-1].removeprefix("clip: ")
    taught = clips.load(folder, torch.device("cpu"))
    assert taught.width == 8 and taught.text_mean.norm() > 0.1


@pytest.mark.parametrize("locked", [True, False])
def test_a_locked_text_encoder_stays_as_it_was(tmp_path, capsys, locked):
    small = ["--clip-images", "32", "--clip-steps", "2", "--clip-batch-size", "8", "--clip-widths", "4", "4", "4"]
    small += ["--clip-lock-text" if locked else "--no-clip-lock-text"]
    cli.main(["teach-clip", "--cpu", "--cache-dir", str(tmp_path / "cache"), *small])
    taught = clips.load(capsys.readouterr().out.splitlines()[-1].removeprefix("clip: "), torch.device("cpu"))
    start = clips.text_start("shapes-teacher").network
    found, at_first = taught.net.text.text_model.state_dict(), start.state_dict()
    same = [torch.equal(found[k], at_first.get(k, at_first.get(f"text_model.{k}"))) for k in found]
    assert all(same) if locked else not any(same)


@pytest.mark.skipif(not TRUNK.is_file(), reason="needs LPIPS' AlexNet in $DMD_TEST_DATA/lpips")
@pytest.mark.parametrize("kind", ["transformers", "open_clip"])
def test_real_pictures_with_a_clip_of_others(tmp_path, pictures, capsys, kind):
    """`dmd clipgen train emoji` with others' CLIP, LPIPS, a discriminator and the embedding loss; the model keeps the
    mean of the texts that it was given, so that sampling needs no captions."""
    make = {"transformers": tiny_clips.of_transformers, "open_clip": tiny_clips.of_open_clip}[kind]
    clip = ("open_clip:" if kind == "open_clip" else "") + str(make(tmp_path / "clip"))
    (tmp_path / "test").mkdir()
    lines = []
    for i in range(12):
        name = f"{i:02d}.png"
        (tmp_path / "test" / name).write_bytes((pictures / name).read_bytes())
        lines.append(json.dumps({"file_name": name, "text": f"a {'red' if i % 2 else 'blue'} circle"}))
    (tmp_path / "test" / "metadata.jsonl").write_text("\n".join(lines))
    others = tmp_path / "others.txt"
    others.write_text("a green star\na pink ring\na small square\n")
    argv = [
        "train", "emoji", "--data", str(pictures), "--test", str(tmp_path / "test"), "--clip", clip,
        "--centre-prompts", str(others), *EMOJI, "--lpips-weights", str(TRUNK), "--adversarial", "0.8",
        "--adversarial-from", "1", "--embedding-weight", "0.5", "--candidates", "2", "--final-samples", "16",
        "--cache-dir", str(tmp_path / "cache"), "--output-dir", str(tmp_path / "run"),
    ]  # fmt: skip
    cli.main(argv)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metric"] == "FD-CLIP-clip" and summary["figures"].keys() >= {"test/text", "test/image"}
    (taught,) = (tmp_path / "cache" / "clipgen" / "tokenizer").glob("*/metrics.jsonl")
    last = json.loads(taught.read_text().splitlines()[-1])
    assert last["loss/discriminator"] > 0 and last["health/adaptive_weight"] > 0 and last["loss/perceptual"] > 0
    trained = model.load(tmp_path / "run" / "model", torch.device("cpu"))
    expected = trained.clip.texts(others.read_text().splitlines()).mean(0)
    torch.testing.assert_close(trained.gap.text_mean, expected, rtol=1e-4, atol=1e-6)
    out = [
        "--model",
        str(tmp_path / "run" / "model"),
        "--seeds",
        "0",
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
    ]
    cli.main(["sample", "a red circle", *out])
    assert "1 images in" in capsys.readouterr().out


def test_unused_codes_are_warned_of(tmp_path, small_clip):
    """Images of one colour need one code."""
    for i in range(3):
        Image.fromarray(np.full((16, 16, 3), 90, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    config = replace(Config(), data=replace(Config().data, data=str(tmp_path), size=16))
    config = replace(config, run=replace(config.run, cache_dir=str(tmp_path / "cache")))
    chain = Chain(config, Workplace(Accelerator(cpu=True), None), tmp_path)
    with pytest.warns(UserWarning, match=r"use only \d+% of the tokenizer.s 16 codes: teach one with fewer --codes"):
        chain.tokens(little.tokenizer(), clips.load(small_clip, torch.device("cpu")))


def test_our_warnings_are_one_sentence_and_those_of_libraries_as_they_are(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which a command replaces
    flags.guarded(lambda: None)
    assert warnings.formatwarning("few\n  codes", UserWarning, chains.__file__, 1) == "warning: few codes\n"
    assert warnings.formatwarning("theirs", UserWarning, torch.__file__, 1).startswith(
        f"{torch.__file__}:1: UserWarning"
    )


def test_sampling_writes_the_same_images_whatever_the_batch(run, tmp_path, pictures):
    prompts_ = ["a red circle in the centre on a blue background", "a small pink star at the top on a green background"]
    common = [*prompts_, "--image", str(pictures / "03.png"), "--model", str(run[0] / "model"), "--device", "cpu"]
    cli.sample([*common, "--seeds", "0-3", "--out", str(tmp_path / "a")], "sample")
    cli.sample([*common, "--seeds", "2", "--sample-batch-size", "1", "--out", str(tmp_path / "b")], "sample")
    few = sorted(p for p in (tmp_path / "b").glob("0*.png"))
    assert len(few) == 3 and len(list((tmp_path / "a").glob("0*.png"))) == 12
    for path in few:
        with Image.open(path) as one, Image.open(tmp_path / "a" / path.name) as other:
            assert np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max() <= 1
            assert one.info["seed"] == "2"


@torch.no_grad()
def test_of_several_candidates_the_nearest_is_kept(run):
    whole = model.load(run[0] / "model", torch.device("cpu"))
    texts = whole.clip.texts(["a red circle in the centre on a blue background"] * 6)
    conditions, seeds, sampler = whole.text_conditions(texts), torch.arange(6), Sampler(guidance=2.0)
    best = whole.images(conditions, texts, seeds, sampler, candidates=3, unit=4)
    tries = torch.stack([whole._make(conditions, seeds, sampler, c) for c in range(3)])
    cosines = torch.stack([(whole.clip.images(x) * texts).sum(-1) for x in tries])
    expected = tries[cosines.argmax(0), torch.arange(6)]
    torch.testing.assert_close(best, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["train", "nothing"], "there is no preset 'nothing'"),
        (["fly"], "there is no command dmd clipgen 'fly'"),
        (["train", "--size", "20", "--data", "x", "--clip", "y"], "--size is 20: it must be divisible by 8"),
        (["train", "--gap", "wide"], "gap"),
        (["train", "--data", "somewhere"], "a small CLIP needs captioned images"),
        (["train", "--data", "nowhere", "--clip", "y"], "nowhere does not exist"),
        (["train", "--centre-prompts", "nowhere"], "--centre-prompts nowhere does not exist"),
        (["train", "--test", "nowhere"], "--test nowhere has neither metadata.jsonl nor shards"),
        (["train", "--images", "4", "--features", "inception"], "FID needs inception-2015-12-05.pt"),
        (["train", "--images", "4", "--features", "timm:nothing"], "timm has no network 'nothing'"),
        (["train", "--features-weights", "x"], "--features-weights and --features-download are for --features"),
        (["train", "--clip-text", "None"], "--clip-lock-text locks the text encoder of --clip-text: give both"),
        (["train", "--top-p", "0"], "--top-p is 0.0: it must be above 0"),
        (["sample", "--seeds", "x", "a red circle"], "--seeds is 'x'"),
        (["sample", "a red circle", "--model", "nowhere"], "nowhere is not a model of dmd clipgen"),
        (["sample"], "what should the images show?"),
        (["evaluate", "nowhere"], "does not exist: give a run directory of dmd clipgen"),
        (["evaluate"], "which run?"),
    ],
)
def test_bad_input_gets_one_sentence(argv, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and sentence in error and error.startswith("error: ")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["shapes", "emoji", "paper"])
def test_presets_are_whole(name, tmp_path):
    config = preset(name)
    check(config)
    assert config.preset == name
    (tmp_path / "config.json").write_text(json.dumps(to_json(config)))
    assert read(tmp_path / "config.json") == config


def test_the_papers_preset_has_the_papers_sizes():
    config = preset("paper")
    found = chains.tokenizer_config(config)
    assert (found.grid, found.length, found.codes) == (16, 256, 16_384)
    assert (config.transformer.layers, config.transformer.width, config.transformer.heads) == (24, 1024, 16)


@pytest.fixture(scope="module")
def drawn_world(tmp_path_factory):
    """A finished run in the world of shapes: all stages, with the small CLIP taught here."""
    root = tmp_path_factory.mktemp("world")
    argv = [
        "train", "--images", "16", "--clip-images", "16", "--clip-steps", "2", "--clip-batch-size", "4",
        "--clip-patch", "8", "--clip-widths", "8", "16", "--clip-text-width", "16", "--clip-text-layers", "1",
        "--clip-width", "8", *TINY, "--size", "64", "--patch", "16", "--final-samples", "16", "--top-k", "4",
        "--cache-dir", str(root / "cache"), "--output-dir", str(root / "run"),
    ]  # fmt: skip
    cli.main(argv)
    return root


def test_a_student_its_teacher_and_clip_gen_stand_side_by_side(drawn_world, tmp_path, monkeypatch, capsys):
    """The smoke test of `benchmarks.text_to_image`."""
    file = tmp_path / "line.json"
    argv = ["text_to_image", "--student", "shapes-student", "--clipgen", str(drawn_world / "run"), "--quick"]
    monkeypatch.setattr(sys, "argv", [*argv, "--json", str(file)])
    text_to_image.main()
    found = json.loads(file.read_text())["results"]
    models = ("CLIP-GEN, 4 tokens", "student, 1 step", "teacher, 2 steps")
    assert found["rows"].keys() == {f"{asked}/{m}" for asked in ("seen", "held_out") for m in models}
    assert found["metric"] == "FD-SmallCLIP" and found["samples"] == 16
    student = found["rows"]["seen/student, 1 step"]
    assert student["caption_agreement"] > 0.5 > found["rows"]["seen/CLIP-GEN, 4 tokens"]["caption_agreement"]
    assert "| seen | student, 1 step |" in capsys.readouterr().out


def test_the_world_of_shapes_is_judged(drawn_world):
    """And judged again with other sampling, by another network than CLIP, whose name the figures then bear."""
    tmp_path = drawn_world
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    figures = summary["figures"]
    sources = ("real", "rebuilt", "image", "text")
    assert list(figures) == [f"{s}/{source}" for s in ("seen", "held_out") for source in sources]
    assert figures["seen/real"]["caption_agreement"] > 0.9 and figures["held_out/real"]["caption_agreement"] > 0.9
    assert figures["seen/text"].keys() >= {"fd_0", "fd_1", "fd_2", "clip_score", "caption_agreement"}
    assert summary["metric"] == "FD-SmallCLIP" and summary["images_per_second"] > 0
    assert summary["gap"] == figures["seen/image"]["clip_score"] - figures["seen/text"]["clip_score"]
    html = (tmp_path / "run" / "report.html").read_text()
    assert "held_out/text" in html and "data:image/png;base64" in html
    encoder = clips.load(tmp_path / "run" / "model" / "clip", torch.device("cpu"))
    texts = world.captioned(0, 16).captions
    torch.testing.assert_close(encoder.text_mean, encoder.texts(texts).mean(0), rtol=1e-4, atol=1e-6)
    other = ["--guidance", "1.0", "--features", "shapes-features"]
    cli.main(["evaluate", str(tmp_path / "run"), "--final-samples", "18", *other])
    again = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert again["metric"] == "FD-ShapesNet"
    html = (tmp_path / "run" / "report.html").read_text()
    assert "fd_k is FD-ShapesNet after a blur of k pixels" in html
    assert "held_out has 18 images, not more than the features of FD-ShapesNet have dimensions" in html
    assert again["samples"] == 18 and again["sampling"]["guidance"] == 1.0
    assert again["codebook_use"] == summary["codebook_use"]


@pytest.mark.slow
def test_every_stage_of_the_shapes_preset_learns(tmp_path):
    """The preset's own networks for sixty small steps each: every loss falls."""
    argv = [
        "train", "--images", "300", "--clip-images", "300", "--tokenizer-steps", "60", "--tokenizer-batch-size", "8",
        "--clip-steps", "60", "--clip-batch-size", "16", "--max-train-steps", "60", "--batch-size", "8",
        "--log-every", "3", "--final-samples", "16", "--report-to", "none", "--cpu",
        "--cache-dir", str(tmp_path / "cache"), "--output-dir", str(tmp_path / "run"),
    ]  # fmt: skip
    cli.main(argv)
    cache = tmp_path / "cache" / "clipgen"
    (tokenizer,), (clip,) = (list((cache / kind).glob("*/metrics.jsonl")) for kind in ("tokenizer", "clip"))
    stages = {tokenizer: "loss/l1", clip: "loss/contrastive", tmp_path / "run" / "metrics.jsonl": "loss/tokens"}
    for path, name in stages.items():
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        print(name, [round(line[name], 4) for line in lines])
        assert lines[-1][name] < 0.9 * lines[0][name], name
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    print({k: v for k, v in summary.items() if k != "figures"})
    print(summary["figures"]["seen/rebuilt"], summary["figures"]["seen/text"])
