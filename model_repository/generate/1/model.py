"""generate: token ids in, token ids out. Answers from its own threads: nothing here waits."""

from pipelines import phases, triton_io  # phases first: before it is the spawn
from pipelines.operations import load, operate


class TritonPythonModel:
    def initialize(self, args):
        self.stage = load(triton_io.open_stage(args, "generate"), phases.Phases())

    def execute(self, requests):
        triton_io.respond_later(self.run, requests, "generate")

    def run(self, request, answer):
        operate(self.stage, request, answer)

    def finalize(self):
        self.stage.close()
        triton_io.close_stage()
