"""Spares the host from encoding the same prompts anew for every image, without changing a bit of its answer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

PATIENCE = 3  # runs in a row whose result was never used again, after which the encoder is left alone
CONSTANTS = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, slice)
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def find_text_encoder(model: nn.Module) -> nn.Module | None:
    """The module that turns the host's prompts into text features, or None in a fork that has it elsewhere."""
    module = getattr(getattr(model, "clip_head", None), "text_encoder", None)
    return module if isinstance(module, nn.Module) else None


class _CannotTell(Exception):
    """Whether the result would be the same cannot be told; the message says why."""


@dataclass(frozen=True)
class _Kept:
    """One run of the encoder: what it depended on, and what it gave."""

    inputs: Any
    state: list[tuple[Any, Any]]
    alive: list[Tensor]  # storages of weights, so that none of their addresses is given to other values meanwhile
    output: Any


class TextCache:
    """Gives an encoder's last result again as long as it would compute the same; active in eval mode without gradients.

    That is checked on every call: the inputs by value, bit for bit, against a copy; the modules, their parameters, buffers and
    plain attributes by identity, address and version, which every write in place counts up, those of an optimizer and of
    load_state_dict among them (a write through `.data` alone leaves no trace, so `module.train()` and a call with gradients
    forget the result); and the settings of torch that move the last bits. Wherever this cannot be told the encoder runs: with
    inputs other than tensors, plain values and containers of these, with somebody's hook or replaced forward inside it, while
    it is traced. So it does where it draws random numbers, writes into its inputs or itself, or returns part of them. After
    PATIENCE runs in a row for nothing, which is what prompts that depend on the image lead to, nothing is checked any more.

    What is given is a copy of its own each time, so whoever writes into it changes nothing later. Held in memory: one copy
    of the inputs, one of the result.

    It sits in the instance's `forward`, below forward hooks, which all fire as ever, and adds nothing to the module tree or the
    state dict. A copy or pickle of the module has no cache. A context manager; `remove` puts everything back.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._kept: _Kept | None = None
        self._fruitless = 0
        self._off = True
        self._said: set[str] = set()

    def attach(self) -> TextCache:
        """Begin. A module whose `forward` somebody has replaced, another cache for one, is left alone."""
        if "forward" in vars(self.module) or isinstance(self.module, torch.jit.ScriptModule):
            self._say("its forward is not its class's own")
        else:
            self._off = False
            self.module.forward = self.forward
        return self

    def remove(self) -> None:
        """End; calling it again does nothing."""
        # a wrapper that somebody put around this one stays in place, and then reaches the encoder through it
        if vars(self.module).get("forward") == self.forward:
            del self.module.forward
        self._off, self._kept = True, None

    def __enter__(self) -> TextCache:
        return self.attach()

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_off": True, "_kept": None}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own forward returns for these arguments, bit for bit; raises what that raises."""
        if self._off or self.module.training or torch.is_grad_enabled() or _traced():
            self._kept = None
            return self._run(args, kwargs)
        try:
            state = _state(self.module)
            kept = self._kept
            # on a GPU comparing values waits for the device, which costs little beside a pass through the encoder
            if kept and _same_state(kept.state, state) and _same_values(kept.inputs, (args, kwargs)):
                self._fruitless = 0
                return copy.deepcopy(kept.output)
            self._kept = kept = None  # before the new inputs are copied: never two of them in memory
            inputs = copy.deepcopy(_plain((args, kwargs)))
        except (_CannotTell, torch.OutOfMemoryError) as reason:
            self._kept = None
            self._say(str(reason))
            return self._run(args, kwargs)
        random = _random_state()
        output = self._run(args, kwargs)
        try:
            self._keep(inputs, (args, kwargs), state, output, random)
        except (_CannotTell, torch.OutOfMemoryError) as reason:
            self._say(str(reason))
        self._fruitless += 1
        if self._fruitless == PATIENCE:
            self._off, self._kept = True, None
            self._say("what it depends on changes from image to image")
        return output

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)

    def _keep(self, inputs: Any, given: Any, state: list[tuple[Any, Any]], output: Any, random: list[Tensor]) -> None:
        """Keep a run that depended on nothing but `inputs` and `state`, and did nothing but return `output`."""
        if not all(torch.equal(a, b) for a, b in zip(random, _random_state(), strict=True)):
            raise _CannotTell("it draws random numbers")
        if not _same_state(state, _state(self.module)) or not _same_values(inputs, given):
            raise _CannotTell("it writes into its inputs or into itself")
        weights = [value for value, _ in state if isinstance(value, Tensor)]
        addresses = {tensor.untyped_storage().data_ptr() for tensor in [*weights, *_tensors(given)]}
        if any(tensor.untyped_storage().data_ptr() in addresses for tensor in _tensors(output) if tensor.numel()):
            raise _CannotTell("it returns part of what it was given")
        self._kept = _Kept(inputs, state, [tensor.detach() for tensor in weights], copy.deepcopy(_plain(output)))

    def _say(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            log.info("text_cache: the text encoder runs for every image, as in a bare run: %s", why)


def _traced() -> bool:
    """Whether somebody records what runs, so that a result given again would be recorded as a constant."""
    if torch._C._get_tracing_state() is not None or torch.compiler.is_compiling():
        return True
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _random_state() -> list[Tensor]:
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def _plain(value: Any) -> Any:
    """`value`, if it is made of tensors, plain values and their containers; raises _CannotTell."""
    for _ in _tensors(value):
        pass
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested containers, in order. Raises _CannotTell at what is neither."""
    if isinstance(value, Tensor):
        _check(value)
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif not isinstance(value, CONSTANTS):
        raise _CannotTell(f"a {type(value).__name__} cannot be compared")


def _check(tensor: Tensor) -> None:
    """Raises _CannotTell for what is more than numbers in memory."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.is_quantized:
        raise _CannotTell(f"a {type(tensor).__name__} ({tensor.layout}) cannot be compared bit for bit")
    if tensor.element_size() not in BITS or tensor.is_conj() or tensor.is_neg():
        raise _CannotTell(f"a tensor of {tensor.dtype} cannot be compared bit for bit")
    if tensor.grad_fn is not None:
        raise _CannotTell("a tensor in it has a gradient's history")


def _same_values(a: Any, b: Any) -> bool:
    """Whether two nests of tensors are the same: kinds, order, dtypes, layouts, and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return _layout(a) == _layout(b) and torch.equal(_bits(a), _bits(b))
    if isinstance(a, dict):
        return list(a) == list(b) and _same_values(list(a.values()), list(b.values()))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_same_values(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(BITS[tensor.element_size()])  # as numbers 0 and -0 are the same, and NaN is not itself


def _state(module: nn.Module) -> list[tuple[Any, Any]]:
    """What a module's forward may read beside its arguments, as pairs (object held by identity, value held by value).

    Raises _CannotTell where somebody's hook or own forward is inside, which has to run, or weights without versions are.
    """
    if nn.modules.module._has_any_global_hook():
        raise _CannotTell("a hook on all modules is registered")
    found: list[tuple[Any, Any]] = [(None, setting) for setting in _settings()]
    _collect(module, found, set(), outermost=True)
    return found


def _settings() -> Iterator[Any]:
    """What a script may switch around a call and what moves a result's bits, or its dtype."""
    yield torch.get_default_dtype()
    yield torch.get_num_threads()
    yield torch.are_deterministic_algorithms_enabled()
    for device in ("cpu", "cuda"):
        yield torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)


