"""Measure the memory of decoding: honest bytes, and the worst of hostile ones.

Run as a program, because a peak belongs to a process. Prints [compressor, outcome, growth of the
peak as a multiple of the decoded vector] of each case as JSON. The payload itself is not counted,
it was there before; bytes are copied once, so it is given as a tensor.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from compressor_cases import CONTRACTIVE, UNBIASED  # type: ignore[import-not-found]

from gangline.comm.compression import Compressor, PayloadError

NUM = 2_000_000


def status_kib(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1])


def peak_growth(compressor: Compressor, payload: torch.Tensor) -> tuple[str, float]:
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status_kib("VmRSS")
    try:
        compressor.decompress(payload, NUM)
        outcome = "decoded"
    except PayloadError:
        outcome = "refused"
    return outcome, (status_kib("VmHWM") - before) * 1024 / (4 * NUM)


def main() -> None:
    torch.set_num_threads(1)
    x = torch.randn(NUM, generator=torch.Generator().manual_seed(0))
    found = []
    for compressor in UNBIASED + CONTRACTIVE:
        honest = compressor.compress(x, seed=1)
        ones, zeros = honest.clone(), honest.clone()
        ones[16:] = 255
        zeros[16:] = 0
        for payload in (honest, ones, zeros):
            outcome, growth = peak_growth(compressor, payload)
            found.append([repr(compressor), outcome, growth])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
