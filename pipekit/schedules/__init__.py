"""Pipeline schedules as tables: the ordered list of actions of each pipeline rank."""

from pipekit.schedules.action import Action
from pipekit.schedules.auto import plan_auto
from pipekit.schedules.catalog import (
    SCHEDULE_NAMES,
    default_stages_per_rank,
    plan_schedule,
    schedule_placement,
)
from pipekit.schedules.csv_file import read_csv, write_csv
from pipekit.schedules.gpipe import plan_gpipe
from pipekit.schedules.interleaved import plan_interleaved_1f1b
from pipekit.schedules.one_f_one_b import plan_1f1b, plan_forward_only
from pipekit.schedules.placement import plan_placement
from pipekit.schedules.schedule import Schedule
from pipekit.schedules.simulate import Costs, Span, Timeline, median_costs, simulate
from pipekit.schedules.validate import validate
from pipekit.schedules.zb_v import plan_zb_v
from pipekit.schedules.zero_bubble import plan_zb_h1

__all__ = [
    "SCHEDULE_NAMES",
    "Action",
    "Costs",
    "Schedule",
    "Span",
    "Timeline",
    "default_stages_per_rank",
    "median_costs",
    "plan_1f1b",
    "plan_auto",
    "plan_forward_only",
    "plan_gpipe",
    "plan_interleaved_1f1b",
    "plan_placement",
    "plan_schedule",
    "plan_zb_h1",
    "plan_zb_v",
    "read_csv",
    "schedule_placement",
    "simulate",
    "validate",
    "write_csv",
]
