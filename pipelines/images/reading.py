"""The pictures of a request, from their urls to pixels: fetched side by side, looked at, let in by their size, decoded.

Nothing is decoded before all of a request's pictures have room at once (`gate`), and they keep it until the caller is
done with them. What one step does is its own module's: this one knows their order, and times them. Knows no Triton, no
messages and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from observability import tracing
from pipelines.images.decode import Picture, open_picture
from pipelines.images.encoded import check_size, encoded, is_remote
from pipelines.images.fetch import Fetching
from pipelines.images.gate import Gate

if TYPE_CHECKING:
    from PIL.Image import Image

Timing = Callable[[str], tracing.Span]


class CheckShape(Protocol):
    def __call__(self, size: tuple[int, int], *, param: str) -> None:
        """Raises StageError for a picture of a shape that the model cannot take."""


_FETCHERS = 32  # urls under way at once, over all requests
_LOW_SIDE = 512  # OpenAI, detail: "low" is "a low-resolution 512px x 512px version of the image"


@dataclass(frozen=True)
class Source:
    """One picture as it came: a url (which may hold the picture), or its encoded bytes. `param` is its name in errors.

    `low`: less detail of it will do.
    """

    param: str
    given: str | bytes
    low: bool = False

    @property
    def host(self) -> str | None:
        """Of a url that is fetched: all of it that a trace may hold."""
        if isinstance(self.given, bytes) or not is_remote(self.given):
            return None
        try:
            return urlsplit(self.given).hostname
        except ValueError:
            return None


@dataclass(frozen=True)
class Admitted:
    """Pictures that have room to be decoded in. `least`: what suffices of a side, where less can be decoded."""

    sources: Sequence[Source]
    pictures: Sequence[Picture]
    least: int | None

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [picture.size for picture in self.pictures]

    def decoded(self, stage: Timing) -> list[Image]:
        with stage("image.decode") as span:
            span.set(
                {
                    "triptych.image.count": len(self.pictures),
                    "triptych.image.formats": [picture.header.format for picture in self.pictures],
                    "triptych.image.widths": [width for width, _ in self.sizes],
                    "triptych.image.heights": [height for _, height in self.sizes],
                }
            )
            images = [self._decoded(*item) for item in zip(self.sources, self.pictures, strict=True)]
            span.set({"triptych.image.decoded_bytes": sum(3 * image.width * image.height for image in images)})
        return images

    def _decoded(self, source: Source, picture: Picture) -> Image:
        if not source.low:
            return picture.decode(self.least)
        image = picture.decode(_LOW_SIDE)
        image.thumbnail((_LOW_SIDE, _LOW_SIDE))
        return image

    @property
    def bytes_needed(self) -> int:
        return sum(
            picture.bytes_for(_LOW_SIDE if source.low else self.least)
            for source, picture in zip(self.sources, self.pictures, strict=True)
        )


class Reader:
    """Every method may be called from any thread."""

    def __init__(
        self,
        *,
        max_pixels: int,
        gate: Gate,
        fetching: Fetching,
        least: int | None = None,
        check_shape: CheckShape | None = None,
    ) -> None:
        self.gate = gate
        self._max_pixels = max_pixels
        self._fetching = fetching
        self._least = least
        self._check_shape = check_shape
        self._fetchers = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="fetch")

    @contextmanager
    def admitted(self, sources: Sequence[Source], stage: Timing) -> Iterator[Admitted]:
        """Fetched and let in; their room is given back at the end of the block."""
        pictures = [
            open_picture(data, param=source.param, max_pixels=self._max_pixels)
            for source, data in zip(sources, self._fetched(sources, stage), strict=True)
        ]
        if self._check_shape:
            for picture in pictures:
                self._check_shape(picture.size, param=picture.param)
        admitted = Admitted(sources, pictures, self._least)
        with self.gate.of(admitted.bytes_needed):
            yield admitted

    def _fetched(self, sources: Sequence[Source], stage: Timing) -> list[bytes]:
        """All of them, or the error of the first in order that cannot be had."""
        with stage("image.fetch") as span:
            hosts = sorted({host for source in sources if (host := source.host)})
            span.set({"triptych.image.count": len(sources), "triptych.image.hosts": hosts or None})
            # What came with the request is read where it is.
            read_all = self._fetchers.map if hosts and len(sources) > 1 else map
            files = list(read_all(self._encoded, sources))
            span.set({"triptych.image.bytes": sum(map(len, files))})
        return files

    def _encoded(self, source: Source) -> bytes:
        if isinstance(source.given, str):
            return encoded(source.given, param=source.param, fetching=self._fetching)
        check_size(len(source.given), param=source.param, max_bytes=self._fetching.max_bytes)
        return source.given
