"""The graph that export.py writes to a file: uint8 images in, calibrated probabilities out."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from familiarity import Familiarity
from model import ResNet, fold_batch_norm, to_device
from my_dataset import MEAN, STD, EvalTransform


class ExportedNetwork(nn.Module):
    """Normalisation, a network with BatchNorm folded into its convolutions, temperature and softmax in one module.

    `forward` maps RGB images (N, 3, img_size, img_size) uint8 to probabilities (N, classes) float32.

    Args:
        resize: resize and crop in the graph; `forward` then takes one image (3, H, W) uint8 of any size.
        familiarity: stored in the file, for predict.py.
        with_unfamiliarity: return (probabilities, unfamiliarity). The latter, (N,) float32, is the squared Mahalanobis
            distance divided by the threshold of `familiarity`; above 1, the image is unfamiliar.
    """

    def __init__(
        self,
        network: ResNet,
        temperature: float = 1.0,
        *,
        resize: EvalTransform | None = None,
        familiarity: Familiarity | None = None,
        with_unfamiliarity: bool = False,
    ) -> None:
        super().__init__()
        self.network = to_device(fold_batch_norm(network), "cpu").requires_grad_(False)
        self.temperature, self.resize, self.with_unfamiliarity = temperature, resize, with_unfamiliarity
        for name, values in {"mean": MEAN, "std": STD}.items():
            self.register_buffer(name, 255 * torch.tensor(values).view(3, 1, 1))
        if familiarity is not None:
            for name, value in familiarity._asdict().items():
                self.register_buffer(f"familiarity_{name}", torch.as_tensor(value, dtype=torch.float32))

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """See the class."""
        if self.resize is not None:
            images = resize_like(self.resize, images, self.mean.round()).unsqueeze(0)
        x = ((images.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        net = self.network
        layer1 = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
        features = net.layer4(net.layer3(net.layer2(layer1)))
        logits = net.fc(features.mean(dim=(2, 3)))
        probabilities = (logits / self.temperature).softmax(dim=1)
        if not self.with_unfamiliarity:
            return probabilities
        difference = layer1.mean(dim=(2, 3)) - self.familiarity_mean
        distance = ((difference @ self.familiarity_precision) * difference).sum(dim=1)
        return probabilities, distance / self.familiarity_threshold


def resize_like(transform: EvalTransform, image: Tensor, border_colour: Tensor) -> Tensor:
    """Resize an image (3, H, W) uint8 like `transform`, with operations that can be exported with dynamic H and W.

    Like Pillow, it resizes horizontally, rounds, and then resizes vertically.

    Args:
        border_colour: (3, 1, 1) float32, for "pad".

    Returns:
        (3, img_size, img_size) float32, whole numbers.
    """
    side, (height, width) = transform.img_size, image.shape[-2:]
    image = image.float()
    if transform.resize == "stretch":
        return _resize(image, side, side)
    if transform.resize == "pad":
        longer = torch.sym_max(height, width)
        height, width = (_round_ratio(length * side, longer) for length in (height, width))
        left, top = (side - width) // 2, (side - height) // 2
        borders = [left, side - width - left, top, side - height - top]
        return F.pad(_resize(image, height, width) - border_colour, borders) + border_colour
    shorter = torch.sym_min(height, width)
    resized = _resize(image, height * transform.shorter_side // shorter, width * transform.shorter_side // shorter)
    return _crop(resized, side, side)


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    for size in ([image.shape[-2], width], [height, width]):
        image = F.interpolate(image.unsqueeze(0), size, mode="bilinear", antialias=True).squeeze(0).round()
    return image


def _crop(image: Tensor, height: int, width: int) -> Tensor:
    """Crop the centre like torchvision, which rounds half a pixel to the nearest even number."""
    top, left = (_round_ratio(own - cropped, 2) for own, cropped in zip(image.shape[-2:], (height, width), strict=True))
    return image.narrow(1, top, height).narrow(2, left, width)


def _round_ratio(a: int, b: int) -> int:
    """Return round(a / b) in integer arithmetic, as sizes are symbolic (`SymInt`) during the export."""
    half_down, half_up = (2 * a + b - 1) // (2 * b), (2 * a + b) // (2 * b)
    return half_down + (half_up - half_down) * (half_down % 2)
