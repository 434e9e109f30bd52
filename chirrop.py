#!/usr/bin/env python3
"""chirrop: the Python SDK of ChirrOp in one file, standard library only, Python 3.9 and later.

    import chirrop

    with chirrop.new_client(api_key="chp_...") as client:
        client.log(chirrop.Log(event="tool.errors.count", value=1, agent="billing"))

An event:  Log -> encode -> buffer (memory or SqliteSpool) -> sender -> transport -> ChirrOp
A query:   Client.list_events() -> Client.request() -> transport -> ChirrOp

At any moment every accepted log is delivered, dropped (reported, with its reason) or still held.

Outside itself this file touches, each in the one place named:
    network   _UrllibTransport; Sandbox server and `doctor` when they are asked for
    threads   _Sender, daemon: senders from the first log on, now and then a short one that writes
              log records; the command line's progress line, and the sandbox's server when it runs
    disk      SqliteSpool, when one is configured; ./.env is read for the key
    environ   Config (CHIRROP_*); the command line's NO_COLOR, TERM and COLUMNS; the names of the
              proxies' variables; what urllib (proxies) and OpenSSL (CA files, SSLKEYLOGFILE) read
    exit      one atexit hook, and hooks around fork; both are installed by the import and act on
              open clients
    logging   the logger "chirrop", to which no handler is added

Undocumented names of the standard library, for a port to look at:
    json.encoder c_make_encoder and encode_basestring: a log at half the cost. Where the first is
              missing, the public encoder does the same
    RLock._is_owned and sys._getframe: whether a signal handler or finaliser that calls a client
              has interrupted this very file
    multiprocessing.util.Finalize: its children end past every exit hook
    urllib    Request._tunnel_host and unredirected_hdrs, AbstractHTTPHandler.do_request_: urllib
              chooses the proxy and the headers, but closes each connection after one answer
    http.client response_class and sock of a connection; begin, length, will_close and fp.raw of a
              response: it has no deadline for a whole answer, and misses some that are cut short

Sections, each using only what stands above it: constants, errors, Log, Config, buffers, retry
policy, outbox, sender, transport, Client, global API; then the cut line; then Sandbox and command
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
import importlib
import io
import itertools
import json
import math
import os
import stat
import struct
import sys
import threading
import time
import weakref
from collections import deque, namedtuple
from datetime import datetime, timezone

__version__ = "1.0.0"

__all__ = [
    "ChirrOp", "Client", "Config", "Log", "SqliteSpool", "Stats",
    "new_client", "initialize", "log_event", "flush", "stop",
    "ChirrOpError", "ChirrOpValidationError", "ChirrOpQueueFullError", "ChirrOpTransportError",
    "ChirrOpRateLimitError", "ChirrOpServerError", "ChirrOpNonRetryableError",
    "ChirrOpBadRequestError", "ChirrOpUnauthorizedError", "ChirrOpForbiddenError",
    "ChirrOpNotFoundError", "ChirrOpInternalServerError", "ChirrOpServiceUnavailableError",
    "__version__",
]  # fmt: skip

# ---- Constants and vocabularies -------------------------------------------
# Type checkers take TYPE_CHECKING for true; at run time nothing of typing is imported.

TYPE_CHECKING = False

MAX_BATCH = 250  # logs in one request: the service's hard limit
MAX_META_BYTES = 1024  # of encoded JSON: the service's limit
MAX_META_KEYS = 10  # top-level keys of an object: the service's limit
MAX_AGE_SECONDS = 30 * 86400.0  # of occurred_at: the service's limit
MAX_AHEAD_SECONDS = 86400.0  # of occurred_at: the service's limit
MAX_ANSWER_BYTES = 16 * 1024 * 1024  # far above any real answer: a wrong host fills no memory
MAX_ERROR_BYTES = 65536  # of an answer other than 2xx: what is searched for its message
MAX_KEPT_BYTES = 4096  # of that answer: what an error keeps, which may be held for as long as it
MAX_WAITING = 8  # batches that wait for another attempt before no further ones are begun
MAX_UNTOLD = 1000  # drops kept for an on_drop that is slow; it is not called for more
MAX_SPLIT_REQUESTS = 64  # for one rejected batch: isolates 3 bad logs in 250 with at most 49
MAX_RETRY_AFTER = 300.0  # seconds the server may ask background senders to wait
MAX_SERVICER_WAIT = 30.0  # seconds of a Retry-After above which a control-plane call raises
BACKOFF_BASE = 1.0  # seconds at most after the first failure, doubled with each further one
BACKOFF_CAP = 30.0  # seconds
MAX_IDLE_SECONDS = 50.0  # of a kept connection: common load balancers close it after 60
REPORT_SECONDS = 60.0  # between two log records about drops: a storm makes a handful of them
SPOOL_RETRY_SECONDS = 30.0  # between two tries of a spool file that failed
DEFAULT_API_ENDPOINT = "https://logs.chirrop.com/v1.0/logs"
DEFAULT_SERVICER_ENDPOINT = "https://api.chirrop.com/v1.0"
NOTSET = 0  # logging.NOTSET, without importing logging

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
    from typing import Any, Literal, NoReturn, Optional, TypedDict, TypeVar, Union

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

    class Rollup(TypedDict):
        event_id: str
        agent: str
        event: str
        period: Period
        occurred_at: str
        count: int
        value: float
        squares: float
        min: float
        max: float

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

    class Policy(TypedDict):
        policy_id: str
        event_id: str
        title: str
        description: str
        channel: str
        period: Period
        aggregate: Aggregate
        condition: Condition
        threshold: float
        severity: Severity
        enabled: bool

    class Alert(TypedDict):
        alert_id: str
        policy_id: str
        event_id: str
        agent: str
        event: str
        title: str
        channel: str
        period: Period
        aggregate: Aggregate
        condition: Condition
        threshold: float
        severity: Severity
        status: AlertStatus
        value: float
        count: int
        min: float
        max: float
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

    # transport(method, url, body, headers, timeout) -> (status, body, headers)
    # One attempt, no retries. Any status is returned; a network failure is raised as an OSError.
    Transport = Callable[
        [str, str, Optional[bytes], Mapping[str, str], float], tuple[int, bytes, Mapping[str, str]]
    ]
    _F = TypeVar("_F", bound=Callable[..., Any])


# ---- Errors ---------------------------------------------------------------
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
        status_code: HTTP status, 0 when there was no answer.
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
    """No valid answer came: refused, reset, timed out, or not HTTP (status 0)."""


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


_ERROR_BY_STATUS: dict[int, type[ChirrOpError]] = {
    400: ChirrOpBadRequestError,
    401: ChirrOpUnauthorizedError,
    403: ChirrOpForbiddenError,
    404: ChirrOpNotFoundError,
    408: ChirrOpServerError,
    413: ChirrOpBadRequestError,
    422: ChirrOpBadRequestError,
    429: ChirrOpRateLimitError,
    500: ChirrOpInternalServerError,
    503: ChirrOpServiceUnavailableError,
}


def _show(value: object) -> str:
    """Return a short repr for an error message, whatever `value`'s own repr does."""
    try:
        text = repr(value)
    except Exception:
        text = f"<{type(value).__name__} without a repr>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_from_handler(exc: BaseException) -> bool:
    """Tell whether a signal handler raised an exception, on top of what it interrupted.

    Not its type tells, for a time limit may well be a TimeoutError, but its place: a handler is
    given the frame that it has interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        return False  # no other thread runs handlers
    trace = exc.__traceback__
    above: list[Any] = []
    while trace is not None:
        # Not the first frame, ours: its locals would be kept with the exception that they hold.
        for given in trace.tb_frame.f_locals.values() if above else ():
            values = given if isinstance(given, tuple) else (given,)
            if any(value is frame for value in values for frame in above):
                return True
        above.append(trace.tb_frame)
        trace = trace.tb_next
    return False


def _is_our_own(exc: BaseException) -> bool:
    """Tell whether an exception struck where it is caught, before what was to be called."""
    return exc.__traceback__ is None or exc.__traceback__.tb_next is None


def _without_key(exc: BaseException, key: str) -> BaseException:
    """Return `exc` without tracebacks, whose frames hold the key; its stand-in if it quotes it."""
    link: BaseException | None = exc
    quoted, seen = False, set()
    while link is not None and id(link) not in seen:  # a chain may be a circle
        seen.add(id(link))
        link.__traceback__ = None
        try:
            text = str(link)
            quoted = quoted or (bool(key) and (key in text or repr(str(key))[1:-1] in text))
        except (MemoryError, RecursionError):  # this thread's, not the exception's
            raise
        except Exception as trouble:  # the application's own exception class
            if _is_from_handler(trouble):
                raise
            quoted = True
        link = link.__cause__ or link.__context__
    if quoted:
        return ConnectionError(
            f"{type(exc).__name__}, whose text is withheld: it quotes the API key"
        )
    return exc


def _masked(content: bytes, key: str) -> bytes:
    """Return the beginning of an error's body without the key: some servers echo it, escaped."""
    content = content[:MAX_ERROR_BYTES]
    # This deep it overflows a small thread's stack.
    if content.count(b"[") + content.count(b"{") > 1000:
        content = content[:1000]
    if b"\\u" in content:
        try:
            content = json.dumps(json.loads(content), ensure_ascii=False).encode("utf-8", "replace")
        except (ValueError, RecursionError):
            content = content.replace(b"\\u", b"/u")
    if not key:
        return content
    quoted = json.dumps(key)[1:-1]
    for form in (key, quoted, quoted.replace("/", "\\/")):
        content = content.replace(form.encode(), b"***")
    return content


# ---- Log ------------------------------------------------------------------
# In: what the caller measured. Out: one compact UTF-8 JSON object, made and checked in the caller's
# stack; from here on only these bytes travel. No locks, no I/O.

_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_encode_text = _encoder.encode
try:
    # What _encoder.encode makes anew on each call, at two thirds of its cost. It keeps no track of
    # cycles, so only what holds no containers is given to it.
    _pieces: Any = json.encoder.c_make_encoder(  # type: ignore[attr-defined]
        None, _encoder.default, json.encoder.encode_basestring, None, ":", ",", False, False, False
    )
except (AttributeError, TypeError):  # not CPython, or one to come
    _pieces = lambda value, level: _encode_text(value)  # noqa: E731
_LOG_FIELDS = ("event", "value", "agent", "log_id", "meta", "occurred_at")  # as Log takes them
_FLAT = frozenset((str, int, float, bool, type(None)))
_LARGEST = sys.float_info.max
_quote = json.encoder.encode_basestring  # what _encode_text does to a string
_BLOCK = 64  # UUIDs made at once
# RFC 4122, for a block of UUIDs as one number: all bits are random but 4 of byte 6, which are 0100,
# and 2 of byte 8, which are 10.
_RANDOM_BITS = int.from_bytes(bytes.fromhex("ffffffffffff0fff3fffffffffffffff") * _BLOCK, "big")
_FIXED_BITS = int.from_bytes(bytes.fromhex("00000000000040008000000000000000") * _BLOCK, "big")
_NOT_MINTED: tuple[int, int, str, list[str]] = (-1, 0, "", [])
# (second, process, ISO text, UUIDs not used yet); replaced as a whole, never edited.
_minted = _NOT_MINTED


def _mint(now: float) -> tuple[str, str]:
    """Return a random UUIDv4 and the ISO 8601 text of `now`.

    os.urandom gives up the GIL on every call, which makes 8 logging threads half as fast as one; so
    UUIDs are made in blocks. A block lives for one wall-clock second at most, which keeps a
    restored snapshot from repeating ids, and belongs to one process, whether fork hooks run or not.
    uuid.uuid4 would add a third to a log's cost.
    """
    global _minted
    second, pid = int(now), os.getpid()
    while True:
        minted_in, minter, text, block = _minted
        if minted_in == second and minter == pid and block:
            try:
                new_id = block.pop()
            except IndexError:  # another thread took the last one
                continue
            # At half an f-string's cost.
            return new_id, "%s.%06dZ" % (text, (now - second) * 1e6)  # noqa: UP031
        if minted_in != second:
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        _minted = (second, pid, text, _uuids())


def _uuids() -> list[str]:
    number = int.from_bytes(os.urandom(16 * _BLOCK), "big") & _RANDOM_BITS | _FIXED_BITS
    digits = number.to_bytes(16 * _BLOCK, "big").hex().encode()
    made = [b"%b-%b-%b-%b-%b" % parts for parts in struct.iter_unpack("8s4s4s4s12s", digits)]
    return b" ".join(made).decode().split()


def _number(value: Any) -> int | float:
    """Return any real number (Decimal, Fraction, NumPy scalars) as an int or a float."""
    import numbers

    # Decimal is a Number, but not a Real one.
    if type(value) is not bool and isinstance(value, numbers.Number):
        number: Any = value
        try:
            if isinstance(value, numbers.Integral):
                return int(number)
            return float(number)
        except Exception:  # complex, a signalling NaN, too large, a hostile subclass
            pass
    raise ChirrOpValidationError(f"value must be a finite number, got {_show(value)}")


def _trimmed(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ChirrOpValidationError(f"{name} must be a string, got {_show(value)}")
    return str.strip(value)


def _canonical_id(log_id: object) -> str:
    """Return a UUID in its canonical form, or "" for a blank string."""
    import uuid

    if isinstance(log_id, str):
        log_id = str.strip(log_id)
    if log_id == "":
        return ""
    try:
        made = uuid.UUID(str(log_id))
        if made.hex not in str(log_id).lower().replace("-", ""):  # int() takes "_", "+" and "١"
            raise ValueError("not 32 hexadecimal digits")
        return str(made)
    except Exception as exc:
        raise ChirrOpValidationError(
            f"log_id must be a UUID, got {_show(log_id)}: make one from a key of your own with"
            " uuid.uuid5(uuid.NAMESPACE_URL, key)"
        ) from exc


def _parse_time(value: object) -> datetime:
    """Return a datetime, or ISO 8601 text of isoformat, JavaScript or RFC 3339, as aware UTC."""
    moment = value
    try:
        if isinstance(value, str):
            import re

            match = re.fullmatch(
                r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]([0-9]{2}:[0-9]{2})(:[0-9]{2})?(?:[.,]([0-9]+))?"
                r"(?:[Zz]|([+-][0-9]{2}):?([0-5][0-9](?::[0-5][0-9](?:\.[0-9]{6})?)?))?",
                value.strip(),
            )
            if match is None:
                raise ValueError("not an ISO 8601 date and time")
            day, minute, second, digits, hours, rest = match.groups()
            fraction = f"{digits or '':0<6.6}"
            offset = f"{hours}:{rest}" if hours else "+00:00"
            moment = datetime.fromisoformat(f"{day}T{minute}{second or ':00'}.{fraction}{offset}")
        if not isinstance(moment, datetime):
            raise TypeError("neither a datetime nor a string")
        if moment.utcoffset() is None:
            moment = moment.replace(tzinfo=timezone.utc)
        return moment.astimezone(timezone.utc)
    except Exception as exc:  # a hostile tzinfo may raise anything
        raise ChirrOpValidationError(
            "occurred_at must be a datetime or ISO 8601 date and time like 2026-01-31T12:00:00Z,"
            f" got {_show(value)}"
        ) from exc


def _iso(moment: datetime) -> str:
    """Return an aware UTC datetime as ISO 8601 text that ends in Z."""
    return moment.replace(tzinfo=None).isoformat() + "Z"


def _check_time(value: object, now: float) -> str:
    """Return occurred_at as ISO 8601 text, if the service would take it at `now` (Unix seconds)."""
    moment = _parse_time(value)
    if not -MAX_AHEAD_SECONDS <= now - moment.timestamp() <= MAX_AGE_SECONDS:
        raise ChirrOpValidationError(
            "occurred_at must lie within the last 30 days and at most 1 day ahead,"
            f" got {_show(value)}"
        )
    return _iso(moment)


def _encode_json(name: str, value: object) -> bytes:
    """Return strict compact JSON: no NaN, no lone surrogate, no cycle, no absurd nesting."""
    try:
        return _encode_text(value).encode()
    except Exception as exc:  # the value's own methods may raise anything
        reason = "a value without a message"
        try:
            reason = f"{type(exc).__name__}: {exc}"[:200]
        except Exception:
            pass
        raise ChirrOpValidationError(
            f"{name} must be JSON-encodable, got {type(value).__name__}: {reason}"
        ) from None


def _encode_meta(meta: object) -> str:
    if isinstance(meta, dict) and len(meta) > MAX_META_KEYS:
        raise ChirrOpValidationError(
            f"meta must have at most {MAX_META_KEYS} top-level keys, got {len(meta)}:"
            " put the others into one of them"
        )
    try:
        if type(meta) is dict and _FLAT.issuperset(map(type, meta.values())):
            text = "".join(_pieces(meta, 0))
        else:
            text = _encode_text(meta)
    except Exception:
        text = _encode_json("meta", meta).decode()  # raises, with the reason
    if len(text) > MAX_META_BYTES // 4:  # a character takes at most 4 bytes
        size = len(_encode_json("meta", meta))
        if size > MAX_META_BYTES:
            raise ChirrOpValidationError(
                f"meta must encode to at most {MAX_META_BYTES} bytes, got {size}:"
                " cut its texts, as in repr(error)[:200]"
            )
    return text


def _encode_log(
    now: float,
    event: object,
    value: Any,
    agent: object,
    log_id: object,
    meta: object,
    occurred_at: object,
) -> bytes:
    """Return the wire form of one log; every rule of the service is checked here.

    `now` (Unix seconds) is the default of occurred_at and the middle of its allowed range.
    """
    if type(event) is not str or not (event := event.strip()):
        event = _trimmed("event", event)
        if not event:
            raise ChirrOpValidationError("event must not be empty: name it like tool.errors.count")
    if type(value) is not int and type(value) is not float:
        value = _number(value)
    if not abs(value) <= _LARGEST:  # which NaN is not either
        raise ChirrOpValidationError(f"value must be a finite number, got {_show(value)}")
    new_id, at = _mint(now)
    if log_id is not None:
        new_id = _canonical_id(log_id) or new_id
    if occurred_at is not None:
        at = _check_time(occurred_at, now)
    text = f'{{"log_id":"{new_id}","event":{_quote(event)},"value":{value!r},"occurred_at":"{at}"'
    if type(agent) is str:
        agent = agent.strip()
    elif agent is not None:
        agent = _trimmed("agent", agent)
    if agent:
        text += f',"agent":{_quote(agent)}'
    if meta is not None:
        text += f',"meta":{_encode_meta(meta)}'
    try:
        return f"{text}}}".encode()
    except UnicodeEncodeError:
        for name, part in (("event", event), ("agent", agent), ("meta", meta)):
            _encode_json(name, part)
        raise


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

    __slots__ = ("_body",)
    if TYPE_CHECKING:
        _body: bytes

    def __init__(
        self,
        event: str,
        value: float,
        agent: str | None = None,
        log_id: object = None,
        meta: object = None,
        occurred_at: datetime | str | None = None,
    ) -> None:
        _set_body(self, _encode_log(time.time(), event, value, agent, log_id, meta, occurred_at))

    def to_dict(self) -> dict[str, Any]:
        """Return the log as it is sent, as a new dict; without `agent` and `meta` if not given."""
        return json.loads(self._body)

    def __getattr__(self, name: str) -> Any:
        if name in _LOG_FIELDS:
            return self.to_dict().get(name)
        raise AttributeError(f"'Log' object has no attribute {name!r}")

    def __setattr__(self, name: str, value: object = None) -> None:
        raise AttributeError("a Log cannot be changed: make another")

    __delattr__ = __setattr__

    def __repr__(self) -> str:
        return f"Log({', '.join(f'{k}={v!r}' for k, v in self.to_dict().items())})"

    def __eq__(self, other: object) -> bool:
        return self._body == other._body if isinstance(other, Log) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._body)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_log, (self._body,)


_set_body = Log.__dict__["_body"].__set__  # past __setattr__, at a third of its cost


def _restore_log(body: bytes) -> Log:
    """Unpickle or copy a Log: it was checked when it was made, and may be too old by now."""
    log = Log.__new__(Log)
    _set_body(log, body)
    return log


# ---- Config ---------------------------------------------------------------
# In: arguments, the environment, ./.env. Out: checked settings that nobody changes.


class _Secret(str):
    """A string that does not show itself in reprs, nor in tracebacks with locals."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


class _SecretBytes(bytes):
    """What somebody gave in place of a string, which may be a key all the same."""

    __repr__ = _Secret.__repr__


def _hidden(value: Any) -> Any:
    """Return a key so that it does not show where a traceback with locals shows its frame."""
    if isinstance(value, str):
        return _Secret(value)
    if isinstance(value, (bytes, bytearray)):
        return _SecretBytes(value)
    return value


def _read_dotenv(name: str) -> str | None:
    """Return one variable from ./.env; None when there is none, whatever the file holds."""
    found = None
    if not os.path.isfile(".env"):  # a pipe would be waited for
        return None
    try:
        with open(".env", encoding="utf-8-sig", errors="replace") as file:
            lines = file.read(1 << 20).splitlines()
    except OSError:
        return None
    for line in lines:
        key, equals, value = line.strip().partition("=")
        words = key.split()
        if not equals or words[-1:] != [name] or words[:-1] not in ([], ["export"]):
            continue
        value = value.strip()
        if value[:1] in ("'", '"') and value[:1] in value[1:]:
            found = _Secret(value[1 : value.index(value[0], 1)])
        else:
            found = _Secret(value.split(" #")[0].split("\t#")[0].strip())
    return found


def _find_key(api_key: object) -> tuple[Any, str]:
    """Return the key, from the argument, the environment or ./.env, and where it came from."""
    name = "CHIRROP_API_KEY"
    if api_key:
        return _hidden(api_key), "given as api_key"
    if os.environ.get(name):
        return _Secret(os.environ[name]), f"from {name} in the environment"
    return _read_dotenv(name) or _Secret(""), f"from {name} in ./.env"


def _checked_key(api_key: object) -> _Secret:
    key, source = _find_key(api_key)
    if not isinstance(key, str):
        raise ChirrOpValidationError(f"api_key must be a string, got {type(api_key).__name__}")
    key = _Secret(key.strip())
    if not key:
        raise ChirrOpValidationError(
            "API key is required: give api_key, or set CHIRROP_API_KEY in the environment or ./.env"
        )
    if not key.startswith("chp_"):
        raise ChirrOpValidationError(f"Invalid API key: must start with 'chp_' ({source})")
    if key == "chp_":
        raise ChirrOpValidationError(f"Invalid API key: nothing follows 'chp_' ({source})")
    if not all("!" <= c <= "~" for c in key):
        raise ChirrOpValidationError(
            f"Invalid API key: must be printable ASCII without spaces ({source})"
        )
    return key


def _checked_endpoint(name: str, value: str | None, variable: str, default: str) -> str:
    """Return an absolute http(s) URL without user info, query, fragment and final slash."""
    url = value
    if url is None:
        url = os.environ.get(variable) or default
    if url == default:
        return url
    import re
    import urllib.parse

    try:
        parts = urllib.parse.urlsplit(url)
        valid = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0  # reading it also checks that it is a number up to 65535
            and all("!" <= c <= "~" for c in url)
            and not (parts.query or parts.fragment or url.endswith(("?", "#")))
        )
        if valid and "@" not in parts.netloc:
            return url.rstrip("/")
    except (ValueError, TypeError, AttributeError):
        pass
    shown = type(url).__name__
    if isinstance(url, str):  # user info and a query may be secrets, and what stands there a key
        _, user_info, rest = url.rpartition("@")
        shown = _show("***@" * bool(user_info) + re.sub("(?s)([?#]|chp_).*", r"\1***", rest))
    if value is None:
        shown += f" from {variable}"
    raise ChirrOpValidationError(
        f"{name} must be an absolute http or https URL without user info, query or fragment,"
        f" got {shown}"
    )


def _integer(name: str, value: object, low: int, high: int = sys.maxsize) -> int:
    if type(value) is not int or not low <= value <= high:
        rule = f"of at least {low}" if high == sys.maxsize else f"from {low} to {high}"
        raise ChirrOpValidationError(f"{name} must be an integer {rule}, got {_show(value)}")
    return value


def _seconds(name: str, value: Any, *, zero: bool = True) -> float:
    """Return a duration of at most a day: longer waits overflow in some of the standard library."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and 0 <= value <= 86400 and (value or zero):
        return float(value)
    start = "from 0" if zero else "above 0 and"
    raise ChirrOpValidationError(f"{name} must be seconds {start} up to 86400, got {_show(value)}")


def _choice(name: str, value: object, allowed: Iterable[str]) -> Any:
    """Return `value` if it is one of a closed vocabulary; nothing has been sent when it is not."""
    if not isinstance(value, str) or value not in allowed:
        raise ChirrOpValidationError(
            f"{name} must be one of {', '.join(allowed)}, got {_show(value)}"
        )
    return value


def _unless_none(check: Callable[..., Any], name: str, value: Any, *rules: Any) -> Any:
    """Return None for None, and what the check returns for anything else."""
    if value is None:
        return None
    return check(name, value, *rules)


def _optional(name: str, value: Any, wanted: str, fits: bool) -> Any:
    if value is not None and not fits:
        raise ChirrOpValidationError(f"{name} must be {wanted} or None, got {_show(value)}")
    return value


def _checked_level(value: object) -> int:
    """Return a logging level given as its number or its name."""
    if isinstance(value, str):
        import logging

        number = logging.getLevelName(value.strip().upper())
        if isinstance(number, int):
            value = number
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ChirrOpValidationError(
            f"log_level must be the number or the name of a logging level, got {_show(value)}"
        )
    return value


