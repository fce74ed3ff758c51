"""The command `triptych`: serve, pull, pipelines, key, trace, record, replay, doctor.

Errors a user can mend are one sentence and exit code 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Sequence

from gateway import keys
from gateway.pipelines_command import add_pipelines_arguments, pipelines_command
from gateway.ratelimit import MAX_LIMIT, Limits
from gateway.remote import RemoteError, RemoteGateway, write
from gateway.settings import Settings, SettingsError
from gateway.trace_command import add_trace_arguments, show_trace
from pipelines.pipeline import DEFAULTS, CatalogError, get_pipeline


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (CatalogError, SettingsError) as error:
        return _say(error)
    except KeyboardInterrupt:
        return 130


def _serve(options: argparse.Namespace) -> int:
    from gateway.attached import attach
    from gateway.catalog import Catalog
    from gateway.installed import TritonError
    from gateway.serve import serve

    named = options.pipeline or ()
    for name in named:
        get_pipeline(name)  # one that is not there is told
    settings = _settings(options)
    try:
        if settings.tritons:
            return attach(settings, [get_pipeline(name) for name in named or DEFAULTS])
        return serve(settings, Catalog(only=named), () if options.cold else named or DEFAULTS)
    except TritonError as error:
        return _say(error)


def _pull(options: argparse.Namespace) -> int:
    get_pipeline(options.name)
    return subprocess.run([sys.executable, "-m", "pipelines.sources", options.name]).returncode


def _pipelines(options: argparse.Namespace) -> int:
    settings = _settings(options)
    try:
        return pipelines_command(
            options, settings.url, key=os.environ.get(keys.ADMIN_KEY, ""), certificate=settings.tls_cert
        )
    except RemoteError as error:
        return _say(error)


def _key(options: argparse.Namespace) -> int:
    """The key goes to stdout's first line and into no file: what is kept is its digest, the second."""
    limits = Limits(options.rpm, options.concurrency)
    if options.stdin:
        print(keys.line_of(options.name, keys.given_key(sys.stdin.readline()), limits))
        return 0
    key = keys.new_key()
    line = keys.line_of(options.name, key, limits)
    print("the key, for its owner, shown this once; the line below is for the file", file=sys.stderr)
    print(key, line, sep="\n")
    return 0


def _trace(options: argparse.Namespace) -> int:
    settings = _settings(options)
    try:
        return show_trace(options, settings.url, key=os.environ.get(keys.ADMIN_KEY, ""), certificate=settings.tls_cert)
    except RemoteError as error:
        return _say(error)


def _record(options: argparse.Namespace) -> int:
    settings = _settings(options)
    try:
        gateway = RemoteGateway(options.url or settings.url, os.environ.get(keys.ADMIN_KEY, ""), settings.tls_cert)
        recorded = gateway.fetch(f"/admin/traces/{urllib.parse.quote(options.trace, safe='')}/recording")
        file = options.file or f"{re.sub(r'[^A-Za-z0-9._-]+', '-', options.trace)}.recording"
        write(file, recorded)
    except RemoteError as error:
        return _say(error)
    if file != "-":
        print(f"{file}: {len(recorded)} bytes; try triptych replay {file} --stage generate")
    return 0


def _replay(options: argparse.Namespace) -> int:
    """In a process of its own: generate's engine imports torch."""
    command = [sys.executable, "-m", "pipelines.replay", options.file, "--stage", options.stage]
    return subprocess.run(command).returncode


def _doctor(options: argparse.Namespace) -> int:
    from gateway.doctor import doctor

    return doctor(_settings(options))


def _settings(options: argparse.Namespace) -> Settings:
    given = {key: getattr(options, key, None) for key in ("host", "port")}
    port = getattr(options, "triton_grpc_port", None)
    given["triton_grpc"] = f"127.0.0.1:{port}" if port else None
    given["triton"] = ",".join(getattr(options, "triton", None) or ()) or None
    return dataclasses.replace(Settings.from_env(), **{key: value for key, value in given.items() if value is not None})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="triptych", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="start Triton and the gateway")
    serve.add_argument("--host", help="address of the gateway (127.0.0.1)")
    serve.add_argument("--port", type=int, help="port of the gateway (8080)")
    serve.add_argument(
        "--triton-grpc-port", type=int, help="Triton's gRPC port (8001); HTTP is the one below, metrics the one above"
    )
    serve.add_argument(
        "--triton",
        action="append",
        metavar="HOST:PORT",
        help="the gRPC address of a Triton that runs already, repeatable; none is started then",
    )
    serve.add_argument(
        "--pipeline",
        action="append",
        metavar="NAME",
        help=f"serve this one alone, repeatable (the whole catalog, with {' and '.join(DEFAULTS)} loaded)",
    )
    serve.add_argument("--cold", action="store_true", help="load nothing before it is asked for")
    serve.set_defaults(run=_serve)

    pull = commands.add_parser("pull", help="fetch a pipeline's weights")
    pull.add_argument("name", metavar="NAME")
    pull.set_defaults(run=_pull)

    pipelines = commands.add_parser("pipelines", help="list the catalog, or have a pipeline loaded, parked, unloaded")
    add_pipelines_arguments(pipelines)
    pipelines.set_defaults(run=_pipelines)

    key = commands.add_parser("key", help="make an API key, and the line of TRIPTYCH_API_KEYS_FILE that knows it")
    key.add_argument("name", metavar="NAME", help="whose it is")
    key.add_argument("--rpm", type=_limit, default=0, metavar="N", help="requests a minute")
    key.add_argument("--concurrency", type=_limit, default=0, metavar="N", help="requests at a time")
    key.add_argument("--stdin", action="store_true", help="hash a key that is read from stdin")
    key.set_defaults(run=_key)

    trace = commands.add_parser("trace", help="draw a request's trace: where its time went")
    add_trace_arguments(trace)
    trace.set_defaults(run=_trace)

    record = commands.add_parser("record", help="write what a request gave each stage and got from it to a file")
    record.add_argument("--trace", required=True, metavar="ID", help="a request id (x-request-id) or a trace id")
    record.add_argument("file", nargs="?", metavar="FILE", help="where to (ID.recording); - is stdout")
    record.add_argument("--url", help="the gateway (http://127.0.0.1:8080), started with TRIPTYCH_RECORD")
    record.set_defaults(run=_record)

    replay = commands.add_parser("replay", help="run one stage of such a file again, alone, and compare")
    replay.add_argument("file", metavar="FILE")
    replay.add_argument("--stage", choices=("preprocess", "generate", "postprocess"), default="generate")
    replay.set_defaults(run=_replay)

    doctor = commands.add_parser("doctor", help="check what serving needs")
    doctor.add_argument("--port", type=int, help="the gateway's port to check (8080)")
    doctor.add_argument("--triton-grpc-port", type=int, help="Triton's gRPC port to check (8001)")
    doctor.set_defaults(run=_doctor)
    return parser


def _limit(text: str) -> int:
    if not (text.isdecimal() and 0 < int(text) <= MAX_LIMIT):
        raise argparse.ArgumentTypeError(f"must be 1 to {MAX_LIMIT}")
    return int(text)


def _say(error: Exception) -> int:
    print(f"triptych: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
