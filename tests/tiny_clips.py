"""Random CLIPs of a few thousand weights, in the formats of transformers and of open_clip."""

import json

import torch
from safetensors.torch import save_file

from tests.teachers.tiny import write_tokenizer

MEAN, STD = [0.1, 0.5, 0.9], [0.2, 0.3, 0.4]  # so unlike OpenAI's that forgetting them shows


def seeded(make, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def of_transformers(folder, preprocessing=True):
    """A folder as on the hub: a CLIPModel for 32 pixels, its tokenizer, and a mean and deviation of its own."""
    from transformers import CLIPConfig, CLIPModel

    words = write_tokenizer(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = small | {"vocab_size": words, "bos_token_id": words - 2, "eos_token_id": words - 1}
    vision = small | {"image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    seeded(lambda: CLIPModel(config)).save_pretrained(folder)
    settings = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "resample": 3}
    settings |= {"crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "do_rescale": True}
    settings |= {"image_mean": MEAN, "image_std": STD, "do_normalize": True}
    if preprocessing:
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


ARCHITECTURE = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"width": 16, "layers": 1, "heads": 2, "context_length": 77, "vocab_size": 49408},
}


def of_open_clip(folder, **preprocessing):
    """A folder as on the hub: open_clip's network for 32 pixels with a mean and deviation of its own."""
    import open_clip

    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_cfg": ARCHITECTURE, "preprocess_cfg": {"mean": MEAN, "std": STD} | preprocessing}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    net = seeded(lambda: open_clip.create_model(f"local-dir:{folder}"), 1)
    save_file(net.state_dict(), folder / "open_clip_model.safetensors")
    return folder
