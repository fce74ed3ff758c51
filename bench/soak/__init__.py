"""Minutes of faults under mixed load at the whole product: `python -m bench.soak --minutes 10 --seed 1`.

`plan` draws the faults and `asks` the requests, both from the seed; `judge` says what became of each request and
whether a fault excuses it: these three are pure. `faults` does what the plan says, `run` asks meanwhile and sees the
pipelines come back, `held` counts what is left behind, `__main__` starts the product and tells what was found.
"""
