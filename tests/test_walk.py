"""A paused forward computes what a plain one does, and leaves nothing behind."""

import weakref
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from gptq.models.forward import PausableForward, identify, keep_arguments, pause_before, pause_instead


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))


def run_through(forward: PausableForward) -> None:
    while forward.advance():
        pass


def test_pausing_changes_no_bit_and_sees_every_input(rng: torch.Generator) -> None:
    net, x = network(), torch.randn(3, 4, generator=rng)
    with torch.no_grad():
        plain = net(x)
        forward = PausableForward(lambda: net(x))
        with pause_before([net[0], net[2]]):
            first = forward.advance()
            assert first is not None
            assert first.module is net[0]
            assert first.args[0] is x
            second = forward.advance()
            assert second is not None
            assert torch.equal(second.args[0], torch.tanh(net[0].forward(x)))
            assert forward.advance() is None
    assert torch.equal(forward.result, plain)


def test_a_weight_swapped_during_a_pause_is_the_one_that_runs() -> None:
    net, x = network(), torch.ones(1, 4)
    forward = PausableForward(lambda: net(x))
    with torch.no_grad(), pause_before([net[2]]):
        forward.advance()
        net[2].weight = nn.Parameter(torch.zeros(4, 4))
        forward.advance()
    assert torch.equal(forward.result, net[2].state_dict()["bias"][None])


def test_two_forwards_interleave() -> None:
    net = network()
    inputs = [torch.full((1, 4), float(i)) for i in range(3)]
    with torch.no_grad():
        expected = [net(x) for x in inputs]
        forwards = [PausableForward(lambda x=x: net(x)) for x in inputs]  # type: ignore[misc]
        with pause_before([net[0], net[2]]):
            for _ in range(3):
                for forward in reversed(forwards):
                    forward.advance()
    assert all(torch.equal(f.result, e) for f, e in zip(forwards, expected, strict=True))


def test_answers_stand_in_for_a_module_and_its_forward_comes_back() -> None:
    net, x = network(), torch.ones(1, 4)
    with torch.no_grad():
        forward = PausableForward(lambda: net(x))
        with pause_instead([net[0]]) as originals:
            pause = forward.advance()
            assert pause is not None
            forward.advance(originals[net[0]](*pause.args) + 1)
        assert torch.equal(forward.result, net[2](torch.tanh(net[0](x) + 1)))
        assert "forward" not in vars(net[0])


def test_stopping_frees_and_errors_reach_the_caller() -> None:
    net = network()
    with pause_before([net[0]]):
        forward = PausableForward(lambda: net(torch.ones(1, 4)))
        forward.advance()
        forward.stop()
        forward.stop()
        assert forward.standing is None
        with pytest.raises(RuntimeError, match="outside a PausableForward"):
            net(torch.ones(1, 4))
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            run_through(PausableForward(lambda: net(torch.ones(1, 5))))
    assert not net[0]._forward_pre_hooks


def test_identity_sees_views_and_writes() -> None:
    x = torch.zeros(2, 6)
    before = identify(x)
    assert identify(x.view(2, 6)) == before
    assert identify(x.clone()) != before
    assert identify(x.view(3, 4)) != before
    x += 1
    assert identify(x) != before


def test_what_comes_to_the_same_place_later_is_not_the_same() -> None:
    memory = bytearray(64)
    array = np.frombuffer(memory, dtype=np.float32)
    x, held = torch.from_numpy(array), weakref.ref(array)
    before = identify(x)
    del x, array
    assert held() is None  # a key keeps nothing alive
    y = torch.frombuffer(memory, dtype=torch.float32)
    assert identify(y)[1:] == before[1:]
    assert identify(y) != before


def test_an_ended_forward_cannot_go_on() -> None:
    forward = PausableForward(lambda: 7)
    assert forward.advance() is None
    assert forward.result == 7
    with pytest.raises(RuntimeError, match="has ended"):
        forward.advance()


def test_a_pause_knows_what_an_earlier_module_was_called_on(rng: torch.Generator) -> None:
    """Each forward its own, also when several are paused; and none is known of a module that comes later."""
    net, x = network(), torch.randn(3, 4, generator=rng)
    forwards = [PausableForward(partial(net, one)) for one in (x, x + 1)]
    with torch.no_grad(), keep_arguments([net[0], net[2]]), pause_before([net[1]]):
        pauses = [forward.advance() for forward in forwards]
        for pause, one in zip(pauses, (x, x + 1), strict=True):
            assert pause is not None
            assert torch.equal(pause.kept.pop(net[0]), one)
            assert pause.kept == {}
        run_through(forwards[0])
        assert [*pauses[0].kept] == [net[2]]  # type: ignore[union-attr]
        assert pauses[1].kept == {}  # type: ignore[union-attr]
        forwards[1].stop()
        net[0](x)  # nothing is kept of a call outside
    assert not net[0]._forward_pre_hooks
