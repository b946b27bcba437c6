"""The chain from prompts to a student, on a miniature of random weights: everything but the quality."""

import json
import re
import shutil
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from dmd import build, codec, evaluation, teach_shapes, teachers
from dmd.build import Workplace
from dmd.cli import sample, train
from dmd.config import MemoryOptions, read
from dmd.errors import InputError
from dmd.losses import squared_distance
from dmd.pairs import Pairs
from dmd.solvers import one_step
from dmd.teach_miniature import MiniatureOptions
from dmd.teach_shapes import ShapesOptions
from dmd.teachers.miniature import MiniatureConfig

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, XFormersAttnProcessor

SMALL = MiniatureConfig(vae_widths=(8, 8, 8, 8), unet_widths=(16, 16), text_width=16, text_layers=1, heads=2)
PROMPTS = ["a small red circle at the left on a blue background", "黒い丸", "a/b\\c: d?", "x" * 10_000]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A teacher, and a finished run of four steps."""
    root = tmp_path_factory.mktemp("world")
    training = MiniatureOptions(
        output_dir=str(root / "teacher"), autoencoder_steps=1, autoencoder_batch_size=2, decoder_steps=1, text_steps=1,
        text_batch_size=2, steps=1, batch_size=2, samples=2, cpu=True, network=SMALL,
    )  # fmt: skip
    assert teach_shapes.teach(ShapesOptions(8, training), Workplace(Accelerator(cpu=True), None))
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    train.main(flags(root, root / "run"))
    return root


def flags(root, run, *more):
    sizes = "--pairs 6 --pair-shard-size 4 --teacher-steps 2 --compare-steps 3 --max-train-steps 4 --batch-size 4"
    sizes += " --pair-batch-size 2 --eval-every 2 --eval-samples 16 --final-samples 16 --checkpointing-steps 2"
    sizes += " --log-every 1 --lr-cooldown-steps 1 --lr-warmup-steps 1 --report-to none --cpu --data None"
    where = ["--teacher", str(root / "teacher"), "--output-dir", str(run), "--cache-dir", str(root / "cache")]
    return ["shapes", *sizes.split(), *where, *more]


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def figures(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def pixels(image):
    return torch.from_numpy(np.asarray(image).astype(np.float32))


def weights(run):
    return load_file(run / "student" / "unet" / "diffusion_pytorch_model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_run_says_what_it_measured(world):
    summary = json.loads((world / "run" / "summary.json").read_text())
    assert summary["generator_updates"] == 4 and summary["images_seen"] == 4 * (4 + 2)
    assert summary["teacher"]["nfe"] == 3 * 2 and summary["student"]["nfe"] == 1
    for who in ("teacher", "student"):
        assert summary["caption_agreement"][who] == summary[who]["caption_agreement"]
        assert 0 <= summary[who]["caption_agreement"] <= summary[who]["caption_background"] <= 1
    names = {name for line in figures(world / "run") for name in line}
    assert {"health/matching_part", "health/guidance_part", "loss/regression", "eval/caption_agreement"} <= names
    report = (world / "run" / "report.html").read_text()
    assert "Caption agreement" in report and summary["prompts"][0] in report


def test_the_student_is_a_stock_pipeline(world):
    """What sample.py makes of a seed, diffusers makes of the same noise."""
    from diffusers import StableDiffusionPipeline

    from dmd import seeding
    from dmd.seeding import Stream
    from dmd.teachers import stable_diffusion

    folder = world / "run" / "student"
    sample.main([PROMPTS[0], "--student", str(folder), "--seeds", "5", "--out", str(world / "out"), "--device", "cpu"])
    (file,) = (world / "out").glob("000-*seed-5.png")
    with Image.open(file) as image:
        ours = pixels(image)
        assert image.text["prompt"] == PROMPTS[0]
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    z = seeding.normal(0, Stream.SAMPLE, 0, torch.tensor([5]), stable_diffusion.load(folder).shape)
    theirs = pipeline(PROMPTS[0], num_inference_steps=1, guidance_scale=0.0, latents=z).images[0]
    assert (ours - pixels(theirs)).abs().max() <= 1


def test_the_worst_samples_can_be_made_again(world):
    """What the report shows as the worst is what sample.py makes of its caption and seed."""
    worst = json.loads((world / "run" / "samples" / "extremes.json").read_text())["worst"][1]
    with Image.open(world / "run" / "samples" / "worst.png") as image:
        shown = pixels(image.crop((65, 0, 65 + 64, 64)))
    where = ["--seeds", str(worst["seed"]), "--out", str(world / "worst"), "--device", "cpu"]
    sample.main([worst["prompt"], "--student", str(world / "run" / "student"), *where])
    (file,) = (world / "worst").glob("000-*.png")
    with Image.open(file) as image:
        assert (pixels(image) - shown).abs().max() <= 1


def test_a_student_is_judged_by_prompts_that_training_does_not_see(world, tmp_path):
    """The pictures and their captions are of these, what is learnt is not."""
    unseen, run = ["a green cross", "an orange star"], tmp_path / "run"
    (tmp_path / "unseen.txt").write_text("\n".join(unseen) + "\n")
    own = ["--prompts", str(world / "prompts.txt"), "--max-train-steps", "2"]
    train.main(flags(world, run, *own, "--test-prompts", str(tmp_path / "unseen.txt")))
    train.main(flags(world, tmp_path / "other", *own))
    assert equal(weights(run), weights(tmp_path / "other"))
    told = [json.loads((r / "summary.json").read_text())["prompts"] for r in (run, tmp_path / "other")]
    assert told == [unseen * 8, PROMPTS * 4]  # those of the sixteen pictures
    assert "Its captions are those of --test-prompts" in (run / "report.html").read_text()
    where = ["--student", str(run / "student"), "--seeds", "3", "--out", str(tmp_path / "out"), "--device", "cpu"]
    sample.main([unseen[1], *where])
    (file,) = (tmp_path / "out").glob("000-*.png")
    with Image.open(run / "samples" / "final.png") as picture, Image.open(file) as image:
        tile = picture.crop((3 * 65, 0, 3 * 65 + 64, 64))
        assert (pixels(image) - pixels(tile)).abs().max() <= 1


def test_prompts_that_training_sees_are_no_test(world, tmp_path):
    (tmp_path / "some.txt").write_text(f"{PROMPTS[0]}\na green cross\n")
    config = read(world / "run" / "config.json")
    config = replace(config, evaluation=replace(config.evaluation, test_prompts=str(tmp_path / "some.txt")))
    with pytest.warns(UserWarning, match="1 of the 2 different --test-prompts are among --prompts, too"):
        assert build.judged_prompts(config, PROMPTS) == [PROMPTS[0], "a green cross"]


def test_a_run_that_was_stopped_makes_the_same_student(world):
    train.main(flags(world, world / "again", "--max-train-steps", "2"))
    assert not equal(weights(world / "run"), weights(world / "again"))
    train.main(flags(world, world / "again"))
    assert equal(weights(world / "run"), weights(world / "again"))


def test_a_run_goes_on_from_another_student(world):
    """With steps too small to move it, what comes out is what went in."""
    begun = ("--student", str(world / "run" / "student"), "--learning-rate", "1e-12")
    train.main(flags(world, world / "from-student", *begun))
    one, two = weights(world / "run"), weights(world / "from-student")
    assert all((one[k] - two[k]).abs().max() < 1e-6 for k in one)
    teacher = load_file(world / "teacher" / UNET)
    assert max((one[k] - teacher[k].float()).abs().max() for k in one) > 1e-4


def test_the_fake_score_learns_first_where_that_is_asked(world):
    train.main(flags(world, world / "warm", "--critic-warmup-steps", "2", "--critic-steps-per-generator-step", "2"))
    rows = [row for row in figures(world / "warm") if "loss/fake" in row]
    assert ["loss/matching" in row for row in rows] == [False, False, True, True]
    summary = json.loads((world / "warm" / "summary.json").read_text())
    assert (summary["generator_updates"], summary["critic_updates"]) == (2, 4 * 2)
    assert summary["images_seen"] == 4 * 2 * 4 + 2 * 2  # noises in every critic update, pairs in those of the student


def test_separate_guidance_times_change_the_gradient_only(world):
    train.main(flags(world, world / "apart", "--guidance-t-min", "0.6", "--guidance-t-max", "0.9"))
    a, b = figures(world / "run")[0], figures(world / "apart")[0]
    assert a["loss/regression"] == b["loss/regression"] and a["health/matching_part"] == b["health/matching_part"]
    assert a["health/guidance_part"] != b["health/guidance_part"]


def test_the_real_score_may_have_a_guidance_of_its_own(world, monkeypatch):
    """Its part (s - 1)(cond - uncond) at 2.5 is 1.5 times that at the preset's 2, but for the normaliser."""
    scales, many_step = [], build.many_step
    monkeypatch.setattr(build, "many_step", lambda c, real, n: scales.append(real.scale) or many_step(c, real, n))
    train.main(flags(world, world / "stronger", "--matching-guidance", "2.5"))
    usual, strong = (figures(world / run)[0] for run in ("run", "stronger"))
    assert usual["loss/regression"] == strong["loss/regression"]
    assert strong["health/guidance_part"] == pytest.approx(1.5 * usual["health/guidance_part"], rel=0.1)
    assert scales == [3.0, 3.0], "pairs, and the teacher that the student is compared with"


