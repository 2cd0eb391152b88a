"""Golden rows: inputs with the outputs they must give, in a NumPy archive.

Equal arrays give equal bytes, and a reader sees a whole file or none. Nothing is pickled.

Source of the format: https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

import io
import os
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from components.contract import Arrays
from components.errors import DataError, InfrastructureError

Array = npt.NDArray[np.generic]

_SIDES = ("input", "output")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that a zip archive can hold


def write_golden(path: Path, inputs: Arrays, outputs: Arrays) -> None:
    """Write arrays under the keys ``input/<name>`` and ``output/<name>``, atomically.

    Args:
        path: Where to; its folder must exist, and a file that is there is replaced.
        inputs: Arrays by name; the order of names, memory order and byte order do not matter.
        outputs: Likewise.

    Raises:
        DataError: An array holds Python objects, which only pickle could store.
        InfrastructureError: The file cannot be written.
    """
    named = {f"input/{name}": array for name, array in inputs.items()}
    named |= {f"output/{name}": array for name, array in outputs.items()}
    objects = sorted(key for key, array in named.items() if array.dtype.hasobject)
    if objects:
        raise DataError(
            f"golden arrays must hold numbers; {', '.join(objects)} hold Python objects. "
            "Convert them to float32 or int64."
        )
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as stream:
            _write(stream, named)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise InfrastructureError(
            f"golden rows must be writable at {path}; got {error}. Check the folder and its space."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_golden(path: Path) -> tuple[dict[str, Array], dict[str, Array]]:
    """Read inputs and outputs, by name.

    Raises:
        DataError: The file is missing, damaged, pickled, or has other keys.
    """
    sides: dict[str, dict[str, Array]] = {side: {} for side in _SIDES}
    try:
        with zipfile.ZipFile(path) as archive:
            for key, array in _arrays(archive):
                side, _, name = key.partition("/")
                if side not in sides or not name or name in sides[side]:
                    raise ValueError(f"key {key!r} is not input/<name> or output/<name>, once each")
                sides[side][name] = array
    # What a damaged archive raises depends on the byte that is wrong.
    except (OSError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise DataError(
            f"golden rows at {path} must be an archive written by assay; got "
            f"{type(error).__name__}: {error}. Fetch the file again."
        ) from error
    return sides["input"], sides["output"]


def _write(stream: BinaryIO, named: Arrays) -> None:
    # Not np.savez: it leaves time, system and order to the zip module and the caller.
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for key in sorted(named):
            array = named[key]
            plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            entry = zipfile.ZipInfo(f"{key}.npy", date_time=_EPOCH)
            entry.create_system = 3  # Unix, also where it is written elsewhere
            entry.external_attr = 0o644 << 16
            with archive.open(entry, "w", force_zip64=True) as member:
                # ascontiguousarray makes a scalar one-dimensional
                np.lib.format.write_array(member, plain.reshape(array.shape), (1, 0), False)


def _arrays(archive: zipfile.ZipFile) -> Iterator[tuple[str, Array]]:
    for entry in archive.infolist():
        stored = io.BytesIO(archive.read(entry))  # checks its CRC before a header is believed
        array: Array = np.lib.format.read_array(stored, allow_pickle=False)
        yield entry.filename.removesuffix(".npy"), array


def _sync_folder(folder: Path) -> None:
    """Make a rename outlast a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
