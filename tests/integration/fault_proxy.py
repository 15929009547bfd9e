"""An HTTP/1.1 proxy for a test server that injects faults into a share of its calls, as networks and stores do.

    python -m tests.integration.fault_proxy LISTEN_PORT UPSTREAM_PORT --share 0.1 --seed 1

What is spoiled follows from the seed, the method, the path and how often it was asked for, not from who comes first.
No path is spoiled more than `--most-in-a-row` times in a row, so that a client that tries again gets through; but for
those that contain the TEXT of an `--always-fail TEXT=KIND`, which are spoiled every time. What is not spoiled passes
as it is, the Host header too: signatures cover it. `GET /_faults` tells, in JSON, of all requests so far: `requests`,
`injected` by kind of fault, and `calls` (how often) by method and path.
"""

import argparse
import asyncio
import random
import socket
import struct
from collections import Counter

import aiohttp
import yarl
from aiohttp import web

STATUSES = {"500": "InternalError", "503": "SlowDown", "429": "TooManyRequests"}
# Instead of an answer: the server never hears of the call.
INSTEAD = (*STATUSES, "reset", "stall")
AFTER_THE_WORK = "reset_after_work"
"""Of a write: the server has done it, and the client does not get to know."""
IN_THE_BODY = ("reset_in_body", "truncated", "stall_in_body", "slow")
KINDS = {
    "GET": (*INSTEAD, *IN_THE_BODY),
    "HEAD": INSTEAD,
    **dict.fromkeys(("PUT", "POST", "DELETE", "PATCH"), (*INSTEAD, AFTER_THE_WORK)),
}
# What belongs to one connection; and Expect, which has been answered here.
_NOT_PASSED_ON = ("Connection", "Keep-Alive", "Transfer-Encoding", "Expect", "TE", "Upgrade")
_SLOW_PIECES = 10
_MOST_BODY_BYTES = 1 << 30


class FaultProxy:
    """Handles requests; see the module."""

    def __init__(self, upstream, session, options):
        self._upstream = upstream
        self._session = session
        self._options = options
        self._calls = Counter()
        self._in_a_row = Counter()
        self._injected = Counter()

    async def handle(self, request):
        if request.raw_path == "/_faults":
            return web.json_response(
                {"requests": self._calls.total(), "injected": self._injected, "calls": self._calls}
            )
        kind = self._choose(request)
        if kind in STATUSES:
            return self._refuse(kind)
        if kind == "reset":
            return self._reset(request, kind)
        if kind == "stall":
            return await self._stall(request, kind)
        answer, body = await self._ask(request)
        if kind == AFTER_THE_WORK:
            return self._reset(request, kind)
        response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=_passed_on(answer.headers))
        if request.method != "HEAD" and "Content-Length" not in response.headers:
            response.content_length = len(body)
        await response.prepare(request)
        if kind is None or len(body) < 2:  # nothing to cut in two: it passes, and is not counted
            await response.write(body)
            return response
        return await self._spoil(request, response, body, kind)

    def _choose(self, request):
        key = f"{request.method} {request.raw_path.partition('?')[0]}"
        self._calls[key] += 1
        draw = random.Random(f"{self._options.seed} {key} {self._calls[key]}")
        if key.startswith("PUT ") and self._calls[key] == 1 and self._loses_first_answer(key):
            return AFTER_THE_WORK
        for text, kind in self._options.always_fail:
            if text in key:
                return kind
        if draw.random() >= self._options.share or self._in_a_row[key] >= self._options.most_in_a_row:
            self._in_a_row[key] = 0
            return None
        self._in_a_row[key] += 1
        return draw.choice(KINDS[request.method])

    def _loses_first_answer(self, key):
        return any(text in key for text in self._options.lose_first_answer)

    async def _ask(self, request):
        url = yarl.URL(f"http://127.0.0.1:{self._upstream}{request.raw_path}", encoded=True)
        data = await request.read() if request.body_exists else None
        headers = _passed_on(request.headers)
        async with self._session.request(
            request.method, url, headers=headers, data=data, allow_redirects=False
        ) as answer:
            return answer, await answer.read()

    def _refuse(self, kind):
        self._injected[kind] += 1
        code = STATUSES[kind]
        text = (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>Injected.</Message></Error>'
        )
        return web.Response(status=int(kind), body=text.encode(), content_type="application/xml")

    def _reset(self, request, kind):
        self._injected[kind] += 1
        # Closed with no time to linger: what is not sent is dropped, and the other side gets a reset.
        sock = request.transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
        return web.Response()  # nobody is there to get it

    async def _stall(self, request, kind):
        self._injected[kind] += 1
        await asyncio.sleep(self._options.stall_s)
        request.transport.abort()
        return web.Response()

    async def _spoil(self, request, response, body, kind):
        half = len(body) // 2
        if kind == "slow":
            self._injected[kind] += 1
            step = -(-len(body) // _SLOW_PIECES)
            for start in range(0, len(body), step):
                await response.write(body[start : start + step])
                await asyncio.sleep(self._options.slow_s / _SLOW_PIECES)
            return response
        await response.write(body[:half])
        await asyncio.sleep(0.01)  # let the half leave before the connection goes
        if kind == "reset_in_body":
            self._reset(request, kind)
        elif kind == "stall_in_body":
            await self._stall(request, kind)
        else:
            self._injected[kind] += 1
            request.transport.close()
        return response


def _passed_on(headers):
    kept = headers.copy()
    for name in _NOT_PASSED_ON:
        kept.popall(name, None)
    return kept


async def serve(options):
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    # No header of its own, and bodies as they come: nothing that was signed or counted changes on the way.
    own = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
    async with aiohttp.ClientSession(
        connector=connector, auto_decompress=False, skip_auto_headers=own, cookie_jar=aiohttp.DummyCookieJar()
    ) as session:
        app = web.Application(client_max_size=_MOST_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", FaultProxy(options.upstream_port, session, options).handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", options.listen_port).start()
        await asyncio.Event().wait()


def _text_and_kind(value):
    text, _, kind = value.rpartition("=")
    if not text or kind not in {kind for kinds in KINDS.values() for kind in kinds}:
        raise argparse.ArgumentTypeError(f"{value} is not TEXT=KIND, with a kind of fault behind the last =")
    return text, kind


def _options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("listen_port", type=int)
    parser.add_argument("upstream_port", type=int)
    parser.add_argument("--share", type=float, default=0.1, help="of the calls, from 0 to 1")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--most-in-a-row", type=int, default=2, help="faults of one path")
    parser.add_argument("--always-fail", type=_text_and_kind, action="append", default=[], metavar="TEXT=KIND")
    parser.add_argument(
        "--lose-first-answer", action="append", default=[], help="text of paths whose first PUT is done, but reset"
    )
    parser.add_argument("--stall-s", type=float, default=3, help="seconds without a byte, before the end")
    parser.add_argument("--slow-s", type=float, default=0.5, help="seconds that a slow body takes")
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(serve(_options()))
