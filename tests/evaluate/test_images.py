"""Pictures from tensors."""

import numpy as np
import pytest
import torch
from PIL import Image

from flowalign.images import grid, png_bytes, save_png, to_pil


def test_every_byte_value_survives_the_way_to_a_picture_and_back():
    levels = torch.arange(256, dtype=torch.float32).view(1, 16, 16).expand(3, -1, -1) / 255
    assert np.array_equal(np.asarray(to_pil(levels))[..., 0].ravel(), np.arange(256))


def test_channels_rows_and_columns_stay_where_they_are():
    image = torch.zeros(3, 2, 4)
    image[1, 0, 3] = 1
    picture = to_pil(image)
    assert picture.size == (4, 2)
    assert picture.getpixel((3, 0)) == (0, 255, 0)
    assert picture.getpixel((0, 1)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 4, 4), "needed \\(3, height, width\\)"),
        (torch.zeros(2, 3, 4, 4), "needed \\(3, height, width\\)"),
        (torch.full((3, 4, 4), 255.0), "divide bytes by 255"),
        (torch.full((3, 4, 4), -0.5), "needed \\[0, 1\\]"),
        (torch.full((3, 4, 4), float("nan")), "not finite"),
    ],
)
def test_what_is_not_an_image_is_refused_with_the_way_out(image, message):
    with pytest.raises(ValueError, match=message):
        to_pil(image)


def test_rounding_beyond_the_range_is_let_pass():
    assert to_pil(torch.full((3, 1, 1), 1.0005)).getpixel((0, 0)) == (255, 255, 255)


def test_a_grid_enlarges_pixels_into_blocks_and_fills_rows_from_the_left():
    images = torch.zeros(3, 3, 2, 2)
    images[:, :, 0, 0] = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    picture = grid(images, 2, scale=5)
    assert picture.size == (2 * 14 + 4, 2 * 14 + 4)  # images of 10 pixels, gaps of 4
    pixels = np.asarray(picture)
    assert (pixels[4:9, 4:9] == (255, 0, 0)).all()
    assert (pixels[4:9, 18:23] == (0, 255, 0)).all()
    assert (pixels[18:23, 4:9] == (0, 0, 255)).all()
    assert (pixels[9:14, 4:14] == 0).all()
    assert (pixels[18:, 18:] == 255).all()


def test_captions_add_a_line_below_and_leave_the_images_alone():
    images = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    plain, named = grid(images, 2), grid(images, 2, captions=["a", "a caption far too long for its image"])
    assert named.height == plain.height + 14
    assert np.array_equal(np.asarray(named)[4:44], np.asarray(plain)[4:44])
    assert (np.asarray(named)[44:] < 255).any()
    assert (np.asarray(named)[:, -4:] == 255).all()  # the long caption was cut


@pytest.mark.parametrize(
    ("options", "message"),
    [({"columns": 0}, "at least 1"), ({"columns": 2, "scale": 0}, "at least 1"), ({"columns": 2, "captions": ["a"]}, "captions")],
)
def test_a_grid_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        grid(torch.zeros(2, 3, 4, 4), **options)
    with pytest.raises(ValueError, match="at least one image"):
        grid(torch.zeros(0, 3, 4, 4), 1)


def test_a_png_file_holds_the_pixels_and_its_folder_is_made(tmp_path):
    image = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    save_png(image, tmp_path / "new" / "image.png")
    with Image.open(tmp_path / "new" / "image.png") as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(to_pil(image)))
    assert (tmp_path / "new" / "image.png").read_bytes() == png_bytes(to_pil(image))
