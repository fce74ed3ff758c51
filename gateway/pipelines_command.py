"""`triptych pipelines`: the catalog as a table, and a running gateway's pipelines told to come, to stay or to go.

Knows the gateway by its admin API alone.
"""

from __future__ import annotations

import argparse
import sys
import time
import urllib.parse
from collections.abc import Mapping
from typing import Any

from gateway.remote import RemoteError, RemoteGateway
from pipelines.pipeline import Pipeline, load_catalog
from pipelines.sources import is_pulled, size_on_disk

# What a pipeline can be told, and what it is when that is done; unpinned it is as it was.
_COMES_TO = {"load": "ready", "unload": "cold", "park": "parked", "pin": "ready", "unpin": ""}
_UNDER_WAY = ("loading", "draining")
_LOOK_S = 0.2
_BEGINS_WITHIN_S = 1.0


def add_pipelines_arguments(parser: argparse.ArgumentParser) -> None:
    told = ", ".join(_COMES_TO)
    parser.add_argument("operation", nargs="?", choices=[*_COMES_TO], metavar="OPERATION", help=f"one of {told}")
    parser.add_argument("name", nargs="?", metavar="NAME", help="the pipeline that is told so; this waits until it is")
    parser.add_argument("--url", help="a gateway that may be running (http://127.0.0.1:8080)")


def pipelines_command(options: argparse.Namespace, local: str, *, key: str = "", certificate: str = "") -> int:
    """`key` is the admin's, `certificate` a file with the gateway's own. Raises RemoteError."""
    gateway = RemoteGateway(options.url or local, key, certificate)
    if not options.operation:
        return _list(gateway)
    if not options.name:
        raise RemoteError(f"say which pipeline shall {options.operation}: triptych pipelines {options.operation} NAME")
    return _operate(gateway, options.operation, options.name)


def _list(gateway: RemoteGateway) -> int:
    """Without a gateway, what is on this machine."""
    running: dict[str, Any] = {}
    broken: dict[str, str] = {}
    try:
        told = gateway.get("/admin/pipelines")
        running, broken = {shown["pipeline"]: shown for shown in told["data"]}, told["broken_files"]
    except RemoteError as error:
        print(f"no states: {error}", file=sys.stderr)
    except (KeyError, TypeError):
        print(f"no states: {gateway.url} is no gateway, by what it answers: name one with --url", file=sys.stderr)
    catalog = load_catalog()
    rows: list[tuple[str, ...]] = [("NAME", "STATE", "MEMORY", "ENGINE", "SIZE", "LICENCE", "SOURCE")]
    rows += [_row(pipeline, running.get(pipeline.name, {})) for pipeline in catalog.values()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for name, shown in running.items():
        if shown["reason"]:
            again = f", and is tried again in {shown['retry_in_s']:.0f} s" if shown["retry_in_s"] is not None else ""
            print(f"{name} {shown['state']}{again}: {shown['reason']}")
    for file, why in broken.items():
        print(f"{file} is left as it was: {why}")
    for pipeline in catalog.values():
        way, _, why = _way(pipeline).partition(": ")
        if why:
            print(f"{pipeline.name} runs the {way} way, one request after another in each step: {why}")
    return 0


def _row(pipeline: Pipeline, shown: Mapping[str, Any]) -> tuple[str, ...]:
    pulled = is_pulled(pipeline)
    state = shown.get("state", "pulled") if pulled else "not pulled"
    held = sum(shown["memory_held"].values()) if shown else 0
    size = f"{size_on_disk(pipeline) / 1e6:.0f} MB" if pulled else f"{pipeline.size_mb} MB to pull"
    engine = ", ".join(filter(None, (pipeline.engine, _way(pipeline).partition(": ")[0])))
    memory = f"{held / 1e6:.0f} MB" if held else "-"
    return pipeline.name, state, memory, engine, size, pipeline.licence, pipeline.source


def _way(pipeline: Pipeline) -> str:
    """How the engine runs the model: `fast`, or `compatible: ` and why. Empty until it was loaded once."""
    return pipeline.way_file.read_text() if pipeline.way_file.exists() else ""


def _operate(gateway: RemoteGateway, operation: str, name: str) -> int:
    """Until it is so, or nothing is done about it any more."""
    path = f"/admin/pipelines/{urllib.parse.quote(name, safe='')}"
    shown = gateway.post(f"{path}/{operation}")
    wanted, began, told = _COMES_TO[operation], time.monotonic(), ""
    while wanted and shown["state"] != wanted:
        if shown["state"] != told:
            print(f"{name} is {shown['state']}", flush=True)
            told = shown["state"]
        under_way = shown["doing"] or shown["running"] or shown["state"] in _UNDER_WAY
        if not under_way and (shown["reason"] or time.monotonic() - began > _BEGINS_WITHIN_S):
            reason = shown["reason"] or "nothing is done about it now, as when it has no memory to come to"
            raise RemoteError(f"{name} is not {wanted}, but {shown['state']}: {reason}")
        time.sleep(_LOOK_S)
        shown = gateway.get(path)
    print(f"{name} is {shown['state']}{' and pinned' if shown['pinned'] else ''}")
    return 0
