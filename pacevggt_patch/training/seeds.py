"""Seeds of random generators."""

from __future__ import annotations


def mixed_seed(*numbers: int) -> int:
    """One seed of several numbers, such as a run's seed, a step and a process: different ones do not meet."""
    state = 0x9E3779B97F4A7C15
    for number in numbers:
        state = ((state ^ (number + 0x632BE59BD9B4E019)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 29)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 32
    return state % 2**63
