# pyright: strict, reportUnnecessaryTypeIgnoreComment=true
"""A typed program that uses the installed wheel. Checked by mypy and pyright, never run.

A line with "type: ignore" is a mistake that must be seen: an unused ignore is an error here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import chirrop
from chirrop import Client, Log

if TYPE_CHECKING:
    from chirrop import Event, Page


def use(client: Client) -> str | None:
    client.log(Log("job.done", 1, agent="a"))
    event: Event = client.get_event("1")
    page: Page = client.list_events("info")
    client.list_events("nope")  # type: ignore[arg-type]
    client.no_such_call()  # type: ignore[attr-defined]
    print(event["event"].upper(), event["nope"])  # type: ignore[typeddict-item]
    return page.get("cursor")


@Client().timed
def timed(number: int) -> str:
    return str(number)


timed("1")  # type: ignore[arg-type]
status: int = chirrop.main(["demo"])
