"""Serves an S3 API with any number of objects, without a disk, for listings and reads at scale.

    python -m benchmarks.synthetic_s3 --keys 1000000 --folders 1000 --port 9000 &
    AWS_ENDPOINT_URL=http://127.0.0.1:9000 AWS_ACCESS_KEY_ID=a AWS_SECRET_ACCESS_KEY=b AWS_DEFAULT_REGION=us-east-1 \
        af3pipe run s3://synthetic/ ...

Bucket `synthetic` (any other name is the same one) contains `00000/0000000.wav` and so on, spread evenly over the
folders, or all at the top if there are 0 folders; all are the same short WAV file. It answers ListObjectsV2 (prefix,
delimiter, continuation token, pages of 1000), HEAD and GET (with a range), and checks no signature. Keys are
computed from their number, so a page takes half a millisecond, far less than a client takes to parse it.
"""

import argparse
import asyncio
import io
import math
import queue
import threading
import wave
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import parse_qs, unquote, urlsplit

RATE = 16_000
_PAGE = 1000
_MTIME = "2024-01-02T03:04:05.000Z"
_LAST = "\U0010ffff"


def tone(seconds: float) -> bytes:
    """A WAV file: 440 Hz, 16 kHz, mono, 16 bits."""
    samples = (round(8000 * math.sin(2 * math.pi * 440 * index / RATE)) for index in range(round(seconds * RATE)))
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(b"".join(sample.to_bytes(2, "little", signed=True) for sample in samples))
    return buffer.getvalue()


class Bucket:
    """Keys by number, in the order in which S3 lists them."""

    def __init__(self, keys: int, folders: int, seconds: float = 0.5) -> None:
        self.keys = keys
        self.body = tone(seconds)
        self._per_folder = math.ceil(keys / folders) if folders else keys

    def key(self, index: int) -> str:
        folder, _ = divmod(index, self._per_folder)
        return f"{index:09d}.wav" if self._per_folder == self.keys else f"{folder:06d}/{index:09d}.wav"

    def etag(self, key: str) -> str | None:
        """As listings state it; None where there is no such key."""
        index = bisect_left(range(self.keys), key, key=self.key)
        return f"{index:032x}" if index < self.keys and self.key(index) == key else None

    def page(self, prefix: str, delimiter: str, start: int, most: int) -> bytes:
        """One answer to ListObjectsV2, beginning with the key of number `start`."""
        index = max(start, bisect_left(range(self.keys), prefix, key=self.key))
        end = bisect_left(range(self.keys), prefix + _LAST, key=self.key)
        contents, common = [], []
        while index < end and len(contents) + len(common) < most:
            key = self.key(index)
            folder, slash, _ = key[len(prefix) :].partition(delimiter) if delimiter else (key, "", "")
            if slash:
                common.append(f"<CommonPrefixes><Prefix>{prefix}{folder}/</Prefix></CommonPrefixes>")
                index = bisect_left(range(self.keys), f"{prefix}{folder}/{_LAST}", key=self.key)
                continue
            contents.append(
                f"<Contents><Key>{key}</Key><LastModified>{_MTIME}</LastModified>"
                f"<ETag>&quot;{index:032x}&quot;</ETag><Size>{len(self.body)}</Size>"
                "<StorageClass>STANDARD</StorageClass></Contents>"
            )
            index += 1
        goes_on = f"<NextContinuationToken>{index}</NextContinuationToken>" if index < end else ""
        return (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>synthetic</Name>'
            f"<Prefix>{prefix}</Prefix><KeyCount>{len(contents) + len(common)}</KeyCount><MaxKeys>{most}</MaxKeys>"
            f"<IsTruncated>{'true' if goes_on else 'false'}</IsTruncated>{goes_on}"
            f"{''.join(contents)}{''.join(common)}</ListBucketResult>"
        ).encode()


class Server:
    """HTTP for one bucket. `requests` counts what it was asked, by kind: list, get, head."""

    def __init__(self, bucket: Bucket, delay_s: float = 0.0) -> None:
        self.requests = {"list": 0, "get": 0, "head": 0}
        self.is_there = True
        self._bucket = bucket
        self._delay_s = delay_s

    async def serve(self, port: int) -> asyncio.Server:
        return await asyncio.start_server(self._connection, "127.0.0.1", port, backlog=1024)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                method, target, _ = head.split(" ", 2)
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                writer.write(self._answer(method, target, head))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _answer(self, method: str, target: str, head: str) -> bytes:
        url = urlsplit(target)
        _, _, key = unquote(url.path).lstrip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        if not self.is_there:
            body = (
                b""
                if method == "HEAD"
                else b"<Error><Code>NoSuchBucket</Code><Message>no such bucket</Message></Error>"
            )
            return _http("404 Not Found", body)
        etag = self._bucket.etag(key)
        if method == "HEAD":
            self.requests["head"] += 1
            if not key:
                return _http("200 OK", b"")
            return _http("404 No", b"") if etag is None else _http("200 OK", self._bucket.body, etag, is_head=True)
        if method != "GET":
            return _http("501 Not Implemented", b"")
        if not key:
            self.requests["list"] += 1
            most = min(int(query.get("max-keys", _PAGE)), _PAGE)
            start = int(query.get("continuation-token", 0))
            return _http(
                "200 OK", self._bucket.page(query.get("prefix", ""), query.get("delimiter", ""), start, most)
            )
        self.requests["get"] += 1
        if etag is None:
            return _http("404 Not Found", b"<Error><Code>NoSuchKey</Code><Message>no such key</Message></Error>")
        return _ranged(self._bucket.body, head, etag)


def _ranged(body: bytes, head: str, etag: str) -> bytes:
    named = [line.partition("=")[2] for line in head.split("\r\n") if line.lower().startswith("range:")]
    if not named:
        return _http("200 OK", body, etag)
    first, _, last = named[0].partition("-")
    start, end = int(first), min(int(last or len(body)) + 1, len(body))
    if start >= len(body):
        return _http("416 Range Not Satisfiable", b"<Error><Code>InvalidRange</Code></Error>")
    content_range = f"Content-Range: bytes {start}-{end - 1}/{len(body)}\r\n"
    return _http("206 Partial Content", body[start:end], etag, content_range)


def _http(status: str, body: bytes, etag: str = "0", more: str = "", *, is_head: bool = False) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nAccept-Ranges: bytes\r\n"
        f'ETag: "{etag}"\r\nLast-Modified: Tue, 02 Jan 2024 03:04:05 GMT\r\n{more}\r\n'
    )
    return head.encode() + (b"" if is_head else body)


@contextmanager
def serving(bucket: Bucket, delay_s: float = 0.0) -> Iterator[tuple[str, Server]]:
    """Its URL, and the server, on a thread of this process."""
    server, loop, stop = Server(bucket, delay_s), asyncio.new_event_loop(), asyncio.Event()
    port: queue.SimpleQueue[int] = queue.SimpleQueue()

    async def run() -> None:
        listening = await server.serve(0)
        port.put(listening.sockets[0].getsockname()[1])
        await stop.wait()
        listening.close()
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port.get()}", server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--folders", type=int, default=1000, help="0: all at the top")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of each recording")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds before each answer")
    parser.add_argument("--port", type=int, default=9000)
    given = parser.parse_args()

    async def run() -> None:
        listening = await Server(Bucket(given.keys, given.folders, given.seconds), given.delay).serve(given.port)
        print(f"serving {given.keys} objects on http://127.0.0.1:{given.port}", flush=True)
        await listening.serve_forever()

    asyncio.run(run())


if __name__ == "__main__":
    main()
