"""What `triptych serve` says when everything answers: for each kind of pipeline a command to try. Knows no server."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Sequence

from pipelines.pipeline import Pipeline

_SIDE = 64


def greeting(url: str, pipelines: Sequence[Pipeline], *, keyed: bool = False) -> str:
    names = ", ".join(pipeline.name for pipeline in pipelines)
    tried: list[Pipeline] = []
    for takes_images in (False, True):
        tried += [pipeline for pipeline in pipelines if pipeline.takes_images is takes_images][:1]
    commands = "\n".join(_command(url, pipeline, keyed) for pipeline in tried)
    return f"\nTriptych serves {names} on {url}. Try:\n\n{commands}"


def _command(url: str, pipeline: Pipeline, keyed: bool) -> str:
    content = _about_a_picture() if pipeline.takes_images else "What is the capital of France?"
    chat = json.dumps({"model": pipeline.name, "messages": [{"role": "user", "content": content}], "temperature": 0})
    key = ' -H "authorization: Bearer $KEY"' if keyed else ""
    return f"curl {url}/v1/chat/completions{key} -H 'content-type: application/json' -d '{chat}'\n"


def _about_a_picture() -> list[dict[str, object]]:
    uri = f"data:image/png;base64,{base64.b64encode(_red_square()).decode()}"
    return [
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "text", "text": "What color is the shape?"},
    ]


def _red_square() -> bytes:
    """A PNG, on white: small enough for a command line."""
    quarter = _SIDE // 4
    outside, across = b"\0" + b"\1" * _SIDE, b"\0" + b"\1" * quarter + b"\0" * 2 * quarter + b"\1" * quarter
    rows = outside * quarter + across * 2 * quarter + outside * quarter  # each begins with its filter, none
    header = struct.pack(">IIBBBBB", _SIDE, _SIDE, 8, 3, 0, 0, 0)
    palette = b"\xff\0\0" + b"\xff\xff\xff"
    chunks = ((b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
