"""Exports against what reads them: diffusers' stock pipeline, its single-file loader, and older versions."""

import contextlib
import copy
import hashlib
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import edit, save_pipeline

from dmd.cli.export import main
from dmd.denoiser import NetworkDenoiser
from dmd.errors import InputError
from dmd.noise import DDPM
from dmd.solvers import one_step
from dmd.teachers import export, layout, lora, original, stable_diffusion

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

DATA = Path(os.environ.get("DMD_TEST_DATA", ""))
WITH_DATA = pytest.mark.skipif(
    not (DATA / "sd-configs").is_dir(), reason="DMD_TEST_DATA does not name a folder of real data"
)
SCHEDULER = "scheduler/scheduler_config.json"
UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
PROMPTS = ["a red circle", "kaksi sinistä neliötä, 赤い丸 🔴", ""]
PREDICTIONS = ("epsilon", "v_prediction")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tiny pipeline as the installed packages write it."""
    folder = tmp_path_factory.mktemp("pipeline")
    save_pipeline(folder)
    return folder / "tiny"


@pytest.fixture(scope="module")
def source(written, tmp_path_factory):
    """The same as version 1.5 was written, with files of other kinds beside what belongs."""
    folder = shutil.copytree(written, tmp_path_factory.mktemp("source") / "teacher")
    shutil.rmtree(folder / "tokenizer")
    shutil.copytree(written.parent / "clip", folder / "tokenizer")
    save_file(original.with_prefix(load_file(folder / TEXT)), folder / TEXT, {"format": "pt"})
    for name in ("vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "tokenizer/x.pkl", "v1-5.ckpt"):
        (folder / name).write_bytes(b"a pickle")
    return folder


@pytest.fixture
def folder(source, tmp_path):
    """A copy of `source` that a test may change."""
    return shutil.copytree(source, tmp_path / "copy")


@pytest.fixture
def z(rng):
    return torch.randn(3, 4, 8, 8, generator=rng)


def student_of(folder):
    """A teacher's denoiser with other weights, and the rest of the teacher."""
    ours = stable_diffusion.load(folder)
    student = copy.deepcopy(ours.denoiser)
    noise = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.02 * torch.randn(p.shape, generator=noise)
    return ours, student


@pytest.fixture(scope="module")
def student(source, tmp_path_factory):
    """A student's folder, its denoiser, and the teacher."""
    ours, denoiser = student_of(source)
    folder = tmp_path_factory.mktemp("student") / "student"
    export.save_student(denoiser.net.unet.state_dict(), source, folder)
    return folder, denoiser, ours


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def stock(folder, **options):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, z, prompts=PROMPTS):
    """What users get who follow the card."""
    return pipe(prompts, latents=z, num_inference_steps=1, guidance_scale=0, output_type="latent").images


def check_same(found, expected):
    """To 1e-5 of the standard deviation: that of a taught student is 1, that of random weights up to 15."""
    assert expected.std() > 0.2
    assert (found - expected).abs().max() <= 1e-5 * expected.std()


# ----------------------------------------------------------------------------- a folder for diffusers


@pytest.mark.parametrize("prediction", PREDICTIONS)
@torch.no_grad()
def test_the_stock_pipeline_makes_the_student_s_samples(folder, tmp_path, z, prediction, caplog, monkeypatch):
    """And it warns of nothing."""
    for package in ("diffusers", "transformers"):
        monkeypatch.setattr(logging.getLogger(package), "propagate", True)
    edit(folder / SCHEDULER, prediction_type=prediction)
    ours, denoiser = student_of(folder)
    export.save_student(denoiser.net.unet.state_dict(), folder, tmp_path / "student")
    expected = one_step(denoiser, z, ours.encode(PROMPTS))
    with caplog.at_level(logging.WARNING):
        pipe = stock(tmp_path / "student")
        found = latents(pipe, z)
    check_same(found, expected)
    assert pipe.scheduler.timesteps.tolist() == [999]
    images = pipe(PROMPTS, latents=z, num_inference_steps=1, guidance_scale=0, output_type="pt").images
    torch.testing.assert_close(2 * images - 1, ours.codec.decode(expected).clamp(-1, 1), rtol=0, atol=1e-5)
    assert not caplog.records


