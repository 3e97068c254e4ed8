"""The embedded data set: real handwritten digits that need no download and train in seconds."""

from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch

from sparsetwin.data._base import DataSource, Splits
from sparsetwin.data._draws import stratified
from sparsetwin.data._in_memory import OrderedImages, Pixels, ShuffledImages
from sparsetwin.data._normalisation import Normalisation
from sparsetwin.errors import DataError

_TEST_FRACTION = 0.252  # 453 of 1,797 images
_MEAN, _DEVIATION = 0.3051, 0.3757  # of the other 1,344
_NOTICE = "Optical Recognition of Handwritten Digits, E. Alpaydin and C. Kaynak, UCI, DOI 10.24432/C50P49, CC BY 4.0"


@dataclass(frozen=True, kw_only=True)
class Digits(DataSource):
    """Handwritten digits: 1,797 images of 8 x 8 pixels, 10 classes, 453 of them the test set; comes with sparsetwin."""

    holdout: float = 0.1
    """Fraction of the training set that is held out to make choices."""
    shift: int = 1
    """Largest random shift of a training image in pixels; 0 is none."""
    drop_last: bool = True
    """Leave out the last training batch of an epoch if it is not full."""

    def load(
        self, folder: Path | None, *, batch_size: int, eval_batch_size: int, seed: int, device: torch.device
    ) -> Splits:
        """Read the embedded file; see `DataSource.load`. No folder is needed, and none is accepted."""
        if folder is not None:
            raise DataError(f"the digits come with sparsetwin and are read from no folder, got {folder}; leave it out")
        if not 0 <= self.shift < 8:
            raise DataError(f"a shift of 0 to 7 pixels leaves something of a digit, got {self.shift}")
        images, labels = _embedded()
        pixels = Pixels(
            images=torch.from_numpy(images).unsqueeze(1).to(device),
            labels=torch.from_numpy(labels).to(device, torch.int64),
            normalisation=Normalisation.per_channel([_MEAN], [_DEVIATION], white=16, device=device),
        )
        rest, test = stratified(labels, _TEST_FRACTION, "digits", "test")
        kept, held = stratified(labels[rest], self.holdout, "digits", "holdout")
        train = ShuffledImages(
            pixels.at(rest[kept]),
            batch_size=batch_size,
            seed=seed,
            drop_last=self.drop_last,
            padding=self.shift,
        )
        return Splits(
            train=train,
            holdout=OrderedImages(pixels.at(rest[held]), batch_size=eval_batch_size),
            test=OrderedImages(pixels.at(test), batch_size=eval_batch_size),
            example_input=pixels.at(rest[:1]).normalised(),
            classes=10,
            notice=_NOTICE,
        )


def _embedded() -> tuple[np.ndarray, np.ndarray]:
    """Return all images (1797, 8, 8) and labels (1797,), uint8, in the order of their source."""
    with as_file(files("sparsetwin.data") / "digits.npz") as path, np.load(path, allow_pickle=False) as arrays:
        return arrays["images"], arrays["labels"]
