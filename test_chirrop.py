"""The tests of chirrop: standard library only, run with `python3 -m unittest`.

They stand in the order of the module and use real sockets on loopback, real SQLite files, real
processes and real signals; a fake transport only where an answer is all that matters. A wait is for
an event, with a time-out that only a failure reaches. CHIRROP_TEST_FULL=1 runs all long rounds.
"""

from __future__ import annotations

import ast
import asyncio
import collections
import contextlib
import copy
import dis
import email.utils
import functools
import http.client
import http.server
import importlib
import importlib.util
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import pathlib
import pickle
import py_compile
import queue
import random
import re
import shutil
import signal
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import tempfile
import threading
import time
import tokenize
import traceback
import types
import unittest
import urllib.error
import urllib.parse
import urllib.request
import uuid
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from unittest import mock

import chirrop
from chirrop import (
    ChirrOpError,
    ChirrOpQueueFullError,
    ChirrOpValidationError,
    Client,
    Config,
    Log,
    SqliteSpool,
    new_client,
)

Sandbox = getattr(chirrop, "Sandbox", None)  # the cut file has none

HERE = pathlib.Path(chirrop.__file__).resolve().parent
KEY = "chp_test"
LONG = 30.0  # seconds: a time-out that only a failure reaches
FULL = bool(os.environ.get("CHIRROP_TEST_FULL"))
# PyPy frees objects when its collector comes by, and runs signal handlers inside what is C here.
refcounted = unittest.skipUnless(sys.implementation.name == "cpython", "goes by CPython's ways")


def rounds(quick, full):
    """Return `full` if the tests run in full: a number of seeds, kills, processes, repetitions."""
    return full if FULL else quick


def setUpModule():
    """Cache the module's bytecode: processes that import it start several times as fast."""
    if sys.dont_write_bytecode:
        with contextlib.suppress(OSError):
            py_compile.compile(chirrop.__file__)


def cases(table):
    """Make a test a table: the method gets each row as its arguments, in a subtest of its own.

    @cases([(" a ", "a"), ("b", "b")])
    def test_events_are_trimmed(self, given, sent):
        self.assertEqual(Log(given, 1).event, sent)
    """

    def decorate(test):
        @functools.wraps(test)
        def run(self):
            for number, row in enumerate(table):
                row = row if isinstance(row, tuple) else (row,)
                with self.subTest(unittest.util.safe_repr(row, short=True), row=number):
                    test(self, *row)

        return run

    return decorate


def eventually(look, timeout=LONG):
    """Return what `look()` returns as soon as that is true; fail when it never is."""
    deadline = time.monotonic() + timeout
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"still {found!r} after {timeout} s")
        time.sleep(0.002)


def ids(logs):
    return [log["log_id"] for log in logs]


class FakeTransport:
    """Answer from a script, record requests; what is not scripted is answered by `default`.

    An answer is a status, a (status, body, headers) tuple, an exception to raise, or a callable of
    the body that returns one of these.
    """

    def __init__(self, *answers, default=200):
        self.answers, self.default, self.requests = list(answers), default, []
        self.seen = queue.Queue()  # one body a request, for tests that wait for it

    def __call__(self, method, url, body, headers, timeout):
        self.requests.append((method, url, body, dict(headers), timeout))
        self.seen.put(body)
        answer = self.answers.pop(0) if self.answers else self.default
        if callable(answer):
            answer = answer(body)
        if isinstance(answer, BaseException):
            raise answer
        return answer if isinstance(answer, tuple) else (answer, b"", {})

    def logs(self):
        """Return every log of every request, in order."""
        return [log for request in self.requests if request[2] for log in json.loads(request[2])]


class TestCase(unittest.TestCase):
    """Closes what it opens; fails if a thread of ours dies or stays, or an account is off."""

    maxDiff = None

    def setUp(self):
        environment = mock.patch.dict(os.environ)
        environment.start()
        self.addCleanup(environment.stop)
        for name in list(os.environ):
            if name.startswith("CHIRROP_") or name.lower().endswith("_proxy"):
                del os.environ[name]
        self.records = []  # what the logger "chirrop" was given
        handler, logger = logging.Handler(), logging.getLogger("chirrop")
        handler.emit = self.records.append
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(logging.DEBUG)
        self.addCleanup(logger.removeHandler, handler)
        self.addCleanup(logger.setLevel, logging.NOTSET)
        crashes = []
        self.addCleanup(self.assertEqual, crashes, [])
        self.patch(threading, "excepthook", crashes.append)
        self.addCleanup(self.assertNoThreads)

    def patch(self, *args):
        """Do mock.patch.object(*args) until the test ends; return what took the place."""
        patcher = mock.patch.object(*args)
        self.addCleanup(patcher.stop)
        return patcher.start()

    def assertNoThreads(self):
        for thread in threading.enumerate():
            if thread.name.startswith("chirrop-"):
                thread.join(LONG)
                self.assertFalse(thread.is_alive(), thread)

    def assertBalanced(self, client):
        stats = client.stats()
        held = stats.queued + stats.in_flight
        self.assertEqual(
            stats.accepted, stats.delivered + sum(stats.dropped.values()) + held, stats
        )
        return stats

    def client(self, *answers, **fields):
        """Return a client on a FakeTransport with these answers, without jitter; it is closed."""
        fields.setdefault("transport", FakeTransport(*answers))
        fields.setdefault("api_key", KEY)
        client = new_client(**fields)
        client._delivery._rand = lambda: 0.0  # full jitter begins at 0: no pause at all
        self.addCleanup(self.assertBalanced, client)
        self.addCleanup(client.close, 5)
        return client

    def folder(self):
        path = tempfile.mkdtemp(prefix="chirrop-test-")
        self.addCleanup(shutil.rmtree, path, ignore_errors=True)
        return pathlib.Path(path)

    def serve(self, sandbox):
        """Serve this sandbox on loopback until the test ends; return its base URL."""
        server = chirrop._serve_sandbox(sandbox)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        self.addCleanup(thread.join, LONG)
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        return f"http://127.0.0.1:{server.server_port}/v1.0"

    def begin(self, command, **options):
        """Start a program; return a function that waits for its end and returns what
        subprocess.run does. Its attribute `process` is the Popen: to kill, to read, to write.
        """
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        process = subprocess.Popen(command, **options)

        def end(timeout=LONG, input=None):
            output = process.communicate(input, timeout)
            return subprocess.CompletedProcess(command, process.returncode, *output)

        end.process = process
        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return end

    def begin_python(self, code, *args, env=None, **options):
        """Begin a program in a new process that can import chirrop; a warning is an error there."""
        return self.begin(
            [sys.executable, "-W", "error", "-c", code, *map(str, args)],
            env={**os.environ, "PYTHONPATH": str(HERE), "PYTHONFAULTHANDLER": "1", **(env or {})},
            **options,
        )

    def python(self, code, *args, timeout=LONG, **options):
        """Run a program in a new process that can import chirrop; return the finished process."""
        return self.begin_python(code, *args, **options)(timeout)


# ---- A scripted server ----------------------------------------------------
# The one server of all tests that need real sockets. With each request it does the next thing of
# its script, then `default` for ever: bytes are sent; a function is called with (connection,
# request), and what it returns is sent.

# For 127.0.0.1 only and trusted by nobody; from 2020 to 2120, its own authority.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg2Olao5tJmeNFePMr
AahAfU6hEYxigyCpR5MHH0kwxSOhRANCAATvM9mX/C2PVDnol7gv908B0kLnAuE8
htAkqyZ1qwpqbLQBU4gOtBAg5YGNKgLUHYZ43VqK/rsaL329Y4goQGd8
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBrDCCAVKgAwIBAgIBATAKBggqhkjOPQQDAjAYMRYwFAYDVQQDDA1jaGlycm9w
IHRlc3RzMCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAxMDAwMDAwWjAYMRYwFAYD
VQQDDA1jaGlycm9wIHRlc3RzMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE7zPZ
l/wtj1Q56Je4L/dPAdJC5wLhPIbQJKsmdasKamy0AVOIDrQQIOWBjSoC1B2GeN1a
iv67Gi99vWOIKEBnfKOBijCBhzAPBgNVHRMBAf8EBTADAQH/MA4GA1UdDwEB/wQE
AwIChDATBgNVHSUEDDAKBggrBgEFBQcDATAdBgNVHQ4EFgQUglwZstDjdm7xDm2W
XKGCCsjexeYwHwYDVR0jBBgwFoAUglwZstDjdm7xDm2WXKGCCsjexeYwDwYDVR0R
BAgwBocEfwAAATAKBggqhkjOPQQDAgNIADBFAiAv1YYcrA04LoDtqF/t/M6tNul0
H8EhtumzlpKwsU7QcwIhAMHmEWvV0iylSun+welo33MmXs+rCVfJYFpaTFztLyVF
-----END CERTIFICATE-----
"""


def answer(status=200, body=b"", **fields):
    """Return a whole answer; `Retry_After="7"` is a header, Content_Length=None leaves that out."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    fields = {"Content_Length": len(body), **fields}
    lines = [f"{k.replace('_', '-')}: {v}\r\n" for k, v in fields.items() if v is not None]
    return f"HTTP/1.1 {status} -\r\n{''.join(lines)}\r\n".encode() + body


def chunked(*parts):
    """Return an answer in chunks; it is cut short when the last part is not b""."""
    chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts]
    return answer(Content_Length=None, Transfer_Encoding="chunked") + b"".join(chunks)


def hang(connection, request):
    connection.sock.recv(1)  # returns when the client hangs up or the test ends


def cut(data=b"", reset=False):
    """Send `data` and close the connection; or reset it."""

    def behave(connection, request):
        connection.sock.sendall(data)
        connection.close(reset)

    return behave


def drip(head, more=b"x", pause=0.02):
    """Send `head`, then `more` again and again, with a pause in between, as long as it is taken."""

    def behave(connection, request):
        connection.sock.sendall(head)
        while not connection.server.ended.wait(pause):
            connection.sock.sendall(more)
            connection.dripped += 1

    return behave


def tunnel(connection, request):
    """Be a CONNECT proxy."""
    host, _, port = request.path.partition(":")
    with socket.create_connection((host, int(port))) as upstream:
        connection.sock.sendall(b"HTTP/1.1 200 -\r\n\r\n")
        back = connection.server.start(pump, upstream, connection.sock)
        pump(connection.sock, upstream)
        back.join(LONG)


def pump(source, target):
    with contextlib.suppress(OSError):
        for data in iter(lambda: source.recv(1 << 16), b""):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


class Request(collections.namedtuple("Request", "method path headers body connection")):
    """One request as it came; `connection` is the number of the connection that it came on."""

    def logs(self):
        return json.loads(self.body)


class Connection:
    """The server's side of one connection."""

    def __init__(self, server, sock, number):
        self.server, self.sock, self.number = server, sock, number
        self.dripped, self.ending, self.closed = 0, False, threading.Event()

    def serve(self):
        server = self.server
        with contextlib.suppress(OSError):  # the client went away, or the test is over
            if server.tls:
                self.sock = server.tls.wrap_socket(self.sock, server_side=True)
            with self.sock.makefile("rb") as file:
                while not self.ending:
                    server.behave(self, self.read(file))
        self.sock.close()
        self.closed.set()

    def read(self, file):
        """Return the next request; raise an OSError when the client has hung up."""
        method, _, rest = file.readline().decode("latin-1").partition(" ")
        headers = http.client.parse_headers(file)
        size = int(headers.get("Content-Length", 0))
        body = file.read(size)
        if not rest or len(body) < size:
            raise ConnectionError("the client hung up")
        return Request(method, rest.split()[0], headers, body, self.number)

    def close(self, reset=False):
        """Let this request be the last; with `reset`, the client gets a reset instead of an end."""
        self.ending = True
        if reset:
            linger = (1).to_bytes(4, sys.byteorder) + bytes(4)  # for no time
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


class Server:
    """A server on loopback, until the test ends."""

    def __init__(self, *script, default=answer(), tls=None, listening=True):
        self.script, self.default, self.tls = list(script), default, tls
        self.requests, self.connections = [], []
        self.ended, self._threads = threading.Event(), []
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        if listening:
            self.listen()

    def listen(self):
        if not self._threads:
            self._socket.listen(64)
            self.start(self._accept)

    def start(self, target, *args):
        thread = threading.Thread(target=target, args=args, name="test-server", daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self):
        while True:
            sock, _ = self._socket.accept()
            if self.ended.is_set():
                return sock.close()
            self.connections.append(Connection(self, sock, len(self.connections)))
            self.start(self.connections[-1].serve)

    def behave(self, connection, request):
        behaviour = self.script.pop(0) if self.script else self.default
        self.requests.append(request)
        data = behaviour(connection, request) if callable(behaviour) else behaviour
        if data:
            connection.sock.sendall(data)

    def logs(self):
        """Return every log of every request, in order."""
        return [log for request in self.requests for log in request.logs()]

    def on(self):
        """Return the number of the connection of each request, in order."""
        return [request.connection for request in self.requests]

    def close(self):
        """End all threads and sockets."""
        self.ended.set()
        if self._threads:
            socket.create_connection(("127.0.0.1", self.port)).close()  # wakes accept()
        for thread in self._threads:  # the first one accepts: none is added after it
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
            thread.join(LONG)
            assert not thread.is_alive(), thread
        self._socket.close()


def ship(client):
    """Log one event; return what flush() does."""
    client.log(Log("a.b.count", 1))
    return client.flush(LONG)


class ServerTestCase(TestCase):
    """Makes servers and clients whose real transport talks to them."""

    def server(self, *script, **options):
        server = Server(*script, **options)
        self.addCleanup(server.close)
        return server

    def certificate(self):
        """Return the path of the servers' certificate, and a context to serve with it."""
        path = self.folder() / "cert.pem"
        path.write_text(CERTIFICATE)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(str(path))
        return str(path), context

    def tls_server(self, *script, **options):
        """Return a server with TLS, and a context that trusts it."""
        path, context = self.certificate()
        return self.server(*script, tls=context, **options), ssl.create_default_context(cafile=path)

    def real(self, server, **fields):
        """Return a client whose real transport talks to this server (or base URL)."""
        url = getattr(server, "url", server)
        fields = {"api_endpoint": url + "/v1.0/logs", "servicer_endpoint": url + "/v1.0", **fields}
        return self.client(transport=None, **fields)

    def deliver(self, server, **fields):
        """Log one event, flush, and return the client."""
        client = self.real(server, **fields)
        ship(client)
        return client


# ---- Errors ---------------------------------------------------------------


def failure(test, answer):
    """Return the error of a control-plane call that gets this answer."""
    with test.assertRaises(ChirrOpError) as caught:
        test.client(answer, servicer_retries=0).list_events()
    return caught.exception


class ErrorTest(TestCase):
    @cases([
        (400, "BadRequest"), (413, "BadRequest"), (422, "BadRequest"), (401, "Unauthorized"),
        (403, "Forbidden"), (404, "NotFound"), (500, "InternalServer"), (503, "ServiceUnavailable"),
        (408, "Server"), (502, "Server"), (504, "Server"), (599, "Server"), (429, "RateLimit"),
        (301, "NonRetryable"), (OSError("reset"), "Transport"),
    ])  # fmt: skip
    def test_each_answer_has_its_error_with_status_body_and_retry_after(self, answer, kind):
        carried = (0, None, None)
        if isinstance(answer, int):
            carried = (answer, {"error": "because"}, 7.0)
            answer = (answer, b'{"error": "because"}', {"Retry-After": "7"})
        error = failure(self, answer)
        self.assertIs(type(error), getattr(chirrop, f"ChirrOp{kind}Error"))
        self.assertEqual((error.status_code, error.body, error.retry_after), carried)

    @cases([
        (b'{"error": {"code": "QUOTA_EXCEEDED", "message": "none left"}}',
         "none left", "QUOTA_EXCEEDED"),
        (b'{"error": {"code": "NO_SEAT", "message": " "}}', "NO_SEAT", "NO_SEAT"),
        (b'{"error": "Bad Request", "message": "event is required"}', "event is required", None),
        (b'{"code": "C", "message": "m"}', "m", "C"), (b'{"error": "bad key"}', "bad key", None),
        (b"plain text", "plain text", None), (b'{"message": "\\u001b[31m"}', "\\x1b[31m", None),
        *[(body, "forbidden", None) for body in (b"", b"<p>", b'{"error": [1]}', b"[" * 10**5)],
    ])  # fmt: skip
    def test_message_and_code_are_the_most_telling_of_the_answer(self, body, text, code):
        error = failure(self, (403, body, {}))
        self.assertEqual((str(error), error.code), (f"HTTP 403: {text}", code))

    @cases([
        (502, {}, "HTTP 502: bad gateway"), (301, {}, "HTTP 301: redirects are not followed"),
        (302, {"Location": "https://a/x?token=1"}, "leads to https://a/x; check the endpoint"),
        (407, {}, "give it as http://user:password@host:port in HTTPS_PROXY"),
        (200, {}, "a web page, not the service's answer"),
    ])  # fmt: skip
    def test_what_answered_in_the_services_place_is_told(self, status, headers, text):
        error = failure(self, (status, b"<!DOCTYPE html>\r\n<html>", headers))
        self.assertIn(text, str(error))
        self.assertNotIn("token", str(error))

    def test_of_a_large_answer_a_little_is_kept_and_the_message_told(self):
        body = json.dumps({"error": {"code": "C", "message": "m"}, "rest": "x" * 60_000})
        error = failure(self, (400, body.encode(), {}))
        self.assertEqual((str(error), error.code), ("HTTP 400: m", "C"))
        self.assertEqual(error.body, body[:4096])

    def test_what_broke_the_connection_is_told_in_one_short_line(self):
        text = str(failure(self, OSError("Tunnel failed: 503 \x1b[2J\r\n" + "x" * 100_000)))
        self.assertTrue(text.isprintable())
        self.assertLess(len(text), 600)

    @cases([name for name in chirrop.__all__ if name.endswith("Error")])
    def test_errors_survive_pickle_and_copy_with_all_they_carry(self, name):
        kind = getattr(chirrop, name)
        error = kind("text", status_code=418, code="C", body={"a": [1]}, retry_after=2.5)
        for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
            self.assertIs(type(twin), kind)
            self.assertEqual((twin.args, vars(twin)), (error.args, vars(error)))
        self.assertEqual(issubclass(kind, ValueError), name == "ChirrOpValidationError")


# ---- Log ------------------------------------------------------------------


class Hostile:
    def __repr__(self):
        raise RuntimeError("no repr for you")

    __str__ = __repr__


CYCLE, NESTED = {}, []
CYCLE["self"] = CYCLE
for _ in range(100_000):
    NESTED = [NESTED]
NOW = datetime.now(timezone.utc).replace(microsecond=0)
DAY = (NOW - timedelta(days=2)).strftime("%Y-%m-%d")
HEX = "123e4567e89b12d3a456426614174000"
UUID = uuid.UUID(HEX)


