"""What this machine is good at."""

import time

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
