"""What the demo needs, as package data: a tiny checkpoint that really hears, and a folder of recordings.

`checkpoint/` is an Audio Flamingo 3 of 3.85 million parameters; `clips/` holds recordings it answers, and one
that is broken. `NOTICE.md` says where both come from and under which licence they ship.
"""
