"""The bound that decides between plain and exact sums of the scan: read once, and again after each change."""

import copy

import pytest
import torch
from torch import nn

from fastsam_rwkv.modeling.layers import SpatialMix


def scan(decay=13.0, first=-1.0):
    mix = SpatialMix(16).requires_grad_(False)
    mix.decay.copy_(torch.linspace(0, decay, 16))
    mix.first.fill_(first)
    return mix


@pytest.mark.parametrize("values, bound", [((13.0, -1.0), 16.0), ((-13.0, 40.0), 64.0), ((0.3, 0.2), 0.5), ((0, 0), 1)])
def test_bound_is_a_power_of_two(values, bound):
    assert scan(*values).scan_bound() == bound


@pytest.mark.parametrize("inference", [False, True])
def test_changes_are_seen(inference):
    mix = scan()
    assert mix.scan_bound() == 16
    with torch.inference_mode(inference), torch.no_grad():
        mix.first[2] = 100
    assert mix.scan_bound() == 128
    mix.load_state_dict(scan(20.0).state_dict())
    assert mix.scan_bound() == 32
    mix.decay = nn.Parameter(torch.full((16,), 5.0))
    assert mix.scan_bound() == 8
    assert copy.deepcopy(mix).scan_bound() == 8
    with torch.no_grad():
        mix.decay[0] = torch.inf
    assert mix.scan_bound() == torch.inf


def test_there_is_no_bound_if_values_cannot_be_read_once():
    assert scan().to("meta").scan_bound() is None
    mix = scan()
    nn.utils.parametrize.register_parametrization(mix, "decay", nn.Identity())
    assert mix.scan_bound() is None


@torch.no_grad()
def test_other_parameters_in_place_of_the_models_own():
    mix, other = scan(), scan(3000.0)
    args = torch.randn(1, 4, 4, 16), nn.LayerNorm(16), torch.ones(16)
    mix(*args)
    torch.testing.assert_close(torch.func.functional_call(mix, dict(other.named_parameters()), args), other(*args))


@torch.no_grad()
def test_compiled_code_has_the_bound_as_a_constant():
    mix, norm, graphs = scan(), nn.LayerNorm(16), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: mix(x, norm, norm.weight), backend=backend, fullgraph=True)
    compiled(torch.randn(1, 4, 4, 16))
    (call,) = (node for node in graphs[0].graph.nodes if "bi_wkv" in str(node.target))
    assert call.args[5:] == (None, 16.0)
