"""From ``my_module:MyModel`` to a model that can be verified.

Importing runs the component's code, so everything it may do there is expected: raise, exit, use the
network, define a class that breaks its contract.
"""

import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from torch import nn

from components.contract import instantiate
from components.errors import AssayError, ConfigError
from components.import_guard import is_library
from components.pipeline import Pipeline, load_pipeline
from components.pipeline_entries import pipeline_entries
from components.plan import component_modules
from components.train.run import build_model
from components.validate.component_rows import synthetic_encoding


@dataclass(frozen=True)
class Component:
    """What a target names.

    Args:
        target: As it was given.
        modules: Where its code stands, its own module first.
        build: Gives the model; called twice it gives two, unless ``shared``.
        pipeline: Gives loss, waivers and encoding; None for a model on its own.
        shared: Whether ``build`` gives one and the same instance every time.
    """

    target: str
    modules: tuple[str, ...]
    build: Callable[[], nn.Module]
    pipeline: Pipeline | None = None
    shared: bool = False


def load_component(target: str) -> Component:
    """Import what a target names: a registered pipeline, or ``module:name``.

    Raises:
        ConfigError: It cannot be imported, there is no such name, or it names no model.
        ContractError: A class in the module breaks its contract.
    """
    module_name, colon, path = target.partition(":")
    if "/" in module_name or module_name.startswith(".") or module_name.endswith(".py"):
        own = Path(module_name).name.removesuffix(".py").strip(".") or "my_module"
        raise ConfigError(
            f"a component must be given as MODULE:NAME, with a module, not a file; got {target!r}. "
            f"Run assay in the file's folder, with {own}:{path or 'NAME'}."
        )
    if not colon:
        if target not in (registered := pipeline_entries()):
            raise ConfigError(
                f"a component must be given as MODULE:NAME, or be a registered pipeline: "
                f"{', '.join(registered) or '(none)'}; got {target!r}."
            )
        with _own_code(f"pipeline {target!r}", "importable"):
            return _of_pipeline(target, load_pipeline(target))
    if not module_name or not path:
        raise ConfigError(
            f"a component must be given as MODULE:NAME, with both of them; got {target!r}. Name a "
            "class of a module, for example my_module:MyModel."
        )
    module = _import(module_name)
    found = _look_up(module, path)
    if isinstance(found, Pipeline):
        return _of_pipeline(target, found)
    if inspect.isclass(found) and (pipeline := _pipeline_of(found, module)) is not None:
        return _of_pipeline(target, pipeline)
    return Component(
        target,
        tuple(dict.fromkeys([_module_of(found, module_name), module_name])),
        _builder(target, found),
        shared=isinstance(found, nn.Module),
    )


def _of_pipeline(target: str, pipeline: Pipeline) -> Component:
    def build() -> nn.Module:
        with _own_code(f"{pipeline.model.__qualname__} of pipeline {pipeline.name!r}", "buildable"):
            return build_model(pipeline, synthetic_encoding(pipeline.features), pipeline.config)

    return Component(target, tuple(component_modules(pipeline)), build, pipeline)


def _import(name: str) -> ModuleType:
    try:
        with _own_code(f"module {name!r}", "importable"):
            return importlib.import_module(name)
    except ConfigError as error:
        cause = error.__cause__
        missing = cause.name or "" if isinstance(cause, ModuleNotFoundError) else ""
        if missing and f"{name}.".startswith(f"{missing}."):
            raise ConfigError(
                f"module {name!r} must be in the current folder or on Python's path; there is no "
                f"{missing!r} in {Path.cwd()}. Check the spelling, or run assay where it lies."
            ) from None
        raise


def _look_up(module: ModuleType, path: str) -> object:
    found: object = module
    for part in path.split("."):
        if not hasattr(found, part):
            models = [n for n, v in vars(module).items() if _is_own_model(v, module)]
            raise ConfigError(
                f"module {module.__name__!r} must define the name that is given; it has no "
                f"{path!r}. Its models and pipelines: {', '.join(models) or 'none'}."
            )
        found = getattr(found, part)
    return found


def _is_own_model(value: object, module: ModuleType) -> bool:
    if inspect.isclass(value):
        return issubclass(value, nn.Module) and value.__module__ == module.__name__
    return isinstance(value, (Pipeline, nn.Module))


def _pipeline_of(model: type, module: ModuleType) -> Pipeline | None:
    """The first pipeline beside a class that trains it."""
    places = [sys.modules.get(model.__module__), module]
    values = [value for place in places if place is not None for value in vars(place).values()]
    named = (value for value in values if isinstance(value, Pipeline))
    return next((pipeline for pipeline in named if pipeline.model is model), None)


def _module_of(found: object, module_name: str) -> str:
    named = found if inspect.isclass(found) or inspect.isfunction(found) else type(found)
    name = str(named.__module__)
    return module_name if is_library(getattr(sys.modules.get(name), "__file__", "")) else name


def _builder(target: str, found: object) -> Callable[[], nn.Module]:
    if isinstance(found, nn.Module):
        return lambda: found
    is_model = inspect.isclass(found) and issubclass(found, nn.Module)
    if not is_model and (inspect.isclass(found) or not callable(found)):
        raise ConfigError(
            f"{target!r} must name a model, its class, a function that builds it, or a Pipeline; "
            f"got {_a(found)}. Name one of these."
        )
    assert callable(found), "a class is callable"
    if needed := [] if inspect.isabstract(found) else _required(found):
        raise ConfigError(
            f"{target!r} must be buildable without arguments; it needs {', '.join(needed)}. Name a "
            "Pipeline that trains it, an instance, or a function that builds it."
        )

    def build() -> nn.Module:
        with _own_code(repr(target), "buildable"):
            built: object = instantiate(found)
        if not isinstance(built, nn.Module):
            raise ConfigError(f"{target!r} must build an nn.Module; got {_a(built)}. Return one.")
        return built

    return build


def _required(function: Callable[..., object]) -> list[str]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return []
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in free]


def _a(value: object) -> str:
    return (
        f"the class {value.__qualname__}" if inspect.isclass(value) else f"{type(value).__name__}"
    )


@contextmanager
def _own_code(what: str, rule: str) -> Iterator[None]:
    """Say where a component's own code failed; what assay says itself passes through.

    Raises:
        ConfigError: The code raised, or tried to end the process.
    """
    try:
        yield
    except (AssayError, KeyboardInterrupt):
        raise
    except BaseException as error:
        reason = (str(error).strip().splitlines() or ["(no message)"])[0][:300].rstrip(".")
        raise ConfigError(
            f"{what} must be {rule}; it raised {type(error).__name__}{_place(error)}: {reason}. "
            "Mend it, and try it in a Python shell first."
        ) from error


def _place(error: BaseException) -> str:
    """The innermost line of the component's own code on the way to an exception."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {error.filename}:{error.lineno}"
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not is_library(frame.filename) and Path(frame.filename).parent != Path(__file__).parent
    ]
    return f" at {own[-1].filename}:{own[-1].lineno}" if own else ""
