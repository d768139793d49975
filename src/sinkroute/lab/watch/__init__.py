"""Follow training while it runs: `sinkroute watch RUN...`.

`follow` reads what runs write, a few lines at a time; `terminal` draws it for a person, or prints a line for each new
one, and needs no torch; `serve` shows it as a page on this machine's loopback address, with curves of `chart`.
"""
