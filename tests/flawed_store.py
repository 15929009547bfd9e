"""Serves one object over S3's, Google's and plain HTTP, with the faults in its responses that a test sets."""

import json
import threading
from collections import deque
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MTIME = "Tue, 02 Jan 2024 03:04:05 GMT"


class Store:
    """Faults are taken one per GET of the body, unless `for_all` holds for every request.

    A fault is `cut` (half the body, then the connection ends), `short` (half of it passed off as all), `nothing` (an
    empty body), `hang`, or a status with an error code and a message, as a store puts it.
    """

    def __init__(self, data):
        self.data = data
        self.faults = deque()
        self.for_all = None
        self.bodies = self.asked = 0
        self.put = None
        self.released = threading.Event()
        self.url = ""


def handler(store):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def do_HEAD(self):
            store.asked += 1
            if store.for_all:
                self.answer(store.for_all[0], b"", length=0)
            else:
                self.answer(200, b"", length=len(store.data))

        def do_PUT(self):
            store.asked += 1
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fault = store.for_all or (store.faults.popleft() if store.faults else None)
            if fault:
                self.error(fault)
            else:
                store.put = data
                self.answer(200, b"")

        def do_DELETE(self):
            self.error(store.for_all)

        def do_GET(self):
            store.asked += 1
            if store.for_all:
                self.error(store.for_all)
            elif "/storage/v1/b/" in self.path and "alt=media" not in self.path:
                info = {"name": "a.wav", "bucket": "bucket", "size": str(len(store.data)), "kind": "storage#object"}
                self.answer(200, json.dumps(info).encode())
            else:
                self.body()

        def body(self):
            store.bodies += 1
            start, end = 0, len(store.data)
            if "Range" in self.headers:
                first, _, last = self.headers["Range"].partition("=")[2].partition("-")
                start, end = int(first), min(int(last or end) + 1, end)
            data, status = store.data[start:end], 206 if "Range" in self.headers else 200
            fault = store.faults.popleft() if store.faults else None
            more = {"Content-Range": f"bytes {start}-{end - 1}/{len(store.data)}"} if status == 206 else {}
            if fault is None:
                self.answer(status, data, more=more)
            elif fault == "cut":
                self.answer(status, data[: len(data) // 2], length=len(data), more=more)
                self.close_connection = True
            elif fault in ("short", "nothing"):
                self.answer(status, data[: len(data) // 2] if fault == "short" else b"", more=more)
            elif fault == "hang":
                store.released.wait()
                self.close_connection = True
            else:
                self.error(fault)

        def error(self, fault):
            status, code, message = fault
            if "/storage/v1/" in self.path:
                self.answer(status, json.dumps({"error": {"code": status, "message": message}}).encode())
            else:
                self.answer(status, f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode())

        def answer(self, status, data, *, length=None, more=()):
            self.send_response(status)
            self.send_header("Content-Length", str(len(data) if length is None else length))
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Last-Modified", MTIME)
            self.send_header("ETag", '"0"')
            for name, value in dict(more).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

    return Handler


@contextmanager
def serving(data):
    store = Store(data)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(store))
    server.daemon_threads = True
    # It looks so often whether it is to stop: half a second, the default, would be most of a test.
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    store.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield store
    finally:
        store.released.set()
        server.shutdown()
        server.server_close()
