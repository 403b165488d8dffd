"""Benchmarks: the server against itself and against others, on one machine, in one run.

`mlx-graft bench` measures and reports. A case (`cases/`) names what is measured and what is wanted of it; a
measure is run once a round on a side, which is what answers (a server in its own process, or a bare
generator); a figure is one number a round. No figure is written down here: all that a report shows was
measured in the run that it reports.
"""
