"""Rules between the keys of the `data` section."""

from __future__ import annotations

from typing import Any

import pytest

from pipekit.config.data_config import DataConfig
from pipekit.config.data_rules import mixture_fits, stages_fit

WEB, CODE = {"name": "web", "source": "data/web"}, {"name": "code", "source": "data/code"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"mixture": [WEB], "source": "text.txt"},
            "data.source=text.txt does not go with data.mixture, whose entries have a source each; remove one of them",
        ),
        (
            {"mixture": [WEB], "validation": "text.txt"},
            "data.validation=text.txt does not go with data.mixture, whose entries have a validation each; remove one "
            "of them",
        ),
        (
            {"mixture": [WEB, CODE, WEB]},
            "data.mixture.2.name=web is the name of data.mixture.0, too; rename one of them",
        ),
        (
            {"mixture": [{**WEB, "source": "data/web#3", "limit": 4}]},
            "data.mixture.0.limit=4: data.mixture.0.source=data/web#3 has a limit already; remove one of them",
        ),
        (
            {"mixture": [{**WEB, "weight": 0}]},
            "data.mixture: every weight is 0; give at least one source a weight above 0",
        ),
        (
            {"mixture": [{**WEB, "weight": 1}, CODE]},
            "data.mixture: weights of auto share what the numbers leave of 1, and these sum to 1; lower the numbers, "
            "or replace each auto by a number",
        ),
        (
            {"stages": [{"after_step": 1, "weights": {"web": 1}}]},
            "data.stages change the weights of data.mixture, which is not given; give it",
        ),
        (
            {"mixture": [WEB, CODE], "stages": [{"after_step": 1, "weights": {"wbe": 1}}]},
            "data.stages.0.weights: data.mixture has no source named wbe; did you mean web?",
        ),
        (
            {
                "mixture": [WEB, CODE],
                "stages": [{"after_step": 5, "weights": {"web": 1}}, {"after_step": 5, "weights": {"code": 1}}],
            },
            "data.stages.1.after_step=5 must be more than that of the stage before, 5; write the stages in their order",
        ),
        (
            {"mixture": [WEB, CODE], "stages": [{"after_step": 5, "weights": {"web": 0}}]},
            "data.stages.0.weights: every weight is 0; give at least one source a weight above 0",
        ),
    ],
)
def test_a_mixture_that_cannot_be_meant_is_refused(data: dict[str, Any], message: str) -> None:
    config = DataConfig.model_validate(data)
    assert [fault.message for rule in (mixture_fits, stages_fit) for fault in rule(config)] == [message]


def test_sources_may_be_left_to_a_stage() -> None:
    config = DataConfig.model_validate(
        {"mixture": [WEB, {**CODE, "weight": 0}], "stages": [{"after_step": 5, "weights": {"code": "auto"}}]}
    )
    assert not [*mixture_fits(config), *stages_fit(config)]
