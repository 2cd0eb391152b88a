"""Addresses of Prefect's pages, which outlive a run only where its server does."""

import subprocess
import sys
from collections.abc import Mapping

from components.adapters.prefect_runtime import beside_embedded_server, flow_run_page


def test_a_flow_runs_page_is_known_where_the_ui_is() -> None:
    from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

    with temporary_settings({PREFECT_UI_URL: "https://prefect.example/"}):
        assert flow_run_page("abc") == "https://prefect.example/runs/flow-run/abc"
        assert flow_run_page("") == ""
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:4200/api"}):
        assert flow_run_page("abc") == "http://127.0.0.1:4200/runs/flow-run/abc"
        with beside_embedded_server():
            assert flow_run_page("abc") == "", "an embedded server is gone when the run is"


def test_the_variable_names_the_ui(child_environment: Mapping[str, str]) -> None:
    code = (
        "from components.adapters.prefect_runtime import flow_run_page\n"
        "print(flow_run_page('abc'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**child_environment, "PREFECT_UI_URL": "https://prefect.example"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "https://prefect.example/runs/flow-run/abc", done.stderr