class LogTest(TestCase):
    def refused(self, text, **fields):
        with self.assertRaises(ChirrOpValidationError) as caught:
            Log(**{"event": "a.b", "value": 1, **fields})
        self.assertIn(text, str(caught.exception))
        self.assertLess(len(str(caught.exception)), 400)

    def test_what_is_given_is_what_is_sent(self):
        log = Log(" tool.errors.count ", 3, " billing ", meta={"k": [1, "ü", None]})
        sent = log.to_dict()
        names = ["log_id", "event", "value", "occurred_at", "agent", "meta"]
        self.assertEqual((list(sent), list(Log("a", 1, " ").to_dict())), (names, names[:4]))
        self.assertEqual([getattr(log, name) for name in names], list(sent.values()))
        self.assertEqual((log.event, log.value, log.agent), ("tool.errors.count", 3, "billing"))
        with mock.patch("time.time", lambda: 1e9 + 1.5):
            self.assertEqual(Log("a", 1).occurred_at, "2001-09-09T01:46:41.500000Z")

    def test_a_log_cannot_be_changed_and_equals_its_copies(self):
        meta = {"list": [1]}
        log = Log("a", 1, meta=meta)
        meta["list"].append(2)
        log.meta["list"].append(3)
        self.assertEqual(log.meta, {"list": [1]})
        for name in ("value", "x"):
            self.assertRaises(AttributeError, setattr, log, name, 2)
        for twin in (pickle.loads(pickle.dumps(log)), copy.copy(log), copy.deepcopy(log)):
            self.assertEqual((twin, hash(twin), twin.meta), (log, hash(log), log.meta))
        self.assertNotEqual(log, Log("a", 1, meta=meta))
        self.assertIn("event='a'", repr(log))

    @cases([
        (-1.5, -1.5), (10**300, 10**300), (1e-320, 1e-320), (signal.SIGINT, 2),
        (Decimal("1.25"), 1.25), (Fraction(1, 4), 0.25), (type("Real", (float,), {})(0.5), 0.5),
    ])  # fmt: skip
    def test_real_numbers_of_every_kind_are_values(self, given, sent):
        self.assertEqual(Log("a", given).value, sent)

    @cases([
        ("event", " must be a string, got ", (None, b"x", Hostile(), CYCLE)),
        ("agent", " must be a string, got ", (0, False, ["a"])),
        ("event", " must not be empty: name it like tool.errors.count", ("", "\n\u2003")),
        ("event", " and agent must be valid Unicode", ["a\ud800"]),
        ("value", " must be a finite number, got ",
         (True, None, "1", math.nan, -math.inf, 10**400, -(10**5000), 1j, int, Hostile(), CYCLE,
          Decimal("sNaN"), Decimal("1e999"), Fraction(10**400))),
        ("log_id", " must be a UUID, as uuid.uuid5(uuid.NAMESPACE_URL, key) makes of a key",
         ("x-17", 1, Hostile(), "\ud800", HEX + "0")),
        ("meta", " must be JSON-encodable, got ",
         (math.nan, NESTED, b"x", Hostile(), {math.nan: 1}, {(1, 2): 3}, {"\udc00": 1}, "\ud800")),
        ("meta['job']['at']", " must be JSON-encodable, got datetime.da", [{"job": {"at": NOW}}]),
        ("meta['x']", "", ({"a": 1, "x": "\ud800"}, {"x": [{1}]})),
        ("meta['self']['self']", "", [CYCLE]),
        ("occurred_at", " must be a datetime, as of datetime.fromtimestamp(seconds, timezone.utc),"
         " or ISO 8601 text, got ",
         ("", "yesterday", "2026-02-30T00:00:00Z", "2026-01-01", "2026-01-01T25:00:00Z", "9" * 5000,
          "2026-01-01T00:00:00+05:60", "２０２６-01-01T00:00:00Z", "2026-01-01T00:00:00\ud800",
          NOW.date(), 1_700_000_000, Hostile(),
          datetime.max.replace(tzinfo=timezone(-timedelta(hours=23))))),
    ])  # fmt: skip
    def test_what_breaks_a_rule_is_named_with_the_rule_and_what_was_given(self, name, text, values):
        for bad in values:
            self.refused(name + text, **{name.partition("[")[0]: bad})

    @cases([0, False, "", [], {}, [None], {1: 2, None: 3}, {'\u00fc"': "\n\\", "b": [{"c": 2.5}]}])
    def test_meta_may_be_any_json_value(self, meta):
        self.assertEqual(Log("a", 1, meta=meta).meta, json.loads(json.dumps(meta)))

    @cases([("x", 1), ("ü", 2), ("€", 3), ("😀", 4), ("\n", 2), ("\x01", 6)])
    def test_meta_takes_1024_bytes_and_not_one_more(self, character, size):
        fits = character * (1022 // size) + "x" * (1022 % size)
        self.assertEqual(Log("a", 1, meta=fits).meta, fits)
        self.refused(" and 1024 bytes (cut texts, as in ", meta=fits + "x")

    def test_meta_takes_10_top_level_keys_and_not_one_more(self):
        many = dict.fromkeys("0123456789x", 0)
        Log("a", 1, meta={**dict.fromkeys("0123456789", many)})
        self.refused("at most 10 top-level keys and ", meta=many)

    @cases([HEX.upper(), f" {UUID} ", f"urn:uuid:{UUID}", UUID])
    def test_a_given_log_id_is_sent_in_canonical_form(self, given):
        self.assertEqual(Log("a", 1, log_id=given).log_id, str(UUID))

    def test_made_ids_are_random_uuids_in_all_threads(self):
        with ThreadPoolExecutor(8) as pool:
            logs = pool.map(lambda _: Log("a", 1, log_id=" "), range(rounds(2000, 24000)))
        made = [log.log_id for log in logs]
        self.assertEqual(len(set(made)), len(made))
        self.assertEqual({uuid.UUID(i).version for i in made}, {4})
        self.assertEqual({len({i[place] for i in made}) for place in range(8)}, {16})

    @unittest.skipUnless(hasattr(os, "fork"), "no fork here")
    def test_processes_with_one_random_seed_and_a_fork_make_different_ids(self):
        code = (
            "import random, os; random.seed(1); from chirrop import Log\n"
            "mine = Log('a', 1).log_id; r, w = os.pipe(); pid = os.fork()\n"
            "made = ' '.join(Log('a', 1).log_id for _ in range(100))\n"
            "if pid: os.waitpid(pid, 0); print(mine, made, os.read(r, 9999).decode())\n"
            "else: os.write(w, made.encode()); os._exit(0)"
        )
        begun = [self.begin_python(code) for _ in range(2)]
        made = [i for end in begun for i in end().stdout.split()]
        self.assertEqual((len(made), len(set(made))), (402, 402))

    @cases([
        ("{}t10:00:00z", "10:00:00"), (" {} 10:00\n", "10:00:00"),
        ("{}T10:00:00.5Z", "10:00:00.500000"), ("{}T10:00:00.123456789Z", "10:00:00.123456"),
        ("{}T10:00:00,25Z", "10:00:00.250000"), ("{}T10:00:00-0130", "11:30:00"),
        ("{}T10:00+00:30", "09:30:00"), ("{} 10:00:38.25-03", "13:00:38.250000"),  # PostgreSQL
        ("BASICT070638Z", "07:06:38"), ("BASICT0706+02", "05:06:00"),
    ])  # fmt: skip
    def test_times_as_people_and_programs_write_them(self, text, sent):
        text = text.format(DAY).replace("BASIC", DAY.replace("-", ""))
        log = Log("a", 1, occurred_at=text)
        self.assertEqual(log.occurred_at, f"{DAY}T{sent}Z")

    def test_datetimes_are_sent_in_utc_and_naive_ones_are_utc_whatever_the_local_zone(self):
        east, naive = timezone(timedelta(hours=5)), NOW.replace(tzinfo=None)
        for moment in (naive, NOW, NOW.astimezone(east)):
            self.assertEqual(Log("a", 1, occurred_at=moment).occurred_at, f"{naive.isoformat()}Z")
        code = f"import datetime; from chirrop import Log; print(Log('a', 1, occurred_at={naive!r})"
        child = self.python(f"{code}.occurred_at)", env={"TZ": "Asia/Kolkata"})
        self.assertEqual(child.stdout, f"{naive.isoformat()}Z\n")

    @cases([(-30 * 86400 + 60, -30 * 86400 - 1), (86340, 86460)])
    def test_times_lie_within_the_last_30_days_and_1_day_ahead(self, fits, bad):
        after = lambda seconds: datetime.now(timezone.utc) + timedelta(seconds=seconds)
        Log("a", 1, occurred_at=after(fits))
        self.refused("within the last 30 days and at most 1 day ahead", occurred_at=after(bad))


# ---- Config ---------------------------------------------------------------


class ConfigTest(TestCase):
    def setUp(self):
        super().setUp()
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder())

    def refused(self, pattern, **fields):
        with self.assertRaisesRegex(ChirrOpValidationError, pattern) as caught:
            Config(**fields)
        self.assertNotIn("canary", str(caught.exception))
        self.assertLess(len(str(caught.exception)), 300)

    @cases([
        ("retries", (-1, 1.5, "3", True, None)), ("servicer_retries", [-1]),
        ("timeout", (0, "1", math.nan, 1e9, None, True)), ("batch_size", [0]),
        ("flush_delay", (-1, math.inf)), ("queue_size", [-1]), ("log_level", (-1, "LOUD", None)),
        ("on_exhausted", ["hold"]), ("max_senders", (0, 65)), ("exit_timeout", [-1]),
        ("transport", ["x"]), ("disabled", (0, "false")), ("ssl_context", [True]), ("on_drop", [1]),
        ("api_key", (1, b"chp_canary")), ("servicer_endpoint", ("x", 1)),
        ("api_endpoint", (" ", "ftp://x/", "http://", "https://u:canary@h/", "http://h:999999/",
                          "http://h/?a=b", "http://h/#f", b"http", "http://[h/", "http://h/a b",
                          "http://h\r\n/", "http://h/\u00fc")),
    ])  # fmt: skip
    def test_wrong_settings_are_refused_by_name(self, name, values):
        os.environ["CHIRROP_API_ENDPOINT"] = os.environ["CHIRROP_SERVICER_ENDPOINT"] = "https://h/"
        for value in values:
            self.refused(rf"^{name}( \(or CHIRROP_.*\))? must be ", **{"api_key": KEY, name: value})

    @cases([
        ("0", None, False), ("1", None, True), (" On ", None, True), ("TRUE", None, True),
        ("yes", None, True), ("1", False, False), ("", True, True),
    ])  # fmt: skip
    def test_what_code_says_of_disabled_wins_over_the_environment(self, variable, given, expected):
        os.environ["CHIRROP_DISABLED"] = variable
        self.assertIs(Config(api_key=KEY, disabled=given).disabled, expected)

    def test_a_config_cannot_be_changed_pickled_or_copied_and_shows_no_key(self):
        config = Config(api_key="chp_canary", on_drop=print)
        with self.assertRaisesRegex(AttributeError, "make another"):
            config.retries = 3
        for copied in (pickle.dumps, copy.copy, copy.deepcopy):
            with self.assertRaisesRegex(TypeError, "make it in the worker"):
                copied(config)
        self.assertNotIn("canary", repr(config) + str(config) + repr(vars(config)))
        self.assertEqual((config.api_key, f"{config.api_key}"), ("chp_canary", "chp_canary"))

    def test_the_key_comes_from_the_argument_then_the_environment_then_dotenv(self):
        required = r"^API key is required: give api_key, or set CHIRROP_API_KEY .* or \./\.env$"
        self.refused(required)
        pathlib.Path(".env").write_text("CHIRROP_API_KEY=chp_file\n")
        self.assertEqual(Config().api_key, "chp_file")
        os.environ["CHIRROP_API_KEY"] = "chp_environment\n"
        self.assertEqual(Config().api_key, "chp_environment")
        self.assertEqual(Config(api_key=" chp_argument\n").api_key, "chp_argument")

    BAD_KEY = (
        r"^api_key \(or CHIRROP_API_KEY in the environment or ./.env\) must be 'chp_' and more"
        r" printable ASCII, without spaces or quotation marks, got '\*\*\*'$"
    )

    @cases(["canary", '"chp_a"', "chp_\u00fccanary", "chp_a\r\nX: y", "chp_"])
    def test_a_bad_key_is_refused_with_its_places_and_not_shown(self, bad):
        os.environ["CHIRROP_API_KEY"] = bad
        self.refused(self.BAD_KEY)
        os.environ["CHIRROP_API_KEY"] = "chp_good"
        self.refused(self.BAD_KEY, api_key=bad)

    @cases([
        (b"export CHIRROP_API_KEY=chp_a\r\n", "chp_a"), (b"CHIRROP_API_KEY=chp_a\t# old", "chp_a"),
        (b"\xef\xbb\xbfCHIRROP_API_KEY='chp_a' # c", "chp_a"),
        (b'CHIRROP_API_KEY = "chp_a#b"  ', "chp_a#b"), (b"CHIRROP_API_KEY=chp_a#b", "chp_a#b"),
        (b"\x00\xff\n# CHIRROP_API_KEY=chp_no\nX=1\nCHIRROP_API_KEY=chp_a\n", "chp_a"),
        (b"CHIRROP_API_KEY=chp_a\nCHIRROP_API_KEY=chp_b", "chp_b"),
        ("X=1\r\nCHIRROP_API_KEY=chp_a\r\n".encode("utf-16"), "chp_a"),  # PowerShell
        (b"NOT_CHIRROP_API_KEY=chp_no", ""), (b"\xff\xfe\xff", ""), (b"CHIRROP_API_KEY=", ""),
    ])  # fmt: skip
    def test_the_key_is_read_from_dotenv_as_people_and_editors_write_it(self, content, key):
        pathlib.Path(".env").write_bytes(content)
        if key:
            self.assertEqual(Config().api_key, key)
        else:
            self.refused("^API key is required")
        pathlib.Path(".env").write_bytes(b"CHIRROP_API_KEY=sk_canary")
        self.refused(self.BAD_KEY)

    @cases([
        (None, "http://e:8080/v1/\n", "http://e:8080/v1"),
        (" https://a/x\n", "http://e", "https://a/x"),
        ("", "", "https://api.chirrop.com/v1.0"), ("HTTP://[::1]:80/a//", "", "HTTP://[::1]:80/a"),
    ])  # fmt: skip
    def test_endpoints_come_from_the_argument_then_the_environment(self, given, variable, url):
        os.environ["CHIRROP_SERVICER_ENDPOINT"] = variable
        self.assertEqual(Config(api_key=KEY, servicer_endpoint=given).servicer_endpoint, url)

    @cases([
        ("htps://host/v1.0/logs", "htps"), ("chp_canary", "chp_"),
        (f"https://u:canary@{'h' * 9999}/?token=canary", "http"),
    ])  # fmt: skip
    def test_of_a_wrong_endpoint_the_beginning_is_shown_which_holds_no_secret(self, url, shown):
        text = r"^api_endpoint \(or CHIRROP_API_ENDPOINT\) must be an absolute http or https URL"
        text += rf" without user info, query or fragment, got '{shown}\.\.\.'$"
        self.refused(text, api_key=KEY, api_endpoint=url)
        os.environ["CHIRROP_API_ENDPOINT"] = url
        self.refused(text, api_key=KEY)

    @cases([("warning", 30), ("Error", 40), (15, 15)])
    def test_a_level_may_be_a_name_and_is_that_of_the_logger(self, given, number):
        client = self.client(log_level=given)
        client.try_log("")
        level = logging.getLogger("chirrop").level
        self.assertEqual((client.config.log_level, level), (number, number))


# ---- Retry policy ---------------------------------------------------------


class PolicyTest(TestCase):
    @cases([
        ({}, 1, (200, 201, 202, 204, 299, (200, b"{}", {}))), ({"rejected": 1}, 1, (400, 413, 422)),
        ({}, 2, (OSError(), 100, 408, 429, 501, 502, 504, 599, (200, b"\n<html>", {}))),
        ({"exhausted": 1}, 1, (500, 503)),
        ({"refused": 1}, 1, (301, 308, 401, 403, 404, 405, 409, 600)),
    ])  # fmt: skip
    def test_every_answer_has_its_meaning_for_logs(self, dropped, requests, answers):
        for answer in answers:
            client = self.client(answer, retries=1, on_exhausted="drop")
            client.log(Log("a", 1))
            self.assertEqual(client.flush(LONG), not dropped, answer)
            self.assertEqual(client.stats().dropped, dropped, answer)
            self.assertEqual(len(client.config.transport.requests), requests, answer)

    def test_pauses_spread_over_all_of_the_backoff(self):  # its length: see DeliveryTest
        waits = [chirrop._backoff(10**9, None, chirrop._random) for _ in range(2000)]
        self.assertTrue(0 <= min(waits) < 3 and 27 < max(waits) <= 30)
        self.assertTrue(13 < sum(waits) / 2000 < 17)

    @cases([
        ("0", 0), (" 12 ", 12), ("1.5", 1.5), ("301", 300), ("9" * 400, 300),
        ("Tue, 14 Nov 2023 22:14:20 GMT", 60), ("Tue, 14 Nov 2023 22:14:20 +0100", 0),
        ("Tue, 14 Nov 2023 22:14:20 -0000", 60), ("Fri, 31 Dec 9999 23:59:59 GMT", 300),
        *[(bad, None) for bad in ("-5", "nan", "\uff11", "", ".", "soon")],
    ])  # fmt: skip
    def test_every_form_of_retry_after(self, text, seconds):
        with mock.patch("time.time", lambda: 1_700_000_000.0):
            error = failure(self, (429, b"", {"Retry-After": text}))
        self.assertEqual(error.retry_after, seconds)


# ---- Delivery -------------------------------------------------------------
# What the sender decides, by a clock turned by hand; what threads do to each other, by real ones.


class ClockTestCase(TestCase):
    """The real client, without threads, on a clock that whoever would sleep turns instead."""

    def setUp(self):
        super().setUp()
        test, self.thread = self, threading.current_thread()

        class Bell(queue.SimpleQueue):
            def get(self, timeout):
                if self.empty():
                    test.now += timeout
                else:
                    super().get()

        def fake(module, **names):
            self.patch(chirrop, module.__name__, types.SimpleNamespace(**{**vars(module), **names}))

        fake(time, monotonic=lambda: self.now)
        ident = lambda: id(self.current_thread())
        fake(threading, current_thread=lambda: self.current_thread(), get_ident=ident)
        fake(queue, SimpleQueue=Bell)

    def current_thread(self):
        return self.thread

    def client(self, *answers, default=200, rand=1.0, **fields):
        """Return a client at 0 o'clock; `times` and `sent` tell of requests when, which values."""
        self.now, self.times, self.sent, numbers = 0.0, [], [], itertools.count()
        self.transport = FakeTransport(*answers, default=default)

        def timed(method, url, body, headers, timeout):
            self.times.append(self.now)
            self.sent.append([log["value"] for log in json.loads(body)])
            return self.transport(method, url, body, headers, timeout)

        client = super().client(transport=timed, **fields)
        self.log = lambda count=1: [client.log(Log("a", next(numbers))) for _ in range(count)]
        self.delivery = client._delivery
        self.delivery._rand, self.delivery._start_locked = lambda: rand, lambda: False
        return client

    def run_for(self, seconds):
        """Do what a sender does in so many seconds."""
        end, moment = self.now + seconds, self.now
        while moment <= end:
            self.now = max(self.now, moment)
            with self.delivery._lock:
                task, moment = self.delivery._task_locked(math.inf)
            if task:
                task()
        self.now = end


class DeliveryTest(ClockTestCase):
    @cases([
        (502, 1.0, [1, 2, 4, 8, 16, 30, 30]),
        (OSError("down"), 0.25, [0.25, 0.5, 1, 2, 4, 7.5, 7.5]),
        ((429, b"", {"Retry-After": "5"}), 1.0, [6, 7, 9, 10, 10, 10, 10]),
        ((429, b"", {"Retry-After": "0"}), 1.0, [0] * 7),
        ((502, b"", {"Retry-After": "9999"}), 0.0, [300] * 7),
    ])  # fmt: skip
    def test_pauses_double_up_to_30_s_and_those_of_the_server_are_kept(self, answer, rand, pauses):
        client = self.client(default=answer, rand=rand, retries=7)
        self.log(3)
        self.assertFalse(client.flush())
        gaps = [after - before for before, after in zip(self.times, self.times[1:])]
        self.assertEqual((gaps, self.sent), (pauses, [[0, 1, 2]] * 8))

    @cases([
        (502, "keep", None, 3, {}), (502, "drop", None, 3, {"exhausted": 1}),
        (500, "keep", None, 1, {}), (503, "drop", None, 1, {"exhausted": 1}),
        (401, "keep", None, 1, {"refused": 1}), (404, "drop", "spool", 1, {"refused": 1}),
        (302, "keep", "spool", 1, {}),
    ])  # fmt: skip
    def test_what_is_final_is_held_and_tried_again_or_dropped(self, status, way, spool, count, why):
        spool = spool and self.folder() / spool
        client = self.client(default=status, retries=2, on_exhausted=way, spool=spool)
        self.log()
        self.assertFalse(client.flush())
        self.assertEqual((len(self.times), client.stats().dropped), (count, why))
        again = [] if why else [self.now + seconds for seconds in (30, 60, 90)]
        self.run_for(95)
        self.assertEqual((self.times[count:], client.stats().dropped), (again, why))

    def test_a_pause_is_that_of_all_senders(self):
        def other_sends(body):
            with mock.patch.object(self, "thread", threading.Thread()):
                self.run_for(0)
            return 502

        self.client(other_sends, (429, b"", {"Retry-After": "60"}), rand=0.0)
        self.log(500)
        self.run_for(60)
        self.assertEqual(self.times, [0, 0, 60, 60])

    def test_flush_and_close_end_a_pause_at_once_and_themselves_in_their_time(self):
        client = self.client(default=(429, b"", {"Retry-After": "60"}))
        self.log()
        self.run_for(2)
        self.assertFalse(client.flush(5))
        self.assertFalse(client.close(4))
        self.assertEqual((self.now, self.times), (11, [0.5, 2, 7]))

    @cases([
        (413, 1, (), 499, set()),
        (400, 250, (7, 120, 249), 49, {"rejected"}),
        (422, 250, range(250), 64, {"rejected", "undecided"}),
    ])  # fmt: skip
    def test_a_bad_batch_is_halved_in_order(self, status, most, bad, requests, why):
        def server(body):
            if len(self.sent) in (4, 5):  # the same part again, not the batch
                return 502
            return status if len(self.sent[-1]) > most or {*bad} & {*self.sent[-1]} else 200

        client = self.client(default=server)
        self.log(250)
        self.assertIs(client.flush(), not why)
        stats = self.assertBalanced(client)
        self.assertEqual((stats.delivered, set(stats.dropped)), (250 - len(bad), why))
        self.assertEqual((stats.retries, self.sent[3]), (2, self.sent[5]))
        self.assertEqual(self.sent, sorted(self.sent, key=min))
        self.assertLessEqual(len(self.sent), requests + 2)

    def test_a_lone_log_waits_for_others_and_a_full_batch_for_nothing(self):
        self.client(batch_size=10)
        for count, seconds in ((1, 0.25), (1, 1), (9, 0.25), (250, 0.5)):
            self.log(count)
            self.run_for(seconds)
        self.assertEqual(self.times, [0.5, 1.5, 2])
        self.assertEqual(self.sent, [[0, 1], [*range(2, 252)], [*range(252, 261)]])

    @cases([(200, 0), (502, 8)])
    def test_a_full_bounded_queue_waits_for_room_then_raises(self, status, seconds):
        self.client(default=status, queue_size=2, timeout=8)
        self.log(2)
        with self.assertRaises(ChirrOpQueueFullError) if seconds else contextlib.nullcontext():
            self.log()
        self.assertEqual(self.now, seconds)

    @cases([(0, False), (4, False), (5, True), (9, True)])
    def test_a_flush_is_true_only_if_all_of_its_own_logs_were_delivered(self, bad, outcome):
        client = self.client(default=lambda body: 400 if bad in self.sent[-1] else 200)
        self.log(5)
        wait = self.delivery._await
        with mock.patch.object(self.delivery, "_await", lambda *args: self.log(5) and wait(*args)):
            self.assertIs(client.flush(), outcome)  # they went with five others

    @cases([401, 503])
    def test_a_flush_does_not_mind_what_comes_after_it(self, status):
        def meanwhile(body):
            self.log(252)
            with mock.patch.object(self, "thread", threading.Thread()):
                self.run_for(0)
            return 200

        client = self.client(meanwhile, status)
        self.log()
        self.assertTrue(client.flush())
        self.assertEqual(self.sent, [[0], [*range(1, 251)]])

    @cases([(503, 1), (502, 3)])
    def test_a_flush_ends_at_an_exhausted_batch_and_tries_a_held_one_once(self, status, count):
        client = self.client(default=status, retries=2)
        self.log(600)
        for extra in range(3):
            self.assertFalse(client.flush())
            self.assertEqual(len(self.sent), count + extra)

    def test_an_attempt_under_way_when_a_flush_begins_does_not_count(self):
        def meanwhile(body):  # another thread begins a flush
            flushes.append(chirrop._Flush(1, self.delivery._begun))
            return 503

        self.client(meanwhile)
        flushes = self.delivery._flushes
        self.log()
        self.run_for(1)
        self.assertIsNone(self.delivery._outcome_of(flushes[0]))


class SenderTest(TestCase):
    @cases([(0.001, 1), (3600.0, 10)])
    def test_a_client_that_sleeps_is_woken_by_one_log_and_by_a_full_batch(self, delay, count):
        client = self.client(batch_size=10, flush_delay=delay)
        self.assertTrue(client.flush())
        for wanted in range(count, 20 * count, count):
            for _ in range(count):
                client.log(Log("a.b", 1))
            eventually(lambda wanted=wanted: client.stats().delivered == wanted)

    def test_a_backlog_has_max_senders_and_one_is_left(self):
        logged, counts = threading.Event(), []

        def server(body):
            logged.wait(LONG)
            counts.append(len(client._delivery._senders))
            return 200

        client = self.client(transport=FakeTransport(default=server), max_senders=3)
        for number in range(5000):
            client.log(Log("a.b", number))
        logged.set()
        self.assertTrue(client.flush(LONG))
        self.assertEqual(max(counts), 3)
        eventually(lambda: len(client._delivery._senders) == 1)

    def with_600_logs(self, default, on_drop):
        transport = FakeTransport(default=default)
        client = self.client(transport=transport, on_drop=on_drop, flush_delay=60)
        for number in range(600):
            client.log(Log("a.b", number))
        transport.seen.get(timeout=LONG)
        return client

    @cases([False, True])
    def test_what_close_drops_is_told_once_before_it_returns_in_its_time(self, stalled):
        gate = threading.Event()
        self.addCleanup(gate.set)
        told, hear = collections.Counter(), lambda logs, error: told.update(ids(logs))
        client = self.with_600_logs((lambda _: gate.wait(LONG) and 200) if stalled else 502, hear)
        with ThreadPoolExecutor(3) as pool:
            outcomes = list(pool.map(client.close, [0.1] * 3, timeout=LONG / 2))
        self.assertEqual((outcomes, len(told)), ([False] * 3, 600))
        gate.set()  # an answer that comes too late
        self.assertNoThreads()
        self.assertEqual(self.assertBalanced(client).dropped, {"closed": 600})
        self.assertEqual((set(told.values()), client.close()), ({1}, False))

    def test_close_waits_for_an_on_drop_that_takes_longer_than_its_time(self):
        begun, told = threading.Event(), []

        def on_drop(logs, error):
            if error.status_code:
                begun.wait(LONG)
                eventually(lambda: client._delivery._stopped)
                closer.join(0.1)  # which does not come back without this thread
            told.append((error.status_code, len(logs), closer.is_alive()))

        client = self.with_600_logs(401, on_drop)
        closer = threading.Thread(target=client.close, args=(0,))
        closer.start()
        begun.set()
        closer.join(LONG)
        self.assertEqual(told, [(401, 250, True), (0, 350, True)])

    def test_a_log_put_while_close_sweeps_or_later_is_dropped_told_and_raises_nothing(self):
        told = []
        client = self.client(on_drop=lambda logs, error: told.extend(logs))
        put, log = client._delivery._put, Log("late", 1)
        client._delivery._put = lambda body: client.close() and put(body)
        client.log(log)
        client.log(log)
        self.assertEqual((told, client.stats().dropped), ([log.to_dict()] * 2, {"closed": 2}))


# ---- Callbacks, log records, memory ---------------------------------------


class RecordTest(ClockTestCase):
    def said(self):
        texts = [f"{record.levelname} {record.getMessage()}" for record in self.records]
        self.records.clear()
        return texts

    def test_the_first_drop_is_said_at_once_then_one_sum_a_minute_and_the_rest_at_close(self):
        client = self.client(default=lambda body: (401, b"no %d" % self.sent[-1][0], {}))
        for _ in range(5):
            self.log()
            client.flush()
            self.now += 20
        client.close()
        text = "ERROR dropped {} (refused){}: HTTP 401: no {}".format
        wanted = [text("1 log", "", 0), text("3 logs", ", the first", 1), text("1 log", "", 4)]
        self.assertEqual(self.said(), wanted)

    @cases([None, "spool"])
    def test_what_is_held_is_said_once_a_minute_and_where_it_waits(self, spool):
        spool = spool and self.folder() / spool
        self.client(default=502, retries=0, spool=spool)
        self.log(3)
        self.run_for(130)
        text = f"WARNING logs are held and sent again; 3 wait in {spool or 'memory'}: HTTP 502"
        self.assertEqual([said[: len(text)] for said in self.said()], [text] * 3)

    @cases([
        (None, "^ERROR dropped 1 log .closed.: not sent before close: HTTP 500"),
        ("spool", "^WARNING logs wait in .*spool for its next client: 1: HTTP 500"),
    ])  # fmt: skip
    def test_a_close_that_fails_says_one_thing_and_counts_no_retry(self, spool, text):
        spool = spool and self.folder() / spool
        client = self.client(default=500, spool=spool)
        self.log()
        self.assertFalse(client.close())
        [said] = self.said()
        self.assertRegex(said, text)
        self.assertEqual((client.stats().retries, len(self.sent)), (0, 1))


