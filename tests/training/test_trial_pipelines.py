"""A trial on a pipeline module: batches, metrics of the ranks that report, and resumption, under pp, dp and tp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gloo_workers import GlooWorkers
from pipekit.checkpoint.retention import Retention
from pipekit.training.periods import Batch
from trial_jobs import ACCUMULATION, NUM_SAMPLES, PipelineTrial, fit, make_trial

pytestmark = pytest.mark.distributed

LENGTH = 4


def resume_everywhere(rank: int, folder: str, pp: int, tp: int) -> dict[str, Any]:
    def train(**arguments: Any) -> Any:
        trial = make_trial(folder, PipelineTrial, pp=pp, tp=tp)
        result = fit(
            trial,
            max_length=Batch(LENGTH),
            reporting_period=Batch(2),
            retention=Retention(),
            **arguments,
        )
        weights = [parameter.detach().clone() for parameter in trial.engine.module.parameters()]
        trial.engine.destroy()
        return trial, result, weights

    whole, result, weights = train(checkpoint_period=Batch(1))
    for batch in range(1, LENGTH):
        part, again, its_weights = train(latest_checkpoint=f"{folder}/checkpoints/step-{batch:08d}")
        assert part.read == whole.read[batch * ACCUMULATION :]
        assert part.seen.losses == whole.seen.losses[batch:] or not whole.seen.losses
        assert again.validation_metrics == result.validation_metrics
        assert all(map(torch.equal, its_weights, weights))
    return {
        "read": whole.read,
        "losses": whole.seen.losses,
        "reports": whole.context.role.should_report_metrics,
        "replica": whole.context.role.data_parallel_rank,
        "metrics": result.metrics,
        "validation": result.validation_metrics,
        "events": whole.seen.events,
    }


@pytest.mark.parametrize(("pp", "dp", "tp"), [(2, 2, 1), (3, 1, 1), (1, 1, 2)])
def test_a_pipeline_trial_is_resumed_bit_for_bit(gloo: GlooWorkers, tmp_path: Path, pp: int, dp: int, tp: int) -> None:
    results = gloo.run(pp * dp * tp, resume_everywhere, str(tmp_path), pp, tp)
    # One rank of each replica reports.
    assert sorted(result["replica"] for result in results if result["reports"]) == list(range(dp))
    for result in results:
        assert result["metrics"] == results[0]["metrics"]
        # The batches 2 and 3, since those before were reported with batch 2.
        assert result["metrics"]["batch"] == 2.5
        assert result["validation"] == results[0]["validation"]
        # Each of the 12 samples is evaluated once, whatever its replica, and however many ranks read it.
        assert (result["validation"]["count"], result["validation"]["sum"]) == (12, 66)
        assert len(result["losses"]) == (LENGTH if result["reports"] else 0)
        assert [event for event in result["events"] if "workload" in event] == [
            "workload_end at 2",
            "workload_end at 4",
        ]
    by_replica = {result["replica"]: result["read"] for result in results}
    taken = [number for turn in zip(*by_replica.values(), strict=True) for samples in turn for number in samples]
    assert sorted(taken[:NUM_SAMPLES]) == list(range(NUM_SAMPLES))
