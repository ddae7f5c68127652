"""A training script as the tutorial's reader writes it: it knows the tutorial's modules, and nothing newer.

It is run by test_tutorial_script.py, in a folder that holds our modules and plot_img.
"""

import argparse
import math
import os

import torch
import torch.optim as optim
from torch.utils.tensorboard import SummaryWriter
from torchvision import transforms

from data_utils import plot_class_preds, read_split_data
from model import resnet34
from my_dataset import MyDataSet
from train_eval_utils import evaluate, train_one_epoch


def main(opt):
    """Train, as the tutorial does."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    writer = SummaryWriter(log_dir="runs/mine")
    os.makedirs("./weights", exist_ok=True)  # noqa: PTH103
    train_paths, train_labels, val_paths, val_labels = read_split_data(opt.data_path)

    to_input = [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    train_transform = transforms.Compose(
        [transforms.RandomResizedCrop(opt.size), transforms.RandomHorizontalFlip(), *to_input]
    )
    val_transform = transforms.Compose([transforms.Resize(opt.size), transforms.CenterCrop(opt.size), *to_input])
    train_set = MyDataSet(images_path=train_paths, images_class=train_labels, transform=train_transform)
    val_set = MyDataSet(val_paths, val_labels, val_transform)
    train_loader = torch.utils.data.DataLoader(
        train_set, batch_size=opt.batch_size, shuffle=True, num_workers=1, collate_fn=train_set.collate_fn
    )
    val_loader = torch.utils.data.DataLoader(
        val_set, batch_size=opt.batch_size, shuffle=False, collate_fn=val_set.collate_fn
    )

    model = resnet34(num_classes=5).to(device)
    writer.add_graph(model, torch.zeros((1, 3, opt.size, opt.size), device=device))
    optimizer = optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001, momentum=0.9)
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, lambda x: (1 + math.cos(x * math.pi / opt.epochs)) / 2)

    for epoch in range(opt.epochs):
        mean_loss = train_one_epoch(
            model=model, optimizer=optimizer, data_loader=train_loader, device=device, epoch=epoch
        )
        scheduler.step()
        acc = evaluate(model=model, data_loader=val_loader, device=device)
        print("[epoch {}] accuracy: {}".format(epoch, round(acc, 3)))  # noqa: UP032
        writer.add_scalar("train_loss", mean_loss, epoch)
        writer.add_scalar("accuracy", acc, epoch)
        writer.add_scalar("learning_rate", optimizer.param_groups[0]["lr"], epoch)
        fig = plot_class_preds(net=model, images_dir="./plot_img", transform=val_transform, num_plot=5, device=device)
        if fig is not None:
            writer.add_figure("predictions vs. actuals", figure=fig, global_step=epoch)
        writer.add_histogram(tag="conv1", values=model.conv1.weight, global_step=epoch)
        writer.add_histogram(tag="layer1/block0/conv1", values=model.layer1[0].conv1.weight, global_step=epoch)
        torch.save(model.state_dict(), "./weights/model-{}.pth".format(epoch))  # noqa: UP032
    writer.close()

    # The same calls by position.
    train_one_epoch(model, optimizer, val_loader, device, 1)
    evaluate(model, val_loader, device)
    plot_class_preds(model, "./plot_img", val_transform, 2, device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--data-path", type=str)
    main(parser.parse_args())
