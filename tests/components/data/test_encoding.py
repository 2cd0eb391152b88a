"""Columns to tensors, against answers worked out by hand or by slow loops."""

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from components.contract import TensorSpec, check_inputs
from components.data.encoding import (
    Encoding,
    Features,
    Folded,
    fit_encoding,
    read_labels,
)
from components.data.statistics import QUANTILES, describe
from components.errors import DataError

FEATURES = Features(
    label="label",
    classes=3,
    categorical=("colour", "code"),
    numeric=("size", "count"),
    tensors={"pixels": (2, 2)},
    min_count=2,
)


def table(rows: int = 12) -> pa.Table:
    """Rows with missing and rare values in every kind of column."""
    pixels = pa.array(np.arange(rows * 4, dtype=np.float32))
    return pa.table(
        {
            "colour": pa.array(
                [("red", "blue", "red", None)[i % 4] for i in range(rows - 1)] + ["rare"]
            ),
            "code": pa.array([7 if i % 2 else 10 for i in range(rows)], pa.int32()),
            "size": pa.array([None if i % 5 == 0 else i / 2 for i in range(rows)], pa.float32()),
            "count": pa.array(range(rows), pa.int64()),
            "pixels": pa.FixedSizeListArray.from_arrays(pixels, 4),
            "label": pa.array([i % 3 for i in range(rows)], pa.int8()),
        }
    )


def column(name: str, values: Any) -> pa.Table:
    """The table with one column replaced."""
    rows = table(len(values))
    return rows.set_column(rows.schema.get_field_index(name), name, [values])


@pytest.fixture
def encoding() -> Encoding:
    return fit_encoding(FEATURES, describe(table()))


def test_codes_are_the_place_in_the_vocabulary_and_zero_for_the_rest(encoding: Encoding) -> None:
    colour, code = encoding.categorical
    assert colour.vocabulary == ("blue", "red")
    assert code.vocabulary == ("10", "7"), "sorted as strings"
    codes = encoding.encode(table())["categorical"]
    words = table().column("colour").to_pylist()
    known = {"blue": 1, "red": 2}
    assert codes[:, 0].tolist() == [known.get(word, 0) for word in words]
    assert {"rare", None} <= set(words), "both must give 0 above"
    unseen = column("colour", pa.array(["green", "red", None]))
    assert encoding.encode(unseen)["categorical"][:, 0].tolist() == [0, 2, 0]


def test_the_rarest_kept_category_has_exactly_min_count_rows() -> None:
    words = pa.array(["a"] * 3 + ["b"] * 2 + ["c"] + [None] * 5)
    for min_count, kept in ((1, ("a", "b", "c")), (2, ("a", "b")), (3, ("a",)), (4, ())):
        features = Features(label="label", classes=3, categorical=("colour",), min_count=min_count)
        (found,) = fit_encoding(features, describe(column("colour", words))).categorical
        assert found.vocabulary == kept


def test_a_column_without_any_kept_category_encodes_to_zero() -> None:
    features = Features(label="label", classes=3, categorical=("colour",), min_count=99)
    encoding = fit_encoding(features, describe(table()))
    assert not encoding.encode(table())["categorical"].any()


def test_the_order_of_rows_makes_no_difference(encoding: Encoding) -> None:
    order = np.random.default_rng(0).permutation(12)
    assert fit_encoding(FEATURES, describe(table().take(order))) == encoding


def test_chunks_and_dictionaries_make_no_difference(encoding: Encoding) -> None:
    pieces = pa.Table.from_batches(table().to_batches(max_chunksize=5))
    coded = pieces.set_column(0, "colour", pieces.column("colour").dictionary_encode())
    for rows in (pieces, coded):
        assert fit_encoding(FEATURES, describe(rows)) == encoding
        for name, array in encoding.encode(table()).items():
            np.testing.assert_array_equal(encoding.encode(rows)[name], array)


def test_columns_may_stand_in_any_order_beside_others(encoding: Encoding) -> None:
    names = table().schema.names
    rows = table().select(names[::-1]).append_column("other", pa.array(range(12)))
    for name, array in encoding.encode(table()).items():
        np.testing.assert_array_equal(encoding.encode(rows)[name], array)


