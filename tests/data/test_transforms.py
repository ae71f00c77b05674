"""Resizing and cropping: the same images as plain PIL + torchvision."""

import io

import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize
from torchvision.transforms.functional import pil_to_tensor, resized_crop

from latent_verse.data.decoding import decode_rgb
from latent_verse.data.transforms import centre_crop, crop_box, random_crop, sample_generator, to_unit_range
from tests.image_files import as_tensor, encoded, gap, photo

SIZES = [(90, 60), (60, 90), (64, 64), (301, 200), (40, 33), (640, 480), (500, 97), (33, 501)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_evaluation_image_is_that_of_pil_and_torchvision(size, kind):
    data = encoded(photo(*size), kind)
    plain = CenterCrop(64)(Resize(64, InterpolationMode.BILINEAR, antialias=True)(Image.open(io.BytesIO(data))))
    ours = centre_crop(decode_rgb(data), 64)
    assert ours.dtype == torch.uint8
    assert gap(ours, as_tensor(plain)) <= 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_training_image_is_that_of_pil_and_torchvision(size, kind):
    data = encoded(photo(*size), kind)
    for epoch in range(3):
        top, left, side = crop_box(size[1], size[0], 0.5, sample_generator(1, epoch))
        plain = resized_crop(Image.open(io.BytesIO(data)), top, left, side, side, [64, 64], antialias=True)
        ours = random_crop(decode_rgb(data), 64, 0.5, sample_generator(1, epoch))
        assert gap(ours, as_tensor(plain)) <= 2


def test_centre_crop_of_a_very_long_image_is_right_and_cheap():
    stripe = photo(3000, 20)
    plain = CenterCrop(64)(Resize(64, antialias=True)(stripe))
    assert gap(centre_crop(stripe, 64), as_tensor(plain)) <= 2
    # resized whole, this one would take 256 x 51 million pixels
    assert centre_crop(torch.zeros(3, 1, 200_000, dtype=torch.uint8), 256).shape == (3, 256, 256)


def test_centre_crop_takes_pil_and_tensor_alike():
    image = photo(70, 50)
    assert torch.equal(centre_crop(image, 32), centre_crop(pil_to_tensor(image), 32))


def test_crop_boxes_fit_cover_the_range_and_move():
    boxes = [crop_box(60, 90, 0.75, sample_generator(0, i)) for i in range(400)]
    sides = [side for _, _, side in boxes]
    assert all(0 <= top <= 60 - side and 0 <= left <= 90 - side for top, left, side in boxes)
    assert min(sides) == round(60 * 0.75**0.5) and max(sides) == 60
    assert min(left for _, left, _ in boxes) <= 2 and max(left for _, left, _ in boxes) >= 30
    assert crop_box(1, 1, 0.75, sample_generator(0)) == (0, 0, 1)


def test_unit_range():
    x = to_unit_range(torch.tensor([0, 255, 51], dtype=torch.uint8))
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, torch.tensor([-1.0, 1.0, -0.6]))
