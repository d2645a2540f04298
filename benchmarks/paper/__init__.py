"""The tables of the paper, each by one command, with our rows beside the paper's.

    python -m benchmarks.paper NAME [--quick] [--budget MINUTES] [--seeds 0 1 2] [--only PATTERN]
    python -m benchmarks.paper report [NAME ...]

NAME trains what its results file lacks, one network and seed after another, and appends each
finished run, so that a run cut short loses nothing but itself. ``report`` makes tables, plots and
pictures in ``docs/results/`` from those files alone.
"""
