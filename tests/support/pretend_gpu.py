"""A GPU that is not there: tensors that live on ``cuda:0``, hold their values on the CPU, and watch what is done.

Inside of ``with pretend_gpu() as gpu`` torch sees one CUDA device. Operations run on the CPU, so a whole command can be
run and its results compared. What a CPU cannot show is raised as `Hazard`, or counted:

* tensors of the host and of the device meet in one operation: `Hazard`;
* a stream reads what another one writes, or writes what another one reads, with no event, wait or synchronisation
  between them; memory is handed out again while another stream still uses it; the host changes a pinned buffer before
  its copy has ended: `Hazard` (each stream and the host have a vector clock, Lamport's happened-before);
* the host waits for the device, or a copy starts from pageable memory: noted in ``gpu.waits``, with the line of maesil;
* more than ``gpu.memory`` bytes are alive: `torch.OutOfMemoryError`.

Modes of torch belong to a thread: those of pools started inside are watched too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # before anything of torch is replaced
from support.pretend_streams import _GPU, Event, Gpu, Hazard, History, Memory, Stream, current_gpu, place
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)


class PretendTensor(Tensor):
    """A tensor of the pretended device. Python is told ``cuda:0``; the core of torch, which knows no GPU, the CPU."""

    values_held: Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, values: Tensor, memory: Memory) -> PretendTensor:
        made = Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype,
            device="cpu", requires_grad=False,
        )  # fmt: skip
        made.values_held, made.memory = values, memory
        return made

    def __init__(self, values: Tensor, memory: Memory) -> None:
        super().__init__()

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    def cpu(self, *_: object) -> Tensor:  # type: ignore[override]
        return self.to("cpu")

    def to(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        if args and isinstance(args[0], PretendTensor):
            device = DEVICE
        copied, dtype = bool(kwargs.get("copy")), dtype or self.dtype
        if device is not None and device.type == "cpu":
            return torch.ops.aten._to_copy.default(self, dtype=dtype, device=device, non_blocking=non_blocking)
        if not copied and dtype is self.dtype and memory_format is None:
            return self
        return torch.ops.aten._to_copy.default(self, dtype=dtype, memory_format=memory_format)

    def numpy(self, **_: object) -> Any:  # type: ignore[override]
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"PretendTensor({list(self.shape)}, {self.dtype})"

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.values_held.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied.detach(), self.requires_grad)
        memo[id(self)] = copied
        return copied

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        self.memory.history.kept_for.add(stream.name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and not isinstance(args[0], PretendTensor):
            return args[0].to(DEVICE, args[1].dtype)  # like another tensor
        with current_gpu().composing(), torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class _Watch(TorchDispatchMode):
    """Sees the operations that no tensor of the device takes part in: those that make one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


WAITING = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.is_nonzero.default,
    aten.masked_select.default, aten._unique2.default, aten.bincount.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}
