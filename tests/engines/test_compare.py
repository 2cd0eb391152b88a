"""What an engine told against the golden values: names, then types and shapes, then values."""

import base64

import numpy as np
import pytest

from components.smoke_test.engines import child
from components.smoke_test.engines.compare import Array, Tensor, compare, decode

GOLDEN = {
    "p": np.array([[0.25, 0.75], [0.5, 0.5], [1, 0]], np.float32),
    "n": np.array([1, 2, 3]),
    "label": np.array(["a", "bé✈", ""]),
}


def told(**changed: Array) -> list[dict[str, Tensor]]:
    """Golden values in two batches, some of them changed."""
    outputs = {**GOLDEN, **changed}
    parts = (slice(0, 1), slice(1, None))
    return [
        {name: Tensor(**child.encode(array[part])) for name, array in outputs.items()}
        for part in parts
    ]


def test_equal_answers_have_no_difference() -> None:
    assert compare(told(), GOLDEN, rtol=0, atol=0) == (0.0, [])


@pytest.mark.parametrize("kind", ["float32", "float64", "int32", "int64", "bool", "<U1"])
def test_every_type_survives_the_way(kind: str) -> None:
    array = np.array([[0, 1], [1, 0]]).astype(kind)
    back = decode(Tensor(**child.encode(array)))
    assert back.dtype == array.dtype
    assert (back == array).all()


def test_text_may_come_as_objects() -> None:
    assert compare(told(label=GOLDEN["label"].astype(object)), GOLDEN, rtol=0, atol=0)[1] == []


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"p": GOLDEN["p"].astype(np.float64)}, "'p' must be (3, 2) float32; got (3, 2) float64"),
        ({"p": GOLDEN["p"][:, :1]}, "'p' must be (3, 2) float32; got (3, 1) float32"),
        ({"p": GOLDEN["p"] * np.nan}, "'p' must be finite; got 6 NaN or infinite values"),
        ({"p": GOLDEN["p"] + np.float32(0.25)}, "row 0 differs by 0.25"),
        ({"n": np.array([1, 2, 4])}, "1 of 3 differ, the first in row 2: 4 for 3"),
        ({"n": np.array([1.0, 2, 3])}, "'n' must be (3,) int64; got (3,) float64"),
        ({"label": np.array(["a", "be✈", "c"])}, "2 of 3 differ, the first in row 1: 'be✈'"),
        ({"label": np.array([1, 2, 3])}, "'label' must be (3,) <U3; got (3,) int64"),
        ({"more": np.array([1, 2, 3])}, "outputs must be ['label', 'n', 'p']; got ['label', 'more"),
    ],
)
def test_each_difference_has_its_own_words(changed: dict[str, Array], fault: str) -> None:
    (text,) = compare(told(**changed), GOLDEN, rtol=0, atol=1e-6)[1]
    assert fault in text


def test_the_difference_is_measured_within_tolerance() -> None:
    largest, failures = compare(told(p=GOLDEN["p"] + np.float32(2**-10)), GOLDEN, rtol=0, atol=1e-3)
    assert (largest, failures) == (2**-10, [])


@pytest.mark.parametrize(
    ("tensor", "fault"),
    [
        (Tensor(type="object", shape=(1,), data=""), "numbers of type 'object'"),
        (Tensor(type="float32", shape=(2,), data=base64.b64encode(b"1234").decode()), "reshape"),
        (Tensor(type="float32", shape=(1,), data="!"), "base64"),
        (Tensor(type="string", shape=(2,), data=("a",)), "reshape"),
    ],
)
def test_data_that_is_no_array_is_refused(tensor: Tensor, fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        decode(tensor)
