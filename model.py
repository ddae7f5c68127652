"""The network: ResNet 18 to 152, the weights that go into it, and what it looks at.

He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016, https://arxiv.org/abs/1512.03385

Names and shapes in `state_dict()` are torchvision's, so its official weights load; for equal weights the logits equal
torchvision's.
"""

import copy
import itertools
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models as torchvision_models

# What torch.nn.parallel and torch.compile put in front of every parameter's name.
WRAPPER_PREFIXES = ("module.", "_orig_mod.")


class WeightsError(ValueError):
    """A weights file that cannot be used; the message names the file and says why."""


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
        include_top: False leaves out `avgpool` and `fc`.

    `forward` takes images (N, 3, H, W), float, normalised, and gives logits (N, num_classes); without the top the
    feature map (N, 512 * block.expansion, H/32, W/32), sides rounded up.
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
        """What `avgpool` takes the mean of: (N, 512 * block.expansion, H/32, W/32)."""
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
    """Evaluation mode without gradients for a while; every module gets the mode back that it had."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in was_training:
            module.training = True


def to_device(model: ResNet, device: torch.device | str) -> ResNet:
    """Move `model`, its weights in channels-last order: convolutions are faster so, on CPUs and on tensor cores.

    https://docs.pytorch.org/tutorials/intermediate/memory_format_tutorial.html
    """
    return model.to(device, memory_format=torch.channels_last)


def fold_batch_norm(model: ResNet) -> ResNet:
    """A copy of `model` for evaluation, which computes the same with each BatchNorm folded into the convolution before.

    In evaluation mode a BatchNorm is an affine map with constants, and so a part of the convolution (Jacob et al. 2018,
    https://arxiv.org/abs/1712.05877, section 3.2): a pass over the activations less for each.
    """
    folded = copy.deepcopy(model).eval()
    for module in list(folded.modules()):
        children = list(module.named_children())
        for (conv_name, conv), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(module, norm_name, nn.Identity())
    return folded


def grad_cam(model: ResNet, images: Tensor, classes: Tensor) -> Tensor:
    """What `model` looked at: Grad-CAM of its last feature map (Selvaraju et al. 2017, https://arxiv.org/abs/1610.02391).

    Grad-CAM weights the channels with the mean gradient of a class's logit. Behind a mean and one linear layer that
    gradient is the class's row of `fc.weight` over a constant (section 3.1 there), so that no backward pass is needed.

    Args:
        images: (N, 3, H, W) float32, normalised, on the model's device.
        classes: (N,) int64, the class of each image that is asked about; its predicted one, for example.

    Returns:
        Heat (N, H, W) float32: 0 where nothing speaks for the class, 1 where most does in this image. It is as coarse
        as the feature map: H/32 x W/32 values, interpolated.
    """
    with evaluation_mode(model):
        features = model.feature_map(images)
        heat = torch.einsum("nchw,nc->nhw", features, model.fc.weight[classes]).relu()
        heat = heat / heat.amax(dim=(1, 2), keepdim=True).clamp(min=1e-12)
        return F.interpolate(heat.unsqueeze(1), images.shape[-2:], mode="bilinear", align_corners=False).squeeze(1)


def named_convolutions(model: ResNet) -> dict[str, nn.Conv2d]:
    """The convolutions by the names that the tutorial gives them in TensorBoard, "layer1/block0/conv1" for example."""
    return {
        re.sub(r"layer(\d)\.(\d+)\.", r"layer\1/block\2/", name).replace("downsample.0", "downsample"): module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
    }


def freeze_backbone(model: ResNet) -> None:
    """Let only `fc` learn. `train_one_epoch` keeps a BatchNorm whose parameters are frozen in evaluation mode."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("fc."))


# --- weights -----------------------------------------------------------------------------------------------------


def load_pretrained(model: ResNet, weights: str | os.PathLike, model_name: str) -> list[str]:
    """Put trained weights into `model`, to go on training from there.

    Args:
        weights: the path of a weights file (this project's best.pth and last.pth, a plain `state_dict` such as the
            tutorial's model-N.pth or torchvision's official files), or "imagenet": torchvision's official weights for
            `model_name`, downloaded once, with their hash checked.

    Returns:
        The names of the parameters that were left out because their shape differs: of `fc` alone, when the number of
        classes is another.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it is not a weights file, or one of another model.
        OSError: it cannot be read, or ImageNet's weights cannot be downloaded.
    """
    state = _imagenet_state(model_name) if weights == "imagenet" else _read_weights_file(weights)["state_dict"]
    own = model.state_dict()
    left_out = [
        name
        for name, value in state.items()
        if name.startswith("fc.") and name in own and value.shape != own[name].shape
    ]
    _load_state(model, {name: value for name, value in state.items() if name not in left_out}, weights, left_out)
    return left_out


def load_model(
    path: str | os.PathLike,
    device: torch.device | str = "cpu",
    model_name: str | None = None,
    class_names: list[str] | None = None,
) -> tuple[ResNet, dict[str, Any]]:
    """Turn a weights file into a model that is ready to predict.

    Args:
        path: best.pth or last.pth, which tell everything themselves; or a plain `state_dict`, which does not tell its
            `model_name` (a key of MODELS) and its `class_names`.

    Returns:
        The model on `device`, in evaluation mode, and what is known about it:
        {"model": str, "class_names": list[str], "img_size": int, "epoch": int | None, "accuracy": float | None}.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it is not a weights file, does not fit the model, or something that it does not tell is missing.
    """
    checkpoint = _read_weights_file(path)
    info = {
        "model": model_name or checkpoint.get("model"),
        "class_names": class_names or checkpoint.get("class_names"),
        "img_size": checkpoint.get("img_size", 224),
        "epoch": checkpoint.get("epoch"),
        "accuracy": checkpoint.get("accuracy"),
    }
    if info["model"] is None or info["class_names"] is None:
        raise WeightsError(f"{path}: a plain state_dict; give its --model and its --class-indices as well")
    _check_info(path, info)
    model = MODELS[info["model"]](num_classes=len(info["class_names"]))
    _load_state(model, checkpoint["state_dict"], path)
    return to_device(model, device).eval(), info


def _check_info(path: str | os.PathLike, info: dict[str, Any]) -> None:
    names, size = info["class_names"], info["img_size"]
    if not isinstance(info["model"], str) or info["model"] not in MODELS:
        raise WeightsError(f"{path}: made for an unknown model {info['model']!r}; known are {', '.join(MODELS)}")
    if not (isinstance(names, list) and names and all(isinstance(name, str) for name in names)):
        raise WeightsError(f"{path}: its class_names are not a list of names")
    if not (isinstance(size, int) and 1 <= size <= 10_000):
        raise WeightsError(f"{path}: its img_size is {size!r}, not a number of pixels")


def _read_weights_file(path: str | os.PathLike) -> dict[str, Any]:
    """A weights file as a dict whose "state_dict" holds the parameters, with wrappers' prefixes dropped."""
    content = read_torch_file(path)
    checkpoint = dict(content) if isinstance(content.get("state_dict"), Mapping) else {"state_dict": content}
    state = {_without_prefixes(str(name)): value for name, value in checkpoint["state_dict"].items()}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: holds no state_dict (names of parameters with their tensors)")
    return checkpoint | {"state_dict": state}


def read_torch_file(path: str | os.PathLike) -> Mapping[Any, Any]:
    """The dict that `torch.save` wrote, onto the CPU; tensors and plain values alone, as it may be a stranger's.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: it holds something else, or is damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such weights file")
    with _refusing(f"{path}: not a PyTorch weights file, or a damaged one"):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path}: holds a {type(content).__name__}, not the weights of a model")
    return content


def is_finite(state: Mapping[str, Tensor]) -> bool:
    """Whether no weight of a `state_dict` is infinite or not a number, as after a training that diverged."""
    return all(bool(value.isfinite().all()) for value in state.values() if value.is_floating_point())


@contextmanager
def _refusing(complaint: str) -> Iterator[None]:
    """Make one error, with this message, of all that torch raises for a file that is no checkpoint."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch wonders aloud about files that it then refuses
            yield
    except OSError:
        raise
    except Exception as error:
        raise WeightsError(complaint) from error


def _without_prefixes(name: str) -> str:
    while name.startswith(WRAPPER_PREFIXES):
        name = name.split(".", 1)[1]
    return name


def _imagenet_state(model_name: str) -> dict[str, Tensor]:
    weights = torchvision_models.get_model_weights(model_name).DEFAULT
    options = {
        "progress": bool(sys.stderr and sys.stderr.isatty()),
        "check_hash": True,
        "weights_only": True,
        "map_location": "cpu",
    }
    file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        with _refusing(f"{file}: not the weights of ImageNet, or damaged; remove it, if it is there, and try again"):
            return weights.get_state_dict(**options)
    except OSError as error:
        raise OSError(f"cannot download {weights.url}: {error}") from error


def _load_state(
    model: ResNet, state: Mapping[str, Tensor], source: str | os.PathLike, may_miss: list[str] | None = None
) -> None:
    """`load_state_dict` whose errors are one line; `may_miss` names what `state` may lack."""
    own = model.state_dict()
    wrong = [
        f"{name} is {tuple(value.shape)} there, {tuple(own[name].shape)} in the model"
        for name, value in state.items()
        if name in own and value.shape != own[name].shape
    ]
    if not wrong:
        # Not strict: BatchNorm fills in the num_batches_tracked that files from before PyTorch 0.4.1 lack.
        try:
            missing, unexpected = model.load_state_dict(state, strict=False)
        except RuntimeError as error:  # sparse tensors and the like
            raise WeightsError(f"{source}: does not fit this model: parameters of another kind") from error
        wrong = [f"{name} is missing" for name in missing if name not in (may_miss or [])]
        wrong += [f"{name} is unknown" for name in unexpected]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise WeightsError(f"{source}: does not fit this model: {'; '.join(wrong[:3])}{more}")
    if not is_finite(state):
        raise WeightsError(f"{source}: weights are infinite or not a number: the training had diverged")
