"""Loading by hub id, from a local server that implements the necessary part of the hub protocol."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import GOLDEN

from softprompt import load_base

MODEL = GOLDEN / "llama-sharded"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
REVISION = "v1.0"


class _Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        files = {p.name: p.read_bytes() for p in MODEL.iterdir()}
        name = self.path.rsplit("/", 1)[-1]
        if self.path.startswith(f"/api/models/someone/llama/revision/{REVISION}"):
            content = json.dumps({"id": "someone/llama", "sha": COMMIT, "siblings": []}).encode()
        elif self.path.startswith(f"/api/models/someone/llama/tree/{COMMIT}"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": COMMIT}
                for name, content in files.items()
            ]
            content = json.dumps(entries).encode()
        elif self.path.startswith(f"/someone/llama/resolve/{COMMIT}/") and name in files:
            content = files[name]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *arguments):
        pass


_LOAD = """
import sys, softprompt
for name in sys.argv[1:]:
    try:
        print(softprompt.load_base(name).fingerprint)
    except softprompt.UserError as error:
        print(error)
"""


@pytest.fixture
def load(tmp_path):
    """Load base models in another process, with the local server as the hub.

    It returns the fingerprint or the error message of each.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }

    def load(*names):
        command = [sys.executable, "-c", _LOAD, *names]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    yield load
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_hub_id_with_a_revision_is_downloaded_and_an_unknown_id_is_named(load):
    fingerprint, message = load(f"someone/llama@{REVISION}", "someone/else")
    assert fingerprint == load_base(str(MODEL)).fingerprint
    assert "base 'someone/else': not a local path, and not available from the hub" in message
