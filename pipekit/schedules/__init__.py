"""Pipeline schedules as tables: for each pipeline rank, the ordered list of its actions."""

from pipekit.schedules.action import Action, Schedule
from pipekit.schedules.one_f_one_b import plan_1f1b, plan_forward_only

__all__ = ["Action", "Schedule", "plan_1f1b", "plan_forward_only"]
