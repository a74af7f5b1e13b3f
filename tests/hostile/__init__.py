"""Hostile and careless clients, and what the service promises in spite of them: `make hostile`.

    python -m tests.hostile                            every part, at full size
    python -m tests.hostile bodies requests            some of them
    python -m tests.hostile bodies --only bombs        one attack
    python -m tests.hostile fuzz --scale 0.1 --seed 7  a tenth of it; what was random, again

An attack is a list of exchanges (`wire`), made in `bodies`, `requests`, `connections` and `fuzzing`; `striking` lets a
process of its own carry it out, beside a control. `watching` is another process: it asks for liveness, is another
client, and measures memory. `faults` puts a proxy on either side, `overload` sends more than is taken.
tests/test_hostile.py runs a short half.
"""
