"""The tutorial's training loop, as a baseline for bench.py."""

import argparse
import math
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision import transforms
from tqdm import tqdm

from class_files import write_class_indices
from cli_utils import select_device
from data_utils import plot_class_preds
from dataset_split import find_split
from model import MODELS
from my_dataset import MEAN, STD, MyDataSet

PLOT_IMG = Path(__file__).resolve().parents[1] / "plot_img"


class TutorialDataSet(Dataset):
    """Reads, crops and normalises in the worker, in full size and float32."""

    def __init__(self, paths: list[str], labels: list[int], transform: Callable) -> None:
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.open(self.paths[index]).convert("RGB")), self.labels[index]


def tutorial_transforms(img_size: int) -> tuple[Callable, Callable]:
    """Return the transforms for training and for validation."""
    to_tensor = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    crop = [transforms.RandomResizedCrop(img_size), transforms.RandomHorizontalFlip()]
    centre = [transforms.Resize(round(img_size * 256 / 224)), transforms.CenterCrop(img_size)]
    return transforms.Compose(crop + to_tensor), transforms.Compose(centre + to_tensor)


def tutorial_loader(dataset: Dataset, batch_size: int, shuffle: bool) -> DataLoader:
    """Return a loader that starts new workers for each epoch."""
    workers = min(os.cpu_count(), batch_size if batch_size > 1 else 0, 8)
    return DataLoader(
        dataset, batch_size, shuffle, num_workers=workers, pin_memory=True, collate_fn=MyDataSet.collate_fn
    )


def tutorial_optimizer(model: torch.nn.Module, lr: float = 0.001) -> torch.optim.Optimizer:
    """Return the tutorial's SGD, with torch's default implementation."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=0.005)


def tutorial_epoch(model, optimizer, loader, device, epoch) -> list[float]:
    """Train one epoch and return the loss of each step. The progress bar reads each loss immediately."""
    model.train()
    optimizer.zero_grad()
    mean_loss = torch.zeros(1, device=device)
    losses = []
    bar = tqdm(loader, disable=None)
    for step, (images, labels) in enumerate(bar):
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        loss.backward()
        mean_loss = (mean_loss * step + loss.detach()) / (step + 1)
        bar.desc = f"[epoch {epoch}] mean loss {mean_loss.item():.3f}"
        losses.append(loss.detach())
        if not torch.isfinite(loss):
            sys.exit("the loss is not finite")
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses).tolist()


@torch.no_grad()
def tutorial_evaluate(model, loader, device) -> float:
    """Return the accuracy."""
    model.eval()
    right = torch.zeros(1, device=device)
    for images, labels in tqdm(loader, desc="validation", disable=None):
        predicted = torch.max(model(images.to(device)), dim=1)[1]
        right += torch.eq(predicted, labels.to(device)).sum()
    return right.item() / len(loader.dataset)


def baseline(args: argparse.Namespace) -> None:
    """Run the tutorial's training from start to end in the current folder."""
    matplotlib.use("Agg")
    torch.manual_seed(args.seed)
    device = select_device(args.device)
    split, _ = find_split(args.data_path)
    write_class_indices(split.class_names)
    for_training, for_validation = tutorial_transforms(args.img_size)
    train_set = TutorialDataSet(split.train_paths, split.train_labels, for_training)
    val_set = TutorialDataSet(split.val_paths, split.val_labels, for_validation)
    train_loader = tutorial_loader(train_set, args.batch_size, shuffle=True)
    val_loader = tutorial_loader(val_set, args.batch_size, shuffle=False)
    model = MODELS[args.model](num_classes=len(split.class_names)).to(device)
    writer = SummaryWriter("runs/baseline")
    writer.add_graph(model, torch.zeros(1, 3, args.img_size, args.img_size, device=device))
    optimizer = tutorial_optimizer(model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda epoch: (1 + math.cos(math.pi * epoch / args.epochs)) / 2 * 0.9 + 0.1
    )
    Path("weights").mkdir(exist_ok=True)
    for epoch in range(args.epochs):
        losses = tutorial_epoch(model, optimizer, train_loader, device, epoch)
        scheduler.step()
        accuracy = tutorial_evaluate(model, val_loader, device)
        writer.add_scalar("train_loss", statistics.fmean(losses), epoch)
        writer.add_scalar("accuracy", accuracy, epoch)
        writer.add_scalar("learning_rate", optimizer.param_groups[0]["lr"], epoch)
        figure = plot_class_preds(model, PLOT_IMG, for_validation, 5, device)
        if figure is not None:
            writer.add_figure("predictions vs. actuals", figure, epoch)
        writer.add_histogram("conv1", model.conv1.weight, epoch)
        writer.add_histogram("layer1/block0/conv1", model.layer1[0].conv1.weight, epoch)
        torch.save(model.state_dict(), f"weights/model-{epoch}.pth")
        print(f"[epoch {epoch}] train_loss {statistics.fmean(losses):.3f}  accuracy {accuracy:.3f}", flush=True)