@pytest.mark.parametrize("steps", [2, 7, 50, 100, 999, 1000, 1024])
@pytest.mark.parametrize("prediction", layout.PREDICTIONS.values())
def test_any_table_is_left_at_its_last_entry_for_x0(steps, prediction, z):
    """The scheduler's step on any network's output is the denoiser's own conversion."""
    from diffusers import LCMScheduler

    schedule = DDPM(steps)
    config = export.scheduler_config(layout.Settings(schedule, prediction, (4, 8, 8), "AutoencoderKL"))
    scheduler = LCMScheduler.from_config(config)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [steps - 1]
    out = z.flip(0)
    skip, scale = prediction(*schedule(torch.ones(1)))
    found = scheduler.step(out, scheduler.timesteps[0], z).prev_sample
    torch.testing.assert_close(found, skip * z + scale * out, rtol=2e-6, atol=1e-5)


@torch.no_grad()
def test_our_loader_reads_it_again(student, z):
    folder, denoiser, ours = student
    again = stable_diffusion.load(folder)
    assert again.denoiser.prediction is denoiser.prediction
    assert (again.denoiser.schedule, again.shape) == (denoiser.schedule, ours.shape)
    for mine, theirs in ((again.denoiser, denoiser), (again.text.network, ours.text.network)):
        for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    found = one_step(again.denoiser, z, again.encode(PROMPTS))
    assert torch.equal(found, one_step(denoiser, z, ours.encode(PROMPTS)))


def test_what_is_the_teacher_s_is_copied_byte_for_byte(source, student):
    folder, _, _ = student
    written = {"README.md", "model_index.json", SCHEDULER, UNET}
    copied = set(files(folder)) - written
    assert copied == {
        "text_encoder/config.json", TEXT, "vae/config.json", VAE, "unet/config.json", "tokenizer/vocab.json",
        "tokenizer/merges.txt", "tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json",
    }  # fmt: skip
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in copied)


@torch.no_grad()
def test_what_new_packages_write_is_written_for_old_ones(written, student, tmp_path, z):
    """transformers 5 leaves out `text_model.` and vocab.json, without which version 4 takes random weights or fails."""
    _, denoiser, _ = student
    export.save_student(denoiser.net.unet.state_dict(), written, tmp_path / "student")
    with safe_open(tmp_path / "student" / TEXT, framework="pt") as opened:
        assert all(name.startswith("text_model.") for name in opened.keys())  # noqa: SIM118
        assert opened.metadata() == {"format": "pt"}
    vocabulary = json.loads((tmp_path / "student" / "tokenizer" / "vocab.json").read_text())
    assert vocabulary == json.loads((written.parent / "clip" / "vocab.json").read_text())
    merges = [(f / "merges.txt").read_text() for f in (tmp_path / "student" / "tokenizer", written.parent / "clip")]
    assert merges[0] == merges[1]
    torch.testing.assert_close(latents(stock(tmp_path / "student"), z), latents(stock(student[0]), z), rtol=0, atol=0)


@torch.no_grad()
def test_half_precision(student, source, tmp_path, z):
    folder, denoiser, _ = student
    export.save_student(denoiser.net.unet.state_dict(), source, tmp_path / "half", half=True)
    tensors, full = load_file(tmp_path / "half" / UNET), load_file(folder / UNET)
    assert {v.dtype for v in tensors.values()} == {torch.float16}
    assert {v.dtype for v in full.values()} == {torch.float32}
    assert all(torch.equal(v, full[k].half()) for k, v in tensors.items())
    torch.testing.assert_close(latents(stock(tmp_path / "half"), z), latents(stock(folder), z), rtol=0, atol=0.05)
    export.convert_student(folder, tmp_path / "again", half=True)
    assert files(tmp_path / "again") == files(folder)
    for name in files(folder):
        if name != "README.md":
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "half" / name).read_bytes()
    cards = [(f / "README.md").read_text().split("## Files") for f in (folder, tmp_path / "half", tmp_path / "again")]
    assert cards[2] == [cards[0][0], cards[1][1]]  # its own words, the checksums of these weights


