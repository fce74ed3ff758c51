"""What a pipeline that takes pictures has beside one that does not: a reader of them, and the model's own processor.

Knows no messages and no Triton: a rendered prompt and its pictures' sources in, what generate needs of them out.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pipelines.engine.query import check_sampling
from pipelines.images.features import Features
from pipelines.images.fetch import Fetching
from pipelines.images.gate import Gate
from pipelines.images.processor import Processor, check_shape
from pipelines.images.raw import RawProcessor, question
from pipelines.images.reading import Reader, Source, Timing
from pipelines.pipeline import Pipeline
from pipelines.sampling import Sampling


class Seen(NamedTuple):
    input_ids: list[int]
    features: Features | None
    sizes: list[tuple[int, int]]


@dataclass(frozen=True)
class Vision:
    """Every method may be called from any thread."""

    reader: Reader
    processor: Processor | RawProcessor
    max_images: int
    # Of a model that is asked in text: in place of a chat template, and what of a sampling it can be told.
    question: Callable[[Sequence[Mapping[str, object]], object], str] | None = None
    check_sampling: Callable[[Sampling], None] | None = None
    # More at once than there are cores only take turns; fetching, and waiting for memory, is not of this.
    cores: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(os.cpu_count() or 1))

    @classmethod
    def load(cls, pipeline: Pipeline) -> Vision:
        """The gate's memory is the pipeline's, and the cores are the machine's: each of its processes has a share."""
        gate = Gate((pipeline.image_memory_mb << 20) // pipeline.preprocess_instances)
        cores = threading.Semaphore(max(1, (os.cpu_count() or 1) // pipeline.preprocess_instances))
        asked = pipeline.engine == "query"
        processor = RawProcessor.load(pipeline.home) if asked else Processor.load(pipeline.home)
        reader = Reader(
            max_pixels=pipeline.max_pixels,
            gate=gate,
            fetching=Fetching.from_env(),
            least=processor.least_side,
            check_shape=None if asked else check_shape,
        )
        if asked:
            return cls(reader, processor, pipeline.max_images, question, check_sampling, cores)
        return cls(reader, processor, pipeline.max_images, cores=cores)

    def read(self, rendered: str, sources: Sequence[Source], stage: Timing, *, param: str) -> Seen:
        """`param` is what errors name that are of no one picture."""
        if not sources:
            with stage("tokenize"):
                return Seen(*self.processor.run(rendered, [], param=param), [])
        with self.reader.admitted(sources, stage) as admitted, self.cores:
            pictures = admitted.decoded(stage)
            with stage("tokenize") as span:
                input_ids, features = self.processor.run(rendered, pictures, param=param)
                if features:
                    span.set({"triptych.features.bytes": sum(array.nbytes for array in features.arrays.values())})
        return Seen(input_ids, features, admitted.sizes)
