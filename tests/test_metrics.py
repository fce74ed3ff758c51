"""What is scraped parses, and says what was put in."""

from __future__ import annotations

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from observability import metrics


def _samples(accept: str = "") -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    body, content_type = metrics.render(accept)
    parse = parse_openmetrics if "openmetrics" in content_type else parse_text
    samples = (sample for family in parse(body.decode()) for sample in family.samples)
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in samples}


def _labels(**labels: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(labels.items()))


def test_requests_are_counted_by_pipeline_operation_and_status():
    metrics.REQUEST_SECONDS.labels("m", "chat", "200").observe(0.03)
    metrics.FIRST_TOKEN_SECONDS.labels("m").observe(60)
    metrics.TIME_PER_OUTPUT_TOKEN_SECONDS.labels("m").observe(0.002)
    metrics.TOKENS.labels("m", "input").inc(7)
    metrics.TOKENS.labels("m", "output").inc(9)
    metrics.ABORTED.labels("m", "disconnect").inc()
    metrics.LANE_MESSAGES.labels("m").inc(2)
    metrics.PIPELINE_READY.labels("m").set(1)
    metrics.IN_FLIGHT.labels("m").inc()
    metrics.QUEUED.labels("m").set(4)
    for accept in ("", "application/openmetrics-text; version=1.0.0"):
        got = _samples(accept)
        request = {"pipeline": "m", "operation": "chat", "status": "200"}
        name = "gen_ai_server_request_duration_seconds"
        assert got[f"{name}_bucket", _labels(**request, le="0.04")] == 1
        assert got[f"{name}_bucket", _labels(**request, le="0.02")] == 0
        first = "gen_ai_server_time_to_first_token_seconds_bucket"
        assert got[first, _labels(pipeline="m", le="80.0")] == 1
        assert got[first, _labels(pipeline="m", le="40.0")] == 0
        assert got["triptych_tokens_total", _labels(pipeline="m", type="output")] == 9
        assert got["triptych_requests_aborted_total", _labels(pipeline="m", reason="disconnect")] == 1
        assert got["triptych_pipeline_ready", _labels(pipeline="m")] == 1
        assert got["triptych_requests_queued", _labels(pipeline="m")] == 4


def test_an_engines_own_counters_are_passed_on_as_they_are():
    metrics.engine_counters("m", {"running": 2, "waiting": 0, "steps": 100, "output_tokens": 300, "other": 1})
    got = _samples()
    assert got["triptych_engine_running", _labels(pipeline="m")] == 2
    assert got["triptych_engine_steps_total", _labels(pipeline="m")] == 100
    assert ("triptych_engine_finished_total", _labels(pipeline="m")) not in got
    metrics.engine_counters("m", {"steps": 3})  # it restarted: a reset, which Prometheus knows
    assert _samples()["triptych_engine_steps_total", _labels(pipeline="m")] == 3
    metrics.forget_engine("m")
    assert ("triptych_engine_steps_total", _labels(pipeline="m")) not in _samples()


def test_the_process_and_its_spans_are_there():
    got = _samples()
    assert got["process_resident_memory_bytes", ()] > 0
    assert got["triptych_spans_total", _labels(outcome="failed")] == 0


def test_every_metric_has_help():
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain")
    helps = {line.split(" ", 3)[2]: line.split(" ", 3)[3:] for line in body.decode().splitlines() if "# HELP" in line}
    assert helps
    assert all(text and text[0].strip() for text in helps.values())
