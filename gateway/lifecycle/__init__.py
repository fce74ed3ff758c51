"""Which pipelines are in memory, and whose turn it is: the pure core, driven by events and answering with actions.

Knows no clock, no I/O, no asyncio, no Triton and no HTTP: `scheduler.Scheduler.step` is the whole interface.
"""
