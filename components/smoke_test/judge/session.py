"""One session: how it is opened, what it runs on, and how it is called."""

from typing import Any

import numpy as np

from .golden import Golden, Named, onnx_type
from .job import Job

SESSION_CONFIG = {
    "session.intra_op.allow_spinning": "0",
    "session.inter_op.allow_spinning": "0",
    # Without this, bytes in onnxruntime's own format would be accepted under an ONNX name.
    "session.load_model_format": "ONNX",
}

COLUMNS_KEY = "assay.columns"
"""Property of a file whose inputs are a source's columns, as they are."""


def open_session(ort: Any, model: bytes, job: Job) -> Any:
    """Load the very bytes that were hashed, so that the file cannot be swapped in between."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for key, value in SESSION_CONFIG.items():
        options.add_session_config_entry(key, value)
    # One that this build lacks is left to check_provider, so that the other checks still run.
    built_in = job["provider"] in ort.get_available_providers()
    provider: Any = job["provider"] if built_in else "CPUExecutionProvider"
    if provider == "CUDAExecutionProvider":
        # torch is not there to load the CUDA libraries, and TF32 is off by 1e-3.
        ort.preload_dlls()
        provider = (provider, {"use_tf32": "0"})
    return ort.InferenceSession(model, options, providers=[provider], enable_fallback=False)


def check_provider(session: Any, required: str) -> list[str]:
    """Compare the provider that onnxruntime chose, since it falls back without an error."""
    chosen = session.get_providers()
    if chosen[0] == required:
        return []
    return [
        f"the session must run on {required}; onnxruntime chose {', '.join(chosen)}. Run where "
        "the provider and its libraries are installed, or require CPUExecutionProvider"
    ]


class Subject:
    """A session under test, with the golden rows that it must answer."""

    def __init__(self, session: Any, golden: Golden) -> None:
        self.session = session
        self.golden = golden
        self.names = list(golden.outputs)

    def run(self, feed: Named) -> Named:
        """Answer named inputs with named outputs."""
        return dict(zip(self.names, self.session.run(self.names, feed), strict=True))

    def sample(self, most: int = 64) -> Named:
        """The first golden rows, ``most`` at most, as inputs."""
        return self.golden.feed(np.arange(min(most, self.golden.rows)))

    def signature_faults(self) -> list[str]:
        """Compare names and element types of inputs and outputs with the golden file's."""
        pairs = (
            ("inputs", self.golden.inputs, self.session.get_inputs()),
            ("outputs", self.golden.outputs, self.session.get_outputs()),
        )
        faults = []
        for side, recorded, nodes in pairs:
            want = {name: onnx_type(array) for name, array in sorted(recorded.items())}
            got = {node.name: node.type for node in sorted(nodes, key=lambda node: str(node.name))}
            if got != want:
                faults.append(f"{side} must be {want} as in the golden file; the model has {got}")
        return faults

    def takes_columns(self) -> bool:
        """Say whether the file declares that its inputs are a source's columns."""
        return COLUMNS_KEY in self.session.get_modelmeta().custom_metadata_map

    def columns(self) -> list[str]:
        """The inputs that are columns of a source, which may hold anything of their type.

        Text and float64 always are; of the others, rank 1 in a file that takes columns. An integer
        elsewhere is a code, and a network is asked for no code that it lacks.
        """
        takes_columns = self.takes_columns()
        return [
            name
            for name, array in self.golden.inputs.items()
            if array.ndim == 1 and (takes_columns or array.dtype in (np.float64, object))
        ]

    def may_miss(self, name: str) -> bool:
        """Say whether an input may be missing: text, what was missing, and numbers of a column."""
        array = self.golden.inputs[name]
        if array.dtype.kind != "f":
            return array.dtype == object and array.ndim == 1
        is_column = self.takes_columns() and array.dtype == np.float64 and array.ndim == 1
        return is_column or bool(np.isnan(array).any())
