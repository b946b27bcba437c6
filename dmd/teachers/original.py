"""The checkpoint layout of CompVis and Stability AI, which ComfyUI and A1111 read: its names of diffusers' tensors.

Nothing but names decides, so the widths and the numbers of blocks and layers are free. Each function takes the tensors
of one network by diffusers' or transformers' names and returns the same ones by the original names.
"""

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from dmd.errors import InputError

Tensors = Mapping[str, Tensor]

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer."
OPEN_CLIP = "cond_stage_model.model."
"""Prefixes of the networks in one file: OpenAI's text encoder is that of version 1.x, OpenCLIP's that of 2.x."""

_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ATTENTION = {name: name for name in ("norm", "proj_in", "transformer_blocks", "proj_out")}
_VAE_RESNET = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_VAE_ATTENTION |= {"query": "q", "key": "k", "value": "v", "proj_attn": "proj_out"}  # in files of diffusers before 0.12
_OPEN_CLIP_ENDS = {
    "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet(tensors: Tensors) -> dict[str, Tensor]:
    """A UNet2DConditionModel. Raises InputError for a tensor that the layout has no place for."""
    paths = _paths(tensors)
    places = _UNET_ENDS | _inside(_UNET_RESNET, "mid_block.resnets.0", "middle_block.0")
    places |= _inside(_UNET_ATTENTION, "mid_block.attentions.0", "middle_block.1")
    places |= _inside(_UNET_RESNET, "mid_block.resnets.1", "middle_block.2")
    number = itertools.count(1)  # 0 is conv_in
    for block in _children("down_blocks", paths):
        for layer in _children(f"{block}.resnets", paths):
            places |= _unet_layer(layer, f"input_blocks.{next(number)}")
        if f"{block}.downsamplers.0" in paths:
            places[f"{block}.downsamplers.0.conv"] = f"input_blocks.{next(number)}.0.op"
    number = itertools.count()
    for block in _children("up_blocks", paths):
        for layer in _children(f"{block}.resnets", paths):
            place = f"output_blocks.{next(number)}"
            places |= _unet_layer(layer, place)
        after = 2 if f"{block}.attentions" in paths else 1  # what enlarges is the last part of the block's last layer
        places[f"{block}.upsamplers.0.conv"] = f"{place}.{after}.conv"
    return _rename(tensors, places, UNET)


def vae(tensors: Tensors) -> dict[str, Tensor]:
    """An AutoencoderKL; its attention has convolutions of 1 x 1 there. Raises InputError as `unet`."""
    paths = _paths(tensors)
    places = {name: name for name in ("quant_conv", "post_quant_conv")}
    for side in ("encoder", "decoder"):
        places |= {f"{side}.{name}": f"{side}.{name}" for name in ("conv_in", "conv_out")}
        places[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        places |= _inside(_VAE_ATTENTION, f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1")
        for i in range(2):
            places |= _inside(_VAE_RESNET, f"{side}.mid_block.resnets.{i}", f"{side}.mid.block_{i + 1}")
    down, up = _children("encoder.down_blocks", paths), _children("decoder.up_blocks", paths)
    blocks = [(block, f"encoder.down.{i}") for i, block in enumerate(down)]
    blocks += [(block, f"decoder.up.{i}") for i, block in enumerate(reversed(up))]  # there 0 is the finest
    for block, place in blocks:
        for i, layer in enumerate(_children(f"{block}.resnets", paths)):
            places |= _inside(_VAE_RESNET, layer, f"{place}.block.{i}")
        places |= {f"{block}.downsamplers.0": f"{place}.downsample", f"{block}.upsamplers.0": f"{place}.upsample"}
    found = _rename(tensors, places, VAE)
    return {k: v[:, :, None, None] if ".attn_1." in k and v.ndim == 2 else v for k, v in found.items()}


def clip(tensors: Tensors) -> dict[str, Tensor]:
    """A CLIPTextModel as in version 1.x."""
    return {CLIP + name: tensor for name, tensor in with_prefix(tensors).items() if not name.endswith("position_ids")}


def open_clip(tensors: Tensors) -> dict[str, Tensor]:
    """A CLIPTextModel as in version 2.x. Raises InputError as `unet`.

    Version 2.x reads the last layer but one, which is the last one that diffusers keeps: readers of the original layout
    need no more either.
    """
    rest = {k.removeprefix("text_model."): v for k, v in tensors.items() if not k.endswith("position_ids")}
    places, joined = dict(_OPEN_CLIP_ENDS), {}
    for i, layer in enumerate(_children("encoder.layers", _paths(rest))):
        place = f"transformer.resblocks.{i}"
        places |= _inside(_OPEN_CLIP_LAYER, layer, place)
        for end in ("weight", "bias"):
            try:
                parts = [rest.pop(f"{layer}.self_attn.{part}_proj.{end}") for part in "qkv"]
            except KeyError as missing:
                raise InputError(f"the text encoder lacks the tensor {missing}: take it whole") from None
            joined[f"{OPEN_CLIP}{place}.attn.in_proj_{end}"] = torch.cat(parts)
    return _rename(rest, places, OPEN_CLIP) | joined


def with_prefix(tensors: Tensors) -> dict[str, Tensor]:
    """A CLIPTextModel's tensors under `text_model.`, which transformers 5 leaves out and readers before it require."""
    return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}


def _unet_layer(resnet: str, place: str) -> dict[str, str]:
    """A resnet and the attention after it, if there is one."""
    attention = resnet.replace(".resnets.", ".attentions.")
    return _inside(_UNET_RESNET, resnet, f"{place}.0") | _inside(_UNET_ATTENTION, attention, f"{place}.1")


def _inside(names: Mapping[str, str], module: str, place: str) -> dict[str, str]:
    return {f"{module}.{a}": f"{place}.{b}" for a, b in names.items()}


def _paths(tensors: Tensors) -> set[str]:
    """All modules: the name of every tensor without its last parts."""
    return {".".join(parts) for name in tensors for parts in itertools.accumulate([p] for p in name.split("."))}


def _children(path: str, paths: set[str]) -> list[str]:
    """path.0, path.1, ... as far as they go."""
    return list(itertools.takewhile(paths.__contains__, (f"{path}.{i}" for i in itertools.count())))


def _rename(tensors: Tensors, places: Mapping[str, str], prefix: str) -> dict[str, Tensor]:
    """Each tensor goes where the nearest module above it goes."""
    found = {}
    for name, tensor in tensors.items():
        path = name
        while path and path not in places:
            path = path.rpartition(".")[0]
        if not path:
            raise InputError(f"the original layout has no place for the tensor {name!r}: this cannot be one file in it")
        found[prefix + places[path] + name[len(path) :]] = tensor
    return found