class Config:
    """Settings of a client, checked when they are made; one Config can serve many clients.

    A pickled one travels without its key; where it is unpickled it takes CHIRROP_API_KEY or ./.env.

    Args:
        api_key: starts with "chp_"; else CHIRROP_API_KEY in the environment, else in ./.env.
        api_endpoint: full URL that takes logs; else CHIRROP_API_ENDPOINT, else the service's.
        servicer_endpoint: the control plane's base URL; else CHIRROP_SERVICER_ENDPOINT, else the
            service's.
        retries: further attempts for a batch before it counts as exhausted, from 0.
        timeout: seconds for one attempt, from connecting to the answer's last byte, up to 86,400;
            also how long `log` waits for room in a bounded queue. Looking up a host name is beyond
            a program's reach, and a name with several dead addresses may take this long for each.
        batch_size: queued logs that start a send at once, from 1; a request carries 250 at most.
        flush_delay: seconds a log may wait for others to share its request.
        queue_size: logs held at most, in flight included; 0 is no limit.
        log_level: level of the logger "chirrop", a number or a name; NOTSET leaves it alone.
        servicer_retries: further attempts of a control-plane call, from 0.
        on_exhausted: "keep" holds an exhausted batch and goes on trying; "drop" reports its loss.
        max_senders: threads that send at once at most, 1 to 64; a backlog brings them, one by one.
        exit_timeout: seconds that all clients together may delay the end of the process, and that a
            client may delay the end of a Lambda invocation, from 0.
        transport: callable that makes one attempt in place of urllib (see the README).
        ssl_context: ssl.SSLContext for a private CA or a client certificate; None is the system's.
        spool: a SqliteSpool, or the path of one, that keeps logs on disk until they are delivered.
        on_drop: called as on_drop(logs, error) with the dropped logs as dicts, on a thread of its
            own (where none can be had, as at exit, in that of whoever has dropped them or waits);
            it may log, flush and close, and what it raises is caught and logged. After an
            interruption it may hear of logs once more.
        disabled: True checks logs, then discards them: no key, no thread, no network; None is what
            CHIRROP_DISABLED says (1, true, yes or on disable); False sends whatever that says.

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
        log_level: int | str = NOTSET,
        *,
        servicer_retries: int = 2,
        on_exhausted: Literal["keep", "drop"] = "keep",
        max_senders: int = 4,
        exit_timeout: float = 5.0,
        transport: Transport | None = None,
        ssl_context: Any = None,
        spool: SqliteSpool | str | os.PathLike[str] | None = None,
        on_drop: Callable[[list[dict[str, Any]], ChirrOpError], object] | None = None,
        disabled: bool | None = None,
    ) -> None:
        api_key = _hidden(api_key)
        _optional("disabled", disabled, "True, False", isinstance(disabled, bool))
        if disabled is None:
            switch = os.environ.get("CHIRROP_DISABLED", "").strip().lower()
            disabled = switch in ("1", "true", "yes", "on")
        is_path = isinstance(spool, (str, os.PathLike)) and bool(os.fspath(spool))
        if ssl_context is not None:
            import ssl

            is_context = isinstance(ssl_context, ssl.SSLContext)
            _optional("ssl_context", ssl_context, "an ssl.SSLContext", is_context)
        if disabled and not api_key:
            api_key = _Secret("")
        else:
            api_key = _checked_key(api_key)
        self.__dict__.update(
            api_key=api_key,
            api_endpoint=_checked_endpoint(
                "api_endpoint", api_endpoint, "CHIRROP_API_ENDPOINT", DEFAULT_API_ENDPOINT
            ),
            servicer_endpoint=_checked_endpoint(
                "servicer_endpoint",
                servicer_endpoint,
                "CHIRROP_SERVICER_ENDPOINT",
                DEFAULT_SERVICER_ENDPOINT,
            ),
            retries=_integer("retries", retries, 0),
            timeout=_seconds("timeout", timeout, zero=False),
            batch_size=_integer("batch_size", batch_size, 1),
            flush_delay=_seconds("flush_delay", flush_delay),
            queue_size=_integer("queue_size", queue_size, 0),
            log_level=_checked_level(log_level),
            servicer_retries=_integer("servicer_retries", servicer_retries, 0),
            on_exhausted=_choice("on_exhausted", on_exhausted, ("keep", "drop")),
            max_senders=_integer("max_senders", max_senders, 1, 64),
            exit_timeout=_seconds("exit_timeout", exit_timeout),
            transport=_optional("transport", transport, "callable", callable(transport)),
            ssl_context=ssl_context,
            spool=_optional(
                "spool", spool, "a SqliteSpool or a path", is_path or isinstance(spool, SqliteSpool)
            ),
            on_drop=_optional("on_drop", on_drop, "callable", callable(on_drop)),
            disabled=disabled,
        )

    if TYPE_CHECKING:
        api_key: str
        api_endpoint: str
        servicer_endpoint: str
        retries: int
        timeout: float
        batch_size: int
        flush_delay: float
        queue_size: int
        log_level: int
        servicer_retries: int
        on_exhausted: str
        max_senders: int
        exit_timeout: float
        transport: Optional[Transport]
        ssl_context: Any
        spool: Union[SqliteSpool, str, os.PathLike[str], None]
        on_drop: Optional[Callable[[list[dict[str, Any]], ChirrOpError], object]]
        disabled: bool

    def __setattr__(self, name: str, value: object = None) -> None:
        raise AttributeError("a Config cannot be changed: make another")

    __delattr__ = __setattr__

    def __repr__(self) -> str:
        fields = [f"{name}={_show(value)}" for name, value in self.__dict__.items()]
        return f"Config({', '.join(fields)})"

    def __copy__(self, _: object = None) -> Config:
        return self

    __deepcopy__ = __copy__

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_config, ({**self.__dict__, "api_key": None},)


def _restore_config(fields: dict[str, Any]) -> Config:
    """Return a Config from a pickle, which has no key: brokers, schedulers and disks keep it."""
    try:
        return Config(**fields)
    except ChirrOpValidationError as exc:
        text = f"cannot unpickle a Config, which travels without its key: {exc}"
        raise ChirrOpValidationError(text) from exc


# ---- Buffers --------------------------------------------------------------
# In: encoded logs, one at a time. Out: the oldest of them, as many as a batch may hold. Both kinds:
#   put(data)            accept one log, from any thread at any moment; the lock is not needed
#   level()              a number that grows with each put, between two calls of fill
#   size()               how many logs wait here
#   fill(batch)          put the oldest of them into an empty batch
#   settle(batch, error) a batch was delivered (error None) or dropped (error is its text)
#   stays(batch)         tell whether a batch's logs outlive this client
#   tend()               do what takes its time, not under the lock; return seconds until the next
#   is_unknown()         tell whether more may wait than size() says
#   is_open()            tell whether there is something to close
#   leave()              prepare for the end; return how many logs stay for a later client
#   close()              end; not under the lock
#   after_fork()         start empty in a child process
# `batches()`, set by the outbox, returns the batches that are filled and not settled: what has been
# read, and what may be removed, follows from them; `is_over()` tells whether all sending has ended.
# `lock` guards buffer and account. Nothing that it guards is half done when somebody else looks,
# an interrupted caller's own signal handler included: each step is one call of C, or one
# assignment, and the step that counts comes last.

if TYPE_CHECKING:
    _Batches = Callable[[], tuple["_Batch", ...]]
    _Method = TypeVar("_Method", bound=Callable[..., Any])


def _exclusively(lock: Any, work: Callable[..., Any], *args: Any) -> Any:
    """Return work(*args), done under an RLock that is free afterwards, whatever interrupts it.

    A `with` alone leaves the lock taken when an exception strikes between its block and its exit,
    as Python 3.9 lets a signal handler do.
    """
    nested = lock._is_owned()
    try:
        with lock:
            return work(*args)
    finally:
        if not nested and lock._is_owned():
            lock.release()


def _guarded(work: _Method) -> _Method:
    """Let a method run under its object's `lock`."""

    def guarded(self: Any, *args: Any) -> Any:
        return _exclusively(self.lock, work, self, *args)

    return guarded  # type: ignore[return-value]


def _is_inside(*codes: Any) -> bool:
    """Tell whether one of these code objects is running further up this thread's stack."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        for code in codes:
            if frame.f_code is code:
                return True
        frame = frame.f_back
    return False


class _Batch:
    """Logs that share their requests: the same bytes on every attempt."""

    __slots__ = (
        "answers", "attempts", "bodies", "era", "first", "holder", "items", "not_before", "place",
        "spent",
    )  # fmt: skip

    def __init__(self, first: int) -> None:
        self.first = first  # the place of items[0] in the order in which logs left the buffer
        self.items: list[bytes] = []
        self.bodies: list[bytes] = []  # of a request to be made: close() may take it back
        self.answers: list[Any] = []  # what the transport returned: not settled yet, it is not lost
        # The spool file that holds them, their ids there, and how many were read up to the last.
        self.place: tuple[_SpoolFile | None, list[int], int] = (None, [], 0)
        self.spent = [1]  # requests granted to the original batch, shared by its parts
        self.attempts = 0
        self.not_before = 0.0  # else all its attempts have failed, and it is offered again then
        self.holder = 0  # the thread that is sending it
        self.era = 0  # failures in a row when it was taken

    def part(self, start: int, end: int) -> _Batch:
        """Return some of these logs as a batch of their own, as yet unsent."""
        part, (source, ids, number) = _Batch(self.first + start), self.place
        part.items, part.spent = self.items[start:end], self.spent
        part.place = source, ids[start:end], number - (len(self.items) - end)
        return part


def _move(logs: deque[bytes], batch: _Batch, limit: int) -> None:
    """Move the oldest logs into a batch.

    One call of C, which no signal handler can interrupt: a log is either here or there.
    """
    batch.items.extend(map(deque.popleft, itertools.repeat(logs, min(limit, len(logs)))))


class _Memory:
    """Logs that wait in memory. A deque's append is atomic and re-entrant: put needs no lock."""

    found = 0  # logs that were taken over from another process, and go first: none are here
    lost = 0  # logs that were lost with a damaged file, to be accounted for: none are here

    def __init__(self) -> None:
        self.after_fork()

    def after_fork(self) -> None:
        self.lock = threading.RLock()
        self._logs: deque[bytes] = deque()
        self.put, self.level = self._logs.append, self._logs.__len__

    def size(self) -> int:
        return len(self._logs)

    def fill(self, batch: _Batch, limit: int = MAX_BATCH) -> None:
        _move(self._logs, batch, limit)

    def settle(self, batch: _Batch, error: str | None) -> None:
        """There is nothing to remove: the batch has its logs to itself."""

    def stays(self, batch: _Batch) -> bool:
        return False

    def tend(self) -> float:
        return math.inf

    def is_unknown(self) -> bool:
        return False

    def is_open(self) -> bool:
        return False

    def leave(self) -> int:
        return 0

    def close(self) -> None:
        """There is nothing to close."""


_SPOOL_ID = 0x43685270  # application_id of our files, by which they are known: "ChRp"
_SPOOL_VERSION = 2  # user_version; files of the first layout have 1, and no application_id
_SPOOL_NAMES = 1000  # files of one spool at most: one for each process that writes at once
_SPOOL_WAIT = 0.2  # seconds that a statement waits for another program's lock
_TEND_ROWS = 4000  # rows written between two checkpoints, and logs that wait between two wake-ups
_FREE_PAGES = 16  # in a drained file: what is more goes back to the disk
_ORPHANS = 8  # of dead processes' files held at once
_ADOPT_SECONDS = 1.0  # from work done to a look for what dead processes left
_SQL_CREATE = (  # changes nothing in a file that is a spool; fails if it is read-only
    "PRAGMA page_size = 2048",  # a commit writes whole pages: half of the default is enough
    "BEGIN IMMEDIATE",
    # Rows with an error are dead letters.
    "CREATE TABLE IF NOT EXISTS logs (id INTEGER PRIMARY KEY, body BLOB NOT NULL, error TEXT)",
    f"PRAGMA application_id = {_SPOOL_ID}",
    f"PRAGMA user_version = {_SPOOL_VERSION}",
    "COMMIT",
)
# The next id follows the highest that has ever been given out, so the rows written since a file was
# opened have no gaps, and how many of them wait is a subtraction.
_SQL_INSERT = (
    "INSERT INTO logs (id, body) VALUES (1 + max(?, (SELECT ifnull(max(id), 0) FROM logs)), ?)"
)
_SQL_LAST = "SELECT ifnull(max(id), 0) FROM logs"
_SQL_WAITING = "SELECT count(*) FROM logs WHERE id BETWEEN ? AND ? AND error IS NULL"
_SQL_READ = "SELECT id, body FROM logs WHERE id > ? AND error IS NULL ORDER BY id LIMIT ?"
_SQL_DELIVERED = "DELETE FROM logs WHERE id BETWEEN ? AND ? AND error IS NULL"
_SQL_DROPPED = "UPDATE logs SET error = ? WHERE id BETWEEN ? AND ? AND error IS NULL"
_SQL_DEAD = "SELECT body, error FROM logs WHERE error IS NOT NULL ORDER BY id"

# What a forked child must neither close nor open again: SQLite keeps its locks by process and file,
# and would take the parent's for the child's own.
_inherited: dict[tuple[int, int], Any] = {}  # (device, inode) -> the parent's connection


class _NoSpool(ChirrOpError):
    """What stands at a spool's path is not a spool, or cannot be trusted; it is left as it was."""


