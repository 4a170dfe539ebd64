"""The plan of a lab's network, made from its file without touching anything.

    plan_fabric(lab_file) -> FabricPlan     networks, links, and the commands that make them
    routes(plan, down)                      what leaves know while some links are down

A network is a network namespace: one per host, one per switch. Addresses, the same in every lab,
for they never leave it (p = plane, l = leaf or 0, s = spine, h = host, all from 0):

    10.<77+p>.<l>.<h+1>       a host               10.<77+p>.<l>.254      its leaf
    10.<87+p>.<l>.<2s>        leaf's end of an up-link, and with 2s+1 the spine's

Neighbours are written down and never asked for: there is no ARP, so that a link which drops
everything is silent, as in a routed fabric, and does not end as "no route to host".

A leaf is a bridge for the hosts below it and a router to the spines. It chooses a spine by a hash
of addresses and ports (fib_multipath_hash_policy 3, fields 0x37) with a fixed seed. Policy 1 would
not do: across veth it takes the socket's own random hash, so that no port has a path of its own.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from gangline.orchestrator.lab_file import LabFile

_KIB = 1024

Settings = dict[str, str]

_EVERYWHERE: Settings = {
    "net.ipv4.conf.all.rp_filter": "0",
    "net.ipv4.conf.default.rp_filter": "0",
    # Discovery of IPv6 neighbours would be traffic that nobody asked for.
    "net.ipv6.conf.default.disable_ipv6": "1",
}
# A pause between two exchanges must not look like a slow network.
_ON_HOSTS: Settings = {"net.ipv4.tcp_slow_start_after_idle": "0"}
_ON_ROUTERS: Settings = {
    "net.ipv4.ip_forward": "1",
    "net.ipv4.conf.all.send_redirects": "0",
    "net.ipv4.conf.default.send_redirects": "0",
}
_HASH_FIELDS = 0x37  # both addresses, the protocol, both ports
SEED_SETTING = "net.ipv4.fib_multipath_hash_seed"
OPTIONAL_SETTINGS = frozenset(["net.ipv6.conf.default.disable_ipv6"])
"""A kernel without IPv6 does not have these, and does not need them."""


@dataclass(frozen=True)
class LinkPlan:
    """One cable; `a` and `b` are (network, interface).

    `restore_b` is what b's network has forgotten, and ip must tell it again, after b was down.
    """

    name: str
    a: tuple[str, str]
    b: tuple[str, str]
    rate_mbit: float | None
    restore_b: tuple[str, ...] = ()


@dataclass
class NetworkPlan:
    """What to do in one network: settings, then `make`, `configure` and `shape`.

    `make` (ip) makes links, also their far ends in another network (see `with_paths`); `configure`
    (ip) runs when all networks have been through that; `shape` is for tc.
    """

    name: str
    settings: Settings
    make: list[str] = field(default_factory=lambda: ["link set lo up"])
    configure: list[str] = field(default_factory=list)
    shape: list[str] = field(default_factory=list)


@dataclass
class FabricPlan:
    """The whole plan. `ips` are a host's addresses, one per plane."""

    ips: dict[str, tuple[str, ...]]
    leaf_of: dict[str, int]
    num_leaves: int
    num_spines: int  # 0 in a star
    num_planes: int
    networks: dict[str, NetworkPlan] = field(default_factory=dict)
    links: dict[str, LinkPlan] = field(default_factory=dict)

    def commands(self) -> Iterator[tuple[str, str]]:
        """Yield (network, command) in an order in which they could be given."""
        names = {name: name for name in self.networks}
        for network in self.networks.values():
            yield from ((network.name, f"sysctl {k}={v}") for k, v in network.settings.items())
            yield from ((network.name, f"ip {with_paths(line, names)}") for line in network.make)
        learned = routes(self)
        for network in self.networks.values():
            configure = [*network.configure, *learned.get(network.name, ())]
            yield from ((network.name, f"ip {line}") for line in configure)
            yield from ((network.name, f"tc {line}") for line in network.shape)


def with_paths(line: str, paths: Mapping[str, str]) -> str:
    """Write where a network is for its name in a command: `netns @leaf0`."""
    return re.sub(r"@(\S+)", lambda name: paths[name[1]], line)