@pytest.mark.parametrize("told", ["dtype", "torch_dtype", None])
@torch.no_grad()
def test_a_teacher_in_half_precision(folder, tmp_path, z, told):
    """transformers 5 would load its text encoder in float16, and diffusers the UNet that reads it in float32."""
    for name in (UNET, VAE, TEXT):
        save_file({k: v.half() for k, v in load_file(folder / name).items()}, folder / name, {"format": "pt"})
    edit(folder / "text_encoder" / "config.json", dtype=None, torch_dtype=None)
    edit(folder / "text_encoder" / "config.json", **({told: "float16"} if told else {}))
    ours, denoiser = student_of(folder)
    export.save_student(denoiser.net.unet.state_dict(), folder, tmp_path / "student")
    assert (tmp_path / "student" / TEXT).read_bytes() == (folder / TEXT).read_bytes()
    check_same(latents(stock(tmp_path / "student"), z), one_step(denoiser, z, ours.encode(PROMPTS)))


def test_a_bfloat16_student_is_written_as_float32(student, source, tmp_path):
    unet = copy.deepcopy(student[1].net.unet)
    torch.nn.Module.to(unet, torch.bfloat16)
    export.save_student(unet.to(memory_format=torch.channels_last).state_dict(), source, tmp_path / "student")
    tensors = load_file(tmp_path / "student" / UNET)
    assert {v.dtype for v in tensors.values()} == {torch.float32}
    assert all(torch.equal(v, tensors[k]) for k, v in unet.float().state_dict().items())


def test_a_variant_is_written_under_the_plain_name(folder, student, tmp_path):
    for name in (UNET, VAE, TEXT):
        file = folder / name
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    stable_diffusion.load(folder, variant="fp16").save(student[1], tmp_path / "student", {})
    assert files(tmp_path / "student") == files(student[0])


def test_shards_become_one_file(folder, student, tmp_path):
    tensors = load_file(folder / VAE)
    (folder / VAE).unlink()
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    where = {k: names[i % 2] for i, k in enumerate(tensors)}
    for name in names:
        save_file({k: v for k, v in tensors.items() if where[k] == name}, folder / "vae" / name, {"format": "pt"})
    (folder / f"{VAE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    export.save_student(student[1].net.unet.state_dict(), folder, tmp_path / "student")
    found = load_file(tmp_path / "student" / VAE)
    assert found.keys() == tensors.keys() and all(torch.equal(v, tensors[k]) for k, v in found.items())
    stable_diffusion.load(tmp_path / "student")


def test_the_card_says_how_to_use_it(student, source, tmp_path):
    text = (student[0] / "README.md").read_text()
    assert "`teacher`" in text and str(source) not in text
    assert "num_inference_steps=1, guidance_scale=0" in text and "negative prompt" in text
    assert 'python sample.py "a prompt" --student FOLDER' in text
    card = export.model_card("quick", "owner/name", {"FD-ResNet56": 1.25}, {"license": "creativeml-openrail-m"})
    head = card.split("---")[1].splitlines()
    assert {"base_model: owner/name", "license: creativeml-openrail-m", "library_name: diffusers"} <= set(head)
    assert "| FD-ResNet56 | 1.25 |" in card
    export.save_student(student[1].net.unet.state_dict(), source, tmp_path / "student", card=card)
    written = (tmp_path / "student" / "README.md").read_text()
    assert written.startswith(card.rstrip())
    for path in (tmp_path / "student").glob("*/*.safetensors"):
        data = path.read_bytes()
        assert f"{len(data):,} | `{hashlib.sha256(data).hexdigest()}`" in written
    export.convert_student(tmp_path / "student", tmp_path / "half", half=True)
    again = (tmp_path / "half" / "README.md").read_text()
    assert again.count("## Files") == 1 and again.startswith(card.rstrip())
    assert hashlib.sha256((tmp_path / "half" / UNET).read_bytes()).hexdigest() in again


@torch.no_grad()
def test_the_card_s_python_runs(student, monkeypatch, tmp_path):
    code = (student[0] / "README.md").read_text().split("```python")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code.replace("FOLDER", str(student[0])), {})
    assert (tmp_path / "image.png").stat().st_size > 0


