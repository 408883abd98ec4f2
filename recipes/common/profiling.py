"""Measure the machine: its bfloat16 speed, and the peak memory of a piece of work."""

import ctypes
import gc
import sys
import threading
import time
from pathlib import Path

import torch


def bf16_speed_up() -> float:
    """
    Measure how many times faster a matrix product is in bfloat16 than in float32; this takes milliseconds.

    The result is 5 or more on GPUs and on CPUs with AMX or AVX512-BF16. It is about 0.01 on CPUs that emulate
    bfloat16: do not train in bfloat16 there.
    """
    # On a GPU, only a large product can be measured.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = 8192 if device == "cuda" else 512
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            (matrix @ matrix)[0, 0].item()  # waits for a GPU
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


class PeakMemory:
    """
    Peak memory of this process inside a `with` block, in bytes. A figure that the system does not count is None.

    - `added`: growth during the block: of the GPU's allocated bytes with CUDA, else of the resident set (Linux).
    - `added_resident`: growth of the resident set (Linux), also on a machine with a GPU.
    - `resident`: the resident set of the process (Linux).
    - `private`: the resident set without the pages of mapped files, sampled every 10 ms (Linux). The system can take
      those pages back at any time.
    """

    def __enter__(self):
        self.added = self.added_resident = self.resident = self.private = None
        self._cuda = torch.cuda.is_available()
        self._linux = sys.platform == "linux"
        gc.collect()
        if self._linux:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
            self._resident_before = self._status("VmRSS")
            self.private = 0
            self._ended = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error):
        if self._linux:
            self._ended.set()
            self._thread.join()
            self.resident = self._status("VmHWM")
            self.added = self.added_resident = self.resident - self._resident_before
        if self._cuda:
            self.added = torch.cuda.max_memory_allocated() - self._before

    def megabytes(self, name: str) -> int | None:
        """Return `resident`, `private` or `added` in MiB; None if the system does not count it."""
        value = getattr(self, name)
        return None if value is None else round(value / 2**20)

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    def _watch(self):
        while True:
            self.private = max(self.private, self._status("RssAnon"))
            if self._ended.wait(0.01):
                return
