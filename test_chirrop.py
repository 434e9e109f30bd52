"""The tests of chirrop: standard library only, run with `python3 -m unittest`.

They stand in the order of the module. Tests use real sockets on loopback, real SQLite files, real
processes and real signals; a fake transport only where the policy itself is tested. Nothing sleeps
to wait for something: waits are for an event, with a time-out that is far longer than needed and
fails loudly.

By default the long tests run a few rounds each; with CHIRROP_TEST_FULL=1, as in .ci/run, all.
"""

from __future__ import annotations

import ast
import asyncio
import builtins
import collections
import contextlib
import copy
import dis
import email.utils
import faulthandler
import functools
import gc
import hashlib
import http.client
import importlib.util
import io
import itertools
import json
import logging
import logging.config
import math
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
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import unittest
import unittest.mock
import urllib.parse
import uuid
import warnings
import weakref
import zipfile
from contextlib import redirect_stderr
from datetime import datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from email.utils import format_datetime
from fractions import Fraction
from unittest import mock

import chirrop
from chirrop import (
    ChirrOpError,
    ChirrOpQueueFullError,
    Client,
    Config,
    Log,
    SqliteSpool,
    new_client,
)

Sandbox = getattr(chirrop, "Sandbox", None)  # CutTest runs the SDK's tests on a file without it

HERE = pathlib.Path(chirrop.__file__).resolve().parent
KEY = "chp_test"
LONG = 30.0  # seconds: a time-out that only a failure reaches
# Where objects live until a collector comes by, C's API is missing, or a signal handler runs inside
# what is C elsewhere: PyPy.
refcounted = unittest.skipUnless(sys.implementation.name == "cpython", "goes by CPython's ways")
FULL = bool(os.environ.get("CHIRROP_TEST_FULL"))
# Every instruction of every operation, under all conditions: an hour for each interpreter.
COMPLETE = bool(os.environ.get("CHIRROP_TEST_COMPLETE"))


def rounds(quick, full):
    """Return `full` if the tests run in full: a number of seeds, kills, processes, repetitions."""
    return full if FULL else quick


STRICT = rounds(["-W", "error"], ["-X", "dev", "-W", "error"])


def setUpModule():
    """Cache the module's bytecode: processes that import it start several times as fast.

    What the modules hold is left alone by all garbage collections of the tests.
    """
    if sys.dont_write_bytecode:
        with contextlib.suppress(OSError):
            py_compile.compile(chirrop.__file__)
    getattr(gc, "freeze", int)()


class FakeTransport:
    """Answer from a script, record requests; what is not scripted is answered by `default`.

    An answer is a status, a (status, body, headers) tuple, an exception to raise, or a callable of
    the body.
    """

    def __init__(self, *answers, default=200):
        self.answers, self.default, self.requests = list(answers), default, []
        self.seen = queue.Queue()  # one item a request, for tests that wait for it

    def __call__(self, method, url, body, headers, timeout):
        self.requests.append((method, url, body, dict(headers), timeout))
        self.seen.put(body)
        answer = self.answers.pop(0) if self.answers else self.default
        if callable(answer) and not isinstance(answer, type):
            answer = answer(body)
        if isinstance(answer, BaseException) or isinstance(answer, type):
            raise answer
        return answer if isinstance(answer, tuple) else (answer, b"", {})

    def logs(self):
        """Return every log of every request, in order."""
        return [log for request in self.requests if request[2] for log in json.loads(request[2])]


# For processes that must not be measured: coverage has a database of its own.
NOT_COUNTED = {"COVERAGE_PROCESS_CONFIG": "", "COVERAGE_PROCESS_START": ""}


def ids(logs):
    return [log["log_id"] for log in logs]


class TestCase(unittest.TestCase):
    """Closes what it opens; fails if a thread of ours dies or stays, or an account is off."""

    maxDiff = None

    def setUp(self):
        environment = dict(os.environ)
        self.addCleanup(lambda: (os.environ.clear(), os.environ.update(environment)))
        for name in [
            n for n in os.environ if n.startswith("CHIRROP_") or n.lower().endswith("_proxy")
        ]:
            del os.environ[name]
        logger = logging.getLogger("chirrop")
        self.records = []
        handler = logging.Handler()
        handler.emit = self.records.append
        logger.addHandler(handler)
        logger.propagate = False
        logger.setLevel(logging.DEBUG)
        self.addCleanup(logger.removeHandler, handler)
        self.addCleanup(logger.setLevel, logging.NOTSET)
        crashes, hook = [], threading.excepthook
        threading.excepthook = crashes.append
        self.addCleanup(self.assertEqual, crashes, [])
        self.addCleanup(setattr, threading, "excepthook", hook)
        self.addCleanup(self.assertNoThreads)

    def patch(self, *args):
        """Do mock.patch.object(*args) until the test ends."""
        patcher = mock.patch.object(*args)
        patcher.start()
        self.addCleanup(patcher.stop)

    def assertNoThreads(self):
        for thread in threading.enumerate():
            # One whose start was interrupted is listed for ever, and has never begun.
            if thread.name.startswith("chirrop-") and thread.ident is not None:
                thread.join(LONG)
                self.assertFalse(thread.is_alive(), thread)

    def assertBalanced(self, client):
        stats = client.stats()
        self.assertEqual(
            stats.accepted,
            stats.delivered + sum(stats.dropped.values()) + stats.queued + stats.in_flight,
            stats,
        )
        return stats

    def reported(self, client):
        """Wait until on_drop has heard of all drops."""
        client._sender.report.threads.join(time.monotonic() + LONG)

    def client(self, *answers, **fields):
        """Return a client on a FakeTransport with these answers, without jitter; it is closed."""
        fields.setdefault("transport", FakeTransport(*answers))
        fields.setdefault("api_key", KEY)
        client = new_client(**fields)
        # Backoff without jitter is no wait at all: full jitter starts at 0.
        client._outbox._rand = lambda: 0.0
        self.addCleanup(self.assertBalanced, client)
        self.addCleanup(client.close, 5)
        return client

    def folder(self, within=None):
        path = tempfile.mkdtemp(prefix="chirrop-test-", dir=within)
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
        """Start a program; return a function that waits for its end and returns what subprocess.run does.

        Programs begun together run together, which takes less time than one after another.
        """
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )

        def end(timeout=LONG):
            output = process.communicate(timeout=timeout)
            return subprocess.CompletedProcess(command, process.returncode, *output)

        self.addCleanup(process.communicate)
        self.addCleanup(process.kill)
        return end

    def begin_python(self, code, *args, env=None, **options):
        """Begin a program in a new process that can import chirrop."""
        return self.begin(
            [sys.executable, *STRICT, "-c", code, *map(str, args)],
            env={**os.environ, "PYTHONPATH": str(HERE), "PYTHONFAULTHANDLER": "1", **(env or {})},
            **options,
        )

    def python(self, code, *args, timeout=LONG, **options):
        """Run a program in a new process that can import chirrop; return the finished process."""
        return self.begin_python(code, *args, **options)(timeout)


# ---- Errors ---------------------------------------------------------------


class ErrorTest(TestCase):
    KINDS = {
        400: "BadRequest", 413: "BadRequest", 422: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound",
        500: "InternalServer", 503: "ServiceUnavailable", 408: "Server", 429: "RateLimit", 502: "Server", 504: "Server",
        599: "Server", 301: "NonRetryable", 405: "NonRetryable",
    }  # fmt: skip

    def test_each_status_has_its_error_with_status_body_and_retry_after(self):
        for status, kind in self.KINDS.items():
            with self.subTest(status):
                answer = chirrop._Answer(status, b'{"error": "because"}', {"retry-after": "7"})
                error = answer.error()
                self.assertIs(type(error), getattr(chirrop, f"ChirrOp{kind}Error"))
                self.assertEqual(
                    (error.status_code, error.body, error.retry_after),
                    (status, {"error": "because"}, 7.0),
                )

    def test_the_message_and_the_code_come_from_whatever_the_server_sent(self):
        quota = b'{"error": {"code": "QUOTA_EXCEEDED", "message": "monthly log quota exceeded"}}'
        for body, text, code in (
            (quota, "monthly log quota exceeded", "QUOTA_EXCEEDED"),
            (b'{"error": {"code": "FORBIDDEN"}}', "forbidden", "FORBIDDEN"),
            (b'{"error": {"code": "NO_SEAT", "message": " "}}', "NO_SEAT", "NO_SEAT"),
            (b'{"error": {"code": 7, "message": "m"}}', "m", None),
            (b'{"code": "C", "message": "m"}', "m", "C"),
            (b'{"error": "invalid api key"}', "invalid api key", None),
            (
                b'{"error": "Bad Request", "message": "event is required"}',
                "event is required",
                None,
            ),
            (b'{"error": "token has expired", "message": "Forbidden"}', "token has expired", None),
            (b'{"message": "no"}', "no", None),
            (b'\xef\xbb\xbf{"message": "no"}', "no", None),
            (b'{"error": ["deep"]}', '{"error": ["deep"]}', None),
            (b"plain text", "plain text", None),
            (b"", "forbidden", None),
            (b"null", "null", None),
            (b'{"message": "<html>no</html>"}', "forbidden", None),
            (b"\xff\xfe", "\ufffd\ufffd", None),
            (b"[" * 100000, "[" * 200, None),
        ):
            with self.subTest(body[:20]):
                error = chirrop._Answer(403, body).error()
                self.assertEqual((str(error), error.code), (f"HTTP 403: {text}", code))

    # Excerpts of what nginx 1.22.1 and squid 5.7 answered: status, Server, the page.
    PAGES = [
        (502, "nginx/1.22.1", "<html>\r\n<head><title>502 Bad Gateway</title></head>\r\n<body>"),
        (504, "nginx/1.22.1", "<html>\r\n<head><title>504 Gateway Time-out</title></head>\r\n"),
        (413, "nginx/1.22.1", "<html>\r\n<head><title>413 Request Entity Too Large</title></head>"),
        (403, "nginx/1.22.1", "<html>\r\n<head><title>403 Forbidden</title></head>\r\n<body>\r\n"),
        (503, "squid/5.7", '<!DOCTYPE html PUBLIC "-//W3C//DTD HTML 4.01//EN" "http://www.w3.org/'
         'TR/html4/strict.dtd">\n<html><head>\n<meta type="copyright" content="Copyright (C) 1996-'
         '2021 The Squid Software Foundation">\n<title>ERROR: The requested URL could not be'),
    ]  # fmt: skip

    def test_of_a_proxys_page_the_status_and_the_servers_name_are_told(self):
        for status, server, page in self.PAGES:
            error = chirrop._Answer(status, page.encode(), {"server": server}).error()
            phrase = http.client.responses[status].lower()
            self.assertEqual(str(error), f"HTTP {status}: {phrase} (from {server})")
            self.assertEqual((error.code, error.body), (None, page.strip()))
            bare = chirrop._Answer(status, page.encode()).error()
            self.assertEqual(str(bare), f"HTTP {status}: {phrase}")

    def test_a_redirect_tells_where_to_but_no_query(self):
        for headers, text in (
            ({}, "redirects are not followed; check the endpoint"),
            ({"location": "https://login.example/x?token=1"}, "redirects are not followed, this one"
             " leads to https://login.example/x; check the endpoint"),
        ):  # fmt: skip
            self.assertEqual(
                str(chirrop._Answer(301, b"<a>", headers).error()), f"HTTP 301: {text}"
            )

    def test_a_407_tells_where_the_proxy_came_from(self):
        advice = "the proxy wants a password: give it as http://user:password@host:port in "
        tunnel = OSError("cannot connect to p:1: Tunnel connection failed: 407 Denied")
        for environment, source in (
            ({}, "the system's settings"),
            ({"HTTP_PROXY": "http://p:1", "HTTPS_PROXY": "http://p:1"}, "HTTP{}_PROXY"),
            ({"http_proxy": "http://p:1", "https_proxy": "http://p:1"}, "http{}_proxy"),
        ):
            os.environ.update(environment)
            error = chirrop._Answer(407, b"<html>", {"server": "squid/5.7"}).error()
            self.assertEqual(str(error), f"HTTP 407: {advice}{source.format('')}")
            error = chirrop._Answer(0, cause=tunnel).error()
            self.assertEqual(
                str(error),
                f"no answer: {tunnel}; {advice}{source.format('S' if 'P' in source else 's')}",
            )

    def test_an_error_keeps_a_little_of_a_large_answer_and_tells_its_message_all_the_same(self):
        for size, kept in ((4000, dict), (5000, str), (60_000, str)):
            body = json.dumps({"error": {"code": "C", "message": "m"}, "rest": "x" * size}).encode()
            error = chirrop._Answer(400, body).error()
            self.assertEqual((str(error), error.code), ("HTTP 400: m", "C"))
            self.assertIs(type(error.body), kept)
            self.assertLessEqual(len(str(error.body)), 4096)
        self.assertEqual(len(chirrop._Answer(502, b"x" * 10**6).error().body), 4096)

    def test_what_broke_the_connection_is_told_in_one_short_line(self):
        cause = OSError("Tunnel connection failed: 503 \x1b[2J\r\n" + "x" * 100_000)
        text = str(chirrop._Answer(0, cause=cause).error())
        self.assertTrue(text.isprintable())
        self.assertLess(len(text), 600)

    def test_errors_survive_pickle_and_copy_with_all_they_carry(self):
        for name in chirrop.__all__:
            kind = getattr(chirrop, name)
            if isinstance(kind, type) and issubclass(kind, Exception):
                error = kind("text", status_code=418, code="C", body={"a": [1]}, retry_after=2.5)
                for twin in (
                    pickle.loads(pickle.dumps(error)),
                    copy.copy(error),
                    copy.deepcopy(error),
                ):
                    self.assertIs(type(twin), kind)
                    self.assertEqual(
                        (str(twin), twin.args, vars(twin)), (str(error), error.args, vars(error))
                    )

    def test_a_validation_error_is_a_value_error(self):
        self.assertTrue(issubclass(chirrop.ChirrOpValidationError, (ChirrOpError, ValueError)))


# ---- Log ------------------------------------------------------------------


class Hostile:
    def __repr__(self):
        raise RuntimeError("no repr for you")

    __str__ = __repr__


class HostileDict(dict):
    def items(self):
        raise Hostile.Error("boo")

    __iter__ = keys = items

    class Error(Exception):
        def __str__(self):
            raise RuntimeError("no text either")


Hostile.Error = HostileDict.Error


class HostileZone(tzinfo):
    def utcoffset(self, moment):
        raise RuntimeError("lost in time")


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def cycle():
    value = {}
    value["self"] = value
    return value


class LogTest(TestCase):
    def refused(self, word, **fields):
        with self.assertRaises(chirrop.ChirrOpValidationError) as caught:
            Log(**{"event": "a.b", "value": 1, **fields})
        self.assertIn(word, str(caught.exception))
        self.assertLess(len(str(caught.exception)), 400)
        return str(caught.exception)

    def test_what_is_given_is_what_is_sent(self):
        before = time.time()
        log = Log(" tool.errors.count ", 3, " billing ", meta={"k": [1, "ü", None]})
        sent = log.to_dict()
        self.assertEqual(list(sent), ["log_id", "event", "value", "occurred_at", "agent", "meta"])
        self.assertEqual(
            (sent["event"], sent["value"], sent["agent"]), ("tool.errors.count", 3, "billing")
        )
        self.assertEqual(sent["meta"], {"k": [1, "ü", None]})
        moment = chirrop._parse_time(sent["occurred_at"]).timestamp()
        self.assertTrue(before - 0.001 <= moment <= time.time())
        self.assertEqual(json.loads(log._body), sent)
        self.assertNotIn(b" ", log._body)
        self.assertEqual(
            (log.event, log.value, log.agent, log.log_id),
            (*list(sent.values())[1:3], "billing", sent["log_id"]),
        )

    def test_a_log_cannot_be_changed_and_equals_its_copies(self):
        log = Log("a", 1)
        for change in (
            lambda: setattr(log, "value", 2),
            lambda: delattr(log, "_body"),
            lambda: setattr(log, "x", 1),
        ):
            with self.assertRaises(AttributeError):
                change()
        log.to_dict()["value"] = 9
        for twin in (pickle.loads(pickle.dumps(log)), copy.copy(log), copy.deepcopy(log)):
            self.assertEqual((twin, hash(twin), twin.value), (log, hash(log), 1))
        self.assertNotEqual(log, Log("a", 1))
        self.assertFalse(hasattr(log, "nothing"))
        self.assertIn("event='a'", repr(log))

    def test_what_the_caller_changes_later_is_not_sent(self):
        meta = {"list": [1]}
        log = Log("a", 1, meta=meta)
        meta["list"].append(2)
        self.assertEqual(log.meta, {"list": [1]})

    def test_real_numbers_of_every_kind_are_values(self):
        class Whole(int):
            pass

        for given, sent in (
            (0, 0), (-0.0, 0.0), (1.5, 1.5), (10**300, 10**300), (2**63, 2**63), (Decimal("1.25"), 1.25),
            (Fraction(1, 4), 0.25), (Whole(7), 7), (1e-320, 1e-320),
        ):  # fmt: skip
            with self.subTest(repr(given)):
                self.assertEqual(json.loads(Log("a", given)._body)["value"], sent)

    def test_everything_else_is_not_a_value(self):
        for bad in (
            True, False, None, "1", b"1", float("nan"), float("inf"), -float("inf"), 10**400, -(10**400), 10**5000,
            1j, [], {}, set(), object(), Hostile(), Decimal("NaN"), Decimal("sNaN"), Decimal("1e999"), int, cycle(),
        ):  # fmt: skip
            with self.subTest(type(bad).__name__):
                self.refused("value must be a finite number, got ", value=bad)

    def test_event_and_agent_are_trimmed_text(self):
        self.assertEqual(Log("\t\u2003a b\n", 1, "  ").to_dict().get("agent"), None)
        for bad in (None, 1, b"x", ["a"], Hostile(), cycle()):
            self.refused("event must be a string, got ", event=bad)
            if bad is not None:
                self.refused("agent must be a string, got ", agent=bad)
        for blank in ("", " ", "\n\u2003"):
            self.refused("event must not be empty", event=blank)

    def test_text_that_is_not_unicode_is_refused_by_name(self):
        for field, value in (
            ("event", "a\ud800"),
            ("agent", "\udfff"),
            ("meta", {"k": "\ud800"}),
            ("meta", {"\udc00": 1}),
        ):
            self.refused(f"{field} must be JSON-encodable", **{field: value})

    def test_meta_is_strictly_json(self):
        for bad in (
            float("nan"), {"a": float("inf")}, {float("nan"): 1}, cycle(), nested(100_000), {1, 2}, b"x", object(), Hostile(),
            {"a": Hostile()}, HostileDict(a=1), {(1, 2): 3}, 10**5000 if sys.version_info >= (3, 11) else {1}, Decimal(1),
        ):  # fmt: skip
            with self.subTest(type(bad).__name__):
                self.refused("meta must be JSON-encodable", meta=bad)

    def test_meta_may_be_any_json_value(self):
        for meta in (
            0,
            False,
            "",
            [],
            {},
            [None],
            1.5,
            "text",
            {"a": {"b": [1, 2, {"c": None}]}},
            {1: 2, None: 3, True: 4},
        ):
            with self.subTest(repr(meta)):
                self.assertEqual(Log("a", 1, meta=meta).meta, json.loads(json.dumps(meta)))

    def test_meta_takes_1024_bytes_and_not_one_more(self):
        for character, size in (("x", 1), ("ü", 2), ("€", 3), ("😀", 4), ("\n", 2), ("\x01", 6)):
            fits = character * ((1024 - 2) // size) + "x" * ((1024 - 2) % size)
            self.assertEqual(len(json.dumps(fits, ensure_ascii=False).encode()), 1024)
            self.assertEqual(Log("a", 1, meta=fits).meta, fits)
            self.assertIn("got 1025", self.refused("at most 1024 bytes", meta=fits + "x"))

    def test_meta_takes_10_top_level_keys_and_not_one_more(self):
        Log("a", 1, meta={str(i): {str(j): 0 for j in range(20)} for i in range(5)})
        Log("a", 1, meta={str(i): 0 for i in range(10)})
        self.assertIn(
            "got 11", self.refused("at most 10 top-level keys", meta={str(i): 0 for i in range(11)})
        )

    def test_log_id_is_canonical_or_made(self):
        text = "123E4567E89B12D3A456426614174000"
        for given in (text, f"{{{text}}}", f" {text} ", uuid.UUID(text)):
            self.assertEqual(
                Log("a", 1, log_id=given).log_id, "123e4567-e89b-12d3-a456-426614174000"
            )
        for given in (None, "", "  "):
            made = uuid.UUID(Log("a", 1, log_id=given).log_id)
            self.assertEqual((made.version, made.variant), (4, uuid.RFC_4122))
        for bad in ("x", 1, b"1" * 16, Hostile(), "\ud800"):
            self.refused("log_id must be a UUID, got ", log_id=bad)

    def test_made_ids_do_not_repeat_and_have_random_bits_everywhere(self):
        made = [Log("a", 1).log_id for _ in range(rounds(1000, 20000))]
        self.assertEqual(len(set(made)), len(made))
        for place in set(range(36)) - {8, 13, 14, 18, 23}:
            self.assertEqual(len({i[place] for i in made}), 4 if place == 19 else 16, place)

    def test_threads_never_share_an_id(self):
        made, count = [[] for _ in range(8)], rounds(250, 3000)
        threads = [
            threading.Thread(target=lambda o=o: o.extend(Log("a", 1).log_id for _ in range(count)))
            for o in made
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
        self.assertEqual(len({i for part in made for i in part}), 8 * count)

    def test_processes_with_one_random_seed_and_a_fork_make_different_ids(self):
        code = (
            "import random, os; random.seed(1); from chirrop import Log; import chirrop\n"
            "mine = Log('a', 1).log_id; r, w = os.pipe(); pid = os.fork()\n"
            "made = ' '.join(Log('a', 1).log_id for _ in range(100))\n"
            "if pid: os.waitpid(pid, 0); print(mine, made, os.read(r, 9999).decode())\n"
            "else: os.write(w, made.encode()); os._exit(0)"
        )
        env = {"PYTHONWARNINGS": "ignore"}
        begun = [self.begin_python(code, env=env) for _ in range(2)]
        made = [i for end in begun for i in end().stdout.split()]
        self.assertEqual((len(made), len(set(made))), (402, 402))

    def test_a_block_of_ids_ends_with_its_second(self):
        first = chirrop._mint(1000.25)
        block = chirrop._minted[2]
        chirrop._mint(1000.75)
        self.assertIs(chirrop._minted[2], block)
        chirrop._mint(1001.0)
        self.assertIsNot(chirrop._minted[2], block)  # a snapshot restored later has none of them
        self.assertEqual(first[1], "1970-01-01T00:16:40.250000Z")

    def test_times_as_people_and_programs_write_them(self):
        day = (datetime.now(timezone.utc) - timedelta(days=2)).strftime("%Y-%m-%d")
        for text, sent in (
            (f"{day}T10:00:00Z", "10:00:00Z"), (f"{day}t10:00:00z", "10:00:00Z"), (f"{day} 10:00", "10:00:00Z"),
            (f"{day}T10:00:00.5Z", "10:00:00.500000Z"), (f"{day}T10:00:00.123456789Z", "10:00:00.123456Z"),
            (f"{day}T10:00:00,25Z", "10:00:00.250000Z"), (f"{day}T10:00:00+02:00", "08:00:00Z"),
            (f"{day}T10:00:00-0130", "11:30:00Z"), (f"{day}T10:00:00+00:00:30", "09:59:30Z"), (f" {day}T10:00:00 ", "10:00:00Z"),
        ):  # fmt: skip
            with self.subTest(text):
                self.assertEqual(Log("a", 1, occurred_at=text).occurred_at, f"{day}T{sent}")
        naive = datetime.now(timezone.utc).replace(tzinfo=None, microsecond=0) - timedelta(hours=1)
        for moment in (
            naive,
            naive.replace(tzinfo=timezone.utc),
            (naive + timedelta(hours=5)).replace(tzinfo=timezone(timedelta(hours=5))),
        ):
            self.assertEqual(Log("a", 1, occurred_at=moment).occurred_at, naive.isoformat() + "Z")

    def test_what_is_no_time_is_refused(self):
        for bad in (
            "", "yesterday", "2026-13-01T00:00:00Z", "2026-02-30T00:00:00Z", "2026-01-01", "2026-01-01T25:00:00Z", 1700000000, 1.5,
            b"2026-01-01T00:00:00Z", "２０２６-01-01T00:00:00Z", Hostile(), datetime.max.replace(tzinfo=timezone(-timedelta(hours=23))),
            datetime.min.replace(tzinfo=timezone(timedelta(hours=23))), datetime.now(HostileZoneless()), "9" * 5000, "2026-01-01T00:00:00\ud800",
        ):  # fmt: skip
            with self.subTest(repr(bad)[:40] if not isinstance(bad, Hostile) else "hostile"):
                self.refused("occurred_at must ", occurred_at=bad)

    def test_times_lie_within_the_last_30_days_and_1_day_ahead(self):
        now = 1_800_000_000.0
        for seconds in (-30 * 86400, -1, 0, 86400):
            at = datetime.fromtimestamp(now + seconds, timezone.utc)
            chirrop._encode_log(now, "a", 1, None, None, None, at)
        for seconds in (-30 * 86400 - 1, 86401):
            at = datetime.fromtimestamp(now + seconds, timezone.utc)
            with self.assertRaisesRegex(
                chirrop.ChirrOpValidationError, "last 30 days and at most 1 day ahead"
            ):
                chirrop._encode_log(now, "a", 1, None, None, None, at)

    def test_what_is_refused_comes_with_what_to_do(self):
        for fields, remedy in (
            ({"event": " "}, "name it like tool.errors.count"),
            ({"log_id": "x-17"}, "got 'x-17': make one .* uuid.uuid5(uuid.NAMESPACE_URL, key)"),
            ({"meta": "x" * 5000}, "got 5002: cut its texts, as in repr(error)[:200]"),
            ({"meta": dict.fromkeys("abcdefghijkl")}, "got 12: put the others into one of them"),
            ({"occurred_at": 1_700_000_000}, "like 2026-01-31T12:00:00Z, got 1700000000"),
        ):  # fmt: skip
            with self.assertRaises(chirrop.ChirrOpValidationError) as caught:
                Log(**{"event": "a", "value": 1, **fields})
            for part in remedy.split(" .* "):
                self.assertIn(part, str(caught.exception))

    def test_a_long_error_fits_into_meta_as_the_readme_cuts_it(self):
        for text in ("é" * 5000, "\U0001f600" * 5000, '\x00"\\' * 5000, "\udcff" * 5000):
            for error in (RuntimeError(text), OSError(2, text, text)):
                Log("a", 1, meta={"error": repr(error)[:200], "path": "/" * 100})

    def test_naive_times_are_utc_whatever_the_local_zone(self):
        code = (
            "from chirrop import Log; from datetime import datetime, timezone\n"
            "t = datetime.now(timezone.utc).replace(tzinfo=None)\n"
            "print(Log('a', 1, occurred_at=t).occurred_at == t.isoformat() + 'Z')"
        )
        self.assertEqual(self.python(code, env={"TZ": "Asia/Kolkata"}).stdout, "True\n")

    def test_any_object_at_all_makes_a_log_or_one_clear_error(self):
        things = [
            None, True, 0, 1.5, 10**400, float("nan"), "", "x", "\ud800", b"x", [], {}, set(), cycle(), nested(100_000), Hostile(),
            HostileDict(a=1), object(), Decimal("NaN"), Fraction(1, 3), datetime.max, datetime.now(timezone.utc), uuid.uuid4(), int, lambda: 0, 1j,
        ]  # fmt: skip
        for thing in things:
            for field in ("event", "value", "agent", "log_id", "meta", "occurred_at"):
                try:
                    json.loads(Log(**{"event": "a", "value": 1, field: thing})._body.decode())
                except chirrop.ChirrOpValidationError as exc:
                    self.assertIn(field, str(exc))


class HostileZoneless(HostileZone):
    def fromutc(self, moment):
        return moment.replace(tzinfo=self)


# ---- Config ---------------------------------------------------------------


class ConfigTest(TestCase):
    def setUp(self):
        super().setUp()
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder())

    def test_defaults_are_the_documented_ones(self):
        config = Config(api_key=KEY)
        self.assertEqual(
            {k: v for k, v in vars(config).items() if k != "api_key"},
            dict(
                api_endpoint="https://logs.chirrop.com/v1.0/logs", servicer_endpoint="https://api.chirrop.com/v1.0",
                retries=10, timeout=10, batch_size=250, flush_delay=0.5, queue_size=0, log_level=0, servicer_retries=2,
                on_exhausted="keep", max_senders=4, exit_timeout=5.0, transport=None, ssl_context=None, spool=None, on_drop=None,
                disabled=False,
            ),
        )  # fmt: skip

    def test_what_code_says_of_disabled_wins_over_the_environment(self):
        for variable, given, expected in (
            ("", None, False), ("0", None, False), ("1", None, True), (" On ", None, True),
            ("1", False, False), ("", True, True), ("0", True, True),
        ):  # fmt: skip
            os.environ["CHIRROP_DISABLED"] = variable
            with self.subTest(variable, given=given):
                self.assertIs(Config(api_key=KEY, disabled=given).disabled, expected)
        os.environ["CHIRROP_DISABLED"] = "1"
        client = self.client(disabled=False)
        client.log(Log("a", 1))
        self.assertTrue(client.flush(LONG))
        self.assertEqual(client.stats().delivered, 1)

    def test_wrong_settings_are_refused_by_name(self):
        wrong = {
            "retries": (-1, 1.5, "3", True, None), "servicer_retries": (-1, None), "timeout": (0, -1, "1", float("nan"), 1e9, None, True),
            "batch_size": (0, 1.5, None), "flush_delay": (-1, float("inf"), "x"), "queue_size": (-1, None, 1.0),
            "log_level": (-1, "LOUD", 1.5, None), "on_exhausted": ("", "hold", None), "max_senders": (0, 65, None),
            "exit_timeout": (-1, float("nan")), "disabled": (0, 1, "1", "false"),
            "transport": (1, "x"), "ssl_context": (1, True), "spool": (1, "", object()),
            "on_drop": (1,),
            "api_endpoint": ("ftp://x/", "logs", "http://", "https://u:p@h/", "http://h:99999/", "http://h/?a=b", "http://h/#f", "http://h/a b", "http://h\r\n/", 1, "http://h/\u00fc"),
            "servicer_endpoint": ("file:///etc/passwd", "https://user@h/"), "api_key": (1, b"chp_x"),
        }  # fmt: skip
        for name, values in wrong.items():
            for value in values:
                with (
                    self.subTest(f"{name}={value!r}"),
                    self.assertRaises(chirrop.ChirrOpValidationError) as caught,
                ):
                    Config(**{"api_key": KEY, name: value})
                self.assertIn(name, str(caught.exception))
        with self.assertRaisesRegex(
            chirrop.ChirrOpValidationError, "no field retrys: it has api_key, .*, disabled$"
        ):
            new_client(api_key=KEY, retrys=1)
        with self.assertRaisesRegex(chirrop.ChirrOpValidationError, "not both"):
            new_client(Config(api_key=KEY), retries=1)
        with self.assertRaises(chirrop.ChirrOpValidationError):
            Client({"api_key": KEY})

    def test_an_empty_endpoint_and_a_bare_prefix_are_refused_like_any_other_wrong_value(self):
        os.environ["CHIRROP_API_ENDPOINT"] = os.environ["CHIRROP_SERVICER_ENDPOINT"] = "https://h/"
        for name in ("api_endpoint", "servicer_endpoint"):
            with self.assertRaisesRegex(chirrop.ChirrOpValidationError, f"{name} must be an abs"):
                Config(**{"api_key": KEY, name: ""})
        with self.assertRaisesRegex(chirrop.ChirrOpValidationError, "nothing follows 'chp_'"):
            Config(api_key=" chp_ ")

    def test_a_config_cannot_be_changed_and_shows_no_key(self):
        config = Config(api_key="chp_canary", on_drop=print)
        with self.assertRaises(AttributeError):
            config.retries = 3
        self.assertNotIn("canary", repr(config) + str(config) + repr(vars(config)))
        self.assertEqual((config.api_key, f"{config.api_key}"), ("chp_canary", "chp_canary"))

    def test_a_copy_of_a_config_is_the_config(self):
        config = Config(api_key=KEY, transport=lambda *_: None, spool=SqliteSpool("a.spool"))
        self.assertIs(copy.copy(config), config)
        self.assertIs(copy.deepcopy([config])[0], config)

    def test_a_pickled_config_travels_without_its_key_and_takes_the_one_where_it_arrives(self):
        config = Config(api_key="chp_canary", retries=3, on_drop=print, spool="a.spool")
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            pickled = pickle.dumps(config, protocol)
            self.assertNotIn(b"canary", pickled)
            os.environ["CHIRROP_API_KEY"] = "chp_there"
            self.assertEqual(vars(pickle.loads(pickled)), {**vars(config), "api_key": "chp_there"})
            del os.environ["CHIRROP_API_KEY"]
            with self.assertRaisesRegex(
                ChirrOpError, "travels without its key: API key is required"
            ):
                pickle.loads(pickled)
        disabled = pickle.loads(pickle.dumps(Config(disabled=True)))
        self.assertEqual((disabled.disabled, disabled.api_key), (True, ""))

    def test_the_key_comes_from_the_argument_then_the_environment_then_dotenv(self):
        with self.assertRaisesRegex(
            chirrop.ChirrOpValidationError,
            r"^API key is required: give api_key, or set CHIRROP_API_KEY .* or \./\.env$",
        ):
            Config()
        pathlib.Path(".env").write_text("CHIRROP_API_KEY=chp_file\n")
        self.assertEqual(Config().api_key, "chp_file")
        os.environ["CHIRROP_API_KEY"] = "chp_environment"
        self.assertEqual(Config().api_key, "chp_environment")
        self.assertEqual(Config(api_key=" chp_argument\n").api_key, "chp_argument")

    def test_a_key_of_another_form_is_refused_without_showing_it(self):
        for bad, text in (
            ("canary", r"^Invalid API key: must start with 'chp_' \(given as api_key\)$"),
            ("chp_\u00fccanary", "printable ASCII"), ("chp_canary\r\nX: y", "printable ASCII"),
            ("chp_can ary", "printable ASCII"), ("CHP_canary", "must start with"),
        ):  # fmt: skip
            with self.assertRaisesRegex(chirrop.ChirrOpValidationError, text) as caught:
                Config(api_key=bad)
            self.assertNotIn(
                "canary",
                "".join(
                    traceback.TracebackException.from_exception(
                        caught.exception, capture_locals=True
                    ).format()
                ).replace(repr(bad), ""),
            )

    def test_a_bad_key_is_traced_to_its_source(self):
        pathlib.Path(".env").write_text("CHIRROP_API_KEY=sk_canary")
        for fields, variable, source in (
            ({}, "", "from CHIRROP_API_KEY in ./.env"),
            ({}, "sk_canary", "from CHIRROP_API_KEY in the environment"),
            ({"api_key": "sk_canary"}, "chp_good", "given as api_key"),
        ):
            os.environ["CHIRROP_API_KEY"] = variable
            with self.assertRaises(chirrop.ChirrOpValidationError) as caught:
                Config(**fields)
            self.assertEqual(
                str(caught.exception), f"Invalid API key: must start with 'chp_' ({source})"
            )

    def test_dotenv_oddities(self):
        for text, key in (
            (b"CHIRROP_API_KEY=chp_a", "chp_a"), (b"export CHIRROP_API_KEY=chp_a\r\n", "chp_a"), (b"\xef\xbb\xbfCHIRROP_API_KEY='chp_a' # c", "chp_a"),
            (b'CHIRROP_API_KEY = "chp_a#b"  ', "chp_a#b"), (b"CHIRROP_API_KEY=chp_a # old", "chp_a"), (b"CHIRROP_API_KEY=chp_a#b", "chp_a#b"),
            (b"# CHIRROP_API_KEY=chp_no\nX=1\nCHIRROP_API_KEY=chp_a\n", "chp_a"), (b"CHIRROP_API_KEY=chp_a\nCHIRROP_API_KEY=chp_b", "chp_b"),
            (b"\x00\xff\xfe\nCHIRROP_API_KEY=chp_a", "chp_a"), (b"NOT_CHIRROP_API_KEY=chp_no", None), (b"CHIRROP_API_KEY", None),
            (b"\xff" * 1000, None), (b"CHIRROP_API_KEY='chp_a", None), (b"CHIRROP_API_KEY=", None), (b"", None),
        ):  # fmt: skip
            with self.subTest(text[:60]):
                pathlib.Path(".env").write_bytes(text)
                try:
                    self.assertEqual(Config().api_key, key)
                except chirrop.ChirrOpValidationError:
                    self.assertIsNone(key)
        pathlib.Path(".env").unlink()
        pathlib.Path(".env").mkdir()
        with self.assertRaisesRegex(chirrop.ChirrOpValidationError, "required"):
            Config()

    def test_endpoints_come_from_the_argument_then_the_environment(self):
        os.environ.update(
            CHIRROP_API_ENDPOINT="http://e/logs/", CHIRROP_SERVICER_ENDPOINT="http://e:8080/v1"
        )
        config = Config(api_key=KEY)
        self.assertEqual(
            (config.api_endpoint, config.servicer_endpoint), ("http://e/logs", "http://e:8080/v1")
        )
        self.assertEqual(
            Config(api_key=KEY, api_endpoint="https://a/x").api_endpoint, "https://a/x"
        )
        os.environ["CHIRROP_API_ENDPOINT"] = "nonsense"
        with self.assertRaisesRegex(
            chirrop.ChirrOpValidationError,
            "^api_endpoint must .*, got 'nonsense' from CHIRROP_API_ENDPOINT$",
        ):
            Config(api_key=KEY)
        with self.assertRaisesRegex(
            chirrop.ChirrOpValidationError, "^api_endpoint must .*, got ''$"
        ):
            Config(api_key=KEY, api_endpoint="")

    def test_a_wrong_endpoint_is_shown_without_what_may_be_secret(self):
        for url, shown in (
            ("htps://host/v1.0/logs", "'htps://host/v1.0/logs'"),
            ("https://user:canary@host/logs", "'***@host/logs'"),
            ("https://user:ca/na@ry?canary#canary@host:1/logs", "'***@host:1/logs'"),
            ("https://host/logs?token=canary", "'https://host/logs?***'"),
            ("https://host/logs#canary", "'https://host/logs#***'"),
            ("chp_canary", "'chp_***'"),
            ("http://host/\x1b[2J", "'http://host/\\x1b[2J'"),
            (b"https://user:canary@host", "bytes"),
        ):
            with self.assertRaises(chirrop.ChirrOpValidationError) as caught:
                Config(api_key=KEY, servicer_endpoint=url)
            text = str(caught.exception)
            self.assertTrue(text.endswith(f", got {shown}"), text)
            self.assertNotIn("canary", text)

    def test_a_level_may_be_a_name(self):
        self.assertEqual(Config(api_key=KEY, log_level="warning").log_level, logging.WARNING)
        client = self.client(400, log_level=logging.ERROR)
        client.log(Log("a", 1))
        client.flush()
        self.assertEqual(logging.getLogger("chirrop").level, logging.ERROR)

    def test_a_disabled_client_needs_no_key_and_does_nothing(self):
        for fields, variable in (({"disabled": True}, ""), ({}, "1"), ({}, "TRUE")):
            os.environ["CHIRROP_DISABLED"] = variable
            client = new_client(transport=FakeTransport(AssertionError), **fields)
            client.log(Log("a", 1))
            client.send_logs([Log("a", 1)])
            with self.assertRaises(chirrop.ChirrOpValidationError):
                Log("", 1)
            self.assertEqual(
                (client.flush(), client.close(), client.stats().accepted), (True, True, 0)
            )
            self.assertEqual(client._link._transport.requests, [])
            with self.assertRaisesRegex(ChirrOpError, "disabled"):
                client.list_events()


# ---- Retry policy ---------------------------------------------------------


class PolicyTest(TestCase):
    def test_every_status_has_its_verdict(self):
        table = {
            "delivered": (200, 201, 202, 204, 299), "split": (400, 422), "halve": (413,),
            "retry": (0, 100, 408, 429, 501, 502, 504, 505, 520, 599), "hold": (500, 503),
            "refused": (300, 301, 302, 304, 307, 308, 401, 402, 403, 404, 405, 409, 410, 418, 451, 600, 999),
        }  # fmt: skip
        for verdict, statuses in table.items():
            for status in statuses:
                self.assertEqual(chirrop._verdict(chirrop._INGEST, status), verdict, status)

    def test_the_control_plane_has_verdicts_of_its_own(self):
        table = {
            "delivered": (200, 201, 202, 204, 299), "retry": (0, 100, 408, 429, 501, 502, 504, 505, 520, 599),
            "refused": (300, 302, 304, 308, 400, 401, 403, 404, 409, 413, 422, 500, 503, 600),
        }  # fmt: skip
        for verdict, statuses in table.items():
            for status in statuses:
                self.assertEqual(chirrop._verdict(chirrop._CONTROL, status), verdict, status)

    def test_backoff_doubles_to_its_cap_and_spreads_over_all_of_it(self):
        windows = [chirrop._backoff(n, None, lambda: 0.999999) for n in range(1, 9)]
        self.assertEqual([round(w) for w in windows], [1, 2, 4, 8, 16, 30, 30, 30])
        self.assertEqual(chirrop._backoff(1, None, lambda: 0.0), 0.0)
        self.assertLess(chirrop._backoff(10**9, None, lambda: 0.5), 30)
        waits = [chirrop._backoff(20, None, chirrop._random) for _ in range(2000)]
        self.assertTrue(
            0 <= min(waits) < 3 and 27 < max(waits) <= 30 and 13 < sum(waits) / 2000 < 17
        )

    def test_jitter_is_added_to_what_the_server_asked_for(self):
        self.assertEqual(chirrop._backoff(1, 5.0, lambda: 0.0), 5.0)
        self.assertEqual(chirrop._backoff(3, 5.0, lambda: 0.5), 7.0)

    def test_every_form_of_retry_after(self):
        now = 1_700_000_000.0
        date = email.utils.formatdate(now + 60, usegmt=True)
        for text, seconds in (
            ("7", 7), ("0", 0), (" 12 ", 12), ("1.5", 1.5), ("007", 7), ("301", 300), ("9" * 400, 300), ("9" * 5000, 300), (date, 60),
            (date.replace("GMT", "-0000"), 60), (date.replace("GMT", "+0100"), 0), ("Fri, 31 Dec 9999 23:59:59 GMT", 300),
            ("-5", None), ("nan", None), ("inf", None), ("1e3", None), ("1_0", None), ("\uff11\uff12", None), ("", None), (".", None), ("1.2.3", None),
            ("soon", None), ("Fri, 99 Foo 2026 99:99:99 GMT", None), ("\x00", None), ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ):  # fmt: skip
            with self.subTest(text[:40]):
                headers = {"x": "1", "retry-after": text}
                self.assertEqual(chirrop._retry_after(headers, now), seconds)
        self.assertIsNone(chirrop._retry_after({}, now))


# ---- Buffers and outbox ---------------------------------------------------


class BufferMixin:
    """What the memory queue and the spool have in common."""

    def setUp(self):
        super().setUp()
        self.buffer, self.batches = self.make(), ()
        self.buffer.batches = lambda: self.batches

    def put(self, *numbers):
        for number in numbers:
            self.buffer.put(b"%d" % number)

    def fill(self):
        batch = chirrop._Batch(0)
        self.batches += (batch,)
        self.buffer.fill(batch)
        return batch

    def settle(self, batch, error=None):
        self.buffer.settle(batch, error)
        self.batches = tuple(other for other in self.batches if other is not batch)

    def test_logs_come_out_in_order_and_at_most_250_at_once(self):
        self.put(*range(600))
        self.assertEqual(self.buffer.size(), 600)
        self.assertEqual(self.fill().items, [b"%d" % n for n in range(250)])
        self.put(600)
        self.assertEqual(self.buffer.size(), 351)
        self.assertEqual(self.fill().items, [b"%d" % n for n in range(250, 500)])
        self.assertEqual(self.fill().items, [b"%d" % n for n in range(500, 601)])
        self.assertEqual((self.fill().items, self.buffer.size()), ([], 0))

    def test_what_is_settled_in_any_order_and_in_parts_is_not_filled_again(self):
        self.put(*range(500))
        first, second = self.fill(), self.fill()
        self.settle(second)
        self.put(500)
        halves = first.part(0, 125), first.part(125, 250)
        self.batches = (*(b for b in self.batches if b is not first), *halves)
        self.settle(halves[1])
        self.assertEqual(self.buffer.size(), 1)
        self.settle(halves[0], "no good")
        self.assertEqual(self.fill().items, [b"500"])
        self.assertEqual((self.fill().items, self.buffer.size()), ([], 0))

    def test_the_level_rises_with_each_put(self):
        before = self.buffer.level()
        self.put(1)
        self.put(2)
        self.assertEqual(self.buffer.level(), before + 2)

    def test_an_empty_buffer_takes_every_call(self):
        buffer, batch = self.buffer, chirrop._Batch(0)
        buffer.fill(batch)
        buffer.settle(batch, None)
        buffer.settle(batch, "error")
        buffer.tend()
        self.assertFalse(buffer.stays(batch))
        self.assertEqual((batch.items, buffer.size(), buffer.lost), ([], 0, 0))
        self.assertEqual(buffer.leave(), 0)
        buffer.close()
        buffer.close()
        self.assertFalse(buffer.is_open())

    def test_after_a_fork_it_is_empty_and_takes_logs(self):
        self.put(1, 2, 3)
        self.fill()
        self.batches = ()
        self.buffer.after_fork()
        self.assertEqual((self.buffer.size(), self.fill().items), (0, []))
        self.put(4)
        self.assertEqual(self.fill().items, [b"4"])


class MemoryBufferTest(BufferMixin, TestCase):
    def make(self):
        return chirrop._Memory()


class SpoolBufferTest(BufferMixin, TestCase):
    def make(self):
        spool = SqliteSpool(self.folder() / "spool")
        self.addCleanup(spool.close)
        return spool

    def tearDown(self):
        super().tearDown()
        for conn in chirrop._inherited.values():  # of a fork that was none
            conn.close()
        chirrop._inherited.clear()

    def test_what_is_filled_stays_in_the_file_until_it_is_settled(self):
        self.put(1, 2, 3)
        batch = self.fill()
        self.assertTrue(self.buffer.stays(batch))
        self.batches = ()  # as after the death of its process
        self.assertEqual(self.fill().items, [b"1", b"2", b"3"])
        self.settle(batch)
        self.batches = ()
        self.assertEqual(self.fill().items, [])


class OutboxTest(TestCase):
    """The decisions alone: no threads, the clock is a number."""

    def outbox(self, **fields):
        self.holders = itertools.count(1)  # each take is another thread's
        return chirrop._Outbox(chirrop._Memory(), Config(api_key=KEY, **fields), lambda: 0.5)

    def fill(self, outbox, count):
        logs = [Log("a", i)._body for i in range(count)]
        for log in logs:
            outbox.buffer.put(log)
        return logs

    def take(self, outbox, now=0.0):
        return outbox.take(now, next(self.holders))

    def answer(self, outbox, batch, status, now=0.0, **fields):
        answer, verdict = (
            chirrop._Answer(status, **fields),
            chirrop._verdict(chirrop._INGEST, status),
        )
        error = None if verdict == "delivered" else answer.error()
        outbox.settle(batch, verdict, error, now)

    def test_a_lone_log_waits_for_others_until_flush_delay(self):
        outbox = self.outbox(flush_delay=0.5)
        self.assertEqual(outbox.due_in(0.0), math.inf)
        self.fill(outbox, 1)
        self.assertEqual(outbox.due_in(10.0), 0.5)
        self.assertIsNone(self.take(outbox, 10.4))
        self.assertEqual(len(self.take(outbox, 10.5).items), 1)

    def test_batch_size_starts_a_send_and_250_end_it(self):
        outbox = self.outbox(batch_size=10)
        self.fill(outbox, 9)
        self.assertIsNone(self.take(outbox))
        self.fill(outbox, 491)
        self.assertEqual(len(self.take(outbox).items), 250)
        self.assertIsNone(self.take(outbox), "one request at a time to begin with")

    def test_a_sender_is_woken_once_per_batch(self):
        outbox, calls = self.outbox(), []
        sender = chirrop._Sender(outbox, None, Config(api_key=KEY))

        def wake():
            calls.append(outbox.buffer.size())
            sender._bell.ring()

        sender.wake = wake

        def log(count):
            for number in range(count):
                sender.put(b"%d" % number)

        log(3)
        self.assertEqual(calls, [1])
        sender._bell.wait(0)
        sender._wake_at = outbox.wake_level(0.0)  # as a sender does before it waits
        log(600)
        self.assertEqual(calls, [1, 250])
        sender._bell.wait(0)
        self.take(outbox)
        sender._wake_at = outbox.wake_level(0.0)
        log(600)
        self.assertEqual(calls, [1, 250], "nothing can be sent while a request is under way")

    def test_successes_with_a_backlog_bring_senders_and_a_failure_takes_them_back_to_one(self):
        outbox = self.outbox(max_senders=3)
        self.fill(outbox, 250 * 12)
        widths = []
        for _ in range(4):
            self.answer(outbox, self.take(outbox), 200)
            widths.append(outbox.state.width)
        self.assertEqual(widths, [2, 3, 3, 3])
        flying = [self.take(outbox) for _ in range(3)]
        self.assertIsNone(self.take(outbox))
        self.answer(outbox, flying[0], 502)
        self.assertEqual(outbox.state.width, 1)

    def test_a_retried_batch_is_the_same_bytes_and_goes_first(self):
        outbox = self.outbox()
        logs = self.fill(outbox, 300)
        self.answer(outbox, self.take(outbox), 502)
        self.assertEqual(outbox.due_in(0.0), 0.5)  # half of the first window, by rand
        self.assertIsNone(self.take(outbox, 0.4))
        self.assertEqual(self.take(outbox, 0.5).items, logs[:250])
        self.assertEqual(outbox.stats().retries, 1)

    def test_failures_at_the_same_time_count_once(self):
        outbox = self.outbox(max_senders=4)
        self.fill(outbox, 2000)
        for _ in range(3):
            self.answer(outbox, self.take(outbox), 200)
        for batch in [self.take(outbox) for _ in range(4)]:
            self.answer(outbox, batch, 0, cause=OSError())
        self.assertEqual((outbox.due_in(0.0), outbox.state.failures), (0.5, 1))

    def test_an_exhausted_batch_is_kept_while_others_pass(self):
        outbox = self.outbox(retries=1)
        logs = self.fill(outbox, 500)
        self.answer(outbox, self.take(outbox), 502)
        self.answer(outbox, self.take(outbox, 5.0), 502, now=5.0)
        other = self.take(outbox, 10.0)
        self.assertEqual(other.items, logs[250:])
        self.answer(outbox, other, 200, now=10.0)
        self.assertEqual(outbox.stats().delivered, 250)
        self.assertIsNone(self.take(outbox, 34.9))
        self.assertEqual(self.take(outbox, 35.0).items, logs[:250])

    def test_an_exhausted_batch_is_dropped_when_asked_for(self):
        outbox = self.outbox(retries=2, on_exhausted="drop", on_drop=print)
        logs = self.fill(outbox, 250)
        for now in (0.0, 100.0, 200.0):
            self.assertFalse(outbox.state.untold)
            self.answer(outbox, self.take(outbox, now), 0, now, cause=OSError("down"))
        self.assertEqual([drop.items for drop in outbox.state.untold], [logs])
        self.assertEqual(outbox.stats().dropped, {"exhausted": 250})

    def test_500_and_503_count_as_exhausted_at_once(self):
        for status in (500, 503):
            outbox = self.outbox(retries=5)
            logs = self.fill(outbox, 500)
            self.answer(outbox, self.take(outbox), status)
            other = self.take(outbox, 0.5)
            self.assertEqual(other.items, logs[250:])
            self.answer(outbox, other, 200, now=0.5)
            self.assertEqual(outbox.due_in(0.5), 29.5)
            self.assertEqual(self.take(outbox, 30.0).items, logs[:250])
            outbox = self.outbox(retries=5, on_exhausted="drop")
            self.fill(outbox, 250)
            self.answer(outbox, self.take(outbox), status)
            self.assertEqual(outbox.stats().dropped, {"exhausted": 250})

    def test_what_the_service_refuses_is_held_only_where_the_logs_outlive_the_client(self):
        for status in (401, 403, 404, 302, 409):
            for stays, choice, expected in (
                (False, "keep", {"refused": 5}),
                (True, "keep", {}),
                (True, "drop", {"refused": 5}),
            ):
                outbox = self.outbox(on_exhausted=choice, flush_delay=0)
                outbox.buffer.stays = lambda batch, stays=stays: stays
                self.fill(outbox, 5)
                self.answer(outbox, self.take(outbox, 9.0), status, 9.0)
                with self.subTest(status=status, stays=stays, choice=choice):
                    stats = outbox.stats()
                    self.assertEqual(stats.dropped, expected)
                    self.assertEqual(stats.queued, 5 - sum(expected.values()))
                    self.assertEqual(outbox.due_in(9.0), math.inf if expected else 30.0)

    def send_poisoned(self, status, poisoned, limit=250):
        """Return the stats after 250 logs, and the number of requests it took."""
        outbox, requests = self.outbox(), 0
        self.fill(outbox, 250)
        outbox.end_flush(outbox.begin_flush(0.0))
        batch = self.take(outbox, 60.0)
        while batch is not None:
            requests += 1
            values = {json.loads(item)["value"] for item in batch.items}
            bad = len(batch.items) > limit or values & poisoned
            self.answer(outbox, batch, status if bad else 200)
            batch = self.take(outbox, 60.0)
        return outbox.stats(), requests

    def test_a_413_is_halved_until_it_fits_whatever_that_takes(self):
        stats, requests = self.send_poisoned(413, set(), limit=1)
        self.assertEqual((stats.delivered, stats.dropped, requests), (250, {}, 499))
        stats, requests = self.send_poisoned(413, {7, 30, 31}, limit=3)
        self.assertEqual((stats.delivered, stats.dropped), (247, {"rejected": 3}))

    def test_the_search_for_bad_logs_ends_after_64_requests(self):
        for status in (400, 422):
            stats, requests = self.send_poisoned(status, {7, 120, 249})
            self.assertEqual((stats.delivered, stats.dropped), (247, {"rejected": 3}))
            self.assertLessEqual(requests, 49)
            stats, requests = self.send_poisoned(status, set(range(250)))
            self.assertEqual(sum(stats.dropped.values()), 250)
            self.assertLessEqual(requests, 64)
            self.assertIn("undecided", stats.dropped)

    def test_a_flush_ends_a_backoff_and_covers_only_what_was_there(self):
        outbox = self.outbox()
        self.fill(outbox, 1)
        flush = outbox.begin_flush(0.0)
        self.answer(outbox, self.take(outbox), 429, headers={"retry-after": "60"})
        self.assertIsNone(self.take(outbox, 1.0))
        again = outbox.begin_flush(1.0)
        batch = self.take(outbox, 1.0)
        self.fill(outbox, 5)
        self.assertEqual((outbox.outcome(flush), outbox.outcome(again)), (None, None))
        self.answer(outbox, batch, 200, 1.0)
        self.assertEqual((outbox.outcome(flush), outbox.outcome(again)), (True, True))
        self.assertEqual(outbox.stats().queued, 5)

    def test_a_flush_is_true_only_if_its_own_logs_were_delivered(self):
        for poison, clean in ((0, False), (4, False), (5, True), (9, True)):
            outbox = self.outbox()
            self.fill(outbox, 5)
            flush = outbox.begin_flush(0.0)
            for number in range(5, 10):
                outbox.buffer.put(Log("a", number)._body)
            batch = self.take(outbox)
            self.assertEqual(len(batch.items), 10, "it goes with what came after")
            while batch is not None:
                bad = any(json.loads(item)["value"] == poison for item in batch.items)
                self.answer(outbox, batch, 400 if bad else 200)
                batch = self.take(outbox)
            self.assertIs(outbox.outcome(flush), clean)

    def test_a_flush_gives_up_after_one_full_cycle_of_failures(self):
        outbox = self.outbox(retries=2)
        self.fill(outbox, 600)
        flush = outbox.begin_flush(0.0)
        for now in (0.0, 100.0, 200.0):
            self.assertIsNone(outbox.outcome(flush), now)
            self.answer(outbox, self.take(outbox, now), 502, now)
        self.assertIs(outbox.outcome(flush), False)
        self.assertEqual(outbox.stats().queued, 600)

    def test_a_flush_offers_held_batches_again_and_ends_when_all_are_exhausted(self):
        outbox = self.outbox()
        self.fill(outbox, 500)
        for cycle in (0.0, 1.0):
            flush = outbox.begin_flush(cycle)
            for _ in range(2):
                self.assertIsNone(outbox.outcome(flush))
                now = cycle + outbox.due_in(cycle)
                self.answer(outbox, self.take(outbox, now), 503, now)
            self.assertIs(outbox.outcome(flush), False)
        self.assertEqual(outbox.stats().queued, 500)

    def test_an_answer_after_stop_changes_nothing(self):
        outbox = self.outbox(on_drop=print)
        logs = self.fill(outbox, 300)
        batch = self.take(outbox)
        outbox.stop(True)
        self.assertFalse(outbox.state.clean)
        dropped = [item for drop in outbox.state.untold for item in drop.items]
        self.assertEqual(sorted(dropped), sorted(logs))
        before = outbox.state
        self.answer(outbox, batch, 200)
        self.assertIs(outbox.state, before)
        self.assertEqual(outbox.stats().dropped, {"closed": 300})

    def test_a_log_that_slips_past_the_gate_is_swept(self):
        outbox = self.outbox()
        sender = chirrop._Sender(outbox, None, Config(api_key=KEY))
        append = outbox.buffer.put

        def put(data):
            outbox.stop(True)  # another thread's, between the gate and the append
            append(data)

        outbox.buffer.put = put
        sender.put(b"{}")
        self.assertEqual(outbox.stats().dropped, {"closed": 1})
        self.assertEqual(outbox.held(), 0)

    def test_a_holder_that_asks_again_has_given_up_its_batch(self):
        outbox = self.outbox()
        logs = self.fill(outbox, 250)
        self.assertEqual(outbox.take(0.0, 7).items, logs)
        self.assertIsNone(outbox.take(0.0, 8))
        self.assertEqual(outbox.stats().in_flight, 250)
        self.assertEqual(outbox.take(0.0, 7).items, logs)
        outbox.release(7)
        self.assertEqual(outbox.stats().in_flight, 0)
        self.assertEqual(outbox.take(0.0, 8).items, logs)

    def test_a_wait_that_is_over_before_it_begins_ends(self):
        # queue.SimpleQueue, before Python 3.13, hangs within some thousand of these.
        def wait():
            for number in range(rounds(1_000, 20_000)):
                bell = chirrop._Bell()
                if number % 2:
                    bell.ring()
                    bell.wait(0.0)
                self.assertFalse(bell.wait(number % 5 * 1e-6))

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        thread.join(LONG)
        self.assertFalse(thread.is_alive())

    def test_logs_dropped_late_do_not_end_a_flush_that_goes_on(self):
        outbox = self.outbox()
        self.fill(outbox, 1000)
        outbox.closed = True
        flush = outbox.begin_flush(0.0)
        for _ in range(1000):
            outbox.refuse("closed", [b"{}"], ChirrOpError("late"))
        for _ in range(4):
            self.assertIsNone(outbox.outcome(flush))
            self.answer(outbox, self.take(outbox), 200)
        self.assertTrue(outbox.outcome(flush))
        self.assertEqual(outbox.stats().dropped, {"closed": 1000})

    def test_a_refusal_that_interrupts_a_change_of_the_account_is_counted_later(self):
        outbox = self.outbox()
        refuse = functools.partial(outbox.refuse, "invalid", [b"{}"], ChirrOpError("bad"))

        def interrupted():
            state = outbox.state  # as read by the one who is interrupted
            refuse()
            outbox.state = state._replace(delivered=1)

        chirrop._exclusively(outbox.lock, interrupted)
        self.assertEqual(outbox.stats().accepted, 2)
        self.assertEqual(outbox.stats().dropped, {"invalid": 1})

    def test_the_first_log_after_a_dropped_batch_wakes_a_sender(self):
        outbox = self.outbox(on_exhausted="drop", flush_delay=0)
        self.fill(outbox, 1)
        self.answer(outbox, self.take(outbox, 1.0), 503, 1.0)
        self.assertGreater(outbox.state.resume_at, 1.0)
        self.assertEqual(outbox.wake_level(1.0), outbox.buffer.level() + 1)

    def test_damage_that_a_flush_finds_makes_it_false(self):
        outbox = self.outbox()
        size = outbox.buffer.size

        def size_of_a_damaged_file():
            outbox.buffer.lost, outbox.buffer.size = 5, size
            return 0

        outbox.buffer.size = size_of_a_damaged_file
        self.assertIs(outbox.outcome(outbox.begin_flush(0.0)), False)
        self.assertEqual(outbox.stats().dropped, {"damaged": 5})

    def test_drops_are_told_in_records_once_whoever_writes(self):
        outbox = self.outbox()
        for _ in range(5):
            outbox.refuse("invalid", [b"{}"], ChirrOpError("bad"))
        outbox.said("invalid", 5)
        for _ in range(3):
            outbox.refuse("invalid", [b"{}"], ChirrOpError("worse"))
        outbox.said("invalid", 5)  # by another thread, which had looked before
        self.assertEqual(outbox.state.unsaid, {"invalid": (5, "worse")})
        outbox.said("invalid", 8)
        outbox.said("invalid", 8)
        self.assertEqual(outbox.state.unsaid, {})

    def test_a_bounded_queue_counts_what_is_in_flight(self):
        outbox = self.outbox(queue_size=300)
        self.fill(outbox, 300)
        batch = self.take(outbox)
        self.assertFalse(outbox.offer(b"{}"))
        self.answer(outbox, batch, 200)
        self.assertTrue(outbox.offer(b"{}"))
        self.assertEqual(outbox.held(), 51)


# ---- Simulation -----------------------------------------------------------


class Simulation:
    """One seed: the real outbox, buffer and sender under a scripted transport and a hand-turned clock.

    There are no threads. What would happen at the same time happens inside the transport: before it
    answers, it may log, flush, send another batch, close, or crash the process (for the spool). A
    call may be struck: somewhere in it an exception is raised, as by Ctrl-C, a signal handler, or a
    full memory. It may cost that call, and nothing else.
    """

    class Crash(BaseException):
        pass

    class Interrupt(KeyboardInterrupt):
        pass

    class TimeLimit(TimeoutError):  # what a signal handler raises may well be an OSError
        pass

    class NoMemory(MemoryError):
        pass

    class TooDeep(RecursionError):
        pass

    STRIKES = Interrupt, TimeLimit, NoMemory, TooDeep
    # What may find the disk full, or locked.
    file = chirrop._SpoolFile
    DISK = file.add, file.fill, file.move, file.work_off, file.size

    FILL = file.fill.__code__

    running = None  # the one whose calls are struck

    def __init__(self, seed, path=None):
        self.rng = random.Random(seed)
        self.path, self.now, self.depth = path, 0.0, 0
        self.fuse = None  # steps until the call that is under way is struck
        self.wrong = False
        self.healthy, self.faulty = False, self.rng.random() < 0.3
        self.poison, self.stored = set(), set()
        self.accepted, self.doubtful = [], set()  # doubtful: the call of log() was struck
        # Answers that the SDK has had; that it may have had, for a strike came with them.
        self.delivered, self.unheard, self.answered = set(), set(), []
        self.dropped, self.refused = [], set()
        self.forgotten = set()  # in memory only, when the process died
        self.locks = weakref.WeakSet()
        Simulation.running = self
        self.start()

    def start(self):
        rng = self.rng
        self.before, self.heard = len(self.accepted), set()
        self.out_of_order = False
        self.config = Config(
            api_key=KEY, transport=self.transport, retries=rng.choice((0, 1, 3)), on_exhausted=rng.choice(("keep", "drop")),
            batch_size=rng.choice((1, 3, 250)), max_senders=rng.choice((1, 3)), on_drop=self.on_drop,
            queue_size=rng.choice((0, 0, 0, 7)),
        )  # fmt: skip
        buffer = SqliteSpool(self.path) if self.path else chirrop._Memory()
        self.outbox = chirrop._Outbox(buffer, self.config, rng.random)
        self.sender = chirrop._Sender(
            self.outbox, chirrop._Link(self.config), self.config, lambda: self.now
        )
        self.sender._spawn = lambda: None
        self.sender._deliver = self.deliver
        self.sender.report.kick = self.report
        self.sender.report.write = lambda final=False: None

    # What strikes.

    @classmethod
    def struck(cls, function):
        """Return a function that does the same, and may be struck before it and after it."""

        @functools.wraps(function)
        def step(*args, **kwargs):
            cls.strike()
            if function in cls.DISK:
                cls.fail(function)
            result = function(*args, **kwargs)
            cls.strike()
            return result

        return step

    @classmethod
    def fail(cls, function):
        self = cls.running
        if self.faulty and not self.healthy and self.rng.random() < 0.1:
            # What is in memory overtakes a file that cannot be read.
            reading = function.__code__, *(frame.f_code for frame, _ in traceback.walk_stack(None))
            self.out_of_order |= cls.FILL in reading
            raise sqlite3.OperationalError("database or disk is full")

    @classmethod
    def strike(cls):
        self = cls.running
        if self is not None and self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                self.was_struck = True
                self.fuse = self.rng.choice((None, None, None, self.rng.randrange(10)))  # once more
                self.handle(signal.SIGINT, sys._getframe())  # the frame that it interrupts

    def handle(self, number, frame):
        raise self.rng.choice(self.STRIKES)

    was_struck = False  # the call that is under way

    def call(self, function, *args):
        """Make a call, which may be struck: return (its result,), or () if it was."""
        outer, self.fuse, self.was_struck = (self.fuse, self.was_struck), None, False
        if not self.healthy and self.rng.random() < 0.3:
            self.fuse = self.rng.choice((self.rng.randrange(30), self.rng.randrange(150)))
        try:
            result = function(*args)
            assert not self.was_struck, "an exception was swallowed"
            return (result,)
        except self.STRIKES:
            return ()
        finally:
            self.fuse, self.was_struck = outer

    # The application, the server, other threads.

    def on_drop(self, logs, error):
        self.dropped += ids(logs)
        if error.status_code and not self.faulty:  # the others were never in a file
            self.refused.update(ids(logs))
        if self.rng.random() < 0.1:
            raise RuntimeError("on_drop")

    def report(self):
        """Do what the thread "chirrop-reporter" does."""
        outer, self.fuse = self.fuse, None
        self.sender.report.run()
        self.fuse = outer
        return True

    def transport(self, method, url, body, headers, timeout):
        logs = json.loads(body)
        self.wrong |= not 1 <= len(logs) <= 250  # an assertion would count as a network failure
        self.wrong |= len(set(ids(logs))) < len(logs)
        self.wrong |= not self.heard.isdisjoint(ids(logs))
        if not self.faulty:  # what a full disk has kept from being removed, a later process sends
            self.wrong |= not self.delivered.isdisjoint(ids(logs))
        outer, self.fuse = self.fuse, None  # what follows is not done by the caller
        for _ in range(0 if self.healthy else self.rng.choice((0, 0, 1, 2))):
            self.act()
        self.fuse = outer
        self.now += self.rng.choice((0.0, 0.1, 5.0))
        kinds = "ok", "ok", "ok", "lost", "reset", "status", "poison", "late crash"
        roll = "ok" if self.healthy else self.rng.choice(kinds)
        if roll == "lost":
            raise ConnectionResetError("before")
        if any(log["log_id"] in self.poison for log in logs):
            return self.rng.choice((400, 413, 422)), b'{"error": "poison"}', {}
        if roll == "status":
            after = self.rng.choice(({}, {"retry-after": "2"}, {"retry-after": "nan"}))
            statuses = 302, 401, 403, 404, 408, 413, 429, 500, 502, 503, 504, 599
            return self.rng.choice(statuses), b"", after
        self.stored.update(ids(logs))
        if roll == "reset":
            raise ConnectionResetError("after")
        if roll == "late crash" and self.path:
            raise self.Crash
        if (
            self.outbox.state.stopped
        ):  # it comes too late, unless a strike has kept close() from ending
            self.unheard.update(ids(logs))
        else:
            self.answered = ids(logs)
        self.heard.update(ids(logs))  # even if a strike comes right now
        return 200, b"", {}

    def deliver(self, batch, timeout):
        self.answered = []
        try:
            chirrop._Sender._deliver(self.sender, batch, timeout)
        except self.STRIKES:
            self.unheard.update(self.answered)
            raise
        self.delivered.update(self.answered)

    def act(self):
        actions = "log", "log", "log", "send", "send", "tick", "flush", "stats", "end"
        getattr(self, self.rng.choice(actions))()
        self.balance()

    def log(self):
        for _ in range(self.rng.choice((1, 2, 300 if self.rng.random() < 0.03 else 5))):
            entry = Log("a", 1)
            if self.rng.random() < 0.05:
                self.poison.add(entry.log_id)
            try:
                returned = self.call(self.sender.put, entry._body)
            except ChirrOpQueueFullError:
                continue
            if returned:
                self.accepted.append(entry.log_id)
            else:
                self.doubtful.add(entry.log_id)

    def send(self):
        """Do what a sender does in one turn; the exception that strikes it does not end it."""
        if self.depth > 4:
            return
        self.depth += 1
        try:
            self.call(self.send_as, 1000 + self.depth)
            self.outbox.release(1000 + self.depth)  # as it will when it goes on
        finally:
            self.depth -= 1

    def send_as(self, holder):
        self.outbox.buffer.tend()
        batch = self.outbox.take(self.now, holder)
        if batch is not None:
            self.sender._deliver(batch, 1.0)

    def tick(self):
        self.now += self.rng.choice((0.01, 0.5, 3.0, 40.0))

    def flush(self):
        if self.depth or chirrop._is_inside(chirrop._Sender._deliver.__code__):
            self.outbox.begin_flush(self.now)  # another thread's, which waits elsewhere
            return
        self.report()
        held = set(self.accepted[self.before if self.faulty else 0 :])
        held -= {*self.dropped, *self.forgotten}
        deadline = self.now + self.rng.choice((0.0, 10.0, 1000.0, math.inf))
        if self.call(self.sender.flush, deadline) == (True,) and not self.out_of_order:
            assert held <= self.stored | self.dead_letters(), "flush was True too early"

    def stats(self):
        self.call(self.outbox.stats)

    def end(self):
        if self.rng.random() > 0.15:
            return
        if self.path and self.rng.random() < 0.7:
            raise self.Crash
        self.call(self.sender.close, self.now + self.rng.choice((0.0, 10.0, 1000.0)))

    def crash(self):
        """Lose the process: everything in memory goes, the kernel closes its files and locks."""
        spool = self.outbox.buffer
        batches = [batch.items for batch in self.outbox.state.batches if not spool.stays(batch)]
        for body in itertools.chain(spool._inbox, *batches):
            self.forgotten.add(json.loads(body)["log_id"])
        for file in spool._files():
            if file.conn is not None:
                file.conn.close()
        for lock in self.locks:
            lock.close()
        self.depth = 0
        self.fuse = None
        self.start()

    def balance(self):
        assert not self.wrong, "a request is too large, or has what was answered before"
        stats = self.outbox.stats()
        total = stats.delivered + sum(stats.dropped.values()) + stats.queued + stats.in_flight
        assert stats.accepted == total, stats
        assert stats.queued >= 0 and stats.in_flight >= 0, stats
        if self.config.on_exhausted == "keep":
            assert "exhausted" not in stats.dropped, stats
            assert "refused" not in stats.dropped or self.faulty or not self.path, stats
        return stats

    def run(self):
        for _ in range(self.rng.randrange(5, 25)):
            try:
                self.act()
            except self.Crash:
                self.crash()
            if self.outbox.state.stopped and self.rng.random() < 0.5:
                if not self.path:
                    break
                self.sender.close(self.now)  # it may have been struck
                self.start()
        self.finish()

    def finish(self):
        """Let the server recover and everything be sent, in a new process where logs may wait on disk."""
        self.healthy = True
        for _ in range(2 if self.path else 1):
            if self.path:
                self.sender.close(self.now)
                self.start()
            for _ in range(200):
                self.sender.flush(math.inf)
                if self.outbox.state.stopped or not self.outbox.held():
                    break
            else:
                raise AssertionError("it never ends")
            assert self.sender.close(math.inf) or not self.path
        stats = self.balance()
        assert stats.queued == stats.in_flight == 0, stats
        self.check(stats)

    def check(self, stats):
        accepted, dropped = set(self.accepted), set(self.dropped)
        known, delivered = accepted | self.doubtful, self.delivered | self.unheard & self.stored
        assert len(accepted) == len(self.accepted)
        assert len(dropped) == len(self.dropped) or self.faulty, "a drop was reported twice"
        assert delivered <= known and dropped <= known and self.stored <= known
        if self.path:
            settled = delivered | dropped | self.dead_letters() | self.stored | self.forgotten
            assert accepted <= settled, "a log is unaccounted for"
            assert self.refused <= self.dead_letters()
            self.start()
            self.sender.flush(math.inf)
            assert self.outbox.stats().accepted == 0, "delivered or dropped, but still in the file"
            self.sender.close(math.inf)
            assert all(lock.closed for lock in self.locks), "a file is still locked"
            for _ in range(20):  # a strike may leave a connection to the garbage collector
                if self.side_files():  # PyPy's takes several turns for what has finalisers
                    gc.collect()
            assert not self.side_files(), self.side_files()
        else:
            assert accepted <= delivered | dropped, "a log is unaccounted for"
            assert not self.delivered & dropped
            assert len(accepted) <= stats.accepted <= len(known), (stats, len(accepted))
            assert len(self.delivered) <= stats.delivered <= len(delivered), stats
            assert sum(stats.dropped.values()) == len(dropped), stats

    def dead_letters(self):
        letters = SqliteSpool(self.path).dead_letters() if self.path else []
        return {letter["log"]["log_id"] for letter in letters}

    def side_files(self):
        names = os.listdir(os.path.dirname(self.path))
        return [name for name in names if name.endswith(("-lock", "-wal", "-shm"))]


class SimulationTest(TestCase):
    """TEST_SEED=N runs one seed alone."""

    def setUp(self):
        super().setUp()
        # Their code marks what a thread is doing: it is looked for on its stack.
        marks = chirrop._Sender._run, chirrop._Sender._deliver, SqliteSpool._claim
        parts = chirrop._Outbox, chirrop._Memory, chirrop._Sender, SqliteSpool, chirrop._SpoolFile
        for part in parts:
            for name, step in vars(part).items():
                if isinstance(step, types.FunctionType) and step not in marks:
                    self.patch(part, name, Simulation.struck(step))
        self.patch(chirrop._Bell, "wait", self.wait)
        self.patch(chirrop, "_ADOPT_SECONDS", 0.0)
        self.patch(chirrop, "SPOOL_RETRY_SECONDS", 0.0)
        lock_file = chirrop._lock_file

        def lock(path):
            file = lock_file(path)
            if file is not None:
                Simulation.running.locks.add(file)
            return file

        self.patch(chirrop, "_lock_file", lock)
        self.addCleanup(setattr, Simulation, "running", None)
        caught = warnings.catch_warnings()
        caught.__enter__()
        self.addCleanup(caught.__exit__, None, None, None)
        warnings.simplefilter("ignore", ResourceWarning)  # of files in the hands of a struck call
        self.addCleanup(gc.collect)

    @staticmethod
    def wait(bell, timeout):
        Simulation.running.now += min(timeout, 1000.0)
        return False

    def seeds(self, path=None):
        one = os.environ.get("TEST_SEED")
        for seed in [int(one)] if one else range(rounds(20, 5000)):
            where = path and f"{path}/{seed}"
            try:
                Simulation(seed, where).run()
            except BaseException as exc:
                raise AssertionError(
                    f"seed {seed}: {type(exc).__name__}: {exc}; run it alone with TEST_SEED={seed}"
                ) from exc
            if where:
                for name in os.listdir(path):
                    os.unlink(f"{path}/{name}")

    def test_every_log_is_accounted_for_in_memory_under_every_seed(self):
        self.seeds()

    def test_every_log_is_accounted_for_with_a_spool_and_crashes_under_every_seed(self):
        memory = "/dev/shm"  # a file system in memory, where there is one: commits without a disk
        self.seeds(self.folder(memory if os.path.isdir(memory) else None))


# ---- Spool, processes and signals -----------------------------------------

HAS_FORK = hasattr(os, "fork")


class Server:
    """ChirrOp's ingest on a loopback socket: keeps what it is sent, and answers as it is told.

    `go` cleared: requests are read but not answered. `arrived` counts those ids, `stored` the accepted ones.
    """

    def __init__(self):
        self.status, self.message, self.served = 200, b"", 1 << 60
        self.go = threading.Event()
        self.go.set()
        self.arrived, self.stored, self.connections = [], [], []
        self._changed, self._open = threading.Condition(), []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1.0/logs"
        threading.Thread(target=self._accept, name="test-server", daemon=True).start()

    def _accept(self):
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            self._open.append(peer)
            threading.Thread(
                target=self._serve, args=(peer,), name="test-server", daemon=True
            ).start()

    def _serve(self, peer):
        seen = []  # the ids of each request of this connection
        with contextlib.suppress(OSError), peer, peer.makefile("rb") as stream:
            self.connections.append(seen)
            while len(seen) < self.served and stream.readline():
                length = 0
                for line in iter(stream.readline, b"\r\n"):
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                body = stream.read(length)
                if len(body) < length:
                    return
                with self._changed:
                    seen.append(ids(json.loads(body)))
                    self.arrived += seen[-1]
                    self._changed.notify_all()
                self.go.wait()
                with self._changed:
                    if self.status == 200:
                        self.stored += seen[-1]
                    self._changed.notify_all()
                head = b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (
                    self.status,
                    len(self.message),
                )
                peer.sendall(head + self.message)
            peer.shutdown(socket.SHUT_RDWR)

    def wait(self, condition):
        with self._changed:
            if not self._changed.wait_for(condition, LONG):
                raise AssertionError(f"arrived {len(self.arrived)}, stored {len(self.stored)}")

    def close(self):
        self.go.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for peer in self._open:
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)


PRELUDE = """
import gc, os, signal, sys, threading, time, warnings
warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
import chirrop
from chirrop import Log, SqliteSpool, new_client

def client(url=None, **fields):
    fields.setdefault("flush_delay", 0)
    return new_client(api_key="chp_test", api_endpoint=url or sys.argv[1], **fields)

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
    "Run work() in a forked child; return its pid. The child ends at once, without exit handlers."
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(25)
            work()
            status = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid

def reap(*pids):
    for pid in pids:
        status = os.waitpid(pid, 0)[1]
        assert status == 0, f"child ended with {status}"
"""


class ProcessTestCase(TestCase):
    """What runs in other processes: programs get PRELUDE; a hang ends the run with all stacks."""

    def setUp(self):
        faulthandler.dump_traceback_later(4 * LONG, exit=True)
        self.addCleanup(faulthandler.cancel_dump_traceback_later)
        super().setUp()

    def server(self):
        server = Server()
        self.addCleanup(server.close)
        return server

    def spool(self):
        return self.folder() / "spool.db"

    def begin_program(self, code, *args, status=0, stderr="", env=None):
        """Begin PRELUDE and code; return a function that waits for its end and returns its words."""
        end = self.begin_python(PRELUDE + code, *args, env=env)

        def words():
            done = end()
            self.assertEqual(done.returncode, status, done.stderr + done.stdout)
            if stderr is not None:
                self.assertEqual(done.stderr, stderr)
            return done.stdout.split()

        return words

    def run_program(self, code, *args, **options):
        """Run PRELUDE and code to the end; return the words it printed."""
        return self.begin_program(code, *args, **options)()

    def start_program(self, code, *args):
        """Start PRELUDE and code, without -X dev, for speed; it is killed at the end at the latest."""
        errors = tempfile.TemporaryFile()
        self.addCleanup(errors.close)
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", PRELUDE + code, *map(str, args)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, bufsize=0,
            env={**os.environ, "PYTHONPATH": str(HERE)},
        )  # fmt: skip
        process.errors = errors
        self.addCleanup(self.end_program, process)
        return process

    def end_program(self, process):
        if process.poll() is None:
            process.kill()
        process.wait(LONG)
        process.stdin.close()
        process.stdout.close()

    def kill_program(self, process):
        """Kill a program with SIGKILL; return the rest of what it printed."""
        process.kill()
        rest = process.stdout.read().decode().split()
        self.end_program(process)
        return rest

    def line(self, process):
        line = process.stdout.readline().decode().strip()
        if not line:
            process.errors.seek(0)
            self.fail(f"the program ended early: {process.errors.read().decode()}")
        return line

    def warnings_of(self, text):
        return [r for r in self.records if r.levelno >= logging.WARNING and text in r.getMessage()]

    def make_spool(self, count=3, path=None):
        """Return the path of a closed spool that holds `count` logs, and their ids."""
        path = path or self.spool()
        entries = [Log("left", n) for n in range(count)]
        client = new_client(
            api_key=KEY, transport=FakeTransport(default=ConnectionError("down")), spool=path
        )
        for entry in entries:
            client.log(entry)
        client.close(0)
        client._sender._threads.join(time.monotonic() + LONG)  # one may have an answer to tell of
        self.reported(client)
        return path, [entry.log_id for entry in entries]

    def drain(self, path):
        """Send all that a spool holds, as a later run would; return the ids."""
        transport = FakeTransport()
        client = new_client(api_key=KEY, transport=transport, spool=path)
        self.assertTrue(client.flush(LONG), client.stats())
        self.assertTrue(client.close(LONG))
        self.assertBalanced(client)
        return ids(transport.logs())

    def rows(self, path, condition="1"):
        with contextlib.closing(sqlite3.connect(path)) as conn:
            return conn.execute(f"SELECT count(*) FROM logs WHERE {condition}").fetchone()[0]


# ---- Spool ----------------------------------------------------------------


class SpoolTest(ProcessTestCase):
    def test_log_is_committed_when_log_returns(self):
        path = self.spool()
        client = self.client(spool=path, flush_delay=60)
        for count in range(1, 4):
            client.log(Log("x", count))
            self.assertEqual(self.rows(path), count)

    def test_a_file_given_up_in_the_middle_of_a_look_at_it_is_no_failure(self):
        path, transport = self.spool(), FakeTransport()
        client = self.client(spool=path, transport=transport, flush_delay=60)
        client.log(Log("x", 1))
        spool = client._outbox.buffer
        file = spool._own

        def look():
            spool._give_up(file)  # as another thread does it
            return file.conn.total_changes

        self.assertEqual(spool._attempt(file, look), ())
        client.log(Log("x", 2))
        self.assertTrue(client.flush(LONG))
        self.assertEqual((len(transport.logs()), self.records), (2, []))

    def test_leaving_with_takes_at_most_exit_timeout_where_the_log_is_on_disk(self):
        path, transport = self.spool(), FakeTransport()
        busy = FakeTransport(default=(429, b"", {"Retry-After": "300"}))
        client = self.client(spool=path, transport=busy, exit_timeout=0.05)
        entry = Log("x", 1)

        def job():
            with client:
                client.log(entry)

        leaving = threading.Thread(target=job, daemon=True)
        leaving.start()
        leaving.join(LONG)
        self.assertFalse(leaving.is_alive())
        again = self.client(spool=path, transport=transport, flush_delay=0)
        self.assertTrue(again.flush(LONG))
        self.assertEqual(ids(transport.logs()), [entry.log_id])

    def test_log_survives_kill_9_and_the_next_run_sends_it_under_the_same_id(self):
        path = self.spool()
        done = self.python(
            PRELUDE + "log(client(spool=sys.argv[2], transport=down), 5); os.kill(os.getpid(), 9)",
            "http://x",
            path,
        )
        self.assertEqual(done.returncode, -9, done.stderr)
        self.assertEqual(self.drain(path), done.stdout.split())

    def test_restart_resends_what_close_left_in_order_and_under_the_same_ids(self):
        path, left = self.make_spool(600)
        self.assertEqual(self.drain(path), left)
        self.assertEqual(self.drain(path), [])

    def test_delivered_logs_are_removed_from_the_file(self):
        path = self.spool()
        client = self.client(spool=path, flush_delay=0)
        for n in range(5):
            client.log(Log("x", n))
        self.assertTrue(client.flush(LONG))
        self.assertEqual(self.rows(path), 0)

    def test_refused_logs_are_held_and_wait_for_a_later_run(self):
        for status in (401, 403, 404, 500, 503, 302):
            with self.subTest(status):
                path = self.spool()
                dropped = []
                client = self.client(
                    transport=FakeTransport(default=status),
                    spool=path,
                    on_drop=lambda *a: dropped.append(a),
                )
                entries = [Log("x", n) for n in range(3)]
                for entry in entries:
                    client.log(entry)
                self.assertFalse(client.flush(LONG))
                stats = self.assertBalanced(client)
                self.assertEqual((stats.queued, stats.dropped, dropped), (3, {}, []))
                self.assertEqual(len(client._link._transport.requests), 1)
                self.assertFalse(client.flush(LONG))  # offers it again
                self.assertEqual(len(client._link._transport.requests), 2)
                client.close(0)
                self.assertEqual(self.assertBalanced(client).queued, 3)
                self.assertEqual(SqliteSpool(path).dead_letters(), [])
                self.assertEqual(self.drain(path), [e.log_id for e in entries])

    def test_rejected_logs_become_dead_letters_with_the_servers_message(self):
        for status in (400, 413, 422):
            with self.subTest(status):
                path = self.spool()

                def judge(body, status=status):
                    return (status, b'{"error":"no such unit"}', {}) if b'"poison"' in body else 200

                transport, dropped = FakeTransport(default=judge), []
                client = self.client(
                    transport=transport, spool=path, on_drop=lambda *a: dropped.append(a)
                )
                entries = [Log("poison" if n in (3, 17) else "fine", n) for n in range(20)]
                for entry in entries:
                    client.log(entry)
                self.assertFalse(client.flush(LONG))
                stats = self.assertBalanced(client)
                self.assertEqual((stats.delivered, stats.dropped), (18, {"rejected": 2}))
                client.close(LONG)
                spool = SqliteSpool(path)
                self.assertEqual(
                    [d["log"] for d in spool.dead_letters()],
                    [entries[3].to_dict(), entries[17].to_dict()],
                )
                self.assertIn("no such unit", spool.dead_letters()[0]["error"])
                self.assertEqual(self.drain(path), [])  # dead letters are not sent again
                self.assertEqual(len(spool.dead_letters(remove=True)), 2)
                self.assertEqual(spool.dead_letters(), [])
                self.assertEqual(len(dropped), 2)

    def test_a_dead_letter_among_logs_that_are_sent_later_stays(self):
        path = self.spool()
        judge = FakeTransport(default=lambda body: 400 if b'"poison"' in body else 503)
        client = self.client(spool=path, transport=judge, flush_delay=60)
        entries = [Log("poison" if number == 2 else "fine", number) for number in range(5)]
        for entry in entries:
            client.log(entry)
        self.assertFalse(client.flush(LONG))
        client.close(0)
        bad = entries.pop(2)
        self.assertEqual(self.drain(path), [entry.log_id for entry in entries])
        self.assertEqual([d["log"] for d in SqliteSpool(path).dead_letters()], [bad.to_dict()])

    def test_dead_letters_of_a_file_that_is_not_there_are_none_and_make_no_file(self):
        path = self.spool()
        self.assertEqual(SqliteSpool(path).dead_letters(), [])
        self.assertFalse(path.exists())

    def test_eight_threads_log_each_log_once(self):
        path, transport = self.spool(), FakeTransport()
        client = self.client(transport=transport, spool=path, flush_delay=0.01)
        entries = [Log("x", n) for n in range(1600)]

        def work(part):
            for entry in part:
                client.log(entry)

        threads = [threading.Thread(target=work, args=(entries[n::8],)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
        self.assertTrue(client.close(LONG))
        self.assertEqual(sorted(ids(transport.logs())), sorted(e.log_id for e in entries))

    def test_close_leaves_no_wal_shm_or_lock_file(self):
        path, _ = self.make_spool()
        self.assertEqual(os.listdir(path.parent), [path.name])

    def test_files_have_mode_0600_and_hold_no_key(self):
        path = self.spool()
        client = self.client(spool=path, transport=FakeTransport(default=401), api_key="chp_canary")
        client.log(Log("x", 1))
        client.flush(LONG)
        client.log(Log("x", 2))
        names = os.listdir(path.parent)
        self.assertEqual(set(names), {"spool.db", "spool.db-wal", "spool.db-shm", "spool.db-lock"})
        for name in names:
            self.assertEqual(stat.S_IMODE((path.parent / name).stat().st_mode), 0o600, name)
        # Read elsewhere: closing a file here would take the locks SQLite has on it in this process.
        code = "import pathlib, sys; print(sum(b'canary' in p.read_bytes() for p in pathlib.Path(sys.argv[1]).iterdir()))"
        self.assertEqual(self.python(code, path.parent).stdout.strip(), "0")

    def test_a_drained_spool_leaves_one_small_file(self):
        path, left = self.make_spool(2000)
        self.assertGreater(path.stat().st_size, 200_000)
        again, later = self.make_spool(2, path)  # behind what waits there
        self.assertEqual(os.listdir(path.parent), [path.name])
        self.assertEqual(self.drain(path), left + later)
        self.assertEqual(os.listdir(path.parent), [path.name])
        self.assertEqual(self.rows(path), 0)
        self.assertLess(path.stat().st_size, 20_000)

    def test_clients_that_share_a_path_have_a_file_each(self):
        path = self.spool()
        clients = [self.client(spool=path, flush_delay=60) for _ in range(3)]
        for number, client in enumerate(clients):
            client.log(Log("x", number))
        files = [path, *(path.with_name(f"{path.name}.{number}") for number in (2, 3))]
        self.assertEqual([self.rows(file) for file in files], [1, 1, 1])
        clients[1].close(LONG)
        self.assertFalse(files[1].exists(), "it is empty, and not the first")
        clients[0].close(LONG)
        self.assertTrue(path.exists())
        clients[0] = self.client(spool=path, flush_delay=60)
        clients[0].log(Log("x", 4))
        self.assertEqual([self.rows(path), files[1].exists()], [1, False])

    def test_dead_letters_of_all_files_are_read_while_clients_use_them(self):
        path = self.spool()
        spool = SqliteSpool(path)
        for number in range(3):
            client = self.client(400, spool=path, flush_delay=60)
            client.log(Log("bad", number))
            client.flush(LONG)
            client.log(Log("waits", number))
            self.assertEqual(client.stats().queued, 1)
        self.assertEqual([d["log"]["value"] for d in spool.dead_letters()], [0, 1, 2])
        self.assertEqual(len(spool.dead_letters(remove=True)), 3)
        self.assertEqual(spool.dead_letters(), [])

    def test_a_numbered_file_with_a_dead_letter_is_kept(self):
        path = self.spool()
        first = self.client(spool=path, flush_delay=60)
        first.log(Log("x", 1))
        second = self.client(400, spool=path, flush_delay=60)
        second.log(Log("bad", 2))
        second.close(LONG)
        self.assertTrue(path.with_name(path.name + ".2").exists())
        first.close(LONG)
        self.assertEqual(len(SqliteSpool(path).dead_letters(remove=True)), 1)
        self.assertEqual(self.drain(path), [])
        self.assertEqual(os.listdir(path.parent), [path.name])

    def test_the_wal_stays_small_under_steady_writing(self):
        self.write_steadily(self.spool())

    def test_the_wal_stays_small_where_no_second_connection_can_be_had(self):
        with mock.patch.object(SqliteSpool, "_aside", side_effect=OSError("too many open files")):
            self.write_steadily(self.spool())

    def write_steadily(self, path):
        largest = 0
        client = self.client(spool=path, transport=FakeTransport(default=OSError("down")))
        wal = path.with_name(path.name + "-wal")
        with mock.patch.object(chirrop, "_TEND_ROWS", 100):
            for number in range(2000):
                client.log(Log("x", number, meta="m" * 500))
                if number % 100 == 99:
                    client._outbox.buffer.tend()  # as the sender does that this wakes
                    largest = max(largest, wal.stat().st_size)
        self.assertGreater(path.stat().st_size, 1_000_000)
        self.assertLess(largest, 1_500_000)
        client.close(0)

    def test_a_flush_does_not_wait_for_rows_that_somebody_has_removed(self):
        path, transport = self.spool(), FakeTransport()
        client = self.client(spool=path, transport=transport, flush_delay=60)
        for number in range(3):
            client.log(Log("x", number))
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("DELETE FROM logs WHERE id = 2")
        self.assertTrue(client.flush(LONG))
        self.assertEqual([log["value"] for log in transport.logs()], [0, 2])

    def test_a_closed_client_takes_nothing_over(self):
        down = FakeTransport(default=ConnectionError("down"))
        path = self.spool()
        client = self.client(spool=path, transport=down, flush_delay=60)
        client.log(Log("x", 1))
        self.assertFalse(client.close(0))
        client._outbox.buffer._look_at = 0.0
        self.assertFalse(client.flush(0))
        self.assertEqual(os.listdir(path.parent), [path.name])
        self.assertEqual(len(self.drain(path)), 1)

    def test_a_folder_that_cannot_be_listed_is_looked_at_again(self):
        path, transport = self.spool(), FakeTransport()
        client = self.client(spool=path, transport=transport, flush_delay=60)
        client.log(Log("x", 1))
        spool = client._outbox.buffer
        spool._look_at = 0.0
        with mock.patch.object(os, "listdir", side_effect=OSError("too many open files")):
            self.assertTrue(client.flush(LONG))
            self.assertLess(spool._look_at, math.inf)

    def test_ids_are_not_given_out_twice_when_the_file_runs_empty(self):
        client = self.client(spool=self.spool(), transport=FakeTransport(), flush_delay=60)
        for count in range(1, 4):
            client.log(Log("x", count))
            self.assertEqual(client.stats().queued, 1)
            self.assertTrue(client.flush(LONG))
            self.assertEqual(self.assertBalanced(client).accepted, count)

    def test_with_the_file_full_log_raises_and_nothing_is_pruned(self):
        path = self.spool()
        client = self.client(
            spool=SqliteSpool(path, max_bytes=64 * 1024),
            transport=FakeTransport(),
            flush_delay=60,
            batch_size=10**6,
        )
        accepted = []
        with self.assertRaisesRegex(ChirrOpQueueFullError, "65536"):
            for n in range(1000):
                entry = Log("x", n, meta="m" * 500)
                client.log(entry)
                accepted.append(entry.log_id)
        self.assertGreater(len(accepted), 40)
        self.assertEqual(self.assertBalanced(client).accepted, len(accepted))
        self.assertTrue(client.flush(LONG))
        self.assertEqual(ids(client._link._transport.logs()), accepted)
        client.log(Log("room again", 1))
        self.assertLessEqual(path.stat().st_size, 64 * 1024)

    def test_a_folder_that_does_not_exist_is_named_as_what_is_missing(self):
        path = self.folder() / "none" / "spool.db"
        client = self.client(spool=path, transport=FakeTransport(), flush_delay=0)
        client.log(Log("x", 1))
        self.assertTrue(client.flush(LONG))  # from memory
        self.reported(client)
        self.assertIn("its folder does not exist: make that first", self.records[0].getMessage())
        with self.assertRaisesRegex(ChirrOpError, "its folder does not exist"):
            self.client(spool=SqliteSpool(path, required=True))

    def test_a_flush_is_false_while_left_overs_cannot_be_counted(self):
        path, left = self.make_spool(3)
        transport = FakeTransport()
        client = self.client(spool=path, transport=transport, flush_delay=0)
        spool = client._outbox.buffer
        aside, spool._aside = spool._aside, mock.Mock(side_effect=sqlite3.OperationalError("busy"))
        self.assertFalse(client.flush(0.2))
        spool._aside = aside
        self.assertTrue(client.flush(LONG))
        self.assertEqual(ids(transport.logs()), left)

    def test_files_with_dead_letters_only_are_not_held(self):
        path = self.spool()
        for number in range(2, 12):
            self.make_spool(1, f"{path}.{number}")
            with contextlib.closing(sqlite3.connect(f"{path}.{number}")) as conn, conn:
                conn.execute("UPDATE logs SET error = 'bad'")
        _, left = self.make_spool(2, f"{path}.12")
        transport = FakeTransport()
        client = self.client(spool=path, transport=transport)
        self.assertTrue(client.flush(LONG))
        self.assertEqual(ids(transport.logs()), left)
        self.assertTrue(client.close(LONG))
        self.assertEqual(len(SqliteSpool(path).dead_letters()), 10)

    def test_a_log_put_while_close_ends_is_reported_not_orphaned(self):
        path = self.spool()
        client = self.client(spool=path, transport=FakeTransport())
        client.log(Log("x", 1))
        client.flush(LONG)
        spool, late = client._outbox.buffer, Log("late", 1)
        leave = spool.leave

        def leave_with_a_late_log():
            left = leave()
            client.log(late)  # as a signal handler does
            return left

        spool.leave = leave_with_a_late_log
        client.close(LONG)
        stats = self.assertBalanced(client)
        self.assertEqual((stats.queued, stats.dropped), (0, {"closed": 1}))
        self.assertEqual(self.rows(path), 0)

    def test_logging_while_another_thread_closes_loses_and_forgets_nothing(self):
        for seed in range(rounds(10, 40)):
            path, barrier = self.spool(), threading.Barrier(5)
            client = self.client(
                spool=path, transport=FakeTransport(default=ConnectionError("down")), flush_delay=60
            )
            entries = [[Log("x", n) for n in range(8)] for _ in range(4)]

            def work(mine):
                barrier.wait(LONG)
                for entry in mine:
                    client.log(entry)

            threads = [threading.Thread(target=work, args=(mine,)) for mine in entries]
            for thread in threads:
                thread.start()
            barrier.wait(LONG)
            client.close(0)
            for thread in threads:
                thread.join(LONG)
            stats = self.assertBalanced(client)
            self.assertEqual(stats.accepted, 32)
            self.assertEqual(
                len(self.drain(path)) + stats.dropped.get("closed", 0), 32, f"seed {seed}"
            )

    def test_ctrl_c_inside_the_spool_leaves_later_logs_committed(self):
        path = self.spool()
        client = self.client(spool=path, transport=FakeTransport(), flush_delay=60)
        client.log(Log("x", 1))
        spool = client._outbox.buffer
        with (
            mock.patch.object(spool, "_tend", side_effect=KeyboardInterrupt),
            self.assertRaises(KeyboardInterrupt),
        ):
            client.flush()
        client.log(Log("x", 2))
        self.assertEqual(self.rows(path), 2)
        self.assertTrue(client.flush(LONG))

    def test_a_log_from_a_finaliser_inside_the_spool_is_committed_at_once(self):
        path, entry = self.spool(), Log("from a finaliser", 1)
        client = self.client(spool=path, transport=FakeTransport(), flush_delay=60)
        client.log(Log("x", 1))
        for name, work in (("put", lambda: client.log(Log("y", 1))), ("_rows", client.stats)):
            with self.subTest(name):
                self.collect_inside(client, client._outbox.buffer, name, entry)
                before = self.rows(path)
                work()
                self.assertFalse(client._outbox.buffer._inbox)
                self.assertEqual(self.rows(path), before + (2 if name == "put" else 1))
        self.assertTrue(client.flush(LONG))
        self.assertEqual(self.assertBalanced(client).delivered, 4)

    def collect_inside(self, client, target, name, entry):
        """Arrange that the next call of target.name collects garbage whose finaliser logs `entry`, once."""
        method, armed = getattr(target, name), [True]

        class Garbage:
            def __init__(self):
                self.me = self

            def __del__(self):
                client.log(entry)

        def work(*args):
            if armed.pop() if armed else False:
                Garbage()
                gc.collect()
            return method(*args)

        gc.disable()
        self.addCleanup(gc.enable)
        setattr(target, name, lambda *args: chirrop._exclusively(target.lock, work, *args))


class SpoolMisuseTest(ProcessTestCase):
    def test_bad_arguments_are_named(self):
        for arguments, name in (
            (("",), "path"), ((5,), "path"), (("x", -1), "max_bytes"), (("x", 1.5), "max_bytes"), (("x", True), "max_bytes"),
        ):  # fmt: skip
            with (
                self.subTest(arguments),
                self.assertRaisesRegex(chirrop.ChirrOpValidationError, name),
            ):
                SqliteSpool(*arguments)
        with self.assertRaisesRegex(chirrop.ChirrOpValidationError, "synchronous"):
            SqliteSpool("x", synchronous="OFF")

    def test_a_required_spool_that_cannot_be_used_raises_when_the_client_is_made(self):
        folder = self.folder()
        (folder / "notes").write_text("no database, and long enough to be taken for one" * 100)
        for path in (folder / "missing" / "x.spool", folder, folder / "notes" / "x.spool"):
            with self.subTest(path.name), self.assertRaisesRegex(ChirrOpError, "spool"):
                self.client(spool=SqliteSpool(path, required=True))
        client = self.client(spool=SqliteSpool(folder / "good.spool", required=True))
        client.log(Log("x", 1))
        self.assertTrue(client.flush(LONG))
        self.assertEqual(self.records, [])

    def test_making_a_spool_or_a_client_touches_no_file(self):
        path = self.spool()
        client = self.client(spool=SqliteSpool(path))
        client.stats()
        self.assertEqual(os.listdir(path.parent), [])

    def test_without_sqlite3_only_a_spool_fails_with_one_clear_error(self):
        self.run_program(
            """
sys.modules["sqlite3"] = None
client(transport=lambda *a: (200, b"", {})).close()
for make in lambda: SqliteSpool("x"), lambda: client(spool="x"):
    try:
        make()
    except chirrop.ChirrOpError as exc:
        assert "sqlite3" in str(exc), exc
    else:
        raise AssertionError("no error")
""",
            "http://127.0.0.1:1/",
        )

    def test_importing_chirrop_does_not_import_sqlite3(self):
        self.run_program("assert 'sqlite3' not in sys.modules", env=NOT_COUNTED)

    def assertGoesOnInMemory(self, path):
        """Log through a spool at an unusable path: delivered, one warning, balanced."""
        self.records.clear()
        transport = FakeTransport()
        client = self.client(transport=transport, spool=path, flush_delay=0)
        entries = [Log("x", n) for n in range(30)]
        for entry in entries:
            client.log(entry)
        self.assertTrue(client.flush(LONG))
        self.assertTrue(client.close(LONG))
        self.assertEqual(sorted(ids(transport.logs())), sorted(e.log_id for e in entries))
        self.assertEqual(self.assertBalanced(client).delivered, 30)
        self.assertEqual(len(self.warnings_of("spool")), 1, [r.getMessage() for r in self.records])

    def test_a_folder_in_place_of_the_file_leaves_the_client_in_memory(self):
        path = self.spool()
        path.mkdir()
        self.assertGoesOnInMemory(path)

    def test_a_missing_or_unwritable_folder_leaves_the_client_in_memory(self):
        folder = self.folder()
        (folder / "file").write_text("x")
        for path in (
            folder / "missing" / "spool.db",
            folder / "file" / "spool.db",
            "/proc/chirrop/spool.db",
        ):
            with self.subTest(str(path)):
                self.assertGoesOnInMemory(path)

    def test_a_read_only_folder_leaves_the_client_in_memory(self):
        """Root may write anywhere, so the refusal is made here."""
        path, real = self.spool(), os.open

        def refuse(name, flags, *args, **kwargs):
            if str(name).startswith(str(path)):
                raise PermissionError(13, "Permission denied", str(name))
            return real(name, flags, *args, **kwargs)

        with mock.patch("os.open", refuse):
            self.assertGoesOnInMemory(path)

    def test_a_read_only_file_leaves_the_client_in_memory_and_its_logs_in_the_file(self):
        path, left = self.make_spool(5)
        connect = sqlite3.connect

        def read_only(name, **options):
            return connect(name.replace("mode=rw", "mode=ro"), **options)

        with mock.patch("sqlite3.connect", read_only):
            self.assertGoesOnInMemory(path)
        self.assertEqual(self.drain(path), left)

    def test_a_file_of_a_newer_version_is_left_alone(self):
        path, left = self.make_spool()
        with contextlib.closing(sqlite3.connect(path)) as conn:
            conn.execute("PRAGMA user_version = 99")
        before = path.read_bytes()
        self.assertGoesOnInMemory(path)
        self.assertEqual((os.listdir(path.parent), path.read_bytes()), ([path.name], before))

    def test_a_file_of_another_program_is_left_alone(self):
        path = self.spool()
        path.write_text("these are my notes\n" * 100)
        self.assertGoesOnInMemory(path)
        self.assertEqual(path.read_text(), "these are my notes\n" * 100)
        self.assertEqual(os.listdir(path.parent), [path.name])

    def test_a_spool_of_the_first_layout_is_refused_with_its_reason(self):
        path = self.spool()
        with contextlib.closing(sqlite3.connect(path)) as conn:
            conn.execute("CREATE TABLE logs (id INTEGER PRIMARY KEY, body BLOB, state INTEGER)")
            conn.execute("PRAGMA user_version = 1")
        before = path.read_bytes()
        with self.assertRaisesRegex(ChirrOpError, "a spool of the first layout"):
            new_client(api_key=KEY, spool=SqliteSpool(path, required=True))
        with self.assertRaisesRegex(ChirrOpError, "it is no spool"):
            SqliteSpool(path).dead_letters()
        self.assertEqual(path.read_bytes(), before)

    @unittest.skipUnless(os.name == "posix", "no owners and modes here")
    def test_a_folder_in_which_everyone_may_replace_files_is_refused(self):
        path = self.spool()
        path.parent.chmod(0o777)
        self.assertGoesOnInMemory(path)
        self.assertEqual(os.listdir(path.parent), [])
        path.parent.chmod(0o1777)  # sticky, as /tmp is
        client = self.client(spool=path)
        client.log(Log("x", 1))
        self.assertTrue(path.exists())

    @unittest.skipUnless(os.name == "posix", "no owners and modes here")
    def test_what_another_user_could_have_put_there_is_refused_and_left_as_it_was(self):
        for suffix in ("", "-wal", "-shm", "-journal", "-lock"):
            for kind in ("link", "user"):
                path = self.spool()
                theirs = path.with_name(path.name + suffix)
                if kind == "link":
                    target = path.with_name("target")
                    target.write_bytes(b"precious")
                    theirs.symlink_to(target)
                elif os.geteuid() == 0:
                    theirs.write_bytes(b"")
                    os.chown(theirs, 12345, 12345)
                else:
                    continue
                with self.subTest(suffix, kind=kind):
                    self.assertGoesOnInMemory(path)
                    names = {theirs.name} | ({"target"} if kind == "link" else set())
                    self.assertEqual(set(os.listdir(path.parent)), names)
                    if kind == "link":
                        self.assertEqual(target.read_bytes(), b"precious")

    @unittest.skipUnless(os.name == "posix", "no owners and modes here")
    def test_a_file_that_others_can_read_is_used_as_it_is_and_said_once(self):
        path, left = self.make_spool()
        path.chmod(0o644)
        self.assertEqual(self.drain(path), left)
        self.assertEqual(stat.S_IMODE(path.stat().st_mode), 0o644)
        self.assertEqual(len(self.warnings_of("chmod 600")), 1)

    def test_another_programs_lock_delays_a_log_by_no_more_than_its_time(self):
        path, transport = self.spool(), FakeTransport()
        client = self.client(spool=path, transport=transport, flush_delay=60)
        client.log(Log("x", 1))
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            client.log(Log("x", 2))  # waits 0.2 s, then goes to memory
            self.assertEqual(len(client._outbox.buffer._inbox), 1)
            other.execute("ROLLBACK")
        client._outbox.buffer._retry_at = 0.0
        self.assertTrue(client.flush(LONG))
        self.assertEqual(self.assertBalanced(client).delivered, 2)
        self.assertEqual(len(self.warnings_of("locked")), 1)

    def test_an_api_misuse_error_does_not_set_a_healthy_file_aside(self):
        path = self.spool()
        client = self.client(spool=path, transport=FakeTransport(), flush_delay=60)
        client.log(Log("x", 1))
        spool = client._outbox.buffer
        spool._attempt(spool._own, lambda: spool._own.conn.execute("SELECT ?"))
        spool._retry_at = 0.0
        client.log(Log("x", 2))
        self.assertFalse([n for n in os.listdir(path.parent) if "damaged" in n])
        self.assertEqual(self.rows(path), 2)


class SpoolCorruptTest(ProcessTestCase):
    def assertStarts(self, path, left, label):
        """Start on a damaged file: new logs arrive, nothing raises, at most one warning, nothing vanishes."""
        self.records.clear()
        arrived = []

        def server(body):
            try:
                arrived.extend(ids(json.loads(body)))
                return 200
            except (ValueError, KeyError, TypeError):
                return 400

        transport = FakeTransport(default=server)
        client = new_client(api_key=KEY, transport=transport, spool=path, flush_delay=0)
        entry = Log("new", 1)
        client.log(entry)
        client.flush(LONG)
        client.close(LONG)
        stats = self.assertBalanced(client)
        self.assertEqual(stats.queued + stats.in_flight, 0, label)
        spoken = self.warnings_of("spool")
        self.assertLessEqual(len([r for r in spoken if r.levelno == logging.WARNING]), 1, label)
        kept = [n for n in os.listdir(path.parent) if ".damaged-" in n]
        if entry.log_id not in arrived:  # it was committed before the damage came to light
            self.assertTrue(kept and stats.dropped["damaged"], label)
        if kept:
            self.assertTrue(spoken, label)
            self.assertEqual(self.drain(path), [], label)  # the fresh file works
        return kept, arrived

    def test_truncated_at_any_place_it_starts_and_keeps_the_file_aside(self):
        path, left = self.make_spool(40)
        data, rng = path.read_bytes(), random.Random(3)
        places = {0, 1, 15, 16, 17, 99, 100, 101, 511, 512, len(data) - 1}
        places |= {p + d for p in range(4096, len(data), 4096) for d in (-1, 0, 1)}
        places |= {rng.randrange(len(data)) for _ in range(rounds(5, 50))}
        for place in sorted(places):
            with self.subTest(place):
                copy = self.spool()
                copy.write_bytes(data[:place])
                kept, arrived = self.assertStarts(copy, left, place)
                if 0 < place < 72:  # not to be known as a spool any more: left as it is
                    self.assertEqual((copy.read_bytes(), kept), (data[:place], []))
                elif not kept and place:
                    # Its end was cut off: a dead letter.
                    self.assertLessEqual(len(set(left) - set(arrived)), 1)

    def test_with_any_bit_flipped_it_starts_and_delivers_or_keeps_the_file(self):
        path, left = self.make_spool(12)
        data, rng = path.read_bytes(), random.Random(4)
        used = [n for n, byte in enumerate(data) if byte] + list(range(108))
        places = [*range(100), *(rng.choice(used) for _ in range(220))]
        for number in places[:: rounds(10, 1)]:
            bit = 1 << rng.randrange(8)
            with self.subTest(byte=number, bit=bit):
                copy = self.spool()
                copy.write_bytes(data[:number] + bytes([data[number] ^ bit]) + data[number + 1 :])
                kept, arrived = self.assertStarts(copy, left, number)
                self.assertEqual(len(arrived), len(set(arrived)))

    def test_a_damaged_wal_does_not_stop_the_start(self):
        path = self.spool()
        self.python(
            PRELUDE + "log(client(spool=sys.argv[2], transport=down), 30); os.kill(os.getpid(), 9)",
            "http://x",
            path,
        )
        names = [n for n in os.listdir(path.parent) if not n.endswith("-shm")]
        data = {n: (path.parent / n).read_bytes() for n in names}
        wal, rng = data["spool.db-wal"], random.Random(5)
        for _ in range(rounds(6, 40)):
            place = rng.randrange(len(wal))
            for damaged in (wal[:place], wal[:place] + bytes([wal[place] ^ 64]) + wal[place + 1 :]):
                copy = self.folder()
                for name, content in data.items():
                    (copy / name).write_bytes(damaged if name.endswith("-wal") else content)
                self.assertStarts(copy / "spool.db", [], place)

    def test_a_damaged_orphan_is_moved_aside_with_a_warning(self):
        path = self.spool()
        orphan = path.with_name(path.name + ".2")
        self.make_spool(300, orphan)
        data = bytearray(orphan.read_bytes())
        leaf = next(at for at in range(2 * 2048, len(data), 2048) if data[at] == 13)
        data[leaf] = 99  # no kind of page; the last leaf, which tells the highest id, is whole
        orphan.write_bytes(data)
        client = self.client(spool=path, transport=FakeTransport(), flush_delay=60)
        client.log(Log("x", 1))
        client.flush(LONG)
        self.assertTrue(client.close(LONG))
        self.assertEqual(len(self.warnings_of("malformed")), 1)
        kept = [name for name in os.listdir(path.parent) if name != path.name]
        self.assertEqual([".damaged-" in name for name in kept], [True])

    def test_damaged_orphans_hide_no_other(self):
        self.patch(chirrop, "_ADOPT_SECONDS", 0.01)
        path, transport = self.spool(), FakeTransport()
        down = FakeTransport(default=ConnectionError("down"))
        clients = [new_client(api_key=KEY, transport=down, spool=path) for _ in range(12)]
        for number, client in enumerate(clients):
            client.log(Log("x", number))
        for client in clients:
            client.close(0)
        path.unlink()  # nothing of its own is settled, after which it would look again
        for number in range(2, 10):
            with contextlib.closing(sqlite3.connect(f"{path}.{number}")) as conn, conn:
                conn.execute("UPDATE logs SET body = 'no bytes'")
        client = self.client(spool=path, transport=transport)
        end = time.monotonic() + LONG
        while len(transport.logs()) < 3 and time.monotonic() < end:
            client.flush(LONG)
        self.assertEqual(sorted(log["value"] for log in transport.logs()), [9, 10, 11])

    def test_damaged_while_open_the_lost_logs_are_counted_and_flush_returns(self):
        path, dropped = self.spool(), []
        client = self.client(
            spool=path,
            transport=FakeTransport(),
            flush_delay=60,
            on_drop=lambda *a: dropped.append(a),
        )
        for n in range(5):
            client.log(Log("x", n))
        spool = client._outbox.buffer
        spool._own.conn.execute("UPDATE logs SET body = 7 WHERE id & 7 = 3")
        self.assertFalse(client.flush(LONG))
        self.reported(client)
        stats = self.assertBalanced(client)
        self.assertEqual((stats.dropped, stats.queued), ({"damaged": 5}, 0))
        client.log(Log("x", 9))
        self.assertTrue(client.flush(LONG))
        self.assertEqual(self.rows(path), 0)
        client.close(LONG)
        self.assertEqual(len(dropped), 1)
        self.assertTrue([n for n in os.listdir(path.parent) if ".damaged-" in n])

    def test_answers_for_logs_of_a_file_moved_aside_do_not_touch_the_new_one(self):
        path, go = self.spool(), threading.Event()
        self.addCleanup(go.set)
        transport = FakeTransport(lambda body: go.wait(LONG) and 200)
        client = self.client(spool=path, transport=transport, flush_delay=0)
        client.log(Log("old", 1))
        transport.seen.get(timeout=LONG)
        spool = client._outbox.buffer
        with spool.lock:
            spool._trouble(spool._own, sqlite3.DatabaseError("malformed"))
        client.log(Log("new", 1))
        self.assertEqual(self.rows(path), 1)  # under the row id of the old one
        go.set()
        self.assertTrue(client.flush(LONG))
        self.assertEqual(self.assertBalanced(client).delivered, 2)


class SpoolFullTest(ProcessTestCase):
    def test_with_the_disk_full_logs_go_on_in_memory_and_back_to_the_file_later(self):
        path, transport = self.spool(), FakeTransport()
        client = self.client(transport=transport, spool=path, flush_delay=60, batch_size=10**6)
        client.log(Log("x", 0))
        spool = client._outbox.buffer
        pages = spool._own.conn.execute("PRAGMA page_count").fetchone()[0]
        spool._own.conn.execute(f"PRAGMA max_page_count = {pages + 4}").fetchall()
        entries = [Log("x", n, meta="m" * 800) for n in range(60)]
        for entry in entries:
            client.log(entry)
        in_memory = len(spool._inbox)
        self.assertGreater(in_memory, 10)
        self.assertBalanced(client)
        spool._own.conn.execute("PRAGMA max_page_count = 100000").fetchall()
        client.log(Log("x", 1))
        client.log(Log("x", 2))
        spool.tend()
        # It is not tried again before SPOOL_RETRY_SECONDS.
        self.assertEqual(len(spool._inbox), in_memory + 2)
        spool._retry_at = 0.0
        spool.tend()
        self.assertEqual((len(spool._inbox), self.rows(path)), (0, 63))
        self.assertTrue(client.flush(LONG))
        self.assertEqual(len(self.warnings_of("full")), 1)
        self.assertEqual(len(set(ids(transport.logs()))), 63)

    def test_with_the_disk_full_at_opening_left_logs_are_neither_counted_twice_nor_waited_for(self):
        path, left = self.make_spool(5)
        connect = sqlite3.connect

        class Full(sqlite3.Connection):
            def execute(self, sql, *args):
                if sql == "PRAGMA journal_mode = WAL":
                    raise sqlite3.OperationalError("database or disk is full")
                return super().execute(sql, *args)

        transport = FakeTransport()
        client = self.client(transport=transport, spool=path, flush_delay=0)
        with mock.patch("sqlite3.connect", lambda *a, **k: connect(*a, factory=Full, **k)):
            entry = Log("x", 1)
            client.log(entry)
            self.assertTrue(client.flush(LONG))
        self.assertEqual(ids(transport.logs()), [entry.log_id])
        client._outbox.buffer._retry_at = 0.0
        self.assertTrue(client.flush(LONG))
        self.assertEqual(ids(transport.logs()), [entry.log_id, *left])
        self.assertEqual(self.assertBalanced(client).accepted, 6)

    def test_what_a_full_disk_kept_from_being_removed_is_removed_later(self):
        for close in (True, False):
            path = self.spool()
            client = self.client(spool=path, flush_delay=60)
            client.log(Log("x", 1))
            spool = client._outbox.buffer
            spool._own.conn.execute("PRAGMA query_only = 1")  # no row can be removed
            self.assertTrue(client.flush(LONG))
            self.assertEqual((self.rows(path), client.stats().queued), (1, 0))
            spool._own.conn.execute("PRAGMA query_only = 0")
            spool._retry_at = 0.0
            self.assertTrue(client.close(LONG) if close else client.flush(LONG))
            self.assertEqual(self.rows(path), 0)

    def test_max_bytes_counts_all_files_of_the_spool(self):
        path, left = self.make_spool(500)
        self.assertGreater(path.stat().st_size, 65536)
        client = self.client(spool=SqliteSpool(path, max_bytes=65536), flush_delay=60)
        with self.assertRaisesRegex(ChirrOpQueueFullError, "65536"):
            client.log(Log("x", 1))
        self.assertTrue(client.flush(LONG))
        client._outbox.buffer.tend()
        client._outbox.buffer._others = (0.0, 0)  # it looks at the others' size once a second
        client.log(Log("x", 1))  # what was sent has made room
        self.assertTrue(client.flush(LONG))
        self.assertEqual(self.assertBalanced(client).delivered, 501)

    @unittest.skipUnless(hasattr(signal, "SIGXFSZ"), "no file size limit here")
    def test_with_a_real_write_error_the_application_sees_nothing_and_all_logs_arrive(self):
        server, path = self.server(), self.spool()
        said = self.run_program(
            """
import logging, resource
logging.basicConfig(format="W:%(message)s", stream=sys.stdout)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
c = client(spool=sys.argv[2], flush_delay=60, batch_size=10**6)
log(c)
resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))
log(c, 400)
assert c._outbox.buffer._inbox, "the limit was not reached"
assert c.flush(25), c.stats()
c.close()
sys.stdout.flush()
""",
            server.url, path, env=NOT_COUNTED,
        )  # fmt: skip
        logged = [word for word in said if len(word) == 36 and word.count("-") == 4]
        self.assertEqual(len(logged), 401)
        self.assertLessEqual(set(logged), set(server.stored))
        self.assertEqual(sum(word.startswith("W:spool") for word in said), 1)


class SpoolSharedTest(ProcessTestCase):
    def test_several_clients_in_one_process_deliver_each_log_once(self):
        path, transport = self.spool(), FakeTransport()
        clients = [self.client(transport=transport, spool=path, flush_delay=0) for _ in range(4)]
        entries = [Log("x", n) for n in range(200)]
        for n, entry in enumerate(entries):
            clients[n % 4].log(entry)
        for client in clients:
            self.assertTrue(client.close(LONG))
        self.assertEqual(sorted(ids(transport.logs())), sorted(e.log_id for e in entries))
        self.assertEqual(os.listdir(path.parent), [path.name])

    def test_several_processes_deliver_each_log_once(self):
        server, path = self.server(), self.spool()
        code = "sys.stdin.readline(); c = client(spool=sys.argv[2]); log(c, 100); assert c.close(25); say('end')"
        count = rounds(3, 8)
        programs = [self.start_program(code, server.url, path) for _ in range(count)]
        for program in programs:
            program.stdin.write(b"\n")
        said = [word for program in programs for word in program.stdout.read().decode().split()]
        self.assertEqual(said.count("end"), count)
        self.assertEqual(sorted(server.arrived), sorted(set(said) - {"end"}))
        self.assertEqual(os.listdir(path.parent), [path.name])

    def test_processes_that_open_a_fresh_file_at_once_all_commit_their_first_log(self):
        code = """
c = client(spool=sys.argv[2], transport=down, flush_delay=60)
say("ready"); sys.stdin.readline()
log(c); os.kill(os.getpid(), 9)
"""
        count = rounds(3, 8)
        for _ in range(rounds(1, 3)):
            path = self.spool()
            programs = [self.start_program(code, "http://x", path) for _ in range(count)]
            for program in programs:
                self.line(program)
            for program in programs:
                program.stdin.write(b"\n")
            logged = [
                word for program in programs for word in program.stdout.read().decode().split()
            ]
            self.assertEqual(len(logged), count)
            self.assertEqual(sorted(self.drain(path)), sorted(logged))

    def holder(self, path, count=3):
        """Start a process that holds logs in the spool and cannot send them; return it and their ids."""
        program = self.start_program(
            "log(client(spool=sys.argv[2], transport=down), int(sys.argv[3])); sys.stdin.readline()",
            "http://x",
            path,
            count,
        )
        return program, [self.line(program) for _ in range(count)]

    def test_logs_of_a_killed_holder_are_taken_over_at_opening(self):
        path = self.spool()
        program, held = self.holder(path)
        self.kill_program(program)
        self.assertEqual(self.drain(path), held)
        # The dead one's lock file is gone, too.
        self.assertEqual(os.listdir(path.parent), [path.name])

    def test_logs_of_a_killed_holder_are_taken_over_by_a_running_client_out_of_work(self):
        self.patch(chirrop, "_ADOPT_SECONDS", 0.1)
        path, transport = self.spool(), FakeTransport()
        client = self.client(transport=transport, spool=path, flush_delay=0)
        client.log(Log("x", 1))
        self.assertTrue(client.flush(LONG))
        program, held = self.holder(path)
        self.kill_program(program)
        client.log(Log("x", 2))
        arrived = []
        while not set(held) <= set(arrived):
            arrived += ids(json.loads(transport.seen.get(timeout=LONG)))
        self.assertTrue(client.flush(LONG))
        self.assertEqual(self.assertBalanced(client).delivered, 5)

    def test_what_is_taken_over_during_a_flush_does_not_end_it_early(self):
        path = self.spool()
        spool = SqliteSpool(path)
        self.addCleanup(spool.close)
        outbox = chirrop._Outbox(spool, Config(api_key=KEY))
        mine = [b'{"log_id": %d}' % number for number in range(300)]
        for item in mine:
            spool.put(item)
        spool.tend()
        flush, sent = outbox.begin_flush(0.0), []
        self.make_spool(400, path)  # in PATH.2, by a client that has ended since
        spool._look_at = 0.0
        spool.tend()
        self.assertEqual(spool.size(), 700)
        while outbox.outcome(flush) is None:
            batch = outbox.take(0.0, 1)
            sent += batch.items
            outbox.settle(batch, "delivered", None, 0.0)
        self.assertTrue(outbox.outcome(flush))
        self.assertEqual(len(set(mine) - set(sent)), 0)

    def test_logs_of_a_live_holder_are_left_alone(self):
        path = self.spool()
        program, held = self.holder(path)
        self.assertEqual(self.drain(path), [])
        os.kill(program.pid, signal.SIGSTOP)  # alive, though it does nothing
        self.assertEqual(self.drain(path), [])
        os.kill(program.pid, signal.SIGCONT)
        self.kill_program(program)
        self.assertEqual(self.drain(path), held)

    def test_a_failed_take_over_counts_nothing(self):
        path, transport = self.spool(), FakeTransport()
        client = self.client(transport=transport, spool=path, flush_delay=0)
        client.log(Log("x", 1))
        self.assertTrue(client.flush(LONG))
        program, held = self.holder(path)
        self.kill_program(program)
        spool = client._outbox.buffer
        opened = spool._open

        def fail(path, create):
            if not create:
                raise sqlite3.OperationalError("database or disk is full")
            return opened(path, create)

        with mock.patch.object(spool, "_open", fail):
            spool._look_at = 0.0
            self.assertTrue(client.flush(LONG))
            self.assertEqual(self.assertBalanced(client).accepted, 1)
            self.assertLess(spool._look_at, math.inf)  # it is looked for again
        self.assertEqual(self.drain(path), held)


# ---- Exit, fork, signals --------------------------------------------------


class ExitTest(ProcessTestCase):
    def test_exit_without_close_delivers_whatever_ends_the_program_and_keeps_its_status(self):
        endings = {
            "pass": 0,
            "sys.exit(3)": 3,
            "raise RuntimeError('app')": 1,
            "raise SystemExit('bye')": 1,
        }
        begun = []
        for ending, status in list(endings.items())[:: rounds(2, 1)]:
            server, code = self.server(), f"c = client(flush_delay=60); log(c, 300)\n{ending}"
            words = self.begin_program(code, server.url, status=status, stderr=None)
            begun.append((ending, server, words))
        for ending, server, words in begun:
            with self.subTest(ending):
                self.assertEqual(sorted(words()), sorted(server.stored))

    def test_exit_of_a_program_that_logged_nothing_is_silent(self):
        self.run_program("client()", "http://127.0.0.1:1/")

    def test_exit_with_three_clients_on_a_server_that_never_answers_takes_one_exit_timeout(self):
        server = self.server()
        server.go.clear()
        program = self.start_program(
            """
clients = [client(exit_timeout=0.6) for _ in range(3)]
for c in clients:
    log(c)
sys.stdin.readline()
say(time.monotonic())
""",
            server.url,
        )
        server.wait(lambda: len(server.arrived) == 3)
        program.stdin.write(b"\n")
        logged = [self.line(program) for _ in range(3)]
        started = float(self.line(program))
        self.assertEqual(program.wait(LONG), 0)
        self.assertLess(time.monotonic() - started, 1.7)  # one budget; three would be 1.8 s
        self.assertEqual(sorted(server.arrived), sorted(logged))

    def test_exit_against_a_down_server_keeps_the_logs_in_the_spool(self):
        path = self.spool()
        logged = self.run_program(
            "log(client(spool=sys.argv[2], transport=down, exit_timeout=0.1), 3)",
            "http://x",
            path,
            stderr=None,
        )
        self.assertEqual(os.listdir(path.parent), [path.name])
        self.assertEqual(self.drain(path), logged)

    def test_exit_without_a_spool_reports_what_could_not_be_sent(self):
        program = self.python(
            PRELUDE + """
import logging
import math
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
on_drop = lambda logs, error: print("DROPPED", len(logs), error)
c = client(transport=down, exit_timeout=0.1, on_drop=on_drop)
log(c, 3)
""",
            "http://x",
        )  # fmt: skip
        dropped = [
            int(line.split()[1])
            for line in program.stdout.splitlines()
            if line.startswith("DROPPED")
        ]
        self.assertEqual(sum(dropped), 3)
        self.assertIn("ERROR dropped 3 logs (closed)", program.stdout)

    def test_where_no_thread_can_be_started_logs_arrive_at_exit(self):
        """3.12 refuses to start threads during exit; before that, other limits do."""
        server = self.server()
        logged = self.run_program(
            """
def refuse(self):
    raise RuntimeError("can't start new thread")
threading.Thread.start = refuse
log(client(flush_delay=60), 3)
log(client(spool=sys.argv[2]), 300)
""",
            server.url, self.spool(),
        )  # fmt: skip
        self.assertEqual(sorted(server.stored), sorted(logged))

    def test_where_no_thread_can_be_started_flush_and_close_send_in_their_own_thread(self):
        transport = FakeTransport()
        with mock.patch.object(
            threading.Thread, "start", side_effect=RuntimeError("can't start new thread")
        ):
            client = self.client(transport=transport)
            client.log(Log("x", 1))
            self.assertTrue(client.flush(LONG))
            client.log(Log("x", 2))
            self.assertTrue(client.close(LONG))
        self.assertEqual(self.assertBalanced(client).delivered, 2)

    def test_ctrl_c_in_a_flush_that_sends_by_itself_keeps_the_batch(self):
        def ctrl_c(body):
            raise KeyboardInterrupt

        client = self.client(ctrl_c)
        with mock.patch.object(
            threading.Thread, "start", side_effect=RuntimeError("can't start new thread")
        ):
            client.log(Log("x", 1))
            with self.assertRaises(KeyboardInterrupt):
                client.flush(LONG)
            self.assertEqual(self.assertBalanced(client).queued, 1)
            self.assertTrue(client.flush(LONG))

    def test_a_log_made_in_another_exit_handler_arrives_if_it_runs_before_ours(self):
        server = self.server()
        logged = self.run_program(
            """
import atexit
c = client(flush_delay=60)
atexit.register(lambda: log(c))     # handlers run in reverse: before the client's
log(c)
""",
            server.url,
        )
        self.assertEqual(sorted(server.stored), sorted(logged))

    def test_a_log_made_in_an_exit_handler_that_runs_after_ours_is_reported_not_raised(self):
        server = self.server()
        done = self.run_program(
            """
import atexit, logging
logging.basicConfig(stream=sys.stdout, format="%(message)s")
atexit.unregister(chirrop._at_exit)
atexit.register(lambda: (log(c), say(c.stats().dropped["closed"])))
atexit.register(chirrop._at_exit)
c = client(flush_delay=60)
""",
            server.url,
        )
        self.assertEqual(done[-1], "1")
        self.assertIn("dropped", done)

    def test_os_exit_after_a_true_flush_has_delivered(self):
        server = self.server()
        logged = self.run_program(
            "c = client(flush_delay=60); log(c, 3); assert c.flush(25); os._exit(0)", server.url
        )
        self.assertEqual(sorted(server.stored), sorted(logged))

    def test_sigterm_loses_unsent_logs_without_a_spool_and_none_with_one(self):
        path = self.spool()
        code = "log(client(spool=sys.argv[2] or None, transport=down), 3); sys.stdin.readline()"
        for program in [self.start_program(code, "http://x", spool) for spool in ("", path)]:
            logged = [self.line(program) for _ in range(3)]
            program.terminate()
            self.assertEqual(program.wait(LONG), -signal.SIGTERM)
        self.assertEqual(self.drain(path), logged)

    @refcounted
    def test_clients_dropped_without_close_deliver_and_leave_no_thread_or_descriptor(self):
        code = f"""
def descriptors():
    gc.collect()
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

def settle():
    while True:
        threads = [t for t in threading.enumerate() if t.name.startswith("chirrop-")]
        if not threads:
            return
        for thread in threads:
            thread.join(25)
            assert not thread.is_alive(), thread

before = descriptors()
for round in range({rounds(20, 200)}):
    c = client(spool=sys.argv[2] or None)
    log(c) if round % 4 else c.flush(25)
    del c
    if round % 20 == 19:
        settle()
settle()
assert descriptors() == before, (before, descriptors())
assert not chirrop._open_senders, chirrop._open_senders
"""
        begun = []
        for spool in ("", self.spool()):
            server = self.server()
            begun.append((spool, server, self.begin_program(code, server.url, spool)))
        for spool, server, words in begun:
            with self.subTest(spool=bool(spool)):
                self.assertEqual(sorted(words()), sorted(server.stored))
                if spool:
                    self.assertEqual(os.listdir(spool.parent), [spool.name])

    def test_the_logger_has_no_handlers_of_ours_and_log_level_alone_sets_its_level(self):
        self.run_program(
            """
import logging
import math
c = client(transport=down); c.close()
logger = logging.getLogger("chirrop")
assert not logger.handlers and not logging.getLogger().handlers
assert logger.level == 0 and logger.propagate
""",
            "http://x",
        )


@unittest.skipUnless(HAS_FORK, "this platform does not fork")
class ForkTest(ProcessTestCase):
    def test_fork_with_50_queued_logs_sends_each_once_and_the_child_starts_empty(self):
        code = """
c = client(spool=sys.argv[2] or None)
log(c)                                 # its sender is in a request when the fork comes
sys.stdin.readline()
log(c, 50)
def child():
    assert c.stats()[:6] == (0, 0, {}, 0, 0, 0), c.stats()
    log(c)
    assert c.flush(25) and c.close(25)
reap_now = fork(child)
say("forked")
reap(reap_now)
assert c.close(25), c.stats()
say("end")
"""
        begun = []
        for spool in ("", self.spool()):
            server = self.server()
            server.go.clear()
            begun.append((spool, server, self.start_program(code, server.url, spool)))
        for spool, server, program in begun:
            with self.subTest(spool=bool(spool)):
                server.wait(lambda server=server: server.arrived)
                program.stdin.write(b"\n")
                logged = []
                while logged[-1:] != ["forked"]:
                    logged.append(self.line(program))
                server.go.set()
                logged += program.stdout.read().decode().split()
                self.assertEqual(program.wait(LONG), 0)
                expected = sorted(set(logged) - {"forked", "end"})
                self.assertEqual(len(expected), 52)
                self.assertEqual(sorted(server.arrived), expected)
                if spool:
                    self.assertEqual(os.listdir(spool.parent), [spool.name])

    def test_every_lock_held_by_another_thread_at_the_fork_is_fresh_in_the_child(self):
        server = self.server()
        logged = self.run_program(
            """
c, s = client(), client(spool=sys.argv[2])
log(c); log(s)
assert c.flush(25) and s.flush(25)
chirrop._FORK_SECONDS = 0.1
locks = [c._outbox.buffer.lock, c._link._transport._lock, s._outbox.buffer.tending, s._outbox.buffer.lock]
held, go = threading.Event(), threading.Event()
def hold():
    for lock in locks:
        lock.acquire()
    held.set()
    go.wait()
    for lock in locks:
        lock.release()
thread = threading.Thread(target=hold); thread.start(); held.wait()
def child():
    log(c); log(s)
    assert c.flush(20) and s.flush(20) and c.close(20) and s.close(20)
pid = fork(child)
reap(pid)
go.set()
thread.join()
""",
            server.url, self.spool(),
        )  # fmt: skip
        self.assertEqual(sorted(server.stored), sorted(logged))

    def test_a_child_forked_inside_the_lock_makes_a_file_of_its_own(self):
        server = self.server()
        logged = self.run_program(
            """
chirrop._FORK_SECONDS = 0.2            # the sender may have the other lock, and wait for this one
s = client(spool=sys.argv[2], flush_delay=60)
log(s)
pids = []
def child():
    log(s)
    assert os.path.exists(sys.argv[2] + ".2") and s.stats().accepted == 1
chirrop._exclusively(s._outbox.lock, lambda: pids.append(fork(child)))
reap(*pids)
assert s.close(25)
""",
            server.url, path := self.spool(),
        )  # fmt: skip
        self.assertEqual(sorted(server.stored + self.drain(path)), sorted(logged))

    def test_preloaded_client_delivers_from_every_worker_and_the_spool_survives_the_masters_exit(
        self,
    ):
        """SQLite's locks are per process: carried over a fork, the master's close deletes the worker's WAL."""
        server, path = self.server(), self.spool()
        server.status = 502
        program = self.start_program(
            """
c = client(spool=sys.argv[2], exit_timeout=0.1)
log(c)
go = os.pipe()
def worker():
    log(c)
    say("up")
    os.read(go[0], 1)                 # the master has gone by now
    log(c, 20)
    say("done")
    signal.pause()
pids = [fork(worker) for _ in range(3)]
say("pids", *pids)
sys.stdin.readline()
c.close(0)
say("closed")
sys.stdin.readline()
os.write(go[1], b"xxx")
os._exit(0)
""",
            server.url, path,
        )  # fmt: skip
        said = []

        def until(word, count=1):
            while said.count(word) < count:
                said.extend(self.line(program).split())

        until("pids")
        until("up", 3)
        pids = [int(word) for word in said if word.isdigit()]
        program.stdin.write(b"\n")
        until("closed")
        program.stdin.write(b"\n")
        until("done", 3)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.assertEqual(program.stdout.read(), b"")  # all holders of the pipe are gone
        logged = [word for word in said if word.count("-") == 4]
        self.assertEqual(len(logged), 64)
        self.assertEqual(sorted(set(self.drain(path))), sorted(logged))

    def test_where_fork_hooks_do_not_run_the_child_notices_by_itself(self):
        server = self.server()
        logged = self.run_program(
            """
import importlib
os.register_at_fork = lambda **hooks: None
sys.modules.pop("chirrop")
import chirrop
c, s = [chirrop.new_client(api_key="chp_test", api_endpoint=sys.argv[1], flush_delay=60, spool=p) for p in (None, sys.argv[2])]
def log(c, count=1):
    for _ in range(count):
        entry = chirrop.Log("x", 1)
        c.log(entry)
        say(entry.log_id)
log(c); assert c.flush(25)              # without hooks, nothing keeps a fork out of the sender's imports
log(c, 3); log(s, 3)
def logs():
    log(c); log(s)
    assert c.stats().accepted == s.stats().accepted == 1
    assert c.flush(20) and s.flush(20)
def only_flushes():
    assert c.flush(20) and s.close(20)
def exits():
    chirrop._at_exit()
reap(fork(logs), fork(only_flushes), fork(exits))
assert c.close(25) and s.close(25)
""",
            server.url, self.spool(), stderr=None,
        )  # fmt: skip
        self.assertEqual(len(logged), 9)
        self.assertEqual(sorted(server.arrived), sorted(logged))

    def test_a_log_on_a_client_closed_before_the_fork_leaves_the_childs_other_clients_alone(self):
        server = self.server()
        logged = self.run_program(
            """
closed, c = client(), client(flush_delay=60)
closed.close()
def child():
    log(c)
    closed.log(Log("late", 1))
    assert c.stats().accepted == 1, c.stats()
    assert c.flush(20)
reap(fork(child))
""",
            server.url,
            stderr="logged after close: this and further logs are dropped\n"
            "dropped 1 logs (closed): logged after close\n",
        )  # fmt: skip
        self.assertEqual(server.stored, logged)

    def test_children_forked_before_the_first_client_mint_different_ids(self):
        said = self.run_program(
            """
Log("parent", 1)
def child():
    for _ in range(20):
        say(Log("x", 1).log_id)
reap(*[fork(child) for _ in range(4)])
"""
        )
        self.assertEqual(len(set(said)), 80)

    def test_forks_while_4_threads_log_send_each_log_once(self):
        code = """
c = client(spool=sys.argv[3] if len(sys.argv) > 3 else None)
stop = threading.Event()
def work():
    while not stop.is_set():
        log(c)
        time.sleep(0.0005)              # a rate, not a synchronisation
threads = [threading.Thread(target=work, daemon=True) for _ in range(4)]
for t in threads: t.start()
def child():
    log(c)
    assert c.close(20), c.stats()
pids = []
for n in range(int(sys.argv[2])):
    pids.append(fork(child))
    if len(pids) == 10:
        reap(*pids)
        pids.clear()
reap(*pids)
stop.set()
for t in threads: t.join()
assert c.close(25), c.stats()
"""
        begun = []
        for children, *spool in ((rounds(6, 100),), (rounds(4, 40), self.spool())):
            server = self.server()
            words = self.begin_program(code, server.url, children, *spool)
            begun.append((spool, children, server, words))
        for spool, children, server, words in begun:
            with self.subTest(spool=bool(spool)):
                logged = words()
                self.assertGreater(len(logged), children)
                self.assertEqual(len(server.arrived), len(set(server.arrived)))
                self.assertEqual(sorted(server.arrived), sorted(logged))

    def test_our_threads_import_nothing_so_no_fork_can_come_in_the_middle_of_it(self):
        server = self.server()
        server.status = 502
        logged = self.run_program(
            """
import builtins
real, imported = builtins.__import__, []
def watch(name, *args, **kwargs):
    if threading.current_thread() is not threading.main_thread() and name not in sys.modules:
        imported.append(name)
    return real(name, *args, **kwargs)
builtins.__import__ = watch
c, s = client(on_drop=print), client(spool=sys.argv[2])
log(c); log(s)
while not (c.stats().retries and s.stats().retries):
    time.sleep(0.01)                    # a rate, not a synchronisation
assert not imported, imported
os._exit(0)
""",
            server.url, self.spool(), stderr=None,
        )  # fmt: skip
        self.assertEqual(len(logged), 2)

    def test_multiprocessing_children_deliver_in_every_start_method(self):
        code = """
import multiprocessing, os, sys
import chirrop
client = None
def make():
    global client
    client = client or chirrop.new_client(api_key="chp_test", api_endpoint=sys.argv[1], flush_delay=60)
def child(n):
    make()
    client.log(chirrop.Log("child", n))
    assert client.flush(20), client.stats()
if __name__ == "__main__":
    make()
    client.log(chirrop.Log("parent", -1))
    context = multiprocessing.get_context(sys.argv[2])
    workers = [context.Process(target=child, args=(n,)) for n in range(int(sys.argv[3]))]
    for w in workers: w.start()
    for w in workers: w.join(25)
    assert not any(w.exitcode for w in workers), workers
"""
        file = self.folder() / "program.py"
        file.write_text(code)
        begun, count = [], rounds(1, 2)
        for method in ("fork", "spawn"):
            server = self.server()
            command = [sys.executable, file, server.url, method, str(count)]
            environment = {**os.environ, "PYTHONPATH": str(HERE)}
            begun.append((method, server, self.begin(command, env=environment)))
        for method, server, end in begun:
            with self.subTest(method):
                done = end()
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertEqual(len(server.stored), 1 + count)
                self.assertEqual(len(set(server.stored)), 1 + count)

    def test_an_idle_client_does_not_make_fork_warn(self):
        self.run_program(
            """
warnings.resetwarnings(); warnings.simplefilter("error")
c, s = client(), client(spool=sys.argv[2])
c.stats(); s.stats()
assert threading.active_count() == 1
pid = os.fork()
if pid == 0:
    os._exit(0)
reap(pid)
""",
            "http://127.0.0.1:1/", self.spool(),
        )  # fmt: skip

    def test_no_connection_carries_requests_of_two_processes(self):
        server = self.server()
        said = self.run_program(
            """
c = client()
def twice(name):
    for _ in range(2):
        entry = Log("x", 1)
        c.log(entry)
        assert c.flush(20)
        say(name, entry.log_id)
twice("parent")
reap(fork(lambda: twice("child")))
twice("parent")
""",
            server.url,
        )
        process_of = {log_id: name for name, log_id in zip(said[::2], said[1::2])}
        sides = [
            {process_of[i] for request in seen for i in request} for seen in server.connections
        ]
        self.assertEqual(sorted(map(sorted, sides)), [["child"], ["parent"]])


class SignalTest(ProcessTestCase):
    """What interrupts a thread inside the SDK's own locks; each case is made to happen, none is waited for."""

    def inside(self, target, name, action):
        """Run action() at the start of the next call of target.name, inside its lock."""
        method, armed = getattr(target, name), [True]

        def work(*args):
            if threading.current_thread() is threading.main_thread() and armed:
                armed.clear()
                action()
            return method(*args)

        setattr(target, name, lambda *args: chirrop._exclusively(target.lock, work, *args))

        def check():
            never_called = list(armed)
            armed.clear()  # the handler of the signal is about to go
            self.assertFalse(never_called, f"{name} was never called")

        self.addCleanup(check)

    def by_signal(self, action):
        number = signal.SIGUSR1 if hasattr(signal, "SIGUSR1") else signal.SIGINT
        before = signal.signal(number, lambda *_: action())
        self.addCleanup(signal.signal, number, before)
        return lambda: signal.raise_signal(number)

    def by_finaliser(self, action):
        class Garbage:
            def __init__(self):
                self.me = self

            def __del__(self):
                action()

        gc.disable()
        self.addCleanup(gc.enable)

        def collect():
            Garbage()
            gc.collect(0)

        return collect

    WAYS = (by_signal, by_finaliser)

    def case(self, way, **fields):
        """Return a client with two logs queued, and an interruption that logs a third."""
        client = self.client(transport=FakeTransport(), flush_delay=60, **fields)
        for n in range(2):
            client.log(Log("before", n))
        return client, way(self, lambda: client.log(Log("interrupting", 1)))

    def test_a_log_that_interrupts_a_flush_inside_the_lock_is_taken_at_once(self):
        for way in self.WAYS:
            for fields in (
                {},
                {"queue_size": 100},
                {"spool": self.spool()},
                {"queue_size": 100, "spool": self.spool()},
            ):
                with self.subTest(way.__name__, **{k: str(v) for k, v in fields.items()}):
                    client, interrupt = self.case(way, **fields)
                    self.inside(client._outbox, "begin_flush", interrupt)
                    self.assertTrue(client.flush(LONG))
                    self.assertEqual(self.assertBalanced(client).accepted, 3)
                    self.assertTrue(client.close(LONG))
                    self.assertEqual(client.stats().delivered, 3)

    def test_a_log_that_interrupts_a_commit_is_committed_by_it(self):
        for way in self.WAYS:
            with self.subTest(way.__name__):
                path = self.spool()
                client, interrupt = self.case(way, spool=path)
                self.inside(client._outbox.buffer, "put", interrupt)
                client.log(Log("interrupted", 1))
                self.assertEqual(self.rows(path), 4)
                self.assertTrue(client.flush(LONG))
                self.assertEqual(self.assertBalanced(client).delivered, 4)

    def test_a_log_that_interrupts_a_full_bounded_queue_fails_at_once_instead_of_waiting_for_itself(
        self,
    ):
        for way in self.WAYS:
            for spool in (None, self.spool()):
                with self.subTest(way.__name__, spool=bool(spool)):
                    raised, gate = [], threading.Event()
                    answer = lambda body, gate=gate: gate.wait(LONG) and (200, b"", {})
                    client = self.client(
                        transport=FakeTransport(default=answer),
                        flush_delay=60,
                        queue_size=2,
                        timeout=3600,
                        spool=spool,
                    )

                    def log(client=client, raised=raised, gate=gate):
                        try:
                            client.log(Log("interrupting", 1))
                        except ChirrOpQueueFullError as exc:
                            raised.append(exc)
                        gate.set()

                    client.log(Log("x", 1))
                    client.log(Log("x", 2))
                    self.inside(client._outbox, "begin_flush", way(self, log))
                    self.assertTrue(client.flush(LONG))
                    self.assertEqual(len(raised), 1)
                    self.assertEqual(self.assertBalanced(client).accepted, 2)

    def test_a_log_that_interrupts_stats_and_close_is_accounted_for(self):
        for way in self.WAYS:
            for method, call in (
                ("_sweep", lambda c: c.close(LONG)),
                ("held", lambda c: c.log(Log("x", 1))),
            ):
                with self.subTest(way.__name__, method=method):
                    client, interrupt = self.case(way, queue_size=100)
                    self.inside(client._outbox, method, interrupt)
                    call(client)
                    client.close(LONG)
                    stats = self.assertBalanced(client)
                    self.assertEqual(stats.queued + stats.in_flight, 0)
                    self.assertEqual(stats.accepted, 3 if method == "_sweep" else 4)

    def test_flush_and_close_in_a_signal_handler_that_interrupted_log_return_at_once(self):
        """A sender needs the lock that the interrupted frame holds: waiting for it would never end."""
        for name in ("flush", "close"):
            with self.subTest(name):
                path, answers = self.spool(), []
                client = self.client(transport=FakeTransport(), flush_delay=0, spool=path)
                client.log(Log("x", 0))
                self.assertTrue(client.flush(LONG))
                call = getattr(client, name)
                self.inside(
                    client._outbox.buffer, "put", self.by_signal(lambda: answers.append(call()))
                )
                client.log(Log("x", 1))
                self.assertEqual(answers, [False])
                self.assertTrue(client.close(LONG))
                self.assertEqual(self.assertBalanced(client).delivered, 2)

    def test_sigterm_handler_that_closes_and_exits_delivers_and_ends_in_time(self):
        code = """
c = client(spool=sys.argv[2] or None)
def stop(*_):
    c.close(20)
    sys.exit(5)
signal.signal(signal.SIGTERM, stop)
say("up")
while True:
    log(c)
"""
        begun = []
        for spool in ("", self.spool()):
            server = self.server()
            begun.append((spool, server, self.start_program(code, server.url, spool)))
        for spool, server, program in begun:
            with self.subTest(spool=bool(spool)):
                for _ in range(50):
                    self.line(program)
                program.terminate()
                logged = program.stdout.read().decode().split()
                self.assertEqual(program.wait(LONG), 5)
                stored = set(server.stored) | (set(self.drain(spool)) if spool else set())
                # The very last log may have been interrupted after it was queued and before it was printed.
                self.assertLessEqual(set(logged), stored)

    @unittest.skipUnless(hasattr(signal, "SIGSTOP"), "no SIGSTOP here")
    def test_a_process_stopped_while_the_server_closes_its_idle_connection_loses_nothing(self):
        server = self.server()
        server.served = (
            1  # answers one request a connection, then closes it, which the kept one does not know
        )
        program = self.start_program(
            """
c = client()
for _ in range(3):
    log(c)
    assert c.flush(20), c.stats()
    assert c.stats().retries == 0, c.stats()
    say("flushed")
    sys.stdin.readline()
""",
            server.url,
        )
        for count in range(1, 4):
            self.line(program), self.line(program)
            os.kill(program.pid, signal.SIGSTOP)
            server.wait(lambda count=count: len(server.stored) == count)
            os.kill(program.pid, signal.SIGCONT)
            program.stdin.write(b"\n")
        self.assertEqual(program.wait(LONG), 0)
        self.assertEqual(len(set(server.arrived)), 3)


PLAIN = """
import socket
def plain(method, url, body, headers, timeout):         # a real socket, without urllib and ssl
    with socket.create_connection(("127.0.0.1", int(url.split(":")[2].split("/")[0])), timeout) as s:
        s.sendall(b"POST / HTTP/1.1\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
        answer = s.recv(1000)
    return int(answer.split()[1]), b"", {}
c = client(transport=plain)
"""


class KillTest(ProcessTestCase):
    CODE = """
import socket
seed, path, count = sys.argv[2:]
def transport(method, url, body, headers, timeout):     # a real socket, without urllib for speed
    with socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout) as s:
        s.sendall(b"POST / HTTP/1.1\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body)
        answer = s.recv(1000)
    if not answer:
        raise ConnectionError("no answer")
    return int(answer.split()[1]), b"", {}
c = client("http://x", transport=transport, spool=path, batch_size=25)
say("up")
log(c, int(count))
sys.stdin.read()
"""

    def assertAllArrive(self, server, path, logged):
        """Send the rest in a last run; each id whose log() had returned must have arrived."""
        server.go.set()
        rest = self.drain(path)
        arrived = set(server.stored) | set(rest)
        self.assertEqual(sorted(set(logged) - arrived), [], "lost")
        self.assertEqual(self.rows(path), 0)
        # At most the log each was busy with.
        self.assertLessEqual(len(arrived - set(logged)), len(self.started))
        self.assertFalse([n for n in os.listdir(path.parent) if "damaged" in n])

    def start(self, server, seed, path, count):
        program = self.start_program(self.CODE, server.port, seed, path, count)
        self.started.append(program)
        return program

    def test_kills_at_random_moments_lose_no_log(self):
        self.started, logged = [], []
        server, path, rng = self.server(), self.spool(), random.Random(50)
        for seed in range(rounds(4, 50)):
            server.status = rng.choice((200, 200, 200, 502))
            program = self.start(server, seed, path, 100000)
            self.line(program)
            for _ in range(rng.choice((0, 1, 2, 5, rng.randrange(300)))):
                logged.append(self.line(program))
            if rng.random() < 0.5:  # while a request is under way, answered or not
                server.wait(lambda n=len(server.arrived): len(server.arrived) > n)
            logged += self.kill_program(program)
        server.status = 200
        self.assertGreater(len(logged), rounds(100, 1000))
        self.assertAllArrive(server, path, logged)

    def test_processes_on_one_spool_with_kills_and_restarts_lose_no_log(self):
        self.started, logged = [], []
        server, path, rng = self.server(), self.spool(), random.Random(8)
        count, kills = rounds(3, 8), rounds(3, 24)
        programs = [self.start(server, n, path, 150) for n in range(count)]
        for kill in range(kills):
            number = len(server.stored)
            server.wait(lambda n=number + rng.randrange(30): len(server.stored) > n)
            victim = rng.randrange(count)
            logged += self.kill_program(programs[victim])
            programs[victim] = self.start(server, count + kill, path, 150)
        for program in programs:
            for _ in range(rng.randrange(20)):
                logged.append(self.line(program))
            logged += self.kill_program(program)
        logged = [word for word in logged if word != "up"]
        self.assertGreater(len(logged), rounds(200, 1000))
        self.assertAllArrive(server, path, logged)


# ---- Hosts ----------------------------------------------------------------
# What programs that run their users' code do to a process, without those programs; .ci/hosts runs them.


COOPERATIVE = r"""
import _thread, queue

greenlets = {threading.get_ident()}

class NativeRLock:
    "An RLock as C makes it, for which all greenlets of a thread are one owner."

    def __init__(self, allocate=_thread.allocate_lock):
        self.native, self.owner, self.count = allocate(), None, 0

    def me(self):
        return 0 if threading.get_ident() in greenlets else threading.get_ident()

    def acquire(self, blocking=True, timeout=-1):
        if not self._is_owned() and not self.native.acquire(blocking, timeout):
            return False
        self.owner, self.count = self.me(), self.count + 1
        return True

    __enter__ = acquire

    def release(self, *_):
        self.count -= 1
        if not self.count:
            self.owner = None
            self.native.release()

    __exit__ = release

    def _is_owned(self):
        return self.count > 0 and self.owner == self.me()

threading.RLock = NativeRLock

def monkey_patch():
    "Swap locks and threads for cooperative ones, as gevent and eventlet do: one thread runs until it waits."
    baton, allocate, start = _thread.allocate_lock(), _thread.allocate_lock, _thread.start_new_thread
    baton.acquire()

    def apart(wait):                    # a wait that lets the others run
        def run(*args, **kwargs):
            if threading.get_ident() not in greenlets:
                return wait(*args, **kwargs)
            baton.release()
            try:
                return wait(*args, **kwargs)
            finally:
                baton.acquire()
        return run

    def in_turn(function):
        def run(*args, **kwargs):
            with baton:
                greenlets.add(threading.get_ident())
                return function(*args, **kwargs)
        return run

    class Lock:
        def __init__(self):
            self.native = allocate()
            self.release, self.locked = self.native.release, self.native.locked

        def acquire(self, blocking=True, timeout=-1):
            wait = apart(self.native.acquire)
            return self.native.acquire(False) or (blocking and wait(True, timeout))

        def __enter__(self):
            return self.acquire()

        def __exit__(self, *_):
            self.release()

    def start_new_thread(function, args=(), kwargs={}):
        return start(in_turn(function), args, kwargs)

    threading.Lock = threading._allocate_lock = _thread.allocate_lock = Lock
    threading.RLock, threading._CRLock = threading._PyRLock, None
    threading._start_new_thread = _thread.start_new_thread = start_new_thread
    if hasattr(threading, "_start_joinable_thread"):
        joinable = threading._start_joinable_thread
        def start_joinable_thread(function, **options):
            return joinable(in_turn(function), **options)
        threading._start_joinable_thread = start_joinable_thread
    threading.Thread.join = apart(threading.Thread.join)
    time.sleep, queue.SimpleQueue = apart(time.sleep), queue._PySimpleQueue
"""

NO_THREADS = {
    "start": """
def start(self):
    raise RuntimeError("can't start new thread")
threading.Thread.start = start
""",
    "constructor": """
def init(self, *_, **__):
    raise RuntimeError("daemon threads are disabled in this (sub)interpreter")
threading.Thread.__init__ = init
""",
}


class HostTest(ProcessTestCase):
    def check_swap(self, logs_before):
        server = self.server()
        code = f"""
endings = "c.flush(20)", "c.close(20)", ""
clients = [client() for _ in endings]
for c in clients:
    log(c, {logs_before})
    c.flush(20)
monkey_patch()
for c, ending in zip(clients, endings):
    log(c, 300)
    exec(ending)
"""
        said = self.run_program(COOPERATIVE + code, server.url)
        self.assertEqual(len(said), 3 * (300 + logs_before))
        self.assertEqual(sorted(server.stored), sorted(said))

    def test_locks_and_threads_swapped_after_the_client_was_made_freeze_nothing(self):
        self.check_swap(0)

    def test_locks_and_threads_swapped_after_the_first_log_freeze_nothing(self):
        self.check_swap(1)

    def test_a_client_made_after_the_swap_sends_in_the_background(self):
        server = self.server()
        code = """
monkey_patch()
c = client()
log(c)
while not c.stats().delivered:
    time.sleep(0.001)
log(c)
"""
        said = self.run_program(COOPERATIVE + code, server.url)
        self.assertEqual(sorted(server.stored), sorted(said))

    @refcounted
    def test_a_fork_in_c_without_pythons_hooks_hangs_no_child_and_sends_each_log_once(self):
        code = """
import ctypes
c = client()
log(c, 3)                       # as an import of the application does; a sender waits from here on,
assert c.flush(20), c.stats()   # and not for the GIL: a child in C could not do without it
os.fork = ctypes.PyDLL(None).fork
def child():
    log(c, 3)
    assert c.flush(20), c.stats()
reap(*[fork(child) for _ in range(3)])
assert c.flush(20), c.stats()
"""
        servers = [self.server() for _ in range(rounds(1, 3))]
        begun = [self.begin_program(code, server.url) for server in servers]
        for server, words in zip(servers, begun):
            said = words()
            self.assertEqual(len(said), 12)
            self.assertEqual(sorted(server.stored), sorted(said))

    def test_a_sender_that_wakes_in_a_forked_child_ends_and_sends_nothing(self):
        code = """
owner, seen = os.getpid(), []
def transport(method, url, body, headers, timeout):
    if os.getpid() != owner:
        os._exit(3)             # the child's copy of this sender makes a request of its own
    seen.append(body)
    pid = os.fork()             # a greenlet that waits for its answer is in both processes then, as this thread is
    if pid == 0:
        signal.alarm(20)        # ends the child if its sender does not
        raise ConnectionError("the parent has read the answer")
    reap(pid)
    return 200, b"", {}
c = client("http://127.0.0.1:1/", transport=transport)
log(c, 4)
assert c.flush(20), c.stats()
assert c.stats().delivered == 4, c.stats()
assert sum(len(__import__("json").loads(body)) for body in seen) == 4
"""
        self.assertEqual(len(self.run_program(code)), 4)

    def test_a_subinterpreter_delivers_by_flush_and_at_its_end(self):
        """By a transport without ssl, which crashes CPython 3.12 itself at a subinterpreter's end."""
        if not any(map(importlib.util.find_spec, ("_interpreters", "_xxsubinterpreters"))):
            self.skipTest("no subinterpreters here")
        code = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
for ending in "assert c.flush(20), c.stats()", "":
    number = interpreters.create()
    code = "import sys; sys.argv = " + repr(sys.argv) + sys.argv[2] + "log(c, 3)\\n" + ending
    wrong = interpreters.run_string(number, code)
    assert not wrong, wrong
    interpreters.destroy(number)
"""
        server = self.server()
        said = self.run_program(code, server.url, PRELUDE + PLAIN, env=NOT_COUNTED)
        self.assertEqual(len(said), 6)
        self.assertEqual(sorted(server.stored), sorted(said))

    def test_where_no_thread_can_be_had_flush_close_and_exit_send(self):
        code = """
for ending in "assert c.flush(20)", "assert c.close(20)", "":
    c = client()
    log(c, 300)
    exec(ending)
"""
        begun = []
        for place, no_threads in NO_THREADS.items():
            server = self.server()
            begun.append((place, server, self.begin_program(no_threads + code, server.url)))
        for place, server, words in begun:
            with self.subTest(place=place):
                said = words()
                self.assertEqual(len(said), 900)
                self.assertEqual(sorted(server.stored), sorted(said))

    def test_multiprocessing_children_deliver_without_flush_or_close(self):
        code = """
import multiprocessing, sys
import chirrop
client = chirrop.new_client(api_key="chp_test", api_endpoint=sys.argv[1], flush_delay=60)
def child(_=0):
    client.log(chirrop.Log("child", 1))
if __name__ == "__main__":
    client.log(chirrop.Log("parent", 1))
    context = multiprocessing.get_context(sys.argv[2])
    workers = [context.Process(target=child) for _ in range(int(sys.argv[3]))]
    for w in workers: w.start()
    for w in workers: w.join(25)
    assert not any(w.exitcode for w in workers), workers
    with context.Pool(1) as pool:
        pool.map(child, range(2))
        pool.close()
        pool.join()
"""
        file = self.folder() / "program.py"
        file.write_text(code)
        begun, count = [], rounds(1, 2)
        for method in rounds(("fork", "spawn"), ("fork", "forkserver", "spawn")):
            server = self.server()
            command = [sys.executable, "-W", "ignore", file, server.url, method, str(count)]
            environment = {**os.environ, "PYTHONPATH": str(HERE)}
            begun.append((method, server, self.begin(command, env=environment)))
        for method, server, end in begun:
            with self.subTest(method):
                done = end()
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertEqual(len(server.stored), 3 + count)
                self.assertEqual(len(set(server.stored)), 3 + count)

    def test_a_full_queue_is_sent_at_once_though_no_batch_is_full(self):
        client = self.client(FakeTransport(), queue_size=10, flush_delay=86400, timeout=5)
        for n in range(35):
            client.log(Log("a", n))  # raises if nobody sends the ten before it
        self.assertGreaterEqual(client.stats().delivered, 25)

    def test_an_exception_of_one_client_at_exit_keeps_no_other_from_sending(self):
        code = """
import logging, ssl
logging.disable()
class Context(ssl.SSLContext):
    def wrap_socket(self, *_, **__):
        raise %s
tls = sys.argv[1].replace("http:", "https:")
fields = {"ssl_context": Context(ssl.PROTOCOL_TLS_CLIENT), "exit_timeout": 0.6}
broken = [client(tls, **fields) for _ in range(2)]
fine = [client(exit_timeout=0.6) for _ in range(2)]
for c in broken:
    c.log(Log("never", 1))
for c in fine:
    log(c, 3)
"""
        begun = []
        for what in ("RuntimeError('TLS not supported')", "SystemExit(5)"):
            server = self.server()
            program = NO_THREADS["start"] + code.replace("%s", what)
            words = self.begin_program(program, server.url, stderr=None, status=mock.ANY)
            begun.append((what, server, words))
        for what, server, words in begun:
            with self.subTest(what):
                said = words()
                self.assertEqual(len(said), 6)
                self.assertEqual(sorted(server.stored), sorted(said))

    def test_what_a_sender_held_that_ends_is_sent_by_another(self):
        gone, inside, go = threading.Event(), threading.Event(), threading.Event()

        class Gone(BaseException):
            """As gevent's Timeout and asyncio's CancelledError are none of Exception."""

        def transport(method, url, body, headers, timeout):
            if gone.is_set():
                gone.clear()
                inside.set()
                go.wait(LONG)
                raise Gone
            return 200, b"", {}

        client = self.client(transport=transport, flush_delay=0)
        while len(list(client._sender._threads)) < 2:
            for number in range(1000):
                client.log(Log("x", number))
            self.assertTrue(client.flush(LONG))
        gone.set()
        client.log(Log("x", 1))
        self.assertTrue(inside.wait(LONG))
        flushing = threading.Thread(target=client.flush, daemon=True)
        flushing.start()
        while not client._sender._callers:
            os.sched_yield()
        go.set()
        flushing.join(LONG)
        self.assertFalse(flushing.is_alive())

    @refcounted
    def test_a_sender_that_is_told_to_exit_ends_and_another_takes_its_place(self):
        code = """
import ctypes
c = client()
log(c)
assert c.flush(20)
old, = (t for t in threading.enumerate() if t.name.startswith("chirrop-sender"))
ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(old.ident), ctypes.py_object(SystemExit))
log(c)                          # wakes it
old.join(20)
assert not old.is_alive()
log(c)
assert c.flush(20), c.stats()
"""
        server = self.server()
        said = self.run_program(code, server.url, stderr=None)  # a record may tell of it
        self.assertEqual(sorted(server.stored), sorted(said))

    def test_uwsgi_without_threads_is_told_once_and_flush_sends(self):
        code = """
import logging, types
logging.basicConfig(stream=sys.stderr, format="%(levelname)s")
uwsgi = sys.modules["uwsgi"] = types.ModuleType("uwsgi")
for options in {}, {"enable-threads": True}, {"threads": b"4"}:
    uwsgi.opt = {"master": True, **options}
    print("with", *options, file=sys.stderr, flush=True)
    c = client()
    log(c, 3)
    assert c.flush(20)
    log(c, 3)
"""
        server, told = self.server(), "with\nWARNING\nwith enable-threads\nwith threads\n"
        said = self.run_program(code, server.url, stderr=told)
        self.assertEqual(len(said), 18)
        self.assertEqual(sorted(server.stored), sorted(said))

    def test_where_no_thread_can_be_had_one_is_tried_for_once_a_batch(self):
        self.patch(chirrop, "_has_no_threads", lambda: True)
        client = self.client(batch_size=100, flush_delay=60)
        with mock.patch.object(client._sender, "_spawn", wraps=client._sender._spawn) as spawn:
            for n in range(250):
                client.log(Log("x", n))
        self.assertLessEqual(spawn.call_count, 3)
        self.assertTrue(client.flush(LONG))


# ---- Callbacks, logging, memory -------------------------------------------


class CallbackAndLoggingTest(ProcessTestCase):
    def handler(self, emit, name=None):
        handler = logging.Handler()
        handler.emit = emit
        logger = logging.getLogger(name or "chirrop")
        logger.addHandler(handler)
        self.addCleanup(logger.removeHandler, handler)
        return handler

    def test_on_drop_may_raise_log_flush_and_close(self):
        def actions(client):
            yield "raise", lambda: 1 / 0
            yield "exit", lambda: sys.exit(3)
            yield "log", lambda: client.log(Log("from on_drop", 1))
            yield "flush", lambda: client.flush()
            yield "close", lambda: client.close()

        for number in range(5):
            calls, box = [], []

            def on_drop(logs, error, number=number, calls=calls, box=box):
                calls.append((len(logs), error.status_code))
                if len(calls) == 1:
                    list(actions(box[0]))[number][1]()

            transport = FakeTransport((401, b'{"error":"bad key"}', {}))
            client = self.client(transport=transport, flush_delay=60, on_drop=on_drop)
            box.append(client)
            with self.subTest(list(actions(client))[number][0]):
                client.log(Log("x", 1))
                self.assertFalse(client.flush(LONG))
                client.log(Log("x", 2))
                client.flush(LONG)
                client.close(LONG)
                stats = self.assertBalanced(client)
                self.assertEqual(calls[0], (1, 401))
                self.assertEqual(stats.queued + stats.in_flight, 0)

    def test_on_drop_that_logs_while_close_drops_does_not_recurse(self):
        calls = []

        def on_drop(logs, error):
            calls.append(len(logs))
            client.log(Log("dropped", len(logs)))

        client = self.client(
            transport=FakeTransport(default=ConnectionError("down")),
            retries=0,
            flush_delay=60,
            on_drop=on_drop,
        )
        client.log(Log("x", 1))
        client.close(LONG)
        self.assertEqual(calls, [1])
        client.log(Log("late", 1))
        self.reported(client)
        self.assertEqual(calls, [1, 1])
        self.assertEqual(self.assertBalanced(client).dropped, {"closed": 4})

    def test_what_a_close_in_on_drop_drops_is_said_in_a_record(self):
        closed = threading.Event()

        def on_drop(logs, error):
            if len(client.stats().dropped) == 1 and client.stats().dropped["rejected"] == 2:
                client.log(Log("closed", 1))
                client.close(0)
                closed.set()

        client = self.client(transport=FakeTransport(default=400), flush_delay=60, on_drop=on_drop)
        for _ in range(2):  # of the second one nothing is said for a minute
            client.log(Log("rejected", 1))
            client.flush(LONG)
            self.reported(client)
        self.assertTrue(closed.wait(LONG))
        self.reported(client)
        said = [
            r.getMessage().partition(":")[0] for r in self.records if r.levelno == logging.ERROR
        ]
        self.assertEqual(
            said,
            ["dropped 1 logs (rejected)", "dropped 1 logs (rejected)", "dropped 1 logs (closed)"],
        )

    def test_on_drop_is_told_of_what_a_close_of_its_own_drops(self):
        told, sent, go, over = [], threading.Event(), threading.Event(), threading.Event()

        def on_drop(logs, error):
            told.extend(log["event"] for log in logs)
            client.close(0)
            over.set()

        def transport(method, url, body, headers, timeout):
            sent.set()
            go.wait(LONG)
            return 401, b"", {}

        client = self.client(transport=transport, flush_delay=0, on_drop=on_drop)
        client.log(Log("refused", 1))
        self.assertTrue(sent.wait(LONG))
        for _ in range(300):
            client.log(Log("closed", 1))
        go.set()
        self.assertTrue(over.wait(LONG))
        self.reported(client)
        self.assertEqual(sum(client.stats().dropped.values()), 301)
        self.assertEqual(len(told), 301)

    def test_a_logging_handler_that_feeds_this_client_does_not_feed_back(self):
        for status in (401, 400, ConnectionError("down")):
            for raises in (False, True):
                with self.subTest(status=status, raises=raises):
                    transport = FakeTransport(default=status)
                    on_drop = (lambda logs, error: 1 / 0) if raises else None
                    client = self.client(
                        transport=transport,
                        flush_delay=0,
                        retries=0,
                        on_exhausted="drop",
                        on_drop=on_drop,
                    )
                    handler = self.handler(
                        lambda record, client=client: client.log(Log("log.record", 1))
                    )
                    client.log(Log("x", 1))
                    for _ in range(20):
                        client.flush(LONG)
                    client.close(LONG)
                    logging.getLogger("chirrop").removeHandler(handler)
                    self.assertLess(self.assertBalanced(client).accepted, 10)

    def test_many_drops_make_a_handful_of_records(self):
        for raises in (False, True):
            with self.subTest(raises=raises):
                self.records.clear()
                client = self.client(
                    transport=FakeTransport(default=401), flush_delay=0,
                    on_drop=(lambda logs, error: 1 / 0) if raises else None,
                )  # fmt: skip
                entry = Log("x", 1)
                for _ in range(rounds(5_000, 20_000 if raises else 100_000)):
                    client.log(entry)
                client.close(LONG)
                self.assertBalanced(client)
                self.assertLessEqual(
                    len(self.records), 3 + raises, [r.getMessage() for r in self.records]
                )
                total = sum(r.args[0] for r in self.records if r.msg.startswith("dropped"))
                self.assertEqual(total, client.stats().dropped["refused"])

    def test_dictconfig_while_a_sender_is_in_a_stalled_request_returns(self):
        go = threading.Event()
        self.addCleanup(go.set)
        transport = FakeTransport(lambda body: go.wait(LONG) and 401)
        client = self.client(transport=transport, flush_delay=0)
        client.log(Log("x", 1))
        transport.seen.get(timeout=LONG)
        done = threading.Event()

        def configure():
            logging.config.dictConfig(
                {"version": 1, "incremental": False, "disable_existing_loggers": False}
            )
            done.set()

        threading.Thread(target=configure, daemon=True).start()
        self.assertTrue(done.wait(LONG / 2))
        go.set()
        self.assertFalse(client.flush(LONG))

    def test_a_handler_that_flushes_while_it_holds_its_lock_does_not_deadlock(self):
        client = self.client(transport=FakeTransport(401, 502, 200), flush_delay=0)
        answers = []
        handler = self.handler(
            lambda record: (client.log(Log("y", 1)), answers.append(client.flush(LONG))), "app"
        )
        app = logging.getLogger("app")
        app.propagate = False
        logging.getLogger("chirrop").addHandler(handler)
        self.addCleanup(logging.getLogger("chirrop").removeHandler, handler)
        for _ in range(3):
            app.error("something")
        client.close(LONG)
        self.assertEqual(len([a for a in answers if a]) >= 1, True)
        self.assertBalanced(client)

    def test_a_bug_between_take_and_settle_does_not_stop_the_sender(self):
        self.patch(time, "sleep", lambda seconds: None)  # of a sender, after what looks like a bug
        client = self.client(transport=FakeTransport(), flush_delay=0)
        attempt, client._link.attempt = client._link.attempt, mock.Mock(side_effect=MemoryError)
        client.log(Log("x", 1))
        while not client._link.attempt.called:
            client.flush(0)
        client._link.attempt = attempt
        self.assertTrue(client.flush(LONG))
        self.assertEqual(self.assertBalanced(client).delivered, 1)


class MemoryTest(ProcessTestCase):
    SIZE = rounds(500, 1000)

    def outage(self, transport):
        """Fill a bounded queue in an outage, go on for long; return the most bytes held for it."""
        try:
            import tracemalloc
        except ImportError:
            self.skipTest("this Python cannot tell what its memory is used for")
        # Imports are not held logs.
        self.client(transport=FakeTransport()).send_logs([Log("warm up", 1)])
        size, fields = self.SIZE, {"timeout": 0.0001, "flush_delay": 0}
        client = self.client(transport=transport, queue_size=size, **fields)
        accepted = refused = 0
        gc.collect()
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        start = tracemalloc.get_traced_memory()[0]
        while refused < rounds(100, 3000):
            try:
                client.log(Log("x", 1, meta="m" * 900))
                accepted += 1
            except ChirrOpQueueFullError:
                refused += 1
        held, peak = (size - start for size in tracemalloc.get_traced_memory())
        stats = self.assertBalanced(client)
        self.assertEqual((stats.accepted, stats.queued + stats.in_flight), (accepted, size))
        self.assertEqual(accepted, size)
        return held, peak

    def test_in_an_outage_memory_is_bounded_by_queue_size_in_flight_included(self):
        go = threading.Event()
        self.addCleanup(go.set)
        cases = {
            "refused": lambda *a: (502, b"", {}),
            "stalled": lambda *a: go.wait(LONG) and (502, b"", {}),
        }
        for name, transport in cases.items():
            with self.subTest(name):
                held, peak = self.outage(transport)
                self.assertLess(held, self.SIZE * 1400)  # a log is about 1,100 bytes
                # And a batch is joined for its request.
                self.assertLess(peak, self.SIZE * 1400 + 2 * 250 * 1100)
                go.set()


# ---- Interrupted anywhere -------------------------------------------------
# One operation is done again and again, and each time something happens before another instruction
# of the module: an exception is raised there, or a handler calls the client. Whatever instruction it
# was, the exception must reach the caller, and afterwards the client must work and account for all.

CODE_FILE = chirrop.__file__
MODULE_CODE = chirrop.__spec__.loader.get_code("chirrop")
PATIENCE = float(os.environ.get("CHIRROP_TEST_PATIENCE", "5"))  # seconds; what takes longer hangs


class TimeLimit(Exception):
    """What a task queue's soft time limit raises from its signal handler."""


BY_HANDLERS = (TimeLimit, KeyboardInterrupt, SystemExit)  # the others need none


def handle(number, frame):
    """Raise, as the handler of a signal, what is under test."""
    raise handle.thrown


class Hang(BaseException):
    """Something took longer than PATIENCE; says where."""


class Place:
    """The instruction before which something happened, and whether it can happen there in life.

    CPython runs signal handlers, which may raise, only where it looks at its "eval breaker". Seen in
    real signals, some 50,000 for each version, which told the instruction that they came after:
        3.11+   after RESUME (a function starts, a generator goes on), after a call of C code, and
                after a jump back; what is raised is caught as if that instruction had raised it
        3.10    when a function starts or a generator goes on, after any call and after any jump
                that is taken, unless SETUP_FINALLY or SETUP_WITH is next
        3.9     after all instructions but the simplest, with the same exception; POP_BLOCK is none
                of those: a signal may get between the end of a `with` block and its __exit__, and
                between a `try` and its `finally`
    Instructions that run C code for long, such as one that waits for a lock, run handlers before
    they have an effect: to the module that is an interruption before them.

    `reach` is "signal" there. It is "memory" where no signal arrives, but the instruction allocates
    or calls: MemoryError and RecursionError may be raised, and finalisers run. Elsewhere it is
    "never": only a test gets there, such as between taking a lock and its `with` block.
    """

    ALLOCATING = (
        *("CALL", "PRECALL", "BUILD_", "LIST_", "SET_", "DICT_", "MAP_", "BINARY_", "INPLACE_"),
        *("FORMAT_", "CONVERT_", "GET_ITER", "FOR_ITER", "MAKE_FUNCTION", "LOAD_METHOD", "IMPORT_"),
        *("UNPACK_", "STORE_SUBSCR", "DELETE_SUBSCR", "BEFORE_WITH", "SETUP_WITH", "YIELD"),
        *("RETURN_GENERATOR", "WITH_EXCEPT", "STORE_SLICE"),
    )
    FAST = (  # 3.9: they do not look at the eval breaker
        *("NOP", "LOAD_FAST", "LOAD_CONST", "STORE_FAST", "POP_TOP", "ROT_TWO", "ROT_THREE"),
        *("ROT_FOUR", "DUP_TOP", "DUP_TOP_TWO", "JUMP_FORWARD", "JUMP_IF_NOT_EXC_MATCH", "IS_OP"),
        *("CONTAINS_OP", "RERAISE"),
    )
    CALLS = (
        *("CALL", "CALL_KW", "CALL_FUNCTION", "CALL_METHOD", "CALL_FUNCTION_KW"),
        "CALL_FUNCTION_EX",
    )
    _read = {}  # code -> its instructions, offset -> index, the guarded parts

    def __init__(self, frame, last):
        code, self.offset = frame.f_code, frame.f_lasti
        if code not in self._read:
            steps = list(dis.get_instructions(code))
            guards = getattr(dis.Bytecode(code), "exception_entries", ())
            self._read[code] = steps, {s.offset: i for i, s in enumerate(steps)}, guards
        self.steps, self.indices, self.guards = self._read[code]
        self.index = self.indices[self.offset]
        self.name = self.steps[self.index].opname
        self.reach = "never"
        if self._follows_a_look(frame, *last):
            self.reach = "signal"
        elif self.steps[self.index].argrepr == "INTRINSIC_STOPITERATION_ERROR":
            pass  # where a generator ends: it looks at the exception, and lets it go on
        elif self.name.startswith(self.ALLOCATING) and not self._is_exit():
            self.reach = "memory"

    def __str__(self):
        return f"[{self.reach}] before {self.name} in {getattr(self, 'stack', '?')}"

    def _is_exit(self):
        """Tell whether this calls an __exit__ with three times None; a lock's takes no memory."""
        before = [(s.opname, s.argval) for s in self.steps[max(0, self.index - 4) : self.index]]
        none, again = ("LOAD_CONST", None), ("DUP_TOP", None)
        return before[-3:] in ([none] * 3, [none, again, again]) or before[:3] == [none] * 3

    def _follows_a_look(self, frame, last_frame, last_offset):
        """Tell whether the eval breaker is looked at between the last instruction and this."""
        before = self.steps[self.index - 1] if self.index else None
        name, is_next = before.opname if before else "", True
        if last_frame is frame:
            name = self.steps[self.indices[last_offset]].opname
            is_next = bool(before) and before.offset == last_offset
        returned = last_frame not in (None, frame, frame.f_back)  # from Python code
        if sys.version_info >= (3, 11):
            if before and self._guard(before.offset) != self._guard(self.offset):
                return False  # it would be caught elsewhere than what the test raises here
            if is_next:
                return name == "RESUME" or (name in self.CALLS and not returned)
            return "JUMP_BACKWARD" in name and "NO_INTERRUPT" not in name
        if self.name in ("SETUP_FINALLY", "SETUP_WITH", "YIELD_FROM"):
            return False
        if sys.version_info >= (3, 10):
            return name in ("", "YIELD_VALUE", *self.CALLS) if is_next else "JUMP" in name
        return not is_next or name not in self.FAST

    def _guard(self, offset):
        return next((guard.target for guard in self.guards if guard.start <= offset < guard.end), 0)


def stack_of(frame):
    """Return what a stack was doing: its innermost function, then the module's lines."""
    frames = traceback.extract_stack(frame)
    ours = [f"{f.name}:{f.lineno}" for f in frames if f.filename == CODE_FILE]
    return " < ".join([frames[-1].name, *reversed(ours[-5:])])


class Step:
    """Do `action` before the nth instruction that this thread executes in the module.

    With `demanded`, before the first one from there on that has such a reach. With 0, which does
    nothing, `reaches` has the reach of each of them afterwards.
    """

    def __init__(self, nth=0, action=None, demanded=()):
        self.nth, self.action, self.count, self.place = nth, action, 0, None
        self.demanded, self.reaches, self._last = demanded, [], (None, 0)

    def _executes(self, frame):
        self.count += 1
        if self.count >= self.nth:
            place = Place(frame, self._last)
            if self.nth == 0:
                self.reaches.append(place.reach)
            elif not self.demanded or place.reach in self.demanded:
                self.stop()
                self.place, self._last = place, None
                place.stack = stack_of(frame)
                self.action()
                return
        if self.count >= self.nth - 1:
            self._last = (frame, frame.f_lasti)

    def __enter__(self):
        self._tracer = sys.gettrace()

        def step(frame, event, arg):
            if event == "opcode":
                self._executes(frame)
            return step

        def call(frame, event, arg):
            if frame.f_code.co_filename not in self.files:
                return None
            frame.f_trace_lines = False
            frame.f_trace_opcodes = True
            return step

        sys.settrace(call)
        return self

    def stop(self):
        sys.settrace(None)

    def __exit__(self, *_):
        sys.settrace(self._tracer)

    @classmethod
    @contextlib.contextmanager
    def installed(cls, deep):
        """Count the module's instructions; `deep`, also those of the threading module."""
        cls.files = (CODE_FILE, threading.__file__) if deep else (CODE_FILE,)
        yield


class MonitorStep(Step):
    """The same with sys.monitoring: in 3.13, sys.settrace misses the opcodes of a first run."""

    armed = None

    @classmethod
    @contextlib.contextmanager
    def installed(cls, deep):
        monitoring, tool = sys.monitoring, 4
        event, codes = monitoring.events.INSTRUCTION, codes_within(MODULE_CODE)
        if deep:
            classes = (vars(v) for v in vars(threading).values() if type(v) is type)
            functions = [f for names in (vars(threading), *classes) for f in names.values()]
            codes += [f.__code__ for f in functions if hasattr(f, "__code__")]
        monitoring.use_tool_id(tool, "test_chirrop")
        monitoring.register_callback(tool, event, cls._happened)
        for code in codes:
            monitoring.set_local_events(tool, code, event)
        try:
            yield
        finally:
            for code in codes:
                monitoring.set_local_events(tool, code, 0)
            monitoring.register_callback(tool, event, None)
            monitoring.free_tool_id(tool)

    @staticmethod
    def _happened(code, offset):
        step = MonitorStep.armed
        if step is not None and step.thread == threading.get_ident():
            step._executes(sys._getframe(1))

    def __enter__(self):
        self.thread = threading.get_ident()
        MonitorStep.armed = self
        return self

    def stop(self):
        MonitorStep.armed = None

    def __exit__(self, *_):
        self.stop()


if sys.version_info >= (3, 12):
    Step = MonitorStep


def codes_within(code):
    """Return a code object and all those that it makes functions and classes of."""
    inner = (const for const in code.co_consts if isinstance(const, type(code)))
    return [code, *(c for const in inner for c in codes_within(const))]


def fresh_module():
    """Return another copy of the module, and the functions that it wants called at exit."""
    module, hooks = type(sys)("chirrop"), []
    module.__file__ = CODE_FILE
    no_fork = mock.patch("os.register_at_fork", lambda **_: None, create=True)
    with mock.patch("atexit.register", hooks.append), no_fork:
        exec(MODULE_CODE, module.__dict__)
    return module, hooks


class Wire:
    """A server in memory, as a transport: "up", "down", "flaky" once, or a status for all."""

    def __init__(self, state="up"):
        self.state, self.taken, self.arrived = state, [], queue.SimpleQueue()

    def __call__(self, method, url, body, headers, timeout):
        state = self.state
        if state == "down":
            raise ConnectionError("down")
        if state == "flaky":
            self.state = "up"
            return 502, b"", {}
        if state != "up":
            return state, b'{"error": "because"}', {}
        self.taken += ids(json.loads(body))
        self.arrived.put(None)
        return 200, b"", {}

    def wait(self, wanted):
        """Wait for logs to arrive; by one thread, and with nothing of the threading module."""
        with contextlib.suppress(queue.Empty):
            while not set(wanted) <= set(self.taken):
                self.arrived.get(timeout=PATIENCE)
        return set(wanted) <= set(self.taken)


class Helper:
    """Another thread: does one thing after another, and is left behind where it hangs."""

    def __init__(self):
        self._todo, self._done = queue.Queue(), queue.Queue()
        self._thread = threading.Thread(target=self._run, name="test-helper", daemon=True)
        self._thread.start()

    def _run(self):
        for work in iter(self._todo.get, None):
            try:
                self._done.put((work(), None))
            except BaseException as exc:
                self._done.put((None, exc))

    def do(self, work):
        self._todo.put(work)
        try:
            result, error = self._done.get(timeout=5 * PATIENCE)
        except queue.Empty:
            raise Hang(stack_of(sys._current_frames()[self._thread.ident])) from None
        if error is not None:
            raise error
        return result

    def end(self):
        self._todo.put(None)


@contextlib.contextmanager
def time_limited():
    """Raise Hang in this thread, the main one, when it takes longer than PATIENCE."""

    def expired(number, frame):
        raise Hang(stack_of(frame))

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Trial:
    """One client and one operation: what was logged, and where it went."""

    def __init__(self, module, hooks, operation, server="up", spool=None):
        self.module, self.hooks, self.operation, self.spool = module, hooks, operation, spool
        self.others, self.wire = set(threading.enumerate()), Wire(server)
        self.returned, self.unsure, self.drops = [], [], []
        self.closed = False
        self.logged_by_on_drop = 0  # of which it is not told itself
        self.waits = operation in ("flush", "close", "exit", "stats")  # for more logs
        self.client = module.new_client(
            api_key=KEY, transport=self.wire, spool=spool, timeout=PATIENCE,
            retries=int(operation.endswith("pause")),
            flush_delay=60 if self.waits else 0, batch_size=3, exit_timeout=0.05,
            queue_size=10 if operation == "log to a bounded queue" else 0,
            on_drop=lambda logs, error: self.drops.extend(ids(logs)),
        )  # fmt: skip
        if operation != "first log" and not operation.startswith("send_logs"):
            self.log()
        if operation in ("log", "log to a bounded queue"):
            self.client.flush(PATIENCE)

    def log(self, step=None, log=None):
        """Log, or do as `log`; where that raises, nobody knows whether the log was taken."""
        entry = self.module.Log("test", 1)
        self.unsure.append(entry.log_id)
        with step or contextlib.nullcontext():
            (log or self.client.log)(entry)
        self.unsure.remove(entry.log_id)
        self.returned.append(entry.log_id)
        return entry.log_id

    def operate(self, step):
        client, operation = self.client, self.operation
        self.closed = operation in ("close", "exit")
        if operation.startswith("send_logs"):
            self.log(step, lambda entry: client.send_logs([entry]))
        elif "log" in operation:
            self.log(step)
        else:
            with step:
                if operation == "exit":
                    self.exit()
                elif operation == "stats":
                    client.stats()
                else:
                    getattr(client, operation)(PATIENCE)

    def exit(self):
        """Call the exit hooks as atexit does: the last first, all of them; then raise."""
        raised = None
        for hook in reversed(self.hooks):
            try:
                hook()
            except BaseException as exc:
                raised = exc
        if raised is not None:
            raise raised

    # What a handler may do.

    def log_within(self):
        self.log()

    def flush_within(self):
        self.client.flush(0)

    def close_within(self):
        self.closed = True
        self.client.close(0)

    def close_and_wait_within(self):
        self.closed = True
        self.client.close(0.01)

    def stats_within(self):
        self.client.stats()

    EXCEPTIONS = (TimeLimit, KeyboardInterrupt, RecursionError, SystemExit, MemoryError)
    HANDLERS = (log_within, flush_within, close_within, stats_within, close_and_wait_within)

    # What must hold afterwards. Each is a generator of what does not.

    def goes_on(self, threads):
        """Another thread uses the client: no lock is held, it sends, wakes and flushes."""
        client, wire = self.client, self.wire
        was_up, wire.state = wire.state == "up", "up"
        client.stats()
        if self.closed:
            return
        if not was_up and not client.flush(PATIENCE) and not client.flush(PATIENCE):
            yield "does not flush after an outage"
        if threads and not self.waits and not wire.wait([self.log()]):
            yield "is deaf to a log"
        waiting = set(self.returned) - set(wire.taken)
        unsure = len(set(self.unsure) - set(wire.taken))
        # A batch's worth; what is left over when batches of three have been made may wait.
        surely = min(3 - (len(waiting) + n) % 3 for n in range(unsure + 1))
        more = [self.log() for _ in range(3)]
        if threads and not wire.wait(more[:surely]):
            yield "is deaf: does not send without a flush"
        if not client.flush(PATIENCE):
            yield "does not flush"

    def ends(self):
        clean = self.client.close(PATIENCE)
        if not clean and not self.closed:
            yield "does not close clean"
        for thread in set(threading.enumerate()) - self.others:
            if thread.name.startswith("chirrop-"):
                thread.join(PATIENCE)
                if thread.is_alive():
                    yield f"leaves the thread {thread.name}"

    def accounts(self):
        """Compare where each log is with what the account says."""
        stats, taken = self.client.stats(), list(self.wire.taken)
        drops = list(dict.fromkeys(self.drops))  # interrupted, on_drop may be called once more
        kept = stats.queued + stats.in_flight + getattr(stats, "parked", 0)
        dropped = sum(stats.dropped.values())
        if stats.accepted != stats.delivered + dropped + kept:
            yield f"is out of balance: {stats}"
        spooled = self.left({*self.returned, *self.unsure} - {*taken, *drops})
        if len(set(taken)) < len(taken):
            yield "sent a log twice"
        elif len({*taken, *drops, *spooled}) < len(taken + drops + spooled):
            places = f"{len(taken)} sent, {len(drops)} dropped, {len(spooled)} kept"
            yield f"has a log in two places: {places}"
        lost = set(self.returned) - {*taken, *drops, *spooled}
        if len(lost) > max(0, dropped - len(drops)):
            yield f"lost {len(lost)} logs: {stats}"
        if dropped - len(drops) not in (0, self.logged_by_on_drop):
            yield f"dropped {dropped} logs and reported {len(drops)}"
        # What becomes of an interrupted send_logs() is unknown, and not in the account.
        direct = self.operation.startswith("send_logs")
        unknown = set(self.unsure).intersection(taken) if direct else set()
        places = len({*taken, *drops, *spooled} - unknown)
        if stats.accepted - places not in range(len(lost) + len(unknown) + 1):
            yield f"took {places} logs, but says {stats}"
        if stats.delivered not in (len(taken), len(taken) - len(unknown)):
            yield f"delivered {len(taken)} logs, but says {stats}"

    def left(self, missing):
        """Return the ids of the logs that a later run finds in the spool."""
        if not self.spool or not missing:
            return []
        wire = Wire()
        later = self.module.new_client(api_key=KEY, transport=wire, spool=self.spool)
        later.flush(PATIENCE)
        later.close(PATIENCE)
        return wire.taken


class Trials:
    """Trials of one operation under the same conditions, and what was wrong with them."""

    shared = None  # a copy of the module, and its exit hooks
    threads_forbidden = False

    def __init__(self, operation, folder=None, server="up", threads=True):
        self.operation, self.folder, self.server, self.threads = operation, folder, server, threads
        self.tried = collections.Counter()  # reach -> number
        self.wrong = []  # (place, what happened, what was wrong)
        self.demanded, self.passed = (), 0  # passed: instructions that are done with
        self.helper = Helper()

    def __str__(self):
        return (
            f"{self.operation}, {'spool' if self.folder else 'memory'}, server {self.server},"
            f" {'threads' if self.threads else 'no threads'}"
        )

    @classmethod
    @contextlib.contextmanager
    def world(cls, deep=False):
        """Let the module's threads be forbidden, and nothing else happen at any time."""
        start = threading.Thread.start

        def start_or_not(thread):
            if cls.threads_forbidden and thread.name.startswith("chirrop-"):
                raise RuntimeError("can't start new thread")
            start(thread)

        before = signal.signal(signal.SIGUSR1, handle)
        gc.disable()
        try:
            with Step.installed(deep), mock.patch("threading.Thread.start", start_or_not):
                yield
        finally:
            cls.threads_forbidden = False
            signal.signal(signal.SIGUSR1, before)
            gc.enable()
            gc.collect()

    def trial(self):
        Trials.threads_forbidden = not self.threads
        spool = os.path.join(self.folder, f"{uuid.uuid4().hex}.db") if self.folder else None
        Trials.shared = Trials.shared or fresh_module()
        self.shared[0]._exiting = False
        self.shared[0].BACKOFF_BASE = 0.0 if self.operation.endswith("pause") else 1.0
        return Trial(*self.shared, self.operation, self.server, spool)

    def survey(self):
        """Return the reach of each instruction of the operation when nothing happens."""
        step, trial = Step(), self.trial()
        self.operate(trial, step)
        trial.wire.state = "up"
        trial.client.close(PATIENCE)
        self.clean()
        return step.reaches

    def operate(self, trial, step):
        """Do the operation; return what it raised."""
        if self.operation == "exit":
            Trials.threads_forbidden = True
        try:
            with time_limited():
                trial.operate(step)
        except BaseException as exc:
            return exc
        finally:
            step.stop()
        return None

    def run(self, happenings, places=None, demanded=()):
        """Let `happenings` happen in turn, at these places or at every instruction, from 1 on.

        With `demanded`, only where the reach is one of these; it ends at the first that is wrong.
        """
        self.demanded = demanded
        for nth in places or itertools.count(1):
            if nth > self.passed and not (demanded and self.wrong):
                self.passed = self.one(nth, happenings[sum(self.tried.values()) % len(happenings)])
            if self.passed == math.inf:
                break
        self.helper.end()
        return self

    def one(self, nth, happening):
        """Return the instruction before which something happened; infinity: it ended before."""
        trial, wrong = self.trial(), []
        raising = isinstance(happening, type)
        thrown = happening("thrown") if raising else None

        def act():
            if happening in BY_HANDLERS:
                handle.thrown = thrown
                handle(signal.SIGUSR1, sys._getframe())
            if raising:
                raise thrown
            trial.logged_by_on_drop = int(step.place.stack.startswith("_call "))
            try:
                happening(trial)
            except Exception as exc:
                wrong.append(f"raises {exc!r} in {happening.__name__}")

        step = Step(nth, act, self.demanded)
        raised = self.operate(trial, step)
        if isinstance(raised, Hang):
            wrong.append(f"hangs in {raised}")
        elif raising and step.place:
            if raised is None:
                wrong.append("swallowed the exception")
            elif raised is not thrown:
                wrong.append(f"raised {raised!r} instead")
        elif raised is not None and not isinstance(raised, trial.module.ChirrOpError):
            wrong.append(f"raised {raised!r}")
        if not isinstance(raised, Hang):
            wrong += self.judge(trial)
        self.tried[step.place.reach if step.place else "end"] += 1
        if wrong:
            Trials.shared = None  # something may be wrong with all of the module
        self.wrong += ((step.place, happening.__name__, what) for what in wrong)
        self.clean()
        if sum(self.tried.values()) % 200 == 0:
            gc.collect()
        return step.count if step.place else math.inf

    def judge(self, trial):
        wrong = []
        try:
            wrong += self.helper.do(lambda: list(trial.goes_on(self.threads)))
            if not trial.closed:
                with time_limited():
                    trial.log()  # from the thread that was interrupted
            wrong += self.helper.do(lambda: list(trial.ends()))
            Trials.threads_forbidden = False
            wrong += self.helper.do(lambda: list(trial.accounts()))
        except Hang as exc:
            wrong.append(f"hangs afterwards in {exc}")
            self.helper = Helper()
        except Exception as exc:
            wrong.append(f"raises {exc!r} afterwards")
        return wrong

    def clean(self):
        for name in os.listdir(self.folder) if self.folder else ():
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self.folder, name))


@unittest.skipUnless(hasattr(signal, "setitimer"), "no signals to interrupt with here")
@unittest.skipUnless(sys.implementation.name == "cpython", "another interpreter's instructions")
class InterruptedCase(TestCase):
    def setUp(self):
        super().setUp()
        # What an exception leaves open is closed when nobody holds it any more, and Python warns.
        catch = warnings.catch_warnings()
        catch.__enter__()
        self.addCleanup(catch.__exit__, None, None, None)
        warnings.simplefilter("ignore", ResourceWarning)


@unittest.skipIf(sys.gettrace(), "somebody else traces, such as coverage")
class InterruptTest(InterruptedCase):
    """In a complete run at every instruction, which takes half an hour; else at a few of each."""

    REACHES = ("signal", "memory", "end")  # demanded; see Place

    def every(self, operation):
        """Interrupt an operation under all conditions, by exceptions, then by handlers."""
        folder = str(self.folder("/dev/shm" if os.path.isdir("/dev/shm") else None))
        conditions = itertools.product(
            (None, folder),
            ("up", "down", 400, 403),
            (True, False),
            (Trial.EXCEPTIONS, Trial.HANDLERS),
        )
        failed = 0
        with Trials.world():
            for index, (spool, server, threads, happenings) in enumerate(conditions):
                if index % rounds(7, 1):
                    continue
                trials = Trials(operation, spool, server, threads)
                faulthandler.dump_traceback_later(200 * PATIENCE, exit=True)
                happenings = happenings[index % 5 :] + happenings[: index % 5]
                trials.run(happenings, self.chosen(trials, index), self.REACHES)
                faulthandler.cancel_dump_traceback_later()
                with self.subTest(str(trials), by=happenings[0].__name__):
                    failed += bool(trials.wrong)
                    for place, happening, what in trials.wrong:
                        self.fail(f"{what}: {happening} {place}")
                if failed == 3:
                    return

    def chosen(self, trials, index):
        """Return None for every instruction, or one that signals reach, another with each index."""
        key = (trials.operation, bool(trials.folder), trials.threads)
        if COMPLETE:
            return None
        if key not in self.surveys:
            reaches = enumerate(trials.survey(), 1)
            self.surveys[key] = [nth for nth, reach in reaches if reach == "signal"]
        places = self.surveys[key]
        if FULL:
            return places[index % 5 :: 5]
        return [places[index * 37 % len(places)]]

    surveys = {}  # conditions -> places

    def test_the_first_log_interrupted_anywhere_harms_nothing(self):
        self.every("first log")

    def test_log_interrupted_anywhere_harms_nothing(self):
        self.every("log")

    def test_log_to_a_bounded_queue_interrupted_anywhere_harms_nothing(self):
        self.every("log to a bounded queue")

    def test_flush_interrupted_anywhere_harms_nothing(self):
        self.every("flush")

    def test_close_interrupted_anywhere_harms_nothing(self):
        self.every("close")

    def test_send_logs_interrupted_anywhere_harms_nothing(self):
        self.every("send_logs")

    def test_stats_interrupted_anywhere_harms_nothing(self):
        self.every("stats")

    def test_the_exit_hook_interrupted_anywhere_harms_nothing(self):
        self.every("exit")


@unittest.skipUnless(hasattr(signal, "setitimer"), "no signals to interrupt with here")
@unittest.skipIf(sys.gettrace(), "somebody else traces, such as coverage")
class TimeLimitTest(InterruptedCase):
    """Real signals at random moments, whose handler raises an Exception, against a job."""

    def job(self, client):
        """Log until a time limit ends it."""
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00002, 0.0005))
        while not self.fired:
            entry = Log("job.step", 1)
            self.unsure.add(entry.log_id)
            client.log(entry)
            self.returned.add(entry.log_id)
            self.unsure.discard(entry.log_id)

    def limited(self, times, spool):
        """Let time limits end jobs of one client; check it meanwhile, the account at the end."""
        wire, self.returned, self.unsure = Wire(), set(), set()
        client = new_client(api_key=KEY, transport=wire, flush_delay=0, spool=spool)
        self.addCleanup(client.close, 5)
        self.addCleanup(signal.setitimer, signal.ITIMER_REAL, 0)  # before it is closed
        for n in range(times):
            self.fired, self.ignored = None, False
            try:
                self.job(client)
                if not self.ignored:
                    self.fail(f"the client swallowed time limit {n} in {self.fired}")
            except TimeLimit:
                pass
            entry = Log("job.after", 1)
            client.log(entry)
            self.returned.add(entry.log_id)
            self.assertTrue(
                wire.wait([entry.log_id]), f"deaf after {n} time limits, the last in {self.fired}"
            )
        self.assertTrue(client.flush(LONG), client.stats())
        self.assertTrue(client.close(LONG), client.stats())
        stats = client.stats()
        self.assertEqual(len(wire.taken), len(set(wire.taken)), "sent twice")
        self.assertEqual(self.returned - set(wire.taken), set(), "lost")
        self.assertEqual(set(wire.taken) - self.returned - self.unsure, set())
        self.assertEqual((stats.accepted, stats.delivered), (len(wire.taken), len(wire.taken)))
        self.assertBalanced(client)

    def each(self, spool):
        def expired(number, frame):
            self.fired = stack_of(frame)
            raise TimeLimit

        def unraisable(args):
            """Python has swallowed it: nothing leaves a weak reference's callback."""
            if isinstance(args.exc_value, TimeLimit):
                self.ignored = True
            else:
                sys.__unraisablehook__(args)

        self.patch(sys, "unraisablehook", unraisable)
        before = signal.signal(signal.SIGALRM, expired)
        self.addCleanup(signal.signal, signal.SIGALRM, before)
        self.addCleanup(signal.setitimer, signal.ITIMER_REAL, 0)
        faulthandler.dump_traceback_later(10 * LONG, exit=True)
        self.addCleanup(faulthandler.cancel_dump_traceback_later)
        for client in range(rounds(2, 100)):
            self.limited(100, self.folder() / f"{client}.db" if spool else None)

    def test_a_time_limit_of_any_kind_of_handler_comes_through(self):
        """While a transport works for send_logs, where a network failure would be repeated."""

        class Handler:
            def __call__(self, *_):
                raise TimeLimit

            def method(self, *_):
                raise TimeLimit

        def once(*_):
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            raise TimeLimit

        def raised(kind, *_):
            raise kind

        handlers = (Handler(), Handler().method, once, functools.partial(raised, TimeLimit))
        for handler in handlers:
            answers = iter([lambda: signal.raise_signal(signal.SIGALRM), lambda: None])

            def transport(*_, answers=answers):
                next(answers)()
                return 200, b"", {}

            with self.subTest(handler=handler):
                before = signal.signal(signal.SIGALRM, handler)
                self.addCleanup(signal.signal, signal.SIGALRM, before)
                client = new_client(api_key=KEY, transport=transport)
                self.addCleanup(client.close, 5)
                with self.assertRaises(TimeLimit):
                    client.send_logs([Log("test", 1)])
                self.assertTrue(client.close(LONG))

    def test_a_flush_before_the_first_log_leaves_a_client_that_wakes(self):
        wire = Wire()
        client = new_client(api_key=KEY, transport=wire, flush_delay=0, batch_size=3)
        self.addCleanup(client.close, LONG)
        self.assertTrue(client.flush(LONG))
        entries = [Log("test", n) for n in range(3)]
        for entry in entries:
            client.log(entry)
        self.assertTrue(wire.wait([entry.log_id for entry in entries]), client.stats())

    @refcounted
    def test_time_limits_at_random_moments_of_a_job_in_memory_harm_nothing(self):
        self.each(spool=False)

    @refcounted
    def test_time_limits_at_random_moments_of_a_job_with_a_spool_harm_nothing(self):
        self.each(spool=True)


@unittest.skipUnless(hasattr(signal, "setitimer"), "no signals to interrupt with here")
@unittest.skipUnless(sys.implementation.name == "cpython", "another interpreter's instructions")
@unittest.skipIf(sys.gettrace(), "somebody else traces, such as coverage")
class ReentryTest(InterruptedCase):
    """A handler may do anything wherever its thread waits, in the threading module as well."""

    def each(self, operation, server):
        with Trials.world(deep=True):
            for threads in (True, False):
                reaches = list(enumerate(Trials(operation, None, server, threads).survey(), 1))
                places = [nth for nth, reach in reaches if reach == "signal"][:: rounds(60, 3)]
                for handler in Trial.HANDLERS if FULL else [Trial.close_within]:
                    trials = Trials(operation, None, server, threads)
                    trials.run([handler], None if COMPLETE else places, ("signal", "memory"))
                    with self.subTest(str(trials), by=handler.__name__):
                        for place, happening, what in trials.wrong:
                            self.fail(f"{what}: {happening} {place}")

    def test_an_exception_in_the_threading_module_below_log_leaves_a_client_that_wakes(self):
        """Thread.is_alive, above all: interrupted, it takes a thread that lives for dead."""
        with Trials.world(deep=True):
            for threads in (True, False):
                trials = Trials("log", None, "up", threads)
                places = range(1, len(trials.survey()) + 1, rounds(4, 1))
                trials.run(BY_HANDLERS, places, ("signal",))
                with self.subTest(str(trials)):
                    for place, happening, what in trials.wrong:
                        self.fail(f"{what}: {happening} {place}")

    def test_a_handler_may_close_flush_and_log_while_a_repeated_call_waits_for_its_next_attempt(
        self,
    ):
        self.each("send_logs with a pause", "flaky")

    def test_a_handler_may_close_flush_and_log_while_close_waits(self):
        self.each("close", "down")


class ExitInterruptedTest(ProcessTestCase):
    CODE = """
import logging
import math
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
waits, interrupts = threading.Event(), []

def interrupt(*_):
    interrupts.append(1)
    raise KeyboardInterrupt

signal.signal(signal.SIGINT, interrupt)

def stalled(method, url, body, headers, timeout):
    for number in range(int(sys.argv[2])):
        while len(interrupts) == number:
            os.kill(os.getpid(), signal.SIGINT)
            waits.wait(0.1)             # one that comes just before a wait does not end it: again
    waits.wait(20)

def dropped(logs, error):
    say("DROPPED", *(entry["log_id"] for entry in logs))

c = client(transport=stalled, exit_timeout=float(sys.argv[3]), flush_delay=60, on_drop=dropped)
for _ in range(3):
    log(c)
"""

    @unittest.skipIf(os.name == "nt", "Ctrl-C of another kind")
    def test_what_is_dropped_is_reported_when_ctrl_c_interrupts_the_exit_hook_several_times(self):
        code = PRELUDE + self.CODE
        begun = [self.begin_python(code, "http://x", times, 20) for times in (1, 2, 3)]
        for times, end in enumerate(begun, 1):
            with self.subTest(times):
                done = end()
                lines = done.stdout.split("\n")
                logged = sorted(lines[:3])
                dropped = [
                    i for line in lines if line.startswith("DROPPED") for i in line.split()[1:]
                ]
                self.assertEqual(sorted(dropped), logged, done.stdout + done.stderr)
                self.assertIn("ERROR dropped 3 logs (closed)", done.stdout)


class DeadlineTest(ProcessTestCase):
    """A deadline is kept, give or take a moment, whatever holds the file or hangs in on_drop."""

    MOMENT = (
        1.0  # seconds: much more than a scheduler needs, and less than any wait that is forgotten
    )

    def took(self, work, *args):
        started = time.monotonic()
        work(*args)
        return time.monotonic() - started

    def test_log_flush_and_close_are_bounded_while_another_program_locks_the_spool(self):
        self.patch(chirrop, "_SPOOL_WAIT", rounds(0.05, chirrop._SPOOL_WAIT))
        for opened in (True, False):  # before the lock was taken, or while it is
            with self.subTest(opened=opened):
                path, wire, dropped = self.spool(), Wire(), []
                self.drain(self.make_spool(1, path)[0])
                client = new_client(
                    api_key=KEY, transport=wire, flush_delay=60, spool=path,
                    on_drop=lambda logs, error, dropped=dropped: dropped.extend(ids(logs)),
                )  # fmt: skip
                self.addCleanup(client.close, 0)
                logged = [Log("test", n) for n in range(3)]
                if opened:
                    client.log(logged[0])
                with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
                    other.execute("BEGIN IMMEDIATE")
                    for entry in logged[opened:]:
                        self.assertLess(self.took(client.log, entry), self.MOMENT)
                    self.assertLess(self.took(client.flush, 0.03), 0.03 + self.MOMENT)
                    self.assertLess(self.took(client.close, 0.1), 0.1 + self.MOMENT)
                    other.execute("ROLLBACK")
                self.reported(client)
                known = {*wire.taken, *self.drain(path), *dropped}
                self.assertEqual({entry.log_id for entry in logged} - known, set())
                self.assertBalanced(client)

    def senders(self, hang):
        """Return a client with four senders that have a drop to report, and on_drop hangs."""
        together, inside = threading.Event(), threading.Semaphore(0)
        requests = []  # those under way

        def transport(method, url, body, headers, timeout):
            requests.append(body)
            if len(requests) == 4:
                together.set()
            four = together.wait(0.05)  # a success with a backlog brings another sender
            requests.remove(body)
            return (403 if four else 200), b"", {}

        def on_drop(logs, error):
            inside.release()
            hang.wait(LONG)

        client = new_client(api_key=KEY, transport=transport, on_drop=on_drop, flush_delay=60)
        self.addCleanup(client.close, 5)
        for n in range(20 * 250):
            client.log(Log("test", n))
        client.flush(0)
        self.assertTrue(inside.acquire(timeout=LONG))
        for _ in range(3):
            inside.acquire(timeout=0.05)  # where each sender calls it; a reporter is alone
        return client

    def test_close_is_bounded_when_on_drop_hangs_in_every_sender(self):
        hang = threading.Event()
        client = self.senders(hang)
        self.addCleanup(hang.set)
        self.assertLess(self.took(client.close, 0), self.MOMENT)

    def test_close_is_bounded_when_the_transport_hangs_in_every_sender(self):
        hang, inside = threading.Event(), threading.Semaphore(0)
        self.addCleanup(hang.set)

        def transport(*_):
            inside.release()
            hang.wait(LONG)
            return 200, b"", {}

        client = new_client(api_key=KEY, transport=transport, flush_delay=0)
        client.log(Log("test", 1))
        self.assertTrue(inside.acquire(timeout=LONG))
        self.assertLess(self.took(client.flush, 0.03), 0.03 + self.MOMENT)
        self.assertLess(self.took(client.close, 0.03), 0.03 + self.MOMENT)
        self.assertBalanced(client)

    def test_the_exit_keeps_its_time_when_on_drop_hangs_in_every_sender(self):
        program = self.start_program(
            """
together, inside, requests = threading.Event(), threading.Semaphore(0), []

def transport(method, url, body, headers, timeout):
    requests.append(body)
    if len(requests) == 4:
        together.set()
    four = together.wait(0.05)
    requests.remove(body)
    return (403 if four else 200), b"", {}

def on_drop(logs, error):
    inside.release()
    threading.Event().wait(20)

c = client("http://x", transport=transport, on_drop=on_drop, flush_delay=60, exit_timeout=0.2)
for n in range(20 * 250):
    c.log(Log("test", n))
c.flush(0)
inside.acquire()
for _ in range(3):
    inside.acquire(timeout=0.05)
say(time.monotonic())
"""
        )
        started = float(self.line(program))
        self.assertEqual(program.wait(LONG), 0)
        self.assertLess(time.monotonic() - started, 0.2 + 1.5 * self.MOMENT)


class StormTest(TestCase):
    def test_memory_does_not_grow_with_what_the_server_says(self):
        """A gateway answers each request 403 with 64 KB of JSON, 600 times a second, a minute."""
        try:
            import tracemalloc
        except ImportError:
            self.skipTest("this Python cannot tell what its memory is used for")
        answers = rounds(120, 36000)
        page, seen = json.dumps({"error": "x" * 65000}).encode(), threading.Semaphore(0)

        def gateway(method, url, body, headers, timeout):
            seen.release()
            return 403, page[:-2] + b'"}', {}  # another object each time

        client = new_client(api_key=KEY, transport=gateway, flush_delay=0, batch_size=1)
        self.addCleanup(client.close, 5)
        gc.collect()
        for n in range(answers + 20):
            if n == 20:
                tracemalloc.start()
                self.addCleanup(tracemalloc.stop)
            client.log(Log("test", n))
            self.assertTrue(seen.acquire(timeout=LONG))
        held, peak = tracemalloc.get_traced_memory()
        self.assertLess(held, 2e6)
        self.assertLess(peak, 4e6)
        self.assertBalanced(client)


@unittest.skipUnless(hasattr(signal, "setitimer"), "no signals to time with here")
@unittest.skipUnless(sys.implementation.name == "cpython", "its limit is of bytes, not of calls")
class RecursionTest(TestCase):
    def test_log_near_the_recursion_limit_leaves_a_client_that_sends(self):
        def deep(frames, work):
            return deep(frames - 1, work) if frames else work()

        folder = str(self.folder("/dev/shm" if os.path.isdir("/dev/shm") else None))
        with Trials.world():
            cases = itertools.product(("first log", "log", "flush"), (None, folder))
            for index, (operation, spool) in enumerate(cases):
                trials = Trials(operation, spool)
                failed = 0
                for left in rounds(range(2 + index, 26, 6), range(2, 40)):
                    here = len(traceback.extract_stack())
                    trial = trials.trial()
                    work = functools.partial(trial.operate, contextlib.nullcontext())
                    try:
                        deep(sys.getrecursionlimit() - here - left, work)
                    except RecursionError:
                        failed += 1
                    with self.subTest(operation, spool=bool(spool), frames_left=left):
                        self.assertEqual(trials.judge(trial), [])
                    trials.clean()
                self.assertGreater(failed, 0)
                trials.helper.end()


class NotASpoolCase(ProcessTestCase):
    """What is not ours is refused and left as it was; the client says so once, and goes on."""

    def state(self, path):
        """Return what can be seen of a path and of those beside it, but times of reading."""

        def of(name):
            found = os.lstat(name)
            text = None
            if stat.S_ISREG(found.st_mode):
                text = hashlib.sha256(pathlib.Path(name).read_bytes()).hexdigest()
            elif stat.S_ISLNK(found.st_mode):
                text = os.readlink(name)
            elif stat.S_ISDIR(found.st_mode):
                text = sorted(os.listdir(name))
            return text, found.st_mode, found.st_uid, found.st_ino, found.st_mtime_ns

        folder = os.path.dirname(path)
        return {name: of(os.path.join(folder, name)) for name in sorted(os.listdir(folder))}

    def refuses(self, path, spool=None):
        """Use a path as a spool: it must not change, and the client must send all the same."""
        before, transport = self.state(path), FakeTransport()
        self.records.clear()

        def work():
            with new_client(api_key=KEY, transport=transport, spool=spool or path) as client:
                entries = [Log("test", n) for n in range(3)]
                for entry in entries:
                    client.log(entry)
                self.assertTrue(client.flush(LONG), client.stats())
            self.assertBalanced(client)
            self.assertEqual(ids(transport.logs()), [entry.log_id for entry in entries])

        self.bounded(work)
        self.assertEqual(self.state(path), before)
        warnings = [r.getMessage() for r in self.records if r.levelno >= logging.WARNING]
        self.assertEqual(len(warnings), 1, warnings)
        self.assertIn(os.path.basename(path), warnings[0])
        with self.assertRaises(ChirrOpError) as caught:
            self.bounded(lambda: new_client(api_key=KEY, spool=SqliteSpool(path, required=True)))
        self.assertIn(os.path.basename(path), str(caught.exception))
        self.assertEqual(self.state(path), before)

    def bounded(self, work):
        helper = Helper()
        try:
            helper.do(work)
        except Hang as exc:
            self.fail(f"hangs in {exc}")
        finally:
            helper.end()


class ForeignFileTest(NotASpoolCase):
    """A file of ours is known by what is in it; whatever else is there is none of our business."""

    def also_by_a_link(self, path):
        """Try the path, then a symbolic link to it."""
        with self.subTest(path.name):
            self.refuses(str(path))
        link = self.folder() / f"link-to-{path.name}"
        with self.subTest(link.name):
            try:
                link.symlink_to(path)
            except OSError:
                return  # Windows wants a right for it
            before = self.state(path)
            self.refuses(str(link))
            self.assertEqual(self.state(path), before)

    def test_a_folder_keeps_its_mode_and_is_refused(self):
        for mode in (0o755, 0o1777, 0o700):
            path = self.folder() / "folder"
            path.mkdir()
            path.chmod(mode)
            self.also_by_a_link(path)

    def test_a_pipe_a_socket_and_a_device_keep_their_modes_and_are_refused(self):
        folder = self.folder()
        if hasattr(os, "mkfifo"):
            os.mkfifo(folder / "pipe", 0o666)
        if hasattr(socket, "AF_UNIX"):
            server = socket.socket(socket.AF_UNIX)
            self.addCleanup(server.close)
            server.bind(str(folder / "socket"))
        with contextlib.suppress(OSError, AttributeError):  # only root may, and not everywhere
            os.mknod(folder / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        for path in folder.iterdir():
            path.chmod(0o666)
        for path in sorted(folder.iterdir()):
            self.also_by_a_link(path)

    def test_text_is_left_as_it_is_and_refused(self):
        for name, text in (
            ("page.html", b"<!doctype html>\n" + b"<p>hello</p>\n" * 500),
            ("short.txt", b"x"),
            ("almost.db", b"SQLite format 2\0" + bytes(100)),
        ):
            path = self.folder() / name
            path.write_bytes(text)
            path.chmod(0o644)
            self.also_by_a_link(path)

    @refcounted
    def test_the_database_of_another_program_is_left_as_it_is_and_refused(self):
        for name, pragmas in (
            ("plain", ()),
            ("version-1", ("user_version = 1",)),
            ("version-2", ("user_version = 2",)),
            ("other-id", ("application_id = 252006673", "user_version = 1")),
            ("wal", ("journal_mode = WAL", "user_version = 1")),
        ):
            path = self.folder() / f"{name}.db"
            with contextlib.closing(sqlite3.connect(path)) as other:
                for pragma in pragmas:
                    other.execute(f"PRAGMA {pragma}")
                other.execute("CREATE TABLE logs (id INTEGER PRIMARY KEY, text TEXT)")
                other.execute("INSERT INTO logs (text) VALUES ('theirs')")
                other.commit()
            path.chmod(0o644)
            self.also_by_a_link(path)


@unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid() == 0, "only root makes others' files")
class OtherUserTest(NotASpoolCase):
    """What another user can do in a folder that it may write to."""

    OTHER = 65534

    def setUp(self):
        super().setUp()
        probe = self.folder() / "probe"
        probe.touch()
        try:
            os.chown(probe, self.OTHER, self.OTHER)
        except OSError:
            self.skipTest("this root may not give files away")

    def shared(self, mode=0o1777):
        folder = self.folder() / "shared"
        folder.mkdir()
        folder.chmod(mode)
        return folder

    def give_away(self, *paths):
        for path in paths:
            os.chown(path, self.OTHER, self.OTHER, follow_symlinks=False)

    def planted(self, path, mode=0o666):
        """Let the other user have a valid spool there, with logs that it wants to be sent."""
        self.make_spool(3, path)
        path.chmod(mode)
        self.give_away(*path.parent.iterdir())
        return path

    def test_a_spool_in_a_folder_that_everybody_may_change_is_refused(self):
        for mode in (0o777, 0o773, 0o722):
            path = self.shared(mode) / "spool.db"
            with self.subTest(oct(mode), there=False):
                self.refuses(str(path))
            folder = self.shared(0o700)
            self.make_spool(3, folder / "spool.db")
            folder.chmod(mode)
            with self.subTest(oct(mode), there=True):
                self.refuses(str(folder / "spool.db"))

    def test_a_spool_in_a_sticky_folder_that_everybody_may_write_to_works(self):
        path = self.shared() / "spool.db"
        self.make_spool(3, path)
        self.records.clear()
        self.assertEqual(len(self.drain(path)), 3)
        self.assertEqual([r for r in self.records if r.levelno >= logging.WARNING], [])

    def test_a_spool_that_another_user_planted_is_neither_read_nor_changed(self):
        for mode in (0o666, 0o600, 0o644):
            with self.subTest(oct(mode)):
                self.refuses(str(self.planted(self.shared() / "spool.db", mode)))

    def test_a_spool_that_another_user_planted_is_not_read_by_a_user_who_is_not_root(self):
        folder = self.shared()
        path = self.planted(folder / "spool.db")
        folder.parent.chmod(0o755)
        before = self.state(path)
        done = self.python(
            PRELUDE
            + """
import email.utils, http.client, json, logging, sqlite3
os.setgroups([]); os.setgid(65533); os.setuid(65533)
sent = []
def transport(method, url, body, headers, timeout):
    sent.extend(json.loads(body))
    return 200, b"", {}
c = client("http://x", transport=transport, spool=sys.argv[1])
c.log(Log("mine", 1))
assert c.flush(20), c.stats()
c.close(20)
say(*(entry["event"] for entry in sent))
""",
            path,
        )
        self.assertEqual(done.stdout.split(), ["mine"], done.stderr)
        self.assertEqual(self.state(path), before)

    def test_what_another_user_planted_beside_a_spool_of_ours_is_neither_read_nor_changed(self):
        """Files of ours have names that can be guessed: PATH.2 and so on, and those of SQLite."""
        for suffix in (".2", ".3", "-wal", "-journal"):
            with self.subTest(suffix):
                folder = self.shared()
                path = folder / "spool.db"
                mine, theirs = self.make_spool(2, path)[1], folder / f"spool.db{suffix}"
                source = self.planted(self.shared() / "spool.db")
                theirs.write_bytes(source.read_bytes())
                theirs.chmod(0o666)
                self.give_away(theirs)
                before = self.state(path)[theirs.name]
                sent = self.drain(path)
                self.assertEqual(set(sent) - set(mine), set(), "logs of another user")
                self.assertEqual(self.state(path).get(theirs.name), before)

    def test_a_link_that_another_user_planted_is_not_followed(self):
        def victim(kind):
            folder = self.folder() / "private"
            folder.mkdir(mode=0o700)
            path = folder / "victim"
            if kind == "text":
                path.write_bytes(b"theirs\n")
                path.chmod(0o644)
            elif kind == "spool":
                self.make_spool(2, path)
            elif kind == "empty":
                path.touch(0o644)
            return path

        for kind in ("text", "spool", "empty", "missing"):
            for suffix in ("", "-wal", "-journal"):
                with self.subTest(kind, suffix=suffix):
                    folder, target = self.shared(), victim(kind)
                    path, link = folder / "spool.db", folder / f"spool.db{suffix}"
                    link.symlink_to(target)
                    self.give_away(link)
                    before = self.state(str(target))
                    if suffix:
                        self.make_spool(1, path)
                        with contextlib.suppress(AssertionError):
                            self.drain(path)
                    else:
                        self.refuses(str(path))
                    self.assertEqual(self.state(str(target)), before)


# ---- Transport: a scripted server ------------------------------------------
# The oracle of the tests below. A behaviour is what the server does with a request: bytes to send, or a
# function of (connection, request) that returns such bytes or misbehaves itself.

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
    """Return a whole answer; `Retry_After="7"` is a header, and Content_Length=None leaves that one out."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} -"]
    lines += [
        f"{k.replace('_', '-')}: {v}"
        for k, v in {"Content_Length": len(body), **fields}.items()
        if v is not None
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(*parts):
    """Return an answer in chunks; it is cut short when the last part is not b""."""
    return answer(Content_Length=None, Transfer_Encoding="chunked") + b"".join(
        b"%x\r\n%b\r\n" % (len(part), part) for part in parts
    )


def hang(connection, request):
    connection.sock.recv(1)  # returns when the client hangs up or the test ends


def reset(connection, request):
    connection.close(reset=True)


def cut(data=b"", reset=False):
    """Send `data` and close the connection."""

    def behave(connection, request):
        connection.sock.sendall(data)
        connection.close(reset)

    return behave


def drip(data):
    """Send `data`, then more of the same for ever, one byte at a time."""

    def behave(connection, request):
        sent = 0
        while not connection.server.ended.wait(0.02):
            connection.sock.sendall(data[sent : sent + 1] or b"x")
            sent += 1

    return behave


def flood(head, block=b"x" * (1 << 20)):
    """Send `head`, then 200 blocks of 1 MiB, as long as the client takes them."""

    def behave(connection, request):
        connection.sock.sendall(head)
        for _ in range(200):
            connection.sock.sendall(block)
            connection.flooded += 1
        connection.close()

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
        while True:
            data = source.recv(65536)
            if not data:
                break
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


class Request:
    """One request as the server read it; `connection` is the number of the connection it came on."""

    def __init__(self, head, body, connection):
        first, *fields = head.decode("latin-1").split("\r\n")
        self.raw, self.body, self.connection = head + b"\r\n\r\n" + body, body, connection
        self.method, self.path, _ = first.split(" ")
        self.headers = {
            k.lower(): v.strip() for k, _, v in (field.partition(":") for field in fields)
        }

    def logs(self):
        return json.loads(self.body)


class Connection:
    """The server's side of one connection."""

    def __init__(self, server, sock, number):
        self.server, self.sock, self.number = server, sock, number
        self.received, self.flooded, self.closed = b"", 0, threading.Event()

    def read(self):
        """Return the next request; None when the client has hung up."""
        while b"\r\n\r\n" not in self.received:
            if not self.more():
                return None
        head, _, self.received = self.received.partition(b"\r\n\r\n")
        request = Request(head, b"", self.number)
        size = int(request.headers.get("content-length", 0))
        while len(self.received) < size:
            if not self.more():
                return None
        body, self.received = self.received[:size], self.received[size:]
        return Request(head, body, self.number)

    def more(self):
        data = self.sock.recv(1 << 16)
        self.received += data
        return data

    def close(self, reset=False):
        if reset:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()
        self.closed.set()


class RawServer:
    """A server on loopback that does with each request what its script says, and then `default` for ever.

    `greet` is called with every new connection before anything is read from it.
    """

    def __init__(self, *script, default=answer(), tls=None, listening=True, greet=None):
        self.script, self.default, self._tls, self._greet = list(script), default, tls, greet
        self.requests, self.connections = [], []
        self.seen = queue.Queue()  # one item a request, for tests that wait for it
        self.ended, self._lock, self._threads = threading.Event(), threading.Lock(), []
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
        thread = threading.Thread(target=target, args=args, name="raw-server", daemon=True)
        self._threads.append(thread)
        thread.start()
        return thread

    def _accept(self):
        while True:
            sock, _ = self._socket.accept()
            if self.ended.is_set():
                return sock.close()
            self.connections.append(Connection(self, sock, len(self.connections)))
            self.start(self._serve, self.connections[-1])

    def _serve(self, connection):
        with contextlib.suppress(OSError):  # the client went away, or the test is over
            if self._tls:
                connection.sock = self._tls.wrap_socket(
                    connection.sock, server_side=True, do_handshake_on_connect=False
                )
                connection.sock.do_handshake()
            if self._greet:
                self._greet(connection)
            for request in iter(connection.read, None):
                self._behave(connection, request)
        connection.close()

    def _behave(self, connection, request):
        with self._lock:
            behaviour = self.script.pop(0) if self.script else self.default
            self.requests.append(request)
        self.seen.put(request)
        data = behaviour(connection, request) if callable(behaviour) else behaviour
        if data:
            connection.sock.sendall(data)

    def logs(self):
        """Return every log of every request, in order."""
        return [log for request in self.requests for log in request.logs()]

    def close(self):
        """End all threads and sockets."""
        if self.ended.is_set():
            return
        self.ended.set()
        with contextlib.suppress(OSError):  # wakes accept()
            socket.create_connection(("127.0.0.1", self.port)).close()
        for (
            thread
        ) in self._threads:  # the first is the one that accepts: no connection is added after it
            for connection in self.connections:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
            thread.join(LONG)
            assert not thread.is_alive(), thread
        self._socket.close()


class SocketTestCase(TestCase):
    def server(self, *script, **options):
        server = RawServer(*script, **options)
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

    def settled(self, client):
        """Return a queue that gets each answer to a batch once the client has accounted for it."""
        settle, answers = client._outbox.settle, queue.Queue()

        def run(*answer):
            settle(*answer)
            answers.put(answer)

        client._outbox.settle = run
        return answers

    def deliver(self, server, **fields):
        """Log one event, flush, and return the client."""
        client = self.real(server, **fields)
        client.log(Log("a.b.count", 1))
        client.flush(LONG)
        self.reported(client)
        return client


# ---- Transport: the retry table ---------------------------------------------


def unreached(server, client):
    """Let the server listen once the client was refused: in its wait before the retry."""
    client._outbox._rand = lambda: server.listen() or 0.0


FAULTS = {  # no answer, whatever the server has done with the request
    "reset before the headers": reset,
    "closed without a byte": cut(),
    "reset within the headers": cut(b"HTTP/1.1 200 OK\r\nContent-Le", reset=True),
    "closed within the headers": cut(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "reset after the headers": cut(answer(Content_Length=5), reset=True),
    "closed after the headers": cut(answer(Content_Length=5)),
    "reset within the body": cut(answer(body=b"{", Content_Length=5), reset=True),
    "truncated body": cut(answer(body=b"{", Content_Length=5)),
    "truncated chunks": cut(chunked(b"{", b"}")),
    "garbage for a chunk": cut(chunked(b"{")[:-3] + b"zz\r\n"),
    "garbage": cut(b"\x00\xffSSH-2.0-OpenSSH_9.6\r\n\r\n"),
    "an answer of HTTP/2": cut(b"HTTP/2 200\r\n\r\n"),
    "a status of four digits": cut(b"HTTP/1.1 2000 OK\r\n\r\n"),
    "endless header line": cut(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100000),
    "too many headers": cut(b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 200 + b"\r\n"),
}
FLOODS = {
    "200 MB announced": flood(answer(Content_Length=200 << 20)),
    "200 MB until the close": flood(answer(Content_Length=None)),
    "200 MB in chunks": flood(chunked(), b"%x\r\n%b\r\n" % (1 << 20, b"x" * (1 << 20))),
}
SAFE = {
    "list_events": lambda c: c.list_events(),
    "get_alert": lambda c: c.get_alert("a"),
    "update_policy": lambda c: c.update_policy("p", {"enabled": False}),
    "update_destination": lambda c: c.update_destination("d", {"enabled": False}),
    "acknowledge_alert": lambda c: c.acknowledge_alert("a"),
    "resolve_alert": lambda c: c.resolve_alert("a"),
    "archive_alert": lambda c: c.archive_alert("a"),
}
UNSAFE = {
    "create_event": lambda c: c.create_event({"event": "a.b"}),
    "create_policy": lambda c: c.create_policy({"period": "hour"}),
    "create_destination": lambda c: c.create_destination({"channel": "email"}),
    "test_destination": lambda c: c.test_destination("d"),
}
REDIRECTS = (301, 302, 303, 307, 308)


class RetryTableTest(SocketTestCase):
    # Logs.

    def assertRetriedOnce(self, server, client, error):
        stats = self.assertBalanced(client)
        self.assertEqual((stats.delivered, stats.dropped, stats.retries), (1, {}, 1))
        self.assertIs(type(stats.last_error), error)
        first, second = server.requests
        self.assertEqual(first.body, second.body)

    def test_logs_are_sent_again_after_a_network_failure(self):
        for name, fault in {**FAULTS, **FLOODS}.items():
            with self.subTest(name):
                server = self.server(fault)
                self.assertRetriedOnce(server, self.deliver(server), chirrop.ChirrOpTransportError)

    def test_an_answer_of_200_MB_is_not_read_to_its_end(self):
        for name, fault in FLOODS.items():
            with self.subTest(name):
                server = self.server(fault)
                self.deliver(server)
                self.assertLess(server.connections[0].flooded, 100)

    def test_logs_are_sent_once_the_server_listens(self):
        server = self.server(listening=False)
        client = self.real(server)
        unreached(server, client)
        client.log(Log("a.b.count", 1))
        self.assertTrue(client.flush(LONG))
        stats = client.stats()
        self.assertEqual((stats.delivered, stats.retries, len(server.requests)), (1, 1, 1))
        self.assertIn("refused", str(stats.last_error))

    def test_logs_are_sent_again_after_a_time_out(self):
        for name, fault in (
            ("hang", hang),
            ("drip of headers", drip(b"HTTP/1.1 200 OK\r\nX: ")),
            ("drip of a body", drip(answer(Content_Length=100000))),
        ):
            with self.subTest(name):
                server = self.server(fault)
                client = self.deliver(server, timeout=0.05)
                stats = client.stats()
                self.assertEqual((stats.delivered, stats.dropped), (1, {}))
                self.assertGreaterEqual(stats.retries, 1)
                self.assertEqual(len({request.body for request in server.requests}), 1)

    def test_logs_are_sent_again_after_these_statuses(self):
        for status in (408, 502, 504, 501, 520, 599):
            with self.subTest(status):
                server = self.server(answer(status, {"error": "down"}))
                self.assertRetriedOnce(server, self.deliver(server), chirrop.ChirrOpServerError)
        server = self.server(answer(429, {"error": "slow down"}))
        self.assertRetriedOnce(server, self.deliver(server), chirrop.ChirrOpRateLimitError)

    def test_logs_are_delivered_by_any_2xx(self):
        for name, behaviour in {
            "empty": answer(),
            "201": answer(201, {}),
            "204": answer(204, Content_Length=None),
            "HTML": answer(200, b"<html>"),
            "not UTF-8": answer(200, b"\xff"),
            "chunks": chunked(b"{", b"}", b""),
            "until the close": cut(answer(Content_Length=None, body=b"ok")),
            "HTTP/1.0": cut(b"HTTP/1.0 200 OK\r\n\r\n"),
            "after 100": b"HTTP/1.1 100 Continue\r\n\r\n" + answer(),
            "after many 1xx": b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 102 -\r\n\r\n"
            * 9
            + answer(),
        }.items():
            with self.subTest(name):
                server = self.server(behaviour, default=answer(500))
                stats = self.deliver(server).stats()
                self.assertEqual((stats.delivered, stats.retries, len(server.requests)), (1, 0, 1))

    def test_refused_logs_are_dropped_with_the_reason_and_not_sent_again(self):
        for status, kind in (
            (401, chirrop.ChirrOpUnauthorizedError),
            (403, chirrop.ChirrOpForbiddenError),
            (404, chirrop.ChirrOpNotFoundError),
            (418, chirrop.ChirrOpNonRetryableError),
        ):
            with self.subTest(status):
                server, drops = self.server(answer(status, {"error": "no, thanks"})), []
                client = self.deliver(
                    server, on_drop=lambda logs, error: drops.append((ids(logs), error))
                )
                self.assertEqual(client.stats().dropped, {"refused": 1})
                [request], [(dropped, error)] = server.requests, drops
                self.assertEqual(dropped, ids(request.logs()))
                self.assertIs(type(error), kind)
                self.assertEqual(
                    (str(error), error.status_code), (f"HTTP {status}: no, thanks", status)
                )
                self.assertEqual(error.body, {"error": "no, thanks"})

    def test_500_and_503_count_as_exhausted_at_once(self):
        for status in (500, 503):
            with self.subTest(status):
                server, drops = self.server(answer(status), answer(status)), []
                client = self.deliver(server)
                self.assertEqual((len(server.requests), client.stats().queued), (1, 1))
                self.assertGreater(client._outbox.state.batches[0].not_before, time.monotonic())
                client = self.deliver(
                    server,
                    on_exhausted="drop",
                    on_drop=lambda logs, error, drops=drops: drops.append(error),
                )
                self.assertEqual(client.stats().dropped, {"exhausted": 1})
                self.assertEqual([error.status_code for error in drops], [status])

    def test_a_log_rejected_alone_is_dropped_with_the_servers_message(self):
        for status in (400, 413, 422):
            with self.subTest(status):
                server, drops = self.server(answer(status, {"message": "bad log"})), []
                client = self.deliver(server, on_drop=lambda logs, error: drops.append(error))
                self.assertEqual(client.stats().dropped, {"rejected": 1})
                self.assertEqual(
                    (len(server.requests), str(drops[0])), (1, f"HTTP {status}: bad log")
                )
                self.assertIs(type(drops[0]), chirrop.ChirrOpBadRequestError)

    def test_the_second_host_of_a_redirect_sees_nothing_at_all(self):
        other = self.server()
        for status in REDIRECTS:
            with self.subTest(status):
                server = self.server(default=answer(status, Location=other.url + "/v1.0/logs"))
                client = self.deliver(server)
                self.assertEqual(client.stats().dropped, {"refused": 1})
                self.assertIn("redirects are not followed", str(client.stats().last_error))
                for call in (SAFE["list_events"], SAFE["update_policy"], UNSAFE["create_event"]):
                    with self.assertRaises(chirrop.ChirrOpNonRetryableError) as caught:
                        call(client)
                    self.assertEqual(caught.exception.status_code, status)
                self.assertEqual(len(server.requests), 4)
        self.assertEqual(other.connections, [])

    def test_a_redirect_to_the_same_host_is_not_followed_either(self):
        server = self.server(default=answer(302, Location="/elsewhere"))
        self.deliver(server)
        self.assertEqual([request.path for request in server.requests], ["/v1.0/logs"])

    def test_what_the_server_stored_before_it_dropped_the_line_is_one_log(self):
        store = {}

        def commit_then(behaviour):
            def behave(connection, request):
                store.update((log["log_id"], log) for log in request.logs())
                return behaviour(connection, request) if callable(behaviour) else behaviour

            return behave

        server = self.server(commit_then(reset), commit_then(cut()), default=commit_then(answer()))
        client = self.real(server, batch_size=1000, flush_delay=60)
        logs = [Log("a.b.count", i) for i in range(10)]
        for log in logs:
            client.log(log)
        self.assertTrue(client.flush(LONG))
        self.assertEqual(len(server.requests), 3)
        self.assertEqual(len({request.body for request in server.requests}), 1)
        self.assertEqual(store, {log.log_id: log.to_dict() for log in logs})

    def answered_before_the_end(self, early):
        """Return the account after the server answered a large body unread, and hung up."""

        def impatient(connection):
            while b"\r\n\r\n" not in connection.received:
                connection.more()
            connection.sock.sendall(early)
            connection.close()  # with much of the body unread: the client's writing fails

        client = self.real(self.server(greet=impatient), retries=1)
        client.log(Log("x" * (16 << 20), 1))
        client.flush(LONG)
        return client.stats()

    def test_a_refusal_that_comes_before_the_end_of_a_large_body_counts(self):
        stats = self.answered_before_the_end(answer(413, {"error": "too large"}))
        self.assertEqual((stats.dropped, stats.retries), ({"rejected": 1}, 0))

    def test_a_2xx_that_comes_before_the_end_of_the_body_is_no_delivery(self):
        stats = self.answered_before_the_end(answer())
        self.assertEqual((stats.delivered, stats.dropped, stats.queued), (0, {}, 1))

    # Retry-After.

    def retry_after(self, value):
        """Return what a Retry-After of `value` becomes, and the seconds that senders then wait."""
        server = self.server(answer(429, Retry_After=value))
        client = self.real(server, batch_size=1)
        settled = self.settled(client)
        client.log(Log("a.b.count", 1))
        settled.get(timeout=LONG)
        error, wait = client.stats().last_error, client._outbox.state.resume_at - time.monotonic()
        self.assertTrue(client.flush(LONG))  # at once, whatever the server asked for
        self.assertEqual(len(server.requests), 2)
        return error.retry_after, wait

    def test_retry_after_in_every_form(self):
        for value, seconds in {
            "7200": 300.0, "0": 0.0, "60": 60.0, "100.5": 100.5, " 60 ": 60.0, "007": 7.0,
            "9" * 5000: 300.0, "1" + "0" * 400: 300.0,
            "-5": None, "nan": None, "inf": None, "-inf": None, "1e9": None, "1_0": None, "0x10": None,
            "": None, ".": None, "soon": None, "\uff11\uff12": None, "\u00b2": None, "1, 2": None,
            "Thu, 01 Jan 1970 00:00:00 GMT": 0.0, "Sun Nov  6 08:49:37 1994": 0.0,
            "Fri, 31 Dec 9999 23:59:59 GMT": 300.0, "Fri, 31 Dec 9999 23:59:59 -2359": 300.0,
            "Thu, 99 Foo 2026 00:00:00 GMT": None, "Fri, 31 Dec 99999999 23:59:59 GMT": None,
        }.items():  # fmt: skip
            with self.subTest(value[:40]):
                parsed, wait = self.retry_after(value)
                self.assertEqual(parsed, seconds)
                self.assertLessEqual(wait, seconds or 0.0)
                self.assertGreater(wait, (seconds or 0.0) - LONG)

    def test_retry_after_as_a_date_to_come(self):
        self.addCleanup(getattr(time, "tzset", int))
        os.environ["TZ"] = "Asia/Kolkata"  # a date without a zone is not local time
        getattr(time, "tzset", int)()
        self.addCleanup(os.environ.pop, "TZ")
        date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=200), usegmt=True)
        for value in (date, date.replace("GMT", "-0000"), date.replace("GMT", "+0000")):
            with self.subTest(value):
                parsed, wait = self.retry_after(value)
                self.assertTrue(200 - LONG < parsed <= 200, parsed)
                self.assertTrue(200 - LONG < wait <= 200, wait)

    # The control plane.

    def test_what_is_safe_is_called_again_after_a_network_failure(self):
        for name, fault in {**FAULTS, **FLOODS}.items():
            calls = SAFE.items() if fault is reset else [("list_events", SAFE["list_events"])]
            for call, run in calls:
                with self.subTest(f"{call}: {name}"):
                    server = self.server(fault, default=answer(200, {"ok": 1}))
                    self.assertEqual(run(self.real(server)), {"ok": 1})
                    first, second = server.requests
                    self.assertEqual(
                        (first.method, first.path, first.body),
                        (second.method, second.path, second.body),
                    )

    def test_what_is_not_safe_is_not_called_again_when_its_outcome_is_unknown(self):
        for name, fault in {**FAULTS, **FLOODS}.items():
            calls = (
                UNSAFE.items() if fault is reset else [("create_policy", UNSAFE["create_policy"])]
            )
            for call, run in calls:
                with self.subTest(f"{call}: {name}"):
                    server = self.server(fault)
                    with self.assertRaises(chirrop.ChirrOpTransportError) as caught:
                        run(self.real(server))
                    self.assertEqual((caught.exception.status_code, len(server.requests)), (0, 1))

    def test_a_call_that_times_out_is_repeated_only_if_it_is_safe(self):
        for name, run in (*SAFE.items(), *UNSAFE.items()):
            if name not in ("list_events", "resolve_alert", "create_event", "test_destination"):
                continue
            with self.subTest(name):
                server = self.server(hang)
                client = self.real(server, timeout=0.05, servicer_retries=20)
                if name in SAFE:
                    self.assertEqual(run(client), {})
                    self.assertGreaterEqual(len(server.requests), 2)
                else:
                    with self.assertRaises(chirrop.ChirrOpTransportError):
                        run(client)
                    self.assertEqual(len(server.requests), 1)

    def test_a_connection_reset_while_the_request_is_read_is_an_unknown_outcome(self):
        server = self.server(
            greet=lambda connection: connection.more() and connection.close(reset=True)
        )
        with self.assertRaises(chirrop.ChirrOpTransportError):
            UNSAFE["create_event"](self.real(server))
        self.assertEqual(len(server.connections), 1)

    def test_every_call_is_repeated_when_no_connection_could_be_made(self):
        for name, run in (*SAFE.items(), *UNSAFE.items()):
            with self.subTest(name):
                server = self.server(listening=False)
                client = self.real(server)
                unreached(server, client)
                self.assertEqual(run(client), {})
                self.assertEqual(len(server.requests), 1)

    def test_a_call_is_repeated_after_a_failed_tls_handshake(self):
        server, context = self.tls_server(greet=None)
        plain = self.server(greet=lambda connection: connection.close())
        # Refuses the first tunnel, and no byte of the request was sent.
        os.environ["https_proxy"] = plain.url
        client = self.real(server, ssl_context=context)
        client._outbox._rand = lambda: (
            setattr(plain, "_greet", None) or setattr(plain, "default", tunnel) or 0.0
        )
        self.assertEqual(UNSAFE["create_event"](client), {})
        self.assertEqual((len(server.requests), len(plain.connections)), (1, 2))

    def test_every_call_is_repeated_after_429(self):
        for name, run in (*SAFE.items(), *UNSAFE.items()):
            with self.subTest(name):
                server = self.server(answer(429, Retry_After="0"), answer(429))
                self.assertEqual(run(self.real(server)), {})
                self.assertEqual(len(server.requests), 3)

    def test_a_long_retry_after_raises_at_once(self):
        for value, seconds in (("31", 31.0), ("999999999", 300.0)):
            server = self.server(answer(429, {"error": "slow down"}, Retry_After=value))
            for run in (SAFE["list_events"], UNSAFE["create_event"]):
                with (
                    self.subTest(value),
                    self.assertRaises(chirrop.ChirrOpRateLimitError) as caught,
                ):
                    server.script[:] = [answer(429, {"error": "slow down"}, Retry_After=value)]
                    run(self.real(server))
                self.assertEqual(caught.exception.retry_after, seconds)
            self.assertEqual(len(server.requests), 2)

    def test_retryable_statuses_repeat_only_what_is_safe(self):
        for status in (408, 502, 504, 599):
            for name, run in (*SAFE.items(), *UNSAFE.items()):
                with self.subTest(f"{name}: {status}"):
                    server = self.server(answer(status, b"bad gateway"))
                    if name in SAFE:
                        self.assertEqual(run(self.real(server)), {})
                        self.assertEqual(len(server.requests), 2)
                    else:
                        with self.assertRaisesRegex(
                            chirrop.ChirrOpServerError, f"HTTP {status}: bad gateway"
                        ):
                            run(self.real(server))
                        self.assertEqual(len(server.requests), 1)

    def test_final_statuses_raise_at_once(self):
        for status, kind in chirrop._ERROR_BY_STATUS.items():
            if status in (408, 429):
                continue
            for run in (SAFE["list_events"], UNSAFE["create_event"]):
                with self.subTest(status):
                    server = self.server(answer(status, {"error": "no"}))
                    with self.assertRaises(kind) as caught:
                        run(self.real(server))
                    self.assertEqual(
                        (str(caught.exception), len(server.requests)), (f"HTTP {status}: no", 1)
                    )

    def test_a_call_that_fails_every_time_raises_after_its_retries(self):
        for default, kind in (
            (reset, chirrop.ChirrOpTransportError),
            (answer(502), chirrop.ChirrOpServerError),
        ):
            server = self.server(default=default)
            with self.assertRaises(kind):
                self.real(server).list_events()
            self.assertEqual(len(server.requests), 3)

    def test_a_2xx_that_is_not_JSON_raises(self):
        server = self.server(default=answer(200, b"<html>login</html>"))
        with self.assertRaisesRegex(chirrop.ChirrOpTransportError, "not JSON"):
            self.real(server).list_events()
        self.assertEqual(len(server.requests), 1)


# ---- Transport: the main job --------------------------------------------------


def mixed_logs(count):
    """Return logs of mixed agents, meta and times."""
    now = datetime.now(timezone.utc)
    agents = (None, "billing", "späher-агент", "a b/c")
    metas = (
        None,
        {"result": "ok"},
        {"text": "naïve 🐦\n\"'"},
        [1, 2.5, None],
        "plain",
        {"deep": {"er": [True]}},
        0,
    )
    times = (
        None,
        now - timedelta(days=29),
        now + timedelta(hours=23),
        (now - timedelta(hours=1)).isoformat(),
    )
    return [
        Log(
            f"job.{i % 7}.count",
            i / 7 if i % 3 else i,
            agents[i % 4],
            None,
            metas[i % 7],
            times[i % 5 % 4],
        )
        for i in range(count)
    ]


class MainJobTest(SocketTestCase):
    def log_from_threads(self, client, logs, threads=4):
        workers = [
            threading.Thread(
                target=lambda part: [client.log(log) for log in part], args=(logs[i::threads],)
            )
            for i in range(threads)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(LONG)

    def test_10000_logs_each_arrive_once_as_they_were_logged(self):
        server, logs = self.server(), mixed_logs(10000)
        client = self.real(server)
        self.log_from_threads(client, logs)
        self.assertTrue(client.flush(LONG))
        self.assertLessEqual(max(len(request.logs()) for request in server.requests), 250)
        arrived = server.logs()
        self.assertEqual(len(arrived), 10000)
        self.assertEqual(
            {log["log_id"]: log for log in arrived}, {log.log_id: log.to_dict() for log in logs}
        )
        stats = self.assertBalanced(client)
        self.assertEqual(
            (stats.accepted, stats.delivered, stats.queued, stats.in_flight), (10000, 10000, 0, 0)
        )
        for request in server.requests:
            self.assertEqual((request.method, request.path), ("POST", "/v1.0/logs"))
            self.assertEqual(request.headers["authorization"], f"Bearer {KEY}")
            self.assertEqual(request.headers["content-type"], "application/json")
            self.assertEqual(request.headers["user-agent"], f"chirrop-python/{chirrop.__version__}")

    def test_what_is_retried_is_the_same_to_the_byte_and_of_the_time_of_logging(self):
        faults = [
            reset,
            answer(502),
            cut(),
            answer(429, Retry_After="0"),
            cut(answer(Content_Length=9)),
            answer(),
        ]
        server = self.server(*faults * 4)
        client = self.real(server)
        logs, made = [], {}
        for i in range(3000):
            before = datetime.now(timezone.utc)
            log = Log("a.b.count", i)
            made[log.log_id] = (before, datetime.now(timezone.utc))
            logs.append(log)
        self.log_from_threads(client, logs)
        self.assertTrue(client.flush(LONG))
        attempts = {}
        for request in server.requests:
            attempts.setdefault(request.body, set()).update(ids(request.logs()))
        self.assertLess(len(attempts), len(server.requests))
        # No log is in two different bodies.
        self.assertEqual(sum(map(len, attempts.values())), 3000)
        self.assertEqual(set().union(*attempts.values()), set(made))
        for log in server.logs():
            before, after = made[log["log_id"]]
            self.assertTrue(
                before - timedelta(milliseconds=1)
                <= chirrop._parse_time(log["occurred_at"])
                <= after,
                log,
            )
        self.assertEqual(self.assertBalanced(client).delivered, 3000)

    def test_nothing_is_sent_before_the_first_log_and_connections_end_with_the_client(self):
        server = self.server()
        client = self.real(server)
        self.assertEqual(server.connections, [])
        client.log(Log("a.b.count", 1))
        self.assertTrue(client.close(LONG))
        self.assertTrue(server.connections[0].closed.wait(LONG))


class SplitTest(SocketTestCase):
    def run_batch(self, is_bad):
        """Send one batch of 250 to a server that knows bad logs; return the server, the account and the drops."""

        def judge(connection, request):
            bad = [log["value"] for log in request.logs() if is_bad(log["value"])]
            return answer(400, {"error": f"value {bad[0]} is bad"}) if bad else answer()

        server, drops = self.server(default=judge), {}
        client = self.real(
            server, flush_delay=60, batch_size=1000,
            on_drop=lambda logs, error: drops.update((log["value"], str(error)) for log in logs),
        )  # fmt: skip
        for value in range(250):
            client.log(Log("a.b.count", value))
        self.assertFalse(client.flush(LONG))
        client.close()  # on_drop may still run when flush returns
        self.assertEqual(len(server.requests[0].logs()), 250)
        return server, self.assertBalanced(client), drops

    def test_three_bad_logs_of_250_are_dropped_alone_each_with_its_own_message(self):
        for bad in ((0, 125, 249), (3, 100, 200), (62, 63, 64), (124, 125, 126)):
            with self.subTest(bad):
                server, stats, drops = self.run_batch(lambda value: value in bad)
                self.assertEqual((stats.delivered, stats.dropped), (247, {"rejected": 3}))
                self.assertEqual(drops, {value: f"HTTP 400: value {value} is bad" for value in bad})
                self.assertLessEqual(len(server.requests), 60)
                good = [
                    log["value"]
                    for r in server.requests
                    if not any(log["value"] in bad for log in r.logs())
                    for log in r.logs()
                ]
                # Each once.
                self.assertEqual(sorted(good), [value for value in range(250) if value not in bad])

    def test_a_batch_in_which_all_are_bad_takes_at_most_64_requests(self):
        server, stats, drops = self.run_batch(lambda value: True)
        self.assertEqual((stats.delivered, sum(stats.dropped.values()), len(drops)), (0, 250, 250))
        self.assertLessEqual(set(stats.dropped), {"rejected", "undecided"})
        self.assertLessEqual(len(server.requests), 64)

    def test_parts_of_a_batch_survive_failures_between_them(self):
        good = []

        def judge(connection, request):
            values = [log["value"] for log in request.logs()]
            if len(server.requests) % 3 == 0:
                return reset(connection, request)
            if 7 in values:
                return answer(422, {"error": "7"})
            good.extend(values)
            return answer()

        server = self.server(default=judge)
        client = self.real(server, flush_delay=60, batch_size=1000)
        for value in range(100):
            client.log(Log("a.b.count", value))
        client.flush(LONG)
        self.assertEqual(sorted(good), [value for value in range(100) if value != 7])
        self.assertEqual(self.assertBalanced(client).dropped, {"rejected": 1})


# ---- Transport: flush and close -------------------------------------------------


class FlushTest(SocketTestCase):
    def test_flush_returns_while_another_thread_logs_without_pause(self):
        server, stop = self.server(), threading.Event()
        client = self.real(server)
        busy = threading.Event()

        def log_on():
            entry = Log("noise.count", 1)
            while not stop.is_set():
                client.log(entry)
                busy.set()

        thread = threading.Thread(target=log_on)
        thread.start()
        self.addCleanup(thread.join, LONG)
        self.addCleanup(stop.set)
        self.assertTrue(busy.wait(LONG))
        mine = Log("mine.count", 1)
        client.log(mine)
        self.assertTrue(client.flush(LONG))
        self.assertTrue(thread.is_alive() and not stop.is_set())
        self.assertIn(mine.log_id, ids(server.logs()))
        stop.set()
        thread.join(LONG)
        client.close(0)

    def flush_in_vain(self, fault):
        server = self.server(default=fault)
        client = self.real(server, timeout=LONG)
        client.log(Log("a.b.count", 1))
        started = time.monotonic()
        self.assertFalse(client.flush(timeout=0.1))
        self.assertLess(time.monotonic() - started, LONG / 2)
        self.assertEqual(self.assertBalanced(client).in_flight, 1)
        server.close()

    def test_flush_returns_in_its_time_when_the_server_hangs(self):
        self.flush_in_vain(hang)

    def test_flush_returns_in_its_time_when_the_server_drips(self):
        self.flush_in_vain(drip(b"HTTP/1.1 200 OK\r\nX: "))

    def waiting(self, *script, **fields):
        """Return a server and a client whose only log waits through a Retry-After of a minute."""
        server = self.server(answer(429, Retry_After="60"), *script)
        client = self.real(server, batch_size=1, **fields)
        settled = self.settled(client)
        client.log(Log("a.b.count", 1))
        settled.get(timeout=LONG)
        self.assertGreater(client._outbox.state.resume_at, time.monotonic())
        return server, client

    def test_flush_during_a_backoff_sends_at_once(self):
        server, client = self.waiting()
        self.assertTrue(client.flush(LONG))  # less than the minute
        self.assertEqual(client.stats().delivered, 1)
        self.assertEqual(server.requests[0].body, server.requests[1].body)

    def test_close_during_a_backoff_sends_at_once(self):
        server, client = self.waiting()
        self.assertTrue(client.close(LONG))
        self.assertEqual((len(server.requests), client.stats().delivered), (2, 1))

    def test_close_during_a_backoff_that_goes_on_returns_in_its_time(self):
        drops = []
        server, client = self.waiting(
            *[answer(429, Retry_After="60")] * 9,
            on_drop=lambda logs, error: drops.append(str(error)),
        )
        self.assertFalse(client.close(timeout=0.1))
        self.assertEqual(
            (client.stats().dropped, drops),
            (
                {"closed": 1},
                ["not sent before close; the last failure: HTTP 429: too many requests"],
            ),
        )

    def test_close_ends_the_wait_of_send_logs_and_of_control_plane_calls(self):
        for call in (lambda c: c.send_logs([Log("a.b.count", 1)]), lambda c: c.list_events()):
            server = self.server(default=answer(429, Retry_After="29"))
            client, raised = self.real(server), queue.Queue()

            def run():
                try:
                    raised.put(call(client))
                except Exception as exc:
                    raised.put(exc)

            pausing = threading.Event()
            pause = client._sender.pause
            client._sender.pause = lambda seconds: pausing.set() or pause(seconds)
            thread = threading.Thread(target=run)
            thread.start()
            self.addCleanup(thread.join, LONG)
            self.assertTrue(pausing.wait(LONG))
            client.close(0)
            # Far below the 29 s.
            self.assertIsInstance(raised.get(timeout=10), chirrop.ChirrOpRateLimitError)

    def test_flush_and_close_from_on_drop_do_not_wait_for_themselves(self):
        for name, act in (
            ("flush", lambda client: client.flush(timeout=LONG)),
            ("flush without limit", lambda client: client.flush()),
            ("close", lambda client: client.close(timeout=LONG)),
            ("close without limit", lambda client: client.close()),
        ):
            with self.subTest(name):
                server, done = self.server(answer(401)), queue.Queue()

                def on_drop(logs, error):
                    if error.status_code:
                        client.log(Log("a.b.count", 2))  # there is something to wait for
                        done.put(act(client))

                client = self.real(server, batch_size=1, on_drop=on_drop)
                client.log(Log("a.b.count", 1))
                done.get(timeout=LONG / 2)
                client.flush(LONG)
                stats = self.assertBalanced(client)
                self.assertEqual(
                    (stats.dropped["refused"], stats.accepted, stats.queued), (1, 2, 0)
                )

    def test_flush_reports_false_when_a_log_was_refused_and_the_client_goes_on(self):
        server = self.server(answer(403))
        client = self.deliver(server)
        client.log(Log("a.b.count", 2))
        self.assertTrue(client.flush(LONG))
        self.assertEqual(client.stats().delivered, 1)

    def test_flush_returns_after_one_failed_cycle_and_the_log_is_kept(self):
        server = self.server(*[answer(502)] * 3)
        client = self.real(server, retries=2)
        client.log(Log("a.b.count", 1))
        self.assertFalse(client.flush(LONG))
        self.assertEqual((len(server.requests), client.stats().queued), (3, 1))
        self.assertTrue(client.flush(LONG))
        self.assertEqual(client.stats().delivered, 1)


# ---- Transport: kept connections --------------------------------------------------


class KeepAliveTest(SocketTestCase):
    def flushes(self, client, count):
        for value in range(count):
            client.log(Log("a.b.count", value))
            self.assertTrue(client.flush(LONG))
        self.assertEqual(client.stats().retries, 0)

    def on(self, server):
        return [request.connection for request in server.requests]

    def test_many_flushes_share_one_connection(self):
        for name, default in (
            ("empty", answer()),
            ("body", answer(200, {"a": 1})),
            ("chunks", chunked(b"{}", b"")),
        ):
            with self.subTest(name):
                server = self.server(default=default)
                self.flushes(self.real(server), 10)
                self.assertEqual(self.on(server), [0] * 10)

    def test_many_flushes_share_one_tls_connection(self):
        server, context = self.tls_server()
        self.flushes(self.real(server, ssl_context=context), 10)
        self.assertEqual(self.on(server), [0] * 10)

    def test_many_flushes_share_one_tunnel_through_a_proxy(self):
        (server, context), proxy = self.tls_server(), self.server(default=tunnel)
        os.environ["https_proxy"] = proxy.url
        self.flushes(self.real(server, ssl_context=context), 10)
        self.assertEqual((self.on(server), len(proxy.connections)), ([0] * 10, 1))

    def test_reads_logs_and_refusals_share_one_connection(self):
        server = self.server(
            answer(),
            answer(404, {"error": "no"}),
            answer(204, Content_Length=None),
            answer(200, []),
        )
        client = self.deliver(server)
        with self.assertRaises(chirrop.ChirrOpNotFoundError):
            client.get_event("e")
        client.update_event("e", {})
        self.assertEqual(client.list_events(), [])
        self.assertEqual(self.on(server), [0] * 4)

    def test_the_answer_is_read_to_its_end(self):
        bodies = [[i] * 50000 for i in range(3)]
        server = self.server(*[answer(200, body) for body in bodies])
        client = self.real(server)
        self.assertEqual([client.list_events() for _ in bodies], bodies)
        self.assertEqual(self.on(server), [0] * 3)

    def test_an_idle_connection_that_the_server_has_closed_is_replaced_without_a_retry(self):
        for tls in (False, True):
            with self.subTest(tls=tls):
                server, context = (
                    self.tls_server(cut(answer())) if tls else (self.server(cut(answer())), None)
                )
                client = self.real(server, ssl_context=context)
                client._outbox._rand = lambda: self.fail("backed off")
                self.flushes(client, 1)
                self.assertTrue(server.connections[0].closed.wait(LONG))
                self.flushes(client, 2)
                # Polled: nothing was sent on the dead one.
                self.assertEqual(self.on(server), [0, 1, 1])

    def test_a_kept_connection_that_dies_with_the_request_is_replaced_without_a_retry(self):
        for name, death in (("close", cut()), ("reset", reset)):
            with self.subTest(name):
                server = self.server(answer(), death)
                client = self.real(server)
                client._outbox._rand = lambda: self.fail("backed off")
                self.flushes(client, 2)
                self.assertEqual(self.on(server), [0, 0, 1])
                self.assertEqual(server.requests[1].body, server.requests[2].body)
                server.script[:] = [death]
                self.assertEqual(client.list_events(), {})
                self.assertEqual(self.on(server)[3:], [1, 2])

    def test_an_answer_cut_short_on_a_kept_connection_is_a_retry_like_any_other(self):
        server = self.server(answer(), cut(answer(Content_Length=5)))
        client = self.deliver(server)
        client.log(Log("a.b.count", 2))
        self.assertTrue(client.flush(LONG))
        self.assertEqual((client.stats().retries, self.on(server)), (1, [0, 0, 1]))

    def test_a_time_out_on_a_kept_connection_is_a_retry_like_any_other(self):
        server = self.server(answer(), hang)
        client = self.real(server, timeout=0.1, retries=0)
        client.log(Log("a.b.count", 1))
        self.assertTrue(client.flush(LONG))
        client.log(Log("a.b.count", 2))
        self.assertFalse(client.flush(LONG))
        self.assertEqual((len(server.connections), self.on(server)), (1, [0, 0]))
        self.assertIn("time", str(client.stats().last_error))

    def test_calls_that_are_not_safe_have_a_connection_of_their_own(self):
        server = self.server()
        client = self.deliver(server)
        for number, run in enumerate(UNSAFE.values(), 1):
            run(client)
            self.assertEqual(server.requests[-1].connection, number)
            self.assertEqual(server.requests[-1].headers["connection"], "close")
            self.assertTrue(server.connections[number].closed.wait(LONG))  # by the client
        client.list_events()
        self.assertEqual(server.requests[-1].connection, 0)
        self.assertNotEqual(server.requests[-1].headers.get("connection"), "close")

    def test_a_call_that_is_not_safe_is_not_resent_when_its_connection_dies(self):
        server = self.server(answer(), cut())
        client = self.deliver(server)
        with self.assertRaises(chirrop.ChirrOpTransportError):
            client.create_event({"event": "a.b"})
        self.assertEqual(self.on(server), [0, 1])

    def test_an_answer_that_asks_to_close_ends_the_connection(self):
        for name, first in (
            ("header", answer(Connection="close")),
            ("HTTP/1.0", b"HTTP/1.0 200 -\r\nContent-Length: 0\r\n\r\n"),
        ):
            with self.subTest(name):
                server = self.server(first)
                self.flushes(self.real(server), 2)
                self.assertEqual(self.on(server), [0, 1])

    def test_a_connection_that_was_idle_for_long_is_replaced(self):
        server, now = self.server(), [1000.0]
        client = self.real(server)
        with mock.patch.object(chirrop, "_awake_clock", lambda: now[0]):
            self.flushes(client, 1)
            now[0] += chirrop.MAX_IDLE_SECONDS - 1
            self.flushes(client, 1)
            now[0] += chirrop.MAX_IDLE_SECONDS
            self.flushes(client, 1)
            now[0] -= 5  # a clock that went backwards says nothing about the connection's age
            self.flushes(client, 1)
        self.assertEqual(self.on(server), [0, 0, 1, 2])
        self.assertTrue(server.connections[0].closed.wait(LONG))

    def test_unasked_bytes_on_a_kept_connection_are_nobodys_answer(self):
        answered, strayed = threading.Event(), threading.Event()

        def stray(connection, request):
            connection.sock.sendall(answer(200, ["mine"]))
            answered.wait(LONG)
            connection.sock.sendall(answer(200, ["stray"]))
            strayed.set()

        server = self.server(
            stray, answer(200, ["new"]) + answer(200, ["stray"]), default=answer(200, ["newer"])
        )
        client = self.real(server)
        self.assertEqual(client.list_events(), ["mine"])
        answered.set()
        self.assertTrue(strayed.wait(LONG))
        self.assertEqual(client.list_events(), ["new"])
        self.assertEqual(self.on(server), [0, 1])
        self.assertEqual(client.list_events(), ["newer"])

    def test_an_interim_answer_is_not_taken_for_the_final_one(self):
        def hint_first(connection, request):
            connection.sock.sendall(b"HTTP/1.1 103 Early Hints\r\n\r\n")
            return answer(200, [request.path])

        server = self.server(default=hint_first)
        client = self.real(server)
        self.assertEqual(client.get_event("one"), ["/v1.0/events/one"])
        self.assertEqual(client.get_event("two"), ["/v1.0/events/two"])
        self.assertEqual(self.on(server), [0, 0])

    def test_threads_that_send_at_once_do_not_share_a_connection(self):
        both = threading.Barrier(2)

        def meet(connection, request):
            both.wait(LONG)
            return answer(200, [request.path])

        server = self.server(meet, meet, default=answer(200, []))
        client, results = self.real(server), queue.Queue()
        threads = [
            threading.Thread(
                target=lambda name: results.put((name, client.get_event(name))), args=(name,)
            )
            for name in ("x", "y")
        ]
        for thread in threads:
            thread.start()
        got = [results.get(timeout=LONG) for _ in threads]
        for thread in threads:
            thread.join(LONG)
        self.assertEqual(sorted(got), [("x", ["/v1.0/events/x"]), ("y", ["/v1.0/events/y"])])
        client.list_events()
        self.assertEqual((sorted(self.on(server)[:2]), len(server.connections)), ([0, 1], 2))

    @unittest.skipUnless(hasattr(os, "fork"), "needs os.fork")
    def test_a_forked_child_does_not_use_its_parents_connection(self):
        code = """if True:
            import os, sys, chirrop
            if sys.argv[2] == "without hooks":
                os.register_at_fork = lambda **hooks: None
            client = chirrop.new_client(api_key="chp_test", servicer_endpoint=sys.argv[1])
            client.list_events()
            child = os.fork()
            if not child:
                client.list_events()
                client.close()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
            client.list_events()
            client.close()
        """
        (path, context), begun = self.certificate(), []
        ways = (context, "with hooks"), (None, "without hooks"), (None, "with hooks")
        for tls, hooks in ways[: rounds(2, 3)]:
            server = self.server(tls=tls)
            end = self.begin_python(code, server.url, hooks, env={"SSL_CERT_FILE": path})
            begun.append((tls, hooks, server, end))
        for tls, hooks, server, end in begun:
            with self.subTest(hooks, tls=bool(tls)):
                done = end()
                self.assertEqual((done.returncode, done.stderr, done.stdout), (0, "", ""))
                self.assertEqual(self.on(server), [0, 1, 0])

    def test_close_closes_kept_connections_and_leaves_no_warning(self):
        head = (
            "import gc, sys, chirrop\n"
            "def new(url):\n"
            "    return chirrop.new_client("
            "api_key='chp_test', api_endpoint=url, servicer_endpoint=url)\n"
        )
        begun = []
        for programs in (  # each of them ends in one of the ways; those before have ended by then
            (
                "client.list_events(); client.close()",
                "client.log(chirrop.Log('a.b', 1)); client.close()",
                "client.list_events(); del client; gc.collect()",
                "client.log(chirrop.Log('a.b', 1)); client.flush(); del client; gc.collect()",
            ),
            ("client.log(chirrop.Log('a.b', 1)); client.flush()",),  # the exit hook closes it
            ("client.list_events()",),
        ):
            servers = [self.server(default=answer(200, [])) for _ in programs]
            lines = [f"client = new(sys.argv[{n}]); {p}" for n, p in enumerate(programs, 1)]
            code = head + "\n".join(lines)
            begun.append((programs, servers, self.begin_python(code, *[s.url for s in servers])))
        for programs, servers, end in begun:
            with self.subTest(programs):
                done = end()
                self.assertEqual((done.returncode, done.stderr), (0, ""))
                self.assertEqual([len(server.requests) for server in servers], [1] * len(programs))


# ---- Transport: security ------------------------------------------------------------


class TransportSecurityTest(SocketTestCase):
    # TLS.

    def test_an_unknown_certificate_is_refused_and_nothing_is_sent(self):
        server, _ = self.tls_server()
        client = self.real(server, retries=0, servicer_retries=0)
        for call in (lambda: client.send_logs([Log("a.b.count", 1)]), client.list_events):
            with self.assertRaisesRegex(
                chirrop.ChirrOpTransportError, "(?i)certificate.verify.failed"
            ):
                call()
        server.close()
        self.assertEqual([connection.received for connection in server.connections], [b"", b""])
        self.assertEqual(server.requests, [])

    def test_a_certificate_for_another_name_is_refused(self):
        server, context = self.tls_server()
        client = self.real(
            server.url.replace("127.0.0.1", "localhost"), ssl_context=context, servicer_retries=0
        )
        with self.assertRaisesRegex(chirrop.ChirrOpTransportError, "(?i)certificate"):
            client.list_events()
        self.assertEqual(server.requests, [])

    def test_a_private_authority_is_trusted_through_ssl_context(self):
        server, context = self.tls_server(default=answer(200, []))
        self.assertEqual(self.real(server, ssl_context=context).list_events(), [])

    def test_a_private_authority_is_trusted_through_SSL_CERT_FILE(self):
        path, context = self.certificate()
        server = self.server(tls=context)
        os.environ["SSL_CERT_FILE"] = path
        self.assertEqual(self.deliver(server).stats().delivered, 1)

    def test_a_server_without_tls_is_not_talked_to(self):
        server = self.server()  # waits for the end of what it takes for a request
        client = self.real(server.url.replace("http:", "https:"), servicer_retries=0, timeout=0.1)
        with self.assertRaises(chirrop.ChirrOpTransportError):
            client.list_events()
        self.assertEqual(server.requests, [])
        self.assertNotIn(KEY.encode(), server.connections[0].received)

    # Proxies.

    def test_http_proxy_gets_the_request_and_its_credentials(self):
        proxy = self.server(default=answer(200, []))
        os.environ["http_proxy"] = proxy.url.replace("//", "//user:pa%20ss@")
        client = self.real("http://chirrop.invalid")
        self.assertEqual(client.list_events(), [])
        [request] = proxy.requests
        self.assertEqual(request.path, "http://chirrop.invalid/v1.0/events")
        self.assertEqual(request.headers["host"], "chirrop.invalid")
        self.assertEqual(request.headers["proxy-authorization"], "Basic dXNlcjpwYSBzcw==")
        self.assertEqual(request.headers["authorization"], f"Bearer {KEY}")

    def test_https_goes_through_a_tunnel_and_the_proxy_sees_no_key(self):
        (server, context), proxy = self.tls_server(), self.server(default=tunnel)
        os.environ["https_proxy"] = proxy.url.replace("//", "//user:pass@")
        self.assertEqual(self.deliver(server, ssl_context=context).stats().delivered, 1)
        [request] = proxy.requests
        self.assertEqual((request.method, request.path), ("CONNECT", f"127.0.0.1:{server.port}"))
        self.assertEqual(request.headers["proxy-authorization"], "Basic dXNlcjpwYXNz")
        self.assertNotIn(KEY.encode(), request.raw)
        self.assertNotIn("proxy-authorization", server.requests[0].headers)

    def test_a_proxy_that_refuses_the_tunnel_or_drips_is_a_network_failure(self):
        server, context = self.tls_server()
        for name, default, wanted, timeout in (
            ("407", answer(407), "407", LONG),
            ("closed", cut(), "", LONG),
            ("garbage", cut(b"SSH-2.0\r\n\r\n"), "", LONG),
            ("drip", drip(b"HTTP/1.1 200 OK\r\nX: "), "", 0.1),
        ):
            with self.subTest(name):
                proxy = self.server(default=default)
                os.environ["https_proxy"] = proxy.url
                client = self.real(server, ssl_context=context, servicer_retries=0, timeout=timeout)
                with self.assertRaisesRegex(chirrop.ChirrOpTransportError, wanted):
                    client.list_events()
                self.assertEqual(server.requests, [])

    def test_no_proxy_goes_past_the_proxy(self):
        server, proxy = self.server(), self.server()
        os.environ["http_proxy"] = proxy.url
        for value, used in (("127.0.0.1", server), ("*", server), ("example.com", proxy)):
            with self.subTest(value):
                os.environ["no_proxy"] = value
                self.real(server).list_events()
                self.assertEqual([len(s.requests) for s in (used, server, proxy)][0], 1)
                server.requests.clear(), proxy.requests.clear()

    # What goes out.

    def test_only_http_and_https_are_spoken(self):
        path = self.folder() / "secret.json"
        path.write_text("[]")
        for url in (
            path.as_uri(),
            "ftp://127.0.0.1/x",
            "data:application/json,[]",
            "gopher://127.0.0.1/",
        ):
            with self.subTest(url[:10]):
                for field in ("api_endpoint", "servicer_endpoint"):
                    with self.assertRaises(chirrop.ChirrOpValidationError):
                        Config(KEY, **{field: url})
                with self.assertRaises((OSError, ValueError)):
                    chirrop._UrllibTransport()("GET", url, None, {}, 1.0)

    def test_injection_is_refused_before_anything_is_sent(self):
        server = self.server()
        client = self.real(server)
        for path in (
            "", "/", "/events/../keys", "/events/./x", "/events?x=1", "/events#x", "/a b", "/a\tb",
            "/events\r\nX-Evil: 1", "/events HTTP/1.1\r\n\r\nGET /x", "/é", "/a\\b", "/events//x", None, b"/events", "/\x7f",
        ):  # fmt: skip
            with self.subTest(path=path), self.assertRaises(chirrop.ChirrOpValidationError):
                client.request("GET", path)
        client.request("GET", "//evil.example/x")
        # A path, not another host.
        self.assertEqual(server.requests.pop().path, "/v1.0/evil.example/x")
        for method in ("", "GET /x HTTP/1.1\r\nX:", "GET\n", "GÉT", "G T", None, b"GET"):
            with self.subTest(method=method), self.assertRaises(chirrop.ChirrOpValidationError):
                client.request(method, "/events")
        for event_id in ("", "  ", ".", "..", None, 7, "\ud800"):
            with self.subTest(event_id=event_id), self.assertRaises(chirrop.ChirrOpValidationError):
                client.get_event(event_id)
        for key in ("chp_a\r\nX-Evil: 1", "chp_a\nb", "chp_é", "chp_a b", "chp_\x00"):
            with self.subTest(key=key), self.assertRaises(chirrop.ChirrOpValidationError):
                Config(key)
        self.assertEqual(server.requests, [])

    def test_an_id_stays_one_segment_and_a_value_one_parameter(self):
        server = self.server()
        client = self.real(server)
        for event_id, sent in (
            ("a/b", "a%2Fb"), ("../keys", "..%2Fkeys"), ("a?b#c&d", "a%3Fb%23c%26d"), ("a\r\nX: y", "a%0D%0AX%3A%20y"),
            ("a%2Fb", "a%252Fb"), (" evt_1 ", "evt_1"), ("é", "%C3%A9"), ("a;b", "a%3Bb"), ("a\\b", "a%5Cb"),
        ):  # fmt: skip
            with self.subTest(event_id):
                client.get_event(event_id)
                self.assertEqual(server.requests[-1].path, f"/v1.0/events/{sent}")
        client.request("GET", "/events", {"q": "a&b=c\r\nX: y", "none": None, "yes": True})
        self.assertEqual(server.requests[-1].path, "/v1.0/events?q=a%26b%3Dc%0D%0AX%3A+y&yes=true")
        self.assertNotIn(b"\r\nX: y", b"".join(request.raw for request in server.requests))

    def test_answers_are_taken_up_to_the_limit_and_no_further(self):
        body = b"[" + b" " * 998 + b"]"
        for name, whole in (
            ("announced", answer(200, body)),
            ("in chunks", chunked(body[:400], body[400:], b"")),
            ("until the close", cut(answer(200, body, Content_Length=None))),
        ):
            for limit, fits in ((1000, True), (999, False)):
                with (
                    self.subTest(name, limit=limit),
                    mock.patch.object(chirrop, "MAX_ANSWER_BYTES", limit),
                ):
                    client = self.real(self.server(default=whole), servicer_retries=0)
                    if fits:
                        self.assertEqual(client.list_events(), [])
                    else:
                        with self.assertRaisesRegex(
                            chirrop.ChirrOpTransportError, "larger than 999 bytes"
                        ):
                            client.list_events()

    # The key.

    CANARY = 'chp_canary/7d1f\\0e5b+"x'  # with characters that JSON may escape

    def shown(self, exc):
        """Return all that a log, a crash report or a pickle may show of an exception."""
        text = "".join(
            traceback.TracebackException.from_exception(exc, capture_locals=True).format()
        )
        chain, link = [], exc
        while link is not None:
            chain += [str(link), repr(link), repr(link.args)]
            link = link.__cause__ or link.__context__
        return "\n".join([text, *chain, repr(vars(exc)), repr(pickle.dumps(exc))])

    def shown_by(self, call, kind):
        """Return what the error shows that `call` must raise; assertRaises would clear the frames' locals."""
        try:
            call()
        except kind as exc:
            return self.shown(exc)
        raise AssertionError(f"{kind.__name__} not raised")

    def assertNoKey(self, text, where):
        self.assertNotIn("canary", text, where)

    def echoes(self):
        """Return behaviours that send the key back in every place of an answer."""
        escaped = json.dumps(self.CANARY)[1:-1]
        return {
            "in a refusal": lambda c, r: answer(
                401, {"error": f"bad key {self.CANARY}", "key": self.CANARY}
            ),
            "in a refusal, slashes escaped": lambda c, r: answer(
                401, ('{"error": "bad key %s"}' % escaped.replace("/", "\\/")).encode()
            ),
            "in a rejection": lambda c, r: answer(400, {"message": r.headers["authorization"]}),
            "as plain text": lambda c, r: answer(502, r.raw),
            "in the reason": lambda c, r: cut(
                b"HTTP/1.1 403 " + r.headers["authorization"].encode() + b"\r\n\r\n"
            )(c, r),
            "in a header": lambda c, r: answer(429, Retry_After=r.headers["authorization"]),
            "in a redirect": lambda c, r: answer(
                302, Location="http://127.0.0.1/" + r.headers["authorization"]
            ),
            "instead of HTTP": lambda c, r: cut(r.headers["authorization"].encode() + b"\r\n\r\n")(
                c, r
            ),
            "as the version": lambda c, r: cut(
                b"HTTP/9" + r.headers["authorization"][7:].encode() + b" 200 OK\r\n\r\n"
            )(c, r),
            "as a status": lambda c, r: cut(
                b"HTTP/1.1 " + r.headers["authorization"][7:].encode() + b"\r\n\r\n"
            )(c, r),
            "in a truncated body": lambda c, r: cut(answer(200, r.raw, Content_Length=99999))(c, r),
            "in a bad chunk": lambda c, r: cut(
                chunked() + r.headers["authorization"].encode() + b"\r\n"
            )(c, r),
            "in a 2xx that is not JSON": lambda c, r: answer(200, r.raw),
        }

    def test_no_error_shows_the_key(self):
        paths = {**FAULTS, **self.echoes()}
        paths.update(
            {
                str(s): answer(s, {"error": "x"})
                for s in (301, 400, 401, 403, 404, 408, 418, 429, 500, 502, 503)
            }
        )
        paths["a long Retry-After"] = answer(429, Retry_After="99")
        logging.getLogger().setLevel(logging.DEBUG)
        self.addCleanup(logging.getLogger().setLevel, logging.WARNING)
        for name, default in paths.items():
            with self.subTest(name):
                server, drops = self.server(default=default), []
                client = self.real(
                    server, api_key=self.CANARY, retries=1, servicer_retries=1, log_level="DEBUG",
                    on_exhausted="drop", on_drop=lambda logs, error: drops.append(error),
                )  # fmt: skip
                client._sender.pause = lambda seconds: False  # no waiting
                for call in (
                    client.list_events,
                    lambda: client.create_event({"event": "a.b"}),
                    lambda: client.send_logs([Log("a.b.count", 1)]),
                ):
                    try:
                        call()
                    except ChirrOpError as exc:
                        self.assertNoKey(self.shown(exc), name)
                client.log(Log("a.b.count", 2))
                client.flush(0.1 if name == "a long Retry-After" else LONG)
                client.close(0)
                for error in [*drops, client.stats().last_error]:
                    if error is not None:
                        self.assertNoKey(self.shown(error), name)
                self.assertNoKey(
                    repr((client, client.config, client.stats(), vars(client.config))), name
                )
                server.close()
        self.assertTrue(self.records)
        for record in self.records:
            self.assertNoKey(record.getMessage() + repr(vars(record)), "a log record")

    def test_no_error_shows_the_key_when_there_is_no_connection(self):
        tls, _ = self.tls_server()
        hanging = self.server(default=hang)
        proxy = self.server(default=answer(407))
        for name, url, env in (  # the time-out is for the one that hangs
            ("refused", self.server(listening=False).url, {}),
            ("certificate", tls.url, {}),
            ("hang", hanging.url, {}),
            ("proxy", tls.url, {"https_proxy": proxy.url.replace("//", "//user:canary-password@")}),
            ("no such host", "http://chirrop.invalid", {}),
        ):
            with self.subTest(name), mock.patch.dict(os.environ, env):
                client = self.real(
                    url, api_key=self.CANARY, servicer_retries=0, retries=0, timeout=0.1
                )
                for call in (client.list_events, lambda: client.send_logs([Log("a.b.count", 1)])):
                    self.assertNoKey(self.shown_by(call, chirrop.ChirrOpTransportError), name)

    def test_no_error_of_a_transport_of_ones_own_shows_the_key(self):
        def transport(method, url, body, headers, timeout):
            self.assertNoKey(repr(headers), "headers")
            raise RuntimeError(
                f"cannot send {dict(headers)} with {str.__str__(headers['Authorization'])}"
            )

        client = self.client(transport=transport, api_key=self.CANARY, servicer_retries=0)
        shown = self.shown_by(client.list_events, chirrop.ChirrOpTransportError)
        self.assertNoKey(shown, "transport")
        self.assertIn("RuntimeError, whose text is withheld", shown)

    def test_no_configuration_error_shows_the_key(self):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder())  # there is no .env
        for name, make in {
            "without prefix": lambda: Config(api_key=self.CANARY[4:]),
            "with a space": lambda: Config(api_key=self.CANARY + " x"),
            "not a string": lambda: Config(api_key=[self.CANARY]),
            "bytes": lambda: Config(api_key=self.CANARY.encode()),
            "another field is wrong": lambda: Config(self.CANARY, retries=-1),
            "by new_client": lambda: new_client(api_key=self.CANARY, timeout="x"),
            "unknown field": lambda: new_client(api_key=self.CANARY, nonsense=1),
            "by initialize": lambda: chirrop.initialize(api_key=self.CANARY, timeout="x"),
            "as an endpoint's user": lambda: Config(
                KEY, api_endpoint=f"https://{self.CANARY[:10]}@127.0.0.1/"
            ),
            "without a key": lambda: Client(),
            "in place of a config": lambda: new_client(self.CANARY),
            "in place of a config, to Client": lambda: Client(self.CANARY),
            "in place of a config, to initialize": lambda: chirrop.initialize(self.CANARY),
        }.items():
            with self.subTest(name):
                if name in (
                    "not a string",
                    "bytes",
                    "as an endpoint's user",
                ):  # nobody can tell that this is a key
                    with self.assertRaises(ValueError) as caught:
                        make()
                    self.assertNoKey(str(caught.exception), name)
                else:
                    self.assertNoKey(self.shown_by(make, ValueError), name)


# ---- Client ---------------------------------------------------------------


class ClientTest(TestCase):
    def test_logs_arrive_with_key_and_content_type(self):
        transport = FakeTransport()
        client = self.client(transport=transport)
        sent = [Log("a.b", i, agent="x", meta={"i": i}) for i in range(3)]
        for log in sent:
            client.log(log)
        self.assertTrue(client.flush(LONG))
        self.assertEqual(transport.logs(), [log.to_dict() for log in sent])
        method, url, _, headers, timeout = transport.requests[0]
        self.assertEqual(
            (method, url, timeout), ("POST", "https://logs.chirrop.com/v1.0/logs", 10.0)
        )
        self.assertEqual(headers["Authorization"], f"Bearer {KEY}")
        self.assertEqual(headers["Content-Type"], "application/json")

    def test_only_a_log_can_be_logged(self):
        client = self.client()
        for bad in (None, {"event": "a", "value": 1}, "a", Hostile(), Log):
            with self.assertRaisesRegex(chirrop.ChirrOpValidationError, "entry must be a Log, got"):
                client.log(bad)
        chirrop.initialize(api_key=KEY, transport=FakeTransport())
        self.addCleanup(chirrop.stop)
        text = (
            "entry must be a Log, got 'a.b', 1: write log(chirrop.Log(event, value)),"
            " or try_log(event, value)"
        )
        with self.assertRaises(chirrop.ChirrOpValidationError) as caught:
            client.log("a.b", 1)
        self.assertEqual(str(caught.exception), text)
        with self.assertRaisesRegex(chirrop.ChirrOpValidationError, r"write log\(chirrop.Log\("):
            client.log(Log("a", 1), Log("b", 2))
        with self.assertRaisesRegex(chirrop.ChirrOpValidationError, r"write log\(chirrop.Log\("):
            client.send_logs(["a.b"])
        with self.assertRaisesRegex(chirrop.ChirrOpValidationError, r"write log\(chirrop.Log\("):
            chirrop.log_event("a.b", 1)

    def test_try_log_queues_what_log_would_queue(self):
        transport = FakeTransport()
        client = self.client(transport=transport)
        log_id = "0b0e2c4e-55a5-4c5e-9a51-0b1c7a3b5d11"
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.assertIs(client.try_log("a.b", 1, "c", log_id, {"d": 2}, at), True)
        self.assertTrue(client.flush(LONG))
        self.assertEqual(transport.logs(), [Log("a.b", 1, "c", log_id, {"d": 2}, at).to_dict()])

    def test_try_log_drops_and_reports_what_breaks_a_rule(self):
        dropped = []
        client = self.client(on_drop=lambda logs, error: dropped.append((logs, str(error))))
        wrong = [
            ({"event": "", "value": 1}, "event must not be empty"),
            ({"event": "a", "value": "x", "meta": {"k": [1]}}, "value must be a finite number"),
            ({"event": "a", "value": 1, "meta": "x" * 2000}, "meta must encode to at most 1024"),
            ({"event": "a", "value": 1, "occurred_at": "2001-01-01T00:00:00Z"}, "the last 30 days"),
        ]  # fmt: skip
        for fields, text in wrong:
            self.assertIs(client.try_log(**fields), False)
            self.reported(client)
            logs, error = dropped.pop()
            self.assertEqual(logs, [fields])
            self.assertIn(text, error)
        for hostile in (Hostile(), HostileDict(a=1), cycle(), nested(100_000), object(), {1, 2}):
            self.assertIs(client.try_log("a", 1, meta=hostile), False)
            self.reported(client)
            self.assertEqual(dropped.pop()[0][0]["event"], "a")
        self.assertIs(client.try_log("a", float("nan"), meta="\udcff"), False)
        self.reported(client)
        self.assertEqual(dropped.pop()[0][0]["meta"], "\udcff")
        self.assertEqual(client.stats().dropped, {"invalid": 11})
        self.assertEqual((client.stats().accepted, client.flush()), (11, True))
        client.close()
        said = [r.getMessage() for r in self.records if r.levelno == logging.ERROR]
        self.assertIn("dropped 1 logs (invalid): event must not be empty", said[0])
        self.assertIn("dropped 10 logs (invalid)", said[1])

    def test_try_log_drops_what_finds_no_room(self):
        dropped = []
        client = self.client(
            transport=FakeTransport(default=502), queue_size=1, timeout=0.01, retries=0,
            on_drop=lambda logs, error: dropped.append((logs, type(error))),
        )  # fmt: skip
        self.assertIs(client.try_log("a", 1), True)
        self.assertIs(client.try_log("a", 2), False)
        self.reported(client)
        self.assertEqual(dropped, [([{"event": "a", "value": 2}], chirrop.ChirrOpQueueFullError)])
        self.assertEqual(self.assertBalanced(client).dropped, {"full": 1})

    def test_try_log_in_a_logging_handler_does_not_call_itself_for_ever(self):
        client = self.client()
        calls = []

        class Handler(logging.Handler):
            def emit(self, record):
                calls.append(client.try_log("log.records.count", record.getMessage()))

        logger = logging.getLogger("chirrop")
        logger.addHandler(handler := Handler())
        self.addCleanup(logger.removeHandler, handler)
        logger.error("no number")
        self.reported(client)
        self.assertEqual(calls, [False, False])  # the second: its own report of the first
        self.assertEqual(client.stats().dropped, {"invalid": 2})

    def test_try_log_of_a_disabled_client_still_checks(self):
        client = self.client(AssertionError, disabled=True)
        self.assertEqual((client.try_log("a", 1), client.try_log("a", "x")), (True, False))
        self.assertEqual(client.stats().dropped, {"invalid": 1})

    def test_no_thread_before_the_first_log_and_none_after_close(self):
        client = self.client()
        before = threading.active_count()
        client.flush()
        client.stats()
        self.assertEqual(threading.active_count(), before)
        client.log(Log("a", 1))
        client.flush(LONG)
        self.assertEqual(
            [t.name for t in threading.enumerate() if t.name.startswith("chirrop")],
            ["chirrop-sender-1"],
        )
        self.assertTrue(client.close())
        self.assertEqual(threading.active_count(), before)

    def test_a_full_batch_is_sent_without_a_flush(self):
        transport = FakeTransport()
        client = self.client(transport=transport, flush_delay=86400, batch_size=3)
        for i in range(3):
            client.log(Log("a", i))
        self.assertEqual(len(json.loads(transport.seen.get(timeout=LONG))), 3)

    def test_flush_delay_sends_what_is_no_full_batch(self):
        transport = FakeTransport()
        client = self.client(transport=transport, flush_delay=0.01)
        client.log(Log("a", 1))
        self.assertEqual(len(json.loads(transport.seen.get(timeout=LONG))), 1)

    def test_a_request_never_carries_more_than_250_logs_whatever_batch_size_says(self):
        transport = FakeTransport()
        client = self.client(transport=transport, batch_size=10_000)
        for i in range(1001):
            client.log(Log("a", i))
        self.assertTrue(client.flush(LONG))
        sizes = [len(json.loads(r[2])) for r in transport.requests]
        self.assertEqual((sum(sizes), max(sizes)), (1001, 250))

    def test_close_is_idempotent_and_later_logs_are_dropped_and_reported_once(self):
        dropped = []
        client = self.client(on_drop=lambda logs, error: dropped.append((logs, str(error))))
        client.log(Log("a", 1))
        self.assertTrue(client.close())
        self.assertTrue(client.shutdown())
        for i in range(5):
            client.log(Log("late", i))
            self.reported(client)
        self.assertEqual([logs[0]["value"] for logs, _ in dropped], list(range(5)))
        self.assertEqual(client.stats().dropped, {"closed": 5})
        self.assertEqual([r.levelname for r in self.records], ["WARNING", "ERROR"])

    def test_close_drops_and_reports_what_it_cannot_send(self):
        dropped = []
        client = self.client(
            transport=FakeTransport(default=502),
            retries=1,
            on_drop=lambda logs, error: dropped.extend(logs),
        )
        sent = [Log("a", i) for i in range(3)]
        for log in sent:
            client.log(log)
        self.assertFalse(client.close(LONG))
        self.assertEqual(ids(dropped), [log.log_id for log in sent])
        self.assertEqual(client.stats().dropped, {"closed": 3})
        self.assertIn("dropped 3 logs (closed)", self.records[-1].getMessage())

    def test_the_context_manager_closes(self):
        transport = FakeTransport()
        with self.client(transport=transport) as client:
            client.log(Log("a", 1))
        self.assertEqual(len(transport.logs()), 1)
        self.assertTrue(client._outbox.state.stopped)

    def test_one_config_serves_many_clients(self):
        transport = FakeTransport()
        config = Config(api_key=KEY, transport=transport)
        before = dict(vars(config))
        with Client(config) as one, new_client(config) as two:
            one.log(Log("a", 1))
            two.log(Log("a", 2))
        self.assertEqual((len(transport.logs()), vars(config)), (2, before))

    def test_each_refused_status_drops_the_batch_with_its_error(self):
        for status in (401, 403, 404, 302, 418):
            with self.subTest(status):
                dropped = []
                client = self.client(
                    status,
                    on_drop=lambda logs, error, d=dropped: d.append((len(logs), error.status_code)),
                )
                client.log(Log("a", 1))
                client.log(Log("a", 2))
                self.assertFalse(client.flush(LONG))
                client.close()
                self.assertEqual((dropped, client.stats().dropped), ([(2, status)], {"refused": 2}))

    def test_exhausted_logs_are_kept_and_delivered_when_the_server_is_back(self):
        transport = FakeTransport(*[OSError("down")] * 3)
        client = self.client(transport=transport, retries=2)
        client.log(Log("a", 1))
        self.assertFalse(client.flush(LONG))
        self.assertEqual(client.stats().queued, 1)
        self.assertTrue(client.flush(LONG))
        self.assertEqual(len({r[2] for r in transport.requests}), 1, "the same bytes every time")

    def test_exhausted_logs_are_dropped_when_asked_for(self):
        client = self.client(*[502] * 3, retries=2, on_exhausted="drop")
        client.log(Log("a", 1))
        self.assertFalse(client.flush(LONG))
        client.close()
        self.assertEqual(client.stats().dropped, {"exhausted": 1})

    def test_the_logger_hears_of_each_change_once(self):
        client = self.client(*[502] * 5, 200, *[502] * 3)
        for _ in range(2):
            client.log(Log("a", 1))
            self.assertTrue(client.flush(LONG))
            self.reported(client)
        client.close()
        said = [(r.levelname, r.getMessage()) for r in self.records]
        held = "logs are held, retrying; 1 wait: HTTP 502: bad gateway"
        self.assertEqual(said, [("WARNING", held), ("INFO", "logs are accepted again")])

    def test_a_full_bounded_queue_waits_for_room_then_raises(self):
        gate, entered = threading.Event(), threading.Event()

        def slow(body):
            entered.set()
            gate.wait(LONG)
            return 200, b"", {}

        client = self.client(
            transport=FakeTransport(default=slow), queue_size=2, batch_size=1, timeout=0.05
        )
        self.addCleanup(gate.set)
        client.log(Log("a", 1))
        self.assertTrue(entered.wait(LONG))
        client.log(Log("a", 2))
        with self.assertRaisesRegex(chirrop.ChirrOpQueueFullError, "queue is full: 2 logs"):
            client.log(Log("a", 3))
        waiting = threading.Thread(target=lambda: Client.log(client, Log("a", 4)))
        client._sender._config = Config(api_key=KEY, timeout=LONG)
        waiting.start()
        gate.set()
        waiting.join(LONG)
        self.assertTrue(client.flush(LONG))
        self.assertEqual(client.stats().delivered, 3)

    def test_a_broken_transport_is_a_network_failure(self):
        self.patch(time, "sleep", lambda seconds: None)  # of a sender, after what looks like a bug
        for answer in (
            None,
            5,
            ("200", b"", {}),
            (200, "text", {}),
            (200, b""),
            SystemExit,
            KeyboardInterrupt,
            MemoryError,
        ):
            with self.subTest(answer):
                calls = []

                def broken(*args, answer=answer, calls=calls):
                    calls.append(args)
                    if len(calls) > 1:
                        return 200, b"", {}
                    if isinstance(answer, type):
                        raise answer
                    return answer

                client = self.client(transport=broken)
                client.log(Log("a", 1))
                self.assertTrue(client.flush(LONG))
                stats = client.stats()
                # What is no Exception ends its sender; the next one sends the batch for the first time.
                ended = isinstance(answer, type)
                self.assertEqual((stats.delivered, stats.retries), (1, 0 if ended else 1))
                client.close()

    def test_send_logs_delivers_in_this_thread(self):
        transport = FakeTransport(502, OSError("reset"), 200)
        client = self.client(transport=transport)
        client.send_logs(Log("a", i) for i in range(600))
        self.assertEqual(
            [len(json.loads(r[2])) for r in transport.requests], [250, 250, 250, 250, 100]
        )
        self.assertEqual(client.stats().delivered, 600)
        self.assertEqual(list(client._sender._threads), [])

    def test_send_logs_raises_instead_of_queueing(self):
        client = self.client(401, *[502] * 11)
        with self.assertRaises(chirrop.ChirrOpUnauthorizedError):
            client.send_logs([Log("a", 1)])
        with self.assertRaises(chirrop.ChirrOpServerError):
            client.send_logs([Log("a", 1)])
        with self.assertRaises(chirrop.ChirrOpValidationError):
            client.send_logs([Log("a", 1), "b"])
        self.assertEqual((client.stats().accepted, len(client._link._transport.requests)), (0, 12))

    def test_close_cuts_short_the_wait_of_send_logs(self):
        transport = FakeTransport(default=(429, b"", {"Retry-After": "200"}))
        client, raised = self.client(transport=transport), queue.Queue()

        def send():
            try:
                client.send_logs([Log("a", 1)])
            except ChirrOpError as exc:
                raised.put(exc)

        thread = threading.Thread(target=send)
        thread.start()
        transport.seen.get(timeout=LONG)
        client.close()
        self.assertIsInstance(raised.get(timeout=LONG), chirrop.ChirrOpRateLimitError)
        thread.join(LONG)

    def test_a_view_has_its_own_limits_and_shares_the_rest(self):
        transport = FakeTransport(502, 502)
        client = self.client(transport=transport)
        view = client.with_options(timeout=3, servicer_retries=0)
        with self.assertRaises(chirrop.ChirrOpServerError):
            view.list_events()
        self.assertEqual(client.list_events(), {})
        self.assertEqual([r[4] for r in transport.requests], [3.0, 10.0, 10.0])
        view.log(Log("a", 1))
        self.assertTrue(client.flush(LONG))
        del client
        gc.collect()
        self.assertIsNotNone(view._sender.owner())
        for bad in ({"timeout": 0}, {"servicer_retries": -1}):
            with self.assertRaises(chirrop.ChirrOpValidationError):
                view.with_options(**bad)

    def test_flush_and_close_refuse_a_timeout_that_is_none(self):
        client = self.client()
        for bad in (-1, "1", float("nan"), True):
            with self.assertRaisesRegex(chirrop.ChirrOpValidationError, "timeout"):
                client.flush(bad)
            with self.assertRaisesRegex(chirrop.ChirrOpValidationError, "timeout"):
                client.close(bad)

    def test_stats_balance_at_every_moment_of_a_busy_client(self):
        client = self.client(
            transport=FakeTransport(
                default=lambda body: (random.choice((200, 200, 400, 502, 401)), b"", {})
            ),
            retries=50,
        )
        done = threading.Event()

        def work():
            for i in range(1500):
                client.log(Log("a", i))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(t.is_alive() for t in threads):
            self.assertBalanced(client)
        client.flush(LONG)
        client.close(LONG)
        done.set()
        self.assertEqual(self.assertBalanced(client).accepted, 6000)

    def test_a_client_refuses_pickle_and_copy_and_says_what_to_send(self):
        client = self.client()
        for make in (
            pickle.dumps,
            lambda c: pickle.dumps(c.log, 0),
            copy.copy,
            copy.deepcopy,
            lambda c: copy.deepcopy(c.with_options(timeout=3)),
        ):
            with self.assertRaisesRegex(TypeError, "make it in the worker, and send its Config"):
                make(client)


# ---- Control plane --------------------------------------------------------

CALLS = [
    ("list_events", (), "GET", "/events", None),
    ("create_event", ({"event": "a"},), "POST", "/events", {"event": "a"}),
    ("get_event", ("evt_1",), "GET", "/events/evt_1", None),
    ("update_event", ("evt_1", {"title": "t", "event_id": "other"}), "PUT", "/events/evt_1", {"title": "t", "event_id": "other"}),
    ("get_event_logs", ("evt_1", "hour", 5, 10), "GET", "/events/evt_1/logs?period=hour&limit=5&offset=10", None),
    ("get_event_analytics", ("evt_1", "window", "1h", "previous_1d"), "GET", "/events/evt_1/analytics?view=window&period=1h&previous=previous_1d", None),
    ("list_policies", (), "GET", "/policies", None),
    ("create_policy", ({"aggregate": "p95_est", "x": 1},), "POST", "/policies", {"aggregate": "p95_est", "x": 1}),
    ("get_policy", ("p",), "GET", "/policies/p", None),
    ("update_policy", ("p", {"severity": "critical"}), "PUT", "/policies/p", {"severity": "critical"}),
    ("list_alerts", ("triggered",), "GET", "/alerts?status=triggered", None),
    ("get_alert", ("a",), "GET", "/alerts/a", None),
    ("get_alert_deliveries", ("a", 1, 0), "GET", "/alerts/a/deliveries?limit=1&offset=0", None),
    ("acknowledge_alert", ("a",), "POST", "/alerts/a/acknowledge", None),
    ("resolve_alert", ("a",), "POST", "/alerts/a/resolve", None),
    ("archive_alert", ("a",), "POST", "/alerts/a/archive", None),
    ("list_destinations", (), "GET", "/destinations", None),
    ("create_destination", ({"channel": "email"},), "POST", "/destinations", {"channel": "email"}),
    ("get_destination", ("d",), "GET", "/destinations/d", None),
    ("update_destination", ("d", {"enabled": False}), "PUT", "/destinations/d", {"enabled": False}),
    ("test_destination", ("d",), "POST", "/destinations/d/test", None),
]  # fmt: skip
CREATING = {"create_event", "create_policy", "create_destination", "test_destination"}


class ControlPlaneTest(TestCase):
    def test_every_call_has_its_method_path_and_body(self):
        for name, args, method, path, body in CALLS:
            with self.subTest(name):
                client = self.client((200, b'{"x": 1}', {}))
                self.assertEqual(getattr(client, name)(*args), {"x": 1})
                request = client._link._transport.requests[0]
                self.assertEqual(request[:2], (method, "https://api.chirrop.com/v1.0" + path))
                self.assertEqual(request[2] and json.loads(request[2]), body)
                self.assertEqual("Content-Type" in request[3], body is not None)

    def test_the_table_is_complete_and_each_docstring_names_its_route(self):
        verbs = (
            "list_",
            "get_",
            "create_",
            "update_",
            "test_",
            "acknowledge_",
            "resolve_",
            "archive_",
        )
        self.assertEqual({n for n in dir(Client) if n.startswith(verbs)}, {c[0] for c in CALLS})
        self.assertEqual(len(CALLS), 21)
        for name, _, method, path, _ in CALLS:
            route = re.sub(r"/(evt_1|[pad])(?=/|$)", "/{}", path.split("?")[0])
            text = re.sub(r"\{\w+\}", "{}", getattr(Client, name).__doc__)
            self.assertIn(f"{method} /v1.0{route}", text, name)

    def test_signatures_are_those_that_people_use(self):
        for call, path in (
            (lambda c: c.get_event_analytics("e", period="1d", previous="previous_7d"),
             "/events/e/analytics?view=window&period=1d&previous=previous_7d"),
            (lambda c: c.get_event_analytics("e", view="window", previous="previous_1d"),
             "/events/e/analytics?view=window&period=1h&previous=previous_1d"),
            (lambda c: c.get_event_analytics("e"),
             "/events/e/analytics?view=window&period=1h&previous=previous_window"),
            (lambda c: c.get_alert_deliveries("a", 20, 40, kind="test"),
             "/alerts/a/deliveries?kind=test&limit=20&offset=40"),
            (lambda c: c.get_alert_deliveries("a", limit=20, kind="all"),
             "/alerts/a/deliveries?kind=all&limit=20"),
        ):  # fmt: skip
            client = self.client((200, b"[]", {}))
            call(client)
            url = client._link._transport.requests[0][1]
            self.assertEqual(url, "https://api.chirrop.com/v1.0" + path)
        with self.assertRaisesRegex(chirrop.ChirrOpValidationError, "kind must be one of"):
            self.client(AssertionError).get_alert_deliveries("a", kind="real")

    def test_an_empty_answer_is_an_empty_dict(self):
        client = self.client((200, b"", {}), (204, b" \n", {}))
        self.assertEqual((client.test_destination("d"), client.list_events()), ({}, {}))

    def test_an_answer_that_is_not_json_is_an_error(self):
        client = self.client((200, b"<html>", {}))
        with self.assertRaisesRegex(chirrop.ChirrOpTransportError, "not JSON"):
            client.list_events()

    def test_reads_and_transitions_are_repeated_and_creating_calls_are_not(self):
        for failure in (OSError("reset"), 502, 504, 408, 599):
            for name, args, *_ in CALLS:
                with self.subTest(f"{name} {failure}"):
                    client = self.client(failure, failure, 200)
                    if name in CREATING:
                        with self.assertRaises(ChirrOpError):
                            getattr(client, name)(*args)
                    else:
                        getattr(client, name)(*args)
                    self.assertEqual(
                        len(client._link._transport.requests), 1 if name in CREATING else 3
                    )

    def test_every_call_is_repeated_on_429_and_when_no_connection_was_made(self):
        for failure in (
            (429, b"", {"Retry-After": "0"}),
            ConnectionRefusedError(),
            chirrop._NeverSent("dns"),
        ):
            for name, args, *_ in CALLS:
                client = self.client(failure, failure, 200)
                getattr(client, name)(*args)
                self.assertEqual(len(client._link._transport.requests), 3)

    def test_creating_calls_go_on_a_connection_of_their_own(self):
        for name, args, *_ in CALLS:
            client = self.client(200)
            getattr(client, name)(*args)
            self.assertEqual(
                client._link._transport.requests[0][3].get("Connection"),
                "close" if name in CREATING else None,
            )

    def test_a_final_status_is_raised_at_once(self):
        for status in (400, 401, 403, 404, 413, 422, 500, 503, 301):
            client = self.client(status)
            with self.assertRaises(chirrop.ChirrOpNonRetryableError) as caught:
                client.list_events()
            self.assertEqual(
                (caught.exception.status_code, len(client._link._transport.requests)), (status, 1)
            )

    def test_a_long_retry_after_raises_at_once_and_a_short_one_is_waited_for(self):
        client = self.client((429, b"", {"Retry-After": "31"}))
        with self.assertRaises(chirrop.ChirrOpRateLimitError) as caught:
            client.list_events()
        self.assertEqual(caught.exception.retry_after, 31.0)
        client, waits = self.client((429, b"", {"Retry-After": "30"})), []
        client._sender.pause = waits.append
        client.list_events()
        self.assertEqual(waits, [30.0])

    def test_retries_end(self):
        client = self.client(*[502] * 9, servicer_retries=3)
        with self.assertRaises(chirrop.ChirrOpServerError):
            client.get_event("e")
        self.assertEqual(len(client._link._transport.requests), 4)

    def test_vocabularies_are_checked_before_any_request(self):
        wrong = [
            ("get_event_logs", ("e", "week")), ("get_event_logs", ("e", "hour", 0)), ("get_event_logs", ("e", "hour", 1, -1)),
            ("get_event_logs", ("e", "hour", True)), ("get_event_analytics", ("e", "chart", "1h", "previous_1d")),
            ("get_event_analytics", ("e", "window", "2h", "previous_1d")), ("get_event_analytics", ("e", "window", "1h", "previous_2d")),
            ("list_alerts", ("open",)), ("get_alert_deliveries", ("a", "all")),
            ("get_alert_deliveries", ("a", 1, "5")),
            ("create_policy", ({"period": "week"},)), ("create_policy", ({"aggregate": "median"},)), ("create_policy", ({"condition": ">"},)),
            ("update_policy", ("p", {"severity": "bad"})), ("create_destination", ({"channel": "fax"},)), ("update_destination", ("d", {"channel": None})),
            ("create_policy", ([],)), ("create_event", (None,)), ("create_event", ({"x": float("nan")},)), ("create_event", ({"x": object()},)),
        ]  # fmt: skip
        for name, args in wrong:
            with self.subTest(f"{name}{args}"):
                client = self.client(AssertionError)
                with self.assertRaises(chirrop.ChirrOpValidationError) as caught:
                    getattr(client, name)(*args)
                self.assertIn("got", str(caught.exception))
                self.assertEqual(client._link._transport.requests, [])

    def test_exactly_the_ten_supported_analytics_pairs_pass(self):
        client, passed = self.client(), 0
        for period in ("1h", "1d", "7d", "1m"):
            for previous in ("previous_window", "previous_1d", "previous_7d", "previous_1m"):
                try:
                    client.get_event_analytics("e", "window", period, previous)
                    passed += 1
                except chirrop.ChirrOpValidationError:
                    pass
        self.assertEqual(passed, 10)

    def test_an_id_is_one_path_segment(self):
        for given, segment in (
            (" evt_1 ", "evt_1"),
            ("a/b", "a%2Fb"),
            ("../x", "..%2Fx"),
            ("a?b#c", "a%3Fb%23c"),
            ("ü%", "%C3%BC%25"),
            ("a\r\nb", "a%0D%0Ab"),
            ("...", "..."),
        ):
            client = self.client()
            client.get_event(given)
            self.assertEqual(
                client._link._transport.requests[0][1],
                f"https://api.chirrop.com/v1.0/events/{segment}",
            )
        for bad in ("", "  ", ".", "..", None, 5, b"x", "\ud800"):
            with self.assertRaisesRegex(chirrop.ChirrOpValidationError, "id must be"):
                self.client(AssertionError).get_alert(bad)

    def test_request_reaches_the_rest_and_only_below_the_base(self):
        client = self.client((200, b"[1]", {}))
        self.assertEqual(
            client.request(
                "patch", "/x/y%2Fz/", {"a": 1, "b": None, "c": True, "d": "é &"}, body=[]
            ),
            [1],
        )
        self.assertEqual(
            client._link._transport.requests[0][:3],
            ("PATCH", "https://api.chirrop.com/v1.0/x/y%2Fz?a=1&c=true&d=%C3%A9+%26", b"[]"),
        )
        for method, path in (
            ("GET", "/../x"),
            ("GET", "/a//b"),
            ("GET", ""),
            ("GET", "/a?b=c"),
            ("GET", "/a b"),
            ("GET", "/ü"),
            ("GET", "/a\\b"),
            ("GET", None),
            ("GE T", "/a"),
            (None, "/a"),
            ("", "/a"),
        ):
            with self.assertRaises(chirrop.ChirrOpValidationError):
                client.request(method, path)

    def test_iterators_page_until_nothing_is_left(self):
        rows = [{"n": i} for i in range(7)]

        def page(body):
            query = dict(urllib.parse.parse_qsl(transport.requests[-1][1].split("?")[1]))
            start = int(query["offset"])
            return 200, json.dumps(rows[start : start + min(int(query["limit"]), 3)]).encode(), {}

        transport = FakeTransport(default=page)
        client = self.client(transport=transport)
        self.assertEqual(list(client.iter_event_logs("e", "hour", page_size=5)), rows)
        self.assertEqual(list(client.iter_alert_deliveries("a", "all", page_size=2)), rows)
        stubborn = self.client(transport=FakeTransport(default=(200, b'[{"n": 1}]', {})))
        self.assertEqual(
            list(stubborn.iter_event_logs("e", "day")),
            [{"n": 1}],
            "a server that ignores the offset",
        )

    def test_find_event_goes_by_name_and_agent(self):
        listed = [
            {"event": "a", "agent": "x", "event_id": "1"},
            {"event": "a", "agent": "y", "event_id": "2"},
            {"event": "b", "agent": "x", "event_id": "3"},
            {"event": "c", "event_id": "4"},
            {"event": "c", "agent": "x", "event_id": "5"},
        ]
        client = self.client(
            transport=FakeTransport(default=(200, json.dumps(listed).encode(), {}))
        )
        for args, found in (
            (("a", "x"), "1"),
            ((" a ", " y "), "2"),
            (("b",), "3"),
            (("c",), "4"),
            (("c", ""), "4"),
            (("c", "x"), "5"),
            (("a", "z"), None),
            (("d",), None),
        ):
            self.assertEqual((client.find_event(*args) or {}).get("event_id"), found, args)
        with self.assertRaisesRegex(
            chirrop.ChirrOpValidationError, "several have an event 'a': x, y"
        ):
            client.find_event("a")


# ---- Timer, Lambda, global API --------------------------------------------


class TimerTest(TestCase):
    def test_it_logs_milliseconds_and_the_result_and_lets_errors_pass(self):
        transport = FakeTransport()
        client = self.client(transport=transport)
        timer = client.timer("t.ms", agent="w", meta={"k": 1})
        with timer, timer:
            pass
        with self.assertRaises(KeyError), client.timer("t.ms"):
            raise KeyError("x")
        client.flush(LONG)
        logs = transport.logs()
        self.assertEqual(
            [log.get("meta") for log in logs],
            [{"k": 1, "result": "success"}] * 2 + [{"result": "error"}],
        )
        self.assertTrue(all(0 <= log["value"] < 10_000 for log in logs))

    def test_it_decorates_functions_sync_and_async(self):
        transport = FakeTransport()
        client = self.client(transport=transport)

        @client.timer("f")
        def fact(n):
            """doc"""
            return n * fact(n - 1) if n else 1

        @client.timer("g")
        async def wait(value):
            if value is None:
                raise ValueError
            return value

        self.assertEqual((fact(3), fact.__doc__, asyncio.run(wait(5))), (6, "doc", 5))
        with self.assertRaises(ValueError):
            asyncio.run(wait(None))
        client.flush(LONG)
        logs = transport.logs()
        self.assertEqual([log["event"] for log in logs], ["f"] * 4 + ["g"] * 2)
        self.assertEqual([log["meta"]["result"] for log in logs], ["success"] * 5 + ["error"])

    def test_mistakes_show_when_the_timer_is_made(self):
        client = self.client()
        for fields in (
            {"event": ""},
            {"event": "a", "agent": 1},
            {"event": "a", "meta": [1]},
            {"event": "a", "meta": {str(i): 0 for i in range(10)}},
            {"event": "a", "meta": {"x": object()}},
        ):
            with self.assertRaises(chirrop.ChirrOpValidationError):
                client.timer(**fields)

    def test_a_full_queue_does_not_break_the_measured_code(self):
        client = self.client(
            transport=FakeTransport(default=502), queue_size=1, timeout=0.01, retries=0
        )
        client.log(Log("a", 1))
        with client.timer("t"):
            pass
        client.flush(LONG)
        self.assertEqual(client.stats().dropped, {"full": 1})
        self.assertIn("dropped 1 logs (full)", " ".join(r.getMessage() for r in self.records))

    def test_start_and_stop_measure_what_lies_between_two_hooks(self):
        transport = FakeTransport()
        client = self.client(transport=transport)
        timer = client.timer("request.ms", agent="web").start()
        timer.stop()
        timer.stop()  # a second hook for the end: nothing is running
        client.timer("never.started").stop("error")
        client.timer("request.ms").start().stop("error")
        self.assertTrue(client.flush(LONG))
        logs = transport.logs()
        self.assertEqual(
            [(log["event"], log.get("agent"), log["meta"]) for log in logs],
            [
                ("request.ms", "web", {"result": "success"}),
                ("request.ms", None, {"result": "error"}),
            ],
        )
        self.assertTrue(all(0 <= log["value"] < 10_000 for log in logs))

    def test_a_result_that_makes_no_log_is_dropped_and_reported(self):
        client = self.client()
        client.timer("request.ms").start().stop("x" * 2000)
        self.assertEqual(client.stats().dropped, {"invalid": 1})


class LambdaTest(TestCase):
    class Context:
        def __init__(self, milliseconds):
            self.get_remaining_time_in_millis = lambda: milliseconds

    def test_it_flushes_before_the_invocation_ends_and_passes_results_and_errors(self):
        transport = FakeTransport()
        client = self.client(transport=transport, flush_delay=86400)

        @client.lambda_handler
        def handler(event, context):
            if event is not None:
                client.log(Log("a", event))
            return 1 / event if event is not None else "nothing"

        self.assertEqual(handler(2, self.Context(30_000)), 0.5)
        self.assertEqual(len(transport.logs()), 1)
        with self.assertRaises(ZeroDivisionError):
            handler(0, self.Context(30_000))
        self.assertEqual(len(transport.logs()), 2)
        # Nothing is queued: the context is not even asked.
        self.assertEqual(handler(None, None), "nothing")
        self.assertEqual(handler.__name__, "handler")

    def test_it_never_masks_the_handlers_own_error(self):
        client = self.client(transport=FakeTransport(default=502), retries=0)

        @client.lambda_handler
        def handler(event, context):
            client.log(Log("a", 1))
            raise KeyError(event)

        for context in (
            None,
            object(),
            self.Context(0),
            self.Context(-5),
            self.Context("x"),
            self.Context(float("nan")),
        ):
            with self.assertRaises(KeyError):
                handler("mine", context)
        stats = self.assertBalanced(client)
        self.assertEqual(stats.queued + stats.in_flight, 6)

    def test_without_a_context_that_tells_the_time_it_flushes_all_the_same(self):
        transport = FakeTransport()
        client = self.client(transport=transport, flush_delay=86400)
        handler = client.lambda_handler(lambda event, context=None: client.log(Log("a", event)))
        for number, arguments in enumerate(
            [(1,), (2, None), (3, object()), (4, self.Context("x"))]
        ):
            handler(*arguments)
            self.assertEqual(len(transport.logs()), number + 1)

    def bounds(self, client, *invocations):
        """Return how long each invocation let its flush wait: that is the most it may cost."""
        asked = []
        client._outbox._rand = lambda: 1.0  # nothing is sent between invocations

        def flush(timeout):
            asked.append(timeout)
            if timeout:  # in no time, it would leave a request under way
                Client.flush(client, timeout)

        client.flush = flush
        for work, context in invocations:
            client.lambda_handler(lambda *_, work=work: work())(None, context)
        return asked

    def test_a_server_out_of_reach_costs_exit_timeout_then_a_tenth_until_something_gets_through(
        self,
    ):
        down = threading.Event()
        down.set()
        transport = FakeTransport(default=lambda _: OSError("down") if down.is_set() else 200)
        client = self.client(transport=transport, flush_delay=86400, retries=0, exit_timeout=4.0)

        def work():
            client.log(Log("a", 1))

        def recovered():
            down.clear()
            work()

        self.assertEqual(
            self.bounds(
                client,
                (work, None),  # nothing is known yet
                (work, None),  # what the last invocation left is still there
                (work, self.Context(300)),
                (work, self.Context(100)),
                (recovered, None),  # cannot know better before it has tried
                (work, None),
            ),
            [4.0, 0.4, 0.3 - 0.2, 0.0, 0.4, 4.0],
        )
        self.assertEqual(client.stats().delivered, 6)

    def test_a_server_that_hangs_costs_exit_timeout_then_a_tenth(self):
        answer = threading.Event()
        client = self.client(
            transport=lambda *_: (200, b"", {}) if answer.wait(LONG) else None, exit_timeout=0.2
        )
        self.addCleanup(answer.set)
        work = functools.partial(client.log, Log("a", 1))
        self.assertEqual(self.bounds(client, (work, None), (work, None)), [0.2, 0.02])

    def test_logs_made_before_the_first_invocation_do_not_shorten_its_flush(self):
        client = self.client(flush_delay=86400, exit_timeout=4.0)
        client.log(Log("cold.start", 1))
        self.assertEqual(self.bounds(client, (lambda: None, None)), [4.0])
        self.assertEqual(client.stats().delivered, 1)


class GlobalTest(TestCase):
    def setUp(self):
        super().setUp()
        self.addCleanup(chirrop.stop)

    def test_one_global_client_by_either_name(self):
        transport = FakeTransport()
        chirrop.initialize(api_key=KEY, transport=transport)
        chirrop.log_event(Log("a", 1))
        chirrop.ChirrOp.log_event(Log("a", 2))
        self.assertTrue(chirrop.flush(LONG) and chirrop.ChirrOp.flush(LONG))
        with self.assertRaisesRegex(
            ChirrOpError, r"^ChirrOp SDK is already initialized: call stop\(\) first$"
        ):
            chirrop.ChirrOp.initialize(api_key=KEY)
        self.assertTrue(chirrop.stop())
        self.assertEqual([log["value"] for log in transport.logs()], [1, 2])

    def test_before_and_after(self):
        for call in (lambda: chirrop.log_event(Log("a", 1)), chirrop.flush, chirrop.ChirrOp.flush):
            with self.assertRaisesRegex(
                ChirrOpError, r"^ChirrOp SDK is not initialized. Please call initialize\(\) first$"
            ):
                call()
        self.assertTrue(chirrop.stop())
        chirrop.ChirrOp.initialize(Config(api_key=KEY, transport=FakeTransport()))
        self.assertTrue(chirrop.ChirrOp.stop())
        chirrop.initialize(api_key=KEY, transport=FakeTransport())
        chirrop.stop(1)


# ---- The file itself ------------------------------------------------------


class ModuleTest(TestCase):
    """What a security reviewer and a person who vendors the file rely on."""

    SOURCE = pathlib.Path(chirrop.__file__).read_text(encoding="utf-8")

    @classmethod
    def setUpClass(cls):
        cls.TREE = ast.parse(cls.SOURCE)

    def test_the_public_names_are_exactly_those_listed(self):
        public = {
            n
            for n, v in vars(chirrop).items()
            if not n.startswith("_") and not isinstance(v, type(os))
        }
        borrowed = {
            "annotations",
            "deque",
            "namedtuple",
            "datetime",
            "timedelta",
            "timezone",
            "TYPE_CHECKING",
            "main",
        }
        constants = {n for n in public if n.isupper()}
        self.assertEqual(public - borrowed - constants, set(chirrop.__all__) - {"__version__"})

    def test_only_the_standard_library_is_imported(self):
        if not hasattr(sys, "stdlib_module_names"):
            self.skipTest("Python 3.10 and later know the names of their library")
        for node in ast.walk(self.TREE):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            for name in names:
                self.assertIn(name.split(".")[0], sys.stdlib_module_names | {"__future__"})

    def test_importing_loads_nothing_that_the_first_log_does_not_need(self):
        late = "urllib ssl sqlite3 argparse http email logging typing random uuid socket select inspect dataclasses zoneinfo shutil"
        code = f"import sys, chirrop; chirrop.Log('a', 1); print([m for m in '{late}'.split() if m in sys.modules])"
        result = subprocess.run(
            [
                sys.executable,
                "-I",
                "-S",
                "-c",
                f"import sys; sys.path.insert(0, {str(HERE)!r}); {code}",
            ],
            capture_output=True,
            text=True,
        )
        self.assertEqual(result.stdout, "[]\n", result.stderr)

    def test_every_public_function_and_class_has_a_docstring(self):
        for node in [
            *self.TREE.body,
            *(
                n
                for c in self.TREE.body
                if isinstance(c, ast.ClassDef) and not c.name.startswith("_")
                for n in c.body
            ),
        ]:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                self.assertTrue(ast.get_docstring(node), node.name)

    def test_what_the_file_touches_is_where_its_header_says(self):
        places = {
            "urllib.request.OpenerDirector": {"_UrllibTransport"}, "http.client.HTTPSConnection": {"_UrllibTransport"}, "http.client.HTTPConnection": {"_UrllibTransport"},
            "threading.Thread": {"_Crew"}, "sqlite3.connect": {"SqliteSpool"},
            "os.environ": {"_find_key", "_checked_endpoint", "Config", "_proxy_advice"},
            "atexit.register": {""}, "os.register_at_fork": {""}, "open": {"_read_dotenv"},
            "os.open": {"_lock_file", "_check_header", "SqliteSpool"}, "io.FileIO": {"_lock_file"},
            "logging.getLogger": {"_Reporter"}, "os.unlink": {"_unlock_file", "_SpoolFile"},
            "os.replace": {"SqliteSpool"},
        }  # fmt: skip
        found = {}
        for top in self.TREE.body:
            name = getattr(top, "name", "")
            if top.lineno > self.SOURCE.partition("\n# ---- Sandbox -")[0].count("\n"):
                break
            for node in ast.walk(top):
                text = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Name)) else ""
                text = text.replace("self._sqlite3", "sqlite3")
                if text in places and not (text == "open" and isinstance(node.ctx, ast.Store)):
                    found.setdefault(text, set()).add(name)
        self.assertEqual(found, places)
        for danger in (
            "eval",
            "exec",
            "subprocess",
            "os.system",
            "pickle",
            "ctypes",
            "__import__",
            "marshal",
        ):
            self.assertNotRegex(self.SOURCE, rf"\b{re.escape(danger)}\b\s*[(.]", danger)

    def test_private_names_of_the_library_are_listed_in_the_header(self):
        own = set(re.findall(r"(?:def|class|self\.|cls\.|view\.) *(_\w+)", self.SOURCE))
        used = {n.attr for n in ast.walk(self.TREE) if isinstance(n, ast.Attribute)}
        private = {name for name in used - own if re.match("_[a-z]", name)}
        private.discard("_replace")  # of a namedtuple, and public all the same
        self.assertLessEqual({"_is_owned", "_getframe", "_tunnel_host"}, private)
        header = ast.get_docstring(self.TREE)
        self.assertEqual({name for name in private if name not in header}, set())

    def test_sections_do_not_reach_down(self):
        bounds = [
            (m.start(), m.group(1))
            for m in re.finditer(r"^# ---- (.+?) -+$", self.SOURCE, re.MULTILINE)
        ]
        self.assertEqual(
            [name for _, name in bounds],
            ["Constants and vocabularies", "Errors", "Log", "Config", "Buffers", "Retry policy", "Outbox", "Reporter and sender",
             "Transport", "Client", "Global API", "Sandbox", "Command line", "Licence"],
        )  # fmt: skip
        lines = [self.SOURCE[:start].count("\n") + 1 for start, _ in bounds]
        section = lambda line: sum(line >= first for first in lines)
        defined = {}
        for node in self.TREE.body:
            targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
            for name in [getattr(node, "name", None), *(getattr(t, "id", None) for t in targets)]:
                if name:
                    defined.setdefault(name, section(node.lineno))
        local = set()
        for function in (
            n for n in ast.walk(self.TREE) if isinstance(n, (ast.FunctionDef, ast.Lambda))
        ):
            names = [n for n in ast.walk(function) if isinstance(n, ast.Name)]
            bound = {a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)}
            bound |= {n.id for n in names if isinstance(n.ctx, ast.Store)}
            local |= {id(n) for n in names if n.id in bound}
        for node in ast.walk(self.TREE):
            if (
                isinstance(node, ast.Name)
                and isinstance(node.ctx, ast.Load)
                and node.id in defined
                and id(node) not in local
            ):
                if (section(node.lineno), node.id) not in self.annotated():
                    self.assertLessEqual(
                        defined[node.id],
                        section(node.lineno),
                        f"line {node.lineno} uses {node.id} from below",
                    )

    @classmethod
    def annotated(cls):
        """Names that occur in annotations only for the reader: (section, name)."""
        return {(4, "SqliteSpool"), (8, "_Link")}

    def test_the_version_is_one_literal_and_the_licence_is_inside(self):
        self.assertEqual(
            len(re.findall(r'^__version__ = "\d+\.\d+\.\d+"$', self.SOURCE, re.MULTILINE)), 1
        )
        self.assertIn("MIT License", self.SOURCE)
        self.assertIn("WITHOUT WARRANTY OF ANY KIND", self.SOURCE)


class CutTest(TestCase):
    """The file ends at its cut line for who takes the SDK only: what stands above is complete."""

    COMMAND = re.search(r"(?m)^ +(mkdir -p cut && sed .+)$", ModuleTest.SOURCE).group(1)
    QUICK = (
        "ErrorTest ConfigTest PolicyTest MemoryBufferTest SplitTest ClientTest ControlPlaneTest"
        " LambdaTest GlobalTest"
    )

    def setUp(self):
        super().setUp()
        if shutil.which("sed") is None:
            self.skipTest("there is no sed")
        self.within = self.folder()
        shutil.copy(chirrop.__file__, self.within / "chirrop.py")
        subprocess.run(["sh", "-c", self.COMMAND], cwd=self.within, check=True)
        self.path = self.within / "cut" / "chirrop.py"
        self.source = self.path.read_text(encoding="utf-8")

    def run_cut(self, *arguments, **env):
        """Run this interpreter where `import chirrop` gets the cut file."""
        paths = os.pathsep.join([str(self.path.parent), str(pathlib.Path(__file__).parent)])
        return subprocess.run(
            [sys.executable, "-W", "error", *arguments],
            capture_output=True, text=True, cwd=self.path.parent,
            env={**os.environ, **NOT_COUNTED, "PYTHONPATH": paths, **env},
        )  # fmt: skip

    def test_the_rest_has_no_sandbox_no_command_line_and_its_licence(self):
        self.assertNotRegex(self.source, r"(?m)^(class Sandbox|def main|# ---- Sandbox)")
        self.assertTrue(self.source.startswith("#!/usr/bin/env python3\n"))
        self.assertIn("\n\n\n# MIT License\n", self.source)
        self.assertIn("WITHOUT WARRANTY OF ANY KIND", self.source)

    def test_the_rest_names_nothing_that_is_gone_and_imports_nothing_unused(self):
        tree = ast.parse(self.source)
        names = [n for n in ast.walk(tree) if isinstance(n, ast.Name)]
        bound = {n.id for n in names if not isinstance(n.ctx, ast.Load)} | set(dir(builtins))
        bound |= {"__file__"}
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                bound.add(node.name)
            elif isinstance(node, ast.arg):
                bound.add(node.arg)
            elif isinstance(node, ast.ExceptHandler):
                bound.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                imported |= {(a.asname or a.name).split(".")[0] for a in node.names}
        used = {n.id for n in names if isinstance(n.ctx, ast.Load)}
        self.assertEqual(used - bound - imported, set())
        self.assertEqual(imported - used - {"annotations"}, set())

    def test_the_rest_gives_every_name_that_it_lists(self):
        done = self.run_cut("-c", "from chirrop import *; print(sorted(dir())); new_client")
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        for name in set(chirrop.__all__) - {"Sandbox"}:
            self.assertIn(repr(name), done.stdout)
        self.assertNotIn("Sandbox", done.stdout)

    def test_the_rest_passes_the_tests_of_the_sdk(self):
        names = self.QUICK.split()
        if FULL:
            above = pathlib.Path(__file__).read_text(encoding="utf-8").split("\n# ---- The file")[0]
            names = re.findall(r"^class (\w+Test)\(", above, re.MULTILINE)
        code = (
            "import chirrop, unittest; assert not hasattr(chirrop, 'Sandbox');"
            "unittest.main('test_chirrop')"
        )
        done = self.run_cut("-c", code, *names, CHIRROP_TEST_FULL="")
        self.assertEqual(done.returncode, 0, done.stderr[-5000:])

    def test_the_readmes_lambda_layer_carries_bytecode_and_runs_a_handler(self):
        (block,) = (text for text in readme().split("```") if " -m compileall " in text)
        python = f"'{sys.executable}'"
        commands = block.replace("python3.12 ", f"{python} ").replace("python3 -m", f"{python} -m")
        subprocess.run(["sh", "-ec", commands], cwd=self.within, check=True)
        with zipfile.ZipFile(self.within / "layer.zip") as layer:
            names = layer.namelist()
            layer.extractall(self.within / "opt")
        (cached,) = (name for name in names if name.endswith(".pyc"))
        head = (self.within / "opt" / cached).read_bytes()[4:8]
        self.assertEqual(head, b"\1\0\0\0")  # by a hash, and not compared with the source
        code = """if True:
            import chirrop
            sent = []
            transport = lambda *request: sent.append(request) or (200, b"", {})
            client = chirrop.new_client(api_key="chp_test", transport=transport)
            @client.lambda_handler
            def handler(event, context):
                client.log(chirrop.Log("orders.count", event))
            handler(1, None)
            print(len(sent), client.stats().delivered, chirrop.__file__)
        """
        done = self.run_cut("-c", code, PYTHONPATH=str(self.within / "opt" / "python"))
        self.assertEqual(done.stdout[:4], "1 1 ", done.stderr)

    def test_the_readme_has_the_command_of_the_header(self):
        self.assertEqual(readme().count(f"\n{self.COMMAND}\n"), 2)


# ---- Sandbox --------------------------------------------------------------

UNKNOWN = "00000000-0000-4000-8000-00000000dead"
SLACK = {"channel": "slack", "url": "https://hooks.slack.com/services/T/B/x"}


class SandboxCase(unittest.TestCase):
    """A sandbox with a clock turned by hand, called as a transport."""

    start = datetime(2026, 3, 4, 10, 30, 15, tzinfo=timezone.utc)

    def setUp(self):
        self.now, self.slept = self.start, []
        self.sandbox = Sandbox(clock=lambda: self.now.timestamp(), sleep=self.slept.append)

    def serve(self, host="127.0.0.1"):
        """Serve the sandbox of the moment, which tests replace; return the server."""
        server = chirrop._serve_sandbox(lambda *request: self.sandbox(*request), 0, host)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        self.addCleanup(lambda: (server.shutdown(), thread.join(30), server.server_close()))
        return server

    def call(self, method, path, body=None, auth="Bearer chp_test", timeout=10.0):
        """Return status and parsed body (None for an empty one)."""
        headers = {} if auth is None else {"authorization": auth}
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        status, content, _ = self.exchange(method, path, body, headers, timeout)
        return status, json.loads(content) if content else None

    def exchange(self, method, path, body, headers, timeout):
        return self.sandbox(method, "https://api.example" + path, body, headers, timeout)

    def ok(self, method, path, body=None):
        status, content = self.call(method, path, body)
        self.assertEqual(status, 200, content)
        return content

    def log(self, *values, event="jobs.done", **fields):
        self.ok("POST", "/v1.0/logs", [dict(fields, event=event, value=v) for v in values])

    def at(self, **shift):
        """Return the time on the clock, shifted, as a log states it."""
        return (self.now + timedelta(**shift)).isoformat()

    def event_id(self, event="jobs.done", agent=""):
        found = [
            e["event_id"]
            for e in self.ok("GET", "/v1.0/events")
            if (e["event"], e["agent"]) == (event, agent)
        ]
        self.assertEqual(len(found), 1, found)
        return found[0]

    def policy(self, **fields):
        fields["event_id"] = fields.get("event_id") or self.event_id()
        return self.ok(
            "POST",
            "/v1.0/policies",
            {"period": "hour", "aggregate": "sum", "condition": "gt", "threshold": 0, **fields},
        )

    def rollups(self, event_id, query):
        return self.ok("GET", f"/v1.0/events/{event_id}/logs?{query}")


class SandboxTest(SandboxCase):
    def test_accepted_logs_are_answered_with_an_empty_body(self):
        headers = {"Authorization": "Bearer chp_x"}
        body = b'[{"event":"a.b","value":1}]'
        self.assertEqual(
            self.sandbox("POST", "http://any/prefix/v1.0/logs", body, headers, 1), (200, b"", {})
        )

    def test_a_log_sent_twice_is_one_log_and_the_first_wins(self):
        log_id = str(uuid.uuid4())
        self.log(1, 2, log_id=log_id)
        self.log(3, log_id=log_id.upper())
        self.assertEqual(
            [(log["log_id"], log["value"]) for log in self.sandbox.logs], [(log_id, 1)]
        )
        self.assertEqual(self.rollups(self.event_id(), "period=day")[0]["count"], 1)

    def test_a_log_without_id_and_time_gets_both_from_the_server(self):
        self.log(1, log_id=" ")
        [log] = self.sandbox.logs
        self.assertEqual(str(uuid.UUID(log["log_id"])), log["log_id"])
        self.assertEqual(
            datetime.fromisoformat(log["occurred_at"].replace("Z", "+00:00")), self.now
        )

    def test_the_limits_themselves_are_accepted(self):
        self.log(*range(250))
        for fields in (
            {"meta": "x" * 1022},
            {"meta": "é" * 511},
            {"meta": {str(n): n for n in range(10)}},
            {"meta": list(range(11))},
            {"occurred_at": self.at(days=-30)},
            {"occurred_at": self.at(days=1)},
            {"unknown": 1},
            {"agent": ""},
        ):
            with self.subTest(fields=fields):
                self.log(1, **fields)
        self.assertEqual(len(self.sandbox.logs), 258)

    def test_a_definition_is_made_for_each_agent_and_event(self):
        for agent in ("api", "web", "api"):
            self.log(1, agent=agent)
        self.log(1)
        events = self.ok("GET", "/v1.0/events")
        self.assertEqual(
            [(e["agent"], e["event"]) for e in events],
            [("api", "jobs.done"), ("web", "jobs.done"), ("", "jobs.done")],
        )
        self.assertEqual(self.ok("GET", f"/v1.0/events/{events[1]['event_id']}"), events[1])
        self.assertEqual(
            set(events[0]),
            {
                "event_id",
                "event",
                "agent",
                "title",
                "description",
                "unit",
                "timezone",
                "public",
                "share_token",
                "user_id",
                "created_at",
            },
        )

    def test_an_id_may_be_percent_encoded_and_in_capitals(self):
        self.log(1)
        event_id = self.event_id()
        path = f"/v1.0/events/{event_id.upper().replace('-', '%2D')}"
        self.assertEqual(self.ok("GET", path)["event_id"], event_id)

    def test_a_definition_can_be_made_first_and_takes_its_logs(self):
        made = self.ok(
            "POST", "/v1.0/events", {"event": " jobs.done ", "agent": " api", "unit": "ms"}
        )
        self.log(1, agent="api")
        self.assertEqual(self.ok("GET", "/v1.0/events"), [made])
        self.assertEqual(
            (made["event"], made["unit"], made["timezone"]), ("jobs.done", "ms", "UTC")
        )

    def test_put_changes_what_is_editable_and_nothing_else(self):
        self.log(1)
        event_id = self.event_id()
        before = self.ok("GET", f"/v1.0/events/{event_id}")
        after = self.ok(
            "PUT",
            f"/v1.0/events/{event_id}",
            {
                "title": "Jobs",
                "public": True,
                "agent": "api",
                "unit": None,
                "event_id": UNKNOWN,
                "event": "other.name",
                "user_id": "x",
                "created_at": "x",
                "share_token": "x",
            },
        )
        self.assertEqual(str(uuid.UUID(before["share_token"])), before["share_token"])
        self.assertEqual(after, {**before, "title": "Jobs", "public": True, "agent": "api"})
        self.assertEqual(self.ok("GET", f"/v1.0/events/{event_id}"), after)
        self.log(2, agent="api")  # the definition answers to its new name only
        self.log(3)
        self.assertEqual([e["agent"] for e in self.ok("GET", "/v1.0/events")], ["api", ""])
        self.assertEqual(self.rollups(event_id, "period=day")[0]["value"], 3)

    def test_a_refused_put_changes_nothing(self):
        self.log(1)
        path = f"/v1.0/events/{self.event_id()}"
        before = self.ok("GET", path)
        self.assertEqual(self.call("PUT", path, {"title": "new", "timezone": "Mars/Base"})[0], 400)
        self.assertEqual(self.ok("GET", path), before)

    def test_rollups_sum_each_bucket_newest_first(self):
        for value, at in ((2, "10:29:59.999"), (3, "10:30:00"), (-5, "10:30:14"), (1, "09:59:59")):
            self.log(value, agent="api", occurred_at=f"2026-03-04T{at}Z")
        event_id = self.event_id(agent="api")
        shape = {"event_id": event_id, "agent": "api", "event": "jobs.done"}
        expected = {
            "minute": [("09:59:00", [1]), ("10:29:00", [2]), ("10:30:00", [3, -5])],
            "hour": [("09:00:00", [1]), ("10:00:00", [2, 3, -5])],
            "day": [("00:00:00", [1, 2, 3, -5])],
        }
        for period, rows in expected.items():
            answer = self.rollups(event_id, f"period={period}")
            for row in answer:
                row["occurred_at"] = row["occurred_at"].replace("+00:00", "Z")
            self.assertEqual(
                answer,
                [
                    {
                        **shape,
                        "period": period,
                        "occurred_at": f"2026-03-04T{at}Z",
                        "count": len(values),
                        "value": sum(values),
                        "squares": sum(v * v for v in values),
                        "min": min(values),
                        "max": max(values),
                    }
                    for at, values in reversed(rows)
                ],
            )

    def test_rollups_are_paged_by_limit_and_offset(self):
        for minute in range(120):
            self.log(minute, occurred_at=self.at(minutes=minute - 120))
        event_id = self.event_id()
        for query, values in (
            ("", range(119, 19, -1)),
            ("&offset=100", range(19, -1, -1)),
            ("&limit=2&offset=3", (116, 115)),
            ("&limit=0", ()),
            ("&limit=500&offset=120", ()),
        ):
            rows = self.rollups(event_id, "period=minute" + query)
            self.assertEqual([row["value"] for row in rows], [*values], query)

    def test_day_rollups_follow_the_timezone_of_the_definition(self):
        try:
            chirrop._sandbox_zone("America/New_York")
        except Exception:
            self.skipTest("no time zone database here")
        self.now = datetime(2026, 3, 9, 12, tzinfo=timezone.utc)  # clocks changed on the 8th
        for at in ("07T04:59", "07T05:00", "08T04:59", "08T05:00", "09T03:59", "09T04:00"):
            self.log(1, occurred_at=f"2026-03-{at}:00Z")
        event_id = self.event_id()
        days = lambda: [
            (row["occurred_at"][8:16], row["count"])
            for row in reversed(self.rollups(event_id, "period=day"))
        ]
        self.assertEqual(days(), [("07T00:00", 2), ("08T00:00", 2), ("09T00:00", 2)])
        self.ok("PUT", f"/v1.0/events/{event_id}", {"timezone": "America/New_York"})
        self.assertEqual(
            days(), [("06T05:00", 1), ("07T05:00", 2), ("08T05:00", 2), ("09T04:00", 1)]
        )

    def test_sums_beyond_the_range_of_floats_stay_json(self):
        self.log(1.7e308, 1.7e308, 10**300)
        event_id = self.event_id()
        [row] = self.rollups(event_id, "period=day")
        self.assertGreater(row["value"], 1.7e308)
        data = self.ok(
            "GET",
            f"/v1.0/events/{event_id}/analytics?view=window&period=1h&previous=previous_window",
        )["data"]
        self.assertEqual(data["current_count"], 3)

    def test_what_it_hands_out_are_copies(self):
        self.log(1, meta={"list": [1]})
        self.sandbox.logs[0]["meta"]["list"].append(2)
        self.sandbox.logs.clear()
        self.sandbox.requests[0]["body"][0]["meta"]["list"].append(3)
        self.assertEqual(self.sandbox.logs[0]["meta"], {"list": [1]})
        self.assertEqual(self.sandbox.requests[0]["body"][0]["meta"], {"list": [1]})

    def test_requests_are_recorded_without_the_key(self):
        self.log(1)
        self.call("GET", "/v1.0/alerts?status=triggered&x=%20", auth="Bearer chp_canary")
        self.call("POST", "/v1.0/logs", b"{", auth=None)
        self.assertEqual(
            self.sandbox.requests,
            [
                {
                    "method": "POST",
                    "path": "/v1.0/logs",
                    "query": {},
                    "status": 200,
                    "body": [{"event": "jobs.done", "value": 1}],
                },
                {
                    "method": "GET",
                    "path": "/v1.0/alerts",
                    "status": 200,
                    "body": None,
                    "query": {"status": "triggered", "x": " "},
                },
                {"method": "POST", "path": "/v1.0/logs", "query": {}, "status": 401, "body": None},
            ],
        )
        self.assertNotIn("canary", repr(self.sandbox.requests))

    def test_reset_forgets_logs_resources_faults_and_predicates(self):
        self.log(1)
        self.policy()
        self.sandbox.fail(None, status=500)
        self.sandbox.reject(lambda log: True)
        self.sandbox.reset()
        self.assertEqual((self.sandbox.logs, self.sandbox.requests), ([], []))
        self.assertEqual(
            [
                self.ok("GET", f"/v1.0/{kind}")
                for kind in ("events", "policies", "alerts", "destinations")
            ],
            [[], [], [], []],
        )
        self.log(1)

    def test_threads_lose_nothing_and_raise_one_alert(self):
        self.log(1)
        self.policy()
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)
        threads = [
            threading.Thread(target=lambda: [self.log(1) for _ in range(25)]) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        self.assertEqual(len(self.sandbox.logs), 201)
        self.assertEqual(self.rollups(self.event_id(), "period=hour")[0]["count"], 201)
        self.assertEqual(len(self.ok("GET", "/v1.0/alerts")), 1)


class SandboxAnalyticsTest(SandboxCase):
    spans = {
        "1h": timedelta(hours=1),
        "1d": timedelta(days=1),
        "7d": timedelta(days=7),
        "1m": timedelta(days=30),
    }
    pairs = {
        "1h": ("previous_window", "previous_1d", "previous_7d", "previous_1m"),
        "1d": ("previous_window", "previous_7d", "previous_1m"),
        "7d": ("previous_window", "previous_1m"),
        "1m": ("previous_window",),
    }

    def analytics(self, period, previous):
        return self.call(
            "GET",
            f"/v1.0/events/{self.event_id()}/analytics?view=window&period={period}&previous={previous}",
        )

    def test_each_pair_compares_its_two_windows(self):
        for period, previous in [(p, q) for p in self.pairs for q in self.pairs[p]]:
            with self.subTest(period=period, previous=previous):
                self.setUp()
                span = self.spans[period]
                shift = self.spans.get(previous.replace("previous_", ""), span)
                self.now = self.start - shift - span
                self.log(1000)  # the moment before the previous window
                self.now = self.start - shift
                self.log(1, 3)  # its last moment
                self.now = self.start
                self.log(5, 9, 10)
                self.log(1000, occurred_at=self.at(seconds=1))
                status, answer = self.analytics(period, previous)
                self.assertEqual(status, 200, answer)
                data = answer.pop("data")
                self.assertEqual(
                    answer,
                    {
                        "event_id": self.event_id(),
                        "view": "window",
                        "period": period,
                        "previous": previous,
                    },
                )
                self.assertAlmostEqual(data.pop("current_stddev"), 2.1602468994)
                self.assertEqual(
                    data,
                    {
                        "current_value": 24,
                        "current_count": 3,
                        "previous_value": 4,
                        "previous_count": 2,
                        "value_delta": 20,
                        "count_delta": 1,
                        "value_pct_change": 500,
                        "count_pct_change": 50,
                        "current_mean": 8,
                        "previous_mean": 2,
                        "mean_delta": 6,
                        "mean_pct_change": 300,
                        "previous_stddev": 1,
                    },
                )

    def test_all_other_pairs_are_refused(self):
        self.log(1)
        for period in self.pairs:
            for previous in set(self.pairs["1h"]) - set(self.pairs[period]):
                status, answer = self.analytics(period, previous)
                self.assertEqual(status, 400, (period, previous))
                self.assertIn(previous, answer["error"]["message"])

    def test_data_is_null_where_both_windows_are_empty(self):
        self.log(1, occurred_at=self.at(days=-20))
        self.assertIsNone(self.analytics("1d", "previous_window")[1]["data"])

    def test_where_there_is_nothing_to_divide_by_the_numbers_are_0(self):
        self.log(4, -3)
        data = self.analytics("1h", "previous_window")[1]["data"]
        current = {"value": 1, "count": 2, "mean": 0.5, "stddev": 3.5}
        self.assertEqual(
            data,
            {
                **{f"current_{name}": value for name, value in current.items()},
                **{f"previous_{name}": 0 for name in current},
                **{f"{name}_delta": current[name] for name in ("value", "count", "mean")},
                **{f"{name}_pct_change": 0 for name in ("value", "count", "mean")},
            },
        )

    def test_a_rise_from_a_negative_value_is_a_rise(self):
        self.log(-10, occurred_at=self.at(hours=-1))
        self.log(-5)
        self.assertEqual(self.analytics("1h", "previous_window")[1]["data"]["value_pct_change"], 50)


class SandboxAlertTest(SandboxCase):
    def alerts(self, query=""):
        return self.ok("GET", "/v1.0/alerts" + query)

    def deliveries(self, alert_id, query=""):
        return self.ok("GET", f"/v1.0/alerts/{alert_id}/deliveries{query}")

    def test_each_aggregate_is_what_the_condition_sees(self):
        for aggregate, value in (
            ("sum", 4),
            ("count", 2),
            ("average", 2),
            ("min", 1),
            ("max", 3),
            ("p95_est", 3.645),
            ("p99_est", 4.326),
        ):
            with self.subTest(aggregate=aggregate):
                self.setUp()
                self.ok("POST", "/v1.0/events", {"event": "jobs.done"})
                self.policy(aggregate=aggregate, condition="gte", threshold=value - 1e-9)
                self.policy(aggregate=aggregate, condition="gte", threshold=value + 1e-9)
                self.log(1, 3)
                [alert] = self.alerts()
                self.assertAlmostEqual(alert["value"], value)

    def test_each_condition_below_at_and_above_its_threshold(self):
        for condition, fires in (
            ("gt", (0, 0, 1)),
            ("lt", (1, 0, 0)),
            ("eq", (0, 1, 0)),
            ("gte", (0, 1, 1)),
            ("lte", (1, 1, 0)),
        ):
            for value, expected in zip((4, 5, 6), fires):
                self.setUp()
                self.ok("POST", "/v1.0/events", {"event": "jobs.done"})
                self.policy(condition=condition, threshold=5)
                self.log(value)
                self.assertEqual(len(self.alerts()), expected, (condition, value))

    def test_a_policy_raises_one_alert_for_a_bucket(self):
        self.log(1)
        self.policy(threshold=10)
        self.log(9)
        self.assertEqual(self.alerts(), [])
        self.log(1)
        self.log(1)
        self.assertEqual([alert["value"] for alert in self.alerts()], [11])
        self.log(11, occurred_at=self.at(hours=-1))
        self.now += timedelta(hours=1)
        self.log(11)
        self.assertEqual(len(self.alerts()), 3)

    def test_a_policy_sees_its_own_event_and_only_while_enabled(self):
        self.log(1)
        policy = self.policy(enabled=False)
        self.log(1)
        self.log(1, agent="other")
        self.assertEqual(self.alerts(), [])
        self.ok("PUT", f"/v1.0/policies/{policy['policy_id']}", {"enabled": True})
        self.log(1, agent="other")
        self.assertEqual(self.alerts(), [])
        self.log(1)
        self.assertEqual(len(self.alerts()), 1)

    def test_an_old_bucket_is_left_alone_by_a_later_policy(self):
        self.log(100, occurred_at=self.at(days=-2))
        self.policy(threshold=50)
        self.log(1)
        self.assertEqual(self.alerts(), [])

    def test_an_alert_says_which_rule_fired_and_what_it_saw(self):
        self.log(1, agent="api")
        policy = self.policy(
            event_id=self.event_id(agent="api"),
            title="Too many",
            channel="team",
            threshold=2.5,
            severity="critical",
            description="long",
        )
        self.log(4, agent="api")
        [alert] = self.alerts()
        self.assertEqual(
            alert,
            {
                **{
                    name: policy[name]
                    for name in (
                        "policy_id",
                        "event_id",
                        "title",
                        "channel",
                        "period",
                        "aggregate",
                        "condition",
                        "threshold",
                        "severity",
                    )
                },
                "alert_id": alert["alert_id"],
                "agent": "api",
                "event": "jobs.done",
                "status": "triggered",
                "value": 5,
                "count": 2,
                "min": 1,
                "max": 4,
                "triggered_at": alert["triggered_at"],
                "acknowledged_at": None,
                "resolved_at": None,
            },
        )

    def test_policy_defaults_and_partial_put(self):
        self.log(1)
        policy = self.policy()
        self.assertEqual(
            {name: policy[name] for name in ("title", "channel", "severity", "enabled")},
            {"title": "", "channel": "ops", "severity": "warning", "enabled": True},
        )
        path = f"/v1.0/policies/{policy['policy_id']}"
        changed = self.ok("PUT", path, {"threshold": 7, "policy_id": UNKNOWN})
        self.assertEqual(changed, {**policy, "threshold": 7})
        self.assertEqual(
            (self.ok("GET", path), self.ok("GET", "/v1.0/policies")), (changed, [changed])
        )

    def test_every_step_of_the_lifecycle_from_every_status(self):
        reach = {
            "triggered": [],
            "acknowledged": ["acknowledge"],
            "resolved": ["resolve"],
            "archived": ["archive"],
        }
        allowed = {
            "acknowledge": {"triggered", "acknowledged"},
            "archive": set(reach),
            "resolve": {"triggered", "acknowledged", "resolved"},
        }
        becomes = {"acknowledge": "acknowledged", "resolve": "resolved", "archive": "archived"}
        self.log(1)
        for status, verbs in reach.items():
            for verb in allowed:
                with self.subTest(status=status, verb=verb):
                    self.policy()
                    self.now += timedelta(hours=1)
                    self.log(1)
                    path = f"/v1.0/alerts/{self.alerts()[-1]['alert_id']}"
                    for step in verbs:
                        self.ok("POST", f"{path}/{step}")
                    code, answer = self.call("POST", f"{path}/{verb}")
                    ok = status in allowed[verb]
                    self.assertEqual(code, 200 if ok else 422, answer)
                    self.assertEqual(
                        self.ok("GET", path)["status"], becomes[verb] if ok else status
                    )

    def test_repeating_a_step_keeps_its_first_time(self):
        self.log(1)
        self.policy()
        self.log(1)
        path = f"/v1.0/alerts/{self.alerts()[0]['alert_id']}/acknowledge"
        first = self.ok("POST", path)
        self.assertIsNotNone(first["acknowledged_at"])
        self.now += timedelta(hours=1)
        self.assertEqual(self.ok("POST", path), first)

    def test_deliveries_go_to_enabled_destinations_in_scope(self):
        self.log(1)
        policy_id, other = self.policy()["policy_id"], self.policy(period="day")["policy_id"]
        make = lambda **fields: self.ok("POST", "/v1.0/destinations", {**SLACK, **fields})
        meant = [
            make()["destination_id"],
            make(scope="policies", policy_ids=[policy_id])["destination_id"],
        ]
        make(enabled=False)
        make(scope="policies")
        make(scope="policies", policy_ids=[other])
        self.log(1)
        [alert] = [alert for alert in self.alerts() if alert["policy_id"] == policy_id]
        rows = self.deliveries(alert["alert_id"])
        self.assertEqual([row["destination_id"] for row in rows], meant)
        self.assertEqual(
            rows[0],
            {
                "attempt_id": rows[0]["attempt_id"],
                "alert_id": alert["alert_id"],
                "destination_id": meant[0],
                "channel": "slack",
                "target": SLACK["url"],
                "status": "sent",
                "response_status": None,
                "error_message": "recorded only: a sandbox sends nothing",
                "created_at": alert["triggered_at"],
            },
        )
        self.assertEqual(self.deliveries(alert["alert_id"], "?limit=1&offset=1"), rows[1:])
        self.assertEqual(self.deliveries(alert["alert_id"], "?kind=test"), [])
        self.assertEqual(self.deliveries(alert["alert_id"], "?kind=all"), rows)
        destination = self.ok("GET", f"/v1.0/destinations/{meant[0]}")
        self.assertEqual(destination["last_delivered_at"], alert["triggered_at"])

    def test_a_test_is_recorded_under_the_alert_id_it_answers(self):
        destination_id = self.ok("POST", "/v1.0/destinations", SLACK)["destination_id"]
        answer = self.ok("POST", f"/v1.0/destinations/{destination_id}/test")
        self.assertEqual(
            (set(answer), answer["destination_id"], answer["status"]),
            ({"alert_id", "destination_id", "status"}, destination_id, "sent"),
        )
        [row] = self.deliveries(answer["alert_id"], "?kind=test")
        self.assertEqual(row["destination_id"], destination_id)
        self.assertEqual(self.deliveries(answer["alert_id"], "?kind=all"), [row])
        self.assertEqual(self.deliveries(answer["alert_id"]), [])
        self.assertEqual(self.alerts(), [])

    def test_each_channel_with_what_it_needs(self):
        for channel, fields, target in (
            ("slack", {"url": "https://a/b"}, "https://a/b"),
            ("discord", {"url": "https://a/b"}, "https://a/b"),
            ("webhook", {"url": "http://a", "credentials": {"authorization": "x"}}, "http://a"),
            ("telegram", {"credentials": {"bot_token": "b", "chat_id": 5}}, "5"),
            ("email", {}, ""),
            ("email", {"url": "ops@example.com"}, "ops@example.com"),
        ):
            with self.subTest(channel=channel):
                made = self.ok("POST", "/v1.0/destinations", {"channel": channel, **fields})
                self.assertEqual({**made, **fields}, made)
                tested = self.ok("POST", f"/v1.0/destinations/{made['destination_id']}/test")
                [row] = self.deliveries(tested["alert_id"], "?kind=test")
                self.assertEqual((row["channel"], row["target"]), (channel, target))

    def test_a_destination_is_changed_in_part_and_checked_as_a_whole(self):
        made = self.ok("POST", "/v1.0/destinations", SLACK)
        self.assertEqual(
            {
                **made,
                "enabled": True,
                "scope": "all",
                "policy_ids": [],
                "credentials": None,
                "last_error": None,
                "last_delivered_at": None,
            },
            made,
        )
        path = f"/v1.0/destinations/{made['destination_id']}"
        self.ok("POST", path + "/test")
        made = self.ok("GET", path)
        self.assertIsNotNone(made["last_delivered_at"])
        self.now += timedelta(hours=1)
        changed = self.ok(
            "PUT", path, {"enabled": False, "destination_id": UNKNOWN, "last_error": "x"}
        )
        self.assertEqual(changed, {**made, "enabled": False, "updated_at": changed["updated_at"]})
        self.assertNotEqual(changed["updated_at"], made["updated_at"])
        for body in ({"channel": "telegram"}, {"url": " "}):
            self.assertEqual(self.call("PUT", path, body)[0], 400, body)
        self.assertEqual(self.ok("GET", "/v1.0/destinations"), [changed])


def _many(count):
    return [{"event": "a", "value": 1}] * count


def _one(**fields):
    return [{"event": "a", "value": 1}, {"event": "a", "value": 1, **fields}]


def _policy(**fields):
    return {
        "event_id": "{event}",
        "period": "hour",
        "aggregate": "sum",
        "condition": "gt",
        "threshold": 1,
        **fields,
    }


ANALYTICS = "/v1.0/events/{event}/analytics?"
# rule, method, path, body, status, words of the error
SANDBOX_RULES = [
    ("logs: not JSON", "POST", "/v1.0/logs", b"[{", 400, "JSON"),
    ("logs: not UTF-8", "POST", "/v1.0/logs", b'["\xff"]', 400, "JSON"),
    ("logs: NaN is not JSON", "POST", "/v1.0/logs", b'[{"event":"a","value":NaN}]', 400, "JSON"),
    ("logs: lone surrogate", "POST", "/v1.0/logs", b'[{"event":"\\ud800","value":1}]', 400, "JSON"),
    ("logs: too deep", "POST", "/v1.0/logs", b"[" * 200_000, 400, "JSON"),
    ("logs: empty body", "POST", "/v1.0/logs", b"", 400, "array"),
    ("logs: not an array", "POST", "/v1.0/logs", {"event": "a", "value": 1}, 400, "array"),
    ("logs: none", "POST", "/v1.0/logs", [], 400, "250"),
    ("logs: 251", "POST", "/v1.0/logs", _many(251), 400, "250"),
    ("logs: not an object", "POST", "/v1.0/logs", [*_many(1), 5], 400, "log 1"),
    ("logs: no event", "POST", "/v1.0/logs", [{"value": 1}], 400, "log 0 event"),
    ("logs: event not text", "POST", "/v1.0/logs", _one(event=5), 400, "log 1 event"),
    ("logs: event blank", "POST", "/v1.0/logs", _one(event=" \t"), 400, "log 1 event"),
    ("logs: no value", "POST", "/v1.0/logs", [{"event": "a"}], 400, "log 0 value"),
    ("logs: value null", "POST", "/v1.0/logs", _one(value=None), 400, "log 1 value"),
    ("logs: value text", "POST", "/v1.0/logs", _one(value="1"), 400, "log 1 value"),
    ("logs: value bool", "POST", "/v1.0/logs", _one(value=True), 400, "log 1 value"),
    ("logs: value huge", "POST", "/v1.0/logs", _one(value=10**400), 400, "log 1 value"),
    ("logs: agent not text", "POST", "/v1.0/logs", _one(agent=5), 400, "log 1 agent"),
    ("logs: log_id not a UUID", "POST", "/v1.0/logs", _one(log_id="abc"), 400, "log 1 log_id"),
    ("logs: log_id not text", "POST", "/v1.0/logs", _one(log_id=5), 400, "log 1 log_id"),
    ("logs: meta 1,025 bytes", "POST", "/v1.0/logs", _one(meta="é" * 511 + "x"), 400, "log 1 meta"),
    (
        "logs: meta 11 keys",
        "POST",
        "/v1.0/logs",
        _one(meta={str(n): 1 for n in range(11)}),
        400,
        "log 1 meta",
    ),
    ("logs: time not ISO", "POST", "/v1.0/logs", _one(occurred_at="now"), 400, "log 1 occurred_at"),
    ("logs: time a number", "POST", "/v1.0/logs", _one(occurred_at=5), 400, "log 1 occurred_at"),
    (
        "logs: too old",
        "POST",
        "/v1.0/logs",
        _one(occurred_at="2026-02-02T10:30:14Z"),
        400,
        "log 1 occurred_at",
    ),
    (
        "logs: too early",
        "POST",
        "/v1.0/logs",
        _one(occurred_at="2026-03-05T10:30:16Z"),
        400,
        "log 1 occurred_at",
    ),
    ("events: not JSON", "POST", "/v1.0/events", b"{", 400, "JSON"),
    ("events: not an object", "POST", "/v1.0/events", [], 400, "object"),
    ("events: no event", "POST", "/v1.0/events", {"title": "x"}, 400, "event"),
    ("events: event blank", "POST", "/v1.0/events", {"event": " "}, 400, "event"),
    ("events: event not text", "POST", "/v1.0/events", {"event": 5}, 400, "event"),
    ("events: public not bool", "POST", "/v1.0/events", {"event": "b", "public": 1}, 400, "public"),
    ("events: title not text", "PUT", "/v1.0/events/{event}", {"title": 5}, 400, "title"),
    (
        "events: timezone unknown",
        "POST",
        "/v1.0/events",
        {"event": "b", "timezone": "Mars/Base"},
        400,
        "timezone",
    ),
    (
        "events: timezone a path",
        "PUT",
        "/v1.0/events/{event}",
        {"timezone": "../etc/passwd"},
        400,
        "timezone",
    ),
    (
        "events: timezone a folder",
        "PUT",
        "/v1.0/events/{event}",
        {"timezone": "America"},
        400,
        "timezone",
    ),
    ("events: exists", "POST", "/v1.0/events", {"event": "jobs.done", "agent": ""}, 422, "already"),
    (
        "events: renamed to another",
        "PUT",
        "/v1.0/events/{event}",
        {"agent": "taken"},
        422,
        "already",
    ),
    ("events: id not a UUID", "GET", "/v1.0/events/evt_123", None, 400, "UUID"),
    ("events: id empty", "GET", "/v1.0/events/", None, 400, "UUID"),
    ("events: id unknown", "GET", "/v1.0/events/" + UNKNOWN, None, 404, UNKNOWN),
    ("events: id unknown, PUT", "PUT", "/v1.0/events/" + UNKNOWN, {}, 404, UNKNOWN),
    ("rollups: no period", "GET", "/v1.0/events/{event}/logs", None, 400, "period minute hour day"),
    ("rollups: period", "GET", "/v1.0/events/{event}/logs?period=week", None, 400, "period"),
    ("rollups: limit", "GET", "/v1.0/events/{event}/logs?period=day&limit=-1", None, 400, "limit"),
    (
        "rollups: blank limit",
        "GET",
        "/v1.0/events/{event}/logs?period=day&limit=",
        None,
        400,
        "limit",
    ),
    (
        "rollups: limit huge",
        "GET",
        "/v1.0/events/{event}/logs?period=day&limit=" + "9" * 5000,
        None,
        400,
        "limit",
    ),
    (
        "rollups: offset",
        "GET",
        "/v1.0/events/{event}/logs?period=day&offset=x",
        None,
        400,
        "offset",
    ),
    ("rollups: id not a UUID", "GET", "/v1.0/events/x/logs?period=day", None, 400, "UUID"),
    ("rollups: id unknown", "GET", f"/v1.0/events/{UNKNOWN}/logs?period=day", None, 404, UNKNOWN),
    ("analytics: no view", "GET", ANALYTICS + "period=1h&previous=previous_1d", None, 400, "view"),
    (
        "analytics: view",
        "GET",
        ANALYTICS + "view=day&period=1h&previous=previous_1d",
        None,
        400,
        "view window",
    ),
    (
        "analytics: no period",
        "GET",
        ANALYTICS + "view=window&previous=previous_1d",
        None,
        400,
        "period 7d",
    ),
    (
        "analytics: period",
        "GET",
        ANALYTICS + "view=window&period=2h&previous=previous_1d",
        None,
        400,
        "period 7d",
    ),
    (
        "analytics: no previous",
        "GET",
        ANALYTICS + "view=window&period=1h",
        None,
        400,
        "previous previous_1m",
    ),
    (
        "analytics: previous",
        "GET",
        ANALYTICS + "view=window&period=1h&previous=1d",
        None,
        400,
        "previous previous_1m",
    ),
    (
        "analytics: pair",
        "GET",
        ANALYTICS + "view=window&period=1d&previous=previous_1d",
        None,
        400,
        "previous_1d 1d",
    ),
    ("analytics: id unknown", "GET", f"/v1.0/events/{UNKNOWN}/analytics", None, 404, UNKNOWN),
    ("policies: not an object", "POST", "/v1.0/policies", "x", 400, "object"),
    *(
        (f"policies: no {name}", "POST", "/v1.0/policies", _policy(**{name: None}), 400, name)
        for name in ("event_id", "period", "aggregate", "condition", "threshold")
    ),
    *(
        (f"policies: {name}", "POST", "/v1.0/policies", _policy(**{name: wrong}), 400, name)
        for name, wrong in (
            ("period", "1h"),
            ("aggregate", "p50"),
            ("condition", "ne"),
            ("severity", "fatal"),
            ("threshold", "5"),
            ("threshold", True),
            ("threshold", 10**400),
            ("enabled", "yes"),
            ("title", 5),
            ("channel", 5),
        )
    ),
    (
        "policies: event_id not a UUID",
        "POST",
        "/v1.0/policies",
        _policy(event_id="evt_1"),
        400,
        "UUID",
    ),
    (
        "policies: event_id unknown",
        "POST",
        "/v1.0/policies",
        _policy(event_id=UNKNOWN),
        422,
        "event_id",
    ),
    ("policies: PUT period", "PUT", "/v1.0/policies/{policy}", {"period": "week"}, 400, "period"),
    (
        "policies: PUT event_id",
        "PUT",
        "/v1.0/policies/{policy}",
        {"event_id": UNKNOWN},
        422,
        "event_id",
    ),
    ("policies: id not a UUID", "GET", "/v1.0/policies/pol_1", None, 400, "UUID"),
    ("policies: id unknown", "GET", "/v1.0/policies/" + UNKNOWN, None, 404, UNKNOWN),
    ("policies: id unknown, PUT", "PUT", "/v1.0/policies/" + UNKNOWN, {}, 404, UNKNOWN),
    ("alerts: status", "GET", "/v1.0/alerts?status=open", None, 400, "status archived"),
    ("alerts: blank status", "GET", "/v1.0/alerts?status=", None, 400, "status"),
    ("alerts: id not a UUID", "GET", "/v1.0/alerts/alr_1", None, 400, "UUID"),
    ("alerts: id unknown", "GET", "/v1.0/alerts/" + UNKNOWN, None, 404, UNKNOWN),
    ("deliveries: kind", "GET", "/v1.0/alerts/{alert}/deliveries?kind=real", None, 400, "kind"),
    ("deliveries: limit", "GET", "/v1.0/alerts/{alert}/deliveries?limit=1.5", None, 400, "limit"),
    ("deliveries: offset", "GET", "/v1.0/alerts/{alert}/deliveries?offset=-1", None, 400, "offset"),
    ("deliveries: id not a UUID", "GET", "/v1.0/alerts/x/deliveries", None, 400, "UUID"),
    ("deliveries: id unknown", "GET", f"/v1.0/alerts/{UNKNOWN}/deliveries", None, 404, UNKNOWN),
    *(
        (
            f"alerts: {verb}, id unknown",
            "POST",
            f"/v1.0/alerts/{UNKNOWN}/{verb}",
            None,
            404,
            UNKNOWN,
        )
        for verb in ("acknowledge", "resolve", "archive")
    ),
    *(
        (f"alerts: {verb}, id not a UUID", "POST", f"/v1.0/alerts/x/{verb}", None, 400, "UUID")
        for verb in ("acknowledge", "resolve", "archive")
    ),
    (
        "alerts: acknowledge after resolve",
        "POST",
        "/v1.0/alerts/{alert}/acknowledge",
        None,
        422,
        "acknowledge resolved",
    ),
    ("destinations: not an object", "POST", "/v1.0/destinations", [SLACK], 400, "object"),
    (
        "destinations: no channel",
        "POST",
        "/v1.0/destinations",
        {"url": "https://a"},
        400,
        "channel",
    ),
    ("destinations: channel", "POST", "/v1.0/destinations", {"channel": "sms"}, 400, "channel"),
    *(
        (
            f"destinations: {channel} without url",
            "POST",
            "/v1.0/destinations",
            {"channel": channel},
            400,
            "url",
        )
        for channel in ("slack", "discord", "webhook")
    ),
    *(
        (
            f"destinations: url {url}",
            "POST",
            "/v1.0/destinations",
            {"channel": "webhook", "url": url},
            400,
            "url",
        )
        for url in ("/path", "example.com/x", "ftp://a/b", "https://", "https:///x", "a@b.c")
    ),
    *(
        (
            f"destinations: address {url}",
            "POST",
            "/v1.0/destinations",
            {"channel": "email", "url": url},
            400,
            "url address",
        )
        for url in ("ops", "@example.com", "ops@")
    ),
    (
        "destinations: bot_token",
        "POST",
        "/v1.0/destinations",
        {"channel": "telegram", "credentials": {"chat_id": "1"}},
        400,
        "bot_token",
    ),
    (
        "destinations: chat_id",
        "POST",
        "/v1.0/destinations",
        {"channel": "telegram", "credentials": {"bot_token": "x", "chat_id": " "}},
        400,
        "chat_id",
    ),
    *(
        (f"destinations: {name}", "POST", "/v1.0/destinations", {**SLACK, name: wrong}, 400, name)
        for name, wrong in (
            ("credentials", "x"),
            ("credentials", {"a": []}),
            ("scope", 1),
            ("policy_ids", "x"),
            ("enabled", 0),
            ("url", 5),
        )
    ),
    (
        "destinations: policy_ids not UUIDs",
        "POST",
        "/v1.0/destinations",
        {**SLACK, "policy_ids": ["pol_1"]},
        400,
        "UUID",
    ),
    (
        "destinations: policy_ids unknown",
        "POST",
        "/v1.0/destinations",
        {**SLACK, "policy_ids": [UNKNOWN]},
        422,
        "policy_ids",
    ),
    ("destinations: PUT", "PUT", "/v1.0/destinations/{destination}", {"url": "x"}, 400, "url"),
    ("destinations: id not a UUID", "GET", "/v1.0/destinations/dst_1", None, 400, "UUID"),
    ("destinations: id unknown", "GET", "/v1.0/destinations/" + UNKNOWN, None, 404, UNKNOWN),
    ("destinations: id unknown, PUT", "PUT", "/v1.0/destinations/" + UNKNOWN, {}, 404, UNKNOWN),
    ("test: id not a UUID", "POST", "/v1.0/destinations/x/test", None, 400, "UUID"),
    ("test: id unknown", "POST", f"/v1.0/destinations/{UNKNOWN}/test", None, 404, UNKNOWN),
    ("no such route", "GET", "/v1.0/nothing", None, 404, "route"),
    ("no such base", "GET", "/v2/events", None, 404, "route"),
    ("no such verb", "POST", "/v1.0/alerts/{alert}/delete", None, 404, "route"),
    ("wrong method", "DELETE", "/v1.0/events/{event}", None, 405, "method"),
    ("wrong method, logs", "GET", "/v1.0/logs", None, 405, "method"),
    ("wrong method, alerts", "POST", "/v1.0/alerts", {}, 405, "method"),
]


class SandboxRulesTest(SandboxCase):
    """Each rule of the service that ends in a refusal, one row a rule."""

    CODES = {400: "BAD_REQUEST", 404: "NOT_FOUND", 405: "METHOD_NOT_ALLOWED", 422: "UNPROCESSABLE"}

    def state(self):
        return [
            self.sandbox.logs,
            *(
                self.ok("GET", f"/v1.0/{kind}")
                for kind in ("events", "policies", "alerts", "destinations")
            ),
        ]

    def ids(self):
        self.log(1)
        self.log(1, agent="taken")
        policy, destination = self.policy(), self.ok("POST", "/v1.0/destinations", SLACK)
        self.log(1)
        [alert] = self.ok("GET", "/v1.0/alerts")
        self.ok("POST", f"/v1.0/alerts/{alert['alert_id']}/resolve")
        return {
            "{event}": self.event_id(),
            "{policy}": policy["policy_id"],
            "{alert}": alert["alert_id"],
            "{destination}": destination["destination_id"],
        }

    def test_each_rule_is_refused_with_its_reason_and_changes_nothing(self):
        ids = self.ids()
        before = self.state()
        for rule, method, path, body, status, words in SANDBOX_RULES:
            body = (
                body
                if isinstance(body, bytes)
                else json.dumps(body).encode()
                if body is not None
                else None
            )
            for name, item_id in ids.items():
                path = path.replace(name, item_id)
                body = body and body.replace(name.encode(), item_id.encode())
            with self.subTest(rule=rule):
                answer = self.call(method, path, body)
                self.assertEqual(answer[0], status, answer)
                error = answer[1].pop("error")
                self.assertEqual((answer[1], set(error)), ({}, {"code", "message"}))
                self.assertEqual(error["code"], self.CODES[status])
                for word in words.split():
                    self.assertIn(word, error["message"])
        self.assertEqual(self.state(), before)

    def test_the_rows_are_refused_for_their_rule_alone(self):
        ids = self.ids()
        for method, path, body in (
            ("POST", "/v1.0/logs", _one()),
            ("POST", "/v1.0/logs", _many(250)),
            ("POST", "/v1.0/events", {"event": "b"}),
            ("POST", "/v1.0/policies", _policy(event_id=ids["{event}"])),
            ("POST", "/v1.0/destinations", SLACK),
            (
                "GET",
                ANALYTICS.replace("{event}", ids["{event}"])
                + "view=window&period=1h&previous=previous_1d",
                None,
            ),
        ):
            self.ok(method, path, body)

    def test_401_for_a_missing_or_bad_token_on_every_route(self):
        for auth in (
            None,
            "",
            "chp_test",
            "Bearer",
            "Bearer ",
            "Bearer key",
            "Basic chp_test",
            "Bearer  chp_test",
            "Bearer chp_",
        ):
            for method, path in (
                ("POST", "/v1.0/logs"),
                ("GET", "/v1.0/events"),
                ("PUT", "/v1.0/policies/x"),
                ("GET", "/v1.0/nothing"),
            ):
                status, answer = self.call(method, path, _one(), auth=auth)
                error = {"code": "INVALID_TOKEN", "message": "invalid API key"}
                self.assertEqual((status, answer), (401, {"error": error}), auth)
        self.assertEqual(self.sandbox.logs, [])

    def test_with_a_key_of_its_own_any_other_is_401(self):
        self.sandbox = Sandbox(key="chp_mine")
        for auth, status in (
            ("Bearer chp_mine", 200),
            ("bearer chp_mine", 200),
            ("Bearer chp_other", 401),
            ("Bearer chp_mine2", 401),
        ):
            self.assertEqual(self.call("GET", "/v1.0/events", auth=auth)[0], status, auth)

    def test_one_bad_log_fails_the_whole_request(self):
        self.assertEqual(self.call("POST", "/v1.0/logs", [*_many(249), {"event": ""}])[0], 400)
        self.assertEqual(self.sandbox.logs, [])
        self.assertEqual(self.ok("GET", "/v1.0/events"), [])

    def test_a_rejected_log_is_named_by_its_id(self):
        log_id = str(uuid.uuid4())
        self.sandbox.reject(lambda log: log["value"] == 13)
        status, answer = self.call("POST", "/v1.0/logs", _one(value=13, log_id=log_id))
        self.assertEqual(status, 400)
        self.assertIn(log_id, answer["error"]["message"])
        self.assertEqual(self.sandbox.logs, [])
        self.log(12)

    def test_beyond_the_quota_logs_are_403_and_the_rest_goes_on(self):
        self.sandbox.quota = 3
        known = str(uuid.uuid4())
        self.log(1, 2, log_id=known)
        self.assertEqual(self.call("POST", "/v1.0/logs", _many(3))[0], 403)
        self.log(1, 2)
        error = {"code": "QUOTA_EXCEEDED", "message": "monthly log quota exceeded"}
        self.assertEqual(self.call("POST", "/v1.0/logs", _many(1)), (403, {"error": error}))
        self.log(1, log_id=known)  # a resend brings no new log
        self.assertEqual((len(self.sandbox.logs), len(self.ok("GET", "/v1.0/events"))), (3, 1))
        self.sandbox.quota = None
        self.log(1)


class SandboxFaultTest(SandboxCase):
    def statuses(self, *calls):
        return [self.call(*call)[0] for call in calls or [("GET", "/v1.0/events")] * 4]

    def test_faults_meet_so_many_requests_in_the_order_of_scripting(self):
        self.sandbox.fail(2, status=503)
        self.sandbox.fail(status=429)
        self.assertEqual(self.statuses(), [503, 503, 429, 200])

    def test_faults_can_be_for_one_method_and_path(self):
        self.sandbox.fail(method="POST", path="/v1.0/logs", status=500)
        self.sandbox.fail(path="/policies", status=404)
        self.sandbox.fail(0, status=418)
        self.sandbox.fail(method="PUT", status=418)
        self.assertEqual(
            self.statuses(
                ("GET", "/v1.0/events"),
                ("GET", "/v1.0/policies"),
                ("POST", "/v1.0/logs", _one()),
                ("POST", "/v1.0/logs", _one()),
            ),
            [200, 404, 500, 200],
        )

    def test_times_none_lasts_until_reset(self):
        self.sandbox.fail(None, status=500)
        self.assertEqual(self.statuses(), [500] * 4)
        self.sandbox.reset()
        self.assertEqual(self.statuses(), [200] * 4)

    def test_a_scripted_status_takes_nothing_and_can_bring_body_and_headers(self):
        headers = {"Authorization": "Bearer chp_x"}

        def scripted(status, code):
            return b'{"error":{"code":"%s","message":"scripted %d"}}' % (code.encode(), status)

        for fields, expected in (
            ({"status": 500}, (500, scripted(500, "INTERNAL_ERROR"), {})),
            (
                {"status": 302, "headers": {"Location": "http://b"}},
                (302, b"", {"Location": "http://b"}),
            ),
            ({"status": 500, "body": "plain é"}, (500, "plain é".encode(), {})),
            ({"status": 200, "body": b"\xff"}, (200, b"\xff", {})),
            ({"status": 500, "body": ""}, (500, b"", {})),
            ({"status": 400, "body": {"message": "m"}}, (400, b'{"message":"m"}', {})),
            ({"retry_after": 0}, (429, scripted(429, "RATE_LIMITED"), {"Retry-After": "0"})),
            (
                {"status": 503, "retry_after": 1.5},
                (503, scripted(503, "OVERLOADED"), {"Retry-After": "1.5"}),
            ),
            ({}, (502, scripted(502, "INTERNAL_ERROR"), {})),
        ):
            with self.subTest(fields=fields):
                self.sandbox.fail(**fields)
                body = json.dumps(_one()).encode()
                status, content, extra = self.sandbox(
                    "POST", "http://a/v1.0/logs", body, headers, 1
                )
                extra.pop("Content-Type", None)
                self.assertEqual((status, content, extra), expected)
        self.assertEqual(self.sandbox.logs, [])
        self.assertEqual(self.sandbox.requests[0]["body"], _one())
        self.assertEqual(self.sandbox.requests[0]["status"], 500)

    def test_a_connection_dropped_before_or_after_taking_the_request(self):
        for drop, taken in (("before", 0), ("after", 2)):
            self.sandbox.reset()
            self.sandbox.fail(drop=drop)
            with self.assertRaises(ConnectionResetError):
                self.call("POST", "/v1.0/logs", _one())
            self.assertEqual(len(self.sandbox.logs), taken, drop)
            self.assertEqual([r["status"] for r in self.sandbox.requests], [0])
        with self.assertRaises(chirrop.ChirrOpValidationError):
            self.sandbox.fail(drop="during")

    def test_a_delay_is_slept_and_the_request_taken(self):
        self.sandbox.fail(delay=3.0)
        self.assertEqual(self.call("POST", "/v1.0/logs", _one(), timeout=4.0)[0], 200)
        self.assertEqual((self.slept, len(self.sandbox.logs)), ([3.0], 2))

    def test_a_delay_beyond_the_timeout_is_a_timeout_and_takes_nothing(self):
        self.sandbox.fail(delay=3.0)
        with self.assertRaises(TimeoutError):
            self.call("POST", "/v1.0/logs", _one(), timeout=0.5)
        self.assertEqual((self.slept, self.sandbox.logs), ([0.5], []))
        self.assertEqual([r["status"] for r in self.sandbox.requests], [0])

    def test_a_delay_holds_up_no_other_request(self):
        asleep, wake = threading.Event(), threading.Event()
        self.sandbox = Sandbox(sleep=lambda seconds: (asleep.set(), wake.wait(30)))
        self.sandbox.fail(delay=5.0, path="/events")
        slow = threading.Thread(target=self.call, args=("GET", "/v1.0/events"))
        slow.start()
        try:
            self.assertTrue(asleep.wait(30))
            self.assertEqual(self.call("GET", "/v1.0/policies")[0], 200)
        finally:
            wake.set()
            slow.join(30)


class SandboxFlowTest(SandboxCase):
    """The round of a client of another make, which knows the contract alone."""

    def test_the_whole_round(self):
        self.log(2, 3, agent="api", meta={"host": "a"})
        event_id = self.event_id(agent="api")
        data = self.ok(
            "GET",
            f"/v1.0/events/{event_id}/analytics?view=window&period=1h&previous=previous_window",
        )["data"]
        self.assertEqual((data["current_value"], data["current_count"]), (5, 2))
        policy = self.policy(event_id=event_id, threshold=10, severity="error", title="Slow")
        destination = self.ok(
            "POST",
            "/v1.0/destinations",
            {**SLACK, "scope": "policies", "policy_ids": [policy["policy_id"]]},
        )
        test = self.ok("POST", f"/v1.0/destinations/{destination['destination_id']}/test")
        attempts = self.ok("GET", f"/v1.0/alerts/{test['alert_id']}/deliveries?kind=test")
        self.assertEqual([row["status"] for row in attempts], ["sent"])
        self.log(6, agent="api")
        [alert] = self.ok("GET", "/v1.0/alerts?status=triggered")
        self.assertEqual((alert["policy_id"], alert["value"]), (policy["policy_id"], 11))
        path = f"/v1.0/alerts/{alert['alert_id']}"
        [delivery] = self.ok("GET", path + "/deliveries")
        self.assertEqual(delivery["destination_id"], destination["destination_id"])
        for verb, status in (
            ("acknowledge", "acknowledged"),
            ("resolve", "resolved"),
            ("archive", "archived"),
        ):
            self.assertEqual(self.ok("POST", f"{path}/{verb}")["status"], status)
            self.assertEqual(len(self.ok("GET", f"/v1.0/alerts?status={status}")), 1)
        final = self.ok("GET", path)
        self.assertTrue(final["acknowledged_at"] and final["resolved_at"])
        self.assertEqual(self.ok("GET", "/v1.0/alerts?status=triggered"), [])


class SandboxHttpTest(SandboxFlowTest, SandboxRulesTest):
    """The same round and the same rules over HTTP, on one kept connection."""

    def setUp(self):
        super().setUp()
        self.server = self.serve()
        self.connection = http.client.HTTPConnection(*self.server.server_address, timeout=30)
        self.addCleanup(self.connection.close)

    def exchange(self, method, path, body, headers, timeout):
        self.connection.request(method, path, body, headers)
        answer = self.connection.getresponse()
        return answer.status, answer.read(), dict(answer.headers)

    def test_it_listens_on_loopback_only(self):
        self.assertEqual(self.server.server_address[0], "127.0.0.1")

    def test_one_connection_serves_many_requests(self):
        self.log(1)
        first = self.connection.sock
        self.assertEqual(self.call("GET", "/v1.0/nothing")[0], 404)
        self.log(2)
        self.assertIsNotNone(first)
        self.assertIs(self.connection.sock, first)

    def test_an_empty_answer_says_its_length(self):
        headers = {"Authorization": "Bearer chp_x"}
        status, content, answered = self.exchange(
            "POST", "/v1.0/logs", b'[{"event":"a","value":1}]', headers, 1
        )
        self.assertEqual((status, content, answered["Content-Length"]), (200, b"", "0"))

    def test_a_dropped_connection_brings_no_answer(self):
        for drop, taken in (("before", 0), ("after", 2)):
            self.sandbox.reset()
            self.sandbox.fail(drop=drop)
            with self.assertRaises(ConnectionResetError):
                self.call("POST", "/v1.0/logs", _one())
            self.connection.close()
            self.assertEqual(len(self.sandbox.logs), taken)
            self.log(1)

    def test_scripted_headers_and_delays_are_served(self):
        self.sandbox.fail(retry_after=7, delay=2.0)
        headers = {"Authorization": "Bearer chp_x"}
        status, _, answered = self.exchange("GET", "/v1.0/events", None, headers, 1)
        self.assertEqual((status, answered["Retry-After"], self.slept), (429, "7", [2.0]))

    def raw(self, request):
        """Send bytes on a connection of their own, and return all that comes back."""
        with socket.create_connection(self.server.server_address, 30) as client:
            client.sendall(request)
            client.shutdown(socket.SHUT_WR)
            with client.makefile("rb") as answer:
                return answer.read()

    def post(self, headers, body=b"", path=b"/v1.0/logs"):
        """Send a POST with these header lines and this body; return status and error text."""
        head = b"POST %b HTTP/1.1\r\nAuthorization: Bearer chp_x\r\n%b\r\n" % (path, headers)
        answer = self.raw(head + body)
        status = int(answer.split(b" ", 2)[1])
        self.assertEqual(status != 200, b"\r\nConnection: close\r\n" in answer, answer)
        content = answer.partition(b"\r\n\r\n")[2]
        return status, json.loads(content)["error"]["message"] if content else ""

    def test_a_body_of_unclear_length_is_400(self):
        chunked = b"Transfer-Encoding: chunked\r\n"
        for headers, body, words in (
            (b"Content-Length: x\r\n", b"", "Content-Length must be a number of bytes, got 'x'"),
            (b"Content-Length: -1\r\n", b"", "got '-1'"),
            (b"Content-Length: 1.5\r\n", b"", "got '1.5'"),
            (b"Transfer-Encoding: gzip\r\n", b"", "must be chunked, got 'gzip'"),
            (chunked, b"x\r\n", "begin with its size"),
            (chunked, b"-1\r\n", "begin with its size"),
            (chunked, b"1" * 2000 + b"\r\n", "begin with its size"),
            (chunked, b"\r\n", "begin with its size"),
            (chunked, b"2\r\n[]x\r\n0\r\n\r\n", "of the size it gives"),
            (chunked, b"0\r\n" + b"a: b\r\n" * 200, "blank line"),
        ):
            with self.subTest((body or headers)[:40]):
                status, text = self.post(headers, body)
                self.assertEqual((status, words in text), (400, True), text)
        self.assertEqual(self.sandbox.requests, [])

    def test_a_body_in_chunks_is_taken(self):
        body = json.dumps(_many(3)).encode()
        for size, end in (
            (1, b"0\r\n\r\n"),
            (7, b"000\r\nX-Sum: 1\r\n\r\n"),
            (999, b"0;x=y\r\n\r\n"),
        ):
            parts = [body[i : i + size] for i in range(0, len(body), size)]
            chunks = b"".join(b"%x;name=value\r\n%b\r\n" % (len(part), part) for part in parts)
            self.assertEqual(self.post(b"Transfer-Encoding: Chunked\r\n", chunks + end)[0], 200)
        self.assertEqual(len(self.sandbox.logs), 9)

    def test_after_a_body_in_chunks_the_connection_is_kept(self):
        for _ in range(2):
            self.connection.request(
                "POST",
                "/v1.0/logs",
                iter([b'[{"event":"a",', b'"value":1}]']),
                {"Authorization": "Bearer chp_x"},
                encode_chunked=True,
            )
            first = self.connection.sock
            self.assertEqual(self.connection.getresponse().read(), b"")
        self.assertIs(self.connection.sock, first)
        self.assertEqual(len(self.sandbox.logs), 2)

    def test_chunks_without_an_end_are_413_or_no_request(self):
        chunk = b"100000\r\n" + b"x" * 0x100000 + b"\r\n"
        status, text = self.post(b"Transfer-Encoding: chunked\r\n", chunk * 17)
        self.assertEqual((status, text), (413, "a body may have 16777216 bytes"))
        head = b"POST /v1.0/logs HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        for end in (b"ff\r\n[", b"FFFFFFFFFFFFFFFF\r\n["):
            self.assertIn(self.raw(head + end)[:12], (b"", b"HTTP/1.1 413"))
        self.assertEqual(self.sandbox.requests, [])

    def test_a_client_that_waits_for_100_continue_gets_it(self):
        body = json.dumps(_many(2)).encode()
        with socket.create_connection(self.server.server_address, 30) as client:
            client.sendall(
                b"POST /v1.0/logs HTTP/1.1\r\nAuthorization: Bearer chp_x\r\n"
                b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body)
            )
            self.assertTrue(client.recv(1000).startswith(b"HTTP/1.1 100 Continue\r\n\r\n"))
            client.sendall(body)
            self.assertTrue(client.recv(1000).startswith(b"HTTP/1.1 200 OK\r\n"))

    def test_health_needs_no_key_and_is_no_request(self):
        self.sandbox.fail(None, status=503)
        for path in ("/", "/health"):
            status, content, _ = self.exchange("GET", path, None, {}, 1)
            self.assertEqual((status, json.loads(content)), (200, {"status": "ok"}))
            self.assertEqual(self.exchange("HEAD", path, None, {}, 1)[:2], (200, b""))
        self.assertEqual(self.sandbox.requests, [])

    def test_head_is_get_without_the_body_and_options_name_the_methods(self):
        self.log(1)
        headers = {"Authorization": "Bearer chp_x"}
        for path, status in (("/v1.0/events", 200), ("/v1.0/nothing", 404), ("/v1.0/logs", 405)):
            self.assertEqual(self.exchange("HEAD", path, None, headers, 1)[:2], (status, b""))
        self.assertEqual(self.exchange("HEAD", "/v1.0/events", None, {}, 1)[0], 401)
        status, content, answered = self.exchange("OPTIONS", "/v1.0/logs", None, {}, 1)
        self.assertEqual((status, content), (200, b""))
        self.assertEqual(answered["Allow"], "GET, HEAD, OPTIONS, POST, PUT")
        self.assertEqual([r["method"] for r in self.sandbox.requests], ["POST"] + ["HEAD"] * 4)
        raw = self.sandbox("HEAD", "http://a/v1.0/events", None, headers, 1)
        self.assertEqual(raw[:2], (200, b""))

    def test_a_compressed_body_is_415_and_says_why(self):
        headers = {"Authorization": "Bearer chp_x", "Content-Encoding": "gzip"}
        status, content, _ = self.exchange("POST", "/v1.0/logs", b"\x1f\x8b", headers, 1)
        error = json.loads(content)["error"]
        self.assertEqual((status, error["code"]), (415, "UNSUPPORTED_MEDIA_TYPE"))
        self.assertIn("plain JSON, without Content-Encoding 'gzip'", error["message"])
        headers["Content-Encoding"] = "identity"
        self.assertEqual(self.exchange("POST", "/v1.0/logs", b"[]", headers, 1)[0], 400)

    def test_the_header_that_is_refused_is_named(self):
        for name, value in (("Host", "sandbox:8125"), ("Origin", "https://evil.example")):
            status, content, _ = self.exchange("GET", "/health", None, {name: value}, 1)
            self.assertEqual(status, 403)
            self.assertIn(f"{name} {value!r} is refused", json.loads(content)["error"]["message"])
            self.connection.close()
        for value in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:8125", ""):
            self.assertEqual(self.exchange("GET", "/health", None, {"Host": value}, 1)[0], 200)

    def test_on_an_address_that_others_reach_any_host_will_do_and_web_pages_still_not(self):
        try:
            server = self.serve("127.0.0.2")
        except OSError:
            self.skipTest("this system has one loopback address")
        for headers, status in (({"Host": "sandbox:8125"}, 200), ({"Origin": "http://a"}, 403)):
            connection = http.client.HTTPConnection(*server.server_address, timeout=30)
            self.addCleanup(connection.close)
            connection.request("GET", "/health", None, headers)
            self.assertEqual(connection.getresponse().status, status)

    def test_a_body_too_large_is_413_also_for_a_client_that_sends_it_all(self):
        for length, body in ((16 * 1024 * 1024 + 1, b"x" * (16 * 1024 * 1024 + 1)), (10**30, b"")):
            self.connection.putrequest("POST", "/v1.0/logs")
            self.connection.putheader("Content-Length", str(length))
            self.connection.endheaders(body)
            answer = self.connection.getresponse()
            self.assertEqual(answer.status, 413)
            self.assertEqual(json.loads(answer.read())["error"]["code"], "PAYLOAD_TOO_LARGE")
            self.connection.close()

    def test_a_body_cut_short_is_not_taken(self):
        self.connection.putrequest("POST", "/v1.0/logs")
        self.connection.putheader("Authorization", "Bearer chp_x")
        self.connection.putheader("Content-Length", "1000")
        self.connection.endheaders(b'[{"event":"a","value":1}]')
        self.connection.sock.shutdown(1)
        with self.assertRaises(ConnectionResetError):
            self.connection.getresponse()
        self.connection.close()
        self.assertEqual(self.sandbox.requests, [])

    def test_a_client_that_hangs_up_leaves_no_trace_on_stderr(self):
        entered, leave, left = threading.Event(), threading.Event(), threading.Event()

        def hold(*request):
            entered.set()
            leave.wait(30)
            return 200, b"x" * 10_000_000, {}

        shut = self.server.shutdown_request
        self.server.shutdown_request = lambda request: (shut(request), left.set())
        self.sandbox = hold
        with redirect_stderr(io.StringIO()) as stderr:
            with socket.create_connection(self.server.server_address, 30) as client:
                client.sendall(b"GET /v1.0/events HTTP/1.1\r\n\r\n")
                self.assertTrue(entered.wait(30))
            leave.set()
            self.assertTrue(left.wait(30))
        self.assertEqual(stderr.getvalue(), "")


# The tours that clients of other makes take through the API, as they were seen on the wire:
# METHOD PATH [BODY] -> STATUS [SHAPE or CODE]. {event_id1} is the second event that an answer
# named, <id> a new UUID, <now> the time in nine digits, <500> as many logs.
SANDBOX_TOURS = {
    "go": """
POST /logs [{"log_id": "<id>", "agent": "go.1", "event": "tool.errors.count", "value": 1, "meta":
  {"tool_name": "browser.open"}, "occurred_at": "0001-01-01T00:00:00Z"}] -> 200
GET /events -> 200 [Event]
POST /logs [{"log_id": "<id>", "agent": "go.1", "event": "tool.errors.count", "value": 1, "meta":
  {"tool_name": "browser.open"}, "occurred_at": "<now>"}] -> 200
GET /events -> 200 [Event]
GET /events/{event_id} -> 200 Event
PUT /events/{event_id} {"title": "OpenClaw Tool Errors"} -> 200 Event
POST /events {"agent": "go.1.b", "event": "tool.errors.count"} -> 200 Event
GET /events/{event_id}/analytics?period=1h&previous=previous_window&view=window -> 200 Analytics
GET /events/{event_id}/logs?limit=25&period=hour -> 200 [Rollup]
POST /policies {"event_id": "{event_id}", "title": "OpenClaw tool errors spike", "period": "hour",
  "aggregate": "sum", "condition": "gt", "threshold": 5, "enabled": true} -> 200 Policy
GET /policies -> 200 [Policy]
GET /policies/{policy_id} -> 200 Policy
PUT /policies/{policy_id} {"event_id": "", "title": "Updated", "condition": "", "threshold": 0,
  "enabled": false} -> 200 Policy
PUT /policies/{policy_id} {"policy_id": "{policy_id}", "event_id": "{event_id}", "title":
  "Updated", "channel": "ops", "period": "hour", "aggregate": "sum", "condition": "gt",
  "threshold": 5, "severity": "warning", "enabled": true} -> 200 Policy
POST /destinations {"channel": "slack", "url":
  "https://hooks.slack.com/services/T000/B000/secret", "scope": "all", "enabled": true} -> 200
  Destination
POST /destinations {"channel": "telegram", "credentials": {"bot_token":
  "123456:telegram-bot-token", "chat_id": "987654321"}, "scope": "all", "enabled": true} -> 200
  Destination
GET /destinations -> 200 [Destination]
GET /destinations/{destination_id} -> 200 Destination
PUT /destinations/{destination_id} {"channel": "", "scope": "", "enabled": false} -> 200 Destination
POST /destinations/{destination_id}/test -> 200 Test
GET /alerts/{alert_id}/deliveries?kind=test&limit=20 -> 200 [Delivery]
POST /logs [{"log_id": "<id>", "agent": "go.1", "event": "tool.errors.count", "value": 10,
  "occurred_at": "<now>"}] -> 200
GET /alerts?status=triggered -> 200 [Alert]
GET /alerts/{alert_id1} -> 200 Alert
GET /alerts/{alert_id1}/deliveries?kind=alert&limit=20 -> 200 [Delivery]
POST /alerts/{alert_id1}/acknowledge -> 200 Alert
POST /alerts/{alert_id1}/resolve -> 200 Alert
POST /alerts/{alert_id1}/archive -> 200 Alert
POST /logs <500> -> 400 BAD_REQUEST
POST /logs <499> -> 400 BAD_REQUEST
POST /logs <1> -> 200
GET /events -> 200 [Event]
GET /events/{event_id2}/logs?period=day -> 200 [Rollup]
""",
    "javascript": """
POST /logs [{"log_id": "<id>", "event": "tool.errors.count", "value": 1, "agent": "js.1", "meta":
  {"tool_name": "crm.lookup"}}, {"log_id": "<id>", "event": "tool.errors.count", "value": 2.5,
  "agent": "js.1", "occurred_at": "2026-03-04T09:39:06.948Z"}, {"log_id": "<id>", "event":
  "tool.errors.count", "value": 0, "agent": "js.1"}, {"log_id": "<id>", "event":
  "tool.errors.count", "value": -1, "agent": "js.1", "meta": [1]}, {"log_id": "<id>", "event":
  "tool.errors.count", "value": 1, "agent": "js.1", "occurred_at": "<now>"}] -> 200
GET /events -> 200 [Event]
GET /events/{event_id} -> 200 Event
PUT /events/{event_id} {"title": "T", "public": true} -> 200 Event
GET /events/{event_id} -> 200 Event
GET /events/{event_id} -> 200 Event
PUT /events/{event_id} {"event_id": "{event_id}", "event": "tool.errors.count", "agent": "js.1",
  "title": "T", "description": "", "unit": "", "timezone": "UTC", "public": true, "share_token":
  "<id>", "user_id": "<id>", "created_at": "<now>"} -> 200 Event
POST /events {"event": "task.duration_ms", "agent": "js.1", "description": "d", "unit": "ms",
  "timezone": "UTC", "public": true} -> 200 Event
POST /events {"event": "tool.errors.count2.js.1"} -> 200 Event
GET /events/{event_id}/logs?period=hour&limit=25&offset=0 -> 200 [Rollup]
GET /events/{event_id}/logs -> 400 BAD_REQUEST
GET /events/{event_id}/analytics?view=window&period=1h&previous=previous_window -> 200 Analytics
GET /events/{event_id1}/analytics?view=window&period=1h&previous=previous_1d -> 200 Analytics
POST /policies {"event_id": "{event_id}", "title": "OpenClaw tool errors last hour", "channel":
  "ops", "period": "hour", "aggregate": "sum", "condition": "gt", "threshold": 1, "severity":
  "warning", "enabled": true} -> 200 Policy
POST /policies {"event_id": "{event_id}", "title": "x", "period": "hour", "aggregate": "sum",
  "condition": "gt", "threshold": 5, "severity": "warning", "enabled": true} -> 200 Policy
GET /policies -> 200 [Policy]
GET /policies/{policy_id} -> 200 Policy
PUT /policies/{policy_id} {"title": "Updated"} -> 200 Policy
POST /destinations {"channel": "slack", "url":
  "https://hooks.slack.com/services/T000/B000/secret", "scope": "all", "policy_ids": [],
  "enabled": true} -> 200 Destination
POST /destinations {"channel": "telegram", "enabled": true, "scope": "all", "policy_ids": [],
  "credentials": {"bot_token": "1:x", "chat_id": "98"}} -> 200 Destination
POST /destinations {"channel": "email", "enabled": true, "scope": "all", "policy_ids": []} -> 200
  Destination
POST /destinations {"channel": "email", "url": "ops@example.com", "enabled": true, "scope": "all",
  "policy_ids": []} -> 200 Destination
POST /destinations {"channel": "discord", "url":
  "https://discord.com/api/webhooks/123456/webhook-token", "enabled": true, "scope": "all",
  "policy_ids": []} -> 200 Destination
POST /destinations {"channel": "webhook", "url": "https://example.com/chirpier/alerts",
  "credentials": {"authorization": "Bearer x"}, "enabled": true, "scope": "all", "policy_ids": []}
  -> 200 Destination
GET /destinations -> 200 [Destination]
GET /destinations/{destination_id} -> 200 Destination
PUT /destinations/{destination_id} {"enabled": true} -> 200 Destination
POST /destinations/{destination_id}/test -> 200 Test
GET /alerts/{alert_id}/deliveries?kind=test -> 200 [Delivery]
GET /alerts/{alert_id}/deliveries -> 200 []
GET /alerts/{alert_id} -> 404 NOT_FOUND
POST /logs [{"log_id": "<id>", "event": "tool.errors.count", "value": 10, "agent": "js.1"}] -> 200
GET /alerts?status=triggered -> 200 [Alert]
GET /alerts/{alert_id1} -> 200 Alert
GET /alerts/{alert_id1}/deliveries?kind=alert&limit=2&offset=0 -> 200 [Delivery]
POST /alerts/{alert_id1}/acknowledge -> 200 Alert
POST /alerts/{alert_id1}/resolve -> 200 Alert
POST /alerts/{alert_id1}/archive -> 200 Alert
POST /alerts/{alert_id1}/acknowledge -> 422 UNPROCESSABLE
GET /events/evt_123 -> 400 BAD_REQUEST
POST /logs <500> -> 400 BAD_REQUEST
POST /logs <500> -> 400 BAD_REQUEST
GET /events -> 200 [Event]
""",
    "python 0.1.0": """
POST /logs [{"event": "task.duration_ms", "value": 420, "agent": "py.1", "log_id": "<id>", "meta":
  {"task_name": "email_triage"}}] -> 200
POST /logs [{"event": "task.duration_ms", "value": 1530, "agent": "py.1", "log_id": "<id>",
  "occurred_at": "2026-03-04T08:39:29.014203Z"}, {"event": "task.duration_ms", "value": 1530,
  "agent": "py.1", "log_id": "<id>", "occurred_at": "2026-03-04T08:39:29.014256Z"}, {"event":
  "task.duration_ms", "value": 1, "agent": "py.1", "log_id": "<id>", "occurred_at":
  "2026-03-04T08:39:29+00:00"}, {"event": "task.duration_ms", "value": 1, "log_id": "<id>"},
  {"event": "a.b", "value": 1, "log_id": "<id>"}, {"event": "a.c", "value": 1.5, "agent": "py.1",
  "log_id": "<id>", "meta": "text"}] -> 200
GET /events -> 200 [Event]
GET /events/{event_id}/analytics?view=window&period=1h&previous=previous_window -> 200 Analytics
POST /events {"event": "tool.errors.count"} -> 200 Event
POST /events {"event": "tool.errors.count"} -> 422 UNPROCESSABLE
PUT /events/{event_id} {"description": "OpenClaw Tool Errors"} -> 200 Event
POST /policies {"event_id": "{event_id}", "title": "OpenClaw tool errors spike", "condition":
  "gt", "threshold": 5, "period": "hour", "aggregate": "sum", "enabled": true} -> 200 Policy
POST /policies {"event_id": "{event_id}", "title": "Policy", "condition": "gt", "threshold": 1} ->
  400 BAD_REQUEST
PUT /policies/{policy_id} {"title": "Updated"} -> 200 Policy
POST /destinations {"channel": "slack", "url":
  "https://hooks.slack.com/services/T000/B000/secret", "scope": "all", "policy_ids": [],
  "enabled": true} -> 200 Destination
POST /destinations {"channel": "slack", "scope": "all", "enabled": true} -> 400 BAD_REQUEST
GET /destinations/{destination_id} -> 200 Destination
PUT /destinations/{destination_id} {"enabled": true} -> 200 Destination
POST /destinations/{destination_id}/test -> 200 Test
GET /alerts/{alert_id}/deliveries?kind=test -> 200 [Delivery]
POST /logs [{"event": "task.duration_ms", "value": 420, "agent": "py.1", "log_id": "<id>"}] -> 200
GET /alerts?status=triggered -> 200 [Alert]
GET /alerts/{alert_id1} -> 200 Alert
GET /alerts/{alert_id1}/deliveries?kind=alert&limit=20&offset=0 -> 200 [Delivery]
GET /events/{event_id}/logs?period=hour&limit=25&offset=0 -> 200 [Rollup]
GET /events/{event_id}/logs -> 400 BAD_REQUEST
POST /alerts/{alert_id1}/acknowledge -> 200 Alert
POST /alerts/{alert_id1}/resolve -> 200 Alert
POST /alerts/{alert_id1}/archive -> 200 Alert
POST /logs <500> -> 400 BAD_REQUEST
POST /logs <1> -> 200
POST /logs <499> -> 400 BAD_REQUEST
GET /events -> 200 [Event]
GET /events/{event_id5}/logs?period=day -> 200 [Rollup]
""",
}
# What these clients send with every request, with a body, and with a POST that has none.
SANDBOX_TOURISTS = {
    "go": (
        {"User-Agent": "chirpier-go/0.4.0", "Accept-Encoding": "gzip"},
        *[{"Content-Type": "application/json"}] * 2,
    ),
    "javascript": (
        {
            "User-Agent": "chirpier-js/0.4.0",
            "Accept": "application/json, text/plain, */*",
            "Connection": "keep-alive",
        },
        {"Content-Type": "application/json"},
        {"Content-Type": "application/x-www-form-urlencoded"},
    ),
    "python 0.1.0": (
        {"User-Agent": "chirrop-py/0.4.0", "Accept-Encoding": "gzip, deflate", "Accept": "*/*"},
        {"Content-Type": "application/json"},
        {},
    ),
}
# The contract's objects; the first name is that of the id.
SANDBOX_SHAPES = {
    "Event": "event_id event agent title description unit timezone public share_token user_id"
    " created_at",
    "Rollup": "event_id agent event period occurred_at count value squares min max",
    "Analytics": "event_id view period previous data",
    "Policy": "policy_id event_id title description channel period aggregate condition threshold"
    " severity enabled",
    "Alert": "alert_id policy_id event_id agent event title channel period aggregate condition"
    " threshold severity status value count min max triggered_at acknowledged_at resolved_at",
    "Delivery": "attempt_id alert_id destination_id channel target status response_status"
    " error_message created_at",
    "Destination": "destination_id channel url credentials scope policy_ids enabled created_at"
    " updated_at last_delivered_at last_error",
    "Test": "alert_id destination_id status",
}


class SandboxTourTest(SandboxCase):
    """Clients of other makes, request by request over one kept connection, as they talk."""

    def setUp(self):
        super().setUp()
        self.connection = http.client.HTTPConnection(*self.serve().server_address, timeout=30)
        self.addCleanup(self.connection.close)
        self.known = {}  # {event_id1} and its like -> the id

    def filled(self, text):
        for name, found in self.known.items():
            text = text.replace(name, found)
        text = text.replace("<now>", f"{self.now:%Y-%m-%dT%H:%M:%S}.207006441Z")
        count = re.match(r"<(\d+)>$", text)
        if count:
            text = json.dumps([{"log_id": "<id>", "event": "big.x", "value": 1}] * int(count[1]))
        return re.sub("<id>", lambda _: str(uuid.uuid4()), text)

    def learn(self, kind, answer):
        """Check the shape of an answer, and number the ids in it in the order of their coming."""
        for item in answer if isinstance(answer, list) else [answer]:
            names = SANDBOX_SHAPES[kind].split()
            self.assertEqual(set(item), set(names))
            same = [name for name in self.known if name.startswith("{" + names[0])]
            if item[names[0]] not in self.known.values():
                self.known[f"{{{names[0]}{len(same) or ''}}}"] = item[names[0]]

    def tour(self, client):
        always, with_body, without = SANDBOX_TOURISTS[client]
        for line in SANDBOX_TOURS[client].replace("\n  ", " ").strip().splitlines():
            with self.subTest(line[:120]):
                request, _, expected = line.rpartition(" -> ")
                method, path, *rest = request.split(" ", 2)
                body = self.filled(rest[0]) if rest else ""
                extra = with_body if body else without if method == "POST" else {}
                extra = with_body if client == "go" else extra  # with GET, too
                self.connection.request(
                    method,
                    "/v1.0" + self.filled(path),
                    body or None,
                    {**always, **extra, "Authorization": "Bearer chp_tour"},
                )
                response = self.connection.getresponse()
                content = response.read()
                status, _, kind = expected.partition(" ")
                self.assertEqual(response.status, int(status), content)
                answer = json.loads(content) if content else None
                if kind.isupper():
                    self.assertEqual(answer["error"]["code"], kind)
                    self.assertTrue(answer["error"]["message"])
                elif kind in ("", "[]"):
                    self.assertEqual(answer, [] if kind else None)
                else:
                    self.assertEqual(isinstance(answer, list), kind.startswith("["))
                    self.assertTrue(answer)
                    self.learn(kind.strip("[]"), answer)

    def test_go(self):
        self.tour("go")
        [first, *_] = self.sandbox.logs
        self.assertEqual(first["occurred_at"], self.now.isoformat()[:-6] + "Z")  # was year 1
        [policy] = self.ok("GET", "/v1.0/policies")
        self.assertEqual((policy["condition"], policy["title"]), ("gt", "Updated"))
        destination = self.ok("GET", "/v1.0/destinations")[0]
        self.assertEqual(
            (destination["channel"], destination["scope"], destination["enabled"]),
            ("slack", "all", False),
        )

    def test_javascript(self):
        self.tour("javascript")

    def test_python(self):
        self.tour("python 0.1.0")

    def test_every_number_of_the_analytics_is_a_number(self):
        self.tour("javascript")
        path = "/v1.0/events/{event_id}/analytics?view=window&period=1h&previous=previous_window"
        data = self.ok("GET", self.filled(path))["data"]
        self.assertEqual(len(data), 14)
        self.assertEqual({type(value) for value in data.values()} - {int, float}, set())


class SandboxAgainstSdkTest(SandboxCase):
    """The sandbox's rules and the SDK's, which know nothing of each other, on the same input."""

    LOGS = rounds(500, 40_000)
    TEXTS = (
        "",
        " ",
        "\t\n",
        "a",
        " a.b ",
        "\x1c",
        "\u2003",
        "\u200b",
        "\ud800",
        "\0",
        "ü",
        "x" * 5000,
    )
    OTHERS = (5, 0, True, False, [], {}, ["a"], {"a": 1})
    BIG = int(sys.float_info.max)
    NUMBERS = (0, -0.0, 1.5, -3, 2**63, 1e-320, 1e308, BIG, -BIG, BIG + 2**969, 10**300)
    NO_NUMBERS = (
        None, True, "1", "", [], {}, 10**400, BIG + 2**970, float("nan"), float("inf"),
    )  # fmt: skip

    def moment(self, rng):
        """Return a time near one of the limits, or anywhere, in one of many forms."""
        near = rng.choice((timedelta(days=-30), timedelta(days=1), timedelta(), timedelta(days=-9)))
        step = rng.choice(
            (0, 0, 1, -1, 10**6, -(10**6), rng.randrange(10**12), -rng.randrange(10**12))
        )
        at = self.now + near + timedelta(microseconds=step)
        zone = timezone(timedelta(minutes=rng.choice((0, 0, 330, -765, 1439, -1439))))
        text = at.astimezone(zone).isoformat()
        for old, new in (
            ("+00:00", "Z"), ("T", rng.choice("T t")), ("Z", rng.choice("Zz")),
            (".", rng.choice(".,")), (":00+", "+"), (text[-3:], text[-2:]),
            (text[-6:], ""), ("Z", "123Z"), ("Z", ".Z"),
        ):  # fmt: skip
            text = text.replace(old, new) if rng.random() < 0.2 else text
        return text

    @staticmethod
    def mutated(rng, text):
        place = rng.randrange(len(text) + 1)
        piece = rng.choice(("", "-", "_", "+", "0", "9", "g", " ", "{", "\u0661", ":", "99"))
        return text[:place] + piece + text[place + rng.choice((0, 1)) :]

    def log_id(self, rng):
        text = str(uuid.UUID(int=rng.getrandbits(128)))
        forms = (
            text,
            text.upper(),
            f" {text} ",
            f"{{{text}}}",
            "urn:uuid:" + text,
            text.replace("-", ""),
        )
        return rng.choice(forms)

    @staticmethod
    def meta(rng):
        text = rng.choice(("x", "é", "\U0001f600", '"', "\n", "\x1f", "\u2028"))
        unit = len(json.dumps(text, ensure_ascii=False).encode()) - 2
        size = (1022 + rng.choice((0, 0, -9, 1, unit))) // unit
        return rng.choice((
            text * size, {"k": text * (size - 6)}, [text] * rng.randrange(500),
            nested(rng.randrange(1, 600)), [{str(n): n for n in range(20)}],
            {str(n): n for n in range(rng.choice((0, 1, 9, 10, 11)))}, {"a": {"\udfff": 1}},
            None, True, 1.5, 10**400, "", "\ud800", float("nan"), [float("inf")],
        ))  # fmt: skip

    def random_log(self, rng):
        """Return a log that is good but for about one field."""
        log = {"event": "a.b", "value": rng.choice(self.NUMBERS)}
        for name, make in (
            ("event", lambda: rng.choice(self.TEXTS + self.OTHERS + (None,))),
            ("value", lambda: rng.choice(self.NO_NUMBERS + self.NUMBERS)),
            ("agent", lambda: rng.choice(self.TEXTS + self.OTHERS + (None,))),
            ("log_id", lambda: rng.choice((*self.OTHERS, None, "", " ", "abc"))),
            ("log_id", lambda: self.log_id(rng)),
            ("log_id", lambda: self.mutated(rng, self.log_id(rng))),
            ("occurred_at", lambda: rng.choice((*self.OTHERS, None, "", " ", "now", "2026-03-04"))),
            ("occurred_at", lambda: self.moment(rng)),
            ("occurred_at", lambda: self.mutated(rng, self.moment(rng))),
            ("meta", lambda: self.meta(rng)),
        ):
            if rng.random() < 0.12:
                log[name] = make()
        return log

    def taken(self, body):
        """Return the log as the sandbox keeps it, or None where it refuses it."""
        self.sandbox.reset()
        headers = {"Authorization": "Bearer chp_x"}
        status, _, _ = self.sandbox("POST", "http://a/v1.0/logs", b"[%b]" % body, headers, 1)
        return self.sandbox.logs[0] if status == 200 else None

    @staticmethod
    def explained(log):
        """Tell whether the SDK takes more than the service, because it sends another form of it."""
        text = str(log.get("log_id")).strip().lower()
        digits = re.sub("urn:|uuid:|[-{}]", "", text)
        return (
            bool(re.fullmatch("[0-9a-f]{32}", digits))
            and "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))
            != text
        )

    def difference(self, log):
        """Return where the two part on a log, or None."""
        raw = self.taken(json.dumps(log).encode())
        try:
            sent = Log(**log)._body
        except chirrop.ChirrOpValidationError as exc:
            return raw and f"the sandbox takes what the SDK refuses: {exc}"
        kept = self.taken(sent)
        if kept != json.loads(sent.replace(b".000000Z", b"Z")):
            return "the sandbox refuses or changes what the SDK sends"
        if raw is None:
            return None if self.explained(log) else "the sandbox refuses what the SDK takes"
        for made in ("log_id", "occurred_at"):
            if not str(log.get(made) or "").strip():
                raw.pop(made), kept.pop(made)
        return None if raw == kept else f"{raw} is not {kept}"

    def differences(self, count, seed=1):
        """Yield each difference on so many random logs; count in `both` those that both take."""
        rng, self.both = random.Random(seed), 0
        with mock.patch.object(time, "time", self.now.timestamp):
            for _ in range(count):
                log = self.random_log(rng)
                difference = self.difference(log)
                self.both += difference is None and self.sandbox.logs != []
                if difference:
                    yield f"{difference}\n    {log!r:.300}"

    def test_they_part_on_none_of_thousands_of_random_logs(self):
        found = [*self.differences(self.LOGS)]
        self.assertEqual("\n".join(found[:20]), "")
        self.assertGreater(self.both, self.LOGS * 0.3)
        self.assertLess(self.both, self.LOGS * 0.7)

    def test_a_rule_broken_in_either_is_noticed(self):
        fits, kept = chirrop._sandbox_fits, chirrop._sandbox_log
        for target, name, broken in (
            (chirrop, "MAX_META_BYTES", 1100), (chirrop, "MAX_META_KEYS", 11),
            (chirrop, "MAX_AGE_SECONDS", 31 * 86400.0),
            (chirrop, "MAX_AHEAD_SECONDS", 86399.0), (chirrop, "_number", lambda value: 1),
            (chirrop, "_trimmed", lambda name, value: str(value)), (chirrop, "_canonical_id", str),
            (chirrop, "_encode_meta", json.dumps),
            (chirrop, "_sandbox_id", lambda name, text: text),
            (chirrop, "_sandbox_fits", lambda value, rule: value is True or fits(value, rule)),
            (chirrop, "_sandbox_time", lambda text: self.now),
            (chirrop, "_sandbox_log", lambda fields, now: kept({**fields, "meta": None}, now)),
            (chirrop, "_sandbox_log", lambda fields, now: kept({**fields, "event": "a.b"}, now)),
        ):  # fmt: skip
            with self.subTest(name), mock.patch.object(target, name, broken):
                self.assertTrue(next(self.differences(10_000), None))

    def word_calls(self, client):
        """Yield a call for each place that takes a word of a vocabulary."""
        self.log(1)
        self.policy()
        self.log(1)
        event_id, alert_id = self.event_id(), self.ok("GET", "/v1.0/alerts")[0]["alert_id"]
        rule = {"event_id": event_id, "period": "day", "aggregate": "sum", "condition": "eq"}
        chat = {**SLACK, "credentials": {"bot_token": "x", "chat_id": "y"}}
        for name in ("period", "aggregate", "condition", "severity"):
            yield lambda word: client.create_policy({**rule, "threshold": 1, name: word})
        yield lambda word: client.create_destination({**chat, "channel": word})
        yield client.list_alerts
        yield lambda word: client.get_event_logs(event_id, word)
        yield lambda word: client.get_alert_deliveries(alert_id, kind=word)
        yield lambda word: client.get_event_analytics(event_id, view=word)
        yield lambda word: client.get_event_analytics(event_id, period=word)
        for period in chirrop._SANDBOX_SPANS:
            yield lambda word: client.get_event_analytics(event_id, period=period, previous=word)

    @staticmethod
    def passes(call, word, refusal):
        try:
            call(word)
        except ChirrOpError as exc:
            return not isinstance(exc, refusal)
        return True

    def word_differences(self):
        """Yield each word that a client lets pass and the sandbox does not, or the reverse."""
        tables = [value for name, value in vars(chirrop).items() if re.fullmatch("_[A-Z_]+S", name)]
        fields = [rule for kind in chirrop._SANDBOX_FIELDS.values() for rule, _ in kind.values()]
        words = [w for table in tables + fields if type(table) is tuple for w in table]
        words = {w for w in words if type(w) is str} | {
            *chirrop._SANDBOX_SPANS,
            "week",
            "HOUR",
            "previous_1h",
            "2h",
        }
        self.assertGreater(len(words), 35)
        pairs = dict.fromkeys(words, ())
        with new_client(api_key="chp_x", transport=self.sandbox) as client:
            for number, call in enumerate(self.word_calls(client)):
                for word in sorted(words):
                    told = self.passes(call, word, chirrop.ChirrOpValidationError)
                    let_pass = mock.patch.object(chirrop, "_choice", lambda name, value, _: value)
                    with let_pass, mock.patch.object(chirrop, "_ANALYTICS_PAIRS", pairs):
                        if self.passes(call, word, ChirrOpError) != told:
                            yield number, word

    def test_they_know_the_same_words(self):
        self.assertEqual([*self.word_differences()], [])

    def test_a_word_that_one_does_not_know_is_noticed(self):
        fields = chirrop._SANDBOX_FIELDS["policies"]
        others = {**fields, "condition": (("gt", "ne"), ...)}
        for target, name, broken in (
            (chirrop, "_POLICY_RULES", {**chirrop._POLICY_RULES, "severity": ("info", "bad")}),
            (chirrop, "_ANALYTICS_PAIRS", {**chirrop._ANALYTICS_PAIRS, "1m": chirrop._PREVIOUS}),
            (chirrop, "_SANDBOX_STATUSES", (*chirrop._SANDBOX_STATUSES, "new")),
            (chirrop, "_SANDBOX_FIELDS", {**chirrop._SANDBOX_FIELDS, "policies": others}),
        ):  # fmt: skip
            with self.subTest(name), mock.patch.object(target, name, broken):
                self.sandbox.reset()
                with contextlib.closing(self.word_differences()) as differences:
                    self.assertTrue(next(differences, None))


# ---- Command line ---------------------------------------------------------

CANARY = "chp_canary_7f3a9"  # must show up nowhere
CLI = [sys.executable, "-W", "error", "-m", "chirrop"]  # as a script, each would compile it anew


class CommandLineCase(TestCase):
    """Real processes against a sandbox that this process serves."""

    @classmethod
    def setUpClass(cls):
        cls.sandbox = chirrop.Sandbox()
        cls.server = chirrop._serve_sandbox(cls.sandbox)
        thread = threading.Thread(target=cls.server.serve_forever, args=(0.01,))
        thread.start()
        cls.addClassCleanup(
            lambda: (cls.server.shutdown(), thread.join(LONG), cls.server.server_close())
        )

    def setUp(self):
        super().setUp()
        self.sandbox.reset()
        self.base = f"http://127.0.0.1:{self.server.server_address[1]}/v1.0"
        os.environ.update(
            CHIRROP_API_KEY=CANARY,
            CHIRROP_API_ENDPOINT=f"{self.base}/logs",
            CHIRROP_SERVICER_ENDPOINT=self.base,
            PYTHONPATH=str(HERE),
        )
        for name in ("NO_COLOR", "COLUMNS", "LINES"):
            os.environ.pop(name, None)
        self.cwd = self.folder()  # without a .env

    def cli(self, *args, status=0, input="", **env):
        """Run a command; return its standard output and error after the checks that always hold.

        A process in a full run; in a quick one it runs in this process, as far as that is the same.
        """
        data = input if isinstance(input, bytes) else input.encode()
        if not FULL:
            self.addCleanup(os.chdir, os.getcwd())
            os.chdir(self.cwd)
            with mock.patch.dict(os.environ, {"COLUMNS": "80", **env}):
                return self.main(*args, status=status, input=data)
        done = subprocess.run(
            [*CLI, *args],
            input=data,
            capture_output=True,
            cwd=self.cwd,
            timeout=LONG,
            env={**os.environ, **env},
        )
        out, err = done.stdout.decode(), done.stderr.decode()
        self.check(out, err)
        self.assertEqual(done.returncode, status, (args, out, err))
        return out, err

    def main(self, *args, status=0, input=b""):
        """Run a command in this process; return its standard output and error."""
        encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
        pipes = [io.BytesIO(input), io.BytesIO(), io.BytesIO()]
        stdin, stdout, stderr = (io.TextIOWrapper(pipe, encoding) for pipe in pipes)
        with mock.patch.multiple(sys, stdin=stdin, stdout=stdout, stderr=stderr):
            code = chirrop.main(list(args))
            stdout.flush(), stderr.flush()
        out, err = (pipe.getvalue().decode() for pipe in pipes[1:])
        self.check(out, err)
        self.assertEqual(code, status, (args, out, err))
        return out, err

    def check(self, *texts):
        for text in texts:
            self.assertNotIn(CANARY, text)
            self.assertNotIn("Traceback", text)

    def json(self, *args, **options):
        out, _ = self.cli(*args, "--json", **options)
        return json.loads(out)

    def start(self, *args):
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        process = subprocess.Popen([*CLI, *args], cwd=self.cwd, **pipes)
        self.addCleanup(lambda: (process.kill(), process.communicate()))
        return process

    def send(self, *values, event="tool.errors.count", **fields):
        client = new_client(api_key=CANARY)
        client.send_logs([Log(event, value, **fields) for value in values])
        self.assertTrue(client.close())


class CommandLineTest(CommandLineCase):
    def test_version(self):
        self.assertEqual(self.cli("--version"), (f"chirrop {chirrop.__version__}\n", ""))

    def test_every_command_has_help(self):
        commands = [name[5:] for name in vars(chirrop) if name.startswith("_cmd_")]
        self.assertEqual(len(commands), 10)
        for command in commands:
            with self.subTest(command):
                self.assertIn("--json", self.main(command, "--help")[0])
                self.assertIn(command, self.main("--help")[0])

    def test_usage_errors_exit_with_2_and_print_nothing_on_standard_output(self):
        self.send(1, event="x")
        for args in (
            (), ("nope",), ("log",), ("log", "x"), ("log", "x", "abc"), ("log", "x", "nan"), ("log", " ", "1"),
            ("log", "x", "1", "--meta", "{"), ("log", "x", "1", "--log-id", "7"), ("log", "-", "1"),
            ("log", "x", "1", "--occurred-at", "soon"), ("log", "-", "--agent", "a"), ("rollups",),
            ("rollups", "x", "--period", "year"), ("rollups", "x", "--limit", "0"),
            ("analytics", "x", "--period", "1d", "--previous", "previous_1d"),
            ("alerts", "ack"), ("alerts", "lose", "x"), ("alerts", "--status", "new"), ("api", "GET"),
            ("api", "GET", "/a b"), ("api", "PUT", "/events", "--data", "{"), ("drain", "no-such-file"),
            ("sandbox", "--port", "x"), ("sandbox", "--port", "70000"), ("doctor", "--key", "chp_x"),
            ("log", "x", "1", "--id-from", "event"), ("log", "-", "--id-from"),
            ("--agent", "a"), ("--json",),
            ("events", "--agent", "a"), ("rollups", "x", "--agent"), ("log", "x", "1", "2"),
        ):  # fmt: skip
            with self.subTest(args):
                out, err = self.main(*args, status=2)
                self.assertEqual(out, "")
                self.assertTrue(err)
        self.assertEqual({log["event"] for log in self.sandbox.logs}, {"x"})

    def test_a_missing_key_exits_with_2_in_one_line(self):
        for args in (
            ("events",),
            ("log", "x", "1"),
            ("log", "-"),
            ("api", "GET", "/events"),
            ("alerts",),
        ):
            with self.subTest(args):
                out, err = self.cli(*args, status=2, CHIRROP_API_KEY="")
                self.assertEqual(out, "")
                self.assertRegex(err, r"^chirrop: API key is required: give .*\./\.env\n$")

    def test_an_error_of_the_service_exits_with_1_in_one_line(self):
        self.sandbox.fail(status=403, body={"error": "not\x1b[2J you"})
        self.assertEqual(self.cli("events", status=1), ("", "chirrop: HTTP 403: not\\x1b[2J you\n"))

    def test_the_key_is_taken_from_dotenv(self):
        (self.cwd / ".env").write_text(f"CHIRROP_API_KEY={CANARY}\n")
        self.assertEqual(self.json("events", CHIRROP_API_KEY=""), [])

    def test_log_sends_one_log(self):
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - 60))
        log_id = "0b0e2c4e-55a5-4c5e-9a51-0b1c7a3b5d11"
        options = (
            "--agent",
            "billing",
            "--meta",
            '{"a":[1]}',
            "--occurred-at",
            at,
            "--log-id",
            log_id,
        )
        self.assertEqual(
            self.cli("log", "tool.errors.count", "-2.5", *options)[0], f"delivered {log_id}\n"
        )
        expected = {"event": "tool.errors.count", "value": -2.5, "agent": "billing", "meta": {"a": [1]},
                    "occurred_at": at, "log_id": log_id}  # fmt: skip
        self.assertEqual(self.sandbox.logs, [expected])
        self.assertEqual(self.json("log", "x", "1")["log"]["event"], "x")

    def test_options_may_stand_anywhere(self):
        for args in (
            ("--json", "--agent", "log", "log", "a.b", "-1"),
            ("log", "--agent=log", "a.b", "--json", "-1"),
            ("--agent", "log", "log", "a.b", "-1", "--json"),
            ("log", "a.b", "--meta", "null", "-1", "--agent", "log", "--json"),
        ):
            with self.subTest(args):
                sent = json.loads(self.main(*args)[0])["log"]
                self.assertEqual((sent["agent"], sent["event"], sent["value"]), ("log", "a.b", -1))
        self.assertEqual(json.loads(self.main("alerts", "--json", "--status", "resolved")[0]), [])

    def test_log_says_when_logging_is_disabled(self):
        out, _ = self.cli("log", "x", "1", CHIRROP_DISABLED="1")
        self.assertIn("discarded, since CHIRROP_DISABLED is set", out)
        self.assertEqual(self.sandbox.requests, [])

    def test_events_are_listed(self):
        self.assertEqual(self.cli("events"), ("", "chirrop: there are none\n"))
        self.send(1, agent="billing")
        out, err = self.cli("events")
        self.assertRegex(
            out,
            r"^EVENT_ID +AGENT +EVENT +UNIT +TITLE\n[0-9a-f-]{36}  billing  tool.errors.count\n$",
        )
        self.assertEqual(err, "")
        self.assertEqual([e["event"] for e in self.json("events")], ["tool.errors.count"])

    def test_rollups_draw_a_bar_per_bucket(self):
        self.send(10, 20, 30, -5, agent="billing")
        event = self.json("events")[0]
        for name in (
            ("tool.errors.count",),
            ("tool.errors.count", "--agent", "billing"),
            (event["event_id"],),
        ):
            with self.subTest(name):
                out, _ = self.cli("rollups", *name, "--period", "day", COLUMNS="50")
                head, *rows = out.splitlines()
                self.assertEqual(head, "billing tool.errors.count: count and sum by day, UTC")
                self.assertEqual(max(map(len, rows)), 50)
                self.assertIn("█", rows[0])
        rollups = self.json("rollups", "tool.errors.count", "--period", "day", "--limit", "1")
        self.assertEqual((rollups[0]["min"], rollups[0]["max"]), (-5.0, 30.0))

    def test_rollups_show_the_most_recent_buckets_whatever_the_order_of_the_answer(self):
        now, handlers = datetime.now(timezone.utc), chirrop.Sandbox._ROUTES["events/*/logs"]
        client = new_client(api_key=CANARY)
        for minutes in range(130):
            client.log(Log("a.b", minutes, occurred_at=now - timedelta(minutes=minutes)))
        self.assertTrue(client.close())
        newest_first = handlers["GET"]

        def oldest_first(sandbox, path, query, body):
            rows = newest_first(sandbox, path, {"period": query["period"], "limit": "999"}, body)
            return chirrop._sandbox_page(rows[::-1], query)

        for handler in (oldest_first, newest_first)[: rounds(1, 2)]:
            with mock.patch.dict(handlers, GET=handler):
                for arguments, shown in (
                    ((), 100), (("--limit", "1"), 1), (("--limit", "120"), 120),
                    (("--limit", "500"), 130), (("--all",), 130),
                ):  # fmt: skip
                    with self.subTest(handler.__name__, arguments=arguments):
                        command = "rollups", "a.b", "--period", "minute", *arguments
                        rows = json.loads(self.main(*command, "--json")[0])
                        self.assertEqual([row["value"] for row in rows], [*range(shown)])
                        chart = self.main(*command)[0].splitlines()
                        self.assertEqual(len(chart), shown + 1)
                        self.assertIn(f"{now:%m-%d %H:%M}", chart[-1])

    def test_a_chart_without_unicode_is_drawn_in_ascii(self):
        self.send(10, agent="büro")
        out, _ = self.cli("rollups", "tool.errors.count", PYTHONIOENCODING="ascii")
        self.assertIn("b\\xfcro", out)
        self.assertIn("####", out)

    def test_numbers_are_written_for_people(self):
        for value, text in ((0, "0"), (1234567, "1,234,567"), (1234.5, "1,234.50"), (0.004, "0.004"), (1e300, "1e+300"),
                            (None, ""), ("x\x07", "x\\x07"), (-2.0, "-2")):  # fmt: skip
            self.assertEqual(chirrop._figure(value), text)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            chirrop._table(
                ("id", "value"), [{"id": "a", "value": 1234567.0}, {"id": "b", "value": None}]
            )
        self.assertEqual(out.getvalue(), "ID  VALUE\na   1,234,567\nb\n")

    def test_an_event_must_be_named_unmistakably(self):
        self.send(1, agent="a")
        self.send(1, agent="b")
        self.assertIn("agent must be given", self.cli("rollups", "tool.errors.count", status=2)[1])
        self.assertIn(
            "there is no event 'tool.errors.count' for agent 'c', but for a, b\n",
            self.cli("analytics", "tool.errors.count", "--agent", "c", status=1)[1],
        )
        self.send(1, event="alone")
        self.assertIn(
            "there is no event 'alone' for agent 'c', but for no agent at all\n",
            self.main("rollups", "alone", "--agent", "c", status=1)[1],
        )
        self.assertIn(
            "there is no event 'tool'; `chirrop events` lists them",
            self.main("rollups", "tool", status=1)[1],
        )
        self.assertIn(
            "404", self.cli("rollups", "00000000-0000-4000-8000-000000000000", status=1)[1]
        )

    def test_analytics_compare_two_windows(self):
        self.send(3, 4)
        out, _ = self.cli("analytics", "tool.errors.count")
        self.assertRegex(out, r"last 1h and previous_window\n +now +before +change\nvalue +7 +0\n")
        answer = self.json(
            "analytics", "tool.errors.count", "--period", "1d", "--previous", "previous_7d"
        )
        self.assertEqual((answer["period"], answer["data"]["current_count"]), ("1d", 2))

    def test_alerts_are_listed_and_moved_on(self):
        self.send(1)
        rule = {"event_id": self.json("events")[0]["event_id"], "title": "too \x1b[31m many", "period": "day",
                "aggregate": "sum", "condition": "gt", "threshold": 5}  # fmt: skip
        self.cli("api", "POST", "/policies", "--data", "-", input=json.dumps(rule))
        self.send(9)
        out, _ = self.cli("alerts")
        self.assertIn("triggered", out)
        self.assertIn("too \\x1b[31m many", out)
        alert_id = self.json("alerts")[0]["alert_id"]
        for action, status in (
            ("ack", "acknowledged"),
            ("resolve", "resolved"),
            ("archive", "archived"),
        ):
            self.assertIn(status, self.cli("alerts", action, alert_id)[0])
            self.assertEqual(
                [a["alert_id"] for a in self.json("alerts", "--status", status)], [alert_id]
            )
        self.assertEqual(self.json("alerts", "archive", alert_id)["status"], "archived")

    def test_api_reaches_every_call(self):
        self.send(1)
        event_id = json.loads(self.cli("api", "get", "events")[0])[0]["event_id"]
        for path in (
            f"/events/{event_id}/logs?period=day&limit=3",
            f"/v1.0/events/{event_id}/logs?period=day",
        ):
            self.assertEqual(json.loads(self.cli("api", "GET", path)[0])[0]["count"], 1)
        self.assertEqual(self.sandbox.requests[-2]["query"], {"period": "day", "limit": "3"})
        out, _ = self.cli("api", "PUT", f"/events/{event_id}", "--data", '{"unit":"ms"}')
        self.assertEqual(json.loads(out)["unit"], "ms")
        self.assertIn("HTTP 404", self.cli("api", "GET", "/nope", status=1)[1])

    @unittest.skipUnless(hasattr(os, "mkfifo"), "needs POSIX pipes")
    def test_a_closed_pipe_ends_quietly(self):
        reader, writer = os.pipe()
        os.close(reader)
        self.send(1)
        begun = [
            subprocess.Popen([*CLI, *args], stdout=writer, stderr=subprocess.PIPE, cwd=self.cwd)
            for args in (("events",), ("--help",), ("events", "--json"))[: rounds(2, 3)]
        ]
        os.close(writer)
        for process in begun:
            _, err = process.communicate(timeout=LONG)
            self.assertEqual((process.returncode, err), (0, b""))

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_a_full_disk_is_an_error_in_one_line(self):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [*CLI, "events", "--json"], stdout=full, stderr=subprocess.PIPE, cwd=self.cwd
            )
        self.assertEqual(done.returncode, 1)
        self.assertEqual(done.stderr.count(b"\n"), 1)

    def test_closed_standard_streams_are_survived(self):
        commands = [["sh", "-c", f'"$@" {n}>&-', "sh", *CLI, "events"] for n in "12"]
        begun = [self.begin(command, cwd=self.cwd) for command in commands]
        for stream, end in enumerate(begun, 1):
            done = end()
            self.assertEqual(
                (done.returncode, done.stdout, done.stderr.count("\n")),
                (0, "", int(stream == 1)),
            )

    def test_importing_starts_nothing_and_loads_no_parser(self):
        loaded = self.python(
            "import sys, chirrop; print('argparse' in sys.modules, 'http.server' in sys.modules)"
        )
        self.assertEqual((loaded.stdout, loaded.stderr), ("False False\n", ""))

    def test_sandbox_serves_until_interrupted(self):
        served = self.start("sandbox", "--port", "0")
        lines = [served.stdout.readline().decode() for _ in range(2)]
        variables = dict(line.split()[1].split("=") for line in lines)
        self.assertEqual(sorted(variables), ["CHIRROP_API_ENDPOINT", "CHIRROP_SERVICER_ENDPOINT"])
        self.assertIn(b"chp_", served.stderr.readline())
        self.cli("log", "x", "1", **variables)
        self.assertEqual([e["event"] for e in self.json("events", **variables)], ["x"])
        self.assertEqual(self.sandbox.requests, [])
        port = variables["CHIRROP_API_ENDPOINT"].split(":")[2].split("/")[0]
        refused = self.cli("sandbox", "--port", port, status=1)[1]
        self.assertIn(f"cannot listen on port {port} of 127.0.0.1: Address already in use", refused)
        self.assertIn("`--port 0` takes a free one", refused)
        served.send_signal(2)
        self.assertEqual(served.communicate(timeout=LONG), (b"", b""))
        self.assertEqual(served.returncode, 0)

    def test_sandbox_on_another_address_says_what_that_opens(self):
        served = self.start("sandbox", "--port", "0", "--host", "127.0.0.2", "--quota", "1")
        line = served.stdout.readline().decode()
        if not line:
            self.skipTest("this system has one loopback address")
        variables = dict(
            pair.split()[1].split("=") for pair in (line, served.stdout.readline().decode())
        )
        self.assertRegex(variables["CHIRROP_SERVICER_ENDPOINT"], r"^http://127\.0\.0\.2:\d+/v1\.0$")
        self.assertIn(b"chp_", served.stderr.readline())
        self.assertIn(b"other machines reach it", served.stderr.readline())
        self.cli("log", "x", "1", **variables)
        error = self.cli("log", "x", "1", status=1, **variables)[1]
        self.assertEqual(error, "chirrop: HTTP 403: monthly log quota exceeded\n")
        served.send_signal(2)
        self.assertEqual(served.communicate(timeout=LONG), (b"", b""))


class CommandLineStreamTest(CommandLineCase):
    def test_lines_are_sent_and_bad_ones_reported_by_number(self):
        lines = (
            b'\xef\xbb\xbf{"event": "a", "value": 1}\r\n', b"\n", b"not json\n", b'{"event":"b","value":"x"}\n',
            b"[]\n",
            b'{"event":"c","value":2,"nope":1}\n', b'{"event":"d"}\n', b"\xff\xfe\xfd\n", b"[" * 100000 + b"\n",
            b'{"event":"' + b"e" * (1 << 20) + b'","value":1}\n', b'{"event":"f","value":2,"agent":"g","meta":{"h":1}}',
        )  # fmt: skip
        out, err = self.cli("log", "-", status=1, input=b"".join(lines))
        self.assertEqual(out, "11 lines: 2 delivered, 8 bad, 0 dropped\n")
        *shown, more = err.splitlines()
        self.assertEqual(
            [line.split(":")[1] for line in shown], [f" line {n}" for n in range(3, 10)]
        )
        self.assertIn("got 'nope': meta may hold others", err)
        self.assertEqual(more, "chirrop: and 1 more: a log must be JSON")
        self.assertEqual([log["event"] for log in self.sandbox.logs], ["a", "f"])

    def test_history_that_is_too_old_is_summed_up(self):
        lines = "".join(
            f'{{"event": "a.b", "value": {n}, "occurred_at": "20{n % 10:02}-01-01T00:00:00Z"}}\n'
            for n in range(5000)
        )
        out, err = self.cli("log", "-", status=1, input=lines + '{"event":"a.b","value":1}\nno\n')
        self.assertEqual(out, "5,002 lines: 1 delivered, 5,001 bad, 0 dropped\n")
        rule = "occurred_at must lie within the last 30 days and at most 1 day ahead"
        self.assertEqual(
            err.splitlines(),
            [
                *(f"chirrop: line {n + 1}: {rule}, got '200{n}-01-01T00:00:00Z'" for n in range(3)),
                "chirrop: line 5,002: a log must be JSON:"
                " Expecting value: line 1 column 1 (char 0)",
                f"chirrop: and 4,997 more: {rule}",
            ],
        )

    def test_rows_sent_twice_count_once_when_their_ids_are_derived(self):
        rows = [
            '{"event":"orders.count","value":1,"agent":"shop","meta":{"order":17}}\n',
            '{"event":"orders.count","value":1,"agent":"shop","meta":{"order":18}}\n',
            '{"event":"orders.total","value":9.5,"agent":"shop","meta":{"order":17}}\n',
        ]
        given = '{"event":"x","value":1,"log_id":"0b0e2c4e-55a5-4c5e-9a51-0b1c7a3b5d11"}\n'
        for _ in range(2):
            self.cli("log", "-", "--id-from", "meta.order", input="".join(rows) + given)
        ids = [log["log_id"] for log in self.sandbox.logs]
        self.assertEqual(len(ids), 4)
        expected = uuid.uuid5(uuid.NAMESPACE_URL, '["shop","orders.count",17]')
        self.assertEqual((ids[0], ids[3]), (str(expected), json.loads(given)["log_id"]))
        out, err = self.cli(
            "log", "-", "--id-from", "meta.order", "value", status=1,
            input='{"event":"a","value":1}\n{"event":"a","value":1,"meta":{"order":null}}\n'
            + rows[0],
        )  # fmt: skip
        self.assertEqual(out, "3 lines: 1 delivered, 2 bad, 0 dropped\n")
        self.assertIn("line 2: the line has no meta.order, from which its log_id is made", err)

    def test_the_account_as_json(self):
        account = self.json("log", "-", input='{"event":"a","value":1}\n')
        self.assertEqual(account, {"lines": 1, "bad": 0, "delivered": 1, "dropped": {}})
        self.assertEqual(self.json("log", "-", input="")["lines"], 0)

    def test_what_the_service_rejects_is_reported_and_the_rest_delivered(self):
        self.sandbox.reject(lambda log: log["value"] == 7)
        lines = "".join(f'{{"event":"a","value":{n}}}\n' for n in range(20))
        out, err = self.cli("log", "-", status=1, input=lines)
        self.assertEqual(out, "20 lines: 19 delivered, 0 bad, 1 dropped\n")
        self.assertIn("dropped 1 logs (rejected): HTTP 400", err)

    def test_a_refusal_stops_the_stream(self):
        self.sandbox.fail(None, status=401, body={"error": "invalid API key"}, path="/logs")
        out, err = self.cli("log", "-", status=1, input=b'{"event":"a","value":1}\n' * 30000)
        self.assertIn("logs are refused: HTTP 401: invalid API key", err)
        self.assertRegex(err, r"stopped at line [\d,]+: HTTP 401: invalid API key")
        self.assertLess(len(self.sandbox.requests), 30000 / 250)

    def test_a_full_queue_is_waited_for_and_given_up_after_a_cycle_of_retries(self):
        with unittest.mock.patch.object(chirrop, "_QUEUED_LINES", 0):
            client = self.client(502, 502, retries=1, flush_delay=0)
            client.log(Log("a", 1))
            while client.stats().retries < 2:  # the first cycle fails, and the log stays
                time.sleep(0.001)
            chirrop._make_room(client)
            self.assertEqual(self.assertBalanced(client).delivered, 1)
            client = self.client(retries=1, transport=FakeTransport(default=502))
            client.log(Log("a", 1))
            with self.assertRaisesRegex(ChirrOpError, "HTTP 502"):
                chirrop._make_room(client)
            client = self.client(400)
            client.log(Log("a", 1))
            chirrop._make_room(client)  # a rejected log does not stop the others

    def test_ctrl_c_ends_it_quietly_with_what_was_read(self):
        process = self.start("log", "-")
        process.stdin.write(b'{"event":"a","value":1}\nbad\n')
        process.stdin.flush()
        self.assertIn(b"line 2", process.stderr.readline())  # it waits for line 3 now
        process.send_signal(2)
        process.wait(LONG)
        self.assertEqual(process.stdout.read(), b"2 lines: 1 delivered, 1 bad, 0 dropped\n")
        self.assertEqual(process.stderr.read(), b"chirrop: stopped at line 2: interrupted\n")
        self.assertEqual(process.returncode, 1)

    @unittest.skipUnless(hasattr(os, "wait4"), "needs wait4")
    def test_memory_does_not_grow_with_the_stream(self):
        # So that this process keeps nothing, either.
        self.sandbox.fail(None, status=200, path="/logs")
        peaks = []
        for count in (1000, rounds(5000, 50000)):
            process = self.start("log", "-")
            for _ in range(count // 1000):
                process.stdin.write(
                    b'{"event":"a.b.c","value":1.5,"agent":"d","meta":{"e":"f"}}\n' * 1000
                )
            process.stdin.close()
            self.assertIn(f"{count:,} delivered".encode(), process.stdout.readline())
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode, process.stdin = status, None
            self.assertEqual(status, 0)
            peaks.append(usage.ru_maxrss)
        self.assertLess(peaks[1], peaks[0] * 1.4)

    def spool(self, count=5):
        path = self.cwd / "spool.db"
        client = new_client(transport=FakeTransport(default=ConnectionRefusedError), spool=path)
        for number in range(count):
            client.log(Log("spooled", number))
        client.close(0)
        return str(path)

    def test_drain_delivers_a_spool(self):
        path = self.spool()
        self.assertEqual(self.cli("drain", path)[0], "5 delivered\n0 left\n0 dead letters\n")
        self.assertEqual(len(self.sandbox.logs), 5)
        account = {"delivered": 0, "left": 0, "dead_letters": 0}
        self.assertEqual(self.json("drain", path), account)

    def test_drain_tells_what_stays_behind(self):
        path = self.spool()
        self.sandbox.fail(None, status=401, path="/logs")
        out, err = self.cli("drain", path, status=1)
        self.assertEqual(out, "0 delivered\n5 left\n0 dead letters\n")
        self.assertIn("HTTP 401", err)
        self.sandbox.reset()
        self.sandbox.reject(lambda log: log["value"] == 3)
        out, err = self.cli("drain", path)
        self.assertEqual(out, "4 delivered\n0 left\n1 dead letters\n")

    def test_drain_goes_on_after_a_503(self):
        path = self.spool(600)
        self.patch(chirrop, "_backoff", lambda *_: 0.0)
        self.sandbox.fail(status=503, path="/logs")
        self.assertEqual(self.cli("drain", path)[0], "600 delivered\n0 left\n0 dead letters\n")

    def test_drain_leaves_alone_what_is_no_spool(self):
        notes = self.cwd / "notes.txt"
        notes.write_bytes(content := b"some notes\n" * 1000)
        self.assertIn("cannot be read", self.cli("drain", str(notes), status=1)[1])
        self.assertEqual([path.name for path in self.cwd.iterdir()], ["notes.txt"])
        self.assertEqual(notes.read_bytes(), content)

    def test_drain_says_that_logging_is_disabled(self):
        self.assertIn(
            "CHIRROP_DISABLED", self.cli("drain", self.spool(), status=1, CHIRROP_DISABLED="1")[1]
        )


def read_all(master):
    """Yield what is written to a terminal, until nobody has its other end."""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while data := os.read(master, 65536):
            yield data


@unittest.skipUnless(hasattr(os, "openpty"), "needs pseudo-terminals")
class CommandLineTerminalTest(CommandLineCase):
    def terminal(self, columns, *args, status=0, process=FULL, **env):
        """Run a command in a terminal of this width; return all that it wrote there, raw.

        In a process of its own, or else in this one, which COLUMNS tells the width.
        """
        import fcntl
        import struct
        import termios

        master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        pieces, reader = [], threading.Thread(target=lambda: pieces.extend(read_all(master)))
        reader.start()
        self.addCleanup(reader.join, LONG)
        env = {**os.environ, "TERM": "xterm", **env}
        if process:
            command = [*CLI, *args]
            run = subprocess.Popen(
                command, stdin=slave, stdout=slave, stderr=slave, cwd=self.cwd, env=env
            )
            os.close(slave)
            code = run.wait(LONG)
        else:
            with open(slave, "r+b", buffering=0) as file:
                screen = io.TextIOWrapper(file, "utf-8", write_through=True)
                streams = mock.patch.multiple(sys, stdin=screen, stdout=screen, stderr=screen)
                with streams, mock.patch.dict(os.environ, {**env, "COLUMNS": str(columns)}):
                    code = chirrop.main(list(args))
                screen.detach()
        reader.join(LONG)
        raw = b"".join(pieces)
        os.close(master)
        self.assertEqual(code, status, raw)
        text = raw.decode()
        self.check(text)
        for line in text.replace("\r", "\n").split("\n"):
            visible = line
            for colour in ("0", "31", "32", "36"):
                visible = visible.replace(f"\x1b[{colour}m", "")
            self.assertLessEqual(chirrop._width(visible), columns, line)
            self.assertNotIn("\x1b", visible)
        return text

    def test_no_line_is_wider_than_the_terminal(self):
        self.send(3, 4, 1234567.25, agent="an agent with a rather long name", event="e" * 100)
        self.send(5, agent="日本語" * 20, event="ひらがな")
        self.main("api", "POST", "/policies", "--data", json.dumps({
            "event_id": json.loads(self.main("api", "GET", "/events")[0])[1]["event_id"], "title": "題" * 50,
            "period": "day", "aggregate": "sum", "condition": "gt", "threshold": 5}))  # fmt: skip
        self.send(6, agent="日本語" * 20, event="ひらがな")
        for columns in rounds((40,), (80, 40)):
            for args in (
                ("events",),
                ("rollups", "e" * 100),
                ("analytics", "ひらがな"),
                ("alerts",),
                ("doctor",),
            ):
                with self.subTest(args, columns=columns):
                    self.assertIn("\n", self.terminal(columns, *args))
            with self.subTest("an error", columns=columns):
                self.terminal(columns, "rollups", "there is no event", status=1)

    def test_ids_are_whole_in_a_narrow_terminal(self):
        self.send(1, agent="billing")
        event_id = json.loads(self.main("events", "--json")[0])[0]["event_id"]
        self.assertEqual(
            self.terminal(40, "events", process=True),
            f"{event_id}\r\n  agent billing\r\n  event tool.errors.count\r\n",
        )

    def test_colours_are_shown_in_a_terminal_only_and_never_with_no_color(self):
        self.send(1)
        self.assertIn("\x1b[36m", self.terminal(80, "rollups", "tool.errors.count"))
        self.assertNotIn("\x1b", self.terminal(80, "rollups", "tool.errors.count", NO_COLOR="1"))
        self.assertNotIn("\x1b", self.cli("rollups", "tool.errors.count")[0])

    def test_control_characters_reach_no_terminal(self):
        self.send(1, event="\x1b]0;owned\x07\u202e\x9b2J", agent="a\rb\nc")
        self.assertIn("\\x1b]0;owned\\x07\\u202e\\x9b2J", self.terminal(200, "events"))

    def test_drain_shows_progress(self):
        path = CommandLineStreamTest.spool(self, 600)
        for columns in (80, 40):
            text = self.terminal(columns, "drain", path)
            self.assertIn("\r0 delivered, ", text)
            self.assertIn(" delivered\r\n0 left", text)


class DoctorTest(CommandLineCase):
    def doctor(self, status=1, **env):
        """Return the texts of the failed checks, or of all when there are none."""
        found = self.json("doctor", status=status, **env)
        self.assertEqual(self.sandbox.logs, [])
        for request in self.sandbox.requests:
            self.assertIn((request["method"], request["body"]), (("GET", None), ("POST", [])))
        return "\n".join(f"{f['check']}: {f['text']}" for f in found if status == 0 or not f["ok"])

    def test_all_is_well(self):
        text = self.doctor(0)
        for line in (
            "key: from CHIRROP_API_KEY in the environment, has",
            f"logs: {self.base}/logs, no proxy",
            "logs: reached, takes logs", "api: reached, key accepted", "clock: ",
        ):  # fmt: skip
            self.assertIn(line, text)
        self.assertRegex(
            self.cli("doctor")[0],
            r"(?m)^ok   key +from CHIRROP_API_KEY in the environment, has the right form$",
        )
        (self.cwd / ".env").write_text(f"CHIRROP_API_KEY={CANARY}\n")
        self.assertIn("key: from CHIRROP_API_KEY in ./.env", self.doctor(0, CHIRROP_API_KEY=""))

    def test_each_fault_is_told_with_its_cure(self):
        free = chirrop._serve_sandbox(self.sandbox)
        port = free.server_address[1]
        free.server_close()
        for env, expected in (
            ({"CHIRROP_API_KEY": ""}, "key: API key is required: give api_key, or set"),
            (
                {"CHIRROP_API_KEY": "sk_canary"},
                "must start with 'chp_' (from CHIRROP_API_KEY in the environment). Set CHIRROP_A",
            ),
            (
                {"CHIRROP_DISABLED": "1"},
                "switch: CHIRROP_DISABLED is set: logs are checked and discarded",
            ),
            (
                {"CHIRROP_API_ENDPOINT": "logs.example"},
                "got 'logs.example' from CHIRROP_API_ENDPOINT. Correct it, or unset it for https",
            ),
            (
                {"CHIRROP_API_ENDPOINT": f"{self.base}/log"},
                "logs: HTTP 404: no such route. No logs are taken there: check the path of CHI",
            ),
            (
                {"CHIRROP_API_ENDPOINT": self.base},
                "No logs are taken there: check the path of CHIRROP_API_ENDPOINT",
            ),
            (
                {"CHIRROP_SERVICER_ENDPOINT": "http://nowhere.invalid"},
                "The name has no address: check CHIRROP_S",
            ),
            (
                {"CHIRROP_API_ENDPOINT": f"http://127.0.0.1:{port}/"},
                "Nothing listens there: check CHIRROP_A",
            ),
            (
                {"CHIRROP_API_ENDPOINT": f"https{self.base[4:]}/logs"},
                "The TLS handshake failed: check CHIRROP_A",
            ),
            (
                {"CHIRROP_SERVICER_ENDPOINT": f"{self.base}/nope"},
                "api: HTTP 404: no such route. Check CHI",
            ),
        ):
            with self.subTest(expected):
                self.assertIn(expected, self.doctor(**env))

    def test_a_wrong_key(self):
        self.sandbox.fail(status=401, body={"error": f"bad key {CANARY}"}, path="/events")
        self.assertIn("api: HTTP 401: bad key ***. The key is wrong", self.doctor())

    def test_a_dead_proxy_is_named_by_its_own_variable(self):
        free = chirrop._serve_sandbox(self.sandbox)
        proxy = f"http://127.0.0.1:{free.server_address[1]}"
        free.server_close()
        https = {"CHIRROP_API_ENDPOINT": "https://x.invalid/v1.0/logs"}
        for env, variable in (
            ({"HTTP_PROXY": proxy}, "HTTP_PROXY"),
            ({"http_proxy": proxy, "HTTP_PROXY": "http://unused"}, "http_proxy"),
            ({"HTTPS_PROXY": proxy, **https}, "HTTPS_PROXY"),
            ({"http_proxy": "http://proxy.invalid:1"}, "http_proxy"),
        ):
            with self.subTest(variable):
                text = self.doctor(no_proxy="", **env)
                self.assertRegex(text, f"logs: cannot connect to .*: check {variable}, ")
                self.assertNotIn("check CHIRROP_API_ENDPOINT", text)

    def test_a_proxy_that_wants_a_password(self):
        self.sandbox.fail(status=407, body={"error": "who are you"}, path="/logs")
        proxy = self.base[: -len("/v1.0")]
        self.assertIn("Check http_proxy, or try", self.doctor(http_proxy=proxy, no_proxy=""))

    def test_an_answer_of_something_else(self):
        self.sandbox.fail(status=200, body="<html>please log in</html>", path="/events")
        self.assertIn("api: not a list of events. Check CHIRROP_SERVICER_ENDPOINT", self.doctor())
        self.sandbox.fail(status=200, body="<html>please log in</html>", path="/logs")
        self.assertIn("logs: no answer of ChirrOp's. Check CHIRROP_API_ENDPOINT", self.doctor())
        self.sandbox.fail(status=302, headers={"Location": "http://x"}, path="/logs")
        self.assertIn("logs: HTTP 302: redirects are not followed", self.doctor())

    def test_a_clock_that_is_off(self):
        import http.server

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"[]")

            def date_time_string(self, timestamp=None):
                return super().date_time_string(time.time() + 7200)

            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        self.addCleanup(lambda: (server.shutdown(), thread.join(LONG), server.server_close()))
        text = self.doctor(CHIRROP_SERVICER_ENDPOINT=f"http://127.0.0.1:{server.server_address[1]}")
        self.assertRegex(
            text, r"clock: 7,(199|200) s behind the service's. Correct this computer's"
        )

    def test_a_date_that_is_none_says_nothing_of_the_clock(self):
        for date in ("", "soon", "Mon, 01 Jan 99999 00:00:00 GMT", "Tue, 31 Feb 2026 00:00:00 GMT"):
            self.assertEqual(list(chirrop._diagnose_clock(date)), [], date)

    def test_the_proxy_in_use_is_shown_without_its_password(self):
        proxy = f"http://user:{CANARY}@{self.base.split('/')[2]}"
        text = self.doctor(0, http_proxy=proxy, no_proxy="")
        self.assertIn(f"by the proxy {self.base.split('/')[2]} of http_proxy", text)
        self.assertIn("no proxy", self.doctor(0, http_proxy=proxy, no_proxy="127.0.0.1"))


class DemoTest(CommandLineCase):
    def setUp(self):
        super().setUp()
        os.environ.update(
            CHIRROP_DISABLED="1",
            CHIRROP_API_ENDPOINT="ftp://x",
            CHIRROP_SERVICER_ENDPOINT=self.base,
        )
        (self.cwd / ".env").write_text("CHIRROP_API_KEY=wrong")

    @unittest.skipUnless(hasattr(os, "openpty"), "needs pseudo-terminals")
    def test_demo_accounts_for_every_log_whatever_the_environment_says(self):
        code = "import chirrop, sys; chirrop._backoff = lambda *_: 0.15; sys.exit(chirrop.main())"
        hasty = [sys.executable, "-c", code]
        command = rounds(hasty, [sys.executable, "-I", "-S", str(HERE / "chirrop.py")])
        process = subprocess.Popen(
            [*command, "demo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=self.cwd
        )
        with mock.patch.dict(globals(), CLI=rounds(hasty, CLI)):
            # Both at once.
            screen = CommandLineTerminalTest.terminal(self, 40, "demo", process=True)
        self.assertIn(" waiting, retr", screen)
        self.assertIn("accepted 5,000 = delivered 4,999", screen)
        out, err = process.communicate(timeout=LONG)
        self.assertEqual((process.returncode, err), (0, b""))
        for line in (
            "checkout http.request.duration_ms: count and sum by hour, UTC", "1 x 502", "2 x no answer", "1 x 429",
            "accepted 5,000 = delivered 4,999 + dropped 1", "dropped checkout poison.log: HTTP 400",
        ):  # fmt: skip
            self.assertIn(line, out.decode())
        self.assertEqual(self.sandbox.requests, [])

    def test_demo_fails_when_the_account_does_not_balance(self):
        class Forgetful(chirrop.Sandbox):
            logs = property(lambda self: super().logs[1:])

        some = list(chirrop._demo_logs())[:: rounds(20, 1)]
        self.patch(chirrop, "_demo_logs", lambda: some)
        for sandbox, status in ((chirrop.Sandbox, 0), (Forgetful, 1)):
            with unittest.mock.patch.multiple(
                chirrop, Sandbox=sandbox, _DEMO_FAULTS=({"times": 0},)
            ):
                account = json.loads(self.main("demo", "--json", status=status)[0])
            self.assertEqual(account["balanced"], status == 0)
            self.assertEqual((account["accepted"], len(account["rollups"]) > 5), (len(some), True))


# ---- Hostile answers ------------------------------------------------------


class HostileTest(TestCase):
    """What a server, a file or a caller could do to the application, and does not."""

    def test_an_errors_text_is_short_and_cannot_steer_a_log_or_a_terminal(self):
        text = "bad\n2026-01-01 CRITICAL forged\x1b[2J" + "x" * 3_000_000
        client = self.client((400, json.dumps({"error": text}).encode(), {}))
        with self.assertRaises(chirrop.ChirrOpBadRequestError) as caught:
            client.list_events()
        self.assertLess(len(str(caught.exception)), 1000)
        self.assertTrue(str(caught.exception).isprintable())
        self.assertLess(len(repr(caught.exception.body)), 200_000)

    def test_what_a_server_says_of_a_rejected_log_does_not_fill_the_spool(self):
        path = self.folder() / "spool"
        answer = (400, json.dumps({"error": "x" * 2_000_000}).encode(), {})
        client = self.client(transport=FakeTransport(default=answer), spool=path)
        for i in range(64):
            client.log(Log("a", i))
        self.assertFalse(client.flush(LONG))
        client.close()
        self.assertLess(path.stat().st_size, 500_000)
        self.assertEqual(len(SqliteSpool(path).dead_letters()), 64)

    def test_the_key_is_masked_however_it_is_escaped(self):
        key = "chp_canary/x"
        escaped = "".join(f"\\u{ord(c):04x}" for c in key).encode()
        for body in (
            b'{"error": "no %s"}' % escaped,
            b'{"error": "no chp_canary\\/x"}',
            b"no " + escaped,
            b'["' + escaped + b'"]',
        ):
            client = self.client(transport=FakeTransport((401, body, {})), api_key=key)
            with self.assertRaises(chirrop.ChirrOpUnauthorizedError) as caught:
                client.list_events()
            shown = f"{caught.exception} {caught.exception.body!r}"
            self.assertNotIn("canary", shown.replace("\\/", "/"))

    def test_the_key_is_masked_where_a_redirect_or_a_servers_name_quotes_it(self):
        headers = {"Location": "https://h/chp_canary", "Server": "chp_canary"}
        for status in (302, 502):
            client = self.client((status, b"", headers), api_key="chp_canary", servicer_retries=0)
            with self.assertRaises(ChirrOpError) as caught:
                client.list_events()
            self.assertIn("***", str(caught.exception))
            self.assertNotIn("canary", str(caught.exception))

    def test_bytes_in_place_of_a_key_are_not_shown(self):
        try:
            new_client(api_key="chp_{}".format("canary").encode())
        except chirrop.ChirrOpValidationError as exc:
            text = "".join(
                traceback.TracebackException.from_exception(exc, capture_locals=True).format()
            )
        self.assertIn("api_key must be a string", text)
        self.assertNotIn("chp_canary", text)

    def test_an_exception_that_is_its_own_cause_is_a_network_failure_like_any_other(self):
        def circular(body):
            error = OSError("round and round")
            error.__cause__ = error
            raise error

        client = self.client(transport=FakeTransport(circular))
        client.log(Log("a", 1))
        self.assertTrue(client.flush(LONG))

    def test_headers_of_a_wrong_type_are_a_network_failure(self):
        for headers in ([("Retry-After", "0")], None, 5):
            client = self.client(transport=FakeTransport((429, b"", headers)))
            client.log(Log("a", 1))
            self.assertTrue(client.flush(LONG))
            client.close()

    def test_a_failure_while_settling_leaves_nothing_in_flight(self):
        client = self.client(transport=FakeTransport())
        original, failures = client._outbox.settle, [MemoryError()]
        self.patch(time, "sleep", lambda seconds: None)  # of a sender, after what looks like a bug

        def settle(*args):
            if failures:
                raise failures.pop()
            return original(*args)

        client._outbox.settle = settle
        client.log(Log("a", 1))
        self.assertTrue(client.flush(LONG))
        self.assertEqual(client.stats().delivered, 1)

    def test_an_interruption_while_a_delivery_is_noted_loses_no_log(self):
        for status in (200, 401, 400):
            with self.subTest(status):
                client = self.client(transport=FakeTransport(status))
                buffer, original, armed = (
                    client._outbox.buffer,
                    client._outbox.buffer.settle,
                    [True],
                )

                def interrupted(*args, original=original, armed=armed):
                    if armed:
                        armed.clear()
                        raise KeyboardInterrupt
                    return original(*args)

                buffer.settle = interrupted
                client.log(Log("a", 1))
                self.assertEqual(client.flush(LONG), status == 200)
                stats = self.assertBalanced(client)
                self.assertEqual(
                    (stats.delivered + sum(stats.dropped.values()), stats.queued), (1, 0)
                )
                self.assertEqual(len(client._link._transport.requests), 1)  # its answer is not lost

    def test_a_cycle_in_meta_does_not_overflow_the_stack_of_a_small_thread(self):
        code = (
            "import threading, chirrop\n"
            "def work():\n"
            "    meta = []; meta.append(meta)\n"
            "    for m in (meta, {'a': meta}):\n"
            "        try: chirrop.Log('a', 1, meta=m)\n"
            "        except chirrop.ChirrOpValidationError: print('refused')\n"
            "threading.stack_size(1 << 18); t = threading.Thread(target=work); t.start(); t.join()"
        )
        self.assertEqual(self.python(code).stdout.split(), ["refused"] * 2)

    def test_an_exception_of_a_signal_handler_comes_through_a_call(self):
        class SoftLimit(Exception):
            pass

        def handler(*_):
            raise SoftLimit

        previous = signal.signal(signal.SIGUSR1, handler)
        self.addCleanup(signal.signal, signal.SIGUSR1, previous)
        client = self.client(transport=None, servicer_endpoint="http://127.0.0.1:9")
        interrupt = mock.patch.object(
            chirrop._UrllibTransport, "_exchange", lambda *_: signal.raise_signal(signal.SIGUSR1)
        )
        with interrupt, self.assertRaises(SoftLimit):
            client.list_events()

    @unittest.skipUnless(hasattr(os, "mkfifo"), "no named pipes here")
    def test_a_pipe_in_place_of_dotenv_is_not_waited_for(self):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder())
        os.mkfifo(".env")
        with self.assertRaisesRegex(chirrop.ChirrOpValidationError, "API key is required"):
            Config()

    def test_another_programs_database_is_left_alone(self):
        path = self.folder() / "app.db"
        with contextlib.closing(sqlite3.connect(path)) as conn, conn:
            conn.execute("CREATE TABLE mine (x)")
        before = path.read_bytes()
        client = self.client(spool=path)
        client.log(Log("a", 1))
        self.assertTrue(client.flush(LONG))
        self.assertTrue(client.close())
        self.assertEqual((path.read_bytes(), os.listdir(path.parent)), (before, ["app.db"]))
        self.assertIn("database of another program", self.records[0].getMessage())

    def test_a_spool_that_others_can_read_is_said_and_left_as_it_is(self):
        path = self.folder() / "spool"
        path.touch()
        path.chmod(0o644)
        client = self.client(spool=path)
        client.log(Log("a", 1))
        client.flush(LONG)
        self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o644)
        self.assertIn("can be read by other users", self.records[-1].getMessage())

    def test_the_served_sandbox_refuses_web_pages(self):
        sandbox = Sandbox()
        host = urllib.parse.urlsplit(self.serve(sandbox)).netloc
        for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}):
            connection = http.client.HTTPConnection(host)
            connection.request(
                "POST", "/v1.0/logs", b"[]", {"Authorization": "Bearer chp_x", **headers}
            )
            self.assertEqual(connection.getresponse().status, 403)
            connection.close()
        self.assertEqual(sandbox.requests, [])


# ---- The whole flow -------------------------------------------------------


class FlowTest(TestCase):
    """What an application does by one client from its first log to an archived alert."""

    def setUp(self):
        super().setUp()
        self.sandbox = Sandbox()
        self.flow = self.client(transport=self.sandbox)

    def test_log_to_archived_alert(self):
        client = self.flow
        client.create_event({"event": "tool.errors.count", "agent": "billing", "unit": "errors"})
        client.log(Log("tool.errors.count", 1, agent="billing"))
        self.assertTrue(client.flush(LONG))
        event = client.find_event("tool.errors.count", agent="billing")
        self.assertEqual(
            (event["unit"], [e["event_id"] for e in client.list_events()]),
            ("errors", [event["event_id"]]),
        )
        self.assertEqual(
            client.update_event(event["event_id"], {"title": "Errors"})["title"], "Errors"
        )
        rollups = list(client.iter_event_logs(event["event_id"], "day"))
        self.assertEqual([(r["count"], r["value"]) for r in rollups], [(1, 1.0)])
        analytics = client.get_event_analytics(event["event_id"], "window", "1h", "previous_1d")
        self.assertEqual(
            (analytics["data"]["current_value"], analytics["data"]["previous_count"]), (1.0, 0)
        )

        policy = client.create_policy(
            {
                "event_id": event["event_id"],
                "period": "day",
                "aggregate": "sum",
                "condition": "gte",
                "threshold": 5,
            }
        )
        policy = client.update_policy(policy["policy_id"], {"severity": "critical"})
        self.assertEqual(client.get_policy(policy["policy_id"]), policy)
        self.assertEqual(client.list_policies(), [policy])
        destination = client.create_destination(
            {"channel": "slack", "url": "https://hooks.slack.com/services/T/B/x"}
        )
        destination_id = destination["destination_id"]
        client.update_destination(destination_id, {"scope": "all"})
        self.assertEqual(client.get_destination(destination_id)["scope"], "all")
        result = client.test_destination(destination_id)
        self.assertEqual((result["destination_id"], result["status"]), (destination_id, "sent"))
        tested = client.get_alert_deliveries(result["alert_id"], kind="test")
        self.assertEqual([d["destination_id"] for d in tested], [destination_id])
        self.assertEqual(client.list_alerts(), [])

        for _ in range(5):
            client.log(Log("tool.errors.count", 1, agent="billing"))
        self.assertTrue(client.flush(LONG))
        (alert,) = client.list_alerts("triggered")
        self.assertEqual(
            (alert["policy_id"], alert["severity"], alert["value"]),
            (policy["policy_id"], "critical", 6.0),
        )
        (delivery,) = client.iter_alert_deliveries(alert["alert_id"])
        self.assertEqual((delivery["destination_id"], delivery["status"]), (destination_id, "sent"))
        for call, status in (
            (client.acknowledge_alert, "acknowledged"),
            (client.resolve_alert, "resolved"),
            (client.archive_alert, "archived"),
        ):
            self.assertEqual(call(alert["alert_id"])["status"], status)
        self.assertEqual(client.get_alert(alert["alert_id"])["status"], "archived")
        self.assertEqual(len(client.list_destinations()), 1)

    def test_what_the_service_refuses_is_the_callers_error(self):
        for call, status in (
            (lambda: self.flow.get_event("evt_123"), 400),
            (lambda: self.flow.get_alert(str(uuid.uuid4())), 404),
            (lambda: self.flow.create_policy({"title": "no event"}), 400),
            (lambda: self.flow.create_destination({"channel": "telegram"}), 400),
        ):
            with self.assertRaises(chirrop.ChirrOpNonRetryableError) as caught:
                call()
            self.assertEqual(caught.exception.status_code, status)
            self.assertIn("error", caught.exception.body)


class HttpFlowTest(FlowTest):
    """The same over HTTP, by the real transport."""

    def setUp(self):
        super().setUp()
        base = self.serve(self.sandbox)
        self.flow = self.client(transport=None, api_endpoint=f"{base}/logs", servicer_endpoint=base)


# ---- Portability ----------------------------------------------------------


class PortabilityTest(TestCase):
    """The ways to carry the file about: each in a process of its own, far from this folder."""

    USE = (
        "{name}; s = chirrop.Sandbox()\n"
        "with chirrop.new_client(api_key='chp_x', transport=s) as c: c.log(chirrop.Log('a.b', 1))\n"
        "print(len(s.logs), chirrop.__version__)\n"
    )
    FINE = f"1 {chirrop.__version__}\n"

    def begin_in(self, folder, code, *flags, env=()):
        """Begin a program; return a function that waits for its end and returns what it printed."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        command = [sys.executable, *flags, "-c", code]
        end = self.begin(command, cwd=folder, env={**inherited, **dict(env)})

        def printed():
            done = end()
            self.assertEqual((done.returncode, done.stderr), (0, ""), done.stderr)
            return done.stdout

        return printed

    def run_in(self, *args, **options):
        return self.begin_in(*args, **options)()

    def vendored(self):
        folder = self.folder()
        vendor = folder / "myapp" / "_vendor"
        vendor.mkdir(parents=True)
        for package in (vendor, vendor.parent):
            (package / "__init__.py").write_text("")
        shutil.copy2(chirrop.__file__, vendor / "chirrop.py")
        with contextlib.suppress(OSError):  # its bytecode comes along, if there is any
            shutil.copytree(HERE / "__pycache__", vendor / "__pycache__")
        return folder

    def test_it_works_inside_another_package(self):
        code = self.USE.format(name="from myapp._vendor import chirrop")
        self.assertEqual(self.run_in(self.vendored(), code, "-W", "error"), self.FINE)

    def test_it_works_twice_under_two_names_in_one_process(self):
        folder = self.vendored()
        shutil.copy(chirrop.__file__, folder / "other.py")
        code = self.USE.format(name="from myapp._vendor import chirrop") + self.USE.format(
            name="import other as chirrop"
        )
        code += "from myapp._vendor import chirrop as a; print(a.Log is chirrop.Log)"
        self.assertEqual(
            self.run_in(folder, code, "-X", "dev", "-W", "error"), self.FINE * 2 + "False\n"
        )

    def test_it_works_from_a_zip_archive_and_as_a_zipapp(self):
        folder = self.folder()
        with zipfile.ZipFile(folder / "lib.zip", "w") as archive:
            archive.write(chirrop.__file__, "chirrop.py")
        code = "import sys; sys.path.insert(0, 'lib.zip'); " + self.USE.format(
            name="import chirrop"
        )
        printed = self.begin_in(folder, code, "-I", "-S")
        with zipfile.ZipFile(folder / "app.pyz", "w") as archive:
            archive.write(chirrop.__file__, "__main__.py")
        done = self.begin([sys.executable, "-I", "app.pyz", "--version"], cwd=folder)()
        self.assertEqual(printed(), self.FINE)
        self.assertEqual(
            (done.returncode, done.stdout.split()[-1:]), (0, [chirrop.__version__]), done.stderr
        )

    def test_it_works_under_every_interpreter_flag(self):
        folder = self.vendored()
        code = f"import sys; sys.path.insert(0, {str(folder)!r}); " + self.USE.format(
            name="from myapp._vendor import chirrop"
        )
        many = (
            ["-I", "-S", "-OO", "-B", "-W", "error"],
            ["-O", "-bb", "-X", "dev", "-X", "utf8=0"],
        )
        each = (
            *(["-I"], ["-S"], ["-O"], ["-OO"], ["-X", "dev"], ["-W", "error"], ["-bb"]),
            ["-X", "utf8=0"],
        )
        begun = [(f, self.begin_in(folder, code, *f)) for f in rounds(many, many + each)]
        for flags, printed in begun:
            with self.subTest(flags):
                self.assertEqual(printed(), self.FINE)

    def test_it_works_without_home_in_a_folder_that_is_gone(self):
        folder = self.folder()
        (folder / "gone").mkdir()
        code = (
            f"import os, sys; os.rmdir(os.getcwd()); sys.path.insert(0, {str(HERE)!r}); "
            + self.USE.format(name="import chirrop")
        )
        code += "try: chirrop.Config()\nexcept chirrop.ChirrOpValidationError as exc: print(str(exc)[:19])"
        env = {"HOME": "", "LANG": "C"}
        self.assertEqual(
            self.run_in(folder / "gone", code, "-I", env=env), self.FINE + "API key is required\n"
        )

    def test_a_missing_module_is_one_clear_error_when_that_part_is_used(self):
        begin = (
            f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
            "for m in {missing}: sys.modules[m] = None\n"
        )
        use = begin + self.USE.format(name="import chirrop")
        missing = ["ssl", "_ssl", "sqlite3", "_ctypes", "ctypes", "fcntl"]
        used = self.begin_in(HERE, use.format(missing=missing), "-I")
        spool = begin + (
            "import chirrop\n"
            "try: chirrop.SqliteSpool('x')\nexcept chirrop.ChirrOpError as exc: print(exc)"
        )
        spooled = self.begin_in(HERE, spool.format(missing=["sqlite3"]), "-I")
        tls = begin + (
            "import chirrop\nc = chirrop.new_client(api_key='chp_x', servicer_retries=0,"
            " servicer_endpoint='https://127.0.0.1:9')\n"
            "try: c.list_events()\nexcept chirrop.ChirrOpTransportError as exc: print(exc)"
        )
        called = self.begin_in(HERE, tls.format(missing=["ssl", "_ssl"]), "-I")
        self.assertEqual(used(), self.FINE)
        self.assertIn("SqliteSpool needs the sqlite3 module, which this Python lacks", spooled())
        self.assertIn("https needs the ssl module, which this Python lacks", called())

    def test_plain_http_works_without_ssl(self):
        base = self.serve(Sandbox())
        code = (
            f"import sys; sys.path.insert(0, {str(HERE)!r})\n"
            "sys.modules['ssl'] = sys.modules['_ssl'] = None\n"
            f"import chirrop; c = chirrop.new_client(api_key='chp_x', api_endpoint='{base}/logs')\n"
            "c.log(chirrop.Log('a', 1)); print(c.close(30))"
        )
        self.assertEqual(self.run_in(HERE, code, "-I"), "True\n")

    def test_numpy_like_scalars_are_numbers(self):
        class Scalar:
            def __float__(self):
                return 2.5

        import numbers

        numbers.Real.register(Scalar)
        self.assertEqual(Log("a", Scalar()).value, 2.5)


class LambdaRuntimeTest(TestCase):
    """A process that imitates the runtime: init, invocations, freezes between, a read-only disk."""

    RUNTIME = r"""
import os, signal, sys
os.chdir("/proc" if os.path.isdir("/proc") else "/")  # nothing can be written here
sys.path.insert(0, os.path.join(sys.argv[1], "python"))  # as the layer is mounted: /opt/python
import chirrop
client = chirrop.new_client(api_key="chp_x", api_endpoint=sys.argv[2], flush_delay=86400)

@client.lambda_handler
def handler(event, context):
    client.log(chirrop.Log("orders.count", event["n"], agent="orders"))
    return event["n"] * 2

class Context:
    @staticmethod
    def get_remaining_time_in_millis():
        return 30_000

for n in range(3):
    print(handler({"n": n}, Context()), client.stats().delivered, flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)  # frozen the moment the handler returns
"""

    @classmethod
    def setUpClass(cls):
        """Build the layer with the README's commands."""
        cls.built = folder = pathlib.Path(tempfile.mkdtemp(prefix="chirrop-test-"))
        cls.addClassCleanup(shutil.rmtree, folder, ignore_errors=True)
        shutil.copy(HERE / "chirrop.py", folder)
        part = readme().split("### AWS Lambda")[1]
        commands = re.search(r"```\n(mkdir .*?)```", part, re.DOTALL)[1]
        commands = re.sub(r"python3[.\d]*(?= )", f"'{sys.executable}'", commands)
        subprocess.run(["sh", "-ec", commands], cwd=folder, check=True)

    def layer(self):
        """Return a folder with the layer, unzipped as a function sees it."""
        folder = self.folder()
        shutil.copy(self.built / "layer.zip", folder)
        with zipfile.ZipFile(folder / "layer.zip") as archive:
            archive.extractall(folder / "opt")
        files = [path.name for path in sorted((folder / "opt").rglob("*")) if path.is_file()]
        self.assertEqual(files, [f"chirrop.{sys.implementation.cache_tag}.pyc", "chirrop.py"])
        return folder / "opt"

    def version_of(self, place):
        """Return the version of the chirrop that a process imports which writes nothing."""
        code = "import sys; sys.path.insert(0, sys.argv[1]); import chirrop; print(chirrop.__version__)"
        done = self.python(code, place, env={"PYTHONPATH": "", "PYTHONDONTWRITEBYTECODE": "1"})
        self.assertEqual(done.stderr, "")
        return done.stdout.strip()

    def test_a_layers_bytecode_is_loaded_without_a_look_at_its_source(self):
        layer = self.layer() / "python"
        source = layer / "chirrop.py"
        source.write_text("__version__ = 'source'")  # what would be compiled, were it looked at
        self.assertEqual(self.version_of(layer), chirrop.__version__)
        cached = next(layer.glob("__pycache__/*"))
        cached.rename(layer / "chirrop.pyc")  # where Python 2 had it: the source goes before it
        self.assertEqual(self.version_of(layer), "source")

    def test_a_layer_works_as_an_archive_too(self):
        layer = self.layer()
        self.assertEqual(
            self.version_of(layer.parent / "layer.zip" / "python"), chirrop.__version__
        )

    def test_a_layer_delivers_before_each_freeze_and_after_each_thaw(self):
        folder = self.layer()
        sandbox = Sandbox()
        base = self.serve(sandbox)
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", self.RUNTIME, str(folder), f"{base}/logs"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.addCleanup(process.stderr.close)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.wait, LONG)
        self.addCleanup(process.kill)
        for n in range(3):
            self.assertEqual(process.stdout.readline(), f"{n * 2} {n + 1}\n")
            os.waitpid(process.pid, os.WUNTRACED)  # it is frozen now
            self.assertEqual([log["value"] for log in sandbox.logs], list(range(n + 1)))
            os.kill(process.pid, signal.SIGCONT)
        self.assertEqual((process.wait(LONG), process.stderr.read()), (0, ""))


# ---- README ---------------------------------------------------------------


def readme():
    """Return the README that lies beside this file or beside the module."""
    for folder in (pathlib.Path(__file__).resolve().parent, HERE):
        if (folder / "README.md").exists():
            return (folder / "README.md").read_text(encoding="utf-8")
    raise AssertionError("there is no README.md")


class DocsTest(TestCase):
    README = readme()

    def test_every_python_block_runs(self):
        blocks = re.findall(r"```python\n(.*?)```", self.README, re.DOTALL)
        self.assertGreaterEqual(len(blocks), 6)
        self.addCleanup(os.chdir, os.getcwd())
        for block in blocks:
            with self.subTest(block.splitlines()[0]):
                base = self.serve(Sandbox())
                os.chdir(self.folder())
                os.environ["CHIRROP_API_ENDPOINT"] = f"{base}/logs"
                os.environ["CHIRROP_SERVICER_ENDPOINT"] = base
                scope = {"__name__": "readme"}
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(block, "README.md", "exec"), scope)
                    if "handler" in scope:
                        answer = scope["handler"]({}, LambdaTest.Context(30_000))
                        self.assertEqual(answer, {"statusCode": 200})
                for case in scope.values():
                    if isinstance(case, type) and issubclass(case, unittest.TestCase):
                        suite = unittest.defaultTestLoader.loadTestsFromTestCase(case)
                        result = suite.run(unittest.TestResult())
                        self.assertTrue(result.testsRun)
                        self.assertEqual(result.errors + result.failures, [])
                if "client" in scope:
                    scope["client"].close(LONG)

    def test_each_promise_about_logs_names_a_test_that_exists(self):
        rows = re.findall(r"^\|[^|]+\|[^|]*\|[^|]+\| (`test_[^|]+) \|$", self.README, re.MULTILINE)
        self.assertGreaterEqual(len(rows), 15)
        tests = {
            name
            for value in globals().values()
            if isinstance(value, type)
            for name in dir(value)
            if name.startswith("test_")
        }
        for row in rows:
            for name in re.findall(r"`(\w+)`", row):
                self.assertTrue(name in tests, name)

    def test_each_host_names_a_test_or_a_row_of_the_script_that_exists(self):
        part = self.README.split("## In your host")[1].split("\n##")[0]
        rows = re.findall(r"^\|.*\| ([^|]*`[^|]*) \|$", part, re.MULTILINE)
        self.assertGreaterEqual(len(rows), 12)
        tests = dir(HostTest) + dir(ForkTest) + dir(LambdaRuntimeTest)
        script = HERE / ".ci" / "hosts"
        known = script.read_text(encoding="utf-8") if script.exists() else ""
        for row in rows:
            for name in re.findall(r"`([^`]+)`", row):
                if name.startswith("test_"):
                    self.assertTrue(name in tests, name)
                elif known:
                    self.assertIn(name.split()[0].rstrip(":"), known)

    def test_every_call_and_every_error_is_in_its_table(self):
        for name, _, method, path, _ in CALLS:
            route = re.sub(r"/(evt_1|[pad])(?=/|$)", "/:id", path.split("?")[0])
            self.assertRegex(self.README, rf"(?m)^\| `{name}\(.*\| `{method} {route}` \|$")
        for name in chirrop.__all__:
            if name.endswith("Error") and name != "ChirrOpError":
                self.assertIn(f"| `{name}` |", self.README)

    def test_the_session_works_as_typed(self):
        sandbox = Sandbox()
        server = chirrop._serve_sandbox(sandbox)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        self.addCleanup(lambda: (server.shutdown(), thread.join(LONG), server.server_close()))
        block = self.README.split("A session against")[1].split("```")[1].strip()
        typed = "\n".join(line[2:] for line in block.splitlines() if line.startswith("$ "))
        shown = [line for line in block.splitlines() if not line.startswith("$ ")]
        quick = f"'{sys.executable}' -m chirrop"  # as a script, each would compile it anew
        command = rounds(quick, f"'{sys.executable}' '{HERE / 'chirrop.py'}'")
        typed = typed.replace("8125", str(server.server_port))
        typed = typed.replace("python3 chirrop.py", command)
        done = subprocess.run(
            ["sh", "-c", f"exec 2>&1\n{typed}"], capture_output=True, text=True, timeout=LONG,
            encoding="utf-8", cwd=self.folder(),
            env={**os.environ, "PYTHONUTF8": "1", "PYTHONPATH": str(HERE)},
        )  # fmt: skip

        def alike(lines):  # the chart depends on the hour, an id on chance
            lines = [re.sub("[0-9a-f]{8}-[0-9a-f-]{27}", "ID", x) for x in lines if "█" not in x]
            return [re.sub(r"(?<=\d) {6,}.*", "", line) for line in lines]  # a window without logs

        self.assertEqual(alike(done.stdout.splitlines()), alike(shown))
        self.assertIn("█", done.stdout)

    def test_what_a_log_may_be_names_every_argument_and_limit(self):
        import inspect

        part = self.README.split("## What a `Log` may be")[1].split("##")[0]
        names = re.findall(r"^\| `(\w+)` \|", part, re.MULTILINE)
        self.assertEqual(names, list(inspect.signature(Log).parameters))
        for limit in (
            f"{chirrop.MAX_META_BYTES:,} bytes",
            f"{chirrop.MAX_META_KEYS} top-level keys",
            f"{chirrop.MAX_AGE_SECONDS / 86400:.0f} days",
            f"{chirrop.MAX_AHEAD_SECONDS / 86400:.0f} day ahead",
        ):
            self.assertIn(limit, part)

    def test_every_vocabulary_is_in_its_table(self):
        part = self.README.split("### Vocabularies")[1].split("## Testing")[0]
        for words in (
            chirrop._PERIODS, chirrop._WINDOWS, chirrop._PREVIOUS, chirrop._AGGREGATES,
            chirrop._CONDITIONS, chirrop._SEVERITIES, chirrop._CHANNELS, chirrop._ALERT_STATUSES,
        ):  # fmt: skip
            for word in words:
                self.assertIn(f"`{word}`", part)

    def test_the_readmes_own_unit_test_passes_with_logging_disabled(self):
        block = next(
            b for b in re.findall(r"```python\n(.*?)```", self.README, re.DOTALL) if "TestCase" in b
        )
        os.environ["CHIRROP_DISABLED"] = "1"
        scope = {"__name__": "readme"}
        exec(compile(block, "README.md", "exec"), scope)
        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(scope["CheckoutTest"]).run(result)
        self.assertTrue(result.wasSuccessful() and result.testsRun, result.failures)

    def test_settings_and_their_defaults_are_those_of_config(self):
        import inspect

        rows = dict(
            re.findall(
                r"^\| `(\w+)` \| (.+?) \| .+ \|$",
                self.README.split("## Settings")[1].split("## Errors")[0],
                re.MULTILINE,
            )
        )
        parameters = inspect.signature(Config).parameters
        self.assertEqual(list(rows), list(parameters))
        for name, parameter in parameters.items():
            if (
                isinstance(parameter.default, (int, float))
                and parameter.default is not False
                and name != "log_level"
            ):
                self.assertEqual(float(rows[name]), parameter.default)

    def test_the_commands_stand_at_the_top(self):
        top = self.README[:600]
        self.assertIn("python3 chirrop.py demo", top)
        self.assertIn("python3 -m unittest", top)


# ---- Two processes --------------------------------------------------------


class Told:
    """A test that the other process has run, by its name."""

    def __init__(self, name):
        self.name = name

    def __str__(self):
        return self.name

    def shortDescription(self):
        return None


def cases(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from cases(test)
        else:
            yield test


class Turns(unittest.TestSuite):
    """All tests: this process and a fork of it take the next class in turn, until there is none."""

    _cleanup = False  # each has run some of them only

    def __init__(self, tests):
        super().__init__()
        self._classes = [list(group) for _, group in itertools.groupby(cases(tests), type)]
        self._next, numbers = os.pipe()
        os.write(numbers, bytes(range(len(self._classes))))
        os.close(numbers)

    def countTestCases(self):
        return sum(map(len, self._classes))

    def __iter__(self):
        while number := os.read(self._next, 1):
            yield from self._classes[number[0]]

    def run(self, result, debug=False):
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            self._run_in_fork(writer)
        os.close(writer)
        super().run(result)
        with open(reader, "rb") as file:
            words = file.read()
        os.waitpid(pid, 0)
        os.close(self._next)
        if words:
            count, failures, errors, skipped = pickle.loads(words)
        else:
            count, failures, errors, skipped = 0, [], [("the other process", "ended early\n")], []
        result.testsRun += count
        result.failures += [(Told(name), text) for name, text in failures]
        result.errors += [(Told(name), text) for name, text in errors]
        result.skipped += [(Told(name), text) for name, text in skipped]
        return result

    def _run_in_fork(self, writer):
        try:
            mine = unittest.TestResult()
            super().run(mine)
            told = mine.failures, mine.errors, mine.skipped
            named = [[(str(test), text) for test, text in kind] for kind in told]
            with open(writer, "wb") as file:
                pickle.dump((mine.testsRun, *named), file)
        finally:
            os._exit(0)


def load_tests(loader, tests, pattern):
    """`python3 -m unittest`, without options, uses two cores where there are two."""
    if len(sys.argv) > 1 or "coverage" in sys.modules or sys.gettrace():
        return tests
    if not hasattr(os, "fork") or (os.cpu_count() or 1) < 2:
        return tests
    return Turns(tests)


if __name__ == "__main__":
    unittest.main()