def _lock_file(path: str) -> Any:
    """Return an open file that holds a lock until it is closed, dropped, or its process dies.

    None: somebody else holds it, in this process or another.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
    while True:
        file = io.FileIO(path, "r+", opener=lambda name, _: os.open(name, flags, 0o600))
        found = os.fstat(file.fileno())
        try:
            if found.st_size:
                raise _NoSpool(f"{os.path.basename(path)} is somebody's file")
            if found.st_nlink:  # else its holder has just removed it
                _check_owner(path, found)
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.lstat(path)):
                return file
        except (BlockingIOError, PermissionError):
            file.close()
            return None
        except FileNotFoundError:
            pass
        except _NoSpool:
            file.close()
            raise
        file.close()  # its holder has removed it meanwhile: that lock means nothing any more


def _unlock_file(file: Any) -> None:
    try:
        if not file.closed and os.path.samestat(os.fstat(file.fileno()), os.lstat(file.name)):
            # Before the lock is given up: nobody must find the file and lock it.
            os.unlink(file.name)
    except OSError:
        pass  # Windows cannot; an unlocked file is as good as none
    file.close()


def _lstat(path: str) -> os.stat_result | None:
    """Return what stands at a path; None where there is nothing, or not any more."""
    try:
        return os.lstat(path)
    except FileNotFoundError:
        return None


def _check_owner(path: str, found: os.stat_result) -> None:
    """Refuse what is no regular file, or belongs to another user, who could feed us logs."""
    if not stat.S_ISREG(found.st_mode):
        raise _NoSpool("it is not a regular file")
    if found.st_nlink > 1:
        raise _NoSpool(f"{os.path.basename(path)} has another name elsewhere")
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        raise _NoSpool(f"{os.path.basename(path)} belongs to another user")


def _check_neighbours(path: str) -> None:
    """Refuse a folder or side files by which another user could reach a spool."""
    try:
        folder = os.stat(os.path.dirname(path)).st_mode
    except FileNotFoundError:
        raise _NoSpool("its folder does not exist: make that first") from None
    if os.name == "posix" and folder & stat.S_IWOTH and not folder & stat.S_ISVTX:
        raise _NoSpool("everyone may replace files in its folder: use another one")
    for suffix in ("-wal", "-shm", "-journal"):
        found = _lstat(path + suffix)
        if found is not None:
            _check_owner(path + suffix, found)


def _check_header(path: str) -> None:
    """Refuse a file that is neither a spool nor empty.

    Only for a file whose lock we hold: closing a file that SQLite has open in this process would
    drop SQLite's own locks.
    """
    _check_owner(path, os.lstat(path))
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0))
    try:
        header = os.read(fd, 72)
    finally:
        os.close(fd)
    if not header:
        return
    if not header.startswith(b"SQLite format 3\0"):
        raise _NoSpool("it is no spool")
    version, application = int.from_bytes(header[60:64], "big"), int.from_bytes(header[68:], "big")
    if application != _SPOOL_ID:
        raise _NoSpool(
            "it is the database of another program, or a spool of the first layout, which"
            " `chirrop drain` of the version that wrote it can empty"
        )
    if version > _SPOOL_VERSION:
        raise _NoSpool("it was written by a newer version of chirrop")


class _SpoolFile:
    """A file of a spool that this process holds: lock, connection, how far it has been read."""

    def __init__(self, path: str, lock_file: Any, conn: Any) -> None:
        self.path, self.lock_file, self.conn = path, lock_file, conn
        self.last: int = conn.execute(_SQL_LAST).fetchall()[0][0]  # row when it was opened
        # Rows that waited then; None: not counted yet, which takes its time where there are many.
        self.count: int | None = None
        if not self.last:
            self.count = 0
        self.settled = (0, 0)  # the last row that was settled, and how many were read up to it
        self.undone: deque[tuple[str, tuple[Any, ...]]] = deque()  # statements for settled rows
        self.known = 0  # rows that waited when somebody looked last
        self.changes = 0  # conn.total_changes at the last checkpoint

    def read(self, batches: Sequence[_Batch]) -> tuple[int, int]:
        """Return the last row that was read, and how many rows had been read with it."""
        places = [batch.place for batch in batches if batch.place[0] is self]
        return max([self.settled, *((ids[-1], number) for _, ids, number in places)])

    def size(self, batches: Sequence[_Batch]) -> int:
        if self.count is None:
            return self.known
        row, number = self.read(batches)
        last = max(self.conn.execute(_SQL_LAST).fetchall()[0][0], self.last, row)
        self.known = max(0, self.count + last - self.last - number)
        return self.known

    def add(self, data: bytes) -> None:
        self.conn.execute(_SQL_INSERT, (max(self.last, self.settled[0]), data))
        self.known += 1

    def move(self, logs: deque[bytes]) -> None:
        """Take the oldest of these logs: one call of C, which commits it and then removes it."""
        if logs:
            row = max(self.last, self.settled[0]), logs[0]
            committed = map(self.conn.execute, [_SQL_INSERT], [row])
            deque(zip(committed, map(deque.popleft, [logs])), maxlen=0)
            self.known += 1

    def fill(self, batch: _Batch, batches: Sequence[_Batch]) -> None:
        row, number = self.read(batches)
        rows = self.conn.execute(_SQL_READ, (row, MAX_BATCH)).fetchall()
        if not all(type(body) is bytes for _, body in rows):
            raise ValueError("a row is not a log")
        ids = [key for key, _ in rows]
        number += len(rows)
        if len(rows) < MAX_BATCH:  # the end: what else was counted, somebody has removed by hand
            self.count = number - max(0, max([row, *ids]) - self.last)
        if rows:
            batch.place = self, ids, number
            batch.items.extend([body for _, body in rows])

    def work_off(self) -> None:
        """Remove settled rows, or make them dead letters; what fails is done the next time."""
        while self.undone:
            self.conn.execute(*self.undone[0])
            self.undone.popleft()

    def close(self, removable: bool) -> None:
        """Give the file up, and remove it if that is allowed and it is empty; may be repeated."""
        conn = self.conn
        try:
            empty = removable and not conn.execute(_SQL_LAST).fetchall()[0][0]
            conn.close()
            # Its lock has the same name still: nobody has removed it and made another.
            lock = os.lstat(self.lock_file.name)
            empty = empty and os.path.samestat(os.fstat(self.lock_file.fileno()), lock)
            for suffix in ("", "-wal", "-shm"):
                if empty and os.path.lexists(self.path + suffix):
                    os.unlink(self.path + suffix)
        finally:
            self.conn = None
            _unlock_file(self.lock_file)


class SqliteSpool:
    """Keep logs in SQLite files until the server has taken them: a log survives its process.

    When `log()` returns, the log is committed (WAL mode): `kill -9` loses nothing, and the next
    client on this path sends what is left, under the same log_ids. Logs dropped for good are kept
    as dead letters. An application calls dead_letters alone; the other methods are the client's.

    Each client writes to a file of its own, the first of PATH, PATH.2, PATH.3 … that nobody holds,
    so any number of processes may share a path on a local disk, and none waits for another. What a
    dead process or a closed client left is sent by the next that opens the path or runs out of
    work.

    A power loss may cost the commits of the last moments, since they are synced to the disk only
    now and then (SQLite's `synchronous=NORMAL`); "FULL" syncs each commit, at milliseconds a log.

    When a file cannot be used (disk full, read-only, locked by another program for 0.2 s, not a
    spool), the client warns, keeps new logs in memory and tries again every 30 s. A damaged spool
    file is moved aside as PATH.damaged-TIME; anything that is not a spool is left as it is. Files
    are made with mode 0600 and hold no key. PATH-lock shows that somebody holds PATH.

    Args:
        path: the first file; made when it does not exist, with the first log, flush or close.
        max_bytes: size in bytes that the spool's files may take together, 0 is no limit. At the
            limit `log()` raises ChirrOpQueueFullError; nothing is pruned. The WAL beside each file
            adds up to about 16 MB.
        synchronous: "NORMAL" or "FULL".
        required: raise in the constructor of the client if the path cannot be used now.

    Raises:
        ChirrOpValidationError: a bad argument.
        ChirrOpError: this Python has no sqlite3 module.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_bytes: int = 0,
        *,
        synchronous: Literal["NORMAL", "FULL"] = "NORMAL",
        required: bool = False,
    ) -> None:
        try:
            import sqlite3
        except ImportError as exc:
            raise ChirrOpError(
                f"SqliteSpool needs the sqlite3 module, which this Python lacks: {exc}"
            ) from exc
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise ChirrOpValidationError(f"path must be a file path, got {_show(path)}")
        self._sqlite3 = sqlite3
        self._failures = (_NoSpool, OSError, ValueError, OverflowError, TypeError, sqlite3.Error)
        self.path = os.path.abspath(os.fspath(path))
        self.max_bytes = _integer("max_bytes", max_bytes, 0)
        self.synchronous = _choice("synchronous", synchronous, ("NORMAL", "FULL"))
        self.required = bool(required)
        self.warn: Callable[[str], None] = lambda text: None
        self.batches: _Batches = tuple
        self.is_over: Callable[[], bool] = bool
        self._reset()

    def _reset(self) -> None:
        self.lock = threading.RLock()  # guards all below; slow reads need a connection, not it
        self.tending = threading.RLock()  # held by the one thread that tends
        self._own: _SpoolFile | None = None
        self._orphans: tuple[_SpoolFile, ...] = ()
        self._inbox: deque[bytes] = deque()  # logs that no file could take
        self._puts = 0
        self._retry_at = 0.0  # when a file that failed is tried again
        self._look_at = 0.0  # when orphans are to be looked for: some time after work was done
        self._others = (0.0, 0)  # until when, and how many bytes other files take
        self.found = 0  # logs that were taken over, and go before others: flushes allow for them
        self.lost = 0  # logs in damaged files, to be accounted for

    def fresh(self) -> SqliteSpool:
        """Return an unopened spool with the same settings: each client has files of its own."""
        spool = SqliteSpool(
            self.path,
            self.max_bytes,
            synchronous=self.synchronous,
            required=self.required,
        )
        if self.required:
            try:
                spool._own = spool._claim()
            except self._failures as exc:
                if _is_from_handler(exc):
                    raise
                raise ChirrOpError(f"spool {self.path} cannot be used: {exc}") from exc
        return spool

    def exists(self) -> bool:
        """Tell whether the spool has any file."""
        return bool(self._paths())

    def dead_letters(self, *, remove: bool = False) -> list[dict[str, Any]]:
        """Return the logs dropped for good, oldest first, as {"log": dict, "error": str}.

        All files of the spool are read, also while clients are using them.

        Args:
            remove: delete them as well.

        Raises:
            ChirrOpError: a file cannot be read, or is not a spool.
        """
        rows: list[tuple[bytes, str]] = []
        if remove:
            self.dead_letters()  # raises before anything is removed
        for path in self._paths():
            try:
                rows += self._dead_rows(path, remove)
            except self._failures as exc:
                if _is_from_handler(exc):
                    raise
                raise ChirrOpError(f"spool {path} cannot be read: {exc}") from exc
        return [{"log": _decoded(body), "error": error} for body, error in rows]

    def _dead_rows(self, path: str, remove: bool) -> list[tuple[bytes, str]]:
        _check_neighbours(path)
        found = _lstat(path)
        if found is None:  # its holder has just removed it
            return []
        _check_owner(path, found)
        if not found.st_size:
            return []
        conn = self._connect(path, "rw" if remove else "ro")
        try:
            if conn.execute("PRAGMA application_id").fetchall()[0][0] != _SPOOL_ID:
                raise _NoSpool("it is no spool")
            if remove:
                conn.execute("BEGIN IMMEDIATE")
            rows: list[tuple[bytes, str]] = conn.execute(_SQL_DEAD).fetchall()
            if remove:
                conn.execute("DELETE FROM logs WHERE error IS NOT NULL")
                conn.execute("COMMIT")
            return rows
        finally:
            conn.close()

    def _paths(self) -> list[str]:
        """Return the spool's files that exist, the first one first."""
        folder, base = os.path.split(self.path)
        if not os.path.isdir(folder):
            return []
        ends = [name[len(base) + 1 :] for name in os.listdir(folder) if name.startswith(f"{base}.")]
        numbers = sorted((end for end in ends if end.isdecimal()), key=int)
        paths = [self.path, *(f"{self.path}.{number}" for number in numbers)]
        return [path for path in paths if os.path.lexists(path)]

    def _connect(self, path: str, mode: str) -> Any:
        from urllib.parse import quote

        return self._sqlite3.connect(
            f"file:{quote(path)}?mode={mode}",
            timeout=_SPOOL_WAIT,
            isolation_level=None,  # a statement alone is a transaction
            check_same_thread=False,
            uri=True,
        )

    # Opening.

    def _claim(self) -> _SpoolFile:
        """Return the first file that nobody holds, made if need be."""
        others = (f"{self.path}.{number}" for number in range(2, _SPOOL_NAMES + 1))
        for path in itertools.chain([self.path], others):
            try:
                file = self._open(path, create=True)
            except _NoSpool:
                if path == self.path:
                    raise
                continue
            if file is not None:
                return file
        raise _NoSpool(f"{_SPOOL_NAMES} files of this spool are in use")

    def _open(self, path: str, create: bool) -> _SpoolFile | None:
        """Return a file that is ours alone from now on; None when somebody else holds it."""
        if not (self._is_there(path) or create):
            return None
        found = _lstat(path)
        if found is not None and (found.st_dev, found.st_ino) in _inherited:
            return None
        lock = _lock_file(path + "-lock")
        if lock is None:
            return None
        conn = None
        try:
            if not os.path.lexists(path):
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            _check_header(path)
            conn = self._connect(path, "rw")
            self._prepare(conn)
            file = _SpoolFile(path, lock, conn)
            _check_neighbours(path)  # SQLite has made them by now, or found somebody else's
        except BaseException as exc:
            if conn is not None:
                conn.close()
            if self._is_damage(exc):
                self._set_aside(path)
            _unlock_file(lock)
            raise
        if os.lstat(path).st_mode & 0o077 and os.name == "posix":
            self.warn(f"spool {path} can be read by other users: chmod 600 it")
        return file

    @staticmethod
    def _is_there(path: str) -> bool:
        """Tell whether there is a file that is not empty; refuse what could be used against us."""
        _check_neighbours(path)
        found = _lstat(path)
        if found is not None:
            _check_owner(path, found)
            if found.st_size:
                return True
        for suffix in ("-wal", "-shm"):
            if os.path.lexists(path + suffix):
                raise _NoSpool(f"{os.path.basename(path)}{suffix} is there already")
        return False

    def _prepare(self, conn: Any) -> None:
        for statement in _SQL_CREATE:
            conn.execute(statement)
        conn.execute("PRAGMA journal_mode = WAL").fetchall()
        conn.execute("PRAGMA wal_autocheckpoint = 0").fetchall()  # tend() does it
        conn.execute(f"PRAGMA synchronous = {self.synchronous}")

    @_guarded
    def _usable(self) -> _SpoolFile | None:
        """Return the file that this client writes to, opened if need be; None if there is none."""
        if self.is_over():  # what comes now is not stored, and what is in the files, not sent
            return None
        due = time.monotonic() >= self._retry_at
        if self._own is None and due and not _is_inside(SqliteSpool._claim.__code__):
            try:
                self._own = self._claim()
            except self._failures as exc:
                if _is_from_handler(exc):
                    raise
                self._trouble(None, exc)
        return self._own

    def _aside(self, file: _SpoolFile, sql: str, *args: Any) -> list[Any]:
        """Return the rows of a statement that takes its time, which must not hold up a log.

        Not the file's own connection: closing that in another thread would end the process.
        """
        conn = self._connect(file.path, "rw")
        try:
            return conn.execute(sql, args).fetchall()
        finally:
            conn.close()

    def _attempt(self, file: _SpoolFile, work: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
        """Return (work(*args),); () when the disk or SQLite fails, which is then dealt with."""
        if file.conn is None:
            return ()
        try:
            return (work(*args),)
        except (*self._failures, AttributeError) as exc:  # the last: it was given up meanwhile
            if _is_from_handler(exc):
                raise
            self._trouble(file, exc)
            return ()

    @_guarded
    def _trouble(self, file: _SpoolFile | None, exc: Exception) -> None:
        """Say what is wrong with a file, and give up a damaged one."""
        if file is not None and file.conn is None:
            return  # another thread has done so
        if file is not None and self._is_damage(exc):
            self.lost += file.known
            file.conn.close()
            self._set_aside(file.path)  # before somebody else may hold a file of this name
            self._give_up(file)
            self._look_soon(_ADOPT_SECONDS)  # it may have stood for others
        else:
            self._retry_at = time.monotonic() + SPOOL_RETRY_SECONDS
        self.warn(f"spool {self.path} cannot be used, keeping new logs in memory: {exc}")

    def _is_damage(self, exc: BaseException) -> bool:
        """Tell damage from a matter of the disk or of locks."""
        sqlite3, text = self._sqlite3, str(exc)
        if isinstance(exc, sqlite3.ProgrammingError):  # it was closed
            return False
        if isinstance(exc, sqlite3.OperationalError):  # some damage is reported as one
            return any(words in text for words in ("no such", "malformed", "UTF-8"))
        return isinstance(exc, (sqlite3.DatabaseError, ValueError, OverflowError, TypeError))

    @_guarded
    def _give_up(self, file: _SpoolFile) -> None:
        try:
            file.close(removable=file.path != self.path)  # the first one stays
        except (OSError, AttributeError, self._sqlite3.Error):
            pass  # it is damaged, or was closed before
        if file is self._own:
            self._own = None
        self._orphans = tuple(orphan for orphan in self._orphans if orphan is not file)

    def _set_aside(self, path: str) -> None:
        stamp = f"{time.strftime('%Y%m%dT%H%M%S')}-{os.urandom(2).hex()}"
        for suffix in ("", "-wal", "-shm"):
            try:
                os.replace(path + suffix, f"{self.path}.damaged-{stamp}{suffix}")
            except OSError:
                pass  # there is none

    # Logs in, batches out.

    @_guarded
    def put(self, data: bytes) -> None:
        """Commit one log before returning; where no file takes it, it waits in memory."""
        file = None if self._inbox else self._usable()
        if self.max_bytes and file is not None and any(self._attempt(file, self._is_full, file)):
            raise ChirrOpQueueFullError(
                f"spool is full: {self.path} has reached {self.max_bytes} bytes"
            )
        if file is None or not self._attempt(file, file.add, data):
            self._inbox.append(data)
        self._puts += 1

    def level(self) -> int:
        """Return how many logs have been put."""
        return self._puts

    def is_unknown(self) -> bool:
        """Tell whether there are rows that could not be counted."""
        return any(file.count is None for file in self._files())

    def is_open(self) -> bool:
        """Tell whether a file is held."""
        return bool(self._files())

    def _is_full(self, file: _SpoolFile) -> bool:
        names = ("page_size", "page_count", "freelist_count")
        size, pages, free = (file.conn.execute(f"PRAGMA {name}").fetchall()[0][0] for name in names)
        until, others = self._others
        if time.monotonic() >= until:
            found = [_lstat(path) for path in self._paths() if path != file.path]
            others = sum(other.st_size for other in found if other is not None)
            self._others = (time.monotonic() + 1.0, others)
        # Four pages of reserve: one log may split pages up to the root.
        return (pages - free + 4) * size + others > self.max_bytes

    def _files(self) -> list[_SpoolFile]:
        return [file for file in (*self._orphans, self._own) if file is not None]

    def size(self) -> int:
        """Return how many logs wait in the files held and in memory."""
        if self.is_over():
            return len(self._inbox)
        return len(self._inbox) + self._rows()

    def _rows(self) -> int:
        batches = self.batches()
        for file in self._files():
            self._attempt(file, file.size, batches)
        # Where it could not look, what it knew: no flush may take them for sent.
        return sum(file.known for file in self._files())

    def fill(self, batch: _Batch, limit: int = MAX_BATCH) -> None:
        """Put the oldest logs into an empty batch; in a file they stay until it is settled."""
        for file in self._files():
            if file.count is not None and not batch.items and not self.is_over():
                self._attempt(file, file.fill, batch, self.batches())
        if not batch.items:
            _move(self._inbox, batch, limit)

    def settle(self, batch: _Batch, error: str | None) -> None:
        """Remove a batch's logs from their file, or make them dead letters."""
        file, ids, number = batch.place
        if file is None or file.conn is None:
            return
        span = (ids[0], ids[-1])
        if error is None:
            file.undone.append((_SQL_DELIVERED, span))
        else:
            file.undone.append((_SQL_DROPPED, (error, *span)))
        file.settled = max(file.settled, (ids[-1], number))
        self._look_soon(_ADOPT_SECONDS)
        self._attempt(file, file.work_off)

    def stays(self, batch: _Batch) -> bool:
        """Tell whether a batch's logs wait in a file."""
        file, ids, _ = batch.place
        if file is None or file.conn is None:
            return False
        if not batch.answers:
            return True
        # Its sender may have been interrupted after the file was changed, and before the account.
        query = _SQL_WAITING, (ids[0], ids[-1])
        rows = self._attempt(file, lambda: file.conn.execute(*query).fetchall())
        return rows == ([(len(ids),)],)

    def leave(self) -> int:
        """Store what can be stored, and return how many logs the next client on this path finds."""
        file = self._usable()
        if file is not None:
            self._store_inbox(file)
        for held in self._files():
            self._attempt(held, held.work_off)
        return self._rows() + sum(len(b.items) for b in self.batches() if self.stays(b))

    def close(self) -> None:
        """Close the files; not under the lock, for which the thread that tends may be waiting."""
        _exclusively(self.tending, self._close)

    def _close(self) -> None:
        for file in self._files():
            self._let_go(file)

    # What takes its time: by one thread at a time, most of it without the lock.

    def tend(self) -> float:
        """Move logs from memory to the file, take over orphans, and keep the WAL small."""
        return _exclusively(self.tending, self._tend)

    def _tend(self) -> float:
        file = self._usable()
        if file is not None and time.monotonic() >= self._retry_at:
            self._store_inbox(file)
        if time.monotonic() >= self._look_at and not self.is_over():
            self._look_at = math.inf
            if not self._take_over():
                self._look_soon(SPOOL_RETRY_SECONDS)
        for held in self._files():
            if held.count is None:
                self._attempt(held, self._count, held)
            if held.undone:
                _exclusively(self.lock, self._attempt, held, held.work_off)
            self._attempt(held, self._checkpoint, held)
        for orphan in self._orphans:
            if self._is_done(orphan):
                self._let_go(orphan)
                self._look_at = 0.0  # there may be more
        return max(0.0, self._look_at - time.monotonic())

    def _look_soon(self, seconds: float) -> None:
        self._look_at = min(self._look_at, time.monotonic() + seconds)

    def _store_inbox(self, file: _SpoolFile) -> None:
        for _ in range(len(self._inbox)):
            if not _exclusively(self.lock, self._attempt, file, file.move, self._inbox):
                return

    def _count(self, file: _SpoolFile) -> None:
        ((count,),) = self._aside(file, _SQL_WAITING, 1, file.last)
        self._found(file, count)

    @_guarded
    def _found(self, file: _SpoolFile, count: int) -> None:
        self.found += count
        file.known += count
        file.count = count

    def _take_over(self) -> bool:
        """Hold what dead processes left and logs wait in; False if some cannot be had now."""
        held = {file.path for file in self._files()}
        done = True
        try:
            paths = self._paths()
        except OSError as exc:
            if _is_from_handler(exc):
                raise
            return False
        for path in paths:
            if path in held:
                continue
            if len(self._orphans) >= _ORPHANS:
                break
            try:
                file = self._open(path, create=False)
                if file is not None:
                    self._keep(file)
            except self._failures as exc:
                if _is_from_handler(exc):
                    raise
                done = done and isinstance(exc, _NoSpool)
        return done

    def _keep(self, orphan: _SpoolFile) -> None:
        read = orphan.conn.execute
        rows = self._attempt(orphan, lambda: read(_SQL_READ, (0, 1)).fetchall())
        if any(rows):
            _exclusively(self.lock, self._enlist, orphan)
        else:
            self._give_up(orphan)

    def _enlist(self, orphan: _SpoolFile) -> None:
        self._orphans += (orphan,)

    def _let_go(self, file: _SpoolFile) -> None:
        """Give up a file after what takes its time, which would else be done under the lock."""
        self._attempt(file, self._shrink, file)
        self._attempt(file, self._aside, file, "PRAGMA wal_checkpoint(PASSIVE)")
        self._give_up(file)

    @_guarded
    def _is_done(self, orphan: _SpoolFile) -> bool:
        """Tell whether all logs of an orphan have been settled."""
        batches = self.batches()
        if any(batch.place[0] is orphan for batch in batches) or orphan.undone:
            return False
        return orphan.count is not None and self._attempt(orphan, orphan.size, batches) == (0,)

    def _shrink(self, file: _SpoolFile) -> None:
        """Give the disk back what a drained file has taken, if it is the one that stays."""
        if file.path == self.path and not self._aside(file, _SQL_READ, 0, 1):
            ((free,),) = self._aside(file, "PRAGMA freelist_count")
            if free > _FREE_PAGES:
                self._aside(file, "VACUUM")
                self._aside(file, "PRAGMA wal_checkpoint(TRUNCATE)")

    def _checkpoint(self, file: _SpoolFile) -> None:
        """Copy the WAL into the file, when much has been written since the last time."""
        if file.conn.total_changes - file.changes >= _TEND_ROWS:
            self._attempt(file, self._aside, file, "PRAGMA wal_checkpoint(PASSIVE)")
            _exclusively(self.lock, self._attempt, file, self._finish_checkpoint, file)

    def _finish_checkpoint(self, file: _SpoolFile) -> None:
        """Begin the WAL anew, after most of it has been copied while others went on writing."""
        file.conn.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        # The first commit of a new WAL syncs the disk: better this one than that of a log.
        file.conn.execute(f"PRAGMA user_version = {_SPOOL_VERSION}")
        file.changes = file.conn.total_changes

    def after_fork(self) -> None:
        """Leave the files to the parent; this process will make one of its own."""
        for file in self._files():
            try:
                found = os.stat(file.path)
                _inherited[found.st_dev, found.st_ino] = file.conn
            except OSError:
                _inherited[-1, file.lock_file.fileno()] = file.conn
            file.lock_file.close()  # the parent's own descriptor keeps the lock
        self._reset()


def _decoded(body: bytes) -> dict[str, Any]:
    """Return the dict of an encoded log, also of one that a damaged disk has changed."""
    try:
        log = json.loads(body)
        return log if isinstance(log, dict) else {"damaged": repr(body)}
    except (ValueError, TypeError):
        return {"damaged": repr(body)}


# ---- Retry policy ---------------------------------------------------------
# No state: what an answer means, how long to wait before the next attempt, which error to show.

_DELIVERED, _RETRY, _HOLD, _REFUSED = "delivered", "retry", "hold", "refused"
_SPLIT, _HALVE = "split", "halve"

# What an answer means, by its status, else by its hundreds; "0xx" is no answer at all. What neither
# table lists is final.
_INGEST: dict[object, str] = {
    "0xx": _RETRY,
    "1xx": _RETRY,
    "2xx": _DELIVERED,
    "5xx": _RETRY,
    400: _SPLIT,  # some logs of the batch are bad
    408: _RETRY,
    413: _HALVE,  # the batch is too large
    422: _SPLIT,
    429: _RETRY,
    500: _HOLD,  # counts as if all retries had failed
    503: _HOLD,
}
_CONTROL: dict[object, str] = {
    "0xx": _RETRY,
    "1xx": _RETRY,
    "2xx": _DELIVERED,
    "5xx": _RETRY,
    408: _RETRY,
    429: _RETRY,
    500: _REFUSED,
    503: _REFUSED,
}


def _verdict(table: dict[object, str], status: int) -> str:
    """Return what an answer means to a batch or to a call of the control plane."""
    return table.get(status) or table.get(f"{status // 100}xx", _REFUSED)


# Whoever sends in the caller's thread: what answers mean, how many further attempts there are, the
# seconds for each, and the longest Retry-After, in seconds, that is waited for.
_Policy = namedtuple("_Policy", "verdicts retries timeout longest")


def _is_delivered(answers: list[Any]) -> bool:
    """Tell whether what a transport returned, whatever that is, says that a batch was taken."""
    try:
        return _verdict(_INGEST, answers[0][0]) == _DELIVERED
    except (IndexError, TypeError):
        return False


def _error_class(status: int) -> type[ChirrOpError]:
    """Return the class of the error that stands for an answer other than 2xx."""
    other = ChirrOpServerError if status >= 500 or status < 200 else ChirrOpNonRetryableError
    return _ERROR_BY_STATUS.get(status, other)


def _backoff(attempt: int, retry_after: float | None, rand: Callable[[], float]) -> float:
    """Return seconds to wait after failed attempt `attempt` (1 is the first).

    Full jitter, on top of the server's wait when it gave one: clients cut off together return
    apart. `rand` returns a float in [0, 1).
    """
    window = min(BACKOFF_CAP, BACKOFF_BASE * 2.0 ** min(attempt - 1, 32))
    return (retry_after or 0.0) + rand() * window


def _random() -> float:
    """Return a float in [0, 1) that a cloned or forked process does not share."""
    return int.from_bytes(os.urandom(6), "big") / 2.0**48


def _retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds of a Retry-After header, at most MAX_RETRY_AFTER; None if it has none.

    `now` is Unix seconds, for the header's other form, an HTTP date.
    """
    text = headers.get("retry-after", "").strip()
    if not text:
        return None
    if not text.strip("0123456789.") and text.count(".") <= 1 and text != ".":
        return min(MAX_RETRY_AFTER, float(text))
    moment = _unix_seconds(text)
    if moment is None:
        return None
    return min(MAX_RETRY_AFTER, max(0.0, moment - now))


def _unix_seconds(date: str) -> float | None:
    """Return the moment of an HTTP date; None where it is none."""
    import email.utils

    try:
        moment = email.utils.parsedate_to_datetime(date)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=timezone.utc)
        return moment.timestamp()
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


class _NeverSent(ConnectionError):
    """No connection could be made, so the request did not reach the server."""


class _Answer:
    """What became of one attempt: a status with its body and headers, or 0 and the exception.

    The names of the headers are in lower case.
    """

    __slots__ = ("status", "body", "headers", "cause")

    def __init__(
        self,
        status: int,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        cause: BaseException | None = None,
    ) -> None:
        self.status, self.body, self.cause = status, body, cause
        self.headers: Mapping[str, str] = headers or {}

    def never_sent(self) -> bool:
        """Tell whether the request certainly did not reach the server: no connection was made."""
        return isinstance(self.cause, (ConnectionRefusedError, _NeverSent))

    def error(self) -> ChirrOpError:
        """Return the exception that stands for an answer other than 2xx."""
        if self.status == 0:
            failure = ChirrOpTransportError(f"no answer: {self._no_answer()}")
            failure.__cause__ = self.cause
            return failure
        text = self.body.decode("utf-8", "replace").strip("\ufeff \t\r\n")
        parsed = _json_value(text)
        texts, code = _spoken(parsed)
        kept: Any = text[:MAX_KEPT_BYTES] or None
        if parsed is not None and len(self.body) <= MAX_KEPT_BYTES:
            kept = parsed
        return _error_class(self.status)(
            f"HTTP {self.status}: {_one_line(self._telling(texts or [text[:200]]))}",
            status_code=self.status,
            code=code and _one_line(code),
            body=kept,
            retry_after=_retry_after(self.headers, time.time()),
        )

    def _no_answer(self) -> str:
        detail = _one_line(str(self.cause) or type(self.cause).__name__)
        if "Tunnel connection failed: 407" in detail:
            detail += f"; {_proxy_advice('https')}"
        return detail

    def _telling(self, texts: list[str]) -> str:
        """Return the first text that says more than the status does; markup is not for people."""
        import http

        if 300 <= self.status < 400:
            place = self.headers.get("location", "").partition("?")[0]
            there = place and f", this one leads to {place}"
            return f"redirects are not followed{there}; check the endpoint"
        if self.status == 407:
            return _proxy_advice("http")
        known = {int(status): status.phrase.lower() for status in http.HTTPStatus}
        phrase = known.get(self.status, "no message")
        for text in texts:
            if text and text.lower() != phrase and not text.startswith("<"):
                return text
        if "server" in self.headers:
            phrase += f" (from {self.headers['server']})"
        return phrase


def _json_value(text: str) -> Any:
    """Return the value of a JSON text; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        if _is_our_own(exc) or _is_from_handler(exc):
            raise
        return None


def _spoken(parsed: Any) -> tuple[list[str], str | None]:
    """Return the texts of an error's JSON, the more telling first, and the service's code."""
    outer = _object(parsed)
    error = outer.get("error")
    inner = _object(error)
    code = inner.get("code") or outer.get("code")
    if not isinstance(code, str):
        code = None
    texts = [inner.get("message"), outer.get("message"), error, code]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()], code


def _object(value: Any) -> dict[str, Any]:
    """Return what JSON has as an object; {} for anything else."""
    if isinstance(value, dict):
        return value
    return {}


def _one_line(text: str) -> str:
    """Return text fit for logs, terminals and the spool: short, without control characters."""
    return _printable(text[:500])


