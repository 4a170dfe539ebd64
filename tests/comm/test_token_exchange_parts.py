"""What a token exchange is made of, without ranks: choice, index arithmetic, partners, overlap."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gangline.comm.host_layout import host_layout
from gangline.comm.mesh import Mesh
from gangline.comm.row_order import regroup, take_runs
from gangline.comm.token_exchange import DEFAULT_CHUNKS, Piece, make
from gangline.comm.token_exchange_autograd import BACKWARD, FORWARD, come_home, depart
from gangline.comm.token_exchange_choice import KINDS, resolve
from gangline.comm.token_exchange_flat import FlatCarrier, cut
from gangline.kernels.permute import plan_permutation


@pytest.mark.parametrize(
    ("hosts", "top_k", "kind", "deduplicate"),
    [
        ((0,), 2, "local", False),
        ((0, 0, 0, 0), 2, "all_to_all", False),
        ((0, 0, 1, 1), 2, "hierarchical", True),
        ((0, 1, 2), 2, "hierarchical", True),
        ((0, 1, 1), 1, "hierarchical", False),
        ((0, 1, 2), 1, "all_to_all", False),
    ],
)
def test_auto_chooses_by_the_hosts_and_says_why(hosts, top_k, kind, deduplicate):
    choice = resolve("auto", hosts, top_k=top_k)
    assert (choice.kind, choice.deduplicate) == (kind, deduplicate)
    assert len(choice.reason.split()) > 3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("auto", "local")])
def test_a_kind_that_was_set_is_taken(kind):
    assert resolve(kind, (0, 0, 1)).kind == kind
    assert resolve(kind, (0,)).kind == "local"


def test_what_a_kind_cannot_do_is_refused():
    with pytest.raises(ValueError, match="divided over 2 ranks"):
        resolve("local", (0, 0))
    with pytest.raises(ValueError, match="chunks is 3"):
        make("all_to_all", chunks=3)
    with pytest.raises(ValueError, match="cannot deduplicate"):
        make("all_to_all", deduplicate=True)
    with pytest.raises(ValueError, match="resolve"):
        make("auto")


# ---- index arithmetic


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=1, max_size=4))
def test_regrouped_rows_keep_their_order(table):
    lengths = torch.tensor(table)
    labels = [(a, b, n) for a, row in enumerate(table) for b, k in enumerate(row) for n in range(k)]
    order = regroup(lengths, len(labels))
    wanted = sorted(labels, key=lambda label: (label[1], label[0], label[2]))
    assert [labels[index] for index in order.tolist()] == wanted
    inverse = regroup(lengths.t(), len(labels))
    assert order[inverse].tolist() == list(range(len(labels)))


def test_runs_can_be_taken_in_any_order_and_left_out():
    order = take_runs(torch.tensor([2, 0, 3, 1]), torch.tensor([3, 1, 0]), 3)
    assert order.tolist() == [5, 0, 1]


@pytest.mark.parametrize(
    ("num_experts", "num_chunks", "sizes"),
    [(4, 2, [2, 2]), (3, 2, [1, 2]), (2, 4, [1, 1]), (1, 1, [1])],
)
def test_chunks_are_even_runs_of_whole_experts(num_experts, num_chunks, sizes):
    assert [experts.stop - experts.start for experts in cut(num_experts, num_chunks)] == sizes


# ---- who speaks for whom


@settings(max_examples=50, deadline=None)
@given(hosts=st.lists(st.integers(0, 3), min_size=1, max_size=9), data=st.data())
def test_every_rank_has_one_partner_on_each_other_host(hosts, data):
    place = data.draw(st.integers(0, len(hosts) - 1))
    layout = host_layout(tuple(hosts), place)
    assert set(layout.partners) == set(hosts) - {hosts[place]}
    for host, partner in layout.partners.items():
        assert hosts[partner] == host
        assert place in layout.speaks_for(partner)
    # And all rows arrive: each source's over exactly one rank of this host.
    assert sorted(layout.arrivals) == list(range(len(hosts)))
    # Nobody speaks for many more than others.
    load = Counter(len(layout.speaks_for(near)) for near in layout.mine)
    most = sum(-(-hosts.count(h) // len(layout.mine)) for h in set(hosts) - {hosts[place]})
    assert max(load) <= most


# ---- overlap


def test_chunks_overlap_in_the_forward_and_mirrored_in_the_backward():
    """Starts come before the waits of what was started earlier, by themselves."""
    log = []

    class LoggedTrip:
        def __init__(self, trip, direction):
            self.trip, self.direction = trip, direction
            log.append(f"{direction.out}: all leave")

        def arrive(self, block):
            log.append(f"{self.direction.out}: {block} arrives")
            return self.trip.arrive(block)

        def send_back(self, block, rows_QD):
            log.append(f"{self.direction.back}: {block} leaves")
            self.trip.send_back(block, rows_QD)

        def come_home(self):
            log.append(f"{self.direction.back}: all are home")
            return self.trip.come_home()

    class Logged(FlatCarrier):
        def leave(self, x_TD, weights_R, direction):
            return LoggedTrip(super().leave(x_TD, weights_R, direction), direction)

    class Expert(torch.autograd.Function):
        @staticmethod
        def forward(ctx, rows, block):
            ctx.block = block
            log.append(f"expert {block}")
            return rows * 2

        @staticmethod
        def backward(ctx, *grads):
            log.append(f"expert {ctx.block} backward")
            return grads[0] * 2, None

    plan = plan_permutation(torch.tensor([[0, 1], [1, 2], [2, 0]]), 3)
    x, weights = torch.randn(3, 4, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    way = depart(x, plan, Logged(plan, Mesh.single(), num_chunks=3))
    blocks = (block for group in way.groups for block in group)
    pieces = (Piece(b, slice(0, 4), Expert.apply(b.rows_QD, b.index)) for b in blocks)
    come_home(pieces, way, weights).sum().backward()
    forward = [
        step
        for block in (0, 1, 2)
        for step in (f"dispatch: {block} arrives", f"expert {block}", f"combine: {block} leaves")
    ]
    backward = [
        step
        for block in (2, 1, 0)
        for step in (
            f"combine backward: {block} arrives",
            f"expert {block} backward",
            f"dispatch backward: {block} leaves",
        )
    ]
    assert log == [
        "dispatch: all leave", *forward, "combine: all are home",
        "combine backward: all leave", *backward, "dispatch backward: all are home",
    ]  # fmt: skip


def test_the_chunk_that_is_wanted_first_leaves_first():
    plan = plan_permutation(torch.tensor([[0, 1], [1, 2], [2, 0]]), 3)
    carrier = FlatCarrier(plan, Mesh.single(), num_chunks=3)
    assert list(carrier.leave(torch.ones(3, 4), None, FORWARD)._handles) == [0, 1, 2]
    assert list(carrier.leave(torch.ones(3, 4), torch.ones(6), BACKWARD)._handles) == [2, 1, 0]


@pytest.mark.parametrize(
    "exchange",
    [
        make("local"), make("all_to_all"), make("chunked", chunks=2), make("all_gather"),
        make("hierarchical"), make("hierarchical", deduplicate=True),
    ],
    ids=lambda exchange: f"{exchange.kind} {getattr(exchange, 'deduplicate', '')}",
)  # fmt: skip
def test_the_device_is_waited_for_once_for_the_sizes(exchange, monkeypatch):
    """Reading a tensor's numbers, or a shape that depends on them, waits for a GPU."""
    waits = []
    tolist = torch.Tensor.tolist

    def counted(tensor):
        waits.append("tolist")
        return tolist(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name in (
                "_local_scalar_dense",
                "nonzero",
                "masked_select",
                "_unique2",
                "unique_dim",
            ):
                waits.append(name)
            # Without the size of its output, it has to read the repeats.
            if name == "repeat_interleave" and (kwargs or {}).get("output_size") is None:
                waits.append(name)
            return func(*args, **(kwargs or {}))

    plan = plan_permutation(torch.tensor([[0, 1], [1, 2], [2, 0]]), 3)
    x, weights = torch.randn(3, 4, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    with Watch():
        way = exchange.dispatch(x, plan, Mesh.single())
        blocks = (block for group in way.groups for block in group)
        pieces = (Piece(block, slice(0, 4), block.rows_QD * 2) for block in blocks)
        exchange.combine(pieces, way, weights).sum().backward()
    assert waits == ([] if exchange.kind == "local" else ["tolist"])


def test_the_default_number_of_chunks_is_the_documented_one():
    assert make("chunked") == make("chunked", chunks=DEFAULT_CHUNKS)
    assert DEFAULT_CHUNKS == 4
