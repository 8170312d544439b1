"""The generators of random, numpy and torch, set by a key for a while."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from cae2pipe.runtime.keyed import keyed_seed


@contextmanager
def seeded(*key: str | int) -> Iterator[None]:
    """Seeds the generators of random, numpy and torch from a key; afterwards those of the CPU continue as before.

    Libraries' transforms, Mixup and drop path draw from these, and would otherwise depend on all draws before.
    A device's generator is seeded but not restored: reading its state would wait for the device.
    """
    seed = keyed_seed(*key)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
