"""A direct gRPC request to an orchestrator, for tests."""

from __future__ import annotations

import queue
from typing import Any

from tests.product import Product, bytes_input


class OrchestratorCall:
    """One direct request to the orchestrator: its deltas, as they come."""

    def __init__(self, product: Product, model: str, inputs: dict[str, str], **parameters: Any) -> None:
        self.responses: queue.Queue[Any] = queue.Queue()
        self.client = product.client()
        self.client.start_stream(lambda result, error: self.responses.put((result, error)))
        tensors = [bytes_input(*item) for item in inputs.items()]
        self.client.async_stream_infer(model, tensors, parameters=parameters, enable_empty_final_response=True)

    def deltas(self) -> list[tuple[str, str]]:
        found = []
        while True:
            result, error = self.responses.get(timeout=120)
            if error:
                raise error
            text = result.as_numpy("generated_text")
            if text is not None:
                found.append((text[0].decode(), result.as_numpy("finish_reason")[0].decode()))
            if result.get_response().parameters["triton_final_response"].bool_param:
                return found

    def close(self) -> None:
        self.client.stop_stream(cancel_requests=True)
        self.client.close()
