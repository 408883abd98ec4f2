"""What this machine is good at, and what a piece of work takes of it."""

import ctypes
import gc
import sys
import threading
import time
from pathlib import Path

import torch


def bf16_speed_up() -> float:
    """
    How many times faster a matmul runs in bfloat16 than in float32 here, measured in milliseconds: 5 and more on CPUs with
    AMX or AVX512-BF16 and on GPUs, but 0.01 on CPUs that emulate it, where nobody wants to train in it.
    """
    device, size = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 512)  # a GPU takes no time for a small one
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
    Peak memory of this process inside a `with`, in bytes; None where nobody counts it, but on Linux and with CUDA.

    - `added`: what the block adds: to the resident set or, with CUDA, to the allocated bytes of the GPU.
    - `added_resident`: to the resident set, on Linux, also where there is a GPU: for work that is none of its.
    - `resident`: of the process, on Linux.
    - `private`: of that, without the pages of mapped files, which the system takes back when it needs them; sampled every
      10 ms, on Linux.
    """

    def __enter__(self):
        self.added = self.added_resident = self.resident = self.private = None
        self._cuda, self._linux = torch.cuda.is_available(), sys.platform == "linux"
        gc.collect()
        if self._linux:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again
            self._resident_before = self._status("VmRSS")
            self.private, self._ended = 0, threading.Event()
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
        """`resident`, `private` or `added` in MiB; None where the system does not tell."""
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
