"""Gradient buckets and sliced layers, against one process and one collective."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from gangline.comm.fusion import GradientBuckets, Slot
from gangline.comm.fusion_slices import SliceLayout, slice_places
from gangline.comm.mesh import Mesh

SCENARIOS = Path(__file__).with_name("fusion_scenarios.py")
# The pool of ranks outlives the examples on purpose.
many_cases = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.ranks
@many_cases
@given(data=st.data())
def test_buckets_give_what_one_all_reduce_gives(rank_pool, data):
    world_size = data.draw(st.integers(1, 4))
    degree = data.draw(st.sampled_from([d for d in (1, 2, 3, 4) if world_size % d == 0]))
    sizes = data.draw(st.lists(st.integers(1, 300), min_size=1, max_size=8))
    numbers = st.lists(st.integers(0, len(sizes) - 1), unique=True)
    has_all = data.draw(st.booleans())
    missing = [[] if has_all else data.draw(numbers) for _ in range(world_size)]
    bucket_bytes = data.draw(st.integers(0, 4 * sum(sizes) + 8))
    of_experts = [data.draw(st.booleans()) for _ in sizes]
    started = rank_pool.run(
        world_size,
        (SCENARIOS, "reduce_in_buckets"),
        expert_parallel=degree,
        sizes=sizes,
        of_experts=of_experts,
        bucket_bytes=bucket_bytes,
        num_microbatches=data.draw(st.integers(1, 3)),
        missing=missing,
    )
    # All ranks started the same buckets in the same order; together they are all parameters.
    assert all(of_rank == started[0] for of_rank in started)
    assert sum(length for _, length, _ in started[0]) == sum(sizes)
    for _, length, _ in started[0]:
        assert 4 * length <= 17 / 16 * max(bucket_bytes, 4 * max(sizes))
    if bucket_bytes == 0:
        assert len(started[0]) == len(sizes)
    if bucket_bytes >= 4 * sum(sizes):
        assert len(started[0]) == len(set(of_experts))


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_bucket_is_summed_while_backward_runs(rank_pool, world_size):
    for events in rank_pool.run(world_size, (SCENARIOS, "overlap"), num_layers=4, dim=16):
        assert events == [
            "start 0",
            "start 1",
            "start 2",
            "first bucket is summed",
            "start 3",
            "backward ends",
        ]


@pytest.mark.ranks
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize(("world_size", "victim"), [(2, 1), (4, 2)])
def test_a_rank_killed_in_backward_is_seen_by_all(rank_pool, world_size, victim, sliced):
    found = rank_pool.run(
        world_size,
        (SCENARIOS, "lose_a_peer_in_backward"),
        may_die=(victim,),
        victim=victim,
        sliced=sliced,
    )
    assert found.pop(victim) is None, "the victim is alive"
    for seen in found:
        assert seen["error"] == "PeerLostError", seen
        assert seen["op"] in ("all_reduce", "all_gather", "reduce_scatter")
        assert seen["waited_s"] < 15, "that was the time-out, or nearly"


def buckets_of(*sizes: int, bucket_bytes: int = 1 << 20):
    grads = torch.zeros(sum(sizes))
    slots, end = [], 0
    for size in sizes:
        parameter = nn.Parameter(torch.ones(size))
        parameter.grad = grads[end : end + size]
        slots.append(Slot(parameter, end, end + size, "world"))
        end += size
    return GradientBuckets(grads, slots, bucket_bytes=bucket_bytes), slots, grads


def test_a_gradient_after_the_reduction_is_an_error():
    buckets, slots, _ = buckets_of(3)

    def backward_twice():
        with buckets.filling(Mesh.single()):
            slots[0].parameter.sum().backward()
            slots[0].parameter.sum().backward()

    with pytest.raises(RuntimeError, match="one backward per"):
        backward_twice()
    with buckets.filling(Mesh.single()):  # and the next step works
        slots[0].parameter.sum().backward()
    buckets.wait()


def test_a_gradient_outside_of_the_buffer_is_an_error():
    buckets, slots, _ = buckets_of(3)
    slots[0].parameter.grad = None
    never = pytest.raises(AssertionError, match="never set them to None")
    with never, buckets.filling(Mesh.single()):
        slots[0].parameter.sum().backward()


def test_a_bucket_holds_so_many_bytes_or_one_parameter():
    sizes = (10, 10, 50, 3, 10, 5, 5)
    buckets, _, _ = buckets_of(*sizes, bucket_bytes=80)
    assert [bucket.end - bucket.start for bucket in buckets.buckets] == [20, 53, 20]
    assert [bucket.num_slots for bucket in buckets.buckets] == [2, 2, 3]
    buckets, _, _ = buckets_of(*sizes, bucket_bytes=0)
    assert [bucket.end - bucket.start for bucket in buckets.buckets] == list(sizes)


def test_the_axes_start_in_the_order_in_which_they_are_full():
    parameters = [nn.Parameter(torch.ones(4)) for _ in range(5)]
    grads = torch.zeros(20)
    # Backward meets: dense, expert, dense, expert, dense. Experts lie behind the dense ones.
    places = [(0, "world"), (12, "dp"), (4, "world"), (16, "dp"), (8, "world")]
    slots = [
        Slot(p, start, start + 4, axis) for p, (start, axis) in zip(parameters, places, strict=True)
    ]
    buckets = GradientBuckets(grads, slots, bucket_bytes=32).buckets
    assert [(b.axis, b.start, b.end) for b in buckets] == [
        ("world", 0, 8), ("dp", 12, 20), ("world", 8, 12)
    ]  # fmt: skip


# Widths with a small common multiple, as a slice is a multiple of each.
widths = st.sampled_from([1, 2, 3, 5, 8, 16, 20, 24, 48])
shapes = st.lists(
    st.tuples(st.integers(1, 40)) | st.tuples(st.integers(1, 40), widths), min_size=1, max_size=6
)


@settings(max_examples=100, deadline=None)
@given(shapes=shapes, num_ranks=st.integers(1, 9))
def test_slices_hold_whole_rows_and_each_of_them_once(shapes, num_ranks):
    named = {f"p{number}": torch.Size(shape) for number, shape in enumerate(shapes)}
    layout = SliceLayout.of(named, num_ranks)
    whole = torch.arange(layout.num_elements, dtype=torch.float64)
    slices = whole.view(num_ranks, layout.slice_len)
    seen = []
    for name, view in layout.views(whole).items():
        assert view.shape == named[name]
        assert view.storage_offset() % 16 == 0
        seen.append(view.flatten())
        next_row = 0
        for rank in range(num_ranks):
            rows, first = layout.own_rows(slices[rank], name, rank)
            assert rows.shape[1:] == named[name][1:]
            if len(rows):
                assert first == next_row
                assert torch.equal(rows, view[first : first + len(rows)])
                # A view of the slice: what a load writes is in its place.
                assert rows.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
                next_row += len(rows)
        assert next_row == named[name][0]
    elements = torch.cat(seen)
    assert len(elements.unique()) == len(elements), "parameters overlap"
    assert layout.slice_len % 16 == 0


def test_the_padding_of_slices_is_small_for_usual_widths():
    for dim, ffn_dim in ((128, 352), (768, 2048), (4096, 14336)):
        named = {
            "qkv": torch.Size([3 * dim, dim]),
            "out": torch.Size([dim, dim]),
            "gate_up": torch.Size([2 * ffn_dim, dim]),
            "down": torch.Size([dim, ffn_dim]),
            "norm": torch.Size([dim]),
        }
        used = sum(map(math.prod, named.values()))
        for num_ranks in (2, 4, 8):
            assert SliceLayout.of(named, num_ranks).num_elements < 1.05 * used, (dim, num_ranks)


def test_slices_follow_each_other():
    layouts = [SliceLayout.of({"a": torch.Size([rows, 16])}, 2) for rows in (4, 2, 8)]
    assert slice_places(layouts) == [slice(0, 32), slice(32, 48), slice(48, 112)]


@pytest.mark.ranks
@pytest.mark.parametrize("num_microbatches", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_sliced_layers_compute_what_one_process_does(rank_pool, world_size, num_microbatches):
    found = rank_pool.run(
        world_size,
        (SCENARIOS, "slices_equal_one_process"),
        num_layers=5,
        dim=24,
        num_microbatches=num_microbatches,
    )
    for seen in found:
        assert 1 <= seen["most"] <= 2, "in backward the layer that computes and the next are whole"


@pytest.mark.ranks
@pytest.mark.parametrize("skips", [{0: 0}, {1: 1}, {2: 3}, {0: 0, 1: 3, 2: 2}])
def test_a_layer_that_a_rank_leaves_out_hangs_nobody(rank_pool, skips):
    rank_pool.run(
        3,
        (SCENARIOS, "slices_equal_one_process"),
        num_layers=4,
        dim=16,
        num_microbatches=2,
        skips=skips,
    )
