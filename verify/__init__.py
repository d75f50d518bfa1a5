"""The mail contract's checks, against a rehearsal or the live platform.

Each check observes a running platform from outside, as the other party would, and has the id
of the contract's row that it covers. ``python -m verify --help`` runs them.
"""
