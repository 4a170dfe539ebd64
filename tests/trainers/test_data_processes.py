"""Several processes at one cache: one works, a killed one leaves no trace, all read the same."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from gangline.trainers.config import DataConfig
from gangline.trainers.data import DatasetInfo, prepare_dataset, verify

PREPARE = """
    import json, sys, time
    from pathlib import Path
    from gangline.trainers import prepare
    from gangline.trainers.config import DataConfig

    source, cache, gate = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    read_pieces = prepare.read_pieces

    def read_slowly(file, text_field):
        for number, piece in enumerate(read_pieces(file, text_field)):
            if number == 60:  # some batches have been written
                print("half", flush=True)
                while not gate.exists():
                    time.sleep(0.02)
            yield piece

    prepare.read_pieces = read_slowly
    prepare.SETTLE_S = 0  # the test has waited instead
    prepare._REPORT_EVERY_S = 0.2
    print("start", flush=True)
    said = []
    info = prepare.prepare_dataset(DataConfig(source=source), cache, said.append)
    print(json.dumps([info.to_json(), said]))
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("".join(f"line {number} of the text\n" for number in range(250_000)))
    time.sleep(0.05)  # older than the clock's tick when the first process looks
    return path


def start(source, cache, gate):
    """Start a process that prepares `source` and stops half-way until `gate` exists."""
    command = [sys.executable, "-c", textwrap.dedent(PREPARE), str(source), str(cache), str(gate)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for_line(process, wanted):
    while (line := process.stdout.readline()) != f"{wanted}\n":
        assert line, f"the process ended before it said {wanted!r}"


def result(process):
    """Give the dataset and the messages of a process, and how often it came half-way."""
    lines = process.stdout.read().splitlines()
    assert process.wait(timeout=60) == 0
    info, messages = json.loads(lines[-1])
    return DatasetInfo.from_json(info), messages, lines.count("half")


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    process.stdout.close()


def test_of_many_processes_one_works_and_all_get_the_same(source, tmp_path):
    gate = tmp_path / "gate"
    processes = [start(source, tmp_path / "cache", gate) for _ in range(4)]
    for process in processes:
        wait_for_line(process, "start")
    time.sleep(1)  # the three that wait say so five times
    gate.touch()
    infos, messages, half = zip(*map(result, processes), strict=True)
    assert sum(half) == 1
    assert sum(any(line.startswith("prepared") for line in said) for said in messages) == 1
    assert sum(any("waiting for another" in line for line in said) for said in messages) == 3
    assert len(set(infos)) == 1
    verify(infos[0])


def test_a_killed_process_leaves_no_dataset_and_a_waiting_one_takes_over(source, tmp_path):
    cache, gate = tmp_path / "cache", tmp_path / "gate"
    killed = start(source, cache, gate)
    try:
        wait_for_line(killed, "half")
        waiting = start(source, cache, gate)
        wait_for_line(waiting, "start")
        (partial,) = cache.glob("*.partial")
        assert partial.stat().st_size > 1_000_000, "progress had been made"
        assert not list(cache.glob("*.tokens"))
    finally:
        kill(killed)
    gate.touch()
    info, _, half = result(waiting)
    assert half == 1
    verify(info)
    assert [path.suffix for path in cache.iterdir() if path.is_file()] == [".tokens"]


def test_a_partial_file_of_another_dataset_is_removed_once_its_writer_is_dead(source, tmp_path):
    cache, other = tmp_path / "cache", tmp_path / "other.txt"
    other.write_text("another text")
    process = start(source, cache, tmp_path / "gate")
    try:
        wait_for_line(process, "half")
        prepare_dataset(DataConfig(source=str(other)), cache)
        assert len(list(cache.glob("*.partial"))) == 1, "its writer is alive"
    finally:
        kill(process)
    other.write_text("a third text")
    prepare_dataset(DataConfig(source=str(other)), cache)
    assert not list(cache.glob("*.partial"))


def test_processes_read_the_same_samples_at_once(source, tmp_path):
    info = prepare_dataset(DataConfig(source=str(source)), tmp_path / "cache")
    script = """
        import hashlib, json, sys
        import torch
        from gangline.trainers.data import DatasetInfo, TokenDataset

        torch.set_num_threads(1)
        info = DatasetInfo.from_json(json.loads(sys.argv[1]))
        dataset = TokenDataset(info, seq_len=128, seed=1, validation_fraction=0.01)
        sha = hashlib.sha256()
        for cursor in range(0, 2000, 50):
            sha.update(dataset.tokens(dataset.sample_ids(cursor, 50)).numpy().tobytes())
        print(sha.hexdigest())
    """
    command = [sys.executable, "-c", textwrap.dedent(script), json.dumps(info.to_json())]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    digests = [process.communicate(timeout=60)[0] for process in processes]
    assert digests[0] == digests[1]
    assert len(digests[0].strip()) == 64


def test_neither_order_nor_preparation_loads_torch(tmp_path):
    (tmp_path / "x.txt").write_text("a text")
    script = f"""
        import sys
        from pathlib import Path
        from gangline.trainers.config import DataConfig
        from gangline.trainers.data import prepare_dataset, TokenDataset
        config = DataConfig(source={str(tmp_path / "x.txt")!r})
        info = prepare_dataset(config, Path({str(tmp_path)!r}))
        TokenDataset(info, seq_len=2, seed=0, validation_fraction=0).sample_ids(0, 5)
        print({{"torch", "pyarrow", "tokenizers", "zstandard"}} & set(sys.modules))
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_relative_cache_gives_a_path_that_others_can_open(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("a text")
    info = prepare_dataset(DataConfig(source="x.txt"), Path("cache"))
    assert Path(info.path).is_absolute()
