"""Where a graph starts to differ from its module; for a graph that is known to differ.

Two references are tried. A fresh export of the module has the same nodes, so a stale weight or an
altered constant shows at the first node whose value differs while its inputs agree. Where the fresh
graph agrees, the export itself is unfaithful, and the graph's values are held against what the
submodules give in float64, in the order in which they run.

Nothing here runs for a graph that passes.
"""

import ast
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from components.contract import Arrays, Model
from components.errors import AssayError
from components.export.capture import capture
from components.export.opset import OLDEST_NATIVE, lower
from components.export.predictors import open_session, run_session
from components.export.probes import stretched

Array = npt.NDArray[np.generic]

_SCOPES = "pkg.torch.onnx.name_scopes"
_FACTOR, _FLOOR = 16.0, 1e-5  # of the module's own error, and of its magnitude


class Divergence(BaseModel):
    """The place where values part, in words and by name; names are empty where none is known."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sentence: str
    node: str = ""
    operator: str = ""
    module: str = ""

    @property
    def culprit(self) -> str | None:
        """The module to look at, or else the node."""
        return self.module or self.node or None

    @classmethod
    def of_optimisation(cls) -> "Divergence":
        """Of a graph that agrees until the runtime optimises it."""
        return cls(
            sentence=(
                "the graph agrees with the module where the runtime does not optimise it, so no "
                "node of the file diverges; onnxruntime's optimisation is at fault. Try another "
                "version of it"
            )
        )


@dataclass(frozen=True)
class _Trace:
    """A graph with the value of every node, by name, on some rows."""

    graph: onnx.GraphProto
    values: Mapping[str, Array]


@dataclass(frozen=True)
class _Call:
    """What a submodule gave, in both precisions."""

    path: str
    float64: Array
    float32: Array

    def equals(self, value: Array) -> bool:
        """Whether a value of the graph is this one, but for rounding."""
        if value.shape != self.float64.shape or value.dtype.kind not in "fi":
            return False
        wide = self.float64.astype(np.float64)
        scale = np.abs(wide).max(initial=0.0, where=np.isfinite(wide))
        allowed = max(_FACTOR * _gap(wide, self.float32), _FLOOR * float(scale))
        return _gap(wide, value) <= allowed


def first_divergence(model: Model, onnx_model: bytes, rows: Arrays) -> Divergence:
    """Name the first node of a graph whose value is not the module's, and the module it is of.

    Args:
        model: The module; it is copied.
        onnx_model: A file that loads and differs from the module.
        rows: A batch on which it does.
    """
    plain = copy.deepcopy(model).cpu().eval()
    try:
        proto = onnx.ModelProto.FromString(onnx_model)
        trace = _trace(proto, rows)
        fresh, scopes = _fresh(plain, proto, rows)
        return _against_fresh(trace, fresh, scopes) or _against_modules(
            trace, _calls(plain, rows), scopes
        )
    except (AssayError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
        return Divergence(
            sentence=(
                "the first diverging node could not be found; looking for it failed with "
                f"{type(error).__name__}: {reason}"
            )
        )


def _trace(proto: onnx.ModelProto, rows: Arrays) -> _Trace:
    open_ended = onnx.ModelProto.FromString(proto.SerializeToString())
    graph = open_ended.graph
    known = [value.name for value in graph.output]
    names = [name for node in graph.node for name in node.output if name and name not in known]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = open_session(open_ended.SerializeToString(), optimise=False)
    return _Trace(proto.graph, dict(zip([*known, *names], run_session(session, rows), strict=True)))


def _fresh(model: Model, proto: onnx.ModelProto, rows: Arrays) -> tuple[_Trace, dict[str, str]]:
    """The same module exported anew, and the module of each of its nodes by the node's name."""
    metadata = model.get_model_metadata()
    axes = {axis: 2 for spec in metadata.inputs for _, axis in spec.axes}
    arrays = stretched(rows, metadata.inputs, axes)
    example = [torch.from_numpy(arrays[spec.name].copy()) for spec in metadata.inputs]
    opset = next(e.version for e in proto.opset_import if e.domain in ("", "ai.onnx"))
    made = capture(model, example, metadata, opset)
    paths = {path for path, _ in model.named_modules() if path}
    scopes = {node.name: _module_of(node, paths) for node in made.graph.node}
    if opset < OLDEST_NATIVE:
        lower(made, opset)
    return _trace(made, rows), scopes


def _module_of(node: onnx.NodeProto, paths: set[str]) -> str:
    held = {entry.key: entry.value for entry in node.metadata_props}
    scopes = ast.literal_eval(held.get(_SCOPES, "[]"))
    found = [name.removeprefix("model.") for name in scopes]
    return next((name for name in reversed(found) if name in paths), "")


def _against_fresh(trace: _Trace, fresh: _Trace, scopes: Mapping[str, str]) -> Divergence | None:
    roots = list(_roots(trace, fresh))
    if not roots:
        return None
    node = roots[0]
    gap = max(_gap(fresh.values[n], trace.values[n]) for n in node.output if n in fresh.values)
    others = f" So do {len(roots) - 1} others, {_names(roots[1:])}." if roots[1:] else ""
    stale = _other_constants(node, trace.graph, fresh.graph)
    weights = f" Its constants {', '.join(stale)} are not the module's." if stale else ""
    module = scopes.get(node.name, "")
    return Divergence(
        sentence=(
            f"the first diverging node is {_title(node, module)}: its inputs agree with a fresh "
            f"export of the module, and its value differs by up to {gap:.3g}.{weights}{others} "
            "Export the module again"
        ),
        node=node.name,
        operator=node.op_type,
        module=module,
    )


