"""An ordinary training script of PyTorch, which tells two spirals apart; `spirals_trial.py` is the same as a trial."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def build_spirals(seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (320,), generator=generator)
    turns = 3 * torch.rand(320, generator=generator)
    angles = turns + torch.pi * labels
    points = torch.stack([turns * angles.cos(), turns * angles.sin()], dim=1) / 3
    return TensorDataset(points, labels)


def build_model():
    return nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))


def main():
    torch.manual_seed(1)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    training = DataLoader(build_spirals(seed=0), batch_size=32)
    validation = DataLoader(build_spirals(seed=1), batch_size=32)
    for epoch in range(10):
        model.train()
        total = 0.0
        for points, labels in training:
            loss = F.cross_entropy(model(points), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()
        model.eval()
        correct = 0
        with torch.no_grad():
            for points, labels in validation:
                correct += (model(points).argmax(1) == labels).sum().item()
        print(f"epoch {epoch}: loss {total / len(training):.6f}, accuracy {correct / 320:.4f}")
    torch.save(model.state_dict(), "spirals.pt")


if __name__ == "__main__":
    main()
