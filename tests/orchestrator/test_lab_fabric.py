"""The plan of a lab's network. Needs no root: nothing is made."""

import re
from collections import Counter

import pytest

from gangline.orchestrator.lab_fabric import FabricPlan, plan_fabric, routes, tbf
from gangline.orchestrator.lab_file import load_lab

STAR = "hosts: 3\nrate_mbit: 400\n"
LEAF_SPINE = (
    "hosts: 5\nrate_mbit: 400\nuplink_mbit: 100\nfabric: {kind: leaf_spine, leaves: 2, spines: 3}\n"
)
PLANES = "hosts: 4\nfabric: {kind: leaf_spine, leaves: 2, spines: 2, planes: 2}\n"


def plan(text: str) -> FabricPlan:
    return plan_fabric(load_lab(text))


def commands_in(fabric: FabricPlan, network: str, word: str = "") -> list[str]:
    return [text for name, text in fabric.commands() if name == network and word in text]


def test_a_star_has_one_switch_and_a_link_per_host():
    fabric = plan(STAR)
    assert list(fabric.networks) == ["host0", "host1", "host2", "star"]
    assert list(fabric.links) == ["host0", "host1", "host2"]
    assert fabric.ips == {f"host{i}": (f"10.77.0.{i + 1}",) for i in range(3)}
    assert not routes(fabric)


def test_leaves_share_the_hosts_and_meet_all_spines():
    fabric = plan(LEAF_SPINE)
    assert fabric.leaf_of == {"host0": 0, "host1": 0, "host2": 0, "host3": 1, "host4": 1}
    assert fabric.ips["host4"] == ("10.77.1.5",)
    uplinks = [name for name in fabric.links if "-" in name]
    assert uplinks == [f"leaf{leaf}-spine{spine}" for spine in range(3) for leaf in range(2)]
    assert {fabric.links[name].rate_mbit for name in uplinks} == {100.0}


def test_planes_are_fabrics_of_their_own():
    fabric = plan(PLANES)
    assert fabric.ips["host0"] == ("10.77.0.1", "10.78.0.1")
    assert fabric.links["host3.1"].a == ("host3", "eth1")
    assert fabric.links["host3.1"].b == ("leaf1.1", "h3")
    of_plane_1 = [link for name, link in fabric.links.items() if name.endswith(".1")]
    assert len(of_plane_1) == len(fabric.links) / 2
    switches = {end[0] for link in of_plane_1 for end in (link.a, link.b)} - set(fabric.ips)
    assert all(name.endswith(".1") for name in switches)


@pytest.mark.parametrize("text", [STAR, LEAF_SPINE, PLANES], ids=["star", "leaf_spine", "planes"])
def test_addresses_are_unique_and_each_end_of_a_link_is_made_once(text):
    fabric = plan(text)
    everything = [text for _, text in fabric.commands()]
    macs = re.findall(r"address (\S+)", "\n".join(everything))
    assert max(Counter(macs).values()) == 1
    ips = re.findall(r"addr add ([^/]+)/", "\n".join(everything))
    assert max(Counter(ips).values()) == 1
    ends = [end for link in fabric.links.values() for end in (link.a, link.b)]
    assert max(Counter(ends).values()) == 1
    assert all(len(interface) < 16 for _, interface in ends), "the kernel takes 15 characters"


@pytest.mark.parametrize("text", [STAR, LEAF_SPINE, PLANES], ids=["star", "leaf_spine", "planes"])
def test_every_link_is_shaped_at_both_ends(text):
    fabric = plan(text)
    for link in fabric.links.values():
        assert link.rate_mbit is not None
        for network, interface in (link.a, link.b):
            (line,) = commands_in(fabric, network, f"tc qdisc replace dev {interface} root")
            assert f"rate {round(link.rate_mbit * 1e6)}bit" in line


def test_a_link_without_a_rate_has_no_queue():
    fabric = plan("rate_mbit: null\n")
    assert not [text for _, text in fabric.commands() if text.startswith("tc")]


def test_the_rate_inside_a_host_shapes_its_loopback():
    (line,) = commands_in(plan("inside_host_mbit: 4000\n"), "host1", "dev lo root")
    assert "rate 4000000000bit" in line


def test_leaves_hash_what_the_oracle_knows_with_the_seed_of_the_file():
    fabric = plan_fabric(load_lab(LEAF_SPINE, ["fabric.seed=77"]))
    settings = fabric.networks["leaf1"].settings
    found = {key.rpartition("_")[2]: value for key, value in settings.items() if "hash" in key}
    assert found == {"policy": "3", "fields": str(0x37), "seed": "77"}
    assert not any("hash" in key for key in fabric.networks["spine0"].settings)


def test_every_neighbour_is_written_down_with_its_own_address():
    fabric = plan(LEAF_SPINE)
    lines = [text.split() for _, text in fabric.commands() if "lladdr" in text]
    macs = {words[3]: words[5] for words in lines}
    made = re.findall(r"address (\S+)", "\n".join(text for _, text in fabric.commands()))
    assert set(macs.values()) <= set(made)
    assert set(macs) >= {ip for ips in fabric.ips.values() for ip in ips}


def test_a_leaf_leaves_out_spines_that_have_lost_a_link_of_the_way():
    fabric = plan(LEAF_SPINE)
    whole = routes(fabric)
    assert whole["leaf0"] == [
        "route replace 10.77.1.0/24 nexthop via 10.87.0.1 dev s0 "
        "nexthop via 10.87.0.3 dev s1 nexthop via 10.87.0.5 dev s2"
    ]
    # One is our own up-link, the other that of the leaf at the far end.
    broken = routes(fabric, {"leaf0-spine0", "leaf1-spine2"})
    assert broken["leaf0"] == ["route replace 10.77.1.0/24 via 10.87.0.3 dev s1"]
    assert broken["leaf1"] == ["route replace 10.77.0.0/24 via 10.87.1.3 dev s1"]
    assert broken["spine0"] == ["route replace 10.77.1.0/24 via 10.87.1.0 dev l1"]
    everything = {name for name in fabric.links if "-" in name}
    assert routes(fabric, everything)["leaf0"] == ["route replace unreachable 10.77.1.0/24"]


@pytest.mark.parametrize("mbit", [1, 40, 400, 4000, 100_000])
def test_a_bucket_holds_more_than_one_segment_and_less_than_a_fifth_of_a_second_at_10_mbit(mbit):
    ((burst, queue),) = [
        map(int, found) for found in re.findall(r"burst (.*)b limit (.*)b", tbf(mbit))
    ]
    assert 2 * 65536 <= burst <= 2**20
    assert queue - burst >= max(2**19, 0.0999 * mbit * 1e6 / 8)