def _printable(text: str) -> str:
    """Return text without the control characters with which a server could steer a terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _proxy_advice(scheme: str) -> str:
    """Return what to do about a 407, and in which variable: where urllib found the proxy."""
    names = [name for name in os.environ if name.lower() == f"{scheme}_proxy"]
    source = max(names, default="the system's settings")  # the one in lower case wins
    return f"the proxy wants a password: give it as http://user:password@host:port in {source}"


# ---- Outbox ---------------------------------------------------------------
# In: the buffer's logs, and the answers to batches. Out: the next batch. All decisions on delivery
# and the whole account are here, without threads, waiting or I/O but the buffer's: `now` is an
# argument, so a test can turn the clock by hand. The state is replaced as a whole, under the lock:
# whatever interrupts a step, either nothing has happened or all of it.


_Drop = namedtuple("_Drop", "items error")  # items: what on_drop is to get
_State = namedtuple(
    "_State",
    (
        "batches",  # filled and not settled, in the order in which they are to be sent
        "settled",  # logs that have left the buffer and were delivered or dropped
        "delivered",
        "dropped",  # reason -> logs
        "untold",  # drops that on_drop has not heard of
        "unsaid",  # reason -> (logs that records have told of, the first message since then)
        "retries",
        "failures",  # in a row, over all batches; concurrent ones count once
        "resume_at",  # end of the backoff
        "width",  # requests that may be in flight at once
        "last_error",
        "stopped",  # sends no more
        "clean",  # all was delivered when it stopped
        "left",  # logs that stayed in the spool when it stopped
        "counted",  # the last refusal that is in the account
    ),
    defaults=((), 0, 0, {}, (), {}, 0, 0, 0.0, 1, None, False, False, 0, None),
)


class Stats(namedtuple("Stats", "accepted delivered dropped queued in_flight retries last_error")):
    """The account of one client at one moment; counts are logs.

    Always accepted == delivered + sum(dropped.values()) + queued + in_flight.

    Attributes:
        accepted: taken by log(), delivered by send_logs() or dropped by try_log(); and left-overs
            of a spool, once they have been counted.
        delivered: the server has them.
        dropped: reason to count: "rejected" (400, 413, 422, alone), "undecided" (in a batch so bad
            that the search for the bad ones was given up), "refused" (401, 403, 404, 3xx and other
            final answers), "exhausted" (with on_exhausted="drop"), "closed" (not sent before close
            or exit, or logged after), "damaged" (in a spool file that was moved aside), "invalid"
            and "full" (try_log).
        queued: waiting, for their turn or for another attempt.
        in_flight: in a request that is under way.
        retries: attempts that had to be repeated.
        last_error: the newest failure, or None.
    """

    __slots__ = ()
    accepted: int
    delivered: int
    dropped: dict[str, int]
    queued: int
    in_flight: int
    retries: int
    last_error: ChirrOpError | None


class _Flush:
    """A caller that waits for every log before `mark`."""

    def __init__(self) -> None:
        self.mark = 0  # in the order in which logs leave the buffer
        self.retries = 0  # how many there had been when it began
        self.clean = True


class _Outbox:
    """What waits and what is on its way; see the head of this section."""

    def __init__(self, buffer: Any, config: Config, rand: Callable[[], float] = _random) -> None:
        self.buffer, self._config, self._rand = buffer, config, rand
        buffer.batches = self.batches
        buffer.is_over = lambda: self.state.stopped
        self._start()

    def _start(self) -> None:
        self.state = _State()
        self.closed = False  # takes no more logs; not in the state, so that any code may set it
        # What was dropped before it was queued, and is not counted yet: reason, logs, error.
        self.refusals: deque[tuple[str, list[bytes] | None, ChirrOpError]] = deque()
        self.flushes: list[_Flush] = []
        self._since: float | None = None  # when the oldest waiting log was first seen

    def after_fork(self) -> None:
        """Start empty in a child process: the logs, locks and waiting callers are the parent's."""
        self.buffer.after_fork()
        self._start()

    @property
    def lock(self) -> Any:
        return self.buffer.lock

    def batches(self) -> tuple[_Batch, ...]:
        """Return the batches that are filled and not settled, the next one first."""
        return tuple(batch for batch in self.state.batches if batch.items)

    # Logs in. Without a bound, put() is the buffer's own.

    @_guarded
    def offer(self, data: bytes) -> bool:
        """Accept one log, unless the queue is bounded and full."""
        if self.is_full():
            return False
        self.buffer.put(data)
        return True

    @_guarded
    def is_full(self) -> bool:
        return 0 < self._config.queue_size <= self.held()

    @_guarded
    def held(self) -> int:
        """Return the number of logs that may still be delivered by this client."""
        return self.buffer.size() + sum(len(batch.items) for batch in self.state.batches)

    @_guarded
    def count_delivered(self, count: int) -> None:
        """Account for logs that send_logs has delivered."""
        self._set(delivered=self.state.delivered + count)

    def refuse(self, reason: str, items: list[bytes] | None, error: ChirrOpError) -> None:
        """Account for a log that is dropped before it is queued; see _dropped."""
        self.refusals.append((reason, items, error))
        self.count_refusals()

    def count_refusals(self) -> None:
        """Take them into the account; nothing where this interrupts a change of it: later, then."""
        if self.refusals and not self.lock._is_owned():
            self._count_refusals()

    @_guarded
    def _count_refusals(self) -> None:
        while self.refusals:
            refusal = self.refusals[0]
            reason, items, error = refusal
            if refusal is not self.state.counted:  # else interrupted before it was taken out
                state = self.state._replace(counted=refusal)
                self.state = self._dropped(state, reason, 1, items, error)
            self.refusals.popleft()

    def _dropped(
        self, state: _State, reason: str, count: int, items: list[bytes] | None, error: ChirrOpError
    ) -> _State:
        """Return the state after a drop: counted, and to be reported.

        on_drop gets `items`; None: it is not told, of what it has logged itself.
        """
        unsaid = state.unsaid.get(reason, (state.dropped.get(reason, 0), str(error)))
        untold = state.untold
        if items is not None and self._config.on_drop is not None:
            untold = (*untold, _Drop(items, error))
        return state._replace(
            dropped={**state.dropped, reason: state.dropped.get(reason, 0) + count},
            untold=untold[:MAX_UNTOLD],
            unsaid={**state.unsaid, reason: unsaid},
            last_error=error,
        )

    def _set(self, **changes: Any) -> None:
        self.state = self.state._replace(**changes)

    # Batches out.

    @_guarded
    def due_in(self, now: float) -> float:
        """Return seconds until take() will have a batch, if nothing happens meanwhile."""
        if self._is_busy():
            return math.inf
        waiting = [batch for batch in self.batches() if not batch.holder]
        moments = [batch.not_before for batch in waiting]
        size = self.buffer.size()
        self._catch_up()
        if size and len(waiting) < MAX_WAITING:
            moments.append(self._departure(size, now))
        return max(0.0, max(min(moments, default=math.inf), self.state.resume_at) - now)

    def _is_busy(self) -> bool:
        """Tell whether no further request may be made now."""
        flying = sum(1 for batch in self.state.batches if batch.holder)
        return self.state.stopped or flying >= self.state.width

    def _departure(self, size: int, now: float) -> float:
        """Return when the logs that wait in the buffer are to be sent."""
        if self._since is None:
            self._since = now
        full = size >= self._config.batch_size or self.is_full()
        wanted = self.closed or any(flush.mark > self._taken() for flush in self.flushes)
        if full or wanted:
            return now
        return self._since + self._config.flush_delay

    @_guarded
    def wake_level(self, now: float) -> float:
        """Return the level of the buffer from which on put() should wake a sender that waits."""
        size = self.buffer.size()
        more = self._config.batch_size - size if size else 1
        if self._is_busy() or (size and now < self.state.resume_at):
            more = _TEND_ROWS  # nothing could be sent; but the buffer may need tending
        return self.buffer.level() + max(1, more)

    def _taken(self) -> int:
        """Return how many logs have been taken from the buffer."""
        return self.state.settled + sum(len(batch.items) for batch in self.state.batches)

    @_guarded
    def take(self, now: float, holder: int) -> _Batch | None:
        """Return a batch whose time has come, held by the thread `holder` from now on; never waits.

        Whoever asks for a batch holds none: what it did hold, an exception has made it give up.
        """
        self.release(holder)
        if self.due_in(now) != 0.0:
            return None
        waiting = (b for b in self.batches() if not b.holder and b.not_before <= now)
        batch = next(waiting, None) or self._fill(now)
        if batch is not None:
            batch.era = self.state.failures
            batch.holder = holder
        return batch

    def _fill(self, now: float) -> _Batch | None:
        """Return a batch of the buffer's oldest logs; None if there are none, or none to be had."""
        batch = self._begin_batch()
        self.buffer.fill(batch)
        self._catch_up()
        self._since = now if self.buffer.size() else None
        if batch.items:
            return batch
        if self._since is not None:  # in a file that cannot be read now
            self._set(resume_at=max(self.state.resume_at, now + 1.0))
        return None

    def _begin_batch(self) -> _Batch:
        """Return a batch that is in the state already, in the place of one that stayed empty."""
        batch = _Batch(self._taken())
        self._set(batches=(*self.batches(), batch))
        return batch

    @_guarded
    def release(self, holder: int) -> None:
        """Let the batch of a thread that sends no more wait for another attempt."""
        for batch in self.state.batches:
            if batch.holder == holder:
                batch.holder = 0

    # Answers in.

    @_guarded
    def settle(self, batch: _Batch, verdict: str, error: ChirrOpError | None, now: float) -> str:
        """Account for the answer to a batch; the error is None if it was delivered.

        Returns the verdict, or what it came to.
        """
        if not any(batch is other for other in self.state.batches):
            return verdict  # close() has given it up meanwhile
        if verdict == _REFUSED and self._config.on_exhausted == "keep" and self.buffer.stays(batch):
            verdict = _HOLD  # a key can be renewed, and a quota ends with its month
        state = self._without(batch)
        # Disk before account: a crash between them repeats a log under its log_id, but loses none.
        if error is None:
            self.buffer.settle(batch, None)
            self.state = self._delivered(state, batch)
        elif verdict in (_RETRY, _HOLD):
            self._fail(state, batch, verdict, error, now)
        elif verdict == _REFUSED:
            self._drop(state._replace(failures=0), batch, "refused", error)
        else:
            self._split(state, batch, verdict, error)
        return verdict

    def _without(self, batch: _Batch) -> _State:
        others = tuple(other for other in self.state.batches if other is not batch)
        return self.state._replace(batches=others)

    def _delivered(self, state: _State, batch: _Batch) -> _State:
        backlog = self.buffer.size() >= MAX_BATCH
        width = state.width
        if backlog:
            width = min(width + 1, self._config.max_senders)
        count = len(batch.items)
        return state._replace(
            settled=state.settled + count,
            delivered=state.delivered + count,
            failures=0,
            width=width,
        )

    def _fail(
        self, state: _State, batch: _Batch, verdict: str, error: ChirrOpError, now: float
    ) -> None:
        """Let a batch wait for another attempt, or drop it when it has had them all."""
        failures = max(1, state.failures + (batch.era == state.failures))
        pause = _backoff(failures, error.retry_after, self._rand)
        state = state._replace(
            failures=failures,
            resume_at=max(state.resume_at, now + pause),
            width=1,
            last_error=error,
        )
        attempts = batch.attempts + 1
        exhausted = verdict == _HOLD or attempts > self._config.retries
        if exhausted and self._config.on_exhausted == "drop":
            self._drop(state, batch, "exhausted", error)
            return
        again = batch.part(0, len(batch.items))
        again.attempts = attempts
        if exhausted:  # others may be sent while it waits: the fault may be its own
            again.not_before = now + BACKOFF_CAP
        self.state = state._replace(batches=(again, *state.batches), retries=state.retries + 1)

    def _split(self, state: _State, batch: _Batch, verdict: str, error: ChirrOpError) -> None:
        """Halve a rejected batch until the offending logs stand alone."""
        count = len(batch.items)
        state = state._replace(failures=0, last_error=error)
        undecided = verdict == _SPLIT and batch.spent[0] + 2 > MAX_SPLIT_REQUESTS
        if count == 1 or undecided:
            self._drop(state, batch, "rejected" if count == 1 else "undecided", error)
            return
        if verdict == _SPLIT:
            batch.spent[0] += 2
        middle = (count + 1) // 2
        halves = batch.part(0, middle), batch.part(middle, count)
        self.state = state._replace(batches=state.batches + halves)  # larger parts come first

    def _drop(self, state: _State, batch: _Batch, reason: str, error: ChirrOpError) -> None:
        self.buffer.settle(batch, str(error))
        for flush in list(self.flushes):
            if batch.first < flush.mark:
                flush.clean = False
        state = state._replace(settled=state.settled + len(batch.items))
        self.state = self._dropped(state, reason, len(batch.items), batch.items, error)

    def _catch_up(self) -> None:
        """Account for what a spool has taken over, or lost, since this was asked last."""
        found, self.buffer.found = self.buffer.found, 0
        lost, self.buffer.lost = self.buffer.lost, 0
        for flush in list(self.flushes):
            flush.mark += found  # is sent first
            flush.clean &= not lost
        if lost:  # with a damaged file; nobody can read them any more
            state = self.state._replace(settled=self.state.settled + lost)
            error = ChirrOpError("they are in a damaged spool file")
            self.state = self._dropped(state, "damaged", lost, [], error)

    # Flush and close.

    @_guarded
    def begin_flush(self, now: float, flush: _Flush | None = None) -> _Flush:
        """Return a flush, or begin this one, of what is held now; a backoff in progress ends."""
        flush = flush or _Flush()
        flush.clean = not self.buffer.is_unknown()
        self.flushes.append(flush)
        for batch in self.state.batches:
            batch.not_before = 0.0
        self._set(resume_at=min(self.state.resume_at, now))
        size = self.buffer.size()
        self._catch_up()
        flush.mark, flush.retries = self._taken() + size, self.state.retries
        return flush

    def end_flush(self, flush: _Flush) -> None:
        """Forget a flush whose caller has stopped waiting."""
        if flush in self.flushes:
            self.flushes.remove(flush)

    @_guarded
    def outcome(self, flush: _Flush) -> bool | None:
        """Return what a flush has come to: True if all was delivered; None while it goes on."""
        state = self.state
        if state.stopped:
            return False
        unsettled = [batch for batch in self.batches() if batch.first < flush.mark]
        # Nothing may wait before the mark is reached: somebody has removed rows by hand.
        taken = self._taken() >= flush.mark or not self.buffer.size()
        if taken and all(batch.not_before for batch in unsettled):
            return flush.clean and not unsettled
        # A full cycle of retries that has failed for one batch stands for all.
        failed = state.retries > flush.retries and state.failures > self._config.retries
        if failed:
            return False
        return None

    def stop(self, clean: bool) -> None:
        """End all sending: what is still held stays in the spool, or is dropped.

        A request still in flight no longer counts, whatever becomes of it.
        """
        self._stop(clean)
        self.buffer.close()
        why = "not sent before close"
        if self.state.last_error is not None:
            why += f"; the last failure: {self.state.last_error}"
        self._sweep(why)
        self.count_refusals()

    @_guarded
    def _stop(self, clean: bool) -> None:
        for batch in self.state.batches:
            batch.bodies.clear()
            if _is_delivered(batch.answers):  # its sender has not come to account for it
                self.settle(batch, _DELIVERED, None, 0.0)
        state = self.state
        if not state.stopped:
            held, left = self.held(), self.buffer.leave()
            self._set(
                batches=tuple(batch for batch in state.batches if not self.buffer.stays(batch)),
                stopped=True,
                clean=clean and not held,
                left=left,
            )

    def sweep(self) -> None:
        """Drop what was logged while it stopped, unless this thread holds the lock already."""
        if not self.lock._is_owned():
            self._sweep("logged after close")

    @_guarded
    def _sweep(self, why: str) -> None:
        self.buffer.fill(self._begin_batch(), sys.maxsize)
        for batch in self.batches():
            self._drop(self._without(batch), batch, "closed", ChirrOpError(why))
        self._catch_up()

    # The account.

    def stats(self) -> Stats:
        self.count_refusals()
        return self._stats()

    @_guarded
    def _stats(self) -> Stats:
        state = self.state
        flying = sum(len(batch.items) for batch in state.batches if batch.holder)
        queued = state.left + self.held() - flying  # what stays in the spool is no longer held
        return Stats(
            accepted=state.delivered + sum(state.dropped.values()) + queued + flying,
            delivered=state.delivered,
            dropped=dict(state.dropped),
            queued=queued,
            in_flight=flying,
            retries=state.retries,
            last_error=state.last_error,
        )

    @_guarded
    def told(self, drop: _Drop) -> None:
        """on_drop has heard of a drop."""
        self._set(untold=tuple(other for other in self.state.untold if other is not drop))

    @_guarded
    def said(self, reason: str, count: int) -> None:
        """Log records have told of so many drops, from the first one on."""
        unsaid = dict(self.state.unsaid)
        if reason not in unsaid:
            return  # two threads have written
        before, text = unsaid.pop(reason)
        if count < self.state.dropped[reason]:
            unsaid[reason] = (max(before, count), text)
        self._set(unsaid=unsaid)


# ---- Reporter and sender --------------------------------------------------
# In: batches from the outbox. Out: one request per batch, and word of what was dropped.
#   a caller of log()          puts what Log() has encoded: without a lock in memory (a bounded
#                              queue takes the client's), with it and one commit with a spool; rings
#                              the bell if its log is the first of a batch, or makes one full
#   thread "chirrop-sender-N"  waits, in turn with the others (_lead), for the next batch and sends
#                              it; holds no lock while a request is under way; of the application
#                              it runs the transport
#   thread "chirrop-reporter"  now and then: runs on_drop, and the logging module's handlers
#   a caller of flush, close   waits, and has records written; where no thread can be had, at exit
#                              above all, it does the work of both itself
# Whether a thread is inside one of these is read from its stack: a flag could outlive an
# interrupted call.

_WARNING, _ERROR, _INFO = 30, 40, 20  # the logging module's levels


class _Bell:
    """Wake a thread that waits, or the next one to wait; any code may ring it.

    A plain lock, because an Event is not re-entrant, and SimpleQueue.get(timeout) hangs for ever
    before Python 3.13 when its time is over before it has begun to wait.
    """

    def __init__(self) -> None:
        self._silent = threading.Lock()
        self._silent.acquire()
        self.is_silent = self._silent.locked  # nobody has rung it since it was heard

    def ring(self) -> None:
        try:
            self._silent.release()
        except RecursionError:
            raise
        except RuntimeError:  # it has been rung already
            pass

    def wait(self, timeout: float) -> bool:
        """Return True when it is rung, False after `timeout` seconds, which may be infinite."""
        return self._silent.acquire(timeout=min(timeout, threading.TIMEOUT_MAX))


def _has_no_threads() -> bool:
    """Tell whether uWSGI forbids threads.

    In its master, which forks in C, a busy one would hang the children; in a worker without its
    `enable-threads` one could be made, but would never run.
    """
    uwsgi: Any = sys.modules.get("uwsgi")
    options = getattr(uwsgi, "opt", None)
    if not isinstance(options, dict):
        return False
    enabled = any(options.get(name) for name in ("enable-threads", "threads"))
    return not enabled or getattr(uwsgi, "worker_id", lambda: 1)() == 0


class _Crew:
    """The threads that do one job.

    Not asked of Thread: an exception in the middle of its start() or is_alive() can leave one that
    never runs, or that runs and says that it does not. Here each enters and leaves by itself.
    """

    def __init__(self) -> None:
        self._members: dict[threading.Thread, None] = {}

    def __iter__(self) -> Iterator[threading.Thread]:
        return iter(list(self._members))

    def start(self, work: Callable[..., Any], name: str, limit: int, *args: Any) -> bool:
        """Start a thread, which ends at once if there are `limit`; False where there can be none.

        That is so at exit, which 3.12 forbids, in a subinterpreter, out of memory for its stack, in
        uWSGI.
        """
        if _exiting or _has_no_threads():
            return False
        begun, handled = _Bell(), sys.exc_info()[1]
        given = begun, name, limit, work, *args
        try:
            threading.Thread(target=self._run, name=name, args=given, daemon=True).start()
        except BaseException as exc:
            hidden = exc.__context__
            if hidden is not None and hidden is not handled:
                raise hidden from None  # threading stumbles over what interrupts it
            if not isinstance(exc, RuntimeError) or isinstance(exc, RecursionError):
                raise
            return False
        begun.wait(1.0)
        return True

    def _run(
        self, begun: _Bell, name: str, limit: int, work: Callable[..., Any], *args: Any
    ) -> None:
        me = threading.current_thread()
        try:
            self._members[me] = None
            number = 1 + list(self._members).index(me)
            me.name = f"{name}-{number}"
            begun.ring()
            if number <= limit:
                work(*args)
        finally:
            self.leave()

    def leave(self) -> None:
        """Count this thread no more."""
        self._members.pop(threading.current_thread(), None)

    def join(self, deadline: float) -> None:
        """Wait until there is none but this thread; one may have started another."""
        me = threading.current_thread()
        while others := [thread for thread in self if thread is not me]:
            left = deadline - time.monotonic()
            if left <= 0:
                return
            others[0].join(min(threading.TIMEOUT_MAX, left))


class _Reporter:
    """Tell the application what was dropped: on_drop soon, the logger in a handful of records."""

    def __init__(self, outbox: _Outbox, config: Config) -> None:
        self._outbox, self._level = outbox, config.log_level
        self._on_drop: Any = config.on_drop  # None: no drop is kept for it
        self.after_fork()

    def after_fork(self) -> None:
        self._notes: deque[tuple[int, str]] = deque(maxlen=100)
        self._next: dict[str, float] = {}  # kind of record -> when it may be written again
        self._failing = False  # the last note of the kind "state" said so
        self.threads = _Crew()
        self._telling = threading.RLock()  # held while on_drop runs

    def note(self, kind: str, level: int, text: str) -> bool:
        """Keep a text for the log, unless one of its kind was kept in the last REPORT_SECONDS."""
        now = time.monotonic()
        if now < self._next.get(kind, 0.0):
            return False
        self._next[kind] = now + REPORT_SECONDS
        self._notes.append((level, text))
        return True

    def answered(self, verdict: str, error: ChirrOpError | None) -> None:
        """Note once a minute that logs are held, and how many, or refused; and that it is over."""
        if error is None:
            if self._failing:
                self._failing = False
                self._notes.append((_INFO, "logs are accepted again"))
        elif verdict == _REFUSED:
            self._failing |= self.note("state", _WARNING, f"logs are refused: {error}")
        elif verdict in (_RETRY, _HOLD) and (held := self._outbox.held()):
            text = f"logs are held, retrying; {held:,} wait: {error}"
            self._failing |= self.note("state", _WARNING, text)

    def due(self) -> bool:
        """Tell whether there is something to tell."""
        return bool(self._notes or self._outbox.state.untold or self._unsaid())

    def _unsaid(self, final: bool = False) -> dict[str, tuple[int, str]]:
        """Return the drops to be written now; `final` lets no limit hold them back."""
        if final or time.monotonic() >= self._next.get("drops", 0.0):
            return self._outbox.state.unsaid
        return {}

    def kick(self) -> bool:
        """Tell what is due in a thread of its own; False where there can be none."""
        if not self.due() or any(self.threads):
            return True
        return self.threads.start(self._work, "chirrop-reporter", 1)

    def _work(self) -> None:
        done = self.run()
        self.threads.leave()
        if done:
            self.kick()  # for what came when nothing seemed to be left

    def run(self) -> bool:
        """Tell what is due, in this thread.

        False: another thread is at it, or this one, further up its stack.
        """
        nested = _Reporter.tell.__code__, _Reporter._write.__code__, _exclusively.__code__
        if _is_inside(*nested) or not self.tell():
            return False
        self.write()
        return True

    def tell(self, wait: float = 0.0) -> bool:
        """Call on_drop for each drop that it has not heard of; False if another thread does so.

        That is waited for at most `wait` seconds.
        """
        lock = self._telling
        try:
            if not lock.acquire(timeout=max(0.0, min(threading.TIMEOUT_MAX, wait))):
                return False
            self._tell_all()
            return True
        finally:
            while lock._is_owned():  # type: ignore[attr-defined]
                lock.release()

    def _tell_all(self) -> None:
        while self._outbox.state.untold:
            drop = self._outbox.state.untold[0]
            logs = [_decoded(item) for item in drop.items]
            try:
                self._call(self._on_drop, logs, drop.error)
            except BaseException as exc:  # it is the application's code
                late = isinstance(exc, KeyboardInterrupt) or _is_from_handler(exc)
                if late or _is_our_own(exc):
                    raise
                self.note("on_drop", _ERROR, f"on_drop raised {type(exc).__name__}")
            self._outbox.told(drop)

    @staticmethod
    def _call(on_drop: Callable[..., object], logs: list[Any], error: ChirrOpError) -> None:
        on_drop(logs, error)  # in a frame of its own, by which _is_inside() knows what it does

    def write(self, final: bool = False) -> None:
        """Hand notes and drops, added up, to the logger; nothing inside one of its handlers."""
        unsaid = self._unsaid(final)
        if (self._notes or unsaid) and not _is_inside(_Reporter._write.__code__):
            self._write(unsaid)

    def _write(self, unsaid: dict[str, tuple[int, str]]) -> None:
        import logging

        logger = logging.getLogger("chirrop")
        if self._level != NOTSET:
            logger.setLevel(self._level)
        try:
            for _ in range(len(self._notes)):
                logger.log(*self._notes.popleft())
            for reason, (before, text) in unsaid.items():
                self._next["drops"] = time.monotonic() + REPORT_SECONDS
                count = self._outbox.state.dropped[reason]
                logger.error("dropped %d logs (%s): %s", count - before, reason, text)
                self._outbox.said(reason, count)
        except IndexError:  # a race for the last note
            pass
        except Exception as exc:  # a handler of the application's
            if _is_our_own(exc) or _is_from_handler(exc):
                raise


