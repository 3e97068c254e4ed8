"""From a photograph to the square that a network sees, as torchvision's reference training does it.

`random_resized_crop` follows ``RandomResizedCrop`` with its default scale and ratio, `resized_center_crop` follows
``Resize`` and then ``CenterCrop``; both resize with Pillow's antialiased bilinear filter. Only the source of the random
numbers differs.
"""

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

_ATTEMPTS = 10
DRAWS = 4 * _ATTEMPTS + 1
"""Random numbers that `random_resized_crop` takes."""
_AREA = (0.08, 1.0)  # of the image
_RATIO = (3 / 4, 4 / 3)  # width / height


def random_resized_crop(image: "Image", draws: NDArray[np.float64], *, size: int) -> "Image":
    """Cut a window of random area and shape, make it a square, and mirror it with probability 1/2.

    Args:
        image: Any size.
        draws: (`DRAWS`,), uniform in [0, 1).
        size: Height and width of the result in pixels.
    """
    from PIL import Image

    left, top, width, height = crop_window(image.width, image.height, draws)
    window = image.crop((left, top, left + width, top + height))
    square = window.resize((size, size), Image.Resampling.BILINEAR)
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draws[-1] < 0.5 else square


def crop_window(width: int, height: int, draws: NDArray[np.float64]) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a random window.

    Its share of the area is uniform in [0.08, 1], the logarithm of its ratio is uniform between those of 3/4 and 4/3.
    After ten windows that do not fit, it is the largest one in the middle whose ratio is allowed.

    Args:
        width: Of the image in pixels.
        height: Of the image in pixels.
        draws: (`DRAWS`,), uniform in [0, 1); the last is not used here.
    """
    shortest, longest = (math.log(ratio) for ratio in _RATIO)
    for area, ratio, across, down in draws[:-1].reshape(_ATTEMPTS, 4):
        target = width * height * (_AREA[0] + area * (_AREA[1] - _AREA[0]))
        shape = math.exp(shortest + ratio * (longest - shortest))
        wide, high = round(math.sqrt(target * shape)), round(math.sqrt(target / shape))
        if 0 < wide <= width and 0 < high <= height:
            return int(across * (width - wide + 1)), int(down * (height - high + 1)), wide, high
    wide, high = width, height
    if width < _RATIO[0] * height:
        high = round(width / _RATIO[0])
    elif width > _RATIO[1] * height:
        wide = round(height * _RATIO[1])
    return (width - wide) // 2, (height - high) // 2, wide, high


def resized_center_crop(image: "Image", *, resize: int, size: int) -> "Image":
    """Make the shorter side ``resize`` pixels long and cut a square of ``size`` pixels from the middle.

    Args:
        image: Any size.
        resize: New length of the shorter side, at least ``size``; the longer side is rounded down.
        size: Height and width of the result.
    """
    from PIL import Image

    width, height = image.size
    if width <= height:
        width, height = resize, resize * height // width
    else:
        width, height = resize * width // height, resize
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + size, top + size))
