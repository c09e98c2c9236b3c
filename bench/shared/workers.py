"""Processes that work at the same time and end together: where the command is stopped, or a worker fails, none goes on."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import signal
from collections.abc import Iterator


def _leave_interrupts_to_the_command() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def pool(jobs: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """An executor of `jobs` fresh processes (at least one), which wait for nothing once the block is left by an exception."""
    workers = concurrent.futures.ProcessPoolExecutor(
        max(1, jobs), mp_context=multiprocessing.get_context("spawn"), initializer=_leave_interrupts_to_the_command
    )
    try:
        yield workers
        workers.shutdown()
    except BaseException:
        processes = list((workers._processes or {}).values())
        workers.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        raise
