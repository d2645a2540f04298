"""Suite ``rivals``: what somebody with a CPU would take instead of a layer on a bank.

Ways to run a linear layer come in *families*, one for each package, and every family runs in a
process of its own, because their thread pools do not bear each other. ``families`` has a file for
each; ``registry`` is the list. ``contender`` says what a way gives, ``worker`` is the process,
``turns`` takes samples of all of them in turn, ``run`` makes the result file.
"""
