"""The bytes of a request are what protobuf reads as the message meant."""

from __future__ import annotations

import pytest
from tritonclient.grpc import service_pb2

from gateway.infer_request import request_bytes


def read(data: bytes) -> service_pb2.ModelInferRequest:
    return service_pb2.ModelInferRequest.FromString(data)


def test_inputs_and_parameters_arrive() -> None:
    inputs = {"text": "né", "messages": b"[]", "text_ids": [5, -1], "sampling": ""}
    request = read(request_bytes("orchestrator", "a", {"id": "x", "timeout_ms": 7}, inputs))
    assert (request.model_name, request.id) == ("orchestrator", "a")
    assert request.parameters["id"].string_param == "x"
    assert request.parameters["timeout_ms"].int64_param == 7
    assert [(given.name, given.datatype, list(given.shape)) for given in request.inputs] == [
        ("text", "BYTES", [1]),
        ("messages", "BYTES", [1]),
        ("text_ids", "INT64", [2]),
        ("sampling", "BYTES", [1]),
    ]
    assert list(request.raw_input_contents) == [
        b"\3\0\0\0n\xc3\xa9",
        b"\2\0\0\0[]",
        (5).to_bytes(8, "little") + b"\xff" * 8,
        b"\0\0\0\0",
    ]


@pytest.mark.parametrize("size", [0, 123, 124, 127, 128, 16379, 16380, 16384, 2**21 - 4, 2**21, 3 * 10**7])
def test_lengths_of_every_width(size: int) -> None:
    request = read(request_bytes("m", "", {}, {"messages": b"x" * size}))
    assert request.raw_input_contents[0] == size.to_bytes(4, "little") + b"x" * size


def test_without_inputs_there_are_none() -> None:
    request = read(request_bytes("m", "", {"operation": "lane"}, {}))
    assert not request.inputs
    assert not request.raw_input_contents
