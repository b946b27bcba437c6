"""Folders of captioned images: read as they are, and every fault named with its line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dmd import synthesis
from dmd.data import captioned, prompts
from dmd.data.images import to_uint8
from dmd.errors import InputError
from dmd.generate import REPLICAS
from tests.stub import CAPTIONS, job, stub

DATA = Path(os.environ.get("DMD_TEST_DATA", ""))
ROWS = [
    {"file_name": "0.png", "text": "a grey square"},
    {"file_name": "deep/1.webp", "caption": "  three colours "},
    {"file_name": "2.png", "text": ""},
    {"file_name": "3.jpg", "text": "赤い丸", "more": 1},
]


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "deep").mkdir()
    Image.fromarray(rng.integers(0, 256, (4, 4), np.uint8)).save(tmp_path / "0.png")
    Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).save(tmp_path / "deep" / "1.webp", lossless=True)
    Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).save(tmp_path / "3.jpg")
    write(tmp_path, ROWS)
    return tmp_path


def write(folder, rows):
    text = "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "metadata.jsonl").write_text(text + "\n\n", encoding="utf-8")


def test_images_stand_beside_their_captions(folder):
    found = captioned.load(folder, 4)
    assert found.captions == ["a grey square", "three colours", "赤い丸"]
    for image, name in zip(found.images, ("0.png", "deep/1.webp", "3.jpg"), strict=True):
        with Image.open(folder / name) as file:
            assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(np.array(file.convert("RGB"))))
    assert found.captions == prompts.read(folder).texts


def test_shards_of_a_synthetic_data_set_are_images_with_captions(tmp_path):
    synthesis.work(job(tmp_path / "shards", image_format="png"))
    found = captioned.load(tmp_path / "shards", 16)
    assert found.captions == [c for c in CAPTIONS for _ in range(4)]
    numbers = torch.arange(30).repeat_interleave(4) * REPLICAS + torch.arange(4).repeat(30)
    assert torch.equal(found.images, to_uint8(stub(found.captions, numbers, 0)))
    assert captioned.is_captioned(tmp_path / "shards") and not captioned.is_captioned(tmp_path)
    (one, *_) = sorted((tmp_path / "shards").glob("*.tar"))
    assert captioned.load(one, 16).captions == found.captions[:12]
    with pytest.raises(InputError, match="image 0 of 'caption 0 .* has 16 x 16 pixels: it must have 8 x 8"):
        captioned.load(tmp_path / "shards", 8)


FAULTS = {
    "no folder": ([], r"nowhere.metadata.jsonl does not exist: give a folder of images"),
    "nothing in it": ([{"file_name": "0.png", "text": " "}], r"metadata.jsonl has no image with a caption"),
    "no file": ([ROWS[0], {"text": "x"}], r"line 2 has no file_name"),
    "a number": ([{"file_name": 3, "text": "x"}], r"line 1 has no file_name"),
    "no caption": ([{"file_name": "0.png"}], r"line 1 is not a JSON object with the key text or caption"),
    "not JSON": ([ROWS[0], "{"], r"line 2 is not JSON"),
    "out of the folder": (
        [{"file_name": "../0.png", "text": "x"}],
        r"line 1 has the file_name '../0.png', which leads",
    ),
    "absolute": ([{"file_name": "/etc/passwd", "text": "x"}], r"line 1 .* which leads out of the folder"),
    "no image": ([{"file_name": "metadata.jsonl", "text": "x"}], r"line 1 .*: it must be one of .png"),
    "missing image": ([{"file_name": "9.png", "text": "x"}], r"9.png is not a readable 8-bit image"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_named(folder, name):
    rows, sentence = FAULTS[name]
    write(folder, rows)
    with pytest.raises(InputError, match=sentence):
        captioned.load(folder / "nowhere" if name == "no folder" else folder, 4)


def test_a_link_that_leads_out_of_the_folder_is_refused(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    outside.write_bytes((folder / "0.png").read_bytes())
    (folder / "link.png").symlink_to(outside)
    write(folder, [{"file_name": "link.png", "text": "x"}])
    with pytest.raises(InputError, match=r"which leads out of the folder"):
        captioned.load(folder, 4)


def test_another_size_is_refused(folder):
    with pytest.raises(InputError, match=r"0.png is 4x4 pixels instead of 8x8"):
        captioned.load(folder, 8)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "emoji64").is_dir(), reason="DMD_TEST_DATA does not name a folder of real data")
def test_the_real_emoji(tmp_path):
    subprocess.run([sys.executable, str(DATA / "unpack.py"), "emoji64", str(tmp_path / "emoji")], check=True)
    for split, count in (("train", 10_432), ("test", 593)):
        found = captioned.load(tmp_path / "emoji" / split, 64)
        assert len(found) == len(found.images) == count
        assert found.images.shape[1:] == (3, 64, 64)