def test_a_run_with_adapters_resumes_and_its_checkpoint_holds_them_alone(world):
    """One UNet as real and fake score; gradients, losses and checkpoint of a LoRA fake score."""
    pytest.importorskip("peft")
    more = ("--fake-lora-rank", "2", "--gradient-checkpointing", "--checkpoint-decoder", "--regression-on", "images")
    train.main(flags(world, world / "lora", *more))
    a, b = figures(world / "run")[0], figures(world / "lora")[0]
    assert a["loss/matching"] == pytest.approx(b["loss/matching"], rel=1e-4)  # both fake scores start as the teacher
    assert a["loss/fake"] == pytest.approx(b["loss/fake"], rel=1e-4)
    newest = max((world / "lora" / "checkpoints").iterdir())
    assert all(name.startswith("adapters.") for name in load_file(newest / "fake.safetensors"))
    train.main(flags(world, world / "lora-again", *more, "--max-train-steps", "2"))
    train.main(flags(world, world / "lora-again", *more))
    assert equal(weights(world / "lora"), weights(world / "lora-again"))


def test_one_unet_can_be_student_real_and_fake_score(world):
    """Adapters on the frozen teacher for both: the first step is that of two networks, the last makes both folders."""
    pytest.importorskip("peft")
    more = ("--student-lora-rank", "2", "--fake-lora-rank", "3", "--gradient-checkpointing", "--learning-rate", "0.05")
    train.main(flags(world, world / "one-unet", *more))
    a, b = figures(world / "run")[0], figures(world / "one-unet")[0]
    for name in ("loss/matching", "loss/regression", "loss/fake"):
        assert a[name] == pytest.approx(b[name], rel=1e-4)
    newest = max((world / "one-unet" / "checkpoints").iterdir())
    for name in ("student", "fake", "ema"):
        assert all(key.startswith("adapters.") for key in load_file(newest / f"{name}.safetensors"))
    train.main(flags(world, world / "one-unet-again", *more, "--max-train-steps", "2"))
    train.main(flags(world, world / "one-unet-again", *more))
    assert equal(weights(world / "one-unet"), weights(world / "one-unet-again"))

    teacher = teachers.load(world / "teacher").denoiser.net.get_submodule("unet").state_dict()
    adapters = load_file(world / "one-unet" / "student-lora" / "pytorch_lora_weights.safetensors")
    student, changed = weights(world / "one-unet"), set()
    for name, value in teacher.items():
        a, b = (adapters.get(f"unet.{name.removesuffix('.weight')}.lora_{which}.weight") for which in "AB")
        expected = value if a is None or b is None else value + b @ a
        torch.testing.assert_close(student[name], expected, rtol=1e-5, atol=1e-6)
        changed |= {name} if not torch.equal(student[name], value) else set()
    assert len(changed) == len(adapters) / 2


