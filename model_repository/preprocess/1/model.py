"""preprocess: messages, a prompt or raw text in; token ids and the resolved sampling out."""

from observability import tracing
from pipelines import contracts, triton_io
from pipelines.engine.limits import read_limits
from pipelines.preprocess import Preprocess


class TritonPythonModel:
    def initialize(self, args):
        pipeline = triton_io.open_stage(args, "preprocess")
        self.stage = Preprocess.load(pipeline.home, context=pipeline.context or read_limits(pipeline.home).context)

    def execute(self, requests):
        return triton_io.respond(self.run, requests, "preprocess")

    def run(self, request):
        request.refuse_images()
        inputs = {tensor.name: request.text(tensor) for tensor in contracts.TEXTS}
        with request.span("preprocess") as span:
            prepared = self.stage.run(
                **inputs,
                text_ids=request.ids(contracts.TEXT_IDS) or None,
                sampling=request.text(contracts.SAMPLING),
                stage=lambda name: tracing.start(name, parent=span),
            )
        return {contracts.INPUT_IDS: prepared.input_ids, contracts.SAMPLING: prepared.sampling.to_json()}

    def finalize(self):
        triton_io.close_stage()