def test_a_record_batch_encodes_as_a_table_does(encoding: Encoding) -> None:
    (batch,) = table().to_batches()
    for name, array in encoding.encode(table()).items():
        np.testing.assert_array_equal(encoding.encode(batch)[name], array)


def test_a_slice_encodes_as_its_rows_do(encoding: Encoding) -> None:
    whole = encoding.encode(table())
    for name, array in encoding.encode(table().slice(5, 4)).items():
        np.testing.assert_array_equal(array, whole[name][5:9], err_msg=name)


def test_a_missing_number_stays_nan(encoding: Encoding) -> None:
    numbers = encoding.encode(table())["numeric"]
    assert numbers.dtype == np.float32
    sizes = [math.nan if i % 5 == 0 else i / 2 for i in range(12)]
    np.testing.assert_array_equal(numbers[:, 0], np.array(sizes, np.float32))
    assert np.isfinite(numbers[:, 1]).all()


def test_statistics_agree_with_a_slow_loop(encoding: Encoding) -> None:
    sizes = [i / 2 for i in range(12) if i % 5]
    mean = sum(sizes) / len(sizes)
    size = encoding.numeric[0]
    assert size.mean == pytest.approx(mean)
    assert size.std == pytest.approx(math.sqrt(sum((s - mean) ** 2 for s in sizes) / len(sizes)))
    assert (size.quantiles[0], size.quantiles[-1]) == (min(sizes), max(sizes))


def test_statistics_leave_out_what_is_not_finite() -> None:
    values = pa.array([1.0, math.inf, 3.0, math.nan, None, -math.inf], pa.float32())
    size = fit_encoding(FEATURES, describe(column("size", values))).numeric[0]
    assert (size.mean, size.std, size.quantiles[0], size.quantiles[-1]) == (2.0, 1.0, 1.0, 3.0)


@pytest.mark.parametrize(
    "values",
    [
        [5.0] * 40,
        [0.0] * 39 + [1.0],
        [0.0] * 20 + [1.0] * 20,
        [0.0] * 35 + [1.0, 2.0, 3.0, 4.0, 5.0],
        list(range(40)),
        [float(v) for v in np.random.default_rng(0).normal(size=40)],
    ],
)
def test_quantiles_increase_strictly_and_span_the_column(values: list[float]) -> None:
    rows = column("size", pa.array(values, pa.float32()))
    size = fit_encoding(FEATURES, describe(rows)).numeric[0]
    edges = np.array(size.quantiles)
    assert len(edges) >= 2
    assert (np.diff(edges) > 0).all()
    assert edges[0] == np.float32(min(values))
    assert edges[-1] == (np.float32(max(values)) if len(set(values)) > 1 else edges[0] + 1)
    if len(set(values)) == len(values):
        wanted = np.quantile(np.float32(values).astype(np.float64), np.linspace(0, 1, QUANTILES))
        np.testing.assert_allclose(edges, wanted)


def test_a_constant_column_has_standard_deviation_one() -> None:
    rows = column("size", pa.array([4.0] * 5, pa.float32()))
    size = fit_encoding(FEATURES, describe(rows)).numeric[0]
    assert (size.mean, size.std) == (4.0, 1.0)


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_column_without_a_finite_value_is_refused(value: float | None) -> None:
    rows = column("size", pa.array([value] * 6, pa.float32()))
    with pytest.raises(DataError, match="numeric column 'size' must hold finite values"):
        fit_encoding(FEATURES, describe(rows))


def test_a_number_beyond_the_exact_range_of_float32_is_rounded(encoding: Encoding) -> None:
    rows = column("count", pa.array([2**24 + 1, 2**53 + 1, None], pa.int64()))
    numbers = encoding.encode(rows)["numeric"][:, 1]
    np.testing.assert_array_equal(numbers, np.array([2**24, 2**53, np.nan], np.float32))


def test_words_in_a_numeric_column_are_refused(encoding: Encoding) -> None:
    rows = column("count", pa.array(["1", "two", None]))
    with pytest.raises(DataError, match="'count'"):
        encoding.encode(rows)


def test_lists_are_folded_row_by_row(encoding: Encoding) -> None:
    folded = encoding.encode(table())["pixels"]
    assert folded.dtype == np.float32
    np.testing.assert_array_equal(folded, np.arange(48, dtype=np.float32).reshape(12, 2, 2))


