"""The tests of chirrop: standard library only, run with `python3 -m unittest`.

They stand in the order of the module. Tests use real sockets on loopback, real SQLite files, real processes
and real signals; a fake transport only where the policy itself is tested. Nothing sleeps to wait for
something: waits are for an event, with a time-out that is far longer than needed and fails loudly.
"""

from __future__ import annotations

import ast
import asyncio
import contextlib
import copy
import email.utils
import gc
import http.client
import io
import json
import logging
import os
import pathlib
import pickle
import queue
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
import urllib.parse
import uuid
import zipfile
from contextlib import redirect_stderr
from datetime import datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction

import chirrop
from chirrop import ChirrOpError, Client, Config, Log, Sandbox, SqliteSpool, new_client

HERE = pathlib.Path(chirrop.__file__).resolve().parent
KEY = "chp_test"
LONG = 30.0  # seconds: a time-out that only a failure reaches


class FakeTransport:
    """Answer from a script, record requests; what is not scripted is answered by `default`.

    An answer is a status, a (status, body, headers) tuple, an exception to raise, or a callable of the body.
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


def ids(logs):
    return [log["log_id"] for log in logs]


class TestCase(unittest.TestCase):
    """Closes what it opens; fails when a thread of ours dies or stays, or when an account does not balance."""

    maxDiff = None

    def setUp(self):
        environment = dict(os.environ)
        self.addCleanup(lambda: (os.environ.clear(), os.environ.update(environment)))
        for name in [n for n in os.environ if n.startswith("CHIRROP_") or n.lower().endswith("_proxy")]:
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

    def assertNoThreads(self):
        for thread in threading.enumerate():
            if thread.name.startswith("chirrop-"):
                thread.join(LONG)
                self.assertFalse(thread.is_alive(), thread)

    def assertBalanced(self, client):
        stats = client.stats()
        self.assertEqual(
            stats.accepted,
            stats.delivered + sum(stats.dropped.values()) + stats.queued + stats.in_flight + stats.parked,
            stats,
        )
        return stats

    def client(self, *answers, **fields):
        """Return a client on a FakeTransport with these answers, without jitter; closed at the end."""
        fields.setdefault("transport", FakeTransport(*answers))
        fields.setdefault("api_key", KEY)
        client = new_client(**fields)
        client._outbox._rand = lambda: 0.0  # backoff without jitter is no wait at all: full jitter starts at 0
        self.addCleanup(self.assertBalanced, client)
        self.addCleanup(client.close, 5)
        return client

    def folder(self, within=None):
        path = tempfile.mkdtemp(prefix="chirrop-test-", dir=within)
        self.addCleanup(shutil.rmtree, path, ignore_errors=True)
        return pathlib.Path(path)

    def python(self, code, *args, timeout=LONG, env=None, **options):
        """Run a program in a new process that can import chirrop; return the finished process."""
        return subprocess.run(
            [sys.executable, "-X", "dev", "-W", "error", "-c", code, *map(str, args)],
            capture_output=True, text=True, timeout=timeout,
            env={**os.environ, "PYTHONPATH": str(HERE), "PYTHONFAULTHANDLER": "1", **(env or {})}, **options,
        )  # fmt: skip


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
                answer = chirrop._Answer(status, b'{"error": "because"}', {"retry-AFTER": "7"})
                error = answer.error()
                self.assertIs(type(error), getattr(chirrop, f"ChirrOp{kind}Error"))
                self.assertEqual((error.status_code, error.body, error.retry_after), (status, {"error": "because"}, 7.0))

    def test_the_message_comes_from_whatever_the_server_sent(self):
        for body, text in (
            (b'{"error": "invalid api key"}', "HTTP 401: invalid api key"),
            (b'{"message": "no"}', "HTTP 401: no"),
            (b"plain text", "HTTP 401: plain text"),
            (b"", "HTTP 401: unauthorized"),
            (b'{"error": {"deep": 1}}', 'HTTP 401: {"error": {"deep": 1}}'),
            (b"\xff\xfe", "HTTP 401: \ufffd\ufffd"),
            (b"[" * 100000, "HTTP 401: " + "[" * 200),
        ):
            with self.subTest(body[:20]):
                self.assertEqual(str(chirrop._Answer(401, body).error()), text)

    def test_errors_survive_pickle_and_copy_with_all_they_carry(self):
        for name in chirrop.__all__:
            kind = getattr(chirrop, name)
            if isinstance(kind, type) and issubclass(kind, Exception):
                error = kind("text", status_code=418, body={"a": [1]}, retry_after=2.5)
                for twin in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
                    self.assertIs(type(twin), kind)
                    self.assertEqual((str(twin), twin.args, vars(twin)), (str(error), error.args, vars(error)))

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
        self.assertEqual((sent["event"], sent["value"], sent["agent"]), ("tool.errors.count", 3, "billing"))
        self.assertEqual(sent["meta"], {"k": [1, "ü", None]})
        moment = chirrop._parse_time(sent["occurred_at"]).timestamp()
        self.assertTrue(before - 0.001 <= moment <= time.time())
        self.assertEqual(json.loads(log._body), sent)
        self.assertNotIn(b" ", log._body)
        self.assertEqual((log.event, log.value, log.agent, log.log_id), (*list(sent.values())[1:3], "billing", sent["log_id"]))

    def test_a_log_cannot_be_changed_and_equals_its_copies(self):
        log = Log("a", 1)
        for change in (lambda: setattr(log, "value", 2), lambda: delattr(log, "_body"), lambda: setattr(log, "x", 1)):
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
        for field, value in (("event", "a\ud800"), ("agent", "\udfff"), ("meta", {"k": "\ud800"}), ("meta", {"\udc00": 1})):
            self.refused(f"{field} must be JSON-encodable", **{field: value})

    def test_meta_is_strictly_json(self):
        for bad in (
            float("nan"), {"a": float("inf")}, {float("nan"): 1}, cycle(), nested(100_000), {1, 2}, b"x", object(), Hostile(),
            {"a": Hostile()}, HostileDict(a=1), {(1, 2): 3}, 10**5000 if sys.version_info >= (3, 11) else {1}, Decimal(1),
        ):  # fmt: skip
            with self.subTest(type(bad).__name__):
                self.refused("meta must be JSON-encodable", meta=bad)

    def test_meta_may_be_any_json_value(self):
        for meta in (0, False, "", [], {}, [None], 1.5, "text", {"a": {"b": [1, 2, {"c": None}]}}, {1: 2, None: 3, True: 4}):
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
        self.assertIn("got 11", self.refused("at most 10 top-level keys", meta={str(i): 0 for i in range(11)}))

    def test_log_id_is_canonical_or_made(self):
        text = "123E4567E89B12D3A456426614174000"
        for given in (text, f"{{{text}}}", f" {text} ", uuid.UUID(text)):
            self.assertEqual(Log("a", 1, log_id=given).log_id, "123e4567-e89b-12d3-a456-426614174000")
        for given in (None, "", "  "):
            made = uuid.UUID(Log("a", 1, log_id=given).log_id)
            self.assertEqual((made.version, made.variant), (4, uuid.RFC_4122))
        for bad in ("x", 1, b"1" * 16, Hostile(), "\ud800"):
            self.refused("log_id must be a UUID, got ", log_id=bad)

    def test_made_ids_do_not_repeat_and_have_random_bits_everywhere(self):
        made = [Log("a", 1).log_id for _ in range(20000)]
        self.assertEqual(len(set(made)), 20000)
        for place in set(range(36)) - {8, 13, 14, 18, 23}:
            self.assertEqual(len({i[place] for i in made}), 4 if place == 19 else 16, place)

    def test_threads_never_share_an_id(self):
        made = [[] for _ in range(8)]
        threads = [threading.Thread(target=lambda o=o: o.extend(Log("a", 1).log_id for _ in range(3000))) for o in made]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG)
        self.assertEqual(len({i for part in made for i in part}), 24000)

    def test_processes_with_one_random_seed_and_a_fork_make_different_ids(self):
        code = (
            "import random, os; random.seed(1); from chirrop import Log; import chirrop\n"
            "mine = Log('a', 1).log_id; r, w = os.pipe(); pid = os.fork()\n"
            "made = ' '.join(Log('a', 1).log_id for _ in range(100))\n"
            "if pid: os.waitpid(pid, 0); print(mine, made, os.read(r, 9999).decode())\n"
            "else: os.write(w, made.encode()); os._exit(0)"
        )
        env = {"PYTHONWARNINGS": "ignore"}
        made = [i for _ in range(2) for i in self.python(code, env=env).stdout.split()]
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
        for moment in (naive, naive.replace(tzinfo=timezone.utc), (naive + timedelta(hours=5)).replace(tzinfo=timezone(timedelta(hours=5)))):
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
            chirrop._check_log({"event": "a", "value": 1, "occurred_at": datetime.fromtimestamp(now + seconds, timezone.utc)}, now)
        for seconds in (-30 * 86400 - 1, 86401):
            with self.assertRaisesRegex(chirrop.ChirrOpValidationError, "last 30 days and at most 1 day ahead"):
                chirrop._check_log({"event": "a", "value": 1, "occurred_at": datetime.fromtimestamp(now + seconds, timezone.utc)}, now)

    def test_naive_times_are_utc_whatever_the_local_zone(self):
        code = (
            "from chirrop import Log; from datetime import datetime, timezone\n"
            "t = datetime.now(timezone.utc).replace(tzinfo=None); print(Log('a', 1, occurred_at=t).occurred_at == t.isoformat() + 'Z')"
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

    def test_wrong_settings_are_refused_by_name(self):
        wrong = {
            "retries": (-1, 1.5, "3", True, None), "servicer_retries": (-1, None), "timeout": (0, -1, "1", float("nan"), 1e9, None, True),
            "batch_size": (0, 1.5, None), "flush_delay": (-1, float("inf"), "x"), "queue_size": (-1, None, 1.0),
            "log_level": (-1, "LOUD", 1.5, None), "on_exhausted": ("", "hold", None), "max_senders": (0, 65, None),
            "exit_timeout": (-1, float("nan")), "transport": (1, "x"), "ssl_context": (1, True), "spool": (1, "", object()), "on_drop": (1,),
            "api_endpoint": ("ftp://x/", "logs", "http://", "https://u:p@h/", "http://h:99999/", "http://h/?a=b", "http://h/#f", "http://h/a b", "http://h\r\n/", 1, "http://h/\u00fc"),
            "servicer_endpoint": ("file:///etc/passwd", "https://user@h/"), "api_key": (1, b"chp_x"),
        }  # fmt: skip
        for name, values in wrong.items():
            for value in values:
                with self.subTest(f"{name}={value!r}"), self.assertRaises(chirrop.ChirrOpValidationError) as caught:
                    Config(**{"api_key": KEY, name: value})
                self.assertIn(name, str(caught.exception))
        with self.assertRaisesRegex(chirrop.ChirrOpValidationError, "no field retrys"):
            new_client(api_key=KEY, retrys=1)
        with self.assertRaisesRegex(chirrop.ChirrOpValidationError, "not both"):
            new_client(Config(api_key=KEY), retries=1)
        with self.assertRaises(chirrop.ChirrOpValidationError):
            Client({"api_key": KEY})

    def test_a_config_cannot_be_changed_and_shows_no_key(self):
        config = Config(api_key="chp_canary", on_drop=print)
        with self.assertRaises(AttributeError):
            config.retries = 3
        self.assertNotIn("canary", repr(config) + str(config) + repr(vars(config)))
        self.assertEqual((config.api_key, f"{config.api_key}"), ("chp_canary", "chp_canary"))
        self.assertEqual(vars(copy.copy(config)), vars(config))

    def test_the_key_comes_from_the_argument_then_the_environment_then_dotenv(self):
        with self.assertRaisesRegex(chirrop.ChirrOpValidationError, "^API key is required$"):
            Config()
        pathlib.Path(".env").write_text("CHIRROP_API_KEY=chp_file\n")
        self.assertEqual(Config().api_key, "chp_file")
        os.environ["CHIRROP_API_KEY"] = "chp_environment"
        self.assertEqual(Config().api_key, "chp_environment")
        self.assertEqual(Config(api_key=" chp_argument\n").api_key, "chp_argument")

    def test_a_key_of_another_form_is_refused_without_showing_it(self):
        for bad, text in (
            ("canary", "^Invalid API key: must start with 'chp_'$"), ("chp_\u00fccanary", "printable ASCII"), ("chp_canary\r\nX: y", "printable ASCII"),
            ("chp_can ary", "printable ASCII"), ("CHP_canary", "must start with"),
        ):  # fmt: skip
            with self.assertRaisesRegex(chirrop.ChirrOpValidationError, text) as caught:
                Config(api_key=bad)
            self.assertNotIn("canary", "".join(traceback.TracebackException.from_exception(caught.exception, capture_locals=True).format()).replace(repr(bad), ""))

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
        os.environ.update(CHIRROP_API_ENDPOINT="http://e/logs/", CHIRROP_SERVICER_ENDPOINT="http://e:8080/v1")
        config = Config(api_key=KEY)
        self.assertEqual((config.api_endpoint, config.servicer_endpoint), ("http://e/logs", "http://e:8080/v1"))
        self.assertEqual(Config(api_key=KEY, api_endpoint="https://a/x").api_endpoint, "https://a/x")
        os.environ["CHIRROP_API_ENDPOINT"] = "nonsense"
        with self.assertRaisesRegex(chirrop.ChirrOpValidationError, "api_endpoint"):
            Config(api_key=KEY)

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
            self.assertEqual((client.flush(), client.close(), client.stats().accepted), (True, True, 0))
            self.assertEqual(client._link._transport.requests, [])
            with self.assertRaisesRegex(ChirrOpError, "disabled"):
                client.list_events()


# ---- Retry policy ---------------------------------------------------------


class PolicyTest(TestCase):
    def test_every_status_has_its_verdict(self):
        table = {
            "delivered": (200, 201, 202, 204, 299), "split": (400, 413, 422), "retry": (0, 100, 408, 429, 501, 502, 504, 505, 520, 599),
            "refused": (300, 301, 302, 304, 307, 308, 401, 402, 403, 404, 405, 409, 410, 418, 451, 500, 503),
        }  # fmt: skip
        for verdict, statuses in table.items():
            for status in statuses:
                self.assertEqual(chirrop._verdict(status), verdict, status)

    def test_backoff_doubles_to_its_cap_and_spreads_over_all_of_it(self):
        windows = [chirrop._backoff(n, None, lambda: 0.999999) for n in range(1, 9)]
        self.assertEqual([round(w) for w in windows], [1, 2, 4, 8, 16, 30, 30, 30])
        self.assertEqual(chirrop._backoff(1, None, lambda: 0.0), 0.0)
        self.assertLess(chirrop._backoff(10**9, None, lambda: 0.5), 30)
        waits = [chirrop._backoff(20, None, chirrop._random) for _ in range(2000)]
        self.assertTrue(0 <= min(waits) < 3 and 27 < max(waits) <= 30 and 13 < sum(waits) / 2000 < 17)

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
            for name in ("Retry-After", "retry-after", "RETRY-AFTER"):
                with self.subTest(text[:40]):
                    self.assertEqual(chirrop._retry_after({"x": "1", name: text}, now), seconds)
        self.assertIsNone(chirrop._retry_after({}, now))


# ---- Buffers and outbox ---------------------------------------------------


class BufferMixin:
    """What the memory queue and the spool have in common."""

    def test_logs_come_out_in_order_up_to_the_limit(self):
        buffer = self.buffer()
        for i in range(7):
            buffer.put(b"%d" % i)
        self.assertEqual(len(buffer), 7)
        self.assertEqual(buffer.take(3)[1], [b"0", b"1", b"2"])
        buffer.put(b"7")
        self.assertEqual(len(buffer), 5)
        self.assertEqual(buffer.take(250)[1], [b"3", b"4", b"5", b"6", b"7"])
        self.assertEqual((buffer.take(250)[1], len(buffer)), ([], 0))

    def test_an_empty_buffer_takes_every_call(self):
        buffer = self.buffer()
        buffer.adopt()
        buffer.remove([])
        buffer.bury([], "x")
        self.assertEqual((buffer.park([]), buffer.give_back([]), buffer.lost), (False, False, 0))


class MemoryBufferTest(BufferMixin, TestCase):
    def buffer(self):
        return chirrop._Memory()


class SpoolBufferTest(BufferMixin, TestCase):
    def buffer(self):
        spool = SqliteSpool(self.folder() / "spool")
        self.addCleanup(spool.close)
        return spool


class OutboxTest(TestCase):
    """The state machine alone: no threads, the clock is a number."""

    def outbox(self, **fields):
        return chirrop._Outbox(chirrop._Memory(), Config(api_key=KEY, **fields), lambda: 0.5)

    def fill(self, outbox, count):
        logs = [Log("a", i)._body for i in range(count)]
        for log in logs:
            outbox.put(log)
        return logs

    def test_a_lone_log_waits_for_others_until_flush_delay(self):
        outbox = self.outbox(flush_delay=0.5)
        self.assertIsNone(outbox.arm(0.0))
        self.fill(outbox, 1)
        self.assertEqual(outbox.arm(10.0), 0.5)
        self.assertIsNone(outbox.take(10.4))
        self.assertEqual(len(outbox.take(10.5).items), 1)

    def test_batch_size_starts_a_send_and_250_end_it(self):
        outbox = self.outbox(batch_size=10)
        self.fill(outbox, 9)
        self.assertIsNone(outbox.take(0.0))
        self.fill(outbox, 491)
        self.assertEqual(len(outbox.take(0.0).items), 250)
        self.assertIsNone(outbox.take(0.0), "one request at a time to begin with")

    def test_a_sender_is_called_once_per_batch(self):
        outbox, calls = self.outbox(), []
        outbox.on_ready = lambda: calls.append(len(outbox.buffer))
        self.fill(outbox, 3)
        self.assertEqual(calls, [1])
        outbox.arm(0.0)
        self.fill(outbox, 600)
        self.assertEqual(calls, [1, 250])

    def test_successes_with_a_backlog_bring_senders_and_a_failure_takes_them_back_to_one(self):
        outbox = self.outbox(max_senders=3)
        self.fill(outbox, 250 * 12)
        widths = []
        for _ in range(4):
            outbox.settle(outbox.take(0.0), chirrop._Answer(200), 0.0)
            widths.append(outbox.width)
        self.assertEqual(widths, [2, 3, 3, 3])
        flying = [outbox.take(0.0) for _ in range(3)]
        self.assertIsNone(outbox.take(0.0))
        outbox.settle(flying[0], chirrop._Answer(502), 0.0)
        self.assertEqual(outbox.width, 1)

    def test_a_retried_batch_is_the_same_bytes_and_goes_first(self):
        outbox = self.outbox()
        logs = self.fill(outbox, 300)
        batch = outbox.take(0.0)
        outbox.settle(batch, chirrop._Answer(502), 0.0)
        self.assertEqual(outbox.arm(0.0), 0.5)  # half of the first window, by rand
        self.assertIsNone(outbox.take(0.4))
        self.assertIs(outbox.take(0.5), batch)
        self.assertEqual(batch.items, logs[:250])
        self.assertEqual(outbox.stats().retries, 1)

    def test_failures_at_the_same_time_count_once(self):
        outbox = self.outbox()
        outbox.width = 4
        self.fill(outbox, 1000)
        for batch in [outbox.take(0.0) for _ in range(4)]:
            outbox.settle(batch, chirrop._Answer(0, cause=OSError()), 0.0)
        self.assertEqual(outbox.arm(0.0), 0.5)

    def test_an_exhausted_batch_is_kept_while_others_pass(self):
        outbox = self.outbox(retries=1)
        self.fill(outbox, 500)
        stuck = outbox.take(0.0)
        now = 0.0
        for _ in range(2):
            outbox.settle(stuck, chirrop._Answer(502), now)
            now += 5.0
            stuck_again = outbox.take(now)
        self.assertIsNot(stuck_again, stuck)
        outbox.settle(stuck_again, chirrop._Answer(200), now)
        self.assertEqual(outbox.stats().delivered, 250)
        self.assertIsNone(outbox.take(now))
        self.assertIs(outbox.take(now + 30), stuck)

    def test_an_exhausted_batch_is_dropped_when_asked_for(self):
        outbox = self.outbox(retries=2, on_exhausted="drop")
        logs = self.fill(outbox, 250)
        now, drops = 0.0, []
        for _ in range(3):
            drops = outbox.settle(outbox.take(now), chirrop._Answer(0, cause=OSError("down")), now)
            now += 100
        self.assertEqual([(d.reason, d.items) for d in drops], [("exhausted", logs)])
        self.assertEqual(outbox.stats().dropped, {"exhausted": 250})

    def test_a_flush_ends_a_backoff_and_covers_only_what_was_there(self):
        outbox = self.outbox()
        self.fill(outbox, 1)
        flush = outbox.begin_flush(0.0)
        outbox.settle(outbox.take(0.0), chirrop._Answer(429, headers={"Retry-After": "60"}), 0.0)
        self.assertIsNone(outbox.take(1.0))
        again = outbox.begin_flush(1.0)
        batch = outbox.take(1.0)
        self.fill(outbox, 5)
        self.assertFalse(flush.done or again.done)
        outbox.settle(batch, chirrop._Answer(200), 1.0)
        self.assertTrue(flush.clean and again.clean and flush.done and again.done)
        self.assertEqual(outbox.stats().queued, 5)

    def test_a_flush_is_true_only_if_its_own_logs_were_delivered(self):
        for poison, clean in ((0, False), (5, True)):
            outbox = self.outbox()
            self.fill(outbox, 5)
            flush = outbox.begin_flush(0.0)
            self.fill(outbox, 5)
            batches = [outbox.take(0.0)]
            while batches:
                batch = batches.pop()
                bad = any(json.loads(i)["value"] == poison % 5 for i in batch.items) and (batch.first < 5) == (poison < 5)
                if not bad and len(batch.items) > 1 and batch.first < 5 < batch.first + len(batch.items):
                    bad = poison >= 5
                outbox.settle(batch, chirrop._Answer(400 if bad else 200), 0.0)
                following = outbox.take(0.0)
                batches += [following] if following else []
            self.assertEqual((flush.done, flush.clean), (True, clean))

    def test_a_flush_gives_up_after_one_full_cycle_of_failures(self):
        outbox = self.outbox(retries=2)
        self.fill(outbox, 600)
        flush, now = outbox.begin_flush(0.0), 0.0
        for attempt in range(3):
            self.assertFalse(flush.done, attempt)
            outbox.settle(outbox.take(now), chirrop._Answer(502), now)
            now += 100
        self.assertEqual((flush.done, flush.clean), (True, False))
        self.assertEqual(outbox.stats().queued, 600)

    def test_an_answer_after_stop_changes_nothing(self):
        outbox = self.outbox()
        logs = self.fill(outbox, 300)
        batch = outbox.take(0.0)
        drops = outbox.stop()
        self.assertEqual(sorted(item for d in drops for item in d.items), sorted(logs))
        before = outbox.stats()
        self.assertEqual((outbox.settle(batch, chirrop._Answer(200), 0.0), outbox.stats()), ([], before))
        self.assertEqual(before.dropped, {"closed": 300})

    def test_a_log_that_slips_past_the_gate_is_swept(self):
        outbox = self.outbox()
        outbox.closed = False
        original = outbox.buffer.put

        class Slow(chirrop._Memory):
            def put(self, data):
                outbox.stop()  # between the gate and the append
                original(data)

        outbox.buffer.__class__ = Slow
        self.assertEqual([d.reason for d in outbox.put(b"{}")], ["closed"])
        self.assertEqual(outbox.stats().dropped, {"closed": 1})

    def test_a_bounded_queue_counts_what_is_in_flight(self):
        outbox = self.outbox(queue_size=300)
        self.fill(outbox, 300)
        batch = outbox.take(0.0)
        with self.assertRaisesRegex(chirrop.ChirrOpQueueFullError, "300 logs"):
            outbox.put(b"{}", timeout=0.0)
        outbox.settle(batch, chirrop._Answer(200), 0.0)
        outbox.put(b"{}", timeout=0.0)
        self.assertEqual(outbox.held(), 51)


# ---- Simulation -----------------------------------------------------------


class Simulation:
    """One seed: the real outbox, buffer and sender under a scripted transport and a hand-turned clock.

    There are no threads. What would happen at the same time happens inside the transport: before it
    answers, it may log, flush, send another batch, close, or crash the process (for the spool).
    """

    class Crash(BaseException):
        pass

    def __init__(self, seed, path=None):
        self.rng = random.Random(seed)
        self.path, self.now, self.depth = path, 0.0, 0
        self.accepted, self.dropped, self.acknowledged, self.stored = [], [], [], set()
        self.healthy = False
        self.runs = []
        self.poison = set()
        self.start()

    def start(self):
        rng = self.rng
        self.config = Config(
            api_key=KEY, transport=self.transport, retries=rng.choice((0, 1, 3)), on_exhausted=rng.choice(("keep", "drop")),
            batch_size=rng.choice((1, 3, 250)), max_senders=rng.choice((1, 3)), on_drop=self.on_drop,
        )  # fmt: skip
        buffer = SqliteSpool(self.path, synchronous="NORMAL") if self.path else chirrop._Memory()
        self.outbox = chirrop._Outbox(buffer, self.config, rng.random)
        self.sender = chirrop._Sender(self.outbox, chirrop._Link(self.config), self.config, lambda: self.now)
        self.sender._spawn = lambda: None
        self.sender.report.write = lambda final=False: None

    def on_drop(self, logs, error):
        self.dropped += ids(logs)
        if self.rng.random() < 0.1:
            raise RuntimeError("on_drop")

    def transport(self, method, url, body, headers, timeout):
        logs = json.loads(body)
        assert 1 <= len(logs) <= 250
        for _ in range(0 if self.healthy else self.rng.choice((0, 0, 1, 2))):
            self.act()
        self.now += self.rng.choice((0.0, 0.1, 5.0))
        roll = "ok" if self.healthy else self.rng.choice(("ok", "ok", "ok", "lost", "reset", "status", "poison", "late crash"))
        if roll == "lost":
            raise ConnectionResetError("before")
        if any(log["log_id"] in self.poison for log in logs):
            return self.rng.choice((400, 413, 422)), b'{"error": "poison"}', {}
        if roll == "status":
            after = self.rng.choice(({}, {"Retry-After": "2"}, {"Retry-After": "nan"}))
            return self.rng.choice((302, 401, 403, 404, 408, 429, 500, 502, 503, 504, 599)), b"", after
        self.stored.update(ids(logs))
        if roll == "reset":
            raise ConnectionResetError("after")
        if roll == "late crash" and self.path:
            raise self.Crash
        self.acknowledged += ids(logs) if not self.outbox.stopped else []
        return 200, b"", {}

    def act(self):
        action = self.rng.choice(("log", "log", "log", "send", "send", "tick", "flush", "stats", "end"))
        if action == "log":
            for _ in range(self.rng.choice((1, 2, 300 if self.rng.random() < 0.03 else 5))):
                log = Log("a", 1)
                if self.rng.random() < 0.05:
                    self.poison.add(log.log_id)
                late = self.outbox.put(log._body)
                self.accepted.append(log.log_id)
                if late:
                    self.sender.report.late(late)
        elif action == "send":
            self.send()
        elif action == "tick":
            self.now += self.rng.choice((0.01, 0.5, 3.0, 40.0))
        elif action == "flush":
            self.outbox.begin_flush(self.now)
        elif action == "end" and self.rng.random() < 0.15:
            if self.path and self.rng.random() < 0.7:
                raise self.Crash
            self.sender._shut()
        self.balance()

    def send(self):
        if self.depth > 4:
            return False
        batch = self.outbox.take(self.now)
        if batch is None:
            return False
        self.depth += 1
        try:
            self.sender._deliver(batch, 1.0)
        finally:
            self.depth -= 1
        return True

    def crash(self):
        """Lose the process: everything in memory goes, the kernel closes its files and locks."""
        spool = self.outbox.buffer
        if spool._conn is not None:
            spool._conn.close()
            os.close(spool._guard)
        self.depth = 0
        self.start()

    def balance(self):
        stats = self.outbox.stats()
        total = stats.delivered + sum(stats.dropped.values()) + stats.queued + stats.in_flight + stats.parked
        assert stats.accepted == total and min(stats.queued, stats.in_flight, stats.parked) >= 0, stats
        return stats

    def run(self):
        for _ in range(self.rng.randrange(5, 25)):
            try:
                self.act()
            except self.Crash:
                self.crash()
            if self.outbox.stopped and self.rng.random() < 0.5:
                if not self.path:
                    break
                self.start()
        self.finish()

    def finish(self):
        """Let the server recover and everything be sent, in a new process where logs may wait on disk."""
        self.healthy = True
        for _ in range(2 if self.path else 1):
            if self.path:
                if not self.outbox.stopped:
                    self.sender._shut()
                self.start()
            for _ in range(2000):
                flush = self.outbox.begin_flush(self.now)
                if flush.done:
                    break
                try:
                    while self.send():
                        pass
                except self.Crash:
                    self.crash()
                self.now += 40.0
            else:
                raise AssertionError("it never ends")
            held = self.outbox.held()
            self.sender._shut()
            assert self.outbox.stopped or not held
        stats = self.balance()
        assert stats.queued == stats.in_flight == stats.parked == 0, stats
        accepted, dropped, delivered = set(self.accepted), set(self.dropped), set(self.acknowledged)
        assert len(accepted) == len(self.accepted)
        assert len(dropped) == len(self.dropped), "a drop was reported twice"
        assert delivered <= accepted and dropped <= accepted and self.stored <= accepted
        assert accepted == (delivered | dropped | (self.stored if self.path else set())), "a log is unaccounted for"
        if not self.path:
            assert not delivered & dropped
            assert stats.accepted == len(accepted), (stats.accepted, len(accepted))
            assert stats.delivered == len(delivered) and sum(stats.dropped.values()) == len(dropped)


class SimulationTest(TestCase):
    """CHIRROP_TEST_SEED=N runs one seed alone; CHIRROP_TEST_SEEDS=N sets how many are run."""

    def seeds(self, path=None):
        one = os.environ.get("TEST_SEED")
        for seed in [int(one)] if one else range(int(os.environ.get("TEST_SEEDS", "5000"))):
            where = path and f"{path}/{seed}"
            try:
                Simulation(seed, where).run()
            except BaseException as exc:
                raise AssertionError(f"seed {seed}: {type(exc).__name__}: {exc}; run it alone with TEST_SEED={seed}") from exc
            if where:
                for name in os.listdir(path):
                    os.unlink(f"{path}/{name}")

    def test_every_log_is_accounted_for_in_memory_under_5000_seeds(self):
        self.seeds()

    def test_every_log_is_accounted_for_with_a_spool_and_crashes_under_5000_seeds(self):
        memory = "/dev/shm"  # a file system in memory, where there is one: commits without a disk
        self.seeds(self.folder(memory if os.path.isdir(memory) else None))


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
        self.assertEqual((method, url, timeout), ("POST", "https://logs.chirrop.com/v1.0/logs", 10.0))
        self.assertEqual(headers["Authorization"], f"Bearer {KEY}")
        self.assertEqual(headers["Content-Type"], "application/json")

    def test_only_a_log_can_be_logged(self):
        client = self.client()
        for bad in (None, {"event": "a", "value": 1}, "a", Hostile(), Log):
            with self.assertRaisesRegex(chirrop.ChirrOpValidationError, "entry must be a Log, got"):
                client.log(bad)

    def test_no_thread_before_the_first_log_and_none_after_close(self):
        client = self.client()
        before = threading.active_count()
        client.flush()
        client.stats()
        self.assertEqual(threading.active_count(), before)
        client.log(Log("a", 1))
        client.flush(LONG)
        self.assertEqual([t.name for t in threading.enumerate() if t.name.startswith("chirrop")], ["chirrop-sender-1"])
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
        self.assertEqual([logs[0]["value"] for logs, _ in dropped], list(range(5)))
        self.assertEqual(client.stats().dropped, {"closed": 5})
        self.assertEqual([r.levelname for r in self.records], ["WARNING"])

    def test_close_drops_and_reports_what_it_cannot_send(self):
        dropped = []
        client = self.client(transport=FakeTransport(default=502), retries=1, on_drop=lambda logs, error: dropped.extend(logs))
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
        self.assertTrue(client._outbox.stopped)

    def test_one_config_serves_many_clients(self):
        transport = FakeTransport()
        config = Config(api_key=KEY, transport=transport)
        before = dict(vars(config))
        with Client(config) as one, new_client(config) as two:
            one.log(Log("a", 1))
            two.log(Log("a", 2))
        self.assertEqual((len(transport.logs()), vars(config)), (2, before))

    def test_each_refused_status_drops_the_batch_with_its_error(self):
        for status in (401, 403, 404, 500, 503, 302, 418):
            with self.subTest(status):
                dropped = []
                client = self.client(status, on_drop=lambda logs, error, d=dropped: d.append((len(logs), error.status_code)))
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
        client.close()
        said = [(r.levelname, r.getMessage().split(":")[0]) for r in self.records]
        self.assertEqual(said, [("WARNING", "logs are held, retrying"), ("INFO", "logs are accepted again")] * 2)

    def test_a_full_bounded_queue_waits_for_room_then_raises(self):
        gate, entered = threading.Event(), threading.Event()

        def slow(body):
            entered.set()
            gate.wait(LONG)
            return 200, b"", {}

        client = self.client(transport=FakeTransport(default=slow), queue_size=2, batch_size=1, timeout=0.05)
        self.addCleanup(gate.set)
        client.log(Log("a", 1))
        self.assertTrue(entered.wait(LONG))
        client.log(Log("a", 2))
        with self.assertRaisesRegex(chirrop.ChirrOpQueueFullError, "queue is full: 2 logs"):
            client.log(Log("a", 3))
        waiting = threading.Thread(target=lambda: Client.log(client, Log("a", 4)))
        object.__setattr__(client, "config", Config(api_key=KEY, timeout=LONG))
        waiting.start()
        gate.set()
        waiting.join(LONG)
        self.assertTrue(client.flush(LONG))
        self.assertEqual(client.stats().delivered, 3)

    def test_a_broken_transport_is_a_network_failure(self):
        for answer in (None, 5, ("200", b"", {}), (200, "text", {}), (200, b""), SystemExit, KeyboardInterrupt, MemoryError):
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
                self.assertEqual((stats.delivered, stats.retries), (1, 1))
                client.close()

    def test_send_logs_delivers_in_this_thread(self):
        transport = FakeTransport(502, OSError("reset"), 200)
        client = self.client(transport=transport)
        client.send_logs(Log("a", i) for i in range(600))
        self.assertEqual([len(json.loads(r[2])) for r in transport.requests], [250, 250, 250, 250, 100])
        self.assertEqual(client.stats().delivered, 600)
        self.assertEqual(client._sender._threads, [])

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
        self.assertFalse(view._sender.abandoned)
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
        client = self.client(transport=FakeTransport(default=lambda body: (random.choice((200, 200, 400, 502, 401)), b"", {})), retries=50)
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
    ("get_alert_deliveries", ("a", "all", 1, 0), "GET", "/alerts/a/deliveries?kind=all&limit=1&offset=0", None),
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
        verbs = ("list_", "get_", "create_", "update_", "test_", "acknowledge_", "resolve_", "archive_")
        self.assertEqual({n for n in dir(Client) if n.startswith(verbs)}, {c[0] for c in CALLS})
        self.assertEqual(len(CALLS), 21)
        for name, _, method, path, _ in CALLS:
            route = re.sub(r"/(evt_1|[pad])(?=/|$)", "/{}", path.split("?")[0])
            text = re.sub(r"\{\w+\}", "{}", getattr(Client, name).__doc__)
            self.assertIn(f"{method} /v1.0{route}", text, name)

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
                    self.assertEqual(len(client._link._transport.requests), 1 if name in CREATING else 3)

    def test_every_call_is_repeated_on_429_and_when_no_connection_was_made(self):
        for failure in ((429, b"", {"Retry-After": "0"}), ConnectionRefusedError(), chirrop._NeverSent("dns")):
            for name, args, *_ in CALLS:
                client = self.client(failure, failure, 200)
                getattr(client, name)(*args)
                self.assertEqual(len(client._link._transport.requests), 3)

    def test_creating_calls_go_on_a_connection_of_their_own(self):
        for name, args, *_ in CALLS:
            client = self.client(200)
            getattr(client, name)(*args)
            self.assertEqual(client._link._transport.requests[0][3].get("Connection"), "close" if name in CREATING else None)

    def test_a_final_status_is_raised_at_once(self):
        for status in (400, 401, 403, 404, 413, 422, 500, 503, 301):
            client = self.client(status)
            with self.assertRaises(chirrop.ChirrOpNonRetryableError) as caught:
                client.list_events()
            self.assertEqual((caught.exception.status_code, len(client._link._transport.requests)), (status, 1))

    def test_a_long_retry_after_raises_at_once_and_a_short_one_is_waited_for(self):
        client = self.client((429, b"", {"Retry-After": "31"}))
        with self.assertRaises(chirrop.ChirrOpRateLimitError) as caught:
            client.list_events()
        self.assertEqual(caught.exception.retry_after, 31.0)
        client, waits = self.client((429, b"", {"Retry-After": "30"})), []
        client._pause = waits.append
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
            ("list_alerts", ("open",)), ("get_alert_deliveries", ("a", "real")), ("get_alert_deliveries", ("a", "all", "5")),
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
        for given, segment in ((" evt_1 ", "evt_1"), ("a/b", "a%2Fb"), ("../x", "..%2Fx"), ("a?b#c", "a%3Fb%23c"), ("ü%", "%C3%BC%25"), ("a\r\nb", "a%0D%0Ab"), ("...", "...")):
            client = self.client()
            client.get_event(given)
            self.assertEqual(client._link._transport.requests[0][1], f"https://api.chirrop.com/v1.0/events/{segment}")
        for bad in ("", "  ", ".", "..", None, 5, b"x", "\ud800"):
            with self.assertRaisesRegex(chirrop.ChirrOpValidationError, "id must be"):
                self.client(AssertionError).get_alert(bad)

    def test_request_reaches_the_rest_and_only_below_the_base(self):
        client = self.client((200, b"[1]", {}))
        self.assertEqual(client.request("patch", "/x/y%2Fz/", {"a": 1, "b": None, "c": True, "d": "é &"}, body=[]), [1])
        self.assertEqual(client._link._transport.requests[0][:3], ("PATCH", "https://api.chirrop.com/v1.0/x/y%2Fz?a=1&c=true&d=%C3%A9+%26", b"[]"))
        for method, path in (("GET", "/../x"), ("GET", "/a//b"), ("GET", ""), ("GET", "/a?b=c"), ("GET", "/a b"), ("GET", "/ü"), ("GET", "/a\\b"), ("GET", None), ("GE T", "/a"), (None, "/a"), ("", "/a")):
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
        self.assertEqual(list(stubborn.iter_event_logs("e", "day")), [{"n": 1}], "a server that ignores the offset")

    def test_find_event_goes_by_name_and_agent(self):
        listed = [{"event": "a", "agent": "x", "event_id": "1"}, {"event": "a", "agent": "y", "event_id": "2"}, {"event": "b", "agent": "x", "event_id": "3"}, {"event": "c", "event_id": "4"}, {"event": "c", "agent": "x", "event_id": "5"}]
        client = self.client(transport=FakeTransport(default=(200, json.dumps(listed).encode(), {})))
        for args, found in ((("a", "x"), "1"), ((" a ", " y "), "2"), (("b",), "3"), (("c",), "4"), (("c", ""), "4"), (("c", "x"), "5"), (("a", "z"), None), (("d",), None)):
            self.assertEqual((client.find_event(*args) or {}).get("event_id"), found, args)
        with self.assertRaisesRegex(chirrop.ChirrOpValidationError, "several have an event 'a': x, y"):
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
        self.assertEqual([log.get("meta") for log in logs], [{"k": 1, "result": "success"}] * 2 + [{"result": "error"}])
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
        for fields in ({"event": ""}, {"event": "a", "agent": 1}, {"event": "a", "meta": [1]}, {"event": "a", "meta": {str(i): 0 for i in range(10)}}, {"event": "a", "meta": {"x": object()}}):
            with self.assertRaises(chirrop.ChirrOpValidationError):
                client.timer(**fields)

    def test_a_full_queue_does_not_break_the_measured_code(self):
        client = self.client(transport=FakeTransport(default=502), queue_size=1, timeout=0.01, retries=0)
        client.log(Log("a", 1))
        with client.timer("t"):
            pass
        client.flush(LONG)
        self.assertIn("a timer's log was not accepted", " ".join(r.getMessage() for r in self.records))


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
        self.assertEqual(handler(None, None), "nothing")  # nothing is queued: the context is not even asked
        self.assertEqual(handler.__name__, "handler")

    def test_it_never_masks_the_handlers_own_error(self):
        client = self.client(transport=FakeTransport(default=502), retries=0)

        @client.lambda_handler
        def handler(event, context):
            client.log(Log("a", 1))
            raise KeyError(event)

        for context in (None, object(), self.Context(0), self.Context(-5), self.Context("x"), self.Context(float("nan"))):
            with self.assertRaises(KeyError):
                handler("mine", context)
        self.assertEqual(client.stats().queued, 6)


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
        with self.assertRaisesRegex(ChirrOpError, "^ChirrOp SDK is already initialized$"):
            chirrop.ChirrOp.initialize(api_key=KEY)
        self.assertTrue(chirrop.stop())
        self.assertEqual([log["value"] for log in transport.logs()], [1, 2])

    def test_before_and_after(self):
        for call in (lambda: chirrop.log_event(Log("a", 1)), chirrop.flush, chirrop.ChirrOp.flush):
            with self.assertRaisesRegex(ChirrOpError, r"^ChirrOp SDK is not initialized. Please call initialize\(\) first$"):
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
    TREE = ast.parse(SOURCE)

    def test_the_public_names_are_exactly_those_listed(self):
        public = {n for n, v in vars(chirrop).items() if not n.startswith("_") and not isinstance(v, type(os))}
        borrowed = {"annotations", "deque", "namedtuple", "datetime", "timedelta", "timezone", "TYPE_CHECKING", "main"}
        constants = {n for n in public if n.isupper()}
        self.assertEqual(public - borrowed - constants, set(chirrop.__all__) - {"__version__"})

    def test_only_the_standard_library_is_imported(self):
        if not hasattr(sys, "stdlib_module_names"):
            self.skipTest("Python 3.10 and later know the names of their library")
        for node in ast.walk(self.TREE):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                self.assertIn(name.split(".")[0], sys.stdlib_module_names | {"__future__"})

    def test_importing_loads_nothing_that_the_first_log_does_not_need(self):
        late = "urllib ssl sqlite3 argparse http email logging typing random uuid socket select inspect dataclasses zoneinfo shutil"
        code = f"import sys, chirrop; chirrop.Log('a', 1); print([m for m in '{late}'.split() if m in sys.modules])"
        result = subprocess.run([sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(HERE)!r}); {code}"], capture_output=True, text=True)
        self.assertEqual(result.stdout, "[]\n", result.stderr)

    def test_every_public_function_and_class_has_a_docstring(self):
        for node in [*self.TREE.body, *(n for c in self.TREE.body if isinstance(c, ast.ClassDef) and not c.name.startswith("_") for n in c.body)]:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                self.assertTrue(ast.get_docstring(node), node.name)

    def test_what_the_file_touches_is_where_its_header_says(self):
        places = {
            "urllib.request.OpenerDirector": {"_UrllibTransport"}, "http.client.HTTPSConnection": {"_UrllibTransport"}, "http.client.HTTPConnection": {"_UrllibTransport"},
            "threading.Thread": {"_Sender"}, "sqlite3.connect": {"SqliteSpool"}, "os.environ": {"_checked_key", "_checked_endpoint", "Config"},
            "atexit.register": {""}, "os.register_at_fork": {""}, "open": {"_read_dotenv"}, "os.open": {"_lock_file", "SqliteSpool"},
            "logging.getLogger": {"_Reporter"}, "os.unlink": {"SqliteSpool"}, "os.replace": {"SqliteSpool"},
        }  # fmt: skip
        found = {}
        for top in self.TREE.body:
            name = getattr(top, "name", "")
            if "# ---- Sandbox" in self.SOURCE and top.lineno > self.SOURCE[: self.SOURCE.index("# ---- Sandbox")].count("\n"):
                break
            for node in ast.walk(top):
                text = ast.unparse(node) if isinstance(node, (ast.Attribute, ast.Name)) else ""
                text = text.replace("self._sqlite3", "sqlite3")
                if text in places and not (text == "open" and isinstance(node.ctx, ast.Store)):
                    found.setdefault(text, set()).add(name)
        self.assertEqual(found, places)
        for danger in ("eval", "exec", "subprocess", "os.system", "pickle", "ctypes", "__import__", "marshal"):
            self.assertNotRegex(self.SOURCE, rf"\b{re.escape(danger)}\b\s*[(.]", danger)

    def test_sections_do_not_reach_down(self):
        bounds = [(m.start(), m.group(1)) for m in re.finditer(r"^# ---- (.+?) -+$", self.SOURCE, re.M)]
        self.assertEqual(
            [name for _, name in bounds],
            ["Constants and vocabularies", "Errors", "Log", "Config", "Buffers", "Retry policy", "Outbox", "Reporter and sender",
             "Transport", "Client", "Global API", "Sandbox", "Command line", "Licence"],
        )  # fmt: skip
        lines = [self.SOURCE[:start].count("\n") + 1 for start, _ in bounds]
        section = lambda line: sum(line >= first for first in lines)  # noqa: E731
        defined = {}
        for node in self.TREE.body:
            targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
            for name in [getattr(node, "name", None), *(getattr(t, "id", None) for t in targets)]:
                if name:
                    defined.setdefault(name, section(node.lineno))
        for node in ast.walk(self.TREE):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in defined:
                if (section(node.lineno), node.id) not in self.annotated():
                    self.assertLessEqual(defined[node.id], section(node.lineno), f"line {node.lineno} uses {node.id} from below")

    @classmethod
    def annotated(cls):
        """Names that occur in annotations only for the reader: (section, name)."""
        return {(4, "SqliteSpool"), (8, "_Link")}

    def test_the_version_is_one_literal_and_the_licence_is_inside(self):
        self.assertEqual(len(re.findall(r'^__version__ = "\d+\.\d+\.\d+"$', self.SOURCE, re.M)), 1)
        self.assertIn("MIT License", self.SOURCE)
        self.assertIn("WITHOUT WARRANTY OF ANY KIND", self.SOURCE)


# ---- Sandbox --------------------------------------------------------------

UNKNOWN = "00000000-0000-4000-8000-00000000dead"
SLACK = {"channel": "slack", "url": "https://hooks.slack.com/services/T/B/x"}


class SandboxCase(unittest.TestCase):
    """A sandbox with a clock turned by hand, called as a transport."""

    start = datetime(2026, 3, 4, 10, 30, 15, tzinfo=timezone.utc)

    def setUp(self):
        self.now, self.slept = self.start, []
        self.sandbox = Sandbox(clock=lambda: self.now.timestamp(), sleep=self.slept.append)

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
        found = [e["event_id"] for e in self.ok("GET", "/v1.0/events")
                 if (e["event"], e["agent"]) == (event, agent)]
        self.assertEqual(len(found), 1, found)
        return found[0]

    def policy(self, **fields):
        fields["event_id"] = fields.get("event_id") or self.event_id()
        return self.ok("POST", "/v1.0/policies", {
            "period": "hour", "aggregate": "sum",
            "condition": "gt", "threshold": 0, **fields})

    def rollups(self, event_id, query):
        return self.ok("GET", f"/v1.0/events/{event_id}/logs?{query}")


class SandboxTest(SandboxCase):
    def test_accepted_logs_are_answered_with_an_empty_body(self):
        headers = {"Authorization": "Bearer chp_x"}
        body = b'[{"event":"a.b","value":1}]'
        self.assertEqual(self.sandbox("POST", "http://any/prefix/v1.0/logs", body, headers, 1),
                         (200, b"", {}))

    def test_a_log_sent_twice_is_one_log_and_the_first_wins(self):
        log_id = str(uuid.uuid4())
        self.log(1, 2, log_id=log_id)
        self.log(3, log_id=log_id.upper())
        self.assertEqual([(log["log_id"], log["value"]) for log in self.sandbox.logs], [(log_id, 1)])
        self.assertEqual(self.rollups(self.event_id(), "period=day")[0]["count"], 1)

    def test_a_log_without_id_and_time_gets_both_from_the_server(self):
        self.log(1, log_id=" ")
        [log] = self.sandbox.logs
        self.assertEqual(str(uuid.UUID(log["log_id"])), log["log_id"])
        self.assertEqual(datetime.fromisoformat(log["occurred_at"].replace("Z", "+00:00")), self.now)

    def test_the_limits_themselves_are_accepted(self):
        self.log(*range(250))
        for fields in ({"meta": "x" * 1022}, {"meta": "é" * 511},
                       {"meta": {str(n): n for n in range(10)}}, {"meta": list(range(11))},
                       {"occurred_at": self.at(days=-30)}, {"occurred_at": self.at(days=1)},
                       {"unknown": 1}, {"agent": ""}):
            with self.subTest(fields=fields):
                self.log(1, **fields)
        self.assertEqual(len(self.sandbox.logs), 258)

    def test_a_definition_is_made_for_each_agent_and_event(self):
        for agent in ("api", "web", "api"):
            self.log(1, agent=agent)
        self.log(1)
        events = self.ok("GET", "/v1.0/events")
        self.assertEqual([(e["agent"], e["event"]) for e in events],
                         [("api", "jobs.done"), ("web", "jobs.done"), ("", "jobs.done")])
        self.assertEqual(self.ok("GET", f"/v1.0/events/{events[1]['event_id']}"), events[1])
        self.assertEqual(set(events[0]), {
            "event_id", "event", "agent", "title", "description", "unit", "timezone", "public",
            "share_token", "user_id", "created_at"})

    def test_an_id_may_be_percent_encoded_and_in_capitals(self):
        self.log(1)
        event_id = self.event_id()
        path = f"/v1.0/events/{event_id.upper().replace('-', '%2D')}"
        self.assertEqual(self.ok("GET", path)["event_id"], event_id)

    def test_a_definition_can_be_made_first_and_takes_its_logs(self):
        made = self.ok("POST", "/v1.0/events", {"event": " jobs.done ", "agent": " api", "unit": "ms"})
        self.log(1, agent="api")
        self.assertEqual(self.ok("GET", "/v1.0/events"), [made])
        self.assertEqual((made["event"], made["unit"], made["timezone"]), ("jobs.done", "ms", "UTC"))

    def test_put_changes_what_is_editable_and_nothing_else(self):
        self.log(1)
        event_id = self.event_id()
        before = self.ok("GET", f"/v1.0/events/{event_id}")
        after = self.ok("PUT", f"/v1.0/events/{event_id}", {
            "title": "Jobs", "public": True, "agent": "api", "unit": None, "event_id": UNKNOWN,
            "event": "other.name", "user_id": "x", "created_at": "x", "share_token": "x"})
        self.assertNotIn(after["share_token"], (None, "x"))
        self.assertEqual(after, {**before, "title": "Jobs", "public": True, "agent": "api",
                                 "share_token": after["share_token"]})
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

    def test_rollups_sum_each_bucket_oldest_first(self):
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
            self.assertEqual(answer, [
                {**shape, "period": period, "occurred_at": f"2026-03-04T{at}Z",
                 "count": len(values), "value": sum(values), "squares": sum(v * v for v in values),
                 "min": min(values), "max": max(values)} for at, values in rows])

    def test_rollups_are_paged_by_limit_and_offset(self):
        for minute in range(120):
            self.log(minute, occurred_at=self.at(minutes=minute - 120))
        event_id = self.event_id()
        for query, values in (("", range(100)), ("&offset=100", range(100, 120)),
                              ("&limit=2&offset=3", range(3, 5)), ("&limit=0", ()),
                              ("&limit=500&offset=120", ())):
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
        days = lambda: [(row["occurred_at"][8:16], row["count"])
                        for row in self.rollups(event_id, "period=day")]
        self.assertEqual(days(), [("07T00:00", 2), ("08T00:00", 2), ("09T00:00", 2)])
        self.ok("PUT", f"/v1.0/events/{event_id}", {"timezone": "America/New_York"})
        self.assertEqual(days(), [("06T05:00", 1), ("07T05:00", 2), ("08T05:00", 2), ("09T04:00", 1)])

    def test_sums_beyond_the_range_of_floats_stay_json(self):
        self.log(1.7e308, 1.7e308, 10 ** 300)
        event_id = self.event_id()
        [row] = self.rollups(event_id, "period=day")
        self.assertGreater(row["value"], 1.7e308)
        data = self.ok("GET", f"/v1.0/events/{event_id}/analytics"
                              "?view=window&period=1h&previous=previous_window")["data"]
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
        self.assertEqual(self.sandbox.requests, [
            {"method": "POST", "path": "/v1.0/logs", "query": {}, "status": 200,
             "body": [{"event": "jobs.done", "value": 1}]},
            {"method": "GET", "path": "/v1.0/alerts", "status": 200, "body": None,
             "query": {"status": "triggered", "x": " "}},
            {"method": "POST", "path": "/v1.0/logs", "query": {}, "status": 401, "body": None}])
        self.assertNotIn("canary", repr(self.sandbox.requests))

    def test_reset_forgets_logs_resources_faults_and_predicates(self):
        self.log(1)
        self.policy()
        self.sandbox.fail(None, status=500)
        self.sandbox.reject(lambda log: True)
        self.sandbox.reset()
        self.assertEqual((self.sandbox.logs, self.sandbox.requests), ([], []))
        self.assertEqual([self.ok("GET", f"/v1.0/{kind}") for kind in
                          ("events", "policies", "alerts", "destinations")], [[], [], [], []])
        self.log(1)

    def test_threads_lose_nothing_and_raise_one_alert(self):
        self.log(1)
        self.policy()
        self.addCleanup(sys.setswitchinterval, sys.getswitchinterval())
        sys.setswitchinterval(1e-6)
        threads = [threading.Thread(target=lambda: [self.log(1) for _ in range(25)])
                   for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        self.assertEqual(len(self.sandbox.logs), 201)
        self.assertEqual(self.rollups(self.event_id(), "period=hour")[0]["count"], 201)
        self.assertEqual(len(self.ok("GET", "/v1.0/alerts")), 1)


class SandboxAnalyticsTest(SandboxCase):
    spans = {"1h": timedelta(hours=1), "1d": timedelta(days=1), "7d": timedelta(days=7),
             "1m": timedelta(days=30)}
    pairs = {"1h": ("previous_window", "previous_1d", "previous_7d", "previous_1m"),
             "1d": ("previous_window", "previous_7d", "previous_1m"),
             "7d": ("previous_window", "previous_1m"), "1m": ("previous_window",)}

    def analytics(self, period, previous):
        return self.call("GET", f"/v1.0/events/{self.event_id()}/analytics"
                                f"?view=window&period={period}&previous={previous}")

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
                self.assertEqual(answer, {"event_id": self.event_id(), "view": "window",
                                          "period": period, "previous": previous})
                self.assertAlmostEqual(data.pop("current_stddev"), 2.1602468994)
                self.assertEqual(data, {
                    "current_value": 24, "current_count": 3, "previous_value": 4,
                    "previous_count": 2, "value_delta": 20, "count_delta": 1,
                    "value_pct_change": 500, "count_pct_change": 50, "current_mean": 8,
                    "previous_mean": 2, "mean_delta": 6, "mean_pct_change": 300,
                    "previous_stddev": 1})

    def test_all_other_pairs_are_refused(self):
        self.log(1)
        for period in self.pairs:
            for previous in set(self.pairs["1h"]) - set(self.pairs[period]):
                status, answer = self.analytics(period, previous)
                self.assertEqual(status, 400, (period, previous))
                self.assertIn(previous, answer["error"])

    def test_data_is_null_where_both_windows_are_empty(self):
        self.log(1, occurred_at=self.at(days=-20))
        self.assertIsNone(self.analytics("1d", "previous_window")[1]["data"])

    def test_no_change_is_a_percentage_of_nothing(self):
        self.log(4, -4)
        data = self.analytics("1h", "previous_window")[1]["data"]
        self.assertEqual((data["previous_value"], data["previous_count"], data["previous_mean"],
                          data["previous_stddev"], data["mean_delta"]), (0, 0, None, None, None))
        self.assertEqual([data[f"{name}_pct_change"] for name in ("value", "count", "mean")],
                         [None] * 3)

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
        for aggregate, value in (("sum", 4), ("count", 2), ("average", 2), ("min", 1), ("max", 3),
                                 ("p95_est", 3.645), ("p99_est", 4.326)):
            with self.subTest(aggregate=aggregate):
                self.setUp()
                self.ok("POST", "/v1.0/events", {"event": "jobs.done"})
                self.policy(aggregate=aggregate, condition="gte", threshold=value - 1e-9)
                self.policy(aggregate=aggregate, condition="gte", threshold=value + 1e-9)
                self.log(1, 3)
                [alert] = self.alerts()
                self.assertAlmostEqual(alert["value"], value)

    def test_each_condition_below_at_and_above_its_threshold(self):
        for condition, fires in (("gt", (0, 0, 1)), ("lt", (1, 0, 0)), ("eq", (0, 1, 0)),
                                 ("gte", (0, 1, 1)), ("lte", (1, 1, 0))):
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
        policy = self.policy(event_id=self.event_id(agent="api"), title="Too many", channel="team",
                             threshold=2.5, severity="critical", description="long")
        self.log(4, agent="api")
        [alert] = self.alerts()
        self.assertEqual(alert, {
            **{name: policy[name] for name in ("policy_id", "event_id", "title", "channel", "period",
                                               "aggregate", "condition", "threshold", "severity")},
            "alert_id": alert["alert_id"], "agent": "api", "event": "jobs.done",
            "status": "triggered", "value": 5, "count": 2, "min": 1, "max": 4,
            "triggered_at": alert["triggered_at"], "acknowledged_at": None, "resolved_at": None})

    def test_policy_defaults_and_partial_put(self):
        self.log(1)
        policy = self.policy()
        self.assertEqual({name: policy[name] for name in ("title", "channel", "severity", "enabled")},
                         {"title": "", "channel": "ops", "severity": "warning", "enabled": True})
        path = f"/v1.0/policies/{policy['policy_id']}"
        changed = self.ok("PUT", path, {"threshold": 7, "policy_id": UNKNOWN})
        self.assertEqual(changed, {**policy, "threshold": 7})
        self.assertEqual((self.ok("GET", path), self.ok("GET", "/v1.0/policies")), (changed, [changed]))

    def test_every_step_of_the_lifecycle_from_every_status(self):
        reach = {"triggered": [], "acknowledged": ["acknowledge"], "resolved": ["resolve"],
                 "archived": ["archive"]}
        allowed = {"acknowledge": {"triggered", "acknowledged"}, "archive": set(reach),
                   "resolve": {"triggered", "acknowledged", "resolved"}}
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
                    self.assertEqual(self.ok("GET", path)["status"], becomes[verb] if ok else status)

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
        meant = [make()["destination_id"],
                 make(scope="policies", policy_ids=[policy_id])["destination_id"]]
        make(enabled=False)
        make(scope="policies")
        make(scope="policies", policy_ids=[other])
        self.log(1)
        [alert] = [alert for alert in self.alerts() if alert["policy_id"] == policy_id]
        rows = self.deliveries(alert["alert_id"])
        self.assertEqual([row["destination_id"] for row in rows], meant)
        self.assertEqual(rows[0], {
            "attempt_id": rows[0]["attempt_id"], "alert_id": alert["alert_id"],
            "destination_id": meant[0], "channel": "slack", "target": SLACK["url"],
            "status": "sent", "response_status": 200, "error_message": None,
            "created_at": alert["triggered_at"]})
        self.assertEqual(self.deliveries(alert["alert_id"], "?limit=1&offset=1"), rows[1:])
        self.assertEqual(self.deliveries(alert["alert_id"], "?kind=test"), [])
        self.assertEqual(self.deliveries(alert["alert_id"], "?kind=all"), rows)
        destination = self.ok("GET", f"/v1.0/destinations/{meant[0]}")
        self.assertEqual(destination["last_delivered_at"], alert["triggered_at"])

    def test_a_test_is_recorded_under_the_alert_id_it_answers(self):
        destination_id = self.ok("POST", "/v1.0/destinations", SLACK)["destination_id"]
        answer = self.ok("POST", f"/v1.0/destinations/{destination_id}/test")
        self.assertEqual((set(answer), answer["destination_id"], answer["status"]),
                         ({"alert_id", "destination_id", "status"}, destination_id, "sent"))
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
                ("email", {}, "")):
            with self.subTest(channel=channel):
                made = self.ok("POST", "/v1.0/destinations", {"channel": channel, **fields})
                self.assertEqual({**made, **fields}, made)
                tested = self.ok("POST", f"/v1.0/destinations/{made['destination_id']}/test")
                [row] = self.deliveries(tested["alert_id"], "?kind=test")
                self.assertEqual((row["channel"], row["target"]), (channel, target))

    def test_a_destination_is_changed_in_part_and_checked_as_a_whole(self):
        made = self.ok("POST", "/v1.0/destinations", SLACK)
        self.assertEqual({**made, "enabled": True, "scope": "all", "policy_ids": [],
                          "credentials": {}, "last_error": None, "last_delivered_at": None}, made)
        path = f"/v1.0/destinations/{made['destination_id']}"
        self.ok("POST", path + "/test")
        made = self.ok("GET", path)
        self.assertIsNotNone(made["last_delivered_at"])
        self.now += timedelta(hours=1)
        changed = self.ok("PUT", path, {"enabled": False, "destination_id": UNKNOWN, "last_error": "x"})
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
    return {"event_id": "{event}", "period": "hour", "aggregate": "sum", "condition": "gt",
            "threshold": 1, **fields}


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
    ("logs: not an object", "POST", "/v1.0/logs", _many(1) + [5], 400, "log 1"),
    ("logs: no event", "POST", "/v1.0/logs", [{"value": 1}], 400, "log 0 event"),
    ("logs: event not text", "POST", "/v1.0/logs", _one(event=5), 400, "log 1 event"),
    ("logs: event blank", "POST", "/v1.0/logs", _one(event=" \t"), 400, "log 1 event"),
    ("logs: no value", "POST", "/v1.0/logs", [{"event": "a"}], 400, "log 0 value"),
    ("logs: value null", "POST", "/v1.0/logs", _one(value=None), 400, "log 1 value"),
    ("logs: value text", "POST", "/v1.0/logs", _one(value="1"), 400, "log 1 value"),
    ("logs: value bool", "POST", "/v1.0/logs", _one(value=True), 400, "log 1 value"),
    ("logs: value huge", "POST", "/v1.0/logs", _one(value=10 ** 400), 400, "log 1 value"),
    ("logs: agent not text", "POST", "/v1.0/logs", _one(agent=5), 400, "log 1 agent"),
    ("logs: log_id not a UUID", "POST", "/v1.0/logs", _one(log_id="abc"), 400, "log 1 log_id"),
    ("logs: log_id not text", "POST", "/v1.0/logs", _one(log_id=5), 400, "log 1 log_id"),
    ("logs: meta 1,025 bytes", "POST", "/v1.0/logs", _one(meta="é" * 511 + "x"), 400, "log 1 meta"),
    ("logs: meta 11 keys", "POST", "/v1.0/logs", _one(meta={str(n): 1 for n in range(11)}),
     400, "log 1 meta"),
    ("logs: time not ISO", "POST", "/v1.0/logs", _one(occurred_at="now"), 400, "log 1 occurred_at"),
    ("logs: time a number", "POST", "/v1.0/logs", _one(occurred_at=5), 400, "log 1 occurred_at"),
    ("logs: too old", "POST", "/v1.0/logs", _one(occurred_at="2026-02-02T10:30:14Z"), 400,
     "log 1 occurred_at"),
    ("logs: too early", "POST", "/v1.0/logs", _one(occurred_at="2026-03-05T10:30:16Z"), 400,
     "log 1 occurred_at"),
    ("events: not JSON", "POST", "/v1.0/events", b"{", 400, "JSON"),
    ("events: not an object", "POST", "/v1.0/events", [], 400, "object"),
    ("events: no event", "POST", "/v1.0/events", {"title": "x"}, 400, "event"),
    ("events: event blank", "POST", "/v1.0/events", {"event": " "}, 400, "event"),
    ("events: event not text", "POST", "/v1.0/events", {"event": 5}, 400, "event"),
    ("events: public not bool", "POST", "/v1.0/events", {"event": "b", "public": 1}, 400, "public"),
    ("events: title not text", "PUT", "/v1.0/events/{event}", {"title": 5}, 400, "title"),
    ("events: timezone unknown", "POST", "/v1.0/events", {"event": "b", "timezone": "Mars/Base"},
     400, "timezone"),
    ("events: timezone a path", "PUT", "/v1.0/events/{event}", {"timezone": "../etc/passwd"},
     400, "timezone"),
    ("events: timezone a folder", "PUT", "/v1.0/events/{event}", {"timezone": "America"},
     400, "timezone"),
    ("events: exists", "POST", "/v1.0/events", {"event": "jobs.done", "agent": ""}, 422, "already"),
    ("events: renamed to another", "PUT", "/v1.0/events/{event}", {"agent": "taken"}, 422, "already"),
    ("events: id not a UUID", "GET", "/v1.0/events/evt_123", None, 400, "UUID"),
    ("events: id empty", "GET", "/v1.0/events/", None, 400, "UUID"),
    ("events: id unknown", "GET", "/v1.0/events/" + UNKNOWN, None, 404, UNKNOWN),
    ("events: id unknown, PUT", "PUT", "/v1.0/events/" + UNKNOWN, {}, 404, UNKNOWN),
    ("rollups: no period", "GET", "/v1.0/events/{event}/logs", None, 400, "period minute hour day"),
    ("rollups: period", "GET", "/v1.0/events/{event}/logs?period=week", None, 400, "period"),
    ("rollups: limit", "GET", "/v1.0/events/{event}/logs?period=day&limit=-1", None, 400, "limit"),
    ("rollups: blank limit", "GET", "/v1.0/events/{event}/logs?period=day&limit=", None, 400, "limit"),
    ("rollups: limit huge", "GET", "/v1.0/events/{event}/logs?period=day&limit=" + "9" * 5000, None,
     400, "limit"),
    ("rollups: offset", "GET", "/v1.0/events/{event}/logs?period=day&offset=x", None, 400, "offset"),
    ("rollups: id not a UUID", "GET", "/v1.0/events/x/logs?period=day", None, 400, "UUID"),
    ("rollups: id unknown", "GET", f"/v1.0/events/{UNKNOWN}/logs?period=day", None, 404, UNKNOWN),
    ("analytics: no view", "GET", ANALYTICS + "period=1h&previous=previous_1d", None, 400, "view"),
    ("analytics: view", "GET", ANALYTICS + "view=day&period=1h&previous=previous_1d", None,
     400, "view window"),
    ("analytics: no period", "GET", ANALYTICS + "view=window&previous=previous_1d", None,
     400, "period 7d"),
    ("analytics: period", "GET", ANALYTICS + "view=window&period=2h&previous=previous_1d", None,
     400, "period 7d"),
    ("analytics: no previous", "GET", ANALYTICS + "view=window&period=1h", None,
     400, "previous previous_1m"),
    ("analytics: previous", "GET", ANALYTICS + "view=window&period=1h&previous=1d", None,
     400, "previous previous_1m"),
    ("analytics: pair", "GET", ANALYTICS + "view=window&period=1d&previous=previous_1d", None,
     400, "previous_1d 1d"),
    ("analytics: id unknown", "GET", f"/v1.0/events/{UNKNOWN}/analytics", None, 404, UNKNOWN),
    ("policies: not an object", "POST", "/v1.0/policies", "x", 400, "object"),
    *((f"policies: no {name}", "POST", "/v1.0/policies", _policy(**{name: None}), 400, name)
      for name in ("event_id", "period", "aggregate", "condition", "threshold")),
    *((f"policies: {name}", "POST", "/v1.0/policies", _policy(**{name: wrong}), 400, name)
      for name, wrong in (("period", "1h"), ("aggregate", "p50"), ("condition", "ne"),
                          ("severity", "fatal"), ("threshold", "5"), ("threshold", True),
                          ("threshold", 10 ** 400), ("enabled", "yes"), ("title", 5),
                          ("channel", 5))),
    ("policies: event_id not a UUID", "POST", "/v1.0/policies", _policy(event_id="evt_1"), 400, "UUID"),
    ("policies: event_id unknown", "POST", "/v1.0/policies", _policy(event_id=UNKNOWN), 422, "event_id"),
    ("policies: PUT period", "PUT", "/v1.0/policies/{policy}", {"period": "week"}, 400, "period"),
    ("policies: PUT event_id", "PUT", "/v1.0/policies/{policy}", {"event_id": UNKNOWN}, 422, "event_id"),
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
    *((f"alerts: {verb}, id unknown", "POST", f"/v1.0/alerts/{UNKNOWN}/{verb}", None, 404, UNKNOWN)
      for verb in ("acknowledge", "resolve", "archive")),
    *((f"alerts: {verb}, id not a UUID", "POST", f"/v1.0/alerts/x/{verb}", None, 400, "UUID")
      for verb in ("acknowledge", "resolve", "archive")),
    ("alerts: acknowledge after resolve", "POST", "/v1.0/alerts/{alert}/acknowledge", None,
     422, "acknowledge resolved"),
    ("destinations: not an object", "POST", "/v1.0/destinations", [SLACK], 400, "object"),
    ("destinations: no channel", "POST", "/v1.0/destinations", {"url": "https://a"}, 400, "channel"),
    ("destinations: channel", "POST", "/v1.0/destinations", {"channel": "sms"}, 400, "channel"),
    *((f"destinations: {channel} without url", "POST", "/v1.0/destinations", {"channel": channel},
       400, "url") for channel in ("slack", "discord", "webhook")),
    *((f"destinations: url {url}", "POST", "/v1.0/destinations", {"channel": "webhook", "url": url},
       400, "url") for url in ("/path", "example.com/x", "ftp://a/b", "https://", "https:///x")),
    ("destinations: bot_token", "POST", "/v1.0/destinations",
     {"channel": "telegram", "credentials": {"chat_id": "1"}}, 400, "bot_token"),
    ("destinations: chat_id", "POST", "/v1.0/destinations",
     {"channel": "telegram", "credentials": {"bot_token": "x", "chat_id": " "}}, 400, "chat_id"),
    *((f"destinations: {name}", "POST", "/v1.0/destinations", {**SLACK, name: wrong}, 400, name)
      for name, wrong in (("credentials", "x"), ("credentials", {"a": []}), ("scope", 1),
                          ("policy_ids", "x"), ("enabled", 0), ("url", 5))),
    ("destinations: policy_ids not UUIDs", "POST", "/v1.0/destinations",
     {**SLACK, "policy_ids": ["pol_1"]}, 400, "UUID"),
    ("destinations: policy_ids unknown", "POST", "/v1.0/destinations",
     {**SLACK, "policy_ids": [UNKNOWN]}, 422, "policy_ids"),
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

    def state(self):
        return [self.sandbox.logs, *(self.ok("GET", f"/v1.0/{kind}") for kind in
                                     ("events", "policies", "alerts", "destinations"))]

    def ids(self):
        self.log(1)
        self.log(1, agent="taken")
        policy, destination = self.policy(), self.ok("POST", "/v1.0/destinations", SLACK)
        self.log(1)
        [alert] = self.ok("GET", "/v1.0/alerts")
        self.ok("POST", f"/v1.0/alerts/{alert['alert_id']}/resolve")
        return {"{event}": self.event_id(), "{policy}": policy["policy_id"],
                "{alert}": alert["alert_id"], "{destination}": destination["destination_id"]}

    def test_each_rule_is_refused_with_its_reason_and_changes_nothing(self):
        ids = self.ids()
        before = self.state()
        for rule, method, path, body, status, words in SANDBOX_RULES:
            body = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else None
            for name, item_id in ids.items():
                path = path.replace(name, item_id)
                body = body and body.replace(name.encode(), item_id.encode())
            with self.subTest(rule=rule):
                answer = self.call(method, path, body)
                self.assertEqual(answer[0], status, answer)
                self.assertEqual(set(answer[1]), {"error"})
                for word in words.split():
                    self.assertIn(word, answer[1]["error"])
        self.assertEqual(self.state(), before)

    def test_the_rows_are_refused_for_their_rule_alone(self):
        ids = self.ids()
        for method, path, body in (
                ("POST", "/v1.0/logs", _one()), ("POST", "/v1.0/logs", _many(250)),
                ("POST", "/v1.0/events", {"event": "b"}),
                ("POST", "/v1.0/policies", _policy(event_id=ids["{event}"])),
                ("POST", "/v1.0/destinations", SLACK),
                ("GET", ANALYTICS.replace("{event}", ids["{event}"])
                 + "view=window&period=1h&previous=previous_1d", None)):
            self.ok(method, path, body)

    def test_401_for_a_missing_or_bad_token_on_every_route(self):
        for auth in (None, "", "chp_test", "Bearer", "Bearer ", "Bearer key", "Basic chp_test",
                     "Bearer  chp_test"):
            for method, path in (("POST", "/v1.0/logs"), ("GET", "/v1.0/events"),
                                 ("PUT", "/v1.0/policies/x"), ("GET", "/v1.0/nothing")):
                status, answer = self.call(method, path, _one(), auth=auth)
                self.assertEqual((status, answer), (401, {"error": "invalid API key"}), auth)
        self.assertEqual(self.sandbox.logs, [])

    def test_with_a_key_of_its_own_any_other_is_401(self):
        self.sandbox = Sandbox(key="chp_mine")
        for auth, status in (("Bearer chp_mine", 200), ("bearer chp_mine", 200),
                             ("Bearer chp_other", 401), ("Bearer chp_mine2", 401)):
            self.assertEqual(self.call("GET", "/v1.0/events", auth=auth)[0], status, auth)

    def test_one_bad_log_fails_the_whole_request(self):
        self.assertEqual(self.call("POST", "/v1.0/logs", _many(249) + [{"event": ""}])[0], 400)
        self.assertEqual(self.sandbox.logs, [])
        self.assertEqual(self.ok("GET", "/v1.0/events"), [])

    def test_a_rejected_log_is_named_by_its_id(self):
        log_id = str(uuid.uuid4())
        self.sandbox.reject(lambda log: log["value"] == 13)
        status, answer = self.call("POST", "/v1.0/logs", _one(value=13, log_id=log_id))
        self.assertEqual(status, 400)
        self.assertIn(log_id, answer["error"])
        self.assertEqual(self.sandbox.logs, [])
        self.log(12)


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
        self.assertEqual(self.statuses(
            ("GET", "/v1.0/events"), ("GET", "/v1.0/policies"), ("POST", "/v1.0/logs", _one()),
            ("POST", "/v1.0/logs", _one())), [200, 404, 500, 200])

    def test_times_none_lasts_until_reset(self):
        self.sandbox.fail(None, status=500)
        self.assertEqual(self.statuses(), [500] * 4)
        self.sandbox.reset()
        self.assertEqual(self.statuses(), [200] * 4)

    def test_a_scripted_status_takes_nothing_and_can_bring_body_and_headers(self):
        headers = {"Authorization": "Bearer chp_x"}
        for fields, expected in (
                ({"status": 500}, (500, b'{"error":"scripted 500"}', {})),
                ({"status": 302, "headers": {"Location": "http://b"}}, (302, b"", {"Location": "http://b"})),
                ({"status": 500, "body": "plain é"}, (500, "plain é".encode(), {})),
                ({"status": 200, "body": b"\xff"}, (200, b"\xff", {})),
                ({"status": 500, "body": ""}, (500, b"", {})),
                ({"status": 400, "body": {"message": "m"}}, (400, b'{"message":"m"}', {})),
                ({"retry_after": 0}, (429, b'{"error":"scripted 429"}', {"Retry-After": "0"})),
                ({"status": 503, "retry_after": 1.5}, (503, b'{"error":"scripted 503"}', {"Retry-After": "1.5"})),
                ({}, (502, b'{"error":"scripted 502"}', {}))):
            with self.subTest(fields=fields):
                self.sandbox.fail(**fields)
                body = json.dumps(_one()).encode()
                status, content, extra = self.sandbox("POST", "http://a/v1.0/logs", body, headers, 1)
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
        data = self.ok("GET", f"/v1.0/events/{event_id}/analytics"
                              "?view=window&period=1h&previous=previous_window")["data"]
        self.assertEqual((data["current_value"], data["current_count"]), (5, 2))
        policy = self.policy(event_id=event_id, threshold=10, severity="error", title="Slow")
        destination = self.ok("POST", "/v1.0/destinations", {
            **SLACK, "scope": "policies", "policy_ids": [policy["policy_id"]]})
        test = self.ok("POST", f"/v1.0/destinations/{destination['destination_id']}/test")
        attempts = self.ok("GET", f"/v1.0/alerts/{test['alert_id']}/deliveries?kind=test")
        self.assertEqual([row["status"] for row in attempts], ["sent"])
        self.log(6, agent="api")
        [alert] = self.ok("GET", "/v1.0/alerts?status=triggered")
        self.assertEqual((alert["policy_id"], alert["value"]), (policy["policy_id"], 11))
        path = f"/v1.0/alerts/{alert['alert_id']}"
        [delivery] = self.ok("GET", path + "/deliveries")
        self.assertEqual(delivery["destination_id"], destination["destination_id"])
        for verb, status in (("acknowledge", "acknowledged"), ("resolve", "resolved"),
                             ("archive", "archived")):
            self.assertEqual(self.ok("POST", f"{path}/{verb}")["status"], status)
            self.assertEqual(len(self.ok("GET", f"/v1.0/alerts?status={status}")), 1)
        final = self.ok("GET", path)
        self.assertTrue(final["acknowledged_at"] and final["resolved_at"])
        self.assertEqual(self.ok("GET", "/v1.0/alerts?status=triggered"), [])


class SandboxHttpTest(SandboxFlowTest, SandboxRulesTest):
    """The same round and the same rules over HTTP, on one kept connection."""

    def setUp(self):
        super().setUp()
        self.server = chirrop._serve_sandbox(self.served())
        thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        thread.start()
        self.addCleanup(self.server.server_close)
        self.addCleanup(thread.join, 30)
        self.addCleanup(self.server.shutdown)
        self.connection = http.client.HTTPConnection(*self.server.server_address, timeout=30)
        self.addCleanup(self.connection.close)

    def served(self):
        """Return a transport that asks for the sandbox of the moment: tests replace it."""
        return lambda *request: self.sandbox(*request)

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
        status, content, answered = self.exchange("POST", "/v1.0/logs", b'[{"event":"a","value":1}]',
                                                  headers, 1)
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

    def test_a_body_of_unclear_length_is_400(self):
        for name, value in (("Content-Length", "x"), ("Content-Length", "-1"),
                            ("Content-Length", "1.5"), ("Transfer-Encoding", "chunked")):
            self.connection.putrequest("POST", "/v1.0/logs")
            self.connection.putheader(name, value)
            self.connection.endheaders()
            answer = self.connection.getresponse()
            self.assertEqual((answer.status, answer.getheader("Connection")), (400, "close"))
            self.assertIn("error", json.loads(answer.read()))
            self.connection.close()
        self.assertEqual(self.sandbox.requests, [])

    def test_a_body_too_large_is_413_also_for_a_client_that_sends_it_all(self):
        for length, body in ((16 * 1024 * 1024 + 1, b"x" * (16 * 1024 * 1024 + 1)), (10 ** 30, b"")):
            self.connection.putrequest("POST", "/v1.0/logs")
            self.connection.putheader("Content-Length", str(length))
            self.connection.endheaders(body)
            answer = self.connection.getresponse()
            self.assertEqual(answer.status, 413)
            self.assertIn("error", json.loads(answer.read()))
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


# ---- Portability ----------------------------------------------------------


class PortabilityTest(TestCase):
    """The ways in which the file is carried about: each in a process of its own, far from this folder."""

    USE = (
        "{name}; s = chirrop.Sandbox()\n"
        "with chirrop.new_client(api_key='chp_x', transport=s) as c: c.log(chirrop.Log('a.b', 1))\n"
        "print(len(s.logs), chirrop.__version__)\n"
    )
    FINE = f"1 {chirrop.__version__}\n"

    def run_in(self, folder, code, *flags, **options):
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
        env.update(options.pop("env", {}))
        done = subprocess.run([sys.executable, *flags, "-c", code], cwd=folder, env=env, capture_output=True, text=True, timeout=LONG)
        self.assertEqual((done.returncode, done.stderr), (0, ""), done.stderr)
        return done.stdout

    def vendored(self):
        folder = self.folder()
        vendor = folder / "myapp" / "_vendor"
        vendor.mkdir(parents=True)
        for package in (vendor, vendor.parent):
            (package / "__init__.py").write_text("")
        shutil.copy(chirrop.__file__, vendor / "chirrop.py")
        return folder

    def test_it_works_inside_another_package(self):
        code = self.USE.format(name="from myapp._vendor import chirrop")
        self.assertEqual(self.run_in(self.vendored(), code, "-W", "error"), self.FINE)

    def test_it_works_twice_under_two_names_in_one_process(self):
        folder = self.vendored()
        shutil.copy(chirrop.__file__, folder / "other.py")
        code = self.USE.format(name="from myapp._vendor import chirrop") + self.USE.format(name="import other as chirrop")
        code += "from myapp._vendor import chirrop as a; print(a.Log is chirrop.Log)"
        self.assertEqual(self.run_in(folder, code, "-X", "dev", "-W", "error"), self.FINE * 2 + "False\n")

    def test_it_works_from_a_zip_archive_and_as_a_zipapp(self):
        folder = self.folder()
        with zipfile.ZipFile(folder / "lib.zip", "w") as archive:
            archive.write(chirrop.__file__, "chirrop.py")
        code = "import sys; sys.path.insert(0, 'lib.zip'); " + self.USE.format(name="import chirrop")
        self.assertEqual(self.run_in(folder, code, "-I", "-S"), self.FINE)
        with zipfile.ZipFile(folder / "app.pyz", "w") as archive:
            archive.write(chirrop.__file__, "__main__.py")
        done = subprocess.run([sys.executable, "-I", "app.pyz", "--version"], cwd=folder, capture_output=True, text=True, timeout=LONG)
        self.assertEqual((done.returncode, done.stdout.split()[-1:]), (0, [chirrop.__version__]), done.stderr)

    def test_it_works_under_every_interpreter_flag(self):
        folder = self.vendored()
        code = f"import sys; sys.path.insert(0, {str(folder)!r}); " + self.USE.format(name="from myapp._vendor import chirrop")
        for flags in (["-I"], ["-S"], ["-O"], ["-OO"], ["-X", "dev"], ["-W", "error"], ["-I", "-S", "-OO", "-B", "-W", "error"], ["-bb"], ["-X", "utf8=0"]):
            with self.subTest(flags):
                self.assertEqual(self.run_in(folder, code, *flags), self.FINE)

    def test_it_works_without_home_in_a_folder_that_is_gone(self):
        folder = self.folder()
        (folder / "gone").mkdir()
        code = f"import os, sys; os.rmdir(os.getcwd()); sys.path.insert(0, {str(HERE)!r}); " + self.USE.format(name="import chirrop")
        code += "try: chirrop.Config()\nexcept chirrop.ChirrOpValidationError as exc: print(exc)"
        env = {"HOME": "", "LANG": "C"}
        self.assertEqual(self.run_in(folder / "gone", code, "-I", env=env), self.FINE + "API key is required\n")

    def test_a_missing_module_is_one_clear_error_when_that_part_is_used(self):
        begin = f"import sys; sys.path.insert(0, {str(HERE)!r})\nfor m in {{missing}}: sys.modules[m] = None\n"
        use = begin + self.USE.format(name="import chirrop")
        self.assertEqual(self.run_in(HERE, use.format(missing=["ssl", "_ssl", "sqlite3", "_ctypes", "ctypes", "fcntl"]), "-I"), self.FINE)
        spool = begin + "import chirrop\ntry: chirrop.SqliteSpool('x')\nexcept chirrop.ChirrOpError as exc: print(exc)"
        self.assertIn("SqliteSpool needs the sqlite3 module, which this Python lacks", self.run_in(HERE, spool.format(missing=["sqlite3"]), "-I"))
        tls = begin + (
            "import chirrop\nc = chirrop.new_client(api_key='chp_x', servicer_endpoint='https://127.0.0.1:9', servicer_retries=0)\n"
            "try: c.list_events()\nexcept chirrop.ChirrOpTransportError as exc: print(exc)"
        )
        self.assertIn("https needs the ssl module, which this Python lacks", self.run_in(HERE, tls.format(missing=["ssl", "_ssl"]), "-I"))

    def test_plain_http_works_without_ssl(self):
        server = chirrop._serve_sandbox(Sandbox())
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        self.addCleanup(thread.join, LONG)
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        code = (
            f"import sys; sys.path.insert(0, {str(HERE)!r}); sys.modules['ssl'] = sys.modules['_ssl'] = None\n"
            f"import chirrop; c = chirrop.new_client(api_key='chp_x', api_endpoint='http://127.0.0.1:{server.server_port}/v1.0/logs')\n"
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
    """A process that imitates the runtime: init, invocations with freezes between, nothing to write to."""

    RUNTIME = r"""
