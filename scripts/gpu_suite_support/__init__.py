"""The parts of `scripts/gpu-suite`.

`main` reads the command line and runs the steps in order; `context` finds the parts (library, driver, runtime,
Python); `child` runs a process under a time limit; `report` holds the result and writes it. A module in `steps` is
one step of the suite and runs in the suite's own process, which never touches CUDA. A module in `probes` runs in a
child process, so that a hang or a lost CUDA context costs one answer and not the run.

Standard library only, everywhere but in the probes whose first paragraph says otherwise.
"""
