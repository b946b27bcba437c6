"""The Inception-v3 of the FID: TensorFlow's of 2015, as NVIDIA translated it to TorchScript and clean-fid uses it.

The file is a program as much as it is weights, so it is opened only if its SHA-256 is that of the published one, and
it is read from where the user put it, never from a folder that others may write to.
"""

import hashlib
import io
import os
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmd.errors import InputError

FILE = "inception-2015-12-05.pt"
URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{FILE}"
SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
SIZE = 299
"""Pixels along a side of its input."""


class Inception(nn.Module):
    """Images (B, 3, 299, 299) of 0 to 255 to pooled features (B, 2048).

    Raises:
        InputError: the file is missing, or another one.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        try:
            content = file.read_bytes()
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error.strerror}): give {FILE}, or --download it") from None
        check(content, file)
        whole: Any = torch.jit.load(io.BytesIO(content), map_location="cpu")
        self.layers = whole.layers.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.layers((images - 128) / 128).flatten(1)


def check(content: bytes, file: Path) -> None:
    """Raises InputError unless this is the published file, byte for byte."""
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise InputError(
            f"{file} is not {FILE}: its SHA-256 is {found[:16]}... instead of {SHA256[:16]}..., so it is another file "
            f"or was cut; fetch {URL} again"
        )


def download(folder: Path) -> Path:
    """Fetch the file into a folder, unless it is there; whole and checked, or not at all.

    Raises:
        InputError: it cannot be had, or what came is another file.
    """
    file = folder / FILE
    if file.is_file():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".tmp-{os.getpid()}-{FILE}"
    try:
        with urllib.request.urlopen(URL, timeout=60) as answer, open(temporary, "wb") as out:
            shutil.copyfileobj(answer, out)
        check(temporary.read_bytes(), temporary)
        temporary.replace(file)
    except InputError:
        raise
    except OSError as error:
        raise InputError(
            f"{URL} could not be downloaded ({error}): fetch it yourself and give it as --weights"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return file