@torch.no_grad()
def test_a_student_of_adapters_is_written_whole_and_as_adapters_alone(folder, tmp_path, z, monkeypatch):
    """Both are the same images in the stock pipeline: the student's folder, and the teacher with its adapters."""
    pytest.importorskip("peft")
    ours = stable_diffusion.load(folder)
    adapted = lora.AdaptedNet(lora.SharedNet(ours.denoiser.net), 3)
    g = torch.Generator().manual_seed(8)
    for parameter in adapted.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=g))
    denoiser = NetworkDenoiser(adapted, ours.denoiser.schedule, ours.denoiser.prediction)
    expected = one_step(denoiser, z, ours.encode(PROMPTS))
    teacher = one_step(stable_diffusion.load(folder).denoiser, z, ours.encode(PROMPTS))
    assert (expected - teacher).abs().mean() > 0.02 * teacher.std()
    ours.save(denoiser, tmp_path / "student", {"generator updates": "7"})
    check_same(latents(stock(tmp_path / "student"), z), expected)
    code = (tmp_path / "student-lora" / "README.md").read_text().split("```python")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(code.replace("FOLDER", str(tmp_path / "student-lora")).replace("TEACHER", str(folder)), names)
    check_same(latents(names["pipe"], z), expected)
    names["pipe"].unload_lora_weights()
    check_same(latents(names["pipe"], z), teacher)


# ----------------------------------------------------------------------------- licence


LICENCE = """---
license: other
license_name: open-rail "m"
license_link: LICENSE.md
tags: [a, b]
---
# A teacher
"""


@pytest.mark.parametrize(
    ("readme", "facts"),
    [
        ("---\nlicense: creativeml-openrail-m\ntags:\n- a\n---\n# x", {"license": "creativeml-openrail-m"}),
        (LICENCE, {"license": "other", "license_name": 'open-rail "m"', "license_link": "LICENSE.md"}),
        ("# x\nlicense: mit", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\ntags: a\n---\n", {}),
        (None, {}),
    ],
)
def test_a_licence_is_what_the_teacher_s_readme_tells(tmp_path, readme, facts):
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert layout.licence(tmp_path) == facts
    if readme is not None:  # and what a student's card tells is read back as the same
        (tmp_path / "README.md").write_text(export.model_card("a", "b", licence=facts))
        assert layout.licence(tmp_path) == facts


def test_a_student_inherits_its_teacher_s_licence(folder, student, tmp_path):
    """Named in the card, with the files that hold its text; also when it is exported again."""
    (folder / "README.md").write_text(LICENCE)
    (folder / "LICENSE.md").write_text("the terms")
    (folder / "NOTICE").write_bytes(b"\xff notice")
    ours = stable_diffusion.load(folder)
    ours.save(student[1], tmp_path / "student", {})
    export.save_student(student[1].net.unet.state_dict(), folder, tmp_path / "plain")
    export.convert_student(tmp_path / "student", tmp_path / "half", half=True)
    for name in ("student", "plain", "half"):
        assert layout.licence(tmp_path / name) == layout.licence(folder)
        assert 'The teacher\'s licence applies: open-rail "m".' in (tmp_path / name / "README.md").read_text()
        assert (tmp_path / name / "LICENSE.md").read_text() == "the terms"
        assert (tmp_path / name / "NOTICE").read_bytes() == b"\xff notice"


# ----------------------------------------------------------------------------- whole or not at all


class Killed(BaseException):
    pass


def kill_at(monkeypatch, moment):
    """A kill as the n-th file has been written: nothing is tidied up. True if there were so many."""
    count, reached = itertools.count(), []
    fsync = os.fsync

    def stop(handle):
        fsync(handle)
        if next(count) == moment:
            reached.append(True)
            raise Killed

    monkeypatch.setattr(os, "fsync", stop)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)
    return reached


@pytest.mark.parametrize("before", [False, True], ids=["none before", "one before"])
def test_a_killed_write_leaves_nothing_that_loads_as_complete(student, source, tmp_path, monkeypatch, before):
    weights = load_file(student[0] / UNET)
    old = copy.deepcopy(student[1].net.unet)
    for p in old.parameters():
        p.data.zero_()
    for moment in itertools.count():
        place = tmp_path / str(moment)
        place.mkdir()
        if before:
            export.save_student(old.state_dict(), source, place / "student")
        with monkeypatch.context() as patch:
            reached = kill_at(patch, moment)
            with contextlib.suppress(Killed):
                export.save_student(student[1].net.unet.state_dict(), source, place / "student")
        if not reached:
            break
        if (place / ".tmp-student").exists() and not (place / ".tmp-student" / "model_index.json").exists():
            with pytest.raises(InputError, match="model_index.json cannot be read"):
                stable_diffusion.load(place / ".tmp-student")
        if (place / "student").exists():
            found = load_file(place / "student" / UNET)
            whole = [all(torch.equal(v, w[k]) for k, v in found.items()) for w in (weights, old.state_dict())]
            assert any(whole) and files(place / "student") == files(student[0])
        else:
            assert not before or moment > 10
        export.save_student(student[1].net.unet.state_dict(), source, place / "student")
        assert [p.name for p in place.iterdir()] == ["student"]
    assert moment > 12