@pytest.mark.parametrize(
    "values",
    [
        pa.array([[1.0] * 4, None, [2.0] * 4], pa.list_(pa.float32(), 4)),
        pa.array([[1.0] * 8] * 3, pa.list_(pa.float32(), 8)),
        pa.array([[1.0] * 2] * 4, pa.list_(pa.float32(), 2)),
        pa.array([1.0, 2.0, 3.0]),
    ],
    ids=["null", "too long", "too short", "no list"],
)
def test_a_list_that_does_not_fold_is_refused(encoding: Encoding, values: pa.Array) -> None:
    with pytest.raises(DataError, match="'pixels'"):
        encoding.encode(column("pixels", values))


def test_the_specs_describe_what_encode_gives(encoding: Encoding) -> None:
    specs = encoding.specs()
    assert specs == (
        TensorSpec(name="categorical", dtype="int64", shape=("batch", 2)),
        TensorSpec(name="numeric", dtype="float32", shape=("batch", 2)),
        TensorSpec(name="pixels", dtype="float32", shape=("batch", 2, 2)),
    )
    inputs = encoding.encode(table())
    assert list(inputs) == [spec.name for spec in specs]
    check_inputs(inputs, specs)


def test_an_encoding_of_one_kind_has_one_input() -> None:
    encoding = Encoding(folded=(Folded(column="pixels", shape=(2, 2)),))
    assert list(encoding.encode(table())) == ["pixels"] == [s.name for s in encoding.specs()]


def test_what_is_encoded_may_be_written_to(encoding: Encoding) -> None:
    assert all(array.flags.writeable for array in encoding.encode(table()).values())


def test_no_rows_encode_to_empty_arrays(encoding: Encoding) -> None:
    shapes = {name: a.shape for name, a in encoding.encode(table().slice(0, 0)).items()}
    assert shapes == {"categorical": (0, 2), "numeric": (0, 2), "pixels": (0, 2, 2)}


def test_an_encoding_survives_json(encoding: Encoding) -> None:
    again = Encoding.model_validate_json(encoding.model_dump_json())
    assert again == encoding
    for name, array in encoding.encode(table()).items():
        assert again.encode(table())[name].tobytes() == array.tobytes()
    with pytest.raises(ValidationError):
        Encoding.model_validate({**encoding.model_dump(), "pickle": "no"})


@pytest.mark.parametrize("name", ["colour", "size", "pixels"])
def test_a_missing_column_is_named(encoding: Encoding, name: str) -> None:
    rows = table().drop_columns([name])
    with pytest.raises(DataError, match=f"column {name!r} must be present"):
        encoding.encode(rows)


@pytest.mark.parametrize("name", ["colour", "size"])
def test_a_missing_column_stops_the_fitting(name: str) -> None:
    with pytest.raises(DataError, match=f"column {name!r} must be present"):
        fit_encoding(FEATURES, describe(table().drop_columns([name])))


def test_labels_are_read_as_writable_int64() -> None:
    labels = read_labels(table(), FEATURES)
    assert labels.dtype == np.int64
    assert labels.tolist() == [i % 3 for i in range(12)]
    assert labels.flags.writeable


@pytest.mark.parametrize(("bad", "words"), [(3, "value 3"), (-1, "value -1")])
def test_a_label_outside_its_range_is_refused(bad: int, words: str) -> None:
    rows = column("label", pa.array([0, 2, bad, bad], pa.int8()))
    with pytest.raises(DataError, match=rf"in 0\.\.2; 2 of 4 rows do not, the first with {words}"):
        read_labels(rows, FEATURES)


def test_a_missing_label_is_refused() -> None:
    rows = column("label", pa.array([0, None, 2], pa.int8()))
    with pytest.raises(DataError, match="1 of 3 are missing"):
        read_labels(rows, FEATURES)


@pytest.mark.parametrize("values", [[0.0, 1.5], ["0", "late"]])
def test_a_label_that_is_no_whole_number_is_refused(values: list[Any]) -> None:
    with pytest.raises(DataError, match="label 'label' must"):
        read_labels(column("label", pa.array(values)), FEATURES)


def test_every_column_that_is_read_is_listed_once() -> None:
    assert FEATURES.columns == ("colour", "code", "size", "count", "pixels", "label")
