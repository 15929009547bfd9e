"""Package data of the demo: a tiny checkpoint that really processes audio, and a folder of recordings.

`checkpoint/` is an Audio Flamingo 3 of 3.85 million parameters; `clips/` contains recordings for it, one of which
is broken. `NOTICE.md` says where both come from and under which licence they ship.
"""
