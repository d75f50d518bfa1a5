"""The mail servers of the outside world, one program: ``python3 -m mx CONFIG`` on its machine.

It runs under Debian's own Python with Debian's own packages, so it imports nothing of this
project.
"""
