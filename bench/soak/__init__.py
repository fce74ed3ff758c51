"""Minutes of faults under mixed load at the whole product: `python -m bench.soak --minutes 10 --seed 1`.

`plan` draws the faults and `asks` the requests, both from the seed; `judge` says what became of each request and
whether a fault excuses it: these three are pure. `faults` does what the plan says, `watch` sees the pipelines come
back, `__main__` starts the product and brings all of it together.
"""
