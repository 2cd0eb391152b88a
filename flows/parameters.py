"""Flow parameters: flat, typed and described, so that Prefect's UI shows a form."""

from dataclasses import dataclass
from datetime import date
from typing import Annotated, final

from pydantic import Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema


@final
@dataclass(frozen=True)
class Described:
    """A parameter's description; Prefect drops the one that pydantic's ``Field`` holds."""

    text: str

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """The schema as it would be, with the description."""
        return {**handler(schema), "description": self.text}


PipelineName = Annotated[str, Described("registered pipeline, for example flights")]
AsOf = Annotated[
    date, Described("train on the months before the last complete month before this date")
]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1), Described("seed of weights and order")]
Settings = Annotated[list[str], Described("training settings as key=value, for example epochs=3")]
Force = Annotated[bool, Described("train anew though nothing changed")]
TrainInto = Annotated[
    str, Described("MLflow run that holds a job to train; set by retrain, and outranks the others")
]
RunId = Annotated[
    str, Field(min_length=1), Described("MLflow run that holds the stage before this one")
]
ModelName = Annotated[str, Field(min_length=1), Described("registered model, for example flights")]
VersionNumber = Annotated[int, Field(ge=1), Described("version to make champion")]
EarlierVersion = Annotated[
    int, Field(ge=0), Described("version to return to; 0 is the champion before the present one")
]
Reason = Annotated[str, Field(min_length=1), Described("why; it is kept in the model's history")]
