"""generate: token ids in, token ids out. Answers from its own threads: nothing here waits."""

from pipelines import collector_off, phases, triton_io  # first: before them is the spawn
from pipelines.operations import load, operate


class TritonPythonModel:
    def initialize(self, args):
        self.stage = load(triton_io.open_stage(args, "generate"), phases.Phases(collector_off.end))

    def execute(self, requests):
        triton_io.respond_later(self.run, requests, "generate")

    def run(self, request, answer):
        operate(self.stage, request, answer)

    def finalize(self):
        self.stage.close()
        triton_io.close_stage()
