"""Encodings on an accelerator, beside the teacher's forward pass: `make bench-encodings_gpu`.

Says so where there is none.

Every encoding of 1,000-class rows, on the device, against the forward pass of a ResNet-50 in bf16 on as many images:
the bound is 2%. Interleaved, medians, timed by the device's own events.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from softlabels.encodings import make_encoding, rng_keys
from softlabels.precompute.pipeline.device_step import pack_figures

ROWS, CLASSES, ROUNDS = 256, 1_000, 15
BOUND = 0.02
OUT = Path(__file__).parent / "out" / "encodings_gpu.json"
ENCODINGS: tuple[tuple[str, dict[str, object]], ...] = (
    ("f16", {}),
    ("bf16", {}),
    ("q8", {}),
    ("q6", {}),
    ("q4", {}),
    ("topk", {"k": 50}),
    ("sampled", {"head": 16, "draws": 32}),
)


class Bottleneck(nn.Module):
    """A residual block of ResNet-50 (He et al. 2015, table 1)."""

    def __init__(self, wide_in: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(wide_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)),
        )
        same = stride == 1 and wide_in == out
        self.skip = nn.Identity() if same else nn.Sequential(nn.Conv2d(wide_in, out, 1, stride), nn.BatchNorm2d(out))

    def forward(self, images: Tensor) -> Tensor:
        """Body plus skip, rectified."""
        return torch.relu(self.body(images) + self.skip(images))


def resnet50() -> nn.Module:
    """ResNet-50 with random weights: its time does not depend on them."""
    layers: list[nn.Module] = [
        *(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    ]
    wide = 64
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            layers.append(Bottleneck(wide, width, stride if block == 0 else 1))
            wide = 4 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, CLASSES))


def milliseconds(work: Callable[[], object]) -> float:
    """Device time of `work`."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop))


def main() -> None:
    """Measure, print, write `benchmarks/out/encodings_gpu.json`."""
    if not torch.cuda.is_available():
        print("there is no CUDA device here: nothing was measured")
        return
    model = resnet50().cuda().eval().to(torch.bfloat16, memory_format=torch.channels_last)
    images = torch.randn(ROWS, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    images = images.contiguous(memory_format=torch.channels_last)
    logits = 4 * torch.randn(ROWS, CLASSES, device="cuda")
    logits -= logits.amax(dim=1, keepdim=True)
    keys = rng_keys("bench", np.arange(ROWS))
    encodings = {name: make_encoding(name, classes=CLASSES, params=params) for name, params in ENCODINGS}
    work: dict[str, Callable[[], object]] = {"forward": lambda: model(images)}
    for name, encoding in encodings.items():
        work[name] = lambda e=encoding: e.encode_torch(logits, keys_B=keys)
    work["audit"] = lambda: pack_figures(logits, logits, temperatures=(1.0, 4.0), captured=1.0).cpu()
    times: dict[str, list[float]] = {name: [] for name in work}
    with torch.inference_mode():
        for number in range(ROUNDS + 3):
            for name, each in work.items():
                spent = milliseconds(each)
                if number >= 3:
                    times[name].append(spent)
    forward = statistics.median(times["forward"])
    table = [
        {"what": name, "ms": round(statistics.median(spent), 4), "share": round(statistics.median(spent) / forward, 4)}
        for name, spent in times.items()
    ]
    print(f"{torch.cuda.get_device_name()}: {ROWS} rows of {CLASSES}, bound {BOUND:.0%} of the forward pass")
    for line in table:
        print(f"{line['what']:<10}{line['ms']:>10} ms{line['share']:>10.2%}")
    OUT.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