def test_a_teacher_s_variant_is_read_and_its_student_written(world, tmp_path):
    """Files of a variant alone: the same run, where --variant names it, and a sentence where it does not."""
    shutil.copytree(world / "teacher", tmp_path / "teacher", ignore=shutil.ignore_patterns("stages"))
    for path in tmp_path.glob("teacher/*/*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    more = ("--teacher", str(tmp_path / "teacher"))
    with pytest.raises(SystemExit):
        train.main(flags(world, tmp_path / "run", *more))
    train.main(flags(world, tmp_path / "run", *more, "--variant", "fp16"))
    assert equal(weights(tmp_path / "run"), weights(world / "run"))
    sample.main(["a", "--student", str(tmp_path / "run" / "student"), "--teacher", "--steps", "2", "--variant", "fp16",
                 "--seeds", "0", "--out", str(tmp_path / "out")])  # fmt: skip
    assert len(list((tmp_path / "out").glob("teacher-*.png"))) == 1


def save_tiny(teacher, folder, channels=None):
    """A random tiny autoencoder of a teacher's latents, or of others."""
    from diffusers import AutoencoderTiny

    with torch.random.fork_rng():
        torch.manual_seed(0)
        tiny = AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1), latent_channels=channels or teacher.shape[0],
        )  # fmt: skip
    tiny.save_pretrained(folder)
    return tiny


