"""A peer whose engine is a script: `python -m tests.scripted_worker`. What it answers is in its `load`."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from bench import worker

script: dict = {}


def load(**arguments):
    script.update(arguments)
    print("a library's greeting, which is no answer")
    if "child" in script:
        script["child"] = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid
    return {"pid": os.getpid(), "child": script.get("child")}


def decode(prompts, tokens):
    """Streams of as many tokens, each `step` seconds after the one before."""
    fate = script.get("fate")
    if fate == "raises":
        raise ValueError("no such tensor")
    if fate == "ends":
        print("terminate called after throwing", file=sys.stderr, flush=True)
        os._exit(3)
    if fate == "hangs":
        time.sleep(60)
    step = script["step"]
    apart = 2 * tokens * step if fate == "serial" else 0.0
    times = [[number * apart + place * step for place in range(tokens)] for number in range(len(prompts))]
    return {"at_once": fate != "serial", "times": times}


def prefill(prompt):
    return script["step"] * len(prompt)


if __name__ == "__main__":
    worker.serve({"load": load, "decode": decode, "prefill": prefill})
