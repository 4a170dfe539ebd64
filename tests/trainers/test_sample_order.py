"""The order of samples: a permutation for every n, even, and blind to the number of workers."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gangline.trainers.sample_order import MAX_SAMPLES, sample_ids, share_of_batch

SIZES = [
    *range(1, 35),
    *(2**k + d for k in (6, 8, 10, 12, 16) for d in (-1, 0, 1)),
    97,
    7919,
    65537,
    99991,
]


def epoch_order(num_samples, seed=0, epoch=0):
    return sample_ids(epoch * num_samples, num_samples, num_samples=num_samples, seed=seed)


@pytest.mark.parametrize("num_samples", [*SIZES, 10**6])
def test_an_epoch_holds_every_id_once(num_samples):
    for seed, epoch in ((0, 0), (1, 0), (2**63 - 1, 12345)):
        ids = epoch_order(num_samples, seed, epoch)
        assert ids.dtype == np.int64
        assert np.array_equal(np.sort(ids), np.arange(num_samples))


@given(
    num_samples=st.integers(1, 5000),
    seed=st.integers(0, 2**63 - 1),
    cursor=st.integers(0, 2**66),
    count=st.integers(0, 400),
    data=st.data(),
)
def test_a_position_gives_the_same_id_however_it_is_asked(num_samples, seed, cursor, count, data):
    ids = sample_ids(cursor, count, num_samples=num_samples, seed=seed)
    assert len(ids) == count
    if count:
        offset = data.draw(st.integers(0, count - 1))
        alone = sample_ids(cursor + offset, 1, num_samples=num_samples, seed=seed)
        assert alone.tolist() == [ids[offset]]


@given(num_samples=st.integers(1, 300), seed=st.integers(0, 2**63 - 1), epochs=st.integers(1, 4))
@settings(max_examples=60)
def test_a_run_of_epochs_covers_each_sample_once_per_epoch(num_samples, seed, epochs):
    ids = sample_ids(0, epochs * num_samples, num_samples=num_samples, seed=seed)
    for epoch in ids.reshape(epochs, num_samples):
        assert np.array_equal(np.sort(epoch), np.arange(num_samples))


@pytest.mark.parametrize("num_samples", [10**9 + 7, 2**40 - 1, 2**53 + 1, MAX_SAMPLES])
def test_a_huge_epoch_needs_no_memory_and_repeats_nothing(num_samples):
    ids = sample_ids(num_samples - 10_000, 10_000, num_samples=num_samples, seed=7)
    assert ids.min() >= 0
    assert ids.max() < num_samples
    assert np.unique(ids).size == ids.size
    # A uniform draw of 10,000 leaves no fifth of the range nearly empty.
    assert np.histogram(ids / num_samples, bins=5, range=(0, 1))[0].min() > 1800


def test_seed_and_epoch_both_change_the_order():
    orders = [epoch_order(1000, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    for first, left in enumerate(orders):
        for right in orders[first + 1 :]:
            # Two unrelated permutations agree in one place on average.
            assert np.count_nonzero(left == right) < 10


def test_the_order_is_frozen():
    # A resumed run must find the order of the version that started it.
    assert sample_ids(0, 8, num_samples=1000, seed=0).tolist() == [
        523,
        337,
        868,
        463,
        187,
        944,
        965,
        231,
    ]
    assert sample_ids(2**40, 4, num_samples=10**12, seed=42).tolist() == [
        283055633835,
        56454654685,
        643937932608,
        532491533720,
    ]


def deviations(counts, expected):
    """Say how unlikely a chi-square of `counts` is, in standard deviations of a normal variable.

    Source: E. Wilson, M. Hilferty, "The Distribution of Chi-Square", PNAS 17, 1931.
    """
    freedom = counts.size - 1
    ratio = ((counts - expected) ** 2 / expected).sum() / freedom
    return (np.cbrt(ratio) - 1 + 2 / (9 * freedom)) / np.sqrt(2 / (9 * freedom))


# Seeds are fixed, so a test that passes stays green; a bound of 4 is one in 30,000 for a new seed.


@pytest.mark.parametrize("num_samples", [2, 3, 4, 5])
def test_every_permutation_of_a_few_is_as_likely(num_samples):
    epochs = 6000
    ids = sample_ids(0, epochs * num_samples, num_samples=num_samples, seed=3)
    seen = Counter(map(tuple, ids.reshape(epochs, num_samples).tolist()))
    counts = np.array([seen[p] for p in permutations(range(num_samples))])
    assert deviations(counts, epochs / len(counts)) < 4


@pytest.mark.parametrize("num_samples", [6, 10, 16, 31, 100, 257])
def test_every_sample_is_as_likely_at_every_position(num_samples):
    epochs = 400_000 // num_samples
    ids = sample_ids(0, epochs * num_samples, num_samples=num_samples, seed=5)
    ids = ids.reshape(epochs, num_samples)
    for position in (0, 1, num_samples // 2, num_samples - 1):
        counts = np.bincount(ids[:, position], minlength=num_samples)
        assert deviations(counts, epochs / num_samples) < 4


@pytest.mark.parametrize("num_samples", [5, 6, 7, 16, 31, 100, 1000])
def test_neighbours_in_the_order_are_unrelated(num_samples):
    epochs = 200_000 // num_samples
    ids = sample_ids(0, epochs * num_samples, num_samples=num_samples, seed=11)
    ids = ids.reshape(epochs, num_samples)
    steps = (np.diff(ids, axis=1) % num_samples).ravel()
    counts = np.bincount(steps, minlength=num_samples)[1:]
    assert deviations(counts, steps.size / (num_samples - 1)) < 4


@pytest.mark.parametrize("num_samples", [1000, 4096, 10**5, 10**6])
@pytest.mark.parametrize("lag", [1, 2, 16, 64])
def test_serial_correlation_is_that_of_noise(num_samples, lag):
    ids = epoch_order(num_samples, seed=2).astype(np.float64)
    correlation = np.corrcoef(ids[:-lag], ids[lag:])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(num_samples)
    with_position = np.corrcoef(ids, np.arange(num_samples))[0, 1]
    assert abs(with_position) < 5 / np.sqrt(num_samples)


def test_every_part_of_an_epoch_draws_from_every_part_of_the_data():
    num_samples, parts = 10**6, 50
    ids = epoch_order(num_samples, seed=4)
    cells = (np.arange(num_samples) * parts // num_samples) * parts + ids * parts // num_samples
    counts = np.bincount(cells, minlength=parts * parts)
    # A bijection fixes the sums of rows and columns, which leaves (parts - 1)^2 free cells.
    scaled = deviations(counts, num_samples / parts**2)
    assert -7 < scaled < 4


@given(
    cursor=st.integers(0, 2**60),
    batch_size=st.integers(0, 3000),
    world_size=st.integers(1, 200),
)
def test_shares_are_the_batch_in_order_without_gap_or_overlap(cursor, batch_size, world_size):
    shares = [share_of_batch(cursor, batch_size, rank, world_size) for rank in range(world_size)]
    joined = [position for first, last in shares for position in range(first, last)]
    assert joined == list(range(cursor, cursor + batch_size))
    sizes = [last - first for first, last in shares]
    assert max(sizes) - min(sizes) <= 1


@given(
    num_samples=st.integers(1, 90),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 1000),
    attempts=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 6), st.booleans()), min_size=1, max_size=8
    ),
)
def test_the_samples_of_a_run_do_not_depend_on_its_workers(num_samples, batch_size, seed, attempts):
    """Change the world in mid-epoch, losing the step in flight or not: nothing is lost or doubled.

    `attempts`: (world size, committed steps, whether one more step ran and was not committed).
    """

    def step(cursor, world_size):
        return [
            number
            for rank in range(world_size)
            for first, last in [share_of_batch(cursor, batch_size, rank, world_size)]
            for number in sample_ids(first, last - first, num_samples=num_samples, seed=seed)
        ]

    committed, cursor = [], 0
    for world_size, num_steps, dies_in_flight in attempts:
        for _ in range(num_steps):
            committed += step(cursor, world_size)
            cursor += batch_size
        if dies_in_flight:
            step(cursor, world_size)
    alone = sample_ids(0, cursor, num_samples=num_samples, seed=seed)
    assert committed == alone.tolist()
    counts = Counter(committed)
    whole_epochs = cursor // num_samples
    assert all(whole_epochs <= counts[i] <= whole_epochs + 1 for i in range(num_samples))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_an_epoch_covers_every_sample_once_in_any_world(world_size):
    num_samples, batch_size = 1003, 17
    seen: Counter[int] = Counter()
    for cursor in range(0, num_samples, batch_size):
        size = min(batch_size, num_samples - cursor)
        for rank in range(world_size):
            first, last = share_of_batch(cursor, size, rank, world_size)
            seen.update(sample_ids(first, last - first, num_samples=num_samples, seed=9).tolist())
    assert seen == Counter(range(num_samples))


@pytest.mark.parametrize(
    ("cursor", "count", "num_samples"), [(-1, 1, 5), (0, -1, 5), (0, 1, 0), (0, 1, MAX_SAMPLES + 1)]
)
def test_senseless_positions_are_refused(cursor, count, num_samples):
    with pytest.raises(ValueError, match=r"is -?\d+"):
        sample_ids(cursor, count, num_samples=num_samples, seed=0)


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_world_is_refused(rank, world_size):
    with pytest.raises(ValueError, match="not in a world"):
        share_of_batch(0, 8, rank, world_size)
