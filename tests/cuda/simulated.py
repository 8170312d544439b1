"""A simulated machine with CUDA devices: the answers of torch.cuda, and tensors on these devices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
    unset_fake_temporarily,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
allow_reduction = torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.convolution}


class Machine:
    """CUDA devices with their streams, one of which is the current one."""

    def __init__(self, devices: int = 8):
        self.devices = devices
        self.current = 0
        self.streams = [Stream(self, torch.device("cuda", index)) for index in range(devices)]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Machine:
        """Answer instead of the driver. ``torch.cuda.is_available`` is not replaced, since torch itself calls it."""

        def answer(where: Any, **answers: Callable[..., Any]) -> None:
            for name, function in answers.items():
                monkeypatch.setattr(where, name, function, raising=False)

        answer(
            torch.cuda,
            device_count=lambda: self.devices,
            get_device_name=lambda device: "simulated",
            max_memory_allocated=lambda device=None: 0,
            reset_peak_memory_stats=lambda device=None: None,
            synchronize=lambda device=None: self.stream(device).synchronize(),
            empty_cache=lambda: None,
            current_device=lambda: self.current,
            is_bf16_supported=lambda including_emulation=True: True,
            current_stream=self.stream,
            default_stream=self.stream,
            stream=self.within,
            Stream=lambda device=None: Stream(self, self.stream(device).device),
            Event=lambda **options: Event(self, **options),
            _exchange_device=self.exchange,
            _maybe_exchange_device=self.exchange,
        )
        # torch.cuda.set_device calls this after checking its argument.
        answer(torch._C, _cuda_setDevice=self.exchange)
        answer(torch.cuda.amp.common, amp_definitely_not_available=lambda: False)
        return self

    def exchange(self, index: int) -> int:
        """Make a device the current one; returns the previous one."""
        before, self.current = self.current, index
        return before

    def stream(self, device: torch.device | None = None) -> Stream:
        """The current stream of a device, or of the current one."""
        return self.streams[self.current if device is None else device.index]

    @contextmanager
    def within(self, stream: Stream) -> Iterator[None]:
        """Make a stream, and its device, the current ones for a while."""
        index = stream.device.index
        device, before = self.exchange(index), self.streams[index]
        self.streams[index] = stream
        try:
            yield
        finally:
            self.current, self.streams[index] = device, before


class Stream:
    """Submitted work, which is done when somebody waits for it."""

    def __init__(self, machine: Machine, device: torch.device):
        self.machine, self.device = machine, device
        self.work: list[Callable[[], Any]] = []
        self.waited: list[Event] = []

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)

    def wait_stream(self, other: Stream) -> None:
        event = Event(self.machine)
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        for part in self.work:
            part()
        self.work.clear()


class Event:
    """A mark in a stream."""

    def __init__(self, machine: Machine, enable_timing: bool = False, blocking: bool = False):
        self.machine, self.blocking = machine, blocking
        self.stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or self.machine.stream()

    def synchronize(self) -> None:
        if self.stream:
            self.stream.synchronize()

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class _FakeTensors(FakeTensorMode):
    # Whether there is a device or not.
    avoid_device_init = True  # type: ignore[assignment]


class SimulatedCuda(TorchDispatchMode):
    """Within it, tensors on a machine's CUDA devices can be created and used, but not differentiated.

    An operation on them is done twice: with torch's fake tensors, which refuse what a device would refuse, such as
    tensors of two devices, and on the CPU for the values. Other operations are not changed. Attention is computed by
    its plain formula, because torch would query the device's properties to select a kernel. The result of a
    ``non_blocking`` copy to the host is NaN until an event recorded after it has been waited for.

    products: numbers of matrix products and convolutions on a device, by type of the result. waits: operations for
    which the host would have waited for a device.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        self.fakes = _FakeTensors(allow_non_fake_inputs=True)
        self.products: Counter[torch.dtype] = Counter()
        self.waits: list[str] = []

    def __enter__(self) -> SimulatedCuda:
        self.below = ExitStack()
        self.below.enter_context(sdpa_kernel(SDPBackend.MATH))
        # Like all other kernels, this one must compute in the type of its inputs.
        self.below.callback(allow_reduction, torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed())
        allow_reduction(True)
        self.below.enter_context(self.fakes)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.below.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].device
        kwargs = kwargs or {}
        devices: list[torch.device] = []
        own_args, own_kwargs = on_cpu(args, devices), on_cpu(kwargs, devices)
        device = devices[0] if devices else None
        if own_kwargs.get("pin_memory"):
            own_kwargs["pin_memory"] = False

        def on_host() -> Any:
            with unset_fake_temporarily():
                return func(*own_args, **own_kwargs)

        if device is None:
            return on_host()
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            # In inference mode operations come as they were called.
            super().__enter__()
            try:
                return func.decompose(*args, **kwargs)
            finally:
                super().__exit__(None, None, None)
        if func is aten.copy_.default and args[2:3] == (True,) and cuda_device(args[0]) is None:
            with unset_fake_temporarily():
                args[0].fill_(torch.nan)
            self.machine.stream(device).work.append(on_host)
            return args[0]
        if waits(func, args, kwargs):
            self.waits.append(str(func))
        try:
            fake = func(*args, **kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException):
            self.waits.append(str(func))
            fake = None
        except UnsupportedOperatorException:
            fake = None
        real = on_host()
        if func.overloadpacket in PRODUCTS:
            self.products[real.dtype] += 1
        return self._joined(fake, real, device)

    def _joined(self, fake: Any, real: Any, device: torch.device) -> Any:
        """The result of an operation: tensors on a device as fake ones with their values, everything else unchanged."""
        if isinstance(real, list | tuple):
            fakes = [None] * len(real) if fake is None else fake
            return type(real)(self._joined(f, r, device) for f, r in zip(fakes, real, strict=True))
        if not isinstance(real, Tensor):
            return real if fake is None else fake
        if fake is None:
            with self.fakes:
                fake = torch.empty_strided(real.shape, real.stride(), dtype=real.dtype, device=device)
        if fake.device.type != "cuda":
            return real
        # The tensors that batch normalisation keeps for its backward pass differ. They have no values, and using them
        # is an error.
        if (fake.shape, fake.dtype) == (real.shape, real.dtype):
            fake.value = real
        return fake


