"""Speed of exported files, for bench.py."""

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import Comparison, compare, seconds_of

from backends import TorchBackend
from exported_file import write_exported
from exported_network import ExportedNetwork
from model import MODELS


def compare_exported(args: argparse.Namespace) -> None:
    """Compare exported files with the network in PyTorch, in float32 on the CPU."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        backend = TorchBackend(save_network(args, ["a", "b", "c", "d", "e"], folder), torch.device("cpu"), None)
        for name, run in exported_files(backend.model, args.img_size, Path(folder)).items():
            comparison = Comparison(args, f"exported file, {name}", name, "eager")
            compare(
                comparison,
                functools.partial(seconds_of_batches, run, args.img_size),
                functools.partial(seconds_of_batches, lambda batch: backend.predict([*batch]), args.img_size),
            )


def save_network(args: argparse.Namespace, class_names: list[str], folder: str) -> Path:
    """Save a best.pth of an untrained network."""
    path = Path(folder, "best.pth")
    content = {"model": args.model, "class_names": class_names, "img_size": args.img_size}
    torch.save(content | {"state_dict": MODELS[args.model](num_classes=len(class_names)).state_dict()}, path)
    return path


def exported_files(model, img_size: int, folder: Path) -> dict[str, Callable[[torch.Tensor], object]]:
    """Export a network in all formats. Returns a function for each that runs it on a batch."""
    import onnxruntime

    def load_onnx(name: str) -> Callable[[torch.Tensor], object]:
        session = onnxruntime.InferenceSession(folder / name)
        return lambda images: session.run(["probabilities"], {"images": images.numpy()})

    network = ExportedNetwork(model)
    write_exported(network, img_size, None, {}, folder / "a.pt2")
    write_exported(network, img_size, None, {}, folder / "a.onnx")
    noise = torch.randint(256, (8, 3, img_size, img_size), dtype=torch.uint8)
    write_exported(network, img_size, None, {}, folder / "int8.onnx", [noise])
    files = {"onnx": load_onnx("a.onnx"), "onnx int8": load_onnx("int8.onnx")}
    files["pt2"] = torch.export.load(folder / "a.pt2").module()
    program = torch.export.export(network, (noise,), dynamic_shapes={"images": {0: torch.export.Dim.DYNAMIC}})
    try:
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "compiled.pt2"))
        files["AOTInductor"] = torch._inductor.aoti_load_package(package)
    except Exception as error:  # noqa: BLE001 - no C++ compiler
        print(f"AOTInductor: {error}")
    return files


def seconds_of_batches(run: Callable[[torch.Tensor], object], img_size: int) -> dict[str, float]:
    """Time a network on batches of 1 and 8 images: the fastest of five passes."""
    seconds = {}
    for size in (1, 8):
        images = torch.randint(256, (size, 3, img_size, img_size), dtype=torch.uint8)
        seconds[f"batch of {size}"] = min(seconds_of(functools.partial(run, images)) for _ in range(5))
    return seconds