class CallbackTest(TestCase):
    @cases(itertools.product(
        ["on_drop", "record"],
        [lambda client: 1 / 0, lambda client: client.log(Log("a", 1)), Client.flush, Client.close],
    ))  # fmt: skip
    def test_what_is_called_back_may_do_anything_and_does_not_feed_itself(self, place, act):
        def callback(*args):
            calls.append((threading.current_thread().name, *args))
            act(client)

        calls = []
        client = self.client(401, on_drop=callback if place == "on_drop" else None)
        if place == "record":
            self.patch(logging.getLogger("chirrop"), "filter", callback)
        client.log(Log("refused", 1))
        client.flush(LONG)
        client.log(Log("fine", 1))
        client.close(LONG)
        stats = self.assertBalanced(client)
        self.assertEqual((stats.dropped["refused"], stats.queued, stats.in_flight), (1, 0, 0))
        self.assertGreaterEqual(stats.delivered, act != Client.close)
        self.assertIn(len(calls), (1, 2, 3))
        self.assertEqual(calls[0][0], "chirrop-sender")

    def test_each_drop_is_said_once_though_a_handler_takes_long(self):
        entered, go = threading.Event(), threading.Event()

        def slow(record):
            said.append(record.getMessage().partition(" (")[0])
            if not entered.is_set():
                entered.set()
                go.wait(LONG)

        said = []
        self.patch(logging.getLogger("chirrop"), "filter", slow)
        client = self.client()
        with ThreadPoolExecutor() as pool:
            pool.submit(client.try_log, "")
            entered.wait(LONG)
            for _ in range(3):
                client.try_log("")
            client.close()
            go.set()
        self.assertEqual(said, ["dropped 1 log", "dropped 3 logs"])

    @refcounted
    def test_in_an_outage_a_log_takes_a_few_hundred_bytes(self):
        import tracemalloc

        client = self.client(transport=lambda *_: (502, b"", {}))
        client.log(Log("warm.up", 1))
        client.flush(0)
        self.addCleanup(tracemalloc.stop)
        tracemalloc.start()
        for _ in range(1000):
            client.log(Log("a.b.count", 1))
        self.assertLess(tracemalloc.get_traced_memory()[0], 1000 * 400)

    @refcounted
    def test_an_error_that_is_kept_keeps_no_frame_and_little_of_a_body(self):
        def transport(*args):
            local = Config(api_key=KEY)
            frames.append(weakref.ref(local))
            raise OSError("down")

        frames = []
        for kind in (transport, FakeTransport(default=(401, b"x" * 10**6, {}))):
            client = self.client(transport=kind, retries=0)
            client.log(Log("a.b", 1))
            self.assertFalse(client.flush(LONG))
            self.assertLessEqual(len(client.stats().last_error.body or ""), 4096)
        self.assertEqual([frame() for frame in frames], [None] * len(frames))


# ---- Simulation -----------------------------------------------------------
# Histories drawn from a seed, over the real delivery and the real spool, with a clock turned by
# hand and no threads: while one request is under way, the next acts happen, as by other threads.
# TEST_SEED=17 python3 -m unittest test_chirrop.SimulationTest runs one history again.


class SimulationTest(ClockTestCase):
    STATUSES = (200, 200, 200, 200, 400, 401, 413, 422, 429, 429, 500, 502, 503, 0, 302, 1200)

    def draw_world(self, seed):
        """Set up what the application, the server, the disk and the clock do in this history."""
        self.draw = random.Random(seed)
        self.now, self.statuses, self.status = 1000.0, self.STATUSES, 200
        self.sender = self.depth = 0  # which thread acts, 0 is the application's; acts within acts
        self.threads = [threading.Thread() for _ in range(12)]  # 3 senders, 9 callers
        self.accepted, self.delivered, self.told = set(), set(), collections.Counter()
        self.closed = []
        self.bad, self.crashed = set(), set()  # ids that the server rejects; lost clients
        self.path = self.folder() / "spool" if self.draw.random() < 0.4 else None
        self.config = Config(
            api_key=KEY,
            retries=self.draw.randrange(4),
            batch_size=self.draw.choice((1, 3, 10, 250)),
            flush_delay=self.draw.choice((0, 0.5, 5)),
            queue_size=self.draw.choice((0, 0, 0, 20)),
            on_exhausted=self.draw.choice(("keep", "keep", "drop")),
            on_drop=self.heard,
        )
        self.open()

    def current_thread(self):
        return self.threads[self.sender - 1 if self.sender else 3 + self.depth]

    # What the delivery sees.

    def send(self, body, timeout):
        """Answer a request; meanwhile others act."""
        logs = ids(json.loads(body))
        self.assertLessEqual(len(logs), 250)
        delivery = self.delivery
        for _ in range(self.draw.randrange(3) if self.depth < 3 else 0):
            with mock.patch.multiple(self, depth=self.depth + 1, sender=self.sender):
                self.act()
        if delivery in self.crashed:  # meanwhile: nobody reads the answer
            raise SystemExit
        status = self.status if self.draw.random() < 0.7 else self.draw.choice(self.statuses)
        is_good = self.bad.isdisjoint(logs)
        if status in (200, 400, 422) or (status == 413 and len(logs) <= 2):
            status = 200 if is_good else 400
        # At 0 it may be taken, though the answer is lost.
        if status in (200, 0) and is_good and (status or self.draw.random() < 0.5):
            self.delivered.update(logs)
        if status == 0:
            return chirrop._Answer(0, cause=TimeoutError("timed out"))
        if status == 1200:
            return chirrop._Answer(200, b"<html>portal")
        headers = {"retry-after": str(self.draw.choice((0, 1, 40)))} if status == 429 else {}
        return chirrop._Answer(status, b"", headers)

    def heard(self, logs, error):
        self.told.update(ids(logs))
        if self.draw.random() < 0.05 and self.depth < 8:
            self.put(1)
        if self.draw.random() < 0.1:
            self.delivery.flush(0)
        if self.draw.random() < 0.1:
            raise ValueError("on_drop's own")

    # What happens.

    def open(self):
        spool = self.path and SqliteSpool(self.path)
        buffer = chirrop._SpoolBuffer(spool) if spool else chirrop._MemoryBuffer()
        self.delivery = chirrop._Delivery(buffer, self.send, self.config, lambda: None)
        self.delivery._rand = self.draw.random
        self.delivery._start_locked = lambda: bool(self.delivery._senders)

    def put(self, count):
        for _ in range(count):
            log = Log("a.b", self.draw.random())
            if self.draw.random() < 0.1:
                self.bad.add(log.log_id)
            with mock.patch.object(self, "sender", 0), contextlib.suppress(SystemExit):
                try:
                    self.delivery.put(log._body)
                    self.accepted.add(log.log_id)
                except ChirrOpQueueFullError:
                    self.assertTrue(self.config.queue_size)

    def step(self):
        """Let one of three senders, or a caller that helps, do its next task."""
        self.sender = self.draw.randrange(4)
        self.delivery._senders = self.threads[: self.sender]
        busy = [batch.sender for batch in self.delivery._batches if batch.under_way]
        if self.sender and self.current_thread() in busy:
            return
        with self.delivery._lock:
            task, moment = self.delivery._task_locked(math.inf)
        if task:
            with contextlib.suppress(SystemExit):
                task()
        elif self.draw.random() < 0.5 and moment < math.inf:
            self.now = max(self.now, moment)

    def act(self):
        kind = self.draw.random()
        if kind < 0.35:
            self.put(self.draw.choice((1, 1, 2, 7, 30)))
        elif kind < 0.80:
            self.step()
        elif kind < 0.88:
            self.now += self.draw.choice((0.01, 1, 10, 400))
        elif kind < 0.94:
            self.status = self.draw.choice(self.statuses)
        elif kind < 0.97:
            self.sender = 0
            self.delivery.flush(0)
        elif kind < 0.985:
            self.restart()
        self.balance()

    def restart(self):
        """Close the client, or lose it to a crash; the next one takes over its spool."""
        self.sender, self.delivery._senders = 0, []
        if self.path and self.draw.random() < 0.5:
            file = self.delivery._buffer._file
            if file:
                chirrop._held_files.discard(file.key)
                file.conn.close()
            chirrop._open.discard(self.delivery)
            self.crashed.add(self.delivery)
        else:
            self.delivery.close(0)
            self.closed.append(self.delivery)
            self.balance()
        self.open()

    def balance(self):
        stats = self.assertBalanced(self.delivery)
        self.assertGreaterEqual(min(stats.queued, stats.in_flight), 0, stats)

    def live(self, seed):
        self.draw_world(seed)
        for _ in range(self.draw.randrange(20, 80)):
            self.act()
        self.status, self.statuses = 200, (200,)
        self.sender, self.depth = 0, 8  # nobody else acts any more; callers help
        self.delivery._senders = []
        for _ in range(40):  # a spool's left-overs are looked for by flush
            self.now += 400
            self.delivery.flush(4)
        self.assertEqual(self.delivery.stats()[3:5], (0, 0))
        for delivery in [*self.closed, self.delivery]:
            delivery.close(0)  # again: what on_drop itself dropped is told with the next
        self.assertEqual(self.accepted - self.delivered - set(self.told), set(), "unaccounted")
        self.assertEqual({*self.told.values()} - {1}, set(), "told twice")

    def test_every_log_of_a_random_history_is_delivered_or_told_once_or_held(self):
        self.addCleanup(chirrop._open.clear)  # what a failure leaves
        seed = os.environ.get("TEST_SEED")
        for number in [int(seed)] if seed else range(rounds(60, 2000)):
            with self.subTest(TEST_SEED=number):
                self.live(number)


# ---- Spool ----------------------------------------------------------------

HAS_FORK = hasattr(os, "fork")

# What programs in processes of their own begin with; argv is the server's URL and a spool's path.
# `say` makes one write, so what was said before a kill is whole.
PRELUDE = """
import gc, logging, os, random, signal, sys, threading, time, warnings
warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
logging.getLogger("chirrop").addHandler(logging.NullHandler())
if hasattr(signal, "alarm"):
    signal.alarm(60)  # ends what hangs
import chirrop
from chirrop import Log, new_client

def client(**fields):
    fields = {"api_key": "chp_test", "api_endpoint": sys.argv[1], "flush_delay": 0, **fields}
    return new_client(**fields)

def down(method, url, body, headers, timeout):
    raise ConnectionError("down")

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def log(client, count=1):
    for _ in range(count):
        entry = Log("test", 1)
        client.log(entry)
        say(entry.log_id)

def fork(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as exc:
            say("child:", repr(exc))
            os._exit(1)
        os._exit(0)
    return pid

def reap(*pids):
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
"""


class ProcessTestCase(ServerTestCase):
    def begin_program(self, code, *args, status=0, stderr="", **options):
        """Begin PRELUDE and code; return a function that waits for its end and returns its words.

        The function's `next()` is the next line as the program says it, and `process` its Popen.
        """
        end = self.begin_python(PRELUDE + code, *args, **options)
        process = end.process

        def words():
            said = process.stdout.read()  # and what next() has read too much
            done = end()
            self.assertEqual(done.returncode, status, done.stderr + said)
            if stderr is not None:
                self.assertEqual(done.stderr, stderr)
            return said.split()

        words.process = process
        words.next = lambda: process.stdout.readline().strip() or self.fail(words())
        return words

    def run_program(self, code, *args, **options):
        return self.begin_program(code, *args, **options)()

    def spool(self):
        return self.folder() / "events.spool"

    def on(self, path, *answers, **fields):
        """Return a client on a spool (or path) that sends nothing before it is told to."""
        client = self.client(*answers, spool=path, **{"flush_delay": 60, **fields})
        client._delivery._rand = lambda: 1.0  # seconds from one attempt to the next
        return client

    def left(self, count=3, path=None):
        """Return the path of a closed spool that holds `count` logs, and their ids."""
        path = path or self.spool()
        entries = [Log("left.over", n) for n in range(count)]
        client = self.on(path, transport=FakeTransport(default=OSError("down")))
        for entry in entries:
            client.log(entry)
        self.assertFalse(client.close(0))
        return path, [entry.log_id for entry in entries]

    def drain(self, path):
        """Send all that a spool holds, as a later run does; return the ids."""
        transport = FakeTransport()
        client = self.on(path, transport=transport, max_senders=1)  # so that order can be seen
        self.assertTrue(client.flush(LONG), client.stats())
        self.assertTrue(client.close(LONG))
        return ids(transport.logs())

    def names(self, path):
        return sorted(os.listdir(path.parent))

    def said(self, text):
        return [r for r in self.records if r.levelno >= logging.WARNING and text in r.getMessage()]

    def assertOnce(self, logged, server=None, path=None):
        """Each log was sent to the server, or is sent now from the spool, once."""
        sent = ids(server.logs()) if server else []
        self.assertEqual(sorted(sent + (self.drain(path) if path else [])), sorted(logged))


class SpoolTest(ProcessTestCase):
    def test_what_a_kill_and_a_close_left_is_sent_by_the_next_client_in_order(self):
        path = self.spool()
        code = "log(client(spool=sys.argv[2], transport=down), 1200); os.kill(os.getpid(), 9)"
        logged = self.run_program(code, "http://x", path, status=-9)
        logged += self.left(600, path)[1]  # goes behind what waits there
        self.assertEqual(self.names(path), [path.name])
        self.assertTrue(self.drain(path) == logged)
        self.assertEqual(self.drain(path), [])
        self.assertEqual(self.names(path), [path.name])

    @unittest.skipUnless(HAS_FORK, "no fork here")
    def test_processes_on_one_spool_send_each_log_once_and_lose_none_by_kills(self):
        code = """
count, kills = map(int, sys.argv[3:])
rng, (ready, begun), pids = random.Random(count), os.pipe(), []

def work():
    c = client(spool=sys.argv[2], batch_size=25)
    log(c, 25)
    os.write(begun, b".")
    while kills:
        log(c)
        time.sleep(0.001)  # a rate
    assert c.close(20), c.stats()

def begin():
    pids.append(fork(work))
    os.read(ready, 1)

for _ in range(count):
    begin()
for number in range(kills and kills + count):
    time.sleep(rng.random() * 0.03)  # a random moment to kill at
    victim = pids.pop(rng.randrange(len(pids)))
    os.kill(victim, 9)
    os.waitpid(victim, 0)
    if number < kills:
        begin()
reap(*pids)
"""
        count = rounds(3, 8)
        for kills in rounds((5,), (50, 0)):
            server, path = self.server(), self.spool()
            logged = self.run_program(code, server.url, path, count, kills)
            arrived = ids(server.logs()) + self.drain(path)
            self.assertGreaterEqual(len(logged), 25 * (count + kills))
            self.assertEqual(len(set(logged) - set(arrived)), 0, "lost")
            self.assertLessEqual(len(set(arrived) - set(logged)), kills and kills + count)
            if not kills:
                self.assertEqual(len(arrived), len(logged))
            self.assertEqual(self.names(path), [path.name])

    def test_files_of_a_live_process_are_left_alone_and_taken_over_when_that_is_dead(self):
        path, transport = self.spool(), FakeTransport()
        code = "log(client(spool=sys.argv[2], transport=down), 3); signal.pause()"
        holder = self.begin_program(code, "http://x", path, status=-9)
        held = [holder.next() for _ in range(3)]
        client = self.on(path, transport=transport, flush_delay=0)
        self.assertTrue(client.flush(LONG))
        self.assertEqual(transport.requests, [])
        holder.process.kill()
        holder()
        self.assertTrue(client.flush(LONG))  # looks at once
        self.assertEqual(ids(transport.logs()), held)
        held += self.left(2, path)[1]
        self.patch(chirrop, "time", mock.Mock(wraps=time, monotonic=lambda: time.monotonic() + 9))
        client.log(Log("own", 1))  # when idle it looks every few seconds
        eventually(lambda: len(transport.logs()) == 6)
        self.assertLessEqual(set(held), set(ids(transport.logs())))
        self.assertTrue(client.close(LONG))
        self.assertEqual(self.names(path), [path.name])

    def test_clients_of_one_process_have_a_file_each_which_nothing_unlocks(self):
        """Closing any descriptor of a file takes the process's locks on it away."""
        path, transport = self.spool(), FakeTransport()
        clients = [self.on(path, 400, transport=transport) for _ in range(3)]
        entries = [Log("x", number) for number in range(30)]
        for number, entry in enumerate(entries):
            clients[number % 3].log(entry)
        SqliteSpool(path).dead_letters()
        self.assertTrue(self.on(path).close(LONG))
        code = "c = client(spool=sys.argv[2]); assert c.flush(20) and c.close(20)"
        server = self.server()
        self.run_program(code, server.url, path)
        self.assertEqual(server.requests, [])
        for client in clients:
            self.assertTrue(client.close(LONG))
        self.assertEqual(sorted(ids(transport.logs())), sorted(e.log_id for e in entries))
        self.assertEqual(self.names(path), [path.name])

    def test_files_have_mode_0600_hold_no_key_and_appear_with_the_first_log(self):
        path = self.spool()
        client = self.on(path, 400, api_key="chp_canary")
        self.assertEqual(self.names(path), [])
        for number in range(2):
            client.log(Log("x", number))
            client.flush(0 if number else LONG)
        files = [path.with_name(name) for name in self.names(path)]
        self.assertIn(f"{path.name}.dead.jsonl", self.names(path))
        self.assertEqual({stat.S_IMODE(file.stat().st_mode) for file in files}, {0o600})
        self.assertFalse([file for file in files if b"canary" in file.read_bytes()])

    def test_without_sqlite3_only_a_spool_fails(self):
        with mock.patch.dict(sys.modules, {"sqlite3": None}), self.assertRaises(ImportError):
            SqliteSpool("x")

    @cases([(400, {}), (403, {"on_exhausted": "drop"})])
    def test_dead_letters_are_lines_of_a_file_and_taken_away_when_asked(self, status, fields):
        path, entry = self.spool(), Log("bad", 1)
        client = self.on(path, (status, b"no such unit", {}), **fields)
        client.log(entry)
        self.assertFalse(client.flush(LONG))
        client.log(Log("waits", 1))
        dead = path.with_name(path.name + ".dead.jsonl")
        with open(dead, "ab") as file:
            file.write(b'\n{"error": "cut short by a full d')
        lines = [json.loads(line) for line in dead.read_text().splitlines() if line.endswith("}")]
        self.assertEqual([line["log"] for line in lines], [entry.to_dict()])
        self.assertIn("no such unit", lines[0]["error"])
        spool = SqliteSpool(path)
        self.assertEqual((spool.dead_letters(), client.stats().queued), (lines, 1))
        self.assertEqual(spool.dead_letters(remove=True), lines)
        self.assertEqual((spool.dead_letters(remove=True), dead.exists()), ([], False))


class SpoolTroubleTest(ProcessTestCase):
    """Files that cannot be used, are full, damaged or somebody else's."""

    def assertGoesOn(self, path):
        """Log through a spool that has trouble: delivered, with one warning."""
        self.records.clear()
        client = self.on(path)
        for number in range(5):
            client.log(Log("x", number))
        self.assertTrue(client.close(LONG))
        self.assertEqual(self.assertBalanced(client).delivered, 5)
        self.assertEqual(len(self.said("spool")), 1, [r.getMessage() for r in self.records])

    def database(self, path, pragma="application_id = 7"):
        with contextlib.closing(sqlite3.connect(path)) as conn:
            conn.executescript(f"CREATE TABLE logs (id INTEGER PRIMARY KEY); PRAGMA {pragma}")

    def newer(self, path):
        self.database(path, "application_id = 1130910320; PRAGMA user_version = 99")

    def other_users(self, path):
        os.replace(self.left(1)[0], path)
        os.chown(path, 65534, 65534)

    FOREIGN = {
        "text": lambda self, path: path.write_text("these are my notes\n" * 100),
        "short text": lambda self, path: path.write_text("notes"),
        "folder": lambda self, path: path.mkdir(),
        "pipe": lambda self, path: os.mkfifo(path),
        "device": lambda self, path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
        "link": lambda self, path: path.symlink_to(self.left()[0]),
        "database": database,
        "newer": newer,
        "other user's": other_users,
    }

    @unittest.skipUnless(os.name == "posix", "no such files here")
    @cases(list(FOREIGN))
    def test_what_is_no_spool_is_left_byte_for_byte_and_refused_in_one_error(self, kind):
        if kind in ("device", "other user's") and os.geteuid() != 0:
            self.skipTest("only root makes such files")
        path = self.spool()
        self.FOREIGN[kind](self, path)

        def state():
            info = path.lstat()
            data = path.read_bytes() if stat.S_ISREG(info.st_mode) else b""
            return self.names(path), info.st_mode, info.st_uid, info.st_mtime_ns, data

        before = state()
        with self.assertRaisesRegex(ChirrOpError, f"spool: .*{path.name}") as caught:
            self.on(SqliteSpool(path, required=True))
        self.assertEqual("newer version" in str(caught.exception), kind == "newer")
        self.assertGoesOn(path)
        self.assertEqual(state(), before)

    @cases(["missing", "/sys/kernel"])
    def test_a_folder_that_is_not_there_or_read_only_leaves_logs_in_memory(self, folder):
        path = self.folder() / folder / "x.spool"
        self.assertGoesOn(path)
        with self.assertRaisesRegex(ChirrOpError, folder):
            self.on(SqliteSpool(path, required=True))

    def test_side_files_without_their_file_are_no_obstacle(self):
        path = self.spool()
        for suffix in ("-wal", "-shm", "-journal", "-lock"):
            pathlib.Path(f"{path}{suffix}").write_bytes(b"\x37\x7f\x06\x82left by another" * 40)
        _, logged = self.left(2, path)
        self.assertEqual(self.drain(path), logged)

    def test_max_bytes_bounds_the_file_and_that_of_dead_letters_and_prunes_nothing(self):
        path, accepted, dropped = self.spool(), [], []
        spool, refusals = SqliteSpool(path, max_bytes=64 * 1024), [(400, b"bad" * 99, {})] * 200
        fields = {"on_drop": lambda logs, error: dropped.extend(logs), "batch_size": 10**6}
        client = self.on(spool, *refusals, max_senders=1, **fields)
        with self.assertRaisesRegex(ChirrOpQueueFullError, "spool is full"):
            for number in range(1000):
                client.log(Log("x", number, meta="m" * 500))
                accepted.append(number)
        self.assertGreater(len(accepted), 40)
        self.assertFalse(client.flush(LONG))
        client.log(Log("room.again", len(accepted)))
        client.close(LONG)
        self.assertEqual([log["value"] for log in dropped], [*accepted, len(accepted)])
        kept = [letter["log"] for letter in spool.dead_letters()]
        self.assertTrue(0 < len(kept) < len(accepted), len(kept))  # others are only reported
        self.assertEqual([log for log in kept if log not in dropped], [])
        for name in self.names(path):
            self.assertLessEqual(path.with_name(name).stat().st_size, 64 * 1024)
        self.assertEqual(self.said("spool"), [])

    @unittest.skipUnless(hasattr(signal, "SIGXFSZ"), "no limit of file sizes here")
    def test_on_a_full_disk_logs_wait_in_memory_and_are_back_in_the_file_in_order(self):
        code = """
import resource
logging.basicConfig(format="W:%(message)s", stream=sys.stdout)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
chirrop.SPOOL_RETRY_SECONDS = 0.05
def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
fields = {"spool": sys.argv[2], "transport": down, "flush_delay": 60, "batch_size": 10**6}
limit(0)
c = client(**fields)
c.log(Log("test", 0))
assert not os.listdir(os.path.dirname(sys.argv[2])), "an empty file was left behind"
c.close(0)
limit(60000)
c = client(**fields)
log(c, 200)
limit(resource.RLIM_INFINITY)
log(c, 10)
assert not c.close(0), c.stats()
assert c.stats().queued == 210, c.stats()
"""
        path = self.spool()
        said = self.run_program(code, "http://x", path)
        logged = [word for word in said if word.count("-") == 4]
        self.assertEqual(len(logged), 210)
        self.assertEqual(self.drain(path), logged)
        self.assertTrue([word for word in said if word.startswith("W:spool")])

    def test_cut_off_anywhere_it_starts_keeps_the_file_and_goes_on(self):
        data = self.left(40)[0].read_bytes()
        places = {0, 1, 15, 16, 17, 69, 99, 100, 511, len(data) - 1}
        places |= {n + d for n in range(2048, len(data), 2048) for d in (-1, 0, 1)}
        for place in sorted(places)[:: rounds(3, 1)]:
            with self.subTest(place):
                path, entry = self.spool(), Log("new", 1)
                path.write_bytes(data[:place])
                client = self.on(path)
                client.log(entry)
                client.close(LONG)
                stats = self.assertBalanced(client)
                self.assertEqual(stats.queued + stats.in_flight, 0)
                kept = [name for name in self.names(path) if ".damaged-" in name]
                bodies = [request[2] for request in client._link._transport.requests]
                is_sent = entry.log_id.encode() in b"".join(bodies)  # that of a cut row is no JSON
                self.assertTrue(is_sent or (kept and stats.dropped.get("damaged")), stats)
                if kept:
                    self.assertTrue(self.said("damaged"))
                    self.assertEqual(self.drain(path), [])  # a new file is in its place

    @cases([("flush", LONG, 0), ("close", 0, 250)])
    def test_damaged_while_it_is_open_what_it_held_is_counted(self, ending, timeout, held):
        path, dropped = self.spool(), []
        client = self.on(path, on_drop=lambda logs, error: dropped.extend(logs), batch_size=10**6)
        for number in range(1200):  # more than SQLite keeps in its cache
            client.log(Log("x", number, meta="m" * 1000))
        client._link._transport.default = 503
        if held:
            self.assertFalse(client.flush(LONG))  # a batch is out of the file's queue from now on
        for name in self.names(path):
            with open(path.with_name(name), "r+b") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(2048)  # all but the first page
                file.write(b"\x55" * (size - 2048))
        self.assertFalse(getattr(client, ending)(timeout))
        client.close(LONG)
        stats = self.assertBalanced(client)
        self.assertEqual((sum(stats.dropped.values()), len(dropped), stats.queued), (1200, 1200, 0))
        self.assertEqual(stats.dropped["damaged"], 1200 - held)
        self.assertEqual(len([n for n in self.names(path) if ".damaged-" in n]), 1)

    def test_a_damaged_left_over_is_moved_aside_and_the_own_file_is_not(self):
        path, _ = self.left(300)
        data = bytearray(path.read_bytes())
        leaf = next(at for at in range(2 * 2048, len(data), 2048) if data[at] == 13)
        data[leaf] = 99  # no kind of page
        path.unlink()
        path.with_name(path.name + ".2").write_bytes(data)
        self.assertGoesOn(path)
        names = [name.rpartition("-")[0] for name in self.names(path) if name != path.name]
        self.assertEqual(names, [f"{path.name}.2.damaged"])


