"""The proxy does what it says: each fault, as a client sees it that does not try again."""

import http.client
import json
import sys
import urllib.request

import pytest
from botocore.exceptions import EndpointConnectionError

from tests.integration.fault_proxy import AFTER_THE_WORK, KINDS
from tests.integration.servers import S3, free_port, python_module, serving, store_server, using

pytestmark = pytest.mark.integration
BODY = bytes(range(256)) * 400


@pytest.fixture(scope="module")
def proxy(tmp_path_factory):
    """In front of a file server whose files are named for what becomes of them."""
    folder = tmp_path_factory.mktemp("files")
    for name in (*KINDS["GET"], "fine"):
        (folder / f"{name}.wav").write_bytes(BODY)
    upstream, port = free_port(), free_port()
    server = [sys.executable, "-m", "http.server", str(upstream), "--bind", "127.0.0.1", "--directory", str(folder)]
    options = ["--share", 0, "--stall-s", 2, "--slow-s", 0.2]
    options += [option for kind in KINDS["GET"] for option in ("--always-fail", f"/{kind}.wav={kind}")]
    spoiling = python_module("tests.integration.fault_proxy", port, upstream, *options)
    with (
        serving(server, upstream, log=folder / "server.log"),
        serving(spoiling, port, log=folder / "proxy.log"),
    ):
        yield port


def get(port, path, *, timeout=20):
    """Status and body, in the pieces that came; what has gone wrong, where something has."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    pieces = []
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        while piece := answer.read1(len(BODY)):
            pieces.append(piece)
    except OSError as error:
        return type(error), pieces
    finally:
        connection.close()
    return answer.status, pieces


def tally(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/_faults") as answer:
        return json.load(answer)


HALF = BODY[: len(BODY) // 2]


@pytest.mark.parametrize(
    ("kind", "status", "body"),
    [
        ("reset", ConnectionResetError, b""),
        ("stall", TimeoutError, b""),
        ("stall_in_body", TimeoutError, HALF),
        ("truncated", 200, HALF),
        ("slow", 200, BODY),
        ("fine", 200, BODY),
    ],
)
def test_what_a_client_sees(proxy, kind, status, body):
    # Nothing comes of a stall, however long one waits; half a body has to come first.
    patience_s = {"stall": 0.3, "stall_in_body": 1}.get(kind, 20)
    found, pieces = get(proxy, f"/{kind}.wav", timeout=patience_s)
    assert (found, b"".join(pieces)) == (status, body)
    assert tally(proxy)["injected"].get(kind, 0) == (kind != "fine")
    if kind == "slow":
        assert len(pieces) > 1


@pytest.mark.parametrize("status", [500, 503, 429])
def test_refusals_are_said_as_s3_says_them(proxy, status):
    found, pieces = get(proxy, f"/{status}.wav")
    assert found == status
    assert b"<Error><Code>" in b"".join(pieces)


def test_a_reset_in_the_body(proxy):
    found, pieces = get(proxy, "/reset_in_body.wav")
    assert found is ConnectionResetError
    assert len(b"".join(pieces)) <= len(HALF)  # what has come and was not yet read goes with the connection


def test_a_share_of_calls_by_the_seed_and_never_more_in_a_row_than_said(tmp_path):
    upstream, seen = free_port(), []
    (tmp_path / "a").write_bytes(BODY)
    server = [sys.executable, "-m", "http.server", str(upstream), "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    with serving(server, upstream, log=tmp_path / "server.log"):
        for seed in (1, 1, 2):
            port = free_port()
            options = ["--share", 0.7, "--seed", seed, "--stall-s", 0, "--slow-s", 0]
            spoiling = python_module("tests.integration.fault_proxy", port, upstream, *options)
            with serving(spoiling, port, log=tmp_path / "proxy.log"):
                answers = [get(port, "/a") for _ in range(100)]
                seen.append("".join("ox"[(found, b"".join(pieces)) != (200, BODY)] for found, pieces in answers))
                told = tally(port)
            assert (told["requests"], told["calls"]) == (100, {"GET /a": 100})
            assert seen[-1].count("x") == sum(told["injected"].values()) - told["injected"].get("slow", 0)
            assert "xxx" not in seen[-1]
            assert "xx" in seen[-1]
    assert seen[0] == seen[1] != seen[2]


def test_a_write_whose_answer_is_lost_is_done(tmp_path):
    with store_server(S3, tmp_path) as store, using(store):
        port = free_port()
        options = ["--share", 0, "--always-fail", f"PUT /archive/a={AFTER_THE_WORK}"]
        spoiling = python_module("tests.integration.fault_proxy", port, store.port, *options)
        with serving(spoiling, port, log=tmp_path / "proxy.log"):
            spoiled = store.behind(port, config_kwargs={"retries": {"total_max_attempts": 1}}).fs
            with pytest.raises(EndpointConnectionError):
                spoiled.pipe_file("archive/a", b"done")
            assert tally(port)["injected"].keys() == {AFTER_THE_WORK}
        assert store.fs.cat_file("archive/a") == b"done"
