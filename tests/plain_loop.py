"""A plain training loop with mixed precision, as a baseline for bench.py.

It follows timm's train.py with `--amp --amp-dtype bfloat16 --channels-last --opt sgd --workers 2`, but uses
torchvision's transforms: bfloat16 autocast, the channels-last format, persistent workers, one evaluation and one
checkpoint with the optimizer's state per epoch, and no figures. An incomplete last batch is dropped.
"""

import argparse
import csv
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tutorial_loop import TutorialDataSet, tutorial_transforms

from cli_utils import select_device
from dataset_split import find_split
from model import MODELS


def plain_epoch(model, optimizer, loader, device) -> float:
    """Train one epoch and return the mean loss of every 50th step."""
    model.train()
    losses = []
    for step, (images, labels) in enumerate(loader):
        images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            losses.append(loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def plain_evaluate(model, loader, device) -> float:
    """Return the accuracy."""
    model.eval()
    right = torch.zeros((), dtype=torch.int64, device=device)
    for images, labels in loader:
        images = images.to(device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            right += (model(images).argmax(dim=1) == labels.to(device)).sum()
    return right.item() / len(loader.dataset)


def plain_baseline(args: argparse.Namespace) -> None:
    """Run the training from start to end in the current folder."""
    torch.manual_seed(args.seed)
    device = select_device(args.device)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    split, _ = find_split(args.data_path)
    for_training, for_validation = tutorial_transforms(args.img_size)
    train_set = TutorialDataSet(split.train_paths, split.train_labels, for_training)
    val_set = TutorialDataSet(split.val_paths, split.val_labels, for_validation)
    options = {"num_workers": args.workers or 2, "persistent_workers": True, "pin_memory": device.type == "cuda"}
    drop_last = len(train_set) >= args.batch_size
    train_loader = DataLoader(train_set, args.batch_size, shuffle=True, drop_last=drop_last, **options)
    val_loader = DataLoader(val_set, args.batch_size, **options)
    model = MODELS[args.model](num_classes=len(split.class_names)).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=2e-5, nesterov=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    Path("weights").mkdir(exist_ok=True)
    with open("summary.csv", "w", newline="", encoding="utf-8") as file:
        summary = csv.writer(file)
        for epoch in range(args.epochs):
            loss = plain_epoch(model, optimizer, train_loader, device)
            scheduler.step()
            accuracy = plain_evaluate(model, val_loader, device)
            state = {"epoch": epoch, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, "weights/last.pth")
            summary.writerow([epoch, loss, accuracy])
            print(f"[epoch {epoch}] train_loss {loss:.3f}  accuracy {accuracy:.3f}", flush=True)