def cuda_device(leaf: Any) -> torch.device | None:
    """The CUDA device that a tensor is on, or that is named."""
    device = leaf.device if isinstance(leaf, Tensor) else leaf
    return device if isinstance(device, torch.device) and device.type == "cuda" else None


def on_cpu(item: Any, devices: list[torch.device] | None = None) -> Any:
    """An operation's arguments, or a structure of tensors, with values instead of tensors on a device and the CPU
    instead of the device. Adds the devices to ``devices``."""
    if isinstance(item, FakeTensor):
        if devices is not None:
            devices.append(item.device)
        return item.value
    if isinstance(item, torch.device) and item.type == "cuda":
        if devices is not None:
            devices.append(item)
        return torch.device("cpu")
    if isinstance(item, list | tuple):
        return type(item)(on_cpu(part, devices) for part in item)
    if isinstance(item, dict):
        return {name: on_cpu(part, devices) for name, part in item.items()}
    return item


def waits(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether an operation is a copy between host and device that is not ``non_blocking``."""
    if func is aten.copy_.default:
        ends, aside = args[:2], args[2:3] == (True,)
    elif func is aten._to_copy.default:
        ends, aside = (args[0], kwargs.get("device", args[0])), kwargs.get("non_blocking")
    else:
        return False
    return not aside and len({cuda_device(end) is None for end in ends}) == 2


def fill_gradients(root: Tensor) -> None:
    """Replaces ``backward``, for which torch needs a device: adds ones to the gradient of each leaf that a tensor was
    computed from."""
    assert root.shape == ()
    nodes, seen = [root.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
        if hasattr(node, "variable"):
            leaf = node.variable
            leaf.grad = torch.ones_like(leaf) if leaf.grad is None else leaf.grad + 1