@pytest.mark.parametrize(
    ("options", "student", "fake"),
    [
        ({"gradient_checkpointing": True}, True, True),
        ({"gradient_checkpointing": True, "gradient_checkpointing_fake": False}, True, False),
        ({"gradient_checkpointing_fake": True}, False, True),
        ({"gradient_checkpointing_fake": True, "fake_lora_rank": 2}, False, True),
        ({"gradient_checkpointing": True, "gradient_checkpointing_fake": False, "fake_lora_rank": 2}, True, False),
    ],
)
def test_each_network_recomputes_by_itself(world, options, student, fake):
    config = read(world / "run" / "config.json")
    place = build.workplace(config)
    teacher = build.load_teacher(config, None, place, world / "teacher")
    config = replace(config, memory=MemoryOptions(**options))
    task = build.distiller(config, teacher, place, squared_distance)
    shared = getattr(task.fake.net, "shared", task.fake).net
    for net, expected in ((task.student.net, student), (shared, fake)):
        unets = [m for m in net.modules() if isinstance(m, UNet2DConditionModel)]
        assert [u.mid_block.gradient_checkpointing for u in unets] == [expected]


def test_xformers_is_asked_of_all_three_networks_and_told_of_once(world, monkeypatch):
    """Where it can run, the real score has it too; where it cannot, torch's own attention stays, with one warning."""
    config = read(world / "run" / "config.json")
    place = build.workplace(config)
    config = replace(config, memory=MemoryOptions(enable_xformers_memory_efficient_attention=True))

    def unavailable(self, *_):
        raise ValueError("no such GPU")

    monkeypatch.setattr(Attention, "set_use_memory_efficient_attention_xformers", unavailable)
    teacher = build.load_teacher(config, None, place, world / "teacher")
    with pytest.warns(UserWarning) as told:
        build.distiller(config, teacher, place, squared_distance)
    assert [str(w.message) for w in told if "xformers" in str(w.message)] == [
        "xformers cannot be used (no such GPU): torch's own attention stays"
    ]

    def available(self, *_):
        self.set_processor(XFormersAttnProcessor())

    monkeypatch.setattr(Attention, "set_use_memory_efficient_attention_xformers", available)
    teacher = build.load_teacher(config, None, place, world / "teacher")
    task = build.distiller(config, teacher, place, squared_distance)
    for net in (task.student, task.real, task.fake):
        found = [type(m.processor) for m in net.modules() if isinstance(m, Attention)]
        assert found and set(found) == {XFormersAttnProcessor}


def first_pairs(world, run):
    """The teacher of a run, its first batch, and the student's first samples from the noise of the pairs."""
    config = read(run / "config.json")
    teacher = build.load_teacher(config, None, build.workplace(config), world / "teacher")
    asked = build.prompts(config, None)
    spec = build.pair_spec(config, teacher, asked)
    store = Pairs(build.pair_folder(config, spec), spec)
    batch = build.distill_batches(config, teacher, asked, store, build.workplace(config))(0).batches[0]
    with torch.no_grad():
        x = one_step(teacher.denoiser, batch.z_ref, {k: v[len(batch.z) :] for k, v in batch.cond.items()})
    return teacher, batch, x