class _Sender:
    """The threads that carry out what the outbox decides, and what callers wait for."""

    def __init__(
        self,
        outbox: _Outbox,
        link: _Link,
        config: Config,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.outbox, self._link, self._config, self._clock = outbox, link, config, clock
        self.report = _Reporter(outbox, config)
        self.owner: Callable[[], object] = lambda: self  # a client puts a weak reference to it here
        self._start()

    def _start(self) -> None:
        self.pid = os.getpid()
        self._threads = _Crew()  # replaced in a forked child, and when gevent comes late
        self._lead = threading.Lock()  # held by the one thread that waits for work
        self._bell = _Bell()  # wakes it
        self._wake_at = 1.0  # the buffer's level at which put() does; 1 is always right
        self._callers: dict[_Bell, Callable[[], bool]] = {}  # who wait, and for what

    def after_fork(self) -> None:
        """Forget the parent's threads: they do not exist in a child process."""
        self.outbox.after_fork()
        self.report.after_fork()
        self._start()
        self._link.after_fork()

    # Logs in.

    def put(self, data: bytes) -> None:
        """Accept one log, and wake a sender if it is the first of a batch, or makes one full."""
        outbox, buffer = self.outbox, self.outbox.buffer
        if outbox.closed:
            self._put_late(data)
            return
        if self._config.queue_size:
            self._put_bounded(data)
        else:
            buffer.put(data)
        if buffer.level() >= self._wake_at and self._bell.is_silent():
            self.wake()
        if outbox.state.stopped:  # since the check above: the last sweep may have missed this log
            outbox.sweep()

    def _put_late(self, data: bytes) -> None:
        self.report.note("late", _WARNING, "logged after close: this and further logs are dropped")
        self.refuse("closed", data, ChirrOpError("logged after close"))

    def refuse(self, reason: str, item: bytes, error: ChirrOpError) -> None:
        """Account for a log that is dropped before it is queued, and report it."""
        telling = _is_inside(_Reporter._call.__code__)
        self.outbox.refuse(reason, None if telling else [item], error)
        self._announce()

    def _put_bounded(self, data: bytes) -> None:
        deadline = self._clock() + self._config.timeout
        while not self.outbox.offer(data):
            self.wake()  # a full queue is a full batch
            nested = _is_inside(_exclusively.__code__, _Sender._run.__code__)
            if nested or not self._alive() or not self._wait(self._has_room, deadline, self._help):
                size = self._config.queue_size
                raise ChirrOpQueueFullError(f"queue is full: {size} logs are waiting to be sent")

    def _has_room(self) -> bool:
        return self.outbox.state.stopped or not self.outbox.is_full()

    # Threads.

    def wake(self) -> None:
        """Wake the sender that waits, or start the first one."""
        if self._alive():
            self._bell.ring()
        else:
            self._spawn()

    def _ring(self) -> None:
        """Wake the sender that waits, if there is one: else put() would take it for awake."""
        if self._alive():
            self._bell.ring()

    def _alive(self) -> bool:
        """Tell whether there is a sender, in the world in which this thread runs."""
        if type(self._lead) is not type(threading.Lock()):
            # gevent or eventlet has patched threading since: greenlets wait on locks of theirs.
            bell = self._bell
            self._threads, self._wake_at = _Crew(), 1.0
            self._lead, self._bell = threading.Lock(), _Bell()
            bell.ring()  # a sender that waits in the other world ends
        return any(self._threads)

    def _spawn(self) -> None:
        """Start one more sender, if the outbox allows it and the interpreter still does."""
        _close_with_multiprocessing()
        if "gevent" in sys.modules:  # its resolver starts a thread, which at exit it could not
            importlib.import_module("socket").getaddrinfo("127.0.0.1", 0)
        threads = self._threads
        if threads.start(self._run, "chirrop-sender", self.outbox.state.width, threads):
            self._bell.ring()
            return
        # flush, close and exit send in their own thread; look again with the next batch.
        self._wake_at = self.outbox.buffer.level() + self._config.batch_size
        if _has_no_threads():
            text = "uWSGI has no threads here (see its enable-threads)"
            self.report.note("uwsgi", _WARNING, f"{text}: logs go out at flush() and at exit only")

    def _run(self, threads: _Crew) -> None:
        """Send until the client is closed; `threads` is another list in a forked child, into which
        gevent may have carried this greenlet over."""
        try:
            while self._threads is threads and self._turn(threads):
                pass
        except BaseException:
            pass  # a worker's abort, raised in here: the next log starts another sender
        finally:
            self.outbox.release(threading.get_ident())
            if _exiting and self._threads is threads:
                self.report.run()  # for the exiting thread, which on_drop must not hold up
            threads.leave()  # before the bell is reset: from here on put() starts another
            if self._threads is threads:
                self._wake_at = 1.0
                self._bell.wait(0)
                self._ring()  # what this one held waits for another
                for bell in list(self._callers):  # they look whether there is still a sender
                    bell.ring()

    def _turn(self, threads: _Crew) -> bool:
        """Wait for a batch and send it; False when there is nothing more to do."""
        try:
            with self._lead:
                batch = self._next(threads)
            if batch is None:
                return False
            self._deliver(batch, self._config.timeout)
        except Exception as exc:  # a bug of ours, or no memory: a sender goes on
            self.report.note("sender", _ERROR, f"sender failed: {type(exc).__name__}: {exc}")
            self.outbox.release(threading.get_ident())
            self._ring()
            time.sleep(1.0)
        return True

    def _next(self, threads: _Crew) -> _Batch | None:
        """Wait for the next batch; None when there is nothing more to do."""
        outbox = self.outbox
        while self._threads is threads and not outbox.state.stopped:
            tend_in = outbox.buffer.tend()
            batch = outbox.take(self._clock(), threading.get_ident())
            if batch is not None:
                return batch
            if self.owner() is None and not outbox.held():
                self.shut(True, 0.0)
                break
            self.report.kick()
            self._wake_at = outbox.wake_level(self._clock())
            wait = min(tend_in, outbox.due_in(self._clock()))
            self._look()  # the buffer may have lost what somebody waits for
            self._bell.wait(wait)
        return None

    def _deliver(self, batch: _Batch, timeout: float) -> None:
        """Make one attempt, account for it, and tell whoever must know."""
        threads = self._threads
        batch.bodies = [b"[" + b",".join(batch.items) + b"]"]
        if self.outbox.state.stopped:  # before there was a body that it could have taken back
            return
        url = self._config.api_endpoint
        answer = self._link.attempt("POST", url, batch.bodies, timeout, True, batch.answers)
        if self._threads is not threads:
            return  # in a forked child, where the batch is the parent's
        verdict = _verdict(_INGEST, answer.status)
        error = None if verdict == _DELIVERED else answer.error()
        outcome = self.outbox.settle(batch, verdict, error, self._clock())
        self.report.answered(outcome, error)
        self._announce()
        if self.outbox.state.width > len(list(threads)) > 0:
            self._spawn()
        self._ring()

    # Callers that wait.

    def _look(self) -> None:
        """Wake the callers whose wait is over."""
        for bell, ready in self._callers.copy().items():
            if ready():
                self._callers.pop(bell, None)
                bell.ring()

    def _announce(self) -> None:
        """Wake the callers whose wait is over, and report what there is to report."""
        self._look()
        if not self.report.kick():
            self.report.run()

    def _wait(
        self,
        ready: Callable[[], bool],
        deadline: float,
        wait: Callable[[_Bell, float], object],
    ) -> bool:
        """Wait until `ready()`, at which senders look after each answer; return what it says."""
        bell = _Bell()
        try:
            while True:
                self._callers[bell] = ready
                left = deadline - self._clock()
                if ready() or left <= 0:
                    return ready()
                wait(bell, left)
        finally:
            self._callers.pop(bell, None)

    def _help(self, bell: _Bell, left: float) -> None:
        """Wait for the senders; where there are none, and can be none, do a piece of their work."""
        if not self._alive():
            self._spawn()
        if self._alive():
            bell.wait(left)
            return
        now, me = self._clock(), threading.get_ident()
        try:
            self.outbox.buffer.tend()
            batch = self.outbox.take(now, me)
            if batch is not None:
                self._deliver(batch, min(self._config.timeout, left))
                return
        finally:
            self.outbox.release(me)
        bell.wait(min(left, 1.0, self.outbox.due_in(now)))

    def pause(self, seconds: float) -> bool:
        """Wait in a caller's thread; True, and at once, when the client is being closed."""
        return self._wait(lambda: self.outbox.closed, self._clock() + seconds, _Bell.wait)

    def deadline(self, timeout: float | None) -> float:
        return math.inf if timeout is None else self._clock() + timeout

    def flush(self, deadline: float) -> bool:
        if _is_inside(_exclusively.__code__):
            return False  # a sender may need the lock that this thread has
        if _is_inside(_Sender._run.__code__, _Sender._deliver.__code__, _Reporter.tell.__code__):
            return not self.outbox.held()  # this thread would wait for itself
        self.outbox.buffer.tend()
        flush = _Flush()
        try:
            self.outbox.begin_flush(self._clock(), flush)
            self._ring()
            self._wait(lambda: self.outbox.outcome(flush) is not None, deadline, self._help)
            done = bool(self.outbox.outcome(flush))
        finally:
            self.outbox.end_flush(flush)
        self.report.kick()
        self.report.write()
        return done

    def close(self, deadline: float) -> bool:
        self.outbox.closed = True
        self._announce()
        if _is_inside(_exclusively.__code__):
            return False  # senders go on; the exit hook, or another close, ends them
        clean = self.outbox.state.stopped or self.flush(deadline)
        self.shut(clean, deadline)
        return self.outbox.state.clean

    def shut(self, clean: bool, deadline: float) -> None:
        """End all sending now, and report what that drops; waits for threads until `deadline`."""
        self.outbox.stop(clean)
        self._ring()  # for the leader; the others see that the outbox is stopped
        self._announce()
        self._hand_over(deadline)
        # One that is idle ends at once; one in a request, after it: that is waited for a second.
        self._threads.join(min(deadline, self._clock() + 1.0))
        self._link.close()
        _open_senders.discard(self)

    def _hand_over(self, deadline: float) -> None:
        """Report all that there is to report, if it can be had by `deadline`."""
        if not _is_inside(_Reporter.tell.__code__):
            if not self.report.kick():
                self._threads.join(deadline)
            self.report.threads.join(deadline)
            if not any(self.report.threads):
                self.report.tell(deadline - self._clock())
        self.report.write(final=True)

    def hurry(self, deadline: float) -> None:
        """Take no more logs, end backoffs and delays, and wake a sender."""
        self.outbox.closed = True
        self.outbox.end_flush(self.outbox.begin_flush(self._clock()))
        self.wake()

    def abandon(self, _: object = None, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        """Send what is held, then end: the client is gone. Called by the garbage collector."""
        if ending():  # the exit hook has run, and the names of this module are going
            return
        if any(self._threads) or self.outbox.held() or self.outbox.buffer.is_open():
            self.wake()
        else:
            self._link.close()
            _open_senders.discard(self)


# Every client with unsent logs, or one that may still get some. Held strongly: a client may be
# dropped by the application while its logs are on their way.
_open_senders: set[_Sender] = set()
_exiting = False


def _at_exit() -> None:
    """Close all open clients within one deadline, in spite of errors and interruptions."""
    global _exiting
    _exiting = True  # no thread is started any more, which 3.12 forbids at this point
    if any(sender.pid != os.getpid() for sender in list(_open_senders)):
        _after_fork()
    senders = list(_open_senders)
    deadline = time.monotonic() + max((s._config.exit_timeout for s in senders), default=0.0)
    trouble: BaseException | None = None
    steps: list[tuple[Callable[[_Sender, float], object], _Sender, int]] = []
    steps += [(_Sender.hurry, sender, 1) for sender in senders]
    # Whoever has no thread sends in this one, and may not use up the others' time.
    steps += [(_Sender.flush, sender, len(senders) - i) for i, sender in enumerate(senders)]
    steps += [(_Sender.close, sender, 1) for sender in senders]
    for step, sender, share in steps:
        for _ in range(3):  # interrupted twice, it is done all the same
            try:
                now = time.monotonic()
                step(sender, now + max(0.0, deadline - now) / share)
                break
            except BaseException as exc:
                trouble = exc
                if isinstance(exc, KeyboardInterrupt):  # no more waiting
                    deadline = 0.0
    if trouble is not None:
        raise trouble


def _close_with_multiprocessing() -> None:
    """Let a child of multiprocessing close its clients: it ends by os._exit, past exit hooks."""
    util: Any = sys.modules.get("multiprocessing.util")
    if util is not None and _finalizing.get("pid") != os.getpid():
        _finalizing["pid"] = os.getpid()
        util.Finalize(None, _at_exit, exitpriority=0)


_finalizing: dict[str, int] = {}  # the process in which that has been arranged

_FORK_SECONDS = 5.0  # a fork waits at most so long for other threads' use of SQLite


_forking: dict[int, list[Any]] = {}  # thread that forks -> locks taken for that moment


def _locks() -> list[Any]:
    """Return the locks under which SQLite is used, in the order in which they are taken."""
    buffers: list[Any] = [sender.outbox.buffer for sender in list(_open_senders)]
    spools = [buffer for buffer in buffers if isinstance(buffer, SqliteSpool)]
    return [lock for spool in spools for lock in (spool.tending, spool.lock)]


def _before_fork() -> None:
    """Wait until no thread of ours is inside SQLite, whose own locks a child would find taken."""
    deadline = time.monotonic() + _FORK_SECONDS
    _forking[threading.get_ident()] = locks = _locks()
    for lock in locks:
        lock.acquire(timeout=max(0.0, deadline - time.monotonic()))


def _after_fork_in_parent() -> None:
    for lock in _forking.pop(threading.get_ident(), []):
        if lock._is_owned():
            lock.release()


def _after_fork(*closed: _Sender) -> None:
    """Start anew in a child process; a closed client stays closed, with locks of its own."""
    global _minted
    _minted = _NOT_MINTED
    _forking.clear()
    for sender in {*_open_senders, *closed}:
        if sender.pid == os.getpid():
            continue
        stopped = sender.outbox.state.stopped
        sender.after_fork()
        if stopped:
            sender.outbox.closed, sender.outbox.state = True, _State(stopped=True)
        if sender.owner() is None:
            _open_senders.discard(sender)


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=_after_fork_in_parent,
        after_in_child=_after_fork,
    )


# ---- Transport ------------------------------------------------------------
# In: one request. Out: (status, body, headers) of any status, or an OSError. One attempt, no
# retries, from any number of threads. The key travels only in the headers of this section.


class _TimedSocket(io.RawIOBase):
    """Read a socket until one deadline: its own time-out would start anew with each byte."""

    def __init__(self, sock: Any, deadline: float) -> None:
        self._sock, self._deadline, self.ended = sock, deadline, False
        self._armed_at = time.monotonic()  # the socket's own time-out was set just before
        self._raw = sock.makefile("rb", buffering=0)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        now = time.monotonic()
        if now >= self._deadline:
            raise TimeoutError("the answer did not end in time")
        # Not each time: to set it gives up the GIL, which a busy application is slow to return.
        if now - self._armed_at > 0.05:
            self._sock.settimeout(self._deadline - now)
            self._armed_at = now
        count: int | None = self._raw.readinto(buffer)
        self.ended = count == 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def _awake_clock() -> float:
    """Return seconds that also count while the machine is suspended, where a clock has them."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.time()


class _UrllibTransport:
    """The default transport: urllib.request with connections that are kept and verified TLS.

    urllib closes every connection after one answer; the handler in this opener keeps them in a
    pool, one for each request that was under way at once. Proxies come from the environment. There
    is no handler for redirects, files or FTP. A request with the header `Connection: close` gets a
    connection of its own, never a kept one: its fate must be clear.
    """

    def __init__(self, ssl_context: Any = None) -> None:
        self._context = ssl_context
        self._lock = threading.Lock()  # guards the making of _context
        self._opener: Any = None
        self._idle: dict[tuple[str, str, str], deque[tuple[Any, float]]] = {}
        self._busy: set[Any] = set()  # connections on which a request is under way
        self._closed = False

    def __call__(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str], timeout: float
    ) -> tuple[int, bytes, Mapping[str, str]]:
        import http.client
        import urllib.request

        # Two threads may make one each: it is the transport that has the connections.
        self._opener = opener = self._opener or self._build()
        # The opener has handlers for http and https alone.
        request = urllib.request.Request(url, body, dict(headers), method=method)  # noqa: S310
        try:
            return opener.open(request, timeout=timeout)
        except http.client.HTTPException as exc:
            raise ConnectionError(f"invalid answer: {exc!r:.200}") from exc

    def _build(self) -> Any:
        """Make the opener with the first request: urllib and ssl are imported no earlier."""
        import urllib.request

        transport = self

        class Handler(urllib.request.AbstractHTTPHandler):
            def http_open(self, request: Any) -> Any:
                return transport._exchange(request)

            https_open = http_open
            http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

        opener = urllib.request.OpenerDirector()
        opener.addheaders = [("User-Agent", f"chirrop-python/{__version__}")]
        opener.add_handler(urllib.request.ProxyHandler())
        opener.add_handler(Handler())
        # Refuses all but http and https.
        opener.add_handler(urllib.request.UnknownHandler())
        return opener

    def _exchange(self, request: Any) -> tuple[int, bytes, Mapping[str, str]]:
        """Send on a kept connection if there is one; on a new one if that turns out to be dead."""
        deadline = time.monotonic() + request.timeout
        place = (request.type, request.host, request._tunnel_host or "")
        connection = None
        if not request.get_header("Connection"):
            connection = self._checkout(place)
        if connection is not None:
            try:
                return self._talk(connection, request, deadline, place)
            except OSError as exc:  # closed by the server between two requests, without an answer
                late = time.monotonic() > deadline - 0.01  # Python 3.9 has two classes of time-outs
                if late or _is_from_handler(exc):
                    raise
        return self._talk(self._connect(request, deadline), request, deadline, place)

    def _talk(
        self, connection: Any, request: Any, deadline: float, place: tuple[str, str, str]
    ) -> tuple[int, bytes, Mapping[str, str]]:
        self._busy.add(connection)
        try:
            connection.sock.settimeout(max(0.001, deadline - time.monotonic()))
            connection.response_class = self._timed_response(deadline)
            cut_off = self._send(connection, request)
            response = self._response(connection)
            if cut_off and response.status < 300:
                raise ConnectionError("an answer to half a request")
            body = self._read(response)
        except BaseException:
            connection.close()
            raise
        finally:
            self._busy.discard(connection)
        if cut_off or response.will_close or request.get_header("Connection"):
            connection.close()
        else:
            self._idle.setdefault(place, deque()).append((connection, _awake_clock()))
            if self._closed:
                self.close()
        return response.status, body, response.headers

    @staticmethod
    def _send(connection: Any, request: Any) -> bool:
        """Send a request; True: the server stopped reading, perhaps after an answer such as 413."""
        headers = {**request.unredirected_hdrs, **request.headers}
        if request._tunnel_host:
            headers.pop("Proxy-authorization", None)  # it has gone to the proxy, with CONNECT
        parts: list[bytes] = []
        connection.send = parts.append  # http.client sends head and body apart
        connection.request(request.get_method(), request.selector, request.data, headers)
        del connection.send
        try:
            connection.send(b"".join(parts))
        except (BrokenPipeError, ConnectionResetError):
            return True
        return False

    @staticmethod
    def _response(connection: Any) -> Any:
        import http.client

        response = connection.getresponse()
        while response.status < 200:  # http.client passes over 100 only
            response.headers = None
            response.begin()
        if response.fp.raw.ended:  # which http.client takes for the end of the headers
            raise http.client.HTTPException("answer cut short: it ends within its headers")
        return response

    @staticmethod
    def _timed_response(deadline: float) -> Callable[..., Any]:
        import http.client

        return lambda sock, *args, **kwargs: http.client.HTTPResponse(
            _TimedSocket(sock, deadline),  # type: ignore[arg-type]
            *args,
            **kwargs,
        )

    @staticmethod
    def _read(response: Any) -> bytes:
        import http.client

        failure = f"the answer is larger than {MAX_ANSWER_BYTES} bytes"
        try:
            body = b""
            if response.length is None:
                body = response.read(MAX_ANSWER_BYTES + 1)
            elif response.length <= MAX_ANSWER_BYTES:
                body = response.read()  # without a limit it notices that some is missing
            if max(len(body), response.length or 0) <= MAX_ANSWER_BYTES:
                return body
        except (OSError, http.client.HTTPException) as exc:
            if _is_from_handler(exc):
                raise
            failure = str(exc) or type(exc).__name__
        # Out here, because an IncompleteRead holds what was read, up to 16 MiB. Not an OSError: the
        # server has begun to answer, so this is not a connection that was found dead.
        raise http.client.HTTPException(f"answer cut short: {failure}")

    def _connect(self, request: Any, deadline: float) -> Any:
        import http.client

        options: dict[str, Any] = {"timeout": max(0.001, deadline - time.monotonic())}
        try:
            if request.type == "https":  # all that goes through a tunnel does
                options["context"] = self._ssl_context()
                connection: Any = http.client.HTTPSConnection(request.host, **options)
            else:
                connection = http.client.HTTPConnection(request.host, **options)
            if request._tunnel_host:
                pass_on = {k: v for k, v in request.headers.items() if k == "Proxy-authorization"}
                connection.set_tunnel(request._tunnel_host, headers=pass_on)
                # For the proxy's answer to CONNECT:
                connection.response_class = self._timed_response(deadline)
            try:
                connection.connect()
            except BaseException:
                connection.close()
                raise
        except (OSError, http.client.HTTPException, ValueError) as exc:
            if _is_from_handler(exc):
                raise
            reason = str(exc) or type(exc).__name__
            raise _NeverSent(f"cannot connect to {request.host}: {reason}") from exc
        return connection

    def _ssl_context(self) -> Any:
        with self._lock:
            if self._context is None:
                try:
                    import ssl
                except ImportError as exc:
                    reason = f"https needs the ssl module, which this Python lacks: {exc}"
                    raise OSError(reason) from exc
                self._context = ssl.create_default_context()
                # Python 3.9 leaves it to OpenSSL.
                self._context.minimum_version = ssl.TLSVersion.TLSv1_2
                self._context.set_alpn_protocols(["http/1.1"])
            return self._context

    def _checkout(self, place: tuple[str, str, str]) -> Any:
        """Return a kept connection that looks alive, or None."""
        idle = self._idle.get(place)
        while idle:
            try:
                connection, used_at = idle.pop()
            except IndexError:  # another thread took the last one
                break
            if 0 <= _awake_clock() - used_at < MAX_IDLE_SECONDS and not _has_input(connection.sock):
                return connection
            connection.close()
        return None

    def after_fork(self) -> None:
        """Close this process's copies of the parent's sockets; its connections stay open."""
        self._lock = threading.Lock()
        idle, self._idle = self._idle, {}
        busy, self._busy = self._busy, set()
        for kept in idle.values():
            for connection, _ in kept:
                connection.close()
        for connection in busy:  # a greenlet may go on here that waits for the parent's answer
            if connection.sock is not None:
                os.close(connection.sock.detach())

    def close(self) -> None:
        self._closed = True
        for kept in list(self._idle.values()):
            try:
                while kept:
                    kept.pop()[0].close()
            except IndexError:  # another thread took the last one, which comes back here
                pass


def _has_input(sock: Any) -> bool:
    """Tell whether an idle connection has input: the server closed it, or was never in step."""
    if getattr(sock, "pending", int)():  # TLS has it already
        return True
    import select

    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([sock], [], [], 0)[0])


class _Link:
    """Make attempts through the configured transport: add the headers, and return what happens.

    Imports all that attempts need when it is made: in the caller's thread, before there are any
    others. A fork, or uWSGI's own in C, must not catch one of them in the middle of an import.
    """

    def __init__(self, config: Config) -> None:
        self._transport = config.transport or _UrllibTransport(config.ssl_context)
        self._key = config.api_key
        names = ["logging", "email.utils", "http"]
        if isinstance(self._transport, _UrllibTransport):
            names += ["select", "http.client", "urllib.request", "encodings.idna", "ssl"]
        if config.disabled:
            names = []
        for name in names:
            try:
                importlib.import_module(name)
            except ImportError:  # not every Python has ssl; what needs it says so
                pass

    def attempt(
        self,
        method: str,
        url: str,
        bodies: Sequence[bytes | None],
        timeout: float,
        repeatable: bool,
        answers: list[Any],
    ) -> _Answer:
        """Return the answer to one request; `answers` has it before anything can interrupt.

        `bodies` holds its body. As long as the transport has not been called, it may be taken out.
        """
        headers = {"Authorization": _Secret(f"Bearer {self._key}"), "Accept": "application/json"}
        if None not in bodies:
            headers["Content-Type"] = "application/json"
        if not repeatable:
            headers["Connection"] = "close"
        try:
            if not answers:
                call = ((method,), (url,), bodies, (headers,), (timeout,))
                answers.extend(map(self._transport, *call))
            status, content, fields = answers[0]
            if not isinstance(status, int) or not isinstance(content, (bytes, bytearray)):
                kinds = f"{type(status).__name__}, {type(content).__name__}"
                raise TypeError(f"transport returned {kinds}")
            fields = {str(name).lower(): str(value) for name, value in fields.items()}
        except (MemoryError, RecursionError):  # this thread's, not the network's
            raise
        except Exception as exc:  # a transport may be the application's; its errors end no sender
            if _is_from_handler(exc):
                raise
            return _Answer(0, cause=_without_key(exc, self._key))
        except BaseException as exc:  # above all Ctrl-C
            raise _without_key(exc, "") from None
        if not 200 <= status < 300:
            content = _masked(bytes(content), self._key)
            for name, value in fields.items():
                masked = _masked(value.encode("utf-8", "replace"), self._key)
                fields[name] = masked.decode("utf-8", "replace")
        return _Answer(status, bytes(content), fields)

    def after_fork(self) -> None:
        if isinstance(self._transport, _UrllibTransport):  # another one is its maker's to mend
            self._transport.after_fork()

    def close(self) -> None:
        if isinstance(self._transport, _UrllibTransport):  # and to close
            self._transport.close()


# ---- Client ---------------------------------------------------------------
# Events in: log, flush, close. Then the control plane: request(), and the calls that go through it.
# A Client is safe to use from any number of threads, and in a forked child.


def _path(*segments: str) -> str:
    """Return a path below the servicer's base; ids are trimmed and encoded as one segment each."""
    import urllib.parse

    encoded = []
    for segment in segments:
        text = segment.strip() if isinstance(segment, str) else ""
        if text in ("", ".", ".."):
            raise ChirrOpValidationError(f"id must be a non-empty string, got {_show(segment)}")
        try:
            encoded.append(urllib.parse.quote(text, safe=""))
        except UnicodeEncodeError as exc:
            raise ChirrOpValidationError(f"id must be valid Unicode, got {_show(segment)}") from exc
    return "/" + "/".join(encoded)


def _checked_path(path: object) -> str:
    """Return the path of a request without its outer slashes."""
    if isinstance(path, str):
        inner = path.strip("/")
        is_clean = all("!" <= c <= "~" and c not in "?#\\" for c in inner)
        if is_clean and {"", ".", ".."}.isdisjoint(inner.split("/")):
            return inner
    raise ChirrOpValidationError(
        f"path must be encoded segments without a query, got {_show(path)}"
    )


def _query(parameters: Mapping[str, Any]) -> str:
    """Return the query of a URL with its question mark; "" if there is nothing to ask."""
    import urllib.parse

    pairs = []
    for name, value in parameters.items():
        if isinstance(value, bool):
            value = str(value).lower()
        if value is not None:
            pairs.append((name, value))
    return "?" * bool(pairs) + urllib.parse.urlencode(pairs)


_POLICY_RULES = {
    "period": _PERIODS,
    "aggregate": _AGGREGATES,
    "condition": _CONDITIONS,
    "severity": _SEVERITIES,
}
_DESTINATION_RULES = {"channel": _CHANNELS}


def _payload(fields: object, rules: Mapping[str, Iterable[str]]) -> dict[Any, Any]:
    """Return a payload whose known keys keep to their vocabularies; other keys pass untouched."""
    if not isinstance(fields, dict):
        raise ChirrOpValidationError(f"payload must be a dict, got {_show(fields)}")
    for key, allowed in rules.items():
        if key in fields:
            _choice(key, fields[key], allowed)
    return fields


def _is_repeatable(method: str, path: str) -> bool:
    """Tell whether a call may be made twice: reads, PUTs and the alert transitions."""
    kind, *rest = path.split("/")
    transition = kind == "alerts" and rest[1:] in (["acknowledge"], ["resolve"], ["archive"])
    return method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS") or transition


def _no_log(*given: object) -> ChirrOpValidationError:
    """Return the error for what was given in place of a Log."""
    return ChirrOpValidationError(
        f"entry must be a Log, got {', '.join(map(_show, given))}:"
        " write log(chirrop.Log(event, value)), or try_log(event, value)"
    )


def _as_given(values: Sequence[object]) -> bytes:
    """Return arguments that make no Log as a JSON object, as near as it can come."""
    fields = {}
    for name, value in zip(_LOG_FIELDS, values):
        try:
            if value is not None:
                fields[name] = json.loads(json.dumps(value))
        except Exception:  # the value's own methods may raise anything
            fields[name] = _show(value)
    return json.dumps(fields).encode()


def _seconds_left(context: Any) -> float:
    """Return what is left of a Lambda invocation; inf where its context does not say."""
    try:
        return float(context.get_remaining_time_in_millis()) / 1000
    except Exception:  # None, as tests pass it, or a context of another make
        return math.inf


class Client:
    """Send logs in the background and make every control-plane call.

    Threads start with the first log, not with the client. A with block closes it at its end.

    Control-plane methods block and raise as `request` does, which makes their calls; the routes in
    their docstrings are below `Config.servicer_endpoint`. They may be called from any thread, take
    ids as strings (the service's are UUIDs) and return parsed JSON.

    Args:
        config: a Config; None makes one from the environment.

    Raises:
        ChirrOpValidationError: there is no valid configuration.
    """

    def __init__(self, config: Config | None = None) -> None:
        config = _hidden(config)  # it may be a key
        if config is not None and not isinstance(config, Config):
            raise ChirrOpValidationError(
                "the first argument must be a Config; a key is given as api_key=..."
            )
        self.config = config = config or Config()
        self._timeout, self._servicer_retries = config.timeout, config.servicer_retries
        self._link = _Link(config)
        spool: Any = config.spool
        if config.disabled or spool is None:
            buffer: Any = _Memory()
        elif isinstance(spool, (str, os.PathLike)):
            buffer = SqliteSpool(spool)
        else:
            buffer = spool.fresh()
        self._outbox = _Outbox(buffer, config)
        self._sender = _Sender(self._outbox, self._link, config)
        buffer.warn = lambda text, note=self._sender.report.note: note("spool", _WARNING, text)
        self._sender.owner = weakref.ref(self, self._sender.abandon)
        if not config.disabled:
            _open_senders.add(self._sender)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if "_sender" not in self.__dict__:  # a traceback with locals shows one whose making failed
            return "<chirrop.Client>"
        return f"<chirrop.Client {self.config.api_endpoint} {self.stats()}>"

    def __reduce__(self) -> str:
        raise TypeError(
            "cannot pickle or copy a Client: make it in the worker, and send its Config there"
        )

    # Events.

    def log(self, entry: Log, *misplaced: NoReturn) -> None:
        """Queue one log for sending and return at once; the network is never touched here.

        POST /v1.0/logs, later, from a sender thread. May be called from any thread, signal handler,
        finaliser or logging handler. With a spool the log is on disk when this returns. With a
        bounded queue that is full it waits up to `Config.timeout` seconds for room. After close()
        the log is dropped and reported.

        Args:
            entry: a Log, and nothing else.

        Raises:
            ChirrOpValidationError: `entry` is not a Log.
            ChirrOpQueueFullError: the bounded queue or the spool had no room in time.
        """
        if misplaced or (type(entry) is not Log and not isinstance(entry, Log)):
            raise _no_log(entry, *misplaced)
        if self.config.disabled:
            return
        sender = self._sender
        if sender.pid != os.getpid():  # as _here() has it, without the call
            _after_fork(sender)
        sender.put(entry._body)

    def try_log(
        self,
        event: str,
        value: float,
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
            event, value, agent, log_id, meta, occurred_at: as for Log.

        Returns:
            False if it was invalid or there was no room; nothing is raised for either.
        """
        reason = "invalid"
        try:
            entry = Log(event, value, agent, log_id, meta, occurred_at)
            reason = "full"
            self.log(entry)
            return True
        except ChirrOpError as exc:
            given = (event, value, agent, log_id, meta, occurred_at)
            _without_key(exc, "")  # its traceback would hold the caller's frames
            self._here().refuse(reason, _as_given(given), exc)
            return False

    def flush(self, timeout: float | None = None) -> bool:
        """Send what was queued before this call, now, and wait for it.

        Neither `flush_delay` nor a backoff in progress is waited for. Blocks until each of those
        logs was delivered or dropped, or one full cycle of retries has failed, or the time is up.
        Logs queued meanwhile do not keep it waiting. Any thread. From on_drop, and from a signal
        handler or finaliser that interrupted the SDK itself, it returns at once. For dropped logs,
        on_drop may still run when it returns; close() waits for that.

        Args:
            timeout: seconds, 0 to 86,400; None waits for the outcome: with the default retries and
                a dead server a minute or two, more where attempts time out or the server asks for
                pauses.

        Returns:
            True only if all of those logs were delivered. What was not stays queued.
        """
        limit = _unless_none(_seconds, "timeout", timeout)
        if self.config.disabled:
            return True
        sender = self._here()
        return sender.flush(sender.deadline(limit))

    def close(self, timeout: float | None = None) -> bool:
        """Flush, end the threads, close the connections; drop and report what is logged later.

        What could not be sent stays in the spool, or is dropped and reported ("closed"). Blocks
        like flush; from on_drop it does not wait. Calling it again does nothing. Any thread.

        Args:
            timeout: seconds for the flush, 0 to 86,400; None waits for the outcome, see flush.

        Returns:
            True only if everything was delivered.
        """
        limit = _unless_none(_seconds, "timeout", timeout)
        if limit is None and self.config.spool is not None:  # what is left stays on disk
            limit = self.config.exit_timeout
        sender = self._here()
        return sender.close(sender.deadline(limit))

    def shutdown(self) -> bool:
        """Do the same as close()."""
        return self.close()

    def send_logs(self, entries: Iterable[Log] | Log) -> None:
        """Deliver logs now, in this thread, past the queue and the spool.

        POST /v1.0/logs, at most 250 per request. Blocks through up to `Config.retries` repeated
        attempts per request; close() cuts the waits short.

        Args:
            entries: Logs, or one. When a request fails, the ones before it were delivered and the
                ones after it not sent.

        Raises:
            ChirrOpValidationError: an entry is not a Log; nothing was sent.
            ChirrOpError: a request failed for good; see the subclasses.
        """
        logs = [entries] if isinstance(entries, Log) else list(entries)
        for entry in logs:
            if not isinstance(entry, Log):
                raise _no_log(entry)
        if self.config.disabled:
            return
        policy = _Policy(_INGEST, self.config.retries, self.config.timeout, MAX_RETRY_AFTER)
        for start in range(0, len(logs), MAX_BATCH):
            items = [entry._body for entry in logs[start : start + MAX_BATCH]]
            body = b"[" + b",".join(items) + b"]"
            self._attempts(policy, "POST", self.config.api_endpoint, body, True)
            self._outbox.count_delivered(len(items))

    def stats(self) -> Stats:
        """Return the account of this client's logs at this moment; see Stats.

        Blocks for a moment at most: with a spool, while its file is written to.
        """
        return self._here().outbox.stats()

    def _here(self) -> _Sender:
        """Return the sender, made anew in a child of a fork that did not run Python's hooks."""
        if self._sender.pid != os.getpid():
            _after_fork(self._sender)
        return self._sender

    def timer(
        self, event: str, agent: str | None = None, meta: dict[str, Any] | None = None
    ) -> _Timer:
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
        return _Timer(self, event, agent, meta)

    def lambda_handler(self, handler: _F) -> _F:
        """Decorate an AWS Lambda handler: flush before an invocation ends, in its remaining time.

        Nothing is done when nothing is queued. What cannot be sent in time stays queued for the
        next invocation. The handler's result and errors pass through untouched. A server that does
        not answer costs an invocation `exit_timeout` seconds at most, and a tenth of that from the
        second one on, until something gets through; 0.2 s of the remaining time are left for the
        return itself.
        """
        import functools

        @functools.wraps(handler)
        def run(event: Any, context: Any = None, *args: Any) -> Any:
            before = self.stats()
            try:
                return handler(event, context, *args)
            finally:
                after = self.stats()
                if after.queued or after.in_flight:
                    limit = self.config.exit_timeout
                    stuck = before.in_flight or (before.queued and before.last_error)
                    if stuck and before.delivered == after.delivered:
                        limit /= 10
                    self.flush(max(0.0, min(limit, _seconds_left(context) - 0.2)))

        return run  # type: ignore[return-value]

    # The control plane.

    def with_options(
        self, timeout: float | None = None, servicer_retries: int | None = None
    ) -> Client:
        """Return a view of this client whose control-plane calls have other limits.

        The view shares everything else: queue, threads, connections, account.

        Args:
            timeout: seconds for one attempt; None keeps the client's.
            servicer_retries: further attempts, from 0; None keeps the client's.
        """
        view = Client.__new__(type(self))
        view.__dict__.update(self.__dict__)
        view.__dict__.setdefault("_whole", self)  # keeps the client alive: its senders end with it
        if timeout is not None:
            view._timeout = _seconds("timeout", timeout, zero=False)
        if servicer_retries is not None:
            view._servicer_retries = _integer("servicer_retries", servicer_retries, 0)
        return view

    def request(
        self, method: str, path: str, query: Mapping[str, Any] | None = None, body: object = None
    ) -> Any:
        """Make one control-plane call; every other method goes through this one.

        Blocks, in this thread, for at most `timeout` seconds per attempt, with up to
        `servicer_retries` further attempts. Reads, PUTs and alert transitions are repeated after a
        network failure, 408, 429, 502, 504 or another 5xx; any other call only on 429 or when no
        connection could be made, because what became of it is unknown.

        Args:
            method: e.g. "GET".
            path: below the servicer's base, e.g. "/events"; ASCII, already encoded, without query.
            query: parameters; None values are left out.
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
            ChirrOpError: the client is disabled.
        """
        if self.config.disabled and not self.config.api_key:
            raise ChirrOpError(
                "the client is disabled, by disabled=True or CHIRROP_DISABLED, and has no key"
            )
        if not isinstance(method, str) or not method.isalpha() or not method.isascii():
            raise ChirrOpValidationError(f"method must be an HTTP method, got {_show(method)}")
        path = _checked_path(path)
        url = f"{self.config.servicer_endpoint}/{path}{_query(query or {})}"
        data = None if body is None else _encode_json("body", body)
        method = method.upper()
        repeatable = _is_repeatable(method, path)
        policy = _Policy(_CONTROL, self._servicer_retries, self._timeout, MAX_SERVICER_WAIT)
        answer = self._attempts(policy, method, url, data, repeatable)
        if not answer.body.strip():
            return {}
        try:
            return json.loads(answer.body)
        except (ValueError, RecursionError):  # which holds the whole answer
            raise ChirrOpTransportError(f"HTTP {answer.status}: the answer is not JSON") from None

    def _attempts(
        self, policy: _Policy, method: str, url: str, body: bytes | None, repeatable: bool
    ) -> _Answer:
        """Return a 2xx answer, after the further attempts that the policy allows, or raise."""
        sender = self._here()
        attempt = 0
        while True:
            attempt += 1
            answer = self._link.attempt(method, url, [body], policy.timeout, repeatable, [])
            verdict = _verdict(policy.verdicts, answer.status)
            if verdict == _DELIVERED:
                return answer
            error = answer.error()
            harmless = repeatable or answer.status == 429 or answer.never_sent()
            wait = error.retry_after or 0.0
            if (
                verdict != _RETRY
                or not harmless
                or attempt > policy.retries
                or wait > policy.longest
            ):
                raise error
            if sender.pause(_backoff(attempt, error.retry_after, self._outbox._rand)):
                raise error

    # Events, their logs and analytics.

    def list_events(self) -> list[Event]:
        """Return all event definitions: GET /v1.0/events."""
        return self.request("GET", "/events")

    def create_event(self, payload: Mapping[str, Any]) -> Event:
        """Create an event definition and return it; a log of a new event makes one, too.

        POST /v1.0/events

        Args:
            payload: Event fields: event, agent, title, description, unit, timezone, public.
        """
        return self.request("POST", "/events", body=_payload(payload, {}))

    def get_event(self, event_id: str) -> Event:
        """Return one event definition: GET /v1.0/events/{event_id}."""
        return self.request("GET", _path("events", event_id))

    def update_event(self, event_id: str, payload: Mapping[str, Any]) -> Event:
        """Change an event definition and return it.

        PUT /v1.0/events/{event_id}

        Args:
            event_id: which one; an id in the payload has no say.
            payload: title, description, unit, timezone, public or agent.
        """
        return self.request("PUT", _path("events", event_id), body=_payload(payload, {}))

    def find_event(self, event: str, agent: str | None = None) -> Event | None:
        """Return the definition with this name, or None.

        GET /v1.0/events

        Args:
            event: flat name, trimmed.
            agent: its agent; None: the definition without one, else the only one of that name.

        Raises:
            ChirrOpValidationError: no agent was given and several have an event of this name.
        """
        name = _trimmed("event", event)
        wanted = _trimmed("agent", agent) if agent is not None else ""
        same = [found for found in self.list_events() if found.get("event") == name]
        exact = [found for found in same if (found.get("agent") or "") == wanted]
        if exact:
            return exact[0]
        if wanted or not same:
            return None
        if len(same) > 1:
            agents = ", ".join(sorted(str(found.get("agent")) for found in same))
            raise ChirrOpValidationError(
                f"agent must be given, since several have an event {name!r}: {agents}"
            )
        return same[0]

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
        query = {"period": _choice("period", period, _PERIODS), **_page(limit, offset)}
        return self.request("GET", _path("events", event_id, "logs"), query)

    def iter_event_logs(
        self, event_id: str, period: Period, page_size: int = 100
    ) -> Iterator[Rollup]:
        """Yield all of an event's rollups, `page_size` to a request; see get_event_logs."""
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

    def create_policy(self, payload: Mapping[str, Any]) -> Policy:
        """Create a policy, a rule that raises alerts, and return it.

        POST /v1.0/policies

        Args:
            payload: Policy fields: event_id, period, aggregate, condition, threshold; and title,
                description, channel, severity, enabled.
        """
        return self.request("POST", "/policies", body=_payload(payload, _POLICY_RULES))

    def get_policy(self, policy_id: str) -> Policy:
        """Return one policy: GET /v1.0/policies/{policy_id}."""
        return self.request("GET", _path("policies", policy_id))

    def update_policy(self, policy_id: str, payload: Mapping[str, Any]) -> Policy:
        """Change a policy and return it: PUT /v1.0/policies/{policy_id}."""
        body = _payload(payload, _POLICY_RULES)
        return self.request("PUT", _path("policies", policy_id), body=body)

    # Alerts.

    def list_alerts(self, status: AlertStatus | None = None) -> list[Alert]:
        """Return all alerts, or those of one status.

        GET /v1.0/alerts

        Args:
            status: "triggered", "acknowledged", "resolved" or "archived".
        """
        chosen = _unless_none(_choice, "status", status, _ALERT_STATUSES)
        return self.request("GET", "/alerts", {"status": chosen})

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
        chosen = _unless_none(_choice, "kind", kind, _DELIVERY_KINDS)
        query = {"kind": chosen, **_page(limit, offset)}
        return self.request("GET", _path("alerts", alert_id, "deliveries"), query)

    def iter_alert_deliveries(
        self, alert_id: str, kind: DeliveryKind | None = None, page_size: int = 100
    ) -> Iterator[Delivery]:
        """Yield all deliveries of an alert, `page_size` to a request; see get_alert_deliveries."""
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

    def create_destination(self, payload: Mapping[str, Any]) -> Destination:
        """Create a destination, a place that alerts are delivered to, and return it.

        POST /v1.0/destinations

        Args:
            payload: Destination fields: channel ("slack", "discord", "telegram", "email" or
                "webhook"); and url, credentials, scope, policy_ids, enabled, as the channel needs.
        """
        body = _payload(payload, _DESTINATION_RULES)
        return self.request("POST", "/destinations", body=body)

    def get_destination(self, destination_id: str) -> Destination:
        """Return one destination: GET /v1.0/destinations/{destination_id}."""
        return self.request("GET", _path("destinations", destination_id))

    def update_destination(self, destination_id: str, payload: Mapping[str, Any]) -> Destination:
        """Change a destination and return it: PUT /v1.0/destinations/{destination_id}."""
        body = _payload(payload, _DESTINATION_RULES)
        return self.request("PUT", _path("destinations", destination_id), body=body)

    def test_destination(self, destination_id: str) -> TestResult:
        """Send a test alert and return its ids and status; {} from some deployments.

        POST /v1.0/destinations/{destination_id}/test
        """
        return self.request("POST", _path("destinations", destination_id, "test"))


def _page(limit: int | None, offset: int | None) -> dict[str, int | None]:
    return {
        "limit": _unless_none(_integer, "limit", limit, 1),
        "offset": _unless_none(_integer, "offset", offset, 0),
    }


def _pages(fetch: Callable[[int], list[Any]]) -> Iterator[Any]:
    """Yield the items of all pages; ends at an empty one, since a server may cap the page size.

    A page equal to the one before comes from a server that ignores the offset: it ends there, too.
    """
    offset = 0
    last: list[Any] = []
    while True:
        page = fetch(offset)
        if not page or page == last:
            return
        yield from page
        offset, last = offset + len(page), page


class _Timer:
    """Measure a block or the calls of a function; see Client.timer."""

    def __init__(
        self, client: Client, event: str, agent: str | None, meta: dict[str, Any] | None
    ) -> None:
        if meta is not None and not isinstance(meta, dict):
            raise ChirrOpValidationError(f"meta must be a dict, got {_show(meta)}")
        self._client, self._event, self._agent, self._meta = client, event, agent, dict(meta or {})
        Log(event, 0, agent, meta={**self._meta, "result": "success"})
        self._starts: list[float] = []

    def start(self) -> _Timer:
        """Begin to measure, and return this timer; a start within a start has a stop of its own."""
        self._starts.append(time.perf_counter())
        return self

    def stop(self, result: str = "success") -> None:
        """Log the milliseconds since the last start(); do nothing when there is none to stop."""
        if self._starts:
            elapsed = round((time.perf_counter() - self._starts.pop()) * 1000, 3)
            self._client.try_log(
                self._event, elapsed, self._agent, meta={**self._meta, "result": result}
            )

    __enter__ = start

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop("success" if kind is None else "error")

    def _again(self) -> _Timer:
        return _Timer(self._client, self._event, self._agent, self._meta)

    def __call__(self, function: _F) -> _F:
        import functools
        import inspect

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def run_async(*args: Any, **kwargs: Any) -> Any:
                with self._again():
                    return await function(*args, **kwargs)

            return run_async  # type: ignore[return-value]

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._again():
                return function(*args, **kwargs)

        return run  # type: ignore[return-value]


def new_client(
    config: Config | None = None, *, api_key: str | None = None, **fields: Any
) -> Client:
    """Return a Client from a Config or its fields: new_client(api_key="chp_...", retries=3).

    Raises:
        ChirrOpValidationError: a field is wrong or unknown, or both a config and fields were given.
    """
    config, api_key = _hidden(config), _hidden(api_key)
    if config is not None:
        if fields or api_key is not None:
            raise ChirrOpValidationError("give either a config or its fields, not both")
        return Client(config)
    names = [name for name in Config.__init__.__annotations__ if name != "return"]
    unknown = sorted(set(fields) - set(names))
    if unknown:
        raise ChirrOpValidationError(
            f"Config has no field {', '.join(unknown)}: it has {', '.join(names)}"
        )
    return Client(Config(api_key, **fields))


# ---- Global API -----------------------------------------------------------
# One client per process, for applications that have no place to keep it.


class ChirrOp:
    """The global client: initialize it once, log from anywhere, stop it at the end."""

    # Empty or {"client": ...}: a dict's setdefault and pop are atomic.
    _slot: dict[str, Client] = {}

    @classmethod
    def initialize(
        cls, config: Config | None = None, *, api_key: str | None = None, **fields: Any
    ) -> Client:
        """Make the global client and return it; arguments as for new_client.

        Raises:
            ChirrOpError: it exists already.
            ChirrOpValidationError: there is no valid configuration.
        """
        config, api_key = _hidden(config), _hidden(api_key)
        if not cls._slot:
            client = new_client(config, api_key=api_key, **fields)
            if cls._slot.setdefault("client", client) is client:
                return client
        raise ChirrOpError("ChirrOp SDK is already initialized: call stop() first")

    @classmethod
    def _get(cls) -> Client:
        try:
            return cls._slot["client"]
        except KeyError:
            raise ChirrOpError(
                "ChirrOp SDK is not initialized. Please call initialize() first"
            ) from None

    @classmethod
    def log_event(cls, entry: Log, *misplaced: NoReturn) -> None:
        """Queue one log; see Client.log. Raises ChirrOpError before initialize()."""
        cls._get().log(entry, *misplaced)

    @classmethod
    def flush(cls, timeout: float | None = None) -> bool:
        """Send what is queued, now; see Client.flush. Raises ChirrOpError before initialize()."""
        return cls._get().flush(timeout)

    @classmethod
    def stop(cls, timeout: float | None = None) -> bool:
        """Close the global client and return what Client.close does; True if there is none."""
        client = cls._slot.pop("client", None)
        if client is None:
            return True
        return client.close(timeout)


initialize, log_event = ChirrOp.initialize, ChirrOp.log_event
flush, stop = ChirrOp.flush, ChirrOp.stop


# ---- Sandbox --------------------------------------------------------------
# In: requests, as any transport takes them. Out: the answers ChirrOp would give.
# Its rules are written from the service's contract and use none of the SDK's checks, numbers or
# vocabularies, so that each can contradict the other. Starts no thread and opens no socket (the
# server of _serve_sandbox does); one lock guards all state, and no scripted delay is waited for
# under it.

from datetime import timedelta  # noqa: E402  # like all that only the lower part needs

__all__ += ["Sandbox"]

if TYPE_CHECKING:
    from http.server import ThreadingHTTPServer

    _Row = dict[str, Any]
    _Reply = tuple[int, bytes, dict[str, str]]

_SANDBOX_BODY_BYTES = 16 << 20  # the served sandbox answers 413 above this
_SANDBOX_HOSTS = ("127.0.0.1", "localhost", "::1")  # of this machine alone
_SANDBOX_USER = "00000000-0000-4000-8000-000000000001"
_SANDBOX_IDS = {
    "events": "event_id",
    "policies": "policy_id",
    "alerts": "alert_id",
    "destinations": "destination_id",
}
_SANDBOX_CODES = {
    400: "BAD_REQUEST", 401: "INVALID_TOKEN", 403: "FORBIDDEN", 404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED", 413: "PAYLOAD_TOO_LARGE", 415: "UNSUPPORTED_MEDIA_TYPE",
    422: "UNPROCESSABLE", 429: "RATE_LIMITED", 503: "OVERLOADED",
}  # fmt: skip
_SANDBOX_PERIODS = ("minute", "hour", "day")
_SANDBOX_STATUSES = ("triggered", "acknowledged", "resolved", "archived")  # the order of a life
# What a client may set: name -> (type or vocabulary, default); ...: required.
_SANDBOX_FIELDS: dict[str, dict[str, tuple[Any, Any]]] = {
    "events": {
        "event": (str, ...),
        "agent": (str, ""),
        "title": (str, ""),
        "description": (str, ""),
        "unit": (str, ""),
        "timezone": (str, "UTC"),
        "public": (bool, False),
    },
    "policies": {
        "event_id": (str, ...),
        "title": (str, ""),
        "description": (str, ""),
        "channel": (str, "ops"),
        "period": (_SANDBOX_PERIODS, ...),
        "aggregate": (("sum", "count", "average", "min", "max", "p95_est", "p99_est"), ...),
        "condition": (("gt", "lt", "eq", "gte", "lte"), ...),
        "threshold": (float, ...),
        "severity": (("info", "warning", "error", "critical"), "warning"),
        "enabled": (bool, True),
    },
    "destinations": {
        "channel": (("slack", "discord", "telegram", "email", "webhook"), ...),
        "url": (str, ""),
        "credentials": (dict, None),
        "scope": (str, "all"),
        "policy_ids": (list, ()),
        "enabled": (bool, True),
    },
}
_SANDBOX_TYPES = {
    str: "a string",
    bool: "true or false",
    float: "a finite number",
    dict: "an object",
    list: "a list",
}
_SANDBOX_NEEDS = {"telegram": ("bot_token", "chat_id"), "email": ()}  # any other channel: a url
_SANDBOX_VERBS = {"acknowledge": "acknowledged", "resolve": "resolved", "archive": "archived"}
_SANDBOX_SPANS = {
    "1h": timedelta(hours=1),
    "1d": timedelta(days=1),
    "7d": timedelta(days=7),
    "1m": timedelta(days=30),
}
_SANDBOX_CONDITIONS = {
    "gt": float.__gt__,
    "lt": float.__lt__,
    "eq": float.__eq__,
    "gte": float.__ge__,
    "lte": float.__le__,
}
_SANDBOX_NEVER = "0001-01-01T00:00:00Z"  # what Go's zero time looks like: no time was given
_sandbox_text = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class _SandboxRefusal(Exception):
    """An answer other than 2xx: its text, its status, and its code where that is a special one."""


def _sandbox_need(good: object, text: str, status: int = 400, code: str = "") -> None:
    if not good:
        raise _SandboxRefusal(text, status, code)


def _sandbox_error(text: str, status: int, code: str = "") -> _Reply:
    code = code or _SANDBOX_CODES.get(status, "INTERNAL_ERROR")
    return _sandbox_answer(status, {"error": {"code": code, "message": text}})


def _sandbox_answer(status: int, content: Any) -> _Reply:
    """Return an answer whose body is text or bytes as they are, or else JSON."""
    if isinstance(content, (str, bytes)):
        return status, content.encode() if isinstance(content, str) else content, {}
    return status, _sandbox_text(content).encode(), {"Content-Type": "application/json"}


def _sandbox_json(body: bytes | None) -> tuple[Any, str]:
    """Return the parsed body and, where it is not strict JSON, the reason."""
    try:
        parsed = json.loads(body.decode()) if body else None
        _sandbox_text(parsed).encode()  # json.loads() takes NaN and lone surrogates
        return parsed, ""
    except (ValueError, RecursionError) as exc:
        return None, f"body is not valid JSON: {exc}"


def _sandbox_copy(value: Any) -> Any:
    return json.loads(_sandbox_text(value))


def _sandbox_id(name: str, text: str) -> str:
    """Return a UUID in its canonical form; no other form will do."""
    import re

    form = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
    _sandbox_need(re.fullmatch(form, text.lower()), f"{name} must be a UUID, got {text!r:.80}")
    return text.lower()


def _sandbox_new_id() -> str:
    import uuid

    return str(uuid.uuid4())


def _sandbox_time(text: str) -> datetime:
    """Return the moment that ISO 8601 text names, to the microsecond; without an offset in UTC."""
    import re

    parts = re.fullmatch(
        r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]([0-9]{2}:[0-9]{2})(:[0-9]{2})?([.,][0-9]+)?"
        r"([Zz]|([+-])([01][0-9]|2[0-3]):?([0-5][0-9]))?",
        text.strip(),
    )
    try:
        if parts is None:
            raise ValueError("another form")
        day, minute, second, fraction, _, sign, hours, minutes = parts.groups()
        at = datetime.fromisoformat(f"{day}T{minute}{second or ':00'}").replace(
            microsecond=int(f"{(fraction or '.')[1:]:0<6.6}"), tzinfo=timezone.utc
        )
        ahead = timedelta(hours=int(hours or 0), minutes=int(minutes or 0))
        if sign == "-":
            return at + ahead
        return at - ahead
    except (ValueError, OverflowError) as exc:
        text = f"occurred_at must be an ISO 8601 date and time, got {text!r:.80}"
        raise _SandboxRefusal(text, 400) from exc


def _sandbox_log(fields: Any, now: datetime) -> _Row:
    """Return a log as it is kept: a rule a line, each from the contract."""
    _sandbox_need(isinstance(fields, dict), "must be an object")
    given = {name: value for name, value in fields.items() if value is not None}
    for name in ("event", "agent", "log_id", "occurred_at"):
        _sandbox_need(isinstance(given.get(name, ""), str), f"{name} must be a string")
    event, agent, log_id = (given.get(name, "").strip() for name in ("event", "agent", "log_id"))
    _sandbox_need(event, "event is required")
    _sandbox_need("value" in given, "value is required")
    _sandbox_need(_sandbox_fits(given["value"], float), "value must be a finite number")
    at, time_given = now, given.get("occurred_at", _SANDBOX_NEVER)
    if time_given != _SANDBOX_NEVER:
        at = _sandbox_time(time_given)
    text = f"occurred_at must lie within the last 30 days and at most 1 day ahead, got {time_given}"
    _sandbox_need(now - timedelta(days=30) <= at <= now + timedelta(days=1), text)
    log_id = _sandbox_id("log_id", log_id) if log_id else _sandbox_new_id()
    log = {"log_id": log_id, "event": event, "value": given["value"], "occurred_at": _iso(at)}
    if agent:
        log["agent"] = agent
    if "meta" in given:
        log["meta"] = meta = given["meta"]
        few = not isinstance(meta, dict) or len(meta) <= 10
        _sandbox_need(few, "meta must have at most 10 top-level keys")
        small = len(_sandbox_text(meta).encode()) <= 1024
        _sandbox_need(small, "meta must encode to at most 1024 bytes")
    return log


def _sandbox_zone(name: str) -> Any:
    if name == "UTC":  # must work where there is no time zone database
        return timezone.utc
    import zoneinfo

    try:
        return zoneinfo.ZoneInfo(name)
    except (KeyError, ValueError, OSError) as exc:
        raise _SandboxRefusal("timezone must be a known IANA name", 400) from exc


def _sandbox_choice(query: _Row, name: str, choices: tuple[str, ...], default: str = "") -> str:
    value = str(query.get(name, default))
    _sandbox_need(
        value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r:.80}"
    )
    return value


