"""The tests of chirrop: standard library only, run with `python3 -m unittest`.

They stand in the order of the module. Tests use real sockets on loopback, real SQLite files, real processes
and real signals; a fake transport only where the policy itself is tested. Nothing sleeps to wait for
something: waits are for an event, with a time-out that is far longer than needed and fails loudly.
"""

from __future__ import annotations

import contextlib
import copy
import email.utils
import io
import json
import logging
import os
import pathlib
import pickle
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
import uuid
from datetime import datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction

import chirrop
from chirrop import ChirrOpError, Client, Config, Log, SqliteSpool, new_client

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

    def folder(self):
        path = tempfile.mkdtemp(prefix="chirrop-test-")
        self.addCleanup(__import__("shutil").rmtree, path, ignore_errors=True)
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
        self.seeds(self.folder())