import os, signal, sys
os.chdir("/proc" if os.path.isdir("/proc") else "/")             # nothing can be written here
sys.path.insert(0, os.path.join(sys.argv[1], "python"))           # as the layer is mounted: /opt/python
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
    os.kill(os.getpid(), signal.SIGSTOP)                          # frozen the moment the handler returns
"""

    def test_a_layer_delivers_before_each_freeze_and_after_each_thaw(self):
        folder = self.folder()
        readme = (HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else pathlib.Path("README.md").read_text(encoding="utf-8")
        command = next(line for line in readme.splitlines() if "layer.zip" in line)
        subprocess.run(["sh", "-c", command.replace("python3", f"'{sys.executable}'", 1).replace("'layer.zip'", repr(str(folder / "layer.zip")))], cwd=HERE, check=True)
        with zipfile.ZipFile(folder / "layer.zip") as archive:
            self.assertEqual(archive.namelist(), ["python/chirrop.py"])
            archive.extractall(folder)
        sandbox = Sandbox()
        server = chirrop._serve_sandbox(sandbox)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        self.addCleanup(thread.join, LONG)
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", self.RUNTIME, str(folder), f"http://127.0.0.1:{server.server_port}/v1.0/logs"],
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
        blocks = re.findall(r"```python\n(.*?)```", self.README, re.S)
        self.assertGreaterEqual(len(blocks), 6)
        self.addCleanup(os.chdir, os.getcwd())
        for block in blocks:
            with self.subTest(block.splitlines()[0]):
                sandbox = Sandbox()
                server = chirrop._serve_sandbox(sandbox)
                thread = threading.Thread(target=server.serve_forever)
                thread.start()
                os.chdir(self.folder())
                os.environ["CHIRROP_API_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}/v1.0/logs"
                os.environ["CHIRROP_SERVICER_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}/v1.0"
                scope = {"__name__": "readme"}
                try:
                    with contextlib.redirect_stdout(io.StringIO()):
                        exec(compile(block, "README.md", "exec"), scope)
                        if "handler" in scope:
                            self.assertEqual(scope["handler"]({}, LambdaTest.Context(30_000)), {"statusCode": 200})
                    for case in [v for v in scope.values() if isinstance(v, type) and issubclass(v, unittest.TestCase)]:
                        result = unittest.defaultTestLoader.loadTestsFromTestCase(case).run(unittest.TestResult())
                        self.assertTrue(result.wasSuccessful() and result.testsRun, result.errors + result.failures)
                    if "client" in scope:
                        scope["client"].close(LONG)
                finally:
                    server.shutdown()
                    server.server_close()
                    thread.join(LONG)

    def test_each_promise_about_logs_names_a_test_that_exists(self):
        rows = re.findall(r"^\| .+ \| .+ \| .+ \| (`test_.+) \|$", self.README, re.M)
        self.assertGreaterEqual(len(rows), 15)
        tests = {name for value in globals().values() if isinstance(value, type) for name in dir(value) if name.startswith("test_")}
        for row in rows:
            for name in re.findall(r"`(\w+)`", row):
                self.assertIn(name, tests)

    def test_every_call_and_every_error_is_in_its_table(self):
        for name, _, method, path, _ in CALLS:
            route = re.sub(r"/(evt_1|[pad])(?=/|$)", "/:id", path.split("?")[0])
            self.assertRegex(self.README, rf"(?m)^\| `{name}\(.*\| `{method} {route}` \|$")
        for name in chirrop.__all__:
            if name.endswith("Error") and name != "ChirrOpError":
                self.assertIn(f"| `{name}` |", self.README)

    def test_settings_and_their_defaults_are_those_of_config(self):
        import inspect

        rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \| .+ \|$", self.README.split("## Settings")[1].split("## Errors")[0], re.M))
        parameters = inspect.signature(Config).parameters
        self.assertEqual(list(rows), list(parameters))
        for name, parameter in parameters.items():
            if isinstance(parameter.default, (int, float)) and parameter.default is not False and name != "log_level":
                self.assertEqual(float(rows[name]), parameter.default)

    def test_the_commands_stand_at_the_top(self):
        top = self.README[:600]
        self.assertIn("python3 chirrop.py demo", top)
        self.assertIn("python3 -m unittest", top)


if __name__ == "__main__":
    unittest.main()
