# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""A typed program that uses the installed wheel. Checked by mypy and pyright, never run.

A line with "type: ignore" is a mistake that must be seen: an unused ignore is an error here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import chirrop
from chirrop import (
    ChirrOp,
    ChirrOpError,
    Client,
    Config,
    Log,
    Sandbox,
    SqliteSpool,
    Stats,
    new_client,
)

if TYPE_CHECKING:
    from chirrop import Alert, Analytics, Event, Rollup


def use(client: Client) -> str | None:
    client.log(Log("job.done", 1, agent="a", meta={"k": [1]}))
    event: Event | None = client.find_event("job.done", agent="a")
    if event is None:
        return None
    rollups: list[Rollup] = client.get_event_logs(event["event_id"], period="hour")
    analytics: Analytics = client.get_event_analytics(
        event["event_id"], "window", "1h", "previous_1d"
    )
    alerts: list[Alert] = client.list_alerts("triggered")
    client.create_policy({"event_id": event["event_id"], "aggregate": "p95_est"})
    client.get_event_logs("1", period="week")  # type: ignore[arg-type]
    client.no_such_call()  # type: ignore[attr-defined]
    print(event["event"].upper(), event["nope"])  # type: ignore[typeddict-item]
    data = analytics.get("data")
    print(
        data.get("current_value") if data else None, len(alerts), [r.get("count") for r in rollups]
    )
    return event.get("title")


def account(stats: Stats) -> int:
    return stats.delivered + sum(stats.dropped.values())


config = Config(api_key="chp_x", spool=SqliteSpool("x"), transport=Sandbox(), on_exhausted="drop")
config.retries = "3"  # type: ignore[assignment]
view: Client = new_client(config).with_options(timeout=3)


@view.timer("t")
def timed(number: int) -> str:
    return str(number)


timed("1")  # type: ignore[arg-type]
try:
    ChirrOp.initialize(config)
except ChirrOpError as exc:
    print(exc.status_code + 1, exc.retry_after)
status: int = chirrop.main(["demo"])
