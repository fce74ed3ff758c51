"""The gateway as a process of its own, over a backend that plays what the request's user text says; for faults.

Prints its port. Settings come from the environment. `forever` streams without end, `never` says nothing, `slowly` takes
a second, `plenty` is 20 MB at once, and anything else is answered at once.
"""

import asyncio
import socket

import uvicorn
import uvloop

from gateway import listener
from gateway.app import create_app
from gateway.backend import Delta
from gateway.keys import Keys
from gateway.settings import Settings
from pipelines.pipeline import Pipeline

TEXT = "x" * 1000


class PlayedStream:
    def __init__(self, text):
        self._text = text
        self._told = 0

    async def next(self):
        self._told += 1
        if self._told == 1:
            return Delta([], prompt_tokens=3)
        if "forever" in self._text:
            await asyncio.sleep(0)
            return Delta([TEXT])
        if "never" in self._text:
            await asyncio.sleep(3600)
        if "plenty" in self._text:
            return Delta([TEXT * 20_000], "stop", 3, 1)
        if "slowly" in self._text:
            await asyncio.sleep(1)
        return Delta(["Hello"], "stop", 3, 1)

    def cancel(self):
        pass


class Played:
    def pipelines(self):
        return {"echo": Pipeline(name="echo", source="path:none")}

    def ready(self, pipeline):
        return True

    async def submit(self, submission):
        return PlayedStream(str(submission.inputs["messages"]))  # JSON, whether text or bytes


async def main():
    settings = Settings.from_env()
    app = create_app(Played(), settings, keys=Keys.from_env())
    server = uvicorn.Server(listener.configure(app, settings, log_level="critical", lifespan="on"))
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listening:
        print(listening.getsockname()[1], flush=True)
        await server.serve([listening])


if __name__ == "__main__":
    uvloop.run(main())