def _sandbox_page(items: list[_Row], query: _Row) -> list[_Row]:
    limit, offset = query.get("limit", "100"), query.get("offset", "0")
    for name, text in (("limit", limit), ("offset", offset)):
        _sandbox_need(
            text.isascii() and text.isdigit() and len(text) < 10,
            f"{name} must be a non-negative integer",
        )
    return items[int(offset) : int(offset) + int(limit)]


def _sandbox_fits(value: Any, rule: Any) -> bool:
    if isinstance(rule, tuple):
        return value in rule
    if rule is float:
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return isinstance(value, rule)


def _sandbox_fields(kind: str, given: Any, record: _Row) -> _Row:
    """Return what a client may set: as given, else as it is, else the default.

    Go's clients send "" for what was never set: where only certain texts make sense, it means that.
    """
    _sandbox_need(isinstance(given, dict), "body must be a JSON object")
    fields = {}
    for name, (rule, default) in _SANDBOX_FIELDS[kind].items():
        value = given.get(name)
        if value is None or (value == "" and default != ""):
            value = record.get(name, default)
        _sandbox_need(value is not ..., f"{name} is required")
        words = _SANDBOX_TYPES.get(rule) or f"one of {', '.join(rule)}"
        _sandbox_need(value is default or _sandbox_fits(value, rule), f"{name} must be {words}")
        fields[name] = value
    return fields


def _sandbox_start(at: datetime, period: str, zone: Any) -> datetime:
    """Return the start of the bucket that `at` falls in; days are those of `zone`."""
    at = at.replace(second=0, microsecond=0)
    if period == "day":
        return at.astimezone(zone).replace(hour=0, minute=0, fold=0).astimezone(timezone.utc)
    if period == "hour":
        return at.replace(minute=0)
    return at


def _sandbox_finite(number: float) -> float:
    """Return `number` within the range of floats, as JSON has no infinity."""
    return max(-sys.float_info.max, min(sys.float_info.max, number))


def _sandbox_add(buckets: dict[Any, _Row], key: object, value: float) -> None:
    bucket = buckets.setdefault(
        key, {"count": 0, "value": 0.0, "squares": 0.0, "min": value, "max": value}
    )
    bucket["count"] += 1
    bucket["value"] = _sandbox_finite(bucket["value"] + value)
    bucket["squares"] = _sandbox_finite(bucket["squares"] + value * value)
    bucket["min"], bucket["max"] = min(bucket["min"], value), max(bucket["max"], value)


def _sandbox_aggregates(bucket: _Row) -> _Row:
    mean = bucket["value"] / bucket["count"]
    stddev = math.sqrt(max(0.0, bucket["squares"] / bucket["count"] - mean * mean))
    return {
        **bucket,
        "sum": bucket["value"],
        "average": mean,
        "mean": mean,
        "stddev": stddev,
        "p95_est": mean + 1.645 * stddev,
        "p99_est": mean + 2.326 * stddev,
    }


def _sandbox_compare(windows: dict[str, _Row]) -> _Row:
    """Return the `data` of analytics: all are numbers, 0 where there is nothing to divide by."""
    data: _Row = {}
    for when in ("current", "previous"):
        seen = _sandbox_aggregates(windows[when]) if when in windows else {}
        for name in ("value", "count", "mean", "stddev"):
            data[f"{when}_{name}"] = seen.get(name, 0)
    for name in ("value", "count", "mean"):
        before = data[f"previous_{name}"]
        delta = _sandbox_finite(data[f"current_{name}"] - before)
        data[f"{name}_delta"] = delta
        data[f"{name}_pct_change"] = 0
        if before:
            data[f"{name}_pct_change"] = _sandbox_finite(delta / abs(before) * 100)
    return data


