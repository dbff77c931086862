import pytest

from tests.faults.matrix import matrix, published


@pytest.mark.promise("P6.table")
def test_the_published_fault_matrix_is_the_one_that_is_tested():
    """What gateway/README.md says of each fault is what the tests check: `python -m tests.faults.matrix` writes it."""
    assert published() == matrix()
