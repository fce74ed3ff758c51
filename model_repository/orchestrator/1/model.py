"""orchestrator: the three stages chained for streams: lanes of gateways, and direct gRPC requests."""

from pipelines import triton_io


class TritonPythonModel:
    def initialize(self, args):
        self.orchestrator = triton_io.orchestrate(triton_io.open_stage(args, "orchestrator"))

    def execute(self, requests):
        triton_io.respond_streaming(self.orchestrator.take, requests, "orchestrator")

    def finalize(self):
        self.orchestrator.close()
        triton_io.close_stage()
