"""Stand-ins that make tests fast (a small network, blank figures), and calls of predict.py."""

from pathlib import Path

from matplotlib.figure import Figure
from torch import nn

import predict
from model import BasicBlock, ResNet

NAMES = ["daisy", "dandelion", "roses", "sunflowers", "tulips"]  # of the sample
FIGURES = ("predictions", "mistakes", "training_batch", "confusion_matrix", "curves")  # of plot_utils


def blank_figure(*arguments: object) -> Figure:
    """Return a small figure without content, which takes a tenth of the time."""
    return Figure(figsize=(1, 1))


class SmallResNet(ResNet):
    """A ResNet of one block per stage, with a quarter of the channels: a step takes a tenth of ResNet-18's time."""

    def __init__(self, num_classes: int = 1000, include_top: bool = True) -> None:
        super().__init__(BasicBlock, [1, 1, 1, 1], num_classes, include_top)
        if include_top:
            self.fc = nn.Linear(self.in_channel, num_classes)

    def _make_layer(self, block: type[BasicBlock], channel: int, block_num: int, stride: int = 1) -> nn.Sequential:
        return super()._make_layer(block, channel // 4, block_num, stride)


def describe_weights(weights: Path) -> str:
    """Return predict.py's line about the weights of the fixture `weights`."""
    return f"weights {weights}: resnet18, 5 classes, 64 px, epoch 0, accuracy 0.200, temperature 0.800\n"


def run_predict(capsys, *argv: object) -> tuple[int, list[str], list[str]]:
    """Run predict.py; return its exit status and the lines of standard output and standard error."""
    status = predict.main([*map(str, argv), "--device", "cpu"])
    output = capsys.readouterr()
    return status, output.out.splitlines(), output.err.splitlines()