def test_regression_can_be_of_a_crop_and_through_a_tiny_decoder(world, tmp_path):
    """Against the same losses by hand: of a first step, no other figure changes."""
    tiny = save_tiny(teachers.load(world / "teacher"), tmp_path / "tiny")
    more = ("--regression-on", "images", "--regression-decoder", str(tmp_path / "tiny"), "--regression-crop", "2")
    train.main(flags(world, tmp_path / "run", *more, "--max-train-steps", "1"))
    a, b = figures(world / "run")[0], figures(tmp_path / "run")[0]
    assert a["health/matching_part"] == b["health/matching_part"]

    teacher, batch, x = first_pairs(world, tmp_path / "run")
    with torch.no_grad():
        images = [tiny.decode(v[batch.window] / tiny.config.scaling_factor).sample for v in (x, batch.y_ref)]
    assert images[0].shape[-1] == 4
    assert b["loss/regression"] == pytest.approx(squared_distance(*images).mean().item(), rel=1e-3)


def test_pairs_and_judge_work_in_units_that_fit_and_training_s_states_are_gone_when_the_student_is_compared(
    world, tmp_path, monkeypatch
):
    """With room for three images at a time, never more; and no optimiser of the run lives at the comparison."""
    monkeypatch.setattr("dmd.generate.UNIT_PIXELS", 3 * 64 * 64)
    sizes, optimizers, adam, compare = set(), [], build.adam, evaluation.compare

    def noting(net, *settings):
        optimizers.append(weakref.ref(found := adam(net, *settings)))
        return found

    def comparing(*arguments):
        assert optimizers and all(reference() is None for reference in optimizers)
        return compare(*arguments)

    def rows(solver):
        return lambda denoiser, x, steps, cond: sizes.add(len(x)) or solver(denoiser, x, steps, cond)

    monkeypatch.setattr(build, "adam", noting)
    monkeypatch.setattr(evaluation, "compare", comparing)
    monkeypatch.setitem(build.SOLVERS, "ddim", (rows(build.SOLVERS["ddim"][0]), lambda n: n))
    train.main([*flags(world, tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")])
    assert sizes == {3, 1, 2}  # shards of 4 and 2 pairs, and the teacher's samples in units of 3
    assert len(optimizers) == 2
    for name, value in weights(world / "run").items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], value, rtol=0, atol=2e-3)


def test_target_images_can_be_stored_instead_of_decoded(world, tmp_path):
    """The same losses to the storage's precision: half precision keeps 11 bits, bytes also cut to [-1, 1]."""
    runs = {}
    for storage in ("no", "fp16", "uint8"):
        more = ("--regression-on", "images", "--store-images", storage, "--max-train-steps", "1")
        train.main(flags(world, tmp_path / storage, *more))
        runs[storage] = figures(tmp_path / storage)[0]
    assert runs["fp16"]["loss/regression"] == pytest.approx(runs["no"]["loss/regression"], rel=1e-3)
    assert runs["fp16"]["health/matching_part"] == runs["no"]["health/matching_part"]

    teacher, batch, x = first_pairs(world, tmp_path / "uint8")
    with torch.no_grad():
        image, target = (teacher.codec.decode(v) for v in (x, batch.y_ref))
    levels = ((target.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1
    expected = squared_distance(image, levels).mean().item()
    assert runs["uint8"]["loss/regression"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("objective", ["dmd", "matching"])
def test_drift_is_that_of_decoded_images_with_and_without_pairs(world, tmp_path, objective):
    """From the same noise, by hand: of the run's pairs, or of sixteen that were made for this alone."""
    run = world / "run"
    if objective == "matching":
        run = tmp_path / "run"
        more = ("--objective", objective, "--max-train-steps", "2", "--critic-steps-per-generator-step", "2")
        train.main(flags(world, run, *more))
        assert json.loads((run / "summary.json").read_text())["images_seen"] == 2 * (4 + 4)
    config = read(run / "config.json")
    teacher = teachers.load(world / "teacher")
    spec = build.pair_spec(config, teacher, build.prompts(config, None))
    index = torch.arange(16 if objective == "matching" else 6)
    cond = build.conditions(teacher, build.prompts(config, None))(spec.condition(index))
    generator, _ = build.many_step(config, build.guided(config, teacher), 2)
    student = teachers.load(run / "student")
    with torch.no_grad():
        y = teacher.codec.decode(generator(spec.noise(index), cond).half())
        x = teacher.codec.decode(one_step(student.denoiser, spec.noise(index), cond))
    last = next(f for f in reversed(figures(run)) if "health/brightness_drift" in f)
    assert last["step"] == config.distill.max_train_steps
    assert last["health/brightness_drift"] == pytest.approx((x.mean() - y.mean()).item(), abs=1e-3)
    assert last["health/contrast_drift"] == pytest.approx((x.std() - y.std()).item(), abs=1e-3)
    with Image.open(run / "samples" / f"step-{last['step']:08d}.png") as picture:
        assert picture.text["rows"] == "x | x0_real | x0_fake | student | teacher"
        assert picture.size == (65 * len(index) + 1, 66 * 5)


def test_a_real_score_in_bf16_is_near_the_one_in_float32(world):
    train.main(flags(world, world / "half", "--mixed-precision", "bf16", "--real-in-bf16", "--max-train-steps", "1"))
    a, b = figures(world / "run")[0], figures(world / "half")[0]
    for name in ("loss/regression", "loss/fake", "health/normaliser"):
        assert a[name] == pytest.approx(b[name], rel=0.05)
        assert a[name] != b[name]


def test_images_do_not_depend_on_their_batch(world):
    """R8: the same seed alone and in a batch."""
    folder = str(world / "run" / "student")
    common = ["--student", folder, "--device", "cpu", "--no-grid"]
    sample.main([PROMPTS[0], "--seeds", "3", "--out", str(world / "alone"), *common])
    sample.main([*PROMPTS[:2], "--seeds", "0-6", "--batch-size", "5", "--out", str(world / "batch"), *common])
    (alone,) = (world / "alone").iterdir()
    with Image.open(alone) as a, Image.open(world / "batch" / alone.name) as b:
        difference = pixels(a) - pixels(b)
    assert difference.abs().max() <= 1


def test_teacher_and_student_side_by_side(world, capsys):
    folder = world / "run" / "student"
    options = ["--teacher", "--steps", "2", "--guidance-scale", "3", "--seeds", "0-1", "--device", "cpu"]
    sample.main([*PROMPTS[:2], "--student", str(folder), "--out", str(world / "both"), *options])
    names = sorted(p.name for p in (world / "both").iterdir())
    assert (
        len([n for n in names if n.startswith("student-")]) == len([n for n in names if n.startswith("teacher-")]) == 4
    )
    with Image.open(world / "both" / "grid.png") as grid:
        assert [t.split(":")[0] for t in grid.text["rows"].split(" | ")] == ["student", "teacher"] * 2
    assert re.search(r"teacher: 4 images in .*, [\d.e+]+ images per second on cpu", capsys.readouterr().out)


def test_many_steps_are_led_away_from_a_negative_prompt(world, tmp_path):
    """From the prompt itself: nowhere, as without guidance. From another: not as from the empty one."""
    asked = {
        "itself": ["--guidance-scale", "3", "--negative-prompt", PROMPTS[0]],
        "nothing": ["--guidance-scale", "1"],
        "other": ["--guidance-scale", "3", "--negative-prompt", PROMPTS[1]],
        "empty": ["--guidance-scale", "3"],
    }
    common = ["--student", str(world / "teacher"), "--steps", "3", "--seeds", "5", "--device", "cpu", "--no-grid"]
    found = {}
    for name, more in asked.items():
        sample.main([PROMPTS[0], *common, *more, "--out", str(tmp_path / name)])
        (file,) = (tmp_path / name).iterdir()
        with Image.open(file) as image:
            found[name] = pixels(image)
            assert image.text.get("negative prompt") == (more[3] if len(more) == 4 else None)
    assert (found["itself"] - found["nothing"]).abs().max() <= 1
    assert (found["other"] - found["empty"]).abs().max() > 1


def test_prompts_of_any_script_and_length_become_images(world, capsys):
    options = ["--prompts", str(world / "prompts.txt"), "--seeds", "0", "--out", str(world / "any"), "--device", "cpu"]
    sample.main(["--student", str(world / "run" / "student"), *options])
    files = sorted(p for p in (world / "any").iterdir() if p.name != "grid.png")
    assert [p.name[:3] for p in files] == ["000", "001", "002", "003"]
    assert all(len(p.name.encode()) < 200 for p in files)
    found = []
    for file in files:
        with Image.open(file) as image:
            found.append(image.text["prompt"])
    assert found == PROMPTS
    assert "note: a prompt has" in capsys.readouterr().err


REFUSED = {
    "NUL": (["a\0b"], r"the prompt 'a\\x00b': a prompt must not hold the character NUL"),
    "bytes that are not UTF-8": (
        ["a\udcff"],
        r"the prompt 'a\\udcff': a prompt must not hold half of a surrogate pair",
    ),
    "nothing asked": ([], r"what should the images show\? Give a prompt"),
    "negative prompt": (["x", "--negative-prompt", "blurry"], r"--negative-prompt needs guidance at every step"),
    "negative prompt, unguided": (
        ["x", "--negative-prompt", "y", "--steps", "2"],
        r"--negative-prompt does nothing at guidance 1: give a",
    ),
    "guidance": (["x", "--guidance-scale", "7.5"], r"--guidance-scale 7.5 is for many steps"),
    "seeds": (["x", "--seeds", "1.5"], r"--seeds is '1.5': it should look like 0-7"),
    "device": (["x", "--device", "quantum"], r"--device is 'quantum', which is not there"),
    "empty prompt file": (["--prompts", "empty.txt"], r"empty.txt holds no prompt"),
    "decoder": (["x", "--decoder", "nowhere"], r"nowhere is no AutoencoderTiny that can be read"),
    "no such file": (["--prompts", "missing.txt"], r"missing.txt does not exist"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_questions_are_answered_by_a_sentence(world, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    arguments, sentence = REFUSED[name]
    with pytest.raises(SystemExit) as stop:
        sample.main([*arguments, "--student", str(world / "run" / "student"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(sentence, said) and said.count("error:") == 1
    assert not (tmp_path / "out").exists()


TEACHERS = {
    "SDXL": (lambda f: edit(f / "model_index.json", _class_name="StableDiffusionXLPipeline"), r"'StableDiffusionXLPip"),
    "inpainting": (lambda f: edit(f / "unet" / "config.json", in_channels=9), r"as networks for inpainting have"),
    "video": (lambda f: edit(f / "model_index.json", _class_name="TextToVideoSDPipeline"), r"'TextToVideoSDPipeline'"),
    "no index": (lambda f: (f / "model_index.json").unlink(), r"has neither model_index.json"),
    "interrupted": (
        lambda f: (f / UNET).rename(f / f"{UNET}.incomplete"), r"\*.incomplete files beside it tell of an interrupted"
    ),
    "pickle": (lambda f: (f / UNET).rename(f / "unet" / "diffusion_pytorch_model.bin"), r"is a pickle, which"),
    "cut": (lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-9]), r"is cut or damaged"),
    "no prompts": (lambda f: (f.parent / "prompts.txt").write_text("\n\n"), r"prompts.txt holds no prompt"),
    "NUL in a prompt": (
        lambda f: (f.parent / "prompts.txt").write_bytes(b"a\0b\n"), r"prompts.txt.*must not hold the character NUL"
    ),
}  # fmt: skip
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("name", TEACHERS)
def test_what_cannot_be_distilled_is_refused_before_anything_is_written(world, tmp_path, capsys, name):
    """By the command, in one sentence."""
    shutil.copytree(world / "teacher", tmp_path / "teacher", ignore=shutil.ignore_patterns("stages"))
    (tmp_path / "prompts.txt").write_text("a circle\n")
    spoil, sentence = TEACHERS[name]
    spoil(tmp_path / "teacher")
    with pytest.raises(SystemExit) as stop:
        train.main(flags(tmp_path, tmp_path / "run", "--prompts", str(tmp_path / "prompts.txt")))
    assert stop.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(sentence, said) and said.startswith("error: ") and str(tmp_path) in said
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--adam-8bit"], "--adam-8bit needs a CUDA GPU, and the device here is cpu: leave it out"),
        (["--regression-on", "images", "--regression-decoder", "nowhere"], "nowhere is no AutoencoderTiny"),
        (
            ["--regression-on", "images", "--regression-decoder", "OTHER"],
            r"--regression-decoder .*other decodes latents of 3 channels, but the network makes 8",
        ),
        (["--regression-crop", "9"], "--regression-crop is 9, but samples have 8 x 8"),
        (["--student", "shapes-student"], "--student shapes-student has another network, schedule or prediction than"),
        (["--student", "nowhere"], "nowhere is no folder, and no id on the hub"),
        (["--student", "x", "--student-lora-rank", "2"], "adapters begin as the teacher: leave one out"),
        (["--critic-warmup-steps", "4"], "--critic-warmup-steps is 4 of 4 steps: it must be less"),
        (["--critic-warmup-steps", "1", "--objective", "regression"], "--objective regression has no fake score"),
        (["--test-prompts", "x.txt"], "--test-prompts is x.txt: it is for prompts of your own"),
        (["--prompts", "PROMPTS", "--test-prompts", "no.txt"], "--test-prompts: no.txt does not exist: give"),
    ],
)
def test_what_training_could_not_do_is_refused_before_pairs_are_made(world, tmp_path, capsys, more, sentence):
    save_tiny(None, tmp_path / "other", channels=3)
    files = {"OTHER": tmp_path / "other", "PROMPTS": world / "prompts.txt"}
    more = [str(files.get(word, word)) for word in more]
    with pytest.raises(SystemExit) as stop:
        train.main([*flags(world, tmp_path / "run"), "--cache-dir", str(tmp_path / "cache"), *more])
    assert stop.value.code == 2
    assert re.search(sentence, capsys.readouterr().err.strip().splitlines()[-1])
    assert not (tmp_path / "run").exists() and not (tmp_path / "cache").exists()


def test_8_bit_states_need_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)  # as if it were not installed
    with pytest.raises(
        InputError, match=r"--adam-8bit needs the package bitsandbytes: pip install 'dmd-one-step\[cuda\]'"
    ):
        build.class_8bit(torch.device("cuda"))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--gradient-checkpointing"], "--gradient-checkpointing is for networks of diffusers"),
        (["--enable-xformers-memory-efficient-attention"], "--enable-xformers-memory-efficient-attention is for"),
        (["--regression-crop", "9"], "--regression-crop is 9, but samples have 8 x 8"),
    ],
)
def test_what_a_network_of_pixels_cannot_do_is_refused_before_it_is_taught(tmp_path, capsys, more, sentence):
    with pytest.raises(SystemExit) as stop:
        train.main(
            ["digits", "--output-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "c"), "--cpu", *more]
        )
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_tiny_decoder_is_one_of_the_network_s_latents_and_in_its_precision(world, tmp_path, capsys, monkeypatch):
    """A sentence for other channels; else what the decoder itself makes, in bf16 where that is asked for."""
    folder = str(world / "run" / "student")
    save_tiny(None, tmp_path / "other", channels=4)
    common = [PROMPTS[0], "--student", folder, "--seeds", "0", "--device", "cpu", "--no-grid"]
    with pytest.raises(SystemExit) as stop:
        sample.main([*common, "--decoder", str(tmp_path / "other"), "--out", str(tmp_path / "no")])
    assert stop.value.code == 2 and not (tmp_path / "no").exists()
    assert "decodes latents of 4 channels, but the network makes 8" in capsys.readouterr().err

    student = teachers.load(folder)
    save_tiny(student, tmp_path / "tiny")
    seen = []
    decode = codec.Tiny.decode
    monkeypatch.setattr(codec.Tiny, "decode", lambda self, x: seen.append((self, x)) or decode(self, x))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        out = tmp_path / precision
        sample.main([*common, "--decoder", str(tmp_path / "tiny"), "--precision", precision, "--out", str(out)])
        (tiny, latents), (file,) = seen.pop(), out.iterdir()
        assert {p.dtype for p in tiny.vae.parameters()} == {dtype}
        with torch.no_grad():
            expected = tiny.vae.decode(latents.to(dtype)).sample.float()[0].permute(1, 2, 0)
        with Image.open(file) as image:
            assert (pixels(image) - ((expected.clamp(-1, 1) + 1) * 127.5).round()).abs().max() <= 1


def test_prompts_without_a_teacher_for_them_are_refused(world, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["digits", "--prompts", "shapes", "--output-dir", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert "--prompts are for a text-to-image teacher" in capsys.readouterr().err
