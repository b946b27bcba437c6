"""`dmd synthesize` as users call it: a small student, its teacher, torchrun, Ray; and what is wrong gets a sentence."""

import errno
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "teachers"))

import stub as stubs
import tiny

from dmd import seeding, shards, synthesis, teachers
from dmd.cli import synthesize as command
from dmd.cli.flags import read
from dmd.data import groups
from dmd.data.images import to_uint8
from dmd.generate import REPLICAS, caption_source, guided_steps, student_generator
from dmd.solvers import one_step
from dmd.teachers import pixel
from tests import tiny_clips

ROOT = Path(__file__).parents[1]
CONFIG = pixel.PixelConfig(("a", "b", "c"), 3, 8, 8, (1,), 1, (False,))


def network(folder, seed):
    denoiser = pixel.build(CONFIG, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    pixel.save(denoiser.net.get_submodule("unet"), CONFIG, folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: a student of the classes a, b and c beside its teacher."""
    folder = tmp_path_factory.mktemp("run")
    network(folder / "student", 1)
    network(folder / "teacher", 2)
    (folder / "config.json").write_text(json.dumps({"pairs": {"guidance": 1.5}}))
    (folder / "summary.json").write_text(json.dumps({"teacher": {"folder": str(folder / "teacher")}}))
    (folder / "captions.txt").write_text("b\n\na\nc\nb\n")
    return folder


def flags(run, out, *more):
    values = [
        "--out",
        str(out),
        "--student",
        str(run / "student"),
        "--shard-size",
        "6",
        "--replicas",
        "3",
        "--batch-size",
        "4",
    ]
    return [str(run / "captions.txt"), *values, "--image-format", "png", "--device", "cpu", *more]


def expected(run, steps, caption, replica, number):
    """By the generator's own functions."""
    folder, scale = (run / "student", 1.0) if steps == 1 else (run / "teacher", 1.5)
    pipeline = pixel.load(folder)
    generator = student_generator(pipeline.denoiser) if steps == 1 else guided_steps(pipeline, scale, steps)
    source = caption_source(pipeline, generator, pipeline.codec, 0, torch.device("cpu"))
    return to_uint8(source([caption], torch.tensor([number * REPLICAS + replica]), 0))[0]


@pytest.mark.parametrize(("more", "steps"), [((), 1), (("--teacher", "--steps", "3"), 3)])
def test_a_data_set_has_the_students_or_its_teachers_images(run, tmp_path, capsys, more, steps):
    command.main(flags(run, tmp_path / "set", *more))
    said = capsys.readouterr().out
    assert "has 1 empty lines" in said and "has 1 captions that were there before" in said
    assert "png" in said and "9 images of 3 captions in 2 shards, 0 dropped" in said
    assert "was not measured; --diversity 64" in said
    found = list(groups.ImageGroups(tmp_path / "set", 3, shuffle=False))
    assert [i.caption for i in found] == ["b", "a", "c"]
    for item in found:
        for replica, image in enumerate(item.images):
            wanted = expected(run, steps, item.caption, replica, item.caption_id)
            assert (image.int() - wanted.int()).abs().max() <= 1
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    source = manifest["spec"]["source"]
    assert source["network"] == pixel.load(run / ("student" if steps == 1 else "teacher")).digest()
    assert (source["steps"], source["guidance"]) == (steps, 1.5) and manifest["complete"]
    assert (tmp_path / "set" / "contact_sheet.png").stat().st_size > 0
    command.main(flags(run, tmp_path / "set", *more))
    assert "made 0 images" in capsys.readouterr().out


def test_a_slurm_array_makes_the_same_bytes(run, tmp_path, capsys):
    command.main(flags(run, tmp_path / "one"))
    for worker in ("1", "0"):
        command.main(flags(run, tmp_path / "two", "--workers", "2", "--worker", worker))
    for name in ("00000.tar", "00001.tar", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_diversity_is_printed_beside_the_teachers(run, tmp_path, capsys):
    lpips = pytest.importorskip("lpips")
    torch.manual_seed(0)
    net = lpips.LPIPS(net="squeeze", pnet_rand=True, verbose=False).net
    weights = {k.replace(k.split(".")[0], "features", 1): v for k, v in net.state_dict().items()}
    torch.save(weights, tmp_path / "squeeze.pth")
    extra = ["--diversity", "2", "--lpips-backbone", "squeeze", "--lpips-weights", str(tmp_path / "squeeze.pth")]
    command.main(flags(run, tmp_path / "set", *extra))
    said = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  this data set") for line in said) and any(
        line.startswith("  teacher ") for line in said
    )
    found = json.loads((tmp_path / "set" / "diversity.json").read_text())
    assert found.keys() == {"this data set", "teacher"} and found["teacher"]["network"] == "LPIPS-squeeze"
    assert found["teacher"]["lpips"] != found["this data set"]["lpips"]


def test_clip_scores_are_stored_and_low_ones_left_out(run, tmp_path, capsys):
    """Scores against transformers' own logits; half of the images pass their median."""
    from transformers import CLIPModel, CLIPTokenizer

    folder = tiny_clips.of_transformers(tmp_path / "clip", preprocessing=False)
    command.main(flags(run, tmp_path / "all", "--clip", str(folder)))
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    scores = {}
    for number in range(2):
        with tarfile.open(tmp_path / "all" / f"{number:05d}.tar") as archive:
            for name in [n for n in archive.getnames() if n.endswith(".json")]:
                facts = json.loads(archive.extractfile(name).read())
                scores[facts["caption_id"], facts["replica"]] = facts["clip_score"]
    image = expected(run, 1, "b", 2, 0).float() / 255
    x = torch.nn.functional.interpolate(image[None], (32, 32), mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
    x = (x - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        out = model(**tokenizer(["b"], return_tensors="pt"), pixel_values=x)
    assert scores[0, 2] == pytest.approx((out.logits_per_image / model.logit_scale.exp()).item(), abs=2e-2)
    limit = sorted(scores.values())[4]
    command.main(flags(run, tmp_path / "some", "--clip", str(folder), "--min-clip-score", str(limit)))
    assert "5 images of 3 captions in 2 shards, 4 dropped" in capsys.readouterr().out
    read = {(i.caption_id, r) for i in groups.ImageGroups(tmp_path / "some", 1) for r in i.replicas}
    assert read <= {k for k, v in scores.items() if v >= limit}


def test_stable_diffusion_draws_captions_of_any_length(tmp_path):
    """A tiny random pipeline in version 1.5's layout, by one step and by two guided ones, from the same noise."""
    tiny.save_pipeline(tmp_path)
    texts = ["a red cat", "/ ..\\ 🔴", "very " * 2000 + "long"]
    (tmp_path / "c.txt").write_text("\n".join(texts), encoding="utf-8")
    argv = [str(tmp_path / "c.txt"), "--student", str(tmp_path / "tiny"), "--replicas", "2", "--shard-size", "4"]
    argv += ["--batch-size", "4", "--image-format", "png", "--device", "cpu"]
    command.main([*argv, "--out", str(tmp_path / "one")])
    command.main([*argv, "--out", str(tmp_path / "two"), "--steps", "2", "--guidance-scale", "3", "--resize", "8"])
    one, two = (list(groups.ImageGroups(tmp_path / name, 2, shuffle=False)) for name in ("one", "two"))
    assert [i.caption for i in one] == [i.caption for i in two] == texts
    assert one[0].images[0].shape == (3, 16, 16) and two[0].images[0].shape == (3, 8, 8)
    pipeline = teachers.load(tmp_path / "tiny")
    z = seeding.normal(0, seeding.Stream.SYNTHESIS, 0, torch.tensor([REPLICAS + 1]), pipeline.shape)
    with torch.no_grad():
        wanted = to_uint8(pipeline.codec.decode(one_step(pipeline.denoiser, z, pipeline.encode([texts[1]]))))[0]
    assert (one[1].images[1].int() - wanted.int()).abs().max() <= 1
    source = json.loads((tmp_path / "two" / "manifest.json").read_text())["spec"]["source"]
    assert (source["kind"], source["steps"], source["guidance"]) == ("many steps", 2, 3.0)


WRONG = {
    "unknown student": (["--student", "nowhere"], "nowhere is no folder"),
    "unknown caption": ([], "there is no class 'd'"),
    "shard size": (["--shard-size", "7"], "--shard-size 7 is no multiple of --replicas 3"),
    "no replicas": (["--replicas", "0"], "--replicas is 0"),
    "quality": (["--quality", "101"], "--quality is 101"),
    "guidance of one step": (["--guidance-scale", "2"], "a one-step student has its guidance built in"),
    "score without a model": (["--min-clip-score", "0.2"], "needs --clip"),
    "a worker alone": (["--worker", "1"], "--worker and --workers go together"),
    "worker out of range": (["--worker", "2", "--workers", "2"], "--worker is 2 and --workers 2"),
    "no clip": (["--clip", "/nowhere"], "the CLIP /nowhere cannot be had"),
    "diversity of one": (["--replicas", "1", "--diversity", "2"], "give --replicas 2 or more"),
    "device": (["--device", "tpu9"], "--device is 'tpu9'"),
    "seed": (["--seed", "-4"], "--seed is -4"),
}


def refused(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        command.main(argv)
    last = [x for x in capsys.readouterr().err.replace("\r", "\n").splitlines() if x.strip()][-1]
    assert caught.value.code == 2 and last.startswith("error: "), last
    return last


@pytest.mark.parametrize("name", WRONG)
def test_wrong_flags_get_a_sentence_and_write_nothing(run, tmp_path, capsys, name):
    more, sentence = WRONG[name]
    argv = flags(run, tmp_path / "set", *more)
    if name == "unknown caption":
        (tmp_path / "c.txt").write_text("a\nd\n")
        argv[0] = str(tmp_path / "c.txt")
    assert sentence in refused(argv, capsys)
    assert not (tmp_path / "set").exists()


CAPTIONS = {
    "nothing": (b"\n \n", "holds no prompt"), "not UTF-8": (b"a\nb\xff\n", "line 2 is not UTF-8 (byte 2)"),
    "NUL": (b"a\0b\n", "line 1: a prompt must not hold the character NUL"),
}  # fmt: skip


@pytest.mark.parametrize("name", CAPTIONS)
def test_wrong_captions_get_a_sentence_and_write_nothing(run, tmp_path, capsys, name):
    content, sentence = CAPTIONS[name]
    (tmp_path / "c.txt").write_bytes(content)
    argv = flags(run, tmp_path / "set")
    argv[0] = str(tmp_path / "c.txt")
    assert sentence in refused(argv, capsys) and not (tmp_path / "set").exists()


def test_captions_of_10_kb_and_other_scripts_are_kept_verbatim(tmp_path):
    texts = ["very " * 2000 + "long", "../../etc/passwd", "دائرة حمراء", "👩‍🚀", 'a\\b:c*?"<>|', "-rf *"]
    (tmp_path / "c.txt").write_text("\n".join(texts), encoding="utf-8")
    captions, notes = command.read_captions(str(tmp_path / "c.txt"))
    assert captions == texts and len(notes) == 1 and "1 captions of more than 1000 characters" in notes[0]
    before = set(tmp_path.parent.iterdir())
    synthesis.work(stubs.job(tmp_path / "set", captions=texts, count=len(texts)))
    assert [i.caption for i in groups.ImageGroups(tmp_path / "set", 4, shuffle=False)] == texts
    assert set(tmp_path.parent.iterdir()) == before
    assert {p.suffix for p in (tmp_path / "set").iterdir()} <= {".tar", ".parquet", ".json", ""}


def test_another_data_set_in_the_folder_gets_a_sentence(run, tmp_path, capsys):
    command.main(flags(run, tmp_path / "set"))
    before = (tmp_path / "set" / "00000.tar").read_bytes()
    capsys.readouterr()
    assert "holds images with seed = 0, but 1 is asked for" in refused(
        flags(run, tmp_path / "set", "--seed", "1"), capsys
    )
    assert (tmp_path / "set" / "00000.tar").read_bytes() == before


def test_a_full_disk_gets_a_sentence_and_the_same_command_goes_on(run, tmp_path, capsys, monkeypatch):
    """In the middle of the second shard: the first stays, nothing half written keeps its name."""
    real, calls = shards.ShardWriter.add, []

    def add(self, *values):
        calls.append(self.name)
        if len(calls) == 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.folder / f"{self.name}.tar"))
        real(self, *values)

    monkeypatch.setattr(shards.ShardWriter, "add", add)
    said = refused(flags(run, tmp_path / "set"), capsys)
    assert os.strerror(errno.ENOSPC) in said and "00001.tar" in said
    assert {p.name for p in (tmp_path / "set").iterdir() if not p.name.startswith(".lock")} == {
        "manifest.json", "00000.tar", "00000.parquet", "00000_stats.json",
    }  # fmt: skip
    command.main(flags(run, tmp_path / "set"))
    assert "made 3 images" in capsys.readouterr().out


def test_an_actor_works_where_the_command_was_given_and_answers_with_sentences(run, tmp_path, monkeypatch):
    """The function of Ray's actors, without Ray."""
    monkeypatch.chdir(tmp_path)  # and back at the end
    argv = ["captions.txt", *flags(Path("."), "set")[1:]]
    options = read(command.SynthesizeOptions, argv, "dmd synthesize")
    built = partial(command._build_in, run, options)
    assert Path(built().folder).absolute() == run / "set"
    lost = synthesis.RayWorker(partial(command._build_in, tmp_path / "nowhere", options))
    found = lost({"shard": torch.tensor([0])})
    assert found["images"] == [0] and f"has no folder {tmp_path / 'nowhere'}" in found["error"][0]
    wrong = synthesis.RayWorker(partial(command._build_in, run, replace(options, student="nowhere")))
    assert "nowhere is no folder" in wrong({"shard": torch.tensor([0])})["error"][0]


@pytest.mark.distributed
@pytest.mark.slow
def test_torchrun_shares_the_work(run, tmp_path):
    command.main(flags(run, tmp_path / "one"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631", "-m", "dmd",
         "synthesize", *flags(run, tmp_path / "two")],
        cwd=ROOT, capture_output=True, text=True, timeout=500, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "worker 0 of 2" in done.stdout and "worker 1 of 2" in done.stdout
    for name in ("00000.tar", "00001.tar", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
