"""Families of ``ckd-fed`` sub-commands. A module here imports nothing heavy before its command runs, so that --help stays quick."""
