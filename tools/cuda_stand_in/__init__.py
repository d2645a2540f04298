"""A stand-in for the CUDA runtime: the host side of the GPU path, run without a GPU.

`make stand-in` runs a command in an environment with a CUDA build of torch, before which stands a
library that takes the place of libcuda, libcudart and cuBLAS. To torch and Triton there is a GPU,
whose memory is host memory. Kernels are compiled, loaded and launched; each launch is checked and
written down, and **nothing is computed**. So exceptions, wrong arguments, kernels that do not
compile and launches that a GPU would refuse are real. Values are garbage: the tool can show no
result to be right, no race, no access out of bounds within a kernel, and no time.

    __main__.py   python -m tools.cuda_stand_in [OPTIONS] -- COMMAND
    library.py    builds the library, and the native module against the shared libcudart
    startup/      what every Python process of the command begins with
    device.cpp    the pretended device and its memory
    launch.cpp    kernels, and which launches are possible
    streams.cpp   streams, events and the capture of graphs
    runtime.cpp   the rest of libcudart, and of cuBLAS what is looked at
    driver.cpp    libcuda
"""
