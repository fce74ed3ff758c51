"""What is told of a pipeline that changes its state: a line of the log, and metrics. Decides nothing."""

from __future__ import annotations

import logging

from gateway.lifecycle.states import State, View
from observability import metrics

log = logging.getLogger(__name__)


def tell(pipeline: str, before: State, view: View) -> None:
    level = logging.ERROR if view.state is State.FAILED else logging.INFO
    why = f": {view.reason}" if view.reason else ""
    extra = {"pipeline": pipeline}
    log.log(level, "%s is %s, was %s%s", pipeline, view.state.value, before.value, why, extra=extra)
    metrics.lifecycle_state(pipeline, before.value, view.state.value)
    if view.state is State.READY and before is State.LOADING:
        for phase, seconds in view.phases.items():
            metrics.LOAD_SECONDS.labels(pipeline, phase).observe(seconds)
