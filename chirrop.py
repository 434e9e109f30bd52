#!/usr/bin/env python3
"""chirrop: the Python SDK of ChirrOp in one file, standard library only, Python 3.9 and later.

    import chirrop

    with chirrop.new_client(api_key="chp_...") as client:
        client.log(chirrop.Log(event="tool.errors.count", value=1, agent="billing"))

    Log ── encode once ──> bytes ──> buffer ──> sender ── batch ──> transport ──> ChirrOp
    (checked in the       memory queue    background threads,    urllib.request, or
     caller's stack)      or SqliteSpool  retries                any callable
    client.list_events() ──> request() ─────────────────────────> transport ──> ChirrOp

At any moment every accepted log is delivered, dropped (reported, with its reason) or still held.

Outside itself this file touches, each in the one place named:
    network   _UrllibTransport, for `doctor`, too; the sandbox's server, when it is asked for
    threads   _Delivery, daemons, from the first log on; asyncio's, for aflush and aclose; the
              command line's progress line and the sandbox's server
    disk      SqliteSpool, when one is configured; ./.env is read for the key; `demo` has a
              temporary folder, and one process of its own
    environ   Config (CHIRROP_*); what urllib (proxies) and OpenSSL (CA files, SSLKEYLOGFILE) read;
              on the command line also what argparse, shutil (COLUMNS, LINES) and tempfile do
    exit      one atexit hook and hooks around fork, installed by the import, which act on open
              clients; children of multiprocessing end past exit hooks and get a Finalize
    logging   the logger "chirrop", which gets a level if Config has one, and no handler

Sections, each using only what stands above it: limits, errors, Log, Config, retry policy,
delivery, spool, transport, shapes, Client, global API; then the cut line; then sandbox and command
line, for trying and testing, which nothing above them needs. Search for "# ---- ". The SDK only,
complete and with its licence:

    mkdir -p cut && sed '/^# ---- Sandbox/,/^# ---- Licence/d' chirrop.py > cut/chirrop.py

To vendor: copy this file, or the cut one, anywhere in your package. To update: replace it with a
newer one and compare __version__. Licence: MIT, the text is at the end of the file.
"""

# Parsed JSON is Any, and each method says what its own holds:
# mypy: no-warn-return-any

from __future__ import annotations

import atexit
import functools
import itertools
import json
import math
import os
import queue
import re
import stat
import struct
import sys
import threading
import time
import weakref
from collections import namedtuple
from datetime import datetime, timezone

__version__ = "1.0.0"

__all__ = [
    "ChirrOp", "Client", "Config", "Log", "SqliteSpool", "Stats",
    "new_client", "initialize", "log_event", "try_log", "flush", "stop",
    "ChirrOpError", "ChirrOpValidationError", "ChirrOpQueueFullError", "ChirrOpTransportError",
    "ChirrOpRateLimitError", "ChirrOpServerError", "ChirrOpNonRetryableError",
    "ChirrOpBadRequestError", "ChirrOpUnauthorizedError", "ChirrOpForbiddenError",
    "ChirrOpNotFoundError", "ChirrOpInternalServerError", "ChirrOpServiceUnavailableError",
    "__version__",
]  # fmt: skip


# ---- Limits and vocabularies ----------------------------------------------
# Numbers with their units and reasons; the service's closed vocabularies, once as tuples for run
# time and once as types. Type checkers take TYPE_CHECKING for true; at run time typing, which costs
# 5 to 8 ms, is not imported.

TYPE_CHECKING = False

MAX_BATCH = 250  # logs in one request: the service's hard limit
MAX_META_BYTES = 1024  # of encoded JSON: the service's limit
MAX_META_KEYS = 10  # top-level keys of an object: the service's limit
MAX_AGE_SECONDS = 30 * 86400.0  # of occurred_at: the service's limit
MAX_AHEAD_SECONDS = 86400.0  # of occurred_at: the service's limit
MAX_ANSWER_BYTES = 16 * 1024 * 1024  # far above any real answer: a wrong host fills no memory
MAX_ERROR_BYTES = 65536  # of an answer other than 2xx: what is searched for its message
MAX_KEPT_BYTES = 4096  # of that answer: what an error keeps, which may be held for as long as it
MAX_SPLIT_REQUESTS = 64  # refused ones for one batch: isolates 7 bad logs in 250 at least
MAX_RETRY_AFTER = 300.0  # seconds the server may ask background senders to wait
MAX_SERVICER_WAIT = 30.0  # seconds of a Retry-After above which a control-plane call raises
BACKOFF_BASE = 1.0  # seconds at most after the first failure, doubled with each further one
BACKOFF_CAP = 30.0  # seconds
REPORT_SECONDS = 60.0  # between two log records about drops: a storm makes a handful of them
SPOOL_RETRY_SECONDS = 30.0  # between two tries of a spool file that failed
DEFAULT_API_ENDPOINT = "https://logs.chirrop.com/v1.0/logs"
DEFAULT_SERVICER_ENDPOINT = "https://api.chirrop.com/v1.0"

_PERIODS = ("minute", "hour", "day")
_VIEWS = ("window",)
_PREVIOUS = ("previous_window", "previous_1d", "previous_7d", "previous_1m")
_ANALYTICS_PAIRS = {
    "1h": _PREVIOUS,
    "1d": ("previous_window", "previous_7d", "previous_1m"),
    "7d": ("previous_window", "previous_1m"),
    "1m": ("previous_window",),
}
_WINDOWS = tuple(_ANALYTICS_PAIRS)
_AGGREGATES = ("sum", "count", "average", "min", "max", "p95_est", "p99_est")
_CONDITIONS = ("gt", "lt", "eq", "gte", "lte")
_SEVERITIES = ("info", "warning", "error", "critical")
_CHANNELS = ("slack", "discord", "telegram", "email", "webhook")
_ALERT_STATUSES = ("triggered", "acknowledged", "resolved", "archived")
_DELIVERY_KINDS = ("alert", "test", "all")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any, Literal, NoReturn, Optional, TypedDict, TypeVar

    Period = Literal["minute", "hour", "day"]
    View = Literal["window"]
    Window = Literal["1h", "1d", "7d", "1m"]
    Previous = Literal["previous_window", "previous_1d", "previous_7d", "previous_1m"]
    Aggregate = Literal["sum", "count", "average", "min", "max", "p95_est", "p99_est"]
    Condition = Literal["gt", "lt", "eq", "gte", "lte"]
    Severity = Literal["info", "warning", "error", "critical"]
    Channel = Literal["slack", "discord", "telegram", "email", "webhook"]
    AlertStatus = Literal["triggered", "acknowledged", "resolved", "archived"]
    DeliveryKind = Literal["alert", "test", "all"]

    # transport(method, url, body, headers, timeout) -> (status, body, headers)
    # One attempt, no retries. Any status is returned; a network failure is raised as an OSError.
    Transport = Callable[
        [str, str, Optional[bytes], Mapping[str, str], float], tuple[int, bytes, Mapping[str, str]]
    ]
    _F = TypeVar("_F", bound=Callable[..., Any])


# ---- Errors ---------------------------------------------------------------
# What a caller may catch. A message names the rule and what was given; the key stands in none.
#
# ChirrOpError
#   ChirrOpValidationError (also ValueError)    ChirrOpQueueFullError
#   ChirrOpTransportError (no answer)           ChirrOpRateLimitError (429)
#   ChirrOpServerError (other retryable 5xx, 408)
#   ChirrOpNonRetryableError
#     ChirrOpBadRequestError (400, 413, 422)    ChirrOpUnauthorizedError (401)
#     ChirrOpForbiddenError (403)               ChirrOpNotFoundError (404)
#     ChirrOpInternalServerError (500)          ChirrOpServiceUnavailableError (503)


class ChirrOpError(Exception):
    """Base of every error of this module; `str()` is for people and never holds the key.

    Attributes:
        status_code: HTTP status, 0 when there was no answer that could be read.
        code: the service's own code, for programs, e.g. "QUOTA_EXCEEDED"; None where it gave none.
        body: the answer's parsed JSON; the beginning of its text, at most 4 KiB, where that is
            longer or not JSON; None for an empty answer.
        retry_after: seconds the server asked to wait, or None.
    """

    def __init__(
        self,
        message: str = "",
        *,
        status_code: int = 0,
        code: str | None = None,
        body: Any = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.code = code
        self.body = body
        self.retry_after = retry_after


class ChirrOpValidationError(ChirrOpError, ValueError):
    """An argument breaks a rule; the message names it, the rule and what was given."""


class ChirrOpQueueFullError(ChirrOpError):
    """The bounded queue or the spool has no room; the log was not accepted."""


class ChirrOpTransportError(ChirrOpError):
    """No valid answer came: refused, reset, timed out, not HTTP, a web page, or not JSON."""


class ChirrOpRateLimitError(ChirrOpError):
    """The server asks for fewer requests (429); see `retry_after`."""


class ChirrOpServerError(ChirrOpError):
    """A failure on the way or in the server that may pass (408, 502, 504, other 5xx)."""


class ChirrOpNonRetryableError(ChirrOpError):
    """The server's answer is final, whatever the number of attempts; also every redirect (3xx)."""


class ChirrOpBadRequestError(ChirrOpNonRetryableError):
    """The server rejects the content (400, 413, 422)."""


class ChirrOpUnauthorizedError(ChirrOpNonRetryableError):
    """The API key is missing or wrong (401)."""


class ChirrOpForbiddenError(ChirrOpNonRetryableError):
    """The API key may not do this (403)."""


class ChirrOpNotFoundError(ChirrOpNonRetryableError):
    """There is no such resource or route (404)."""


class ChirrOpInternalServerError(ChirrOpNonRetryableError):
    """The server failed on this request (500)."""


class ChirrOpServiceUnavailableError(ChirrOpNonRetryableError):
    """The service's publisher queue is overloaded (503)."""


_ERROR_BY_STATUS = {
    **dict.fromkeys((400, 413, 422), ChirrOpBadRequestError),
    401: ChirrOpUnauthorizedError,
    403: ChirrOpForbiddenError,
    404: ChirrOpNotFoundError,
    408: ChirrOpServerError,
    429: ChirrOpRateLimitError,
    500: ChirrOpInternalServerError,
    503: ChirrOpServiceUnavailableError,
}


def _show(value: object) -> str:
    """Return a short repr for an error message, whatever `value`'s own repr does."""
    try:
        return f"{value!r:.80}"
    except Exception:
        return f"<{type(value).__name__} without a repr>"


def _wrong(name: str, rule: str, value: object) -> ChirrOpValidationError:
    """Return the error that says which rule the value of an argument breaks."""
    return ChirrOpValidationError(f"{name} must be {rule}, got {_show(value)}")


def _check(fits: object, name: str, rule: str, value: object) -> None:
    if not fits:
        raise _wrong(name, rule, value)


# ---- Log ------------------------------------------------------------------
# In: what the caller measured. Out: one compact UTF-8 JSON object, made and checked in the caller's
# stack; from here on only these bytes travel. No locks, no I/O.

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_quote = json.encoder.encode_basestring
_PLAIN: Any = {str: _quote, int: repr}  # what _encode does to them, at a tenth of the cost
_LOG_FIELDS = ("event", "value", "agent", "log_id", "meta", "occurred_at")  # as Log takes them
_LARGEST = sys.float_info.max

if TYPE_CHECKING:
    _Object = dict[str, Any]  # of JSON
    _Payload = Mapping[str, Any]
# As isoformat, JavaScript and PostgreSQL (+00) write it, with or without "-" and ":".
_ISO_8601 = (
    r"^(\d{4})-?(\d\d)-?(\d\d)[Tt ](\d\d):?(\d\d)(?::?(\d\d)(?:[.,](\d+))?)?"
    r"(?:[Zz]|([+-])(\d\d)(?::?([0-5]\d))?)?$"
)
_FULL_ISO_8601 = "{}-{}-{}T{}:{}:{:0<2}.{:0<6.6}{:+<1}{:0<2}:{:0<2}"  # what Python 3.9 reads
_minted: Any = (0, 0, "", [])  # second, process, ISO text, UUIDs left; replaced as a whole


def _mint(now: float) -> tuple[str, str]:
    """Return a random UUIDv4 and the ISO 8601 text of `now`.

    os.urandom gives up the GIL on every call, which makes 8 logging threads half as fast as one; so
    UUIDs are made in blocks. A block lives for one wall-clock second at most, which keeps a
    restored snapshot from repeating ids, and belongs to one process, whether fork hooks run or not.
    """
    global _minted
    second, pid = int(now), os.getpid()
    minted_in, minter, text, block = _minted
    if minted_in != second or minter != pid:
        block = []
    try:
        uid = block.pop()
    except IndexError:  # none, or another thread took the last one
        text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        uid, *block = _uuids()
        _minted = (second, pid, text, block)
    # An f-string costs 0.1 to 0.2 µs more.
    return uid, "%s.%06dZ" % (text, (now - second) * 1e6)  # noqa: UP031


def _uuids() -> list[str]:
    digits = os.urandom(1024).hex().encode()  # of 64
    parts = struct.iter_unpack("8s4sx3sx3s12s", digits)  # x: the digits of version and variant
    return b" ".join([b"%b-%b-4%b-8%b-%b" % each for each in parts]).decode().split()


def _number(value: Any) -> int | float:
    """Return any finite real number (Decimal, Fraction, NumPy scalars) as an int or a float."""
    import numbers

    try:
        number = int(value) if isinstance(value, numbers.Integral) else float(value)
        is_number = type(value) is not bool and isinstance(value, numbers.Number)
        if is_number and abs(number) <= _LARGEST:
            return number
    except Exception:  # complex, a signalling NaN, too large, a hostile subclass
        pass
    raise _wrong("value", "a finite number", value)


def _trimmed(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong(name, "a string", value)
    return value.strip()


def _canonical_id(log_id: object) -> str:
    """Return a UUID in its canonical form, or "" for a blank string."""
    import uuid

    try:
        text = str(log_id).strip()
        return str(uuid.UUID(text)) if text else ""
    except Exception as exc:
        rule = "a UUID, as uuid.uuid5(uuid.NAMESPACE_URL, key) makes of a key of your own"
        raise _wrong("log_id", rule, log_id) from exc


def _parse_time(value: Any) -> datetime:
    """Return a datetime or ISO 8601 text as an aware datetime in UTC."""
    try:
        moment = value
        if isinstance(value, str):
            [parts] = re.findall(_ISO_8601, value.strip())
            moment = datetime.fromisoformat(_FULL_ISO_8601.format(*parts))
        if moment.utcoffset() is None:
            moment = moment.replace(tzinfo=timezone.utc)
        return moment.astimezone(timezone.utc)
    except Exception as exc:  # a hostile tzinfo may raise anything
        rule = "a datetime, as of datetime.fromtimestamp(seconds, timezone.utc), or ISO 8601 text"
        raise _wrong("occurred_at", rule, value) from exc


def _iso(moment: datetime) -> str:
    """Return an aware UTC datetime as ISO 8601 text that ends in Z."""
    return moment.replace(tzinfo=None).isoformat() + "Z"


def _encode_text(value: Any) -> str:
    """Return compact JSON; of a flat object, as meta mostly is, at half of _encode's cost."""
    if type(value) is not dict or {*map(type, value)} != {str}:
        return _encode(value)
    parts = [f"{_quote(k)}:{_PLAIN.get(type(v), _encode)(v)}" for k, v in value.items()]
    return f"{{{','.join(parts)}}}"


def _encode_json(name: str, value: Any) -> bytes:
    """Return strict compact JSON: no NaN, no lone surrogate, no cycle, no absurd nesting."""
    try:
        return _encode_text(value).encode()
    except Exception as exc:  # the value's own methods may raise anything
        if type(value) is dict and len(name) < 60:  # a cycle has no end
            for key, part in list(value.items()):
                _encode_json(f"{name}[{_show(key)}]", part)
        raise _wrong(name, "JSON-encodable", value) from exc


def _encode_meta(meta: object) -> bytes:
    body = _encode_json("meta", meta)
    keys = len(meta) if isinstance(meta, dict) else 0
    if len(body) > MAX_META_BYTES or keys > MAX_META_KEYS:
        rule = f"JSON of at most {MAX_META_KEYS} top-level keys and {MAX_META_BYTES} bytes"
        raise _wrong("meta", f"{rule} (cut texts, as in repr(error)[:200])", (keys, len(body)))
    return body


class Log:
    """One event, checked and encoded when it is made, and unchangeable from then on.

    Args:
        event: flat name, e.g. "tool.errors.count"; trimmed, not empty.
        value: a finite real number (Decimal, Fraction and NumPy scalars, too), never a bool.
        agent: who produced it; trimmed, blank means none. With `event` it names a definition.
        log_id: UUID (text or uuid.UUID), the idempotency key, the same on every resend; None or
            blank makes a random one.
        meta: anything that is strictly JSON-encodable, at most 1,024 bytes encoded; an object has
            at most 10 top-level keys.
        occurred_at: datetime (naive is taken as UTC) or ISO 8601 text, within the last 30 days and
            at most 1 day ahead; None is the moment the log is made.

    The arguments can be read back as attributes, in the form in which they are sent.

    Raises:
        ChirrOpValidationError: names the argument, the rule and what was given.
    """

    __slots__ = ("_body",)  # what makes every attribute read-only, too

    def __init__(
        self,
        event: str,
        value: float,
        agent: str | None = None,
        log_id: object = None,
        meta: object = None,
        occurred_at: datetime | str | None = None,
    ) -> None:
        event = _trimmed("event", event)
        if not event:
            raise ChirrOpValidationError("event must not be empty: name it like tool.errors.count")
        if type(value) not in (int, float) or not abs(value) <= _LARGEST:  # which NaN is not either
            value = _number(value)
        now = time.time()
        uid, at = _mint(now)
        if log_id is not None:
            uid = _canonical_id(log_id) or uid
        if occurred_at is not None:
            moment = _parse_time(occurred_at)
            if not -MAX_AHEAD_SECONDS <= now - moment.timestamp() <= MAX_AGE_SECONDS:
                rule = "within the last 30 days and at most 1 day ahead"
                raise _wrong("occurred_at", rule, occurred_at)
            at = _iso(moment)
        text = f'{{"log_id":"{uid}","event":{_quote(event)},"value":{value!r},"occurred_at":"{at}"'
        if agent is not None:
            agent = _trimmed("agent", agent)
            if agent:
                text += f',"agent":{_quote(agent)}'
        if meta is not None:
            text += f',"meta":{_encode_meta(meta).decode()}'
        try:
            self._body = f"{text}}}".encode()
        except UnicodeEncodeError as exc:
            raise _wrong("event and agent", "valid Unicode", (event, agent)) from exc

    def to_dict(self) -> _Object:
        """Return the log as it is sent, as a new dict; without `agent` and `meta` if not given."""
        return json.loads(self._body)

    def __getattr__(self, name: str) -> Any:
        if name in _LOG_FIELDS:
            return self.to_dict().get(name)
        raise AttributeError(f"'Log' object has no attribute {name!r}")

    def __repr__(self) -> str:
        return f"Log({', '.join(f'{k}={v!r}' for k, v in self.to_dict().items())})"

    def __eq__(self, other: object) -> bool:
        return self._body == other._body if isinstance(other, Log) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._body)


# ---- Config ---------------------------------------------------------------
# In: arguments, the environment, ./.env. Out: checked settings that nobody changes. Runs in the
# caller's thread; no locks; reads one file, ./.env, where no key was given otherwise.


class _Secret(str):
    """A string that does not show itself in reprs."""

    def __repr__(self) -> str:
        return "'***'"


def _read_dotenv() -> str:
    """Return the key from ./.env; "" when there is none, whatever the file holds."""
    try:
        with open(".env", "rb") as file:
            content = file.read()
    except OSError:
        return ""
    # PowerShell's > writes UTF-16: a mark, and a zero beside each byte of ASCII.
    text = content.replace(b"\0", b"").decode("ascii", "replace")
    line = r"""(?m)^[\s\ufffd]*(?:export\s+)?CHIRROP_API_KEY\s*= *['"]?(.*?)['"]?\s*(?:\s#.*)?$"""
    found = re.findall(line, text)
    return found[-1] if found else ""


def _find_key(api_key: Any) -> _Secret:
    """Return the key, from the argument, the environment or ./.env."""
    key = _Secret(str(api_key or os.environ.get("CHIRROP_API_KEY") or _read_dotenv()).strip())
    where = "CHIRROP_API_KEY in the environment or ./.env"
    if not key:
        raise ChirrOpValidationError(f"API key is required: give api_key, or set {where}")
    rule = "'chp_' and more printable ASCII, without spaces or quotation marks"
    _check(re.fullmatch("chp_[!-~]+", key), f"api_key (or {where})", rule, key)
    return key


def _endpoint(name: str, value: Any, default: str) -> str:
    """Return an http(s) URL of host, port and path, without final slashes."""
    variable = f"CHIRROP_{name.upper()}"
    url = str(value or os.environ.get(variable) or default).strip().rstrip("/")
    host = r"([\w.-]+|\[[\da-f:.]+\])(:[1-9]\d{0,4})?"
    fits = re.fullmatch(rf"(?ai)https?://{host}(/[\w.~/%:@+=-]*)?", url)
    rule = "an absolute http or https URL without user info, query or fragment"
    # No more of it: user info, path and query may hold secrets.
    _check(fits, f"{name} (or {variable})", rule, f"{url:.4}...")
    return url


def _integer(name: str, value: Any, low: int = 0, high: int = 10**9) -> int:
    fits = type(value) is int and low <= value <= high
    _check(fits, name, f"an integer from {low} to {high}", value)
    return value


def _seconds(name: str, value: Any, low: float = 0) -> float:
    """Return a duration of at most a day: longer waits overflow in some of the standard library."""
    fits = type(value) in (int, float) and low <= value <= 86400
    _check(fits, name, f"seconds from {low} to 86400", value)
    return float(value)


def _choice(name: str, value: Any, allowed: Iterable[str]) -> Any:
    """Return `value` if it is one of a closed vocabulary; nothing has been sent when it is not."""
    _check(isinstance(value, str) and value in allowed, name, f"one of {', '.join(allowed)}", value)
    return value


def _level(value: Any) -> int:
    """Return a logging level given as its number or its name."""
    if isinstance(value, str):
        import logging

        value = logging.getLevelName(value.upper())  # "Level X", where X is none
    return _integer("log_level", value)


class _Unpicklable:
    """What is made anew in each process that needs it."""

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"cannot pickle or copy a {type(self).__name__}: make it in the worker")


