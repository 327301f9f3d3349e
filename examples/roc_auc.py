"""The area under the ROC curve, of all validation data of all ranks, by a reducer of one's own.

    pipekit launch --processes 2 examples/roc_auc.py

It is no mean over batches: it needs every score at once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pipekit

CONFIG = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1, "steps_per_print": None}


class Patients(torch.utils.data.Dataset):
    """Measurements `(4,)`, and 1.0 for the sick, about one in five, or 0.0."""

    def __init__(self, first: int, num_patients: int) -> None:
        self.first, self.num_patients = first, num_patients

    def __len__(self) -> int:
        return self.num_patients

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.first + index)
        is_sick = (torch.rand((), generator=generator) < 0.2).float()
        return torch.randn(4, generator=generator) + 0.8 * is_sick, is_sick


class AreaUnderCurve(pipekit.MetricReducer):
    """The area under the ROC curve: how often a sick patient has the higher score of a pair, ties counted as half.

    Source: Hanley and McNeil 1982, "The meaning and use of the area under a receiver operating characteristic curve".
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.scores: list[Tensor] = []
        self.labels: list[Tensor] = []

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Add the scores `(B,)` and labels `(B,)` of a batch."""
        self.scores.append(scores)
        self.labels.append(labels)

    def per_slot_reduce(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self.scores), torch.cat(self.labels)

    def cross_slot_reduce(self, per_slot_metrics: list[Any]) -> float:
        scores, labels = map(torch.cat, zip(*per_slot_metrics, strict=True))
        sick, healthy = scores[labels == 1], scores[labels == 0].sort().values
        below, not_above = (torch.searchsorted(healthy, sick, right=right) for right in (False, True))
        return float((below + not_above).double().mean() / 2 / len(healthy))


class PatientsTrial(pipekit.Trial):
    def __init__(self, context: pipekit.TrialContext) -> None:
        self.context = context
        model = nn.Linear(4, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        engine, *_ = pipekit.initialize(model=model, optimizer=optimizer, config=CONFIG)
        self.engine = context.wrap_model_engine(engine)
        self.auc = context.wrap_reducer(AreaUnderCurve(), name="auc", for_training=False)

    def train_batch(self, dataloader_iter, epoch_idx: int, batch_idx: int) -> Tensor:
        measurements, labels = self.context.to_device(next(dataloader_iter))
        loss = F.binary_cross_entropy_with_logits(self.engine(measurements).squeeze(-1), labels)
        self.engine.backward(loss)
        self.engine.step()
        return loss

    def evaluate_batch(self, dataloader_iter, batch_idx: int) -> dict[str, Tensor]:
        measurements, labels = self.context.to_device(next(dataloader_iter))
        scores = self.engine(measurements).squeeze(-1)
        self.auc.update(scores, labels)
        return {"loss": F.binary_cross_entropy_with_logits(scores, labels)}

    def build_training_data_loader(self) -> pipekit.DataLoader:
        return pipekit.DataLoader(Patients(0, 400), batch_size=8, shuffle=True)

    def build_validation_data_loader(self) -> pipekit.DataLoader:
        return pipekit.DataLoader(Patients(400, 101), batch_size=8)


def main() -> None:
    with pipekit.init(exp_conf={"run": {"dir": "runs/roc_auc"}}) as context:
        pipekit.Trainer(PatientsTrial(context), context).fit(
            max_length=pipekit.Epoch(2), validation_period=pipekit.Epoch(1), best_metric="auc", best_is="highest"
        )


if __name__ == "__main__":
    main()
