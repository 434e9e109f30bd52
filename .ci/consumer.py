# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""A program that mypy and pyright check against the installed wheel: each ignore is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import chirrop
from chirrop import ChirrOp, ChirrOpError, Client, Config, Log, Sandbox, SqliteSpool, new_client

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
    print(data and data.get("current_value"), alerts, [rollup.get("count") for rollup in rollups])
    return event.get("title")


def one_liners(client: Client) -> bool:
    view: Client = client.bind("billing", meta={"region": "eu"}).bind(meta={"job": 7})
    view.try_log()  # type: ignore[call-arg]
    return view.try_log("job.done") and chirrop.try_log("job.cost", 1.5, meta={"currency": "EUR"})


async def service() -> bool:
    async with new_client() as client:
        delivered: bool = await client.aflush(2) and sum(client.stats().dropped.values()) == 0
        await client.aflush(timeout="2")  # type: ignore[arg-type]
        closed: bool = await client.aclose()
        return delivered and closed


def dropped(logs: list[dict[str, object]], error: ChirrOpError) -> None:
    print(len(logs), error.code, error.status_code + 1, error.retry_after)


config = Config(api_key="chp_x", spool=SqliteSpool("x"), transport=Sandbox(), on_exhausted="drop")
config.retries = "3"  # type: ignore[assignment]
view: Client = new_client(config).with_options(timeout=3)
other: Client = new_client(api_key="chp_x", retries=3, spool="x", on_exhausted="keep")
new_client(retrys=3)  # type: ignore[call-arg]
new_client(on_exhausted="discard")  # type: ignore[arg-type]
chirrop.initialize(retrys=3)  # type: ignore[call-arg]
chirrop.initialize(api_key="chp_x", on_drop=dropped)


@view.timer("t")
def timed(number: int) -> str:
    return str(number)


timed("1")  # type: ignore[arg-type]
try:
    ChirrOp.initialize(config)
except ChirrOpError as exc:
    print(exc)
letters = SqliteSpool("x", required=True).dead_letters(remove=True)
print(letters[0]["error"], letters[0]["log"])
status: int = chirrop.main(["demo"])
