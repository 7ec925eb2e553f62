"""What the fault tests share: a run that nothing disturbed."""

import pytest
import torch
from faults import kills
from faults.workshop import Workshop


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> kills.Reference:
    """The run with a critic, from its data to its tables; one thread, since sums are rounded by the number of threads."""
    torch.set_num_threads(1)
    return kills.reference(Workshop(tmp_path_factory.mktemp("workshop"), ("ppo",)))
