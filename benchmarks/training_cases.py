"""The cases of the training benchmark: scikit-learn's digits, and flights as assay encodes them."""

from collections.abc import Callable
from datetime import date
from pathlib import Path

import pyarrow as pa
import torch
from contenders import Case
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FLIGHTS_AS_OF = date(2014, 1, 1)


def digits_case(folder: Path, quick: bool) -> Case:
    """The images of scikit-learn's digits and a perceptron of two hidden layers."""
    tensors = _tensors(folder / "digits.safetensors", read_digits)
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    return Case(
        name="digits-MLP",
        model=model,
        loss=nn.functional.cross_entropy,
        inputs=(tensors["image"],),
        labels=tensors["labels"],
        batch_size=64,
        learning_rate=3e-3,
        epochs=2 if quick else 10,
    )


def read_digits() -> dict[str, Tensor]:
    """Images (1797, 64) from 0 to 1, and labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return {"image": torch.tensor(images / 16, dtype=torch.float32), "labels": torch.tensor(labels)}


def flights_case(folder: Path, quick: bool) -> Case:
    """The shipped model of flights, on rows spread evenly over the months of training."""
    from components.data.encoding import Encoding
    from components.pipelines.flights import pipeline
    from components.train.run import build_model

    path = folder / "flights.json"
    tensors = _tensors(folder / "flights.safetensors", lambda: read_flights(folder, path))
    encoding = Encoding.model_validate_json(path.read_bytes())
    rows = 16_384 if quick else 65_536
    chosen = torch.linspace(0, len(tensors["labels"]) - 1, rows).long()
    return Case(
        name="flights",
        model=build_model(pipeline, encoding, pipeline.config),
        loss=pipeline.loss,
        inputs=tuple(tensors[spec.name][chosen] for spec in encoding.specs()),
        labels=tensors["labels"][chosen],
        batch_size=1024,
        learning_rate=2e-3,
        epochs=2,
    )


def read_flights(folder: Path, path: Path) -> dict[str, Tensor]:
    """Every flight of the training months as tensors; the encoding is written to ``path``."""
    from components.contract import SourceContext
    from components.data.encoding import fit_encoding, read_labels
    from components.data.statistics import describe
    from components.pipelines.flights import pipeline

    source = pipeline.source(SourceContext(folder / "source"))
    source.prepare()
    rows = pa.Table.from_batches(source.batches("train", FLIGHTS_AS_OF))
    encoding = fit_encoding(pipeline.features, describe(rows))
    path.write_text(encoding.model_dump_json())
    arrays = {**encoding.encode(rows), "labels": read_labels(rows, pipeline.features)}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _tensors(path: Path, read: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What an earlier benchmark left at a path, or else what is read, which is left there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(read(), path)
    return load_file(path)


CASES: dict[str, Callable[[Path, bool], Case]] = {"digits": digits_case, "flights": flights_case}
