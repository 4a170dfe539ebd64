"""Pass rows on inside a host: to the ranks of their experts, or to who speaks for their source.

What goes between two ranks of a host lies in one buffer: first the rows of the home rank's own
tokens, then the rows that are passed on, by source. It is one message, or two where the own rows
are many: then they travel while the others cross between hosts, where a host's links are free.

Q = rows for this rank's experts, R = rows of this rank's tokens, D = dim
"""

import torch
from torch import Tensor

from gangline.comm.host_crossing import is_long, take
from gangline.comm.host_ways import Ways
from gangline.comm.mesh import Mesh
from gangline.comm.row_exchange import expect_blocks
from gangline.comm.traffic import Link

# Fewer bytes go faster with the rows that are passed on than in a message of their own.
APART_BYTES = 64 * 1024


class WayOut:
    """Bring what crossed, and the own rows, to the experts of this host."""

    def __init__(self, ways: Ways, mesh: Mesh, op: str, *, like: Tensor) -> None:
        """Post the receives."""
        self._ways, self._mesh = ways, mesh
        self._received_QD = like.new_empty(sum(ways.arrival_rows), like.shape[1])
        layout = ways.layout
        rooms = dict(zip(layout.mine, self._received_QD.split(ways.arrivals_over()), strict=True))
        own, via = _messages(rooms, {near: ways.arrivals_of(near)[0] for near in rooms}, ways)
        self._expected_own = expect_blocks(own, mesh, "ep", op=f"{op} inside hosts")
        self._expected_via = expect_blocks(via, mesh, "ep", op=f"{op} inside hosts")
        # What this rank sends itself, it lays where it is received.
        self._buffers = {
            near: room if near == layout.place else _room(like, ways.parts_for(near))
            for near, room in rooms.items()
        }
        # Where crossed rows go: [near rank][source that this rank speaks for].
        self.passed_on = [
            list(buffer.split(ways.parts_for(near))[1:]) for near, buffer in self._buffers.items()
        ]

    def send_own(self, x_TD: Tensor, token_of_row_R: Tensor, weights_R: Tensor | None) -> None:
        """Lay out the rows of this rank's tokens for this host, and send them if they are many."""
        for near, buffer in self._buffers.items():
            rows = self._ways.home[near]
            weights = None if weights_R is None else weights_R[rows]
            tokens = token_of_row_R[rows]
            take(x_TD, tokens, weights, out=buffer[: len(tokens)])
        own_rows = {near: self._ways.own_rows(near) for near in self._buffers}
        own, self._via = _messages(self._buffers, own_rows, self._ways)
        self._sent_own = self._expected_own.send(own)

    def pass_on(self) -> None:
        """Start to send the rest, `passed_on` included."""
        self._sent_via = self._expected_via.send(self._via)

    def finish(self) -> Tensor:
        """Return all rows [Q, D] in the order of arrival."""
        self._sent_via.wait()
        self._sent_own.wait()
        self._mesh.traffic.count(Link.LOCAL, self._buffers[self._ways.layout.place].nbytes)
        rows_QD = self._received_QD
        del self._received_QD, self._buffers, self._via, self.passed_on
        return rows_QD