class Sandbox:
    """An in-memory ChirrOp that is itself a transport: no network, no account.

        sandbox = Sandbox()
        client = new_client(api_key="chp_sandbox", transport=sandbox)

    It refuses what ChirrOp refuses, in ChirrOp's words. Policies are evaluated at each
    request that brings logs. Nothing is ever sent to a destination: a delivery is recorded,
    and says so in its `error_message`. Rollups come newest first, other lists oldest first.
    Thread-safe, and what it hands out are copies.

    Args:
        key: the only API key accepted; None: any that starts with "chp_".
        quota: logs it takes before it answers 403 QUOTA_EXCEEDED; None: no limit. The
            attribute of this name may be changed at any time.
        clock: returns the time, in seconds since the epoch.
        sleep: waits out a scripted delay, in seconds.
    """

    def __init__(
        self,
        *,
        key: str | None = None,
        quota: int | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._key, self._clock, self._sleep = key, clock, sleep
        self.quota = quota
        self._lock = threading.RLock()  # guards all that reset() makes
        self.reset()

    def reset(self) -> None:
        """Forget everything: logs, requests, resources, faults, predicates."""
        with self._lock:
            self._logs: dict[str, _Row] = {}
            self._requests: list[_Row] = []
            self._faults: list[_Row] = []
            self._poison: list[Callable[[_Row], object]] = []
            self._stores: dict[str, dict[str, _Row]] = {kind: {} for kind in _SANDBOX_IDS}
            self._named: dict[tuple[str, str], _Row] = {}  # events by agent and event
            self._points: dict[str, list[tuple[datetime, float]]] = {}  # by event_id
            self._judged: set[tuple[object, ...]] = set()
            self._attempts: list[tuple[str, _Row]] = []

    @property
    def logs(self) -> list[_Row]:
        """The logs accepted so far; of several with one `log_id`, the first."""
        with self._lock:
            return _sandbox_copy([*self._logs.values()])

    @property
    def requests(self) -> list[_Row]:
        """All requests: `method`, `path`, `query`, `body`, and `status` (0: no answer)."""
        with self._lock:
            return _sandbox_copy(self._requests)

    def fail(
        self,
        times: int | None = 1,
        *,
        status: int | None = None,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        retry_after: object = None,
        drop: str | None = None,
        delay: float = 0.0,
        method: str | None = None,
        path: str = "",
    ) -> None:
        """Script a fault for the next matching requests; the oldest fault comes first.

        Args:
            times: how many requests it meets; None: all, until reset().
            status: what to answer; default: 429 with `retry_after`, 502 for no fault at all.
            body: text, bytes or JSON data; default: an error.
            headers, retry_after: added to that answer; seconds or an HTTP date.
            drop: break the connection "before" or "after" the request took effect.
            delay: seconds to wait first; `timeout` or more is a TimeoutError.
            method, path: only requests by this method, whose path ends so.
        """
        if drop not in (None, "before", "after"):
            raise ChirrOpValidationError(f"drop must be 'before' or 'after', got {drop!r}")
        if status is None and (retry_after is not None or not (drop or delay)):
            status = 502 if retry_after is None else 429
        answer = None
        if status is not None:
            if body is not None:
                answer = _sandbox_answer(status, body)
            elif status >= 400:
                answer = _sandbox_error(f"scripted {status}", status)
            else:
                answer = _sandbox_answer(status, b"")
            answer[2].update(headers or {})
            if retry_after is not None:
                answer[2]["Retry-After"] = str(retry_after)
        fault = {
            "times": math.inf if times is None else times,
            "answer": answer,
            "drop": drop,
            "delay": delay,
            "method": method,
            "path": path or "",
        }
        with self._lock:
            self._faults.append(fault)

    def reject(self, predicate: Callable[[_Row], object]) -> None:
        """Answer 400 to each request that holds a log for which `predicate` is true."""
        with self._lock:
            self._poison.append(predicate)

    def __call__(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str], timeout: float
    ) -> _Reply:
        """Answer one request; ConnectionResetError and TimeoutError only as scripted."""
        request, problem, fault = self._receive(method, url, body)
        delay, drop = fault.get("delay", 0.0), fault.get("drop")
        if delay:
            self._sleep(min(delay, timeout))
        if delay >= timeout:
            raise TimeoutError("timed out, as scripted")
        if drop == "before":
            raise ConnectionResetError("connection dropped, as scripted")
        status, content, extra = fault.get("answer") or self._answer(request, problem, headers)
        if drop == "after":
            raise ConnectionResetError("connection dropped, as scripted")
        with self._lock:
            request["status"] = status
        if method == "HEAD":
            content = b""
        return status, content, dict(extra)

    def _receive(self, method: str, url: str, body: bytes | None) -> tuple[_Row, str, _Row]:
        """Record a request; return the record, what is wrong with its body, its fault."""
        from urllib.parse import parse_qsl, urlsplit

        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        parsed, problem = _sandbox_json(body)
        request = {
            "method": method,
            "path": parts.path,
            "query": query,
            "body": parsed,
            "status": 0,
        }
        with self._lock:
            self._requests.append(request)
            for fault in self._faults:
                fits = fault["method"] in (None, method) and parts.path.endswith(fault["path"])
                if fits and fault["times"] > 0:
                    fault["times"] -= 1
                    return request, problem, fault
        return request, problem, {}

    def _answer(self, request: _Row, problem: str, headers: Mapping[str, str]) -> _Reply:
        given = {name.lower(): value for name, value in headers.items()}
        scheme, _, key = given.get("authorization", "").partition(" ")
        valid = scheme.lower() == "bearer" and key.startswith("chp_") and key != "chp_"
        coding = given.get("content-encoding", "identity")
        try:
            _sandbox_need(valid and self._key in (None, key), "invalid API key", 401)
            text = f"a body must be plain JSON, without Content-Encoding {coding!r:.80}"
            _sandbox_need(coding.lower() == "identity", text, 415)
            with self._lock:
                return _sandbox_answer(200, self._route(request, problem))
        except _SandboxRefusal as exc:
            return _sandbox_error(*exc.args)

    def _route(self, request: _Row, problem: str) -> Any:
        """Return what the handler of the request in _ROUTES returns."""
        from urllib.parse import unquote

        path = [unquote(part) for part in request["path"].partition("/v1.0/")[2].split("/")]
        shape = path[:1] + ["*"] * (len(path) > 1) + path[2:]
        methods = self._ROUTES.get("/".join(shape), {})
        method = "GET" if request["method"] == "HEAD" else request["method"]
        _sandbox_need(methods, "no such route", 404)
        _sandbox_need(method in methods, "method not allowed", 405)
        _sandbox_need(not problem, problem)
        if len(path) > 1:
            path[1] = _sandbox_id("id", path[1])
        return methods[method](self, path, request["query"], request["body"])

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), timezone.utc)

    # Handlers take the path after /v1.0/ in segments, the query and the parsed body.

    def _ingest(self, path: list[str], query: _Row, body: Any) -> bytes:
        _sandbox_need(isinstance(body, list), "body must be a JSON array of logs")
        text = f"a request must hold 1 to 250 logs, got {len(body)}"
        _sandbox_need(0 < len(body) <= 250, text)
        fresh: dict[str, _Row] = {}
        for log in [self._check(index, fields) for index, fields in enumerate(body)]:
            if log["log_id"] not in self._logs:
                fresh.setdefault(log["log_id"], log)
        room = self.quota is None or len(self._logs) + len(fresh) <= self.quota
        _sandbox_need(room, "monthly log quota exceeded", 403, "QUOTA_EXCEEDED")
        self._logs.update(fresh)
        times: dict[str, set[datetime]] = {}
        for log in fresh.values():
            event_id, at = self._take(log)
            times.setdefault(event_id, set()).add(at)
        for policy in self._stores["policies"].values():
            if policy["enabled"] and policy["event_id"] in times:
                self._judge(policy, times[policy["event_id"]])
        return b""

    def _check(self, index: int, fields: Any) -> _Row:
        try:
            log = _sandbox_log(fields, self._now())
        except _SandboxRefusal as exc:
            raise _SandboxRefusal(f"log {index}: {exc.args[0]}", *exc.args[1:]) from exc
        poison = any(predicate(_sandbox_copy(log)) for predicate in self._poison)
        _sandbox_need(not poison, f"log {index}: log_id {log['log_id']} was rejected")
        return log

    def _take(self, log: _Row) -> tuple[str, datetime]:
        """File a log under its event definition, made when it is new."""
        name = {"agent": log.get("agent", ""), "event": log["event"]}
        event = self._named.get((name["agent"], name["event"]))
        event = event or self._save(["events"], {}, name)
        at = _sandbox_time(log["occurred_at"])
        self._points.setdefault(event["event_id"], []).append((at, float(log["value"])))
        return event["event_id"], at

    def _buckets(self, event: _Row, period: str) -> dict[datetime, _Row]:
        buckets: dict[datetime, _Row] = {}
        zone = _sandbox_zone(event["timezone"])
        for at, value in self._points.get(event["event_id"], []):
            _sandbox_add(buckets, _sandbox_start(at, period, zone), value)
        return buckets

    def _judge(self, policy: _Row, times: set[datetime]) -> None:
        """Raise an alert for each bucket around `times` that meets the policy's condition."""
        event, period = self._stores["events"][policy["event_id"]], policy["period"]
        buckets, zone = self._buckets(event, period), _sandbox_zone(event["timezone"])
        holds = _SANDBOX_CONDITIONS[policy["condition"]]
        for start in sorted({_sandbox_start(at, period, zone) for at in times}):
            value = _sandbox_aggregates(buckets[start])[policy["aggregate"]]
            mark = policy["policy_id"], event["event_id"], period, start
            if mark not in self._judged and holds(float(value), float(policy["threshold"])):
                self._judged.add(mark)
                self._alert(policy, event, {**buckets[start], "value": value})

    def _alert(self, policy: _Row, event: _Row, seen: _Row) -> None:
        alert = {
            "alert_id": _sandbox_new_id(),
            **policy,
            "agent": event["agent"],
            "event": event["event"],
            "status": "triggered",
            **seen,
            "triggered_at": _iso(self._now()),
            "acknowledged_at": None,
            "resolved_at": None,
        }
        for name in ("description", "enabled", "squares"):
            del alert[name]
        self._stores["alerts"][alert["alert_id"]] = alert
        for destination in self._stores["destinations"].values():
            named = policy["policy_id"] in destination["policy_ids"]
            if destination["enabled"] and (named or destination["scope"] == "all"):
                self._deliver("alert", alert["alert_id"], destination)

    def _deliver(self, kind: str, alert_id: str, destination: _Row) -> None:
        now = destination["last_delivered_at"] = _iso(self._now())
        chat = destination["credentials"] or {}
        attempt = {
            "attempt_id": _sandbox_new_id(),
            "alert_id": alert_id,
            "destination_id": destination["destination_id"],
            "channel": destination["channel"],
            "target": destination["url"] or str(chat.get("chat_id", "")),
            "status": "sent",
            "response_status": None,
            "error_message": "recorded only: a sandbox sends nothing",
            "created_at": now,
        }
        self._attempts.append((kind, attempt))

    def _find(self, path: list[str], *_: Any) -> _Row:
        record = self._stores[path[0]].get(path[1], {})
        _sandbox_need(record, f"{_SANDBOX_IDS[path[0]]} {path[1]} is unknown", 404)
        return record

    def _list(self, path: list[str], *_: Any) -> list[_Row]:
        return [*self._stores[path[0]].values()]

    def _save(self, path: list[str], query: _Row, body: Any) -> _Row:
        """Create or change a resource; a refusal leaves everything as it was."""
        id_name = _SANDBOX_IDS[path[0]]
        if len(path) > 1:
            record = self._find(path)
        else:
            record = {id_name: _sandbox_new_id()}
        fields = _sandbox_fields(path[0], body, record)
        self._COMPLETE[path[0]](self, fields, record)
        record.update(fields)
        return self._stores[path[0]].setdefault(record[id_name], record)

    def _complete_event(self, fields: _Row, record: _Row) -> None:
        agent, event = fields["agent"].strip(), record.get("event") or fields["event"].strip()
        _sandbox_need(event, "event is required")
        _sandbox_zone(fields["timezone"])
        taken = self._named.get((agent, event), record) is not record
        _sandbox_need(not taken, "this agent and event have a definition already", 422)
        self._named.pop((record.get("agent", agent), event), None)
        self._named[agent, event] = record
        token = record.get("share_token") or _sandbox_new_id()
        created = record.get("created_at", _iso(self._now()))
        fields.update(
            agent=agent, event=event, share_token=token, user_id=_SANDBOX_USER, created_at=created
        )

    def _complete_policy(self, fields: _Row, record: _Row) -> None:
        fields["event_id"] = _sandbox_id("event_id", fields["event_id"])
        _sandbox_need(fields["event_id"] in self._stores["events"], "event_id is unknown", 422)

    def _complete_destination(self, fields: _Row, record: _Row) -> None:
        channel, url, credentials = fields["channel"], fields["url"], fields["credentials"] or {}
        given = {**credentials, "url": url}
        for name in _SANDBOX_NEEDS.get(channel, ("url",)):
            _sandbox_need(
                str(given.get(name) or "").strip(), f"a {channel} destination needs {name}"
            )
        scheme, _, rest = url.partition("://")
        valid = not url or (scheme in ("http", "https") and rest.partition("/")[0])
        if channel == "email":
            valid = valid or all(url.partition("@"))
        _sandbox_need(valid, "url must be an absolute http(s) URL; for email, an address")
        _sandbox_need(
            all(type(item) in (str, int) for item in credentials.values()),
            "credentials must be strings",
        )
        policy_ids = [_sandbox_id("policy_ids", str(item)) for item in fields["policy_ids"]]
        fields.update(credentials=credentials or None, policy_ids=policy_ids)
        known = self._stores["policies"].keys() >= set(policy_ids)
        _sandbox_need(known, "policy_ids names an unknown policy", 422)
        now = _iso(self._now())
        created, delivered = record.get("created_at", now), record.get("last_delivered_at")
        fields.update(
            created_at=created, updated_at=now, last_delivered_at=delivered, last_error=None
        )

    def _rollups(self, path: list[str], query: _Row, _: Any) -> list[_Row]:
        event, period = self._find(path), _sandbox_choice(query, "period", _SANDBOX_PERIODS)
        same = {name: event[name] for name in ("event_id", "agent", "event")}
        buckets = sorted(self._buckets(event, period).items(), reverse=True)
        rollups = [
            {**same, "period": period, "occurred_at": _iso(start), **bucket}
            for start, bucket in buckets
        ]
        return _sandbox_page(rollups, query)

    def _analytics(self, path: list[str], query: _Row, _: Any) -> _Row:
        event_id = self._find(path)["event_id"]
        view = _sandbox_choice(query, "view", ("window",))
        period = _sandbox_choice(query, "period", tuple(_SANDBOX_SPANS))
        windows: dict[str, _Row] = {}
        span, now = _SANDBOX_SPANS[period], self._now()
        shifts = {"previous_window": span}
        shifts.update(
            (f"previous_{n}", longer) for n, longer in _SANDBOX_SPANS.items() if longer > span
        )
        previous = _sandbox_choice(query, "previous", tuple(shifts))
        for at, value in self._points.get(event_id, []):
            for name, end in (("current", now), ("previous", now - shifts[previous])):
                if end - span < at <= end:
                    _sandbox_add(windows, name, value)
        data = _sandbox_compare(windows) if windows else None
        return {
            "event_id": event_id,
            "view": view,
            "period": period,
            "previous": previous,
            "data": data,
        }

    def _list_alerts(self, path: list[str], query: _Row, _: Any) -> list[_Row]:
        alerts = self._list(path)
        if "status" not in query:
            return alerts
        status = _sandbox_choice(query, "status", _SANDBOX_STATUSES)
        return [alert for alert in alerts if alert["status"] == status]

    def _move_alert(self, path: list[str], *_: Any) -> _Row:
        alert, status = self._find(path), _SANDBOX_VERBS[path[2]]
        if alert["status"] != status:  # repeating a step changes nothing; no step leads back
            starts = _SANDBOX_STATUSES[: _SANDBOX_STATUSES.index(status)]
            _sandbox_need(
                alert["status"] in starts,
                f"cannot {path[2]} an alert that is {alert['status']}",
                422,
            )
            alert["status"] = status
            if f"{status}_at" in alert:
                alert[f"{status}_at"] = _iso(self._now())
        return alert

    def _deliveries(self, path: list[str], query: _Row, _: Any) -> list[_Row]:
        wanted = _sandbox_choice(query, "kind", ("alert", "test", "all"), "alert")
        attempts = [pair for pair in self._attempts if pair[1]["alert_id"] == path[1]]
        if not attempts:  # the alert of a test is known by its attempt alone
            self._find(path)
        return _sandbox_page([row for kind, row in attempts if wanted in (kind, "all")], query)

    def _test(self, path: list[str], *_: Any) -> _Row:
        destination, alert_id = self._find(path), _sandbox_new_id()
        self._deliver("test", alert_id, destination)
        return {"alert_id": alert_id, "destination_id": path[1], "status": "sent"}

    _COMPLETE = {
        "events": _complete_event,
        "policies": _complete_policy,
        "destinations": _complete_destination,
    }
    _ROUTES: dict[str, dict[str, Callable[[Sandbox, list[str], _Row, Any], Any]]] = {
        "logs": {"POST": _ingest},
        "events": {"GET": _list, "POST": _save},
        "events/*": {"GET": _find, "PUT": _save},
        "events/*/logs": {"GET": _rollups},
        "events/*/analytics": {"GET": _analytics},
        "policies": {"GET": _list, "POST": _save},
        "policies/*": {"GET": _find, "PUT": _save},
        "alerts": {"GET": _list_alerts},
        "alerts/*": {"GET": _find},
        "alerts/*/deliveries": {"GET": _deliveries},
        "alerts/*/acknowledge": {"POST": _move_alert},
        "alerts/*/resolve": {"POST": _move_alert},
        "alerts/*/archive": {"POST": _move_alert},
        "destinations": {"GET": _list, "POST": _save},
        "destinations/*": {"GET": _find, "PUT": _save},
        "destinations/*/test": {"POST": _test},
    }


def _sandbox_admit(headers: Any, host: str) -> None:
    """Refuse web pages, also those whose own name stands for this address.

    With a `host` that others reach, any name will do: a container's, for one.
    """
    import re

    origin, name = headers.get("Origin"), headers.get("Host", "")
    text = f"Origin {origin!r:.80} is refused: a sandbox serves programs, not web pages"
    _sandbox_need(origin is None, text, 403)
    own = re.sub(r":[0-9]*$", "", name).strip("[]").lower() in ("", *_SANDBOX_HOSTS)
    text = f"Host {name!r:.80} is refused: this sandbox serves its own machine; --host opens it"
    _sandbox_need(own or host not in _SANDBOX_HOSTS, text, 403)


def _sandbox_body(headers: Any, stream: Any) -> bytes:
    """Return a request's body, in chunks or of a given length; too large a one is not read."""
    coding, length = headers.get("Transfer-Encoding"), headers.get("Content-Length", "0")
    if coding is not None:
        text = f"Transfer-Encoding must be chunked, got {coding!r:.80}"
        _sandbox_need(coding.lower() == "chunked", text)
        return b"".join(_sandbox_chunks(stream))
    text = f"Content-Length must be a number of bytes, got {length!r:.80}"
    _sandbox_need(length.isascii() and length.isdigit(), text)
    return _sandbox_read(stream, int(length[:20]), 0)


def _sandbox_chunks(stream: Any) -> Iterator[bytes]:
    import re

    taken = 0
    while True:
        size = stream.readline(1024).partition(b";")[0].strip()
        _sandbox_need(re.fullmatch(b"[0-9A-Fa-f]{1,16}", size), "a chunk must begin with its size")
        if int(size, 16) == 0:
            break
        yield _sandbox_read(stream, int(size, 16), taken)
        taken += int(size, 16)
        _sandbox_need(stream.readline(2) == b"\r\n", "a chunk must be of the size it gives")
    for _ in range(100):  # trailers
        if stream.readline(1024).strip() == b"":
            return
    raise _SandboxRefusal("a chunked body must end with a blank line", 400)


def _sandbox_read(stream: Any, size: int, taken: int) -> bytes:
    """Return the next `size` bytes of a body of which `taken` have come."""
    text = f"a body may have {_SANDBOX_BODY_BYTES} bytes"
    _sandbox_need(taken + size <= _SANDBOX_BODY_BYTES, text, 413)
    data: bytes = stream.read(size)
    if len(data) < size:
        raise ConnectionResetError("a body was cut short")
    return data