def test_a_full_disk_leaves_the_student_that_was_there(student, source, tmp_path, monkeypatch):
    export.save_student(student[1].net.unet.state_dict(), source, tmp_path / "student")
    before = {name: (tmp_path / "student" / name).read_bytes() for name in files(tmp_path / "student")}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr(export.checkpoint, "save_tensors", full)
    with pytest.raises(OSError, match="No space"):
        export.save_student(student[1].net.unet.state_dict(), source, tmp_path / "student", half=True)
    assert {name: (tmp_path / "student" / name).read_bytes() for name in files(tmp_path / "student")} == before
    assert [p.name for p in tmp_path.iterdir()] == ["student"]


def test_what_is_refused(student, source, folder, tmp_path, capsys):
    unet = student[1].net.unet
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    for place, sentence in (
        (tmp_path / "mine", "exists and is no one-step student that could be replaced"),
        (tmp_path / "mine" / "notes.txt", "exists and is no one-step student"),
        (folder, "is what the export is made of"),
    ):
        with pytest.raises(InputError, match=sentence):
            export.save_student(unet.state_dict(), folder, place)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"
    shutil.copytree(source, tmp_path / "teacher")
    with pytest.raises(InputError, match="is no one-step student that could be replaced"):
        export.save_student(unet.state_dict(), folder, tmp_path / "teacher")
    with pytest.raises(InputError, match="teacher is no one-step student: its scheduler"):
        export.convert_student(tmp_path / "teacher", tmp_path / "new")
    with pytest.raises(InputError, match=r"of another architecture than the student: tensor '.*' is"):
        export.save_student(torch.nn.Linear(2, 2).state_dict(), source, tmp_path / "new")
    broken = copy.deepcopy(unet)
    broken.conv_in.bias.data[0] = 1e6
    with pytest.raises(InputError, match=r"'conv_in.bias' has values that are not finite as float16"):
        export.save_student(broken.state_dict(), source, tmp_path / "new", half=True)
    shutil.rmtree(folder / "tokenizer")
    (folder / "tokenizer").mkdir()
    with pytest.raises(InputError, match=r"tokenizer holds no CLIP tokenizer"):
        export.save_student(unet.state_dict(), folder, tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "mine", "teacher"]


# ----------------------------------------------------------------------------- one file in the original layout


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@torch.no_grad()
def test_diffusers_reads_the_single_file(folder, tmp_path, z, act, prediction):
    """Both text encoders: of version 1.x, and of 2.x, which has GELU and joined projections."""
    from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    edit(folder / SCHEDULER, prediction_type=prediction)
    edit(folder / "text_encoder" / "config.json", hidden_act=act)
    _, denoiser = student_of(folder)
    student, file = tmp_path / "student", tmp_path / "student.safetensors"
    export.save_student(denoiser.net.unet.state_dict(), folder, student)
    export.single_file(student, file)
    unet = UNet2DConditionModel.from_single_file(file, config=str(student), subfolder="unet", local_files_only=True)
    vae = AutoencoderKL.from_single_file(file, config=str(student), subfolder="vae", local_files_only=True)
    pipe = stock(student)
    for found, expected in ((unet, pipe.unet), (vae, pipe.vae)):
        weights = expected.state_dict()
        assert found.state_dict().keys() == weights.keys()
        assert all(torch.equal(v, weights[k]) for k, v in found.state_dict().items())
    single = StableDiffusionPipeline.from_single_file(file, config=str(student), local_files_only=True)
    single.set_progress_bar_config(disable=True)
    # diffusers 0.31 makes its own scheduler for single files
    single.scheduler = LCMScheduler.from_pretrained(student, subfolder="scheduler")
    weights = pipe.text_encoder.state_dict()
    assert all(torch.equal(v, weights[k]) for k, v in single.text_encoder.state_dict().items())
    torch.testing.assert_close(latents(single, z), latents(pipe, z), rtol=0, atol=0)


