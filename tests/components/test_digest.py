"""Digests: equal for equal content, different for every difference that matters."""

import hashlib
import itertools
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from components.digest import RowDigest, digest_file, digest_json, digest_sources


def digest_of(*batches: pa.RecordBatch) -> str:
    rows = RowDigest()
    for batch in batches:
        rows.update(batch)
    return rows.hexdigest()


def batch(**columns: Any) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(columns)


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 21) + 17])
def test_a_file_is_digested_whole(tmp_path: Path, size: int) -> None:
    content = np.random.default_rng(size).bytes(size)
    path = tmp_path / "file"
    path.write_bytes(content)
    assert digest_file(path) == hashlib.sha256(content).hexdigest()


def test_json_is_digested_without_regard_to_key_order() -> None:
    assert digest_json({"a": 1, "b": [1, {"c": 2, "d": 3}]}) == digest_json(
        {"b": [1, {"d": 3, "c": 2}], "a": 1}
    )


def test_json_digests_tell_values_apart() -> None:
    values: list[Any] = [1, "1", True, None, 1.5, [1], [[1]], {"1": 1}, {}, [], "", "é"]
    assert len({digest_json(value) for value in values}) == len(values)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_json_cannot_hold_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="JSON"):
        digest_json({"a": value})


def write_package(folder: Path) -> Path:
    (folder / "inner").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "a.py").write_text("A = 1\n")
    (folder / "inner" / "b.py").write_text("B = 2\n")
    (folder / "notes.txt").write_text("not code")
    return folder


def test_another_checkout_of_the_same_sources_has_the_same_digest(tmp_path: Path) -> None:
    first = write_package(tmp_path / "one" / "package")
    second = write_package(tmp_path / "two" / "deeper" / "package")
    (second / "notes.txt").write_text("changed")
    (second / "__pycache__").mkdir()
    (second / "__pycache__" / "a.cpython-311.pyc").write_bytes(b"\0")
    assert digest_sources([first]) == digest_sources([second])


def test_every_change_of_a_source_changes_the_digest(tmp_path: Path) -> None:
    def change(content: Callable[[Path], object]) -> str:
        folder = write_package(tmp_path / str(next(number)) / "package")
        content(folder)
        return digest_sources([folder])

    number = itertools.count()
    found = [
        change(lambda folder: None),
        change(lambda folder: (folder / "a.py").write_text("A = 2\n")),
        change(lambda folder: (folder / "inner" / "b.py").write_text("B = 2")),
        change(lambda folder: (folder / "a.py").rename(folder / "c.py")),
        change(lambda folder: (folder / "a.py").rename(folder / "inner" / "a.py")),
        change(lambda folder: (folder / "a.py").unlink()),
        change(lambda folder: (folder / "new.py").write_text("")),
    ]
    assert len(set(found)) == len(found)


def test_sources_may_be_files_and_are_counted_once_in_any_order(tmp_path: Path) -> None:
    package = write_package(tmp_path / "package")
    single = tmp_path / "single.py"
    single.write_text("S = 1\n")
    both = digest_sources([package, single])
    assert both == digest_sources([single, package, single])
    assert both != digest_sources([package])
    single.write_text("S = 2\n")
    assert both != digest_sources([package, single])


ROWS = pa.table(
    {
        "word": pa.array([None if i % 4 == 0 else "é" * (i % 3) + str(i) for i in range(40)]),
        "number": pa.array([None if i % 5 == 0 else i / 7 for i in range(40)], pa.float32()),
        "whole": pa.array([None if i % 6 == 0 else i for i in range(40)], pa.int64()),
        "flag": pa.array([None if i % 9 == 0 else i % 2 == 0 for i in range(40)]),
        "day": pa.array([None if i == 3 else date(2013, 1, 1 + i % 28) for i in range(40)]),
        "moment": pa.array(
            [datetime(2013, 1, 1, tzinfo=UTC) + timedelta(minutes=i) for i in range(40)]
        ),
        "image": pa.array([[float(i), 0.5] for i in range(40)], pa.list_(pa.float32(), 2)),
    }
)