# ---- Exit, fork, signals --------------------------------------------------


class ExitTest(ProcessTestCase):
    def test_exit_without_close_delivers_whatever_ends_the_program_and_keeps_its_status(self):
        begun, endings = [], {"pass": 0, "sys.exit(3)": 3, "raise RuntimeError('app')": 1}
        for ending, status in endings.items():
            server, code = self.server(), f"log(client(flush_delay=60), 300)\n{ending}"
            words = self.begin_program(code, server.url, status=status, stderr=None)
            begun.append((server, words))
        for server, words in begun:
            self.assertOnce(words(), server)

    def test_clients_on_a_dead_server_take_one_exit_timeout_and_tell_what_is_not_spooled(self):
        code = """
logging.basicConfig(stream=sys.stdout, format="%(message)s")
tell = lambda logs, error: say(*["told:" + log["log_id"] for log in logs])
fields = {"transport": lambda *_: time.sleep(60), "exit_timeout": 0.25, "on_drop": tell}
clients = [client(spool=spool, **fields) for spool in [sys.argv[2]] + [None] * 19]
for c in clients:
    log(c)
"""
        path = self.spool()
        words = self.begin_program(code, "http://x", path)
        kept, started = words.next(), time.monotonic()
        said = words()
        self.assertLess(time.monotonic() - started, 19 * 0.25)
        logged = {word for word in said if word.count("-") == 4 and ":" not in word}
        self.assertEqual({f"told:{log_id}" for log_id in logged} - set(said), set())
        self.assertEqual(said.count("dropped"), 19)
        self.assertEqual(self.drain(path), [kept])

    def test_os_exit_and_sigterm_lose_only_what_was_neither_flushed_nor_spooled(self):
        server, path = self.server(), self.spool()
        code = """
c, lost = client(flush_delay=60), client(transport=down)
kept = client(spool=sys.argv[2], transport=down)
log(c, 3)
assert c.flush(20)
lost.log(Log("lost", 1))
log(kept, 3)
exec(sys.argv[3])
"""
        kill = "os.kill(os.getpid(), signal.SIGTERM); signal.pause()"
        logged = self.run_program(code, server.url, path, "os._exit(0)")
        logged += self.run_program(code, server.url, path, kill, status=-signal.SIGTERM)
        self.assertOnce(logged, server, path)

    def test_where_no_thread_can_be_had_flush_close_and_exit_send_in_their_own_thread(self):
        server = self.server()
        code = """
def refuse(self):
    raise RuntimeError("can't start new thread")
threading.Thread.start = refuse
for ending in "assert c.flush(20)", "assert c.close(20)", "":
    for spool in None, sys.argv[2]:
        c = client(spool=spool)
        log(c, 100)
        exec(ending)
"""
        logged = self.run_program(code, server.url, self.spool())
        self.assertEqual(len(logged), 600)
        self.assertOnce(logged, server)

    def test_a_flush_without_a_thread_survives_ctrl_c_and_a_later_log_gets_its_thread(self):
        clock = self.patch(chirrop, "time", mock.Mock(wraps=time))
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("too many")):
            client = self.client(KeyboardInterrupt, flush_delay=0)
            client.log(Log("x", 1))
            with self.assertRaises(KeyboardInterrupt):
                client.flush(LONG)
        self.assertEqual(self.assertBalanced(client).queued, 1)
        clock.monotonic = lambda: time.monotonic() + 2.0
        client.log(Log("x", 2))
        eventually(lambda: client.stats().delivered == 2)

    @refcounted
    def test_clients_dropped_without_close_send_and_leave_no_thread_or_descriptor(self):
        code = f"""
def descriptors():
    gc.collect()
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

def settle():
    while any(thread.name.startswith("chirrop-") for thread in threading.enumerate()):
        time.sleep(0.001)

for number in range({rounds(16, 400)}):
    c = client(spool=sys.argv[2] if number % 2 else None)
    log(c) if number % 8 > 1 else c.flush(25)
    del c
    if number in (3, {rounds(15, 399)}):
        settle()
        before = descriptors() if number == 3 else before
assert descriptors() == before, (before, descriptors())
"""
        server, path = self.server(), self.spool()
        self.assertOnce(self.run_program(code, server.url, path), server)
        self.assertEqual(self.names(path), [path.name])


@unittest.skipUnless(HAS_FORK, "this platform does not fork")
class ForkTest(ProcessTestCase):
    def test_a_fork_with_queued_logs_sends_each_once_and_the_child_starts_empty(self):
        code = """
clients = client(), client(spool=sys.argv[2])
for c in clients:
    log(c)
while not all(c.stats().in_flight for c in clients):
    time.sleep(0.001)
def child():
    for c in clients:
        assert c.stats()[:6] == (0, 0, {}, 0, 0, 0), c.stats()
        log(c)
    assert os.path.exists(sys.argv[2] + ".2")
    assert all([c.flush(20) and c.close(20) for c in clients])
for c in clients:
    log(c, 50)
pid = fork(child)
say("forked")
reap(pid)
assert all([c.close(20) for c in clients])
"""
        gate, path = threading.Event(), self.spool()
        self.addCleanup(gate.set)
        server = self.server(default=lambda *_: gate.wait(LONG) and answer())
        words = self.begin_program(code, server.url, path)
        logged = list(iter(words.next, "forked"))
        gate.set()
        logged += words()
        self.assertEqual(len(logged), 104)
        self.assertOnce(logged, server)
        self.assertEqual(self.names(path), [path.name])

    def test_a_child_takes_nothing_from_the_parents_spool_and_outlives_it(self):
        """A connection that a child's interpreter closed would delete the parent's -wal."""
        code = """
c = client(spool=sys.argv[2], transport=down, exit_timeout=0.1, flush_delay=60)
log(c, 3)
for count in 0, 1:
    if os.fork() == 0:
        log(c, count)
        sys.exit(0)
    os.wait()
    log(c, 3)
ready, closed = os.pipe(), os.pipe()
def worker():
    log(c)
    os.write(ready[1], b".")
    os.read(closed[0], 1)
    log(c, 20)
    os.kill(os.getpid(), 9)
for _ in range(2):
    fork(worker)
    os.read(ready[0], 1)
if sys.argv[3]:
    c.close(0)
os.write(closed[1], b"..")
os.kill(os.getpid(), 9)
"""
        begun = []
        for closed in "", "closed":
            path = self.spool()
            begun.append((path, self.begin_program(code, "http://x", path, closed, status=-9)))
        for path, words in begun:
            logged = words()  # when all have ended
            self.assertEqual(len(logged), 52)
            self.assertOnce(logged, path=path)

    def test_forks_while_threads_log_send_each_log_once(self):
        code = """
clients, stop = [client(), client(spool=sys.argv[2])], threading.Event()
def work(c):
    while not stop.wait(0.001):         # a rate, not a synchronisation
        log(c)
threads = [threading.Thread(target=work, args=[c], daemon=True) for c in clients * 2]
for t in threads: t.start()
def child():
    for c in clients:
        log(c)
        assert c.close(20), c.stats()
for _ in range(int(sys.argv[3])):
    reap(*[fork(child) for _ in range(4)])
stop.set()
for t in threads: t.join()
assert all([c.close(20) for c in clients])
"""
        server = self.server()
        self.assertOnce(self.run_program(code, server.url, self.spool(), rounds(1, 20)), server)

    def test_no_connection_carries_requests_of_two_processes(self):
        server = self.server()
        code = """
c = client()
def send():
    log(c)
    assert c.flush(20)
send()
reap(fork(send))
send()
"""
        self.assertOnce(self.run_program(code, server.url), server)
        self.assertEqual(server.on(), [0, 1, 0])

    def test_children_of_multiprocessing_deliver_without_flush_or_close(self):
        code = """
import multiprocessing, sys
import chirrop
client = chirrop.new_client(api_key="chp_test", api_endpoint=sys.argv[1], flush_delay=60)
def child(_=0):
    client.log(chirrop.Log("child", 1))
if __name__ == "__main__":
    client.log(chirrop.Log("parent", 1))
    context = multiprocessing.get_context(sys.argv[2])
    worker = context.Process(target=child)
    worker.start()
    worker.join(25)
    assert worker.exitcode == 0, worker
    with context.Pool(1) as pool:
        pool.map(child, range(2))
        pool.close()
        pool.join()
"""
        begun, file = [], self.folder() / "program.py"
        file.write_text(code)
        for method in multiprocessing.get_all_start_methods()[: rounds(2, 3)]:
            server = self.server()
            command = [sys.executable, "-W", "ignore", file, server.url, method]
            environment = {**os.environ, "PYTHONPATH": str(HERE)}
            begun.append((server, self.begin(command, env=environment)))
        for server, end in begun:
            done, sent = end(), ids(server.logs())
            self.assertEqual((done.returncode, done.stderr), (0, ""), done.args)
            self.assertEqual((len(sent), len(set(sent))), (4, 4), done.args)


class HandlerTest(ProcessTestCase):
    """A signal handler, or a finaliser, that calls the client it has interrupted."""

    def interrupted(self, call, **fields):
        """Return a client with two logs whose lock is interrupted once, and answers of `call`."""
        client, answers, number = self.client(**{"flush_delay": 60, **fields}), [], signal.SIGINT
        for value in range(2):
            client.log(Log("before", value))
        self.addCleanup(signal.signal, number, signal.getsignal(number))
        signal.signal(number, lambda *_: answers.append(call(client)))
        lock, armed = client._delivery._lock, [number]

        class Lock:
            def __enter__(self):
                lock.acquire()
                if armed and threading.current_thread() is threading.main_thread():
                    signal.raise_signal(armed.pop())

            def __exit__(self, *_):
                lock.release()

        client._delivery._lock = Lock()
        self.addCleanup(setattr, client._delivery, "_lock", lock)
        return client, answers

    def kinds(self):
        return {}, {"queue_size": 100}, {"spool": self.spool()}

    def test_a_log_within_the_lock_is_taken_at_once(self):
        for interrupt in (Client.flush, Client.stats, lambda client: client.log(Log("x", 1))):
            for fields in self.kinds():
                client, answers = self.interrupted(lambda c: c.try_log("within"), **fields)
                interrupt(client)
                self.assertTrue(client.close(LONG))
                self.assertEqual(answers, [True])
                logs = client._link._transport.logs()
                self.assertEqual([log["event"] for log in logs].count("within"), 1)
                self.assertEqual(self.assertBalanced(client).delivered, len(logs))

    def test_flush_and_close_within_the_lock_return_at_once_and_no_log_is_lost(self):
        for call in (Client.flush, Client.close):
            for fields in self.kinds():
                client, answers = self.interrupted(call, **fields)
                client.flush(LONG)
                client.close(LONG)
                stats = self.assertBalanced(client)
                self.assertEqual((answers, stats.accepted, stats.in_flight), ([False], 2, 0))
                left = self.drain(fields["spool"]) if "spool" in fields else []
                lost = stats.dropped.get("closed", 0)
                self.assertEqual(stats.delivered + len(left) + lost, 2)
                self.assertFalse(lost and "spool" in fields)

    def test_a_log_within_the_lock_of_a_full_queue_fails_instead_of_waiting_for_itself(self):
        gate = threading.Event()
        transport = FakeTransport(default=lambda body: gate.wait(LONG) and 200)
        fields = {"queue_size": 2, "timeout": 3600, "transport": transport}
        client, answers = self.interrupted(lambda c: c.try_log("within"), **fields)
        client.stats()
        self.assertEqual((answers, client.stats().dropped), ([False], {"full": 1}))
        gate.set()

    def test_a_handler_of_sigterm_that_closes_and_exits_delivers(self):
        code = """
tell = lambda logs, error: say(*["!" + log["log_id"] for log in logs])
clients = client(on_drop=tell), client(spool=sys.argv[2], on_drop=tell)
def stop(*_):
    for c in clients:
        c.close(20)
    sys.exit(5)
signal.signal(signal.SIGTERM, stop)
while True:
    for c in clients:
        log(c)
"""
        server, path = self.server(), self.spool()
        words = self.begin_program(code, server.url, path, status=5)
        logged = [words.next() for _ in range(100)]
        words.process.terminate()
        logged += words()
        known = {word[1:] for word in logged if word[0] == "!"} | set(self.drain(path))
        known.update(ids(server.logs()))
        self.assertEqual({word for word in logged if word[0] != "!"} - known, set())


# ---- Real signals ---------------------------------------------------------


@unittest.skipUnless(hasattr(signal, "setitimer"), "no timers here")
@unittest.skipIf(sys.version_info < (3, 10), "3.9 can lose a lock between `with` and __exit__")
@unittest.skipIf("coverage" in sys.modules, "a signal in its tracer leaves its lock locked")
class RealSignalTest(ProcessTestCase):
    """Ctrl-C, and the TimeoutError of a task's time limit; whatever it hits, the client goes on."""

    @cases(itertools.product(("log", "flush", "close"), ("memory", "bounded", "spool")))
    def test_exceptions_at_random_moments_reach_the_caller_and_lose_no_log(self, job, kind):
        caught = warnings.catch_warnings()
        caught.__enter__()
        self.addCleanup(caught.__exit__, None, None, None)
        warnings.simplefilter("ignore", ResourceWarning)  # of a file that was just being opened
        rng, transport = random.Random(f"{job} {kind}"), FakeTransport()
        returned, dropped, clients, strikes, seen = set(), set(), [], [], []
        fields = {
            "transport": transport,
            "on_drop": lambda logs, error: dropped.update(ids(logs)),
            "flush_delay": 0,
            "queue_size": 500 if kind == "bounded" else 0,
            "spool": self.spool() if kind == "spool" else None,
        }
        end = time.monotonic() + rounds(0.05, 5)

        def new():
            clients.append(self.client(**fields))
            # It has its thread: CPython's Thread.start() can answer a signal by a KeyError.
            clients[-1].log(Log("first", 1))
            clients[-1].flush(LONG)

        def strike(*_):
            strikes.append(rng.choice((TimeoutError, KeyboardInterrupt)))
            raise strikes[-1]

        def work(client):
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 2e-3))
            for number in range(20):
                entry = Log("x", number)
                client.log(entry)
                returned.add(entry.log_id)
                if job == "flush":
                    client.flush(LONG)
            if job == "close":
                client.close(LONG)

        self.addCleanup(signal.signal, signal.SIGALRM, signal.signal(signal.SIGALRM, strike))
        new()
        while time.monotonic() < end or len(seen) < 10:
            try:
                try:
                    work(clients[-1])
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except (TimeoutError, KeyboardInterrupt) as exc:
                seen.append(type(exc))
            if job == "close":
                clients[-1].close(LONG)
                new()
        deaf = Log("deaf", 1)
        clients[-1].log(deaf)  # nobody flushes
        eventually(lambda: deaf.log_id in ids(transport.logs()))
        for client in clients:
            client.close(LONG)
            self.assertBalanced(client)
        left = set(self.drain(fields["spool"])) if kind == "spool" else set()
        self.assertEqual(seen.count(KeyboardInterrupt), strikes.count(KeyboardInterrupt))
        if job == "log":  # elsewhere a TimeoutError can be taken for one of the network
            self.assertEqual(seen, strikes)
        self.assertEqual(returned - set(ids(transport.logs())) - dropped - left, set(), "lost")
        self.assertFalse(dropped & returned if job != "close" else ())


# ---- Hosts in miniature ---------------------------------------------------


class HostTest(ProcessTestCase):
    """What programs that run their users' code do to a process, without those programs."""

    @unittest.skipIf("coverage" in sys.modules, "coverage does not start in a subinterpreter")
    def test_a_subinterpreter_delivers_by_flush_and_at_its_end(self):
        """Without ssl, which crashes CPython 3.12 itself at a subinterpreter's end."""
        if not any(map(importlib.util.find_spec, ("_interpreters", "_xxsubinterpreters"))):
            self.skipTest("no subinterpreters here")
        plain = """
import socket
def plain(method, url, body, headers, timeout):
    with socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0])), 20) as s:
        s.sendall(b"POST / HTTP/1.1\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
        return int(s.recv(1000).split()[1]), b"", {}
c = client(transport=plain)
log(c, 3)
"""
        code = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
for ending in "assert c.flush(20), c.stats()", "":
    number, begin = interpreters.create(), f"import sys; sys.argv = {sys.argv}"
    wrong = interpreters.run_string(number, begin + sys.argv[2] + ending)
    assert not wrong, wrong
    interpreters.destroy(number)
"""
        server = self.server()
        logged = self.run_program(code, server.url, PRELUDE + plain)
        self.assertEqual(len(logged), 6)
        self.assertOnce(logged, server)

    @refcounted
    def test_a_sender_that_is_told_to_exit_ends_and_another_takes_its_place(self):
        code = """
import ctypes
c = client()
log(c)
assert c.flush(20)
old, = (t for t in threading.enumerate() if t.name == "chirrop-sender")
ctypes.pythonapi.PyThreadState_SetAsyncExc(
    ctypes.c_ulong(old.ident), ctypes.py_object(SystemExit))
log(c)                                  # wakes it
old.join(20)
assert not old.is_alive()
log(c)
assert c.flush(20), c.stats()
"""
        server = self.server()
        self.assertOnce(self.run_program(code, server.url, stderr=None), server)


# ---- Transport: what answers mean -------------------------------------------


def flood(head):
    """Send 1 MiB more and more often after `head`, as long as the client takes it."""
    return drip(head, b"x" * (1 << 20), pause=0)


def create(client):  # a call that is not safe to repeat
    client.create_event({"event": "a.b"})


def send(client):
    client.send_logs([Log("a.b.count", 1)])


class AnswerTest(ServerTestCase):
    """What each answer does to a batch, and to calls: retry, refuse or halve."""

    @cases([
        ("reset before the headers", cut(reset=True)),
        ("closed without a byte", cut()),
        ("reset after the headers", cut(answer(Content_Length=5), reset=True)),
        ("closed within the body", cut(answer(body=b"{", Content_Length=5))),
        ("garbage for a chunk", cut(chunked(b"{")[:-3] + b"zz\r\n")),
        ("garbage", cut(b"\x00\xffSSH-2.0-OpenSSH_9.6\r\n\r\n")),
        ("endless header line", cut(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100000)),
        ("time-out", hang),
        ("a portal's page", answer(200, b"\n<html>Log in", Content_Type="text/html")),
        ("a body without end", flood(answer(Content_Length=None))),
        ("a body of 200 MB", flood(answer(Content_Length=200 << 20))),
        *((status, answer(status)) for status in (408, 502, 504, 599)),
    ])  # fmt: skip
    def test_what_may_have_had_effect_is_sent_again_but_no_call_that_is_unsafe(self, name, fault):
        kind = chirrop.ChirrOpServerError if name in range(600) else chirrop.ChirrOpTransportError
        good = answer(200, {"ok": 1}, Connection="close")
        server = self.server(fault, good, fault, good, fault)
        client = self.deliver(server, timeout=0.2 if fault is hang else LONG)
        stats = client.stats()
        self.assertEqual((stats.delivered, stats.dropped, stats.retries), (1, {}, 1))
        self.assertIs(type(stats.last_error), kind)
        self.assertEqual(client.list_events(), {"ok": 1})
        self.assertRaises(kind, create, client)
        first, second, *others = server.requests
        self.assertEqual((first.body, len(others)), (second.body, 3))
        self.assertLess(max(c.dripped for c in server.connections), 100)  # MiB, some in buffers

    @cases([Client.list_events, create, send])
    def test_what_the_server_cannot_have_acted_on_is_always_sent_again(self, run):
        refused = self.server(answer(429), listening=False)
        client = self.real(refused)
        client._delivery._rand = lambda: refused.listen() or 0.0
        run(client)
        self.assertEqual(len(refused.requests), 2)
        (tls, context), proxy = self.tls_server(), self.server(answer(502), default=tunnel)
        os.environ["https_proxy"] = proxy.url
        run(self.real(tls, ssl_context=context))
        self.assertEqual((len(tls.requests), len(proxy.requests)), (1, 2))

    def test_logs_are_delivered_by_any_2xx(self):
        server = self.server(
            answer(204, Content_Length=None),
            answer(200, b"\x1f\x8b\x08\x00", Content_Encoding="gzip"),
            chunked(b"{", b"}", b""),
            b"HTTP/1.1 100 Continue\r\n\r\n" * 9 + answer(),
            cut(answer(Content_Length=None, body=b"until the close")),
            cut(b"HTTP/1.0 200 OK\r\n\r\n"),
            default=answer(500),
        )
        client = self.real(server)
        self.assertEqual([ship(client) for _ in server.script[:]], [True] * 6)
        self.assertEqual((client.stats().retries, len(server.requests)), (0, 6))

    @cases([
        *itertools.product(["refused"], (301, 302, 303, 307, 308, 401, 403, 404, 418)),
        *itertools.product(["rejected"], (400, 413, 422)),
        *itertools.product(["exhausted"], (500, 503)),
    ])  # fmt: skip
    def test_what_is_final_drops_the_log_and_raises_with_the_servers_message(self, reason, status):
        other, drops = self.server(), []
        server = self.server(default=answer(status, {"error": "no, thanks"}, Location=other.url))
        keep = lambda logs, error: drops.append((ids(logs), str(error)))
        client = self.deliver(server, on_drop=keep, on_exhausted="drop")
        text = "redirects are not followed, this" if status < 400 else "no, thanks"
        text = f"HTTP {status}: {text}"
        for run in (Client.list_events, create):
            with self.assertRaisesRegex(ChirrOpError, text):
                run(client)
        client.close(LONG)  # waits for whoever tells of drops
        self.assertEqual(client.stats().dropped, {reason: 1})
        [(dropped, told)] = drops
        self.assertEqual(dropped, ids(server.requests[0].logs()))
        self.assertIn(text, told)
        self.assertEqual((len(server.requests), other.connections), (3, []))

    @cases([
        (400, {0, 125, 249}, 60),
        (400, range(250), 64),
        (413, (), 250),  # from a server that takes two logs at a time
    ])  # fmt: skip
    def test_a_bad_batch_is_halved_and_only_bad_logs_are_dropped(self, status, bad, most):
        good, refused, drops = [], [], {}

        def judge(connection, request):
            values = [log["value"] for log in request.logs()]
            found = [x for x in values if x in bad or (status == 413 and len(values) > 2)]
            (refused if found else good).extend([values] if found else values)
            return answer(status, {"error": f"{found[0]} is bad"}) if found else answer()

        server = self.server(default=judge)
        keep = lambda logs, error: drops.update((log["value"], str(error)) for log in logs)
        client = self.real(server, flush_delay=60, batch_size=1000, on_drop=keep)
        for value in range(250):
            client.log(Log("a.b.count", value))
        client.flush(LONG)
        client.close(LONG)  # waits for whoever tells of drops
        self.assertEqual(sorted(good), [value for value in range(250) if value not in bad])  # once
        self.assertEqual((drops.keys(), client.stats().delivered), (set(bad), len(good)))
        self.assertLessEqual(len(refused), most)
        if len(bad) == 3:
            self.assertEqual(drops, {value: f"HTTP 400: {value} is bad" for value in bad})

    def test_logs_of_four_threads_through_faults_arrive_each_once_as_they_were_logged(self):
        faults = [cut(reset=True), answer(502), cut(), answer(429, Retry_After="0"), answer()]
        server = self.server(*faults * 3)
        client, count = self.real(server), rounds(2000, 20000)
        metas = (None, {"text": "naïve 🐦\n\"'"}, [1, 2.5, None], {"deep": {"er": [True]}}, 0)
        logs = [Log(f"job.{i % 7}.count", i / 7, "späher", meta=metas[i % 5]) for i in range(count)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(client.log, logs))
        self.assertTrue(client.flush(LONG))
        bodies = {request.body for request in server.requests}  # a retry is the same to the byte
        arrived = [log for body in bodies for log in json.loads(body)]
        self.assertLess(len(bodies), len(server.requests))
        self.assertEqual((len(arrived), client.stats().delivered), (count, count))
        self.assertEqual({x["log_id"]: x for x in arrived}, {x.log_id: x.to_dict() for x in logs})
        for request in server.requests:
            self.assertLessEqual(len(request.logs()), 250)
            self.assertEqual((request.method, request.path), ("POST", "/v1.0/logs"))
            self.assertEqual(request.headers["Authorization"], f"Bearer {KEY}")

    def test_every_form_of_retry_after_is_survived_and_0_is_at_once_whatever_the_jitter(self):
        date = email.utils.format_datetime(datetime.now(timezone.utc) + timedelta(1), usegmt=True)
        zero = answer(429, Retry_After="0")
        server = self.server(zero, zero, answer(), zero, zero, answer())
        self.patch(chirrop, "BACKOFF_BASE", 3 * LONG)
        self.patch(chirrop, "BACKOFF_CAP", 3 * LONG)
        client = self.real(server)
        client._delivery._rand = lambda: 0.99
        self.assertTrue(ship(client))
        create(client)
        self.assertEqual(len(server.requests), 6)
        client = client.with_options(servicer_retries=0)
        wanted = {"60": 60.0, "9" * 5000: 300.0, date: 300.0, "-5": None, "nan": None}
        for value, seconds in wanted.items():
            server.default = answer(429, Retry_After=value)
            with self.assertRaises(chirrop.ChirrOpRateLimitError) as caught:
                client.list_events()
            self.assertEqual(caught.exception.retry_after, seconds)


# ---- Transport: connections -------------------------------------------------


class KeptConnectionTest(ServerTestCase):
    def test_flushes_share_one_connection_plain_by_tls_or_through_a_tunnel_until_close(self):
        (tls, context), proxy = self.tls_server(), self.server(default=tunnel)
        for server in (self.server(), self.server(default=chunked(b"{}", b"")), tls, tls):
            client = self.real(server, ssl_context=context)
            self.assertEqual([ship(client) for _ in range(3)], [True] * 3)
            client.close()
            self.assertTrue(server.connections[-1].closed.wait(LONG))
            self.assertEqual(server.on()[-3:], [len(server.connections) - 1] * 3)
            os.environ["https_proxy" if server is tls else "unused"] = proxy.url
        self.assertEqual(len(proxy.connections), 1)

    @cases([
        ("closed meanwhile", cut(answer()), answer(), [0, 1], 0),
        ("asked to close", answer(Connection="close"), answer(), [0, 1], 0),
        ("HTTP/1.0", b"HTTP/1.0 200 -\r\nContent-Length: 0\r\n\r\n", answer(), [0, 1], 0),
        ("closed with the request", answer(), cut(), [0, 0, 1], 0),
        ("reset with the request", answer(), cut(reset=True), [0, 0, 1], 0),
        ("reset after the headers", answer(), cut(answer(Content_Length=5), True), [0, 0, 1], 1),
        ("time-out", answer(), hang, [0, 0, 1], 1),
        ("closed in the body", answer(), cut(answer(200, [], Content_Length=5)), [0, 0, 1], 1),
    ])  # fmt: skip
    def test_one_found_dead_is_replaced_once_and_not_a_retry(self, _, first, second, on, retries):
        for server, context in ((self.server(first, second), None), self.tls_server(first, second)):
            timeout = 0.2 if second is hang else LONG
            client = self.deliver(server, ssl_context=context, timeout=timeout)
            if callable(first):
                self.assertTrue(server.connections[0].closed.wait(LONG))
            self.assertTrue(ship(client))
            self.assertEqual((server.on(), client.stats().retries), (on, retries))
            self.assertEqual(len({request.body for request in server.requests}), 2)

    def test_unsafe_calls_have_a_connection_of_their_own_and_are_not_sent_again(self):
        server = self.server(answer(), answer(), cut())
        client = self.deliver(server)
        create(client)
        self.assertTrue(server.connections[1].closed.wait(LONG))  # by the client
        self.assertRaises(chirrop.ChirrOpTransportError, create, client)
        client.list_events()
        self.assertEqual(server.on(), [0, 1, 2, 0])
        asked = [request.headers["Connection"] == "close" for request in server.requests]
        self.assertEqual(asked, [False, True, True, False])

    def test_unasked_bytes_on_a_kept_connection_are_nobodys_answer(self):
        answered, strayed = threading.Event(), threading.Event()

        def stray(connection, request):
            connection.sock.sendall(answer(200, ["mine"]))
            answered.wait(LONG)
            connection.sock.sendall(answer(200, ["stray"]))
            strayed.set()

        server = self.server(stray, default=answer(200, ["new"]) + answer(200, ["stray"]))
        client = self.real(server)
        self.assertEqual(client.list_events(), ["mine"])
        answered.set()
        self.assertTrue(strayed.wait(LONG))
        self.assertEqual([client.list_events(), client.list_events()], [["new"], ["new"]])

    def test_threads_that_send_at_once_do_not_share_a_connection(self):
        both = threading.Barrier(2)
        server = self.server(default=lambda c, r: answer(200, [r.path][both.wait(LONG) // 2 :]))
        with ThreadPoolExecutor(2) as pool:
            got = list(pool.map(self.real(server).get_event, "xyxy"))
        self.assertEqual(got, [["/v1.0/events/x"], ["/v1.0/events/y"]] * 2)
        self.assertEqual(len(server.connections), 2)


class AddressTest(ServerTestCase):
    """Names with several addresses, of which the first ones are dead: nothing there answers."""

    def resolve(self, *ports):
        """Return a base URL whose name has these ports of 127.0.0.1 for its addresses."""
        kind = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
        found = [(*kind, ("127.0.0.1", port)) for port in ports]
        self.patch(socket, "getaddrinfo", lambda *args, **more: found)
        return "http://service.test"

    @unittest.skipUnless(sys.platform == "linux", "a full queue swallows nothing elsewhere")
    def test_after_dead_addresses_the_next_has_all_its_time_to_answer_once(self):
        full = socket.create_server(("127.0.0.1", 0), backlog=0)
        self.addCleanup(full.close)
        for waiting in [socket.socket() for _ in range(4)]:  # from then on it swallows what comes
            self.addCleanup(waiting.close)
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        server = self.server(lambda c, r: answer(500 if c.server.ended.wait(0.7) else 200))
        dead = full.getsockname()[1]
        create(self.real(self.resolve(dead, dead, server.port), timeout=1.2))  # 3 * 0.4, then 1.2
        self.assertEqual(len(server.requests), 1)

    def test_dead_addresses_share_the_time_out(self):
        waits = []

        class Socket(socket.socket):
            def connect(self, address):
                waits.append(self.gettimeout())
                raise TimeoutError("timed out")

        self.patch(socket, "socket", Socket)
        client = self.real(self.resolve(1, 2, 3), timeout=6, servicer_retries=0)
        for run in (Client.list_events, create):
            with self.assertRaisesRegex(chirrop.ChirrOpTransportError, "service.test.*timed out"):
                run(client)
        self.assertEqual([round(wait, 3) for wait in waits], [2.0] * 6)


class AgentTest(ServerTestCase):
    """Tracers, mocks and security agents around the standard library, as they are in the field."""

    def around_open(self):
        """As OpenTelemetry's URLLibInstrumentor."""
        original = urllib.request.OpenerDirector.open

        def instrumented(opener, fullurl, data=None, timeout=None):
            fullurl.headers["traceparent"] = fullurl.get_method() + fullurl.get_full_url()
            result = original(opener, fullurl, data=data, timeout=timeout)
            self.seen += [result.getcode(), result.status, result.version, *result.headers.items()]
            return result

        self.patch(urllib.request.OpenerDirector, "open", instrumented)

    def around_methods(self):
        """As tracers do around http.client."""
        for name in ("request", "putrequest", "getresponse", "send"):
            original = getattr(http.client.HTTPConnection, name)

            def traced(connection, *args, original=original, **options):
                result = original(connection, *args, **options)
                self.seen.append((connection.host, getattr(result, "status", None)))
                return result

            self.patch(http.client.HTTPConnection, name, traced)

    def in_its_place(self):
        """As mocks and recorders do."""

        class Subclass(http.client.HTTPConnection):
            connect = lambda connection: self.seen.append(super(Subclass, connection).connect())

        self.patch(http.client, "HTTPConnection", Subclass)

    @cases([around_open, around_methods, in_its_place])
    def test_logs_and_calls_pass_once_each_and_the_agent_sees_them(self, install):
        self.seen = []
        with contextlib.ExitStack() as stack:
            self.patch = lambda *args: stack.enter_context(mock.patch.object(*args))
            install(self)
            found, made = answer(200, [{"event_id": "e"}]), answer(200, {"destination_id": "d"})
            server = self.server(answer(), answer(), found, made, answer(404, {"error": "no"}))
            client = self.deliver(server)
            self.assertTrue(ship(client))
            self.assertEqual(client.list_events(), [{"event_id": "e"}])
            self.assertEqual(client.create_destination({})["destination_id"], "d")
            with self.assertRaisesRegex(chirrop.ChirrOpNotFoundError, "no"):
                client.get_event("e")
            self.assertEqual((server.on(), client.stats().retries), ([0, 0, 0, 1, 0], 0))
            self.assertTrue(self.seen)


