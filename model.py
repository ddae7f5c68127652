"""The networks, ResNet-18 to ResNet-152, and Grad-CAM.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, https://arxiv.org/abs/1512.03385

Names and shapes in `state_dict()` are torchvision's, so its official weights load; with equal weights the logits equal
torchvision's.
"""

import copy
import itertools
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, in_channel, H, W) -> (N, out_channel, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, in_channel: int, out_channel: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channel, out_channel, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channel)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_channel, out_channel, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channel)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + identity)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut: (N, in_channel, H, W) -> (N, 4 * out_channel, H/stride, W/stride).

    The stride is on the 3x3 convolution, as in torchvision (the paper has it on the first 1x1): "ResNet v1.5",
    https://catalog.ngc.nvidia.com/orgs/nvidia/resources/resnet_50_v1_5_for_pytorch
    """

    expansion = 4

    def __init__(self, in_channel: int, out_channel: int, stride: int = 1, downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channel, out_channel, kernel_size=1, stride=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channel)
        self.conv2 = nn.Conv2d(out_channel, out_channel, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channel)
        self.conv3 = nn.Conv2d(out_channel, out_channel * self.expansion, kernel_size=1, stride=1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channel * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + identity)


class ResNet(nn.Module):
    """The network of the paper: a stem, four stages of blocks, and a linear classifier on the mean feature.

    Args:
        block: BasicBlock or Bottleneck.
        blocks_num: the number of blocks in each of the four stages.
        num_classes: the number of logits.
        include_top: whether to include `avgpool` and `fc`.

    `forward` maps normalised float images (N, 3, H, W) to logits (N, num_classes); without the top, to the feature map
    (N, 512 * block.expansion, H/32, W/32), with sides rounded up.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        blocks_num: list[int],
        num_classes: int = 1000,
        include_top: bool = True,
    ) -> None:
        super().__init__()
        self.include_top = include_top
        self.in_channel = 64

        self.conv1 = nn.Conv2d(3, self.in_channel, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(self.in_channel)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, blocks_num[0])
        self.layer2 = self._make_layer(block, 128, blocks_num[1], stride=2)
        self.layer3 = self._make_layer(block, 256, blocks_num[2], stride=2)
        self.layer4 = self._make_layer(block, 512, blocks_num[3], stride=2)
        if include_top:
            self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
            self.fc = nn.Linear(512 * block.expansion, num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _make_layer(
        self, block: type[BasicBlock | Bottleneck], channel: int, block_num: int, stride: int = 1
    ) -> nn.Sequential:
        downsample = None
        if stride != 1 or self.in_channel != channel * block.expansion:
            downsample = nn.Sequential(
                nn.Conv2d(self.in_channel, channel * block.expansion, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(channel * block.expansion),
            )
        layers = [block(self.in_channel, channel, stride, downsample)]
        self.in_channel = channel * block.expansion
        layers += [block(self.in_channel, channel) for _ in range(1, block_num)]
        return nn.Sequential(*layers)

    def feature_map(self, x: Tensor) -> Tensor:
        """Compute the last feature map, (N, 512 * block.expansion, H/32, W/32)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.feature_map(x)
        if self.include_top:
            x = self.fc(torch.flatten(self.avgpool(x), 1))
        return x


def resnet18(num_classes: int = 1000, include_top: bool = True) -> ResNet:
    """ResNet-18: 11.7 million parameters with 1000 classes."""
    return ResNet(BasicBlock, [2, 2, 2, 2], num_classes, include_top)


def resnet34(num_classes: int = 1000, include_top: bool = True) -> ResNet:
    """ResNet-34: 21.8 million parameters with 1000 classes."""
    return ResNet(BasicBlock, [3, 4, 6, 3], num_classes, include_top)


def resnet50(num_classes: int = 1000, include_top: bool = True) -> ResNet:
    """ResNet-50: 25.6 million parameters with 1000 classes."""
    return ResNet(Bottleneck, [3, 4, 6, 3], num_classes, include_top)


def resnet101(num_classes: int = 1000, include_top: bool = True) -> ResNet:
    """ResNet-101: 44.5 million parameters with 1000 classes."""
    return ResNet(Bottleneck, [3, 4, 23, 3], num_classes, include_top)


def resnet152(num_classes: int = 1000, include_top: bool = True) -> ResNet:
    """ResNet-152: 60.2 million parameters with 1000 classes."""
    return ResNet(Bottleneck, [3, 8, 36, 3], num_classes, include_top)


MODELS = {model.__name__: model for model in (resnet18, resnet34, resnet50, resnet101, resnet152)}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` into evaluation mode without gradients, and restore the mode of every module at the end."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in was_training:
            module.training = True


def to_device(model: ResNet, device: torch.device | str) -> ResNet:
    """Move `model` to a device, in the channels-last memory format, which is faster on CPUs and on tensor cores.

    https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html. MPS keeps the contiguous format,
    because the gradients of channels-last BatchNorm are wrong there: https://github.com/pytorch/pytorch/issues/175189.
    """
    is_mps = torch.device(device).type == "mps"
    return model.to(device, memory_format=torch.contiguous_format if is_mps else torch.channels_last)


def fold_batch_norm(model: ResNet) -> ResNet:
    """Return a copy of `model` for evaluation, with each BatchNorm folded into the preceding convolution.

    In evaluation mode BatchNorm is an affine map; folding saves a pass over the activations (Jacob et al. 2018,
    https://arxiv.org/abs/1712.05877, section 3.2).
    """
    # A process group cannot be copied, so the copy shares it.
    groups = [module.process_group for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    folded = copy.deepcopy(model, {id(group): group for group in groups}).eval()
    for module in list(folded.modules()):
        children = list(module.named_children())
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return folded


def grad_cam(model: ResNet, images: Tensor, classes: Tensor) -> Tensor:
    """Compute Grad-CAM of the last feature map (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391).

    Grad-CAM weights the channels by the mean gradient of a class's logit. After average pooling and one linear layer
    this is the class's row of `fc.weight`, up to a constant (section 3.1), so no backward pass is needed.

    Args:
        images: (N, 3, H, W) float32, normalised, on the model's device.
        classes: (N,) int64, the class to explain for each image, such as the predicted one.

    Returns:
        Heat maps (N, H, W) float32, each scaled to a maximum of 1. They are as coarse as the feature map: H/32 x W/32
        values, interpolated.
    """
    with evaluation_mode(model):
        features = model.feature_map(images).float()
        with torch.autocast(features.device.type, enabled=False):  # float16 would overflow
            heat = torch.einsum("nchw,nc->nhw", features, model.fc.weight[classes]).relu()
        heat = heat / heat.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
        return F.interpolate(heat.unsqueeze(1), images.shape[-2:], mode="bilinear", align_corners=False).squeeze(1)


@torch.no_grad()
def init_conv1_with_pca(model: ResNet, batches: Iterable[Tensor]) -> None:
    """Initialise `conv1` with the principal components of image patches.

    Random filters respond mostly to the mean colour of a patch. Principal components have uncorrelated outputs, whose
    variances BatchNorm equalises (Krähenbühl et al. 2016, https://arxiv.org/abs/1511.06856). Each component is used
    with both signs, because ReLU discards negative outputs (Shang et al. 2016, https://arxiv.org/abs/1603.05201).

    Args:
        batches: images (N, 3, H, W) float, normalised, on the CPU.
    """
    weight = model.conv1.weight
    patches = [F.unfold(images, weight.shape[-2:], stride=images.shape[-1] // 16) for images in batches]
    patches = torch.cat([each.movedim(1, 0).flatten(1) for each in patches], dim=1)  # (values, patches)
    components = torch.linalg.eigh(torch.cov(patches.double())).eigenvectors  # in columns, by increasing variance
    components = components[:, -(len(weight) // 2) :].mT
    filters = torch.cat([components, -components]).view(weight.shape).to(weight)
    weight.copy_(filters * (weight.norm() / filters.norm()))


def named_convolutions(model: ResNet) -> dict[str, nn.Conv2d]:
    """Return the convolutions by their TensorBoard tags in the tutorial, such as "layer1/block0/conv1"."""
    return {
        re.sub(r"layer(\d)\.(\d+)\.", r"layer\1/block\2/", name).replace("downsample.0", "downsample"): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }


def freeze_backbone(model: ResNet) -> None:
    """Freeze all layers but `fc`. `train_one_epoch` keeps frozen BatchNorm layers in evaluation mode."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("fc."))
