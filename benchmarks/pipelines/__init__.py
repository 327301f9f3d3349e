"""The parts of `benchmarks/schedules.py`.

`settings` says what is measured, `turns` who takes part and how they take turns, `ranks` starts the processes. In those,
`workload` is what everybody trains (`sleeping` layers or a GPT), `peers`, `ours` and `limit` are who trains it.
"""
