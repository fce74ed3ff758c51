"""preprocess: messages, a prompt or raw text in; token ids, features of pictures and the resolved sampling out."""

from observability import tracing
from pipelines import contracts, triton_io
from pipelines.preprocess import Preprocess


class TritonPythonModel:
    def initialize(self, args):
        self.stage = Preprocess.of(triton_io.open_stage(args, "preprocess"))
        self.pool = triton_io.pool_for_pictures() if self.stage.vision else None

    def execute(self, requests):
        return triton_io.respond_aside(self.run, requests, "preprocess", self.pool)

    def run(self, request):
        inputs = {tensor.name: request.text(tensor) for tensor in contracts.TEXTS}
        image = request.data(contracts.IMAGE)
        with request.span("preprocess") as span:
            prepared = self.stage.run(
                **inputs,
                text_ids=request.ids(contracts.TEXT_IDS) or None,
                sampling=request.text(contracts.SAMPLING),
                image=None if image is None else image.tobytes(),
                stage=lambda name: tracing.start(name, parent=span),
            )
        return self.stage.outputs(prepared)

    def finalize(self):
        triton_io.close_stage()
