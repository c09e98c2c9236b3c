"""Run a module's command line with its kernels compiled and executed by the machine.

    python tests/machine/run.py dspark_kernels.testing dspark_kernels.testing.ours:token
    python tests/machine/run.py --modes race,weak examples.round

Prints what the machine did when the module has finished.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], usage="%(prog)s [options] MODULE [ARGUMENTS]")
    parser.add_argument("--arch", default="sm_80", help="compile for and launch as on sm_80 (default), sm_89 or sm_90")
    parser.add_argument("--modes", default="", help="run every launch again in these modes: schedules, race, weak, all")
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()

    sys.path.insert(0, str(ROOT))
    from tests import machine

    if (reason := machine.available()) is not None:
        parser.error(reason)
    machine.install(options.arch)
    modes = [mode for name in filter(None, options.modes.split(",")) for mode in machine.GROUPS.get(name, (name,))]
    machine.replay_modes[:] = modes
    sys.argv = [options.module, *options.arguments]
    try:
        runpy.run_module(options.module, run_name="__main__")
    finally:
        print(machine.summary(), file=sys.stderr)


if __name__ == "__main__":
    main()