@pytest.mark.parametrize("chunk", [1, 3, 7, 39])
def test_rows_have_one_digest_however_they_are_cut(chunk: int) -> None:
    whole = digest_of(*ROWS.to_batches())
    assert digest_of(*ROWS.to_batches(max_chunksize=chunk)) == whole
    copied = [
        pa.RecordBatch.from_pylist(b.to_pylist(), ROWS.schema) for b in ROWS.to_batches(chunk)
    ]
    assert digest_of(*copied) == whole, "a slice is digested as its own rows"


@pytest.mark.parametrize("name", ROWS.schema.names)
def test_every_value_counts(name: str) -> None:
    place = ROWS.schema.get_field_index(name)
    whole = digest_of(*ROWS.to_batches())
    values = ROWS.column(name).to_pylist()
    seen = {whole}
    for row in (1, 17, 38):
        swapped = [*values]
        swapped[row], swapped[row + 1] = values[row + 1], values[row]
        column = pa.array(swapped, ROWS.schema.field(name).type)
        seen.add(digest_of(*ROWS.set_column(place, name, [column]).to_batches()))
    assert len(seen) == 4


@pytest.mark.parametrize("name", [n for n in ROWS.schema.names if ROWS.column(n).null_count])
def test_a_null_is_not_the_zero_that_stands_for_it(name: str) -> None:
    zeros: dict[str, Any] = {
        "word": "",
        "number": 0,
        "whole": 0,
        "flag": False,
        "day": date(1970, 1, 1),
    }
    filled = ROWS.set_column(
        ROWS.schema.get_field_index(name), name, [ROWS.column(name).fill_null(zeros[name])]
    )
    assert digest_of(*filled.to_batches()) != digest_of(*ROWS.to_batches())


def test_what_lies_under_a_null_does_not_count() -> None:
    def hidden(value: float) -> pa.RecordBatch:
        valid = pa.py_buffer(bytes([0b101]))
        values = pa.py_buffer(np.array([1.0, value, 3.0], np.float32).tobytes())
        array = pa.Array.from_buffers(pa.float32(), 3, [valid, values])
        assert array.to_pylist() == [1.0, None, 3.0]
        return pa.RecordBatch.from_arrays([array], ["x"])

    assert digest_of(hidden(7.0)) == digest_of(hidden(9.0))


def test_storage_does_not_count() -> None:
    words = pa.array(["a", None, "b", "a"])
    plain, coded, large = (
        digest_of(pa.RecordBatch.from_arrays([array], ["x"]))
        for array in (words, words.dictionary_encode(), words.cast(pa.large_string()))
    )
    assert plain == coded == large


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (batch(x=["ab", "c"]), batch(x=["a", "bc"])),
        (batch(x=[1, 2]), batch(y=[1, 2])),
        (batch(x=[1], y=[2]), batch(y=[2], x=[1])),
        (batch(x=[1]), batch(x=[1.0])),
        (batch(x=[1]), batch(x=[1, 1])),
        (batch(x=["1"]), batch(x=[1])),
    ],
)
def test_different_rows_have_different_digests(left: pa.RecordBatch, right: pa.RecordBatch) -> None:
    assert digest_of(left) != digest_of(right)


def test_marks_tell_parts_apart() -> None:
    first, second = batch(x=[1, 2]), batch(x=[3])

    def marked(*parts: tuple[pa.RecordBatch, ...]) -> str:
        rows = RowDigest()
        for part in parts:
            rows.mark()
            for piece in part:
                rows.update(piece)
        return rows.hexdigest()

    assert marked((first,), (second,)) != marked((first, second), ())
    assert marked((first,), (second,)) != marked((first, second))
    assert marked((first, second), ()) != marked((), (first, second))


def test_reading_the_digest_does_not_end_it() -> None:
    rows = RowDigest()
    rows.update(batch(x=[1]))
    early = rows.hexdigest()
    assert rows.hexdigest() == early
    rows.update(batch(x=[2]))
    assert rows.hexdigest() == digest_of(batch(x=[1, 2])) != early
    assert rows.rows == 2
