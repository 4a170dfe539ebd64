"""Fill torch.empty with NaN, so that a kernel which reads what it has not written shows."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _nan_filled_memory() -> Iterator[None]:
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(was_deterministic)
