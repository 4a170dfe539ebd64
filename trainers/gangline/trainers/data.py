"""Samples of a run: windows of the prepared tokens, in an order that no number of workers changes.

Window i holds the seq_len + 1 tokens from i * seq_len on: inputs and, shifted by one, targets. So
every token but the first is a target exactly once. Windows run across documents; the
end-of-document token between them tells the model. The last windows are held out for validation
and never come in the training stream; the one token that they share with it is a target there and
only an input here.

Reading order: source_files, text_sources, tokenizer, prepare, token_file, sample_order, this file.
"""

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Never

import numpy as np
from numpy.typing import NDArray

from gangline.trainers import sample_order
from gangline.trainers.data_errors import DataError, TokenFileError
from gangline.trainers.prepare import prepare_dataset
from gangline.trainers.sample_order import share_of_batch
from gangline.trainers.token_file import DatasetInfo, TokenFile, read_info, verify
from gangline.trainers.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DataError",
    "DatasetInfo",
    "TokenDataset",
    "TokenFileError",
    "Tokenizer",
    "load_tokenizer",
    "prepare_dataset",
    "read_info",
    "share_of_batch",
    "split_windows",
    "verify",
]


class TokenDataset:
    """Give training samples by stream position, and the validation samples beside them.

    Raises: DataError if the tokens make no training sample; TokenFileError if the file is missing,
        damaged or another one than `info` says.
    Guarantees: position p of the stream always gives the same sample for the same (info, seq_len,
        validation_fraction, seed); each epoch of num_samples positions gives each of them once.
    """

    num_samples: int  # training samples
    num_validation_samples: int

    def __init__(
        self, info: DatasetInfo, *, seq_len: int, seed: int, validation_fraction: float
    ) -> None:
        self.info = info
        self.seq_len = seq_len
        self.seed = seed
        self.num_samples, self.num_validation_samples = split_windows(
            info.num_tokens, seq_len=seq_len, validation_fraction=validation_fraction
        )
        self._file = TokenFile(info)

    def sample_ids(self, cursor: int, count: int) -> NDArray[np.int64]:
        """Give the sample ids of the stream positions [cursor, cursor + count).

        Shapes: [count] int64, each in [0, num_samples).
        """
        return sample_order.sample_ids(cursor, count, num_samples=self.num_samples, seed=self.seed)

    def tokens(self, ids: NDArray[np.int64]) -> "Tensor":
        """Read training samples.

        Shapes: ids [B], each in [0, num_samples) -> [B, seq_len + 1] int64.
        Raises: ValueError for an id that is no training sample; TokenFileError for damaged tokens.
        """
        return self._windows(ids, 0, self.num_samples, "training")

    def validation_tokens(self, ids: NDArray[np.int64]) -> "Tensor":
        """Read validation samples.

        Shapes: ids [B], each in [0, num_validation_samples) -> [B, seq_len + 1] int64.
        Raises: as `tokens`.
        """
        return self._windows(ids, self.num_samples, self.num_validation_samples, "validation")

    def _windows(self, ids: NDArray[np.int64], first: int, count: int, kind: str) -> "Tensor":
        # Here, since the order and the preparation of data are used where torch is not.
        import torch

        ids = np.asarray(ids, dtype=np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= count):
            raise ValueError(
                f"{kind} sample ids run from {ids.min()} to {ids.max()}; wanted 0 to {count - 1}"
            )
        windows = np.empty((ids.size, self.seq_len + 1), dtype=np.int64)
        for window, number in zip(windows, ids.tolist(), strict=True):
            self._file.read((first + number) * self.seq_len, window)
        return torch.from_numpy(windows)

    def __getstate__(self) -> Never:
        raise TypeError(
            "a TokenDataset maps a file and would be copied whole; send its DatasetInfo and open "
            "it on the other side"
        )


def split_windows(num_tokens: int, *, seq_len: int, validation_fraction: float) -> tuple[int, int]:
    """Count the training and the validation samples that so many tokens make.

    Raises: DataError if there is no window, or none is left to train on.
    """
    num_windows = max(0, (num_tokens - 1) // seq_len)
    if num_windows == 0:
        raise DataError(
            f"data.source gives {num_tokens} tokens, but one sample of data.seq_len {seq_len} "
            f"takes {seq_len + 1}; give more text in data.source or set data.seq_len to at most "
            f"{max(num_tokens - 1, 1)}"
        )
    # As the decimal that the user wrote: in binary 0.07 * 100 is more than 7.
    num_validation = math.ceil(Fraction(str(validation_fraction)) * num_windows)
    if num_validation >= num_windows:
        raise DataError(
            f"data.validation_fraction {validation_fraction} holds out {num_validation} of "
            f"{num_windows} samples of data.seq_len {seq_len} and leaves none to train on; give "
            "more text in data.source, or set data.seq_len or data.validation_fraction lower"
        )
    return num_windows - num_validation, num_validation
