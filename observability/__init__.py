"""Traces, metrics and logs, for the gateway and for the stages inside Triton."""
