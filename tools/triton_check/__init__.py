"""The Triton kernels executed without a GPU, in the form that the compiler gives them, and judged.

`make triton-check` runs it in an environment of its own. ttsem (on PyPI) pretends to be an sm_90,
compiles every launch of the cases in tests/backends/triton/cases to Triton's intermediate form
and executes that on the CPU, in bfloat16 too, which Triton's own interpreter computes wrongly. It
sees what a GPU hides: accesses out of bounds, programs that race, memory that nobody wrote.

    __main__.py   everything, in processes of its own; the closing line
    cases.py      one such process: pytest on some files, below ttsem
    counts.py     what it found
    checks.py     what is checked of every launch beside its results
    mutants.py    faults planted into copies of the kernels, each of which must be seen
"""
