"""The contracts between assay and the code that it runs.

A component is abstract or final: these classes have abstract methods and no state. A class whose
members do not fit is refused when it is defined, with a :class:`ContractError` that names them all;
one that misses members may be subclassed, and :func:`instantiate` says what it misses.

Legend: B = batch, written ``"batch"`` in a shape. Another word there is a further dynamic axis.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import (
    BaseModel,
    ConfigDict,
    SecretStr,
    SerializerFunctionWrapHandler,
    model_serializer,
)
from torch import Tensor, nn

from components.conformance import describe_faults, missing_members, mistyped_members
from components.data.schema import RowSchema
from components.errors import ContractError

Split = Literal["train", "holdout"]
Arrays = Mapping[str, npt.NDArray[np.generic]]
"""Named arrays that share their first axis, B."""

Dtype = Literal["float32", "int64", "float64", "string", "bool"]
"""Of tensors. A model takes and gives those of TENSOR_DTYPES; the others are columns of rows."""

TENSOR_DTYPES = ("float32", "int64")

Instance = TypeVar("Instance")


class Shaped(Protocol):
    """An array or a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its lengths."""
        ...


class TensorSpec(BaseModel):
    """Name, dtype (numpy's name, for example ``float32``) and shape of a graph input or output.

    ``unit`` says what the numbers count, for example ``minutes``. It is empty where there is none,
    or where columns of several units share a tensor. Values whose unit is ``probability`` must lie
    between 0 and 1, which the contract verification checks.

    The first axis is ``"batch"``, and no other. Another word in the shape, say ``"sequence"``, is
    an axis of any length of 1 or more; where several tensors name it they have the same length.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dtype: Dtype
    shape: tuple[str | int, ...]
    unit: str = ""

    @property
    def unitless(self) -> "TensorSpec":
        """The same tensor without its unit, as an encoding describes it."""
        return self.model_copy(update={"unit": ""})

    @property
    def axes(self) -> tuple[tuple[int, str], ...]:
        """Places and names of the dynamic axes, ``"batch"`` first."""
        return tuple((at, axis) for at, axis in enumerate(self.shape) if isinstance(axis, str))

    def sized(self, lengths: Mapping[str, int]) -> tuple[str | int, ...]:
        """The shape with known lengths in place of the names of axes."""
        return tuple(lengths.get(a, a) if isinstance(a, str) else a for a in self.shape)

    @model_serializer(mode="wrap")
    def _without_empty_unit(self, dump: SerializerFunctionWrapHandler) -> dict[str, object]:
        # So that the bytes of a file whose tensors have no units do not change.
        fields: dict[str, object] = dump(self)
        if not self.unit:
            del fields["unit"]
        return fields


class ModelMetadata(BaseModel):
    """What a model takes and gives; it travels inside the ONNX file.

    ``classes`` are the labels in the order of the target, 0 first; they are unique. With K classes
    one output must have K as its last axis, one number for each class; with two classes an output
    ``("batch",)`` or ``("batch", 1)`` will do, the number of the second class.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    classes: tuple[str, ...]
    description: str


class _Checked:
    """Shared by the abstract classes: refuses a class whose members cannot be what is asked for."""

    def __init_subclass__(cls, **options: object) -> None:
        """Look at the class as it is defined.

        Raises:
            ContractError: A member is no method, takes other arguments, is asynchronous, or is
                annotated with another type; the message names all of them, and what is missing.
        """
        super().__init_subclass__(**options)
        if mistyped := mistyped_members(cls):
            raise ContractError(describe_faults(cls, missing_members(cls), mistyped))


class Model(nn.Module, _Checked, ABC):
    """A trainable network that can say what it takes and gives."""

    @abstractmethod
    def forward(self, *inputs: Tensor) -> Tensor:
        """Map inputs, in the order of the metadata, to the logits that the loss takes."""

    @abstractmethod
    def predict(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Map inputs to the outputs of the metadata, in order; this is the graph that is exported.

        It must call ``self(...)``, never ``self.forward(...)``, so that hooks fire.
        """

    @abstractmethod
    def get_model_metadata(self) -> ModelMetadata:
        """Names, dtypes, shapes and units of inputs and outputs, and the class labels."""


@dataclass(frozen=True)
class SourceContext:
    """What a data source is given by the installation.

    Args:
        folder: For local files of the source; not made yet.
        database_url: The setting ``ASSAY_DATABASE_URL``; empty where it is not set.
    """

    folder: Path
    database_url: SecretStr = field(default_factory=lambda: SecretStr(""))


class DataSource(_Checked, ABC):
    """Rows of a task, by split, as Arrow record batches."""

    @abstractmethod
    def schema(self) -> RowSchema:
        """Columns with their types, checks of their values, and the key."""

    @abstractmethod
    def prepare(self) -> None:
        """Make the rows available locally; does nothing the second time.

        Raises:
            DataError: The origin is missing, corrupt or lacks a column.
        """

    @abstractmethod
    def window(self, as_of: date) -> str:
        """Say which rows a run at ``as_of`` trains on and holds out, in words.

        Raises:
            DataError: There is no data for one of the two.
        """

    @abstractmethod
    def batches(self, split: Split, as_of: date) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a split in a fixed order.

        Raises:
            DataError: A stored file is corrupt, or a row breaks the schema.
        """

    @abstractmethod
    def excluded(self, as_of: date) -> Mapping[str, int]:
        """Count the rows of the window that were left out, by reason."""


class Predictor(_Checked, ABC):
    """Something that answers rows of encoded inputs, whatever engine it runs on."""

    @property
    @abstractmethod
    def metadata(self) -> ModelMetadata:
        """What the predictor takes and gives."""

    @abstractmethod
    def predict(self, inputs: Arrays) -> dict[str, npt.NDArray[np.generic]]:
        """Map named inputs to named outputs, row by row.

        Raises:
            ContractError: An input is missing, unknown, or of another dtype or shape.
        """


def instantiate(factory: Callable[..., Instance], *args: object, **kwargs: object) -> Instance:
    """Call a factory, and name what is missing when an abstract class is left incomplete.

    Raises:
        ContractError: The class misses members, or has some that do not fit.
    """
    if inspect.isclass(factory):
        missing, mistyped = missing_members(factory), mistyped_members(factory)
        if missing or mistyped:
            raise ContractError(describe_faults(factory, missing, mistyped))
    try:
        return factory(*args, **kwargs)
    except TypeError as error:
        if "abstract class" not in str(error):
            raise
        raise ContractError(  # the factory is a function, and the class stands inside it
            f"a class must implement every abstract method of its base class: {error}. Define "
            "them, with the signatures in components/contract.py."
        ) from error


def axis_lengths(arrays: Iterable[Shaped], specs: Iterable[TensorSpec]) -> dict[str, int]:
    """Lengths of the dynamic axes by name; where arrays disagree, that of the first."""
    return {axis: found[0] for axis, found in _lengths(arrays, specs).items()}


def admit(declared: Sequence[TensorSpec], given: Sequence[TensorSpec]) -> bool:
    """Whether tensors as ``given`` fit declared ones, where a length may stand for an axis's name.

    Units do not matter; an axis has one length in all tensors.
    """
    lengths: dict[str, str | int] = {}
    if [(s.name, s.dtype, len(s.shape)) for s in declared] != [
        (s.name, s.dtype, len(s.shape)) for s in given
    ]:
        return False
    for wanted, spec in zip(declared, given, strict=True):
        for axis, size in zip(wanted.shape, spec.shape, strict=True):
            free = isinstance(axis, str) and axis != "batch" and isinstance(size, int)
            if (lengths.setdefault(str(axis), size) if free else axis) != size:
                return False
    return True


def check_inputs(inputs: Arrays, specs: tuple[TensorSpec, ...]) -> None:
    """Compare named arrays with their specs; all differences are reported at once.

    Raises:
        ContractError: A name, dtype or shape differs, or the lengths of an axis disagree.
    """
    expected = [spec.name for spec in specs]
    if sorted(inputs) != sorted(expected):
        raise ContractError(f"inputs must be named {expected}; got {sorted(inputs)}.")
    arrays = [inputs[spec.name] for spec in specs]
    pairs = zip(arrays, specs, strict=True)
    faults = [fault for array, spec in pairs if (fault := _mismatch(array, spec))]
    for axis, found in _lengths(arrays, specs).items():
        if len(found) > 1:
            what = "batch size" if axis == "batch" else f"length of axis {axis!r}"
            faults.append(f"inputs must share one {what}; got {sorted(found)}")
    if faults:
        raise ContractError("; ".join(faults) + ".")


def _lengths(arrays: Iterable[Shaped], specs: Iterable[TensorSpec]) -> dict[str, list[int]]:
    """Different lengths of each dynamic axis, as they come."""
    found: dict[str, list[int]] = {}
    for array, spec in zip(arrays, specs, strict=False):
        for place, axis in spec.axes:
            lengths = found.setdefault(axis, [])
            lengths += [n for n in array.shape[place : place + 1] if n not in lengths]
    return {axis: lengths for axis, lengths in found.items() if lengths}


def _mismatch(array: npt.NDArray[np.generic], spec: TensorSpec) -> str | None:
    axes = zip(spec.shape, array.shape, strict=False)
    fits = array.ndim == len(spec.shape) and all(isinstance(w, str) or w == n for w, n in axes)
    if fits and dtype_of(array) == spec.dtype:
        return None
    wanted = f"({', '.join(map(str, spec.shape))}) {spec.dtype}"
    return f"{spec.name!r} must be {wanted}; got {array.shape} {array.dtype}"


def dtype_of(array: npt.NDArray[np.generic]) -> str:
    """The name of an array's dtype as a spec has it; text is NumPy's unicode, never objects."""
    return "string" if array.dtype.kind == "U" else str(array.dtype.name)