def plan_fabric(lab_file: LabFile) -> FabricPlan:
    """Plan the network of a lab."""
    names = lab_file.host_names
    fabric = lab_file.fabric
    leaf_of = {name: index * fabric.num_leaves // len(names) for index, name in enumerate(names)}
    plan = FabricPlan(
        ips={
            name: tuple(_host_ip(p, leaf_of[name], index) for p in range(fabric.planes))
            for index, name in enumerate(names)
        },
        leaf_of=leaf_of,
        num_leaves=fabric.num_leaves,
        num_spines=fabric.num_spines,
        num_planes=fabric.planes,
    )
    for name in names:
        host = NetworkPlan(name, _EVERYWHERE | _ON_HOSTS)
        if lab_file.inside_host_mbit is not None:
            host.shape.append(f"qdisc replace dev lo root {tbf(lab_file.inside_host_mbit)}")
        plan.networks[name] = host
    for plane in range(fabric.planes):
        _add_plane(plan, lab_file, plane)
    return plan


def _add_plane(plan: FabricPlan, lab_file: LabFile, plane: int) -> None:
    for leaf in range(plan.num_leaves):
        _add_leaf(plan, lab_file, plane, leaf)
    for index, host in enumerate(plan.ips):
        _add_host_link(plan, lab_file, plane, index, host)
    for spine in range(plan.num_spines):
        name = spine_name(plane, spine)
        plan.networks[name] = NetworkPlan(name, _EVERYWHERE | _ON_ROUTERS)
        for leaf in range(plan.num_leaves):
            _add_uplink(plan, lab_file, plane, leaf, spine)


def _add_leaf(plan: FabricPlan, lab_file: LabFile, plane: int, leaf: int) -> None:
    """Add the switch that the hosts below a leaf are plugged into; in a star it is only that."""
    name = _switch_name(plan, plane, leaf)
    network = plan.networks[name] = NetworkPlan(name, dict(_EVERYWHERE))
    ip = _gateway_ip(plane, leaf)
    # Without a spanning tree a port forwards as soon as it is up.
    network.make.append(
        f"link add br0 address {_mac(ip)} mtu {lab_file.mtu} type bridge stp_state 0 "
        "forward_delay 0 mcast_snooping 0"
    )
    network.configure.append("link set br0 up")
    if plan.num_spines:
        network.settings |= _ON_ROUTERS | {
            "net.ipv4.fib_multipath_hash_policy": "3",
            "net.ipv4.fib_multipath_hash_fields": str(_HASH_FIELDS),
        }
        if lab_file.fabric.seed is not None:
            network.settings[SEED_SETTING] = str(lab_file.fabric.seed)
        network.configure.append(f"addr add {ip}/24 dev br0")
        network.configure += [
            _neighbour(plan.ips[host][plane], "br0") for host in _below(plan, leaf)
        ]


def _add_host_link(plan: FabricPlan, lab_file: LabFile, plane: int, index: int, host: str) -> None:
    leaf = plan.leaf_of[host]
    switch = _switch_name(plan, plane, leaf)
    ip, nic, port = plan.ips[host][plane], f"eth{plane}", f"h{index}"
    _add_cable(
        plan, lab_file.mtu, _in_plane(host, plane), (host, nic), (switch, port),
        mac_a=_mac(ip), rate_mbit=lab_file.rate_mbit, restore_b=(),
    )  # fmt: skip
    plan.networks[switch].configure.append(f"link set {port} master br0 up")
    network = plan.networks[host]
    network.configure += [f"addr add {ip}/24 dev {nic}", f"link set {nic} up"]
    network.configure += [
        _neighbour(plan.ips[other][plane], nic) for other in _below(plan, leaf) if other != host
    ]
    if plan.num_spines:
        gateway = _gateway_ip(plane, leaf)
        network.configure.append(_neighbour(gateway, nic))
        network.configure.append(f"route add 10.{77 + plane}.0.0/16 via {gateway} dev {nic}")


def _add_uplink(plan: FabricPlan, lab_file: LabFile, plane: int, leaf: int, spine: int) -> None:
    a, b = (leaf_name(plane, leaf), f"s{spine}"), (spine_name(plane, spine), f"l{leaf}")
    ip_a, ip_b = _uplink_ips(plane, leaf, spine)
    rate = lab_file.rate_mbit if lab_file.uplink_mbit is None else lab_file.uplink_mbit
    to_b, to_a = _neighbour(ip_b, a[1]), _neighbour(ip_a, b[1])
    _add_cable(
        plan, lab_file.mtu, uplink_name(plane, leaf, spine), a, b,
        mac_a=_mac(ip_a), mac_b=_mac(ip_b), rate_mbit=rate, restore_b=(to_a,),
    )  # fmt: skip
    plan.networks[a[0]].configure += [f"addr add {ip_a}/31 dev {a[1]}", f"link set {a[1]} up", to_b]
    plan.networks[b[0]].configure += [f"addr add {ip_b}/31 dev {b[1]}", f"link set {b[1]} up", to_a]


def _add_cable(
    plan: FabricPlan,
    mtu: int,
    name: str,
    a: tuple[str, str],
    b: tuple[str, str],
    *,
    mac_a: str,
    mac_b: str | None = None,
    rate_mbit: float | None,
    restore_b: tuple[str, ...],
) -> None:
    """Add a link whose two ends each shape what they send."""
    plan.links[name] = LinkPlan(name, a, b, rate_mbit, restore_b)
    address_b = f"address {mac_b} " if mac_b else ""
    plan.networks[a[0]].make.append(
        f"link add {a[1]} address {mac_a} mtu {mtu} type veth "
        f"peer name {b[1]} {address_b}mtu {mtu} netns @{b[0]}"
    )
    if rate_mbit is not None:
        for network, interface in (a, b):
            plan.networks[network].shape.append(
                f"qdisc replace dev {interface} root {tbf(rate_mbit)}"
            )


def routes(plan: FabricPlan, down: Collection[str] = ()) -> dict[str, list[str]]:
    """Return what each router has to know while the links `down` have no carrier, as ip commands.

    It is what a routing protocol would have found: a leaf uses those spines from which both
    up-links of the way are there.
    """
    found: dict[str, list[str]] = {}
    leaves = range(plan.num_leaves if plan.num_spines else 0)
    for plane in range(plan.num_planes):
        for spine in range(plan.num_spines):
            found[spine_name(plane, spine)] = [
                f"route replace {_subnet(plane, leaf)} via {_uplink_ips(plane, leaf, spine)[0]} "
                f"dev l{leaf}"
                for leaf in leaves
                if uplink_name(plane, leaf, spine) not in down
            ]
        for leaf in leaves:
            found[leaf_name(plane, leaf)] = [
                _way(plan, plane, leaf, other, down) for other in leaves if other != leaf
            ]
    return found


def tbf(mbit: float) -> str:
    """Return the queue that sends at a rate: a token bucket.

    Its burst covers several of TCP's 64 KiB segments, for with one alone TCP stays 5 to 30 % below
    the rate; its queue is 0.1 s long, so that a slow link delays rather than drops.
    """
    rate_bytes_s = mbit * 1e6 / 8
    burst = min(max(rate_bytes_s * 0.005, 128 * _KIB), 1024 * _KIB)
    queue = max(rate_bytes_s * 0.1, 512 * _KIB) + burst
    return f"tbf rate {round(mbit * 1e6)}bit burst {round(burst)}b limit {round(queue)}b"


def leaf_name(plane: int, leaf: int) -> str:
    """Return the name of a leaf's network."""
    return _in_plane(f"leaf{leaf}", plane)


def spine_name(plane: int, spine: int) -> str:
    """Return the name of a spine's network."""
    return _in_plane(f"spine{spine}", plane)


def uplink_name(plane: int, leaf: int, spine: int) -> str:
    """Return the name of the link between a leaf and a spine."""
    return _in_plane(f"leaf{leaf}-spine{spine}", plane)


def _in_plane(name: str, plane: int) -> str:
    return f"{name}.{plane}" if plane else name


def _host_ip(plane: int, leaf: int, index: int) -> str:
    return f"10.{77 + plane}.{leaf}.{index + 1}"


def _gateway_ip(plane: int, leaf: int) -> str:
    return f"10.{77 + plane}.{leaf}.254"


def _subnet(plane: int, leaf: int) -> str:
    return f"10.{77 + plane}.{leaf}.0/24"


def _uplink_ips(plane: int, leaf: int, spine: int) -> tuple[str, str]:
    prefix = f"10.{87 + plane}.{leaf}"
    return f"{prefix}.{2 * spine}", f"{prefix}.{2 * spine + 1}"


def _mac(ip: str) -> str:
    """Return the address of the interface that has an IP: 02:4c, then the IP's bytes."""
    return ":".join(["02", "4c", *(f"{int(part):02x}" for part in ip.split("."))])


def _neighbour(ip: str, interface: str) -> str:
    return f"neigh replace {ip} lladdr {_mac(ip)} dev {interface} nud permanent"


def _below(plan: FabricPlan, leaf: int) -> list[str]:
    return [host for host, its_leaf in plan.leaf_of.items() if its_leaf == leaf]


def _switch_name(plan: FabricPlan, plane: int, leaf: int) -> str:
    return leaf_name(plane, leaf) if plan.num_spines else _in_plane("star", plane)


def _way(plan: FabricPlan, plane: int, leaf: int, to: int, down: Collection[str]) -> str:
    """Return the route of a leaf to the hosts of another."""
    hops = [
        f"via {_uplink_ips(plane, leaf, spine)[1]} dev s{spine}"
        for spine in range(plan.num_spines)
        if not {uplink_name(plane, leaf, spine), uplink_name(plane, to, spine)} & set(down)
    ]
    if not hops:
        return f"route replace unreachable {_subnet(plane, to)}"
    way = hops[0] if len(hops) == 1 else " ".join(f"nexthop {hop}" for hop in hops)
    return f"route replace {_subnet(plane, to)} {way}"
