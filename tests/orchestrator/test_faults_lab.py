"""Faults of links, spines, hosts and disks on a real lab, without Ray: each happens and goes."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import TypeAdapter

from gangline.orchestrator.faults import Fault, Progress
from gangline.orchestrator.faults_inject import injected
from gangline.orchestrator.faults_stage import Stage
from gangline.orchestrator.lab import Lab
from gangline.orchestrator.timeline import FaultRecord

from .lab_tools import Connection, a_lab, arrives, needs_lab

pytestmark = needs_lab


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    fabric = "{kind: leaf_spine, leaves: 2, spines: 2}"
    text = f"hosts: 3\nrate_mbit: 200\nfabric: {fabric}\nscratch_mb: 4"
    with Lab.up(a_lab(text)) as lab:
        yield lab


class During:
    """A fault that lasts for a block; afterwards it is taken back and has proven itself."""

    def __init__(self, lab: Lab, kind: str, **fields: Any) -> None:
        fault = TypeAdapter(Fault).validate_python({"kind": kind, "from_start_s": 0, **fields})
        progress = Progress(time.time())
        self._injected = injected([fault], Stage(lab, lambda line: None), lambda: progress)
        self.record: FaultRecord | None = None

    def __enter__(self) -> FaultRecord:
        (self.record,) = self._injected.__enter__()
        deadline_s = time.monotonic() + 5
        while self.record.begun_at is None and not self.record.error:
            assert time.monotonic() < deadline_s
            time.sleep(0.005)
        return self.record

    def __exit__(self, *error: Any) -> None:
        self._injected.__exit__(*error)
        if error == (None, None, None):
            assert self.record is not None
            assert self.record.doubt == ""
            assert all(proof.found for proof in self.record.proofs)


@pytest.fixture
def way(lab: Lab) -> Iterator[Connection]:
    """A connection from host0 to host2, which is below the other leaf."""
    with Connection(lab, "host0", "host2") as connection:
        assert arrives(connection.source, connection.to, 2.0)
        yield connection


def test_a_slow_link_is_slow_and_then_as_fast_as_before(lab: Lab, way: Connection) -> None:
    with During(lab, "slow_link", link="host0", rate_mbit=10, direction="egress") as record:
        assert way.rate_mbit(500_000) < 12
    assert record.links == ["host0"]
    assert record.target == "link host0 egress"
    assert way.rate_mbit(4_000_000) > 50


def test_a_one_way_blackhole_drops_one_way(lab: Lab, way: Connection) -> None:
    with During(lab, "blackhole", link="host2", direction="ingress"):
        assert not arrives(way.source, way.to, 0.3)
    way.to.settimeout(5)
    assert way.to.recv(1) == b"x", "TCP brings it later"
    with During(lab, "blackhole", link="host2", direction="egress"):
        # Forward it still goes; only the acknowledgements are lost.
        assert arrives(way.source, way.to, 2.0)


def test_a_two_way_blackhole_drops_all_and_keeps_the_carrier(lab: Lab, way: Connection) -> None:
    with During(lab, "blackhole", link="host2") as record:
        assert not arrives(way.source, way.to, 0.3)
    carriers = [proof for proof in record.proofs if "carriers" in proof.what]
    assert [proof.found for proof in carriers] == ["host2:eth0 UP, leaf1:h2 UP"]


def test_a_link_that_is_down_comes_back(lab: Lab, way: Connection) -> None:
    with During(lab, "link_down", link="host0") as record:
        assert not arrives(way.source, way.to, 0.2)
    assert record.host == "host0"
    way.to.settimeout(5)
    assert way.to.recv(1) == b"x"


def test_a_flapping_link_is_down_several_times(lab: Lab, way: Connection) -> None:
    with During(lab, "flapping_link", link="host0", down_s=0.05, up_s=0.1) as record:
        time.sleep(0.6)
    assert record.proofs[0].what == "times down"
    assert lab.links["host0"].is_up
    assert arrives(way.source, way.to, 5.0)


def test_a_spine_down_moves_what_it_carried(lab: Lab, way: Connection) -> None:
    way.rate_mbit(1_000_000)
    with During(lab, "spine_down", spine="spine0") as record:
        assert record.links == ["leaf0-spine0", "leaf1-spine0"]
        before = lab.links["leaf0-spine1"].num_bytes()
        way.rate_mbit(1_000_000)
        assert lab.links["leaf0-spine1"].num_bytes().a_to_b - before.a_to_b > 1_000_000
    assert arrives(way.source, way.to, 2.0)


def test_a_black_spine_drops_what_it_carries_and_nothing_is_told(lab: Lab) -> None:
    ways = [Connection(lab, "host0", "host2") for _ in range(12)]
    with During(lab, "spine_black", spine="spine1"):
        # Each way and its acknowledgements have a spine of their own; the byte needs the first.
        through = [arrives(way.source, way.to, 0.2) for way in ways]
    assert 0 < sum(through) < len(ways), "some go over the other spine"
    for way in ways:
        way.__exit__()


def test_the_busiest_spine_is_the_one_that_carries_most(lab: Lab) -> None:
    from threading import Event, Thread

    with Connection(lab, "host0", "host2") as way:
        port, to_port = way.source.getsockname()[1], way.to.getsockname()[1]
        spine = lab.spine_of("host0", "host2", source_port=port, port=to_port)
        stop = Event()

        def send() -> None:
            while not stop.is_set():
                way.rate_mbit(2_000_000)

        sender = Thread(target=send)
        sender.start()
        with During(lab, "spine_down", spine="busiest") as record:
            assert record.target == f"spine{spine}"
        stop.set()
        sender.join()


def test_a_full_disk_refuses_every_block_and_is_given_back(lab: Lab) -> None:
    host = lab.hosts["host1"]
    file = host.path(host.scratch) / "file"
    file.write_bytes(bytes(100_000))
    with During(lab, "disk_full", host="host1"):
        with pytest.raises(OSError, match="No space left"):
            file.write_bytes(bytes(200_000))
        file.unlink(missing_ok=True)  # what is freed is taken, too
        time.sleep(0.1)
        with pytest.raises(OSError, match="No space left"):
            file.write_bytes(bytes(50_000))
        file.unlink(missing_ok=True)
    file.write_bytes(bytes(1_000_000))
    assert [path.name for path in file.parent.iterdir()] == ["file"]


def test_a_host_without_power_is_silent_and_dead() -> None:
    with Lab.up(a_lab("hosts: 2")) as lab, Connection(lab, "host0", "host1") as way:
        sleeper = lab.hosts["host1"].popen(["sleep", "60"])
        while len(lab.hosts["host1"].pids()) < 2:
            time.sleep(0.01)
        with During(lab, "kill_host", host="host1") as record:
            assert sleeper.wait(5) != 0
        assert record.host == "host1"
        assert not lab.hosts["host1"].is_alive
        way.to.close()  # of this process, in the dead host's network


def test_a_fault_of_a_dead_host_says_so() -> None:
    with Lab.up(a_lab("hosts: 2")) as lab:
        lab.hosts["host1"].kill()
        deadline_s = time.monotonic() + 5
        while lab.hosts["host1"].is_alive and time.monotonic() < deadline_s:
            time.sleep(0.01)
        during = During(lab, "slow_link", link="host1", rate_mbit=10)
        record = during.__enter__()
        during._injected.__exit__(None, None, None)
        assert "host1 is dead" in record.doubt
