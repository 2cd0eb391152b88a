"""Bad rows: every broken rule is named, with how many rows break it and the first of them."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pandera.pyarrow as pandera
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from support.listed_rows import DAY, FEATURES, SCHEMA, Listed, changed, made_up

from components.data.chunks import CHUNK_ROWS
from components.data.encoding import Features
from components.data.schema import RowSchema
from components.data.take import take_snapshot
from components.errors import DataError
from components.storage import Storage

Take = Callable[..., Any]


@pytest.fixture
def refusal(tmp_path: Path) -> Callable[..., str]:
    """The complaint about rows, which must leave no snapshot behind."""

    def refuse(
        train: Any,
        holdout: Any = None,
        *,
        schema: RowSchema | None = None,
        features: Features = FEATURES,
    ) -> str:
        source = Listed(train, made_up(50) if holdout is None else holdout, schema=schema)
        with pytest.raises(DataError) as caught:
            take_snapshot(source, features, DAY, Storage(tmp_path))
        assert {path.name for path in tmp_path.iterdir()} <= {"locks"}
        return str(caught.value)

    return refuse


def checked(**checks: Any) -> RowSchema:
    return RowSchema(SCHEMA, checks={name: [check] for name, check in checks.items()})


def test_good_rows_pass_every_check(tmp_path: Path) -> None:
    schema = RowSchema(
        SCHEMA,
        checks={
            "number": [pandera.Check.in_range(0, 150), pandera.Check.ne(-1)],
            "word": [pandera.Check.isin([f"w{i}" for i in range(5)])],
        },
        key=("id",),
    )
    rows = made_up(2 * CHUNK_ROWS + 3)
    source = Listed(rows, made_up(50), schema=schema)
    assert take_snapshot(source, FEATURES, DAY, Storage(tmp_path)).rows["train"] == len(rows)


@pytest.mark.parametrize("empty", ["train", "holdout"])
def test_an_empty_split_is_refused(refusal: Take, empty: str) -> None:
    rows = {"train": made_up(10), "holdout": made_up(10), empty: made_up(0)}
    message = refusal(rows["train"], rows["holdout"])
    assert f"the {empty} split of the listed rows must have rows; it is empty" in message


def test_one_class_alone_is_refused_in_training_only(refusal: Take, tmp_path: Path) -> None:
    same = changed(made_up(40), "label", dict.fromkeys(range(40), 1))
    message = refusal(same)
    assert "label 'label' must have at least 2 of its 2 classes; every row has 1" in message
    take_snapshot(Listed(made_up(40), same), FEATURES, DAY, Storage(tmp_path))


def test_a_type_that_changes_between_batches_is_named(refusal: Take) -> None:
    first, second = made_up(20).to_batches()[0], made_up(20, 20)
    wide = second.set_column(2, "number", second["number"].cast(pa.float64())).to_batches()[0]
    message = refusal([first, wide, first])
    assert "train, from row 20: 'number' must be float; got double" in message
    assert "1 rule is broken" in message


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (
            SCHEMA.set(1, pa.field("name", pa.string())),
            "'word' must be string; got nothing and 'n",
        ),
        (SCHEMA.set(3, pa.field("label", pa.int8())), "nullability or order of columns differs"),
        (pa.schema(list(SCHEMA)[::-1]), "nullability or order of columns differs"),
    ],
)
def test_batches_of_other_columns_are_refused(refusal: Take, schema: pa.Schema, words: str) -> None:
    rows = made_up(20)
    renamed = rows.rename_columns(["name" if n == "word" else n for n in rows.column_names])
    source = rows if set(schema.names) == set(rows.column_names) else renamed
    assert words in refusal(source.select(schema.names).cast(schema))


def test_a_missing_value_where_none_may_be_is_shown(refusal: Take) -> None:
    loose = pa.table({n: made_up(20)[n] for n in SCHEMA.names})
    batch = pa.RecordBatch.from_arrays(
        [changed(loose, "id", {3: None, 7: None})[n].combine_chunks() for n in SCHEMA.names],
        schema=SCHEMA,
    )
    message = refusal([batch])
    assert "train: 'id' must have a value: 2 of 20 rows do not: row 3 has None, row 7" in message


def test_nan_counts_as_missing(refusal: Take, tmp_path: Path) -> None:
    rows = changed(made_up(20), "number", {4: float("nan")})
    full = made_up(20)["number"].fill_null(1.0)
    strict = SCHEMA.set(2, pa.field("number", pa.float32(), nullable=False))
    number = changed(rows.set_column(2, "number", full), "number", {4: float("nan")})["number"]
    message = refusal(rows.set_column(2, strict.field(2), number), schema=RowSchema(strict))
    assert "'number' must have a value: 1 of 20 rows do not: row 4 has nan" in message
    schema = checked(number=pandera.Check.in_range(0, 1e9))
    take_snapshot(Listed(rows, rows, schema=schema), FEATURES, DAY, Storage(tmp_path))


@pytest.mark.parametrize(
    ("checks", "column", "value", "words"),
    [
        ({"number": pandera.Check.in_range(0, 150)}, "number", 151.0, "in_range(0, 150)"),
        ({"number": pandera.Check.ge(0)}, "number", -1.0, "greater_than_or_equal_to(0)"),
        ({"word": pandera.Check.isin([f"w{i}" for i in range(5)])}, "word", "?", "isin("),
        ({"word": pandera.Check.str_matches("^w")}, "word", "x", "str_matches("),
        ({"id": pandera.Check.lt(10**6)}, "id", 10**7, "less_than(1000000)"),
        (
            {"number": pandera.Check(lambda d: pc.less(d.table[d.key], 200.0), error="my rule")},
            "number",
            201.0,
            "my rule",
        ),
        (
            {"number": pandera.Check(lambda x: x < 200, element_wise=True, error="one by one")},
            "number",
            201.0,
            "one by one",
        ),
    ],
)
def test_a_value_that_breaks_a_check_is_shown_with_its_row(
    refusal: Take, checks: Any, column: str, value: Any, words: str
) -> None:
    places = [5, CHUNK_ROWS, *range(9 * CHUNK_ROWS, 9 * CHUNK_ROWS + 5)]
    rows = changed(made_up(9 * CHUNK_ROWS + 20), column, dict.fromkeys(places, value))
    message = refusal(rows, schema=checked(**checks))
    assert f"train: {column!r} must pass {words}" in message
    assert f": 7 of {len(rows):,} rows do not: " in message
    shown = [f"row {place} has {value!r}" for place in places]
    assert ", ".join(shown[:5]) + ", ...." in message
    assert shown[5] not in message


def test_a_check_of_all_values_together_has_no_rows(refusal: Take) -> None:
    check = pandera.Check(lambda d: bool(pc.sum(d.table[d.key]).as_py() < 0), error="sum")
    assert "'number' must pass sum" in refusal(made_up(20), schema=checked(number=check))


def test_a_check_that_cannot_be_made_is_named(refusal: Take) -> None:
    message = refusal(made_up(20), schema=checked(word=pandera.Check.gt(3)))
    assert "'word' must pass greater_than(3)" in message


@pytest.mark.parametrize(
    ("features", "value", "words"),
    [
        (FEATURES, 2, "label 'label' must be one of 0..1: 1 of 40 rows do not: row 9 has 2"),
        (FEATURES, -1, "label 'label' must be one of 0..1: 1 of 40 rows do not: row 9 has -1"),
    ],
)
def test_a_label_outside_its_range_is_refused(
    refusal: Take, features: Features, value: int, words: str
) -> None:
    assert words in refusal(changed(made_up(40), "label", {9: value}), features=features)
    assert f"holdout: {words}" in refusal(
        made_up(40), changed(made_up(40), "label", {9: value}), features=features
    )


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("nan"), "label 'number' must have a value: 1 of 20 rows do not: row 3 has nan"),
        (None, "label 'number' must have a value: 1 of 20 rows do not: row 3 has None"),
        (0.5, "label 'number' must be one of 0..1: 1 of 20 rows do not: row 3 has 0.5"),
        (float("inf"), "label 'number' must be one of 0..1: 1 of 20 rows do not: row 3 has inf"),
    ],
)
def test_a_label_that_is_no_class_is_refused(refusal: Take, value: Any, words: str) -> None:
    whole = changed(made_up(20), "number", {i: float(i % 2) for i in range(20)})
    features = Features(label="number", classes=2)
    message = refusal(changed(whole, "number", {3: value}), whole, features=features)
    assert words in message
    assert "1 rule is broken" in message


def test_a_label_of_words_is_refused(refusal: Take) -> None:
    message = refusal(made_up(20), features=Features(label="word", classes=2))
    assert "label 'word' must hold whole numbers; it is declared as string" in message


def test_missing_feature_columns_are_named_together(refusal: Take) -> None:
    features = Features(label="verdict", classes=2, categorical=("word", "colour"))
    message = refusal(made_up(20), features=features)
    assert "missing: colour, verdict; present: id, word, number, label" in message


KEYED = RowSchema(SCHEMA, key=("id",))


@pytest.mark.parametrize("place", [1, 7, CHUNK_ROWS, CHUNK_ROWS + 1])
def test_a_repeated_key_is_shown(refusal: Take, place: int) -> None:
    rows = changed(made_up(CHUNK_ROWS + 9), "id", {place: place - 1})
    message = refusal(rows, schema=KEYED)
    assert "key (id) must be different in every row" in message
    assert f"row {place} has {{'id': {place - 1}}}" in message
    assert "must ascend" not in message


@pytest.mark.parametrize("place", [1, 7, CHUNK_ROWS, CHUNK_ROWS + 1])
def test_a_key_out_of_order_is_shown(refusal: Take, place: int) -> None:
    rows = changed(made_up(CHUNK_ROWS + 9), "id", {place: -5})
    message = refusal(rows, schema=KEYED)
    assert f"key (id) must ascend: 1 of {CHUNK_ROWS + 9:,} rows do not: row {place} has" in message


def test_a_key_of_several_columns_ascends_from_left_to_right(refusal: Take, tmp_path: Path) -> None:
    schema = pa.schema(
        [
            pa.field("day", pa.date32(), nullable=False),
            pa.field("name", pa.string(), nullable=False),
            pa.field("label", pa.int8(), nullable=False),
        ]
    )

    def rows(*keys: tuple[int, str]) -> pa.Table:
        days, names = zip(*keys, strict=True)
        columns = [[date(2013, 1, d) for d in days], names, [i % 2 for i in range(len(keys))]]
        return pa.table(
            [pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema
        )

    good = rows((1, "b"), (1, "c"), (2, "a"), (2, "b"))
    rules, features = RowSchema(schema, key=("day", "name")), Features(label="label", classes=2)
    message = refusal(
        rows((1, "b"), (2, "a"), (1, "c"), (1, "c")), good, schema=rules, features=features
    )
    assert "key (day, name) must be different in every row: 1 of 4 rows do not: row 3" in message
    assert "key (day, name) must ascend: 1 of 4 rows do not: row 2 has" in message
    take_snapshot(Listed(good, good, schema=rules), features, DAY, Storage(tmp_path))


def test_everything_wrong_is_listed_at_once(refusal: Take) -> None:
    schema = RowSchema(
        SCHEMA,
        checks={
            "number": [pandera.Check.in_range(0, 150)],
            "word": [pandera.Check.str_startswith("w")],
        },
        key=("id",),
    )
    train = changed(changed(made_up(40), "number", {2: 999.0}), "word", {3: "x", 4: "y"})
    train = changed(changed(train, "id", {5: 4}), "label", {6: 9})
    message = refusal(train, made_up(0), schema=schema)
    assert "5 rules are broken" in message
    for words in (
        "the holdout split of the listed rows must have rows",
        "in_range(0, 150): 1 of 40 rows do not: row 2 has 999.0",
        "str_startswith('w'): 2 of 40 rows do not: row 3 has 'x', row 4 has 'y'",
        "key (id) must be different in every row: 1 of 40 rows do not: row 5",
        "0..1: 1 of 40 rows do not: row 6 has 9",
    ):
        assert words in message


def test_pandera_is_imported_only_for_checks(checkout: Path, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from support.listed_rows import *\n"
        "from components.data.take import take_snapshot\n"
        "from components.storage import Storage\n"
        "source = Listed(made_up(20), made_up(20))\n"
        "take_snapshot(source, FEATURES, DAY, Storage(sys.argv[1]))\n"
        "assert 'pandera' not in sys.modules\n"
    )
    path = os.pathsep.join([str(checkout), str(checkout / "tests")])
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=environment, check=True)
