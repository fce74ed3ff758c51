"""postprocess: token ids in, text out; a whole answer, or the new text of many streams at once."""

from pipelines import contracts, triton_io, wire
from pipelines.chat import Text
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
            per_token = request.parameters["per_token"]
            return {contracts.ROWS: wire.pack_texts(self.text(w, per_token) for w in wire.unpack_windows(ids, rows))}
        with request.span("postprocess"):
            stop = Sampling.from_json(request.text(contracts.SAMPLING) or "{}").stop
            return {contracts.GENERATED_TEXT: self.stage.full(ids, stop)}

    def text(self, window, per_token):
        first = len(window.ids) - window.new if per_token and window.new else None
        delta = self.stage.delta(window.ids, window.sent, stop=window.stop, final=window.final, per_token_from=first)
        texts = [delta.text] if delta.text else []
        return Text(texts if first is None else delta.texts, delta.drop, delta.sent)

    def finalize(self):
        triton_io.close_stage()
