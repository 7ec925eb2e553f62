"""Settings for all tests: one thread (two cores are shared) and a deterministic hypothesis."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
# The same examples in every run, so that a failure in CI is a failure here; a database of past failures adds nothing.
settings.register_profile("deterministic", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("deterministic")
