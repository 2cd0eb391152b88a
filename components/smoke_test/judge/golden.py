"""Golden rows: recorded inputs and the answers that belong to them.

Legend: N = golden rows, B = rows of one batch.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Named = dict[str, Array]


class Golden:
    """Recorded inputs and outputs, N rows each; text is held as objects, as a session gives it.

    Raises:
        ValueError: The file is not usable as a reference.
    """

    def __init__(self, path: Path) -> None:
        self.inputs: Named = {}
        self.outputs: Named = {}
        groups = {"input": self.inputs, "output": self.outputs}
        with np.load(path, allow_pickle=False) as archive:
            for key in archive.files:
                group, _, name = key.partition("/")
                if group not in groups or not name:
                    raise ValueError(f"keys must be input/<name> or output/<name>; got {key!r}")
                array = archive[key]
                groups[group][name] = array.astype(object) if array.dtype.kind == "U" else array
        if not self.inputs or not self.outputs:
            raise ValueError("at least one input/<name> and one output/<name> are needed")
        arrays = [*self.inputs.values(), *self.outputs.values()]
        counts = {array.shape[0] if array.ndim else 0 for array in arrays}
        if len(counts) != 1:
            raise ValueError(f"inputs and outputs must share N rows; got {sorted(counts)}")
        self.rows = counts.pop()
        # Equal rows would hide an output that depends on the other rows of its batch.
        if not any(_varies(array) for array in self.inputs.values()):
            raise ValueError(f"at least two different rows are needed; got {self.rows} equal ones")
        for name, array in self.outputs.items():
            if bad := count_bad(array):
                raise ValueError(f"recorded output {name!r} holds {bad} NaN or infinite values")

    def feed(self, rows_B: npt.NDArray[np.intp]) -> Named:
        """The inputs of some rows."""
        return {name: array[rows_B] for name, array in self.inputs.items()}

    def tiled(self, size: int) -> npt.NDArray[np.intp]:
        """Numbers of golden rows, each at least once, in batches (count, B) of one size."""
        rows = np.arange(-(-self.rows // size) * size) % self.rows
        return rows.reshape(-1, size)


def count_bad(array: Array) -> int:
    """Count NaN and infinite values; integers and text have none."""
    return int((~np.isfinite(array)).sum()) if array.dtype.kind == "f" else 0


def onnx_type(array: Array) -> str:
    """Spell an array's dtype as onnxruntime spells element types."""
    name = array.dtype.name
    element = {"float32": "float", "float64": "double", "object": "string"}.get(name, name)
    return f"tensor({element})"


def _varies(array: Array) -> bool:
    different = array != array[:1]
    if array.dtype.kind == "f":  # a missing value equals another one
        different &= ~(np.isnan(array) & np.isnan(array[:1]))
    return bool(different.any())