# ---- Transport: security ------------------------------------------------------

CANARY = "chp_canary"
ECHOES = (  # a server that sends the key back, in each part of an answer
    *(answer(n, {"error": f"bad key {CANARY}", "key": CANARY}) for n in (400, 401, 500)),
    answer(502, CANARY.encode(), Server=CANARY),
    f"HTTP/1.1 403 {CANARY}\r\nContent-Length: 0\r\n\r\n".encode(),
    answer(429, Retry_After=CANARY),
    answer(302, Location="http://127.0.0.1/" + CANARY),
    cut(CANARY.encode() + b"\r\n\r\n"),
    cut(f"HTTP/1.1 {CANARY}\r\n\r\n".encode()),
    cut(chunked() + CANARY.encode() + b"\r\n"),
    cut(answer(200, CANARY.encode(), Content_Length=999)),
    cut(reset=True),
)  # fmt: skip


class TransportSecurityTest(ServerTestCase):
    def refused(self, url, text, **fields):
        """See that no call gets through, for a reason that says this."""
        client = self.real(url, retries=0, servicer_retries=0, **fields)
        for run in (Client.list_events, create, send):
            with self.assertRaisesRegex(chirrop.ChirrOpTransportError, text):
                run(client)

    def test_only_a_certificate_that_is_trusted_and_names_the_host_is_talked_to(self):
        server, context = self.tls_server()
        self.refused(server, "(?i)certificate.verify.failed")
        localhost = server.url.replace("127.0.0.1", "localhost")
        self.refused(localhost, "(?i)certificate", ssl_context=context)
        self.assertEqual(server.requests, [])
        self.assertEqual(self.deliver(server, ssl_context=context).stats().delivered, 1)
        os.environ["SSL_CERT_FILE"] = self.certificate()[0]
        self.assertEqual(self.deliver(server).stats().delivered, 1)

    def test_a_proxy_gets_its_credentials_and_by_https_no_key(self):
        proxy, (server, context) = self.server(answer(200, []), default=tunnel), self.tls_server()
        url = proxy.url.replace("//", "//user:pa%20ss@")
        os.environ.update(http_proxy=url, https_proxy=url)
        self.assertEqual(self.real("http://chirrop.invalid").list_events(), [])
        self.assertEqual(self.deliver(server, ssl_context=context).stats().delivered, 1)
        plain, connect = proxy.requests
        self.assertEqual(plain.path, "http://chirrop.invalid/v1.0/events")
        self.assertEqual(plain.headers["Host"], "chirrop.invalid")
        self.assertEqual(plain.headers["Authorization"], f"Bearer {KEY}")
        self.assertEqual((connect.method, connect.path), ("CONNECT", f"127.0.0.1:{server.port}"))
        self.assertNotIn(KEY, str(connect.headers))
        for request in proxy.requests:
            self.assertEqual(request.headers["Proxy-Authorization"], "Basic dXNlcjpwYSBzcw==")
        self.assertNotIn("Proxy-Authorization", server.requests[0].headers)

    @cases([
        (answer(407), "407.*password"),
        (answer(302, Location="/login"), "302"),
        (cut(b"SSH-2.0\r\n\r\n"), "cannot connect"),
    ])  # fmt: skip
    def test_a_proxy_that_refuses_the_tunnel_is_a_network_failure(self, behaviour, text):
        (server, context), proxy = self.tls_server(), self.server(default=behaviour)
        os.environ["https_proxy"] = proxy.url
        self.refused(server, text, ssl_context=context)
        self.assertEqual(server.connections, [])

    @cases([("127.0.0.1", 0), ("*", 0), ("example.com", 1)])
    def test_no_proxy_goes_past_the_proxy(self, value, proxied):
        proxy = self.server()
        os.environ.update(http_proxy=proxy.url, no_proxy=value)
        self.deliver(self.server())
        self.assertEqual(len(proxy.requests), proxied)

    def assertNotCanary(self, text):
        found = text.find("canary")
        self.assertEqual(found, -1, text[max(0, found - 200) : found + 20])

    def assertKeptSecret(self, url):
        """See that no error there shows the key, in all that a crash report may show of it."""
        errors, fields = [], {"retries": 0, "servicer_retries": 0, "on_exhausted": "drop"}
        keep = lambda logs, error: errors.append(error)
        client = self.real(url, api_key=CANARY, on_drop=keep, **fields)
        for run in (Client.list_events, create, ship):
            try:
                run(client)
            except ChirrOpError as exc:
                errors.append(exc)
        client.close(LONG)
        self.assertEqual(len(errors), 3)
        for exc in errors:
            frames = traceback.TracebackException.from_exception(exc, capture_locals=True)
            shown = [*frames.format(), repr((exc, vars(exc), exc.__cause__))]
            self.assertNotCanary("".join(shown))
        self.assertNotCanary(repr((client, vars(client.config))))

    def test_the_key_is_in_no_error_no_record_and_no_repr(self):
        tls, _ = self.tls_server()
        self.patch(chirrop, "MAX_ANSWER_BYTES", 1000)  # a frame of http.client may show as many
        urls = [self.server(default=echo).url for echo in ECHOES]
        for url in (*urls, self.server(listening=False).url, "http://chirrop.invalid", tls.url):
            self.assertKeptSecret(url)
        proxy = self.server(default=answer(407)).url
        os.environ["https_proxy"] = proxy.replace("//", "//user:canary@")
        self.assertKeptSecret(tls.url)
        client = self.client(api_key=CANARY)  # a transport of one's own may log what it is given
        client.list_events()
        self.assertNotCanary(repr(client.config.transport.requests))
        for record in self.records:
            self.assertNotCanary(record.getMessage() + repr(vars(record)))


# ---- Client ---------------------------------------------------------------


def sent(client):
    """Flush; return all logs that the client's FakeTransport has been given."""
    if not client.flush(LONG):
        raise AssertionError(client.stats())
    return client.config.transport.logs()


