#!/usr/bin/env python3
"""Stands in for a binary of nccl-tests: answers -h, writes -J, prints a sample output.

Its behaviour is in a file `behaviour.json` beside it: sample, known flags, exit code, sleep.
"""

import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
behaviour = json.loads((HERE / "behaviour.json").read_text())
if "-h" in sys.argv:
    print("USAGE: all_reduce_perf \n\t")
    for flag in behaviour["flags"]:
        print(f"[{flag},--long <value>] \n\t")
    sys.exit(0)
(HERE / "called.json").write_text(
    json.dumps({"argv": sys.argv[1:], "min_bw": os.environ.get("NCCL_TESTS_MIN_BW")})
)
if "-J" in sys.argv and behaviour.get("json"):
    Path(sys.argv[sys.argv.index("-J") + 1]).write_text(Path(behaviour["json"]).read_text())
print(
    Path(behaviour["sample"]).read_text() if behaviour.get("sample") else "no CUDA device", end=""
)
sys.stdout.flush()
if behaviour.get("sleep_s"):
    (HERE / "pid").write_text(str(os.getpid()))
    time.sleep(behaviour["sleep_s"])
sys.exit(behaviour.get("exit_code", 0))
