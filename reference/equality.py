"""Draw-by-draw equality with the reference, as docs/randomness.md defines it.

    equal, or equal to the reference with one or two near ties of the same request taken the other way

Where every margin exceeds the resolution of fp32, the results must be the same. Where a kernel differs, a near tie of the same
request, taken the other way, must explain it. Near ties may not be much more frequent than their expected number. Source:
docs/randomness.md.
"""

import itertools

from .decisions import Decisions


def assert_equal_or_tied(run, actual, exempt=True):
    """run(decisions) -> {request: outcome} of the reference; actual: {request: outcome} of the kernel.

    exempt=False: no near tie may excuse a difference (inputs on a dyadic grid).
    """
    decisions = Decisions()
    want = run(decisions)
    near = decisions.near()
    assert len(near) <= 3 + 10 * decisions.expected, f"{len(near)} near ties among {decisions.total} decisions"
    assert actual.keys() == want.keys()
    for request, outcome in actual.items():
        if outcome == want[request]:
            continue
        assert exempt, f"request {request}: {outcome} != {want[request]} (no exemption)"
        assert _explained(run, request, outcome, near), (
            f"request {request}: {outcome} != {want[request]}; margins "
            f"{[v for k, v in decisions.margins.items() if k[0] == request]}"
        )


def _explained(run, request, outcome, near):
    """Whether flipping up to two near ties of the request, or of what follows from flipping one, gives the outcome."""
    own = [where for where in near if where[0] == request]
    tried = set()
    queue = [frozenset([where]) for where in own]
    while queue and len(tried) < 16:
        flips = queue.pop(0)
        if flips in tried:
            continue
        tried.add(flips)
        decisions = Decisions(flips)
        if run(decisions)[request] == outcome:
            return True
        if len(flips) < 2:
            later = [where for where in decisions.near() if where[0] == request]
            queue += [flips | {where} for where in itertools.chain(own, later) if where not in flips]
    return False
