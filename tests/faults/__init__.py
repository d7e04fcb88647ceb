"""Faults put under the real command, in real processes, and the report of what came of it.

    tracing.py     the command under strace: its calls counted, and one of them killed or failed
    cases.py       what is run, and what must hold afterwards
    sweeps.py      a fault at every call of a case: SIGKILL, error codes, power cuts
    disks.py       file systems on loop devices, and the power cut
    transfers.py   a shim under which every transfer is short, and a shard over 2 GiB
    races.py       many runs at once
    space.py       clones, full and read-only file systems
    incumbents.py  other writers under the same faults
    matrix.py      bugs planted on purpose, each of which some technique has to catch
    report.py      docs/reliability.md from docs/reliability/*.json
    run.py         all of it; `make faults`

The short tests here take a sample of the same points with every test run.
"""
