"""A back end proves itself before it is trusted.

A back end with ``must_prove`` is not taken for a call that nobody forced until a trial of the same
kind of call has given right results here: a call with a weight of the same shape and generator (of
huge ones fewer rows), the same configuration and a few rows of the batch, in a process of its own,
whose crash or hang harms nothing (``trial.py``, ``trial_run.py``, ``trial_process.py``). The
verdict is kept in the user's cache folder for this GPU, driver and these versions
(``verdicts.py``). A back end that fails is left aside, with one warning, and the next one runs;
``trust.py`` is asked for every call.

``RPG_KERNELS_PROVE=0`` trusts all of them; ``here`` makes trials in the calling process, which is
also done where no other process can use the device. Forcing a back end skips its trials.
"""

from rpg_kernels.backends.proving.trust import (
    compile_ahead,
    proved,
    refused,
    said,
    state,
    warn_once,
)
from rpg_kernels.backends.proving.verdicts import folder

__all__ = ["compile_ahead", "folder", "proved", "refused", "said", "state", "warn_once"]
