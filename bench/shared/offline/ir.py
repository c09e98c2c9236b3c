"""The Triton IR of a launch, by which two versions of the source are compared without compiling them to the end.

Names and line numbers are left out. What follows the IR is a function of it, of the target and of the launch's options, so launches
with equal digests have equal binaries but for the kernel's name.
"""

from __future__ import annotations

import contextlib
import hashlib


class _Made(Exception):
    """The IR is there; nothing more is to be compiled."""


def digest(launch, name: str, options: str) -> str:
    """Digest of the IR that `launch()` compiles a kernel called `name` to, after Triton's own passes, and of its options."""
    with _stopped_after_ir():
        try:
            launch()
        except _Made as made:
            text = str(made).replace(f"@{name}(", "@kernel(")
            return hashlib.sha256(f"{options}\n{text}".encode()).hexdigest()[:16]
    raise RuntimeError(f"{name}: nothing was compiled")


@contextlib.contextmanager
def _stopped_after_ir():
    from triton import knobs

    def stages_hook(backend=None, stages=None, *_):
        if stages is None:
            return "until the IR", "until the IR"  # part of the cache's key, so that nothing is found there
        passes = stages["ttir"]

        def stop(module, metadata):
            raise _Made(passes(module, metadata).str_nodebug())

        stages["ttir"] = stop

    before = knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = stages_hook
    try:
        yield
    finally:
        knobs.runtime.add_stages_inspection_hook = before