def _collect(value: Any, found: list[tuple[Any, Any]], seen: set[int], *, outermost: bool = False) -> None:
    if isinstance(value, Tensor):
        _check(value)
        if value.is_inference():
            raise _CannotTell("its weights were made in inference mode, so a change of them would not be seen")
        found.append((value, (value._version, value.data_ptr(), *_layout(value))))
        return
    if isinstance(value, (nn.Module, dict, list, tuple, set)):
        found.append((value, len(value) if not isinstance(value, nn.Module) else type(value).forward))
        if id(value) in seen:
            return
        seen.add(id(value))
    if isinstance(value, nn.Module):
        own = vars(value)
        hooked = any(hooks for name, hooks in own.items() if name.startswith("_forward") and "hooks" in name)
        if not outermost and (hooked or "forward" in own):
            raise _CannotTell("somebody's hook or own forward is inside it")
        for name, item in own.items():
            if "_hooks" not in name:
                _collect(item, found, seen)
    elif isinstance(value, dict):
        for key, item in value.items():
            found.append((key, None))
            _collect(item, found, seen)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            _collect(item, found, seen)
    elif isinstance(value, CONSTANTS):
        found.append((None, value))
    else:
        found.append((value, None))


def _same_state(before: list[tuple[Any, Any]], after: list[tuple[Any, Any]]) -> bool:
    return len(before) == len(after) and all(a is b and m == n for (a, m), (b, n) in zip(before, after, strict=True))