def _serve_sandbox(sandbox: Sandbox, port: int = 0, host: str = "127.0.0.1") -> ThreadingHTTPServer:
    """Return an HTTP server that answers as `sandbox` does, and 200 without a key to GET /health.

    The caller runs serve_forever() and server_close(). Port 0 takes a free one, which
    server_address tells. A scripted drop closes the connection without an answer.
    """
    import socket
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        server_version, sys_version = f"chirrop-sandbox/{__version__}", ""
        timeout = 60.0  # seconds that an idle connection may hold a thread
        disable_nagle_algorithm = True  # an answer is two writes

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:  # scripted, or the client hung up: no answer
                pass

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def answer(self) -> None:
            try:
                self.reply(self.answered())
            except _SandboxRefusal as exc:
                self.close_connection = True
                self.reply(_sandbox_error(*exc.args))
                self.connection.settimeout(1.0)
                while self.rfile.read1(65536):  # closed with data unread, TCP resets the answer
                    pass

        def answered(self) -> _Reply:
            _sandbox_admit(self.headers, host)
            body = _sandbox_body(self.headers, self.rfile)
            if self.command == "OPTIONS":
                return 200, b"", {"Allow": "GET, HEAD, OPTIONS, POST, PUT"}
            if self.path in ("/", "/health") and self.command in ("GET", "HEAD"):
                return _sandbox_answer(200, {"status": "ok"})
            url = "http://127.0.0.1/" + self.path.lstrip("/")
            return sandbox(self.command, url, body, dict(self.headers), math.inf)

        def reply(self, answer: _Reply) -> None:
            self.send_response(answer[0])
            for name, value in answer[2].items():
                self.send_header(name, value)
            head = self.command == "HEAD"
            if not head:
                self.send_header("Content-Length", str(len(answer[1])))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b"" if head else answer[1])

        do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815  # http.server's names
        do_OPTIONS = do_PATCH = do_DELETE = answer  # noqa: N815

    class Server(ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        request_queue_size = 128  # connections that may wait at once: the default is 5
        allow_reuse_address = os.name == "posix"  # elsewhere it would share a port in use
        daemon_threads = True

    return Server((host, port), Handler)


# ---- Command line ---------------------------------------------------------
# In: arguments, standard input, CHIRROP_* and ./.env. Out: results on standard output, all else on
# standard error, exit status 0, 1 (failed or interrupted) or 2 (usage, configuration). Importing
# runs nothing of it.

_MAX_LINE_BYTES = 1 << 20  # of `log -`: a longer line holds no log, and must not fill memory
_QUEUED_LINES = 20_000  # of `log -`: some 5 MB, and senders that are seldom out of work
_SHOWN_LINES = 3  # of `log -`: bad lines of one kind that are shown; the others are counted
_CLOCK_SECONDS = 60.0  # that `doctor` lets the clocks differ
_DEMO_EVENTS = (
    ("checkout", "http.request.duration_ms", 180.0),
    ("search", "http.request.duration_ms", 45.0),
    ("search", "tokens.used.count", 900.0),
    ("billing", "invoice.total.eur", 49.0),
)
_DEMO_FAULTS: tuple[dict[str, Any], ...] = (
    {"status": 502},
    {"drop": "before"},
    {"retry_after": 1},
    {"drop": "after"},
)


def _columns() -> int:
    """Return the width of the terminal; 80 where there is none."""
    import shutil

    try:
        size = os.get_terminal_size(2)  # standard output may be a pipe
    except OSError:
        size = os.terminal_size((80, 24))
    return max(20, shutil.get_terminal_size(size).columns or 80)


def _plain(value: object) -> str:
    """Return a value as printable text; "" for None."""
    if value is None:
        return ""
    return _printable(str(value))


def _width(text: str) -> int:
    import unicodedata

    own = [c for c in text if not unicodedata.combining(c)]
    return len(own) + sum(unicodedata.east_asian_width(c) in "WF" for c in own)


def _fit(text: str, width: int) -> str:
    """Return text cut or padded to `width` columns."""
    if _width(text) > width:
        text = text[:width]
        while _width(text) >= width:
            text = text[:-1]
        text += "~"
    return text + " " * (width - _width(text))


def _wrap(text: str, stream: Any, indent: int = 0) -> str:
    """Return text without control characters, in lines that fit where `stream` is a terminal."""
    import textwrap

    text, room = _plain(text), _columns() - indent
    if not stream.isatty():
        return text
    if _width(text) != len(text):
        room //= 2
    return ("\n" + " " * indent).join(textwrap.wrap(text, room))


def _figure(value: Any) -> str:
    """Return a number as charts and tables show it, and anything else as plain text."""
    if not isinstance(value, (int, float)):
        return _plain(value)
    if 0 < abs(value) < 0.01 or abs(value) >= 1e12:
        return f"{value:.4g}"
    if value == int(value):
        return f"{value:,.0f}"
    return f"{value:,.2f}"


def _paint(text: str, code: int) -> str:
    """Return text in a colour, where standard output shows colours."""
    unwanted = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if unwanted or sys.platform == "win32" or not sys.stdout.isatty():
        return text
    return f"\033[{code}m{text}\033[0m"


def _say(text: object) -> None:
    """Print a message on standard error, in the place of a progress line."""
    try:
        _status("")
        print(_wrap(f"chirrop: {text}", sys.stderr), file=sys.stderr, flush=True)
    except OSError:  # nobody reads it
        pass


def _status(text: str) -> None:
    """Replace the progress line, where standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"\r{_fit(text, _columns() - 1)}\r", end="", file=sys.stderr, flush=True)


class _Progress:
    """Keep a line about a client's logs on standard error, where that is a terminal."""

    def __init__(self, client: Client) -> None:
        self._client, self._end = client, threading.Event()
        self._thread = threading.Thread(target=self._run, name="chirrop-progress", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc_info: object) -> None:
        self._end.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            while sys.stderr.isatty():
                stats, failing = self._client.stats(), self._client._outbox.state.failures
                text = f"{stats.delivered:,} delivered, {stats.queued + stats.in_flight:,} waiting"
                if stats.dropped:
                    text += f", {sum(stats.dropped.values()):,} dropped"
                if failing:
                    text += f", retrying: {_plain(stats.last_error)}"
                _status(text)
                if self._end.wait(0.1):
                    return _status("")
        except OSError:  # the terminal is gone
            pass


def _result(args: Any, value: object, show: Callable[[], object]) -> int:
    """Print a command's result: JSON for machines, else as `show` does."""
    if args.json:
        print(json.dumps(value, indent=2))
    else:
        show()
    return 0


def _table(heads: tuple[str, ...], items: list[Any]) -> None:
    """Print a line for each item, or a block where the terminal is too narrow; ids come first."""
    rows = [[_figure(item.get(head)) for head in heads] for item in items]
    widths = [max(map(_width, column)) for column in zip(heads, *rows)]
    if not rows:
        _say("there are none")
    elif sys.stdout.isatty() and sum(widths) + 2 * len(widths) - 2 > _columns():
        for row in rows:
            others = [f"  {head} {cell}" for head, cell in zip(heads[1:], row[1:]) if cell]
            print("\n".join(_fit(line, _columns()).rstrip() for line in (row[0], *others)))
    else:
        for cells in ([head.upper() for head in heads], *rows):
            print("  ".join(map(_fit, cells, widths)).rstrip())


def _headline(event: Event, what: str) -> None:
    name = " ".join(filter(None, (event.get("agent"), event.get("event"))))
    if event.get("unit"):
        name += f" ({event['unit']})"
    print(_wrap(f"{name}: {what}", sys.stdout))


def _show_rollups(event: Event, period: str, rollups: list[Rollup]) -> None:
    """Print rollups, newest first, as lines from the oldest on, with bars as long as the sums."""
    _headline(event, f"count and sum by {period}, UTC")
    block = "█" if "utf" in (sys.stdout.encoding or "").lower() else "#"
    rows = [(_bucket(r), r.get("value") or 0.0, r.get("count")) for r in reversed(rollups)]
    cells = [
        (_plain(at[5:16]).replace("T", " "), _figure(count), _figure(value))
        for at, value, count in rows
    ]
    widths = [max(map(len, column)) for column in zip(*cells)]
    room = max(1, _columns() - sum(widths) - 2 * len(widths))
    peak = max((abs(value) for _, value, _ in rows), default=0.0) or 1.0
    for (_, value, _), row in zip(rows, cells):
        bar = (block if value >= 0 else "-") * math.ceil(abs(value) / peak * room)
        print("  ".join((*map(str.rjust, row, widths), _paint(bar, 36))))


def _show_analytics(event: Event, answer: Analytics) -> None:
    data: Any = answer.get("data")
    _headline(event, f"last {answer.get('period')} and {answer.get('previous')}")
    if not data:
        print("no logs in either window")
        return
    print(f"{'':6}  {'now':>10}  {'before':>10}  {'change':>8}")
    for name in ("value", "count", "mean", "stddev"):
        change, percent = data.get(f"{name}_pct_change"), ""
        if change is not None and data.get(f"previous_{name}"):
            percent = f"{change:+,.1f}%"
        now, before = _figure(data.get(f"current_{name}")), _figure(data.get(f"previous_{name}"))
        print(f"{name:6}  {now:>10}  {before:>10}  {percent:>8}".rstrip())


def _parsed(name: str, text: str | bytes) -> Any:
    try:
        if isinstance(text, bytes):
            text = text.decode()
        return json.loads(text.strip("\ufeff \t\r\n"))
    except (ValueError, RecursionError) as exc:
        raise ChirrOpValidationError(f"{name} must be JSON: {exc}") from exc


def _event_named(client: Client, args: Any) -> Event:
    """Return the definition that EVENT and --agent name; a UUID is an id."""
    import re

    if re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", args.event):
        return client.get_event(args.event)
    event = client.find_event(args.event, args.agent)
    if event is None:
        name = args.event.strip()
        agents = {e.get("agent") or "" for e in client.list_events() if e.get("event") == name}
        having = ", ".join(sorted(agent or "no agent at all" for agent in agents))
        text = f"there is no event {_show(name)}"
        if agents:
            text += f" for agent {_show(args.agent)}, but for {having}"
        else:
            text += "; `chirrop events` lists them"
        raise ChirrOpNotFoundError(text)
    return event


def _cmd_events(args: Any) -> int:
    with new_client() as client:
        events = client.list_events()
    return _result(
        args, events, lambda: _table(("event_id", "agent", "event", "unit", "title"), events)
    )


def _cmd_rollups(args: Any) -> int:
    limit = _integer("--limit", args.limit, 1)
    with new_client() as client:
        event = _event_named(client, args)
        # Two at least, to see the order: where the oldest come first, the newest are at the end.
        rollups = client.get_event_logs(event["event_id"], args.period, max(2, limit))
        if args.all or (len(rollups) > 1 and _bucket(rollups[0]) < _bucket(rollups[-1])):
            rollups = [*client.iter_event_logs(event["event_id"], args.period)]
    # A bucket that begins between two pages moves the others on, so that one may come twice.
    rollups = sorted({_bucket(r): r for r in rollups}.values(), key=_bucket, reverse=True)
    if not args.all:
        rollups = rollups[:limit]
    return _result(args, rollups, lambda: _show_rollups(event, args.period, rollups))


def _bucket(rollup: Rollup) -> str:
    return str(rollup.get("occurred_at"))


def _cmd_analytics(args: Any) -> int:
    with new_client() as client:
        event = _event_named(client, args)
        answer = client.get_event_analytics(event["event_id"], "window", args.period, args.previous)
    return _result(args, answer, lambda: _show_analytics(event, answer))


def _cmd_alerts(args: Any) -> int:
    if args.action and (args.id is None or args.status):
        raise ChirrOpValidationError(
            f"`alerts {args.action}` takes the ID of an alert: `alerts` lists them"
        )
    with new_client() as client:
        moves = {
            "ack": client.acknowledge_alert,
            "resolve": client.resolve_alert,
            "archive": client.archive_alert,
        }
        if args.action:
            answer: Any = moves[args.action](args.id)
            alerts = [answer]
        else:
            answer = alerts = client.list_alerts(args.status)
    heads = ("alert_id", "status", "severity", "agent", "event", "value", "triggered_at", "title")
    return _result(args, answer, lambda: _table(heads, alerts))


def _cmd_api(args: Any) -> int:
    import urllib.parse

    path, _, query = args.path.partition("?")
    body = args.data
    if body == "-":
        body = sys.stdin.buffer.read()
    if body is not None:
        body = _parsed("--data", body)
    with new_client() as client:
        base = urllib.parse.urlsplit(client.config.servicer_endpoint).path
        if base and path.startswith(base + "/"):  # written as in the documentation: /v1.0/events
            path = path[len(base) :]
        pairs = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        answer = client.request(args.method, path, pairs, body)
    print(json.dumps(answer, indent=2))
    return 0


def _cmd_log(args: Any) -> int:
    if args.event == "-":
        if {args.value, args.agent, args.meta, args.occurred_at, args.log_id} != {None}:
            raise ChirrOpValidationError(
                "`log -` reads whole logs from standard input, and takes nothing but --id-from"
            )
        return _log_lines(args)
    if args.value is None or args.id_from:
        raise ChirrOpValidationError("`log EVENT` needs a VALUE; --id-from is for `log -` alone")
    meta = None if args.meta is None else _parsed("--meta", args.meta)
    entry = Log(args.event, args.value, args.agent, args.log_id, meta, args.occurred_at)
    with new_client(retries=3) as client:
        client.send_logs([entry])
        delivered = client.stats().delivered
    word = "delivered" if delivered else "discarded, since CHIRROP_DISABLED is set:"
    account = {"delivered": delivered, "log": entry.to_dict()}
    return _result(args, account, lambda: print(word, entry.log_id))


def _log_lines(args: Any) -> int:
    """Send JSON Lines from standard input, in bounded memory."""
    client = new_client(retries=5)
    number = 0
    bad: dict[str, int] = {}
    with _Progress(client), client:
        try:
            for number, line in enumerate(_lines(sys.stdin.buffer), 1):
                try:
                    if not line.isspace():
                        client.log(_log_of(line, args.id_from))
                except ChirrOpValidationError as exc:
                    _count_bad(bad, number, str(exc))
                if number % 1000 == 0:
                    _make_room(client)
        except (ChirrOpError, KeyboardInterrupt) as exc:
            _say(f"stopped at line {number:,}: {str(exc) or 'interrupted'}")
            client.close(2.0)
    for kind, count in bad.items():
        if count > _SHOWN_LINES:
            _say(f"and {count - _SHOWN_LINES:,} more: {kind}")
    stats = client.stats()
    wrong, lost = sum(bad.values()), sum(stats.dropped.values())
    words = f"{number:,} lines: {stats.delivered:,} delivered, {wrong:,} bad, {lost:,} dropped"
    account = {
        "lines": number,
        "bad": wrong,
        "delivered": stats.delivered,
        "dropped": stats.dropped,
    }
    _result(args, account, lambda: print(words))
    if lost:
        _say(f"the last failure: {stats.last_error}")
    return int(bool(wrong or lost or client.config.disabled))


def _count_bad(bad: dict[str, int], number: int, text: str) -> None:
    """Count a bad line by the rule that it breaks; show the first few of each kind."""
    kind = text.partition(", got ")[0].partition(": ")[0]
    bad[kind] = bad.get(kind, 0) + 1
    if bad[kind] <= _SHOWN_LINES:
        _say(f"line {number:,}: {text}")


def _lines(stream: Any) -> Iterator[bytes]:
    """Yield lines; of one that is too long only its beginning."""
    while line := stream.readline(_MAX_LINE_BYTES):
        yield line
        while len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = stream.readline(_MAX_LINE_BYTES)


def _log_of(line: bytes, id_from: list[str] | None) -> Log:
    fields = _parsed("a log", line)
    if not isinstance(fields, dict):
        raise ChirrOpValidationError(f"a log must be a JSON object, got {_show(fields)}")
    if unknown := fields.keys() - _LOG_FIELDS:
        names = ", ".join(map(_show, unknown))
        raise ChirrOpValidationError(
            f"a log has no fields but {', '.join(_LOG_FIELDS)}, got {names}: meta may hold others"
        )
    if id_from and not fields.get("log_id"):
        fields["log_id"] = _derived_id(fields, id_from)
    arguments: Any = map(fields.get, _LOG_FIELDS)
    return Log(*arguments)


def _derived_id(fields: dict[str, Any], names: list[str]) -> str:
    """Return a UUID made of agent, event and the named fields: the same row has the same one."""
    import uuid

    parts = [fields.get("agent"), fields.get("event")]
    for name in names:
        holder: Any = fields
        key = name
        if name.startswith("meta."):
            holder, key = fields.get("meta"), name[5:]
        part = holder.get(key) if isinstance(holder, dict) else None
        if part is None:
            raise ChirrOpValidationError(f"the line has no {name}, from which its log_id is made")
        parts.append(part)
    return str(uuid.uuid5(uuid.NAMESPACE_URL, _encode_json("log_id", parts).decode()))


def _make_room(client: Client) -> None:
    """Wait while many logs are queued, as long as anything moves; raise when none is taken."""
    before = client.stats()
    if before.queued > _QUEUED_LINES:
        client.flush()
    stats = client.stats()
    stuck = (stats.delivered, stats.dropped) == (before.delivered, before.dropped)
    if "refused" in stats.dropped or (stuck and before.queued > _QUEUED_LINES):
        raise stats.last_error or ChirrOpError("the service takes no logs")


def _cmd_drain(args: Any) -> int:
    spool = SqliteSpool(args.spool, required=True)
    spool.dead_letters()  # raises for what is no spool
    if not spool.exists():
        raise ChirrOpValidationError(f"there is no spool {args.spool!r}")
    client = new_client(spool=spool, retries=5)
    if client.config.disabled:
        raise ChirrOpError("CHIRROP_DISABLED is set: nothing is sent")
    with _Progress(client):
        try:
            delivered, clean = -1, False
            while not clean and client.stats().delivered > delivered:
                delivered = client.stats().delivered
                clean = client.flush()
        finally:
            client.close(0.0)
    stats, dead = client.stats(), len(spool.dead_letters())
    account = {"delivered": stats.delivered, "left": stats.queued, "dead_letters": dead}
    words = [f"{value:,} {name.replace('_', ' ')}" for name, value in account.items()]
    _result(args, account, lambda: print("\n".join(words)))
    if stats.last_error and not clean:
        _say(f"the last failure: {stats.last_error}")
    return int(not clean)


def _cmd_doctor(args: Any) -> int:
    found = []
    for check, good, text in _diagnose():
        found.append({"check": check, "ok": good, "text": text})
        if not args.json:
            mark = _paint("ok  ", 32) if good else _paint("FAIL", 31)
            print(mark, f"{check:6}", _wrap(text, sys.stdout, 12), flush=True)
    _result(args, found, lambda: None)
    return int(not all(entry["ok"] for entry in found))


# For the first of these classes in a failure's chain; {} is the variable that is at fault.
_CURES = {
    "gaierror": "The name has no address: check {}, the network and its DNS server.",
    "SSLCertVerificationError": "The certificate is not trusted: where a proxy inspects TLS, or the"
    " CA is private, set SSL_CERT_FILE to the CA's file; check this computer's clock, too.",
    "SSLError": "The TLS handshake failed: check {}; perhaps http is served there, or the port is"
    " wrong.",
    "ConnectionRefusedError": "Nothing listens there: check {}, and that it is running.",
    "timeout": "Check {} and the firewall, and whether HTTPS_PROXY must name a proxy.",
    "TimeoutError": "Check {} and the firewall, and whether HTTPS_PROXY must name a proxy.",
    "Exception": "Check {}.",
}


def _diagnose() -> Iterator[tuple[str, bool, str]]:
    """Yield each check, whether all is well, what was found and what to do. Sends no log."""
    key = ""
    try:
        key = _checked_key(None)
        yield "key", True, f"{_find_key(None)[1]}, has the right form"
    except ChirrOpValidationError as exc:
        yield "key", False, f"{exc}. Set CHIRROP_API_KEY to your workspace's key."
    if Config("chp_doctor", DEFAULT_API_ENDPOINT, DEFAULT_SERVICER_ENDPOINT).disabled:
        text = "CHIRROP_DISABLED is set: logs are checked and discarded. Unset it to send them."
        yield "switch", False, text
    for name, variable, default in (
        ("logs", "CHIRROP_API_ENDPOINT", DEFAULT_API_ENDPOINT),
        ("api", "CHIRROP_SERVICER_ENDPOINT", DEFAULT_SERVICER_ENDPOINT),
    ):
        try:
            yield from _diagnose_endpoint(
                name, _checked_endpoint("the URL", None, variable, default), key, variable
            )
        except ChirrOpValidationError as exc:
            yield name, False, f"{exc}. Correct it, or unset it for {default}."


def _diagnose_endpoint(
    name: str, url: str, key: str, variable: str
) -> Iterator[tuple[str, bool, str]]:
    """Check the way to an endpoint by the client's transport: proxy, DNS, TLS, answer, clock."""
    way, fault = _way_to(url, variable)
    yield name, True, f"{url}, {way}"
    # Disabled, because there may be no key.
    link = _Link(Config(key, DEFAULT_API_ENDPOINT, DEFAULT_SERVICER_ENDPOINT, disabled=True))
    # What takes logs shows in its answer to an empty batch: which routes answer a GET, and what
    # OPTIONS says, differs between routers.
    if name == "logs":
        answer = link.attempt("POST", url, [b"[]"], 10, True, [])
    else:
        answer = link.attempt("GET", f"{url}/events", [None], 10, True, [])
    link.close()
    cause = answer.cause
    if cause is not None:
        kinds = [kind.__name__ for exc in (cause, cause.__cause__) for kind in type(exc).__mro__]
        cure = next(text for kind, text in _CURES.items() if kind in kinds)
        at_fault = variable if "SSLError" in kinds else fault
        yield name, False, f"{cause}. {cure.format(at_fault)}"
        return
    if answer.status == 407:
        variable = fault
    good, text = _judged(name, answer, variable, bool(key))
    if good and url.startswith("https"):
        text = f", certificate trusted{text}"
    if good:
        text = f"reached{text}"
    yield name, good, text
    if name == "api":
        yield from _diagnose_clock(answer.headers.get("date", ""))


def _way_to(url: str, variable: str) -> tuple[str, str]:
    """Return the proxy on the way, for people, and the variable that says where to connect."""
    import urllib.parse
    import urllib.request

    parts = urllib.parse.urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme, "").rpartition("@")[2]  # no password
    if not proxy or urllib.request.proxy_bypass(parts.netloc):
        return "no proxy", variable
    names = [n for n in os.environ if n.lower() == f"{parts.scheme}_proxy" and os.environ[n]]
    variable = max(names, default="the system's proxy settings")  # lower case has precedence
    return f"by the proxy {proxy} of {variable} (NO_PROXY can exempt the host)", variable


def _judged(name: str, answer: _Answer, variable: str, has_key: bool) -> tuple[bool, str]:
    """Return whether an endpoint answers as its route does, and what to say or to do about it."""
    status, start = answer.status, answer.body.lstrip()[:1]
    fine = 200 <= status < 300
    error = "" if fine else str(answer.error())
    if status in (401, 403):
        if not has_key:
            return True, ""
        return False, f"{error}. The key is wrong, revoked, or of another workspace."
    if name == "api" and fine and start == b"[":
        return True, ", key accepted" if has_key else ""
    if name == "logs" and (status in (400, 422) or (fine and start != b"<")):
        return True, ", takes logs"
    if name == "logs" and status in (404, 405):
        return False, f"{error}. No logs are taken there: check the path of {variable}."
    what = "not a list of events" if name == "api" else "no answer of ChirrOp's"
    return False, f"{error or what}. Check {variable}, or try again later."


def _diagnose_clock(date: str) -> Iterator[tuple[str, bool, str]]:
    moment = _unix_seconds(date)
    if moment is not None:
        ahead = time.time() - moment
        side = "ahead of" if ahead > 0 else "behind"
        words = f"{abs(ahead):,.0f} s {side} the service's"
        good = abs(ahead) <= _CLOCK_SECONDS
        if not good:
            words += ". Correct this computer's: logs take their time from it."
        yield "clock", good, words


def _cmd_sandbox(args: Any) -> int:
    _integer("--port", args.port, 0, 65535)
    try:
        server = _serve_sandbox(Sandbox(quota=args.quota), args.port, args.host)
    except OSError as exc:
        text = f"cannot listen on port {args.port} of {args.host}: {exc.strerror or exc}"
        raise ChirrOpError(f"{text}; `--port 0` takes a free one") from exc
    with server:
        name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(args.host, args.host)  # noqa: S104
        if ":" in name:
            name = f"[{name}]"
        base = f"http://{name}:{server.server_address[1]}/v1.0"
        variables = {"CHIRROP_API_ENDPOINT": f"{base}/logs", "CHIRROP_SERVICER_ENDPOINT": base}
        _result(
            args,
            variables,
            lambda: print("\n".join(f"export {k}={v}" for k, v in variables.items())),
        )
        sys.stdout.flush()
        _say(
            "any key that starts with chp_ will do; Ctrl-C ends the sandbox, which then forgets all"
        )
        if args.host not in _SANDBOX_HOSTS:
            _say("other machines reach it, too, and whoever does may read and change all it holds")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


def _demo_logs() -> Iterator[Log]:
    """Yield 5,000 logs of a small system over the last six hours, the busier the later."""
    import random

    rng, now = random.Random(2), datetime.now(timezone.utc)
    for number in range(5000):
        agent, event, size = _DEMO_EVENTS[number % len(_DEMO_EVENTS)]
        at = now - timedelta(hours=6 * (1 - rng.random() ** 0.5))
        value = round(size * rng.lognormvariate(0, 0.5), 2)
        meta = {"region": rng.choice(("eu", "us")), "release": "2.4.1"}
        if number == 2600:
            event = "poison.log"
        yield Log(event, value, agent, meta=meta, occurred_at=at)


def _cmd_demo(args: Any) -> int:
    """Send logs through a client into a sandbox that misbehaves; tell what became of them."""
    sandbox, logs = Sandbox(), list(_demo_logs())
    sandbox.reject(lambda log: log["event"] == "poison.log")
    lost: list[str] = []
    config = Config(
        "chp_demo",
        DEFAULT_API_ENDPOINT,
        DEFAULT_SERVICER_ENDPOINT,
        log_level="CRITICAL",  # the account tells it all
        transport=sandbox,
        disabled=False,  # whatever CHIRROP_DISABLED says: nothing leaves this process
        on_drop=lambda dropped, error: lost.extend(
            f"{log['agent']} {log['event']}: {error}" for log in dropped
        ),
    )
    client, part = Client(config), len(logs) // len(_DEMO_FAULTS)
    with _Progress(client), client:
        for number, fault in enumerate(_DEMO_FAULTS):
            sandbox.fail(path="/logs", **fault)
            for entry in logs[number * part : (number + 1) * part]:
                client.log(entry)
            client.flush()
        event: Any = client.find_event("http.request.duration_ms", agent="checkout")
        rollups = client.get_event_logs(event["event_id"], "hour")
        answer = client.get_event_analytics(event["event_id"], "window", "1h", "previous_window")
    stats = client.stats()
    statuses = [str(request["status"] or "no answer") for request in sandbox.requests]
    kinds = dict.fromkeys(statuses)
    failures = {status: statuses.count(status) for status in kinds if status != "200"}
    balanced = stats.accepted == len(logs) == stats.delivered + len(lost)
    balanced = balanced and len(sandbox.logs) == stats.delivered

    def show() -> None:
        _show_rollups(event, "hour", rollups)
        print()
        _show_analytics(event, answer)
        failed = ", ".join(f"{count} x {status}" for status, count in failures.items())
        print("\n" + _wrap(f"{len(statuses)} requests, of which failed: {failed}", sys.stdout))
        parts = f"delivered {stats.delivered:,} + dropped {len(lost)}"
        print(_wrap(f"accepted {stats.accepted:,} = {parts}", sys.stdout))
        for text in lost:
            print(_wrap(f"dropped {text}", sys.stdout, 2))

    account = {
        "accepted": stats.accepted,
        "delivered": stats.delivered,
        "dropped": lost,
        "balanced": balanced,
    }
    _result(
        args,
        {**account, "failures": failures, "event": event, "rollups": rollups, "analytics": answer},
        show,
    )
    return int(not balanced)


def _arguments(argv: list[str] | None) -> Any:
    import argparse

    parser = argparse.ArgumentParser(
        prog="chirrop", description="Send events to ChirrOp, and ask it about them."
    )
    parser.add_argument("--version", action="version", version=f"chirrop {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    agent: Any = ("--agent", {"help": "who produces the event"})
    event: Any = ("event", {"metavar": "EVENT", "help": "name or id"})
    table: list[tuple[Callable[[Any], int], str, list[Any]]] = [
        (_cmd_demo, "send 5,000 logs into a misbehaving sandbox: no key, no network", []),
        (_cmd_log, "send one log, or JSON Lines from standard input", [
            ("event", {"metavar": "EVENT", "help": "name, or - for standard input"}),
            ("value", {"metavar": "VALUE", "type": float, "nargs": "?"}), agent,
            ("--meta", {"metavar": "JSON"}),
            ("--occurred-at", {"metavar": "TIME", "help": "ISO 8601; default: now"}),
            ("--log-id", {"metavar": "UUID", "help": "default: a random one"}),
            ("--id-from", {"metavar": "FIELD", "nargs": "+", "help": "of `log -`: make log_id of"
             " agent, event and these (meta.KEY: of meta): lines sent twice count once"})]),
        (_cmd_events, "list the event definitions", []),
        (_cmd_rollups, "show an event's counts and sums over time", [
            event, agent, ("--period", {"choices": _PERIODS, "default": "hour"}),
            ("--limit", {"type": int, "default": 100, "help": "most recent buckets; default: 100"}),
            ("--all", {"action": "store_true", "help": "all buckets there are"})]),
        (_cmd_analytics, "compare an event's last hours or days with earlier ones", [
            event, agent, ("--period", {"choices": _WINDOWS, "default": "1h"}),
            ("--previous", {"choices": _PREVIOUS, "default": "previous_window"})]),
        (_cmd_alerts, "list alerts, or move one on", [
            ("action", {"choices": ("ack", "resolve", "archive"), "nargs": "?"}),
            ("id", {"metavar": "ID", "nargs": "?"}), ("--status", {"choices": _ALERT_STATUSES})]),
        (_cmd_api, "make any call of the control plane", [
            ("method", {"metavar": "METHOD"}),
            ("path", {"metavar": "PATH", "help": "e.g. /alerts?status=triggered"}),
            ("--data", {"metavar": "JSON", "help": "the body; - is standard input"})]),
        (_cmd_drain, "deliver what a SqliteSpool holds", [("spool", {"metavar": "SPOOL"})]),
        (_cmd_doctor, "find out why nothing arrives; sends no log", []),
        (_cmd_sandbox, "serve a sandbox on this machine", [
            ("--port", {"type": int, "default": 8125, "help": "default: 8125; 0: a free one"}),
            ("--host", {"default": "127.0.0.1", "help": "address to listen on; default: 127.0.0.1,"
                " which other machines and containers cannot reach; 0.0.0.0 opens it to them"}),
            ("--quota", {"type": int, "help": "logs taken before QUOTA_EXCEEDED"})]),
    ]  # fmt: skip
    parsers = {}
    for run, about, arguments in table:
        name = run.__name__[5:]
        parsers[name] = command = commands.add_parser(name, help=about, description=about)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        for argument, options in arguments:
            command.add_argument(argument, **options)
    # Options may stand anywhere: these before the command, too, and all among its arguments.
    leading = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    leading.add_argument("--json", action="store_true")
    leading.add_argument("--agent", nargs="?")
    if argv is None:
        argv = sys.argv[1:]
    words = list(argv)
    _, rest = leading.parse_known_args(words)
    if not rest or rest[0] not in parsers:
        return parser.parse_args(rest)  # help, the version or an error
    words.remove(rest[0])
    return parsers[rest[0]].parse_intermixed_args(words)


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    0: done; 1: failed or interrupted; 2: an error of usage or of the configuration.
    """
    import logging

    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or io.StringIO()  # None: closed before Python started
        setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    logger, handler = logging.getLogger("chirrop"), logging.Handler()
    handler.emit = lambda record: _say(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        args = _arguments(argv)
        status: int = args.run(args)
        sys.stdout.flush()
    except SystemExit as exc:  # argparse has said why
        status = int(exc.code or 0)
    except KeyboardInterrupt:
        status = 1
    except BrokenPipeError:  # the reader has seen enough
        status = 0
    except ChirrOpValidationError as exc:
        _say(exc)
        status = 2
    except (ChirrOpError, OSError) as exc:
        _say(exc)
        status = 1
    # JSON of a shape that no ChirrOp sends.
    except (TypeError, AttributeError, KeyError, ValueError) as exc:
        _say(f"the answer makes no sense: {type(exc).__name__}: {exc}")
        status = 1
    logger.removeHandler(handler)
    try:
        sys.stdout.flush()
    except OSError:  # the interpreter must not try once more, and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


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
