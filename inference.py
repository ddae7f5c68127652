"""Run a network over a data loader, on one or several ranks."""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.distributed
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from cli_utils import UsageError
from distributed import Distributed
from model import ResNet, evaluation_mode, fold_batch_norm
from my_dataset import copy_to_device, prepare_batch


class EmptyLoaderError(UsageError):
    """The data loader yields no images."""


class Outputs(NamedTuple):
    """The outputs of an inference pass, on the CPU and in the loader's order.

    Attributes:
        logits: (N, classes) float32.
        labels: (N,) int64, whatever the loader yields with the images: labels, or indices into a dataset.
        features: (M, F) float32, the inputs of the last layer for every `feature_stride`-th label; else empty.
        layer1: (N, C) float32, see `record_layer1`; empty if the model is not a ResNet.
    """

    logits: Tensor
    labels: Tensor
    features: Tensor
    layer1: Tensor


def compute_logits(
    model: nn.Module, images: Tensor, device: torch.device | str, amp_dtype: torch.dtype | None = None
) -> Tensor:
    """Run a batch through `model`, after normalising it if it is uint8.

    Args:
        images: (N, 3, H, W), uint8 or normalised float.
        amp_dtype: bfloat16 or float16 for mixed precision by autocast (https://arxiv.org/abs/1710.03740), None for
            float32.

    Returns:
        Logits (N, classes), always float32, as softmax and the loss need its precision.
    """
    with torch.autocast(torch.device(device).type, amp_dtype, enabled=amp_dtype is not None):
        return model(prepare_batch(images, device)).float()


def run_inference(
    model: nn.Module,
    data_loader: DataLoader,
    device: torch.device | str,
    *,
    amp_dtype: torch.dtype | None = None,
    feature_stride: int = 0,
    after_batch: Callable[[], None] | None = None,
) -> Outputs:
    """Run `model` over `data_loader` in evaluation mode without gradients, then restore its mode.

    Args:
        model: a ResNet, or any classifier if `feature_stride` is 0, or a linear layer that takes features.
        amp_dtype: mixed precision, see `compute_logits`.
        feature_stride: return the features of images whose label is a multiple of it; 0: return none.
        after_batch: callback after each batch; an exception that it raises ends the pass.

    Raises:
        EmptyLoaderError: `data_loader` yields no images.
    """
    logits, labels, features, layer1, inputs = [], [], [torch.empty(0)], [torch.empty(0)], []
    with evaluation_mode(model), contextlib.ExitStack() as stack:
        if isinstance(model, ResNet):
            model = fold_batch_norm(model)
            layer1 = stack.enter_context(record_layer1(model))
        if feature_stride > 0:
            last = model.fc if isinstance(model, ResNet) else model
            hook = last.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0].float()))
            stack.callback(hook.remove)
        bar = tqdm(data_loader, desc="evaluating", leave=False, disable=disable_bar(), dynamic_ncols=True)
        for batch, batch_labels in bar:
            if len(batch):  # a batch without readable images is empty
                logits.append(compute_logits(model, batch, device, amp_dtype))
                labels.append(batch_labels)
            if inputs:
                kept = (batch_labels % feature_stride == 0).nonzero().flatten()
                features.append(inputs.pop()[copy_to_device(kept, device)])
            if after_batch is not None:
                after_batch()
    if not logits:
        raise EmptyLoaderError("nothing to evaluate: the data loader is empty")
    features = features[1:] or features  # the empty tensor has another shape
    columns = (logits, labels, features, layer1)
    return Outputs(*(torch.cat([part.cpu() for part in column]) for column in columns))


@contextlib.contextmanager
def record_layer1(model: ResNet) -> Iterator[list[Tensor]]:
    """Yield a list to which each forward pass appends the mean activations of layer1, (N, channels) float32."""
    recorded: list[Tensor] = []
    hook = model.layer1.register_forward_hook(
        lambda module, inputs, output: recorded.append(output.mean(dim=(2, 3), dtype=torch.float32))
    )
    try:
        yield recorded
    finally:
        hook.remove()


def gather_outputs(run: Callable[[], Outputs], dist: Distributed) -> Outputs:
    """Call `run` on every rank, and concatenate the outputs of all ranks in rank order.

    Args:
        run: calls `run_inference` on this rank's share of the data.

    Raises:
        EmptyLoaderError: no rank has any images.
    """
    if dist.world_size == 1:
        return run()
    try:
        share = run()
    except EmptyLoaderError:  # more ranks than batches
        share = None
    shares = [share for share in dist.gather(share) if share is not None]
    if not shares:
        raise EmptyLoaderError("nothing to evaluate: the data loader is empty")
    return Outputs(*(torch.cat(column) for column in zip(*shares, strict=True)))


def disable_bar() -> bool | None:
    """Return tqdm's `disable`: True on all ranks but 0, else None, which shows a bar only on a terminal."""
    return True if torch.distributed.is_initialized() and torch.distributed.get_rank() > 0 else None
