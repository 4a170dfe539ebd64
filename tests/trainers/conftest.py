"""What the trainer's tests share: a small text, tokenised once for all of them."""

import pytest

from gangline.trainers.config import DataConfig
from gangline.trainers.data import DatasetInfo, prepare_dataset


@pytest.fixture(scope="session")
def info(tmp_path_factory: pytest.TempPathFactory) -> DatasetInfo:
    folder = tmp_path_factory.mktemp("data")
    text = "".join(f"line {n} says {n * n % 97} and no more\n" for n in range(400))
    (folder / "text.txt").write_text(text)
    config = DataConfig(source=str(folder / "text.txt"))
    return prepare_dataset(config, folder / "cache", lambda line: None)