COPIES = {aten.copy_.default, aten._to_copy.default}


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one operation on the values, after a look at where its tensors live."""
    gpu = current_gpu()
    flat, _ = tree_flatten((args, kwargs))
    ours = [one for one in flat if isinstance(one, PretendTensor)]
    if func is aten.is_pinned.default:
        return args[0].untyped_storage()._cdata in gpu.pinned
    if func in (aten._pin_memory.default,) or (kwargs.get("pin_memory") and not ours):
        return _pinned(gpu, func, args, kwargs)
    if gpu.in_backward and ours:
        kwargs = {**kwargs, "device": DEVICE} if "device" in kwargs else kwargs
    device = kwargs.get("device")
    wanted = torch.device(device).type if device is not None else None
    made_inside = gpu.makes_tensors_of_its_own and not any(isinstance(one, Tensor) for one in flat)
    if not ours and wanted != "cuda" and not made_inside:
        return func(*args, **kwargs)
    if func.namespace == "maesil" and ours:
        with _Watch():  # a mode is off while it looks at an operation
            return _operator(func)(*args, **kwargs)
    if func in COPIES:
        return _copy(gpu, func, args, kwargs, wanted)
    if strangers := [one for one in flat if _strange(one)]:
        raise Hazard(f"{func} of a tensor of cuda:0 and one of the CPU {list(strangers[0].shape)}, at {place()}")
    if func in WAITING or (func in _INDEXING and _by_mask(args)):
        gpu.waits_for(str(func))
    return _on_device(gpu, func, args, kwargs, ours)


_INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


def _by_mask(args: tuple[Any, ...]) -> bool:
    return any(isinstance(one, Tensor) and one.dtype in (torch.bool, torch.uint8) for one in args[1])


def _strange(one: object) -> bool:
    """A tensor of the host; numbers in a tensor without axes are taken along, as torch does."""
    return isinstance(one, Tensor) and not isinstance(one, PretendTensor) and one.dim() > 0


def _on_device(gpu: Gpu, func: Any, args: Any, kwargs: Any, ours: list[PretendTensor]) -> Any:
    memories = {one.values_held.untyped_storage()._cdata: one.memory for one in ours}
    given = {id(one.values_held): one for one in ours}
    real_args, real_kwargs = tree_map(
        lambda one: one.values_held if isinstance(one, PretendTensor) else one, (args, kwargs)
    )
    if "device" in real_kwargs:
        real_kwargs["device"] = torch.device("cpu")
    with _paused():
        found = _in_float32(func, real_args) if func in CONVOLUTIONS else func(*real_args, **real_kwargs)
    changed = _changed(func, args, kwargs)
    writes = _histories(changed)

    def wrapped(one: object) -> object:
        if not isinstance(one, Tensor):
            return one
        if id(one) in given:
            return given[id(one)]
        memory = memories.get(one.untyped_storage()._cdata)
        if memory is None:
            memory = gpu.allocate(one.untyped_storage().nbytes())
            memories[one.untyped_storage()._cdata] = memory
            writes.append(memory.history)
        return PretendTensor(one, memory)

    results = tree_map(wrapped, found)
    if not func.is_view:
        gpu.use(str(func), _histories(ours), writes)
    return results


def _in_float32(func: Any, args: Any) -> Any:
    """Convolve in float32 and round: torch 2.13's gradients of bfloat16 convolutions on a CPU are infinite at times."""
    dtype = args[0].dtype
    found = func(*tree_map(lambda one: one.float() if isinstance(one, Tensor) else one, args))
    return tree_map(lambda one: one.to(dtype) if isinstance(one, Tensor) else one, found)


def _values(one: object) -> object:
    return one.values_held if isinstance(one, PretendTensor) else one


def _histories(tensors: list[PretendTensor]) -> list[History]:
    return list({id(one.memory): one.memory.history for one in tensors}.values())


def _changed(func: Any, args: Any, kwargs: Any) -> list[PretendTensor]:
    """The tensors that an operation writes into."""
    named = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
    written = [named.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
    return [one for one in tree_flatten(written)[0] if isinstance(one, PretendTensor)]


def _copy(gpu: Gpu, func: Any, args: Any, kwargs: Any, wanted: str | None) -> Any:
    """Copies between host and device, or from one dtype to another."""
    source = args[1] if func is aten.copy_.default else args[0]
    into = args[0] if func is aten.copy_.default else None
    to_device = isinstance(into, PretendTensor) if into is not None else (wanted or source.device.type) == "cuda"
    if isinstance(source, PretendTensor) and not to_device:
        gpu.waits_for("a copy to the host")
        with _paused():
            if into is not None:
                return into.copy_(source.values_held)
            return func(source.values_held, **{**kwargs, "device": torch.device("cpu"), "non_blocking": False})
    if not isinstance(source, PretendTensor):
        source = _arrived(gpu, source, _non_blocking(func, args, kwargs))
    if into is not None:
        return _on_device(gpu, func, (into, source), {}, [into, source])
    return _on_device(gpu, func, (source,), {**kwargs, "non_blocking": False}, [source])


def _non_blocking(func: Any, args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2]))


def _arrived(gpu: Gpu, source: Tensor, non_blocking: bool) -> PretendTensor:
    """What a copy from the host leaves on the device: from pageable memory the host waits, unless it is one number."""
    with _paused():
        held = source.detach().clone(memory_format=torch.preserve_format)
    arrived = PretendTensor(held, gpu.allocate(held.untyped_storage().nbytes()))
    gpu.use("a copy to the device", [], [arrived.memory.history])
    if source.untyped_storage()._cdata in gpu.pinned and non_blocking:
        with _paused():
            gpu.copying.append((dict(arrived.memory.history.written), source.detach(), held.clone()))
    elif source.dim() > 0:
        gpu.waits_for("a copy from pageable memory")
    return arrived


