"""Contract, gradients and source of one component, without a pipeline run."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, model_validator
from torch import nn

from components.errors import ContractError
from components.import_guard import Attempt, network_refused
from components.validate import component_rows as rows
from components.validate.call_audit import isolated
from components.validate.component_load import Component, load_component
from components.validate.contract import verify_conformance, verify_contract
from components.validate.contract_report import ContractReport, Finding, Rows, report_findings
from components.validate.gradients import verify_gradients
from components.validate.gradients.report import GradientReport
from components.validate.source import SourceReport, scan_source
from components.validate.source_files import component_files
from components.validate.waivers import Waiver

CONTRACT_ROWS = (8, 5, 3)
GRADIENT_ROWS = (4, 4, 4)

Report = TypeVar("Report")


class ComponentReport(BaseModel):
    """Outcome of ``verify_component``; its fields are an interface.

    ``contract`` or ``gradients`` is None where it could not be looked at; ``trouble`` then says
    why. ``culprit`` is the module path that the contract blames, or else the gradients; ``''`` is
    the model itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    target: str
    passed: bool
    culprit: str | None
    source: SourceReport
    contract: ContractReport | None
    gradients: GradientReport | None
    trouble: tuple[str, ...]
    seconds: float

    @model_validator(mode="after")
    def _follows_from_evidence(self) -> Self:
        reports = (self.source, self.contract, self.gradients)
        agreed = all(r is not None and r.passed for r in reports) and not self.trouble
        if self.passed != agreed:
            raise ValueError(
                f"passed must follow from the three reports; got passed={self.passed}. "
                "Build the report with verify_component()."
            )
        return self


def verify_component(target: str) -> ComponentReport:
    """Import a component, look at its source, and verify its contract and its gradients.

    Args:
        target: ``module:name``, or the name of a registered pipeline.

    Raises:
        ConfigError: It cannot be imported or built, or bandit is not installed.
    """
    started = time.perf_counter()
    with isolated():
        torch.manual_seed(0)
        examination = _Examination(target)
        with network_refused() as attempts:
            component = examination.load()
        if component is not None:
            examination.run(component)
    return examination.report(attempts, time.perf_counter() - started)


class _Examination:
    def __init__(self, target: str) -> None:
        self._target = target
        self._modules: tuple[str, ...] = (target.partition(":")[0],)
        self._contract: ContractReport | None = None
        self._gradients: GradientReport | None = None
        self._trouble: list[str] = []

    def load(self) -> Component | None:
        with self._refusals():
            component = load_component(self._target)
            self._modules = component.modules
            return component
        return None

    def run(self, component: Component) -> None:
        """Build the model and look at it; what stands in the way becomes trouble."""
        with self._refusals():
            model = component.build()
            self._contract = verify_conformance(model)
            examples = self._attempt(
                "example inputs", lambda: rows.examples_of(model, component.pipeline)
            )
            if examples is None:
                self._trouble += [] if self._trouble else [_NO_EXAMPLES]
                return
            self._verify(component, model, examples)

    def _verify(self, component: Component, model: nn.Module, examples: rows.Examples) -> None:
        pipeline = component.pipeline
        waivers = (
            rows.pipeline_waivers(pipeline, model)
            if pipeline is not None
            else rows.declared_waivers(model)
        )
        fresh = None if component.shared else component.build
        given = self._attempt("example inputs", lambda: [examples(n) for n in CONTRACT_ROWS])
        if given is None:
            return
        contract = self._attempt("the contract", lambda: _contract(model, given, fresh, waivers))
        self._contract = contract or self._contract
        self._gradients = self._attempt(
            "gradients", lambda: _gradients(component, model, examples, waivers)
        )

    def _attempt(self, what: str, ask: Callable[[], Report]) -> Report | None:
        """Ask; the model's own code may raise anything, or try to end the process."""
        try:
            return ask()
        except (Exception, SystemExit) as error:  # noqa: BLE001
            reason = str(error).strip().rstrip(".") or "(no message)"
            self._trouble.append(f"{what}: {type(error).__name__}: {reason}")
            return None

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """A class that its contract refuses is a verdict, not a mistake of the caller."""
        try:
            yield
        except ContractError as error:
            rule = "Every class fits its contract."
            self._contract = report_findings([("conformance", rule, [Finding(str(error), "")])])

    def report(self, attempts: list[Attempt], seconds: float) -> ComponentReport:
        source = scan_source(component_files(self._modules), attempts)
        contract, gradients = self._contract, self._gradients
        blamed = [
            r.culprit for r in (contract, gradients) if r is not None and r.culprit is not None
        ]
        reports = (source, contract, gradients)
        return ComponentReport(
            target=self._target,
            passed=all(r is not None and r.passed for r in reports) and not self._trouble,
            culprit=blamed[0] if blamed else None,
            source=source,
            contract=contract,
            gradients=gradients,
            trouble=tuple(self._trouble),
            seconds=round(seconds, 3),
        )


_NO_EXAMPLES = (
    "gradients: there are no example inputs to call the model with. Define "
    "example_inputs(rows) in its class, or name a Pipeline that trains it"
)


def _contract(
    model: nn.Module,
    given: list[Rows],
    fresh: Callable[[], nn.Module] | None,
    waivers: tuple[Waiver, ...],
) -> ContractReport:
    # One that is no Model fails the first check, and the others are run as far as they go.
    return verify_contract(model, given, fresh=fresh, waivers=waivers)  # type: ignore[arg-type]


def _gradients(
    component: Component, model: nn.Module, examples: rows.Examples, waivers: tuple[Waiver, ...]
) -> GradientReport:
    if component.pipeline is not None:
        batches = rows.pipeline_batches(component.pipeline, examples, GRADIENT_ROWS)
        loss = rows.pipeline_loss(component.pipeline)
    else:
        batches = rows.distance_batches(model, examples, GRADIENT_ROWS)
        loss = rows.distance_loss
    return verify_gradients(model, loss, batches, waivers=waivers)
