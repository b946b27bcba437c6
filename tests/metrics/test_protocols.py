"""Preparation of images against clean-fid's and torchvision's own."""

import numpy as np
import pytest
from PIL import Image

from dmd.errors import InputError
from dmd.metrics.protocols import CLEAN_FID, COCO_30K, bicubic, exactly, lanczos_square


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(32, 32, 3), (299, 299, 3), (400, 350, 3), (17, 60, 1)])
def test_bicubic_is_clean_fid_s_bit_for_bit(shape):
    resize = pytest.importorskip("cleanfid.resize").build_resizer("clean")
    image = pixels(*shape)
    expected = resize(np.broadcast_to(image, (*shape[:2], 3)))
    found = bicubic(299, 299)(image)
    assert found.dtype == np.float32 and found.shape == (3, 299, 299)
    assert (np.moveaxis(found, 0, 2) == expected).all()


@pytest.mark.parametrize("shape", [(512, 512, 3), (480, 640, 3), (641, 480, 3), (100, 75, 3)])
def test_lanczos_square_is_torchvision_s_crop_and_pillow_s_resize(shape):
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = pixels(*shape)
    cropped = functional.center_crop(Image.fromarray(image), min(shape[:2]))
    expected = np.asarray(cropped.resize((256, 256), Image.Resampling.LANCZOS))
    assert (lanczos_square(256)(image) == expected).all()


def test_a_network_of_a_fixed_size_sees_images_as_they_are():
    image = pixels(8, 8, 3)
    assert (exactly(3, 8, 8, "net")(image) == np.moveaxis(image, 2, 0)).all()
    grey = pixels(8, 8, 1)
    assert (exactly(3, 8, 8, "net")(grey) == np.moveaxis(grey, 2, 0)).all()
    repeated = np.repeat(grey, 3, 2)
    assert (exactly(1, 8, 8, "net")(repeated) == np.moveaxis(grey, 2, 0)).all()


def test_other_sizes_and_colours_are_refused():
    with pytest.raises(InputError, match="9x8 pixels, but FD-Net takes 8x8"):
        exactly(3, 8, 8, "FD-Net")(pixels(9, 8, 3))
    with pytest.raises(InputError, match="in colour, but FD-Net takes grey"):
        exactly(1, 8, 8, "FD-Net")(pixels(8, 8, 3))


def test_fid_s_name_is_inception_s_alone():
    assert (CLEAN_FID.network, CLEAN_FID.label, CLEAN_FID.samples) == ("inception", "FID", 50_000)
    assert (COCO_30K.network, COCO_30K.label, COCO_30K.samples) == ("inception", "FID-COCO30k", 30_000)
    image = pixels(512, 512, 3)
    assert COCO_30K.before(image).shape == (256, 256, 3)
    assert CLEAN_FID.before(image) is image
