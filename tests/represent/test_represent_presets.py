"""The presets of `dmd represent`: all are valid, and those of the papers hold what the papers say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dmd.cli import represent as cli
from dmd.log import read_jsonl
from dmd.represent import config as options
from dmd.represent.backbones import load_backbone
from dmd.represent.config import METHODS, PRESETS, check, preset
from dmd.settings import require_same, to_json

DATA = Path(os.environ.get("DMD_TEST_DATA", ""))


@pytest.mark.parametrize("method", METHODS)
def test_every_preset_is_valid_shown_and_survives_json(tmp_path, monkeypatch, capsys, method):
    monkeypatch.chdir(tmp_path)
    for name in PRESETS:
        config = preset(method, name)
        check(config)
        cli.main([method, name, "--dry-run"])
        shown = json.loads(capsys.readouterr().out)
        assert shown == to_json(config) and not list(tmp_path.iterdir())
        (tmp_path / "config.json").write_text(json.dumps(shown))
        again = options.read(tmp_path / "config.json")
        require_same(again, config, (), "")
        assert again == config
        (tmp_path / "config.json").unlink()
        if method != "synclr":  # all see as many views in a step
            data = preset("stablerep", name).data
            assert config.data.captions_per_batch * options.views(config) == data.captions_per_batch * data.per_caption


def values(config, group, *names):
    return tuple(getattr(getattr(config, group), name) for name in names)


STABLEREP = ("stablerep", "stablerep-plus")


@pytest.mark.parametrize("method", STABLEREP)
def test_stablereps_published_settings(method):
    """arXiv 2306.00984, section 4 and appendix, and the authors' main_stablerep.py: CC12M, 1x."""
    config = preset(method, "paper")
    assert values(config, "data", "captions_per_batch", "per_caption") == (1376, 6)  # 43 on each of 32 GPUs: 8,256
    assert values(config, "backbone", "backbone", "image_size", "patch_size", "drop_path") == (
        "vit_base_patch16_224", 224, None, 0.0,
    )  # fmt: skip
    assert values(config, "learn", "head_hidden", "head_width", "temperature", "crops") == (4096, 256, 0.1, 1)
    assert values(config, "learn", "weight_decay", "weight_decay_end", "adam_beta2") == (0.1, None, 0.98)
    assert config.learn.learning_rate == pytest.approx(2e-4 * 8256 / 256 / 2) == pytest.approx(3.2e-3, rel=0.01)
    assert config.learn.epochs == 15 and config.learn.epochs * config.learn.warmup == pytest.approx(0.5)
    assert values(config, "augment", "crop_scale", "jitter", "jitter_probability", "grey", "blur", "flip") == (
        (0.08, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5, True,
    )  # fmt: skip
    assert config.learn.max_grad_norm >= 1e6  # not clipped


def test_stablerep_plus_has_clips_text_tower():
    """The authors' StableRepMM.py: width 512, 12 layers, 8 heads, 77 tokens, both losses alike."""
    config = preset("stablerep-plus", "paper")
    assert values(config, "text", "text_width", "text_layers", "text_heads", "text_tokens", "embedding") == (
        512, 12, 8, 77, 512,
    )  # fmt: skip
    assert values(config, "learn", "image_weight", "text_weight") == (1.0, 1.0)


def test_synclrs_published_settings():
    """arXiv 2312.17742, appendix (pre-training), and the authors' augmentations: ViT-B/16, final run."""
    config = preset("synclr", "paper")
    assert values(config, "data", "captions_per_batch", "per_caption") == (8192, 4)
    assert values(config, "backbone", "backbone", "image_size", "drop_path") == ("vit_base_patch16_224", 224, 0.1)
    steps, warmup = values(config, "learn", "max_train_steps", "warmup")
    assert (steps, round(warmup * steps), config.learn.epochs) == (500_000, 80_000, 0)
    assert values(config, "learn", "learning_rate", "temperature", "adam_beta2") == (2e-3, 0.08, 0.999)
    assert values(config, "learn", "weight_decay", "weight_decay_end") == (0.04, 0.2)
    assert values(config, "learn", "head_hidden", "head_width", "crops") == (4096, 256, 1)
    assert values(config, "augment", "crop_scale", "local_crops", "local_size", "local_scale") == (
        (0.32, 1.0), 4, 96, (0.08, 0.32),
    )  # fmt: skip
    assert values(config, "augment", "jitter", "jitter_probability", "grey", "blur", "flip", "downsample") == (
        (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 0.5, True, 0.05,
    )  # fmt: skip
    assert to_json(config)["teacher"] == {
        "momentum": 0.994, "ibot_weight": 1.0, "prototypes": 65_536, "ibot_hidden": 2048, "ibot_bottleneck": 256,
        "mask_images": 0.5, "mask_patches": 0.5, "teacher_temperature": 0.07, "teacher_temperature_first": 0.04,
        "teacher_temperature_steps": 4000, "sinkhorn_iterations": 3, "hide_own": True, "batch_norm": False,
    }  # fmt: skip


TINY = [
    "--captions-per-batch", "4", "--per-caption", "2", "--max-train-steps", "2", "--log-every", "1", "--cpu",
    "--head-hidden", "16", "--head-width", "8", "--text-width", "16", "--text-layers", "1", "--text-heads", "2",
    "--prototypes", "16", "--ibot-hidden", "16", "--ibot-bottleneck", "8", "--local-crops", "1", "--workers", "0",
    "--report-to", "none",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "unpack.py").exists(), reason="DMD_TEST_DATA does not name a folder of real data")
def test_every_method_takes_photographs_by_the_preset_for_one_gpu(tmp_path):
    """CIFAR-10 in bfloat16, with the preset's own backbones and augmentation."""
    data = tmp_path / "data"
    subprocess.run([sys.executable, DATA / "unpack.py", "cifar10", data, "--limit", "200"], check=True)
    for method in METHODS:
        folder = tmp_path / method
        cli.represent([method, "small", "--data", str(data), "--output-dir", str(folder), *TINY], "dmd represent")
        rows = read_jsonl(folder / "metrics.jsonl")
        assert [row["step"] for row in rows] == [1, 2] and all(row["grad/net"] > 0 for row in rows)
        net = load_backbone(folder / "backbone")
        assert net.config.size == 32 and net.config.method == method
