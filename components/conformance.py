"""Does a class fulfil an abstract base class, by what can be seen without calling anything?

Python itself refuses to instantiate a class that misses a member. This looks at the members that
are there: a method must be one, take the arguments that the contract passes, return its value when
called (and not a coroutine or a generator), and promise no other type than the contract's.
"""

import inspect
from collections.abc import Iterable, Iterator
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeGuard, get_origin, get_type_hints

if TYPE_CHECKING:
    _Bound = staticmethod[..., Any] | classmethod[Any, ..., Any]

_MOST_INPUTS = 32
"""Positional arguments tried where a contract passes any number of them."""


def missing_members(cls: type, contract: type | None = None) -> list[str]:
    """Names of abstract members that nothing implements, sorted.

    Args:
        cls: The class to look at.
        contract: A class whose abstract members it should have; its own bases if None.
    """
    members = _contract_members(contract or cls)
    return sorted(name for _, name in members if _is_missing(_static(cls, name)))


def mistyped_members(cls: type, contract: type | None = None) -> list[str]:
    """One sentence for each member that is there and cannot be what its contract asks for."""
    found = []
    for base, name in _contract_members(contract or cls):
        given = _static(cls, name)
        if not _is_missing(given):
            sentence = _fault(cls, name, given, vars(base)[name])
            found += [f"{name} {sentence}"] if sentence else []
    return found


def describe_faults(cls: type, missing: Iterable[str], mistyped: Iterable[str]) -> str:
    """What is wrong with a class, and what to do, in one or two sentences."""
    faults = []
    if missing := list(missing):
        faults.append(
            f"{cls.__qualname__} must implement every abstract method of its base class; "
            f"missing: {', '.join(missing)}."
        )
    if mistyped := list(mistyped):
        faults.append(f"{cls.__qualname__} must fit its base class; {'; '.join(mistyped)}.")
    return f"{' '.join(faults)} Define them, with the signatures in components/contract.py."


def _contract_members(cls: type) -> Iterator[tuple[type, str]]:
    """Contracts are the bases in which a member is first declared abstract."""
    seen: set[str] = set()
    for base in reversed(cls.__mro__):
        for name, member in vars(base).items():
            if _is_abstract(member) and name not in seen:
                seen.add(name)
                yield base, name


def _static(cls: type, name: str) -> object:
    return inspect.getattr_static(cls, name, None)


def _is_abstract(member: object) -> bool:
    return getattr(member, "__isabstractmethod__", False) is True


def _is_missing(member: object) -> bool:
    # nn.Module has a forward that only raises.
    unimplemented = getattr(member, "__name__", "") == "_forward_unimplemented"
    return member is None or _is_abstract(member) or unimplemented


def _fault(cls: type, name: str, given: object, wanted: object) -> str | None:
    if isinstance(wanted, property):
        if inspect.isfunction(given) or isinstance(given, (staticmethod, classmethod)):
            return "must be a property; got a method"
        promised = given.fget if isinstance(given, property) else None
        return _promise_fault(promised, wanted.fget)
    if isinstance(given, property):
        return "must be a method; got a property"
    method = getattr(cls, name)
    if not callable(method):
        return f"must be a method; got {_a(type(given))}"
    function = inspect.unwrap(given.__func__ if _is_bound(given) else method)
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        return "must be a plain method; got an async one"
    if inspect.isgeneratorfunction(function) and not _iterates(wanted):
        return "must return its value; got a generator, which yields"
    return _arguments_fault(given, method, wanted) or _promise_fault(function, wanted)


def _is_bound(member: object) -> "TypeGuard[_Bound]":
    return isinstance(member, (staticmethod, classmethod))


def _arguments_fault(given: object, method: Any, wanted: Any) -> str | None:
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):
        return None  # built in: nothing is known about it
    parameters = list(inspect.signature(wanted).parameters.values())[1:]
    receiver = [] if _is_bound(given) or not inspect.isfunction(given) else [None]
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters):
        calls = [[*receiver, *[None] * count] for count in range(1, _MOST_INPUTS + 1)]
    else:
        calls = [[*receiver, *[None] * len(parameters)]]
    if any(_binds(signature, call) for call in calls):
        return None
    passed = ", ".join(str(p).partition(":")[0] for p in parameters)
    return f"must take ({', '.join(filter(None, ('self', passed)))}); got {signature}"


def _binds(signature: inspect.Signature, arguments: list[None]) -> bool:
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _promise_fault(given: Any, wanted: Any) -> str | None:
    """Compare the annotations of what is returned, where both are classes."""
    promised, needed = _returned(given), _returned(wanted)
    if promised is None or needed is None or needed is type(None):
        return None
    if _iterates(wanted):
        needed = Iterable  # a list of batches serves as well as an iterator
    try:
        if issubclass(promised, needed) or issubclass(needed, promised):
            return None
    except TypeError:
        return None  # a protocol that cannot be asked
    return f"must return {_a(needed)}; its annotation says {promised.__qualname__}"


def _returned(function: Any) -> type | None:
    """The class that a function says it returns; None where it says nothing so definite."""
    try:
        hint = get_type_hints(function).get("return")
    except Exception:  # noqa: BLE001  an annotation may name, or do, anything
        return None
    kind = get_origin(hint) or hint
    return kind if inspect.isclass(kind) and kind not in (Any, UnionType) else None


def _iterates(wanted: Any) -> bool:
    kind = _returned(wanted)
    return kind is not None and issubclass(kind, Iterator)


def _a(kind: type) -> str:
    name = kind.__qualname__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