class Config(_Unpicklable):
    """Settings of a client, checked when they are made; one Config can serve many clients.

    It is not pickled or copied: make it in the worker, where the key is.

    Args:
        api_key: starts with "chp_"; else CHIRROP_API_KEY in the environment, else in ./.env.
        api_endpoint: full URL that takes logs; else CHIRROP_API_ENDPOINT, else the service's.
        servicer_endpoint: the control plane's base URL; else CHIRROP_SERVICER_ENDPOINT, else the
            service's.
        retries: further attempts for a batch before it counts as exhausted, from 0.
        timeout: seconds for each socket operation of an attempt, as in urllib, 0.001 to 86,400;
            also how long `log` waits for room in a bounded queue.
        batch_size: queued logs that start a send at once, from 1; a request carries 250 at most.
        flush_delay: seconds a log may wait for others to share its request, 0 to 86,400.
        queue_size: logs held at most, in flight included; 0 is no limit.
        log_level: level of the logger "chirrop", a number or a name; 0 (NOTSET) leaves it alone.
        servicer_retries: further attempts of a control-plane call, from 0.
        on_exhausted: "keep" holds an exhausted batch and goes on trying; "drop" reports its loss.
        max_senders: threads that send at once at most, 1 to 64; a backlog brings them, one by one.
        exit_timeout: seconds that all clients together may delay the end of the process, and that a
            client may delay the end of a Lambda invocation, 0 to 86,400.
        transport: callable that makes one attempt in place of urllib (see the README).
        ssl_context: ssl.SSLContext for a private CA or a client certificate; None is the system's.
        spool: a SqliteSpool, or the path of one, that keeps logs on disk until they are delivered.
        on_drop: called as on_drop(logs, error) with the dropped logs as dicts, in the thread that
            dropped them, which waits for it: be quick. It may log, flush and close; what it raises
            is caught and logged.
        disabled: True checks logs, then discards them: no key, no thread, no network, but for
            control-plane calls where api_key is given all the same; None is what CHIRROP_DISABLED
            says (1, true, yes or on disable); False sends whatever that says.

    Raises:
        ChirrOpValidationError: names the setting, the rule and what was given (never the key).
    """

    def __init__(
        self,
        api_key: str | None = None,
        api_endpoint: str | None = None,
        servicer_endpoint: str | None = None,
        retries: int = 10,
        timeout: float = 10,
        batch_size: int = MAX_BATCH,
        flush_delay: float = 0.5,
        queue_size: int = 0,
        log_level: int | str = 0,
        *,
        servicer_retries: int = 2,
        on_exhausted: Literal["keep", "drop"] = "keep",
        max_senders: int = 4,
        exit_timeout: float = 5.0,
        transport: Transport | None = None,
        ssl_context: Any = None,
        spool: SqliteSpool | str | os.PathLike[str] | None = None,
        on_drop: Callable[[list[_Object], ChirrOpError], object] | None = None,
        disabled: bool | None = None,
    ) -> None:
        if disabled is None:
            switch = os.environ.get("CHIRROP_DISABLED", "").strip().lower()
            disabled = switch in ("1", "true", "yes", "on")
        _check(isinstance(disabled, bool), "disabled", "True, False or None", disabled)
        _check(transport is None or callable(transport), "transport", "callable", transport)
        _check(on_drop is None or callable(on_drop), "on_drop", "callable", on_drop)
        is_context = ssl_context is None or hasattr(ssl_context, "wrap_socket")
        _check(is_context, "ssl_context", "an ssl.SSLContext", ssl_context)
        self.api_key = _Secret() if disabled and not api_key else _find_key(api_key)
        self.api_endpoint = _endpoint("api_endpoint", api_endpoint, DEFAULT_API_ENDPOINT)
        self.servicer_endpoint = _endpoint(
            "servicer_endpoint", servicer_endpoint, DEFAULT_SERVICER_ENDPOINT
        )
        self.retries = _integer("retries", retries)
        self.timeout = _seconds("timeout", timeout, 0.001)
        self.batch_size = _integer("batch_size", batch_size, 1)
        self.flush_delay = _seconds("flush_delay", flush_delay)
        self.queue_size = _integer("queue_size", queue_size)
        self.log_level = _level(log_level)
        self.servicer_retries = _integer("servicer_retries", servicer_retries)
        self.on_exhausted = _choice("on_exhausted", on_exhausted, ("keep", "drop"))
        self.max_senders = _integer("max_senders", max_senders, 1, 64)
        self.exit_timeout = _seconds("exit_timeout", exit_timeout)
        self.transport = transport
        self.ssl_context = ssl_context
        self.spool = spool
        self.on_drop = on_drop
        self.disabled = disabled

    def __setattr__(self, name: str, value: object) -> None:
        if "disabled" in vars(self):  # which __init__ sets last
            raise AttributeError("a Config cannot be changed: make another")
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{k}={_show(v)}' for k, v in vars(self).items())})"


# ---- Retry policy ---------------------------------------------------------
# What an answer means, how long to wait before the next attempt, which error to show. No state, no
# lock; functions of their arguments alone, but for _random and the clock of a Retry-After date.

# _RETRY uses up one of `retries`, _HOLD all of them; _REFUSED is final; _SPLIT halves the batch.
_DELIVERED, _RETRY, _HOLD, _REFUSED, _SPLIT = "delivered", "retry", "hold", "refused", "split"

# What an answer means, by its status, else by its hundreds; 0 is no answer at all. What neither
# lists is _REFUSED.
_BY_HUNDREDS = {0: _RETRY, 1: _RETRY, 2: _DELIVERED, 5: _RETRY}
_INGEST = {
    400: _SPLIT,  # some logs of the batch are bad
    408: _RETRY,
    413: _SPLIT,  # the batch is too large
    422: _SPLIT,
    429: _RETRY,
    500: _HOLD,  # counts as if all retries had failed
    503: _HOLD,
}
_CONTROL = {408: _RETRY, 429: _RETRY, 500: _REFUSED, 503: _REFUSED}
_ERROR_BY_HUNDREDS = {1: ChirrOpServerError, 2: ChirrOpTransportError, 5: ChirrOpServerError}


_PROXY_ADVICE = (
    "the proxy wants a password: give it as http://user:password@host:port in HTTPS_PROXY"
    " (HTTP_PROXY for a plain http endpoint)"
)


