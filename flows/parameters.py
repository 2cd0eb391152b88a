"""Flow parameters: flat, typed and described, so that Prefect's UI shows a form."""

from datetime import date
from typing import Annotated

from pydantic import Field

PipelineName = Annotated[
    str,
    Field(
        description="registered pipeline, for example flights", json_schema_extra={"position": 0}
    ),
]
AsOf = Annotated[
    date,
    Field(
        description="train on the months before the last complete month before this date",
        json_schema_extra={"position": 1},
    ),
]
Seed = Annotated[
    int,
    Field(
        ge=0,
        le=2**31 - 1,
        description="seed of weights and order",
        json_schema_extra={"position": 2},
    ),
]
Settings = Annotated[
    list[str],
    Field(
        description="training settings as key=value, for example epochs=3",
        json_schema_extra={"position": 3},
    ),
]
Force = Annotated[
    bool,
    Field(description="train anew though nothing changed", json_schema_extra={"position": 4}),
]
RunId = Annotated[
    str, Field(description="MLflow run that holds the stage before this one", min_length=1)
]
