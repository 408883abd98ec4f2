"""What this machine is good at, and what a piece of work takes of it."""

import resource
import threading
import time
from pathlib import Path

import torch


def bf16_speed_up(device: str | torch.device | None = None, size: int = 512) -> float:
    """
    How many times faster a matmul runs in bfloat16 than in float32 here, measured in milliseconds: 5 and more on CPUs with
    AMX or AVX512-BF16 and on GPUs, but 0.01 on CPUs that emulate it, where nobody wants to train in it.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
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
    Peak memory of this process inside a `with`, in bytes, sampled every 10 ms from Linux's /proc: `resident`, and of it
    `private`, without the pages of mapped files, which the system takes back when it needs them.
    """

    def __enter__(self):
        self.resident = self.private = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._ended.set()
        self._thread.join()

    def _watch(self):
        page = resource.getpagesize()
        while True:
            _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
            self.resident = max(self.resident, resident * page)
            self.private = max(self.private, (resident - shared) * page)
            if self._ended.wait(0.01):
                return
