"""Distil a convolutional network from a target set: python distil_resnet.py TARGETS [--backbone resnet50]."""

import argparse

import timm
import torch
from torch.nn import Conv2d, functional
from torch.optim.lr_scheduler import OneCycleLR

import cae2pipe

parser = argparse.ArgumentParser()
parser.add_argument("targets")
parser.add_argument("--backbone", default="resnet50")
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--batch-size", type=int, default=256)
parser.add_argument("--lr", type=float, default=1e-3)
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--out", default="distilled.pt")


def main(args: argparse.Namespace) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"batch_size": args.batch_size, "pixels": "float", "workers": args.workers, "device": device}
    batches = cae2pipe.TargetBatches(args.targets, **options)
    teacher, size = batches.targets.teacher, batches.targets.view_size

    torch.manual_seed(0)
    stages = timm.create_model(args.backbone, features_only=True).feature_info
    stage = stages.reduction().index(size // teacher.rows)  # the one with the teacher's stride, such as 16
    backbone = timm.create_model(args.backbone, features_only=True, out_indices=[stage]).to(device)
    head = Conv2d(stages.channels()[stage], teacher.dim, kernel_size=1).to(device)
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=args.lr, weight_decay=0.05)
    schedule = OneCycleLR(optimizer, args.lr, total_steps=args.epochs * len(batches))

    for epoch in range(args.epochs):
        batches.set_epoch(epoch)
        losses = []
        for pixels, targets, *_ in batches:
            (features,) = backbone(pixels * 2 - 1)
            loss = 1 - functional.cosine_similarity(head(features), targets, dim=1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        print(f"epoch {epoch}: loss {torch.stack(losses).mean():.4f}", flush=True)  # noqa: T201
    torch.save(backbone.state_dict(), args.out)


if __name__ == "__main__":
    main(parser.parse_args())
