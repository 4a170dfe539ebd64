"""Jobs leave rings while they run: train jobs in their workers, scripts through a hook at start."""

import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from gangline.comm.events import Op, Ring, open_rings
from gangline.comm.ring_folders import FolderHold, ring_folder, rings_root
from gangline.orchestrator import script_program
from gangline.orchestrator.script_program import ScriptProgram, ScriptProgramSpec
from gangline.orchestrator.worker import Assignment, Control

ROOT = Path(__file__).parent.parent.parent
HOOK = Path(script_program.__file__).with_name("script_hook")

SCRIPT = """
import json, os, subprocess, sys
from pathlib import Path

def communicate(how):
    import torch.distributed as dist
    from gangline.comm.events import open_rings
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.barrier()
    rings = [r for r in open_rings(os.environ["GANGLINE_RINGS"]) if r.info.pid == os.getpid()]
    found = [[r.info.label, r.info.recorder, r.info.devices[-1], r.last_enqueued] for r in rings]
    Path(f"found-{how}").write_text(json.dumps(found))
    dist.destroy_process_group()

if __name__ == "__main__":
    how = sys.argv[1]
    Path("main").write_text(json.dumps([
        sys.argv, sys.path[0], __name__, sys.modules["__main__"].__file__,
        [p for p in sys.path if "script_hook" in p],
    ]))
    communicate("script")
    import multiprocessing
    for method in ("spawn", "fork"):
        child = multiprocessing.get_context(method).Process(target=communicate, args=(method,))
        child.start()
        child.join()
        assert child.exitcode == 0
    code = "from script import communicate; communicate('command')"
    subprocess.run([sys.executable, "-c", code], check=True)
"""


def run_script(folder: Path, text: str, **env: str) -> dict:
    (folder / "script.py").write_text(text)
    run_dir = folder / "runs" / "one"
    run_dir.mkdir(parents=True)
    spec = ScriptProgramSpec(
        script=Path("script.py"),
        args=("--now", "x y"),
        env=env,
        working_dir=folder,
        run_dir=run_dir,
        grace_s=1.0,
    )
    program = ScriptProgram(spec)
    program.warm({})
    port = program.open_store(1, "127.0.0.1")
    return program.run(Assignment(0, 0, 1, "127.0.0.1", port), Control())


@pytest.mark.ranks
def test_a_script_and_its_children_are_recorded_and_see_nothing_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # what a user may have set
    assert run_script(tmp_path, SCRIPT)["exit_code"] == 0
    argv, first_path, name, file, hooks = json.loads((tmp_path / "main").read_text())
    assert argv == ["script.py", "--now", "x y"]
    assert Path(first_path).resolve() == tmp_path.resolve()
    assert (name, Path(file).name, hooks) == ("__main__", "script.py", [])
    for how in ("script", "spawn", "fork", "command"):
        (found,) = json.loads((tmp_path / f"found-{how}").read_text())
        assert found[0] == "rank-0", how
        assert found[1] in ("c++", "python")
        assert found[3] == 1
    assert not ring_folder(tmp_path / "runs" / "one").exists()


