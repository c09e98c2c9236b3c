"""How the machine runs a launch: the schedule, what is checked, which memory model holds. MODES names the ones in use."""

from __future__ import annotations

import contextlib
import dataclasses


@dataclasses.dataclass
class Settings:
    """Per launch. Probabilities are per mille."""

    # The schedule: warps take turns in a seeded random order.
    seed: int = 1  # advances by one per launch
    quantum: int = 40  # mean instructions that a warp runs before another one may go on
    run_ahead: int = (
        0  # above 0, warps have priorities that change with this probability per turn: one runs far ahead of the others
    )
    resident: int = 6  # programs at a time; a cooperative launch has all of them
    shuffle: bool = False  # programs start in a random order
    # What is checked.
    bounds: bool = True  # every global access lies inside the storage of a live tensor
    races: bool = False  # happens-before races between warps, in shared and in global memory
    uninitialised: bool = False  # count reads of shared memory that nobody wrote
    # The memory model.
    weak: bool = False  # store buffers and incoherent first-level caches, one of each per program
    flush: int = 150  # weak: probability per turn that one buffered word becomes visible to the other programs
    evict: int = 20  # weak: probability per load that the cached line is fetched anew
    copies: str = "either"  # when an asynchronous copy lands: "at_once", "at_the_wait" or "either"
    # What is counted, and limits.
    sectors: bool = True  # count memory sectors (32 bytes) of every access
    bank_conflicts: bool = False
    stall: int = 200_000_000  # warp instructions without any change of memory that count as a livelock
    max_reports: int = 40
    detail: bool = False  # also report writes of the value that is already there, and lanes of one warp that meet in memory


MODES = {
    "plain": {},
    "fine": dict(quantum=2, copies="at_the_wait", shuffle=True),
    "one": dict(resident=1, quantum=15),  # one program at a time
    "ahead": dict(run_ahead=1, quantum=400, copies="at_the_wait"),  # one warp far ahead of the others
    "race": dict(races=True, uninitialised=True, quantum=7, copies="at_the_wait"),
    "race_ahead": dict(races=True, run_ahead=1, quantum=400, copies="at_the_wait"),
    "weak": dict(weak=True, quantum=5, copies="at_once"),
    "lazy": dict(weak=True, quantum=60, flush=2, evict=0, resident=2, shuffle=True),  # almost nothing becomes visible by itself
    "weak_ahead": dict(weak=True, run_ahead=1, quantum=60, flush=20, evict=0),
}

# What `--compiled=NAME` replays every launch in.
GROUPS = {
    "plain": (),
    "schedules": ("fine", "one", "ahead"),
    "race": ("race", "race_ahead"),
    "weak": ("weak", "lazy", "weak_ahead"),
}
GROUPS["all"] = GROUPS["schedules"] + GROUPS["race"] + GROUPS["weak"]

settings = Settings()


@contextlib.contextmanager
def using(**changes):
    """Other settings for a while."""
    before = dataclasses.asdict(settings)
    for name, value in changes.items():
        setattr(settings, name, value)
    try:
        yield settings
    finally:
        seed = settings.seed
        for name, value in before.items():
            setattr(settings, name, value)
        if "seed" not in changes:
            settings.seed = seed
