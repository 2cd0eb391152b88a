"""The text of a team's package: a source, and a pipeline over it."""

import textwrap

SOURCE = textwrap.dedent(
    """
    import pyarrow as pa
    from components.contract import DataSource
    from components.data.schema import RowSchema

    SCHEMA = pa.schema([pa.field("x", pa.float32()), pa.field("label", pa.int8(), nullable=False)])

    class Rows(DataSource):
        offset = 0.0

        def __init__(self, at):
            self.folder = at.folder

        def schema(self):
            return RowSchema(SCHEMA)

        def prepare(self):
            self.folder.mkdir(parents=True, exist_ok=True)

        def window(self, as_of):
            return "all rows"

        def batches(self, split, as_of):
            count = 8 if split == "train" else 4
            numbers = [self.offset + i for i in range(count)]
            yield pa.record_batch([numbers, [i % 2 for i in range(count)]], schema=SCHEMA)

        def excluded(self, as_of):
            return {"spoilt": 3}
    """
)
PIPELINE = textwrap.dedent(
    """
    from torch import nn
    from components.contract import Model
    from components.data.encoding import Features
    from components.pipeline import Pipeline, QualityGate
    from components.train.config import TrainConfig
    from {module}.source import Rows

    class Network(Model):
        def forward(self, *inputs): ...
        def predict(self, *inputs): ...
        def get_model_metadata(self): ...

    pipeline = Pipeline(
        name="{module}", description="", source=Rows, model=Network,
        features=Features(label="label", classes=2, numeric=("x",)),
        loss=nn.functional.cross_entropy, config=TrainConfig(epochs=2),
        metrics=lambda scored: {{}}, gates=(QualityGate(metric="accuracy", minimum=0.5),),
        metric="accuracy", margin=0.0, dated=False,
    )
    """
)
