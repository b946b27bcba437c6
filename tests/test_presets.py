"""The presets for real photographs, from data in ordinary layouts to the report; small enough for a CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torchvision.models.vgg import cfgs, make_layers

from dmd.cli import train

DATA = Path(os.environ.get("DMD_TEST_DATA", ""))

SMALL = [
    "--width", "8", "--multipliers", "1", "1", "--attention", "False", "True", "--blocks", "1",
    "--teach-steps", "20", "--teach-batch-size", "16", "--pairs", "32", "--pair-shard-size", "16",
    "--teacher-steps", "3", "--max-train-steps", "4", "--batch-size", "8", "--pair-batch-size", "4",
    "--eval-every", "2", "--eval-samples", "64", "--final-samples", "64", "--lr-cooldown-steps", "2",
    "--mixed-precision", "no", "--report-to", "none",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "unpack.py").exists(), reason="DMD_TEST_DATA does not name a folder of real data")
@pytest.mark.parametrize(
    ("preset", "packed", "flags", "metric"),
    [
        (
            "cifar10",
            "cifar10",
            ["--features", str(DATA / "resnet-cifar10/resnet56-4bfd9763.th")],
            "FD-ResNet56",
        ),
        ("fashion", "fashion-mnist", [], "FD-SmallConvNet"),
    ],
)  # fmt: skip
def test_photographs_are_distilled_from_their_files_to_the_report(tmp_path, preset, packed, flags, metric):
    """With the presets' own losses; the trunk of LPIPS-VGG, which does not ship, is a random one."""
    data, run = tmp_path / "data", tmp_path / "run"
    subprocess.run([sys.executable, DATA / "unpack.py", packed, data, "--limit", "600"], check=True)
    save_file(make_layers(cfgs["D"], batch_norm=False).state_dict(), tmp_path / "vgg.safetensors")
    where = ["--data", data, "--output-dir", run, "--cache-dir", tmp_path / "c"]
    train.main([preset, *map(str, where), "--lpips-weights", str(tmp_path / "vgg.safetensors"), *SMALL, *flags])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metric"] == metric
    assert summary["reference_images"] == 600
    assert summary["student"]["fd"] > 0 and summary["fd_ratio"] == summary["student"]["fd"] / summary["teacher"]["fd"]
    assert preset != "cifar10" or json.loads((run / "config.json").read_text())["distill"]["regression"] == "lpips-vgg"
    assert summary["generator_updates"] == 4 and summary["images_seen"] == 4 * (8 + 4)
    assert (run / "report.html").stat().st_size > 10_000