def _pinned(gpu: Gpu, func: Any, args: Any, kwargs: Any) -> Tensor:
    with _paused():
        if func is aten._pin_memory.default:
            made = args[0].clone(memory_format=torch.contiguous_format)
        else:
            made = func(*args, **{**kwargs, "pin_memory": False})
    storage = made.untyped_storage()
    gpu.pinned.add(storage._cdata)
    return made


def _operator(func: Any) -> Callable[..., Any]:
    """The Python function behind an operator of ours, so that its inside is watched as well."""
    from maesil.kernels import library

    return getattr(library, func._schema.name.partition("::")[2])._init_fn


@contextlib.contextmanager
def _paused() -> Iterator[None]:
    with torch._C._DisableTorchDispatch():
        yield


@contextlib.contextmanager
def _on(stream: Stream | None) -> Iterator[None]:
    gpu = current_gpu()
    before = gpu.stream
    gpu.of_thread.stream = stream or before
    try:
        yield
    finally:
        gpu.of_thread.stream = before


def _submit(pool: ThreadPoolExecutor, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
    """Have the threads of a pool watched as well."""

    @functools.wraps(function)
    def watched(*inner: Any, **named: Any) -> Any:
        with _Watch():
            return function(*inner, **named)

    return _REAL_SUBMIT(pool, watched, *args, **kwargs)


_REAL_SUBMIT = ThreadPoolExecutor.submit


def _grouped(function: Callable[..., Any], lists: Any, *args: Any) -> Any:
    """Groups of tensors by device, which the core of torch takes for the CPU."""
    found = function(lists, *args)
    if not any(isinstance(one, PretendTensor) for one in tree_flatten(lists)[0]):
        return found
    return {(DEVICE, dtype): group for (_, dtype), group in found.items()}


def _of_the_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Note that gradients of the device are computed, if they are."""

    @functools.wraps(function)
    def noted(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        gpu = current_gpu()
        gpu.in_backward = any(isinstance(one, PretendTensor) for one in tree_flatten(tensors)[0])
        try:
            return function(tensors, *args, **kwargs)
        finally:
            gpu.in_backward = False

    return noted


class _Generator(torch.Generator):
    """The device's generator is one of the CPU."""

    def __new__(cls, device: object = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")


class _Autocast(torch.autocast):
    """Autocast of the device, and of the CPU that does its work."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(device_type, *args, **kwargs)
        self._below = torch.amp.autocast_mode.autocast("cpu", *args, **kwargs) if device_type == "cuda" else None

    def __enter__(self) -> Any:
        if self._below:
            self._below.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        super().__exit__(*error)
        if self._below:
            self._below.__exit__(*error)


@contextlib.contextmanager
def pretend_gpu(memory: int = 2**40) -> Iterator[Gpu]:
    """Let torch see a GPU with so many bytes."""
    gpu = Gpu(memory)
    _GPU.append(gpu)
    Stream(name="default")
    facts = SimpleNamespace(name="pretended", major=9, minor=0, total_memory=memory)
    patches = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "_lazy_init": lambda: None,
        "Stream": Stream, "Event": Event, "stream": _on, "current_stream": lambda *_: gpu.stream,
        "default_stream": lambda *_: gpu.streams[0], "set_device": lambda *_: None,
        "synchronize": lambda *_: [gpu.host_sees(stream.clock) for stream in gpu.streams],
        "device_of": lambda *_: contextlib.nullcontext(), "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda *_: (gpu.memory - gpu.used, gpu.memory), "get_device_name": lambda *_: facts.name,
        "get_device_capability": lambda *_: (9, 0), "get_device_properties": lambda *_: facts,
        "get_rng_state": lambda *_: torch.get_rng_state(), "set_rng_state": lambda *_: None,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: False,
    }  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, value in patches.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value, create=True))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.object(torch, "autocast", _Autocast))
        grouped = functools.partial(_grouped, torch._C._group_tensors_by_device_and_dtype)
        stack.enter_context(mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", grouped))
        for name in ("backward", "grad"):
            patched = _of_the_device(getattr(torch.autograd, name))
            stack.enter_context(mock.patch.object(torch.autograd, name, patched))
        # Moved parameters become new ones: torch would leave the old Python objects, which are of another class.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        stack.enter_context(mock.patch.object(ThreadPoolExecutor, "submit", _submit))
        try:
            with _Watch():
                yield gpu
            gpu.host_sees({name: tick for stream in gpu.streams for name, tick in stream.clock.items()})
        finally:
            _GPU.pop()
