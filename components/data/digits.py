"""Handwritten digits: 1,797 images of 8 by 8 pixels, which ship with scikit-learn.

Source: Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998 (test part).
"""

from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.contract import DataSource, Split
from components.data.schema import RowSchema
from components.errors import DataError
from components.state import exclusive, replace_folder

PIXELS = 64
SCHEMA = pa.schema(
    [
        pa.field("image", pa.list_(pa.float32(), PIXELS), nullable=False),
        pa.field("digit", pa.int8(), nullable=False),
    ]
)
_HOLDOUT_EVERY = 5


@final
class DigitsSource(DataSource):
    """One Parquet file per split below ``folder``; every fifth image of a digit is held out."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def schema(self) -> RowSchema:
        """``image``, 64 grey values from 0 to 16 in row order, and ``digit``."""
        from pandera.pyarrow import Check

        return RowSchema(SCHEMA, checks={"digit": [Check.in_range(0, 9)]})

    def prepare(self) -> None:
        """Write both splits, unless that has been done."""
        with exclusive(self._folder.parent, self._folder.name):
            if not self._folder.is_dir():
                self._write()

    def _write(self) -> None:
        from sklearn.datasets import load_digits

        images, digits = load_digits(return_X_y=True)
        held = _every_nth_of_its_kind(digits, _HOLDOUT_EVERY)
        with replace_folder(self._folder) as work:
            for split, chosen in (("train", ~held), ("holdout", held)):
                pixels = pa.array(images[chosen].astype(np.float32).ravel())
                table = pa.table(
                    {
                        "image": pa.FixedSizeListArray.from_arrays(pixels, PIXELS),
                        "digit": pa.array(digits[chosen].astype(np.int8)),
                    }
                ).cast(SCHEMA)
                pq.write_table(table, work / f"{split}.parquet")

    def window(self, as_of: date) -> str:
        """The same rows at every date."""
        return "train four fifths of the images, hold out every fifth of each digit"

    def batches(self, split: Split, as_of: date) -> Iterator[pa.RecordBatch]:
        """Yield the images of a split in the order of the original."""
        path = self._folder / f"{split}.parquet"
        try:
            table = pq.read_table(path).cast(SCHEMA)
        except (OSError, ValueError) as error:
            raise DataError(
                f"prepared data must be readable; {path} is not: {error}. Delete the folder "
                f"{self._folder}; the next run prepares it again."
            ) from error
        yield from table.to_batches()

    def excluded(self, as_of: date) -> Mapping[str, int]:
        """Every image is used."""
        return {}


def _every_nth_of_its_kind(kinds: np.ndarray, nth: int) -> np.ndarray:
    chosen = np.zeros(len(kinds), dtype=bool)
    for kind in np.unique(kinds):
        chosen[np.flatnonzero(kinds == kind)[nth - 1 :: nth]] = True
    return chosen
