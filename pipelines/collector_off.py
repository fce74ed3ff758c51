"""Importing this turns Python's garbage collector off, until `end`: for a process that is about to import torch.

What modules are made of is no garbage. Looking through it again and again was a sixth of a load's processor time (5.5 s
in place of 6.5 for smollm2), and once more 0.3 s in the midst of serving.
"""

import gc

gc.disable()


def end() -> None:
    """On again; what there is by now is never looked at."""
    gc.freeze()
    gc.enable()
