"""Faults under load, and what the store promises in spite of them: `make chaos`.

    python -m tests.chaos                       every part, at full size
    python -m tests.chaos kills repeats         some of them
    python -m tests.chaos kills --scale 0.05    a part at a twentieth of its size

`recording` sends quotes and notes what was answered, `victims` are the processes that are killed, frozen and restarted,
`verifying` compares what was noted with the store, and each other module is one scenario. tests/test_chaos.py runs the
same scenarios small.
"""
