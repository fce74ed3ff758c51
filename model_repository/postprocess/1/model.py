"""postprocess: token ids in, text out; a whole answer, or the new text of many streams at once."""

from pipelines import contracts, triton_io, wire
from pipelines.postprocess import Postprocess
from pipelines.sampling import Sampling


class TritonPythonModel:
    def initialize(self, args):
        self.stage = Postprocess.load(triton_io.open_stage(args, "postprocess").home)

    def execute(self, requests):
        return triton_io.respond(self.run, requests, "postprocess")

    def run(self, request):
        ids = request.ids(contracts.OUTPUT_IDS)
        if rows := request.text(contracts.ROWS):
            windows, per_token = wire.unpack_windows(ids, rows), request.parameters["per_token"]
            return {contracts.ROWS: wire.pack_texts(self.stage.text(window, per_token=per_token) for window in windows)}
        with request.span("postprocess"):
            stop = Sampling.from_json(request.text(contracts.SAMPLING) or "{}").stop
            text, reason = self.stage.answer(ids, stop, request.text(contracts.FINISH_REASON) or "")
            return {contracts.GENERATED_TEXT: text, contracts.FINISH_REASON: reason}

    def finalize(self):
        triton_io.close_stage()
