"""Requests that schemathesis makes from the OpenAPI document, fitting ones and others: none brings the service down."""

import hypothesis
import pytest
from served import KEY

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")
pytestmark = [pytest.mark.engines, pytest.mark.timeout(900)]
EXAMPLES = 25  # of each operation, fitting and not; `python -m benchmarks.serving_faults` sends 2,000


@pytest.mark.parametrize("fitting", [True, False])
def test_no_request_makes_the_service_fail(service, fitting):
    schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json", headers=KEY)
    kind = schemathesis.GenerationMode.POSITIVE if fitting else schemathesis.GenerationMode.NEGATIVE
    asked = 0
    for operation in (found.ok() for found in schema.get_all_operations()):
        if not fitting and operation.path in ("/healthz", "/readyz", "/metrics"):
            continue  # there is nothing that could not fit

        @hypothesis.settings(
            max_examples=EXAMPLES, deadline=None, derandomize=True,
            suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        @hypothesis.given(case=operation.as_strategy(generation_mode=kind))
        def ask(case):
            nonlocal asked
            asked += 1
            response = case.call(headers=KEY, timeout=120)
            assert response.status_code < 500 or response.status_code == 503, response.text
            if response.status_code == 413:  # schemathesis does not take this for a refusal
                return
            # The document does not know which ids there are, nor that a history or a user is wanted.
            excluded = [checks.positive_data_acceptance]
            if case.method == "GET":  # unknown parameters of a query are passed over
                excluded.append(checks.negative_data_rejection)
            case.validate_response(response, headers=KEY, excluded_checks=excluded)

        ask()
    assert asked > 100
