"""The flow ``retrain``: its body is the diagram."""

from prefect import flow
from prefect.transactions import transaction

from components.adapters.prefect_runtime import enter_flow
from components.plan import DEFAULT_AS_OF
from components.records import Decision
from flows.parameters import AsOf, Force, PipelineName, Seed, Settings
from tasks.decide import decide
from tasks.export import export
from tasks.plan import plan
from tasks.register import register
from tasks.smoke_test import smoke_test
from tasks.train import train
from tasks.train_remote import check_placement
from tasks.validate import validate


@flow(name="retrain", result_serializer="json", validate_parameters=True)
def retrain(
    pipeline: PipelineName,
    as_of: AsOf = DEFAULT_AS_OF,
    seed: Seed = 0,
    settings: Settings = [],  # noqa: B006  Prefect's form needs the list itself; it is never changed
    force: Force = False,
) -> Decision:
    """Retrain a pipeline's model, prove it, and let it become champion if it earned it."""
    enter_flow()
    check_placement()
    job = plan(pipeline, as_of, seed, settings, force)
    trained = train(job)
    validated = validate(trained)
    exported = export(validated)
    with transaction():
        registered = register(exported)
        tested = smoke_test(registered)
        return decide(tested)
