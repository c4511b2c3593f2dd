"""How long a script takes to say hello: `python SCRIPT.py --help` against `python -c "import torch"`, paired.

    python -m eval.bench_startup --json startup.json [--rounds 7]

In every round each command runs once, in an order that turns; the ratio of process CPU seconds (user and
system, which other work on the machine does not lengthen) is taken within the round, and its median is the
result.  The goal, at most 1.3, leaves a third of torch's import for numpy, pillow, scipy and our own code.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

from common.files import write_atomic
from eval._shared import ROOT, SCRIPTS

GOAL = 1.3


def cpu_seconds(command):
    """User and system seconds of a command that must succeed."""
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{command} ended with {child.returncode}")
    return used.ru_utime + used.ru_stime


def main():
    parser = argparse.ArgumentParser("eval.bench_startup", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the record here")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    names = [name for name in SCRIPTS if (ROOT / f"{name}.py").is_file()]
    commands = {name: [sys.executable, f"{name}.py", "--help"] for name in names}
    commands["torch"] = [sys.executable, "-c", "import torch"]
    seconds = {name: [] for name in commands}
    for turn in range(args.rounds + 1):
        order = list(commands)
        for name in order[turn % len(order):] + order[:turn % len(order)]:
            used = cpu_seconds(commands[name])
            if turn:                                        # the first round fills the disk cache
                seconds[name].append(used)
    cases = {}
    for name in names:
        ratios = sorted(ours / theirs for ours, theirs in zip(seconds[name], seconds["torch"]))
        value = statistics.median(ratios)
        cases[name] = dict(what=f"{name}.py --help", value=value, ratio="ours / import torch", goal=GOAL,
                           agree=True, met=value <= GOAL, ours_s=statistics.median(seconds[name]),
                           theirs_s=statistics.median(seconds["torch"]), range=[ratios[0], ratios[-1]])
        print(f"{name:<14} {cases[name]['ours_s']:.2f} s, import torch {cases[name]['theirs_s']:.2f} s: "
              f"{value:.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    if args.json:
        write_atomic(args.json, json.dumps(dict(cases=cases, rounds=args.rounds), indent=1).encode())


if __name__ == "__main__":
    main()