def test_names_of_the_single_file(student, tmp_path):
    export.single_file(student[0], tmp_path / "student.safetensors")
    tensors = load_file(tmp_path / "student.safetensors")
    assert {name.split(".")[0] for name in tensors} == {"model", "first_stage_model", "cond_stage_model"}
    text = [name for name in tensors if name.startswith("cond_stage_model.")]
    assert text and all(name.startswith("cond_stage_model.transformer.text_model.") for name in text)
    assert tensors["first_stage_model.decoder.mid.attn_1.q.weight"].shape == (8, 8, 1, 1)
    for name in (
        "model.diffusion_model.input_blocks.2.0.op.weight",
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight",
        "model.diffusion_model.middle_block.1.proj_in.weight",
        "model.diffusion_model.output_blocks.1.1.conv.weight",
        "first_stage_model.encoder.down.0.downsample.conv.weight",
        "first_stage_model.decoder.up.1.upsample.conv.weight",
    ):
        assert name in tensors


@torch.no_grad()
def test_the_single_file_in_half_precision(student, tmp_path, z):
    from diffusers import LCMScheduler, StableDiffusionPipeline

    export.single_file(student[0], tmp_path / "full.safetensors")
    export.single_file(student[0], tmp_path / "half.safetensors", half=True)
    full, half = (load_file(tmp_path / f"{name}.safetensors") for name in ("full", "half"))
    assert {v.dtype for v in half.values()} == {torch.float16}
    assert full.keys() == half.keys()
    assert all(torch.equal(full[k].half(), v) for k, v in half.items())
    pipe = StableDiffusionPipeline.from_single_file(
        tmp_path / "half.safetensors", config=str(student[0]), local_files_only=True
    )
    pipe.scheduler = LCMScheduler.from_pretrained(student[0], subfolder="scheduler")
    torch.testing.assert_close(latents(pipe, z), latents(stock(student[0]), z), rtol=0, atol=0.05)


