"""Run an exported file on batches from standard input. Needs PyTorch or ONNX Runtime, but no other module from here.

python run_exported.py model.pt2 < requests > responses

A request is a line of JSON, {"shape": [N, 3, H, W]}, and the pixels. The response is a line of JSON, {"probabilities":
one list per image, "seconds": the time for this batch}. export.py checks its files with this program.
"""

import json
import math
import sys
import time
from collections.abc import Callable


def load(path: str) -> Callable[[bytes, list[int]], list[list[float]]]:
    """Return a function that computes the probabilities of images from their pixels and shape."""
    if path.lower().endswith(".onnx"):
        import numpy as np
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        def predict(pixels: bytes, shape: list[int]) -> list[list[float]]:
            images = np.frombuffer(pixels, dtype=np.uint8).reshape(shape)
            return session.run(["probabilities"], {"images": images})[0].tolist()
    else:
        import torch

        network = torch.export.load(path).module()

        def predict(pixels: bytes, shape: list[int]) -> list[list[float]]:
            images = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).reshape(shape)
            with torch.no_grad():
                return network(images).tolist()

    return predict


def main() -> None:
    """Answer requests until standard input ends."""
    responses, sys.stdout = sys.stdout, sys.stderr  # libraries may print
    predict = load(sys.argv[1])
    while line := sys.stdin.buffer.readline():
        shape = json.loads(line)["shape"]
        pixels = sys.stdin.buffer.read(math.prod(shape))
        started_at = time.perf_counter()
        probabilities = predict(pixels, shape)
        seconds = time.perf_counter() - started_at
        print(json.dumps({"probabilities": probabilities, "seconds": seconds}), file=responses, flush=True)


if __name__ == "__main__":
    main()
