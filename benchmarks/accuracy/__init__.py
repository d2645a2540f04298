"""Accuracy experiments: what granularity, signs, sharing and degrees of freedom cost on images.

    python -m benchmarks.accuracy run --data PATH --budget MINUTES [--only PATTERN] [--seeds 0 1 2]
    python -m benchmarks.accuracy report

``run`` trains one network after another and appends each finished run to a results file, so that a
run cut short loses nothing but itself; ``report`` makes tables and plots from that file alone.
"""
