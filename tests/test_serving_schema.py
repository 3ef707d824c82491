"""Generated requests: every answer fits the server's own document, and none is a server error."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CHECKS, load_all_checks
from servers import LABELS, save_prompt, serving

from softprompt.serving.state import Options

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

load_all_checks()
# Most generated requests are wrong in more ways than the document can say.
SKIPPED = [
    CHECKS.get_one(name)
    for name in ("positive_data_acceptance", "negative_data_rejection", "ignored_auth")
]


def test_generated_requests(tiny, tmp_path):
    prompt = save_prompt(tmp_path / "l", tiny, 0, "{text} is", LABELS)
    (tmp_path / "root").mkdir()
    options = Options(admin_key="admin", prompts_dir=tmp_path / "root", timeout=20)
    checked = set()
    with serving(tiny, {"letters": prompt}, options) as server:
        document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        for operation in (each.ok() for each in document.get_all_operations()):
            if not operation.path.startswith("/metrics"):
                check(operation)
                checked.add((operation.method.upper(), operation.path))
    assert ("POST", "/v1/completions") in checked
    assert ("PUT", "/v1/prompts/{name}") in checked


def check(operation) -> None:
    """Send generated requests for one operation."""

    @settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def send(case):
        if isinstance(case.body, dict) and "model" in case.body:
            case.body["model"] = "letters"  # otherwise no request gets past the name
        headers = {"Authorization": "Bearer admin"}
        case.call_and_validate(headers=headers, excluded_checks=SKIPPED)

    send()
