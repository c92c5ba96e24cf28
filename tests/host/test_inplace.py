"""Cache writes go back in place, but not where the write reads the cache itself."""

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from lowering.host.inplace import recover_writes


def written(rows_of_cache: bool) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    def step(cache: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        new = torch.index_copy(cache, 0, positions, cache if rows_of_cache else rows)
        cache.copy_(new)
        return new * 2

    inputs = (torch.arange(4.0)[:, None], torch.tensor([1, 2, 3, 0]), -torch.ones(4, 1))
    return make_fx(step)(*inputs), inputs


def results(gm: fx.GraphModule, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    own = [x.clone() for x in inputs]
    return gm(*own), own[0]


def test_a_write_goes_back_in_place() -> None:
    gm, inputs = written(rows_of_cache=False)
    expected = results(gm, inputs)
    assert recover_writes(gm) == 1
    assert "copy_.default" not in {str(n.target).removeprefix("aten.") for n in gm.graph.nodes}
    assert all(torch.equal(a, b) for a, b in zip(results(gm, inputs), expected, strict=True))


def test_a_write_from_the_cache_itself_stays() -> None:
    gm, inputs = written(rows_of_cache=True)
    expected = results(gm, inputs)
    assert recover_writes(gm) == 0
    assert all(torch.equal(a, b) for a, b in zip(results(gm, inputs), expected, strict=True))