def _roots(trace: _Trace, fresh: _Trace) -> Iterator[onnx.NodeProto]:
    """Nodes with another value although nothing before them differs."""
    spoilt: set[str] = set()
    for node in trace.graph.node:
        inherited = not spoilt.isdisjoint(node.input)
        known = [name for name in node.output if name in fresh.values and name in trace.values]
        differs = [n for n in known if not _identical(trace.values[n], fresh.values[n])]
        if differs and not inherited:
            yield node
        # A node that the fresh graph does not have passes on what its inputs are.
        spoilt.update(differs if known else node.output if inherited else [])


def _identical(value: Array, other: Array) -> bool:
    alike = (value.shape, value.dtype) == (other.shape, other.dtype)
    return alike and np.array_equal(value, other, equal_nan=value.dtype.kind == "f")


def _other_constants(
    node: onnx.NodeProto, graph: onnx.GraphProto, fresh: onnx.GraphProto
) -> list[str]:
    ours, theirs = ({t.name: t for t in g.initializer} for g in (graph, fresh))
    arrays = onnx.numpy_helper.to_array
    return [
        name.removeprefix("model.")
        for name in node.input
        if name in ours
        and not (name in theirs and _identical(arrays(ours[name]), arrays(theirs[name])))
    ]


def _against_modules(
    trace: _Trace, calls: Sequence[_Call], scopes: Mapping[str, str]
) -> Divergence:
    """The first submodule in order of execution that the graph cannot confirm, nor any after it."""
    nodes = [node for node in trace.graph.node if node.output[0] in trace.values]
    confirmed = [
        (turn, at) for turn, call in enumerate(calls) for at in _places(call, nodes, trace)
    ]
    if not confirmed:
        return Divergence(
            sentence=(
                "the first diverging node could not be found: the graph is what the exporter makes "
                "of the module, and none of its values is an output of a submodule"
            )
        )
    turn, at = max(confirmed)
    lost = calls[turn + 1] if turn + 1 < len(calls) else None
    later = nodes[at + 1 :]
    shaped = [n for n in later if lost and trace.values[n.output[0]].shape == lost.float64.shape]
    node = next(iter([*shaped, *later, nodes[at]]))
    module = lost.path if lost else scopes.get(node.name, "")
    if later:
        missing = f"submodule {lost.path!r}" if lost else "predict, after its last submodule"
        where = f"it parts in {missing}, so the first diverging node is {_title(node, module)}"
    else:
        where = "that is its last node: it lacks what predict does afterwards"
    return Divergence(
        sentence=(
            "the graph is what the exporter makes of the module, and yet another function: it "
            f"agrees up to {_title(nodes[at], calls[turn].path)}; {where}. Look there for a "
            "choice that the export has fixed"
        ),
        node=node.name,
        operator=node.op_type,
        module=module,
    )


def _places(call: _Call, nodes: Sequence[onnx.NodeProto], trace: _Trace) -> list[int]:
    """Index of the first node whose value is a submodule's output; empty if there is none."""
    equal = (at for at, n in enumerate(nodes) if call.equals(trace.values[n.output[0]]))
    return [at for at in [next(equal, None)] if at is not None]


def _calls(model: Model, rows: Arrays) -> list[_Call]:
    narrow, wide = _outputs(model, rows), _outputs(copy.deepcopy(model).double(), rows)
    pairs = zip(narrow, wide, strict=True)
    return [_Call(path, float64, float32) for (path, float32), (_, float64) in pairs]


def _outputs(model: Model, rows: Arrays) -> list[tuple[str, Array]]:
    """Tensors that submodules return, as they return them; the model itself is called ''."""
    seen: list[tuple[str, Array]] = []

    def keep(path: str, output: object) -> None:
        given = output if isinstance(output, (tuple, list)) else [output]
        seen.extend((path, t.detach().numpy().copy()) for t in given if isinstance(t, Tensor))

    def hook(path: str, module: nn.Module) -> None:
        handles.append(module.register_forward_hook(lambda _, __, output: keep(path, output)))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for path, module in model.named_modules():
        hook(path, module)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = [torch.from_numpy(rows[spec.name]) for spec in model.get_model_metadata().inputs]
    with torch.no_grad():
        model.predict(*(t.to(dtype) if t.is_floating_point() else t for t in inputs))
    for handle in handles:
        handle.remove()
    return seen


def _gap(wanted: Array, value: Array) -> float:
    """Largest absolute difference; infinite where only one is a number, or shapes differ."""
    if wanted.shape != value.shape:
        return float("inf")
    left, right = wanted.astype(np.float64), value.astype(np.float64)
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    with np.errstate(invalid="ignore"):
        gaps = np.where(same, 0.0, np.abs(left - right))
    return float(np.where(np.isnan(gaps), np.inf, gaps).max(initial=0.0))


def _names(nodes: Sequence[onnx.NodeProto]) -> str:
    return ", ".join(node.name for node in nodes[:3])


def _title(node: onnx.NodeProto, module: str) -> str:
    return f"{node.op_type} {node.name!r}" + (f" of module {module!r}" if module else "")
