"""Runs moto's S3 server on a port, as `moto.server` does, and reports how much of each object it has sent.

`GET /_sent` answers with JSON: path to bytes of bodies, over all GET requests so far.
"""

import json
import sys
import threading
from collections import Counter

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple


class Counting:
    """Counts the bytes of each body as they leave for the socket."""

    def __init__(self, app):
        self._app = app
        self._sent = Counter()
        self._lock = threading.Lock()

    def __call__(self, environ, start_response):
        path = environ["PATH_INFO"]
        if path == "/_sent":
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(self._sent).encode()]
        body = self._app(environ, start_response)
        return self._counted(path, body) if environ["REQUEST_METHOD"] == "GET" else body

    def _counted(self, path, body):
        try:
            for part in body:
                with self._lock:
                    self._sent[path] += len(part)
                yield part
        finally:
            getattr(body, "close", lambda: None)()


if __name__ == "__main__":
    run_simple(
        "127.0.0.1", int(sys.argv[1]), Counting(DomainDispatcherApplication(create_backend_app)), threaded=True
    )
