"""A small network and blank figures, for tests that don't depend on the network or on what a figure shows."""

from matplotlib.figure import Figure
from torch import nn

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