class WayBack:
    """Bring rows from the experts of this host home, or to who speaks for their source.

    A long message between hosts is cut in two, as in RowCrossing, and the other way round: first
    the rows of this rank's own experts, which need no passing on.
    """

    def __init__(self, ways: Ways, mesh: Mesh, op: str, *, like: Tensor) -> None:
        """Make room at home and post the receives."""
        self._ways, self._mesh = ways, mesh
        layout = ways.layout
        self._rows_RD = like.new_empty(ways.home[-1].stop, like.shape[1])
        nothing = like.new_empty(0)
        own, via, first, second = ([nothing] * len(ways.home) for _ in range(4))
        self._rooms: dict[int, Tensor] = {}  # what comes from each near rank
        for near in layout.mine:
            if near != layout.place:
                parts = ways.parts_for(near)
                if _is_apart(parts[0], like):
                    own[near] = self._rows_RD[ways.home[near]]
                    parts = [0, *parts[1:]]
                via[near] = self._rooms[near] = _room(like, parts)
        self._from_hosts: list[tuple[Tensor, list[int]]] = []
        for host, partner in layout.partners.items():
            places = layout.members[host]
            if is_long(ways.rows_for(host), like):
                first[partner] = self._rows_RD[ways.home[partner]]
                places = [place for place in places if place != partner]
            second[partner] = ways.of_places(self._rows_RD, places)
            self._from_hosts.append((second[partner], places))
        inside, between = f"{op} inside hosts", f"{op} between hosts"
        self._expected_via = expect_blocks(via, mesh, "ep", op=inside)
        self._expected_own = expect_blocks(own, mesh, "ep", op=inside)
        self._expected_first = expect_blocks(first, mesh, "ep", op=between)
        self._expected_second = expect_blocks(second, mesh, "ep", op=between)

    def send(self, rows_QD: Tensor) -> None:
        """Start to send the experts' rows, which are in the order of arrival."""
        layout, ways = self._ways.layout, self._ways
        buffers = dict(zip(layout.mine, rows_QD.split(ways.arrivals_over()), strict=True))
        own_rows = {near: ways.arrivals_of(near)[0] for near in buffers}
        own, via = _messages(buffers, own_rows, ways)
        mine = self._rooms[layout.place] = buffers[layout.place]
        first = [rows_QD.new_empty(0)] * len(ways.home)
        _, *passed_on = mine.split(ways.parts_for(layout.place))
        for (source, per_near), rows in zip(ways.via_rows.items(), passed_on, strict=True):
            if is_long(sum(per_near), rows_QD):
                first[source] = rows
        # What has the longest way to go leaves first.
        self._sent_first = self._expected_first.send(first)
        self._sent_via = self._expected_via.send(via)
        self._sent_own = self._expected_own.send(own)

    def finish(self) -> Tensor:
        """Pass on; return this rank's rows [R, D] in the order of the plan."""
        ways, layout, rows_RD = self._ways, self._ways.layout, self._rows_RD
        self._sent_via.wait()
        parts = {}
        for near in layout.mine:
            _, *per_source = ways.parts_for(near)
            num_own = len(self._rooms[near]) - sum(per_source)
            parts[near] = self._rooms[near].split([num_own, *per_source])
        second = [rows_RD.new_empty(0)] * len(ways.home)
        for number, (source, per_near) in enumerate(ways.via_rows.items(), start=1):
            is_cut = is_long(sum(per_near), rows_RD)
            nears = [near for near in layout.mine if not (is_cut and near == layout.place)]
            second[source] = torch.cat([rows_RD[:0], *(parts[near][number] for near in nears)])
        sent = self._expected_second.send(second)
        for near, (own, *_) in parts.items():
            if len(own):
                rows_RD[ways.home[near]] = own
        self._mesh.traffic.count(Link.LOCAL, self._rooms[layout.place].nbytes)
        for handle in (self._sent_first, sent, self._sent_own):
            handle.wait()
        for rows, places in self._from_hosts:
            ways.put_back(rows, rows_RD, places)
        return rows_RD


def _room(like: Tensor, parts: list[int]) -> Tensor:
    return like.new_empty(sum(parts), like.shape[1])


def _is_apart(num_rows: int, like: Tensor) -> bool:
    return num_rows * like.shape[1] * like.itemsize >= APART_BYTES


def _messages(
    buffers: dict[int, Tensor], own_rows: dict[int, int], ways: Ways
) -> tuple[list[Tensor], list[Tensor]]:
    """Cut each buffer into what goes apart and the rest, by place; nothing for this rank itself."""
    some = next(iter(buffers.values()))
    apart, rest = ([some.new_empty(0)] * len(ways.home) for _ in range(2))
    for near, buffer in buffers.items():
        if near != ways.layout.place:
            start = own_rows[near] if _is_apart(own_rows[near], buffer) else 0
            apart[near], rest[near] = buffer[:start], buffer[start:]
    return apart, rest
