"""The script of `spirals.py` as a trial: on any number of GPUs or processes, with checkpoints from which it goes on."""

import torch
import torch.nn.functional as F
from spirals import build_model, build_spirals

import pipekit


class SpiralsTrial(pipekit.Trial):
    def __init__(self, context):
        self.context = context
        model = build_model()
        engine, *_ = pipekit.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
            config={"train_batch_size": 32, "gradient_clipping": 0.0},
        )
        self.engine = context.wrap_model_engine(engine)

    def build_training_data_loader(self):
        return pipekit.DataLoader(build_spirals(seed=0), self.context.train_micro_batch_size_per_gpu)

    def build_validation_data_loader(self):
        return pipekit.DataLoader(build_spirals(seed=1), self.context.train_micro_batch_size_per_gpu)

    def train_batch(self, dataloader_iter, epoch_idx, batch_idx):
        points, labels = self.context.to_device(next(dataloader_iter))
        loss = F.cross_entropy(self.engine(points), labels)
        self.engine.backward(loss)
        self.engine.step()
        return loss

    def evaluate_batch(self, dataloader_iter, batch_idx):
        points, labels = self.context.to_device(next(dataloader_iter))
        return {"accuracy": (self.engine(points).argmax(1) == labels).float().mean()}


def main():
    with pipekit.init(exp_conf={"seed": 1, "run": {"dir": "runs/spirals_trial"}}) as context:
        trainer = pipekit.Trainer(SpiralsTrial(context), context)
        epoch = pipekit.Epoch(1)
        trainer.fit(max_length=pipekit.Epoch(10), reporting_period=epoch, validation_period=epoch, best_is="highest")


if __name__ == "__main__":
    main()
