"""The engine's bench: arithmetic of rounds, workers that answer, fail, hang and end, and one small run of it all."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import engine, llama_env, load, of_bare, peers, prompts, rounds
from bench.client import Result
from bench.contest import Contest
from bench.peers import Peer, PeerError
from bench.rounds import Measure

DECODE = Measure("decode_2", 2, 4, 9)
PREFILL = Measure("prefill_8", 1, 8, 0)
NUMBERS = prompts.of_numbers(100)


def scripted(**script: object) -> Iterator[Peer]:
    peer = Peer("scripted", "tests.scripted_worker", threads=1)
    try:
        peer.load(**script)
        yield peer
    finally:
        peer.close()


@pytest.fixture
def start():
    """Starts scripted peers that are closed afterwards."""
    opened = []

    def starting(**script: object) -> Peer:
        opened.append(scripted(**script))
        return next(opened[-1])

    yield starting
    for generator in opened:
        generator.close()


# The arithmetic


@given(
    streams=st.integers(1, 20),
    tokens=st.integers(2, 60),
    step=st.sampled_from([0.125, 0.25, 1.0, 3.0]),
    late=st.lists(st.integers(0, 3), min_size=20, max_size=20),
)
def test_streams_in_step_have_the_steps_rate_whenever_they_began(streams, tokens, step, late):
    tokens += 12
    times = [[(late[number] + place) * step for place in range(tokens)] for number in range(streams)]
    assert rounds.together(times) == pytest.approx(streams / step)
    assert rounds.together(times, [2.0] * streams) == pytest.approx(2 * streams / step)


def test_a_prompt_between_others_tokens_is_not_in_the_rate():
    early = [0.0, *(5.0 + place for place in range(10))]  # its second token waited for the other's prompt
    late = [5.0 + place for place in range(10)]
    assert rounds.together([early, late]) == pytest.approx(2.0)


def test_streams_that_ran_one_after_the_other_are_not_added_up():
    times = [[float(place + 10 * number) for place in range(10)] for number in range(2)]
    with pytest.raises(ValueError, match="did not run together"):
        rounds.together(times)
    assert rounds.one_by_one(times) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="fewer than two"):
        rounds.together([[1.0, 2.0], [1.0]])


def test_ratios_are_medians_of_the_rounds_and_not_of_the_rates():
    ours = {"decode_1": [10.0, 20.0, 90.0], "prefill": [3.0, 3.0, 3.0]}
    theirs = {"decode_1": [10.0, 5.0, 30.0]}
    assert rounds.ratios(ours, theirs) == {"decode_1": 3.0}  # of 1, 4 and 3
    assert rounds.spreads(ours, theirs) == {"decode_1": (1.0, 4.0)}
    assert rounds.medians(ours) == {"decode_1": 20.0, "prefill": 3.0}


def test_prompts_differ_have_their_length_and_come_again_by_name(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(sorted(set(prompts.text("all", 5000).lower().split())))}
    known = Tokenizer(models.WordLevel({**words, "?": len(words)}, unk_token="?"))
    known.pre_tokenizer = pre_tokenizers.Whitespace()
    known.save(str(tmp_path / "tokenizer.json"))
    for made in (prompts.of_words(tmp_path / "tokenizer.json"), NUMBERS):
        assert made("a", 40) == made("a", 40) != made("b", 40)
        assert len(made("a", 40)) == 40


# Workers


def test_a_worker_is_measured_and_what_its_libraries_print_is_no_answer(start):
    peer = start(step=0.25)
    assert peer.measure(DECODE, NUMBERS, "x") == pytest.approx(2 / 0.25)
    assert peer.measure(PREFILL, NUMBERS, "x") == pytest.approx(1 / 0.25)


def test_a_worker_that_runs_streams_one_by_one_is_rated_so(start):
    assert start(step=0.25, fate="serial").measure(DECODE, NUMBERS, "x") == pytest.approx(1 / 0.25)


@pytest.mark.parametrize(
    ("fate", "said"),
    [("raises", "ValueError: no such tensor"), ("ends", "ended in 'decode': terminate called after throwing")],
)
def test_a_worker_that_fails_says_why(start, fate, said):
    with pytest.raises(PeerError, match=said):
        start(step=1, fate=fate).measure(DECODE, NUMBERS, "x")


def test_a_worker_that_hangs_is_ended(start, monkeypatch):
    peer = start(step=1, fate="hangs")
    monkeypatch.setattr(peers, "CALL_S", 0.3)
    with pytest.raises(PeerError, match="took too long in 'decode'"):
        peer.measure(DECODE, NUMBERS, "x")


def test_a_worker_that_cannot_start_says_why():
    peer = Peer("nobody", "no_such_module", threads=1)
    try:
        with pytest.raises(PeerError, match="No module named no_such_module"):
            peer.load()
    finally:
        peer.close()


def test_a_closed_peer_takes_its_children_along(start):
    peer = start(step=1, child=True)
    assert all(map(alive, peer.info.values()))
    peer.close()
    gone(*peer.info.values())


def test_a_worker_dies_with_a_bench_that_is_killed():
    code = (
        "from bench.peers import Peer\nimport time\n"
        "peer = Peer('x', 'tests.scripted_worker', threads=1)\npeer.load(step=1)\n"
        "print(peer.info['pid'], flush=True)\ntime.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=peers.ROOT) as bench:
        pid = int(bench.stdout.readline())
        assert alive(pid)
        bench.send_signal(signal.SIGKILL)
        bench.wait()
    gone(pid)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(*pids: int) -> None:
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(alive, pids))


# The contest


def contest(**scripts: dict) -> Contest:
    made = Contest((DECODE, PREFILL), NUMBERS)
    for name, script in scripts.items():
        made.add(name, lambda: Peer("scripted", "tests.scripted_worker", threads=1), **script)
    return made


def test_a_failing_peer_is_left_out_with_its_reason_and_the_others_go_on(capsys):
    made = contest(ours={"step": 0.25}, llama_cpp={"step": 0.5}, transformers_cb={"step": 1, "fate": "raises"})
    try:
        made.warm([])
        made.run(3)
        found = engine.result(made, "ours", ["llama", "cb"])
    finally:
        made.close()
    assert found["vs_llama_cpp"] == {"decode_2": 2.0, "prefill_8": 2.0}
    assert found["spread"]["vs_llama_cpp"] == {"decode_2": (2.0, 2.0), "prefill_8": (2.0, 2.0)}
    assert found["vs_transformers_cb"] is None
    assert found["failed"] == {"transformers_cb": "scripted: ValueError: no such tensor"}
    assert found["tokens_per_s"] == {
        "ours": {"decode_2": 8.0, "prefill_8": 4.0},
        "llama_cpp": {"decode_2": 4.0, "prefill_8": 2.0},
    }
    assert "ours / llama_cpp" in capsys.readouterr().out


def test_of_two_ways_to_run_a_peer_the_faster_stays():
    made = contest(slow={"step": 1}, fast={"step": 0.5}, broken={"step": 0.1, "fate": "raises"})
    try:
        made.keep_faster("peer", ["slow", "fast", "broken"])
        assert list(made.peers) == ["peer"]
        assert made.peers["peer"].measure(PREFILL, NUMBERS, "x") == 2
    finally:
        made.close()


def test_no_bench_without_our_own_engine():
    made = contest(ours={"step": 1, "fate": "raises"})
    try:
        made.warm([])
        made.run(1)
        with pytest.raises(PeerError, match="no such tensor"):
            engine.result(made, "ours", [])
    finally:
        made.close()


def test_a_build_of_llama_cpp_that_fails_is_a_reason_and_one_that_works_is_kept(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "llama-cpp"
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho no compiler; exit 1\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    with pytest.raises(PeerError, match="could not be built, exit code 1: see") as failed:
        llama_env.python(folder)
    assert Path(str(failed.value).rpartition("see ")[2]).read_text() == "no compiler\n"
    assert "allow ten minutes" in capsys.readouterr().err
    (folder / "bin").mkdir(parents=True)
    built = folder / "bin" / "python"
    built.write_text("#!/bin/sh\n")
    built.chmod(0o755)
    assert llama_env.python(folder) == str(built)
    assert not capsys.readouterr().err


# The whole of it


def test_random_weights_of_a_tiny_shape_end_to_end(capsys, monkeypatch):
    monkeypatch.setattr(engine, "ON_SHAPE", (Measure("decode_1", 1, 40, 129), Measure("decode_4", 4, 40, 129)))
    arguments = ["--device", "cpu", "--shape", "tiny", "--rounds", "1", "--threads", "1", "--tokens", "17"]
    assert engine.main(arguments) == 0
    *_, last = capsys.readouterr().out.strip().splitlines()
    found = json.loads(last)
    assert (found["shape"], found["device"], found["rounds"], found["failed"]) == ("tiny", "cpu", 1, {})
    assert found["tokens_per_s"]["triptych bfloat16"].keys() == {"decode_1", "decode_4"}
    assert found["vs_transformers_cb"].keys() == {"decode_1", "decode_4"}
    assert 0 < found["roofline_share_1"] < 1
    assert found["copy_bytes_per_s"] > 0


def test_transformers_as_a_peer_gives_a_time_for_every_token():
    from bench.transformers_worker import Handlers

    for continuous in (False, True):
        peer = Handlers()
        peer.load(threads=1, streams=3, continuous=continuous, shape="tiny")
        found = peer.decode([NUMBERS(name, 5) for name in "abc"], 6)
        assert [len(times) for times in found["times"]] == [6, 6, 6]
        assert all(early < late for times in found["times"] for early, late in itertools.pairwise(times))
        assert peer.prefill(NUMBERS("d", 50)) > 0


def test_a_steps_bytes_are_the_weights_it_reads_and_its_keys_and_values():
    from bench import shapes

    assert shapes.SHAPES == engine.SHAPES
    assert {shapes.config(shape).model_type for shape in shapes.SHAPES} == {"llama", "qwen3"}
    with pytest.raises(ValueError, match="no shape 'huge'"):
        shapes.config("huge")
    model = shapes.random_model("tiny", "cpu")
    layer = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 128 + 2 * 64
    weights = 2 * layer + 64 + 512 * 64  # the head is read, the embedding only looked up
    assert shapes.step_bytes(model, 0) == 2 * weights
    assert shapes.step_bytes(model, 10) - shapes.step_bytes(model, 0) == 10 * 2 * 2 * 32 * 2
    model.lm_head.weight = model.model.embed_tokens.weight  # tied: read once, as the head
    assert shapes.step_bytes(model, 0) == 2 * weights


def test_a_machine_with_a_card_needs_torch_and_transformers_alone():
    code = (
        "import sys\nimport bench.engine, bench.engine_worker, bench.transformers_worker, bench.shapes\n"
        "print([name for name in sys.argv[1:] if name in sys.modules])"
    )
    names = ["gguf", "tritonclient", "tomli", "llguidance", "orjson", "starlette", "pipelines.pipeline"]
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, cwd=peers.ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peers", "vllm"], "--peers takes llama, transformers, cb, not vllm"),
        (["--device", "cuda"], "--device cuda needs --shape"),
        (["--tokens", "2"], "--tokens must be 3 or more"),
        (["--rounds", "0"], "--rounds and --threads must be 1 or more"),
    ],
)
def test_arguments_that_do_not_go_are_refused(capsys, arguments, said):
    with pytest.raises(SystemExit):
        engine.main(arguments)
    assert said in capsys.readouterr().err


# What a server keeps


def result(start: float, gaps: list[float], tokens: int) -> Result:
    last = start + sum(gaps)
    return Result(first=start, last=last, tokens=tokens, events=len(gaps) + 1, gaps=array("d", gaps))


def test_a_servers_rate_is_of_the_time_in_which_all_its_streams_decode():
    even = [result(float(late), [1.0] * 20, 21) for late in range(3)]
    assert of_bare.throughput(even) == pytest.approx(3.0)
    in_twos = [result(0.0, [2.0] * 20, 42) for _ in range(3)]  # two tokens an arrival
    assert of_bare.throughput(in_twos) == pytest.approx(3.0)


def test_a_server_that_fails_or_queues_its_streams_has_no_rate():
    with pytest.raises(PeerError, match=r"failed 1 of 2 requests: {'http 503': 1}"):
        of_bare.throughput([result(0.0, [1.0] * 5, 6), Result(error="http 503")])
    with pytest.raises(PeerError, match="the server's streams: the streams did not run together"):
        of_bare.throughput([result(late, [1.0] * 5, 6) for late in (0.0, 10.0)])


@pytest.mark.parametrize("extra", [["--requests", "5"], ["--temperature", "0"], ["--completions"]])
def test_load_beside_the_bare_engine_refuses_what_it_would_ignore(capsys, extra):
    with pytest.raises(SystemExit):
        load.main(["--model", "m", "--of-bare-engine", "1", *extra])
    assert "with --of-bare-engine" in capsys.readouterr().err


def test_the_bench_itself_is_not_a_descendant_left_behind(start):
    assert os.getpgid(start(step=1).info["pid"]) != os.getpgid(0)  # ended as a whole, and never with the bench
