"""What the benchmarks measure is what they say."""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

REAL = Path(os.environ.get("DMD_TEST_DATA", "")) / "sd-configs" / "sd-v1-5"


def shapes(net):
    return {name: tensor.shape for name, tensor in net.state_dict().items()}


@pytest.mark.skipif(not REAL.is_dir(), reason="DMD_TEST_DATA does not name a folder of real data")
def test_sampling_has_the_networks_of_version_1_5():
    """All settings that the real configs name, and so all tensors, by name and shape."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from benchmarks.sampling import SD_1_5, networks

    with torch.device("meta"):
        found = networks(SD_1_5)
        real = (
            UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(REAL / "unet")),
            AutoencoderKL.from_config(AutoencoderKL.load_config(REAL / "vae")),
            CLIPTextModel(CLIPTextConfig.from_pretrained(REAL / "text_encoder")),
        )
    for ours, theirs in zip(found, real, strict=True):
        assert shapes(ours) == shapes(theirs)
    for ours, theirs in zip(found[:2], real[:2], strict=True):
        settings = {k: v for k, v in theirs.config.items() if not k.startswith("_")}
        assert {k: list(v) if isinstance(v, tuple) else v for k, v in ours.config.items() if k in settings} == settings


def test_sampling_has_the_sizes_of_version_1_5():
    """And of TAESD, whose decoder has 1.22 million parameters."""
    from diffusers import AutoencoderTiny

    from benchmarks.sampling import SD_1_5, networks

    with torch.device("meta"):
        sizes = [sum(p.numel() for p in net.parameters()) for net in networks(SD_1_5)]
        assert sum(p.numel() for p in AutoencoderTiny().decoder.parameters()) == 1_222_531
    assert sizes == [859_520_964, 83_653_863, 123_060_480]
