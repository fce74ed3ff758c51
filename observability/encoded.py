"""A span in OTLP's protobuf: made once, and so kept, handed between processes and exported.

Written by hand, since every stage does it: with the SDK's span, queue and encoder to export one took ten times as long,
and the generated classes take 60 ms and 5 MB to import. Those read it, which only a gateway does that is asked for a
trace. The numbers of the fields are in opentelemetry-proto's trace.proto, common.proto and resource.proto.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from observability.spans import INT64, KINDS, SCOPE, STATUS_ERROR, Event, Link, SpanData

if TYPE_CHECKING:
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

_TRACE_ID = b"\x0a\x10"  # field 1, sixteen bytes: `encode` writes it first
_BOOLS = {False: b"\x10\x00", True: b"\x10\x01"}
_BYTES = [bytes((number,)) for number in range(128)]
_TEXTS = [b"\x0a" + number for number in _BYTES]  # what begins a text of so many bytes
_time = struct.Struct("<Q").pack
_double = struct.Struct("<d").pack
_KINDS = {name: b"\x30" + bytes((number,)) for number, name in enumerate(KINDS)}
_FLAGS = {sampled: b"\x85\x01" + struct.pack("<I", sampled) for sampled in (False, True)}


def encode(span: SpanData) -> bytes:
    """An OTLP span. Its service is its resource's, and so not in it."""
    try:
        return _span(span)
    except UnicodeEncodeError:  # half of a surrogate pair is in a text: no UTF-8 can hold it
        return _span(_storable(span))


def trace_id_of(encoded: bytes) -> str | None:
    """The trace id of what `encode` made, without reading the rest; None if that is not what this is."""
    return encoded[2:18].hex() if encoded.startswith(_TRACE_ID) and len(encoded) >= 18 else None


def decode(encoded: bytes, service: str) -> SpanData:
    """What `encode` was given. Raises google.protobuf's DecodeError."""
    from opentelemetry.proto.trace.v1.trace_pb2 import Span

    span = Span.FromString(encoded)
    return SpanData(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        name=span.name,
        kind=KINDS[span.kind],
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        service=service,
        sampled=bool(span.flags & 1),
        attributes=_read(span.attributes),
        events=[Event(event.name, event.time_unix_nano, _read(event.attributes)) for event in span.events],
        links=[Link(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
        error=span.status.message if span.status.code == STATUS_ERROR else None,
    )


def export_request(
    spans: Iterable[tuple[str, bytes]], resources: Mapping[str, Mapping[str, Any]], version: str
) -> bytes:
    """An ExportTraceServiceRequest of encoded spans with their services; `resources` are the services' attributes."""
    services: dict[str, list[bytes]] = {}
    for service, encoded in spans:
        services.setdefault(service, []).append(_field(b"\x12", encoded))
    scope = _field(b"\x0a", _field(b"\x0a", SCOPE.encode()) + _field(b"\x12", version.encode()))
    request = []
    for service, fields in services.items():
        resource: list[bytes] = []
        _attributes(resource, b"\x0a", resources[service])
        of_scope = _field(b"\x12", scope + b"".join(fields))
        request.append(_field(b"\x0a", _field(b"\x0a", b"".join(resource)) + of_scope))
    return b"".join(request)


def _span(span: SpanData) -> bytes:
    name = span.name.encode()
    parts = [
        _TRACE_ID,
        bytes.fromhex(span.trace_id),
        b"\x12\x08",
        bytes.fromhex(span.span_id),
        b"\x2a",
        _varint(len(name)),
        name,
        _KINDS[span.kind],
        b"\x39",
        _time(span.start_ns),
        b"\x41",
        _time(span.end_ns),
        _FLAGS[span.sampled],
    ]
    if span.parent_id:
        parts += (b"\x22\x08", bytes.fromhex(span.parent_id))
    if span.attributes:
        _attributes(parts, b"\x4a", span.attributes)
    for event in span.events:
        inner = [b"\x09", _time(event.at_ns), _field(b"\x12", event.name.encode())]
        _attributes(inner, b"\x1a", event.attributes)
        parts.append(_field(b"\x5a", b"".join(inner)))
    for link in span.links:
        ids = _TRACE_ID + bytes.fromhex(link.trace_id) + b"\x12\x08" + bytes.fromhex(link.span_id)
        parts.append(_field(b"\x6a", ids))
    if span.error is not None:
        message = _field(b"\x12", span.error.encode()) if span.error else b""
        parts.append(_field(b"\x7a", message + b"\x18" + _varint(STATUS_ERROR)))
    return b"".join(parts)


def _attributes(parts: list[bytes], tag: bytes, attributes: Mapping[str, Any]) -> None:
    for key, value in attributes.items():
        head, told = _key(key), _value(value)
        size, whole = len(told), len(head) + len(told) + 1
        if whole < 128:  # the rule
            parts += (tag, _BYTES[whole], head, _BYTES[size], told)
        else:
            parts.append(_field(tag, head + _varint(size) + told))


@functools.lru_cache(maxsize=1024)  # they are few, but for metadata's
def _key(key: str) -> bytes:
    """A KeyValue up to its value's size."""
    return _field(b"\x0a", key.encode()) + b"\x12"


def _value(value: Any) -> bytes:
    """An AnyValue. By the exact type, where it can be: isinstance, of Sequence above all, took half of the time."""
    kind = type(value)
    if kind is str:
        text = value.encode()
        return _TEXTS[len(text)] + text if len(text) < 128 else _field(b"\x0a", text)
    if kind is bool:
        return _BOOLS[value]
    if kind is int:
        if -INT64 <= value < INT64:
            return b"\x18" + _varint(value & (2 * INT64 - 1))
        return _value(str(value))
    if kind is float:
        return b"\x21" + _double(value)
    if kind is list or kind is tuple:
        return _field(b"\x2a", b"".join([_item(item) for item in value]))
    if isinstance(value, str):
        return _field(b"\x0a", value.encode())
    if isinstance(value, (int, float)):
        return _value(int(value) if isinstance(value, int) else float(value))
    return _value(list(value) if isinstance(value, Sequence) else str(value))


def _item(value: Any) -> bytes:
    """Of an ArrayValue. Histograms are counts and bounds."""
    kind = type(value)
    if kind is int and 0 <= value < 128:
        return b"\x0a\x02\x18%b" % _BYTES[value]
    if kind is float:
        return b"\x0a\x09\x21" + _double(value)
    return _field(b"\x0a", _value(value))


def _field(tag: bytes, content: bytes) -> bytes:
    return tag + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    if number < 128:
        return _BYTES[number]
    parts = bytearray()
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    parts.append(number)
    return bytes(parts)


def _storable(value: Any) -> Any:
    """With `?` for what no UTF-8 can hold."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, SpanData):
        told = {name: _storable(getattr(value, name)) for name in ("name", "attributes", "events", "error")}
        return replace(value, **told)
    if isinstance(value, Event):
        return Event(_storable(value.name), value.at_ns, _storable(value.attributes))
    if isinstance(value, Mapping):
        return {_storable(key): _storable(item) for key, item in value.items()}
    return [_storable(item) for item in value] if isinstance(value, (list, tuple)) else value


def _read(attributes: Iterable[KeyValue]) -> dict[str, Any]:
    return {attribute.key: _read_value(attribute.value) for attribute in attributes}


def _read_value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_read_value(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None