class _Answer(namedtuple("_Answer", "status body headers cause url", defaults=(b"", {}, None, ""))):
    """What became of one attempt: a status with its body and headers, or 0 and the exception.

    The names of the headers are in lower case.
    """

    def is_page(self) -> bool:
        """Tell whether a portal or a proxy answered in the service's place, which speaks JSON."""
        return self.status // 100 == 2 and self.body.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<"

    def error(self) -> ChirrOpError:
        """Return the exception that stands for an answer that is no success."""
        status, body, headers, cause, url = self
        if cause is not None:
            text = _printable(str(cause) or type(cause).__name__)
            if "Tunnel connection failed: 407" in text:
                text += f"; {_PROXY_ADVICE}"
            failure = ChirrOpTransportError(f"no answer: {text}")
            failure.__cause__ = cause
            return failure
        other = _ERROR_BY_HUNDREDS.get(status // 100, ChirrOpNonRetryableError)
        text = body.decode("utf-8", "replace").strip("\ufeff \t\r\n")
        try:
            parsed = json.loads(text)
        except (ValueError, RecursionError):
            parsed = None
        message, code = _spoken(parsed)
        if parsed is None or len(text) > MAX_KEPT_BYTES:
            parsed = text[:MAX_KEPT_BYTES] or None
        place = f" ({url})" if status == 404 else ""
        return _ERROR_BY_STATUS.get(status, other)(
            f"HTTP {status}: {_printable(self._says(message or text))}{place}",
            status_code=status,
            code=code,
            body=parsed,
            retry_after=_retry_after(headers),
        )

    def _says(self, text: str) -> str:
        """Return the service's text for people, or what the status says where it gave none.

        Where it was not the service that answered: what to do.
        """
        if self.is_page():
            return "a web page, not the service's answer: a portal, a proxy or a wrong endpoint"
        if self.status == 407:
            return _PROXY_ADVICE
        if self.status // 100 == 3:
            place = self.headers.get("location", "").partition("?")[0] or "another place"
            return f"redirects are not followed, this one leads to {place}; check the endpoint"
        if text and text[0] not in "<{[":
            return text
        from http.client import responses

        return responses.get(self.status, "no message").lower()


def _spoken(parsed: Any) -> tuple[str, str | None]:
    """Return the most telling text of an error's JSON, and the service's code."""
    fields = parsed if isinstance(parsed, dict) else {}
    error = fields.get("error")
    if isinstance(error, dict):
        fields = {**fields, **error}
    code = fields.get("code")
    for text in (fields.get("message"), error, code):
        if isinstance(text, str) and text.strip():
            return text.strip(), _printable(code) if isinstance(code, str) else None
    return "", None


def _printable(text: str) -> str:
    """Return text fit for logs, terminals and dead letters: short, without control characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:500])


def _verdict(table: Mapping[int, str], answer: _Answer) -> str:
    """Return what an answer means by _INGEST or _CONTROL; a page is as good as none."""
    if answer.is_page():
        return _RETRY
    return table.get(answer.status) or _BY_HUNDREDS.get(answer.status // 100, _REFUSED)


def _backoff(attempt: int, retry_after: float | None, rand: Callable[[], float]) -> float:
    """Return seconds to wait after failed attempt `attempt` (1 is the first).

    Full jitter: clients cut off together return apart. A server's own wait is kept in full, with
    no more jitter on top than it is long: a Retry-After of 0 is at once. `rand` returns a float
    in [0, 1).
    """
    window = min(BACKOFF_CAP, BACKOFF_BASE * 2.0 ** min(attempt - 1, 32))
    if retry_after is None:
        return rand() * window
    return retry_after + rand() * min(retry_after, window)


def _random() -> float:
    """Return a float in [0, 1) that a cloned or forked process does not share."""
    return int.from_bytes(os.urandom(6), "big") / 2.0**48


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of a Retry-After header, 0 to MAX_RETRY_AFTER; None if it has none."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.replace(".", "", 1).isdigit():
        return min(MAX_RETRY_AFTER, float(text))
    moment = _unix_seconds(text)
    if moment is None:
        return None
    return min(MAX_RETRY_AFTER, max(0.0, moment - time.time()))


def _unix_seconds(date: str) -> float | None:
    """Return the moment of an HTTP date; None where it is none."""
    import email.utils

    try:
        moment = email.utils.parsedate_to_datetime(date)
        return moment.replace(tzinfo=moment.tzinfo or timezone.utc).timestamp()
    except Exception:  # a header may hold anything
        return None


# ---- Delivery -------------------------------------------------------------
# In: encoded logs, from any thread. Out: batches, through `_send`, from the threads
# "chirrop-sender", or from a caller that waits where there are none. Each log ends as delivered,
# dropped or left in a spool, and no drop is silent.
# All state is attributes of one object under one re-entrant lock, which is never held while a
# request is under way or on_drop, a log handler or a transport runs. Names that end in _locked need
# it held; so do note, lose and the buffer's methods, but for tend, count and a put to memory.

_WARNING, _ERROR = 30, 40  # the logging module's levels, without importing it
_open: set[_Delivery] = set()  # not closed, or with drops to say: for the exit and fork hooks
_NEVER = math.inf  # a moment

if TYPE_CHECKING:
    _Found = tuple[Any, float]  # what was found, or None; and when to look again
    _Send = Callable[[bytes, float], "_Answer"]
    _Drop = tuple[str, "ChirrOpError"]  # reason and cause


def _now() -> float:
    """Return seconds of the clock that nobody sets."""
    return time.monotonic()


class _MemoryBuffer:
    """Where logs wait; a batch taken out is still its care until it is settled.

    In memory there is little to care for; a spool's buffer has files as well.
    """

    is_durable = False  # whether logs survive the process
    place = "memory"  # where they wait, for people
    tended_at = look_at = 0.0  # of a spool: the last tend(); the next look for left-overs

    def __init__(self, spool: Any = None) -> None:
        self.spool = spool
        self.waiting = queue.SimpleQueue[bytes]()

    def attach(self, delivery: _Delivery) -> None:
        """Get to know the lock, and whom to tell of trouble."""

    def put(self, body: bytes) -> None:
        """Add a log behind the others."""
        self.waiting.put(body)

    def count(self) -> int:
        """Return how many logs wait."""
        return self.waiting.qsize()

    def take(self, most: int, into: list[bytes]) -> None:
        """Move up to `most` of the oldest logs to the end of a list, in one call of C."""
        most = min(most, self.waiting.qsize())
        into.extend(itertools.islice(iter(self.waiting.get_nowait, None), most))

    def settle(self, logs: list[bytes], error: str) -> None:
        """Let go of logs, neighbours in a batch, that were delivered, or dropped with an error."""

    def tend_at(self) -> float:
        """Return when tend() is to be called."""
        return _NEVER

    def tend(self) -> bool:
        """Do what is due to files; return whether there is more to do at once."""
        return False

    def close(self, held: list[bytes]) -> list[bytes]:
        """Return the logs that are lost now, of those that senders hold and that wait."""
        self.take(self.waiting.qsize(), held)
        return held


class Stats(namedtuple("Stats", "accepted delivered dropped queued in_flight retries last_error")):
    """The account of one client at one moment; counts are logs.

    Always accepted == delivered + sum(dropped.values()) + queued + in_flight.

    Attributes:
        accepted: taken by log(), delivered by send_logs() or dropped by try_log(); and left-overs
            of a spool, from the moment they are this client's.
        delivered: the server has them.
        dropped: reason to count: "rejected" (400, 413, 422, alone), "undecided" (in a batch so bad
            that the search for the bad ones was given up), "refused" (401, 403, 404, 3xx and other
            final answers; held with a spool, unless on_exhausted="drop"), "exhausted" (with
            on_exhausted="drop"), "closed" (not sent before close or exit, or logged after),
            "damaged" (in a spool file that was moved aside), "invalid" and "full" (try_log).
        queued: waiting, for their turn or for another attempt.
        in_flight: in a batch of which a request is under way.
        retries: attempts that repeated a request; those of send_logs are not counted.
        last_error: of the newest failure or drop, a ChirrOpError; None if there was none.
    """

    accepted: int
    delivered: int
    dropped: dict[str, int]
    queued: int
    in_flight: int
    retries: int
    last_error: ChirrOpError | None


class _Batch:
    """Logs that left the buffer together: their sender's until each is settled, or that ends."""

    under_way = True
    number = 0  # of its newest attempt, among all of the client
    attempts = 0  # of the same request
    refusals = 0  # by which bad logs are told from good, see MAX_SPLIT_REQUESTS

    def __init__(self, start: int, sender: threading.Thread) -> None:
        self.logs: list[bytes] = []  # not settled yet
        self.parts: list[int] = []  # while it is halved: the sizes of its requests, last first
        self.start = start  # logs that left the buffer before the first of these
        self.sender = sender


class _Flush:
    """A caller that waits for the first `mark` logs; `number` attempts were begun before it."""

    is_lost = False  # one of them was dropped
    is_failed = False  # one of their batches failed since, with no retries left

    def __init__(self, mark: int, number: int) -> None:
        self.mark, self.number = mark, number


class _Delivery:
    """The logs of one client: where they wait, who sends them, what became of them.

    A sender's thread does one task after another: an attempt for the batch that it owns, or else
    for the next one. Where no thread can be had, callers that wait do the same tasks themselves.

    Args:
        buffer: a _MemoryBuffer or a spool's.
        send: makes one attempt: send(body, timeout).
        config: the client's.
        release: called when the client is closed.
    """

    def __init__(
        self, buffer: _MemoryBuffer, send: _Send, config: Config, release: Callable[[], object]
    ) -> None:
        self._buffer, self._send, self._config, self._release = buffer, send, config, release
        self._rand = _random
        # So many waiting logs start a send: a bounded queue's half at most, or it would run dry.
        self._full = min(config.batch_size, (config.queue_size + 1) // 2 or config.batch_size)
        self._lock = threading.RLock()
        self._owner_test = threading.Condition(self._lock)  # see _await
        self._limit = config.queue_size
        self._put: Any = self._put_or_wait
        self._count = buffer.count
        if not buffer.is_durable and not self._limit:  # one call of C, without the lock
            self._put, self._count = buffer.waiting.put, buffer.waiting.qsize
        # put() wakes a sender when as many logs as this wait: 1 while one is idle or there is none,
        # _full while one gives logs their time to gather, inf while none sleeps, 0 after close().
        self._wake_at = 1.0
        self._bells: set[queue.SimpleQueue[None]] = set()  # one of each thread that waits
        self._telling: set[int] = set()  # threads in on_drop or a log handler
        self._senders: list[threading.Thread] = []  # in the order of their start
        self._batches: list[_Batch] = []
        self._flushes: list[_Flush] = []
        self._due_at = _NEVER  # when the first log that waits has had its flush_delay
        self._resume_at = 0.0  # no attempt is made before
        self._taken = 0  # logs that left the buffer
        self._begun = 0  # attempts
        self._delivered = self._retries = 0
        self._dropped: dict[str, int] = {}
        self._last_error: ChirrOpError | None = None
        self._untold: list[Any] = []  # (thread, logs, error), for on_drop
        self._unsaid: dict[str, tuple[int, str]] = {}  # reason: drops for a record, first error
        self._quiet: dict[str, float] = {}  # kind of record, or reason: none before this moment
        self._notes: list[tuple[int, str]] = []  # records to write
        self._closing = self._abandoned = self._stopped = self._closed = False
        self._outcome = True  # of close()
        buffer.attach(self)
        _open.add(self)

    # Logs come in.

    def put(self, body: bytes) -> None:
        """Queue one log; see Client.log."""
        self._put(body)
        if self._count() >= self._wake_at:
            self._wake()

    def _put_or_wait(self, body: bytes) -> None:
        """Queue a log under the lock; only a bounded queue that is full is waited for."""
        if not self._put_if_room(body):
            self._wake()
            deadline = _now() + self._config.timeout
            if not self._await(lambda: self._put_if_room(body), deadline):
                raise ChirrOpQueueFullError(f"{self._limit} logs wait: there was no room in time")

    def _put_if_room(self, body: bytes) -> bool | None:
        """Queue a log, or return None; a closed client has room, and _wake() drops the log."""
        with self._lock:
            if self._limit and self._held_locked() >= self._limit and not self._closed:
                return None
            self._buffer.put(body)
            return True

    def refuse(self, reason: str, logs: list[bytes], error: ChirrOpError) -> None:
        """Count logs that never came to the buffer, as accepted and dropped; report them."""
        with self._lock:
            self._drop_locked(logs, (reason, error))
        self._tell()

    def count_delivered(self, count: int) -> None:
        """Count logs that were delivered past the buffer."""
        with self._lock:
            self._delivered += count

    def _held_locked(self) -> int:
        return self._count() + sum(len(batch.logs) for batch in self._batches)

    def stats(self) -> Stats:
        """Return the account at this moment."""
        with self._lock:
            flying = sum(len(batch.logs) for batch in self._batches if batch.under_way)
            held, done, drops = self._held_locked(), self._delivered, dict(self._dropped)
            total = done + sum(drops.values()) + held
            return Stats(total, done, drops, held - flying, flying, self._retries, self._last_error)

    # Waiting and waking.

    def _wait(self, look: Callable[[], _Found], deadline: float = _NEVER) -> Any:
        """Return what `look` finds; None at the deadline.

        `look` is called with the lock held, after each ring and at the moment for which it asks: it
        returns what it found, or None and that moment.
        """
        bell = queue.SimpleQueue[None]()
        try:
            while True:
                with self._lock:
                    self._bells.add(bell)
                    found, moment = look()
                now = _now()
                if found is not None or now >= deadline:
                    return found
                try:
                    bell.get(timeout=max(0.0, min(moment - now, deadline - now, 3600.0)))
                except queue.Empty:
                    pass
        finally:
            self._bells.discard(bell)

    def _ring_locked(self) -> None:
        for bell in tuple(self._bells):
            bell.put(None)

    def _await(self, look: Callable[[], bool | None], deadline: float) -> bool | None:
        """Wait in a caller's thread until `look` says; do senders' work where there are none.

        It does not wait where others cannot go on meanwhile: within a callback of a thread that
        delivers, and in a signal handler or finaliser that has interrupted a thread with the lock.
        """
        try:
            self._owner_test.notify(0)  # raises for all but the lock's owner
            deadline = 0.0
        except RuntimeError:
            is_sender = threading.current_thread() in self._senders
            if is_sender or threading.get_ident() in self._telling:
                deadline = 0.0

        def look_or_help() -> _Found:
            found = look()
            if found is not None or self._senders or _now() >= deadline:
                return found, _NEVER
            return self._task_locked(deadline)

        while callable(found := self._wait(look_or_help, deadline)):
            found()
        return found

    def _wake(self) -> None:
        """Wake whoever sleeps, see to it that there is a sender; drop what came after close()."""
        with self._lock:
            if self._closed:  # put while close() swept, or after
                late = self._buffer.close([])
                self._drop_locked(late, ("closed", ChirrOpError("logged after close")))
            else:
                if not self._senders and self._held_locked():
                    self._start_locked()
                self._ring_locked()
                # Last: where this is interrupted, the next log wakes them again.
                self._wake_at = _NEVER if self._senders else 1
        if self._closed:
            self._tell()

    # Senders.

    def _start_locked(self) -> None:
        """Start one more sender, if a thread can be had; the first sees to a child's end, too."""
        if not self._begun:
            _close_in_child()
        try:
            sender = threading.Thread(target=self._run, name="chirrop-sender", daemon=True)
            sender.start()
            self._senders.append(sender)
        except RuntimeError:  # 3.12 at exit, a subinterpreter, Pyodide, too many threads
            pass

    def _run(self) -> None:
        """Do one task after another, in a sender's thread."""
        sender = threading.current_thread()
        try:
            while task := self._wait(self._next_locked):
                task()
        finally:
            with self._lock:
                self._senders = [other for other in self._senders if other is not sender]
                self._wake_at = 1
                self._ring_locked()
        if self._abandoned and not self._senders:
            self.close()

    def _next_locked(self) -> _Found:
        """Return a sender's next task; False to end it; else None, and when to look again."""
        sender = threading.current_thread()
        if sender not in self._senders:  # its start was interrupted
            self._senders.append(sender)
        task, moment = self._task_locked(_NEVER)
        is_idle = task is None and all(batch.sender is not sender for batch in self._batches)
        is_spare = is_idle and sender is not self._senders[0]
        is_over = self._stopped or (self._abandoned and not self._held_locked())
        return (False if is_spare or is_over else task), moment

    def _task_locked(self, deadline: float) -> _Found:
        """Return the next thing to do: one attempt, over by `deadline`, or to tend a spool.

        Else None, and when to look again.
        """
        now, sender = _now(), threading.current_thread()
        tend_at = self._buffer.tend_at()
        if self._stopped:
            return None, _NEVER
        if now >= tend_at:  # before any pause: in an outage, too
            self._buffer.tended_at = now
            return self._tend, now
        mine = [
            batch  # its own, or one whose sender has ended or was interrupted
            for batch in self._batches
            if batch.sender is sender or not (batch.under_way or batch.sender in self._senders)
        ]
        moment = max(self._resume_at, now if mine else self._due_locked(now))
        if moment > now:
            return None, min(moment, tend_at)
        batch = mine[0] if mine else self._take_locked(sender, now)
        if not batch.logs:  # somebody else removed the rows
            self._batches.remove(batch)
            return None, now
        batch.sender, batch.under_way = sender, True
        return functools.partial(self._attempt, batch, deadline), now

    def _due_locked(self, now: float) -> float:
        """Return when the next batch is to be taken."""
        self._wake_at = 1  # first: a log that comes now is either counted here or wakes
        if not self._count():
            self._due_at = _NEVER
            return _NEVER
        self._due_at = min(self._due_at, now + self._config.flush_delay)
        self._wake_at = self._full
        is_wanted = self._closing or any(flush.mark > self._taken for flush in self._flushes)
        return now if is_wanted or self._count() >= self._wake_at else self._due_at

    def _take_locked(self, sender: threading.Thread, now: float) -> _Batch:
        batch = _Batch(self._taken, sender)
        self._batches.append(batch)  # before it has logs: they are never out of the account
        self._buffer.take(MAX_BATCH, batch.logs)
        self._taken += len(batch.logs)
        self._due_at = now + self._config.flush_delay  # of those that come from now on
        self._wake_at = _NEVER if self._senders else 1
        self._ring_locked()  # whoever sleeps looks again, which has the next log wake it
        return batch

    def _tend(self, deadline: float = _NEVER) -> None:
        """Have the spool write its -wal back and take over left-overs; tell of what it lost."""
        while self._buffer.tend() and _now() < deadline:
            pass
        self._tell()

    # One attempt, and what becomes of its logs.

    def _attempt(self, batch: _Batch, deadline: float) -> None:
        """Send a batch, or the part of it that is next, once."""
        try:
            with self._lock:
                size = batch.parts[-1] if batch.parts else len(batch.logs)
                body = b"[" + b",".join(batch.logs[:size]) + b"]"
                self._retries += batch.attempts > 0
                batch.attempts += 1
                self._begun += 1
                batch.number = self._begun
            timeout = min(self._config.timeout, max(0.001, deadline - _now()))
            answer = self._send(body, timeout)
            with self._lock:
                batch.under_way = False
                if batch in self._batches:  # else close() has dropped it meanwhile
                    self._judge_locked(batch, size, answer)
            self._tell()
        finally:
            batch.under_way = False

    def _judge_locked(self, batch: _Batch, size: int, answer: _Answer) -> None:
        """Settle the logs of a request by its answer, or leave them for another attempt."""
        verdict = _verdict(_INGEST, answer)
        if verdict == _DELIVERED:
            self._delivered += size
            self._settle_locked(batch, size)
            is_behind = self._count() >= self._full
            if is_behind and len(self._senders) < self._config.max_senders:
                self._start_locked()
            return
        error = answer.error()
        if verdict != _SPLIT:
            self._fail_locked(batch, size, verdict, error)
            return
        batch.refusals += answer.status != 413  # which is about the size alone
        if batch.refusals >= MAX_SPLIT_REQUESTS:
            self._settle_locked(batch, len(batch.logs), ("undecided", error))
        elif size == 1:
            self._settle_locked(batch, size, ("rejected", error))
        else:
            batch.attempts = 0
            batch.parts[-1:] = [size - size // 2, size // 2]

    def _settle_locked(self, batch: _Batch, size: int, drop: _Drop | None = None) -> None:
        """Let go of the first logs of a batch: they were delivered, or are dropped."""
        logs = batch.logs[:size]
        if drop:
            self._drop_locked(logs, drop)
            for flush in self._flushes:
                flush.is_lost |= batch.start < flush.mark
        self._buffer.settle(logs, str(drop[1]) if drop else "")
        del batch.logs[:size], batch.parts[-1:]
        batch.start += size
        batch.attempts = 0
        if not batch.logs:
            self._batches.remove(batch)
        self._ring_locked()

    def _fail_locked(self, batch: _Batch, size: int, verdict: str, error: ChirrOpError) -> None:
        """Keep logs for another attempt, later, or drop them where none is to be made."""
        self._last_error = error
        is_exhausted = verdict != _RETRY or batch.attempts > self._config.retries
        reason = "refused" if verdict == _REFUSED else "exhausted"
        is_hopeless = reason == "refused" and not self._buffer.is_durable
        if is_hopeless or (is_exhausted and self._config.on_exhausted == "drop"):
            self._settle_locked(batch, size, (reason, error))
            return
        # 99: the longest pause.
        pause = _backoff(99 if is_exhausted else batch.attempts, error.retry_after, self._rand)
        self._resume_at = max(self._resume_at, _now() + pause)
        for flush in self._flushes:
            is_its = batch.start < flush.mark and batch.number > flush.number
            flush.is_failed |= is_exhausted and is_its
        if not self._closing:
            held = f"{self._held_locked():,} wait in {self._buffer.place}"
            self.note(f"logs are held and sent again; {held}: {error}", "held")
        self._ring_locked()

    # Drops and log records.

    def _drop_locked(self, logs: list[bytes], drop: _Drop) -> None:
        """Count logs as dropped; this thread must call _tell() when it has left the lock."""
        if logs:
            reason, error = drop
            self._last_error = error
            self._dropped[reason] = self._dropped.get(reason, 0) + len(logs)
            count, first = self._unsaid.get(reason, (0, str(error)))
            self._unsaid[reason] = count + len(logs), first
            self._untold.append((threading.get_ident(), logs, error))
            _open.add(self)  # so that the exit says what is not said by then

    def lose(self, count: int, text: str) -> None:
        """Drop what was in a damaged spool file, as empty logs; the lock is held."""
        self._drop_locked([b"{}"] * count, ("damaged", ChirrOpError(text)))
        self.note(text)

    def note(self, text: str, kind: str = "") -> None:
        """Have a warning written, but one of its kind a minute at most; the lock is held."""
        if self._is_due_locked(kind or text):
            self._notes.append((_WARNING, text))

    def _is_due_locked(self, kind: str) -> bool:
        """Tell whether a record of this kind may be written now; if so, no other for a minute."""
        now = _now()
        if now < self._quiet.get(kind, now):
            return False
        self._quiet[kind] = now + REPORT_SECONDS
        return True

    def _tell(self, is_last: bool = False) -> None:
        """Hand this thread's drops to on_drop and write the records that are due.

        A drop counts as said before it is said: no two threads say it. Nothing is locked while the
        application's code runs, and what that raises stays here.
        """
        thread, on_drop = threading.get_ident(), self._config.on_drop
        if thread in self._telling:  # what on_drop itself drops is told with the next
            return
        self._telling.add(thread)
        try:
            with self._lock:
                drops = [drop for drop in self._untold if is_last or drop[0] == thread]
                self._untold = [drop for drop in self._untold if drop not in drops]
            for _, logs, error in drops:
                try:
                    if on_drop is not None:
                        on_drop([json.loads(log) for log in logs], error)
                except Exception as exc:
                    with self._lock:
                        self.note(f"on_drop raised {_show(exc)}", "on_drop")
            with self._lock:
                self._sum_up_locked(is_last)
                notes, self._notes = self._notes, []
            for level, text in notes:
                import logging

                logger = logging.getLogger("chirrop")
                logger.setLevel(self._config.log_level or logger.level)
                try:
                    logger.log(level, "%s", text)
                except Exception:
                    pass  # a handler or filter of the application's
        finally:
            self._telling.discard(thread)

    def _sum_up_locked(self, is_last: bool) -> None:
        """Note drops as records: the first of a reason at once, then one sum a minute at most."""
        for reason, (count, first) in list(self._unsaid.items()):
            if is_last or self._is_due_locked(reason):
                del self._unsaid[reason]
                what = (
                    f"1 log ({reason})" if count == 1 else f"{count:,} logs ({reason}), the first"
                )
                self._notes.append((_ERROR, f"dropped {what}: {first}"))

    # The end of a flush, of the client, of the process.

    def flush(self, timeout: float | None = None) -> bool:
        """Send what was put before this call; see Client.flush."""
        deadline = _NEVER if timeout is None else _now() + timeout
        damaged = self._dropped.get("damaged")
        if self._buffer.is_durable and not self._closed:
            self._buffer.look_at = 0.0
            self._tend(deadline)
        with self._lock:
            flush = _Flush(self._taken + self._count(), self._begun)
            self._flushes.append(flush)
            self._resume_at = 0.0
        try:
            self._wake()
            outcome = self._await(lambda: self._outcome_of(flush), deadline)
            return outcome is True and damaged == self._dropped.get("damaged")
        finally:
            self._flushes.remove(flush)

    def _outcome_of(self, flush: _Flush) -> bool | None:
        is_taken = self._taken >= flush.mark or not self._count()
        if flush.is_failed or (self._stopped and not is_taken):
            return False
        if is_taken and all(batch.start >= flush.mark for batch in self._batches):
            return not flush.is_lost
        return None

    def close(self, timeout: float | None = None) -> bool:
        """Flush, end the senders, account for what is left; see Client.close."""
        if not self._closed:
            deadline = _NEVER if timeout is None else _now() + timeout
            self._closing = True
            is_delivered = self.flush(timeout)
            with self._lock:
                self._stopped = True
                self._ring_locked()
            deadline = min(deadline, _now() + self._config.timeout)
            self._await(lambda: not self._senders or self._closed or None, deadline)
            self._await(self._are_told_locked, _NEVER)
            with self._lock:
                self._sweep_locked(is_delivered)
        self._tell(is_last=True)
        self._release()
        return self._outcome

    def _are_told_locked(self) -> bool | None:
        """Tell whether no sender is left but for those in a request: none tells of drops."""
        busy = sum(batch.under_way for batch in self._batches)
        return len(self._senders) <= busy or self._closed or None

    def _sweep_locked(self, is_delivered: bool) -> None:
        """End the account: what is in the spool's file stays there, all else is dropped."""
        if self._closed:
            return
        self._outcome = is_delivered
        self._wake_at = 0  # first: each log that comes from now on is swept by its own call
        held = [log for batch in self._batches for log in batch.logs]
        lost = self._buffer.close(held)
        self._batches.clear()
        for flush in self._flushes:
            flush.is_failed = True
        why = f": {self._last_error}" if self._last_error else ""
        self._drop_locked(lost, ("closed", ChirrOpError(f"not sent before close{why}")))
        left = self._count()
        if left:
            self.note(f"logs wait in {self._buffer.place} for its next client: {left:,}{why}")
        self._closed = True
        _open.discard(self)

    def abandon(self) -> None:
        """Have a client that was collected unclosed end when what it has is sent."""
        with self._lock:
            self._closing = self._abandoned = True
            self._ring_locked()
            is_idle = not self._senders and not self._held_locked()
        if is_idle:
            self.close()


def _close_all() -> None:
    """Send what all open clients have, at the end of the process: in their longest exit_timeout."""
    found = list(_open)
    deadline = _now() + max((delivery._config.exit_timeout for delivery in found), default=0.0)
    try:
        for delivery in found:  # all at once
            delivery._closing = True
            delivery.flush(0)
        for delivery in found:
            delivery.close(max(0.0, deadline - _now()))
    finally:  # where Ctrl-C ends the wait, what is dropped is told all the same
        for delivery in found:
            delivery.close(0)


def _close_in_child() -> None:
    """Have a child of multiprocessing close its clients: it ends past every exit hook."""
    processes = sys.modules.get("multiprocessing.process")
    if processes and processes.parent_process():
        from multiprocessing.util import Finalize

        Finalize(None, _close_all, exitpriority=0)


def _before_fork() -> None:
    """Take the lock of each client, so that no thread is within SQLite: in 5 s at most."""
    deadline = _now() + 5.0
    for delivery in list(_open):
        delivery._lock.acquire(timeout=max(0.0, deadline - _now()))


def _after_fork() -> None:
    """Give the locks back, in the parent."""
    for delivery in list(_open):
        try:
            delivery._lock.release()
        except RuntimeError:  # it could not be had in time
            pass


def _after_fork_in_child() -> None:
    """Start empty, with a new lock: the parent has its logs, threads, connections and files."""
    for old in list(_open):
        buffer = old._buffer
        fresh = type(buffer)(buffer.spool)
        _Delivery.__init__(old, fresh, old._send, old._config, old._release)


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
    )


# ---- Spool ----------------------------------------------------------------
# The other buffer: rows of an SQLite file that one client has locked for itself. In: encoded logs,
# on disk when `put` returns, unless no file can be used. Out: the oldest of them; a row is deleted
# when its log is settled. All under the delivery's lock, and within that _files_lock, but for the
# sync before a checkpoint and dead_letters().

_SPOOL_ID = b"ChRp"  # application_id of our files, by which they are known
_SPOOL_VERSION = 3  # user_version; a file with a higher one is refused
# REPLACE, for insert() may have been interrupted when its rows were there, but not counted: what
# they hold is still in memory, or in the left-over file, and is inserted again.
_SQL_INSERT = "INSERT OR REPLACE INTO logs (id, body) VALUES (?, ?)"
_SQL_SELECT = "SELECT id, body FROM logs WHERE id > ? ORDER BY id LIMIT ?"
_SQL_DELETE = "DELETE FROM logs WHERE id BETWEEN ? AND ?"
_PAGE_BYTES = 2048  # a commit writes whole pages: half of the default is enough
_MOVED_AT_ONCE = 1000  # rows of a left-over file for which the lock is held
_CHECKPOINT_AFTER = 2000  # statements: the stall grows with them, and so does the -wal

# SQLite loses its lock when any descriptor of the file is closed in the process. So a file that is
# held here, by device and inode, is never opened again; a forked child leaves its parent's alone.
_held_files: set[_Key] = set()
_files_lock = threading.RLock()  # around look, open and lock


if TYPE_CHECKING:
    import sqlite3  # at run time by the first SqliteSpool

    _Key = tuple[int, int]  # device and inode


class _NotASpool(OSError):
    """What stands at the path is left exactly as it is."""


class _Row(bytes):
    """A log, and where it is on disk."""

    id: int
    file: _SpoolFile


class _SpoolFile:
    """A spool file that this process has locked, by SQLite's own exclusive lock."""

    def __init__(self, path: str, key: _Key, conn: sqlite3.Connection) -> None:
        self.path, self.key, self.conn = path, key, conn
        self.execute = conn.execute

    def number(self, sql: str) -> int:
        """Return the one number that a statement yields; 0 for NULL."""
        return int(self.execute(sql).fetchone()[0] or 0)

    def insert(self, first: int, bodies: Sequence[bytes]) -> None:
        """Commit rows from the id `first` on: all or none."""
        with self.conn:
            self.execute("BEGIN")
            self.conn.executemany(_SQL_INSERT, enumerate(bodies, first))

    def release(self, remove: bool = False) -> None:
        """Let others have the file; remove it first, or somebody might write to it in between."""
        with _files_lock:
            _held_files.discard(self.key)
            try:
                if remove:
                    self.execute("PRAGMA journal_mode = DELETE")  # ends the -wal
                    os.unlink(self.path)
            except PermissionError:  # Windows: an open file stays, empty
                pass
            finally:
                self.conn.close()


def _claim(path: str, spool: SqliteSpool, create: bool = False) -> _SpoolFile | None:
    """Return a file of ours, locked; None if anybody has it, we included, or it is not there.

    Raises:
        OSError, sqlite3.Error: it cannot be used.
    """
    with _files_lock:
        is_new = create and not os.path.lexists(path)
        if is_new:
            os.close(os.open(path, os.O_CREAT, 0o600))
        key = _identity(path)
        if key is None or key in _held_files:
            return None
        _check_is_ours(path)
        conn = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        # A cycle that no collector sees: a forked child's end would close it, and harm its parent.
        conn.create_function("keep", 0, conn.cursor)
        file = _SpoolFile(path, key, conn)
        try:
            _prepare(file, spool)
            if _identity(path) == key:  # else its owner has just removed it
                _held_files.add(key)
                return file
        except Exception as exc:
            if not isinstance(exc, sqlite3.OperationalError) or "locked" not in str(exc):
                if is_new:  # the disk is full: nothing is left behind
                    os.unlink(path)
                raise
        finally:
            if key not in _held_files:
                conn.close()
        return None


def _identity(path: str) -> _Key | None:
    """Return device and inode of a regular file of this user's; None where nothing is."""
    try:
        info = os.lstat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(info.st_mode) or info.st_uid != getattr(os, "getuid", int)():
        raise _NotASpool("is no regular file of this user's")
    return info.st_dev, info.st_ino


def _check_is_ours(path: str) -> None:
    """Refuse all but a file that is empty or has our application_id."""
    with open(path, "rb") as file:
        head = file.read(100)
    # What is shorter than a header is nobody's database, but ours and damaged.
    if not b"SQLite format 3\0".startswith(head[:16]) or head[68:72] not in (b"", _SPOOL_ID):
        raise _NotASpool("is there already, and is no spool")
    if head[63:64] > bytes([_SPOOL_VERSION]):
        raise _NotASpool("was made by a newer version of chirrop")


def _prepare(file: _SpoolFile, spool: SqliteSpool) -> None:
    """Lock the file, make the table where it is missing, set up the connection."""
    pages = spool.max_bytes // _PAGE_BYTES
    for statement in (
        f"PRAGMA page_size = {_PAGE_BYTES}",
        "PRAGMA locking_mode = EXCLUSIVE",
        "BEGIN EXCLUSIVE",
        "CREATE TABLE IF NOT EXISTS logs (id INTEGER PRIMARY KEY, body BLOB NOT NULL)",
        f"PRAGMA application_id = {int.from_bytes(_SPOOL_ID, 'big')}",
        f"PRAGMA user_version = {_SPOOL_VERSION}",
        "COMMIT",  # before WAL mode: the application_id could stand in the -wal alone
        "PRAGMA journal_mode = WAL",
        "PRAGMA wal_autocheckpoint = 0",  # tend() does it
        f"PRAGMA synchronous = {spool.synchronous}",
        f"PRAGMA max_page_count = {max(4, pages) if pages else 0xFFFFFFFE}",
    ):
        file.execute(statement).fetchall()


class SqliteSpool(_Unpicklable):
    """Keep logs in SQLite files until the server has taken them: a log survives its process.

    When `log()` returns, the log is committed (WAL mode): `kill -9` loses nothing, and the next
    client on this path sends what is left, under the same log_ids. Logs that it took and that are
    dropped for good are kept as dead letters, in PATH.dead.jsonl.

    Each client writes to a file of its own, the first of PATH, PATH.2, PATH.3 … that nobody has
    locked, so any number of processes may share a path on a local disk, and none waits for
    another. What a dead process left is taken over by the next that opens the path or is idle.

    A power loss may cost the commits of the last moments, since they are synced to the disk only
    now and then (SQLite's `synchronous=NORMAL`); "FULL" syncs each commit, at milliseconds a log.

    When a file cannot be used (disk full, read-only, not a spool), the client warns, keeps new
    logs in memory and tries again every 30 s. A damaged file is moved aside as
    PATH.damaged-TIME; anything that is not a spool is left as it is. Files are made with mode
    0600 and hold no key.

    Args:
        path: the first file; made when it does not exist, with the first log, flush or close.
        max_bytes: size in bytes of the client's file, and of that of the dead letters, at most;
            0 is no limit. At the limit `log()` raises ChirrOpQueueFullError and further dead
            letters are only reported. The -wal beside the file adds some 10 MB.
        synchronous: "NORMAL" or "FULL".
        required: the client's constructor raises ChirrOpError if the path cannot be used then.

    Raises:
        ChirrOpValidationError: a bad argument.
        ImportError: this Python has no sqlite3 module.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_bytes: int = 0,
        synchronous: Literal["NORMAL", "FULL"] = "NORMAL",
        required: bool = False,
    ) -> None:
        global sqlite3
        import sqlite3

        is_path = isinstance(path, (str, os.PathLike)) and os.fspath(path)
        _check(is_path, "path", "a file path", path)
        self.path = os.path.abspath(path)
        self._dead_letters = f"{self.path}.dead.jsonl"
        self.max_bytes = _integer("max_bytes", max_bytes)
        self.synchronous = _choice("synchronous", synchronous, ("NORMAL", "FULL"))
        self.required = required

    def dead_letters(self, remove: bool = False) -> list[_Object]:
        """Return the logs that were dropped for good: [{"error": text, "log": {…}}, …].

        They are the lines of PATH.dead.jsonl, which anybody may read at any time. Nothing sends
        them again by itself. Any thread; blocks while the file is read, and holds all of it.

        Args:
            remove: take them out of the way: the file is gone when this returns.

        Raises:
            OSError: there is a file, but it cannot be read or removed.
        """
        path = self._dead_letters
        try:
            if remove:
                path = f"{path}.{os.getpid()}"
                os.replace(self._dead_letters, path)
            with open(path, encoding="utf-8") as file:
                lines = file.readlines()
            if remove:
                os.unlink(path)
        except FileNotFoundError:
            return []
        letters = []
        for line in lines:
            try:
                letters.append(json.loads(line))
            except ValueError:  # blank, or cut short by a full disk
                pass
        return letters

    def _bury(self, logs: list[bytes], error: str) -> None:
        """Append dead letters, in one write; raises OSError."""
        text = json.dumps(error).encode()
        # The newline comes first: it ends what a full disk has cut short.
        lines = b"".join(b'\n{"error": %b, "log": %b}' % (text, log) for log in logs)
        opener = functools.partial(os.open, mode=0o600)
        with open(self._dead_letters, "ab", 0, opener=opener) as file:
            if not self.max_bytes or file.tell() + len(lines) <= self.max_bytes:
                file.write(lines)

    def _files(self) -> list[str]:
        """Return the paths of all files of this spool that there are."""
        folder, name = os.path.split(self.path)
        ours = re.compile(re.escape(name) + r"(\.[0-9]+)?")
        names = filter(ours.fullmatch, os.listdir(folder))
        return sorted(os.path.join(folder, name) for name in names)


class _SpoolBuffer(_MemoryBuffer):
    """The rows of the file that one client has, and behind them, in memory, what it cannot take."""

    is_durable = True
    _file: Any = None  # a _SpoolFile
    _last = _taken = 0  # ids of rows, no counts: of the last that was written, and taken
    _written = 0  # statements since the last checkpoint, and rows taken over
    _retry_at = 0.0  # when a file that failed is tried again; never, once closed

    def __init__(self, spool: SqliteSpool) -> None:
        super().__init__(spool)
        self.place = spool.path
        self._errors = (OSError, sqlite3.Error)

    def attach(self, delivery: _Delivery) -> None:
        self._lock, self._note, self._lose = delivery._lock, delivery.note, delivery.lose
        if self.spool.required and not self._open():
            raise ChirrOpError(f"cannot use the spool: {self._trouble}")

    def count(self) -> int:
        """Return how many logs wait; at most, where others removed rows or calls left holes."""
        return self._last - self._taken + self.waiting.qsize()

    def put(self, body: bytes) -> None:
        """Write a row; keep the log in memory where that cannot be done."""
        if self.waiting.empty() and (self._file or self._open()):
            try:
                self._last += 1  # first: a call that is interrupted leaves a hole
                self._file.execute(_SQL_INSERT, (self._last, body))
                self._written += 1
                return
            except sqlite3.Error as exc:
                self._last -= 1
                if self.spool.max_bytes and "full" in str(exc):
                    raise ChirrOpQueueFullError(f"the spool is full: {exc}") from None
                self._fail(exc)
        self.waiting.put(body)

    def take(self, most: int, into: list[bytes]) -> None:
        """Copy the oldest rows, which stay in the file, then move logs from memory."""
        if self._file and self._taken < self._last:
            last = self._last
            try:
                rows = self._file.execute(_SQL_SELECT, (self._taken, most)).fetchall()
            except self._errors as exc:
                self._fail(exc)
                return
            for number, body in rows:
                row = _Row(body)
                row.id, row.file = number, self._file
                into.append(row)
            most -= len(rows)
            self._taken = last if most else rows[-1][0]
        super().take(most, into)

    def settle(self, logs: list[bytes], error: str) -> None:
        """Delete the rows of logs that were delivered, or dropped: then they are dead letters."""
        rows: list[Any] = [log for log in logs if self._has(log)]
        try:
            if error:
                self.spool._bury(logs, error)
            if rows:  # a batch has all rows that there are between its first and its last
                self._file.execute(_SQL_DELETE, (rows[0].id, rows[-1].id))
                self._written += 1
        except self._errors as exc:
            self._fail(exc)

    # The file.

    def _has(self, log: bytes) -> bool:
        """Tell whether a log is a row of the file that is open now."""
        return isinstance(log, _Row) and log.file is self._file

    def _open(self) -> bool:
        """Take the first file that nobody has; False, and why is noted, where none can be used."""
        numbers = itertools.count(2)
        path = self.spool.path
        while not self._file and _now() >= self._retry_at:
            self.place = path
            try:
                file = _claim(path, self.spool, create=True)
                if file and not self._file:  # a log() that interrupts this may have opened one
                    self._last = file.number("SELECT max(id) FROM logs")
                    self._taken = file.number("SELECT min(id) - 1 FROM logs")
                    self._file = file
                path = f"{self.spool.path}.{next(numbers)}"
            except self._errors as exc:
                self._fail(exc)
        return self._file is not None

    def _fail(self, exc: Exception) -> None:
        """Note what a file's use has raised; move one that is damaged aside."""
        if type(exc) is sqlite3.DatabaseError:
            lost, self._last = self._last - self._taken, self._taken
            if self._file:
                self._file.release()
                self._file = None
            self._move_aside(self.place, exc, lost)
            return
        self._trouble = f"{self.place} {exc}"
        self._note(f"spool: {self._trouble}; logs wait in memory")
        self._retry_at = _now() + SPOOL_RETRY_SECONDS

    def _move_aside(self, path: str, exc: Exception, lost: int = 0) -> None:
        aside = f"{path}.damaged-{int(time.time())}"
        try:
            os.replace(path, aside)
            self._lose(lost, f"damaged spool file ({exc}), kept as {aside}")
        except OSError as trouble:
            self._fail(trouble)

    # What senders, and flush(), do for it now and then.

    def tend_at(self) -> float:
        """Return when to tend: soon after a change, else every few seconds."""
        if self._written >= _CHECKPOINT_AFTER:
            return 0.0
        return self.tended_at + (1.0 if self._written else 5.0)

    def tend(self) -> bool:
        """Without the lock: write memory and -wal back, take over left-overs; True if more."""
        is_drained = self._last == self._taken
        is_due = self._written >= (1 if is_drained else _CHECKPOINT_AFTER)
        if is_due:
            self._written = 0
            try:  # the -wal outside the lock, which leaves the checkpoint little to wait for
                with open(f"{self.place}-wal", "rb+") as wal:
                    os.fsync(wal.fileno())
            except OSError:
                pass  # the checkpoint will say so
        with self._lock:
            try:
                if self._open():
                    self._write_memory()
                    if is_due:
                        self._file.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
                    return _now() >= self.look_at and self._take_over()
            except self._errors as exc:
                self._fail(exc)
            return False

    def _write_memory(self) -> None:
        """Move the logs in memory to the file, behind others, when it is time to try it again."""
        if not self.waiting.empty() and _now() >= self._retry_at:
            logs: list[bytes] = []
            try:
                super().take(self.waiting.qsize(), logs)
                self._file.insert(self._last + 1, logs)
                self._last += len(logs)
            except BaseException:
                for log in logs:
                    self.waiting.put(log)
                raise

    def _take_over(self) -> bool:
        """Move some rows of a left-over into the own file, or remove it if it has none."""
        source, rows = self._left_over()
        if source is None:
            return False
        try:
            if rows:
                # Committed here first: a crash in between sends some twice, under the same log_id.
                first = self._last + 1
                self._last += len(rows)  # first: a log() that interrupts this comes behind
                self._file.insert(first, [body for _, body in rows])
                self._written += len(rows)
                source.execute(_SQL_DELETE, (rows[0][0], rows[-1][0]))
        finally:
            source.release(remove=not rows)
        return True

    def _left_over(self) -> tuple[Any, list[Any]]:
        """Return a file that nobody has, locked, and its first rows; or None and []."""
        for path in self.spool._files():
            source = None
            try:
                source = _claim(path, self.spool)  # None for the own file, too
                if source:
                    rows = source.execute(_SQL_SELECT, (-1, _MOVED_AT_ONCE)).fetchall()
                    if rows or path != self.spool.path:  # which stays
                        return source, rows
                    source.release()
            except self._errors as exc:
                if source:
                    source.release()
                if type(exc) is sqlite3.DatabaseError:
                    self._move_aside(path, exc)
                else:
                    self._note(f"spool: {path} {exc}")
        self.look_at = _now() + 5.0
        return None, []

    def close(self, held: list[bytes]) -> list[bytes]:
        """Close the file; return the logs that are not in it: those are lost."""
        rows = [log for log in held if self._has(log)]
        for log in held:
            if not self._has(log):
                self.waiting.put(log)
        if self._retry_at < _NEVER:  # not closed yet
            self._retry_at = 0.0
            try:
                if self._file or (not self.waiting.empty() and self._open()):
                    self._write_memory()
                    self._last, self._taken = self._file.number("SELECT count(*) FROM logs"), 0
                    if not self._last:
                        self._file.execute("VACUUM")
                    self._file.release(remove=not self._last and self.place != self.spool.path)
            except self._errors as exc:
                self._fail(exc)
                if self._file:
                    self._file.release()
        if self._file:  # not damaged: the rows that senders have are safe in it
            rows = []
        self._file, self._retry_at = None, _NEVER
        return super().close(rows)


# ---- Transport ------------------------------------------------------------
# In: one request. Out: (status, body, headers) of any status, or an OSError; of _Link an _Answer.
# One attempt, but for a kept connection that turns out to be dead; from any number of threads, no
# lock. The key goes out here alone, in a header, and is masked in headers and errors that return.


class _UrllibTransport:
    """The default transport: urllib.request with connections that are kept and verified TLS.

    urllib closes every connection after one answer; the handler in this opener keeps them, one for
    each request that was under way at once, and hands urllib a real response. Proxies come from
    the environment, else from the settings of Windows or macOS. There is no handler for redirects,
    files or FTP. A request with the header `Connection: close`, one that is not repeatable, gets a
    connection of its own, never a kept one: its fate must be clear.
    """

    _closed = False

    def __init__(self, ssl_context: Any = None) -> None:
        self._context = ssl_context
        # By process, scheme, host and tunnel: a forked child has none, and closes none of its
        # parent's.
        self._idle: dict[Any, list[Any]] = {}

    def __call__(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str], timeout: float
    ) -> tuple[int, bytes, Mapping[str, str]]:
        import http.client
        import urllib.request

        # The opener has handlers for http and https alone.
        request: Any = urllib.request.Request(url, body, dict(headers), method=method)  # noqa: S310
        request.connection = None  # set by _send
        is_whole = False
        try:
            with self._opener.open(request, timeout=timeout) as response:
                content = self._read(response)
            is_whole = response.status >= 200
        except http.client.HTTPException as exc:  # an IncompleteRead holds what was read
            raise ConnectionError(f"invalid answer: {exc!r:.200}") from None
        finally:
            if request.connection is not None:
                self._put_back(request, is_whole)
        return response.status, content, response.headers

    @functools.cached_property
    def _opener(self) -> Any:
        """Make the opener with the first request: urllib and ssl are imported no earlier."""
        import urllib.request

        class Handler(urllib.request.HTTPHandler):
            http_open = https_open = lambda _, request: self._exchange(request)
            https_request = urllib.request.HTTPHandler.http_request

        opener = urllib.request.OpenerDirector()
        opener.addheaders = [("User-Agent", f"chirrop-python/{__version__}")]
        opener.add_handler(urllib.request.ProxyHandler())
        opener.add_handler(Handler())
        return opener

    def _exchange(self, request: Any) -> Any:
        """Send on a kept connection if there is one; on a new one if that turns out to be dead."""
        import socket

        connection = self._kept(request)
        if connection is not None:
            try:
                return self._send(connection, request)
            except socket.timeout:
                raise
            except OSError:  # closed by the server between two requests, without an answer
                connection.close()
        return self._send(self._connect(request), request)

    @staticmethod
    def _send(connection: Any, request: Any) -> Any:
        """Return the response to a request, its body not read yet."""
        headers = dict(request.header_items())
        if request._tunnel_host:
            headers.pop("Proxy-authorization", None)  # it has gone to the proxy, with CONNECT
        request.connection = connection
        is_cut_off = False
        try:
            connection.request(request.get_method(), request.selector, request.data, headers)
        except (BrokenPipeError, ConnectionResetError):
            is_cut_off = True  # it stopped reading, perhaps after an answer such as 413
        response = connection.getresponse()
        if is_cut_off and response.status < 300:
            raise ConnectionError("an answer to half a request")
        return response

    @staticmethod
    def _read(response: Any) -> bytes:
        """Return an answer's body, if it is whole and no larger than MAX_ANSWER_BYTES."""
        length = getattr(response, "length", None)
        is_small = length is not None and length <= MAX_ANSWER_BYTES
        # Without a limit it notices that some is missing.
        content: bytes = response.read(None if is_small else MAX_ANSWER_BYTES + 1)
        if len(content) > MAX_ANSWER_BYTES:
            raise ConnectionError(f"the answer is larger than {MAX_ANSWER_BYTES} bytes")
        return content

    def _connect(self, request: Any) -> Any:
        """Return a new connection. A name's addresses have an equal part of `timeout` each."""
        import http.client
        import socket

        if request.type == "https":  # all that goes through a tunnel does
            self._context = self._context or _tls_context()
            connection: Any = http.client.HTTPSConnection(request.host, context=self._context)
        else:
            connection = http.client.HTTPConnection(request.host)
        try:
            found = socket.getaddrinfo(connection.host, connection.port, type=socket.SOCK_STREAM)
            connection.timeout = request.timeout / len(found)
            if request._tunnel_host:  # urllib has no public name for it
                pass_on = {k: v for k, v in request.headers.items() if k == "Proxy-authorization"}
                connection.set_tunnel(request._tunnel_host, headers=pass_on)
            connection.connect()
            connection.sock.settimeout(request.timeout)
            return connection
        except Exception as exc:
            connection.close()
            failure = ConnectionRefusedError(f"cannot connect to {request.host}: {exc}")
            raise failure from exc.with_traceback(None)  # which holds the socket

    def _kept(self, request: Any) -> Any:
        """Return a kept connection that looks alive, or None."""
        import selectors

        place = (os.getpid(), request.type, request.host, request._tunnel_host)
        request.idle = self._idle.setdefault(place, [])
        try:
            while not request.has_header("Connection"):
                connection = request.idle.pop()
                with selectors.DefaultSelector() as selector:
                    selector.register(connection.sock, selectors.EVENT_READ)
                    has_input = selector.select(0)  # the server closed it, or was never in step
                if not has_input:
                    connection.sock.settimeout(request.timeout)
                    return connection
                connection.close()
        except IndexError:
            pass
        return None

    def _put_back(self, request: Any, is_whole: bool) -> None:
        """Keep a connection whose answer was read to its end, if the server keeps it, too."""
        connection = request.connection
        is_shared = connection.sock is not None and not request.has_header("Connection")
        if is_whole and is_shared and not self._closed:
            request.idle.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Close the connections that are kept, but for those of a parent process."""
        self._closed = True
        for place in [place for place in self._idle if place[0] == os.getpid()]:
            for connection in self._idle.pop(place):
                connection.close()


def _tls_context() -> Any:
    import ssl

    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # 3.9 leaves it to OpenSSL
    return context


class _Link:
    """Make attempts through the configured transport: add the headers, return what happens."""

    def __init__(self, config: Config) -> None:
        if config.transport is None and not config.disabled:
            # In the caller's thread: a fork must not catch a sender in the middle of an import.
            import encodings.idna  # noqa: F401
            import logging  # noqa: F401
            import urllib.request  # noqa: F401
        self._transport = config.transport or _UrllibTransport(config.ssl_context)
        self._key = config.api_key

    def attempt(
        self, method: str, url: str, body: bytes | None, timeout: float, repeatable: bool = True
    ) -> _Answer:
        """Return the answer to one request; what the transport raises is no answer."""
        key = self._key
        headers = {"Authorization": _Secret(f"Bearer {key}"), "Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if not repeatable:
            headers["Connection"] = "close"
        try:
            status, content, fields = self._transport(method, url, body, headers, timeout)
            masked = {name.lower(): fields[name].replace(key, "***") for name in fields}
            answer = _Answer(int(status), bytes(content), masked, None, url)
        except Exception as exc:  # a transport may be the application's; its errors end no sender
            if key and key in str(exc):
                exc = ConnectionError(str(exc).replace(key, "***"))
            return _Answer(0, cause=exc.with_traceback(None))
        if 200 <= answer.status < 300:
            return answer
        # Some servers echo the key.
        body = answer.body[:MAX_ERROR_BYTES].replace(key.encode(), b"***")
        return answer._replace(body=body)

    def close(self) -> None:
        """Close what the default transport keeps; another one is its maker's to close."""
        if isinstance(self._transport, _UrllibTransport):
            self._transport.close()


# ---- Shapes ---------------------------------------------------------------
# What the control plane answers, and what takes a Config's fields, for type checkers alone: import
# them under `if TYPE_CHECKING:`. At run time they are plain dicts.

if TYPE_CHECKING:
    from typing_extensions import Concatenate, ParamSpec, Protocol  # checkers bring it along

    _P = ParamSpec("_P")
    _R = TypeVar("_R")

    class _Maker(Protocol[_P]):
        def __call__(
            self, config: Config | None = None, *args: _P.args, **fields: _P.kwargs
        ) -> Client: ...

    class Event(TypedDict):
        event_id: str
        event: str
        agent: Optional[str]
        title: str
        description: str
        unit: str
        timezone: Optional[str]
        public: bool
        share_token: str
        user_id: str
        created_at: str

    class Measured(TypedDict):
        agent: str
        event: str
        count: int
        value: float
        min: float
        max: float

    class Rollup(Measured):
        event_id: str
        period: Period
        occurred_at: str
        squares: float

    class AnalyticsData(TypedDict):
        current_value: float
        current_count: int
        previous_value: float
        previous_count: int
        value_delta: float
        count_delta: int
        value_pct_change: float
        count_pct_change: float
        current_mean: float
        previous_mean: float
        mean_delta: float
        mean_pct_change: float
        current_stddev: float
        previous_stddev: float

    class Analytics(TypedDict):
        event_id: str
        view: View
        period: Window
        previous: Previous
        data: Optional[AnalyticsData]

    class Rule(TypedDict):
        policy_id: str
        event_id: str
        title: str
        channel: str
        period: Period
        aggregate: Aggregate
        condition: Condition
        threshold: float
        severity: Severity

    class Policy(Rule):
        description: str
        enabled: bool

    class Alert(Rule, Measured):
        alert_id: str
        status: AlertStatus
        triggered_at: str
        acknowledged_at: Optional[str]
        resolved_at: Optional[str]

    class Delivery(TypedDict):
        attempt_id: str
        alert_id: str
        destination_id: str
        channel: Channel
        target: str
        status: Literal["sent", "failed"]
        response_status: Optional[int]
        error_message: Optional[str]
        created_at: str

    class Destination(TypedDict):
        destination_id: str
        channel: Channel
        url: str
        credentials: Optional[dict[str, Any]]
        scope: str
        policy_ids: list[str]
        enabled: bool
        created_at: str
        updated_at: str
        last_delivered_at: Optional[str]
        last_error: Optional[str]

    class TestResult(TypedDict, total=False):
        alert_id: str
        destination_id: str
        status: str


# ---- Client ---------------------------------------------------------------
# Events in: log, try_log, flush, close. Then the control plane: request(), and the calls that go
# through it. Runs in the caller's threads, any number of them at once, and holds no lock of its
# own; in a forked child a client starts anew by itself.

_A_LOG = "a Log of this copy of chirrop: log(chirrop.Log(event, value)), or try_log(event, value)"
_VOCABULARIES = {  # of the fields of payloads
    "policies.period": _PERIODS,
    "policies.aggregate": _AGGREGATES,
    "policies.condition": _CONDITIONS,
    "policies.severity": _SEVERITIES,
    "destinations.channel": _CHANNELS,
}


def _path(*segments: str) -> str:
    """Return a path below the servicer's base; ids are trimmed and encoded as one segment each.

    An empty one, and one of dots alone, is refused by request().
    """
    import urllib.parse

    _encode_json("id", segments)  # refuses lone surrogates
    return "".join("/" + urllib.parse.quote(_trimmed("id", each), safe="") for each in segments)


def _pages(fetch: Callable[[int], list[Any]]) -> Iterator[Any]:
    """Yield the items of all pages; ends at an empty one, since a server may cap the page size.

    A page equal to the one before comes from a server that ignores the offset: it ends there, too.
    """
    offset, last = 0, None
    while True:
        page = fetch(offset)
        if not page or page == last:
            return
        yield from page
        offset, last = offset + len(page), page


def _as_given(values: Sequence[object]) -> bytes:
    """Return arguments that make no Log as a JSON object, as near as it can come."""
    fields = {name: value for name, value in zip(_LOG_FIELDS, values) if value is not None}
    try:
        return json.dumps(fields, default=_show, skipkeys=True).encode()
    except Exception:  # a cycle; and the value's own methods may raise anything
        return json.dumps({name: _show(value) for name, value in fields.items()}).encode()


class Client(_Unpicklable):
    """Send logs in the background and make every control-plane call.

    Threads start with the first log, not with the client. A with block closes it at its end, and so
    does `async with`. A client that is collected without close() sends what it has.

    Control-plane methods block and raise as `request` does, which makes their calls; the routes in
    their docstrings are below `Config.servicer_endpoint`. They may be called from any thread, take
    ids as strings (the service's are UUIDs) and return parsed JSON.

    Args:
        config: a Config; None makes one from the environment.

    Raises:
        ChirrOpValidationError: there is no valid configuration.
    """

    _agent: str | None = None  # what bind() has set
    _meta: _Object = {}

    def __init__(self, config: Config | None = None) -> None:
        config = Config() if config is None else config
        rule = "a Config (a key is given as api_key=...)"
        _check(isinstance(config, Config), "config", rule, type(config))
        self.config = config
        self._timeout, self._servicer_retries = config.timeout, config.servicer_retries
        self._link = link = _Link(config)
        spool = config.spool
        buffer = _MemoryBuffer()
        if spool is not None and not config.disabled:
            if not isinstance(spool, SqliteSpool):  # which may be given to many clients
                spool = SqliteSpool(spool)
            buffer = _SpoolBuffer(spool)
        send = functools.partial(link.attempt, "POST", config.api_endpoint)
        self._delivery = _Delivery(buffer, send, config, link.close)  # no client: see finalize
        # Not at exit: there is a hook for all clients.
        weakref.finalize(self, self._delivery.abandon).atexit = False  # type: ignore[misc]

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"<chirrop.Client {self.config.api_endpoint} {self.stats()}>"

    # Events.

    def log(self, entry: Log, *misplaced: NoReturn) -> None:
        """Queue one log for sending and return at once; the network is not touched here.

        POST /v1.0/logs, later, from a sender thread. May be called from any thread, signal handler,
        finaliser or logging handler. With a spool the log is on disk when this returns. With a
        bounded queue that is full it waits up to `Config.timeout` seconds for room, and where no
        thread can be had it sends. After close() the log is dropped and reported.

        Args:
            entry: a Log, and nothing else.

        Raises:
            ChirrOpValidationError: `entry` is not a Log.
            ChirrOpQueueFullError: the bounded queue or the spool had no room in time.
        """
        if misplaced or not isinstance(entry, Log):
            raise _wrong("entry", _A_LOG, entry)
        if not self.config.disabled:
            self._delivery.put(entry._body)

    def try_log(
        self,
        event: str,
        value: float = 1,
        agent: str | None = None,
        log_id: object = None,
        meta: object = None,
        occurred_at: datetime | str | None = None,
    ) -> bool:
        """Make a Log and queue it like `log`, but drop and report one that cannot be taken.

        For error handlers, which must not fail for their telemetry. A log that breaks a rule
        ("invalid") or finds no room ("full") is counted as accepted and dropped, and reported like
        every drop: on_drop gets the arguments, with text in place of what JSON cannot hold.

        Args:
            event, value, agent, log_id, meta, occurred_at: as for Log; the value of most events is
                a count of 1.

        Returns:
            False if it was invalid or there was no room; nothing is raised for either.
        """
        if agent is None:
            agent = self._agent
        if self._meta and (meta is None or isinstance(meta, dict)):
            meta = {**self._meta, **(meta or {})}
        given = (event, value, agent, log_id, meta, occurred_at)
        try:
            self.log(Log(*given))
            return True
        except ChirrOpError as exc:
            reason = "invalid" if isinstance(exc, ChirrOpValidationError) else "full"
            self._delivery.refuse(reason, [_as_given(given)], exc)
            return False

    def flush(self, timeout: float | None = None) -> bool:
        """Send what was queued before this call, now, and wait for it.

        Neither `flush_delay` nor a backoff in progress is waited for. Blocks until each of those
        logs was delivered or dropped, or a batch of them has failed with no retries left, or the
        time is up. Logs queued meanwhile do not keep it waiting. Any thread. From on_drop it
        returns at once.

        Args:
            timeout: seconds, 0 to 86,400; None waits for the outcome: with the default retries and
                a dead server a minute or two, more where attempts time out or the server asks for
                pauses.

        Returns:
            True only if all of those logs were delivered. What was not stays queued.
        """
        _seconds("timeout", timeout or 0)
        return self._delivery.flush(timeout)

    def close(self, timeout: float | None = None) -> bool:
        """Flush, end the threads, close the connections; drop and report what is logged later.

        What could not be sent stays in the spool, or is dropped and reported ("closed"). Blocks
        like flush, and until no on_drop is under way; from on_drop it does not wait. Calling it
        again does nothing. Any thread.

        Args:
            timeout: seconds for the flush, 0 to 86,400; None is `Config.exit_timeout` with a spool,
                where nothing is lost by it, and in memory waits for the outcome, see flush.

        Returns:
            True only if everything was delivered.
        """
        _seconds("timeout", timeout or 0)
        if timeout is None and self.config.spool is not None:
            timeout = self.config.exit_timeout
        return self._delivery.close(timeout)

    shutdown = close

    async def aflush(self, timeout: float | None = None) -> bool:
        """Await flush() in asyncio's worker thread; cancelling the await leaves the logs queued."""
        import asyncio

        return await asyncio.to_thread(self.flush, timeout)

    async def aclose(self, timeout: float | None = None) -> bool:
        """Await close() in asyncio's worker thread; cancelling the await does not stop closing."""
        import asyncio

        return await asyncio.to_thread(self.close, timeout)

    def send_logs(self, entries: Iterable[Log] | Log) -> None:
        """Deliver logs now, in this thread, past the queue and the spool.

        POST /v1.0/logs, at most 250 per request. Blocks through up to `Config.retries` repeated
        attempts per request; a Retry-After of more than 30 s is not waited for, but raised. A
        disabled client discards them.

        Args:
            entries: Logs, or one. When a request fails, the ones before it were delivered and the
                ones after it not sent.

        Raises:
            ChirrOpValidationError: an entry is not a Log; nothing was sent.
            ChirrOpError: a request failed for good; see the subclasses.
        """
        given: Any = entries
        logs = list(given) if hasattr(given, "__iter__") else [given]
        for entry in logs:
            _check(isinstance(entry, Log), "entry", _A_LOG, entry)
        config = self.config
        if config.disabled:
            return
        sender = self.with_options(config.timeout, config.retries)
        for start in range(0, len(logs), MAX_BATCH):
            bodies = [entry._body for entry in logs[start : start + MAX_BATCH]]
            body = b"[" + b",".join(bodies) + b"]"
            sender._attempts("POST", config.api_endpoint, body, True)
            self._delivery.count_delivered(len(bodies))

    def stats(self) -> Stats:
        """Return the account of this client's logs at this moment; see Stats.

        Blocks for a moment at most: with a spool, while its file is written to.
        """
        return self._delivery.stats()

    def timer(self, event: str, agent: str | None = None, meta: _Object | None = None) -> _Timer:
        """Return a context manager and decorator that logs the elapsed milliseconds as `event`.

        `meta` gains "result": "success", or "error" when an exception passes through. Decorates
        plain and async functions; each call is measured on its own. Where the beginning and the end
        are in two places, like the hooks of a web framework, start() and stop() do the same. What
        cannot be logged is dropped and reported, as by try_log.

            with client.timer("task.duration_ms"): ...
            @client.timer("task.duration_ms", agent="worker")
            async def task(): ...
            timer = client.timer("request.duration_ms").start()
            timer.stop("error" if failed else "success")

        Args:
            event, agent: as for Log.
            meta: an object with at most 9 keys besides "result".

        Raises:
            ChirrOpValidationError: at once, not at the end of the measured block.
        """
        view = self.bind(agent, meta)
        Log(event, 0, view._agent, meta={**view._meta, "result": "success"})
        return _Timer(view, event)

    def lambda_handler(self, handler: _F) -> _F:
        """Decorate an AWS Lambda handler: flush before an invocation ends, in its remaining time.

        It returns at once when nothing is queued. What cannot be sent in time stays queued for the
        next invocation. The handler's result and errors pass through untouched. A server that does
        not answer costs each invocation `exit_timeout` seconds at most; 0.2 s of the remaining time
        are left for the return itself.
        """

        @functools.wraps(handler)
        def run(event: Any, context: Any = None) -> Any:
            try:
                return handler(event, context)
            finally:
                remaining = getattr(context, "get_remaining_time_in_millis", lambda: math.inf)
                left = float(remaining()) / 1000 - 0.2
                self.flush(max(0.0, min(self.config.exit_timeout, left)))

        return run  # type: ignore[return-value]

    # Views: they share queue, threads, connections and account with their client, and hold it.

    def bind(self, agent: str | None = None, meta: _Object | None = None) -> Client:
        """Return a view of this client whose try_log and timer start from an agent and a meta.

        The view shares everything else, and is closed when its client is. Views of views add up.

            orders = client.bind(agent="shop", meta={"region": "eu"})
            orders.try_log("order.created", meta={"plan": "pro"})

        Args:
            agent: for calls that give none (None, that is: "" is a log without an agent).
            meta: keys for the meta of each call, whose own keys win. A meta that is no object is
                sent as it is.

        Raises:
            ChirrOpValidationError: what Log would refuse; at once, not at the first call.
        """
        _check(meta is None or isinstance(meta, dict), "meta", "a dict", meta)
        view = self._view()
        view._meta = {**self._meta, **(meta or {})}
        if agent is not None:
            view._agent = agent
        Log("bind", 0, view._agent, meta=view._meta)
        return view

    def with_options(
        self, timeout: float | None = None, servicer_retries: int | None = None
    ) -> Client:
        """Return a view of this client whose control-plane calls have other limits.

        The view shares everything else: queue, threads, connections, account.

        Args:
            timeout: seconds for one attempt; None keeps the client's.
            servicer_retries: further attempts, from 0; None keeps the client's.
        """
        view = self._view()
        if timeout is not None:
            view._timeout = _seconds("timeout", timeout, 0.001)
        if servicer_retries is not None:
            view._servicer_retries = _integer("servicer_retries", servicer_retries)
        return view

    def _view(self) -> Client:
        view = Client.__new__(type(self))
        view.__dict__.update(self.__dict__, _viewed=self)  # a client in use is not collected
        return view

    # The control plane.

    def request(
        self, method: str, path: str, query: _Payload | None = None, body: object = None
    ) -> Any:
        """Make one control-plane call; every other method goes through this one.

        Blocks, in this thread, for `timeout` seconds or so per attempt, with up to
        `servicer_retries` further attempts. Reads, PUTs and alert transitions are repeated after a
        network failure, 408, 429, 502, 504 or another 5xx; any other call only on 429 or when no
        connection could be made, because what became of it is unknown.

        Args:
            method: e.g. "GET".
            path: below the servicer's base, e.g. "/events"; ASCII, already encoded, without query.
            query: parameters, text or numbers; None values are left out.
            body: anything JSON-encodable; None is no body.

        Returns:
            The parsed JSON of the answer; {} when it is empty.

        Raises:
            ChirrOpValidationError: an argument breaks a rule; nothing was sent.
            ChirrOpBadRequestError, ChirrOpUnauthorizedError, ChirrOpForbiddenError,
                ChirrOpNotFoundError, ChirrOpInternalServerError, ChirrOpServiceUnavailableError: by
                status; not repeated.
            ChirrOpRateLimitError, ChirrOpServerError, ChirrOpTransportError: all attempts failed,
                or one may not be repeated, or the server asks to wait for more than 30 s.
            ChirrOpError: the client is disabled and was given no api_key.
        """
        if not self.config.api_key:
            raise ChirrOpError("the client is disabled and has no key: see CHIRROP_DISABLED")
        import urllib.parse

        method, path = _trimmed("method", method).upper(), _trimmed("path", path).removeprefix("/")
        _check(method.isalpha(), "method", "an HTTP method", method)
        is_encoded = path == urllib.parse.quote(path, "/%:@!$&'()*+,;=", errors="replace")
        is_whole = {"", ".", ".."}.isdisjoint(path.split("/"))
        rule = "encoded, without a query and without empty, '.' or '..' segments"
        _check(is_encoded and is_whole, "path", rule, path)
        given = {name: value for name, value in (query or {}).items() if value is not None}
        url = f"{self.config.servicer_endpoint}/{path}?{urllib.parse.urlencode(given)}".rstrip("?")
        data = None if body is None else _encode_json("body", body)
        is_transition = path.endswith(("/acknowledge", "/resolve", "/archive"))
        is_repeatable = is_transition or method not in ("POST", "PATCH")
        answer = self._attempts(method, url, data, is_repeatable)
        try:
            return json.loads(answer.body.strip() or "{}")
        except (ValueError, RecursionError):  # which holds the whole answer
            raise ChirrOpTransportError(f"HTTP {answer.status}: the answer is not JSON") from None

    def _attempts(self, method: str, url: str, body: bytes | None, repeatable: bool) -> _Answer:
        """Return an answer that means success, after further attempts at need, or raise."""
        attempt = 0
        while True:
            attempt += 1
            answer = self._link.attempt(method, url, body, self._timeout, repeatable)
            verdict = _verdict(_CONTROL, answer)
            if verdict == _DELIVERED:
                return answer
            error = answer.error()
            is_unsent = isinstance(answer.cause, ConnectionRefusedError)
            is_safe = repeatable or answer.status == 429 or is_unsent
            is_long = (error.retry_after or 0) > MAX_SERVICER_WAIT
            if verdict != _RETRY or not is_safe or is_long or attempt > self._servicer_retries:
                raise error
            time.sleep(_backoff(attempt, error.retry_after, self._delivery._rand))

    def _save(self, method: str, path: str, payload: _Payload) -> Any:
        """Send a payload; its keys with a closed vocabulary are checked, others pass untouched."""
        _check(isinstance(payload, dict), "payload", "a dict", payload)
        for key, value in payload.items():
            allowed = _VOCABULARIES.get(f"{path.split('/')[1]}.{key}")
            if allowed:
                _choice(key, value, allowed)
        return self.request(method, path, body=payload)

    # Events, their logs and analytics.

    def list_events(self) -> list[Event]:
        """Return all event definitions: GET /v1.0/events."""
        return self.request("GET", "/events")

    def create_event(self, payload: _Payload) -> Event:
        """Create an event definition and return it; a log of a new event makes one, too.

        POST /v1.0/events

        Args:
            payload: Event fields: event, agent, title, description, unit, timezone, public.
        """
        return self._save("POST", "/events", payload)

    def get_event(self, event_id: str) -> Event:
        """Return one event definition: GET /v1.0/events/{event_id}."""
        return self.request("GET", _path("events", event_id))

    def update_event(self, event_id: str, payload: _Payload) -> Event:
        """Change an event definition and return it.

        PUT /v1.0/events/{event_id}

        Args:
            event_id: which one; an id in the payload has no say.
            payload: title, description, unit, timezone, public or agent.
        """
        return self._save("PUT", _path("events", event_id), payload)

    def find_event(self, event: str, agent: str | None = None) -> Event | None:
        """Return the definition with this name, or None.

        GET /v1.0/events

        Args:
            event: flat name, trimmed.
            agent: its agent; None: the definition without one, else the only one of that name.

        Raises:
            ChirrOpValidationError: no agent was given and several have an event of this name.
        """
        name, wanted = _trimmed("event", event), _trimmed("agent", agent or "")
        found = {e.get("agent") or "": e for e in self.list_events() if e.get("event") == name}
        if wanted or "" in found or not found:
            return found.get(wanted)
        rule = f"given, since several have an event {name!r}: {', '.join(found)}"
        _check(len(found) == 1, "agent", rule, agent)
        return found.popitem()[1]

    def get_event_logs(
        self, event_id: str, period: Period, limit: int | None = None, offset: int | None = None
    ) -> list[Rollup]:
        """Return an event's rollups: count, sum, sum of squares, min and max per bucket.

        GET /v1.0/events/{event_id}/logs

        Args:
            event_id: which event.
            period: "minute", "hour" or "day" (in the definition's time zone).
            limit: rollups at most, from 1; the service's default is 100.
            offset: rollups to skip, from 0.
        """
        query = {"period": _choice("period", period, _PERIODS), "limit": limit, "offset": offset}
        return self.request("GET", _path("events", event_id, "logs"), query)

    def iter_event_logs(
        self, event_id: str, period: Period, page_size: int = 100
    ) -> Iterator[Rollup]:
        """Yield all of an event's rollups, `page_size`, from 1, to a call of get_event_logs."""
        return _pages(lambda offset: self.get_event_logs(event_id, period, page_size, offset))

    def get_event_analytics(
        self,
        event_id: str,
        view: View = "window",
        period: Window = "1h",
        previous: Previous = "previous_window",
    ) -> Analytics:
        """Return an event's window that ends now, compared with an earlier one.

        GET /v1.0/events/{event_id}/analytics; `data` is None where neither has logs.

        Args:
            event_id: which event.
            view: "window".
            period: "1h", "1d", "7d" or "1m".
            previous: "previous_window", or what is longer than the period of "previous_1d",
                "previous_7d" and "previous_1m".
        """
        _choice("view", view, _VIEWS)
        _choice("period", period, _WINDOWS)
        _choice(f"previous of period {period}", previous, _ANALYTICS_PAIRS[period])
        query = {"view": view, "period": period, "previous": previous}
        return self.request("GET", _path("events", event_id, "analytics"), query)

    # Policies.

    def list_policies(self) -> list[Policy]:
        """Return all policies: GET /v1.0/policies."""
        return self.request("GET", "/policies")

    def create_policy(self, payload: _Payload) -> Policy:
        """Create a policy, a rule that raises alerts, and return it.

        POST /v1.0/policies

        Args:
            payload: Policy fields: event_id, period, aggregate, condition, threshold; and title,
                description, channel, severity, enabled.
        """
        return self._save("POST", "/policies", payload)

    def get_policy(self, policy_id: str) -> Policy:
        """Return one policy: GET /v1.0/policies/{policy_id}."""
        return self.request("GET", _path("policies", policy_id))

    def update_policy(self, policy_id: str, payload: _Payload) -> Policy:
        """Change a policy and return it: PUT /v1.0/policies/{policy_id}."""
        return self._save("PUT", _path("policies", policy_id), payload)

    # Alerts.

    def list_alerts(self, status: AlertStatus | None = None) -> list[Alert]:
        """Return all alerts, or those of one status.

        GET /v1.0/alerts

        Args:
            status: "triggered", "acknowledged", "resolved" or "archived".
        """
        if status is not None:
            _choice("status", status, _ALERT_STATUSES)
        return self.request("GET", "/alerts", {"status": status})

    def get_alert(self, alert_id: str) -> Alert:
        """Return one alert: GET /v1.0/alerts/{alert_id}."""
        return self.request("GET", _path("alerts", alert_id))

    def get_alert_deliveries(
        self,
        alert_id: str,
        limit: int | None = None,
        offset: int | None = None,
        *,
        kind: DeliveryKind | None = None,
    ) -> list[Delivery]:
        """Return the attempts to deliver an alert to its destinations.

        GET /v1.0/alerts/{alert_id}/deliveries

        Args:
            alert_id: which alert, or the alert_id that test_destination returned.
            limit: deliveries at most, from 1.
            offset: deliveries to skip, from 0.
            kind: "alert", "test" or "all"; None is real alerts.
        """
        if kind is not None:
            _choice("kind", kind, _DELIVERY_KINDS)
        query = {"kind": kind, "limit": limit, "offset": offset}
        return self.request("GET", _path("alerts", alert_id, "deliveries"), query)

    def iter_alert_deliveries(
        self, alert_id: str, kind: DeliveryKind | None = None, page_size: int = 100
    ) -> Iterator[Delivery]:
        """Yield all deliveries of an alert, `page_size`, from 1, to a get_alert_deliveries."""
        return _pages(
            lambda offset: self.get_alert_deliveries(alert_id, page_size, offset, kind=kind)
        )

    def acknowledge_alert(self, alert_id: str) -> Alert:
        """Mark an alert as seen and return it: POST /v1.0/alerts/{alert_id}/acknowledge."""
        return self.request("POST", _path("alerts", alert_id, "acknowledge"))

    def resolve_alert(self, alert_id: str) -> Alert:
        """Mark an alert as dealt with and return it: POST /v1.0/alerts/{alert_id}/resolve."""
        return self.request("POST", _path("alerts", alert_id, "resolve"))

    def archive_alert(self, alert_id: str) -> Alert:
        """Put an alert away and return it: POST /v1.0/alerts/{alert_id}/archive."""
        return self.request("POST", _path("alerts", alert_id, "archive"))

    # Destinations.

    def list_destinations(self) -> list[Destination]:
        """Return all destinations: GET /v1.0/destinations."""
        return self.request("GET", "/destinations")

    def create_destination(self, payload: _Payload) -> Destination:
        """Create a destination, a place that alerts are delivered to, and return it.

        POST /v1.0/destinations

        Args:
            payload: Destination fields: channel ("slack", "discord", "telegram", "email" or
                "webhook"); and url, credentials, scope, policy_ids, enabled, as the channel needs.
        """
        return self._save("POST", "/destinations", payload)

    def get_destination(self, destination_id: str) -> Destination:
        """Return one destination: GET /v1.0/destinations/{destination_id}."""
        return self.request("GET", _path("destinations", destination_id))

    def update_destination(self, destination_id: str, payload: _Payload) -> Destination:
        """Change a destination and return it: PUT /v1.0/destinations/{destination_id}."""
        return self._save("PUT", _path("destinations", destination_id), payload)

    def test_destination(self, destination_id: str) -> TestResult:
        """Send a test alert and return its ids and status; {} from some deployments.

        POST /v1.0/destinations/{destination_id}/test
        """
        return self.request("POST", _path("destinations", destination_id, "test"))


class _Timer:
    """Measure a block or the calls of a function; see Client.timer."""

    def __init__(self, view: Client, event: str) -> None:
        self._view, self._event = view, event
        self._starts: list[float] = []

    def start(self) -> _Timer:
        """Begin to measure, and return this timer; a start within a start has a stop of its own."""
        self._starts.append(time.perf_counter())
        return self

    def stop(self, result: str = "success") -> None:
        """Log the milliseconds since the last start(); do nothing when there is none to stop."""
        if self._starts:
            elapsed = round((time.perf_counter() - self._starts.pop()) * 1000, 3)
            self._view.try_log(self._event, elapsed, meta={"result": result})

    __enter__ = start

    def __exit__(self, kind: object, *_: object) -> None:
        self.stop("success" if kind is None else "error")

    def __call__(self, function: _F) -> _F:
        import inspect

        async def run_async(*args: Any, **kwargs: Any) -> Any:
            with _Timer(self._view, self._event):
                return await function(*args, **kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            with _Timer(self._view, self._event):
                return function(*args, **kwargs)

        wrap: Any = functools.wraps(function)
        return wrap(run_async if inspect.iscoroutinefunction(function) else run)


def _fields_of(config: Callable[_P, Config]) -> Callable[[Any], _Maker[_P]]:
    """Tell type checkers that a function takes a Config, or else what makes one."""
    return lambda make: make


@_fields_of(Config)
def new_client(config: Any = None, **fields: Any) -> Client:
    """Return a Client from a Config or its fields: new_client(api_key="chp_...", retries=3).

    Raises:
        ChirrOpValidationError: a field is wrong or unknown, or both a config and fields were given.
    """
    if fields and config is not None:
        raise ChirrOpValidationError("give either a Config or fields such as api_key=..., not both")
    try:
        return Client(Config(**fields) if fields else config)
    except TypeError as exc:
        raise ChirrOpValidationError(str(exc)) from exc


# ---- Global API -----------------------------------------------------------
# One client per process, for applications that have no place to keep it. No lock: a dict's
# setdefault and pop are atomic.

_slot: dict[str, Client] = {}  # empty, or {"client": ...}


def _of_client(method: Callable[Concatenate[Client, _P], _R]) -> Callable[_P, _R]:
    """Return a method of Client as a function that calls it on the global client."""

    @functools.wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        client = _slot.get("client")
        if client is None:
            raise ChirrOpError("ChirrOp SDK is not initialized. Please call initialize() first")
        return method(client, *args, **kwargs)

    return call


class ChirrOp:
    """The global client: initialize it once, log from anywhere, stop it at the end.

    All but initialize and stop raise ChirrOpError before initialize() and after stop().
    """

    log_event = staticmethod(_of_client(Client.log))
    try_log = staticmethod(_of_client(Client.try_log))
    flush = staticmethod(_of_client(Client.flush))

    @staticmethod
    @_fields_of(Config)
    def initialize(config: Any = None, **fields: Any) -> Client:
        """Make the global client and return it; arguments as for new_client.

        Raises:
            ChirrOpError: it exists already.
            ChirrOpValidationError: there is no valid configuration.
        """
        if not _slot:
            client = new_client(config, **fields)
            if _slot.setdefault("client", client) is client:
                return client
        raise ChirrOpError("ChirrOp SDK is already initialized: call stop() first")

    @staticmethod
    def stop(timeout: float | None = None) -> bool:
        """Close the global client and return what Client.close does; True if there is none."""
        client = _slot.pop("client", None)
        return client is None or client.close(timeout)


initialize, log_event, try_log = ChirrOp.initialize, ChirrOp.log_event, ChirrOp.try_log
flush, stop = ChirrOp.flush, ChirrOp.stop


# ---- Sandbox --------------------------------------------------------------
# In: requests, as any transport takes them. Out: the answers ChirrOp would give.
# Its rules are written from the service's contract and call none of the SDK's checks of a log, so
# that each can contradict the other. No thread, no socket (but for _serve_sandbox); one lock guards
# all state, and no scripted delay is waited for under it.

import operator  # noqa: E402  # like all that only the lower part needs

__all__ += ["Sandbox"]

if TYPE_CHECKING:
    _Record = dict[str, Any]
    _List = list[Any]

_SANDBOX_CODES = {400: "BAD_REQUEST", 401: "INVALID_TOKEN", 403: "FORBIDDEN"}
_SANDBOX_IDS = {"events": "event_id", "policies": "policy_id", "alerts": "alert_id",
                "destinations": "destination_id"}  # fmt: skip
_SANDBOX_FIELDS = {  # what a client may set; what is shown
    "events": "event agent title description unit timezone public",
    "policies": "event_id title description channel period aggregate condition threshold severity"
    " enabled",
    "destinations": "channel url credentials scope policy_ids enabled",
    "rollup": "event_id agent event period occurred_at count value squares min max",
    "alert": "alert_id policy_id event_id agent event title channel period aggregate condition"
    " threshold severity status value count min max triggered_at acknowledged_at resolved_at",
}
_SANDBOX_RULES = {  # what is no string
    "period": _PERIODS, "aggregate": _AGGREGATES, "condition": _CONDITIONS, "threshold": float,
    "severity": _SEVERITIES, "enabled": bool, "public": bool, "credentials": dict,
    "policy_ids": list}  # fmt: skip
_SANDBOX_DEFAULTS = {  # else ""; for these, "" means that a client in Go did not set them
    "event_id": "", "timezone": "UTC", "public": False, "channel": "ops", "severity": "warning",
    "enabled": True, "credentials": None, "scope": "all", "policy_ids": []}  # fmt: skip
_SANDBOX_SECONDS = {"minute": 60, "hour": 3600, "1h": 3600, "1d": 86400, "7d": 604800,
                    "1m": 2592000}  # fmt: skip


def _need(good: object, text: str, status: int = 400) -> None:
    if not good:
        raise ChirrOpError(text, status_code=status)


def _fitting(given: Any, name: str, rule: Any) -> Any:
    """Return what is given as `name`: one of a vocabulary, a finite number, or of a type."""
    value = given.get(name)
    if isinstance(rule, tuple):
        good = value in rule
    elif rule is float:
        good = type(value) in (int, float) and abs(value) <= _LARGEST
    else:
        good = isinstance(value, rule)
    _need(good, f"{name} must fit {getattr(rule, '__name__', rule)}, got {_show(value)}")
    return value


def _sandbox_error(status: int, text: str) -> _Record:
    return {"error": {"code": _SANDBOX_CODES.get(status, "ERROR"), "message": text}}


def _sandbox_id(name: str, text: str) -> str:
    form = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    _need(re.fullmatch(form, text.lower()), f"{name} must be a UUID, got {_show(text)}")
    return text.lower()


def _sandbox_log(given: Any) -> _Record:
    """Return a log as it is kept: a rule a line, each from the contract."""
    _need(isinstance(given, dict), "a log must be an object")
    new_id, now = _mint(time.time())
    log: _Record = {"event": "", "agent": "", "log_id": "", "occurred_at": now}
    log.update((name, given[name]) for name in _LOG_FIELDS if given.get(name) is not None)
    for name in ("event", "agent", "log_id"):
        log[name] = _fitting(log, name, str).strip()
    _need(log["event"], "event is required")
    _fitting(log, "value", float)
    log["log_id"] = _sandbox_id("log_id", log["log_id"] or new_id)
    meta = log.get("meta")
    _need(type(meta) is not dict or len(meta) <= 10, "meta must have at most 10 top-level keys")
    _need(len(_encode_text(meta).encode()) <= 1024, "meta must encode to at most 1024 bytes")
    given = _fitting(log, "occurred_at", str).replace("0001-01-01T00:00:00Z", now)  # unset, in Go
    at = _parse_time(given)
    log["occurred_at"], age = _iso(at), time.time() - at.timestamp()
    _need(-86400 <= age <= 30 * 86400, "occurred_at must lie in the last 30 days or 1 day ahead")
    return log


def _sandbox_page(items: _List, query: Any) -> _List:
    limit, offset = query.get("limit", "100"), query.get("offset", "0")
    _need(f"{limit}{offset}".isdecimal(), "limit and offset must be non-negative integers")
    return items[int(offset) : int(offset) + int(limit)]


def _sandbox_zone(name: str) -> Any:
    import zoneinfo

    if name == "UTC":  # must work where there is no time zone database
        return timezone.utc
    try:
        return zoneinfo.ZoneInfo(name)
    except Exception as exc:  # there are several
        raise ChirrOpValidationError("timezone must be a known IANA name") from exc


def _sandbox_start(at: float, period: str, event: _Record) -> float:
    """Return the start of the bucket that `at` falls in; days are those of the event's zone."""
    if period != "day":
        return at - at % _SANDBOX_SECONDS[period]
    day = datetime.fromtimestamp(at, _sandbox_zone(event["timezone"]))
    return datetime(day.year, day.month, day.day, tzinfo=day.tzinfo).timestamp()


def _sandbox_figures(values: _List) -> _Record:
    """Return what rollups show of these values, and what policies and analytics make of it."""
    total, squares = sum(values), sum(value * value for value in values)
    count = len(values) or 1
    mean = total / count
    stddev = math.sqrt(max(0.0, squares / count - mean * mean))
    return {
        "count": len(values), "value": total, "squares": squares, "min": min(values, default=0),
        "max": max(values, default=0), "sum": total, "average": mean, "stddev": stddev,
        "p95_est": mean + 1.645 * stddev, "p99_est": mean + 2.326 * stddev,
    }  # fmt: skip


def _sandbox_shown(shape: str, record: _Record) -> _Record:
    return {name: record.get(name) for name in _SANDBOX_FIELDS[shape].split()}


class Sandbox:
    """An in-memory ChirrOp that is itself a transport: `new_client(..., transport=Sandbox())`.

    It refuses what ChirrOp refuses, and takes any key that starts with "chp_". Each request that
    brings logs evaluates every enabled policy for the newest bucket of its event: one alert a
    bucket. Nothing is ever sent to a destination: a delivery is recorded, and says so in its
    `error_message`. Rollups come newest first, other lists oldest first. The time is that of
    time.time(). Thread-safe.

    `requests` is a list of all requests: dicts of `method`, `path`, `query`, `body`, and `status`
    (0: no answer).
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()  # guards all that reset() makes
        self.reset()

    def reset(self) -> None:
        """Forget everything: logs, requests, resources, faults, predicates."""
        with self._lock:
            self.requests: _List = []
            self._logs: _Record = {}  # by log_id
            self._faults: _List = []
            self._poison: _List = []  # predicates
            self._stores: Any = {kind: {} for kind in _SANDBOX_IDS}  # of dicts by id
            self._points: _List = []  # event_id, time and value of each log
            self._judged: _List = []  # policy and bucket of each alert
            self._attempts: _List = []  # deliveries

    @property
    def logs(self) -> list[_Record]:
        """The logs accepted so far; of several with one `log_id`, the first."""
        return [*self._logs.values()]

    def fail(
        self, times: float | None = 1, *, status: int | None = None, retry_after: object = None,
        drop: str | None = None, delay: float = 0.0, path: str = "", body: Any = None,
    ) -> None:  # fmt: skip
        """Script a fault for the next requests; the oldest fault that fits comes first.

        Args:
            times: how many requests it meets; None: all, until reset().
            status: what to answer; without any other fault 502, or 429 with `retry_after`.
            retry_after: seconds or an HTTP date, a header of that answer.
            drop: break the connection "before" or "after" the request took effect.
            delay: seconds to wait first; the request's timeout or more is a TimeoutError.
            path: only requests whose path ends so.
            body: text or JSON data of that answer; default: an error.
        """
        if not (status or drop or delay):
            status = 502 if retry_after is None else 429
        if status and body is None:
            body = _sandbox_error(status, f"scripted {status}")
        if times is None:
            times = math.inf
        extra = {} if retry_after is None else {"Retry-After": str(retry_after)}
        then = status, body, extra, drop, delay
        self._faults.append({"times": times, "path": path, "then": then})

    def reject(self, predicate: Callable[[_Record], object]) -> None:
        """Answer 400 to each request that holds a log for which `predicate` is true."""
        self._poison.append(predicate)

    def __call__(
        self, method: str, url: str, body: bytes | None, headers: Any, timeout: float
    ) -> tuple[int, bytes, _Record]:
        """Answer one request; ConnectionResetError and TimeoutError only as scripted."""
        from urllib.parse import parse_qsl, urlsplit

        parts = urlsplit(url)
        try:
            parsed = json.loads((body or b"null").decode())
            _encode_json("body", parsed)  # json.loads() takes NaN and lone surrogates
        except Exception:
            parsed = "no JSON"  # which no handler takes
        request: _Record = {
            "method": method, "path": parts.path, "query": dict(parse_qsl(parts.query)),
            "body": parsed, "status": 0,
        }  # fmt: skip
        with self._lock:
            self.requests.append(request)
            fits = (f for f in self._faults if f["times"] > 0 and parts.path.endswith(f["path"]))
            fault: Any = next(fits, {"times": 1, "then": (None, None, {}, None, 0.0)})
            fault["times"] -= 1
        status, content, extra, drop, delay = fault["then"]
        time.sleep(min(delay, timeout))
        if delay >= timeout:
            raise TimeoutError("timed out, as scripted")
        if not status and drop != "before":
            status, content = self._answer(request, headers)
        if drop:
            raise ConnectionResetError("connection dropped, as scripted")
        request["status"] = status
        if not isinstance(content, str):
            content = json.dumps(content)
        return status, content.encode(), {"Content-Type": "application/json", **extra}

    def _answer(self, request: Any, headers: Any) -> Any:
        method, route = request["method"], request["path"].partition("/v1.0/")[2]
        key = re.fullmatch("(?i:bearer) chp_.+", headers.get("Authorization", ""))
        handler: Any = self._ROUTES.get(f"{method} {re.sub('/[^/]*', '/*', route, count=1)}")
        given = request["query" if method == "GET" else "body"]
        try:
            _need(key, "invalid API key", 401)
            _need(handler, f"no such route: {method} {request['path']}", 404)
            with self._lock:
                return 200, handler(self, route.split("/"), given)
        except ChirrOpError as exc:
            status = exc.status_code or 400
            return status, _sandbox_error(status, str(exc))

    # Handlers take the path after /v1.0/ in segments, and the query of a GET or the parsed body.
    def _ingest(self, _: _List, body: Any) -> str:
        _need(isinstance(body, list), "body must be a JSON array of logs")
        _need(0 < len(body) <= 250, f"a request must hold 1 to 250 logs, got {len(body)}")
        logs = [_sandbox_log(given) for given in body]
        for log, predicate in itertools.product(logs, self._poison):
            _need(not predicate(log), f"log_id {log['log_id']} was rejected")
        for log in logs:
            if self._logs.setdefault(log["log_id"], log) is log:
                event = self._event(log) or self._save(["events"], log)
                at = _parse_time(log["occurred_at"]).timestamp()
                self._points.append((event["event_id"], at, float(log["value"])))
        for policy in self._stores["policies"].values():
            if policy["enabled"]:
                self._judge(policy)
        return ""

    def _event(self, named: _Record) -> Any:
        for event in self._stores["events"].values():
            if (event["agent"], event["event"]) == (named["agent"], named["event"]):
                return event
        return None

    def _buckets(self, event: _Record, period: str) -> _List:
        """Return all about each bucket of an event, the newest first."""
        values: Any = {}
        for event_id, at, value in self._points:
            if event_id == event["event_id"]:
                values.setdefault(_sandbox_start(at, period, event), []).append(value)
        buckets = []
        for start in sorted(values, reverse=True):
            figures = _sandbox_figures(values[start])
            at = _iso(datetime.fromtimestamp(start, timezone.utc))
            buckets.append({**event, **figures, "period": period, "occurred_at": at})
        return buckets

    def _judge(self, policy: _Record) -> None:
        event = self._stores["events"][policy["event_id"]]
        holds = getattr(operator, policy["condition"].replace("te", "e"))  # "gte" is operator.ge
        for bucket in self._buckets(event, policy["period"])[:1]:
            value = bucket[policy["aggregate"]]
            mark = f"{policy['policy_id']} {bucket['occurred_at']}"
            if mark in self._judged or not holds(value, policy["threshold"]):
                continue
            self._judged.append(mark)
            alert_id, now = _mint(time.time())
            alert = {
                **bucket, **policy, "alert_id": alert_id, "status": "triggered", "value": value,
                "triggered_at": now,
            }  # fmt: skip
            self._stores["alerts"][alert_id] = _sandbox_shown("alert", alert)
            for destination in self._stores["destinations"].values():
                meant = policy["policy_id"] in destination["policy_ids"]
                if destination["enabled"] and (meant or destination["scope"] == "all"):
                    self._deliver(alert_id, destination)

    def _deliver(self, alert_id: str, destination: _Record) -> None:
        attempt_id, now = _mint(time.time())
        destination["last_delivered_at"] = now
        self._attempts.append({
            "attempt_id": attempt_id, "alert_id": alert_id,
            "destination_id": destination["destination_id"], "channel": destination["channel"],
            "target": destination["url"], "status": "sent", "response_status": None,
            "error_message": "recorded only: a sandbox sends nothing", "created_at": now,
        })  # fmt: skip

    def _find(self, path: _List, _: Any = None) -> Any:
        name = _SANDBOX_IDS[path[0]]
        record = self._stores[path[0]].get(_sandbox_id(name, path[1]))
        _need(record, f"{name} {path[1]} is unknown", 404)
        return record

    def _list(self, path: _List, query: Any) -> _List:
        rows = [*self._stores[path[0]].values()]
        if path == ["alerts"] and "status" in query:
            status = _fitting(query, "status", _ALERT_STATUSES)
            rows = [alert for alert in rows if alert["status"] == status]
        return rows

    def _save(self, path: _List, given: Any) -> _Record:
        """Create or change a resource; a refusal leaves everything as it was."""
        kind, id_name = path[0], _SANDBOX_IDS[path[0]]
        new_id, now = _mint(time.time())
        new = {**self._find(path)} if path[1:] else {id_name: new_id}
        _need(isinstance(given, dict), "body must be a JSON object")
        for name in _SANDBOX_FIELDS[kind].split():
            value, rule = given.get(name), _SANDBOX_RULES.get(name, str)
            unset = value == "" and (rule is not str or name in _SANDBOX_DEFAULTS)
            if value is None or unset:
                value = new.get(name, _SANDBOX_DEFAULTS.get(name, ""))
            if value is not None:
                _fitting({name: value}, name, rule)
            new[name] = value
        self._complete(kind, new, now)
        self._stores[kind][new[id_name]] = new
        return new

    def _complete(self, kind: str, new: _Record, now: str) -> None:
        """Check what each kind asks of its fields, and fill in those that no client sets."""
        if kind == "events":
            before = self._stores[kind].get(new["event_id"])
            new["event"] = (before or new)["event"].strip()
            _need(new["event"], "event is required")
            _sandbox_zone(new["timezone"])
            _need(self._event(new) in (None, before), "agent and event are defined already", 422)
            new.setdefault("share_token", _mint(time.time())[0])
            new.setdefault("user_id", "00000000-0000-4000-8000-000000000001")
            new.setdefault("created_at", now)
        elif kind == "policies":
            new["event_id"] = _sandbox_id("event_id", new["event_id"])
            _need(new["event_id"] in self._stores["events"], "event_id is unknown", 422)
        else:
            channel, credentials = _fitting(new, "channel", _CHANNELS), new["credentials"] or {}
            if channel == "telegram":
                good = credentials.get("bot_token") and credentials.get("chat_id")
                _need(good, "a telegram destination needs bot_token and chat_id")
            elif channel != "email":
                good = re.match("https?://[^/]", new["url"])
                _need(good, f"a {channel} destination needs an absolute http(s) url")
            new.setdefault("created_at", now)
            new.setdefault("last_delivered_at")
            new.setdefault("last_error")
            new["updated_at"] = now

    def _rollups(self, path: _List, query: Any) -> _List:
        event, period = self._find(path), _fitting(query, "period", _PERIODS)
        rows = [_sandbox_shown("rollup", bucket) for bucket in self._buckets(event, period)]
        return _sandbox_page(rows, query)

    def _analytics(self, path: _List, query: Any) -> _Record:
        event_id, now = self._find(path)["event_id"], time.time()
        _fitting(query, "view", _VIEWS)
        period = _fitting(query, "period", _WINDOWS)
        previous = _fitting(query, "previous", _ANALYTICS_PAIRS[period])
        span = _SANDBOX_SECONDS[period]
        shift = _SANDBOX_SECONDS.get(previous[9:], span)
        data: Any = {}
        for when, end in (("current", now), ("previous", now - shift)):
            points = [p for p in self._points if p[0] == event_id and 0 <= end - p[1] < span]
            seen = _sandbox_figures([value for _, _, value in points])
            for name in ("value", "count", "average", "stddev"):
                data[f"{when}_{name.replace('average', 'mean')}"] = seen[name]
        for name in ("value", "count", "mean"):
            before = data[f"previous_{name}"]
            delta = data[f"{name}_delta"] = data[f"current_{name}"] - before
            data[f"{name}_pct_change"] = delta / (abs(before) or math.inf) * 100
        if not any(data.values()):
            data = None
        return {**query, "event_id": event_id, "data": data}

    def _move_alert(self, path: _List, _: Any) -> Any:
        alert, status = self._find(path), path[2] + "d"  # acknowledge, resolve, archive
        order = _ALERT_STATUSES.index
        _need(order(alert["status"]) <= order(status), f"it is {alert['status']} already", 422)
        alert["status"] = status
        if alert.get(f"{status}_at", "") is None:  # repeating a step changes nothing
            alert[f"{status}_at"] = _mint(time.time())[1]
        return alert

    def _deliveries(self, path: _List, query: Any) -> _List:
        wanted = _fitting({"kind": "alert", **query}, "kind", _DELIVERY_KINDS)
        rows = [row for row in self._attempts if row["alert_id"] == path[1]]
        if not rows:  # the alert of a test is known by its attempt alone
            self._find(path)
        kind = "alert" if path[1] in self._stores["alerts"] else "test"
        return _sandbox_page(rows if wanted in (kind, "all") else [], query)

    def _test(self, path: _List, _: Any) -> _Record:
        destination, alert_id = self._find(path), _mint(time.time())[0]
        self._deliver(alert_id, destination)
        return {"alert_id": alert_id, "destination_id": path[1], "status": "sent"}

    _ROUTES = {
        "POST logs": _ingest, "GET events": _list, "POST events": _save, "GET events/*": _find,
        "PUT events/*": _save, "GET events/*/logs": _rollups, "GET events/*/analytics": _analytics,
        "GET policies": _list, "POST policies": _save, "GET policies/*": _find,
        "PUT policies/*": _save, "GET destinations": _list, "POST destinations": _save,
        "GET destinations/*": _find, "PUT destinations/*": _save, "POST destinations/*/test": _test,
        "GET alerts": _list, "GET alerts/*": _find, "GET alerts/*/deliveries": _deliveries,
        "POST alerts/*/acknowledge": _move_alert, "POST alerts/*/resolve": _move_alert,
        "POST alerts/*/archive": _move_alert,
    }  # fmt: skip


def _serve_sandbox(sandbox: Sandbox, host: str = "127.0.0.1", port: int = 0) -> Any:
    """Return an HTTP server, not running yet, that answers as `sandbox`, and 200 to /health."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # an answer is two writes

        def handle(self) -> None:
            try:
                super().handle()
            except (OSError, ValueError):  # scripted, hung up, or of no clear length: no answer
                pass

        def log_message(self, *args: object) -> None:
            pass

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", "0")))
            chunks, size = [], 1
            while size:
                size = int(self.rfile.readline().partition(b";")[0], 16)
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            return b"".join(chunks)

        def answer(self) -> None:
            body = self.body()
            answer = 200, b"", {"Allow": "GET, HEAD, OPTIONS, POST, PUT"}
            if self.command != "OPTIONS" and self.path != "/health":
                method, url = self.command.replace("HEAD", "GET"), "http://sandbox" + self.path
                answer = sandbox(method, url, body, self.headers, math.inf)
            self.send_response(answer[0])
            for name, value in {**answer[2], "Content-Length": str(len(answer[1]))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer[1])

        do_GET = do_HEAD = do_POST = do_PUT = do_OPTIONS = do_DELETE = answer  # noqa: N815

    return ThreadingHTTPServer((host, port), Handler)


# ---- Command line ---------------------------------------------------------
# In: arguments, standard input, CHIRROP_* and ./.env. Out: results on standard output, all else on
# standard error; exit status 0, 1 (failed or interrupted) or 2 (usage, configuration). Importing
# runs nothing of it. One thread of its own keeps the progress line; no lock.


def _width(text: str) -> int:
    """Return how many columns of a terminal printable text takes: wide characters are two."""
    import unicodedata

    return len(text) + sum(unicodedata.east_asian_width(char) in "WF" for char in text)


def _fit(text: str, room: int) -> str:
    """Return text cut or padded to `room` columns."""
    while _width(text) > room:
        text = text[:-1]
    return text + " " * (room - _width(text))


def _columns() -> int:
    import shutil

    return shutil.get_terminal_size().columns or 80


def _figure(value: Any) -> str:
    """Return a number as people write it, and anything else as plain text; "" for None."""
    if isinstance(value, (int, float)):
        return f"{round(value, 2 if abs(value) >= 1 else 6):,.15g}"
    return _printable(str(value or ""))


def _table(heads: Sequence[str], rows: Iterable[Iterable[Any]]) -> Iterator[str]:
    """Yield a table's lines, cut at the edge of a terminal."""
    cells = [heads, *(list(map(_figure, row)) for row in rows)]
    widths = [max(map(_width, column)) for column in zip(*cells)]
    for row in cells:
        line = "  ".join(map(_fit, row, widths))
        if sys.stdout.isatty():
            line = _fit(line, _columns())
        yield line.rstrip()


def _result(args: Any, value: object, lines: Iterable[str], failed: bool = False) -> int:
    """Print a command's result, as JSON for machines or in lines; return the exit status."""
    for line in [json.dumps(value, indent=2)] if args.json else lines:
        print(line, flush=True)
    return int(failed)


def _status(text: str) -> None:
    """Replace the progress line, where standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"\r{_fit(text, _columns() - 1)}\r", end="", file=sys.stderr, flush=True)


def _say(what: object) -> None:
    """Print a message or an error on standard error, in the place of the progress line."""
    text = _printable(str(what))
    if isinstance(what, (ChirrOpNotFoundError, ChirrOpTransportError)):
        text += "; `chirrop doctor` tests CHIRROP_API_ENDPOINT and CHIRROP_SERVICER_ENDPOINT"
    _status("")
    print(f"chirrop: {text}", file=sys.stderr, flush=True)


def _client(args: Any, **fields: Any) -> Client:
    """Return a client whose failures are told by the commands, and not by log records."""
    fields |= {"retries": args.retries, "servicer_retries": args.retries, "log_level": "CRITICAL"}
    return new_client(disabled=False, **fields)  # whatever CHIRROP_DISABLED says


def _event_of(client: Client, args: Any) -> Event:
    event = client.find_event(args.event, args.agent)
    if event is None:
        raise ChirrOpError("no such event, or none without --agent: `chirrop events` lists them")
    return event


def _cmd_events(args: Any) -> int:
    events, heads = _client(args).list_events(), ("event_id", "agent", "event", "unit", "title")
    return _result(args, events, _table(heads, (map(event.get, heads) for event in events)))


def _cmd_rollups(args: Any) -> int:
    client = _client(args)
    event = _event_of(client, args)
    rollups = client.get_event_logs(event["event_id"], args.period, args.limit)
    return _result(args, rollups, _chart(event, args.period, rollups))


def _chart(event: Event, period: str, rollups: list[Rollup]) -> Iterator[str]:
    """Yield a line for each bucket, the oldest first, with bars as long as the sums."""
    zone = event.get("timezone") or "UTC"
    yield _figure(f"{event.get('agent') or '-'} {event['event']}: by {period}, in {zone}")
    buckets = sorted((r["occurred_at"], r["count"], r["value"]) for r in rollups)
    peak = max([1e-9, *(abs(value) for _, _, value in buckets)])
    rows = []
    for start, count, value in buckets:
        at = _parse_time(start).astimezone(_sandbox_zone(zone))
        bar = "#" * math.ceil(abs(value) / peak * (_columns() - 30))
        rows.append((f"{at:%m-%d %H:%M}", count, value, bar))
    yield from _table(("start", "count", "sum", ""), rows)


def _cmd_analytics(args: Any) -> int:
    client = _client(args)
    event_id = _event_of(client, args)["event_id"]
    answer = client.get_event_analytics(event_id, "window", args.period, args.previous)
    return _result(args, answer, _table((args.period, "value"), (answer["data"] or {}).items()))


def _cmd_alerts(args: Any) -> int:
    client = _client(args)
    if args.action:
        verb = {"ack": "acknowledge"}.get(args.action, args.action)
        alerts = [getattr(client, f"{verb}_alert")(args.id)]
    else:
        alerts = client.list_alerts(args.status)
    heads = ("alert_id", "status", "severity", "agent", "event", "value", "triggered_at", "title")
    return _result(args, alerts, _table(heads, (map(alert.get, heads) for alert in alerts)))


def _cmd_api(args: Any) -> int:
    import urllib.parse

    path, _, query = args.path.removeprefix("/v1.0").partition("?")
    pairs = dict(urllib.parse.parse_qsl(query))
    print(json.dumps(_client(args).request(args.method, path, pairs, args.data), indent=2))
    return 0


def _deliver(client: Client, logs: Iterable[Log], spool: str | None = None) -> bool:
    """Send logs, and what waits, for as long as anything moves; close; tell failures, what is left.

    Meanwhile a thread keeps a line about it on standard error, where that is a terminal.
    """
    end, begun = threading.Event(), time.monotonic()

    def watch() -> None:
        while sys.stderr.isatty() and not end.wait(0.1):
            stats = client.stats()
            rate = f"{stats.delivered / (time.monotonic() - begun):,.0f}/s"
            waiting = f"{stats.queued + stats.in_flight:,} waiting"
            _status(f"{stats.delivered:,} delivered, {rate}, {waiting} {stats.last_error or ''}")

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    delivered = -1
    try:
        for entry in logs:
            client.log(entry)
            if "refused" in client.stats().dropped:  # so would the others be
                break
        while client.stats().delivered > delivered:
            delivered = client.stats().delivered
            client.flush()
    except (ChirrOpQueueFullError, KeyboardInterrupt) as exc:
        _say(f"stopped: {str(exc) or 'interrupted'}")
    finally:
        clean = client.close(2.0)
        end.set()
        watcher.join()
    stats = client.stats()
    clean = clean and not stats.dropped
    if not clean and stats.last_error:
        _say(stats.last_error)
    if stats.queued:
        _say(f"{stats.queued:,} logs are safe in {spool}, for its next client or `chirrop drain`")
    return clean


def _log_of(fields: Any, id_from: list[str] | None) -> Log:
    """Return the log that JSON describes, its id made of agent, event and the fields `id_from`."""
    import uuid

    if not isinstance(fields, dict):
        raise ChirrOpValidationError(f"a log must be a JSON object, got {_show(fields)}")
    if id_from and not fields.get("log_id"):
        known, meta = dict(fields), fields.get("meta")
        if isinstance(meta, dict):
            known.update((f"meta.{key}", value) for key, value in meta.items())
        parts = [known.get(name) for name in ("agent", "event", *id_from)]
        if None in parts[1:]:
            raise ChirrOpValidationError(f"log_id cannot be made: no {' or '.join(id_from)}")
        text = _encode_json("log_id", parts).decode()
        fields["log_id"] = str(uuid.uuid5(uuid.NAMESPACE_URL, text))
    return Log(**{"value": 1, **fields})


def _cmd_log(args: Any) -> int:
    fields = {k: v for k, v in vars(args).items() if k in _LOG_FIELDS and v is not None}
    if args.event == "-":
        if len(fields) > 1 or args.spool:
            raise ChirrOpValidationError("`log -` reads whole logs: it takes only --id-from")
        return _log_lines(args)
    entry = _log_of(fields, args.id_from)
    clean = _deliver(_client(args, spool=args.spool), [entry], args.spool)
    line = f"{'delivered' if clean else 'not delivered:'} {entry.log_id}"
    return _result(args, entry.to_dict(), [line], not clean)


def _log_lines(args: Any) -> int:
    """Send JSON Lines from standard input, in bounded memory, and account for each line."""
    counts, bad = {"lines": 0, "blank": 0}, dict[str, int]()

    def read() -> Iterator[Log]:
        for number, line in enumerate(sys.stdin.buffer, 1):
            counts["lines"] = number
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise ChirrOpError("UTF-16, as PowerShell's > writes it, is not read: write UTF-8")
            try:
                if line.strip():
                    yield _log_of(json.loads(line), args.id_from)
                else:
                    counts["blank"] += 1
            except (ValueError, TypeError, RecursionError) as exc:
                kind = str(exc)[:30]
                bad[kind] = bad.get(kind, 0) + 1
                if bad[kind] <= 3:
                    _say(f"line {number:,}: {exc}")

    client = _client(args, queue_size=20_000)  # some 5 MB
    clean = _deliver(client, read())
    for kind, count in bad.items():
        if count > 3:
            _say(f"and {count - 3:,} more lines: {kind}…")
    delivered, lost = client.stats().delivered, sum(client.stats().dropped.values())
    counts.update(delivered=delivered, bad=sum(bad.values()), dropped=lost)
    line = "{lines:,} lines: {delivered:,} delivered, {bad:,} bad, {dropped} dropped, {blank} blank"
    return _result(args, counts, [line.format(**counts)], not clean or bool(bad))


def _cmd_drain(args: Any) -> int:
    if not os.path.exists(args.spool):
        raise ChirrOpValidationError(f"there is no spool {_show(args.spool)}")
    spool = SqliteSpool(args.spool, required=True)
    client = _client(args, spool=spool)
    clean = _deliver(client, (), args.spool)
    for path in spool._files():
        if path != client._delivery._buffer.place:
            _say(f"{path} is in use: the client that holds it sends what is in it")
    stats, dead = client.stats(), len(spool.dead_letters())
    if dead:
        path = f"{args.spool}.dead.jsonl"
        _say(f"dead letters wait in {path}: `jq -c .log {path} | chirrop log -` sends them again")
    account = {"delivered": stats.delivered, "left": stats.queued, "dead_letters": dead}
    line = "{delivered:,} delivered, {left:,} left, {dead_letters:,} dead letters"
    return _result(args, account, [line.format(**account)], not clean)


_CURES = {  # by what failed: the first that fits
    "401": "The key is wrong, revoked, or of another workspace.",
    "404": "Check the path of {}.",
    "gaierror": "The name has no address: check {}, the network and its DNS server.",
    "SSLCertVerificationError": "The certificate is not trusted: where a proxy inspects TLS, or the"
    " CA is private, SSL_CERT_FILE must name the CA's file; check this computer's clock, too.",
    "SSLError": "The TLS handshake failed: check {}; perhaps http is served there.",
    "ConnectionRefusedError": "Nothing listens there: check {}, and that it is running.",
    "OSError": "Check {} and the firewall, and whether HTTPS_PROXY must name a proxy.",
    "object": "Check {}, or try again later.",
}


def _cmd_doctor(args: Any) -> int:
    """Make one attempt at each endpoint; say what was found, and what to do. No log is sent."""
    client, found = _client(args), []
    for name, url, body in (
        ("CHIRROP_API_ENDPOINT", client.config.api_endpoint, b"[]"),
        ("CHIRROP_SERVICER_ENDPOINT", f"{client.config.servicer_endpoint}/events", None),
    ):
        answer = client._link.attempt("POST" if body else "GET", url, body, 10.0)
        text = "ok   answers as it should"
        # What takes logs says so of an empty batch, if only that it is empty.
        if _verdict(_INGEST, answer) not in (_DELIVERED, _SPLIT):
            text = f"FAIL {answer.error()}. {_cure(answer).format(name)}"
        found.append(f"{text} ({url})")
        off = time.time() - (_unix_seconds(answer.headers.get("date", "")) or time.time())
        if abs(off) > 60:
            found.append(f"FAIL the clock is {off:+,.0f} s off the service's, and dates the logs")
    return _result(args, found, found, "FAIL" in "".join(found))


def _cure(answer: _Answer) -> str:
    """Return what to do about a failure; where nothing answered, what Python makes of settings."""
    import ssl

    cause = getattr(answer.cause, "__cause__", None) or answer.cause
    kinds = [str(answer.status), *(kind.__name__ for kind in type(cause).__mro__)]
    text = next(text for kind, text in _CURES.items() if kind in kinds)
    names = [name for name in os.environ if name.lower().endswith("_proxy")]
    if names:
        text += f" Proxies are in {', '.join(names)}: Python reads HTTP_PROXY and HTTPS_PROXY, of"
        text += " http:// alone (no SOCKS, no ALL_PROXY), and in NO_PROXY no networks, but names."
    try:
        ssl.create_default_context(cafile=os.environ.get("SSL_CERT_FILE"))
    except OSError as exc:
        text += f" SSL_CERT_FILE={os.environ['SSL_CERT_FILE']} is no file of CAs: {exc}."
    return text


def _cmd_sandbox(args: Any) -> int:
    with _serve_sandbox(Sandbox(), args.host, args.port) as server:
        base = f"http://{args.host}:{server.server_port}/v1.0"
        variables = {
            "CHIRROP_API_KEY": "chp_sandbox",
            "CHIRROP_API_ENDPOINT": f"{base}/logs",
            "CHIRROP_SERVICER_ENDPOINT": base,
        }
        _result(args, variables, (f"export {name}={variables[name]}" for name in variables))
        server.serve_forever()
    return 0


# A process that is killed with 100 logs in its spool, none of them sent.
_DEMO_CRASH = """
import importlib, os, sys
folder, name = os.path.split(os.path.abspath(sys.argv[1]))
sys.path.insert(0, folder)
os.environ.clear()
chirrop = importlib.import_module(name.partition(".")[0])
client = chirrop.new_client(api_key="chp_demo", spool=sys.argv[2], flush_delay=60)
for number in range(100): client.log(chirrop.Log("backup.done.count", number))
os.kill(os.getpid(), 9)
"""


def _cmd_demo(args: Any) -> int:
    """Send logs through a client into a sandbox that misbehaves; tell what became of them."""
    import subprocess
    import tempfile

    sandbox = Sandbox()
    sandbox.reject(lambda log: log["event"] == "poison.log")
    fields: dict[str, Any] = {
        "api_key": "chp_demo",
        "api_endpoint": DEFAULT_API_ENDPOINT,
        "servicer_endpoint": DEFAULT_SERVICER_ENDPOINT,
        "transport": sandbox,
    }
    client = _client(args, **fields)

    def logs() -> Iterator[Log]:
        faults: Any = ({"status": 502}, {"drop": "before"}, {"retry_after": 0.5}, {"drop": "after"})
        for number in range(5000):
            if number % 1250 == 0:
                client.flush()
                sandbox.fail(path="/logs", **faults[number // 1250])
            event = ("http.request.duration_ms", "tokens.used.count")[number % 2]
            at = datetime.fromtimestamp(time.time() - number**2 / 1200, timezone.utc)
            yield Log(event, number % 900, "checkout", occurred_at=at)
        yield Log("poison.log", 1)

    with tempfile.TemporaryDirectory() as folder:
        words = ["-I", "-S", "-c", _DEMO_CRASH, __file__, os.path.join(folder, "events.spool")]
        crash = subprocess.Popen([sys.executable, *words])  # noqa: S603  # Python and this file
        _deliver(client, logs())
        crash.wait()
        heir = _client(args, spool=words[-1], **fields)
        heir.close()
    event, *others = client.list_events()
    stats, saved = client.stats(), heir.stats().delivered
    lines = [
        *_chart(event, "hour", client.get_event_logs(event["event_id"], "hour")),
        f"(one of {len(others) + 1} events)",
        f"{stats.retries} retries, after a 502, a broken connection, a 429 and a lost answer",
        f"accepted {stats.accepted:,} = delivered {stats.delivered:,} + dropped {stats.dropped}",
        f"dropped: {stats.last_error}",
        f"a process killed (-9) with 100 logs in its spool: the next client delivered {saved}",
    ]
    return _result(args, lines, lines, not len(sandbox.logs) == stats.delivered + saved == 5100)


_TYPES: Any = {
    "value": float,
    "--retries": int,
    "--limit": int,
    "--port": int,
    "--meta": json.loads,
    "--data": json.loads,
}
_COMMANDS: Any = (
    (_cmd_demo, "", "send 5,000 logs into a misbehaving sandbox: no key, no network"),
    (
        _cmd_log,
        "event [value] --agent --meta --occurred-at --log-id --id-from+ --spool",
        "send one log, or, with - for EVENT, JSON Lines from standard input",
    ),
    (_cmd_events, "", "list the event definitions"),
    (_cmd_rollups, "event --agent --period=hour --limit=100", "chart counts and sums"),
    (
        _cmd_analytics,
        "event --agent --period=1h --previous=previous_window",
        "compare an event's last hours or days with earlier ones",
    ),
    (_cmd_alerts, "[action] [id] --status", "list alerts, or move one on: ack, resolve, archive"),
    (_cmd_api, "method path --data", "make any call of the control plane; DATA is JSON"),
    (_cmd_drain, "spool", "deliver what a SqliteSpool holds"),
    (_cmd_doctor, "", "find out why nothing arrives; sends no log"),
    (_cmd_sandbox, "--port=8125 --host=127.0.0.1", "serve a sandbox; PORT 0 is a free one"),
)


def _arguments(words: list[str]) -> Any:
    import argparse

    parser = argparse.ArgumentParser(prog="chirrop")
    parser.add_argument("--version", action="version", version=f"chirrop {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for run, usage, about in _COMMANDS:
        name, usage = run.__name__[5:], f"{usage} --retries=3"
        command = commands.add_parser(name, help=about, description=about, epilog=usage)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true")
        for part in usage.split():
            name, _, default = part.strip("[]+").partition("=")
            nargs, kind = {"]": "?", "+": "+"}.get(part[-1]), _TYPES.get(name, str)
            command.add_argument(name, nargs=nargs, default=default or None, type=kind)
    # To argparse a word that begins with a dash is an option. With a space before it, it is none,
    # and numbers, names and JSON are trimmed.
    words = [f" {word}" if re.match("-[^-]", word) and word != "-h" else word for word in words]
    if words and words[0] in commands.choices:
        return commands.choices[words[0]].parse_intermixed_args(words[1:])  # options anywhere
    return parser.parse_args(words)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: done; 1: failed or interrupted; 2: usage or configuration (or argparse's SystemExit(2)).
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args = _arguments(sys.argv[1:] if argv is None else argv)
        return args.run(args)
    except KeyboardInterrupt:
        return 1
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as exc:  # others than ours: OSError, or JSON that ChirrOp would never send
        _say(exc if isinstance(exc, ChirrOpError) else repr(exc))
        return 2 if isinstance(exc, ChirrOpValidationError) else 1


if __name__ == "__main__":
    sys.exit(main())


# ---- Licence --------------------------------------------------------------
# MIT License
#
# Copyright (c) 2026 ChirrOp
#
# Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
# associated documentation files (the "Software"), to deal in the Software without restriction,
# including without limitation the rights to use, copy, modify, merge, publish, distribute,
# sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
# furnished to do so, subject to the following conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or
# substantial portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
# NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
# NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
# DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
# OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.

if __name__ == "__main__":  # of a cut file: where there is a command line, it does not come back
    print("chirrop: this file was cut, and has no command line", file=sys.stderr)
    sys.exit(2)
