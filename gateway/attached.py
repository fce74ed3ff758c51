"""`triptych serve --triton HOST:PORT …`: the gateway of Tritons that run already. Starts none, and ends none.

They have the pipelines loaded, under the names that `pipelines.contracts` gives their models. Knows no requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence

import grpc
import uvloop
from tritonclient.grpc import service_pb2, service_pb2_grpc

from gateway.app import create_app
from gateway.endpoints import Endpoints
from gateway.greeting import greeting
from gateway.installed import TritonError
from gateway.kept import Kept
from gateway.keys import Keys
from gateway.serve import listen, set_up
from gateway.settings import Settings
from pipelines.contracts import ENSEMBLE, MODELS, model_name
from pipelines.pipeline import Pipeline

log = logging.getLogger(__name__)

ANSWER_S = 5.0  # for a Triton to say what it has


def attach(settings: Settings, pipelines: Sequence[Pipeline]) -> int:
    """Until SIGINT or SIGTERM; answers the exit code."""
    keys = set_up(settings, pipelines)
    kept = Kept(settings)
    try:
        return uvloop.run(_gateway(settings, keys, pipelines, kept))
    finally:
        kept.close()


async def _gateway(settings: Settings, keys: Keys, pipelines: Sequence[Pipeline], kept: Kept) -> int:
    found = await asyncio.gather(*(_missing(target, pipelines) for target in settings.tritons))
    for warning in complaints(dict(zip(settings.tritons, found, strict=True)), pipelines):
        log.warning(warning)
    served = {pipeline.name: pipeline for pipeline in pipelines}
    endpoints = Endpoints(settings.tritons, served, accept_timeout_s=settings.accept_timeout_s)

    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        async with endpoints:
            yield

    app = create_app(endpoints, settings, lifespan, keys, kept.traces)

    async def greet() -> None:
        while not all(endpoints.ready(pipeline.name) for pipeline in pipelines):
            await asyncio.sleep(0.05)
        print(greeting(settings.url, pipelines, keyed=keys.required), flush=True)

    return await listen(app, settings, greet())


async def _missing(target: str, pipelines: Sequence[Pipeline]) -> Mapping[str, list[str]] | None:
    """By pipeline, its models that this Triton does not have ready; None if nobody answers there."""
    async with grpc.aio.insecure_channel(target) as channel:
        triton = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        missing: dict[str, list[str]] = {}
        try:
            await triton.ServerLive(service_pb2.ServerLiveRequest(), timeout=ANSWER_S)
            for pipeline in pipelines:
                models = [model_name(pipeline.name, model) for model in MODELS if model != ENSEMBLE]
                ready = {
                    model: (await triton.ModelReady(service_pb2.ModelReadyRequest(name=model), timeout=ANSWER_S)).ready
                    for model in models
                }
                missing[pipeline.name] = [model for model in models if not ready[model]]
        except grpc.aio.AioRpcError:
            return None
    return missing


def complaints(found: Mapping[str, Mapping[str, list[str]] | None], pipelines: Sequence[Pipeline]) -> list[str]:
    """What the endpoints lack, by what each says is missing; raises TritonError if that leaves a pipeline to nobody."""
    answering = {target: missing for target, missing in found.items() if missing is not None}
    if not answering:
        raise TritonError(
            f"no Triton answers at {', '.join(found)}: start one there, or name another with --triton HOST:PORT"
        )
    for pipeline in pipelines:
        if all(missing[pipeline.name] for missing in answering.values()):
            lacks = "; ".join(f"{target} lacks {', '.join(each[pipeline.name])}" for target, each in answering.items())
            raise TritonError(
                f"pipeline {pipeline.name!r} is loaded nowhere: {lacks}. Load it, or name others with --pipeline NAME"
            )
    told = [f"no Triton answers at {target} yet" for target in found if target not in answering]
    for target, missing in answering.items():
        told += [f"{target} does not have {', '.join(models)} yet" for models in missing.values() if models]
    return told
