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
    threads   _Sender, daemon: senders from the first log on, now and then a short one that writes log records;
              the command line's progress line, and the sandbox's server when it runs
    disk      SqliteSpool, when one is configured; ./.env is read for the key
    environ   Config (CHIRROP_*); the command line's NO_COLOR, TERM and COLUMNS; what urllib (proxies) and
              OpenSSL (CA files, SSLKEYLOGFILE) read by themselves
    exit      one atexit hook, and hooks around fork; both are installed by the import and act on open clients
    logging   the logger "chirrop", to which no handler is added

Sections, each using only what stands above it: constants, errors, Log, Config, buffers, retry policy,
outbox, sender, transport, Client, global API, Sandbox, command line. Search for "# ---- ".

To vendor: copy this file anywhere in your package. To update: replace it with a newer one and compare
__version__. Licence: MIT, the text is at the end of the file.
"""

from __future__ import annotations

import atexit
import io
import json
import math
import os
import struct
import sys
import threading
import time
import weakref
from collections import deque, namedtuple
from datetime import datetime, timedelta, timezone

__version__ = "1.0.0"

__all__ = [
    "ChirrOp", "Client", "Config", "Log", "SqliteSpool", "Sandbox", "Stats",
    "new_client", "initialize", "log_event", "flush", "stop",
    "ChirrOpError", "ChirrOpValidationError", "ChirrOpQueueFullError", "ChirrOpTransportError",
    "ChirrOpRateLimitError", "ChirrOpServerError", "ChirrOpNonRetryableError", "ChirrOpBadRequestError",
    "ChirrOpUnauthorizedError", "ChirrOpForbiddenError", "ChirrOpNotFoundError",
    "ChirrOpInternalServerError", "ChirrOpServiceUnavailableError", "__version__",
]  # fmt: skip

# ---- Constants and vocabularies -------------------------------------------
# Type checkers take TYPE_CHECKING for true; at run time nothing of typing is imported.

TYPE_CHECKING = False

MAX_BATCH = 250  # logs in one request: the service's hard limit
MAX_META_BYTES = 1024  # of encoded JSON: the service's limit
MAX_META_KEYS = 10  # top-level keys of an object: the service's limit
MAX_AGE_SECONDS = 30 * 86400.0  # of occurred_at: the service's limit
MAX_AHEAD_SECONDS = 86400.0  # of occurred_at: the service's limit
MAX_ANSWER_BYTES = (
    16 * 1024 * 1024
)  # far above any real answer; keeps a wrong host from filling memory
MAX_ERROR_BYTES = (
    65536  # of an answer other than 2xx: what is parsed for its message and kept in an error
)
MAX_SPLIT_REQUESTS = 64  # for one rejected batch: isolates 3 bad logs in 250 with at most 49
MAX_RETRY_AFTER = 300.0  # seconds the server may ask background senders to wait
MAX_SERVICER_WAIT = (
    30.0  # seconds a control-plane call waits for a Retry-After before it raises instead
)
BACKOFF_BASE = (
    1.0  # seconds: the widest wait after the first failure, doubled with each further one
)
BACKOFF_CAP = 30.0  # seconds
MAX_IDLE_SECONDS = (
    50.0  # of a kept connection: below the 60 s after which common load balancers close it
)
REPORT_SECONDS = (
    60.0  # between two log records about drops, so that a storm makes a handful of them
)
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
    from http.server import ThreadingHTTPServer
    from typing import Any, Literal, NamedTuple, Optional, TypedDict, TypeVar, Union

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
        agent: str
        title: str
        description: str
        unit: str
        timezone: str
        public: bool
        share_token: Optional[str]
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
        value_pct_change: Optional[float]
        count_pct_change: Optional[float]
        current_mean: Optional[float]
        previous_mean: Optional[float]
        mean_delta: Optional[float]
        mean_pct_change: Optional[float]
        current_stddev: Optional[float]
        previous_stddev: Optional[float]

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
        credentials: dict[str, Any]
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

    # One attempt, no retries: transport(method, url, body, headers, timeout) -> (status, body, headers).
    # Any status is returned; a network failure is raised as an OSError.
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
        body: the answer's parsed JSON, its text where it is not JSON, or None.
        retry_after: seconds the server asked to wait, or None.
    """

    def __init__(
        self,
        message: str = "",
        *,
        status_code: int = 0,
        body: Any = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
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
    """A failure on the way or in the server that another attempt may mend (408, 502, 504, other 5xx)."""


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
    0: ChirrOpTransportError,
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


def _without_key(exc: BaseException, key: str) -> BaseException:
    """Clear the tracebacks of an exception chain, whose frames hold the key; withhold one that quotes it."""
    link: BaseException | None = exc
    quoted, seen = False, set()
    while link is not None and id(link) not in seen:  # a chain may be a circle
        seen.add(id(link))
        link.__traceback__ = None
        try:
            text = str(link)
            quoted = quoted or (bool(key) and (key in text or repr(str(key))[1:-1] in text))
        except Exception:  # the application's own exception class
            quoted = True
        link = link.__cause__ or link.__context__
    return (
        ConnectionError(f"{type(exc).__name__}, whose text is withheld: it quotes the API key")
        if quoted
        else exc
    )


def _masked(content: bytes, key: str) -> bytes:
    """Return the beginning of an error's body without the key, however JSON escapes it: some servers echo it."""
    content = content[:MAX_ERROR_BYTES]
    if (
        content.count(b"[") + content.count(b"{") > 1000
    ):  # deep enough to overflow a small thread's stack
        content = content[:1000]
    if b"\\u" in content:
        try:
            content = json.dumps(json.loads(content), ensure_ascii=False).encode("utf-8", "replace")
        except (ValueError, RecursionError):
            content = content.replace(b"\\u", b"/u")
    quoted = json.dumps(key)[1:-1]
    for form in (key, quoted, quoted.replace("/", "\\/")) if key else ():
        content = content.replace(form.encode(), b"***")
    return content


# ---- Log ------------------------------------------------------------------
# In: what the caller measured. Out: one compact UTF-8 JSON object, made and checked in the caller's
# stack; from here on only these bytes travel. No locks, no I/O.

_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_encode_text = _encoder.encode
try:
    # What _encoder.encode makes anew on each call, at two thirds of its cost. It keeps no track of cycles, so
    # only what holds no containers is given to it.
    _pieces: Any = json.encoder.c_make_encoder(  # type: ignore[attr-defined]
        None, _encoder.default, json.encoder.encode_basestring, None, ":", ",", False, False, False
    )
except (AttributeError, TypeError):  # not CPython, or one to come
    _pieces = lambda value, level: _encode_text(value)  # noqa: E731
_LOG_FIELDS = ("event", "value", "agent", "log_id", "meta", "occurred_at")
_FLAT = frozenset((str, int, float, bool, type(None)))
_quote = json.encoder.encode_basestring  # what _encode_text does to a string
_BLOCK = 64  # UUIDs made at once
# RFC 4122, for a block of UUIDs as one number: all bits are random but 4 of byte 6 (0100) and 2 of byte 8 (10).
_RANDOM_BITS = int.from_bytes(bytes.fromhex("ffffffffffff0fff3fffffffffffffff") * _BLOCK, "big")
_FIXED_BITS = int.from_bytes(bytes.fromhex("00000000000040008000000000000000") * _BLOCK, "big")
_NOT_MINTED: tuple[int, int, str, list[str]] = (-1, 0, "", [])
_minted = _NOT_MINTED  # (second, process, ISO text, UUIDs not used yet); replaced as a whole, never edited


def _mint(now: float) -> tuple[str, str]:
    """Return a random UUIDv4 and the ISO 8601 text of `now`.

    os.urandom gives up the GIL on every call, which makes 8 logging threads half as fast as one; so UUIDs are
    made in blocks. A block lives for one wall-clock second at most, which keeps a restored snapshot from
    repeating ids, and belongs to one process, whether fork hooks run or not. uuid.uuid4 would add a third to
    a log's cost.
    """
    global _minted
    second, pid = int(now), os.getpid()
    while True:
        minted_in, minter, text, block = _minted
        if minted_in == second and minter == pid and block:
            try:
                return block.pop(), "%s.%06dZ" % (text, (now - second) * 1e6)  # noqa: UP031  # half an f-string's cost
            except IndexError:  # another thread took the last one
                continue
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
            return int(number) if isinstance(value, numbers.Integral) else float(number)
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
    try:
        return str(uuid.UUID(str(log_id))) if log_id != "" else ""
    except Exception as exc:
        raise ChirrOpValidationError(f"log_id must be a UUID, got {_show(log_id)}") from exc


def _parse_time(value: object) -> datetime:
    """Return a datetime, or ISO 8601 text as isoformat, JavaScript and RFC 3339 write it, as aware UTC."""
    moment = value
    try:
        if isinstance(value, str):
            import re

            match = re.fullmatch(
                r"([0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ]([0-9]{2}:[0-9]{2})(:[0-9]{2})?(?:[.,]([0-9]+))?"
                r"(?:[Zz]|([+-][0-9]{2}):?([0-9]{2}(?::[0-9]{2}(?:\.[0-9]{6})?)?))?",
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
            f"occurred_at must be a datetime or ISO 8601 date and time, got {_show(value)}"
        ) from exc


def _iso(moment: datetime) -> str:
    """Return an aware UTC datetime as ISO 8601 text that ends in Z."""
    return moment.replace(tzinfo=None).isoformat() + "Z"


def _check_time(value: object, now: float) -> str:
    """Return occurred_at as ISO 8601 text, if the service would take it at `now` (Unix seconds)."""
    moment = _parse_time(value)
    if not -MAX_AHEAD_SECONDS <= now - moment.timestamp() <= MAX_AGE_SECONDS:
        raise ChirrOpValidationError(
            f"occurred_at must lie within the last 30 days and at most 1 day ahead, got {_show(value)}"
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
            f"meta must have at most {MAX_META_KEYS} top-level keys, got {len(meta)}"
        )
    try:
        flat = type(meta) is dict and _FLAT.issuperset(map(type, meta.values()))
        text = "".join(_pieces(meta, 0)) if flat else _encode_text(meta)
    except Exception:
        text = _encode_json("meta", meta).decode()  # raises, with the reason
    if len(text) > MAX_META_BYTES // 4:  # a character takes at most 4 bytes
        size = len(_encode_json("meta", meta))
        if size > MAX_META_BYTES:
            raise ChirrOpValidationError(
                f"meta must encode to at most {MAX_META_BYTES} bytes, got {size}"
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
            raise ChirrOpValidationError("event must not be empty")
    if type(value) is not int and type(value) is not float:
        value = _number(value)
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise ChirrOpValidationError(f"value must be a finite number, got {_show(value)}")
    new_id, at = _mint(now)
    if log_id is not None:
        new_id = _canonical_id(log_id) or new_id
    if occurred_at is not None:
        at = _check_time(occurred_at, now)
    text = f'{{"log_id":"{new_id}","event":{_quote(event)},"value":{value!r},"occurred_at":"{at}"'
    if agent is not None and (
        agent := agent.strip() if type(agent) is str else _trimmed("agent", agent)
    ):
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
        value: a finite real number, never a bool; Decimal, Fraction and NumPy scalars count as numbers.
        agent: who produced it; trimmed, blank means none. `agent` + `event` name an event definition.
        log_id: UUID (text or uuid.UUID), the idempotency key, the same on every resend; None or blank
            makes a random one.
        meta: anything that is strictly JSON-encodable, at most 1,024 bytes encoded; an object has at
            most 10 top-level keys.
        occurred_at: datetime (naive is taken as UTC) or ISO 8601 text, within the last 30 days and at
            most 1 day ahead; None is the moment the log is made.

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
        """Return the log as it is sent, as a new dict; `agent` and `meta` only if they were given."""
        log: dict[str, Any] = json.loads(self._body)
        return log

    def __getattr__(self, name: str) -> Any:
        if name in _LOG_FIELDS:
            return self.to_dict().get(name)
        raise AttributeError(f"'Log' object has no attribute {name!r}")

    def __setattr__(self, name: str, value: object = None) -> None:
        raise AttributeError("a Log cannot be changed")

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
    """Unpickle or copy a Log: its bytes were checked when it was made, and its time may be past by now."""
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
    """Return a key so that it does not show: a traceback with locals may show the frame that holds it."""
    if isinstance(value, (bytes, bytearray)):
        return _SecretBytes(value)
    return _Secret(value) if isinstance(value, str) else value


def _read_dotenv(name: str, path: str = ".env") -> str | None:
    """Return one variable from a .env file; None when there is none, whatever the file holds."""
    found = None
    if not os.path.isfile(path):  # a pipe would be waited for
        return None
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
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


def _checked_key(api_key: object) -> _Secret:
    """Return the key from the argument, the environment or ./.env, in this order."""
    key = api_key or os.environ.get("CHIRROP_API_KEY") or _read_dotenv("CHIRROP_API_KEY") or ""
    if not isinstance(key, str):
        raise ChirrOpValidationError(f"api_key must be a string, got {type(key).__name__}")
    key = _Secret(key.strip())
    if not key:
        raise ChirrOpValidationError("API key is required")
    if not key.startswith("chp_"):
        raise ChirrOpValidationError("Invalid API key: must start with 'chp_'")
    if not all("!" <= c <= "~" for c in key):
        raise ChirrOpValidationError("Invalid API key: must be printable ASCII without spaces")
    return key


def _checked_endpoint(name: str, value: str | None, variable: str, default: str) -> str:
    """Return an absolute http(s) URL without user info, query or fragment, and without a final slash."""
    url = value or os.environ.get(variable) or default
    if url == default:
        return url
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
    # User info may be a password: only the rule is shown, not the URL.
    raise ChirrOpValidationError(
        f"{name} must be an absolute http or https URL without user info, query or fragment"
    )


def _integer(name: str, value: object, low: int, high: int = sys.maxsize) -> int:
    if type(value) is not int or not low <= value <= high:
        rule = f"of at least {low}" if high == sys.maxsize else f"from {low} to {high}"
        raise ChirrOpValidationError(f"{name} must be an integer {rule}, got {_show(value)}")
    return value


def _seconds(name: str, value: Any, *, zero: bool = True) -> float:
    """Return a duration of at most a day: longer waits overflow in some of the standard library."""
    if (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and 0 <= value <= 86400
        and (value or zero)
    ):
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


def _optional(name: str, value: Any, wanted: str, fits: bool) -> Any:
    if value is not None and not fits:
        raise ChirrOpValidationError(f"{name} must be {wanted} or None, got {_show(value)}")
    return value


def _checked_level(value: object) -> int:
    """Return a logging level given as its number or its name."""
    if isinstance(value, str):
        import logging

        number = logging.getLevelName(value.strip().upper())
        value = number if isinstance(number, int) else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ChirrOpValidationError(
            f"log_level must be the number or the name of a logging level, got {_show(value)}"
        )
    return value


class Config:
    """Settings of a client, checked when they are made; no client changes them, so one can serve many.

    A pickled one travels without its key, and takes CHIRROP_API_KEY or ./.env where it is unpickled.

    Args:
        api_key: starts with "chp_"; else CHIRROP_API_KEY in the environment, else in ./.env.
        api_endpoint: full URL that takes logs; else CHIRROP_API_ENDPOINT, else the service's.
        servicer_endpoint: base URL of the control plane; else CHIRROP_SERVICER_ENDPOINT, else the service's.
        retries: further attempts for a batch before it counts as exhausted, from 0.
        timeout: seconds for one attempt, from connecting to the answer's last byte, up to 86,400; also how
            long `log` waits for room in a bounded queue. Looking up a host name is beyond a program's reach,
            and a name with several dead addresses may take this long for each.
        batch_size: queued logs that start a send at once, from 1; a request never carries more than 250.
        flush_delay: seconds a log may wait for others to share its request.
        queue_size: logs held at most, in flight included; 0 is no limit.
        log_level: level of the logger "chirrop", a number or a name; NOTSET leaves it alone.
        servicer_retries: further attempts of a control-plane call, from 0.
        on_exhausted: "keep" holds an exhausted batch and goes on trying; "drop" drops and reports it.
        max_senders: threads that send at once at most, 1 to 64; a backlog brings them, one at a time.
        exit_timeout: seconds that all clients together may delay the end of the process, and that a client
            may delay the end of a Lambda invocation, from 0.
        transport: callable that makes one attempt in place of urllib (see the README); None is urllib.
        ssl_context: ssl.SSLContext for a private CA or a client certificate; None is the system's.
        spool: a SqliteSpool, or the path of one, that keeps logs on disk until they are delivered.
        on_drop: called as on_drop(logs, error) with the dropped logs as dicts, from the thread that
            dropped them; it may log, flush and close, and what it raises is caught and logged.
        disabled: check logs, then discard them: no key, no thread, no network; also CHIRROP_DISABLED=1 (or
            true, yes, on).

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
        disabled: bool = False,
    ) -> None:
        api_key = _hidden(api_key)
        switch = os.environ.get("CHIRROP_DISABLED", "").strip().lower()
        off = bool(disabled) or switch in ("1", "true", "yes", "on")
        is_path = isinstance(spool, (str, os.PathLike)) and bool(os.fspath(spool))
        if ssl_context is not None:
            import ssl

            _optional(
                "ssl_context",
                ssl_context,
                "an ssl.SSLContext",
                isinstance(ssl_context, ssl.SSLContext),
            )
        self.__dict__.update(
            api_key=_Secret("") if off and not api_key else _checked_key(api_key),
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
                "spool", spool, "a SqliteSpool or a path", is_path or hasattr(spool, "take")
            ),
            on_drop=_optional("on_drop", on_drop, "callable", callable(on_drop)),
            disabled=off,
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
        raise AttributeError("a Config cannot be changed")

    __delattr__ = __setattr__

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={_show(value)}' for name, value in self.__dict__.items())})"

    def __copy__(self, _: object = None) -> Config:
        return self

    __deepcopy__ = __copy__

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_config, ({**self.__dict__, "api_key": None},)


def _restore_config(fields: dict[str, Any]) -> Config:
    """Return a Config from a pickle: brokers, schedulers and disks keep those, so a key is not in them."""
    try:
        return Config(**fields)
    except ChirrOpValidationError as exc:
        text = f"cannot unpickle a Config, which travels without its key: {exc}"
        raise ChirrOpValidationError(text) from exc


# ---- Buffers --------------------------------------------------------------
# In: encoded logs, one at a time. Out: the oldest of them, up to a batch. Both kinds have the same methods:
#   put(data)            accept one log           take(limit) -> (keys, items)    hand out the oldest
#   remove(keys)         delivered                bury(keys, message)             dropped for good
#   park(keys) -> bool   refused by the server    give_back(keys) -> bool         not sent before close
#   adopt()              take over what a dead process left
#   close(), len() = logs that wait, lost = logs that a damaged file took along
#   before_fork(), after_fork_in_parent(), after_fork() = in the child
#   entered() = this very thread is inside, and was interrupted by a signal handler or finaliser
# park and give_back answer whether the buffer keeps the logs for a later run.
# put is called from any thread at any moment; the others by one thread at a time, under the outbox's lock.


def _locked(method: _F) -> _F:
    """Run a method under `self._lock`, an RLock, and count in `self._depth` how often this thread is inside.

    A finaliser or a signal handler may call log() while its own thread is inside: depth 2 tells.
    """

    def run(self: Any, *args: Any) -> Any:
        with self._lock:
            self._depth += 1
            try:
                return method(self, *args)
            finally:
                self._depth -= 1

    return run  # type: ignore[return-value]


class _Memory(deque):  # type: ignore[type-arg]
    """Logs that wait in memory. A deque's append is atomic and re-entrant: put takes no lock."""

    lost = 0
    put = deque.append

    def take(self, limit: int) -> tuple[list[Any], list[bytes]]:
        items = [
            self.popleft() for _ in range(min(limit, len(self)))
        ]  # only ever called by one thread
        return [], items

    def adopt(self, *_: object) -> bool:
        return (
            False  # nothing to do, nothing that outlives the process, and no lock to be inside of
        )

    bury = park = give_back = close = entered = is_open = before_fork = after_fork_in_parent = adopt
    remove = adopt  # type: ignore[assignment]
    after_fork = deque.clear


# Rows of one client share the upper bits of their id, its owner number: a range of the primary key is a
# client's queue, and adopting it from a dead process changes one row of `owners`, not every log.
_OWNER_BITS = (
    36  # the lower bits count the logs of one client: 68 * 10**9; the upper, 134 million openings
)
_SPOOL_VERSION = 1
_SQL_TABLES = (
    # state: 0 queued, 1 parked, 2 dead letter, which alone has an error
    "CREATE TABLE IF NOT EXISTS logs"
    " (id INTEGER PRIMARY KEY, body BLOB NOT NULL, state INTEGER NOT NULL DEFAULT 0, error TEXT)",
    # holder: whose lock file shows that it lives; NULL after a close. AUTOINCREMENT: a number is never reused.
    "CREATE TABLE IF NOT EXISTS owners (id INTEGER PRIMARY KEY AUTOINCREMENT, holder TEXT)",
    f"PRAGMA user_version = {_SPOOL_VERSION}",
)
_SQL_INSERT = "INSERT INTO logs (id, body) VALUES (?, ?)"
_SQL_TAKE = "SELECT id, body FROM logs WHERE id > ? AND id < ? AND state = 0 ORDER BY id LIMIT ?"
_SQL_COUNT = "SELECT count(*) FROM logs WHERE id > ? AND id < ? AND state = 0"
_SQL_UNPARK = "UPDATE logs SET state = 0 WHERE id > ? AND id < ? AND state = 1"
_SQL_FORGET = (
    "DELETE FROM owners WHERE holder IS NULL AND NOT EXISTS"  # noqa: S608  # made of constants
    f" (SELECT 1 FROM logs WHERE logs.id > owners.id << {_OWNER_BITS} AND logs.id < (owners.id + 1) << {_OWNER_BITS})"
)

_abandoned: list[
    Any
] = []  # SQLite connections of a parent process: closing them here would harm the parent
_FORK_SECONDS = 5.0  # a fork waits at most so long for another thread's transaction or import


def _lock_file(path: str) -> int:
    """Return a descriptor that holds an exclusive lock on a file until it is closed or its process dies.

    Raises:
        OSError: somebody holds it already.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise
    return fd


class SqliteSpool:
    """Keep logs in an SQLite file until the server has taken them: a log survives its process.

    When `log()` returns, the log is committed (WAL mode): `kill -9` loses nothing, and the next client on
    this file sends what is left, under the same log_ids. Several processes may share a file on a local
    disk; what a dead one left is taken over by the next that opens it or runs out of work. Refused logs
    (401, 403, 404, 500, 503) wait for a later run; logs dropped for good are kept as dead letters. An
    application calls dead_letters alone; the other methods are the client's.

    A power loss may cost the commits of the last moments, since they are synced to the disk only now and
    then (SQLite's `synchronous=NORMAL`); `synchronous="FULL"` syncs each commit, at milliseconds per log.

    When the file cannot be used (disk full, read-only, damaged, made by a newer version), the client warns
    once, keeps new logs in memory and tries the file again every 30 s; a damaged file is moved aside as
    PATH.damaged-TIME. The file has mode 0600 and holds no key. Lock files PATH-*.lock tell who is alive.

    Args:
        path: the file; made when it does not exist. A client opens it with its first log, flush or close.
        max_bytes: size in bytes that the file's pages may take, 0 is no limit. At the limit `log()` raises
            ChirrOpQueueFullError; nothing is pruned. The WAL beside it adds up to about 4 MiB.
        synchronous: "NORMAL" or "FULL".

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
        self.path = os.path.abspath(os.fspath(path))
        self.max_bytes = _integer("max_bytes", max_bytes, 0)
        self.synchronous = _choice("synchronous", synchronous, ("NORMAL", "FULL"))
        self.warn: Callable[[str], None] = lambda text: None
        self._start()

    def _start(self) -> None:
        # _lock guards everything below but the inbox's own append. Logs that cannot be committed stay in
        # the inbox, which then serves as the memory queue.
        self._lock = threading.RLock()
        self._inbox: deque[bytes] = deque()
        self._inside = False  # a transaction is open: what re-enters now must wait in the inbox
        self._generation = (
            0  # counts the files moved aside: keys of an older one mean nothing in this one
        )
        self._conn: Any = None
        self._holder, self._guard, self._inode = "", -1, -1
        self._owners: list[
            list[int]
        ] = []  # [id of the last row taken, end of the range]: adopted first, own last
        self._last_id = 0
        self._stored = 0  # rows of our owners that wait in the file
        self.lost = 0
        self._closed = self._warned = False
        self._retry_at = 0.0
        self._forker = 0  # the thread that forks and has closed the connection for that moment
        self._pid = os.getpid()

    def fresh(self) -> SqliteSpool:
        """Return an unopened spool with the same settings: each client opens the file for itself."""
        return SqliteSpool(self.path, self.max_bytes, synchronous=self.synchronous)

    def dead_letters(self, *, remove: bool = False) -> list[dict[str, Any]]:
        """Return the logs dropped for good, oldest first, as {"log": dict, "error": str}.

        Args:
            remove: delete them from the file as well.

        Raises:
            ChirrOpError: the file cannot be read.
        """
        if not os.path.exists(self.path):
            return []
        try:
            conn = self._sqlite3.connect(self.path, timeout=5.0, isolation_level=None)
            try:
                conn.execute("BEGIN IMMEDIATE" if remove else "BEGIN")
                rows = conn.execute(
                    "SELECT body, error FROM logs WHERE state = 2 ORDER BY id"
                ).fetchall()
                if remove:
                    conn.execute("DELETE FROM logs WHERE state = 2")
                conn.execute("COMMIT")
            finally:
                conn.close()
        except self._sqlite3.Error as exc:
            raise ChirrOpError(f"spool {self.path} cannot be read: {exc}") from exc
        return [{"log": _decoded(body), "error": error} for body, error in rows]

    # The client's side: the buffer methods.

    def __len__(self) -> int:
        return self._stored + len(self._inbox)

    def put(self, data: bytes) -> None:
        """Commit one log before returning; threads that wait for the file share the next commit."""
        if self.max_bytes and self._transact(self._is_full):
            raise ChirrOpQueueFullError(
                f"spool is full: {self.path} has reached {self.max_bytes} bytes"
            )
        self._inbox.append(data)
        self._commit()

    def take(self, limit: int) -> tuple[list[Any], list[bytes]]:
        """Hand out the oldest logs: those in the file, then those it could not take."""
        rows = self._transact(self._select, limit)
        if rows:
            return [(self._generation, key) for key, _ in rows], [body for _, body in rows]
        with self._lock:
            if self._may_write():
                return (
                    [],
                    [],
                )  # what is in the inbox now will be committed by the thread that put it there
            return [], [self._inbox.popleft() for _ in range(min(limit, len(self._inbox)))]

    def adopt(self) -> None:
        """Take over what a dead process left; what a closed one left is taken when the file is opened."""
        with self._lock:
            self._count_in(self._transact(self._take_over) or [])

    def _count_in(self, taken: list[tuple[list[int], int]]) -> None:
        self._owners[:0] = [span for span, _ in taken]  # older than what is ours
        self._stored += sum(count for _, count in taken)

    def remove(self, keys: list[Any]) -> None:
        """Forget delivered logs."""
        self._change(keys, "DELETE FROM logs WHERE id = ?")

    def bury(self, keys: list[Any], message: str) -> None:
        """Keep dropped logs as dead letters."""
        self._change(keys, "UPDATE logs SET state = 2, error = ? WHERE id = ?", message)

    def park(self, keys: list[Any]) -> bool:
        """Keep refused logs for a later run."""
        # Where this write fails, the row is still queued in the file: a later run finds it all the same.
        return self._change(keys, "UPDATE logs SET state = 1 WHERE id = ?")

    def give_back(self, keys: list[Any]) -> bool:
        """Let logs that were taken wait again."""
        ours = self._change(keys, "UPDATE logs SET state = 0 WHERE id = ?")
        self._stored += len(keys) if ours else 0
        return ours

    def _change(self, keys: list[Any], sql: str, *values: object) -> bool:
        """Run a statement for each row; False when the rows are not in this file (any more)."""
        rows = [(*values, row) for generation, row in keys if generation == self._generation]
        if rows:
            self._transact(lambda conn: conn.executemany(sql, rows))
        return (
            bool(rows) and keys[0][0] == self._generation
        )  # unless the file turned out to be damaged

    def close(self) -> None:
        """Leave what waits to the next client on this file, and close it."""
        with self._lock:
            self._commit()
            self._closed = True  # what comes now stays in the inbox: rows without an owner would never be found
            if self._conn is not None:
                self._transact(self._release)
                self._drop_connection()

    def is_open(self) -> bool:
        """Tell whether there is something to close."""
        return self._conn is not None

    def entered(self) -> bool:
        """Tell whether this thread is inside, and was interrupted by a signal handler or finaliser."""
        return self._lock._is_owned()  # type: ignore[attr-defined, no-any-return]

    def before_fork(self) -> None:
        """Close the file for the moment of a fork.

        SQLite keeps its locks per process and file: a child that inherits an open connection, and then makes
        its own, takes the parent's locks for its own. One of the two then deletes the WAL under the other.
        """
        if not self._lock.acquire(timeout=_FORK_SECONDS):
            return
        if self._inside or self._conn is None:
            self._lock.release()
            return
        self._forker = threading.get_ident()
        self._conn.close()
        self._conn = None

    def after_fork_in_parent(self) -> None:
        """Open the file again after before_fork."""
        if self._forker != threading.get_ident():
            return
        self._forker = 0
        try:
            if os.stat(self.path).st_ino != self._inode:
                raise OSError("it was replaced")
            self._conn = self._connect()
        except Exception as exc:  # the rows are found again by whoever opens the file next
            self._generation += 1
            self.lost, self._stored = self.lost + self._stored, 0
            self._drop_connection()
            self._degrade(exc)
        finally:
            self._lock.release()

    def after_fork(self) -> None:
        """Forget the parent's lock; its connection was closed before, unless the fork took us unawares."""
        conn, guard = self._conn, self._guard
        self._start()
        if guard >= 0:
            os.close(guard)  # the parent's own descriptor keeps the lock
        if conn is not None:
            _abandoned.append(conn)
            self._retry_at = math.inf
            self._warned = True
            self.warn(
                f"spool {self.path} was in use when this process was forked, keeping new logs in memory"
            )

    # Inside: every access to the file goes through _transact, under the lock.

    def _usable(self) -> bool:
        """Tell whether the file can be used now, opening it if need be."""
        give_up_at = time.monotonic() + 5.0
        while self._conn is None and not self._closed and time.monotonic() >= self._retry_at:
            try:
                self._open()
            except Exception as exc:
                # SQLite waits for locks by itself, except while a fresh file is being switched to WAL.
                if "locked" in str(exc) and time.monotonic() < give_up_at:
                    time.sleep(0.01)
                    continue
                self._degrade(exc)
                break
        return self._conn is not None

    def _may_write(self) -> bool:
        return self._usable() and time.monotonic() >= self._retry_at

    def _transact(self, work: Callable[..., Any], *args: Any) -> Any:
        """Return work(connection, *args), done in one transaction; None when the file cannot be used."""
        with self._lock:
            if self._inside or not self._usable():
                return None

            def whole() -> Any:
                self._conn.execute("BEGIN IMMEDIATE")
                result = work(self._conn, *args)
                self._conn.execute("COMMIT")
                return result

            result = self._attempt(whole)
            self._commit()  # what a finaliser or signal handler has logged meanwhile
            return result

    def _commit(self) -> None:
        """Write the inbox to the file, unless this very thread is inside already and will do so."""
        with self._lock:
            while self._inbox and not self._inside and not self._closed and self._may_write():
                if not self._attempt(self._insert):
                    return

    def _attempt(self, work: Callable[[], Any]) -> Any:
        """Return what `work` does with the file; None when it fails, which is then dealt with."""
        self._inside = True
        try:
            return work()
        except Exception as exc:
            self._degrade(exc)
        except BaseException:  # Ctrl-C, or a signal handler that raises
            self._roll_back()
            raise
        finally:
            self._inside = False
        return None

    def _insert(self) -> bool:
        """Write what is in the inbox now, in one transaction."""
        conn = self._conn
        rows = []
        for _ in range(len(self._inbox)):
            self._last_id += 1
            rows.append((self._last_id, self._inbox.popleft()))
        try:
            if len(rows) == 1:
                conn.execute(_SQL_INSERT, rows[0])  # a statement alone is a transaction of its own
            else:
                conn.execute("BEGIN IMMEDIATE")
                conn.executemany(_SQL_INSERT, rows)
                conn.execute("COMMIT")
            self._stored += len(rows)
            return True
        except BaseException:
            self._inbox.extendleft(body for _, body in reversed(rows))
            raise

    def _select(self, conn: Any, limit: int) -> list[tuple[int, bytes]]:
        rows: list[tuple[int, bytes]] = []
        for owner in self._owners:
            found = conn.execute(_SQL_TAKE, (*owner, limit - len(rows))).fetchall()
            if found:
                owner[0] = max(key for key, _ in found)
                rows += found
        keys = [key for key, _ in rows]
        if not all(type(body) is bytes for _, body in rows):
            raise self._sqlite3.DatabaseError("a row is not a log")
        if len(set(keys)) < len(keys):  # out of order: they would be taken again and again
            raise self._sqlite3.DatabaseError("rows are out of order")
        self._stored -= len(rows)
        if len(rows) < limit:
            self._stored = 0  # whatever else was counted is not there
        return rows

    def _is_full(self, conn: Any) -> bool:
        size, pages, free = (
            conn.execute(f"PRAGMA {name}").fetchall()[0][0]
            for name in ("page_size", "page_count", "freelist_count")
        )
        # Four pages of reserve: one log may split pages up to the root.
        return bool((pages - free + 4) * size > self.max_bytes)

    def _open(self) -> None:
        if not os.path.lexists(self.path):
            try:
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
            except FileExistsError:
                pass  # another process was faster
        found = os.stat(self.path)
        self._inode = found.st_ino
        if found.st_mode & 0o077 and os.name == "posix":
            os.chmod(
                self.path, found.st_mode & 0o700
            )  # the logs are nobody else's; another user's file is refused
        conn = self._connect()
        try:
            # From here to COMMIT no other process opens, adopts or closes: the lock file and its row appear at once.
            conn.execute("BEGIN IMMEDIATE")
            for statement in _SQL_TABLES:
                conn.execute(statement)
            self._holder = os.urandom(8).hex()
            self._guard = _lock_file(f"{self.path}-{self._holder}.lock")
            taken = self._take_over(conn, opening=True)
            owner = conn.execute(
                "INSERT INTO owners (holder) VALUES (?)", (self._holder,)
            ).lastrowid
            conn.execute("COMMIT")
        except BaseException:
            self._drop_connection()
            conn.close()
            raise
        self._conn = conn
        self._last_id = owner << _OWNER_BITS
        self._owners = [[self._last_id, (owner + 1) << _OWNER_BITS]]
        self._count_in(taken)
        self._retry_at = 0.0

    def _connect(self) -> Any:
        conn = self._sqlite3.connect(
            self.path, timeout=5.0, isolation_level=None, check_same_thread=False
        )
        try:
            version = conn.execute("PRAGMA user_version").fetchall()[0][0]
            if version not in (0, _SPOOL_VERSION):
                raise ValueError(f"it has the unknown schema version {version}")
            tables = [] if version else conn.execute("SELECT name FROM sqlite_master").fetchall()
            # Read again: another process may just have made tables and version, in one transaction.
            if tables and conn.execute("PRAGMA user_version").fetchall()[0][0] == 0:
                raise ValueError("it is the database of another program")
            conn.execute("PRAGMA journal_mode = WAL").fetchall()
            conn.execute(f"PRAGMA synchronous = {self.synchronous}")
        except BaseException:
            conn.close()
            raise
        return conn

    def _take_over(self, conn: Any, opening: bool = False) -> list[tuple[list[int], int]]:
        """Make ours what dead processes hold; when opening also what closed ones left, parked logs included.

        Returns the ranges of ids, with the number of logs that wait in each; they count once this is committed.
        """
        taken = []
        others = conn.execute(
            "SELECT id, holder FROM owners WHERE holder IS NOT ? ORDER BY id", (self._holder,)
        )
        for owner, holder in others.fetchall():
            if not (opening if holder is None else self._is_dead(holder)):
                continue
            span = [owner << _OWNER_BITS, (owner + 1) << _OWNER_BITS]
            if opening:
                conn.execute(_SQL_UNPARK, span)
            conn.execute("UPDATE owners SET holder = ? WHERE id = ?", (self._holder, owner))
            taken.append((span, conn.execute(_SQL_COUNT, span).fetchall()[0][0]))
        return taken

    def _is_dead(self, holder: str) -> bool:
        name = f"{self.path}-{os.path.basename(holder)}.lock"
        try:
            fd = _lock_file(name)
        except OSError:
            return False
        self._unlock(name, fd)
        return True

    @staticmethod
    def _unlock(name: str, fd: int) -> None:
        try:
            os.unlink(
                name
            )  # before the lock is given up: nobody else must find the file and lock it
        except OSError:
            pass  # Windows cannot; the next client that looks finds nobody alive all the same
        os.close(fd)

    def _release(self, conn: Any) -> None:
        conn.execute("UPDATE owners SET holder = NULL WHERE holder = ?", (self._holder,))
        conn.execute(_SQL_FORGET)

    def _drop_connection(self) -> None:
        conn, self._conn = self._conn, None
        if conn is not None:
            try:
                conn.close()
            except self._sqlite3.Error:
                pass
        if self._guard >= 0:
            self._unlock(f"{self.path}-{self._holder}.lock", self._guard)
            self._guard = -1

    def _roll_back(self) -> None:
        if self._conn is not None and self._conn.in_transaction:
            try:
                self._conn.execute("ROLLBACK")
            except self._sqlite3.Error:
                pass

    def _degrade(self, exc: Exception) -> None:
        """Say once what is wrong, leave the logs in memory, and move a damaged file aside."""
        sqlite3 = self._sqlite3
        text = str(exc)
        self._roll_back()
        # Some damage is reported as an OperationalError, which is else a matter of the disk or of locks.
        damaged = (
            type(exc) in (sqlite3.DatabaseError, sqlite3.IntegrityError, OverflowError, TypeError)
            or isinstance(exc, UnicodeError)
            or (
                isinstance(exc, sqlite3.OperationalError)
                and any(w in text for w in ("no such", "malformed", "UTF-8"))
            )
        )
        if damaged:
            self._set_aside()
        self._retry_at = (
            0.0 if damaged and not self._warned else time.monotonic() + SPOOL_RETRY_SECONDS
        )
        if not self._warned:
            self._warned = True
            self.warn(f"spool {self.path} cannot be used, keeping new logs in memory: {text}")

    def _set_aside(self) -> None:
        self._drop_connection()
        self._generation += 1
        self.lost += self._stored
        self._stored = 0
        try:
            if self._inode in (
                -1,
                os.stat(self.path).st_ino,
            ):  # else another process has done it already
                stamp = time.strftime("%Y%m%dT%H%M%S")
                for suffix in ("", "-wal", "-shm"):
                    if os.path.isfile(self.path + suffix):
                        os.replace(
                            self.path + suffix,
                            f"{self.path}.damaged-{stamp}-{os.urandom(2).hex()}{suffix}",
                        )
        except OSError:
            pass


def _decoded(body: bytes) -> dict[str, Any]:
    """Return the dict of an encoded log, also of one that a damaged disk has changed."""
    try:
        log = json.loads(body)
        return log if isinstance(log, dict) else {"damaged": repr(body)}
    except (ValueError, TypeError):
        return {"damaged": repr(body)}


# ---- Retry policy ---------------------------------------------------------
# Pure functions of an answer: what to do next, and how long to wait before it.

_DELIVERED, _RETRY, _SPLIT, _REFUSED = "delivered", "retry", "split", "refused"


def _error_class(status: int) -> type[ChirrOpError]:
    """Return the class of the error that stands for an answer other than 2xx; status 0 is a network failure."""
    other = ChirrOpServerError if status >= 500 or status < 200 else ChirrOpNonRetryableError
    return _ERROR_BY_STATUS.get(status, other)


def _verdict(status: int) -> str:
    """Return what an answer to a batch means; a _SPLIT batch of one log is rejected for good."""
    if 200 <= status < 300:
        return _DELIVERED
    kind = _error_class(status)
    if kind is ChirrOpBadRequestError:
        return _SPLIT
    return _REFUSED if issubclass(kind, ChirrOpNonRetryableError) else _RETRY


def _backoff(attempt: int, retry_after: float | None, rand: Callable[[], float]) -> float:
    """Return seconds to wait after failed attempt `attempt` (1 is the first).

    Full jitter, on top of the server's wait when it gave one: clients cut off together return apart.
    `rand` returns a float in [0, 1).
    """
    window = min(BACKOFF_CAP, BACKOFF_BASE * 2.0 ** min(attempt - 1, 32))
    return (retry_after or 0.0) + rand() * window


def _random() -> float:
    """Return a float in [0, 1) that a cloned or forked process does not share."""
    return int.from_bytes(os.urandom(6), "big") / 2.0**48


def _retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds of a Retry-After header, at most MAX_RETRY_AFTER; None when it says nothing valid.

    `now` is Unix seconds, for the header's other form, an HTTP date.
    """
    text = next((str(v).strip() for k, v in headers.items() if str(k).lower() == "retry-after"), "")
    if text and not text.strip("0123456789.") and text.count(".") <= 1 and text != ".":
        return min(MAX_RETRY_AFTER, float(text))
    try:
        import email.utils

        moment = email.utils.parsedate_to_datetime(text)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=timezone.utc)
        return min(MAX_RETRY_AFTER, max(0.0, moment.timestamp() - now))
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


class _Answer:
    """What became of one attempt: a status with its body and headers, or 0 and the exception."""

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

    def retry_after(self) -> float | None:
        return _retry_after(self.headers, time.time()) if self.headers else None

    def never_sent(self) -> bool:
        """Tell whether the request certainly did not reach the server: no connection was made."""
        return isinstance(self.cause, ConnectionRefusedError) or getattr(
            self.cause, "never_sent", False
        )

    def error(self) -> ChirrOpError:
        """Return the exception that stands for an answer other than 2xx."""
        if self.status == 0:
            cause = self.cause
            detail = str(cause) or type(cause).__name__
            failure = ChirrOpTransportError(f"no answer: {detail}")
            failure.__cause__ = cause
            return failure
        text = self.body[:MAX_ERROR_BYTES].decode("utf-8", "replace").strip()
        body: Any = text or None
        try:
            body = json.loads(self.body) if self.body else None
        except (ValueError, RecursionError):
            pass
        message = body.get("error") or body.get("message") if isinstance(body, dict) else None
        if 300 <= self.status < 400:
            message = "redirects are not followed; check the endpoint"
        if not isinstance(message, str):
            import http.client

            message = text[:200] or http.client.responses.get(self.status, "no message").lower()
        # It goes into logs, terminals and the spool: no line breaks, no escape sequences, not a book.
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message[:500])
        kind, text = _error_class(self.status), f"HTTP {self.status}: {message}"
        return kind(text, status_code=self.status, body=body, retry_after=self.retry_after())


# ---- Outbox ---------------------------------------------------------------
# In: encoded logs, and the answers to batches. Out: the next batch, and what was dropped. All decisions on
# delivery and the whole account are here, without threads, waiting or I/O but the buffer's: `now` is an
# argument, so a test can turn the clock by hand.


if TYPE_CHECKING:

    class _Account(NamedTuple):
        accepted: int
        delivered: int
        dropped: dict[str, int]
        queued: int
        in_flight: int
        parked: int
        retries: int
        last_error: Optional[ChirrOpError]

else:
    _Account = namedtuple(
        "_Account", "accepted delivered dropped queued in_flight parked retries last_error"
    )


class Stats(_Account):
    """The account of one client at one moment; counts are logs.

    Always accepted == delivered + sum(dropped.values()) + queued + in_flight + parked.

    Attributes:
        accepted: taken by log() or delivered by send_logs(), and left-overs taken from a spool.
        delivered: the server has them.
        dropped: reason to count: "rejected" (400, 413, 422, alone), "undecided" (in a batch so bad that
            the search for the bad ones was given up), "refused" (401, 403, 404, 500, 503, 3xx),
            "exhausted", "closed" (not sent before close or exit, or logged after), "damaged" (in a spool
            file that was moved aside).
        queued: waiting, for their turn or for another attempt.
        in_flight: in a request that is under way.
        parked: refused, kept by the spool for a later run.
        retries: attempts that had to be repeated.
        last_error: the newest failure, or None.
    """

    __slots__ = ()


class _Batch:
    """Logs that share their requests: the same bytes on every attempt."""

    __slots__ = ("first", "keys", "items", "attempts", "not_before", "era", "spent")

    def __init__(
        self, first: int, keys: list[Any], items: list[bytes], spent: list[int] | None = None
    ) -> None:
        self.first = first  # the place of items[0] in the order in which logs left the buffer
        self.keys, self.items = keys, items
        self.attempts, self.not_before, self.era = 0, 0.0, 0
        self.spent = spent or [1]  # requests granted to the original batch, shared by its parts

    def halves(self) -> list[_Batch]:
        middle = (len(self.items) + 1) // 2
        return [
            _Batch(self.first, self.keys[:middle], self.items[:middle], self.spent),
            _Batch(self.first + middle, self.keys[middle:], self.items[middle:], self.spent),
        ]


class _Bell:
    """Wake a thread that waits, or the next one to wait; any code may ring it, a signal handler too.

    A plain lock, because an Event is not re-entrant, and SimpleQueue.get(timeout) hangs for ever before
    Python 3.13 when its time is over before it has begun to wait.
    """

    def __init__(self) -> None:
        self._silent = threading.Lock()
        self._silent.acquire()

    def ring(self) -> None:
        try:
            self._silent.release()
        except RuntimeError:  # it has been rung already
            pass

    def wait(self, timeout: float | None) -> bool:
        return self._silent.acquire(timeout=-1 if timeout is None else timeout)


class _Flush:
    """A caller that waits for every log before `mark`."""

    def __init__(self, mark: int) -> None:
        self.mark, self.clean, self.done = mark, True, False
        self.bell = _Bell()

    def end(self, clean: bool) -> None:
        self.clean, self.done = clean, True
        self.bell.ring()


_Drop = namedtuple(
    "_Drop", "reason count items error"
)  # items: none where nobody can read them any more

_NOTHING: tuple[_Drop, ...] = ()


class _Outbox:
    def __init__(self, buffer: Any, config: Config, rand: Callable[[], float] = _random) -> None:
        self.buffer, self._config, self._rand = buffer, config, rand
        self._bounded = config.queue_size > 0
        self.on_ready: Callable[[], None] = lambda: (
            None
        )  # called once when enough logs wait for a sender
        self.patience: Callable[[], float] = lambda: (
            0.0
        )  # seconds that this thread may wait for room
        self._reset()

    def _reset(self) -> None:
        # _lock guards everything below. It is re-entrant, no foreign code runs under it, and put() takes it
        # only for a bounded queue.
        self._lock, self._depth = threading.RLock(), 0
        self._front: list[_Batch] = []  # to be sent before anything new: retries and halves
        self._flying: dict[_Batch, None] = {}
        self._flushes: list[_Flush] = []
        self._hurry_to = 0  # logs before this place do not wait for flush_delay
        self._since: float | None = None  # when the oldest waiting log was first seen
        self._resume_at = 0.0  # end of the backoff
        self._failures = 0  # failures in a row, over all batches; concurrent ones count once
        self.width = 1  # requests that may be in flight at once
        self._taken = 0  # logs that have left the buffer
        self._direct = self._delivered = self._parked = self._retries = 0
        self._dropped: dict[str, int] = {}
        self._losses: list[
            _Drop
        ] = []  # accounted for, to be reported with the next answer, flush or close
        self.last_error: ChirrOpError | None = None
        self._room = _Bell()  # rung and replaced when there may be room
        self.closed = self.stopped = (
            False  # closed: takes no more logs; stopped: sends no more either
        )
        # A put() that finds this many logs waiting calls on_ready. The sender sets it before it looks
        # once more and waits, so that between the two no log goes unseen.
        self.wake_at: float = 1

    def after_fork(self) -> None:
        """Start empty in a child process: the logs, locks and waiting callers are the parent's."""
        self.buffer.after_fork()
        self._reset()

    # Logs in.

    def put(self, data: bytes) -> Sequence[_Drop]:
        """Accept one log; where the queue is bounded and full, wait for as long as `patience` says."""
        if self.closed:
            return self._refuse_late(data)
        buffer = self.buffer
        if self._bounded:
            self._put_bounded(data)
        else:
            buffer.put(data)
        if len(buffer) >= self.wake_at:
            self.wake_at = math.inf
            self.on_ready()
        # Stopped since the check above: the last sweep may have missed this log.
        return self._sweep() if self.stopped else _NOTHING

    def _put_bounded(self, data: bytes) -> None:
        deadline = time.monotonic() + self.patience()
        while True:
            room = self._try_put(data)
            if room is None:
                return
            if not room.wait(max(0.0, deadline - time.monotonic())):
                raise ChirrOpQueueFullError(
                    f"queue is full: {self._config.queue_size} logs are waiting to be sent"
                )
            room.ring()  # for the next caller that waits

    @_locked
    def _try_put(self, data: bytes) -> _Bell | None:
        """Accept one log if there is room; else return the bell that rings when there may be some."""
        held = self.held()
        if held < self._config.queue_size:
            self.buffer.put(data)
            return None
        if self._depth > 1:  # this very thread is inside: no one could make room while it waits
            raise ChirrOpQueueFullError(f"queue is full: {held} logs are waiting to be sent")
        return self._room

    @_locked
    def _refuse_late(self, data: bytes) -> list[_Drop]:
        self._direct += 1
        return self._lose("closed", 1, [data], ChirrOpError("logged after close"))

    @_locked
    def count_direct(self, count: int) -> None:
        """Account for logs that send_logs has delivered."""
        self._direct += count
        self._delivered += count

    # Batches out.

    @_locked
    def arm(self, now: float) -> float | None:
        """Return seconds until take() will have a batch, None for not before something happens.

        Also sets when put() calls on_ready, for a sender that goes to wait now.
        """
        if self.stopped or len(self._flying) >= self.width or now < self._resume_at:
            self.wake_at = math.inf
        else:
            self.wake_at = self._config.batch_size if len(self.buffer) else 1
        return self._due_in(now)

    def _due_in(self, now: float) -> float | None:
        if self.stopped or len(self._flying) >= self.width:
            return None
        moments = [batch.not_before for batch in self._front]
        queued = len(self.buffer)
        if queued:
            if self._since is None:
                self._since = now
            hurry = queued >= self._config.batch_size or self._taken < self._hurry_to
            moments.append(now if hurry else self._since + self._config.flush_delay)
        return max(0.0, max(min(moments), self._resume_at) - now) if moments else None

    @_locked
    def take(self, now: float) -> _Batch | None:
        """Return a batch whose time has come, in flight from now on; never waits."""
        if not self._front and not len(self.buffer) and not self.stopped:
            self.buffer.adopt()
        if self._due_in(now) != 0.0:
            return None
        batch = next((b for b in self._front if b.not_before <= now), None)
        if batch is not None:
            self._front.remove(batch)
        else:
            keys, items = self.buffer.take(MAX_BATCH)
            self._since = now if len(self.buffer) else None
            self._check_lost()
            if not items:
                if len(self.buffer):  # in a file that cannot be read now
                    self._resume_at = max(self._resume_at, now + 1.0)
                return None
            batch = _Batch(self._taken, keys, items)
            self._taken += len(items)
        batch.era = self._failures
        self._flying[batch] = None
        return batch

    # Answers in.

    def settle(self, batch: _Batch, answer: _Answer, now: float) -> list[_Drop]:
        """Account for the answer to a batch; return what it made us drop."""
        verdict = _verdict(answer.status)
        return self._settle(batch, verdict, None if verdict == _DELIVERED else answer.error(), now)

    @_locked
    def _settle(
        self, batch: _Batch, verdict: str, error: ChirrOpError | None, now: float
    ) -> list[_Drop]:
        if batch not in self._flying:
            return []  # close() has given it up meanwhile
        self.last_error = error or self.last_error
        drops: list[_Drop] = []
        # Disk before account, account before the waiting callers: a crash between them repeats a log
        # under its log_id, but loses none.
        if error is None:
            self.buffer.remove(batch.keys)
            self._delivered += len(batch.items)
            if len(self.buffer) >= MAX_BATCH:
                self.width = min(self.width + 1, self._config.max_senders)
        elif verdict == _RETRY:
            drops = self._retry_later(batch, error, now)
        elif verdict == _REFUSED:
            drops = self._refuse(batch, error)
        else:
            drops = self._split(batch, error)
        del self._flying[
            batch
        ]  # only now: a Ctrl-C in the buffer's commit must find it there for another attempt
        if verdict != _RETRY:
            self._failures = 0
        drops += self.losses()
        self._tell(exhausted=self._failures > self._config.retries)
        return drops

    def _retry_later(self, batch: _Batch, error: ChirrOpError, now: float) -> list[_Drop]:
        batch.attempts += 1
        if batch.era == self._failures:
            self._failures += 1
        self.width = 1
        self._resume_at = max(
            self._resume_at, now + _backoff(self._failures, error.retry_after, self._rand)
        )
        if batch.attempts > self._config.retries:
            if self._config.on_exhausted == "drop":
                return self._drop(batch, "exhausted", error)
            batch.not_before = now + BACKOFF_CAP  # others may be sent meanwhile
        self._retries += 1
        self._front.insert(0, batch)
        return []

    def _refuse(self, batch: _Batch, error: ChirrOpError) -> list[_Drop]:
        if not self.buffer.park(batch.keys):
            return self._drop(batch, "refused", error)
        self._parked += len(batch.items)
        self._blemish(batch)
        return []

    def _split(self, batch: _Batch, error: ChirrOpError) -> list[_Drop]:
        if len(batch.items) == 1:
            return self._drop(batch, "rejected", error)
        if batch.spent[0] + 2 > MAX_SPLIT_REQUESTS:
            return self._drop(batch, "undecided", error)
        batch.spent[0] += 2
        self._front += batch.halves()  # at the end: the larger parts are decided first
        return []

    def _drop(self, batch: _Batch, reason: str, error: ChirrOpError) -> list[_Drop]:
        self.buffer.bury(batch.keys, str(error))
        self._blemish(batch)
        return self._lose(reason, len(batch.items), batch.items, error)

    def _lose(
        self, reason: str, count: int, items: list[bytes], error: ChirrOpError
    ) -> list[_Drop]:
        self._dropped[reason] = self._dropped.get(reason, 0) + count
        return [_Drop(reason, count, items, error)]

    @_locked
    def losses(self) -> list[_Drop]:
        """Return what a damaged spool file took along, for the report."""
        self._check_lost()
        losses, self._losses = self._losses, []
        return losses

    def _check_lost(self) -> None:
        """Account for logs that a damaged spool file took along; nobody can read them any more."""
        lost, self.buffer.lost = self.buffer.lost, 0
        if lost:
            self._taken += lost
            for flush in self._flushes:
                flush.clean = False
            self._losses += self._lose(
                "damaged", lost, [], ChirrOpError("they are in a damaged spool file")
            )
            self._tell()

    # Flush and close.

    @_locked
    def begin_flush(self, now: float) -> _Flush:
        """Return a flush of what is held now; a backoff in progress ends."""
        self.buffer.adopt()
        flush = _Flush(self._taken + len(self.buffer))
        self._hurry_to = max(self._hurry_to, flush.mark)
        self._resume_at = min(self._resume_at, now)
        for batch in self._front:
            batch.not_before = min(batch.not_before, now)
        self._flushes.append(flush)
        self._tell()
        return flush

    @_locked
    def end_flush(self, flush: _Flush) -> None:
        """Forget a flush whose caller has stopped waiting."""
        if flush in self._flushes:
            self._flushes.remove(flush)

    def _blemish(self, batch: _Batch) -> None:
        for flush in self._flushes:
            if batch.first < flush.mark:
                flush.clean = False

    def _tell(self, exhausted: bool = False) -> None:
        """Wake callers: of a flush that is over, and those who wait for room."""
        first = min(
            (b.first for group in (self._front, self._flying) for b in group), default=self._taken
        )
        for flush in list(self._flushes):
            over = self.stopped or (self._taken >= flush.mark and first >= flush.mark)
            if over or exhausted:
                self._flushes.remove(flush)
                flush.end(flush.clean and over and not self.stopped)
        self._room.ring()
        self._room = _Bell()

    @_locked
    def stop(self) -> list[_Drop]:
        """End all sending: what is still held stays in the spool, or is dropped and returned.

        A request still in flight no longer counts, whatever becomes of it.
        """
        self.closed = self.stopped = True
        drops = []
        for batch in [*self._front, *self._flying]:
            if self.buffer.give_back(batch.keys):
                self._taken -= len(batch.items)
            else:
                drops += self._drop(batch, "closed", ChirrOpError("not sent before close"))
        self._front, self._flying = [], {}
        self.buffer.close()
        drops += self._sweep()
        self._tell()
        return drops + self.losses()

    @_locked
    def _sweep(self) -> list[_Drop]:
        """Drop what waits in memory after the end."""
        _, items = self.buffer.take(sys.maxsize)
        self._taken += len(items)
        return (
            self._lose("closed", len(items), items, ChirrOpError("not sent before close"))
            if items
            else []
        )

    @_locked
    def held(self) -> int:
        """Return the number of logs that may still be delivered by this client."""
        return len(self.buffer) + sum(len(batch.items) for batch in (*self._front, *self._flying))

    @_locked
    def stats(self) -> Stats:
        waiting = len(self.buffer)  # read once: logs go on arriving without the lock
        return Stats(
            accepted=self._taken + waiting + self._direct,
            delivered=self._delivered,
            dropped=dict(self._dropped),
            queued=waiting + sum(len(b.items) for b in self._front),
            in_flight=sum(len(b.items) for b in self._flying),
            parked=self._parked,
            retries=self._retries,
            last_error=self.last_error,
        )


# ---- Reporter and sender --------------------------------------------------
# In: batches from the outbox. Out: one request per batch, and word of what was dropped. Threads
# "chirrop-sender-N" wait in turn for the next batch and hold no lock while a request or on_drop runs.
# They never call the logging module, whose handlers may hold locks that wait for a flush: notes are
# written by callers of flush and close, or by a short-lived thread "chirrop-reporter".

_WARNING, _ERROR, _INFO = 30, 40, 20  # the logging module's levels
# Held by our threads while they import, and by a fork: it would leave its child with half a module for ever.
_importing = threading.RLock()
_reporting = threading.local()


class _Reporter:
    """Tell the application what was dropped: on_drop at once, the logger in a handful of records."""

    def __init__(self, config: Config) -> None:
        self._on_drop, self._level = config.on_drop, config.log_level
        self._drops: deque[_Drop] = deque()
        self._notes: deque[tuple[int, str]] = deque(maxlen=100)
        self._next_at, self._state, self._late = 0.0, "", False
        self._said: dict[str, float] = {}  # notes that may repeat, and when they may

    def after_fork(self) -> None:
        self._drops.clear()
        self._notes.clear()

    def drops(self, drops: Sequence[_Drop], record: bool = True) -> None:
        for drop in drops:
            if record:
                self._drops.append(drop._replace(items=()))
            if self._on_drop is None or getattr(_reporting, "in_on_drop", False):
                continue  # dropped by what on_drop itself does: counted and logged only
            _reporting.in_on_drop = True
            try:
                self._on_drop([_decoded(item) for item in drop.items], drop.error)
            except BaseException as exc:  # it is the application's code, on our thread
                self.note_once(_ERROR, f"on_drop raised {type(exc).__name__}")
            finally:
                _reporting.in_on_drop = False

    def late(self, drops: Sequence[_Drop]) -> None:
        """Report logs that came after close: every one to on_drop, the first to the logger."""
        if not self._late:
            self._late = True
            self.note(_WARNING, "logged after close: this and further logs are dropped")
        self.drops(drops, record=False)
        self.write()

    def state(self, answer: _Answer) -> None:
        """Note a change between sending, failing and being refused; not every attempt."""
        verdict = _verdict(answer.status)
        if verdict not in (_SPLIT, self._state):
            if verdict != _DELIVERED:
                what = "held, retrying" if verdict == _RETRY else "refused"
                self.note(_WARNING, f"logs are {what}: {answer.error()}")
            elif self._state:
                self.note(_INFO, "logs are accepted again")
            self._state = verdict

    def note(self, level: int, text: str) -> None:
        self._notes.append((level, text))

    def note_once(self, level: int, text: str) -> None:
        """Note what may happen with each log, but only once in REPORT_SECONDS."""
        now = time.monotonic()
        if now >= self._said.get(text, 0.0):
            self._said = {t: at for t, at in list(self._said.items()) if at > now}
            self._said[text] = now + REPORT_SECONDS
            self.note(level, text)

    def due(self) -> bool:
        return bool(self._notes) or (bool(self._drops) and time.monotonic() >= self._next_at)

    def write(self, final: bool = False) -> None:
        """Hand notes to the logger, and drops added up; returns at once when called from a handler of ours."""
        if not ((final and self._drops) or self.due()) or getattr(_reporting, "active", False):
            return
        import logging

        logger = logging.getLogger("chirrop")
        if self._level != NOTSET:
            logger.setLevel(self._level)
        _reporting.active = True
        try:
            while self._notes:
                logger.log(*self._notes.popleft())
            if final or time.monotonic() >= self._next_at:
                self._next_at = time.monotonic() + REPORT_SECONDS
                for reason, (count, error) in self._added_up().items():
                    logger.error("dropped %d logs (%s): %s", count, reason, error)
        except Exception:  # a handler of the application's, or a race for the last note
            pass
        finally:
            _reporting.active = False

    def _added_up(self) -> dict[str, tuple[int, ChirrOpError]]:
        totals: dict[str, tuple[int, ChirrOpError]] = {}
        while self._drops:
            reason, count, _, error = self._drops.popleft()
            totals[reason] = (totals.get(reason, (0, error))[0] + count, error)
        return totals


class _Sender:
    """The threads that carry out what the outbox decides, and what callers wait for: flush and close."""

    def __init__(
        self,
        outbox: _Outbox,
        link: _Link,
        config: Config,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.outbox, self._link, self._config, self._clock = outbox, link, config, clock
        self.report = _Reporter(config)
        outbox.on_ready, outbox.patience = self.rouse, self._patience
        self.abandoned = False
        self.owner: object = None  # the weak reference that calls abandon
        self._reset()

    def _reset(self) -> None:
        self._lock = threading.RLock()  # guards _threads
        self._threads: list[threading.Thread] = []
        self._lead = (
            threading.Lock()
        )  # held by the one thread that waits for work; the others queue for it
        self._bell = _Bell()  # wakes the leader
        self._waiting = False  # the leader waits for the bell, or is about to look a last time
        self._inside: set[int] = (
            set()
        )  # threads in which flush and close must not wait for themselves
        self._sending: set[int] = set()  # those of them that are in a request now
        self._reporter: threading.Thread | None = None
        self.pid = os.getpid()
        self.closing = (
            threading.Event()
        )  # cuts short the waits of send_logs and control-plane calls
        self._clean = True

    def _patience(self) -> float:
        return 0.0 if threading.get_ident() in self._inside else self._config.timeout

    def after_fork(self) -> None:
        """Forget the parent's threads: they do not exist in a child process."""
        self.report.after_fork()
        self.outbox.after_fork()
        self._link.after_fork()
        self._reset()

    def abandon(self, _: object = None, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        """The client was garbage-collected: send what is held, then end. Called by the collector: no locks."""
        if ending():  # the exit hook has run, and the names of this module are going
            return
        self.abandoned = True
        if self._threads:
            self._bell.ring()
        elif not len(self.outbox.buffer) and not self.outbox.buffer.is_open():
            self._link.close()
            _open_senders.discard(self)
        else:
            self.rouse()

    def rouse(self) -> None:
        """Wake the leader, or start the first thread."""
        if self._waiting:
            self._waiting = False
            self._bell.ring()
        if not self._alive():
            self._spawn()

    def _alive(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    def _spawn(self) -> None:
        """Start one more thread, if the outbox allows it and the interpreter still does."""
        with self._lock:
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            if _exiting or len(self._threads) >= self.outbox.width:
                return
            thread = threading.Thread(
                target=self._run, name=f"chirrop-sender-{len(self._threads) + 1}", daemon=True
            )
            try:
                thread.start()
                self._threads.append(thread)
            except (
                RuntimeError
            ):  # no threads to be had: flush, close and exit send in their own thread
                self.outbox.wake_at = 1

    def _run(self) -> None:
        self._inside.add(threading.get_ident())
        batch: _Batch | None = None
        with _importing:
            self._link.preload()
        while not self.outbox.stopped:
            try:
                with self._lead:
                    batch = self._next()
                if batch is None:
                    break
                self._deliver(batch, self._config.timeout)
            except (
                BaseException
            ) as exc:  # a bug of ours, or no memory: a sender goes on whatever happens
                self.report.note_once(_ERROR, f"sender failed: {type(exc).__name__}: {exc}")
                self.closing.wait(1.0)
        self._inside.discard(threading.get_ident())

    def _next(self) -> _Batch | None:
        """Wait for the next batch; None when there is nothing more to do."""
        while not self.outbox.stopped:
            batch = self.outbox.take(self._clock())
            if batch is not None:
                return batch
            if self.abandoned and not self.outbox.held():
                self._shut()
                break
            if self.report.due():
                self._write_apart()
            self._waiting = True
            wait = self.outbox.arm(self._clock())
            if wait != 0.0:
                self._bell.wait(wait)
            self._waiting = False
        return None

    def _deliver(self, batch: _Batch, timeout: float) -> None:
        """Make one attempt, account for it, and tell whoever must know."""
        self._sending.add(threading.get_ident())
        try:
            body = b"[" + b",".join(batch.items) + b"]"
            answer = self._link.attempt("POST", self._config.api_endpoint, body, timeout)
        except BaseException as exc:  # Ctrl-C, or no memory: the batch waits for its next attempt
            self.report.drops(self.outbox.settle(batch, _Answer(0, cause=exc), self._clock()))
            raise
        finally:
            self._sending.discard(threading.get_ident())
        try:
            drops = self.outbox.settle(batch, answer, self._clock())
        except BaseException as exc:  # no memory: the batch must not stay in flight for ever
            self.report.drops(self.outbox.settle(batch, _Answer(0, cause=exc), self._clock()))
            raise
        self.report.state(answer)
        self.report.drops(drops)
        if self.outbox.width > len(self._threads) > 0:
            self._spawn()
        if self._waiting:
            self.rouse()

    def _write_apart(self) -> None:
        if self._reporter is not None and self._reporter.is_alive():
            return
        try:
            self._reporter = threading.Thread(
                target=self.report.write, name="chirrop-reporter", daemon=True
            )
            self._reporter.start()
        except RuntimeError:  # the interpreter is shutting down: close() writes the rest
            pass

    def flush(self, timeout: float | None) -> bool:
        if self._entered():
            return False
        if threading.get_ident() in self._inside:
            return not self.outbox.held()
        deadline = math.inf if timeout is None else self._clock() + timeout
        flush = self.outbox.begin_flush(self._clock())
        try:
            if not flush.done:
                self.rouse()
                self._wait(flush, deadline)
        finally:
            self.outbox.end_flush(flush)
        self.report.drops(self.outbox.losses())
        self.report.write()
        return flush.done and flush.clean

    def _entered(self) -> bool:
        """Tell whether this thread was interrupted inside: a sender may need the lock that it holds."""
        return bool(self.outbox._lock._is_owned() or self.outbox.buffer.entered())  # type: ignore[attr-defined]

    def _wait(self, flush: _Flush, deadline: float) -> None:
        """Wait for the senders; where no thread can run, do their work in this one."""
        while not flush.done:
            now = self._clock()
            left = deadline - now
            if left <= 0:
                return
            pause: float | None = None if left == math.inf else left
            if not self._alive():
                batch = self.outbox.take(now)
                if batch is not None:
                    self._inside.add(threading.get_ident())
                    try:
                        self._deliver(batch, min(self._config.timeout, left))
                    finally:
                        self._inside.discard(threading.get_ident())
                    continue
                due = self.outbox.arm(now)
                pause = min(left, 1.0 if due is None else due)
            flush.bell.wait(pause)

    def hurry(self) -> None:
        """Take no more logs, and send what is held without waiting."""
        self.outbox.closed = True
        self.closing.set()
        self.outbox.end_flush(self.outbox.begin_flush(self._clock()))
        self.rouse()

    def close(self, timeout: float | None) -> bool:
        if not self.outbox.stopped:
            self.outbox.closed = True
            self.closing.set()
            if self._entered():
                return False  # senders go on with what is held; the exit hook, or another close(), ends them
            clean = self.flush(timeout)
            self._clean = clean and not self.outbox.held()
            self._shut()
        return self._clean

    def _shut(self) -> None:
        self.report.drops(self.outbox.stop())
        self._bell.ring()  # for the leader; the others see that the outbox is stopped
        inside = threading.get_ident() in self._inside
        for thread in [] if inside else self._threads:
            if (
                thread.ident not in self._sending
            ):  # idle: ends at once. One in a request ends after it
                thread.join(1.0)
        self._link.close()
        if not inside:
            self.report.write(final=True)
        elif self.report.due():
            self._write_apart()
        _open_senders.discard(self)


# Every client with unsent logs, or one that may still get some. Held strongly: a client may be dropped
# by the application while its logs are on their way.
_open_senders: set[_Sender] = set()
_exiting = False


def _at_exit() -> None:
    """Close all open clients within one deadline; starts no thread, which 3.12 forbids at this point."""
    global _exiting
    _exiting = True
    if any(sender.pid != os.getpid() for sender in list(_open_senders)):
        _after_fork()
    senders = list(_open_senders)
    deadline = time.monotonic() + max((s._config.exit_timeout for s in senders), default=0.0)
    for sender in senders:
        sender.hurry()
    for sender in senders:
        sender.close(max(0.0, deadline - time.monotonic()))


def _before_fork() -> None:
    """Wait for what a child could not live with half done; not for long."""
    _importing.acquire(timeout=_FORK_SECONDS)
    for sender in list(_open_senders):
        sender.outbox.buffer.before_fork()


def _after_fork_in_parent() -> None:
    for sender in list(_open_senders):
        sender.outbox.buffer.after_fork_in_parent()
    if _importing._is_owned():  # type: ignore[attr-defined]
        _importing.release()


def _after_fork() -> None:
    global _importing, _minted, _reporting
    _importing, _minted, _reporting = threading.RLock(), _NOT_MINTED, threading.local()
    for sender in [s for s in _open_senders if s.pid != os.getpid()]:
        sender.after_fork()
        if sender.abandoned:
            _open_senders.discard(sender)


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork
    )


# ---- Transport ------------------------------------------------------------
# In: one request. Out: (status, body, headers) of any status, or an OSError. One attempt, no retries,
# from any number of threads. The key travels only in the headers of this section.


class _NeverSent(ConnectionError):
    """No connection could be made, so the request did not reach the server."""

    never_sent = True


class _TimedSocket(io.RawIOBase):
    """Read a socket until a deadline for everything: a socket's own time-out starts anew with each byte."""

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
        if (
            now - self._armed_at > 0.05
        ):  # setting it gives up the GIL, which a busy application is slow to return
            self._sock.settimeout(self._deadline - now)
            self._armed_at = now
        count: int | None = self._raw.readinto(buffer)
        self.ended = count == 0
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


def _awake_clock() -> float:
    """Return seconds that go on counting while the machine is suspended, where it has such a clock."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.time()


class _UrllibTransport:
    """The default transport: urllib.request with connections that are kept and verified TLS.

    urllib closes every connection after one answer; the handler in this opener keeps them in a pool, one
    for each request that was under way at once. Proxies come from the environment. There is no handler for
    redirects, files or FTP. A request with the header `Connection: close` gets a connection of its own,
    never a kept one: its fate must be clear.
    """

    def __init__(self, ssl_context: Any = None) -> None:
        self._context = ssl_context
        self._lock = threading.Lock()  # guards the making of _opener and _context
        self._opener: Any = None
        self._idle: dict[tuple[str, str, str], deque[tuple[Any, float]]] = {}
        self._pid = os.getpid()
        self._closed = False

    def __call__(
        self, method: str, url: str, body: bytes | None, headers: Mapping[str, str], timeout: float
    ) -> tuple[int, bytes, Mapping[str, str]]:
        import http.client
        import urllib.request

        opener = self._opener or self._build()
        # The opener has handlers for http and https alone.
        request = urllib.request.Request(url, body, dict(headers), method=method)  # noqa: S310
        try:
            answer: tuple[int, bytes, Mapping[str, str]] = opener.open(request, timeout=timeout)
        except http.client.HTTPException as exc:
            raise ConnectionError(f"invalid answer: {exc!r:.200}") from exc
        return answer

    def _build(self) -> Any:
        """Make the opener with the first request: urllib and ssl are imported then, not with this module."""
        import urllib.request

        transport = self

        class Handler(urllib.request.AbstractHTTPHandler):
            def http_open(self, request: Any) -> Any:
                return transport._exchange(request)

            https_open = http_open
            http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

        with self._lock:
            if self._opener is None:
                opener = urllib.request.OpenerDirector()
                opener.addheaders = [("User-Agent", f"chirrop-python/{__version__}")]
                opener.add_handler(urllib.request.ProxyHandler())
                opener.add_handler(Handler())
                opener.add_handler(
                    urllib.request.UnknownHandler()
                )  # refuses all but http and https
                self._opener = opener
        return self._opener

    def _exchange(self, request: Any) -> tuple[int, bytes, Mapping[str, str]]:
        """Send on a kept connection if there is one; on a new one if that turns out to be dead."""
        deadline = time.monotonic() + request.timeout
        place = (request.type, request.host, request._tunnel_host or "")
        own = request.get_header("Connection", "").lower() == "close"
        connection = None if own else self._checkout(place)
        if connection is not None:
            try:
                return self._talk(connection, request, deadline, place)
            except OSError:  # closed by the server between two requests; nothing was answered
                if (
                    time.monotonic() > deadline - 0.01
                ):  # or a time-out, which Python 3.9 has two classes for
                    raise
        return self._talk(self._connect(request, deadline), request, deadline, place)

    def _talk(
        self, connection: Any, request: Any, deadline: float, place: tuple[str, str, str]
    ) -> tuple[int, bytes, Mapping[str, str]]:
        import http.client

        headers = {**request.unredirected_hdrs, **request.headers}
        if request._tunnel_host:
            headers.pop("Proxy-authorization", None)  # it has gone to the proxy, with CONNECT
        try:
            connection.sock.settimeout(max(0.001, deadline - time.monotonic()))
            connection.response_class = self._timed_response(deadline)
            unread = False
            try:
                parts: list[bytes] = []
                connection.send = parts.append
                connection.request(request.get_method(), request.selector, request.data, headers)
                del connection.send
                connection.send(
                    b"".join(parts)
                )  # in one piece: http.client sends head and body apart
            except (BrokenPipeError, ConnectionResetError):
                unread = (
                    True  # the server may have answered before it stopped reading, with 413 for one
                )
            response = connection.getresponse()
            while response.status < 200:  # http.client passes over 100 only
                response.headers = None
                response.begin()
            if response.fp.raw.ended:  # which http.client takes for the end of the headers
                raise http.client.HTTPException("answer cut short: it ends within its headers")
            if unread and response.status < 300:
                raise http.client.HTTPException("an answer to half a request")
            failure = None
            try:
                body = self._read(response)
            except (OSError, http.client.HTTPException) as exc:
                failure = str(exc) or type(exc).__name__
            if (
                failure
            ):  # raised out here, because an IncompleteRead holds what was read, up to 16 MiB
                # Not an OSError: the server has begun to answer, so this is not a connection found dead.
                raise http.client.HTTPException(f"answer cut short: {failure}")
        except BaseException:
            connection.close()
            raise
        if unread or response.will_close or request.get_header("Connection"):
            connection.close()
        else:
            self._idle.setdefault(place, deque()).append((connection, _awake_clock()))
            if self._closed:
                self.close()
        return response.status, body, response.headers

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
        if (response.length or 0) <= MAX_ANSWER_BYTES:
            # Of a given length without a limit, because read() alone notices that some of it is missing.
            body: bytes = (
                response.read()
                if response.length is not None
                else response.read(MAX_ANSWER_BYTES + 1)
            )
            if len(body) <= MAX_ANSWER_BYTES:
                return body
        raise OSError(f"the answer is larger than {MAX_ANSWER_BYTES} bytes")

    def _connect(self, request: Any, deadline: float) -> Any:
        import http.client

        options: dict[str, Any] = {"timeout": max(0.001, deadline - time.monotonic())}
        try:
            if request.type == "https" or request._tunnel_host:
                options["context"] = self._ssl_context()
                connection: Any = http.client.HTTPSConnection(request.host, **options)
            else:
                connection = http.client.HTTPConnection(request.host, **options)
            if request._tunnel_host:
                pass_on = {k: v for k, v in request.headers.items() if k == "Proxy-authorization"}
                connection.set_tunnel(request._tunnel_host, headers=pass_on)
                connection.response_class = self._timed_response(
                    deadline
                )  # for the proxy's answer to CONNECT
            try:
                connection.connect()
            except BaseException:
                connection.close()
                raise
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise _NeverSent(
                f"cannot connect to {request.host}: {str(exc) or type(exc).__name__}"
            ) from exc
        return connection

    def _ssl_context(self) -> Any:
        with self._lock:
            if self._context is None:
                try:
                    import ssl
                except ImportError as exc:
                    raise OSError(
                        f"https needs the ssl module, which this Python lacks: {exc}"
                    ) from exc
                self._context = ssl.create_default_context()
                self._context.minimum_version = (
                    ssl.TLSVersion.TLSv1_2
                )  # Python 3.9 leaves it to OpenSSL
                self._context.set_alpn_protocols(["http/1.1"])
            return self._context

    def _checkout(self, place: tuple[str, str, str]) -> Any:
        """Return a kept connection that looks alive, or None."""
        if self._pid != os.getpid():
            self.after_fork()
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
        """Close this process's copies of the parent's sockets; the parent's connections stay open."""
        self._pid, self._lock = os.getpid(), threading.Lock()
        idle, self._idle = self._idle, {}
        for kept in idle.values():
            for connection, _ in kept:
                connection.close()

    def close(self) -> None:
        self._closed = True
        for kept in list(self._idle.values()):
            while kept:
                kept.pop()[0].close()


def _has_input(sock: Any) -> bool:
    """Tell whether an idle connection has something to read: the server closed it, or never was in step."""
    if getattr(sock, "pending", int)():  # TLS has it already
        return True
    import select

    if hasattr(select, "poll"):
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        return bool(poll.poll(0))
    return bool(select.select([sock], [], [], 0)[0])


class _Link:
    """Make attempts through the configured transport: adds the headers, and returns whatever happens."""

    def __init__(self, config: Config) -> None:
        self._transport = config.transport or _UrllibTransport(config.ssl_context)
        self._key = config.api_key

    def attempt(
        self, method: str, url: str, body: bytes | None, timeout: float, repeatable: bool = True
    ) -> _Answer:
        headers = {"Authorization": _Secret(f"Bearer {self._key}"), "Accept": "application/json"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        if not repeatable:
            headers["Connection"] = "close"
        try:
            answer: Any = self._transport(method, url, body, headers, timeout)
            status, content, fields = answer
            if not isinstance(status, int) or not isinstance(content, (bytes, bytearray)):
                raise TypeError(
                    f"transport returned {type(status).__name__}, {type(content).__name__}"
                )
            fields = {str(name): str(value) for name, value in fields.items()}
        except (
            BaseException
        ) as exc:  # a transport may be the application's; its errors end no sender
            main = threading.current_thread() is threading.main_thread()
            ours = isinstance(
                self._transport, _UrllibTransport
            )  # which raises nothing else than these
            if main and not isinstance(exc, (OSError, ValueError) if ours else Exception):
                raise _without_key(
                    exc, ""
                ) from None  # what a signal handler has raised, above all Ctrl-C
            return _Answer(0, cause=_without_key(exc, self._key))
        if not 200 <= status < 300:
            content = _masked(bytes(content), self._key)
        return _Answer(status, bytes(content), fields)

    def preload(self) -> None:
        """Import what attempts need, at a moment that a fork waits for; what fails here fails again in its place."""
        import importlib

        names = ["email.utils", "http.client"]
        if isinstance(
            self._transport, _UrllibTransport
        ):  # urllib before ssl, which not every Python has
            names += ["select", "urllib.request", "encodings.idna", "ssl"]
        try:
            for name in names:
                importlib.import_module(name)
        except ImportError:
            pass

    def after_fork(self) -> None:
        getattr(self._transport, "after_fork", lambda: None)()

    def close(self) -> None:
        if isinstance(self._transport, _UrllibTransport):  # another one is its maker's to close
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
    parts = path.strip("/").split("/")
    transition = (
        parts[0] == "alerts"
        and parts[-1] in ("acknowledge", "resolve", "archive")
        and len(parts) == 3
    )
    return method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS") or transition


def _seconds_left(context: Any) -> float:
    """Return what is left of a Lambda invocation; inf where its context does not say."""
    try:
        return float(context.get_remaining_time_in_millis()) / 1000
    except Exception:  # None, as tests pass it, or a context of another make
        return math.inf


class Client:
    """Send logs in the background and make every control-plane call.

    Threads start with the first log, not with the client. As a context manager it is closed at the end.

    Control-plane methods block the calling thread for up to `timeout` seconds per attempt, may be called from
    any thread, take ids as strings (the service's are UUIDs), return parsed JSON and raise as `request` does.

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
        else:
            buffer = SqliteSpool(spool) if isinstance(spool, (str, os.PathLike)) else spool.fresh()
        self._outbox = _Outbox(buffer, config)
        self._sender = _Sender(self._outbox, self._link, config)
        buffer.warn = lambda text, note=self._sender.report.note: note(_WARNING, text)
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

    def log(self, entry: Log) -> None:
        """Queue one log for sending and return at once; the network is never touched here.

        POST /v1.0/logs, later, from a sender thread. May be called from any thread, signal handler,
        finaliser or logging handler. With a spool the log is on disk when this returns. With a bounded
        queue that is full it waits up to `Config.timeout` seconds for room. After close() the log is
        dropped and reported.

        Args:
            entry: a Log.

        Raises:
            ChirrOpValidationError: `entry` is not a Log.
            ChirrOpQueueFullError: the bounded queue or the spool had no room in time; the log was not accepted.
        """
        if type(entry) is not Log and not isinstance(entry, Log):
            raise ChirrOpValidationError(f"entry must be a Log, got {_show(entry)}")
        if self.config.disabled:
            return
        sender = self._sender
        if sender.pid != os.getpid():  # as _here() has it, without the call
            _after_fork()
        late = self._outbox.put(entry._body)
        if late:
            sender.report.late(late)

    def flush(self, timeout: float | None = None) -> bool:
        """Send what was queued before this call, now, and wait for it.

        Neither `flush_delay` nor a backoff in progress is waited for. Blocks until each of those logs was
        delivered or dropped, or one full cycle of retries has failed, or the time is up. Logs queued
        meanwhile do not keep it waiting. Any thread. From on_drop, and from a signal handler or finaliser that
        interrupted the SDK itself, it returns at once. For dropped logs, on_drop may still run when it returns;
        close() waits for that.

        Args:
            timeout: seconds, 0 to 86,400; None waits for the outcome: with the default retries and a dead
                server a minute or two, more where attempts time out or the server asks for pauses.

        Returns:
            True only if all of those logs were delivered. What was not stays queued.
        """
        limit = None if timeout is None else _seconds("timeout", timeout)
        if self.config.disabled:
            return True
        return self._here().flush(limit)

    def close(self, timeout: float | None = None) -> bool:
        """Flush, then end the threads and close the connections; further logs are dropped and reported.

        What could not be sent stays in the spool, or is dropped and reported ("closed"). Blocks like flush;
        from on_drop it does not wait. Calling it again does nothing. Any thread.

        Args:
            timeout: seconds for the flush, 0 to 86,400; None waits for the outcome, see flush.

        Returns:
            True only if everything was delivered.
        """
        limit = None if timeout is None else _seconds("timeout", timeout)
        return self._here().close(limit)

    def shutdown(self) -> bool:
        """Do the same as close()."""
        return self.close()

    def send_logs(self, entries: Iterable[Log] | Log) -> None:
        """Deliver logs now, in this thread, past the queue and the spool.

        POST /v1.0/logs, at most 250 per request. Blocks through up to `Config.retries` repeated attempts
        per request; close() cuts the waits short.

        Args:
            entries: Logs, or one. When a request fails, those before it were delivered and those after it not sent.

        Raises:
            ChirrOpValidationError: an entry is not a Log; nothing was sent.
            ChirrOpError: a request failed for good; see the subclasses.
        """
        logs = [entries] if isinstance(entries, Log) else list(entries)
        for entry in logs:
            if not isinstance(entry, Log):
                raise ChirrOpValidationError(f"entries must be Logs, got {_show(entry)}")
        if self.config.disabled:
            return
        for start in range(0, len(logs), MAX_BATCH):
            items = [entry._body for entry in logs[start : start + MAX_BATCH]]
            body = b"[" + b",".join(items) + b"]"
            self._attempts(
                "POST", self.config.api_endpoint, body, self.config.retries, True, MAX_RETRY_AFTER
            )
            self._outbox.count_direct(len(items))

    def stats(self) -> Stats:
        """Return the account of this client's logs at this moment; see Stats. Does not block."""
        return self._here().outbox.stats()

    def _here(self) -> _Sender:
        """Return the sender, which starts anew in a child of a fork that did not run Python's hooks."""
        if self._sender.pid != os.getpid():
            _after_fork()
        return self._sender

    def timer(
        self, event: str, agent: str | None = None, meta: dict[str, Any] | None = None
    ) -> _Timer:
        """Return a context manager and decorator that logs the elapsed milliseconds as `event`.

        `meta` gains "result": "success", or "error" when an exception passes through. Decorates plain and
        async functions; each call is measured on its own.

            with client.timer("task.duration_ms"): ...
            @client.timer("task.duration_ms", agent="worker")
            async def task(): ...

        Args:
            event, agent: as for Log.
            meta: an object with at most 9 keys besides "result".

        Raises:
            ChirrOpValidationError: at once, not at the end of the measured block.
        """
        return _Timer(self, event, agent, meta)

    def lambda_handler(self, handler: _F) -> _F:
        """Decorate an AWS Lambda handler: flush before each invocation ends, within its remaining time.

        Nothing is done when nothing is queued. What cannot be sent in time stays queued for the next
        invocation. The handler's result and errors pass through untouched. A server that does not answer
        costs an invocation `exit_timeout` seconds at most, and a tenth of that from the second one on,
        until something gets through; 0.2 s of the remaining time are left for the return itself.
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
                    left_over = before.queued or before.in_flight
                    if left_over and before.last_error and before.delivered == after.delivered:
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

        Blocks, in this thread, for at most `timeout` seconds per attempt, with up to `servicer_retries`
        further attempts. Reads, PUTs and alert transitions are repeated after a network failure, 408, 429,
        502, 504 or another 5xx; any other call only on 429 or when no connection could be made, because
        what became of it is unknown.

        Args:
            method: e.g. "GET".
            path: below the servicer's base, e.g. "/events"; ASCII, already encoded, without query.
            query: parameters; None values are left out.
            body: anything JSON-encodable; None is no body.

        Returns:
            The parsed JSON of the answer; {} when it is empty.

        Raises:
            ChirrOpValidationError: an argument breaks a rule; nothing was sent.
            ChirrOpBadRequestError, ChirrOpUnauthorizedError, ChirrOpForbiddenError, ChirrOpNotFoundError,
                ChirrOpInternalServerError, ChirrOpServiceUnavailableError: by status; not repeated.
            ChirrOpRateLimitError, ChirrOpServerError, ChirrOpTransportError: all attempts failed, or one
                may not be repeated, or the server asks to wait for more than 30 s.
            ChirrOpError: the client is disabled.
        """
        if self.config.disabled and not self.config.api_key:
            raise ChirrOpError(
                "the client is disabled, by disabled=True or CHIRROP_DISABLED, and has no key"
            )
        if not isinstance(method, str) or not method.isalpha() or not method.isascii():
            raise ChirrOpValidationError(f"method must be an HTTP method, got {_show(method)}")
        segments = path.strip("/").split("/") if isinstance(path, str) else [""]
        clean = all("!" <= c <= "~" and c not in "?#\\" for segment in segments for c in segment)
        if not clean or not {"", ".", ".."}.isdisjoint(segments):
            raise ChirrOpValidationError(
                f"path must be encoded segments without a query, got {_show(path)}"
            )
        url = f"{self.config.servicer_endpoint}/{path.strip('/')}"
        pairs = [
            (k, str(v).lower() if isinstance(v, bool) else v)
            for k, v in (query or {}).items()
            if v is not None
        ]
        if pairs:
            import urllib.parse

            url += "?" + urllib.parse.urlencode(pairs)
        data = None if body is None else _encode_json("body", body)
        method = method.upper()
        answer = self._attempts(
            method,
            url,
            data,
            self._servicer_retries,
            _is_repeatable(method, path),
            MAX_SERVICER_WAIT,
        )
        if not answer.body.strip():
            return {}
        try:
            return json.loads(answer.body)
        except (ValueError, RecursionError):  # which holds the whole answer
            raise ChirrOpTransportError(f"HTTP {answer.status}: the answer is not JSON") from None

    def _attempts(
        self,
        method: str,
        url: str,
        body: bytes | None,
        retries: int,
        repeatable: bool,
        longest: float,
    ) -> _Answer:
        """Return a 2xx answer, after up to `retries` further attempts, or raise."""
        timeout = self.config.timeout if url == self.config.api_endpoint else self._timeout
        attempt = 0
        while True:
            attempt += 1
            answer = self._link.attempt(method, url, body, timeout, repeatable)
            verdict = _verdict(answer.status)
            if verdict == _DELIVERED:
                return answer
            error = answer.error()
            again = verdict == _RETRY and (
                repeatable or answer.status == 429 or answer.never_sent()
            )
            if not again or attempt > retries or (error.retry_after or 0.0) > longest:
                raise error
            if self._pause(_backoff(attempt, error.retry_after, self._outbox._rand)):
                raise error

    def _pause(self, seconds: float) -> bool:
        """Wait; return True at once when the client is being closed."""
        return self._sender.closing.wait(seconds)

    # Events, their logs and analytics.

    def list_events(self) -> list[Event]:
        """Return all event definitions.

        GET /v1.0/events
        """
        return self.request("GET", "/events")  # type: ignore[no-any-return]

    def create_event(self, payload: Mapping[str, Any]) -> Event:
        """Create an event definition and return it; unknown ones are also made by their first log.

        POST /v1.0/events; not repeated when the outcome is unknown.

        Args:
            payload: Event fields: event, agent, title, description, unit, timezone, public.
        """
        return self.request("POST", "/events", body=_payload(payload, {}))  # type: ignore[no-any-return]

    def get_event(self, event_id: str) -> Event:
        """Return one event definition.

        GET /v1.0/events/{event_id}
        """
        return self.request("GET", _path("events", event_id))  # type: ignore[no-any-return]

    def update_event(self, event_id: str, payload: Mapping[str, Any]) -> Event:
        """Change an event definition and return it.

        PUT /v1.0/events/{event_id}

        Args:
            event_id: which one; an id in the payload has no say.
            payload: title, description, unit, timezone, public or agent.
        """
        return self.request("PUT", _path("events", event_id), body=_payload(payload, {}))  # type: ignore[no-any-return]

    def find_event(self, event: str, agent: str | None = None) -> Event | None:
        """Return the definition with this name, or None.

        GET /v1.0/events

        Args:
            event: flat name, trimmed.
            agent: its agent; without one, the definition that has no agent, else the only one of that name.

        Raises:
            ChirrOpValidationError: no agent was given and several have an event of this name.
        """
        name = _trimmed("event", event)
        wanted = _trimmed("agent", agent) if agent is not None else ""
        same = [found for found in self.list_events() if found.get("event") == name]
        exact = [found for found in same if (found.get("agent") or "") == wanted]
        if exact or wanted or not same:
            return exact[0] if exact else None
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
        return self.request("GET", _path("events", event_id, "logs"), query)  # type: ignore[no-any-return]

    def iter_event_logs(
        self, event_id: str, period: Period, page_size: int = 100
    ) -> Iterator[Rollup]:
        """Yield all of an event's rollups, fetching `page_size` of them at a time; see get_event_logs.

        GET /v1.0/events/{event_id}/logs
        """
        return _pages(lambda offset: self.get_event_logs(event_id, period, page_size, offset))

    def get_event_analytics(
        self, event_id: str, view: View, period: Window, previous: Previous
    ) -> Analytics:
        """Return an event's window that ends now, compared with an earlier one; `data` is None without logs.

        GET /v1.0/events/{event_id}/analytics

        Args:
            event_id: which event.
            view: "window".
            period: "1h", "1d", "7d" or "1m".
            previous: "previous_window", "previous_1d", "previous_7d" or "previous_1m"; not shorter than the
                period, and "previous_window" rather than a window of the period's own length.
        """
        query = {
            "view": _choice("view", view, _VIEWS),
            "period": _choice("period", period, _WINDOWS),
        }
        query["previous"] = _choice(
            f"previous of period {period}", previous, _ANALYTICS_PAIRS[period]
        )
        return self.request("GET", _path("events", event_id, "analytics"), query)  # type: ignore[no-any-return]

    # Policies.

    def list_policies(self) -> list[Policy]:
        """Return all policies.

        GET /v1.0/policies
        """
        return self.request("GET", "/policies")  # type: ignore[no-any-return]

    def create_policy(self, payload: Mapping[str, Any]) -> Policy:
        """Create a policy, a rule that raises alerts, and return it.

        POST /v1.0/policies; not repeated when the outcome is unknown.

        Args:
            payload: Policy fields: event_id, period, aggregate, condition, threshold; and title,
                description, channel, severity, enabled.
        """
        return self.request("POST", "/policies", body=_payload(payload, _POLICY_RULES))  # type: ignore[no-any-return]

    def get_policy(self, policy_id: str) -> Policy:
        """Return one policy.

        GET /v1.0/policies/{policy_id}
        """
        return self.request("GET", _path("policies", policy_id))  # type: ignore[no-any-return]

    def update_policy(self, policy_id: str, payload: Mapping[str, Any]) -> Policy:
        """Change some fields of a policy and return it.

        PUT /v1.0/policies/{policy_id}
        """
        body = _payload(payload, _POLICY_RULES)
        return self.request("PUT", _path("policies", policy_id), body=body)  # type: ignore[no-any-return]

    # Alerts.

    def list_alerts(self, status: AlertStatus | None = None) -> list[Alert]:
        """Return all alerts, or those of one status.

        GET /v1.0/alerts

        Args:
            status: "triggered", "acknowledged", "resolved" or "archived".
        """
        query = {} if status is None else {"status": _choice("status", status, _ALERT_STATUSES)}
        return self.request("GET", "/alerts", query)  # type: ignore[no-any-return]

    def get_alert(self, alert_id: str) -> Alert:
        """Return one alert: the rule that fired, what it saw, and where it stands.

        GET /v1.0/alerts/{alert_id}
        """
        return self.request("GET", _path("alerts", alert_id))  # type: ignore[no-any-return]

    def get_alert_deliveries(
        self,
        alert_id: str,
        kind: DeliveryKind | None = None,
        limit: int | None = None,
        offset: int | None = None,
    ) -> list[Delivery]:
        """Return the attempts to deliver an alert to its destinations.

        GET /v1.0/alerts/{alert_id}/deliveries

        Args:
            alert_id: which alert, or the alert_id that test_destination returned.
            kind: "alert", "test" or "all"; None is real alerts.
            limit: deliveries at most, from 1.
            offset: deliveries to skip, from 0.
        """
        query = {} if kind is None else {"kind": _choice("kind", kind, _DELIVERY_KINDS)}
        query.update(_page(limit, offset))
        return self.request("GET", _path("alerts", alert_id, "deliveries"), query)  # type: ignore[no-any-return]

    def iter_alert_deliveries(
        self, alert_id: str, kind: DeliveryKind | None = None, page_size: int = 100
    ) -> Iterator[Delivery]:
        """Yield all deliveries of an alert, fetching `page_size` at a time; see get_alert_deliveries.

        GET /v1.0/alerts/{alert_id}/deliveries
        """
        return _pages(lambda offset: self.get_alert_deliveries(alert_id, kind, page_size, offset))

    def acknowledge_alert(self, alert_id: str) -> Alert:
        """Mark an alert as seen and return it.

        POST /v1.0/alerts/{alert_id}/acknowledge
        """
        return self.request("POST", _path("alerts", alert_id, "acknowledge"))  # type: ignore[no-any-return]

    def resolve_alert(self, alert_id: str) -> Alert:
        """Mark an alert as dealt with and return it.

        POST /v1.0/alerts/{alert_id}/resolve
        """
        return self.request("POST", _path("alerts", alert_id, "resolve"))  # type: ignore[no-any-return]

    def archive_alert(self, alert_id: str) -> Alert:
        """Put an alert away and return it.

        POST /v1.0/alerts/{alert_id}/archive
        """
        return self.request("POST", _path("alerts", alert_id, "archive"))  # type: ignore[no-any-return]

    # Destinations.

    def list_destinations(self) -> list[Destination]:
        """Return all destinations.

        GET /v1.0/destinations
        """
        return self.request("GET", "/destinations")  # type: ignore[no-any-return]

    def create_destination(self, payload: Mapping[str, Any]) -> Destination:
        """Create a destination, a place that alerts are delivered to, and return it.

        POST /v1.0/destinations; not repeated when the outcome is unknown.

        Args:
            payload: Destination fields: channel ("slack", "discord", "telegram", "email", "webhook"), and
                url, credentials, scope, policy_ids, enabled as the channel needs them.
        """
        body = _payload(payload, _DESTINATION_RULES)
        return self.request("POST", "/destinations", body=body)  # type: ignore[no-any-return]

    def get_destination(self, destination_id: str) -> Destination:
        """Return one destination.

        GET /v1.0/destinations/{destination_id}
        """
        return self.request("GET", _path("destinations", destination_id))  # type: ignore[no-any-return]

    def update_destination(self, destination_id: str, payload: Mapping[str, Any]) -> Destination:
        """Change some fields of a destination and return it.

        PUT /v1.0/destinations/{destination_id}
        """
        body = _payload(payload, _DESTINATION_RULES)
        return self.request("PUT", _path("destinations", destination_id), body=body)  # type: ignore[no-any-return]

    def test_destination(self, destination_id: str) -> TestResult:
        """Send a test alert and return its alert_id, destination_id and status; {} from some deployments.

        POST /v1.0/destinations/{destination_id}/test; not repeated when the outcome is unknown.
        """
        return self.request("POST", _path("destinations", destination_id, "test"))  # type: ignore[no-any-return]


def _page(limit: int | None, offset: int | None) -> dict[str, int]:
    page = {}
    if limit is not None:
        page["limit"] = _integer("limit", limit, 1)
    if offset is not None:
        page["offset"] = _integer("offset", offset, 0)
    return page


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
        self._log(0.0, "success")
        self._starts: list[float] = []

    def _log(self, milliseconds: float, result: str) -> Log:
        return Log(
            self._event, round(milliseconds, 3), self._agent, meta={**self._meta, "result": result}
        )

    def __enter__(self) -> _Timer:
        self._starts.append(time.perf_counter())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        elapsed = (time.perf_counter() - self._starts.pop()) * 1000
        try:
            self._client.log(self._log(elapsed, "success" if kind is None else "error"))
        except ChirrOpError as exc:  # a full queue: the measured code must not fail for it
            self._client._sender.report.note_once(
                _WARNING, f"a timer's log was not accepted: {exc}"
            )

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
    """Return a Client from a Config, or from the fields of one: new_client(api_key="chp_...", retries=3).

    Raises:
        ChirrOpValidationError: a field is wrong or unknown, or both a config and fields were given.
    """
    config, api_key = _hidden(config), _hidden(api_key)
    if config is not None:
        if fields or api_key is not None:
            raise ChirrOpValidationError("give either a config or its fields, not both")
        return Client(config)
    unknown = sorted(set(fields) - set(Config.__init__.__annotations__))
    if unknown:
        raise ChirrOpValidationError(f"Config has no field {', '.join(unknown)}")
    return Client(Config(api_key, **fields))


# ---- Global API -----------------------------------------------------------
# One client per process, for applications that have no place to keep it.


class ChirrOp:
    """The global client: initialize it once, log from anywhere, stop it at the end."""

    _slot: dict[
        str, Client
    ] = {}  # empty or {"client": ...}: a dict's setdefault and pop are atomic

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
        client = None if cls._slot else new_client(config, api_key=api_key, **fields)
        if client is None or cls._slot.setdefault("client", client) is not client:
            raise ChirrOpError("ChirrOp SDK is already initialized")
        return client

    @classmethod
    def _get(cls) -> Client:
        try:
            return cls._slot["client"]
        except KeyError:
            raise ChirrOpError(
                "ChirrOp SDK is not initialized. Please call initialize() first"
            ) from None

    @classmethod
    def log_event(cls, entry: Log) -> None:
        """Queue one log; see Client.log. Raises ChirrOpError before initialize()."""
        cls._get().log(entry)

    @classmethod
    def flush(cls, timeout: float | None = None) -> bool:
        """Send what is queued, now; see Client.flush. Raises ChirrOpError before initialize()."""
        return cls._get().flush(timeout)

    @classmethod
    def stop(cls, timeout: float | None = None) -> bool:
        """Close the global client, see Client.close; True when there is none. It may be initialized anew."""
        client = cls._slot.pop("client", None)
        return client.close(timeout) if client is not None else True


initialize, log_event, flush, stop = (
    ChirrOp.initialize,
    ChirrOp.log_event,
    ChirrOp.flush,
    ChirrOp.stop,
)


# ---- Sandbox --------------------------------------------------------------
# In: requests, as any transport takes them. Out: the answers ChirrOp would give.
# Starts no thread and opens no socket (the server of _serve_sandbox does); one
# lock guards all state, and no scripted delay is waited for under it.

if TYPE_CHECKING:
    _Row = dict[str, Any]
    _Reply = tuple[int, bytes, dict[str, str]]

_SANDBOX_BODY_BYTES = 16 << 20  # the served sandbox answers 413 above this
_SANDBOX_USER = "00000000-0000-4000-8000-000000000001"
_SANDBOX_IDS = {
    "events": "event_id",
    "policies": "policy_id",
    "alerts": "alert_id",
    "destinations": "destination_id",
}
# What a client may set: name -> (type or vocabulary, default); None: required.
_SANDBOX_FIELDS: dict[str, dict[str, tuple[Any, Any]]] = {
    "events": {
        "event": (str, None),
        "agent": (str, ""),
        "title": (str, ""),
        "description": (str, ""),
        "unit": (str, ""),
        "timezone": (str, "UTC"),
        "public": (bool, False),
    },
    "policies": {
        "event_id": (str, None),
        "title": (str, ""),
        "description": (str, ""),
        "channel": (str, "ops"),
        "period": (_PERIODS, None),
        "aggregate": (_AGGREGATES, None),
        "condition": (_CONDITIONS, None),
        "threshold": (float, None),
        "severity": (_SEVERITIES, "warning"),
        "enabled": (bool, True),
    },
    "destinations": {
        "channel": (_CHANNELS, None),
        "url": (str, ""),
        "credentials": (dict, {}),
        "scope": (str, "all"),
        "policy_ids": (list, []),
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


class _SandboxRefusal(Exception):
    """An answer that is not 2xx: the text of its error, and its status."""


def _sandbox_need(good: object, text: str, status: int = 400) -> None:
    if not good:
        raise _SandboxRefusal(text, status)


def _sandbox_answer(status: int, content: Any) -> _Reply:
    """Return an answer whose body is text or bytes as they are, or else JSON."""
    if isinstance(content, (str, bytes)):
        return status, content.encode() if isinstance(content, str) else content, {}
    return status, _encode_json("answer", content), {"Content-Type": "application/json"}


def _sandbox_json(body: bytes | None) -> tuple[Any, str]:
    """Return the parsed body and, where it is not strict JSON, the reason."""
    try:
        parsed = json.loads(body) if body else None
        _encode_json("body", parsed)  # json.loads() takes NaN and lone surrogates
        return parsed, ""
    except (ValueError, RecursionError) as exc:
        return None, f"body is not valid JSON: {exc}"


def _sandbox_copy(value: Any) -> Any:
    return json.loads(_encode_json("value", value))


def _sandbox_id(text: str | None = None) -> str:
    """Return `text` as a canonical UUID, or a new one."""
    import uuid

    try:
        return str(uuid.uuid4() if text is None else uuid.UUID(text))
    except ValueError as exc:
        raise _SandboxRefusal(f"id must be a UUID, got {text!r:.80}", 400) from exc


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
    _sandbox_need(value in choices, f"{name} must be one of {', '.join(choices)}")
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
    """Return what a client may set: as given, else as it is, else the default."""
    _sandbox_need(isinstance(given, dict), "body must be a JSON object")
    fields = {}
    for name, (rule, default) in _SANDBOX_FIELDS[kind].items():
        value = given.get(name)
        if value is None:
            value = record.get(name, _sandbox_copy(default))
        _sandbox_need(value is not None, f"{name} is required")
        words = _SANDBOX_TYPES.get(rule) or f"one of {', '.join(rule)}"
        _sandbox_need(_sandbox_fits(value, rule), f"{name} must be {words}")
        fields[name] = value
    return fields


def _sandbox_start(at: datetime, period: str, zone: Any) -> datetime:
    """Return the start of the bucket that `at` falls in; days are those of `zone`."""
    at = at.replace(second=0, microsecond=0)
    if period == "day":
        return at.astimezone(zone).replace(hour=0, minute=0, fold=0).astimezone(timezone.utc)
    return at if period == "minute" else at.replace(minute=0)


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
        "stddev": stddev,
        "p95_est": mean + 1.645 * stddev,
        "p99_est": mean + 2.326 * stddev,
    }


def _sandbox_compare(windows: dict[str, _Row]) -> _Row:
    """Return the `data` of analytics; an empty window has no mean and no stddev."""
    data: _Row = {}
    for when in ("current", "previous"):
        seen = _sandbox_aggregates(windows[when]) if when in windows else {}
        data[f"{when}_value"] = seen.get("value", 0)
        data[f"{when}_count"] = seen.get("count", 0)
        data[f"{when}_mean"] = seen.get("average")
        data[f"{when}_stddev"] = seen.get("stddev")
    for name in ("value", "count", "mean"):
        now, before = data[f"current_{name}"], data[f"previous_{name}"]
        known = None not in (now, before)
        data[f"{name}_delta"] = _sandbox_finite(now - before) if known else None
        data[f"{name}_pct_change"] = (
            _sandbox_finite((now - before) / abs(before) * 100) if known and before else None
        )
    return data


class Sandbox:
    """An in-memory ChirrOp that is itself a transport: no network, no account.

        sandbox = Sandbox()
        client = new_client(api_key="chp_sandbox", transport=sandbox)

    It refuses what ChirrOp refuses. Policies are evaluated at each request that
    brings logs; deliveries are recorded, never sent; lists come oldest first.
    Thread-safe, and what it hands out are copies.

    Args:
        key: the only API key accepted; None: any that starts with "chp_".
        clock: returns the time, in seconds since the epoch.
        sleep: waits out a scripted delay, in seconds.
    """

    def __init__(
        self,
        *,
        key: str | None = None,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._key, self._clock, self._sleep = key, clock, sleep
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
            return list(_sandbox_copy([*self._logs.values()]))

    @property
    def requests(self) -> list[_Row]:
        """All requests: `method`, `path`, `query`, `body`, and `status` (0: no answer)."""
        with self._lock:
            return list(_sandbox_copy(self._requests))

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
            if body is None:
                body = {"error": f"scripted {status}"} if status >= 400 else b""
            answer = _sandbox_answer(status, body)
            answer[2].update(headers or {})
            if retry_after is not None:
                answer[2]["Retry-After"] = str(retry_after)
        left = math.inf if times is None else times
        with self._lock:
            self._faults.append(
                {
                    "times": left,
                    "answer": answer,
                    "drop": drop,
                    "delay": delay,
                    "method": method,
                    "path": path or "",
                }
            )

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
        if delay and delay >= timeout:
            raise TimeoutError("timed out, as scripted")
        if drop == "before":
            raise ConnectionResetError("connection dropped, as scripted")
        status, content, extra = fault.get("answer") or self._answer(request, problem, headers)
        if drop == "after":
            raise ConnectionResetError("connection dropped, as scripted")
        with self._lock:
            request["status"] = status
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
        valid = scheme.lower() == "bearer" and key.startswith("chp_") and self._key in (None, key)
        try:
            _sandbox_need(valid, "invalid API key", 401)
            with self._lock:
                return _sandbox_answer(200, self._route(request, problem))
        except _SandboxRefusal as exc:
            text, status = exc.args
            return _sandbox_answer(status, {"error": text})

    def _route(self, request: _Row, problem: str) -> Any:
        """Return what the handler of the request in _ROUTES returns."""
        from urllib.parse import unquote

        path = [unquote(part) for part in request["path"].partition("/v1.0/")[2].split("/")]
        shape = "/".join([path[0], "*", *path[2:]]) if len(path) > 1 else path[0]
        methods = self._ROUTES.get(shape, {})
        _sandbox_need(methods, "no such route", 404)
        _sandbox_need(request["method"] in methods, "method not allowed", 405)
        _sandbox_need(not problem, problem)
        if len(path) > 1:
            path[1] = _sandbox_id(path[1])
        return methods[request["method"]](self, path, request["query"], request["body"])

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._clock(), timezone.utc)

    # Handlers take the path after /v1.0/ in segments, the query and the parsed body.

    def _ingest(self, path: list[str], query: _Row, body: Any) -> bytes:
        _sandbox_need(isinstance(body, list), "body must be a JSON array of logs")
        _sandbox_need(
            0 < len(body) <= MAX_BATCH,
            f"a request must hold 1 to {MAX_BATCH} logs, got {len(body)}",
        )
        fresh: dict[str, set[datetime]] = {}
        for log in [self._check(index, fields) for index, fields in enumerate(body)]:
            if log["log_id"] not in self._logs:
                self._logs[log["log_id"]] = log
                event_id, at = self._take(log)
                fresh.setdefault(event_id, set()).add(at)
        for policy in self._stores["policies"].values():
            if policy["enabled"] and policy["event_id"] in fresh:
                self._judge(policy, fresh[policy["event_id"]])
        return b""

    def _check(self, index: int, fields: Any) -> _Row:
        _sandbox_need(isinstance(fields, dict), f"log {index}: must be an object")
        try:
            log: _Row = json.loads(_encode_log(self._clock(), *map(fields.get, _LOG_FIELDS)))
        except ChirrOpValidationError as exc:
            raise _SandboxRefusal(f"log {index}: {exc}", 400) from exc
        poison = any(predicate(_sandbox_copy(log)) for predicate in self._poison)
        _sandbox_need(not poison, f"log {index}: log_id {log['log_id']} was rejected")
        return log

    def _take(self, log: _Row) -> tuple[str, datetime]:
        """File a log under its event definition, made when it is new."""
        name = {"agent": log.get("agent", ""), "event": log["event"]}
        event = self._named.get((name["agent"], name["event"]))
        event = event or self._save(["events"], {}, name)
        at = _parse_time(log["occurred_at"])
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
            "alert_id": _sandbox_id(),
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
        attempt = {
            "attempt_id": _sandbox_id(),
            "alert_id": alert_id,
            "destination_id": destination["destination_id"],
            "channel": destination["channel"],
            "target": destination["url"] or str(destination["credentials"].get("chat_id", "")),
            "status": "sent",
            "response_status": 200,
            "error_message": None,
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
        record = self._find(path) if len(path) > 1 else {id_name: _sandbox_id()}
        fields = _sandbox_fields(path[0], body, record)
        self._COMPLETE[path[0]](self, fields, record)
        record.update(fields)
        return self._stores[path[0]].setdefault(record[id_name], record)

    def _complete_event(self, fields: _Row, record: _Row) -> None:
        agent, event = fields["agent"].strip(), record.get("event") or fields["event"].strip()
        _sandbox_need(event, "event must not be blank")
        _sandbox_zone(fields["timezone"])
        taken = self._named.get((agent, event), record) is not record
        _sandbox_need(not taken, "this agent and event have a definition already", 422)
        self._named.pop((record.get("agent", agent), event), None)
        self._named[agent, event] = record
        token = (record.get("share_token") or _sandbox_id()) if fields["public"] else None
        created = record.get("created_at", _iso(self._now()))
        fields.update(
            agent=agent, event=event, share_token=token, user_id=_SANDBOX_USER, created_at=created
        )

    def _complete_policy(self, fields: _Row, record: _Row) -> None:
        fields["event_id"] = _sandbox_id(fields["event_id"])
        _sandbox_need(fields["event_id"] in self._stores["events"], "event_id is unknown", 422)

    def _complete_destination(self, fields: _Row, record: _Row) -> None:
        channel, url, credentials = fields["channel"], fields["url"], fields["credentials"]
        for name in _SANDBOX_NEEDS.get(channel, ("url",)):
            given = url if name == "url" else credentials.get(name)
            _sandbox_need(str(given or "").strip(), f"a {channel} destination needs {name}")
        scheme, _, rest = url.partition("://")
        absolute = scheme in ("http", "https") and rest.partition("/")[0]
        _sandbox_need(absolute or not url, "url must be an absolute http(s) URL")
        _sandbox_need(
            all(type(item) in (str, int) for item in credentials.values()),
            "credentials must be strings",
        )
        fields["policy_ids"] = [_sandbox_id(str(item)) for item in fields["policy_ids"]]
        known = self._stores["policies"].keys() >= set(fields["policy_ids"])
        _sandbox_need(known, "policy_ids names an unknown policy", 422)
        now = _iso(self._now())
        created, delivered = record.get("created_at", now), record.get("last_delivered_at")
        fields.update(
            created_at=created, updated_at=now, last_delivered_at=delivered, last_error=None
        )

    def _rollups(self, path: list[str], query: _Row, _: Any) -> list[_Row]:
        event, period = self._find(path), _sandbox_choice(query, "period", _PERIODS)
        same = {name: event[name] for name in ("event_id", "agent", "event")}
        buckets = sorted(self._buckets(event, period).items())
        rollups = [
            {**same, "period": period, "occurred_at": _iso(start), **bucket}
            for start, bucket in buckets
        ]
        return _sandbox_page(rollups, query)

    def _analytics(self, path: list[str], query: _Row, _: Any) -> _Row:
        event_id = self._find(path)["event_id"]
        view = _sandbox_choice(query, "view", _VIEWS)
        period = _sandbox_choice(query, "period", _WINDOWS)
        previous = _sandbox_choice(query, "previous", _PREVIOUS)
        _sandbox_need(
            previous in _ANALYTICS_PAIRS[period],
            f"{previous} is not supported with period {period}",
        )
        windows: dict[str, _Row] = {}
        span, now = _SANDBOX_SPANS[period], self._now()
        shift = _SANDBOX_SPANS.get(previous[len("previous_") :], span)
        for at, value in self._points.get(event_id, []):
            for name, end in (("current", now), ("previous", now - shift)):
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
        status = _sandbox_choice(query, "status", _ALERT_STATUSES)
        return [alert for alert in alerts if alert["status"] == status]

    def _move_alert(self, path: list[str], *_: Any) -> _Row:
        alert, status = self._find(path), _SANDBOX_VERBS[path[2]]
        if alert["status"] != status:  # repeating a step changes nothing; no step leads back
            starts = _ALERT_STATUSES[: _ALERT_STATUSES.index(status)]
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
        wanted = _sandbox_choice(query, "kind", _DELIVERY_KINDS, "alert")
        attempts = [pair for pair in self._attempts if pair[1]["alert_id"] == path[1]]
        if not attempts:  # the alert of a test is known by its attempt alone
            self._find(path)
        return _sandbox_page([row for kind, row in attempts if wanted in (kind, "all")], query)

    def _test(self, path: list[str], *_: Any) -> _Row:
        destination, alert_id = self._find(path), _sandbox_id()
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


def _serve_sandbox(sandbox: Sandbox, port: int = 0) -> ThreadingHTTPServer:
    """Return an HTTP server on 127.0.0.1 that answers as `sandbox` does.

    The caller runs serve_forever() and server_close(). Port 0 takes a free one, which
    server_address tells. A scripted drop closes the connection without an answer.
    """
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
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
            length = self.headers.get("Content-Length", "0")
            host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            if host not in ("", "127.0.0.1", "localhost") or "Origin" in self.headers:
                self.refuse(403, "this sandbox serves programs on this machine, not web pages")
            elif not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
                self.refuse(400, "a body needs its length in Content-Length")
            elif len(length) > 9 or int(length) > _SANDBOX_BODY_BYTES:
                self.refuse(413, f"a body may have {_SANDBOX_BODY_BYTES} bytes")
            else:
                body = self.rfile.read(int(length))
                if len(body) == int(length):
                    url = "http://127.0.0.1/" + self.path.lstrip("/")
                    self.reply(sandbox(self.command, url, body, dict(self.headers), math.inf))

        def refuse(self, status: int, text: str) -> None:
            self.close_connection = True
            self.reply(_sandbox_answer(status, {"error": text}))
            self.connection.settimeout(1.0)
            while self.rfile.read1(65536):  # closed with data unread, TCP resets the answer
                pass

        def reply(self, answer: _Reply) -> None:
            self.send_response(answer[0])
            for name, value in answer[2].items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer[1])))
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(answer[1])

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815  # http.server's names

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # connections that may wait at once: the default is 5
        daemon_threads = True

    return Server(("127.0.0.1", port), Handler)


# ---- Command line ---------------------------------------------------------
# In: arguments, standard input, CHIRROP_* and ./.env. Out: results on standard output, all else on standard
# error, exit status 0, 1 (failed or interrupted) or 2 (usage, configuration). Importing runs nothing of it.

_MAX_LINE_BYTES = 1 << 20  # of `log -`: a longer line holds no log, and must not fill memory
_QUEUED_LINES = 5000  # of `log -`: enough to keep the senders busy
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
    """Return text without the control characters with which a server could steer a terminal."""
    text = "" if value is None else str(value)
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _width(text: str) -> int:
    import unicodedata

    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


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
    return ("\n" + " " * indent).join(
        textwrap.wrap(text, room if _width(text) == len(text) else room // 2)
    )


def _figure(value: Any) -> str:
    """Return a number for people."""
    if not isinstance(value, (int, float)):
        return "-" if value is None else _plain(value)
    if 0 < abs(value) < 0.01 or abs(value) >= 1e12:
        return f"{value:.4g}"
    return f"{value:,.0f}" if value == int(value) else f"{value:,.2f}"


def _paint(text: str, code: int) -> str:
    """Return text in a colour, where standard output shows colours."""
    plain = (
        os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or sys.platform == "win32"
    )
    return text if plain or not sys.stdout.isatty() else f"\033[{code}m{text}\033[0m"


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
                stats, failing = self._client.stats(), self._client._outbox._failures
                text = f"{stats.delivered:,} delivered, {stats.queued + stats.in_flight:,} waiting"
                text += f", {sum(stats.dropped.values()):,} dropped" if stats.dropped else ""
                _status(text + (f", retrying: {_plain(stats.last_error)}" if failing else ""))
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
    """Print a line for each item, or a block of lines where the terminal is too narrow; ids come first."""
    rows = [[_plain(item.get(head)) for head in heads] for item in items]
    widths = [max(map(_width, column)) for column in zip(heads, *rows)]
    if not rows:
        _say("there are none")
    elif sys.stdout.isatty() and sum(widths) + 2 * len(widths) - 2 > _columns():
        for row in rows:
            block = [
                row[0],
                *(f"  {head} {cell}" for head, cell in zip(heads[1:], row[1:]) if cell),
            ]
            print("\n".join(_fit(line, _columns()).rstrip() for line in block))
    else:
        for cells in ([head.upper() for head in heads], *rows):
            print("  ".join(map(_fit, cells, widths)).rstrip())


def _headline(event: Event, what: str) -> None:
    name = " ".join(filter(None, (event.get("agent"), event.get("event"))))
    unit = f" ({event['unit']})" if event.get("unit") else ""
    print(_wrap(f"{name}{unit}: {what}", sys.stdout))


def _show_rollups(event: Event, period: str, rollups: list[Rollup]) -> None:
    """Print a line per bucket, with a bar as long as its sum is large."""
    _headline(event, f"count and sum by {period}, UTC")
    block = "█" if "utf" in (sys.stdout.encoding or "").lower() else "#"
    rows = sorted(
        (str(r.get("occurred_at")), r.get("value") or 0.0, r.get("count")) for r in rollups
    )
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
    print(
        f"{'':6}  {'now':>10}  {'before':>10}  {'change':>8}"
        if data
        else "no logs in either window"
    )
    for name in ("value", "count", "mean", "stddev") if data else ():
        change = data.get(f"{name}_pct_change")
        percent = "" if change is None else f"{change:+,.1f}%"
        now, before = _figure(data.get(f"current_{name}")), _figure(data.get(f"previous_{name}"))
        print(f"{name:6}  {now:>10}  {before:>10}  {percent:>8}".rstrip())


def _parsed(name: str, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise ChirrOpValidationError(f"{name} must be JSON: {exc}") from exc


def _event_named(client: Client, args: Any) -> Event:
    """Return the definition that EVENT and --agent name; a UUID is an id."""
    import re

    if re.fullmatch(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", args.event):
        return client.get_event(args.event)
    event = client.find_event(args.event, args.agent)
    if event is None:
        raise ChirrOpNotFoundError(
            f"there is no event {_show(args.event)}; `chirrop events` lists them"
        )
    return event


def _cmd_events(args: Any) -> int:
    with new_client() as client:
        events = client.list_events()
    return _result(
        args, events, lambda: _table(("event_id", "agent", "event", "unit", "title"), events)
    )


def _cmd_rollups(args: Any) -> int:
    with new_client() as client:
        event = _event_named(client, args)
        rollups = client.get_event_logs(event["event_id"], args.period, args.limit)
    return _result(args, rollups, lambda: _show_rollups(event, args.period, rollups))


def _cmd_analytics(args: Any) -> int:
    with new_client() as client:
        event = _event_named(client, args)
        answer = client.get_event_analytics(event["event_id"], "window", args.period, args.previous)
    return _result(args, answer, lambda: _show_analytics(event, answer))


def _cmd_alerts(args: Any) -> int:
    if args.action and (args.id is None or args.status):
        raise ChirrOpValidationError(f"`alerts {args.action}` takes the ID of one alert")
    with new_client() as client:
        moves = {
            "ack": client.acknowledge_alert,
            "resolve": client.resolve_alert,
            "archive": client.archive_alert,
        }
        answer: Any = (
            moves[args.action](args.id) if args.action else client.list_alerts(args.status)
        )
    heads = ("alert_id", "status", "severity", "agent", "event", "value", "triggered_at", "title")
    return _result(args, answer, lambda: _table(heads, [answer] if args.action else answer))


def _cmd_api(args: Any) -> int:
    import urllib.parse

    path, _, query = args.path.partition("?")
    text = sys.stdin.buffer.read() if args.data == "-" else args.data
    body = None if text is None else _parsed("--data", text)
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
                "`log -` reads whole logs from standard input, and takes nothing else"
            )
        return _log_lines(args)
    if args.value is None:
        raise ChirrOpValidationError("`log EVENT` needs a VALUE")
    meta = None if args.meta is None else _parsed("--meta", args.meta)
    entry = Log(args.event, args.value, args.agent, args.log_id, meta, args.occurred_at)
    with new_client(retries=3) as client:
        client.send_logs([entry])
        delivered = client.stats().delivered
    word = "delivered" if delivered else "discarded, since CHIRROP_DISABLED is set:"
    return _result(
        args, {"delivered": delivered, "log": entry.to_dict()}, lambda: print(word, entry.log_id)
    )


def _log_lines(args: Any) -> int:
    """Send JSON Lines from standard input, in bounded memory."""
    client = new_client(queue_size=_QUEUED_LINES, retries=5)
    number = bad = 0
    with _Progress(client), client:
        try:
            for number, line in enumerate(_lines(sys.stdin.buffer), 1):
                try:
                    if line.strip():
                        _log_patiently(client, _log_of(line))
                except ChirrOpValidationError as exc:
                    bad += 1
                    _say(f"line {number}: {exc}")
        except (ChirrOpError, KeyboardInterrupt) as exc:
            _say(f"stopped at line {number}: {str(exc) or 'interrupted'}")
            client.close(2.0)
    stats = client.stats()
    account = {"lines": number, "bad": bad, "delivered": stats.delivered, "dropped": stats.dropped}
    lost = sum(stats.dropped.values())
    words = f"{number:,} lines: {stats.delivered:,} delivered, {bad:,} bad, {lost:,} dropped"
    _result(args, account, lambda: print(words))
    if lost:
        _say(f"the last failure: {stats.last_error}")
    return 1 if bad or lost or client.config.disabled else 0


def _lines(stream: Any) -> Iterator[bytes]:
    """Yield lines; of one that is too long only its beginning."""
    while line := stream.readline(_MAX_LINE_BYTES):
        yield line
        while len(line) == _MAX_LINE_BYTES and not line.endswith(b"\n"):
            line = stream.readline(_MAX_LINE_BYTES)


def _log_of(line: bytes) -> Log:
    fields = _parsed("a log", line)
    if not isinstance(fields, dict) or not fields.keys() <= set(_LOG_FIELDS):
        raise ChirrOpValidationError(f"a log must be an object of {', '.join(_LOG_FIELDS)}")
    return Log(**{"event": None, "value": None, **fields})


def _log_patiently(client: Client, entry: Log) -> None:
    """Queue a log, waiting for room as long as anything moves; raise when the service refuses logs."""
    while "refused" not in client._outbox._dropped:
        before = client.stats()
        try:
            return client.log(entry)
        except ChirrOpQueueFullError:
            client.flush()
            if client.stats()[:3] == before[:3]:  # a full cycle of retries has failed
                break
    raise client.stats().last_error or ChirrOpError("the service takes no logs")


def _cmd_drain(args: Any) -> int:
    if not os.path.isfile(args.spool):
        raise ChirrOpValidationError(f"there is no spool {args.spool!r}")
    spool = SqliteSpool(args.spool)
    spool.dead_letters()  # raises for a file that is no spool: a client would move it aside
    client = new_client(spool=spool, retries=5)
    if client.config.disabled:
        raise ChirrOpError("CHIRROP_DISABLED is set: nothing is sent")
    with _Progress(client):
        try:
            clean = (
                client.flush() and client._outbox.buffer._conn is not None
            )  # else it has said what is wrong
            stats = client.stats()
        finally:
            client.close(0.0)
    dead = len(spool.dead_letters())
    account = {
        "delivered": stats.delivered,
        "left": stats.queued,
        "parked": stats.parked,
        "dead_letters": dead,
    }
    _result(
        args,
        account,
        lambda: print("\n".join(f"{v:,} {k.replace('_', ' ')}" for k, v in account.items())),
    )
    if stats.last_error and not clean:
        _say(f"the last failure: {stats.last_error}")
    return 0 if clean else 1


def _cmd_doctor(args: Any) -> int:
    found = []
    for check, good, text in _diagnose():
        found.append({"check": check, "ok": good, "text": text})
        if not args.json:
            mark = _paint("ok  ", 32) if good else _paint("FAIL", 31)
            print(mark, f"{check:6}", _wrap(text, sys.stdout, 12), flush=True)
    _result(args, found, lambda: None)
    return 0 if all(entry["ok"] for entry in found) else 1


# For the first of these classes in a failure's chain; {} is the variable that holds the endpoint.
_CURES = {
    "gaierror": "The name has no address: check {}, the network and its DNS server.",
    "SSLCertVerificationError": "The certificate is not trusted: where a proxy inspects TLS, or the CA is private,"
    " set SSL_CERT_FILE to the CA's file; check this computer's clock, too.",
    "SSLError": "The TLS handshake failed: check {}; perhaps http is served there, or the port is wrong.",
    "ConnectionRefusedError": "Nothing listens there: check {}, and that the service is running.",
    "timeout": "Check the firewall, and whether HTTPS_PROXY must name a proxy.",
    "TimeoutError": "Check the firewall, and whether HTTPS_PROXY must name a proxy.",
    "OSError": "Check {}, and the proxy if there is one.",
}


def _diagnose() -> Iterator[tuple[str, bool, str]]:
    """Yield each check, whether all is well, and what was found, with what to do about it. Sends no log."""
    key = ""
    try:
        key = _checked_key(None)
        source = "the environment" if os.environ.get("CHIRROP_API_KEY") else ".env"
        yield "key", True, f"from {source}, has the right form"
    except ChirrOpValidationError as exc:
        yield (
            "key",
            False,
            f"{exc}. Set CHIRROP_API_KEY, in the environment or in ./.env, to your workspace's key.",
        )
    if Config("chp_doctor", DEFAULT_API_ENDPOINT, DEFAULT_SERVICER_ENDPOINT).disabled:
        yield (
            "switch",
            False,
            "CHIRROP_DISABLED is set: logs are checked and discarded. Unset it to send them.",
        )
    for name, variable, default in (
        ("logs", "CHIRROP_API_ENDPOINT", DEFAULT_API_ENDPOINT),
        ("api", "CHIRROP_SERVICER_ENDPOINT", DEFAULT_SERVICER_ENDPOINT),
    ):
        try:
            yield from _diagnose_endpoint(
                name, _checked_endpoint(variable, None, variable, default), key, variable
            )
        except ChirrOpValidationError as exc:
            yield name, False, f"{exc}. Correct it, or unset it for {default}."


def _diagnose_endpoint(
    name: str, url: str, key: str, variable: str
) -> Iterator[tuple[str, bool, str]]:
    """Check the way to an endpoint with a GET by the client's own transport: proxy, DNS, TLS, answer, clock."""
    import email.utils
    import urllib.parse
    import urllib.request

    parts = urllib.parse.urlsplit(url)
    proxy = (
        urllib.request.getproxies().get(parts.scheme, "").rpartition("@")[2]
    )  # without its password
    past = not proxy or urllib.request.proxy_bypass(parts.netloc)
    yield (
        name,
        True,
        f"{url}, {'no proxy' if past else f'by the proxy {proxy} (NO_PROXY can exempt the host)'}",
    )
    headers = {"Authorization": _Secret(f"Bearer {key}")} if key else {}
    transport = _UrllibTransport()
    try:
        status, body, fields = transport(
            "GET", url + "/events" * (name == "api"), None, headers, 10
        )
    except OSError as exc:
        kinds = [kind.__name__ for link in (exc, exc.__cause__) for kind in type(link).__mro__]
        cure = next(text for kind, text in _CURES.items() if kind in kinds)
        yield name, False, f"{_without_key(exc, key)}. {cure.format(variable)}"
        return
    finally:
        transport.close()
    error = "" if 200 <= status < 300 else str(_Answer(status, _masked(body, key)).error())
    reached = f"reached{', certificate trusted' if parts.scheme == 'https' else ''}"
    if name == "logs" and (status < 300 or 400 <= status < 500):
        yield (
            name,
            True,
            reached,
        )  # it takes POST alone, and no log is sent: this answer tells no more
    elif status in (401, 403):
        yield (
            name,
            not key,
            f"{error}. The key is wrong, revoked, or of another workspace." if key else reached,
        )
    elif error or not body.lstrip().startswith(b"["):
        yield (
            name,
            False,
            f"{error or 'not a list of events'}. Check {variable}, or try again later.",
        )
    else:
        yield name, True, f"{reached}, key accepted"
    date = email.utils.parsedate_tz(fields.get("Date", "")) if name == "api" else None
    if date is not None:
        ahead = time.time() - email.utils.mktime_tz(date)
        words = f"{abs(ahead):,.0f} s {'ahead of' if ahead > 0 else 'behind'} the service's"
        good = abs(ahead) <= _CLOCK_SECONDS
        yield (
            "clock",
            good,
            words if good else f"{words}. Correct this computer's: logs take their time from it.",
        )


def _cmd_sandbox(args: Any) -> int:
    _integer("--port", args.port, 0, 65535)
    with _serve_sandbox(Sandbox(), args.port) as server:
        base = f"http://127.0.0.1:{server.server_address[1]}/v1.0"
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
        yield Log(
            "poison.log" if number == 2600 else event, value, agent, meta=meta, occurred_at=at
        )


def _cmd_demo(args: Any) -> int:
    """Send logs through a real client into a sandbox that misbehaves, and tell what became of them."""
    sandbox, logs = Sandbox(), list(_demo_logs())
    sandbox.reject(lambda log: log["event"] == "poison.log")
    lost: list[str] = []
    config = Config(
        "chp_demo",
        DEFAULT_API_ENDPOINT,
        DEFAULT_SERVICER_ENDPOINT,
        log_level="CRITICAL",  # the account tells it all
        transport=sandbox,
        on_drop=lambda dropped, error: lost.extend(
            f"{log['agent']} {log['event']}: {error}" for log in dropped
        ),
    )
    vars(config)["disabled"] = False  # whatever CHIRROP_DISABLED says: nothing leaves this process
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
    stats, statuses = (
        client.stats(),
        [request["status"] or "no answer" for request in sandbox.requests],
    )
    failures = {
        str(status): statuses.count(status) for status in dict.fromkeys(statuses) if status != 200
    }
    balanced = (
        stats.accepted == len(logs) == stats.delivered + len(lost)
        and len(sandbox.logs) == stats.delivered
    )

    def show() -> None:
        _show_rollups(event, "hour", rollups)
        print()
        _show_analytics(event, answer)
        failed = ", ".join(f"{count} x {status}" for status, count in failures.items())
        print("\n" + _wrap(f"{len(statuses)} requests, of which failed: {failed}", sys.stdout))
        print(
            _wrap(
                f"accepted {stats.accepted:,} = delivered {stats.delivered:,} + dropped {len(lost)}",
                sys.stdout,
            )
        )
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
    return 0 if balanced else 1


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
            ("--meta", {"metavar": "JSON"}), ("--occurred-at", {"metavar": "TIME", "help": "ISO 8601; default: now"}),
            ("--log-id", {"metavar": "UUID", "help": "default: a random one"})]),
        (_cmd_events, "list the event definitions", []),
        (_cmd_rollups, "show an event's counts and sums over time", [
            event, agent, ("--period", {"choices": _PERIODS, "default": "hour"}), ("--limit", {"type": int})]),
        (_cmd_analytics, "compare an event's last hours or days with earlier ones", [
            event, agent, ("--period", {"choices": _WINDOWS, "default": "1h"}),
            ("--previous", {"choices": _PREVIOUS, "default": "previous_window"})]),
        (_cmd_alerts, "list alerts, or move one on", [
            ("action", {"choices": ("ack", "resolve", "archive"), "nargs": "?"}),
            ("id", {"metavar": "ID", "nargs": "?"}), ("--status", {"choices": _ALERT_STATUSES})]),
        (_cmd_api, "make any call of the control plane", [
            ("method", {"metavar": "METHOD"}), ("path", {"metavar": "PATH", "help": "e.g. /alerts?status=triggered"}),
            ("--data", {"metavar": "JSON", "help": "the body; - is standard input"})]),
        (_cmd_drain, "deliver what a SqliteSpool holds", [("spool", {"metavar": "SPOOL"})]),
        (_cmd_doctor, "find out why nothing arrives; sends no log", []),
        (_cmd_sandbox, "serve a sandbox on 127.0.0.1", [
            ("--port", {"type": int, "default": 8125, "help": "default: 8125; 0 takes a free one"})]),
    ]  # fmt: skip
    for run, about, arguments in table:
        command = commands.add_parser(run.__name__[5:], help=about, description=about)
        command.set_defaults(run=run)
        command.add_argument("--json", action="store_true", help="print the result as JSON")
        for name, options in arguments:
            command.add_argument(name, **options)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run one command; return its exit status: 0, 1 (failed or interrupted) or 2 (usage, configuration)."""
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
    except (ChirrOpError, OSError) as exc:
        _say(exc)
        status = 2 if isinstance(exc, ChirrOpValidationError) else 1
    except (
        TypeError,
        AttributeError,
        KeyError,
        ValueError,
    ) as exc:  # JSON of a shape that no ChirrOp sends
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
# associated documentation files (the "Software"), to deal in the Software without restriction, including
# without limitation the rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
# copies of the Software, and to permit persons to whom the Software is furnished to do so, subject to the
# following conditions:
#
# The above copyright notice and this permission notice shall be included in all copies or substantial
# portions of the Software.
#
# THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT
# LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO
# EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER
# IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR
# THE USE OR OTHER DEALINGS IN THE SOFTWARE.
