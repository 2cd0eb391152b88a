"""A page that predicts in the browser: static files around a registered graph that takes rows.

What the form asks follows from the graph's own metadata: its columns with their types, the
vocabulary of each text, the usual range of each number, and the classes. The pipeline may add words
for people (titles, units, groups) in a file of its own.
"""

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import onnx
from pydantic import BaseModel, ConfigDict, ValidationError

from components.contract import ModelMetadata
from components.data.encoding import Encoding
from components.errors import ConfigError, DataError
from components.export.golden import read_golden
from components.export.onnx_file import COLUMNS_KEY, ENCODING_KEY, METADATA_KEY, properties
from components.export.raw_columns import RawColumn, RawColumns
from components.smoke_test.engines.child import ORT_WEB_FILES

ASSETS = ("index.html", "style.css", "predict.mjs")
EXAMPLES = 12
"""Golden rows that the form can be filled with."""


class Words(BaseModel):
    """What a column is called; ``time`` marks minutes after midnight."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = ""
    unit: str = ""
    kind: Literal["time"] | None = None


class PageWords(BaseModel):
    """A pipeline's words for its page: the question, and its columns by group."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = ""
    groups: dict[str, dict[str, Words]] = {}


def build_page(
    model: Path,
    golden: Path | None,
    *,
    name: str,
    version: int,
    assets: Path,
    node_modules: Path,
    folder: Path,
) -> dict[str, int]:
    """Write a folder that any server of static files can serve.

    Args:
        model: A registered graph that takes rows.
        golden: Its golden rows, offered as examples.
        name: The registered model, which may have a file ``<name>.json`` of words in ``assets``.
        version: The registered version.
        assets: The folder with :data:`ASSETS`.
        node_modules: Where npm installed onnxruntime-web.
        folder: Made if it is not there; files of an earlier page are replaced.

    Returns:
        The size in bytes of each file, by its path in the folder.

    Raises:
        ConfigError: The graph takes no columns, or a file that is needed is missing.
    """
    web = node_modules / "onnxruntime-web" / "dist"
    sources = {asset: assets / asset for asset in ASSETS}
    sources |= {f"ort/{file}": web / file for file in ORT_WEB_FILES}
    sources["model.onnx"] = model
    absent = [str(path) for path in sources.values() if not path.is_file()]
    if absent:
        raise ConfigError(
            f"a page needs {', '.join(absent)}, which is not there. Run 'make engines' in a "
            "checkout, and set ASSAY_NODE_MODULES to the folder that it names."
        )
    schema = page_schema(model, golden, _words(assets / f"{name}.json"), name, version)
    (folder / "ort").mkdir(parents=True, exist_ok=True)
    for target, source in sources.items():
        shutil.copyfile(source, folder / target)
    text = json.dumps(schema, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / "schema.json").write_text(text, encoding="utf-8")
    return {target: (folder / target).stat().st_size for target in [*sources, "schema.json"]}


def page_schema(
    model: Path, golden: Path | None, words: PageWords, name: str, version: int
) -> dict[str, Any]:
    """What the page needs to know of the graph, as JSON.

    Raises:
        ConfigError: The graph takes no columns.
        DataError: The file is no ONNX model.
    """
    metadata, encoding, columns = _described(model)
    grouped = [column for group in words.groups.values() for column in group]
    known = {column.name: column for column in columns.columns}
    groups = {title: [c for c in group if c in known] for title, group in words.groups.items()}
    rest = [column for column in known if column not in grouped]
    groups |= {"Columns" if not groups else "Other": rest} if rest else {}
    spoken = {c: said for group in words.groups.values() for c, said in group.items()}
    return {
        "name": name,
        "version": version,
        "title": words.title or metadata.description,
        "description": metadata.description,
        "classes": list(metadata.classes),
        "outputs": [spec.name for spec in metadata.outputs if spec.dtype != "string"],
        "columns": {
            column.name: _column(column, encoding, spoken.get(column.name, Words()))
            for column in columns.columns
        },
        "groups": [{"title": title, "columns": group} for title, group in groups.items() if group],
        "examples": _examples(golden, list(known)) if golden else [],
    }


def _words(path: Path) -> PageWords:
    if not path.is_file():
        return PageWords()
    try:
        return PageWords.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigError(
            f"{path} must hold words for a page; it has {error.error_count()} faults, the first: "
            f"{error.errors()[0]['msg']}. Correct it."
        ) from error


def _described(model: Path) -> tuple[ModelMetadata, Encoding, RawColumns]:
    try:
        held = properties(onnx.load(model, load_external_data=False))
    except Exception as error:
        raise DataError(
            f"{model.name} must be an ONNX model; got {type(error).__name__}. Fetch it again."
        ) from error
    columns = RawColumns.model_validate_json(held.get(COLUMNS_KEY, '{"columns": []}'))
    if not columns.columns or columns.folded:
        raise ConfigError(
            "a page needs a model whose inputs are columns of numbers and text; this one takes "
            f"{', '.join(f.column for f in columns.folded) or 'none'}. Use it from code instead."
        )
    metadata = ModelMetadata.model_validate_json(held[METADATA_KEY])
    return metadata, Encoding.model_validate_json(held[ENCODING_KEY]), columns


def _column(column: RawColumn, encoding: Encoding, words: Words) -> dict[str, Any]:
    """One field of the form; numbers come with their quantiles over the training rows."""
    made: dict[str, Any] = {
        "dtype": column.dtype,
        "title": words.title or column.name.replace("_", " ").capitalize(),
        "unit": words.unit,
    }
    for item in encoding.categorical:
        if item.column == column.name:
            return {**made, "kind": "choice", "values": list(item.vocabulary)}
    numeric = next(item for item in encoding.numeric if item.column == column.name)
    quantiles = numeric.quantiles
    kind = words.kind or ("flag" if column.dtype == "bool" else "number")
    return {
        **made,
        "kind": kind,
        "low": quantiles[0],
        "typical": quantiles[len(quantiles) // 2],
        "high": quantiles[-1],
    }


def _examples(golden: Path, columns: list[str]) -> list[dict[str, Any]]:
    """Golden rows by column, a missing number as null."""
    inputs, _ = read_golden(golden)
    arrays: Mapping[str, list[Any]] = {name: inputs[name].tolist() for name in columns}
    rows = min(EXAMPLES, *(len(values) for values in arrays.values()))
    return [{name: _plain(values[i]) for name, values in arrays.items()} for i in range(rows)]


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