def test_old_names_of_an_autoencoder_s_attention(student, tmp_path):
    """The files of version 1.5 have them."""
    folder = shutil.copytree(student[0], tmp_path / "student")
    export.single_file(folder, tmp_path / "new.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(folder / VAE)
    for a, b in old.items():
        tensors = {k.replace(f"attentions.0.{a}.", f"attentions.0.{b}."): v for k, v in tensors.items()}
    save_file(tensors, folder / VAE, {"format": "pt"})
    export.single_file(folder, tmp_path / "old.safetensors")
    new, found = load_file(tmp_path / "new.safetensors"), load_file(tmp_path / "old.safetensors")
    assert new.keys() == found.keys() and all(torch.equal(v, found[k]) for k, v in new.items())


def test_networks_without_a_place_in_the_layout_are_refused(student, tmp_path):
    folder = shutil.copytree(student[0], tmp_path / "student")
    for name in ("add_embedding.linear_1.weight", "down_blocks.0.attentions.0.to_q.weight"):
        save_file({**load_file(student[0] / UNET), name: torch.zeros(1)}, folder / UNET)
        with pytest.raises(InputError, match=f"no place for the tensor '{name}'"):
            export.single_file(folder, tmp_path / "x.safetensors")
    edit(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    with pytest.raises(InputError, match="AutoencoderTiny: the original layout holds none but AutoencoderKL"):
        export.single_file(folder, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


@WITH_DATA
@pytest.mark.parametrize(("name", "layers"), [("sd-v1-5", 12), ("sd-2-1-base", 23)])
def test_the_layout_of_the_real_networks(name, layers):
    """Counts of the original files (v1-5-pruned-emaonly: 686 and 248), and back through diffusers' own conversion."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils
    from transformers import CLIPTextConfig, CLIPTextModel

    folder = DATA / "sd-configs" / name
    configs = [AutoencoderKL.load_config(folder / "vae"), UNet2DConditionModel.load_config(folder / "unet")]
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(configs[0]).state_dict()
        unet = UNet2DConditionModel.from_config(configs[1]).state_dict()
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    assert (len(original.vae(vae)), len(original.unet(unet))) == (248, 686)
    back = single_file_utils.convert_ldm_vae_checkpoint(original.vae(vae), configs[0])
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in vae.items()}
    assert all(v is vae[k] for k, v in back.items() if "mid_block.attentions" not in k)
    back = single_file_utils.convert_ldm_unet_checkpoint(original.unet(unet), configs[1])
    assert back.keys() == unet.keys() and all(v is unet[k] for k, v in back.items())
    names = original.open_clip(text.state_dict()) if name == "sd-2-1-base" else original.clip(text.state_dict())
    assert len(names) == 4 + layers * (12 if name == "sd-2-1-base" else 16)


# ----------------------------------------------------------------------------- the command


def test_the_command(student, tmp_path, capsys):
    folder, file = tmp_path / "half", tmp_path / "one.safetensors"
    main([str(student[0]), "--out", str(folder), "--half"])
    main([str(student[0]), "--out", str(file)])
    assert capsys.readouterr().out == f"exported: {folder}\nexported: {file}\n"
    assert {v.dtype for v in load_file(folder / UNET).values()} == {torch.float16}
    export.single_file(student[0], tmp_path / "other.safetensors")
    assert file.read_bytes() == (tmp_path / "other.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["{tmp}/none", "--out", "{tmp}/new"], "is no folder: give the folder of a student"),
        (["{student}", "--out", "{tmp}"], "exists already: give another --out"),
        (["{source}", "--out", "{tmp}/new"], "is no one-step student: its scheduler is not LCMScheduler"),
        (["{tmp}", "--out", "{tmp}/new"], "model_index.json cannot be read"),
        (["{student}"], "--out"),
    ],
)
def test_wrong_arguments_get_a_sentence(student, source, tmp_path, capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        main([a.format(student=student[0], source=source, tmp=tmp_path) for a in arguments])
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("error: ") and sentence in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------- older versions

OLD = ["diffusers==0.31.0", "transformers==4.57.*", "ftfy"]
"""Without ftfy, transformers 4 puts spaces around Chinese characters, in any pipeline."""

OLD_PROGRAM = """
import sys
import diffusers, torch, transformers
from diffusers import LCMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

assert diffusers.__version__ == "0.31.0" and transformers.__version__.startswith("4.57."), transformers.__version__
torch.set_num_threads(1)
folder, file, inputs, out, *prompts = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
single = StableDiffusionPipeline.from_single_file(file, config=folder, local_files_only=True)
single.scheduler = LCMScheduler.from_pretrained(folder, subfolder="scheduler")
z, found = load_file(inputs)["z"], {}
for name, p in (("folder", pipe), ("single", single)):
    done = p(prompts, latents=z, num_inference_steps=1, guidance_scale=0, output_type="latent")
    found[name] = done.images
save_file(found, out)
"""


@pytest.fixture(scope="module")
def old_python(tmp_path_factory):
    """Python with the oldest diffusers that is supported and the last transformers 4; torch is this environment's."""
    home = tmp_path_factory.mktemp("old") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    python = home / "bin" / "python"
    done = subprocess.run([python, "-m", "pip", "install", "-q", *OLD], capture_output=True, text=True, timeout=900)
    if done.returncode:
        pytest.skip(f"{' and '.join(OLD)} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    # after the old packages, so that only what they lack comes from here
    (Path(own.stdout.strip()) / "torch-of-another.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["source", "written"], ids=["teacher of old packages", "teacher of new packages"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@torch.no_grad()
def test_older_versions_load_the_export(old_python, request, tmp_path, z, kind, prediction):
    teacher = shutil.copytree(request.getfixturevalue(kind), tmp_path / "teacher")
    edit(teacher / SCHEDULER, prediction_type=prediction)
    ours, denoiser = student_of(teacher)
    export.save_student(denoiser.net.unet.state_dict(), teacher, tmp_path / "student")
    export.single_file(tmp_path / "student", tmp_path / "one.safetensors")
    save_file({"z": z}, tmp_path / "in.safetensors")
    arguments = [tmp_path / name for name in ("student", "one.safetensors", "in.safetensors", "out.safetensors")]
    done = subprocess.run(
        [old_python, "-c", OLD_PROGRAM, *map(str, arguments), *PROMPTS],
        capture_output=True, text=True, timeout=600, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "newly initialized" not in done.stderr
    found = load_file(tmp_path / "out.safetensors")
    expected = one_step(denoiser, z, ours.encode(PROMPTS))
    for name in ("folder", "single"):
        check_same(found[name], expected)
