"""The dataset: which samples come out, and which are held out."""

import math
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangline.trainers import token_file
from gangline.trainers.config import DataConfig
from gangline.trainers.data import (
    DataError,
    TokenDataset,
    load_tokenizer,
    prepare_dataset,
    share_of_batch,
    split_windows,
)


def all_tokens(info):
    dtype = np.dtype("<u2" if info.vocab_size <= 65536 else "<u4")
    data = Path(info.path).read_bytes()
    return np.frombuffer(data, dtype, info.num_tokens, token_file.HEADER_BYTES).tolist()


def prepared(source, cache, **fields):
    source = source if isinstance(source, (str, list)) else str(source)
    return prepare_dataset(DataConfig(source=source, **fields), cache)


@pytest.fixture
def info(tmp_path):
    """Several blocks of tokens, the last not full."""
    rng = np.random.default_rng(0)
    (tmp_path / "x.txt").write_bytes(rng.integers(32, 127, 20_001, dtype=np.uint8).tobytes())
    return prepared(tmp_path / "x.txt", tmp_path)


@pytest.fixture
def dataset(info):
    return TokenDataset(info, seq_len=64, seed=3, validation_fraction=0.07)


class TestTokenDataset:
    def test_windows_are_the_tokens_one_overlapping(self, info, dataset):
        tokens = all_tokens(info)
        windows = dataset.tokens(np.arange(dataset.num_samples))
        assert str(windows.dtype) == "torch.int64"
        assert windows.shape == (dataset.num_samples, 65)
        held_out = dataset.validation_tokens(np.arange(dataset.num_validation_samples))
        for number, window in enumerate([*windows.tolist(), *held_out.tolist()]):
            assert window == tokens[number * 64 : number * 64 + 65]
        # What is left over does not make another window.
        used = (dataset.num_samples + dataset.num_validation_samples) * 64 + 1
        assert 0 <= len(tokens) - used < 64

    def test_windows_cross_documents(self, tmp_path):
        (tmp_path / "x.jsonl").write_text('{"text": "ab"}\n{"text": "cde"}\n')
        info = prepared(tmp_path / "x.jsonl", tmp_path)
        dataset = TokenDataset(info, seq_len=3, seed=0, validation_fraction=0)
        assert dataset.tokens(np.array([0, 1])).tolist() == [[97, 98, 256, 99], [99, 100, 101, 256]]

    def test_no_validation_target_is_ever_a_training_target(self, dataset):
        last = dataset.num_samples
        first_target_of_validation = last * 64 + 1
        last_target_of_training = (last - 1) * 64 + 64
        assert last_target_of_training < first_target_of_validation

    def test_ids_give_rows_in_the_order_asked(self, dataset):
        ids = dataset.sample_ids(1000, 7)
        rows = dataset.tokens(ids)
        for number, row in zip(ids, rows, strict=True):
            assert dataset.tokens(np.array([number])).tolist() == [row.tolist()]
        assert (
            dataset.tokens(np.array([5, 5])).tolist() == dataset.tokens(np.array([5] * 2)).tolist()
        )
        assert dataset.tokens(np.array([], dtype=np.int64)).shape == (0, 65)

    def test_samples_outside_are_refused(self, dataset):
        n = dataset.num_samples
        for ids in ([-1], [n], [0, n + 5]):
            with pytest.raises(ValueError, match="training sample ids"):
                dataset.tokens(np.array(ids))
        with pytest.raises(ValueError, match="validation sample ids"):
            dataset.validation_tokens(np.array([dataset.num_validation_samples]))

    def test_the_order_depends_on_seed_and_epoch(self, info, dataset):
        other = TokenDataset(info, seq_len=64, seed=4, validation_fraction=0.07)
        n = dataset.num_samples
        assert not np.array_equal(dataset.sample_ids(0, n), other.sample_ids(0, n))
        assert not np.array_equal(dataset.sample_ids(0, n), dataset.sample_ids(n, n))

    @pytest.mark.parametrize("world_size", [1, 2, 3, 4])
    def test_an_epoch_over_any_number_of_workers_reads_every_sample_once(self, dataset, world_size):
        seen: Counter[tuple[int, ...]] = Counter()
        for cursor in range(0, dataset.num_samples, 10):
            size = min(10, dataset.num_samples - cursor)
            for rank in range(world_size):
                first, last = share_of_batch(cursor, size, rank, world_size)
                rows = dataset.tokens(dataset.sample_ids(first, last - first))
                seen.update(map(tuple, rows.tolist()))
        everything = dataset.tokens(np.arange(dataset.num_samples)).tolist()
        assert seen == Counter(map(tuple, everything))

    def test_it_is_never_pickled(self, dataset):
        with pytest.raises(TypeError, match="send its DatasetInfo"):
            pickle.dumps(dataset)
        assert pickle.loads(pickle.dumps(dataset.info)) == dataset.info  # noqa: S301

    def test_decodes_to_the_text(self, info, dataset):
        text = load_tokenizer(info.tokenizer).decode(dataset.tokens(np.array([0]))[0].tolist())
        assert text.encode() == bytes(all_tokens(info)[:65])


class TestSplitWindows:
    @given(
        num_tokens=st.integers(0, 10**12),
        seq_len=st.integers(1, 10**6),
        fraction=st.one_of(st.floats(0, 0.5), st.integers(0, 500).map(lambda n: n / 1000)),
    )
    def test_splits_all_windows_or_refuses(self, num_tokens, seq_len, fraction):
        num_windows = max(0, (num_tokens - 1) // seq_len)
        try:
            train, held_out = split_windows(
                num_tokens, seq_len=seq_len, validation_fraction=fraction
            )
        except DataError:
            assert num_windows <= math.ceil(num_windows * fraction)
            return
        assert train + held_out == num_windows
        assert train >= 1
        assert (held_out == 0) == (fraction == 0)
        assert abs(held_out - fraction * num_windows) <= 1

    @pytest.mark.parametrize(("fraction", "held_out"), [(0.07, 7), (0.01, 1), (0.29, 29), (0, 0)])
    def test_a_decimal_fraction_is_taken_at_its_word(self, fraction, held_out):
        # 0.07 * 100 is 7.000000000000001 and 0.29 * 100 is 28.999999999999996.
        assert split_windows(1001, seq_len=10, validation_fraction=fraction) == (
            100 - held_out,
            held_out,
        )

    @pytest.mark.parametrize("num_tokens", [1, 2, 256])
    def test_too_little_text_for_one_sample_is_refused(self, num_tokens):
        with pytest.raises(DataError, match=r"takes 257.*data\.seq_len to at most") as caught:
            split_windows(num_tokens, seq_len=256, validation_fraction=0)
        assert "data.source" in str(caught.value)

    def test_too_little_text_for_training_is_refused(self):
        with pytest.raises(DataError, match=r"data\.validation_fraction 0\.01 holds out 1 of 1"):
            split_windows(257, seq_len=256, validation_fraction=0.01)
        assert split_windows(257, seq_len=256, validation_fraction=0) == (1, 0)
        assert split_windows(513, seq_len=256, validation_fraction=0.01) == (1, 1)
