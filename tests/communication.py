"""Measure how much of a step two processes spend on all-reduce. bench.py starts this program under torchrun.

It prints a line of JSON: seconds per step, seconds per step without communication, and the profiler's seconds of
all-reduce per step.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distributed import Distributed
from model import MODELS

STEPS = 8


def main() -> None:
    """Parse the command line, measure, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="resnet34")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--img-size", type=int, default=224)
    args = parser.parse_args()
    images = torch.randn(args.batch_size, 3, args.img_size, args.img_size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(5, (args.batch_size,))
    with Distributed() as dist:
        model = MODELS[args.model](num_classes=5).to(memory_format=torch.channels_last)
        learner = dist.wrap_ddp(model, torch.device("cpu"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)

        def steps(mode: contextlib.AbstractContextManager) -> float:
            start = time.perf_counter()
            with mode:
                for _ in range(STEPS):
                    optimizer.zero_grad()
                    F.cross_entropy(learner(images), labels).backward()
                    optimizer.step()
            return (time.perf_counter() - start) / STEPS

        steps(contextlib.nullcontext())
        found = {"step": steps(contextlib.nullcontext()), "without": steps(learner.no_sync())}
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            found["profiled step"] = steps(contextlib.nullcontext())
        reduced = [event for event in profiler.events() if event.name == "gloo:all_reduce"]
        found["all-reduce"] = sum(event.time_range.elapsed_us() for event in reduced) / 1e6 / STEPS
        found["bytes"] = 4 * sum(parameter.numel() for parameter in model.parameters())
        if dist.is_main:
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
