"""The engine against its peers, on the same weights and threads, in interleaved rounds.

    python -m bench.engine [--pipeline NAME] [--rounds 5] [--ours auto,float32] [--peers llama,transformers,cb]
    python -m bench.engine --device cuda --shape llama-8b

The first: llama.cpp (built once, into .bench/), transformers.generate and transformers' continuous batching, with a
pipeline's weights on this CPU. The second needs only torch and transformers: random weights, one stream against the
roof that the card's memory sets, many against continuous batching. The last line is JSON.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from bench import llama_env, processes, prompts, rounds
from bench.contest import Contest
from bench.peers import Peer, PeerError
from bench.report import json_line, median, table
from bench.rounds import Measure

PEERS = {"llama": "llama_cpp", "transformers": "transformers", "cb": "transformers_cb"}
# A stream's context is 40 to 88 tokens, on every peer.
ON_PIPELINE = (Measure("decode_1", 1, 40, 49), Measure("decode_16", 16, 40, 49), Measure("prefill_1000", 1, 1000, 0))
ON_SHAPE = (Measure("decode_1", 1, 40, 129), Measure("decode_64", 64, 40, 129), Measure("decode_256", 256, 40, 129))
CB_TOKENS = 13  # on a CPU it makes some five a second
SHAPES = ("llama-8b", "qwen3-0.6b", "tiny")  # bench.shapes has them, and needs torch


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description="The engine against its peers.")
    parser.add_argument("--pipeline", help="whose weights (default: the catalog's default)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, help="decoded of each stream (default: 49, of a shape 129)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--ours", default="auto", help="dtypes; the ratios are the first one's (default: %(default)s)")
    parser.add_argument("--peers", default=",".join(PEERS), help="of %(default)s; an empty string for none")
    parser.add_argument("--device", default="cpu", help="cuda and cuda:N need a --shape (default: %(default)s)")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead of a pipeline's")
    given = parser.parse_args(arguments)
    given.peers = [name for name in given.peers.split(",") if name]
    if unknown := set(given.peers) - PEERS.keys():
        parser.error(f"--peers takes {', '.join(PEERS)}, not {', '.join(sorted(unknown))}")
    if given.rounds < 1 or given.threads < 1:
        parser.error("--rounds and --threads must be 1 or more")
    if given.tokens is not None and given.tokens < 3:
        parser.error("--tokens must be 3 or more: the first has no rate")
    if given.device != "cpu" and not given.shape:
        parser.error(f"--device {given.device} needs --shape, one of {', '.join(SHAPES)}")
    with processes.terminated_as_exit():
        try:
            found = on_shape(given) if given.shape else on_pipeline(given)
        except PeerError as error:
            parser.exit(1, f"bench.engine: {error}\n")
    print(json_line(found))
    return 0


def on_pipeline(given: argparse.Namespace) -> dict[str, Any]:
    # Here, because a machine with a card needs neither a catalog nor what the fetching of weights imports.
    from pipelines.pipeline import DEFAULT, get_pipeline
    from pipelines.sources import pull

    name = given.pipeline or DEFAULT
    home = pull(get_pipeline(name))
    contest = Contest(_measures(ON_PIPELINE, given), prompts.of_words(home / "tokenizer.json"))
    streams = max(measure.streams for measure in contest.measures)
    common = {"home": str(home), "threads": given.threads, "streams": streams}
    ours = [f"triptych {dtype}" for dtype in given.ours.split(",")]
    try:
        for label in ours:
            contest.add(label, _peer(label, given, "engine_worker"), dtype=label.split()[1], **common)
        if "llama" in given.peers:
            gguf = ",".join(str(file) for file in home.glob("*.gguf"))
            contest.add("llama_cpp", lambda: _llama(given, gguf), gguf=gguf, threads=given.threads)
        kinds = [f"transformers {dtype}" for dtype in ("float32", "bfloat16")]
        for label in kinds if "transformers" in given.peers else []:
            start = _peer(label, given, "transformers_worker")
            contest.add(label, start, continuous=False, dtype=label.split()[1], **common)
        if "cb" in given.peers:
            start = _peer("transformers_cb", given, "transformers_worker", tokens=CB_TOKENS)
            contest.add("transformers_cb", start, continuous=True, dtype="bfloat16", **common)
        contest.warm(ours)
        _present(contest, ours[0])
        if "transformers" in given.peers:
            contest.keep_faster("transformers", kinds)
        contest.run(given.rounds)
    finally:
        contest.close()
    return {"pipeline": name, **_machine(given), **result(contest, ours[0], given.peers)}


def on_shape(given: argparse.Namespace) -> dict[str, Any]:
    """Random weights, so no llama.cpp; and no generate, which has no bearing on a card's many streams."""
    contest = Contest(_measures(ON_SHAPE, given), prompts.of_numbers(500))  # ids that every shape has
    one = contest.measures[0]
    streams = max(measure.streams for measure in contest.measures)
    common = {"shape": given.shape, "device": given.device, "threads": given.threads, "streams": streams}
    name = "triptych bfloat16"
    try:
        contest.add(name, _peer(name, given, "engine_worker"), context=one.prompt + one.tokens // 2, **common)
        if "cb" in given.peers:
            start = _peer("transformers_cb", given, "transformers_worker")
            contest.add("transformers_cb", start, continuous=True, dtype="bfloat16", **common)
        contest.warm([name])
        _present(contest, name)
        contest.run(given.rounds)
        ours = _present(contest, name)
        bandwidth = ours.call("copy_bandwidth", 60, device=given.device)
    finally:
        contest.close()
    steps = median(contest.series[name][one.name])
    return {
        "shape": given.shape,
        **_machine(given),
        "copy_bytes_per_s": bandwidth,
        "step_bytes": ours.info["step_bytes"],
        "roofline_share_1": steps * ours.info["step_bytes"] / bandwidth,
        **result(contest, name, [peer for peer in given.peers if peer == "cb"]),
    }


def result(contest: Contest, ours: str, peers: Sequence[str]) -> dict[str, Any]:
    """Prints the table. The JSON's part about the rounds: a peer that is not there is a null, `failed` says why."""
    series = contest.series
    _present(contest, ours)
    heads = [measure.name for measure in contest.measures]
    rows = [[name, *rounds.medians(series[name]).values()] for name in series]
    compared: dict[str, Any] = {}
    spread: dict[str, Any] = {}
    for name in (PEERS[peer] for peer in peers):
        compared[f"vs_{name}"] = None
        if name in series:
            compared[f"vs_{name}"] = rounds.ratios(series[ours], series[name])
            spread[f"vs_{name}"] = rounds.spreads(series[ours], series[name])
            rows.append([f"{ours} / {name}", *(f"{ratio:.2f}" for ratio in compared[f"vs_{name}"].values())])
    print(table(["tokens a second", *heads], rows))
    return {
        **compared,
        "ours": ours,
        "rounds": len(series[ours][heads[0]]),
        "measures": [asdict(measure) for measure in contest.measures],
        "tokens_per_s": {name: rounds.medians(series[name]) for name in series},
        "spread": spread,
        "peers": {name: peer.info for name, peer in contest.peers.items()},
        "failed": contest.failed,
    }


def _measures(measures: Sequence[Measure], given: argparse.Namespace) -> list[Measure]:
    return [replace(each, tokens=given.tokens if given.tokens and each.tokens else each.tokens) for each in measures]


def _peer(label: str, given: argparse.Namespace, module: str, tokens: int | None = None) -> partial[Peer]:
    return partial(Peer, label, f"bench.{module}", threads=given.threads, tokens=tokens)


def _llama(given: argparse.Namespace, gguf: str) -> Peer:
    if not gguf:
        raise PeerError("the pipeline's weights are no GGUF file, and llama.cpp reads nothing else")
    return Peer("llama_cpp", "bench.llama_worker", python=llama_env.python(), threads=given.threads)


def _present(contest: Contest, ours: str) -> Peer:
    if ours not in contest.peers:
        raise PeerError(contest.failed[ours])
    return contest.peers[ours]


def _machine(given: argparse.Namespace) -> dict[str, Any]:
    model = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    return {
        "date": date.today().isoformat(),
        "device": _card(given.device),
        "cpu": model[1] if model else platform.machine(),
        "threads": given.threads,
        "load_average": os.getloadavg()[0],  # at the end: more than the threads, and others disturbed the numbers
    }


def _card(device: str) -> str:
    if device == "cpu":
        return device
    import torch

    return str(torch.cuda.get_device_name(device))


if __name__ == "__main__":
    raise SystemExit(main())
