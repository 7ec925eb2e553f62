"""The numerics version: which numbers this code makes.

Raise it by hand with every change that moves a run's numbers, and say in the list below what moved. Golden traces
(`tests/test_golden.py`) fail while a change moves numbers and the version stays. A refactoring leaves both as they are, and
published results stay current.

A run is begun, continued, scored and collected under one version only: `cppo.results.run_folder` refuses the rest.
"""

NUMERICS_VERSION = 1
"""
0   What was published before versions were counted.
1   Tasks, settings and rules have their present names; run ids are new.
"""
