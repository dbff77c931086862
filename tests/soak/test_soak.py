"""What a gateway holds after each round of mixed traffic: the short form of `make soak`."""

import pytest

from tests.soak.run import Soak

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


@pytest.mark.promise("P17.memory")
async def test_no_request_leaves_anything_behind(tmp_path):
    """Whatever becomes of a request: no object, task, open file or memory is left of it, nor of a reload; the line through
    what the gateway and its worker of jobs hold at rest is level. (`make soak` goes on to a million.)
    """
    soak = Soak(requests=2000, each=125, names=5)
    await soak.run(tmp_path)
    assert soak.leaks == {}, soak.more_of
    assert soak.wrong == {}
    assert soak.complaints == []