class ClientTest(TestCase):
    def dropping(self, *answers, **fields):
        """Return a client, and a list of (logs, text of the error): what its on_drop is given."""
        told = []
        fields["on_drop"] = lambda logs, error: told.append((logs, str(error)))
        return self.client(*answers, **fields), told

    def test_logs_arrive_with_key_and_content_type(self):
        client, logs = self.client(), [Log("a.b", i, agent="x", meta={"i": i}) for i in range(3)]
        for log in logs:
            client.log(log)
        self.assertEqual(sent(client), [log.to_dict() for log in logs])
        method, url, _, headers, timeout = client.config.transport.requests[0]
        self.assertEqual((method, url), ("POST", "https://logs.chirrop.com/v1.0/logs"))
        self.assertEqual((headers["Authorization"], timeout), (f"Bearer {KEY}", 10.0))
        self.assertEqual(headers["Content-Type"], "application/json")

    @cases([{"event": "a", "value": 1}, Log, "a.b"])
    def test_only_a_log_can_be_logged(self, bad):
        client, good = self.client(), Log("a", 1)
        log, send = client.log, client.send_logs
        for call, *args in ((log, bad), (log, good, 1), (send, bad), (send, [good, bad])):
            self.assertRaisesRegex(ChirrOpValidationError, "be a Log .*: log.*got", call, *args)
        self.assertEqual(sent(client), [])

    @cases([
        (("chp_x",), {}, r"a key is given as api_key=.*, got <class 'str'>$"),
        ((Config(api_key=KEY),), {"retries": 1}, "either a Config or fields such as .*, not both"),
        ((), {"api_key": KEY, "retrys": 1}, "unexpected keyword argument 'retrys'"),
    ])  # fmt: skip
    def test_wrong_arguments_of_new_client_get_the_right_advice(self, args, fields, advice):
        for make in (new_client, chirrop.initialize):
            self.assertRaisesRegex(ChirrOpValidationError, advice, make, *args, **fields)

    def test_try_log_queues_what_log_would_queue_and_counts_one_by_default(self):
        client, at = self.client(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        log = ("a.b", 2, "c", "0b0e2c4e-55a5-4c5e-9a51-0b1c7a3b5d11", {"d": 2}, at)
        self.assertEqual([client.try_log(*log), client.try_log("e")], [True, True])
        first, second = sent(client)
        self.assertEqual(first, Log(*log).to_dict())
        self.assertEqual((second["event"], second["value"]), ("e", 1))

    @cases([
        ({"event": "a", "value": "x", "meta": {"k": [1]}}, "value must be a finite number"),
        ({"event": "a", "value": 1, "occurred_at": "2001-01-01T00:00:00Z"}, "the last 30 days"),
        ({"event": "a", "meta": {"x": KeyError}}, "meta['x'] must be JSON",
         {"event": "a", "value": 1, "meta": {"x": "<class 'KeyError'>"}}),
        ({"event": "a", "meta": CYCLE}, "must be JSON",
         {"event": "'a'", "value": "1", "meta": "{'self': {...}}"}),
    ])  # fmt: skip
    def test_try_log_drops_and_reports_what_breaks_a_rule(self, fields, text, reported=None):
        client, told = self.dropping()
        self.assertIs(client.try_log(**fields), False)
        [(logs, error)] = told
        self.assertEqual((logs, client.stats().dropped), ([reported or fields], {"invalid": 1}))
        self.assertIn(text, error)
        self.assertIn("dropped 1 log (invalid)", self.records[0].getMessage())

    def test_try_log_drops_what_finds_no_room(self):
        down = FakeTransport(default=502)
        client, told = self.dropping(transport=down, queue_size=1, timeout=0.01, retries=0)
        self.assertEqual([client.try_log("a", i) for i in (1, 2)], [True, False])
        [(logs, error)] = told
        self.assertEqual(logs, [{"event": "a", "value": 2}])
        self.assertRegex(error, "full|no room")
        with client.timer("t"):  # nor does what is measured fail
            pass
        self.assertEqual(self.assertBalanced(client).dropped, {"full": 2})

    def test_a_disabled_client_checks_logs_and_sends_nothing(self):
        client = self.client(disabled=True)
        client.log(Log("a", 1))
        client.send_logs([Log("a", 1)])
        self.assertEqual((client.try_log("a", 1), client.try_log("a", "x")), (True, False))
        self.assertEqual((sent(client), client.stats().dropped), ([], {"invalid": 1}))
        with self.assertRaisesRegex(ChirrOpError, "the client is disabled"):
            new_client(disabled=True).list_events()

    def test_close_is_idempotent_and_later_logs_are_dropped_and_reported_once(self):
        client, told = self.dropping()
        with client:
            client.log(Log("a", 1))
        self.assertTrue(client.close() and client.shutdown())
        for i in range(5):
            client.log(Log("late", i))
        self.assertEqual([logs[0]["value"] for logs, _ in told], [0, 1, 2, 3, 4])
        self.assertEqual(client.stats()[1:3], (1, {"closed": 5}))

    def test_close_without_a_timeout_takes_exit_timeout_where_the_log_is_on_disk(self):
        gate, spool = threading.Event(), self.folder() / "events.spool"
        self.addCleanup(gate.set)
        client, told = self.dropping(lambda _: gate.wait(LONG) and 200, spool=spool, exit_timeout=0)
        client.log(Log("a", 1))
        self.assertFalse(client.close())
        self.assertEqual((told, client.stats().delivered), ([], 0))

    @cases([
        (200, 5, 600), (401, 3, 0), (502, 6, 0), ((429, b"", {"Retry-After": "31"}), 3, 0),
    ])  # fmt: skip
    def test_send_logs_delivers_in_this_thread_or_raises(self, answer, attempts, delivered):
        transport = FakeTransport(502, OSError("reset"), default=answer)
        client, before = self.client(transport=transport, retries=5), threading.enumerate()
        try:
            client.send_logs(Log("a", i) for i in range(600))
        except ChirrOpError as exc:
            self.assertIn(exc.status_code, (answer, 429))
        self.assertEqual(client.stats()[:2], (delivered, delivered))
        self.assertEqual((len(transport.requests), threading.enumerate()), (attempts, before))

    @cases([-1, "1", math.nan, True])
    def test_flush_and_close_refuse_a_timeout_that_is_none(self, bad):
        client = self.client()
        for call in (client.flush, client.close):
            self.assertRaisesRegex(ChirrOpValidationError, "timeout", call, bad)

    def test_a_client_refuses_pickle_and_copy(self):
        client = self.client()
        for make in (pickle.dumps, lambda c: pickle.dumps(c.log), copy.copy, copy.deepcopy):
            for each in (client, client.bind()):
                self.assertRaisesRegex(TypeError, "make it in the worker", make, each)

    def test_options_are_the_views_own_and_the_rest_is_shared(self):
        client = self.client(502, 502)
        view = client.with_options(timeout=3, servicer_retries=0)
        self.assertRaises(chirrop.ChirrOpServerError, view.list_events)
        self.assertEqual(client.list_events(), {})
        self.assertEqual([r[4] for r in client.config.transport.requests], [3.0, 10.0, 10.0])
        for bad in ({"timeout": 0}, {"servicer_retries": -1}):
            self.assertRaises(ChirrOpValidationError, view.with_options, **bad)

    def test_bound_agent_and_meta_are_used_where_a_call_gives_none(self):
        client, told = self.dropping()
        outer = client.bind(agent="shop", meta={"a": 1, "b": 1})
        inner = outer.bind(meta={"b": 2}).with_options(timeout=3)
        outer.try_log("e")
        inner.try_log("e", agent="own", meta={"a": 3, "c": 3})
        inner.bind(agent="till").try_log("e", meta=[4])  # no object: sent as it is
        inner.timer("e", meta={"c": 5}).start().stop()
        client.try_log("e")
        self.assertFalse(inner.try_log("e", meta={f"k{i}": i for i in range(9)}))
        wanted = [("shop", {"a": 1, "b": 1}), ("own", {"a": 3, "b": 2, "c": 3}), ("till", [4])]
        wanted += [("shop", {"a": 1, "b": 2, "c": 5, "result": "success"}), (None, None)]
        self.assertEqual([(log.get("agent"), log.get("meta")) for log in sent(client)], wanted)
        [([log], error)] = told
        self.assertEqual((log["agent"], log["meta"]["b"], log["meta"]["k8"]), ("shop", 2, 8))
        self.assertIn("at most 10 top-level keys", error)
        for bad in ((1,), (None, [1]), (None, dict.fromkeys("0123456789"))):  # no log could have it
            self.assertRaises(ChirrOpValidationError, inner.bind, *bad)

    @refcounted
    def test_a_view_in_use_keeps_its_client_and_a_collected_client_sends_what_it_has(self):
        transport = FakeTransport()
        client = new_client(api_key=KEY, transport=transport, flush_delay=86400)
        alive, view = weakref.ref(client), client.bind("a").with_options(timeout=3)
        del client
        view.try_log("e")
        self.assertEqual((alive().config, view.stats().queued), (view.config, 1))
        del view
        self.assertIsNone(alive())
        self.assertIn(b'"e"', transport.seen.get(timeout=LONG))

    def test_async_with_flushes_and_closes_beside_the_loop_and_cancelling_loses_nothing(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        client = self.client(lambda body: gate.wait(LONG) and 200)

        async def main():
            async with client as entered:
                client.log(Log("a", 1))
                with self.assertRaises(asyncio.TimeoutError):  # the loop's clock goes on
                    await asyncio.wait_for(entered.aflush(LONG), 0.01)
                gate.set()
                self.assertIs(await client.aflush(LONG), True)
                client.try_log("b")
            self.assertEqual((client.stats().delivered, await client.aclose()), (2, True))

        asyncio.run(main())


# ---- Control plane --------------------------------------------------------

CALLS = [  # route, call, its arguments; a dict is the body
    ("GET /events", "list_events"), ("POST /events", "create_event", {"event": "a"}),
    ("GET /events/evt_1", "get_event", " evt_1 "),
    ("PUT /events/evt_1", "update_event", "evt_1", {"title": "t", "event_id": "other"}),
    ("GET /events/e/logs?period=hour&limit=5&offset=9", "get_event_logs", "e", "hour", 5, 9),
    ("GET /events/e/analytics?view=window&period=1d&previous=previous_7d",
     "get_event_analytics", "e", "window", "1d", "previous_7d"),
    ("GET /policies", "list_policies"), ("GET /policies/p", "get_policy", "p"),
    ("POST /policies", "create_policy", {"aggregate": "p95_est", "x": 1}),
    ("PUT /policies/p", "update_policy", "p", {"severity": "critical", "channel": "ops"}),
    ("GET /alerts?status=triggered", "list_alerts", "triggered"),
    ("GET /alerts/a", "get_alert", "a"), ("POST /alerts/a/archive", "archive_alert", "a"),
    ("GET /alerts/a/deliveries?limit=1&offset=0", "get_alert_deliveries", "a", 1, 0),
    ("POST /alerts/a/acknowledge", "acknowledge_alert", "a"),
    ("POST /alerts/a/resolve", "resolve_alert", "a"),
    ("GET /destinations", "list_destinations"), ("GET /destinations/d", "get_destination", "d"),
    ("POST /destinations", "create_destination", {"channel": "email"}),
    ("PUT /destinations/d", "update_destination", "d", {"enabled": False}),
    ("POST /destinations/d/test", "test_destination", "d"),
]  # fmt: skip
CREATING = {"create_event", "create_policy", "create_destination", "test_destination"}
VERBS = ("list_", "get_", "create_", "update_", "test_", "acknowledge_", "resolve_", "archive_")


class ControlPlaneTest(TestCase):
    def asked(self, name, *args, answers=((200, b'{"x": 1}', {}),)):
        """Make one call; return its requests, and what it returned or raised."""
        client = self.client(*answers)
        try:
            result = getattr(client, name)(*args)
        except ChirrOpError as exc:
            result = exc
        return client.config.transport.requests, result

    @cases([
        *CALLS,
        ("GET /events/e/analytics?view=window&period=1h&previous=previous_window",
         "get_event_analytics", "e"),
        ("GET /alerts", "list_alerts"),
        ("GET /events/..%2Fa%3Fc%23d%C3%BC%25%0D%0Ax", "get_event", "../a?c#dü%\r\nx"),
        ("PUT /x/y%2Fz?a=1&d=%C3%A9+%26", "request", "put", "x/y%2Fz",
         {"a": 1, "b": None, "d": "é &"}, {"e": 1}),
    ])  # fmt: skip
    def test_every_call_has_its_method_path_and_body(self, route, name, *args):
        [(method, url, body, headers, _)], result = self.asked(name, *args)
        self.assertEqual(f"{method} {url}", route.replace("/", "https://api.chirrop.com/v1.0/", 1))
        wanted = args[-1] if args and isinstance(args[-1], dict) else None
        self.assertEqual((body and json.loads(body), result), (wanted, {"x": 1}))
        self.assertEqual("Content-Type" in headers, wanted is not None)
        # A call that must not be repeated goes on a connection of its own.
        self.assertEqual(headers.get("Connection"), "close" if name in CREATING else None)

    def test_the_table_is_complete(self):
        self.assertEqual({n for n in dir(Client) if n.startswith(VERBS)}, {c[1] for c in CALLS})

    @cases([
        ("get_event_logs", "e", "week"), ("get_event_analytics", "e", "chart"),
        ("get_event_analytics", "e", "window", "2h"), ("list_alerts", "open"),
        ("get_event_analytics", "e", "window", "1h", "previous_2d"), ("create_policy", []),
        ("create_policy", {"period": "week"}), ("create_policy", {"aggregate": "median"}),
        ("create_policy", {"condition": ">"}), ("update_policy", "p", {"severity": "bad"}),
        ("create_destination", {"channel": "fax"}), ("create_event", None), ("request", None, "/a"),
        ("create_event", {"x": math.nan}), ("request", "GE\nT", "/a"),
        *[("get_alert", alert_id) for alert_id in (" ", "..", None, "\ud800")],
        *[("request", "GET", path) for path in
          ("/../x", "/a//b", "", "/a?b=c", "/ü", "/a\\b", "/a\r\nb", None)],
    ])  # fmt: skip
    def test_what_breaks_a_rule_is_refused_before_any_request(self, name, *args):
        requests, error = self.asked(name, *args)
        self.assertEqual((requests, type(error)), ([], ChirrOpValidationError))
        self.assertIn("got", str(error))

    def test_exactly_the_ten_supported_analytics_pairs_pass(self):
        earlier = ("previous_window", "previous_1d", "previous_7d", "previous_1m")
        pairs = itertools.product(("1h", "1d", "7d", "1m"), earlier)
        results = [self.asked("get_event_analytics", "e", "window", *pair)[1] for pair in pairs]
        self.assertEqual((results.count({"x": 1}), len(results)), (10, 16))

    @cases([(b"", {}), (b" \n", {}), (b"null", None)])
    def test_the_answer_is_its_json_or_an_empty_dict(self, body, wanted):
        self.assertEqual(self.asked("list_events", answers=[(200, body, {})])[1], wanted)
        _, error = self.asked("list_events", answers=[(200, b"{" + body, {})])
        self.assertEqual(str(error), "HTTP 200: the answer is not JSON")
        self.assertIsInstance(error, chirrop.ChirrOpTransportError)

    @cases([
        *[(retried, 3, 1) for retried in (OSError("reset"), 408, 502, 504, 599)],
        (ConnectionRefusedError(), 3, 3), ((429, b"", {"Retry-After": "0"}), 3, 3),
        *[(final, 1, 1) for final in (400, 401, 403, 404, 413, 422, 500, 503, 301)],
        ((429, b"", {"Retry-After": "31"}), 1, 1),
    ])  # fmt: skip
    def test_what_is_safe_is_repeated_and_what_is_final_is_not(self, answer, safe, creating):
        for _, name, *args in CALLS:
            requests, error = self.asked(name, *args, answers=[answer] * 3)
            self.assertEqual(len(requests), creating if name in CREATING else safe, name)
            self.assertIsInstance(error, ChirrOpError)

    def test_iterators_page_until_nothing_is_left(self):
        rows = [{"n": i} for i in range(7)]

        def page(body):  # three rows at most, whatever limit says
            start = int(transport.requests[-1][1].partition("offset=")[2])
            return 200, json.dumps(rows[start : start + 3]).encode(), {}

        transport = FakeTransport(default=page)
        client = self.client(transport=transport)
        self.assertEqual(list(client.iter_event_logs("e", "hour", page_size=5)), rows)
        self.assertEqual(list(client.iter_alert_deliveries("a", "all", page_size=3)), rows)
        self.assertIn("deliveries?kind=all&limit=3&offset=7", transport.requests[-1][1])
        transport.default = (200, b"[1]", {})  # a server that ignores the offset
        self.assertEqual(list(client.iter_event_logs("e", "day")), [1])

    @cases([
        (2, " a ", " y "), (3, "b"), (4, "c"), (5, "c", "x"), (None, "b", "z"), (None, "d"),
    ])  # fmt: skip
    def test_find_event_goes_by_name_and_agent(self, number, *args):
        listed = [("a", "x"), ("a", "y"), ("b", "x"), ("c", None), ("c", "x")]
        events = [{"event": e, "agent": a, "event_id": i} for i, (e, a) in enumerate(listed, 1)]
        client = self.client(*[(200, json.dumps(events).encode(), {})] * 2)
        self.assertEqual((client.find_event(*args) or {}).get("event_id"), number)
        with self.assertRaisesRegex(ChirrOpValidationError, "several have an event 'a': x, y"):
            client.find_event("a")


# ---- Timer, Lambda, global API --------------------------------------------


class TimerTest(TestCase):
    GOOD, BAD = {"result": "success"}, {"result": "error"}

    def timed(self, client):
        """Return (event, agent, meta) of each log sent; all took less than 10 s."""
        logs = sent(client)
        self.assertTrue(all(0 <= log["value"] < 10_000 for log in logs))
        return [(log["event"], log.get("agent"), log["meta"]) for log in logs]

    def test_it_logs_milliseconds_and_the_result_and_lets_errors_pass(self):
        client = self.client()
        timer = client.timer("t", agent="w", meta={"k": 1})
        with timer, timer:
            pass
        with self.assertRaises(KeyError), client.timer("u"):
            raise KeyError("x")
        hooks = client.timer("v").start()
        hooks.stop("error")
        hooks.stop()  # a second hook for the end: nothing is running
        for bad in (("",), ("a", None, {str(i): i for i in range(10)})):  # at once
            self.assertRaises(ChirrOpValidationError, client.timer, *bad)
        wanted = [("u", None, self.BAD), ("v", None, self.BAD)]
        self.assertEqual(self.timed(client), [("t", "w", {"k": 1, **self.GOOD})] * 2 + wanted)

    def test_it_decorates_functions_sync_and_async(self):
        client = self.client()

        @client.timer("f")
        def fact(n):
            """doc"""
            return n * fact(n - 1) if n else 1

        @client.timer("g", "w")
        async def invert(value):
            return 1 / value

        self.assertEqual((fact(3), fact.__doc__, asyncio.run(invert(4))), (6, "doc", 0.25))
        self.assertRaises(ZeroDivisionError, asyncio.run, invert(0))
        wanted = [("f", None, self.GOOD)] * 4 + [("g", "w", self.GOOD), ("g", "w", self.BAD)]
        self.assertEqual(self.timed(client), wanted)


def context(milliseconds):
    """Return what Lambda gives a handler that has this much time left."""
    return types.SimpleNamespace(get_remaining_time_in_millis=lambda: milliseconds)


class LambdaTest(TestCase):
    @cases([
        (context(3000), 2.8), (context(9000), 4.0), (context(-5), 0.0), (object(), 4.0),
    ])  # fmt: skip
    def test_it_flushes_in_the_remaining_time_or_exit_timeout(self, given, seconds):
        client = self.client(exit_timeout=4.0)
        with mock.patch.object(client, "flush") as flush:
            client.lambda_handler(lambda event, context: None)(None, given)
        self.assertAlmostEqual(flush.call_args.args[0], seconds)

    def test_results_and_errors_pass_and_what_could_not_be_sent_waits(self):
        client = self.client(transport=FakeTransport(default=OSError("down")), retries=0)

        @client.lambda_handler
        def handler(event, context):
            client.log(Log("a", event))
            return 1 / event

        self.assertEqual((handler(2, context(0)), handler.__name__), (0.5, "handler"))
        self.assertEqual(client.stats().delivered, 0)
        client.config.transport.default = 200
        self.assertRaises(ZeroDivisionError, handler, 0, context(30_000))
        eventually(lambda: client.stats().delivered == 2)


class GlobalTest(TestCase):
    def test_one_global_client_by_either_name(self):
        client = chirrop.initialize(api_key=KEY, transport=FakeTransport())
        self.addCleanup(chirrop.stop)
        chirrop.log_event(Log("a", 1))
        chirrop.ChirrOp.log_event(Log("a", 2))
        self.assertTrue(chirrop.try_log("a", 3) and chirrop.ChirrOp.try_log("a"))
        self.assertTrue(chirrop.flush(LONG) and chirrop.ChirrOp.flush(LONG))
        self.assertEqual([log["value"] for log in client.config.transport.logs()], [1, 2, 3, 1])
        with self.assertRaisesRegex(ChirrOpError, r"^ChirrOp SDK .*: call stop\(\) first$"):
            chirrop.ChirrOp.initialize(api_key=KEY)
        self.assertRaises(ChirrOpValidationError, chirrop.log_event, "a.b", 1)

    def test_before_initialize_and_after_stop_it_says_so(self):
        text = r"^ChirrOp SDK is not initialized. Please call initialize\(\) first$"
        for _ in range(2):
            self.assertTrue(chirrop.stop(1))
            for name, *args in (("log_event", Log("a", 1)), ("try_log", "a"), ("flush",)):
                self.assertRaisesRegex(ChirrOpError, text, getattr(chirrop, name), *args)
            chirrop.initialize(Config(api_key=KEY, transport=FakeTransport()))
        self.assertTrue(chirrop.ChirrOp.stop())


# ---- Sandbox --------------------------------------------------------------

UNKNOWN = "00000000-0000-4000-8000-00000000dead"
SLACK = {"channel": "slack", "url": "https://hooks.slack.com/services/T/B/x"}


class SandboxCase(TestCase):
    """A sandbox under a frozen clock, called as a transport."""

    def setUp(self):
        super().setUp()
        self.now = datetime(2026, 3, 4, 10, 30, 15, tzinfo=timezone.utc)
        self.patch(time, "time", lambda: self.now.timestamp())
        self.sandbox = Sandbox()

    def exchange(self, method, path, body, headers, timeout):
        return self.sandbox(method, "https://api.example" + path, body, headers, timeout)

    def call(self, method, path, body=None, auth="Bearer chp_test", timeout=10.0):
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        answer = self.exchange(method, "/v1.0" + path, body, {"Authorization": auth}, timeout)
        return answer[0], json.loads(answer[1] or b"null")

    def ok(self, method, path, body=None):
        status, content = self.call(method, path, body)
        self.assertEqual(status, 200, content)
        return content

    def log(self, *values, **fields):
        self.ok("POST", "/logs", [{"event": "jobs.done", "value": v, **fields} for v in values])

    def at(self, **shift):
        return (self.now + timedelta(**shift)).isoformat()[:-6] + "Z"

    def event_id(self, agent=""):
        [found] = [e for e in self.ok("GET", "/events") if e["agent"] == agent]
        return found["event_id"]

    def policy(self, **fields):
        rule = {"period": "hour", "aggregate": "sum", "condition": "gt", "threshold": 0}
        return self.ok("POST", "/policies", {"event_id": self.event_id(), **rule, **fields})

    def rollups(self, query, event_id=None):
        return self.ok("GET", f"/events/{event_id or self.event_id()}/logs?period={query}")


class SandboxTest(SandboxCase):
    def test_a_log_sent_twice_is_one_log_and_the_first_wins(self):
        log_id = str(uuid.uuid4())
        self.log(1, 2, log_id=log_id)
        self.log(3, log_id=log_id.upper())
        self.assertEqual([(x["log_id"], x["value"]) for x in self.sandbox.logs], [(log_id, 1)])
        self.assertEqual(self.rollups("day")[0]["count"], 1)

    @cases([{}, {"log_id": " ", "occurred_at": None}, {"occurred_at": "0001-01-01T00:00:00Z"}])
    def test_a_log_without_id_or_time_gets_both_of_the_moment_it_comes(self, fields):
        self.now += timedelta(days=400)
        self.log(1, **fields)
        self.assertEqual(self.sandbox.logs[-1]["occurred_at"], self.at())
        self.assertTrue(uuid.UUID(self.sandbox.logs[-1]["log_id"]))

    def test_a_definition_is_made_for_each_agent_and_event_and_can_be_changed(self):
        made = self.ok("POST", "/events", {"event": "jobs.done", "agent": "api", "unit": "ms"})
        for agent in ("api", "web", "api", ""):
            self.log(1, agent=agent)
        self.assertEqual([e["agent"] for e in self.ok("GET", "/events")], ["api", "web", ""])
        path, new = f"/events/{made['event_id'].upper()}", {"title": "Jobs", "agent": "new"}
        given = {"event_id": UNKNOWN, "event": "x", "unit": None, "timezone": "", **new}
        self.assertEqual(self.ok("PUT", path, given), {**made, **new})
        self.log(1, agent="new")
        self.assertEqual(self.rollups("day", made["event_id"])[0]["count"], 3)

    @cases([
        ("minute", ["10:30 2 -2 34 -5 3", "10:29 1 2 4 2 2", "09:59 1 1 1 1 1"]),
        ("hour", ["10:00 3 0 38 -5 3", "09:00 1 1 1 1 1"]), ("day", ["00:00 4 1 39 -5 3"]),
    ])  # fmt: skip
    def test_rollups_sum_each_bucket_newest_first(self, period, expected):
        self.sandbox.reset()
        for value, at in ((2, "10:29:59.999"), (3, "10:30:00"), (-5, "10:30:14"), (1, "09:59:59")):
            self.log(value, occurred_at=f"2026-03-04T{at}Z")
        rows = self.rollups(period)
        row = "{occurred_at:.16} {count} {value:g} {squares:g} {min:g} {max:g}"
        self.assertEqual([row.format(**each)[11:] for each in rows], expected)
        self.assertEqual(self.rollups(period + "&limit=1&offset=1"), rows[1:2])

    def test_day_rollups_follow_the_timezone_of_the_definition(self):
        self.now = datetime(2026, 3, 9, 12, tzinfo=timezone.utc)  # clocks changed on the 8th
        definition = {"event": "jobs.done", "timezone": "America/New_York"}
        if self.call("POST", "/events", definition)[0] == 400:
            self.skipTest("no time zone database here")
        for at in ("07T04:59", "07T05:00", "08T04:59", "08T05:00", "09T03:59", "09T04:00"):
            self.log(1, occurred_at=f"2026-03-{at}:00Z")
        days = [f"{row['occurred_at'][8:16]} {row['count']}" for row in self.rollups("day")]
        self.assertEqual(days, ["09T04:00 1", "08T05:00 2", "07T05:00 2", "06T05:00 1"])

    @cases([
        ("1h", 1, "window", 1), ("1h", 1, "1d", 24), ("1d", 24, "7d", 168), ("7d", 168, "1m", 720),
    ])  # fmt: skip
    def test_analytics_compare_the_window_that_ends_now(self, period, hours, previous, shift):
        self.sandbox.reset()
        self.ok("POST", "/events", {"event": "jobs.done"})
        path = f"/events/{self.event_id()}/analytics?view=window"
        path += f"&period={period}&previous=previous_{previous}"
        self.assertIsNone(self.ok("GET", path)["data"])
        self.log(5, 9, 10)
        self.assertEqual(self.ok("GET", path)["data"]["value_pct_change"], 0)
        for value, ago in ((1000, shift + hours), (1, shift), (3, shift)):
            self.now -= timedelta(hours=ago)  # beyond the 30 days that a log may be old
            self.log(value)
            self.now += timedelta(hours=ago)
        self.log(1000, occurred_at=self.at(seconds=1))
        data = self.ok("GET", path)["data"]
        self.assertAlmostEqual(data.pop("current_stddev"), 2.1602468994)
        self.assertEqual(data, {
            "current_value": 24, "current_count": 3, "current_mean": 8, "previous_value": 4,
            "previous_count": 2, "previous_mean": 2, "previous_stddev": 1, "value_delta": 20,
            "count_delta": 1, "mean_delta": 6, "value_pct_change": 500, "count_pct_change": 50,
            "mean_pct_change": 300,
        })  # fmt: skip

    @cases([
        ("sum", "gt", 4, "5"), ("sum", "lt", 4, "3"), ("sum", "eq", 4, "4"),
        ("max", "lte", 3, "34"), ("count", "gte", 2, "345"), ("average", "gte", 2, "45"),
        ("min", "lt", 1, ""), ("p95_est", "eq", 3.645, "4"), ("p99_est", "eq", 2 + 2.326, "4"),
    ])  # fmt: skip
    def test_each_aggregate_and_condition(self, aggregate, condition, threshold, fires):
        for total in "345":
            self.sandbox.reset()
            self.ok("POST", "/events", {"event": "jobs.done"})
            self.policy(aggregate=aggregate, condition=condition, threshold=threshold)
            self.log(1, int(total) - 1)
            self.assertEqual(len(self.ok("GET", "/alerts")), total in fires, total)

    def test_a_policy_raises_one_alert_for_the_newest_bucket_of_its_event_while_enabled(self):
        self.log(100, occurred_at=self.at(days=-2))
        policy = self.policy(threshold=10, enabled=False)
        self.log(20)
        self.assertEqual(self.ok("GET", "/alerts"), [])
        self.ok("PUT", f"/policies/{policy['policy_id']}", {"enabled": True, "title": "Jobs"})
        for value, hours in ((1, 0), (1, 0), (11, 1)):
            self.log(value, occurred_at=self.at(hours=hours))
        first, second = self.ok("GET", "/alerts")
        seen = {"value": 21, "count": 2, "min": 1, "max": 20, "title": "Jobs"}
        rule = {name: policy[name] for name in ("policy_id", "event_id", "threshold", "severity")}
        self.assertLessEqual({**seen, **rule}.items(), first.items())
        self.assertEqual(second["value"], 11)

    @cases(["acknowledge", "resolve", "archive"])
    def test_an_alert_goes_through_its_life_and_never_back(self, first):
        self.log(1)
        self.policy()
        order = ("acknowledge", "resolve", "archive")
        for verb in order:
            self.now += timedelta(hours=1)
            self.log(1)
            path = f"/alerts/{self.ok('GET', '/alerts')[-1]['alert_id']}"
            before = self.ok("POST", f"{path}/{first}")
            self.assertIn(self.at()[:-1], before.get(f"{first}d_at", self.at()))
            self.now += timedelta(seconds=1)
            back = order.index(verb) < order.index(first)
            self.assertEqual(self.call("POST", f"{path}/{verb}")[0], 422 if back else 200)
            self.assertEqual(self.ok("GET", path) == before, back or verb == first)

    def test_deliveries_go_to_enabled_destinations_in_scope(self):
        self.log(1)
        mine = {"scope": "mine", "policy_ids": [self.policy()["policy_id"]]}
        other = {"scope": "other", "policy_ids": [UNKNOWN]}
        chat = {"channel": "telegram", "url": "", "credentials": {"bot_token": "b", "chat_id": 5}}
        for fields in ({}, {**mine, **chat}, {"enabled": False}, other):
            self.ok("POST", "/destinations", {**SLACK, **fields})
        self.log(1)
        [alert] = self.ok("GET", "/alerts")
        path = f"/alerts/{alert['alert_id']}/deliveries"
        rows = self.ok("GET", path)
        self.assertEqual([row["channel"] for row in rows], ["slack", "telegram"])
        told = {"target": SLACK["url"], "status": "sent", "response_status": None}
        told["error_message"] = "recorded only: a sandbox sends nothing"
        self.assertLessEqual(told.items(), rows[0].items())
        self.assertEqual(self.ok("GET", path + "?limit=1&offset=1&kind=all"), rows[1:])
        self.assertEqual(self.ok("GET", path + "?kind=test"), [])

    def test_requests_are_recorded_and_logs_rejected_until_reset(self):
        log_id = str(uuid.uuid4())
        self.sandbox.reject(lambda log: log["value"] == 13)
        self.log(12)
        status, answer = self.call("POST", "/logs", [{"event": "a", "value": 13, "log_id": log_id}])
        self.assertEqual((status, log_id in repr(answer)), (400, True))
        self.call("GET", "/alerts?x=%20", auth="Bearer canary")
        seen = {"status": 401, "query": {"x": " "}, "path": "/v1.0/alerts"}
        self.assertEqual(self.sandbox.requests[2], {**seen, "method": "GET", "body": None})
        self.sandbox.fail(None, status=500)
        self.sandbox.reset()
        self.assertEqual((self.sandbox.logs, self.sandbox.requests), ([], []))
        self.assertEqual(self.ok("GET", "/events"), [])
        self.log(13)

    @cases([
        (dict(times=2, status=503), [503, 503, 200]), (dict(times=None, status=500), [500] * 3),
        (dict(path="/alerts", status=404), [200] * 3), (dict(times=0), [200] * 3),
        (dict(path="/events"), [502, 200]), (dict(retry_after=0), [429, 200]),
        (dict(delay=0.001), [200, 200]), (dict(delay=99), [TimeoutError, 200]),
    ])  # fmt: skip
    def test_a_fault_meets_so_many_matching_requests(self, fault, expected):
        self.sandbox.reset()
        self.sandbox.fail(**fault)
        for told in expected:
            if isinstance(told, int):
                self.assertEqual(self.call("GET", "/events", timeout=0.01)[0], told)
            else:
                self.assertRaises(told, self.call, "GET", "/events", timeout=0.01)

    @cases([("before", 1), ("after", 2)])
    def test_a_connection_is_dropped_before_or_after_the_request_took_effect(self, when, kept):
        self.sandbox.fail(drop=when)
        self.assertRaises(ConnectionResetError, self.log, 1)
        self.assertEqual(self.sandbox.requests[-1]["status"], 0)
        self.log(2)
        self.assertEqual(len(self.sandbox.logs), kept)
        self.sandbox.reset()

    @cases([
        ({}, b'{"error": {"code": "ERROR", "message": "scripted 500"}}'),
        ({"body": "<p>é"}, "<p>é".encode()), ({"body": {"a": 1}}, b'{"a": 1}'),
    ])  # fmt: skip
    def test_a_scripted_answer_takes_nothing(self, fault, content):
        self.sandbox.fail(status=500, retry_after="7", **fault)
        answer = self.exchange("POST", "/v1.0/logs", b'[{"event":"a","value":1}]', {}, 1)
        self.assertEqual((*answer[:2], answer[2]["Retry-After"]), (500, content, "7"))
        self.assertEqual(self.sandbox.logs, [])

    @cases(["", "chp_test", "Bearer ", "Bearer key", "Basic chp_test", "Bearer chp_"])
    def test_401_for_a_missing_or_bad_token(self, auth):
        error = {"code": "INVALID_TOKEN", "message": "invalid API key"}
        self.assertEqual(self.call("GET", "/nothing", auth=auth), (401, {"error": error}))


# Rules of the service that end in a refusal, and words of its reason.
RULES = """
POST /logs <deep> -> 400 array
POST /logs [{"event": "a", "value": NaN}] -> 400 array
POST /logs <251> -> 400 250
POST /logs [{"event": "a", "value": 1}, 5] -> 400 log object
POST /logs [{"event": "a", "value": 1}, {"value": 1}] -> 400 event required
POST /events [] -> 400 object
POST /events {"event": " "} -> 400 event
POST /events {"event": "a", "timezone": "../etc/passwd"} -> 400 timezone
POST /events {"event": "jobs.done"} -> 422 already
PUT /events/<event> {"agent": "taken"} -> 422 already
DELETE /events/<event> -> 404 DELETE /v1.0/events/<event>
GET /events/evt_123 -> 400 UUID evt_123
GET /events/<unknown> -> 404 <unknown>
GET /events/<event>/logs -> 400 period minute hour day
GET /events/<event>/analytics?period=1h -> 400 view window
GET /events/<event>/analytics?view=window&period=1d&previous=previous_1d -> 400 previous_1d
PUT /policies/<policy> {"event_id": "<unknown>"} -> 422 event_id
PUT /policies/<policy> {"threshold": "5"} -> 400 threshold
POST /policies {"event_id": "<event>", "period": "day", "aggregate": ""} -> 400 aggregate
POST /destinations {"channel": "sms"} -> 400 channel
POST /destinations {"channel": "slack"} -> 400 url
POST /destinations {"channel": "webhook", "url": "https:///x"} -> 400 url
POST /destinations {"channel": "telegram", "credentials": {"chat_id": 5}} -> 400 bot_token
POST /destinations {"channel": "email", "policy_ids": "x"} -> 400 policy_ids
GET /alerts?status=open -> 400 archived
GET /alerts/<unknown>/deliveries -> 404 <unknown>
GET /alerts/<alert>/deliveries?kind=x -> 400 kind
GET /alerts/<alert>/deliveries?offset=1.5 -> 400 offset
"""


class SandboxRulesTest(SandboxCase):
    def state(self):
        kinds = "events", "policies", "alerts", "destinations"
        return [self.sandbox.logs, *(self.ok("GET", f"/{kind}") for kind in kinds)]

    def test_each_rule_is_refused_with_its_reason_and_changes_nothing(self):
        for agent in ("", "taken"):
            self.log(1, agent=agent)
        known = {"<event>": self.event_id(), "<policy>": self.policy()["policy_id"]}
        self.log(1)
        known.update({"<unknown>": UNKNOWN, "<deep>": "[" * 200_000})
        known["<alert>"] = self.ok("GET", "/alerts")[0]["alert_id"]
        known["<251>"] = json.dumps([{"event": "a"}] * 251)
        before = self.state()
        for line in RULES.strip().splitlines():
            with self.subTest(line):
                for name, text in known.items():
                    line = line.replace(name, text)
                request, _, expected = line.rpartition(" -> ")
                method, path, *body = request.split(" ", 2)
                status, *words = expected.split(" ")
                told, answer = self.call(method, path, "".join(body).encode())
                self.assertEqual(told, int(status), answer)
                for word in words:
                    self.assertIn(word, answer["error"]["message"])
        self.assertEqual(self.state(), before)


# The essence of what clients in Go, JavaScript and Python send in one tour of the API.
TOUR = """
POST /logs [{"log_id": "<id>", "agent": "go", "event": "tool.errors", "value": 1, "occurred_at":
  "0001-01-01T00:00:00Z", "meta": {"a": "b"}}] -> 200
GET /events -> 200 [Event]
PUT /events/{event_id} {"event_id": "{event_id}", "event": "tool.errors", "agent": "go", "title":
  "T", "description": "", "unit": "", "timezone": "UTC", "public": true, "share_token": "<id>",
  "user_id": "<id>", "created_at": "<now>"} -> 200 Event
GET /events/{event_id}/logs?limit=25&period=hour -> 200 [Rollup]
GET /events/{event_id}/analytics?period=1h&previous=previous_window&view=window -> 200 Analytics
POST /policies {"event_id": "{event_id}", "title": "spike", "period": "hour", "aggregate": "sum",
  "condition": "gt", "threshold": 5, "enabled": true} -> 200 Policy
PUT /policies/{policy_id} {"event_id": "", "title": "Updated", "condition": "", "threshold": 0,
  "enabled": true} -> 200 Policy
POST /destinations {"channel": "slack", "url": "https://hooks.slack.com/services/T000/B000/x",
  "scope": "all", "policy_ids": [], "enabled": true} -> 200 Destination
PUT /destinations/{destination_id} {"channel": "", "scope": "", "enabled": true} -> 200 Destination
POST /destinations/{destination_id}/test -> 200 TestResult
GET /alerts/{alert_id}/deliveries?kind=test&limit=20 -> 200 [Delivery]
GET /alerts/{alert_id} -> 404
POST /logs [{"agent": "go", "event": "tool.errors", "value": 10, "occurred_at": "<now>"}] -> 200
GET /alerts?status=triggered -> 200 [Alert]
GET /alerts/{alert_id}/deliveries?kind=alert&limit=20&offset=0 -> 200 [Delivery]
POST /alerts/{alert_id}/archive -> 200 Alert
POST /alerts/{alert_id}/acknowledge -> 422
POST /logs <500> -> 400
"""


def shapes():
    """Return the names in each object that the module's types promise."""
    found = {}
    for node in ast.walk(ast.parse(pathlib.Path(chirrop.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            bases = [name for base in node.bases for name in found.get(ast.unparse(base), [])]
            own = [line.target.id for line in node.body if isinstance(line, ast.AnnAssign)]
            found[node.name] = own + bases
    return found


class SandboxHttpTest(SandboxRulesTest):
    """The same rules over HTTP on one kept connection, and what HTTP brings with it."""

    def setUp(self):
        super().setUp()
        self.address = self.serve(lambda *request: self.sandbox(*request)).split("/")[2]
        self.connection = http.client.HTTPConnection(self.address, timeout=LONG)
        self.addCleanup(self.connection.close)

    def exchange(self, method, path, body, headers, timeout=None):
        self.connection.request(method, path, body, headers)
        answer = self.connection.getresponse()
        return answer.status, answer.read(), answer.headers

    @cases([
        ({"Content-Type": "application/json"}, "Authorization"),
        ({"Content-Type": "application/x-www-form-urlencoded"}, "authorization"),
    ])  # fmt: skip
    def test_a_tour_of_the_api_by_clients_of_other_makes(self, headers, auth):
        self.sandbox.reset()
        names_of, known = shapes(), {}  # "{event_id}" and its like -> the one seen last
        for line in TOUR.replace("\n  ", " ").strip().splitlines():
            request, _, expected = line.rpartition(" -> ")
            for name, found in known.items():
                request = request.replace(name, found)
            request = request.replace("<now>", f"{self.now:%Y-%m-%dT%H:%M:%S}.207006441Z")
            request = request.replace("<500>", json.dumps([{"event": "a", "value": 1}] * 500))
            method, path, *body = request.replace("<id>", str(uuid.uuid4())).split(" ", 2)
            body = body[0].encode() if body else None
            sent = {**headers, auth: "Bearer chp_tour"}
            status, content, _ = self.exchange(method, "/v1.0" + path, body, sent)
            told, _, kind = expected.partition(" ")
            self.assertEqual(status, int(told), (request, content))
            if kind:
                answer = json.loads(content)
                for item in answer if kind.startswith("[") else [answer]:
                    self.assertEqual(set(item), set(names_of[kind.strip("[]")]))
                    known.update((f"{{{n}}}", item[n]) for n in item if n.endswith("_id"))
        [policy], [place] = (self.ok("GET", path) for path in ("/policies", "/destinations"))
        kept = policy["condition"], place["channel"], place["scope"]
        self.assertEqual(kept, ("gt", "slack", "all"))

    def test_a_body_in_chunks_is_taken_and_the_connection_kept(self):
        for _ in range(2):
            body = iter([b'[{"event":"a",', b'"value":1}]'])
            headers = {"Authorization": "Bearer chp_x"}
            self.connection.request("POST", "/v1.0/logs", body, headers, encode_chunked=True)
            used = self.connection.sock
            answer = self.connection.getresponse()
            self.assertEqual((answer.read(), answer.headers["Content-Length"]), (b"", "0"))
        self.assertEqual((self.connection.sock, len(self.sandbox.logs)), (used, 2))

    def test_a_client_that_waits_for_100_continue_gets_it(self):
        with socket.create_connection(self.address.split(":"), LONG) as client:
            head = b"POST /v1.0/logs HTTP/1.1\r\nAuthorization: Bearer chp_x\r\nContent-Length: 25"
            client.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
            self.assertEqual(client.recv(1000), b"HTTP/1.1 100 Continue\r\n\r\n")
            client.sendall(b'[{"event":"a","value":1}]')
            self.assertTrue(client.recv(1000).startswith(b"HTTP/1.1 200 OK\r\n"))

    def test_health_checks_need_no_key_and_head_is_get_without_the_body(self):
        self.sandbox.fail(None, status=503, path="/health")
        for method in ("GET", "HEAD", "OPTIONS"):
            self.assertEqual(self.exchange(method, "/health", None, {})[:2], (200, b""))
        self.assertEqual(self.exchange("OPTIONS", "/v1.0/logs", None, {})[0], 200)
        self.assertEqual(self.sandbox.requests, [])
        with socket.create_connection(self.address.split(":"), LONG) as client:
            client.sendall(b"HEAD /v1.0/events HTTP/1.0\r\nAuthorization: Bearer chp_x\r\n\r\n")
            whole = client.makefile("rb").read()
        self.assertRegex(whole, b"(?s)^HTTP/1.1 200 .*Content-Length: 2\r\n\r\n$")


class SandboxAgainstSdkTest(SandboxCase):
    """The sandbox's rules and the SDK's, which know nothing of each other, on the same input."""

    LOGS = rounds(300, 20_000)
    TEXTS = ("", " ", "\t\n", "a", " a.b ", "\x1c", "\u2003", "\u200b", "\ud800", "\0", "x" * 5000)
    OTHERS = (None, 5, 0, True, False, [], {}, ["a"], {"a": 1}, "", " ", "1")
    BIG = int(sys.float_info.max)
    NUMBERS = (0, -0.0, 1.5, -3, 2**63, 1e-320, 1e308, BIG, -BIG, BIG + 2**969, 10**300)
    NO_NUMBERS = (10**400, BIG + 2**970, float("nan"), float("inf"))
    METAS = ("x" * 1022, "x" * 1023, "é" * 511, "\n" * 511, '"' * 512, "\u2028" * 340, [1] * 512,
             *({str(n): n for n in range(size)} for size in (0, 10, 11)), {"k": "\U0001f600" * 254},
             {"a": {"\udfff": 1}}, [float("inf")])  # fmt: skip

    def random_log(self, rng):
        """Return a log that is good but for about one field."""
        at = self.now + timedelta(days=rng.choice((-30, 1, -9)))
        at += timedelta(microseconds=rng.choice((0, 1, -1, 10**6, -(10**6), 10**11)))
        zone = timezone(timedelta(minutes=rng.choice((0, 330, -765, 1439))))
        moment, log_id = at.astimezone(zone).isoformat(), str(uuid.UUID(int=rng.getrandbits(128)))
        log = {"event": "a.b", "value": rng.choice(self.NUMBERS), "log_id": log_id}
        log["occurred_at"] = self.at()
        for name, pool in (
            ("event", self.TEXTS), ("agent", self.TEXTS), ("value", self.NO_NUMBERS + self.NUMBERS),
            ("log_id", (log_id, f" {log_id.upper()} ", log_id[1:], log_id + "0", "g" + log_id[1:])),
            ("occurred_at", (moment, moment[:19], moment[:10])), ("meta", self.METAS),
        ):  # fmt: skip
            if rng.random() < 0.2:
                log[name] = rng.choice(pool)
                if name != "meta" and rng.random() < 0.2:
                    log[name] = rng.choice(self.OTHERS)
        return log

    def taken(self, body):
        """Return the log as the sandbox keeps it, or None where it refuses it."""
        self.sandbox.reset()
        self.call("POST", "/logs", b"[%b]" % body)
        return self.sandbox.logs[0] if self.sandbox.logs else None

    def difference(self, log):
        """Return where the two part on a log, or None."""
        raw = self.taken(json.dumps(log).encode())
        try:
            sent = bytes(Log(**log)._body)
        except ChirrOpValidationError as exc:
            return raw and f"the sandbox takes what the SDK refuses: {exc}"
        kept = self.taken(sent)
        if kept != {"agent": "", **json.loads(sent.replace(b".000000Z", b"Z"))}:
            return "the sandbox refuses or changes what the SDK sends"
        if raw is None:
            return "the sandbox refuses what the SDK takes"
        for made in ("log_id", "occurred_at"):
            if not str(log[made] or "").strip():
                raw.pop(made), kept.pop(made)
        return None if raw == kept else f"{raw} is not {kept}"

    def test_they_part_on_none_of_thousands_of_random_logs(self):
        rng = random.Random(1)
        pairs = ((self.difference(log), log) for log in map(self.random_log, [rng] * self.LOGS))
        found = [f"{difference}\n    {log!r:.300}" for difference, log in pairs if difference]
        self.assertEqual(found[:20], [])


# ---- Command line ---------------------------------------------------------


class CommandLineTest(ServerTestCase):
    """Commands against a sandbox on loopback: in this process, where that makes no difference."""

    def setUp(self):
        super().setUp()
        self.sandbox, self.cwd = Sandbox(), self.folder()
        self.base = self.serve(self.sandbox)
        os.environ.update(CHIRROP_API_KEY="chp_canary", PYTHONPATH=str(HERE), COLUMNS="80")
        os.environ["CHIRROP_API_ENDPOINT"] = f"{self.base}/logs"
        os.environ["CHIRROP_SERVICER_ENDPOINT"] = self.base
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.cwd)

    def cli(self, *args, status=0, input="", encoding="utf-8", **env):
        """Run a command; return what it wrote on standard output and on standard error."""
        data = input if isinstance(input, bytes) else input.encode()
        pipes = {"stdin": io.BytesIO(data), "stdout": io.BytesIO(), "stderr": io.BytesIO()}
        streams = {name: io.TextIOWrapper(pipe, encoding) for name, pipe in pipes.items()}
        streams["stderr"].reconfigure(errors="backslashreplace")  # as Python has it
        with mock.patch.multiple(sys, **streams), mock.patch.dict(os.environ, env):
            try:
                code = chirrop.main([*map(str, args)])
            except SystemExit as exc:
                code = exc.code or 0
        for stream in streams.values():
            stream.flush()
        out, err = (pipes[name].getvalue().decode() for name in ("stdout", "stderr"))
        self.assertNotRegex(out + err, "chp_canary|Traceback")
        self.assertEqual(code, status, (args, out, err))
        return out, err

    def json(self, *args, **options):
        return json.loads(self.cli(*args, "--json", **options)[0])

    def process(self, *args, **options):
        command = [sys.executable, "-W", "error", "-m", "chirrop", *map(str, args)]
        return self.begin(command, text=False, stdin=subprocess.PIPE, **options)

    def send(self, *values, event="a.b", **fields):
        with new_client() as client:
            client.send_logs([Log(event, value, **fields) for value in values])

    def spool(self, count):
        """Return the path of a spool in which a client left this many logs."""
        path = self.cwd / "events.spool"
        client = new_client(transport=FakeTransport(default=ConnectionRefusedError()), spool=path)
        for number in range(count):
            client.log(Log("spooled", number))
        client.close(0)
        return path

    def test_every_command_has_help_that_tells_the_retries(self):
        for command in re.findall(r"_cmd_(\w+)", " ".join(vars(chirrop))):
            self.assertIn("--retries=3", self.cli(command, "--help")[0])

    @cases([
        ("a.b", 1), ("a.b -1e5", -1e5), ("a.b -1e-05", -1e-05), ("a.b -.5", -0.5),
        ("--agent -north a.b -5", -5), ("a.b 2.5 --meta [-1]", 2.5), ("a.b --meta -1 0", 0),
    ])  # fmt: skip
    def test_values_may_begin_with_a_dash_and_options_stand_anywhere(self, args, value):
        out, err = self.cli("log", *args.split())
        sent = self.sandbox.logs[-1]
        self.assertEqual((out, err), (f"delivered {sent['log_id']}\n", ""))
        self.assertEqual((sent["event"], sent["value"]), ("a.b", value))
        self.assertEqual(sent.get("agent") or "", "-north" if "-north" in args else "")

    @cases([
        "", "nope", "log", "log x abc", "log x nan", "log x 1 2", "log x --meta {",
        "log - --agent a", "log x --log-id 7", "log - --id-from", "log x --retries -1", "drain no",
        "rollups x --period year", "alerts ack", "alerts --status new", "sandbox --port x",
    ])  # fmt: skip
    def test_usage_errors_exit_with_2_and_print_nothing_on_standard_output(self, args):
        self.send(1, event="x")
        out, err = self.cli(*args.split(), status=2)
        self.assertEqual((out, err > ""), ("", True))
        self.assertEqual({log["event"] for log in self.sandbox.logs}, {"x"})

    def test_failures_are_one_line_and_a_wrong_path_names_url_variable_and_doctor(self):
        err = self.cli("events", status=2, CHIRROP_API_KEY="")[1]
        self.assertRegex(err, r"^chirrop: API key is required: give .*\./\.env\n$")
        wrong = self.base.replace("v1.0", "wrong")
        for args, name in (("log x", "CHIRROP_API"), ("events", "CHIRROP_SERVICER")):
            err = self.cli(*args.split(), status=1, **{f"{name}_ENDPOINT": wrong})[1]
            self.assertRegex(err, rf"^chirrop: HTTP 404: .*{wrong}.*`chirrop doctor`.*{name}_.*\n$")
        self.sandbox.fail(status=403, body={"error": "not\x1b[2J you"})
        self.assertEqual(self.cli("events", status=1)[1], "chirrop: HTTP 403: not\\x1b[2J you\n")
        self.sandbox.fail(status=401, body={"error": "bad key chp_canary"}, path="/events")
        self.assertIn("401: bad key ***. The key is wrong", self.cli("doctor", status=1)[0])
        self.assertIn("delivered ", self.cli("log", "x", CHIRROP_DISABLED="1")[0])

    def test_each_line_is_accounted_for_and_the_first_bad_ones_of_each_kind_are_shown(self):
        old = '{{"event":"a","value":1,"occurred_at":"{}-01-01"}}\n'
        old = b"".join(old.format(year).encode() for year in range(9))
        lines = b'\xef\xbb\xbf{"event":"a","value":1}\r\n\n \nno\n{"event":"b","value":"x"}\n[]\n'
        lines += b'{"event":"c","value":2,"nope":1}\n{"event":"d"}\n\xff\n' + b"[" * 100000 + b"\n"
        last = b'{"event":"e","value":2,"agent":"f","meta":{"g":1}}'
        out, err = self.cli("log", "-", status=1, input=lines + old + last)
        self.assertEqual(out, "20 lines: 3 delivered, 15 bad, 0 dropped, 2 blank\n")
        shown = [4, 5, 6, 7, 9, 10, 11, 12, 13]
        self.assertEqual(re.findall(r"line (\d+): ", err), [*map(str, shown)])
        self.assertRegex(err.splitlines()[-1], r"^chirrop: and 6 more lines: occurred_at")
        self.assertEqual([log["event"] for log in self.sandbox.logs], ["a", "d", "e"])
        utf_16 = '{"event":"a","value":1}\r\n'.encode("utf-16")
        self.assertRegex(self.cli("log", "-", status=1, input=utf_16)[1], "^chirrop: UTF-16, .*\n$")

    def test_rows_sent_twice_count_once_when_their_ids_are_derived(self):
        row = '{"event":"orders","value":%d,"agent":"shop","meta":{"order":%d}}\n'
        for _ in range(2):
            self.cli("log", "-", "--id-from", "meta.order", input=row % (1, 17) + row % (1, 18))
        expected = str(uuid.uuid5(uuid.NAMESPACE_URL, '["shop","orders",17]'))
        self.assertEqual((len(self.sandbox.logs), ids(self.sandbox.logs)[0]), (2, expected))
        args = "log", "-", "--id-from", "meta.order", "value"
        err = self.cli(*args, status=1, input='{"event":"a","value":1}\n')[1]
        self.assertEqual(err, "chirrop: line 1: log_id cannot be made: no meta.order or value\n")

    def test_what_the_service_rejects_is_told_and_a_refusal_stops_the_stream(self):
        self.sandbox.reject(lambda log: log["value"] == 7)
        lines = "".join(f'{{"event":"a","value":{n}}}\n' for n in range(20))
        told = "".join(self.cli("log", "-", status=1, input=lines))
        self.assertRegex(told, "^20 lines: 19 delivered, 0 bad, 1 dropped, 0 blank\n.*HTTP 400")
        self.sandbox.fail(None, status=401, body={"error": "invalid API key"}, path="/logs")
        told = "".join(self.cli("log", "-", status=1, input=lines * 2000))
        self.assertRegex(told, r"lines: 0 delivered, 0 bad, [1-9](.|\n)*HTTP 401: invalid API key")
        self.assertLess(len(self.sandbox.requests), 20 * 2000 / 250)

    def test_ctrl_c_ends_it_with_what_was_read(self):
        end = self.process("log", "-")
        end.process.stdin.write(b'{"event":"a","value":1}\nbad\n')
        end.process.stdin.flush()
        self.assertIn(b"line 2", end.process.stderr.readline())  # it waits for line 3 now
        end.process.send_signal(signal.SIGINT)
        done, told = end(), b"2 lines: 1 delivered, 1 bad, 0 dropped, 0 blank\n"
        self.assertEqual((done.stdout, done.stderr), (told, b"chirrop: stopped: interrupted\n"))

    def test_a_log_with_a_spool_is_safe_for_the_next_run(self):
        self.sandbox.fail(None, status=500)
        args = "log", "a.b", "--retries", 0, "--spool", "events.spool"
        told = "".join(self.cli(*args, status=1))
        self.assertRegex(told, "^not delivered: (.|\n)*1 logs are safe in events.spool, for its")
        self.sandbox.reset()
        self.assertRegex(self.cli(*args)[0], "^delivered ")
        self.assertEqual(len(self.sandbox.logs), 2)  # the first run's, too

    def test_drain_delivers_and_says_what_is_left_and_where_dead_letters_wait(self):
        path = self.spool(5)
        self.sandbox.fail(None, status=401, path="/logs")
        told = "".join(self.cli("drain", path, status=1))
        self.assertRegex(told, f"^0 delivered, 5 left, 0 dead(.|\n)*5 logs are safe in {path}")
        self.sandbox.reset()
        self.sandbox.reject(lambda log: log["value"] == 3)
        out, err = self.cli("drain", path, status=1)
        self.assertEqual(out, "4 delivered, 0 left, 1 dead letters\n")
        self.assertIn(f"`jq -c .log {path}.dead.jsonl | chirrop log -` sends them again", err)
        letter = json.loads(pathlib.Path(f"{path}.dead.jsonl").read_text())
        self.assertEqual((letter["log"]["value"], len(self.sandbox.logs)), (3, 4))

    def test_drain_names_files_that_a_running_client_holds(self):
        path = self.spool(5)
        code = "import chirrop, sys; c = chirrop.new_client(spool=sys.argv[1], flush_delay=60)\n"
        code += "c.log(chirrop.Log('held', 1)); print('ready', flush=True); sys.stdin.read()"
        holder = self.begin_python(code, path, stdin=subprocess.PIPE)
        holder.process.stdout.readline()
        err = self.cli("drain", path)[1]
        self.assertIn(f"{path} is in use: the client that holds it sends what is in it", err)

    def test_events_alerts_and_calls_are_shown(self):
        self.send(1, agent="shop")
        event_id = self.json("events")[0]["event_id"]
        self.assertIn(f"{event_id}  shop   a.b\n", self.cli("events")[0])
        rule = {"event_id": event_id, "title": "too \x1b[31m many", "period": "day", "threshold": 5}
        rule = json.dumps({**rule, "aggregate": "sum", "condition": "gt"})
        self.cli("api", "POST", "/policies", "--data", rule)
        self.send(1234567.25, agent="shop")
        self.assertRegex(self.cli("alerts")[0], r"triggered .* 1,234,568.25 .*too \\x1b\[31m many")
        alert_id = self.json("alerts")[0]["alert_id"]
        self.cli("alerts", "ack", alert_id)
        self.assertEqual(len(self.json("alerts", "--status", "acknowledged")), 1)
        path = f"/v1.0/events/{event_id}/logs?period=day&limit=3"
        self.assertEqual(json.loads(self.cli("api", "get", path)[0])[0]["count"], 2)

    def test_rollups_are_charted_from_the_oldest_on_and_days_are_those_of_the_events_zone(self):
        now = datetime.now(timezone.utc)
        for days, value in ((0, 10), (1, 40), (2, -20)):
            self.send(value, agent="büro", occurred_at=now - timedelta(days=days))
        with new_client() as client:
            client.update_event(client.list_events()[0]["event_id"], {"timezone": "Asia/Kolkata"})
        head, _, *lines = self.cli("rollups", "a.b", "--period", "day")[0].splitlines()
        self.assertEqual(head, "büro a.b: by day, in Asia/Kolkata")
        first = now + timedelta(hours=5.5) - timedelta(days=2)
        self.assertEqual(lines[0][:11], f"{first:%m-%d} 00:00")
        self.assertEqual([line.count("#") for line in lines], [25, 50, 13])
        self.assertEqual(len(self.json("rollups", "a.b", "--period=day", "--limit=2")), 2)
        self.assertIn("b\\xfcro", self.cli("rollups", "a.b", encoding="ascii")[0])
        self.assertRegex(self.cli("analytics", "a.b")[0], "current_value +10\n")
        self.assertIn("`chirrop events` lists", self.cli("rollups", "b", status=1)[1])

    @cases([
        ({"CHIRROP_API_ENDPOINT": "x.y"}, "CHIRROP_API_ENDPOINT.* an absolute http or https", 2),
        ({"CHIRROP_API_ENDPOINT": "{base}"}, "404: .* Check the path of CHIRROP_API_ENDPOINT", 1),
        ({"CHIRROP_SERVICER_ENDPOINT": "http://x.invalid"}, "no address: check CHIRROP_SERV", 1),
        ({"CHIRROP_API_ENDPOINT": "http://127.0.0.1:1/"}, "Nothing listens there: check CHIRR", 1),
        ({"CHIRROP_API_ENDPOINT": "https{port}/"}, "TLS handshake failed: check CHIRROP_API", 1),
        ({"HTTP_PROXY": "http://127.0.0.1:1", "ALL_PROXY": "socks5://y", "no_proxy": "10.0.0.0/8"},
         "127.0.0.1:1: .*Proxies are in .*no SOCKS, no ALL_PROXY.*NO_PROXY no networks", 1),
        ({"CHIRROP_API_ENDPOINT": "{tls}", "SSL_CERT_FILE": "no.pem"},
         "not trusted: .* SSL_CERT_FILE=no.pem is no file of CAs: .*No such file", 1),
        ({"CHIRROP_SERVICER_ENDPOINT": "{late}"}, r"the clock is \+[\d,]{11,} s off", 1),
        ({}, "ok   answers as it should .*\nok   answers as it should .*/v1.0/events", 0),
    ])  # fmt: skip
    def test_doctor_tells_each_fault_with_its_cure_and_sends_no_log(self, env, expected, status):
        tls = self.server(tls=self.certificate()[1])
        late = self.server(default=answer(200, [], Date="Thu, 01 Jan 1971 00:00:00 GMT"))
        urls = {"tls": tls.url, "late": late.url}
        urls.update(base=self.base, port=self.base[4:].partition("/v1")[0])
        env = {name: value.format(**urls) for name, value in env.items()}
        self.assertRegex("".join(self.cli("doctor", status=status, **env)), expected)
        self.assertEqual(self.sandbox.logs, [])

    def test_sandbox_serves_what_its_exports_say(self):
        end = self.process("sandbox", "--port", 0)
        exports = [end.process.stdout.readline().decode().split()[1] for _ in range(3)]
        self.cli("log", "x", **dict(line.split("=") for line in exports))
        end.process.send_signal(signal.SIGINT)
        self.assertEqual((end().stderr, self.sandbox.logs), (b"", []))

    @unittest.skipUnless(hasattr(os, "openpty"), "needs pseudo-terminals")
    @cases([("40", "drain events.spool"), ("80", "events"), ("40", "rollups か")])
    def test_a_terminal_shows_progress_and_no_line_of_a_table_is_wider(self, columns, command):
        self.send(3, -4, event="か", agent="ひらがな" * 20)
        if "spool" in command:
            self.spool(600)
        self.sandbox.fail(delay=0.3, path="/logs")
        main, other = os.openpty()
        env = {**os.environ, "COLUMNS": columns, "TERM": "dumb"}
        end = self.process(*command.split(), stdout=other, stderr=other, env=env)
        os.close(other)
        text = b""
        with contextlib.suppress(OSError), open(main, "rb", buffering=0) as screen:
            while piece := screen.read(65536):
                text += piece
        self.assertEqual(end().returncode, 0, text)
        for line in re.split(r"[\r\n]+", text.decode())["rollups" in command :]:
            self.assertLessEqual(chirrop._width(line), int(columns))
        if "spool" in command:
            self.assertRegex(text, rb"\r\d+ delivered, \d+/s, \d+ waiting")

    def test_demo_accounts_for_each_log_whatever_the_environment_says(self):
        env = {**os.environ, "CHIRROP_DISABLED": "1", "CHIRROP_API_ENDPOINT": "ftp://x"}
        done = self.process("demo", env=env)()
        out = done.stdout.decode()
        self.assertEqual(done.returncode, 0, out)
        dropped = "5,001 = delivered 5,000 + dropped {'rejected': 1}"
        for line in (dropped, "(one of 3 events)", "the next client delivered 100"):
            self.assertIn(line, out)


# ---- Hostile answers ------------------------------------------------------


class HostileTest(ServerTestCase):
    """What a server or a transport could do to the application, and does not."""

    @cases([
        ("silence", hang),
        ("a header without end", drip(b"HTTP/1.1 200 OK\r\nX: ")),
        ("a body without end", drip(answer(Content_Length=None))),
        ("a chunk without end", drip(chunked() + b"ffff\r\n")),
        ("100 for ever", drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.001)),
    ])  # fmt: skip
    def test_flush_and_close_keep_their_deadlines_and_the_client_goes_on(self, _, behaviour):
        server = self.server(default=behaviour)
        client, other = self.real(server, timeout=LONG), self.real(server, timeout=LONG)
        started = time.monotonic()
        for one, wait in ((client, client.flush), (other, other.close)):
            one.log(Log("a.b.count", 1))
            self.assertFalse(wait(0.05))
        self.assertLess(time.monotonic() - started, LONG / 2)
        self.assertEqual(other.stats().dropped, {"closed": 1})
        server.default = answer()
        for connection in server.connections:
            connection.sock.shutdown(socket.SHUT_RDWR)
        self.assertTrue(ship(client))
        self.assertEqual(client.stats().delivered, 2)

    @cases([
        *((None,), (("ok", b"", {}),), ((200, "text", {}),), ((200, b"", None),)),
        *((OSError("down"),), (RecursionError("deep"),), (StopIteration(),)),
    ])  # fmt: skip
    def test_nonsense_of_a_transport_of_ones_own_is_no_answer(self, nonsense):
        client = self.client((lambda body: nonsense) if nonsense is None else nonsense)
        self.assertTrue(ship(client))
        self.assertEqual((client.stats().delivered, client.stats().retries), (1, 1))
        self.assertIs(type(client.stats().last_error), chirrop.ChirrOpTransportError)


# ---- Portability ----------------------------------------------------------


class PortabilityTest(ServerTestCase):
    """The ways to carry the file about: each in a process of its own, far from this folder."""

    USE = """
s = chirrop.Sandbox()
with chirrop.new_client(api_key='chp_x', transport=s) as c: c.log(chirrop.Log('a.b', 1))
print(len(s.logs), chirrop.__version__)
"""
    FINE = f"1 {chirrop.__version__}\n"
    LATE = "urllib ssl sqlite3 argparse http email logging typing random uuid socket select"
    LATE += " inspect dataclasses zoneinfo shutil asyncio multiprocessing"

    def begin_far_away(self, code, flags="-S"):
        """Begin a program with two copies; return a function that returns what it prints."""
        folder = self.folder()
        (folder / "myapp" / "_vendor").mkdir(parents=True)
        shutil.copy(chirrop.__file__, folder / "chirrop.py")
        shutil.copy(chirrop.__file__, folder / "myapp" / "_vendor" / "chirrop.py")
        code = f"import os, sys; sys.path.insert(0, {str(folder)!r})\n{code}"
        command = [sys.executable, "-I", *flags.split(), "-c", code]
        end = self.begin(command, cwd=self.folder())

        def printed():
            done = end()
            self.assertEqual(done.stderr, "")
            return done.stdout

        return printed

    def test_it_works_in_another_package_twice_and_under_every_flag(self):
        code = f"from myapp._vendor import chirrop; first = chirrop.Log{self.USE}"
        code += f"import chirrop; assert first is not chirrop.Log{self.USE}"
        flags = ["-S -OO -B -W error", "-O -bb -X dev -X utf8=0"]
        flags += rounds([], ["", "-S", "-O", "-OO", "-X dev", "-W error", "-bb", "-X utf8=0"])
        begun = [self.begin_far_away(code, line) for line in flags]
        self.assertEqual([end() for end in begun], [self.FINE * 2] * len(flags))

    def test_it_does_without_what_is_missing_or_says_what_it_needs(self):
        client = "c = chirrop.new_client(api_key='chp_x', servicer_retries=0, %s)\n"
        plain = client % f"api_endpoint='{self.server().url}'"
        secure = client % "servicer_endpoint='https://chirrop.invalid'"
        begun = []
        for missing, code, wanted in (
            ("ssl _ssl sqlite3 _ctypes ctypes fcntl", self.USE, self.FINE),
            ("", "os.rmdir(os.getcwd())" + self.USE, self.FINE),
            ("", f"print([name for name in {self.LATE.split()} if name in sys.modules])", "[]"),
            ("ssl _ssl", plain + "c.log(chirrop.Log('a', 1)); print(c.close())", "True"),
            ("ssl _ssl", secure + "c.list_events()", "ssl"),
            ("sqlite3", client % "spool=chirrop.SqliteSpool('x', required=True)", "sqlite3"),
        ):
            begin = "sys.excepthook = lambda kind, error, frames: print(error)\n"
            begin += f"sys.modules.update(dict.fromkeys({missing.split()})); import chirrop\n"
            begun.append((wanted, self.begin_far_away(begin + code)))
        for wanted, printed in begun:
            self.assertIn(wanted, printed())


# ---- The file itself ------------------------------------------------------

# Code lines and tokens of each section; who adds a line takes one away in the same commit.
BUDGET = {
    "Header": (27, 101),
    "Limits and vocabularies": (51, 403),
    "Errors": (47, 278),
    "Log": (136, 1121),
    "Config": (105, 939),
    "Retry policy": (96, 890),
    "Delivery": (472, 4179),
    "Spool": (322, 2545),
    "Transport": (155, 1291),
    "Shapes": (98, 415),
    "Client": (310, 3184),
    "Global API": (27, 251),
    "Sandbox": (367, 3997),
    "Command line": (343, 3276),
    "Licence": (3, 21),
}


def sections(text):
    """Return the text of each section by its name; it ends where the next banner begins."""
    parts = re.split(r"(?m)^# ---- (.+?) -+$", text)
    return {"Header": parts[0], **dict(zip(parts[1::2], parts[2::2]))}


def size(text):
    """Return the lines of code, without blanks, comments and docstrings, and the tokens there."""
    skip = set("COMMENT NL NEWLINE INDENT DEDENT ENDMARKER FSTRING_MIDDLE FSTRING_END".split())
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    docs = [node.body[0] for node in nodes if ast.get_docstring(node) is not None]
    documented = {line for doc in docs for line in range(doc.lineno, doc.end_lineno + 1)}
    lines, tokens, inside = set(), 0, 0  # an f-string is one token, as before Python 3.12
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        inside -= kind == "FSTRING_END"
        if kind not in skip and token.start[0] not in documented:
            lines.update(range(token.start[0], token.end[0] + 1))
            tokens += not inside
        inside += kind == "FSTRING_START"
    return len(lines), tokens


def height(*paths):
    """Return the number of lines of those of these files that there are."""
    return sum(path.read_text("utf-8").count("\n") for path in paths if path.is_file())


def names(code, *operations):
    return {step.argval for step in dis.get_instructions(code) if step.opname in operations}


def uses(text):
    """Return three sets: the global names that a text defines, those it uses, and its imports."""
    codes = [compile(text, "chirrop.py", "exec", annotations.compiler_flag)]
    used, imported = set(), set()
    for code in codes:  # those within a code are appended to the list
        codes += [inner for inner in code.co_consts if isinstance(inner, types.CodeType)]
        used |= names(code, "LOAD_NAME", "LOAD_GLOBAL") - names(code, "STORE_NAME")
        imported |= names(code, "IMPORT_NAME")
    defined = names(codes[0], "STORE_NAME", "STORE_GLOBAL")
    return defined, used, {name.split(".")[0] for name in imported}


class ModuleTest(TestCase):
    """What a security reviewer and a person who vendors the file rely on."""

    SOURCE = pathlib.Path(chirrop.__file__).read_text(encoding="utf-8")
    SDK = SOURCE.partition("\n# ---- Sandbox -")[0]

    def test_each_section_and_the_whole_keep_their_budgets(self):
        found = {name: size(text) for name, text in sections(self.SOURCE).items()}
        most = {name: BUDGET.get(name, (0, 0)) for name in found}
        over = [n for n in found if found[n][0] > most[n][0] or found[n][1] > most[n][1]]
        table = "".join(f'    "{name}": {found[name]},\n' for name in found)
        self.assertEqual(over, [], f"what they are now:\nBUDGET = {{\n{table}}}")
        both = [*found.values()]
        sdk, here = both[: [*found].index("Sandbox")], pathlib.Path(__file__)
        readme, ci = here.with_name("README.md"), here.with_name(".ci")
        for what, count, limit in (
            ("code lines of the SDK", sum(lines for lines, _ in sdk), 1850),
            ("tokens of the SDK", sum(tokens for _, tokens in sdk), 15600),
            ("lines of chirrop.py", self.SOURCE.count("\n"), 3950),
            ("tokens of chirrop.py", sum(tokens for _, tokens in both), 22900),
            ("lines of the tests", height(here), 4800),
            ("tokens of the tests", size(here.read_text("utf-8"))[1], 40000),
            ("lines of README.md", height(readme), 380),
            ("lines of .ci", height(*ci.glob("*"), *ci.glob("wheel/*")), 700),
            ("columns of chirrop.py", max(map(len, self.SOURCE.splitlines())), 100),
        ):
            with self.subTest(what):
                self.assertLessEqual(count, limit)

    def test_sections_use_only_what_stands_above_them_and_the_standard_library(self):
        known = {*vars(importlib.import_module("builtins")), "__file__", "__annotations__"}
        for name, text in sections(self.SOURCE).items():
            defined, used, imported = uses(text)
            known |= defined
            self.assertEqual(used - known, set(), name)
            library = getattr(sys, "stdlib_module_names", imported)  # from 3.10 on
            self.assertLessEqual(imported - {"typing_extensions"}, library)  # of type checkers

    def test_the_public_names_are_exactly_those_listed(self):
        own = {n for n, v in vars(chirrop).items() if getattr(v, "__module__", "") == "chirrop"}
        public = {name for name in own if not name.startswith("_")} - {"main"}
        self.assertEqual(public, {*chirrop.__all__} - {"__version__"})

    def test_what_the_file_touches_is_where_its_header_says(self):
        places = {
            "Config": "os.environ.get open",
            "Delivery": "threading.Thread logging.getLogger atexit.register os.register_at_fork",
            "Spool": "sqlite3.connect os.open os.replace os.unlink open",
            "Transport": "urllib.request.OpenerDirector http.client.HTTPConnection"
            " http.client.HTTPSConnection socket.getaddrinfo",
        }
        watched = set(" ".join(places.values()).split())
        danger = r"(eval|exec|compile|__import__|(subprocess|os\.system|pickle|marshal|ctypes)\b.*)"
        for section, text in sections(self.SDK).items():
            nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
            found = {ast.unparse(node.func) for node in nodes}
            self.assertEqual(found & watched, set(places.get(section, "").split()), section)
            self.assertEqual([call for call in found if re.fullmatch(danger, call)], [])
        self.assertEqual(self.SDK.count("os.environ"), self.SDK.count("os.environ.get("))

    def test_the_doors_that_the_design_has_shut_stay_shut(self):
        doors = "_getframe|_is_owned|tb_frame|f_locals|f_code|c_make_encoder|threading.Event"
        self.assertNotRegex(self.SDK, doors)
        own = re.findall(r"(?:def|class|self\.|cls\.|\() *(_\w+)", self.SDK)
        used = {n.attr for n in ast.walk(ast.parse(self.SDK)) if isinstance(n, ast.Attribute)}
        private = {name for name in used.difference(own) if re.match("_[a-z]", name)}
        self.assertEqual(private - {"_replace"}, {"_tunnel_host"})  # stands beside its reason

    def test_each_vocabulary_for_type_checkers_is_that_of_run_time(self):
        literals = re.findall(r"(?m)^    \w+ = Literal(\[.+\])$", self.SOURCE)
        tuples = [value for value in vars(chirrop).values() if isinstance(value, tuple)]
        for text in literals:
            self.assertIn(tuple(ast.literal_eval(text)), tuples)
        self.assertEqual(len(literals), 10)


class CutTest(TestCase):
    """The file ends at its cut line for who takes the SDK only: what stands above is complete."""

    SAMPLE = "ErrorTest", "PolicyTest", "GlobalTest"

    @unittest.skipUnless(shutil.which("sed"), "needs sed")
    def test_the_layer_of_the_readme_is_complete_and_passes_tests_of_the_sdk(self):
        readme = pathlib.Path(__file__).with_name("README.md").read_text(encoding="utf-8")
        [recipe] = re.findall(r"```\n(mkdir -p layer.+?)```", readme, re.DOTALL)
        [command] = re.findall(r"mkdir -p cut && (sed '.+' chirrop.py) >", ModuleTest.SOURCE)
        self.assertIn(command, recipe)
        folder = self.folder()
        shutil.copy(chirrop.__file__, folder / "chirrop.py")
        recipe = re.sub(r"python3\S*", sys.executable, recipe)
        subprocess.run(["sh", "-ec", recipe], cwd=folder, check=True)
        layer = folder / "layer" / "python"
        source = (layer / "chirrop.py").read_text(encoding="utf-8")
        self.assertIn("WITHOUT WARRANTY OF ANY KIND", source)
        imported = re.findall(r"(?m)^import (\w+)", source)
        self.assertEqual([name for name in imported if f"{name}." not in source], [])
        code = f"""if True:
            import sys; sys.path[:0] = [sys.argv.pop(), {str(pathlib.Path(__file__).parent)!r}]
            import chirrop, unittest
            from chirrop import *
            assert not hasattr(chirrop, "Sandbox")
            "zip" in chirrop.__file__ or unittest.main("test_chirrop", argv=["", *{self.SAMPLE}])
        """
        for arguments, status, said in (
            (["-c", code, str(layer)], 0, "OK"),
            (["-c", code, str(folder / "layer.zip" / "python")], 0, ""),
            ([str(layer / "chirrop.py"), "demo"], 2, "no command line"),
        ):
            done = self.begin([sys.executable, "-W", "error", *arguments])()
            self.assertEqual(done.returncode, status, done.stderr[-5000:])
            self.assertIn(said, done.stderr)


# ---- README ---------------------------------------------------------------

# A phrase of README, and the tests that show it.
PROMISES = {
    "sent again after a random 0 to 1, 2, 4 … 30 s": [
        "test_pauses_double_up_to_30_s_and_those_of_the_server_are_kept",
        "test_what_may_have_had_effect_is_sent_again_but_no_call_that_is_unsafe",
    ],
    "held, for a key can be renewed": ["test_what_is_final_is_held_and_tried_again_or_dropped"],
    "the batch is halved until the bad logs stand alone": [
        "test_a_bad_batch_is_halved_and_only_bad_logs_are_dropped",
        "test_a_bad_batch_is_halved_in_order",
    ],
    "sent; what cannot be sent, and what is logged later, is dropped": [
        "test_what_close_drops_is_told_once_before_it_returns_in_its_time",
        "test_a_log_put_while_close_sweeps_or_later_is_dropped_told_and_raises_nothing",
    ],
    "sent within `exit_timeout`; the rest stays in the file": [
        "test_close_without_a_timeout_takes_exit_timeout_where_the_log_is_on_disk",
        "test_clients_on_a_dead_server_take_one_exit_timeout_and_tell_what_is_not_spooled",
    ],
    "sent within `exit_timeout` (5 s), else dropped": [
        "test_exit_without_close_delivers_whatever_ends_the_program_and_keeps_its_status",
    ],
    "lost, unless `flush()` had returned True": [
        "test_os_exit_and_sigterm_lose_only_what_was_neither_flushed_nor_spooled",
    ],
    "nothing is lost that `log()` had returned for": [
        "test_processes_on_one_spool_send_each_log_once_and_lose_none_by_kills",
    ],
    "the parent keeps its logs; the child starts empty": [
        "test_a_fork_with_queued_logs_sends_each_once_and_the_child_starts_empty",
    ],
    "`log` waits up to `timeout`, then raises; `try_log` drops": [
        "test_a_full_bounded_queue_waits_for_room_then_raises",
        "test_try_log_drops_what_finds_no_room",
    ],
    "at `max_bytes` at once": [
        "test_max_bytes_bounds_the_file_and_that_of_dead_letters_and_prunes_nothing",
    ],
    "one warning; logs wait in memory, the file is tried again every 30 s": [
        "test_on_a_full_disk_logs_wait_in_memory_and_are_back_in_the_file_in_order",
    ],
    "moved aside, what it held counted as dropped": [
        "test_damaged_while_it_is_open_what_it_held_is_counted",
    ],
    "What is sent again has the same bytes": [
        "test_logs_of_four_threads_through_faults_arrive_each_once_as_they_were_logged",
    ],
    "**Nothing is dropped silently.**": [
        "test_every_log_of_a_random_history_is_delivered_or_told_once_or_held",
        "test_each_drop_is_said_once_though_a_handler_takes_long",
    ],
    "It is True only if all of that was delivered": [
        "test_a_flush_is_true_only_if_all_of_its_own_logs_were_delivered",
    ],
    "takes over what dead processes left": [
        "test_files_of_a_live_process_are_left_alone_and_taken_over_when_that_is_dead",
    ],
    "spool of yours is left as it is and refused": [
        "test_what_is_no_spool_is_left_byte_for_byte_and_refused_in_one_error",
    ],
    "Each is a program that runs as it stands": ["test_python_blocks_run_and_print_what_they_say"],
    "redirects are never followed": [
        "test_what_is_final_drops_the_log_and_raises_with_the_servers_message",
    ],
    "in no message, repr or log record of this file": [
        "test_the_key_is_in_no_error_no_record_and_no_repr",
    ],
    "a log whose `log()` returned is sent": [
        "test_exceptions_at_random_moments_reach_the_caller_and_lose_no_log",
    ],
    "logs go out at `flush()`, `close()` and exit": [
        "test_where_no_thread_can_be_had_flush_close_and_exit_send_in_their_own_thread",
    ],
}


def stand_in():
    """Return what does for flask and fastapi, where they are not installed, and for their app."""
    web = mock.MagicMock(g=types.SimpleNamespace())
    web.Flask.return_value = web.FastAPI.return_value = web
    web.before_request = web.after_request = lambda function: function
    web.get.return_value = web.middleware.return_value = lambda function: function
    return web


class ReadmeTest(TestCase):
    TEXT = pathlib.Path(__file__).with_name("README.md").read_text("utf-8")

    def rows(self, heading):
        """Return the cells of each row of a section's tables that begins with `code`."""
        part = self.TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        return [line[2:-2].split(" | ") for line in part.splitlines() if line.startswith("| `")]

    @cases(re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
    def test_python_blocks_run_and_print_what_they_say(self, block):
        for name in ("flask", "fastapi"):
            if name in block and not importlib.util.find_spec(name):
                self.addCleanup(sys.modules.pop, name)
                sys.modules[name] = stand_in()
        sandbox, shown, scope = Sandbox(), io.StringIO(), {"__name__": "readme"}
        os.environ["CHIRROP_SERVICER_ENDPOINT"] = base = self.serve(sandbox)
        os.environ.update(CHIRROP_API_KEY=KEY, CHIRROP_API_ENDPOINT=f"{base}/logs")
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder())
        now, old = datetime.now(timezone.utc), "2001-01-01T00:00Z"
        pathlib.Path("orders.csv").write_text(f"id,total,at\n17,49.00,{now}\n18,20,{old}\n")
        with redirect_stdout(shown):
            exec(compile(block, "<README>", "exec"), scope)
            self.use(scope)
        self.assertEqual(shown.getvalue().splitlines(), re.findall(r"print\(.*\)  # (.*)", block))
        if "transport=" not in block:
            sent = {log["event"] for log in sandbox.logs}
            self.assertEqual(sent, set(re.findall(r'(?:_log|Log|timer)\("([\w.]+)"', block)))

    def use(self, scope):
        """Do what a web framework, AWS or unittest does with what a block has made."""

        async def visit(lifespan):
            async with lifespan(scope["app"]):
                return await scope["timed"](None, lambda request: scope["home"]())

        if "lifespan" in scope:
            self.assertEqual(asyncio.run(visit(scope["lifespan"])), {"hello": "world"})
        if "begin" in scope:
            done = types.SimpleNamespace(status_code=500)
            with scope["app"].app_context():
                for name, *given in (("end", done), ("begin",), ("home",), ("end", done)):
                    scope[name](*given)
        if "handler" in scope:
            self.assertEqual(scope["handler"]({}, None), {"statusCode": 200})
        if "CheckoutTest" in scope:
            unittest.defaultTestLoader.loadTestsFromTestCase(scope["CheckoutTest"]).debug()
        if "client" in scope:
            scope["client"].close(LONG)

    def test_settings_and_log_arguments_are_those_of_the_signatures(self):
        rows = {row[0].strip("`"): row[1].strip('`"') for row in self.rows("Settings")}
        self.assertEqual([*rows, "return"], list(Config.__init__.__annotations__))
        defaults = dict(zip(rows, Config.__init__.__defaults__), **Config.__init__.__kwdefaults__)
        told = {name: str(default) for name, default in defaults.items() if default}
        self.assertLessEqual(told.items(), rows.items())
        fields = [row[0].strip("`") for row in self.rows("What a `Log` may be")]
        self.assertEqual([*fields, "return"], list(Client.try_log.__annotations__))

    def test_control_plane_calls_have_these_arguments_and_routes(self):
        for calls, routes in self.rows("Control plane"):
            routes = re.findall(r"`([A-Z]+ )(/[^`]*)`", routes)
            for (name, given), (method, path) in zip(re.findall(r"`(\w+)\((.*?)\)", calls), routes):
                names = re.findall(r"(?:^|, )(\w+)", given)
                self.assertEqual([*names, "return"], list(getattr(Client, name).__annotations__))
                route = re.escape(f"{method}/v1.0{path}").replace(":id", r"\{\w+\}")
                self.assertRegex(getattr(Client, name).__doc__, route + r"(?![/{\w])")

    def test_every_public_name_and_promise_is_told_and_each_promise_has_its_tests(self):
        for name in [*dir(Client), *chirrop.__all__]:
            self.assertTrue(name[0] == "_" or re.search(rf"\b{name}\b", self.TEXT), name)
        tests = {n for value in globals().values() if isinstance(value, type) for n in dir(value)}
        for phrase, names in PROMISES.items():
            self.assertIn(phrase, self.TEXT)
            self.assertLessEqual(set(names), tests)
