"""The rehearsal: the whole platform on one machine, in a sealed network.

:mod:`rehearsal.cli` has the commands; :mod:`rehearsal.network` and :mod:`rehearsal.machine` what
the platform runs on; :mod:`rehearsal.standins` the providers that are stood in for, and
:mod:`rehearsal.world` the internet around it.
"""
