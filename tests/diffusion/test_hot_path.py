"""The bridge and the loss wait for no device, copy nothing between devices, and fit into memory."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ezhoi_diffusion.diffusion.bridge import BridgeConfig, DiffusionBridge, build_denoiser
from ezhoi_diffusion.diffusion.recipes import RECIPES
from ezhoi_diffusion.training.loss import denoising_loss
from helpers.bridges import DIM, MLP, features, make, statistics


def fakes_a_gpu() -> bool:
    try:
        with FakeTensorMode():
            nn.Linear(1, 1, device="cuda")(torch.empty(1, 1, device="cuda"))
    except RuntimeError:
        return False
    return True


pytestmark = pytest.mark.skipif(not fakes_a_gpu(), reason="torch 2.5 fakes a GPU only where there is a driver")


class CrossesDevices(TorchDispatchMode):
    """Records operations on tensors of several devices: name, device and size of the result."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)}
        if len(devices) > 1:
            self.found.append((str(func), result.device.type, result.numel()))
        return result


def on_a_fake_gpu(bridge: nn.Module) -> nn.Module:
    """Copy a bridge to tensors that have a device and shapes, but no values: asking for a value raises.

    Tables that are made once, on the CPU, exist already.
    """
    bridge(features())
    moved = copy.deepcopy(bridge, {id(bridge.schedule): bridge.schedule})
    with FakeTensorMode() as mode:
        for module in moved.modules():
            for name, value in module._parameters.items():
                if value is not None:
                    module._parameters[name] = nn.Parameter(
                        torch.empty(value.shape, device="cuda"), requires_grad=False
                    )
            for name, value in module._buffers.items():
                if value is not None:
                    module._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
    moved.fake_mode = mode
    return moved


def around(denoiser: str, options: dict, recipe: str, objective: str = "pred_x0") -> DiffusionBridge:
    config = BridgeConfig(DIM, replace(RECIPES[recipe], num_steps=3), denoiser, options, objective)
    return DiffusionBridge(config, build_denoiser(config), statistics())


@pytest.mark.parametrize(
    ("denoiser", "options"), [("mlp", MLP), ("unet1d", {"init_dim": 8}), ("gaussian", {}), ("empirical", {"count": 5})]
)
@pytest.mark.parametrize("recipe", ["gentle", "guide", "paper"])
def test_the_bridge_waits_for_no_device_and_copies_between_none(denoiser, options, recipe):
    bridge = on_a_fake_gpu(around(denoiser, options, recipe))
    with bridge.fake_mode:
        x = torch.empty(16, DIM, device="cuda")
        with CrossesDevices() as crossing:
            y = bridge(x)
    assert y.device.type == "cuda"
    assert crossing.found == []


@pytest.mark.parametrize("objective", ["pred_noise", "pred_v"])
def test_other_objectives_do_not_either(objective):
    bridge = on_a_fake_gpu(around("mlp", MLP, "guide", objective))
    with bridge.fake_mode, CrossesDevices() as crossing:
        bridge(torch.empty(16, DIM, device="cuda"))
    assert crossing.found == []


def test_the_fake_gpu_notices_who_asks_for_a_value():
    bridge = on_a_fake_gpu(make())
    with bridge.fake_mode, pytest.raises(Exception, match="_local_scalar_dense"):
        bool(torch.isfinite(bridge(torch.empty(4, DIM, device="cuda"))).all())


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")  # of a fake tensor, by a copy of it
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("objective", ["pred_x0", "pred_noise", "pred_v"])
def test_loss_and_update_wait_for_no_device_and_copy_timesteps_only(objective, paired):
    """Schedule tables are looked up on the CPU, and one number per feature is copied."""
    bridge = on_a_fake_gpu(around("mlp", MLP, "gentle", objective))
    network, t = bridge.denoiser.train().requires_grad_(True), torch.arange(16)
    with bridge.fake_mode as mode:
        mode.allow_non_fake_inputs = True
        z, noise = (torch.empty(16, DIM, device="cuda") for _ in range(2))
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        with CrossesDevices() as crossing:
            loss = denoising_loss(network, z, t, noise, bridge.schedule, objective, 5.0, paired=paired)
            for parameter in network.parameters():  # autograd itself asks for a real device
                parameter.grad = torch.empty_like(parameter)
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            average.update_parameters(network)
    assert loss.device.type == "cuda"
    assert set(crossing.found) == {("aten._to_copy.default", "cuda", 16)}
    assert len(crossing.found) <= 6


@pytest.mark.parametrize("objective", ["pred_x0", "pred_noise", "pred_v"])
@pytest.mark.parametrize("spacing", ["linear", "quadratic", "cubic"])
def test_one_timestep_for_all_equals_one_for_each(objective, spacing):
    """The sampler passes one timestep for all features. The other bridge repeats it for each."""
    bridge, x = make("paper", objective, spacing=spacing), features()
    fast, plain = bridge(x), copy.deepcopy(bridge)

    class OneForEach(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            return self.net(x, t.expand(len(x)).contiguous())

    plain.denoiser = OneForEach(plain.denoiser)
    assert torch.allclose(plain(x), fast, rtol=1e-5, atol=1e-5 * float(fast.norm(dim=1).max()))


class LittleMemory(nn.Module):
    """A denoiser on a device with memory for `room` features."""

    def __init__(self, net: nn.Module, room: int) -> None:
        super().__init__()
        self.net, self.room, self.asked = net, room, []

    def forward(self, x, t):
        self.asked.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("fake")
        return self.net(x, t)


def test_chunks_halve_until_they_fit_and_stay_small():
    x, plain = features(100), make()
    bridge = make()
    bridge.denoiser = LittleMemory(bridge.denoiser, 13)
    assert torch.allclose(bridge(x), plain(x), rtol=1e-5)
    assert bridge.chunk_size == 13
    bridge.denoiser.asked.clear()
    bridge(x)
    assert max(bridge.denoiser.asked) == 13


def test_without_memory_for_one_feature_the_error_of_the_device_passes():
    bridge = make()
    bridge.denoiser = LittleMemory(bridge.denoiser, 0)
    with pytest.raises(torch.OutOfMemoryError):
        bridge(features(9))
