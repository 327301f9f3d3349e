"""The parts of `benchmarks/schedules.py` and `benchmarks/planning.py`.

`command` is what both begin with. `settings` says what is measured, `turns` who takes part and how they take turns,
`ranks` starts the processes, `jobs` is what those do. There, `workload` is what everybody trains, `sleeping` layers or
a `gpt`; `peers`, `ours` and `limit` are who trains it. `requirements` and `report` say what came of schedules;
`profiled` is what the planner makes of a model, and `plan_report` what came of that.
"""
