"""Launching: starting the processes of a run on this machine, or joining those that another launcher has started.

The launching process imports neither torch nor deepspeed, so that it answers at once. Environment variables are read
here and by the commands; elsewhere only by two modules that defer to what the user has set.
"""
