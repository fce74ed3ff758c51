"""A request to a Triton model as the bytes that gRPC sends. Knows the protocol's message, and no channel.

The contents of the inputs are appended by hand, which protobuf's encoding allows: repeated fields of messages put one
after the other add up. As a message's own field a picture's tens of megabytes would be copied twice more, each time
with the event loop waiting.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

from tritonclient.grpc import service_pb2

_CONTENTS = service_pb2.ModelInferRequest.DESCRIPTOR.fields_by_name["raw_input_contents"].number
_TAG = bytes((_CONTENTS << 3 | 2,))  # of a field with a length


def request_bytes(
    model: str, id: str, parameters: Mapping[str, str | int], inputs: Mapping[str, str | bytes | list[int]]
) -> bytes:
    """Text, as it is or encoded, is a BYTES [1] tensor, and a list is INT64."""
    request = service_pb2.ModelInferRequest(model_name=model, id=id)
    for key, value in parameters.items():
        if isinstance(value, str):
            request.parameters[key].string_param = value
        else:
            request.parameters[key].int64_param = value
    contents: list[bytes] = []
    for name, given in inputs.items():
        if isinstance(given, list):
            request.inputs.add(name=name, datatype="INT64", shape=[len(given)])
            contents += _field(struct.pack(f"<{len(given)}q", *given))
        else:
            request.inputs.add(name=name, datatype="BYTES", shape=[1])
            data = given.encode() if isinstance(given, str) else given
            contents += _field(len(data).to_bytes(4, "little"), data)  # an element begins with its length
    return b"".join((request.SerializeToString(), *contents))


def _field(*parts: bytes) -> Iterator[bytes]:
    yield _TAG
    yield _varint(sum(map(len, parts)))
    yield from parts


def _varint(number: int) -> bytes:
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)
