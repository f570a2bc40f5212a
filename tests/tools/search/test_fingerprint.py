import itertools
import random
from io import BytesIO

import pytest
from PIL import Image, ImageEnhance

from metis_agent.tools.search.likeness import fingerprint


def picture(seed, size=(300, 200)):
    small = Image.frombytes("RGB", (6, 6), random.Random(seed).randbytes(108))
    return small.resize(size, Image.Resampling.BICUBIC)


def jpeg(image, quality):
    file = BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file)


def test_the_bits_by_hand():
    # Brighter to the right in every row, the same in every column: each pair of bits is 10.
    slope = Image.frombytes("L", (9, 9), bytes(range(0, 90, 10)) * 9).convert("RGB")
    assert fingerprint(slope).bits == int("10" * 64, 2)
    assert fingerprint(slope).colour == (40, 40, 40)
    assert fingerprint(slope.transpose(Image.Transpose.TRANSPOSE)).bits == int("01" * 64, 2)
    assert fingerprint(Image.new("RGB", (5, 5), "red")).bits == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.resize((150, 100)),
        lambda image: image.resize((77, 60)),
        lambda image: image.resize((1_200, 800)),
        lambda image: jpeg(image, 30),
        lambda image: ImageEnhance.Brightness(image).enhance(0.9),
        lambda image: ImageEnhance.Contrast(image).enhance(1.2),
        lambda image: image.convert("RGBA"),
    ],
)
def test_a_changed_image_is_known_again(change):
    for seed in range(10):
        image = picture(seed)
        assert fingerprint(change(image)).likeness(fingerprint(image)) >= 0.85


def test_other_images_are_not_taken_for_it():
    prints = [fingerprint(picture(seed)) for seed in range(60)]
    assert max(a.likeness(b) for a, b in itertools.combinations(prints, 2)) < 0.85


def test_flat_images_differ_by_colour():
    red, dark_red, blue = (fingerprint(Image.new("RGB", (9, 9), colour)) for colour in ("#f00", "#e00", "#00f"))
    assert red.likeness(dark_red) == 1.0
    assert red.likeness(blue) == 0.0


def test_one_pixel():
    assert fingerprint(Image.new("RGB", (1, 1), "red")).likeness(fingerprint(Image.new("RGB", (9, 9), "red"))) == 1.0


def test_what_shows_through_is_white():
    assert fingerprint(Image.new("RGBA", (4, 4), (0, 0, 0, 0))).colour == (255, 255, 255)
