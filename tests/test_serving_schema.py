"""Generated requests: every answer fits the server's own document, and none is a server error."""

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS, load_all_checks
from servers import LABELS, save_prompt, serving

from softprompt.serving.state import Options

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def document(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    prompt = save_prompt(folder / "l", tiny, 0, "{text} is", LABELS)
    (folder / "root").mkdir()
    options = Options(admin_key="admin", prompts_dir=folder / "root", timeout=20)
    with serving(tiny, {"letters": prompt}, options) as server:
        loaded = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        loaded.config.update(headers={"Authorization": "Bearer admin"})

        @loaded.hook
        def map_body(context, body):  # otherwise no request gets past the name of the model
            return {**body, "model": "letters"} if isinstance(body, dict) else body

        yield loaded


schema = schemathesis.pytest.from_fixture("document")
load_all_checks()
SKIPPED = [
    CHECKS.get_one(name)
    for name in ("positive_data_acceptance", "negative_data_rejection", "ignored_auth")
]


@schema.parametrize()
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
def test_generated_requests(case):
    case.call_and_validate(excluded_checks=SKIPPED)
