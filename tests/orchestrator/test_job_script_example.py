"""The DDP script of the examples: it runs under torchrun, and a killed rank costs it nothing."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "script_ddp" / "train.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]


ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    # torchrun 2.13 gives restarted ranks the store of the ranks before them, where gloo finds the
    # addresses of the dead: 4 of 4 restarts failed or hung without this.
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
}


def start(folder, *options, script_args=()):
    return subprocess.Popen(
        [*TORCHRUN, "--standalone", *options, str(EXAMPLE),
         "--steps=60", "--save-every=10", f"--checkpoint-dir={folder}", *script_args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )  # fmt: skip


def weights_of(output):
    found = re.findall(r"done: weights ([0-9a-f]{16})", output)
    assert len(found) == 1, output
    return found[0]


def ranks_of(parent_pid):
    """Return the process ids of the script's ranks, which torchrun started."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if parent == parent_pid and str(EXAMPLE).encode() in words:
                pids.append(int(entry.name))
    return sorted(pids)


def wait_for_checkpoint(folder, process):
    deadline_s = time.monotonic() + 60
    while not (folder / "newest.pt").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline_s, "no checkpoint after 60 s"
        time.sleep(0.01)


def finish(process):
    try:
        output, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output
    return output


@pytest.mark.ranks
def test_a_killed_rank_changes_nothing(tmp_path):
    whole = start(tmp_path / "whole")
    folder = tmp_path / "killed"
    process = start(folder, "--max-restarts=1", script_args=["--step-sleep-s=0.02"])
    wait_for_checkpoint(folder, process)
    ranks = ranks_of(process.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    output = finish(process)
    expected = weights_of(finish(whole))
    starts = [int(step) for step in re.findall(r"starting at step (\d+)", output)]
    # The fault happened, and what had been saved was used.
    assert len(starts) == 2
    assert starts[0] == 0
    assert starts[1] >= 10
    assert weights_of(output) == expected
    assert [file.name for file in folder.iterdir()] == ["newest.pt"]