def run_python(*arguments: str, path: list[Path], rings: str = "/nowhere/else", **env: str) -> str:
    whole = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [HOOK, *path])), **env}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**whole, "GANGLINE_RINGS": rings},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_the_users_own_sitecustomize_runs_as_if_ours_were_not_there(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("here = [__name__, __file__]\n")
    code = "import sys, sitecustomize; print(*sitecustomize.here, *sys.path)"
    name, file, *path = run_python("-c", code, path=[tmp_path]).split()
    assert (name, file) == ("sitecustomize", str(tmp_path / "sitecustomize.py"))
    assert str(HOOK) not in path


def test_an_error_in_the_users_own_sitecustomize_is_told_as_python_does(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import a_module_that_is_not_there\n")
    whole = {**os.environ, "PYTHONPATH": f"{HOOK}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", "print('ran')"], env=whole, capture_output=True, text=True
    )
    plain = subprocess.run(
        [sys.executable, "-c", "print('ran')"],
        env={**whole, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == plain.stdout
    assert "a_module_that_is_not_there" in done.stderr
    assert done.returncode == plain.returncode


def test_a_script_without_torch_loads_nothing_for_the_recorder():
    code = (
        "import sys; print(*[m for m in sys.modules if m.split('.')[0] in ('torch', 'gangline')])"
    )
    assert run_python("-c", code, path=[]) == "\n"


def test_a_script_that_only_imports_torch_loads_nothing_of_ours():
    code = """
import sys, inspect, torch.distributed.distributed_c10d as c10d
print(*[name for name in sys.modules if name.startswith("gangline.comm")], "and", sys.meta_path[0])
print(c10d.__loader__ is c10d.__spec__.loader, "def all_reduce(" in inspect.getsource(c10d))
"""
    loaded, intact = run_python("-c", code, path=[]).splitlines()
    assert loaded.startswith("and ")
    assert "sitecustomize" not in loaded
    assert intact == "True True"


def test_a_script_runs_though_it_cannot_be_recorded(tmp_path):
    (tmp_path / "communicate.py").write_text(
        "import torch.distributed as dist\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "dist.barrier()\n"
        "dist.destroy_process_group()\n"
        "print('done')\n"
    )
    whole = {**os.environ, "PYTHONPATH": str(HOOK), "GANGLINE_RINGS": "/proc/no/where"}
    done = subprocess.run(
        [sys.executable, tmp_path / "communicate.py"], env=whole, capture_output=True, text=True
    )
    assert done.stdout == "done\n"
    assert done.stderr.count("communication is not recorded") == 1


def test_a_worker_keeps_the_rings_of_its_run(tmp_path):
    """The folder of a script's rings stays from one generation to the next."""
    from gangline.orchestrator.worker import Worker

    run_dir = tmp_path / "run"
    run_dir.mkdir()
    folder = ring_folder(run_dir)
    worker = Worker.__new__(Worker)  # without what belongs to a process of its own
    worker.worker_id, worker._run_dir, worker._rings = "w1", run_dir, None
    worker._start_recording()
    (folder / "7-1.ring").write_text("of a killed script")
    FolderHold(rings_root() / f"test-{os.getpid()}").release()  # as another job does when it starts
    assert (folder / "7-1.ring").exists()
    worker._start_recording()
    worker._stop_recording()
    assert not folder.exists()


def note(job: str, ring: Ring, seen: dict[tuple[str, int, str], Counter]) -> None:
    assert ring.info.ranks == (0, 1)
    assert re.fullmatch(r"w[0-9]+|rank-[01]", ring.info.label)
    ops = Counter(Op(op) for op in ring.events()["op"].tolist())
    seen[job, ring.info.rank, ring.info.group_desc] = ops


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_jobs_leave_rings_while_they_run(tmp_path):
    """A script and a train job on two private Rays, with the real command."""
    jobs = {
        "script_ddp": "args=[--steps, 300, --save-every, 20]",
        "moe_text_small": "training.steps=30",
    }
    command = [sys.executable, "-m", "gangline.orchestrator.cli", "run"]
    running = [
        subprocess.Popen(
            [*command, str(ROOT / "examples" / f"{name}.yaml"), "--set", setting],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
        )
        for name, setting in jobs.items()
    ]
    seen: dict[tuple[str, int, str], Counter] = {}
    try:
        while any(job.poll() is None for job in running):
            time.sleep(0.2)
            for run_dir in tmp_path.glob("runs/*/"):
                for ring in open_rings(ring_folder(run_dir)):
                    with ring:
                        note(run_dir.name.rpartition("-")[0], ring, seen)
    finally:
        for job in running:
            job.terminate()
            job.wait()
    assert [job.returncode for job in running] == [0, 0]
    for rank in (0, 1):
        assert seen["script-ddp", rank, "default_pg"][Op.ALL_REDUCE] > 10
        train = seen["moe-text-small", rank, "default_pg"]
        assert train[Op.SEND] > 10
        assert train[Op.ALL_REDUCE] > 0
        assert ("moe-text-small", rank, "checkpoint") in seen
    for run_dir in tmp_path.glob("runs/*/"):
        assert not ring_folder(run_dir).exists(), "all processes of the run ended in order"
