"""Benchmarks: the server against itself and against others, on one machine, in one run.

`python -m benchmarks` measures and reports. A case names what is compared; a side is what answers (a server
in its own process, or a bare generator); a load is what is asked of it. No figure is written down here: all
that a report shows was measured in the run that it reports.
"""
